r"""Causal networks: the parameters of every factor of a chain rule, in one pass or one entry at a time.

An autoregressive law writes a density of :math:`T` entries, in an order :math:`\pi`, as a product of one-entry laws,

.. math:: p(x \mid c) = \prod_{t=1}^T p\bigl(x_{\pi_t} \mid \eta_t\bigr), \qquad
          \eta_t = f_\theta\bigl(x_{\pi_1}, \dots, x_{\pi_{t-1}}, c, \pi\bigr),

and a *causal network* is such an :math:`f_\theta`: its output at place :math:`t` depends on the entries at
earlier places only. That one property makes the product a density, and nothing else in the formula can tell when it
fails: a network that sees its own entry has a wonderful likelihood and means nothing. ``check_causal`` tests it.

Teacher forcing evaluates all :math:`\eta_t` of known entries in one pass (``forward``). Sampling needs them one after
the other (``begin``, then ``step`` per entry); a cache keeps what the network computed for the entries so far, so that
all steps together cost about one pass. Particles fork a cache by ``select``.

Reference:
    H. Larochelle and I. Murray, The neural autoregressive distribution estimator, AISTATS 2011.
    B. Uria, M.-A. Cote, K. Gregor, I. Murray, H. Larochelle, Neural autoregressive distribution estimation, 2016,
    arXiv:1605.02226 (orders).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .errors import ShapeError
from .networks import place_of

__all__ = ["Cache", "CausalNetwork", "check_causal", "transformed"]


def transformed() -> bool:
    """Whether ``torch.func`` or a tracer is at work, where fused kernels lack batching rules or derivatives.

    Example:
        >>> seen = []
        >>> _ = torch.vmap(lambda x: seen.append(transformed()) or x)(torch.zeros(2))
        >>> transformed(), seen
        (False, [True])
    """
    return torch._C._functorch.maybe_current_level() is not None or get_proxy_mode() is not None


@dataclass
class Cache:
    """What a causal network remembers of the entries so far.

    Attributes:
        position: the place whose parameters the next step gives, 0 at the beginning.
        rows: tensors whose first dimension is the rows; steps write into them in place.
        shared: what does not depend on the rows.

    Example:
        >>> cache = Cache(1, [torch.tensor([10.0, 20.0, 30.0])])
        >>> cache.select(torch.tensor([2, 2, 0])).rows
        [tensor([30., 30., 10.])]
    """

    position: int
    rows: list[Tensor]
    shared: tuple[Any, ...] = ()

    def select(self, index: Tensor) -> Cache:
        """A cache of its own whose rows are those at ``index``, which may repeat, drop and reorder them."""
        return Cache(self.position, [tensor.index_select(0, index) for tensor in self.rows], self.shared)


class CausalNetwork(nn.Module, ABC):
    r"""Parameters of the law of entry :math:`t` from the entries before it, in an order, and a context.

    A subclass needs ``forward``. The ``begin`` and ``step`` of this class run ``forward`` at every step, which costs
    ``length`` passes; a subclass with a cache overrides both and pays one.

    Arguments:
        length: number of entries ``T``.
        outputs: numbers per entry that the network gives.
        inputs: width of the vector by which an entry is known, if entries are numbers.
        vocabulary: number of tokens, if entries are tokens (``int64`` from 0 on). Exactly one of the two is given.
        context_features: width of the context, 0 without one.

    Raises:
        ValueError: both or none of ``inputs`` and ``vocabulary``, or a size below one.

    Example:
        >>> class RunningMean(CausalNetwork):
        ...     def forward(self, entries, context=None, order=None):
        ...         count = torch.arange(1, self.length).unsqueeze(-1)
        ...         return nn.functional.pad(entries[:, :-1].cumsum(1) / count, (0, 0, 1, 0))
        >>> network, x = RunningMean(3, outputs=1, inputs=1), torch.tensor([[[2.0], [4.0], [9.0]]])
        >>> check_causal(network, x)
        >>> cache = network.begin(1, None, x)
        >>> [network.step(cache, entry).item() for entry in (None, x[:, 0], x[:, 1])]
        [0.0, 2.0, 3.0]
    """

    def __init__(
        self,
        length: int,
        outputs: int,
        *,
        inputs: int | None = None,
        vocabulary: int | None = None,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        if (inputs is None) == (vocabulary is None):
            raise ValueError(
                f"inputs={inputs}, vocabulary={vocabulary}: give `inputs` for entries that are numbers, or "
                "`vocabulary` for entries that are tokens, not both"
            )
        sizes = {"length": length, "outputs": outputs, "inputs": inputs, "vocabulary": vocabulary}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: give at least 1")
        if context_features < 0:
            raise ValueError(f"context_features={context_features}: give 0 for no context, or its width")
        self.length, self.outputs, self.inputs, self.vocabulary = length, outputs, inputs, vocabulary
        self.context_features = context_features

    @abstractmethod
    def forward(self, entries: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Parameters at all places.

        Arguments:
            entries: numbers ``(rows, T, inputs)`` or tokens ``(rows, T)``, already permuted into the order.
            context: ``(rows, context_features)`` or ``None``.
            order: ``(T,)``, the variable that stands at each place; ``None`` for 0, 1, ..., T-1.

        Returns:
            ``(rows, T, outputs)``; what stands at place ``t`` depends on the entries at places below ``t``.
        """

    def begin(self, rows: int, context: Tensor | None, like: Tensor, order: Tensor | None = None) -> Cache:
        """A cache of the empty sequence.

        Arguments:
            rows: how many sequences grow together.
            context: ``(rows, context_features)`` or ``None``.
            like: a tensor on the right device, of the right dtype and ``torch.vmap`` level; buffers are made by it.
            order: as for ``forward``.
        """
        self.check(rows, context, order)
        shape, dtype = (
            ((rows, self.length), torch.int64) if self.vocabulary else ((rows, self.length, self.inputs), None)
        )
        buffer = like.new_zeros(shape, dtype=dtype or self.floating(like))
        return Cache(0, [buffer] if context is None else [buffer, context], (order,))

    def step(self, cache: Cache, entry: Tensor | None) -> Tensor:
        """Parameters of the next entry; run it without gradients, for it writes into the cache.

        Arguments:
            cache: of ``begin``, an earlier ``step`` or ``select``; it advances by one place.
            entry: the entry before, ``(rows, inputs)`` or tokens ``(rows,)``; ``None`` at the first call.

        Returns:
            ``(rows, outputs)``.

        Raises:
            ValueError: an entry at the first step, none at a later one, or a sequence that is already complete.
        """
        self.check_step(cache, entry)
        entries, *context = cache.rows
        if entry is not None:
            entries[:, cache.position - 1] = entry
        cache.position += 1
        return self(entries, context[0] if context else None, cache.shared[0])[:, cache.position - 1]

    def start_at(self, bias: Sequence[float] | Sequence[Sequence[float]]) -> bool:
        """Let every place's output start at ``bias``, whatever the entries are.

        Returns:
            Whether this network can; one that cannot starts where its own initialisation put it.
        """
        return False

    def floating(self, like: Tensor) -> torch.dtype:
        """The dtype of a cache's numbers: that of ``like``, or of the network where ``like`` holds integers."""
        return like.dtype if like.is_floating_point() else place_of(self)[0]

    def check(self, rows: int, context: Tensor | None, order: Tensor | None, entries: Tensor | None = None) -> None:
        """Refuse arguments whose shapes are not those of this network, with what was expected.

        Raises:
            ShapeError: names the argument.
        """
        inner = (self.length,) if self.vocabulary else (self.length, self.inputs)
        if entries is not None and tuple(entries.shape[1:]) != inner:
            raise ShapeError(f"entries: expected (rows, {str(inner)[1:-1].strip(',')}), got {tuple(entries.shape)}")
        if (context is not None) != bool(self.context_features):
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ShapeError(f"context: got {got}, but the network has context_features={self.context_features}")
        if context is not None and tuple(context.shape) != (rows, self.context_features):
            raise ShapeError(f"context: expected {(rows, self.context_features)}, got {tuple(context.shape)}")
        if order is not None and tuple(order.shape) != (self.length,):
            raise ShapeError(f"order: expected ({self.length},), got {tuple(order.shape)}")

    def check_step(self, cache: Cache, entry: Tensor | None) -> None:
        """Refuse a step that does not fit the cache's position."""
        if (entry is None) != (cache.position == 0):
            raise ValueError(
                f"entry: got {'none' if entry is None else 'one'} at position {cache.position}; give None at the first "
                "step and the entry before at every later one"
            )
        if cache.position >= self.length:
            raise ValueError(f"cache: all {self.length} entries are drawn; begin() again")


