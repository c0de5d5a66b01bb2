"""Solvers, divergences and couplings against closed forms: what is promised is measured."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_genmods.foundation.adaptive import Accuracy, adaptive_steps
from pyro_genmods.foundation.divergence import (
    estimated_divergence,
    exact_divergence,
    jacobian_products,
    rademacher,
)
from pyro_genmods.foundation.errors import IntegrationError
from pyro_genmods.foundation.flow_matching import gaussian_velocity, late_times, straight_line
from pyro_genmods.foundation.ode import RK4, DormandPrince, Euler, Heun, odeint
from pyro_genmods.foundation.unet import UNet
from pyro_genmods.foundation.vector_field import VectorField
from pyro_genmods.transform.pairing import optimal_pairing

from .statistics import assert_mean, assert_uniform

DOUBLE = torch.float64
UNIT = torch.tensor([0.0, 1.0], dtype=DOUBLE)
FINE = {
    "euler": Euler(64),
    "heun": Heun(64),
    "rk4": RK4(64),
    "dormand-prince": DormandPrince(1e-9, 1e-10),
}
every_solver = pytest.mark.parametrize("solver", FINE.values(), ids=FINE)


def matrix(n: int = 4) -> Tensor:
    return 0.5 * torch.randn(n, n, dtype=DOUBLE)


class Linear:
    """The field A y, and how often it was asked."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.calls = a, 0

    def __call__(self, t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
        self.calls += 1
        return y @ self.a.mT + (0.0 if c is None else c)


# -- solutions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [RK4(64), DormandPrince(1e-9, 1e-10)], ids=["rk4", "dormand-prince"])
def test_a_linear_field_is_the_matrix_exponential(solver):
    a, y, c = matrix(), torch.randn(7, 4, dtype=DOUBLE), torch.randn(7, 4, dtype=DOUBLE)
    there = odeint(Linear(a), y, UNIT, solver)
    assert (there - y @ torch.linalg.matrix_exp(a).mT).abs().max() < 1e-6
    assert (odeint(Linear(a), there, UNIT.flip(0), solver) - y).abs().max() < 1e-6
    forced = odeint(Linear(a), y, UNIT, solver, context=c)
    block = torch.zeros(8, 8, dtype=DOUBLE)
    block[:4, :4], block[:4, 4:] = a, torch.eye(4, dtype=DOUBLE)
    truth = torch.cat([y, c], 1) @ torch.linalg.matrix_exp(block).mT
    assert (forced - truth[:, :4]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [Euler, Heun, RK4])
def test_the_error_falls_at_the_order_of_the_method(kind):
    """On a field that is neither linear nor autonomous: y' = cos(t) y (1 - y), a logistic curve in sin(t)."""
    y = torch.linspace(0.1, 0.9, 5, dtype=DOUBLE)[:, None]
    end = torch.tensor([0.0, 2.0], dtype=DOUBLE)
    truth = (y.logit() + math.sin(2.0)).sigmoid()

    def error(steps: int) -> float:
        found = odeint(lambda t, y, c: t.cos() * y * (1 - y), y, end, kind(steps))
        return float((found - truth).abs().max())

    order = math.log2(error(16) / error(32))
    assert kind(1).order == pytest.approx(order, abs=0.25)
    assert kind(16).refined() == kind(32) and kind(16).evaluations == 16 * kind.tableau.stages


def test_the_error_follows_the_tolerance():
    a, y = matrix(), torch.randn(7, 4, dtype=DOUBLE)
    truth = y @ torch.linalg.matrix_exp(a).mT
    before = math.inf
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        solver = DormandPrince(tolerance, tolerance)
        error = float((odeint(Linear(a), y, UNIT, solver) - truth).abs().max())
        assert error < min(20 * tolerance, before)
        before = error
    assert DormandPrince(1e-4, 1e-5).refined().rtol == pytest.approx(1e-5)


@every_solver
def test_evaluations_are_counted(solver):
    field, report = Linear(matrix()), []
    odeint(field, torch.randn(3, 4, dtype=DOUBLE), UNIT, solver, report=report)
    assert report == [field.calls]
    assert solver.evaluations in (None, field.calls)


def test_a_step_takes_six_evaluations():
    field = Linear(matrix())
    accuracy = Accuracy(1e-6, 1e-7, 1000)
    _, steps, evaluations = adaptive_steps(field, torch.ones(1, 4, dtype=DOUBLE), UNIT, None, accuracy)
    assert evaluations == field.calls == 2 + 6 * len(steps), "no step was rejected, so each took six"


def test_a_row_takes_its_own_steps():
    """A row alone, and beside one that needs a hundred times as many steps."""
    rates = torch.tensor([[1.0], [300.0], [2.0]], dtype=DOUBLE)
    y = torch.ones(3, 1, dtype=DOUBLE)
    asked = [0, 0, 0]

    def field(t: Tensor, y: Tensor, c: Tensor) -> Tensor:
        for i in range(3):
            asked[i] += int((c == rates[i]).any())
        return (c * t).cos() * y

    solver = DormandPrince(1e-6, 1e-7)
    together = odeint(field, y, UNIT, solver, context=rates)
    assert asked[1] > 10 * asked[0], "rows that have arrived are still evaluated"
    for i in range(3):
        alone = odeint(field, y[i : i + 1], UNIT, solver, context=rates[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert torch.allclose(together, (rates.sin() / rates).exp(), atol=1e-5)


def test_a_grid_of_the_callers():
    a, y = matrix(), torch.randn(3, 4, dtype=DOUBLE)
    grid = torch.linspace(0, 1, 33, dtype=DOUBLE).square()
    uneven = odeint(Linear(a), y, grid, RK4(32))
    assert (uneven - y @ torch.linalg.matrix_exp(a).mT).abs().max() < 1e-5
    even = odeint(Linear(a), y, torch.linspace(0, 1, 33, dtype=DOUBLE), RK4(32))
    assert torch.allclose(even, odeint(Linear(a), y, UNIT, RK4(32)), atol=1e-12)
    with pytest.raises(ValueError, match=r"times: got shape \(33,\), needs \(2,\) or \(17,\)"):
        odeint(Linear(a), y, grid, RK4(16))


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_dtype_and_no_rows(solver, dtype):
    a = matrix().to(dtype)
    for rows in (0, 3):
        y = odeint(Linear(a), torch.ones(rows, 4, dtype=dtype), UNIT.to(dtype), solver)
        assert y.dtype is dtype and y.shape == (rows, 4)


# -- gradients --------------------------------------------------------------------------------------------------------


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, t: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return self.net(torch.cat([t.expand(len(y), 1), y, c], 1))


def gradients(solver, second: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    field = Field()
    y, raw = torch.randn(5, 3, dtype=DOUBLE, requires_grad=True), torch.randn(5, 2, dtype=DOUBLE, requires_grad=True)
    parameters = tuple(field.parameters())
    end = odeint(field, y, UNIT, solver, context=raw.sin(), parameters=parameters)
    inputs = [y, raw, *parameters]
    first = torch.autograd.grad(end.square().sum(), inputs, create_graph=second)
    if not second:
        return list(first)
    return list(torch.autograd.grad(sum(g.cos().sum() for g in first), inputs))


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("solver", [Heun(9), RK4(9), DormandPrince(1e-6, 1e-7)], ids=["heun", "rk4", "adaptive"])
def test_the_adjoint_is_the_gradient_of_autograd(solver, second):
    kind = type(solver)
    options = {"steps": 9} if kind is not DormandPrince else {"rtol": 1e-6, "atol": 1e-7}
    by_adjoint = gradients(kind(**options, gradient="adjoint"), second)
    by_autograd = gradients(kind(**options, gradient="autograd"), second)
    for a, b in zip(by_adjoint, by_autograd, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_that_of_the_matrix_exponential():
    a = matrix().requires_grad_()
    y = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    truth = torch.autograd.grad((y @ torch.linalg.matrix_exp(a).mT).sin().sum(), [y, a])
    for solver in (RK4(64), DormandPrince(1e-9, 1e-10)):
        end = odeint(Linear(a), y, UNIT, solver, parameters=(a,))
        for found, expected in zip(torch.autograd.grad(end.sin().sum(), [y, a]), truth, strict=True):
            assert torch.allclose(found, expected, atol=1e-6)


def test_the_adjoint_keeps_states_only():
    """What is kept for the backward pass does not grow with the width of the network."""

    def kept(width: int, gradient: str) -> int:
        net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).double()
        own = {x.data_ptr() for x in net.parameters()}
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += 0 if x.data_ptr() in own else x.numel()
            return x

        y = torch.randn(64, 2, dtype=DOUBLE, requires_grad=True)
        with saved_tensors_hooks(pack, lambda x: x):
            odeint(lambda t, y, c: net(y), y, UNIT, RK4(16, gradient), parameters=tuple(net.parameters()))
        return total

    assert kept(64, "adjoint") == kept(8, "adjoint") < 1000
    assert kept(64, "autograd") > 4 * kept(8, "autograd") > 100_000


# -- transforms and recorders -----------------------------------------------------------------------------------------


@every_solver
def test_vmap_is_a_batch(solver):
    a, y = matrix().requires_grad_(), torch.randn(3, 5, 4, dtype=DOUBLE, requires_grad=True)
    c = torch.randn(3, 5, 4, dtype=DOUBLE)

    def solve(y: Tensor, c: Tensor | None = None) -> Tensor:
        return odeint(Linear(a), y, UNIT, solver, context=c, parameters=(a,))

    flat = solve(y.flatten(0, 1)).unflatten(0, (3, 5))
    mapped = torch.vmap(solve)(y)
    assert torch.allclose(mapped, flat, atol=1e-12)
    for found, expected in zip(
        torch.autograd.grad(mapped.sin().sum(), [y, a]), torch.autograd.grad(flat.sin().sum(), [y, a]), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-10)
    for c_dim in (0, None):
        context = c if c_dim == 0 else c[0]
        mapped = torch.vmap(solve, in_dims=(0, c_dim))(y, context)
        assert torch.allclose(mapped, torch.stack([solve(y[i], c[i] if c_dim == 0 else c[0]) for i in range(3)]))


@pytest.mark.parametrize("solver", [Euler(4), Heun(4), RK4(4)])
def test_fixed_steps_are_recorded(solver):
    """Value and gradient as a flat graph, which is right at other inputs."""
    a = matrix()

    def energy(y: Tensor) -> Tensor:
        return torch.func.grad(lambda y: odeint(Linear(a), y, UNIT, solver).square().sum())(y)

    graph = make_fx(torch.vmap(energy))(torch.randn(2, 5, 4, dtype=DOUBLE))
    y = torch.randn(2, 5, 4, dtype=DOUBLE, requires_grad=True)
    (truth,) = torch.autograd.grad(odeint(Linear(a), y.flatten(0, 1), UNIT, solver).square().sum(), y)
    assert torch.allclose(graph(y), truth, atol=1e-12)


def test_adaptive_steps_are_not_recorded():
    with pytest.raises(RuntimeError):
        make_fx(lambda y: odeint(Linear(matrix()), y, UNIT, DormandPrince()))(torch.ones(1, 4, dtype=DOUBLE))


# -- failures ---------------------------------------------------------------------------------------------------------


def nan_everywhere(t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
    return y * math.nan


def nan_later(t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
    return torch.where(t < 0.5, y, math.nan)


def infinite(t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
    return torch.where(y > 2, math.inf, y)


def explosion(t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
    return y**3 * 100


def stiff(t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
    return -1e7 * (y - t.sin())


@pytest.mark.parametrize("field", [nan_everywhere, nan_later, infinite, explosion, stiff])
@pytest.mark.parametrize("solver", [RK4(16), DormandPrince(), DormandPrince(gradient="autograd")])
def test_what_cannot_be_solved_is_an_error_at_once(field, solver):
    y = torch.ones(4, 1, dtype=DOUBLE, requires_grad=True)
    started = time.process_time()
    with pytest.raises(IntegrationError, match=r"4 of 4 row\(s\)|1 of 4 row\(s\)|row\(s\) is NaN"):
        odeint(field, y, UNIT, solver)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("solver", [RK4(16), DormandPrince()])
def test_lost_rows_are_nan_where_that_was_asked_for(solver):
    y = torch.tensor([[0.5], [1.5], [0.1]], dtype=DOUBLE)
    end = odeint(infinite, y, UNIT, solver, strict=False)
    assert end.isfinite().flatten().tolist() == [True, False, True]
    assert torch.allclose(end[[0, 2]], y[[0, 2]] * math.e, atol=1e-4)


def test_the_step_limit_says_where():
    with pytest.raises(IntegrationError, match=r"row 0 stopped at time \S+: it takes more than max_steps=5 steps"):
        odeint(stiff, torch.ones(1, 1, dtype=DOUBLE), UNIT, DormandPrince(max_steps=5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RK4(0), "steps: got 0"),
        (lambda: DormandPrince(rtol=0.0), r"rtol: got 0\.0"),
        (lambda: DormandPrince(atol=-1.0), r"atol: got -1\.0"),
        (lambda: DormandPrince(max_steps=0), "max_steps: got 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- divergence -------------------------------------------------------------------------------------------------------


def test_products_with_jacobians_are_the_same_where_nobody_differentiates_further():
    torch.manual_seed(0)
    y, told = torch.randn(5, 16), torch.tensor(0.7)
    network = UNet((1, 4, 4), channels=(8,))  # its normalisation has no batching rule for derivatives
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    for function in (
        nn.Sequential(nn.Linear(16, 16), nn.Tanh()),
        lambda y: network(told, y, None),
        torch.zeros_like,
    ):
        value, products = jacobian_products(function, y)
        with torch.no_grad():
            plain, plain_products = jacobian_products(function, y)
        assert not plain.requires_grad
        assert_close(plain, value, atol=1e-6, rtol=1e-5)
        for k in (1, 3):
            e = torch.randn(k, 5, 16)
            assert_close(plain_products(e), products(e), atol=1e-5, rtol=1e-5)


def test_the_exact_divergence_is_the_trace_of_the_jacobian():
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    y = torch.randn(6, 5, dtype=DOUBLE)
    truth = torch.stack([torch.func.jacrev(net)(row).trace() for row in y])
    for chunk in (None, 2):
        v, divergence = exact_divergence(net, y, chunk)
        assert torch.equal(v, net(y)) and torch.allclose(divergence, truth, atol=1e-12)


def test_the_estimate_has_its_mean_and_its_variance():
    r"""Mean over probes the trace, variance :math:`2 (\|S\|_F^2 - \sum_i S_{ii}^2)`."""
    a = torch.randn(6, 6, dtype=DOUBLE)
    symmetric = (a + a.mT) / 2
    y = torch.zeros(20_000, 6, dtype=DOUBLE)
    probes = rademacher(1, 20_000, 6, dtype=DOUBLE)
    _, found = estimated_divergence(lambda y: y @ a.mT, y, probes)
    variance = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())
    assert_mean(found, a.trace(), name="mean of the estimate")
    assert_mean((found - a.trace()).square(), variance, name="variance of the estimate")
    _, again = estimated_divergence(lambda y: y @ a.mT, y, probes)
    assert torch.equal(again, found)
    _, diagonal = estimated_divergence(lambda y: y * a.diagonal(), y[:3], rademacher(1, 6, dtype=DOUBLE))
    assert torch.allclose(diagonal, a.trace(), atol=1e-12), "exact for a diagonal Jacobian"
    many = rademacher(50, 6, dtype=DOUBLE)
    one_by_one = [estimated_divergence(lambda y: y @ a.mT, y[:1], probe[None])[1] for probe in many]
    assert torch.allclose(estimated_divergence(lambda y: y @ a.mT, y[:1], many)[1], torch.stack(one_by_one).mean(0))


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("hidden", [(16,), (16, 24), (16, 24, 8), (8, 8, 8, 8)], ids=len)
@pytest.mark.parametrize("shared", [True, False], ids=["one-time", "own-times"])
def test_the_network_knows_its_divergence(hidden, context, shared):
    field = VectorField(5, context, hidden).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    y, c = torch.randn(7, 5, dtype=DOUBLE), torch.randn(7, context, dtype=DOUBLE) if context else None
    t = torch.tensor(0.3, dtype=DOUBLE) if shared else torch.rand(7, 1, dtype=DOUBLE)
    v, divergence = field.with_divergence(t, y, c)
    expected = exact_divergence(lambda y: field(t, y, c), y)
    assert torch.allclose(v, expected[0], atol=1e-12) and torch.allclose(divergence, expected[1], atol=1e-12)
    probes = rademacher(3, 5, dtype=DOUBLE)
    along = (field.with_tangents(t, y, c, probes)[1] * probes).sum(-1).mean(-1)
    assert torch.allclose(along, estimated_divergence(lambda y: field(t, y, c), y, probes)[1], atol=1e-12)
    assert torch.allclose(field(t.expand(7, 1), y, c), v, atol=1e-12), "one time for all rows, or each its own"
    parameters = list(field.parameters())
    for one, other in zip(
        torch.autograd.grad(divergence.sum() + v.sum(), parameters),
        torch.autograd.grad(expected[1].sum() + expected[0].sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-9)


def test_the_network_starts_as_nothing_and_refuses_no_layers():
    assert VectorField(3)(torch.tensor(0.5), torch.randn(4, 3)).abs().max() == 0
    for hidden in ((), (0,)):
        with pytest.raises(ValueError, match="hidden_features"):
            VectorField(3, hidden_features=hidden)


# -- flow matching ----------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_velocity_of_normal_data():
    """Regression of the velocities of lines between independent normals on their places, time by time."""
    for t in (0.1, 0.4, 0.8):
        z, x = torch.randn(2, 20_000, 1, dtype=DOUBLE)
        place, velocity = straight_line(z, x, torch.full_like(z, t))
        factor = gaussian_velocity(torch.tensor(t, dtype=DOUBLE))
        assert_mean((place * (velocity - factor * place)).flatten(), 0.0, name="the residual is not orthogonal")


def test_times_follow_their_law():
    t = late_times(4000, torch.zeros((), dtype=DOUBLE), centre=0.5, spread=2.0)
    assert t.shape == (4000, 1) and t.min() > 0 and t.max() < 1
    u = torch.special.ndtr((t.logit() - 0.5) / 2.0).flatten()
    assert ((u.sort().values * 4000).floor() == torch.arange(4000)).all(), "stratified"
    assert_uniform(u[torch.randperm(4000), None], "times")
    assert late_times(8, torch.zeros(())).dtype is torch.float32


def test_pairs_are_the_best_of_all_permutations():
    z, x = torch.randn(2, 6, 3, dtype=DOUBLE)
    costs = {p: float((z[list(p)] - x).square().sum()) for p in itertools.permutations(range(6))}
    order = optimal_pairing(z, x)
    assert tuple(order.tolist()) == min(costs, key=costs.get)
