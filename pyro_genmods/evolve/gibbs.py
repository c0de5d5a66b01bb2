r"""Split Gibbs: the likelihood and the prior take turns, and the network is only ever asked to denoise.

The posterior is split into a datum :math:`x` of the prior and a copy :math:`z` under the likelihood, held together by a
spring,

.. math:: \pi_\rho(x, z) \propto p(x)\, \mathcal N(z \mid x, \rho^2 I)\, e^{\ell(z)} ,

of which :math:`x` has the posterior as :math:`\rho \to 0`, up to :math:`O(\rho^2)`. Given :math:`x`, :math:`z` is
moved by Hamiltonian Monte Carlo in coordinates made round by the curvature of the likelihood. Given :math:`z`,
:math:`x` is what a noisy row was before the noise: the reverse chain from the angle :math:`\arctan\rho`. The spring is
stiffened from sweep to sweep. There is no derivative of the network; the price is many calls, that chains hardly change
modes once it is stiff, and that few steps of the reverse chain make the posterior too narrow.

Reference:
    Z. Wu et al., Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors, 2024,
    arXiv:2405.18782 (PnP-DM).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contract import GenerativeModel
from ..foundation.chains import Plain, Step, hamiltonian, start
from ..foundation.errors import SamplingError
from .grid import angles_of, even_knots
from .law import DiffusionDistribution
from .likelihood import LogLikelihood, WhiteLikelihood
from .lost import carried
from .posterior import Posterior
from .samplers import Ancestral
from .twisted import one_law, rows_of_context

__all__ = ["SplitGibbs"]

MOST_ROUND = 128  # features up to which the curvature of the likelihood is computed
TARGET, GAIN = 0.8, 0.3  # acceptance, and how fast a chain's step size follows it
TIME = 1.5  # length of a trajectory where the target is round: a quarter of a period


class SplitGibbs:
    r"""Posterior draws under a diffusion prior and a differentiable likelihood, without a derivative of the network.

    Arguments:
        prior: a :class:`~pyro_genmods.Diffusion`, or its law at one context.
        log_likelihood: of events ``(rows, *event_shape)`` in the user's units, ``(rows,)``, each row for itself.
        num_chains: independent chains; each gives one draw.
        sweeps: turns of both.
        reverse_steps: calls of the network in a sweep.
        spring: first and last :math:`\rho`, in white standard deviations; the bias is of the order of the last one
            squared.
        annealing: fraction of the sweeps over which the spring is stiffened, geometrically.
        moves: Hamiltonian transitions in a sweep.
        leapfrogs: in each.
        context: one context ``(*context_shape)``, where a model is given.
        seed: makes the result repeatable; default a number drawn from torch's generator.

    Raises:
        ModelError: the likelihood has no gradient.
        SamplingError: it is NaN, or zero for a datum of the prior whatever the chain.
        IntegrationError: the network is NaN or infinite, whether or not torch's validation is on; step and rows are
            named.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> prior = gm.Diffusion(2)
        >>> _ = prior.start_at_identity()                    # a standard normal
        >>> likelihood = lambda x: torch.distributions.Normal(x[:, 0], 0.5).log_prob(torch.tensor(1.0))
        >>> posterior = SplitGibbs(prior, likelihood, num_chains=500, sweeps=40, seed=0).run()
        >>> abs(posterior.mean[0] - 0.8) < 0.15
        tensor(True)
    """

    def __init__(
        self,
        prior: GenerativeModel | DiffusionDistribution,
        log_likelihood: LogLikelihood,
        num_chains: int = 1000,
        *,
        sweeps: int = 120,
        reverse_steps: int = 10,
        spring: tuple[float, float] = (10.0, 0.03),
        annealing: float = 0.8,
        moves: int = 3,
        leapfrogs: int = 5,
        context: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        self._law = one_law(prior, context)
        for name, number in (
            ("num_chains", num_chains),
            ("sweeps", sweeps),
            ("reverse_steps", reverse_steps),
            ("moves", moves),
            ("leapfrogs", leapfrogs),
        ):
            if number < 1:
                raise ValueError(f"{name}: got {number}, needs at least 1.")
        self._model = self._law.model
        if not spring[0] >= spring[1] > math.tan(self._model.bottom):
            raise ValueError(
                f"spring: got {spring}, needs a first width and a smaller last one, both above the noise in the prior, "
                f"{math.tan(self._model.bottom):.3g}."
            )
        if not 0 <= annealing <= 1:
            raise ValueError(f"annealing: got {annealing}, needs a fraction of the sweeps between 0 and 1.")
        self.num_chains, self.sweeps, self.reverse_steps = num_chains, sweeps, reverse_steps
        self.spring, self.annealing, self.moves, self.leapfrogs = spring, annealing, moves, leapfrogs
        self.seed = seed
        self._likelihood = WhiteLikelihood(log_likelihood, self._model)

    def run(self) -> Posterior:
        """Run all chains; the draws are of equal weight, and there is no evidence."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        device = self._model.place[1]
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._sweep()

    def _sweep(self) -> Posterior:
        c = rows_of_context(self._law, self.num_chains)
        angles = self._model.angles(self.reverse_steps)
        x = self._reverse(self._model._noise(self.num_chains), c, angles)
        z, size = x, torch.full_like(x[:, :1], TIME / self.leapfrogs)
        for rho in self._springs():
            z, size = self._likely(x, z, rho, size)
            x = self._denoised(z, c, rho)
        return Posterior(
            draws=self._likelihood.events(x),
            log_weights=torch.zeros(len(x), dtype=torch.float64, device=x.device),
            ess=float(len(x)),
            evaluations=self.reverse_steps * (self.sweeps + 1),
        )

    def _springs(self) -> list[float]:
        first, last = self.spring
        stiffening = max(1.0, self.annealing * (self.sweeps - 1))
        return [first * (last / first) ** min(1.0, k / stiffening) for k in range(self.sweeps)]

    def _likely(self, x: Tensor, z: Tensor, rho: float, size: Tensor) -> tuple[Tensor, Tensor]:
        """Move the copies under likelihood and spring; each chain has a step size of its own."""
        scale = self._round(x, rho)
        target = Plain(lambda q: 0.5 * (scale(q) / rho).square().sum(-1) - self._likelihood(x + scale(q)))
        state = start(scale(z - x, True), target)
        if not bool(state.energy.isfinite().any()):
            raise SamplingError(
                f"log_likelihood: is -inf for all {len(x)} chains at the start; widen it, or take more chains."
            )
        for _ in range(self.moves):
            shorter = size * (0.5 + 0.5 * torch.rand_like(size))
            noise, log_uniform = torch.randn_like(x), torch.rand_like(state.energy).log()
            state, info = hamiltonian(
                state, target, Step(shorter, torch.ones_like(x[0]), noise, log_uniform, self.leapfrogs)
            )
            size = (size * ((info.acceptance[:, None] - TARGET) * GAIN).exp()).clamp_max(TIME / self.leapfrogs)
        return x + scale(state.position), size

    def _round(self, x: Tensor, rho: float) -> Any:
        r"""The map from round coordinates to steps, of covariance :math:`(I / \rho^2 + H(x))^{-1}`, and its inverse."""
        if x.shape[1] > MOST_ROUND:
            return lambda q, back=False: q / rho if back else q * rho
        factor = self._likelihood.positive_curvature(x)
        eye = torch.eye(x.shape[1]).to(factor)
        chol = torch.linalg.cholesky(factor @ factor.mT + eye / rho**2).to(x)

        def scale(q: Tensor, back: bool = False) -> Tensor:
            if back:
                return torch.einsum("nji,nj->ni", chol, q)
            return torch.linalg.solve_triangular(chol.mT, q[..., None], upper=True)[..., 0]

        return scale

    def _denoised(self, z: Tensor, c: Tensor | None, rho: float) -> Tensor:
        """What rows with noise of this standard deviation were before."""
        angle, bottom = math.atan(rho), self._model.bottom
        angles = angles_of(even_knots(bottom, angle), self.reverse_steps).flip(0).to(z)
        return self._reverse(z * math.cos(angle), c, angles)

    def _reverse(self, u: Tensor, c: Tensor | None, angles: Tensor) -> Tensor:
        chain = Ancestral(self.reverse_steps)
        end = carried(chain, self._model.denoiser, (u, c), angles, lambda: torch.randn_like(u), strict=True)
        return end / math.cos(self._model.bottom)
