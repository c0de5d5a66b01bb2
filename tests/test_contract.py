"""The battery: every law that a Pyro distribution and an honest density must obey, for every row of ``laws.py``."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Size, Tensor
from torch.distributions import biject_to

import pyro_genmods as gm
from pyro_genmods.coordinates import circular
from pyro_genmods.factorize import Conditional
from pyro_genmods.foundation.errors import DensityError, DoublyIntractableError, ModelError, SupportError

from .laws import LAWS, READERS, Law, rows, shared, zuko
from .statistics import assert_counts, assert_mean, assert_uniform

EXACT = gm.Density.EXACT
DOUBLE = torch.float64
REPARAM = gm.infer.PushforwardReparam()


def every_subclass(cls: type) -> set[type]:
    """All concrete descendants of a class."""
    found = {sub for child in cls.__subclasses__() for sub in every_subclass(child) | {child}}
    return {sub for sub in found if not inspect.isabstract(sub)}


def log_density(law: Law, d: gm.GenerativeDistribution, u: Tensor) -> Tensor:
    """Log density in unconstrained coordinates ``u``, by torch's own bijection and its Jacobian."""
    bijection = law.bijection(d)
    x = bijection(u)
    volume = bijection.log_abs_det_jacobian(u, x).reshape(*u.shape[: u.dim() - len(d.event_shape)], -1).sum(-1)
    return d.log_prob(x) + volume


