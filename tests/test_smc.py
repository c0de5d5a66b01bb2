"""Sequential Monte Carlo, elliptical slices and parallel tempering, against evidences and posteriors in closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyro_genmods as gm
from pyro_genmods.foundation.annealing import next_step
from pyro_genmods.foundation.elliptical import elliptical_slice
from pyro_genmods.foundation.errors import ModelError, SamplingError
from pyro_genmods.foundation.resampling import systematic

from .linear_gaussian import DOUBLE, LinearGaussian, affine_flow
from .reference_data import DATA, loaded, with_data
from .statistics import assert_law, assert_mean, judge

EVIDENCES = {
    "eight_schools-eight_schools_noncentered": -31.311,
    "arK-arK": 58.588,
    "sblri-blr": -184.773,
    "gp_pois_regr-gp_regr": -27.552,
}
NATS = 0.1
INDEPENDENT = 2000  # draws that 8000 particles are worth at least: those of a run have common ancestors
OPTIONS = {"progress_bar": False, "seed": 0}


def normal(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=DOUBLE), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def two_modes(dim=3, distance=4.0):
    """Weights .3 at +distance and .7 at -distance along the first axis."""
    x = pyro.sample("x", dist.Normal(torch.zeros(dim, dtype=DOUBLE), 3.0).to_event(1))
    centre = torch.zeros(dim, dtype=DOUBLE)
    centre[0] = distance
    right = dist.Normal(centre, 0.5).to_event(1).log_prob(x) + math.log(0.3)
    left = dist.Normal(-centre, 0.5).to_event(1).log_prob(x) + math.log(0.7)
    pyro.factor("modes", torch.logaddexp(right, left))


def evidence_of_normal(y):
    n = len(y)
    covariance = 0.25 * torch.eye(n, dtype=DOUBLE) + 4.0
    law = dist.MultivariateNormal(torch.zeros(n, dtype=DOUBLE), covariance)
    return float(law.log_prob(y.T).sum())


@pytest.fixture(scope="module")
def y():
    return torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) + 1


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", ["hmc", "elliptical"])
def test_a_conjugate_posterior_and_its_evidence(y, moves):
    smc = gm.infer.SMC(normal, 2000, moves=moves, num_runs=4, **OPTIONS)
    smc.run(y)
    assert abs(smc.log_evidence - evidence_of_normal(y)) < NATS
    assert abs(smc.log_evidence - evidence_of_normal(y)) < 5 * smc.log_evidence_error + 0.02
    precision = 1 / 4 + len(y) / 0.25
    mean, sd = 4 * y.sum(0) / precision, precision**-0.5
    x = smc.get_samples()["x"]
    assert (x.mean(0) - mean).abs().max() < 5 * sd / math.sqrt(2000)  # particles of a run are not quite independent
    assert torch.allclose(x.std(0), torch.full((3,), sd, dtype=DOUBLE), rtol=0.06)
    assert all(float(spread.max()) < 1.01 for spread in smc.agreement.values())


def test_an_evidence_on_a_constrained_support():
    successes = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1])

    def coin():
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("tosses", len(successes)):
            pyro.sample("y", dist.Bernoulli(p), obs=successes)

    smc = gm.infer.SMC(coin, 2000, **OPTIONS)
    smc.run()
    betaln = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # noqa: E731
    assert abs(smc.log_evidence - (betaln(2 + 6, 3 + 2) - betaln(2, 3))) < NATS
    assert_law(smc.get_samples()["p"][::8], lambda p: torch.tensor(stats.beta(8, 5).cdf(p)), "beta")


@pytest.mark.parametrize("moves", ["hmc", "elliptical"])
def test_weights_of_modes(moves):
    smc = gm.infer.SMC(two_modes, 4000, moves=moves, num_runs=2, **OPTIONS)
    smc.run()
    weights = (smc.get_samples(group_by_chain=True)["x"][..., 0] > 0).double().mean(1)
    assert (weights - 0.3).abs().max() < 0.05
    exact = dist.Normal(4.0, math.hypot(3.0, 0.5)).log_prob(torch.tensor(0.0))
    exact = float(exact) + 2 * float(dist.Normal(0.0, math.hypot(3.0, 0.5)).log_prob(torch.tensor(0.0)))
    assert abs(smc.log_evidence - exact) < NATS


@pytest.mark.slow
def test_elliptical_slices_in_the_noise_space_of_a_learned_prior():
    problem = LinearGaussian(affine_flow("nice", dtype=DOUBLE), 0.3)
    model = poutine.reparam(problem.model, {"x": gm.infer.PushforwardReparam()})
    y = problem.data(1)[0]
    smc = gm.infer.SMC(model, 2000, moves="elliptical", **OPTIONS)
    smc.run(y)
    x = problem.prior().push(smc.get_samples()["x_base"])
    posterior = problem.posterior(y)
    assert (x.mean(0) - posterior.mean).abs().max() < 0.05
    assert torch.allclose(torch.cov(x.T), posterior.covariance_matrix, rtol=0.1, atol=0.01)
    assert abs(smc.log_evidence - float(problem.marginal.log_prob(y))) < NATS


def test_a_likelihood_without_gradient():
    """Only the integer part of a standard normal is seen."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("seen", torch.where(x.floor() == 1, 0.0, -torch.inf))

    smc = gm.infer.SMC(model, 1000, moves="elliptical", **OPTIONS)
    smc.run()
    x, mass = smc.get_samples()["x"], stats.norm.cdf(2) - stats.norm.cdf(1)
    assert bool(((x >= 1) & (x < 2)).all())
    assert abs(smc.log_evidence - math.log(mass)) < NATS
    assert_law(x[::8], lambda x: torch.tensor((stats.norm.cdf(x) - stats.norm.cdf(1)) / mass), "truncated normal")


