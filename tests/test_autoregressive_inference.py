"""Autoregressive laws inside Pyro programs: priors, likelihoods, guides and discrete latents, against the truth.

The truth is the Gaussian posterior of an AR(1) chain, quadrature in one or two dimensions, or enumeration.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods.factorize import Bernoulli, Categorical, GaussianMixture, LogisticMixture

from .linear_gaussian import assert_chain, assert_guide, chain_mean, fit, guide_draws, noisy, plated
from .linear_gaussian import chain as run_chain
from .statistics import assert_counts
from .test_autoregressive import DOUBLE, SLOW, build, chain, chain_covariance, counts_of, everything, sequences
from .test_posteriors import ROUGHLY, quadrature

NOISE = 0.5


# -- the Gaussian chain as a prior -------------------------------------------------------------------------------------


def measured(prior: gm.Autoregressive):
    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    return model


def truth_of(y: Tensor) -> dist.MultivariateNormal:
    """Posterior of the chain's three entries given measurements ``(*batch, 3)``."""
    covariance = (chain_covariance(3).inverse() + torch.eye(3, dtype=DOUBLE) / NOISE**2).inverse()
    return dist.MultivariateNormal(y @ covariance / NOISE**2, covariance)


def evidence_of(y: Tensor) -> Tensor:
    covariance = chain_covariance(3) + NOISE**2 * torch.eye(3, dtype=DOUBLE)
    return dist.MultivariateNormal(torch.zeros(3, dtype=DOUBLE), covariance).log_prob(y)


def measurements(*batch: int) -> Tensor:
    return 1.2 * torch.randn(*batch, 3, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)


PRIOR = chain(3).freeze()
MODEL = measured(PRIOR)


@pytest.mark.parametrize("space", [pytest.param("data", marks=SLOW), pytest.param("noise", marks=SLOW)])
def test_pyro_nuts_on_many_copies(space):
    y = measurements(16)
    truth, program = truth_of(y), plated(MODEL)
    if space == "data":
        x = run_chain(program, y, draws=280)["x"]
    else:
        z = run_chain(noisy(program), y, draws=280)["x_base"]
        x = PRIOR().push(z)
    assert_chain(x, truth.mean, truth.covariance_matrix, ROUGHLY)


@pytest.mark.parametrize("space", ["data", pytest.param("noise", marks=SLOW)])
def test_many_chains_of_hmc(space):
    y = measurements()
    program = MODEL if space == "data" else noisy(MODEL)
    mcmc = gm.infer.MCMC(gm.infer.HMC(program), 400, 200, num_chains=32, progress_bar=False, seed=0)
    mcmc.run(y)
    draws = mcmc.get_samples(group_by_chain=True)
    x = draws["x"] if "x" in draws else PRIOR().push(draws["x_base"])
    truth = truth_of(y)
    assert_chain(x.transpose(0, 1), truth.mean.expand(32, 3), truth.covariance_matrix)


@pytest.mark.parametrize("kind", ["normal", "flow"])
def test_guides_by_svi(kind):
    y = measurements()
    truth = truth_of(y)
    if kind == "normal":
        guide = AutoMultivariateNormal(MODEL, init_scale=0.5)
        fit(MODEL, guide, y, steps=600)
    else:
        guide = gm.infer.AutoFlow(MODEL)
        fit(MODEL, guide, y, steps=100, rate=1e-3)
        weights = guide.log_weights(200, y)
        assert weights.std() < 0.1 and abs(float(weights.mean() - evidence_of(y))) < 0.02
    assert_guide(guide_draws(guide), truth.mean, truth.covariance_matrix)


def test_sequential_monte_carlo():
    y = measurements()
    smc = gm.infer.SMC(MODEL, 1000, num_runs=4, progress_bar=False, seed=0)
    smc.run(y)
    assert abs(smc.log_evidence - float(evidence_of(y))) < 0.1
    truth, x = truth_of(y), smc.get_samples()["x"]
    sd = truth.covariance_matrix.diagonal().sqrt()
    independent = 1000  # draws that 4000 particles are worth at least
    assert ((x.mean(0) - truth.mean) / (sd / math.sqrt(independent))).abs().max() < 4
    assert (x.std(0) / sd - 1).abs().max() < 4 / math.sqrt(2 * independent)


