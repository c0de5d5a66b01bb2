r"""What a student is worth: how far its draws are from the teacher's, and what the same calls buy without a student.

A distilled sampler has no density, so it is judged by draws, in the teacher's white units:

* the sliced Wasserstein distance

  .. math:: \mathrm{SW}_2^2(P, Q) = \mathbb E_{\omega}\, W_2^2(\omega^\top P, \omega^\top Q), \qquad |\omega| = 1,

  between equally many draws of both, over independent batches. Two samples of *one* law are apart as well: the
  distance between two batches of the teacher is the *floor*, and what lies above it is the student's fault;
* the share of draws *off the support*: less likely under the teacher than all but one in a thousand of the teacher's
  own draws, by a margin. Where a density costs too much, a draw is off the support if it is farther from a thousand or
  more draws of the teacher than all but one in a thousand of further such draws.

Both are measured for the teacher in 2, 4, 8 and 16 calls of good solvers too. In few dimensions four to eight of them
beat any student, and then the certificate says so.

Reference:
    N. Bonneel, J. Rabin, G. Peyre, H. Pfister, Sliced and Radon Wasserstein Barycenters of Measures, Journal of
    Mathematical Imaging and Vision 51 (2015) 22-45.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor

from ..contract import Density, GenerativeModel
from ..foundation.errors import ShapeError
from ..foundation.ode import RK4, FixedStep, Heun
from .samplers import AdamsBashforth, Sampler

__all__ = ["Certificate", "Measured", "certify", "sliced_distance", "standard_contexts"]

RARE = 1e-3  # of the teacher's own draws are rarer than the limit of its support
NATS, STRETCH = 1.0, 1.1  # margins: of a log density, and of a distance to the nearest neighbour
MOST_DENSITY = 8  # features up to which the log density of every draw is affordable
DENSITY_STEPS = 8  # at most, for a log density that is compared with a limit
CHUNK = 1000  # rows at once, which fit into a processor's cache
TIMINGS = 3
CLEAR = 2.0  # standard errors that make a difference
Sample = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Measured:
    """What was measured of one way to draw.

    Attributes:
        name: of the way.
        calls: sequential calls of a network.
        distance, distance_error: sliced Wasserstein distance from the teacher in white units, and its standard error.
        off_support, off_support_error: share of draws off the teacher's support, and its standard error.
        seconds: for a thousand draws at once.
    """

    name: str
    calls: int
    distance: float
    distance_error: float
    off_support: float
    off_support_error: float
    seconds: float

    def as_good_as(self, other: Measured) -> bool:
        """Whether this is no farther from the teacher than the other, and no more off its support, up to noise."""
        distance = CLEAR * math.hypot(self.distance_error, other.distance_error)
        share = CLEAR * math.hypot(self.off_support_error, other.off_support_error)
        return self.distance <= other.distance + distance and self.off_support <= other.off_support + share


@dataclass(frozen=True)
class Certificate:
    """Measurements of a student beside those of its teacher; ``str`` makes a table with a verdict.

    Attributes:
        student: of the student.
        teacher: of the teacher by its own solver; its ``distance`` is the floor, that between two of its batches.
        solvers: of the teacher by few calls of other solvers.
        draws, batches: how many draws each batch had, and how many batches there were.
        features: number of coordinates.
        criterion: how support was judged, ``"density"`` or ``"neighbours"``.
        limit: least log density of a white row on the support, in nats; or largest distance to a neighbour.

    Example:
        >>> near = Measured("student", 1, 0.11, 0.01, 0.01, 0.002, 1e-3)
        >>> far = Measured("Heun(1)", 2, 0.9, 0.01, 0.4, 0.01, 2e-3)
        >>> teacher = Measured("teacher", 64, 0.1, 0.01, 0.0, 0.001, 5e-2)
        >>> certificate = Certificate(near, teacher, (far,), 1000, 4, 2, "density", -9.0)
        >>> certificate.speed_up, certificate.rival is None, round(certificate.excess, 3)
        (50.0, True, 0.046)
    """

    student: Measured
    teacher: Measured
    solvers: tuple[Measured, ...]
    draws: int
    batches: int
    features: int
    criterion: str
    limit: float

    @property
    def floor(self) -> float:
        """Distance between two batches of the teacher itself."""
        return self.teacher.distance

    @property
    def excess(self) -> float:
        """The student's distance beyond the floor, in squares."""
        return math.sqrt(max(0.0, self.student.distance**2 - self.floor**2))

    @property
    def speed_up(self) -> float:
        """How many times faster than the teacher the student draws, by the clock."""
        return self.teacher.seconds / self.student.seconds

    @property
    def rival(self) -> Measured | None:
        """The teacher's solver of fewest calls that is as good as the student, if any of those tried is."""
        good = [solver for solver in self.solvers if solver.as_good_as(self.student)]
        return min(good, key=lambda solver: (solver.calls, solver.distance), default=None)

    @property
    def better_rival(self) -> Measured | None:
        """The solver of fewest calls that is clearly better than the student, if any is."""
        good = [solver for solver in self.solvers if solver.as_good_as(self.student)]
        good = [solver for solver in good if not self.student.as_good_as(solver)]
        return min(good, key=lambda solver: (solver.calls, solver.distance), default=None)

    @property
    def faithful(self) -> bool:
        """Whether these draws do not tell the student from its teacher."""
        return self.student.as_good_as(self.teacher)

    @property
    def verdict(self) -> str:
        """What to do, in words."""
        return f"{self._quality()} {self._advice()}"

    def _quality(self) -> str:
        if self.faithful:
            return f"{self.batches} x {self.draws} draws do not tell the student from its teacher."
        student, teacher = self.student, self.teacher
        return (
            f"The student is not its teacher: it is {student.distance:.3f} away where {self.floor:.3f} is noise, and "
            f"{student.off_support:.1%} of its draws are off the support ({teacher.off_support:.1%} of the teacher's)."
        )

    def _advice(self) -> str:
        calls, rival, better = self.student.calls, self.rival, self.better_rival
        most = max((solver.calls for solver in self.solvers), default=0)
        if rival is None:
            return f"No solver of up to {most} calls is as good: the student is worth its training."
        if rival.calls <= calls:
            return f"Do not use it: {rival.name} is as good in {rival.calls} call(s) of the teacher, without training."
        if better is not None and better.calls == rival.calls:
            return (
                f"{better.name} is better, in {better.calls} calls of the teacher: take diffusion.sampled_by("
                f"{better.name}), unless {calls} call(s) is all that there is time for."
            )
        saved = f"It does in {calls} call(s) what takes {rival.name} {rival.calls}."
        if better is not None:
            saved += f" In {better.calls} calls {better.name} is better: diffusion.sampled_by({better.name})."
        return saved

    def __str__(self) -> str:
        """The table."""
        head = f"{'':24}{'calls':>6}{'SW2':>9}{'+-':>7}{'off support':>13}{'+-':>8}{'speed-up':>10}"
        lines = [
            f"{row.name:24}{row.calls:6d}{row.distance:9.4f}{row.distance_error:7.4f}{row.off_support:13.2%}"
            f"{row.off_support_error:8.2%}{self.teacher.seconds / row.seconds:9.1f}x"
            for row in (self.student, self.teacher, *self.solvers)
        ]
        how = {"density": "log density below", "neighbours": "nearest neighbour farther than"}[self.criterion]
        note = (
            f"{self.batches} batches of {self.draws} draws, {self.features} white coordinates; the teacher's distance "
            f"is the floor.\nOff support: {how} {self.limit:.3g}."
        )
        return "\n".join([head, *lines, note, self.verdict])

    def to_tuple(self) -> tuple[Any, ...]:
        """Plain numbers and strings, for files."""
        return astuple(self)

    @classmethod
    def from_tuple(cls, plain: tuple[Any, ...]) -> Certificate:
        """The inverse of :meth:`to_tuple`."""
        student, teacher, solvers, *rest = plain
        return cls(Measured(*student), Measured(*teacher), tuple(Measured(*row) for row in solvers), *rest)


