"""What of an object is its own, and what its class or torch keeps for itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

__all__ = ["TRANSFORM_STATE", "attributes_of", "changed_attributes", "state_of"]

TRANSFORM_STATE: dict[str, Any] = {"_inv": None, "_cached_x_y": (None, None)}
_MODULE_STATE = frozenset(vars(nn.Module()))


def attributes_of(item: Any) -> Iterator[tuple[str, Any]]:
    """The instance attributes that make an object what it is: no caches, none of ``nn.Module``'s own bookkeeping.

    Example:
        >>> dict(attributes_of(nn.ELU()))
        {'alpha': 1.0, 'inplace': False}
    """
    cls = type(item)
    for name, value in vars(item).items():
        if isinstance(item, nn.Module) and name in _MODULE_STATE:
            continue
        if isinstance(item, Transform) and name in TRANSFORM_STATE and not _holds_inverse(cls, name):
            continue
        if not isinstance(inspect.getattr_static(cls, name, None), functools.cached_property):
            yield name, value


def _holds_inverse(cls: type, name: str) -> bool:
    """The inverse view of a transform owns the transform; a transform only remembers, weakly, its inverse view."""
    return name == "_inv" and issubclass(cls, _InverseTransform)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's ``state_dict`` with the tensors themselves.

    Raises:
        TypeError: extra state that is not a tensor.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> state_of(layer)["bias"] is layer.bias
        True
    """
    state = module.state_dict(keep_vars=True)
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise TypeError(f"{strange[0]}: extra state that is not a tensor; make it a buffer, or a constructor argument.")
    return state


def changed_attributes(module: nn.Module, fresh: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain attributes (numbers, strings, tuples of them) that differ from those of a freshly built module.

    Arguments:
        module: any module.
        fresh: what its description builds.

    Returns:
        By the name of the submodule, the attributes with the values of ``module``.

    Raises:
        TypeError: the two have different submodules.

    Example:
        >>> layer = nn.ELU()
        >>> layer.alpha = 2.0
        >>> changed_attributes(layer, nn.ELU())
        {'': {'alpha': 2.0}}
    """
    parts, built = dict(module.named_modules()), dict(fresh.named_modules())
    for name in [*parts, *built]:
        got, wanted = type(built.get(name)), type(parts.get(name))
        if got is not wanted:
            raise TypeError(
                f"{name}: is a {wanted.__name__}, but the constructor's arguments give a {got.__name__}; it was "
                "replaced after construction. Build the model with it instead."
            )
    changes = {name: dict(_changes(part, built[name])) for name, part in parts.items()}
    return {name: change for name, change in changes.items() if change}


def _changes(part: nn.Module, built: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in attributes_of(part):
        if _is_plain(value) and repr(vars(built).get(key, Ellipsis)) != repr(value):
            yield key, value


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)
