r"""Student mixtures: heavy tails, with one to four degrees of freedom, in closed form and in logarithms.

Let :math:`r = \sqrt{\nu + t^2}` and :math:`d = 1 - |t|/r = \nu / (r (r + |t|))`, which loses nothing in the tail. The
tail probability :math:`S = P(X > |t|)` and its inverse are

==========  ====================================================  ==================================================
:math:`\nu` :math:`S`                                             :math:`|t|`
==========  ====================================================  ==================================================
1           :math:`\operatorname{arccot}(|t|) / \pi`              :math:`\cot \pi S`
2           :math:`d / 2`                                         :math:`(1 - 2S) / \sqrt{2 S (1 - S)}`
3           :math:`(\phi - \sin\phi) / 2\pi`,                     :math:`\sqrt 3 \cot(\phi / 2)`, with
            :math:`\phi = 2 \operatorname{arccot}(|t|/\sqrt 3)`   Kepler's equation :math:`\phi - \sin\phi = 2 \pi S`
4           :math:`d^2 (3 - d) / 4`                               :math:`2 (1 - d) / \sqrt{d (2 - d)}`, with
                                                                  :math:`d = 2\sin^2(\delta/2) + \sqrt 3 \sin\delta`,
                                                                  :math:`\delta = \tfrac23 \arcsin\sqrt S`
==========  ====================================================  ==================================================

Kepler's equation is solved by Newton's method from the series of its inverse in :math:`(12 \pi S)^{1/3}`.

Reference:
    W. T. Shaw, Sampling Student's T distribution: use of the inverse cumulative distribution function, Journal of
    Computational Finance 9 (2006) 37-73.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..foundation.numerics import log_ndtr
from .mixtures import Mixture

__all__ = ["StudentMixture", "log_cdf", "log_density", "quantile"]

UPPER_QUARTILES = {1: 1.0, 2: math.sqrt(2 / 3), 3: 0.7648923284043531, 4: 0.7406970841020194}


@dataclass(frozen=True)
class StudentMixture(Mixture):
    r"""Mixture of :math:`k` Student laws with :math:`\nu` degrees of freedom, with tails :math:`|x|^{-\nu - 1}`.

    Tempering divides the logits by :math:`T` and multiplies the scales by :math:`T`; the tails keep their power. A
    network sees :math:`\operatorname{asinh} x`, since one draw may be a thousand times another.

    Arguments:
        k: number of components.
        degrees_of_freedom: 1 (Cauchy), 2, 3 or 4.

    Shape:
        parameters ``(..., 3 k)``: logits of the weights, means, logarithms of the scales; values ``(...)``.

    Raises:
        ValueError: ``k`` is less than one, the degrees of freedom are not offered, or a temperature is not positive.

    Example:
        >>> head = StudentMixture(1, degrees_of_freedom=1)
        >>> head.cdf(torch.zeros(3), torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.7500])
    """

    degrees_of_freedom: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degrees_of_freedom not in tuple(UPPER_QUARTILES):
            raise ValueError(
                f"degrees_of_freedom: got {self.degrees_of_freedom!r}, needs one of {tuple(UPPER_QUARTILES)}; "
                "lighter tails are those of LogisticMixture."
            )

    @property
    def unit(self) -> float:
        return NormalDist().inv_cdf(0.75) / UPPER_QUARTILES[self.degrees_of_freedom]

    def standard_log_density(self, t: Tensor) -> Tensor:
        return log_density(t, self.degrees_of_freedom)

    def standard_log_cdf(self, t: Tensor) -> Tensor:
        return log_cdf(t, self.degrees_of_freedom)

    def standard_quantile(self, z: Tensor) -> Tensor:
        return quantile(z, self.degrees_of_freedom)

    def embed(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return super().embed(x, dtype).asinh()


def log_density(t: Tensor, nu: int) -> Tensor:
    r"""Log density :math:`\log c - (\nu+1) \log(r / \sqrt\nu)`."""
    constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
    ratio = t / math.sqrt(nu)
    return constant - (nu + 1) * torch.hypot(ratio, torch.ones_like(ratio)).log()  # a square would overflow


def log_cdf(t: Tensor, nu: int) -> Tensor:
    """Log distribution function, accurate to rounding for negative ``t``."""
    if nu == 1:
        return (torch.atan2(torch.ones_like(t), -t) / math.pi).log()
    tail = _log_tail(t.abs(), nu)
    return torch.where(t < 0, tail, torch.log1p(-tail.exp()))


def _log_tail(a: Tensor, nu: int) -> Tensor:
    r""":math:`\log P(X > a)` for :math:`a \ge 0` and two to four degrees of freedom."""
    if nu == 3:
        phi = 2 * torch.atan2(torch.full_like(a, math.sqrt(3)), a)
        return 3 * phi.log() + _kepler(phi).log() - math.log(2 * math.pi)
    r = torch.hypot(a, torch.full_like(a, math.sqrt(nu)))
    log_d = math.log(nu) - r.log() - (r + a).log()
    return log_d - math.log(2) if nu == 2 else 2 * log_d + torch.log(3 - log_d.exp()) - math.log(4)


def _kepler(phi: Tensor) -> Tensor:
    r""":math:`(\phi - \sin\phi) / \phi^3`, by its series where the difference cancels."""
    square = phi.square().clamp(max=1)
    series = torch.ones_like(phi)
    for n in range(16, 3, -2):
        series = 1 - series * square / (n * (n + 1))
    large = phi.clamp_min(1)
    return torch.where(phi < 1, series / 6, (large - large.sin()) / large**3)


def quantile(z: Tensor, nu: int) -> Tensor:
    """Quantile at normal scores, for ``|z| <= 12`` in single precision and ``37`` in double."""
    s = log_ndtr(-z.abs()).exp()
    return torch.sign(z) * _inverse_tail(s, nu)


def _inverse_tail(s: Tensor, nu: int) -> Tensor:
    """The ``a`` with ``P(X > a) = s``, for ``0 < s <= 1/2``."""
    if nu == 1:
        return 1 / torch.tan(math.pi * s)
    if nu == 2:
        return (1 - 2 * s) / (2 * s * (1 - s)).sqrt()
    if nu == 3:
        return math.sqrt(3) / torch.tan(_solve_kepler(2 * math.pi * s) / 2)
    delta = 2 / 3 * torch.asin(s.sqrt())
    d = 2 * torch.sin(delta / 2).square() + math.sqrt(3) * torch.sin(delta)
    return 2 * (1 - d) / (d * (2 - d)).sqrt()


def _solve_kepler(m: Tensor) -> Tensor:
    r"""The :math:`\phi` in :math:`(0, \pi]` with :math:`\phi - \sin\phi = m`."""
    y = (6 * m) ** (1 / 3)
    phi = y * (1 + y.square() / 60 * (1 + 3 / 70 * y.square()))
    for _ in range(3):
        phi = phi - (phi**3 * _kepler(phi) - m) / (2 * torch.sin(phi / 2).square())
    return phi
