r"""The transformer of GPT-2 as a causal network.

The places' vectors :math:`h \in \mathbb R^{T \times w}` pass through blocks that each add what attention collects from
the places so far, then what a two-layer network makes of the sum,

.. math:: h \leftarrow h + \operatorname{Attention}(\operatorname{LN} h), \qquad
          h \leftarrow h + W_2 \operatorname{gelu}(W_1 \operatorname{LN} h), \qquad
          \operatorname{Attention}(h)_t = W_o \sum_{s \le t} \operatorname{softmax}_s
          \Bigl(\frac{q_t \cdot k_s}{\sqrt d}\Bigr) v_s,

with queries, keys and values linear in :math:`h` and cut into heads of width :math:`d`. Place :math:`t` reads the entry
before it (``Entrance``), so that attention up to and including :math:`t` sees no entry from :math:`t` on. A step of
sampling computes the last place alone and reads the earlier places' keys and values from its cache: all :math:`T` steps
cost one pass.

Reference:
    A. Vaswani et al., Attention is all you need, 2017, arXiv:1706.03762.
    A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever, Language models are unsupervised multitask learners,
    OpenAI 2019 (GPT-2: pre-normalisation, tanh form of the GELU, initialisation).
    A. Pannatier, E. Courdier, F. Fleuret, sigma-GPTs: a new approach to autoregressive models, 2024, arXiv:2404.09562
    (two embeddings of places for any order).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .causal import Cache, CausalNetwork, transformed

__all__ = ["Entrance", "Transformer"]


class Transformer(CausalNetwork):
    r"""GPT-2's transformer: :math:`\eta_t` from the entries before place :math:`t` and a context.

    Arguments:
        length, outputs, inputs, vocabulary, context_features: see ``CausalNetwork``.
        width: of the places' vectors; a multiple of ``heads``.
        layers: number of blocks.
        heads: of the attention.
        expansion: width of a block's hidden layer, in units of ``width``.
        dropout: probability, as in GPT-2: of the places' vectors, the attention and what each block adds.
        orders: whether the order varies between calls: each place then learns which variable the entry before it was,
            next to which one is to be predicted.
        tied: whether the last layer is the tokens' embedding.
        bias: whether the last layer has a bias.

    Shapes:
        entries ``(rows, T, inputs)`` or tokens ``(rows, T)``, context ``(rows, context_features)``, order ``(T,)``;
        returns ``(rows, T, outputs)``.

    Raises:
        ValueError: ``width`` is no multiple of ``heads``, a tied layer without a vocabulary as large as the output, or
            what ``CausalNetwork`` refuses.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = Transformer(4, outputs=5, vocabulary=5, width=8, layers=1, heads=2, context_features=1)
        >>> network.start_at([0.5, 0.0, 0.0, 0.0, 0.0])
        True
        >>> x, c = torch.tensor([[3, 0, 4, 1]]), torch.ones(1, 1)
        >>> network(x, c)[0, 0].tolist()
        [0.5, 0.0, 0.0, 0.0, 0.0]
        >>> cache = network.begin(1, c, like=c)
        >>> steps = [network.step(cache, entry) for entry in (None, *x[:, :3].unbind(1))]
        >>> torch.allclose(torch.stack(steps, 1), network(x, c))
        True
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
        layers: int = 4,
        heads: int = 4,
        expansion: int = 4,
        dropout: float = 0.0,
        orders: bool = False,
        tied: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(length, outputs, inputs=inputs, vocabulary=vocabulary, context_features=context_features)
        if width % heads:
            raise ValueError(f"width={width}: give a multiple of heads={heads}")
        if tied and vocabulary != outputs:
            raise ValueError(f"tied=True: needs vocabulary == outputs, got {vocabulary} and {outputs}")
        self.heads, self.tied = heads, tied
        self.entrance = Entrance(self, width, orders=orders, scale=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, expansion * width, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs, bias=bias)
        _initialise(self.blocks, layers)
        nn.init.zeros_(self.head.weight)
        if bias:
            nn.init.zeros_(self.head.bias)
        if tied:
            self.head.weight = self.entrance.tokens.weight

    def forward(self, entries: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        self.check(len(entries), context, order, entries)
        # Fused attention has no second derivative, which values of latent variables may need.
        fused = not (transformed() or entries.requires_grad or (context is not None and context.requires_grad))
        h = self.dropout(self.entrance(entries, context, order))
        for block in self.blocks:
            h = block(h, fused)
        return self.head(self.norm(h))

    def begin(self, rows: int, context: Tensor | None, like: Tensor, order: Tensor | None = None) -> Cache:
        self.check(rows, context, order)
        shape = (rows, self.heads, self.length, self.norm.normalized_shape[0] // self.heads)
        buffers = [like.new_zeros(shape, dtype=self.floating(like)) for _ in range(2 * len(self.blocks))]
        given, shared = self.entrance.begin(context, order)
        return Cache(0, buffers + given, shared)

    def step(self, cache: Cache, entry: Tensor | None) -> Tensor:
        self.check_step(cache, entry)
        h = self.dropout(self.entrance.step(cache, entry, len(cache.rows[0])))
        for i, block in enumerate(self.blocks):
            h = block.step(h, cache.rows[2 * i], cache.rows[2 * i + 1], cache.position)
        cache.position += 1
        return self.head(self.norm(h))

    def start_at(self, bias: Sequence[float]) -> bool:
        if self.head.bias is None:
            return False
        with torch.no_grad():
            self.head.bias.copy_(torch.as_tensor(bias))
            if not self.tied:
                self.head.weight.zero_()
        return True


class Entrance(nn.Module):
    r"""What each place reads: the entry before it, its own place, and the context, added up.

    .. math:: h_t = E_{\pi_{t-1}}(x_{\pi_{t-1}}) + p_{\pi_t} + a_{\pi_{t-1}} + C c,

    with a learned vector in place of :math:`E` at the first place. Position vectors :math:`p` belong to the variable
    that is to be predicted. Where the order varies, :math:`a` tells which variable the entry before was.

    Arguments:
        network: whose length, inputs, vocabulary and context are read off.
        width: width of the sum.
        orders: whether the order varies, so that :math:`a` is needed.
        scale: standard deviation of each part at initialisation, for entries and contexts of unit variance.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> class Embedded(CausalNetwork):
        ...     def __init__(self):
        ...         super().__init__(3, outputs=4, vocabulary=7)
        ...         self.entrance = Entrance(self, 4)
        ...     def forward(self, entries, context=None, order=None):
        ...         return self.entrance(entries, context, order)
        >>> Embedded()(torch.tensor([[6, 0, 2]])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(self, network: CausalNetwork, width: int, *, orders: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        length = network.length
        self.first, self.place = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(length, width))
        self.after = nn.Parameter(torch.empty(length, width)) if orders else None
        self.tokens = nn.Embedding(network.vocabulary, width) if network.vocabulary else None
        self.columns = nn.Parameter(torch.empty(length, network.inputs, width)) if network.inputs else None
        self.context = nn.Linear(network.context_features, width) if network.context_features else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=scale)
        with torch.no_grad():
            if self.columns is not None:
                self.columns /= sqrt(network.inputs)
            if self.context is not None:
                self.context.weight /= sqrt(network.context_features)
                self.context.bias.zero_()

    def forward(self, entries: Tensor, context: Tensor | None, order: Tensor | None) -> Tensor:
        """``(rows, T, width)`` from entries ``(rows, T, inputs)`` or tokens ``(rows, T)``."""
        place, columns = self.gather(order)
        seen = self.tokens(entries) if columns is None else torch.einsum("rti,tiw->rtw", entries, columns)
        first = self.first.expand(len(entries), 1, -1)
        h = torch.cat([first, seen[:, :-1]], 1) + place
        return h if self.context is None else h + self.context(context).unsqueeze(1)

    def gather(self, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Vectors of the places ``(T, width)`` and weights of the columns ``(T, inputs, width)``, in an order."""
        place = self.place if order is None else self.place[order]
        columns = self.columns if order is None or self.columns is None else self.columns[order]
        if self.after is not None:
            after = self.after if order is None else self.after[order]
            place = place + functional.pad(after[:-1], (0, 0, 1, 0))
        return place, columns

    def begin(self, context: Tensor | None, order: Tensor | None) -> tuple[list[Tensor], tuple[Any, ...]]:
        """What the steps need of a context, by row, and of an order, shared."""
        return [] if self.context is None else [self.context(context)], self.gather(order)

    def step(self, cache: Cache, entry: Tensor | None, rows: int) -> Tensor:
        """What the place at ``cache.position`` reads, ``(rows, width)``; a context is the last of the cache's rows."""
        place, columns = cache.shared
        t = cache.position
        if entry is None:
            h = (self.first + place[0]).expand(rows, -1)
        elif columns is None:
            h = self.tokens(entry) + place[t]
        else:
            h = entry @ columns[t - 1] + place[t]
        return h if self.context is None else h + cache.rows[-1]


class Block(nn.Module):
    """Attention over the places so far, then a network at each place."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_attention, self.norm_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.collect, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.dropout = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Dropout(dropout)

    def forward(self, h: Tensor, fused: bool) -> Tensor:
        rows, length, width = h.shape
        collected = self.collect(self.norm_attention(h)).view(rows, length, 3, self.heads, -1)
        q, k, v = collected.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.rate if self.training else 0.0
        if fused:
            attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        else:
            later = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
            attended = _attend(q, k, v, later, rate)
        h = h + self.dropout(self.mix(attended.transpose(1, 2).reshape(rows, length, width)))
        return h + self.dropout(self._network(h))

    def step(self, h: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """One place ``(rows, width)``, given the keys and values ``(rows, heads, T, d)`` of the places before it."""
        q, k, v = self.collect(self.norm_attention(h)).view(len(h), 3, self.heads, -1).unbind(1)
        keys[:, :, position], values[:, :, position] = k, v
        q, k, v = q.unsqueeze(2), keys[:, :, : position + 1], values[:, :, : position + 1]
        attended = _attend(q, k, v) if transformed() else functional.scaled_dot_product_attention(q, k, v)
        h = h + self.dropout(self.mix(attended.reshape(h.shape)))
        return h + self.dropout(self._network(h))

    def _network(self, h: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(self.norm_network(h)), approximate="tanh"))


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, rate: float = 0.0) -> Tensor:
    """Attention in plain operations, which every transform can batch and differentiate."""
    scores = q @ k.mT / sqrt(q.shape[-1])
    weights = (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(-1)
    return functional.dropout(weights, rate) @ v


def _initialise(blocks: nn.ModuleList, layers: int) -> None:
    """GPT-2's: normal weights, those into the sum smaller with depth so that the sum's variance is not."""
    for name, parameter in blocks.named_parameters():
        if "norm" not in name:
            std = 0.02 / sqrt(2 * layers) if "mix" in name or "down" in name else 0.02
            nn.init.normal_(parameter, std=std) if parameter.dim() > 1 else nn.init.zeros_(parameter)
