"""Paths of stochastic differential equations against Ornstein-Uhlenbeck, whose every answer is a Gaussian formula."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import pyro_genmods as gm
from pyro_genmods.evolve.brownian import Increments, solve
from pyro_genmods.evolve.path import NeuralSDE, PathDistribution, refine_times
from pyro_genmods.evolve.path_posterior import SDEPosterior, path_kl
from pyro_genmods.evolve.transition import linear_flow
from pyro_genmods.foundation.errors import DataError, DensityError, IntegrationError, ShapeError

from .statistics import assert_mean, assert_same_law, chain_standard_error

DOUBLE = torch.float64
TIMES = [0.0, 0.1, 0.45, 0.5, 1.3, 2.0, 4.0]
RATE, LEVEL, SIGMA, NOISE = 0.8, 0.5, 0.6, 0.3


def t64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def ou_drift(t, x, c):
    return RATE * (LEVEL - x)


def rate_drift(t, x, c):
    return c * (LEVEL - x)


def swirl(t, x, c):
    """Nonlinear, coupled, depending on time and context."""
    return torch.stack([x[:, 1] - x[:, 0] ** 3, -x[:, 0] * torch.cos(t[:, 0])], -1) + c


def state_diffusion(t, x, c):
    return 0.5 + 0.3 * torch.sigmoid(x) + 0.1 * t / (1 + t)


def ou(times=TIMES, drift=ou_drift, **settings) -> NeuralSDE:
    """Ornstein-Uhlenbeck in float64, begun at its stationary law."""
    settings = {"diffusion": SIGMA, "initial": (LEVEL, SIGMA / math.sqrt(2 * RATE)), **settings}
    return NeuralSDE(1, times, drift, **settings).double()


def linear_moments(model: NeuralSDE, times=TIMES) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes and variances of the steps of Ornstein-Uhlenbeck towards ``LEVEL``, exact or Euler's."""
    h = torch.as_tensor(times, dtype=DOUBLE).diff()
    if model.method == "euler":
        return 1 - RATE * h, SIGMA**2 * h
    return torch.exp(-RATE * h), SIGMA**2 * -torch.expm1(-2 * RATE * h) / (2 * RATE)


def joint_law(model: NeuralSDE, times=TIMES) -> MultivariateNormal:
    """The path's mean and covariance by the linear recursion."""
    slopes, variances = linear_moments(model, times)
    n = len(times)
    covariance = torch.zeros(n, n, dtype=DOUBLE)
    covariance[0, 0] = SIGMA**2 / (2 * RATE)
    for k in range(n - 1):
        covariance[k + 1, : k + 1] = covariance[: k + 1, k + 1] = slopes[k] * covariance[k, : k + 1]
        covariance[k + 1, k + 1] = slopes[k] ** 2 * covariance[k, k] + variances[k]
    return MultivariateNormal(torch.full((n,), LEVEL, dtype=DOUBLE), covariance)


def kalman(times, y, rate=RATE, noise=NOISE) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Log likelihood of noisy observations of the exact process, and the smoother's means and variances."""
    h = torch.as_tensor(times, dtype=DOUBLE).diff()
    slopes, variances = torch.exp(-rate * h), SIGMA**2 * -torch.expm1(-2 * rate * h) / (2 * rate)
    mean, variance, total, filtered = t64(LEVEL)[0], t64(SIGMA**2 / (2 * rate))[0], 0.0, []
    for k in range(len(y)):
        if k:
            mean, variance = LEVEL + slopes[k - 1] * (mean - LEVEL), slopes[k - 1] ** 2 * variance + variances[k - 1]
        predicted = (mean, variance)
        if not y[k].isnan():
            total += float(Normal(mean, (variance + noise**2).sqrt()).log_prob(y[k]))
            gain = variance / (variance + noise**2)
            mean, variance = mean + gain * (y[k] - mean), (1 - gain) * variance
        filtered.append((mean, variance, *predicted))
    means, spreads = [mean], [variance]
    for k in range(len(y) - 2, -1, -1):
        m, v, _, _ = filtered[k]
        _, _, ahead, ahead_variance = filtered[k + 1]
        gain = v * slopes[k] / ahead_variance
        means.insert(0, m + gain * (means[0] - ahead))
        spreads.insert(0, v + gain**2 * (spreads[0] - ahead_variance))
    return total, torch.stack(means), torch.stack(spreads)


def observations(times=TIMES) -> torch.Tensor:
    """Noisy observations of one exact path, with one of them missing."""
    law = joint_law(ou(times, method="local_linear"), times)
    y = law.sample() + NOISE * torch.randn(len(times), dtype=DOUBLE)
    y[2] = math.nan
    return y


def observed(prior, index, y):
    """A Pyro program: the latent path, observed at some of its times, with gaps."""
    path = pyro.sample("path", prior())
    seen = Normal(path[..., index, 0], NOISE)
    pyro.sample("y", dist.Normal(seen.loc, NOISE).mask(~y.isnan()).to_event(1), obs=y.nan_to_num())
    return path


