"""From JSON and tensors back to a model.

Reading is a transcription of what :mod:`pyro_genmods.io.writer` wrote: no value is evaluated, names go through the
:class:`~pyro_genmods.io.allowlist.AllowList`, and of everything that is built only the constructors of models are
called, with arguments that were built in the same way.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform

from ..foundation.errors import FileFormatError
from ..mechanism import Mechanism
from .allowlist import AllowList, check_attribute
from .state import TRANSFORM_STATE, state_of

__all__ = ["Reader"]


class Reader:
    """Builds what the Writer wrote.

    While constructors run, modules hold values cast to the default dtype, as they did when the model was first built;
    the stored values are put in last, bit for bit. The random numbers that constructors draw are given back.

    Arguments:
        tensors: by key, on the CPU.
        allowed: the classes that the JSON may use.

    Raises:
        FileFormatError: the JSON is not of the Writer's form, uses names outside the allow-list, or a constructor
            refuses the arguments.

    Example:
        >>> Reader({}, AllowList()).value({"tuple": [1, {"size": [2, 3]}, {"float": "inf"}]})
        (1, torch.Size([2, 3]), inf)
    """

    def __init__(self, tensors: dict[str, Tensor], allowed: AllowList) -> None:
        self.tensors = tensors
        self.allowed = allowed
        self._made: dict[tuple[str, bool], Tensor] = {}
        self._modules: list[nn.Module | None] = []
        self._kinds = {
            "float": lambda text: float(_expect(text, str)),
            "size": lambda items: Size([_expect(item, int) for item in _expect(items, list)]),
            "dtype": lambda name: _expect(getattr(torch, _expect(name, str), None), torch.dtype),
            "device": lambda text: torch.device(_expect(text, str)),
            "enum": self._enum,
            "parameter": lambda key: self._tensor(key, parameter=True),
            "tensor": self._tensor,
            "tuple": lambda items: tuple(self.value(item) for item in _expect(items, list)),
            "dict": lambda pairs: {self.value(k): self.value(v) for k, v in map(_pair, _expect(pairs, list))},
            "partial": self._partial,
            "callable": lambda name: self.allowed.callable(_expect(name, str)),
            "constraint": lambda name: self.allowed.constant(_expect(name, str)),
            "object": self._object,
            "module": self._module,
            "model": self._model,
            "same": self._same,
        }

    def model(self, node: Any, changes: Any) -> Mechanism:
        """Build the model of a file's root node.

        Arguments:
            node: what the Writer made of the model.
            changes: attributes that were set after construction, see
                :func:`~pyro_genmods.io.state.changed_attributes`.
        """
        try:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                model = _expect(self.value(node), Mechanism)
            for (key, _), tensor in self._made.items():
                tensor.data = self.tensors[key].clone()
            self._change(model, changes)
        except FileFormatError:
            raise
        except Exception as error:  # hostile JSON can fail in any way; it only ever fails
            raise FileFormatError(f"the model's description cannot be read: {error}") from error
        return model

    def _change(self, model: nn.Module, changes: Any) -> None:
        modules = dict(model.named_modules())
        for name, attributes in _expect(changes, dict).items():
            module = modules[name]
            for key, node in _names(type(module), {"attributes": attributes}, "attributes"):
                vars(module)[key] = self.value(node)

    def value(self, node: Any) -> Any:
        """The value of a piece of JSON."""
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) != 1 or next(iter(node)) not in self._kinds:
            raise FileFormatError(f"the file has a value of an unknown kind, {str(sorted(node))[:80]}.")
        ((kind, content),) = node.items()
        return self._kinds[kind](content)

    def _enum(self, content: Any) -> enum.Enum:
        name, member = _pair(content)
        return self.allowed.find(_expect(name, str), enum.Enum).__members__[member]

    def _partial(self, content: Any) -> functools.partial:
        function, args, keywords = (self.value(part) for part in _expect(content, list))
        return functools.partial(function, *_expect(args, list), **_expect(keywords, dict))

    def _tensor(self, key: Any, parameter: bool = False) -> Tensor:
        made = self._made.get((_expect(key, str), parameter))
        if made is None:
            stored = self.tensors[key]
            made = stored.to(torch.get_default_dtype() if stored.is_floating_point() else stored.dtype, copy=True)
            if parameter:
                made = nn.Parameter(made, requires_grad=made.is_floating_point() or made.is_complex())
            self._made[key, parameter] = made
        return made

    def _object(self, content: Any) -> Any:
        cls = self.allowed.find(_expect(content["class"], str))
        if issubclass(cls, nn.Module | enum.Enum):
            raise FileFormatError(f"the file has a {cls.__name__} as a plain object, which it is not.")
        item = object.__new__(cls)
        if isinstance(item, Transform):
            vars(item).update(TRANSFORM_STATE)
        vars(item).update(self._attributes(cls, content))
        return item

    def _module(self, content: Any) -> nn.Module:
        cls = self.allowed.find(_expect(content["class"], str), nn.Module)
        if issubclass(cls, Mechanism):
            raise FileFormatError(f"the file has a {cls.__name__} without its constructor's arguments.")
        module = object.__new__(cls)
        nn.Module.__init__(module)
        self._modules.append(module)
        if isinstance(module, Transform):
            vars(module).update(TRANSFORM_STATE)
        vars(module).update(self._attributes(cls, content))
        for slot, kind in ((module._parameters, "parameters"), (module._buffers, "buffers")):
            for name, key in _names(cls, content, kind):
                slot[name] = None if key is None else self._tensor(key, parameter=kind == "parameters")
        module._non_persistent_buffers_set = {_expect(name, str) for name in content.get("transient", [])}
        for name, child in _names(cls, content, "children"):
            module._modules[name] = _expect(self.value(child), nn.Module | None)
        return module

    def _model(self, content: Any) -> Mechanism:
        cls = self.allowed.find(_expect(content["class"], str), Mechanism)
        slot = len(self._modules)
        self._modules.append(None)
        arguments = {name: self.value(node) for name, node in _expect(content["arguments"], dict).items()}
        state = {name: self.tensors[key] for name, key in _expect(content["state"], dict).items()}
        model = _construct(cls, arguments)
        _load_state(model, state)
        self._modules[slot] = model
        return model

    def _same(self, number: Any) -> nn.Module:
        known = self._modules[number] if 0 <= _expect(number, int) < len(self._modules) else None
        return _expect(known, nn.Module)

    def _attributes(self, cls: type, content: dict) -> dict[str, Any]:
        return {name: self.value(node) for name, node in _names(cls, content, "attributes")}


def _construct(cls: type[Mechanism], arguments: dict[str, Any]) -> Mechanism:
    """Call the constructor of a model's class with the arguments that it was called with."""
    if inspect.isabstract(cls):
        raise FileFormatError(f"the file names {cls.__name__}, which is abstract.")
    signature = inspect.signature(cls.__init__)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    unknown = sorted(set(arguments) - set(signature.parameters))
    if unknown:
        raise FileFormatError(
            f"{cls.__name__} of this version takes no argument {', '.join(unknown)[:200]}; load the file with "
            "the version that wrote it."
        )
    bound = inspect.BoundArguments(signature, arguments)
    try:
        return cls(*bound.args, **bound.kwargs)
    except Exception as error:
        raise FileFormatError(f"{cls.__name__} refuses the arguments in the file: {error}") from error


def _load_state(model: Mechanism, state: dict[str, Tensor]) -> None:
    """Put the stored values into a model, with the stored dtypes; names and shapes must agree exactly."""
    for name, tensor in state_of(model).items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(state, strict=True)


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FileFormatError(f"the file has {str(value)[:80]!r} where a {getattr(kind, '__name__', kind)} should be.")
    return value


def _pair(value: Any) -> list:
    if len(_expect(value, list)) != 2:
        raise FileFormatError(f"the file has {str(value)[:80]!r} where a pair should be.")
    return value


def _names(cls: type, content: dict, kind: str) -> Iterator[tuple[str, Any]]:
    for name, node in _expect(content.get(kind, {}), dict).items():
        if not name or "." in name:
            raise FileFormatError(f"the file has {name[:80]!r} for a name.")
        check_attribute(cls, name)
        yield name, node
