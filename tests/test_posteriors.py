"""Posteriors under a learned prior equal the closed form, or quadrature where there is no closed form.

Chains of a plated program estimate one posterior covariance from all copies at once: a draw of many independent copies
costs little more than a draw of one. The quick checks are of this kind; the slow ones run the program without a plate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.distributions import AffineTransform

import pyro_genmods as gm

from .linear_gaussian import DOUBLE, LinearGaussian, affine_flow, moments, zuko
from .statistics import chain_standard_error

Model = Callable[..., object]
MEANS, SDS = 4.0, 0.05  # standard errors, relative


def noisy(model: Model, *sites: str) -> Model:
    """The model in noise space."""
    return poutine.reparam(model, dict.fromkeys(sites or ("x",), gm.infer.PushforwardReparam()))


def chain(model: Model, *args: Tensor, kernel: type = NUTS, draws: int, warmup: int = 150, **settings) -> dict:
    """Draws of every site of the model, deterministic ones included, each ``(draws, ...)``, in double precision."""
    mcmc = MCMC(kernel(model, **settings), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*args)
    return {name: values.detach() for name, values in mcmc.get_samples().items()}


def push_base(prior: gm.Flow, draws: dict[str, Tensor], context: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return (prior() if context is None else prior(context)).push(draws["x_base"])


def chain_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a series ``(draws, ...)`` and its Monte Carlo standard error."""
    return values.mean(0), chain_standard_error(values[None])


def assert_chain(draws: Tensor, mean: Tensor, covariance: Tensor, resolution: float = SDS / 3) -> None:
    """Draws ``(draws, copies, features)`` have means ``(copies, features)`` and one covariance.

    Means within four standard errors and standard deviations within five percent, pooled over copies; correlations by
    the standard errors of their products. ``resolution`` is the largest relative standard error of a standard
    deviation with which five percent means something.
    """
    gap = draws.to(DOUBLE) - mean
    scale = covariance.diagonal().sqrt()
    location, error = chain_mean(gap.mean(1))
    assert (location.abs() <= MEANS * error).all(), f"means off by {location / error} standard errors"
    squares, error = chain_mean((gap / scale).square().mean(1))
    assert (error / 2 <= resolution).all(), f"standard error of the sds {error / 2}: too few draws"
    assert ((squares.sqrt() - 1).abs() <= SDS).all(), f"sds are {squares.sqrt()} times the truth"
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), gap[..., None], upper=False)[..., 0]
    rows, columns = torch.tril_indices(len(scale), len(scale), -1)
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


def fit(model: Model, guide: Model, *args: Tensor, steps: int, rate: float = 0.05) -> None:
    """SVI with 16 particles at once and a step that decays a thousandfold."""
    optimizer = pyro.optim.ClippedAdam({"lr": rate, "lrd": 1e-3 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(steps):
        svi.step(*args)


def guide_draws(guide: Model, n: int = 4000) -> Tensor:
    """Independent draws of the latent vector of an autoguide, ``(n, latents)``."""
    return guide.get_posterior().sample((n,)).detach()


# -- an affine flow as a prior ----------------------------------------------------------------------------------------

PRIORS = {
    "maf": {"kind": "maf"},
    "maf-sampling": {"kind": "maf", "direction": "sampling"},
    "nice-three-features-standardized": {"kind": "nice", "features": 3, "standardized": True},
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_law_is_the_claimed_gaussian(name):
    prior = affine_flow(**PRIORS[name], dtype=DOUBLE)
    mean, covariance = moments(prior)
    assert (covariance - covariance.diagonal().diag()).abs().max() > 0.1, "no correlation to get wrong"
    x = mean + torch.randn(20, prior.features, dtype=DOUBLE)
    truth = dist.MultivariateNormal(mean, covariance).log_prob(x)
    assert torch.allclose(prior().log_prob(x), truth, atol=1e-9)


@pytest.mark.parametrize("method", ["NUTS", "HMC", "noise-space NUTS"])
@pytest.mark.parametrize("name", ["maf", "nice-three-features-standardized"])
def test_chains_on_many_copies(name, method):
    problem = LinearGaussian(affine_flow(**PRIORS[name]))
    y = problem.data(24)
    truth = problem.posterior(y)
    if method == "HMC":
        draws = chain(problem.plated, y, kernel=HMC, draws=400, step_size=0.4, num_steps=5)["x"]
    elif method == "NUTS":
        draws = chain(problem.plated, y, draws=250)["x"]
    else:
        draws = push_base(problem.prior, chain(noisy(problem.plated), y, draws=250))
    assert_chain(draws, truth.mean, truth.covariance_matrix[0])


@pytest.mark.parametrize("name", PRIORS)
def test_guides(name):
    problem = LinearGaussian(affine_flow(**PRIORS[name]))
    y = problem.data()
    truth = problem.posterior(y)
    normal = AutoMultivariateNormal(problem.model, init_scale=0.5)
    fit(problem.model, normal, y, steps=500)
    assert_guide(guide_draws(normal), truth.mean, truth.covariance_matrix)
    flow = gm.infer.AutoFlow(problem.model)
    fit(problem.model, flow, y, steps=100, rate=1e-3)
    assert_guide(guide_draws(flow), truth.mean, truth.covariance_matrix)
    weights = flow.log_weights(200, y)
    assert weights.std() < 0.1 and abs(float(weights.mean() - problem.marginal.log_prob(y.to(DOUBLE)))) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", ["NUTS", "HMC", "noise-space NUTS"])
@pytest.mark.parametrize("name", PRIORS)
def test_chains_without_a_plate(name, method):
    problem = LinearGaussian(affine_flow(**PRIORS[name]))
    y = problem.data()
    truth = problem.posterior(y)
    if method == "HMC":
        draws = chain(problem.model, y, kernel=HMC, draws=5000, warmup=500, trajectory_length=1.5)["x"]
    elif method == "NUTS":
        draws = chain(problem.model, y, draws=4000, warmup=500)["x"]
    else:
        draws = push_base(problem.prior, chain(noisy(problem.model), y, draws=4000, warmup=500))
    assert_chain(draws[:, None], truth.mean, truth.covariance_matrix)
