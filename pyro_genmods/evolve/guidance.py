r"""Guidance: a denoiser bent towards a likelihood, which any sampler runs in place of the model's own.

At a noisy row :math:`u` the datum has a mean :math:`D` and a covariance :math:`V`. Near :math:`D` the log likelihood is
:math:`\ell(D) + g^\top (x - D) - \tfrac12 (x - D)^\top H (x - D)`, with its gradient and its curvature :math:`H`, of
which what is negative is left away. Were the datum Gaussian, its likelihood given :math:`u` and its mean given the
likelihood too were

.. math::
    \log \psi = \ell(D) + \tfrac12\, g^\top V (I + H V)^{-1} g - \tfrac12 \log\det(I + H V), \qquad
    \tilde D = D + V (I + H V)^{-1} g ,

and :math:`\tilde D` in the place of :math:`D` is the guidance, :math:`\tilde v = v - (\tilde D - D) / \sin\theta`.
Where :math:`\ell` is that of :math:`y = A x + \varepsilon` with :math:`\varepsilon \sim \mathcal N(0, R)`, this is the
Kalman gain, :math:`\tilde D - D = V A^\top (R + A V A^\top)^{-1} (y - A D)`. Guidances differ in what they take for
:math:`V`:

* :class:`MomentMatching`: Tweedie's covariance :math:`\frac{\sin^2\theta}{\cos\theta} \frac{\partial D}{\partial u}`.
  With :math:`H = B B^\top` only :math:`V B` is needed, by as many reverse passes as the likelihood has directions of
  curvature. Exact where the prior is Gaussian. Beyond some features it is made diagonal, by one reverse pass.
* :class:`PiGDM`: :math:`\sin^2\theta\, I`, which white Gaussian data have.
* :class:`DPS`: follows :math:`\nabla_u\, \ell(D(u))`, as if the datum were certain to be :math:`D`.

None is exact where the prior is not Gaussian: modes get wrong weights. :class:`~pyro_genmods.evolve.TwistedSMC` takes
them for proposals, and puts that right. Nothing depends on which other rows are in the batch.

References:
    H. Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2022, arXiv:2209.14687. J. Song et
    al., Pseudoinverse-Guided Diffusion Models for Inverse Problems, 2023, ICLR. B. Boys et al., Tweedie Moment
    Projected Diffusions for Inverse Problems, 2023, arXiv:2310.06721. F. Rozet et al., Learning Diffusion Priors from
    Observations by Expectation Maximization, 2024, arXiv:2405.13712. J. Ho, T. Salimans, Classifier-Free Diffusion
    Guidance, 2022, arXiv:2207.12598.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import GenerativeModel
from ..foundation.divergence import jacobian_products
from ..foundation.errors import ModelError
from ..foundation.ode import FixedStep
from ..foundation.shapes import Rows, Values
from .conditioning import conditioned, conditioned_diagonal
from .denoiser import NOISE_ONLY, Denoiser
from .likelihood import LogLikelihood, WhiteLikelihood
from .lost import LostRowsError
from .sampled import SampledLaw
from .samplers import Ancestral, Sampler

__all__ = ["DPS", "ClassifierFree", "Guidance", "Guided", "Look", "MomentMatching", "PiGDM", "guided"]

Spread = Callable[[Tensor], Tensor]


class Look(NamedTuple):
    """What is known at noisy rows.

    Attributes:
        datum: mean of the white datum, ``(rows, features)``.
        guided: the same given the likelihood.
        log_psi: log likelihood given the noisy row, ``(rows,)``; minus infinity where it is at the mean.
    """

    datum: Rows
    guided: Rows
    log_psi: Values


@dataclass(frozen=True)
class Guidance(ABC):
    """How a likelihood bends a denoiser."""

    @abstractmethod
    def look(self, denoiser: Denoiser, likelihood: WhiteLikelihood, t: Tensor, u: Tensor, c: Tensor | None) -> Look:
        """See what is known at noisy white rows ``(rows, features)`` at an angle, by one call of the denoiser."""

    def around(self, denoiser: Denoiser, likelihood: WhiteLikelihood | None) -> Denoiser:
        """The denoiser that is guided."""
        if likelihood is None:
            raise ModelError(f"log_likelihood: is None, and {type(self).__name__} has nothing to follow.")
        return Guided(denoiser, likelihood, self)


@dataclass(frozen=True)
class Guided(Denoiser):
    """A denoiser bent towards a likelihood, without a gradient of its own."""

    inner: Denoiser
    likelihood: WhiteLikelihood
    guidance: Guidance

    @torch.no_grad()
    def denoised(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        try:
            return self.guidance.look(self.inner, self.likelihood, t, u, c).guided
        except LostRowsError as error:
            raise LostRowsError(error.lost, t) from None

    @torch.no_grad()
    def velocity(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        return (t.cos() * u - self.denoised(t, u, c)) / t.sin()


@dataclass(frozen=True)
class MomentMatching(Guidance):
    """Guidance by Tweedie's covariance of the datum, exact for Gaussian priors: the best there is.

    Arguments:
        exact_features: features up to which the covariance is used as it is, by as many reverse passes of the network
            as the likelihood has directions of curvature; beyond, its row sums are taken for a diagonal.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> prior = gm.Diffusion(2)
        >>> posterior = guided(prior, lambda x: -0.5 * ((1 - x[:, 0]) / 0.3) ** 2, MomentMatching())
        >>> posterior().sample((5,)).shape
        torch.Size([5, 2])
    """

    exact_features: int = 128

    def look(self, denoiser: Denoiser, likelihood: WhiteLikelihood, t: Tensor, u: Tensor, c: Tensor | None) -> Look:
        datum, spread = tweedie(denoiser, t, u, c)
        if u.shape[1] <= self.exact_features:
            return Look(datum, *conditioned(likelihood, datum, spread))
        return Look(datum, *conditioned_diagonal(likelihood, datum, spread(torch.ones_like(u)[None])[0].clamp_min(0)))


@dataclass(frozen=True)
class PiGDM(Guidance):
    r"""Guidance by the covariance :math:`\sin^2\theta\, I` of white Gaussian data: no reverse pass of the network.

    Arguments:
        exact_features: features up to which the curvature of the likelihood is computed in full; beyond, products with
            it are enough, by conjugate gradients.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> posterior = guided(gm.Diffusion(2), lambda x: -0.5 * ((1 - x[:, 0]) / 0.3) ** 2, PiGDM())
        >>> posterior().sample((5,)).shape
        torch.Size([5, 2])
    """

    exact_features: int = 128

    def look(self, denoiser: Denoiser, likelihood: WhiteLikelihood, t: Tensor, u: Tensor, c: Tensor | None) -> Look:
        with torch.no_grad():
            datum = denoiser.denoised(t, u, c)
        variance = t.sin().square()
        if u.shape[1] <= self.exact_features:
            return Look(datum, *conditioned(likelihood, datum, lambda w: variance * w))
        return Look(datum, *conditioned_diagonal(likelihood, datum, variance.expand_as(u)))


@dataclass(frozen=True)
class DPS(Guidance):
    r"""Guidance by the gradient of :math:`\ell(D(u))`, with no account of how uncertain the datum is.

    .. math:: \tilde D = D + \zeta\, V g, \qquad \text{shortened to } \sin\theta \sqrt n \text{ where it is longer}

    with Tweedie's :math:`V`, of which the product with :math:`g` is the gradient. Each row is shortened by its own
    length. The cheapest and the worst of the guidances; for likelihoods without second derivatives.

    Arguments:
        scale: :math:`\zeta`.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> posterior = guided(gm.Diffusion(2), lambda x: -0.5 * ((1 - x[:, 0]) / 0.3) ** 2, DPS(0.5))
        >>> posterior().sample((5,)).shape
        torch.Size([5, 2])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale: got {self.scale}, needs a positive number.")

    def look(self, denoiser: Denoiser, likelihood: WhiteLikelihood, t: Tensor, u: Tensor, c: Tensor | None) -> Look:
        datum, spread = tweedie(denoiser, t, u, c)
        values, gradients, _ = likelihood.slope(datum)
        move = self.scale * spread(gradients[None])[0]
        length = move.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
        return Look(datum, datum + move * (t.sin() * u.shape[1] ** 0.5 / length).clamp_max(1), values)


