r"""Objectives: how an energy learns without its normaliser.

==================== ============================================== ===================== =======================
objective            asks the model for                             learns                blind to
==================== ============================================== ===================== =======================
:class:`Hyvarinen`   score and its divergence at data               the data's law        weights of far modes
:class:`Sliced`      score, and products with its derivative        the data's law        weights of far modes
:class:`Denoising`   score at noisy data                            the blurred law       less, with more noise
:class:`Contrastive` energy at data, and at chains of its own       the data's law        nothing, if chains mix
:class:`NCE`         energy at data, and at draws of the base       the law, and its Z    nothing
:class:`Recovery`    energy at data, and at short chains from noise the data's law        little
==================== ============================================== ===================== =======================

An objective is a record of options and a function :meth:`Objective.loss` of a model and its rows. What it must
remember (a replay buffer, a learned constant) are modules that it gives the model in :meth:`Objective.prepare`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..contract import GenerativeModel
from ..foundation.objectives import (
    contrastive_divergence,
    denoising_score_matching,
    hyvarinen_score,
    logistic_contrast,
    sliced_score_matching,
)
from ..foundation.shapes import Context, Rows, Values
from .negatives import Langevin, ReplayBuffer
from .network import check_curvature

__all__ = ["NCE", "Contrastive", "Denoising", "Hyvarinen", "Objective", "Recovery", "Sliced"]


class Objective(ABC):
    """What ``Energy.loss`` computes.

    Attributes:
        comparable: whether its value tells the better of two models.
        told: columns of context that it adds, for the level of noise.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> class Likelihood(Objective):                    # of an energy whose constant is known to be one
        ...     def loss(self, model, y, c):
        ...         return -model.unnormalized_rows(y, c)
        >>> gm.Energy(2, objective=Likelihood()).loss(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    comparable: ClassVar[bool] = True

    @property
    def told(self) -> int:
        """Columns that the network is told besides the context."""
        return 0

    def prepare(self, model: GenerativeModel) -> None:
        """Give a new model what the objective must remember, and refuse a model that it cannot teach."""
        return

    @abstractmethod
    def loss(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        """Loss of rows of data, ``(rows,)``."""

    def tell(self, y: Rows, c: Context | None, level: Tensor | None) -> Tensor | None:
        """What the network is told of a context and a level of noise."""
        return c

    def surrogate(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        r"""A zero for each row whose gradient is that of :math:`-\log Z`; the contrastive objective has one."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hyvarinen(Objective):
    """Score matching by the exact divergence of the score: as many reverse passes as features, in one batch.

    References:
        A. Hyvarinen, 2005, see :func:`pyro_genmods.foundation.objectives.hyvarinen_score`.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> gm.Energy(2, objective=Hyvarinen()).loss(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def prepare(self, model: GenerativeModel) -> None:
        _check_second_derivatives(model, "hyvarinen")

    def loss(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        return hyvarinen_score(lambda rows: model.score_rows(rows, c), y)


@dataclass(frozen=True)
class Sliced(Objective):
    """Score matching along random signs.

    Arguments:
        directions: for each example.

    References:
        Y. Song et al., 2019, arXiv:1905.07088.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> gm.Energy(2, objective=Sliced(directions=4)).loss(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    directions: int = 1

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"directions: got {self.directions}, needs at least 1.")

    def prepare(self, model: GenerativeModel) -> None:
        _check_second_derivatives(model, "sliced")

    def loss(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        shape = (self.directions, *y.shape)
        signs = 2 * torch.randint(0, 2, shape, device=y.device).to(y.dtype) - 1
        return sliced_score_matching(lambda rows: model.score_rows(rows, c), y, signs)


@dataclass(frozen=True)
class Denoising(Objective):
    r"""Denoising score matching at one level of noise, or at many.

    What is learned is the law of the data *plus noise* of the least level. With several levels the network is told the
    logarithm of the level, each example takes one at random, and losses count alike, in units of the noise.

    Arguments:
        noise: standard deviations in the coordinates of the network (standard deviations of the data, after ``fit``),
            one or several, in falling order.

    Raises:
        ValueError: a level that is not positive, or levels that do not fall.

    References:
        P. Vincent, 2011. Y. Song, S. Ermon, Generative Modeling by Estimating Gradients of the Data Distribution, 2019,
        arXiv:1907.05600.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> gm.Energy(2, objective=Denoising((1.0, 0.3, 0.1))).loss(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    noise: float | tuple[float, ...] = 0.1

    def __post_init__(self) -> None:
        levels = self.levels
        falling = all(a > b for a, b in pairwise(levels))
        if not levels or min(levels) <= 0 or not falling:
            raise ValueError(f"noise: got {self.noise}, needs positive levels in falling order.")

    @property
    def levels(self) -> tuple[float, ...]:
        """All of them."""
        return (self.noise,) if isinstance(self.noise, int | float) else tuple(self.noise)

    @property
    def told(self) -> int:
        return int(len(self.levels) > 1)

    def tell(self, y: Rows, c: Context | None, level: Tensor | None) -> Tensor | None:
        if not self.told:
            return c
        column = y.new_full((len(y), 1), self.levels[-1]) if level is None else level
        return column.log() if c is None else torch.cat([c, column.log()], -1)

    def loss(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        levels = y.new_tensor(self.levels)
        sigma = levels[torch.randint(len(levels), (len(y), 1), device=y.device)]
        noise = torch.randn_like(y)
        return denoising_score_matching(model.score_rows(y + sigma * noise, c, sigma), noise, sigma)


@dataclass(frozen=True)
class Contrastive(Objective):
    r"""Contrastive divergence: data against draws of the model, by chains that go on from step to step.

    Persistent chains live in a replay buffer, to which they are written back; a fraction of those that are drawn starts
    anew from the base. With ``persistent=False`` they start at the data and are thrown away, and what is minimised is
    not the likelihood any more. The value of the loss says nothing, so ``fit`` keeps the last weights.

    Arguments:
        transitions: of each chain for each step of training.
        kernel: ``"mala"``, with an accept test and a step size that follows its acceptance, or ``"ula"``, without: what
            is then learned is the energy of which the *discretised* chain draws the data.
        persistent: see above.
        buffer_size: chains that are kept.
        restart: fraction of the drawn chains that starts anew.
        step_size: of a leapfrog, in the coordinates of the network; where ``"mala"`` begins.
        temperature: the chains draw from :math:`p^{1/T}`. Anything but 1 learns an energy :math:`T` times too flat; it
            is what images are often trained with.

    Raises:
        ValueError: an option out of its range; a buffer smaller than a batch, at the first step.

    References:
        T. Tieleman, 2008. Y. Du, I. Mordatch, Implicit Generation and Generalization in Energy-Based Models, 2019,
        arXiv:1903.08689.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Energy(2, objective=Contrastive(transitions=2, buffer_size=64))
        >>> model.loss(torch.zeros(32, 2)).shape, model.comparable
        (torch.Size([32]), False)
    """

    transitions: int = 10
    kernel: str = "mala"
    persistent: bool = True
    buffer_size: int = 4096
    restart: float = 0.05
    step_size: float = 0.2
    temperature: float = 1.0

    comparable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kernel not in ("mala", "ula"):
            raise ValueError(f"kernel: got {self.kernel!r}, needs 'mala' or 'ula'.")
        if self.transitions < 1 or self.buffer_size < 1:
            raise ValueError(f"transitions, buffer_size: got {self.transitions}, {self.buffer_size}; need at least 1.")
        if not 0 <= self.restart <= 1:
            raise ValueError(f"restart: got {self.restart}, needs a fraction.")
        if not (self.step_size > 0 and self.temperature > 0):
            raise ValueError(
                f"step_size, temperature: got {self.step_size}, {self.temperature}; need positive numbers."
            )

    def prepare(self, model: GenerativeModel) -> None:
        chain = Langevin(self.transitions, self.kernel, self.step_size, self.temperature)
        told = model.context_shape.numel() if model.context_shape else 0
        size = self.buffer_size if self.persistent else 0
        model.negatives = ReplayBuffer(size, model.features, told, chain, self.restart)

    def loss(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        if self.persistent:
            fake, told = model.negatives.draw(model, len(y), c, advance=model.training)
        else:
            fake, told = model.negatives.chain(model, y.detach(), c), c
        both = None if c is None else torch.cat([c, told])
        real, drawn = (-model.unnormalized_rows(torch.cat([y, fake]), both)).split(len(y))
        return contrastive_divergence(real, drawn)

    def surrogate(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        fake, told = model.negatives.draw(model, max(len(y), 1), c, advance=model.training)
        mean = -model.unnormalized_rows(fake, told).mean()
        return (mean - mean.detach()).expand(len(y))


@dataclass(frozen=True)
class NCE(Objective):
    r"""Noise-contrastive estimation: tell data from draws of the base.

    .. math:: \log \frac{p(y)}{b(y)} = -E(y) - \log Z

    are the log odds, with :math:`\log Z` a parameter, so that the constant is learned along: it is
    ``model.noise_contrast``. The nearer the base is to the data, the better; a fitted flow is best. A far one needs
    more draws.

    Arguments:
        draws: of the base, for each datum.

    References:
        M. U. Gutmann, A. Hyvarinen, 2012. R. Gao, E. Nijkamp, D. P. Kingma, Z. Xu, A. M. Dai, Y. N. Wu, Flow
        Contrastive Estimation of Energy-Based Models, 2020, arXiv:1912.00589.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Energy(2, objective="nce")
        >>> model.loss(torch.zeros(3, 2)).shape, model.noise_contrast.item()
        (torch.Size([3]), 0.0)
    """

    draws: int = 1

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws: got {self.draws}, needs at least 1 for each datum.")

    def prepare(self, model: GenerativeModel) -> None:
        if model.base is None:
            raise ValueError("base: objective='nce' tells data from draws of the base, so it needs one; got None.")
        model.noise_contrast = nn.Parameter(torch.zeros((), dtype=model.place[0], device=model.place[1]))

    def loss(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        many = None if c is None else c.repeat_interleave(self.draws, 0)
        fake = model.reference_rows(len(y) * self.draws, many)
        real = -model.energy_rows(y, c) - model.noise_contrast
        noise = -model.energy_rows(fake, many) - model.noise_contrast
        return logistic_contrast(real, noise.reshape(len(y), self.draws))


@dataclass(frozen=True)
class Recovery(Objective):
    r"""Recovery likelihood: data against draws given their noisy versions, which chains reach in a few steps.

    .. math:: p(y \mid \tilde y) \propto b(y)\, e^{-E(y) - |y - \tilde y|^2 / 2 \sigma^2}, \qquad
              \tilde y = y + \sigma \epsilon

    Arguments:
        noise: :math:`\sigma`, in the coordinates of the network.
        transitions: of each chain, from the noisy version on.

    References:
        R. Gao, Y. Song, B. Poole, Y. N. Wu, D. P. Kingma, Learning Energy-Based Models by Diffusion Recovery
        Likelihood, 2021, arXiv:2012.08125.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> gm.Energy(2, objective="recovery").loss(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    noise: float = 0.5
    transitions: int = 20

    comparable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.noise > 0 or self.transitions < 1:
            raise ValueError(f"noise, transitions: got {self.noise}, {self.transitions}; need above 0, at least 1.")

    def prepare(self, model: GenerativeModel) -> None:
        chain = Langevin(self.transitions, "mala", 0.8 * self.noise)
        model.negatives = ReplayBuffer(0, model.features, 0, chain, 0.0)

    def loss(self, model: GenerativeModel, y: Rows, c: Context | None) -> Values:
        noisy = y + self.noise * torch.randn_like(y)

        def pull(rows: Tensor) -> Tensor:
            return 0.5 * ((rows - noisy) / self.noise).square().sum(-1)

        fake = model.negatives.chain(model, noisy, c, pull)
        return contrastive_divergence(-model.unnormalized_rows(y, c), -model.unnormalized_rows(fake, c))


def _check_second_derivatives(model: GenerativeModel, name: str) -> None:
    y = torch.randn(8, model.features, generator=torch.Generator().manual_seed(0)).to(*reversed(model.place))
    c = y.new_zeros(8, model.context_shape.numel()) if model.context_shape else None
    check_curvature(lambda rows: model.energy_rows(rows, c), y, name)


OBJECTIVES: dict[str, type[Objective]] = {
    "denoising": Denoising,
    "sliced": Sliced,
    "hyvarinen": Hyvarinen,
    "contrastive": Contrastive,
    "nce": NCE,
    "recovery": Recovery,
}
