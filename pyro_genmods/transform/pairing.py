r"""Pairs of noise and data at the least total squared distance: optimal transport between the points of a batch.

Reference:
    A. Tong et al., Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport, 2023,
    arXiv:2302.00482.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["optimal_pairing"]


def optimal_pairing(z: Tensor, x: Tensor) -> Tensor:
    """The order of noise that pairs it with data at the least sum of squared distances.

    Arguments:
        z, x: ``(rows, n)`` each.

    Returns:
        ``(rows,)``; ``z[order]`` belongs to ``x``.

    Example:
        >>> optimal_pairing(torch.tensor([[0.0], [5.0], [9.0]]), torch.tensor([[8.0], [1.0], [4.0]]))
        tensor([2, 0, 1])
    """
    with torch.no_grad():
        cost = torch.cdist(z, x).square()  # the search is faster with the noise as rows than with the data
    _, places = linear_sum_assignment(cost.cpu().double().numpy())
    return torch.as_tensor(places.argsort(), device=z.device)
