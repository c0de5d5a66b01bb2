"""Draws of an energy's law by parallel tempering: a ladder of replicas for each draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..foundation.adaptation import DualAveraging, Moments, halton, harmonic_mean
from ..foundation.annealing import Path
from ..foundation.chains import State, Step, hamiltonian, start
from ..foundation.replicas import exchange, respaced
from ..foundation.shapes import Context, Rows
from .sampling import SAMPLERS, EnergySampler, path_of

if TYPE_CHECKING:
    from .energy import Energy

__all__ = ["Tempering"]

LENGTH, MOST_LEAPFROGS, TARGET, SPACING = 1.3, 16, 0.7, 4.0
TURNS = (0.2, 0.4, 0.6, 0.8)  # of the warm-up, where scales and ladder are learned anew


@dataclass(frozen=True)
class Tempering(EnergySampler):
    """Replicas between the base and the law that exchange places; draws are independent and cross between modes.

    Arguments:
        temperatures: rungs of the ladder, base and law among them.
        warmup: iterations in which step sizes, scales and the ladder are learned; all is fixed afterwards.
        transitions: after these.
        least: ladders that are run, so that there is something to learn from.

    Raises:
        ValueError: fewer than two temperatures.

    References:
        S. Syed et al., 2022, arXiv:1905.02939.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)
        >>> _ = torch.manual_seed(0)
        >>> round(float(Tempering(4).draw(model, 4000, None).var()), 1)
        0.1
    """

    temperatures: int = 8
    warmup: int = 100
    transitions: int = 50
    least: int = 32

    def __post_init__(self) -> None:
        if self.temperatures < 2 or self.warmup < 20 or self.transitions < 1 or self.least < 1:
            raise ValueError(
                f"temperatures, warmup, transitions, least: got {self.temperatures}, {self.warmup}, "
                f"{self.transitions}, {self.least}; need at least 2, 20, 1 and 1."
            )

    def draw(self, model: Energy, rows: int, c: Context | None) -> Rows:
        with torch.no_grad():
            n, k = max(rows, self.least), self.temperatures
            told = None if c is None else c[torch.arange(n, device=c.device) % rows].repeat(k, 1)
            path, y = path_of(model, told), model.reference_rows(k * n, told)
            ladder = _Ladder(path, y, k, self.warmup)
            for iteration in range(self.warmup + self.transitions):
                ladder.advance(iteration)
            return ladder.state.position[-n:][:rows]


class _Ladder:
    """All replicas, temperatures one after the other, and what they have learned."""

    def __init__(self, path: Path, y: Tensor, temperatures: int, warmup: int) -> None:
        self.warmup, self.turns = warmup, [int(part * warmup) for part in TURNS]
        self.path, self.k, self.n = path, temperatures, len(y) // temperatures
        self.beta = torch.linspace(0, 1, temperatures, dtype=y.dtype, device=y.device) ** SPACING
        size = 0.5 * y.shape[1] ** -0.25
        self.steps = [DualAveraging.around(size, TARGET, self.n) for _ in range(temperatures)]
        self.moments = [Moments(y.mean(0)) for _ in range(temperatures)]
        self.scale = torch.ones(temperatures, y.shape[1], dtype=y.dtype, device=y.device)
        self.rejected, self.tried = torch.zeros_like(self.beta[1:]), 0
        self._heat()
        self.state: State = start(y, path)

    def _heat(self) -> None:
        self.path.inverse_temperature = self.beta.repeat_interleave(self.n)

    def advance(self, iteration: int) -> None:
        """Move all replicas, exchange neighbours, and learn during warm-up."""
        warm, y = iteration < self.warmup, self.state.position
        sizes = [step.size if warm else step.final for step in self.steps]
        time = LENGTH * (0.5 + halton(iteration + 1))
        leapfrogs = max(1, min(MOST_LEAPFROGS, math.ceil(time / min(sizes))))
        column = y.new_tensor(sizes).repeat_interleave(self.n)[:, None]
        scale = self.scale.repeat_interleave(self.n, 0)[:, None]
        draw = Step(column, scale, torch.randn_like(y), torch.rand_like(y[:, 0]).log(), leapfrogs)
        self.state, info = hamiltonian(self.state, self.path, draw)
        rows, rate = exchange(self.path.parts(self.state.position)[1].reshape(self.k, self.n), self.beta, iteration)
        self.rejected, self.tried = self.rejected + 1 - rate, self.tried + 1
        self.state = start(self.state.position[rows], self.path)
        if warm:
            self._learn(info.acceptance.reshape(self.k, self.n), iteration)

    def _learn(self, acceptance: Tensor, iteration: int) -> None:
        everyone = torch.ones(self.n, dtype=torch.bool, device=acceptance.device)
        positions = self.state.position.reshape(self.k, self.n, -1)
        for step, moments, rates, y in zip(self.steps, self.moments, acceptance, positions, strict=True):
            step.update(harmonic_mean(rates, everyone, least=0.05))
            moments.update(y)
        if iteration + 1 in self.turns:
            self.scale = torch.stack([moments.scale() for moments in self.moments])
            if iteration + 1 != self.turns[-1]:  # what follows is for the step sizes alone
                self.beta = respaced(self.beta, self.rejected / self.tried)
                self._heat()
                self.state = start(self.state.position, self.path)
            self.rejected, self.tried = torch.zeros_like(self.rejected), 0
            for step, moments in zip(self.steps, self.moments, strict=True):
                moments.restart()
                step.restart()


SAMPLERS["tempering"] = Tempering
