r"""Twisted sequential Monte Carlo: guidance put right by weights, with an evidence.

Particles walk down the ancestral chain of a diffusion, with steps :math:`p(u_s \mid u_t)`, and are steered: a guidance
knows :math:`\psi_t(u_t)`, near the mean likelihood of what :math:`u_t` is going to be, and proposes :math:`q(u_s \mid
u_t)`, the same step towards the guided mean of the datum. With the weights

.. math::
    w_0 = \psi_0(u_0), \qquad
    w_s = w_t\, \frac{p(u_s \mid u_t)}{q(u_s \mid u_t)}\, \frac{\psi_s(u_s)}{\psi_t(u_t)}, \qquad
    \psi_{\text{last}} = e^{\ell(x)}

the particles are draws of the posterior under the *chain's* law :math:`p`, of as many steps, whatever :math:`\psi` is;
a good one keeps the weights even. They are exchanged for copies (systematic resampling) when worth less than half the
particles, and their mean is an unbiased estimate of the evidence :math:`\int p(x)\, e^{\ell(x)}\, \mathrm dx`.

Reference:
    L. Wu, B. L. Trippe, C. A. Naesseth, D. M. Blei, J. P. Cunningham, Practical and Asymptotically Exact Conditional
    Sampling in Diffusion Models, 2023, arXiv:2306.17775.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..contract import GenerativeModel
from ..foundation.errors import SamplingError, ShapeError
from ..foundation.resampling import effective_sample_size, systematic
from .guidance import Guidance, Look, MomentMatching
from .law import DiffusionDistribution
from .likelihood import LogLikelihood, WhiteLikelihood
from .lost import LostRowsError
from .posterior import Posterior
from .samplers import Ancestral

__all__ = ["TwistedSMC"]

DISAGREEMENT = 1.05  # of runs, in units of R-hat, that is worth a warning


class TwistedSMC:
    r"""Posterior draws and evidence under a diffusion prior and a differentiable likelihood.

    Arguments:
        prior: a :class:`~pyro_genmods.Diffusion`, or its law at one context.
        log_likelihood: of events ``(rows, *event_shape)`` in the user's units, ``(rows,)``, each row for itself.
        num_particles: in each run.
        steps: of the ancestral chain; as many calls of the network.
        guidance: which twists the chain; the exact result does not depend on it, the number of particles needed does.
        context: one context ``(*context_shape)``, where a model is given.
        num_runs: independent runs, made side by side. Their agreement is the only diagnostic that can see a missed
            mode, and their scatter is the error of the evidence.
        threshold: fraction of the particles below which they are resampled.
        seed: makes the result repeatable; default a number drawn from torch's generator.
        progress_bar: show effective number of particles and log evidence.

    Raises:
        SamplingError: no particle has a likelihood above zero, or it is NaN.
        IntegrationError: the network is NaN or infinite, whether or not torch's validation is on: nothing else has a
            likelihood. Step and rows are named.
        ModelError: the likelihood lacks the derivatives that the guidance takes.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> prior = gm.Diffusion(2)
        >>> _ = prior.start_at_identity()                    # a standard normal
        >>> likelihood = lambda x: torch.distributions.Normal(x[:, 0], 0.5).log_prob(torch.tensor(1.0))
        >>> posterior = TwistedSMC(prior, likelihood, num_particles=500, steps=20, seed=0).run()
        >>> abs(posterior.mean[0] - 0.8) < 0.1, abs(posterior.log_evidence + 1.4305) < 0.1
        (tensor(True), True)
        >>> posterior.resample(10).shape
        torch.Size([10, 2])
    """

    def __init__(
        self,
        prior: GenerativeModel | DiffusionDistribution,
        log_likelihood: LogLikelihood,
        num_particles: int = 1000,
        *,
        steps: int = 200,
        guidance: Guidance | None = None,
        context: Tensor | None = None,
        num_runs: int = 1,
        threshold: float = 0.5,
        seed: int | None = None,
        progress_bar: bool = False,
    ) -> None:
        self._law = one_law(prior, context)
        for name, number, least in (
            ("num_particles", num_particles, 2),
            ("steps", steps, 1),
            ("num_runs", num_runs, 1),
        ):
            if number < least:
                raise ValueError(f"{name}: got {number}, needs at least {least}.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, needs a fraction of the particles between 0 and 1.")
        self.num_particles, self.steps, self.num_runs = num_particles, steps, num_runs
        self.guidance = MomentMatching() if guidance is None else guidance
        self.threshold, self.seed, self.progress_bar = threshold, seed, progress_bar
        self._model = self._law.model
        self._likelihood = WhiteLikelihood(log_likelihood, self._model)

    def run(self) -> Posterior:
        """Make all runs."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        device = self._model.place[1]
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._walk()

    def _walk(self) -> Posterior:
        model, chain, n = self._model, Ancestral(self.steps), self.num_runs * self.num_particles
        angles = model.angles(self.steps)
        c = rows_of_context(self._law, n)
        u, trace = model._noise(n), []
        look = self._look(0, angles[0], u, c)
        log_weights = look.log_psi
        with tqdm(total=self.steps, disable=not self.progress_bar, desc="twisted") as bar:
            for index, (t, s) in enumerate(pairwise(angles)):
                trace.append(effective_sample_size(self._by_run(log_weights)))
                u, look, log_weights = self._resampled(u, look, log_weights, trace[-1])
                plain, sd = chain.mean(look.datum, (u - t.cos() * look.datum) / t.sin(), t, s)
                steered, _ = chain.mean(look.guided, (u - t.cos() * look.guided) / t.sin(), t, s)
                moved = torch.addcmul(steered, torch.randn_like(u), sd)
                ratio = ((moved - steered).square() - (moved - plain).square()).double().sum(-1) / (
                    2 * sd.double() ** 2
                )
                before, u = look.log_psi, moved
                look = self._look(index + 1, s, u, c) if index < self.steps - 1 else self._last(u)
                log_weights = log_weights + ratio + look.log_psi - before
                bar.update()
                bar.set_postfix(ess=f"{float(trace[-1].mean()):.0f}", log_evidence=f"{_log_mean(log_weights):.2f}")
        return self._posterior(look.datum, log_weights, torch.stack(trace, 1))

    def _look(self, index: int, t: Tensor, u: Tensor, c: Tensor | None) -> Look:
        """What the guidance sees; where it sees nothing possible, which may come yet, the least that others see."""
        try:
            look = self.guidance.look(self._model.denoiser, self._likelihood, t, u, c)
        except LostRowsError as error:
            raise LostRowsError(error.lost, t, index + 1, self.steps) from None
        known = look.log_psi.isfinite()
        least = look.log_psi[known].min() if bool(known.any()) else look.log_psi.new_zeros(())
        return look._replace(log_psi=torch.where(known, look.log_psi, least).double())

    def _last(self, u: Tensor) -> Look:
        white = u / math.cos(self._model.bottom)
        try:
            values = self._likelihood(white).double()
        except LostRowsError as error:
            raise error.during(self.steps, self.steps) from None
        if not bool((values > -torch.inf).any()):
            raise SamplingError(
                f"log_likelihood: is -inf for all {len(values)} particles; the prior hardly reaches the data, or the "
                "likelihood is zero outside a small region. Widen it (a noise of its own, a softer edge), or take more "
                "particles."
            )
        return Look(white, white, values)

    def _by_run(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.num_runs, self.num_particles)

    def _resampled(self, u: Tensor, look: Look, log_weights: Tensor, ess: Tensor) -> tuple[Tensor, Look, Tensor]:
        """Exchange weights for copies in the runs where they are worth too little; each run keeps its mean weight."""
        poor = ess < self.threshold * self.num_particles
        if not bool(poor.any()):
            return u, look, log_weights
        weights = self._by_run(log_weights)
        index = torch.arange(len(u), device=u.device).reshape(weights.shape).clone()
        index[poor] = index[poor][:, :1] + systematic(weights[poor])
        even = weights.logsumexp(-1, keepdim=True) - math.log(self.num_particles)
        log_weights = torch.where(poor[:, None], even, weights).flatten()
        index = index.flatten()
        return u[index], Look(*(rows[index] for rows in look)), log_weights

    def _posterior(self, white: Tensor, log_weights: Tensor, trace: Tensor) -> Posterior:
        weights = self._by_run(log_weights)
        evidences = weights.logsumexp(-1) - math.log(self.num_particles)
        agreement = self._agreement(white, weights)
        if agreement > DISAGREEMENT:
            warnings.warn(
                f"runs disagree (R-hat between their means {agreement:.2f}): modes may be missed, or their weights "
                "badly known; take more particles.",
                stacklevel=4,
            )
        return Posterior(
            draws=self._likelihood.events(white),
            log_weights=log_weights,
            log_evidence=_log_mean(log_weights),
            log_evidences=evidences,
            ess=float(effective_sample_size(log_weights)),
            evaluations=self.steps,
            trace=trace,
            agreement=agreement,
        )

    def _agreement(self, white: Tensor, weights: Tensor) -> float:
        if self.num_runs == 1:
            return math.nan
        rows = white.double().reshape(*weights.shape, -1)
        share = weights.softmax(-1)[..., None]
        means = (share * rows).sum(1)
        within = (share * (rows - means[:, None]).square()).sum(1).mean(0)
        return float((1 + means.var(0) / within.clamp_min(1e-30)).sqrt().max())


def one_law(prior: Any, context: Tensor | None) -> DiffusionDistribution:
    """The law of a diffusion at one context.

    Raises:
        TypeError: no diffusion.
        ShapeError: several contexts, or one given twice.
    """
    if isinstance(prior, DiffusionDistribution):
        if context is not None:
            raise ShapeError("context: the law that is given has its own; give the model, or no context.")
        law = prior
    elif hasattr(prior, "denoiser") and hasattr(prior, "angles"):
        law = prior(context)
    else:
        raise TypeError(f"prior: got {type(prior).__name__}, needs a Diffusion, or its law at a context.")
    if law.batch_shape:
        raise ShapeError(
            f"prior: a law of batch shape {tuple(law.batch_shape)} is several priors; give one context at a time."
        )
    return law


def rows_of_context(law: DiffusionDistribution, n: int) -> Tensor | None:
    """The context of a law as so many rows that the network is told."""
    return law.model.told(law._draw_shape([n])[1])


def _log_mean(log_weights: Tensor) -> float:
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))
