"""Where chains start: strategies in Pyro's form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions import biject_to

from ..contract import Density
from .reparam import unwrap
from .tilt import base_of

__all__ = ["anywhere", "continuous", "init_to_prior"]


def init_to_prior(site: dict[str, Any] | None = None) -> Any:
    """Start every latent at a draw of its prior, given the draws of those before it.

    Learned priors have their mass in few places that a uniform start does not find; draws of the prior are there. Sites
    whose prior cannot be drawn from (improper ones) start as in Pyro, uniformly in unconstrained space.

    Arguments:
        site: a site of a trace; left out when the strategy is passed on.

    Example:
        >>> import pyro_genmods as gm, pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(100.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 0.1), obs=torch.tensor(101.0))
        >>> energy = gm.infer.potential(model)
        >>> bool(energy.initial(4, gm.infer.init_to_prior).mean() > 90)
        True
    """
    if site is None:
        return functools.partial(init_to_prior)
    try:
        value: Tensor = site["fn"].sample()
    except NotImplementedError:
        return init_to_uniform(site)
    return value.detach()


def continuous(strategy: Callable[..., Any]) -> Callable[..., Any]:
    """The strategy for continuous sites; discrete ones, which are summed out, are drawn."""
    return lambda site: site["fn"].sample() if site["fn"].support.is_discrete else strategy(site)


def anywhere(site: dict[str, Any]) -> Tensor:
    """A value in the support: a draw, or uniform in unconstrained space where there are none, or only dear ones."""
    fn = site["fn"]
    try:
        value = _quick(fn).sample().detach()
    except NotImplementedError:
        bijection = biject_to(fn.support)
        dtype, device = getattr(getattr(unwrap(fn)[0], "model", None), "place", (None, None))  # of a learned law
        value = bijection(4 * torch.rand(bijection.inverse_shape(fn.shape()), dtype=dtype, device=device) - 2)
    value._pyro_custom_init = False  # any other will do: a reparameterised site starts as its strategy has it
    return value


def _quick(fn: Any) -> Any:
    """The law, or one on the same support for a law of which draws are ends of chains."""
    law, wrap = unwrap(fn)
    if getattr(law, "density", None) is not Density.UNNORMALIZED or law.support.is_discrete:
        return fn
    base = base_of(law)
    if base is None:
        raise NotImplementedError
    return wrap(base)
