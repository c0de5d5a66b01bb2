r"""Learning a model from data: one loop for all mechanisms.

Given examples :math:`(x_i, c_i)` and the objective :math:`\ell` of a mechanism, :func:`fit` minimises

.. math:: L(\phi) = \frac{1}{n} \sum_{i=1}^{n} \ell_\phi(x_i, c_i)

by Adam on shuffled batches, and keeps the weights with the least loss on examples that were put aside. It asks nothing
of a model but ``model.loss(x, context)``. Whoever wants a loop of their own writes it around that method::

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.standardize(x)
    for batch in x.split(128):
        optimizer.zero_grad()
        model.loss(batch).mean().backward()
        optimizer.step()

References:
    D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015, arXiv:1412.6980. I. Loshchilov, F. Hutter,
    SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv:1608.03983 (the cosine schedule), and Decoupled
    Weight Decay Regularization, 2019, arXiv:1711.05101.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..contract import GenerativeModel
from ..foundation.errors import SlowDirectionWarning
from .data import Examples, check_examples, split
from .history import TrainingHistory
from .state import Checkpoint, Settings, TrainingState, trainable

__all__ = ["fit"]


def fit(
    model: GenerativeModel,
    data: Any,
    context: Any = None,
    *,
    max_epochs: int = 200,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    validation: Any = 0.1,
    patience: int | None = 50,
    ema: float | None = None,
    gradient_clip: float | None = 5.0,
    weight_decay: float = 0.0,
    schedule: str | Callable[[float], float] = "cosine",
    standardize: bool = True,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    progress_bar: bool = True,
    **trainer_options: Any,
) -> TrainingHistory:
    r"""Learn a model from data, in place.

    The model is left with the best weights (the last, where ``model.comparable`` is false: a loss that is a game, or a
    contrast with draws of one's own, cannot say which are best), in ``eval()`` mode, on the device where it was. The
    caller's random stream is left alone, except for one draw where no seed is given; with a seed, two runs on a CPU
    agree bit for bit.

    Arguments:
        model: any generative model; parameters with ``requires_grad=False`` stay as they are.
        data: ``(rows, *event_shape)``, a tensor or an array, in the user's units; cast to the model's dtype.
        context: ``(rows, *context_shape)`` for a conditional model.
        max_epochs: passes over the data, at most; the schedule is laid over so many.
        batch_size: examples per step, over all processes.
        learning_rate: of Adam, at the start of the schedule.
        validation: which examples decide which weights are best and when to stop: a fraction of the data, drawn at
            random; examples of your own, ``data`` or ``(data, context)``; or 0, to decide by the training loss. Give
            your own where rows are not independent (time series, repeated measurements).
        patience: stop after so many epochs without improvement; ``None`` runs all epochs. A high learning rate makes
            plateaus of noise, which the schedule ends: be patient for a good part of ``max_epochs``.
        ema: decay of a running average of the weights, such as 0.999; the average is then what is validated and kept.
        gradient_clip: bound on the norm of the gradient, or ``None``.
        weight_decay: decoupled weight decay of AdamW.
        schedule: factor of the learning rate over the run: ``"cosine"`` falls to zero, ``"constant"`` stays, a function
            maps progress in [0, 1] to a factor.
        standardize: learn the units from the training examples first. ``False`` keeps those that the model has, for
            going on with a fitted model.
        seed: of split, shuffling and the objective's noise; default drawn from torch's global generator.
        checkpoint: a file that holds the state after every epoch. A run that was killed is taken up again by the same
            call, and ends where it would have ended; a finished run returns at once.
        device: ``"auto"`` trains on a GPU if there is one; or ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        progress_bar: show epoch, losses per dimension in the model's ``loss_unit`` (best with its epoch), learning rate
            and time left; ``False`` is silent.
        **trainer_options: further arguments of ``lightning.Trainer``: ``precision="bf16-mixed"``, ``devices=2,
            strategy="ddp"``, ``max_time``, ``accumulate_grad_batches``, ``callbacks``, ``logger``, ...

    Returns:
        The course of the run; ``history.stopped`` says why it ended, ``history.plot()`` draws it. An interrupt from the
        keyboard ends the run early, with the best weights so far. A loss or gradient that is not finite ends it before
        the weights are touched, with a warning.

    Raises:
        ShapeError: data and context do not fit the model or each other.
        DataError: NaN or infinite values, too few rows, or a constant column.
        SupportError: values outside the model's support.
        FileFormatError: the checkpoint is damaged, or belongs to a run with other arguments or data.
        ValueError: an argument out of its range, or a model with nothing to learn.
        TypeError: an argument that neither ``fit`` nor ``lightning.Trainer`` knows, or not a model.

    Warns:
        SlowDirectionWarning: the model scores in its slow direction, and training would run it at every step.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> from zuko import flows
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0])
        >>> model = gm.Flow(flows.MAF(2, transforms=1, hidden_features=(8,)))
        >>> history = gm.fit(model, x, max_epochs=3, seed=0, progress_bar=False)
        >>> history.epochs, history.stopped
        (3, 'max_epochs=3 reached')
        >>> model().log_prob(x).shape
        torch.Size([500])
    """
    settings = Settings(max_epochs, batch_size, learning_rate, patience, ema, gradient_clip, weight_decay, schedule)
    _check_model(model)
    examples = check_examples(model, data, context)
    plan = _Plan(model, examples, _check_validation(model, validation), settings, seed, standardize)
    store = None if checkpoint is None else Checkpoint(Path(checkpoint), plan.identity())
    state = None if store is None else store.load(model)
    if state is None or not state.finished:
        state = _train(plan, state, store, device, progress_bar, trainer_options)
    state.restore_best(model)
    model.eval()
    model.after_fit(examples.x, examples.context)
    if state.history.stopped.startswith("non-finite"):
        warnings.warn(
            f"training stopped: {state.history.stopped}. The model has the weights of epoch "
            f"{state.history.best_epoch}; lower learning_rate or gradient_clip, or train in float64.",
            RuntimeWarning,
            stacklevel=2,
        )
    return state.history


@dataclass(frozen=True)
class _Plan:
    """What :func:`fit` was asked to do, checked; ``validation`` is a fraction or examples."""

    model: GenerativeModel
    examples: Examples
    validation: Examples | float
    settings: Settings
    seed: int | None
    standardize: bool

    def identity(self) -> dict[str, Any]:
        """The arguments on which the result depends, for the checkpoint."""
        model, validation = self.model, self.validation
        layout = [(name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict().items()]
        code = hashlib.sha256(repr((layout, model.event_shape, str(model.support))).encode()).hexdigest()
        return {
            "model": f"{type(model).__qualname__} of layout {code[:12]}",
            "data": self.examples.describe(),
            "validation": validation.describe() if isinstance(validation, Examples) else validation,
            "seed": self.seed,
            "standardize": self.standardize,
            **self.settings.to_dict(),
        }

    def split(self, seed: int) -> tuple[Examples, Examples | None]:
        """Examples to learn from and to decide by."""
        if isinstance(self.validation, Examples):
            return self.examples, self.validation
        return split(self.examples, self.validation, seed) if self.validation else (self.examples, None)

    def begin(self, train: Examples, seed: int) -> TrainingState:
        """Learn the units, and start."""
        if self.standardize:
            with torch.no_grad():
                self.model.standardize(train.x, train.context)
        return TrainingState.start(self.model, self.settings, seed)


def _train(
    plan: _Plan,
    state: TrainingState | None,
    store: Checkpoint | None,
    device: str | torch.device,
    progress_bar: bool,
    trainer_options: dict[str, Any],
) -> TrainingState:
    """Start or take up a run; the model ends on the device where it was."""
    from .loop import TrainingLoop
    from .trainer import make_trainer, run, runs_elsewhere  # takes seconds

    model, done = plan.model, 0 if state is None else state.history.epochs
    seed = _draw_seed(plan.seed) if state is None else state.history.seed
    train, held_out = plan.split(seed)
    _, home = model.place
    smallest = len(train) // -(-len(train) // plan.settings.batch_size)
    epochs = plan.settings.max_epochs - done
    trainer = make_trainer(_target(device, home), epochs, smallest, plan.seed, trainer_options)
    if state is None:
        state = plan.begin(train, seed)
    else:
        state.history.resumed.append(done)
    with _own_random_stream(trainer.strategy.root_device), tempfile.TemporaryDirectory() as folder:
        if store is None and runs_elsewhere(trainer):
            store = Checkpoint(Path(folder) / "state.safetensors", plan.identity())
        loop = TrainingLoop(model, train, held_out, plan.settings, state, store, progress_bar=progress_bar)
        try:
            ending = run(trainer, loop)
            if store is not None and runs_elsewhere(trainer):
                state = store.load(model) or state
        except BaseException:
            state.restore_best(model)
            raise
        finally:
            model.to(home).eval()
    state.history.stopped = state.history.stopped or ending
    return state


def _own_random_stream(device: torch.device) -> AbstractContextManager[None]:
    """Give the caller's random stream back as it was."""
    return torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else [])