def tweedie(denoiser: Denoiser, t: Tensor, u: Tensor, c: Tensor | None) -> tuple[Rows, Spread]:
    r"""Mean of the white datum, and products of its covariance with vectors ``(k, rows, features)``.

    They are those of :math:`V^\top`, which is the same where the network is the gradient of something, as an exact one
    is; where all is noise the covariance is the identity, that of white data.
    """
    with torch.no_grad():
        datum, products = jacobian_products(lambda u: denoiser.denoised(t, u, c), u)
    late = t > NOISE_ONLY
    factor = t.sin().square() / torch.where(late, 1.0, t.cos())

    @torch.no_grad()
    def spread(w: Tensor) -> Tensor:
        return torch.where(late, w, factor * products(w))

    return datum.detach(), spread


@dataclass(frozen=True)
class ClassifierFree:
    r"""Guidance towards a context, for models that know the law without it too.

    .. math:: v = v_\varnothing + w\, (v_c - v_\varnothing)

    Arguments:
        weight: 0 leaves the context away, 1 is the model, more overstates what the context says. The law is then no
            posterior of anything.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Diffusion(2, context_features=1, context_dropout=0.1)
        >>> guided(model, None, ClassifierFree(2.0))(torch.zeros(1)).sample((5,)).shape
        torch.Size([5, 2])
    """

    weight: float = 2.0

    def around(self, denoiser: Denoiser, likelihood: WhiteLikelihood | None) -> Denoiser:
        """The denoiser that is guided."""
        if likelihood is not None:
            raise ModelError("log_likelihood: ClassifierFree follows the context alone; give None.")
        return TowardsContext(denoiser, self.weight)


