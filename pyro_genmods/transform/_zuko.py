"""The one place where zuko is imported.

``import zuko`` switches the argument validation of every torch and Pyro distribution off for the whole process
(``Distribution._validate_args = False``) and empties ``Distribution.arg_constraints``. Here both are put back, and
zuko's own distributions get those two values as their own class attributes instead, so that they behave as their
authors wrote them and nobody else's change. What remains of zuko's import is one additional method,
``Transform.call_and_ladj``, on which its flows depend.
"""

from __future__ import annotations

import inspect
import sys

from torch.distributions import Distribution
from torch.distributions.transforms import _InverseTransform


def _import_zuko() -> None:
    """Import zuko and undo what it does to torch; leave everything alone if the user has imported it before us."""
    if "zuko.distributions" in sys.modules:
        return
    saved = {name: Distribution.__dict__[name] for name in ("_validate_args", "arg_constraints")}
    inverse_name = _InverseTransform.__name__
    import zuko

    for name, value in saved.items():
        setattr(Distribution, name, value)
    _InverseTransform.__name__ = inverse_name
    for cls in vars(zuko.distributions).values():
        if inspect.isclass(cls) and cls.__module__ == zuko.distributions.__name__:
            cls._validate_args = False
            if "arg_constraints" not in vars(cls):
                cls.arg_constraints = {}


_import_zuko()

import zuko  # noqa: E402

__all__ = ["zuko"]
