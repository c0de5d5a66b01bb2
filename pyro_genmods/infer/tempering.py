r"""Parallel tempering: chains that reach all modes, because hot copies of them do.

Each chain is a ladder of :math:`K` replicas with the laws

.. math:: \pi_k(x) \propto p(x)\, p(y \mid x)^{\beta_k}, \qquad 0 = \beta_1 < \dots < \beta_K = 1 ,

all in one batch. Every replica moves by Hamiltonian Monte Carlo at its own temperature; then neighbours on the ladder,
even and odd pairs in turn, exchange their positions with probability

.. math:: \min\bigl(1, e^{(\beta_{k+1} - \beta_k)(E_{k+1} - E_k)}\bigr), \qquad E = -\log p(y \mid x) .

Where the prior is an energy :math:`b(x)\, e^{-E(x)}`, its tilt :math:`e^{-E}` is tempered with the likelihood, so that
the replica at :math:`\beta = 0` crosses between modes of the prior too; one alone is sampled by
``ParallelTempering(lambda: pyro.sample("x", law))``.

In warm-up every temperature learns its step size and scale, and the ladder is spaced so that all pairs exchange
equally often, which makes the round trips from prior to posterior shortest. Kept are the replicas at :math:`\beta = 1`.

Reference:
    S. Syed, A. Bouchard-Cote, G. Deligiannidis, A. Doucet, Non-Reversible Parallel Tempering: a Scalable Highly
    Parallel MCMC Scheme, 2022, arXiv:1905.02939.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..foundation.adaptation import DualAveraging, halton, harmonic_mean
from ..foundation.chains import Info, State, Step, hamiltonian, start
from ..foundation.errors import ModelError
from ..foundation.replicas import exchange, respaced
from .chain_kernel import ChainKernel
from .intractable import unknown_constants
from .potential import Potential
from .randoms import Stream
from .warmup import WarmUp, descend

__all__ = ["ParallelTempering"]

LENGTH = 1.3
SPACING = 4.0  # exponent of the first ladder
LADDER_TURNS = (0.15, 0.3, 0.5)  # of the warm-up, where the ladder is spaced anew
FREEZE = 0.85
OPTIONS = {"target_accept_prob", "init_strategy", "transforms", "max_plate_nesting", "level", "road", "max_batch"}


class ParallelTempering(ChainKernel):
    """Hamiltonian Monte Carlo on a ladder of temperatures, for posteriors with several modes.

    Arguments:
        model: a Pyro program with proper priors.
        num_temperatures: replicas of each chain, the posterior's among them.
        max_leapfrogs: longest trajectory.
        target_accept_prob, init_strategy, transforms, max_plate_nesting, level, road, max_batch: as in :class:`HMC`.

    Attributes:
        ladder: inverse temperatures, ``(temperatures,)``.
        swap_rate: accepted exchanges of each pair since the warm-up, ``(temperatures - 1,)``.

    Raises:
        ModelError: a prior is improper.
        DoublyIntractableError: the unknown constant of an energy depends on a latent.
        TypeError: an option of another kernel; step sizes and scales are learned for every temperature.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> def model():                                            # modes at -4 and 4, of weights .7 and .3
        ...     x = pyro.sample("x", dist.Normal(0.0, 5.0))
        ...     left, right = dist.Normal(-4.0, 0.5).log_prob(x), dist.Normal(4.0, 0.5).log_prob(x)
        ...     pyro.factor("y", torch.logaddexp(left + math.log(0.7), right + math.log(0.3)))
        >>> kernel = gm.infer.ParallelTempering(model, num_temperatures=6)
        >>> mcmc = gm.infer.MCMC(kernel, num_samples=300, num_chains=32, progress_bar=False, seed=0)
        >>> mcmc.run()
        >>> abs(float((mcmc.get_samples()["x"] > 0).float().mean()) - 0.3) < 0.05
        True
    """

    target = 0.7
    tempered = True

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_temperatures: int = 8,
        max_leapfrogs: int = 64,
        **options: Any,
    ) -> None:
        if num_temperatures < 2:
            raise ValueError(f"num_temperatures: got {num_temperatures}, needs at least 2.")
        strange = sorted(options.keys() - OPTIONS)
        if strange:
            raise TypeError(
                f"{strange[0]}: not an option of ParallelTempering, which takes {', '.join(sorted(OPTIONS))}."
            )
        super().__init__(model, **options)
        self.num_temperatures, self.max_leapfrogs = num_temperatures, max_leapfrogs

    def _find_potential(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        initial_params: Mapping[str, Tensor] | None,
    ) -> Potential:
        found = super()._find_potential(args, kwargs, initial_params)
        improper = found.program.improper()
        if improper:
            raise ModelError(
                f"site {improper[0]!r}: its prior is improper, and the hottest replica needs a proper one."
            )
        unknown = unknown_constants(self.model, args, kwargs)
        whole = [site.name for site in unknown if not (site.observed or site.tilted)]
        if whole:
            warnings.warn(
                f"site {whole[0]!r}: its energy has no base (base=None), so that only the likelihood is tempered and "
                "modes of the energy stay apart; give it a base (Energy(base='gaussian'), or a fitted flow).",
                stacklevel=2,
            )
        return found

    def _launch(self, position: Tensor, seed: int, warmup_steps: int) -> None:
        """Place every replica at the start of its chain."""
        k, (chains, dim) = self.num_temperatures, position.shape
        self.ladder = torch.linspace(0, 1, k, dtype=position.dtype, device=position.device) ** SPACING
        self._replicas = position.repeat(k, 1)  # rows: temperatures, then chains
        self.stream = Stream(seed, self._replicas)
        self._exchange = torch.Generator(position.device).manual_seed(seed + 1)
        self._heat()
        self._all = start(self._replicas, self.potential)
        if warmup_steps:
            self._all, sizes = descend(self._all, self.potential, self.stream.next)
            first = sizes.reshape(k, chains).median(1).values.tolist()
        else:
            first = [0.5 * dim**-0.25] * k
        self._steps = [DualAveraging.around(size, self.target_accept_prob, chains) for size in first]
        self._scale = torch.ones(k, dim, dtype=position.dtype, device=position.device)
        self._moments, self._weight = torch.zeros(2, k, dim).to(position), 0.0
        self._rejected, self._tried = torch.zeros(k - 1).to(position), 0
        self.warmup = WarmUp(warmup_steps, position, target=self.target_accept_prob, adapt=frozenset())
        self.state = self._cold()

    def _heat(self) -> None:
        """Give every row of the batch its temperature."""
        chains = len(self._replicas) // self.num_temperatures
        self.potential.inverse_temperature = self.ladder.repeat_interleave(chains)

    def _cold(self) -> State:
        chains = len(self._replicas) // self.num_temperatures
        return State(*(x[-chains:] for x in self._all))

    @property
    def swap_rate(self) -> Tensor:
        """Accepted exchanges of each pair, ``(temperatures - 1,)``."""
        return 1 - self._rejected / max(1, self._tried)

    def advance(self) -> Info:
        """Move all replicas, exchange neighbours, and learn in warm-up."""
        k, warm = self.num_temperatures, not self.warmup.finished
        chains = len(self._replicas) // k
        time = LENGTH * (0.5 + halton(self.iteration + 1))
        sizes = [step.size if warm else step.final for step in self._steps]
        leapfrogs = max(1, min(self.max_leapfrogs, math.ceil(time / min(sizes[-1], 2 * min(sizes)))))
        noise, log_uniform = self.stream.next()
        size = noise.new_tensor(sizes).repeat_interleave(chains)[:, None]
        scale = self._scale.repeat_interleave(chains, 0)[:, None]
        self._heat()
        self._all, info = hamiltonian(self._all, self.potential, Step(size, scale, noise, log_uniform, leapfrogs))
        self._swap(chains)
        if warm:
            self._learn(info, chains)
            self.warmup.iteration += 1
        self.iteration += 1
        self.last, self.state = (sizes[-1], leapfrogs), self._cold()
        return Info(*(x[-chains:] for x in info))

    def _swap(self, chains: int) -> None:
        """Exchange even pairs in even iterations, odd pairs in odd ones."""
        q = self._all.position
        tilt = self.potential.parts(q)[1].reshape(self.num_temperatures, chains)
        rows, rate = exchange(tilt, self.ladder, self.iteration, self._exchange)
        self._rejected, self._tried = self._rejected + 1 - rate, self._tried + 1
        self._all = start(q[rows].contiguous(), self.potential)

    def _learn(self, info: Info, chains: int) -> None:
        k, done = self.num_temperatures, self.warmup.iteration + 1
        acceptance = info.acceptance.reshape(k, chains)
        everyone = torch.ones(chains, dtype=torch.bool, device=acceptance.device)
        for step, rates in zip(self._steps, acceptance, strict=True):
            step.update(harmonic_mean(rates, everyone, least=0.05))
        q = self._all.position.reshape(k, chains, -1)
        if done < FREEZE * self.warmup.iterations:
            self._moments = self._moments + torch.stack([q.mean(1), q.square().mean(1)])
            self._weight += 1
        turns = [int(f * self.warmup.iterations) for f in (*LADDER_TURNS, FREEZE)]
        if done in turns:
            mean, square = self._moments / self._weight
            spread = (square - mean.square()).clamp_min(0).sqrt()
            self._scale = torch.where(spread > 0, spread, self._scale)
            self._moments, self._weight = torch.zeros_like(self._moments), 0.0
            if done != turns[-1]:
                self._space()
            self._rejected, self._tried = torch.zeros_like(self._rejected), 0
            for step in self._steps:
                step.restart()

    def _space(self) -> None:
        """Space the ladder so that all pairs reject equally often."""
        self.ladder = respaced(self.ladder, self._rejected / self._tried)
        self._heat()
        self._all = start(self._all.position, self.potential)

    # -- to and from disk ---------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        before, used = self.stream.state()
        names = ("ladder", "_scale", "_moments", "_rejected")
        tensors = {name: getattr(self, name) for name in names}
        tensors |= {**self._all._asdict(), "generator": before, "exchange": self._exchange.get_state()}
        numbers: dict[str, Any] = {"steps": [asdict(step) for step in self._steps], "weight": self._weight}
        counts = {"tried": self._tried, "used": used, "iteration": self.warmup.iteration}
        return tensors, {**numbers, **counts, "kernel_iteration": self.iteration}

    def load_state_dict(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        for name in ("ladder", "_scale", "_moments", "_rejected"):
            setattr(self, name, tensors[name])
        self._all = State(tensors["position"], tensors["energy"], tensors["gradient"])
        self._exchange.set_state(tensors["exchange"].cpu())
        self.stream.set_state(tensors["generator"], numbers["used"])
        self._steps = [DualAveraging(**step) for step in numbers["steps"]]
        self._weight, self._tried = numbers["weight"], numbers["tried"]
        self.warmup.iteration, self.iteration = numbers["iteration"], numbers["kernel_iteration"]
        self._heat()
        self.state = self._cold()
