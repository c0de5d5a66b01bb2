"""Energies of continuous events: what each objective learns, what each sampler draws, and what is refused."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genmods as gm
from benchmarks import energy as benchmark
from pyro_genmods import shape
from pyro_genmods.foundation.errors import DensityError, DoublyIntractableError, SamplingError, ShapeError
from pyro_genmods.foundation.objectives import hyvarinen_score, sliced_score_matching

from .statistics import assert_mean

DOUBLE = torch.float64
QUIET = {"progress_bar": False, "seed": 0, "validation": 0}


class Quadratic(nn.Module):
    """``a |y|^2 / 2``."""

    def __init__(self, precision: float = 1.0) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(precision))

    def forward(self, y: Tensor) -> Tensor:
        return 0.5 * self.precision * y.square().sum(-1)


# -- objectives -------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "hyvarinen": (shape.Hyvarinen(), 0.25),
    "sliced": (shape.Sliced(2), 0.25),
    "denoising": (shape.Denoising(0.5), 1 / 4.25),
    "CD": (shape.Contrastive(persistent=False, step_size=1.0), 0.25),
    "PCD": (shape.Contrastive(step_size=1.0, buffer_size=2048), 0.25),
    "PCD without test": (shape.Contrastive(kernel="ula", step_size=0.5, transitions=20, restart=0.01), 0.25),
    "recovery": (shape.Recovery(noise=1.0, transitions=20), 0.25),
}


@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_precision_of_a_gaussian(name, features):
    """Data of N(0, 4 I): within five per cent of what the objective has for its minimum, with the right sign."""
    torch.manual_seed(features)
    objective, truth = OBJECTIVES[name]
    x = 2 * torch.randn(20000, features)
    x = x / x.square().mean().sqrt() * 2  # what the data say is the truth, to all digits
    model = gm.Energy(features, network=Quadratic(), base=None, objective=objective)
    epochs = 30 if name == "denoising" else 6  # its gradient is the noisiest, and the cheapest
    gm.fit(model, x, max_epochs=epochs, batch_size=1000, learning_rate=0.03, standardize=False, **QUIET)
    assert float(model.network.precision.detach()) == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("draws", [1, 4])
def test_noise_contrast_learns_precision_and_constant(draws):
    """A base of variance 9 tilted to one of 4: the tilt has precision 1/4 - 1/9, and log Z = log(2 / 3)."""
    torch.manual_seed(0)
    base = gm.shape.Gaussian(torch.zeros(1), 9 * torch.eye(1), normalized=True)
    model = gm.Energy(network=Quadratic(0.0), base=base, objective=shape.NCE(draws))
    gm.fit(model, 2 * torch.randn(20000, 1), max_epochs=10, batch_size=500, learning_rate=0.02, **QUIET)
    assert float(model.network.precision.detach()) == pytest.approx(1 / 4 - 1 / 9, rel=0.05)
    assert float(model.noise_contrast.detach()) == pytest.approx(math.log(2 / 3), abs=0.02)


@pytest.mark.parametrize("transform", [lambda x: -x / 4, lambda x: -(x**3) + x.flip(-1), lambda x: x.sin()])
def test_score_matching_is_its_formula(transform):
    x = torch.randn(7, 3, dtype=DOUBLE)
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in x])
    exact = 0.5 * transform(x).square().sum(-1) + jacobian.diagonal(dim1=1, dim2=2).sum(-1)
    assert torch.allclose(hyvarinen_score(transform, x), exact, atol=1e-12)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * 3)[:, None].expand(-1, 7, -1)
    assert torch.allclose(sliced_score_matching(transform, x, signs), exact, atol=1e-12)  # all signs: no variance


def test_several_levels_of_noise():
    """The energy at a level is that of the data blurred by it."""
    torch.manual_seed(0)

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.precision = nn.Parameter(torch.ones(2))

        def forward(self, y: Tensor, told: Tensor) -> Tensor:
            coarse = (told[:, -1] > math.log(0.5)).long()
            return 0.5 * self.precision[coarse] * y.square().sum(-1)

    model = gm.Energy(1, network=Levels(), base=None, objective=shape.Denoising((1.0, 0.2)))
    gm.fit(
        model, 2 * torch.randn(20000, 1), max_epochs=6, batch_size=500, learning_rate=0.03, standardize=False, **QUIET
    )
    assert torch.allclose(model.network.precision, torch.tensor([1 / 4.04, 1 / 5.0]), rtol=0.05)
    y = torch.ones(1, 1)
    assert torch.equal(model.energy_rows(y, None), model.energy_rows(y, None, torch.tensor([[0.2]])))


@pytest.mark.slow
def test_the_ring_is_learned_as_well_as_by_exact_likelihood():
    """Eight modes, two layers of 128, 1500 steps: within 0.05 nats of the likelihood with its normaliser by a grid."""
    exact = benchmark.divergence(benchmark.learned(benchmark.Exact()))
    chains = benchmark.learned(benchmark.OBJECTIVES["CD, 20 MALA"]())
    assert benchmark.divergence(chains) < exact + 0.05, exact
    contrast = benchmark.learned(shape.NCE(8))
    assert abs(float(contrast.noise_contrast - benchmark.grid_log_normalizer(contrast))) < 0.05


def test_a_context_is_learned():
    """y | c ~ N(0, e^c), by persistent chains that carry their contexts with them."""
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.zeros(()))

        def forward(self, y: Tensor, c: Tensor) -> Tensor:
            return 0.5 * y[:, 0].square() * (-self.slope * c[:, 0]).exp()

    c = torch.rand(8000, 1) * 2 - 1
    y = torch.randn(8000, 1) * (0.5 * c).exp()
    objective = shape.Contrastive(step_size=1.0, buffer_size=2000)
    model = gm.Energy(1, 1, network=Scaled(), base=None, objective=objective)
    gm.fit(model, y, c, max_epochs=6, batch_size=500, learning_rate=0.05, standardize=False, **QUIET)
    assert float(model.network.slope.detach()) == pytest.approx(_likeliest(y[:, 0], c[:, 0]), abs=0.1)


def _likeliest(y: Tensor, c: Tensor) -> float:
    """The slope of maximum likelihood, by bisection of the derivative."""
    low, high = 0.0, 3.0
    for _ in range(40):
        middle = (low + high) / 2
        falling = float((c * (y.square() * (-middle * c).exp() - 1)).mean()) > 0
        low, high = (middle, high) if falling else (low, middle)
    return low


def test_a_loss_that_is_no_number_stops_training():
    class Bad(Quadratic):
        def forward(self, y: Tensor) -> Tensor:
            energy = super().forward(y)
            return torch.where(self.precision < 0.9, energy * torch.nan, energy)

    model = gm.Energy(1, network=Bad(), base=None, objective="sliced")
    with pytest.warns(RuntimeWarning, match="non-finite"):
        gm.fit(model, 3 * torch.randn(500, 1), max_epochs=3, learning_rate=0.05, standardize=False, **QUIET)


# -- laws and samplers ------------------------------------------------------------------------------------------------

SAMPLERS = {
    "annealed": shape.Annealed(4000),
    "hmc": shape.Chains("hmc", transitions=20),
    "mala": shape.Chains("mala", transitions=80),
    "tempering": "tempering",
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_of_a_gaussian(name):
    """A base with the data's moments tilted by a quadratic: precision 1 + 3, in the user's units."""
    torch.manual_seed(0)
    model = gm.Energy(2, network=lambda y: 1.5 * y.square().sum(-1), sampler=SAMPLERS[name])
    model.standardize(torch.randn(5000, 2) * torch.tensor([1.0, 10.0]) + 5.0)
    centre, scale = model.coordinates.standardization.shift, model.coordinates.standardization.scale
    correlation = model.reference.whitening.factor
    x = (model().sample((4000,)) - centre) / scale
    white = torch.linalg.solve_triangular(correlation, x.mT, upper=False).mT
    exact = (correlation.inverse().mT @ correlation.inverse() + 3 * torch.eye(2)).inverse()
    assert_mean(white[:1000], torch.zeros(2), name=name)
    assert_mean(x[:1000].square(), exact.diagonal(), name=name)


def test_unadjusted_chains_are_biased_by_what_they_say():
    """Variance s^2 / (1 - e^2 / (4 s^2)), within two per cent."""
    torch.manual_seed(0)
    model = gm.Energy(1, network=lambda y: 0.5 * y.square().sum(-1), base=None)
    model.sampler = shape.Chains("ula", warmup=10, transitions=100, step_size=1.0)
    assert float(model().sample((200_000,)).var()) == pytest.approx(1 / (1 - 1 / 4), rel=0.02)


def test_modes_keep_their_weights():
    """Two modes at +-4 of weights .3 and .7: members of an annealed population, where plain chains have one half."""
    torch.manual_seed(0)
    mixture = shape.GaussianMixture(torch.tensor([[-4.0], [4.0]]), torch.tensor([0.3, 0.7]), 0.5)

    def right(law: gm.Energy) -> float:
        return float((law().sample((3000,)) > 0).float().mean())

    model = gm.Energy(1, network=lambda y: mixture.energy_rows(5 * y, None) - 0.5 * y.square().sum(-1))
    model.coordinates.standardization.scale.fill_(5.0)
    model.coordinates.standardization.active = True
    assert right(model) == pytest.approx(0.7, abs=0.05)
    model.sampler = shape.Tempering(6, warmup=60, transitions=20)
    assert right(model) == pytest.approx(0.7, abs=0.05)
    model.sampler = shape.Chains()
    assert right(model) == pytest.approx(0.5, abs=0.1)


def test_every_context_has_its_own_population():
    model = gm.Energy(1, 1, network=lambda y, c: 0.5 * ((y - c) / 0.1).square().sum(-1), base=None)
    c = torch.tensor([[-2.0], [0.0], [3.0]])[torch.arange(30) % 3]
    torch.manual_seed(0)
    x = model(c).sample((200,))
    assert x.shape == (200, 30, 1)
    assert_mean((x - c).flatten(1), torch.zeros(30), name="centres")
    assert float((x - c).std()) == pytest.approx(0.1, rel=0.05)


def test_steps_weigh_and_look_ahead():
    """The sum of the weights of unforked particles is an unbiased estimate of Z; the finished values are draws."""
    torch.manual_seed(0)
    model = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)
    steps = model().steps(10).start(3000)
    for step in steps:
        assert step.log_weight.shape == (3000,) and 0 <= step.acceptance <= 1
        if step.index == 5:
            ahead = steps.look_ahead()
    log_z = steps.log_weights.logsumexp(0) - math.log(3000)
    assert float(log_z) == pytest.approx(-math.log(3), abs=0.05)
    assert float(ahead.var()) == pytest.approx(1 / 9, rel=0.2) and steps.value.shape == (3000, 1)
    with pytest.raises(ShapeError, match="ancestors"):
        steps.fork(torch.zeros(3000))
    with pytest.raises(ValueError, match="at least 1"):
        model().steps(0)


def test_tilt_and_base():
    """``log p = log b + tilt``, on any support and over any base; the score is the gradient."""
    flow = gm.transform.coupling_flow(2, support=constraints.positive)
    for base in ("gaussian", flow):
        support = constraints.positive if base == "gaussian" else None
        model = gm.Energy(2 if base == "gaussian" else None, base=base, support=support)
        x = dist.LogNormal(0.0, 1.0).sample((6, 2))
        law = model()
        total = law.untilted.log_prob(x) + law.tilt(x)
        assert torch.allclose(law.log_prob(x), total.detach(), atol=1e-5)
        assert law.expand([3, 1]).untilted.batch_shape == (3, 1)
        leaf = x.clone().requires_grad_()
        assert torch.allclose(law.score(x), torch.autograd.grad(law.log_prob(leaf).sum(), leaf)[0])


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = gm.Energy(2, 1, objective=shape.Contrastive(transitions=2, buffer_size=64), hidden_features=(8,))
    x, c = torch.randn(200, 2) * 3, torch.randn(200, 1)
    gm.fit(model, x, c, max_epochs=2, batch_size=50, **QUIET)
    model.normalizer.attach(1.5, 0.1)
    gm.save(model, tmp_path / "energy.safetensors")
    same = gm.load(tmp_path / "energy.safetensors")
    assert torch.equal(same(c).log_prob(x), model(c).log_prob(x)) and same(c).density is gm.Density.ESTIMATE
    assert torch.equal(same.negatives.positions, model.negatives.positions)
    assert same.log_normalizer_error == pytest.approx(0.1)


def test_training_resumes_bit_for_bit(tmp_path):
    """Chains and their step size are part of the state."""

    def trained(epochs: int, file: str) -> gm.Energy:
        torch.manual_seed(0)
        objective = shape.Contrastive(transitions=2, buffer_size=64)
        model = gm.Energy(1, objective=objective, hidden_features=(8,))
        options = {**QUIET, "batch_size": 50, "schedule": "constant", "checkpoint": tmp_path / file}
        gm.fit(model, torch.arange(100.0)[:, None], max_epochs=epochs, **options)
        return model

    whole = trained(4, "whole")
    again = trained(4, "whole")  # finished: taken from the file
    assert torch.equal(whole.negatives.positions, again.negatives.positions)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_bad_networks():
    wrong = {
        "two numbers": (lambda y: y, ShapeError, "needs one number each"),
        "one for all": (lambda y: y.sum(), ShapeError, "needs one number each"),
        "of other rows": (lambda y: nn.functional.linear(y, torch.ones(1, 5)), ShapeError, "fails on rows"),
        "rounded": (lambda y: y.round().detach().sum(-1), DensityError, "no gradient"),
        "random": (lambda y: y.sum(-1) + torch.rand(len(y)), ValueError, "fixed function"),
        "mixed": (lambda y: (y - y.mean(0)).square().sum(-1), ValueError, "mixes the rows"),
    }
    for network, error, message in wrong.values():
        with pytest.raises(error, match=message):
            gm.Energy(2, network=network)
    rectified = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    for objective in ("sliced", "hyvarinen"):
        with pytest.raises(DensityError, match="second derivatives"):
            gm.Energy(2, network=rectified, objective=objective)
    gm.Energy(2, network=rectified, objective="contrastive")


def test_an_energy_without_walls_is_refused():
    x = torch.randn(200, 2)
    for network in (lambda y: y.sum(-1), lambda y: y.square().sum(-1).add(1).log(), lambda y: -y.square().sum(-1)):
        with pytest.raises(DensityError, match=r"no\s+normaliser"):
            shape.network.check_confining(gm.Energy(2, network=network, base=None))
    falling = gm.Energy(2, network=nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), base=None)
    with pytest.raises(DensityError, match="base='gaussian'"):
        gm.fit(falling, x, max_epochs=1, **QUIET)
    shape.network.check_confining(gm.Energy(2, network=lambda y: y.abs().sum(-1), base=None))


def test_bad_options():
    for options, message in (
        ({"objective": "likelihood"}, "objective: got 'likelihood'"),
        ({"sampler": "gibbs"}, "sampler: got 'gibbs'"),
        ({"base": "flat"}, "base: got 'flat'"),
        ({"objective": "nce", "base": None}, "needs one"),
        ({"learn": "contrastive"}, "objective='contrastive'"),
    ):
        with pytest.raises(ValueError, match=message):
            gm.Energy(2, **options)
    for make, message in (
        (lambda: shape.Contrastive(temperature=0.0), "temperature"),
        (lambda: shape.Contrastive(kernel="hmc"), "kernel"),
        (lambda: shape.Contrastive(restart=1.5), "restart"),
        (lambda: shape.Contrastive(transitions=0), "transitions"),
        (lambda: shape.Denoising((0.1, 0.5)), "falling"),
        (lambda: shape.Denoising(-1.0), "positive"),
        (lambda: shape.Sliced(0), "directions"),
        (lambda: shape.Recovery(0.0), "noise"),
        (lambda: shape.NCE(0), "draws: got 0"),
        (lambda: shape.Annealed(2), "particles"),
        (lambda: shape.Chains("nuts"), "kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ShapeError, match="features"):
        gm.Energy()
    model = gm.Energy(2, objective=shape.Contrastive(buffer_size=16))
    with pytest.raises(ValueError, match=r"buffer_size: 16 chains are kept, and a batch needs 32"):
        model.loss(torch.randn(32, 2))
    with pytest.raises(DensityError, match="exact density"):
        gm.Energy(base=gm.Diffusion(2).sampled_by())


def test_an_energy_that_is_nowhere_finite_has_no_draws():
    model = gm.Energy(1, network=lambda y: y.sum(-1) * torch.inf)
    with pytest.raises(SamplingError, match="finite"):
        model().sample()


def test_parameters_that_are_learned_through_the_density_are_refused():
    import pyro

    pyro.clear_param_store()
    model = gm.Energy(1)
    x = torch.randn(4, 1)
    model().log_prob(x)
    pyro.module("energy", model)
    with pytest.raises(DoublyIntractableError, match=r"energy\$\$\$network"):
        model().log_prob(x)
    with torch.no_grad():
        model().log_prob(x)
    pyro.clear_param_store()


def test_a_normaliser_belongs_to_its_weights():
    model = gm.Energy(1, objective="sliced", hidden_features=(8,))
    model.normalizer.attach(0.7, 0.01)
    assert model().density is gm.Density.ESTIMATE
    gm.fit(model, torch.randn(100, 1), max_epochs=1, **QUIET)
    assert model().density is gm.Density.UNNORMALIZED and math.isnan(model.log_normalizer_error)
    exact = gm.Energy(1, network=lambda y: y.square().sum(-1), base=None, log_normalizer=lambda: torch.tensor(0.5))
    assert exact().density is gm.Density.EXACT
    assert float(exact().log_prob(torch.zeros(1))) == pytest.approx(-0.5)
