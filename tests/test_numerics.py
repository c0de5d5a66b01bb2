"""Truth of the cellar: roots against closed forms, their gradients, the shared network helpers; and of the judges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal

from pyro_genmods.foundation.networks import detached_copy, place_of, zero_output_layer
from pyro_genmods.foundation.numerics import bracket_root, chandrupatla, implicit_gradient, invert_monotone
from pyro_genmods.foundation.objectives import negative_log_likelihood

from . import statistics

DOUBLE = torch.float64


def cubic(a: float, b: float):
    """``x -> x**3 / 3 + a x + b``, increasing for ``a > 0``."""
    return lambda x: x**3 / 3 + a * x + b


def cardano(y: Tensor, a: float, b: float) -> Tensor:
    """The root of the increasing cubic, ``2 sqrt(a) sinh(asinh(3 (y - b) / (2 a^(3/2))) / 3)``."""
    return 2 * a**0.5 * torch.sinh(torch.asinh(3 * (y - b) / (2 * a**1.5)) / 3)


def mixture_cdf(logits: Tensor, loc: Tensor, scale: Tensor):
    weights = logits.softmax(-1)
    return lambda x: (weights * Normal(loc, scale, validate_args=False).cdf(x[..., None])).sum(-1)


class Counted:
    """A function that counts its evaluations."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.f(x)


# -- roots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "inverse", "reach"),
    [
        (torch.sinh, torch.asinh, 1e8),
        (torch.expm1, torch.log1p, 1e8),
        (lambda x: x, lambda y: y, 1e3),
        (cubic(1e-3, 2.0), lambda y: cardano(y, 1e-3, 2.0), 1e6),
        (torch.atan, torch.tan, 1.5),
        (lambda x: torch.where(x < 0, x, 1e6 * x), lambda y: torch.where(y < 0, y, 1e-6 * y), 1e3),
    ],
    ids=["sinh", "expm1", "identity", "cubic", "atan", "kink"],
)
def test_roots_equal_closed_forms(f, inverse, reach):
    y = torch.cat([torch.linspace(-0.9, reach, 501, dtype=DOUBLE), torch.logspace(-12, 0, 25, dtype=DOUBLE)])
    x = invert_monotone(f, y, bound=10.0)
    assert torch.allclose(x, inverse(y), rtol=1e-12, atol=1e-14)
    single = invert_monotone(f, y.float(), bound=10.0)
    assert single.dtype is torch.float32 and torch.allclose(f(single), y.float(), rtol=1e-5, atol=1e-6)


def test_no_miss_on_twenty_thousand_mixtures():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20_000, 8, generator=generator, dtype=DOUBLE)  # noqa: E731
    f = Counted(mixture_cdf(draw(), 3 * draw(), (0.7 * draw()).exp()))
    u = torch.rand(20_000, generator=generator, dtype=DOUBLE)
    lower, upper = bracket_root(f, u, torch.full_like(u, -10.0), torch.full_like(u, 10.0))
    for iterations in (16, 60):  # 16 are enough, and further ones do no harm
        f.calls = 0
        x = chandrupatla(f, u, lower, upper, iterations)
        assert ((f(x) - u).abs() < 1e-12).all()
        assert f.calls < 30, "bisection takes about 46"


def test_bracket_holds_the_root_and_stays_where_it_does():
    y = torch.tensor([0.5, 1e4, -1e4], dtype=DOUBLE)
    start = torch.ones_like(y)
    lower, upper = bracket_root(torch.sinh, y, -start, start)
    assert lower[0] == -1 and upper[0] == 1
    assert (torch.sinh(lower) <= y).all() and (torch.sinh(upper) >= y).all()
    assert torch.equal(lower[1], torch.tensor(-1.0, dtype=DOUBLE)), "only the end that is wrong moves"


@pytest.mark.parametrize("bound", [1.0, 10.0])
def test_no_bracket_is_nan_and_spoils_no_neighbour(bound):
    y = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, math.nan, math.inf], dtype=DOUBLE)
    x = invert_monotone(torch.tanh, y, bound)
    assert x.isnan().tolist() == [True, False, False, False, True, True, True]
    assert torch.allclose(x[1:4], torch.atanh(y[1:4]), rtol=1e-12, atol=1e-15)


def test_doublings_limit_the_search():
    y = torch.tensor([100.0], dtype=DOUBLE)
    start = torch.ones_like(y)
    assert bracket_root(lambda x: x, y, -start, start, doublings=3)[0].isnan().all()
    assert bracket_root(lambda x: x, y, -start, start, doublings=7)[1].item() == 128.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    a=st.floats(1e-3, 1e3),
    b=st.floats(-1e3, 1e3),
    y=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    bound=st.floats(1.0, 1e3),
)
def test_monotone_cubics(a, b, y, bound):
    target = torch.tensor(y, dtype=DOUBLE)
    x = invert_monotone(cubic(a, b), target, bound)
    truth = cardano(target, a, b)
    rounding = 1e-15 * (target.abs() + abs(b)) / (truth**2 + a)  # of y - b, in units of x
    assert ((x - truth).abs() <= 1e-11 * truth.abs() + 100 * rounding + 1e-30).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(a=st.floats(1e-2, 10.0), b=st.floats(-5.0, 5.0), y=st.floats(-1e3, 1e3))
def test_implicit_gradient_of_cubics(a, b, y):
    """``dx = (dy - x da - db) / (x^2 + a)``."""
    y, a, b = (torch.tensor([v], dtype=DOUBLE, requires_grad=True) for v in (y, a, b))
    x = invert_monotone(lambda t: t**3 / 3 + a * t + b, y, bound=10.0)
    gradients = torch.cat(torch.autograd.grad(x, (y, a, b)))
    slope = 1 / (x.detach() ** 2 + a.detach())
    assert torch.allclose(
        gradients, slope * torch.cat([torch.ones(1, dtype=DOUBLE), -x.detach(), -torch.ones(1)]), rtol=1e-9
    )


