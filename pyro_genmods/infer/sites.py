"""What the sites of a program must be so that chains can sample them.

A density that is estimated with frozen probes is a density, but another one than the model's: a chain that accepts and
rejects by it samples the law of these probes. Kernels refuse it, by the model's fact ``acceptable``, unless the user
has said that this law is wanted.
"""

from __future__ import annotations

from typing import Any

from pyro.poutine.util import site_is_subsample

from ..foundation.errors import DensityError, ModelError

__all__ = ["check_sites", "estimated_sites", "refuse_estimates"]


def check_sites(trace: Any) -> None:
    """Refuse minibatches, and discrete latents that cannot be summed out.

    Arguments:
        trace: of a run of the program.

    Raises:
        ModelError: it has one; the site is named.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site_is_subsample(site):
            _check_minibatch(name, site["fn"])
        elif not site["is_observed"] and site["fn"].support.is_discrete and not site["fn"].has_enumerate_support:
            raise ModelError(
                f"site {name!r}: {type(site['fn']).__name__} is discrete and cannot be summed out by enumeration; "
                "observe it, use SVI with score-function gradients, or SMC over its noise."
            )


def _check_minibatch(name: str, fn: Any) -> None:
    if fn.subsample_size is not None and fn.subsample_size < fn.size:
        raise ModelError(
            f"plate {name!r}: has a minibatch of {fn.subsample_size} of {fn.size}, and a chain on a random density "
            "samples nothing; remove subsample_size, or use SVI."
        )


def estimated_sites(trace: Any) -> list[str]:
    """Names of the sites whose densities, which depend on latents, are estimates that nobody has accepted.

    An observed one depends on latents by its context.

    Arguments:
        trace: of a run of the program.
    """
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and _is_estimate(site["fn"], site["is_observed"])
    ]


def _is_estimate(fn: Any, observed: bool) -> bool:
    while hasattr(fn, "base_dist"):  # to_event, mask, expand, a transform
        fn = fn.base_dist
    acceptable = getattr(getattr(fn, "model", None), "acceptable", True)
    return not acceptable and not (observed and fn.context is None)


def refuse_estimates(program: Any, sampler: str) -> None:
    """Refuse a program with such sites.

    Arguments:
        program: what a potential runs.
        sampler: who refuses, for the message.

    Raises:
        DensityError: it has some; the first is named.
    """
    names = getattr(program, "estimates", [])
    if names:
        raise DensityError(
            f"site {names[0]!r}: its density is estimated with frozen probes, and {sampler}, which accepts and rejects "
            "by it, would sample the law of these probes instead of the model's. Move the site to noise space "
            f"(poutine.reparam(model, {{{names[0]!r}: infer.PushforwardReparam()}}); for a diffusion, of "
            "diffusion.sampled_by()), build the model with trace='exact', or say that the law of the probes is wanted: "
            "estimated=True."
        )
