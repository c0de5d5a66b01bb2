r"""Which names a file may use, and how a name becomes an object without anything being imported or run.

A saved model names classes. Whoever wrote the file chose those names, so each is looked up strictly:

* a name is ``module:qualname``; the module must already be imported, and belong to the packages of :data:`TRUSTED`;
* what is found there must have been *defined* there, under that very name (``zuko.utils:np``, ``torch.nn.modules:os``
  and re-exports are refused), and be a class of the kinds listed, or a plain public function of ``zuko.flows``;
* anything else must have been handed over by the caller, as an object, in ``allow``.

The kinds matter: a class that a file may name is also a class that a rebuilt network may *call*, with arguments of the
file's choosing (zuko's ``Partial`` does). Networks, transforms, distributions and constraints compute on tensors; a
function that writes files must never be nameable. Hence our own rooms are listed by kind too, and of what stands above
them (training, files, inference, diagnostics) nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Distribution, Transform, constraints
from torch.nn import functional

from ..foundation.errors import FileFormatError

__all__ = ["TRUSTED", "AllowList", "check_attribute", "constant_name", "is_findable", "name_of"]

TRUSTED: dict[type, tuple[str, ...]] = {
    nn.Module: ("torch.nn.modules", "zuko", "pyro_genmods"),
    Transform: ("torch.distributions.transforms", "pyro.distributions.transforms", "zuko.transforms", "pyro_genmods"),
    Distribution: ("torch.distributions", "pyro.distributions", "zuko.distributions", "pyro_genmods"),
    constraints.Constraint: ("torch.distributions.constraints", dist.constraints.__name__, "pyro_genmods"),
    enum.Enum: ("pyro_genmods",),
}
_UPSTAIRS = ("diagnostics", "infer", "io", "training")
_FUNCTIONS = ("zuko.flows",)
_ELEMENTWISE = {
    f"{module.__name__}:{name}": getattr(module, name)
    for module, names in (
        (torch, ("abs", "cos", "erf", "exp", "log", "relu", "sigmoid", "sin", "square", "tanh")),
        (functional, ("elu", "gelu", "leaky_relu", "mish", "relu", "selu", "sigmoid", "silu", "softplus", "tanh")),
    )
    for name in names
}
_MODULE_STATE = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module()))


def name_of(item: Any) -> str:
    """The name of a class or function in a file, ``module:qualname``.

    Example:
        >>> name_of(nn.Linear), name_of(torch.tanh)
        ('torch.nn.modules.linear:Linear', 'torch:tanh')
    """
    for name, function in _ELEMENTWISE.items():
        if item is function:
            return name
    return f"{item.__module__}:{item.__qualname__}"


def is_findable(item: Any) -> bool:
    """Whether a class or function is found by its name, or can be handed over by the function that defines it.

    Example:
        >>> is_findable(nn.Linear), is_findable(lambda x: x)
        (True, False)
    """
    module, _, qualname = name_of(item).partition(":")
    if "<lambda>" in qualname:
        return False
    if module == "__main__" or "<locals>" in qualname:
        return True
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found is item


def constant_name(value: constraints.Constraint) -> str | None:
    """The name under which the module of a trusted constraint's class keeps this very object, if it does.

    Example:
        >>> constant_name(constraints.simplex), constant_name(constraints.interval(0.0, 1.0))
        ('torch.distributions.constraints:simplex', None)
    """
    module = type(value).__module__
    if not _within(module, TRUSTED[constraints.Constraint]):
        return None
    return next((f"{module}:{name}" for name, item in _contents(module).items() if item is value), None)


def check_attribute(cls: type, name: str) -> None:
    """Refuse attribute names that could change what an object does instead of what it holds.

    Arguments:
        cls: class of the object.
        name: an attribute, parameter, buffer or child that a file wants to set on it.

    Raises:
        FileFormatError: a dunder, a method or property of the class, or part of ``nn.Module``'s own state.

    Example:
        >>> check_attribute(nn.Linear, "in_features")
        >>> check_attribute(nn.Linear, "forward")
        Traceback (most recent call last):
        ...
        pyro_genmods.foundation.errors.FileFormatError: attribute 'forward' of Linear: a file may not set it.
    """
    inherited = inspect.getattr_static(cls, name, None)
    own = issubclass(cls, nn.Module) and name in _MODULE_STATE
    if own or name.startswith("__") or callable(inherited) or hasattr(type(inherited), "__get__"):
        raise FileFormatError(f"attribute {name[:80]!r} of {cls.__name__}: a file may not set it.")


class AllowList:
    """The classes and functions that one call of ``load`` may use.

    Arguments:
        allow: what the caller vouches for, besides :data:`TRUSTED`.

    Example:
        >>> AllowList().find("torch.nn.modules.linear:Linear", nn.Module)
        <class 'torch.nn.modules.linear.Linear'>
        >>> AllowList().find("os:system", nn.Module)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pyro_genmods.foundation.errors.FileFormatError: the file names 'os:system', which is outside the allow-list...
    """

    def __init__(self, allow: Sequence[Callable[..., Any]] = ()) -> None:
        self.given = {name_of(item): item for item in allow}

    def find(self, name: str, *kinds: type) -> type:
        """The class called ``name``.

        Arguments:
            name: ``module:qualname``.
            kinds: base classes, one of which it must have; none for any class of the list.

        Raises:
            FileFormatError: outside the allow-list, missing from the installed packages, or of another kind.
        """
        item = self._given(name)
        item = self._trusted_class(name) if item is None else item
        if not isinstance(item, type) or (kinds and not issubclass(item, kinds)):
            wanted = " or ".join(kind.__name__ for kind in kinds) or "class"
            raise FileFormatError(f"the file uses {name[:200]!r} as a {wanted}, which it is not.")
        return item

    def callable(self, name: str) -> Callable[..., Any]:
        """The class or function called ``name``, for an attribute that the network calls.

        Raises:
            FileFormatError: outside the allow-list, or missing from the installed packages.
        """
        item = self._given(name)
        if item is not None:
            return item
        if name in _ELEMENTWISE:
            return _ELEMENTWISE[name]
        item = _defined(name) if _within(name.partition(":")[0], _FUNCTIONS) else None
        if isinstance(item, types.FunctionType) and not item.__name__.startswith("_"):
            return item
        return self._trusted_class(name)

    def constant(self, name: str) -> constraints.Constraint:
        """The constraint that a trusted module keeps under a name, such as ``constraints.simplex``.

        Raises:
            FileFormatError: there is none.
        """
        module, _, attribute = name.partition(":")
        value = _contents(module).get(attribute) if _within(module, TRUSTED[constraints.Constraint]) else None
        if not isinstance(value, constraints.Constraint):
            raise FileFormatError(f"the file names the constraint {name[:200]!r}, which does not exist here.")
        return value

    def _given(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        module, _, qualname = name.partition(":")
        if module != "__main__":
            return None
        # a class saved from a script has no module name; the caller's object may come from anywhere
        return next((item for key, item in self.given.items() if key.partition(":")[2] == qualname), None)

    def _trusted_class(self, name: str) -> type:
        if not any(_within(name.partition(":")[0], places) for places in TRUSTED.values()):
            raise _outside(name)
        item = _defined(name)
        if item is None:
            raise FileFormatError(f"the file names {name[:200]!r}, which the installed version of its package lacks.")
        if not isinstance(item, type) or not _trusted_kind(item):
            raise _outside(name)
        return item


def _outside(name: str) -> FileFormatError:
    short = name.rpartition(":")[2].rpartition(".")[2]
    return FileFormatError(
        f"the file names {name[:200]!r}, which is outside the allow-list; if you trust it, import it and pass "
        f"load(path, allow=[{short[:80]}])."
    )


def _contents(module: str) -> dict[str, Any]:
    found = sys.modules.get(module)
    return vars(found) if isinstance(found, types.ModuleType) else {}


def _defined(name: str) -> Any:
    """What an imported module defines at its top level under a name, not what it imported from elsewhere."""
    module, _, qualname = name.partition(":")
    item = _contents(module).get(qualname)
    if getattr(item, "__module__", None) != module or getattr(item, "__qualname__", None) != qualname:
        return None
    return item


def _trusted_kind(item: type) -> bool:
    package, _, floor = item.__module__.partition(".")
    if package == "pyro_genmods":
        if floor.startswith(_UPSTAIRS):
            return False
        if dataclasses.is_dataclass(item):
            return True
    return any(issubclass(item, kind) and _within(item.__module__, places) for kind, places in TRUSTED.items())


def _within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)
