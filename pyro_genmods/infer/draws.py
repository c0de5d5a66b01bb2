"""Draws of many chains while they are made, and the bar that shows how it goes."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..foundation.chains import Info
from ..foundation.convergence import nested_r_hat
from ..foundation.errors import FileFormatError
from ..io import DrawStore
from .chain_kernel import ChainKernel
from .layout import Layout

__all__ = ["Draws", "Progress"]

REFRESH = 0.25  # seconds between two states of the progress bar
MEMORY = 1 << 28  # bytes of draws that stay in memory although they are on disk
POSITIONS, STATISTICS = "unconstrained_posterior", "sample_stats"


class _Held(NamedTuple):
    """What is in memory; replaced as a whole, so that Ctrl-C finds it consistent."""

    dropped: int
    divergences: int
    stacked: list[Tensor]
    new: list[tuple[Any, ...]]


class Draws:
    """Positions and statistics, draw by draw; stacked when they are asked for.

    Arguments:
        store: on disk, with all draws so far; those that memory has no room for are read back from there.
        layout, device: of positions, with a store.
    """

    def __init__(
        self, store: DrawStore | None = None, layout: Layout | None = None, device: torch.device | None = None
    ) -> None:
        self._store, self._layout, self._device = store, layout, device
        earlier, divergences = 0, 0
        if store is not None and store.draws:
            earlier, divergences = store.draws, int(store.read(STATISTICS)["diverging"].sum())
        self._held = _Held(earlier, divergences, [], [])

    def __len__(self) -> int:
        held = self._held
        return held.dropped + (len(held.stacked[0]) if held.stacked else 0) + len(held.new)

    def add(self, kernel: ChainKernel, info: Info, diverging: Tensor) -> None:
        """Keep the state of a kernel as a draw."""
        state = kernel.state
        self._held.new.append((kernel.last, state.position, state.energy, info.acceptance, diverging, info.energy))

    def _stack(self) -> list[Tensor]:
        held = self._held
        if held.new:
            sizes, *columns = zip(*held.new, strict=True)
            new = [torch.stack(column) for column in columns]
            new.insert(0, torch.tensor(sizes, dtype=torch.float64))
            stacked = [torch.cat(pair) for pair in zip(held.stacked, new, strict=True)] if held.stacked else new
            self._held = held._replace(stacked=stacked, new=[])
        return self._held.stacked

    @property
    def divergences(self) -> int:
        """Diverging transitions so far."""
        stacked = self._stack()
        return self._held.divergences + (int(stacked[4].sum()) if stacked else 0)

    def recent(self) -> Tensor | None:
        """Positions that are in memory, ``(draws, chains, dim)``."""
        stacked = self._stack()
        return stacked[1] if stacked else None

    def rows(self) -> Tensor:
        """Positions, ``(draws, chains, dim)``."""
        recent, dropped = self.recent(), self._held.dropped
        if not dropped:
            assert recent is not None
            return recent
        assert self._store is not None
        assert self._layout is not None
        earlier = self._layout.flatten(self._store.read(POSITIONS, stop=dropped), leading=2)
        if not bool(earlier.isfinite().all()):
            raise FileFormatError(f"store: {self._store.path}: draws are missing; the folder is damaged.")
        earlier = earlier.transpose(0, 1).contiguous().to(self._device)  # as in memory: transforms round by strides
        return earlier if recent is None else torch.cat([earlier, recent])

    def stats(self) -> dict[str, Tensor]:
        """Statistics under the names that ArviZ reads, ``(draws, chains)``."""
        recent, dropped = self.since(self._held.dropped)[1], self._held.dropped
        if not dropped:
            return recent
        assert self._store is not None
        earlier = {name: x.T for name, x in self._store.read(STATISTICS, stop=dropped).items()}
        return (
            {name: torch.cat([x.to(recent[name]), recent[name]]) for name, x in earlier.items()} if recent else earlier
        )

    def since(self, start: int, stop: int | None = None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Positions and statistics of draws that are in memory."""
        stacked, dropped = self._stack(), self._held.dropped
        if not stacked:
            return None, {}
        span = slice(start - dropped, None if stop is None else stop - dropped)
        sizes, position, energy, acceptance, diverging, hamiltonian = (x[span] for x in stacked)
        sizes = sizes.to(energy).T[..., None].expand(2, *energy.shape)
        return position, {
            "acceptance_rate": acceptance,
            "diverging": diverging,
            "energy": hamiltonian,
            "lp": -energy,
            "n_steps": sizes[1].long(),
            "step_size": sizes[0],
        }

    def drop(self) -> None:
        """Let go of the older half of what is on disk and takes too much memory."""
        stacked = self._stack()
        if not stacked or stacked[1].nbytes < MEMORY:
            return
        held, keep = self._held, len(stacked[1]) // 2
        gone = len(stacked[1]) - keep
        divergences = held.divergences + int(stacked[4][:gone].sum())
        self._held = _Held(held.dropped + gone, divergences, [x[gone:].clone() for x in stacked], [])


class Progress:
    """A bar that says how it goes, refreshed a few times a second."""

    def __init__(self, mcmc: Any) -> None:
        self.mcmc = mcmc
        self.total = mcmc.warmup_steps + mcmc.num_samples * mcmc.thinning
        self.began = self.shown = time.perf_counter()

    def __enter__(self) -> Progress:
        self.bar = tqdm(
            total=self.total,
            initial=self.mcmc.kernel.iteration,
            disable=not self.mcmc.progress_bar,
            mininterval=REFRESH,
            leave=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, phase: str, info: Any, done: int) -> None:
        now = time.perf_counter()
        if self.bar.disable or (now - self.shown < REFRESH and done < self.mcmc.num_samples):
            return
        self.shown = now
        kernel, draws = self.mcmc.kernel, self.mcmc._draws
        size, leapfrogs = kernel.last
        stats = {"acc": f"{float(info.acceptance.mean()):.2f}", "step": f"{size:.2g}", "leapfrogs": leapfrogs}
        if done:
            stats["divergences"] = draws.divergences
            rows = draws.recent()
            if len(rows) >= 8 and self.mcmc.superchains > 1:
                stats["R-hat"] = f"{float(nested_r_hat(rows.transpose(0, 1), self.mcmc.superchains).max()):.3f}"
        self.bar.set_description(phase)
        self.bar.set_postfix(stats, refresh=False)
        self.bar.n = kernel.iteration
        self.bar.refresh()
