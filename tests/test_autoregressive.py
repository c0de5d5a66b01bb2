"""Autoregressive laws against enumeration, quadrature, the AR(1) Gaussian and finite differences.

Everything runs in double precision unless said; models are moved away from their initialisation by random numbers, so
that no conditional is independent of what comes before it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import pad

import pyro_genmods as gm
from pyro_genmods.factorize import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    GaussianMixture,
    LogisticMixture,
    Mixed,
    Spline,
    StudentMixture,
    completion,
)
from pyro_genmods.factorize.conditionals import undo_soft_floor
from pyro_genmods.factorize.walk import Walk

from .statistics import assert_counts, assert_mean, assert_uniform

DOUBLE = torch.float64
SLOW = pytest.mark.slow
SMALL = {
    "made": {"width": 16},
    "transformer": {"width": 8, "layers": 2, "heads": 2},
    "gru": {"width": 8, "layers": 2},
}
NETWORKS = tuple(SMALL)
CHEAPEST_FIRST = ["made", *(pytest.param(name, marks=SLOW) for name in ("transformer", "gru"))]
CONTINUOUS = {
    "gaussian": GaussianMixture(1),
    "gaussians": GaussianMixture(3),
    "logistics": LogisticMixture(2),
    "students": StudentMixture(2, 3),
    "spline": Spline(4),
}
DISCRETE = {
    "bernoulli": Bernoulli(),
    "categorical": Categorical(3),
    "discretized": DiscretizedLogisticMixture(4, 2),
    "mixed": Mixed((Bernoulli(), Categorical(3), Bernoulli(), DiscretizedLogisticMixture(4, 1))),
}


def build(features, conditional, network="made", roughness=0.4, seed=0, dtype=DOUBLE, **options) -> gm.Autoregressive:
    """A small model whose parameters are moved by ``roughness`` standard normal draws, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = gm.Autoregressive(features, conditional, network, **SMALL[network], **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(roughness * torch.randn_like(parameter))
    return model.to(dtype).eval()


def everything(*levels: int, dtype=DOUBLE) -> Tensor:
    """All events of so many levels, by a loop of its own."""
    return torch.tensor(list(itertools.product(*map(range, levels))), dtype=dtype)


def sequences(tokens: int, length: int, eos: int, filler: int) -> Tensor:
    """All sequences that end with ``eos`` or with the row."""
    others, rows = [v for v in range(tokens) if v != eos], []
    for n in range(length):
        rows += [(*start, eos, *[filler] * (length - n - 1)) for start in itertools.product(others, repeat=n)]
    return torch.tensor(rows + list(itertools.product(others, repeat=length)))


def number_of(x: Tensor, table: Tensor) -> Tensor:
    """Which row of a table each event is."""
    same = (x.reshape(-1, 1, x.shape[-1]) == table).all(-1)
    assert same.any(-1).all(), "an event that is not in the table"
    return same.to(torch.int64).argmax(-1)


def counts_of(x: Tensor, table: Tensor) -> Tensor:
    return torch.bincount(number_of(x, table), minlength=len(table))


# -- the AR(1) Gaussian ------------------------------------------------------------------------------------------------


class MarkovChain(nn.Module):
    r"""Parameters of :math:`x_t = \phi x_{t-1} + c + s z_t`, stationary where there is no context ``c``."""

    def __init__(self, phi: float = 0.6, noise: float = 0.8) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(phi, dtype=DOUBLE))
        self.log_noise = nn.Parameter(torch.tensor(noise, dtype=DOUBLE).log())

    def forward(self, entries: Tensor, context: Tensor | None = None) -> Tensor:
        x = entries[..., 0]
        mean = pad(self.phi * x[:, :-1], (1, 0))
        mean = mean if context is None else mean + context
        first = torch.arange(x.shape[1], device=x.device) == 0
        log_s = self.log_noise - torch.where(first, 0.5 * torch.log1p(-self.phi.square()), 0)
        return torch.stack([torch.zeros_like(mean), mean, undo_soft_floor(log_s, -9.0).expand_as(mean)], -1)


def chain(length: int, phi: float = 0.6, noise: float = 0.8, **options) -> gm.Autoregressive:
    return gm.Autoregressive(length, GaussianMixture(1), MarkovChain(phi, noise), **options).eval()


def chain_covariance(length: int, phi: float = 0.6, noise: float = 0.8) -> Tensor:
    t = torch.arange(length, dtype=DOUBLE)
    return noise**2 / (1 - phi**2) * phi ** (t - t[:, None]).abs()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_gaussian_chain_is_the_multivariate_normal(length):
    law, covariance = chain(length)(), chain_covariance(length)
    x = 2 * torch.randn(50, length, dtype=DOUBLE)
    truth = dist.MultivariateNormal(torch.zeros(length, dtype=DOUBLE), covariance)
    assert torch.allclose(law.log_prob(x), truth.log_prob(x), rtol=0, atol=1e-6)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), x.mT, upper=False).mT
    assert torch.allclose(law.pull(x), white, rtol=0, atol=1e-6)
    u = law.rosenblatt(x)
    assert torch.allclose(u, dist.Normal(0, 1).cdf(white), rtol=0, atol=1e-6)
    assert torch.allclose(law.push(white), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["cached", "jacobi", "sequential"])
def test_the_gradient_of_draws_is_the_recursion(method):
    model = chain(6)
    phi, log_noise = model.network.network.phi, model.network.network.log_noise
    z = torch.randn(6, dtype=DOUBLE)
    x = model.sampled_by(method)().push(z)
    d_phi, d_noise = [x[0] * phi / (1 - phi**2)], [x[0]]
    for t in range(1, 6):
        d_phi.append(x[t - 1] + phi * d_phi[-1])
        d_noise.append(phi * d_noise[-1] + log_noise.exp() * z[t])
    for t in range(6):
        found = torch.autograd.grad(x[t], [phi, log_noise], retain_graph=True)
        assert torch.allclose(torch.stack(found), torch.stack([d_phi[t], d_noise[t]]), rtol=0, atol=1e-9)


def test_a_gaussian_chain_under_an_order_and_units():
    """A chain that runs through the entries 2, 0, 1, of data that are not standardised."""
    order = torch.tensor([2, 0, 1])
    model = chain(3, order=order)
    data = 3 + 2 * torch.randn(100, 3, dtype=DOUBLE)
    model.standardize(data)
    law, scale = model(), data.std(0, correction=0)
    permuted = torch.empty(3, 3, dtype=DOUBLE)
    permuted[order[:, None], order] = chain_covariance(3)
    truth = dist.MultivariateNormal(data.mean(0), scale[:, None] * permuted * scale)
    assert torch.allclose(law.log_prob(data), truth.log_prob(data), rtol=0, atol=1e-6)
    first = dist.Normal(data[:, 2].mean(), scale[2] * chain_covariance(1)[0, 0].sqrt())
    assert torch.allclose(law.log_prob_prefix(data, 1), first.log_prob(data[:, 2]), rtol=0, atol=1e-6)


