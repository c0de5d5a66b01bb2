"""Posterior samplers of diffusions under exact denoisers: closed forms, quadrature, and the twenty-five modes."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, constraints
from torch.testing import assert_close

import pyro_genmods as gm
from pyro_genmods.evolve.conditioning import conditioned
from pyro_genmods.evolve.gibbs import SplitGibbs
from pyro_genmods.evolve.guidance import DPS, ClassifierFree, MomentMatching, PiGDM, guided, tweedie
from pyro_genmods.evolve.likelihood import WhiteLikelihood, root
from pyro_genmods.evolve.posterior import Posterior
from pyro_genmods.evolve.twisted import TwistedSMC
from pyro_genmods.foundation.errors import ModelError, SamplingError, ShapeError
from pyro_genmods.foundation.resampling import effective_sample_size, systematic

from .mixtures import (
    Mixture,
    correlated_gaussian,
    grid_problem,
    sampling_floor,
    sliced_distance,
)
from .statistics import assert_mean

GUIDANCES = [
    DPS(),
    PiGDM(),
    PiGDM(exact_features=1),
    MomentMatching(),
    MomentMatching(exact_features=1),
]
ANGLES = [0.01, 0.3, 1.2, math.pi / 2]
QUIET = pytest.mark.filterwarnings("ignore:.*does not commute with initialization")


def standard_normal(d: int, **options) -> gm.Diffusion:
    """A diffusion whose network knows a standard normal: velocity zero."""

    class Zero(torch.nn.Module):
        def forward(self, t, u, c=None):
            return 0 * u

    return gm.Diffusion(d, network=Zero(), **options).double()


def noise_space(law, log_likelihood, particles, runs, seed=0):
    """Draws and log evidence of the many-chain sampler, in the noise of a law."""

    def model():
        pyro.factor("y", log_likelihood(pyro.sample("x", law())))

    noisy = pyro.poutine.reparam(model, {"x": gm.infer.PushforwardReparam()})
    smc = gm.infer.SMC(noisy, particles, num_runs=runs, moves="elliptical", seed=seed, progress_bar=False)
    smc.run()
    return law().push(smc.get_samples()["x_base"]), smc.log_evidence


# -- resampling -------------------------------------------------------------------------------------------------------


def test_effective_sample_sizes():
    w = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert_close(effective_sample_size(w.log() - 700), torch.tensor(100 / 30).double())
    assert float(effective_sample_size(torch.full((3,), -torch.inf))) == 0


def test_copies_are_never_further_than_one_from_their_share():
    w = torch.rand(5, 200, dtype=torch.float64)
    w[:, ::3] = 0
    counts = torch.zeros(400, 5, 200)
    for k in range(400):
        index = systematic(w.log())
        counts[k] = torch.stack([torch.bincount(row, minlength=200) for row in index])
    share = 200 * w / w.sum(-1, keepdim=True)
    assert float((counts - share).abs().max()) < 1 + 1e-9
    assert float(counts[:, :, ::3].max()) == 0
    assert_mean(counts.mean(0).flatten() - share.flatten(), 0.0)


def test_groups_without_weight_are_counted():
    log_weights = torch.zeros(3, 4)
    log_weights[1] = -torch.inf
    with pytest.raises(SamplingError, match="in 1 of 3 group"):
        systematic(log_weights)


def test_a_posterior_resamples_by_weight():
    posterior = Posterior(torch.arange(4.0)[:, None], torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    counts = torch.bincount(posterior.resample(1000).flatten().long(), minlength=4)
    assert_close(counts.float(), torch.tensor([100.0, 200.0, 300.0, 400.0]), atol=4.0, rtol=0)
    assert_close(posterior.mean, torch.tensor([2.0]))
    assert_close(posterior.variance, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="n: got 0"):
        posterior.resample(0)


# -- guidance against the Kalman gain ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    law, measurement = grid_problem(8, 4, 0)
    return law.diffusion(), measurement


def in_white(prior, measurement):
    """The measurement of white rows: matrix, observation."""
    whitening = prior.whitening
    return measurement.a @ whitening.factor, measurement.y - measurement.a @ whitening.mean


@pytest.mark.parametrize("t", ANGLES)
@pytest.mark.parametrize("guidance", [PiGDM(), MomentMatching()])
def test_a_linear_measurement_has_the_kalman_gain(problem, guidance, t):
    prior, measurement = problem
    t, u = torch.tensor(t).double(), torch.randn(6, 8).double()
    a, y = in_white(prior, measurement)
    d, v = prior.denoiser.covariance(t, u, None)
    if isinstance(guidance, PiGDM):
        v = t.sin() ** 2 * torch.eye(8).double().expand_as(v)
    s = a @ v @ a.mT + measurement.r
    error = y - d @ a.mT
    wanted = d + (v @ a.mT @ torch.linalg.solve(s, error[..., None]))[..., 0]
    look = guidance.look(prior.denoiser, WhiteLikelihood(measurement.log_likelihood, prior), t, u, None)
    assert_close(look.datum, d, atol=1e-12, rtol=0)
    assert_close(look.guided, wanted, atol=1e-9, rtol=1e-9)
    density = MultivariateNormal(torch.zeros_like(y), s).log_prob(error)
    assert_close(look.log_psi, density, atol=1e-7, rtol=1e-9)


def test_conjugate_gradients_find_the_same_as_the_whole_curvature(problem):
    prior, measurement = problem
    t, u = torch.tensor(0.7).double(), torch.randn(6, 8).double()
    likelihood = WhiteLikelihood(measurement.log_likelihood, prior)
    whole = PiGDM().look(prior.denoiser, likelihood, t, u, None)
    products = PiGDM(exact_features=7).look(prior.denoiser, likelihood, t, u, None)
    assert_close(products.guided, whole.guided, atol=1e-7, rtol=1e-7)


def test_a_diagonal_is_made_of_row_sums_and_exact_under_separate_measurements():
    law = Mixture(
        torch.ones(1).double(), torch.zeros(1, 3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double())[None]
    )
    prior, y, sd = law.diffusion(), torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor([0.5, 0.1, 2.0]).double()
    likelihood = WhiteLikelihood(lambda x: Normal(x, sd).log_prob(y).sum(-1), prior)
    t, u = torch.tensor(0.7).double(), torch.randn(5, 3).double()
    whole = MomentMatching().look(prior.denoiser, likelihood, t, u, None)
    diagonal = MomentMatching(exact_features=2).look(prior.denoiser, likelihood, t, u, None)
    for one, other in zip(diagonal, whole, strict=True):
        assert_close(one, other, atol=1e-8, rtol=1e-8)
    correlated = torch.tensor([[1.0, 0.5], [0.5, 2.0]]).double()
    law = Mixture(torch.tensor([0.4, 0.6]).double(), torch.randn(2, 2).double(), correlated.expand(2, 2, 2))
    prior, u = law.diffusion(), torch.randn(5, 2).double()
    _, spread = tweedie(prior.denoiser, t, u, None)
    assert_close(spread(torch.ones_like(u)[None])[0], prior.denoiser.covariance(t, u, None)[1].sum(-1))


def test_negative_curvature_is_left_away():
    h = torch.randn(20, 6, 6).double()
    h = (h + h.mT) / 2
    h[:10] = h[:10] @ h[:10]
    h[:5] = h[:5, :, :2] @ h[:5, :, :2].mT  # of rank two
    values, vectors = torch.linalg.eigh(h)
    wanted = (vectors * values.clamp_min(0)[:, None]) @ vectors.mT
    b = root(h, 1e-16)
    assert_close(b @ b.mT, wanted, atol=1e-7, rtol=0)
    assert root(h[:5], 1e-16).shape[-1] == 2
    alone = root(h[2:3], 1e-16)
    assert_close(alone, b[2:3, :, : alone.shape[-1]], rtol=0, atol=0)


@pytest.mark.parametrize(
    "guidance",
    [pytest.param(g, marks=pytest.mark.slow if g in (PiGDM(), MomentMatching()) else ()) for g in GUIDANCES],
    ids=str,
)
def test_a_row_alone_is_the_row_in_company(problem, guidance):
    prior, measurement = problem

    def log_likelihood(x):  # heavy tails: curvature of both signs, so that some rows are mended
        return torch.distributions.StudentT(3.0, x @ measurement.a.mT, 0.5).log_prob(measurement.y).sum(-1)

    denoiser = guidance.around(prior.denoiser, WhiteLikelihood(log_likelihood, prior))
    u = torch.randn(24, 8).double() * torch.linspace(0.1, 5, 24).double()[:, None]
    for t in (0.02, 0.8, math.pi / 2):
        together = denoiser.velocity(torch.tensor(t).double(), u, None)
        alone = torch.cat([denoiser.velocity(torch.tensor(t).double(), row[None], None) for row in u])
        assert bool(together.isfinite().all())
        assert_close(alone, together, atol=1e-8, rtol=1e-8)


def test_dps_follows_the_gradient_through_the_network(problem):
    prior, _ = problem
    likelihood = WhiteLikelihood(lambda x: 1e-3 * x.sin().sum(-1), prior)
    t, u = torch.tensor(0.7).double(), torch.randn(6, 8).double().requires_grad_()
    d = prior.denoiser.denoised(t, u, None)
    (gradient,) = torch.autograd.grad(likelihood(d).sum(), u)
    look = DPS(0.5).look(prior.denoiser, likelihood, t, u.detach(), None)
    assert_close(look.guided - look.datum, 0.5 * t.sin() ** 2 / t.cos() * gradient)
    steep = WhiteLikelihood(lambda x: 1e6 * x.sin().sum(-1), prior)
    look = DPS(0.5).look(prior.denoiser, steep, t, u.detach(), None)
    assert_close((look.guided - look.datum).norm(dim=-1), (t.sin() * 8**0.5).expand(6))


@pytest.mark.parametrize(
    "sampler",
    [gm.evolve.AdamsBashforth(64), gm.evolve.DPMSolver(64), gm.evolve.RK4(16), gm.evolve.Ancestral(256)],
    ids=lambda s: type(s).__name__,
)
def test_moment_matching_is_exact_for_gaussians_in_any_sampler(sampler):
    law, measurement = correlated_gaussian()
    posterior, _ = law.posterior(measurement.a, measurement.r, measurement.y)
    x = guided(law.diffusion(), measurement.log_likelihood, sampler=sampler)().sample((20000,))
    mean, covariance = posterior.moments()
    sd = covariance.diagonal().sqrt()
    assert float(((x.mean(0) - mean) / sd).abs().max()) < 0.05
    assert float((x.var(0) / sd**2 - 1).abs().max()) < 0.06


class Shifted(torch.nn.Module):
    """Velocity of a unit normal around three times the context, and around one where there is none."""

    def forward(self, t, u, c):
        centre = torch.where(c[:, 1:] > 0, 3 * c[:, :1], 1.0)
        return -t.sin() * centre


def test_classifier_free_guidance_is_the_extrapolation():
    model = gm.Diffusion(1, context_features=1, context_dropout=0.1, network=Shifted().double()).double()
    draws = {}
    for weight in (0.0, 1.0, 2.5):
        law = guided(model, None, ClassifierFree(weight), sampler=gm.evolve.AdamsBashforth(64))
        draws[weight] = law(torch.tensor([2.0]).double()).sample((4000,))
        assert_mean(draws[weight], 1.0 + weight * 5.0 + float(draws[weight].mean() * 0))
    with pytest.raises(ModelError, match="context_dropout"):
        guided(standard_normal(2), None, ClassifierFree())
    with pytest.raises(ModelError, match="give None"):
        guided(model, lambda x: x[:, 0], ClassifierFree())


# -- the Gaussian with a known answer ---------------------------------------------------------------------------------


def check_gaussian(mean, variance, log_evidence=None):
    assert (
        float((mean - torch.tensor([1.376147, 1.100917])).abs().div(torch.tensor([0.0826, 0.4128]).sqrt()).max()) < 0.05
    )
    ratio = variance / torch.tensor([0.082569, 0.412844])
    assert 0.97 < float(ratio.min()) <= float(ratio.max()) < 1.03
    if log_evidence is not None:
        assert abs(log_evidence + 1.9941) < 0.02


def test_the_known_answer_is_right():
    law, measurement = correlated_gaussian()
    posterior, log_evidence = law.posterior(measurement.a, measurement.r, measurement.y)
    mean, covariance = posterior.moments()
    check_gaussian(mean, covariance.diagonal(), log_evidence)


def test_twisted_particles_of_a_gaussian():
    law, measurement = correlated_gaussian()
    found = TwistedSMC(law.diffusion(), measurement.log_likelihood, 10000, num_runs=2, seed=0).run()
    check_gaussian(found.mean, found.variance, found.log_evidence)
    assert found.evaluations == 200
    assert found.ess > 18000
    assert found.agreement < 1.01
    assert found.trace.shape == (2, 200)
    assert found.log_evidence_error < 0.01
    draws = found.resample()
    check_gaussian(draws.mean(0), draws.var(0))


def test_another_twist_has_the_same_limit():
    law = Mixture(
        *(t.double() for t in (torch.tensor([0.3, 0.7]), torch.tensor([[-2.0], [1.0]]), torch.ones(2, 1, 1) / 4))
    )
    exact, log_evidence = law.posterior(torch.ones(1, 1).double(), torch.ones(1, 1).double(), torch.zeros(1).double())
    mean, covariance = exact.moments()
    for guidance in (MomentMatching(), PiGDM(), DPS(0.3)):
        found = TwistedSMC(law.diffusion(), standard_measurement, 6000, steps=150, guidance=guidance, seed=1).run()
        assert_close(found.mean, mean, atol=0.06, rtol=0)
        assert_close(found.variance, covariance[0], atol=0.0, rtol=0.06)
        assert abs(found.log_evidence - log_evidence) < 0.03


def standard_measurement(x):
    return Normal(x[:, 0], 1.0).log_prob(torch.tensor(0.0))


@QUIET
@pytest.mark.slow
def test_noise_space_particles_of_a_gaussian():
    law, measurement = correlated_gaussian()
    prior = law.diffusion().sampled_by(gm.evolve.AdamsBashforth(8))
    x, log_evidence = noise_space(prior, measurement.log_likelihood, 10000, 4)
    check_gaussian(x.mean(0), x.var(0), log_evidence)


def test_split_gibbs_of_a_gaussian():
    law, measurement = correlated_gaussian()
    prior = law.diffusion()
    found = SplitGibbs(prior, measurement.log_likelihood, 4000, sweeps=60, reverse_steps=60, seed=0).run()
    assert_close(found.mean, torch.tensor([1.376, 1.101]).double(), atol=0.05, rtol=0)
    assert_close(found.variance, torch.tensor([0.0826, 0.413]).double(), atol=0, rtol=0.12)
    assert found.log_evidence is None
    assert found.evaluations == 61 * 60


@pytest.mark.parametrize("d_y", [1, 2])
def test_a_quadratic_likelihood_takes_one_step_whatever_the_covariance(d_y):
    """The derivative of a learned network is not symmetric; that is no reason to call a likelihood not quadratic."""
    torch.manual_seed(0)
    a, y, mean = torch.randn(d_y, 3).double(), torch.randn(d_y).double(), torch.randn(50, 3).double()
    skew = torch.tensor([[0.0, 0.6, -0.3], [-0.6, 0.0, 0.5], [0.3, -0.5, 0.0]]).double()
    calls = []

    def log_likelihood(x):
        calls.append(len(x))
        return Normal(x @ a.mT, 0.3).log_prob(y).sum(-1)

    likelihood, counts = WhiteLikelihood(log_likelihood, standard_normal(3)), []
    for v in (torch.eye(3).double(), torch.eye(3).double() + skew):
        calls.clear()
        moved, _ = conditioned(likelihood, mean, lambda w, v=v: w @ v.mT)
        counts.append(len(calls))
        if d_y == 1:
            h, g = a.mT @ a / 0.09, (y - mean @ a.mT) @ a / 0.09
            exact = mean + torch.linalg.solve(torch.eye(3) + h @ v, g.mT).mT @ v.mT
            assert_close(moved, exact, atol=1e-8, rtol=1e-8)
    assert counts == [4, 2]  # the curvature is learned by two calls, once


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("slope", [0.0, 0.7])
def test_a_curvature_that_is_known_is_as_good_as_one_computed_anew(rows, slope):
    """Also where the likelihood has a slope across its curvature, and where it has none at all."""
    torch.manual_seed(0)
    a, y, mean = torch.randn(2, 4).double(), torch.randn(2).double(), torch.randn(rows, 4).double()
    direction, half = slope * torch.randn(4).double(), torch.randn(4, 4).double()
    v = half @ half.mT
    for sd in (0.3, 1e9):
        white = WhiteLikelihood(
            lambda x, sd=sd: Normal(x @ a.mT, sd).log_prob(y).sum(-1) + x @ direction, standard_normal(4)
        )
        assert white.quadratic(mean).slanted == (slope > 0 or sd > 1)  # a curvature of nothing spans nothing
        anew = WhiteLikelihood(white.log_likelihood, white.diffusion, {(*mean.shape, mean.dtype, mean.device): None})
        for known, other in zip(*(conditioned(w, mean, lambda w: w @ v) for w in (white, anew)), strict=True):
            assert_close(known, other, atol=1e-8, rtol=1e-8)


def test_a_likelihood_that_is_quadratic_here_and_not_there_is_followed():
    def log_likelihood(x):
        far = (x[:, 0] - 40).clamp_min(0)
        return -0.5 * (x[:, 0] - 60).square() - far**3

    mean = torch.tensor([[0.0, 0.0], [30.0, 1.0], [45.0, 0.0]]).double()
    white = WhiteLikelihood(log_likelihood, standard_normal(2))
    assert white.quadratic(mean) is not None
    anew = WhiteLikelihood(log_likelihood, white.diffusion, {(*mean.shape, mean.dtype, mean.device): None})
    for known, other in zip(*(conditioned(w, mean, lambda w: w) for w in (white, anew)), strict=True):
        assert_close(known, other, atol=1e-6, rtol=1e-6)
    curved = WhiteLikelihood(lambda x: -x.exp().sum(-1), standard_normal(2))
    nowhere = WhiteLikelihood(lambda x: (1 - x.square()).log().sum(-1), standard_normal(2))
    for rows in (1, 3):
        assert curved.quadratic(mean[:rows]) is None
        assert nowhere.quadratic(mean[:rows]) is None


class NoDerivative(torch.autograd.Function):
    """The identity, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        raise AssertionError("differentiated")