@SLOW
@pytest.mark.parametrize("head", [GaussianMixture(2), LogisticMixture(2)], ids=str)
def test_a_prior_of_mixtures_against_quadrature(head):
    prior = build(2, head, "made", 0.15).freeze()
    y = prior().sample((24,)) + 0.6 * torch.randn(24, 2, dtype=DOUBLE)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, 0.6).to_event(1), obs=y)

    def log_joint(points: Tensor) -> Tensor:
        squares = ((y - points[:, None]) / 0.6).square().sum(-1)
        return prior().log_prob(points)[:, None] - 0.5 * squares

    axes = [torch.linspace(float(y[:, i].min()) - 4, float(y[:, i].max()) + 4, 400, dtype=DOUBLE) for i in range(2)]
    mean, covariance = quadrature(log_joint, *axes)
    found = run_chain(plated(model), y, draws=300, max_tree_depth=5)["x"]
    assert_chain(found, mean, covariance, ROUGHLY)


# -- a likelihood of sequences -----------------------------------------------------------------------------------------

GRID = torch.linspace(-6, 6, 1201, dtype=DOUBLE)
LIKELIHOODS = {
    "bernoulli": lambda: build(4, Bernoulli(), "gru", 0.6, context_features=1).freeze(),
    "categorical": lambda: build(3, Categorical(3), "made", 0.6, context_features=1).freeze(),
    "sequence": lambda: build(4, Categorical(3), "transformer", 0.6, context_features=1, eos=0).freeze(),
}


def caused(law: gm.Autoregressive):
    """One latent number; sequences, rows of ``x``, of which it is the context."""

    def model(x: Tensor) -> None:
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", law((c + torch.zeros(len(x), dtype=DOUBLE))[..., None]), obs=x)

    return model


def posterior_of(law: gm.Autoregressive, x: Tensor) -> Tensor:
    """Log posterior on the grid."""
    with torch.no_grad():
        log_joint = law(GRID[:, None, None]).log_prob(x).sum(-1) - 0.5 * GRID.square()
    return log_joint.log_softmax(0)


@SLOW
@pytest.mark.parametrize("name", ["categorical", "bernoulli", "sequence"])
def test_nuts_with_a_discrete_likelihood(name):
    law = LIKELIHOODS[name]()
    x = law(torch.full((12, 1), 0.8, dtype=DOUBLE)).sample()
    p = posterior_of(law, x).exp()
    mean = (p * GRID).sum()
    sd = (p * (GRID - mean).square()).sum().sqrt()
    assert abs(mean) + abs(sd - 1) > 0.1, "data that say nothing"
    main_mode = init_to_value(values={"c": GRID[p.argmax()]})
    c = run_chain(caused(law), x, draws=500, warmup=150, init_strategy=main_mode)["c"]
    found, error = chain_mean(c)
    assert abs(found - mean) < 4 * error
    spread, error = chain_mean((c - mean).square())
    assert abs(spread - sd**2) < 4 * error


