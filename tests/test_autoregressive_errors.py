"""What an autoregressive model refuses: the right class, and words for the argument, what was got, and the remedy."""

from __future__ import annotations

import math
import re

import jaxtyping
import pytest
import torch
from torch import nn
from torch.distributions import constraints

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
)
from pyro_genmods.foundation.errors import DataError, DensityError, PlacementError, ShapeError, SupportError

NAN, INF = math.nan, math.inf


def refused(action, error, *words):
    """The action raises exactly this class, and says every word (regular expressions)."""
    with pytest.raises(error) as caught:
        action()
    assert caught.type is error, f"{caught.type.__name__}: {caught.value}"
    message = str(caught.value)
    missing = [word for word in words if not re.search(word, message)]
    assert not missing, f"{missing} not in: {message}"


class Peek(nn.Module):
    """Sees the entry whose parameters it gives."""

    def __init__(self, size=3):
        super().__init__()
        self.linear = nn.Linear(1, size)

    def forward(self, entries, context=None):
        return self.linear(entries)


class Blend(nn.Module):
    """Causal, but rows depend on each other."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, entries, context=None):
        before = nn.functional.pad(entries[:, :-1], (0, 0, 1, 0))
        return self.linear(before - before.mean(0))


class Constant(nn.Module):
    """Parameters of independent entries, in a shape of one's choice."""

    def __init__(self, *shape):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(*shape))

    def forward(self, entries, context=None):
        return self.theta.expand(len(entries), *self.theta.shape)


