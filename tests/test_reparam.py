"""Noise-space inference is the same inference: densities equal by hand, posteriors equal to closed forms."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.mcmc.util import initialize_model
from torch import Size, Tensor
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods.foundation.errors import DensityError, SlowDirectionWarning, SupportError

from .linear_gaussian import (
    DOUBLE,
    LinearGaussian,
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
from .statistics import assert_law, assert_mean

REPARAM = gm.infer.PushforwardReparam()


def white(z: Tensor) -> Tensor:
    """Log density of standard normal noise, written out."""
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


class Exponentials(dist.TorchDistribution):
    """``exp(loc + z)``: a pushforward that knows nothing of us, and not how to expand itself."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.positive, 1)
    has_rsample = True

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def base(self) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)

    def push(self, z: Tensor) -> Tensor:
        return (self.loc + z).exp()

    def pull(self, x: Tensor) -> Tensor:
        return x.log() - self.loc

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        return self.push(self.base.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return white(self.pull(value)) - value.log().sum(-1)


class LinearGenerator(gm.GenerativeModel):
    """``x = W z + b`` with more or fewer columns of noise than of data: a sampler without a density."""

    density = gm.Density.IMPLICIT

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight.shape[:1])
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    @property
    def cost(self) -> gm.Cost:
        return gm.Cost(sample=1, score=None)

    @property
    def noise_shape(self) -> Size:
        return self.weight.shape[1:]

    def push_rows(self, z: Tensor, c: Tensor | None) -> Tensor:
        return z @ self.weight.mT + self.bias


def generator(features: int = 3, noise: int = 2) -> LinearGenerator:
    drawn = torch.Generator().manual_seed(5)
    weight = torch.randn(features, noise, generator=drawn)
    return LinearGenerator(weight, torch.randn(features, generator=drawn)).freeze()


# -- the density, by hand ---------------------------------------------------------------------------------------------

