r"""A traced program has the energy that Pyro gives it, at every level, on both roads, for every chain of a batch.

The truth is Pyro's own potential of one chain, built here afresh by ``initialize_model``: nothing of the code under
test takes part in it. The programs are the table of `posteriors_many.py`. After that come the promises around the
number: errors that say what to do, failures that stay in their row, data that are arguments, graphs that hold nothing
superfluous, and starts for chains.
"""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import time
from collections.abc import Callable
from typing import Any

import jaxtyping
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, config_enumerate
from pyro.infer.autoguide import AutoNormal, initialization
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor
from torch.distributions import Distribution

import pyro_genmods as gm
from pyro_genmods.foundation.errors import ModelError, SamplingError, ShapeError

from .posteriors_many import PROGRAMS, drawn, numbers
from .statistics import assert_law, assert_mean, chain_standard_error

DTYPES = {"single": torch.float32, "double": torch.float64}
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
COMPILED = ["positive sites", "enumerated mixture", "NSF", "correlations", "NAF"]
DOUBLE = numbers(torch.float64)
recorder = importlib.import_module("pyro_genmods.infer.fusion")


def points(energy: gm.infer.Potential, rows: int = 3, spread: float = 0.7) -> Tensor:
    return spread * torch.randn(rows, energy.dim, dtype=energy.dtype)


