r"""Modes of data, and how often chains are in each.

Events belong to the nearest of several centres. Where none are given they are looked for in the data: clusters by
Lloyd's algorithm, in a number that makes the mean *silhouette* largest,

.. math:: \frac{b - a}{\max(a, b)},

with :math:`a` the mean distance of a point to its own cluster and :math:`b` to the nearest other one. A law of one
mode, cut in pieces, stays below about 0.65; only what is above 0.7 is called modes, and of at least a fiftieth of the
data each. In many dimensions distances tell little, and modes are better given.

Reference:
    P. J. Rousseeuw, Silhouettes: A graphical aid to the interpretation and validation of cluster analysis, Journal of
    Computational and Applied Mathematics 20 (1987) 53-65.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..foundation.shapes import Rows

__all__ = ["find_modes", "nearest"]

MOST_ROWS = 1000  # between which distances are taken
SWEEPS, STARTS = 20, 4
LEAST_SILHOUETTE, LEAST_SHARE = 0.7, 0.02


def nearest(y: Tensor, centres: Tensor) -> Tensor:
    """Number of the nearest centre of each row.

    Arguments:
        y: ``(rows, features)``.
        centres: ``(modes, features)``.

    Example:
        >>> nearest(torch.tensor([[-3.0], [2.0]]), torch.tensor([[-4.0], [4.0]]))
        tensor([0, 1])
    """
    return torch.cdist(y, centres).argmin(1)


def find_modes(y: Rows, most: int = 12) -> Tensor | None:
    """Centres of clusters that lie apart, or ``None`` where there are none.

    Arguments:
        y: rows of data.
        most: clusters that are looked for.

    Returns:
        ``(modes, features)``, at least two.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> y = torch.randn(300, 1, generator=generator)
        >>> find_modes(y) is None
        True
        >>> find_modes(y + 10 * (y > 0)).sort(0).values.round()
        tensor([[-1.],
                [11.]])
    """
    dtype = y.dtype
    y = y[torch.linspace(0, len(y) - 1, min(len(y), MOST_ROWS), device=y.device).long()].double()
    distances = torch.cdist(y, y)
    best, found = LEAST_SILHOUETTE, None
    for k in range(2, min(most, len(y) // 4) + 1):
        centres = _clusters(y, distances, k)
        value = _silhouette(distances, nearest(y, centres), k)
        if value > best:
            best, found = value, centres.to(dtype)
    return found


def _clusters(y: Tensor, distances: Tensor, k: int) -> Tensor:
    """Lloyd's algorithm from several starts, in which every centre is the row farthest from the others."""
    tries = []
    for first in torch.linspace(0, len(y) - 1, STARTS).long().tolist():
        chosen = [first]
        for _ in range(k - 1):
            chosen.append(int(distances[chosen].min(0).values.argmax()))
        centres = y[chosen]
        for _ in range(SWEEPS):
            member = torch.nn.functional.one_hot(nearest(y, centres), k).to(y)
            count = member.sum(0)[:, None]
            centres = torch.where(count > 0, member.T @ y / count.clamp_min(1), centres)
        tries.append((float(torch.cdist(y, centres).min(1).values.square().sum()), centres))
    return min(tries, key=lambda found: found[0])[1]


def _silhouette(distances: Tensor, which: Tensor, k: int) -> float:
    member = torch.nn.functional.one_hot(which, k).to(distances)
    count = member.sum(0)
    if float(count.min()) < max(2.0, LEAST_SHARE * len(which)):
        return -1.0
    own = member.bool()
    mean = distances @ member / (count - member)  # a row is not its own neighbour
    a, b = mean[own], mean.masked_fill(own, torch.inf).min(1).values
    return float(((b - a) / torch.maximum(a, b).clamp_min(1e-300)).mean())