def log_evidence(log_joint, n: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Log of the integral of a Gaussian joint density by Laplace's formula, which is exact; its mean and covariance."""
    start = torch.zeros(n, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(log_joint(start), start)
    precision = -torch.autograd.functional.hessian(log_joint, start.detach())
    top = torch.linalg.solve(precision, slope)
    total = log_joint(top) + 0.5 * n * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    return float(total), top, torch.linalg.inv(precision)


# -- density and transport --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["euler", "local_linear"])
def test_the_density_is_the_product_of_gaussian_transitions(method):
    model = ou(method=method)
    x = torch.randn(5, len(TIMES), 1, dtype=DOUBLE)
    slopes, variances = linear_moments(model)
    truth = Normal(t64(LEVEL), t64(SIGMA / math.sqrt(2 * RATE))).log_prob(x[:, 0, 0])
    for k in range(len(TIMES) - 1):
        truth = truth + Normal(LEVEL + slopes[k] * (x[:, k, 0] - LEVEL), variances[k].sqrt()).log_prob(x[:, k + 1, 0])
    assert torch.allclose(model().log_prob(x), truth, rtol=0, atol=1e-11)
    assert torch.allclose(joint_law(model).log_prob(x[..., 0]), truth, rtol=0, atol=1e-9), "the tests' own truth"


@pytest.mark.parametrize("stiffness", [0.0, 1.0, 40.0])
def test_local_linearisation_is_exact_for_linear_systems(stiffness):
    """A coupled linear drift, against matrix exponentials and the Lyapunov equation."""
    a = torch.tensor([[-1.0, 0.7, 0.0], [-0.7, -0.3, 0.2], [0.1, 0.0, -1.0 - stiffness]], dtype=DOUBLE)
    g, shift = t64(0.5, 1.0, 0.2), t64(0.3, -0.2, 0.1)
    model = NeuralSDE(3, TIMES, lambda t, x, c: x @ a.T + shift, g, (0.0, 1.0), method="local_linear").double()
    x = 0.3 * torch.randn(2, len(TIMES), 3, dtype=DOUBLE)
    eye = torch.eye(3, dtype=DOUBLE)
    kron = torch.kron(a, eye) + torch.kron(eye, a)
    truth = Normal(0.0, 1.0).log_prob(x[:, 0]).sum(-1)
    for k, h in enumerate(torch.tensor(TIMES, dtype=DOUBLE).diff()):
        flow = torch.matrix_exp(a * h)
        rest = -torch.linalg.solve(a, shift)
        grown = g.square().diag() - flow @ g.square().diag() @ flow.T
        spread = -torch.linalg.solve(kron, grown.flatten()).reshape(3, 3)
        mean = rest + (x[:, k] - rest) @ flow.T
        truth = truth + MultivariateNormal(mean, spread).log_prob(x[:, k + 1])
    assert torch.allclose(model().log_prob(x), truth, rtol=1e-11, atol=1e-9)


def test_the_flow_of_a_matrix_that_cannot_be_inverted():
    j = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=DOUBLE)
    integral, covariance = linear_flow(j, torch.diag(t64(0.0, 1.0)), torch.full((1, 1), 2.0, dtype=DOUBLE))
    assert torch.allclose(integral, torch.tensor([[2.0, 2.0], [0.0, 2.0]], dtype=DOUBLE), atol=1e-14)
    assert torch.allclose(covariance, torch.tensor([[8 / 3, 2.0], [2.0, 2.0]], dtype=DOUBLE), atol=1e-14)


@pytest.mark.parametrize("method", ["euler", "local_linear"])
def test_push_and_pull_are_inverse_and_change_variables(method):
    model = NeuralSDE(2, TIMES, swirl, state_diffusion, context_features=2, method=method).double()
    law = model(torch.randn(3, 2, dtype=DOUBLE))
    assert law.base.event_shape == law.event_shape == (len(TIMES), 2)
    z = law.base.sample()
    x = law.push(z)
    assert torch.allclose(law.pull(x), z, rtol=0, atol=1e-10)
    assert torch.allclose(law.push(law.pull(x)), x, rtol=0, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda z: law.push(z).sum(0), z)  # rows do not meet: summed
    volume = torch.linalg.slogdet(jacobian.movedim(2, 0).reshape(3, z[0].numel(), z[0].numel()))[1]
    assert torch.allclose(law.log_prob(x), law.base.log_prob(z) - volume, rtol=0, atol=1e-9)
    pushed, log_prob = law.push_and_log_prob(z)
    assert torch.equal(pushed, x) and torch.allclose(log_prob, law.log_prob(x), rtol=0, atol=1e-10)
    one = model(law.context[1]).log_prob(x[1])
    assert torch.allclose(one, law.log_prob(x)[1], rtol=0, atol=1e-12), "a row alone is the row in the batch"


@pytest.mark.parametrize("method", ["euler", "local_linear"])
def test_gradients_agree_with_finite_differences(method):
    weight = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    model = NeuralSDE(
        2, TIMES[:4], lambda t, x, c: -weight * x**3 + x.flip(-1), state_diffusion, method=method
    ).double()
    x = torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)
    z = torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)

    def density(x, w):
        weight.data.copy_(w.detach())
        return model().log_prob(x) + 0 * w

    torch.autograd.gradcheck(lambda x: model().log_prob(x), (x,), atol=1e-6)
    torch.autograd.gradcheck(lambda z: model().push(z), (z,), atol=1e-6)
    (slope,) = torch.autograd.grad(model().log_prob(x), weight)
    up, down = density(x, t64(0.7 + 1e-6)[0]), density(x, t64(0.7 - 1e-6)[0])
    assert slope.item() == pytest.approx((up - down).item() / 2e-6, rel=1e-5)


