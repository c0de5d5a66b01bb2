"""Flow guides: trained by every ELBO, exact where they can be, never in anybody's way."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_genmods as gm
from pyro_genmods.foundation.errors import DensityError, ShapeError, SlowDirectionError, SupportError
from pyro_genmods.infer import AutoFlow

from .statistics import assert_law, assert_mean, chain_standard_error

import zuko  # isort: skip  (the package puts right what importing zuko changes)

DOUBLE = torch.float64


def double(x: object) -> Tensor:
    return torch.tensor(x, dtype=DOUBLE)


def light(features: int) -> gm.Flow:
    """Two affine coupling layers."""
    return gm.Flow(zuko.flows.NICE(features, transforms=2, hidden_features=(8,)), direction="sampling")


class LinearGaussian:
    """Latents ``x ~ N(0, S)`` in two dimensions and ``a ~ N(1, 4)``, data ``y ~ N(x + a, 1/4)``."""

    cov = double([[4.0, 1.9], [1.9, 1.0]])
    y = double([1.0, -0.5])

    def __call__(self, y: Tensor | None = None) -> None:
        y = self.y if y is None else y
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), self.cov))
        a = pyro.sample("a", dist.Normal(double(1.0), 2.0))
        pyro.sample("y", dist.Normal(x + a[..., None], 0.5).to_event(1), obs=y)

    @property
    def posterior(self) -> torch.distributions.MultivariateNormal:
        prior = torch.block_diag(self.cov, double([[4.0]]))
        design = double([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        covariance = (prior.inverse() + design.mT @ design / 0.25).inverse()
        mean = covariance @ (prior.inverse() @ double([0.0, 0.0, 1.0]) + design.mT @ self.y / 0.25)
        return torch.distributions.MultivariateNormal(mean, covariance)

    @property
    def log_evidence(self) -> float:
        covariance = self.cov + 4.0 + 0.25 * torch.eye(2, dtype=DOUBLE)
        return float(torch.distributions.MultivariateNormal(torch.ones(2, dtype=DOUBLE), covariance).log_prob(self.y))


linear = LinearGaussian()


def banana() -> None:
    x = pyro.sample("x", dist.Normal(double(0.0), 3.0))
    pyro.sample("y", dist.Normal(0.5 * (x**2 - 9), 0.5))


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(double(0.0), 3.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()[..., None].expand(*v.shape, 9)).to_event(1))


def schools() -> None:
    y, error = double([28.0, 8, -3, 7, -1, 1, 18, 12]), double([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu = pyro.sample("mu", dist.Normal(double(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(double(5.0)))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def train(model, guide, steps: int, rate: float, particles: int = 16, plates: int = 1) -> list[float]:
    """SVI with a step that decays a hundredfold."""
    optimizer = pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)})
    elbo = Trace_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=plates)
    svi = SVI(model, guide, optimizer, elbo)
    return [svi.step() for _ in range(steps)]


def bound(guide, *args, draws: int = 4000) -> tuple[float, float]:
    """ELBO and its standard error."""
    weights = guide.log_weights(draws, *args)
    return float(weights.mean()), float(weights.std()) / math.sqrt(draws)


def bound_of(model, guide: AutoMultivariateNormal, draws: int = 4000) -> tuple[float, float]:
    """The same of another guide, by Pyro."""
    elbo = Trace_ELBO(100, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        values = -double([elbo.loss(model, guide) for _ in range(draws // 100)])
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def report(line: str) -> None:
    sys.stderr.write(line + "\n")


# -- learning ---------------------------------------------------------------------------------------------------------

FLOWS = {
    "default": lambda: None,
    "a flow": lambda: gm.Flow(zuko.flows.MAF(3, hidden_features=(8,)), direction="sampling"),
    "a function": lambda: light,
}


@pytest.mark.parametrize("name", FLOWS)
def test_every_parameter_is_registered_and_learns(name):
    """With the SVI object made before the guide has met the model; Pyro's own guide trains no zuko flow."""
    model = schools if name == "default" else banana_3
    guide = AutoFlow(model, FLOWS[name]())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step()
    store = pyro.get_param_store()
    mine = dict(guide.named_parameters())
    assert len(mine) > 2 and {id(p) for p in mine.values()} == {id(p) for _, p in store.named_parameters()}
    before = {key: p.detach().clone() for key, p in mine.items()}
    for _ in range(4):
        svi.step()
    still = [key for key, p in guide.named_parameters() if torch.equal(p, before[key])]
    assert not still, f"these parameters did not change: {still}"


