r"""Roads from a law that is normalised and can be drawn to the law of an energy.

What makes annealing fail is a reference that is nothing like the target, not that the target has several modes: the
way is long, and particles are late everywhere. So the reference is *fitted*. A pilot population goes from where the
model would start by itself to the energy's law; a mixture of Gaussians, somewhat wider, takes the population's shape;
from there another pilot starts, and so on until the estimates of :math:`Z` no longer change. The last pilot leaves the
temperatures, and the step size and metric that served at each of them. Whatever is estimated afterwards starts afresh
from the reference, with all of this fixed.

An energy that does not live on rows of reals (``continuous = False``) is annealed by its own path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contract import GenerativeModel
from ..foundation.annealing import Annealed, Path, anneal
from ..foundation.errors import SamplingError
from ..foundation.ladder import Ladder
from ..foundation.local_moves import LocalMoves
from ..foundation.mixture import Mixture, fit_mixture
from ..foundation.moves import HamiltonianMoves, Moves, Tempered
from ..foundation.pareto import TRUSTED, pareto_shape
from ..foundation.shapes import Context

if TYPE_CHECKING:
    from .energy import Energy

__all__ = ["Road", "pave"]

ROUNDS = 5  # of fitting, at most
SETTLED = 3.0  # standard deviations of independent weights between two rounds
MOST_STAGES = 4  # of a pilot that starts near
MOST_LOCAL = 64  # features up to which each particle has a metric of its own
MOVES, LATER_MOVES = 20, 6  # at a temperature, at most

Beginning = tuple[Tempered, Tensor, Moves]
Start = Callable[[Context | None, int, int, torch.Generator], Beginning]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Road:
    """Where to start, and by which temperatures to go.

    Attributes:
        start: contexts of groups ``(groups, context)``, groups, particles in each, and generator, to a path, particles
            drawn from the reference, and their moves.
        ladder: of one group for each context.
        reference: in words.
        gradients: what it cost to find.
    """

    start: Start
    ladder: Ladder
    reference: str
    gradients: int


def pave(
    model: Energy,
    c: Context | None,
    particles: int,
    generator: torch.Generator,
    base: GenerativeModel | int,
    report: Report,
) -> Road:
    """Find a road.

    Arguments:
        model: whose law is its end.
        c: contexts ``(contexts, context)``, or ``None``.
        particles: of a pilot, for each context.
        generator: of random numbers.
        base: the reference, or the most components of one that is fitted.
        report: told what is going on.

    Raises:
        SamplingError: the energy is not finite where the reference is.
    """
    if isinstance(base, GenerativeModel):
        start = _from_model(model, base)
        _, ladder, gradients = _pilot(start(c, _count(c), particles, generator), MOVES)
        return Road(start, ladder, type(base).__name__, gradients)
    report("pilot")
    found, ladder, gradients = _pilot(model.annealing(c, _count(c), particles, generator), MOVES)
    if not model.continuous:
        return Road(model.annealing, ladder, "own", gradients)
    mixture = None
    for index in range(ROUNDS):
        before = found.log_ratio
        rows = found.position.unflatten(0, (_count(c), particles))
        mixture = fit_mixture(rows, base, generator, mixture)
        wide = mixture.widened(rows).to(found.position)
        report(f"pilot {index + 2}")
        start = _from_mixture(model, wide)
        path, q, moves = start(c, _count(c), particles, generator)
        covered = pareto_shape(-path.parts(q)[1].reshape(_count(c), -1)).median() < TRUSTED
        found, ladder, more = _pilot((path, q, moves), LATER_MOVES)
        gradients += more
        settled = (found.log_ratio - before).square().mean().sqrt() < SETTLED / particles**0.5
        if bool(covered & settled) and ladder.rungs <= MOST_STAGES:
            break
    return Road(start, ladder, f"mixture of {mixture.components}", gradients)


def _count(c: Context | None) -> int:
    return 1 if c is None else len(c)


def _pilot(beginning: Beginning, most: int) -> tuple[Annealed, Ladder, int]:
    """A population that chooses its temperatures, and what it learned."""
    path, q, moves = beginning
    _check_energy(path, q)
    settings: list[Any] = []
    found = anneal(path, q, moves, max_moves=most, report=lambda *_: settings.append(moves.settings()))
    ladder = torch.cat([torch.zeros_like(found.ladders[:1]), found.ladders])
    return found, Ladder(ladder, settings), getattr(moves, "gradients", 0)


def _check_energy(path: Tempered, q: Tensor) -> None:
    _, tilt = path.parts(q)
    lost = int(tilt.isnan().sum())
    if lost or not bool((tilt < torch.inf).any()):
        what = f"NaN at {lost}" if lost else "infinite at all"
        raise SamplingError(
            f"law: its energy is {what} of {len(q)} draws of the law from which annealing starts; an energy must be a "
            "number or plus infinity everywhere. Correct the network, or give a base= that lies where it is finite."
        )


def _from_mixture(model: Energy, mixture: Mixture) -> Start:
    """From a mixture for each context."""

    def start(c: Context | None, groups: int, particles: int, generator: torch.Generator) -> Beginning:
        batch = len(mixture.means)
        q = mixture.sample(groups // batch * particles, generator).flatten(0, 1)
        told = None if c is None else c.repeat_interleave(particles, 0)
        path = _tilted(model, told, lambda y: mixture.log_prob(y.unflatten(0, (batch, -1))).flatten())
        if mixture.components == 2 or q.shape[1] > MOST_LOCAL:  # one, and what lies over it
            return path, q, HamiltonianMoves(path, q, generator, groups)
        return path, q, LocalMoves(path, q, generator, groups, mixture)

    return start


def _from_model(model: Energy, base: GenerativeModel) -> Start:
    """From a model with an exact density, of the same events in units of its own."""

    def start(c: Context | None, groups: int, particles: int, generator: torch.Generator) -> Beginning:
        told = None if c is None else c.repeat_interleave(particles, 0)
        law = base() if not base.context_shape else base(_raw(model, told))
        law._validate_args = False

        def log_prob(y: Tensor) -> Tensor:
            x, volume = model.coordinates.push(y)
            return law.log_prob(x) + volume

        x = law.sample(torch.Size() if base.context_shape else (groups * particles,))
        q = model.coordinates.pull(x)[0]
        path = _tilted(model, told, log_prob)
        return path, q, HamiltonianMoves(path, q, generator, groups)

    return start


def _raw(model: Energy, c: Tensor) -> Tensor:
    """Contexts in the user's units."""
    return model.context_standardization.inverse(c).reshape(-1, *model.context_shape)


class _Between(Path):
    """The geometric path between two energies of rows; its end is evaluated alone where all rows have arrived."""

    def __init__(self, first: Callable[[Tensor], Tensor], last: Callable[[Tensor], Tensor]) -> None:
        super().__init__(first, lambda y: last(y) - first(y))
        self.last = last

    def value(self, q: Tensor) -> Tensor:
        with torch.no_grad():
            return self._energy(q)

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = q.detach().requires_grad_()
            values = self._energy(leaf)
            (gradients,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradients

    def _energy(self, q: Tensor) -> Tensor:
        beta = self.inverse_temperature
        if bool((beta == 1).all()):
            return self.last(q)
        return torch.lerp(self.reference(q), self.last(q), beta)


def _tilted(model: Energy, c: Context | None, log_base: Callable[[Tensor], Tensor]) -> Path:
    return _Between(lambda y: -log_base(y), lambda y: -model.unnormalized_rows(y, c, fixed=True))
