r"""Gaussian transitions :math:`\mathcal N(m, L L^\top)` over one step, and the algebra of their factors.

A factor is the diagonal of :math:`L`, ``(rows, n, features)``, or L, ``(rows, n, features, features)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["apply_factor", "euler", "gaussian_kl", "linear_flow", "local_linear", "log_volume", "solve_factor"]

ORDER, DOUBLINGS, SMALL = 8, 10, 1e-3


def euler(x: Tensor, f: Tensor, g: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor of a step of Euler and Maruyama, of ``length`` ``(n, 1)``."""
    return x + f * length, g * length.sqrt()


def local_linear(x: Tensor, drift: Callable[[Tensor], Tensor], g: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor of the exact transition of the equation linearised at ``x``, see the module ``path``."""
    f, back = torch.func.vjp(drift, x)
    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    cotangents = basis[:, None, None].expand(x.shape[-1], *x.shape)
    jacobian = torch.func.vmap(lambda v: back(v)[0])(cotangents).movedim(0, -2)
    if x.shape[-1] == 1:
        rate = jacobian[..., 0] * length
        return x + f * length * _phi(rate), g * (length * _phi(2 * rate)).sqrt()
    integral, covariance = linear_flow(jacobian, torch.diag_embed(g.square()), length[..., None])
    return x + (integral @ f[..., None])[..., 0], torch.linalg.cholesky(covariance)


def linear_flow(jacobian: Tensor, diffusion: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    r"""Integrals :math:`\int_0^h e^{J s} \mathrm ds` and :math:`\int_0^h e^{J s} Q e^{J^\top s} \mathrm ds`.

    Taylor series over :math:`h / 2^{10}`, doubled ten times through :math:`e^{Jh} - 1`, so that nothing grows where the
    flow contracts: rounding up to :math:`|J h| \approx 100`, an error below 1e-8 up to 500.

    Arguments:
        jacobian, diffusion: J and Q, ``(..., d, d)``. length: h, broadcast with them.

    Example:
        >>> j = torch.tensor([[-2.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
        >>> integral, _ = linear_flow(j, torch.eye(2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
        >>> torch.allclose(j @ integral, torch.matrix_exp(j) - torch.eye(2), atol=1e-14)
        True
    """
    h = length / 2**DOUBLINGS
    power, term = torch.eye(jacobian.shape[-1], dtype=h.dtype, device=h.device) * h, diffusion * h
    integral, covariance = power, term
    for n in range(2, ORDER + 1):
        power = jacobian @ power * (h / n)
        half = jacobian @ term
        term = (half + half.mT) * (h / n)
        integral, covariance = integral + power, covariance + term
    growth = jacobian @ integral
    for _ in range(DOUBLINGS):
        moved = growth @ covariance
        covariance = 2 * covariance + moved + moved.mT + moved @ growth.mT
        integral = 2 * integral + growth @ integral
        growth = 2 * growth + growth @ growth
    return integral, covariance


def _phi(a: Tensor) -> Tensor:
    """(e^a - 1) / a, smooth at zero."""
    small = a.abs() < SMALL
    safe = torch.where(small, 1.0, a)
    return torch.where(small, 1 + a / 2 * (1 + a / 3 * (1 + a / 4)), torch.expm1(safe) / safe)


def apply_factor(factor: Tensor, noise: Tensor) -> Tensor:
    """L times noise ``(rows, n, features)``."""
    return factor * noise if factor.dim() == noise.dim() else (factor @ noise[..., None])[..., 0]


def solve_factor(factor: Tensor, residual: Tensor) -> Tensor:
    """The noise of which L makes the residual."""
    if factor.dim() == residual.dim():
        return residual / factor
    return torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]


def log_volume(factor: Tensor) -> Tensor:
    """Log determinant of L, ``(rows, n)``."""
    return (factor if factor.dim() == 3 else factor.diagonal(dim1=-2, dim2=-1)).log().sum(-1)


def gaussian_kl(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]) -> Tensor:
    """Kullback-Leibler divergence of transitions (mean, factor), in nats, ``(rows, n)``."""
    (mean, factor), (prior_mean, prior_factor) = q, p
    shift = solve_factor(prior_factor, mean - prior_mean).square().sum(-1)
    if factor.dim() == prior_factor.dim() == 3:
        spread = (factor / prior_factor).square().sum(-1)
    else:
        full = [x if x.dim() == 4 else torch.diag_embed(x) for x in (prior_factor, factor)]
        spread = torch.linalg.solve_triangular(*full, upper=False).square().sum((-2, -1))
    return 0.5 * (shift + spread - mean.shape[-1]) + log_volume(prior_factor) - log_volume(factor)
