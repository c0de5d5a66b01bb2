r"""A density with a force of its own: dear values, cheap gradients, where an accept test makes that right.

A leapfrog step with any fixed field :math:`F` in the place of :math:`\nabla \log \pi`,

.. math:: p \leftarrow p + \tfrac{\epsilon}{2} F(q), \qquad q \leftarrow q + \epsilon p, \qquad
          p \leftarrow p + \tfrac{\epsilon}{2} F(q),

is a composition of shears: its Jacobian determinant is one, and with the momentum reversed it undoes itself. The accept
test :math:`\min(1, e^{-\Delta H})` with the true :math:`H = -\log \pi(q) + |p|^2 / 2` at both ends therefore leaves
:math:`\pi` invariant whatever :math:`F` is, the gradient of something or not; how good it is shows in the rate of
acceptance alone. For a diffusion prior :math:`\log \pi` is the integral of an ordinary differential equation, and a
learned score, its force, one call of a network.

Five conditions: the force is a fixed, deterministic function of the position while a chain runs (no dropout, no update
of weights, no new probe); so is the density, by one rule at both ends; the kinetic energy is even; step size and mass
are frozen after warm-up; the force depends on other latents through the position only.

Without an accept test a surrogate force is wrong: Langevin steps sample another law, and variational inference and
maximisation of the posterior stop at another point. So :func:`with_force` refuses to be differentiated except inside
:func:`allowed`, which kernels with an accept test enter.

References:
    S. Duane, A. Kennedy, B. Pendleton, D. Roweth, Hybrid Monte Carlo, 1987, Physics Letters B 195. R. Neal, MCMC using
    Hamiltonian dynamics, 2011, arXiv:1206.1901, section 5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import DensityError, ShapeError

__all__ = ["Licence", "allowed", "with_force"]

RowFunction = Callable[..., Tensor]


@dataclass
class Licence:
    """That gradients are used as forces only.

    Attributes:
        used: whether a surrogate force was met.

    Example:
        >>> with allowed() as licence:
        ...     x = torch.zeros(2, 1, requires_grad=True)
        ...     _ = with_force(lambda x: x.sum(-1), torch.sin, x)
        >>> licence.used
        True
    """

    used: bool = False


_LICENCES: ContextVar[tuple[Licence, ...]] = ContextVar("licences", default=())


@contextlib.contextmanager
def allowed() -> Iterator[Licence]:
    """Let surrogate forces act; for kernels that end with an accept test of the true density.

    What is evaluated inside may be differentiated, inside and later. Licences nest.

    Yields:
        A licence that tells whether a surrogate force was met.

    Example:
        >>> x = torch.ones(3, 2, requires_grad=True)
        >>> with allowed():
        ...     value = with_force(lambda x: (x**2).sum(-1), lambda x: 7 * x, x)
        >>> torch.autograd.grad(value.sum(), x)[0][0]
        tensor([7., 7.])
    """
    licence = Licence()
    token = _LICENCES.set((*_LICENCES.get(), licence))
    try:
        yield licence
    finally:
        _LICENCES.reset(token)


def with_force(value: RowFunction, force: RowFunction, x: Tensor, *others: Tensor | None) -> Tensor:
    r"""Values of a function of rows, whose gradient is said to be a given field.

    In a recorded graph (:mod:`pyro_genmods.foundation.graphs`) of the gradient alone nothing is left of ``value``, and
    in one of the value nothing of ``force``. ``torch.vmap`` runs all rows of its batches together.

    Arguments:
        value: ``value(x, *others)`` to ``(rows,)``, row by row.
        force: ``force(x, *others)`` to ``(rows, n)``, row by row: taken for the gradient of ``value`` to ``x``.
        x: ``(rows, n)``.
        others: further arguments, with a row for each of ``x``, or ``None``. They, and the parameters that the two
            functions hold on to, are given no gradient: the law is frozen.

    Returns:
        ``(rows,)``.

    Raises:
        ShapeError: the outcome of ``value`` or of ``force`` has another shape.
        DensityError: it is differentiated though evaluated outside :func:`allowed`, or differentiated twice, or
            forwards.

    Example:
        >>> x = torch.tensor([[0.0, 2.0]], requires_grad=True)
        >>> value = with_force(lambda x: x.prod(-1), torch.ones_like, x)
        >>> value.detach(), value.requires_grad
        (tensor([0.]), True)
        >>> value.backward()
        Traceback (most recent call last):
            ...
        pyro_genmods.foundation.errors.DensityError: with_force: this density has a surrogate force, ...
    """
    if x.dim() != 2:
        raise ShapeError(f"x: got shape {tuple(x.shape)}, needs (rows, n).")
    licences = _LICENCES.get()
    for licence in licences:
        licence.used = True
    return _Surrogate.apply(_Functions(value, force, bool(licences)), x, *others)


@dataclass(frozen=True)
class _Functions:
    """A value, its force, and whether the force may be used."""

    value: RowFunction
    force: RowFunction
    licensed: bool

    def values(self, x: Tensor, others: tuple[Tensor | None, ...]) -> Tensor:
        return _of_shape("value", self.value(x, *others), x.shape[:1])

    def forces(self, x: Tensor, others: tuple[Tensor | None, ...]) -> Tensor:
        return _of_shape("force", self.force(x, *others), x.shape)


class _Surrogate(torch.autograd.Function):
    """The value; backwards the force."""

    @staticmethod
    def forward(functions: _Functions, x: Tensor, *others: Tensor | None) -> Tensor:
        return functions.values(x, others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        ctx.functions, x, *others = inputs
        ctx.given = [other is not None for other in others]
        ctx.save_for_backward(x, *(other for other in others if other is not None))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.functions.licensed:
            raise _unlicensed()
        x, *saved = ctx.saved_tensors
        rest = iter(saved)
        others = [next(rest) if given else None for given in ctx.given]
        back = _Push.apply(ctx.functions, cotangent, x, *others) if ctx.needs_input_grad[1] else None
        return (None, back, *(None for _ in others))

    @staticmethod
    def jvp(_ctx: Any, *_tangents: Any) -> Tensor:
        raise _twice()

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], functions: _Functions, x: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, int]:
        values = _Surrogate.apply(functions, *_flat_rows(info.batch_size, in_dims[1:], (x, *others)))
        return values.unflatten(0, (info.batch_size, -1)), 0


class _Push(torch.autograd.Function):
    """The cotangent times the force; it has no derivative."""

    @staticmethod
    def forward(functions: _Functions, cotangent: Tensor, x: Tensor, *others: Tensor | None) -> Tensor:
        return cotangent.unsqueeze(-1) * functions.forces(x, others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(_ctx: Any, _cotangent: Tensor) -> tuple[None, ...]:
        raise _twice()

    @staticmethod
    def jvp(_ctx: Any, *_tangents: Any) -> Tensor:
        raise _twice()

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], functions: _Functions, cotangent: Tensor, x: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, int]:
        rows = _flat_rows(info.batch_size, in_dims[1:], (cotangent, x, *others))
        return _Push.apply(functions, *rows).unflatten(0, (info.batch_size, -1)), 0


def _flat_rows(size: int, dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The rows of all batches as rows of one."""
    batched = [
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]
    return [x if x is None else x.flatten(0, 1) for x in batched]


def _of_shape(name: str, outcome: Tensor, shape: torch.Size) -> Tensor:
    if outcome.shape != shape:
        raise ShapeError(f"{name}: its outcome has shape {tuple(outcome.shape)}, needs {tuple(shape)}.")
    return outcome


def _unlicensed() -> DensityError:
    return DensityError(
        "with_force: this density has a surrogate force, which is right only inside a sampler with an accept test of "
        "the density itself (infer.HMC, infer.MALA). SVI, MAP and Langevin steps without the test would converge to "
        "something else: use the exact gradient, or move to noise space by infer.PushforwardReparam."
    )


def _twice() -> DensityError:
    return DensityError(
        "with_force: got a second or a forward derivative, but a surrogate force has none, for it need not be the "
        "gradient of anything; use the exact gradient, or move to noise space by infer.PushforwardReparam."
    )
