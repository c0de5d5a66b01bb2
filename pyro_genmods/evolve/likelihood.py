r"""A log likelihood as the samplers see it.

It is any function of events in the user's units, ``(rows, *event_shape)`` to ``(rows,)``, each row for itself. The
samplers work on white rows, in which the data of the prior have mean zero and covariance one, so that a curvature of
the likelihood much below one is none.

A quadratic one, of which linear measurements with Gaussian noise are the first example, has the same curvature
everywhere. That is found out once, at rows drawn for the purpose; then the curvature is never computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..foundation.errors import ModelError, SamplingError, ShapeError
from ..foundation.shapes import Rows, Values
from .lost import LostRowsError

__all__ = ["LogLikelihood", "Quadratic", "WhiteLikelihood", "root"]

LogLikelihood = Callable[[Tensor], Tensor]
PROBE, PROBES = 3.0, 16  # standard deviation and least number of the white rows where curvatures are compared
NO_GRADIENT = (
    "log_likelihood: has no gradient with respect to the event, and this sampler follows it; write it with "
    "differentiable torch operations, or use infer.SMC(..., moves='elliptical') in noise space, which needs none."
)
NO_CURVATURE = (
    "log_likelihood: has no second derivatives ({error}), and this guidance takes its curvature; take "
    "DPS(), which needs only a gradient, or infer.SMC(..., moves='elliptical') in noise space, which needs none."
)


class Quadratic(NamedTuple):
    r"""The curvature :math:`B B^\top` of a likelihood that has the same one everywhere.

    Attributes:
        factor: :math:`B`, ``(n, rank)``.
        inverse: its pseudoinverse, ``(rank, n)``.
        slanted: whether the gradients have a part, always the same, across the columns of :math:`B`.
    """

    factor: Tensor
    inverse: Tensor
    slanted: bool


@dataclass(frozen=True)
class WhiteLikelihood:
    """A log likelihood of white rows.

    Arguments:
        log_likelihood: of events ``(rows, *event_shape)`` in the user's units, ``(rows,)`` in nats.
        diffusion: whose units they are.
    """

    log_likelihood: LogLikelihood
    diffusion: Any
    _known: dict[Any, Quadratic | None] = field(default_factory=dict, compare=False, repr=False)

    def events(self, w: Rows) -> Tensor:
        """White rows in the user's units, ``(rows, *event_shape)``."""
        return self.diffusion.coordinates.push(self.diffusion.whitening.inverse(w))[0]

    def __call__(self, w: Rows, strict: bool = True) -> Values:
        """Log likelihoods; minus infinity is allowed, and stands for NaN where one is not strict.

        Raises:
            ShapeError: not one number a row.
            SamplingError: NaN, or plus infinity.
            IntegrationError: rows that are not finite themselves, which is not the likelihood's fault.
        """
        lost = ~w.detach().isfinite().all(-1)
        try:
            values = self.log_likelihood(self.events(w))
        except Exception as error:
            if bool(lost.any()):  # it was asked for what nobody can answer
                raise LostRowsError(lost) from error
            raise
        if not isinstance(values, Tensor) or values.shape != (len(w),):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(
                f"log_likelihood: got {got} for {len(w)} events of shape {tuple(self.diffusion.event_shape)}, needs "
                f"one number an event, ({len(w)},); sum over everything but the first dimension."
            )
        wrong = lost | values.detach().isnan() | (values.detach() == math.inf)
        if not strict:
            return torch.where(wrong, -torch.inf, values)
        if bool(wrong.any()):
            if bool(lost.any()):
                raise LostRowsError(lost)
            first = self.events(w.detach())[wrong][0].flatten()[:8].tolist()
            raise SamplingError(
                f"log_likelihood: is NaN or infinite for {int(wrong.sum())} of {len(w)} events, the first of them "
                f"{first}; make it -inf where an event is impossible, and finite elsewhere."
            )
        return values

    def slope(self, w: Rows, curved: bool = False) -> tuple[Values, Rows, Tensor]:
        """Log likelihoods, gradients, and the rows that they are gradients at, as leaves of a graph if ``curved``.

        Gradients that are not finite, where an event is impossible, are zero.

        Raises:
            ModelError: it is not differentiable.
        """
        with torch.enable_grad():
            leaf = w.detach().requires_grad_()
            values = self(leaf)
            if not values.requires_grad:
                raise ModelError(NO_GRADIENT)
            (gradients,) = torch.autograd.grad(values.sum(), leaf, create_graph=curved, allow_unused=True)
            if gradients is None:
                raise ModelError(NO_GRADIENT)
            possible = values.isfinite() & gradients.isfinite().all(-1)
            return values.detach(), torch.where(possible[:, None], gradients, 0), leaf

    def local(self, w: Rows) -> tuple[Values, Rows, Tensor]:
        r"""Log likelihoods, gradients, and curvatures :math:`-\nabla^2 \ell`, ``(rows, n, n)``."""
        values, gradients, leaf = self.slope(w, curved=True)
        columns = [self.curvature(gradients, leaf, e.expand_as(leaf)) for e in torch.eye(w.shape[1]).to(w)]
        return values, gradients.detach(), torch.stack(columns, -1)

    def positive_curvature(self, w: Rows) -> Tensor:
        r"""Thin factors :math:`B` of the curvatures without what is negative in them, ``(rows, n, rank)``, double."""
        quadratic = self.quadratic(w)
        if quadratic is not None:
            return quadratic.factor.double().expand(len(w), -1, -1)
        return root(self.local(w)[2], torch.finfo(w.dtype).eps)

    def quadratic(self, w: Rows) -> Quadratic | None:
        """Its curvature, if that is the same everywhere; rows like these are made up to see, their values are not used.

        Whoever takes it should still see whether the likelihood goes as it says.
        """
        key = (*w.shape, w.dtype, w.device)
        if key not in self._known:
            generator, times = torch.Generator().manual_seed(0), max(2, -(-PROBES // max(1, len(w))))
            noise = torch.randn(times, *w.shape, generator=generator, dtype=w.dtype).to(w)
            try:
                seen = [self.local(PROBE * rows)[1:] for rows in noise]
                self._known[key] = _common(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
            except (SamplingError, ValueError):  # no likelihood so far out
                self._known[key] = None
        return self._known[key]

    def curvature(self, gradients: Tensor, leaf: Tensor, direction: Tensor) -> Rows:
        """Products of the curvatures with directions, from what :meth:`slope` gave.

        Raises:
            ModelError: it is not twice differentiable.
        """
        if not gradients.requires_grad:  # a linear function, or one that hides its second derivatives
            elsewhere = self.slope(leaf.detach() + 1)[1]
            if not torch.allclose(elsewhere, gradients, rtol=1e-3, atol=1e-6):
                raise ModelError(NO_CURVATURE.format(error="its gradient cannot be differentiated"))
            return torch.zeros_like(leaf)
        try:
            (product,) = torch.autograd.grad(gradients, leaf, direction, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise ModelError(NO_CURVATURE.format(error=str(error).splitlines()[0])) from error
        return torch.zeros_like(leaf) if product is None else -product.nan_to_num(0.0, 0.0, 0.0)


def _common(gradients: Rows, curvature: Tensor) -> Quadratic | None:
    h = curvature.double().mean(0)
    eps = torch.finfo(gradients.dtype).eps
    size = float(h.abs().max())
    if not bool(curvature.isfinite().all()) or float((curvature - h).abs().max()) > 1e3 * eps * size:
        return None
    factor = root(h[None], eps)[0]
    inverse = torch.linalg.pinv(factor)
    across = gradients.double() - gradients.double() @ inverse.mT @ factor.mT
    slanted = bool((across.norm(dim=-1) > 1e4 * eps * gradients.norm(dim=-1)).any())
    return Quadratic(factor.to(gradients), inverse.to(gradients), slanted)


def root(h: Tensor, eps: float) -> Tensor:
    """Thin factors ``(rows, n, rank)`` of symmetric matrices, :math:`B B^T`, without what is negative in them.

    By Cholesky's method with the largest pivot first, until what is left is below rounding, or nothing in white units;
    rows that are not positive have their negative eigenvalues removed before.

    Arguments:
        h: ``(rows, n, n)``.
        eps: relative accuracy of its entries.
    """
    h = h.double().nan_to_num(0.0, 0.0, 0.0)
    h = (h + h.mT) / 2
    n, rows = h.shape[-1], torch.arange(len(h), device=h.device)
    rest = h.diagonal(dim1=-2, dim2=-1).clone()
    tolerance = (8 * n * eps * rest.abs().amax(-1)).clamp_min(eps**0.5 / 3)
    factor = h.new_zeros(*h.shape[:-1], 0)
    for _ in range(n):
        size, pivot = rest.max(-1)
        wanted = size > tolerance
        if not bool(wanted.any()):
            break
        column = h[rows, :, pivot] - torch.einsum("nir,nr->ni", factor, factor[rows, pivot])
        column = torch.where(wanted[:, None], column / size.clamp_min(1e-300).sqrt()[:, None], 0)
        factor = torch.cat([factor, column[..., None]], -1)
        rest = rest - column.square()
        rest[rows, pivot] = torch.where(wanted, 0, rest[rows, pivot])
    factor = factor if factor.shape[-1] else h.new_zeros(*h.shape[:-1], 1)
    bad = (h - factor @ factor.mT).abs().amax((-2, -1)) > 2 * tolerance
    if not bool(bad.any()):
        return factor
    values, vectors = torch.linalg.eigh(h[bad])
    mended = vectors * values.clamp_min(0).sqrt()[:, None, :]
    full = h.new_zeros(len(h), n, max(n, factor.shape[-1]))
    full[..., : factor.shape[-1]] = factor
    full[bad] = mended
    return full
