"""Negatives: draws of the model that it is taught to hold for no better than data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contract import GenerativeModel
from ..foundation.chains import Plain, Step, mala, start
from ..foundation.shapes import Context, Rows

__all__ = ["Langevin", "ReplayBuffer"]

TARGET, RATE = 0.574, 0.1  # acceptance of the best Langevin step, and how fast a step size follows it
SPREAD = 0.2  # the least of the factors by which step sizes differ, so that chains in narrow places move too
LEAST = 0.02  # acceptance that a chain counts for, at least


@dataclass(frozen=True)
class Langevin:
    """Short Langevin chains.

    A batch holds chains in wide places and in narrow ones, at many contexts, while the energy changes under them. Each
    adjusted step therefore has a size of its own, a random fraction of the common one, which follows the *harmonic*
    mean of the acceptance: a chain that is stuck is a negative that never moves, and an energy that runs away from it.

    Arguments:
        transitions: how many.
        kernel: ``"mala"`` or ``"ula"``.
        step_size: of a leapfrog, at first; the largest of them, with an accept test.
        temperature: of the law that the chains draw from.

    Example:
        >>> Langevin(5).kernel
        'mala'
    """

    transitions: int
    kernel: str = "mala"
    step_size: float = 0.2
    temperature: float = 1.0

    def run(self, energy: Callable[[Tensor], Tensor], y: Rows, log_step: Tensor) -> tuple[Rows, Tensor]:
        """Chains from rows, and the harmonic mean of their acceptance.

        Arguments:
            energy: of rows, ``(rows,)``.
            y: where they start.
            log_step: logarithm of the step size, a scalar tensor.
        """
        potential = Plain(energy if self.temperature == 1 else lambda q: energy(q) / self.temperature)
        # a step of the physical size at any temperature: the noise grows with its root
        size = log_step.exp() * math.sqrt(self.temperature)
        noise = torch.randn(self.transitions, *y.shape, dtype=y.dtype, device=y.device)
        adjusted = self._adjusted if self.kernel == "mala" else self._unadjusted
        return adjusted(potential, y.detach(), size, noise)

    @staticmethod
    def _adjusted(potential: Plain, y: Tensor, size: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(2, *noise.shape[:2], dtype=y.dtype, device=y.device)
        sizes = size * (SPREAD + (1 - SPREAD) * uniform[1, ..., None])
        log_uniform, ones, rates = uniform[0].log(), torch.ones_like(y[0]), []
        state = start(y, potential)
        for each in zip(sizes, ones.expand(len(noise), -1), noise, log_uniform, strict=True):
            state, info = mala(state, potential, Step(*each))
            rates.append(info.acceptance)
        return state.position, 1 / (1 / torch.stack(rates).clamp_min(LEAST)).mean()

    @staticmethod
    def _unadjusted(potential: Plain, y: Tensor, size: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The bare equation; a chain that is lost is back where it started."""
        moved = y
        for kick in size * noise:
            moved = moved - 0.5 * size**2 * potential.grad(moved) + kick
        return torch.where(moved.isfinite().all(-1, keepdim=True), moved, y), torch.ones_like(size)


class ReplayBuffer(nn.Module):
    """Chains that are taken up again where they were left.

    Arguments:
        size: chains kept, 0 for none.
        features, context_features: widths of rows and contexts.
        chain: how they move.
        restart: fraction of those drawn that starts anew.

    Attributes:
        positions: ``(size, features)``. ``contexts``: of each chain, ``(size, context_features)``.
        log_step: logarithm of the step size, which follows the acceptance in training.

    Example:
        >>> ReplayBuffer(8, 2, 0, Langevin(1), 0.1).positions.shape
        torch.Size([8, 2])
    """

    def __init__(self, size: int, features: int, context_features: int, chain: Langevin, restart: float) -> None:
        super().__init__()
        self.size, self.langevin, self.restart = size, chain, restart
        self.register_buffer("positions", torch.zeros(size, features))
        self.register_buffer("contexts", torch.zeros(size, context_features))
        self.register_buffer("log_step", torch.tensor(math.log(chain.step_size)))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def draw(self, model: GenerativeModel, n: int, c: Context | None, advance: bool) -> tuple[Rows, Context | None]:
        """Rows of negatives, with the contexts that they are draws at.

        Arguments:
            model: whose chains they are.
            n: how many.
            c: contexts of data, of which chains that start anew take theirs.
            advance: whether the chains go on, and are written back to where they were taken from.

        Raises:
            ValueError: more are asked for than are kept.
        """
        if n > self.size:
            raise ValueError(
                f"buffer_size: {self.size} chains are kept, and a batch needs {n}; take "
                f"Contrastive(buffer_size={4 * n}), or smaller batches."
            )
        with torch.no_grad():
            self._fill(model, c)
            index = torch.randperm(self.size, device=self.positions.device)[:n]
            y, told = self.positions[index], self.contexts[index]
            if advance:
                y, told = self._start_anew(model, y, told, c)
            context = told if c is not None else None
            if not advance:
                return y, context
            y = self.chain(model, y, context)
            self.positions[index], self.contexts[index] = y, told
        return y, context

    def chain(
        self, model: GenerativeModel, y: Rows, c: Context | None, extra: Callable[[Tensor], Tensor] | None = None
    ) -> Rows:
        """Where chains from rows arrive; in training their step size learns.

        Arguments:
            model: whose chains they are.
            y, c: where they start, and at which contexts.
            extra: energy besides the model's.
        """

        def energy(rows: Tensor) -> Tensor:
            own = -model.unnormalized_rows(rows, c)  # differentiated by rows alone
            return own if extra is None else own + extra(rows)

        y, rate = self.langevin.run(energy, y, self.log_step)
        if model.training and self.langevin.kernel == "mala":
            self.log_step += RATE * (rate.nan_to_num(0.0) - TARGET)
        return y

    def _fill(self, model: GenerativeModel, c: Context | None) -> None:
        """Draws of the reference, once there are units to draw them in."""
        if int(self.filled):
            return
        if c is not None:
            self.contexts.copy_(c[torch.randint(len(c), (self.size,), device=c.device)])
        self.positions.copy_(model.reference_rows(self.size, self.contexts if c is not None else None))
        self.filled.fill_(1)

    def _start_anew(self, model: GenerativeModel, y: Tensor, told: Tensor, c: Context | None) -> tuple[Tensor, Tensor]:
        anew = torch.rand(len(y), 1, device=y.device) < self.restart
        if c is not None:
            told = torch.where(anew, c[torch.randint(len(c), (len(y),), device=c.device)], told)
        fresh = model.reference_rows(len(y), told if c is not None else None)
        return torch.where(anew, fresh, y), told
