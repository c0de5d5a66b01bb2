r"""Restricted Boltzmann machines: bits that are tied together by hidden ones.

.. math:: E(v, h) = -b \cdot v - c \cdot h - v^\top W h, \qquad
          E(v) = -\log \sum_h e^{-E(v, h)} = -b \cdot v - \sum_j \operatorname{softplus}(c_j + (W^\top v)_j)

Given one layer the other is independent, so a whole layer is drawn at once (*block Gibbs*): the hidden units with
probabilities :math:`\sigma(c + W^\top v)`, the visible ones with :math:`\sigma(b + W h)`. Summing a layer out leaves a
function of the other in closed form, so that :math:`Z` is a sum over the events of the smaller layer.

Annealing takes both layers along,

.. math:: U_\beta(v, h) = (1 - \beta)\bigl(-\log b_0(v) + n_h \log 2\bigr) + \beta\, E(v, h) ,

with independent visible bits :math:`b_0` and fair hidden ones at its beginning: the conditionals of every law on the
way are as simple as those of the last.

References:
    P. Smolensky, Information Processing in Dynamical Systems: Foundations of Harmony Theory, 1986. G. E. Hinton,
    Training Products of Experts by Minimizing Contrastive Divergence, Neural Computation 14 (2002) 1771-1800.
    R. Salakhutdinov, I. Murray, On the Quantitative Analysis of Deep Belief Networks, 2008, ICML.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..foundation.annealing import Path
from ..foundation.bits import log_sum_over_bits
from ..foundation.errors import ShapeError
from ..foundation.gibbs import Sweeps, bernoulli
from ..foundation.moves import Tempered
from ..foundation.shapes import Context, Values
from .binary import BinaryEnergy, check_summed
from .objectives import Objective
from .sampling import EnergySampler

__all__ = ["RBM", "BlockGibbs", "FreeEnergy"]


class FreeEnergy(nn.Module):
    """Energies of visible units with the hidden ones summed out, ``(rows, visible)`` to ``(rows,)``.

    Arguments:
        visible, hidden: numbers of units.

    Attributes:
        weight: ``(visible, hidden)``, small random numbers at first. ``visible_bias``, ``hidden_bias``: zero at first.

    Example:
        >>> FreeEnergy(3, 2)(torch.zeros(1, 3))                      # two hidden units that may do as they like
        tensor([-1.3863], grad_fn=...)
    """

    def __init__(self, visible: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(visible, hidden) * (0.1 / math.sqrt(visible)))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, y: Tensor) -> Tensor:
        return -(y @ self.visible_bias) - softplus(self.hidden_bias + y @ self.weight).sum(-1)

    def of_hidden(self, h: Tensor) -> Tensor:
        """Energies of hidden units with the visible ones summed out, ``(rows,)``."""
        return -(h @ self.hidden_bias) - softplus(self.visible_bias + h @ self.weight.mT).sum(-1)


class RBM(BinaryEnergy):
    r"""A restricted Boltzmann machine, as a law of its visible units.

    Arguments:
        visible: number of visible units, for events that are vectors; or the shape of an event.
        hidden: number of hidden units.
        objective: what ``loss`` is: ``"contrastive"``, or ``"likelihood"`` where the law is normalised, see
            :class:`~pyro_genmods.shape.DiscreteEnergy`.
        sampler: ``"annealed"``, ``"gibbs"``, or ``"exact"`` for few visible units, likewise.
        reference, learn, allow_unnormalized: likewise.
        normalized: sum the constant over the smaller layer, of at most 16 units, in every density.

    Attributes:
        density: ``UNNORMALIZED``, until a normaliser is attached (``normalized=True``, :meth:`normalize_`).
        network: the energy, with ``weight``, ``visible_bias``, ``hidden_bias``.

    Shape:
        events ``(visible,)``, zeros and ones.

    Raises:
        ShapeError: no units in a layer.
        DensityError: at ``exact_log_normalizer``, more than 24 units in both layers.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> _ = torch.manual_seed(0)
        >>> x = (torch.rand(500, 1) < 0.5).float().expand(-1, 3)               # three bits that always agree
        >>> rbm = gm.shape.RBM(3, 2)
        >>> options = {"max_epochs": 40, "learning_rate": 0.1, "batch_size": 50, "seed": 0, "progress_bar": False}
        >>> history = gm.fit(rbm, x, **options)
        >>> law = rbm.freeze().normalize_()()
        >>> bool(law.log_prob(torch.tensor([[0.0] * 3, [1.0] * 3])).exp().sum() > 0.9), law.density.name
        (True, 'EXACT')
    """

    def __init__(
        self,
        visible: int | tuple[int, ...],
        hidden: int,
        *,
        objective: str | Objective | None = None,
        sampler: str | EnergySampler | None = None,
        reference: str = "fitted",
        normalized: bool = False,
        learn: str | None = None,
        allow_unnormalized: bool = False,
    ) -> None:
        shape = torch.Size((visible,) if isinstance(visible, int) else visible)
        if not shape or min(shape) < 1 or hidden < 1:
            raise ShapeError(f"visible, hidden: got {visible}, {hidden}; need at least one unit each.")
        if normalized:
            check_summed(min(shape.numel(), hidden), "the smaller layer")
        super().__init__(
            shape,
            0,
            FreeEnergy(shape.numel(), hidden),
            objective=objective,
            sampler=sampler,
            reference=reference,
            normalized=normalized,
            learn=learn,
            allow_unnormalized=allow_unnormalized,
        )
        self.hidden = hidden

    def log_normalizer_rows(self, c: Context | None = None) -> Values:
        network = self.network
        hidden, visible = network.hidden_bias.numel(), self.features
        energy, units = (network.of_hidden, hidden) if hidden <= visible else (network, visible)
        return log_sum_over_bits(lambda rows: -energy(rows), units, self.reference.logits)[None]

    def hidden_logits(self, v: Tensor) -> Tensor:
        """Log odds of the hidden units given visible ones, ``(*, visible)`` to ``(*, hidden)``."""
        return self.network.hidden_bias + v @ self.network.weight

    # -- chains --------------------------------------------------------------------------------------------------

    def lift(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Visible units, and fair hidden ones after them."""
        return torch.cat([y, bernoulli(y.new_zeros(len(y), self.hidden), generator)], -1)

    def path(self, c: Tensor | None) -> Path:
        """From independent units of both layers to the machine."""
        fixed = {name: x.detach() for name, x in self.network.named_parameters()}

        def reference(q: Tensor) -> Tensor:
            return self.hidden * math.log(2) - self.reference(q[:, : self.features])

        def tilt(q: Tensor) -> Tensor:
            v, h = q.split([self.features, self.hidden], -1)
            pull = (h * (fixed["hidden_bias"] + v @ fixed["weight"])).sum(-1)
            return -(v @ fixed["visible_bias"]) - pull - reference(q)

        return Path(reference, tilt)

    def moves(self, path: Path, q: Tensor, generator: torch.Generator, groups: int = 1) -> BlockGibbs:
        """Sweeps of block Gibbs."""
        return BlockGibbs(self, path, q, generator, groups)


