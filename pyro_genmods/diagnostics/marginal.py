r"""Data whose likelihood is a sum over discrete latents that have no draws.

Samplers of continuous latents sum discrete ones out. Where every datum :math:`y_n` has discrete latents :math:`z_n` of
its own, as in a mixture, its likelihood is a sum of few terms,

.. math:: \log p(y_n \mid x) = \log \sum_k p(z_n = k \mid x) \, p(y_n \mid z_n = k, x) ,

and all data share one run of the program for each :math:`k`, in which all :math:`z_n` have that value. The plate around
:math:`z_n` and :math:`y_n` says that this is so: what is inside it at one index knows nothing of the others. Anything
else (a chain of states, one discrete latent for many data) couples the data, which then have no likelihood one by one.
A weight, of a minibatch say, multiplies the logarithm of the sum, as in ``TraceEnum_ELBO``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from .program import Outcome, Program, Site

__all__ = ["summed_out"]

MOST_TERMS = 256


def summed_out(program: Program, draws: Mapping[str, Tensor]) -> Outcome | None:
    """What :meth:`Program.score` says of the program without its hidden latents, or ``None`` where that is not known.

    Deterministic sites that depend on the hidden latents are left out.

    Arguments:
        program: with hidden latents.
        draws: of all others, ``(n, *shape)``.
    """
    hidden = [program.sites[name] for name in program.hidden]
    datum = _own_datum(program, hidden)
    supports = [_support(site) for site in hidden] if datum else []
    if not supports or math.prod(map(len, supports)) not in range(1, MOST_TERMS + 1):
        return None
    n = len(next(iter(draws.values())))
    first = terms = None
    for values in product(*supports):
        given = {site.name: value.expand(n, *site.value.shape) for site, value in zip(hidden, values, strict=True)}
        found = program.score({**draws, **given})
        term = sum((found.log_prob.pop(site.name) for site in hidden), found.log_prob[datum.name])
        if first is None:
            first, first_term, terms = found, term, term
            continue
        terms = torch.logaddexp(terms, term)
        for name in [name for name, x in first.values.items() if not torch.equal(x, found.values[name])]:
            del first.values[name]
    weight = datum.scale * (terms - first_term)
    return Outcome(first.values, first.log_prob | {datum.name: terms}, first.total + weight.reshape(n, -1).sum(-1))


def _own_datum(program: Program, hidden: list[Site]) -> Site | None:
    """The one data site that lies in the same plates as all hidden latents, if nothing else does."""
    plates = set(hidden[0].plates)
    inside = [
        site
        for site in program.sites.values()
        if site.kind != "deterministic" and plates <= set(site.plates) and site not in hidden
    ]
    if len(inside) != 1 or inside[0].kind != "data" or inside[0].noise:
        return None
    alike = all(
        set(site.plates) == set(inside[0].plates)
        and site.batch_shape == inside[0].batch_shape
        and site.scale == inside[0].scale
        and site.mask is None
        for site in hidden
    )
    return inside[0] if alike else None


def _support(site: Site) -> Tensor | tuple[()]:
    """All values that an event of a discrete site can have, ``(values, *)``; none where that is not known."""
    try:
        return site.law.enumerate_support(expand=False) if site.law.has_enumerate_support else ()
    except NotImplementedError:
        return ()
