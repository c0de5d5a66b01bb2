"""Gaussian mixtures: exact denoisers for diffusions, exact posteriors under linear measurements, and a distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyro_genmods as gm


class MixtureDenoiser(nn.Module):
    """The mean of the white datum given the noisy one, as a network; all numbers are in white units.

    Arguments:
        log_weights: ``(modes,)``.
        means: ``(modes, d)``.
        covariances: ``(modes, d, d)``; faster where all are the same.
    """

    def __init__(self, log_weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        self.shared = bool((covariances == covariances[:1]).all())
        values, vectors = torch.linalg.eigh(covariances[:1] if self.shared else covariances)
        centres = means @ vectors[0] if self.shared else (means[:, None] @ vectors)[:, 0]
        for name, value in (("log_weights", log_weights), ("centres", centres)):
            self.register_buffer(name, value)
        self.register_buffer("values", values)  # (modes or 1, d)
        self.register_buffer("vectors", vectors)

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        variance = t.cos()[:, None] ** 2 * self.values + t.sin()[:, None] ** 2  # (rows, modes or 1, d)
        turned = (u @ self.vectors[0])[:, None] if self.shared else torch.einsum("ni,kij->nkj", u, self.vectors)
        gap = turned - t.cos()[:, None] * self.centres
        log_density = self.log_weights - 0.5 * (gap * gap / variance).sum(-1) - 0.5 * variance.log().sum(-1)
        share = log_density.softmax(-1)[..., None]
        data = self.centres + t.cos()[:, None] * self.values / variance * gap
        if self.shared:
            return (share * data).sum(1) @ self.vectors[0].mT
        return torch.einsum("nkj,kij->ni", share * data, self.vectors)


@dataclass
class Mixture:
    """A mixture of Gaussians.

    Arguments:
        weights: ``(modes,)``, of sum one.
        means: ``(modes, d)``.
        covariances: ``(modes, d, d)``.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance."""
        mean = self.weights @ self.means
        gap = self.means - mean
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return mean, within + torch.einsum("k,ki,kj->ij", self.weights, gap, gap)

    def sample(self, n: int) -> Tensor:
        """Draws ``(n, d)``."""
        mode = torch.multinomial(self.weights, n, replacement=True)
        root = torch.linalg.cholesky(self.covariances)
        noise = torch.randn(n, self.means.shape[1], dtype=self.means.dtype)
        return self.means[mode] + torch.einsum("nij,nj->ni", root[mode], noise)

    def diffusion(self, dtype: torch.dtype = torch.float64, **options: object) -> gm.Diffusion:
        """A diffusion whose network is the exact denoiser."""
        mean, covariance = self.moments()
        inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
        white = inverse @ self.covariances @ inverse.mT
        network = MixtureDenoiser(self.weights.log(), (self.means - mean) @ inverse.mT, white).to(dtype)
        model = gm.Diffusion(len(mean), network=network, parameterization="denoised", **options).to(dtype)
        model.set_moments(mean, covariance)
        return model

    def log_prob(self, x: Tensor) -> Tensor:
        """Of rows ``(n, d)``."""
        parts = torch.distributions.MultivariateNormal(self.means, self.covariances)
        return (parts.log_prob(x.double()[:, None]) + self.weights.log()).logsumexp(-1)

    def posterior(self, a: Tensor, r: Tensor, y: Tensor) -> tuple[Mixture, float]:
        """The posterior given ``y = a x + noise`` of covariance ``r``, and the log evidence."""
        s = a @ self.covariances @ a.mT + r
        gain = torch.linalg.solve(s, a @ self.covariances).mT
        error = y - self.means @ a.mT
        fit = torch.distributions.MultivariateNormal(torch.zeros_like(y), s).log_prob(error) + self.weights.log()
        means = self.means + torch.einsum("kij,kj->ki", gain, error)
        covariances = self.covariances - gain @ a @ self.covariances
        return Mixture(fit.softmax(0), means, (covariances + covariances.mT) / 2), float(fit.logsumexp(0))


@dataclass
class Measurement:
    """A linear measurement with Gaussian noise.

    Arguments:
        a: ``(d_y, d)``.
        sd: of the noise, of each entry.
        y: ``(d_y,)``.
    """

    a: Tensor
    sd: float
    y: Tensor

    @property
    def r(self) -> Tensor:
        """Covariance of the noise."""
        return self.sd**2 * torch.eye(len(self.y), dtype=self.y.dtype)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Of events ``(rows, d)``."""
        a, y = self.a.to(x.dtype), self.y.to(x.dtype)
        return torch.distributions.Normal(x @ a.mT, self.sd).log_prob(y).sum(-1)


def correlated_gaussian() -> tuple[Mixture, Measurement]:
    """Two standard normals of correlation .8, the first measured as 1.5 with standard deviation .3."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    prior = Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), covariance[None])
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return prior, Measurement(a, 0.3, torch.tensor([1.5], dtype=torch.float64))


def grid_mixture(d: int, seed: int) -> Mixture:
    """Twenty-five modes of unit covariance at ``(8 i, 8 j)`` tiled to ``d`` dimensions, of random weights."""
    generator = torch.Generator().manual_seed(seed)
    grid = 8 * torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=torch.float64)] * 2)
    weights = torch.randn(25, generator=generator, dtype=torch.float64).square()
    eye = torch.eye(d, dtype=torch.float64)
    return Mixture(weights / weights.sum(), grid.repeat(1, d // 2), eye.expand(25, d, d))


def grid_problem(d: int, d_y: int, seed: int) -> tuple[Mixture, Measurement]:
    """The twenty-five modes, and a random measurement of a draw, as in the benchmark of MCGDiff."""
    prior = grid_mixture(d, seed)
    return prior, random_measurement(prior, d_y, seed)


def random_measurement(prior: Mixture, d_y: int, seed: int) -> Measurement:
    """Of a draw around one of the modes, all of unit covariance: scales and noise are uniform, directions too."""
    generator, d = torch.Generator().manual_seed(1000 + seed), prior.means.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(d_y, d_y))[0], torch.linalg.qr(normal(d, d_y))[0]
    scales = torch.rand(d_y, generator=generator, dtype=torch.float64).sort().values
    a = left @ scales.diag() @ right.mT
    sd = float(torch.rand((), generator=generator, dtype=torch.float64) * scales.max())
    mode = int(torch.multinomial(prior.weights, 1, generator=generator))
    x = prior.means[mode] + normal(d)
    return Measurement(a, sd, a @ x + sd * normal(d_y))


def sliced_distance(x: Tensor, y: Tensor, projections: int = 1000) -> float:
    """The sliced Wasserstein distance of order 2 between two samples ``(n, d)`` of equal size."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    along = [(z.double() @ directions).sort(0).values for z in (x, y)]
    return math.sqrt(float((along[0] - along[1]).square().mean()))


def sampling_floor(law: Mixture, n: int, repeats: int = 4) -> float:
    """The mean distance between two samples of the law itself."""
    return sum(sliced_distance(law.sample(n), law.sample(n)) for _ in range(repeats)) / repeats
