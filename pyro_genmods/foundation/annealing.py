r"""Annealing: populations of particles from a law that can be drawn to one that cannot.

Between a reference with energy :math:`U_0` and a target with energy :math:`U_0 + V` lies the geometric path

.. math:: \pi_\beta(x) \propto e^{-U_0(x) - \beta V(x)}, \qquad 0 = \beta_0 < \beta_1 < \dots < \beta_K = 1 ,

and along it :math:`\log (Z_1 / Z_0) = \sum_k \log \mathbb E_{\pi_{\beta_k}} e^{-(\beta_{k+1} - \beta_k) V}`.

*Sequential Monte Carlo* takes as :math:`\beta_{k+1}` the inverse temperature at which the weights
:math:`e^{-(\beta_{k+1} - \beta_k) V}` are worth a given fraction of the particles, resamples, and moves the particles
by a kernel that leaves :math:`\pi_{\beta_{k+1}}` as it is. Several populations, with targets of their own or with the
same one, go the way in one batch, each at its own pace: their scatter is the error of the estimate.

Reference:
    P. Del Moral, A. Doucet, A. Jasra, Sequential Monte Carlo samplers, 2006, JRSS B 68(3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import SamplingError
from .moves import Moves, Tempered
from .resampling import effective_sample_size, systematic

__all__ = ["Annealed", "Path", "Stage", "anneal", "next_step"]

BISECTIONS = 60
MOST_STAGES = 500

EnergyFunction = Callable[[Tensor], Tensor]


class Path:
    r"""The geometric path :math:`U_\beta = U_0 + \beta V` between two laws given by functions of rows.

    Arguments:
        reference: :math:`U_0`, rows ``(rows, dim)`` to ``(rows,)``, differentiable.
        tilt: :math:`V`, likewise.

    Attributes:
        inverse_temperature: :math:`\beta` of every row, ``(rows,)``; assign it before use.

    Example:
        >>> path = Path(lambda q: 0.5 * q.square().sum(-1), lambda q: 1.5 * q.square().sum(-1))
        >>> path.inverse_temperature = torch.tensor([0.0, 1.0])
        >>> path.grad(torch.ones(2, 1)).flatten()
        tensor([1., 4.])
    """

    def __init__(self, reference: EnergyFunction, tilt: EnergyFunction) -> None:
        self.reference, self.tilt = reference, tilt
        self.inverse_temperature = torch.zeros(())
        self.num_gradients = 0

    def parts(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`U_0` and :math:`V`, two of ``(rows,)``."""
        with torch.no_grad():
            return self.reference(q), self.tilt(q)

    def value(self, q: Tensor) -> Tensor:
        """Energies, ``(rows,)``."""
        reference, tilt = self.parts(q)
        return reference + self.inverse_temperature * tilt

    def grad(self, q: Tensor) -> Tensor:
        """Gradients, ``(rows, dim)``."""
        return self.value_and_grad(q)[1]

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        with torch.enable_grad():
            leaf = q.detach().requires_grad_()
            values = self.reference(leaf) + self.inverse_temperature * self.tilt(leaf)
            (gradients,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradients

    def fuse(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """The function with this target as its first argument."""
        return lambda *tensors: function(self, *tensors)


class Stage(NamedTuple):
    """One step from an inverse temperature to the next.

    Attributes:
        inverse_temperature: arrived at, the mean over populations.
        ess: effective number of particles of a population before resampling, the mean over populations.
        acceptance: mean acceptance of the moves.
        moves: how many were needed to forget the past.

    Example:
        >>> Stage(0.5, 800.0, acceptance=0.8, moves=3).moves
        3
    """

    inverse_temperature: float
    ess: float
    acceptance: float
    moves: int


class Annealed(NamedTuple):
    r"""Where the populations arrived.

    Attributes:
        position: ``(groups * particles, dim)``, of equal weight.
        log_ratio: estimates of :math:`\log (Z_1 / Z_0)`, ``(groups,)``, in float64.
        stages: what happened on the way.
        ladders: inverse temperatures of every population after every stage, ``(stages, groups)``.

    Example:
        >>> Annealed(torch.zeros(8, 2), torch.zeros(2), [], torch.ones(0, 2)).log_ratio.shape
        torch.Size([2])
    """

    position: Tensor
    log_ratio: Tensor
    stages: list[Stage]
    ladders: Tensor


def anneal(
    energy: Tempered,
    q: Tensor,
    moves: Moves,
    *,
    target_ess: float = 0.5,
    num_moves: int = 2,
    max_moves: int = 50,
    report: Callable[[Stage, Tensor], None] | None = None,
) -> Annealed:
    """Carry populations of draws of the reference to the target by sequential Monte Carlo.

    Arguments:
        energy: the path; its ``inverse_temperature`` is set on the way.
        q: draws of the reference, ``(groups * particles, dim)``, populations one after the other.
        moves: of the particles, with their number of groups and their generator.
        target_ess: fraction of the particles that the weights of one step may cost.
        num_moves, max_moves: at every temperature, at least and at most.
        report: told of every stage, and of the log ratios so far.

    Raises:
        SamplingError: in some population no particle has a finite energy, or the way is too long.

    Example:
        >>> from pyro_genmods.foundation.moves import HamiltonianMoves
        >>> g = torch.Generator().manual_seed(0)
        >>> q = torch.randn(4 * 500, 1, generator=g)                         # four populations of N(0, 1)
        >>> path = Path(lambda q: 0.5 * q[:, 0] ** 2, lambda q: 4.0 * q[:, 0] ** 2)
        >>> found = anneal(path, q, HamiltonianMoves(path, q, g, groups=4))  # to precision 9: Z shrinks by a third
        >>> round(float(found.log_ratio.mean().exp()), 1), round(float(found.position.var()), 1)
        (0.3, 0.1)
    """
    groups = moves.groups
    n = len(q) // groups
    energy.inverse_temperature = torch.zeros_like(q[:, 0])
    likelihood = (-energy.parts(q)[1]).reshape(groups, n)
    if not bool(likelihood.isfinite().any(1).all()):
        raise SamplingError(
            f"particles: none of {n} draws of the reference has a finite likelihood in "
            f"{int((~likelihood.isfinite().any(1)).sum())} of {groups} population(s); the target hardly meets the "
            "reference, or is not finite there."
        )
    beta = torch.zeros(groups, dtype=torch.float64, device=q.device)
    log_ratio, stages, ladders = torch.zeros_like(beta), [], []
    while bool((beta < 1).any()):
        if len(stages) == MOST_STAGES:
            raise SamplingError(
                f"particles: {MOST_STAGES} stages reached an inverse temperature of {float(beta.min()):.3g}; the "
                "target is too sharp for this reference; take more particles, a lower target_ess or a nearer reference."
            )
        possible = likelihood.isfinite().sum(1)  # the others are lost at any temperature
        step = next_step(likelihood, 1 - beta, target_ess * possible)
        log_weight = finite(likelihood * step[:, None])
        log_ratio = log_ratio + log_weight.logsumexp(1) - math.log(n)
        weight = log_weight.softmax(1)
        beta = torch.where(step >= 1 - beta, 1.0, beta + step)
        moves.learn(q, weight.flatten().to(q))
        first = n * torch.arange(groups, device=q.device)[:, None]
        q = q[(systematic(log_weight, moves.generator) + first).flatten()]
        energy.inverse_temperature = beta.to(q).repeat_interleave(n)
        q, level, acceptance, count = moves.move(q, num_moves, max_moves)
        likelihood = level.reshape(groups, n)
        stages.append(Stage(float(beta.mean()), float(effective_sample_size(log_weight).mean()), acceptance, count))
        ladders.append(beta)
        if report is not None:
            report(stages[-1], log_ratio)
    return Annealed(q, log_ratio, stages, torch.stack(ladders))


def finite(log_weight: Tensor) -> Tensor:
    """Log weights with minus infinity where there is no number.

    Example:
        >>> finite(torch.tensor([0.0, torch.nan, torch.inf]))
        tensor([0., -inf, -inf])
    """
    return torch.where(log_weight.isnan() | (log_weight == torch.inf), -torch.inf, log_weight)


def next_step(likelihood: Tensor, most: Tensor, wanted: Tensor) -> Tensor:
    """The longest steps in inverse temperature whose weights are worth so many particles, by bisection.

    Arguments:
        likelihood: log likelihoods of particles, ``(groups, particles)``.
        most: longest steps allowed, ``(groups,)``.
        wanted: effective particles, ``(groups,)``.

    Example:
        >>> likelihood = torch.linspace(-10, 0, 100, dtype=torch.float64)[None]
        >>> step = next_step(likelihood, torch.ones(1, dtype=torch.float64), torch.tensor([50.0]))
        >>> round(float(effective_sample_size(step[:, None] * likelihood)), 3)
        50.0
    """
    likelihood = likelihood.double()

    def enough(step: Tensor) -> Tensor:
        return effective_sample_size(finite(likelihood * step[:, None])) >= wanted

    arrived = enough(most)
    low, high = torch.zeros_like(most), most
    for _ in range(BISECTIONS):
        middle = torch.where(low > 0, (low + high) / 2, high / 16)
        fine = enough(middle)
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    return torch.where(arrived, most, torch.where(low > 0, low, high))
