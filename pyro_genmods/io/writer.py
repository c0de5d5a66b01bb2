r"""A model as data: what it was built from, as JSON plus named tensors.

=============  ==========================================================================================
a model        of this package, or derived from it: class, constructor arguments, state; its constructor is
               called when it is built again
other modules  networks and zuko flows, which do not say what they were built from: class, plain attributes,
               parameters, buffers, children; no constructor of theirs is called
other values   numbers, strings, lists, tuples, dicts, sizes, dtypes, tensors, constraints, transforms,
               classes, functions with a name, ``functools.partial``
=============  ==========================================================================================

In JSON, ``null``, booleans, numbers, strings and arrays stand for themselves; everything else is an object with one
key that says what it is, such as ``{"tuple": [1, 2]}`` or ``{"tensor": "argument.0"}``. Modules and tensors that occur
twice are written once, so what was shared stays shared. :mod:`pyro_genmods.io.reader` is the way back.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
import numbers
import types
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..foundation.errors import FileFormatError
from ..mechanism import Mechanism
from .allowlist import check_attribute, constant_name, is_findable, name_of
from .state import attributes_of, state_of

__all__ = ["Writer"]


class Writer:
    """Turns one model into JSON and tensors.

    Arguments:
        model: the model; its state goes under ``model.<name>``, whatever else it was built from under ``argument.<n>``.

    Attributes:
        node: the JSON.
        tensors: by key.
        names: classes and functions used, by the name they have in the JSON.

    Raises:
        TypeError: a value that cannot be written; the message names the argument and the remedy.

    Example:
        >>> import pyro_genmods as gm, zuko
        >>> writer = Writer(gm.Flow(zuko.flows.NICE(2, transforms=1)))
        >>> writer.node["model"]["class"]
        'pyro_genmods.transform.flow:Flow'
    """

    def __init__(self, model: Mechanism) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[str, Any] = {}
        self._keys: dict[int, str] = {}
        self._modules: dict[int, int] = {}
        for name, tensor in state_of(model).items():
            self._tensor(tensor, f"model.{name}")
        self.node = self.value(type(model).__name__, model)

    def value(self, where: str, value: Any) -> Any:
        """The JSON of a value; ``where`` names it in errors."""
        match value:
            case enum.Enum():
                return {"enum": [self._name(type(value)), value.name]}
            case None | bool() | str():
                return value
            case numbers.Integral():
                return int(value)
            case numbers.Real():
                return float(value) if math.isfinite(value) else {"float": str(float(value))}
            case Size():
                return {"size": list(value)}
            case torch.dtype() | torch.device():
                return {type(value).__name__: str(value).removeprefix("torch.")}
            case nn.Parameter():
                return {"parameter": self._tensor(value)}
            case Tensor():
                return {"tensor": self._tensor(value)}
            case nn.Module():
                return self._module(where, value)
            case type() | types.FunctionType() | types.BuiltinFunctionType():
                return {"callable": self._name(value)}
        return self._container(where, value)

    def _container(self, where: str, value: Any) -> Any:
        if type(value) in (list, tuple):
            items = [self.value(f"{where}[{i}]", item) for i, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if type(value) is dict:
            pairs = value.items()
            return {"dict": [[self.value(f"{where} key", k), self.value(f"{where}[{k!r}]", v)] for k, v in pairs]}
        if type(value) is functools.partial:
            parts = (value.func, list(value.args), value.keywords)
            return {"partial": [self.value(f"{where} (partial)", part) for part in parts]}
        return self._object(where, value)

    def _object(self, where: str, value: Any) -> dict[str, Any]:
        """A plain object: constraints, transforms, records."""
        cls = type(value)
        if isinstance(value, constraints.Constraint) and (constant := constant_name(value)):
            return {"constraint": constant}
        try:
            object.__new__(cls)
            attributes = dict(attributes_of(value))
        except TypeError as error:
            raise TypeError(
                f"{where}: got a {cls.__module__}.{cls.__qualname__}, which cannot be written to a file; make it plain "
                "data (numbers, strings, lists, dicts, tensors) or an nn.Module."
            ) from error
        return {"object": {"class": self._name(cls), "attributes": self._attributes(where, cls, attributes)}}

    def _module(self, where: str, module: nn.Module) -> dict[str, Any]:
        if id(module) in self._modules:
            return {"same": self._modules[id(module)]}
        self._modules[id(module)] = len(self._modules)
        if isinstance(module, Mechanism):
            return self._model(where, module)
        cls = type(module)
        node: dict[str, Any] = {
            "class": self._name(cls),
            "attributes": self._attributes(where, cls, dict(attributes_of(module))),
            "parameters": {k: None if v is None else self._tensor(v) for k, v in module._parameters.items()},
            "buffers": {k: None if v is None else self._tensor(v) for k, v in module._buffers.items()},
            "transient": sorted(module._non_persistent_buffers_set),
            "children": {k: self.value(f"{where}.{k}", v) for k, v in module._modules.items()},
        }
        return {"module": {key: value for key, value in node.items() if value}}

    def _model(self, where: str, model: Mechanism) -> dict[str, Any]:
        arguments = _arguments(where, model)
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise TypeError(f"{where}.{name}: has forward hooks, which are code and cannot be saved; remove them.")
        return {
            "model": {
                "class": self._name(type(model)),
                "arguments": {k: self.value(f"{where}.{k}", v) for k, v in arguments.items()},
                "state": {name: self._tensor(tensor) for name, tensor in state_of(model).items()},
            }
        }

    def _attributes(self, where: str, cls: type, attributes: dict[str, Any]) -> dict[str, Any]:
        for name in attributes:
            try:
                check_attribute(cls, name)
            except FileFormatError as error:
                raise TypeError(
                    f"{where}.{name}: the instance overrides what its class {cls.__qualname__} does; write a subclass "
                    "instead, and pass it to load(path, allow=[...])."
                ) from error
        return {name: self.value(f"{where}.{name}", value) for name, value in attributes.items()}

    def _tensor(self, tensor: Tensor, key: str = "") -> str:
        known = self._keys.get(id(tensor))
        if known is None:
            known = self._keys[id(tensor)] = key or f"argument.{len(self.tensors)}"
            self.tensors[known] = tensor
        return known

    def _name(self, item: Any) -> str:
        name = name_of(item)
        if not is_findable(item):
            raise TypeError(
                f"{name} was made on the fly and is not to be found by its name; define it at the top level of a "
                "module, and take off what torch or Pyro put on (parametrizations, PyroModule[...])."
            )
        self.names[name] = item
        return name


def _arguments(where: str, model: Mechanism) -> dict[str, Any]:
    """What the model was built from, with the defaults of the day: those of a later version may differ."""
    given = getattr(model, "constructor_arguments", None)
    if given is None:
        raise TypeError(f"{where}: does not know what it was built from; build it by calling its class.")
    arguments = {}
    for name, parameter in inspect.signature(type(model).__init__).parameters.items():
        if name in given:
            arguments[name] = given[name]
        elif parameter.default is not parameter.empty:
            arguments[name] = parameter.default
    return arguments
