r"""Where the unknown constant of an energy does not cancel, found in the program before anything runs.

An energy gives its law up to a constant,

.. math:: p(x \mid c) = \frac{f(x, c)}{Z(c)} .

While :math:`c` is fixed, :math:`f` stands for :math:`p` in every posterior. Where :math:`c` depends on latents it does
not: the chain would sample the model whose prior is multiplied by :math:`Z(c)`. And a number for the evidence lacks
:math:`\log Z` wherever the law is a likelihood, or is what particles are annealed to.

The program is run once. If a site has such a law it is run again with every latent tagged, and what reaches the density
of the site is read off the tags; that is independent of who differentiates what, so that samplers without gradients are
served too.

Reference:
    I. Murray, Z. Ghahramani, D. J. C. MacKay, MCMC for Doubly-Intractable Distributions, 2006, arXiv:1206.6848.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance

from ..contract import Density
from ..foundation.errors import DoublyIntractableError, ModelError
from .initialization import anywhere
from .quiet import quiet
from .reparam import unwrap
from .tilt import TILTED, base_of

__all__ = [
    "Constants",
    "Unknown",
    "constants_of_evidence",
    "refuse_doubly_intractable",
    "unknown_constants",
    "upstream",
]


@dataclass(frozen=True)
class Unknown:
    """A site whose law has a constant that is unknown, or was.

    Attributes:
        name: of the site.
        law: inside ``to_event``, ``mask`` and ``expand``.
        observed: whether it is a likelihood.
        tilted: whether it is, or can be, sampled as the tilt of a base, or is discrete and summed out.
        carrier: the site whose density lacks the constant: the site itself, or the factor that tilts its base.
    """

    name: str
    law: Any
    observed: bool
    tilted: bool
    carrier: str

    @property
    def licensed(self) -> bool:
        """Whether its user has said that the constant does not matter."""
        return bool(getattr(self.law.model, "allow_unnormalized", False))


def unknown_constants(
    model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> list[Unknown]:
    """Sites of a program whose laws have unknown constants, in their order. Random numbers are left alone.

    Arguments:
        model: a Pyro program.
        args, kwargs: its arguments.

    Example:
        >>> import pyro, pyro_genmods as gm
        >>> energy = gm.Energy(1, network=lambda y: y[:, 0] ** 4)
        >>> [(site.name, site.observed) for site in unknown_constants(lambda: pyro.sample("x", energy()))]
        [('x', False)]
    """
    return _unknown(_run(model, args, kwargs))


def upstream(
    model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
    """For every site with an unknown constant, the latents on which it depends, itself left out.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> energy = gm.Energy(1, context_features=1, network=lambda y, c: y[:, 0] ** 4 * c[:, 0].exp())
        >>> def model():
        ...     c = pyro.sample("c", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", energy(c[..., None]))
        >>> upstream(model)
        {'x': ['c']}
    """
    trace = _run(model, args, kwargs, TrackProvenance())
    found = {}
    for site in _unknown(trace):
        with torch.no_grad(), quiet():
            tags = _tags(trace.nodes[site.carrier], site.law) - {site.name, f"{site.name}_base"}
        found[site.name] = [name for name in trace.nodes if name in tags and _is_latent(trace.nodes[name])]
    return found


def refuse_doubly_intractable(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    sampler: str = "inference",
) -> None:
    """Refuse a program in which an unknown constant depends on a latent.

    Arguments:
        model: a Pyro program.
        args, kwargs: its arguments.
        sampler: who refuses, for the message.

    Raises:
        DoublyIntractableError: one does, and its user has not said ``allow_unnormalized``; site and latents are named.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> energy = gm.Energy(1, context_features=1, network=lambda y, c: y[:, 0] ** 4 * c[:, 0].exp())
        >>> def model():
        ...     c = pyro.sample("c", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", energy(c[..., None]))
        >>> refuse_doubly_intractable(model)
        Traceback (most recent call last):
        ...
        pyro_genmods.foundation.errors.DoublyIntractableError: site 'x': the constant of its law is unknown ...
    """
    unlicensed = [site.name for site in unknown_constants(model, args, kwargs) if not site.licensed]
    for name, latents in (upstream(model, args, kwargs) if unlicensed else {}).items():
        if latents and name in unlicensed:
            listed, values = ", ".join(map(repr, latents)), ", ".join(f"{latent!r}: ..." for latent in latents)
            raise DoublyIntractableError(
                f"site {name!r}: the constant of its law is unknown and depends on the latent site(s) {listed}, so "
                f"that {sampler} would sample another model's posterior. Attach a normaliser (shape.normalize(model, "
                "contexts), or Energy(log_normalizer=...)), sample by infer.Exchange(model), condition on what is "
                f"upstream (poutine.condition(model, {{{values}}})), or say allow_unnormalized=True if that other "
                "model is meant."
            )


class Constants(NamedTuple):
    """What annealing must know of constants to call its estimate an evidence.

    Attributes:
        missing: sites whose constants are unknown.
        error: standard error in nats of those that were estimated.
    """

    missing: list[str]
    error: float


def constants_of_evidence(
    model: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Constants:
    """What an evidence contains of the constants of likelihoods, and of tilts of bases.

    A prior without a base is drawn from as it is, and contributes nothing.

    Raises:
        ModelError: such a prior depends on a latent, so that its draws are not those of the unnormalised joint.

    Example:
        >>> import pyro, pyro_genmods as gm
        >>> tilted = gm.Energy(1, network=lambda y: y[:, 0] ** 4)
        >>> whole = gm.Energy(1, network=lambda y: y[:, 0] ** 4, base=None)
        >>> constants_of_evidence(lambda: (pyro.sample("x", tilted()), pyro.sample("y", whole())))
        Constants(missing=['x'], error=0.0)
    """
    trace = _run(model, args, kwargs)
    unknown = _unknown(trace)
    whole = [site.name for site in unknown if not (site.observed or site.tilted)]
    for name, latents in (upstream(model, args, kwargs) if whole else {}).items():
        if latents and name in whole:
            raise ModelError(
                f"site {name!r}: its energy has no base to start from (base=None), and its unknown constant depends on "
                f"{', '.join(map(repr, latents))}, so that its draws are not those of the unnormalised prior that "
                "allow_unnormalized asks for; give the energy a base, or use infer.HMC."
            )
    return Constants([site.name for site in unknown if site.name not in whole], _error(trace))


def _error(trace: Any) -> float:
    """Standard error of the constants that were estimated; all events of a model share that of its own."""
    errors: dict[int, float] = {}
    for site in _sites(trace, lambda law: law.density is Density.ESTIMATE):
        model, events = site.law.model, site.law.batch_shape.numel()
        if site.observed or site.tilted:
            error = events * getattr(model, "log_normalizer_error", 0.0)
            errors[id(model)] = errors.get(id(model), 0.0) + error
    return math.hypot(*errors.values())


def _run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    watcher: contextlib.AbstractContextManager[Any] | None = None,
) -> Any:
    """A run in silence, of which the caller's random numbers know nothing."""
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.no_grad(),
        quiet(),
        watcher or contextlib.nullcontext(),
    ):
        return poutine.trace(InitMessenger(anywhere)(model)).get_trace(*args, **dict(kwargs or {}))


def _unknown(trace: Any) -> list[Unknown]:
    return _sites(trace, lambda law: law.density is Density.UNNORMALIZED)


def _sites(trace: Any, wanted: Callable[[Any], bool]) -> list[Unknown]:
    """Sites of models whose laws are as wanted, and factors that are the tilts of such laws."""
    found = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["mask"] is False:
            continue
        owner, law = site["infer"].get(TILTED, (name, site["fn"]))
        while hasattr(law, "base_dist"):
            law = law.base_dist
        if not (hasattr(law, "density") and hasattr(law, "model") and wanted(law)):
            continue
        by_hand = TILTED in site["infer"]  # reparametrised
        tilted = by_hand or law.support.is_discrete or base_of(unwrap(site["fn"])[0]) is not None
        found.append(Unknown(owner, law, site["is_observed"] and not by_hand, tilted, name))
    return found


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _tags(site: dict[str, Any], law: Any) -> frozenset[str]:
    """Names of the latents on which a density depends."""
    try:
        return get_provenance(site["fn"].log_prob(site["value"]))
    except Exception:  # a network that tagged tensors do not pass through; the context is then all there is to see
        return get_provenance(getattr(law, "context", None))
