r"""The inverse of a zuko transformation, solved to rounding error or marked as missing.

zuko inverts monotone univariate functions by bisection on :math:`[-10, 10]`. A root beyond is returned as the nearest
end of the interval, so that draws of ``GF``, ``SOSPF``, ``NAF`` and ``UNAF`` silently disagree with the density of the
same flow: by more than 0.01 nats on most draws of a fresh ``GF``. Here the bracket widens until it holds the root,
the root is solved by Chandrupatla's method, its gradient is implicit, and where no root exists (a value beyond the
range of a saturating function) the answer is NaN instead of a wrong number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform

from ..foundation.numerics import invert_monotone
from ._zuko import zuko

__all__ = ["invert", "invert_with_volume", "needs_root_finding"]

T = zuko.transforms


def invert(transform: Transform, y: Tensor) -> Tensor:
    """Solve ``transform(x) = y``, differentiably in ``y`` and in the parameters of the transform.

    Arguments:
        transform: a zuko or torch transformation.
        y: values, ``(rows, features)``.

    Returns:
        ``x`` of the same shape, NaN where ``y`` has no preimage.

    Example:
        >>> t = T.SOSPolynomialTransform(torch.ones(3, 2, 2))
        >>> x = invert(t, torch.tensor([5.0, 1e4, -3.0]))
        >>> torch.allclose(t(x), torch.tensor([5.0, 1e4, -3.0]), rtol=1e-4)
        True
    """
    match transform:
        case T.ComposedTransform():
            for part in reversed(transform.transforms):
                y = invert(part, y)
            return y
        case T.DependentTransform():
            return invert(transform.base, y)
        case T.AutoregressiveTransform():
            return _invert_autoregressive(transform, y)
        case T.CouplingTransform():
            kept, moved = transform.split(y)
            return transform.merge(kept, invert(transform.meta(kept), moved), y.shape)
        case T.BernsteinTransform():
            return _invert_bernstein(transform, y)
        case T.MonotonicTransform():
            return invert_monotone(transform.f, y, transform.bound)
        case T.SoftclipTransform():
            return transform.inv(y.masked_fill(y.abs() >= transform.bound, torch.nan))
        case _:
            return transform.inv(y)


def _invert_autoregressive(transform: Transform, y: Tensor) -> Tensor:
    """Fixed-point passes; pass ``k`` fixes the columns of depth ``k``, so columns still wrong must not spread NaN."""
    x = torch.zeros_like(y)
    for _ in range(transform.passes):
        x = invert(transform.meta(torch.nan_to_num(x)), y)
    return x


def _invert_bernstein(transform: Transform, y: Tensor) -> Tensor:
    """Linear beyond the bound, where zuko's closed form is right; a root of the polynomial within."""
    (first, last), slope, bound = transform.offset, transform.slope, transform.bound
    within = (y > first) & (y < last)
    root = invert_monotone(transform.f, torch.where(within, y, (first + last) / 2), bound)
    below = ((y - first) / slope[0] + transform.eps) * 2 * bound - bound
    above = ((y - last) / slope[1] - transform.eps + 1) * 2 * bound - bound
    return torch.where(within, root, torch.where(y <= first, below, above))


def invert_with_volume(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``transform(x) = y`` for a closed-form transform, together with ``log |dx/dy|``.

    The conditioner of the last pass is the conditioner of the solution, so value and volume come from the same calls:
    one for a coupling layer and ``passes`` for an autoregressive one, where zuko takes one more of each.

    Arguments:
        transform: a transformation for which :func:`needs_root_finding` is false.
        y: values, ``(rows, features)``.

    Returns:
        ``x`` of the same shape, and the log-volume, ``(rows,)`` for joint and the shape of ``x`` for elementwise
        transforms.

    Example:
        >>> t = zuko.flows.MAF(3)().transform
        >>> y = torch.randn(5, 3)
        >>> x, volume = invert_with_volume(t, y)
        >>> torch.allclose(volume, -t.log_abs_det_jacobian(x, y), atol=1e-5)
        True
    """
    match transform:
        case T.ComposedTransform():
            return _invert_composed(transform, y)
        case T.DependentTransform():
            x, volume = invert_with_volume(transform.base, y)
            return x, volume.flatten(-transform.reinterpreted).sum(-1)
        case T.AutoregressiveTransform():
            x = torch.zeros_like(y)
            for _ in range(transform.passes - 1):
                x = transform.meta(x).inv(y)
            return invert_with_volume(transform.meta(x), y)
        case T.CouplingTransform():
            kept, moved = transform.split(y)
            moved, volume = invert_with_volume(transform.meta(kept), moved)
            return transform.merge(kept, moved, y.shape), volume
        case _:
            return transform.inv.call_and_ladj(y)


def _invert_composed(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Volumes of elementwise parts are summed over the dimensions that another part treats as joint."""
    event_dim, total = transform.domain_dim, 0.0
    for part in reversed(transform.transforms):
        y, volume = invert_with_volume(part, y)
        extra = event_dim - part.domain.event_dim
        total = total + (volume.flatten(-extra).sum(-1) if extra > 0 else volume)
    return y, total


def needs_root_finding(transform: Transform, row: Tensor) -> bool:
    """Whether the inverse of a transformation is solved by iteration, and may miss.

    Arguments:
        transform: a zuko or torch transformation.
        row: any input of it, ``(1, features)``.

    Example:
        >>> row = torch.zeros(1, 2)
        >>> needs_root_finding(zuko.flows.MAF(2)().transform, row)
        False
        >>> needs_root_finding(zuko.flows.GF(2)().transform, row)
        True
    """
    match transform:
        case T.ComposedTransform():
            return any(needs_root_finding(part, row) for part in transform.transforms)
        case T.DependentTransform():
            return needs_root_finding(transform.base, row)
        case T.AutoregressiveTransform():
            return needs_root_finding(transform.meta(row), row)
        case T.CouplingTransform():
            kept, moved = transform.split(row)
            return needs_root_finding(transform.meta(kept), moved)
        case _:
            return isinstance(transform, T.MonotonicTransform)
