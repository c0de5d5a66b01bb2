"""Chains of an energy that are watched: long ones from several starts, and short ones beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..foundation.chains import Info, Plain, State, Step, start
from ..foundation.errors import SamplingError
from ..foundation.shapes import Context, Rows, Values
from .sampling import Chains

__all__ = ["Runs", "Target", "run_chains"]

MOST_NUMBERS = 2**25  # kept of all draws


class Target:
    """Energy and score of rows under a law at its one context.

    Arguments:
        law: an :class:`~pyro_genmods.shape.law.EnergyDistribution` without batch dimensions.
    """

    def __init__(self, law: Any) -> None:
        self.law, self.model = law, law.model

    def context(self, rows: int) -> Context | None:
        """The context of as many rows."""
        return self.law._draw_shape([rows])[1]

    def energy(self, y: Rows) -> Values:
        """In nats, in the network's coordinates, up to the constant."""
        return -self.model.unnormalized_rows(y, self.context(len(y)), fixed=True)

    def score(self, y: Rows) -> Rows:
        """Gradient of the log density."""
        return self.model.score_rows(y, self.context(len(y)))

    def starts(self, rows: int) -> Rows:
        """Draws of the base."""
        return self.model.reference_rows(rows, self.context(rows))


class Runs(NamedTuple):
    """What chains did.

    Attributes:
        rows: positions of the long run, ``(chains, draws, features)``.
        stats: of its draws, ``(chains, draws)``, by ArviZ's names.
        acceptance, divergences: mean over all its transitions.
        short: where short chains arrived, ``(chains, features)``.
    """

    rows: Tensor
    stats: dict[str, Tensor]
    acceptance: float
    divergences: float
    short: Tensor


class Recorder:
    """Keeps every so many transitions.

    Arguments:
        thin: how many.
        tick: called at each transition.
    """

    def __init__(self, thin: int, tick: Callable[[], Any]) -> None:
        self._thin, self._tick, self._count = thin, tick, 0
        self._kept: list[tuple[Tensor, ...]] = []
        self._accepted, self._diverged, self._since = [], [], None

    def __call__(self, state: State, info: Info, draw: Step) -> None:
        self._tick()
        self._accepted.append(info.acceptance.mean())
        self._diverged.append(info.diverging.double().mean())
        self._since = info.diverging if self._since is None else self._since | info.diverging
        self._count += 1
        if self._count % self._thin == 0:
            leapfrogs = torch.full_like(info.diverging, draw.leapfrogs, dtype=torch.int64)
            size = draw.size.expand_as(info.energy)
            kept = (state.position, info.energy, -state.energy, info.acceptance, self._since, leapfrogs, size)
            self._kept.append(tuple(x.cpu() for x in kept))
            self._since = None

    def runs(self, short: Tensor) -> Runs:
        """Everything that was kept."""
        names = ("rows", "energy", "lp", "acceptance_rate", "diverging", "n_steps", "step_size")
        stacked = {name: torch.stack(x, 1) for name, x in zip(names, zip(*self._kept, strict=True), strict=True)}
        rows = stacked.pop("rows")
        rates = (float(torch.stack(x).mean()) for x in (self._accepted, self._diverged))
        return Runs(rows, stacked, *rates, short.cpu())


def run_chains(
    target: Target,
    sampler: Chains,
    begin: Rows,
    short_begin: Rows,
    lengths: tuple[int, int],
    tick: Callable[[], Any],
) -> Runs:
    """A warm-up and a long run from some rows, and a short run, of the kernel that was learned, from others.

    Arguments:
        target: whose law they are of.
        sampler: how they move.
        begin: where long chains start, ``(chains, features)``.
        short_begin: where short ones start, likewise.
        lengths: transitions of the short and of the long run.
        tick: called at each transition of the long run.

    Raises:
        SamplingError: chains that found no finite energy.
    """
    potential = Plain(target.energy)
    short, long = lengths
    recorder = Recorder(max(1, math.ceil(begin.numel() * long / MOST_NUMBERS)), tick)
    state, tuned = sampler.warm_up(potential, begin)
    arrived = sampler.go_on(potential, start(short_begin, potential), tuned, short).position
    state = sampler.go_on(potential, state, tuned, long, recorder)
    lost = int((~state.energy.isfinite()).sum())
    if lost:
        raise SamplingError(
            f"kernel: {lost} of {len(begin)} chains found no finite energy. The energy is not finite around its base; "
            "standardise the data first (fit does), or give the model a base from which chains can start."
        )
    return recorder.runs(arrived)