Run = Callable[[Tensor, Tensor | None], Tensor]


def check_causal(
    network: nn.Module, entries: Tensor, context: Tensor | None = None, order: Tensor | None = None
) -> None:
    r"""Refuse a network that is not causal, mixes rows, or gives the wrong shape.

    Where entries are numbers the derivative of every output at places up to :math:`t` with respect to the entries from
    :math:`t` on must be exactly zero. For numbers and tokens, other entries from :math:`t` on must leave those outputs
    as they are. All :math:`t` are tried up to length 32, else both ends and 16 others. Parameters that are all zero are
    replaced by small random ones meanwhile: a last layer that starts at zero would hide everything.

    Arguments:
        network: called as ``network(entries, context, order)``, with the attributes ``length``, ``outputs`` and
            ``vocabulary``. It is run in evaluation mode, under a seed of its own, and left as it was.
        entries: a few rows of typical entries, ``(rows, T, inputs)`` or tokens ``(rows, T)``.
        context: ``(rows, context_features)`` or ``None``.
        order: ``(T,)`` or ``None``.

    Raises:
        ShapeError: the output is not ``(rows, T, outputs)``.
        ValueError: the output at some place depends on the entry there or later, or on other rows, or is not finite.

    Example:
        >>> class Cheat(CausalNetwork):
        ...     def forward(self, entries, context=None, order=None):
        ...         return entries.cumsum(1)
        >>> check_causal(Cheat(3, outputs=1, inputs=1), torch.randn(2, 3, 1))
        Traceback (most recent call last):
            ...
        ValueError: network: its output for entry 0 depends on entry 0 >= 0, ...
    """
    entries = entries.detach()
    if len(entries) == 1:
        entries, context = entries.repeat_interleave(2, 0), None if context is None else context.repeat_interleave(2, 0)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    devices = [entries.device] if entries.is_cuda else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            parameters = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
            awake = {name: torch.randn_like(p) / 4 for name, p in parameters if not bool(p.any())}

            def run(entries: Tensor, context: Tensor | None) -> Tensor:
                return torch.func.functional_call(network, awake, (entries, context, order))

            _check_outputs(network, run, entries, context)
    finally:
        for module, training in modes:
            module.training = training


