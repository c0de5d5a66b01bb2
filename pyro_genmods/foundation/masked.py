r"""Masked networks: all conditionals of an autoregressive law in one pass of a perceptron.

A hidden unit of degree :math:`m` sees the entries at places :math:`< m` of the order and the context, and the
parameters of place :math:`t` see units of degree :math:`\le t`. With :math:`e` the embedded entries,

.. math::
    h^1 = a(M^1 \odot W^1 e + U c + b^1), \qquad h^{l+1} = h^l + a(M^l \odot W^l h^l + b^l), \qquad
    \theta_t = (M^o \odot W^o_t) h^L + (M^s \odot S_t) e + V_t c + b_t .

Degrees rise along the hidden layer, :math:`m_j = \lfloor j T / H \rfloor`, so that the units which place :math:`t` adds
are one slice. Sampling computes each slice once: all :math:`T` steps together cost one pass.

Weights belong to variables, masks to places. An order permutes the variables, so one set of weights serves any number
of orders.

Reference:
    M. Germain, K. Gregor, I. Murray, H. Larochelle, MADE: Masked Autoencoder for Distribution Estimation, 2015,
    arXiv:1502.03509.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from .causal import Cache, CausalNetwork

__all__ = ["MADE"]


class _Weights(NamedTuple):
    """The weights of one order, masked; places instead of variables."""

    first: Tensor
    hidden: tuple[Tensor, ...]
    output: Tensor
    skip: Tensor | None
    bias: Tensor


class MADE(CausalNetwork):
    """A masked residual perceptron.

    Arguments:
        length: number of entries ``T``.
        outputs: parameters per entry.
        inputs: width of an embedded entry.
        context_features: width of the context.
        width: units of a hidden layer.
        layers: number of hidden layers; 0 leaves the direct connections, a generalised linear model of each entry.
        dropout: probability that a hidden unit's addition is dropped in training.
        skip: connect entries to outputs directly; ``None`` does so up to four million weights.

    Shape:
        entries ``(rows, T, inputs)``, context ``(rows, context_features)``, result ``(rows, T, outputs)``.

    Example:
        >>> network = MADE(3, outputs=2)
        >>> entries = torch.randn(5, 3, 1)
        >>> changed = entries.clone()
        >>> changed[:, 1:] = 7.0
        >>> network(entries).shape, torch.equal(network(entries)[:, :2], network(changed)[:, :2])
        (torch.Size([5, 3, 2]), True)
    """

    MOST_SKIPS = 2**22

    def __init__(
        self,
        length: int,
        outputs: int,
        inputs: int = 1,
        *,
        context_features: int = 0,
        width: int = 256,
        layers: int = 2,
        dropout: float = 0.0,
        skip: bool | None = None,
    ) -> None:
        super().__init__(length, outputs, inputs=inputs, context_features=context_features)
        if layers < 0 or width < 1 or (layers == 0 and skip is False):
            raise ValueError(f"layers={layers}, width={width}: give at least 0 (with skips) and at least 1.")
        width = width if layers else 0
        self.width, self.layers = width, layers
        degrees = torch.arange(width) * length // max(width, 1)
        places = torch.arange(length)
        self.first = nn.Parameter(_uniform((width, length, inputs), length * inputs))
        self.first_bias = nn.Parameter(torch.zeros(width))
        self.hidden = nn.ParameterList(_uniform((width, width), width) for _ in range(layers - 1))
        self.hidden_bias = nn.ParameterList(torch.zeros(width) for _ in range(layers - 1))
        self.output = nn.Parameter(_uniform((length, outputs, width), width))
        self.bias = nn.Parameter(torch.zeros(length, outputs))
        if skip is None:
            skip = layers == 0 or length**2 * outputs * inputs <= self.MOST_SKIPS
        self.skip = nn.Parameter(torch.zeros(length, outputs, length, inputs)) if skip and length > 1 else None
        if context_features:
            self.context = nn.Parameter(_uniform((width, context_features), context_features))
            self.context_output = nn.Parameter(_uniform((length, outputs, context_features), context_features))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("first_mask", (places < degrees[:, None])[..., None], persistent=False)
        self.register_buffer("hidden_mask", degrees <= degrees[:, None], persistent=False)
        self.register_buffer("output_mask", (degrees <= places[:, None])[:, None], persistent=False)
        self.register_buffer("skip_mask", (places < places[:, None])[:, None, :, None], persistent=False)
        self.ends = [0, *(math.ceil((t + 1) * width / length) for t in range(length))]

    def start_at(self, bias: Sequence[float] | Sequence[Sequence[float]]) -> bool:
        with torch.no_grad():
            self.bias.copy_(torch.as_tensor(bias, dtype=self.bias.dtype).expand_as(self.bias))
            self.output.mul_(0.01)
            if self.skip is not None:
                self.skip.zero_()
            if self.context_features:
                self.context_output.mul_(0.01)
        return True

    def _weights(self, order: Tensor | None) -> _Weights:
        first, output, skip, bias = self._ordered(order)
        return _Weights(
            (first * self.first_mask).flatten(1),
            tuple(weight * self.hidden_mask for weight in self.hidden),
            output * self.output_mask,
            None if skip is None else (skip * self.skip_mask).flatten(2),
            bias,
        )

    def _ordered(self, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Outer weights by place instead of variable."""
        if order is None:
            return self.first, self.output, self.skip, self.bias
        skip = None if self.skip is None else self.skip[order][:, :, order]
        return self.first[:, order], self.output[order], skip, self.bias[order]

    def _context_parts(self, context: Tensor | None, order: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What a context adds to the first layer and to the parameters of each place."""
        if context is None:
            return None, None
        weight = self.context_output if order is None else self.context_output[order]
        return linear(context, self.context), linear(context, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])

    def forward(self, entries: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        weights = self._weights(order)
        self.check(len(entries), context, order, entries)
        to_first, to_output = self._context_parts(context, order)
        entries = entries.flatten(1)
        h = linear(entries, weights.first, self.first_bias)
        h = self.dropout(silu(h if to_first is None else h + to_first))
        for weight, bias in zip(weights.hidden, self.hidden_bias, strict=True):
            h = h + self.dropout(silu(linear(h, weight, bias)))
        result = linear(h, weights.output.flatten(0, 1), weights.bias.flatten())
        if weights.skip is not None:
            result = result + linear(entries, weights.skip.flatten(0, 1))
        result = result.unflatten(-1, (self.length, self.outputs))
        return result if to_output is None else result + to_output

    # -- one place at a time -------------------------------------------------------------------------------------
    #
    # The last hidden layer, reversed, and the entries lie side by side in one buffer: [h_H ... h_1 | e_1 ... e_T]. Both
    # grow away from the border between them, so that all that a place sees is one slice, and its parameters one
    # product. Slices take the part of the masks.

    def begin(self, rows: int, context: Tensor | None, like: Tensor, order: Tensor | None = None) -> Cache:
        self.check(rows, context, order)
        first, output, skip, bias = self._ordered(order)
        outer = output.flip(-1) if skip is None else torch.cat([output.flip(-1), skip.flatten(2)], -1)
        hidden = [
            (weight.flip(0, 1), offset.flip(0)) for weight, offset in zip(self.hidden, self.hidden_bias, strict=True)
        ]
        to_first, to_output = self._context_parts(context, order)
        buffers = [like.new_zeros(rows, self.width + self.length * self.inputs)]
        buffers += [like.new_zeros(rows, self.width) for _ in hidden]
        if to_first is not None and to_output is not None:
            buffers += [to_first.flip(1), to_output]
        return Cache(0, buffers, (first.flatten(1).flip(0), self.first_bias.flip(0), hidden, outer, bias))

    def step(self, cache: Cache, entry: Tensor | None) -> Tensor:
        self.check_step(cache, entry)
        first, first_bias, hidden, outer, bias = cache.shared
        seen, *inner = cache.rows
        to_first, to_output = inner[len(hidden) :] or (None, None)
        t, border = cache.position, self.width
        near, far, last = border - self.ends[t + 1], border - self.ends[t], border + t * self.inputs
        if entry is not None:
            seen[:, last - self.inputs : last] = entry
        if near < far:
            new = linear(seen[:, border:last], first[near:far, : last - border], first_bias[near:far])
            new = silu(new if to_first is None else new + to_first[:, near:far])
            for h, (weight, offset) in zip(inner, hidden, strict=False):
                h[:, near:far] = new
                new = new + silu(linear(h[:, near:], weight[near:far, near:], offset[near:far]))
            seen[:, near:far] = new
        last = min(last, outer.shape[-1])  # no further than the hidden units, where there are no skips
        result = linear(seen[:, near:last], outer[t, :, near:last], bias[t])
        cache.position = t + 1
        return result if to_output is None else result + to_output[:, t]


def _uniform(shape: tuple[int, ...], inputs: int) -> Tensor:
    """Torch's initial weights of a linear layer."""
    bound = 1 / math.sqrt(max(inputs, 1))
    return torch.empty(shape).uniform_(-bound, bound)