KEEP = torch.tensor([True, False, True])
ALL = torch.ones(3)
LAWS = {
    "flow": lambda: affine_flow("maf", 2)().expand([3]),
    "conditional flow": lambda: affine_flow("nice", 2, context=1, standardized=True)(torch.randn(3, 1)),
    "positive flow": lambda: gm.Flow(zuko.flows.NICE(2), support=constraints.positive).freeze()().expand([3]),
    "foreign": lambda: Exponentials(torch.randn(3, 2)),
}
# name -> (what is done to a law of batch shape (3,), weight of each event's log density)
WRAPPERS = {
    "none": (lambda d: d, ALL),
    "to_event": (lambda d: d.to_event(1), ALL),
    "mask": (lambda d: d.mask(KEEP), KEEP),
    "mask(False)": (lambda d: d.mask(False), 0 * ALL),
    "expand": (lambda d: d.expand([2, 3]), ALL.expand(2, 3)),
    "expand twice": (lambda d: d.expand([2, 3]).expand([4, 2, 3]), ALL.expand(4, 2, 3)),
    "mask, to_event": (lambda d: d.mask(KEEP).to_event(1), KEEP),
    "to_event, mask": (lambda d: d.to_event(1).mask(torch.tensor(True)), ALL),
    "mask, mask": (lambda d: d.mask(KEEP).mask(~KEEP), 0 * ALL),
    "mask, expand": (lambda d: d.mask(KEEP).expand([2, 3]), KEEP.expand(2, 3)),
    "expand, mask": (lambda d: d.expand([2, 3]).mask(KEEP.expand(2, 3)), KEEP.expand(2, 3)),
    "to_event, expand": (lambda d: d.to_event(1).expand([2]), ALL.expand(2, 3)),
    "to_event, expand, mask, to_event": (
        lambda d: d.to_event(1).expand([3]).mask(KEEP).to_event(1),
        KEEP[:, None].expand(3, 3),
    ),
    "expand, mask, to_event, to_event": (
        lambda d: d.expand([2, 3]).mask(KEEP).to_event(1).to_event(1),
        KEEP.expand(2, 3),
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("law", LAWS)
def test_wrappers(law, wrapper):
    """A latent site scores its noise, an observed one its value, each event with the weight that the wrappers give."""
    d, (wrap, weight) = LAWS[law](), WRAPPERS[wrapper]
    fn = wrap(d)

    def model(obs: Tensor | None = None) -> None:
        pyro.sample("x", fn, obs=obs)

    trace = poutine.trace(noisy(model)).get_trace()
    x, z = trace.nodes["x"]["value"], trace.nodes["x_base"]["value"]
    assert x.shape == fn.shape() and torch.equal(x, d.push(z))
    assert trace.nodes["x"]["fn"].batch_shape == fn.batch_shape and trace.nodes["x"]["fn"].event_shape == fn.event_shape
    assert trace.nodes["x_base"]["fn"].batch_shape == fn.batch_shape
    assert torch.allclose(trace.log_prob_sum(), (weight * white(z)).sum(), atol=1e-5)
    assert list(trace.stochastic_nodes) == ["x_base"]

    observed = poutine.trace(noisy(model)).get_trace(x)
    assert torch.allclose(observed.log_prob_sum(), (weight * d.log_prob(x)).sum(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(observed.log_prob_sum(), poutine.trace(model).get_trace(x).log_prob_sum(), atol=1e-5)
    assert torch.equal(observed.nodes["x"]["value"], x) and not observed.stochastic_nodes
    assert torch.allclose(d.push(observed.nodes["x_base"]["value"]), x, rtol=1e-4, atol=1e-5)


def test_plates_masks_scales_and_subsamples():
    flow = affine_flow()
    keep = torch.tensor([True, False, True, True])

    def model() -> None:
        pyro.sample("alone", flow())
        with pyro.plate("columns", 4, dim=-1), poutine.mask(mask=keep):
            pyro.sample("masked", flow())
            with pyro.plate("rows", 3, dim=-2), poutine.scale(scale=2.5):
                pyro.sample("nested", flow())
        with pyro.plate("many", 10, subsample_size=5, dim=-1):
            pyro.sample("some", flow())

    trace = poutine.trace(noisy(model, "alone", "masked", "nested", "some")).get_trace()
    shapes = {"alone": (), "masked": (4,), "nested": (3, 4), "some": (5,)}
    weights = {"alone": 1.0, "masked": keep, "nested": 2.5 * keep, "some": 2.0}
    total = 0.0
    for name, shape in shapes.items():
        z = trace.nodes[f"{name}_base"]["value"]
        assert z.shape == (*shape, 2) == trace.nodes[name]["value"].shape
        total = total + (weights[name] * white(z)).sum()
    assert torch.allclose(trace.log_prob_sum(), total, rtol=1e-5)

    values = {name: trace.nodes[name]["value"] for name in shapes}
    observed = poutine.trace(noisy(poutine.condition(model, values), *shapes)).get_trace()
    total = sum((weights[name] * flow().log_prob(value)).sum() for name, value in values.items())
    assert torch.allclose(observed.log_prob_sum(), total, rtol=1e-5)


@pytest.mark.parametrize("config", ["dict", "function"])
def test_obs_mask(config):
    """What is observed is scored by its density, what is not becomes noise; Pyro names the two sites."""
    flow, seen = affine_flow(), torch.tensor([True, False, True, False])
    data = flow().sample((4,))

    def model() -> Tensor:
        with pyro.plate("data", 4):
            return pyro.sample("x", flow(), obs=data, obs_mask=seen)

    def ours(site: dict) -> gm.infer.PushforwardReparam | None:
        return REPARAM if isinstance(site["fn"], gm.GenerativeDistribution) else None

    names = {"x_observed": REPARAM, "x_unobserved": REPARAM}
    trace = poutine.trace(poutine.reparam(model, names if config == "dict" else ours)).get_trace()
    assert set(trace.stochastic_nodes) == {"data", "x_unobserved_base"}
    z = trace.nodes["x_unobserved_base"]["value"]
    total = (seen * flow().log_prob(data)).sum() + (~seen * white(z)).sum()
    assert torch.allclose(trace.log_prob_sum(), total, rtol=1e-5)
    assert torch.allclose(trace.nodes["_RETURN"]["value"], torch.where(seen[:, None], data, flow().push(z)))
    with pytest.raises(TypeError, match="'x_observed' and 'x_unobserved'"):
        poutine.trace(noisy(model)).get_trace()


def test_context_from_an_upstream_latent():
    prior = affine_flow("nice", 2, context=2)

    def model() -> None:
        c = pyro.sample("c", affine_flow("maf", 2)())
        with pyro.plate("data", 3):
            pyro.sample("x", prior(c))

    trace = poutine.trace(noisy(model, "c", "x")).get_trace()
    value = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}
    assert torch.allclose(value["x"], prior(value["c"]).push(value["x_base"]))
    total = white(value["c_base"]) + white(value["x_base"]).sum()
    assert torch.allclose(trace.log_prob_sum(), total, rtol=1e-5)


def test_an_enumerated_cause():
    """The context is enumerated: one noise, as many values as causes, and the bound sums over them."""
    prior, contexts, weights = affine_flow("nice", context=1), torch.randn(3, 1), torch.tensor([0.2, 0.3, 0.5])
    y, z = torch.tensor([0.4, -0.3]), torch.tensor([1.0, -0.5])

    @config_enumerate
    def model() -> None:
        k = pyro.sample("k", dist.Categorical(weights))
        x = pyro.sample("x", prior(contexts[k]))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    def guide() -> None:
        pyro.sample("x_base", dist.Delta(z, event_dim=1))

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(noisy(model), guide)
    terms = weights.log() + dist.Normal(prior(contexts).push(z), 0.5).log_prob(y).sum(-1)
    assert loss == pytest.approx(-float(white(z) + terms.logsumexp(-1)), abs=1e-4)


def test_an_event_outside_the_support_has_no_density():
    prior = gm.Flow(zuko.flows.NICE(2), support=constraints.positive)
    outside = torch.tensor([[1.0, 2.0], [1.0, -2.0]])

    def model() -> None:
        with pyro.plate("data", 2):
            pyro.sample("x", prior(), obs=outside)

    with pytest.raises(ValueError, match="outside the support"):
        poutine.trace(noisy(model)).get_trace()
    with pyro.validation_enabled(False):
        trace = poutine.trace(noisy(model)).get_trace()
        assert trace.log_prob_sum() == -math.inf
        alone = poutine.trace(noisy(poutine.mask(model, mask=torch.tensor([True, False])))).get_trace()
        assert torch.allclose(alone.log_prob_sum(), prior().log_prob(outside[0]), atol=1e-5)


def test_gradients_reach_a_trainable_prior():
    """Latent, through the push; observed, the same gradient as without the reparameterisation."""
    prior, y = gm.Flow(zuko.flows.NICE(2, hidden_features=(8,))), torch.tensor([0.3, -0.4])

    def latent() -> None:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    def observed() -> None:
        pyro.sample("x", prior(), obs=y)

    poutine.trace(noisy(latent)).get_trace().log_prob_sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prior.parameters())
    gradients = []
    for model in (observed, noisy(observed)):
        total = poutine.trace(model).get_trace().log_prob_sum()
        gradients.append(torch.autograd.grad(total, list(prior.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


# -- where inference starts -------------------------------------------------------------------------------------------

STRATEGIES = {
    "uniform": init_to_uniform,
    "median": init_to_median,
    "mean": init_to_mean,
    "sample": init_to_sample,
    "feasible": init_to_feasible,
    "value of another site": init_to_value(values={"elsewhere": torch.zeros(2)}),
    "generated": init_to_generated(generate=lambda: init_to_sample),
}


def start(model, strategy) -> tuple[Tensor, Tensor]:
    """Where a chain starts, and its potential energy there; no warning is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, potential, _, _ = initialize_model(model, init_strategy=strategy)
        AutoNormal(model, init_loc_fn=strategy)()
    assert list(params) == ["x_base"]
    return params["x_base"], potential(params)


def measured_pair(law) -> tuple:
    y = torch.tensor([0.5, 1.5])

    def model() -> None:
        x = pyro.sample("x", law())
        pyro.sample("y", dist.Normal(x[..., :2], 0.5).to_event(1), obs=y)

    return model, noisy(model), y


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("law", ["flow", "implicit", "foreign"])
def test_strategies_start_the_noise(law, strategy):
    laws = {"flow": affine_flow(), "implicit": generator(), "foreign": lambda: Exponentials(torch.zeros(2))}
    _, model, y = measured_pair(laws[law])
    z, energy = start(model, STRATEGIES[strategy])
    x = laws[law]().push(z)
    expected = white(z) + dist.Normal(x[:2], 0.5).log_prob(y).sum()
    assert z.shape == (2,) and torch.allclose(energy, -expected, rtol=1e-5)
    if strategy in ("mean", "feasible"):
        assert torch.equal(z, torch.zeros(2))


@pytest.mark.parametrize("generated", [False, True], ids=["value", "generated value"])
def test_a_chosen_value_is_honoured(generated):
    prior, chosen = affine_flow(), torch.tensor([0.3, -1.2])
    _, model, _ = measured_pair(prior)
    strategy = init_to_value(values={"x": chosen})
    if generated:
        strategy = init_to_generated(generate=partial(init_to_value, values={"x": chosen}))
    z, _ = start(model, strategy)
    assert torch.allclose(z, prior().pull(chosen), atol=1e-6)
    guide = AutoDelta(model, init_loc_fn=strategy)
    guide()
    assert torch.allclose(prior().push(guide.median()["x_base"]), chosen, atol=1e-5)
    z, _ = start(model, init_to_value(values={"x_base": torch.tensor([1.0, 2.0])}))
    assert torch.equal(z, torch.tensor([1.0, 2.0]))


def test_a_chosen_value_in_plates_and_wrappers():
    prior, chosen = affine_flow(), torch.randn(3, 4, 2)

    def model() -> None:
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("x", prior().expand([3, 4]).mask(torch.ones(3, 4).bool()).to_event(1))

    z, _ = start(noisy(model), init_to_value(values={"x": chosen}))
    assert torch.allclose(z, prior().pull(chosen), atol=1e-6)


def test_a_chosen_value_that_has_no_noise():
    """Without an inverse Pyro says that the choice is lost; outside the support we say that it is no value at all."""
    _, model, _ = measured_pair(generator())
    with pytest.warns(RuntimeWarning, match="does not commute with initialization"):
        params, *_ = initialize_model(model, init_strategy=init_to_value(values={"x": torch.ones(3)}))
    assert params["x_base"].shape == (2,) and params["x_base"].isfinite().all()
    positive = gm.Flow(zuko.flows.NICE(2), support=constraints.positive)
    _, model, _ = measured_pair(positive)
    with pytest.raises(SupportError, match="outside the support"):
        AutoNormal(model, init_loc_fn=init_to_value(values={"x": -torch.ones(2)}))()


# -- posteriors -------------------------------------------------------------------------------------------------------


def noise_posterior(weight: Tensor, bias: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Means and covariance of ``z`` given ``y = W z + b + noise``."""
    weight, bias, y = weight.to(DOUBLE), bias.to(DOUBLE), y.to(DOUBLE)
    precision = torch.eye(weight.shape[1], dtype=DOUBLE) + weight.mT @ weight / noise**2
    return (y - bias) @ weight @ precision.inverse() / noise**2, precision.inverse()


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        pytest.param((3, 2), {"kernel": NUTS, "max_tree_depth": 4}, marks=pytest.mark.slow),
        ((2, 3), {"kernel": HMC, "step_size": 0.4, "num_steps": 4}),
    ],
    ids=["NUTS, less noise than data", "HMC, more noise than data"],
)
def test_a_sampler_without_density_has_the_right_posterior(shape, settings):
    law, noise = generator(*shape), 1.0
    y = law().sample((24,)) + noise * torch.randn(24, shape[0])
    mean, covariance = noise_posterior(law.weight, law.bias, y, noise)
    draws = chain(noisy(plated(measured(law, noise))), y, draws=500, warmup=200, **settings)["x_base"]
    assert_chain(draws, mean, covariance)


@pytest.mark.parametrize(
    "guide_class", [AutoNormal, AutoMultivariateNormal, pytest.param(gm.infer.AutoFlow, marks=pytest.mark.slow)]
)
def test_guides_over_noise(guide_class):
    """A full guide finds the posterior of the noise, a factorised one its mean and its precisions."""
    law, noise = generator(), 1.0
    y = torch.tensor([0.4, -1.0, 0.8])
    mean, covariance = noise_posterior(law.weight, law.bias, y, noise)
    model = noisy(measured(law, noise))
    guide = guide_class(model)
    if guide_class is gm.infer.AutoFlow:
        fit(model, guide, y, steps=100, rate=0.001)
    else:
        fit(model, guide, y, steps=600, rate=0.1)
    if guide_class is AutoNormal:
        loc, scale = guide._get_loc_and_scale("x_base")
        expected = covariance.inverse().diagonal() ** -0.5
        assert ((loc - mean).abs() < 0.05 * expected).all() and ((scale / expected - 1).abs() < 0.05).all()
    else:
        assert_guide(guide_draws(guide), mean, covariance)
    weight = law.weight.to(DOUBLE)
    draws = Predictive(model, guide=guide, num_samples=1000)(y)["x"].reshape(-1, 3)
    assert_mean(draws, law.bias.to(DOUBLE) + weight @ mean, name="restored x")


@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorised"])
def test_every_particle_of_the_exact_guide_is_the_evidence(vectorized):
    problem = LinearGaussian(affine_flow(dtype=DOUBLE))
    y = problem.data(3)
    mean, covariance = moments(problem.prior)
    posterior = problem.posterior(y)
    base = problem.prior()
    origin = base.push(torch.zeros(2, dtype=DOUBLE))
    factor = torch.stack([base.push(row) - origin for row in torch.eye(2, dtype=DOUBLE)], -1)
    z = dist.MultivariateNormal(
        (posterior.mean - origin) @ factor.inverse().mT, noise_posterior(factor, origin, y, 0.9)[1]
    )

    def guide(y: Tensor) -> None:
        with pyro.plate("copies", len(y)):
            pyro.sample("x_base", z)

    elbo = Trace_ELBO(4, vectorize_particles=vectorized, max_plate_nesting=1)
    loss = elbo.loss(noisy(problem.plated), guide, y)
    evidence = dist.MultivariateNormal(mean, covariance + 0.81 * torch.eye(2, dtype=DOUBLE)).log_prob(y).sum()
    assert loss == pytest.approx(-float(evidence), abs=1e-6)


# -- Predictive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
def test_prior_predictive(parallel):
    problem = LinearGaussian()
    draws = Predictive(noisy(problem.model), num_samples=1500, parallel=parallel)()
    x, z = draws["x"].reshape(-1, 2), draws["x_base"].reshape(-1, 2)
    assert len(x) == 1500 and torch.allclose(x, problem.prior().push(z), atol=1e-5)
    standard = (x - problem.mean) / problem.covariance.diagonal().sqrt()
    assert_law(standard, dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0).cdf)
    assert_mean((draws["y"].reshape(-1, 2) - x).square(), torch.full((2,), 0.81))


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("copies", [None, 3], ids=["alone", "plate"])
def test_posterior_predictive_restores_the_site(copies, parallel):
    """Draws of the noise, as MCMC returns them, give back the site, and its measurement anew."""
    problem = LinearGaussian()
    shape = (copies,) if copies else ()
    y = problem.data(*shape)

    def model(observed: Tensor | None = None) -> None:
        if copies is None:
            problem.model(observed)
        else:
            with pyro.plate("copies", copies):
                problem.model(observed)

    draws = chain(noisy(model), y, draws=50, warmup=20)
    predicted = Predictive(noisy(model), draws, parallel=parallel)()
    x = predicted["x"].reshape(50, *shape, 2)
    assert torch.allclose(x, push_base(problem.prior, draws), atol=1e-5)
    assert_mean((predicted["y"].reshape(x.shape) - x).reshape(-1, 2), torch.zeros(2))


# -- refusals ---------------------------------------------------------------------------------------------------------


def trace_of(law, obs: Tensor | None = None):
    return poutine.trace(noisy(lambda: pyro.sample("x", law, obs=obs))).get_trace()


def test_an_observed_site_needs_a_density():
    with pytest.raises(DensityError, match=r"(?s)site 'x' is observed.*observe it through a likelihood"):
        trace_of(generator()(), torch.zeros(3))
    with pytest.raises(DensityError, match="PushforwardReparam"):
        generator()().log_prob(torch.zeros(3))


@pytest.mark.parametrize(
    "law",
    [dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(True), gm.Flow(zuko.mixtures.GMM(2))()],
    ids=["Normal", "wrapped Normal", "mixture"],
)
def test_a_site_that_is_no_pushforward_is_refused_by_name(law):
    with pytest.raises(TypeError, match=r"site 'x'.*needs a distribution with base and push"):
        trace_of(law)


SLOW_FLOW, FAST_FLOW = gm.Flow(zuko.flows.MAF(8)), gm.Flow(zuko.flows.NICE(8))


def test_the_slow_direction_warns():
    with pytest.warns(SlowDirectionWarning, match=r"site 'x'.*24 sequential network calls against 3"):
        trace_of(SLOW_FLOW())
    with pytest.warns(SlowDirectionWarning):
        trace_of(SLOW_FLOW().expand([3]).to_event(1).mask(False))


@pytest.mark.parametrize("case", ["coupling", "sampling direction", "observed"])
def test_what_is_fast_does_not_warn(case):
    laws = {"coupling": FAST_FLOW, "sampling direction": gm.Flow(zuko.flows.MAF(8), direction="sampling")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace_of(laws.get(case, SLOW_FLOW)(), torch.zeros(8) if case == "observed" else None)


# -- a pushforward of somebody else's ---------------------------------------------------------------------------------


def test_a_foreign_pushforward_under_inference():
    """``x = exp(z)`` observed with multiplicative noise: the posterior of the noise is normal."""
    y = torch.randn(20, 2)

    def model() -> None:
        with pyro.plate("copies", 20):
            x = pyro.sample("x", Exponentials(torch.full((2,), 0.5)))
            pyro.sample("y", dist.Normal(x.log(), 1.0).to_event(1), obs=y)

    draws = chain(noisy(model), draws=400, kernel=HMC, step_size=0.5, num_steps=3)["x_base"]
    assert_chain(draws, (y.to(DOUBLE) - 0.5) / 2, torch.eye(2, dtype=DOUBLE) / 2)
    guide = AutoNormal(noisy(model))
    svi = SVI(noisy(model), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step())
