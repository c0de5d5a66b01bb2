r"""What a training run did: one row of numbers per epoch, and why it ended.

Losses are means over examples divided by the number of features, in nats per dimension (or in the unit that the model
names, see ``loss_unit``), so that runs on data of different sizes can be compared:

.. math:: L_e = \frac{1}{n D} \sum_{i=1}^{n} \ell_\phi(x_i, c_i) ,

with :math:`\ell` the model's own ``loss`` and :math:`D` its ``features``. For a mechanism trained by maximum likelihood
this is the negative log-likelihood in the user's units, whose infimum is the entropy of the data over :math:`D`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["TrainingHistory"]


@dataclass
class TrainingHistory:
    """What :func:`pyro_genmods.fit` returns: the course of a training run.

    Attributes:
        train_loss: mean over the examples as they were visited during each epoch, in ``unit`` per dimension.
        validation_loss: the same on the validation examples at the end of each epoch (under the averaged weights, with
            ``ema``); empty without validation.
        learning_rate: of the last step of each epoch.
        seconds: duration of each epoch.
        best_epoch: the epoch, counted from 1, whose weights the model has now; 0 if no epoch improved on the start.
        best_loss: validation loss of that epoch (training loss, without validation).
        stopped: why the run ended.
        resumed: the epochs after which an interrupted run was taken up again.
        seed: what the split, the shuffling and the noise of the objective were made of.
        last: whether the last epoch counts as the best, because the loss cannot tell which one is.
        unit: of the losses: ``"nats"``, or the model's ``loss_unit``.

    Example:
        >>> history = TrainingHistory([1.5, 1.2], [1.4, 1.3], [1e-3, 5e-4], [0.5, 0.5], 2, 1.3, "max_epochs=2 reached")
        >>> history
        TrainingHistory(2 epochs in 1.0 s, best 1.3000 nats/dim at epoch 2, stopped: max_epochs=2 reached)
        >>> history.to_dict()["validation_loss"]
        [1.4, 1.3]
    """

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    stopped: str = ""
    resumed: list[int] = field(default_factory=list)
    seed: int = 0
    unit: str = "nats"
    last: bool = False

    @property
    def epochs(self) -> int:
        """Number of completed epochs."""
        return len(self.train_loss)

    @property
    def monitored(self) -> list[float]:
        """The losses that decide which epoch is best: validation if there is one, else training."""
        return self.validation_loss or self.train_loss

    def record(self, train_loss: float, validation_loss: float | None, learning_rate: float, seconds: float) -> bool:
        """Append an epoch; returns whether it is the best so far."""
        self.train_loss.append(train_loss)
        if validation_loss is not None:
            self.validation_loss.append(validation_loss)
        self.learning_rate.append(learning_rate)
        self.seconds.append(seconds)
        improved = self.last or self.monitored[-1] < self.best_loss
        if improved:
            self.best_epoch, self.best_loss = self.epochs, self.monitored[-1]
        return improved

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON or a data frame."""
        return asdict(self)

    def to_tensors(self) -> dict[str, Tensor]:
        """The series as double-precision tensors, which keep every bit and every infinity."""
        names = ("train_loss", "validation_loss", "learning_rate", "seconds")
        return {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in names}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> TrainingHistory:
        """The inverse of :meth:`to_tensors`; ``facts`` are the remaining fields."""
        history = cls(**{name: series.tolist() for name, series in tensors.items()}, **facts)
        if history.best_epoch:
            history.best_loss = history.monitored[history.best_epoch - 1]
        return history

    def plot(self, ax: Any = None) -> Any:
        """Draw the losses against the epochs, with the best epoch marked.

        Arguments:
            ax: a matplotlib ``Axes``; default a new figure.

        Returns:
            The ``Axes``. The vertical range leaves out the plunge of the first epochs where it would flatten the rest.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        epochs = range(1, self.epochs + 1)
        ax.plot(epochs, self.train_loss, color="0.6", label="training")
        if self.validation_loss:
            ax.plot(epochs, self.validation_loss, color="C0", label="validation")
        if self.best_epoch:
            label = f"{'last' if self.last else 'best'}: {self.best_loss:.4g} at epoch {self.best_epoch}"
            ax.axvline(self.best_epoch, color="C3", linewidth=0.8, linestyle="--")
            ax.plot(self.best_epoch, self.best_loss, "o", color="C3", label=label)
        limits = _vertical_range(self.train_loss, self.validation_loss)
        if limits is not None:
            ax.set_ylim(*limits)
        ax.set_xlabel("epoch")
        ax.set_ylabel(f"loss ({self.unit} per dimension)")
        ax.set_title(f"stopped: {self.stopped}", fontsize="medium")
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        best = "no best epoch"
        if self.best_epoch:
            kept = "last" if self.last else "best"
            best = f"{kept} {self.best_loss:.4f} {self.unit}/dim at epoch {self.best_epoch}"
        resumed = f", resumed after epoch {', '.join(map(str, self.resumed))}" if self.resumed else ""
        return (
            f"TrainingHistory({self.epochs} epochs in {sum(self.seconds):.1f} s, {best}, "
            f"stopped: {self.stopped or 'not yet'}{resumed})"
        )


def _vertical_range(*series: list[float]) -> tuple[float, float] | None:
    """From the lowest loss to the highest after the first tenth of the epochs, with a margin."""
    finite = [loss for losses in series for loss in losses if math.isfinite(loss)]
    settled = [loss for losses in series for loss in losses[len(losses) // 10 :] if math.isfinite(loss)]
    if not settled or max(settled) == min(finite):
        return None
    low, high = min(finite), max(settled)
    return low - 0.05 * (high - low), high + 0.15 * (high - low)
