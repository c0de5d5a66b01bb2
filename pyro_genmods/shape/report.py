r"""Do chains of an energy mix, and is what they mix to the law that was meant?

An energy is easily learned that is good for something else than its density: short chains from noise or from data
make fine events, and long ones leave them. So chains are run for long, from several places, and asked:

* **Do they agree?** They start in *superchains*, each from one draw of the base. Nested :math:`\hat R` and the weights
  of modes compare superchains, which is what tells that chains do not cross between modes.
* **Do they stay?** Short chains (from the data, if there are any) against the long run, and the first half of the long
  run against the second, in standard errors.
* **Are they like the data?** The *energy gap*: the mean energy of data less that of the long run, in standard
  deviations of the energy, and how much two histograms of it have in common. Positive where the energy has minima
  without data, negative where it holds the data for more likely than what it draws. And the *energy distance* (of the
  statistics of that name) between data and draws themselves.
* **Are they of the score?** Virial identities and the kernel Stein discrepancy (:mod:`pyro_genmods.foundation.stein`).
  They see a wrong step size and a score that is wrong, and are blind to the weights of modes.

The energy is :math:`U = E - \log b` in nats, in the coordinates of the network, up to its constant.

References:
    E. Nijkamp, M. Hill, T. Han, S.-C. Zhu, Y. N. Wu, On the Anatomy of MCMC-Based Maximum Likelihood Learning of
    Energy-Based Models, 2019, arXiv:1903.12370.
    C. C. Margossian et al., Nested R-hat, 2024, arXiv:2110.13017.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..foundation.convergence import effective_sample_size, nested_r_hat
from ..foundation.errors import ShapeError
from ..foundation.stein import Identity, SteinDiscrepancy
from .checks import Check, Distance, Shift, checks_of
from .energy import Energy
from .law import EnergyDistribution
from .long_run import Runs, Target, run_chains
from .measures import energy_distance, histogram_overlap, mode_weights, moved, score_measures, thinned
from .sampling import Chains

__all__ = ["MixingReport", "mixing_report"]

LEAST_DATA, LEAST_LONG = 20, 20
ROUNDING = 0.05  # nats, which a user should know of


@dataclass(frozen=True, eq=False)
class MixingReport:
    r"""What :func:`mixing_report` measured; ``str`` makes a table with a verdict.

    Attributes:
        kernel: ``"hmc"``, ``"mala"`` or ``"ula"``.
        superchains: number of starting points; chains of a superchain lie next to each other.
        lengths: transitions of the short and of the long run.
        draws: of the long run, in the user's units, ``(chains, draws, *event_shape)``.
        sample_stats: of every draw, ``(chains, draws)``, under the names that ArviZ reads: ``energy`` (of the
            Hamiltonian), ``lp`` (:math:`-U`), ``acceptance_rate``, ``diverging``, ``n_steps``, ``step_size``.
        energies: :math:`U` of ``"data"`` (if there were any), of where ``"short"`` chains arrived, and of all draws of
            the ``"long"`` run, flat.
        nested_r_hat: the largest over coordinates and energy. ``ess``: the least bulk effective sample size of these.
        acceptance, divergences: mean acceptance probability, and share of transitions that diverged.
        energy_gap, energy_overlap: data against long run, in standard deviations, and common mass of histograms; NaN
            without data.
        distance: energy distance of data and draws; ``None`` without data.
        drift, trend: how far energy (entry 0) and coordinates are moved from the short to the long run, and from its
            first half to its second.
        modes: centres ``(modes, *event_shape)`` as they were given or found in the data, or ``None``.
        occupancy: share of every mode in each superchain, ``(superchains, modes)``.
        mode_r_hat: nested R-hat of being in a mode, the largest.
        weight_gap: share of every mode in the long run less that in the data; ``None`` without data.
        identities: of Stein, of draws with standard deviations of one; see
            :func:`~pyro_genmods.foundation.stein.stein_identities`. Without ``"curvature"`` where the energy has no
            second derivative.
        stein: kernel Stein discrepancy of these.
        rounding: by which the largest energy is rounded, in nats.

    Example:
        >>> import pyro_genmods as gm
        >>> model = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)
        >>> report = mixing_report(model(), num_chains=32, short=20, long=100, seed=0)
        >>> report.ok, report.draws.shape, model.report is report
        (True, torch.Size([32, 100, 1]), True)
    """

    kernel: str
    superchains: int
    lengths: tuple[int, int]
    draws: Tensor
    sample_stats: dict[str, Tensor]
    energies: dict[str, Tensor]
    nested_r_hat: float
    ess: float
    acceptance: float
    divergences: float
    energy_gap: float
    energy_overlap: float
    distance: Distance | None
    drift: Shift
    trend: Shift
    modes: Tensor | None
    occupancy: Tensor | None
    mode_r_hat: float
    weight_gap: Shift | None
    identities: dict[str, Identity]
    stein: SteinDiscrepancy
    rounding: float

    @property
    def features(self) -> int:
        """Number of coordinates."""
        return self.drift.z.numel() - 1

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """Every number against its limit."""
        return checks_of(self)

    @property
    def worst(self) -> Check:
        """The check that is farthest beyond its limit, or nearest to it."""
        return max(self.checks, key=lambda check: check.severity)

    @property
    def ok(self) -> bool:
        """Whether no check has failed."""
        return self.worst.severity <= 1

    @property
    def reason(self) -> str:
        """The worst finding and what to do about it, in words, and what else failed."""
        if self.ok:
            data = ", and data are like their draws" if self.distance is not None else ""
            return f"chains forget where they started, stay where they are, and agree with the score{data}."
        others = [check.name for check in self.checks if check.severity > 1 and check is not self.worst]
        return self.worst.reason + (f" Also: {', '.join(others)}." if others else "")

    @property
    def attrs(self) -> dict[str, str | int | float]:
        """The verdict and the main numbers, plain, for files."""
        numbers = ("nested_r_hat", "ess", "acceptance", "divergences", "energy_gap", "energy_overlap", "rounding")
        return {
            "verdict": "ok" if self.ok else "not ok",
            "reason": self.reason,
            "kernel": self.kernel,
            "superchains": self.superchains,
            **{name: float(getattr(self, name)) for name in numbers},
            "stein_p_value": self.stein.p_value,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> MixingReport:
        """Itself: it never changes, and copies of its model may share it."""
        return self

    def __str__(self) -> str:
        """The table."""
        chains, kept = self.draws.shape[:2]
        short, long = self.lengths
        lines = [
            f"{chains} chains ({self.kernel}) in {self.superchains} superchains, {long} transitions each, {kept} kept; "
            f"short runs of {short}",
            f"{'':28}{'measured':>14}{'wanted':>10}",
            *(
                f"{check.name:28}{check.measured:>14}{check.wanted:>10}{'' if check.severity <= 1 else '  <-'}"
                for check in self.checks
            ),
        ]
        if self.occupancy is not None:
            lines.append("weights of modes, least to most of superchains: " + ", ".join(self._weights()))
        return "\n".join([*lines, f"{'ok' if self.ok else 'NOT OK'}: {self.reason}"])

    def _weights(self) -> list[str]:
        low, high = self.occupancy.min(0).values.tolist(), self.occupancy.max(0).values.tolist()
        return [f"{a:.0%}-{b:.0%}" for a, b in zip(low, high, strict=True)]


def mixing_report(
    law: EnergyDistribution | Energy,
    data: Tensor | None = None,
    *,
    num_chains: int = 64,
    superchains: int = 8,
    short: int = 50,
    long: int = 1000,
    kernel: str | Chains = "hmc",
    modes: Tensor | None = None,
    seed: int | None = None,
    progress_bar: bool = False,
) -> MixingReport:
    """Run chains of an energy for long, and say whether they mix, and to what.

    The report stays with the law and its model as ``law.report`` and ``model.report``, until the model is fitted again.

    Arguments:
        law: an energy's law at one context, or an unconditional energy.
        data: events that the law is meant for, ``(n, *event_shape)``, held out, at least 20.
        num_chains: moved together.
        superchains: starting points; a divisor of the number of chains with at least two chains each.
        short: transitions of the short run, which starts at data, or at draws of the base if there are none.
        long: transitions of each chain after the warm-up, at least 20.
        kernel: of the chains: ``"hmc"``, ``"mala"`` or ``"ula"``, or :class:`~pyro_genmods.shape.Chains` with a warm-up
            and a step size of your own. ``"ula"`` takes the step size of the chains by which the energy was trained, if
            it was.
        modes: centres ``(modes, *event_shape)``, at least two; looked for in the data if not given.
        seed: of everything; torch's generator is left where it is.
        progress_bar: of the long run.

    Raises:
        TypeError: no energy.
        ShapeError: data or modes that do not fit the law, or a law with batch dimensions.
        ValueError: counts that make no sense.
        SamplingError: chains found no finite energy.

    Warns:
        UserWarning: energies so large that their rounding shows in the accept test.

    Example:
        >>> import pyro_genmods as gm
        >>> def far(y):                                         # two modes, at -4 and 4
        ...     return -torch.logaddexp(-8 * (y[:, 0] + 4) ** 2, -8 * (y[:, 0] - 4) ** 2)
        >>> law = gm.Energy(1, network=far, base=None)()
        >>> report = mixing_report(law, modes=torch.tensor([[-4.0], [4.0]]), short=20, long=100, seed=0)
        >>> report.ok, report.reason
        (False, "superchains disagree on the weights of the modes: ...")
    """
    law = _single(law)
    sampler = _sampler(kernel, law.model, short)
    _check_counts(num_chains, superchains, short, long)
    target = Target(law)
    rows = _rows_of(law, "data", data, LEAST_DATA)
    centres = _rows_of(law, "modes", modes, 2)
    device = law.model.place[1]
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    with torch.no_grad(), torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        begin = target.starts(superchains).repeat_interleave(num_chains // superchains, 0)
        short_begin = target.starts(num_chains)
        if rows is not None:
            short_begin = rows[torch.randint(len(rows), (num_chains,), device=rows.device)]
        with tqdm(total=long, disable=not progress_bar, desc="long run") as bar:
            runs = run_chains(target, sampler, begin, short_begin, (short, long), bar.update)
        report = _measured(target, runs, rows, centres, (sampler.kernel, superchains, (short, long)))
    law._report = law.model.report = report
    if report.rounding > ROUNDING:
        warnings.warn(
            f"energies of up to {float(report.energies['long'].abs().max()):.3g} nats are rounded to "
            f"{report.rounding:.2g}: accept tests are noisy. Use model.double().",
            stacklevel=2,
        )
    return report


# -- what is measured -------------------------------------------------------------------------------------------------


def _measured(
    target: Target, runs: Runs, data: Tensor | None, centres: Tensor | None, how: tuple[str, int, tuple[int, int]]
) -> MixingReport:
    kernel, superchains, lengths = how
    law, energy = target.law, -runs.stats["lp"]
    entries = torch.cat([energy[..., None], runs.rows], -1)
    short = torch.cat([target.energy(runs.short.to(law.model.place[1])).cpu()[:, None], runs.short], -1)
    half = entries.shape[1] // 2
    energies = {"short": short[:, 0], "long": energy.flatten()}
    gap, overlap, distance = math.nan, math.nan, None
    ess = float(effective_sample_size(thinned(entries, 2**22)).min())
    if data is not None:
        energies["data"] = torch.cat([target.energy(part) for part in data.split(4096)]).cpu()
        gap = float((energies["data"].mean() - energy.mean()) / energy.std())
        overlap = histogram_overlap(energies["data"], energies["long"])
        independent = thinned(runs.rows, max(20, int(ess)) * runs.rows.shape[2]).flatten(0, 1)
        distance = energy_distance(data.cpu(), independent)
    centres, occupancy, mode_r_hat, weight_gap = mode_weights(runs.rows, superchains, data, centres)
    identities, stein = score_measures(target, runs.rows)
    return MixingReport(
        kernel=kernel,
        superchains=superchains,
        lengths=lengths,
        draws=_events(law, runs.rows.flatten(0, 1)).unflatten(0, runs.rows.shape[:2]),
        sample_stats=runs.stats,
        energies=energies,
        nested_r_hat=float(nested_r_hat(entries, superchains).max()),
        ess=ess,
        acceptance=runs.acceptance,
        divergences=runs.divergences,
        energy_gap=gap,
        energy_overlap=overlap,
        distance=distance,
        drift=moved(short[:, None], entries),
        trend=moved(entries[:, :half], entries[:, half:], paired=True),
        modes=None if centres is None else _events(law, centres),
        occupancy=occupancy,
        mode_r_hat=mode_r_hat,
        weight_gap=weight_gap,
        identities=identities,
        stein=stein,
        rounding=float(energy.abs().max()) * torch.finfo(energy.dtype).eps / 2,
    )


def _events(law: EnergyDistribution, rows: Tensor) -> Tensor:
    """Rows in the user's units, on the CPU."""
    dtype, device = law.model.place
    return law._as_values(law.model.coordinates.push(rows.to(device, dtype))[0]).cpu()