def test_one_call_scores_and_one_call_a_step_draws():
    calls = []

    def drift(t, x, c):
        calls.append(len(x))
        return -x

    model = NeuralSDE(2, TIMES, drift, 0.5)
    assert (model.cost.sample, model.cost.score, model.slow_direction) == (6, 1, None)
    for action, wanted in (
        (lambda: model().log_prob(torch.zeros(5, 7, 2)), [30]),
        (lambda: model().sample((5,)), [5] * 6),
        (lambda: model().rsample_and_log_prob((5,)), [5] * 6),
        (lambda: model().simulate((5,), method="euler", steps=1), [5] * 6),
        (lambda: model().simulate((5,), method="euler", steps=3), [5] * 18),
    ):
        calls.clear()
        action()
        assert calls == wanted


# -- draws ------------------------------------------------------------------------------------------------------------


def assert_moments(draws, law: MultivariateNormal) -> None:
    """Means, variances and neighbouring covariances of draws ``(n, times)``."""
    gap = draws - law.loc
    assert_mean(draws, law.loc, name="mean")
    assert_mean(gap.square(), law.variance, name="variance")
    assert_mean(gap[:, 1:] * gap[:, :-1], law.covariance_matrix.diagonal(1), name="lagged covariance")


@pytest.mark.parametrize("method", ["euler", "local_linear"])
def test_draws_have_the_moments_of_the_linear_recursion(method):
    model = ou(method=method)
    assert_moments(model().sample((20_000,))[..., 0], joint_law(model))


def test_torchsde_on_its_clock_draws_from_the_chain():
    model = ou()
    assert_moments(model().simulate((20_000,), method="euler", steps=1).detach()[..., 0], joint_law(model))
    torch.manual_seed(7)
    path = model().simulate((5,), method="euler", steps=1)
    torch.manual_seed(7)
    noise = [torch.randn(5, 1, dtype=DOUBLE) for _ in TIMES]
    assert torch.allclose(path, model().push(torch.stack(noise, 1)), rtol=0, atol=1e-13), "every time is hit exactly"


@pytest.mark.parametrize(("method", "steps"), [("srk", 16), ("milstein", 64)])
def test_finer_solvers_draw_from_the_equation(method, steps):
    draws = ou(TIMES[2:]).requires_grad_(False)().simulate((4_000,), method=method, steps=steps).detach()[..., 0]
    assert_moments(draws, joint_law(ou(TIMES[2:], method="local_linear"), TIMES[2:]))


def test_an_equation_with_multiplicative_noise_is_read_in_the_sense_of_ito():
    """Geometric Brownian motion: E x = exp(m t); Stratonovich's reading would have exp((m + s^2 / 2) t)."""
    model = NeuralSDE(1, [0.0, 0.7, 1.0], lambda t, x, c: 0.3 * x, lambda t, x, c: 0.8 * x.abs(), (1.0, 1e-9)).double()
    for method, steps in (("milstein", 16), ("srk", 4)):
        draws = model().simulate((20_000,), method=method, steps=steps).detach()[:, -1, 0]
        assert_mean(draws, math.exp(0.3), name=method)
        assert_mean(draws.log(), 0.3 - 0.32, name=f"{method}, log")


@pytest.mark.parametrize("seed", [torch.manual_seed, pyro.set_rng_seed])
def test_draws_are_reproducible(seed):
    law = ou()()
    for draw in (lambda: law.sample((2,)), lambda: law.simulate((2,)), lambda: law.simulate((2,), method="euler")):
        seed(3)
        first = draw()
        again = draw()
        seed(3)
        assert torch.equal(first, draw()) and not torch.equal(first, again)


def test_a_long_series_does_not_exhaust_the_stack():
    times = torch.linspace(0.0, 10.0, 2_001)
    path = NeuralSDE(1, times, ou_drift, SIGMA)().simulate(method="euler", steps=1)
    assert path.shape == (2_001, 1) and bool(path.isfinite().all())