AR = gm.Autoregressive
CONSTRUCTORS = {
    "no-size": (lambda: AR(), ShapeError, "features=None", "max_length=None", "give one"),
    "two-sizes": (lambda: AR(3, max_length=3), ShapeError, "features=3", "max_length=3", "give one"),
    "zero-features": (lambda: AR(0), ShapeError, "features", "got 0", "positive"),
    "negative-features": (lambda: AR(-2), ShapeError, "features", "got -2", "positive"),
    "fraction": (lambda: AR(2.5), ShapeError, "features", r"got 2\.5", "positive"),
    "empty-shape": (lambda: AR(()), ShapeError, "features", r"got \(\)", "positive"),
    "zero-in-shape": (lambda: AR((3, 0)), ShapeError, "features", r"got \(3, 0\)", "positive"),
    "conditional-string": (lambda: AR(3, "gaussian"), TypeError, "conditional", "got str", "needs"),
    "conditional-number": (lambda: AR(3, 5), TypeError, "conditional", "got int", "needs"),
    "conditional-class": (lambda: AR(3, Bernoulli), TypeError, "conditional", "needs"),
    "unknown-network": (lambda: AR(3, network="lstm"), TypeError, "network", "'lstm'", "made.*transformer.*gru"),
    "heads-of-made": (lambda: AR(3, heads=2), TypeError, "network", "made", "heads"),
    "heads-of-gru": (lambda: AR(3, network="gru", heads=2), TypeError, "network", "gru", "heads"),
    "width-of-own": (lambda: AR(3, GaussianMixture(1), Constant(3, 3), width=8), TypeError, "width", "network"),
    "width-and-heads": (lambda: AR(3, network="transformer", width=9, heads=2), ValueError, "width", "heads", "9"),
    "zero-width": (lambda: AR(3, width=0), ValueError, "width", "0"),
    "negative-layers": (lambda: AR(3, layers=-1), ValueError, "layers", "-1"),
    "dropout": (lambda: AR(3, dropout=1.5), ValueError, "dropout", r"1\.5"),
    "sampling": (lambda: AR(3, sampling="fast"), ValueError, "sampling", "'fast'", "jacobi"),
    "support-of-bits": (lambda: AR(3, Bernoulli(), support=constraints.boolean), ValueError, "support", "leave it out"),
    "support-of-mixed": (
        lambda: AR(2, Mixed((Bernoulli(), GaussianMixture(1))), support=constraints.positive),
        ValueError,
        "support",
        "leave it out",
    ),
    "support-without-bijection": (lambda: AR(3, support=constraints.integer_interval(0, 3)), SupportError, "support"),
    "columns": (lambda: AR(3, Mixed((Bernoulli(), Bernoulli()))), ShapeError, "conditional", "2 columns", r"\(3,\)"),
    "columns-of-image": (lambda: AR((2, 1), Mixed((Bernoulli(), Bernoulli()))), ShapeError, "conditional", "vector"),
    "order-length": (lambda: AR(3, order=[0, 1]), ShapeError, "order", r"got \[0, 1\]", "permutation"),
    "order-repeated": (lambda: AR(3, order=[0, 1, 1]), ShapeError, "order", r"\[0, 1, 1\]", "permutation"),
    "order-from-one": (lambda: AR(3, order=[1, 2, 3]), ShapeError, "order", r"\[1, 2, 3\]", "permutation of 0"),
    "order-floats": (lambda: AR(3, order=[0.0, 1.0, 2.0]), ShapeError, "order", "permutation"),
    "order-word": (lambda: AR(3, order="reverse"), ValueError, "order", "'reverse'", "random"),
    "orders-zero": (lambda: AR(3, orders=0), ValueError, "orders", "got 0", "at least 1"),
    "orders-negative": (lambda: AR(3, orders=-3), ValueError, "orders", "got -3", "at least 1"),
    "orders-fraction": (lambda: AR(3, orders=2.0), ValueError, "orders", r"got 2\.0", "at least 1"),
    "eos-outside": (lambda: AR(None, Categorical(3), max_length=4, eos=3), ValueError, "eos", "got 3", "0 to 2"),
    "eos-negative": (lambda: AR(None, Categorical(3), max_length=4, eos=-1), ValueError, "eos", "got -1", "0 to 2"),
    "eos-of-numbers": (lambda: AR(4, LogisticMixture(2), eos=0), ValueError, "eos", "Categorical", "LogisticMixture"),
    "eos-of-image": (lambda: AR((2, 2), Categorical(3), eos=0), ValueError, "eos", "vectors", r"\(2, 2\)"),
    "eos-and-order": (lambda: AR(4, Categorical(3), eos=0, order=[3, 2, 1, 0]), ValueError, "eos", "orders"),
    "eos-and-orders": (lambda: AR(4, Categorical(3), eos=0, orders=2), ValueError, "eos", "orders"),
    "eos-and-orderless": (lambda: AR(4, Categorical(3), eos=0, orderless=True), ValueError, "eos", "orders"),
    "pad-is-token": (lambda: AR(4, Categorical(3), eos=0, pad=2), ValueError, "pad", "got 2", "token", r"eos=0"),
    "pad-without-eos": (lambda: AR(4, Categorical(3), pad=3), ValueError, "pad", "eos"),
    "own-not-causal": (
        lambda: AR(3, GaussianMixture(1), Peek()),
        ValueError,
        "network",
        "entry 0 depends on entry 0",
        "shift",
    ),
    "own-mixes-rows": (lambda: AR(3, GaussianMixture(1), Blend()), ValueError, "network", "another row"),
    "own-outputs": (lambda: AR(3, GaussianMixture(2), Peek()), ShapeError, "network", r"\(3, 3, 3\)", r"\(3, 3, 6\)"),
    "own-length": (lambda: AR(3, GaussianMixture(1), Constant(4, 3)), ShapeError, "network", r"\(3, 4, 3\)"),
    "own-and-orders": (lambda: AR(3, GaussianMixture(1), Constant(3, 3), orders=2), ValueError, "orders", "own"),
    "own-and-orderless": (
        lambda: AR(3, GaussianMixture(1), Constant(3, 3), orderless=True),
        ValueError,
        "order",
        "own",
    ),
    "context-features": (lambda: AR(3, context_features=-1), ValueError, "context_features", "-1"),
    "categories": (lambda: AR(3, Categorical(0)), ValueError, "k", "got 0", "at least 1"),
    "components": (lambda: AR(3, GaussianMixture(0)), ValueError, "k", "got 0", "at least 1"),
    "levels": (lambda: AR(3, DiscretizedLogisticMixture(1, 2)), ValueError, "levels", "got 1", "at least 2"),
    "bins": (lambda: AR(3, Spline(0)), ValueError, "bins", "got 0", "at least 1"),
    "degrees": (lambda: AR(3, StudentMixture(1, 7)), ValueError, "degrees_of_freedom", "got 7", "LogisticMixture"),
    "no-columns": (lambda: AR(3, Mixed(())), ValueError, "conditionals", "none"),
    "mixed-in-mixed": (lambda: AR(1, Mixed((Mixed((Bernoulli(),)),))), TypeError, "conditionals", "column"),
}


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Without the import hook of the tests, which would refuse ill-typed arguments with words of its own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name, as_users_run_it):
    refused(*CONSTRUCTORS[name])


def tokens():
    return AR(3, Categorical(3), width=8)


def words(pad=None):
    return AR(3, Categorical(3), width=8, eos=0, pad=pad)


