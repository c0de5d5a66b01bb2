"""Posteriors under a learned prior equal the closed form, or quadrature where there is no closed form.

Chains of a plated program estimate one posterior covariance from all copies at once: a draw of many independent copies
costs little more than a draw of one. The quick checks are of this kind; the slow ones run the program without a plate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import AffineTransform

import pyro_genmods as gm

from .linear_gaussian import DOUBLE, LinearGaussian, Model, affine_flow, measured, moments, plated, zuko
from .statistics import chain_standard_error

SLOW = pytest.mark.slow
MEANS, SDS, ROUGHLY = 4.0, 0.05, 0.09  # standard errors; relative; relative, where draws are dear


def noisy(model: Model, *sites: str) -> Model:
    """The model in noise space."""
    return poutine.reparam(model, dict.fromkeys(sites or ("x",), gm.infer.PushforwardReparam()))


def hmc(model: Model) -> HMC:
    """HMC whose trajectories are a quarter of a period long, at which draws of a Gaussian are independent."""
    return HMC(model, step_size=0.4, trajectory_length=math.pi / 2)


def chain(model: Model, *args: Tensor, draws: int, kernel: Callable = hmc, warmup: int = 100) -> dict[str, Tensor]:
    """Draws of every latent site, ``(draws, ...)``."""
    mcmc = MCMC(kernel(model), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
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


def fit(model: Model, guide: Model, *args: Tensor, steps: int, rate: float = 0.2) -> None:
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
    "nice": {"kind": "nice", "standardized": True},
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_law_is_the_claimed_gaussian(name):
    prior = affine_flow(**PRIORS[name], dtype=DOUBLE)
    mean, covariance = moments(prior)
    assert (covariance - covariance.diagonal().diag()).abs().max() > 0.1, "no correlation to get wrong"
    x = mean + torch.randn(20, prior.features, dtype=DOUBLE)
    truth = dist.MultivariateNormal(mean, covariance).log_prob(x)
    assert torch.allclose(prior().log_prob(x), truth, atol=1e-9)


def by(method: str, problem: LinearGaussian, model: Model, y: Tensor, draws: int) -> Tensor:
    """Draws of ``x`` by one of the three chains."""
    if method == "noise-space NUTS":
        return push_base(problem.prior, chain(noisy(model), y, kernel=NUTS, draws=draws))
    return chain(model, y, kernel=NUTS if method == "NUTS" else hmc, draws=draws)["x"]


@pytest.mark.parametrize(("name", "method"), [("maf", "NUTS"), ("nice", "HMC"), ("maf-sampling", "noise-space NUTS")])
def test_chains_on_many_copies(name, method):
    problem = LinearGaussian(affine_flow(**PRIORS[name]))
    y = problem.data(16)
    truth = problem.posterior(y)
    assert_chain(by(method, problem, problem.plated, y, draws=300), truth.mean, truth.covariance_matrix)


@pytest.mark.parametrize("name", ["nice", pytest.param("maf", marks=SLOW), pytest.param("maf-sampling", marks=SLOW)])
def test_guides(name):
    problem = LinearGaussian(affine_flow(**PRIORS[name]))
    y = problem.data()
    truth = problem.posterior(y)
    normal = AutoMultivariateNormal(problem.model, init_scale=0.5)
    fit(problem.model, normal, y, steps=800)
    assert_guide(guide_draws(normal), truth.mean, truth.covariance_matrix)
    flow = gm.infer.AutoFlow(problem.model)
    fit(problem.model, flow, y, steps=100, rate=1e-3)
    assert_guide(guide_draws(flow), truth.mean, truth.covariance_matrix)
    weights = flow.log_weights(200, y)
    assert weights.std() < 0.1 and abs(float(weights.mean() - problem.marginal.log_prob(y.to(DOUBLE)))) < 0.02


@SLOW
@pytest.mark.parametrize("method", ["NUTS", "HMC", "noise-space NUTS"])
@pytest.mark.parametrize("name", PRIORS)
def test_chains_without_a_plate(name, method):
    problem = LinearGaussian(affine_flow(**PRIORS[name]))
    y = problem.data()
    truth = problem.posterior(y)
    draws = by(method, problem, problem.model, y, draws=5000)
    assert_chain(draws[:, None], truth.mean, truth.covariance_matrix)


# -- a context that is itself latent ----------------------------------------------------------------------------------


def conditional_program(prior: gm.Flow, noise: float) -> Model:
    """Copies of ``c ~ N(0, I)``, ``x | c ~ flow(c)``, ``y ~ N(x, noise)``."""
    zeros = torch.zeros(prior.context_shape)

    def model(y: Tensor) -> None:
        with pyro.plate("copies", len(y)):
            c = pyro.sample("c", dist.Normal(zeros, 1.0).to_event(1))
            x = pyro.sample("x", prior(c))
            pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    return model


def conditional_posterior(prior: gm.Flow, y: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Means ``(copies, context + features)`` and covariance of ``(c, x)`` given ``y`` under an affine flow."""
    (k,), d = prior.context_shape, prior.features
    origin, covariance = moments(prior, torch.zeros(k))
    slopes = torch.stack([moments(prior, row)[0] - origin for row in torch.eye(k)], -1)
    joint = torch.eye(k + d, dtype=DOUBLE)
    joint[k:, :k], joint[:k, k:] = slopes, slopes.mT
    joint[k:, k:] = slopes @ slopes.mT + covariance
    gain = joint[:, k:] @ (joint[k:, k:] + noise**2 * torch.eye(d, dtype=DOUBLE)).inverse()
    mean = torch.cat([torch.zeros(k, dtype=DOUBLE), origin])
    return mean + (y.to(DOUBLE) - origin) @ gain.mT, joint - gain @ joint[k:, :]


