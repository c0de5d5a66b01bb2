"""The exchange algorithm against posteriors in closed form, and what it asks of a program."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyro_genmods as gm
from pyro_genmods.contract import Cost
from pyro_genmods.foundation.errors import ModelError, SamplingError
from pyro_genmods.infer.auxiliary import InnerChains, energy_sites, licensed

from .statistics import assert_law, chain_standard_error, judge
from .test_energy_inference import EXACT, conditional, funnel, quartic

OPTIONS = {"progress_bar": False, "seed": 0}
BRIEF = {**OPTIONS, "level": "eager"}  # for runs that are too short to be recorded
SLACK = 0.01  # of a posterior mean: what inner chains of this length have not forgotten


def gaussian(**options):
    """Normal of precision c, without its constant."""
    return gm.Energy(1, context_features=1, network=lambda y, c: c[:, 0] * y[:, 0] ** 2 / 2, base=None, **options)


class Exact(gm.Energy):
    """The same, which draws without a chain."""

    def __init__(self):
        super().__init__(1, 1, network=lambda y, c: c[:, 0] * y[:, 0] ** 2 / 2, base=None)

    @property
    def cost(self):
        return Cost(sample=0, score=1)

    def sample_rows(self, rows, c):
        return torch.randn(rows, 1) * c.rsqrt()


def precision(energy):
    def model(y, mask=True):
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", energy(theta[..., None, None].expand((*theta.shape, len(y), 1))), obs=y)

    return model


@pytest.fixture(scope="module")
def y():
    return 0.7 * torch.randn(20, 1, generator=torch.Generator().manual_seed(3))


def posterior(y):
    return stats.gamma(2 + len(y) / 2, scale=1 / (1 + float(y.square().sum()) / 2))


def assert_posterior(exchange, truth, slack):
    """Mean and second moment within four standard errors and a slack, in units of the posterior."""
    theta = exchange.get_samples(group_by_chain=True)["theta"]
    columns = torch.stack([theta, theta.square()], -1).double()
    moments = torch.tensor([truth.mean(), truth.var() + truth.mean() ** 2], dtype=torch.float64)
    scale = torch.tensor([truth.std(), 2 * truth.mean() * truth.std()], dtype=torch.float64)
    gap = (columns.mean((0, 1)) - moments).abs()
    assert bool((gap < 4 * chain_standard_error(columns) + slack * scale).all()), gap / scale


# -- known answers ----------------------------------------------------------------------------------------------------


def test_a_precision_whose_likelihood_has_no_constant(y):
    exchange = gm.infer.Exchange(precision(gaussian()), 80, 60, 64, inner=10, **OPTIONS)
    exchange.run(y)
    assert exchange.upstream == {"y": ["theta"]}
    assert_posterior(exchange, posterior(y), 0.05)
    assert exchange.get_samples()["theta"].shape == (5120,)
    assert exchange.get_samples(group_by_chain=True)["theta"].shape == (64, 80)
    found = exchange.diagnostics()
    assert found["theta"]["r_hat"] < 1.2 and not found["exact"]
    work = found["inner"]["y"]
    assert work["transitions"] == 10 and 0.5 < work["acceptance"] < 0.9
    assert work["gradients"] == exchange.inner_gradients > 140 * 64 * 20 * 10
    assert 0.2 < float(exchange.acceptance.mean()) < 0.7


def test_exact_auxiliary_draws(y):
    exchange = gm.infer.Exchange(precision(Exact()), 200, 80, 64, **OPTIONS)
    exchange.run(y)
    assert_posterior(exchange, posterior(y), 0.0)
    found = exchange.diagnostics()
    assert found["exact"] and found["inner"]["y"]["exact"] and exchange.inner_gradients == 0
    assert_law(exchange.unconstrained[:, ::100].exp(), lambda x: torch.tensor(posterior(y).cdf(x)), "gamma")


def test_masked_data_do_not_count(y):
    mask = torch.arange(20) < 12
    exchange = gm.infer.Exchange(precision(Exact()), 100, 60, 64, **OPTIONS)
    exchange.run(y, mask)
    assert_posterior(exchange, posterior(y[:12]), 0.0)


def test_a_seed_repeats_a_run(y):
    runs = []
    for _ in range(2):
        exchange = gm.infer.Exchange(precision(gaussian()), 5, 5, 8, inner=2, **BRIEF)
        exchange.run(y[:3])
        runs.append(exchange.unconstrained)
        torch.rand(3)  # what happens elsewhere does not matter
    assert torch.equal(*runs)


def test_a_latent_energy_and_everything_held(y):
    """The rest moves by Hamiltonian Monte Carlo with what is upstream held."""
    exchange = gm.infer.Exchange(funnel(conditional(base=None)), 10, 10, 8, inner=2, **BRIEF)
    exchange.run(torch.zeros(2))
    layout = exchange.potential.layout
    assert list(layout.shapes) == ["c", "x"] and exchange._held.tolist() == [True, False, False]
    before = exchange._state.position.clone()
    exchange._move_rest(0, False)
    moved = (exchange._state.position != before).any(0)
    assert moved.tolist() == [False, True, True]
    assert set(exchange.sample_stats) == {"exchange_rate", "acceptance_rate", "diverging"}


def test_an_interrupt_keeps_draws(y, monkeypatch):
    exchange = gm.infer.Exchange(precision(Exact()), 5, 0, 8, **BRIEF)
    once = gm.infer.Exchange._iterate

    def interrupted(index):
        if index == 3:
            raise KeyboardInterrupt
        once(exchange, index)

    monkeypatch.setattr(exchange, "_iterate", interrupted)
    with pytest.warns(UserWarning, match="3 of 5 draws"):
        exchange.run(y)
    assert exchange.get_samples(group_by_chain=True)["theta"].shape == (8, 3)


def test_energies_as_entries_of_one_event(y):
    """Contexts, masks and densities are those of the same energies in a plate."""
    energy = gaussian()

    def model(y):
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        law = energy(theta[..., None, None].expand((*theta.shape, len(y), 1)))
        pyro.sample("y", law.mask(torch.arange(20) < 12).to_event(1), obs=y)

    q = torch.tensor([[0.0], [1.0]])
    log_probs = []
    for program, args in ((model, (y,)), (precision(energy), (y, torch.arange(20) < 12))):
        found = gm.infer.potential(licensed(program), args, level="eager")
        (site,), contexts = energy_sites(found.program, ["y"], q[0])
        (context,) = contexts(q)
        log_probs.append(site.log_prob(context, torch.ones(2, 20, 1)))
    assert torch.allclose(*log_probs)


@pytest.mark.slow
def test_a_latent_energy_whose_constant_depends_on_a_latent():
    exchange = gm.infer.Exchange(funnel(conditional(base=None)), 500, 200, 400, inner=15, **OPTIONS)
    exchange.run(torch.zeros(2))
    c = exchange.get_samples(group_by_chain=True)["c"]
    assert abs(float(c.mean()) - EXACT) < 0.02
    error = float(chain_standard_error(c))
    judge("E[c | y]", float(c.mean()), float(2 * stats.norm.sf((abs(float(c.mean()) - EXACT) - SLACK) / error)))


@pytest.mark.slow
def test_the_laws_own_sampler(y):
    exchange = gm.infer.Exchange(precision(gaussian()), 200, 80, 32, inner=None, **OPTIONS)
    exchange.run(y)
    assert_posterior(exchange, posterior(y), 0.05)
    assert exchange.diagnostics()["inner"]["y"]["transitions"] is None


@pytest.mark.slow
def test_the_bias_of_short_inner_chains_falls(y):
    spreads = []
    for inner in (1, 3, 20):
        exchange = gm.infer.Exchange(precision(gaussian()), 200, 80, 64, inner=inner, **OPTIONS)
        exchange.run(y)
        spreads.append(float(exchange.get_samples()["theta"].std()) / posterior(y).std())
    assert spreads[0] > spreads[1] > 1.1 and abs(spreads[2] - 1) < 0.05


@pytest.mark.slow
def test_chains_of_energies():
    """An energy whose context is another's value: both constants are exchanged, and one site is held and moved."""
    first, second = (
        conditional(),
        gm.Energy(
            1, context_features=2, network=lambda y, c: (y[:, 0] - c[:, 0]) ** 2 * (1 + c[:, 1] ** 2) / 2, base=None
        ),
    )

    def model():
        c = pyro.sample("c", dist.Normal(0.0, 0.5))
        x = pyro.sample("x", first(c[..., None]))
        pyro.sample("z", second(x))

    exchange = gm.infer.Exchange(model, 400, 150, 100, inner=10, **OPTIONS)
    exchange.run()
    assert exchange.upstream == {"x": ["c"], "z": ["x"]}
    draws = exchange.get_samples(group_by_chain=True)
    c = draws["c"].double()
    assert abs(float(c.mean())) < 5 * float(chain_standard_error(c)) + SLACK  # the prior: nothing is observed
    assert abs(float(c.std()) - 0.5) < 0.03
    gap = (draws["z"][..., 0] - draws["x"][..., 0]) * (1 + draws["x"][..., 1].square()).sqrt()
    assert abs(float(gap.std()) - 1) < 0.05


