"""Posteriors under a learned prior equal the closed form, or quadrature where there is no closed form.

Chains of a plated program estimate one posterior covariance from all copies at once: a draw of many independent copies
costs little more than a draw of one. The quick checks are of this kind; the slow ones run the program without a plate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import AffineTransform

import pyro_genmods as gm

from .linear_gaussian import (
    DOUBLE,
    LinearGaussian,
    Model,
    affine_flow,
    assert_chain,
    assert_guide,
    chain,
    fit,
    guide_draws,
    measured,
    moments,
    noisy,
    plated,
    push_base,
    zuko,
)

SLOW = pytest.mark.slow
ROUGHLY = 0.09  # relative tolerance of standard deviations where draws are dear

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
    if method == "HMC":
        return chain(model, y, draws=draws, kernel=HMC, step_size=0.5, num_steps=4)["x"]
    if method == "NUTS":
        return chain(model, y, draws=draws)["x"]
    return push_base(problem.prior, chain(noisy(model), y, draws=draws))


COPIES = [("maf", "NUTS"), ("nice", "HMC"), ("maf-sampling", "noise-space NUTS")]


@pytest.mark.parametrize(("name", "method"), [pytest.param(*c, marks=() if c[1] == "HMC" else SLOW) for c in COPIES])
def test_chains_on_many_copies(name, method):
    problem = LinearGaussian(affine_flow(**PRIORS[name]))
    y = problem.data(16)
    truth = problem.posterior(y)
    assert_chain(by(method, problem, problem.plated, y, draws=500), truth.mean, truth.covariance_matrix)


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
    found = chain(model if space == "data" else noisy(model), y, max_tree_depth=4)
    x = found["x"] if space == "data" else push_base(prior, found, found["c"])
    return torch.cat([found["c"], x], -1)


@SLOW
@pytest.mark.parametrize("space", ["data", "noise"])
def test_an_affine_context_has_a_closed_form(space):
    prior, noise = affine_flow("maf", 2, context=1), 0.8
    y = moments(prior, torch.zeros(1))[0].float() + 1.5 * torch.randn(32, 2)
    mean, covariance = conditional_posterior(prior, y, noise)
    assert_chain(conditional_chain(prior, noise, y, space), mean, covariance, ROUGHLY)


@SLOW
def test_an_affine_context_under_guides():
    prior, noise = affine_flow("maf", 2, context=1, standardized=True), 0.8
    y = torch.tensor([[3.6, 2.1]])
    mean, covariance = conditional_posterior(prior, y, noise)
    model = conditional_program(prior, noise)
    for guide, rate in ((AutoMultivariateNormal(model, init_scale=0.5), 0.1), (gm.infer.AutoFlow(model), 0.005)):
        fit(model, guide, y, steps=1000, rate=rate, plates=1)
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


@SLOW
@pytest.mark.parametrize("space", ["data", "noise"])
def test_a_nonlinear_context_against_quadrature(space):
    """``x | c`` has mean and scale that are nonlinear in ``c``; every copy has its own two-dimensional integral."""
    prior = gm.Flow(rough(zuko.flows.MAF(1, context=1, transforms=1, hidden_features=(8,)), 0.5)).freeze()
    noise, double = 0.5, copy.deepcopy(prior).double()
    y = prior(torch.randn(32, 1)).sample() + noise * torch.randn(32, 1)

    def log_joint(points: Tensor) -> Tensor:
        c, x = points[:, :1], points[:, 1:]
        latent = -0.5 * c.square().sum(-1) + double(c).log_prob(x)
        return latent[:, None] - 0.5 * ((y[:, 0] - x) / noise).square()

    mean, covariance = quadrature(log_joint, torch.linspace(-6, 6, 300).double(), torch.linspace(-8, 8, 400).double())
    assert_chain(conditional_chain(prior, noise, y, space), mean, covariance, ROUGHLY)


def wavy_prior() -> gm.Flow:
    """A two-dimensional spline flow far from any Gaussian."""
    return gm.Flow(
        rough(zuko.flows.NSF(2, transforms=1, bins=4, hidden_features=(8,), activation=torch.nn.SiLU), 0.15)
    ).freeze()


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


@SLOW
@pytest.mark.parametrize("space", ["data", "noise"])
def test_a_spline_flow_against_quadrature(space):
    prior, noise = wavy_prior(), 0.6
    y = prior().sample((32,)) + noise * torch.randn(32, 2)
    double, axis = copy.deepcopy(prior).double(), torch.linspace(-7, 7, 350).double()

    def log_joint(points: Tensor) -> Tensor:
        misfit = (y - points[:, None]) / noise
        return double().log_prob(points)[:, None] - 0.5 * misfit.square().sum(-1)

    mean, covariance = quadrature(log_joint, axis, axis)
    model = plated(measured(prior, noise))
    found = chain(model if space == "data" else noisy(model), y, max_tree_depth=4)
    assert_chain(found["x"] if space == "data" else push_base(prior, found), mean, covariance, ROUGHLY)


# -- a flow as a likelihood -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_likelihood_with_a_latent_context():
    """Every copy has five events of one unknown context, whose posterior is a one-dimensional integral."""
    flow = gm.Flow(rough(zuko.flows.NICE(2, context=1, transforms=2, hidden_features=(8,)), 0.4)).freeze()
    data = flow(torch.randn(32, 1, 1)).expand([32, 5]).sample()

    def model(x: Tensor) -> None:
        with pyro.plate("copies", 32, dim=-2):
            c = pyro.sample("c", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with pyro.plate("data", 5, dim=-1):
                pyro.sample("x", flow(c), obs=x)

    def log_joint(points: Tensor) -> Tensor:
        terms = copy.deepcopy(flow).double()(points[:, None, None]).log_prob(data.double())
        return terms.sum(-1) - 0.5 * points.square()

    mean, covariance = quadrature(log_joint, torch.linspace(-6, 6, 500).double())
    assert covariance.flatten().sqrt().min() < 0.7, "the data say nothing about the context"
    draws = chain(model, data, max_tree_depth=4)["c"][:, :, 0]
    assert_chain(draws, mean, covariance, ROUGHLY)


@SLOW
def test_a_likelihood_that_is_moved_by_a_latent():
    """A flow is a base of ordinary Pyro transformations: its noise-like errors around an unknown location."""
    errors = wavy_prior()
    data = errors().sample((32, 4)) + torch.randn(32, 1, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("copies", 32, dim=-2):
            location = pyro.sample("location", dist.Normal(0.0, 2.0))
            with pyro.plate("data", 4, dim=-1):
                move = AffineTransform(location[..., None], 1.0, event_dim=1)
                pyro.sample("x", dist.TransformedDistribution(errors(), [move]), obs=x)

    def log_joint(points: Tensor) -> Tensor:
        terms = copy.deepcopy(errors).double()().log_prob(data.double() - points[..., None, None])
        return terms.sum(-1) - 0.125 * points.square()

    mean, covariance = quadrature(log_joint, torch.linspace(-5, 5, 400).double())
    draws = chain(model, data, max_tree_depth=4)["location"]
    assert_chain(draws, mean, covariance, ROUGHLY)
