"""What diffusions refuse: networks that are not finite, values without a score, grids that turn back, rough densities.

A broken network is NaN below an angle, for all rows or for some. Whoever carries rows there must say at which step, and
which rows, where torch's validation is on, and give NaN for these rows alone where it is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_genmods as gm
from pyro_genmods import evolve
from pyro_genmods.evolve.network import check_level
from pyro_genmods.evolve.samplers import Sampler
from pyro_genmods.foundation.errors import DensityError, IntegrationError, SamplingError, SupportError

EDGE = 0.5  # the angle below which a network breaks
DOUBLE = torch.float64


class Breaking(nn.Module):
    """A velocity that is NaN (or infinite) below an angle, for rows whose context is negative where there is one."""

    def __init__(self, value: float = math.nan, edge: float = EDGE) -> None:
        super().__init__()
        self.value, self.edge = value, edge
        self.rate = nn.Parameter(torch.tensor(0.3))

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        lost = (t < self.edge) if c is None else (t < self.edge) & (c[:, :1] < 0)
        return torch.where(lost, self.value, self.rate * u.sin())


class Halves(Sampler):
    """Somebody's own sampler: Euler's method, asked for the noise and not the velocity."""

    def run(self, denoiser: Any, u: Tensor, c: Tensor | None, angles: Tensor, draw: Any) -> Tensor:
        for t, s in pairwise(angles):
            noise = denoiser.noise(t, u, c)
            u = u + (s - t) * (noise - t.sin() * u) / t.cos().clamp_min(1e-3)
        return u


@contextmanager
def unvalidated() -> Iterator[None]:
    with pyro.validation_enabled(False):
        yield


def broken(context: int = 0, **options: Any) -> gm.Diffusion:
    value = options.pop("value", math.nan)
    return gm.Diffusion(2, context, network=Breaking(value), **options)


SAMPLERS = [
    evolve.AdamsBashforth(16),
    evolve.AdamsBashforth(16, schedule=evolve.EDM()),
    evolve.DPMSolver(16),
    evolve.Ancestral(16),
    evolve.Ancestral(16, eta=0.0),
    evolve.PredictorCorrector(16, corrections=2),
    evolve.ReverseSDE(64),
    evolve.Heun(16),
    Halves(16),
]


def first_step(model: gm.Diffusion, sampler: Any) -> int:
    """The step, counted from one, in which the network is first asked below the edge."""
    angles = model.angles(sampler.steps, getattr(sampler, "schedule", None))
    before = int((angles >= EDGE).sum())  # angles[before] is the first below
    within = isinstance(sampler, evolve.PredictorCorrector | evolve.Heun)  # a step also asks at its end
    return before if within else before + 1


# -- samplers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_sampler_names_the_step_and_the_rows_of_a_broken_network(sampler, value):
    model = broken(value=value)
    step = f"step {first_step(model, sampler)} of {sampler.steps}"
    with pytest.raises(IntegrationError, match=rf"8 .*row.*{step}\b") as caught:
        model().sample((8,), sampler=sampler)
    assert "log_likelihood" not in str(caught.value)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_it_names_the_rows_that_are_lost(sampler):
    model, context = broken(1), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])[:, None]
    with pytest.raises(IntegrationError, match=re.escape("2 of 5 row(s) (the first: [1, 3])")):
        model.sampled_by(sampler)(context).sample()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_without_validation_the_lost_rows_alone_are_nan(sampler):
    model, context = broken(1), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])[:, None]
    sound = torch.tensor([True, False, True, False, True])
    with unvalidated():
        torch.manual_seed(0)
        x = model.sampled_by(sampler)(context).sample()
        torch.manual_seed(0)
        others = model.sampled_by(sampler)(context.abs()).sample()
    assert x[~sound].isnan().all()
    assert torch.equal(x[sound], others[sound])


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if getattr(s, "differentiable", True)], ids=repr)
def test_pushes_and_pathwise_draws_refuse_as_well(sampler):
    prior = broken().sampled_by(sampler)
    law = prior()
    with pytest.raises(IntegrationError, match="step"):
        law.rsample((3,))
    with pytest.raises(IntegrationError, match="step"):
        law.push(torch.randn(3, *prior.noise_shape))


def test_a_sound_network_is_not_disturbed():
    """The same draws and the same gradients with and without the look at the end."""
    model = gm.Diffusion(2, network=Breaking(edge=-1.0))
    for sampler in (evolve.AdamsBashforth(8), evolve.PredictorCorrector(8)):
        law, found = model.sampled_by(sampler)(), []
        for validate in (True, False):
            torch.manual_seed(0)
            with pyro.validation_enabled(validate):
                x = law.rsample((5,))
            found.append((x, *torch.autograd.grad(x.sum(), model.network.rate)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [evolve.AdamsBashforth, evolve.DPMSolver, evolve.Ancestral, evolve.PredictorCorrector])
def test_a_processor_is_asked_for_numbers_once(kind, monkeypatch):
    """Looking at numbers makes a device wait; how often does not depend on the steps."""
    model, looks = gm.Diffusion(2, network=Breaking(edge=-1.0)), []
    truth = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda x: looks.append(1) or truth(x))
    counts = []
    for steps in (4, 32):
        looks.clear()
        model.sampled_by(kind(steps))().sample((3,))
        counts.append(len(looks))
    assert counts[0] == counts[1] <= 1


@pytest.mark.parametrize("validate", [True, False])
def test_transforms_and_tracers_get_nan_rows(validate):
    """Nothing may branch on numbers there, whatever torch's validation says."""
    law = broken().sampled_by(evolve.AdamsBashforth(8))()
    z = torch.randn(3, 4, 2)
    with pyro.validation_enabled(validate):
        assert torch.vmap(law.push)(z).isnan().all()
        graph = make_fx(lambda z: law.model.push_rows(z, None))(z[0])
        assert graph(z[0]).isnan().all()