def by_pyro(
    model: Callable[..., Any], args: tuple[Any, ...], energy: gm.infer.Potential, q: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Values, gradients and constrained values of rows, one at a time, by Pyro."""
    start, potential, transforms, _ = initialize_model(model, args)
    assert {name: x.shape for name, x in start.items()} == energy.layout.shapes
    values, gradients, constrained = [], [], []
    for row in q:
        params = {name: x.clone() for name, x in energy.layout.unflatten(row).items()}
        gradient, value = potential_grad(potential, params)
        values.append(value.detach())
        gradients.append(torch.cat([gradient[name].reshape(-1) for name in energy.layout.shapes]))
        constrained.append({name: transforms[name].inv(x) if name in transforms else x for name, x in params.items()})
    together = {name: torch.stack([one[name] for one in constrained]).detach() for name in start}
    return torch.stack(values), torch.stack(gradients), together


def assert_equal(found: Tensor, truth: Tensor, name: str, loose: float = 1.0) -> None:
    assert found.shape == truth.shape and found.dtype == truth.dtype, name
    tolerance = loose * TOLERANCE[truth.dtype] * max(1.0, float(truth.abs().max()))
    gap = float((found - truth).abs().max())
    assert gap <= tolerance, f"{name}: differs from Pyro by {gap}, allowed are {tolerance}"


@pytest.fixture
def graphs(monkeypatch):
    """All graphs that are recorded during a test."""
    found: list[torch.fx.GraphModule] = []

    def remember(*arguments: Any) -> torch.fx.GraphModule:
        found.append(trace(*arguments))
        return found[-1]

    trace = recorder.trace_graph
    monkeypatch.setattr(recorder, "trace_graph", remember)
    return found


# -- the number --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [pytest.param("single", marks=pytest.mark.slow), "double"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_energy_gradient_and_values_are_those_of_pyro(name, precision):
    row = PROGRAMS[name]
    model, args = row.build(numbers(DTYPES[precision]))
    graph = gm.infer.potential(model, args, level="graph")
    q = points(graph)
    value, gradient, constrained = by_pyro(model, args, graph, q)
    both = graph.value_and_grad(q)
    assert_equal(both[0], value, "value beside the gradient")
    assert_equal(both[1], gradient, "gradient beside the value")
    for site, x in graph.constrain(q).items():
        assert_equal(x, constrained[site], site)
    for site, x in graph.constrain(q.expand(2, *q.shape)).items():
        assert_equal(x[1], constrained[site], f"{site}, with more leading dimensions")
    if precision == "double":
        eager = gm.infer.potential(model, args, level="eager", road=graph.report["road"])
        assert_equal(eager.value(q), value, "value")
        assert_equal(eager.grad(q), gradient, "gradient")
        assert_equal(sum(eager.parts(q)), value, "sum of prior and likelihood")
        assert eager.report["level"] == "eager"
    else:
        assert_equal(graph.grad(q), gradient, "gradient alone")
    assert graph.report["road"] == row.road
    assert graph.report["level"] == "graph", graph.report["why"]


@pytest.mark.parametrize("name", ["transformed", *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED)])
def test_compiled(name):
    model, args = PROGRAMS[name].build(DOUBLE)
    energy = gm.infer.potential(model, args, level="compiled")
    q = points(energy)
    value, gradient, _ = by_pyro(model, args, energy, q)
    found = energy.value_and_grad(q)
    assert energy.report["level"] == "compiled", energy.report["why"]
    assert_equal(found[0], value, "value")
    assert_equal(found[1], gradient, "gradient")


@pytest.mark.parametrize("name", ["nested plates", "events", "Bayesian network", "factors", "NSF"])
def test_the_loop_and_other_roads_agree(name):
    model, args = PROGRAMS[name].build(DOUBLE)
    energies = [gm.infer.potential(model, args, road=road, level="graph") for road in ("loop", "vmap")]
    q = points(energies[0])
    (value, gradient), other = (energy.value_and_grad(q) for energy in energies)
    assert_equal(value, other[0], "value")
    assert_equal(gradient, other[1], "gradient")
    assert energies[0].report["road"] == "loop" and energies[0].report["level"] == "eager"


def test_one_chain_and_many_shapes_in_turn():
    model, args = PROGRAMS["eight schools"].build(DOUBLE)
    energy = gm.infer.potential(model, args)
    q = points(energy, 7)
    whole = energy.value_and_grad(q)
    for rows in (1, 2, 5, 1):
        for found, truth in zip(energy.value_and_grad(q[:rows]), whole, strict=True):
            assert_equal(found, truth[:rows], f"{rows} rows")
    spread = torch.stack([q, q], -1)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(energy.value(spread), energy.value(q))


# -- what cannot be sampled --------------------------------------------------------------------------------------------


def branching(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(2 * x if x > 0 else x, 1.0), obs=y)


def poisson_latent(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Normal(pyro.sample("count", dist.Poisson(rate)), 1.0), obs=y)


def minibatch(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=3) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=y.expand(10)[index])


def dropout(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.nn.functional.dropout(x, 0.5).sum(-1), 1.0), obs=y)


def nothing_latent(y: Tensor) -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def only_discrete(y: Tensor) -> None:
    pyro.sample("y", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"}), 1.0), obs=y)


def two_precisions(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(DOUBLE(0.0), 1.0))
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


REFUSED = {
    "branch": (branching, ("'x'", "torch.where", "road='loop'")),
    "Poisson": (poisson_latent, ("'count'", "Poisson", "observe")),
    "minibatch": (minibatch, ("'data'", "3 of 10", "subsample_size")),
    "dropout": (dropout, ("random", "eval()")),
    "nothing latent": (nothing_latent, ("no continuous latent",)),
    "only discrete": (only_discrete, ("no continuous latent",)),
    "two precisions": (two_precisions, ("'a'", "'b'", "float64", "one dtype")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_site_and_the_remedy(name):
    model, words = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        gm.infer.potential(model, (torch.tensor(0.5),))
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_a_branch_works_row_by_row():
    args = (torch.tensor(0.5),)
    energy = gm.infer.potential(branching, args, road="loop")
    q = torch.tensor([[-1.5], [1.5], [0.3]])
    value, gradient, _ = by_pyro(branching, args, energy, q)
    assert_equal(energy.value(q), value, "value")
    assert_equal(energy.grad(q), gradient, "gradient")


def test_shapes_that_mix_chains_are_an_error_or_right():
    """A program that sums over all it can see is right for one chain and wrong in a plate of chains."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)

    args = (torch.tensor(0.5),)
    with pytest.raises(ModelError):
        gm.infer.potential(model, args, road="plate")
    energy = gm.infer.potential(model, args)
    q = points(energy)
    assert_equal(energy.value(q), by_pyro(model, args, energy, q)[0], "value")


@pytest.mark.parametrize("level", ["eager", "graph"])
def test_a_seed_of_its_own_is_a_constant_or_refused(level):
    """Randomness that repeats passes every check of determinism; a recorded draw would not repeat."""

    def model(y: Tensor) -> None:
        design = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((design @ x[..., None])[..., 0], 1.0).to_event(1), obs=y)

    args = (torch.zeros(3),)
    try:
        energy = gm.infer.potential(model, args, level=level)
    except ModelError:
        return
    q = points(energy)
    for _ in range(2):
        assert_equal(energy.value(q), by_pyro(model, args, energy, q)[0], "value")


