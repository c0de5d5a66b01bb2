r"""The exchange algorithm: a few latents upstream of laws whose constant is unknown.

For a law :math:`p(x \mid c) = f(x, c) / Z(c)` whose context :math:`c` is inferred, no accept test can be computed: it
needs :math:`Z(c) / Z(c')`. With an auxiliary draw at the *proposed* context the unknowns cancel: from :math:`c`, with
everything else held,

1. propose :math:`c'` by a random walk, and draw :math:`w \sim f(\cdot, c') / Z(c')` of the shape of :math:`x`;
2. accept with probability

.. math:: \min \Bigl( 1, \;
          \frac{\pi(c', x, y)\, f(w, c)}{\pi(c, x, y)\, f(w, c')} \Bigr), \qquad
          \pi(c, x, y) = p(c)\, f(x, c)\, p(y \mid c, x) ,

in which the unnormalised joint :math:`\pi` is all that is asked of the program. :math:`x` may be observed, a likelihood
of many data, or a latent; in between, all other latents move by Hamiltonian Monte Carlo with :math:`c` held, where the
constants cancel. This is exact if :math:`w` is. Where the law needs a chain to draw, :math:`w` is the end of an inner
chain from :math:`x`, and the answer is right up to what that chain has not forgotten: repeat with twice as many
transitions, and see whether it moves.

References:
    I. Murray, Z. Ghahramani, D. J. C. MacKay, MCMC for Doubly-Intractable Distributions, 2006, arXiv:1206.6848.
    F. Liang, A double Metropolis-Hastings sampler for spatial models with intractable normalizing constants, 2010,
    Journal of Statistical Computation and Simulation 80(9).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.util import diagnostics, print_summary, select_samples
from torch import Tensor
from tqdm import tqdm

from ..foundation.adaptation import DualAveraging, Moments, halton, harmonic_mean
from ..foundation.chains import Step, hamiltonian, metropolis, scaled, start
from ..foundation.errors import ModelError, SamplingError
from .auxiliary import EnergySite, InnerChains, energy_sites, licensed
from .intractable import upstream
from .potential import Potential, potential

__all__ = ["Exchange"]

TARGETS = {1: 0.44, 2: 0.35}  # acceptance of a random walk by its dimension; .25 beyond
LENGTH, MOST_LEAPFROGS, HAMILTONIAN_TARGET = 1.3, 64, 0.7
RESTARTS = (0.1, 0.25, 0.5, 0.75)  # of the warm-up, where scales are taken and moments start afresh
TYPICAL_LEAPFROGS = 8.0
STUCK = 0.01
ROUNDING = 0.1  # nats of the accept test that may be rounding error


class Exchange:
    r"""The exchange algorithm over many chains at once.

    Arguments:
        model: a Pyro program in which the unknown constants of energies depend on a few continuous latents.
        num_samples: draws to keep of each chain.
        warmup_steps: iterations before, in which step sizes and scales are learned; they are then fixed.
        num_chains: chains, moved together.
        inner: transitions of the inner chain for each auxiliary draw of a law that needs a chain; ``None`` for the
            law's own sampler, which is slower, and independent of where the chain is.
        seed: makes the run repeatable; default a number drawn from torch's generator.
        init_strategy: where chains start, as in :class:`HMC`.
        progress_bar: show how far it is.
        options: ``level``, ``road``, ``max_batch``, ``transforms``, ``max_plate_nesting`` of
            :func:`pyro_genmods.infer.potential`.

    Attributes:
        upstream: for every energy site, the latents on which its constant depends.
        acceptance: of exchange moves of each chain since the warm-up, ``(chains,)``.
        inner_gradients: evaluated for auxiliary draws in the last run, event by event.

    Raises:
        ModelError: no constant depends on a latent; one depends on a discrete latent; a law without a context, or with
            a scale.
        SamplingError: hardly a proposal is accepted.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> energy = gm.Energy(1, context_features=1, network=lambda y, c: c[:, 0] * y[:, 0] ** 2 / 2, base=None)
        >>> def model(y):                                       # y of precision theta, without its constant
        ...     theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", energy(theta[..., None, None].expand(theta.shape + (len(y), 1))), obs=y)
        >>> exchange = Exchange(model, 100, 50, num_chains=32, inner=5, seed=0, progress_bar=False)
        >>> exchange.run(torch.tensor([[0.5], [-0.5], [0.3], [1.0]]))
        >>> exchange.upstream, abs(float(exchange.get_samples()["theta"].mean()) - 4 / 1.795) < 0.3
        ({'y': ['theta']}, True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_samples: int = 500,
        warmup_steps: int = 200,
        num_chains: int = 64,
        *,
        inner: int | None = 10,
        seed: int | None = None,
        init_strategy: Any = init_to_uniform,
        progress_bar: bool = True,
        **options: Any,
    ) -> None:
        least = {"num_samples": (num_samples, 1), "warmup_steps": (warmup_steps, 0), "num_chains": (num_chains, 2)}
        for name, (number, limit) in least.items():
            if number < limit:
                raise ValueError(f"{name}: got {number}, needs at least {limit}.")
        if inner is not None and inner < 1:
            raise ValueError(f"inner: got {inner}, needs at least 1 transition, or None for the laws' own samplers.")
        self.model, self.num_samples, self.warmup_steps, self.num_chains = model, num_samples, warmup_steps, num_chains
        self.inner, self.seed, self.init_strategy, self.progress_bar = inner, seed, init_strategy, progress_bar
        self._options = options
        self.kernel = self  # what reads chains asks the kernel for its model
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._draws: list[tuple[Tensor, ...]] = []

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Warm up and sample, with the arguments of the model. Ctrl-C keeps the draws that are finished."""
        self._args, self._kwargs, self._draws = args, kwargs, []
        self._begin(args, kwargs)
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=devices):  # laws' own samplers draw from the global generator
            torch.manual_seed(seed)
            self._place()
            try:
                for index in tqdm(range(self.warmup_steps + self.num_samples), disable=not self.progress_bar):
                    self._iterate(index)
            except KeyboardInterrupt:
                if not self._draws:
                    raise
                done = f"{len(self._draws)} of {self.num_samples}"
                warnings.warn(f"interrupted: {done} draws of each chain are kept.", stacklevel=2)
        if float(self.acceptance.mean()) < STUCK:
            raise SamplingError(
                f"exchange moves are accepted in {float(self.acceptance.mean()):.1%} of cases: the walk is too wide "
                "after so short a warm-up, or auxiliary draws differ too much from the data; take more warmup_steps or "
                "inner transitions, and float64 where energies are large. Draws are kept for inspection."
            )

    def _iterate(self, index: int) -> None:
        warm = index < self.warmup_steps
        rate = self._exchange(warm)
        diverging, acceptance = self._move_rest(index, warm)
        if warm:
            self._learn(index + 1)
        else:
            self._draws.append((self._state.position, rate, acceptance, diverging))

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The unnormalised joint density, and what is upstream of its energies."""
        self.upstream = {name: latents for name, latents in upstream(self.model, args, kwargs).items() if latents}
        if not self.upstream:
            raise ModelError("model: no unknown constant depends on a latent, so nothing is exchanged; use infer.MCMC.")
        self.potential: Potential = potential(licensed(self.model), args, kwargs, **self._options)
        layout = self.potential.layout
        wanted = {latent for latents in self.upstream.values() for latent in latents}
        strange = sorted(wanted - set(layout.shapes))
        if strange or self.potential.program.enumerated:
            raise ModelError(
                f"site {(strange or ['of discrete values'])[0]!r}: discrete latents are summed out, and the unknown "
                "constants of a sum do not cancel; observe them, or give the energies a normaliser."
            )
        owner = [name for name, shape in layout.shapes.items() for _ in range(shape.numel())]
        self._held = torch.tensor([name in wanted for name in owner], device=self.potential.device)

    def _place(self) -> None:
        """Chains where they start, and what is learned from them."""
        q = self.potential.initial(self.num_chains, self.init_strategy)
        self.potential.plan((self.warmup_steps + self.num_samples) * TYPICAL_LEAPFROGS)
        self._sites, self._contexts_at = energy_sites(self.potential.program, list(self.upstream), q[0])
        self._state, self._contexts = start(q, self.potential), self._contexts_at(q)
        held, rest = int(self._held.sum()), int((~self._held).sum())
        self._walk = DualAveraging.around(2.4 / math.sqrt(held), TARGETS.get(held, 0.25), len(q))
        self._walk_scale = torch.eye(held).to(q)
        self._step = DualAveraging.around(0.1 * max(rest, 1) ** -0.25, HAMILTONIAN_TARGET, len(q))
        self._scale = (~self._held).to(q)
        self._moments, self._rest_moments = Moments(q[:, self._held].mean(0), dense=True), Moments(q.mean(0))
        self._chains = [InnerChains(site, self.inner or 1) for site in self._sites]

    def _exchange(self, warm: bool) -> Tensor:
        """Propose what is upstream; returns acceptance probabilities."""
        state = self._state
        size = self._walk.size if warm else self._walk.final
        noise = torch.randn_like(state.position[:, self._held])
        q = state.position.clone()
        q[:, self._held] += size * scaled(self._walk_scale, noise)
        new, contexts = start(q, self.potential), self._contexts_at(q)
        log_ratio, largest = state.energy - new.energy, torch.maximum(state.energy.abs(), new.energy.abs())
        values = self.potential.constrain(q)
        pairs = zip(self._sites, self._chains, self._contexts, contexts, strict=True)
        for site, chains, old_context, context in pairs:
            w = self._auxiliary(site, chains, context, values, warm)
            here, there = site.log_prob(old_context, w), site.log_prob(context, w)
            log_ratio = log_ratio + here - there
            largest = torch.maximum(largest, torch.maximum(here.abs(), there.abs()))
        lost = largest * torch.finfo(largest.dtype).eps > ROUNDING  # large numbers cancel, and rounding error is left
        log_ratio = torch.where(lost, -torch.inf, log_ratio)
        log_uniform = torch.rand_like(log_ratio).log()
        self._state, probability, accepted, _ = metropolis(state, new, log_ratio, log_uniform)
        self._contexts = [
            torch.where(accepted.reshape(-1, *(1,) * (new.dim() - 1)), new, old)
            for new, old in zip(contexts, self._contexts, strict=True)
        ]
        if warm:
            self._walk.update(float(probability.mean()))
        return probability

    def _auxiliary(
        self, site: EnergySite, chains: InnerChains, context: Tensor, values: dict[str, Tensor], warm: bool
    ) -> Tensor:
        """Draws of a law at contexts, of the shape of the site for each chain."""
        law = site.at(context)
        if site.exact or site.discrete or self.inner is None:
            return law.sample()
        x = values[site.name] if site.value is None else site.value
        return chains.draw(context, x.expand(law.batch_shape + law.event_shape), warm)

    def _move_rest(self, index: int, warm: bool) -> tuple[Tensor, Tensor]:
        """Move everything else by Hamiltonian Monte Carlo; returns who diverged, and acceptance."""
        position = self._state.position
        if bool(self._held.all()):
            return torch.zeros_like(position[:, 0], dtype=torch.bool), torch.ones_like(position[:, 0])
        size = self._step.size if warm else self._step.final
        leapfrogs = max(1, min(MOST_LEAPFROGS, math.ceil(LENGTH * (0.5 + halton(index + 1)) / size)))
        noise, log_uniform = torch.randn_like(position), torch.rand_like(position[:, 0]).log()
        step = Step(position.new_full((len(position), 1), size), self._scale, noise, log_uniform, leapfrogs)
        self._state, info = hamiltonian(self._state, self.potential, step)
        if warm:
            everyone = torch.ones_like(info.accepted)
            self._step.update(harmonic_mean(info.acceptance, everyone, least=0.05))
        return info.diverging, info.acceptance

    def _learn(self, done: int) -> None:
        """Scales, from all chains."""
        q = self._state.position
        self._moments.update(q[:, self._held])
        self._rest_moments.update(q)
        if done in {int(f * self.warmup_steps) for f in RESTARTS} and self._moments.count > 10 * int(self._held.sum()):
            self._walk_scale = self._moments.scale(dense=True)
            self._scale = torch.where(self._held, 0.0, self._rest_moments.scale())
            for moments in (self._moments, self._rest_moments):
                moments.restart()
            self._walk.restart()
            self._step.restart()

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def unconstrained(self) -> Tensor:
        """Draws as rows, ``(chains, draws, dim)``."""
        return self._column(0)

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """Statistics of every draw, ``(chains, draws)``."""
        names = ("exchange_rate", "acceptance_rate", "diverging")
        return {name: self._column(i + 1) for i, name in enumerate(names)}

    @property
    def acceptance(self) -> Tensor:
        return self._column(1).mean(1)

    @property
    def inner_gradients(self) -> int:
        return sum(chains.gradients for chains in self._chains)

    def _column(self, i: int) -> Tensor:
        if not self._draws:
            raise RuntimeError("Exchange: has no draws yet; call run() first.")
        return torch.stack([draw[i] for draw in self._draws], 1)

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws of every latent site, in its support.

        Arguments:
            num_samples: resample so many at random, with replacement.
            group_by_chain: ``(chains, draws, *shape)`` instead of ``(chains * draws, *shape)``.
        """
        with torch.no_grad():
            rows = self.unconstrained
            return select_samples(self.potential.constrain(rows), num_samples, group_by_chain)

    def diagnostics(self) -> dict[str, Any]:
        """Effective sample size and R-hat by site, acceptance by chain, and the inner work of each energy site.

        ``inner`` says of each site whether its auxiliary draws were exact, and if not, the transitions of the inner
        chain (``None`` for the law's own sampler), their acceptance, and the gradients that they took.
        """
        found: dict[str, Any] = dict(diagnostics(self.get_samples(group_by_chain=True)))
        stats = {name: values.double().mean(1).tolist() for name, values in self.sample_stats.items()}
        for name in ("exchange_rate", "acceptance_rate"):
            found[name.replace("_", " ")] = {f"chain {i}": rate for i, rate in enumerate(stats[name])}
        found["inner"] = {
            site.name: {
                "exact": site.exact,
                "transitions": 0 if site.exact else None if site.discrete else self.inner,
                "acceptance": chains.acceptance,
                "gradients": chains.gradients,
            }
            for site, chains in zip(self._sites, self._chains, strict=True)
        }
        found["exact"] = all(site.exact for site in self._sites)
        return found

    def summary(self, prob: float = 0.9) -> None:
        """Print Pyro's table, and the inner work."""
        print_summary(self.get_samples(group_by_chain=True), prob=prob)
        for name, work in self.diagnostics()["inner"].items():
            print(f"auxiliary draws of {name!r}: {work}")  # noqa: T201