def test_the_engine_counts_a_lost_chain_as_impossible():
    """Where half of noise space breaks the network, chains stay in the other half, and end."""

    class Half(Breaking):
        def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
            return torch.where((t < EDGE) & (u[:, :1] < 0), math.nan, 0.0 * self.rate * u)

    prior = gm.Diffusion(2, network=Half()).sampled_by(evolve.AdamsBashforth(4))

    def model() -> None:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(2))

    noisy = pyro.poutine.reparam(model, {"x": gm.infer.PushforwardReparam()})
    mcmc = gm.infer.MCMC(gm.infer.HMC(noisy), num_samples=20, num_chains=8, warmup_steps=20, progress_bar=False, seed=0)
    mcmc.run()
    assert (mcmc.get_samples()["x_base"][:, 0] > 0).all()


# -- the chain opened up -----------------------------------------------------------------------------------------------


def test_opened_steps_refuse_at_the_end_and_name_the_first_step():
    model = broken()
    steps, first = model().steps(12).start(5), int((model.angles(12) >= EDGE).sum()) + 1
    assert [next(steps).index for _ in range(12)] == list(range(12))
    with pytest.raises(IntegrationError, match=rf"5 of 5 .*step {first} of 12\b"):
        next(steps)


def test_particles_that_were_lost_and_replaced_are_forgiven():
    """Who steers may cure them: copies of sound particles take the places of those that are lost."""
    model = broken(1)
    steps = model(torch.tensor([[1.0], [-1.0]])).steps(8).start(1)
    for _ in steps:
        steps.fork(torch.zeros(2, dtype=torch.long))
    assert steps.value.shape == (1, 2, 2) and steps.value.isfinite().all()


def test_opened_steps_are_nan_without_validation():
    with unvalidated():
        steps = broken()().steps(8).start(5)
        assert [step.index for step in steps] == list(range(9))
        assert steps.value.isnan().all()


