"""Moves of particles at one temperature, which go on until the particles have forgotten where they were."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from .adaptation import Moments, halton, harmonic_mean
from .chains import PotentialLike, Step, hamiltonian, start

__all__ = ["HamiltonianMoves", "Moves", "Tempered"]

LENGTH = 1.3  # of trajectories, where the target is round
MOST_LEAPFROGS = 64
TARGET = 0.8  # harmonic mean of the acceptance, which is that of particles in narrow places
LEAST = 0.05  # that a particle counts for; there are always some that cannot move
SPREAD = (0.2, 1.0)  # of step sizes, a new one for each particle and move, so that all sizes of places are served
DENSE_DIM = 64
MEMORY = 0.1  # correlation with the past beyond what chance makes, at which moves go on


class Tempered(PotentialLike, Protocol):
    r"""A target on the way from a reference to a law, :math:`U_\beta = U_0 + \beta\, V`.

    Attributes:
        inverse_temperature: :math:`\beta` of every row, ``(rows,)``.

    Example:
        >>> from pyro_genmods.foundation.annealing import Path
        >>> path: Tempered = Path(lambda q: q.square().sum(-1), lambda q: q.sum(-1))
        >>> path.parts(torch.ones(1, 2))
        (tensor([2.]), tensor([2.]))
    """

    inverse_temperature: Tensor

    def parts(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`U_0` and :math:`V` at rows, two of ``(rows,)``, without gradient."""


class Moves(ABC):
    """Moves that leave the law at the energy's inverse temperature invariant.

    Arguments:
        energy: a tempered target.
        q: particles, ``(particles, dim)``.
        generator: of random numbers.
        groups: populations that lie one after the other in the rows and have targets of their own.

    Example:
        >>> issubclass(HamiltonianMoves, Moves)
        True
    """

    def __init__(self, energy: Tempered, q: Tensor, generator: torch.Generator, groups: int = 1) -> None:
        self.energy, self.generator, self.groups = energy, generator, groups

    @abstractmethod
    def learn(self, q: Tensor, weight: Tensor) -> None:
        """See weighted particles ``(particles, dim)``, ``(particles,)`` before they are moved."""

    @abstractmethod
    def begin(self, q: Tensor) -> Tensor:
        """Take particles at the energy's present temperature; returns their log likelihoods :math:`-V`."""

    @abstractmethod
    def once(self) -> tuple[Tensor, Tensor, float]:
        """One move: particles, their log likelihoods, and the mean acceptance."""

    def settings(self) -> Any:
        """What was learned for the present temperature, to be used there again; nothing, by default."""
        return None

    def use(self, settings: Any) -> None:
        """Move by what was learned at a temperature, and learn no more: particles are then independent chains."""
        return

    def move(self, q: Tensor, least: int, most: int) -> tuple[Tensor, Tensor, float, int]:
        """Move until particles have forgotten where they were.

        Moves go on until neither the log likelihood nor a coordinate is correlated with what it was at the start;
        evidences are too small where moves stop before.

        Returns:
            Particles, log likelihoods, mean acceptance, and the number of moves.
        """
        before, rates = self._standardized(q, self.begin(q)), []
        for count in range(1, most + 1):
            q, likelihood, rate = self.once()
            rates.append(rate)
            if count >= least:
                memory = (before * self._standardized(q, likelihood)).mean(0).abs().max()
                if float(memory) < MEMORY + 3 / math.sqrt(len(q)):
                    break
        return q, likelihood, sum(rates) / len(rates), count

    def _standardized(self, q: Tensor, likelihood: Tensor) -> Tensor:
        """Coordinates and log likelihood as columns of mean zero and variance one, in each group."""
        columns = torch.cat([q, likelihood.nan_to_num(0, 0, 0)[:, None]], -1).unflatten(0, (self.groups, -1))
        centred = columns - columns.mean(1, keepdim=True)
        return (centred / columns.std(1, keepdim=True).clamp_min(1e-30)).flatten(0, 1)


class HamiltonianMoves(Moves):
    """Hamiltonian moves with the particles' own metric and step sizes that follow their acceptance.

    Between prior and posterior there are laws that are wide in most places and narrow in a few, and it is in these that
    the likelihood is high: moves that only serve the wide places give evidences that are too small.

    Arguments are those of :class:`Moves`.

    Attributes:
        size: of a leapfrog, before it is spread over particles.
        learning: whether size and scale follow the particles.
        scale: standard deviations, or the triangle of a covariance, pooled over groups.
        gradients: evaluated so far, particle by particle.

    Example:
        >>> from pyro_genmods.foundation.annealing import Path
        >>> path, g = Path(lambda q: 0.5 * q.square().sum(-1), lambda q: 0 * q[:, 0]), torch.Generator().manual_seed(0)
        >>> q = torch.zeros(500, 1)
        >>> path.inverse_temperature = torch.zeros(500)
        >>> q, _, acceptance, count = HamiltonianMoves(path, q, g).move(q, 5, 5)
        >>> round(float(q.var())), count
        (1, 5)
    """

    def __init__(self, energy: Tempered, q: Tensor, generator: torch.Generator, groups: int = 1) -> None:
        super().__init__(energy, q, generator, groups)
        self.size, self._count = 0.5 * q.shape[1] ** -0.25, 0
        self.scale = torch.ones_like(q[0])
        self.gradients, self.learning = 0, True

    def settings(self) -> tuple[float, Tensor]:
        return self.size, self.scale

    def use(self, settings: tuple[float, Tensor]) -> None:
        (self.size, self.scale), self.learning = settings, False

    def learn(self, q: Tensor, weight: Tensor) -> None:
        if not self.learning:
            return
        dense = q.shape[1] <= DENSE_DIM and len(q) >= 20 * q.shape[1]
        moments = Moments(q.mean(0), dense=dense)
        weight = weight.reshape(self.groups, -1)
        index = torch.multinomial(weight, weight.shape[1], replacement=True, generator=self.generator)
        index = index + weight.shape[1] * torch.arange(self.groups, device=q.device)[:, None]
        rows = q[index.flatten()].unflatten(0, (self.groups, -1))
        if self.groups > 1:
            rows = rows - rows.mean(1, keepdim=True)
        moments.update(rows.flatten(0, 1))
        self.scale = moments.scale(dense)

    def begin(self, q: Tensor) -> Tensor:
        self._state = start(q.contiguous(), self.energy)
        self.gradients += len(q)
        return -self.energy.parts(q)[1]

    def once(self) -> tuple[Tensor, Tensor, float]:
        self._count += 1
        q = self._state.position
        leapfrogs = self.leapfrogs(self._count)
        noise = torch.empty_like(q).normal_(generator=self.generator)
        log_uniform = torch.empty_like(q[:, 0]).uniform_(generator=self.generator).log_()
        spread = torch.empty_like(q[:, :1]).uniform_(*SPREAD, generator=self.generator)
        step = Step(self.size * spread, self.scale, noise, log_uniform, leapfrogs)
        self._state, info = hamiltonian(self._state, self.energy, step)
        self.gradients += leapfrogs * len(q)
        rate = float(info.acceptance.mean())
        everyone = torch.ones_like(info.accepted)
        if self.learning:
            self.size *= math.exp(harmonic_mean(info.acceptance, everyone, LEAST) - TARGET)
        return self._state.position, -self.energy.parts(self._state.position)[1], rate

    def leapfrogs(self, count: int) -> int:
        """Of the trajectory with this number."""
        time = LENGTH * (0.5 + halton(count))
        return max(1, min(MOST_LEAPFROGS, math.ceil(time / self.size)))
