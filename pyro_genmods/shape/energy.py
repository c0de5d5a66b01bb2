r"""Energies: a law by its shape, known up to a constant.

.. math:: p_\phi(x \mid c) = \frac{1}{Z_\phi(c)}\, b(x)\, e^{-E_\phi(x, c)},
          \qquad Z_\phi(c) = \int b(x)\, e^{-E_\phi(x, c)}\, \mathrm dx

A network gives the energy :math:`E`, one number for each event, with no architecture to obey; the base :math:`b`
(:class:`~pyro_genmods.shape.base.GaussianBase`, or a fitted flow) makes the law proper. The score
:math:`\nabla \log p` takes one call and is exact. What is missing is a sampler, for which chains stand in, and
:math:`Z`, on which three rules hang:

* with fixed parameters and a context that is no latent the constant cancels in every posterior, and the law is as good
  a prior as any other;
* parameters or a context that are inferred or learned need :math:`Z(c)` or its gradient. Without it the answer would be
  silently wrong, so it is refused (:class:`~pyro_genmods.foundation.errors.DoublyIntractableError`);
* evidences, and likelihoods that are compared, need its value: :func:`pyro_genmods.shape.normalize` attaches an
  estimate with its standard error.

References:
    Y. LeCun, S. Chopra, R. Hadsell, M. Ranzato, F. J. Huang, A Tutorial on Energy-Based Learning, 2006.
    E. Nijkamp, M. Hill, T. Han, S.-C. Zhu, Y. N. Wu, On the Anatomy of MCMC-Based Maximum Likelihood Learning of
    Energy-Based Models, 2019, arXiv:1903.12370.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call

from ..contract import Cost, Density, GenerativeModel
from ..coordinates import event_shape_on
from ..foundation.annealing import Path
from ..foundation.errors import DensityError, ShapeError
from ..foundation.moves import HamiltonianMoves
from ..foundation.networks import MLP, place_of
from ..foundation.shapes import Context, Noise, Rows, Values
from .base import GaussianBase
from .law import EnergyDistribution
from .network import Function, check_confining, check_network
from .normalizer import Normalizer
from .objectives import OBJECTIVES, Objective
from .sampling import SAMPLERS, EnergySampler, path_of
from .unnormalized import UnnormalizedModel, named

__all__ = ["Energy"]

EnergyFunction = Callable[..., Tensor]


class Energy(UnnormalizedModel):
    r"""A base tilted by a network, :math:`p(x) \propto b(x)\, e^{-E(x)}`.

    Arguments:
        features: number of unconstrained coordinates of an event.
        context_features: number of context features.
        network: :math:`E`, called as ``network(y)`` or ``network(y, c)`` with rows of standardised coordinates; returns
            one number for each. A module, or a plain function. By default a perceptron.
        base: :math:`b`: ``"gaussian"``, with the moments of the data; a fitted model with an exact density, a flow say,
            of which a frozen copy is kept; or ``None``, where the energy itself must confine.
        objective: what ``loss`` is: ``"denoising"``, ``"sliced"``, ``"hyvarinen"``, ``"contrastive"``, ``"nce"``,
            ``"recovery"``, or one of :mod:`pyro_genmods.shape.objectives` with options of your own.
        hidden_features: widths of the default network.
        support, event_shape: in the user's units.
        sampler: ``"annealed"`` (tempered sequential Monte Carlo from the base), ``"chains"``, ``"tempering"``, or one
            of :mod:`pyro_genmods.shape.sampling`.
        log_normalizer: :math:`\log Z(c)`, if you know it: a module or function of rows of standardised context (of
            nothing, without context), differentiable.
        learn: ``"contrastive"`` lets ``log_prob`` carry the gradient of maximum likelihood inside SVI, with draws in
            place of :math:`\nabla \log Z`; needs the contrastive objective, of which it takes the replay buffer.
        allow_unnormalized: evaluate the density although its constant depends on what is inferred. The answer is then
            that of another model: the one whose prior is multiplied by :math:`Z(c)`.

    Attributes:
        density: ``UNNORMALIZED``, until a normaliser is attached.
        base: the model that is tilted, or ``None``.
        log_normalizer_error: standard error of the attached normaliser, in nats.
        report: the last :func:`pyro_genmods.shape.mixing_report` of these weights, or ``None``.

    Shape:
        events ``event_shape``, contexts ``(context_features,)``.

    Raises:
        ShapeError: the network returns another shape, or features and event do not fit.
        ValueError: an unknown objective or sampler; an energy that is random, or mixes the rows of a batch.
        DensityError: an energy without a gradient; a base without an exact density.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)) * 3
        >>> energy = gm.Energy(1, objective="sliced", hidden_features=(16,))
        >>> history = gm.fit(energy, x, max_epochs=20, learning_rate=5e-3, seed=0, progress_bar=False)
        >>> law = energy.freeze()()
        >>> law.density.name, bool((law.score(x[:5]) * x[:5] < 0).all())         # the score points inwards
        ('UNNORMALIZED', True)
        >>> _ = torch.manual_seed(0)
        >>> abs(float(law.sample((1000,)).std()) - 3) < 0.3
        True
    """

    has_rsample = False
    continuous: ClassVar[bool] = True  # rows are real numbers, on which a fitted law can be put

    def __init__(
        self,
        features: int | None = None,
        context_features: int = 0,
        *,
        network: EnergyFunction | None = None,
        base: str | GenerativeModel | None = "gaussian",
        objective: str | Objective = "denoising",
        hidden_features: Sequence[int] = (128, 128),
        support: constraints.Constraint | None = None,
        event_shape: tuple[int, ...] | None = None,
        sampler: str | EnergySampler = "annealed",
        log_normalizer: Callable[..., Tensor] | None = None,
        learn: str | None = None,
        allow_unnormalized: bool = False,
    ) -> None:
        tilted = base if isinstance(base, GenerativeModel) else None
        if tilted is None and base not in ("gaussian", None):
            raise ValueError(f"base: got {base!r}, needs 'gaussian', None, or a fitted model with an exact density.")
        shape, support = _event(features, event_shape, support, tilted)
        super().__init__(shape, (context_features,) if context_features else (), support)
        if features is not None and self.features != features:
            raise ShapeError(
                f"event_shape {tuple(shape)} on {support} has {self.features} coordinates, features is {features}."
            )
        self._take_base(base, tilted, context_features)
        objective = named("objective", objective, OBJECTIVES)
        sampler = named("sampler", sampler, SAMPLERS)
        told = context_features + objective.told
        self.network = self._make_network(network, told, hidden_features)
        self.allow_unnormalized = allow_unnormalized
        self.normalizer = Normalizer(log_normalizer)
        self.to(*reversed(place_of(self.network) if list(self.network.parameters()) else self.place))
        check_network(self.network, self.features, told)
        self.take_records(objective, sampler, learn)

    def _take_base(self, base: Any, tilted: GenerativeModel | None, context_features: int) -> None:
        if tilted is None:
            self.reference: GenerativeModel = GaussianBase(self.coordinates)
            self.base = self.reference if base is not None else None
            return
        if tilted.density is not Density.EXACT or tilted.features != self.features:
            raise DensityError(
                f"base: {type(tilted).__name__} has density {tilted.density.name} and {tilted.features} coordinates; "
                f"needs an exact density of {self.features}: a fitted flow, say."
            )
        if tilted.context_shape and tilted.context_shape != self.context_shape:
            raise ShapeError(
                f"base: has context {tuple(tilted.context_shape)}, the energy {context_features} features."
            )
        self.base = self.reference = copy.deepcopy(tilted).freeze()
        self.coordinates = self.base.coordinates
        if self.base.context_shape:
            self.context_standardization = self.base.context_standardization
        self.constructor_arguments = {**self.constructor_arguments, "base": self.base}

    def _make_network(self, network: EnergyFunction | None, told: int, hidden_features: Sequence[int]) -> nn.Module:
        if network is None:
            return MLP(self.features + told, 1, hidden_features, output_bias=False)
        return network if isinstance(network, nn.Module) else Function(network)

    def forward(self, context: Tensor | None = None) -> EnergyDistribution:
        """The law at a context, see :meth:`pyro_genmods.GenerativeModel.forward`."""
        return EnergyDistribution(self, context)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def cost(self) -> Cost:
        """A chain to draw, one call to score."""
        return Cost(sample=None, score=1)

    # -- learning ------------------------------------------------------------------------------------------------

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Learn the units of data and context, and the moments of a Gaussian base; those of a given base stay.

        Raises:
            DataError: columns are constant or collinear.
        """
        if isinstance(self.reference, GaussianBase):
            super().standardize(x, context)
            self.reference.fit_(self.coordinates.pull(x)[0])
        elif self.context_standardization is not None and not self.reference.context_shape and context is not None:
            self.context_standardization.fit_(context.reshape(len(context), -1))

    def after_fit(self, x: Tensor, context: Tensor | None = None) -> None:
        """Look again for rows that are mixed, and for an energy that does not confine; drop what is no longer true.

        Raises:
            DensityError: the energy falls without end in some direction, and no base holds it.
        """
        check_network(self.network, self.features, self._told)
        self.normalizer.forget()
        self.report = None
        if self.base is None:
            check_confining(self, context)

    # -- row functions -------------------------------------------------------------------------------------------

    @property
    def _told(self) -> int:
        return (self.context_shape.numel() if self.context_shape else 0) + self.objective.told

    def energy_rows(self, y: Rows, c: Context | None, level: Tensor | None = None, fixed: bool = False) -> Values:
        """The network's energy of rows, :math:`E`.

        Arguments:
            y, c: rows of coordinates and of context.
            level: noise ``(rows, 1)``, for an objective of several levels; default the least of them.
            fixed: take the parameters as constants.
        """
        told = self.objective.tell(y, c, level)
        inputs = (y,) if told is None else (y, told)
        if fixed and any(parameter.requires_grad for parameter in self.network.parameters()):
            parameters = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
            return functional_call(self.network, parameters, inputs).reshape(y.shape[:1])
        return self.network(*inputs).reshape(y.shape[:1])

    def base_log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        r"""Log density of the base, :math:`\log b`; zero without one."""
        if self.base is None:
            return y.new_zeros(len(y))
        return self.base.log_prob_rows(y, self.told_base(c))

    def unnormalized_rows(self, y: Rows, c: Context | None, level: Tensor | None = None, fixed: bool = False) -> Values:
        r""":math:`\log b(y) - E(y, c)`; arguments as for :meth:`energy_rows`."""
        return self.base_log_prob_rows(y, c) - self.energy_rows(y, c, level, fixed)

    def score_rows(self, y: Rows, c: Context | None, level: Tensor | None = None) -> Rows:
        """Gradient of the log density of rows, differentiable in the parameters."""
        with torch.enable_grad():
            leaf = y if y.requires_grad else y.detach().requires_grad_()
            value = self.unnormalized_rows(leaf, c, level).sum()
            return torch.autograd.grad(value, leaf, create_graph=True)[0]

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        learned = self.learn == "contrastive" and torch.is_grad_enabled()
        value = self.unnormalized_rows(y, c, fixed=not (learned or self.normalizer.learned))
        value = value - self.normalizer(c, len(y)) if self.normalizer.attached else value
        return value + self.objective.surrogate(self, y, c) if learned else value

    def told_base(self, c: Context | None) -> Context | None:
        """What a base without context is told."""
        return c if self.reference.context_shape else None

    def reference_log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        """Log density of the law from which annealing starts: the base, else the Gaussian with the data's moments."""
        return self.reference.log_prob_rows(y, self.told_base(c))

    def reference_rows(self, rows: int, c: Context | None) -> Rows:
        """Draws of it."""
        with torch.no_grad():
            return self.reference.sample_rows(rows, self.told_base(c))

    def annealing(
        self, c: Tensor | None, groups: int, particles: int, generator: torch.Generator
    ) -> tuple[Path, Tensor, HamiltonianMoves]:
        """The path from the reference to the law, draws of the reference, and their moves.

        Arguments:
            c: context of each group ``(groups, context)``.
            groups, particles: of each group.
            generator: of the moves.
        """
        told = None if c is None else c.repeat_interleave(particles, 0)
        path, q = path_of(self, told), self.reference_rows(groups * particles, told)
        return path, q, HamiltonianMoves(path, q, generator, groups)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        if not rows:
            return self.reference_rows(0, c)
        return self.sampler.draw(self, rows, c)

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        raise DensityError("Energy is not a pushforward of noise; it has sample() and log_prob().")


def _event(
    features: int | None,
    event_shape: tuple[int, ...] | None,
    support: constraints.Constraint | None,
    tilted: GenerativeModel | None,
) -> tuple[Size, constraints.Constraint]:
    """Shape and support of events, those of a given base if nothing else is said."""
    if tilted is not None:
        return tilted.event_shape, tilted.support
    if features is None and event_shape is None:
        raise ShapeError("features: give the number of features, or an event_shape.")
    support = support or constraints.real
    return Size(event_shape) if event_shape is not None else event_shape_on(support, Size([features])), support