def divergence(log_p: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """``KL(N(m, s^2), p)`` by quadrature."""
    log_q = dist.Normal(m, s).log_prob(GRID).log_softmax(0)
    return (log_q.exp() * (log_q - log_p)).sum()


def least_divergence(log_p: Tensor) -> float:
    """That of the best Gaussian."""
    m, s = torch.zeros((), dtype=DOUBLE, requires_grad=True), torch.zeros((), dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.LBFGS([m, s], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = divergence(log_p, m, s.exp())
        value.backward()
        return value

    optimizer.step(closure)
    return float(divergence(log_p, m, s.exp()).detach())


@pytest.mark.parametrize(("name", "steps"), [("categorical", 600), pytest.param("bernoulli", 2000, marks=SLOW)])
def test_svi_with_a_discrete_likelihood(name, steps):
    """The guide ends within a hundredth of a nat of the best Gaussian."""
    law = LIKELIHOODS[name]()
    x = law(torch.full((12, 1), 0.8, dtype=DOUBLE)).sample()
    log_p, program = posterior_of(law, x), caused(law)
    guide = AutoNormal(program, init_scale=0.5)
    fit(program, guide, x, steps=steps, rate=0.1, plates=1)
    found = float(divergence(log_p, guide.locs.c, guide.scales.c).detach())
    assert found - least_divergence(log_p) < 0.01


# -- discrete latents --------------------------------------------------------------------------------------------------

BITS = everything(2, 2, 2, 2)
WEIGHTS = torch.tensor([1.0, -0.7, 0.4, 1.6], dtype=DOUBLE)


def hidden(prior: gm.Autoregressive):
    """A hidden sequence, and a number that it says."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior(), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x.to(DOUBLE) @ WEIGHTS, 0.7), obs=y)

    return model


@pytest.mark.parametrize("head", [Bernoulli(), Categorical(2)], ids=str)
def test_a_hidden_sequence_is_summed_out(head):
    prior = build(4, head, "transformer", 0.6)
    y = torch.tensor(0.9, dtype=DOUBLE)
    log_prior = prior().log_prob(BITS.to(prior.value_dtype or DOUBLE))
    truth = (log_prior + dist.Normal(BITS @ WEIGHTS, 0.7).log_prob(y)).logsumexp(0)
    loss = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(hidden(prior), lambda y: None, y)
    assert torch.allclose(loss, -truth, rtol=1e-10)
    parameters = list(prior.network.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = torch.autograd.grad(-truth, parameters, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-12))


def test_hidden_sequences_of_variable_length_in_a_plate():
    """Each datum has a hidden sequence of its own, under a context of its own."""
    prior = build(3, Categorical(3), "gru", 0.6, eos=0, context_features=1)
    c, y = torch.randn(5, 1, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    table = sequences(3, 3, 0, 0)

    def model() -> None:
        with pyro.plate("data", 5):
            x = pyro.sample("x", prior(c), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(x.to(DOUBLE).sum(-1), 0.7), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda: None)
    likelihood = dist.Normal(table.sum(-1).to(DOUBLE)[:, None], 0.7).log_prob(y)
    truth = (prior(c).log_prob(table[:, None]) + likelihood).logsumexp(0).sum()
    assert torch.allclose(loss, -truth, rtol=1e-10)


@pytest.mark.parametrize("kernel", ["ours", pytest.param("pyro", marks=SLOW)])
def test_a_number_next_to_a_summed_sequence(kernel):
    """The latent number is the context of the sequence, and shifts the measurement."""
    prior = build(3, Bernoulli(), "made", 0.6, context_features=1).freeze()
    y = torch.tensor(2.3, dtype=DOUBLE)

    def model() -> None:
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        x = pyro.sample("x", prior(c[..., None]), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(c + x.sum(-1), 0.5), obs=y)

    table = everything(2, 2, 2)
    with torch.no_grad():
        each = prior(GRID[:, None]).log_prob(table[:, None])
        log_likelihood = (each + dist.Normal(GRID + table.sum(-1)[:, None], 0.5).log_prob(y)).logsumexp(0)
    p = (log_likelihood - 0.5 * GRID.square()).softmax(0)
    mean = (p * GRID).sum()
    variance = (p * (GRID - mean).square()).sum()
    if kernel == "pyro":
        c = run_chain(model, draws=500, warmup=100)["c"][:, None]
    else:
        mcmc = gm.infer.MCMC(gm.infer.HMC(model), 300, 200, num_chains=16, progress_bar=False, seed=0)
        mcmc.run()
        c = mcmc.get_samples(group_by_chain=True)["c"].T
    found, error = chain_mean(c.mean(1))
    assert abs(found - mean) < 4 * error
    found, error = chain_mean((c - mean).square().mean(1))
    assert abs(found - variance) < 4 * error


LONG = build(20, Bernoulli(), "made").freeze()


def too_long() -> None:
    c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    x = pyro.sample("secret", LONG())
    pyro.sample("y", dist.Normal(c + x.sum(-1), 0.5), obs=torch.tensor(8.0, dtype=DOUBLE))


def by_nuts() -> None:
    MCMC(NUTS(too_long), num_samples=2, warmup_steps=2, disable_progbar=True).run()


def by_hmc() -> None:
    gm.infer.MCMC(gm.infer.HMC(too_long), 2, 2, num_chains=2, progress_bar=False).run()


def by_normal() -> None:
    SVI(too_long, AutoNormal(too_long), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()


def by_flow() -> None:
    SVI(too_long, gm.infer.AutoFlow(too_long), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()


def by_smc() -> None:
    gm.infer.SMC(too_long, 16, num_runs=2, progress_bar=False).run()


@pytest.mark.parametrize("run", [by_nuts, by_hmc, by_normal, by_flow, by_smc])
def test_a_hidden_sequence_that_is_too_long_is_refused_by_name(run):
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as caught:
        run()
    message = str(caught.value)
    assert "secret" in message and ("enumerat" in message or "SVI" in message), message


@pytest.mark.parametrize(("network", "steps"), [("made", 500), pytest.param("gru", 2000, marks=SLOW)])
def test_score_function_gradients_learn_a_posterior(network, steps):
    """An autoregressive guide of a hidden sequence whose posterior is known by enumeration.

    A recurrent network shares its weights between the places and learns slower: a quarter of its steps leave a
    divergence of 0.02 to 0.06 in four seeds.
    """
    prior = build(4, Bernoulli(), "made", 0.6, seed=2).freeze()
    y = torch.tensor(0.9, dtype=DOUBLE)
    posterior = prior().log_prob(BITS) + dist.Normal(BITS @ WEIGHTS, 0.7).log_prob(y)
    posterior = posterior.log_softmax(0)
    learned = gm.Autoregressive(4, Bernoulli(), network, width=16).double()

    def guide(y: Tensor) -> None:
        pyro.module("learned", learned)
        pyro.sample("x", learned())

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x @ WEIGHTS, 0.7), obs=y)

    start = learned().log_prob(BITS)
    assert (start.exp() * (start - posterior)).sum() > 0.2, "nothing to learn"
    fit(model, guide, y, steps=steps, rate=0.03)
    q = learned().log_prob(BITS)
    assert (q.exp() * (q - posterior)).sum() < 0.05


# -- predictions and reports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_draws_have_the_law(parallel):
    law = build(3, Categorical(3), "gru", 0.6, context_features=1).freeze()
    table = everything(3, 3, 3).to(torch.int64)

    def model() -> None:
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", law((c + torch.zeros(3, dtype=DOUBLE))[..., None]))

    c = torch.full((400, 1) if parallel else (400,), 0.8, dtype=DOUBLE)
    draws = Predictive(model, {"c": c}, parallel=parallel)()["x"]
    assert draws.shape == (400, 3, 3) and draws.dtype == torch.int64
    p = law(torch.tensor([0.8], dtype=DOUBLE)).log_prob(table).exp()
    assert_counts(counts_of(draws, table), p)


@pytest.mark.parametrize(
    "name", ["categorical", pytest.param("bernoulli", marks=SLOW), pytest.param("sequence", marks=SLOW)]
)
def test_pointwise_likelihoods_of_sequences(name):
    law = LIKELIHOODS[name]()
    x = law(torch.full((7, 1), 0.8, dtype=DOUBLE)).sample()
    mcmc = gm.infer.MCMC(gm.infer.HMC(caused(law)), 20, 50, num_chains=4, progress_bar=False, seed=0)
    mcmc.run(x)
    data = gm.diagnostics.to_inference_data(mcmc, num_prior_samples=30)
    found = torch.as_tensor(data.log_likelihood["x"].values.copy())
    c = torch.as_tensor(data.posterior["c"].values.copy())
    assert found.shape == (4, 20, 7) and c.shape == (4, 20)
    with torch.no_grad():
        assert torch.allclose(found, law(c[..., None, None].expand(4, 20, 7, 1)).log_prob(x), rtol=1e-9)
    new = torch.as_tensor(data.posterior_predictive["x"].values.copy())
    assert new.shape == (4, 20, *x.shape) and law(c[..., None, None].expand(4, 20, 7, 1)).support.check(new).all()
    assert data.prior_predictive["x"].shape == (1, 30, *x.shape)


def test_a_trace_of_a_discrete_site():
    """Replay, condition and scores of a program with an autoregressive site, on all of its events."""
    prior = build(3, Bernoulli(), "gru", orders=2)
    for bits in itertools.product([0.0, 1.0], repeat=3):
        x = torch.tensor(bits, dtype=DOUBLE)
        trace = poutine.trace(poutine.condition(lambda: pyro.sample("x", prior()), {"x": x})).get_trace()
        assert torch.equal(trace.log_prob_sum(), prior().log_prob(x))
