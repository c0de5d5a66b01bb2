"""Shape annotations, enforced in tests and free for users.

With ``jaxtyping`` installed (the ``test`` extra) ``Float[Tensor, "rows features"]`` is a checked type: the test suite
instruments the package with ``jaxtyping`` and ``beartype`` and every annotated call proves its shapes. Without it the
same annotation means ``Tensor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float
else:
    try:
        from jaxtyping import Float
    except ImportError:

        class Float:
            """Stand-in that reads ``Float[Tensor, "rows features"]`` as ``Tensor``."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]


__all__ = ["Context", "Noise", "Rows", "Values"]

Rows = Float[Tensor, "rows features"]
Noise = Float[Tensor, "rows *noise"]
Context = Float[Tensor, "rows context"]
Values = Float[Tensor, "rows"]
