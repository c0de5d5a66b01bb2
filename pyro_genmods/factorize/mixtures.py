r"""Mixture heads: weighted sums of Gaussian, logistic or Student laws on the line.

With weights :math:`w = \mathrm{softmax}(a)`, means :math:`m_k`, scales :math:`s_k = e^{\max(b_k, -9)}` (the maximum
softened), and a standard density :math:`f` with distribution function :math:`G`,

.. math:: p(x) = \sum_k \frac{w_k}{s_k} f\Big(\frac{x - m_k}{s_k}\Big), \qquad
          F(x) = \sum_k w_k G\Big(\frac{x - m_k}{s_k}\Big), \qquad
          1 - F(x) = \sum_k w_k G\Big(\frac{m_k - x}{s_k}\Big),

all summed in logarithms. With :math:`t = (x - m)/s`:

=========  =====================================  ==================================================================
law        density                                distribution function
=========  =====================================  ==================================================================
Gaussian   :math:`\varphi(t)`                     :math:`\Phi(t)`
logistic   :math:`\sigma(t) \sigma(-t)`           :math:`\sigma(t)`
Student    :math:`c (1 + t^2/\nu)^{-(\nu+1)/2}`   closed for :math:`\nu = 1, \dots, 4`, see :mod:`.student`
=========  =====================================  ==================================================================

The quantile of one component is closed, :math:`m + s\,G^{-1}(\Phi(z))`. That of a mixture lies between the least and
the largest of its components' quantiles, where Chandrupatla's method solves :math:`\log F(x) = \log \Phi(z)` in the
smaller tail until the last bracket has closed (in a fixed number of steps in a CUDA graph). Tracers and ``vmap`` see
one operation.

References:
    C. M. Bishop, Mixture density networks, 1994, Aston University NCRG/94/004. T. Salimans, A. Karpathy, X. Chen, D. P.
    Kingma, PixelCNN++, 2017, arXiv:1701.05517, for logistic mixtures.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..foundation.causal import transformed
from ..foundation.numerics import chandrupatla, log_ndtr
from .conditionals import Conditional, at_least, choose, positive, soft_floor, undo_soft_floor

__all__ = ["GaussianMixture", "LogisticMixture", "Mixture"]


@dataclass(frozen=True)
class Mixture(Conditional):
    """A mixture of a symmetric standard law, shifted and scaled; base class of the continuous mixtures.

    Arguments:
        k: number of components.

    Shape:
        parameters ``(..., 3 k)``: logits of the weights, means, logarithms of the scales; values ``(...)``.

    Raises:
        ValueError: ``k`` is less than one.
    """

    FLOOR: ClassVar[float] = -9.0  # of log scales: repeated values in the data would make a component infinitely narrow
    STEPS: ClassVar[int] = 48  # 16 serve most parameters, 32 scales between 1e-4 and 1e4, 48 up to 1e8
    k: int

    def __post_init__(self) -> None:
        at_least("k", self.k, 1)

    @abstractmethod
    def standard_log_density(self, t: Tensor) -> Tensor:
        """Log density of the standard law."""

    @abstractmethod
    def standard_log_cdf(self, t: Tensor) -> Tensor:
        """Log distribution function of the standard law, accurate for negative arguments."""

    @abstractmethod
    def standard_quantile(self, z: Tensor) -> Tensor:
        """Quantile of the standard law at normal scores."""

    def standard_draw(self, like: Tensor) -> Tensor:
        """Draws of the standard law, shaped as another tensor."""
        return self.standard_quantile(torch.randn_like(like))

    @property
    @abstractmethod
    def unit(self) -> float:
        """Scale at which the standard law has the quartiles of the standard normal."""

    def spread(self, temperature: float) -> float:
        """Factor of the scales at a temperature."""
        return temperature

    @property
    def size(self) -> int:
        return 3 * self.k

    def components(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, means and logarithms of the scales, each ``(..., k)``."""
        logits, means, raw = parameters.unflatten(-1, (3, self.k)).unbind(-2)
        return logits.log_softmax(-1), means, soft_floor(raw, self.FLOOR)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        log_w, m, log_s = self.components(parameters)
        t = (x[..., None] - m) * torch.exp(-log_s)
        return (log_w - log_s + self.standard_log_density(t)).logsumexp(-1)

    def log_cdf(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        log_w, m, log_s = self.components(parameters)
        t = (x[..., None] - m) * torch.exp(-log_s)
        lower, upper = self.standard_log_cdf(t), self.standard_log_cdf(-t)
        return (log_w + lower).logsumexp(-1), (log_w + upper).logsumexp(-1)

    def quantile(self, parameters: Tensor, z: Tensor) -> Tensor:
        log_w, m, log_s = self.components(parameters.detach())
        z, s = z.detach(), log_s.exp()
        if self.k == 1:
            return (m + s * self.standard_quantile(z)[..., None])[..., 0]
        # By symmetry every root is one of the lower tail, of the mixture or of its mirror image.
        mirror = torch.where(z > 0, -1.0, 1.0)
        z, m = -z.abs(), mirror[..., None] * m
        z, log_w, m, s = _broadcast(z, log_w, m, s)
        if transformed():  # one opaque operation, in place of a thousand
            _HEADS[repr(self)] = self
            return mirror * _mixture_quantile(repr(self), log_w, m, s, z)
        return mirror * self.lower_quantile(log_w, m, s, z)

    def lower_quantile(self, log_w: Tensor, m: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """Roots of the distribution function for scores below zero, between the components' quantiles."""
        ends = m + s * self.standard_quantile(z)[..., None]

        def log_cdf(x: Tensor) -> Tensor:
            return (log_w + self.standard_log_cdf((x[..., None] - m) / s)).logsumexp(-1)

        stop = not (z.is_cuda and torch.cuda.is_current_stream_capturing())
        return chandrupatla(log_cdf, log_ndtr(z), ends.amin(-1), ends.amax(-1), self.STEPS, stop)

    def sample(self, parameters: Tensor) -> Tensor:
        log_w, m, log_s = self.components(parameters.detach())
        chosen = choose(log_w)[..., None]
        m, s = m.gather(-1, chosen)[..., 0], log_s.gather(-1, chosen)[..., 0].exp()
        return m + s * self.standard_draw(m)

    def tempered(self, parameters: Tensor, temperature: float) -> Tensor:
        logits, means, raw = parameters.unflatten(-1, (3, self.k)).unbind(-2)
        log_s = soft_floor(raw, self.FLOOR) + math.log(self.spread(positive(temperature)))
        return torch.cat([logits / temperature, means, undo_soft_floor(log_s, self.FLOOR)], -1)

    def start(self) -> tuple[float, ...]:
        means = [NormalDist().inv_cdf((i + 0.5) / self.k) for i in range(self.k)]
        variance = sum(m * m for m in means) / self.k
        log_s = math.log(self.unit) + max(0.5 * math.log(1 - variance), -math.log(self.k))
        return (*[0.0] * self.k, *means, *[log_s] * self.k)


# -- the quantile as one operation, which tracers record and ``vmap`` passes on ---------------------------------------

_HEADS: dict[str, Mixture] = {}


def _broadcast(z: Tensor, *components: Tensor) -> tuple[Tensor, ...]:
    shape = torch.broadcast_shapes(z.shape, *(c.shape[:-1] for c in components))
    return z.expand(shape), *(c.expand(shape + c.shape[-1:]) for c in components)


@torch.library.custom_op(
    "pyro_genmods::mixture_quantile",
    mutates_args=(),
    schema="(str head, Tensor log_w, Tensor m, Tensor s, Tensor z) -> Tensor",
)
def _mixture_quantile(head: str, log_w: Tensor, m: Tensor, s: Tensor, z: Tensor) -> Tensor:
    return _HEADS[head].lower_quantile(log_w, m, s, z).contiguous()


@_mixture_quantile.register_fake
def _(_head: str, *tensors: Tensor) -> Tensor:
    return tensors[-1].new_empty(tensors[-1].shape)


@_mixture_quantile.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], head: str, *tensors: Tensor) -> tuple[Tensor, int]:
    pairs = zip(tensors, in_dims[1:], strict=True)
    first = [x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]
    return _mixture_quantile(head, *first), 0


