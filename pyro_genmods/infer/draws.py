"""Draws of many chains while they are made, and the bar that shows how it goes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..foundation.chains import Info
from ..foundation.convergence import nested_r_hat
from .chain_kernel import ChainKernel

__all__ = ["Draws", "Progress"]

REFRESH = 0.25  # seconds between two states of the progress bar


class Draws:
    """Positions and statistics, draw by draw; stacked when they are asked for."""

    def __init__(self) -> None:
        self._new: list[tuple[Tensor, ...]] = []
        self._sizes: list[tuple[float, int]] = []
        self._stacked: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, kernel: ChainKernel, info: Info, diverging: Tensor) -> None:
        """Keep the state of a kernel as a draw."""
        state = kernel.state
        self._new.append((state.position, state.energy, info.acceptance, diverging, info.energy))
        self._sizes.append(kernel.last)

    def _stack(self) -> list[Tensor]:
        if self._new:
            columns = [torch.stack(column) for column in zip(*self._new, strict=True)]
            before = self._stacked
            self._stacked = [torch.cat(pair) for pair in zip(before, columns, strict=True)] if before else columns
            self._new = []
        return self._stacked

    def rows(self) -> Tensor:
        """Positions, ``(draws, chains, dim)``."""
        return self._stack()[0]

    def stats(self) -> dict[str, Tensor]:
        """Statistics under the names that ArviZ reads, ``(draws, chains)``."""
        _, energy, acceptance, diverging, hamiltonian = self._stack()
        sizes = (
            torch.tensor(self._sizes, dtype=energy.dtype, device=energy.device).T[..., None].expand(2, *energy.shape)
        )
        return {
            "acceptance_rate": acceptance,
            "diverging": diverging,
            "energy": hamiltonian,
            "lp": -energy,
            "n_steps": sizes[1].long(),
            "step_size": sizes[0],
        }


class Progress:
    """A bar that says how it goes, refreshed a few times a second."""

    def __init__(self, mcmc: Any) -> None:
        self.mcmc, self.divergences = mcmc, 0
        self.total = mcmc.warmup_steps + mcmc.num_samples * mcmc.thinning
        self.began = self.shown = time.perf_counter()

    def __enter__(self) -> Progress:
        self.bar = tqdm(total=self.total, disable=not self.mcmc.progress_bar, mininterval=REFRESH, leave=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, phase: str, info: Any, done: int) -> None:
        now = time.perf_counter()
        if self.bar.disable or (now - self.shown < REFRESH and done < self.mcmc.num_samples):
            return
        self.shown = now
        kernel = self.mcmc.kernel
        size, leapfrogs = kernel.last
        stats = {"acc": f"{float(info.acceptance.mean()):.2f}", "step": f"{size:.2g}", "leapfrogs": leapfrogs}
        if done:
            stats["divergences"] = int(self.mcmc._draws.stats()["diverging"].sum())
        if done >= 8:
            rows = self.mcmc._draws.rows().transpose(0, 1)
            stats["R-hat"] = f"{float(nested_r_hat(rows, self.mcmc.superchains).max()):.3f}"
        self.bar.set_description(phase)
        self.bar.set_postfix(stats, refresh=False)
        self.bar.n = kernel.iteration
        self.bar.refresh()