def banana_3() -> None:
    banana()
    pyro.sample("z", dist.Normal(double(0.0), 1.0))


def test_a_given_flow_is_the_one_that_learns():
    flow = gm.Flow(zuko.flows.NICE(2, transforms=2), direction="sampling")
    guide = AutoFlow(banana, flow)
    train(banana, guide, 5, 1e-2)
    assert guide.flow is flow and flow.place[0] == DOUBLE
    assert any(bool(p.abs().sum() > 0) for p in list(flow.parameters())[-2:])


ELBOS = {
    "Trace": Trace_ELBO(),
    "Trace, particles": Trace_ELBO(num_particles=3),
    "Trace, vectorised": Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField": TraceMeanField_ELBO(),
    "TraceGraph": TraceGraph_ELBO(),
    "TraceEnum": TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "Renyi": RenyiELBO(alpha=0.0, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize("stl", [True, False])
@pytest.mark.parametrize("name", ELBOS)
def test_every_objective_starts_at_the_log_evidence(name, stl):
    """The posterior is Gaussian and the start is the best Gaussian: every particle of every bound is the evidence."""
    guide = AutoFlow(linear, light, stl=stl)
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-2}), ELBOS[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*mean field.*|.*do not appear to match.*|.*order.*")
        assert abs(svi.step() + linear.log_evidence) < 1e-6
        assert math.isfinite(svi.step())
    assert len(pyro.get_param_store()) > 2


def test_arguments_of_the_model():
    y = double([3.0, 4.0])
    guide = AutoFlow(linear, light)
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    loss = svi.step(y)
    evidence = dist.MultivariateNormal(torch.ones(2, dtype=DOUBLE), linear.cov + 4 + 0.25 * torch.eye(2)).log_prob(y)
    assert abs(loss + float(evidence)) < 1e-6
    assert torch.allclose(guide.log_weights(50, y).mean(), evidence, atol=0.05)


def test_wake_phase_learns_from_given_draws():
    """Scored at draws that are not its own, the guide's density has a gradient, also with path-wise gradients on."""
    guide = AutoFlow(linear, light, stl=True)
    elbo = ReweightedWakeSleep(4, vectorize_particles=True, max_plate_nesting=1, model_has_params=False)
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    guide()
    before = guide.shift.detach().clone()
    svi.step()
    assert not torch.equal(before, guide.shift)


def test_a_draw_made_without_gradient_is_scored_with_one():
    guide = AutoFlow(linear, light)
    guide()
    site = poutine.trace(guide).get_trace().nodes["_AutoFlow_latent"]["fn"]
    x = site.sample()
    (gradient,) = torch.autograd.grad(site.log_prob(x), guide.shift)
    assert gradient.abs().sum() > 0


def test_minibatches():
    """A subsampled plate: the fit runs on its noise, and the guide learns the posterior of all data."""
    x = torch.randn(500, dtype=DOUBLE) + 2

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(double(0.0), 10.0))
        with pyro.plate("data", len(x), subsample_size=50) as rows:
            pyro.sample("x", dist.Normal(loc[..., None] if loc.dim() else loc, 1.0), obs=x[rows])

    guide = AutoFlow(model, lambda d: gm.Flow(zuko.flows.NSF(d, transforms=1, hidden_features=(8,)), "sampling"))
    train(model, guide, 200, 3e-2, particles=1)
    draws = guide.sample_posterior(4000)["loc"]
    sd = 1 / math.sqrt(500.01)
    assert abs(float(draws.mean() - x.sum() * sd**2)) < sd
    assert abs(float(draws.std()) / sd - 1) < 0.2


