r"""Affine flows, whose law is a known Gaussian, and the closed forms of what they are the prior of.

A zuko flow of affine layers without hidden units, whose log-scales do not depend on their inputs, is an affine map; so
:math:`x \sim \mathcal N(m, S)`, and with a measurement :math:`y = x + s\,\varepsilon`

.. math:: x \mid y \sim \mathcal N\bigl(P (S^{-1} m + y / s^2), P\bigr), \quad P = (S^{-1} + I / s^2)^{-1}, \qquad
          y \sim \mathcal N(m, S + s^2 I) .

The moments are read off zuko's own transform, not off the wrapper that is under test. Below the closed forms are the
ways in which chains and guides are run and held against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch import Tensor

import pyro_genmods as gm

from .statistics import chain_standard_error

import zuko  # isort: skip  (the package puts right what importing zuko changes)

DOUBLE = torch.float64
MEANS, SDS = 4.0, 0.05  # tolerances: of means in standard errors, of standard deviations relative
Model = Callable[..., Any]
KINDS = {"maf": zuko.flows.MAF, "nice": zuko.flows.NICE}


def affine_flow(
    kind: str = "maf",
    features: int = 2,
    context: int = 0,
    direction: str = "density",
    standardized: bool = False,
    dtype: torch.dtype = torch.float32,
) -> gm.Flow:
    """A flow that is an affine map of noise and context, with parameters of order one, the same at every call."""
    generator = torch.Generator().manual_seed(7 + features + 10 * context)
    network = KINDS[kind](features, context=context, transforms=1 if kind == "maf" else 2, hidden_features=())
    with torch.no_grad():
        for module in network.modules():
            layer = next(iter(module.hyper), None) if hasattr(module, "hyper") else None
            if layer is not None:
                layer.weight.copy_(0.7 * torch.randn(layer.weight.shape, generator=generator))
                layer.weight[1::2] = 0  # the log-scales, every second output, are constants
                layer.bias.copy_(0.4 * torch.randn(layer.bias.shape, generator=generator))
    flow = gm.Flow(network, direction=direction).to(dtype)
    if standardized:
        rows = torch.randn(50, features, generator=generator).to(dtype)
        scale = 0.5 + torch.arange(features, dtype=dtype)
        flow.standardize(3 + scale * rows, None if not context else rows[:, :context])
    return flow.freeze()


def moments(flow: gm.Flow, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of an affine flow's law in double precision, by zuko's transform and plain algebra."""
    if flow.context_standardization is not None and context is not None:
        context = (context - flow.context_standardization.shift) / flow.context_standardization.scale
    with torch.no_grad():
        transform = flow.flow.transform(context)
        dtype = flow.place[0]
        shift = transform(torch.zeros(flow.features, dtype=dtype)).to(DOUBLE)
        matrix = torch.stack([transform(row).to(DOUBLE) - shift for row in torch.eye(flow.features, dtype=dtype)], -1)
        if flow.direction == "density":
            matrix = matrix.inverse()
            shift = -matrix @ shift
        units = flow.coordinates.standardization
        mean = units.shift.to(DOUBLE) + units.scale.to(DOUBLE) * shift
        matrix = units.scale.to(DOUBLE)[:, None] * matrix
    return mean, matrix @ matrix.mT


def measured(prior: gm.Flow, noise: float) -> Model:
    """The program ``x ~ prior``, ``y ~ N(x, noise)``."""

    def model(y: Tensor | None = None) -> Tensor:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)
        return x

    return model


def plated(model: Model) -> Model:
    """Independent copies of a program side by side, one for each row of ``y``."""

    def copies(y: Tensor) -> None:
        with pyro.plate("copies", len(y)):
            model(y)

    return copies


