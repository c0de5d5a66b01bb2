"""A potential given as a function: what Pyro's kernels call ``potential_fn``, for many chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Size, Tensor
from torch.distributions import Transform

from ..foundation.errors import ModelError
from .layout import Layout

__all__ = ["FunctionProgram"]


class FunctionProgram:
    """Energies of a function of one chain's unconstrained values, at rows.

    Arguments:
        function: maps a dict of unconstrained tensors to a number, the energy.
        shapes: unconstrained shape of each value.
        transforms: maps from the supports of values to unconstrained space, for reading draws; may be empty.
        place: dtype and device of rows.

    Raises:
        ModelError: the function returns no single number, or differs for one chain and for many.
    """

    enumerated = False

    def __init__(
        self,
        function: Callable[[dict[str, Tensor]], Tensor],
        shapes: Mapping[str, Size],
        transforms: Mapping[str, Transform] | None,
        place: tuple[torch.dtype, torch.device],
    ) -> None:
        self.layout, self.place, self.data = Layout(shapes, transforms or {}), place, ()
        self._function, self.why, self.road = function, [], "vmap"
        q = torch.rand(2, self.layout.dim, dtype=place[0], device=place[1]) * 2 - 1
        expected = torch.stack([self._one(row) for row in q])
        if expected.shape != (2,):
            raise ModelError(f"potential_fn: returns shape {tuple(expected.shape[1:])}, needs one number, the energy.")
        try:
            found = self.energies(q, ())[0]
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            self.road, self.why = "loop", [f"vmap: {type(error).__name__}: {error}"]
        else:
            if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ModelError(
                    f"potential_fn: gives {found.tolist()} for two chains together, {expected.tolist()} apart."
                )

    def energies(self, q: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Energies of rows ``(rows,)``, twice: a function has no prior of its own."""
        values = torch.vmap(self._one)(q) if self.road == "vmap" else torch.stack([self._one(row) for row in q])
        return values, values

    def _one(self, q: Tensor) -> Tensor:
        return self._function(self.layout.unflatten(q))
