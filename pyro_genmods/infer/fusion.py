"""Functions that use a potential, recorded with it into one graph and compiled where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..foundation.graphs import compile_graph, trace_graph
from .quiet import quiet, value_and_grad

__all__ = ["Fused"]

SECONDS_A_NODE, SECONDS_A_NUMBER = 1.5e-6, 0.7e-9  # of a graph, as measured on ordinary machines
COMPILE_SECONDS, COMPILE_SECONDS_A_NODE = 1.0, 0.02


class Fused:
    """One function at its current level, for each set of shapes it met."""

    def __init__(self, owner: Any, function: Callable[..., Any]) -> None:
        self.owner, self.function = owner, function
        self.level = ""
        self._recorded: dict[Any, _Recorded] = {}

    @property
    def sizes(self) -> set[int]:
        """Numbers of chains met."""
        return {shapes[0][0] for shapes in self._recorded}

    def bind(self, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """What to call with tensors of these shapes, as contiguous as these."""
        inputs = self.owner.inputs()
        shapes = tuple([x.shape for x in tensors])
        recorded = self._recorded.get(shapes)
        if recorded is None:
            recorded = self._recorded[shapes] = self._record(tensors, inputs)
        recorded.calls += 1
        if recorded.compiled is None and self._pays(recorded):
            self._compile(recorded, tensors, inputs)
        if recorded.compiled is not None and self.owner.mode != "graph":
            compiled = recorded.compiled
            if all(x.is_contiguous() for x in tensors):
                return lambda *tensors: compiled([*tensors, *inputs])
            return lambda *tensors: compiled([*(x.contiguous() for x in tensors), *inputs])
        return lambda *tensors: _without_grad(recorded.run, tensors, inputs)

    def cost(self) -> tuple[float, float]:
        """Seconds of a call of the graph and of its compilation, as counted; the largest of all shapes."""
        costs = [(recorded.seconds, recorded.compile_seconds) for recorded in self._recorded.values()]
        return max(costs, default=(0.0, math.inf))

    def _record(self, tensors: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> _Recorded:
        n = len(tensors)

        def flat(*everything: Tensor) -> Any:
            outcome = self.function(_Inside(self.owner, everything[n:]), *everything[:n])
            return tree_map(torch.Tensor.contiguous, outcome)  # for the next call, whose compiled loops count on it

        if self.owner.level != "eager" and self.owner.program.road != "loop":
            try:
                graph = trace_graph(flat, (*tensors, *inputs))
            except Exception as error:  # whatever it is that cannot be recorded, it can be run
                self.owner.note(f"graph: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            else:
                self.level = self.level or "graph"
                return _Recorded(graph, graph)
        self.level = self.level or "eager"
        return _Recorded(flat, None)

    def _pays(self, recorded: _Recorded) -> bool:
        owner = self.owner
        if recorded.graph is None or owner.uncompiled or owner.level == "graph" or owner.mode == "graph":
            return False
        spent = recorded.calls * recorded.seconds
        return owner.level == "compiled" or owner.mode == "compiled" or spent > recorded.compile_seconds

    def _compile(self, recorded: _Recorded, tensors: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
        try:
            examples = tuple(x.contiguous() for x in (*tensors, *inputs))
            recorded.compiled = compile_graph(recorded.graph, examples)
            self.level = "compiled"
        except RuntimeError as error:
            self.owner.uncompiled = True
            self.owner.note(f"compiled: {str(error)[:300]}")


class _Recorded:
    """A function for one set of shapes, and what it is expected to cost: counted, so that it is the same every time."""

    def __init__(self, run: Callable[..., Any], graph: torch.fx.GraphModule | None) -> None:
        self.run, self.graph, self.compiled, self.calls = run, graph, None, 0
        self.seconds, self.compile_seconds = 0.0, math.inf
        if graph is not None:
            results = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
            numbers = sum(x.numel() for x in results if isinstance(x, Tensor))
            self.seconds = SECONDS_A_NODE * len(results) + SECONDS_A_NUMBER * numbers
            self.compile_seconds = COMPILE_SECONDS + COMPILE_SECONDS_A_NODE * len(results)


class _Inside:
    """The potential as a fused function sees it: the program itself, to be recorded with the function."""

    num_gradients = 0  # counted outside, once for each call

    def __init__(self, owner: Any, inputs: tuple[Tensor, ...]) -> None:
        self._owner, self._inputs = owner, inputs

    def fuse(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        return partial(function, self)

    def value(self, q: Tensor) -> Tensor:
        return self._run(lambda: self._owner.energy(q, self._inputs))

    def grad(self, q: Tensor) -> Tensor:
        return self.value_and_grad(q)[1]

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_grad(lambda rows: self._owner.energy(rows, self._inputs), q, self._owner.program.enumerated)

    def parts(self, q: Tensor) -> tuple[Tensor, Tensor]:
        data = self._inputs[1:] if self._owner.tempered else self._inputs
        prior, joint = self._run(lambda: self._owner.program.energies(q, data))
        return prior, joint - prior

    def _run(self, evaluate: Callable[[], Any]) -> Any:
        with torch.no_grad(), quiet(self._owner.program.enumerated):
            return evaluate()


def _without_grad(run: Callable[..., Any], tensors: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return run(*tensors, *inputs)
