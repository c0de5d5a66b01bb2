r"""What all laws of this room share: an objective, a sampler, and a constant that may be unknown."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..contract import Density, GenerativeModel
from .normalizer import Normalizer
from .objectives import Objective
from .sampling import EnergySampler

__all__ = ["UnnormalizedModel", "named"]


class UnnormalizedModel(GenerativeModel):
    """A law known up to its constant.

    Subclasses call :meth:`take_records` once their network is there.

    Attributes:
        objective, sampler: records of options.
        normalizer: the constant, or nothing yet.
        learn, allow_unnormalized: see :class:`pyro_genmods.Energy`.
        report: of chains, or ``None``.

    Example:
        >>> import pyro_genmods as gm
        >>> isinstance(gm.Energy(2), UnnormalizedModel), isinstance(gm.shape.RBM(3, 2), UnnormalizedModel)
        (True, True)
    """

    objective: Objective
    sampler: EnergySampler
    normalizer: Normalizer
    learn: str | None
    allow_unnormalized: bool
    report: Any = None

    def take_records(self, objective: Objective, sampler: EnergySampler, learn: str | None) -> None:
        """Take the records, and make what the objective must remember.

        Raises:
            ValueError: ``learn`` is not known, or needs chains that the objective does not keep.
        """
        self.objective, self.sampler, self.learn = objective, sampler, learn
        objective.prepare(self)
        if learn is not None and (learn != "contrastive" or not hasattr(self, "negatives")):
            raise ValueError(
                f"learn: got {learn!r}, needs None, or 'contrastive' with an objective that keeps chains, "
                "objective='contrastive'."
            )

    @property
    def density(self) -> Density:
        """Exact with an exact normaliser, an estimate with one that is estimated, else up to a constant."""
        return self.normalizer.density

    @property
    def comparable(self) -> bool:
        """Whether the loss says which of two epochs is better; contrasts with draws of the model do not."""
        return self.objective.comparable

    @property
    def log_normalizer_error(self) -> float:
        """Standard error of the normaliser in nats: 0 where exact, NaN without one."""
        return self.normalizer.error

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The objective per example, see :mod:`pyro_genmods.shape.objectives`."""
        y, c = self.rows(x, context)
        return self.objective.loss(self, y, c)


def named(name: str, given: Any, known: dict[str, type]) -> Any:
    """An object of options, or the one that a name stands for.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> from pyro_genmods.shape.objectives import OBJECTIVES
        >>> type(named("objective", "hyvarinen", OBJECTIVES)).__name__
        'Hyvarinen'
    """
    if not isinstance(given, str):
        return given
    if given not in known:
        raise ValueError(
            f"{name}: got {given!r}, needs one of {', '.join(map(repr, known))}, or an object of one's own."
        )
    return known[given]()
