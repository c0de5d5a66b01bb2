"""Continuous flows: closed forms of linear fields, what they learn, how well they are solved, how they fail."""

from __future__ import annotations

import copy
import math
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods.foundation.errors import DensityError, IntegrationError, ShapeError
from pyro_genmods.foundation.vector_field import VectorField
from pyro_genmods.infer import MCMC, SMC
from pyro_genmods.transform import RK4, DormandPrince, Euler, Heun
from pyro_genmods.transform.pairs import Pairs

from .linear_gaussian import (
    DOUBLE,
    LinearGaussian,
    Model,
    assert_chain,
    assert_guide,
    chain,
    fit,
    guide_draws,
    measured,
    noisy,
    push_base,
    zuko,
)
from .statistics import assert_mean

SLOW = pytest.mark.slow
MATRIX = torch.tensor([[0.3, 0.8], [-0.2, -0.5]], dtype=DOUBLE)
DRIFT = torch.tensor([0.7, -0.4], dtype=DOUBLE)


class Linear(nn.Module):
    r"""The velocity :math:`A y + b`, or :math:`\cos(t) A y + b`; its flow is a matrix exponential."""

    def __init__(self, matrix: Tensor = MATRIX, drift: Tensor = DRIFT, clock: bool = False) -> None:
        super().__init__()
        self.matrix, self.drift, self.clock = nn.Parameter(matrix.clone()), nn.Parameter(drift.clone()), clock

    def forward(self, t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
        speed = t.cos() if self.clock else 1.0
        return speed * (y @ self.matrix.mT) + self.drift


class Knowing(Linear):
    """The same with its divergence, which spares the chains a Jacobian."""

    def with_divergence(self, t: Tensor, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        return self(t, y, c), self.matrix.trace().expand(len(y))


def linear_flow(dtype: torch.dtype = torch.float32, **options) -> gm.ContinuousFlow:
    network = Knowing().to(dtype)
    return gm.ContinuousFlow(2, network=network, baseline=False, **{"solver": RK4(4, "autograd"), **options}).freeze()


class LinearFlow(LinearGaussian):
    """The measurement of a draw of a linear flow; mean and covariance by the exponential of a block matrix."""

    def __post_init__(self) -> None:
        block = torch.zeros(3, 3, dtype=DOUBLE)
        block[:2, :2], block[:2, 2] = MATRIX, DRIFT
        block = torch.linalg.matrix_exp(block)
        self.mean, self.covariance, self.features = block[:2, 2], block[:2, :2] @ block[:2, :2].mT, 2


def moons(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.1 * torch.randn(n, 2, generator=generator)


@pytest.fixture(scope="module")
def learned() -> gm.ContinuousFlow:
    flow = gm.ContinuousFlow(2, hidden_features=(64, 64, 64))
    gm.fit(flow, moons(8000), max_epochs=60, batch_size=256, learning_rate=3e-3, ema=0.99, seed=0, progress_bar=False)
    return flow


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", [False, True], ids=["autonomous", "clocked"])
@pytest.mark.parametrize("solver", [RK4(32), DormandPrince(1e-9, 1e-10)], ids=["rk4", "adaptive"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_linear_field_is_a_gaussian(clock, solver, trace):
    """``push`` and ``log_prob`` against the matrix exponential; the estimate is off by what its probe says of A."""
    drift = torch.zeros(2, dtype=DOUBLE) if clock else DRIFT
    flow = gm.ContinuousFlow(2, network=Linear(MATRIX, drift, clock), baseline=False, solver=solver, trace=trace)
    time_of = math.sin(1.0) if clock else 1.0
    block = torch.zeros(3, 3, dtype=DOUBLE)
    block[:2, :2], block[:2, 2] = time_of * MATRIX, drift
    block = torch.linalg.matrix_exp(block)
    mean, map_ = block[:2, 2], block[:2, :2]
    z = torch.randn(20, 2, dtype=DOUBLE)
    law = flow()
    x = law.push(z)
    assert (x - (z @ map_.mT + mean)).abs().max() < 1e-6
    assert (law.pull(x) - z).abs().max() < 1e-6
    probe = flow.probes[0]
    shift = 0.0 if trace == "exact" else time_of * (MATRIX.trace() - probe @ MATRIX @ probe)
    truth = dist.MultivariateNormal(mean, map_ @ map_.mT).log_prob(x) + shift
    assert (law.log_prob(x) - truth).abs().max() < 1e-6
    assert (law.push_and_log_prob(z)[1] - truth).abs().max() < 1e-6


def test_normal_data_needs_no_network():
    """Noise is carried to itself before training, by a field that is not zero."""
    flow = gm.ContinuousFlow(3, solver=RK4(32)).double()
    z = torch.randn(50, 3, dtype=DOUBLE)
    assert flow.velocity(torch.tensor(0.0, dtype=DOUBLE), z).abs().max() > 1
    assert torch.allclose(flow().push(z), z, atol=1e-5)
    assert torch.allclose(flow().log_prob(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1), atol=1e-5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    assert flow.start_at_identity() and torch.allclose(flow().push(z), z, atol=1e-5)


def test_the_loss_of_normal_data_is_known():
    r"""At the optimum it is :math:`\mathbb E\, 1 / (t^2 + (1 - t)^2)` for each feature."""
    flow = gm.ContinuousFlow(2).double()
    x = torch.randn(20_000, 2, dtype=DOUBLE)
    s = torch.logit(torch.linspace(0, 1, 100_001, dtype=DOUBLE)[1:-1])
    weight = dist.Normal(1.0, 1.4).log_prob(s).exp() * (s.sigmoid() * (1 - s.sigmoid())).reciprocal()
    t = s.sigmoid()
    truth = float((weight * 2 / (t**2 + (1 - t) ** 2)).mean())
    assert_mean(flow.loss(x).detach(), truth, name="loss at the optimum")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(DOUBLE, marks=SLOW)])
def test_the_density_of_a_learned_flow_integrates_to_one(learned, dtype):
    flow = copy.deepcopy(learned).to(dtype)
    centres = [
        -2.5 + (torch.arange(150, dtype=dtype) + 0.5) * 6 / 150,
        -2 + (torch.arange(150, dtype=dtype) + 0.5) / 35,
    ]
    grid = torch.cartesian_prod(*centres)
    with torch.no_grad():
        mass = flow().log_prob(grid).double().exp().sum() * (6 / 150) / 35
    assert abs(float(mass) - 1) < 1e-3


def test_round_trips_of_a_learned_flow(learned):
    law = learned()
    x = moons(200, 3)
    with torch.no_grad():
        assert (law.push(law.pull(x)) - x).abs().max() < 5e-3
        z = torch.randn(200, 2)
        y, log_prob = law.push_and_log_prob(z)
        assert (law.pull(y) - z).abs().max() < 5e-3 and (law.log_prob(y) - log_prob).abs().max() < 5e-3


# -- the estimate -----------------------------------------------------------------------------------------------------


def own(flow: gm.ContinuousFlow, trace: str) -> gm.ContinuousFlow:
    """The same field with another trace."""
    other = gm.ContinuousFlow(2, trace=trace, hidden_features=(64, 64, 64), solver=RK4(12))
    other.load_state_dict(flow.state_dict(), strict=False)
    return other.freeze()


def test_the_estimate_is_the_same_at_every_call_and_right_on_average(learned):
    x = moons(5, 4)
    exact, rough = own(learned, "exact"), own(learned, "hutchinson")
    assert exact().density is gm.Density.EXACT and rough().density is gm.Density.ESTIMATE
    first = rough().log_prob(x)
    assert torch.equal(first, rough().log_prob(x)) and torch.equal(first, copy.deepcopy(rough)().log_prob(x))
    assert (first - exact().log_prob(x)).abs().max() > 1e-3, "the probe says nothing"
    patterns = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # a probe and its negative say the same
    values = [rough.log_prob_by(None, rough.coordinates.pull(x)[0], None, probe[None]) for probe in patterns]
    truth = exact.log_prob_by(None, rough.coordinates.pull(x)[0], None)
    assert torch.allclose(torch.stack(values).mean(0), truth, atol=1e-4)


def test_training_by_the_estimate_has_the_gradient_of_the_likelihood_on_average():
    options = {"objective": "likelihood", "hidden_features": (8,), "solver": RK4(4)}
    flow = gm.ContinuousFlow(2, trace="hutchinson", **options).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 2, dtype=DOUBLE).expand(4000, 2)
    exact = gm.ContinuousFlow(2, **options).double()
    exact.load_state_dict(flow.state_dict())
    losses = flow.train().loss(x)
    assert losses.std() > 1e-3, "probes are not fresh"
    assert_mean(losses.detach(), float(exact.loss(x[:1]).detach()), name="loss over probes")
    losses = flow.eval().loss(x)
    assert losses.std() < 1e-9, "a validation loss must not be random"


# -- as a latent prior ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", ["exact", pytest.param("hutchinson", marks=SLOW)])
def test_chains_of_the_traced_engine(trace):
    problem = LinearFlow(linear_flow(trace=trace, estimated=True))  # linear: off by a constant
    y = problem.data()
    run = MCMC(gm.infer.HMC(problem.model), 200, 200, num_chains=48, progress_bar=False)
    pyro.set_rng_seed(1)
    run.run(y)
    assert run.kernel.potential.report["road"] == "vmap"
    posterior = problem.posterior(y)
    draws = run.get_samples(group_by_chain=True)["x"].transpose(0, 1)
    assert_chain(draws, posterior.mean, posterior.covariance_matrix)


@SLOW
@pytest.mark.parametrize("method", ["NUTS", "noise-space NUTS", "SMC"])
def test_other_samplers(method):
    problem = LinearFlow(linear_flow())
    y = problem.data()
    posterior = problem.posterior(y)
    if method == "SMC":
        smc = SMC(noisy(problem.model), 2000, progress_bar=False)
        smc.run(y)
        assert float(smc.log_evidence) == pytest.approx(float(problem.marginal.log_prob(y.double())), abs=0.15)
        return
    y = problem.data(8)
    truth = problem.posterior(y)
    if method == "NUTS":
        draws = chain(problem.plated, y, draws=320)["x"]
    else:
        draws = push_base(problem.prior, chain(noisy(problem.plated), y, draws=300))
    assert_chain(draws, truth.mean, posterior.covariance_matrix, 0.09)


@SLOW
def test_a_guide():
    problem = LinearFlow(linear_flow())
    y = problem.data()
    guide = gm.infer.AutoFlow(problem.model)
    fit(problem.model, guide, y, steps=1500, rate=0.03)
    posterior = problem.posterior(y)
    assert_guide(guide_draws(guide), posterior.mean, posterior.covariance_matrix)


@pytest.mark.parametrize("road", ["vmap", "plate"])
def test_zukos_continuous_flow_takes_both_roads(road):
    """Its equation is solved row by row, so chains together have the energies of chains alone."""
    prior = gm.Flow(zuko.flows.CNF(2, hidden_features=(8,))).freeze()
    model = measured(prior, 0.5)
    y = torch.tensor([0.4, -0.3])
    energy = gm.infer.potential(model, (y,), road=road)
    assert energy.report["road"] == road
    q = torch.randn(16, 2)
    value, gradient = energy.value_and_grad(q)
    x = q.clone().requires_grad_()
    truth = -(prior().log_prob(x) + dist.Normal(x, 0.5).log_prob(y).sum(-1))
    assert torch.allclose(value, truth.detach(), atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(truth.sum(), x)[0], atol=1e-4)


@SLOW
def test_chains_with_zukos_continuous_flow():
    """By the densities of data and in noise space, which share nothing but the flow."""
    prior = gm.Flow(zuko.flows.CNF(2, hidden_features=(8,), atol=1e-5, rtol=1e-4)).freeze()
    model = measured(prior, 0.5)
    y = torch.tensor([0.4, -0.3])
    means = []
    for program in (model, noisy(model)):
        run = MCMC(gm.infer.MALA(program), 80, 60, num_chains=64, progress_bar=False)
        run.run(y)
        draws = run.get_samples(group_by_chain=True)
        x = draws["x"] if "x" in draws else prior().push(draws["x_base"]).detach()
        means.append(x.flatten(0, 1))
    assert torch.allclose(means[0].mean(0), means[1].mean(0), atol=0.06)
    assert torch.allclose(means[0].std(0), means[1].std(0), rtol=0.1)


def test_zukos_continuous_flow_returns_from_a_broken_network():
    flow = gm.Flow(zuko.flows.CNF(2, hidden_features=(8,)))
    with torch.no_grad():
        flow.flow.transform.ode[0].weight.fill_(math.nan)
    started = time.perf_counter()
    for action in (flow().sample, lambda: flow().log_prob(torch.zeros(2))):
        with pytest.raises(IntegrationError):
            action()
    assert time.perf_counter() - started < 1


def test_an_adaptive_solver_takes_the_first_road_without_a_graph():
    problem = LinearFlow(linear_flow(DOUBLE, solver=DormandPrince(1e-8, 1e-9)))
    y = problem.data()
    energy = gm.infer.potential(problem.model, (y,))
    q = torch.randn(8, 2, dtype=DOUBLE)
    value, gradient = energy.value_and_grad(q)
    assert energy.report["road"] == "vmap" and energy.report["level"] == "eager"
    x = q.clone().requires_grad_()
    truth = -dist.MultivariateNormal(problem.mean, problem.covariance).log_prob(x)
    truth = truth - dist.Normal(x, problem.noise).log_prob(y).sum(-1)
    assert torch.allclose(value, truth.detach(), atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(truth.sum(), x)[0], atol=1e-5)


# -- learning ---------------------------------------------------------------------------------------------------------


def entropy_of(law: dist.Distribution, n: int = 20_000) -> float:
    return -float(law.log_prob(law.sample((n,))).mean())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coupling": "optimal_transport"},
        pytest.param({"objective": "likelihood", "solver": RK4(6)}, marks=SLOW),
        pytest.param({"objective": "likelihood", "solver": RK4(6), "trace": "hutchinson"}, marks=SLOW),
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "independent",
)
def test_a_gaussian_is_learned_in_the_users_units(options):
    truth = dist.MultivariateNormal(torch.tensor([300.0, -2.0]), torch.tensor([[400.0, 15.0], [15.0, 1.0]]))
    flow = gm.ContinuousFlow(2, hidden_features=(32, 32), **options)
    gm.fit(flow, truth.sample((4000,)), max_epochs=16, learning_rate=3e-3, ema=0.99, seed=0, progress_bar=False)
    x = truth.sample((2000,))
    flow.trace = "exact"
    with torch.no_grad():
        gap = truth.log_prob(x) - flow().log_prob(x)
    assert float(gap.mean()) < 0.03, "divergence from the truth, in nats"


def test_a_context_moves_the_law():
    r"""The law at :math:`c` is :math:`\mathcal N(2c, (1 + c^2) / 4)`."""
    c = torch.randn(8000, 1)
    x = 2 * c + (1 + c**2).sqrt() / 2 * torch.randn(8000, 1)
    flow = gm.ContinuousFlow(1, 1, hidden_features=(64, 64))
    gm.fit(flow, x, c, max_epochs=16, batch_size=256, learning_rate=3e-3, ema=0.99, seed=0, progress_bar=False)
    at = torch.tensor([[-1.0], [0.0], [1.5]])
    draws = flow(at).sample((4000,))
    assert torch.allclose(draws.mean(0), 2 * at, atol=0.15)
    assert torch.allclose(draws.std(0), (1 + at**2).sqrt() / 2, rtol=0.12)


def test_positive_data():
    flow = gm.ContinuousFlow(1, hidden_features=(32, 32), support=constraints.positive)
    x = dist.Gamma(3.0, 0.1).sample((4000, 1))
    gm.fit(flow, x, max_epochs=10, learning_rate=3e-3, ema=0.99, seed=0, progress_bar=False)
    gap = dist.Gamma(3.0, 0.1).log_prob(x).squeeze(-1) - flow().log_prob(x)
    assert flow().sample((100,)).min() > 0 and float(gap.detach().mean()) < 0.03


def test_learned_moons_are_close_to_the_truth(learned):
    """Held-out log density beside that of the data's law, by quadrature over the angle."""
    x = moons(1000, 5)
    angle = math.pi * (torch.arange(2000) + 0.5) / 2000
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    noise = dist.Normal(torch.cat([upper, lower]), 0.1)
    truth = noise.log_prob(x[:, None]).sum(-1).logsumexp(1) - math.log(4000)
    with torch.no_grad():
        gap = float((truth - learned().log_prob(x)).mean())
    assert -0.02 < gap < 0.08


def test_transport_within_a_batch_makes_paths_straighter():
    bent = {}
    for coupling in ("independent", "optimal_transport"):
        flow = gm.ContinuousFlow(2, hidden_features=(64, 64), coupling=coupling)
        options = {"batch_size": 256, "learning_rate": 3e-3, "ema": 0.99, "seed": 0, "progress_bar": False}
        gm.fit(flow, moons(4000), max_epochs=12, **options)
        bent[coupling] = flow.straightness()
    assert bent["optimal_transport"] < 0.5 * bent["independent"]


@pytest.mark.slow
def test_rectified_paths_are_straighter_and_need_fewer_steps(learned):
    x = moons(4000)
    student = learned.rectify()
    assert torch.equal(student().log_prob(x[:5]), learned().log_prob(x[:5])), "it starts as a copy"
    options = {"batch_size": 256, "learning_rate": 2e-3, "ema": 0.99, "seed": 0, "progress_bar": False}
    gm.fit(student, x, max_epochs=12, **options)
    assert student.straightness() < 0.5 * learned.straightness()

    def error(flow: gm.ContinuousFlow, steps: int) -> float:
        z, solver = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)), flow.solver
        with torch.no_grad():
            end = flow().push(z)
            flow.solver = Euler(steps)
            few = flow().push(z)
            flow.solver = solver
        return float((few - end).square().mean().sqrt())

    assert error(student, 4) < 0.5 * error(learned, 4)
    assert not any(name.startswith("_teacher") for name in student.state_dict())


