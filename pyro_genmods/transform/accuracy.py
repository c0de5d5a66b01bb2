"""How well a solver solves the equation of a flow: tried on draws of the flow, and on data.

A solution is compared with one by a finer solver, in the place where noise is carried to (in standard deviations of the
data), in the density of that draw, and in the density of data (both in nats); the largest difference counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..foundation.ode import RK4, DormandPrince, Solver
from ..mechanism import Mechanism

__all__ = ["error_of", "steps_needed", "straightness_of"]

ROWS = 256
STEPS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
REFERENCE = DormandPrince(1e-6, 1e-7)


def error_of(model: Any, solver: Solver, context: Tensor | None = None) -> float:
    """Largest difference between a solver and its refinement, over 256 draws.

    Arguments:
        model: with ``push_and_log_prob_by(solver, z, c)`` and ``log_prob_by(solver, y, c)``.
        solver: the solver.
        context: contexts ``(*, *context_shape)`` of the draws; standard normal ones, by default.

    Example:
        >>> from pyro_genmods.transform import ContinuousFlow
        >>> error_of(ContinuousFlow(2), RK4(16)) < 1e-4
        True
    """
    rows = _rows(model, None, context)
    return _difference(_solutions(model, solver, *rows), _solutions(model, solver.refined(), *rows))


def steps_needed(
    model: Any, tolerance: float, x: Tensor | None = None, context: Tensor | None = None
) -> tuple[int, float]:
    """The least number of steps of the classical Runge-Kutta method with an error within a tolerance, and that error.

    Arguments:
        model: with ``push_and_log_prob_by(solver, z, c)`` and ``log_prob_by(solver, y, c)``.
        tolerance: of the largest difference to an adaptive solution.
        x: events, some of which are tried besides draws.
        context: contexts ``(*, *context_shape)``; standard normal ones, by default.

    Returns:
        Steps and error; the largest number of steps that is tried, where none meets the tolerance.

    Example:
        >>> from pyro_genmods.transform import ContinuousFlow
        >>> steps_needed(ContinuousFlow(2), 1e-3)[0]
        4
    """
    rows = _rows(model, x, context)
    reference = _solutions(model, REFERENCE, *rows)
    for steps in STEPS:
        error = _difference(_solutions(model, RK4(steps), *rows), reference)
        if error <= tolerance:
            break
    return steps, error


def straightness_of(model: Any, context: Tensor | None = None, points: int = 16) -> float:
    r"""How much paths bend: :math:`\int_0^1 \mathbb E \|v_t - (y_1 - y_0)\|^2 \mathrm dt / \mathbb E \|y_1 - y_0\|^2`.

    Arguments:
        model: a continuous flow.
        context: contexts ``(*, *context_shape)``; standard normal ones, by default.
        points: of the rule of rectangles.

    Reference:
        X. Liu, C. Gong, Q. Liu, Flow Straight and Fast, 2022, arXiv:2209.03003.

    Example:
        >>> from pyro_genmods.transform import ContinuousFlow
        >>> straightness_of(ContinuousFlow(2)) > 0.1
        True
    """
    z, _, c = _rows(model, None, context)
    with torch.no_grad():
        y, total = z, torch.zeros((), dtype=z.dtype, device=z.device)
        velocity, end = model._fluid().velocity, model.push_rows(z, c)
        for k in range(points):
            times = y.new_tensor([max(k - 0.5, 0.0) / points, (k + 0.5) / points])
            y = model._solve(velocity, y, c, times)
            total = total + (velocity(times[1], y, c) - (end - z)).square().sum(-1).mean()
        return float(total / points / (end - z).square().sum(-1).mean())


def _rows(model: Mechanism, x: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Noise, rows of data and of contexts for both, the same every time."""
    with torch.no_grad(), _own_stream(model):
        z, c = model._noise(ROWS), None
        if model.context_shape:
            c = z.new_empty(ROWS, model.context_shape.numel()).normal_()
            if context is not None:
                given = context.reshape(-1, c.shape[1])
                c = model.context_standardization(given[_spread(len(given))].to(z))
        return z, None if x is None else model.coordinates.pull(x[_spread(len(x))].to(z))[0], c


def _spread(rows: int) -> Tensor:
    """Some of the rows, from all over the data."""
    return torch.arange(ROWS) * rows // ROWS


def _solutions(model: Any, solver: Solver, z: Tensor, y: Tensor | None, c: Tensor | None) -> list[Tensor]:
    with torch.no_grad():
        found = list(model.push_and_log_prob_by(solver, z, c))
        return found if y is None else [*found, model.log_prob_by(solver, y, c)]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().nan_to_num(math.inf).max()) for a, b in zip(found, expected, strict=True))


@contextmanager
def _own_stream(model: Mechanism) -> Iterator[None]:
    device = model.place[1]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
