r"""A Gaussian datum under a likelihood.

Where a datum is Gaussian, with mean :math:`D` and covariance :math:`V`, and the log likelihood quadratic, with gradient
:math:`g` and curvature :math:`H` at :math:`D`, its mean under the likelihood, and its log mean likelihood, are

.. math::
    D + V (I + H V)^{-1} g, \qquad
    \ell(D) + \tfrac12\, g^\top V (I + H V)^{-1} g - \tfrac12 \log\det(I + H V) .

Where it is not quadratic, this is one step of Newton's method; further ones, each shortened until it is one upwards,
lead to the mode, and Laplace's approximation takes the place of the mean likelihood. A single step would promise more
than the likelihood can ever give, as that of a count from a rate that is much too small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..foundation.shapes import Rows, Values
from .likelihood import Quadratic, WhiteLikelihood, root

__all__ = ["conditioned", "conditioned_diagonal"]

CONJUGATE_STEPS, NEWTON_STEPS, HALVINGS = 30, 12, 8


def conditioned(likelihood: WhiteLikelihood, mean: Rows, spread: Callable[[Tensor], Tensor]) -> tuple[Rows, Values]:
    r"""Mean under the likelihood of a Gaussian datum, and the logarithm of its mean likelihood, see the module.

    With :math:`H = B B^\top`, :math:`g = B a + h`, :math:`S = B^\top V B`, :math:`b = B^\top V h` and
    :math:`k = (I + S)^{-1} (a - b)` the mean moves by :math:`V w`, :math:`w = B k + h`; nothing large is subtracted
    from its like.

    Arguments:
        likelihood: of white rows.
        mean: of the datum, ``(rows, n)``.
        spread: products of the covariance :math:`V` with vectors, ``(k, rows, n)``.
    """
    quadratic = likelihood.quadratic(mean)
    if quadratic is None:
        return _conditioned_often(likelihood, mean, spread)
    found, log_psi, wrong = _conditioned_once(likelihood, quadratic, mean, spread)
    if not bool(wrong.any()):
        return found, log_psi
    often, log_psi_often = _conditioned_often(likelihood, mean, spread)
    return torch.where(wrong[:, None], often, found), torch.where(wrong, log_psi_often, log_psi)


def _conditioned_often(
    likelihood: WhiteLikelihood, mean: Rows, spread: Callable[[Tensor], Tensor]
) -> tuple[Rows, Values]:
    """The same by Newton's method, with the curvature where it has come to."""
    eps = torch.finfo(mean.dtype).eps

    def solve(offset: Tensor) -> Newton:
        values, gradients, curvature = likelihood.local(mean + offset.to(mean))
        factor = root(curvature, eps)
        bent = torch.einsum("nir,njr,nj->ni", factor, factor, offset)
        pull = gradients.double() + bent
        along, across = split(pull, factor)
        moved = spread(torch.cat([factor.permute(2, 0, 1), across[None]]).to(mean)).double()
        vb, vh = moved[:-1].permute(1, 2, 0), moved[-1]
        s = psd(factor.mT @ vb, max(1e-9, 10 * eps))
        chol = torch.linalg.cholesky(s + torch.eye(s.shape[-1]).to(s))
        k = torch.cholesky_solve((along - torch.einsum("nir,ni->nr", factor, vh))[..., None], chol)[..., 0]
        dual = torch.einsum("nir,nr->ni", factor, k) + across
        move = torch.einsum("nir,nr->ni", vb, k) + vh
        change = move - offset
        bend = torch.einsum("nir,ni->nr", factor, change).square().sum(-1)
        expected = values.double() + (gradients.double() * change).sum(-1) - 0.5 * bend
        return Newton(dual, move, expected, 2 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    return _laplace(likelihood, mean, solve)


def _conditioned_once(
    likelihood: WhiteLikelihood, quadratic: Quadratic, mean: Rows, spread: Callable[[Tensor], Tensor]
) -> tuple[Rows, Values, Tensor]:
    """The same by the curvature that is known already, and whether the likelihood goes as it says, ``(rows,)``."""
    factor, inverse, slanted = quadratic
    values, gradients, _ = likelihood.slope(mean)
    along = gradients @ inverse.mT
    directions = factor.mT[:, None].expand(-1, *mean.shape)
    across = gradients - along @ factor.mT if slanted else torch.zeros_like(gradients)
    moved = spread(torch.cat([directions, across[None]]) if slanted else directions)
    vb = moved[: factor.shape[1]].permute(1, 0, 2)
    s = psd((vb @ factor).double(), max(1e-9, 10 * torch.finfo(mean.dtype).eps))
    chol = torch.linalg.cholesky(s + torch.eye(s.shape[-1]).to(s))
    pull = along - moved[-1] @ factor if slanted else along
    k = torch.cholesky_solve(pull.double()[..., None], chol)[..., 0].to(mean)
    offset = (k[:, None] @ vb)[:, 0] + (moved[-1] if slanted else 0)
    dual = k @ factor.mT + across
    expected = (
        values.double() + (gradients * offset).double().sum(-1) - 0.5 * (offset @ factor).square().double().sum(-1)
    )
    log_det = 2 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    level = expected - 0.5 * (offset * dual).double().sum(-1)
    value = likelihood(mean + offset, strict=False).double()
    return mean + offset, level - 0.5 * log_det, ~_near(value, expected)


def _near(value: Values, expected: Values) -> Tensor:
    return (value - expected).abs() <= 1e-3 + 1e-6 * expected.abs()


def conditioned_diagonal(likelihood: WhiteLikelihood, mean: Rows, variance: Tensor) -> tuple[Rows, Values]:
    r"""The same for a diagonal covariance ``(rows, n)`` and many features, by products with the curvature alone.

    With :math:`L = V^{1/2}`, :math:`(I + L H L)\, y = L g` is solved by conjugate gradients, which a row leaves
    where it meets negative curvature. The determinant is that of the diagonal, probed by one vector of random signs.
    """
    scale = variance.sqrt()
    generator = torch.Generator().manual_seed(0)
    signs = (2 * torch.randint(2, mean.shape[1:], generator=generator) - 1).to(mean).expand_as(mean)

    def solve(offset: Tensor) -> Newton:
        values, gradients, leaf = likelihood.slope(mean + offset.to(mean), curved=True)

        def curved(p: Tensor) -> Tensor:
            return likelihood.curvature(gradients, leaf, p)

        bent = curved(offset.to(mean))
        pull = gradients.detach() + bent
        y = conjugate_gradients(lambda p: scale * curved(scale * p), scale * pull)
        move = scale * y
        change = move - offset.to(mean)
        rise = ((gradients.detach() - 0.5 * curved(change)) * change).double().sum(-1)
        diagonal = (signs * scale * curved(signs * scale)).clamp_min(0)
        dual = y / scale.clamp_min(torch.finfo(y.dtype).tiny ** 0.5)
        return Newton(dual.double(), move.double(), values.double() + rise, diagonal.double().log1p().sum(-1))

    return _laplace(likelihood, mean, solve)


class Newton(NamedTuple):
    """A step to the maximum of a quadratic approximation, of all rows.

    Attributes:
        dual, offset: :math:`w` and :math:`V w`, from the mean to the maximum.
        expected: log likelihood there, by its own quadratic approximation. That of the sum would need a symmetric
            :math:`V`, which the derivative of a network is not.
        log_det: of :math:`I + H V`.
    """

    dual: Tensor
    offset: Tensor
    expected: Tensor
    log_det: Tensor


def _laplace(likelihood: WhiteLikelihood, mean: Rows, solve: Callable[[Tensor], Newton]) -> tuple[Rows, Values]:
    r"""Newton's method for the maximum of :math:`\ell(D + V w) - \tfrac12 w^\top V w`, and Laplace's approximation.

    A row is done when the log likelihood is as its quadratic approximation said, at once where it is quadratic.
    """
    offset = dual = torch.zeros_like(mean, dtype=torch.float64)
    level = likelihood(mean).detach().double()
    log_det, wanted = torch.zeros_like(level), level.isfinite()
    for _ in range(NEWTON_STEPS):
        new = solve(offset)
        log_det = torch.where(wanted, new.log_det, log_det)
        fraction = wanted.double()
        for _ in range(HALVINGS):
            part = fraction[:, None]
            trial = offset + part * (new.offset - offset), dual + part * (new.dual - dual)
            value = likelihood(mean + trial[0].to(mean), strict=False).double()
            found = torch.where(fraction > 0, value - 0.5 * (trial[0] * trial[1]).sum(-1), level)
            near = (fraction == 1) & _near(value, new.expected)
            worse = ~near & (found < level - 1e-6 * (1 + level.abs()))
            if not bool(worse.any()):
                break
            fraction = torch.where(worse, fraction / 2, fraction)
        better = (wanted & ~worse)[:, None]
        offset, dual = torch.where(better, trial[0], offset), torch.where(better, trial[1], dual)
        level = torch.where(worse, level, found)
        wanted = wanted & ~worse & ~near
        if not bool(wanted.any()):
            break
    return mean + offset.to(mean), level - 0.5 * log_det


def conjugate_gradients(times: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Solutions of :math:`(I + M) y = b`, row by row; a row stops where it meets negative curvature of :math:`M`."""
    y, residual, direction = torch.zeros_like(b), b, b
    square = b.square().sum(-1)
    floor, alive = 1e-12 * square, square > 0
    for _ in range(CONJUGATE_STEPS):
        curved, size = times(direction), direction.square().sum(-1)
        bend = (direction * curved).sum(-1)
        step = torch.where(alive, square / (size + bend.clamp_min(0)).clamp_min(1e-30), 0)
        y = y + step[:, None] * direction
        residual = residual - step[:, None] * (direction + curved)
        before, square = square, residual.square().sum(-1)
        alive = alive & (bend > -1e-6 * size) & (square > floor)
        if not bool(alive.any()):
            break
        direction = residual + (square / before.clamp_min(1e-30))[:, None] * direction
    return y


def split(g: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as combinations of the columns of thin factors, ``(rows, rank)``, and what is left, ``(rows, n)``."""
    length = factor.norm(dim=-2)
    length = torch.where(length > 0, length, 1.0)
    unit = factor / length[:, None, :]
    gram = unit.mT @ unit
    missing = (gram.diagonal(dim1=-2, dim2=-1) == 0).to(gram)
    along = torch.linalg.solve(gram + missing.diag_embed(), (unit.mT @ g[..., None]))[..., 0]
    return along / length, g - torch.einsum("nir,nr->ni", unit, along)


def psd(s: Tensor, eps: float) -> Tensor:
    """Square matrices made symmetric, and without what is negative in them, where that is more than rounding."""
    s = (s + s.mT) / 2
    eye = torch.eye(s.shape[-1]).to(s)
    scale = 1 + s.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    bad = torch.linalg.cholesky_ex(s + (eps * s.shape[-1] * scale).clamp_max(0.5)[:, None, None] * eye).info > 0
    if not bool(bad.any()):
        return s
    values, vectors = torch.linalg.eigh(s[bad])
    s = s.clone()
    s[bad] = (vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT
    return s
