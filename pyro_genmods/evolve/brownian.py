r"""Stochastic differential equations through torchsde, on a clock of whole numbers.

torchsde does not end a step at the times it is asked for but interpolates linearly between steps, seeds its Brownian
motion from numpy, and lets rounding add a last step of almost no length. Here every interval :math:`[t_k, t_{k+1}]` of
a grid is solved by itself, on the clock :math:`\tau = n (t - t_k) / (t_{k+1} - t_k)` on which :math:`n` steps have
length one exactly,

.. math:: \mathrm dx = f\, \delta\, \mathrm d\tau + g \sqrt{\delta}\, \mathrm dW_\tau, \; \delta = (t_{k+1} - t_k)/n,

and the increments are drawn from torch's own generator, so that ``torch.manual_seed`` and ``pyro.set_rng_seed``
reproduce them.

References:
    X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, Scalable Gradients for Stochastic Differential Equations, 2020,
    arXiv:2001.01328. A. Roessler, Runge-Kutta Methods for the Strong Approximation of Solutions of Stochastic
    Differential Equations, SIAM Journal on Numerical Analysis 48 (2010) 922-952.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchsde
from torch import Size, Tensor

__all__ = ["METHODS", "Coefficients", "Increments", "solve"]

METHODS = ("euler", "milstein", "srk")
Coefficient = Callable[[int, Tensor, Tensor], Tensor]


class Coefficients(NamedTuple):
    """Drift and diagonal diffusion of interval ``k`` at time ``t``, each ``(k, t, x) -> (rows, features)``.

    Attributes:
        drift, diffusion: of the path that is drawn.
        prior_drift: of another law, to which the divergence is wanted; else ``None``.
    """

    drift: Coefficient
    diffusion: Coefficient
    prior_drift: Coefficient | None = None


class Increments(torchsde.BaseBrownian):
    r"""Brownian motion for a solver that asks for consecutive intervals, each once: nothing is remembered.

    With the increment :math:`W` over an interval of length :math:`h` comes, if wanted, its space-time integral
    :math:`U = \int_0^h W_s \, \mathrm ds = h (W / 2 + H)`, :math:`H \sim \mathcal N(0, h / 12)` independent of
    :math:`W`.

    Arguments:
        like: ``(rows, channels)``, the shape, dtype and device of the increments.

    Raises:
        ValueError: an interval that does not begin where the last one ended, as adaptive solvers ask for.

    Example:
        >>> noise = Increments(torch.zeros(3, 2))
        >>> noise(torch.tensor(0.0), torch.tensor(1.0)).shape
        torch.Size([3, 2])
        >>> noise(torch.tensor(0.5), torch.tensor(1.0))
        Traceback (most recent call last):
            ...
        ValueError: ta: got 0.5, the increments up to 1.0 are drawn and not kept; take a method of fixed steps.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self._now = like.detach(), None

    def __call__(
        self, ta: Tensor, tb: Tensor | None = None, return_U: bool = False, return_A: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if tb is None or return_A or (self._now is not None and float(ta) != self._now):
            raise ValueError(
                f"ta: got {float(ta)}, the increments up to {self._now} are drawn and not kept; take a method of "
                "fixed steps."
            )
        self._now = float(tb)
        h = tb - ta
        w = torch.randn_like(self._like) * h.sqrt()
        return (w, h * (w / 2 + torch.randn_like(self._like) * (h / 12).sqrt())) if return_U else w

    def __repr__(self) -> str:
        return f"Increments({tuple(self.shape)})"

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def shape(self) -> Size:
        return self._like.shape

    @property
    def levy_area_approximation(self) -> str:
        return "space-time"


class _Interval(torchsde.SDEIto):
    """One interval of the grid on its own clock; the first evaluation, made by torchsde's checks, is made once."""

    def __init__(self, coefficients: Coefficients, k: int, start: Tensor, step: Tensor) -> None:
        super().__init__(noise_type="diagonal")
        self.coefficients, self.k, self.start, self.step = coefficients, k, start, step
        self._last: dict[str, tuple[float, Tensor, Tensor]] = {}
        if coefficients.prior_drift is not None:
            self.h = self._prior

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self._once("drift", t, y) * self.step

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self._once("diffusion", t, y) * self.step.sqrt()

    def _prior(self, t: Tensor, y: Tensor) -> Tensor:
        return self._once("prior_drift", t, y) * self.step

    def _once(self, name: str, t: Tensor, y: Tensor) -> Tensor:
        known = self._last.get(name)
        if known is None or known[0] != float(t) or known[1] is not y:
            known = float(t), y, getattr(self.coefficients, name)(self.k, self.start + t * self.step, y)
            self._last[name] = known
        return known[2]


def solve(
    coefficients: Coefficients, times: Tensor, x: Tensor, *, method: str = "euler", steps: int = 1
) -> tuple[Tensor, Tensor | None]:
    r"""Draw paths with torchsde, differentiably.

    Arguments:
        coefficients: drift, diffusion, and the drift of a prior if the divergence is wanted.
        times: the grid, ``(points,)``.
        x: where the paths begin, ``(rows, features)``.
        method: ``"euler"``, ``"milstein"`` or ``"srk"``, torchsde's methods for Ito equations with diagonal noise.
        steps: equal steps that an interval of the grid is divided into.

    Returns:
        Paths ``(rows, points, features)``, and the divergence :math:`\tfrac12 \int |g^{-1}(f - f_p)|^2 \mathrm dt`
        along each ``(rows,)``, by torchsde's ``logqp``; ``None`` without a prior.

    Raises:
        ValueError: another method, or fewer than one step.

    Example:
        >>> decay = Coefficients(lambda k, t, x: -x, lambda k, t, x: 0.0 * x + 1e-6)
        >>> path, _ = solve(decay, torch.tensor([0.0, 1.0, 1.5]), torch.ones(1, 1), steps=1)
        >>> path.flatten().round(decimals=3).abs()
        tensor([1., 0., 0.])
    """
    if method not in METHODS or steps < 1:
        raise ValueError(f"method, steps: got {method!r} and {steps}, needs one of {METHODS} and at least one step.")
    logqp = coefficients.prior_drift is not None
    clock = torch.tensor([0.0, float(steps)], dtype=x.dtype, device=x.device)
    path, ratios = [x], []
    for k, (start, length) in enumerate(zip(times[:-1], times.diff(), strict=True)):
        sde = _Interval(coefficients, k, start, length / steps)
        noise = Increments(torch.cat([x, x[:, :1]], -1) if logqp else x)
        drawn: Any = torchsde.sdeint(sde, path[-1], clock, bm=noise, method=method, dt=1.0, logqp=logqp)
        states, ratio = drawn if logqp else (drawn, None)
        path.append(states[-1])
        ratios.append(ratio)
    return torch.stack(path, 1), torch.cat(ratios).sum(0) if logqp else None
