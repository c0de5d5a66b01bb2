r"""Draws on disk while they are made: a Zarr store that xarray and ArviZ open, and from which a killed run goes on.

A store is a folder. Its groups hold arrays ``(chain, draw, ...)`` that grow along the draws, and beside them lies what
the run needs to go on:

=========================== =========================================================================================
posterior                   draws of each site, in its support
sample_stats                statistics of each draw
unconstrained_posterior     the same draws in unconstrained space
state.safetensors           how many draws are finished, the state of the sampler after the last of them, and which run
                            it is; tensors and JSON, see :mod:`~pyro_genmods.io.files`
=========================== =========================================================================================

Draws are written first, then the metadata that shows them, then the state that counts them. Each of these files is
replaced as a whole, so that whenever a run is killed, the draws that its state counts are all there and unchanged; what
lies behind them is written again. A chunk that is full is never touched again. The folder appears under its name when
it is complete. Chunks carry a checksum: damage is noticed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..foundation.errors import FileFormatError
from .files import read_tensors, write_tensors

__all__ = ["DrawStore"]

Groups = Mapping[str, Mapping[str, Tensor]]

KIND = "draw store"
STATE = "state.safetensors"
CHUNK_BYTES = 1 << 22  # of the largest array
LONGEST_CHUNK = 4096  # draws
RESERVED = ("chain", "draw")


class DrawStore:
    """Groups of arrays ``(chains, draws, *shape)`` on disk, and the state of the run that makes them.

    Opened by :meth:`open`, made by :meth:`create`.

    Attributes:
        path: the folder.
        draws: finished draws of each chain.
        identity: which run it is, as JSON.
        tensors, numbers: the state of the sampler after the last finished draw.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.zarr"
        >>> draws = {"posterior": {"x": torch.randn(4, 10, 3)}}                  # 4 chains, 10 draws
        >>> store = DrawStore.create(path, draws, {"seed": 1})
        >>> store.append(draws, {"position": draws["posterior"]["x"][:, -1]}, {"iteration": 10})
        >>> again = DrawStore.open(path)
        >>> again.draws, again.numbers, torch.equal(again.read("posterior")["x"], draws["posterior"]["x"])
        (10, {'iteration': 10}, True)
    """

    def __init__(self, path: Path) -> None:
        import zarr  # when asked for: it takes a quarter of a second

        self.path = path
        self.tensors, metadata = read_tensors(path / STATE)
        if metadata.get("kind") != KIND:
            raise FileFormatError(f"{path / STATE} is not the state of a draw store.")
        self.identity: dict[str, Any] = metadata["identity"]
        self.numbers: dict[str, Any] = metadata["numbers"]
        self.draws: int = metadata["draws"]
        self._names: dict[str, list[str]] = metadata["groups"]
        self._arrays: dict[str, dict[str, Any]] = {}
        for group, names in self._names.items():
            zarr.open_group(path / group, mode="r")  # whether readers find it
            self._arrays[group] = {name: zarr.open_array(path / group / name, mode="r+") for name in names}
        for group, name, array in self._growing():
            if array.shape[_axis(name)] < self.draws:
                raise FileFormatError(f"{group}/{name} has {array.shape[_axis(name)]} of {self.draws} draws.")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> DrawStore | None:
        """The store at a path, to go on with, or ``None`` where there is nothing yet.

        Raises:
            FileFormatError: what is there is no store, or is damaged. It is left as it is.
        """
        path = Path(path)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return None
        if not (path / STATE).is_file():
            raise FileFormatError(f"store: {path} is there already and is no draw store; give another path.")
        for leftover in path.rglob("*.partial"):  # of a write that was killed
            leftover.unlink(missing_ok=True)
        try:
            return cls(path)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"store: {path} is damaged ({error}); a run cannot go on from it. Give another path; what draws there "
                'are, xarray.open_datatree(path, engine="zarr") may read.'
            ) from error

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        example: Groups,
        identity: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        numbers: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> DrawStore:
        """Make an empty store, all at once or not at all.

        Arguments:
            path: the folder; there must be nothing, or an empty folder.
            example: arrays ``(chains, any number of draws, *shape)`` by group and name, for shapes and dtypes.
            identity: which run it is, as JSON.
            tensors, numbers: the state of the sampler before the first draw.
            attributes: of every group, for readers.

        Raises:
            ValueError: names that cannot be told apart, or that Zarr or xarray keep for themselves.
            OSError: the folder has something in it, or cannot be made.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            _lay_out(temporary, example, dict(attributes or {}))
            _show(temporary, example)
            names = {group: ["draw", *map(_variable, arrays)] for group, arrays in example.items()}
            metadata = {"kind": KIND, "identity": dict(identity), "groups": names, "draws": 0}
            write_tensors(temporary / STATE, dict(tensors or {}), {**metadata, "numbers": dict(numbers or {})})
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(path)

    def append(self, groups: Groups, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Add draws, and the state of the sampler after them.

        Arguments:
            groups: new draws ``(chains, draws, *shape)`` by group and name, of all groups or of none.
            tensors, numbers: the state after the last of them.
        """
        counts = {x.shape[1] for arrays in groups.values() for x in arrays.values()} or {0}
        (new,) = counts
        first, last = self.draws, self.draws + new
        if new:
            for group, name, array in self._growing():
                self._write(group, name, array, groups, (first, last))
            _show(self.path, self._arrays)
        self._save(last, dict(tensors), dict(numbers))

    def read(self, group: str, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Finished draws ``(chains, draws, *shape)`` of the arrays of a group, by name.

        Raises:
            FileFormatError: a chunk is damaged.
        """
        stop = self.draws if stop is None else min(stop, self.draws)
        found = {}
        for name, array in self._arrays[group].items():
            if name != "draw":
                try:
                    values = np.ascontiguousarray(array[:, start:stop])
                except (OSError, RuntimeError, ValueError) as error:
                    raise FileFormatError(f"store: {self.path}: {group}/{name} is damaged ({error}).") from error
                found[array.attrs.get("site", name)] = torch.from_numpy(values)
        return found

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse to go on with another run than the one that made the store.

        Raises:
            FileFormatError: it names what differs.
        """
        now = json.loads(json.dumps(dict(identity)))
        differences = [
            f"{name} was {self.identity.get(name)!r}, is {value!r}"
            for name, value in now.items()
            if self.identity.get(name) != value
        ]
        if differences:
            raise FileFormatError(
                f"store: {self.path} belongs to another run ({'; '.join(differences)}); give the settings of that run "
                "to go on with it, or another path to start afresh."
            )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _growing(self) -> Iterator[tuple[str, str, Any]]:
        for group, arrays in self._arrays.items():
            for name, array in arrays.items():
                yield group, name, array

    def _write(self, group: str, name: str, array: Any, groups: Groups, span: tuple[int, int]) -> None:
        (first, last), axis = span, _axis(name)
        if array.shape[axis] < last:
            array.resize((*array.shape[:axis], last, *array.shape[axis + 1 :]))
        site = array.attrs.get("site", name)
        index = (slice(None),) * axis + (slice(first, last),)
        array[index] = np.arange(first, last) if name == "draw" else groups[group][site].detach().cpu().numpy()
        length = array.chunks[axis]
        for number in range(first // length, (last - 1) // length + 1):
            place = ["0"] * array.ndim
            place[axis] = str(number)
            _to_disk(self.path.joinpath(group, name, "c", *place))

    def _save(self, draws: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        metadata = {"kind": KIND, "identity": self.identity, "groups": self._names, "draws": draws}
        write_tensors(self.path / STATE, tensors, {**metadata, "numbers": numbers})
        self.draws, self.tensors, self.numbers = draws, tensors, numbers


def _variable(site: str) -> str:
    """A slash would make a group."""
    return site.replace("/", ".")


def _axis(name: str) -> int:
    """Which dimension of an array are the draws."""
    return 0 if name == "draw" else 1


def _lay_out(path: Path, example: Groups, attributes: dict[str, Any]) -> None:
    """Make the arrays of a store, without draws."""
    import zarr

    every = [x for arrays in example.values() for x in arrays.values()]
    largest = max(x.element_size() * x[:, 0].numel() for x in every)
    length = max(1, min(LONGEST_CHUNK, CHUNK_BYTES // max(1, largest)))
    chains = len(every[0])
    root = zarr.open_group(path, mode="w-", zarr_format=3)
    for group, arrays in example.items():
        node = root.create_group(group, attributes=attributes)
        index = node.create_array("chain", shape=(chains,), chunks=(chains,), dtype="int64", dimension_names=["chain"])
        index[:] = np.arange(chains)
        node.create_array("draw", shape=(0,), chunks=(length,), dtype="int64", dimension_names=["draw"])
        _check_names(arrays)
        for site, x in arrays.items():
            name, rest = _variable(site), tuple(x.shape[2:])
            node.create_array(
                name,
                shape=(chains, 0, *rest),
                chunks=(chains, length, *(max(1, n) for n in rest)),
                dtype=str(x.dtype).removeprefix("torch."),
                fill_value=float("nan") if x.is_floating_point() else None,
                compressors=zarr.codecs.ZstdCodec(level=1, checksum=True),
                dimension_names=["chain", "draw", *(f"{name}_dim_{i}" for i in range(len(rest)))],
                attributes={} if name == site else {"site": site},
            )


def _check_names(arrays: Mapping[str, Tensor]) -> None:
    names = [_variable(site) for site in arrays]
    bad = [name for name in names if names.count(name) > 1 or name in RESERVED]
    if bad:
        raise ValueError(f"store: cannot hold sites called {sorted(set(bad))} (after '/' became '.'); rename them.")


def _show(path: Path, groups: Mapping[str, Any]) -> None:
    """Let readers see what has been written: all arrays of a group at once, so that their lengths agree."""
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the state is no part of the hierarchy; consolidation no part of the format
        for group in groups:
            zarr.consolidate_metadata(path, path=group)
        zarr.consolidate_metadata(path)


def _to_disk(chunk: Path) -> None:
    if chunk.exists():  # a chunk that only has fill values is not written
        descriptor = os.open(chunk, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