# -- posteriors --------------------------------------------------------------------------------------------------------


def near_one(x: Tensor) -> Tensor:
    return dist.Normal(x, 0.5).log_prob(torch.ones(2)).sum(-1)


def anywhere_positive(x: Tensor) -> Tensor:
    """A likelihood that is minus infinity at NaN, and never NaN itself."""
    return torch.where((x > -10).all(-1), near_one(x.nan_to_num(0.0)), -torch.inf)


GUIDANCES = [evolve.MomentMatching(), evolve.MomentMatching(exact_features=1), evolve.PiGDM(), evolve.DPS()]


@pytest.mark.parametrize("likelihood", [near_one, anywhere_positive])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
@pytest.mark.parametrize("validate", [True, False])
def test_twisted_particles_blame_the_network(guidance, likelihood, validate):
    model = broken()
    smc = evolve.TwistedSMC(model, likelihood, 50, steps=10, guidance=guidance, seed=0)
    first = int((model.angles(10) >= EDGE).sum()) + 1
    with pyro.validation_enabled(validate), pytest.raises(IntegrationError, match=rf"step {first} of 10\b") as caught:
        smc.run()
    assert "log_likelihood" not in str(caught.value)


@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
@pytest.mark.parametrize("sampler", [evolve.Ancestral(10), evolve.AdamsBashforth(10), evolve.RK4(10)], ids=repr)
def test_guided_samplers_blame_the_network(guidance, sampler):
    law = evolve.guided(broken(), near_one, guidance, sampler=sampler)()
    with pytest.raises(IntegrationError, match=r"step \d+ of 10\b") as caught:
        law.sample((7,))
    assert "log_likelihood" not in str(caught.value)


def test_classifier_free_guidance_follows_the_rule_of_the_samplers():
    model = broken(1, context_dropout=0.2)
    law = evolve.guided(model, None, evolve.ClassifierFree(2.0))(-torch.ones(1))
    with pytest.raises(IntegrationError, match=r"step \d+ of 100\b"):
        law.sample((7,))
    with unvalidated():
        assert law.sample((7,)).isnan().all()


@pytest.mark.parametrize("validate", [True, False])
def test_split_gibbs_blames_the_network(validate):
    gibbs = evolve.SplitGibbs(broken(), near_one, 20, sweeps=5, reverse_steps=8, seed=0)
    with pyro.validation_enabled(validate), pytest.raises(IntegrationError, match=r"step \d of 8\b") as caught:
        gibbs.run()
    assert "log_likelihood" not in str(caught.value)


@pytest.mark.parametrize("run", [evolve.TwistedSMC, evolve.SplitGibbs])
def test_a_likelihood_that_is_nan_is_still_to_blame(run):
    model = gm.Diffusion(2, network=Breaking(edge=-1.0))
    with pytest.raises(SamplingError, match="log_likelihood"):
        run(model, lambda x: near_one(x) * math.nan, 20, seed=0).run()


# -- scores and divergences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_without_a_score_is_refused(bad):
    law = gm.Diffusion(2)()
    x = torch.tensor([[0.3, -0.2], [bad, 0.0]])
    with pytest.raises(SupportError, match="value"):
        law.score(x)
    with unvalidated():
        score = gm.Diffusion(2)().score(x)
        assert score[0].isfinite().all() and score[1].isnan().all()


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_so_is_one_outside_the_support(bad):
    model = gm.Diffusion(2, support=constraints.positive)
    x = torch.tensor([[0.3, 0.2], [bad, 1.0]])
    with pytest.raises(SupportError, match="value"):
        model().score(x)
    with unvalidated():
        score = model().score(x)
        assert score[0].isfinite().all() and score[1].isnan().all()


