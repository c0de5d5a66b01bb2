"""A run on disk: what is written when, and how a run that was killed is taken up again.

Between two iterations, a run is its kernel's state: positions, what the warm-up has learned, and the random stream.
With every draw a reference to that state is kept, so that what is written together belongs together, whenever it is
written. Writing takes a thirtieth of the time at most.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..foundation.errors import FileFormatError
from ..io import DrawStore
from .chain_kernel import ChainKernel
from .draws import POSITIONS, STATISTICS, Draws
from .layout import Layout

__all__ = ["Recorder", "settings_of"]

SECONDS = 1.0  # between two writes, and at least
SHARE = 30  # times as long as a write takes
PENDING = 1 << 26  # bytes of draws that are not waited with
SAME_ENERGY = 1e-5  # relative
BATCH, BATCH_BYTES = 64, 1 << 22  # of draws that are taken to their supports together


class Recorder:
    """Writes a run to a store, and goes on from there.

    Arguments:
        path: of the store.
        settings: of the run; a store with others is refused.
        seed: of the run, or ``None`` for that of the store, or a new one.

    Attributes:
        seed: what the run has to use.
        gradients_before: what the potential would have counted before the run, had it never been interrupted.

    Raises:
        FileFormatError: the store is that of another run, or none.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], seed: int | None) -> None:
        self._path, self._store = path, DrawStore.open(path)
        known = None if self._store is None else self._store.identity.get("seed")
        self.seed: int = seed if seed is not None else int(torch.randint(2**62, ())) if known is None else known
        self._identity = {**settings, "seed": self.seed}
        if self._store is not None:
            self._store.check(self._identity)
        self._mark: tuple[Any, ...] | None = None
        self._written, self._cost = time.perf_counter(), 0.0

    def begin(self, kernel: ChainKernel, num_samples: int, gradients_before: int) -> Draws:
        """Make the store, or take the kernel to where the store is; after the kernel's own beginning.

        Arguments:
            kernel: of the run.
            num_samples: draws to be kept of each chain.
            gradients_before: what the potential had counted when the run began.

        Raises:
            FileFormatError: the store is that of another model, of other data, or of a longer run.
        """
        self._kernel, self._num_samples = kernel, num_samples
        layout = kernel.potential.layout
        sites = {name: list(shape) for name, shape in layout.shapes.items()}
        place = {"dtype": str(kernel.state.position.dtype), "device": kernel.state.position.device.type}
        identity = {**self._identity, "sites": sites, **place}
        self.gradients_before = gradients_before
        if self._store is None:
            example = _groups(layout, kernel.state.position[None], _example_stats(kernel.state.energy[None]))
            tensors, numbers = self._state()
            told = {
                "inference_library": "pyro_genmods",
                "exact": int(kernel.exact),
                "superchains": identity["superchains"],
            }
            self._store = DrawStore.create(self._path, example, identity, tensors, numbers, told)
        else:
            self._store.check(identity)
            self._load()
        return Draws(self._store, layout, kernel.state.position.device)

    def warming(self, finished: bool) -> None:
        """After an iteration of warm-up."""
        if finished or self._due():
            self._append({}, *self._state())

    def drawn(self, draws: Draws) -> None:
        """After a draw."""
        kernel = self._kernel
        self._mark = (len(draws), kernel.state, kernel.stream.state(), kernel.iteration, kernel.potential.num_gradients)
        waiting = (len(draws) - self._store.draws) * kernel.state.position.nbytes
        if waiting > PENDING or self._due():
            self.flush(draws)

    def flush(self, draws: Draws) -> None:
        """Write what is not yet written."""
        if self._mark is None or self._mark[0] == self._store.draws:
            return
        done, state, (generator, used), iteration, gradients = self._mark
        tensors, numbers = self._state()
        tensors |= {**state._asdict(), "generator": generator}
        numbers |= {"used": used, "kernel_iteration": iteration, "num_gradients": gradients - self.gradients_before}
        first = self._store.draws
        rows, stats = draws.since(first, done)
        self._append(_groups(self._kernel.potential.layout, rows, stats, first), tensors, numbers)
        draws.drop()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        return time.perf_counter() - self._written > max(SECONDS, SHARE * self._cost)

    def _append(self, groups: Mapping[str, Any], tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        began = time.perf_counter()
        self._store.append(groups, tensors, numbers)
        self._written = time.perf_counter()
        self._cost = self._written - began

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = self._kernel.state_dict()
        potential = self._kernel.potential
        own = {"mode": potential.mode, "num_gradients": potential.num_gradients - self.gradients_before}
        return tensors, {**numbers, **own, "num_samples": self._num_samples}

    def _load(self) -> None:
        kernel, numbers, path = self._kernel, self._store.numbers, self._store.path
        potential = kernel.potential
        if self._num_samples < numbers["num_samples"]:
            raise FileFormatError(
                f"store: {path} is of a run with num_samples={numbers['num_samples']}, got {self._num_samples}; ask "
                "for as many or more, or give another path."
            )
        tensors = {name: x.clone() for name, x in self._store.tensors.items()}  # aligned as tensors of torch are
        device = kernel.state.position.device
        tensors = {name: x if name == "generator" else x.to(device) for name, x in tensors.items()}
        self._recognise(tensors["position"], tensors["energy"])
        kernel.load_state_dict(tensors, numbers)
        potential.mode = numbers["mode"]
        self.gradients_before = potential.num_gradients - numbers["num_gradients"]
        if self._num_samples > numbers["num_samples"] and kernel.warmup.finished:
            iterations = (self._num_samples - self._store.draws) * self._identity["thinning"]
            potential.plan(iterations * kernel._expected_leapfrogs())

    def _recognise(self, position: Tensor, energy: Tensor) -> None:
        """The model and the data cannot be stored; their energies can."""
        now, _ = self._kernel.potential.value_and_grad(position)
        far = ~((now - energy).abs() <= SAME_ENERGY * energy.abs().clamp_min(1))
        if bool(far.any()):
            chain = int(far.nonzero()[0])
            raise FileFormatError(
                f"store: {self._store.path}: the model or data differ from those of the store: the energy of chain "
                f"{chain}, where it stands, was {float(energy[chain]):.6g} and is {float(now[chain]):.6g}. Give those "
                "of the store to go on with it, or another path to start afresh."
            )


def settings_of(kernel: ChainKernel) -> dict[str, Any]:
    """What a kernel was told, as JSON: numbers and words among its attributes."""
    passing = ("iteration", "last", "model", "potential_fn", "potential", "state", "stream", "warmup")
    told = {k: v for k, v in vars(kernel).items() if isinstance(v, bool | int | float | str | None)}
    told = {k: v for k, v in told.items() if not k.startswith("_") and k not in passing}
    adapt = sorted(name for name, wanted in kernel._adapt.items() if wanted)
    return {"kernel": type(kernel).__name__, **told, "adapt": adapt, "level": kernel._options["level"]}


def _groups(layout: Layout, rows: Tensor, stats: Mapping[str, Tensor], first: int = 0) -> dict[str, dict[str, Tensor]]:
    """Draws ``(draws, chains, ...)`` from the ``first`` on, as the groups of a store, ``(chains, draws, ...)``."""
    return {
        "posterior": {name: x.transpose(0, 1) for name, x in _constrained(layout, rows, first).items()},
        STATISTICS: {name: x.T for name, x in stats.items()},
        POSITIONS: layout.unflatten(rows.transpose(0, 1)),
    }


def _constrained(layout: Layout, rows: Tensor, first: int) -> dict[str, Tensor]:
    """Draws in their supports, the same bits whatever they are written with.

    Vector units round by the place in a batch, so that each draw has its place in batches of one size.
    """
    length = max(1, min(BATCH, BATCH_BYTES // rows[0].nbytes))
    shift, parts = first % length, []
    for start in range(-shift, len(rows), length):
        index = torch.arange(start, start + length, device=rows.device).clamp(0, len(rows) - 1)
        with torch.no_grad():
            parts.append(layout.constrain(rows[index]))
    return {name: torch.cat([part[name] for part in parts])[shift : shift + len(rows)] for name in parts[0]}


def _example_stats(energy: Tensor) -> dict[str, Tensor]:
    return {
        "acceptance_rate": energy,
        "diverging": energy > 0,
        "energy": energy,
        "lp": energy,
        "n_steps": energy.long(),
        "step_size": energy,
    }
