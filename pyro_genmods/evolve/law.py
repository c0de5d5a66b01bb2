"""What Pyro sees of a diffusion: the law of its probability flow, at a context."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from ..distribution import GenerativeDistribution
from ..foundation.causal import transformed
from ..foundation.errors import SupportError
from ..foundation.ode import FixedStep
from .lost import refuse_lost
from .network import check_level
from .samplers import Sampler
from .steps import Steps

__all__ = ["DiffusionDistribution"]


class DiffusionDistribution(GenerativeDistribution):
    """The law of the probability flow of a diffusion: a Pyro distribution with a density.

    Beyond what every :class:`~pyro_genmods.GenerativeDistribution` has, it says how well its equation is solved, knows
    its score by one call of the network, and draws by other samplers.
    """

    @property
    def evaluations(self) -> int:
        """Sequential network calls of a draw, and of a density."""
        return self.model.solver.evaluations

    @property
    def log_prob_error(self) -> float:
        """Largest error of a log density by the solver, in nats; see :meth:`~pyro_genmods.Diffusion.calibrate`."""
        return self.model.log_prob_error

    def sample(self, sample_shape: Any = Size(), *, sampler: Sampler | FixedStep | None = None) -> Tensor:
        """Draw without gradient, ``(*sample_shape, *batch_shape, *event_shape)``.

        Arguments:
            sample_shape: how many.
            sampler: another way to the data; the draws have the law of that sampler, see :mod:`evolve.samplers`.
        """
        if sampler is None:
            return super().sample(sample_shape)
        law = self.model.sampled_by(sampler)(self.context)
        return (law if self.context is not None else law.expand(self.batch_shape)).sample(sample_shape)

    def score(self, x: Tensor, level: float | None = None) -> Tensor:
        r"""Gradient :math:`\nabla_x \log p(x)` by one call of the network, ``(*broadcast(lead, batch_shape), *event)``.

        It is that of the law with noise of a small level, chosen when the model was calibrated to be nearest to the
        gradient of :meth:`log_prob`, which is many times as dear. For optimisation take that one.

        Arguments:
            x: ``(*lead, *event_shape)``.
            level: noise, in white standard deviations, at least the model's ``sigma_min``.

        Returns:
            The gradient; NaN where validation is off and ``x`` is NaN, infinite or outside the support.

        Raises:
            SupportError: with validation on, a value that is NaN, infinite or outside the support.
            ValueError: a level below the model's least.
            IntegrationError: with validation on, a network that is NaN or infinite there.
        """
        check_level(level, self.model.sigma_min)
        strict = bool(self._validate_args) and not transformed()
        if strict and not self._check_value(x):
            raise SupportError(
                f"value: {int(x.isinf().sum())} of its entries are infinite, and {self} has no score there; "
                "correct the data."
            )
        lead, rows, c = self._rows(x, self.event_shape)
        model = self.model
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            y, volume = model.coordinates.pull(leaf)
            score = model.score_rows(y.detach(), c, level)
            (gradient,) = torch.autograd.grad(
                (y * score).sum() + volume.sum(), leaf, create_graph=torch.is_grad_enabled() and score.requires_grad
            )
        inside = volume.detach().isfinite().reshape((-1,) + (1,) * len(self.event_shape))
        gradient = torch.where(inside, gradient, torch.nan)
        refuse_lost(gradient, math.atan(level or model.score_level), strict)
        shape = torch.broadcast_shapes(lead, self.batch_shape) + self.event_shape
        return gradient.reshape(lead + self.event_shape).expand(shape)

    def steps(self, n: int) -> Steps:
        """The ancestral chain of ``n`` steps opened up: an iterator over particles, with a look-ahead.

        Arguments:
            n: number of steps.

        Example:
            >>> import torch, pyro_genmods as gm
            >>> for step in gm.Diffusion(2)().steps(8).start(100):
            ...     finished = step.mean        # what the particles are going to be, on average
            >>> finished.shape
            torch.Size([100, 2])
        """
        return Steps(self, n)
