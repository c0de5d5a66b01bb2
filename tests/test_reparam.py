"""`PushforwardReparam`: inference in noise space, on laws with a density and on generators without one."""

from __future__ import annotations

import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer import autoguide as guides
from torch import nn

import pyro_genmods as gm
from pyro_genmods.foundation.errors import DensityError, SlowDirectionWarning

from .statistics import assert_mean, chain_standard_error

import zuko  # isort: skip  (the package puts right what importing zuko changes)

N, D = 4, 2


class LinearGenerator(gm.GenerativeModel):
    """x = W z + b with more rows than columns: a generator without a density."""

    density = gm.Density.IMPLICIT

    def __init__(self, weight, bias):
        super().__init__(event_shape=(weight.shape[0],))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    @property
    def cost(self):
        return gm.Cost(sample=1, score=None)

    @property
    def noise_shape(self):
        return torch.Size([self.weight.shape[1]])

    def push_rows(self, z, c):
        return z @ self.weight.mT + self.bias


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return gm.Flow(zuko.flows.NICE(D, transforms=2, hidden_features=(8,))).freeze()


@pytest.fixture(scope="module")
def conditional():
    torch.manual_seed(1)
    return gm.Flow(zuko.flows.NICE(D, context=1, transforms=2, hidden_features=(8,))).freeze()


def reparam(model, *names):
    return poutine.reparam(model, {name: gm.infer.PushforwardReparam() for name in names or ["x"]})


