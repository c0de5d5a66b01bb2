r"""zuko's continuous transformation, solved row by row.

``CNF`` integrates a free-form field by zuko's own solver. That solver takes one step length for a whole batch, so that
the density of a row changes with its neighbours; it never returns from a field that is not finite; its node in the
graph keeps itself alive; and no function transform can take it. Here the same field goes to
:mod:`pyro_genmods.foundation.ode`. A batch's worst row sets zuko's steps, so its other rows are solved better than was
asked; a row on its own is not, and where its path crosses a kink of the activation the estimate of the error is too
low. Hence a tenth of zuko's tolerance, which takes about as long.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from ..foundation.divergence import exact_divergence
from ..foundation.ode import DormandPrince, odeint
from ..foundation.runge_kutta import Field
from ._zuko import zuko

__all__ = ["with_own_steps"]

T = zuko.transforms
SAFETY = 0.1
_LAZY = zuko.flows.continuous.FFJTransform


class RowwiseTransform(Transform):
    """The flow of a field from one time to another.

    Arguments:
        module: zuko's lazy transformation, which has the field.
        context: of the rows, or ``None``.
        times: ``(2,)``, from start to end.
        solver: adaptive, with zuko's tolerances.
    """

    domain = codomain = constraints.real_vector
    bijective = True
    volume_weight = 1e-2  # in the error of a step, as zuko has it

    def __init__(self, module: torch.nn.Module, context: Tensor | None, times: Tensor, solver: DormandPrince) -> None:
        super().__init__()
        self.module, self.context, self.times, self.solver = module, context, times, solver

    @property
    def inv(self) -> Transform:
        return RowwiseTransform(self.module, self.context, self.times.flip(0), self.solver)

    def _call(self, x: Tensor) -> Tensor:
        return self._solve(self._velocity, x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inv(y)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        end = self._solve(self._augmented, torch.nn.functional.pad(x, (0, 1)))
        return end[..., :-1], end[..., -1] / self.volume_weight

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def _velocity(self, t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
        return self.module.f(t.squeeze(-1) if t.dim() else t, y, c)

    def _augmented(self, t: Tensor, state: Tensor, c: Tensor | None) -> Tensor:
        v, divergence = exact_divergence(lambda y: self._velocity(t, y, c), state[:, :-1])
        return torch.cat([v, self.volume_weight * divergence[:, None]], 1)

    def _solve(self, field: Field, y: Tensor) -> Tensor:
        rows = y.reshape(-1, y.shape[-1])
        context = self.context
        if context is not None:
            context = context.expand(*y.shape[:-1], context.shape[-1]).reshape(len(rows), -1)
        end = odeint(
            field,
            rows,
            self.times,
            self.solver,
            context=context,
            parameters=tuple(self.module.parameters()),
            strict=bool(Distribution._validate_args),
        )
        return end.reshape(y.shape)


def with_own_steps(transform: Transform) -> Transform:
    """The same transformation with its differential equations solved row by row.

    Arguments:
        transform: a zuko transformation.

    Example:
        >>> t = zuko.flows.CNF(2)().transform
        >>> x = torch.randn(3, 2)
        >>> torch.allclose(with_own_steps(t)(x), t(x), atol=1e-3)
        True
    """
    match transform:
        case T.ComposedTransform():
            return T.ComposedTransform(*map(with_own_steps, transform.transforms))
        case T.FreeFormJacobianTransform() if isinstance(transform.f, partial):
            module = getattr(transform.f.func, "__self__", None)
            if not isinstance(module, _LAZY) or not transform.exact:
                return transform
            times = torch.stack([torch.as_tensor(transform.t0), torch.as_tensor(transform.t1)])
            solver = DormandPrince(SAFETY * transform.rtol, SAFETY * transform.atol)
            return RowwiseTransform(module, transform.f.keywords.get("c"), times, solver)
        case _:
            return transform
