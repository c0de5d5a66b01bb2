"""Running a program in silence: without validation, and with failures that are numbers instead of exceptions.

A batch of chains visits points where a covariance is not positive definite or a matrix is singular. For one chain an
exception may do; in a batch it would end all others. Inside :func:`quiet` such operations return NaN where they fail,
which is an energy that no chain accepts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops import special
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from ..foundation.forces import Licence, allowed

__all__ = ["Reached", "quiet", "value_and_grad"]


def _cholesky(x: Tensor, *, upper: bool = False) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(x, upper=upper)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def _inverse(x: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(x)
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)


def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    solution, info = torch.linalg.solve_ex(a, b, left=left)
    vector = b.dim() == a.dim() - 1
    return torch.where((info == 0)[..., None] if vector else (info == 0)[..., None, None], solution, torch.nan)


def _initialize(self: Distribution, *args: Any, **kwargs: Any) -> None:
    """The constructor of all distributions, without validation even where it is asked for."""
    shapes = {name: value for name, value in kwargs.items() if name != "validate_args"}
    _INITIALIZE(self, *args[:2], **shapes, validate_args=False)


def _validate_nothing(self: Distribution, value: Tensor) -> None:
    """In the place of the check of values, which distributions made elsewhere still want to run."""


def _iterate(self: IndepMessenger) -> Iterator[int]:
    """A sequential plate that counts by itself, where Pyro reads numbers out of a tensor of indices."""
    if self._vectorized is not False and (self._vectorized or self.dim is not None):
        yield from _ITERATE(self)
        return
    self._vectorized = False
    for i in range(self.size):
        self.next_context()
        with self:
            yield i


_INITIALIZE, _ITERATE = Distribution.__init__, IndepMessenger.__iter__
TOTAL = (
    (Distribution, "__init__", _initialize),
    (Distribution, "_validate_sample", _validate_nothing),
    (IndepMessenger, "__iter__", _iterate),
    (torch.linalg, "cholesky", _cholesky),
    (torch.linalg, "inv", _inverse),
    (torch, "inverse", _inverse),
    (torch.linalg, "solve", _solve),
)


class _SafeLog(torch.autograd.Function):
    """Pyro's logarithm with a bounded gradient at zero, in the form that functorch understands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x.clamp(min=torch.finfo(x.dtype).eps)


class Reached(Messenger):
    """Remembers which sites a program reached, to say where it failed.

    Attributes:
        names: of the sites reached since the context was entered, in order.
    """

    def __enter__(self) -> Reached:
        self.names: list[str] = []
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.names.append(msg["name"])


@contextlib.contextmanager
def quiet(enumerated: bool = False) -> Iterator[Licence]:
    """Without validation and outer handlers; with total linear algebra, and a logarithm that functorch understands.

    Yields:
        The licence of surrogate forces, which says whether one was met.
    """
    changes = [*TOTAL, (special, "_SafeLog", _SafeLog)] if enumerated else TOTAL
    before = [getattr(module, name) for module, name, _ in changes]
    with poutine.block(), pyro.validation_enabled(False), allowed() as licence:
        try:
            for module, name, function in changes:
                setattr(module, name, function)
            yield licence
        finally:
            for (module, name, _), function in zip(changes, before, strict=True):
                setattr(module, name, function)


def value_and_grad(energy: Callable[[Tensor], Tensor], q: Tensor, enumerated: bool = False) -> tuple[Tensor, Tensor]:
    """Energies of rows and their gradients, by autograd."""
    leaf = q.detach().requires_grad_()
    with torch.enable_grad(), quiet(enumerated):
        values = energy(leaf)
        (gradients,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradients.detach()
