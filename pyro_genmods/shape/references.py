r"""References: energies of which everything is known, to try out samplers, estimates of :math:`Z`, and ideas.

================================== ==================================================== ==============================
law                                energy :math:`E(x)`                                  hard because
================================== ==================================================== ==============================
:class:`Gaussian`                  :math:`\tfrac12 (x - m)^\top \Sigma^{-1} (x - m)`    directions differ in width
:class:`GaussianMixture`           :math:`-\log \sum_k a_k e^{-|x - m_k|^2 / 2 s^2}`    modes far from each other
:class:`DoubleWell`                :math:`h \sum_i (x_i^2 - b^2)^2`                     :math:`2^d` modes
:class:`~.curved.Banana`           :math:`x^2 / 200 + (y - .03 x^2 + 3)^2 / 2`          curved
:class:`~.curved.Rosenbrock`       :math:`(100 (y - x^2)^2 + (1 - x)^2) / 20`           curved and thin
:class:`~.curved.Funnel`           :math:`v^2 / 18 + \sum_i (x_i^2 e^{-v} + v) / 2`     of every width
================================== ==================================================== ==============================

They are :class:`~pyro_genmods.shape.Energy` like any other, in the user's units, without a base: the log density is
:math:`-E(x)`, up to a constant; with ``normalized=True`` it is exact. In addition they know their constant, mean and
variance, and draw independent events without a chain.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..contract import Cost
from ..foundation.errors import ShapeError
from ..foundation.shapes import Context, Rows, Values
from .energy import Energy

__all__ = ["DoubleWell", "Gaussian", "GaussianMixture", "Reference"]

LOG_2PI = math.log(2 * math.pi)
GRID = 2**16  # points of quadrature in one coordinate
NEGLIGIBLE = 60.0  # nats above the least energy


class Reference(Energy):
    r"""An energy of which everything is known.

    Arguments:
        network: the energy, a module of rows.
        log_normalizer: :math:`\log \int e^{-E(x)} \mathrm dx`.
        moments: mean and variance of each feature, two of ``(features,)``.
        normalized: whether ``log_prob`` is to contain the constant.

    Attributes:
        exact_log_normalizer: :math:`\log Z` in nats.
        mean, variance: exact, of each feature, ``(features,)``.
        draws_exactly: draws are independent and those of the law.

    Example:
        >>> import pyro_genmods as gm
        >>> law = gm.shape.Banana()
        >>> isinstance(law, Reference), law().density.name, gm.shape.Banana(normalized=True)().density.name
        (True, 'UNNORMALIZED', 'EXACT')
    """

    draws_exactly: ClassVar[bool] = True

    def __init__(
        self, network: nn.Module, log_normalizer: float, moments: tuple[Tensor, Tensor], normalized: bool
    ) -> None:
        known = Known(log_normalizer) if normalized else None
        super().__init__(len(moments[0]), network=network, base=None, log_normalizer=known)
        self.exact_log_normalizer = log_normalizer
        self.register_buffer("mean", moments[0].to(self.place[0]), persistent=False)
        self.register_buffer("variance", moments[1].to(self.place[0]), persistent=False)

    @property
    def cost(self) -> Cost:
        """No chain is needed to draw."""
        return Cost(sample=0, score=1)

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Nothing is learned from data: units are those of the formula."""

    @abstractmethod
    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        """Independent draws ``(rows, features)``."""