@dataclass(frozen=True)
class TowardsContext(Denoiser):
    """The mixture of a denoiser that is told the context, and of the same that is not."""

    inner: Denoiser
    weight: float

    def velocity(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        without = self.inner.velocity(t, u, torch.zeros_like(c))
        return without + self.weight * (self.inner.velocity(t, u, c) - without)


class GuidedLaw(SampledLaw):
    """The law of what a sampler makes of a guided denoiser.

    Arguments:
        diffusion: a :class:`~pyro_genmods.Diffusion`.
        denoiser: in the place of its own.
        sampler: see :class:`~pyro_genmods.evolve.SampledLaw`.
    """

    def __init__(self, diffusion: GenerativeModel, denoiser: Denoiser, sampler: Sampler | FixedStep) -> None:
        super().__init__(diffusion, sampler)
        self.denoiser, self.has_rsample = denoiser, False

    @property
    def _asked(self) -> Denoiser:
        return self.denoiser


def guided(
    diffusion: GenerativeModel,
    log_likelihood: LogLikelihood | None,
    guidance: Guidance | ClassifierFree | None = None,
    *,
    sampler: Sampler | FixedStep | None = None,
) -> GuidedLaw:
    r"""A law near the posterior :math:`p(x) e^{\ell(x)}`, by a guided denoiser.

    Arguments:
        diffusion: the prior, a :class:`~pyro_genmods.Diffusion`.
        log_likelihood: of events ``(rows, *event_shape)`` in the user's units, ``(rows,)``, each row for itself.
        guidance: by default :class:`MomentMatching`.
        sampler: by default a hundred steps of the ancestral chain.

    Raises:
        ModelError: a likelihood without the derivatives that the guidance takes, or a model that does not know the law
            without its context.
        IntegrationError: when it draws, rows that the network makes NaN or infinite, for which there is no likelihood;
            step and rows are named.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> prior = gm.Diffusion(2)                          # untrained: a standard normal
        >>> half = guided(prior, lambda x: (x[:, 0] > 0).to(x), PiGDM())
        >>> half().sample((5,))
        Traceback (most recent call last):
        ...
        pyro_genmods.foundation.errors.ModelError: log_likelihood: has no gradient with respect to the event, ...
    """
    if not hasattr(diffusion, "denoiser"):
        raise TypeError(f"diffusion: got {type(diffusion).__name__}, needs a Diffusion.")
    guidance = MomentMatching() if guidance is None else guidance
    if isinstance(guidance, ClassifierFree) and not diffusion.context_dropout:
        raise ModelError(
            "guidance: ClassifierFree needs a model that knows the law without its context too; make it with "
            "Diffusion(..., context_dropout=0.1) and fit it."
        )
    likelihood = None if log_likelihood is None else WhiteLikelihood(log_likelihood, diffusion)
    return GuidedLaw(diffusion, guidance.around(diffusion.denoiser, likelihood), sampler or Ancestral(100))
