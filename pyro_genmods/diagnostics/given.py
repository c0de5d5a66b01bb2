"""A program with some sites given and others drawn, also where its data were observed, and under ``torch.vmap``.

Pyro draws a site by ``rsample`` where it can, which fills an empty tensor with noise. Under ``torch.vmap`` that tensor
is one for all rows, and functorch refuses to fill it with different numbers. Here sites are drawn by ``sample``,
without a gradient, and a tensor that is filled is first copied for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Given", "OwnNoise"]


class Given(Messenger):
    """Give sites their values, which leaves them latents if they are, and draw others, also where data were observed.

    Arguments:
        values: by site.
        new: data sites that are drawn.
        row: a zero of the row that ``torch.vmap`` is at, else ``None``.
    """

    def __init__(self, values: Mapping[str, Tensor], new: Iterable[str], row: Tensor | None) -> None:
        super().__init__()
        self._values, self._new, self._row = values, frozenset(new), row

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self._values:
            msg["value"] = self._values[name]
        elif name in self._new or (msg["value"] is None and not site_is_subsample(msg)):
            msg["value"], msg["is_observed"] = None, False
            with suppress(NotImplementedError), nullcontext() if self._row is None else OwnNoise(self._row):
                msg["value"] = msg["fn"].sample(*msg["args"], **msg["kwargs"])


class OwnNoise(TorchFunctionMode):
    """Noise for each row of ``torch.vmap``, which refuses to fill a tensor that the rows share with different numbers.

    What is filled is a copy for each row. Samplers return it; to one that reads the shared tensor afterwards it is NaN.
    """

    FILLS = frozenset(
        getattr(Tensor, name)
        for name in ("cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "uniform_")
    )

    def __init__(self, row: Tensor) -> None:
        super().__init__()
        self._row = row

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FILLS and args[0].is_floating_point():
            own = torch.zeros_like(args[0]) + self._row.to(args[0])
            args[0].fill_(torch.nan)
            args = (own, *args[1:])
        return func(*args, **(kwargs or {}))
