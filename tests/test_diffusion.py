"""Diffusion priors against closed forms: exact networks of Gaussian mixtures plugged in, and learned ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods import evolve
from pyro_genmods.evolve.grid import even_knots
from pyro_genmods.foundation.errors import DataError, DensityError, IntegrationError, ShapeError
from pyro_genmods.foundation.flow_matching import stratified_normal
from pyro_genmods.foundation.ode import FixedStep

from .statistics import assert_counts, assert_law, assert_mean, chain_standard_error

DOUBLE = torch.float64
SCHEDULES = (
    evolve.VP(),
    evolve.SubVP(),
    evolve.VE(),
    evolve.EDM(),
    evolve.Rectified(),
    evolve.Cosine(),
    evolve.Angle(),
)


class Mixture(nn.Module):
    """The exact denoiser of a Gaussian mixture in white coordinates."""

    def __init__(self, weight: Tensor, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("mean", mean)
        values, vectors = torch.linalg.eigh(covariance)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)

    def parts(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = t.reshape(-1, 1, 1)
        variance = t.cos().square() * self.values + t.sin().square()
        residual = torch.einsum("rkd,kde->rke", u[:, None] - t.cos() * self.mean, self.vectors)
        log_weight = self.weight.log() - 0.5 * (residual.square() / variance + variance.log()).sum(-1)
        return residual, variance, log_weight

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        residual, variance, log_weight = self.parts(t, u)
        gain = t.reshape(-1, 1, 1).cos() * self.values / variance
        datum = self.mean + torch.einsum("rke,kde->rkd", gain * residual, self.vectors)
        return (log_weight.softmax(-1)[..., None] * datum).sum(1)

    def log_density(self, t: Tensor, u: Tensor) -> Tensor:
        return self.parts(t, u)[2].logsumexp(-1) - 0.5 * u.shape[1] * math.log(2 * math.pi)


def exact(weight: Tensor, mean: Tensor, covariance: Tensor, **options) -> gm.Diffusion:
    """A diffusion whose network is exact for a mixture; ``covariance`` of each component."""
    centre = weight @ mean
    total = torch.einsum("k,kde->de", weight, covariance)
    total = total + torch.einsum("k,kd,ke->de", weight, mean - centre, mean - centre)
    inverse = torch.linalg.inv(torch.linalg.cholesky(total))
    network = Mixture(weight, (mean - centre) @ inverse.mT, inverse @ covariance @ inverse.mT)
    options = {"parameterization": "denoised", "sigma_min": 3e-3, **options}
    model = gm.Diffusion(mean.shape[1], network=network.to(DOUBLE), **options).to(DOUBLE)
    model.set_moments(centre, total)
    return model


def smoothed(model: gm.Diffusion, x: Tensor) -> Tensor:
    """Log density of the mixture with noise of the smallest level."""
    t = torch.tensor(model.bottom, dtype=DOUBLE)
    return model.network.log_density(t, model.noisy(x)) - model._volume()


def ring(**options) -> gm.Diffusion:
    angle = torch.arange(8, dtype=DOUBLE) * math.pi / 4
    mean = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    return exact(
        torch.full((8,), 0.125, dtype=DOUBLE), mean, (0.04 * torch.eye(2, dtype=DOUBLE)).expand(8, 2, 2), **options
    )


def ring_draws(n: int) -> Tensor:
    angle = torch.randint(8, (n,)) * math.pi / 4
    return (2 * torch.stack([angle.cos(), angle.sin()], -1) + 0.2 * torch.randn(n, 2)).to(DOUBLE)


def lattice(**options) -> gm.Diffusion:
    """Twenty-five modes in eight dimensions."""
    places = 8 * torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=DOUBLE)] * 2)
    eye = torch.eye(8, dtype=DOUBLE).expand(25, 8, 8)
    return exact(torch.full((25,), 0.04, dtype=DOUBLE), places.repeat(1, 4), eye, **options)


def lattice_draws(n: int) -> Tensor:
    places = 8 * torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=DOUBLE)] * 2)
    return places.repeat(1, 4)[torch.randint(25, (n,))] + torch.randn(n, 8, dtype=DOUBLE)


def gaussian(condition: float = 100.0, features: int = 8) -> tuple[gm.Diffusion, dist.MultivariateNormal]:
    basis = torch.linalg.qr(torch.randn(features, features, dtype=DOUBLE))[0]
    covariance = (basis * torch.logspace(0, math.log10(condition), features, dtype=DOUBLE)) @ basis.mT
    law = dist.MultivariateNormal(torch.randn(features, dtype=DOUBLE), (covariance + covariance.mT) / 2)
    return exact(torch.ones(1, dtype=DOUBLE), law.mean[None], law.covariance_matrix[None]), law


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_closed_forms_of_a_schedule_follow_from_alpha_and_sigma(schedule):
    schedule.check()
    t = torch.linspace(*schedule.ends, 9, dtype=DOUBLE)[:-1]
    assert torch.allclose(schedule.drift(t), evolve.Schedule.drift(schedule, t), rtol=1e-9, atol=1e-12)
    assert torch.allclose(schedule.diffusion(t), evolve.Schedule.diffusion(schedule, t), rtol=1e-9, atol=1e-9)
    assert torch.allclose(schedule.time(schedule.log_snr(t)), t, rtol=1e-9)
    assert torch.allclose(evolve.Schedule.time(schedule, schedule.log_snr(t)), t, rtol=1e-6, atol=1e-9)
    assert torch.allclose(schedule.angle(t).tan(), schedule.sigma(t) / schedule.alpha(t))
    grid = schedule.angles(16)
    assert grid.shape == (17,) and bool((grid.diff() < 0).all())


def test_the_equation_of_a_schedule_has_its_marginals():
    """The variance of dx = f x dt + g dW from white data is that of the schedule, by a fine integration."""
    for schedule in (evolve.VP(), evolve.SubVP(), evolve.EDM(0.01, 3.0)):
        low, high = schedule.ends
        t = torch.linspace(low, high, 20001, dtype=DOUBLE)
        variance = schedule.scale(t[0]).square()
        middle = (t[:-1] + t[1:]) / 2
        decay = (2 * schedule.drift(middle) * t.diff()).exp()
        fresh = schedule.diffusion(middle).square() * t.diff()
        for a, b in zip(decay.tolist(), fresh.tolist(), strict=True):
            variance = variance * a + b
        assert float(variance) == pytest.approx(float(schedule.scale(t[-1]).square()), rel=1e-3)


def test_schedules_that_do_not_lead_from_data_to_noise_are_refused():
    class Wrong(evolve.Schedule):
        def __init__(self, ends, sigma):
            self.ends, self._sigma = ends, sigma

        def alpha(self, t):
            return torch.ones_like(t)

        def sigma(self, t):
            return self._sigma(t)

    for ends, sigma, what in (
        ((0.0, 1.0), lambda t: 0.5 + t, "starts with"),
        ((0.0, 1.0), lambda t: 0.1 * t, "ends with"),
        ((0.0, 1.0), lambda t: 4 * t * (1.2 - t), "increasing"),
        ((1.0, 0.0), lambda t: t, "first < last"),
        ((0.0, 1.0), lambda t: 4 * t / (t - 0.5), "increasing"),
    ):
        with pytest.raises(ValueError, match=what):
            gm.Diffusion(2, schedule=Wrong(ends, sigma))


# -- the density ------------------------------------------------------------------------------------------------------


def test_a_gaussian_is_scored_exactly_in_four_calls():
    model, law = gaussian()
    model.solver = evolve.RK4(1)
    x = law.sample((500,))
    assert model.cost.score == 4
    assert (model().log_prob(x) - smoothed(model, x)).abs().max() < 1e-9
    assert (model().log_prob(x) - law.log_prob(x)).abs().max() < 1e-4  # the noise in the law
    draws = model().sample((20000,))
    assert_mean(draws, law.mean)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(law.covariance_matrix), (draws - law.mean).mT, upper=False)
    assert_mean(z.mT.square(), torch.ones(8) + 9e-6)


@pytest.mark.parametrize(
    ("make", "draw", "mean", "largest"),
    [(ring, ring_draws, 2e-4, 2e-3), pytest.param(lattice, lattice_draws, 1e-3, 1e-2, marks=pytest.mark.slow)],
)
def test_a_calibrated_grid_scores_mixtures_in_sixty_four_calls(make, draw, mean, largest):
    """The largest of four hundred draws.

    The grid knows the rows that it was calibrated on; of a thousand others there may be one that passes nearer to the
    border between two modes than all of these, and is off by a tenth of a nat.
    """
    model = make()
    model.calibrate(x=draw(512), tolerance=1.0)
    model.solver = evolve.RK4(16)
    x = draw(400)
    with torch.no_grad():
        error = (model().log_prob(x) - smoothed(model, x)).abs()
        grid = model.knots.clone()
        model.knots.copy_(even_knots(model.bottom, model.top))
        before = (model().log_prob(x) - smoothed(model, x)).abs()
        model.knots.copy_(grid)
    assert float(error.mean()) < mean and float(error.max()) < largest
    assert float(error.mean()) < 0.5 * float(before.mean()), "calibration does not help"


def test_calibration_states_its_error():
    model, x = ring(), ring_draws(256)
    for tolerance in (1e-2, 1e-3):
        model.calibrate(tolerance, x=x)
        assert model.log_prob_error <= tolerance
        with torch.no_grad():
            true = float((model().log_prob(x) - smoothed(model, x)).abs().max())
        assert true <= 2 * model.log_prob_error + 1e-9


def test_observed_orders_of_convergence():
    model, z = ring(), torch.randn(256, 2, dtype=DOUBLE)
    with torch.no_grad():
        truth = model.sampled_by(evolve.RK4(512))().push(z)

        def error(sampler: object) -> float:
            return float((model.sampled_by(sampler)().push(z) - truth).norm(dim=-1).median())

        for kind in (evolve.Euler, evolve.Heun, evolve.RK4, evolve.AdamsBashforth, evolve.DPMSolver):
            order = kind(4).order
            coarse, fine = error(kind(128)), error(kind(256))
            observed = math.log2(coarse / fine)
            least = {evolve.RK4: 3.7, evolve.DPMSolver: 1.7}.get(kind, order - 0.1)  # see test_diffusion_samplers.py
            assert observed > least, (kind.__name__, observed)
        ddim = math.log2(error(evolve.Ancestral(128, eta=0.0)) / error(evolve.Ancestral(256, eta=0.0)))
        assert 0.8 < ddim < 1.3


def test_a_row_alone_is_a_row_in_a_batch():
    model = lattice(solver=evolve.RK4(8))
    x = lattice_draws(32)
    x[0] = 100.0
    together = model().log_prob(x)
    alone = torch.stack([model().log_prob(row) for row in x])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)
    model, x = model.float(), x.float()
    together = model().log_prob(x)
    assert torch.allclose(together, torch.stack([model().log_prob(row) for row in x]), rtol=1e-5, atol=1e-5)


def test_gradients_equal_finite_differences():
    model, x = ring(solver=evolve.RK4(8)), ring_draws(4).requires_grad_()
    z = torch.randn(3, 2, dtype=DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model().log_prob(x), (x,), rtol=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(lambda z: model().push(z), (z,), rtol=1e-6, atol=1e-8)


def test_an_estimated_divergence_is_repeatable_and_exact_for_gaussians():
    white, law = gaussian()
    model = gm.Diffusion(8, network=white.network, parameterization="denoised", trace="hutchinson").to(DOUBLE)
    model.whitening.load_state_dict(white.whitening.state_dict())
    x = law.sample((50,))
    assert model.density is gm.Density.ESTIMATE
    assert (model().log_prob(x) - white().log_prob(x)).abs().max() < 1e-4
    assert torch.equal(model().log_prob(x), model().log_prob(x))
    assert gm.Diffusion(65).density is gm.Density.ESTIMATE and gm.Diffusion(64).density is gm.Density.EXACT


# -- forms of the network ---------------------------------------------------------------------------------------------


class Told(nn.Module):
    """An exact denoiser in another form."""

    def __init__(self, network: Mixture, form: str) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        if self.form == "energy":
            log_density = self.network.log_density(t, u)
            return -t.reshape(-1).tan() * (log_density + 0.5 * u.square().sum(-1))
        datum = self.network(t, u)
        if self.form == "noise":
            return (u - t.cos() * datum) / t.sin()
        if self.form == "score":
            return (t.cos() * datum - u) / t.sin().square()
        return (t.cos() * u - datum) / t.sin()


@pytest.mark.parametrize("form", ["velocity", "noise", "score", "energy"])
def test_all_forms_of_a_network_are_one_law(form):
    reference, x = ring(solver=evolve.RK4(64)), ring_draws(50)
    model = gm.Diffusion(
        2, network=Told(reference.network, form), parameterization=form, sigma_min=3e-3, solver=evolve.RK4(64)
    ).to(DOUBLE)
    model.whitening.load_state_dict(reference.whitening.state_dict())
    if form == "energy":  # at a right angle its tangent is infinite
        model.top = math.atan(1000.0)
        model.knots.copy_(even_knots(model.bottom, model.top))
    with torch.no_grad():
        found = model().log_prob(x)
        assert (found - smoothed(reference, x)).abs().max() < 5e-3
        t, u = torch.tensor(0.4, dtype=DOUBLE), model.noisy(x) * 0.9
        for name in ("velocity", "denoised", "noise", "score"):
            one, two = (getattr(m.denoiser, name)(t, u, None) for m in (model, reference))
            assert torch.allclose(one, two, atol=1e-8), name


def test_the_covariance_of_the_datum_is_tweedies():
    model = ring()
    t, u = torch.tensor(0.5, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE)
    mean, covariance = model.denoiser.covariance(t, u, None)
    network = model.network
    _, _, log_weight = network.parts(t, u)
    weight = log_weight.softmax(-1)
    gain = t.cos() * network.values / (t.cos().square() * network.values + t.sin().square())
    residual = torch.einsum("rkd,kde->rke", u[:, None] - t.cos() * network.mean, network.vectors)
    centres = network.mean + torch.einsum("rke,kde->rkd", gain * residual, network.vectors)
    inside = torch.einsum("kde,ke,kfe->kdf", network.vectors, network.values * (1 - t.cos() * gain), network.vectors)
    shift = centres - mean[:, None]
    expected = torch.einsum("rk,kdf->rdf", weight, inside) + torch.einsum("rk,rkd,rkf->rdf", weight, shift, shift)
    assert torch.allclose(mean, model.denoiser.denoised(t, u, None)) and torch.allclose(covariance, expected, atol=1e-9)
    end = model.denoiser.covariance(torch.tensor(math.pi / 2, dtype=DOUBLE), u, None)[1]
    assert torch.equal(end, torch.eye(2, dtype=DOUBLE).expand(6, 2, 2))


def test_the_score_is_one_call_and_right_for_an_exact_network():
    model, x = ring(), ring_draws(64)
    model.calibrate(x=x)
    calls = []
    handle = model.network.register_forward_hook(lambda *_: calls.append(1))
    found = model().score(x, level=3e-3)
    assert len(calls) == 1
    handle.remove()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(smoothed(model, leaf).sum(), leaf)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert model.score_level <= 0.01  # an exact network is asked where the law is


def test_the_score_knows_the_support():
    model = gm.Diffusion(2, support=constraints.positive).to(DOUBLE)
    model.standardize(torch.randn(100, 2, dtype=DOUBLE).exp())
    x = torch.rand(5, 2, dtype=DOUBLE) + 0.5
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model().log_prob(leaf).sum(), leaf)
    assert torch.allclose(model().score(x), expected, rtol=1e-2, atol=1e-3)


# -- samplers ---------------------------------------------------------------------------------------------------------


def scales(sampler: evolve.Ancestral, model: gm.Diffusion, variances: Tensor) -> Tensor:
    """Variance along the eigenvectors of white Gaussian data after an ancestral chain: a linear recursion."""
    angles, spread = model.angles(sampler.steps, sampler.schedule), torch.ones_like(variances)
    for t, s in pairwise(angles):
        gain = t.cos() * variances / (t.cos().square() * variances + t.sin().square())
        noise = (1 - t.cos() * gain) / t.sin()
        mean, sd = sampler.mean(gain, noise, t, s)
        spread = mean.square() * spread + (0.0 if sd is None else sd.square())
    return spread / math.cos(model.bottom) ** 2


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [None, evolve.VP(), evolve.EDM()], ids=["own", "vp", "edm"])
def test_moments_of_a_chain_are_the_linear_recursion(eta, schedule):
    """White Gaussian data under a network that takes them to be narrower: nothing cancels."""
    variances = torch.tensor([0.2, 0.6], dtype=DOUBLE)
    network = Mixture(torch.ones(1, dtype=DOUBLE), torch.zeros(1, 2, dtype=DOUBLE), torch.diag(variances)[None])
    model = gm.Diffusion(2, network=network, parameterization="denoised").to(DOUBLE)
    sampler = evolve.Ancestral(6, schedule=schedule, eta=eta)
    expected = scales(sampler, model, variances)
    draws = model().sample((40000,), sampler=sampler)
    assert_mean(draws.square(), expected, name="variance")  # eigenvalues come in the order of the columns
    assert (expected - variances).abs().max() > 1e-3, "no bias to be seen"


@pytest.mark.parametrize(
    "sampler",
    [
        evolve.Ancestral(256),
        evolve.PredictorCorrector(256, corrections=2),
        evolve.ReverseSDE(1024),
        pytest.param(evolve.ReverseSDE(1024, schedule=evolve.EDM()), marks=pytest.mark.slow),
        evolve.AdamsBashforth(32),
        evolve.DPMSolver(64),
        evolve.Heun(32),
    ],
    ids=lambda s: type(s).__name__,
)
def test_every_sampler_finds_all_modes_at_their_width(sampler):
    model = ring()
    torch.manual_seed(0)
    x = model().sample((2000,), sampler=sampler)
    angle = torch.arange(8, dtype=DOUBLE) * math.pi / 4
    gaps = x[:, None] - 2 * torch.stack([angle.cos(), angle.sin()], -1)
    nearest = gaps.norm(dim=-1).argmin(1)
    assert float(nearest.bincount(minlength=8).min()) > 190
    inside = gaps[torch.arange(2000), nearest]
    assert float(inside.square().mean().sqrt()) == pytest.approx(0.2, rel=0.06)


def test_the_reverse_equation_is_repeatable_and_asks_once_a_step():
    model, sampler = ring(), evolve.ReverseSDE(10)
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    law = model.sampled_by(sampler)()
    draws = []
    for seed in (torch.manual_seed, torch.manual_seed, pyro.set_rng_seed, pyro.set_rng_seed):
        seed(3)
        draws.append(law.sample((4,)))
    assert len(calls) == 40 and sampler.evaluations == 10
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[2], draws[3])
    torch.manual_seed(4)
    assert not torch.equal(draws[0], law.sample((4,)))
    with pytest.raises(DensityError, match="noise space"):
        law.push(torch.zeros(1, 2, dtype=DOUBLE))
    with pytest.raises(ValueError, match="infinite rate"):
        evolve.ReverseSDE(10, schedule=evolve.Angle())


@pytest.mark.parametrize("sampler", [evolve.Ancestral(5), evolve.PredictorCorrector(3), evolve.AdamsBashforth(5)])
def test_the_law_of_a_sampler_is_a_pushforward_of_its_noise(sampler):
    model = ring()
    law = model.sampled_by(sampler)()
    torch.manual_seed(1)
    x = law.sample((7,))
    torch.manual_seed(1)
    first = torch.randn(7, 2, dtype=DOUBLE)
    z = (
        first
        if not sampler.draws
        else torch.stack([first, *(torch.randn(7, 2, dtype=DOUBLE) for _ in range(sampler.draws))], 1)
    )
    assert torch.allclose(law.push(z), x) and law.density is gm.Density.IMPLICIT
    assert law.base.event_shape == ((1 + sampler.draws, 2) if sampler.draws else (2,))


def test_steps_are_the_ancestral_chain_and_look_ahead():
    model = ring()
    steps, seen = model().steps(64).start(3000), []
    for step in steps:
        assert step.mean.shape == (3000, 2)
        seen.append(step.mean)
        if step.index == 32:
            covariance = step.covariance()
            assert covariance.shape == (3000, 2, 2)
    assert len(seen) == 65 and seen[0].std() < 1e-6  # of pure noise nothing is known
    torch.manual_seed(0)
    chain = model().sample((3000,), sampler=evolve.Ancestral(64))
    assert_mean(
        steps.value.square().sum(-1), chain.square().sum(-1).mean(), (steps.value.square().sum(-1).var() / 1500).sqrt()
    )
    steps = model().steps(16).start(50)
    for _ in steps:
        steps.fork(torch.zeros(50, dtype=torch.long))
    assert float(steps.value.std(0).max()) < 0.05, "all are copies of one until the last step"
    with pytest.raises(ShapeError, match="ancestors"):
        steps.fork(torch.zeros(3, dtype=torch.long))


def test_a_steered_step_goes_where_it_is_told():
    steps = ring()().steps(64).start(500)
    target = torch.tensor([1.0, -1.0], dtype=DOUBLE)
    for step in steps:
        step.datum = target.expand(500, 2)
    model = steps._model
    there = model.coordinates.push(model.whitening.inverse(target[None]))[0]
    assert (steps.value - there).norm(dim=-1).median() < 0.02


# -- the divergence by one call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "dim"), [(ring, 2), (lattice, 8)])
def test_the_divergence_by_one_call_is_unbiased_and_differentiable(make, dim):
    model = make()
    torch.manual_seed(0)
    q = dist.MultivariateNormal(torch.full((dim,), 0.7, dtype=DOUBLE), 0.5 * torch.eye(dim, dtype=DOUBLE))
    x = q.sample((20000,))
    direct = q.log_prob(x) - smoothed(model, x)
    with torch.no_grad():
        found = evolve.score_divergence(q.mean.expand(20000, dim), q.covariance_matrix, model())
    error = (found.var() / 20000 + direct.var() / 20000).sqrt()
    assert_mean(found - direct.mean(), 0.0, error[None])
    mean = q.mean.clone().requires_grad_()
    torch.distributions.kl_divergence(dist.MultivariateNormal(mean, q.covariance_matrix), model()).backward()
    assert bool(mean.grad.isfinite().all())


def variances_of_divergences(model: gm.Diffusion, variance: float, rows: int) -> tuple[Tensor, Tensor]:
    """Of the value, and of the gradient to mean and deviation, by 64 calls: of scores, and of a solution, rows each."""
    mean = torch.full((rows, model.features), 0.7, dtype=DOUBLE, requires_grad=True)
    sd = torch.full((rows, model.features), math.sqrt(variance), dtype=DOUBLE, requires_grad=True)
    q = dist.Normal(mean, sd).to_event(1)
    x = q.rsample()
    solved = q.log_prob(x) - smoothed(model, x)  # no error of a solver
    scored = evolve.score_divergence(mean, torch.diag_embed(sd.square()), model(), draws=64)
    found = []
    for value in (scored, solved):
        gradients = torch.autograd.grad(value.sum(), (mean, sd))
        found.append(torch.stack([value.detach().var(), *(gradient.var(0).sum() for gradient in gradients)]))
    return found[0], found[1]


@pytest.mark.parametrize(("make", "variance", "slopes"), [(ring, 0.5, 0.1), (lattice, 4.0, 0.2)])
def test_the_divergence_by_scores_varies_ten_times_less(make, variance, slopes):
    """Than the log ratio by one solution of as many calls, where a Gaussian does not fit into one mode.

    Where it does, the log ratio hardly varies, and of the factor two are left on the lattice for a variance of .1, and
    nothing for less. Variances of gradients on the lattice are .05, in one of six runs .12, of the log ratio's.
    """
    scored, solved = variances_of_divergences(make(), variance, 400)
    assert bool((scored < torch.tensor([0.1, slopes, slopes]) * solved).all()), scored / solved


@pytest.mark.slow
def test_mean_field_elbo_finds_the_posterior():
    prior, law = gaussian(4.0, 2)
    y = torch.tensor([1.0, -1.0], dtype=DOUBLE)

    def model():
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, 0.7).to_event(1), obs=y)

    guide = gm_mean_field(2)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(
        model,
        guide,
        pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.998}),
        TraceMeanField_ELBO(num_particles=16, vectorize_particles=True),
    )
    for _ in range(800):
        svi.step()
    precision = law.precision_matrix + torch.eye(2, dtype=DOUBLE) / 0.49
    mean = torch.linalg.solve(precision, law.precision_matrix @ law.mean + y / 0.49)
    loc, scale = pyro.param("loc"), pyro.param("scale")
    assert torch.allclose(loc, mean, atol=0.05)
    assert torch.allclose(scale, precision.diagonal().rsqrt(), atol=0.05)


def gm_mean_field(features: int):
    """A guide of independent Gaussians, in double precision."""

    def guide():
        loc = pyro.param("loc", torch.zeros(features, dtype=DOUBLE))
        scale = pyro.param("scale", torch.ones(features, dtype=DOUBLE), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale).to_event(1))

    return guide


# -- as a prior -------------------------------------------------------------------------------------------------------

CORRELATED = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=DOUBLE)
MEAN, VARIANCE, EVIDENCE = torch.tensor([1.376, 1.101]), torch.tensor([0.083, 0.413]), -1.9941
EXACT_MEAN, EXACT_VARIANCE = torch.tensor([1.5, 1.2]) / 1.09, torch.tensor([0.09, 0.45]) / 1.09


def observed(prior: gm.GenerativeModel):
    """y = x1 + noise of .3, seen to be 1.5."""

    def model():
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=torch.tensor(1.5, dtype=DOUBLE))

    return model


def correlated() -> gm.Diffusion:
    model = exact(torch.ones(1, dtype=DOUBLE), torch.zeros(1, 2, dtype=DOUBLE), CORRELATED[None])
    model.solver = evolve.RK4(2)
    return model


def assert_posterior(x: Tensor) -> None:
    """Moments of draws ``(n, 2)`` within .05 standard deviations and 10 % (Monte Carlo included)."""
    assert torch.allclose(x.mean(0).float(), MEAN, atol=0.05), x.mean(0)
    assert torch.allclose(x.var(0).float() / VARIANCE, torch.ones(2), atol=0.1), x.var(0)


@pytest.mark.slow
def test_noise_space_chains_find_the_posterior():
    prior = correlated().sampled_by(evolve.AdamsBashforth(8))
    model = pyro.poutine.reparam(observed(prior), {"x": gm.infer.PushforwardReparam()})
    mcmc = gm.infer.MCMC(gm.infer.HMC(model), num_samples=250, num_chains=64, seed=0, progress_bar=False)
    mcmc.run()
    assert_posterior(
        mcmc.get_samples()["x"] if "x" in mcmc.get_samples() else push(prior, mcmc.get_samples()["x_base"])
    )


def push(prior: gm.GenerativeModel, z: Tensor) -> Tensor:
    with torch.no_grad():
        return prior().push(z)


@pytest.mark.slow
def test_tempered_particles_find_posterior_and_evidence():
    prior = correlated().sampled_by(evolve.AdamsBashforth(8))
    model = pyro.poutine.reparam(observed(prior), {"x": gm.infer.PushforwardReparam()})
    smc = gm.infer.SMC(model, 2000, num_runs=4, moves="elliptical", seed=0, progress_bar=False)
    smc.run()
    assert smc.log_evidence == pytest.approx(EVIDENCE, abs=0.02 + 2 * smc.log_evidence_error)
    assert_posterior(push(prior, smc.get_samples()["x_base"]))


@pytest.mark.slow
def test_the_score_as_a_force_finds_the_posterior_and_is_cheap():
    prior = correlated()
    mcmc = gm.infer.MCMC(
        gm.infer.HMC(observed(prior.with_score_force()), level="graph"),
        num_samples=250,
        num_chains=64,
        seed=0,
        progress_bar=False,
    )
    mcmc.run()
    assert_posterior(mcmc.get_samples()["x"])


@pytest.mark.slow
def test_a_wrong_force_is_corrected_by_the_accept_test():
    """The score at a level of noise that is far too high is half of what it should be: another field, the same law."""
    prior = correlated()
    law = prior.with_score_force(level=1.0)
    x = torch.tensor([[1.0, -0.5]], dtype=DOUBLE)
    assert torch.allclose(prior().score(x, level=1.0), 0.5 * prior().score(x, level=3e-3), rtol=1e-4)
    mcmc = gm.infer.MCMC(
        gm.infer.HMC(observed(law), level="graph"), num_samples=400, num_chains=64, seed=0, progress_bar=False
    )
    mcmc.run()
    assert_posterior(mcmc.get_samples()["x"])


def test_the_score_is_refused_where_there_is_no_accept_test():
    prior = correlated().with_score_force()
    model = observed(prior)
    with pytest.raises(DensityError, match="noise space"):
        SVI(model, gm_mean_field(2), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()
    with pytest.raises(DensityError, match="accept test"):
        gm.infer.MCMC(gm.infer.ULA(model), num_samples=5, num_chains=2, progress_bar=False).run()
    estimate = gm.Diffusion(2, trace="hutchinson")
    with pytest.raises(DensityError, match="estimated"):
        estimate.with_score_force()
    assert estimate.with_score_force(estimated=True).density is gm.Density.ESTIMATE


def test_pyros_nuts_refuses_what_has_a_score_alone():
    prior = correlated().sampled_by(evolve.AdamsBashforth(4))
    with pytest.raises(DensityError, match="PushforwardReparam"):
        MCMC(NUTS(observed(prior), jit_compile=False), 5, warmup_steps=5, disable_progbar=True).run()


@pytest.mark.slow
def test_pyros_nuts_takes_noise_space():
    prior = correlated().sampled_by(evolve.AdamsBashforth(4))
    model = pyro.poutine.reparam(observed(prior), {"x": gm.infer.PushforwardReparam()})
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), 400, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    gap = (push(prior, mcmc.get_samples()["x_base"]) - EXACT_MEAN) / EXACT_VARIANCE.sqrt()
    for draws, truth, name in ((gap, 0.0, "mean"), (gap.square(), 1.0, "variance")):
        error = chain_standard_error(draws[None])
        assert error.max() < 0.15, f"standard error of the {name}: {error}, too few draws"
        assert_mean(draws, torch.full((2,), truth), error, name)


def test_pyros_nuts_refuses_a_score_as_force():
    """It would take an exact density and a gradient that is another's; its own accept test is not known to be one."""
    with pytest.raises(DensityError, match="accept test"):
        MCMC(NUTS(observed(correlated().with_score_force())), 5, warmup_steps=5, disable_progbar=True).run()