def test_a_library_that_reads_data_under_vmap():
    """The Gaussian HMM as one writes it for one chain, without the dots that a plate of chains would need.

    It writes into parts of its tensors, which vmap and the gradient around it do not survive: it runs chain by chain.
    """

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        unit = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
        seen = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
        law = dist.GaussianHMM(unit, rate * torch.eye(2), unit, torch.ones(2, 1), seen, duration=6)
        pyro.sample("y", law, obs=y)

    args = (drawn(numbers(torch.float32), 6, 1),)
    with pytest.raises(ModelError, match="road='loop'"):
        gm.infer.potential(model, args)
    energy = gm.infer.potential(model, args, road="loop")
    q = points(energy)
    assert_equal(energy.value(q), by_pyro(model, args, energy, q)[0], "value")


# -- failures stay in their row ----------------------------------------------------------------------------------------


def fragile(kind: str) -> Callable[[Tensor], None]:
    """Matrices that are not positive definite, or singular, where ``|x| >= 1``."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(DOUBLE(0.0), 1.0))
        corner = torch.stack([torch.stack([torch.ones_like(x), x], -1), torch.stack([x, torch.ones_like(x)], -1)], -2)
        if kind == "covariance":
            pyro.sample("y", dist.MultivariateNormal(DOUBLE([0.0, 0.0]), covariance_matrix=corner), obs=y)
        elif kind == "precision":
            pyro.sample("y", dist.MultivariateNormal(DOUBLE([0.0, 0.0]), precision_matrix=corner), obs=y)
        else:
            law = dist.MultivariateNormal(DOUBLE([0.0, 0.0]), scale_tril=torch.linalg.cholesky(corner))
            pyro.sample("y", law, obs=y)

    return model


def in_closed_form(kind: str, y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and gradient of the fragile program, by hand: correlation ``x`` or, in the precision, ``-x``."""
    leaf = q[:, 0].clone().requires_grad_()
    determinant = 1 - leaf**2
    form = y.square().sum() + (2 if kind == "precision" else -2) * leaf * y.prod()
    quadratic = form if kind == "precision" else form / determinant
    half_log = -0.5 * determinant.log() if kind == "precision" else 0.5 * determinant.log()
    value = 0.5 * leaf**2 + 1.5 * math.log(2 * math.pi) + 0.5 * quadratic + half_log
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient[:, None]


def test_a_program_may_fail_at_a_draw_of_its_prior():
    """Whether a potential can be made is no matter of luck."""
    args = (DOUBLE([0.3, -0.7]),)
    for _ in range(10):
        gm.infer.potential(fragile("factor"), args)


