r"""What is done to estimate :math:`\log Z`, once there is a road: passes of particles, and estimates from their works.

All numbers are tensors ``(contexts,)`` in float64. Several independent runs of one context are groups of one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..contract import GenerativeModel
from ..foundation.ladder import Ladder, Passage, ascend, descend, populate
from ..foundation.pareto import pareto_shape
from ..foundation.ratios import bridge, mean_exp, thermodynamic
from ..foundation.resampling import effective_sample_size
from ..foundation.shapes import Context
from .roads import Road, pave

if TYPE_CHECKING:
    from .energy import Energy

__all__ = ["METHODS", "Estimate", "Plan", "estimate"]

METHODS = ("auto", "ais", "smc", "bridge", "thermodynamic", "importance")
FINER = 8  # steps of independent particles for one of a population, at least
MOST_RUNGS = 300  # of them, unless asked for
INTEGRATED = 18  # temperatures of an integral, at least
WEIGHTED = 3  # part of them that weights take over, where there may be no mean energy
BOUND = 3.0  # standard errors outwards

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Options.

    Attributes:
        method: one of :data:`METHODS`.
        particles, runs: of each context.
        temperatures: steps of independent particles, or ``None``.
        base: the reference, or the most components of one that is fitted.
    """

    method: str
    particles: int
    runs: int
    temperatures: int | None
    base: GenerativeModel | int


class Estimate(NamedTuple):
    """What was found, for each context.

    Attributes:
        value, standard_error: of the method asked for.
        lower, upper: one-sided estimates, with their standard errors outwards.
        ess: what weights are worth, in proportion to the particles.
        shape: of the tail of importance weights; NaN for other methods.
        plain: the estimate of the particles that went up, by themselves, and its standard error.
        gradients: evaluated, for all contexts.
        reference: in words.
        rungs: steps of independent particles.
    """

    value: Tensor
    standard_error: Tensor
    lower: Tensor
    upper: Tensor
    ess: Tensor
    shape: Tensor
    plain: tuple[Tensor, Tensor]
    gradients: int
    reference: str
    rungs: int


class _Runner:
    """Passes of fresh particles along a road, and what they cost."""

    def __init__(self, road: Road, c: Context | None, plan: Plan, generator: torch.Generator) -> None:
        self.road, self.plan, self.generator = road, plan, generator
        self.contexts = 1 if c is None else len(c)
        self.c = None if c is None else c.repeat_interleave(plan.runs, 0)
        self.gradients = road.gradients

    def run(self, kind: Callable[..., Passage], ladder: Ladder, q: Tensor | None, report: Callable) -> Passage:
        plan = self.plan
        path, fresh, moves = self.road.start(self.c, self.contexts * plan.runs, plan.particles, self.generator)
        found = kind(path, fresh if q is None else q, moves, ladder.repeated(plan.runs), report=report)
        self.gradients += getattr(moves, "gradients", 0)
        return found

    def runs(self, x: Tensor) -> Tensor:
        """``(groups, ...)`` as ``(contexts, runs, ...)``."""
        return x.unflatten(0, (self.contexts, self.plan.runs))


def estimate(model: Energy, c: Context | None, plan: Plan, generator: torch.Generator, report: Report) -> Estimate:
    """All passes, and the numbers that follow.

    Arguments:
        model: whose normaliser it is.
        c: contexts ``(contexts, context)``, or ``None``.
        plan: options.
        generator: of random numbers.
        report: told what is going on.
    """
    road = pave(model, c, plan.particles * plan.runs, generator, plan.base, report)
    runner = _Runner(road, c, plan, generator)
    fine = _finer(road.ladder, plan)

    def told(name: str) -> Callable[[int], None]:
        return lambda step: report(f"{name} {step}")

    up = runner.run(ascend, fine, None, told("up"))
    coarse = road.ladder
    if plan.method == "thermodynamic":
        coarse = coarse.resized(max(INTEGRATED, FINER * coarse.rungs))
    population = runner.run(populate, coarse, None, told("population"))
    down = runner.run(descend, fine, population.position, told("down"))
    value, error = _value(runner, up, population, down, coarse)
    shape = torch.full_like(value, torch.nan)
    ess = _worth(runner.runs(up.work).flatten(1))
    if plan.method == "importance":
        weights = runner.runs(_weights(runner)).flatten(1)
        value, error = mean_exp(weights)
        ess, shape = _worth(weights), pareto_shape(weights)
    elif plan.method == "smc":
        ess = runner.runs(population.ess).amin(1)
    plain, plain_error = mean_exp(runner.runs(up.work).flatten(1))
    if getattr(model, "draws_exactly", False):
        exact = model.sample_rows(runner.contexts * plan.runs * plan.particles, None if c is None else _told(runner))
        down = runner.run(descend, fine, exact, told("down"))
    top, top_error = mean_exp(-runner.runs(down.work).flatten(1))
    return Estimate(
        value=value,
        standard_error=error,
        lower=plain - BOUND * plain_error,
        upper=-top + BOUND * top_error,
        ess=ess,
        shape=shape,
        plain=(plain, plain_error),
        gradients=runner.gradients,
        reference=road.reference,
        rungs=fine.rungs,
    )


def _told(runner: _Runner) -> Tensor:
    """Contexts of all rows."""
    return runner.c.repeat_interleave(runner.plan.particles, 0)


def _finer(ladder: Ladder, plan: Plan) -> Ladder:
    """Independent particles need shorter steps than populations: their works add up."""
    if plan.temperatures is not None:
        return ladder.resized(plan.temperatures)
    rungs = ladder.rungs
    return ladder.resized(max(rungs, min(MOST_RUNGS, rungs * max(FINER, 2 * rungs))))


def _value(runner: _Runner, up: Passage, population: Passage, down: Passage, ladder: Ladder) -> tuple[Tensor, Tensor]:
    """The estimate of the method, and its standard error."""
    method, runs = runner.plan.method, runner.plan.runs
    if method == "ais":
        return mean_exp(runner.runs(up.work).flatten(1))
    if method == "smc":
        return mean_exp(runner.runs(population.log_ratio))
    if method == "thermodynamic":
        weighted = ladder.rungs // WEIGHTED
        value, rule = thermodynamic(population.levels, ladder.repeated(runs).inverse_temperatures, weighted)
        scatter = runner.runs(value).var(1) / runs
        return runner.runs(value).mean(1), (scatter + runner.runs(rule).mean(1).square()).sqrt()
    both = [runner.runs(passage.work) for passage in (up, down)]
    value, error = bridge(*(work.flatten(1) for work in both))
    return value, torch.maximum(error, bridge(*both)[0].std(1) / runs**0.5)


def _weights(runner: _Runner) -> Tensor:
    """Log weights of draws of the reference, ``(groups, particles)``."""
    plan = runner.plan
    path, q, moves = runner.road.start(runner.c, runner.contexts * plan.runs, plan.particles, runner.generator)
    return -path.parts(q)[1].double().reshape(moves.groups, -1)


def _worth(log_weights: Tensor) -> Tensor:
    return effective_sample_size(log_weights) / log_weights.shape[-1]
