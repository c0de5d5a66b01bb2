"""Arguments of an autoregressive model, checked, and turned into what the model needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..foundation.causal import Cache, CausalNetwork
from ..foundation.errors import ShapeError
from .conditionals import Categorical, Conditional
from .mixed import Mixed
from .sequences import Sequences

__all__ = ["GivenNetwork", "Offset", "event_shape_of", "orders_of", "support_of"]


class GivenNetwork(CausalNetwork):
    """A user's module, called as ``network(entries, context)``.

    Arguments:
        network: the module.
        sizes: as for :class:`~pyro_genmods.foundation.causal.CausalNetwork`.
    """

    def __init__(self, network: nn.Module, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.network = network

    def forward(self, entries: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        return self.network(entries, context)


class Offset(CausalNetwork):
    """A network whose parameters start somewhere else at every place: columns of different kinds share a last layer.

    Arguments:
        network: starts at zero.
        start: ``(T, outputs)``, where parameters start.
    """

    def __init__(self, network: CausalNetwork, start: Sequence[Sequence[float]]) -> None:
        sizes = {"inputs": network.inputs, "vocabulary": network.vocabulary}
        super().__init__(network.length, network.outputs, context_features=network.context_features, **sizes)
        self.network = network
        self.offset = nn.Parameter(torch.tensor(start))

    def forward(self, entries: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        return self.network(entries, context, order) + (self.offset if order is None else self.offset[order])

    def begin(self, rows: int, context: Tensor | None, like: Tensor, order: Tensor | None = None) -> Cache:
        cache = self.network.begin(rows, context, like, order)
        cache.shared = (*cache.shared, self.offset if order is None else self.offset[order])
        return cache

    def step(self, cache: Cache, entry: Tensor | None) -> Tensor:
        *shared, offset = cache.shared
        inner = Cache(cache.position, cache.rows, tuple(shared))
        theta = self.network.step(inner, entry) + offset[cache.position]
        cache.position = inner.position
        return theta


def event_shape_of(features: int | Sequence[int] | None, max_length: int | None, context_features: int = 0) -> Size:
    """Shape of an event.

    Raises:
        ShapeError: none or both are given, or a size is no positive integer.
        ValueError: the size of the context is negative.

    Example:
        >>> event_shape_of((28, 28), None), event_shape_of(None, 10)
        (torch.Size([28, 28]), torch.Size([10]))
    """
    if (features is None) == (max_length is None):
        raise ShapeError(
            f"features: got features={features} and max_length={max_length}; give one of them, the number of entries."
        )
    if context_features < 0:
        raise ValueError(f"context_features: got {context_features}, needs 0 for no context, or its width.")
    shape = features if max_length is None else max_length
    dims = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not dims or not all(isinstance(n, int) and n > 0 for n in dims):
        raise ShapeError(f"features: got {shape}, needs a positive number, or the shape of an event.")
    return Size(dims)


def support_of(
    conditional: Conditional,
    shape: Size,
    support: constraints.Constraint | None,
    eos: int | None,
    pad: int | None,
) -> tuple[constraints.Constraint, bool]:
    """Where events live, and whether the network works on that space itself, without units.

    Raises:
        TypeError: ``conditional`` is something else.
        ShapeError: columns and entries differ in number.
        ValueError: a support for discrete entries, or ``eos`` or ``pad`` that do not fit the vocabulary.
    """
    if not isinstance(conditional, Conditional):
        raise TypeError(f"conditional: got {type(conditional).__name__}, needs e.g. factorize.LogisticMixture(8).")
    if support is not None and conditional.discrete:
        raise ValueError(f"support: entries of {conditional} have one of their own; leave it out.")
    if isinstance(conditional, Mixed) and shape != (len(conditional.conditionals),):
        raise ShapeError(
            f"conditional: has {len(conditional.conditionals)} columns, the event has shape {tuple(shape)}; give one "
            "conditional for each entry of a vector."
        )
    if eos is not None:
        return _sequences(conditional, shape, eos, pad), True
    if pad is not None:
        raise ValueError("pad: is what follows eos; give eos, the token that ends a sequence, too.")
    if conditional.discrete:
        return conditional.support, True
    return support or constraints.real, False


def _sequences(conditional: Conditional, shape: Size, eos: int, pad: int | None) -> Sequences:
    if not isinstance(conditional, Categorical) or len(shape) != 1:
        raise ValueError(f"eos: is for vectors of Categorical tokens, got {conditional} of shape {tuple(shape)}.")
    tokens = conditional.vocabulary
    if not 0 <= eos < tokens:
        raise ValueError(f"eos: got {eos}, needs a token from 0 to {tokens - 1}.")
    if pad is not None and pad != eos and 0 <= pad < tokens:
        raise ValueError(f"pad: got {pad}, which is a token; take eos={eos} itself, or a number of {tokens} or more.")
    return Sequences(tokens, eos, eos if pad is None else pad)


def orders_of(order: Sequence[int] | Tensor | str | None, number: int, length: int) -> Tensor:
    """Orders ``(number, length)``: the given one first, the others random.

    Raises:
        ShapeError: ``order`` is no permutation.
        ValueError: ``number`` is below 1.

    Example:
        >>> orders_of([2, 0, 1], 1, 3)
        tensor([[2, 0, 1]])
    """
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"orders: got {number}, needs at least 1.")
    if order is None:
        first = torch.arange(length) if number == 1 else torch.randperm(length)
    elif isinstance(order, str):
        if order != "random":
            raise ValueError(f'order: got {order!r}, needs a permutation or "random".')
        first = torch.randperm(length)
    else:
        first = torch.as_tensor(order).flatten().cpu()
        if first.is_floating_point() or not torch.equal(first.sort().values, torch.arange(length)):
            raise ShapeError(f"order: got {first.tolist()[:16]}, needs a permutation of 0, ..., {length - 1}.")
    return torch.stack([first, *(torch.randperm(length) for _ in range(number - 1))])