# -- mass one ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_mass_is_one(network, dtype, tolerance):
    model = build(5, Categorical(3), network, context_features=2, dtype=dtype)
    law = model(torch.randn(2, 2, dtype=dtype))
    x = everything(3, 3, 3, 3, 3).to(torch.int64)
    log_prob = law.log_prob(x[:, None])
    assert log_prob.shape == (243, 2) and log_prob.std() > 0.5
    assert (log_prob.double().exp().sum(0) - 1).abs().max() < tolerance
    assert torch.equal(law.enumerate_support()[:, 0], x) and law.enumerate_support().dtype == torch.int64
    assert law.enumerate_support(expand=False).shape == (243, 1, 5)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize(
    "options", [{}, {"order": [2, 0, 3, 1]}, {"orders": 3}, {"orderless": True}], ids=lambda o: next(iter(o), "plain")
)
def test_the_mass_of_discrete_laws(name, network, options):
    model = build(4, DISCRETE[name], network, **options)
    levels = model.levels
    x = everything(*levels).to(model.value_dtype or DOUBLE)
    assert abs(model().log_prob(x).exp().sum() - 1) < 1e-12
    assert abs(model().tempered(0.5).log_prob(x).exp().sum() - 1) < 1e-12
    assert torch.equal(model().enumerate_support(), x)
    for method in {"auto", "cached", "jacobi", "sequential"} if "orders" not in options else {"auto"}:
        draws = model.sampled_by(method)().sample((4000,))
        assert_counts(counts_of(draws.double(), everything(*levels)), model().log_prob(x).exp(), method)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("tokens", "eos", "filler"), [(2, 0, 0), (2, 1, -1), (3, 1, 1), (3, 2, 3), (3, 0, -100)])
def test_the_mass_of_sequences_of_variable_length(network, tokens, eos, filler):
    model = build(None, Categorical(tokens), network, max_length=5, eos=eos, pad=filler)
    law, x = model(), sequences(tokens, 5, eos, filler)
    p = law.log_prob(x).exp()
    assert abs(p.sum() - 1) < 1e-12 and p.std() > 0.001
    assert len(x) == len(law.enumerate_support()) == len(law.enumerate_support().unique(dim=0))
    assert torch.equal(number_of(law.enumerate_support(), x).sort().values, torch.arange(len(x)))
    for method in ("cached", "jacobi", "sequential"):
        draws = model.sampled_by(method)().sample((4000,))
        assert draws.dtype == torch.int64
        assert_counts(counts_of(draws, x), p, method)


def grid(low: float, high: float, n: int) -> tuple[Tensor, float]:
    """Midpoints and their distance."""
    step = (high - low) / n
    return low + step * (torch.arange(n, dtype=DOUBLE) + 0.5), step


