"""Whether the supports of latents stay what they were: with other draws of the latents, and with other data.

Pyro takes the map from each support to unconstrained space once, from one run of the program. A support that depends on
another latent is then that of some draw, and one that depends on the data is that of the first data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to

from ..foundation.errors import ModelError
from .initialization import anywhere
from .layout import Layout
from .quiet import quiet

__all__ = ["check_supports", "moved_support"]

PROBES = (-1.3, 0.4)  # unconstrained numbers at which two maps are compared


def moved_support(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout
) -> str | None:
    """Name of a latent whose support, in a run with fresh draws, is not the one of the layout; ``None`` if all are."""
    with torch.no_grad(), quiet():
        trace = poutine.trace(InitMessenger(anywhere)(model)).get_trace(*args, **kwargs)
        for name, shape in layout.shapes.items():
            if name not in trace.nodes:
                return name
            bijection, value = biject_to(trace.nodes[name]["fn"].support), trace.nodes[name]["value"]
            for probe in PROBES:
                u = torch.full(shape, probe, dtype=value.dtype, device=value.device)
                if not _equal(bijection(u), layout.transforms[name].inv(u)):
                    return name
    return None


def check_supports(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: Layout) -> None:
    """Refuse a program whose supports depend on its latents.

    Raises:
        ModelError: one does; it is named.
    """
    name = moved_support(model, args, kwargs, layout)
    if name is not None:
        raise ModelError(
            f"site {name!r}: its support depends on another latent, and a chain has one map for all its positions; "
            "sample it on a fixed support (a unit interval, say) and transform it in the program."
        )


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-6)
