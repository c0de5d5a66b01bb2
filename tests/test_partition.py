"""The constant of an energy's law: against closed forms and quadrature, with honest errors, or refused."""

from __future__ import annotations

import dataclasses
import math

import arviz
import pyro.distributions as dist
import pytest
import torch
import zuko
from torch import nn
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods.foundation.errors import (
    DensityError,
    DoublyIntractableError,
    PlacementError,
    SamplingError,
    ShapeError,
)
from pyro_genmods.foundation.kriging import Interpolation
from pyro_genmods.foundation.mixture import fit_mixture
from pyro_genmods.foundation.pareto import pareto_shape
from pyro_genmods.foundation.ratios import bridge, mean_exp
from pyro_genmods.shape import (
    DoubleWell,
    Funnel,
    Gaussian,
    GaussianMixture,
    LogNormalizer,
    log_normalizer,
    normalize,
)

from .statistics import assert_mean, judge

SMALL = {"particles": 128, "runs": 4, "components": 2, "seed": 0}
METHODS = ("auto", "ais", "smc", "bridge", "thermodynamic", "importance")


def assert_found(found: LogNormalizer, truth: float, slack: float = 0.0) -> None:
    """The estimate is within five standard errors (of few runs), and the bounds hold the truth."""
    assert abs(found.value - truth) < 5 * found.standard_error + slack, (found, truth)
    assert found.lower < truth < found.upper, (found, truth)


class Widening(nn.Module):
    r"""The energy :math:`|y|^2 e^c`, with :math:`\log Z = \tfrac d2 (\log \pi - c)`."""

    def forward(self, y, c):
        return y.square().sum(-1) * c[:, 0].exp()


def widening() -> gm.Energy:
    return gm.Energy(2, context_features=1, network=Widening(), base=None)


# -- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_constant(method):
    law = DoubleWell(2)
    found = log_normalizer(law, method=method, **SMALL)
    assert found.ok, found
    assert_found(found, law.exact_log_normalizer)
    assert 0.01 < found.standard_error * math.sqrt(512) < 5
    assert 0.2 < found.ess <= 1
    assert found.gradients > 0
    assert "exact draws" in found.reason
    assert found.method.startswith({"auto": "bridge"}.get(method, method))


def test_an_energy_with_a_base_in_its_own_units():
    r"""Data of N(5, 2^2): the base is standard normal in coordinates, and a tilt of y^2 makes precision 3 of it."""
    energy = gm.Energy(1, network=lambda y: y[:, 0] ** 2)
    energy.standardize(torch.randn(5000, 1, generator=torch.Generator().manual_seed(0)) * 2 + 5)
    shift = energy.coordinates.pull(torch.tensor([[5.0]]))[0]
    found = log_normalizer(energy, **SMALL)
    x = torch.linspace(-10, 20, 20_001)[:, None]
    truth = float(energy().log_prob(x).exp().sum().log()) + math.log(30 / 20_000)
    assert abs(float(shift)) < 0.1
    assert abs(truth + 0.5 * math.log(3)) < 0.05
    assert_found(found, truth)
    assert "only as good" in found.reason


def test_a_support_is_integrated_in_its_own_units():
    energy = gm.Energy(2, network=lambda u: (u - 1).square().sum(-1), base=None, support=constraints.positive)
    x = torch.linspace(1e-4, 60, 60_001).double()[:, None]
    one = gm.Energy(1, network=lambda u: (u - 1).square().sum(-1), base=None, support=constraints.positive).double()
    truth = 2 * (float(one().log_prob(x).exp().sum().log()) + math.log(60 / 60_000))
    found = log_normalizer(energy, **SMALL)
    assert_found(found, truth, 0.002)


TILTED = torch.tensor([[1.0, 0.8], [0.8, 1.0]])