def traced(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    trace.compute_log_prob()
    return trace


# -- latent sites --------------------------------------------------------------------------------------------------

WRAPPERS = {
    "expand": lambda d: d.expand([N]),
    "to_event": lambda d: d.expand([N]).to_event(1),
    "mask": lambda d: d.expand([N]).mask(torch.tensor([True, False, True, True])),
    "mask then to_event": lambda d: d.expand([N]).mask(torch.tensor([True, False, True, True])).to_event(1),
    "to_event then mask": lambda d: d.expand([3, N]).to_event(1).mask(torch.tensor([True, False, True])),
    "expand twice": lambda d: d.expand([N]).expand([3, N]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_laws(flow, wrap):
    """The noise is wrapped as the law was, and the pushed noise is the value."""
    law = wrap(flow())

    def model():
        return pyro.sample("x", law)

    trace = traced(reparam(model))
    z, x = trace.nodes["x_base"]["value"], trace.nodes["_RETURN"]["value"]
    assert x.shape == law.shape()
    assert torch.equal(x, flow().push(z))
    base = wrap(dist.Normal(torch.zeros(D), 1.0).to_event(1))
    assert torch.allclose(trace.nodes["x_base"]["log_prob"], base.log_prob(z))
    assert torch.allclose(trace.log_prob_sum(), base.log_prob(z).sum(), rtol=1e-5)
    assert not trace.nodes["x_base"]["is_observed"]


def test_plates_particles_and_handlers(conditional):
    context = torch.randn(3, N, 1)

    def model():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", N, dim=-1), poutine.scale(scale=2.0):
            return pyro.sample("x", conditional(context))

    with pyro.plate("particles", 5, dim=-3):
        trace = traced(reparam(model))
    z = trace.nodes["x_base"]["value"]
    assert z.shape == trace.nodes["x"]["value"].shape == (5, 3, N, D)
    assert torch.allclose(trace.nodes["x"]["value"], conditional(context).push(z))
    assert torch.allclose(trace.log_prob_sum(), 2 * dist.Normal(0.0, 1.0).log_prob(z).sum(), rtol=1e-5)


def test_a_context_that_is_latent(conditional):
    def model():
        c = pyro.sample("c", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        x = pyro.sample("x", conditional(c))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.zeros(D))

    chain = MCMC(NUTS(reparam(model), max_tree_depth=4), num_samples=5, warmup_steps=5, disable_progbar=True)
    chain.run()
    assert sorted(chain.get_samples()) == ["c", "x_base"]


def test_masked_by_a_handler_and_partly_observed(flow):
    data, seen = torch.randn(N, D), torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("n", N), poutine.mask(mask=seen):
            pyro.sample("x", flow())

    trace = traced(reparam(model))
    z = trace.nodes["x_base"]["value"]
    assert torch.allclose(trace.log_prob_sum(), dist.Normal(0.0, 1.0).log_prob(z)[seen].sum(), rtol=1e-5)

    def partial():
        with pyro.plate("n", N):
            return pyro.sample("x", flow(), obs=data, obs_mask=seen)

    trace = traced(reparam(partial, "x_unobserved"))
    z = trace.nodes["x_unobserved_base"]["value"]
    expected = flow().log_prob(data)[seen].sum() + dist.Normal(0.0, 1.0).log_prob(z)[~seen].sum()
    assert torch.allclose(trace.log_prob_sum(), expected, rtol=1e-5)
    assert torch.equal(trace.nodes["_RETURN"]["value"][seen], data[seen])


# -- observed sites ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_observed_site_keeps_its_density(flow, wrap):
    law = wrap(flow())
    value = law.sample()

    def model():
        pyro.sample("x", law, obs=value)

    trace = traced(reparam(model))
    assert torch.allclose(trace.log_prob_sum(), law.log_prob(value).sum(), rtol=1e-4)
    assert trace.nodes["x_base"]["is_observed"]


def test_an_observed_generator_is_refused():
    generator = LinearGenerator(torch.randn(3, 2), torch.zeros(3))

    def model():
        pyro.sample("x", generator(), obs=torch.zeros(3))

    with pytest.raises(DensityError, match=r"site 'x' is observed.*observe it through a likelihood"):
        traced(reparam(model))


# -- initial values ------------------------------------------------------------------------------------------------


def initialised(flow, init, value=None):
    def model():
        x = pyro.sample("x", flow())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(D))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return traced(guides.initialization.InitMessenger(init)(reparam(model)))


def test_a_chosen_value_is_pulled_back(flow):
    x = torch.tensor([0.3, -0.7])
    trace = initialised(flow, guides.init_to_value(values={"x": x}))
    assert torch.allclose(trace.nodes["x_base"]["value"], flow().pull(x))
    assert torch.equal(trace.nodes["x"]["value"], x)
    assert torch.allclose(trace.nodes["x_base"]["log_prob"], dist.Normal(0.0, 1.0).log_prob(flow().pull(x)).sum())


@pytest.mark.parametrize("init", [guides.init_to_uniform, guides.init_to_median, guides.init_to_mean,
                                  guides.init_to_sample, guides.init_to_feasible])  # fmt: skip
def test_every_strategy_starts(flow, init):
    trace = initialised(flow, init)
    z, x = trace.nodes["x_base"]["value"], trace.nodes["x"]["value"]
    assert bool(z.isfinite().all())
    assert torch.allclose(flow().push(z), x, atol=1e-5)


def test_a_value_that_a_generator_cannot_reach_initialises_the_noise():
    generator = LinearGenerator(torch.randn(3, 2), torch.zeros(3))

    def model():
        pyro.sample("x", generator())

    init = guides.init_to_value(values={"x": torch.ones(3)})
    with pytest.warns(RuntimeWarning, match="does not commute with initialization"):
        trace = traced(guides.initialization.InitMessenger(init)(reparam(model)))
    assert torch.equal(trace.nodes["x"]["value"], generator().push(trace.nodes["x_base"]["value"]))


# -- inference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [NUTS, HMC])
def test_a_generator_without_a_density_has_the_exact_posterior(kernel):
    """x = W z + b observed with noise s: z | y is Gaussian with precision I + W'W / s^2."""
    torch.manual_seed(3)
    weight, bias, y, noise = torch.randn(4, 2), torch.randn(4), torch.randn(4), 0.7
    generator = LinearGenerator(weight, bias).freeze()

    def model():
        x = pyro.sample("x", generator())
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    chain = MCMC(kernel(reparam(model)), num_samples=1000, warmup_steps=200, disable_progbar=True)
    chain.run()
    z = chain.get_samples(group_by_chain=True)["x_base"]
    precision = torch.eye(2) + weight.mT @ weight / noise**2
    mean = torch.linalg.solve(precision, weight.mT @ (y - bias) / noise**2)
    covariance = torch.linalg.inv(precision)
    assert_mean(z[0], mean, chain_standard_error(z), "posterior mean")
    centred = z - mean
    for i, j in itertools.combinations_with_replacement(range(2), 2):
        product = (centred[..., i] * centred[..., j])[..., None]
        assert_mean(product[0], covariance[i, j], chain_standard_error(product), f"covariance {i}{j}")


def test_predictive_restores_the_value(flow):
    def model(y=None):
        with pyro.plate("n", N):
            x = pyro.sample("x", flow())
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    y, noisy = torch.randn(N, D), reparam(model)
    prior = Predictive(noisy, num_samples=6)()
    assert prior["x"].shape == prior["x_base"].shape == (6, N, D)
    chain = MCMC(NUTS(noisy, max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True)
    chain.run(y)
    z = chain.get_samples()["x_base"]
    for parallel in (False, True):
        restored = Predictive(noisy, {"x_base": z}, parallel=parallel)()
        assert torch.allclose(restored["x"], flow().push(z), atol=1e-6)


@pytest.mark.parametrize("make", [guides.AutoNormal, guides.AutoMultivariateNormal, gm.infer.AutoFlow])
def test_guides_in_noise_space(flow, make):
    def model():
        with pyro.plate("n", N):
            x = pyro.sample("x", flow())
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(N, D))

    noisy = reparam(model)
    guide = make(noisy)
    svi = SVI(noisy, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2, vectorize_particles=True))
    losses = [svi.step() for _ in range(5)]
    assert all(torch.tensor(losses).isfinite())
    assert list(guide()) == ["x_base"]


# -- who may come in -----------------------------------------------------------------------------------------------


def test_anything_with_base_and_push_is_welcome():
    class Shifted(dist.Normal):
        base = dist.Normal(torch.zeros(3), torch.ones(3))

        def push(self, z):
            return 5 + z

    trace = traced(reparam(lambda: pyro.sample("x", Shifted(torch.full((3,), 5.0), 1.0))))
    assert torch.equal(trace.nodes["x"]["value"], 5 + trace.nodes["x_base"]["value"])


def test_what_is_no_pushforward_is_refused_by_name():
    with pytest.raises(TypeError, match=r"site 'x'.*base and push, got Normal.*remove the site"):
        traced(reparam(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))))


def test_the_slow_direction_is_announced():
    slow, fast = gm.Flow(zuko.flows.MAF(8)), gm.transform.coupling_flow(8)
    with pytest.warns(SlowDirectionWarning, match=r"site 'x'.*slow direction.*coupling flow"):
        traced(reparam(lambda: pyro.sample("x", slow())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(reparam(lambda: pyro.sample("x", fast())))
