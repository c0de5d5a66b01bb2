"""How many steps, where, and at which noise to ask for the score: found out by trying, on data or draws.

Two solutions are compared, by so many steps and by twice as many, on the same grid; what is reported is the largest
difference of a log density in nats. The score of the law is the gradient of its log density, which costs a solution and
its adjoint; the network's own score at a small angle costs one call and is off by the network's error divided by that
angle, or by the smoothing of a larger one. The level between the two errors is chosen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..foundation.ode import RK4
from ..mechanism import Density
from .grid import refined_knots

__all__ = ["calibrated", "score_level"]

STEPS = (4, 8, 16, 32, 64, 128)
MANY, LARGE = 16, 64  # features from which fewer rows, and fewer steps, are tried
LEVELS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
USUAL_LEVEL = 0.05  # where the exact gradient is not to be had


def calibrated(model: Any, tolerance: float, x: Tensor | None, context: Tensor | None) -> tuple[Tensor, int, float]:
    """Knots of a grid fit for the model, the least number of steps that meets a tolerance, and the error it leaves.

    Arguments:
        model: a :class:`~pyro_genmods.evolve.Diffusion`.
        tolerance: of a log density, in nats.
        x: data, or ``None`` for draws.
        context: contexts, or ``None`` for standard normal ones.
    """
    y, c = _rows(model, x, context)
    state = pad(model.noisy(y), (0, 1))
    large = _large(model)
    knots = refined_knots(model.denoiser.augmented, state, model.told(c), model.knots, 16 if large else 64)
    before = model.knots.clone()
    model.knots.copy_(knots)
    try:
        with torch.no_grad():
            found = model.log_prob_by(RK4(STEPS[0]), y, c)
            for steps in STEPS[: 4 if large else None]:
                better = model.log_prob_by(RK4(2 * steps), y, c)
                error = float((found - better).abs().nan_to_num(math.inf).max())
                if error <= tolerance:
                    break
                found = better
    finally:
        model.knots.copy_(before)
    return knots, steps, error


def score_level(model: Any, x: Tensor | None, context: Tensor | None) -> tuple[float, float]:
    """The noise at which the network's score is nearest to the gradient of the log density, and how near.

    Returns:
        Level, in white standard deviations, and the root mean square of the difference divided by that of the gradient,
        -1 where it is not known.
    """
    if model.features > MANY:
        return max(USUAL_LEVEL, model.sigma_min), -1.0
    y, c = _rows(model, x, context)
    y, c = y[:32], None if c is None else c[:32]
    with torch.enable_grad():
        leaf = y.clone().requires_grad_()
        (exact,) = torch.autograd.grad(model.log_prob_rows(leaf, c).sum(), leaf)
    size = exact.square().mean()
    with torch.no_grad():
        levels = [level for level in LEVELS if level >= model.sigma_min]
        errors = [float((model.score_rows(y, c, level) - exact).square().mean() / size) for level in levels]
    best = min(range(len(levels)), key=lambda k: math.inf if math.isnan(errors[k]) else errors[k])
    return levels[best], math.sqrt(errors[best])


def _large(model: Any) -> bool:
    return model.features > LARGE or model.density is Density.ESTIMATE


def _rows(model: Any, x: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows to try, the same every time: data from all over, or draws."""
    rows = 256 if model.features <= MANY else 8 if _large(model) else 64
    device, c = model.place[1], None
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if model.context_shape:
            c = model.knots.new_empty(rows, model.context_shape.numel()).normal_()
            if context is not None:
                given = context.reshape(-1, c.shape[1])
                c = model.context_standardization(given[torch.arange(rows) * len(given) // rows].to(c))
        if x is None:
            return model.push_rows(model._noise(rows), c), c
        return model.coordinates.pull(x[torch.arange(rows) * len(x) // rows].to(model.knots))[0], c
