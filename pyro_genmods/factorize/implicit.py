r"""Gradients of the Knothe-Rosenblatt map without a graph through its places.

Draws :math:`x(z, \theta)` solve :math:`G_\theta(x) = z` with :math:`G_t = \Phi^{-1}(F_t(x_t \mid x_{<t}))`, which all
places evaluate in one pass. Differentiating the equation,

.. math:: \mathrm dx = J^{-1} (\mathrm dz - \partial_\theta G \, \mathrm d\theta), \qquad J = \partial G / \partial x ,

so a cotangent :math:`g` of :math:`x` becomes :math:`v = J^{-\top} g` for :math:`z` and
:math:`-v^\top \partial_\theta G` for :math:`\theta`. :math:`J = D + N` is triangular in the order of the places:
:math:`v \leftarrow D^{-1}(g - N^\top v)` is exact after ``T`` sweeps, each a vector-Jacobian product of one pass, and
stops earlier when nothing changes.

Reference:
    M. Figurnov, S. Mohamed, A. Mnih, Implicit Reparameterization Gradients, 2018, arXiv:1805.08498.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from ..foundation.causal import transformed
from .factorization import Factorization
from .walk import solve

__all__ = ["attach", "push"]


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
    return _Push.apply(_Scores(model, tuple(named), method), z, c, *named.values())


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
    return _Push.apply(_Scores(model, tuple(named), "given"), x, c, *named.values())


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Scores(nn.Module):
    """Normal scores of all entries as a function of what they depend on."""

    def __init__(self, model: Factorization, names: tuple[str, ...], method: str) -> None:
        super().__init__()
        self.network = model.network
        object.__setattr__(self, "model", model)
        self.names, self.method = names, method

    def forward(self, task: str, *tensors: Tensor | None) -> Tensor:
        if task == "solve":
            if self.method == "given":
                return tensors[0].clone()
            return solve(self.model, *tensors, self.method)
        seen, x, c = tensors
        return self.model.conditional.normal_score(self.model.parameters_of(seen, c), x)

    def at(self, parameters: tuple[Tensor, ...], task: str, *tensors: Tensor | None) -> Tensor:
        """The function with these parameters in place of the network's own."""
        named = {f"network.{name}": value for name, value in zip(self.names, parameters, strict=True)}
        return functional_call(self, named, (task, *tensors))


class _Push(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores: _Scores, z: Tensor, c: Tensor | None, *parameters: Tensor) -> Tensor:
        return scores.at(parameters, "solve", z, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scores, _, c, *parameters = inputs
        ctx.conditional = c is not None
        ctx.save_for_backward(output, *([c] if ctx.conditional else []), *parameters)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        c, parameters = (rest[0], rest[1:]) if ctx.conditional else (None, rest)
        scores: _Scores = ctx.scores
        v = _solve_transposed(scores, x, c, tuple(parameters), g)
        leaves = tuple(rest)
        wanted = ctx.needs_input_grad[2:] if ctx.conditional else ctx.needs_input_grad[3:]
        gradients: list[Tensor | None] = [None] * len(leaves)
        if any(wanted):
            chosen = [i for i, want in enumerate(wanted) if want]

            def of(*some: Tensor) -> Tensor:
                every = list(leaves)
                for i, value in zip(chosen, some, strict=True):
                    every[i] = value
                context, theta = (every[0], every[1:]) if ctx.conditional else (None, every)
                return scores.at(tuple(theta), "score", x, x, context)

            _, pullback = vjp(of, *(leaves[i] for i in chosen))
            for i, gradient in zip(chosen, pullback(-v), strict=True):
                gradients[i] = gradient
        return (None, v, *([] if ctx.conditional else [None]), *gradients)


def _solve_transposed(
    scores: _Scores, x: Tensor, c: Tensor | None, parameters: tuple[Tensor, ...], g: Tensor
) -> Tensor:
    r""":math:`v` with :math:`J^\top v = g`, by sweeps from the last place to the first."""
    _, by_others = vjp(lambda seen: scores.at(parameters, "score", seen, x, c), x)
    _, by_itself = vjp(lambda own: scores.at(parameters, "score", x, own, c), x)
    (slope,) = by_itself(torch.ones_like(x))
    v = g / slope
    for _ in range(x.shape[1] - 1):
        before, v = v, (g - by_others(v)[0]) / slope
        if not transformed() and bool(((v - before).abs() <= 4 * torch.finfo(v.dtype).eps * v.abs()).all()):
            break
    return v
