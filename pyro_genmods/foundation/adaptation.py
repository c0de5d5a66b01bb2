r"""Adaptation across chains: step size, scale and trajectory length from what all chains saw.

Many chains learn in one iteration what one chain learns in as many: a hundred iterations of warm-up are enough for
sixty-four. Afterwards everything is fixed, and the chains are ordinary Markov chains.

* **Step size** by dual averaging, so that the *harmonic* mean of the acceptance probabilities over chains meets a
  target: it is dominated by the chains in narrow places.
* **Scale** from moments pooled over chains and iterations, restarted at growing intervals so that the way from the
  start is forgotten.
* **Trajectory length** :math:`T` by ascent of the ChEES criterion,

  .. math:: \frac14\, \mathbb E\Bigl[\bigl(|y'|^2 - |y|^2\bigr)^2\Bigr],

  with :math:`y` the centred positions in round coordinates before and after a trajectory: how far the *slowest* thing,
  the distance from the centre, moves.

References:
    M. D. Hoffman, A. Radul, P. Sountsov, An Adaptive MCMC Scheme for Setting Trajectory Lengths in Hamiltonian Monte
    Carlo, 2021, AISTATS.
    P. Sountsov, M. D. Hoffman, Focusing on Difficult Directions for Learning HMC Trajectory Lengths, 2021,
    arXiv:2110.11576.
    M. D. Hoffman, A. Gelman, The No-U-Turn Sampler, 2014, arXiv:1111.4246.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .chains import Info, whitened

__all__ = ["DualAveraging", "Moments", "TrajectoryLength", "halton", "harmonic_mean", "settled"]


@dataclass
class DualAveraging:
    """Step size that brings an acceptance statistic to its target.

    Attributes:
        target: of the statistic.
        log_start: logarithm of the step size around which to look.
        gamma: how calm; large where the statistic has little noise, because many chains share in it.

    Example:
        >>> step = DualAveraging.around(1.0, target=0.65)
        >>> for _ in range(300):
        ...     step.update(math.exp(-step.size))          # acceptance falls with the step size
        >>> round(math.exp(-step.final), 2)
        0.65
    """

    target: float
    log_start: float
    log_size: float
    gamma: float = 0.05
    log_average: float = 0.0
    error: float = 0.0
    count: int = 0

    OFFSET, KAPPA = 10.0, 0.75

    @classmethod
    def around(cls, size: float, target: float, chains: int = 1) -> DualAveraging:
        """Start at a step size."""
        return cls(target, math.log(size), math.log(size), 0.05 * min(3.0, math.sqrt(chains)))

    @property
    def size(self) -> float:
        """The step size to try next."""
        return math.exp(self.log_size)

    @property
    def final(self) -> float:
        """The average to keep."""
        return math.exp(self.log_average) if self.count else self.size

    def update(self, statistic: float) -> None:
        """Learn from the statistic at the last step size; what is no number counts as zero."""
        statistic = statistic if math.isfinite(statistic) else 0.0
        self.count += 1
        weight = 1 / (self.count + self.OFFSET)
        self.error = (1 - weight) * self.error + weight * (self.target - statistic)
        self.log_size = self.log_start - math.sqrt(self.count) / self.gamma * self.error
        weight = self.count**-self.KAPPA
        self.log_average = (1 - weight) * self.log_average + weight * self.log_size

    def restart(self) -> None:
        """Forget the past, go on from the present average."""
        self.log_size = self.log_average if self.count else self.log_size
        self.log_start, self.error, self.count = self.log_size, 0.0, 0
        self.log_average = 0.0


class Moments:
    """Mean and (co)variance of positions, pooled over chains and iterations.

    Arguments:
        mean: first guess, ``(dim,)``.
        dense: keep the whole covariance.

    Example:
        >>> moments = Moments(torch.zeros(2))
        >>> moments.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 2.0], [-1.0, -2.0]]))
        >>> moments.mean, moments.scale().square()
        (tensor([0., 0.]), tensor([1.0000, 2.0000]))
    """

    def __init__(self, mean: Tensor, dense: bool = False) -> None:
        self.dense = dense
        self.mean = mean
        self.covariance = torch.zeros(*mean.shape * (2 if dense else 1), dtype=mean.dtype, device=mean.device)
        self.count = 0

    def restart(self) -> None:
        """Forget; the mean stays as a guess until there is a new one."""
        self.count = 0

    def update(self, rows: Tensor) -> None:
        """Take in more positions ``(rows, dim)``."""
        if not len(rows):
            return
        n, m = self.count, len(rows)
        mean = rows.mean(0)
        centred = rows - mean
        spread = centred.mT @ centred / m if self.dense else centred.square().mean(0)
        if n == 0:
            self.mean, self.covariance, self.count = mean, spread, m
            return
        gap, weight = mean - self.mean, m / (n + m)
        between = torch.outer(gap, gap) if self.dense else gap.square()
        self.covariance = (1 - weight) * self.covariance + weight * spread + weight * (1 - weight) * between
        self.mean, self.count = self.mean + weight * gap, n + m

    def scale(self, dense: bool = False) -> Tensor:
        """Standard deviations ``(dim,)``, or a lower triangle, never quite zero."""
        variance = self.covariance.diagonal() if self.dense else self.covariance
        variance = variance.clamp_min(1e-6 * variance.clamp_min(1e-20).log().mean().exp() + 1e-20)
        if not dense:
            return variance.sqrt()
        return torch.linalg.cholesky(self.covariance + (5 / (self.count + 5) * 1e-3 * variance).diag()).contiguous()

    def correlation(self) -> Tensor:
        """Correlations ``(dim, dim)``; dense moments only."""
        deviation = self.covariance.diagonal().clamp_min(1e-30).sqrt()
        return self.covariance / torch.outer(deviation, deviation)


@dataclass
class TrajectoryLength:
    r"""Trajectory length by stochastic ascent of a criterion, in its logarithm.

    Attributes:
        log_length: :math:`\log T`, in units in which the target is round.
        rate: learning rate of Adam.

    Example:
        >>> length = TrajectoryLength(0.0)
        >>> length.length
        1.0
    """

    log_length: float
    rate: float = 0.05
    first: float = 0.0
    second: float = 0.0
    count: int = 0
    log_average: float = 0.0
    averaged: int = 0

    @property
    def length(self) -> float:
        """The length to try next."""
        return math.exp(self.log_length)

    @property
    def final(self) -> float:
        """The average to keep."""
        return math.exp(self.log_average) if self.averaged else self.length

    def update(self, before: Tensor, info: Info, moments: tuple[Tensor, Tensor], time: float, usable: Tensor) -> None:
        """Learn from trajectories of a duration that is ``time`` times the length.

        Arguments:
            before: positions at their start, ``(chains, dim)``.
            info: of the transition.
            moments: centre and scale.
            time: the jitter of this transition.
            usable: chains to learn from, ``(chains,)``.
        """
        centre, scale = moments
        y0, y1 = whitened(scale, before - centre), whitened(scale, info.proposal - centre)
        change = y1.square().sum(-1) - y0.square().sum(-1)
        slope = info.acceptance * change * (y1 * info.momentum).sum(-1)
        self._ascend(float(torch.where(usable & slope.isfinite(), slope, 0.0).mean()) * time * self.length)

    def _ascend(self, slope: float) -> None:
        if not math.isfinite(slope):
            return
        self.count += 1
        self.first = 0.8 * self.first + 0.2 * slope
        self.second = 0.95 * self.second + 0.05 * slope * slope
        first, second = self.first / (1 - 0.8**self.count), self.second / (1 - 0.95**self.count)
        self.log_length += max(-0.35, min(0.35, self.rate * first / (math.sqrt(second) + 1e-30)))
        self.averaged += 1
        self.log_average += (self.log_length - self.log_average) / self.averaged

    def restart(self) -> None:
        """Begin the average anew."""
        self.averaged = 0


def state_of(adaptation: DualAveraging | TrajectoryLength) -> dict[str, Any]:
    """Numbers from which a dataclass of this file is made again.

    Example:
        >>> state_of(DualAveraging.around(1.0, 0.8))["target"]
        0.8
    """
    return asdict(adaptation)


def halton(index: int) -> float:
    """Van der Corput's sequence in base two, from index 1: numbers that fill (0, 1) evenly, in any stretch.

    Example:
        >>> [halton(i) for i in range(1, 5)]
        [0.5, 0.25, 0.75, 0.125]
    """
    value, factor = 0.0, 0.5
    while index:
        index, bit = divmod(index, 2)
        value += bit * factor
        factor /= 2
    return value


def harmonic_mean(acceptance: Tensor, usable: Tensor, least: float = 0.01) -> float:
    """Harmonic mean over usable chains, none of which counts for less than the least; 0 if there are none.

    Example:
        >>> round(harmonic_mean(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([True, True, False])), 3)
        0.667
    """
    inverse = torch.where(usable, 1 / acceptance.clamp_min(least), 0.0).sum()
    return float(usable.sum() / inverse.clamp_min(1e-30))


def settled(energy: Tensor, dim: int) -> Tensor:
    """Chains whose energy is not far above that of the others: those to learn from.

    A chain that started in a bad place and has not found its way has an energy beyond anything that the target's own
    fluctuations, of the order of the root of half the dimension, explain.

    Example:
        >>> settled(torch.tensor([1.0, 2.0, 3.0, 1e6, torch.nan]), dim=2)
        tensor([ True,  True,  True, False, False])
    """
    if len(energy) < 4:
        return energy.isfinite()
    ordered = energy.sort().values  # NaN is the largest
    low, middle = ordered[len(energy) // 4], ordered[len(energy) // 2]  # what is far is above both
    spread = (middle - low).nan_to_num(0, 0, 0)
    return energy <= middle + 5 * spread + 10 + 5 * math.sqrt(dim / 2)
