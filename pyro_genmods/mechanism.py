r"""What a mechanism is: facts of theory as attributes, and functions on rows.

The tests read the facts (:class:`Density`, :class:`Cost`) and check the functions against them.
"""

from __future__ import annotations

import enum
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor, nn
from torch.distributions import constraints

from .coordinates import Coordinates, Standardization
from .foundation.errors import DensityError, ShapeError
from .foundation.shapes import Context, Noise, Rows, Values

__all__ = ["Cost", "Density", "Mechanism"]

Built = TypeVar("Built", bound="Mechanism")


class Density(enum.Enum):
    """How honest ``log_prob`` is; inference reads it and refuses what would be wrong."""

    EXACT = "exact, up to rounding or a stated tolerance"
    ESTIMATE = "an estimate, deterministic for one distribution object"
    UNNORMALIZED = "exact up to an unknown additive constant"
    IMPLICIT = "a sampler without a density"


@dataclass(frozen=True)
class Cost:
    """Sequential network calls to draw one batch and to score one batch; ``None`` where the run decides.

    Attributes:
        sample: calls of ``rsample`` or ``push``.
        score: calls of ``log_prob``.
    """

    sample: int | None
    score: int | None

    SLOW: ClassVar[int] = 4

    @property
    def slow_direction(self) -> str | None:
        """``"sample"`` or ``"score"`` if that direction takes more than four times the calls of the other."""
        if self.sample is None or self.score is None:
            return None
        if self.sample > self.SLOW * max(self.score, 1):
            return "sample"
        return "score" if self.score > self.SLOW * max(self.sample, 1) else None


class Mechanism(nn.Module, ABC):
    r"""One way of pushing probability mass: parameters, facts, and functions on rows.

    ``y`` are rows of standardised coordinates ``(rows, features)``, ``z`` rows of noise, ``c`` rows of standardised
    context or ``None``. A mechanism implements :attr:`cost` and the row functions it has; the others refuse and name
    the remedy.

    Arguments:
        event_shape: shape of one event.
        context_shape: shape of one context, ``()`` for an unconditional model.
        support: where events live, in the user's units; elementwise constraints are spread over the event.
        native: the mechanism works on the support itself; no bijection and no standardisation.

    Attributes:
        density: how honest :meth:`log_prob_rows` is.
        acceptable: whether chains may accept and reject by the density: not where it is estimated with frozen probes,
            which make a law of their own, and the user has not said that this law is wanted.
        has_rsample: whether draws carry pathwise gradients.
        value_dtype: dtype of values where it is not that of the parameters (tokens are ``torch.int64``).
        loss_unit: unit of ``loss``, for bars and plots: nats, or ``"sd"`` where it is a distance between standardised
            values.
        comparable: whether the value of ``loss`` tells which of two epochs is the better one, so that ``fit`` may keep
            the best; where it does not (a game, a contrast with draws of one's own), the last weights are kept.
        betas: decays of Adam's two moments that suit the objective, for training.
        constructor_arguments: what the object was built from; a saved model is rebuilt from it.

    Raises:
        ShapeError: an empty event, or a support with more dimensions than the event.
        SupportError: the support has no bijection to the reals.
    """

    density: ClassVar[Density]
    acceptable: bool = True
    has_rsample: bool = True
    value_dtype: torch.dtype | None = None
    loss_unit: ClassVar[str] = "nats"
    comparable: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __new__(cls: type[Built], *args: Any, **kwargs: Any) -> Built:
        """Remember the constructor's arguments, from which a saved model is rebuilt."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # __init__ will say so better, or deepcopy is about to fill the object
            return self
        arguments = {name: value for name, value in bound.arguments.items() if value is not self}
        object.__setattr__(self, "constructor_arguments", arguments)
        return self

    def __init__(
        self,
        event_shape: Size | tuple[int, ...],
        context_shape: Size | tuple[int, ...] = (),
        support: constraints.Constraint = constraints.real,
        native: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape, self.context_shape = Size(event_shape), Size(context_shape)
        if 0 in self.event_shape + self.context_shape or not self.event_shape:
            raise ShapeError(f"event_shape {tuple(event_shape)}, context_shape {tuple(context_shape)}: empty.")
        self.coordinates = Coordinates(self.event_shape, support, native)
        self.context_standardization = Standardization(self.context_shape.numel()) if self.context_shape else None

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """Sequential network calls of sampling and scoring."""

    @property
    def support(self) -> constraints.Constraint:
        """Where events live, with the event's ``event_dim``."""
        return self.coordinates.support

    @property
    def features(self) -> int:
        """Number of columns of a row."""
        return self.coordinates.features

    @property
    def noise_shape(self) -> Size:
        """Event shape of the base noise."""
        return Size([self.features])

    @property
    def place(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device that values must have."""
        shift = self.coordinates.standardization.shift
        return shift.dtype, shift.device

    @property
    def takes_any_dtype(self) -> bool:
        """Whether all values are discrete, so that integers and floating point numbers mean the same."""
        return False

    @cached_property
    def slow_direction(self) -> str | None:
        """The direction not to be run in a loop, see :attr:`Cost.slow_direction`."""
        return self.cost.slow_direction

    def start_at_identity(self) -> bool:
        """Reset the parameters so that :meth:`push_rows` is the identity map, if the mechanism can; say whether."""
        return False

    # -- row functions -------------------------------------------------------------------------------------------

    def base_distribution(self) -> TorchDistributionMixin:
        """Law of the noise, event shape :attr:`noise_shape`, no batch."""
        dtype, device = self.place
        zero = torch.zeros((), dtype=dtype, device=device)
        return Normal(zero, zero + 1, validate_args=False).expand(self.noise_shape).to_event(len(self.noise_shape))

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        """Log density of rows."""
        raise DensityError(
            f"{type(self).__name__} has no density ({self.density.value}); to infer under it, reparameterise the "
            "site with infer.PushforwardReparam()."
        )

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        """Noise to rows, differentiably."""
        raise DensityError(f"{type(self).__name__} is not a pushforward of noise; it has sample() and log_prob().")

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        """Rows to noise."""
        raise DensityError(f"{type(self).__name__} cannot be inverted; observe through a likelihood instead.")

    def push_and_log_prob_rows(self, z: Noise, c: Context | None) -> tuple[Rows, Values]:
        """Noise to rows and their log density, computed together where that is cheaper."""
        y = self.push_rows(z, c)
        return y, self.log_prob_rows(y, c)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        """Draw rows, with gradients where the push has them."""
        return self.push_rows(self._noise(rows), c)

    def sample_and_log_prob_rows(self, rows: int, c: Context | None) -> tuple[Rows, Values]:
        """Draw rows together with their log density."""
        return self.push_and_log_prob_rows(self._noise(rows), c)

    def _noise(self, rows: int) -> Tensor:
        return self.base_distribution().sample(Size([rows]))
