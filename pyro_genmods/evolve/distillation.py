"""How a student of a diffusion is taught: lessons from solutions of the teacher's equation, by three methods.

The methods are those of :mod:`pyro_genmods.evolve.distilled`, with its references.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from ..foundation.errors import IntegrationError
from ..foundation.residual import ResidualMLP
from ..foundation.unet import UNet
from .certificate import certify, standard_contexts
from .denoiser import Denoiser
from .diffusion import Diffusion
from .distilled import Distilled
from .network import check_rows_apart, default_network

__all__ = ["distill"]

METHODS = ("regression", "consistency", "rectified")
MOST_STEPS = 4
HUBER = 0.02  # of the pseudo-Huber distance, in white deviations per root of the number of coordinates
POOL, REUSE = 16, 4  # batches of solutions that are kept, and how many iterations pass until one is replaced
CLIP, WARM_UP = 5.0, 50


@dataclass(frozen=True)
class _Plan:
    """What :func:`distill` was asked to do."""

    steps: int
    method: str
    iterations: int
    batch_size: int
    learning_rate: float
    teacher_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(
                f"steps: got {self.steps}, needs 1 to {MOST_STEPS}; with more, the teacher's own solvers are better: "
                f"diffusion.sampled_by(AdamsBashforth({max(self.steps, 8)}))."
            )
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, needs {' or '.join(map(repr, METHODS))}.")
        for name, least in (("iterations", 1), ("batch_size", 2), ("teacher_steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, needs at least {least}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: got {self.learning_rate}, needs a positive number.")

    @property
    def inner(self) -> int:
        """Steps of the teacher in one segment."""
        return -(-self.teacher_steps // self.steps)

    def rate(self, iteration: int) -> float:
        """Learning rate: a warm-up, and a cosine to zero."""
        return (
            self.learning_rate
            * min(1.0, (iteration + 1) / WARM_UP)
            * 0.5
            * (1 + math.cos(math.pi * iteration / self.iterations))
        )

    def angles(self, diffusion: Diffusion) -> Tensor:
        """Ends of the student's segments: evenly spaced for straight lines, else as the teacher needs them."""
        if self.method == "rectified":
            return torch.linspace(diffusion.top, diffusion.bottom, self.steps + 1, dtype=torch.float64)
        return diffusion.angles(self.steps).double()


def distill(
    diffusion: Diffusion,
    steps: int = 1,
    method: Literal["regression", "consistency", "rectified"] = "regression",
    *,
    context: Tensor | None = None,
    network: nn.Module | None = None,
    iterations: int = 2000,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    teacher_steps: int = 24,
    certificate: bool = True,
    seed: int | None = None,
    progress_bar: bool = True,
) -> Distilled:
    """Teach a network to do in a few calls what the solver of a diffusion's probability flow does in many.

    The teacher and the caller's random stream are left as they are. An interrupt from the keyboard ends the training
    early, with what was learned.

    Arguments:
        diffusion: the teacher, trained.
        steps: calls of the student, 1 to 4.
        method: see the module; regression was best, or as good, wherever it was measured.
        context: contexts ``(rows, *context_shape)`` of a conditional teacher from which those of the lessons are drawn;
            standard normal ones, in standard units, by default.
        network: of the student, called as ``network(t, u, c)``; by default a copy of the teacher's where that is a
            default network for velocities, with its weights, else a new default network.
        iterations: steps of Adam, whose rate falls to zero by a cosine.
        batch_size: solutions in a step; each is used about four times.
        learning_rate: at the start.
        teacher_steps: of the two-step method of Adams and Bashforth by which the teacher is solved, at least.
        certificate: whether to measure, at the end, what the student is worth.
        seed: of all that is random; default drawn from torch's global generator.
        progress_bar: show iteration, and the loss in white deviations.

    Returns:
        The student, in ``eval()`` mode, with a :attr:`~Distilled.certificate`; print that.

    Raises:
        TypeError: not a diffusion.
        ValueError: steps or another number out of range, a method that is not known, or a teacher that has not learned.
        ShapeError: a network of other shapes.
        IntegrationError: the teacher's solutions are not finite.

    Warns:
        RuntimeWarning: the loss or its gradient was not finite; the student has the weights before.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> from pyro_genmods.evolve import distill
        >>> teacher = gm.Diffusion(2)
        >>> history = gm.fit(teacher, torch.randn(500, 2).exp(), max_epochs=2, seed=0, progress_bar=False)
        >>> student = distill(teacher, iterations=20, certificate=False, seed=0, progress_bar=False)
        >>> student().sample((5,)).shape, student.cost.sample
        (torch.Size([5, 2]), 1)
    """
    if not isinstance(diffusion, Diffusion):
        raise TypeError(f"diffusion: got {type(diffusion).__name__}, needs a gm.Diffusion, trained.")
    plan = _Plan(steps, method, iterations, batch_size, learning_rate, teacher_steps)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    with _teaching(diffusion, seed):
        _check_learned(diffusion)
        student = _student(diffusion, plan, network)
        _learn(student, _Lessons(diffusion, plan, context), plan, progress_bar)
        student.eval()
        if certificate:
            student.certificate = certify(student, diffusion, context, seed=seed)
    return student


