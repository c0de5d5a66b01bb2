"""Ensembles, continuous mixtures and exposure bias against sums that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyro_genmods as gm
from pyro_genmods.factorize import (
    Bernoulli,
    Categorical,
    ContinuousMixture,
    Ensemble,
    GaussianMixture,
    Mixed,
    entropy_drift,
    exposure_bias,
)
from pyro_genmods.foundation.errors import DensityError, ShapeError

from .statistics import assert_mean

LENGTH, STATES = 12, 4


class Chain(nn.Module):
    """A Markov chain as a causal network: logits of the first state, and of the next given the last."""

    def __init__(self, first, logits):
        super().__init__()
        self.first, self.logits = nn.Parameter(first), nn.Parameter(logits)

    def forward(self, tokens, context=None):
        return torch.cat([self.first.expand(len(tokens), 1, -1), self.logits[tokens[:, :-1]]], 1)


def chain(seed, like=None, noise=0.7):
    generator = torch.Generator().manual_seed(seed)
    logits = noise * torch.randn(STATES, STATES, generator=generator, dtype=torch.float64)
    logits = logits if like is None else like + logits
    first = torch.zeros(STATES, dtype=torch.float64)
    return gm.Autoregressive(LENGTH, Categorical(STATES), Chain(first, logits)), logits


def marginals(logits):
    """Law of the state before each place but the first."""
    law, transition = torch.full((STATES,), 1 / STATES, dtype=torch.float64), logits.softmax(-1)
    rows = []
    for _ in range(LENGTH - 1):
        rows.append(law)
        law = law @ transition
    return torch.stack(rows)


@pytest.fixture(scope="module")
def pair():
    truth, p = chain(0)
    model, q = chain(1, like=p)
    return truth, p, model, q


def test_exposure_bias_of_a_chain_is_what_matrix_products_say(pair):
    truth, p, model, q = pair
    gap = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    bias = exposure_bias(model(), truth(), num_samples=5000)
    for found, law in ((bias.teacher_forced, marginals(p)), (bias.free_running, marginals(q))):
        expected = law @ gap
        spread = (law @ gap.square() - expected.square()).clamp_min(0).sqrt() / 5000**0.5
        assert found[0] == 0
        assert ((found[1:] - expected).abs() <= 5 * spread + 1e-12).all()
    errors, drifting = (marginals(p) @ gap).sum(), (marginals(q) @ gap).sum()
    assert bias.ratio == pytest.approx(float(drifting / errors), rel=0.05)
    assert bias.accumulation == pytest.approx(LENGTH * bias.ratio)
    assert bias.excess_percent == pytest.approx(100 * (bias.ratio - 1))


def test_a_model_that_is_the_truth_has_no_exposure_bias(pair):
    truth, _, _, _ = pair
    bias = exposure_bias(truth(), truth(), num_samples=100)
    assert bias.teacher_forced.abs().max() < 1e-12 and bias.free_running.abs().max() < 1e-12


def test_entropy_drift_of_a_chain_is_what_matrix_products_say(pair):
    truth, p, model, q = pair
    entropy = -(q.softmax(-1) * q.log_softmax(-1)).sum(-1)
    loss = -(p.softmax(-1) * q.log_softmax(-1)).sum(-1)
    drift = entropy_drift(model(), truth().sample((5000,)))
    expected = float((marginals(q) @ entropy - marginals(p) @ loss).sum())
    assert abs(drift.total - expected) <= 5 * drift.standard_error
    assert abs(expected) > 10 * drift.standard_error
    own = entropy_drift(truth(), truth().sample((5000,)))
    assert abs(own.total) <= 5 * own.standard_error


def test_exposure_bias_of_continuous_entries_is_the_divergence():
    """Independent Gaussians: KL(N(0, 1) || N(m, 1)) = m^2 / 2 at every place, after any prefix."""

    class Constant(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

        def forward(self, entries, context=None):
            zero = torch.zeros_like(entries)
            return torch.cat([zero, zero + self.mean, zero], -1)

    law, oracle = (gm.Autoregressive(3, GaussianMixture(1), Constant(mean))() for mean in (0.5, 0.0))
    bias = exposure_bias(law, oracle, num_samples=40000)
    for found in (bias.teacher_forced, bias.free_running):
        assert ((found - 0.125).abs() < 5 * 0.5 / 200).all()


def test_exposure_bias_refuses_what_does_not_compare(pair):
    truth, _, model, _ = pair
    with pytest.raises(ShapeError, match="oracle"):
        exposure_bias(model(), gm.Autoregressive(3, Categorical(STATES))())
    with pytest.raises(ShapeError, match="order"):
        exposure_bias(gm.Autoregressive(3)(), gm.Autoregressive(3, order=[2, 1, 0])())
    with pytest.raises(ShapeError, match="batch_shape"):
        entropy_drift(model().expand([2]), truth().sample((5,)))
    with pytest.raises(DensityError, match="orders"):
        entropy_drift(gm.Autoregressive(3, Bernoulli(), orders=2)(), torch.zeros(4, 3))


def bits(*p):
    """A product of Bernoullis."""
    model = gm.Autoregressive(len(p), Bernoulli(), layers=0).double()
    with torch.no_grad():
        model.network.bias.copy_(torch.tensor(p).logit()[:, None])
    return model


def test_weights_are_those_that_make_data_likeliest():
    models = [bits(0.9, 0.9, 0.1), bits(0.1, 0.2, 0.8), bits(0.5, 0.5, 0.5)]
    true = Ensemble(models, weights=[0.6, 0.4, 0.0])
    x = true().sample((4000,))
    found = Ensemble(models)
    weights = found.fit_weights(x, steps=2000)
    assert weights.sum() == pytest.approx(1.0)
    log_prob = found().log_prob(x).mean()
    for other in ([0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.3, 0.3, 0.4], [1.0, 1.0, 1.0]):
        assert log_prob >= Ensemble(models, weights=other)().log_prob(x).mean() - 1e-7
    assert (weights - torch.tensor([0.6, 0.4, 0.0])).abs().max() < 0.08


def test_members_of_an_ensemble_may_be_of_any_kind_and_learn_together():
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * 3 + 10
    members = [gm.Autoregressive(2, GaussianMixture(1), width=8), gm.transform.coupling_flow(2, layers=2)]
    model = Ensemble(members)
    gm.fit(model, x, max_epochs=20, learning_rate=5e-3, seed=0, progress_bar=False)
    truth = torch.distributions.Normal(10.0, 3.0).log_prob(x).sum(-1).mean()
    assert model().log_prob(x).mean() > truth - 0.15


def test_an_ensemble_refuses_what_does_not_mix():
    with pytest.raises(ShapeError, match="at least one"):
        Ensemble([])
    with pytest.raises(ShapeError, match="agree"):
        Ensemble([bits(0.5), bits(0.5, 0.5)])
    with pytest.raises(ValueError, match="weights"):
        Ensemble([bits(0.5)], weights=[-1.0])
    with pytest.raises(ValueError, match="2 numbers"):
        Ensemble([bits(0.5), bits(0.2)], weights=[1.0])


def test_a_continuous_mixture_is_the_sum_over_its_points():
    torch.manual_seed(0)
    for head in (Bernoulli(), Categorical(3), GaussianMixture(2)):
        model = ContinuousMixture(2, head, latent_features=2, points=16, width=8).double()
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        x = model().sample((7,))
        theta = model.parameters_at(model.points)
        by_hand = torch.stack([head.log_prob(row, x).sum(-1) for row in theta]).exp().mean(0)
        assert torch.allclose(model().log_prob(x).exp(), by_hand, rtol=1e-10)


@pytest.mark.slow
def test_a_continuous_mixture_learns_a_common_cause():
    """Six entries that agree nine times in ten with a hidden coin: the law is known."""
    generator = torch.Generator().manual_seed(0)
    coin = torch.bernoulli(torch.full((20000, 1), 0.5), generator=generator)
    x = torch.bernoulli((0.1 + 0.8 * coin).expand(20000, 6), generator=generator)
    model = ContinuousMixture(6, latent_features=2, points=512, training_points=256, width=32)
    gm.fit(model, x, max_epochs=60, learning_rate=3e-2, batch_size=1000, seed=0, progress_bar=False)
    everything = torch.cartesian_prod(*[torch.arange(2.0)] * 6)
    ones = everything.sum(-1)
    truth = 0.5 * (0.9**ones * 0.1 ** (6 - ones) + 0.1**ones * 0.9 ** (6 - ones))
    log_prob = model().log_prob(everything).detach()
    assert log_prob.exp().sum() == pytest.approx(1.0, abs=1e-5)
    assert float((truth * (truth.log() - log_prob)).sum()) < 0.01
    assert_mean(model().sample((20000,)), log_prob.exp() @ everything)


def test_a_continuous_mixture_refuses_columns_and_wrong_networks():
    with pytest.raises(TypeError, match="Autoregressive"):
        ContinuousMixture(2, Mixed((Bernoulli(), GaussianMixture(1))))
    with pytest.raises(ShapeError, match="puts out 3 numbers"):
        ContinuousMixture(2, network=nn.Linear(16, 3))
    with pytest.raises(ValueError, match="points"):
        ContinuousMixture(2, points=0)