def test_implicit_gradient_equals_finite_differences_on_mixtures():
    generator = torch.Generator().manual_seed(1)
    logits, loc, scale = (torch.randn(6, 3, generator=generator, dtype=DOUBLE) for _ in range(3))
    u = torch.rand(6, generator=generator, dtype=DOUBLE)

    def quantile(logits, loc, log_scale, u):
        return invert_monotone(mixture_cdf(logits, loc, log_scale.exp()), u, bound=10.0)

    inputs = tuple(t.requires_grad_() for t in (logits, loc, scale, u))
    assert torch.autograd.gradcheck(quantile, inputs, eps=1e-6, atol=1e-6)


def test_gradient_costs_no_memory_of_the_iteration():
    y = torch.tensor([3.0], dtype=DOUBLE, requires_grad=True)
    f = Counted(torch.sinh)
    x = implicit_gradient(f, torch.asinh(y.detach()), y)
    assert f.calls == 2 and torch.equal(x.detach(), torch.asinh(y.detach()))
    with torch.no_grad():
        assert not invert_monotone(torch.sinh, y, 1.0).requires_grad


def test_an_iteration_limit_is_a_limit():
    f = Counted(
        mixture_cdf(torch.zeros(3, dtype=DOUBLE), torch.tensor([-9.0, 0, 9], dtype=DOUBLE), torch.ones(3) * 0.1)
    )
    y = torch.full((1,), 0.4, dtype=DOUBLE)
    chandrupatla(f, y, torch.full_like(y, -10), torch.full_like(y, 10), iterations=5)
    assert f.calls == 7


# -- networks and objectives ------------------------------------------------------------------------------------------


def test_zero_output_layer_touches_only_the_last_layer():
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    first = network[0].weight.clone()
    assert zero_output_layer(network) is True
    assert torch.equal(network[0].weight, first) and not network(torch.randn(7, 2)).any()
    assert zero_output_layer(nn.Tanh()) is False


def test_place_of_falls_back_to_buffers_and_defaults():
    buffered = nn.Module()
    buffered.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    assert place_of(buffered)[0] is torch.get_default_dtype()
    buffered.register_buffer("shift", torch.zeros(1, dtype=torch.float16))
    assert place_of(buffered)[0] is torch.float16
    assert place_of(nn.Linear(1, 1, device="meta"))[1].type == "meta"


def test_detached_copy_follows_values_and_stops_gradients():
    network = nn.Linear(2, 2)
    twin = detached_copy(network)
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(twin(x), network(x))
    twin(x).sum().backward()
    assert x.grad is not None and network.weight.grad is None
    with torch.no_grad():
        network.weight.mul_(2)
    assert torch.equal(twin(x), network(x)), "the copy shares memory"


def test_negative_log_likelihood_is_the_cross_entropy():
    x = Normal(1.0, 2.0).sample((20_000,)).double()
    loss = negative_log_likelihood(Normal(0.0, 1.0).log_prob(x))
    statistics.assert_mean(loss, 0.5 * math.log(2 * math.pi) + 0.5 * (4 + 1))


# -- the judges are judged: they pass the truth and fail a lie --------------------------------------------------------

LIE = pytest.raises(AssertionError, match="below the threshold")


def test_judges_pass_the_truth_and_fail_a_lie():
    x = torch.randn(4000, 2, dtype=DOUBLE)
    normal = Normal(torch.zeros((), dtype=DOUBLE), 1.0)
    statistics.assert_mean(x, torch.zeros(2))
    statistics.assert_law(x, normal.cdf)
    statistics.assert_uniform(normal.cdf(x))
    statistics.assert_same_law(x, torch.randn(5000, 2))
    with LIE:
        statistics.assert_mean(x, torch.tensor([0.0, 0.15]))
    with LIE:
        statistics.assert_law(x, Normal(0.0, 1.4).cdf)
    with LIE:
        statistics.assert_same_law(x, 0.7 * torch.randn(5000, 2))
    with LIE:  # both columns uniform, but dependent
        statistics.assert_uniform(normal.cdf(torch.stack([x[:, 0], 0.8 * x[:, 0] + 0.6 * x[:, 1]], 1)))


def test_counts_are_judged_with_rare_cells_pooled():
    probabilities = torch.tensor([0.5, 0.3, 0.1999, 0.0001], dtype=DOUBLE)
    counts = torch.multinomial(probabilities, 5000, replacement=True).bincount(minlength=4)
    statistics.assert_counts(counts, probabilities)
    with LIE:
        statistics.assert_counts(counts + torch.tensor([0, 400, 0, 0]), probabilities)
    with LIE:
        statistics.assert_counts(counts + torch.tensor([0, 0, 0, 20]), probabilities)
    with LIE:  # draws outside of all cells
        statistics.assert_counts(torch.cat([counts, torch.tensor([200])]), probabilities)


def test_error_of_a_chain_counts_its_dependence():
    noise = torch.randn(4, 4000, dtype=DOUBLE)
    chain = torch.zeros_like(noise)
    for t in range(1, 4000):
        chain[:, t] = 0.9 * chain[:, t - 1] + noise[:, t]
    error = statistics.chain_standard_error(chain[..., None])
    truth = math.sqrt(1 / (1 - 0.9) ** 2 / noise.numel())
    assert abs(float(error) / truth - 1) < 0.25
    statistics.assert_mean(chain.flatten(), 0.0, standard_error=error)
