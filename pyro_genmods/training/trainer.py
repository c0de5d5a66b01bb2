"""Lightning's Trainer as ``fit`` needs it: silent, without litter on disk, and patient with an interrupt.

``fit`` decides what a run is (epochs, clipping, validation, checkpoints); everything else that a Trainer can do passes
through: devices, processes, mixed precision, time limits, callbacks, loggers.
"""

from __future__ import annotations

import inspect
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from .loop import TrainingLoop

__all__ = ["make_trainer", "run", "runs_elsewhere"]

HALF_PRECISIONS = ("16-mixed", "bf16-mixed")
OURS = {
    "accelerator": "device",
    "min_epochs": "patience=None",
    "min_steps": "patience=None",
    "gradient_clip_val": "gradient_clip",
    "gradient_clip_algorithm": "gradient_clip",
    "enable_checkpointing": "checkpoint",
    "enable_progress_bar": "progress_bar",
    "limit_val_batches": "validation",
    "val_check_interval": "validation",
    "check_val_every_n_epoch": "validation",
    "num_sanity_val_steps": "validation",
}


def make_trainer(
    device: torch.device, epochs: int, rows_per_batch: int, seed: int | None, options: dict[str, Any]
) -> lightning.Trainer:
    """A Trainer that writes nothing and says nothing.

    Arguments:
        device: where to train.
        epochs: how many are left.
        rows_per_batch: of the smallest batch; every process needs a row.
        seed: the user's; several processes cannot agree on a drawn one.
        options: further arguments of ``lightning.Trainer``, which win.

    Raises:
        TypeError: an option that the Trainer does not know, or that ``fit`` decides.
        ValueError: a device that is not there; a precision, strategy or number of processes that ``fit`` cannot serve.
    """
    _check_options(options)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {str(device)!r}, and torch sees no CUDA device; use device='auto' or 'cpu'.")
    arguments = {
        "max_epochs": epochs,
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": 1 if device.index is None or device.type == "cpu" else [device.index],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with _quiet():
        trainer = lightning.Trainer(**{**arguments, **options})
    _check_trainer(trainer)
    if trainer.world_size > rows_per_batch:
        raise ValueError(f"devices: {trainer.world_size} processes for batches of {rows_per_batch}; raise batch_size.")
    if trainer.world_size > 1 and seed is None:
        raise ValueError("seed: several processes must split and shuffle alike; give a seed.")
    return trainer


def run(trainer: lightning.Trainer, loop: TrainingLoop) -> str:
    """Train until the loop stops; returns why, for a loop that was stopped from outside."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    loop.model.train()
    try:
        with _quiet(), torch.enable_grad():
            trainer.fit(loop, train_dataloaders=list(range(loop.steps_per_epoch)))
    except KeyboardInterrupt:
        return "interrupted"
    except SystemExit as leaving:  # what Lightning makes of an interrupt, after switching further ones off
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
        return "interrupted"
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        loop.close()
    return "stopped by the Trainer"


def runs_elsewhere(trainer: lightning.Trainer) -> bool:
    """Whether training runs in processes that Lightning starts, whose memory this one never sees."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def _check_trainer(trainer: lightning.Trainer) -> None:
    if trainer.precision not in ("32-true", *HALF_PRECISIONS):
        raise ValueError(
            f"precision: got {trainer.precision!r}, which converts the model; mixed precision is "
            f"{' or '.join(map(repr, HALF_PRECISIONS))}, and a model after .double() trains in float64 as it is."
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"strategy: {type(trainer.strategy).__name__} splits the model; use a 'ddp' strategy, or model.loss in a "
            "loop of your own."
        )


def _check_options(options: dict[str, Any]) -> None:
    known = inspect.signature(lightning.Trainer).parameters
    for name in options:
        if name in OURS:
            raise TypeError(f"fit() takes {OURS[name]!r} where lightning.Trainer takes {name!r}.")
        if name not in known:
            raise TypeError(f"fit() got an unexpected argument {name!r}, which is no argument of lightning.Trainer.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's banners, tips and advice on data loaders switched off."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