class Known(nn.Module):
    """A constant that is known.

    Arguments:
        value: in nats.

    Example:
        >>> Known(2.0)()
        tensor(2.)
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def forward(self) -> Tensor:
        return self.value


class Gaussian(Reference):
    r"""The Gaussian, :math:`\log Z = \tfrac12 \log |2 \pi \Sigma|`.

    Arguments:
        mean: ``(features,)``.
        covariance: ``(features, features)``, or variances ``(features,)``.
        normalized: make ``log_prob`` exact.

    Raises:
        ShapeError: the two do not fit.
        ValueError: a covariance that is not positive definite.

    Example:
        >>> law = Gaussian(torch.zeros(2), torch.tensor([1.0, 100.0]))
        >>> round(law.exact_log_normalizer, 4), law().log_prob(torch.zeros(2)), law().sample((5,)).shape
        (4.1405, tensor(0.), torch.Size([5, 2]))
    """

    def __init__(self, mean: Tensor, covariance: Tensor, normalized: bool = False) -> None:
        d = len(mean) if mean.dim() == 1 else 0
        if not d or covariance.shape not in ((d,), (d, d)):
            raise ShapeError(
                f"mean, covariance: got {tuple(mean.shape)} and {tuple(covariance.shape)}; need (features,), and "
                "(features, features) or variances (features,)."
            )
        matrix = covariance.double() if covariance.dim() == 2 else covariance.double().diag()
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) or not bool(factor.isfinite().all()):
            raise ValueError("covariance: is not positive definite; its smallest eigenvalue must be above zero.")
        log_normalizer = float(factor.diagonal().log().sum()) + 0.5 * d * LOG_2PI
        super().__init__(Quadratic(mean, factor), log_normalizer, (mean, matrix.diagonal()), normalized)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        return self.network.push(_noise(self, rows))


class Quadratic(nn.Module):
    r"""The energy :math:`\tfrac12 |L^{-1} (x - m)|^2`.

    Arguments:
        mean: ``(features,)``.
        factor: :math:`L`, lower triangular ``(features, features)``.

    Example:
        >>> Quadratic(torch.zeros(1), 2 * torch.eye(1))(torch.tensor([[2.0]]))
        tensor([0.5000])
    """

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self.register_buffer("mean", mean.to(dtype))
        self.register_buffer("factor", factor.to(dtype))
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        self.register_buffer("inverse_factor", inverse.to(dtype))

    def forward(self, x: Rows) -> Values:
        return 0.5 * ((x - self.mean) @ self.inverse_factor.mT).square().sum(-1)

    def push(self, z: Rows) -> Rows:
        """Standard normal rows to draws."""
        return self.mean + z @ self.factor.mT


class GaussianMixture(Reference):
    r"""Round bumps, :math:`\log Z = \log \sum_k a_k + \tfrac d2 \log 2 \pi s^2`.

    Arguments:
        means: :math:`m_k`, ``(modes, features)``.
        weights: :math:`a_k`, ``(modes,)``, of any sum; ones by default.
        scale: standard deviation :math:`s` of every mode.
        normalized: make ``log_prob`` exact.

    Raises:
        ShapeError: means and weights do not fit.
        ValueError: a weight or the scale is not positive.

    Example:
        >>> ring = GaussianMixture.ring(modes=8, radius=4.0, scale=0.5)
        >>> pair = GaussianMixture.pair(weights=(0.3, 0.7))
        >>> round(ring.exact_log_normalizer, 2), pair.mean
        (2.53, tensor([1.6000]))
    """

    def __init__(
        self, means: Tensor, weights: Tensor | None = None, scale: float = 1.0, normalized: bool = False
    ) -> None:
        weights = means.new_ones(means.shape[:1]) if weights is None else weights
        if means.dim() != 2 or weights.shape != means.shape[:1]:
            raise ShapeError(
                f"means, weights: got {tuple(means.shape)} and {tuple(weights.shape)}; need (modes, features) and "
                "(modes,)."
            )
        if not (bool((weights > 0).all()) and scale > 0):
            raise ValueError(f"weights, scale: got {weights.tolist()[:8]}, {scale}; need positive numbers.")
        a, m = weights.double(), means.double()
        share = (a / a.sum())[:, None]
        mean = (share * m).sum(0)
        variance = scale**2 + (share * (m - mean).square()).sum(0)
        log_normalizer = float(a.sum().log()) + means.shape[1] * (0.5 * LOG_2PI + math.log(scale))
        super().__init__(Bumps(means, weights, scale), log_normalizer, (mean, variance), normalized)

    @classmethod
    def ring(cls, modes: int = 8, radius: float = 4.0, scale: float = 0.5, features: int = 2) -> GaussianMixture:
        """Equal modes on a circle in the first two of any number of features."""
        angle = 2 * math.pi * torch.arange(modes) / modes
        means = torch.zeros(modes, features)
        means[:, 0], means[:, 1] = radius * angle.cos(), radius * angle.sin()
        return cls(means, scale=scale)

    @classmethod
    def pair(
        cls, distance: float = 4.0, weights: Sequence[float] = (0.3, 0.7), scale: float = 0.5, features: int = 1
    ) -> GaussianMixture:
        """Two modes on the first axis, at minus and plus a distance from zero."""
        means = torch.zeros(2, features)
        means[0, 0], means[1, 0] = -distance, distance
        return cls(means, torch.tensor(weights), scale)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        which = torch.multinomial(self.network.log_weights.exp(), rows, replacement=True)
        return self.network.means[which] + self.network.scale * _noise(self, rows)


class Bumps(nn.Module):
    r"""The energy :math:`-\log \sum_k a_k e^{-|x - m_k|^2 / 2 s^2}`.

    Arguments:
        means: ``(modes, features)``.
        weights: ``(modes,)``.
        scale: of every mode.

    Example:
        >>> Bumps(torch.zeros(1, 1), torch.ones(1), 2.0)(torch.tensor([[2.0]]))
        tensor([0.5000])
    """

    def __init__(self, means: Tensor, weights: Tensor, scale: float) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.register_buffer("means", means.to(dtype))
        self.register_buffer("log_weights", weights.log().to(dtype))
        self.scale = float(scale)

    def forward(self, x: Rows) -> Values:
        distance = (x[:, None] - self.means).square().sum(-1)
        return -(self.log_weights - 0.5 * distance / self.scale**2).logsumexp(-1)


class DoubleWell(Reference):
    r"""Two wells in each of any number of features, with a barrier of :math:`h b^4` nats.

    .. math:: Z = \Bigl[\tfrac{\pi b}{2} e^{-a} \bigl(I_{-1/4}(a) + I_{1/4}(a)\bigr)\Bigr]^d, \qquad a = h b^4 / 2

    Arguments:
        features: :math:`d`.
        height: :math:`h`.
        distance: :math:`b`, of a well from zero.
        normalized: make ``log_prob`` exact.

    Raises:
        ValueError: a height or distance that is not positive.

    Example:
        >>> law = DoubleWell(10)
        >>> round(law.exact_log_normalizer, 5), law.variance[:2]
        (3.44238, tensor([0.8521, 0.8521]))
    """

    def __init__(self, features: int = 1, height: float = 2.0, distance: float = 1.0, normalized: bool = False) -> None:
        if not (height > 0 and distance > 0):
            raise ValueError(f"height, distance: got {height}, {distance}; need positive numbers.")
        top = math.sqrt(distance**2 + math.sqrt(NEGLIGIBLE / height))
        x = torch.linspace(0, top, GRID, dtype=torch.float64)
        density = (-height * (x.square() - distance**2).square()).exp()  # the trapezoidal rule is exact here
        density[0] /= 2
        total = 2 * float(density.sum()) * top / (GRID - 1)
        second = float((density * x.square()).sum() / density.sum())
        moments = torch.zeros(features), torch.full((features,), second, dtype=torch.float64)
        super().__init__(Wells(height, distance), features * math.log(total), moments, normalized)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        dtype, device = self.place
        draws = self._magnitudes(rows * self.features).to(device, dtype)
        signs = 2 * torch.randint(0, 2, (rows, self.features), device=device).to(dtype) - 1
        return draws.reshape(rows, self.features) * signs

    def _magnitudes(self, n: int) -> Tensor:
        """Absolute values, by rejection from steps that lie above the density: it is monotone on either side."""
        height, distance = self.network.height, self.network.distance
        top = math.sqrt(distance**2 + math.sqrt(NEGLIGIBLE / height))
        edges = torch.cat([torch.linspace(0, distance, 1025), torch.linspace(distance, top, 1025)[1:]]).double()
        at = (-height * (edges.square() - distance**2).square()).exp()
        above, width = torch.maximum(at[:-1], at[1:]), edges.diff()
        found = edges.new_empty(0)
        while len(found) < n:
            cell = torch.multinomial(above * width, n - len(found) + 64, replacement=True)
            x = edges[cell] + width[cell] * torch.rand(len(cell), dtype=torch.float64)
            density = (-height * (x.square() - distance**2).square()).exp()
            found = torch.cat([found, x[torch.rand(len(cell), dtype=torch.float64) * above[cell] < density]])
        return found[:n]


class Wells(nn.Module):
    r"""The energy :math:`h \sum_i (x_i^2 - b^2)^2`.

    Arguments:
        height, distance: :math:`h` and :math:`b`.

    Example:
        >>> Wells(2.0, 1.0)(torch.zeros(1, 3))
        tensor([6.])
    """

    def __init__(self, height: float, distance: float) -> None:
        super().__init__()
        self.height, self.distance = float(height), float(distance)

    def forward(self, x: Rows) -> Values:
        return self.height * (x.square() - self.distance**2).square().sum(-1)


def _noise(model: Reference, rows: int) -> Rows:
    dtype, device = model.place
    return torch.randn(rows, model.features, dtype=dtype, device=device)
