r"""Exact sums over the square lattice: the partition function of :math:`L \times L` spins on a torus.

.. math:: Z(\beta, h) = \sum_{s \in \{-1, 1\}^{L \times L}}
          \exp\Bigl(\beta \sum_{\langle i j \rangle} s_i s_j + h \sum_i s_i\Bigr)

Without a field Kaufman's formula is exact for every :math:`L`,

.. math:: Z = \tfrac12 (2 \sinh 2 \beta)^{L^2 / 2} \Bigl[
              \prod_r 2 \cosh \tfrac{L \gamma_{2 r + 1}}{2} + \prod_r 2 \sinh \tfrac{L \gamma_{2 r + 1}}{2}
            + \prod_r 2 \cosh \tfrac{L \gamma_{2 r}}{2} + \prod_r 2 \sinh \tfrac{L \gamma_{2 r}}{2} \Bigr],

.. math:: \cosh \gamma_l = \cosh 2 \beta \coth 2 \beta - \cos \tfrac{\pi l}{L} \quad (l > 0),
          \qquad \gamma_0 = 2 \beta + \log \tanh \beta,

with :math:`r = 0, \dots, L - 1`. With one, the trace of the :math:`L`-th power of the transfer matrix between rows is,
for :math:`L \le 10`. Derivatives of :math:`\log Z` are sums over bonds and spins, on average. A lattice of two rows has
each of its bonds twice.

Reference:
    B. Kaufman, Crystal Statistics. II. Partition Function Evaluated by Spinor Analysis, Physical Review 76 (1949)
    1232-1243.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..foundation.bits import all_bits
from ..foundation.errors import DensityError

__all__ = ["MOST_ROWS", "kaufman", "spin_sums", "transfer"]

MOST_ROWS = 10  # of a transfer matrix


def kaufman(length: int, beta: Tensor) -> Tensor:
    r""":math:`\log Z` without a field, differentiable in the inverse temperature.

    Arguments:
        length: :math:`L`, at least 2.
        beta: a positive scalar.

    Example:
        >>> kaufman(4, torch.tensor(0.4406867935, dtype=torch.float64))
        tensor(15.5219, dtype=torch.float64)
    """
    b = beta.double()
    angle = torch.arange(1, 2 * length, dtype=torch.float64, device=b.device) * (math.pi / length)
    gamma = torch.acosh((2 * b).cosh() / (2 * b).tanh() - angle.cos())
    zero = 2 * b + b.tanh().log()
    odd, even = 0.5 * length * gamma[::2], 0.5 * length * gamma[1::2]
    first = 0.5 * length * zero
    terms = [_log_cosh(odd).sum(), _log_sinh(odd).sum()]
    terms += [_log_cosh(even).sum() + _log_cosh(first), _log_sinh(even).sum() + _log_cosh(first)]
    # the sinh of the zeroth factor has a sign, and is its cosh times a tanh
    weights = torch.stack([torch.ones_like(b), torch.ones_like(b), torch.ones_like(b), first.tanh()])
    logs = torch.stack(terms)
    top = logs.detach().max()
    total = (weights * (logs - top).exp()).sum().log() + top
    return (0.5 * length**2 * (2 * (2 * b).sinh()).log() - math.log(2) + total).to(beta.dtype)


def _log_cosh(x: Tensor) -> Tensor:
    """Logarithm of twice the hyperbolic cosine."""
    return x.abs() + torch.log1p((-2 * x.abs()).exp())


def _log_sinh(x: Tensor) -> Tensor:
    """Logarithm of twice the hyperbolic sine of positive numbers."""
    return x + torch.log(-torch.expm1(-2 * x))


def transfer(length: int, beta: Tensor, field: Tensor) -> Tensor:
    r""":math:`\log Z` in a field, differentiable in both numbers.

    Arguments:
        length: :math:`L`, from 2 to 10.
        beta, field: scalars.

    Raises:
        DensityError: the lattice is too large.

    Example:
        >>> transfer(3, torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
        tensor(6.6697, dtype=torch.float64)
    """
    if length > MOST_ROWS:
        raise DensityError(
            f"length: got {length}, and in a field the partition function is summed up to {MOST_ROWS}; estimate it "
            "(shape.log_normalizer), or take the field away."
        )
    b, h = beta.double(), field.double()
    spins = 2 * all_bits(length, b) - 1
    alone = b * (spins * spins.roll(1, -1)).sum(-1) + h * spins.sum(-1)
    logs = b * (spins @ spins.mT) + 0.5 * (alone[:, None] + alone)
    top = logs.detach().max()
    trace = torch.linalg.matrix_power((logs - top).exp(), length).diagonal().sum()
    return (trace.log() + length * top).to(beta.dtype)


def spin_sums(y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sums over bonds, :math:`\sum_{\langle ij \rangle} s_i s_j`, and over spins, :math:`\sum_i s_i`.

    Arguments:
        y: events ``(rows, L, L)`` of zeros and ones.

    Returns:
        Two of ``(rows,)``.

    Example:
        >>> spin_sums(torch.ones(1, 3, 3))
        (tensor([18.]), tensor([9.]))
    """
    s = 2 * y - 1
    return (s * (s.roll(1, -1) + s.roll(1, -2))).flatten(1).sum(-1), s.flatten(1).sum(-1)