def test_the_increments_have_the_law_of_brownian_motion():
    noise = Increments(torch.zeros(50_000, 1, dtype=DOUBLE))
    w, u = noise(torch.tensor(0.0, dtype=DOUBLE), torch.tensor(2.0, dtype=DOUBLE), return_U=True)
    assert_mean(w.square(), 2.0)
    assert_mean(u.square(), 8 / 3)  # h^3 / 3
    assert_mean(w * u, 2.0)  # h^2 / 2


# -- the Kalman filter ------------------------------------------------------------------------------------------------


def test_the_evidence_is_the_kalman_filters():
    y = observations()
    truth, means, variances = kalman(TIMES, y)
    for method, parts, tolerance in (("local_linear", 1, 1e-9), ("local_linear", 3, 1e-9), ("euler", 40, 0.01)):
        grid, index = refine_times(TIMES, parts)
        prior = ou(grid, method=method)

        def log_joint(x, prior=prior, index=index):
            path = x[:, None]
            trace = poutine.trace(poutine.condition(observed, {"path": path})).get_trace(prior, index, y)
            return trace.log_prob_sum()

        evidence, mean, covariance = log_evidence(log_joint, len(grid))
        assert evidence == pytest.approx(truth, abs=tolerance * len(y))
        assert torch.allclose(mean[index], means, atol=1e-8 if method == "local_linear" else 0.02)
        assert torch.allclose(covariance.diagonal()[index], variances, atol=1e-8 if method == "local_linear" else 0.01)


def series(prior, contexts, index, y):
    with pyro.plate("series", len(contexts)):
        path = pyro.sample("path", prior(contexts))
        pyro.sample("y", dist.Normal(path[..., index, 0], NOISE).mask(~y.isnan()).to_event(1), obs=y.nan_to_num())


def test_a_plate_of_series_with_their_own_contexts():
    rates, y = t64(0.3, 0.8, 2.0)[:, None], torch.stack([observations() for _ in range(3)])
    prior = ou(drift=rate_drift, context_features=1, method="local_linear")
    index = torch.arange(len(TIMES))
    path = torch.randn(3, len(TIMES), 1, dtype=DOUBLE)
    trace = poutine.trace(poutine.condition(series, {"path": path})).get_trace(prior, rates, index, y)
    trace.compute_log_prob()
    assert trace.nodes["path"]["log_prob"].shape == (3,)
    for i, rate in enumerate(rates):
        assert torch.allclose(trace.nodes["path"]["log_prob"][i], prior(rate).log_prob(path[i]), atol=1e-12)
    copies = ou()().expand([4])
    assert copies.sample().shape == (4, len(TIMES), 1) and copies.log_prob(path[0]).shape == (4,)