def test_the_noise_of_a_row_is_asked_for_once():
    asked = []

    def square(rows: Tensor) -> Tensor:
        asked.extend(rows.flatten().tolist())
        return rows**2

    pairs = Pairs(torch.tensor([[3.0], [1.0], [2.0], [1.0]]), square, chunk=3)
    assert sorted(asked) == [1.0, 1.0, 2.0, 3.0]
    for _ in range(2):  # 5 and 0 are new, and remembered
        assert pairs(torch.tensor([[5.0], [1.0], [0.0], [3.0]])).flatten().tolist() == [25.0, 1.0, 0.0, 9.0]
    assert asked[4:] == [5.0, 0.0]
    for _ in range(2):  # no more than the table had are
        assert pairs(torch.arange(10.0, 20.0)[:, None]).flatten()[-1] == 361.0
    assert len(asked) == 26


def test_a_conditional_flow_is_rectified_at_its_contexts():
    c = torch.randn(500, 1)
    x = 2 * c + 0.3 * torch.randn(500, 1)
    flow = gm.ContinuousFlow(1, 1, hidden_features=(16, 16))
    gm.fit(flow, x, c, max_epochs=3, seed=0, progress_bar=False)
    student = flow.rectify()
    student.standardize(x, c)
    y, contexts = student.coordinates.pull(x)[0], student.context_standardization(c)
    assert torch.allclose(student._partners(y, contexts), flow(c).pull(x), atol=1e-4)
    assert torch.allclose(student._partners(y[:9], contexts.flip(0)[:9]), flow(c.flip(0)[:9]).pull(x[:9]), atol=1e-4)
    gm.fit(student, x, c, max_epochs=2, seed=0, progress_bar=False)
    assert student(c).log_prob(x).isfinite().all() and student._pairs is None


