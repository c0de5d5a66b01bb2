"""How the latents of a Pyro program lie in a flat row of unconstrained numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Size, Tensor
from torch.distributions import Transform

from ..foundation.errors import ModelError

__all__ = ["Layout"]


class Layout:
    """Names and shapes of unconstrained latents, and how they lie in a flat row.

    Arguments:
        shapes: unconstrained shape of each latent site, in the order of the row.
        transforms: maps from the support of each site to unconstrained space, as in Pyro's kernels.
    """

    def __init__(self, shapes: Mapping[str, Size], transforms: Mapping[str, Transform]) -> None:
        self.shapes, self.transforms = dict(shapes), dict(transforms)
        self.dim = sum(shape.numel() for shape in self.shapes.values())

    def unflatten(self, q: Tensor) -> dict[str, Tensor]:
        """Rows ``(..., dim)`` to unconstrained values ``(..., *shape)`` of each site."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        pieces = q.split(sizes, dim=-1)
        return {k: x.reshape(q.shape[:-1] + s) for (k, s), x in zip(self.shapes.items(), pieces, strict=True)}

    def flatten(self, params: Mapping[str, Tensor], leading: int = 0) -> Tensor:
        """Unconstrained values with so many leading dimensions to rows ``(..., dim)``."""
        missing = [name for name in self.shapes if name not in params]
        if missing:
            raise ModelError(f"initial_params: has no value for {missing}; needs one for each of {list(self.shapes)}.")
        rows = []
        for name, shape in self.shapes.items():
            value = params[name]
            if value.shape[leading:] != shape:
                raise ModelError(
                    f"initial_params: {name!r} has shape {tuple(value.shape)}, needs {'chains, ' * leading}then the "
                    f"unconstrained shape {tuple(shape)}."
                )
            rows.append(value.reshape(*value.shape[:leading], shape.numel()))
        return torch.cat(rows, -1)

    def constrain(self, q: Tensor) -> dict[str, Tensor]:
        """Rows ``(..., dim)`` to values in the supports of the sites, ``(..., *shape)``."""
        return {name: self._inverse(name)(value) for name, value in self.unflatten(q).items()}

    def unconstrain(self, values: Mapping[str, Tensor], leading: int = 0) -> Tensor:
        """Values in the supports of the sites to rows."""
        params = {name: self.transforms[name](value) for name, value in values.items() if name in self.transforms}
        return self.flatten({**values, **params}, leading)

    def coordinates(self) -> list[str]:
        """A name for every column of a row."""
        names = []
        for name, shape in self.shapes.items():
            indices = product(*map(range, shape))
            names += [f"{name}[{','.join(map(str, index))}]" for index in indices] if shape else [name]
        return names

    def _inverse(self, name: str) -> Callable[[Tensor], Tensor]:
        return self.transforms[name].inv if name in self.transforms else lambda value: value