@pytest.mark.parametrize("method", ["euler", "local_linear"])
@pytest.mark.parametrize("noise_space", [False, True])
def test_the_traced_engine_records_it(method, noise_space):
    """Ornstein-Uhlenbeck with a latent rate as context: the recorded energy is that of the densities."""
    y = observations()
    prior = ou(drift=rate_drift, context_features=1, method=method)

    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(t64(0.0)[0], t64(0.5)[0]))
        path = pyro.sample("path", prior(rate[..., None]))
        pyro.sample("y", dist.Normal(path[..., 0], NOISE).mask(~y.isnan()).to_event(1), obs=y.nan_to_num())

    program = poutine.reparam(model, {"path": gm.infer.PushforwardReparam()}) if noise_space else model
    energy = gm.infer.potential(program, (y,), level="graph")
    q = 0.5 * torch.randn(5, energy.dim, dtype=DOUBLE)
    value, gradient = energy.value_and_grad(q)
    assert energy.report["road"] == "vmap" and energy.report["level"] == "graph", energy.report["why"]
    for i in range(5):
        sites = {name: x[i] for name, x in energy.constrain(q).items()}
        trace = poutine.trace(poutine.condition(program, sites)).get_trace(y)
        jacobian = sites["rate"].log()  # of the rate's own coordinate
        assert torch.allclose(-value[i], trace.log_prob_sum() + jacobian, atol=1e-9)
    nudge = torch.zeros_like(q)
    nudge[:, 1] = 1e-6
    slope = (energy.value(q + nudge) - energy.value(q - nudge)) / 2e-6
    assert torch.allclose(gradient[:, 1], slope, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("noise_space", [False, True])
def test_the_traced_engine_records_coupled_linearised_systems(noise_space):
    """Two features, so that Jacobians, integrals of matrices and Cholesky factors are recorded."""
    prior = NeuralSDE(2, TIMES[:4], swirl, state_diffusion, context_features=2, method="local_linear").double()

    def model():
        c = pyro.sample("c", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        path = pyro.sample("path", prior(c))
        pyro.sample("y", dist.Normal(path.sum(), 0.5), obs=t64(0.3)[0])

    program = poutine.reparam(model, {"path": gm.infer.PushforwardReparam()}) if noise_space else model
    energies = [gm.infer.potential(program, level=level) for level in ("graph", "eager")]
    q = 0.5 * torch.randn(3, energies[0].dim, dtype=DOUBLE)
    (value, slope), (again, other) = (energy.value_and_grad(q) for energy in energies)
    assert energies[0].report["road"] == "vmap" and energies[0].report["level"] == "graph", energies[0].report["why"]
    assert torch.allclose(value, again, atol=1e-10) and torch.allclose(slope, other, atol=1e-9)
    sites = {name: x[1] for name, x in energies[0].constrain(q).items()}
    truth = poutine.trace(poutine.condition(program, sites)).get_trace().log_prob_sum()
    assert torch.allclose(-value[1], truth, atol=1e-9)


def test_no_warning_in_noise_space(recwarn):
    poutine.trace(poutine.reparam(observed, {"path": gm.infer.PushforwardReparam()})).get_trace(
        ou(), torch.arange(len(TIMES)), observations()
    )
    assert not [w for w in recwarn if "slow" in str(w.message)]


# -- the posterior and its divergence ---------------------------------------------------------------------------------


def test_the_divergence_of_a_shift_is_known():
    """Drifts that differ by b: T d b^2 / (2 g^2), by the chains, by torchsde, and between posteriors."""
    shift, span = 0.9, TIMES[-1]
    p, q = (NeuralSDE(2, TIMES, lambda t, x, c, b=b: b - x, SIGMA, (0.0, 1.0)).double()() for b in (0.0, shift))
    truth = span * 2 * shift**2 / (2 * SIGMA**2)
    for value in (kl_divergence(q, p), path_kl(q, p, method="logqp"), path_kl(q, p, method="logqp", steps=4)):
        assert float(value) == pytest.approx(truth, rel=1e-12)
    assert float(kl_divergence(p, p)) == 0.0


@pytest.mark.parametrize("method", ["euler", "local_linear"])
@pytest.mark.parametrize("noise", ["prior", "learned"])
def test_the_divergence_is_that_of_the_densities(method, noise):
    prior = NeuralSDE(2, TIMES, swirl, state_diffusion, context_features=2, method=method).double()
    posterior = SDEPosterior(prior, noise=noise)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    c = torch.randn(2, dtype=DOUBLE)
    q, p = posterior(c), prior(c)
    x = q.sample((4_000,))
    difference = (q.log_prob(x) - p.log_prob(x)).detach()
    draws = torch.stack([kl_divergence(q.expand([500]), p.expand([500])) for _ in range(8)]).flatten().detach()
    error = (difference.var() / 4_000 + draws.var() / 4_000).sqrt().detach()
    assert_mean(draws, difference.mean().item(), standard_error=error, name="KL")
    assert torch.allclose(q.push(q.pull(x)), x, atol=1e-9)
    if noise == "prior" and method == "euler":
        finer = path_kl(q.expand([2_000]), p.expand([2_000]), method="logqp").detach()
        assert_mean(finer, float(draws.mean()), (finer.var() / 2_000 + draws.var() / 4_000).sqrt(), name="logqp")


def test_girsanovs_sum_is_logqp_on_the_same_path():
    prior = ou()
    posterior = SDEPosterior(prior)
    with torch.no_grad():
        posterior.gain.normal_(), posterior.offset.normal_()
    torch.manual_seed(5)
    begin = posterior.begin(3, None)
    coefficients = posterior.coefficients(None)._replace(prior_drift=prior.coefficients(None).drift)
    path, ratio = solve(coefficients, posterior.times, begin)
    u = posterior.steer(slice(0, 6), posterior.times[:-1], path[:, :-1], None)
    assert torch.allclose(ratio, 0.5 * (u.square().sum(-1) * posterior.lengths).sum(-1), atol=1e-12)


def test_a_posterior_starts_at_the_prior_and_takes_codes_of_data():
    prior = ou(drift=rate_drift, context_features=1)
    posterior = SDEPosterior(prior, context_features=3)
    c = torch.rand(4, 4, dtype=DOUBLE)
    x = posterior(c).sample()
    assert torch.allclose(posterior(c).log_prob(x), prior(c[:, :1]).log_prob(x), atol=1e-12)
    with torch.no_grad():
        posterior.control[-1].weight.normal_()
    other = torch.cat([c[:, :1], c[:, 1:] + 1], -1)
    assert not torch.allclose(posterior(c).log_prob(x), posterior(other).log_prob(x))


def best_bound(prior: NeuralSDE, index, y, noise: str) -> float:
    """The best bound of a controlled chain in closed form: a linear-quadratic problem, solved backwards.

    The cost to go is a x^2 / 2 + b x + c; with steps of free scale it is minus the log evidence of the rest.
    """
    slopes, variances = linear_moments(prior, prior.grid)
    seen = dict(zip(index.tolist(), y.tolist(), strict=True))
    a = b = c = 0.0
    for k in range(len(prior.grid) - 1, -1, -1):
        value = seen.get(k, math.nan)
        if not math.isnan(value):
            a, b = a + 1 / NOISE**2, b - value / NOISE**2
            c += 0.5 * (value / NOISE) ** 2 + 0.5 * math.log(2 * math.pi * NOISE**2)
        v, slope = (float(variances[k - 1]), float(slopes[k - 1])) if k else (SIGMA**2 / (2 * RATE), 0.0)
        free = noise == "learned" or k == 0
        c += (0.5 * math.log(1 + a * v) if free else 0.5 * a * v) - 0.5 * b**2 * v / (1 + a * v)
        a, b = a / (1 + a * v), b / (1 + a * v)  # of the mean before the step, which is slope x + rest
        rest = (1 - slope) * LEVEL
        a, b, c = a * slope**2, slope * (a * rest + b), c + 0.5 * a * rest**2 + b * rest
    return -c


def fit_posterior(elbo, noise: str, parts: int, method: str) -> tuple[float, float, float]:
    """Bounds an observation: the one that SVI reaches, the best in its family, and the Kalman filter's value."""
    times = torch.linspace(0.0, 3.0, 7) + 0.1 * torch.sin(torch.arange(7.0))
    y = observations(times)
    grid, index = refine_times(times, parts)
    prior, steps = ou(grid, method=method).requires_grad_(False), 1_000
    posterior = SDEPosterior(prior, noise=noise)

    def guide(prior, index, y):
        pyro.module("posterior", posterior)
        pyro.sample("path", posterior())

    optimizer = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(observed, guide, optimizer, elbo(num_particles=8, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(steps):
        svi.step(prior, index, y)
    check = Trace_ELBO(num_particles=4_000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        bound = -check.loss(observed, guide, prior, index, y)
    best, truth = best_bound(prior, index, y, noise), kalman(times, y)[0]
    return bound / len(y), best / len(y), truth / len(y)


def test_the_best_bound_of_free_scales_is_the_evidence():
    y, prior = observations(), ou(method="local_linear")
    index = torch.arange(len(TIMES))
    assert best_bound(prior, index, y, "learned") == pytest.approx(kalman(TIMES, y)[0], abs=1e-10)
    assert best_bound(prior, index, y, "prior") < kalman(TIMES, y)[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_latent_sde_bound_reaches_the_kalman_value(elbo):
    bound, best, truth = fit_posterior(elbo, "prior", 8, "euler")
    print(f"bound {bound:.4f}, best {best:.4f}, Kalman {truth:.4f}")
    assert abs(bound - best) < 0.02, (bound, best)
    assert abs(bound - truth) < 0.05, (bound, truth)


@pytest.mark.slow
def test_a_posterior_with_its_own_scales_is_exact_on_the_coarsest_grid():
    bound, best, truth = fit_posterior(TraceMeanField_ELBO, "learned", 1, "local_linear")
    print(f"bound {bound:.4f}, best {best:.4f}, Kalman {truth:.4f}")
    assert abs(bound - best) < 0.01 and abs(best - truth) < 1e-9


@pytest.mark.slow
def test_svi_recovers_a_latent_rate():
    """Twelve directly observed series: the rate that SVI finds is the maximum of the likelihood on a grid."""
    prior = ou(drift=rate_drift, context_features=1, method="local_linear", initial=(LEVEL, 0.4))
    data = prior(torch.full((12, 1), 1.7, dtype=DOUBLE)).sample()

    def model(data):
        rate = pyro.param("rate", lambda: t64(0.4)[0], constraint=dist.constraints.positive)
        with pyro.plate("series", len(data)):
            pyro.sample("x", prior(rate.expand(len(data), 1)), obs=data)

    svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(data)
    rates = torch.linspace(0.2, 5.0, 4_801, dtype=DOUBLE)
    likelihood = torch.stack([prior(rates[:, None]).log_prob(x[:, :]) for x in data]).sum(0)
    assert pyro.param("rate").item() == pytest.approx(float(rates[likelihood.argmax()]), abs=0.01)


def test_svi_moves_a_learnable_prior_through_its_posterior_once_a_step():
    prior = NeuralSDE(1, TIMES, None, 0.5).double()
    posterior = SDEPosterior(prior)

    def model(y):
        path = pyro.sample("path", prior())
        pyro.sample("y", dist.Normal(path[..., 0], NOISE).to_event(1), obs=y)

    def guide(y):
        pyro.module("posterior", posterior)
        pyro.sample("path", posterior())

    before = prior.linear.weight.detach().clone()
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(torch.ones(7, dtype=DOUBLE))
    assert (prior.linear.weight - before).abs().item() == pytest.approx(1e-3, rel=1e-3), (
        "Adam's first step has length lr"
    )


# -- chains -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("noise_space", [True, False])
def test_chains_agree_with_the_kalman_smoother(noise_space):
    y = observations()
    _, means, variances = kalman(TIMES, y)
    program = observed
    if noise_space:
        program = poutine.reparam(observed, {"path": gm.infer.PushforwardReparam()})
    prior = ou(method="local_linear")
    mcmc = gm.infer.MCMC(gm.infer.HMC(program), 400, 300, num_chains=16, progress_bar=False, seed=0)
    mcmc.run(prior, torch.arange(len(TIMES)), y)
    draws = mcmc.get_samples(group_by_chain=True)
    path = draws["path_base" if noise_space else "path"]
    path = (prior().push(path) if noise_space else path)[..., 0]
    assert_mean(path.flatten(0, 1), means, chain_standard_error(path), name="smoothed mean")
    squares = (path - means).square()
    assert_mean(squares.flatten(0, 1), variances, chain_standard_error(squares), name="smoothed variance")


# -- learning ---------------------------------------------------------------------------------------------------------


def test_units_are_shared_by_all_times_and_leave_what_was_given_alone():
    x = 100 + 5 * torch.randn(50, len(TIMES), 2) * torch.tensor([1.0, 10.0])
    model = NeuralSDE(2, TIMES)
    model.standardize(x)
    assert torch.allclose(model.units.scale, x.flatten(0, 1).std(0, correction=0))
    assert torch.allclose(model().sample((4_000,)).mean((0, 1)), model.units.shift, atol=6.0)
    given = NeuralSDE(2, TIMES, lambda t, x, c: -x, 0.5, (0.0, 1.0))
    before = given().log_prob(x[:3] / 100)
    given.standardize(x)
    assert torch.equal(given().log_prob(x[:3] / 100), before)
    with pytest.raises(DataError, match=r"feature\(s\) \[1\]"):
        model.standardize(torch.stack([x[..., 0], torch.ones(50, len(TIMES))], -1))


def test_units_change_densities_by_their_volume_alone():
    x, scale = torch.randn(40, len(TIMES), 1, dtype=DOUBLE), 250.0
    small, large = (NeuralSDE(1, TIMES).double() for _ in range(2))
    large.load_state_dict(small.state_dict())
    small.standardize(x)
    large.standardize(scale * x + 7)
    difference = small().log_prob(x) - large().log_prob(scale * x + 7)
    assert torch.allclose(difference, torch.full((40,), len(TIMES) * math.log(scale), dtype=DOUBLE), atol=1e-9)


def test_fit_learns_the_law_of_the_data():
    times = torch.linspace(0.0, 3.0, 7)
    truth = ou(times, method="local_linear")
    data = 40 + 10 * truth().sample((1_500,))
    held_out = 40 + 10 * truth().sample((2_000,))
    model = NeuralSDE(1, times, hidden_features=(16,), method="local_linear").double()
    gm.fit(model, data, max_epochs=30, batch_size=250, learning_rate=1e-2, seed=0, progress_bar=False)
    best = truth().log_prob((held_out - 40) / 10) - 7 * math.log(10)
    gap = (best - model().log_prob(held_out)).detach()
    assert -6 * float(gap.std()) / math.sqrt(2_000) <= float(gap.mean()) < 0.05


# -- files, dtypes, bad input -----------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """A module of the test's own."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7))

    def forward(self, t, x, c=None):
        return -self.rate * x


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_saved_model_is_the_same(dtype, tmp_path):
    x = torch.randn(3, len(TIMES), 2, dtype=dtype)
    prior = NeuralSDE(2, TIMES, Gaussian(), torch.tensor([0.5, 1.0]), (0.0, 2.0), method="local_linear").to(dtype)
    default = NeuralSDE(2, torch.tensor(TIMES), context_features=1, initial=gm.foundation.networks.MLP(1, 4)).to(dtype)
    posterior = SDEPosterior(prior, noise="learned")
    with torch.no_grad():
        prior.given_drift.rate.fill_(0.9)
        posterior.offset.normal_()
        default.linear.weight.normal_()
    c = torch.ones(3, 1, dtype=dtype)
    for i, (model, context) in enumerate(((prior, None), (default, c), (posterior, None))):
        gm.save(model, tmp_path / f"{i}.gm")
        again = gm.load(tmp_path / f"{i}.gm", allow=[Gaussian])
        assert torch.equal(again(context).log_prob(x), model(context).log_prob(x))
        assert again.grid == model.grid and again.times.dtype == dtype


def test_single_and_double_precision_agree():
    model = NeuralSDE(2, TIMES, hidden_features=(8,), method="local_linear")
    x = torch.randn(5, len(TIMES), 2)
    single = model().log_prob(x)
    double = model.double()().log_prob(x.double())
    assert single.dtype == torch.float32 and double.dtype == DOUBLE
    assert torch.allclose(single.double(), double, atol=1e-4)
    assert model.times.tolist() == TIMES, "times are rounded once, from what was given"


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)

    def forward(self, t, x, c=None):
        return self.norm(x)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: NeuralSDE(1, [0.0]), ValueError, "at least two times"),
        (lambda: NeuralSDE(1, [0.0, 2.0, 1.0]), ValueError, "2.0 is followed by 1.0 at place 2"),
        (lambda: NeuralSDE(1, [0.0, 1.0, 1.0]), ValueError, "1.0 is followed by 1.0"),
        (lambda: NeuralSDE(1, [0.0, math.nan, 1.0]), ValueError, "0.0 is followed by nan"),
        (lambda: NeuralSDE(1, [0.0, math.inf]), ValueError, "0.0 is followed by inf"),
        (lambda: NeuralSDE(1, TIMES, ou_drift, 0.0), ValueError, "diffusion: got .*positive"),
        (lambda: NeuralSDE(1, TIMES, ou_drift, lambda t, x, c: x * 0 - 1), ValueError, "diffusion: returned -1"),
        (lambda: NeuralSDE(1, TIMES, ou_drift, 1.0, (0.0, -1.0)), ValueError, "initial scale"),
        (lambda: NeuralSDE(1, TIMES, ou_drift, torch.ones(3)), ShapeError, r"needs a number or \(1,\)"),
        (lambda: NeuralSDE(2, TIMES, lambda t, x, c: x[:, :1]), ShapeError, r"drift: .* returned \(3, 1\)"),
        (lambda: NeuralSDE(2, TIMES, lambda x: x), ShapeError, "drift: the call"),
        (lambda: NeuralSDE(1, TIMES, lambda t, x, c: x - x.mean(0)), ValueError, "drift: .* other rows"),
        (lambda: NeuralSDE(1, TIMES, Mixes()), ValueError, "drift: .* other rows"),
        (lambda: NeuralSDE(1, TIMES, initial=nn.Linear(1, 2)), ShapeError, "initial: got a network"),
        (lambda: NeuralSDE(2, TIMES, initial=nn.Linear(1, 2), context_features=1), ShapeError, "initial"),
        (lambda: SDEPosterior(nn.Linear(1, 1)), TypeError, "prior: got Linear"),
        (lambda: SDEPosterior(ou(), network=Mixes()), ValueError, "network: .* other rows"),
        (lambda: ou()().simulate(steps=0), ValueError, "at least one step"),
        (lambda: path_kl(ou()(), ou(TIMES[1:])()), ShapeError, "same times"),
        (lambda: path_kl(ou()(), ou()(), draws=0), ValueError, "draws"),
        (lambda: path_kl(ou()(), ou(diffusion=0.7)(), method="logqp"), DensityError, "diffusions differ"),
        (
            lambda: path_kl(SDEPosterior(ou(), noise="learned")(), ou()(), method="logqp"),
            DensityError,
            "diffusions differ",
        ),
        (lambda: refine_times(TIMES, 0), ValueError, "parts"),
    ],
)
def test_bad_input_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_path_that_explodes_names_step_and_rows():
    model = NeuralSDE(1, torch.arange(12.0), lambda t, x, c: c * x**3, 1.0, (1.0, 0.1), context_features=1)
    c = torch.tensor([[0.0], [-50.0], [0.0]])
    for draw in (lambda: model(c).sample(), lambda: model(c).simulate(method="euler")):
        with pytest.raises(IntegrationError, match=r"at step \d+ .*1 of 3 row\(s\), the first of them \[1\]"):
            draw()
    with pyro.validation_enabled(False):
        assert not bool(model(c).sample()[1].isfinite().all())


def test_a_diffusion_that_turns_negative_is_refused_where_it_matters():
    law = NeuralSDE(1, TIMES, lambda t, x, c: -x, lambda t, x, c: 5.0 - x)()
    x = torch.zeros(3, len(TIMES), 1)
    assert bool(law.log_prob(x).isfinite().all())
    x[1, 2] = 7.0
    with pytest.raises(IntegrationError, match=r"log_prob: NaN in 1 of 3 row\(s\), the first of them \[1\]"):
        law.log_prob(x)


def test_paths_of_different_diffusions_have_a_divergence_as_chains():
    q, p = ou(diffusion=0.7)(), ou()()
    x = q.sample((20_000,))
    draws = kl_divergence(q.expand([4_000]), p.expand([4_000]))
    assert_mean(q.log_prob(x) - p.log_prob(x), float(draws.mean()), name="KL")


def test_the_law_says_what_it_is():
    law = ou()()
    assert isinstance(law, PathDistribution) and isinstance(law.expand([2]), PathDistribution)
    assert "NeuralSDEDistribution" in repr(law)
    assert_same_law(law.sample((2_000,)), law.rsample((2_000,)).detach())