def certify(
    student: GenerativeModel,
    diffusion: GenerativeModel,
    context: Tensor | None = None,
    *,
    draws: int = 1000,
    batches: int = 4,
    projections: int = 128,
    criterion: Literal["auto", "density", "neighbours"] = "auto",
    seed: int | None = None,
) -> Certificate:
    """Hold a student against its teacher, and the teacher's few-step solvers against it too.

    Arguments:
        student: a map of as much noise as the teacher's to the same coordinates.
        diffusion: the teacher.
        context: contexts ``(rows, *context_shape)``, from which those of the draws are drawn; standard normal ones, in
            standard units, by default. Distances are then between joint laws.
        draws, batches: how many draws a batch has, and how many batches there are; at least 100 and 2.
        projections: number of directions of the sliced distance.
        criterion: how support is judged; by default by the density up to 8 features, or where the network knows its
            divergence, else by neighbours.
        seed: of the draws.

    Raises:
        ShapeError: student and teacher make other events or contexts.
        ValueError: too few draws or batches, or a criterion that is not known or not there.
    """
    if (student.event_shape, student.context_shape) != (diffusion.event_shape, diffusion.context_shape):
        raise ShapeError(
            f"student: makes events {tuple(student.event_shape)} of contexts {tuple(student.context_shape)}, the "
            f"diffusion {tuple(diffusion.event_shape)} of {tuple(diffusion.context_shape)}; give its own teacher."
        )
    if draws < 100 or batches < 2:
        raise ValueError(f"draws, batches: got {draws} and {batches}, needs at least 100 and 2 for error bars.")
    criterion = _criterion(criterion, diffusion)
    device = diffusion.place[1]
    with torch.no_grad(), torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        return _certified(student, diffusion, context, (draws, batches, projections), criterion)


