r"""Conditional heads: the laws of one entry that an autoregressive network chooses from.

An autoregressive density is a product of laws on the line, :math:`p(x) = \prod_t p(x_t \mid x_{<t})`. The network turns
what came before into parameters; a head turns parameters :math:`\theta` into a law of one entry, with everything a
sampler, a density and a diagnostic ask for:

.. math:: \log p_\theta(x), \qquad F_\theta(x), \qquad z = \Phi^{-1}(F_\theta(x)), \qquad
          x = \min\{x : F_\theta(x) \ge \Phi(z)\}.

Noise is the *normal score* :math:`z \sim \mathcal N(0, 1)` and not the uniform :math:`u = \Phi(z)`: single precision
has no :math:`u` for :math:`z < -14` and none short of one for :math:`z > 5.5`, whereas :math:`\log \Phi(\pm z)` are
exact on both sides. Distribution functions are therefore pairs :math:`(\log F, \log(1 - F))`.

A head is a frozen record of sizes without tensors. Its methods are pure functions of parameters ``(..., size)`` and
values ``(...)``, which broadcast, in single or double precision, on any device; they run under ``torch.vmap``,
``torch.func`` and ``make_fx``. Parameters are unconstrained numbers, and zeros are sensible ones.

Reference:
    M. Germain, K. Gregor, I. Murray, H. Larochelle, MADE: Masked Autoencoder for Distribution Estimation, 2015,
    arXiv:1502.03509. M. Rosenblatt, Remarks on a multivariate transformation, Annals of Mathematical Statistics 23
    (1952) 470-472, for the normal scores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from ..foundation.errors import DensityError
from ..foundation.numerics import log_ndtr, normal_quantile

__all__ = ["Bernoulli", "Categorical", "Conditional"]

LOG_ZERO = -1e30  # finite, so that a sum over no category has a gradient


class Conditional(ABC):
    r"""A parametrised law of one entry; base class of the heads.

    A continuous head gives ``log_prob``, ``log_cdf`` and ``quantile``; a discrete one, on the values
    :math:`0, \dots, \text{levels} - 1`, the same and ``log_probs``. The rest follows.

    Shape:
        parameters ``(..., size)``, values, scores and log densities ``(...)``; all broadcast.

    Raises:
        DensityError: a continuous head was asked for ``log_probs``, or a discrete one for ``normal_score``.
        ValueError: ``temperature`` or ``u`` out of range.

    Example:
        >>> class Exponential(Conditional):
        ...     size, support = 1, constraints.positive
        ...
        ...     def log_prob(self, parameters, x):
        ...         return parameters[..., 0] - parameters[..., 0].exp() * x
        ...
        ...     def log_cdf(self, parameters, x):
        ...         upper = -parameters[..., 0].exp() * x
        ...         return torch.log(-torch.expm1(upper)), upper
        ...
        ...     def quantile(self, parameters, z):
        ...         return -log_ndtr(-z) * torch.exp(-parameters[..., 0])
        ...
        ...     def tempered(self, parameters, temperature):
        ...         return parameters - math.log(temperature)
        ...
        ...     def start(self):
        ...         return (0.0,)
        >>> x = Exponential().quantile(torch.zeros(1), torch.tensor([-10.0, 2.0]))
        >>> torch.allclose(Exponential().normal_score(torch.zeros(1), x), torch.tensor([-10.0, 2.0]))
        True
    """

    discrete: ClassVar[bool] = False
    integer: ClassVar[bool] = False
    levels: int | None = None
    """Number of values of a discrete entry."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of parameters of an entry."""

    @property
    def inputs(self) -> int:
        """Width of what a network sees of an entry, ``embed(x)``."""
        return 1

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens, if entries are tokens to be looked up in a table."""
        return None

    @property
    def support(self) -> constraints.Constraint:
        """Where an entry lives, an elementwise constraint."""
        return constraints.real if self.levels is None else constraints.integer_interval(0, self.levels - 1)

    def head_of(self, column: int) -> Conditional:
        """The head of a column; the same for all, unless the head is a ``Mixed`` one."""
        return self

    @abstractmethod
    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Log density, or log probability: minus infinity where a discrete value is not one of the levels."""

    @abstractmethod
    def log_cdf(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log F(x)` and :math:`\log(1 - F(x))`, each accurate where it is small."""

    @abstractmethod
    def quantile(self, parameters: Tensor, z: Tensor) -> Tensor:
        r"""The least :math:`x` with :math:`F(x) \ge \Phi(z)`, without gradient.

        Gradients are those of the equation ``normal_score(parameters, x) = z``, which the caller attaches.
        """

    @abstractmethod
    def tempered(self, parameters: Tensor, temperature: float) -> Tensor:
        r"""Parameters of :math:`p^{1/T}`, normalised, or of what the head offers in its place: colder is narrower."""

    @abstractmethod
    def start(self) -> tuple[Any, ...]:
        """Bias of the network's output layer at the start of training, ``size`` numbers."""

    def log_probs(self, parameters: Tensor) -> Tensor:
        """Log probabilities ``(..., levels)`` of all levels; discrete heads only."""
        if self.levels is None:
            raise DensityError(f"log_probs: {self} is continuous, its values cannot be listed; use log_prob.")
        levels = torch.arange(self.levels, device=parameters.device, dtype=parameters.dtype)
        return self.log_prob(parameters.unsqueeze(-2), levels)

    def cdf(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Distribution function, the probability of a value of ``x`` or less."""
        lower, upper = self.log_cdf(parameters, x)
        return torch.where(lower < upper, lower.exp(), -upper.expm1())

    def icdf(self, parameters: Tensor, u: Tensor) -> Tensor:
        """Quantiles of probabilities ``u`` in the open unit interval; ``quantile`` has the longer tails."""
        _check_unit(u)
        return self.quantile(parameters, torch.special.ndtri(u))

    def normal_score(self, parameters: Tensor, x: Tensor) -> Tensor:
        r""":math:`z = \Phi^{-1}(F(x))`, increasing in ``x``, differentiable in both arguments."""
        if self.discrete:
            raise DensityError(
                f"normal_score: {self} is discrete, its distribution function is a staircase; "
                "use pit with uniform noise."
            )
        return normal_quantile(*self.log_cdf(parameters, x))

    def pit(self, parameters: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """Probability integral transform, uniform if ``x`` follows the law and ``v`` is uniform on the unit interval.

        ``F(x)`` of a continuous entry; ``F(x - 1) + v p(x)`` of a discrete one.
        """
        if not self.discrete:
            return self.cdf(parameters, x)
        return self.cdf(parameters, wide(x) - 1) + v * self.log_prob(parameters, x).exp()

    def sample(self, parameters: Tensor) -> Tensor:
        """One draw ``(...)`` for each row of parameters, without gradient; often quicker than quantiles of noise."""
        z = torch.randn(parameters.shape[:-1], dtype=parameters.dtype, device=parameters.device)
        return self.quantile(parameters, z)

    def embed(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What a network sees of entries, ``(..., inputs)``."""
        return _floating(x, dtype)[..., None]


@dataclass(frozen=True)
class Bernoulli(Conditional):
    r"""Zero or one, :math:`P(x = 1) = \sigma(\ell)` with the logit :math:`\ell` as the only parameter.

    Tempering divides the logit, which is :math:`p^{1/T}` exactly. A network sees :math:`2x - 1`.

    Shape:
        parameters ``(..., 1)``, values ``(...)``, as floating point numbers.

    Example:
        >>> head = Bernoulli()
        >>> head.log_probs(torch.zeros(1)).exp()
        tensor([0.5000, 0.5000])
        >>> head.quantile(torch.zeros(1), torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """

    discrete: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return 1

    @property
    def levels(self) -> int:
        return 2

    @property
    def support(self) -> constraints.Constraint:
        return constraints.boolean

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        x = wide(x)
        valid = (x == 0) | (x == 1)
        logit = parameters[..., 0]
        return torch.where(valid, logsigmoid(torch.where(x == 1, logit, -logit)), -torch.inf)

    def log_cdf(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        logit = parameters[..., 0]
        return staircase(logsigmoid(-logit), logsigmoid(logit), wide(x), 2)

    def quantile(self, parameters: Tensor, z: Tensor) -> Tensor:
        logit = parameters[..., 0].detach()
        return (~reaches(logsigmoid(-logit), logsigmoid(logit), z)).to(parameters.dtype)

    def sample(self, parameters: Tensor) -> Tensor:
        return parameters[..., 0].detach().sigmoid().bernoulli()

    def tempered(self, parameters: Tensor, temperature: float) -> Tensor:
        return parameters / positive(temperature)

    def start(self) -> tuple[float, ...]:
        return (0.0,)

    def embed(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return 2 * super().embed(x, dtype) - 1


@dataclass(frozen=True)
class Categorical(Conditional):
    r"""One of :math:`k` categories, :math:`P(x = j) = e^{\ell_j} / \sum_i e^{\ell_i}` with logits :math:`\ell`.

    The order of the categories is that of their numbers, so that distribution function and quantile exist. Tempering
    divides the logits, which is :math:`p^{1/T}` exactly. A network sees the one-hot vector, or looks the token up.

    Arguments:
        k: number of categories.

    Shape:
        parameters ``(..., k)``, values ``(...)`` in ``torch.int64``.

    Raises:
        ValueError: ``k`` is less than one.

    Example:
        >>> head = Categorical(3)
        >>> logits = torch.tensor([0.2, 0.3, 0.5]).log()
        >>> head.quantile(logits, torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0, 1, 2])
        >>> head.log_prob(logits, torch.tensor([2, 3])).exp()
        tensor([0.5000, 0.0000])
    """

    discrete: ClassVar[bool] = True
    integer: ClassVar[bool] = True
    k: int

    def __post_init__(self) -> None:
        at_least("k", self.k, 1)

    @property
    def size(self) -> int:
        return self.k

    @property
    def inputs(self) -> int:
        return self.k

    @property
    def levels(self) -> int:
        return self.k

    @property
    def vocabulary(self) -> int:
        return self.k

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        x = wide(x)
        valid = is_level(x, self.k)
        index = torch.where(valid, x, 0).to(torch.int64)
        log_p, index = torch.broadcast_tensors(self.log_probs(parameters), index[..., None])
        return torch.where(valid, log_p.gather(-1, index[..., :1])[..., 0], -torch.inf)

    def log_probs(self, parameters: Tensor) -> Tensor:
        return parameters.log_softmax(-1)

    def log_cdf(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        log_p, x = self.log_probs(parameters), wide(x)
        below = torch.arange(self.k, device=x.device) <= x[..., None]
        lower = torch.where(below, log_p, LOG_ZERO).logsumexp(-1)
        upper = torch.where(below, LOG_ZERO, log_p).logsumexp(-1)
        return staircase(lower, upper, x, self.k)

    def quantile(self, parameters: Tensor, z: Tensor) -> Tensor:
        log_p = self.log_probs(parameters.detach())
        lower = log_p.logcumsumexp(-1)[..., :-1]
        upper = log_p.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
        return (~reaches(lower, upper, z[..., None])).sum(-1)

    def sample(self, parameters: Tensor) -> Tensor:
        return choose(parameters)

    def tempered(self, parameters: Tensor, temperature: float) -> Tensor:
        return parameters / positive(temperature)

    def start(self) -> tuple[float, ...]:
        return (0.0,) * self.k

    def embed(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        categories = torch.arange(self.k, device=x.device)
        return (x[..., None] == categories).to(_floating(x, dtype).dtype)


def wide(x: Tensor) -> Tensor:
    """Discrete values in a type that holds -1 and all levels, which booleans and bytes do not."""
    return x if x.is_floating_point() else x.to(torch.int64)


def is_level(x: Tensor, levels: int) -> Tensor:
    """Whether discrete values are whole numbers from 0 to ``levels - 1``."""
    inside = (x >= 0) & (x < levels)
    return inside & (x == x.round()) if x.is_floating_point() else inside


def staircase(lower: Tensor, upper: Tensor, x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Log distribution function and complement of a discrete law, given inside, with its ends put right."""
    before, last = x < 0, x >= levels - 1
    lower = torch.where(before, -torch.inf, torch.where(last, 0.0, lower))
    return lower, torch.where(before, 0.0, torch.where(last, -torch.inf, upper))


def choose(logits: Tensor) -> Tensor:
    """A category ``(...)`` for each row of logits ``(..., k)``: steps of the distribution function below a uniform."""
    steps = logits.detach().softmax(-1).cumsum(-1)
    u = torch.rand(steps[..., :1].shape, dtype=steps.dtype, device=steps.device) * steps[..., -1:]
    return torch.searchsorted(steps, u, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def reaches(lower: Tensor, upper: Tensor, z: Tensor) -> Tensor:
    """Whether a log distribution function reaches that of the normal score, compared in the smaller tail."""
    return torch.where(z < 0, lower >= log_ndtr(z), upper <= log_ndtr(-z))


def positive(temperature: float) -> float:
    """The temperature, if it is one."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, needs a positive finite number; 1 leaves the law as it is.")
    return temperature


def at_least(name: str, value: int, least: int) -> None:
    """Refuse sizes that are too small or no integers."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, needs an integer of at least {least}.")


def soft_floor(raw: Tensor, floor: float) -> Tensor:
    """``raw`` where it is well above a negative floor, zero at zero, never below the floor, always with gradient."""
    return floor + softplus(raw + math.log(math.expm1(-floor)))


def undo_soft_floor(value: Tensor, floor: float) -> Tensor:
    """The ``raw`` of a value; of a value at or below the floor, that of one a little above."""
    above = (value - floor).clamp_min(1e-3)
    return above + torch.log(-torch.expm1(-above)) - math.log(math.expm1(-floor))


def _floating(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Entries as numbers for a network: of the given type, else of their own, else of the default one."""
    return x.to(dtype or (x.dtype if x.is_floating_point() else torch.get_default_dtype()))


def _check_unit(u: Tensor) -> None:
    """Refuse probabilities outside the open unit interval; values that are being batched or traced cannot be seen."""
    try:
        outside = not bool(((u > 0) & (u < 1)).all())
    except RuntimeError:
        return
    if outside:
        raise ValueError(
            f"u: got values in [{float(u.min()):.6g}, {float(u.max()):.6g}], needs probabilities strictly between 0 "
            "and 1; quantile takes normal scores, which reach further into the tails."
        )
