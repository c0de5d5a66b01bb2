r"""Examples to learn from: checked once, split once, and shuffled as a pure function of the seed.

Every random choice of a training run is made by a generator of its own, seeded by a hash of the run's seed and of what
the choice is for,

.. math:: s_{\text{purpose}} = h(s, \text{purpose}, e) ,

with :math:`e` the epoch. Nothing is carried from one epoch to the next, so a run that is taken up again after epoch
:math:`e` visits the examples in the order in which the uninterrupted run would have visited them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contract import GenerativeModel
from ..foundation.errors import DataError, ShapeError, SupportError

__all__ = ["Examples", "check_examples", "derive_seed", "epoch_batches", "split"]

FEWEST = 2


@dataclass(frozen=True)
class Examples:
    """Rows of data and, for a conditional model, of contexts.

    Attributes:
        x: ``(rows, *event_shape)``.
        context: ``(rows, *context_shape)`` or ``None``.
    """

    x: Tensor
    context: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(self.x[rows], None if self.context is None else self.context[rows])

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.x.device

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return self.x.nbytes + (0 if self.context is None else self.context.nbytes)

    def to(self, device: torch.device) -> Examples:
        """The same rows on a device."""
        return Examples(self.x.to(device), None if self.context is None else self.context.to(device))

    def describe(self) -> str:
        """Shape, dtype and a hash of the values; a checkpoint remembers it."""
        code = hashlib.sha256()
        for tensor in (self.x, self.context):
            if tensor is not None:
                code.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        shapes = [str(tuple(tensor.shape)) for tensor in (self.x, self.context) if tensor is not None]
        return f"{' with contexts '.join(shapes)} of {self.x.dtype}, digest {code.hexdigest()[:12]}"


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose; different purposes and neighbouring seeds have unrelated streams.

    Example:
        >>> derive_seed(0, "shuffle", 1) == derive_seed(0, "shuffle", 1) != derive_seed(0, "shuffle", 2)
        True
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Put a random ``fraction`` of the examples, at least one, aside for validation: ``(training, validation)``.

    Raises:
        DataError: fewer than two examples would be left to learn from.
    """
    held_out = max(1, round(fraction * len(examples)))
    if len(examples) - held_out < FEWEST:
        raise DataError(
            f"data: {len(examples)} rows are too few to put {held_out} aside for validation; give more rows, or "
            "validation=0."
        )
    order = _permutation(len(examples), derive_seed(seed, "split")).to(examples.device)
    return examples[order[held_out:]], examples[order[:held_out]]


def epoch_batches(
    rows: int, batch_size: int, seed: int, epoch: int, device: torch.device | None = None
) -> tuple[Tensor, ...]:
    """Row numbers of the batches of an epoch: a fresh shuffle, in parts whose sizes differ by at most one.

    Example:
        >>> [len(batch) for batch in epoch_batches(10, 4, seed=0, epoch=1)]
        [4, 3, 3]
    """
    order = _permutation(rows, derive_seed(seed, "shuffle", epoch)).to(device)
    return order.tensor_split(-(-rows // batch_size))


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def check_examples(model: GenerativeModel, data: Any, context: Any, name: str = "data") -> Examples:
    """Cast data and context to the model's dtype and refuse what no density can be learned from.

    Arguments:
        model: tells event shape, context shape, support and dtype.
        data: ``(rows, *event_shape)``, a tensor or whatever numpy makes an array of.
        context: ``(rows, *context_shape)`` or ``None``.
        name: of the argument, for the messages.

    Raises:
        ShapeError: wrong event or context shape, missing or superfluous context, different numbers of rows.
        DataError: NaN or infinite values, with row and column; fewer than two rows.
        SupportError: values outside the model's support, with the row.
    """
    context_name = "context" if name == "data" else f"the context of {name}"
    if (context is not None) != bool(model.context_shape):
        needs = f"contexts of shape {tuple(model.context_shape)}" if model.context_shape else "no context"
        raise ShapeError(f"{context_name}: {type(model).__name__} needs {needs}, got {_shape_of(context)}.")
    x = _as_rows(model, data, model.event_shape, name)
    if context is None:
        c = None
    else:
        c = _as_rows(model, context, model.context_shape, context_name)
        if len(c) != len(x):
            raise ShapeError(f"{context_name}: {len(c)} rows for the {len(x)} rows of {name}; give one per row.")
    if name == "data" and len(x) < FEWEST:
        raise DataError(f"data: got {len(x)} row(s), needs at least {FEWEST}.")
    _check_support(model, x, name)
    return Examples(x, c)


def _as_rows(model: GenerativeModel, values: Any, shape: Sequence[int], name: str) -> Tensor:
    dtype, _ = model.place
    rows = (values.detach() if isinstance(values, Tensor) else _from_numpy(values, dtype, name)).to(dtype)
    if rows.dim() != 1 + len(shape) or tuple(rows.shape[1:]) != tuple(shape):
        dims = ", ".join(map(str, shape))
        hint = f"; add the column with {name}[:, None]" if tuple(shape) == (1,) and rows.dim() == 1 else ""
        raise ShapeError(f"{name}: got shape {tuple(rows.shape)}, {type(model).__name__} needs (rows, {dims}){hint}.")
    _check_finite(rows, name)
    return rows


def _from_numpy(values: Any, dtype: torch.dtype, name: str) -> Tensor:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name}: got an array of {array.dtype}, needs real numbers; encode the other columns first.")
    return torch.from_numpy(np.require(array, np.float64 if dtype == torch.float64 else np.float32, ["C", "W"]))


def _check_finite(rows: Tensor, name: str) -> None:
    bad = ~rows.isfinite()
    if not bool(bad.any()):
        return
    first, *column = bad.nonzero()[0].tolist()
    value = rows[(first, *column)].item()
    where = column[0] if len(column) == 1 else tuple(column)
    raise DataError(
        f"{name}: {value} at row {first}, column {where} (counted from 0), and {int(bad.sum()) - 1} more in "
        f"{int(bad.flatten(1).any(1).sum())} row(s) in all; drop or impute these rows."
    )


def _check_support(model: GenerativeModel, x: Tensor, name: str) -> None:
    outside = ~model.support.check(x)
    if not bool(outside.any()):
        return
    first = int(outside.nonzero()[0])
    raise SupportError(
        f"{name}: row {first} lies outside the support {model.support} of {type(model).__name__} "
        f"({x[first].flatten()[:8].tolist()}), and {int(outside.sum()) - 1} more row(s); correct the data, or build "
        "the model with the support that they have."
    )


def _shape_of(values: Any) -> str:
    return "none" if values is None else f"one of shape {tuple(np.shape(values))}"
