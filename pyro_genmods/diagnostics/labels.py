"""Names for the dimensions of arrays, and the ArviZ object that is made of them.

A plate of the program names the dimension of everything inside it: draws, data, log densities. What no plate names is
called ``{site}_dim_{i}`` after its axis, as ArviZ does. The conversion meets ArviZ here and nowhere else; its versions
before and after 1.0 differ in what holds the groups (``InferenceData``, ``DataTree``), not in the groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
from torch import Tensor

from ..foundation.errors import ShapeError
from .program import Program, Site

__all__ = ["Labels", "Variable", "assembled"]


class Variable(NamedTuple):
    """An array and the names of its dimensions, those of chains and draws in front included where it has them."""

    array: np.ndarray
    dims: list[str]


class Labels:
    """Dimension names and coordinates of a program's sites.

    Arguments:
        program: whose plates give names, or ``None``.
        coords: the user's coordinates, by dimension.
        dims: the user's names, by variable, for all dimensions but those of chains and draws.
        taken: names of other variables, which a dimension must not have.

    Attributes:
        coords: coordinates by dimension: the user's, and indices of minibatches and of data that are not masked.
    """

    def __init__(
        self,
        program: Program | None,
        coords: Mapping[str, Sequence[Any] | np.ndarray] | None,
        dims: Mapping[str, Sequence[str]] | None,
        taken: Iterable[str] = (),
    ) -> None:
        self._sites: dict[str, Site] = program.sites if program else {}
        self._dims = {name: list(names) for name, names in (dims or {}).items()}
        self._taken = {"chain", "draw", *self._sites, *taken}
        minibatches = program.minibatches if program else {}
        indices = {self._free(name): np.asarray(index.cpu()) for name, index in minibatches.items()}
        self._user_coords = list(coords or {})
        self.coords = indices | {name: np.asarray(values) for name, values in (coords or {}).items()}
        self._check_names()

    def of_value(self, name: str, shape: Sequence[int]) -> list[str]:
        """Names of the dimensions of one value of a variable."""
        if name in self._dims:
            return self._checked(name, shape, self._dims[name])
        site = self._sites.get(name)
        if site is None:
            return self._checked(name, shape, self._named(name, shape, {}, 0))
        event_dim = site.event_dim
        if site.kind == "deterministic" and event_dim == len(shape):
            event_dim = 0  # pyro.deterministic calls everything one event if it is not told otherwise
        return self._checked(name, shape, self._named(name, shape, site.plates, event_dim))

    def of_log_prob(self, name: str, shape: Sequence[int]) -> list[str]:
        """Names of the dimensions of one pointwise log density: those of the value that are not of its event."""
        site = self._sites[name]
        if name in self._dims and site.value.dim() - site.event_dim == len(shape):
            return self._checked(name, shape, self._dims[name][: len(shape)])
        return self._checked(name, shape, self._named(name, shape, site.plates, 0))

    def of_data(self, name: str, log_prob: Tensor) -> tuple[Tensor, list[str]]:
        """A pointwise log likelihood ``(chains, draws, *shape)`` without masked data, and the names of its dimensions.

        What is left of a masked site is one dimension, ``{site}_seen``, whose coordinates are those of the plate, or
        positions in the flattened array where there are several.
        """
        names, mask = self.of_log_prob(name, log_prob.shape[2:]), self._sites[name].mask
        if mask is None:
            return log_prob, names
        seen = mask.cpu() | (log_prob != 0).flatten(0, 1).any(0)  # a mask may change from draw to draw
        if bool(seen.all()):
            return log_prob, names
        index = seen.flatten().nonzero()[:, 0]
        position, known = index.numpy(), len(names) == 1 and names[0] in self.coords
        self.coords[f"{name}_seen"] = self.coords[names[0]][position] if known else position
        return log_prob.reshape(*log_prob.shape[:2], -1)[..., index], [f"{name}_seen"]

    def check_use(self, groups: Mapping[str, Mapping[str, Variable]]) -> None:
        """Refuse names of the user that name nothing."""
        variables = {name for group in groups.values() for name in group}
        dims = {dim for group in groups.values() for variable in group.values() for dim in variable.dims}
        if unknown := set(self._dims) - variables:
            raise ValueError(f"dims: got {sorted(unknown)}, which are no variables; there are {sorted(variables)}.")
        if unknown := set(self._user_coords) - dims:
            raise ValueError(f"coords: got {sorted(unknown)}, which are no dimensions; there are {sorted(dims)}.")

    def _named(
        self, name: str, shape: Sequence[int], plates: Mapping[str, tuple[int, int]], event_dim: int
    ) -> list[str]:
        names = [f"{name}_dim_{i}" for i in range(len(shape))]
        for plate, (dim, size) in plates.items():
            axis = len(shape) - event_dim + dim
            if axis >= 0 and shape[axis] == size:
                names[axis] = self._free(plate)
        return names

    def _free(self, plate: str) -> str:
        return f"{plate}_plate" if plate in self._taken else plate

    def _checked(self, name: str, shape: Sequence[int], names: list[str]) -> list[str]:
        if len(names) != len(shape):
            raise ShapeError(f"dims: got {names} for {name!r}, needs a name for each dimension of {tuple(shape)}.")
        for dim, size in zip(names, shape, strict=True):
            if dim in self.coords and len(self.coords[dim]) != size:
                raise ShapeError(
                    f"coords: got {len(self.coords[dim])} values for {dim!r}, needs {size}, the size of that dimension "
                    f"of {name!r}."
                )
        return names

    def _check_names(self) -> None:
        for dim in [*self.coords, *(dim for names in self._dims.values() for dim in names)]:
            if not isinstance(dim, str) or dim in self._taken:
                raise ValueError(f"dims, coords: got {dim!r}, needs a name that no variable has, nor chain or draw.")


def assembled(
    groups: Mapping[str, Mapping[str, Variable]],
    coords: Mapping[str, np.ndarray],
    attrs: Mapping[str, Mapping[str, Any]],
) -> Any:
    """The groups as ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x); empty groups are left out.

    Arguments:
        groups: variables by group and name.
        coords: by dimension; what is missing counts from zero.
        attrs: by group.
    """
    import arviz as az  # when asked for: it takes seconds, and sets warning filters

    made_by = {"inference_library": "pyro", "inference_library_version": pyro.__version__}
    datasets = {
        group: _dataset(az, variables, coords, made_by | dict(attrs.get(group, {})))
        for group, variables in groups.items()
        if variables
    }
    if not hasattr(az, "convert_to_datatree"):
        return az.InferenceData(**datasets)
    trees = {group: az.convert_to_datatree(dataset, group=group) for group, dataset in datasets.items()}
    first, *others = trees
    for group in others:
        trees[first][group] = trees[group][group]
    return trees[first]


def _dataset(
    az: Any, variables: Mapping[str, Variable], coords: Mapping[str, np.ndarray], attrs: Mapping[str, Any]
) -> Any:
    arrays = {name: variable.array for name, variable in variables.items()}
    dims = {name: variable.dims for name, variable in variables.items()}
    here = {dim: coords[dim] for names in dims.values() for dim in names if dim in coords}
    if hasattr(az, "convert_to_datatree"):
        samples = ["chain", "draw"] if all(names[:2] == ["chain", "draw"] for names in dims.values()) else []
        return az.dict_to_dataset(
            arrays, coords=here, dims=dims, sample_dims=samples, attrs=dict(attrs), check_conventions=False
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="More chains")
        return az.dict_to_dataset(arrays, coords=here, dims=dims, default_dims=[], attrs=dict(attrs))