class OnceOnly(torch.autograd.Function):
    """The square, with a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_split_gibbs_never_differentiates_the_network():
    class Stiff(torch.nn.Module):
        def forward(self, t, u, c=None):
            return 0 * NoDerivative.apply(u)

    prior = gm.Diffusion(2, network=Stiff()).double()
    found = SplitGibbs(prior, lambda x: Normal(x[:, 0], 1.0).log_prob(torch.tensor(1.0)), 50, sweeps=3).run()
    assert found.draws.shape == (50, 2)
    with pytest.raises(AssertionError, match="differentiated"):
        TwistedSMC(prior, lambda x: -x[:, 0].square(), 50, steps=3).run()


# -- the twenty-five modes --------------------------------------------------------------------------------------------


def distances(d, d_y, problems, particles, run, dtype=torch.float32):
    """Mean distance of a sampler and mean floor over problems, and the largest error of the log evidence."""
    total, floor, worst = 0.0, 0.0, 0.0
    for seed in range(problems):
        law, measurement = grid_problem(d, d_y, seed)
        exact, log_evidence = law.posterior(measurement.a, measurement.r, measurement.y)
        truth = exact.sample(particles)
        x, found = run(law.diffusion(dtype), measurement)
        total, floor = total + sliced_distance(x, truth), floor + sampling_floor(exact, particles)
        worst = max(worst, abs(found - log_evidence))
    return total / problems, floor / problems, worst


def by_twisted(particles):
    def run(prior, measurement):
        found = TwistedSMC(prior, measurement.log_likelihood, particles, steps=200, seed=0).run()
        return found.resample(), found.log_evidence

    return run


def by_noise_space(particles, steps):
    def run(prior, measurement):
        return noise_space(prior.sampled_by(gm.evolve.AdamsBashforth(steps)), measurement.log_likelihood, particles, 1)

    return run


def test_the_mixture_posterior_agrees_with_importance_sampling():
    law, measurement = grid_problem(2, 1, 0)
    exact, log_evidence = law.posterior(measurement.a, measurement.r, measurement.y)
    x = law.sample(200000)
    log_weights = measurement.log_likelihood(x)
    assert abs(float(log_weights.logsumexp(0)) - math.log(200000) - log_evidence) < 0.02
    mean, covariance = exact.moments()
    gap = (log_weights.softmax(0) @ x - mean) / covariance.diagonal().sqrt()
    assert float(gap.abs().max()) < 0.02


def test_twisted_particles_of_a_mixture():
    distance, floor, error = distances(8, 2, 1, 1000, by_twisted(1000))
    assert distance < 2 * floor
    assert error < 0.25


@QUIET
def test_noise_space_particles_of_a_mixture():
    distance, floor, error = distances(8, 1, 1, 500, by_noise_space(500, 8))
    assert distance < 1.3 * floor
    assert error < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("d_y", [1, 2, 4])
def test_twisted_particles_of_all_mixtures(d_y):
    distance, floor, error = distances(8, d_y, 4, 1000, by_twisted(1000))
    assert distance < 2 * floor
    assert error < 0.25


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("d_y", [1, 2, 4])
def test_noise_space_particles_of_all_mixtures(d_y):
    distance, floor, error = distances(8, d_y, 4, 1000, by_noise_space(1000, 16))
    assert distance < 1.3 * floor
    assert error < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("d_y", [1, 4])
def test_twisted_particles_in_eighty_dimensions(d_y):
    distance, floor, _ = distances(80, d_y, 1, 400, by_twisted(400))
    assert distance < 2.5 * floor


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("d_y", [1, 4])
def test_noise_space_particles_in_eighty_dimensions(d_y):
    distance, floor, error = distances(80, d_y, 1, 400, by_noise_space(400, 10))
    assert distance < 2.5 * floor
    assert error < 0.25


# -- other likelihoods, by quadrature ---------------------------------------------------------------------------------


def quadrature(log_joint, *grids):
    """Mean, variance and log evidence on a grid."""
    points = torch.cartesian_prod(*grids).reshape(-1, len(grids))
    cell = math.prod(float(grid[1] - grid[0]) for grid in grids)
    values = log_joint(points)
    w = values.softmax(0)
    mean = w @ points
    return mean, w @ (points - mean).square(), float(values.logsumexp(0)) + math.log(cell)


def check_against(found, truth, tolerance=0.04):
    mean, variance, log_evidence = truth
    assert float(((found.mean - mean) / variance.sqrt()).abs().max()) < tolerance
    assert float((found.variance / variance - 1).abs().max()) < 2 * tolerance
    assert abs(found.log_evidence - log_evidence) < tolerance


@pytest.mark.slow
def test_counts():
    prior, y = standard_normal(1), torch.tensor([7.0, 9.0, 4.0])

    def log_likelihood(x):
        return torch.distributions.Poisson((1 + x).exp()).log_prob(y).sum(-1)

    grid = torch.linspace(-6, 6, 4001).double()
    truth = quadrature(lambda x: log_likelihood(x) + Normal(0, 1).log_prob(x[:, 0]), grid)
    check_against(TwistedSMC(prior, log_likelihood, 8000, seed=0).run(), truth)


@pytest.mark.slow
def test_classes():
    law, _ = correlated_gaussian()
    features = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 2.0], [0.5, -3.0]]).double()
    labels = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()

    def log_likelihood(x):
        return torch.distributions.Bernoulli(logits=x @ features.mT).log_prob(labels).sum(-1)

    density = MultivariateNormal(torch.zeros(2).double(), law.covariances[0])
    grid = torch.linspace(-6, 6, 601).double()
    truth = quadrature(lambda x: log_likelihood(x) + density.log_prob(x), grid, grid)
    check_against(TwistedSMC(law.diffusion(), log_likelihood, 8000, seed=0).run(), truth)
    found = SplitGibbs(law.diffusion(), log_likelihood, 4000, sweeps=40, reverse_steps=60, seed=0).run()
    assert float(((found.mean - truth[0]) / truth[1].sqrt()).abs().max()) < 0.08


@pytest.mark.slow
def test_positive_events_are_in_the_users_units():
    prior = standard_normal(1, support=constraints.positive)

    def log_likelihood(x):
        assert bool((x > 0).all())
        return Normal(x[:, 0], 0.5).log_prob(torch.tensor(2.0))

    grid = torch.linspace(1e-4, 12, 20001).double()
    log_normal = torch.distributions.LogNormal(0.0, 1.0)
    truth = quadrature(lambda x: log_likelihood(x) + log_normal.log_prob(x[:, 0]), grid)
    check_against(TwistedSMC(prior, log_likelihood, 8000, seed=0).run(), truth)


def test_impossible_events_have_no_weight():
    prior = standard_normal(1)
    found = TwistedSMC(prior, lambda x: torch.where(x[:, 0] > 0, 0 * x[:, 0], -torch.inf), 8000, seed=0).run()
    assert float(found.resample().min()) > 0
    assert abs(found.log_evidence - math.log(0.5)) < 0.04
    assert abs(float(found.mean) - math.sqrt(2 / math.pi)) < 0.03


def test_a_tilted_chain_has_the_law_of_its_steps():
    """A chain of few steps has a variance of its own, known by recursion; the evidence is that of its law."""
    prior, steps = standard_normal(1), 40
    angles, variance = prior.angles(steps).double(), 1.0
    for t, s in pairwise(angles):
        mean, sd = gm.evolve.Ancestral(steps).mean(t.cos(), t.sin(), t, s)
        variance = float(mean) ** 2 * variance + float(sd) ** 2
    variance /= math.cos(prior.bottom) ** 2
    assert variance < 0.9
    found = TwistedSMC(prior, lambda x: 1.5 * x[:, 0], 20000, steps=steps, seed=0).run()
    assert abs(found.log_evidence - 1.125 * variance) < 0.02
    assert abs(float(found.mean) - 1.5 * variance) < 0.03
    assert abs(float(found.variance) / variance - 1) < 0.04


def test_the_context_is_that_of_the_prior():
    model = gm.Diffusion(1, context_features=1, network=Around().double()).double()
    context = torch.tensor([2.0]).double()

    def log_likelihood(x):
        return Normal(x[:, 0], 0.5).log_prob(torch.tensor(1.0))

    for prior, given in ((model, context), (model(context), None)):
        found = TwistedSMC(prior, log_likelihood, 4000, steps=100, context=given, seed=0).run()
        assert abs(float(found.mean) - 1.2) < 0.04  # of N(2, 1) under a measurement 1 of variance 1/4
        assert abs(found.log_evidence - float(Normal(2.0, 1.25**0.5).log_prob(torch.tensor(1.0)))) < 0.04
    with pytest.raises(ShapeError, match="has its own"):
        TwistedSMC(model(context), log_likelihood, context=context)
    with pytest.raises(ShapeError, match="one context at a time"):
        TwistedSMC(model(context.expand(3, 1)), log_likelihood)


class Around(torch.nn.Module):
    """Velocity of a unit normal around the context."""

    def forward(self, t, u, c):
        return -t.sin() * c


# -- runs, and what goes wrong ----------------------------------------------------------------------------------------


def test_runs_repeat_under_a_seed_and_differ_from_each_other():
    prior = standard_normal(2)
    state = torch.get_rng_state()
    smc = TwistedSMC(prior, lambda x: -x[:, 0].square(), 50, steps=10, num_runs=3, seed=4)
    first, second = smc.run(), smc.run()
    assert torch.equal(first.draws, second.draws)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first.log_evidences.unique()) == 3
    assert_close(first.log_evidence, float(first.log_evidences.logsumexp(0)) - math.log(3))


def test_runs_that_disagree_are_told():
    law, measurement = grid_problem(8, 1, 3)
    with pytest.warns(UserWarning, match="runs disagree"):
        TwistedSMC(law.diffusion(), measurement.log_likelihood, 10, steps=20, num_runs=3, seed=0).run()


def test_the_progress_bar_says_what_matters(capsys):
    TwistedSMC(standard_normal(2), lambda x: -x[:, 0].square(), 50, steps=10, progress_bar=True).run()
    shown = capsys.readouterr().err
    assert "ess=" in shown
    assert "log_evidence=" in shown


BAD_LIKELIHOODS = [
    (lambda x: (x[:, 0] > 0).double(), ModelError, "no gradient"),
    (lambda x: x.detach()[:, 0], ModelError, "no gradient"),
    (lambda x: -OnceOnly.apply(x).sum(-1), ModelError, r"second derivatives.*DPS"),
    (lambda x: -x.square(), ShapeError, r"got shape \(50, 2\) for 50 events of shape \(2,\)"),
    (lambda x: -x.square().sum(), ShapeError, r"got shape \(\)"),
    (lambda x: torch.where(x[:, 0] > -9, torch.nan, 1.0) * x[:, 0], SamplingError, "NaN or infinite for 50 of 50"),
    (lambda x: -torch.inf * (1 + x[:, 0].square()), SamplingError, "-inf for all 50 particles"),
]


@pytest.mark.parametrize(("log_likelihood", "error", "message"), BAD_LIKELIHOODS)
def test_bad_likelihoods(log_likelihood, error, message):
    with pytest.raises(error, match=message):
        TwistedSMC(standard_normal(2), log_likelihood, 50, steps=3).run()


def test_a_first_derivative_is_enough_for_dps():
    found = TwistedSMC(standard_normal(2), lambda x: -OnceOnly.apply(x).sum(-1), 50, steps=3, guidance=DPS()).run()
    assert bool(found.draws.isfinite().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, f: TwistedSMC(p, f, steps=0), "steps: got 0"),
        (lambda p, f: TwistedSMC(p, f, 1), "num_particles: got 1"),
        (lambda p, f: TwistedSMC(p, f, num_runs=0), "num_runs: got 0"),
        (lambda p, f: TwistedSMC(p, f, threshold=2.0), "threshold: got 2.0"),
        (lambda p, f: SplitGibbs(p, f, sweeps=0), "sweeps: got 0"),
        (lambda p, f: SplitGibbs(p, f, spring=(1.0, 1e-4)), "spring: got"),
        (lambda p, f: SplitGibbs(p, f, annealing=2.0), "annealing: got 2.0"),
        (lambda p, f: DPS(0.0), "scale: got 0.0"),
        (lambda p, f: guided(p, None), "log_likelihood: is None"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(standard_normal(2), lambda x: x[:, 0])


def test_a_prior_must_be_a_diffusion():
    for make in (TwistedSMC, SplitGibbs, guided):
        with pytest.raises(TypeError, match="needs a Diffusion"):
            make(gm.ContinuousFlow(2), lambda x: x[:, 0])
    with pytest.raises(SamplingError, match="-inf for all 20 chains"):
        SplitGibbs(standard_normal(2), lambda x: -torch.inf * (1 + x[:, 0].square()), 20, sweeps=2).run()