def sliced_distance(x: Tensor, y: Tensor, directions: Tensor) -> float:
    r"""Sliced Wasserstein distance :math:`\mathrm{SW}_2` between two samples of equal size.

    Arguments:
        x, y: ``(rows, n)``.
        directions: unit vectors, ``(n, projections)``.

    Example:
        >>> sliced_distance(torch.zeros(3, 2), torch.tensor([3.0, 4.0]).expand(3, 2), torch.eye(2))     # 5 / sqrt(2)
        3.5355...
    """
    return float(((x @ directions).sort(0)[0] - (y @ directions).sort(0)[0]).square().mean().sqrt())


def _criterion(criterion: str, diffusion: GenerativeModel) -> str:
    if criterion not in ("auto", "density", "neighbours"):
        raise ValueError(f"criterion: got {criterion!r}, needs 'auto', 'density' or 'neighbours'.")
    if criterion == "density" and diffusion.density is not Density.EXACT:
        raise ValueError("criterion: 'density' needs a teacher with trace='exact'; use 'neighbours'.")
    if criterion != "auto":
        return criterion
    affordable = diffusion.features <= MOST_DENSITY or diffusion._knows_divergence
    return "density" if affordable and diffusion.density is Density.EXACT else "neighbours"


def _ways(student: GenerativeModel, diffusion: GenerativeModel) -> list[tuple[str, int, Sample]]:
    """Name, calls, and map of noise to white rows: of the student, the teacher, and the teacher's other solvers."""

    def white(push: Sample) -> Sample:
        return lambda z, c: diffusion.whitening(push(z, c))

    def by(sampler: Sampler | FixedStep) -> tuple[str, int, Sample]:
        name = f"{type(sampler).__name__}({sampler.steps})"
        return name, sampler.evaluations, white(diffusion.sampled_by(sampler).push_rows)

    solvers = [AdamsBashforth(2), AdamsBashforth(4), Heun(2), AdamsBashforth(8), Heun(4), AdamsBashforth(16)]
    return [
        ("student", student.cost.sample, white(student.push_rows)),
        ("teacher", diffusion.cost.sample, white(diffusion.push_rows)),
        *(by(solver) for solver in solvers),
    ]