@pytest.mark.parametrize("level", [0.0, -0.1, 1e-9, math.nan, math.inf])
def test_a_level_that_the_network_never_saw_is_refused(level):
    model = gm.Diffusion(2)
    for action in (lambda: model().score(torch.zeros(1, 2), level=level), lambda: model.with_score_force(level)):
        with pytest.raises(ValueError, match=r"level: got .*sigma_min"):
            action()


def test_levels_that_calibration_chooses_are_among_those():
    model = gm.Diffusion(2, network=Breaking(edge=-1.0), sigma_min=0.1)
    check_level(model.score_level, model.sigma_min)
    model.calibrate(x=torch.randn(100, 2))
    check_level(model.score_level, model.sigma_min)


def test_a_score_names_the_rows_of_a_broken_network():
    model = broken(1)
    context = torch.tensor([1.0, -1.0, 1.0])[:, None]
    x = torch.zeros(3, 2)
    with pytest.raises(IntegrationError, match=r"1 of 3 .*\[1\].* angle"):
        model(context).score(x)
    with unvalidated():
        assert model(context).score(x).isnan().any(-1).tolist() == [False, True, False]


def test_a_divergence_names_the_rows_of_a_broken_network():
    prior, q = broken()(), dist.Normal(torch.zeros(4, 2), 0.01).to_event(1)
    with pytest.raises(IntegrationError, match=r"of 4 row"):
        torch.distributions.kl_divergence(q, prior)
    with unvalidated():
        assert torch.distributions.kl_divergence(q, prior).isnan().any()


# -- schedules ---------------------------------------------------------------------------------------------------------

SCHEDULES = [
    evolve.VP(),
    evolve.SubVP(),
    evolve.VE(),
    evolve.EDM(),
    evolve.Rectified(),
    evolve.Cosine(),
    evolve.Angle(),
]


class Zigzag(evolve.Rectified):
    """Times that go back and forth."""

    def times(self, steps: int) -> Tensor:
        times = super().times(steps).clone()
        if steps > 2:
            times[[1, 2]] = times[[2, 1]]
        return times


class Upwards(evolve.Rectified):
    def times(self, steps: int) -> Tensor:
        return super().times(steps).flip(0)


class Short(evolve.Rectified):
    def times(self, steps: int) -> Tensor:
        return super().times(steps)[:-1]


class Halfway(evolve.Rectified):
    def times(self, steps: int) -> Tensor:
        return torch.linspace(0.5, self.ends[0], steps + 1, dtype=DOUBLE)


class Lost(evolve.Rectified):
    def times(self, steps: int) -> Tensor:
        times = super().times(steps).clone()
        times[1:-1] = math.nan
        return times


class Late(evolve.Rectified):
    """Right for the numbers of steps that anybody tries."""

    def times(self, steps: int) -> Tensor:
        return super().times(steps).flip(0) if steps == 7 else super().times(steps)


@pytest.mark.parametrize("schedule", [Zigzag, Upwards, Short, Halfway, Lost])
def test_times_that_do_not_go_down_are_refused_when_the_model_is_built(schedule):
    for build in (
        schedule().check,
        lambda: gm.Diffusion(2, schedule=schedule()),
        lambda: evolve.AdamsBashforth(4, schedule=schedule()),
        lambda: evolve.ReverseSDE(4, schedule=schedule()),
    ):
        with pytest.raises(ValueError, match=rf"{schedule.__name__}\.times\(\d+\).* torch\.linspace"):
            build()


def test_times_of_other_numbers_of_steps_are_refused_when_they_are_used():
    model, schedule = gm.Diffusion(2), Late()
    schedule.check()
    with pytest.raises(ValueError, match=r"Late\.times\(7\)"):
        model.angles(7, schedule)
    with pytest.raises(ValueError, match=r"Late\.times\(7\)"):
        model().sample((2,), sampler=evolve.ReverseSDE(7, schedule=schedule))
    assert model.angles(8, schedule).shape == (9,)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("sigma_min", [1e-3, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 16, 200])