# -- parts ------------------------------------------------------------------------------------------------------------


def test_inner_chains_leave_their_laws_as_they_are():
    energy = gaussian()
    context = torch.tensor([0.25, 4.0, 100.0])[:, None, None].expand(3, 2000, 1).contiguous()
    law = energy(context)
    x = torch.randn(3, 2000, 1) * context.rsqrt()
    trace = poutine.trace(lambda: pyro.sample("y", law, obs=x)).get_trace()
    from pyro_genmods.infer.auxiliary import _site

    chains = InnerChains(_site("y", trace.nodes["y"], latent=False), 20)
    for _ in range(3):
        chains.draw(context, x, warm=True)
    w = chains.draw(context, x, warm=False)
    assert bool((w != x).float().mean() > 0.9)
    for i in range(3):
        assert_law(w[i] * context[i].sqrt(), torch.special.ndtr, f"precision {float(context[i, 0])}")


def test_contexts_and_densities_of_sites(y):
    model = precision(gaussian())
    found = gm.infer.potential(licensed(model), (y, torch.arange(20) < 12), level="eager")
    q = torch.tensor([[0.0], [1.0]])
    (site,), contexts = energy_sites(found.program, ["y"], q[0])
    (context,) = contexts(q)
    assert torch.allclose(context, q.exp()[:, None].expand(2, 20, 1))
    expected = -q.exp() * y[:12].square().sum() / 2
    assert torch.allclose(site.log_prob(context, y.expand(2, 20, 1)), expected[:, 0])
    difference = found.value(q)[0] - found.value(q)[1]
    prior = dist.Gamma(2.0, 1.0).log_prob(q.exp())[:, 0] + q[:, 0]
    assert torch.allclose(difference, -(prior + expected[:, 0])[0] + (prior + expected[:, 0])[1])


