r"""Discretised logistic mixtures: pixels, counts and other ordered levels.

Level :math:`x \in \{0, \dots, L - 1\}` lies at :math:`v = 2x/(L - 1) - 1` in :math:`[-1, 1]` and owns the interval of
half-width :math:`h = 1/(L - 1)` around it; the first and the last level own everything beyond. With the edges
:math:`a = (v - h - m)/s` and :math:`b = (v + h - m)/s` a component gives

.. math:: P(x) = \sigma(b) - \sigma(a) = \sigma(b)\, \sigma(-a)\, \big(1 - e^{a - b}\big),

whose logarithm is a sum of three terms without cancellation in either tail and for every width, so that no
approximation of narrow components is needed. The distribution function is that of the continuous mixture at the upper
edge, hence the quantile is exact: bisection over the levels.

Reference:
    T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, PixelCNN++: Improving the PixelCNN with Discretized Logistic
    Mixture Likelihood and Other Modifications, 2017, arXiv:1701.05517.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .conditionals import (
    Conditional,
    at_least,
    choose,
    is_level,
    positive,
    reaches,
    soft_floor,
    staircase,
    undo_soft_floor,
    wide,
)

__all__ = ["DiscretizedLogisticMixture"]


@dataclass(frozen=True)
class DiscretizedLogisticMixture(Conditional):
    r"""Mixture of :math:`k` logistic laws on ordered levels, in units where the levels fill :math:`[-1, 1]`.

    Tempering divides the logits by :math:`T` and multiplies the scales by :math:`T`. A network sees :math:`v`.

    Arguments:
        levels: number of levels, 256 for bytes.
        k: number of components.

    Shape:
        parameters ``(..., 3 k)``: logits of the weights, means, logarithms of the scales, at least -7 (softly); values
        ``(...)`` as floating point numbers ``0, ..., levels - 1``.

    Raises:
        ValueError: fewer than two levels, no component, or a temperature that is not positive.

    Example:
        >>> head = DiscretizedLogisticMixture(256, 5)
        >>> parameters = torch.tensor(head.start())
        >>> log_probs = head.log_probs(parameters)
        >>> log_probs.shape, round(float(log_probs.logsumexp(-1)), 4)
        (torch.Size([256]), 0.0)
        >>> head.quantile(parameters, torch.tensor([-9.0, 0.0, 9.0]))
        tensor([  0., 127., 255.])
    """

    discrete: ClassVar[bool] = True
    FLOOR: ClassVar[float] = -7.0
    levels: int = field()  # without a default: the base class has none either, under the same name
    k: int

    def __post_init__(self) -> None:
        at_least("levels", self.levels, 2)
        at_least("k", self.k, 1)

    @property
    def size(self) -> int:
        return 3 * self.k

    def _edges(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, upper edges of the levels in units of the components, and widths in the same."""
        logits, means, raw = parameters.unflatten(-1, (3, self.k)).unbind(-2)
        inverse_s = torch.exp(-soft_floor(raw, self.FLOOR))
        edge = (2 * x.to(parameters.dtype) + 1) / (self.levels - 1) - 1
        return logits.log_softmax(-1), (edge[..., None] - means) * inverse_s, 2 / (self.levels - 1) * inverse_s

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        x = wide(x)
        valid = is_level(x, self.levels)
        x = torch.where(valid, x, 0)
        log_w, b, width = self._edges(parameters, x)
        first, last = (x == 0)[..., None], (x == self.levels - 1)[..., None]
        below = torch.where(last, 0.0, logsigmoid(b))
        above = torch.where(first, 0.0, logsigmoid(width - b))
        inner = torch.where(first | last, 0.0, torch.log(-torch.expm1(-width)))
        return torch.where(valid, (log_w + below + above + inner).logsumexp(-1), -torch.inf)

    def log_cdf(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.floor() if x.is_floating_point() else wide(x)
        log_w, b, _ = self._edges(parameters, x)
        return staircase((log_w + logsigmoid(b)).logsumexp(-1), (log_w + logsigmoid(-b)).logsumexp(-1), x, self.levels)

    def quantile(self, parameters: Tensor, z: Tensor) -> Tensor:
        parameters = parameters.detach()
        shape = torch.broadcast_shapes(parameters.shape[:-1], z.shape)
        low = torch.full(shape, -1.0, dtype=parameters.dtype, device=parameters.device)
        high = torch.full_like(low, self.levels - 1)
        for _ in range(math.ceil(math.log2(self.levels))):
            middle = ((low + high) / 2).floor()
            enough = reaches(*self.log_cdf(parameters, middle), z)
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high

    def sample(self, parameters: Tensor) -> Tensor:
        logits, means, raw = parameters.detach().unflatten(-1, (3, self.k)).unbind(-2)
        chosen = choose(logits)[..., None]
        s = torch.exp(soft_floor(raw, self.FLOOR)).gather(-1, chosen)[..., 0]
        draw = means.gather(-1, chosen)[..., 0] + s * torch.rand_like(s).logit(torch.finfo(s.dtype).eps / 4)
        return (((draw + 1) * (self.levels - 1) - 1) / 2).ceil().clamp(0, self.levels - 1)

    def tempered(self, parameters: Tensor, temperature: float) -> Tensor:
        logits, means, raw = parameters.unflatten(-1, (3, self.k)).unbind(-2)
        log_s = soft_floor(raw, self.FLOOR) + math.log(positive(temperature))
        return torch.cat([logits / temperature, means, undo_soft_floor(log_s, self.FLOOR)], -1)

    def start(self) -> tuple[float, ...]:
        means = [(2 * i + 1) / self.k - 1 for i in range(self.k)]
        return (*[0.0] * self.k, *means, *[-math.log(2 * self.k)] * self.k)

    def embed(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return super().embed(x, dtype) * (2 / (self.levels - 1)) - 1
