r"""Explicit Runge-Kutta methods: their coefficients, and one step of them.

A method of :math:`s` stages is a tableau :math:`(a, b, c)`; its order :math:`p` says that the error of a solution falls
like :math:`h^p`. An embedded method :math:`\hat b` on the same stages estimates the error of a step,
:math:`h \sum_i (b_i - \hat b_i) k_i`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DORMAND_PRINCE", "EULER", "HEUN", "RUNGE_KUTTA", "Field", "Tableau", "combine", "runge_kutta_step"]

Field = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit method.

    Attributes:
        order: of the method.
        a: rows of the stages after the first. ``b``: weights. ``c``: times of the stages.
        error: weights of the error estimate, one more than stages (the last is that of the next step's first stage);
            empty without one.

    Example:
        >>> RUNGE_KUTTA.stages, RUNGE_KUTTA.order, RUNGE_KUTTA.c
        (4, 4, (0.0, 0.5, 0.5, 1.0))
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()

    @property
    def stages(self) -> int:
        """Evaluations of the field in a step."""
        return len(self.b)


EULER = Tableau(1, (), (1.0,), (0.0,))
HEUN = Tableau(2, ((1.0,),), (1 / 2, 1 / 2), (0.0, 1.0))
RUNGE_KUTTA = Tableau(
    4, ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 1 / 2, 1 / 2, 1.0)
)
DORMAND_PRINCE = Tableau(
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)


def combine(y: Tensor, h: Tensor, stages: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    r""":math:`y + h \sum_i w_i k_i`.

    Arguments:
        y: ``(rows, n)``.
        h: ``()`` or ``(rows, 1)``.
        stages: :math:`k_i`, each ``(rows, n)``.
        weights: :math:`w_i`.

    Example:
        >>> combine(torch.zeros(1, 1), torch.tensor(0.5), [torch.ones(1, 1)], (4.0,))
        tensor([[2.]])
    """
    for k, w in zip(stages, weights, strict=False):
        if w:
            y = torch.addcmul(y, k, h, value=w)
    return y


def runge_kutta_step(
    field: Field, t: Tensor, h: Tensor, y: Tensor, c: Tensor | None, tableau: Tableau, *, first: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One step of a method.

    Arguments:
        field: ``field(t, y, c)``, the velocity.
        t: time at the start of the step, ``()`` or ``(rows, 1)``.
        h: length of the step, shape of ``t``.
        y: ``(rows, n)``.
        c: context rows of the field.
        tableau: the method.
        first: the first stage, where it is known.

    Returns:
        The rows after the step, and the stages.

    Example:
        >>> t, h = torch.tensor(0.0), torch.tensor(0.5)
        >>> y, stages = runge_kutta_step(lambda t, y, c: y, t, h, torch.ones(1, 1), None, HEUN)
        >>> y, len(stages)
        (tensor([[1.6250]]), 2)
    """
    stages = [field(t, y, c) if first is None else first]
    for a, fraction in zip(tableau.a, tableau.c[1:], strict=True):
        stages.append(field(t + fraction * h, combine(y, h, stages, a), c))
    return combine(y, h, stages, tableau.b), stages
