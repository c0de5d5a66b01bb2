r"""Whitening: the linear map that makes the covariance of data the identity.

.. math:: w = L^{-1} (y - m), \qquad L L^\top = C = (1 - \lambda)\, S + \lambda \operatorname{diag} S

with the sample mean :math:`m` and covariance :math:`S`, whose correlations are shrunk towards zero. The intensity
:math:`\lambda` is the one that minimises the expected squared error,

.. math:: \lambda = \min\Big(1, \sum_{i \ne j} \widehat{\operatorname{Var}}(r_{ij}) \Big/ \sum_{i \ne j} r_{ij}^2 \Big),

about one over the number of rows where they are many, and near one where they are few: a covariance of more columns
than rows would be singular, and its whitening would blow up noise.

Reference:
    J. Schaefer, K. Strimmer, A Shrinkage Approach to Large-Scale Covariance Matrix Estimation and Implications for
    Functional Genomics, Statistical Applications in Genetics and Molecular Biology 4(1), 2005.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import DataError

__all__ = ["Whitening", "shrunk_covariance"]

SINGULAR = 1e-10  # smallest eigenvalue of a correlation matrix of many rows that is not rounding error


class Whitening(nn.Module):
    r"""The map :math:`w = L^{-1} (y - m)`, the identity until it is told otherwise.

    Arguments:
        features: number of columns.

    Shape:
        ``(rows, features)`` in and out.

    Example:
        >>> whitening = Whitening(2)
        >>> whitening.set_moments(torch.tensor([1.0, 0.0]), torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        >>> whitening(torch.tensor([[3.0, 1.0]])), round(float(whitening.log_scale()), 3)     # log of sqrt(4)
        (tensor([[1., 0.]]), 0.693)
        >>> whitening.inverse(torch.tensor([[1.0, 0.0]]))
        tensor([[3., 1.]])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("factor", torch.eye(features))
        self.register_buffer("inverse_factor", torch.eye(features), persistent=False)
        self.active = False

    def fit_(self, y: Tensor) -> None:
        """Take mean and covariance, shrunk, of rows.

        Raises:
            DataError: columns are linear functions of each other, so that there is no density.
        """
        y = y.detach().double()
        self.set_moments(y.mean(0), shrunk_covariance(y))

    def set_moments(self, mean: Tensor, covariance: Tensor) -> None:
        """Take a mean ``(features,)`` and a covariance ``(features, features)``."""
        factor = torch.linalg.cholesky(covariance.double())
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self.mean.copy_(mean)
        self.factor.copy_(factor)
        self.inverse_factor.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))
        self.active = True

    def forward(self, y: Tensor) -> Tensor:
        return (y - self.mean) @ self.inverse_factor.mT if self.active else y

    def inverse(self, w: Tensor) -> Tensor:
        """From white rows to rows."""
        return torch.addmm(self.mean, w, self.factor.mT) if self.active else w

    def log_scale(self) -> Tensor | float:
        """Log-volume of the inverse map."""
        return self.factor.diagonal().log().sum() if self.active else 0.0

    def gradient(self, g: Tensor) -> Tensor:
        """Gradients with respect to white rows as gradients with respect to rows."""
        return g @ self.inverse_factor if self.active else g

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        eye = torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        self.active = bool((self.mean != 0).any() or (self.factor != eye).any())
        self.inverse_factor.copy_(torch.linalg.solve_triangular(self.factor, eye, upper=False))


def shrunk_covariance(y: Tensor) -> Tensor:
    """Sample covariance with correlations shrunk towards zero, see the module.

    Arguments:
        y: ``(rows, n)``, at least 2 rows.

    Returns:
        ``(n, n)``, positive definite.

    Raises:
        DataError: a column is constant, or, with more rows than columns, columns are collinear.

    Example:
        >>> y = torch.randn(4, 10, dtype=torch.float64)      # fewer rows than columns
        >>> bool((torch.linalg.eigvalsh(shrunk_covariance(y)) > 0.01).all())
        True
    """
    n, d = y.shape
    centred = y - y.mean(0)
    sd = centred.square().mean(0).sqrt()
    constant = (sd == 0).nonzero().flatten().tolist()
    if n < 2 or constant:
        raise DataError(f"column(s) {constant[:8]} of the {n} row(s) are constant: their density is a point mass.")
    z = centred / sd
    correlation = z.mT @ z / n
    if n > d:
        _check_rank(correlation)
    squares = z.square()
    variance = (squares.mT @ squares / n - correlation.square()) / (n - 1)
    off = ~torch.eye(d, dtype=torch.bool, device=y.device)
    total = correlation[off].square().sum()
    amount = float((variance[off].sum() / total).clamp(0, 1)) if float(total) > 0 else 0.0
    shrunk = correlation * (1 - amount)
    shrunk.diagonal().fill_(1.0)
    return shrunk * sd[:, None] * sd


def _check_rank(correlation: Tensor) -> None:
    values, vectors = torch.linalg.eigh(correlation)
    if float(values[0]) < SINGULAR * len(values):
        weights = vectors[:, 0].abs()
        columns = (weights > 0.1 * weights.max()).nonzero().flatten().tolist()
        raise DataError(
            f"columns {columns[:8]} of the data are collinear (smallest eigenvalue of the correlations "
            f"{float(values[0]):.1g}): the density is that of a surface. Drop one of them, add noise of the size of "
            "the measurement error, or give the model the support that the data have (a simplex)."
        )
