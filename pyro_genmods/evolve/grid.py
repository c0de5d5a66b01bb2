r"""Where to put the steps of a fixed grid of angles: as dense as the equation is hard.

A grid is the quantile function :math:`\theta(s)`, :math:`s \in [0, 1]`, of a density of steps, kept at so many knots
that a grid of any number of steps is read off it. Before anything is known, :math:`\theta^{1/3}` is spaced evenly.

Calibration measures the local error :math:`e_j` of one step of the classical Runge-Kutta method against two of half the
length, in each of many cells, along solutions. An error of order five is equal in all steps where their density is
proportional to :math:`e_j^{1/5} / h_j`; the new grid has that density.

The grid of a schedule is stretched or squeezed in the cube root where it passes the ends of the model, whose network
knows no angle beyond them, and steps of no length would divide by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..foundation.causal import transformed
from ..foundation.runge_kutta import RUNGE_KUTTA, Field, runge_kutta_step
from .schedule import Schedule
from .schedule_check import check_times

__all__ = ["angles_of", "even_knots", "refined_knots", "scheduled_angles"]

KNOTS = 129
FLOOR = 1e-6  # of a cell's error, in units of the largest
ORDER = 5


def even_knots(bottom: float, top: float) -> Tensor:
    """Knots of the grid that is even in the cube root of the angle, increasing.

    Arguments:
        bottom, top: first and last angle.

    Example:
        >>> knots = even_knots(1e-3, 1.5)
        >>> len(knots), float(knots[-1])
        (129, 1.5)
    """
    knots = torch.linspace(bottom ** (1 / 3), top ** (1 / 3), KNOTS, dtype=torch.float64) ** 3
    knots[0], knots[-1] = bottom, top
    return knots


def angles_of(knots: Tensor, steps: int) -> Tensor:
    """The grid of so many steps, increasing, ``(steps + 1,)``.

    Example:
        >>> angles_of(torch.tensor([0.0, 1.0, 3.0]), 4)
        tensor([0.0000, 0.5000, 1.0000, 2.0000, 3.0000])
    """
    cells = len(knots) - 1
    place = torch.arange(steps + 1, dtype=knots.dtype, device=knots.device) * (cells / steps)
    left = place.floor().clamp_max(cells - 1).long()
    return torch.lerp(knots[left], knots[left + 1], place - left)


def scheduled_angles(schedule: Schedule, steps: int, ends: tuple[float, float], knots: Tensor) -> Tensor:
    """The angles of a schedule's times, decreasing, ``(steps + 1,)``, from the last knot to the first.

    Arguments:
        schedule: whose times.
        steps: how many.
        ends: least and largest angle that the network knows, the first and the last knot.
        knots: of the model's own grid.

    Raises:
        ValueError: the times do not go down from noise to data; not looked at under transforms and tracers.

    Example:
        >>> from pyro_genmods.evolve import EDM
        >>> angles = scheduled_angles(EDM(), 32, (0.05, 1.5), even_knots(0.05, 1.5))    # some would be below 0.05
        >>> bool((angles.diff() < 0).all()), float(angles[0]), float(angles[-1])
        (True, 1.5, 0.05)
    """
    if not transformed():
        check_times(schedule, steps)
    roots = schedule.angles(steps).to(torch.float64) ** (1 / 3)
    bottom, top = (end ** (1 / 3) for end in ends)
    high, low = roots[0].clamp_max(top), roots[-1].clamp_min(bottom)
    inside = (low + (roots[1:-1] - roots[-1]) * ((high - low) / (roots[0] - roots[-1]))) ** 3
    return torch.cat([knots[-1:], inside.to(knots), knots[:1]])


def refined_knots(field: Field, state: Tensor, context: Tensor | None, knots: Tensor, cells: int = 64) -> Tensor:
    """Knots of a grid that spreads the local error of a field evenly.

    Arguments:
        field: ``field(t, y, c)``, with all that counts as an error.
        state: rows at the first knot, ``(rows, n)``.
        context: rows of context.
        knots: of the grid so far.
        cells: how many steps are looked at.

    Example:
        >>> sharp = lambda t, y, c: (-200 * (t - 0.3).square()).exp() * y
        >>> knots = refined_knots(sharp, torch.ones(4, 1), None, even_knots(1e-3, 1.5).float())
        >>> bool((knots.diff() > 0).all()), bool(((knots > 0.1) & (knots < 0.5)).float().mean() > 0.4)
        (True, True)
    """
    grid, errors, eps = angles_of(knots, cells), [], torch.finfo(state.dtype).eps
    with torch.no_grad():
        for t, h in zip(grid[:-1].unbind(), grid.diff().unbind(), strict=True):
            once, _ = runge_kutta_step(field, t, h, state, context, RUNGE_KUTTA)
            half, _ = runge_kutta_step(field, t, h / 2, state, context, RUNGE_KUTTA)
            state, _ = runge_kutta_step(field, t + h / 2, h / 2, half, context, RUNGE_KUTTA)
            errors.append((once - state).square().sum(-1).square().mean().sqrt().sqrt() - 8 * eps * state.abs().mean())
    error = torch.stack(errors).clamp_min(0).double().cpu()  # what is not rounding
    if not bool(error.isfinite().all()) or float(error.max()) == 0:
        return knots
    mass = (error / error.max()).clamp_min(FLOOR) ** (1 / ORDER)
    # a neighbour's need is a hint of one's own
    mass = torch.nn.functional.pad(mass[None, None], (1, 1), mode="replicate")[0, 0]
    mass = 0.25 * mass[:-2] + 0.5 * mass[1:-1] + 0.25 * mass[2:]
    reached = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    wanted = torch.linspace(0, 1, len(knots), dtype=torch.float64) * reached[-1]
    cell = torch.searchsorted(reached, wanted, right=True).clamp(1, cells) - 1
    old = grid.double().cpu()
    inside = (wanted - reached[cell]) / mass[cell]
    found = torch.lerp(old[cell], old[cell + 1], inside.clamp(0, 1))
    found[0], found[-1] = old[0], old[-1]
    return found.to(knots)