def test_rectified_without_its_teacher_says_so(learned, tmp_path):
    gm.save(learned.rectify(), tmp_path / "student.safetensors")
    student = gm.load(tmp_path / "student.safetensors")
    with pytest.raises(DensityError, match="rectify"):
        student.loss(moons(4))


# -- accuracy, and what is reported -----------------------------------------------------------------------------------


def test_fit_finds_the_steps_and_the_law_states_its_tolerance(learned):
    law = learned()
    assert learned.solver == RK4(int(learned.steps)) and law.evaluations == 4 * learned.solver.steps
    assert law.tolerance < 2e-3
    assert f"solver={learned.solver}" in repr(law)
    coarse = copy.deepcopy(learned)
    coarse.solver = RK4(4)
    assert coarse().tolerance > 5 * law.tolerance and coarse.cost == gm.Cost(16, 16)
    coarse.solver = DormandPrince(1e-5, 1e-6)
    assert coarse().tolerance < 1e-2
    coarse().log_prob(moons(10))
    assert coarse().evaluations % 6 == 2 and coarse.cost == gm.Cost(None, None)
    coarse.solver = None
    assert coarse.solver == learned.solver
    assert coarse.calibrate(1e-1) < learned.solver.steps


def test_calibration_that_fails_warns():
    flow = linear_flow(solver=None)
    with pytest.warns(RuntimeWarning, match="256 steps leave an error of .*, more than the tolerance 1e-15"):
        flow.calibrate(1e-15)
    assert flow.solver == RK4(256)


