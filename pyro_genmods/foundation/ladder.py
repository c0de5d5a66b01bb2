r"""Up and down a ladder of temperatures that is fixed beforehand.

On the way from a reference, :math:`e^{-U_0}`, to a target, :math:`e^{-U_0 - V}`, particles are moved by kernels
:math:`T_k` that leave :math:`\pi_{\beta_k}` as it is. The *work* of a particle is

.. math:: w = -\sum_{k=1}^{K} (\beta_k - \beta_{k-1})\, V(x_{k-1}), \qquad x_k \sim T_k(x_{k-1}) .

* **Up**, from draws of the reference, :math:`\mathbb E\, e^{w} = Z_1 / Z_0`, whether or not the particles forget where
  they were: annealed importance sampling. The logarithm of a mean of :math:`e^w` is below the truth on average.
* **Down**, from draws of the target through the same temperatures, :math:`\mathbb E\, e^{-w} = Z_0 / Z_1`, so that the
  same is above it.
* **As a population**, resampled at every rung: sequential Monte Carlo, which arrives with draws of the target.

Nothing is learned on the way, so that particles that are not resampled are independent.

References:
    R. M. Neal, Annealed Importance Sampling, 2001, arXiv:physics/9803008.
    R. B. Grosse, Z. Ghahramani, R. P. Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo, 2015,
    arXiv:1511.02543.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .annealing import finite
from .moves import Moves, Tempered
from .resampling import effective_sample_size, systematic

GROWTH = 3.0  # power by which steps grow from the reference on

__all__ = ["Ladder", "Passage", "ascend", "descend", "populate"]


class Ladder(NamedTuple):
    r"""Temperatures, and what the moves learned at each.

    Attributes:
        inverse_temperatures: :math:`\beta` from 0 to 1, ``(rungs + 1, groups)``, in float64.
        settings: of the moves at each of them, from the second on; ``rungs`` of them.

    Example:
        >>> ladder = Ladder(torch.tensor([[0.0], [0.4], [1.0]]), [None, None])
        >>> ladder.refined(2).inverse_temperatures.flatten()
        tensor([0.0000, 0.0500, 0.4000, 0.7000, 1.0000])
    """

    inverse_temperatures: Tensor
    settings: Sequence[Any]

    @property
    def rungs(self) -> int:
        """Steps from the reference to the target."""
        return len(self.settings)

    def refined(self, factor: int) -> Ladder:
        """Every step in so many."""
        return self.resized(self.rungs * factor)

    def resized(self, rungs: int) -> Ladder:
        """As many steps as wanted, spread like these; each with what was learned at the next temperature above.

        Within the first they grow: a wide reference has draws at which the target is next to impossible, and these
        leave one after the other.
        """
        beta = self.inverse_temperatures
        place = torch.arange(rungs + 1, dtype=torch.float64, device=beta.device) * self.rungs / rungs
        low = place.floor().long().clamp(max=self.rungs - 1)
        part = (place - low).to(beta)
        part = torch.where(low == 0, part**GROWTH, part)
        between = torch.lerp(beta[low], beta[low + 1], part[:, None])
        return Ladder(between, [self.settings[math.ceil(float(p) - 1e-9) - 1] for p in place[1:]])

    def repeated(self, times: int) -> Ladder:
        """For so many groups in place of each."""
        return Ladder(self.inverse_temperatures.repeat_interleave(times, 1), self.settings)


class Passage(NamedTuple):
    r"""Where particles arrived, and at what cost.

    Attributes:
        position: ``(groups * particles, dim)``.
        work: :math:`w` of each particle, ``(groups, particles)``, in float64; of a population, that of the last step.
        log_ratio: :math:`\log (Z_1 / Z_0)` of each group, ``(groups,)``.
        ess: effective number of particles in proportion to all, at worst, ``(groups,)``.
        levels: :math:`-V` of the particles at every temperature, ``(rungs + 1, groups, particles)``; of a population.

    Example:
        >>> Passage(torch.zeros(4, 1), torch.zeros(2, 2), torch.zeros(2), torch.ones(2)).levels is None
        True
    """

    position: Tensor
    work: Tensor
    log_ratio: Tensor
    ess: Tensor
    levels: Tensor | None = None


Report = Callable[[int], None]


def ascend(energy: Tempered, q: Tensor, moves: Moves, ladder: Ladder, report: Report | None = None) -> Passage:
    """Independent particles from the reference to the target.

    Arguments:
        energy: the path; its ``inverse_temperature`` is set on the way.
        q: draws of the reference, ``(groups * particles, dim)``, groups one after the other.
        moves: of the particles; one move at every temperature.
        ladder: of these groups.
        report: told of every step.

    Example:
        >>> from pyro_genmods.foundation.annealing import Path
        >>> from pyro_genmods.foundation.moves import HamiltonianMoves
        >>> g = torch.Generator().manual_seed(0)
        >>> q = torch.randn(4 * 500, 1, generator=g)                                    # four groups of N(0, 1)
        >>> path = Path(lambda q: 0.5 * q[:, 0] ** 2, lambda q: 4.0 * q[:, 0] ** 2)     # to precision 9
        >>> ladder = Ladder(torch.linspace(0, 1, 11).double()[:, None], [(0.5, torch.ones(1))] * 10).repeated(4)
        >>> found = ascend(path, q, HamiltonianMoves(path, q, g, groups=4), ladder)
        >>> round(float(found.log_ratio.exp().mean()), 1)                               # Z shrinks to a third
        0.3
    """
    likelihood, steps = _begin(energy, q, moves, ladder)
    work = torch.zeros_like(likelihood)
    for k in range(ladder.rungs):
        work = work + _gain(likelihood, steps[k])
        if k + 1 < ladder.rungs:
            q, likelihood = _moved(energy, q, moves, ladder, k + 1, (1, 1))
        _tell(report, k)
    n = work.shape[1]
    return Passage(q, work, work.logsumexp(1) - math.log(n), effective_sample_size(work) / n)


def descend(energy: Tempered, q: Tensor, moves: Moves, ladder: Ladder, report: Report | None = None) -> Passage:
    """Independent particles from the target to the reference; arguments as for :func:`ascend`.

    Example:
        >>> from pyro_genmods.foundation.annealing import Path
        >>> from pyro_genmods.foundation.moves import HamiltonianMoves
        >>> g = torch.Generator().manual_seed(0)
        >>> q = torch.randn(4 * 500, 1, generator=g) / 3                                # four groups of N(0, 1 / 9)
        >>> path = Path(lambda q: 0.5 * q[:, 0] ** 2, lambda q: 4.0 * q[:, 0] ** 2)     # from precision 1
        >>> ladder = Ladder(torch.linspace(0, 1, 11).double()[:, None], [(0.5, torch.ones(1))] * 10).repeated(4)
        >>> found = descend(path, q, HamiltonianMoves(path, q, g, groups=4), ladder)
        >>> round(float(found.log_ratio.exp().mean()), 1)
        0.3
    """
    likelihood, steps = _begin(energy, q, moves, ladder)
    work = torch.zeros_like(likelihood)
    for k in range(ladder.rungs - 1, -1, -1):
        work = work + _gain(likelihood, steps[k])
        if k:
            q, likelihood = _moved(energy, q, moves, ladder, k, (1, 1))
        _tell(report, ladder.rungs - 1 - k)
    n = work.shape[1]
    return Passage(q, work, math.log(n) - (-work).logsumexp(1), effective_sample_size(-work) / n)


def populate(
    energy: Tempered,
    q: Tensor,
    moves: Moves,
    ladder: Ladder,
    num_moves: tuple[int, int] = (4, 8),
    report: Report | None = None,
) -> Passage:
    """Populations from the reference to the target, resampled at every temperature.

    Arguments:
        energy, q, moves, ladder, report: as for :func:`ascend`.
        num_moves: at every temperature, at least and at most; in between they end when the past is forgotten.

    Raises:
        SamplingError: no particle of a group is left.

    Example:
        >>> from pyro_genmods.foundation.annealing import Path
        >>> from pyro_genmods.foundation.moves import HamiltonianMoves
        >>> g = torch.Generator().manual_seed(0)
        >>> q = torch.randn(500, 1, generator=g)
        >>> path = Path(lambda q: 0.5 * q[:, 0] ** 2, lambda q: 4.0 * q[:, 0] ** 2)
        >>> ladder = Ladder(torch.tensor([[0.0], [0.2], [1.0]]).double(), [(0.5, torch.ones(1))] * 2)
        >>> found = populate(path, q, HamiltonianMoves(path, q, g), ladder)
        >>> round(float(found.position.var()), 1), found.levels.shape
        (0.1, torch.Size([3, 1, 500]))
    """
    likelihood, steps = _begin(energy, q, moves, ladder)
    groups, n = likelihood.shape
    first = n * torch.arange(groups, device=q.device)[:, None]
    log_ratio, worst, levels = torch.zeros_like(likelihood[:, 0]), torch.ones_like(likelihood[:, 0]), [likelihood]
    for k in range(ladder.rungs):
        gained = _gain(likelihood, steps[k])
        log_ratio = log_ratio + gained.logsumexp(1) - math.log(n)
        worst = torch.minimum(worst, effective_sample_size(gained) / n)
        q = q[(systematic(gained, moves.generator) + first).flatten()]
        q, likelihood = _moved(energy, q, moves, ladder, k + 1, num_moves)
        levels.append(likelihood)
        _tell(report, k)
    return Passage(q, gained, log_ratio, worst, torch.stack(levels))


def _begin(energy: Tempered, q: Tensor, moves: Moves, ladder: Ladder) -> tuple[Tensor, Tensor]:
    """Log likelihoods ``(groups, particles)``, and steps ``(rungs, groups, 1)``."""
    likelihood = -energy.parts(q)[1].double().reshape(moves.groups, -1)
    return likelihood, ladder.inverse_temperatures.diff(dim=0)[..., None]


def _gain(likelihood: Tensor, step: Tensor) -> Tensor:
    """Log weights of a step; where it has no length nothing is gained, by impossible particles either."""
    return torch.where(step > 0, finite(likelihood * step), 0.0)


def _moved(
    energy: Tempered, q: Tensor, moves: Moves, ladder: Ladder, rung: int, num_moves: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    groups = moves.groups
    beta = ladder.inverse_temperatures[rung].to(q.device)
    if q.is_floating_point():
        beta = beta.to(q.dtype)
    energy.inverse_temperature = beta.repeat_interleave(len(q) // groups)
    moves.use(ladder.settings[rung - 1])
    q, likelihood, _, _ = moves.move(q, *num_moves)
    return q, likelihood.double().reshape(groups, -1)


def _tell(report: Report | None, step: int) -> None:
    if report is not None:
        report(step + 1)
