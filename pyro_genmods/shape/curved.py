r"""References that are curved: a Gaussian coordinate, and others that are Gaussian given it.

.. math:: x \sim \mathcal N(\mu, \tau^2), \qquad y_i \mid x \sim \mathcal N\bigl(m(x), s(x)^2\bigr)

Such laws are drawn in two steps, and their constants are those of the two Gaussians.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..foundation.shapes import Context, Rows, Values
from .references import LOG_2PI, Reference, _noise

__all__ = ["Banana", "Funnel", "Rosenbrock"]


class Banana(Reference):
    r"""A bent Gaussian in the plane (Haario, Saksman and Tamminen).

    .. math:: E(x, y) = \frac{x^2}{2 \tau^2} + \tfrac12 \bigl(y - \beta (x^2 - \tau^2)\bigr)^2,
              \qquad \log Z = \log 2 \pi \tau

    Arguments:
        bend: :math:`\beta`.
        scale: :math:`\tau`, standard deviation of the first feature.
        normalized: make ``log_prob`` exact.

    Raises:
        ValueError: a scale that is not positive.

    Example:
        >>> law = Banana()
        >>> round(law.exact_log_normalizer, 4), law.mean, law.variance
        (4.1405, tensor([0., 0.]), tensor([100.,  19.]))
    """

    def __init__(self, bend: float = 0.03, scale: float = 10.0, normalized: bool = False) -> None:
        _check_positive("scale", scale)
        network = Parabola(0.0, scale, (-bend * scale**2, bend), 1.0)
        moments = torch.zeros(2), torch.tensor([scale**2, 1 + 2 * bend**2 * scale**4], dtype=torch.float64)
        super().__init__(network, LOG_2PI + math.log(scale), moments, normalized)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        return self.network.push(_noise(self, rows))


class Rosenbrock(Reference):
    r"""Rosenbrock's valley in the plane, as a law.

    .. math:: E(x, y) = \frac{100\, (y - x^2)^2 + (1 - x)^2}{20}, \qquad \log Z = \log 2 \pi

    Arguments:
        normalized: make ``log_prob`` exact.

    Example:
        >>> law = Rosenbrock()
        >>> round(law.exact_log_normalizer, 4), law.mean, law.variance
        (1.8379, tensor([ 1., 11.]), tensor([ 10.0000, 240.1000]))
    """

    def __init__(self, normalized: bool = False) -> None:
        network = Parabola(1.0, math.sqrt(10), (0.0, 1.0), math.sqrt(0.1))
        moments = torch.tensor([1.0, 11.0]), torch.tensor([10.0, 240.1], dtype=torch.float64)
        super().__init__(network, LOG_2PI, moments, normalized)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        return self.network.push(_noise(self, rows))


class Parabola(nn.Module):
    r"""The energy of :math:`x \sim \mathcal N(\mu, \tau^2)`, :math:`y \sim \mathcal N(p + q x^2, s^2)`.

    Arguments:
        location, scale: :math:`\mu` and :math:`\tau`.
        bend: :math:`p` and :math:`q`.
        width: :math:`s`.

    Example:
        >>> Parabola(0.0, 1.0, (0.0, 1.0), 1.0)(torch.tensor([[1.0, 1.0]]))
        tensor([0.5000])
    """

    def __init__(self, location: float, scale: float, bend: tuple[float, float], width: float) -> None:
        super().__init__()
        self.location, self.scale, self.bend, self.width = location, scale, bend, width

    def forward(self, rows: Rows) -> Values:
        x, y = rows.unbind(-1)
        first, second = (x - self.location) / self.scale, (y - self._ridge(x)) / self.width
        return 0.5 * (first.square() + second.square())

    def push(self, z: Rows) -> Rows:
        """Standard normal rows to draws."""
        x = self.location + self.scale * z[:, 0]
        return torch.stack([x, self._ridge(x) + self.width * z[:, 1]], -1)

    def _ridge(self, x: Tensor) -> Tensor:
        return self.bend[0] + self.bend[1] * x.square()


class Funnel(Reference):
    r"""Neal's funnel: the first feature is the logarithm of the variance of all others.

    .. math:: v \sim \mathcal N(0, \tau^2), \qquad x_i \mid v \sim \mathcal N(0, e^v), \qquad
              \log Z = \tfrac d2 \log 2 \pi + \log \tau

    Its neck has volume :math:`e^{(d - 1) v / 2}`, and no step size serves both ends.

    Arguments:
        features: :math:`d`, that of :math:`v` included.
        scale: :math:`\tau`.
        normalized: make ``log_prob`` exact.

    Raises:
        ValueError: fewer than two features, or a scale that is not positive.

    References:
        R. M. Neal, Slice Sampling, The Annals of Statistics 31 (2003) 705-767.

    Example:
        >>> law = Funnel(10)
        >>> round(law.exact_log_normalizer, 5), law.variance[:2]
        (10.288, tensor([ 9.0000, 90.0171]))
    """

    def __init__(self, features: int = 10, scale: float = 3.0, normalized: bool = False) -> None:
        _check_positive("scale", scale)
        if features < 2:
            raise ValueError(f"features: got {features}, needs at least 2.")
        variance = torch.full((features,), math.exp(scale**2 / 2), dtype=torch.float64)
        variance[0] = scale**2
        log_normalizer = 0.5 * features * LOG_2PI + math.log(scale)
        super().__init__(Neck(scale), log_normalizer, (torch.zeros(features), variance), normalized)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        z = _noise(self, rows)
        v = self.network.scale * z[:, :1]
        return torch.cat([v, (0.5 * v).exp() * z[:, 1:]], -1)


class Neck(nn.Module):
    r"""The energy :math:`v^2 / 2 \tau^2 + \sum_i (x_i^2 e^{-v} + v) / 2`.

    Arguments:
        scale: :math:`\tau`.

    Example:
        >>> Neck(3.0)(torch.tensor([[0.0, 1.0, 1.0]]))
        tensor([1.])
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = float(scale)

    def forward(self, rows: Rows) -> Values:
        v, x = rows[:, 0], rows[:, 1:]
        return 0.5 * ((v / self.scale).square() + x.square().sum(-1) * (-v).exp() + x.shape[-1] * v)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: got {value}, needs a positive number.")
