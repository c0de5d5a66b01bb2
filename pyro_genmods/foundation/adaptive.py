r"""Steps of an embedded Runge-Kutta pair, chosen for every row by the error of that row alone.

Every row has its own time and step length, and rows that have arrived are no longer evaluated: what a row gets does
not depend on its neighbours, and one stiff row does not shorten the steps of the others. With error :math:`e` of a step
in units of the tolerance, the step is accepted if :math:`e \le 1`, and the next one is :math:`0.9\, e^{-1/5}` times as
long, within a factor of ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import IntegrationError
from .runge_kutta import DORMAND_PRINCE, Field, combine, runge_kutta_step

__all__ = ["Accuracy", "Step", "adaptive_steps"]

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Accuracy:
    """What is asked of a step, and how many are tried.

    Example:
        >>> Accuracy(1e-5, 1e-6, 100).scale(torch.tensor([[2.0]]), torch.tensor([[-3.0]]))
        tensor([[3.1000e-05]])
    """

    rtol: float
    atol: float
    max_steps: int

    def scale(self, y: Tensor, end: Tensor) -> Tensor:
        """Error that a column may have."""
        return self.atol + self.rtol * torch.maximum(y.abs(), end.abs())


class Step(NamedTuple):
    """A step that was made: rows ``index`` (all, if ``None``) went from ``y`` at time ``t`` a time ``h`` further.

    Example:
        >>> Step(None, torch.tensor(0.0), torch.tensor(0.1), torch.ones(1, 1)).h
        tensor(0.1000)
    """

    index: Tensor | None
    t: Tensor
    h: Tensor
    y: Tensor


def adaptive_steps(
    field: Field, y: Tensor, times: Tensor, c: Tensor | None, accuracy: Accuracy, strict: bool = True
) -> tuple[Tensor, list[Step], int]:
    """Solve by the pair of Dormand and Prince, without a graph.

    Arguments:
        field: ``field(t, y, c)`` with ``t`` of ``(rows, 1)``.
        y: ``(rows, n)``.
        times: ``(points,)``, of which the first and the last count.
        c: context rows.
        accuracy: tolerances and the limit of steps.
        strict: raise where a row cannot be solved, else make it NaN.

    Returns:
        The rows at the end, the accepted steps, and the number of sequential evaluations of the field.

    Raises:
        IntegrationError: the field is not finite at a row, or a row needs more steps than the limit.

    Example:
        >>> times = torch.tensor([0.0, 1.0])
        >>> accuracy = Accuracy(1e-5, 1e-6, 99)
        >>> y, steps, evaluations = adaptive_steps(lambda t, y, c: y, torch.ones(2, 1), times, None, accuracy)
        >>> (y - torch.e).abs().max() < 1e-4, evaluations == 2 + 6 * len(steps)
        (tensor(True), True)
    """
    with torch.no_grad():
        return _Run(field, y.detach(), times, c, accuracy, strict).go()


class _Run:
    """The rows still under way: their numbers ``index``, times ``t``, step lengths ``h`` and velocities ``k``."""

    def __init__(
        self, field: Field, y: Tensor, times: Tensor, c: Tensor | None, accuracy: Accuracy, strict: bool
    ) -> None:
        start, stop = times[0], times[-1]
        self.field, self.accuracy, self.strict = field, accuracy, strict
        self.end, self.stop, self.c = y.clone(), stop, c
        self.index = torch.arange(len(y), device=y.device)
        self.y, self.t = y, start.expand(len(y), 1)
        self.k = field(self.t, y, c)
        self.h = self._first_steps(start, stop)
        self.steps: list[Step] = []
        self.evaluations = 2

    def go(self) -> tuple[Tensor, list[Step], int]:
        self._drop(~self.k.isfinite().all(-1), "the field is NaN or infinite there")
        tried = 0
        while len(self.index):
            if tried == self.accuracy.max_steps:
                self._drop(
                    torch.ones_like(self.index, dtype=torch.bool),
                    f"it takes more than max_steps={tried} steps: the equation is stiff, or the tolerance too small",
                )
                break
            self._try()
            tried += 1
            self.evaluations += 6
        return self.end, self.steps, self.evaluations

    def _try(self) -> None:
        left = self.stop - self.t
        last = self.h.abs() >= left.abs()
        h = torch.where(last, left, self.h)
        end, stages = runge_kutta_step(self.field, self.t, h, self.y, self.c, DORMAND_PRINCE, first=self.k)
        t = torch.where(last, self.stop, self.t + h)
        after = self.field(t, end, self.c)
        error = combine(torch.zeros_like(end), h, [*stages, after], DORMAND_PRINCE.error)
        error = (error / self.accuracy.scale(self.y, end)).square().mean(-1, keepdim=True).sqrt()
        usable = error.isfinite() & end.isfinite().all(-1, keepdim=True) & after.isfinite().all(-1, keepdim=True)
        factor = torch.where(usable, (SAFETY * error.clamp_min(1e-10) ** -0.2).clamp(SHRINK, GROW), SHRINK)
        accepted = (usable & (error <= 1)).squeeze(-1)
        self.h = h * torch.where(accepted[:, None], factor, factor.clamp(max=1.0))
        if bool(accepted.all()):
            self.steps.append(Step(self.index, self.t, h, self.y))
            self.t, self.y, self.k = t, end, after
        else:
            some = accepted.nonzero().flatten()
            self.steps.append(Step(self.index[some], self.t[some], h[some], self.y[some]))
            taken = accepted[:, None]
            self.t, self.y = torch.where(taken, t, self.t), torch.where(taken, end, self.y)
            self.k = torch.where(taken, after, self.k)
        self._finish(last.squeeze(-1) & accepted)

    def _finish(self, arrived: Tensor) -> None:
        if bool(arrived.any()):
            self.end.index_copy_(0, self.index[arrived], self.y[arrived])
            self._keep(~arrived)
        # what is left of a step is lost in the rounding of the time: the field is not finite just ahead
        self._drop(
            (self.h.abs() <= 4 * torch.finfo(self.t.dtype).eps * self.t.abs().clamp_min(1e-3)).squeeze(-1),
            "the field is NaN, infinite or not continuous there",
        )

    def _drop(self, lost: Tensor, why: str) -> None:
        if not bool(lost.any()):
            return
        if self.strict:
            row = int(lost.nonzero()[0])
            raise IntegrationError(
                f"{int(lost.sum())} of {len(self.end)} row(s) cannot be solved; row {int(self.index[row])} stopped at "
                f"time {float(self.t[row]):.4g}: {why}. Check the weights and the data, raise the tolerance or "
                "max_steps, or use fixed steps."
            )
        self.end.index_fill_(0, self.index[lost], torch.nan)
        self._keep(~lost)

    def _keep(self, rows: Tensor) -> None:
        rows = rows.nonzero().flatten()
        self.index, self.t, self.y = self.index[rows], self.t[rows], self.y[rows]
        self.h, self.k = self.h[rows], self.k[rows]
        self.c = None if self.c is None else self.c[rows]

    def _first_steps(self, start: Tensor, stop: Tensor) -> Tensor:
        """Of every row: a hundredth of the time in which it would move by its own size, checked by an Euler step."""
        scale = self.accuracy.scale(self.y, self.y)
        size = (self.y / scale).square().mean(-1, keepdim=True).sqrt()
        speed = (self.k / scale).square().mean(-1, keepdim=True).sqrt()
        span, sign = (stop - start).abs(), (stop - start).sign()
        h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=span)
        ahead = self.field(self.t + sign * h, self.y + sign * h * self.k, self.c)
        bend = ((ahead - self.k) / scale).square().mean(-1, keepdim=True).sqrt() / h
        most = torch.maximum(speed, bend)
        longer = torch.where(most <= 1e-15, (1e-3 * h).clamp_min(1e-6), (0.01 / most) ** 0.2)
        first = torch.minimum(torch.minimum(100 * h, longer), span)
        return sign * torch.where(first.isfinite() & (first > 0), first, 1e-3 * span)
