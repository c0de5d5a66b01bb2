r"""Samplers: ways from noise to data, each with an order and a number of network calls.

All work on white rows :math:`u_\theta` along a decreasing grid of angles, :math:`\theta_t \to \theta_s`, with one call
of the denoiser at :math:`\theta_t` unless said otherwise; :math:`\alpha = \cos\theta`, :math:`\sigma = \sin\theta`.

* The probability flow :math:`\mathrm du = v\,\mathrm d\theta` by one-step methods (``Euler``, ``Heun``, ``RK4``) and by
  :class:`AdamsBashforth`, two steps' velocities for one call; :class:`DPMSolver` integrates what is linear exactly.
  These are maps of the noise, *pushforwards*.
* Chains that add noise of their own: :class:`Ancestral` (DDPM; ``eta`` interpolates to the deterministic DDIM),
  :class:`PredictorCorrector`, and :class:`~pyro_genmods.evolve.reverse_sde.ReverseSDE`.

With a network that is not exact these are *different laws*: that of the flow, that of the stochastic equation, and that
of each chain of finitely many steps.

References:
    J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239. J. Song, C. Meng, S.
    Ermon, Denoising Diffusion Implicit Models, 2020, arXiv:2010.02502. C. Lu et al., DPM-Solver++, 2022,
    arXiv:2211.01095. Y. Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2020,
    arXiv:2011.13456 (predictor and corrector).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .denoiser import Denoiser
from .schedule import Schedule

__all__ = ["AdamsBashforth", "Ancestral", "DPMSolver", "PredictorCorrector", "Sampler", "fresh"]

Draw = Callable[[], Tensor]


@dataclass(frozen=True)
class Sampler(ABC):
    """A way from noise to data on a grid of angles.

    Arguments:
        steps: how many.
        schedule: whose grid of angles is taken, from a right angle to the model's smallest; default the model's own
            grid, which is calibrated to its velocity.

    Attributes:
        order: the error of a solution falls like the step to this power; of a chain's law, in the weak sense.
        stochastic: whether noise is added on the way.

    Raises:
        ValueError: fewer than one step.
    """

    steps: int = 16
    schedule: Schedule | None = None
    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, needs at least 1.")
        if self.schedule is not None:
            self.schedule.check()

    @property
    def evaluations(self) -> int:
        """Sequential calls of the network."""
        return self.steps

    @property
    def draws(self) -> int:
        """Standard normal rows that are drawn on the way."""
        return 0

    @abstractmethod
    def run(self, denoiser: Denoiser, u: Tensor, c: Tensor | None, angles: Tensor, draw: Draw) -> Tensor:
        """Carry rows along.

        Arguments:
            denoiser: of white rows.
            u: standard normal rows ``(rows, n)`` at the first angle.
            c: rows of context.
            angles: decreasing, ``(steps + 1,)``.
            draw: makes standard normal rows of the shape of ``u``.
        """


@dataclass(frozen=True)
class AdamsBashforth(Sampler):
    r"""The two-step method of Adams and Bashforth: order 2 for one call a step.

    .. math:: u_s = u_t + h \big( v_t + \tfrac{h}{2 h'} (v_t - v_{t'}) \big)

    with the step :math:`h'` from :math:`t'` before; the first step is Euler's.

    Example:
        >>> AdamsBashforth(8).evaluations, AdamsBashforth.order
        (8, 2)
    """

    order: ClassVar[int] = 2

    def run(self, denoiser: Denoiser, u: Tensor, c: Tensor | None, angles: Tensor, draw: Draw) -> Tensor:
        before = None
        for t, h in zip(angles[:-1].unbind(), angles.diff().unbind(), strict=True):
            v = denoiser.velocity(t, u, c)
            slope = v if before is None else torch.addcmul(v, v - before[0], 0.5 * h / before[1])
            u = torch.addcmul(u, slope, h)
            before = v, h
        return u


@dataclass(frozen=True)
class DPMSolver(Sampler):
    r"""DPM-Solver++(2M), order 2: exponential integration in :math:`\lambda = \log(\alpha / \sigma)`.

    .. math:: u_s = \frac{\sigma_s}{\sigma_t} u_t - \alpha_s (e^{-h} - 1)
              \big( D_t + \tfrac{h}{2 h'} (D_t - D_{t'}) \big), \qquad h = \lambda_s - \lambda_t .

    The first step, from pure noise, is infinitely long in :math:`\lambda` and exact in the limit.

    Example:
        >>> DPMSolver(8).order
        2
    """

    order: ClassVar[int] = 2

    def run(self, denoiser: Denoiser, u: Tensor, c: Tensor | None, angles: Tensor, draw: Draw) -> Tensor:
        before = None
        for t, s in zip(angles[:-1].unbind(), angles[1:].unbind(), strict=True):
            d = denoiser.denoised(t, u, c)
            h = t.tan().abs().log() - s.tan().log()
            mixed = d if before is None else torch.addcmul(d, d - before[0], 0.5 * h / before[1])
            u = s.sin() / t.sin() * u - s.cos() * torch.expm1(-h) * mixed
            before = d, h
        return u


@dataclass(frozen=True)
class Ancestral(Sampler):
    r"""The ancestral chain of DDPM, and DDIM.

    .. math:: u_s = \alpha_s D + \sigma_s \sqrt{1 - \eta^2 \tau}\, \hat\varepsilon + \eta\, \sigma_s \sqrt\tau\, \xi,
              \qquad \tau = 1 - \Big( \frac{\alpha_t \sigma_s}{\alpha_s \sigma_t} \Big)^2

    Arguments:
        steps, schedule: see :class:`Sampler`.
        eta: 1 for the chain of DDPM, 0 for DDIM, which adds no noise.

    Example:
        >>> Ancestral(8).draws, Ancestral(8, eta=0.0).draws
        (8, 0)
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: got {self.eta}, needs a number from 0 (no noise) to 1 (the ancestral chain).")

    @property
    def stochastic(self) -> bool:
        """Whether noise is added."""
        return self.eta > 0

    @property
    def draws(self) -> int:
        """One for each step, if any."""
        return self.steps if self.stochastic else 0

    def run(self, denoiser: Denoiser, u: Tensor, c: Tensor | None, angles: Tensor, draw: Draw) -> Tensor:
        for t, s in zip(angles[:-1].unbind(), angles[1:].unbind(), strict=True):
            mean, sd = self.step(denoiser, u, c, t, s)
            u = mean if sd is None else torch.addcmul(mean, draw(), sd)
        return u

    def step(
        self, denoiser: Denoiser, u: Tensor, c: Tensor | None, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Mean of the rows after a step, and their standard deviation, ``None`` for zero."""
        v = denoiser.velocity(t, u, c)
        return self.mean(t.cos() * u - t.sin() * v, t.sin() * u + t.cos() * v, t, s)

    def mean(self, datum: Tensor, noise: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, from what is known of datum and noise."""
        tau = self.eta**2 * fresh(t, s)
        mean = s.cos() * datum + s.sin() * (1 - tau).sqrt() * noise
        return mean, s.sin() * tau.sqrt() if self.stochastic else None


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    r"""The ancestral chain, with steps of Langevin's diffusion at every angle.

    .. math:: u \leftarrow u + \delta\, \nabla \log p_\theta(u) + \sqrt{2 \delta}\, \xi, \qquad
              \delta = (\rho \sin\theta)^2

    Arguments:
        steps, schedule: see :class:`Sampler`.
        corrections: Langevin steps after each step.
        size: :math:`\rho`, in standard deviations of the noise.

    Example:
        >>> PredictorCorrector(8, corrections=2).evaluations
        24
    """

    corrections: int = 1
    size: float = 0.2
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corrections < 1:
            raise ValueError(f"corrections: got {self.corrections}, needs at least 1; Ancestral() makes none.")
        if not self.size > 0:
            raise ValueError(f"size: got {self.size}, needs a positive number.")

    @property
    def evaluations(self) -> int:
        """One for each step and each correction."""
        return self.steps * (1 + self.corrections)

    @property
    def draws(self) -> int:
        """One for each step and each correction."""
        return self.evaluations

    def run(self, denoiser: Denoiser, u: Tensor, c: Tensor | None, angles: Tensor, draw: Draw) -> Tensor:
        chain = Ancestral(1)
        for t, s in zip(angles[:-1].unbind(), angles[1:].unbind(), strict=True):
            mean, sd = chain.step(denoiser, u, c, t, s)
            u = torch.addcmul(mean, draw(), sd)
            delta = (self.size * s.sin()).square()
            for _ in range(self.corrections):
                u = u + delta * denoiser.score(s, u, c) + (2 * delta).sqrt() * draw()
        return u


def fresh(t: Tensor, s: Tensor) -> Tensor:
    r"""The fraction :math:`\tau` of the noise at angle ``s`` that is fresh, in the ancestral chain from ``t``."""
    return 1 - (s.tan() / t.tan()).square()
