r"""The annealed chain of an energy, opened up for those who steer it.

Particles go from the base to the law at :math:`n` inverse temperatures :math:`\beta_k = k / n`. At each of them they
are draws of :math:`b\, e^{-\beta_k E}` if they have been weighted: :attr:`Step.log_weight` is the logarithm of what
each particle gains by the step to the next temperature. Between steps particles may be weighted by anything else, and
forked; :meth:`Steps.look_ahead` finishes copies of them.

Reference:
    R. M. Neal, Annealed Importance Sampling, 2001, arXiv:physics/9803008.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..foundation.moves import HamiltonianMoves
from ..foundation.resampling import ancestor_rows
from .sampling import new_generator, path_of

__all__ = ["Step", "Steps"]


@dataclass(frozen=True)
class Step:
    """All particles at a temperature.

    Attributes:
        index: steps made so far.
        inverse_temperature: from 0, the base, to 1, the law.
        log_weight: what the particles gained by the step to here, ``(particles, *batch_shape)``.
        acceptance: of the moves since.
    """

    index: int
    inverse_temperature: float
    log_weight: Tensor
    acceptance: float


class Steps:
    """An iterator over temperatures, from the base to the law.

    Arguments:
        law: a :class:`~pyro_genmods.shape.law.EnergyDistribution`.
        n: number of steps.
        moves: Hamiltonian moves at each temperature.

    Attributes:
        log_weights: summed since the start, or since particles were last forked, ``(particles, *batch_shape)``.

    Raises:
        ValueError: fewer than one step.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> _ = torch.manual_seed(0)
        >>> steps = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)().steps(8).start(500)
        >>> for step in steps:
        ...     steps.fork(steps.log_weights.softmax(0).multinomial(500, replacement=True))
        >>> steps.value.shape, round(float(steps.value.var()), 1)
        (torch.Size([500, 1]), 0.1)
    """

    def __init__(self, law: Any, n: int, moves: int = 2) -> None:
        if n < 1:
            raise ValueError(f"n: got {n}, needs at least 1 step.")
        self._law, self._model, self._n, self._count = law, law.model, n, moves
        self.start(1)

    def start(self, particles: int) -> Steps:
        """Begin anew with so many particles, for each member of the batch."""
        with torch.no_grad():
            self._shape, self._context = self._law._draw_shape([particles])
            self._y = self._model.reference_rows(self._shape.numel(), self._context)
        self._index, self.log_weights = 0, self._y.new_zeros(self._shape)
        self._moves: HamiltonianMoves | None = None
        return self

    def __iter__(self) -> Iterator[Step]:
        return self

    @torch.no_grad()
    def __next__(self) -> Step:
        if self._index >= self._n:
            raise StopIteration
        self._index += 1
        gained, rate = self._advance(self._index)
        self.log_weights = self.log_weights + gained
        return Step(self._index, self._index / self._n, gained, rate)

    def _advance(self, index: int) -> tuple[Tensor, float]:
        """Weigh for the step to a temperature, and move there."""
        path = path_of(self._model, self._context)
        gained = -path.parts(self._y)[1] / self._n
        path.inverse_temperature = torch.full_like(self._y[:, 0], index / self._n)
        size = None if self._moves is None else self._moves.size
        self._moves = HamiltonianMoves(path, self._y, new_generator(self._y.device))
        self._moves.size = size or self._moves.size
        self._y, _, rate, _ = self._moves.move(self._y, self._count, self._count)
        return gained.reshape(self._shape), rate

    def fork(self, ancestors: Tensor) -> None:
        """Replace particles by copies of others; their weights are then equal.

        Arguments:
            ancestors: ``(particles,)``, or ``(particles, *batch_shape)`` where members of the batch differ.
        """
        index = ancestor_rows(ancestors, self._shape)
        self._y = self._y[index]
        if self._context is not None:
            self._context = self._context[index]
        self.log_weights = torch.zeros_like(self.log_weights)

    @torch.no_grad()
    def look_ahead(self) -> Tensor:
        """Finished events ``(particles, *batch_shape, *event_shape)``: copies go the rest of the way."""
        before = self._y, self._index, self._moves
        while self._index < self._n:
            self._index += 1
            self._advance(self._index)
        finished = self.value
        self._y, self._index, self._moves = before
        return finished

    @property
    def value(self) -> Tensor:
        """Events at the particles as they are; after the last step, draws of the law if weights were respected."""
        with torch.no_grad():
            x, _ = self._model.coordinates.push(self._y)
        return self._law._as_values(x).reshape(self._shape + self._law.event_shape)
