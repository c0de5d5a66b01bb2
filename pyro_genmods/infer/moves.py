"""Moves of particles at one temperature: Hamiltonian, or elliptical slices under a Gaussian prior."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..foundation.adaptation import Moments, halton, harmonic_mean
from ..foundation.chains import Step, hamiltonian, start
from ..foundation.elliptical import elliptical_slice
from ..foundation.errors import ModelError
from .potential import Potential

__all__ = ["EllipticalMoves", "HamiltonianMoves", "Moves"]

LENGTH = 1.3  # of trajectories, where the target is round
MOST_LEAPFROGS = 64
TARGET = 0.8  # harmonic mean of the acceptance, which is that of particles in narrow places
LEAST = 0.05  # that a particle counts for; there are always some that cannot move
SPREAD = (0.2, 1.0)  # of step sizes, a new one for each particle and move, so that all sizes of places are served
DENSE_DIM = 64
MEMORY = 0.1  # correlation with the past beyond what chance makes, at which moves go on


class Moves(ABC):
    """Moves that leave the law at the potential's inverse temperature invariant.

    Arguments:
        energy: a tempered potential.
        q: particles, ``(particles, dim)``.
        generator: of random numbers.
    """

    def __init__(self, energy: Potential, q: Tensor, generator: torch.Generator) -> None:
        self.energy, self.generator = energy, generator

    @abstractmethod
    def learn(self, q: Tensor, weight: Tensor) -> None:
        """See weighted particles ``(particles, dim)``, ``(particles,)`` before they are moved."""

    @abstractmethod
    def begin(self, q: Tensor) -> Tensor:
        """Take particles at the potential's present temperature; returns their log likelihoods."""

    @abstractmethod
    def once(self) -> tuple[Tensor, Tensor, float]:
        """One move: particles, their log likelihoods, and the mean acceptance."""

    def move(self, q: Tensor, least: int, most: int) -> tuple[Tensor, Tensor, float, int]:
        """Move until particles have forgotten where they were.

        Moves go on until neither the log likelihood nor a coordinate is correlated with what it was at the start;
        evidences are too small where moves stop before.

        Returns:
            Particles, log likelihoods, mean acceptance, and the number of moves.
        """
        before, rates = _standardized(q, self.begin(q)), []
        for count in range(1, most + 1):
            q, likelihood, rate = self.once()
            rates.append(rate)
            if count >= least:
                memory = (before * _standardized(q, likelihood)).mean(0).abs().max()
                if float(memory) < MEMORY + 3 / math.sqrt(len(q)):
                    break
        return q, likelihood, sum(rates) / len(rates), count


class HamiltonianMoves(Moves):
    """Hamiltonian moves with the particles' own metric and step sizes that follow their acceptance.

    Between prior and posterior there are laws that are wide in most places and narrow in a few, and it is in these that
    the likelihood is high: moves that only serve the wide places give evidences that are too small.
    """

    def __init__(self, energy: Potential, q: Tensor, generator: torch.Generator) -> None:
        super().__init__(energy, q, generator)
        self._size, self._count = 0.5 * q.shape[1] ** -0.25, 0
        self._scale = torch.ones_like(q[0])

    def learn(self, q: Tensor, weight: Tensor) -> None:
        dense = q.shape[1] <= DENSE_DIM and len(q) >= 20 * q.shape[1]
        moments = Moments(q.mean(0), dense=dense)
        index = torch.multinomial(weight, len(q), replacement=True, generator=self.generator)
        moments.update(q[index])
        self._scale = moments.scale(dense)

    def begin(self, q: Tensor) -> Tensor:
        self._state = start(q.contiguous(), self.energy)
        return -self.energy.parts(q)[1]

    def once(self) -> tuple[Tensor, Tensor, float]:
        self._count += 1
        q = self._state.position
        time = LENGTH * (0.5 + halton(self._count))
        leapfrogs = max(1, min(MOST_LEAPFROGS, math.ceil(time / self._size)))
        noise = torch.empty_like(q).normal_(generator=self.generator)
        log_uniform = torch.empty_like(q[:, 0]).uniform_(generator=self.generator).log_()
        spread = torch.empty_like(q[:, :1]).uniform_(*SPREAD, generator=self.generator)
        step = Step(self._size * spread, self._scale, noise, log_uniform, leapfrogs)
        self._state, info = hamiltonian(self._state, self.energy, step)
        rate = float(info.acceptance.mean())
        everyone = torch.ones_like(info.accepted)
        self._size *= math.exp(harmonic_mean(info.acceptance, everyone, LEAST) - TARGET)
        return self._state.position, -self.energy.parts(self._state.position)[1], rate


class EllipticalMoves(Moves):
    """Elliptical slice moves: for priors that are Gaussian in unconstrained space.

    Whether the prior is Gaussian is asked of its energy: mean and covariance are read off its gradients, and the energy
    must be the quadratic form that they make.

    Raises:
        ModelError: it is not.
    """

    def __init__(self, energy: Potential, q: Tensor, generator: torch.Generator) -> None:
        super().__init__(energy, q, generator)
        self._mean, self._factor = self._gaussian_prior(q)

    def _gaussian_prior(self, q: Tensor) -> tuple[Tensor, Tensor]:
        dim = q.shape[1]
        points = torch.cat([q.new_zeros(1, dim), torch.eye(dim, dtype=q.dtype, device=q.device)])
        values, slopes = self.energy.prior_value_and_grad(points)
        precision = (slopes[1:] - slopes[0]).double()
        precision = (precision + precision.mT) / 2
        factor, failed = torch.linalg.cholesky_ex(precision)
        if int(failed) == 0:
            mean = -torch.cholesky_solve(slopes[:1].double().mT, factor).squeeze(-1)
            x = q[:8].double() - mean
            expected = values[0].double() + 0.5 * ((x @ precision) * x).sum(-1) - 0.5 * mean @ precision @ mean
            found = self.energy.parts(q[:8].contiguous())[0].double()
            scale = 1 + expected.abs().max()
            if torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(scale)):
                root = torch.linalg.solve_triangular(factor, torch.eye(dim).to(factor), upper=False).mT
                return mean.to(q.dtype), root.to(q.dtype)
        raise ModelError(
            "moves: elliptical slices need a prior that is Gaussian in unconstrained space, and this one is not; put "
            "learned priors into noise space with infer.PushforwardReparam, or use moves='hmc'."
        )

    def learn(self, q: Tensor, weight: Tensor) -> None:
        """Nothing: there is nothing to tune."""

    def begin(self, q: Tensor) -> Tensor:
        self._beta, self._centred = self.energy.inverse_temperature, q - self._mean
        self._reached = self._level(self._centred)
        return self._reached / self._beta

    def once(self) -> tuple[Tensor, Tensor, float]:
        noise = torch.empty_like(self._centred).normal_(generator=self.generator) @ self._factor.mT
        outcome = elliptical_slice(self._centred, self._reached, self._level, noise, self.generator)
        self._centred, self._reached, evaluations = outcome
        return self._centred + self._mean, self._reached / self._beta, 1 / evaluations

    def _level(self, centred: Tensor) -> Tensor:
        level = -self._beta * self.energy.parts((centred + self._mean).contiguous())[1]
        return torch.where(level.isnan(), -torch.inf, level)


def _standardized(q: Tensor, likelihood: Tensor) -> Tensor:
    """Coordinates and log likelihood as columns of mean zero and variance one."""
    columns = torch.cat([q, likelihood.nan_to_num(0, 0, 0)[:, None]], -1)
    return (columns - columns.mean(0)) / columns.std(0).clamp_min(1e-30)
