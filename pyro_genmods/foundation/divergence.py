r"""The divergence :math:`\nabla \cdot v(y) = \operatorname{tr} \partial v / \partial y` of a field, row by row.

Exact, it takes one Jacobian product for each column. Estimated, it takes one for each probe :math:`\varepsilon` with
independent entries :math:`\pm 1`,

.. math:: \nabla \cdot v \approx \frac 1K \sum_{k=1}^K \varepsilon_k^\top \frac{\partial v}{\partial y} \varepsilon_k,
          \qquad \operatorname{Var} = \frac 2K \Big( \|S\|_F^2 - \sum_i S_{ii}^2 \Big),
          \qquad S = \tfrac 12 (J + J^\top),

which is unbiased, and exact for a diagonal Jacobian; normal probes have :math:`2 \|S\|_F^2 / K`. For a density that is
evaluated more than once the probes must stay what they are: with fresh ones at every call the density of one point
changes by nats.

Reference:
    M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines,
    Communications in Statistics 19 (1990) 433-450. W. Grathwohl et al., FFJORD, 2018, arXiv:1810.01367.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .causal import transformed

__all__ = ["estimated_divergence", "exact_divergence", "jacobian_products", "rademacher"]

Velocity = Callable[[Tensor], Tensor]


def jacobian_products(function: Velocity, y: Tensor) -> tuple[Tensor, Velocity]:
    """Values at rows, and products ``(k, rows, n)`` of vectors of that shape with the Jacobians from the left.

    Where nobody differentiates further, plain automatic differentiation gives them, which costs two thirds of what
    ``torch.func`` takes, and lets networks use their fused kernels.

    Arguments:
        function: ``(rows, n)`` to ``(rows, n)``, each row from its own alone.
        y: ``(rows, n)``.

    Example:
        >>> value, products = jacobian_products(lambda y: y**2, torch.tensor([[1.0, 2.0]]))
        >>> products(torch.eye(2)[:, None])
        tensor([[[2., 0.]],
        <BLANKLINE>
                [[0., 4.]]])
    """
    if torch.is_grad_enabled() or transformed():
        return _transposed(function, y)
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        value = function(leaf)

    def products(e: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(e)
        options = {"retain_graph": True, "materialize_grads": True}
        if len(e) == 1:
            return torch.autograd.grad(value, leaf, e[0], **options)[0][None]
        try:
            return torch.autograd.grad(value, leaf, e, is_grads_batched=True, **options)[0]
        except RuntimeError:  # a fused kernel without a batching rule
            return _transposed(function, leaf.detach())[1](e)

    return value.detach(), products


def _transposed(function: Velocity, y: Tensor) -> tuple[Tensor, Velocity]:
    value, pullback = torch.func.vjp(function, y)
    return value, torch.vmap(lambda e: pullback(e)[0])


def exact_divergence(velocity: Velocity, y: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Velocity and divergence of rows.

    Arguments:
        velocity: ``(rows, n)`` to ``(rows, n)``, each row from its own alone.
        y: ``(rows, n)``.
        chunk_size: columns differentiated at once; all, by default.

    Returns:
        Velocity ``(rows, n)`` and divergence ``(rows,)``.

    Example:
        >>> v, divergence = exact_divergence(lambda y: y**2, torch.tensor([[1.0, 2.0]]))
        >>> divergence
        tensor([6.])
    """
    v, products = jacobian_products(velocity, y)
    n = y.shape[1]
    basis = torch.eye(n, dtype=y.dtype, device=y.device)[:, None].expand(-1, *y.shape)
    parts = [(products(e) * e).sum((0, 2)) for e in basis.split(chunk_size or n)]
    return v, torch.stack(parts).sum(0)


def estimated_divergence(velocity: Velocity, y: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and an estimate of the divergence of rows.

    Arguments:
        velocity: ``(rows, n)`` to ``(rows, n)``, each row from its own alone.
        y: ``(rows, n)``.
        probes: ``(probes, n)``, the same for all rows, or ``(probes, rows, n)``; see :func:`rademacher`.

    Returns:
        Velocity ``(rows, n)`` and estimate ``(rows,)``.

    Example:
        >>> v, divergence = estimated_divergence(lambda y: y**2, torch.tensor([[1.0, 2.0]]), rademacher(1, 2))
        >>> divergence
        tensor([6.])
    """
    v, products = jacobian_products(velocity, y)
    e = probes if probes.dim() == 3 else probes[:, None].expand(-1, *y.shape)
    return v, (products(e) * e).sum(-1).mean(0)


def rademacher(*shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    r"""Independent entries :math:`\pm 1`.

    Example:
        >>> rademacher(3, 2).abs().sum()
        tensor(6.)
    """
    return torch.randint(2, shape, device=device).to(dtype or torch.get_default_dtype()) * 2 - 1
