r"""The warm-up of many chains: what is learned when.

======================== ===========================================================================================
iterations               what happens
======================== ===========================================================================================
before the first         *descent*: short trajectories with a step size for each chain, halved where it is refused,
                         until no energy is far above the others and they fall no more
all, up to 85 %          step size and scale follow all chains; the moments behind the scale start afresh at 3 %, 10 %,
                         25 % and 50 %, so that the way from the start is forgotten
from 25 % to 85 %        the trajectory length, which means little while the scale is wrong
at 25 % and 50 %         strongly correlated coordinates get a whole covariance for their scale
the last 15 %            scale and length stay, the step size settles
======================== ===========================================================================================

Afterwards nothing changes any more. A chain whose energy is far above that of the others is not learned from; and it
has its own step size in the descent, so that it neither spoils what the others learn nor is left behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..foundation.adaptation import DualAveraging, Moments, TrajectoryLength, harmonic_mean, settled
from ..foundation.chains import Info, PotentialLike, State, Step, hamiltonian

__all__ = ["WarmUp", "descend"]

RESTARTS = (0.03, 0.1, 0.25, 0.5)
FREEZE = 0.85
DOUBLINGS = 30
DENSE_DIM = 128  # up to which correlations are looked at
DENSE_CONDITION = 8.0  # ratio of extreme variances, after scaling, that makes a covariance worth its products
DEPENDENCE = 5.0  # iterations that are worth an independent draw in warm-up
DESCENT, DESCENT_LEAPFROGS, DESCENT_WINDOW = 150, 4, 10

Randoms = Callable[[], tuple[Tensor, Tensor]]


def descend(state: State, potential: PotentialLike, randoms: Randoms) -> tuple[State, Tensor]:
    """Bring chains from wherever they start to where the target has its mass.

    Momentum is drawn afresh after every few leapfrogs, so that energy is lost; what each chain loses at a time depends
    on the largest step it can take where it is.

    Returns:
        The state, and the step size of each chain, ``(chains,)``.
    """
    position = state.position
    sizes, scale = torch.full_like(position[:, :1], 0.1), torch.ones_like(position[0])
    middles: list[float] = []
    for _ in range(DESCENT):
        noise, log_uniform = randoms()
        state, info = hamiltonian(state, potential, Step(sizes, scale, noise, log_uniform, DESCENT_LEAPFROGS))
        factor = torch.where(info.acceptance > 0.8, 1.5, torch.where(info.acceptance < 0.4, 0.5, 1.0))
        sizes = sizes * factor[:, None]
        middles.append(float(state.energy.median()))
        if len(middles) > DESCENT_WINDOW and bool(settled(state.energy, position.shape[1]).all()):
            fallen = middles[-1 - DESCENT_WINDOW] - middles[-1]
            if fallen < 1 + math.sqrt(position.shape[1] / 2):
                break
    return state, sizes[:, 0]


class WarmUp:
    """Step size, scale and trajectory length while they are learned, and after.

    Arguments:
        iterations: of warm-up; 0 for none, everything then stays as given.
        position: where the chains are, ``(chains, dim)``.
        target: of the harmonic mean of acceptance probabilities.
        step_size: to start with.
        dense: whether the scale is the triangle of a covariance; ``None`` to decide.
        length: trajectory length to start with, or ``None`` where there is none to learn.
        adapt: which of ``"step_size"``, ``"scale"``, ``"length"`` are learned.
    """

    def __init__(
        self,
        iterations: int,
        position: Tensor,
        *,
        target: float,
        step_size: float = 0.1,
        dense: bool | None = None,
        length: float | None = None,
        adapt: frozenset[str] = frozenset({"step_size", "scale", "length"}),
    ) -> None:
        self.iterations, self.adapt, self.target = iterations, adapt, target
        self.iteration = 0
        self.chains, dim = position.shape
        self.dense = dense
        self.moments = Moments(position.mean(0), dense=dense or (dense is None and dim <= DENSE_DIM))
        self.scale, self.centre = torch.ones_like(position[0]), position.mean(0)
        if dense:
            self.scale = self.scale.diag()
        self.step = DualAveraging.around(step_size, target, self.chains)
        self.trajectory = None if length is None else TrajectoryLength(math.log(length))
        self._first_scale = "scale" in adapt
        self._size: tuple[float, Tensor] | None = None
        self._lag: Tensor | None = None  # factors for chains that are still far from the others

    @property
    def finished(self) -> bool:
        """Whether everything is fixed."""
        return self.iteration >= self.iterations

    @property
    def step_size(self) -> float:
        """Of the next leapfrog."""
        return self.step.final if self.finished else self.step.size

    @property
    def length(self) -> float:
        """Of the next trajectory, on average."""
        assert self.trajectory is not None
        return self.trajectory.final if self.finished else self.trajectory.length

    def size(self) -> Tensor:
        """The step size as a column, made once for each value."""
        number = self.step_size
        if self._size is None or self._size[0] != number:
            self._size = (number, self.scale.new_full((self.chains, 1), number))
        return self._size[1] if self._lag is None else self._size[1] * self._lag

    def update(self, before: State, state: State, info: Info, time: float) -> bool:
        """Learn from one transition of all chains; returns whether the step size should be looked for anew."""
        if self.finished:
            return False
        usable = settled(state.energy, state.position.shape[1])
        if "step_size" in self.adapt:
            self.step.update(harmonic_mean(info.acceptance, usable))
        jump = False
        if self.iteration < FREEZE * self.iterations:
            late = self.iteration >= RESTARTS[-2] * self.iterations  # lengths mean little while the scale is wrong
            if late and self.trajectory is not None and "length" in self.adapt:
                self.trajectory.update(before.position, info, (self.centre, self.scale), time, usable)
            jump = self._learn_scale(state.position[usable])
        self._lag = self._follow(usable, info)
        self.iteration += 1
        self._turn()
        return jump and "step_size" in self.adapt

    def _follow(self, usable: Tensor, info: Info) -> Tensor | None:
        """Step sizes of their own for chains that have not arrived, during warm-up."""
        if bool(usable.all()) or self.iteration + 1 == self.iterations:
            return None
        lag = torch.ones_like(info.acceptance) if self._lag is None else self._lag[:, 0]
        factor = torch.where(info.acceptance > 0.8, 2.0, torch.where(info.acceptance < 0.4, 0.25, 1.0))
        return torch.where(usable, 1.0, lag * factor).clamp(1e-9, 1.0)[:, None]

    def around(self, step_size: float) -> None:
        """Go on from another step size."""
        self.step = DualAveraging.around(step_size, self.target, self.chains)

    def _learn_scale(self, rows: Tensor) -> bool:
        """Returns whether the scale is another than a moment ago, and not just a better one."""
        self.moments.update(rows)
        enough = max(5 * self.chains, 50, 10 * rows.shape[1] if self.scale.dim() > 1 else 0)
        marks = {int(f * self.iterations) for f in (*RESTARTS, FREEZE)}
        due = self.iteration + 1 in marks
        if self.moments.count < enough or "scale" not in self.adapt or not (self.chains >= 8 or due):
            return False
        was_dense = self.scale.dim() > 1
        dense = was_dense or (self.dense is None and due and self._worth_a_matrix())
        self.scale, self.centre = self.moments.scale(dense), self.moments.mean
        jump, self._first_scale = self._first_scale or dense != was_dense, False
        return jump

    def _worth_a_matrix(self) -> bool:
        """Whether correlations are strong beyond what chance makes of so few independent draws."""
        late = self.iteration + 1 >= int(RESTARTS[-2] * self.iterations)
        ratio = len(self.centre) * DEPENDENCE / self.moments.count
        if not (late and self.moments.dense and ratio < 0.1):
            return False
        chance = ((1 + math.sqrt(ratio)) / (1 - math.sqrt(ratio))) ** 2  # Marchenko and Pastur
        correlation = self.moments.correlation()
        if not bool(correlation.isfinite().all()):
            return False
        values = torch.linalg.eigvalsh(correlation)
        return float(values[-1]) > DENSE_CONDITION * chance * float(values[0].clamp_min(1e-12))

    def _turn(self) -> None:
        """What changes between two phases."""
        if self.iteration in {int(f * self.iterations) for f in RESTARTS}:
            self.moments.restart()
        if self.iteration == int(RESTARTS[-1] * self.iterations) and self.trajectory is not None:
            self.trajectory.restart()
        if self.iteration == int(FREEZE * self.iterations):
            if self.trajectory is not None:
                self.trajectory.log_length = math.log(self.trajectory.final)
            if "step_size" in self.adapt:
                self.step.restart()

    # -- to and from disk ---------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which the warm-up goes on as if nothing had happened."""
        moments = {"mean": self.moments.mean, "covariance": self.moments.covariance}
        lag = {} if self._lag is None else {"lag": self._lag}
        tensors = {"scale": self.scale, "centre": self.centre, **moments, **lag}
        numbers: dict[str, Any] = {"iteration": self.iteration, "count": self.moments.count, "step": asdict(self.step)}
        numbers["trajectory"] = None if self.trajectory is None else asdict(self.trajectory)
        return tensors, {**numbers, "first_scale": self._first_scale}

    def load_state_dict(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.scale, self.centre = tensors["scale"], tensors["centre"]
        self.moments.mean, self.moments.covariance = tensors["mean"], tensors["covariance"]
        self._lag = tensors.get("lag")
        self.moments.count, self.iteration = numbers["count"], numbers["iteration"]
        self.step, self._first_scale = DualAveraging(**numbers["step"]), numbers["first_scale"]
        if numbers["trajectory"] is not None:
            self.trajectory = TrajectoryLength(**numbers["trajectory"])


def find_step_size(state: State, potential: PotentialLike, randoms: Randoms, scale: Tensor, size: float) -> float:
    """Double or halve a step size until the acceptance of single leapfrogs crosses a half in the median chain."""
    direction = 0
    for _ in range(DOUBLINGS):
        noise, log_uniform = randoms()
        column = noise.new_full((len(noise), 1), size)
        _, info = hamiltonian(state, potential, Step(column, scale, noise, log_uniform))
        wanted = 1 if float(info.acceptance.median()) > 0.5 else -1
        if direction and wanted != direction:
            break
        direction = wanted
        size *= 2.0**direction
    return size