# -- energies ---------------------------------------------------------------------------------------------------------


def test_an_energy_is_a_log_density_up_to_one_constant():
    reference, x = ring(), ring_draws(100)
    model = gm.Diffusion(2, network=Told(reference.network, "energy"), parameterization="energy").to(DOUBLE)
    model.whitening.load_state_dict(reference.whitening.state_dict())
    model.top = math.atan(1000.0)
    law = model.energy_law(level=0.05)
    assert law.density is gm.Density.UNNORMALIZED and law.cost.score == 1
    t = torch.tensor(math.atan(0.05), dtype=DOUBLE)
    volume = model.whitening.log_scale() - 2 * t.cos().log()
    truth = reference.network.log_density(t, model.whitening(x) * t.cos()) - volume
    with torch.no_grad():
        gap = law().log_prob(x) - truth
        assert float(gap.std()) < 1e-9
        law.normalize_at(x[0])
        assert law.density is gm.Density.ESTIMATE
        assert (law().log_prob(x) - truth).abs().max() < 2e-3
    with pytest.raises(DensityError, match="energy"):
        reference.energy_law()


# -- learning ---------------------------------------------------------------------------------------------------------


def train(model: gm.Diffusion, draw: Callable[[int], Tensor], steps: int, rate: float = 1e-3) -> gm.Diffusion:
    """On fresh draws at every step: what is judged is the network, not what it learns by heart."""
    model.standardize(draw(20000).float())
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    rates = [min(1.0, (k + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * k / steps)) for k in range(steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates.__getitem__)
    for _ in range(steps):
        loss = model.loss(draw(512).float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def test_noise_levels_are_one_in_each_part_of_their_law():
    z = stratified_normal(500, torch.zeros((), dtype=DOUBLE))
    assert z.shape == (500, 1) and z.dtype is DOUBLE
    part = (torch.special.ndtr(z[:, 0]) * 500).floor().long()
    assert torch.equal(part.sort().values, torch.arange(500))
    many = torch.stack([stratified_normal(8, z)[:, 0] for _ in range(2000)])
    assert_law(many[:, [0, 7]], torch.special.ndtr)
    first = (torch.special.ndtr(many[:, 0]) * 8).long()
    assert_counts(torch.bincount(first, minlength=8), torch.full((8,), 1 / 8), "places of parts")


@pytest.mark.slow
def test_the_default_network_learns_eight_modes():
    gaps = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = train(gm.Diffusion(2, solver=evolve.RK4(16)), ring_draws, 2500)
        x = ring_draws(600)
        with torch.no_grad():
            gaps.append(float((smoothed(ring(), x) - model().log_prob(x.float())).mean()))
    assert sum(gaps) / 3 < 0.08, gaps


@pytest.mark.slow
def test_a_learned_prior_gives_the_exact_posterior():
    torch.manual_seed(0)
    law = dist.MultivariateNormal(torch.zeros(2), CORRELATED.float())
    diffusion = train(gm.Diffusion(2), lambda n: law.sample((n,)), 1500)
    diffusion.calibrate(x=law.sample((500,)))
    prior = diffusion.to(DOUBLE).freeze().sampled_by(evolve.AdamsBashforth(16))
    model = pyro.poutine.reparam(observed(prior), {"x": gm.infer.PushforwardReparam()})
    smc = gm.infer.SMC(model, 1000, num_runs=4, moves="elliptical", seed=0, progress_bar=False)
    smc.run()
    assert smc.log_evidence == pytest.approx(EVIDENCE, abs=0.05)
    x = push(prior, smc.get_samples()["x_base"])
    assert torch.allclose(x.mean(0).float(), MEAN, atol=0.05)
    assert torch.allclose(x.var(0).float() / VARIANCE, torch.ones(2), atol=0.15)


def test_likelihood_weighting_is_the_bound_on_the_likelihood():
    """For white Gaussian data and a network that takes them to be narrower, the gap is a divergence in closed form."""
    variances = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    network = Mixture(torch.ones(1, dtype=DOUBLE), torch.zeros(1, 2, dtype=DOUBLE), torch.diag(variances)[None])
    right = Mixture(torch.ones(1, dtype=DOUBLE), torch.zeros(1, 2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)[None])
    wrong, exactly = (
        gm.Diffusion(2, network=n, parameterization="denoised", likelihood_weighting=True, noise_levels=(0.0, 2.0)).to(
            DOUBLE
        )
        for n in (network, right)
    )
    x = torch.randn(200_000, 2, dtype=DOUBLE)
    torch.manual_seed(0)
    loss = wrong.loss(x)
    torch.manual_seed(0)
    gap = loss - exactly.loss(x)
    expected = 0.5 * (1 / variances - 1 + variances.log()).sum()
    assert_mean(gap, expected)


def test_context_dropout_learns_both_laws():
    model = gm.Diffusion(1, context_features=1, context_dropout=0.5)
    torch.manual_seed(0)
    c = torch.randn(4000, 1)
    x = 2 * c + 0.3 * torch.randn(4000, 1)
    model.standardize(x, c)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        rows = torch.randint(4000, (256,))
        loss = model.loss(x[rows], c[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    t, u = torch.tensor(0.8), torch.zeros(3, 1)
    told = model.told(model.context_standardization(torch.tensor([[-1.0], [0.0], [1.0]])))
    with torch.no_grad():
        with_context = model.denoiser.denoised(t, u, told)
        without = model.denoiser.denoised(t, u, torch.zeros_like(told))
    assert float(with_context.std()) > 0.5 and float(without.std()) < 1e-6
    assert float(without.abs().max()) < 0.15


def test_images_take_one_scale_and_a_unet(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(64, 1, 8, 8)
    x[:, 0, 0, 0] = 0.0  # a pixel that never changes
    model = gm.Diffusion(event_shape=(1, 8, 8))
    assert model.whiten == "common" and type(model.network).__name__ == "UNet"
    gm.fit(model, x, max_epochs=1, seed=0, progress_bar=False)
    law = model()
    assert law.sample((2,)).shape == (2, 1, 8, 8) and law.log_prob(x[:2]).isfinite().all()
    gm.save(model, tmp_path / "images")
    again = gm.load(tmp_path / "images")
    assert torch.equal(again().log_prob(x[:2]), law.log_prob(x[:2]))
    assert again.solver == model.solver and again.log_prob_error == pytest.approx(model.log_prob_error, nan_ok=True)


# -- bad input --------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        return u - u.mean(0)


class Lost(nn.Module):
    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        return torch.where(t < 0.5, torch.nan, 0.0) * u


def test_bad_networks_and_options_are_refused():
    with pytest.raises(ValueError, match="mixes the rows"):
        gm.Diffusion(2, network=Mixing())
    with pytest.raises(ShapeError, match=r"returned shape \(3, 5\)"):
        gm.Diffusion(2, network=Wide())
    for options, what in (
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"noise_levels": (0.0, 0.0)}, "noise_levels"),
        ({"context_dropout": 0.3}, "context_dropout"),
    ):
        with pytest.raises(ValueError, match=what):
            gm.Diffusion(2, **options)
    with pytest.raises(ValueError, match="steps"):
        evolve.AdamsBashforth(0)
    with pytest.raises(ValueError, match="n: got 0"):
        gm.Diffusion(2)().steps(0)
    with pytest.raises(ShapeError, match="features"):
        gm.Diffusion()
    with pytest.raises(TypeError, match="sampler"):
        evolve.SampledLaw(gm.Diffusion(2), "euler")


class LaterMixing(nn.Module):
    """A network that mixes the rows of a batch once it has learned to."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        return self.share * (u - u.mean(0))


def test_a_network_that_learned_to_mix_rows_is_refused_at_the_end_of_the_fit():
    model = gm.Diffusion(2, network=LaterMixing())
    x = torch.randn(64, 2)
    with pytest.raises(ValueError, match="mixes the rows"):
        gm.fit(model, x, max_epochs=1, seed=0, progress_bar=False)


class Wide(nn.Module):
    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        return u.new_zeros(len(u), 5)


def test_a_velocity_that_is_not_finite_names_step_and_rows():
    model = gm.Diffusion(2, network=Lost())
    with pytest.raises(IntegrationError, match=r"3 row.*step \d+ of 16"):
        model().sample((3,))


def test_columns_without_a_density_are_refused():
    x = torch.randn(100, 3)
    x[:, 2] = x[:, 0] - x[:, 1]
    with pytest.raises(DataError, match="collinear"):
        gm.Diffusion(3).standardize(x)
    x[:, 2] = 1.0
    with pytest.raises(DataError, match="constant"):
        gm.Diffusion(3).standardize(x)
    few = torch.randn(5, 20)
    model = gm.Diffusion(20)
    model.standardize(few)
    assert model().log_prob(few).isfinite().all(), "fewer rows than columns are shrunk, not refused"


@pytest.mark.slow
def test_the_engine_drops_the_density_from_the_force():
    """A leapfrog by the score costs at most a fiftieth of one by the gradient of the density."""
    prior = gm.Diffusion(2, solver=evolve.RK4(8)).freeze()
    with torch.no_grad():
        for parameter in prior.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def model(law):
        x = pyro.sample("x", law())
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=torch.tensor(1.0))

    q, seconds = torch.randn(16, 2), {}
    for name, law in (("force", prior.with_score_force()), ("exact", prior)):
        energy = gm.infer.potential(model, (law,), level="eager" if name == "exact" else "graph")
        energy.grad(q)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            energy.grad(q)
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    assert seconds["force"] < seconds["exact"] / 50, seconds


def test_solvers_are_fixed_steps():
    assert isinstance(gm.Diffusion(2).solver, FixedStep)
