r"""Sequential Monte Carlo from the prior to the posterior, for posteriors with several modes and for evidences.

Particles start as draws of the prior and pass through the laws

.. math:: \pi_k(x) \propto p(x)\, p(y \mid x)^{\beta_k}, \qquad 0 = \beta_0 < \beta_1 < \dots < \beta_K = 1 .

The next inverse temperature is the one at which the weights :math:`p(y \mid x)^{\beta_{k+1} - \beta_k}` are worth a
given fraction of the particles; these are resampled, and moved by kernels that leave :math:`\pi_{k+1}` invariant.
The product of the mean weights estimates the evidence :math:`p(y)`.

An energy :math:`b(x)\, e^{-E(x)} / Z` among the priors counts as its base :math:`b` with a likelihood
:math:`e^{-E}`, so that its own modes are bridged too. What is estimated then contains :math:`Z`; it is an evidence only
if :math:`Z` is known.

Several independent runs are made. Their agreement is the only diagnostic that can see a missed mode, and their scatter
is the error of the log evidence.

References:
    P. Del Moral, A. Doucet, A. Jasra, Sequential Monte Carlo samplers, 2006, JRSS B 68(3).
    A. Jasra, D. A. Stephens, A. Doucet, T. Tsagaris, Inference for Levy-driven stochastic volatility models via
    adaptive sequential Monte Carlo, 2011, Scandinavian Journal of Statistics 38(1).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.util import print_summary, select_samples
from torch import Tensor
from tqdm import tqdm

from ..foundation.annealing import Stage, anneal
from ..foundation.errors import ModelError, SamplingError
from ..foundation.moves import HamiltonianMoves
from .initialization import init_to_prior
from .intractable import constants_of_evidence
from .moves import EllipticalMoves
from .potential import Potential, potential
from .sites import refuse_estimates

__all__ = ["SMC", "Stage"]

DISAGREEMENT = 1.05  # of runs, in units of R-hat, that is worth a warning
MOVES = {"hmc": HamiltonianMoves, "elliptical": EllipticalMoves}


class SMC:
    r"""Likelihood-tempered sequential Monte Carlo.

    Arguments:
        model: a Pyro program with proper priors.
        num_particles: in each run.
        num_runs: independent runs, at least 2 for errors.
        moves: ``"hmc"``, or ``"elliptical"`` for slice moves in noise space. These need no gradient and no step size,
            and a prior that is Gaussian in unconstrained space (see :class:`PushforwardReparam` for learned priors).
        num_moves: at every temperature, at least.
        max_moves: at every temperature, at most; moves go on until particles have forgotten where they were.
        target_ess: fraction of the particles that the weights of one step may cost.
        seed: makes the runs repeatable; default a number drawn from torch's generator.
        progress_bar: show the temperature.
        level, road, max_batch, transforms, max_plate_nesting: of :func:`pyro_genmods.infer.potential`.

    Attributes:
        log_evidence: logarithm of the mean over runs of the estimates of the evidence, in nats; NaN, with a warning,
            where the unknown constant of an energy is missing.
        log_evidence_error: its standard error, from the scatter of the runs, and of normalisers that were estimated.
        log_evidences: of each run.
        log_unnormalized_evidence, log_unnormalized_evidences: the same with energies as they are, without their
            constants. Of a program that is one energy alone this is its :math:`\log Z`.
        stages: of each run, a list of :class:`Stage`.
        agreement: for every latent, how much the runs disagree: R-hat between runs, near 1 where they agree.

    Raises:
        ModelError: a prior is improper, cannot be drawn from, or is not Gaussian where elliptical moves are wanted.
        SamplingError: no particle of the prior has a finite likelihood.
        DensityError: the density of a site is estimated with frozen probes, and its user has not accepted that.
        DoublyIntractableError: the unknown constant of an energy depends on a latent.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> smc = SMC(model, num_particles=500, num_runs=4, progress_bar=False, seed=0)
        >>> smc.run(torch.tensor(1.0))
        >>> exact = float(dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0)))
        >>> abs(smc.log_evidence - exact) < 0.1
        True
        >>> smc.get_samples()["x"].shape
        torch.Size([2000])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_particles: int = 1024,
        *,
        num_runs: int = 4,
        moves: str = "hmc",
        num_moves: int = 2,
        max_moves: int = 50,
        target_ess: float = 0.5,
        seed: int | None = None,
        progress_bar: bool = True,
        **options: Any,
    ) -> None:
        for name, number, least in (
            ("num_particles", num_particles, 8),
            ("num_runs", num_runs, 1),
            ("num_moves", num_moves, 1),
        ):
            if number < least:
                raise ValueError(f"{name}: got {number}, needs at least {least}.")
        if not 0 < target_ess < 1:
            raise ValueError(f"target_ess: got {target_ess}, needs a fraction between 0 and 1.")
        if moves not in MOVES:
            raise ValueError(f"moves: got {moves!r}, needs one of {sorted(MOVES)}.")
        self.model, self.num_particles, self.num_runs = model, num_particles, num_runs
        self._moves, self.num_moves, self.target_ess = MOVES[moves], num_moves, target_ess
        self.max_moves = max(max_moves, num_moves)
        self.seed, self.progress_bar, self._options = seed, progress_bar, options
        self.kernel = self  # what reads chains asks the kernel for its model
        self.potential: Potential | None = None
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._rows: Tensor | None = None

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Make all runs, with the arguments of the model. Ctrl-C keeps the runs that are finished."""
        self._args, self._kwargs = args, kwargs
        self.potential = self._find_potential(args, kwargs)
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        self.stages, log_evidences, rows, energies = [], [], [], []
        for index in range(self.num_runs):
            try:
                q, energy, log_evidence, stages = self._one(index, seed + index)
            except KeyboardInterrupt:
                if not rows:
                    raise
                warnings.warn(f"interrupted: {index} of {self.num_runs} runs are kept.", stacklevel=2)
                break
            rows.append(q)
            energies.append(energy)
            log_evidences.append(log_evidence)
            self.stages.append(stages)
        self._rows, self._energies = torch.stack(rows), torch.stack(energies)
        self.log_unnormalized_evidences = torch.tensor(log_evidences, dtype=torch.float64)
        self._judge()
        self._report_evidence()

    def _find_potential(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Potential:
        if self.potential is not None and self.potential.update(args, kwargs):
            return self.potential
        found = potential(self.model, args, kwargs, tempered=True, **self._options)
        refuse_estimates(found.program, "infer.SMC")
        improper = found.program.improper()
        if improper:
            raise ModelError(
                f"site {improper[0]!r}: its prior is improper, so there is nothing to start from and no evidence; give "
                "it a proper prior, or use infer.HMC."
            )
        self._constants = constants_of_evidence(self.model, args, kwargs)
        return found

    def _one(self, index: int, seed: int) -> tuple[Tensor, Tensor, float, list[Stage]]:
        energy = self.potential
        q = self._draw_prior(seed)
        energy.inverse_temperature = torch.zeros_like(q[:, 0])
        moves = self._moves(energy, q, torch.Generator(q.device).manual_seed(seed))
        with tqdm(total=1.0, disable=not self.progress_bar, desc=f"run {index + 1}/{self.num_runs}") as bar:

            def show(stage: Stage, log_evidence: Tensor) -> None:
                beta, rate = f"{stage.inverse_temperature:.3g}", f"{stage.acceptance:.2f}"
                bar.set_postfix(beta=beta, acc=rate, log_evidence=f"{float(log_evidence):.2f}")
                bar.update(stage.inverse_temperature - bar.n)

            options = {"num_moves": self.num_moves, "max_moves": self.max_moves}
            try:
                found = anneal(energy, q, moves, target_ess=self.target_ess, report=show, **options)
            except SamplingError as error:
                raise SamplingError(f"model: from the prior to the posterior, {error}") from error
        prior, rest = energy.parts(found.position)
        return found.position, prior + rest, float(found.log_ratio), found.stages

    def _draw_prior(self, seed: int) -> Tensor:
        devices = [self.potential.device] if self.potential.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self.potential.program.start(init_to_prior, self.num_particles)

    def _judge(self) -> None:
        """What was estimated with its error, and whether the runs agree."""
        z, runs = self.log_unnormalized_evidences, len(self.log_unnormalized_evidences)
        self.log_unnormalized_evidence = float(z.logsumexp(0)) - math.log(runs)
        relative = (z - self.log_unnormalized_evidence).exp()
        scatter = float(relative.std() / math.sqrt(runs)) if runs > 1 else math.nan
        self.log_evidence_error = math.hypot(scatter, self._constants.error)
        between = self._rows.mean(1).var(0) if runs > 1 else self._rows.new_full(self._rows.shape[2:], math.nan)
        within = self._rows.var(1).mean(0)
        spread = (1 + between / within.clamp_min(1e-30)).sqrt()
        self.agreement = self.potential.layout.unflatten(spread)
        worst = float(spread.max())
        if worst > DISAGREEMENT:
            column = self.potential.layout.coordinates()[int(spread.argmax())]
            warnings.warn(
                f"runs disagree about {column} (R-hat between runs {worst:.2f}): modes may be missed, or their weights "
                "badly known; take more particles or moves.",
                stacklevel=3,
            )

    def _report_evidence(self) -> None:
        """An evidence is what was estimated, if no constant is missing."""
        self.log_evidence, self.log_evidences = self.log_unnormalized_evidence, self.log_unnormalized_evidences
        if not self._constants.missing:
            return
        self.log_evidence, self.log_evidences = math.nan, torch.full_like(self.log_evidences, torch.nan)
        sites = ", ".join(map(repr, self._constants.missing))
        warnings.warn(
            f"log_evidence is NaN: the constant of the law of {sites} is unknown. Attach it by shape.normalize(model); "
            "without it there is log_unnormalized_evidence, which is log Z itself if the program is one energy alone.",
            stacklevel=3,
        )

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def unconstrained(self) -> Tensor:
        """Particles as rows, ``(runs, particles, dim)``."""
        if self._rows is None:
            raise RuntimeError("SMC: has no particles yet; call run() first.")
        return self._rows

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """Log density of every particle in unconstrained space, ``(runs, particles)``, under ArviZ's name."""
        return {"lp": -self._energies}

    @property
    def num_chains(self) -> int:
        """Runs: particles of different runs are independent, those of one run are not quite."""
        return len(self.unconstrained)

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Particles at inverse temperature one, of equal weight.

        Arguments:
            num_samples: resample so many at random, with replacement.
            group_by_chain: ``(runs, particles, *shape)`` instead of ``(runs * particles, *shape)``.
        """
        with torch.no_grad():
            rows = self.unconstrained
            return select_samples(self.potential.constrain(rows), num_samples, group_by_chain)

    def sample_posterior(self, num_samples: int) -> dict[str, Tensor]:
        """Particles as starting points of chains: ``infer.HMC(model, init_strategy=smc)``."""
        return self.get_samples(num_samples)

    def diagnostics(self) -> dict[str, Any]:
        """Evidence, stages, effective sample sizes, and agreement of the runs."""
        return {
            "log_evidence": self.log_evidence,
            "log_unnormalized_evidence": self.log_unnormalized_evidence,
            "log_evidence_error": self.log_evidence_error,
            "stages": self.stages,
            "agreement": self.agreement,
        }

    def summary(self, prob: float = 0.9) -> None:
        """Print Pyro's table, in which runs are chains, and the log evidence."""
        print_summary(self.get_samples(group_by_chain=True), prob=prob)
        name = "log unnormalized evidence" if self._constants.missing else "log evidence"
        print(f"{name} {self.log_unnormalized_evidence:.3f} +- {self.log_evidence_error:.3f}")  # noqa: T201
