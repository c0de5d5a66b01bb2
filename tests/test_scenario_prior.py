"""A learned prior dropped into a Pyro program: plates, masks, subsampling, particles, guides, ELBOs, `Predictive`.

Where a closed form or a plain sum exists, the log density of the whole trace is compared with it; the sum is written
with the law's `log_prob` at single events, which other tests compare with the truth.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    EmpiricalMarginal,
    Importance,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer import autoguide as guides
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule

import pyro_genmods as gm

from .linear_gaussian import affine_flow

import zuko  # isort: skip  (the package puts right what importing zuko changes)

N, M, D = 4, 3, 2


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return gm.Flow(zuko.flows.NSF(D, transforms=2, hidden_features=(8,))).freeze()


@pytest.fixture(scope="module")
def conditional():
    torch.manual_seed(1)
    return gm.Flow(zuko.flows.NSF(D, context=1, transforms=2, hidden_features=(8,))).freeze()


def log_density(model, values, *args):
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    trace.compute_log_prob()
    return trace


def one_by_one(law, x):
    return torch.stack([law.log_prob(event) for event in x.reshape(-1, D)]).reshape(x.shape[:-1])


@pytest.mark.parametrize("dim", [-1, -2])
def test_one_plate(flow, dim):
    def model():
        with pyro.plate("n", N, dim=dim):
            pyro.sample("x", flow())

    trace = poutine.trace(model).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == ((N, D) if dim == -1 else (N, 1, D))
    trace.compute_log_prob()
    assert torch.allclose(trace.nodes["x"]["log_prob"], one_by_one(flow(), x), atol=1e-5)


def test_nested_plates_with_a_context(conditional):
    context = torch.randn(M, N, 1)

    def model():
        with pyro.plate("outer", M, dim=-2), pyro.plate("inner", N, dim=-1):
            pyro.sample("x", conditional(context))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    expected = torch.stack(
        [conditional(c).log_prob(v) for c, v in zip(context.flatten(0, 1), x.flatten(0, 1), strict=True)]
    )
    assert x.shape == (M, N, D)
    assert torch.allclose(trace.nodes["x"]["log_prob"].flatten(), expected, atol=1e-5)


def test_scale_and_mask_reach_the_sum(flow):
    x, mask = torch.randn(N, D), torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("n", N), poutine.mask(mask=mask), poutine.scale(scale=2.5):
            pyro.sample("x", flow())

    total = log_density(model, {"x": x}).log_prob_sum()
    assert torch.allclose(total, 2.5 * one_by_one(flow(), x)[mask].sum(), rtol=1e-5)


def test_a_mask_of_the_law_is_a_mask_of_the_handler(flow):
    x, mask = torch.randn(N, D), torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("n", N):
            pyro.sample("x", flow().expand([N]).mask(mask))

    assert torch.allclose(log_density(model, {"x": x}).log_prob_sum(), one_by_one(flow(), x)[mask].sum(), rtol=1e-5)


def test_partly_observed(flow):
    data, seen = torch.randn(N, D), torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("n", N):
            return pyro.sample("x", flow(), obs=data, obs_mask=seen)

    trace = poutine.trace(model).get_trace()
    assert torch.equal(trace.nodes["_RETURN"]["value"][seen], data[seen])
    expected = (
        one_by_one(flow(), data)[seen].sum() + one_by_one(flow(), trace.nodes["x_unobserved"]["value"])[~seen].sum()
    )
    assert torch.allclose(trace.log_prob_sum(), expected, rtol=1e-5)
    guide = guides.AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_subsampling_scales_and_amortises(conditional):
    data = torch.randn(12, 1)
    encoder = gm.Flow(zuko.flows.NICE(D, context=1, transforms=2, hidden_features=(8,)), direction="sampling")

    def model(data):
        with pyro.plate("n", 12, subsample_size=4) as index:
            x = pyro.sample("x", conditional(data[index]))
            pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=data[index, 0])

    def guide(data):
        pyro.module("encoder", encoder)
        with pyro.plate("n", 12, subsample_size=4) as index:
            pyro.sample("x", encoder(data[index]))

    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(data)) for _ in range(5))
    assert any(not torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    trace = poutine.trace(model).get_trace(data)
    trace.compute_log_prob()
    index = trace.nodes["n"]["value"]
    expected = 3 * conditional(data[index]).log_prob(trace.nodes["x"]["value"]).sum()
    assert torch.allclose(trace.nodes["x"]["log_prob_sum"], expected, rtol=1e-5)


def test_enumeration_beside_a_learned_prior(flow, conditional):
    """A discrete latent is summed out exactly: the ELBO of a point guide equals the sum over its values."""
    x0, weights = torch.randn(N, D), torch.tensor([0.2, 0.5, 0.3])
    centres = torch.tensor([[-1.0], [0.0], [1.0]])

    def model(x):
        with pyro.plate("n", N):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", conditional(centres[k]), obs=x)

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(model, lambda x: None, x0)
    per_value = torch.stack([conditional(c).log_prob(x0) for c in centres], -1)
    assert loss == pytest.approx(-float(torch.logsumexp(per_value + weights.log(), -1).sum()), rel=1e-5)


def joint(flow):
    def model(y=None):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("n", N):
            x = pyro.sample("x", flow())
            pyro.sample("y", dist.Normal(x, scale[..., None] + 0.1).to_event(1), obs=y)

    return model


AUTOGUIDES = [
    guides.AutoNormal,
    guides.AutoDiagonalNormal,
    guides.AutoMultivariateNormal,
    guides.AutoLowRankMultivariateNormal,
    guides.AutoIAFNormal,
    guides.AutoDelta,
    guides.AutoLaplaceApproximation,
    guides.AutoStructured,
    lambda model: gm.infer.AutoFlow(model, gaussian_steps=20),
]


@pytest.mark.parametrize("make", AUTOGUIDES, ids=lambda make: getattr(make, "__name__", "AutoFlow"))
def test_autoguides(flow, make):
    y, model = torch.randn(N, D), joint(flow)
    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(20)]
    assert all(map(math.isfinite, losses))
    draw = guide(y)
    assert draw["x"].shape == (N, D)
    assert draw["scale"] > 0


ELBOS = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, RenyiELBO]


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("elbo", ELBOS, ids=lambda elbo: elbo.__name__)
def test_elbos_estimate_the_same_bound(flow, elbo, vectorize):
    """Every ELBO, with and without vectorised particles, against the plain average of log p - log q over draws."""
    y = torch.randn(N, D)

    def model(y):
        with pyro.plate("n", N):
            x = pyro.sample("x", flow())
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("n", N):
            pyro.sample("x", dist.Normal(0.5 * y, 0.7).to_event(1))

    particles = 400
    settings = {"alpha": 0.999} if elbo is RenyiELBO else {}
    estimate = -elbo(num_particles=particles, vectorize_particles=vectorize, max_plate_nesting=1, **settings).loss(
        model, guide, y
    )
    x = dist.Normal(0.5 * y, 0.7).sample((4000,))
    terms = flow().log_prob(x) + dist.Normal(x, 1.0).log_prob(y).sum(-1) - dist.Normal(0.5 * y, 0.7).log_prob(x).sum(-1)
    terms = terms.sum(-1)
    error = float(terms.std()) * (1 / particles + 1 / 4000) ** 0.5
    assert abs(estimate - float(terms.mean())) < 5 * error


def test_wake_sleep(flow):
    y = torch.randn(N, D)
    encoder = gm.Flow(zuko.flows.NICE(D, context=D, transforms=2, hidden_features=(8,)), direction="sampling")

    def model(y):
        with pyro.plate("n", N):
            x = pyro.sample("x", flow())
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.module("encoder", encoder)
        with pyro.plate("n", N):
            pyro.sample("x", encoder(y))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ReweightedWakeSleep(num_particles=3))
    assert all(math.isfinite(value) for _ in range(3) for value in svi.step(y))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_from_prior_and_posterior(flow, parallel):
    y, model = torch.randn(N, D), joint(flow)
    prior = Predictive(model, num_samples=7, parallel=parallel)()
    assert prior["x"].shape == (7, N, D)
    assert prior["y"].shape == (7, N, D)
    guide = guides.AutoNormal(model)
    guide(y)
    posterior = Predictive(model, guide=guide, num_samples=7, parallel=parallel, return_sites=["x", "y"])()
    assert posterior["x"].shape == posterior["y"].shape == (7, N, D)
    chain = MCMC(NUTS(model, max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True)
    chain.run(y)
    again = Predictive(model, chain.get_samples(), parallel=parallel)()
    assert again["y"].shape == (5, N, D)


def test_importance_sampling_weighs_a_gaussian_right():
    """Self-normalised importance sampling from an affine flow prior: the posterior mean in closed form."""
    flow = affine_flow("maf", D)
    y, noise = torch.tensor([0.3, -0.2]), 1.0

    def model():
        x = pyro.sample("x", flow())
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    draws = 2000
    posterior = Importance(model, num_samples=draws).run()
    x = EmpiricalMarginal(posterior, sites="x")
    prior = flow().sample((200_000,)).double()
    covariance, mean = torch.cov(prior.T), prior.mean(0)
    gain = covariance @ torch.linalg.inv(covariance + noise**2 * torch.eye(D, dtype=torch.float64))
    expected = mean + gain @ (y.double() - mean)
    spread = x.variance.double().sqrt()
    assert bool(((x.mean.double() - expected).abs() < 5 * spread * (3 / draws) ** 0.5).all())


def test_neutra_runs_on_a_learned_prior(flow):
    y, model = torch.randn(N, D), joint(flow)
    guide = gm.infer.AutoFlow(model, gaussian_steps=50)
    guide(y)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    chain = MCMC(NUTS(neutra.reparam(model), max_tree_depth=4), num_samples=6, warmup_steps=6, disable_progbar=True)
    chain.run(y)
    (latent,) = chain.get_samples().values()
    assert latent.shape == (6, N * D + 1)
    assert bool(latent.isfinite().all())


def test_a_prior_learns_as_part_of_a_program():
    """As an attribute of a PyroModule a prior moves to the data; frozen, it stays bit for bit."""

    class Program(PyroModule):
        def __init__(self, prior):
            super().__init__()
            self.prior = prior

        def forward(self, y):
            with pyro.plate("n", len(y)):
                pyro.sample("x", self.prior(), obs=y)

    y = torch.randn(200, D) * 0.5 + 3
    for frozen in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        prior = gm.Flow(zuko.flows.NICE(D, transforms=2, hidden_features=(8,)))
        if frozen:
            prior.freeze()
        program = Program(prior)
        before = {k: v.clone() for k, v in prior.state_dict().items()}
        svi = SVI(program, lambda y: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        losses = [svi.step(y) for _ in range(100)]
        same = all(torch.equal(before[k], v) for k, v in prior.state_dict().items())
        assert same if frozen else losses[-1] < losses[0] - 100


def test_a_whole_program_in_double_precision():
    prior = gm.Flow(zuko.flows.NSF(D, transforms=1, hidden_features=(8,))).double().freeze()
    y = torch.randn(N, D, dtype=torch.float64)

    def model(y):
        with pyro.plate("n", N):
            x = pyro.sample("x", prior())
            pyro.sample("y", dist.Normal(x, torch.ones((), dtype=torch.float64)).to_event(1), obs=y)

    guide = gm.infer.AutoFlow(model, gaussian_steps=20)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(y)) for _ in range(3))
    assert guide(y)["x"].dtype == torch.float64
    chain = MCMC(NUTS(model, max_tree_depth=3), num_samples=4, warmup_steps=4, disable_progbar=True)
    chain.run(y)
    assert chain.get_samples()["x"].dtype == torch.float64