def numbers(**options):
    return AR(3, GaussianMixture(2), width=8, **options)


def fractions():
    return AR(2, GaussianMixture(1), width=8, support=constraints.unit_interval)


def T(*values):
    return torch.tensor(values)


VALUES = {
    "token-too-large": (lambda: tokens()().log_prob(T(0, 3, 1)), SupportError, "value", "3", "support"),
    "token-negative": (lambda: tokens()().log_prob(T(0, -1, 1)), SupportError, "value", "-1", "support"),
    "token-fraction": (lambda: tokens()().log_prob(T(0.0, 0.5, 1.0)), SupportError, "value", r"0\.5", "support"),
    "token-nan": (lambda: tokens()().log_prob(T(0.0, NAN, 1.0)), SupportError, "value", "nan", "support"),
    "after-eos": (lambda: words()().log_prob(T(1, 0, 2)), SupportError, "value", "Sequences", r"eos=0"),
    "not-padded": (lambda: words(-1)().log_prob(T(1, 0, 0)), SupportError, "value", "Sequences", r"pad=-1"),
    "pad-too-early": (lambda: words(-1)().log_prob(T(1, -1, -1)), SupportError, "value", "Sequences", r"pad=-1"),
    "bit": (lambda: AR(2, Bernoulli())().log_prob(T(0.0, 2.0)), SupportError, "value", r"2\.0", "support"),
    "level": (
        lambda: AR(2, DiscretizedLogisticMixture(4, 1))().log_prob(T(4.0, 0.0)),
        SupportError,
        "value",
        r"4\.0",
        "support",
    ),
    "column": (
        lambda: AR(2, Mixed((GaussianMixture(1), Bernoulli())))().log_prob(T(1.0, 0.3)),
        SupportError,
        "value",
        r"0\.3",
        "Columns",
    ),
    "number-nan": (lambda: numbers()().log_prob(T(0.0, NAN, 1.0)), SupportError, "value", "NaN", "correct the data"),
    "fraction-outside": (lambda: fractions()().log_prob(T(0.5, 1.5)), SupportError, "value", r"1\.5", "support"),
    "event-shape": (lambda: numbers()().log_prob(torch.zeros(5, 4)), ShapeError, "value", r"\(5, 4\)", r"lead, 3"),
    "dtype": (lambda: numbers()().log_prob(torch.zeros(3).double()), PlacementError, "value", "float64", r"\.to\("),
    "no-context": (lambda: numbers(context_features=2)(), ShapeError, "context", "conditional", r"batch, 2"),
    "a-context": (lambda: numbers()(torch.zeros(2)), ShapeError, "context", "unconditional", "leave it out"),
    "wide-context": (lambda: numbers(context_features=2)(torch.zeros(5, 3)), ShapeError, "context", r"\(5, 3\)"),
    "broadcast": (
        lambda: numbers(context_features=1)(torch.zeros(4, 1)).log_prob(torch.zeros(5, 3)),
        ShapeError,
        "value",
        r"\(5,\)",
        r"\(4,\)",
    ),
    "rosenblatt-nan": (lambda: numbers()().rosenblatt(T(0.0, NAN, 1.0)), SupportError, "value", "NaN"),
    "rosenblatt-token": (lambda: tokens()().rosenblatt(T(0, 3, 1)), SupportError, "value", "support"),
    "rosenblatt-noise": (lambda: tokens()().rosenblatt(T(0, 2, 1), torch.rand(4)), ShapeError, "v", r"\(4,\)"),
    "rosenblatt-noise-outside": (
        lambda: tokens()().rosenblatt(T(0, 2, 1), T(0.5, 1.5, 0.5)),
        SupportError,
        "v",
        r"1\.5",
        r"\(0, 1\)",
    ),
    "u-zero": (lambda: numbers()().inverse_rosenblatt(T(0.5, 0.0, 0.5)), SupportError, "u", r"\[0\.0", "clamp"),
    "u-one": (lambda: tokens()().inverse_rosenblatt(T(0.5, 1.0, 0.5)), SupportError, "u", r"\[1\.0", "clamp"),
    "u-outside": (lambda: numbers()().inverse_rosenblatt(T(0.5, -2.0, 3.0)), SupportError, "u", "2 entries", "clamp"),
    "u-nan": (lambda: numbers()().inverse_rosenblatt(T(0.5, NAN, 0.5)), SupportError, "u", "nan", "clamp"),
    "u-shape": (lambda: numbers()().inverse_rosenblatt(torch.full((4,), 0.5)), ShapeError, r"\(4,\)", r"lead, 3"),
    "u-method": (
        lambda: numbers()().inverse_rosenblatt(T(0.5, 0.5, 0.5), "fast"),
        ValueError,
        "method",
        "'fast'",
        "jacobi",
    ),
    "k-negative": (lambda: numbers()().log_prob_prefix(torch.zeros(3), -1), ShapeError, "k", "got -1", "0 to 3"),
    "k-large": (lambda: numbers()().log_prob_prefix(torch.zeros(3), 4), ShapeError, "k", "got 4", "0 to 3"),
    "prefix-value-shape": (lambda: numbers()().log_prob_prefix(torch.zeros(2), 1), ShapeError, "value", r"lead, 3"),
    "prefix-nan": (lambda: numbers()().condition(T(0.5, NAN)), ShapeError, "prefix", "finite", "impute"),
    "prefix-infinite": (lambda: numbers()().condition(T(0.5, INF)), ShapeError, "prefix", "finite"),
    "prefix-whole": (lambda: numbers()().condition(torch.zeros(3)), ShapeError, "prefix", r"\(3,\)", "0 < k < 3"),
    "prefix-long": (lambda: numbers()().condition(torch.zeros(2, 5)), ShapeError, "prefix", r"\(2, 5\)", "0 < k < 3"),
    "prefix-empty": (lambda: numbers()().condition(torch.zeros(0)), ShapeError, "prefix", r"\(0,\)", "0 < k < 3"),
    "prefix-scalar": (lambda: numbers()().condition(torch.tensor(1.0)), ShapeError, "prefix", r"\(\)", "0 < k < 3"),
    "prefix-token": (lambda: tokens()().condition(T(0, 7)), SupportError, "prefix", "7"),
    "prefix-fraction": (lambda: tokens()().condition(T(0.0, 0.5)), SupportError, "prefix", r"0\.5"),
    "prefix-outside": (lambda: fractions()().condition(T(-0.5)), SupportError, "prefix", r"-0\.5"),
    "prefix-after-eos": (lambda: words()().condition(T(0, 2)), SupportError, "prefix", "2"),
    "rest-after-eos": (lambda: words(-1)().condition(T(0)).log_prob(T(-1, 2)), SupportError, "value", "Sequences"),
    "impute-words": (
        lambda: words()().impute(T(1, 2, 1), T(True, False, True)),
        DensityError,
        "impute",
        "length",
        r"condition\(prefix\)",
    ),
    "impute-samples": (
        lambda: numbers()().impute(torch.zeros(3), T(True, False, True), num_samples=0),
        ValueError,
        "num_samples",
        "got 0",
    ),
    "impute-particles": (
        lambda: numbers()().impute(torch.zeros(3), T(True, False, True), num_particles=0),
        ValueError,
        "num_particles",
        "got 0",
    ),
    "impute-mask-shape": (
        lambda: numbers()().impute(torch.zeros(3), T(True, False)),
        ShapeError,
        "observed",
        r"\(2,\)",
        r"\(3,\)",
    ),
    "impute-event-shape": (
        lambda: numbers()().impute(torch.zeros(4), T(True, False, True, True)),
        ShapeError,
        r"\(4,\)",
        r"lead, 3",
    ),
    "impute-nan": (lambda: numbers()().impute(T(0.0, 1.0, NAN), T(True, False, True)), SupportError, "NaN|nan"),
    "impute-nan-orderless": (
        lambda: numbers(orderless=True)().impute(T(0.0, 1.0, NAN), T(True, False, True)),
        SupportError,
        "NaN|nan",
    ),
    "impute-outside": (lambda: fractions()().impute(T(1.5, 0.5), T(True, False)), SupportError, r"1\.5"),
    "impute-token": (lambda: tokens()().impute(T(0, 7, 1), T(True, True, False)), SupportError, "7"),
    "enumerate-large": (
        lambda: AR(40, Bernoulli(), width=8)().enumerate_support(),
        DensityError,
        r"1\.1e\+12",
        "4096",
        "sample",
    ),
    "enumerate-numbers": (lambda: numbers()().enumerate_support(), DensityError, "continuous", "sample"),
    "entropy-samples": (lambda: numbers()().entropy(num_samples=0), ValueError, "num_samples", "got 0"),
    "rsample-tokens": (lambda: tokens()().rsample(), DensityError, "pathwise", r"sample\(\)", "score-function|SVI"),
    "pull-tokens": (lambda: tokens()().pull(T(0, 1, 2)), DensityError, "discrete", "rosenblatt"),
    "pull-mixed": (
        lambda: AR(2, Mixed((Bernoulli(), GaussianMixture(1))))().pull(T(0.0, 1.0)),
        DensityError,
        "discrete",
        "rosenblatt",
    ),
    "temperature-zero": (lambda: tokens()().tempered(0.0), ValueError, "temperature", r"got 0\.0", "positive"),
    "temperature-negative": (lambda: tokens()().tempered(-1.0), ValueError, "temperature", r"got -1\.0", "positive"),
    "temperature-nan": (lambda: numbers()().tempered(NAN), ValueError, "temperature", "got nan", "positive"),
    "temperature-infinite": (lambda: numbers()().tempered(INF), ValueError, "temperature", "got inf", "positive"),
    "no-steps": (lambda: tokens()().steps(0), ValueError, "n", "got 0", "at least one"),
    "fork-shape": (lambda: tokens()().steps(5).fork(torch.zeros(4).long()), ShapeError, "ancestors", r"\(4,\)", "5"),
    "fork-outside": (lambda: tokens()().steps(5).fork(T(0, 1, 2, 3, 9)), (IndexError), "9|out of range"),
    "fork-floats": (lambda: tokens()().steps(2).fork(T(0.0, 1.0)), ShapeError, "ancestors", "float"),
    "method": (lambda: numbers().sampled_by("fast"), ValueError, "method", "'fast'", "jacobi"),
    "under-repeated": (
        lambda: numbers(orderless=True).under(T(0, 0, 1)),
        ShapeError,
        "order",
        r"\[0, 0, 1\]",
        "permutation",
    ),
    "under-short": (lambda: numbers(orderless=True).under(T(0, 1)), ShapeError, "order", r"\[0, 1\]", "permutation"),
    "under-untrained": (lambda: numbers().under(T(2, 1, 0)), DensityError, "order", "orderless"),
    "constant-column": (
        lambda: numbers().standardize(torch.tensor([[0.0, 1, 2], [0.0, 3, 4]])),
        DataError,
        r"\[0\]",
        "constant",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    refused(*VALUES[name])


X = torch.zeros(3)
ENSEMBLE = {
    "push": lambda law: law.push(X),
    "pull": lambda law: law.pull(X),
    "base": lambda law: law.base,
    "rsample": lambda law: law.rsample(),
    "rsample_and_log_prob": lambda law: law.rsample_and_log_prob(),
    "rosenblatt": lambda law: law.rosenblatt(X),
    "inverse_rosenblatt": lambda law: law.inverse_rosenblatt(X + 0.5),
    "log_prob_prefix": lambda law: law.log_prob_prefix(X, 2),
    "condition": lambda law: law.condition(X[:2]),
    "steps": lambda law: law.steps(3),
}


@pytest.mark.parametrize("name", ENSEMBLE)
def test_what_an_ensemble_is_not(name):
    words = ("pathwise",) if name.startswith("rsample") else ("2 orders", "under")
    refused(lambda: ENSEMBLE[name](numbers(orders=2)()), DensityError, *words)


def test_an_ensemble_without_order_cannot_impute_under_one():
    refused(
        lambda: numbers(orders=2)().impute(X, T(True, False, True)),
        DensityError,
        "2 orders",
        "under",
    )
    found = numbers(orders=2, orderless=True)().impute(X, T(True, False, True))
    assert found.ess == INF


def test_without_validation_outside_is_minus_infinity():
    """Never the density of another event."""
    for law, values in (
        (tokens()(), [T(0, 3, 1), T(0, -1, 1), T(0.0, 0.5, 1.0)]),
        (words()(), [T(1, 0, 2)]),
        (words(-1)(), [T(1, 0, 0), T(1, -1, -1)]),
        (fractions()(), [T(0.5, 1.5)]),
        (AR(2, Mixed((GaussianMixture(1), Bernoulli())))(), [T(0.5, 0.5)]),
    ):
        law._validate_args = False
        for value in values:
            assert law.log_prob(value) == -INF
            assert law.log_prob_prefix(value, law.event_shape[0]) == -INF
    law = numbers()()
    law._validate_args = False
    assert law.log_prob(T(0.0, NAN, 1.0)).isnan()


def test_no_value_for_noise_that_is_none():
    z = torch.tensor([[0.0, NAN, 0.0], [0.0, INF, 0.0], [0.0, 1.0, 0.0]])
    found = numbers()().push(z)
    assert found[:2].isnan().all() and found[2].isfinite().all()