def test_enumerated_sites_hidden_from_the_guide():
    """The guide starts where Pyro's do, since the hidden draws make the joint random, and learns the marginal."""
    x = torch.cat([torch.randn(40) - 4, torch.randn(20) + 4])

    def model() -> None:
        weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(8 * z - 4, 1.0), obs=x)

    guide = AutoFlow(poutine.block(model, hide=["z"]), light_1)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98})
    svi = SVI(model, guide, optimizer, TraceEnum_ELBO(max_plate_nesting=1))
    svi.step()
    assert torch.allclose(guide.centre, guide._init_loc()) and torch.equal(guide.whitener, torch.eye(1))
    for _ in range(250):
        svi.step()
    draws = guide.sample_posterior(4000)["weight"]
    truth = dist.Beta(21.0, 41.0)
    assert abs(float(draws.mean() - truth.mean)) < 0.3 * float(truth.stddev)
    assert abs(float(draws.std() / truth.stddev) - 1) < 0.2


def test_part_of_a_list_of_guides():
    guide = AutoGuideList(schools)
    guide.append(AutoFlow(poutine.block(schools, expose=["mu", "tau"]), light))
    guide.append(AutoNormal(poutine.block(schools, hide=["mu", "tau"])))
    train(schools, guide, 3, 1e-2, particles=1)
    assert set(guide.median()) == {"mu", "tau", "theta"}
    assert any("0.flow" in key for key in pyro.get_param_store())


def test_eval_mode_still_trains():
    guide = AutoFlow(banana_3, gm.Flow(zuko.flows.BPF(3, transforms=1), "sampling"))
    train(banana_3, guide, 2, 1e-2)
    guide.eval()
    before = [p.detach().clone() for p in guide.parameters()]
    train(banana_3, guide, 3, 1e-2)
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


# -- the bound --------------------------------------------------------------------------------------------------------

TARGETS = {"banana": (banana, 2), "funnel": (funnel, 0), "schools": (schools, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_the_first_bound_is_that_of_a_trained_normal_and_the_last_is_better(name):
    model, _ = TARGETS[name]
    normal = AutoMultivariateNormal(model)
    train(model, normal, 2500, 1e-2)
    value, error = bound_of(model, normal)
    guide = AutoFlow(model)
    guide()
    first, first_error = bound(guide)
    assert first >= value - 2 * math.hypot(error, first_error)
    train(model, guide, 1500, 5e-3)
    last, last_error = bound(guide)
    khat = gm.diagnostics.psis_khat(guide.log_weights(4000))
    report(f"{name}: normal {value:.3f}, start {first:.3f}, end {last:.3f}, k-hat {khat:.2f}")
    assert last > value + 5 * math.hypot(error, last_error)
    if name != "schools":  # normalised: the log evidence is zero
        assert -0.3 < last < 5 * last_error


@pytest.mark.slow
def test_the_first_bound_on_a_short_run():
    normal = AutoMultivariateNormal(banana)
    train(banana, normal, 250, 5e-2)
    value, error = bound_of(banana, normal)
    guide = AutoFlow(banana)
    guide()
    first, first_error = bound(guide)
    assert first >= value - 2 * math.hypot(error, first_error)
    train(banana, guide, 400, 1e-2)
    last, last_error = bound(guide)
    assert last > value + 5 * math.hypot(error, last_error)


# -- reading the posterior --------------------------------------------------------------------------------------------


def many_supports() -> None:
    pyro.sample("scale", dist.LogNormal(1.0, 0.5))
    pyro.sample("angle", dist.Uniform(-1.0, 2.0))
    with pyro.plate("rows", 3, dim=-2):
        pyro.sample("row", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 2, dim=-1):
            pyro.sample("cell", dist.Dirichlet(torch.ones(4)))
    pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    pyro.sample("tril", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), []).to_event(1))


def test_shapes_and_supports():
    guide = AutoFlow(many_supports, light)
    trace = poutine.trace(guide).get_trace()
    model = poutine.trace(poutine.replay(many_supports, trace)).get_trace()
    assert math.isfinite(float(model.log_prob_sum().detach() - trace.log_prob_sum().detach()))
    draws, median, band = guide.sample_posterior(7), guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    assert set(draws) == {"scale", "angle", "row", "cell", "factor", "tril"}
    for name in draws:
        shape, support = model.nodes[name]["value"].shape, model.nodes[name]["fn"].support
        assert trace.nodes[name]["value"].shape == shape
        assert draws[name].shape == (7, *shape) and support.check(draws[name]).all()
        assert median[name].shape == shape and support.check(median[name]).all(), f"median of {name}"
        assert band[name].shape == (3, *shape) and (band[name].diff(dim=0) >= 0).all()