def _check_outputs(network: nn.Module, run: Run, entries: Tensor, context: Tensor | None) -> None:
    rows, length = entries.shape[:2]
    with torch.no_grad():
        outputs = run(entries, context)
    if tuple(outputs.shape) != (rows, network.length, network.outputs) or length != network.length:
        raise ShapeError(
            f"network: its output has shape {tuple(outputs.shape)} for entries of shape {tuple(entries.shape)}, "
            f"expected (rows, length, outputs) = {(rows, network.length, network.outputs)}; check both"
        )
    if not bool(outputs.isfinite().all()):
        raise ValueError("network: its output is not finite; check its parameters and the entries it was given")
    places = range(length) if length <= 32 else sorted({0, length - 1, *torch.randperm(length)[:16].tolist()})
    others = _others(entries, getattr(network, "vocabulary", None))
    for t in places:
        if entries.is_floating_point():
            _check_gradient(run, entries, context, t)
        _check_perturbation(run, entries, context, others, t)
    with torch.no_grad():
        changed = run(torch.cat([others[:1], entries[1:]]), context)
    if _differ(changed[1:], outputs[1:]):
        raise ValueError(
            "network: its output for one row depends on another row; leave out what mixes a batch, such as batch "
            "normalisation by the batch's own statistics or attention over the first dimension"
        )


def _others(entries: Tensor, vocabulary: int | None) -> Tensor:
    """Entries that differ from the given ones everywhere."""
    if not entries.is_floating_point():
        top = int(vocabulary or entries.max() + 1)
        return (entries + torch.randint_like(entries, 1, max(top, 2))) % top
    return entries + (1 + entries.std().nan_to_num()) * (1 + torch.rand_like(entries))


def _check_gradient(run: Run, entries: Tensor, context: Tensor | None, t: int) -> None:
    with torch.enable_grad():
        leaf = entries.clone().requires_grad_()
        outputs = run(leaf, context)
        if not outputs.requires_grad:
            return
        outputs = outputs * torch.randn_like(outputs)

        def seen(place: int) -> list[int]:
            """Entries from ``place`` on that outputs up to ``place`` depend on."""
            total = outputs[:, : place + 1].sum()
            (slope,) = torch.autograd.grad(total, leaf, retain_graph=True, materialize_grads=True)
            return [s for s in range(place, leaf.shape[1]) if bool(slope[:, s].any())]

        if seen(t):
            place = next(s for s in range(t + 1) if seen(s))
            raise _not_causal(place, seen(place)[0])


def _check_perturbation(run: Run, entries: Tensor, context: Tensor | None, others: Tensor, t: int) -> None:
    with torch.no_grad():
        before = run(entries, context)[:, : t + 1]
        after = run(torch.cat([entries[:, :t], others[:, t:]], 1), context)[:, : t + 1]
        if not _differ(before, after):
            return
        place = next(s for s in range(t + 1) if _differ(before[:, s], after[:, s]))
        for entry in range(t, entries.shape[1]):
            one = entries.clone()
            one[:, entry] = others[:, entry]
            if _differ(before[:, place], run(one, context)[:, place]):
                raise _not_causal(place, entry)
        raise _not_causal(place, t)


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() > 1e-5 * (1 + b.abs().amax())).any())


def _not_causal(place: int, entry: int) -> ValueError:
    return ValueError(
        f"network: its output for entry {place} depends on entry {entry} >= {place}, so that the product of "
        "the entries' laws is no density; shift its input by one place and mask what comes later"
    )
