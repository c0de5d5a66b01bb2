"""Samplers of diffusions against exact recursions of Gaussian data, their grids, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pyro
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_genmods as gm
from pyro_genmods import evolve
from pyro_genmods.foundation.divergence import rademacher
from pyro_genmods.foundation.errors import DensityError

from .statistics import assert_mean
from .test_diffusion import DOUBLE, Mixture, lattice, lattice_draws, ring, ring_draws

import zuko  # isort: skip  (the package puts right what importing zuko changes)

# -- the linear recursion ---------------------------------------------------------------------------------------------
# Gaussian data of mean MEAN and variances VARIANCE, taken to be white: coordinates do not mix, nothing cancels, and a
# sampler of few steps is far from the data. Its law is Gaussian, with moments in closed form.

MEAN, VARIANCE = torch.tensor([0.7, -1.2], dtype=DOUBLE), torch.tensor([0.2, 0.6], dtype=DOUBLE)
Affine = tuple[Tensor, Tensor]  # slope and intercept, of each coordinate


def gaussian() -> gm.Diffusion:
    network = Mixture(torch.ones(1, dtype=DOUBLE), MEAN[None], torch.diag(VARIANCE)[None])
    return gm.Diffusion(2, network=network, parameterization="denoised").to(DOUBLE)


def spread(t: Tensor) -> Tensor:
    return t.cos().square() * VARIANCE + t.sin().square()


def velocity(t: Tensor) -> Affine:
    return t.cos() * t.sin() * (1 - VARIANCE) / spread(t), -t.sin() * MEAN / spread(t)


def after(f: Affine, u: Affine) -> Affine:
    """``f(u)``."""
    return f[0] * u[0], f[0] * u[1] + f[1]


def sum_of(*terms: tuple[Tensor | float, Affine]) -> Affine:
    return sum(w * a for w, (a, _) in terms), sum(w * b for w, (_, b) in terms)


def adams_bashforth(angles: Tensor) -> Affine:
    u, before = (torch.ones(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)), None
    for t, s in pairwise(angles):
        h, v = s - t, after(velocity(t), u)
        ratio = 0.0 if before is None else h / (2 * before[0])
        old = v if before is None else before[1]
        u, before = sum_of((1, u), (h * (1 + ratio), v), (-h * ratio, old)), (h, v)
    return u


def heun(angles: Tensor) -> Affine:
    u = torch.ones(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    for t, s in pairwise(angles):
        one = after(velocity(t), u)
        two = after(velocity(s), sum_of((1, u), (s - t, one)))
        u = sum_of((1, u), ((s - t) / 2, one), ((s - t) / 2, two))
    return u


def dpm_solver(angles: Tensor) -> Affine:
    """With the posterior mean of a Gaussian as the datum, and ratios of signal to noise instead of their logarithms."""
    u, before = (torch.ones(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)), None
    for t, s in pairwise(angles):
        gain = t.cos() * VARIANCE / spread(t)
        datum = after((gain, MEAN * (1 - gain * t.cos())), u)
        grown = t.tan() / s.tan()  # of signal to noise
        ratio = 0.0 if before is None else grown.log() / (2 * before[0])
        old = datum if before is None else before[1]
        change = s.cos() * (1 - 1 / grown)
        u = sum_of((s.sin() / t.sin(), u), (change * (1 + ratio), datum), (-change * ratio, old))
        before = grown.log(), datum
    return u


RECURSIONS = [
    (evolve.AdamsBashforth, adams_bashforth, {}),
    (evolve.AdamsBashforth, adams_bashforth, {"schedule": evolve.EDM()}),
    (evolve.DPMSolver, dpm_solver, {}),
    (evolve.DPMSolver, dpm_solver, {"schedule": evolve.VP()}),
    (evolve.Heun, heun, {}),
]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("kind", "recursion", "options"), RECURSIONS)
def test_a_deterministic_sampler_is_the_linear_recursion(kind, recursion, options, steps):
    model = gaussian()
    slope, intercept = (part / math.cos(model.bottom) for part in recursion(model.angles(steps, **options)))
    z = torch.randn(20, 2, dtype=DOUBLE)
    found = model.sampled_by(kind(steps, **options))().push(z)
    assert torch.allclose(found, slope * z + intercept, rtol=1e-11, atol=1e-11)
    assert (slope.square() - VARIANCE).abs().max() > 1e-3, "no bias to be seen"


def corrected(sampler: evolve.PredictorCorrector, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance after the ancestral chain with Langevin's steps."""
    mean, variance = torch.zeros(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
    for t, s in pairwise(angles):
        kept = (s.tan() / t.tan()).square()  # of the noise
        datum = t.cos() * VARIANCE / spread(t), MEAN * t.sin().square() / spread(t)
        noise = (1 - t.cos() * datum[0]) / t.sin(), -t.cos() * datum[1] / t.sin()
        step = sum_of((s.cos(), datum), (s.sin() * kept.sqrt(), noise))
        mean = step[0] * mean + step[1]
        variance = step[0].square() * variance + s.sin().square() * (1 - kept)
        delta = (sampler.size * s.sin()).square()
        for _ in range(sampler.corrections):
            mean = mean - delta * (mean - s.cos() * MEAN) / spread(s)
            variance = (1 - delta / spread(s)).square() * variance + 2 * delta
    return mean, variance


def test_predictor_and_corrector_are_the_linear_recursion():
    """Exactly: its law is a pushforward of all its noise, whose squared slopes add up to the variance."""
    model, sampler = gaussian(), evolve.PredictorCorrector(4, corrections=2, size=0.6)
    mean, variance = corrected(sampler, model.angles(4))
    law = model.sampled_by(sampler)()
    rows = torch.eye(2 * (1 + sampler.draws), dtype=DOUBLE).reshape(-1, 1 + sampler.draws, 2)
    centre = law.push(torch.zeros_like(rows[0]))
    slopes = law.push(rows) - centre
    assert torch.allclose(centre * math.cos(model.bottom), mean, rtol=1e-11)
    assert torch.allclose(slopes.square().sum(0) * math.cos(model.bottom) ** 2, variance, rtol=1e-11)
    draws = law.sample((40000,)) * math.cos(model.bottom)
    assert_mean(draws, mean)
    assert_mean((draws - mean).square(), variance, name="variance")
    assert (variance - VARIANCE).abs().max() > 1e-3, "no bias to be seen"


def reversed_equation(schedule: evolve.Schedule, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of Euler and Maruyama's path, in the units of the schedule, by the score in closed form."""
    times = schedule.times(steps).to(DOUBLE)
    mean, variance = torch.zeros(2, dtype=DOUBLE), schedule.scale(times[0]).square().expand(2)
    for t, s in pairwise(times):
        signal, noise = schedule.alpha(t), schedule.sigma(t)
        steep = schedule.diffusion(t).square() / (signal.square() * VARIANCE + noise.square())
        slope = 1 + (t - s) * (-schedule.drift(t) - steep)
        mean = slope * mean + (t - s) * steep * signal * MEAN
        variance = slope.square() * variance + (t - s) * schedule.diffusion(t).square()
    return mean / schedule.scale(times[-1]), variance / schedule.scale(times[-1]).square()


@pytest.mark.parametrize(
    ("schedule", "steps"), [(evolve.VP(), 12), (evolve.SubVP(), 12), (evolve.EDM(0.01, 20.0), 30)], ids=str
)
def test_the_reverse_equation_is_the_linear_recursion(schedule, steps):
    model = gaussian()
    mean, variance = reversed_equation(schedule, steps)
    draws = model().sample((60_000,), sampler=evolve.ReverseSDE(steps, schedule=schedule)) * math.cos(model.bottom)
    assert_mean(draws, mean)
    assert_mean((draws - mean).square(), variance, name="variance")
    assert ((variance - VARIANCE).abs() / variance).max() > 0.02, "no bias to be seen"


# -- grids and accuracy -----------------------------------------------------------------------------------------------


def endpoint_errors(model: gm.Diffusion, calls: int, z: Tensor) -> Tensor:
    with torch.no_grad():
        truth = model.sampled_by(evolve.RK4(128))().push(z)
        return (model.sampled_by(evolve.AdamsBashforth(calls))().push(z) - truth).norm(dim=-1)


LIMITS = {16: 3e-3, 64: 3e-4}  # of the median


def test_endpoints_of_few_calls():
    model, z = ring(), torch.randn(512, 2, dtype=DOUBLE)
    for calls, limit in LIMITS.items():
        assert float(endpoint_errors(model, calls, z).median()) < limit


@pytest.mark.slow
def test_a_grid_for_densities_costs_draws_a_factor():
    """Calibration moves error from the worst draws to the usual ones.

    It makes even the local errors of a method of order four, of which those few rows have most that pass between modes.
    The two-step method then errs twice as much in the median, up to 1.4 times as much on average, and less at worst.
    """
    z, even, fitted = torch.randn(512, 2, dtype=DOUBLE), ring(), ring()
    fitted.calibrate(tolerance=1.0, x=ring_draws(512))
    for calls, limit in LIMITS.items():
        before, now = (endpoint_errors(model, calls, z) for model in (even, fitted))
        assert float(now.median()) < 2.5 * limit
        assert float(now.mean()) < 1.6 * float(before.mean())
        assert float(now.max()) < float(before.max())


def test_the_order_of_dpm_solver_is_two_up_to_a_logarithm():
    """In the logarithm of signal to noise the grid starts infinitely far away, and is coarse there however fine it is.

    The steps that are ``1, 2, ..., n`` from pure noise add ``h^2 / n`` each: the error is ``h^2 (a + b log N)``.
    """
    model, z = ring(), torch.randn(256, 2, dtype=DOUBLE)
    with torch.no_grad():
        truth = model.sampled_by(evolve.RK4(128))().push(z)
        errors = [
            n**2 * float((model.sampled_by(evolve.DPMSolver(n))().push(z) - truth).norm(dim=-1).median())
            for n in (32, 64, 128, 256)
        ]
    growth = [b - a for a, b in pairwise(errors)]
    assert max(growth) < 1.15 * min(growth), "each doubling adds the same"


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(
    "schedule", [None, evolve.EDM(0.005, 60.0), evolve.VE()], ids=lambda s: type(s).__name__ if s else "default"
)
def test_the_reverse_equation_visits_the_grid_of_its_schedule(schedule, dtype):
    model = ring().to(dtype)
    sampler, seen = evolve.ReverseSDE(20, schedule=schedule), []
    model.network.register_forward_hook(lambda _, given, __: seen.append(given[0].unique().double()))
    model.sampled_by(sampler)().sample((4,))
    schedule = sampler.schedule
    expected = schedule.angle(schedule.times(20).to(DOUBLE))
    assert torch.allclose(torch.cat(seen), expected[:-1], rtol=0, atol=1e-12 if dtype is DOUBLE else 1e-6)
    assert float(expected.tan()[-1]) >= model.sigma_min, "noise at the end, where nobody asks any more"
    if isinstance(schedule, evolve.EDM):
        k = torch.arange(20, dtype=DOUBLE)
        levels = (60 ** (1 / 7) + k / 20 * (0.005 ** (1 / 7) - 60 ** (1 / 7))) ** 7
        assert torch.allclose(torch.cat(seen).tan(), levels, rtol=1e-9 if dtype is DOUBLE else 1e-3)


# -- the law that only draws ------------------------------------------------------------------------------------------


def test_what_draws_its_noise_inside_is_a_distribution_all_the_same(tmp_path):
    """The battery of ``test_contract.py`` asks for noise to push; what is left without is asked here."""
    torch.manual_seed(0)
    model = gm.Diffusion(2, context_features=1, support=constraints.positive)
    model.standardize(torch.rand(50, 2) + 1, torch.randn(50, 1))
    prior = model.sampled_by(evolve.ReverseSDE(3))
    law = prior(torch.randn(4, 1))
    assert (law.batch_shape, law.event_shape, law.has_rsample) == ((4,), (2,), False)
    wide = law.expand([3, 4])
    x = wide.sample((5,))
    assert x.shape == (5, 3, 4, 2) and bool(law.support.check(x).all()) and len(x.reshape(-1, 2).unique(dim=0)) == 60
    assert law.to_event(1).event_shape == (4, 2) and law.mask(False).log_prob(x[0, 0]).shape == (4,)
    for ask in (law.rsample, lambda: law.log_prob(x[0, 0]), lambda: law.push(torch.zeros(4, 2)), law.score):
        with pytest.raises(DensityError):
            ask(x[0, 0]) if ask == law.score else ask()
    gm.save(prior, tmp_path / "prior")
    again = gm.load(tmp_path / "prior")
    draws = []
    for one in (prior, again):
        torch.manual_seed(1)
        draws.append(one(torch.ones(1)).sample((6,)))
    assert torch.equal(*draws)


def test_it_is_drawn_from_in_a_program_and_refused_in_noise_space():
    prior = gm.Diffusion(2).sampled_by(evolve.ReverseSDE(3))

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("x", prior())

    assert Predictive(model, num_samples=4)()["x"].shape == (4, 3, 2)
    with pytest.raises(TypeError, match="base and push"):
        pyro.poutine.reparam(model, {"x": gm.infer.PushforwardReparam()})()


# -- estimated divergences --------------------------------------------------------------------------------------------


def with_probes(model: gm.Diffusion, probes: Tensor) -> gm.Diffusion:
    """The same law, its divergence estimated by these."""
    options = {"parameterization": "denoised", "sigma_min": model.sigma_min, "trace": "hutchinson"}
    estimate = gm.Diffusion(model.features, network=model.network, solver=model.solver, **options).to(DOUBLE)
    estimate.whitening.load_state_dict(model.whitening.state_dict())
    estimate.probes = probes
    return estimate


def deviations(model: gm.Diffusion, x: Tensor, probes: Callable[..., Tensor], number: int) -> Tensor:
    """Standard deviation of the log density of each row among so many probes of its own."""
    rows = x.repeat(number, 1)
    with torch.no_grad():
        found = with_probes(model, probes(1, *rows.shape, dtype=DOUBLE))().log_prob(rows)
    return found.reshape(number, len(x)).std(0)


def test_probes_of_two_signs_vary_less_than_normal_ones():
    r"""Beside zuko's ``exact=False``, which draws normal ones, on the ring.

    In two dimensions few probes tell all: with :math:`S` the symmetric part of the Jacobian integrated along the path,
    :math:`(1, \pm 1)` estimate :math:`\operatorname{tr} S \pm 2 S_{12}`, and unit vectors twice the diagonal. The
    deviations are :math:`2 |S_{12}|` and :math:`\sqrt 2 \|S\|`, whose ratio is .32 whatever a sampler does.
    """
    model, x = ring(solver=evolve.RK4(16)), ring_draws(800)
    probes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    with torch.no_grad():
        exact = model().log_prob(x)
        plus, minus, first, second = (with_probes(model, probe[None])().log_prob(x) for probe in probes)
        ends = (torch.tensor(angle, dtype=DOUBLE) for angle in (model.bottom, model.top))
        flow = zuko.transforms.FreeFormJacobianTransform(
            lambda t, u: model.denoiser.velocity(t, u, None), *ends, atol=1e-5, rtol=1e-4, exact=False
        )
        z, volume = flow.call_and_ladj(model.noisy(x[:64]).repeat(40, 1))
    assert torch.allclose((plus + minus) / 2, exact, rtol=1e-9)
    base = first + second - exact
    ours = (plus - minus).abs() / 2
    normal = (2 * ((first - base).square() + (second - base).square()) + ours.square()).sqrt()
    theirs = (volume - 0.5 * z.square().sum(-1)).reshape(40, 64).std(0)
    assert float(theirs.mean()) == pytest.approx(float(normal[:64].mean()), rel=0.1)
    assert float(ours.mean()) < 0.35 * float(normal.mean())
    assert float(ours.mean()) < 1.0


def test_probes_of_two_signs_vary_much_less_in_more_dimensions():
    model, x = lattice(solver=evolve.RK4(4)), lattice_draws(16)
    ours, normal = (deviations(model, x, probes, 32).mean() for probes in (rademacher, torch.randn))
    assert float(ours / normal) < 0.2


def test_probes_do_not_matter_to_gaussian_data():
    model = gm.Diffusion(3, trace="hutchinson", solver=evolve.RK4(4)).to(DOUBLE)
    model.standardize(torch.randn(100, 3, dtype=DOUBLE) @ torch.randn(3, 3, dtype=DOUBLE))
    x, found = torch.randn(10, 3, dtype=DOUBLE), []
    for probe in torch.randn(5, 1, 3, dtype=DOUBLE):
        model.probes.copy_(probe)
        found.append(model().log_prob(x))
    assert torch.stack(found).std(0).max() < 1e-12


# -- cost -------------------------------------------------------------------------------------------------------------


def test_a_draw_and_its_density_take_as_many_calls_as_a_density():
    model, x, calls = ring(solver=evolve.RK4(8)), ring_draws(5), []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    law = model()
    for run in (lambda: law.rsample_and_log_prob((5,)), lambda: law.log_prob(x)):
        calls.clear()
        run()
        assert len(calls) == model.cost.score == 32


class NoLooking(TorchDispatchMode):
    """Counts operations that wait for numbers: on a device each would stop the queue."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.removeprefix("aten::") in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unchecked():
    """Validation of values and solutions is off."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    yield
    Distribution.set_default_validate_args(before)


def waits(run: Callable[[], object]) -> int:
    with NoLooking() as mode:
        run()
    return mode.count


SAMPLERS = [
    evolve.AdamsBashforth,
    evolve.DPMSolver,
    evolve.Ancestral,
    evolve.PredictorCorrector,
    evolve.Heun,
    evolve.RK4,
]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_never_wait_for_a_number(kind, unchecked):
    model = gm.Diffusion(2).to(DOUBLE)
    assert waits(lambda: torch.zeros(1).item()) == 1, "it would be seen"
    assert waits(lambda: model.sampled_by(kind(5))().sample((4,))) == 0


def test_densities_and_their_gradients_never_wait_for_a_number(unchecked):
    model = gm.Diffusion(2, context_features=1, solver=evolve.RK4(3)).to(DOUBLE)
    law, x = model(torch.zeros(1, dtype=DOUBLE)), torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)
    for run in (law.log_prob, law.push, law.pull, law.score):
        assert waits(partial(run, x)) == 0, run.__name__
    assert waits(partial(law.rsample_and_log_prob, (4,))) == 0
    assert waits(lambda: law.log_prob(x).sum().backward()) == 0


def test_solutions_that_are_checked_are_looked_at_once():
    counts = []
    for steps in (3, 12):
        law = gm.Diffusion(2, solver=evolve.RK4(steps))()
        counts.append((waits(partial(law.sample, (4,))), waits(partial(law.log_prob, torch.zeros(4, 2)))))
    assert counts[0] == counts[1] == (1, 2), "events are looked at, and what is found"
