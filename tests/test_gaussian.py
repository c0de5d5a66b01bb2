"""The Gaussian fit against closed forms, quadrature and densities made to break it; the log joint it is run on."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import optimize
from torch import Size, Tensor
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods.infer.gaussian import fit_gaussian
from pyro_genmods.infer.joint import LogJoint

from .statistics import assert_mean

import zuko  # isort: skip  (the package puts right what importing zuko changes)

DOUBLE = torch.float64


def gaussian(dimension: int, condition: float) -> torch.distributions.MultivariateNormal:
    """A correlated normal whose covariance has eigenvalues from 1 to ``condition``."""
    generator = torch.Generator().manual_seed(dimension)
    basis, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=DOUBLE))
    factor = basis * torch.logspace(0, math.log10(condition) / 2, dimension, dtype=DOUBLE)
    return torch.distributions.MultivariateNormal(
        torch.arange(dimension, dtype=DOUBLE), covariance_matrix=factor @ factor.mT
    )


def elbo(log_density, fit, draws: int = 20_000) -> tuple[float, float]:
    """Lower bound of a fit and its standard error, from fresh draws."""
    q = torch.distributions.MultivariateNormal(fit.loc, scale_tril=fit.tril)
    x = q.sample((draws,))
    weights = log_density(x) - q.log_prob(x)
    return float(weights.mean()), float(weights.std()) / math.sqrt(draws)


# -- where the answer is known ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dimension", "condition"), [(1, 1.0), (2, 1e2), (10, 1e8), (80, 1e4)])
def test_a_gaussian_is_found_exactly(dimension, condition):
    target = gaussian(dimension, condition)
    fit = fit_gaussian(lambda x: target.log_prob(x) + 3, torch.zeros(dimension, dtype=DOUBLE))
    assert abs(fit.elbo - 3) < 1e-6, "the bound of an exact fit is the log evidence"
    white = torch.linalg.solve_triangular(target.scale_tril, fit.tril, upper=False)
    assert torch.allclose(white, torch.eye(dimension, dtype=DOUBLE), atol=1e-3)
    assert torch.allclose(torch.linalg.solve(target.scale_tril, fit.loc - target.loc), 0 * fit.loc, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_units_do_not_matter(dtype):
    """Scales from 1e-4 to 1e4, from a start of scale 0.1."""
    scale = torch.logspace(-4, 4, 9, dtype=dtype)
    fit = fit_gaussian(lambda x: dist.Normal(0, scale).log_prob(x).sum(-1), torch.full((9,), 0.3, dtype=dtype))
    assert fit.loc.dtype == dtype
    assert torch.allclose(fit.tril.diagonal() / scale, torch.ones(9, dtype=dtype), rtol=1e-3)
    assert abs(fit.elbo) < 1e-3


def best_normal(log_density) -> tuple[float, float, float]:
    """Mean, standard deviation and bound of the best normal for a density of one variable, by quadrature."""
    nodes, weights = (torch.as_tensor(array) for array in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()

    def loss(parameters) -> float:
        x = parameters[0] + math.exp(parameters[1]) * nodes
        return -float((weights * log_density(x[:, None])).sum()) - parameters[1]

    found = optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    return found.x[0], math.exp(found.x[1]), -found.fun + 0.5 * math.log(2 * math.pi * math.e)


@pytest.mark.parametrize(
    "law",
    [dist.Gumbel(torch.tensor(1.0, dtype=DOUBLE), 2.0), dist.StudentT(torch.tensor(3.0, dtype=DOUBLE), -1.0, 0.2)],
    ids=["skew", "heavy tails"],
)
def test_the_best_normal_of_another_law(law):
    mean, sd, bound = best_normal(lambda x: law.log_prob(x).sum(-1))
    fit = fit_gaussian(lambda x: law.log_prob(x).sum(-1), torch.zeros(1, dtype=DOUBLE))
    assert abs(float(fit.loc) - mean) < 0.02 * sd
    assert abs(float(fit.tril) / sd - 1) < 0.02
    value, error = elbo(lambda x: law.log_prob(x).sum(-1), fit)
    assert abs(value - bound) < 5 * error + 1e-3


# -- densities made to break it ---------------------------------------------------------------------------------------


def banana(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 3.0).log_prob(x[:, 0]) + dist.Normal(0.5 * (x[:, 0] ** 2 - 9), 0.5).log_prob(x[:, 1])


def funnel(x: Tensor) -> Tensor:
    """Neal's funnel in ten dimensions; no mode: the density is unbounded along the neck."""
    width = (x[:, :1] / 2).exp()
    return dist.Normal(0.0, 3.0).log_prob(x[:, 0]) + dist.Normal(0, width).log_prob(x[:, 1:]).sum(-1)


