"""Random numbers of a run: a stream that is drawn in blocks, and can be taken up where it was left."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Stream"]

BLOCK = 1 << 16  # normal numbers that are drawn at a time, in whole iterations
LONGEST = 64  # iterations


class Stream:
    """Noise and acceptance levels for iteration after iteration.

    Small tensors cost as much to draw as large ones, so that many iterations are drawn together.

    Arguments:
        seed: of the stream.
        like: positions ``(chains, dim)``, for shape, dtype and device.
    """

    def __init__(self, seed: int, like: Tensor) -> None:
        self._like = like
        self._generator = torch.Generator(like.device).manual_seed(seed)
        self._length = max(1, min(LONGEST, BLOCK // like.numel()))
        self._draw()

    def _draw(self) -> None:
        self._before, self._next = self._generator.get_state(), 0
        chains, dim = self._like.shape
        noise = self._like.new_empty(self._length, chains, dim).normal_(generator=self._generator)
        uniform = self._like.new_empty(self._length, chains).uniform_(generator=self._generator)
        self._noise, self._log_uniform = noise.unbind(), uniform.log_().unbind()

    def next(self) -> tuple[Tensor, Tensor]:
        """Standard normal ``(chains, dim)``, and logarithms of uniform numbers ``(chains,)``."""
        if self._next == self._length:
            self._draw()
        index = self._next
        self._next += 1
        return self._noise[index], self._log_uniform[index]

    def state(self) -> tuple[Tensor, int]:
        """State of the generator before the present block, and how much of the block is used."""
        return self._before, self._next

    def set_state(self, before: Tensor, used: int) -> None:
        """The inverse of :meth:`state`."""
        self._generator.set_state(before.cpu())
        self._draw()
        self._next = used