@pytest.mark.parametrize("network", CHEAPEST_FIRST)
@pytest.mark.parametrize("name", ["gaussians", "logistics", pytest.param("spline", marks=SLOW)])
def test_the_mass_of_continuous_laws(name, network):
    """On positive numbers with units of their own, under an order, by quadrature in logarithms."""
    model = build(2, CONTINUOUS[name], network, 0.15, order=[1, 0], support=constraints.positive)
    model.standardize((1 + 0.5 * torch.randn(200, 2, dtype=DOUBLE)).exp())
    # the density of a spline has kinks, where the error of quadrature falls with the square of the step
    n, error = (1500, 2e-4) if name == "spline" else (600, 1e-5)
    u, step = grid(-14, 16, n)
    points = torch.cartesian_prod(u, u)
    log_prob = model().log_prob(points.exp()) + points.sum(-1)
    assert abs(log_prob.exp().sum() * step**2 - 1) < error
    # the marginal of the first place, which is column 1, and the conditional of the rest
    joint = log_prob.reshape(n, n)
    marginal = joint.logsumexp(0) + math.log(step)
    at = torch.stack([torch.ones_like(u), u.exp()], -1)
    inner = slice(n // 4, 3 * n // 4)
    prefix = model().log_prob_prefix(at, 1) + u
    assert torch.allclose(prefix[inner].exp(), marginal[inner].exp(), rtol=error, atol=error / 10)
    rest = model().condition(at[n // 2, 1:])
    truth = (joint[:, n // 2] - marginal[n // 2]).exp()
    assert torch.allclose((rest.log_prob(u.exp()[:, None]) + u).exp(), truth, rtol=error, atol=error / 10)
    x = rest.rsample((20,))
    assert x.requires_grad and torch.allclose(rest.push(rest.pull(x)), x, rtol=1e-9) and rest.support.check(x).all()
    assert_uniform(cumulative(truth * step, u, rest.sample((2000,)).log()), "draws of the rest")


def cumulative(masses: Tensor, u: Tensor, x: Tensor) -> Tensor:
    """Distribution function of a density on a grid, interpolated, at ``x`` ``(n, 1)``."""
    total, step = pad(masses.cumsum(0), (1, 0)), u[1] - u[0]
    place = ((x - u[0]) / step + 0.5).clamp(0, len(u) - 1e-9)
    index = place.long()
    return total[index] + (place - index) * masses[index]


def test_the_mass_of_mixed_columns_with_units():
    model = build(3, Mixed((GaussianMixture(2), Bernoulli(), LogisticMixture(1))), roughness=0.2)
    data = torch.stack([5 + 3 * torch.randn(200), (torch.rand(200) < 0.3).float(), -2 + 0.1 * torch.randn(200)], -1)
    model.standardize(data.double())
    (a, step_a), (c, step_c) = grid(-40, 50, 300), grid(-5, 1, 300)
    x = torch.cartesian_prod(a, torch.arange(2, dtype=DOUBLE), c)
    assert abs(model().log_prob(x).exp().sum() * step_a * step_c - 1) < 1e-4
    inside = torch.tensor([[4.0, 1.0, -2.05]], dtype=DOUBLE)
    for k, columns in ((1, [1, 2]), (2, [2])):
        rows = inside.repeat(len(x), 1)
        rows[:, columns] = x[:, columns]
        rows = rows.unique(dim=0)
        width = step_c
        mass = model().log_prob(rows).exp().sum() * width
        assert torch.allclose(mass, model().log_prob_prefix(inside[0], k).exp(), rtol=1e-4)


# -- gradients ---------------------------------------------------------------------------------------------------------


def slope_along(f: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences of fourth order."""
    with torch.no_grad():
        near = f(at + step * direction) - f(at - step * direction)
        far = f(at + 2 * step * direction) - f(at - 2 * step * direction)
        return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("network", CHEAPEST_FIRST)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_gradients_of_draws_against_differences(name, network):
    """In noise, context and every parameter of the network; errors relative to the gradient."""
    model = build(4, CONTINUOUS[name], network, 0.25, context_features=2, order=[1, 3, 0, 2])
    z, c = torch.randn(3, 4, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    weights = torch.randn(3, 4, dtype=DOUBLE)
    named = dict(model.network.named_parameters())

    def value(name: str, tensor: Tensor) -> Tensor:
        if name in named:
            with torch.no_grad():
                before = named[name].clone()
                named[name].copy_(tensor)
                result = value("", tensor)
                named[name].copy_(before)
            return result
        law = model(tensor if name == "the context" else c)
        return (weights * law.push(tensor if name == "the noise" else z)).sum()

    leaves = {"the noise": z.clone().requires_grad_(), "the context": c.clone().requires_grad_(), **named}
    total = (weights * model(leaves["the context"]).push(leaves["the noise"])).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    largest = max(float(g.norm()) for g in gradients)
    for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        for _ in range(1 if key in named else 3):
            direction = torch.randn_like(leaf.detach())
            direction = direction / direction.norm()
            found, truth = (
                (gradient * direction).sum(),
                slope_along(lambda t, k=key: value(k, t), leaf.detach(), direction),
            )
            assert abs(found - truth) <= 1e-6 * max(float(gradient.norm()), 1e-2 * largest), (key, found, truth)


def unrolled(model: gm.Autoregressive, z: Tensor, c: Tensor) -> Tensor:
    """The map of a Gaussian law, one place after the other, by plain autograd."""
    x = torch.zeros_like(z)
    for t in range(z.shape[1]):
        theta = model.parameters_of(x, c)[:, t]
        _, m, log_s = model.conditional.components(theta)
        x = torch.cat([x[:, :t], m + log_s.exp() * z[:, t : t + 1], x[:, t + 1 :]], 1)
    return x


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_of_draws_against_the_unrolled_map(network):
    model = build(6, GaussianMixture(1), network, 0.2, context_features=1)
    z = torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    c = torch.randn(5, 1, dtype=DOUBLE, requires_grad=True)
    weights = torch.randn(5, 6, dtype=DOUBLE)
    leaves = [z, c, *model.network.parameters()]
    found = torch.autograd.grad((weights * model(c).push(z)).sum(), leaves)
    truth = torch.autograd.grad((weights * unrolled(model, z, c)).sum(), leaves, allow_unused=True)
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["cached", "jacobi", "sequential"])
def test_the_graph_of_a_draw_does_not_grow_with_its_length(method):
    saved: dict[int, list[int]] = {}
    for length in (4, 32):
        model = build(length, GaussianMixture(2), "gru", context_features=1)
        law = model.sampled_by(method)(torch.randn(10, 1, dtype=DOUBLE))
        sizes = saved.setdefault(length, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            x = law.rsample()
        parameters = [p.numel() for p in model.network.parameters()]
        assert x.requires_grad and len(sizes) <= len(parameters) + 6, "a graph through the places"
        assert sum(sizes) <= sum(parameters) + 4 * x.numel() + 10 * 4
    assert len(saved[4]) == len(saved[32])


TRACED = [pytest.param(GaussianMixture(1), id="one"), pytest.param(GaussianMixture(2), id="two", marks=SLOW)]


def functional(head, network: str, method: str) -> tuple[Callable[..., tuple[Tensor, ...]], Tensor, Tensor]:
    """The gradient of a function of a draw in noise and context, rows of noise, and rows of context."""
    model = build(4, head, network, 0.2, context_features=1).sampled_by(method)

    def value(z: Tensor, c: Tensor) -> Tensor:
        return (model(c).push(z) * torch.arange(1, 5)).sum().sin()

    return torch.func.grad(value, (0, 1)), torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 1, dtype=DOUBLE)


@pytest.mark.parametrize("method", ["cached", "jacobi"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_of_draws_under_vmap(network, method):
    gradient, z, c = functional(GaussianMixture(2), network, method)
    together = torch.vmap(gradient)(z, c)
    one_context = torch.vmap(gradient, (0, None))(z, c[2])
    law = build(4, GaussianMixture(2), network, 0.2, context_features=1).sampled_by(method)
    for i in range(5):
        leaves = [z[i].clone().requires_grad_(), c[i].clone().requires_grad_()]
        x = (law(leaves[1]).push(leaves[0]) * torch.arange(1, 5)).sum().sin()
        for a, b, d in zip(together, gradient(z[i], c[i]), torch.autograd.grad(x, leaves), strict=True):
            assert torch.allclose(a[i], b, rtol=1e-9, atol=1e-11) and torch.allclose(b, d, rtol=1e-9, atol=1e-11)
    assert torch.allclose(one_context[0][2], together[0][2], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["cached", "jacobi"])
@pytest.mark.parametrize("network", CHEAPEST_FIRST)
@pytest.mark.parametrize("head", TRACED)
def test_gradients_of_draws_can_be_traced(head, network, method):
    gradient, z, c = functional(head, network, method)
    graph = make_fx(gradient)(z[0], c[0])
    for a, b in zip(graph(z[1], c[1]), gradient(z[1], c[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    both = make_fx(torch.vmap(gradient))(z, c)
    assert torch.allclose(both(z.flip(0), c.flip(0))[0], torch.vmap(gradient)(z, c)[0].flip(0), rtol=1e-9, atol=1e-11)


def test_gradients_of_densities_under_functional_transforms():
    model = build(3, LogisticMixture(2), "transformer", context_features=1)
    x, c = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 1, dtype=DOUBLE)
    gradient = torch.func.grad(lambda x, c: model(c).log_prob(x), (0, 1))
    law = model(c.clone().requires_grad_())
    leaves = [x.clone().requires_grad_(), law.context]
    truth = torch.autograd.grad(law.log_prob(leaves[0]).sum(), leaves)
    for a, b in zip(torch.vmap(gradient)(x, c), truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    assert torch.allclose(law.score(x), truth[0], rtol=1e-9, atol=1e-11)


# -- the Rosenblatt transform ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_rosenblatt_transform_and_its_inverse(name, network):
    model = build(4, CONTINUOUS[name], network, 0.3, order=[3, 1, 0, 2])
    law = model()
    u = 0.001 + 0.998 * torch.rand(200, 4, dtype=DOUBLE)
    for method in ("cached", "jacobi", "sequential"):
        x = law.inverse_rosenblatt(u, method)
        assert torch.allclose(law.rosenblatt(x), u, rtol=0, atol=1e-9)
        assert torch.allclose(law.inverse_rosenblatt(law.rosenblatt(x), method), x, rtol=1e-9, atol=1e-9)
        assert torch.allclose(law.push(law.pull(x)), x, rtol=1e-9, atol=1e-9)


def some_laws() -> dict[str, Callable[[int], gm.Autoregressive]]:
    """Models by their seed, one of every kind of event."""
    mixed = Mixed((Bernoulli(), GaussianMixture(2), Categorical(3), LogisticMixture(1)))
    laws = {
        name: lambda seed, head=head: build(4, head, "gru", seed=seed, order=[2, 0, 3, 1])
        for name, head in {**CONTINUOUS, **DISCRETE, "columns": mixed}.items()
    }
    laws["pad"] = lambda seed: build(4, Categorical(3), "made", seed=seed, eos=1)
    laws["filler"] = lambda seed: build(4, Categorical(3), "transformer", seed=seed, eos=0, pad=7)
    laws["context"] = lambda seed: build(4, LogisticMixture(2), "transformer", seed=seed, context_features=1)
    return laws


@pytest.mark.parametrize("name", some_laws())
def test_residuals_are_uniform_under_the_law_and_under_no_other(name):
    model, other = some_laws()[name](0), some_laws()[name](1)
    context = (torch.randn(3000, 1, dtype=DOUBLE),) if model.context_shape else ()
    sample_shape = () if context else (3000,)
    x = model(*context).sample(sample_shape)
    assert_uniform(model(*context).rosenblatt(x))
    with pytest.raises(AssertionError, match="p-value"):
        assert_uniform(model(*context).rosenblatt(other(*context).sample(sample_shape)))


@pytest.mark.parametrize("name", [*DISCRETE, "columns", "pad", "filler"])
def test_residuals_of_discrete_events_bring_them_back(name):
    model = some_laws()[name](0)
    law = model()
    x = law.sample((500,))
    v = 0.01 + 0.98 * torch.rand(500, 4, dtype=DOUBLE)
    u = law.rosenblatt(x, v)
    for method in ("cached", "jacobi", "sequential"):
        back = law.inverse_rosenblatt(u.clamp(1e-15, 1 - 1e-15), method)
        assert torch.equal(back, x) if name != "columns" else torch.allclose(back, x, rtol=1e-9, atol=1e-9)
    if model.eos is not None:
        after = (x == model.eos).cumsum(-1).roll(1, -1)[:, 1:] > 0
        assert after.any() and torch.equal(u[:, 1:][after], v[:, 1:][after])


# -- prefixes ----------------------------------------------------------------------------------------------------------

PREFIXED = {
    "categorical": lambda: build(4, Categorical(3), "gru"),
    "ordered": lambda: build(4, Categorical(3), "transformer", order=[2, 0, 3, 1]),
    "mixed": lambda: build(4, DISCRETE["mixed"], "made", order=[1, 3, 2, 0]),
    "pad": lambda: build(4, Categorical(3), "gru", eos=0),
    "filler": lambda: build(4, Categorical(3), "transformer", eos=1, pad=-1),
}


@pytest.mark.parametrize("name", PREFIXED)
def test_prefixes_against_enumeration(name):
    model = PREFIXED[name]()
    law = model()
    x = everything(*model.levels) if model.eos is None else sequences(3, 4, model.eos, model.pad)
    x = x.to(model.value_dtype or DOUBLE)
    p = law.log_prob(x).exp()
    assert torch.allclose(law.log_prob_prefix(x, 4).exp(), p, rtol=1e-10) and (law.log_prob_prefix(x, 0) == 0).all()
    for k in (1, 2, 3):
        start, rest = x[:, model.order[:k]], x[:, model.order[k:]]
        same = (start[:, None] == start).all(-1)
        marginal = (same * p).sum(-1)
        assert torch.allclose(law.log_prob_prefix(x, k).exp(), marginal, rtol=1e-10)
        after = law.condition(start)
        assert after.batch_shape == (len(x),) and after.event_shape == (4 - k,)
        assert torch.allclose(after.log_prob(rest).exp(), p / marginal, rtol=1e-9)
        one = 5
        draws = law.condition(start[one]).sample((3000,))
        mine = x[same[one]]
        if len(mine) > 1:
            assert_counts(counts_of(draws, mine[:, model.order[k:]]), (p / marginal)[same[one]], f"after {start[one]}")
        assert after.support.check(after.sample()).all() and after.sample().dtype == x.dtype


def test_prefixes_of_a_conditional_law():
    """Contexts and prefixes broadcast; the law of the rest is a distribution with every habit of one."""
    model = build(4, LogisticMixture(2), "transformer", context_features=1, order=[1, 0, 3, 2])
    law = model(torch.randn(3, 1, dtype=DOUBLE))
    x = law.sample((5,))
    rest = law.condition(x[..., [1, 0]])
    assert rest.batch_shape == (5, 3) and rest.event_shape == (2,)
    difference = law.log_prob(x) - law.log_prob_prefix(x, 2)
    assert torch.allclose(rest.log_prob(x[..., [3, 2]]), difference, rtol=1e-10)
    z = rest.pull(x[..., [3, 2]])
    assert torch.allclose(z, law.pull(x)[..., [3, 2]], rtol=1e-9)
    assert torch.allclose(rest.push(z), x[..., [3, 2]], rtol=1e-9)
    assert law.condition(x[0, 0, [1]]).batch_shape == (3,)
    assert rest.expand((2, 5, 3)).sample().shape == (2, 5, 3, 2)


def test_a_sequence_that_has_ended_goes_on_with_nothing():
    law = PREFIXED["filler"]()()
    rest = law.condition(torch.tensor([2, 1]))
    assert (rest.sample((10,)) == -1).all()
    assert rest.log_prob(torch.tensor([-1, -1])) == 0
    assert not rest.support.check(torch.tensor([-1, 2]))


def test_gradients_through_the_prefix():
    """Of densities and of draws of the rest, against the Gaussian chain."""
    law = chain(4)()
    prefix = torch.tensor([0.3, -0.7], dtype=DOUBLE, requires_grad=True)
    z = torch.randn(2, dtype=DOUBLE)
    x = law.condition(prefix).push(z)
    (slope,) = torch.autograd.grad(x.sum(), prefix)
    assert torch.allclose(slope, torch.tensor([0.0, 0.6 + 0.36], dtype=DOUBLE), atol=1e-9)
    value = torch.tensor([0.5, 0.1], dtype=DOUBLE)
    (slope,) = torch.autograd.grad(law.condition(prefix).log_prob(value), prefix)
    truth = torch.tensor([0.0, 0.6 * (0.5 + 0.6 * 0.7) / 0.64], dtype=DOUBLE)
    assert torch.allclose(slope, truth, atol=1e-9)


# -- one place at a time -----------------------------------------------------------------------------------------------

WALKED = {
    "plain": {},
    "order": {"order": [3, 0, 4, 2, 1]},
    "orderless": {"orderless": True, "order": [3, 0, 4, 2, 1]},
}


@pytest.mark.parametrize("options", WALKED)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["gaussians", "categorical", "columns"])
def test_steps_of_the_network_are_its_passes(name, network, options):
    mixed = Mixed((Bernoulli(), GaussianMixture(2), Categorical(3), GaussianMixture(2), Bernoulli()))
    head = {"gaussians": GaussianMixture(3), "categorical": Categorical(3), "columns": mixed}[name]
    model = build(5, head, network, context_features=2, **WALKED[options]).tempered(0.7)
    c = torch.randn(6, 2, dtype=DOUBLE)
    x = model(c).sample().to(DOUBLE)
    walk, whole = Walk(model, x, c), model.parameters_of(x, c)
    with torch.no_grad():
        for v in walk.places:
            size = walk.head.size
            assert torch.allclose(walk.parameters(), whole[:, v, :size], rtol=1e-10, atol=1e-11)
            walk.put(x[:, v])
    assert torch.equal(walk.values(), x)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("length", [1, 3, 64])
def test_methods_of_sampling_agree(network, length):
    calls = []
    order = torch.randperm(length)
    for head in (Categorical(3), Bernoulli(), LogisticMixture(2), GaussianMixture(1)):
        model = build(length, head, network, 0.2 if length < 10 else 0.02, order=order)
        u = torch.rand(8, length, dtype=DOUBLE).clamp(1e-9, 1 - 1e-9)
        handle = model.network.register_forward_hook(lambda *_: calls.append(1))
        cached = model().inverse_rosenblatt(u, "cached")
        calls.clear()
        jacobi = model().inverse_rosenblatt(u, "jacobi")
        assert 1 <= len(calls) <= length
        calls.clear()
        sequential = model().inverse_rosenblatt(u, "sequential")
        assert len(calls) == length
        handle.remove()
        assert torch.equal(jacobi, sequential)
        assert torch.equal(jacobi, cached) if head.discrete else torch.allclose(jacobi, cached, rtol=1e-9, atol=1e-9)


def test_independent_entries_take_two_passes():
    model = gm.Autoregressive(32, Bernoulli(), width=16)
    with torch.no_grad():
        model.network.output.zero_()
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    model.sampled_by("jacobi")().sample((5,))
    assert len(calls) == 2


# -- imputation --------------------------------------------------------------------------------------------------------

PATTERNS = [(1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0), (1, 1, 0, 0)]


def posterior(p: Tensor, table: Tensor, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Evidence of the seen entries of ``x``, and the law of complete events given them, on the table."""
    fits = ((table == x) | ~seen).all(-1)
    return (p * fits).sum(), p * fits / (p * fits).sum()


@pytest.mark.parametrize("network", NETWORKS)
def test_an_orderless_model_imputes_exactly(network):
    model = build(4, DISCRETE["mixed"], network, orderless=True)
    table = everything(*model.levels)
    x = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=DOUBLE)
    for pattern in PATTERNS:
        seen = torch.tensor(pattern, dtype=torch.bool)
        view = model.under(torch.cat([seen.nonzero().flatten(), (~seen).nonzero().flatten()]))
        evidence, truth = posterior(view().log_prob(table).exp(), table, x, seen)
        filled = model().impute(torch.where(seen, x, math.nan), seen, num_samples=2000)
        assert torch.allclose(filled.log_evidence, evidence.log(), atol=1e-10) and filled.ess == math.inf
        assert torch.equal(filled.values[:, seen], x[seen].expand(2000, -1))
        if not seen.all():
            assert_counts(counts_of(filled.values, table), truth, f"{pattern}")


def test_imputation_of_many_patterns_at_once():
    """Rows with patterns of their own under contexts of their own are those of one at a time."""
    model = build(3, GaussianMixture(2), "transformer", orderless=True, context_features=1)
    c = torch.randn(8, 1, dtype=DOUBLE)
    x = model(c).sample()
    seen = torch.tensor(list(itertools.product([False, True], repeat=3)))
    together = model(c).impute(x, seen, num_samples=3)
    assert together.values.shape == (3, 8, 3) and together.log_evidence.shape == (8,)
    assert torch.equal(together.values[:, seen], x[seen].expand(3, -1))
    for i in range(8):
        alone = model(c[i]).impute(x[i], seen[i])
        assert torch.allclose(alone.log_evidence, together.log_evidence[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pattern", [(1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1)])
def test_the_evidence_by_particles_is_unbiased(pattern):
    model = build(4, Categorical(3), "made", 0.6, order=[1, 0, 3, 2])
    table = everything(3, 3, 3, 3).to(torch.int64)
    x, seen = torch.tensor([0, 2, 1, 1]), torch.tensor(pattern, dtype=torch.bool)
    p = model().log_prob(table).exp().detach()
    evidence, truth = posterior(p, table, x, seen)
    few = model().impute(x.expand(400, 4), seen, num_particles=6)
    assert few.log_evidence.std() > 0, "nothing to average"
    assert_mean(few.log_evidence.exp(), float(evidence), name="evidence")
    many = model().impute(x.expand(1500, 4), seen, num_particles=300)
    assert_mean(many.log_evidence.exp(), float(evidence), name="evidence by many particles")
    assert_counts(counts_of(many.values[0], table), truth, "draws")


def test_gaps_in_a_gaussian_chain():
    """Continuous entries, in units of their own: the conditional Gaussian; gaps at the end cost no particles."""
    model = chain(4)
    model.standardize(1 + 3 * torch.randn(50, 4, dtype=DOUBLE))
    units = model.coordinates.standardization
    covariance = units.scale[:, None] * chain_covariance(4) * units.scale
    x, seen = torch.tensor([2.0, 0.0, 5.0, 0.0], dtype=DOUBLE), torch.tensor([True, False, True, False])
    truth = dist.MultivariateNormal(units.shift[seen], covariance[seen][:, seen])
    found = model().impute(torch.where(seen, x, math.nan).expand(2000, 4), seen, num_particles=50)
    evidence = truth.log_prob(x[seen]).exp()
    assert_mean(found.log_evidence.exp() / evidence, 1.0, name="evidence")
    gain = covariance[~seen][:, seen] @ covariance[seen][:, seen].inverse()
    mean = units.shift[~seen] + gain @ (x[seen] - units.shift[seen])
    draws = model().impute(x.expand(2000, 4), seen, num_particles=500).values[0][:, ~seen]
    assert_mean(draws, mean)
    variance = (covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]).diagonal()
    assert_mean((draws - mean).square() / variance, torch.ones(2), name="variance")
    end = model().impute(x, torch.tensor([True, True, False, False]), num_samples=7)
    assert end.ess == math.inf and end.values.shape == (7, 4)
    assert torch.allclose(end.log_evidence, model().log_prob_prefix(x, 2), rtol=1e-9)
    assert (end.values[:, 2:].unique(dim=0).shape[0]) == 7


def test_evidence_on_a_constrained_support():
    """Positive entries with units, under a fixed order and without one, against quadrature."""
    for options in ({}, {"orderless": True}):
        model = build(2, LogisticMixture(2), roughness=0.2, support=constraints.positive, **options)
        model.standardize((1 + 0.5 * torch.randn(200, 2, dtype=DOUBLE)).exp())
        u, step = grid(-12, 14, 4000)
        seen, x = torch.tensor([False, True]), torch.tensor([math.nan, 2.5], dtype=DOUBLE)
        law = model.under(torch.tensor([1, 0]))() if options else model()
        at = torch.stack([u.exp(), torch.full_like(u, 2.5)], -1)
        evidence = ((law.log_prob(at) + u).exp() * step).sum()
        found = model().impute(x.expand(400, 2), seen, num_particles=16)
        assert (found.values > 0).all()
        if options:
            assert torch.allclose(found.log_evidence.exp(), evidence, rtol=1e-6)
        else:
            assert_mean(found.log_evidence.exp(), float(evidence), name="evidence")


# -- several orders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_an_ensemble_is_the_mixture_of_its_orders(network):
    model = build(4, Bernoulli(), network, 0.8, orders=3, context_features=1)
    c = torch.randn(2, 1, dtype=DOUBLE)
    x = everything(2, 2, 2, 2)
    each = torch.stack([model.under(order)(c).log_prob(x[:, None]) for order in model.orders])
    assert (each[0] - each[1]).abs().max() > 0.05, "orders that agree by accident"
    assert torch.allclose(model(c).log_prob(x[:, None]), each.logsumexp(0) - math.log(3), rtol=1e-12)
    draws = model(c).sample((8000,))
    for i in range(2):
        assert_counts(counts_of(draws[:, i], x), each[:, :, i].exp().mean(0), f"context {i}")
    assert not model(c).has_rsample and model.cost.score == 3
    gaussians = build(3, GaussianMixture(1), network, orders=2)
    assert gaussians.under(gaussians.orders[1])().rsample().requires_grad
    assert model.loss(x, c[:1].expand(16, 1)).shape == (16,)


@pytest.mark.slow
def test_a_trained_orderless_model_knows_a_table_in_every_order():
    torch.manual_seed(5)
    p = (1.2 * torch.randn(16)).softmax(0)
    x = everything(2, 2, 2, 2).float()
    model = gm.Autoregressive(4, Bernoulli(), width=128, orderless=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps = 2500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (p * model.loss(x)).sum().backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        for order in itertools.permutations(range(4)):
            q = model.under(torch.tensor(order))().log_prob(x)
            assert abs(q.exp().sum() - 1) < 1e-5
            assert (p * (p.log() - q)).sum() < 0.01, order
        for pattern in itertools.product([False, True], repeat=4):
            seen = torch.tensor(pattern)
            filled = model().impute(x, seen.expand(16, 4), num_samples=1)
            for i in range(16):
                evidence, _ = posterior(p, x, x[i], seen)
                assert abs(filled.log_evidence[i].exp() - evidence) < 0.02, (pattern, i)
        seen = torch.tensor([False, True, False, True])
        _, truth = posterior(p, x, x[6], seen)
        draws = model().impute(x[6], seen, num_samples=20000).values
        assert (counts_of(draws, x) / 20000 - truth).abs().max() < 0.02


# -- copies, files, dtypes ---------------------------------------------------------------------------------------------

KEPT = {
    "order": lambda: build(4, LogisticMixture(2), "made", order=[2, 0, 3, 1]),
    "random-order": lambda: build(4, Categorical(3), "gru", order="random"),
    "orders": lambda: build(4, Bernoulli(), "transformer", orders=3),
    "orderless": lambda: build(4, GaussianMixture(2), "made", orderless=True),
    "mixed": lambda: build(4, Mixed((Bernoulli(), GaussianMixture(2), Categorical(3), Spline(3))), "made"),
    "mixed-gru": lambda: build(4, Mixed((Bernoulli(), StudentMixture(2, 3), Categorical(3), Spline(3))), "gru"),
    "sequence": lambda: build(None, Categorical(3), "transformer", max_length=4, eos=0, pad=5),
    "positive": lambda: build(4, Spline(4), "gru", support=constraints.positive, context_features=2, sampling="jacobi"),
    "own": lambda: chain(4, order=[3, 2, 1, 0]),
    "image": lambda: build((2, 2), DiscretizedLogisticMixture(4, 2), "made"),
}


def kept(name: str) -> tuple[gm.Autoregressive, Tensor, tuple[Tensor, ...]]:
    """A model that is off its defaults everywhere, events and contexts."""
    model = KEPT[name]()
    context = (torch.randn(6, 2, dtype=DOUBLE),) if model.context_shape else ()
    x = model(*context).sample(() if context else (6,))
    model.standardize(x + 0 if model.value_dtype else 1.7 * x if not model.conditional.discrete else x, *context)
    return model, x, context


@pytest.mark.parametrize("name", KEPT)
def test_copies_and_files_are_the_same_model(name, tmp_path):
    model, x, context = kept(name)
    truth = model(*context).log_prob(x)
    gm.save(model, tmp_path / "model.safetensors")
    loaded = gm.load(tmp_path / "model.safetensors", allow=[MarkovChain])
    again = KEPT[name]()
    again.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), loaded, again):
        assert torch.equal(other(*context).log_prob(x), truth)
        assert torch.equal(other.orders, model.orders)
        torch.manual_seed(3)
        draws = other(*context).sample()
        torch.manual_seed(3)
        assert torch.equal(draws, model(*context).sample())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.3)
    assert torch.equal(model(*context).log_prob(x), truth) and not torch.equal(copied(*context).log_prob(x), truth)


@pytest.mark.parametrize("view", ["tempered", "under", "sampled_by"])
def test_views_are_kept_as_they_are(view, tmp_path):
    model = build(4, GaussianMixture(2), "made", orderless=True, order=[0, 2, 1, 3])
    argument = {"tempered": 0.5, "under": torch.tensor([3, 1, 0, 2]), "sampled_by": "sequential"}[view]
    seen = getattr(model, view)(argument)
    x = model().sample((5,))
    truth = seen().log_prob(x)
    gm.save(seen, tmp_path / "model.safetensors")
    for other in (copy.deepcopy(seen), gm.load(tmp_path / "model.safetensors")):
        assert torch.equal(other().log_prob(x), truth) and other.sampling == seen.sampling
    assert seen.network is model.network, "a view shares the parameters"
    x.requires_grad_()
    seen().log_prob(x).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("network", NETWORKS)
def test_precisions(network):
    model = build(4, GaussianMixture(2), network, dtype=torch.float32, context_features=1)
    c, x = torch.randn(5, 1), torch.randn(5, 4)
    single = model(c).log_prob(x)
    model.double()
    double = model(c.double()).log_prob(x.double())
    assert double.dtype == DOUBLE and torch.allclose(single.double(), double, atol=1e-4)
    assert model(c.double()).rsample().dtype == DOUBLE and model.orders.dtype == torch.int64


# -- numbers people report ---------------------------------------------------------------------------------------------


def test_entropy_perplexity_and_bits():
    model = build(4, Categorical(3), "gru", context_features=1)
    c = torch.randn(2, 1, dtype=DOUBLE)
    p = model(c).log_prob(everything(3, 3, 3, 3).to(torch.int64)[:, None]).exp()
    assert torch.allclose(model(c).entropy(), -(p * p.log()).sum(0), rtol=1e-12)
    x = model(c).sample((5,))
    log_prob = model(c).log_prob(x)
    assert torch.allclose(model(c).perplexity(x), torch.exp(-log_prob / 4), rtol=1e-12)
    assert torch.allclose(model(c).bits_per_dim(x), -log_prob / (4 * math.log(2)), rtol=1e-12)
    uniform = gm.Autoregressive(6, Categorical(8))()
    assert torch.allclose(uniform.perplexity(torch.zeros(6)), torch.tensor(8.0), rtol=1e-4)
    assert torch.allclose(uniform.bits_per_dim(torch.zeros(6)), torch.tensor(3.0), rtol=1e-4)


def test_entropy_of_the_gaussian_chain():
    law = chain(5)()
    truth = dist.MultivariateNormal(torch.zeros(5, dtype=DOUBLE), chain_covariance(5)).entropy()
    errors = torch.stack([law.entropy(num_samples=500) - truth for _ in range(20)])
    assert_mean(errors, 0.0, standard_error=torch.tensor(math.sqrt(2.5 / 10000)), name="entropy")


@pytest.mark.parametrize("filler", [0, -1])
def test_numbers_of_sequences_count_their_length(filler):
    law = build(None, Categorical(3), "made", max_length=5, eos=0, pad=filler)()
    x = torch.tensor([[0] + 4 * [filler], [1, 2, 0, filler, filler], [1, 2, 1, 2, 1], [2, 1, 2, 1, 0]])
    lengths = torch.tensor([1, 3, 5, 5])
    log_prob = law.log_prob(x)
    assert torch.allclose(law.perplexity(x), torch.exp(-log_prob / lengths), rtol=1e-12)
    assert torch.allclose(law.bits_per_dim(x), -log_prob / lengths / math.log(2), rtol=1e-12)
    p = law.log_prob(sequences(3, 5, 0, filler)).exp()
    assert torch.allclose(law.entropy(), -(p * p.log()).sum(), rtol=1e-12)


# -- temperature -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("name", ["bernoulli", "categorical", "discretized", "mixed", "sequence"])
def test_tempered_laws(name, temperature, network):
    if name == "sequence":
        model, x = build(4, Categorical(3), network, eos=1), sequences(3, 4, 1, 1)
    else:
        model = build(4, DISCRETE[name], network, order=[2, 0, 3, 1])
        x = everything(*model.levels).to(model.value_dtype or DOUBLE)
    law = model()
    cold = law.tempered(temperature)
    p = cold.log_prob(x).exp()
    assert abs(p.sum() - 1) < 1e-12 and (p - law.log_prob(x).exp()).abs().max() > 1e-3
    assert_counts(counts_of(cold.sample((4000,)), x), p, "draws")
    assert torch.equal(law.tempered(1.0).log_prob(x), law.log_prob(x))
    assert torch.allclose(cold.tempered(1 / temperature).log_prob(x), law.log_prob(x), rtol=1e-9)
    if name in ("bernoulli", "categorical", "sequence"):
        truth = torch.zeros(len(x), dtype=DOUBLE)
        for k in range(4):  # the conditional of every place, to the power 1/T and normalised over what it could be
            start = x[:, model.order[:k]]
            same = (start[:, None] == start).all(-1)
            here, before = law.log_prob_prefix(x, k + 1), law.log_prob_prefix(x, k)
            powers = (here - before) / temperature
            entry = x[:, model.order[k]]
            first = torch.stack([same & (entry == v) for v in entry.unique()]).to(torch.int64)
            one_each = torch.zeros_like(same)
            for cells in first:  # one representative of each next entry
                one_each |= nn.functional.one_hot(cells.argmax(-1), len(x)).bool() & cells.any(-1, keepdim=True)
            truth += powers - torch.where(one_each, powers, -math.inf).logsumexp(-1)
        assert torch.allclose(cold.log_prob(x), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussians", "logistics", "students", "spline"])
def test_tempered_continuous_laws(name):
    """Draws of a tempered law are those of its own density; a Gaussian chain has the power of its conditionals."""
    cold = build(3, CONTINUOUS[name], "gru", 0.3)().tempered(0.4)
    assert_uniform(cold.rosenblatt(cold.sample((3000,))))
    u, step = grid(-60, 60, 60000)
    one = build(1, CONTINUOUS[name], "gru", 0.3)().tempered(0.4)
    assert abs((one.log_prob(u[:, None]).exp() * step).sum() - 1) < 1e-3
    x = torch.randn(10, 5, dtype=DOUBLE)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(chain_covariance(5)), x.mT, upper=False).mT
    covariance = chain_covariance(5) * 0.4
    truth = dist.MultivariateNormal(torch.zeros(5, dtype=DOUBLE), covariance).log_prob(x)
    assert torch.allclose(chain(5)().tempered(0.4).log_prob(x), truth, atol=1e-6)
    assert torch.allclose(chain(5)().tempered(0.4).pull(x), white / math.sqrt(0.4), atol=1e-6)


# -- the sampler, one place at a time ----------------------------------------------------------------------------------


def stepped(name: str, network: str) -> gm.Autoregressive:
    heads = {"categorical": Categorical(3), "gaussians": GaussianMixture(2), "sequence": Categorical(3)}
    options = {"eos": 1, "pad": -1} if name == "sequence" else {"order": [2, 0, 3, 1]}
    roughness = 0.2 if network == "transformer" else 0.4  # else next to nothing is left to chance
    return build(4, heads[name], network, roughness, context_features=1, **options)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["categorical", "gaussians", "sequence"])
def test_steps_add_up_to_the_density(name, network):
    model = stepped(name, network)
    law = model(torch.randn(2, 1, dtype=DOUBLE))
    steps = law.steps(50)
    places, total = [], 0
    for step in steps:
        places.append((step.place, step.variable))
        total = total + step.log_prob
        assert step.log_prob.shape == (50, 2)
    assert places == [(t + 1, int(v)) for t, v in enumerate(model.order)]
    assert steps.value.shape == (50, 2, 4) and law.support.check(steps.value).all()
    assert torch.allclose(steps.log_prob, law.log_prob(steps.value), rtol=1e-9, atol=1e-10)
    assert torch.allclose(total, steps.log_prob)
    assert list(steps) == []


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["categorical", "sequence"])
def test_steps_follow_the_law(name, network):
    model = stepped(name, network)
    law = model(torch.zeros(2, 1, dtype=DOUBLE) + torch.tensor([[-1.0], [1.0]], dtype=DOUBLE))
    x = everything(3, 3, 3, 3).to(torch.int64) if name == "categorical" else sequences(3, 4, 1, -1)
    p = law.log_prob(x[:, None]).exp()
    steps = law.steps(3000)
    for _ in steps:
        pass
    for i in range(2):
        assert_counts(counts_of(steps.value[:, i], x), p[:, i], f"context {i}")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["categorical", "sequence"])
def test_forks_and_looks_ahead(name, network):
    """After two places all particles become copies of one per member of the batch, and go on from its prefix."""
    model = stepped(name, network)
    law = model(torch.tensor([[-1.0], [1.0]], dtype=DOUBLE))
    x = everything(3, 3, 3, 3).to(torch.int64) if name == "categorical" else sequences(3, 4, 1, -1)
    p = law.log_prob(x[:, None]).exp()
    first = model.order[:2]
    steps = law.steps(3000)
    next(steps), next(steps)
    alive = (steps.value[..., first] != 1).all(-1)  # else there is nothing to come
    assert alive.any(0).all()
    ancestors = torch.stack([alive[:, i].nonzero().flatten()[-i] for i in range(2)])
    prefix = steps.value[ancestors, torch.arange(2)][:, first]
    before = steps.log_prob[ancestors, torch.arange(2)]
    steps.fork(ancestors.expand(3000, 2))
    assert torch.equal(steps.value[..., first], prefix.expand(3000, 2, 2))
    assert torch.equal(steps.log_prob, before.expand(3000, 2))
    state = torch.random.get_rng_state()
    look = steps.look_ahead()
    assert torch.equal(steps.value[..., first], prefix.expand(3000, 2, 2)) and torch.equal(
        steps.log_prob, before.expand(3000, 2)
    )
    torch.random.set_rng_state(state)
    rest = [step.place for step in steps]
    assert rest == [3, 4] and torch.equal(steps.value, look), "a look ahead is what would come"
    for i in range(2):
        fits = (x[:, first] == prefix[i]).all(-1)
        truth = p[:, i] * fits / (p[:, i] * fits).sum()
        assert (truth > 0).sum() > 1
        assert_counts(counts_of(steps.value[:, i], x), truth, f"member {i}")
    assert torch.allclose(steps.log_prob, law.log_prob(steps.value), rtol=1e-9)


def test_forked_particles_are_weighted_back_to_the_law():
    """Resampling by weights that are undone afterwards leaves every expectation as it is."""
    law = build(3, GaussianMixture(2), "transformer")()
    steps = law.steps(20000)
    next(steps)
    weights = torch.sigmoid(2 * steps.value[:, 0])
    ancestors = torch.multinomial(weights, 20000, replacement=True)
    undo = (1 / weights)[ancestors]
    steps.fork(ancestors)
    for _ in steps:
        pass
    plain = law.sample((20000,)).tanh()
    weighted = undo[:, None] * steps.value.tanh() * weights.mean()
    error = (weighted.var(0) / 5000 + plain.var(0) / 20000).sqrt()  # copies of one ancestor are worth less
    assert_mean(weighted, plain.mean(0), standard_error=error)


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_is_for_the_loss_alone(network):
    model = build(4, GaussianMixture(2), network, dropout=0.4).train()
    x = torch.randn(20, 4, dtype=DOUBLE)
    truth = model().log_prob(x)
    assert model.training
    noisy = [model.loss(x) for _ in range(2)]
    assert not torch.equal(*noisy) and noisy[0].requires_grad
    assert torch.equal(model().log_prob(x), truth) and torch.equal(model.eval()().log_prob(x), truth)
    assert torch.equal(model.loss(x), -truth) and torch.equal(model.loss(x), -truth)
    model.train()
    torch.manual_seed(1)
    first = model().sample((3,))
    torch.manual_seed(1)
    assert torch.equal(model().sample((3,)), first)
    assert torch.allclose(model().push(model().pull(x)), x, rtol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 2)])