def schools(x: Tensor) -> Tensor:
    """Eight schools, centred: a mode at infinity."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=DOUBLE)
    error = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=DOUBLE)
    scale = x[:, 1].exp()
    prior = dist.Normal(0.0, 5.0).log_prob(x[:, 0]) + dist.HalfCauchy(5 + 0 * scale).log_prob(scale) + x[:, 1]
    effects = dist.Normal(x[:, :1], scale[:, None]).log_prob(x[:, 2:]) + dist.Normal(x[:, 2:], error).log_prob(y)
    return prior + effects.sum(-1)


def raises_far_out(x: Tensor) -> Tensor:
    if bool((x.abs() > 3).any()):
        raise torch.linalg.LinAlgError("not positive definite")
    return -0.5 * (x / 0.2).square().sum(-1)


def standard(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1)


HARD = {
    # name: density, dimension, a lower bound that the fit must reach (None: no truth, only finite numbers)
    "banana": (banana, 2, -1.25),
    "funnel": (funnel, 10, -1.95),
    "centred schools": (schools, 10, -32.8),
    "improper": (lambda x: 0 * x.sum(-1), 3, None),
    "improper in one direction": (lambda x: standard(x[:, 1:]) + 0 * x[:, 0], 3, None),
    "unbounded": (lambda x: -x.abs().log().sum(-1), 2, None),
    "box": (lambda x: torch.where((x.abs() < 1).all(-1), 0 * x.sum(-1), -math.inf), 2, None),
    "half line": (lambda x: torch.where(x[:, 0] > -0.3, -x[:, 0], -math.inf), 1, None),
    "NaN beyond a point": (lambda x: standard(x) + (x[:, 0] + 2).log(), 2, None),
    "NaN gradients": (lambda x: standard(x) + (0 * x[:, 0]).sqrt(), 2, None),
    "infinite everywhere": (lambda x: -math.inf + x.sum(-1), 2, None),
    "raises far out": (raises_far_out, 2, 2 * math.log(0.2 * math.sqrt(2 * math.pi)) - 1e-3),
    "steep": (lambda x: -1e8 * x.square().square().sum(-1), 3, None),
    "two modes": (lambda x: torch.logaddexp(standard(x - 4), standard(x + 4)), 2, None),
}


@pytest.mark.parametrize("name", HARD)
def test_never_raises_and_never_worse_than_its_start(name):
    density, dimension, reached = HARD[name]
    start = torch.full((dimension,), 0.2, dtype=DOUBLE)
    fit = fit_gaussian(density, start)
    assert fit.loc.isfinite().all() and fit.tril.isfinite().all() and not math.isnan(fit.elbo)
    assert (fit.tril.diagonal() > 0).all() and torch.equal(fit.tril, fit.tril.tril())
    assert fit.elbo >= fit_gaussian(density, start, steps=0).elbo
    if reached is not None:
        assert elbo(density, fit)[0] > reached


def test_a_useless_fit_is_the_start():
    start = torch.zeros(2, dtype=DOUBLE)
    fit = fit_gaussian(HARD["infinite everywhere"][0], start)
    assert torch.equal(fit.loc, start) and torch.equal(fit.tril, 0.1 * torch.eye(2, dtype=DOUBLE))
    assert fit.elbo == -math.inf


def test_the_evaluation_of_the_bound_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    fit_gaussian(standard, torch.zeros(2), steps=0)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


def test_minibatches():
    """The log density is random but unbiased: the fit finds the posterior to a fraction of its standard deviations."""
    x = torch.randn(1000, dtype=DOUBLE) + 2

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=DOUBLE), 10.0))
        with pyro.plate("data", len(x), subsample_size=100) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    joint = LogJoint(model, {"loc": (constraints.real, Size([]))}, torch.zeros(1, dtype=DOUBLE))
    assert joint.vectorised and not joint.hidden_noise and joint.terms == 101
    fit = fit_gaussian(joint, torch.zeros(1, dtype=DOUBLE))
    sd = 1 / math.sqrt(1000 + 0.01)
    assert abs(float(fit.tril) / sd - 1) < 0.1
    assert abs(float(fit.loc) - float(x.sum()) * sd**2) < 1.5 * sd, "one pass over the data has 3 sds of noise"


# -- the log joint ----------------------------------------------------------------------------------------------------


def gamma_poisson(y: Tensor, *, rate: float = 1.0) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, rate))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Poisson(scale * weights), obs=y)


SITES = {"scale": (constraints.positive, Size([])), "weights": (constraints.simplex, Size([2]))}


def test_log_joint_of_a_program_with_arguments():
    y, rate = torch.tensor([1.0, 4.0, 2.0]), 0.5
    joint = LogJoint(gamma_poisson, SITES, torch.zeros(3), (y,), {"rate": rate})
    rows = torch.randn(5, 3)
    truth, sticks = [], torch.distributions.biject_to(constraints.simplex)
    for row in rows:
        scale, weights = row[0].exp(), sticks(row[1:])
        value = dist.Gamma(2.0, rate).log_prob(scale) + dist.Dirichlet(torch.ones(3)).log_prob(weights)
        value = value + dist.Poisson(scale * weights).log_prob(y).sum()
        jacobian = torch.autograd.functional.jacobian(lambda u: sticks(u)[:2], row[1:])
        truth.append(value + row[0] + jacobian.det().abs().log())
    assert joint.vectorised and not joint.hidden_noise and joint.terms == 5
    assert torch.allclose(joint(rows), torch.stack(truth), atol=1e-4)


def branching() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(2 * x if x > 0 else x, 1.0), obs=torch.tensor(1.0))


def flow_prior(prior: gm.Flow) -> None:
    x = pyro.sample("x", prior())
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(2))


def masked() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])), poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(3))


SCALAR, PAIR = {"x": (constraints.real, Size([]))}, {"x": (constraints.real_vector, Size([2]))}


@pytest.mark.parametrize(
    ("model", "sites", "dimension", "vectorised"),
    [
        (branching, SCALAR, 1, False),
        (masked, SCALAR, 1, True),
        (partial(flow_prior, gm.Flow(zuko.flows.NSF(2)).freeze()), PAIR, 2, True),
        (partial(flow_prior, gm.Flow(zuko.flows.NAF(2)).freeze()), PAIR, 2, False),
    ],
    ids=["branch", "mask and scale", "NSF", "NAF"],
)
def test_together_or_one_by_one(model, sites, dimension, vectorised):
    joint = LogJoint(model, sites, torch.zeros(dimension))
    assert joint.vectorised == vectorised
    rows = torch.randn(4, dimension)

    def one(row: Tensor) -> Tensor:
        return poutine.trace(poutine.condition(model, {"x": row.reshape(sites["x"][1])})).get_trace().log_prob_sum()

    assert torch.allclose(joint(rows), torch.stack([one(row) for row in rows]), atol=1e-4)


@pytest.mark.parametrize("minibatch", [None, 5])
def test_hidden_noise_is_noticed(minibatch):
    """Also a rare coin, and also beside minibatches, whose noise is of the harmless kind."""

    def model(noisy: bool) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=minibatch) as rows:
            coin = pyro.sample("coin", dist.Bernoulli(1e-6)) if noisy else 0.0
            pyro.sample("y", dist.Normal(x + coin, 1.0), obs=torch.arange(10.0)[rows])

    assert LogJoint(poutine.block(model, hide=["coin"]), SCALAR, torch.zeros(1), (True,)).hidden_noise
    assert not LogJoint(model, SCALAR, torch.zeros(1), (False,)).hidden_noise


def test_the_handlers_around_see_nothing():
    y = torch.tensor([1.0, 4.0, 2.0])
    with poutine.trace() as outer, pyro.plate("outer", 7, dim=-2):
        joint = LogJoint(gamma_poisson, SITES, torch.zeros(3), (y,))
        values = joint(torch.zeros(2, 3))
    assert values.shape == (2,)
    assert set(outer.trace.nodes) <= {"outer"}


def test_parameters_of_the_model_get_no_gradient():
    network = torch.nn.Linear(1, 1)

    def model() -> None:
        pyro.module("network", network)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(network(x[None]), 1.0).to_event(1), obs=torch.ones(1))

    before = [p.detach().clone() for p in network.parameters()]
    fit = fit_gaussian(LogJoint(model, SCALAR, torch.zeros(1)), torch.zeros(1), steps=20)
    assert math.isfinite(fit.elbo)
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, old)


def test_draws_of_the_fit_have_the_moments_of_the_target():
    """The factor is that of the covariance: draws of loc + tril z, not of a transpose."""
    target = gaussian(3, 50.0)
    fit = fit_gaussian(target.log_prob, torch.zeros(3, dtype=DOUBLE))
    draws = fit.loc + torch.randn(4000, 3, dtype=DOUBLE) @ fit.tril.mT - target.loc
    assert_mean(draws, 0.0)
    assert_mean(draws[:, :, None] * draws[:, None], target.covariance_matrix)
