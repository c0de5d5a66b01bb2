r"""Flat graphs of tensor operations: a Python function traced once, cleaned, and compiled where that pays.

A probabilistic program costs milliseconds of interpreter for microseconds of arithmetic. :func:`trace_graph` records
the tensor operations of one call, gradients included, as a graph with no program in it; what remains is made small:

* mutation is rewritten as new values, so that everything without an effect on the outcome can be dropped: a gradient
  whose value nobody asks for does not pay for the value;
* what depends on no argument is computed once;
* the same operation on the same arguments is done once.

:func:`compile_graph` hands a graph to torch's compiler, which fuses it to a few loops. A graph is valid for the shapes,
the dtype and the device that it was traced with, and for the tensors that the function held on to.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

__all__ = ["compile_graph", "trace_graph"]

Compiled = Callable[[list[Tensor]], Any]
aten = torch.ops.aten
TRANSPARENT = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
BROADCAST = 1 << 10  # numbers in a constant that is worth the search for repetition
LARGE = 1 << 22  # numbers in a constant beyond which computing it again is better than keeping it


def trace_graph(function: Callable[..., Any], examples: tuple[Tensor, ...]) -> fx.GraphModule:
    """Record a function of tensors as a graph of tensor operations.

    Arguments:
        function: maps the tensors to a tensor or a tuple of tensors; free of branches on their numbers.
        examples: arguments with the shapes, dtypes and devices of all later calls.

    Returns:
        A module that is called like the function and returns what it returns, without a graph of autograd.

    Raises:
        RuntimeError: the function reads numbers out of its arguments (``if x > 0``, ``x.item()``), or draws random
            ones.

    Example:
        >>> graph = trace_graph(torch.func.grad(lambda x: (x**2).sum()), (torch.zeros(3),))
        >>> graph(torch.tensor([1.0, 2.0, 3.0]))
        tensor([2., 4., 6.])
    """
    examples = tuple(x.detach().clone() for x in examples)  # the recorder tells arguments apart by identity
    with torch.no_grad():
        recorded = make_fx(function)(*examples)
        recorded = make_fx(functionalize(recorded, remove="mutations"))(*examples)
    drawn = [node.name for node in recorded.graph.nodes if node.op == "call_function" and _random(node)]
    if drawn:
        raise RuntimeError(f"the function draws random numbers ({drawn[0]}); a graph would draw others at every call.")
    return _clean(recorded)


def compile_graph(graph: fx.GraphModule, examples: tuple[Tensor, ...]) -> Compiled:
    """Compile a graph; when this returns, the first call has been made.

    Arguments:
        graph: made by :func:`trace_graph`.
        examples: contiguous arguments with the shapes of all later calls, which must be contiguous too.

    Returns:
        A function of the *list* of arguments, which it empties.

    Raises:
        RuntimeError: there is no compiler, or it fails on this graph.

    Example:
        >>> examples = (torch.zeros(3),)
        >>> compiled = compile_graph(trace_graph(torch.sin, examples), examples)    # doctest: +SKIP
    """
    graph = _with_reshapes(copy.deepcopy(graph))
    ways = (_compile_with_guards,) if any(x.is_cuda for x in examples) else (_compile_bare, _compile_with_guards)
    for way in ways:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = way(graph, examples)
                compiled(list(examples))
        except Exception as error:  # a compiler fails in more ways than can be listed; there is another, and the graph
            failure = error
        else:
            return compiled
    raise RuntimeError(f"the graph does not compile here: {type(failure).__name__}: {failure}") from failure


def _with_reshapes(graph: fx.GraphModule) -> fx.GraphModule:
    """Views ask for the strides that their argument had when it was recorded; a compiler may choose others."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default
    graph.recompile()
    return graph