def test_a_solver_of_the_callers_stays(tmp_path):
    flow = gm.ContinuousFlow(2, hidden_features=(8,), solver=Heun(5))
    gm.fit(flow, moons(100), max_epochs=1, progress_bar=False)
    assert flow.solver == Heun(5)
    gm.save(flow, tmp_path / "flow.safetensors")
    again = gm.load(tmp_path / "flow.safetensors")
    assert again.solver == Heun(5) and torch.equal(again().log_prob(moons(3)), flow().log_prob(moons(3)))


def test_an_assigned_solver_is_saved(learned, tmp_path):
    flow = copy.deepcopy(learned)
    flow.solver = Heun(7)
    gm.save(flow, tmp_path / "flow.safetensors")
    assert gm.load(tmp_path / "flow.safetensors").solver == Heun(7) and learned.solver != Heun(7)


def test_the_number_of_steps_is_kept(learned, tmp_path):
    gm.save(learned, tmp_path / "flow.safetensors")
    again = gm.load(tmp_path / "flow.safetensors")
    assert again.solver == learned.solver and torch.equal(again().log_prob(moons(3)), learned().log_prob(moons(3)))


def test_paths_lead_from_noise_to_draws(learned):
    z = torch.randn(3, 5, 2)
    with torch.no_grad():
        path = learned.path(z, torch.linspace(0, 1, 5))
        assert path.shape == (5, 3, 5, 2)
        start = learned.coordinates.push(z.reshape(-1, 2))[0].reshape(3, 5, 2)
        assert torch.allclose(path[0], start) and torch.allclose(path[-1], learned().push(z), atol=1e-2)