def test_the_elliptical_slice_leaves_its_posterior_as_it_is():
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    x = torch.randn(n, 2, dtype=DOUBLE, generator=generator) / math.sqrt(2)  # two unit Gaussians multiplied
    level = -0.5 * x.square().sum(-1)
    for _ in range(3):
        noise = torch.randn(n, 2, dtype=DOUBLE, generator=generator)
        x, level, _ = elliptical_slice(x, level, lambda x: -0.5 * x.square().sum(-1), noise, generator)
    assert torch.allclose(level, -0.5 * x.square().sum(-1))
    assert_law(x * math.sqrt(2), torch.special.ndtr, "slice")


@pytest.mark.slow
@with_data
@pytest.mark.parametrize("name", EVIDENCES)
def test_evidences_of_real_posteriors(name):
    models = loaded(DATA / "posteriordb_models.py")
    smc = gm.infer.SMC(
        models.POSTERIORS[name]["model"](models.load_data(name)), 4000, num_runs=6, num_moves=8, **OPTIONS
    )
    smc.run()
    print(f"{name}: {smc.log_evidence:.3f} +- {smc.log_evidence_error:.3f} ({EVIDENCES[name]})")
    assert abs(smc.log_evidence - EVIDENCES[name]) < NATS + 2 * smc.log_evidence_error
    draws, _, _ = models.load_draws(name)
    draws = torch.tensor(draws)
    found = torch.tensor(models.to_reference(name, models.load_data(name), smc.get_samples()))
    assert ((found.mean(0) - draws.mean(0)) / draws.std(0)).abs().max() < 0.06
    assert ((found.std(0) / draws.std(0)) - 1).abs().max() < 0.1