def _compile_bare(graph: fx.GraphModule, examples: tuple[Tensor, ...]) -> Compiled:
    """The compiled loops themselves: what guards them costs more than a small graph, so callers keep to the rules."""
    from torch._inductor import compile_fx, config, decomposition, virtualized

    examples = tuple(x.clone() for x in examples)
    trust = {"cpp.vec_isa_ok": True}  # the processor's own word, instead of seconds of trying
    with config.patch({"size_asserts": False, "alignment_asserts": False, **trust}):
        decomposed = make_fx(graph, decomposition_table=decomposition.select_decomp_table())(*examples)
        fake = make_fx(decomposed, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
        inputs = [node.meta["val"] for node in fake.graph.nodes if node.op == "placeholder"]
        single = not isinstance(graph(*examples), tuple)
        if single:
            _return_tuple(fake)
        with virtualized.V.set_fake_mode(inputs[0].fake_mode):
            compiled = compile_fx.compile_fx_inner(fake, inputs)
    run = getattr(compiled, "current_callable", None) or compiled
    return (lambda inputs: run(inputs)[0]) if single else run


def _return_tuple(graph: fx.GraphModule) -> None:
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = ((output.args[0],),)
    graph.recompile()


def _compile_with_guards(graph: fx.GraphModule, examples: tuple[Tensor, ...]) -> Compiled:
    """By the ordinary door; on CUDA as a graph of kernels that is launched at once."""
    cuda = any(x.is_cuda for x in examples)
    options = {"triton.cudagraphs": True} if cuda else None
    compiled = torch._inductor.compile(graph, list(examples), options=options)
    if not cuda:
        return lambda inputs: compiled(*inputs)
    return lambda inputs: tree_map(torch.clone, compiled(*inputs))  # a CUDA graph overwrites its outcome


def _clean(recorded: fx.GraphModule) -> fx.GraphModule:
    _drop_transparent(recorded.graph)
    _mark_failures(recorded.graph)
    _drop_cotangents_of_ones(recorded.graph)
    _eliminate(recorded.graph)
    _fold_constants(recorded)
    _share_common(recorded)
    _eliminate(recorded.graph)
    recorded.graph.lint()
    recorded.recompile()
    return recorded


def _drop_transparent(graph: fx.Graph) -> None:
    """Copies that change no number."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in TRANSPARENT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _mark_failures(graph: fx.Graph) -> None:
    """Where a factorisation fails, one matrix of a batch, its factor is NaN; the check that would raise is dropped."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten._linalg_check_errors.default:
            info = node.args[0]
            factor = next((user for user in info.args[0].users if user.args[1] == 0), None) if info.args else None
            if factor is None or factor.op != "call_function":
                continue
            after = max(info, factor)
            with graph.inserting_after(after):
                fine = graph.call_function(aten.eq.Scalar, (info, 0))
            with graph.inserting_after(fine):
                column = graph.call_function(aten.unsqueeze.default, (fine, -1))
            with graph.inserting_after(column):
                matrix = graph.call_function(aten.unsqueeze.default, (column, -1))
            with graph.inserting_after(matrix):
                marked = graph.call_function(aten.where.ScalarOther, (matrix, factor, math.nan))
            marked.meta = dict(factor.meta)
            factor.replace_all_uses_with(marked, delete_user_cb=lambda user, marked=marked: user is not marked)


def _drop_cotangents_of_ones(graph: fx.Graph) -> None:
    """``ones_like(value)`` needs the shape of the value and would keep alive all that computes it."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.ones_like.default, aten.zeros_like.default):
            example = node.meta.get("val")
            if not isinstance(example, torch.Tensor):
                continue
            number = 1.0 if node.target is aten.ones_like.default else 0.0
            options = {"dtype": example.dtype, "device": example.device, "pin_memory": False}
            with graph.inserting_before(node):
                constant = graph.call_function(aten.full.default, (list(example.shape), number), options)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            graph.erase_node(node)


def _eliminate(graph: fx.Graph) -> None:
    """Everything that the outcome does not depend on; after functionalisation nothing else has an effect."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _fold_constants(recorded: fx.GraphModule) -> None:
    """Compute what depends on no argument."""
    graph, constants = recorded.graph, {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            constants[node] = operator.attrgetter(node.target)(recorded)
        elif node.op == "call_function" and not _random(node) and set(node.all_input_nodes) <= constants.keys():
            arguments = fx.node.map_arg((node.args, node.kwargs), constants.__getitem__)
            with torch.no_grad():
                constants[node] = node.target(*arguments[0], **arguments[1])
    for index, (node, value) in enumerate(constants.items()):
        leaves = node.op == "call_function" and any(user not in constants for user in node.users)
        if leaves and isinstance(value, Tensor) and value.numel() < LARGE:
            name, small = f"_folded_constant{index}", _compact(value)
            recorded.register_buffer(name, small.clone(), persistent=False)
            with graph.inserting_before(node):
                attribute = graph.get_attr(name)
                attribute.meta = {**node.meta, "val": small}
                if small.shape != value.shape:
                    attribute = graph.call_function(aten.expand.default, (attribute, list(value.shape)))
                    attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)


def _compact(value: Tensor) -> Tensor:
    """A large constant without the dimensions along which it repeats itself: compiled loops then read less memory."""
    if value.numel() < BROADCAST:
        return value
    for dim in range(value.dim()):
        first = value.narrow(dim, 0, 1)
        if value.shape[dim] > 1 and bool((value == first).all()):
            value = first
    return value


def _random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _share_common(recorded: fx.GraphModule) -> None:
    """The same operation on the same arguments, once."""
    seen: dict[Any, fx.Node] = {}
    for node in list(recorded.graph.nodes):
        if node.op not in ("call_function", "get_attr") or _random(node):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            recorded.graph.erase_node(node)
        else:
            seen[key] = node


def _frozen(arguments: Any) -> Any:
    """Arguments of a node as something that can be looked up; 1, 1.0 and True are different."""
    if isinstance(arguments, dict):
        return tuple((name, _frozen(value)) for name, value in sorted(arguments.items()))
    if isinstance(arguments, list | tuple):
        return tuple(_frozen(value) for value in arguments)
    if isinstance(arguments, slice):
        return ("slice", _frozen((arguments.start, arguments.stop, arguments.step)))
    return arguments if isinstance(arguments, fx.Node) else (type(arguments), repr(arguments))