def test_images_are_read_row_by_row(shape):
    model = build(shape, DiscretizedLogisticMixture(4, 2))
    flat = build(math.prod(shape), DiscretizedLogisticMixture(4, 2))
    flat.load_state_dict(model.state_dict())
    x = model().sample((7,))
    assert x.shape == (7, *shape)
    assert torch.equal(model().log_prob(x), flat().log_prob(x.flatten(1)))
    assert model().rosenblatt(x).shape == (7, math.prod(shape))
    last = x.flatten(1).clone()
    last[:, -1] = (last[:, -1] + 1) % 4
    k = math.prod(shape) - 1
    assert torch.equal(model().log_prob_prefix(x, k), model().log_prob_prefix(last.reshape(x.shape), k))
    seen = torch.ones(shape, dtype=torch.bool)
    seen[..., -1] = False
    filled = model().impute(x, seen, num_samples=2, num_particles=10)
    assert filled.values.shape == (2, 7, *shape) and torch.equal(filled.values[..., :-1], torch.stack([x, x])[..., :-1])


# -- imputation at its edges -------------------------------------------------------------------------------------------


def test_what_no_particle_can_have_made_has_no_evidence_and_no_particles():
    """An observation so far out that its density is zero in double precision, next to one that is ordinary."""
    law = build(3, GaussianMixture(2), "made", 0.2)()
    x = torch.tensor([[0.0, 1e200, 0.0], [0.0, 0.3, 0.0]], dtype=DOUBLE)
    found = law.impute(x, torch.tensor([False, True, False]), num_samples=4, num_particles=500)
    assert found.log_evidence[0] == -math.inf and found.ess[0] == 0
    assert found.log_evidence[1].isfinite() and 1 < found.ess[1] <= 500
    assert (found.values[:, 0, 1] == 1e200).all() and found.values[:, 1].isfinite().all()