def _certified(
    student: GenerativeModel,
    diffusion: GenerativeModel,
    context: Tensor | None,
    sizes: tuple[int, int, int],
    criterion: str,
) -> Certificate:
    draws, batches, projections = sizes
    ways = _ways(student, diffusion)
    (dtype, device), features = diffusion.place, diffusion.features
    made: list[list[Tensor]] = [[] for _ in ways]
    reference, distances = [], torch.zeros(len(ways), batches, dtype=torch.float64)
    contexts = []
    for batch in range(batches):
        c = standard_contexts(diffusion, context, draws)
        z, fresh = torch.randn(2, draws, features, dtype=dtype, device=device)
        target = ways[1][2](fresh, c)
        width = features + (0 if c is None else c.shape[1])
        directions = torch.nn.functional.normalize(torch.randn(width, projections, dtype=dtype, device=device), dim=0)
        for i, (_, _, way) in enumerate(ways):
            made[i].append(way(z, c))
            distances[i, batch] = sliced_distance(_joint(made[i][-1], c), _joint(target, c), directions)
        reference.append(target)
        contexts.append(c)
    off, limit = _off_support(diffusion, torch.cat(reference), [torch.cat(rows) for rows in made], contexts, criterion)
    rows = [
        Measured(
            name,
            calls,
            float(distances[i].mean()),
            float(distances[i].std() / math.sqrt(batches)),
            off[i],
            _share_error(off[i], draws * batches),
            _seconds(way, z, c) / draws * 1000,
        )
        for i, (name, calls, way) in enumerate(ways)
    ]
    return Certificate(rows[0], rows[1], tuple(rows[2:]), draws, batches, features, criterion, limit)


def standard_contexts(diffusion: GenerativeModel, context: Tensor | None, rows: int) -> Tensor | None:
    """Contexts for as many rows in standard units, drawn from the given ones, or standard normal; ``None`` for none."""
    if diffusion.context_standardization is None:
        return None
    dtype, device = diffusion.place
    if context is None:
        return torch.randn(rows, diffusion.context_shape.numel(), dtype=dtype, device=device)
    chosen = torch.randint(len(context), (rows,), device=context.device)
    return diffusion.context_standardization(context[chosen].to(device, dtype).reshape(rows, -1))


def _joint(w: Tensor, c: Tensor | None) -> Tensor:
    return w if c is None else torch.cat([w, c], 1)


def _off_support(
    diffusion: GenerativeModel, reference: Tensor, made: list[Tensor], contexts: list[Tensor | None], criterion: str
) -> tuple[list[float], float]:
    """Shares of rows off the support, and the limit."""
    c = None if contexts[0] is None else torch.cat(contexts)
    if criterion == "density":
        # a tenth of a nat decides nothing
        solver = min(diffusion.solver, RK4(DENSITY_STEPS), key=lambda solver: solver.evaluations)

        def worth(w: Tensor) -> Tensor:
            rows, contexts = diffusion.whitening.inverse(w).split(CHUNK), repeat(None) if c is None else c.split(CHUNK)
            parts = [diffusion.log_prob_by(solver, y, c) for y, c in zip(rows, contexts, strict=False)]
            values = torch.cat(parts) + diffusion.whitening.log_scale()
            return values.nan_to_num(nan=-math.inf)

        limit = float(worth(reference).double().quantile(RARE)) - NATS
    else:
        known = _joint(reference, c)

        def worth(w: Tensor) -> Tensor:
            rows = _joint(w, c).split(CHUNK)
            return -torch.cat([torch.cdist(part, known).min(1)[0] for part in rows]).nan_to_num(nan=math.inf)

        limit = float(worth(made[1]).double().quantile(RARE)) * STRETCH
    shares = [float((worth(rows) < limit).double().mean()) for rows in made]
    return shares, limit if criterion == "density" else -limit


def _share_error(share: float, n: int) -> float:
    """Standard error of a share, that does not vanish where none was seen."""
    share = (share * n + 1) / (n + 2)
    return math.sqrt(share * (1 - share) / n)


def _seconds(way: Sample, z: Tensor, c: Tensor | None) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(TIMINGS):
        start = time.perf_counter()
        way(z, c)[-1, -1].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)