@dataclass(frozen=True)
class GaussianMixture(Mixture):
    r"""Mixture of :math:`k` Gaussians.

    Tempering divides the logits by :math:`T` and multiplies the scales by :math:`\sqrt T`: every component to the power
    :math:`1/T`. For one component that is :math:`p^{1/T}`, and quantile and normal score are closed.

    Arguments:
        k: number of components.

    Shape:
        parameters ``(..., 3 k)``: logits of the weights, means, logarithms of the scales; values ``(...)``.

    Raises:
        ValueError: ``k`` is less than one, or a temperature is not positive.

    Example:
        >>> head = GaussianMixture(2)
        >>> parameters = torch.tensor([0.0, 0.0, -3.0, 3.0, 0.0, 0.0])
        >>> x = head.quantile(parameters, torch.tensor([-2.0, 1.0]))
        >>> torch.allclose(head.normal_score(parameters, x), torch.tensor([-2.0, 1.0]), atol=1e-5)
        True
    """

    @property
    def unit(self) -> float:
        return 1.0

    def spread(self, temperature: float) -> float:
        return math.sqrt(temperature)

    def standard_log_density(self, t: Tensor) -> Tensor:
        return -0.5 * t.square() - 0.5 * math.log(2 * math.pi)

    def standard_log_cdf(self, t: Tensor) -> Tensor:
        return log_ndtr(t)

    def standard_draw(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)

    def standard_quantile(self, z: Tensor) -> Tensor:
        return z

    def normal_score(self, parameters: Tensor, x: Tensor) -> Tensor:
        if self.k > 1:
            return super().normal_score(parameters, x)
        _, m, log_s = self.components(parameters)
        return ((x[..., None] - m) * torch.exp(-log_s))[..., 0]


@dataclass(frozen=True)
class LogisticMixture(Mixture):
    r"""Mixture of :math:`k` logistic laws, with exponential tails.

    Tempering divides the logits by :math:`T` and multiplies the scales by :math:`T`, which is right in the tails.

    Arguments:
        k: number of components.

    Shape:
        parameters ``(..., 3 k)``: logits of the weights, means, logarithms of the scales; values ``(...)``.

    Raises:
        ValueError: ``k`` is less than one, or a temperature is not positive.

    Example:
        >>> head = LogisticMixture(1)
        >>> round(float(head.cdf(torch.zeros(3), torch.tensor(0.0))), 4)
        0.5
    """

    @property
    def unit(self) -> float:
        return NormalDist().inv_cdf(0.75) / math.log(3)

    def standard_log_density(self, t: Tensor) -> Tensor:
        return logsigmoid(t) + logsigmoid(-t)

    def standard_log_cdf(self, t: Tensor) -> Tensor:
        return logsigmoid(t)

    def standard_draw(self, like: Tensor) -> Tensor:
        return torch.rand_like(like).logit(torch.finfo(like.dtype).eps / 4)

    def standard_quantile(self, z: Tensor) -> Tensor:
        return log_ndtr(z) - log_ndtr(-z)
