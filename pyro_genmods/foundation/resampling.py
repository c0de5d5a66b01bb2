r"""Resampling of weighted particles: what their weights are worth, and a fair exchange of weights for copies.

The effective number of particles with weights :math:`w_i` is :math:`(\sum w_i)^2 / \sum w_i^2`. Systematic resampling
puts :math:`n` points on the unit interval, a distance :math:`1/n` apart, with one uniform offset for all of them; a
particle is copied as often as points fall into its share of the interval, so its number of copies is never further than
one from :math:`n w_i / \sum w`.

Reference:
    R. Douc, O. Cappe, E. Moulines, Comparison of Resampling Schemes for Particle Filtering, 2005, arXiv:cs/0507025.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import SamplingError, ShapeError

__all__ = ["ancestor_rows", "effective_sample_size", "systematic"]


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Effective number of particles, ``(*groups, n)`` to ``(*groups,)``; zero where no weight is left.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf]]))
        tensor([4., 2.])
    """
    top = log_weights.amax(-1, keepdim=True)
    weights = torch.where(top > -torch.inf, (log_weights - top).exp(), 0)
    return weights.sum(-1).square() / weights.square().sum(-1).clamp_min(1e-30)


def systematic(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Particle numbers ``(*groups, n)`` for weights ``(*groups, n)``, increasing; each group for itself.

    Arguments:
        log_weights: unnormalised, in nats; minus infinity for what must not survive.
        generator: of the one uniform number of each group.

    Raises:
        SamplingError: a group has no weight left, or weights are NaN.

    Example:
        >>> systematic(torch.tensor([0.0, -torch.inf, 0.0, -torch.inf]))
        tensor([0, 0, 2, 2])
    """
    log_weights = log_weights.double()
    top = log_weights.amax(-1, keepdim=True)
    if not bool(top.isfinite().all()):
        lost = int((~top.isfinite()).sum())
        raise SamplingError(
            f"log_weights: in {lost} of {top.numel()} group(s) none of {log_weights.shape[-1]} particles has a weight "
            "that is a finite number; all of them are impossible, or their weights are NaN."
        )
    reached = (log_weights - top).exp().cumsum(-1)
    reached = reached / reached[..., -1:]
    n = log_weights.shape[-1]
    offset = torch.empty_like(top).uniform_(generator=generator)
    points = (torch.arange(n, dtype=torch.float64, device=top.device) + offset) / n
    return torch.searchsorted(reached, points.clamp_max(1 - 1e-15), right=True).clamp_max(n - 1)


def ancestor_rows(ancestors: Tensor, shape: torch.Size) -> Tensor:
    """Flat row numbers of the ancestors of particles ``shape``, ``(particles, *batch_shape)``.

    Arguments:
        ancestors: ``(particles,)``, or ``shape`` where members of the batch differ.

    Raises:
        ShapeError: neither, or no integers.

    Example:
        >>> ancestor_rows(torch.tensor([1, 1]), torch.Size([2, 3]))
        tensor([3, 4, 5, 3, 4, 5])
    """
    n, batch = shape[0], shape[1:].numel()
    if ancestors.is_floating_point() or ancestors.shape not in (shape[:1], shape):
        raise ShapeError(
            f"ancestors: got {tuple(ancestors.shape)} of {ancestors.dtype}, needs {n} particle numbers, or one for "
            f"each member of the batch, {tuple(shape)}."
        )
    index = ancestors.reshape(n, -1).expand(n, batch) * batch + torch.arange(batch, device=ancestors.device)
    return index.flatten()
