r"""A surrogate force is right under an accept test, refused elsewhere, and cheap.

The toy law is a Gaussian whose density is dear on purpose: 50 steps :math:`z_{k+1} = S z_k` of one small map, so that
the covariance is known, :math:`(A^\top A)^{-1}` with :math:`A = S^{50}`. Its force is wrong on purpose: too strong by
a third, with a rotation and a wave in it that no function has as a gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, fx

from pyro_genmods import Cost, Density, GenerativeModel, infer
from pyro_genmods.foundation.errors import DensityError, ShapeError
from pyro_genmods.foundation.forces import allowed, with_force
from pyro_genmods.foundation.graphs import trace_graph

from .statistics import assert_mean, chain_standard_error

STEPS, NOISE, SEEN = 50, 0.8, 1.2
STEP = torch.eye(2, dtype=torch.float64) + torch.tensor([[0.2, 0.5], [-0.3, -0.4]], dtype=torch.float64) / STEPS
WHITEN = torch.linalg.matrix_power(STEP, STEPS)
PRECISION = WHITEN.mT @ WHITEN
ROTATION = torch.tensor([[0.0, 0.6], [-0.6, 0.0]], dtype=torch.float64)


def dear(y: Tensor, c: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """The log density, by as many steps as wanted."""
    z = y
    for _ in range(steps):
        z = z @ STEP.mT
    return -(z**2).sum(-1) / 2 + steps * torch.linalg.slogdet(STEP)[1] - math.log(2 * math.pi)


def wrong(y: Tensor, c: Tensor | None = None) -> Tensor:
    return -1.3 * y @ PRECISION + y @ ROTATION + 0.2 * y.flip(-1).sin()


def still(y: Tensor, c: Tensor | None = None) -> Tensor:
    return torch.zeros_like(y)


class Dear(GenerativeModel):
    density = Density.EXACT

    def __init__(self, force: Callable[..., Tensor] | None, steps: int) -> None:
        super().__init__(event_shape=(2,))
        self.force, self.steps = force, steps
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    @property
    def cost(self) -> Cost:
        return Cost(sample=1, score=1)

    def push_rows(self, z: Tensor, c: Tensor | None) -> Tensor:
        return torch.linalg.solve(WHITEN, z.mT).mT

    def log_prob_rows(self, y: Tensor, c: Tensor | None) -> Tensor:
        if self.force is None:
            return dear(y, c, self.steps)
        return with_force(lambda y, c: dear(y, c, self.steps), self.force, y, c)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def program(force: Callable[..., Tensor] | None, steps: int = STEPS) -> Callable[[Tensor], None]:
    law = Dear(force, steps).eval()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", law())
        pyro.sample("y", dist.Normal(x[..., 0], NOISE), obs=y)

    return model


def posterior() -> tuple[Tensor, Tensor]:
    """Mean and covariance."""
    seen = torch.tensor([1.0, 0.0]) / NOISE**2
    covariance = torch.linalg.inv(PRECISION + torch.diag(seen))
    return covariance @ (seen * SEEN), covariance


def operations(graph: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def leapfrog(gradient: Callable[[Tensor], Tensor], q: Tensor, p: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    for _ in range(5):
        p = p - epsilon / 2 * gradient(q)
        q = q + epsilon * p
        p = p - epsilon / 2 * gradient(q)
    return q, p


DATA = (torch.tensor(SEEN, dtype=torch.float64),)


# -- the function itself -----------------------------------------------------------------------------------------------


def test_value_is_the_value_and_gradient_the_force():
    y = torch.randn(4, 2).requires_grad_()
    with allowed() as licence:
        value = with_force(dear, wrong, y, None)
    assert licence.used
    weights = torch.randn(4)
    (gradient,) = torch.autograd.grad(value @ weights, y)
    assert torch.equal(value, dear(y)) and torch.allclose(gradient, weights[:, None] * wrong(y), atol=1e-14)


def test_licence_knows_where_no_surrogate_was_met():
    with allowed() as outer, allowed() as licence:
        dear(torch.zeros(1, 2))
    assert not licence.used and not outer.used


@pytest.mark.parametrize(("x_dim", "c_dim"), [(0, 0), (1, None), (None, 1), (2, 0)])
def test_vmap_flattens_batches_into_rows(x_dim, c_dim):
    """Rows of two arguments, either of them the same for all batches; functions see ``(rows, n)`` only."""
    x = torch.randn(4, 3, 2) if x_dim is not None else torch.randn(3, 2)
    c = torch.randn(4, 3, 5) if c_dim is not None else torch.randn(3, 5)
    seen = []

    def value(x: Tensor, c: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.prod(-1) * c.sum(-1)

    def force(x: Tensor, c: Tensor) -> Tensor:
        return x * c[:, :2]

    placed = [t if d is None else t.movedim(0, d) for t, d in ((x, x_dim), (c, c_dim))]
    leaf = placed[0].requires_grad_()
    with allowed():
        batched = torch.vmap(lambda x, c: with_force(value, force, x, c), (x_dim, c_dim))(leaf, placed[1])
    (gradient,) = torch.autograd.grad(batched.sum(), leaf)
    every, contexts = x.expand(4, 3, 2), c.expand(4, 3, 5)
    expected = every * contexts[..., :2]
    expected = expected.sum(0) if x_dim is None else expected.movedim(0, x_dim)
    assert seen == [(12, 2)]
    assert torch.allclose(batched, every.prod(-1) * contexts.sum(-1)) and torch.allclose(gradient, expected)


def test_gradients_by_functorch_and_by_autograd_agree():
    y = torch.randn(6, 3, 2)
    with allowed():
        nested = torch.vmap(torch.func.grad(lambda y: with_force(dear, wrong, y).sum()))(y)
    assert torch.allclose(nested, wrong(y), atol=1e-14)


def test_refused_without_a_licence_however_it_is_differentiated():
    y = torch.randn(3, 2)
    assert torch.equal(with_force(dear, wrong, y), dear(y))
    with pytest.raises(DensityError, match="PushforwardReparam"):
        with_force(dear, wrong, y.clone().requires_grad_()).sum().backward()
    with pytest.raises(DensityError, match="SVI, MAP"):
        torch.func.grad(lambda y: with_force(dear, wrong, y).sum())(y)


def test_licence_ends_with_its_block_and_on_an_error():
    with pytest.raises(KeyError), allowed():
        raise KeyError
    with pytest.raises(DensityError):
        with_force(dear, wrong, torch.randn(3, 2, requires_grad=True)).sum().backward()


def test_second_and_forward_derivatives_are_refused():
    y = torch.randn(3, 2)

    def total(y: Tensor) -> Tensor:
        return with_force(dear, wrong, y).sum()

    leaf = y.clone().requires_grad_()
    with allowed():
        (gradient,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        with pytest.raises(DensityError, match="second"):
            gradient.sum().backward()
        for derivative in (torch.func.hessian(total), torch.func.jacrev(torch.func.grad(total))):
            with pytest.raises(DensityError, match="second"):
                derivative(y)
        with pytest.raises(DensityError, match="forward"):
            torch.func.jvp(total, (y,), (y,))


def test_others_are_given_no_gradient():
    y, c = torch.randn(3, 2).requires_grad_(), torch.randn(3, 1).requires_grad_()
    with allowed():
        value = with_force(lambda y, c: (y * c).sum(-1), lambda y, c: y + c, y, c)
    gradients = torch.autograd.grad(value.sum(), (y, c), allow_unused=True)
    assert torch.equal(gradients[0], y + c) and gradients[1] is None


def test_wrong_shapes_are_named():
    y = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ShapeError, match=r"x: got shape \(3,\)"):
        with_force(dear, wrong, y[:, 0])
    with pytest.raises(ShapeError, match=r"value: .* \(3, 2\), needs \(3,\)"):
        with_force(wrong, wrong, y)
    with allowed(), pytest.raises(ShapeError, match=r"force: .* \(3,\), needs \(3, 2\)"):
        with_force(dear, dear, y).sum().backward()


# -- recorded ----------------------------------------------------------------------------------------------------------


def test_graph_of_the_gradient_holds_the_force_only_and_of_the_value_the_value_only():
    def energies(steps: int, force: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def value(y: Tensor) -> Tensor:
            return dear(y, None, steps)

        return lambda q: torch.vmap(lambda row: with_force(value, force, row[None]).sum())(q)

    def gradients(steps: int) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda q: energies(steps, wrong)(q).sum())

    q = torch.randn(4, 2)
    with allowed():
        short, long = (trace_graph(lambda q: gradients(1)(q), (q,)), trace_graph(lambda q: gradients(STEPS)(q), (q,)))
    assert operations(short) == operations(long) <= operations(trace_graph(lambda y: wrong(y), (q,))) + 7
    assert torch.allclose(long(q), wrong(q), atol=1e-14)
    cheap, expensive = (trace_graph(energies(STEPS, force), (q,)) for force in (torch.zeros_like, wrong))
    assert operations(cheap) == operations(expensive) >= STEPS


@pytest.mark.parametrize("tempered", [pytest.param(False, marks=pytest.mark.slow), True])
def test_engine_records_force_and_value_apart(tempered):
    """Steps of the value are seen in the graph of the value alone, operations of the force in that of the force."""
    counts = {}
    cases = {"short": (wrong, 1), "long": (wrong, STEPS), "plain": (still, STEPS), "exact": (None, STEPS)}
    for name, (force, steps) in cases.items():
        with allowed():
            energy = infer.potential(program(force, steps), DATA, level="graph", tempered=tempered)
            energy.inverse_temperature = torch.full((4,), 0.7) if tempered else None
            energy.grad(torch.zeros(4, 2)), energy.value(torch.zeros(4, 2))
        assert energy.report["road"] == "vmap" and energy.report["level"] == "graph"
        for function, fused in energy._fused.items():
            (recorded,) = fused._recorded.values()
            counts[name, function.__name__] = operations(recorded.graph)
    assert counts["short", "_grad"] == counts["long", "_grad"] < counts["exact", "_grad"] / 4, counts
    assert counts["plain", "_grad"] < counts["long", "_grad"], counts
    assert counts["plain", "_value"] == counts["long", "_value"] >= counts["short", "_value"] + STEPS - 1, counts


@pytest.mark.parametrize("road", ["vmap", "plate", "loop"])
def test_roads_and_levels_agree(road):
    q = torch.randn(5, 2)
    found = []
    for level in ("eager", "graph"):
        with allowed():
            found.append(infer.potential(program(wrong), DATA, level=level, road=road).value_and_grad(q))
    exact = -dear(q) - dist.Normal(q[:, 0], NOISE).log_prob(DATA[0])
    likelihood = torch.stack([(q[:, 0] - SEEN) / NOISE**2, torch.zeros(5)], -1)
    for value, gradient in found:
        assert torch.allclose(value, exact, atol=1e-12) and torch.allclose(gradient, likelihood - wrong(q), atol=1e-12)


@pytest.mark.slow
def test_compiled_agrees():
    q = torch.randn(5, 2)
    with allowed():
        energy = infer.potential(program(wrong), DATA, level="compiled")
        gradient = energy.grad(q)
    if energy.report["level"] != "compiled":
        pytest.skip("no compiler")
    likelihood = torch.stack([(q[:, 0] - SEEN) / NOISE**2, torch.zeros(5)], -1)
    assert torch.allclose(gradient, likelihood - wrong(q), atol=1e-12)


# -- samplers ----------------------------------------------------------------------------------------------------------


def test_leapfrog_keeps_volume_and_returns():
    with allowed():
        energy = infer.potential(program(wrong), DATA, level="graph")
        energy.grad(torch.zeros(1, 2))
    ((recorded,),) = (fused._recorded.values() for fused in energy._fused.values())

    def gradient(q: Tensor) -> Tensor:
        return recorded.graph(q, *DATA)

    def step(state: Tensor) -> Tensor:
        return torch.cat(leapfrog(gradient, state[None, :2], state[None, 2:], 0.3), -1)[0]

    state = torch.randn(4)
    jacobian = torch.func.jacfwd(step)(state)
    assert abs(torch.linalg.det(jacobian) - 1) < 1e-10
    curl = torch.func.jacfwd(lambda q: gradient(q[None])[0])(state[:2])
    assert (curl - curl.mT).abs().max() > 0.5, "the force would be somebody's gradient"
    q, p = leapfrog(gradient, state[None, :2], state[None, 2:], 0.3)
    back, _ = leapfrog(gradient, q, -p, 0.3)
    assert (q - state[:2]).abs().max() > 0.1 and (back[0] - state[:2]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("kernel", "options"), [(infer.HMC, {"num_steps": 4}), pytest.param(infer.MALA, {}, marks=pytest.mark.slow)]
)
def test_posterior_under_a_wrong_force_is_right(kernel, options):
    mean, covariance = posterior()
    with allowed():
        moves = kernel(program(wrong), level="graph", **options)
        mcmc = infer.MCMC(moves, 400, warmup_steps=150, num_chains=32, progress_bar=False, seed=3)
        mcmc.run(*DATA)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    centred = x - mean
    products = torch.stack([centred[..., 0] ** 2, centred[..., 0] * centred[..., 1], centred[..., 1] ** 2], -1)
    truth = torch.stack([covariance[0, 0], covariance[0, 1], covariance[1, 1]])
    assert_mean(x.flatten(0, 1), mean, chain_standard_error(x), "posterior mean")
    assert_mean(products.flatten(0, 1), truth, chain_standard_error(products), "posterior covariance")


def test_without_an_accept_test_another_law_is_sampled():
    r"""Langevin steps :math:`x \mapsto M x + \sqrt{2 \epsilon} w` end at :math:`S = M S M^\top + 2 \epsilon I`."""
    epsilon, steps = 0.05, 400
    drift = -1.3 * PRECISION + ROTATION.mT
    step = torch.eye(2) + epsilon * drift
    flat = torch.linalg.solve(torch.eye(4) - torch.kron(step, step), 2 * epsilon * torch.eye(2).flatten())
    x = torch.zeros(20_000, 2, requires_grad=True)
    for _ in range(steps):
        with allowed():
            value = with_force(lambda x: x.sum(-1), lambda x: x @ drift.mT, x)
        (force,) = torch.autograd.grad(value.sum(), x)
        x = (x + epsilon * force + math.sqrt(2 * epsilon) * torch.randn_like(x)).detach().requires_grad_()
    x = x.detach()
    assert_mean(x**2, flat.reshape(2, 2).diagonal(), name="the law that Langevin steps do sample")
    with pytest.raises(AssertionError, match="p-value"):
        assert_mean(x**2, torch.linalg.inv(PRECISION).diagonal(), name="the law that was asked for")


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_variational_inference_and_map_are_refused(guide):
    model = program(wrong)
    svi = SVI(model, guide(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(DensityError, match=r"infer\.PushforwardReparam"):
        svi.step(*DATA)


def test_leapfrog_with_a_force_costs_a_fraction():
    q, p, seconds = torch.randn(64, 2), torch.randn(64, 2), {}
    for name, force in (("force", wrong), ("exact", None)):
        with allowed():
            energy = infer.potential(program(force), DATA, level="graph")
            times = []
            for _ in range(6):
                start = time.perf_counter()
                leapfrog(energy.grad, q, p, 0.1)
                times.append(time.perf_counter() - start)
        seconds[name] = min(times[1:])
    assert seconds["force"] < seconds["exact"] / 2, seconds