def test_vectorised_particles_keep_the_sites_apart():
    guide = AutoFlow(many_supports, light)
    guide()
    with pyro.plate("particles", 6, dim=-3):
        trace = poutine.trace(guide).get_trace()
    assert trace.nodes["_AutoFlow_latent"]["value"].shape == (6, 1, 1, guide.latent_dim)
    assert trace.nodes["cell"]["value"].shape == (6, 3, 2, 4)
    assert trace.nodes["scale"]["value"].shape == (6, 1, 1)


def test_scores_of_the_guide_are_those_of_its_posterior():
    guide = AutoFlow(schools)
    train(schools, guide, 20, 1e-2)
    for stl in (True, False):
        guide.stl = stl
        trace = poutine.trace(guide).get_trace()
        trace.compute_score_parts()
        site = trace.nodes["_AutoFlow_latent"]
        truth = guide.get_posterior().log_prob(site["value"])
        assert torch.allclose(site["log_prob"], truth, atol=1e-9)
        assert torch.allclose(site["score_parts"].entropy_term, truth, atol=1e-9)
        tau = trace.nodes["tau"]
        assert torch.allclose(tau["log_prob"], -tau["value"].log()), "Jacobian of the positive site"


def test_marginals_of_an_exact_guide():
    """Normal and log-normal posteriors, in closed form."""

    def model() -> None:
        pyro.sample("scale", dist.LogNormal(double(1.0), 0.5))
        pyro.sample("loc", dist.Normal(double([-1.0, 3.0]), double([2.0, 0.1])).to_event(1))

    guide = AutoFlow(model, light)
    guide()
    draws = guide.sample_posterior(5000)
    assert_law(draws["scale"], dist.LogNormal(double(1.0), 0.5).cdf)
    assert_law((draws["loc"] - double([-1.0, 3.0])) / double([2.0, 0.1]), dist.Normal(0.0, 1.0).cdf)
    median, band = guide.median(num_samples=40_000), guide.quantiles([0.05, 0.95], num_samples=40_000)
    assert abs(float(median["scale"].log()) - 1) < 5 * 0.5 * 1.2533 / 200
    assert torch.allclose(band["scale"].log(), 1 + 0.5 * double([-1.6449, 1.6449]), atol=5 * 0.5 * 2.1 / 200)


def test_quantiles_are_those_of_the_draws():
    draws = torch.randn(1001, 2, 3)
    for q in (torch.tensor([0.0, 0.123, 0.5, 1.0]), torch.tensor(0.3)):
        found = gm.infer.guides._quantile(draws, q)
        assert torch.allclose(found, torch.quantile(draws, q, dim=0), atol=1e-6)


def test_one_latent_against_quadrature():
    """A skew posterior of a single scalar, after training: marginal quantiles by quadrature."""
    y = double([0.0, 1.0, 0.0])

    def model() -> None:
        rate = pyro.sample("rate", dist.HalfNormal(double(3.0)))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    grid = torch.linspace(1e-5, 6, 20_001, dtype=DOUBLE)
    density = (dist.HalfNormal(double(3.0)).log_prob(grid) + dist.Poisson(grid[:, None]).log_prob(y).sum(-1)).exp()
    cdf = density.cumsum(0)
    truth = torch.tensor(np.interp([0.05, 0.5, 0.95], cdf / cdf[-1], grid))
    guide = AutoFlow(model)
    train(model, guide, 120, 2e-2)
    assert guide.latent_dim == 1
    found = guide.quantiles([0.05, 0.5, 0.95], num_samples=40_000)["rate"]
    assert ((found - truth).abs() < 0.02 * (truth[2] - truth[0])).all(), (found, truth)


