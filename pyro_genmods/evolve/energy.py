r"""A diffusion whose network is an energy: a log density by one call, up to one constant.

The network is a potential :math:`\Phi_\theta(u)`, its gradient the velocity, and

.. math:: \log p_\theta(u) = -\tfrac12 \|u\|^2 - \cot\theta \, \Phi_\theta(u) - \log Z_\theta ,

so that the score is conservative, and accept tests cost one call. Denoising says nothing about :math:`Z_\theta`; it is
fixed by the density of the probability flow at one reference point.

Reference:
    Y. Du et al., Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC, 2023,
    arXiv:2302.11552.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contract import Cost, Density, GenerativeModel
from ..foundation.errors import DensityError
from ..foundation.numerics import normal_log_prob
from ..foundation.ode import RK4
from ..foundation.shapes import Context, Rows, Values

__all__ = ["EnergyLaw", "ScalarNetwork"]


class ScalarNetwork(nn.Module):
    r"""One number from a network of vectors: :math:`\Phi = \langle u, F(t, u, c) \rangle`.

    Arguments:
        network: called as ``network(t, u, c)``, returns rows like ``u``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.one_time = getattr(network, "one_time", False)

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        return (u * self.network(t, u, c)).sum(-1, keepdim=True)


class EnergyLaw(GenerativeModel):
    r"""The law whose log density is an energy diffusion's network itself, at one level of noise.

    Draws are those of the probability flow down to that level, which are its own only if the network is exact; chains
    (``infer.MCMC``) draw from it exactly, at one call an accept test.

    Arguments:
        diffusion: a :class:`~pyro_genmods.Diffusion` with ``parameterization="energy"``; the network is shared.
        level: noise in the law, in white standard deviations; the error of a learned network is divided by it.

    Raises:
        DensityError: the diffusion has no energy.
        ValueError: a level that is not positive.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> law = gm.Diffusion(2, parameterization="energy").energy_law(level=0.05)
        >>> law.density.name, law().log_prob(torch.zeros(1, 2)).shape
        ('UNNORMALIZED', torch.Size([1]))
        >>> law.normalize_at(torch.zeros(2)).density.name
        'ESTIMATE'
    """

    def __init__(self, diffusion: GenerativeModel, level: float = 0.05) -> None:
        if getattr(diffusion, "parameterization", None) != "energy":
            raise DensityError(
                "energy_law: the network is no energy; build the model with Diffusion(parameterization='energy')."
            )
        if not level >= diffusion.sigma_min:
            raise ValueError(f"level: got {level}, needs at least the model's sigma_min, {diffusion.sigma_min}.")
        super().__init__(diffusion.event_shape, diffusion.context_shape, diffusion.coordinates.support)
        self.diffusion, self.level, self.density = diffusion, level, Density.UNNORMALIZED
        self.coordinates = diffusion.coordinates
        self.context_standardization = diffusion.context_standardization
        self.angle = math.atan(level)
        self.register_buffer("log_normalizer", torch.zeros(()))
        self.to(*reversed(diffusion.place))

    @property
    def cost(self) -> Cost:
        """One call to score; draws take those of the probability flow."""
        return Cost(sample=self.diffusion.solver.evaluations, score=1)

    def normalize_at(self, x: Tensor, context: Tensor | None = None) -> EnergyLaw:
        """Fix the constant by the density of the probability flow, smoothed to this level, at one event.

        Arguments:
            x: ``event_shape``, where the data are dense.
            context: ``context_shape``, for a conditional model; the constant is that of this context.
        """
        rows, c = self.rows(x[None], None if context is None else context[None])
        with torch.no_grad():
            exact = self._flow_log_prob(rows, c)
            self.log_normalizer.copy_((self.log_prob_rows(rows, c) + self.log_normalizer - exact)[0])
        self.density = Density.ESTIMATE
        return self

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        model = self.diffusion
        u = model.whitening(y) * math.cos(self.angle)
        t = torch.as_tensor(self.angle, dtype=u.dtype, device=u.device)
        value = -0.5 * u.square().sum(-1) - model.denoiser.potential(t, u, model.told(c)) / math.tan(self.angle)
        return value - self.log_normalizer

    def push_rows(self, z: Tensor, c: Context | None) -> Rows:
        model = self.diffusion
        u = model._solve(model.denoiser.velocity, z, model.told(c), self._angles(16), RK4(16))
        return model.whitening.inverse(u / math.cos(self.angle))

    def _flow_log_prob(self, y: Rows, c: Context | None) -> Values:
        model = self.diffusion
        u = nn.functional.pad(model.whitening(y) * math.cos(self.angle), (0, 1))
        end = model._solve(model.denoiser.augmented, u, model.told(c), self._angles(64).flip(0), RK4(64))
        volume = model.whitening.log_scale() - model.features * math.log(math.cos(self.angle))
        return normal_log_prob(end[:, :-1]) + end[:, -1] - volume

    def _angles(self, steps: int) -> Tensor:
        fractions = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 3
        span = self.diffusion.top ** (1 / 3) - self.angle ** (1 / 3)
        grid = (self.angle ** (1 / 3) + span * fractions ** (1 / 3)) ** 3
        return grid.to(self.diffusion.knots)
