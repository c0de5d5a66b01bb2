r"""Gradients of the Knothe-Rosenblatt map without a graph through its places.

Draws :math:`x(z, \theta)` solve :math:`G_\theta(x) = z` with :math:`G_t = \Phi^{-1}(F_t(x_t \mid x_{<t}))`, which all
places evaluate in one pass. Differentiating the equation,

.. math:: \mathrm dx = J^{-1} (\mathrm dz - \partial_\theta G \, \mathrm d\theta), \qquad J = \partial G / \partial x ,

so a cotangent :math:`g` of :math:`x` becomes :math:`v = J^{-\top} g` for :math:`z` and
:math:`-v^\top \partial_\theta G` for :math:`\theta`. :math:`J = D + N` is triangular in the order of the places:
:math:`v \leftarrow D^{-1}(g - N^\top v)` is exact after ``T`` sweeps, and stops earlier when nothing changes. An entry
depends on the others through the parameters :math:`\eta_t` of its conditional alone, so that
:math:`N^\top v` is a vector-Jacobian product of the network with the cotangents
:math:`v_t \, \partial G_t / \partial \eta_t`, whose slopes are computed once.

Reference:
    M. Figurnov, S. Mohamed, A. Mnih, Implicit Reparameterization Gradients, 2018, arXiv:1805.08498.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from ..foundation.causal import transformed
from .factorization import Factorization
from .walk import solve

__all__ = ["attach", "push"]

ROUNDING = 4  # sweeps stop when no entry of a row changes by more than this, in units of rounding of its largest


def push(model: Factorization, z: Tensor, c: Tensor | None, method: str = "auto") -> Tensor:
    """Rows of noise to rows of continuous entries, differentiable in noise, context and the network's parameters.

    Arguments:
        model: has one order.
        z: ``(rows, T)``.
        c: rows of context or ``None``.
        method: of :func:`pyro_genmods.factorize.walk.solve`.
    """
    named = dict(model.network.named_parameters())
    if not (_differentiable(z, c, *named.values()) or transformed()):
        return solve(model, z, c, method)
    return _Push.apply(_Pass(model, tuple(named), method), z, c, *named.values())


def attach(model: Factorization, x: Tensor, c: Tensor | None) -> Tensor:
    """Give draws of the model, made in whatever way, the gradient that they have as a push of their own noise.

    Arguments:
        model: has one order.
        x: ``(rows, T)``, without gradient.
        c: rows of context or ``None``.
    """
    named = dict(model.network.named_parameters())
    if not _differentiable(c, *named.values()):
        return x
    return _Push.apply(_Pass(model, tuple(named), "given"), x, c, *named.values())


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Pass(nn.Module):
    """What a push evaluates: the solver, and one pass of the network, with any parameters in place of its own."""

    def __init__(self, model: Factorization, names: tuple[str, ...], method: str) -> None:
        super().__init__()
        self.network = model.network
        object.__setattr__(self, "model", model)
        self.names, self.method = names, method

    def forward(self, task: str, x: Tensor, c: Tensor | None) -> Tensor:
        if task == "parameters":
            return self.model.parameters_of(x, c)
        return x.clone() if self.method == "given" else solve(self.model, x, c, self.method)

    def at(self, parameters: tuple[Tensor, ...], task: str, x: Tensor, c: Tensor | None) -> Tensor:
        """The task with these parameters in place of the network's own."""
        named = {f"network.{name}": value for name, value in zip(self.names, parameters, strict=True)}
        return functional_call(self, named, (task, x, c))


class _Push(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(run: _Pass, z: Tensor, c: Tensor | None, *parameters: Tensor) -> Tensor:
        return run.at(parameters, "solve", z, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.run, _, c, *parameters = inputs
        ctx.conditional = c is not None
        ctx.save_for_backward(output, *([c] if ctx.conditional else []), *parameters)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *leaves = ctx.saved_tensors
        v, cotangent = _solve_transposed(ctx.run, x, *_split(ctx, leaves), g)
        wanted = ctx.needs_input_grad[2 if ctx.conditional else 3 :]
        gradients: list[Tensor | None] = [None] * len(leaves)
        chosen = [i for i, want in enumerate(wanted) if want]
        if chosen:

            def parameters_of(*some: Tensor) -> Tensor:
                every = list(leaves)
                for i, value in zip(chosen, some, strict=True):
                    every[i] = value
                c, parameters = _split(ctx, every)
                return ctx.run.at(parameters, "parameters", x, c)

            _, pullback = _pullback(parameters_of, *(leaves[i] for i in chosen), repeatable=False)
            for i, gradient in zip(chosen, pullback(-cotangent), strict=True):
                gradients[i] = gradient
        return (None, v, *([] if ctx.conditional else [None]), *gradients)


def _pullback(
    f: Callable[..., Tensor], *inputs: Tensor, repeatable: bool = True
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Value of a function and its vector-Jacobian product: ``vjp``, or torch's ordinary graph where that will do.

    The ordinary graph lets go of its memory at once; ``vjp`` is there for transforms, tracers and second derivatives.
    """
    if transformed() or torch.is_grad_enabled():
        return vjp(f, *inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        value = f(*leaves)

    def pullback(cotangent: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(value, leaves, cotangent, retain_graph=repeatable, allow_unused=True)
        return tuple(torch.zeros_like(x) if slope is None else slope for x, slope in zip(leaves, found, strict=True))

    return value.detach(), pullback


def _split(ctx: Any, leaves: list[Tensor]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Context and parameters."""
    return (leaves[0], tuple(leaves[1:])) if ctx.conditional else (None, tuple(leaves))


def _solve_transposed(
    run: _Pass, x: Tensor, c: Tensor | None, parameters: tuple[Tensor, ...], g: Tensor
) -> tuple[Tensor, Tensor]:
    r""":math:`v` with :math:`J^\top v = g`, from the last place to the first, and its cotangents for the network."""
    if not torch.is_grad_enabled():  # of the network, only what entries do to entries is wanted here
        parameters, c = tuple(p.detach() for p in parameters), None if c is None else c.detach()
    eta, by_others = _pullback(lambda seen: run.at(parameters, "parameters", seen, c), x)
    _, by_conditional = _pullback(run.model.conditional.normal_score, eta, x, repeatable=False)
    slope_of_eta, slope = by_conditional(torch.ones_like(x))
    v = g / slope
    for _ in range(x.shape[1] - 1):
        before, v = v, (g - by_others(slope_of_eta * v[..., None])[0]) / slope
        small = ROUNDING * torch.finfo(v.dtype).eps * v.abs().amax(1, keepdim=True)
        if not transformed() and bool(((v - before).abs() <= small).all()):
            break
    return v, slope_of_eta * v[..., None]