def test_predictive():
    guide = AutoFlow(linear, light)
    guide()
    draws = Predictive(linear, guide=guide, num_samples=300)(None)
    assert draws["y"].shape == (300, 2) and draws["x"].shape[0] == 300
    assert_mean(draws["a"].reshape(-1), linear.posterior.mean[2])


# -- the transport ----------------------------------------------------------------------------------------------------


def bent_guide(model=linear) -> AutoFlow:
    """A guide whose flow is far from the identity."""
    guide = AutoFlow(model, lambda d: gm.Flow(zuko.flows.NICE(d, transforms=3, hidden_features=(8,)), "sampling"))
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def test_the_transform_is_a_bijection_with_the_right_volume():
    guide = bent_guide()
    transform, z = guide.get_transform(), torch.randn(6, 3, dtype=DOUBLE)
    x = transform(z)
    assert torch.allclose(transform.inv(x), z, atol=1e-9)
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in z])
    volume = jacobian.det().abs().log()
    assert torch.allclose(transform.log_abs_det_jacobian(z, x), volume, atol=1e-9)
    assert torch.allclose(transform.log_abs_det_jacobian(z.clone(), x.clone()), volume, atol=1e-9)
    assert torch.allclose(transform.inv.log_abs_det_jacobian(x, z), -volume, atol=1e-9)
    law = dist.TransformedDistribution(guide.get_base_dist(), [transform])
    assert torch.allclose(law.log_prob(x), guide.get_posterior().log_prob(x), atol=1e-9)


def test_a_volume_made_without_gradient_is_not_used_with_one():
    guide = bent_guide()
    transform, z = guide.get_transform(), torch.randn(3, dtype=DOUBLE)
    with torch.no_grad():
        x = transform(z)
    assert transform.log_abs_det_jacobian(z, x).requires_grad


def test_posterior_scores_any_point_and_integrates_to_one():
    guide = bent_guide(banana)
    posterior = guide.get_posterior()
    with torch.no_grad():
        wide = dist.MultivariateNormal(guide.centre, 16 * guide.whitener @ guide.whitener.mT)
        x = wide.sample((40_000,))
        assert_mean((posterior.log_prob(x) - wide.log_prob(x)).exp(), 1.0)


def test_neutra_is_the_same_density_in_other_coordinates():
    guide = bent_guide()
    model, transform = NeuTraReparam(guide).reparam(linear), guide.get_transform()
    for z in torch.randn(4, 3, dtype=DOUBLE):
        trace = poutine.trace(poutine.condition(model, {"x_shared_latent": z})).get_trace()
        latent = transform(z)
        values = {"x": latent[:2], "a": latent[2]}
        truth = poutine.trace(poutine.condition(linear, values)).get_trace().log_prob_sum()
        assert torch.allclose(trace.nodes["x"]["value"], values["x"])
        assert torch.allclose(trace.log_prob_sum(), truth + transform.log_abs_det_jacobian(z, latent), atol=1e-9)


@pytest.mark.slow
def test_neutra_recovers_the_posterior():
    """Whatever the guide, NUTS in its noise space has the exact posterior."""
    guide = bent_guide()
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(linear)
    mcmc = MCMC(NUTS(model, max_tree_depth=5), num_samples=400, warmup_steps=150, disable_progbar=True)
    mcmc.run()
    with torch.no_grad():
        z = mcmc.get_samples()["x_shared_latent"]
        draws = neutra.transform_sample(z)
    draws = torch.cat([draws["x"], draws["a"][:, None]], -1)
    truth = linear.posterior
    gap = (draws - truth.mean) / truth.stddev
    assert_mean(gap, 0.0, chain_standard_error(gap[None]))
    assert_mean(gap.square(), 1.0, chain_standard_error(gap.square()[None]))
    assert not any(p.grad is not None for p in guide.parameters())


# -- path-wise gradients ----------------------------------------------------------------------------------------------


