"""References: the constants, moments and draws that they claim, against quadrature and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import iv
from torch import Tensor, nn
from torch.distributions import Normal

import pyro_genmods as gm
from pyro_genmods.foundation.errors import ShapeError
from pyro_genmods.shape import Banana, DoubleWell, Funnel, Gaussian, GaussianMixture, Reference, Rosenbrock

from .statistics import assert_law, assert_mean

COVARIANCE = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
REFERENCES = {
    "gaussian": lambda **k: Gaussian(torch.tensor([1.0, -2.0]), COVARIANCE, **k),
    "mixture": lambda **k: GaussianMixture(torch.tensor([[-4.0, 0.0], [4.0, 1.0]]), torch.tensor([0.3, 0.7]), 0.5, **k),
    "double-well": lambda **k: DoubleWell(2, **k),
    "double-well-high": lambda **k: DoubleWell(2, 1.0, 2.0, **k),
    "banana": lambda **k: Banana(**k),
    "rosenbrock": lambda **k: Rosenbrock(**k),
    "funnel": lambda **k: Funnel(2, **k),
    "funnel-10": lambda **k: Funnel(10, **k),
    "ring": lambda **k: GaussianMixture(GaussianMixture.ring().network.means, scale=0.5, **k),
}
PLANES = {  # squares that hold all but a millionth, and the numbers of their points
    "gaussian": ((-9, 11), (-9, 7), 800),
    "mixture": ((-8, 8), (-4, 5), 800),
    "double-well": ((-3, 3), (-3, 3), 600),
    "double-well-high": ((-4, 4), (-4, 4), 600),
    "banana": ((-60, 60), (-6, 6), 600),
    "rosenbrock": ((-18, 20), (-2, 2), 600),
    "ring": ((-7, 7), (-7, 7), 800),
}
RIDGES = {"banana": lambda x: 0.03 * x**2 - 3, "rosenbrock": lambda x: x**2}  # from where the second is measured
KNOWN = [
    (DoubleWell(1), 0.3442382197, 0.8521361522),
    (DoubleWell(1, 5.0), -0.1814513706, 0.9368339404),
    (DoubleWell(1, 1.0, 2.0), -0.1082111026, 3.9341046423),
    (DoubleWell(10), 3.442382197, 0.8521361522),
    (Banana(), 4.1404621594, 100.0),
    (Rosenbrock(), 1.8378770664, 10.0),
    (Funnel(10), 10.2879976207, 9.0),
    (GaussianMixture.ring(features=10), math.log(8) + 10 * math.log(0.5) + 5 * math.log(2 * math.pi), 8.25),
]


def bent(name: str, x: Tensor, sign: int) -> Tensor:
    """Rows with the second column measured from the ridge, or back; this does not change areas."""
    return x + sign * torch.stack([0 * x[:, 0], RIDGES[name](x[:, 0])], -1) if name in RIDGES else x


def grid(name: str) -> tuple[Tensor, float]:
    """Points ``(n, 2)`` of a square, bent along the ridge if there is one, and the area of each."""
    (left, right), (low, high), n = PLANES[name]
    x, y = (torch.linspace(a, b, n, dtype=torch.float64) for a, b in ((left, right), (low, high)))
    points = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    points = bent(name, points, 1)
    return points, float((x[1] - x[0]) * (y[1] - y[0]))


@pytest.mark.parametrize(("law", "log_normalizer", "variance"), KNOWN, ids=lambda x: type(x).__name__)
def test_constants_are_those_of_the_table(law, log_normalizer, variance):
    assert abs(law.exact_log_normalizer - log_normalizer) < 1e-8
    assert abs(float(law.variance[0]) - variance) < 1e-5 * variance


@pytest.mark.parametrize(("height", "distance"), [(2.0, 1.0), (1.0, 2.0), (0.1, 0.5), (5.0, 1.5)])
def test_the_double_well_is_that_of_bessel(height, distance):
    a = height * distance**4 / 2
    z = math.pi * distance / 2 * math.exp(-a) * (iv(-0.25, a) + iv(0.25, a))
    assert abs(DoubleWell(3, height, distance).exact_log_normalizer - 3 * math.log(z)) < 1e-8


@pytest.mark.parametrize("name", PLANES)
def test_quadrature_gives_the_constant_and_the_moments(name):
    law = REFERENCES[name]().double()
    points, area = grid(name)
    density = law().log_prob(points).exp() * area
    assert abs(float(density.sum().log()) - law.exact_log_normalizer) < 1e-3
    mean = (density[:, None] * points).sum(0) / density.sum()
    variance = (density[:, None] * (points - mean).square()).sum(0) / density.sum()
    size = law.variance.sqrt()
    assert torch.allclose(mean / size, law.mean.double() / size, atol=2e-3)
    assert torch.allclose(variance / law.variance, torch.ones(2).double(), atol=5e-3)


@pytest.mark.parametrize("name", REFERENCES)
def test_with_its_constant_the_density_is_exact(name):
    plain, known = REFERENCES[name](), REFERENCES[name](normalized=True)
    assert (plain.density, known.density) == (gm.Density.UNNORMALIZED, gm.Density.EXACT)
    x = known().sample((5,))
    gap = plain().log_prob(x) - known().log_prob(x)
    assert torch.allclose(gap, torch.full((5,), known.exact_log_normalizer), atol=1e-4)
    known.standardize(7 * x + 3)
    assert torch.equal(plain().log_prob(x) - known().log_prob(x), gap), "units are those of the formula"


@pytest.mark.parametrize("name", REFERENCES)
def test_draws_have_the_moments(name):
    law = REFERENCES[name]()
    x = law().sample((20_000,))
    if not name.startswith("funnel"):  # whose second moments have no useful error
        assert_mean(x, law.mean, name=name)
        assert_mean((x - law.mean).square(), law.variance, name=name)
    assert_mean(law().log_prob(x) - law().log_prob(REFERENCES[name]()().sample((20_000,))), 0.0, name=name)


def density_column(law: Reference, name: str, column: int) -> tuple[Tensor, Tensor]:
    """Points along a column, and the distribution function there, by quadrature."""
    points, area = grid(name)
    density = (law().log_prob(points) - law.exact_log_normalizer).exp() * area
    n = PLANES[name][2]
    marginal = density.reshape(n, n).sum(1 - column)
    low, high = PLANES[name][column]
    return torch.linspace(low, high, n, dtype=torch.float64), marginal.cumsum(0) - marginal / 2


@pytest.mark.parametrize("name", PLANES)
def test_draws_follow_the_density(name):
    law = REFERENCES[name]().double()
    draws = bent(name, law().sample((5_000,)), -1)
    for column in (0, 1):
        x, cdf = density_column(law, name, column)

        def at(value, x=x, cdf=cdf):
            place = ((value - x[0]) / (x[1] - x[0])).clamp(0, len(x) - 1.001)
            low = place.long()
            return torch.lerp(cdf[low], cdf[low + 1], place - low).clamp(0, 1)

        assert_law(draws[:, column], at, name)


def test_a_funnel_is_gaussian_twice():
    x = Funnel(4)().sample((20_000,))
    assert_law(x[:, 0], Normal(0.0, 3.0).cdf, "v")
    assert_law(x[:, 1:] * (-0.5 * x[:, :1]).exp(), Normal(0.0, 1.0).cdf, "x given v")


def test_modes_have_their_weights():
    x = GaussianMixture.pair(features=3)().sample((20_000,))
    assert_mean((x[:, 0] > 0).double(), 0.7, name="weight")


def test_a_reference_is_saved(tmp_path):
    for name, build in REFERENCES.items():
        law = build(normalized=True)
        gm.save(law, tmp_path / "law")
        again = gm.load(tmp_path / "law")
        x = law().sample((3,))
        assert torch.equal(again().log_prob(x), law().log_prob(x)), name
        assert again.exact_log_normalizer == law.exact_log_normalizer
        assert torch.equal(again.mean, law.mean)


def test_its_energy_is_a_network_for_others(tmp_path):
    model = gm.Energy(2, network=DoubleWell(2).network)
    gm.save(model, tmp_path / "law")
    x = torch.randn(3, 2)
    assert torch.equal(gm.load(tmp_path / "law")().log_prob(x), model().log_prob(x))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Gaussian(torch.zeros(2), torch.eye(3)), ShapeError, "mean, covariance: got"),
        (lambda: Gaussian(torch.zeros(2), -torch.eye(2)), ValueError, "not positive definite"),
        (lambda: GaussianMixture(torch.zeros(2, 2), torch.ones(3)), ShapeError, "means, weights: got"),
        (lambda: GaussianMixture(torch.zeros(2, 2), scale=0.0), ValueError, "need positive"),
        (lambda: GaussianMixture(torch.zeros(2, 2), torch.tensor([1.0, -1.0])), ValueError, "need positive"),
        (lambda: DoubleWell(2, height=0.0), ValueError, "height, distance: got"),
        (lambda: Banana(scale=-1.0), ValueError, "scale: got"),
        (lambda: Funnel(1), ValueError, "features: got 1"),
    ],
)
def test_bad_input_is_named(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_reference_says_what_it_is():
    law = DoubleWell(2)
    assert isinstance(law.network, nn.Module)
    assert law.cost == gm.Cost(sample=0, score=1)
    assert law.base is None
    assert law.draws_exactly
