"""The law of what a sampler makes of a diffusion: a pushforward of all the noise that it draws.

A few steps of a sampler define a law of their own, near that of the probability flow. It has no density, and needs none
in noise space: with :class:`~pyro_genmods.infer.PushforwardReparam` eight to sixteen calls are one evaluation of a
posterior, and the inference is exact for this law.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor

from ..contract import Cost, Density, GenerativeModel
from ..foundation.errors import DensityError
from ..foundation.ode import FixedStep
from ..foundation.shapes import Context, Rows
from .denoiser import Denoiser
from .lost import LostRowsError, carried
from .samplers import Sampler

__all__ = ["SampledLaw"]


class SampledLaw(GenerativeModel):
    """A diffusion's network, read by a sampler.

    Arguments:
        diffusion: a :class:`~pyro_genmods.Diffusion`; the network is shared, not copied.
        sampler: a :class:`~pyro_genmods.evolve.samplers.Sampler`, or steps of a solver of the probability flow.

    Raises:
        TypeError: no diffusion, or no sampler.
        IntegrationError: when it draws, rows that the network makes NaN or infinite; step and rows are named. Where
            torch's validation is off, as inside a traced program, they are NaN instead.

    Shape:
        noise ``(1 + draws, features)`` where the sampler adds noise on its way, else ``(features,)``.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> prior = gm.Diffusion(2).sampled_by(gm.evolve.AdamsBashforth(8))
        >>> law = prior()
        >>> law.density.name, law.push(torch.randn(5, 2)).shape, prior.cost.sample
        ('IMPLICIT', torch.Size([5, 2]), 8)
    """

    density = Density.IMPLICIT

    def __init__(self, diffusion: GenerativeModel, sampler: Sampler | FixedStep) -> None:
        if not hasattr(diffusion, "denoiser"):
            raise TypeError(f"diffusion: got {type(diffusion).__name__}, needs a Diffusion.")
        if not isinstance(sampler, Sampler | FixedStep):
            raise TypeError(
                f"sampler: got {type(sampler).__name__}, needs a sampler of pyro_genmods.evolve, such as Ancestral(64) "
                "or RK4(16)."
            )
        super().__init__(diffusion.event_shape, diffusion.context_shape, diffusion.coordinates.support)
        self.diffusion, self.sampler = diffusion, sampler
        self.coordinates = diffusion.coordinates
        self.context_standardization = diffusion.context_standardization
        self.has_rsample = getattr(sampler, "differentiable", True)

    @property
    def _asked(self) -> Denoiser:
        """Whom the sampler asks."""
        return self.diffusion.denoiser

    @property
    def cost(self) -> Cost:
        """Calls of the network for a draw."""
        return Cost(sample=self.sampler.evaluations, score=None)

    @property
    def noise_shape(self) -> Size:
        """One row, or one more than the sampler draws."""
        draws = getattr(self.sampler, "draws", 0)
        return Size([1 + draws, self.features]) if draws else Size([self.features])

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """That of the diffusion, whose network this is."""
        return self.diffusion.loss(x, context)

    def push_rows(self, z: Tensor, c: Context | None) -> Rows:
        if not self.has_rsample:
            raise DensityError(
                f"{type(self.sampler).__name__}: draws its noise inside and has no noise space; take Ancestral(n)."
            )
        first, *rest = z.unbind(1) if z.dim() == 3 else (z,)
        return self._run(first, c, iter(rest).__next__)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        """Draw rows; noise is drawn when it is needed."""
        dtype, device = self.place
        first = torch.randn(rows, self.features, dtype=dtype, device=device)
        return self._run(first, c, lambda: torch.randn_like(first))

    def _run(self, u: Tensor, c: Tensor | None, draw: Any) -> Rows:
        model, sampler = self.diffusion, self.sampler
        angles, told = model.angles(sampler.steps, getattr(sampler, "schedule", None)), model.told(c)
        if not isinstance(sampler, FixedStep):
            return model.coloured(carried(sampler, self._asked, (u, told), angles, draw))
        try:
            return model.coloured(model._solve(self._asked.velocity, u, told, angles, sampler))
        except LostRowsError as error:  # a guided denoiser
            raise error.during(int((angles >= error.angle).sum()), sampler.steps) from None
