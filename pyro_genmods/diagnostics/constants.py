r"""What may be said of a program whose laws have unknown constants, :math:`p(x \mid c) = f(x, c) / Z(c)`.

As a prior with a fixed context such a law shifts log densities by one number, which no diagnostic of draws reads. A
*likelihood* without its constant is none: the comparison of models, and the prediction of a datum that is left out,
would be off by :math:`\log Z` for each datum. Nor is there a log joint density, not even up to a number, where the
context is inferred; and an evidence lower bound lacks the constant in any case.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..contract import Density
from ..foundation.errors import DensityError
from .program import Program

__all__ = ["drop_unknown", "has_unknown", "refuse_likelihoods"]


def refuse_likelihoods(program: Program) -> None:
    """Refuse log likelihoods of data whose law has an unknown constant.

    Arguments:
        program: that was looked at.

    Raises:
        DensityError: there are such data; the site is named.
    """
    names = [name for name in program.names("data") if _is_unknown(program.sites[name].law)]
    if names:
        raise DensityError(
            f"site {names[0]!r}: the constant of its law is unknown, so that its data have no log likelihood, and no "
            "leave-one-out score or comparison of models would be right; attach it by shape.normalize(model), or leave "
            "the group out with log_likelihood=False."
        )


def drop_unknown(program: Program, draws: Mapping[str, Tensor], groups: dict[str, dict[str, Tensor]]) -> None:
    """Leave out log densities that lack a constant which differs from draw to draw, with a warning.

    Arguments:
        program: that was looked at.
        draws: by site, ``(n, *shape)``.
        groups: of which ``sample_stats`` and ``log_prior`` are changed.
    """
    names = [name for name in program.names("latent", "data") if _is_unknown(program.sites[name].law)]
    first, last = (_contexts(program, names, {name: x[i] for name, x in draws.items()}) for i in (0, -1))
    varying = [name for name in names if first[name] is not None and not first[name].equal(last[name])]
    if not varying:
        return
    groups["sample_stats"].pop("lp", None)
    for name in varying:
        groups.get("log_prior", {}).pop(name, None)
    warnings.warn(
        f"to_inference_data: the constants of the laws of {varying} are unknown and depend on latents; lp and their "
        "log_prior are left out. Attach them by shape.normalize(model, contexts).",
        stacklevel=3,
    )


def has_unknown(program: Program) -> bool:
    """Whether some law of a program, of data or latents, has an unknown constant."""
    return any(_is_unknown(program.sites[name].law) for name in program.names("latent", "data"))


def _contexts(program: Program, names: list[str], draw: Mapping[str, Tensor]) -> dict[str, Any]:
    if not names:
        return {}
    nodes = program._trace(dict(draw)).nodes
    return {name: getattr(_innermost(nodes[name]["fn"]), "context", None) for name in names}


def _is_unknown(law: Any) -> bool:
    return getattr(_innermost(law), "density", None) is Density.UNNORMALIZED


def _innermost(law: Any) -> Any:
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return law
