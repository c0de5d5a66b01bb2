"""Bad input: a clear error of the right class that names the argument, what was got, and the remedy."""

from __future__ import annotations

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods.foundation.errors import DataError, DensityError, PlacementError, ShapeError, SupportError

from .laws import LAWS, Law, rows, shared, zuko

F = zuko.flows
SMALL = {"transforms": 1, "hidden_features": (8,)}


def plain(**kwargs) -> gm.Flow:
    return gm.Flow(F.NSF(3, **SMALL), **kwargs)


def conditional() -> gm.Flow:
    return gm.Flow(F.NSF(3, context=2, **SMALL))


# -- building ---------------------------------------------------------------------------------------------------------


def unchecked(flow: object, **kwargs) -> None:
    """Construct as a user does, without the type checks of the test suite."""
    inspect.unwrap(gm.Flow.__init__)(gm.Flow.__new__(gm.Flow), flow, **kwargs)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), dist.Normal(0.0, 1.0), None, F.NSF, F.NSF(3)(), F.NSF(3).transform])
def test_not_a_zuko_flow(thing):
    with pytest.raises(TypeError, match=r"flow: got \w+, needs a zuko lazy flow, e\.g\. zuko\.flows\.NSF"):
        unchecked(thing)
    with pytest.raises(TypeError):
        gm.Flow(thing)


def test_a_lazy_distribution_that_is_neither_flow_nor_mixture():
    other = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(2), torch.ones(2))
    with pytest.raises(TypeError, match=r"UnconditionalDistribution is neither a zuko\.lazy\.Flow nor"):
        gm.Flow(other)


def test_a_base_that_is_not_understood():
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.Joint, zuko.distributions.GeneralizedNormal(torch.tensor(2.0))
    )
    flow = zuko.lazy.Flow(F.NSF(1).transform, base)
    with pytest.raises(TypeError, match=r"flow: its base is Joint; needs zuko's DiagNormal or BoxUniform"):
        gm.Flow(flow)


@pytest.mark.parametrize("direction", ["forward", "", None, 1])
def test_wrong_direction(direction):
    with pytest.raises(ValueError, match=rf"direction: got {direction!r}, needs 'density' or 'sampling'"):
        unchecked(F.NSF(3), direction=direction)


@pytest.mark.parametrize(
    ("support", "event_shape", "got"),
    [
        (None, (2,), r"has 2 coordinates, the flow has 3"),
        (None, (2, 2), r"has 4 coordinates, the flow has 3"),
        (constraints.simplex, (3,), r"has 2 coordinates, the flow has 3"),
        (constraints.corr_cholesky, (4, 4), r"has 6 coordinates, the flow has 3"),
    ],
)
def test_event_shape_support_and_flow_disagree(support, event_shape, got):
    with pytest.raises(ShapeError, match=r"event_shape \(\d.*" + got):
        plain(support=support, event_shape=event_shape)


def test_event_shape_is_too_small_for_the_support_or_empty():
    with pytest.raises(ShapeError, match=r"2 event dimensions, event_shape \(3,\) has 1"):
        plain(support=constraints.corr_cholesky, event_shape=(3,))
    for shape in ((), (0,), (3, 0)):
        with pytest.raises(ShapeError, match=r"event_shape \(.*empty"):
            plain(event_shape=shape)


def test_support_without_a_bijection():
    with pytest.raises(SupportError, match=r"support .*no bijection to the reals; use a constraint that.*biject_to"):
        plain(support=constraints.boolean)


def test_support_for_a_flow_on_the_circle():
    with pytest.raises(ShapeError, match=r"support: an NCSF lives on the circle.*rescale the data"):
        gm.Flow(F.NCSF(2), support=constraints.positive)


# -- contexts ---------------------------------------------------------------------------------------------------------


def test_missing_context():
    with pytest.raises(ShapeError, match=r"context: Flow is conditional; call it with one of shape \(\*batch, 2\)"):
        conditional()()
    with pytest.raises(ShapeError, match="context: Flow is conditional"):
        conditional().loss(torch.zeros(4, 3))


