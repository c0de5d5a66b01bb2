r"""From inference on a Pyro program to what ArviZ reads.

Samplers keep draws of latents, and little else. The rest follows from the program: it is run again at every draw (see
``program.py``), which gives the deterministic values, the pointwise log likelihood

.. math:: \log p(y_i \mid x_s) \qquad \text{for each datum } i \text{ and draw } s ,

the log prior of each latent, new data, and the log joint density. ``arviz.from_pyro`` gets the log likelihood of vector
latents wrong without a word when there are as many draws as data, drops it otherwise, counts ``pyro.factor`` and
``pyro.deterministic`` as data, and is gone from ArviZ 1.0.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import pareto_smoothed
from .constants import drop_unknown, has_unknown, refuse_likelihoods
from .labels import Labels, Variable, assembled
from .marginal import summed_out
from .program import FAILURES, Outcome, Program
from .sources import Inference, read_source

__all__ = ["to_inference_data"]

LEAST_FOR_TAIL = 100
NUMBERS = (bool, int, float)


def to_inference_data(
    source: Any,
    model: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    num_prior_samples: int = 500,
    num_samples: int = 1000,
    group_by_chain: bool = True,
    coords: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    r"""The outcome of inference as an ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (ArviZ 1.x).

    ==================== =============================================================================================
    group                holds
    ==================== =============================================================================================
    posterior            draws of the latents, and deterministic sites at these draws
    sample_stats         ``lp``, the log joint density in the model's units, with its factors and scales, unless the
                         sampler has its own; its other statistics (``diverging``, ``energy``, ...); of a guide its
                         log density ``log_q`` and ``log_weight``, logarithms of Pareto-smoothed importance weights
                         that sum to one, with the attributes ``pareto_khat`` and ``elbo``. Of Pyro's ``MCMC`` there
                         are ``diverging`` and, for each chain, the attribute ``acceptance_rate``
    log_likelihood       of each datum, or vector of data that are one event
    log_prior            of each latent site, entry by entry
    posterior_predictive new data at each draw
    prior                independent draws of latents and deterministic sites
    prior_predictive     data drawn with them
    observed_data        the data
    constant_data        the other tensors, arrays and numbers among the arguments, by parameter name
    ==================== =============================================================================================

    Dimensions inside a plate have its name, others are called ``{site}_dim_{i}``. Sites of ``pyro.factor`` and
    ``pyro.deterministic`` are no data. Masked data have no log likelihood: what is left of their site is one dimension,
    ``{site}_seen``. A subsampling plate is held at one minibatch, whose indices become coordinates; log likelihoods are
    per datum and not scaled up. A site that ``PushforwardReparam`` observes has its whole log likelihood under its own
    name, and no predictive draws. Random numbers are Pyro's: ``pyro.set_rng_seed`` repeats them. Results are on the
    CPU, the program runs where the draws are.

    Of a mixing report (``pyro_genmods.shape.mixing_report``) ``posterior`` holds the long run as ``x``, and
    ``sample_stats`` its statistics; both have the verdict, its reason and the main numbers as attributes.
    ``observed_data`` are the energies of the data, ``constant_data`` those of the short run and the weights of modes.

    Discrete latents that were summed out have no draws. Where each datum has its own, in the same plates, its log
    likelihood is the log of the sum. Elsewhere, and where other latents have no draws, what depends on them is left
    out, with a warning that names them. Data under an energy without a normaliser have no log likelihood, and a guide
    of a model with one no ``elbo``.

    Arguments:
        source: an ``MCMC`` of ``pyro_genmods.infer`` or ``pyro.infer`` that has run; a guide after SVI; a mixing
            report of an energy; or a dict of draws by site, ``(chains, draws, *shape)``.
        model: the program; default that of the ``MCMC``. A guide needs it, with draws it can be left out.
        args, kwargs: its arguments; default those of the run of the ``MCMC``.
        log_likelihood, posterior_predictive: whether to make these groups, the largest.
        num_prior_samples: draws for ``prior`` and ``prior_predictive``; zero leaves them out.
        num_samples: draws of a guide.
        group_by_chain: False reads a dict of draws of one chain, ``(draws, *shape)``.
        coords: coordinates by dimension.
        dims: names of dimensions by variable, without those of chains and draws; they win over plates.

    Raises:
        TypeError: a source that is none of these, or arguments that are no tuple.
        ValueError: an ``MCMC`` that has not run, a guide without a model, draws of none of the model's latents, or of
            an observed site; a dimension called like a variable; ``dims`` or ``coords`` of something unknown.
        DensityError: a log likelihood of data whose law has an unknown constant.
        ShapeError: draws without chains, ``dims`` or ``coords`` that do not fit.

    Warns:
        UserWarning: what is left out, and why; a point estimate or a program that is noisy.

    Reference:
        R. Kumar, C. Carroll, A. Hartikainen, O. Martin, ArviZ a unified library for exploratory analysis of Bayesian
        models in Python, Journal of Open Source Software 4 (2019) 1143.

    Example:
        >>> import arviz, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)
        >>> y = torch.randn(10, 3)
        >>> draws = {"loc": y.mean(0) + torch.randn(2, 200, 3) / 10**0.5}
        >>> data = to_inference_data(draws, model, (y,))
        >>> data["log_likelihood"]["y"].dims, data["posterior_predictive"]["y"].shape
        (('chain', 'draw', 'data'), (2, 200, 10, 3))
        >>> int(arviz.loo(data).n_data_points)
        10
    """
    found = read_source(source, model, args, kwargs, num_samples, group_by_chain)
    draws = found.draws
    groups: dict[str, dict[str, Tensor]] = {"posterior": dict(draws), "sample_stats": dict(found.stats)}
    attrs: dict[str, dict[str, Any]] = {"posterior": dict(found.attrs), "sample_stats": dict(found.attrs)}
    if found.model is None:
        return assembled(*_labelled(groups, found.constants, Labels(None, coords, dims, draws)), attrs)
    program = _program(found)
    if log_likelihood:
        refuse_likelihoods(program)
    flat = {name: x.flatten(0, 1) for name, x in draws.items()}
    shape = next(iter(draws.values())).shape[:2]
    scored = summed_out(program, flat) if program.hidden else program.score(flat)
    _warn_of_hidden(program, scored)
    if scored is not None:
        groups |= _scored(groups, scored, program, shape, log_likelihood)
        drop_unknown(program, flat, groups)
        attrs["sample_stats"] |= _weighed(groups["sample_stats"], scored, found)
        if has_unknown(program):
            attrs["sample_stats"].pop("elbo", None)
        if posterior_predictive:
            groups["posterior_predictive"] = _predicted(program, flat, shape)
    if num_prior_samples:
        groups |= _prior(program, num_prior_samples)
    constants = {"observed_data": {name: program.sites[name].value for name in program.names("data")}}
    constants["constant_data"] = dict(_constants(found, constants["observed_data"]))
    return assembled(*_labelled(groups, constants, Labels(program, coords, dims)), attrs)


# -- groups from runs of the program ----------------------------------------------------------------------------------


def _program(found: Inference) -> Program:
    draws, point = found.draws, {name: x[0, 0] for name, x in found.draws.items()}
    program = Program(found.model, found.args, found.kwargs, point, found.minibatches)
    known, data = set(program.names("latent", "deterministic")), set(program.names("data", "noise"))
    if not known & set(draws):
        raise ValueError(f"source: got draws of {sorted(draws)}, needs draws of latents of the model: {sorted(known)}.")
    if data & set(draws):
        raise ValueError(
            f"source: got draws of {sorted(data & set(draws))}, which the model observes; leave them out, the "
            "posterior predictive is drawn here."
        )
    if program.noisy:
        _warn("the model draws random numbers outside its sites; its log densities are those of one such draw.")
    if program.minibatches:
        _warn(
            f"plates {sorted(program.minibatches)} are subsampled and held at one minibatch; give a model without "
            "subsample_size to have the log likelihood of all data."
        )
    return program


def _scored(
    groups: Mapping[str, dict[str, Tensor]], scored: Outcome, program: Program, shape: torch.Size, log_likelihood: bool
) -> dict[str, dict[str, Tensor]]:
    """The groups that follow from the program at the draws."""
    chained = {name: x.unflatten(0, shape) for name, x in scored.log_prob.items()}
    new = {
        "posterior": groups["posterior"] | {name: x.unflatten(0, shape) for name, x in scored.values.items()},
        "sample_stats": {"lp": scored.total.unflatten(0, shape)} | groups["sample_stats"],
        "log_prior": {name: chained[name] for name in program.names("latent") if name in chained},
    }
    if log_likelihood:
        new["log_likelihood"] = {name: chained[name] for name in program.names("data")}
    return new


def _weighed(stats: dict[str, Tensor], scored: Outcome, found: Inference) -> dict[str, Any]:
    """Add the importance weights of a guide to its statistics; returns what they say as a whole."""
    if not found.weighted:
        return {}
    ratios = scored.total.double() - found.stats["log_q"][0].cpu().double()
    said = {"elbo": float(ratios.mean())}
    constant = all(bool((x == x[:, :1]).all()) for x in found.draws.values())
    if constant:
        _warn("all draws of the guide are equal: it is a point estimate, whose spread and weights mean nothing.")
    if not constant and len(ratios) >= LEAST_FOR_TAIL:
        smoothed, said["pareto_khat"] = pareto_smoothed(ratios)
        stats["log_weight"] = smoothed[None]
    return said


def _predicted(program: Program, flat: Mapping[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
    new = _drawable(program)
    outcome = _attempt("posterior_predictive", lambda: program.draw(shape.numel(), flat, new)) if new else None
    return {name: outcome.values[name].unflatten(0, shape) for name in new} if outcome else {}


def _prior(program: Program, n: int) -> dict[str, dict[str, Tensor]]:
    new = _drawable(program)
    outcome = _attempt("prior", lambda: program.draw(n, None, new))
    if outcome is None:
        return {}
    return {
        "prior": {name: outcome.values[name][None] for name in program.names("latent", "deterministic")},
        "prior_predictive": {name: outcome.values[name][None] for name in new},
    }


def _drawable(program: Program) -> list[str]:
    """Data sites of which new values can be drawn: a site transformed into noise is a constant of that run."""
    return [name for name in program.names("data") if not program.sites[name].noise]


def _attempt(group: str, draw: Callable[[], Outcome]) -> Outcome | None:
    try:
        return draw()
    except FAILURES as error:
        _warn(f"{group} is left out: the model cannot be drawn from ({type(error).__name__}: {error}).")
        return None


def _warn_of_hidden(program: Program, scored: Outcome | None) -> None:
    if scored is None:
        _warn(
            f"the source has no draws of the latent sites {program.hidden}; log_likelihood, log_prior, lp, "
            "posterior_predictive and deterministic sites, which depend on them, are left out. Where they were summed "
            "out, write the sum into the likelihood (dist.MixtureSameFamily), or draw them (pyro.infer.infer_discrete)."
        )
    elif lost := [name for name in program.names("deterministic") if name not in scored.values]:
        _warn(f"{lost} are left out: they depend on {program.hidden}, which the source has no draws of.")


def _warn(message: str) -> None:
    warnings.warn(f"to_inference_data: {message}", stacklevel=4)


# -- arrays and names -------------------------------------------------------------------------------------------------


def _constants(found: Inference, observed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors, arrays and numbers among the arguments that are not observed values."""
    for name, x in _leaves(_arguments(found)):
        if not any(x.shape == y.shape and x.eq(y.to(x)).logical_or(x.isnan()).all() for y in observed.values()):
            yield name, x