# -- arguments --------------------------------------------------------------------------------------------------------


def _single(law: Any) -> EnergyDistribution:
    law = law() if isinstance(law, Energy) and not law.context_shape else law
    model = law.model if isinstance(law, EnergyDistribution) else law
    if model is law or not isinstance(model, Energy):
        raise TypeError(
            f"law: got {type(model).__name__}, needs a continuous energy's law, model() or model(context); laws that "
            "are drawn directly have nothing to mix, and discrete ones are not moved by these chains."
        )
    if law.batch_shape:
        raise ShapeError(
            f"law: has batch shape {tuple(law.batch_shape)}; a report is of one law, so call the model at one context."
        )
    return law


def _sampler(kernel: str | Chains, model: Energy, short: int) -> Chains:
    if isinstance(kernel, Chains):
        return kernel
    if kernel not in ("hmc", "mala", "ula"):
        raise ValueError(f"kernel: got {kernel!r}, needs 'hmc', 'mala', 'ula', or a shape.Chains(...).")
    negatives = getattr(model, "negatives", None)
    size = float(negatives.log_step.exp()) if kernel == "ula" and negatives is not None else Chains.step_size
    return Chains(kernel, warmup=max(Chains.warmup, short), step_size=size)


def _check_counts(num_chains: int, superchains: int, short: int, long: int) -> None:
    if superchains < 2 or num_chains % superchains or num_chains < max(4, 2 * superchains):
        raise ValueError(
            f"num_chains, superchains: got {num_chains} and {superchains}; need at least two superchains of at least "
            "two chains each, all of one size."
        )
    if short < 1 or long < LEAST_LONG or short > long:
        raise ValueError(
            f"short, long: got {short} and {long}; need 1 <= short <= long, and long at least {LEAST_LONG}."
        )


def _rows_of(law: EnergyDistribution, name: str, x: Tensor | None, least: int) -> Tensor | None:
    """Events as rows of coordinates."""
    if x is None:
        return None
    if x.dim() != 1 + len(law.event_shape) or x.shape[1:] != law.event_shape or len(x) < least:
        raise ShapeError(
            f"{name}: got shape {tuple(x.shape)}, needs {(f'n >= {least}', *law.event_shape)}: at least {least} events."
        )
    law._check_value(x)
    return law.model.coordinates.pull(x)[0].detach()