def test_a_flow_as_base():
    torch.manual_seed(0)
    law = Gaussian(torch.tensor([1.0, 0.0]), TILTED)
    flow = gm.Flow(zuko.flows.NICE(2, transforms=2, hidden_features=(16,)))
    gm.fit(flow, law().sample((1000,)), max_epochs=5, learning_rate=1e-2, seed=0, progress_bar=False)
    found = log_normalizer(law, base=flow, **SMALL)
    assert found.ok, found
    assert_found(found, law.exact_log_normalizer)
    assert "Flow" in found.method


def test_a_wide_proposal_is_trusted():
    law, wide = Gaussian(torch.zeros(2), TILTED), Gaussian(torch.zeros(2), 2 * TILTED, normalized=True)
    found = log_normalizer(law, method="importance", base=wide, **SMALL)
    assert found.ok, found
    assert_found(found, law.exact_log_normalizer)
    assert found.standard_error == pytest.approx(math.sqrt((4 / 3 - 1) / 512), rel=0.1), "Var w = 2^2 / 3 - 1"


def test_narrow_and_wide_directions_and_one_component():
    law = Gaussian(torch.zeros(8), torch.logspace(-2, 2, 8))
    found = log_normalizer(law, **{**SMALL, "components": 1})
    assert found.ok, found
    assert_found(found, law.exact_log_normalizer)


def test_temperatures_are_as_many_as_asked_for():
    found = log_normalizer(DoubleWell(1), method="ais", temperatures=5, **SMALL)
    assert "5 temperatures" in found.method
    assert_found(found, DoubleWell(1).exact_log_normalizer)


def test_discrete_energies_are_annealed_by_their_own_path():
    law = gm.shape.Ising(3, 0.4406867935, normalized=False)
    found = log_normalizer(law, **SMALL)
    assert found.ok, found
    assert_found(found, 9.02021340)
    assert found.method.startswith("bridge from own")


@pytest.mark.parametrize("law", [DoubleWell(1), gm.shape.Ising(2, 0.2, normalized=False)], ids=["real", "binary"])
def test_a_seed_repeats_it_and_the_random_stream_is_left_alone(law):
    options = {"particles": 16, "runs": 2, "components": 1, "temperatures": 2}
    torch.manual_seed(3)
    first = log_normalizer(law, seed=0, **options)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()) == after
    assert log_normalizer(law, seed=0, **options) == first
    assert log_normalizer(law, seed=1, **options).value != first.value
    torch.manual_seed(3)
    unseeded = log_normalizer(law, **options)
    torch.manual_seed(3)
    assert log_normalizer(law, **options) == unseeded != first


# -- the flags --------------------------------------------------------------------------------------------------------


def far_base() -> gm.GenerativeModel:
    return Gaussian(torch.full((4,), 5.0), torch.eye(4), normalized=True)


def test_weights_that_are_worth_little_are_said_to_be():
    law = Gaussian(torch.zeros(4), torch.eye(4))
    found = log_normalizer(law, method="ais", base=far_base(), temperatures=2, **SMALL)
    assert not found.ok
    assert found.ess < 0.2
    assert "less than 20%" in found.reason
    assert found.lower < law.exact_log_normalizer < found.upper, "the bounds still hold"


def test_a_proposal_that_is_too_narrow_shows_in_the_shape_of_the_tail():
    law = Gaussian(torch.zeros(4), torch.eye(4))
    narrow = Gaussian(torch.zeros(4), 0.3 * torch.eye(4), normalized=True)
    found = log_normalizer(law, method="importance", base=narrow, **{**SMALL, "particles": 512})
    assert not found.ok
    assert "tail of shape" in found.reason


def test_what_cannot_be_believed_is_not_attached():
    law = Gaussian(torch.zeros(4), torch.eye(4))
    options = {"method": "ais", "base": far_base(), "temperatures": 2, **SMALL, "particles": 32}
    with pytest.raises(DensityError, match="cannot be believed: the weights are worth"):
        normalize(law, **options)
    assert law.density is gm.Density.UNNORMALIZED
    normalize(law, force=True, **options)
    assert law.density is gm.Density.ESTIMATE