def test_extra_context():
    with pytest.raises(ShapeError, match=r"context: Flow is unconditional, got one of shape \(4, 2\); leave it out"):
        plain()(torch.zeros(4, 2))


@pytest.mark.parametrize("shape", [(3,), (4, 1), (2, 4), ()])
def test_wrong_size_context(shape):
    with pytest.raises(ShapeError, match=r"context: got shape \(.*Flow needs \(\*batch, 2\)"):
        conditional()(torch.zeros(shape))


def test_context_of_another_dtype_or_device():
    model = conditional()
    with pytest.raises(
        PlacementError, match=r"context: got torch\.float64 on cpu, the model has torch\.float32.*\.to\("
    ):
        model(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(PlacementError, match=r"context: got torch\.float32 on meta.*move the model"):
        model(torch.zeros(2, device="meta"))


def test_context_and_value_of_incompatible_batches():
    law = conditional()(torch.zeros(4, 2))
    with pytest.raises(ShapeError, match=r"value: leading shape \(3,\) does not broadcast with \(4,\)"):
        law.log_prob(torch.zeros(3, 3))
    with pytest.raises(ShapeError, match=r"value: leading shape \(3,\)"):
        plain()().expand([4]).log_prob(torch.zeros(3, 3))
    for wide in (law, plain()().expand([4])):
        with pytest.raises(ShapeError, match=r"batch_shape: leading shape \(4,\) does not broadcast with \(5,\)"):
            wide.expand([5])
        with pytest.raises(ShapeError, match=r"batch_shape: .* cannot be expanded to \(1,\)"):
            wide.expand([1])


# -- values -----------------------------------------------------------------------------------------------------------


@rows()
@pytest.mark.parametrize("validate", [True, False])
def test_wrong_event_size(law: Law, validate: bool):
    d = law.distribution()
    d._validate_args = validate
    for shape in ((), (law.event_shape[-1] + 1,), (*law.event_shape[:-1], law.event_shape[-1] + 4)):
        with pytest.raises(ShapeError, match=r"value: got shape \(.*needs \(\*lead, \d") as caught:
            d.log_prob(torch.full(shape, 0.5))
        assert repr(d) in str(caught.value)
    if law.transport:
        with pytest.raises(ShapeError, match="value: got shape"):
            d.push(torch.zeros(shared(law).noise_shape.numel() + 1))


@rows()
def test_wrong_dtype_or_device(law: Law):
    d, x = law.distribution(), law.distribution().sample()
    wrong = {"torch.float64 on cpu": x.double(), "torch.int64 on cpu": x.long(), "on meta": x.to("meta")}
    if law.finite:  # whole numbers are the same in every dtype
        wrong = {"on meta": x.to("meta")}
    for got, value in wrong.items():
        actions = [d.log_prob, *([d.pull] if law.invertible else [])]
        for action in actions:
            with pytest.raises(PlacementError, match=rf"value: got .*{got}.*the model has torch\.float32 on cpu"):
                action(value)
    assert issubclass(PlacementError, TypeError) and issubclass(PlacementError, ValueError)


@rows(lambda law: law.scored)
def test_nan_is_an_error_with_validation_and_nan_without(law: Law):
    x = law.distribution(3).sample().float()
    x[(1, *([0] * len(law.event_shape)))] = math.nan
    with pytest.raises(
        SupportError, match=r"value: 1 event\(s\) are NaN or outside the support.*nan.*correct the data"
    ):
        law.distribution(3).log_prob(x)
    with unvalidated():
        log_prob = law.distribution(3).log_prob(x)
    assert log_prob.isnan().tolist() == [False, True, False]


@rows(lambda law: law.scored)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_has_density_zero(law: Law, value: float):
    x = law.distribution(3).sample().float()
    x[(1, *([0] * len(law.event_shape)))] = value
    d = law.distribution(3)
    if not d.support.check(x).all():
        with pytest.raises(SupportError, match=r"outside the support.*inf"):
            d.log_prob(x)
        d._validate_args = False
    log_prob = d.log_prob(x)
    assert log_prob[1] == -math.inf and log_prob[::2].isfinite().all()


OUTSIDE = {
    "nsf-positive": [1.0, -1.0],
    "nsf-interval": [0.5, 1.5],
    "nsf-simplex": [0.5, 0.5, 0.5],
    "ncsf": [0.0, 3.5],
    "bpf-context-interval": [-2.5, 0.0],
    "gmm-positive": [-0.1, 1.0],
    "nsf-matrix-positive-context": [[1.0, 1.0], [1.0, -1.0]],
    "autoregressive-positive": [1.0, -1.0],
    "bernoulli-made": [0.0, 1.0, 2.0],
    "categorical-made": [1.0, 3.0],
    "discretized-gru-context": [1.5, 0.0],
    "columns-transformer": [0.3, 1.5, 0.3],
    "sequences-gru": [1.0, 0.0, 2.0],
    "sequences-made-pad": [1.0, 0.0, 0.0],
}


@rows(lambda law: law.id in OUTSIDE)
def test_outside_the_support(law: Law):
    x = torch.stack([law.distribution().sample().float(), torch.tensor(OUTSIDE[law.id])])
    with pytest.raises(SupportError, match=r"value: 1 event\(s\) .*outside the support .*give the model the support"):
        law.distribution().log_prob(x)
    with unvalidated():
        log_prob = law.distribution().log_prob(x)
        assert log_prob[0].isfinite() and log_prob[1] == -math.inf
        if law.invertible:
            assert law.distribution().pull(x).isnan().flatten(1).all(1).tolist() == [False, True]


def test_every_bounded_row_is_tried_outside():
    bounded = {law.id for law in LAWS if law.support is not constraints.real and law.direction == "density"}
    assert {type(law.support) for law in LAWS if law.id in OUTSIDE} == {
        type(law.support) for law in LAWS if law.id in bounded
    }


def test_validation_can_be_left_to_torch_or_decided_per_distribution():
    model, x = plain(support=constraints.positive), -torch.ones(3)
    assert model()._validate_args is True
    with unvalidated():
        assert model()._validate_args is False
    quiet = gm.GenerativeDistribution(model, validate_args=False)
    assert quiet.log_prob(x) == -math.inf
    assert quiet.expand([2]).log_prob(x).tolist() == [-math.inf, -math.inf]


def unvalidated():
    """Validation off, as Pyro users switch it off."""
    return pyro.validation_enabled(False)


# -- data and use -----------------------------------------------------------------------------------------------------


def test_constant_data():
    with pytest.raises(DataError, match=r"column\(s\) \[0, 1, 2\] of the data are constant"):
        plain().standardize(torch.ones(10, 3))


def test_no_pathwise_gradient_from_a_mixture():
    law = gm.Flow(zuko.mixtures.GMM(2))()
    for action in (law.rsample, law.rsample_and_log_prob):
        with pytest.raises(DensityError, match=r"no pathwise gradient; use sample\(\), or score-function gradients"):
            action()
    for action in (law.push, law.pull):
        with pytest.raises(DensityError, match=r"mixture has no push and no pull; it has sample\(\) and log_prob\(\)"):
            action(torch.zeros(2))


def test_a_plate_of_the_wrong_size_is_named():
    law = conditional()(torch.zeros(4, 2))

    def program():
        with pyro.plate("data", 5):
            pyro.sample("x", law)

    with pytest.raises(ValueError, match=r"[Ss]hape mismatch|batch_shape"):
        program()


def test_nan_in_a_context_gives_nan_not_a_number():
    model = conditional()
    context = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    assert model(context).log_prob(torch.zeros(3)).isnan().tolist() == [False, True]
