r"""The Kullback-Leibler divergence of a Gaussian from a diffusion, by one call of the network.

Let a law :math:`q` and the diffusion's law :math:`p` both be forgotten by adding noise. The divergence between them
shrinks to zero on the way, and the rate at which it does is a difference of scores,

.. math:: \mathrm{KL}(q \,\|\, p) = \int_{\theta_0}^{\pi/2} \cot\theta \;
          \mathbb E_{q_\theta} \big\| v_q(u, \theta) - v_p(u, \theta) \big\|^2 \, \mathrm d\theta ,

with the velocity :math:`v_q` in closed form where :math:`q` is Gaussian in unconstrained space, as Pyro's guides are.
One angle drawn at random gives an unbiased estimate by *one* call, where the log density of the flow takes a solution
and its adjoint. It is exact for an exact network, and else the divergence from the law of the reverse stochastic
equation, an upper bound of that from its marginal. Angles are drawn where the integrand of such a :math:`q` is largest.

The divergence is registered with ``torch.distributions.kl``, so that ``TraceMeanField_ELBO`` finds it by itself. Pyro's
own evaluates the log density of every site of a trace all the same, without using it, by a solution of the equation;
that of ``pyro_genmods.infer`` does not, and a step then costs one call of the network.

References:
    Y. Song, C. Durkan, I. Murray, S. Ermon, Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    arXiv:2101.09258 (theorem 1). S. Lyu, Interpretation and Generalization of Score Matching, 2009, arXiv:1205.2629.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import MultivariateNormal
from torch import Size, Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, Normal
from torch.distributions.kl import register_kl
from torch.distributions.multivariate_normal import MultivariateNormal as TorchMultivariateNormal

from ..contract import GenerativeModel
from ..foundation.errors import ShapeError
from .law import DiffusionDistribution
from .lost import refuse_lost

__all__ = ["score_divergence"]

SPREAD = 1.4  # of the logarithm of the noise around that of the guide's own width
WIDEST = -1.0  # logarithm of the widest guide; a wider one too differs most where the data have their detail
WIDE = 0.2  # fraction of angles drawn from everywhere


def score_divergence(mean: Tensor, covariance: Tensor, law: DiffusionDistribution, draws: int = 1) -> Tensor:
    """An unbiased estimate of the divergence of a Gaussian from a diffusion, differentiable in the Gaussian.

    Arguments:
        mean: ``(*batch, features)``, in the unconstrained space of the law.
        covariance: ``(*batch, features, features)``.
        law: the law of a :class:`~pyro_genmods.Diffusion`.
        draws: angles for each Gaussian, one call of the network for all.

    Returns:
        ``(*batch,)``, in nats.

    Raises:
        IntegrationError: the network is NaN or infinite, and torch's validation is on; the rows are named, of
            ``draws * batch``.

    Example:
        >>> import pyro_genmods as gm
        >>> prior = gm.Diffusion(2)()         # its velocity is zero: a standard normal law
        >>> found = score_divergence(torch.tensor([1.0, 0.0]), torch.eye(2), prior, draws=4000)
        >>> abs(float(found) - 0.5) < 0.05    # the squared distance of the means, over two
        True
    """
    batch = torch.broadcast_shapes(mean.shape[:-1], covariance.shape[:-2], law.batch_shape)
    n = mean.shape[-1]
    m = mean.expand((*batch, n)).reshape(-1, n).repeat(draws, 1)
    cov = covariance.expand((*batch, n, n)).reshape(-1, n, n)
    c = None if law.context is None else law._context_rows(batch).repeat(draws, 1)
    m, cov = _white(law.model, m, cov)
    t, weight = _angles(law.model, cov.detach().diagonal(dim1=-2, dim2=-1), draws)
    # forgotten from the smallest angle on: u' = a u + sqrt(1 - a^2) noise
    a = t.cos() / math.cos(law.model.bottom)
    eye = torch.eye(n, dtype=m.dtype, device=m.device)
    forgotten = a[..., None].square() * cov.repeat(draws, 1, 1) + (1 - a.square())[..., None] * eye
    factor = torch.linalg.cholesky(forgotten)
    noise = torch.randn_like(m)[..., None]
    u = a * m + (factor @ noise).squeeze(-1)
    score = -torch.linalg.solve_triangular(factor.mT, noise, upper=True).squeeze(-1)
    gap = -t.tan() * (u + score) - law.model.denoiser.velocity(t, u, law.model.told(c))
    refuse_lost(gap)
    return (weight * gap.square().sum(-1)).reshape((draws, *batch)).mean(0)


def _white(model: GenerativeModel, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Moments in noisy white coordinates, where the smallest angle is."""
    standardization, whitening = model.coordinates.standardization, model.whitening
    factor = whitening.inverse_factor / standardization.scale * math.cos(model.bottom)
    return model.noisy(standardization(mean)), factor @ covariance @ factor.mT


def _angles(model: GenerativeModel, variances: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Angles ``(rows, 1)`` around where noise is as wide as the guide, and cotangents over their densities."""
    centre = 0.5 * variances.log().mean(-1).repeat(draws)[:, None]
    centre = centre.clamp(math.log(model.sigma_min), WIDEST)
    low, high = math.log(model.sigma_min), math.log(math.tan(min(model.top, math.atan(1e3))))
    rows = len(centre)
    u = (torch.randperm(rows, device=centre.device)[:, None] + torch.rand_like(centre)) / rows
    wide = torch.rand_like(centre) < WIDE
    level = torch.where(wide, low + (high - low) * u, centre + SPREAD * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    normal = (-0.5 * ((level - centre) / SPREAD).square()).exp() / (SPREAD * math.sqrt(2 * math.pi))
    inside = (level >= low) & (level <= high)
    density = WIDE * inside / (high - low) + (1 - WIDE) * normal
    t = level.clamp(low, high).exp().atan()
    # d theta = sin cos d log tan, so that cot(theta) d theta = cos^2 d log tan
    return t, torch.where(inside, t.cos().square() / density, 0.0)[:, 0]


def _flat(q: torch.distributions.Distribution, p: DiffusionDistribution) -> None:
    if not p.model.coordinates.identity or p.model.coordinates.native:
        raise NotImplementedError("the divergence in closed form is that of a Gaussian from an unconstrained law")
    if q.event_shape != p.event_shape:
        raise ShapeError(f"q: has events of shape {tuple(q.event_shape)}, the diffusion {tuple(p.event_shape)}.")


@register_kl(Independent, DiffusionDistribution)
def _kl_independent(q: Independent, p: DiffusionDistribution) -> Tensor:
    if not isinstance(q.base_dist, Normal):
        raise NotImplementedError("only Gaussian laws have a score in closed form here")
    _flat(q, p)
    shape = q.batch_shape + Size([p.event_shape.numel()])
    return score_divergence(q.mean.reshape(shape), torch.diag_embed(q.variance.reshape(shape)), p)


@register_kl(TorchMultivariateNormal, DiffusionDistribution)
@register_kl(MultivariateNormal, DiffusionDistribution)
@register_kl(LowRankMultivariateNormal, DiffusionDistribution)
def _kl_gaussian(q: torch.distributions.Distribution, p: DiffusionDistribution) -> Tensor:
    _flat(q, p)
    return score_divergence(q.mean, q.covariance_matrix, p)
