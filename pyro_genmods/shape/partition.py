r"""The constant of an energy's law, :math:`\log Z = \log \int b(x)\, e^{-E(x)}\, \mathrm dx`, with its error.

Every estimate is a ratio of normalisers: that of the law to that of a reference that is normalised and can be drawn.
With densities :math:`b` of the reference and :math:`\tilde p` of the law, and the laws
:math:`\pi_\beta \propto b^{1 - \beta} \tilde p^\beta` between them,

=================== ================================================================================================
``"importance"``    :math:`\log \mathbb E_b\, \tilde p / b`; trusted only if the shape of the weights' tail is below 0.7
``"ais"``           particles that go through the :math:`\pi_\beta` and add up weights, each for itself
``"smc"``           the same with particles that are resampled: the mean weights of all steps
``"thermodynamic"`` :math:`\int_0^1 \mathbb E_\beta \log (\tilde p / b)\, \mathrm d\beta`
``"bridge"``        works of particles that go up, and of particles that go down from the law, at least variance
``"auto"``          ``"bridge"``
=================== ================================================================================================

The reference is fitted first (:mod:`~pyro_genmods.shape.roads`), or given: a flow that was trained on draws. What is
known of an answer:

* ``standard_error``: from particles where they are independent, else from the scatter of independent runs;
* ``lower``, ``upper``: the mean weight of particles that go up is below the truth, that of particles that go down from
  *exact* draws of the law is above it, in expectation of its logarithm; both with three standard errors outwards.
  Exact draws are rare. Where a population of sequential Monte Carlo stands in for them the upper bound is only as good
  as it is, and ``reason`` says so;
* ``ok`` and ``reason``: whether weights, runs and bounds are such that one may believe it.

The estimates themselves never use exact draws, so that what is seen of them on references
(:mod:`~pyro_genmods.shape.references`) holds for the energies one has.

References:
    R. M. Neal, Annealed Importance Sampling, 2001, arXiv:physics/9803008.
    R. B. Grosse, Z. Ghahramani, R. P. Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo, 2015,
    arXiv:1511.02543.
    X.-L. Meng, W. H. Wong, Simulating Ratios of Normalizing Constants via a Simple Identity, 1996, Statistica Sinica 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from ..contract import Density, GenerativeModel
from ..distribution import GenerativeDistribution
from ..foundation.errors import DensityError, PlacementError, ShapeError
from ..foundation.pareto import TRUSTED
from .network import check_confining
from .passes import METHODS, Estimate, Plan, estimate
from .sampling import MOST_ROWS, new_generator

if TYPE_CHECKING:
    from .energy import Energy

__all__ = ["LogNormalizer", "log_normalizer"]

NUMBERS = ("value", "standard_error", "lower", "upper", "ess")
LEAST_PARTICLES, LEAST_RUNS = 16, 2
LEAST_ESS = 0.2
LARGEST_ERROR, WIDEST = 0.5, 2.0  # nats, of a standard error and between the bounds
APART = 4.0  # standard errors between two estimates, beyond SLACK
SLACK = 0.05


@dataclass(frozen=True)
class LogNormalizer:
    r"""An estimate of :math:`\log Z`, in nats; numbers, or tensors of the batch of contexts.

    Attributes:
        value, standard_error: the estimate.
        lower, upper: stochastic bounds.
        ess: what weights are worth, in proportion to the particles: those of particles that go up, of importance
            sampling, or of the worst step of a population.
        gradients: of the energy, over all contexts and including what was spent on the reference.
        method: and by which reference and how many steps.
        ok: whether it can be believed, at every context.
        reason: why not; and where the upper bound comes from.

    Example:
        >>> LogNormalizer(1.84, 0.01, 1.8, 1.9, 0.7, 100_000, "bridge", True, "").value
        1.84
    """

    value: float | Tensor
    standard_error: float | Tensor
    lower: float | Tensor
    upper: float | Tensor
    ess: float | Tensor
    gradients: int
    method: str
    ok: bool
    reason: str


def log_normalizer(
    law: Energy | GenerativeDistribution,
    *,
    method: str = "auto",
    base: GenerativeModel | None = None,
    components: int = 16,
    particles: int | None = None,
    runs: int | None = None,
    temperatures: int | None = None,
    context: Tensor | None = None,
    seed: int | None = None,
    progress_bar: bool = False,
) -> LogNormalizer:
    r"""Estimate :math:`\log Z` of an energy's law: of the exponential of its ``log_prob``.

    Arguments:
        law: an energy's law, ``energy(context)``, or an energy.
        method: ``"auto"``, ``"ais"``, ``"smc"``, ``"bridge"``, ``"thermodynamic"`` or ``"importance"``; see the module.
        base: a fitted model with an exact density of the same events to start from; by default a mixture of Gaussians
            is fitted.
        components: of that mixture, at most; 1 for a Gaussian.
        particles: of each run; 512 by default, 128 where there are several contexts.
        runs: independent ones of each context; 8 by default, 4 where there are several contexts.
        temperatures: steps of particles that go up and down; by default as many as the law asks for.
        context: ``(*batch, *context_shape)``, if ``law`` is a conditional energy.
        seed: makes it repeatable; default a number drawn from torch's generator.
        progress_bar: show what is being done.

    Raises:
        ValueError: an option out of its range, or a law that is normalised already.
        DensityError: an energy that does not confine and has no base; a ``base`` without an exact density.
        ShapeError, PlacementError: a ``base`` or a context that does not fit the law.
        SamplingError: an energy that is NaN, or nowhere finite.

    Example:
        >>> import pyro_genmods as gm
        >>> valley = gm.shape.Rosenbrock()
        >>> found = gm.shape.log_normalizer(valley, particles=128, runs=4, seed=0)
        >>> found.ok, abs(found.value - valley.exact_log_normalizer) < 0.2, found.lower < found.value < found.upper
        (True, True, True)
    """
    law, model = _law(law, context)
    several = bool(law.batch_shape) and law.context is not None
    particles = (128 if several else 512) if particles is None else particles
    runs = (4 if several else 8) if runs is None else runs
    plan = Plan(method, particles, runs, temperatures, components if base is None else base)
    _check(model, plan, base)
    c = None if law.context is None else law._context_rows(law.batch_shape)
    if model.continuous and model.base is None:
        check_confining(model, None if c is None else law.context.reshape(-1, *model.context_shape))
    with tqdm(disable=not progress_bar, desc="log Z") as bar:

        def report(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        found = _in_parts(model, c, plan, seed, report)
    return _record(found, plan, law.batch_shape if several else None, getattr(model, "draws_exactly", False))


def _law(law: Energy | GenerativeDistribution, context: Tensor | None) -> tuple[GenerativeDistribution, Energy]:
    if isinstance(law, GenerativeDistribution):
        if context is not None:
            raise ShapeError("context: the law has one already; give it to an energy, or leave it out.")
    else:
        law = law(context)
    model = law.model
    if not hasattr(model, "annealing"):
        raise DensityError(
            f"law: {type(model).__name__} is no energy; its log_prob has density {model.density.name}, and nothing is "
            "to be normalised."
        )
    if model.density is not Density.UNNORMALIZED:
        raise ValueError(
            f"law: is normalised already (density {model.density.name}); to estimate its constant anew, take it away "
            "first: model.normalizer.forget(), or build the energy without log_normalizer and normalized."
        )
    return law, model


def _check(model: Energy, plan: Plan, base: GenerativeModel | None) -> None:
    if plan.method not in METHODS:
        raise ValueError(f"method: got {plan.method!r}, needs one of {', '.join(map(repr, METHODS))}.")
    for name, number, least in (
        ("particles", plan.particles, LEAST_PARTICLES),
        ("runs", plan.runs, LEAST_RUNS),
        ("temperatures", 1 if plan.temperatures is None else plan.temperatures, 1),
        ("components", plan.base if base is None else 1, 1),
    ):
        if number < least:
            raise ValueError(f"{name}: got {number}, needs at least {least}.")
    if not model.continuous and (base is not None or plan.method == "importance"):
        raise ValueError(
            f"method, base: {type(model).__name__} has no rows of real numbers, on which another law could be put; "
            "leave base out, and take method='auto'."
        )
    if base is not None:
        _check_base(model, base)


def _check_base(model: Energy, base: GenerativeModel) -> None:
    if not isinstance(base, GenerativeModel):
        raise DensityError(f"base: got {type(base).__name__}, needs a fitted model of this package: a flow, say.")
    if base.density is not Density.EXACT:
        raise DensityError(
            f"base: {type(base).__name__} has density {base.density.name}, needs an exact one: a fitted flow, say."
        )
    if base.event_shape != model.event_shape or str(base.support) != str(model.support):
        raise ShapeError(
            f"base: has events {tuple(base.event_shape)} on {base.support}, the law {tuple(model.event_shape)} on "
            f"{model.support}; fit one to draws of this law."
        )
    if base.context_shape and base.context_shape != model.context_shape:
        raise ShapeError(f"base: has context {tuple(base.context_shape)}, the law {tuple(model.context_shape)}.")
    if base.place != model.place:
        raise PlacementError(
            f"base: is {base.place[0]} on {base.place[1]}, the law {model.place[0]} on {model.place[1]}; move one with "
            ".to()."
        )


def _in_parts(model: Energy, c: Tensor | None, plan: Plan, seed: int | None, report: object) -> list[Estimate]:
    """Estimates for so many contexts at a time as fit into one batch; the caller's random stream is left alone."""
    device = model.place[1]
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    part = max(1, MOST_ROWS // (plan.particles * plan.runs))
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        generator = new_generator(device)
        parts = [None] if c is None else c.split(part)
        return [estimate(model, rows, plan, generator, report) for rows in parts]


def _record(found: list[Estimate], plan: Plan, batch: torch.Size | None, exact: bool) -> LogNormalizer:
    columns = {name: torch.cat([getattr(part, name) for part in found]) for name in (*NUMBERS, "shape")}
    plain, plain_error = (torch.cat([part.plain[i] for part in found]) for i in (0, 1))
    problems = _problems(columns, plain, plain_error)
    bound = "exact draws" if exact else "draws by sequential Monte Carlo, and only as good as they are"
    method = "bridge" if plan.method == "auto" else plan.method
    numbers = {name: columns[name].reshape(batch) if batch is not None else float(columns[name][0]) for name in NUMBERS}
    return LogNormalizer(
        **numbers,
        gradients=sum(part.gradients for part in found),
        method=f"{method} from {found[0].reference}, {max(part.rungs for part in found)} temperatures",
        ok=not problems,
        reason="; ".join([*problems, f"the upper bound is from {bound}"]),
    )


def _problems(columns: dict[str, Tensor], plain: Tensor, plain_error: Tensor) -> list[str]:
    """What speaks against the estimates, each with the worst number."""
    value, error, ess, shape = (columns[name] for name in ("value", "standard_error", "ess", "shape"))
    gap = columns["upper"] - columns["lower"]
    apart = (value - plain).abs() - SLACK - APART * (error.square() + plain_error.square()).sqrt()
    finite = torch.stack([value, error, columns["lower"], columns["upper"]]).isfinite()
    checks = (
        (~finite.all(0), "it is not finite; the law hardly meets the reference"),
        (ess < LEAST_ESS, f"the weights are worth {float(ess.min()):.1%} of the particles, less than {LEAST_ESS:.0%}"),
        (shape > TRUSTED, f"the weights have a tail of shape {_most(shape):.2f}, above {TRUSTED}"),
        (error > LARGEST_ERROR, f"runs disagree: the standard error is {_most(error):.2g} nats"),
        (gap > WIDEST, f"the bounds are {_most(gap):.2g} nats apart"),
        (gap < 0, "the bounds contradict each other; particles did not reach where the law is"),
        (apart > 0, "particles that go up and particles that go down disagree"),
    )
    return [text for failed, text in checks if bool(failed.any())]


def _most(x: Tensor) -> float:
    return float(x[~x.isnan()].max()) if bool((~x.isnan()).any()) else math.nan