def test_the_joint_of_exchange_may_not_be_used_elsewhere(y):
    from pyro_genmods.foundation.errors import DoublyIntractableError

    energy = gaussian()
    gm.infer.potential(licensed(precision(energy)), (y,))
    assert not energy.allow_unnormalized
    with pytest.raises(DoublyIntractableError):
        gm.infer.potential(precision(energy), (y,))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_exchange_refuses(y):
    def run(model, *args, **options):
        gm.infer.Exchange(model, 2, 2, 4, **{**BRIEF, **options}).run(*args)

    with pytest.raises(ModelError, match=r"no unknown constant depends on a latent.*infer.MCMC"):
        run(lambda: pyro.sample("x", quartic()()))
    with pytest.raises(ModelError, match=r"'y'.*scaled by 2.0"):
        run(poutine.scale(precision(gaussian()), 2.0), y)

    held = {"theta": 1.0}
    closed = gm.Energy(1, network=lambda rows: held["theta"] * rows[:, 0] ** 2 / 2, base=None)

    def closure():
        held["theta"] = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        pyro.sample("y", closed(), obs=torch.ones(1))

    with pytest.raises(ModelError, match=r"'y'.*something else than a context"):
        run(closure, road="loop")

    energy = conditional()

    def discrete():
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        c = pyro.sample("c", dist.Normal(z.float(), 1.0))
        pyro.sample("x", energy(c[..., None]))

    with pytest.raises(ModelError, match="discrete latents are summed out"):
        run(discrete)
    for options in ({"inner": 0}, {"num_samples": 0}, {"num_chains": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            gm.infer.Exchange(precision(energy), **options)
    with pytest.raises(RuntimeError, match="no draws yet"):
        gm.infer.Exchange(precision(energy)).get_samples()


def test_stuck_chains_are_an_error(y, monkeypatch):
    exchange = gm.infer.Exchange(precision(Exact()), 3, 0, 8, **BRIEF)
    monkeypatch.setattr(exchange, "_exchange", lambda warm: torch.zeros(8))
    with pytest.raises(SamplingError, match=r"exchange moves are accepted in 0.0%"):
        exchange.run(y)
    assert exchange.get_samples()["theta"].shape == (24,)


def test_draws_for_arviz_have_no_density(y):
    exchange = gm.infer.Exchange(funnel(conditional(base=None)), 10, 10, 8, inner=2, **BRIEF)
    exchange.run(torch.zeros(2))
    with pytest.warns(UserWarning, match="unknown and depend on latents"):
        data = gm.diagnostics.to_inference_data(exchange, num_prior_samples=0, posterior_predictive=False)
    assert data["posterior"]["c"].shape == (8, 10) and "lp" not in data["sample_stats"]
    assert data["log_likelihood"]["y"].shape == (8, 10)
    assert math.isfinite(float(data["sample_stats"]["exchange_rate"].mean()))