def _arguments(found: Inference) -> dict[str, Any]:
    """Arguments of the model by parameter name; by position where the names are not known."""
    function = found.model.forward if isinstance(found.model, nn.Module) else found.model
    try:
        bound = inspect.signature(function).bind(*found.args, **found.kwargs)
    except (TypeError, ValueError):
        return {f"arg_{i}": x for i, x in enumerate(found.args)} | found.kwargs
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def _leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            yield name, x.detach()
        elif isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
            yield name, torch.as_tensor(x)
        elif isinstance(x, NUMBERS) or (isinstance(x, tuple | list) and x and all(isinstance(e, NUMBERS) for e in x)):
            yield name, torch.tensor(x)
        elif isinstance(x, Mapping):
            yield from _leaves({f"{name}_{key}": value for key, value in x.items()})
        elif isinstance(x, tuple | list):
            yield from _leaves({f"{name}_{i}": value for i, value in enumerate(x)})


def _labelled(
    groups: Mapping[str, Mapping[str, Tensor]], constants: Mapping[str, Mapping[str, Tensor]], labels: Labels
) -> tuple[dict[str, dict[str, Variable]], dict[str, np.ndarray]]:
    """All groups as arrays with named dimensions, and their coordinates."""
    named: dict[str, dict[str, Variable]] = {}
    for group, tensors in groups.items():
        named[group] = {}
        for name, x in tensors.items():
            if group == "log_likelihood":
                x, dims = labels.of_data(name, x)
            else:
                dims = (labels.of_log_prob if group == "log_prior" else labels.of_value)(name, x.shape[2:])
            named[group] |= {name: Variable(_array(x), ["chain", "draw", *dims])} if x.numel() else {}
    for group, tensors in constants.items():
        named[group] = {name: Variable(_array(x), labels.of_value(name, x.shape)) for name, x in tensors.items()}
    labels.check_use(named)
    return named, labels.coords


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().resolve_conj().resolve_neg().numpy()
