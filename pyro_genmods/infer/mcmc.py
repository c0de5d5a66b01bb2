"""Many chains at once: what ``pyro.infer.MCMC`` does for one, with the same methods and names."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.util import diagnostics, print_summary, select_samples
from torch import Tensor

from ..foundation.convergence import nested_r_hat
from ..foundation.errors import SamplingError
from .chain_kernel import ChainKernel
from .draws import Draws, Progress
from .recording import Recorder, settings_of

__all__ = ["MCMC"]

WARMUP_TRANSITIONS = 6400  # over all chains; a hundred iterations of sixty-four chains
WARMUP_RANGE = (100, 1000)
STUCK = 0.02  # a realised acceptance below which chains are called stuck


class MCMC:
    """Markov chain Monte Carlo with many chains in one batch.

    Arguments:
        kernel: :class:`HMC`, :class:`MALA`, :class:`ULA` or :class:`ParallelTempering`.
        num_samples: draws to keep of each chain.
        warmup_steps: iterations before; default 100 for 64 chains or more, more for fewer.
        num_chains: chains, moved together.
        thinning: iterations for each draw that is kept.
        seed: makes the run repeatable, bit for bit on one machine. Default: a number drawn from torch's generator, so
            that ``pyro.set_rng_seed`` does the same.
        initial_params: unconstrained starting values ``(num_chains, *shape)`` of each site, as in Pyro.
        superchains: number of different starting points; the chains that share one are what nested R-hat compares.
            Default: one for every four chains.
        store: a folder, usually ``*.zarr``, to which draws go while they are made, about every second. A run that was
            killed or interrupted goes on from it when it is started again in the same way, and its draws are bit for
            bit those of a run that was not; a run that is finished returns them without sampling; a larger
            ``num_samples`` extends it. ``xarray.open_datatree(store, engine="zarr")`` reads it at any time.
        hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after every iteration, as in Pyro.
        progress_bar: show phase, acceptance, step size, leapfrogs, divergences, R-hat and time left.

    Attributes:
        sample_stats: of every draw, ``(chains, draws)``, under the names that ArviZ reads.
        num_gradients: gradients evaluated in the last run, counted chain by chain; with a store since its beginning.
        seconds: time of the last run by phase.

    Raises:
        ValueError: counts that make no sense.
        SamplingError: no chain moves.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Exponential(scale), obs=y)
        >>> mcmc = MCMC(gm.infer.HMC(model), num_samples=100, num_chains=64, progress_bar=False, seed=0)
        >>> mcmc.run(torch.tensor([0.5, 1.5]))
        >>> mcmc.get_samples(group_by_chain=True)["scale"].shape
        torch.Size([64, 100])
        >>> round(float(mcmc.get_samples()["scale"].mean()), 1)         # Gamma(4, 3)
        1.3
    """

    def __init__(
        self,
        kernel: ChainKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        num_chains: int = 64,
        *,
        thinning: int = 1,
        seed: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        superchains: int | None = None,
        store: str | os.PathLike[str] | None = None,
        hook_fn: Callable[..., Any] | None = None,
        progress_bar: bool = True,
    ) -> None:
        if not isinstance(kernel, ChainKernel):
            raise TypeError(f"kernel: got {type(kernel).__name__}, needs infer.HMC, MALA, ULA or ParallelTempering.")
        for name, number, least in (
            ("num_samples", num_samples, 1),
            ("num_chains", num_chains, 1),
            ("thinning", thinning, 1),
        ):
            if number < least:
                raise ValueError(f"{name}: got {number}, needs at least {least}.")
        if warmup_steps is None:
            low, high = WARMUP_RANGE
            warmup_steps = min(high, max(low, math.ceil(WARMUP_TRANSITIONS / num_chains)))
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: got {warmup_steps}, needs at least 0.")
        superchains = _superchains(num_chains, superchains)
        self.kernel, self.num_samples, self.warmup_steps, self.num_chains = (
            kernel,
            num_samples,
            warmup_steps,
            num_chains,
        )
        self.thinning, self.seed, self.superchains, self.store = thinning, seed, superchains, store
        self.initial_params, self.hook_fn, self.progress_bar = initial_params, hook_fn, progress_bar
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._draws, self._recorder = Draws(), None
        self.num_gradients, self.seconds = 0, {}

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Warm up and sample, with the arguments of the model.

        Ctrl-C ends the run early and keeps the draws that are finished.

        Raises:
            FileFormatError: ``store`` is there already and is damaged, no store, or that of a run with other settings,
                another model or other data; it is left as it is.
        """
        self._args, self._kwargs = args, kwargs
        began = time.perf_counter()
        self._begin(args, kwargs)
        self.seconds = {"start": time.perf_counter() - began, "warmup": 0.0}
        self._loop()
        self.seconds["total"] = time.perf_counter() - began
        self._potential = self.kernel.potential
        self.num_gradients = self._potential.num_gradients - self._gradients_before
        self._warn()

    def _begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        kernel, known = self.kernel, self.kernel.potential or self.kernel.potential_fn
        self._gradients_before = getattr(known, "num_gradients", 0)
        self._recorder = None if self.store is None else Recorder(self.store, self._settings(), self.seed)
        if self._recorder is not None:
            seed = self._recorder.seed
        else:
            seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        kernel.begin(
            self.num_chains,
            self.warmup_steps,
            args,
            kwargs,
            initial_params=self.initial_params,
            seed=seed,
            groups=self.superchains,
            num_samples=self.num_samples * self.thinning,
        )
        if kernel.potential is not known:
            self._gradients_before = 0
        self._draws = Draws()
        if self._recorder is not None:
            self._draws = self._recorder.begin(kernel, self.num_samples, self._gradients_before)
            self._gradients_before = self._recorder.gradients_before

    def _settings(self) -> dict[str, Any]:
        names = ("num_chains", "warmup_steps", "thinning", "superchains")
        return {**{name: getattr(self, name) for name in names}, **settings_of(self.kernel)}

    def _loop(self) -> None:
        with Progress(self) as progress:
            try:
                self._warm_up(progress)
                self._sample(progress)
            except KeyboardInterrupt:
                done = len(self._draws)
                if not done:
                    raise
                warnings.warn(f"interrupted: {done} of {self.num_samples} draws of each chain are kept.", stacklevel=3)
            finally:
                if self._recorder is not None:
                    self._recorder.flush(self._draws)

    def _warm_up(self, progress: Progress) -> None:
        kernel = self.kernel
        while not kernel.warmup.finished:
            info = kernel.advance()
            if self._recorder is not None:
                self._recorder.warming(kernel.warmup.finished)
            progress.show("warm-up", info, 0)
            self._hook("warmup", kernel.warmup.iteration - 1)
        self.seconds["warmup"] = time.perf_counter() - progress.began

    def _sample(self, progress: Progress) -> None:
        kernel, done = self.kernel, len(self._draws)
        while done < self.num_samples:
            diverging = kernel.advance().diverging if self.thinning > 1 else None
            for _ in range(self.thinning - 2):
                diverging = diverging | kernel.advance().diverging
            info = kernel.advance()
            self._draws.add(kernel, info, info.diverging if diverging is None else diverging | info.diverging)
            done += 1
            if self._recorder is not None:
                self._recorder.drawn(self._draws)
            progress.show("sampling", info, done)
            self._hook("sample", done - 1)

    def _hook(self, stage: str, index: int) -> None:
        if self.hook_fn is not None:
            params = self.kernel.potential.layout.unflatten(self.kernel.state.position)
            self.hook_fn(self.kernel, params, stage, index)

    def _warn(self) -> None:
        """Say what makes the draws doubtful."""
        stats = self._draws.stats()
        if float(stats["acceptance_rate"].mean()) < STUCK:
            raise SamplingError(
                f"the chains do not move: {float(stats['acceptance_rate'].mean()):.1%} of the proposals were accepted. "
                "The energy may be rough or random, or the warm-up too short; draws are kept for inspection."
            )
        divergences = int(stats["diverging"].sum())
        if divergences:
            warnings.warn(
                f"{divergences} of {stats['diverging'].numel()} transitions diverged: somewhere the posterior is too "
                "narrow for the step size. Reparametrise, or raise target_accept_prob.",
                stacklevel=3,
            )
        stuck = (stats["acceptance_rate"].mean(0) < STUCK).nonzero().flatten().tolist()
        if stuck:
            warnings.warn(f"chains {stuck} did not move; leave them out, or start them elsewhere.", stacklevel=3)

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def unconstrained(self) -> Tensor:
        """Draws as rows, ``(chains, draws, dim)``."""
        if not len(self._draws):
            raise RuntimeError("MCMC: has no draws yet; call run() first.")
        return self._draws.rows().transpose(0, 1)

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """Statistics of every draw, ``(chains, draws)``; ``lp`` is the log density in unconstrained space, in nats."""
        if not len(self._draws):
            raise RuntimeError("MCMC: has no draws yet; call run() first.")
        return {name: values.T for name, values in self._draws.stats().items()}

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws of every latent site, in its support.

        Arguments:
            num_samples: resample so many at random, with replacement, as Pyro does.
            group_by_chain: ``(chains, draws, *shape)`` instead of ``(chains * draws, *shape)``.
        """
        with torch.no_grad():
            rows = self.unconstrained
            samples = self._potential.constrain(rows)
        return select_samples(samples, num_samples, group_by_chain)

    def diagnostics(self) -> dict[str, Any]:
        """Effective sample size, split and nested R-hat by site; divergences and acceptance by chain; whether exact."""
        samples = self.get_samples(group_by_chain=True)
        found: dict[str, Any] = dict(diagnostics(samples))
        for name, draws in samples.items():
            if self.superchains > 1:
                found[name]["nested_r_hat"] = nested_r_hat(draws, self.superchains)
        stats = self.sample_stats
        chains = range(self.num_chains)
        found["divergences"] = {f"chain {i}": stats["diverging"][i].nonzero().flatten().tolist() for i in chains}
        found["acceptance rate"] = {f"chain {i}": float(stats["acceptance_rate"][i].mean()) for i in chains}
        found["exact"] = self.kernel.exact
        return found

    def summary(self, prob: float = 0.9) -> None:
        """Print Pyro's table of mean, sd, median, interval, effective sample size and R-hat."""
        print_summary(self.get_samples(group_by_chain=True), prob=prob)
        if not self.kernel.exact:
            print("unadjusted Langevin: these draws are biased by its step size")  # noqa: T201


def _superchains(chains: int, wanted: int | None) -> int:
    if wanted is None:
        return chains // 4 if chains % 4 == 0 and chains >= 8 else chains
    if wanted < 1 or chains % wanted:
        raise ValueError(f"superchains: got {wanted}, needs a divisor of num_chains={chains}.")
    return wanted