@pytest.mark.slow
@with_data
@pytest.mark.parametrize(
    ("name", "observation"), [("two_moons", i) for i in range(1, 11)] + [("slcp", i) for i in range(1, 6)]
)
def test_reference_posteriors_with_several_modes(name, observation):
    """Two crescents, and four modes of a five-dimensional posterior, against published draws."""
    tasks = loaded(DATA / "sbibm_tasks.py")
    x, _, reference = tasks.obs(tasks.load(name), observation)
    smc = gm.infer.SMC(tasks.TASKS[name].model, 4000, num_runs=2, max_moves=15, **OPTIONS)
    smc.run(x)
    theta = smc.get_samples()["theta"]
    effective = INDEPENDENT * len(reference) / (INDEPENDENT + len(reference))
    for i, (found, truth) in enumerate(zip(theta.T.double(), reference.T.double(), strict=True)):
        tails = float(((truth - truth.mean()) / truth.std()).pow(4).mean())  # a standard deviation is known so well
        shift = float((found.mean() - truth.mean()) / truth.std()) * effective**0.5
        spread = float(found.std() / truth.std() - 1) / math.sqrt((tails - 1) / 4 / effective)
        largest = float(stats.ks_2samp(found.numpy(), truth.numpy()).statistic) * effective**0.5
        where, checks = f"{name} {observation}, theta[{i}]", 3 * theta.shape[1]
        judge(f"{where}, mean", shift, 2 * float(stats.norm.sf(abs(shift))), checks)
        judge(f"{where}, sd", spread, 2 * float(stats.norm.sf(abs(spread))), checks)
        judge(f"{where}, law", largest, float(stats.kstwobign.sf(largest)), checks)


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_the_next_step_costs_what_it_may():
    likelihood = 3 * torch.randn(1000, dtype=DOUBLE)
    one, wanted = torch.ones(1, dtype=DOUBLE), torch.tensor([500.0])
    step = next_step(likelihood[None], one, wanted)
    weight = (likelihood * step).softmax(0)
    assert float(1 / weight.square().sum()) == pytest.approx(500, rel=1e-3)
    assert next_step(likelihood[None] / 1000, one, wanted) == 1.0


def test_systematic_resampling_is_unbiased_and_even():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(50, dtype=DOUBLE, generator=generator)
    weight = weight / weight.sum()
    counts = torch.stack(
        [torch.bincount(systematic(weight.log(), generator), minlength=50) for _ in range(2000)]
    ).double()
    assert ((counts - 50 * weight).abs() < 1 + 1e-9).all()
    assert_mean(counts, 50 * weight, name="copies")


# -- as a user meets it -----------------------------------------------------------------------------------------------


def test_a_seed_repeats_everything(y):
    outcomes = []
    for _ in range(2):
        smc = gm.infer.SMC(normal, 100, num_runs=2, **OPTIONS)
        smc.run(y)
        outcomes.append((smc.get_samples()["x"], smc.log_evidences))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_particles_start_chains_in_all_modes():
    smc = gm.infer.SMC(two_modes, 1000, num_runs=2, **OPTIONS)
    smc.run()
    energy = gm.infer.potential(two_modes)
    share = (energy.initial(400, smc)[:, 0] > 0).double().mean()
    assert abs(float(share) - 0.3) < 0.12


def test_runs_that_disagree_are_reported():
    smc = gm.infer.SMC(lambda: two_modes(dim=20, distance=8.0), 32, num_runs=4, max_moves=2, **OPTIONS)
    with pytest.warns(UserWarning, match="runs disagree"):
        smc.run()
    assert smc.log_evidence_error > 0.2


def test_shapes_and_reports(y, capsys):
    smc = gm.infer.SMC(normal, 64, num_runs=3, **OPTIONS)
    with pytest.raises(RuntimeError, match="run"):
        smc.get_samples()
    smc.run(y)
    assert smc.get_samples(group_by_chain=True)["x"].shape == (3, 64, 3)
    assert smc.get_samples(10)["x"].shape == (10, 3)
    assert smc.sample_stats["lp"].shape == (3, 64)
    assert all(stages[-1].inverse_temperature == 1.0 for stages in smc.stages)
    assert all(0 < stage.ess <= 64 for stages in smc.stages for stage in stages)
    smc.summary()
    assert "log evidence" in capsys.readouterr().out
    idata = gm.diagnostics.to_inference_data(smc, num_prior_samples=0)
    assert idata.posterior["x"].shape == (3, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_particles": 1}, "num_particles"),
        ({"num_runs": 0}, "num_runs"),
        ({"num_moves": 0}, "num_moves"),
        ({"target_ess": 1.5}, "target_ess"),
        ({"moves": "gibbs"}, "moves"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        gm.infer.SMC(normal, **arguments)


def flat():
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))


def impossible():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("never", -torch.inf + 0 * x)


