"""Laws of paths: Markov chains with Gaussian transitions on a grid of times, see :mod:`pyro_genmods.evolve.path`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from ..contract import Cost, Density, GenerativeDistribution, GenerativeModel
from ..foundation.causal import transformed
from ..foundation.errors import IntegrationError
from ..foundation.shapes import Context, Rows, Values
from .brownian import Coefficients, solve
from .transition import apply_factor, log_volume, solve_factor

__all__ = ["PathDistribution", "PathLaw", "refine_times"]


def refine_times(times: Sequence[float] | Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """A grid with every interval divided into equal parts, and where the given times are in it.

    Arguments:
        times: strictly increasing, ``(points,)``.
        parts: of each interval, at least 1.

    Returns:
        The grid ``((points - 1) * parts + 1,)`` in float64, and the places of ``times`` in it, ``(points,)``.

    Raises:
        ValueError: as :class:`NeuralSDE` for ``times``; fewer than one part.

    Example:
        >>> refine_times([0.0, 1.0, 4.0], 2)
        (tensor([0.0000, 0.5000, 1.0000, 2.5000, 4.0000], dtype=torch.float64), tensor([0, 2, 4]))
    """
    if parts < 1:
        raise ValueError(f"parts: got {parts}, needs at least 1 for each interval.")
    t = torch.tensor(check_times(times), dtype=torch.float64)
    inner = t[:-1, None] + t.diff()[:, None] * torch.arange(parts, dtype=torch.float64) / parts
    return torch.cat([inner.flatten(), t[-1:]]), torch.arange(len(t)) * parts


class PathDistribution(GenerativeDistribution):
    """A law of paths at a context: a Pyro distribution over events ``(times, features)``; made by calling the model.

    Example:
        >>> from pyro_genmods.evolve.path import NeuralSDE
        >>> law = NeuralSDE(1, [0.0, 0.5, 2.0], lambda t, x, c: -x, 0.3)()
        >>> law.sample((2,)).shape, law.simulate((2,), method="srk", steps=4).shape
        (torch.Size([2, 3, 1]), torch.Size([2, 3, 1]))
    """

    def simulate(
        self, sample_shape: Any = Size(), *, method: Literal["euler", "milstein", "srk"] = "srk", steps: int = 8
    ) -> Tensor:
        """Draw paths of the *equation* by torchsde, with gradients, ``(*sample_shape, *batch_shape, *event_shape)``.

        ``rsample`` draws from the chain that ``log_prob`` scores. This draws from another discretisation of the same
        equation: with ``method="euler", steps=1`` the Euler chain itself, with more steps or another method a finer
        one, at the same times; take so many steps that twice as many change nothing. Wrap it in ``torch.no_grad()``
        where no gradient is wanted. The seed is that of torch or Pyro. Equations are read in the sense of Ito.

        Arguments:
            sample_shape: of independent draws.
            method: of torchsde; ``"euler"`` evaluates the drift once a step, ``"milstein"`` is of strong order 1 where
                the diffusion depends on ``x``, ``"srk"`` of strong order 1.5 at ten evaluations a step.
            steps: equal steps between neighbouring times.

        Raises:
            ValueError: another method, or fewer than one step.
            IntegrationError: a path became NaN or infinite.
        """
        shape, c = self._draw_shape(sample_shape)
        model = self.model
        x, _ = solve(model.coefficients(c), model.times, model.begin(shape.numel(), c), method=method, steps=steps)
        return model.checked(x).reshape(shape + self.event_shape)


class PathLaw(GenerativeModel):
    """A Markov chain on a grid of times with Gaussian transitions, from which everything else follows.

    Subclasses implement :meth:`drift`, :meth:`diffusion`, :meth:`moments` and :meth:`initial_moments`. Intervals are
    named by a slice ``k`` of ``0 ... K - 1``; values at their left ends are ``(rows, intervals, features)``.

    Arguments:
        features: number :math:`d` of features.
        times: strictly increasing, in any unit.
        context_features: number of context features.

    Attributes:
        times: the grid ``(K + 1,)``; ``lengths``: of its intervals ``(K,)``.

    Raises:
        ShapeError: fewer than one feature. ValueError: see ``times`` of :class:`NeuralSDE`.
    """

    density = Density.EXACT

    def __init__(self, features: int, times: Sequence[float] | Tensor, context_features: int) -> None:
        self.grid = check_times(times)
        super().__init__((len(self.grid), features), (context_features,) if context_features else ())
        self.width = features
        self.given_numbers: dict[str, Tensor] = {}
        times = torch.tensor(self.grid, dtype=torch.float64)
        self.keep("times", times)
        self.keep("lengths", times.diff())

    def forward(self, context: Tensor | None = None) -> PathDistribution:
        return PathDistribution(self, context)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PathLaw:
        """Move or cast, with numbers rounded once from those that were given."""
        super()._apply(fn, recurse)
        for name, value in self.given_numbers.items():
            buffer = getattr(self, name)
            setattr(self, name, buffer if buffer.is_meta else value.to(buffer))
        return self

    def keep(self, name: str, value: Tensor) -> None:
        """Register a buffer of numbers that were given, ``value`` in float64."""
        self.given_numbers[name] = value
        self.register_buffer(name, value.to(torch.get_default_dtype()))

    @property
    def cost(self) -> Cost:
        return Cost(sample=len(self.grid) - 1, score=1)

    @property
    def slow_direction(self) -> None:
        """Neither: a draw needs a call at each time, but together they do the work of the one call that scores."""
        return

    @property
    def noise_shape(self) -> Size:
        return self.event_shape

    # -- what a subclass says ------------------------------------------------------------------------------------

    @abstractmethod
    def drift(self, k: slice, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        """The drift in intervals ``k`` at times ``t`` ``(intervals,)``, shape of ``x``."""

    @abstractmethod
    def diffusion(self, k: slice, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        """The diagonal of the diffusion, shape of ``x``."""

    @abstractmethod
    def moments(self, k: slice, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean of the next value, and the factor of its covariance: its diagonal, or a lower triangle."""

    @abstractmethod
    def initial_moments(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and scale of the first value, ``(features,)`` or ``(rows, features)``."""

    # -- row functions -------------------------------------------------------------------------------------------

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        values = self._whiten(y, c)[1]
        if Distribution._validate_args and not transformed() and bool(values.isnan().any()):
            rows = values.isnan().nonzero().flatten().tolist()
            raise IntegrationError(
                f"log_prob: NaN in {len(rows)} of {len(values)} row(s), the first of them {rows[:8]}: along these "
                "paths the drift is not finite, or the diffusion not positive. Check weights and contexts, and end the "
                "diffusion with softplus or exp."
            )
        return values

    def pull_rows(self, y: Rows, c: Context | None) -> Tensor:
        return self._whiten(y, c)[0]

    def push_rows(self, z: Tensor, c: Context | None) -> Rows:
        return self.push_and_log_prob_rows(z, c)[0]

    def push_and_log_prob_rows(self, z: Tensor, c: Context | None) -> tuple[Rows, Values]:
        loc, scale = self.initial_moments(c)
        path, volume = [loc + scale * z[:, 0]], scale.log().expand_as(z[:, 0]).sum(-1)
        for k in range(len(self.grid) - 1):
            mean, factor = self.moments(slice(k, k + 1), path[-1][:, None], c)
            path.append((mean + apply_factor(factor, z[:, k + 1, None]))[:, 0])
            volume = volume + log_volume(factor)[:, 0]
        return self.checked(torch.stack(path, 1)).flatten(1), self._base_log_prob(z) - volume

    def _whiten(self, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Noise of rows, and their log density: one call for all rows and times."""
        x = y.unflatten(1, self.event_shape)
        loc, scale = self.initial_moments(c)
        mean, factor = self.moments(slice(0, len(self.grid) - 1), x[:, :-1], c)
        noise = solve_factor(factor, x[:, 1:] - mean)
        z = torch.cat([((x[:, 0] - loc) / scale)[:, None], noise], 1)
        volume = scale.log().expand_as(x[:, 0]).sum(-1) + log_volume(factor).sum(-1)
        return z, self._base_log_prob(z) - volume

    def _base_log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square().sum((1, 2)) + self.features * math.log(2 * math.pi))

    def begin(self, rows: int, c: Tensor | None) -> Tensor:
        """Draw first values, ``(rows, features)``."""
        loc, scale = self.initial_moments(c)
        return loc + scale * torch.randn(rows, self.width, dtype=loc.dtype, device=loc.device)

    def coefficients(self, c: Tensor | None) -> Coefficients:
        """Drift and diffusion of single intervals at a context, as the solver wants them."""

        def of(function: Callable[..., Tensor]) -> Callable[[int, Tensor, Tensor], Tensor]:
            return lambda k, t, x: function(slice(k, k + 1), t.reshape(1), x[:, None], c)[:, 0]

        return Coefficients(of(self.drift), of(self.diffusion))

    def checked(self, path: Tensor) -> Tensor:
        """Refuse paths ``(rows, times, features)`` with values that are not finite, where validation is on.

        Raises:
            IntegrationError: names the step and the rows.
        """
        if not Distribution._validate_args or transformed():
            return path
        lost = ~path.detach().isfinite().all(-1)
        if bool(lost.any()):
            step = int(lost.any(0).nonzero()[0])
            rows = lost[:, step].nonzero().flatten().tolist()
            raise IntegrationError(
                f"path: NaN or infinite at step {step} (t = {self.grid[step]:g}) in {len(rows)} of {len(path)} row(s), "
                f"the first of them {rows[:8]}; the drift or diffusion is, or the steps are too long for so strong a "
                "drift. Check weights and contexts, refine the grid (refine_times), or take method='local_linear'."
            )
        return path


def check_times(times: Sequence[float] | Tensor) -> list[float]:
    """Times as numbers, strictly increasing; else a ``ValueError``."""
    t = torch.as_tensor(times, dtype=torch.float64)
    if t.dim() != 1 or len(t) < 2:
        raise ValueError(f"times: got shape {tuple(t.shape)}, needs at least two times, (points,).")
    bad = (~((t.diff() > 0) & t[1:].isfinite() & t[:-1].isfinite())).nonzero().flatten().tolist()
    if bad:
        pair = t[bad[0] : bad[0] + 2].tolist()
        raise ValueError(
            f"times: {pair[0]} is followed by {pair[1]} at place {bad[0] + 1}; they must be finite and strictly "
            "increasing. Sort them, and average or index observations that are made at one time."
        )
    return t.tolist()