def conditional_chain(prior: gm.Flow, noise: float, y: Tensor, space: str) -> Tensor:
    """Draws of ``(c, x)``, ``(draws, copies, context + features)``, from inference in either space."""
    model = conditional_program(prior, noise)
    found = chain(model if space == "data" else noisy(model), y, draws=300)
    x = found["x"] if space == "data" else push_base(prior, found, found["c"])
    return torch.cat([found["c"], x], -1)


@pytest.mark.parametrize("space", [pytest.param("data", marks=SLOW), "noise"])
def test_an_affine_context_has_a_closed_form(space):
    prior, noise = affine_flow("maf", 2, context=1), 0.8
    y = moments(prior, torch.zeros(1))[0].float() + 1.5 * torch.randn(16, 2)
    mean, covariance = conditional_posterior(prior, y, noise)
    assert_chain(conditional_chain(prior, noise, y, space), mean, covariance, ROUGHLY)


@SLOW
def test_an_affine_context_under_guides():
    prior, noise = affine_flow("maf", 2, context=1), 0.8
    y = torch.tensor([[0.6, -1.1]])
    mean, covariance = conditional_posterior(prior, y, noise)
    model = conditional_program(prior, noise)
    for guide in (AutoMultivariateNormal(model, init_scale=0.5), gm.infer.AutoFlow(model)):
        optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 1e-3 ** (1 / 1000)})
        svi = SVI(model, guide, optimizer, Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1))
        for _ in range(1000):
            svi.step(y)
        assert_guide(guide_draws(guide), mean[0], covariance)


# -- quadrature where there is no closed form -------------------------------------------------------------------------


