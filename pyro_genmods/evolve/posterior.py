r"""Posteriors :math:`p(x)\, e^{\ell(x)}`: a likelihood as the samplers see it, and what they give back.

A log likelihood is any function of events in the user's units, ``(rows, *event_shape)`` to ``(rows,)``, each row for
itself. The samplers work on white rows, in which the data of the prior have mean zero and covariance one, so that a
curvature of the likelihood much below one is none.

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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..foundation.errors import ModelError, SamplingError, ShapeError
from ..foundation.resampling import systematic
from ..foundation.shapes import Rows, Values

__all__ = ["LogLikelihood", "Posterior", "WhiteLikelihood", "conditioned", "conditioned_diagonal", "root"]

LogLikelihood = Callable[[Tensor], Tensor]
CONJUGATE_STEPS, NEWTON_STEPS, HALVINGS = 30, 12, 8
NO_GRADIENT = (
    "log_likelihood: has no gradient with respect to the event, and this sampler follows it; write it with "
    "differentiable torch operations, or use infer.SMC(..., moves='elliptical') in noise space, which needs none."
)
NO_CURVATURE = (
    "log_likelihood: has no second derivatives ({error}), and this guidance takes its curvature; take "
    "DPS(), which needs only a gradient, or infer.SMC(..., moves='elliptical') in noise space, which needs none."
)


@dataclass(frozen=True)
class WhiteLikelihood:
    """A log likelihood of white rows.

    Arguments:
        log_likelihood: of events ``(rows, *event_shape)`` in the user's units, ``(rows,)`` in nats.
        diffusion: whose units they are.
    """

    log_likelihood: LogLikelihood
    diffusion: Any

    def events(self, w: Rows) -> Tensor:
        """White rows in the user's units, ``(rows, *event_shape)``."""
        return self.diffusion.coordinates.push(self.diffusion.whitening.inverse(w))[0]

    def __call__(self, w: Rows, strict: bool = True) -> Values:
        """Log likelihoods; minus infinity is allowed, and stands for NaN where one is not strict.

        Raises:
            ShapeError: not one number a row.
            SamplingError: NaN, or plus infinity.
        """
        values = self.log_likelihood(self.events(w))
        if not isinstance(values, Tensor) or values.shape != (len(w),):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(
                f"log_likelihood: got {got} for {len(w)} events of shape {tuple(self.diffusion.event_shape)}, needs "
                f"one number an event, ({len(w)},); sum over everything but the first dimension."
            )
        wrong = values.detach().isnan() | (values.detach() == math.inf)
        if not strict:
            return torch.where(wrong, -torch.inf, values)
        if bool(wrong.any()):
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
        return root(self.local(w)[2], torch.finfo(w.dtype).eps)

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


@dataclass(frozen=True)
class Posterior:
    """Weighted draws of a posterior.

    Attributes:
        draws: ``(n, *event_shape)``.
        log_weights: unnormalised, ``(n,)``, in nats; all zero where draws are of equal weight.
        log_evidence: logarithm of the mean of the likelihood under the prior, in nats; ``None`` where the sampler does
            not know it.
        log_evidences: of each independent run.
        ess: what the weights are worth, in draws. Draws that share ancestors are worth less than that.
        evaluations: sequential calls of the network.
        trace: effective number of particles of each run before every step, ``(runs, steps)``.
        agreement: how much the runs disagree, as the largest R-hat between their means; near 1 where they agree, NaN
            for one run.

    Example:
        >>> found = Posterior(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -torch.inf]))
        >>> found.mean, found.resample(3).flatten()
        (tensor([0.]), tensor([0., 0., 0.]))
    """

    draws: Tensor
    log_weights: Tensor
    log_evidence: float | None = None
    log_evidences: Tensor | None = None
    ess: float = math.nan
    evaluations: int = 0
    trace: Tensor | None = None
    agreement: float = math.nan

    @property
    def weights(self) -> Tensor:
        """Normalised, ``(n,)``."""
        return self.log_weights.softmax(0)

    @property
    def log_evidence_error(self) -> float:
        """Standard error of the log evidence, from the scatter of the runs; NaN for one run."""
        if self.log_evidences is None or len(self.log_evidences) < 2:
            return math.nan
        relative = (self.log_evidences - self.log_evidence).exp()
        return float(relative.std() / math.sqrt(len(relative)))

    @property
    def mean(self) -> Tensor:
        """Of the posterior, ``(*event_shape)``."""
        return torch.einsum("n,n...->...", self.weights.to(self.draws), self.draws)

    @property
    def variance(self) -> Tensor:
        """Of each entry under the posterior, ``(*event_shape)``."""
        return torch.einsum("n,n...->...", self.weights.to(self.draws), (self.draws - self.mean).square())

    def resample(self, n: int | None = None) -> Tensor:
        """Draws of equal weight, ``(n, *event_shape)``, in random order.

        Arguments:
            n: how many, by default as many as there are.
        """
        n = len(self.draws) if n is None else n
        if n < 1:
            raise ValueError(f"n: got {n}, needs at least 1 draw.")
        copies = -(-n // len(self.draws))  # systematic resampling, of as many copies of each as are enough
        index = systematic(self.log_weights.repeat_interleave(copies)) // copies
        return self.draws[index[torch.randperm(len(index), device=index.device)[:n]]]


# -- a Gaussian under a likelihood ------------------------------------------------------------------------------------


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
            near = (fraction == 1) & ((value - new.expected).abs() <= 1e-3 + 1e-6 * new.expected.abs())
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
