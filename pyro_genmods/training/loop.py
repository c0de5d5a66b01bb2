"""One loop for all mechanisms: the steps of a training run as a Lightning module.

Lightning brings devices, precision and processes; what is learned, measured and kept is decided here. The examples live
on the device, a batch is an index into the epoch's shuffle, validation is a few large batches without graph, and a step
waits for the device once, to learn whether its loss and gradient are finite. Until that is known no weight is touched.

This module and :mod:`pyro_genmods.training.trainer` are the only ones that import Lightning, and
:func:`pyro_genmods.fit` imports them only when it trains: that import takes seconds.
"""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..contract import GenerativeModel
from ..foundation.errors import ShapeError
from .data import Examples, derive_seed, epoch_batches
from .state import Checkpoint, Settings, TrainingState, trainable

__all__ = ["TrainingLoop"]

VALIDATION_NUMBERS = 2**18


class TrainingLoop(lightning.LightningModule):
    """A training run: what Lightning calls at the start, at every step and at the end of every epoch.

    Arguments:
        model: learns.
        train: examples to learn from.
        validation: examples to decide by, or ``None`` to decide by the training loss.
        settings: the numbers of the run.
        state: where the run stands; it goes on from there.
        checkpoint: keeps the state after every epoch, or ``None``.
        progress_bar: show a bar.
    """

    def __init__(
        self,
        model: GenerativeModel,
        train: Examples,
        validation: Examples | None,
        settings: Settings,
        state: TrainingState,
        checkpoint: Checkpoint | None,
        *,
        progress_bar: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.train_examples, self.validation_examples = train, validation
        self.settings, self.state, self.checkpoint = settings, state, checkpoint
        self.show, self.bar = progress_bar, None
        self.batches: tuple[Tensor, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the name of every hook it calls, 25 times a step; spare that the search for submodules."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- the run -------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The present epoch, counted from 1 over all the runs that made up this one."""
        return self.state.history.epochs + 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        return -(-len(self.train_examples) // self.settings.batch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, fused unless a loss scaler must see the gradients first."""
        fused = self.device.type in ("cpu", "cuda") and getattr(self.trainer.precision_plugin, "scaler", None) is None
        self.parameters_by_name = trainable(self.model)
        optimizer = torch.optim.AdamW(
            self.parameters_by_name.values(),
            lr=self.settings.learning_rate,
            betas=self.model.betas,
            weight_decay=self.settings.weight_decay,
            fused=fused,
        )
        if self.state.optimizer:
            self.state.give_optimizer(optimizer)
        return optimizer

    def on_train_start(self) -> None:
        self.train_examples = self._placed(self.train_examples)
        if self.validation_examples is not None:
            self.validation_examples = self._placed(self.validation_examples)
        self.state.to(self.device)
        if self.state.scaler:
            self.trainer.precision_plugin.load_state_dict(self.state.scaler)
        self.bar = tqdm(
            total=self.settings.max_epochs * self.steps_per_epoch,
            initial=self.state.history.epochs * self.steps_per_epoch,
            disable=not (self.show and self.trainer.is_global_zero),
            unit="step",
            bar_format="{desc} |{bar:8}| {elapsed}<{remaining}{postfix}",
        )

    def on_train_end(self) -> None:
        self.bar.close()
        if self.state.finished:
            self._save()

    def close(self) -> None:
        """Let go of the bar and the examples; loop and Trainer hold on to each other until garbage is collected."""
        if self.bar is not None:
            self.bar.close()
        self.train_examples = self.validation_examples = None
        self.batches = ()

    def _placed(self, examples: Examples) -> Examples:
        """The examples on the device, if they leave half of its memory free; else batch by batch."""
        if self.device.type == "cuda" and examples.nbytes > torch.cuda.mem_get_info(self.device)[0] / 2:
            return examples
        return examples.to(self.device)

    def _save(self) -> None:
        if self.checkpoint is not None and self.trainer.is_global_zero:
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.state.take_optimizer(optimizer, self.trainer.precision_plugin.state_dict())
            self.checkpoint.save(self.state, self.model)

    # -- a step --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        seed, examples = self.state.history.seed, self.train_examples
        batches = epoch_batches(len(examples), self.settings.batch_size, seed, self.epoch, examples.device)
        self.batches = tuple(batch[self.global_rank :: self.trainer.world_size] for batch in batches)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.total, self.seen = torch.zeros((), dtype=dtype, device=self.device), 0
        self.started, self.rate = time.perf_counter(), 0.0
        self._seed(derive_seed(seed, "noise", self.epoch, self.global_rank))
        self.bar.set_description_str(f"epoch {self.epoch}/{self.settings.max_epochs}", refresh=False)

    def training_step(self, batch: int) -> Tensor:
        """Mean loss of a batch, given by its place in the epoch."""
        rows = self.train_examples[self.batches[batch]]
        loss = self._losses(rows).mean()
        self.total, self.seen = self.total + len(rows) * loss.detach(), self.seen + len(rows)
        self.bar.update()
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.rate = self.settings.rate((self.epoch - 1 + batch_idx / self.steps_per_epoch) / self.settings.max_epochs)
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self.state.history.stopped:
            self.state.update_average(self.parameters_by_name, self.settings.ema)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Bound the gradient's norm; if it or the loss is not finite, take the gradients away and stop."""
        parameters = [p for p in self.parameters_by_name.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        check = norm + self.total
        if self.trainer.world_size > 1:  # every process must come to the same decision
            check = self.trainer.strategy.reduce(check, reduce_op="sum")
        if not bool(check.isfinite()):
            self._refuse_step(optimizer)
        elif self.settings.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.gradient_clip, norm)

    def _refuse_step(self, optimizer: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and bool(self.total.isfinite()) and scaler.get_scale() > 1:
            return  # half precision overflowed under too large a scale: the scaler skips the step and lowers it
        optimizer.zero_grad(set_to_none=True)
        what = "gradient" if bool(self.total.isfinite()) else "loss"
        self._stop(f"non-finite {what} at epoch {self.epoch}, step {self.state.steps + 1}")

    def _losses(self, rows: Examples) -> Tensor:
        rows = rows.to(self.device)
        losses = self.model.loss(rows.x, rows.context)
        if losses.shape != (len(rows),):
            raise ShapeError(
                f"model.loss: {type(self.model).__name__} returned shape {tuple(losses.shape)} for {len(rows)} "
                "examples; it must return one loss per example, shape (batch,)."
            )
        return losses

    # -- an epoch ------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        if self.state.history.stopped:
            return
        state, history = self.state, self.state.history
        train_loss = self._mean(self.total, self.seen)
        with state.averaged(self.parameters_by_name):
            validation_loss = None if self.validation_examples is None else self._validate()
            if history.record(train_loss, validation_loss, self.rate, time.perf_counter() - self.started):
                state.keep_best(self.model)
        patience = self.settings.patience
        if history.epochs >= self.settings.max_epochs:
            self._stop(f"max_epochs={self.settings.max_epochs} reached")
        elif patience is not None and history.epochs - history.best_epoch >= patience:
            self._stop(f"no improvement in {patience} epochs")
        self._show_losses()
        if not state.finished:
            self._save()

    def _stop(self, reason: str) -> None:
        self.state.history.stopped, self.state.finished = reason, True
        self.trainer.should_stop = True

    def _validate(self) -> float:
        """Mean validation loss per dimension; the same noise at every epoch, so that epochs can be compared."""
        self._seed(derive_seed(self.state.history.seed, "validation", self.global_rank))
        rows = self.validation_examples[self.global_rank :: self.trainer.world_size]
        size = max(self.settings.batch_size, VALIDATION_NUMBERS // self.model.features)
        total = torch.zeros_like(self.total)
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(rows), size):
                total += self._losses(rows[start : start + size]).sum()
        self.model.train()
        return self._mean(total, len(rows))

    def _mean(self, total: Tensor, rows: int) -> float:
        sums = torch.stack([total, torch.full_like(total, rows)])
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return float(sums[0] / sums[1]) / self.model.features

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _show_losses(self) -> None:
        history = self.state.history
        losses = f"train {history.train_loss[-1]:.4f}"
        if history.validation_loss:
            losses += f" validation {history.validation_loss[-1]:.4f}"
        best = f"best {history.best_loss:.4f} ({history.best_epoch}) {history.unit}/dim"
        self.bar.set_postfix_str(f"{losses} {best} lr {self.rate:.1e}")