def test_grids_of_schedules_go_down_to_the_models_own_ends(schedule, sigma_min, steps):
    """Also where the schedule begins below the model's least noise, where steps of no length would divide by zero."""
    model = gm.Diffusion(2, sigma_min=sigma_min).double()
    angles = model.angles(steps, schedule)
    assert (angles.diff() < 0).all()
    assert torch.equal(angles[[0, -1]], model.knots[[-1, 0]])
    if schedule.ends[0] >= sigma_min and sigma_min == 1e-3:
        assert torch.allclose(angles[1:-1], schedule.angles(steps)[1:-1], rtol=1e-9)
    for kind in (evolve.AdamsBashforth, evolve.DPMSolver):
        assert model().sample((3,), sampler=kind(steps, schedule=schedule)).isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_base_is_where_white_data_end(schedule):
    r"""By the schedule's own equation: :math:`V_T = \alpha_T^2 (V_0 / \alpha_0^2 + \int g^2 / \alpha^2)`."""
    base = schedule.base
    assert float(base.loc) == 0 and base.scale.dtype == DOUBLE
    if isinstance(schedule, evolve.Angle):  # ends where no data are left
        assert float(base.scale) == pytest.approx(1.0)
        return
    low, high = (torch.tensor(end, dtype=DOUBLE) for end in schedule.ends)
    t = torch.linspace(float(low), float(high), 1_000_001, dtype=DOUBLE)
    integral = torch.trapezoid((schedule.diffusion(t) / schedule.alpha(t)).square(), t)
    variance = schedule.alpha(high).square() * (schedule.scale(low).square() / schedule.alpha(low).square() + integral)
    assert float(base.variance) == pytest.approx(float(variance), rel=1e-3)


# -- estimated densities -----------------------------------------------------------------------------------------------


def rough_diffusion(**options: Any) -> gm.Diffusion:
    return gm.Diffusion(2, trace="hutchinson", solver=evolve.Euler(2), **options)


def rough_flow(**options: Any) -> gm.ContinuousFlow:
    return gm.ContinuousFlow(2, trace="hutchinson", hidden_features=(8,), solver=gm.transform.Euler(2), **options)


ROUGH = [rough_diffusion, rough_flow]


def latent(prior: gm.GenerativeModel, wrap: Callable[[Any], Any] = lambda law: law) -> Callable[[], None]:
    def model() -> None:
        law = wrap(prior())
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(law.event_dim), obs=torch.ones(2))

    return model


def run(kernel: Any) -> Any:
    mcmc = gm.infer.MCMC(kernel, num_samples=2, warmup_steps=2, num_chains=4, progress_bar=False, seed=0)
    mcmc.run()
    return mcmc.get_samples()


def hmc(model: Callable[[], None], **options: Any) -> Any:
    return run(gm.infer.HMC(model, num_steps=1, level="eager", **options))


