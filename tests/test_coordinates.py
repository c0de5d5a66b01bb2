"""Truth of the units: standardisation and supports as changes of variables, on both sides of every border."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Size, Tensor
from torch.distributions import biject_to, constraints, transform_to

from pyro_genmods.coordinates import Circular, Coordinates, Standardization, circular, event_support
from pyro_genmods.foundation.errors import DataError, ShapeError, SupportError

DOUBLE = torch.float64

SUPPORTS = {
    "real": (constraints.real, (3,), 3),
    "real_vector": (constraints.real_vector, (2, 3), 6),
    "scalar-like": (constraints.real, (1,), 1),
    "positive": (constraints.positive, (2, 2), 4),
    "nonnegative": (constraints.nonnegative, (3,), 3),
    "greater_than": (constraints.greater_than(3.0), (3,), 3),
    "less_than": (constraints.less_than(-1.0), (3,), 3),
    "unit_interval": (constraints.unit_interval, (3,), 3),
    "half_open": (constraints.half_open_interval(-1.0, 4.0), (3,), 3),
    "simplex": (constraints.simplex, (4,), 3),
    "simplex-rows": (constraints.simplex, (2, 3), 4),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3), 3),
    "ordered": (pyro_constraints.ordered_vector, (4,), 4),
    "mixed": (constraints.cat([constraints.real, constraints.positive], dim=-1, lengths=[1, 2]), (3,), 3),
    "circular-with-bijection": (circular, (2,), 2),
}
every_support = pytest.mark.parametrize("name", SUPPORTS)


def coordinates_of(name: str) -> Coordinates:
    support, event_shape, _ = SUPPORTS[name]
    return Coordinates(Size(event_shape), support).double()


def events(coordinates: Coordinates, n: int) -> Tensor:
    shape = (n, *coordinates.unconstrained_shape)
    u = torch.randn(shape, dtype=DOUBLE)
    return u if coordinates.identity else biject_to(coordinates.support)(u)


# -- constraints ------------------------------------------------------------------------------------------------------


@every_support
def test_support_covers_the_event_and_counts_the_columns(name):
    _, event_shape, features = SUPPORTS[name]
    coordinates = coordinates_of(name)
    assert coordinates.features == features
    assert coordinates.support.event_dim == len(event_shape)
    assert coordinates.support.check(events(coordinates, 5)).shape == (5,)
    assert event_support(coordinates.support, Size(event_shape)) is coordinates.support


def test_a_support_larger_than_the_event_is_refused():
    with pytest.raises(
        ShapeError, match=r"support CorrCholesky.*2 event dimensions.*event_shape \(3,\).*at least as many"
    ):
        event_support(constraints.corr_cholesky, Size([3]))


@pytest.mark.parametrize("support", [constraints.boolean, constraints.nonnegative_integer, pyro_constraints.sphere])
def test_a_support_without_bijection_is_refused_with_the_remedy(support):
    with pytest.raises(SupportError, match=r"no bijection to the reals.*biject_to"):
        Coordinates(Size([3]), support)
    native = Coordinates(Size([3]), support, native=True)
    assert native.features == 3 and native.support.event_dim == 1


def test_circle():
    assert isinstance(circular, Circular) and "Circular" in repr(circular)
    ends = torch.tensor([-math.pi, 0.0, math.pi, 3.2])
    assert circular.check(ends).tolist() == [True, True, True, False]
    for registry in (biject_to, transform_to):
        x = registry(circular)(torch.linspace(-30, 30, 61))
        assert circular.check(x).all() and (x.diff() >= 0).all()


# -- the bijection ----------------------------------------------------------------------------------------------------


@every_support
@pytest.mark.parametrize("standardized", [False, True])
def test_push_and_pull_are_inverse_and_their_volumes_opposite(name, standardized):
    coordinates = coordinates_of(name)
    x = events(coordinates, 40)
    if standardized:
        coordinates.standardize(events(coordinates, 100))
    y, volume = coordinates.pull(x)
    again, back = coordinates.push(y)
    assert y.shape == (40, coordinates.features) and again.shape == x.shape
    assert torch.allclose(again, x, rtol=1e-9, atol=1e-9)
    assert torch.allclose(volume + torch.as_tensor(back, dtype=DOUBLE), torch.zeros(40, dtype=DOUBLE), atol=1e-6)


@every_support
def test_volume_is_the_log_determinant(name):
    """Against autograd in as many independent entries as there are columns."""
    coordinates = coordinates_of(name)
    coordinates.standardize(events(coordinates, 100))
    y, volume = coordinates.pull(events(coordinates, 6))
    free = {"simplex": [0, 1, 2], "simplex-rows": [0, 1, 3, 4], "corr_cholesky": [3, 6, 7]}.get(name)
    for row, log_volume in zip(y, volume, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: coordinates.push(r[None])[0].flatten(), row)
        jacobian = jacobian if free is None else jacobian[free]
        assert torch.linalg.slogdet(jacobian).logabsdet == pytest.approx(-float(log_volume), rel=1e-6, abs=1e-6)


def test_known_inside_changes_nothing_but_the_work():
    for name in ("real", "positive", "simplex"):
        coordinates = coordinates_of(name)
        coordinates.standardize(events(coordinates, 50))
        x = events(coordinates, 5)
        for a, b in zip(coordinates.pull(x), coordinates.pull(x, known_inside=True), strict=True):
            assert torch.equal(a.expand(5, *a.shape[1:]), torch.as_tensor(b).expand(5, *a.shape[1:]))


# -- outside, infinity and NaN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "inside", "outside"),
    [
        (constraints.positive, [1.0, 2.0], [[0.0, 1.0], [-1.0, 2.0]]),
        (constraints.unit_interval, [0.2, 0.7], [[0.5, 1.1], [-1e-3, 0.5]]),
        (constraints.simplex, [0.3, 0.7], [[0.3, 0.6], [-0.1, 1.1]]),
        (constraints.real, [0.0, 1e30], []),
        (circular, [3.0, -3.0], [[3.2, 0.0], [0.0, -4.0]]),
    ],
    ids=["positive", "interval", "simplex", "real", "circle"],
)
@pytest.mark.parametrize("native", [False, True])
def test_outside_is_minus_infinity_and_nan_is_nan(support, inside, outside, native):
    coordinates = Coordinates(Size([2]), support, native=native)
    bad = [[math.inf, 0.5], [0.5, -math.inf], *outside]
    lost = [[math.nan, 0.5], [0.5, math.nan], [math.nan, math.inf], [-1.0, math.nan]]
    x = torch.tensor([inside, *bad, *lost], requires_grad=True)
    y, volume = coordinates.pull(x)
    assert y.isfinite().all(), "a network was shown a number that it may never return from"
    assert volume[0].isfinite()
    assert (volume[1 : 1 + len(bad)] == -math.inf).all()
    assert volume[1 + len(bad) :].isnan().all()
    (gradient,) = torch.autograd.grad(y.sum() + 3 * volume[0], x)
    assert gradient.isfinite().all() and gradient[0].any() and not gradient[1:].any()
    alone, _ = coordinates.pull(x[:1])
    assert torch.equal(alone, y[:1]), "bad rows changed a good one"


# -- standardisation --------------------------------------------------------------------------------------------------


@every_support
def test_standardised_data_have_mean_zero_and_deviation_one(name):
    coordinates = coordinates_of(name)
    x = events(coordinates, 300)
    coordinates.standardize(x)
    y, _ = coordinates.pull(x)
    assert torch.allclose(y.mean(0), torch.zeros(coordinates.features, dtype=DOUBLE), atol=1e-9)
    assert torch.allclose(y.std(0, correction=0), torch.ones(coordinates.features, dtype=DOUBLE), atol=1e-9)
    assert coordinates.standardization.active
    before = [coordinates.standardization.shift.clone(), coordinates.standardization.scale.clone()]
    coordinates.standardize(x)
    assert torch.allclose(coordinates.standardization.shift, before[0], atol=1e-12), "standardised twice"


def test_standardisation_is_an_affine_change_of_variables():
    coordinates = Coordinates(Size([2]), constraints.real).double()
    truth = dist.Normal(torch.tensor([5.0, -300.0], dtype=DOUBLE), torch.tensor([1e-3, 40.0], dtype=DOUBLE)).to_event(1)
    x = truth.sample((1000,))
    coordinates.standardize(x)
    y, volume = coordinates.pull(x)
    fitted = dist.Normal(x.mean(0), x.std(0, correction=0)).to_event(1)
    standard = dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1)
    assert torch.allclose(standard.log_prob(y) + volume, fitted.log_prob(x), rtol=1e-9, atol=1e-9)


def test_until_fitted_it_is_the_identity():
    standardization = Standardization(3)
    u = torch.randn(4, 3)
    assert standardization(u) is u and standardization.inverse(u) is u and standardization.log_scale() == 0.0
    assert "active=False" in repr(standardization)


def test_constant_columns():
    x = torch.randn(50, 3)
    x[:, 1] = 7.0
    with pytest.raises(DataError, match=r"column\(s\) \[1\] of the data are constant.*point mass.*dequantisation"):
        Coordinates(Size([3]), constraints.real).standardize(x)
    context = Standardization(3)  # a constant context is useless, but no error
    context.fit_(x)
    assert context.scale[1] == 1 and torch.equal(context(x)[:, 1], torch.zeros(50))


def test_native_coordinates_are_left_as_they_are():
    coordinates = Coordinates(Size([2]), circular, native=True)
    coordinates.standardize(torch.rand(20, 2))
    x = torch.rand(5, 2)
    y, volume = coordinates.pull(x)
    assert torch.equal(y, x) and not volume.any() and not coordinates.standardization.active


def test_shift_and_scale_travel_with_the_state():
    source, target = Standardization(2), Standardization(2)
    source.fit_(torch.randn(100, 2) * 3 + 1)
    target.load_state_dict(source.state_dict())
    u = torch.randn(5, 2)
    assert target.active and torch.equal(target(u), source(u))
    target.load_state_dict(Standardization(2).state_dict())
    assert not target.active
    assert source.double().shift.dtype is DOUBLE and source.double().active
