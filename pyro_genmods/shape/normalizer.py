r"""The constant of an energy's law, once it is known: a number with its error, or a function of the context."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..contract import Density
from ..foundation.kriging import Interpolation

__all__ = ["Normalizer"]

UNKNOWN = -1.0  # standard error of what is not there; NaN would not equal itself in a state


class Normalizer(nn.Module):
    r""":math:`\log Z`, or nothing yet.

    Arguments:
        function: :math:`\log Z(c)` of rows of standardised context, or of nothing; exact.

    Attributes:
        value: :math:`\log Z` in nats where it is one number. ``standard_error``: its own.

    Example:
        >>> normalizer = Normalizer()
        >>> normalizer.density.name, normalizer.attach(2.0, 0.01).density.name, normalizer(None, 2)
        ('UNNORMALIZED', 'ESTIMATE', tensor([2., 2.]))
    """

    def __init__(self, function: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("standard_error", torch.full((), UNKNOWN))
        self.function = function
        self.given = function is not None
        if self.given:
            self.standard_error.zero_()

    @property
    def attached(self) -> bool:
        """Whether there is one."""
        return not math.isnan(self.error)

    @property
    def learned(self) -> bool:
        """Whether it follows the parameters of the energy: only a module of the user's can."""
        return self.given and isinstance(self.function, nn.Module) and any(True for _ in self.function.parameters())

    @property
    def error(self) -> float:
        """Standard error in nats: zero where exact, NaN where there is no normaliser."""
        return self._error

    @property
    def density(self) -> Density:
        """What the law's density is worth with it."""
        if not self.attached:
            return Density.UNNORMALIZED
        return Density.EXACT if self.error == 0 else Density.ESTIMATE

    def attach(self, value: float, standard_error: float, function: Callable[..., Tensor] | None = None) -> Normalizer:
        r"""Take a number, or a function of the context.

        Arguments:
            value: :math:`\log Z` in nats.
            standard_error: of it, or of the function where it is worst.
            function: :math:`\log Z(c)` of rows of standardised context.
        """
        self.value.fill_(value)
        self.standard_error.fill_(UNKNOWN if math.isnan(standard_error) else standard_error)
        self.function, self._known = function, None
        return self

    def forget(self) -> None:
        """Drop an estimate that belongs to weights of the past; what the user gave stays."""
        if not self.given:
            self.attach(0.0, math.nan)

    def forward(self, c: Tensor | None, rows: int) -> Tensor:
        if self.function is None:
            return self.value.expand(rows)
        value = self.function() if c is None else self.function(c)
        return value.reshape(-1).expand(rows)

    @property
    def _error(self) -> float:
        known = self.__dict__.get("_known")
        if known is None:  # read from the device once, not at every density
            error = float(self.standard_error)
            known = self.__dict__["_known"] = error if error >= 0 else math.nan
        return known

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: object) -> None:
        if not self.given:  # an estimate comes with the function it found, and without the one that was here
            centres = state.get(f"{prefix}function.centres")
            self.function = None if centres is None else Interpolation(*centres.shape).to(centres)
        super()._load_from_state_dict(state, prefix, *args)
        self.__dict__["_known"] = None
