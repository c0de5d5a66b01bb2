"""Whether a schedule leads from data to noise, and its grid of times back again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_schedule", "check_times"]

LARGEST_START = 0.1  # of sigma / alpha, that still is data
LEAST_END = 1.0  # of sigma / alpha, that may be taken for noise
TRIED = (1, 2, 3, 16, 101)  # numbers of steps
ROUNDING = 1e-6  # relative, of the ratio at the first time, and of times at the ends


def check_schedule(schedule: Any) -> None:
    """Refuse a schedule that does not lead from data to noise.

    Arguments:
        schedule: a :class:`~pyro_genmods.evolve.Schedule`.

    Raises:
        ValueError: see :meth:`~pyro_genmods.evolve.Schedule.check`.
    """
    name = type(schedule).__name__
    low, high = schedule.ends
    if not 0 <= low < high < math.inf:
        raise ValueError(f"schedule: {name}.ends is {schedule.ends}, needs 0 <= first < last.")
    t = torch.linspace(low, high, 257, dtype=torch.float64)
    ratio = schedule.sigma(t) / schedule.alpha(t)  # may be infinite at the last time
    if not bool(ratio[:-1].isfinite().all()) or bool(ratio[-1].isnan()) or not bool((ratio.diff() > 0).all()):
        raise ValueError(
            f"schedule: sigma/alpha of {name} is not finite and increasing in time; check alpha() and sigma()."
        )
    if float(ratio[0]) > LARGEST_START * (1 + ROUNDING):
        raise ValueError(
            f"schedule: {name} starts with sigma/alpha = {float(ratio[0]):.3g} at t = {low}, needs at most "
            f"{LARGEST_START}: data must be nearly free of noise at the first time."
        )
    if float(ratio[-1]) < LEAST_END:
        raise ValueError(
            f"schedule: {name} ends with sigma/alpha = {float(ratio[-1]):.3g} at t = {high}, needs at least "
            f"{LEAST_END:g}: little but noise may be left at the last time."
        )
    for steps in TRIED:
        check_times(schedule, steps)


def check_times(schedule: Any, steps: int) -> Tensor:
    """The times of so many steps, if they go down from the last to the first.

    Arguments:
        schedule: a :class:`~pyro_genmods.evolve.Schedule`.
        steps: how many.

    Raises:
        ValueError: they are not one more than the steps, not decreasing, or do not end at the ends.
    """
    name, (low, high) = type(schedule).__name__, schedule.ends
    times = schedule.times(steps)
    remedy = (
        f"return {steps + 1} decreasing times from ends[1] = {high:g} to ends[0] = {low:g}, such as "
        f"torch.linspace({high:g}, {low:g}, steps + 1, dtype=torch.float64)."
    )
    if times.shape != (steps + 1,):
        raise ValueError(f"schedule: {name}.times({steps}) has shape {tuple(times.shape)}; {remedy}")
    ends = torch.tensor([high, low], dtype=times.dtype, device=times.device)
    if not bool((times[[0, -1]] - ends).abs().max() <= ROUNDING * high):
        raise ValueError(
            f"schedule: {name}.times({steps}) goes from {float(times[0]):.4g} to {float(times[-1]):.4g}; {remedy}"
        )
    wrong = ~(times.diff() < 0)
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        raise ValueError(
            f"schedule: {name}.times({steps}) does not go down: {float(times[k]):.4g} is followed by "
            f"{float(times[k + 1]):.4g}; {remedy}"
        )
    return times
