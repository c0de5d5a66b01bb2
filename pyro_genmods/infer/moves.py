"""Moves of particles under a Gaussian prior: elliptical slices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..foundation.elliptical import elliptical_slice
from ..foundation.errors import ModelError
from ..foundation.moves import Moves
from .potential import Potential

__all__ = ["EllipticalMoves"]


class EllipticalMoves(Moves):
    """Elliptical slice moves: for priors that are Gaussian in unconstrained space.

    Whether the prior is Gaussian is asked of its energy: mean and covariance are read off its gradients, and the energy
    must be the quadratic form that they make.

    Raises:
        ModelError: it is not.
    """

    def __init__(self, energy: Potential, q: Tensor, generator: torch.Generator, groups: int = 1) -> None:
        super().__init__(energy, q, generator, groups)
        self._mean, self._factor = self._gaussian_prior(q)

    def _gaussian_prior(self, q: Tensor) -> tuple[Tensor, Tensor]:
        dim = q.shape[1]
        points = torch.cat([q.new_zeros(1, dim), torch.eye(dim, dtype=q.dtype, device=q.device)])
        values, slopes = self.energy.prior_value_and_grad(points)
        precision = (slopes[1:] - slopes[0]).double()
        precision = (precision + precision.mT) / 2
        factor, failed = torch.linalg.cholesky_ex(precision)
        if int(failed) == 0:
            mean = -torch.cholesky_solve(slopes[:1].double().mT, factor).squeeze(-1)
            x = q[:8].double() - mean
            expected = values[0].double() + 0.5 * ((x @ precision) * x).sum(-1) - 0.5 * mean @ precision @ mean
            found = self.energy.parts(q[:8].contiguous())[0].double()
            scale = 1 + expected.abs().max()
            if torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(scale)):
                root = torch.linalg.solve_triangular(factor, torch.eye(dim).to(factor), upper=False).mT
                return mean.to(q.dtype), root.to(q.dtype)
        raise ModelError(
            "moves: elliptical slices need a prior that is Gaussian in unconstrained space, and this one is not; put "
            "learned priors into noise space with infer.PushforwardReparam, or use moves='hmc'."
        )

    def learn(self, q: Tensor, weight: Tensor) -> None:
        """Nothing: there is nothing to tune."""

    def begin(self, q: Tensor) -> Tensor:
        self._beta, self._centred = self.energy.inverse_temperature, q - self._mean
        self._reached = self._level(self._centred)
        return self._reached / self._beta

    def once(self) -> tuple[Tensor, Tensor, float]:
        noise = torch.empty_like(self._centred).normal_(generator=self.generator) @ self._factor.mT
        outcome = elliptical_slice(self._centred, self._reached, self._level, noise, self.generator)
        self._centred, self._reached, evaluations = outcome
        return self._centred + self._mean, self._reached / self._beta, 1 / evaluations

    def _level(self, centred: Tensor) -> Tensor:
        level = -self._beta * self.energy.parts((centred + self._mean).contiguous())[1]
        return torch.where(level.isnan(), -torch.inf, level)