class BlockGibbs(Sweeps):
    """Sweeps in which the hidden layer is drawn given the visible one, and the visible one given it.

    Arguments:
        model: whose units they are.
        energy: the path from independent units to it.
        q: both layers, ``(particles, visible + hidden)``.
        generator, groups: see :class:`~pyro_genmods.foundation.moves.Moves`.

    Example:
        >>> rbm = RBM(4, 2)
        >>> path, q, moves = rbm.annealing(None, 1, 8, torch.Generator())
        >>> path.inverse_temperature = torch.ones(8)
        >>> moves.run(q, 5).shape
        torch.Size([8, 6])
    """

    def __init__(self, model: RBM, energy: Tempered, q: Tensor, generator: torch.Generator, groups: int = 1) -> None:
        super().__init__(energy, q, generator, groups)
        network = model.network
        self.weight, self.hidden_bias = network.weight.detach(), network.hidden_bias.detach()
        self.visible_bias, self.reference = network.visible_bias.detach(), model.reference.logits

    def take(self, q: Tensor) -> None:
        self._v = q[:, : len(self.weight)]

    def sweep(self) -> tuple[Tensor, float]:
        beta = self.energy.inverse_temperature[:, None]
        h = bernoulli(beta * (self.hidden_bias + self._v @ self.weight), self.generator)
        logits = beta * (self.visible_bias + h @ self.weight.mT) + (1 - beta) * self.reference
        self._v = bernoulli(logits, self.generator)
        self.count(len(h))
        return torch.cat([self._v, h], -1), 1.0