def test_the_record_is_frozen():
    found = LogNormalizer(0.0, 0.1, -0.1, 0.1, 1.0, 1, "auto", True, "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.value = 0.0


# -- attached ---------------------------------------------------------------------------------------------------------


def test_a_normalised_energy_integrates_to_one_and_says_so(tmp_path):
    energy = gm.Energy(1, network=lambda y: y[:, 0] ** 4)
    found = normalize(energy, **SMALL)
    assert energy.density is gm.Density.ESTIMATE
    assert energy.log_normalizer_error == pytest.approx(found.standard_error)
    x = torch.linspace(-8, 8, 4001)[:, None]
    mass = float(energy().log_prob(x).exp().sum()) * 16 / 4000
    assert abs(math.log(mass)) < 5 * found.standard_error
    energy.after_fit(x)
    assert energy.density is gm.Density.UNNORMALIZED, "it belonged to the weights of the past"


@pytest.fixture(scope="module")
def conditional() -> tuple[gm.Energy, LogNormalizer]:
    model = widening()
    return model, normalize(model, torch.linspace(-3, 3, 9)[:, None], **SMALL)


def test_a_conditional_constant_is_a_function(conditional):
    model, found = conditional
    truth = math.log(math.pi) - torch.linspace(-3, 3, 9).double()
    assert found.ok
    assert found.value.shape == (9,)
    assert bool(((found.value - truth).abs() < 5 * found.standard_error).all())
    assert bool(((found.lower < truth) & (truth < found.upper)).all())
    c = torch.tensor([[-1.3], [0.2], [2.1]], requires_grad=True)
    x = torch.tensor([[0.5, 0.1]])
    log_prob = model(c).log_prob(x)
    exact = dist.Normal(0.0, (0.5 * (-c).exp()).sqrt()).log_prob(x).sum(-1)
    assert bool((log_prob - exact).abs().max() < 4 * model.log_normalizer_error)
    (slope,) = torch.autograd.grad(log_prob.sum(), c)
    (steep,) = torch.autograd.grad(exact.sum(), c)
    assert torch.allclose(slope, steep, atol=0.05)


def test_an_inferred_context_has_the_right_posterior(conditional):
    r""":math:`c \sim N(0, 1)`, :math:`x \mid c`, and :math:`y = 0` seen of :math:`N(x, I)`: 0.3004, and not -0.5337."""
    model, _ = conditional
    c = torch.linspace(-4, 4, 801)[:, None]
    seen = math.log(2 * math.pi) - (2 * c[:, 0].exp() + 1).log()  # of the energy alone, without its constant
    weight = dist.Normal(0.0, 1.0).log_prob(c[:, 0]) + seen
    assert abs(float((weight.softmax(0) * c[:, 0]).sum()) + 0.534) < 0.03
    weight = weight - model.normalizer(c, len(c))
    assert abs(float((weight.softmax(0) * c[:, 0]).sum()) - 0.3004) < 0.03


def test_a_conditional_constant_is_saved_and_forgotten(conditional, tmp_path):
    model, _ = conditional
    c, x = torch.tensor([[0.3], [1.0]], requires_grad=True), torch.ones(2)
    gm.save(model, tmp_path / "model")
    again = gm.load(tmp_path / "model", allow=[Widening])
    assert again.density is gm.Density.ESTIMATE
    assert torch.equal(again(c).log_prob(x), model(c).log_prob(x))
    assert again.log_normalizer_error == model.log_normalizer_error
    again.after_fit(torch.randn(10, 2), torch.randn(10, 1))
    assert again.density is gm.Density.UNNORMALIZED
    with pytest.raises(DoublyIntractableError):
        again(c).log_prob(x)
    gm.save(again, tmp_path / "forgotten")
    assert gm.load(tmp_path / "forgotten", allow=[Widening]).density is gm.Density.UNNORMALIZED


def test_a_law_brings_its_context():
    model = widening()
    one = log_normalizer(model(torch.tensor([0.5])), **SMALL)
    assert isinstance(one.value, float)
    assert_found(one, math.log(math.pi) - 0.5)
    two = log_normalizer(model, context=torch.tensor([[[0.0]], [[1.0]]]), **SMALL)
    assert two.value.shape == (2, 1)


# -- bad input --------------------------------------------------------------------------------------------------------


class Falling(nn.Module):
    def forward(self, y):
        return -y.square().sum(-1)


class Broken(nn.Module):
    def forward(self, y):
        return y.square().sum(-1) * torch.where(y[:, 0] > 2, torch.nan, 1.0)


class Empty(nn.Module):
    def forward(self, y):
        return y.square().sum(-1) + torch.inf


BASES = {
    "density": (lambda: DoubleWell(2), DensityError, "base: DoubleWell has density UNNORMALIZED"),
    "events": (lambda: DoubleWell(3, normalized=True), ShapeError, r"base: has events \(3,\)"),
    "place": (lambda: DoubleWell(2, normalized=True).double(), PlacementError, "base: is torch.float64"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_does_not_fit_is_refused(case):
    build, error, words = BASES[case]
    with pytest.raises(error, match=words):
        log_normalizer(Funnel(2), base=build(), **SMALL)


@pytest.mark.parametrize(
    ("law", "options", "error", "words"),
    [
        (DoubleWell(2), {"method": "magic"}, ValueError, "method: got 'magic', needs one of 'auto'"),
        (DoubleWell(2), {"particles": 3}, ValueError, "particles: got 3, needs at least 16"),
        (DoubleWell(2), {"runs": 1}, ValueError, "runs: got 1, needs at least 2"),
        (DoubleWell(2), {"temperatures": 0}, ValueError, "temperatures: got 0"),
        (DoubleWell(2), {"components": 0}, ValueError, "components: got 0"),
        (DoubleWell(2, normalized=True), {}, ValueError, "normalised already"),
        (gm.Energy(2, network=Falling(), base=None), {}, DensityError, "no normaliser"),
        (gm.Energy(2, network=Broken(), base=None), {}, (SamplingError, DensityError), "NaN|rises"),
        (gm.Energy(2, network=Broken()), {}, SamplingError, "law: its energy is NaN at"),
        (gm.Energy(2, network=Empty()), {}, SamplingError, "law: its energy is infinite at all"),
        (gm.shape.Ising(3, 0.2, normalized=False), {"method": "importance"}, ValueError, "no rows of real numbers"),
        (gm.Flow(zuko.flows.NICE(2, transforms=1)), {}, DensityError, "no energy"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_bad_input_is_named(law, options, error, words):
    with pytest.raises(error, match=words):
        log_normalizer(law, **options)


def test_contexts_that_are_missing_too_few_or_too_far_apart_are_refused():
    model = widening()
    with pytest.raises(ShapeError, match="conditional; give some"):
        normalize(model)
    with pytest.raises(ShapeError, match="contexts: got 3 with 1 feature"):
        normalize(model, torch.zeros(3, 1), **SMALL)
    with pytest.raises(ShapeError, match="the law has one already"):
        log_normalizer(model(torch.zeros(1)), context=torch.zeros(1))


def test_a_model_that_was_normalised_is_not_normalised_again():
    law = gm.shape.Ising(2, 0.2, normalized=False)
    normalize(law, **SMALL)
    with pytest.raises(ValueError, match=r"normalizer.forget\(\)"):
        normalize(law, **SMALL)
    law.normalizer.forget()
    normalize(law, **SMALL)


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_the_shape_of_a_tail_is_that_of_arviz(scale):
    weights = scale * torch.randn(3000, dtype=torch.float64)
    assert float(pareto_shape(weights)) == pytest.approx(float(arviz.psislw(weights.numpy().copy())[1]), abs=1e-9)
    assert float(pareto_shape(torch.zeros(100))) == -math.inf


def test_the_bridge_has_the_error_that_it_says():
    """Two Gaussians, 400 times: errors in units of the standard error have variance one."""
    x, y = torch.randn(2, 400, 200, dtype=torch.float64)

    def work(q):
        return 0.5 * q**2 - 0.25 * (q - 1) ** 2

    value, error = bridge(work(x), work(2**0.5 * y + 1))
    z = (value - 0.5 * math.log(2)) / error
    assert_mean(z, 0.0, name="bias")
    judge("spread", float(z.var()), 2 * float(dist.Normal(0.0, 1.0).cdf(-abs(z.var() - 1) / (2 / 400) ** 0.5)))


def test_a_mean_of_exponentials_does_not_overflow():
    value, error = mean_exp(torch.tensor([1000.0, 1000.0, -torch.inf, -torch.inf]).double())
    assert float(value) == pytest.approx(1000 - math.log(2))
    assert float(error) == pytest.approx(math.sqrt(4 / 3) / 2)


def test_a_mixture_finds_the_modes_and_is_a_density():
    x = GaussianMixture.ring()().sample((4096,))[None]
    mixture = fit_mixture(x, 16, torch.Generator().manual_seed(0))
    truth = GaussianMixture(GaussianMixture.ring().network.means, scale=0.5, normalized=True)
    assert float((truth().log_prob(x).double() - mixture.log_prob(x.double())).mean()) < 0.05
    wide = mixture.widened(x)
    draws = wide.sample(20_000, torch.Generator().manual_seed(0))
    ratio = (truth().log_prob(draws.float()).double() - wide.log_prob(draws)).exp()
    assert_mean(ratio[0], 1.0, name="mass of the ring, by draws of the mixture")
    assert float(ratio.max()) < 4, "it is nowhere much below"


def test_an_interpolation_knows_its_error():
    g = torch.Generator().manual_seed(0)
    c = 4 * torch.rand(60, 2, generator=g) - 2
    noise = 0.05 * torch.randn(60, generator=g)
    surface = lambda c: c[:, 0].sin() + 0.3 * c[:, 1] ** 2  # noqa: E731
    function = Interpolation(60, 2).fit_(c, surface(c) + noise, torch.full((60,), 0.0025))
    new = 3.6 * torch.rand(500, 2, generator=g) - 1.8
    actual = float((function(new) - surface(new)).square().mean().sqrt())
    assert 0.03 < function.error < 0.15
    assert actual < function.error


# -- what is promised -------------------------------------------------------------------------------------------------

GATES = {  # law, and nats of error allowed
    "double well^10": (lambda: DoubleWell(10), 0.05),
    "ring of 8 in 10-d": (lambda: GaussianMixture.ring(features=10), 0.10),
    "funnel-10": (lambda: Funnel(10), 0.20),
    "gaussian-50, sd .1 to 10": (lambda: Gaussian(torch.zeros(50), torch.logspace(-2, 2, 50)), 0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GATES)
def test_hard_laws_over_many_seeds(name):
    build, allowed = GATES[name]
    law = build()
    truth = law.exact_log_normalizer
    seeds = 20 if "10-d" in name or "funnel" in name else 5
    found = [log_normalizer(law, seed=seed) for seed in range(seeds)]
    errors = torch.tensor([result.value - truth for result in found]).abs()
    claimed = torch.tensor([result.standard_error for result in found])
    assert bool((errors <= allowed).all()), errors
    assert int((errors <= 3 * claimed).sum()) >= 0.9 * seeds - 0.5, errors / claimed
    assert int(sum(result.lower < truth < result.upper for result in found)) >= seeds - 1
    assert sum(result.ok for result in found) >= 0.9 * seeds - 0.5, [result.reason for result in found]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc", "thermodynamic", "importance"])
def test_every_method_on_the_ring(method):
    law = GaussianMixture.ring(features=10)
    found = log_normalizer(law, method=method, seed=0)
    assert found.ok, found
    assert_found(found, law.exact_log_normalizer)
    assert abs(found.value - law.exact_log_normalizer) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "truth"), [(0.2, 11.77147036), (0.4406867935, 15.52191546), (0.6, 20.05653288)])
def test_lattices(beta, truth):
    found = [log_normalizer(gm.shape.Ising(4, beta, normalized=False), seed=seed) for seed in range(5)]
    assert all(abs(result.value - truth) < min(0.05, 4 * result.standard_error) for result in found)
