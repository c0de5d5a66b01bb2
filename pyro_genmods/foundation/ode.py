r"""Ordinary differential equations :math:`\dot y = v(t, y, c)` for many rows at once.

Fixed steps of an explicit Runge-Kutta method of :math:`s` stages on a grid :math:`t_0, \dots, t_N`,

.. math:: k_i = v\Big(t_n + c_i h,\; y_n + h \sum_{j<i} a_{ij} k_j\Big), \qquad y_{n+1} = y_n + h \sum_i b_i k_i ,

are a map without branches: deterministic, the same for a row alone and in a batch, and recorded by ``vmap`` and
``make_fx`` as it stands. :class:`DormandPrince` chooses the steps of every row by an embedded error estimate, in a loop
that looks at numbers; ``vmap`` takes it by a rule of its own, a recorder cannot.

The gradient is that of the map which was evaluated, in one of two ways. ``"autograd"`` keeps the graph of all steps.
``"adjoint"`` keeps the states between steps and runs the *discrete adjoint*,

.. math:: \lambda_n = \left(\frac{\partial y_{n+1}}{\partial y_n}\right)^{\!\top} \lambda_{n+1}, \qquad
          \nabla_\theta = \sum_n \left(\frac{\partial y_{n+1}}{\partial \theta}\right)^{\!\top} \lambda_{n+1},

repeating one step at a time: memory of one step instead of all, for one more evaluation of the field, and equal to
autograd up to rounding (the adjoint *equation*, solved backwards, is so only up to the solver's tolerance).

References:
    J. R. Dormand, P. J. Prince, A family of embedded Runge-Kutta formulae, Journal of Computational and Applied
    Mathematics 6 (1980) 19-26. E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, 1993.
    R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud, Neural Ordinary Differential Equations, 2018,
    arXiv:1806.07366. J. Zhuang et al., Adaptive Checkpoint Adjoint Method, 2020, arXiv:2006.02493.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .adaptive import Accuracy, Step, adaptive_steps
from .causal import transformed
from .errors import IntegrationError
from .runge_kutta import DORMAND_PRINCE, EULER, HEUN, RUNGE_KUTTA, Field, Tableau, runge_kutta_step

__all__ = ["RK4", "DormandPrince", "Euler", "FixedStep", "Heun", "Solver", "odeint"]


@dataclass(frozen=True)
class Solver(ABC):
    """How an equation is solved: a method, its accuracy, and how its gradient is taken.

    Attributes:
        tableau: coefficients of the method. Its ``order`` :math:`p` says that the error falls like :math:`h^p`.
        evaluations: sequential evaluations of the field, ``None`` where the solver decides.

    Example:
        >>> [(type(solver).__name__, solver.order) for solver in (Euler(), Heun(), RK4(), DormandPrince())]
        [('Euler', 1), ('Heun', 2), ('RK4', 4), ('DormandPrince', 5)]
    """

    tableau: ClassVar[Tableau]

    @property
    def order(self) -> int:
        """Order of the method."""
        return self.tableau.order

    @property
    @abstractmethod
    def evaluations(self) -> int | None:
        """Sequential evaluations of the field."""

    @abstractmethod
    def refined(self) -> Solver:
        """A more accurate one of the same kind, to measure the error of this one."""


@dataclass(frozen=True)
class FixedStep(Solver):
    """A fixed number of steps.

    Arguments:
        steps: how many.
        gradient: ``"autograd"`` or ``"adjoint"``, see the module.

    Raises:
        ValueError: fewer than one step, or another gradient.

    Example:
        >>> RK4(16).refined()
        RK4(steps=32, gradient='adjoint')
    """

    steps: int = 16
    gradient: Literal["adjoint", "autograd"] = "adjoint"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, needs at least 1.")
        _check_gradient(self.gradient)

    @property
    def evaluations(self) -> int:
        """Stages times steps."""
        return self.tableau.stages * self.steps

    def refined(self) -> FixedStep:
        """Twice as many steps."""
        return replace(self, steps=2 * self.steps)


@dataclass(frozen=True)
class Euler(FixedStep):
    """Euler's method, order 1, one evaluation a step.

    Example:
        >>> Euler(8).evaluations, Euler(8).order
        (8, 1)
    """

    tableau: ClassVar[Tableau] = EULER


@dataclass(frozen=True)
class Heun(FixedStep):
    """Heun's method, the explicit trapezoidal rule, order 2, two evaluations a step.

    Example:
        >>> Heun(8).evaluations, Heun(8).order
        (16, 2)
    """

    tableau: ClassVar[Tableau] = HEUN


@dataclass(frozen=True)
class RK4(FixedStep):
    """The classical Runge-Kutta method, order 4, four evaluations a step.

    Example:
        >>> RK4(8).evaluations, RK4(8).order
        (32, 4)
    """

    tableau: ClassVar[Tableau] = RUNGE_KUTTA


@dataclass(frozen=True)
class DormandPrince(Solver):
    r"""The pair of Dormand and Prince, order 5 with an embedded order 4, steps chosen for every row.

    A step is accepted if the root mean square over the columns of its error, in units of
    :math:`\mathrm{atol} + \mathrm{rtol} \max(|y_n|, |y_{n+1}|)`, is at most one. The last stage of an accepted step is
    the first of the next, so that a step takes six evaluations.

    Arguments:
        rtol, atol: relative and absolute tolerance of a step.
        max_steps: most steps that are tried; a stiff field needs more, and is refused.
        gradient: ``"adjoint"`` or ``"autograd"``; the choice of the steps is not differentiated.

    Raises:
        ValueError: a tolerance or number of steps that is not positive, or another gradient.

    Example:
        >>> DormandPrince(rtol=1e-6).order
        5
    """

    tableau: ClassVar[Tableau] = DORMAND_PRINCE
    rtol: float = 1e-5
    atol: float = 1e-6
    max_steps: int = 1000
    gradient: Literal["adjoint", "autograd"] = "adjoint"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "max_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, needs a positive number.")
        _check_gradient(self.gradient)

    @property
    def evaluations(self) -> None:
        """The solver decides."""
        return None

    def refined(self) -> DormandPrince:
        """A tenth of the tolerance."""
        return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)


def odeint(
    field: Field,
    y: Tensor,
    times: Tensor,
    solver: Solver,
    *,
    context: Tensor | None = None,
    parameters: Sequence[Tensor] = (),
    strict: bool = True,
    report: list[int] | None = None,
) -> Tensor:
    """Solve an initial value problem for every row.

    Arguments:
        field: ``field(t, y, c)``, the velocity ``(rows, n)`` at time ``t``, which is ``()`` for fixed steps and
            ``(rows, 1)`` where every row has its own.
        y: where the rows start, ``(rows, n)``.
        times: an increasing or decreasing grid ``(points,)`` from start to end. With two points, fixed steps are
            equally long; with more, they end at these points, whose number is then ``steps + 1``. Adaptive solvers look
            at the first and the last.
        solver: how.
        context: rows that the field needs besides, ``(rows, m)``.
        parameters: what else the field depends on and gradients are wanted of, for ``gradient="adjoint"``.
        strict: raise where a row cannot be solved; else the row is NaN.
        report: a list, to which the number of sequential evaluations of the field is appended.

    Returns:
        Where the rows end, ``(rows, n)``.

    Raises:
        IntegrationError: the field is not finite where a row comes by, or the step limit is reached.
        ValueError: the grid does not have the steps of the solver.

    Example:
        >>> y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> quarter = torch.tensor([0.0, torch.pi / 2], dtype=torch.float64)
        >>> odeint(lambda t, y, c: y @ turn, y, quarter, RK4(100)).round(decimals=6).abs()
        tensor([[0., 1.]], dtype=torch.float64)
    """
    y, context = y.contiguous(), None if context is None else context.contiguous()
    walk = _Walk(field, solver, times, strict)
    if isinstance(solver, FixedStep) and (solver.gradient == "autograd" or transformed()):
        end = _replay(field, solver.tableau, walk.plan(y), y, context)
        _check_end(walk, end, y, context)
        walk.evaluations = solver.evaluations
    elif solver.gradient == "adjoint" or transformed():
        end = _Solve.apply(walk, y, context, *parameters)
    else:
        end = walk(y, context)
        if torch.is_grad_enabled():  # the steps are known; once more, with the graph
            again = _replay(field, solver.tableau, walk.steps, y, context)
            end = end + (again - again.detach())
    if report is not None:
        report.append(walk.evaluations)
    return end


def _check_end(walk: _Walk, end: Tensor, y: Tensor, c: Tensor | None) -> None:
    """Refuse a solution that is not finite, and say where it was lost; what led there is made once more."""
    if not walk.strict or transformed():
        return
    lost = ~end.detach().isfinite().all(-1)
    if not bool(lost.any()):
        return
    rows = lost.nonzero().flatten()
    with torch.no_grad():
        for number, step in enumerate(walk.plan(y), 1):  # noqa: B007
            y = _after(walk.field, walk.solver.tableau, step, y, c)
            if not bool(y[rows].isfinite().all()):
                break
    raise IntegrationError(
        f"the solution of {len(rows)} of {len(lost)} row(s) (the first: {rows[:8].tolist()}) is NaN or infinite from "
        f"step {number} of {walk.solver.steps} on, at time {float(step.t):.4g}: the field is, or the equation is stiff "
        "for these steps. Check weights and data, take more steps, or DormandPrince()."
    )


def _replay(field: Field, tableau: Tableau, steps: list[Step], y: Tensor, c: Tensor | None) -> Tensor:
    """Make given steps, with whatever graph there is to be."""
    for step in steps:
        y = _after(field, tableau, step, y, c)
    return y


def _after(field: Field, tableau: Tableau, step: Step, y: Tensor, c: Tensor | None) -> Tensor:
    """All rows after a step that some of them make."""
    if step.index is None:
        return runge_kutta_step(field, step.t, step.h, y, c, tableau)[0]
    rows = None if c is None else c[step.index]
    moved = runge_kutta_step(field, step.t, step.h, y[step.index], rows, tableau)[0]
    return y.index_copy(0, step.index, moved)


class _Walk:
    """A solution without a graph, and the steps that were made."""

    def __init__(self, field: Field, solver: Solver, times: Tensor, strict: bool) -> None:
        self.field, self.solver, self.times, self.strict = field, solver, times, strict
        self.steps: list[Step] = []
        self.evaluations = 0

    def __call__(self, y: Tensor, c: Tensor | None) -> Tensor:
        solver = self.solver
        with torch.no_grad():
            if isinstance(solver, DormandPrince):
                accuracy = Accuracy(solver.rtol, solver.atol, solver.max_steps)
                y, self.steps, self.evaluations = adaptive_steps(self.field, y, self.times, c, accuracy, self.strict)
                return y
            start = y
            for step in self.plan(y):
                self.steps.append(step._replace(y=y))
                y = _after(self.field, solver.tableau, step, y, c)
            self.evaluations = solver.evaluations
            _check_end(self, y, start, c)
            return y

    def plan(self, y: Tensor) -> list[Step]:
        """Fixed steps, all of them from ``y`` as yet."""
        times, steps = self.times, self.solver.steps
        if times.shape == (2,):
            fractions = torch.arange(steps + 1, dtype=times.dtype, device=times.device) / steps
            times = torch.lerp(times[0], times[1], fractions)
        if times.shape != (steps + 1,):
            raise ValueError(
                f"times: got shape {tuple(times.shape)}, needs (2,) or ({steps + 1},), the ends of all steps."
            )
        return [Step(None, t, h, y) for t, h in zip(times[:-1].unbind(), times.diff().unbind(), strict=True)]


class _Solve(torch.autograd.Function):
    """A solution with the discrete adjoint; where its gradient is to be differentiated, all steps are made again."""

    @staticmethod
    def forward(walk: _Walk, y: Tensor, c: Tensor | None, *_parameters: Tensor) -> Tensor:
        return walk(y, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        ctx.walk, y, c, *parameters = inputs
        ctx.conditional = c is not None
        ctx.save_for_backward(y, *([c] if ctx.conditional else []), *parameters)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, *rest = ctx.saved_tensors
        c = rest[0] if ctx.conditional else None
        walk, tableau = ctx.walk, ctx.walk.solver.tableau
        wanted = [x for x in rest if x.requires_grad]
        if torch.is_grad_enabled():
            start = y if y.requires_grad else y.detach().requires_grad_()
            end = _replay(walk.field, tableau, walk.steps, start, c)
            found = torch.autograd.grad(end, [start, *wanted], gradient, create_graph=True, materialize_grads=True)
        else:
            found = _adjoint(walk, c, wanted, gradient)
        totals = dict(zip(map(id, wanted), found[1:], strict=True))
        before = [] if ctx.conditional else [None]
        return (None, found[0], *before, *(totals.get(id(x)) for x in rest))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], walk: _Walk, y: Tensor, c: Tensor | None, *parameters: Tensor) -> Any:
        """Rows of all batches are rows; parameters are those of one field."""
        y_dim, c_dim, *others = in_dims[1:]
        if any(dim is not None for dim in others):
            raise RuntimeError("an adaptive solver takes the rows of one field; for many fields use steps, as RK4().")
        size = info.batch_size
        y = _batched(y, y_dim, size)
        c = None if c is None else _batched(c, c_dim, size).flatten(0, 1)
        end = _Solve.apply(walk, y.flatten(0, 1), c, *parameters)
        return end.unflatten(0, (size, -1)), 0


def _batched(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _adjoint(walk: _Walk, c: Tensor | None, wanted: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Gradients with respect to the start and to what is wanted, from the last step to the first."""
    totals = [torch.zeros_like(x) for x in wanted]
    for step in reversed(walk.steps):
        with torch.enable_grad():
            rows = c if c is None or step.index is None else c[step.index]
            leaf = step.y.detach().requires_grad_()
            end, _ = runge_kutta_step(walk.field, step.t, step.h, leaf, rows, walk.solver.tableau)
        some = gradient if step.index is None else gradient[step.index]
        back, *found = torch.autograd.grad(end, [leaf, *wanted], some, materialize_grads=True)
        gradient = back if step.index is None else gradient.index_copy(0, step.index, back)
        for total, new in zip(totals, found, strict=True):
            total += new
    return [gradient, *totals]


def _check_gradient(gradient: str) -> None:
    if gradient not in ("autograd", "adjoint"):
        raise ValueError(f"gradient: got {gradient!r}, needs 'autograd' or 'adjoint'.")
