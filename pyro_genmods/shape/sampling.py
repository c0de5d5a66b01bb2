r"""Draws of an energy's law, by chains.

An energy has no sampler of its own. Each of these is a record of options with a function :meth:`EnergySampler.draw`:

* :class:`Annealed`: a population goes from the base to the law by tempered sequential Monte Carlo, and the draws are
  members of it. Modes get their weights, nothing is tuned by hand, and there is no start to forget; members of a
  population share ancestors, so that draws of one call are nearly independent and not quite.
* :class:`Chains`: a chain for each draw, from the replay buffer or the base on; cheap where there is one mode, or where
  the buffer is in all of them.
* :class:`Tempering`: a ladder of replicas for each draw, which exchange places; independent draws that cross between
  modes.

All work without gradients being enabled, as Pyro samples at unexpected moments.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import GenerativeModel
from ..foundation.adaptation import DualAveraging, Moments, halton, harmonic_mean
from ..foundation.annealing import Path, anneal
from ..foundation.chains import Info, Plain, PotentialLike, State, Step, hamiltonian, langevin, mala, start
from ..foundation.moves import HamiltonianMoves
from ..foundation.shapes import Context, Rows

__all__ = ["Annealed", "Chains", "EnergySampler", "Tuned", "path_of", "target_of"]

MOST_ROWS = 2**16  # moved in one batch
TARGETS = {"hmc": 0.651, "mala": 0.574, "ula": 0.95}
LENGTH = 1.3
Record = Callable[[State, Info, Step], None]


def path_of(model: GenerativeModel, c: Context | None) -> Path:
    """The geometric path from the reference to the law, at contexts of rows.

    Example:
        >>> import pyro_genmods as gm
        >>> path = path_of(gm.Energy(2, network=lambda y: y.sum(-1)), None)
        >>> path.parts(torch.ones(1, 2))[1]
        tensor([2.])
    """

    def reference(y: Tensor) -> Tensor:
        return -model.reference_log_prob_rows(y, c)

    def tilt(y: Tensor) -> Tensor:
        energy = model.energy_rows(y, c, fixed=True)
        return energy if model.base is not None else energy - reference(y)

    return Path(reference, tilt)


def target_of(model: GenerativeModel, c: Context | None) -> Plain:
    """The law itself, at contexts of rows, for chains.

    Example:
        >>> import pyro_genmods as gm
        >>> target_of(gm.Energy(2, network=lambda y: y.sum(-1), base=None), None).grad(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """
    return Plain(lambda y: -model.unnormalized_rows(y, c, fixed=True))


def new_generator(device: torch.device) -> torch.Generator:
    """A generator that goes on where torch's own stands.

    Example:
        >>> new_generator(torch.device("cpu")).device
        device(type='cpu')
    """
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))


class Tuned(NamedTuple):
    """What a warm-up teaches.

    Attributes:
        size: of a leapfrog.
        scale: standard deviations, ``(features,)``.
    """

    size: float
    scale: Tensor


class EnergySampler(ABC):
    """How an energy's law is drawn.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> class OfTheBase(EnergySampler):                 # for an energy that is zero
        ...     def draw(self, model, rows, c):
        ...         return model.reference_rows(rows, c)
        >>> gm.Energy(2, sampler=OfTheBase())().sample((5,)).shape
        torch.Size([5, 2])
    """

    @abstractmethod
    def draw(self, model: GenerativeModel, rows: int, c: Context | None) -> Rows:
        """Draws ``(rows, features)``, each at its row of context."""


@dataclass(frozen=True)
class Annealed(EnergySampler):
    """Members of a population that went from the base to the law.

    Arguments:
        particles: of a population, at least; as many as draws if these are more. One population for an unconditional
            law.
        particles_per_context: of the population of each different context, at least.
        target_ess: fraction of the particles that a step may cost.
        num_moves, max_moves: at every temperature.

    Raises:
        ValueError: fewer than 8 particles.
        SamplingError: at ``draw``, where the energy is not finite.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)          # with its base: precision 9
        >>> _ = torch.manual_seed(0)
        >>> round(float(Annealed().draw(model, 2000, None).var()), 2)
        0.11
    """

    particles: int = 512
    particles_per_context: int = 64
    target_ess: float = 0.5
    num_moves: int = 2
    max_moves: int = 20

    def __post_init__(self) -> None:
        if min(self.particles, self.particles_per_context) < 8:
            raise ValueError(f"particles: got {self.particles}, {self.particles_per_context}; need at least 8.")

    def draw(self, model: GenerativeModel, rows: int, c: Context | None) -> Rows:
        with torch.no_grad():
            if c is None:
                n = max(rows, self.particles)
                y = self._populations(model, n, None)[0]
                return y[torch.randperm(n, device=y.device)[:rows]]
            return self._at_contexts(model, c)

    def _at_contexts(self, model: GenerativeModel, c: Tensor) -> Rows:
        """Each row gets a member of its own of the population of its context."""
        contexts, which = torch.unique(c, dim=0, return_inverse=True)
        most = int(torch.bincount(which).max())
        n = max(most, self.particles_per_context)
        part = max(1, MOST_ROWS // n)
        populations = torch.cat([self._populations(model, n, chunk) for chunk in contexts.split(part)])
        order = which.argsort(stable=True)
        rank = torch.empty_like(which)
        first = torch.bincount(which).cumsum(0) - torch.bincount(which)
        rank[order] = torch.arange(len(which), device=which.device) - first[which[order]]
        shuffled = torch.rand(populations.shape[:2], device=populations.device).argsort(1)
        return populations[which, shuffled[which, rank]]

    def _populations(self, model: GenerativeModel, n: int, contexts: Tensor | None) -> Tensor:
        """Populations ``(contexts, n, features)``; one, without context."""
        groups = 1 if contexts is None else len(contexts)
        c = None if contexts is None else contexts.repeat_interleave(n, 0)
        path, y = path_of(model, c), model.reference_rows(groups * n, c)
        moves = HamiltonianMoves(path, y, new_generator(y.device), groups)
        options = {"target_ess": self.target_ess, "num_moves": self.num_moves, "max_moves": self.max_moves}
        return anneal(path, y, moves, **options).position.unflatten(0, (groups, n))


@dataclass(frozen=True)
class Chains(EnergySampler):
    """A chain for each draw.

    Arguments:
        kernel: ``"hmc"``, ``"mala"``, or ``"ula"``, which is biased by its step size.
        warmup: transitions in which all chains learn one step size and scale, which are fixed afterwards.
        transitions: after these.
        start: from the replay buffer, where the model has one that is filled, or from the base.
        step_size: to start with; of ``"ula"``, for good.
        least: chains that are run, so that there is something to learn from.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)
        >>> _ = torch.manual_seed(0)
        >>> round(float(Chains("mala").draw(model, 4000, None).var()), 1)
        0.1
    """

    kernel: str = "hmc"
    warmup: int = 60
    transitions: int = 40
    start: str = "buffer"
    step_size: float = 0.3
    least: int = 64

    def __post_init__(self) -> None:
        if self.kernel not in TARGETS or self.start not in ("buffer", "base"):
            raise ValueError(
                f"kernel, start: got {self.kernel!r}, {self.start!r}; need 'hmc', 'mala' or 'ula', 'buffer' or 'base'."
            )
        if min(self.warmup, self.transitions) < 0 or not self.step_size > 0 or self.least < 1:
            raise ValueError("warmup, transitions, step_size, least: need numbers of the right sign.")

    def draw(self, model: GenerativeModel, rows: int, c: Context | None) -> Rows:
        with torch.no_grad():
            n = max(rows, self.least)
            told = None if c is None else c[torch.arange(n, device=c.device) % rows]
            y = self._begin(model, n, told)
            return self.run(target_of(model, told), y)[:rows]

    def _begin(self, model: GenerativeModel, n: int, c: Tensor | None) -> Tensor:
        buffer = getattr(model, "negatives", None)
        if self.start == "buffer" and c is None and buffer is not None and buffer.size and int(buffer.filled):
            return buffer.positions[torch.randint(buffer.size, (n,), device=buffer.positions.device)]
        return model.reference_rows(n, c)

    def run(self, target: PotentialLike, y: Tensor) -> Tensor:
        """Where chains from rows arrive."""
        state, tuned = self.warm_up(target, y)
        return self.go_on(target, state, tuned, self.transitions).position

    def warm_up(self, target: PotentialLike, y: Tensor) -> tuple[State, Tuned]:
        """Where chains from rows are after the warm-up, and what it taught them."""
        step = DualAveraging.around(self.step_size, TARGETS[self.kernel], len(y))
        moments, scale = Moments(y.mean(0)), torch.ones_like(y[0])
        state, everyone = start(y, target), torch.ones(len(y), dtype=torch.bool, device=y.device)
        for k in range(self.warmup):
            state, info = self._move(state, target, self._draw(y, Tuned(step.size, scale), k), adjusted=True)
            step.update(harmonic_mean(info.acceptance, everyone))
            moments.update(state.position)
            if k in (self.warmup // 4, self.warmup // 2, 3 * self.warmup // 4):
                scale = scale if self.kernel == "ula" else moments.scale()
                moments.restart()
        return state, Tuned(self.step_size if self.kernel == "ula" else step.final, scale)

    def go_on(
        self, target: PotentialLike, state: State, tuned: Tuned, transitions: int, record: Record | None = None
    ) -> State:
        """Where chains are after so many transitions of a fixed kernel.

        Arguments:
            target: energies with gradients.
            state: where they are.
            tuned: step size and scale.
            transitions: how many.
            record: told of every transition: the state after it, what happened in it, and the step.
        """
        for k in range(transitions):
            draw = self._draw(state.position, tuned, self.warmup + k)
            state, info = self._move(state, target, draw, adjusted=self.kernel != "ula")
            if record is not None:
                record(state, info, draw)
        return state

    def _draw(self, y: Tensor, tuned: Tuned, k: int) -> Step:
        size, leapfrogs = tuned.size, 1
        if self.kernel == "hmc":
            leapfrogs = max(1, min(32, math.ceil(LENGTH * (0.5 + halton(k + 1)) / size)))
        return Step(y.new_tensor(size), tuned.scale, torch.randn_like(y), torch.rand_like(y[:, 0]).log(), leapfrogs)

    def _move(self, state: State, target: PotentialLike, draw: Step, adjusted: bool) -> tuple[State, Info]:
        move = hamiltonian if self.kernel == "hmc" else mala if adjusted else langevin
        return move(state, target, draw)


SAMPLERS: dict[str, type[EnergySampler]] = {"annealed": Annealed, "chains": Chains}
