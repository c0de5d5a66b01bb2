r"""Noise schedules: how fast data are forgotten, and the angle to which all schedules map.

A schedule says how much of a (white) datum :math:`x_0` and of standard normal noise is left at time :math:`t`,

.. math:: x_t = \alpha_t x_0 + \sigma_t \varepsilon, \qquad \mathrm dx = f_t\, x\, \mathrm dt + g_t\, \mathrm dW,
          \qquad f = \frac{\dot\alpha}{\alpha}, \quad g^2 = \frac{\mathrm d\sigma^2}{\mathrm dt} - 2 f \sigma^2 .

With the angle :math:`\theta_t = \arctan(\sigma_t / \alpha_t)` and :math:`r_t = \sqrt{\alpha_t^2 + \sigma_t^2}`,

.. math:: u_\theta = x_t / r_t = \cos\theta \, x_0 + \sin\theta \, \varepsilon

is the same for every schedule. A network trained on :math:`(u, \theta)` can be sampled under any of them; a schedule
decides which angles are visited (:meth:`Schedule.angles`) and the clock of the stochastic differential equation. One's
own is a class with :meth:`Schedule.alpha`, :meth:`Schedule.sigma` and the two ends of time.

References:
    Y. Song et al., Score-Based Generative Modeling through SDEs, 2020, arXiv:2011.13456 (VP, sub-VP, VE). A.
    Nichol, P. Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, arXiv:2102.09672
    (cosine). T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the Design Space of Diffusion-Based Generative
    Models, 2022, arXiv:2206.00364 (EDM). X. Liu, C. Gong, Q. Liu, Flow Straight and Fast, 2022, arXiv:2209.03003
    (rectified). C. Lu, Y. Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, 2024,
    arXiv:2410.11081 (the angle as time).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import Normal
from torch import Tensor

from .schedule_check import check_schedule

__all__ = ["EDM", "VE", "VP", "Angle", "Cosine", "Rectified", "Schedule", "SubVP"]

BISECTIONS = 60


class Schedule(ABC):
    r"""How much data and noise there is at time :math:`t`.

    Subclasses give :meth:`alpha`, :meth:`sigma` and :attr:`ends`; the rest follows, by differentiation and bisection
    where a subclass has no closed form.

    Attributes:
        ends: first and last time, :math:`0 \le t_{\min} < t_{\max}`; data are at the first, noise is at the last.

    Example:
        >>> class Square(Schedule):
        ...     ends = (1e-3, 1.0)
        ...     def alpha(self, t):
        ...         return (1 - t**2).sqrt()
        ...     def sigma(self, t):
        ...         return t
        >>> schedule, t = Square(), torch.tensor(0.5)
        >>> round(float(schedule.drift(t)), 4), round(float(schedule.diffusion(t)) ** 2, 4)  # -t/(1-t^2), 2t/(1-t^2)
        (-0.6667, 1.3333)
        >>> round(float(schedule.time(schedule.log_snr(t))), 4)
        0.5
    """

    ends: tuple[float, float]

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """What is left of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise."""

    def drift(self, t: Tensor) -> Tensor:
        r"""Factor :math:`f_t` of the linear drift, per unit of time."""
        return _slope(lambda t: self.alpha(t).log(), t)

    def diffusion(self, t: Tensor) -> Tensor:
        r"""Diffusion coefficient :math:`g_t`, in standard deviations per square root of time."""
        square = _slope(lambda t: self.sigma(t).square(), t) - 2 * self.drift(t) * self.sigma(t).square()
        return square.clamp_min(0).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        r"""Logarithm of the signal-to-noise ratio, :math:`2 \log (\alpha_t / \sigma_t)`."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of :meth:`log_snr`, within :attr:`ends`."""
        low, high = (torch.full_like(log_snr, end) for end in self.ends)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            early = self.log_snr(middle) > log_snr
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return (low + high) / 2

    def angle(self, t: Tensor) -> Tensor:
        r""":math:`\theta_t = \arctan(\sigma_t / \alpha_t)`."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def scale(self, t: Tensor) -> Tensor:
        r""":math:`r_t`, the standard deviation at time :math:`t` of what is white at time 0."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    @property
    def base(self) -> Normal:
        r"""The base, :math:`\mathcal N(0, r_T^2)`: the law of each coordinate at the last time :math:`T`.

        It is exact for white Gaussian data, and for others as far as :math:`\alpha_T` is small. Samplers begin there.

        Example:
            >>> VP().base.scale.round(decimals=4), EDM().base.scale.round(decimals=4)       # 1, (1 + 80^2)^(1/2)
            (tensor(1., dtype=torch.float64), tensor(80.0062, dtype=torch.float64))
            >>> VE().base.expand([3]).to_event(1).sample().shape
            torch.Size([3])
        """
        scale = self.scale(torch.tensor(self.ends[1], dtype=torch.float64))
        return Normal(torch.zeros_like(scale), scale)

    def times(self, steps: int) -> Tensor:
        """Times at which the literature samples, ``(steps + 1,)``, from noise to data: decreasing, end to end."""
        return torch.linspace(self.ends[1], self.ends[0], steps + 1, dtype=torch.float64)

    def angles(self, steps: int) -> Tensor:
        """The angles of :meth:`times`, decreasing."""
        return self.angle(self.times(steps))

    def check(self) -> None:
        """Refuse a schedule that does not lead from data to noise.

        Raises:
            ValueError: noise in proportion to data is not small at the first time, not large at the last, or does not
                grow in between; numbers are not finite; or the grid of times does not go down from last to first.
        """
        check_schedule(self)


