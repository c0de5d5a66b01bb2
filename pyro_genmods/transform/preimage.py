r"""Preimages under a generator: which noise made this value.

For :math:`G: \mathbb R^k \to \mathbb R^D` with :math:`k \le D` and values :math:`y`, solve the least squares problem
:math:`\min_z |G(z) - y|^2` by the method of Levenberg and Marquardt, every row for itself and all rows together:

.. math:: z \leftarrow z + (J^\top J + \lambda\, \tau I)^{-1} J^\top (y - G(z)), \qquad J = \partial G / \partial z,
          \quad \tau = \operatorname{tr}(J^\top J) / k ,

where :math:`\lambda` falls after a step that helps and rises after one that does not. Near a root the steps are those
of Newton. A value is in the image of :math:`G` if its residual vanishes, to the square root of the precision; else it
has no preimage, and NaN says so.

The solution is found without a graph, from several starts; two starts that end at different preimages of one value
prove that :math:`G` is not injective, so that no single preimage has the density. Derivatives are attached by the
implicit function theorem, :math:`\mathrm dz = J^+ (\mathrm dy - \partial_\theta G\, \mathrm d\theta)`.

Reference:
    D. W. Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, SIAM Journal on Applied
    Mathematics 11 (1963) 431-441.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..foundation.causal import transformed
from ..foundation.errors import DensityError, InverseError
from ..foundation.shapes import Noise, Rows, Values

__all__ = ["log_gram", "preimage", "value_and_jacobian"]

Map = Callable[[Tensor], Tensor]

ITERATIONS = 100
TRANSFORMED_ITERATIONS = 25  # under vmap and tracing, which cannot ask whether all rows are done
APART = 1e-2


def value_and_jacobian(push: Map, z: Noise) -> tuple[Tensor, Tensor]:
    r"""A map of rows and its Jacobian, by one forward derivative per column of noise; both carry gradients.

    Arguments:
        push: rows ``(rows, k)`` to rows ``(rows, D)``, row by row.
        z: noise.

    Returns:
        ``(rows, D)`` and ``(rows, D, k)``.

    Example:
        >>> y, jacobian = value_and_jacobian(lambda z: torch.cat([z, z**2], -1), torch.tensor([[3.0]]))
        >>> y, jacobian.flatten()
        (tensor([[3., 9.]]), tensor([1., 6.]))
    """
    columns = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    def along(column: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(push, (z,), (column.expand_as(z),))

    y, jacobian = torch.vmap(along, out_dims=(0, -1))(columns)
    return y[0], jacobian


def log_gram(jacobian: Tensor) -> Values:
    r"""Logarithm of the volume that a Jacobian gives to a unit of noise, :math:`\tfrac12 \log \det J^\top J`.

    Arguments:
        jacobian: ``(rows, D, k)``.

    Returns:
        ``(rows,)``; ``log |det J|`` where :math:`k = D`.

    Raises:
        DensityError: a Jacobian of lower rank than :math:`k`.

    Example:
        >>> log_gram(torch.tensor([[[3.0], [4.0]]])).exp()
        tensor([5.])
    """
    sizes = torch.linalg.qr(jacobian)[1].diagonal(dim1=-2, dim2=-1).abs()
    if not transformed():
        _check_rank(sizes.detach(), jacobian)
    return sizes.log().sum(-1)


def preimage(push: Callable[[Tensor, int], Tensor], y: Rows, starts: Tensor) -> Noise:
    """Solve ``push(z) = y`` row by row, with implicit gradients.

    Arguments:
        push: ``push(z, copies)`` carries noise ``(copies * rows, k)``, copy by copy, to values of as many rows.
        y: values ``(rows, D)``.
        starts: where to begin, ``(copies, k)``.

    Returns:
        ``(rows, k)``, NaN where a value has no preimage.

    Raises:
        DensityError: a Jacobian of lower rank at a preimage.
        InverseError: a value with two preimages.

    Example:
        >>> y = torch.tensor([[0.5, 0.25], [0.5, 0.9]])
        >>> preimage(lambda z, copies: torch.cat([z, z**2], -1), y, torch.zeros(1, 1))
        tensor([[0.5000],
                [   nan]])
    """
    copies, rows = len(starts), len(y)
    with torch.no_grad():
        target = y.detach()
        state = _solve(lambda z: push(z, copies), target.repeat(copies, 1), starts.repeat_interleave(rows, 0))
        z, found = state.z.unflatten(0, (copies, rows)), state.found.reshape(copies, rows)
        best = torch.where(found, state.error.reshape(copies, rows), torch.inf).argmin(0)
        root = z.gather(0, best[None, :, None].expand(1, -1, z.shape[-1]))[0]
        if not transformed():
            everywhere = state.jacobian[state.found]
            _check_rank(torch.linalg.qr(everywhere)[1].diagonal(dim1=-2, dim2=-1).abs(), everywhere)
            _check_injective(z, found, root)
        missing = ~found.any(0)
        root = torch.where(missing[:, None], 0.0, root)
    if torch.is_grad_enabled():
        root = _with_gradient(lambda z: push(z, 1), root, y)
    return torch.where(missing[:, None], torch.nan, root)


class _State(NamedTuple):
    z: Tensor
    residual: Tensor
    jacobian: Tensor
    error: Tensor
    damping: Tensor
    found: Tensor
    done: Tensor


def _solve(push: Map, y: Tensor, z: Tensor) -> _State:
    """Levenberg-Marquardt steps until every row is solved or stuck."""
    fixed = transformed()
    state = _begin(push, y, z)
    for _ in range(TRANSFORMED_ITERATIONS if fixed else ITERATIONS):
        if not fixed and bool(state.done.all()):
            break
        state = _step(push, y, state)
    return state


def _begin(push: Map, y: Tensor, z: Tensor) -> _State:
    value, jacobian = value_and_jacobian(push, z)
    residual = y - value
    nothing = torch.zeros_like(residual[:, 0], dtype=torch.bool)
    damping = torch.full_like(residual[:, 0], 1e-3)
    return _State(z, residual, jacobian, residual.square().sum(-1), damping, nothing, nothing)


def _step(push: Map, y: Tensor, s: _State) -> _State:
    """One step of every row that is not done; what a row does depends on no other row."""
    eps = torch.finfo(y.dtype).eps
    gram = s.jacobian.mT @ s.jacobian
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(y.dtype).tiny ** 0.5
    ridge = (s.damping * size)[:, None, None] * torch.eye(gram.shape[-1], dtype=y.dtype, device=y.device)
    step = torch.linalg.solve_ex(gram + ridge, s.jacobian.mT @ s.residual[..., None])[0][..., 0]
    z = s.z + step
    value, jacobian = value_and_jacobian(push, z)
    residual = y - value
    error = residual.square().sum(-1)
    better = (error < s.error) & ~s.done
    limit = math.sqrt(eps) * (1 + y.abs().amax(-1))
    kept = torch.where(better, error, s.error)
    found = kept.sqrt() <= limit
    still = step.abs().amax(-1) <= 4 * eps * (1 + s.z.abs().amax(-1))
    # A root is polished until no step helps; elsewhere a damping without bound means a minimum that is none.
    stuck = s.done | (found & (~better | still)) | (s.damping > 1e8) | ~s.error.isfinite()
    row, block = better[:, None], better[:, None, None]
    return _State(
        torch.where(row, z, s.z),
        torch.where(row, residual, s.residual),
        torch.where(block, jacobian, s.jacobian),
        kept,
        torch.where(better, (s.damping * 0.1).clamp_min(eps), s.damping * 8),
        found,
        stuck,
    )


def _check_rank(sizes: Tensor, jacobian: Tensor) -> None:
    """Refuse Jacobians ``(rows, D, k)`` whose triangular factor has a vanishing diagonal ``(rows, k)``."""
    rows, values, noise = jacobian.shape
    least = 10 * values * torch.finfo(jacobian.dtype).eps * sizes.amax(-1)
    singular = int((sizes.amin(-1) <= least).sum())
    if singular:
        raise DensityError(
            f"generator: it is singular, its Jacobian has a lower rank than its {noise} columns of noise at {singular} "
            f"of {rows} points: its law has no density. Use fewer latent_features, a generator without flat places "
            "(SiLU in place of ReLU), or density=None and infer.PushforwardReparam()."
        )


def _check_injective(z: Tensor, found: Tensor, root: Tensor) -> None:
    away = (z - root).abs().amax(-1) > APART * (1 + root.abs().amax(-1))
    twice = (away & found).any(0)
    if bool(twice.any()):
        row = int(twice.nonzero()[0])
        other = z[(away & found)[:, row], row][0]
        raise InverseError(
            f"generator: it is not injective, {int(twice.sum())} of {len(twice)} values have several preimages, the "
            f"first of them {root[row].tolist()[:4]} and {other.tolist()[:4]}; its density is a sum over them that "
            "nobody can enumerate. Use density=None and infer.PushforwardReparam()."
        )


def _with_gradient(push: Map, root: Tensor, y: Tensor) -> Tensor:
    """Attach the derivatives of a root with respect to the value and to whatever the map depends on."""
    with torch.no_grad():
        _, jacobian = value_and_jacobian(push, root)
        left = torch.linalg.pinv(jacobian)
    step = (left @ (y - push(root))[..., None])[..., 0]
    return root + (step - step.detach())