def gradients(model, guide, repeats: int, particles: int = 1, elbo=Trace_ELBO) -> Tensor:
    """Gradients of the loss with respect to all parameters of the guide, ``(repeats, parameters)``."""
    loss = elbo(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    rows = []
    for _ in range(repeats):
        guide.zero_grad()
        loss.loss_and_grads(model, guide)
        rows.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    guide.zero_grad()
    return torch.stack(rows)


def test_no_gradient_variance_at_the_posterior():
    guide = AutoFlow(linear, light, stl=True)
    guide()
    assert gradients(linear, guide, 64).var(0).max() < 1e-10
    guide.stl = False
    assert gradients(linear, guide, 64).var(0).max() > 1e-2


@pytest.mark.parametrize("kind", [zuko.flows.NICE, zuko.flows.MAF])
def test_no_gradient_variance_at_a_posterior_that_is_a_flow(kind):
    truth = gm.Flow(kind(3, transforms=2, hidden_features=(8,)), "sampling").double().freeze()

    def model() -> None:
        pyro.sample("x", truth())

    guide = AutoFlow(model, copy.deepcopy(truth).requires_grad_(True), init="given", stl=True)
    guide()
    with torch.no_grad():
        guide.centre.zero_()
        guide.raw_factor.zero_()
    assert torch.allclose(guide.log_weights(50), torch.zeros(50, dtype=DOUBLE), atol=1e-6)
    assert gradients(model, guide, 64).var(0).max() < 1e-10
    guide.stl = False
    assert gradients(model, guide, 64).var(0).max() > 1e-2


def test_both_gradients_have_one_expectation():
    guide = bent_guide()
    guide.stl = True
    pathwise = gradients(linear, guide, 150, particles=32)
    guide.stl = False
    ordinary = gradients(linear, guide, 150, particles=32)
    assert not torch.equal(pathwise[0], ordinary[0])
    assert_mean(pathwise - ordinary, 0.0)
    assert (pathwise.mean(0) / (pathwise.std(0) / math.sqrt(150) + 1e-12)).abs().max() > 6, "away from the posterior"


@pytest.mark.parametrize("elbo", [lambda **kw: RenyiELBO(alpha=0.5, **kw), TraceEnum_ELBO])
def test_other_objectives_keep_their_gradient(elbo):
    """The path-wise gradient of a Rényi bound would be biased."""
    guide, found = bent_guide(), {}
    for stl in (True, False):
        guide.stl = stl
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[stl] = gradients(linear, guide, 1, particles=4, elbo=elbo)
    assert torch.allclose(found[True], found[False], atol=1e-9)


def assert_view_is_current(guide: AutoFlow, model) -> None:
    trace = poutine.trace(guide).get_trace()
    site = trace.nodes[next(name for name in trace.nodes if name.endswith("_latent"))]
    x = site["value"].detach()
    assert torch.equal(site["fn"].scorer.log_prob(x), guide.get_posterior().log_prob(x))
    assert not site["fn"].scorer.log_prob(x).requires_grad


def test_the_constant_law_follows_the_guide():
    guide = AutoFlow(linear, light, stl=True)
    for _ in range(3):
        train(linear, guide, 2, 1e-1)
        assert_view_is_current(guide, linear)
    other = copy.deepcopy(guide)
    state = copy.deepcopy(guide.state_dict())
    train(linear, guide, 3, 1e-1)
    assert_view_is_current(guide, linear)
    x = torch.randn(3, dtype=DOUBLE)
    assert not torch.equal(other.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_view_is_current(other, linear)
    guide.load_state_dict(state)
    assert_view_is_current(guide, linear)
    assert torch.equal(other.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))


def test_the_constant_law_survives_a_change_of_precision():
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlow(model, light, stl=True)
    train(model, guide, 3, 1e-2)
    guide.double()
    assert_view_is_current(guide, model)
    assert guide.get_posterior().sample().dtype == DOUBLE


def test_path_wise_by_default_unless_the_pull_is_slow():
    for flow, expected in ((light, True), (lambda d: gm.Flow(zuko.flows.MAF(d), "sampling"), False)):
        guide = AutoFlow(schools, flow)
        guide()
        assert guide.stl == expected
        pyro.clear_param_store()


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "slow": (lambda: gm.Flow(zuko.flows.MAF(8)), SlowDirectionError, "sampling"),
    "slow, by a function": (lambda: lambda d: gm.Flow(zuko.flows.MAF(d)), SlowDirectionError, "sampling"),
    "no pathwise draws": (lambda: gm.Flow(zuko.mixtures.GMM(10)), DensityError, "exact density"),
    "conditional": (lambda: gm.Flow(zuko.flows.NICE(10, context=2)), ShapeError, "context"),
    "features": (lambda: gm.Flow(zuko.flows.NICE(9)), ShapeError, "10 unconstrained"),
    "circular": (lambda: gm.Flow(zuko.flows.NCSF(10), "sampling"), SupportError, "real"),
    "no identity": (lambda: gm.Flow(zuko.flows.GF(10), "sampling"), ValueError, "identity"),
    "no identity, neural": (lambda: lambda d: gm.Flow(zuko.flows.NAF(d), "sampling"), ValueError, "identity"),
    "frozen": (lambda: gm.Flow(zuko.flows.NICE(10)).freeze(), ValueError, "frozen"),
    "not wrapped": (lambda: zuko.flows.NICE(10), TypeError, "gm.Flow"),
    "not wrapped, by a function": (lambda: zuko.flows.NICE, TypeError, "gm.Flow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_flow_that_cannot_be_a_guide_is_refused(name):
    flow, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        AutoFlow(schools, flow())()


@pytest.mark.parametrize("density", [gm.Density.ESTIMATE, gm.Density.IMPLICIT, gm.Density.UNNORMALIZED])
def test_a_flow_without_an_exact_density_is_refused(density):
    class Vague(gm.Flow):
        pass

    Vague.density = density
    with pytest.raises(DensityError, match="exact density"):
        AutoFlow(schools, Vague(zuko.flows.NICE(10)))


def test_a_standardised_flow_is_refused_or_given():
    flow = gm.Flow(zuko.flows.NICE(2), "sampling")
    flow.standardize(torch.randn(50, 2) * 3 + 1)
    with pytest.raises(ValueError, match="identity"):
        AutoFlow(banana, flow)()
    assert AutoFlow(banana, flow, init="given")()


def test_models_that_no_guide_can_serve():
    with pytest.raises(ValueError, match="discrete sample site 'z'"):
        AutoFlow(lambda: pyro.sample("z", dist.Categorical(torch.ones(3))))()
    with pytest.raises(RuntimeError, match="no latent variables"):
        AutoFlow(lambda: pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)))()


