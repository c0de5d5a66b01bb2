r"""How far a training run is, in memory and on disk.

The state after an epoch is everything the next epoch depends on: weights, their running average, the best weights so
far, the optimizer's moments and the history. Random numbers are not part of it, because they are functions of the seed
and the epoch alone. With ``ema`` :math:`\beta` the average over steps :math:`t` is

.. math:: \bar\phi_t = \beta_t \bar\phi_{t-1} + (1 - \beta_t) \phi_t, \qquad
          \beta_t = \min\left(\beta, \frac{1 + t}{10 + t}\right) ,

whose short memory at the start forgets the untrained weights.

Reference:
    B. T. Polyak, A. B. Juditsky, Acceleration of stochastic approximation by averaging, SIAM Journal on Control and
    Optimization 30 (1992) 838-855.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..foundation.errors import FileFormatError
from ..io import read_tensors, write_tensors
from .history import TrainingHistory

__all__ = ["Checkpoint", "Settings", "TrainingState", "trainable"]

KIND = "training checkpoint"
HISTORY_FACTS = ("best_epoch", "stopped", "resumed", "seed", "unit", "last")
STATE_FACTS = ("steps", "scaler", "finished")


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:  # noqa: ARG001
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "constant": _constant}


@dataclass(frozen=True)
class Settings:
    """The numbers of a training run, as :func:`pyro_genmods.fit` documents them.

    Raises:
        ValueError: a number is out of its range, or the schedule is unknown.
    """

    max_epochs: int
    batch_size: int
    learning_rate: float
    patience: int | None
    ema: float | None
    gradient_clip: float | None
    weight_decay: float
    schedule: str | Callable[[float], float]

    def __post_init__(self) -> None:
        for name in ("max_epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and (int(value) != value or value < 1):
                raise ValueError(f"{name}: got {value!r}, needs a whole number of at least 1.")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, needs a positive number.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {self.weight_decay!r}, needs a number that is not negative.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema: got {self.ema!r}, needs a decay between 0 and 1, such as 0.999, or None.")
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: got {self.schedule!r}, needs one of {', '.join(map(repr, SCHEDULES))}, or a function from "
                "progress in [0, 1] to a factor of the learning rate."
            )

    def rate(self, progress: float) -> float:
        """Learning rate at a fraction of the run."""
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return self.learning_rate * schedule(progress)

    def to_dict(self) -> dict[str, Any]:
        """JSON; a schedule that is a function goes by its name."""
        name = getattr(self.schedule, "__qualname__", self.schedule)
        return {**vars(self), "schedule": name if isinstance(name, str) else type(self.schedule).__qualname__}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


@dataclass
class TrainingState:
    """What a run has reached.

    Attributes:
        history: losses so far.
        best: weights of the best epoch, of the start before there is one.
        average: running average of the weights, with ``ema``.
        steps: optimizer steps taken.
        optimizer: the optimizer's tensors as last saved, by ``index.name``.
        scaler: the loss scaler's numbers as last saved, in half precision.
        finished: the run ended for good, so that taking it up again changes nothing.
    """

    history: TrainingHistory
    best: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    # -- weights -------------------------------------------------------------------------------------------------

    @classmethod
    def start(cls, model: nn.Module, settings: Settings, seed: int) -> TrainingState:
        """The state before the first step."""
        average = {name: p.detach().clone() for name, p in trainable(model).items()} if settings.ema else {}
        last = not getattr(model, "comparable", True)
        history = TrainingHistory(seed=seed, unit=getattr(model, "loss_unit", "nats"), last=last)
        return cls(history, best=_weights(model), average=average)

    def to(self, device: torch.device) -> None:
        """Move the weights that training reads and writes."""
        self.average = {name: tensor.to(device) for name, tensor in self.average.items()}

    def update_average(self, parameters: dict[str, nn.Parameter], decay: float | None) -> None:
        """Count a step and, with a decay, move the average towards the weights."""
        self.steps += 1
        if decay is None:
            return
        decay = min(decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            average = [self.average[name] for name in parameters]
            torch._foreach_lerp_(average, list(parameters.values()), 1 - decay)

    @contextmanager
    def averaged(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """The model under its averaged weights, if there are any, for the time of a ``with`` block."""
        if not self.average:
            yield
            return
        live = [parameter.detach().clone() for parameter in parameters.values()]
        with torch.no_grad():
            torch._foreach_copy_(list(parameters.values()), [self.average[name] for name in parameters])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters.values()), live)

    def keep_best(self, model: nn.Module) -> None:
        """Remember the weights the model has now."""
        self.best = _weights(model)

    def restore_best(self, model: nn.Module) -> None:
        """Give the model the best weights, and drop its gradients."""
        model.load_state_dict(self.best, strict=False)  # not strict: extra state that is no tensor stays as it is
        for parameter in model.parameters():
            parameter.grad = None

    # -- optimizer -----------------------------------------------------------------------------------------------

    def take_optimizer(self, optimizer: torch.optim.Optimizer, scaler: dict[str, float]) -> None:
        """Copy the optimizer's moments and the loss scaler's numbers, to be saved."""
        state = optimizer.state_dict()["state"]
        self.optimizer = {f"{index}.{name}": value for index, row in state.items() for name, value in row.items()}
        self.scaler = scaler

    def give_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the saved moments into a fresh optimizer."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.optimizer.items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = tensor.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, and which run it is.

    Arguments:
        path: the file.
        identity: the arguments of the run, as JSON; another run's file is refused.
    """

    path: Path
    identity: dict[str, Any]

    def save(self, state: TrainingState, model: nn.Module) -> None:
        """Write state and weights atomically; what a finished run no longer needs is left out."""
        groups = {"best": state.best, "history": state.history.to_tensors()}
        if not state.finished:
            groups |= {"model": _weights(model), "average": state.average, "optimizer": state.optimizer}
        metadata = {
            "kind": KIND,
            "identity": self.identity,
            "history": {name: getattr(state.history, name) for name in HISTORY_FACTS},
            "state": {name: getattr(state, name) for name in STATE_FACTS},
        }
        tensors = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        write_tensors(self.path, tensors, metadata)

    def load(self, model: nn.Module) -> TrainingState | None:
        """Read the state, if there is one, and give the model its weights.

        Raises:
            FileFormatError: the file is not a training checkpoint, or that of a run with other arguments.
        """
        if not self.path.exists():
            return None
        tensors, metadata = read_tensors(self.path)
        if metadata.get("kind") != KIND:
            raise FileFormatError(f"checkpoint: {self.path} is not a training checkpoint; give another path.")
        self._check_identity(metadata["identity"])
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        history = TrainingHistory.from_tensors(groups.pop("history"), metadata["history"])
        model.load_state_dict(groups.pop("model", groups["best"]), strict=False)
        return TrainingState(history, **groups, **metadata["state"])

    def _check_identity(self, written: dict[str, Any]) -> None:
        differences = [
            f"{name} was {written.get(name)!r}, is {self.identity.get(name)!r}"
            for name in {**written, **self.identity}
            if written.get(name) != self.identity.get(name)
        ]
        if differences:
            raise FileFormatError(
                f"checkpoint: {self.path} belongs to another run ({'; '.join(differences)}); give the arguments of "
                "that run to go on with it, or another path to start afresh."
            )
