r"""A smooth function through a few noisy values, and how far it is off where it was not told.

.. math:: f(c) = \beta_0 + \beta^\top c + \sum_i \alpha_i\, k(c, c_i), \qquad
          k(c, c') = s^2 e^{-|c - c'|^2 / 2 \ell^2}

is the mean of a Gaussian process with a linear trend, given values :math:`v_i` with known variances. With the kernel
matrix :math:`K` (noise included), the trend's columns :math:`F` and

.. math:: Q = K^{-1} - K^{-1} F (F^\top K^{-1} F)^{-1} F^\top K^{-1}

the weights are :math:`\alpha = Q v`, and what a value differs by from the function that is fitted without it is
:math:`(Q v)_i / Q_{ii}`. Length :math:`\ell` and height :math:`s` are those for which these differences are least. Far
from all points only the trend is left.

Reference:
    O. Dubrule, Cross Validation of Kriging in a Unique Neighborhood, 1983, Mathematical Geology 15(6).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import ShapeError

__all__ = ["Interpolation"]

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # in median distances between points
HEIGHTS = (0.3, 1.0, 3.0, 10.0)  # in standard deviations of what the trend leaves
LEAST_NOISE = 1e-2  # relative to the height; weights then keep their digits in single precision


class Interpolation(nn.Module):
    r"""A smooth function of rows, differentiable, and saved like any module.

    Arguments:
        points: how many values it goes through.
        features: columns of a point.

    Attributes:
        error: root mean square of what values differ by from the function fitted without them.

    Shape:
        ``(rows, features)`` to ``(rows,)``.

    Example:
        >>> c = torch.linspace(-2, 2, 12)[:, None]
        >>> f = Interpolation(12, 1).fit_(c, c[:, 0].sin(), torch.full((12,), 1e-6))
        >>> bool((f(torch.tensor([[0.5], [1.1]])) - torch.tensor([0.5, 1.1]).sin()).abs().max() < 0.02), f.error < 0.05
        (True, True)
    """

    def __init__(self, points: int, features: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(points, features))
        self.register_buffer("weights", torch.zeros(points))
        self.register_buffer("trend", torch.zeros(features + 1))
        self.register_buffer("length", torch.ones(()))
        self.register_buffer("root_mean_square", torch.full((), math.inf))

    @property
    def error(self) -> float:
        """Root mean square of what values differ by from the function fitted without them."""
        return float(self.root_mean_square)

    def fit_(self, centres: Tensor, values: Tensor, variances: Tensor) -> Interpolation:
        """Go through values.

        Arguments:
            centres: points ``(points, features)``.
            values, variances: at the points, and of the errors in them, ``(points,)``.

        Raises:
            ShapeError: see :meth:`columns_of`.
        """
        columns = self.columns_of(centres)
        centres, values, variances = centres.double(), values.double(), variances.double()
        square = (centres[:, None] - centres).square().sum(-1)
        middle = square[square > 0].median().sqrt()
        rest = (values - columns @ torch.linalg.lstsq(columns, values[:, None]).solution[:, 0]).std().clamp_min(1e-6)
        best = math.inf
        for length in (float(middle) * scale for scale in LENGTHS):
            for height in (float(rest) * scale for scale in HEIGHTS):
                kernel = height**2 * (-square / (2 * length**2)).exp()
                noise = (variances + (LEAST_NOISE * height) ** 2).diag()
                weights, trend, left_out = _solved(kernel + noise, columns, values)
                error = float(left_out.square().mean().sqrt())
                if error < best:
                    best = error
                    self._take(centres, height**2 * weights, trend, length, error)
        return self

    @staticmethod
    def columns_of(centres: Tensor) -> Tensor:
        """What the trend is made of, at points.

        Raises:
            ShapeError: too few points for a trend, or points in a plane.
        """
        n, d = centres.shape
        columns = torch.cat([torch.ones_like(centres[:, :1]), centres], 1).double()
        if n < d + 3 or int(torch.linalg.matrix_rank(columns)) < d + 1:
            raise ShapeError(
                f"contexts: got {n} with {d} feature(s), needs at least {d + 3} that do not lie in a plane; give more."
            )
        return columns

    def _take(self, centres: Tensor, weights: Tensor, trend: Tensor, length: float, error: float) -> None:
        self.centres.copy_(centres)
        self.weights.copy_(weights)
        self.trend.copy_(trend)
        self.length.fill_(length)
        self.root_mean_square.fill_(error)

    def forward(self, c: Tensor) -> Tensor:
        square = (c[:, None] - self.centres).square().sum(-1)
        bumps = (-square / (2 * self.length**2)).exp() @ self.weights
        return self.trend[0] + c @ self.trend[1:] + bumps


def _solved(matrix: Tensor, columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, trend, and what each value differs by from the function without it."""
    factor = torch.linalg.cholesky(matrix)
    inverse = torch.cholesky_inverse(factor)
    pulled = inverse @ columns
    gram = torch.linalg.inv(columns.mT @ pulled)
    rest = inverse - pulled @ gram @ pulled.mT
    weights = rest @ values
    return weights, gram @ (pulled.mT @ values), weights / rest.diagonal()