KERNELS = {
    "HMC": hmc,
    "MALA": lambda model: run(gm.infer.MALA(model, level="eager")),
    "ULA": lambda model: run(gm.infer.ULA(model, level="eager")),
    "ParallelTempering": lambda model: run(gm.infer.ParallelTempering(model, num_temperatures=2, level="eager")),
    "SMC": lambda model: gm.infer.SMC(
        model, 16, num_runs=1, max_moves=2, progress_bar=False, seed=0, level="eager"
    ).run(),
    "HMC in Pyro's MCMC": lambda model: pyro.infer.MCMC(
        gm.infer.HMC(model, num_steps=1, level="eager"), num_samples=2, warmup_steps=2, disable_progbar=True
    ).run(),
    "HMC on a potential": lambda model: run(
        gm.infer.HMC(potential_fn=gm.infer.potential(model, level="eager"), num_steps=1)
    ),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_kernels_refuse_a_density_with_frozen_probes_unless_told(kernel):
    with pytest.raises(DensityError, match=r"'x'.*infer\.\w+.*PushforwardReparam.*trace='exact'.*estimated=True"):
        kernel(latent(rough_diffusion()))
    kernel(latent(rough_diffusion(estimated=True)))


def test_the_same_holds_for_continuous_flows():
    with pytest.raises(DensityError, match=r"'x'.*infer\.HMC.*estimated=True"):
        hmc(latent(rough_flow()))
    hmc(latent(rough_flow(estimated=True)))


def test_consent_given_later_is_taken():
    prior = rough_diffusion()
    kernel = gm.infer.HMC(latent(prior), num_steps=1, level="eager")
    with pytest.raises(DensityError):
        run(kernel)
    prior.acceptable = True
    run(kernel)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda law: law.expand([3]).to_event(1),
        lambda law: law.mask(True),
        lambda law: dist.TransformedDistribution(law, [dist.transforms.AffineTransform(0.0, 2.0)]),
    ],
    ids=["to_event", "mask", "transform"],
)
def test_wrappers_do_not_hide_it(wrap):
    with pytest.raises(DensityError, match="'x'"):
        hmc(latent(rough_diffusion(), wrap))


def test_nor_do_plates():
    prior = rough_diffusion()

    def model() -> None:
        with pyro.plate("rows", 3):
            latent(prior)()

    with pytest.raises(DensityError, match="'x'"):
        hmc(model)


def test_an_observed_one_is_refused_where_it_depends_on_latents():
    told, alone = rough_diffusion(context_features=1), rough_diffusion()

    def conditional() -> None:
        c = pyro.sample("c", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", told(c), obs=torch.zeros(2))

    def constant() -> None:
        pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("x", alone(), obs=torch.zeros(2))

    with pytest.raises(DensityError, match="'x'"):
        hmc(conditional)
    hmc(constant)


def test_energies_and_potentials_are_not_refused():
    """A potential is a function, and Pyro's own kernels take it; who accepts and rejects by it is asked."""
    model = latent(rough_diffusion())
    energy = gm.infer.potential(model, level="eager")
    assert energy.value(torch.zeros(3, 2)).isfinite().all()
    kernel = pyro.infer.NUTS(model, max_tree_depth=1, step_size=0.1, adapt_step_size=False)
    pyro.infer.MCMC(kernel, num_samples=2, warmup_steps=0, disable_progbar=True).run()


@pytest.mark.parametrize(
    "build",
    [
        lambda: rough_diffusion().with_score_force(estimated=True),
        lambda: rough_diffusion(estimated=True).with_score_force(),
        lambda: gm.Diffusion(2, trace="exact", solver=evolve.RK4(2)),
        lambda: gm.Diffusion(2, parameterization="energy").energy_law(),
        pytest.param(
            lambda: (
                gm.Diffusion(2, parameterization="energy", solver=evolve.RK4(2))
                .energy_law()
                .normalize_at(torch.zeros(2))
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["force", "accepted force", "exact", "energy", "normalised energy"],
)
def test_other_densities_are_taken(build):
    assert build().acceptable
    hmc(latent(build()))


@pytest.mark.parametrize("build", [lambda: rough_diffusion().sampled_by(evolve.AdamsBashforth(2)), rough_flow])
def test_noise_space_is_the_way_out(build):
    model = pyro.poutine.reparam(latent(build()), {"x": gm.infer.PushforwardReparam()})
    assert hmc(model)["x_base"].shape == (8, 2)


@pytest.mark.parametrize("build", ROUGH)
def test_the_consent_is_saved_with_the_model(build, tmp_path):
    for estimated in (False, True):
        gm.save(build(estimated=estimated), tmp_path / "model")
        found = gm.load(tmp_path / "model")
        assert found.acceptable is estimated and found.density is gm.Density.ESTIMATE
    assert gm.Diffusion(2).acceptable and gm.ContinuousFlow(2).acceptable
