r"""Objectives of binary energies: the likelihood where its constant is summed, else contrastive divergence.

.. math:: \nabla\bigl(-\log p_\phi(x)\bigr) = \nabla E_\phi(x) - \mathbb E_{p_\phi} \nabla E_\phi

:class:`Likelihood` has the second term exactly; :class:`GibbsContrastive` has draws in its place, of chains that are
taken up again where they were left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..foundation.objectives import contrastive_divergence, negative_log_likelihood
from ..foundation.shapes import Context, Rows, Values
from .negatives import Langevin, ReplayBuffer
from .objectives import Objective

__all__ = ["BINARY_OBJECTIVES", "GibbsBuffer", "GibbsContrastive", "Likelihood"]


@dataclass(frozen=True)
class Likelihood(Objective):
    """The negative log-likelihood in nats, constant included; needs a model that is normalised.

    Raises:
        ValueError: the constant is not part of the density.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> gm.shape.RBM(2, 2, normalized=True, objective=Likelihood()).loss(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def prepare(self, model: Any) -> None:
        if not model.normalized:
            raise ValueError(
                "objective: 'likelihood' needs the constant in the density; build the model with normalized=True, or "
                "take objective='contrastive'."
            )

    def loss(self, model: Any, y: Rows, c: Context | None) -> Values:
        return negative_log_likelihood(model.log_prob_rows(y, c))


class GibbsBuffer(ReplayBuffer):
    """A replay buffer whose chains move bits, by the model's own sweeps; arguments are those of :class:`ReplayBuffer`.

    Example:
        >>> GibbsBuffer(8, 2, 0, Langevin(1), 0.1).positions.shape
        torch.Size([8, 2])
    """

    def chain(self, model: Any, y: Rows, c: Context | None, extra: Callable[[Tensor], Tensor] | None = None) -> Rows:
        """Where chains from rows arrive."""
        return model.chain_rows(y, c, self.langevin.transitions)


@dataclass(frozen=True)
class GibbsContrastive(Objective):
    """Contrastive divergence: data against draws of the model, by chains that go on from step to step.

    Persistent chains live in a replay buffer, to which they are written back; a fraction of those that are drawn starts
    anew from the reference. With ``persistent=False`` they start at the data and are thrown away, and what is minimised
    is not the likelihood any more. The value of the loss says nothing, so ``fit`` keeps the last weights.

    Arguments:
        sweeps: of each chain for each step of training.
        persistent: see above.
        buffer_size: chains that are kept.
        restart: fraction of the drawn chains that starts anew; these are not yet draws of the model.

    Raises:
        ValueError: an option out of its range; a buffer smaller than a batch, at the first step.

    References:
        G. E. Hinton, 2002. T. Tieleman, Training Restricted Boltzmann Machines using Approximations to the Likelihood
        Gradient, 2008, ICML.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.shape.DiscreteEnergy(4, objective=GibbsContrastive(buffer_size=64))
        >>> model.loss(torch.zeros(32, 4)).shape, model.comparable
        (torch.Size([32]), False)
    """

    sweeps: int = 2
    persistent: bool = True
    buffer_size: int = 1024
    restart: float = 0.01

    comparable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sweeps < 1 or self.buffer_size < 1:
            raise ValueError(f"sweeps, buffer_size: got {self.sweeps}, {self.buffer_size}; need at least 1.")
        if not 0 <= self.restart <= 1:
            raise ValueError(f"restart: got {self.restart}, needs a fraction.")

    def prepare(self, model: Any) -> None:
        told = model.context_shape.numel() if model.context_shape else 0
        size = self.buffer_size if self.persistent else 0
        model.negatives = GibbsBuffer(size, model.features, told, Langevin(self.sweeps), self.restart)

    def loss(self, model: Any, y: Rows, c: Context | None) -> Values:
        if self.persistent:
            fake, told = model.negatives.draw(model, len(y), c, advance=model.training)
        else:
            fake, told = model.chain_rows(y, c, self.sweeps), c
        return contrastive_divergence(model.energy_rows(y, c), model.energy_rows(fake, told))

    def surrogate(self, model: Any, y: Rows, c: Context | None) -> Values:
        fake, told = model.negatives.draw(model, max(len(y), 1), c, advance=model.training)
        mean = model.energy_rows(fake, told).mean()
        return (mean - mean.detach()).expand(len(y))


BINARY_OBJECTIVES: dict[str, type[Objective]] = {"contrastive": GibbsContrastive, "likelihood": Likelihood}