def quadrature(log_density: Callable[[Tensor], Tensor], *axes: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``(copies, D)`` and covariances of densities on a grid; maps ``(points, D)`` to ``(points, copies)``."""
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    with torch.no_grad():
        weights = torch.cat([log_density(part) for part in points.split(20000)]).softmax(0).mT
    edge = (points == points.amin(0)) | (points == points.amax(0))
    assert weights[:, edge.any(-1)].sum(-1).max() < 1e-6, "the grid is too small"
    mean = weights @ points
    centred = points - mean[:, None]
    return mean, torch.einsum("cp,cpi,cpj->cij", weights, centred, centred)


def rough(network: torch.nn.Module, roughness: float, seed: int = 3) -> torch.nn.Module:
    """The network with parameters moved by standard normal draws, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(roughness * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("space", ["data", pytest.param("noise", marks=SLOW)])
def test_a_nonlinear_context_against_quadrature(space):
    """``x | c`` has mean and scale that are nonlinear in ``c``; every copy has its own two-dimensional integral."""
    prior = gm.Flow(rough(zuko.flows.MAF(1, context=1, transforms=1, hidden_features=(8,)), 0.5)).freeze()
    noise, double = 0.5, copy.deepcopy(prior).double()
    y = prior(torch.randn(16, 1)).sample() + noise * torch.randn(16, 1)

    def log_joint(points: Tensor) -> Tensor:
        c, x = points[:, :1], points[:, 1:]
        latent = -0.5 * c.square().sum(-1) + double(c).log_prob(x)
        return latent[:, None] - 0.5 * ((y[:, 0] - x) / noise).square()

    mean, covariance = quadrature(log_joint, torch.linspace(-6, 6, 300).double(), torch.linspace(-8, 8, 400).double())
    assert_chain(conditional_chain(prior, noise, y, space), mean, covariance, ROUGHLY)


def wavy_prior() -> gm.Flow:
    """A two-dimensional spline flow far from any Gaussian."""
    return gm.Flow(rough(zuko.flows.NSF(2, transforms=1, bins=4, hidden_features=(8,)), 0.3)).freeze()


def test_both_spaces_have_the_same_posterior_density():
    """Potential energies differ by the log-volume of the push and by nothing else."""
    prior = wavy_prior().double()
    y = torch.tensor([0.3, -0.8], dtype=DOUBLE)

    model = measured(prior, 0.6)
    z = torch.randn(20, 2, dtype=DOUBLE)
    x, log_prob = prior().push_and_log_prob(z)
    volume = prior().base.log_prob(z) - log_prob
    energies = []
    for program, name, values in ((model, "x", x), (noisy(model), "x_base", z)):
        _, potential, _, _ = initialize_model(program, (y,))
        energies.append(torch.stack([potential({name: value}) for value in values]))
    assert torch.allclose(energies[0] - energies[1], volume, atol=1e-8)
    assert volume.std() > 0.1, "the flow is affine"


@pytest.mark.parametrize("space", [pytest.param("data", marks=SLOW), "noise"])
def test_a_spline_flow_against_quadrature(space):
    prior, noise = wavy_prior(), 0.6
    y = prior().sample((16,)) + noise * torch.randn(16, 2)
    double, axis = copy.deepcopy(prior).double(), torch.linspace(-7, 7, 350).double()

    def log_joint(points: Tensor) -> Tensor:
        misfit = (y - points[:, None]) / noise
        return double().log_prob(points)[:, None] - 0.5 * misfit.square().sum(-1)

    mean, covariance = quadrature(log_joint, axis, axis)
    model = plated(measured(prior, noise))
    found = chain(model if space == "data" else noisy(model), y, draws=300)
    assert_chain(found["x"] if space == "data" else push_base(prior, found), mean, covariance, ROUGHLY)


# -- a flow as a likelihood -------------------------------------------------------------------------------------------


def test_a_likelihood_with_a_latent_context():
    """Every copy has five events of one unknown context, whose posterior is a one-dimensional integral."""
    flow = gm.Flow(rough(zuko.flows.NICE(2, context=1, transforms=2, hidden_features=(8,)), 0.4)).freeze()
    data = flow(torch.randn(16, 1, 1)).expand([16, 5]).sample()

    def model(x: Tensor) -> None:
        with pyro.plate("copies", 16, dim=-2):
            c = pyro.sample("c", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with pyro.plate("data", 5, dim=-1):
                pyro.sample("x", flow(c), obs=x)

    def log_joint(points: Tensor) -> Tensor:
        terms = copy.deepcopy(flow).double()(points[:, None, None]).log_prob(data.double())
        return terms.sum(-1) - 0.5 * points.square()

    mean, covariance = quadrature(log_joint, torch.linspace(-6, 6, 500).double())
    assert covariance.flatten().sqrt().min() < 0.7, "the data say nothing about the context"
    draws = chain(model, data, draws=300)["c"][:, :, 0]
    assert_chain(draws, mean, covariance, ROUGHLY)


def test_a_likelihood_that_is_moved_by_a_latent():
    """A flow is a base of ordinary Pyro transformations: its noise-like errors around an unknown location."""
    errors = wavy_prior()
    data = errors().sample((16, 4)) + torch.randn(16, 1, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("copies", 16, dim=-2):
            location = pyro.sample("location", dist.Normal(0.0, 2.0))
            with pyro.plate("data", 4, dim=-1):
                move = AffineTransform(location[..., None], 1.0, event_dim=1)
                pyro.sample("x", dist.TransformedDistribution(errors(), [move]), obs=x)

    def log_joint(points: Tensor) -> Tensor:
        terms = copy.deepcopy(errors).double()().log_prob(data.double() - points[..., None, None])
        return terms.sum(-1) - 0.125 * points.square()

    mean, covariance = quadrature(log_joint, torch.linspace(-5, 5, 400).double())
    draws = chain(model, data, draws=300)["location"]
    assert_chain(draws, mean, covariance, ROUGHLY)