@dataclass(frozen=True)
class Angle(Schedule):
    r"""The angle itself as time: :math:`\alpha = \cos t`, :math:`\sigma = \sin t`, up to :math:`\pi/2` exactly.

    Arguments:
        smallest: the first time.

    Example:
        >>> (10 * Angle(0.1).angles(2)).round().tolist()
        [16.0, 8.0, 1.0]
    """

    smallest: float = 1e-3

    @property
    def ends(self) -> tuple[float, float]:
        """From the smallest angle to the right one."""
        return self.smallest, math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin()

    def drift(self, t: Tensor) -> Tensor:
        return -t.tan()

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t.tan()).sqrt()


@dataclass(frozen=True)
class VP(Schedule):
    r"""Variance preserving, with a linear rate: :math:`\log\alpha = -\tfrac12 \int_0^t \beta`, :math:`\sigma^2 = 1 -
    \alpha^2`, :math:`\beta_t = \beta_{\min} + t (\beta_{\max} - \beta_{\min})`.

    Arguments:
        beta_min, beta_max: rates at times 0 and 1.
        smallest: the first time.

    Example:
        >>> round(float(VP().alpha(torch.tensor(1.0))), 4)      # exp(-10.05 / 2)
        0.0066
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    smallest: float = 1e-3

    @property
    def ends(self) -> tuple[float, float]:
        """From the smallest time to 1."""
        return self.smallest, 1.0

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()

    def alpha(self, t: Tensor) -> Tensor:
        return (-0.5 * self._integral(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta_min + t * (self.beta_max - self.beta_min)).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return self._when(torch.nn.functional.softplus(-log_snr))  # alpha^2 = sigmoid(log_snr)

    def _when(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


@dataclass(frozen=True)
class SubVP(VP):
    r"""Sub-variance-preserving: :math:`\alpha` of :class:`VP`, :math:`\sigma = 1 - \alpha^2`.

    Example:
        >>> round(float(SubVP().sigma(torch.tensor(1.0))), 4)
        1.0
    """

    smallest: float = 1e-2

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return super().diffusion(t) * (-torch.expm1(-2 * self._integral(t))).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        # 2 sinh(integral / 2) = sigma / alpha
        return self._when(2 * torch.asinh(0.5 * (-0.5 * log_snr).exp()))


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""The cosine schedule: :math:`\alpha = \cos\big(\tfrac\pi2 \tfrac{t + s}{1 + s}\big) / \cos\big(\tfrac\pi2
    \tfrac{s}{1 + s}\big)`, variance preserving.

    Arguments:
        offset: :math:`s`.
        smallest: the first time.

    Example:
        >>> round(float(Cosine(offset=0.0).alpha(torch.tensor(0.5))), 4)
        0.7071
    """

    offset: float = 0.008
    smallest: float = 1e-3

    @property
    def ends(self) -> tuple[float, float]:
        """From the smallest time to just before 1."""
        return self.smallest, 0.9946  # at 1 the rate is infinite

    def _phase(self, t: Tensor) -> Tensor:
        return (t + self.offset) / (1 + self.offset) * (math.pi / 2)

    @property
    def _first(self) -> float:
        return math.cos(self.offset / (1 + self.offset) * math.pi / 2)

    def alpha(self, t: Tensor) -> Tensor:
        return self._phase(t).cos() / self._first

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).clamp_min(0).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return -self._phase(t).tan() * (math.pi / 2 / (1 + self.offset))

    def diffusion(self, t: Tensor) -> Tensor:
        return (-2 * self.drift(t)).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        phase = (log_snr.sigmoid().sqrt() * self._first).acos()  # alpha^2 = sigmoid(log_snr)
        return phase * (1 + self.offset) / (math.pi / 2) - self.offset


@dataclass(frozen=True)
class VE(Schedule):
    r"""Variance exploding: :math:`\alpha = 1`, :math:`\sigma = \sigma_{\min} (\sigma_{\max} / \sigma_{\min})^t`.

    Arguments:
        sigma_min, sigma_max: noise at times 0 and 1.

    Example:
        >>> VE(0.01, 100.0).sigma(torch.tensor(0.5))
        tensor(1.)
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    ends: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Schedule):
    r"""Noise as time: :math:`\alpha = 1`, :math:`\sigma = t`, sampled at the powers
    :math:`t_i^{1/\rho} = \sigma_{\max}^{1/\rho} + \tfrac in (\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho})`.

    Arguments:
        sigma_min, sigma_max: first and last time.
        rho: power of the grid.

    Example:
        >>> EDM().times(2)[0], EDM().times(2)[2]
        (tensor(80., dtype=torch.float64), tensor(0.0020, dtype=torch.float64))
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def ends(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).exp()

    def times(self, steps: int) -> Tensor:
        ends = [sigma ** (1 / self.rho) for sigma in (self.sigma_max, self.sigma_min)]
        return torch.linspace(*ends, steps + 1, dtype=torch.float64) ** self.rho


@dataclass(frozen=True)
class Rectified(Schedule):
    r"""Straight lines from data to noise: :math:`\alpha = 1 - t`, :math:`\sigma = t`.

    Arguments:
        smallest: the first time; the last is one minus it.

    Example:
        >>> Rectified().angle(torch.tensor(0.5)) / torch.pi
        tensor(0.2500)
    """

    smallest: float = 1e-3

    @property
    def ends(self) -> tuple[float, float]:
        """From the smallest time to one minus it, where the drift is finite."""
        return self.smallest, 1 - self.smallest

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def drift(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t / (1 - t)).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).sigmoid()


def _slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
