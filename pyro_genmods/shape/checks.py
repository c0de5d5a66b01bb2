"""What a mixing report finds, in plain words: every number against its limit, with what to do where it is beyond."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..foundation.stein import Identity, normal_equivalent

__all__ = ["Check", "Distance", "Shift", "checks_of"]

R_HAT, LEAST_ESS = 1.01, 100.0
LEAST_ACCEPTANCE, MOST_DIVERGENCES = 0.1, 0.01
MOST_GAP, LEAST_OVERLAP = 1.0, 0.5  # standard deviations of the energy, and common mass of two histograms
MOST_DISTANCE, SURE_DISTANCE = 0.01, 5.0  # a fifth of a standard deviation, say; and standard errors
FALSE_ALARM = 1e-4  # of a z-score, Bonferroni over its entries
STEIN_ALARM = 1e-3  # the least p-value that so many bootstraps can give
RELEVANT_SHIFT, RELEVANT_WEIGHT, RELEVANT_VIRIAL = 0.1, 0.1, 0.02  # what is smaller is no finding, however sure
MOST_ROUNDING = 0.5  # nats, at which an accept test is chance
REMEDY_MODES = "Draw by sampler='annealed' or 'tempering', which give modes their weights, and not by plain chains"
REMEDY_DENSITY = (
    "Train by chains that go on and are accepted or rejected (shape.Contrastive(kernel='mala', persistent=True), more "
    "transitions), or without chains (objective='denoising', 'sliced', 'nce')"
)


class Check(NamedTuple):
    """One number against its limit.

    Attributes:
        name: of the number.
        measured, wanted: as they are printed.
        severity: how many times beyond the limit, in units in which all checks compare; above one it has failed.
        reason: what is found and what to do, if it has.
    """

    name: str
    measured: str
    wanted: str
    severity: float
    reason: str


class Shift(NamedTuple):
    """How far means have moved, entry by entry.

    Attributes:
        sd: in standard deviations of the law, signed; shares, of weights of modes.
        z: in standard errors.
        degrees: of freedom of these.
    """

    sd: Tensor
    z: Tensor
    degrees: int

    @property
    def worst(self) -> int:
        """The entry that moved most surely."""
        return int(self.z.abs().argmax())

    def severity(self, relevant: float) -> float:
        """How many times beyond both what chance explains and what is of interest."""
        sure = _sureness(self.z, self.degrees)
        return float(torch.minimum(sure, self.sd.abs().double() / relevant).max())


class Distance(NamedTuple):
    r"""Energy distance of two samples, as a share of its largest value, from 0 to 1.

    .. math:: 1 - \frac{\mathbb E |x - x'| + \mathbb E |y - y'|}{2\, \mathbb E |x - y|}

    Attributes:
        share: less what chance gives.
        z: in standard deviations under permutation.

    Reference:
        G. J. Szekely, M. L. Rizzo, Energy statistics: A class of statistics based on distances, Journal of Statistical
        Planning and Inference 143 (2013) 1249-1272.
    """

    share: float
    z: float


def checks_of(report: Any) -> tuple[Check, ...]:
    """All checks of a :class:`~pyro_genmods.shape.MixingReport`, in the order in which they are printed."""
    found = (*_of_chains(report), *_of_modes(report), *_of_density(report), *_of_score(report))
    return tuple(check._replace(severity=1e3) if math.isnan(check.severity) else check for check in found)


def _of_chains(report: Any) -> Iterator[Check]:
    yield Check(
        "nested R-hat",
        f"{report.nested_r_hat:.3f}",
        f"< {R_HAT}",
        _r_hat_severity(report.nested_r_hat),
        f"chains still know where they started (nested R-hat {report.nested_r_hat:.3f}). Let them run longer "
        f"(long=...); if it stays, they do not cross between modes. {REMEDY_MODES}.",
    )
    yield Check(
        "effective draws",
        f"{report.ess:.0f}",
        f"> {LEAST_ESS:.0f}",
        math.sqrt(LEAST_ESS / max(report.ess, 1e-6)),
        f"all draws are worth {report.ess:.0f} independent ones. Let chains run longer (long=...), or sample by "
        "shape.Annealed().",
    )
    if report.kernel != "ula":
        yield Check(
            "acceptance",
            f"{report.acceptance:.2f}",
            f"> {LEAST_ACCEPTANCE}",
            LEAST_ACCEPTANCE / max(report.acceptance, 1e-6),
            f"{report.acceptance:.1%} of the proposals were accepted: the energy is too rough for one step size. Warm "
            "up for longer (kernel=shape.Chains(warmup=300)), or smooth the network (decay of weights).",
        )
    yield Check(
        "divergences",
        f"{report.divergences:.2%}",
        f"< {MOST_DIVERGENCES:.0%}",
        report.divergences / MOST_DIVERGENCES,
        f"{report.divergences:.1%} of the transitions diverged: somewhere the energy is too steep for the step size. "
        "Warm up for longer (kernel=shape.Chains(warmup=300)), or smooth the network.",
    )


def _of_modes(report: Any) -> Iterator[Check]:
    if report.occupancy is None:
        return
    low, high = report.occupancy.min(0).values, report.occupancy.max(0).values
    worst = int((high - low).argmax())
    spread = f"between {float(low[worst]):.0%} and {float(high[worst]):.0%}"
    yield Check(
        "modes, R-hat",
        f"{report.mode_r_hat:.3f}",
        f"< {R_HAT}",
        _r_hat_severity(report.mode_r_hat),
        f"superchains disagree on the weights of the modes: mode {worst} has {spread} of their draws. {REMEDY_MODES}.",
    )
    if report.weight_gap is not None:
        gap, worst = report.weight_gap, int(report.weight_gap.sd.abs().argmax())
        own = float(report.occupancy.mean(0)[worst])
        yield Check(
            "modes, data",
            f"{float(gap.sd[worst]):+.2f}",
            f"< {RELEVANT_WEIGHT}",
            gap.severity(RELEVANT_WEIGHT),
            f"mode {worst} has {own - float(gap.sd[worst]):.0%} of the data and {own:.0%} of the long run. Score "
            "matching does not see weights of far modes: train by objective='nce' or 'contrastive'.",
        )


def _of_density(report: Any) -> Iterator[Check]:
    for name, shift, what in (
        ("short to long", report.drift, f"between chains of {report.lengths[0]} transitions and the long run"),
        ("trend of the long run", report.trend, "between the halves of the long run"),
    ):
        moved = "the energy" if shift.worst == 0 else f"coordinate {shift.worst - 1}"
        z, sd = float(shift.z[shift.worst]), float(shift.sd[shift.worst])
        yield Check(
            name,
            f"{z:+.1f} se",
            f"< {_limit(shift.z.numel()):.1f}",
            shift.severity(RELEVANT_SHIFT),
            f"{what} {moved} moves by {sd:+.2f} standard deviations ({z:+.1f} standard errors): "
            f"{_drift_remedy(report)}.",
        )
    if report.distance is not None:
        side = "above" if report.energy_gap > 0 else "below"
        yield Check(
            "energy gap",
            f"{report.energy_gap:+.2f} sd",
            f"< {MOST_GAP:.0f}",
            abs(report.energy_gap) / MOST_GAP,
            f"energies of data lie {abs(report.energy_gap):.1f} standard deviations {side} those of the long run: what "
            f"the energy holds for likely is not the data. {REMEDY_DENSITY}.",
        )
        yield Check(
            "energy overlap",
            f"{report.energy_overlap:.2f}",
            f"> {LEAST_OVERLAP}",
            (1 - report.energy_overlap) / (1 - LEAST_OVERLAP),
            f"energies of data and of the long run have {report.energy_overlap:.0%} in common: the energy's law is not "
            f"that of the data. {REMEDY_DENSITY}.",
        )
        share, z = report.distance
        yield Check(
            "distance to data",
            f"{share:.3f}",
            f"< {MOST_DISTANCE}",
            min(math.sqrt(max(share, 0.0) / MOST_DISTANCE), z / SURE_DISTANCE),  # a square, as R-hat is
            f"data and draws of the long run lie apart (energy distance {share:.3f}, {z:+.0f} standard errors): the "
            "energy's law is not that of the data. Train for longer; objective='nce' and persistent chains "
            "(shape.Contrastive()) see weights of far places, which short chains and score matching do not.",
        )


def _of_score(report: Any) -> Iterator[Check]:
    for name, identity in report.identities.items():
        shift = Shift(identity.value, identity.z, identity.chains - 1)
        many = report.features if name in ("virial_sum", "curvature") else 1
        yield Check(
            f"{name.replace('_', ' ')} identity",
            f"{_largest(identity):+.1f} se",
            f"< {_limit(identity.z.numel()):.1f}",
            shift.severity(RELEVANT_VIRIAL * many),
            f"the {name.replace('_', ' ')} identity of the score is off by {_largest(identity):+.1f} standard errors: "
            + ("the step of unadjusted chains is too long; take kernel='mala'." if report.kernel == "ula" else LONGER),
        )
    stein = report.stein
    yield Check(
        "kernel Stein discrepancy",
        f"p = {stein.p_value:.4f}",
        f"> {STEIN_ALARM}",
        math.log(stein.p_value) / math.log(STEIN_ALARM),
        f"the draws are not of the law of the score (kernel Stein discrepancy {stein.u_statistic:.2g}). {LONGER}",
    )
    yield Check(
        "rounding",
        f"{report.rounding:.0e} nats",
        f"< {MOST_ROUNDING}",
        report.rounding / MOST_ROUNDING,
        f"energies are rounded to {report.rounding:.2g} nats, by which the accept test is chance. Use model.double().",
    )


LONGER = "Let chains run longer (long=...)."


def _drift_remedy(report: Any) -> str:
    if report.distance is not None:
        return f"the energy makes short chains stay near the data, and is no density of them. {REMEDY_DENSITY}"
    return "short chains are not yet draws of the law. Take more transitions (sampler=shape.Chains(transitions=...))"


def _largest(identity: Identity) -> float:
    return float(identity.z[identity.z.abs().argmax()])


def _limit(entries: int) -> float:
    """The normal score beyond which some of so many entries are too rarely by chance."""
    return -float(torch.special.ndtri(torch.tensor(FALSE_ALARM / (2 * entries), dtype=torch.float64)))


def _sureness(z: Tensor, degrees: int) -> Tensor:
    return normal_equivalent(z.abs().double(), degrees) / _limit(z.numel())


def _r_hat_severity(r_hat: float) -> float:
    """In the units of a z-score: the spread of superchains over that which is allowed."""
    return math.sqrt(max(r_hat**2 - 1, 0.0) / (R_HAT**2 - 1))
