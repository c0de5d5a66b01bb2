r"""Can importance weights be trusted? The shape of their tail.

The largest of many weights are about generalised Pareto, with density :math:`\propto (1 + k y)^{-1 - 1/k}` in units of
their own. Weights with shape :math:`k` have :math:`1 / k` finite moments: below 0.5 the central limit theorem holds,
above 0.7 an average of any affordable number of weights is not near its expectation, and its own standard error does
not see it.

References:
    A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, Pareto Smoothed Importance Sampling, 2024, arXiv:1507.02646.
    J. Zhang, M. A. Stephens, A New and Efficient Estimation Method for the Generalized Pareto Distribution, 2009,
    Technometrics 51(3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["TRUSTED", "pareto_shape"]

TRUSTED = 0.7
LEAST = 5  # weights in the tail of which a shape can be told


def pareto_shape(log_weights: Tensor) -> Tensor:
    r"""Shape :math:`\hat k` of the tail of weights.

    Arguments:
        log_weights: in nats, up to a constant, ``(*groups, n)``.

    Returns:
        ``groups``, in float64: infinity where the tail has too few different weights to tell, minus infinity where all
        weights are equal; the same number as ``arviz.psislw`` gives.

    Example:
        >>> u = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
        >>> [bool(pareto_shape(-k * u.log()) < TRUSTED) for k in (0.2, 0.5, 1.0)]           # weights u^(-k)
        [True, True, False]
    """
    flat = log_weights.double().reshape(-1, log_weights.shape[-1])
    return torch.stack([_shape(row) for row in flat]).reshape(log_weights.shape[:-1])


def _shape(row: Tensor) -> Tensor:
    n = len(row)
    size = math.ceil(min(0.2 * n, 3 * math.sqrt(n)))
    ordered = (row - row.max()).sort().values
    if bool(ordered[0] == ordered[-1]):
        return ordered.new_tensor(-math.inf)
    if size < LEAST or n <= size:
        return ordered.new_tensor(math.inf)
    cutoff = ordered[-size - 1].clamp_min(math.log(torch.finfo(torch.float64).tiny))
    tail = ordered[ordered > cutoff]
    if len(tail) < LEAST:
        return ordered.new_tensor(math.inf)
    return _fitted(tail.exp() - cutoff.exp())


def _fitted(x: Tensor) -> Tensor:
    """Zhang and Stephens' estimate for excesses in increasing order, drawn a little towards one half."""
    n = len(x)
    count = 30 + math.isqrt(n)
    grid = torch.arange(1, count + 1, dtype=x.dtype, device=x.device) - 0.5
    b = (1 - (count / grid).sqrt()) / (3 * x[int(n / 4 + 0.5) - 1]) + 1 / x[-1]
    shapes = torch.log1p(-b[:, None] * x).mean(1)
    profile = n * ((-b / shapes).log() - shapes - 1)
    weights = profile.softmax(0)
    weights = torch.where(weights >= 10 * torch.finfo(torch.float64).eps, weights, 0.0)
    k = torch.log1p(-(weights * b).sum() / weights.sum() * x).mean()
    return (n * k + 10 * 0.5) / (n + 10)
