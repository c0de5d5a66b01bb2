"""Spaces of events: columns of different kinds, sequences of variable length, and everything that can happen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Columns", "Sequences", "alive", "all_sequences", "finish"]


class Columns(constraints.Constraint):
    """Rows whose columns have supports of their own.

    Arguments:
        supports: elementwise constraints, one for each column.

    Example:
        >>> columns = Columns((constraints.real, constraints.boolean))
        >>> columns.check(torch.tensor([[0.3, 1.0], [1.0, 0.3]])), columns.event_dim
        (tensor([ True, False]), 1)
    """

    event_dim = 1

    def __init__(self, supports: tuple[constraints.Constraint, ...]) -> None:
        self.supports = supports

    @property
    def is_discrete(self) -> bool:
        """Whether any column is discrete, and keeps gradients out."""
        return any(support.is_discrete for support in self.supports)

    def check(self, value: Tensor) -> Tensor:
        """Which rows ``(*, columns)`` lie inside."""
        columns = zip(self.supports, value.unbind(-1), strict=True)
        return torch.stack([support.check(column) for support, column in columns], -1).all(-1)

    def __repr__(self) -> str:
        return f"Columns({', '.join(map(repr, self.supports))})"


class Sequences(constraints.Constraint):
    """Rows of tokens that end with ``eos``, or with the row, and hold nothing but ``pad`` after it.

    Arguments:
        tokens: size of the vocabulary, ``eos`` included.
        eos: token that ends a sequence.
        pad: what follows it; ``eos`` itself, or a number outside the vocabulary.
        ended: the sequence may have ended before the row begins.

    Example:
        >>> Sequences(3, eos=0, pad=0).check(torch.tensor([[1, 2, 0, 0], [1, 0, 2, 0], [1, 2, 1, 3]]))
        tensor([ True, False, False])
    """

    is_discrete = True
    event_dim = 1

    def __init__(self, tokens: int, eos: int, pad: int, ended: bool = False) -> None:
        self.tokens, self.eos, self.pad, self.ended = tokens, eos, pad, ended

    def check(self, value: Tensor) -> Tensor:
        """Which rows ``(*, length)`` are well-formed."""
        is_token = (value >= 0) & (value < self.tokens) & (value % 1 == 0)
        inside = torch.where(alive(value, self.eos), is_token, value == self.pad).all(-1)
        return inside | (value == self.pad).all(-1) if self.ended else inside

    def __repr__(self) -> str:
        return f"Sequences(tokens={self.tokens}, eos={self.eos}, pad={self.pad})"


def alive(x: Tensor, eos: int) -> Tensor:
    """Which entries of rows ``(*, length)`` are part of the sequence, ``eos`` included.

    Example:
        >>> alive(torch.tensor([1, 0, 2, 0]), eos=0)
        tensor([ True,  True, False, False])
    """
    ended = (x == eos).to(torch.int64)
    return ended.cumsum(-1) == ended


def finish(x: Tensor, eos: int, pad: int) -> Tensor:
    """Put ``pad`` after the first ``eos`` of every row.

    Example:
        >>> finish(torch.tensor([1, 0, 2, 2]), eos=0, pad=-1)
        tensor([ 1,  0, -1, -1])
    """
    return torch.where(alive(x, eos), x, torch.full_like(x, pad))


def all_sequences(levels: list[int], support: constraints.Constraint, place: Tensor) -> Tensor:
    """Every row that lies in a support, ``(number, length)``.

    Arguments:
        levels: number of values of each entry, which are ``0, 1, ...``.
        support: of a row.
        place: tells dtype and device.

    Example:
        >>> all_sequences([2, 2], Sequences(2, eos=0, pad=0), torch.zeros(()))
        tensor([[0., 0.],
                [1., 0.],
                [1., 1.]])
    """
    columns = [torch.arange(k, dtype=place.dtype, device=place.device) for k in levels]
    rows = torch.cartesian_prod(*columns).reshape(-1, len(levels))
    if isinstance(support, Sequences):
        rows = finish(rows, support.eos, support.pad).unique(dim=0)
    return rows
