"""A learned prior dropped into Pyro programs: every place where ``Normal`` could stand, and every algorithm.

Where there is a closed form the value is checked: programs against sums written out by hand with
``MultivariateNormal``, lower bounds under the exact posterior against the evidence, guides and predictions against the
posterior. No program gets ``transforms=`` or an initial value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    HMC,
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule
from torch import Tensor

import pyro_genmods as gm

from .linear_gaussian import DOUBLE, LinearGaussian, Model, affine_flow, assert_chain, chain, fit, moments, noisy, zuko
from .statistics import assert_mean

LOC_TOLERANCE, SCALE_TOLERANCE = 0.1, 0.1  # of a guide, in posterior standard deviations
KEEP = torch.tensor([True, False, True])
PLATE = torch.arange(10.0)


@pytest.fixture
def problem() -> LinearGaussian:
    return LinearGaussian()


@pytest.fixture
def exact() -> LinearGaussian:
    """The same in double precision, for identities."""
    return LinearGaussian(affine_flow(dtype=DOUBLE))


def truth(flow: gm.Flow, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Log densities of values by the closed form, one row after the other."""
    rows = x.reshape(-1, flow.features)
    contexts = [None] * len(rows) if context is None else context.expand(*x.shape[:-1], -1).reshape(len(rows), -1)
    laws = [dist.MultivariateNormal(*moments(flow, c)) for c in contexts]
    return torch.stack([law.log_prob(row.to(DOUBLE)) for law, row in zip(laws, rows, strict=True)]).reshape(
        x.shape[:-1]
    )


# -- in programs ------------------------------------------------------------------------------------------------------


def alone(prior: gm.Flow) -> None:
    pyro.sample("x", prior())


def plate(prior: gm.Flow) -> None:
    with pyro.plate("columns", 3, dim=-1):
        pyro.sample("x", prior())


def plate_on_the_left(prior: gm.Flow) -> None:
    with pyro.plate("rows", 4, dim=-2):
        pyro.sample("x", prior())


def nested_plates(prior: gm.Flow) -> None:
    with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("x", prior())


def sequential_plate(prior: gm.Flow) -> None:
    for i in pyro.plate("rows", 2):
        pyro.sample(f"x_{i}", prior())


def masked(prior: gm.Flow) -> None:
    with pyro.plate("columns", 3, dim=-1), poutine.mask(mask=KEEP):
        pyro.sample("x", prior())


def mask_method(prior: gm.Flow) -> None:
    with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("x", prior().mask(KEEP))


def scaled(prior: gm.Flow) -> None:
    with pyro.plate("columns", 3, dim=-1), poutine.scale(scale=0.5):
        pyro.sample("x", prior())


def joined(prior: gm.Flow) -> None:
    with pyro.plate("rows", 4, dim=-1):
        pyro.sample("x", prior().expand([4, 3]).to_event(1))


def subsampled(prior: gm.Flow) -> None:
    with pyro.plate("columns", 12, subsample_size=3, dim=-1), pyro.plate("rows", 4, dim=-2):
        pyro.sample("x", prior())


