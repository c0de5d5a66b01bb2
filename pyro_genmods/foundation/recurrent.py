r"""Gated recurrent units as a causal network: what was seen is one vector, and a step costs the same at any place.

The state :math:`s_t` of a unit is a gated mean of the last state and a new proposal, given what place :math:`t` reads,

.. math:: r = \sigma(W_r h_t + U_r s_{t-1}), \qquad z = \sigma(W_z h_t + U_z s_{t-1}), \\
          n = \tanh\bigl(W_n h_t + r \odot U_n s_{t-1}\bigr), \qquad s_t = (1 - z) \odot n + z \odot s_{t-1},

with biases. Place :math:`t` reads the entry before it (``Entrance``), and its output is linear in the state of the last
layer. The cache is the states alone.

Reference:
    K. Cho et al., Learning phrase representations using RNN encoder-decoder for statistical machine translation, 2014,
    arXiv:1406.1078.
    J. Chung, C. Gulcehre, K. Cho, Y. Bengio, Empirical evaluation of gated recurrent neural networks on sequence
    modeling, 2014, arXiv:1412.3555.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .causal import Cache, CausalNetwork, transformed
from .transformer import Entrance

__all__ = ["GRU"]


class GRU(CausalNetwork):
    r"""Layers of gated recurrent units: :math:`\eta_t` from the entries before place :math:`t` and a context.

    Arguments:
        length, outputs, inputs, vocabulary, context_features: see ``CausalNetwork``.
        width: of the state.
        layers: number of units on top of each other.
        dropout: probability, between layers and of what the first layer reads.
        orders: whether the order varies between calls: each place then learns which variable the entry before it was,
            next to which one is to be predicted.

    Shapes:
        entries ``(rows, T, inputs)`` or tokens ``(rows, T)``, context ``(rows, context_features)``, order ``(T,)``;
        returns ``(rows, T, outputs)``.

    Raises:
        ValueError: what ``CausalNetwork`` refuses.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = GRU(3, outputs=2, inputs=1, width=8)
        >>> network.start_at([1.0, -1.0])
        True
        >>> x = torch.randn(5, 3, 1)
        >>> network(x)[0, 2].tolist()
        [1.0, -1.0]
        >>> cache = network.begin(5, None, like=x)
        >>> steps = [network.step(cache, entry) for entry in (None, *x[:, :2].unbind(1))]
        >>> torch.allclose(torch.stack(steps, 1), network(x)), [tuple(s.shape) for s in cache.rows]
        (True, [(5, 8)])
    """

    def __init__(
        self,
        length: int,
        outputs: int,
        *,
        inputs: int | None = None,
        vocabulary: int | None = None,
        context_features: int = 0,
        width: int = 128,
        layers: int = 1,
        dropout: float = 0.0,
        orders: bool = False,
    ) -> None:
        super().__init__(length, outputs, inputs=inputs, vocabulary=vocabulary, context_features=context_features)
        self.entrance = Entrance(self, width, orders=orders)
        self.dropout = nn.Dropout(dropout)
        self.units = nn.GRU(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, outputs)
        self.start_at([0.0] * outputs)

    def forward(self, entries: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        self.check(len(entries), context, order, entries)
        h = self.entrance(entries, context, order)
        # cuDNN differentiates in training mode only.
        plain = transformed() or (h.is_cuda and not self.training and torch.is_grad_enabled())
        for layer in range(self.units.num_layers):
            h = self._plain(self.dropout(h), layer) if plain else self._fused(self.dropout(h), layer)
        return self.head(h)

    def begin(self, rows: int, context: Tensor | None, like: Tensor, order: Tensor | None = None) -> Cache:
        self.check(rows, context, order)
        shape, layers = (rows, self.units.hidden_size), range(self.units.num_layers)
        states = [like.new_zeros(shape, dtype=self.floating(like)) for _ in layers]
        given, shared = self.entrance.begin(context, order)
        return Cache(0, states + given, shared)

    def step(self, cache: Cache, entry: Tensor | None) -> Tensor:
        self.check_step(cache, entry)
        h = self.entrance.step(cache, entry, len(cache.rows[0]))
        for layer in range(self.units.num_layers):
            w, u, b, c = self._weights(layer)
            state = cache.rows[layer]
            h = _cell(functional.linear(self.dropout(h), w, b), state, u, c)
            state.copy_(h)
        cache.position += 1
        return self.head(h)

    def start_at(self, bias: Sequence[float]) -> bool:
        with torch.no_grad():
            self.head.bias.copy_(torch.as_tensor(bias))
            self.head.weight.zero_()
        return True

    def _weights(self, layer: int) -> list[Tensor]:
        """By name, so that parameters swapped in by ``torch.func.functional_call`` are the ones used."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [getattr(self.units, f"{name}_l{layer}") for name in names]

    def _fused(self, h: Tensor, layer: int) -> Tensor:
        """One layer at all places by torch's kernel: 2.7 times as fast as the loop, backward included."""
        state = h.new_zeros(1, len(h), self.units.hidden_size)
        return torch.gru(h, state, self._weights(layer), True, 1, 0.0, False, False, True)[0]

    def _plain(self, h: Tensor, layer: int) -> Tensor:
        """The same by a loop over places: torch's kernel has no batching rule."""
        w, u, b, c = self._weights(layer)
        seen, state, states = functional.linear(h, w, b), h.new_zeros(len(h), self.units.hidden_size), []
        for t in range(self.length):
            state = _cell(seen[:, t], state, u, c)
            states.append(state)
        return torch.stack(states, 1)


def _cell(seen: Tensor, state: Tensor, u: Tensor, c: Tensor) -> Tensor:
    """The next state, from what the place reads ``W h`` and the last state, in the gates' order of ``torch.nn.GRU``."""
    r, z, n = seen.chunk(3, -1)
    ur, uz, un = functional.linear(state, u, c).chunk(3, -1)
    r, z = torch.sigmoid(r + ur), torch.sigmoid(z + uz)
    n = torch.tanh(n + r * un)
    return n + z * (state - n)