def test_gaps_at_the_end_are_exact_and_cost_no_particles(monkeypatch):
    law = build(4, GaussianMixture(2), "made", 0.2)()
    x = law.sample((3,))
    rows = []
    monkeypatch.setattr(completion, "Walk", lambda model, like, c: rows.append(len(like)) or Walk(model, like, c))
    found = law.impute(x, torch.tensor([True, True, False, False]), num_samples=5)
    assert rows == [15] and bool((found.ess == math.inf).all())
    assert torch.allclose(found.log_evidence, law.log_prob_prefix(x, 2))
    law.impute(x, torch.tensor([True, False, True, False]), num_samples=5)
    assert rows[1:] == [3 * 256]


def test_copies_of_a_law_impute_independently():
    law = build(3, GaussianMixture(2), "made", 0.2)().expand([4])
    found = law.impute(torch.zeros(3, dtype=DOUBLE), torch.tensor([True, False, False]), num_samples=2)
    assert found.values.shape == (2, 4, 3) and found.log_evidence.shape == (4,)
    assert len(found.values[..., 1].flatten().unique()) == 8


def test_draws_after_a_prefix_keep_it_to_the_last_digit():
    """Without gradients the prefix is put in as it is; with them it passes through its noise."""
    law = build(4, LogisticMixture(3), "made", 0.3)()
    rest = law.condition(law.sample()[:2])
    z = rest.base.sample((50,))
    with torch.no_grad():
        by_walk = rest.push(z)
    assert torch.allclose(by_walk, rest.push(z), rtol=1e-8, atol=1e-10) and rest.push(z).requires_grad


def test_second_derivatives_of_draws():
    """A push of one linear Gaussian column given another: its Hessian in the noise is zero, in the slope it is not."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.7, dtype=DOUBLE))

        def forward(self, entries, context=None):
            mean = torch.nn.functional.pad(self.slope.square() * entries[:, :-1], (0, 0, 1, 0))
            return torch.cat([torch.zeros_like(mean), mean, torch.zeros_like(mean)], -1)

    network = Linear()
    law, z = gm.Autoregressive(2, GaussianMixture(1), network)(), torch.tensor([1.3, -0.4], dtype=DOUBLE)
    (first,) = torch.autograd.grad(law.push(z)[1], network.slope, create_graph=True)
    assert float(first) == pytest.approx(2 * 0.7 * 1.3)  # x_2 = slope^2 z_1 + z_2
    (second,) = torch.autograd.grad(first, network.slope)
    assert float(second) == pytest.approx(2 * 1.3)
