r"""The ancestral chain of a diffusion, opened up for those who steer it.

At every angle the particles know what they are going to be: the mean of the datum given the noisy one, and (Tweedie's
formula) its covariance. Between steps they may be weighted, forked, and pushed by a changed mean of the datum; the
density of the step that was made, and of the one that the model would have made, are both known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..foundation.causal import transformed
from ..foundation.resampling import ancestor_rows
from .denoiser import Denoiser
from .lost import LostRowsError
from .samplers import Ancestral

__all__ = ["Step", "Steps"]


@dataclass
class Step:
    """All particles at an angle, before they move on.

    Attributes:
        index: number of steps made so far.
        angle, next_angle: where the particles are, and where they go; the last step has no next one (``None``).
        noisy: white noisy rows ``(particles, features)``.
        context: rows of context, or ``None``.
        datum: mean of the white datum ``(particles, features)``; assign to it to steer the step.
    """

    index: int
    angle: Tensor
    next_angle: Tensor | None
    noisy: Tensor
    context: Tensor | None
    datum: Tensor
    _events: Any = field(repr=False, default=None)
    _denoiser: Denoiser | None = field(repr=False, default=None)

    @property
    def mean(self) -> Tensor:
        """The look-ahead: the event at the mean of the datum, ``(particles, *batch_shape, *event_shape)``."""
        return self._events(self.datum)

    def covariance(self) -> Tensor:
        """Covariance of the white datum, ``(particles, features, features)``: as many reverse passes as features."""
        return self._denoiser.covariance(self.angle, self.noisy, self.context)[1]


class Steps:
    """An iterator over the steps of the ancestral chain, from noise to data.

    Arguments:
        law: a :class:`~pyro_genmods.evolve.law.DiffusionDistribution`.
        n: number of steps.

    Raises:
        ValueError: fewer than one step.
        IntegrationError: at the last step, that particles are NaN or infinite, where the law validates its arguments;
            the first step at which what was known of the datum was not finite is named.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> steps = gm.Diffusion(2)().steps(8).start(100)
        >>> for step in steps:
        ...     steps.fork(torch.randint(100, (100,)))
        >>> steps.value.shape
        torch.Size([100, 2])
    """

    def __init__(self, law: Any, n: int) -> None:
        if n < 1:
            raise ValueError(f"n: got {n}, needs at least 1 step.")
        self._law, self._model, self._n = law, law.model, n
        self._angles = law.model.angles(n)
        self._chain = Ancestral(n)
        self.denoiser: Denoiser = law.model.denoiser
        self.start(1)

    def start(self, particles: int) -> Steps:
        """Begin anew with so many particles, for each member of the batch."""
        shape, c = self._law._draw_shape([particles])
        self._shape = shape
        self._context = self._model.told(c)
        self._u = self._model._noise(shape.numel())
        self._index, self._step = 0, None
        self._finite: list[Tensor] = []  # of each step so far, whether all data were; read at the end alone
        return self

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._step is not None and self._step.next_angle is not None:
            self._move(self._step)
        elif self._step is not None:
            self._u, self._index = self._step.noisy, self._n + 1
        if self._index > self._n:
            raise StopIteration
        with torch.no_grad():
            t = self._angles[self._index]
            datum = self.denoiser.denoised(t, self._u, self._context)
        self._watch(datum)
        following = self._angles[self._index + 1] if self._index < self._n else None
        self._step = Step(self._index, t, following, self._u, self._context, datum, self._events, self.denoiser)
        return self._step

    def _watch(self, datum: Tensor) -> None:
        """Keep whether all data are finite; at the last step, refuse those that are not, and name the first step."""
        if not self._law._validate_args or transformed():
            return
        self._finite.append(datum.isfinite().all())
        if self._index == self._n and not bool(self._finite[-1]):
            first = next(k for k, finite in enumerate(self._finite) if not bool(finite))
            raise LostRowsError(~datum.isfinite().all(-1), self._angles[first], min(first + 1, self._n), self._n)

    @torch.no_grad()
    def _move(self, step: Step) -> None:
        mean, sd = self.transition(step, step.datum)
        self._u = mean + sd * torch.randn_like(mean)
        self._index += 1

    def transition(self, step: Step, datum: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noisy rows after a step with this mean of the datum."""
        t, s = step.angle, step.next_angle
        noise = (step.noisy - t.cos() * datum) / t.sin()
        return self._chain.mean(datum, noise, t, s)

    def fork(self, ancestors: Tensor) -> None:
        """Replace particles by copies of others, ``(particles,)`` row numbers, before they move on."""
        rows = len(self._step.noisy) if self._step is not None else len(self._u)
        ancestors = ancestor_rows(ancestors, torch.Size((rows,)))
        if self._context is not None:
            self._context = self._context[ancestors]
        if self._step is not None:
            self._step.noisy, self._step.datum = self._step.noisy[ancestors], self._step.datum[ancestors]
            self._step.context = self._context

    @property
    def value(self) -> Tensor:
        """Events at the noisy rows as they are; after the last step, draws of the chain."""
        u = self._u if self._step is None or self._step.next_angle is not None else self._step.noisy
        t = self._angles[min(self._index, self._n)]
        return self._events(u / t.cos() if self._index >= self._n else u)

    def _events(self, white: Tensor) -> Tensor:
        with torch.no_grad():
            x, _ = self._model.coordinates.push(self._model.whitening.inverse(white))
        return self._law._as_values(x).reshape(self._shape + self._law.event_shape)