def close(law: Law, a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    """Equality of log densities to the row's tolerance, relative to their size."""
    return bool(((a - b).abs() <= (tolerance or law.tolerance) * (1 + b.abs())).all())


def asked(law: Law, d: gm.GenerativeDistribution, *sample_shape: int) -> Tensor:
    """What a law is asked about: draws of its own; noise, if it has no density."""
    if law.scored:
        return d.sample(sample_shape)
    return torch.randn(*sample_shape, *d.batch_shape, *d.model.noise_shape, dtype=d.model.place[0])


def told(law: Law, d: gm.GenerativeDistribution, value: Tensor) -> Tensor:
    """What it says: the log density of values; what it makes of noise, summed over the event, if it has none."""
    if law.scored:
        return d.log_prob(value)
    noise = d.model.noise_shape
    lead = torch.broadcast_shapes(value.shape[: -len(noise)], d.batch_shape)
    return d.push(value.expand(*lead, *noise)).flatten(len(lead)).sum(-1)


def at_leisure(law: Law) -> bool:
    """Rows of which the expensive laws are asked in the slow half alone."""
    return not law.core


# -- completeness -----------------------------------------------------------------------------------------------------


def test_every_mechanism_is_in_the_table():
    ours = {cls for cls in every_subclass(gm.GenerativeModel) if cls.__module__.startswith("pyro_genmods.")}
    assert ours - set(READERS) == {type(shared(law)) for law in LAWS}


def test_every_zuko_flow_is_in_the_table():
    public = {c for c in vars(zuko.flows).values() if inspect.isclass(c) and issubclass(c, zuko.lazy.LazyDistribution)}
    bases = {zuko.lazy.LazyDistribution, zuko.lazy.Flow, zuko.lazy.UnconditionalDistribution}
    flows = {cls for cls in public if not inspect.isabstract(cls)} - bases
    assert flows == {type(shared(law).flow) for law in LAWS if isinstance(shared(law), gm.Flow)}


def test_every_head_and_network_is_in_the_table():
    heads = {cls for cls in vars(gm.factorize).values() if inspect.isclass(cls) and issubclass(cls, Conditional)}
    heads = {cls for cls in heads if not inspect.isabstract(cls)}
    models = [shared(law) for law in LAWS if isinstance(shared(law), gm.Autoregressive)]

    def networks(model: gm.Autoregressive) -> set[str]:
        kinds = {type(module) for module in model.modules()}
        return {name for name, kind in gm.Autoregressive.NETWORKS.items() if kind in kinds}

    found = {(type(m.conditional), name, bool(m.context_shape)) for m in models for name in networks(m)}
    assert found == set(itertools.product(heads, gm.Autoregressive.NETWORKS, [False, True]))


@rows()
def test_a_row_keeps_its_promises(law):
    model, d = shared(law), law.distribution()
    assert model.features == law.features
    assert model.density is d.density is law.density
    assert tuple(model.event_shape) == law.event_shape
    assert tuple(model.context_shape) == ((law.context,) if law.context else ())
    assert getattr(model, "direction", law.direction) == law.direction
    if law.transport:
        assert d.base.event_shape == model.noise_shape
    else:
        with pytest.raises(DensityError, match="sample"):
            d.push(torch.zeros(model.noise_shape))
    if not law.invertible:
        with pytest.raises(DensityError):
            d.pull(d.sample())
    if not (law.sequential or law.opened):
        with pytest.raises(DensityError, match=r"sequential|orders"):
            d.steps(3)
    assert d.support.is_discrete is law.discrete and model.has_rsample is law.reparameterized
    assert d.has_enumerate_support is (law.finite and law.enumerable)
    if not d.has_enumerate_support:
        with pytest.raises((DensityError, NotImplementedError)):
            d.enumerate_support()


# -- the Pyro contract ------------------------------------------------------------------------------------------------


@rows(slow=lambda law: law.adaptive)
def test_shapes(law):
    event = Size(law.event_shape)
    for batch in ((), (4,), (2, 3)):
        d = law.distribution(*batch)
        assert d.batch_shape == Size(batch) and d.event_shape == event
        for sample_shape in (Size(), (5,), [5], Size([1, 2])):
            x = d.sample(sample_shape=sample_shape)
            assert x.shape == Size(sample_shape) + Size(batch) + event
            assert told(law, d, asked(law, d, *sample_shape)).shape == Size(sample_shape) + Size(batch)
            if law.scored:
                assert d.log_prob(x).shape == Size(sample_shape) + Size(batch)
        assert d().shape == Size(batch) + event
    assert d.shape(Size([7])) == Size((7, 2, 3)) + event


@rows()
def test_support(law):
    d = law.distribution(3)
    assert d.support.event_dim == len(law.event_shape)
    x = d.sample((200,))
    assert d.support.check(x).all() and d.support.check(x).shape == (200, 3)
    if law.discrete:
        with pytest.raises(NotImplementedError):
            biject_to(d.support)
        return
    to_support = biject_to(d.support)
    assert d.support.check(to_support(torch.randn(to_support.inverse_shape(x.shape)))).all()
    assert torch.allclose(to_support(to_support.inv(x)), x, rtol=1e-3, atol=1e-3)


@rows()
def test_expand(law):
    d = law.distribution(3)
    x, before = asked(law, d), repr(d)
    for shape in ([2, 3], Size([2, 3]), (2, 3)):
        wide = d.expand(shape)
        assert wide is not d and type(wide) is type(d) and wide.batch_shape == Size([2, 3])
        assert close(law, told(law, wide, x), told(law, d, x).expand(2, 3))
    wider = d.expand([2, 3]).expand([4, 2, 3]).expand([4, 2, 3])
    draws = wider.sample()
    assert draws.shape == (4, 2, 3, *law.event_shape)
    if law.finite:  # the chance that two copies agree is the sum of the squares of the masses
        one, two = law.distribution().expand([2]).sample((2000,)).unbind(1)
        masses = law.distribution().log_prob(law.events()).exp().detach()
        assert_mean((one == two).flatten(1).all(1), masses.square().sum(), name="copies share their draws")
    else:
        assert len(draws.reshape(24, -1).unique(dim=0)) == 24, "copies share their draws"
    assert repr(d) == before and d.batch_shape == (3,) and d.sample().shape == (3, *law.event_shape)
    assert wider.support.event_dim == d.support.event_dim and wider.has_rsample == d.has_rsample


@rows()
def test_context_broadcasts(law):
    if not law.context:
        return
    model, context = shared(law), law.contexts(2, 3)
    d, x = model(context), asked(law, model(context))
    for i in range(2):
        for j in range(3):
            assert close(law, told(law, d, x)[i, j], told(law, model(context[i, j]), x[i, j]))
    table = told(law, model(context), x[0, 0])
    assert len(table.flatten().unique()) == 6, "the context changes nothing"
    column = model(context[:, :1]).expand([2, 3])
    assert close(law, told(law, column, x), told(law, model(context[:, :1].expand(2, 3, -1)), x))


@rows(slow=lambda law: law.adaptive or (law.costly and at_leisure(law)))
def test_any_leading_dimensions_equal_a_loop(law):
    model, context, batch = shared(law), law.contexts(2, 3), Size([2, 3])
    d = model(context) if law.context else model().expand(batch)
    for lead in ((2, 3), (3,), (), (2, 1), (2, 2, 3))[: 3 if law.costly else 5]:
        x = asked(law, law.distribution(*lead))
        full, event = torch.broadcast_shapes(lead, batch), x.shape[len(lead) :]
        got = told(law, d, x)
        assert got.shape == full
        many = x.expand(full + event).reshape(-1, *event)
        contexts = None if context is None else context.expand(*full, -1).reshape(-1, law.context)
        loop = [told(law, model(None if contexts is None else contexts[i]), v) for i, v in enumerate(many)]
        assert close(law, got.flatten(), torch.stack(loop))


@rows()
def test_to_event_and_mask(law):
    d = law.distribution(2, 3)
    x = d.sample()
    joint = d.to_event(1)
    assert joint.batch_shape == (2,) and joint.event_shape == Size((3, *law.event_shape))
    assert joint.support.event_dim == len(law.event_shape) + 1
    assert joint.expand([4, 2]).sample().shape == (4, 2, 3, *law.event_shape)
    keep = torch.tensor([True, False, True])
    masked = d.mask(keep)
    if law.scored:
        assert torch.equal(joint.log_prob(x), d.log_prob(x).sum(-1))
        assert torch.equal(masked.log_prob(x), torch.where(keep, d.log_prob(x), 0.0))
    else:
        for wrapped in (joint, masked):
            with pytest.raises(DensityError, match="PushforwardReparam"):
                wrapped.log_prob(x)
    assert d.mask(False).log_prob(x).abs().sum() == 0
    assert masked.expand([4, 2, 3]).sample().shape == (4, 2, 3, *law.event_shape)
    assert masked.support.event_dim == d.support.event_dim


@rows()
def test_plates(law):
    d = law.distribution()

    def program():
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("one", d)
            with pyro.plate("rows", 2, dim=-2), poutine.mask(mask=torch.tensor([True, False, True])):
                pyro.sample("nested", d)
        with pyro.plate("deep", 4, dim=-2), pyro.poutine.scale(scale=2.0):
            pyro.sample("left", d)

    sites, reference = (lambda name: name), d
    if not law.scored:
        program = poutine.reparam(program, dict.fromkeys(("one", "nested", "left"), REPARAM))
        sites, reference = (lambda name: f"{name}_base"), d.base
    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    for name, batch in (("one", (3,)), ("nested", (2, 3)), ("left", (4, 1))):
        assert trace.nodes[name]["value"].shape == (*batch, *law.event_shape)
        assert trace.nodes[sites(name)]["unscaled_log_prob"].shape == batch
    site = trace.nodes[sites("nested")]
    expected = torch.where(torch.tensor([True, False, True]), reference.log_prob(site["value"]), 0.0)
    assert close(law, site["log_prob"], expected)
    site = trace.nodes[sites("left")]
    assert close(law, site["log_prob"], 2 * reference.log_prob(site["value"]))


@rows(lambda law: law.scored)
def test_enumeration_on_the_left(law):
    """The marginal over an enumerated cause is the hand-made logarithm of a sum."""
    weights = torch.tensor([0.2, 0.3, 0.5])
    model, contexts = shared(law), law.contexts(3)
    table = law.distribution(3).sample()
    data = law.distribution().sample((2,))

    @pyro.infer.config_enumerate
    def program():
        with pyro.plate("data", 2, dim=-1):
            k = pyro.sample("k", dist.Categorical(weights))
            if law.context:
                pyro.sample("x", model(contexts[k]), obs=data)
            else:
                pyro.sample("x", model(), obs=table[k])

    if law.density is gm.Density.UNNORMALIZED and law.context:  # each value of the cause has a constant of its own
        with pytest.raises(DoublyIntractableError, match="context"):
            pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(program, lambda: None)
        return
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(program, lambda: None)
    terms = model(contexts).log_prob(data[:, None]) if law.context else model().log_prob(table).expand(2, 3)
    truth = (weights.log() + terms).logsumexp(-1).sum()
    assert close(law, torch.tensor(-loss), truth)


@rows()
def test_gradients_flow_where_they_should(law):
    d = law.distribution(2)
    assert not d.sample().requires_grad
    assert told(law, d, asked(law, d)).requires_grad is not law.chain  # the generator of a corrected law is frozen
    if not d.has_rsample:
        with pytest.raises(DensityError, match=r"use sample\(\)"):
            d.rsample()
        return
    assert d.rsample().requires_grad and d().requires_grad
    blocked = d.expand([2]).has_rsample_(False)
    assert blocked.has_rsample is False and not blocked().requires_grad
    assert d.has_rsample is True and shared(law).has_rsample is True


@rows()
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_reaches_every_parameter(law, training):
    model, context = law.make().train(training), law.contexts(16)
    x = law.distribution(16).sample()
    losses = {"loss": model.loss(x, context)}
    assert losses["loss"].shape == (16,)
    if model.has_rsample:
        losses["rsample"] = (model(context) if law.context else model().expand([16])).rsample().flatten(1).cos().sum(1)
    for name, value in losses.items():
        model.zero_grad()
        value.mean().backward()
        blind = law.critic and not (name == "loss" and training)
        for parameter, tensor in model.named_parameters():
            if not tensor.requires_grad or (blind and parameter.startswith("critic.")):
                assert tensor.grad is None, f"{name}: {parameter} has a gradient"
                continue
            assert tensor.grad is not None and tensor.grad.isfinite().all(), f"{name}: {parameter} has no gradient"
            assert tensor.grad.abs().sum() > 0, f"{name}: the gradient of {parameter} is zero"


@rows()
def test_log_prob_is_repeatable(law):
    d = law.distribution(8)
    x = asked(law, d)
    first = told(law, d, x)
    assert torch.equal(first, told(law, d, x)) and torch.equal(first, told(law, d, x.clone()))
    with torch.no_grad():
        assert torch.equal(first.detach(), told(law, d, x))
    edited = x.clone()
    told(law, d, edited)
    edited[0] = x[1]
    alone = told(law, law.distribution(8), edited)
    assert close(law, told(law, d, edited), alone, 1e-6), "an edit in place went unnoticed"
    single = torch.stack([told(law, d, x[i].expand_as(x))[i] for i in range(8)])
    assert close(law, first, single, law.tolerance if law.adaptive else 1e-5), "a row depends on its neighbours"


@rows()
def test_precision_and_place(law, device):
    x, context = asked(law, law.distribution(6, dtype=DOUBLE)), law.contexts(6, dtype=DOUBLE)
    model = law.make(device=device)
    values = {}
    for name, cast in {"float": torch.float32, "double": torch.float64, "back": torch.float32}.items():
        model = getattr(model, "float" if cast is torch.float32 else "double")()
        c = None if context is None else context.to(device, cast)
        d = model(c) if law.context else model().expand([6])
        draws = d.sample((3,))
        assert draws.dtype is (torch.int64 if law.integer else cast) and draws.device.type == device.type
        values[name] = told(law, d, x.to(device, cast)).cpu()
        assert values[name].dtype is cast
    assert torch.equal(values["float"], values["back"])
    assert close(law, values["float"].double(), values["double"])
    assert law.make(DOUBLE).place == (DOUBLE, torch.device("cpu"))


@rows()
def test_repr_and_copies(law):
    model, context = law.make(), law.contexts(3)
    d = model(context) if law.context else model().expand([3])
    x = asked(law, d)
    text = repr(d)
    assert type(model).__name__ in text and f"event_shape={law.event_shape}" in text and "batch_shape=(3,)" in text
    assert str(model.support) in text and law.density.name in text
    assert str(law.event_shape) in repr(model)
    twin, law_twin = copy.deepcopy(model), copy.deepcopy(d)
    before = told(law, d, x).detach()
    assert torch.equal(told(law, law_twin, x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(told(law, d, x), before)
    assert not torch.allclose(told(law, twin(context), x), before)
    assert set(model.state_dict()) == set(twin.state_dict())


@rows(slow=at_leisure)
def test_memory_does_not_grow(law):
    """No cache keyed on tensors: after many draws on one object as many tensors are alive as before."""
    d = law.distribution(2)

    def work(times: int) -> None:
        for _ in range(times):
            told(law, d, asked(law, d))
            if law.scored:
                d.log_prob(d.rsample() if d.has_rsample else d.sample())

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    gc.freeze()  # look only at what is made from here on
    try:
        work(2)
        before = alive()
        work(10 if law.costly else 30)
        assert alive() <= before
    finally:
        gc.unfreeze()
    assert not any(isinstance(value, dict) for name, value in vars(d).items() if name != "model")


@pytest.mark.slow
@rows(lambda law: law.id in ("nsf-context", "maf", "naf", "gmm"))
def test_resident_memory_does_not_grow(law):
    d = law.distribution(512)

    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    def work(times: int) -> None:
        for _ in range(times):
            d.log_prob(d.rsample() if d.has_rsample else d.sample())

    work(30)
    before = resident()
    work(300)
    assert resident() - before < 30, "MiB grown over 300 draws"


# -- value, density, transport ----------------------------------------------------------------------------------------


@rows(lambda law: law.density is EXACT and law.invertible)
def test_value_and_density_together(law):
    for batch in ((), (4,)):
        d = law.distribution(*batch, dtype=DOUBLE)
        x, log_prob = d.rsample_and_log_prob((25,))
        assert x.shape == (25, *batch, *law.event_shape) and log_prob.shape == (25, *batch)
        assert close(law, log_prob, d.log_prob(x), law.exactness)
        assert x.requires_grad and log_prob.requires_grad


@rows(lambda law: law.invertible)
def test_push_and_pull(law):
    """``push(pull(x)) = x``, and log_prob is the base's minus the autograd log-determinant of the push."""
    d = law.distribution(5, dtype=DOUBLE)
    x = d.sample()
    z = d.pull(x)
    tolerance = law.exactness
    assert z.shape == Size([5]) + shared(law).noise_shape
    assert torch.allclose(d.push(z), x, rtol=tolerance, atol=tolerance)
    z = z.detach().requires_grad_()
    x, joint = d.push_and_log_prob(z)
    u = law.bijection(d).inv(x)
    flat = u.reshape(5, -1)
    columns = range(flat.shape[1])
    jacobian = [torch.autograd.grad(flat[:, i].sum(), z, retain_graph=True)[0].flatten(1) for i in columns]
    log_det = torch.linalg.slogdet(torch.stack(jacobian, 1)).logabsdet
    expected = d.base.log_prob(z) - log_det
    if law.density is EXACT:
        assert close(law, log_density(law, d, u), expected, tolerance)
    assert close(law, joint, d.log_prob(x), tolerance)
    wide = d.push(z.detach().expand(3, 2, *z.shape))
    assert wide.shape == (3, 2, 5, *law.event_shape) and torch.allclose(wide[1, 1], x, rtol=tolerance, atol=tolerance)


@rows(lambda law: law.scored and law.slope and not law.discrete, slow=lambda law: law.adaptive)
def test_score_equals_finite_differences(law):
    d = law.distribution(4, dtype=DOUBLE)
    x = d.sample()
    score = d.score(x)
    assert score.shape == x.shape
    bijection, h = law.bijection(d), 1e-2 if law.adaptive else 1e-5
    u = bijection.inv(x)
    direction = torch.randn_like(u)
    ahead, behind = bijection(u + h * direction), bijection(u - h * direction)
    slope = (d.log_prob(ahead) - d.log_prob(behind)) / (2 * h)
    along = (score * (ahead - behind) / (2 * h)).flatten(1).sum(1)
    assert close(law, along, slope, 1e-3 if law.adaptive else 1e-4)
    with torch.no_grad():
        again = d.score(x)  # torch differentiates SiLU by another formula where it must itself be differentiable
        assert torch.allclose(again, score, rtol=1e-12, atol=1e-12) and not again.requires_grad
    one = law.distribution(dtype=DOUBLE)
    assert close(
        law, one.expand([3]).score(x[0]), one.score(x[0]).expand(3, *law.event_shape), 1e-4 if law.adaptive else 1e-9
    )


@rows(lambda law: law.density not in (gm.Density.IMPLICIT, gm.Density.UNNORMALIZED), slow=lambda law: law.adaptive)
def test_gradients_equal_finite_differences(law):
    """Of a score at a fixed value, and of a push and its density, with respect to parameters and context together."""
    model, context = law.make(DOUBLE), law.contexts(4, dtype=DOUBLE)
    x = law.distribution(4, dtype=DOUBLE).sample()
    z = law.distribution(4, dtype=DOUBLE).base.sample() if law.invertible else None
    weight = torch.randn(x.shape, dtype=DOUBLE)
    inputs = [*model.parameters(), *([] if context is None else [context.requires_grad_()])]
    for tensor in inputs:
        tensor.grad = None

    def outcome() -> Tensor:
        d = model(context) if law.context else model().expand([4])
        total = d.log_prob(x).sum()
        if law.invertible:
            pushed, log_prob = d.push_and_log_prob(z)
            total = total + (weight * pushed.sin()).sum() + log_prob.sum() + 0.1 * d.log_prob(pushed).sum()
        return total

    gradients = torch.autograd.grad(outcome(), inputs)
    h = 1e-2 if law.adaptive else 1e-6
    steps = [torch.randn_like(tensor) / math.sqrt(tensor.numel()) for tensor in inputs]
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for tensor, step in zip(inputs, steps, strict=True):
                tensor.add_(sign * h * step)
            values.append(float(outcome()))
    slope = (values[0] - values[1]) / (2 * h)
    predicted = sum(float((g * step).sum()) for g, step in zip(gradients, steps, strict=True))
    assert predicted == pytest.approx(slope, rel=1e-2 if law.adaptive else 1e-5, abs=1e-3 if law.adaptive else 1e-5)


@rows(lambda law: not law.adaptive and not law.chain)
def test_cost_is_the_number_of_calls(law, monkeypatch):
    """Of the networks' ``forward``, and of ``step`` where sampling has it; what a step calls itself is one call."""
    model, d = shared(law), law.distribution(16)
    counted, inside = [], []

    def counting(method):
        def call(*args, **kwargs):
            if not inside:
                counted.append(1)
            inside.append(1)
            try:
                return method(*args, **kwargs)
            finally:
                inside.pop()

        return call

    for name, module in model.named_modules():
        if name.split(".")[-1] in law.networks:
            for method in ("forward", "step", "with_divergence", "with_tangents"):
                if hasattr(module, method):
                    monkeypatch.setattr(module, method, counting(getattr(module, method)))

    def calls(action):
        counted.clear()
        result = action()
        return len(counted), result

    checked = model.slow_direction == "sample" and not law.sequential  # a solved draw is mapped back, to check it
    x = d.sample()
    for action in (d.sample, *([d.rsample] if model.has_rsample else [])):
        assert calls(action)[0] == model.cost.sample + (model.cost.score if checked else 0)
    if law.transport:
        z = d.base.sample()
        assert calls(lambda: d.push(z))[0] == model.cost.sample
    if model.cost.score is not None:
        assert calls(lambda: d.log_prob(x))[0] == model.cost.score


# -- the density is one, and the draws are from it --------------------------------------------------------------------


def cells(
    law: Law, d: gm.GenerativeDistribution, u: Tensor, per_axis: int, inner: int, counted: int | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities of the cells of a box around draws ``u`` by quadrature, and counts of the first of these draws.

    There is one more count, of those outside.
    """
    low, high = u.amin(0), u.amax(0)
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    if law.support is circular:
        low, high = torch.full_like(low, -math.pi), torch.full_like(high, math.pi)
    features, n = u.shape[1], per_axis * inner
    middle = (torch.arange(n, dtype=DOUBLE) + 0.5) / n
    grid = low + (high - low) * torch.cartesian_prod(*[middle] * features).reshape(-1, features)
    with torch.no_grad():
        parts = [log_density(law, d, part.reshape(-1, *event_of(law, d))).exp() for part in grid.split(20000)]
    mass = torch.cat(parts) * (high - low).prod() / n**features
    mass = mass.reshape([per_axis, inner] * features).sum([2 * i + 1 for i in range(features)])
    index = ((u[:counted] - low) / (high - low) * per_axis).floor().long()
    outside = ((index < 0) | (index >= per_axis)).any(-1)
    code = sum(index[:, i] * per_axis ** (features - 1 - i) for i in range(features))
    code = torch.where(outside, per_axis**features, code)
    return mass.flatten(), torch.bincount(code, minlength=per_axis**features + 1)


def event_of(law: Law, d: gm.GenerativeDistribution) -> Size:
    """Event shape in unconstrained coordinates."""
    return Size(law.bijection(d).inverse_shape(d.event_shape))


@rows(lambda law: law.density is EXACT and law.features <= 2 and not law.discrete, slow=lambda law: law.costly)
def test_density_integrates_to_one_and_draws_follow_it(law):
    d = law.distribution(dtype=DOUBLE)
    u = law.bijection(d).inv(d.sample((5000,))).reshape(5000, -1)
    probabilities, counts = cells(law, d, u, per_axis=16, inner=12 if u.shape[1] > 1 else 256)
    assert abs(float(probabilities.sum()) - 1) < 2e-3
    assert_counts(counts, probabilities, law.id)


@rows(lambda law: law.density is gm.Density.UNNORMALIZED and law.features <= 2 and not law.discrete, slow=at_leisure)
def test_draws_follow_a_density_without_its_constant(law):
    """Few of a large population, which are nearly independent, against the density normalised by quadrature."""
    model = law.make(DOUBLE)
    model.sampler = gm.shape.Annealed(2000, 2000, max_moves=8)
    d = model(law.contexts(dtype=DOUBLE))
    u = law.bijection(d).inv(d.sample((2000,))).reshape(2000, -1)
    probabilities, counts = cells(law, d, u, per_axis=10, inner=12, counted=500)
    assert_counts(counts, probabilities / probabilities.sum(), law.id)


@rows(lambda law: law.density is EXACT and law.features > 2 and not law.discrete)
def test_density_integrates_to_one_and_draws_follow_it_above_two_dimensions(law):
    """Mean of p/q under q, mean of q/p under p, and, where there is noise to pull, its uniformity."""
    d = law.distribution(dtype=DOUBLE)
    x = d.sample((5000,))
    bijection, shape = law.bijection(d), event_of(law, d)
    u = bijection.inv(x).reshape(5000, -1)
    low, middle, high = u.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE), 0)
    core = u[((u - middle).abs() <= 6 * (high - low)).all(1)]  # one draw of a long tail would make a useless proposal
    centre, covariance = core.mean(0), torch.cov(core.T)
    wide = dist.MultivariateStudentT(torch.tensor(4.0, dtype=DOUBLE), centre, torch.linalg.cholesky(covariance))
    y = wide.sample((20000,))
    with torch.no_grad():
        ratio = (log_density(law, d, y.reshape(-1, *shape)) - wide.log_prob(y)).exp()
        narrow = dist.MultivariateNormal(centre, 0.2 * covariance)
        inverse = (narrow.log_prob(u) - log_density(law, d, u.reshape(-1, *shape))).exp()
    assert ratio.std() < 10 and inverse.std() < 10, "the proposal is too poor for the test to mean anything"
    assert_mean(ratio, 1.0, name="mass")
    assert_mean(inverse, 1.0, name="draws against density")
    if law.transport:
        z = d.pull(x).detach()
        assert_uniform(dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0).cdf(z), law.id)


@rows(lambda law: law.invertible and law.context > 0, slow=lambda law: law.costly)
def test_draws_at_many_contexts_pull_back_to_the_base(law):
    d = law.distribution(2000, dtype=DOUBLE)
    z = d.pull(d.sample()).detach()
    lower = -math.pi if law.support is circular else None
    u = (z - lower) / (2 * math.pi) if lower else dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0).cdf(z)
    assert_uniform(u.flatten(1), law.id)


# -- discrete entries -------------------------------------------------------------------------------------------------


def codes(events: Tensor, x: Tensor) -> Tensor:
    """Number of each event ``(n, ...)`` in the list ``(number, ...)`` of all."""
    same = (x.flatten(1)[:, None] == events.flatten(1)).all(-1)
    assert (same.sum(1) == 1).all(), "an event that is not in the list, or twice"
    return same.to(torch.uint8).argmax(1)


@rows(lambda law: law.finite)
def test_masses_sum_to_one_and_draws_follow_them(law):
    every = law.events()
    assert len(every) > 3
    for batch in ((), (3,)):
        d = law.distribution(*batch, dtype=DOUBLE)
        dtype = torch.int64 if law.integer else DOUBLE
        if law.enumerable:
            events = d.enumerate_support()
            assert events.shape == (len(every), *batch, *law.event_shape) and events.dtype is dtype
            short = d.enumerate_support(expand=False)
            assert short.shape == (len(every), *[1] * len(batch), *law.event_shape) and (short == events).all()
            assert sorted(short.flatten(1).tolist()) == sorted(every.flatten(1).tolist())
        events = every.reshape(-1, *[1] * len(batch), *law.event_shape).to(dtype)
        assert d.support.check(events).all()
        masses = d.log_prob(events).exp().detach()
        assert masses.shape == (len(every), *batch)
        assert torch.allclose(masses.sum(0), torch.ones(batch, dtype=DOUBLE), atol=1e-6)
        if law.enumerable:
            assert torch.allclose(d.entropy(), -(masses * masses.log()).sum(0), atol=1e-9)
        x = d.sample((5000,)).reshape(5000, -1, *law.event_shape)
        assert x.dtype is dtype
        for i, mass in enumerate(masses.reshape(len(every), -1).T):
            counts = torch.bincount(codes(every, x[:, i]), minlength=len(every))
            assert_counts(counts, mass, law.id, x.shape[1])


@rows(lambda law: law.discrete and not law.finite)
def test_density_of_columns_integrates_to_one_and_draws_follow_it(law):
    """A sum over the discrete columns of quadratures over the two continuous ones."""
    d = law.distribution(dtype=DOUBLE)
    x = d.sample((5000,))
    discrete = [t for t, levels in enumerate(law.levels) if levels]
    smooth = [t for t, levels in enumerate(law.levels) if not levels]
    low, high = x[:, smooth].amin(0), x[:, smooth].amax(0)
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    per_axis, inner = 8, 16
    n = per_axis * inner
    middle = (torch.arange(n, dtype=DOUBLE) + 0.5) / n
    grid = low + (high - low) * torch.cartesian_prod(middle, middle)
    events = torch.cartesian_prod(*[torch.arange(law.levels[t], dtype=DOUBLE) for t in discrete])
    index = ((x[:, smooth] - low) / (high - low) * per_axis).floor().long()
    cell = index[:, 0] * per_axis + index[:, 1]
    masses, counts = [], []
    for event in events.reshape(-1, len(discrete)):
        point = torch.empty(len(grid), len(law.levels), dtype=DOUBLE)
        point[:, smooth], point[:, discrete] = grid, event
        with torch.no_grad():
            mass = d.log_prob(point).exp() * (high - low).prod() / n**2
        masses.append(mass.reshape(per_axis, inner, per_axis, inner).sum((1, 3)).flatten())
        counts.append(torch.bincount(cell[(x[:, discrete] == event).all(1)], minlength=per_axis**2))
    assert abs(float(torch.stack(masses).sum()) - 1) < 2e-3
    assert_counts(torch.cat(counts), torch.cat(masses), law.id)


@rows(lambda law: law.discrete)
def test_discrete_values_have_any_dtype_and_other_values_mass_zero(law):
    d = law.distribution(6)
    x = d.sample()
    log_prob = d.log_prob(x)
    assert x.dtype is (torch.int64 if law.integer else torch.float32) and log_prob.dtype is torch.float32
    if law.finite:
        for dtype in (torch.int64, torch.int32, torch.int16, torch.float32, torch.float64):
            assert torch.equal(d.log_prob(x.to(dtype)), log_prob), dtype
    entry = next(t for t, levels in enumerate(law.levels) if levels)
    for value in (-1.0, 0.5, 17.0):
        wrong = x.float()
        wrong.reshape(6, -1)[2, entry] = value
        with pytest.raises(SupportError, match=r"value: 1 event\(s\) .*outside the support"):
            d.log_prob(wrong)
        loose = d.expand([6])
        loose._validate_args = False
        got = loose.log_prob(wrong)
        assert got[2] == -math.inf and torch.equal(got[[0, 1, 3, 4, 5]], log_prob[[0, 1, 3, 4, 5]])


@rows(lambda law: law.discrete)
def test_what_discrete_values_cannot_do_is_refused(law):
    d = law.distribution(3)
    x = d.sample()
    for action in (d.rsample, d.rsample_and_log_prob, lambda: d.pull(x)):
        with pytest.raises(DensityError):
            action()


@rows(lambda law: law.discrete)
def test_score_of_discrete_values_is_refused(law):
    d = law.distribution(3)
    for x in (d.sample(), d.sample().float()):
        with pytest.raises(DensityError):
            d.score(x)


@rows(lambda law: law.discrete and law.transport)
def test_push_is_monotone_and_gives_the_law(law):
    """With the noise of earlier entries held, an entry rises with its own; noise of the base gives the law."""
    d = law.distribution(4, dtype=DOUBLE)
    places = [int(v) for v in shared(law).order]
    z = d.base.sample()
    for t, v in enumerate(places):
        swept = z.expand(33, *z.shape).clone()
        swept[..., v] = torch.linspace(-6, 6, 33, dtype=DOUBLE)[:, None]
        x = d.push(swept)
        assert x.dtype is (torch.int64 if law.integer else DOUBLE) and not x.requires_grad
        x = x.reshape(33, 4, -1)
        earlier = places[:t]
        assert (x[:, :, earlier] == x[:1, :, earlier]).all()
        assert (x[:, :, v].diff(dim=0) >= 0).all()
        moved = x[0, :, v] < x[-1, :, v]
        assert moved.all() if law.eos is None else moved.any(), "an entry that its noise does not move"
    if law.finite:
        one, events = law.distribution(dtype=DOUBLE), law.events()
        counts = torch.bincount(codes(events, one.push(one.base.sample((5000,)))), minlength=len(events))
        assert_counts(counts, one.log_prob(events).exp(), law.id)


@rows(lambda law: law.sequential, slow=lambda law: not law.core)
def test_residuals_are_uniform_and_lead_back(law):
    d = law.distribution(2000, dtype=DOUBLE)
    x = d.sample()
    u = d.rosenblatt(x)
    assert u.shape == (2000, *shared(law).noise_shape)
    assert_uniform(u.flatten(1), law.id)
    back = d.inverse_rosenblatt(u)
    assert torch.equal(back, x) if law.finite else torch.allclose(back, x, rtol=1e-6, atol=1e-6)


@rows(lambda law: law.sequential)
def test_steps_are_the_chain_rule(law):
    d = law.distribution(2, dtype=DOUBLE)
    steps = d.steps(3)
    visited = [step.variable for step in steps]
    assert visited == shared(law).order.tolist() and steps.log_prob.shape == (3, 2)
    x = steps.value
    assert x.shape == (3, 2, *law.event_shape) and d.support.check(x).all()
    volume = shared(law, dtype=DOUBLE).entry_volumes(x.reshape(6, *law.event_shape)).sum(-1).reshape(3, 2)
    assert close(law, steps.log_prob + volume, d.log_prob(x), law.exactness)


# -- in Pyro programs -------------------------------------------------------------------------------------------------


def program(law: Law, observed: bool = True):
    """A latent site with a Gaussian measurement of each of its entries."""
    d, event_dim = law.distribution(), len(law.event_shape)
    y = law.distribution().sample().float()

    def model():
        x = pyro.sample("x", d)
        return pyro.sample("y", dist.Normal(x.float(), 0.5).to_event(event_dim), obs=y if observed else None)

    return in_noise_space(law, model)


def in_noise_space(law: Law, model):
    """A program whose site has no density is run in the noise space of the site, as the refusal says."""
    return model if law.scored else poutine.reparam(model, {"x": REPARAM})


def values(law: Law, draws: dict[str, Tensor]) -> Tensor:
    """Values of the site, from draws of it or of its noise."""
    return draws["x"] if law.scored else law.distribution().push(draws["x_base"])


def assert_draws(law: Law, x: Tensor, *lead: int) -> None:
    assert x.shape[-len(law.event_shape) :] == law.event_shape and x.numel() == math.prod(lead + law.event_shape)
    assert x.isfinite().all() and shared(law).support.check(x).all()


def has_gradient(law: Law) -> bool:
    """Whether a latent site can be moved by gradients."""
    return not law.discrete


@rows(has_gradient, slow=at_leisure)
@pytest.mark.parametrize("particles", [1, 3])
def test_latent_site_under_svi(law, particles):
    model = program(law)
    guide = AutoNormal(model)
    elbo = pyro.infer.Trace_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step() for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert_draws(law, values(law, guide()).detach(), 1)
    draws = pyro.infer.Predictive(model, guide=guide, num_samples=4)()
    assert_draws(law, draws["x"], 4)


@rows(has_gradient, slow=at_leisure)
def test_latent_site_under_nuts(law):
    kernel = pyro.infer.NUTS(program(law), step_size=0.05, adapt_step_size=False, max_tree_depth=1 if law.costly else 2)
    mcmc = pyro.infer.MCMC(kernel, num_samples=4, warmup_steps=0 if law.costly else 4, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    x = values(law, draws)
    assert_draws(law, x, 4)
    assert len(x.reshape(4, -1).unique(dim=0)) > 1, "the chain did not move"
    for parallel in (False, True):
        predicted = pyro.infer.Predictive(program(law, observed=False), draws, parallel=parallel)()
        assert predicted["y"].numel() == x.numel() and predicted["y"].isfinite().all()


@rows(slow=at_leisure)
@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
def test_prior_predictive(law, parallel):
    draws = pyro.infer.Predictive(program(law, observed=False), num_samples=5, parallel=parallel)()
    assert_draws(law, draws["x"], 5)
    different = len(draws["x"].reshape(5, -1).unique(dim=0))
    assert different > 1 if law.finite else different == 5, "the draws are copies"


@rows(lambda law: law.density is EXACT, slow=at_leisure)
def test_as_a_likelihood_and_in_a_guide(law):
    """Observed, the law trains by ``pyro.module``; in a guide, its draws carry the ELBO's gradient."""
    trained = law.make()
    x, context = law.distribution(8).sample(), law.contexts(8)

    def likelihood():
        pyro.module("trained", trained)
        with pyro.plate("data", 8):
            pyro.sample("x", trained(context), obs=x)

    svi = pyro.infer.SVI(likelihood, lambda: None, pyro.optim.Adam({"lr": 1e-4}), pyro.infer.Trace_ELBO())
    first = svi.step()
    assert close(law, torch.tensor(first), -law.distribution(8).log_prob(x).sum())
    assert svi.evaluate_loss() < first
    fixed = {name: value.detach().clone() for name, value in trained.named_parameters()}

    def guide():
        pyro.module("trained", trained)
        pyro.sample("x", trained(law.contexts()))

    # A sequence that ends at once tells nothing of what comes after the others.
    elbo = pyro.infer.Trace_ELBO(8 if law.eos is not None else 1)
    svi = pyro.infer.SVI(program(law), guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    assert math.isfinite(svi.step())
    assert all(not torch.equal(value, fixed[name]) for name, value in trained.named_parameters())


@rows(slow=at_leisure)
def test_a_frozen_prior_stays_what_it_is(law):
    prior = law.make().freeze()
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    context, event_dim = law.contexts(), len(law.event_shape)

    def model():
        x = pyro.sample("x", prior(context))
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("y", dist.Normal(x.float(), noise).to_event(event_dim), obs=torch.zeros(law.event_shape))

    model = in_noise_space(law, model)
    guide = (lambda: pyro.sample("x", prior(context))) if law.discrete else AutoNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step()
    assert pyro.param("noise").item() != 1.0
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in prior.parameters())


@rows(lambda law: not law.scored)
def test_what_has_no_density_is_refused_with_the_remedy(law):
    d = law.distribution(3)
    x = d.sample()

    def model():
        pyro.sample("x", d.to_event(1))

    refused = [lambda: d.log_prob(x), lambda: d.score(x), lambda: d.push_and_log_prob(asked(law, d))]
    refused += [lambda: pyro.infer.NUTS(model).setup(1)]
    refused += [lambda: pyro.infer.SVI(model, AutoNormal(model), pyro.optim.Adam({}), pyro.infer.Trace_ELBO()).step()]
    refused += [d.rsample_and_log_prob] if law.reparameterized else []
    for action in refused:
        with pytest.raises(DensityError, match="PushforwardReparam"):
            action()
    with pytest.raises(DensityError):
        d.pull(x)


# -- in Pyro programs: discrete sites, and contexts that are latent ----------------------------------------------------


def shifted(law: Law):
    """A discrete site, enumerated, with a measurement of each of its entries in an unknown unit of zero."""
    d, event_dim = law.distribution(), len(law.event_shape)
    y = 0.3 + law.distribution().sample().float()

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", d, infer={"enumerate": "parallel"})
        shift = m.reshape(m.shape + (1,) * event_dim)
        pyro.sample("y", dist.Normal(x.float() + shift, 0.5).to_event(event_dim), obs=y)

    def log_joint(m: Tensor) -> Tensor:
        """The truth: the sum over all events, for numbers ``m`` of shape ``(n,)``."""
        x = law.events()
        shift = m.reshape(-1, *[1] * (1 + event_dim))
        likelihood = dist.Normal(x + shift, 0.5).to_event(event_dim).log_prob(y)
        return dist.Normal(0.0, 1.0).log_prob(m) + (d.log_prob(x) + likelihood).logsumexp(-1)

    return model, log_joint


def hand_written(law: Law, energy: gm.infer.Potential, log_joint) -> None:
    """Energies and gradients of many chains are those of a formula."""
    q = torch.randn(5, energy.dim)
    value, gradient = energy.value_and_grad(q)
    q.requires_grad_()
    truth = -log_joint(q)
    assert close(law, value, truth)
    assert close(law, gradient, torch.autograd.grad(truth.sum(), q)[0], 10 * law.tolerance)


@rows(lambda law: law.finite and law.enumerable, slow=at_leisure)
def test_enumerated_site_under_svi(law):
    model, log_joint = shifted(law)
    m = torch.tensor(0.4)
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
    loss = elbo.loss(model, lambda: pyro.sample("m", dist.Delta(m)))
    assert close(law, torch.tensor(-loss), log_joint(m[None])[0])
    guide = AutoNormal(poutine.block(model, hide=["x"]))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(math.isfinite(svi.step()) for _ in range(2))
    with pytest.raises((NotImplementedError, ValueError)):
        AutoNormal(model)()


@rows(lambda law: law.finite and law.enumerable, slow=at_leisure)
def test_enumerated_site_under_nuts(law):
    model, log_joint = shifted(law)
    hand_written(law, gm.infer.potential(model, level="eager"), lambda q: log_joint(q[:, 0]))
    kernel = pyro.infer.NUTS(model, step_size=0.1, adapt_step_size=False, max_tree_depth=2)
    mcmc = pyro.infer.MCMC(kernel, num_samples=4, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    assert set(draws) == {"m"} and len(draws["m"].unique()) > 1, "the chain did not move"


@rows(lambda law: law.discrete and not (law.finite and law.enumerable), slow=at_leisure)
def test_what_cannot_be_enumerated_is_refused_as_a_latent_site_of_chains(law):
    with pytest.raises(ModelError, match=r"is discrete and .*enumera"):
        gm.infer.potential(program(law))
    for refused in (
        pyro.infer.NUTS(program(law)).setup,
        lambda warmup: AutoNormal(program(law))(),
    ):
        with pytest.raises((NotImplementedError, ValueError)):
            refused(1)


@rows(lambda law: law.context > 0 and law.density is EXACT, slow=lambda law: law.costly or at_leisure(law))
def test_observed_under_a_latent_context(law):
    """What the context was, from what was seen: the score of the context, in SVI and in chains."""
    model, x = shared(law), law.distribution(3).sample()

    def program():
        c = pyro.sample("c", dist.Normal(torch.zeros(law.context), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("x", model(c), obs=x)

    def log_joint(c: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(c).sum(-1) + model(c[:, None]).log_prob(x).sum(-1)

    if not law.adaptive:
        hand_written(law, gm.infer.potential(program, level="eager"), log_joint)
    guide = AutoNormal(program)
    svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(2))
    kernel = pyro.infer.NUTS(program, step_size=0.1, adapt_step_size=False, max_tree_depth=2)
    mcmc = pyro.infer.MCMC(kernel, num_samples=3, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    assert len(mcmc.get_samples()["c"].unique(dim=0)) > 1, "the chain did not move"
