"""Draws of the prior for many chains by one run of the program, where draws are dear: ends of chains, say.

The program runs in a plate to the left of all its own, so that each law is drawn once, for all chains. A program that
does not broadcast would draw from other laws there than alone; so the energies at a few of the draws, of the run in the
plate, must be those of the road that was found to be right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

__all__ = ["together"]

CHECKED = 3  # draws at which the plate is compared with the road
FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError)


def together(program: Any, strategy: Callable[..., Any], chains: int) -> Tensor | None:
    """Rows of the values that latents take in a plate of chains, ``(chains, dim)``; ``None`` where that is not right.

    Arguments:
        program: a :class:`~pyro_genmods.infer.program.Program`, whose road is known.
        strategy: of Pyro's, for values of latents.
        chains: how many.
    """
    if program.enumerated:
        return None
    args, kwargs = program.arguments(program.data)

    def plated() -> Any:
        with pyro.plate("_chains", chains, dim=-1 - program._nesting):
            return program.model(*args, **kwargs)

    try:
        trace = poutine.trace(InitMessenger(strategy)(plated)).get_trace()
        values = {name: _unpadded(program, name, trace.nodes[name]["value"], chains) for name in program.layout.shapes}
        q = program.layout.unconstrain(values, 1)
        few = q[: min(CHECKED, chains)]
        pairs = zip(program._plated(few, program.data), program.energies(few, program.data), strict=True)
        right = all(torch.allclose(found, expected, rtol=1e-3, atol=1e-3) for found, expected in pairs)
    except FAILURES:
        return None
    return q if right else None


def _unpadded(program: Any, name: str, value: Tensor, chains: int) -> Tensor:
    """Values without the dimensions of size one between chains and the plates of the site."""
    dims = program._batch_dims[name] + program._event_dims[name]
    return value.detach().reshape(chains, *value.shape[value.dim() - dims :])