def _check_model(model: GenerativeModel) -> None:
    if not isinstance(model, GenerativeModel):
        raise TypeError(f"model: got {type(model).__name__}, needs a GenerativeModel, e.g. gm.Flow(zuko_flow).")
    if not trainable(model):
        raise ValueError(
            f"model: all parameters of {type(model).__name__} are frozen, there is nothing to learn; "
            "call model.requires_grad_(True) first."
        )
    if model.slow_direction == "score":
        warnings.warn(
            f"model: {type(model).__name__} scores data in its slow direction, which training would run at every "
            'step; build it the other way round (direction="density" for flows).',
            SlowDirectionWarning,
            stacklevel=3,
        )


def _check_validation(model: GenerativeModel, validation: Any) -> Examples | float:
    if validation is None or (isinstance(validation, int | float) and not isinstance(validation, bool)):
        fraction = float(validation or 0)
        if not 0 <= fraction < 1:
            raise ValueError(f"validation: got {validation!r}, needs a fraction below 1, 0, or examples.")
        return fraction
    if isinstance(validation, tuple):
        if len(validation) != 2:
            raise ValueError(f"validation: got a tuple of {len(validation)}, needs (data, context).")
        return check_examples(model, *validation, name="validation")
    return check_examples(model, validation, None, name="validation")


def _draw_seed(seed: int | None) -> int:
    return int(torch.randint(2**62, ())) if seed is None else seed


def _target(device: str | torch.device, home: torch.device) -> torch.device:
    if device != "auto":
        return torch.device(device)
    return home if home.type == "cuda" or not torch.cuda.is_available() else torch.device("cuda")
