r"""Discrete energies: any differentiable function of bits as a law.

.. math:: p_\phi(x \mid c) = \frac{1}{Z_\phi(c)}\, e^{-E_\phi(x, c)}, \qquad x \in \{0, 1\}^n

The energy is a function of real numbers that is only asked at zeros and ones; its gradient there tells which flips pay,
and moves the chains (:mod:`pyro_genmods.foundation.gibbs`). How the law is drawn, normalised and taught is said in
:mod:`pyro_genmods.shape.binary`.

References:
    W. Grathwohl, K. Swersky, M. Hashemi, D. Duvenaud, C. J. Maddison, Oops I Took A Gradient: Scalable Sampling for
    Discrete Distributions, 2021, arXiv:2102.04509.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Size, Tensor, nn

from ..foundation.annealing import Path
from ..foundation.errors import ShapeError
from ..foundation.gibbs import GibbsMoves
from ..foundation.networks import MLP, place_of
from .binary import BinaryEnergy, check_summed
from .network import Function, check_network
from .objectives import Objective
from .sampling import EnergySampler

__all__ = ["DiscreteEnergy"]


class DiscreteEnergy(BinaryEnergy):
    r"""A law of bits, :math:`p(x) \propto e^{-E(x)}`.

    Arguments:
        features: number of bits, for events that are vectors.
        context_features: number of context features.
        network: :math:`E`, called as ``network(y)`` or ``network(y, c)`` with rows of zeros and ones and of
            standardised context; returns one number for each, differentiable in ``y``. A module, or a plain function.
            By default a perceptron.
        event_shape: shape of an event, in place of ``features``.
        hidden_features: widths of the default network.
        objective: what ``loss`` is: ``"likelihood"`` (the default where the law is normalised), ``"contrastive"`` (the
            default elsewhere), or one of :mod:`pyro_genmods.shape.binary_objectives` with options of your own.
        sampler: ``"exact"`` (from the list of all events, the default up to twelve bits), ``"annealed"`` (tempered
            sequential Monte Carlo from the reference, the default beyond), ``"gibbs"`` (a chain for each draw), or one
            of :mod:`pyro_genmods.shape.binary_sampling`.
        reference: where annealing starts: bits with the frequencies of the data (``"fitted"``), or fair ones
            (``"uniform"``).
        normalized: sum :math:`Z(c)` over all events, at most 65536, in every density: it is then exact, and may be
            learned and inferred. With a context this takes as many calls of the network's rows for every row of data.
        learn: ``"contrastive"`` lets ``log_prob`` carry the gradient of maximum likelihood inside SVI, with draws in
            place of :math:`\nabla \log Z`; needs the contrastive objective, of which it takes the replay buffer.
        allow_unnormalized: evaluate the density although its constant depends on what is inferred. The answer is then
            that of another model: the one whose prior is multiplied by :math:`Z(c)`.

    Attributes:
        density: ``UNNORMALIZED``, until a normaliser is attached (``normalized=True``, :meth:`normalize_`).
        log_normalizer_error: standard error of the attached normaliser, in nats.

    Shape:
        events ``event_shape``, zeros and ones of any dtype; contexts ``(context_features,)``.

    Raises:
        ShapeError: the network returns another shape, or no size is given, or two.
        ValueError: an unknown objective, sampler or reference; an energy that is random, or mixes the rows of a batch.
        DensityError: an energy without a gradient; more bits than are summed.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> _ = torch.manual_seed(0)
        >>> x = (torch.rand(2000, 1) < 0.5).float().expand(-1, 3)             # three bits that always agree
        >>> energy = gm.shape.DiscreteEnergy(3, normalized=True, hidden_features=(16,))
        >>> history = gm.fit(energy, x, max_epochs=40, learning_rate=0.03, seed=0, progress_bar=False)
        >>> law = energy.freeze()()
        >>> bool((law.log_prob(x[:50]).exp() > 0.45).all()), law.density.name
        (True, 'EXACT')
        >>> law.sample((5,)).shape
        torch.Size([5, 3])
    """

    summing_calls: ClassVar[int] = 1

    def __init__(
        self,
        features: int | None = None,
        context_features: int = 0,
        *,
        network: Callable[..., Tensor] | None = None,
        event_shape: tuple[int, ...] | None = None,
        hidden_features: Sequence[int] = (128, 128),
        objective: str | Objective | None = None,
        sampler: str | EnergySampler | None = None,
        reference: str = "fitted",
        normalized: bool = False,
        learn: str | None = None,
        allow_unnormalized: bool = False,
    ) -> None:
        shape = _shape_of(features, event_shape)
        if context_features < 0:
            raise ShapeError(f"context_features: got {context_features}, needs 0 for no context, or its width.")
        if normalized:
            check_summed(shape.numel(), "features")
        if network is None:
            network = MLP(shape.numel() + context_features, 1, hidden_features, output_bias=False)
        super().__init__(
            shape,
            context_features,
            network if isinstance(network, nn.Module) else Function(network),
            objective=objective,
            sampler=sampler,
            reference=reference,
            normalized=normalized,
            learn=learn,
            allow_unnormalized=allow_unnormalized,
        )
        self.to(*reversed(place_of(self.network) if list(self.network.parameters()) else self.place))
        check_network(self.network, self.features, context_features, binary=True)

    def after_fit(self, x: Tensor, context: Tensor | None = None) -> None:
        """Look again for rows that are mixed; drop an old normaliser."""
        check_network(self.network, self.features, self.context_shape.numel() if self.context_shape else 0, binary=True)
        super().after_fit(x, context)

    def moves(self, path: Path, q: Tensor, generator: torch.Generator, groups: int = 1) -> GibbsMoves:
        """Sweeps of Gibbs with gradients."""
        return GibbsMoves(path, q, generator, groups)


def _shape_of(features: int | None, event_shape: tuple[int, ...] | None) -> Size:
    if (features is None) == (event_shape is None):
        raise ShapeError(f"features: got {features}, and event_shape={event_shape}; give one of them.")
    shape = Size([features] if event_shape is None else event_shape)
    if not shape or min(shape) < 1:
        raise ShapeError(f"features: got {tuple(shape)}, needs a positive number of bits, or the shape of an event.")
    return shape