@dataclass
class LinearGaussian:
    """The model ``x ~ flow``, ``y ~ N(x, noise)`` and what follows from it, in double precision.

    Attributes:
        prior: an unconditional affine flow.
        noise: standard deviation of the measurement.
    """

    prior: gm.Flow = field(default_factory=affine_flow)
    noise: float = 0.9

    def __post_init__(self) -> None:
        self.mean, self.covariance = moments(self.prior)
        self.features = self.prior.features

    @property
    def model(self) -> Model:
        """The Pyro program of one measurement ``y``, ``(features,)`` or ``None``."""
        return measured(self.prior, self.noise)

    @property
    def plated(self) -> Model:
        """Independent copies of the program side by side; ``y`` is ``(copies, features)``."""
        return plated(self.model)

    def data(self, *batch: int) -> Tensor:
        """Made-up measurements ``(*batch, features)`` from the marginal law of ``y``, the same at every call."""
        generator = torch.Generator().manual_seed(11)
        white = torch.randn(*batch, self.features, generator=generator, dtype=DOUBLE)
        return (self.mean + white @ torch.linalg.cholesky(self.marginal.covariance_matrix).mT).to(self.prior.place[0])

    @property
    def marginal(self) -> dist.MultivariateNormal:
        """Law of ``y``."""
        return dist.MultivariateNormal(self.mean, self.covariance + self.noise**2 * torch.eye(self.features).to(DOUBLE))

    def posterior(self, y: Tensor) -> dist.MultivariateNormal:
        """Law of ``x`` given ``y``, batched as ``y`` is."""
        precision = self.covariance.inverse()
        covariance = (precision + torch.eye(self.features, dtype=DOUBLE) / self.noise**2).inverse()
        mean = (precision @ self.mean + y.to(DOUBLE) / self.noise**2) @ covariance
        return dist.MultivariateNormal(mean, covariance)


# -- inference, and how it is judged -----------------------------------------------------------------------------------


def noisy(model: Model, *sites: str) -> Model:
    """The model in noise space."""
    return poutine.reparam(model, dict.fromkeys(sites or ("x",), gm.infer.PushforwardReparam()))


def chain(
    model: Model, *args: Tensor, draws: int = 120, warmup: int = 100, kernel: Callable = NUTS, **settings
) -> dict:
    """Draws of every latent site, ``(draws, ...)``."""
    mcmc = MCMC(kernel(model, **settings), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()


def push_base(prior: gm.Flow, draws: dict[str, Tensor], context: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return (prior() if context is None else prior(context)).push(draws["x_base"])


def chain_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a series ``(draws, ...)`` and its Monte Carlo standard error."""
    return values.mean(0), chain_standard_error(values[None])


def assert_chain(draws: Tensor, mean: Tensor, covariance: Tensor, tolerance: float = SDS) -> None:
    """Draws ``(draws, copies, D)`` have means ``(copies, D)`` and covariances ``(..., D, D)``, pooled over copies.

    Means within four standard errors, standard deviations within a relative ``tolerance`` of which their standard
    error is at most a third, correlations within four standard errors.
    """
    gap = draws.to(DOUBLE) - mean
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    location, error = chain_mean(gap.mean(1))
    assert (location.abs() <= MEANS * error).all(), f"means off by {location / error} standard errors"
    squares, error = chain_mean((gap / scale).square().mean(1))
    assert (error / 2 <= tolerance / 3).all(), f"standard errors of the sds are {error / 2}: too few draws"
    assert ((squares.sqrt() - 1).abs() <= tolerance).all(), f"sds are {squares.sqrt()} times the truth"
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), gap[..., None], upper=False)[..., 0]
    rows, columns = torch.tril_indices(scale.shape[-1], scale.shape[-1], -1)
    products, error = chain_mean((white[..., rows] * white[..., columns]).mean(1))
    assert (products.abs() <= MEANS * error).all(), f"whitened correlations {products}, standard errors {error}"


def assert_guide(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Independent draws ``(draws, features)`` have this mean and covariance, by the same measures."""
    gap, scale = draws.to(DOUBLE) - mean, covariance.diagonal().sqrt()
    location = gap.mean(0) / (scale / math.sqrt(len(gap)))
    assert (location.abs() <= MEANS).all(), f"means off by {location} standard errors"
    assert ((gap.std(0) / scale - 1).abs() <= SDS).all(), f"sds are {gap.std(0) / scale} times the truth"
    found, truth = torch.corrcoef(gap.T), covariance / (scale * scale[:, None])
    assert (found - truth).abs().max() <= MEANS / math.sqrt(len(gap)), f"correlations {found}, truth {truth}"


def fit(model: Model, guide: Model, *args: Tensor, steps: int, rate: float = 0.2, plates: int = 0) -> None:
    """SVI with 16 particles at once and a step that decays a thousandfold."""
    optimizer = pyro.optim.ClippedAdam({"lr": rate, "lrd": 1e-3 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=plates))
    for _ in range(steps):
        svi.step(*args)


def guide_draws(guide: Model, n: int = 4000) -> Tensor:
    """Independent draws of the latent vector of an autoguide, ``(n, latents)``."""
    return guide.get_posterior().sample((n,)).detach()