@pytest.mark.parametrize("kind", ["covariance", "precision", "factor"])
@pytest.mark.parametrize("level", ["eager", "graph", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_failed_factorisation_is_no_number_there_and_nothing_elsewhere(kind, level):
    args = (DOUBLE([0.3, -0.7]),)
    q = DOUBLE([[0.5], [3.0], [-0.9], [-1.5], [0.0]])
    good = torch.tensor([True, False, True, False, True])
    energy = gm.infer.potential(fragile(kind), args, level=level)
    value, gradient = energy.value_and_grad(q)
    truth = in_closed_form(kind, args[0], q[good])
    assert not value[~good].isfinite().any()
    assert_equal(value[good], truth[0], "value")
    assert_equal(gradient[good], truth[1], "gradient")
    assert_equal(energy.value(q)[good], truth[0], "value alone")
    assert_equal(energy.grad(q)[good], truth[1], "gradient alone")
    assert energy.report["level"] == level


def test_a_value_outside_a_support_is_a_number(recwarn):
    """Validation would end all chains; ``made outside`` holds distributions that insist on it."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, x), obs=torch.tensor(0.1))  # a scale that may be negative

    energy = gm.infer.potential(model)
    value = energy.value(torch.tensor([[0.5], [-0.5], [math.nan]]))
    assert value[0].isfinite() and not value[2].isfinite()
    model, args = PROGRAMS["made outside"].build(numbers(torch.float32))
    energy = gm.infer.potential(model, args)
    q = points(energy)
    q[1] = math.nan
    value = energy.value(q)
    assert value[[0, 2]].isfinite().all() and value[1].isnan()


# -- data are arguments ------------------------------------------------------------------------------------------------


def linear(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)


def regression(rows: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    return drawn(DOUBLE, rows, 2, seed=seed), drawn(DOUBLE, rows, seed=seed + 50)


@pytest.mark.parametrize("level", ["eager", "graph", pytest.param("compiled", marks=pytest.mark.slow)])
def test_new_numbers_keep_the_graphs(level, graphs):
    energy = gm.infer.potential(linear, regression(), level=level)
    q = points(energy)
    energy.value_and_grad(q)
    energy.grad(q)
    before, old = len(graphs), energy.value_and_grad(q)[0]
    assert energy.update(regression(seed=2), {})
    value, gradient = energy.value_and_grad(q)
    alone = energy.grad(q)
    assert len(graphs) == before, "recorded again"
    truth = by_pyro(linear, regression(seed=2), energy, q)
    assert_equal(value, truth[0], "value")
    assert_equal(gradient, truth[1], "gradient")
    assert_equal(alone, truth[1], "gradient alone")
    assert (value - old).abs().min() > 1e-3, "the data were not looked at"


def test_what_update_refuses():
    energy = gm.infer.potential(linear, regression())
    q = points(energy)
    value = energy.value(q)
    x, y = regression(seed=2)
    for args, kwargs in (
        (regression(7), {}),
        ((x.float(), y.float()), {}),
        ((x, y, 1), {}),
        ((x,), {"y": y}),
    ):
        assert energy.update(args, kwargs) is False
        assert torch.equal(energy.value(q), value), "a refused update left something behind"


def test_numbers_and_names_are_no_data():
    def model(y: Tensor, scale: float, kind: str) -> None:
        x = pyro.sample("x", dist.Normal(DOUBLE(0.0), scale))
        pyro.sample("y", dist.Normal(x if kind == "plain" else x**2, 1.0), obs=y)

    energy = gm.infer.potential(model, (DOUBLE(1.0), 2.0, "plain"))
    assert energy.update((DOUBLE(3.0), 2.0, "plain"), {})
    assert not energy.update((DOUBLE(3.0), 3.0, "plain"), {})
    assert not energy.update((DOUBLE(3.0), 2.0, "square"), {})


@pytest.mark.parametrize("how", ["replaced", "in place", "number"])
def test_a_closure_that_changed_is_noticed(how):
    held = {"scale": DOUBLE(1.0)}

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(DOUBLE(0.0), held["scale"]))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    energy = gm.infer.potential(model, (DOUBLE(1.0),))
    q = points(energy)
    energy.value_and_grad(q)
    if how == "in place":
        held["scale"].fill_(3.0)
    else:
        held["scale"] = DOUBLE(3.0) if how == "replaced" else 3.0
    if energy.update((DOUBLE(1.0),), {}):
        truth = by_pyro(model, (DOUBLE(1.0),), energy, q)
        assert_equal(energy.value(q), truth[0], "value")
        assert_equal(energy.value_and_grad(q)[0], truth[0], "value beside the gradient")
        assert_equal(energy.grad(q), truth[1], "gradient")


def test_nested_arguments_are_data_too():
    def model(batch: dict[str, Tensor], *, noise: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(DOUBLE(0.0), 1.0))
        pyro.sample("y", dist.Normal(x * batch["a"][0], noise), obs=batch["y"])

    first = ({"a": [DOUBLE(1.0)], "y": DOUBLE(0.5)},), {"noise": DOUBLE(1.0)}
    second = ({"a": [DOUBLE(-2.0)], "y": DOUBLE(1.5)},), {"noise": DOUBLE(0.3)}
    energy = gm.infer.potential(model, *first)
    q = points(energy)
    energy.value(q)
    assert energy.update(*second)
    assert_equal(energy.value(q), gm.infer.potential(model, *second, level="eager").value(q), "value")


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("level", ["eager", "graph"])
def test_chunks_change_nothing_and_bound_the_batch(level, tempered, monkeypatch):
    model, args = PROGRAMS["masks"].build(DOUBLE)
    whole = gm.infer.potential(model, args, level=level, tempered=tempered)
    parts = gm.infer.potential(model, args, level=level, tempered=tempered, max_batch=8)
    q = points(whole, 21)
    if tempered:
        whole.inverse_temperature = parts.inverse_temperature = torch.linspace(0, 1, 21, dtype=torch.float64)
    seen: list[int] = []
    energies = parts.program.energies
    monkeypatch.setattr(parts.program, "energies", lambda rows, data: (seen.append(len(rows)), energies(rows, data))[1])
    for name in ("value", "grad"):
        assert_equal(getattr(parts, name)(q), getattr(whole, name)(q), name)
    for name in ("value_and_grad", "parts"):
        for found, truth in zip(getattr(parts, name)(q), getattr(whole, name)(q), strict=True):
            assert_equal(found, truth, name)
    assert seen and max(seen) <= 8
    assert parts.num_gradients == whole.num_gradients == 42


@pytest.mark.parametrize("bad", [{"level": "fast"}, {"road": "street"}, {"max_batch": 0}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        gm.infer.potential(linear, regression(), **bad)


def test_bad_rows():
    energy = gm.infer.potential(linear, regression())
    for shape in ((2,), (3, 1), (3, 2, 2)):
        with pytest.raises(ShapeError, match="chains, 2"):
            energy.value(torch.zeros(shape, dtype=torch.float64))


# -- graphs ------------------------------------------------------------------------------------------------------------


class DearValue(torch.autograd.Function):
    """An integral by fifty steps, whose derivative is known in closed form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i in range(50):
            total = total + ((x * (i + 0.5) / 50).sin() * x / 50).tanh()
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()


def test_a_gradient_does_not_pay_for_a_dear_value(graphs):
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("dear", DearValue.apply(x).sum(-1))

    energy = gm.infer.potential(model, level="graph")
    q = points(energy)
    both = energy.value_and_grad(q)
    gradient = energy.grad(q)
    calls = [sum(node.op == "call_function" for node in graph.graph.nodes) for graph in graphs]
    assert calls[0] > 150, "the value is not dear"
    assert calls[1] < 25, f"the graph of the gradient has {calls[1]} operations"
    assert torch.equal(gradient, both[1])
    assert_equal(gradient, q - q.cos(), "gradient")


def test_graphs_are_clean(graphs):
    """No copies, no double work, no random numbers, and nothing that nobody reads."""
    model, args = PROGRAMS["eight schools"].build(DOUBLE)
    energy = gm.infer.potential(model, args, level="graph")
    energy.value_and_grad(points(energy))
    nodes = list(graphs[0].graph.nodes)
    assert all(node.users or node.op in ("output", "placeholder") for node in nodes)
    assert not any("detach" in str(node.target) or "_." in str(node.target) for node in nodes if node.op[:4] == "call")
    keys = [(str(n.target), str(n.args), str(n.kwargs)) for n in nodes if n.op == "call_function"]
    assert len(set(keys)) == len(keys)
    assert len(keys) < 120


def test_the_automatic_level_counts_and_does_not_measure():
    levels = []
    for _ in range(2):
        model, args = PROGRAMS["improper"].build(DOUBLE)
        energy = gm.infer.potential(model, args)
        assert energy.report["level"] == "none yet"
        q = points(energy)
        for _ in range(50):
            energy.grad(q)
        assert energy.report["level"] == "graph"
        energy.plan(10.0)
        levels.append([energy.mode])
        energy.plan(1e9)
        levels[-1].append(energy.mode)
    assert levels[0] == levels[1] == ["graph", "compiled"]
    fixed = gm.infer.potential(model, args, level="graph")
    fixed.plan(1e9)
    fixed.grad(q)
    assert fixed.report["level"] == "graph"


def test_without_a_compiler_the_graph_goes_on(monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(recorder, "compile_graph", broken)
    energy = gm.infer.potential(linear, regression(), level="compiled")
    q = points(energy)
    assert_equal(energy.value(q), by_pyro(linear, regression(), energy, q)[0], "value")
    assert energy.report["level"] == "graph" and "no compiler here" in " ".join(energy.report["why"])


# -- temperatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eight schools", "enumerated mixture", "masks", "NAF", "simplex", "partly observed"])
def test_a_tempered_energy_is_prior_plus_part_of_the_likelihood(name):
    model, args = PROGRAMS[name].build(DOUBLE)
    energy = gm.infer.potential(model, args, tempered=True)
    q = points(energy)
    with pytest.raises(ValueError, match="inverse_temperature"):
        energy.value(q)
    prior, likelihood = gm.infer.potential(model, args).parts(q)
    energy.inverse_temperature = DOUBLE([0.0, 0.3, 1.0])
    assert_equal(energy.value(q), prior + energy.inverse_temperature * likelihood, "energy")
    energy.inverse_temperature = DOUBLE([1.0, 1.0, 1.0])
    truth = by_pyro(model, args, energy, q)
    assert_equal(energy.value(q), truth[0], "at one")
    assert_equal(energy.grad(q), truth[1], "gradient at one")


def test_the_prior_is_that_of_the_latents():
    model, args = PROGRAMS["eight schools"].build(DOUBLE)
    energy = gm.infer.potential(model, args)
    q = points(energy)
    values = energy.constrain(q)
    zero, five = DOUBLE(0.0), DOUBLE(5.0)
    log_prior = dist.Normal(zero, five).log_prob(values["mu"]) + dist.Normal(zero, 1.0).log_prob(values["z"]).sum(-1)
    log_prior = log_prior + dist.HalfCauchy(five).log_prob(values["tau"]) + values["tau"].log()
    assert_equal(energy.parts(q)[0], -log_prior, "prior")


# -- in Pyro -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nuts_on_a_traced_potential():
    x, y = regression(8)
    energy = gm.infer.potential(linear, (x, y))
    kernel = NUTS(potential_fn=energy, transforms=energy.transforms)
    mcmc = MCMC(kernel, 1500, 300, initial_params=energy.initial_params, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["beta"]
    precision = x.mT @ x / 0.25 + torch.eye(2, dtype=torch.float64)
    mean, covariance = precision.inverse() @ x.mT @ y / 0.25, precision.inverse()
    assert_mean(draws, mean, chain_standard_error(draws[None]))
    squares = (draws - mean).square()
    assert_mean(squares, covariance.diagonal(), chain_standard_error(squares[None]))


@pytest.mark.slow
def test_nuts_samples_in_the_supports():
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(DOUBLE(2.0), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    energy = gm.infer.potential(model, (DOUBLE([0.5, 1.5]),))
    kernel = NUTS(potential_fn=energy, transforms=energy.transforms)
    mcmc = MCMC(kernel, 4000, 300, initial_params=energy.initial_params, disable_progbar=True)
    mcmc.run()
    assert_law(mcmc.get_samples()["rate"][::8], lambda x: torch.special.gammainc(DOUBLE(4.0), 3 * x))


def test_a_gradient_is_faster_than_pyros():
    model, args = PROGRAMS["eight schools"].build(numbers(torch.float32))
    energy = gm.infer.potential(model, args, level="graph")
    start, potential, _, _ = initialize_model(model, args)

    def seconds(function: Callable[[], Any]) -> float:
        begun = time.process_time()
        for _ in range(20):
            function()
        return time.process_time() - begun

    q = energy.layout.flatten(start)[None]
    calls = (lambda: energy.grad(q), lambda: potential_grad(energy, start), lambda: potential_grad(potential, start))
    jaxtyping.config.update("jaxtyping_disable", True)  # the tests' type checks are no part of the price
    try:
        turns = [[seconds(call) for call in calls] for _ in range(15)]  # in turn: the machine may do other things too
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    rows, params, pyros = map(min, zip(*turns[1:], strict=True))
    assert rows < pyros / 2 and params < pyros / 2, (rows, params, pyros)


def test_pyros_form_is_differentiable():
    model, args = PROGRAMS["positive sites"].build(DOUBLE)
    energy = gm.infer.potential(model, args)
    start, potential, transforms, _ = initialize_model(model, args)
    found, truth = potential_grad(energy, dict(start)), potential_grad(potential, dict(start))
    assert_equal(found[1], truth[1].detach(), "value")
    for name, gradient in truth[0].items():
        assert_equal(found[0][name], gradient, name)
    assert energy.transforms.keys() == transforms.keys()
    assert energy.initial_params.keys() == start.keys()


# -- the world around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["copy", "pickle"])
def test_copies(name):
    energy = gm.infer.potential(linear, regression())
    q = points(energy)
    value = energy.value(q)
    again = copy.deepcopy(energy) if name == "copy" else pickle.loads(pickle.dumps(energy))
    assert torch.equal(again.value(q), value)
    assert again.update(regression(seed=2), {})
    assert torch.equal(energy.value(q), value), "the copy shares what it should own"
    assert_equal(again.value(q), by_pyro(linear, regression(seed=2), again, q)[0], "value of the copy")


def switches() -> tuple[Any, ...]:
    """What the process has of global state that quiet programs change."""
    stack = tuple(pyro.poutine.runtime._PYRO_STACK)
    functions = (torch.linalg.cholesky, torch.linalg.inv, torch.inverse, torch.linalg.solve)
    grad = (torch.is_grad_enabled(), Distribution._validate_args, pyro.infer.util.is_validation_enabled())
    return (stack, functions, grad, pyro.ops.special._SafeLog, torch.get_default_dtype(), pyro.settings.get())


def test_nothing_is_left_changed():
    before = switches()
    for name in ("eight schools", "enumerated mixture", "NAF"):
        model, args = PROGRAMS[name].build(DOUBLE)
        energy = gm.infer.potential(model, args)
        energy.value_and_grad(points(energy))
        assert switches() == before, name
    for model, _ in REFUSED.values():
        with pytest.raises(ModelError):
            gm.infer.potential(model, (torch.tensor(0.5),))
        assert switches() == before, model


@config_enumerate
def failing(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Bernoulli(0.5))
    if y > 0:
        raise KeyError("in the program")
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_nothing_is_left_changed_by_an_exception():
    before = switches()
    with pytest.raises(KeyError):
        gm.infer.potential(failing, (torch.tensor(1.0),))
    assert switches() == before
    energy = gm.infer.potential(failing, (torch.tensor(-1.0),), level="eager")
    energy._data = (torch.tensor(1.0),)
    with pytest.raises(KeyError):
        energy.value(torch.zeros(2, 1))
    assert switches() == before


def test_inside_another_handler():
    """A program traced inside a plate, a trace and a seed of the caller is the program alone."""
    model, args = PROGRAMS["nested plates"].build(DOUBLE)
    truth = gm.infer.potential(model, args)
    q = points(truth)
    with pyro.poutine.trace() as outer, pyro.plate("outer", 7, dim=-5), pyro.poutine.scale(scale=3.0):
        energy = gm.infer.potential(model, args)
        found = energy.value(q)
    assert torch.equal(found, truth.value(q))
    assert not any(name in outer.trace.nodes for name in energy.layout.shapes)


def test_without_gradients_and_in_inference_mode():
    with torch.no_grad():
        energy = gm.infer.potential(linear, regression())
        q = points(energy)
        value, gradient = energy.value_and_grad(q)
    assert_equal(gradient, by_pyro(linear, regression(), energy, q)[1], "gradient")
    assert not value.requires_grad and not gradient.requires_grad


# -- starts ------------------------------------------------------------------------------------------------------------


def two_sites() -> None:
    scale = pyro.sample("scale", dist.Gamma(DOUBLE(9.0), 3.0))
    pyro.sample("x", dist.Normal(DOUBLE([1.0, -1.0]), scale[..., None]).to_event(1))


def chosen(strategy: Any, chains: int = 400) -> dict[str, Tensor]:
    energy = gm.infer.potential(two_sites)
    q = energy.initial(chains, strategy)
    assert q.shape == (chains, 3)
    value, gradient = energy.value_and_grad(q)
    assert value.isfinite().all() and gradient.isfinite().all()
    return energy.constrain(q)


def test_the_uniform_start():
    for strategy in (initialization.init_to_uniform, initialization.init_to_uniform(radius=2.0)):
        values = chosen(strategy)
        both = torch.cat([values["scale"].log()[:, None], values["x"]], -1)
        assert_law((both + 2) / 4, lambda u: u.clamp(0, 1))


@pytest.mark.parametrize("strategy", [initialization.init_to_sample, initialization.init_to_generated])
def test_a_start_from_the_prior(strategy):
    if strategy is initialization.init_to_generated:
        strategy = strategy(generate=lambda: initialization.init_to_sample)
    values = chosen(strategy)
    assert_law(values["scale"], lambda x: torch.special.gammainc(DOUBLE(9.0), 3 * x), "scale")
    assert_law(((values["x"] - DOUBLE([1.0, -1.0])) / values["scale"][:, None]), torch.special.ndtr, "x given scale")


def test_starts_at_a_point():
    mean = chosen(initialization.init_to_mean, 4)
    assert torch.allclose(mean["scale"], DOUBLE(3.0)) and torch.allclose(mean["x"], DOUBLE([1.0, -1.0]))
    values = {"scale": DOUBLE(2.5), "x": DOUBLE([0.1, 0.2])}
    value = chosen(initialization.init_to_value(values=values), 4)
    assert all(torch.allclose(value[name], x.expand_as(value[name])) for name, x in values.items())
    feasible = chosen(initialization.init_to_feasible, 4)
    assert torch.allclose(feasible["x"], DOUBLE([0.0, 0.0]))


def test_a_start_at_the_medians_of_the_prior():
    median = chosen(initialization.init_to_median(num_samples=501), 50)
    assert (median["x"].mean(0) - DOUBLE([1.0, -1.0])).abs().max() < 0.3
    assert (median["scale"].mean() - 2.89).abs() < 0.1


@pytest.mark.parametrize("kind", ["flow", "Pyro's"])
def test_starts_from_a_guide(kind):
    model, args = PROGRAMS["eight schools"].build(numbers(torch.float32))
    energy = gm.infer.potential(model, args)

    class Sampler:
        def __init__(self, guide: Any) -> None:
            self.guide = guide

        def sample_posterior(self, n: int) -> dict[str, Tensor]:
            draws = [self.guide() for _ in range(n)]
            return {name: torch.stack([draw[name] for draw in draws]) for name in energy.layout.shapes}

    if kind == "flow":
        guide = gm.infer.AutoFlow(model)
        guide(*args)
    else:
        normal = AutoNormal(model)
        normal(*args)
        guide = Sampler(normal)
    q = energy.initial(50, guide)
    assert q.shape == (50, 10) and energy.value(q).isfinite().all()
    assert q.std(0).min() > 0.01


def test_no_start_names_the_sites():
    def model() -> None:
        pyro.sample("fine", dist.Normal(0.0, 1.0))
        broken = pyro.sample("broken", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("never", (-1 - broken.square()).sqrt().sum(-1))

    energy = gm.infer.potential(model)
    with pytest.raises(SamplingError, match=r"5 of 5 .*broken\[0\]") as caught:
        energy.initial(5)
    assert "fine" not in str(caught.value) and "initial_params" in str(caught.value)


def test_a_start_avoids_the_forbidden_half():
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("half", x.sqrt())

    energy = gm.infer.potential(model)
    assert (energy.initial(200) > 0).all()


def test_coordinates_have_names():
    model, args = PROGRAMS["side by side plates"].build(DOUBLE)
    names = gm.infer.potential(model, args).layout.coordinates()
    assert names == ["a[0,0]", "a[1,0]", "a[2,0]", "b[0]", "b[1]"]


# -- supports that move ------------------------------------------------------------------------------------------------


def test_a_support_that_depends_on_the_data_is_taken_anew():
    """Above the largest observation: with other data the old map would leave part of the support out, silently."""

    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Uniform(y.max(), 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(0.0, top), obs=y)

    energy = gm.infer.potential(model, (torch.tensor([1.0, 5.0]),))
    energy.value_and_grad(torch.zeros(3, 1))
    assert energy.update((torch.tensor([2.0, 5.0]),), {})
    assert not energy.update((torch.tensor([1.0, 2.0]),), {})
    mcmc = gm.infer.MCMC(gm.infer.HMC(model), 200, 100, 32, progress_bar=False, seed=0)
    for largest in (5.0, 2.0):
        mcmc.run(torch.tensor([1.0, largest]))
        top = mcmc.get_samples()["top"]  # density proportional to top**-2
        exact = math.log(10 / largest) / (1 / largest - 1 / 10)
        assert float(top.min()) == pytest.approx(largest, rel=0.02)
        assert float(top.mean()) == pytest.approx(exact, rel=0.05)


def test_a_support_that_depends_on_a_latent_is_refused():
    def model() -> None:
        x = pyro.sample("x", dist.Uniform(0.0, 1.0))
        pyro.sample("z", dist.Uniform(0.0, x))

    with pytest.raises(ModelError, match=r"'z'.*fixed support"):
        gm.infer.potential(model)


@pytest.mark.parametrize("method", ["grad", "value", "parts"])
def test_new_data_are_checked_against_whatever_was_recorded(method):
    """A closure changes after a graph of one kind was recorded, and before any of another kind was."""
    held = [torch.tensor(0.0)]

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(held[0], 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    energy = gm.infer.potential(model, (torch.tensor(1.0),))
    getattr(energy, method)(torch.zeros(2, 1))
    held[0] = torch.tensor(3.0)
    assert not energy.update((torch.tensor(2.0),), {})
    assert energy.num_gradients == (2 if method == "grad" else 0)