# -- failures ---------------------------------------------------------------------------------------------------------


def broken(solver) -> gm.ContinuousFlow:
    flow = gm.ContinuousFlow(2, solver=solver)
    with torch.no_grad():
        flow.network.output.weight.fill_(math.nan)
    return flow


@pytest.mark.parametrize("solver", [None, DormandPrince()], ids=["fixed", "adaptive"])
def test_a_broken_network_is_an_error_at_once(solver):
    law = broken(solver)()
    started = time.perf_counter()
    for action in (law.sample, law.rsample, lambda: law.log_prob(torch.zeros(2)), lambda: law.pull(torch.zeros(2))):
        with pytest.raises(IntegrationError, match=r"1 .*row\(s\)"):
            action()
    assert time.perf_counter() - started < 1


def test_a_stiff_field_reaches_the_step_limit():
    stiff = Linear(-1e6 * torch.eye(2), DRIFT.float())
    law = gm.ContinuousFlow(2, network=stiff, baseline=False, solver=DormandPrince(max_steps=50))()
    started = time.perf_counter()
    with pytest.raises(IntegrationError, match="max_steps=50"):
        law.sample()
    assert time.perf_counter() - started < 1


def test_a_lost_chain_does_not_end_the_others():
    """In the engine, where nothing may raise, a row that cannot be solved has the energy NaN."""

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
            return torch.where(y > 3, math.inf, self.weight * y)

        def with_divergence(self, t: Tensor, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
            return self(t, y, c), self.weight.expand(len(y)) * 2

    flow = gm.ContinuousFlow(2, network=Edge(), baseline=False, solver=RK4(3)).freeze()
    model: Model = measured(flow, 0.5)
    energy = gm.infer.potential(model, (torch.zeros(2),))
    value = energy.value(torch.tensor([[0.0, 0.0], [9.0, 0.0], [1.0, -1.0]]))
    assert value.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: gm.ContinuousFlow(2, 1, coupling="optimal_transport"),
            ValueError,
            "coupling: .*use coupling='independent'",
        ),
        (
            lambda: gm.ContinuousFlow(3, network=Linear(), baseline=False),
            ShapeError,
            "network: Linear fails on .* y of",
        ),
        (lambda: gm.ContinuousFlow(2, event_shape=(3,)), ShapeError, "has 3 coordinates, features is 2"),
        (lambda: gm.ContinuousFlow(2, hidden_features=(0,)), ValueError, "hidden_features: got"),
        (lambda: gm.ContinuousFlow(2, hidden_features=()), ValueError, "hidden_features: got"),
        (lambda: gm.ContinuousFlow(2, probes=0), ValueError, "probes: got 0"),
        (lambda: gm.ContinuousFlow(2, 1)(), ShapeError, "context: ContinuousFlow is conditional"),
        (lambda: gm.ContinuousFlow(2)().log_prob(torch.zeros(3)), ShapeError, r"value: got shape \(3,\)"),
        (lambda: gm.ContinuousFlow(2).path(torch.zeros(4, 3), torch.ones(1)), ShapeError, r"value: got shape \(4, 3\)"),
    ],
)
def test_bad_input(make, error, message):
    started = time.perf_counter()
    with pytest.raises(error, match=message):
        make()
    assert time.perf_counter() - started < 1


def test_noise_that_is_not_finite_goes_nowhere():
    x = gm.ContinuousFlow(2)().push(torch.tensor([[math.nan, 0.0], [0.0, 0.0], [math.inf, 1.0]]))
    assert x.isnan().all(1).tolist() == [True, False, True]


def test_training_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm.fit(gm.ContinuousFlow(2, hidden_features=(8,)), moons(200), max_epochs=2, progress_bar=False)


def test_a_network_that_knows_its_divergence_is_asked_for_it():
    asked = []

    class Knowing(VectorField):
        def with_divergence(self, t: Tensor, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
            asked.append(1)
            return super().with_divergence(t, y, c)

    gm.ContinuousFlow(2, network=Knowing(2), solver=RK4(3))().log_prob(torch.zeros(2))
    assert len(asked) == 12
