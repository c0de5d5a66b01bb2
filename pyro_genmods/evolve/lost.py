r"""Rows that are lost on the way: looked for once, at the end, and traced back to the step that lost them.

A network that is not finite at some angle makes every later angle NaN too, so that one look at the last state sees all
that was lost. Looking at every step would make a processor wait for numbers that hardly anybody needs. A sampler is
therefore given a denoiser that keeps, call by call, whether what it said was finite, as a tensor that nobody reads
unless the end is not. Where torch's validation is off, as inside a traced program, nothing is looked for, and the rows
are NaN: one chain that is lost must not end the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..foundation.causal import transformed
from ..foundation.errors import IntegrationError
from .denoiser import Denoiser

__all__ = ["LostRowsError", "Watched", "carried", "refuse_lost"]

SHOWN = 8


class LostRowsError(IntegrationError):
    """Rows that are NaN or infinite, and where they were lost as far as is known.

    Arguments:
        lost: which rows, ``(rows,)``, booleans.
        angle: at which.
        step, steps: at which of how many.
    """

    def __init__(
        self, lost: Tensor, angle: Tensor | float | None = None, step: int | None = None, steps: int | None = None
    ) -> None:
        rows = lost.nonzero().flatten().tolist()
        when = "" if step is None else f" from step {step} of {steps} on"
        where = "" if angle is None else f" at angle {float(torch.as_tensor(angle).flatten()[0]):.4g}"
        super().__init__(
            f"{len(rows)} of {len(lost)} row(s) (the first: {rows[:SHOWN]}) are NaN or infinite{when}{where}: what the "
            "network says there is not finite. Check its weights, the data it was fitted to, and the context; or take "
            "more steps."
        )
        self.lost, self.angle = lost, angle

    def during(self, step: int, steps: int) -> LostRowsError:
        """The same, with the step."""
        return LostRowsError(self.lost, self.angle, step, steps)


class Watched(Denoiser):
    """A denoiser that keeps whether what it said was finite.

    Arguments:
        inner: the denoiser.

    Attributes:
        calls: angle of each call, and whether its outcome was finite; ``None`` while it is being made.
    """

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def velocity(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        return self._seen(self.inner.velocity, t, u, c)

    def denoised(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        return self._seen(self.inner.denoised, t, u, c)

    def noise(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        return self._seen(self.inner.noise, t, u, c)

    def score(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        return self._seen(self.inner.score, t, u, c)

    def covariance(self, t: Tensor, u: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._seen(self.inner.covariance, t, u, c)

    def _seen(self, form: Callable[..., Any], t: Tensor, u: Tensor, c: Tensor | None) -> Any:
        self.calls.append((t, None))
        outcome = form(t, u, c)
        first = outcome[0] if isinstance(outcome, tuple) else outcome
        self.calls[-1] = (t, first.detach().isfinite().all())
        return outcome

    def first_loss(self) -> tuple[int, Tensor]:
        """Number and angle of the first call that was not finite, or not finished; of the last, if all were."""
        found = (k for k, (_, finite) in enumerate(self.calls) if finite is None or not bool(finite))
        k = next(found, len(self.calls) - 1)
        return k, self.calls[k][0]


def refuse_lost(outcome: Tensor, angle: Tensor | float | None = None, strict: bool | None = None) -> None:
    """Refuse rows ``(rows, ...)`` that are not finite.

    Arguments:
        outcome: the rows.
        angle: at which they were made.
        strict: whether to look at all; default where torch's validation is on. Under transforms and tracers, where
            nothing may branch on numbers, nobody looks.

    Raises:
        IntegrationError: some are NaN or infinite.
    """
    if not (Distribution._validate_args if strict is None else strict) or transformed():
        return
    lost = ~outcome.detach().flatten(1).isfinite().all(-1)
    if bool(lost.any()):
        raise LostRowsError(lost, angle)


def carried(
    sampler: Any,
    denoiser: Denoiser,
    start: tuple[Tensor, Tensor | None],
    angles: Tensor,
    draw: Callable[[], Tensor],
    strict: bool | None = None,
) -> Tensor:
    """Rows carried from noise to data by a sampler, all of them finite.

    Arguments:
        sampler: a :class:`~pyro_genmods.evolve.samplers.Sampler`.
        denoiser, angles, draw: see its ``run``.
        start: standard normal rows at the first angle, and rows of context.
        strict: see :func:`refuse_lost`.

    Raises:
        IntegrationError: rows are NaN or infinite; the first step at which the network is, and the rows, are named.
    """
    strict = Distribution._validate_args if strict is None else strict
    if not strict or transformed():
        return sampler.run(denoiser, *start, angles, draw)
    watched = Watched(denoiser)
    try:
        end = sampler.run(watched, *start, angles, draw)
        refuse_lost(end, strict=True)
    except LostRowsError as error:
        call, angle = watched.first_loss()
        a_step = max(1, sampler.evaluations // sampler.steps)
        raise LostRowsError(error.lost, angle, call // a_step + 1, sampler.steps) from None
    return end