def skewed():
    pyro.sample("x", dist.Gamma(2.0, 1.0))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ModelError, match="'x'"):
        gm.infer.SMC(flat, **OPTIONS).run()
    with pytest.raises(SamplingError, match="finite likelihood"):
        gm.infer.SMC(impossible, 100, **OPTIONS).run()
    with pytest.raises(ModelError, match="Gaussian"):
        gm.infer.SMC(skewed, 100, moves="elliptical", **OPTIONS).run()


# -- tempering --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tempered_chains_find_the_weights_of_modes_and_plain_ones_do_not():
    kernel = gm.infer.ParallelTempering(two_modes, num_temperatures=6)
    mcmc = gm.infer.MCMC(kernel, 500, 150, 32, **OPTIONS)
    mcmc.run()
    x = mcmc.get_samples()["x"]
    assert abs(float((x[:, 0] > 0).double().mean()) - 0.3) < 0.05
    expected = 0.5 * 3 / math.hypot(3, 0.5)  # of the coordinates that have one mode
    assert torch.allclose(x[:, 1:].std(0), torch.full((2,), expected, dtype=DOUBLE), rtol=0.05)
    assert float(kernel.ladder[0]) == 0 and float(kernel.ladder[-1]) == 1
    assert float(kernel.swap_rate.max() - kernel.swap_rate.min()) < 0.15
    assert mcmc.sample_stats["lp"].shape == (32, 500)

    plain = gm.infer.MCMC(gm.infer.HMC(two_modes), 100, 100, 32, **OPTIONS)
    plain.run()
    assert float(plain.diagnostics()["x"]["nested_r_hat"].max()) > 1.5


def test_a_tempered_run_goes_on_where_it_was():
    kernel = gm.infer.ParallelTempering(two_modes, num_temperatures=4)
    kernel.begin(8, 10, seed=3)
    for _ in range(6):
        kernel.advance()
    tensors, numbers = kernel.state_dict()
    saved = {name: x.clone() for name, x in tensors.items()}, {**numbers, "steps": [dict(s) for s in numbers["steps"]]}
    for _ in range(8):
        kernel.advance()
    expected = kernel.state.position
    again = gm.infer.ParallelTempering(two_modes, num_temperatures=4)
    again.begin(8, 10, seed=3)
    again.load_state_dict(*saved)
    for _ in range(8):
        again.advance()
    assert torch.equal(again.state.position, expected)


def test_tempering_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="num_temperatures"):
        gm.infer.ParallelTempering(two_modes, num_temperatures=1)
    with pytest.raises(ModelError, match="'x'"):
        gm.infer.MCMC(gm.infer.ParallelTempering(flat), 10, 10, 8, **OPTIONS).run()


def test_tempering_refuses_options_that_it_would_ignore():
    with pytest.raises(TypeError, match="step_size: not an option"):
        gm.infer.ParallelTempering(two_modes, step_size=0.1)


@pytest.mark.slow
def test_tempering_inside_pyro():
    kernel = gm.infer.ParallelTempering(lambda: two_modes(dim=1), num_temperatures=6)
    pyro.set_rng_seed(1)
    mcmc = pyro.infer.MCMC(kernel, num_samples=3000, warmup_steps=600, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["x"][:, 0]
    assert abs(float((x > 0).double().mean()) - 0.3) < 0.1


def test_a_likelihood_beyond_reach_is_an_error_and_not_a_prior(monkeypatch):
    monkeypatch.setattr("pyro_genmods.foundation.annealing.MOST_STAGES", 3)
    with pytest.raises(SamplingError, match="3 stages"):
        gm.infer.SMC(lambda: two_modes(dim=20, distance=8.0), 32, **OPTIONS).run()


def test_an_interrupt_keeps_finished_runs(y, monkeypatch):
    smc, once = gm.infer.SMC(normal, 64, num_runs=3, **OPTIONS), gm.infer.SMC._one

    def interrupted(self, index, seed):
        if index == 2:
            raise KeyboardInterrupt
        return once(self, index, seed)

    monkeypatch.setattr(gm.infer.SMC, "_one", interrupted)
    with pytest.warns(UserWarning, match="2 of 3 runs"):
        smc.run(y)
    assert smc.get_samples(group_by_chain=True)["x"].shape == (2, 64, 3) and smc.num_chains == 2