# program -> (shape of the values, weight of each event's log density)
PROGRAMS: dict[Callable, tuple[tuple[int, ...], Tensor | float]] = {
    alone: ((), 1.0),
    plate: ((3,), 1.0),
    plate_on_the_left: ((4, 1), 1.0),
    nested_plates: ((4, 3), 1.0),
    sequential_plate: ((), 1.0),
    masked: ((3,), KEEP),
    mask_method: ((4, 3), KEEP),
    scaled: ((3,), 0.5),
    joined: ((4, 3), 1.0),
    subsampled: ((4, 3), 4.0),
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_scores_the_hand_written_sum(program):
    prior, (shape, weight) = affine_flow(dtype=DOUBLE), PROGRAMS[program]
    trace = poutine.trace(program).get_trace(prior)
    values = [node["value"] for name, node in trace.nodes.items() if name.startswith("x")]
    assert all(value.shape == (*shape, 2) for value in values)
    assert len(torch.cat([value.reshape(-1, 2) for value in values]).unique(dim=0)) == sum(
        v[..., 0].numel() for v in values
    )
    total = sum((weight * truth(prior, value)).sum() for value in values)
    assert float(trace.log_prob_sum()) == pytest.approx(float(total), rel=1e-5, abs=1e-5)
    again = poutine.trace(poutine.replay(program, trace)).get_trace(prior)
    assert torch.equal(again.log_prob_sum(), trace.log_prob_sum())


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_runs_under_guides_and_chains(program):
    prior, (shape, _) = affine_flow(), PROGRAMS[program]
    if program is not sequential_plate:  # Pyro's guides refuse sequential plates
        guide = AutoNormal(program)
        for vectorized in (False, True):
            elbo = Trace_ELBO(2, vectorize_particles=vectorized, max_plate_nesting=2)
            svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
            assert math.isfinite(svi.step(prior))
        drawn = [value for name, value in guide(prior).items() if name.startswith("x")]
        assert all(value.shape == (*shape, 2) for value in drawn)
    if program is subsampled:  # Pyro's chains refuse to subsample
        return
    mcmc = MCMC(NUTS(program, max_tree_depth=2), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(prior)
    assert all(value.shape == (3, *shape, 2) and value.isfinite().all() for value in mcmc.get_samples().values())


def test_obs_mask(exact):
    """Rows that are seen are data, the others latent, and their posterior is the prior."""
    prior, seen, x = exact.prior, torch.tensor([True, False, True, False]), exact.prior().sample((4,))

    def model() -> Tensor:
        with pyro.plate("rows", 4):
            return pyro.sample("x", prior(), obs=x, obs_mask=seen)

    trace = poutine.trace(model).get_trace()
    whole = trace.nodes["x"]["value"]
    assert torch.equal(whole[seen], x[seen]) and not torch.equal(whole[~seen], x[~seen])
    assert float(trace.log_prob_sum()) == pytest.approx(float(truth(prior, whole).sum()), abs=1e-5)

    guide = AutoNormal(model)
    fit(model, guide, steps=200, plates=1)
    loc, scale = guide._get_loc_and_scale("x_unobserved")
    precision = exact.covariance.inverse().diagonal() ** -0.5
    assert ((loc[~seen] - exact.mean).abs() < LOC_TOLERANCE * precision).all()
    assert ((scale[~seen] / precision - 1).abs() < SCALE_TOLERANCE).all()


def test_a_conditional_prior_in_plates_equals_a_loop():
    """Contexts of every shape that broadcasts with the plates, among them a latent one."""
    prior = affine_flow("nice", context=2, standardized=True, dtype=DOUBLE)
    contexts = {"row": torch.randn(3, 2), "column": torch.randn(4, 1, 2), "both": torch.randn(4, 3, 2)}

    def model() -> None:
        c = pyro.sample("c", affine_flow(dtype=DOUBLE)())
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("x_latent", prior(c))
            for name, context in contexts.items():
                pyro.sample(f"x_{name}", prior(context.to(DOUBLE)))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    for name, context in {**contexts, "latent": trace.nodes["c"]["value"]}.items():
        node = trace.nodes[f"x_{name}"]
        assert torch.allclose(node["log_prob"], truth(prior, node["value"], context.to(DOUBLE)), atol=1e-5)


# -- subsampling ------------------------------------------------------------------------------------------------------


def test_subsamples_of_a_partition_average_to_the_whole(exact):
    """Each third of the data, scaled by three, is an unbiased estimate of the log density of all."""
    x, y = exact.prior().sample((12,)), exact.data(12)

    def model(index: Tensor) -> None:
        with pyro.plate("rows", 12, subsample=index):
            pyro.sample("x", exact.prior(), obs=x[index])
            pyro.sample("y", dist.Normal(x[index], exact.noise).to_event(1), obs=y[index])

    parts = [poutine.trace(model).get_trace(part).log_prob_sum() for part in torch.randperm(12).split(4)]
    whole = truth(exact.prior, x).sum() + dist.Normal(x, exact.noise).log_prob(y).sum()
    assert float(sum(parts) / 3) == pytest.approx(float(whole), rel=1e-6)
    assert float(parts[0]) != pytest.approx(float(parts[1]), rel=1e-3)


def amortised_guide() -> gm.Flow:
    """A trainable law of ``x`` given ``y`` in which the exact posterior, affine in noise and ``y``, is contained."""
    return gm.Flow(zuko.flows.MAF(2, context=2, transforms=1, hidden_features=()), direction="sampling")


def test_an_amortised_flow_guide_with_subsampling(problem):
    """A conditional flow learns the posterior of every row from small batches of them."""
    y, inverse = problem.data(64), amortised_guide()

    def model() -> None:
        with pyro.plate("rows", 64, subsample_size=16) as index:
            x = pyro.sample("x", problem.prior())
            pyro.sample("y", dist.Normal(x, problem.noise).to_event(1), obs=y[index])

    def guide() -> None:
        pyro.module("inverse", inverse)
        with pyro.plate("rows", 64, subsample_size=16) as index:
            pyro.sample("x", inverse(y[index]))

    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / 800)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(800):
        svi.step()
    posterior = problem.posterior(y)
    with torch.no_grad():
        draws = inverse(y).sample((2000,))
    sd = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (((draws.mean(0) - posterior.mean) / sd).square().mean(0).sqrt() < LOC_TOLERANCE).all()
    assert ((draws.std(0) / sd).mean(0) - 1).abs().max() < SCALE_TOLERANCE


# -- lower bounds and evidence ----------------------------------------------------------------------------------------

ELBOS = {
    "Trace": Trace_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceEnum": TraceEnum_ELBO,
    "Renyi": lambda **settings: RenyiELBO(alpha=0.5, **settings),
    "ReweightedWakeSleep": ReweightedWakeSleep,
}


def exact_guide(problem: LinearGaussian) -> Model:
    def guide(y: Tensor) -> None:
        with pyro.plate("copies", len(y)):
            pyro.sample("x", problem.posterior(y))

    return guide


@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorised"])
@pytest.mark.parametrize("name", ELBOS)
def test_every_bound_is_tight_at_the_exact_posterior(exact, name, vectorized):
    """With ``q = p(x | y)`` every particle is the evidence, for every bound."""
    y = exact.data(3)
    elbo = ELBOS[name](num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    loss = elbo.loss(exact.plated, exact_guide(exact), y)
    loss = loss[0] if isinstance(loss, tuple) else loss
    assert loss == pytest.approx(-float(exact.marginal.log_prob(y).sum()), abs=1e-6)


@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorised"])
@pytest.mark.parametrize("name", ELBOS)
def test_every_bound_trains(problem, name, vectorized):
    """Gradients move a guide towards the posterior mean."""
    y, start = problem.data(3), torch.tensor([3.0, -3.0])

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", start.expand(3, 2).clone())
        with pyro.plate("copies", 3):
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1))

    elbo = ELBOS[name](num_particles=8, vectorize_particles=vectorized, max_plate_nesting=1)
    svi = SVI(problem.plated, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(40):
        svi.step(y)
    target = problem.posterior(y).mean
    closer = (pyro.param("loc").detach() - target).norm() / (start - target).norm()
    assert closer < 0.6


def test_vectorised_particles_draw_from_the_prior_of_the_guide(problem):
    """Particles are a dimension on the left of the plates, and all different."""
    shapes = []

    def guide(y: Tensor) -> None:
        with pyro.plate("copies", 3):
            shapes.append(pyro.sample("x", problem.prior()))

    Trace_ELBO(5, vectorize_particles=True, max_plate_nesting=1).loss(problem.plated, guide, problem.data(3))
    assert shapes[-1].shape == (5, 3, 2) and len(shapes[-1].reshape(-1, 2).unique(dim=0)) == 15


def test_importance_sampling(exact):
    """The exact posterior as proposal has equal weights; the prior as proposal has unbiased ones."""
    y = exact.data(1)
    evidence = float(exact.marginal.log_prob(y).sum())
    perfect = Importance(exact.plated, exact_guide(exact), num_samples=10).run(y)
    assert float(perfect.get_log_normalizer()) == pytest.approx(evidence, abs=1e-6)
    assert float(perfect.get_ESS()) == pytest.approx(10, abs=1e-4)
    blind = Importance(exact.plated, num_samples=1000).run(y)
    weights = torch.stack(list(blind.log_weights))
    assert_mean((weights - evidence).exp(), 1.0)


# -- enumeration next to a flow ---------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
SHIFTS = torch.tensor([[-2.0, 0.0], [0.0, 1.0], [3.0, 0.5]], dtype=DOUBLE)


def mixture(prior: gm.Flow, data: Tensor) -> Model:
    """A latent centre with a flow prior, and data around shifted copies of it; which copy is enumerated."""

    @config_enumerate
    def model() -> None:
        x = pyro.sample("x", prior())
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("y", dist.Normal(x[..., None, :] + SHIFTS[k], 0.8).to_event(1), obs=data)

    return model


def mixture_log_joint(prior: gm.Flow, data: Tensor, x: Tensor) -> Tensor:
    terms = dist.Normal(x + SHIFTS, 0.8).to_event(1).log_prob(data[:, None])
    return truth(prior, x) + (WEIGHTS.log() + terms).logsumexp(-1).sum()


def test_enumeration_next_to_a_flow(exact):
    data, x = torch.randn(5, 2, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE)
    model = mixture(exact.prior, data)
    expected = float(mixture_log_joint(exact.prior, data, x))
    for particles in (1, 3):
        elbo = TraceEnum_ELBO(particles, max_plate_nesting=1, vectorize_particles=particles > 1)
        loss = elbo.loss(model, lambda: pyro.sample("x", dist.Delta(x, event_dim=1)))
        assert loss == pytest.approx(-expected, abs=1e-5)
    _, potential, _, _ = initialize_model(model, max_plate_nesting=1)
    assert float(potential({"x": x})) == pytest.approx(-expected, abs=1e-5)
    guide = AutoNormal(poutine.block(model, hide=["k"]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    assert math.isfinite(svi.step())
    mcmc = MCMC(NUTS(model, max_plate_nesting=1, max_tree_depth=2), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (3, 2)


def test_an_enumerated_cause_of_a_flow():
    """The context is enumerated, the flow latent: the bound sums over contexts on the left."""
    prior, x = affine_flow(context=2, dtype=DOUBLE), torch.tensor([0.3, -0.8], dtype=DOUBLE)

    @config_enumerate
    def model() -> None:
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("x", prior(SHIFTS[k]))

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: pyro.sample("x", dist.Delta(x, event_dim=1)))
    terms = torch.stack([truth(prior, x, shift) for shift in SHIFTS])
    assert loss == pytest.approx(-float((WEIGHTS.log() + terms).logsumexp(-1)), abs=1e-5)


# -- autoguides -------------------------------------------------------------------------------------------------------

FULL = {
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": lambda model: AutoLowRankMultivariateNormal(model, rank=2),
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[16]),
    "AutoStructured": lambda model: AutoStructured(model, conditionals="mvn"),
    "AutoLaplaceApproximation": AutoLaplaceApproximation,
}
FACTORISED = {"AutoNormal": AutoNormal, "AutoDiagonalNormal": AutoDiagonalNormal, "AutoDelta": AutoDelta}


@pytest.mark.parametrize("name", [*FULL, *FACTORISED])
def test_autoguides(problem, name):
    """Full guides find the posterior; factorised ones its mean, and its precisions for variances."""
    y = problem.data()
    posterior = problem.posterior(y)
    guide = {**FULL, **FACTORISED}[name](problem.model)
    fit(problem.model, guide, y, steps=400, rate=0.03 if name == "AutoIAFNormal" else 0.1)
    if name == "AutoLaplaceApproximation":
        guide = guide.laplace_approximation(y)
    with torch.no_grad(), pyro.plate("draws", 3000, dim=-1):
        draws = guide(y)["x"].to(DOUBLE).reshape(-1, 2)
    covariance = posterior.covariance_matrix
    sd = covariance.diagonal().sqrt() if name in FULL else covariance.inverse().diagonal() ** -0.5
    assert ((draws.mean(0) - posterior.mean).abs() < LOC_TOLERANCE * sd).all()
    if name == "AutoDelta":
        assert draws.unique(dim=0).shape == (1, 2)
        return
    assert ((draws.std(0) / sd - 1).abs() < SCALE_TOLERANCE).all()
    found = torch.corrcoef(draws.T)[0, 1]
    expected = covariance[0, 1] / (sd[0] * sd[1]) if name in FULL else 0.0
    assert abs(float(found - expected)) < 0.1


@pytest.mark.parametrize(
    "guide_class", [AutoMultivariateNormal, pytest.param(gm.infer.AutoFlow, marks=pytest.mark.slow)]
)
def test_neural_transport(problem, guide_class):
    y = problem.data()
    posterior = problem.posterior(y)
    guide = guide_class(problem.model)
    if guide_class is gm.infer.AutoFlow:
        fit(problem.model, guide, y, steps=20, rate=1e-3)
    else:
        fit(problem.model, guide, y, steps=300)
    neutra = NeuTraReparam(guide.requires_grad_(False))
    white = chain(neutra.reparam(problem.model), y, draws=800, kernel=HMC, step_size=0.4, num_steps=4)
    draws = neutra.transform_sample(white["x_shared_latent"])["x"].detach()
    assert_chain(draws[:, None], posterior.mean, posterior.covariance_matrix, tolerance=0.15)


# -- Predictive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
def test_prior_predictive(problem, parallel):
    draws = Predictive(problem.model, num_samples=1500, parallel=parallel)()
    assert_moments(draws["x"].reshape(-1, 2), dist.MultivariateNormal(problem.mean, problem.covariance))
    assert_moments(draws["y"].reshape(-1, 2), problem.marginal)


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("source", ["draws", "guide"])
def test_posterior_predictive(problem, source, parallel):
    y = problem.data()
    posterior = problem.posterior(y)
    given = {"posterior_samples": {"x": posterior.sample((1500,)).float()}}
    if source == "guide":
        given = {"guide": lambda *_: pyro.sample("x", posterior), "num_samples": 1500}
    predicted = Predictive(problem.model, **given, parallel=parallel, return_sites=["x", "y"])()
    x, again = predicted["x"].reshape(-1, 2), predicted["y"].reshape(-1, 2)
    assert len(x) == 1500
    assert_mean((again - x).square(), torch.full((2,), problem.noise**2))
    noise = problem.noise**2 * torch.eye(2, dtype=DOUBLE)
    assert_moments(again, dist.MultivariateNormal(posterior.mean, posterior.covariance_matrix + noise))


def assert_moments(draws: Tensor, law: dist.MultivariateNormal) -> None:
    """Means, variances and correlations of independent draws."""
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(law.covariance_matrix), (draws.to(DOUBLE) - law.mean).mT, upper=False
    ).mT
    assert_mean(white, torch.zeros(2))
    assert_mean(white[:, :, None] * white[:, None, :], torch.eye(2))


# -- trainable, frozen, precise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["PyroModule attribute", "pyro.module"])
def test_a_trainable_prior_learns_the_population(problem, way):
    """Empirical Bayes: the maximum of the marginal likelihood has a closed form, and SVI finds it."""
    y = problem.data(400)
    prior = gm.Flow(zuko.flows.MAF(2, transforms=1, hidden_features=()))
    inverse = amortised_guide()

    class Population(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.prior = prior

        def forward(self, y: Tensor) -> None:
            measured_copies(self.prior, y)

    def measured_copies(flow: gm.Flow, y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", flow())
            pyro.sample("y", dist.Normal(x, problem.noise).to_event(1), obs=y)

    def by_name(y: Tensor) -> None:
        measured_copies(pyro.module("prior", prior), y)

    def guide(y: Tensor) -> None:
        pyro.module("inverse", inverse)
        with pyro.plate("rows", len(y)):
            pyro.sample("x", inverse(y))

    model = Population() if way == "PyroModule attribute" else by_name
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / 800)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(800):
        svi.step(y)
    assert any("prior" in name for name in pyro.get_param_store().keys())  # noqa: SIM118
    draws = prior().sample((20000,)).to(DOUBLE)
    mean, covariance = y.to(DOUBLE).mean(0), torch.cov(y.to(DOUBLE).T) - problem.noise**2 * torch.eye(2, dtype=DOUBLE)
    sd = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < LOC_TOLERANCE * sd).all()
    assert ((torch.cov(draws.T) - covariance).abs() < 2 * SCALE_TOLERANCE * sd * sd[:, None]).all()


@pytest.mark.parametrize("way", ["closure", "PyroModule attribute", "pyro.module"])
def test_a_frozen_prior_stays_bit_identical(way):
    """A hundred steps of SVI learn the noise and leave the prior, its buffers too, untouched and unregistered."""
    prior = gm.Flow(zuko.flows.NSF(2, transforms=1, hidden_features=(8,)))
    prior.standardize(torch.randn(50, 2))
    prior.freeze()
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    y = torch.randn(20, 2)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            if way == "PyroModule attribute":
                self.prior = prior

        def forward(self) -> None:
            law = pyro.module("prior", prior) if way == "pyro.module" else prior
            noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
            with pyro.plate("rows", 20):
                x = pyro.sample("x", law())
                pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model()
        guide = AutoNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(100):
            svi.step()
    assert abs(pyro.param("noise").item() - 1) > 0.05, "nothing was learned"
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    assert not any("prior" in name for name in pyro.get_param_store().keys())  # noqa: SIM118


def test_double_precision(exact):
    """Every number of a program in double precision is one."""
    y = exact.data()
    for model in (exact.model, noisy(exact.model)):
        mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=3, warmup_steps=2, disable_progbar=True)
        mcmc.run(y)
        assert all(value.dtype is DOUBLE for value in mcmc.get_samples().values())
        for guide in (AutoNormal(model), AutoMultivariateNormal(model), gm.infer.AutoFlow(model, gaussian_steps=5)):
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
            assert math.isfinite(svi.step(y))
            assert all(value.dtype is DOUBLE for value in guide(y).values())
    draws = Predictive(exact.model, num_samples=3)()
    assert draws["x"].dtype is DOUBLE and draws["y"].dtype is DOUBLE