def test_wrong_options():
    with pytest.raises(ValueError, match="init"):
        AutoFlow(banana, init="identity")


@pytest.mark.parametrize(
    "read",
    [
        lambda g: g.median(),
        lambda g: g.quantiles([0.5]),
        lambda g: g.sample_posterior(3),
        lambda g: g.get_posterior(),
        lambda g: g.get_transform(),
        lambda g: g.get_base_dist(),
        lambda g: g.log_weights(10),
    ],
)
def test_nothing_to_read_before_the_model_is_known(read):
    with pytest.raises(RuntimeError, match="not met its model"):
        read(AutoFlow(banana))


def test_a_failed_start_can_be_repeated():
    """The first call fails in the model; the second finds a guide that is not half built."""
    calls = []

    def model() -> None:
        calls.append(1)
        banana()
        if len(calls) == 3:
            raise RuntimeError("third call")

    guide = AutoFlow(model, light)
    with pytest.raises(RuntimeError, match="third call"):
        guide()
    assert set(guide()) == {"x", "y"}


def test_a_given_start_is_kept():
    flow = gm.Flow(zuko.flows.NICE(2, transforms=2), "sampling").double()
    z = torch.randn(5, 2, dtype=DOUBLE)
    truth = flow().push(z)
    guide = AutoFlow(banana, flow, init="given", init_loc_fn=pyro.infer.autoguide.init_to_value(
        values={"x": double(2.0), "y": double(-1.0)}))  # fmt: skip
    guide()
    assert torch.allclose(guide.get_transform()(z), double([2.0, -1.0]) + 0.1 * truth)


# -- in nobody's way --------------------------------------------------------------------------------------------------


def test_setup_takes_no_more_random_numbers_than_other_guides():
    after = []
    for cls in (AutoFlow, AutoMultivariateNormal):
        torch.manual_seed(5)
        cls(schools)._setup_prototype()
        after.append(torch.rand(4))
    assert torch.equal(*after)