@contextmanager
def _teaching(diffusion: Diffusion, seed: int) -> Iterator[None]:
    """The teacher in ``eval()`` mode, and a random stream of one's own."""
    device = diffusion.place[1]
    modes = {module: module.training for module in diffusion.modules()}
    try:
        with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            diffusion.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_learned(diffusion: Diffusion) -> None:
    if diffusion.whitening.active or diffusion.coordinates.standardization.active:
        return
    z, t = diffusion._noise(8), diffusion.knots[len(diffusion.knots) // 2]
    c = z.new_zeros(8, diffusion.context_shape.numel()) if diffusion.context_shape else None
    with torch.no_grad():
        if not diffusion.denoiser.velocity(t, z, diffusion.told(c)).any():
            raise ValueError("diffusion: has learned nothing yet, it makes standard normal noise; gm.fit it first.")


def _student(diffusion: Diffusion, plan: _Plan, network: nn.Module | None) -> Distilled:
    """A student in the teacher's units, with its weights where they mean the same."""
    own, told = diffusion.network, diffusion._told_width
    if network is None:
        if diffusion.parameterization == "velocity" and isinstance(own, ResidualMLP | UNet):
            network = copy.deepcopy(own).requires_grad_(True)
        else:
            network = default_network(diffusion.coordinates.unconstrained_shape, diffusion.features, told, False)
    context = diffusion.context_shape.numel() if diffusion.context_shape else 0
    student = Distilled(
        network,
        tuple(diffusion.event_shape),
        tuple(plan.angles(diffusion).tolist()),
        context,
        diffusion.coordinates.support,
        told=bool(diffusion.context_dropout),
    )
    check_rows_apart(network, diffusion.features, told)
    dtype, device = diffusion.place
    student.to(device, dtype)
    for name in ("coordinates", "whitening", "context_standardization"):
        part = getattr(diffusion, name)
        if part is not None:
            getattr(student, name).load_state_dict(part.state_dict())
    return student.train()


class _Lessons:
    """Solutions of the teacher's equation from fresh noise, a pool of which one batch after the other is replaced."""

    def __init__(self, diffusion: Diffusion, plan: _Plan, context: Tensor | None) -> None:
        self.diffusion, self.plan, self.context = diffusion, plan, context
        self.grid = diffusion.angles(plan.steps * plan.inner)
        self.stride = 1 if plan.method == "consistency" else plan.inner
        self.pool: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=POOL)

    def batch(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        """States ``(places, rows, features)`` of solutions at the angles that the method needs, and contexts."""
        if len(self.pool) < POOL or iteration % REUSE == 0:
            self.pool.append(self._solve())
        return self.pool[int(torch.randint(len(self.pool), ()))]

    @torch.no_grad()
    def _solve(self) -> tuple[Tensor, Tensor | None]:
        diffusion = self.diffusion
        c = standard_contexts(diffusion, self.context, self.plan.batch_size)
        noise, told = diffusion._noise(self.plan.batch_size), diffusion.told(c)
        states = torch.stack([noise, *trajectory(diffusion.denoiser, noise, told, self.grid)][:: self.stride])
        if not bool(states[-1].isfinite().all()):
            raise IntegrationError(
                "diffusion: its probability flow leads to NaN or infinity; train it with a smaller learning rate."
            )
        return states, c

    def residual(self, student: Distilled, states: Tensor, c: Tensor | None) -> Tensor:
        """What the method wants to be zero, ``(rows, features)``, in white deviations."""
        c, rows = student._told(c), torch.arange(states.shape[1], device=states.device)
        if self.plan.method == "rectified":
            z, x, (top, bottom) = states[0], states[-1], student.angles[[0, -1]]
            place = torch.rand(len(rows), 1, dtype=z.dtype, device=z.device)
            made = student.velocity(torch.lerp(top, bottom, place), torch.lerp(z, x, place), c)
            return (bottom - top) * made - (x - z)
        angles = self.grid[:: self.stride][:, None]
        k = torch.randint(len(angles) - 1, (len(rows),), device=rows.device)
        end = student.angles[k * student.steps // (len(angles) - 1) + 1][:, None]
        # one angle for all rows is cheaper
        start = angles[k] if len(angles) > 2 else angles[0, 0]
        target = states[k + 1, rows]
        if self.plan.method == "consistency":
            with torch.no_grad():
                target = student.along(angles[k + 1], end, target, c)
        return student.along(start, end, states[k, rows], c) - target


def trajectory(denoiser: Denoiser, u: Tensor, c: Tensor | None, angles: Tensor) -> Iterator[Tensor]:
    """States at all angles after the first, by the two-step method of Adams and Bashforth."""
    before = None
    for t, h in zip(angles[:-1].unbind(), angles.diff().unbind(), strict=True):
        v = denoiser.velocity(t, u, c)
        u = torch.addcmul(u, v if before is None else torch.addcmul(v, v - before[0], 0.5 * h / before[1]), h)
        before = v, h
        yield u


def _learn(student: Distilled, lessons: _Lessons, plan: _Plan, progress_bar: bool) -> None:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, plan.learning_rate)
    scale = HUBER * math.sqrt(student.features)
    bar = trange(plan.iterations, desc="distill", unit="step", disable=not progress_bar)
    try:
        for i in bar:
            states, c = lessons.batch(i)
            squares = lessons.residual(student, states, c).square().sum(-1)
            loss = ((squares + scale**2).sqrt() - scale).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, CLIP)
            if not bool((loss + norm).isfinite()):
                warnings.warn(
                    f"distill: the loss or its gradient is not finite at iteration {i}; the student has the weights "
                    "before. Lower learning_rate, or distil in float64.",
                    RuntimeWarning,
                    stacklevel=3,
                )
                break
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(i)
            optimizer.step()
            if i % 20 == 0:
                bar.set_postfix(loss=f"{float(loss.detach()):.4f} sd", refresh=False)
    except KeyboardInterrupt:
        warnings.warn(f"distill: interrupted at iteration {i} of {plan.iterations}.", RuntimeWarning, stacklevel=3)
    finally:
        bar.close()
