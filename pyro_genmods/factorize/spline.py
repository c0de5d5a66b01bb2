r"""Spline head: a Gaussian seen through a monotone rational-quadratic spline.

The distribution function is :math:`F(x) = \Phi(z)` with the normal score

.. math:: z = \frac{g(x) - \mu}{\sigma}, \qquad
          g(x) = y_i + h_i \frac{s_i \xi^2 + d_i\, \xi (1 - \xi)}{s_i + (d_i + d_{i+1} - 2 s_i)\, \xi (1 - \xi)},
          \qquad \xi = \frac{x - x_i}{w_i},

inside :math:`[-B, B]`, with widths :math:`w_i`, heights :math:`h_i`, secants :math:`s_i = h_i / w_i` and derivatives
:math:`d_i > 0` at the knots. Outside, :math:`g` goes on along its tangents, so that it is continuously differentiable
everywhere and the tails are Gaussian of learned widths. Inverse and derivative are closed. Zero parameters make
:math:`g` the identity and the law standard normal.

Reference:
    C. Durkan, A. Bekasov, I. Murray, G. Papamakarios, Neural Spline Flows, 2019, arXiv:1906.04032.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..foundation.numerics import log_ndtr
from .conditionals import Conditional, at_least, positive, soft_floor, undo_soft_floor

__all__ = ["Spline"]

LEAST_SHARE, LEAST_SLOPE = 1e-3, 1e-3


class _Bin(NamedTuple):
    """One bin of each entry: where it starts, its width and height, and the derivatives at its ends."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    d0: Tensor
    d1: Tensor


@dataclass(frozen=True)
class Spline(Conditional):
    r"""A Gaussian :math:`\mathcal N(\mu, \sigma^2)` seen through a monotone rational-quadratic spline.

    Tempering multiplies :math:`\sigma` by :math:`\sqrt T`, that is, the Gaussian to the power :math:`1/T`.

    Arguments:
        bins: number of bins of the spline.
        bound: the spline bends in ``[-bound, bound]`` and is straight outside.

    Shape:
        parameters ``(..., 3 bins + 3)``: widths, heights, derivatives at the ``bins + 1`` knots, mean and log scale of
        the Gaussian; values ``(...)``.

    Raises:
        ValueError: no bin, a bound or a temperature that is not positive.

    Example:
        >>> head = Spline(8)
        >>> x = torch.tensor([-7.0, 0.3, 2.0])
        >>> torch.allclose(head.normal_score(torch.zeros(head.size), x), x, atol=1e-6)
        True
        >>> parameters = torch.randn(head.size)
        >>> torch.allclose(head.quantile(parameters, head.normal_score(parameters, x)), x, atol=1e-4)
        True
    """

    FLOOR: ClassVar[float] = -9.0
    bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        at_least("bins", self.bins, 1)
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound: got {self.bound}, needs a positive finite number, a few standard deviations.")

    @property
    def size(self) -> int:
        return 3 * self.bins + 3

    def _gaussian(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log scale of the base."""
        return parameters[..., -2], soft_floor(parameters[..., -1], self.FLOOR)

    def _knots(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The six numbers of every bin, ``(..., 6, bins)``, and the left ends and bottoms again, ``(..., 2, bins)``."""
        n = self.bins
        shares = parameters[..., : 2 * n].unflatten(-1, (2, n)).softmax(-1)
        sides = 2 * self.bound * (LEAST_SHARE / n + (1 - LEAST_SHARE) * shares)
        starts = sides.cumsum(-1) - sides - self.bound
        slopes = LEAST_SLOPE + (1 - LEAST_SLOPE) / math.log(2) * softplus(parameters[..., 2 * n : 3 * n + 1])
        left, bottom, width, height = *starts.unbind(-2), *sides.unbind(-2)
        return torch.stack([left, width, bottom, height, slopes[..., :-1], slopes[..., 1:]], -2), starts

    def _find(self, parameters: Tensor, value: Tensor, axis: int) -> _Bin:
        """The bins that hold values of ``x`` (axis 0) or of ``g`` (axis 1)."""
        table, starts = self._knots(parameters)
        index = (value[..., None] >= starts[..., axis, 1:]).sum(-1)
        shape = (*index.shape, 6, 1)
        table = table.expand(*index.shape, 6, self.bins)
        return _Bin(*table.gather(-1, index[..., None, None].expand(shape))[..., 0].unbind(-1))

    def _spline(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`g(x)` and :math:`\log g'(x)`."""
        inside = x.clamp(-self.bound, self.bound)
        b = self._find(parameters, inside, 0)
        xi = ((inside - b.left) / b.width).clamp(0, 1)
        product, secant = xi * (1 - xi), b.height / b.width
        denominator = secant + (b.d0 + b.d1 - 2 * secant) * product
        y = b.bottom + b.height * (secant * xi.square() + b.d0 * product) / denominator
        numerator = b.d1 * xi.square() + 2 * secant * product + b.d0 * (1 - xi).square()
        slope = secant.square() * numerator / denominator.square()
        return y + torch.where(x < 0, b.d0, b.d1) * (x - inside), slope.log()

    def normal_score(self, parameters: Tensor, x: Tensor) -> Tensor:
        mu, log_sigma = self._gaussian(parameters)
        return (self._spline(parameters, x)[0] - mu) * torch.exp(-log_sigma)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        mu, log_sigma = self._gaussian(parameters)
        y, log_slope = self._spline(parameters, x)
        z = (y - mu) * torch.exp(-log_sigma)
        return log_slope - log_sigma - 0.5 * z.square() - 0.5 * math.log(2 * math.pi)

    def log_cdf(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.normal_score(parameters, x)
        return log_ndtr(z), log_ndtr(-z)

    def quantile(self, parameters: Tensor, z: Tensor) -> Tensor:
        parameters = parameters.detach()
        mu, log_sigma = self._gaussian(parameters)
        y = mu + log_sigma.exp() * z.detach()
        inside = y.clamp(-self.bound, self.bound)
        b = self._find(parameters, inside, 1)
        secant, rise = b.height / b.width, (inside - b.bottom).clamp_min(0)
        bend = rise * (b.d0 + b.d1 - 2 * secant)
        p, q, r = b.height * (secant - b.d0) + bend, b.height * b.d0 - bend, -secant * rise
        root = (q.square() - 4 * p * r).clamp_min(0).sqrt()
        xi = (-2 * r / (q + root)).clamp(0, 1)
        return b.left + xi * b.width + (y - inside) / torch.where(y < 0, b.d0, b.d1)

    def tempered(self, parameters: Tensor, temperature: float) -> Tensor:
        mu, log_sigma = self._gaussian(parameters)
        log_sigma = undo_soft_floor(log_sigma + 0.5 * math.log(positive(temperature)), self.FLOOR)
        return torch.cat([parameters[..., :-2], mu[..., None], log_sigma[..., None]], -1)

    def start(self) -> tuple[float, ...]:
        return (0.0,) * self.size