def test_parameters_of_the_model_are_left_alone():
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = PyroModule[nn.Linear](1, 1)

        def forward(self) -> None:
            width = pyro.param("width", torch.tensor(2.0), constraint=dist.constraints.positive)
            x = pyro.sample("x", dist.Normal(torch.zeros(1), width).to_event(1))
            pyro.sample("y", dist.Normal(self.network(x), 1.0).to_event(1), obs=torch.ones(1))

    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    guide = AutoFlow(model, light_1)
    guide()
    store = pyro.get_param_store()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    assert float(store["width"]) == pytest.approx(2.0) and store["width"].unconstrained().grad is None
    train(model, guide, 3, 1e-2, particles=1)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "and learn under SVI"
    assert {key.split(".")[0] for key in store} == {"AutoFlow", "network", "width"}
    assert not any(p is q for p in guide.parameters() for q in model.parameters())


def light_1(features: int) -> gm.Flow:
    return gm.Flow(zuko.flows.NSF(features, transforms=1, hidden_features=(8,)), "sampling")


def test_two_guides_in_one_store():
    """Pyro's store keeps the values of the first owner of a name: the second guide must take another."""
    first, second = AutoFlow(banana, light), AutoFlow(schools, light)
    train(banana, first, 3, 1e-2)
    train(schools, second, 3, 1e-2)
    assert second.latent_dim == 10 and second.shift.shape == (10,)
    before = [[p.detach().clone() for p in guide.parameters()] for guide in (first, second)]
    train(banana, first, 3, 1e-2)
    train(schools, second, 3, 1e-2)
    for guide, old in zip((first, second), before, strict=True):
        assert all(not torch.equal(p, q) for p, q in zip(guide.parameters(), old, strict=True))


def test_a_copy_learns_by_itself():
    guide = AutoFlow(banana, light)
    train(banana, guide, 3, 1e-2)
    other = copy.deepcopy(guide)
    frozen = [p.detach().clone() for p in guide.parameters()]
    with pytest.warns(UserWarning, match="new name"):
        train(banana, other, 5, 1e-2)
    assert all(torch.equal(p, q) for p, q in zip(guide.parameters(), frozen, strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(other.parameters(), frozen, strict=True))
    assert other.log_weights(10).shape == guide.log_weights(10).shape == (10,)


def test_pickle_keeps_the_posterior():
    guide = AutoFlow(schools, light)
    train(schools, guide, 3, 1e-2)
    other = pickle.loads(pickle.dumps(guide))
    x = torch.randn(4, 10, dtype=DOUBLE)
    assert torch.equal(other.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))
    assert other.sample_posterior(3)["theta"].shape == (3, 8)
    assert guide.log_weights(5).shape == (5,), "pickling must not take the model away from the original"


def test_state_goes_into_a_fresh_guide():
    guide = AutoFlow(schools, light)
    train(schools, guide, 10, 1e-2)
    fresh = AutoFlow(schools, light)
    fresh()  # the warm call that builds it
    fresh.load_state_dict(guide.state_dict())
    x = torch.randn(5, 10, dtype=DOUBLE)
    assert torch.equal(fresh.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))


def test_without_a_parameter_store():
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlow(banana, light)
        guide()
        optimizer = torch.optim.Adam(guide.parameters(), 1e-2)
        before = [p.detach().clone() for p in guide.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            Trace_ELBO().differentiable_loss(banana, guide).backward()
            optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True))
        assert not pyro.get_param_store()


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def resident() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_and_time_are_flat(steps):
    guide = AutoFlow(banana, light)
    svi = SVI(banana, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def run(steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            svi.step()
        return (time.process_time() - start) / steps

    run(50)
    early, count, memory = run(50), tensors_alive(), resident()
    run(steps - 100)
    late = run(50)
    assert tensors_alive() <= count
    assert resident() - memory < 4 * 2**20
    assert late < 2 * early


def test_neutra_keeps_no_graphs():
    guide = bent_guide(banana)
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(banana)

    def run(times: int) -> int:
        for _ in range(times):
            poutine.trace(model).get_trace().log_prob_sum().backward()
        return tensors_alive()

    assert run(50) <= run(3)
