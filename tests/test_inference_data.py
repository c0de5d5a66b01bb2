"""What ArviZ is given, against a plain loop over draws, closed forms, and ArviZ itself.

``loop`` conditions the program on one draw after the other: the truth that every pointwise log density must equal.
"""

from __future__ import annotations

import inspect
import math
import warnings
from types import SimpleNamespace

import arviz
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import TransformReparam

import pyro_genmods as gm
from pyro_genmods.diagnostics import to_inference_data
from pyro_genmods.diagnostics.program import Program
from pyro_genmods.diagnostics.sources import read_source
from pyro_genmods.foundation.errors import ShapeError

from .statistics import assert_law, assert_mean, assert_same_law

NEW_ARVIZ = not hasattr(arviz, "psislw")


def loop(model, args, draws, name, key="unscaled_log_prob"):
    """A quantity of one site at every draw, one draw at a time, ``(chains, draws, ...)``."""
    chains, length = next(iter(draws.values())).shape[:2]
    rows = []
    for c in range(chains):
        for d in range(length):
            point = {site: x[c, d] for site, x in draws.items()}
            trace = poutine.trace(poutine.condition(model, point)).get_trace(*args)
            trace.compute_log_prob()
            rows.append(trace.nodes[name][key].detach())
    return torch.stack(rows).unflatten(0, (chains, length)).numpy()


def prior_draws(model, args, chains=2, length=6):
    """Independent draws of the latents of a program, one at a time."""
    rows = []
    for _ in range(chains * length):
        with torch.no_grad():
            nodes = poutine.trace(model).get_trace(*args).nodes.values()
        latent = [
            node
            for node in nodes
            if node["type"] == "sample" and not node["is_observed"] and type(node["fn"]).__name__ != "_Subsample"
        ]
        rows.append({node["name"]: node["value"] for node in latent})
    return {name: torch.stack([row[name] for row in rows]).unflatten(0, (chains, length)) for name in rows[0]}


def array(data, group, name):
    return np.asarray(data[group][name].values)


def variables(data, group):
    return set(data[group].data_vars)


def groups(data):
    return set(data.groups()) if not NEW_ARVIZ else {path.strip("/") for path in data.groups if path != "/"}


# -- the programs -----------------------------------------------------------------------------------------------------


def vector(y):
    """A vector latent under data of its own length or any other."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc.sum(), 1.0), obs=y)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def nested(y):
    """Two plates, an event inside, and a latent in each of them."""
    columns, rows = pyro.plate("columns", y.shape[1], dim=-1), pyro.plate("rows", y.shape[0], dim=-2)
    with columns:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with rows:
        b = pyro.sample("b", dist.Gamma(2.0, 2.0))
        with columns:
            pyro.sample("y", dist.Normal(a * b[..., None], 1.0).to_event(1), obs=y)


def masked(y, seen):
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        pyro.sample("z", dist.Normal(x, 2.0).mask(seen), obs=y)


def covariance(y):
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale[..., None] * factor), obs=y)


def regression(y, X):
    """A matrix product with a vector latent: in an outer plate its shapes are wrong."""
    weights = pyro.sample("weights", dist.Laplace(torch.zeros(X.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=X @ weights), obs=y)


def counts(y):
    rate = pyro.sample("rate", dist.Dirichlet(torch.ones(4)))
    pyro.sample("y", dist.Multinomial(20, rate), obs=y)


def steps(y):
    """A chain of scalar sites, each datum the start of the next, in a plate that is a loop."""
    x = pyro.sample("x", dist.Uniform(0.0, 1.0))
    before = torch.zeros(())
    for i in pyro.plate("time", len(y)):
        before = pyro.sample(f"y_{i}", dist.Normal(x * before, 1.0), obs=y[i])


def branching(y):
    """Data-dependent control flow, which only the loop can run."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = 1.0 if x.item() > 0 else 3.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, scale), obs=y)


def weighted(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("likes", -x.abs())
    pyro.deterministic("square", x**2)
    with pyro.plate("data", len(y)), poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


PROGRAMS = {
    "vector": (vector, lambda: (torch.randn(5),)),
    "as many data as draws": (vector, lambda: (torch.randn(12),)),
    "as many data as the latent is long": (vector, lambda: (torch.randn(3),)),
    "schools": (schools, lambda: (torch.randn(8), torch.rand(8) + 1)),
    "nested plates": (nested, lambda: (torch.randn(4, 3, 2),)),
    "masked": (masked, lambda: (torch.randn(4), torch.tensor([True, False, True, True]))),
    "LKJ and normal": (covariance, lambda: (torch.randn(6, 3),)),
    "regression": (regression, lambda: ((torch.rand(7) < 0.5).float(), torch.randn(7, 3))),
    "regression of as many data as draws": (regression, lambda: ((torch.rand(12) < 0.5).float(), torch.randn(12, 3))),
    "counts": (counts, lambda: (torch.tensor([3.0, 5.0, 2.0, 10.0]),)),
    "a loop": (steps, lambda: (torch.randn(3),)),
    "branching": (branching, lambda: (torch.randn(4),)),
    "factor": (weighted, lambda: (torch.randn(5),)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_log_densities_are_those_of_a_loop(name):
    model, make = PROGRAMS[name]
    args = make()
    draws = prior_draws(model, args)
    data = to_inference_data(draws, model, args, num_prior_samples=5)
    nodes = poutine.trace(model).get_trace(*args).nodes
    observed = {site for site in nodes if site.split("_")[0] in ("y", "z")}
    assert variables(data, "log_likelihood") == variables(data, "observed_data") == observed
    assert variables(data, "posterior_predictive") == variables(data, "prior_predictive") == observed
    assert variables(data, "log_prior") == set(draws) <= variables(data, "posterior")
    for site in observed:
        truth = loop(model, args, draws, site)
        if name == "masked":
            truth = truth[..., args[1].numpy()]
            assert data["log_likelihood"][f"{site}_seen"].values.tolist() == [0, 2, 3]
        np.testing.assert_allclose(array(data, "log_likelihood", site), truth, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(array(data, "observed_data", site).squeeze(), nodes[site]["value"].squeeze())
        assert array(data, "posterior_predictive", site).shape == (2, 6, *nodes[site]["value"].shape)
        assert array(data, "prior_predictive", site).shape == (1, 5, *nodes[site]["value"].shape)
    for site in draws:
        truth = loop(model, args, draws, site)
        np.testing.assert_allclose(array(data, "log_prior", site), truth, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(array(data, "posterior", site), draws[site])


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "factor"])
def test_the_log_joint_is_the_sum_of_its_parts(name):
    model, make = PROGRAMS[name]
    args = make()
    data = to_inference_data(prior_draws(model, args), model, args, num_prior_samples=0, posterior_predictive=False)
    parts = [
        array(data, group, site).reshape(2, 6, -1).sum(-1)
        for group in ("log_prior", "log_likelihood")
        for site in variables(data, group)
    ]
    np.testing.assert_allclose(array(data, "sample_stats", "lp"), sum(parts), rtol=1e-5, atol=1e-4)
    assert "prior" not in groups(data) and "posterior_predictive" not in groups(data)


def test_factors_and_scales_count_in_the_joint_and_nowhere_else():
    y = torch.randn(5)
    draws = {"x": torch.randn(2, 6)}
    data = to_inference_data(draws, weighted, (y,))
    x = draws["x"]
    log_likelihood = dist.Normal(x[..., None], 1.0).log_prob(y)
    joint = dist.Normal(0.0, 1.0).log_prob(x) - x.abs() + 0.5 * log_likelihood.sum(-1)
    np.testing.assert_allclose(array(data, "sample_stats", "lp"), joint, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), log_likelihood, rtol=1e-5, atol=1e-5)
    assert variables(data, "posterior") == variables(data, "prior") == {"x", "square"}
    np.testing.assert_allclose(array(data, "posterior", "square"), x**2, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "road"),
    [("vector", "_by_vmap"), ("LKJ and normal", "_by_vmap"), ("counts", "_by_plate"), ("branching", "_by_loop")],
)
def test_roads(monkeypatch, name, road):
    """The table reaches all three roads, and each is taken where it is due."""
    taken = []
    first_right = Program._first_right

    def spy(self, n, given, wish):
        found = first_right(self, n, given, wish)
        taken.append(found[0].__name__)
        return found

    monkeypatch.setattr(Program, "_first_right", spy)
    model, make = PROGRAMS[name]
    args = make()
    to_inference_data(prior_draws(model, args), model, args, posterior_predictive=False, num_prior_samples=0)
    assert taken == [road]


def averaging(y):
    """What functorch cannot do, and a mean that in an outer plate is one over draws: no error, and wrong."""
    x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("c", dist.Multinomial(3, torch.ones(3) / 3), obs=torch.ones(3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x.mean(), 1.0), obs=y)


def branching_rarely(y):
    """In an outer plate one large draw would take all others along."""
    x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
    scale = 3.0 if (x < -5).any() else 1.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, scale), obs=y)


@pytest.mark.parametrize("model", [averaging, branching_rarely])
def test_a_road_that_is_wrong_without_an_error_is_not_taken(model):
    y, x = torch.randn(4), torch.randn(2, 100)
    x[1, 13] = -6.0
    data = to_inference_data({"x": x}, model, (y,), num_prior_samples=0)
    scale = 1.0 + 2.0 * (x[..., None] < -5) * (model is branching_rarely)
    truth = dist.Normal(x[..., None], scale).log_prob(y)
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), truth, rtol=1e-5, atol=1e-5)
    new = torch.as_tensor(array(data, "posterior_predictive", "y"))
    assert_mean((new - x[..., None])[0], 0.0, name="new data")


def test_chunks_change_nothing(monkeypatch):
    y = torch.randn(30)
    draws = {"loc": torch.randn(2, 50, 3)}
    whole = to_inference_data(draws, vector, (y,), num_prior_samples=0)
    monkeypatch.setattr("pyro_genmods.diagnostics.program.BUDGET", 1000)
    assert Program(vector, (y,), point={"loc": torch.zeros(3)})._chunk < 50
    parts = to_inference_data(draws, vector, (y,), num_prior_samples=0)
    np.testing.assert_allclose(
        array(whole, "log_likelihood", "y"), array(parts, "log_likelihood", "y"), rtol=1e-6, atol=1e-6
    )
    assert array(parts, "posterior_predictive", "y").shape == (2, 50, 30)


@pytest.mark.skipif(not hasattr(arviz, "from_pyro"), reason="ArviZ 1.x has no from_pyro")
def test_the_reason_why():
    """``arviz.from_pyro`` at as many draws as data: wrong numbers, no warning."""
    y = torch.randn(30)
    mcmc = MCMC(NUTS(vector), num_samples=30, warmup_steps=20, disable_progbar=True)
    mcmc.run(y)
    draws = mcmc.get_samples(group_by_chain=True)
    truth = loop(vector, (y,), draws, "y")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = arviz.from_pyro(mcmc, log_likelihood=True)
    assert abs(theirs.log_likelihood["y"].values - truth).max() > 0.1
    np.testing.assert_allclose(array(to_inference_data(mcmc), "log_likelihood", "y"), truth, rtol=1e-5, atol=1e-5)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def conjugate(y):
    one = torch.eye(2, dtype=y.dtype)
    loc = pyro.sample("loc", dist.MultivariateNormal(0 * one[0], one))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(loc, one), obs=y)


def test_prior_groups_have_their_laws():
    data = to_inference_data({"loc": torch.randn(1, 2, 2)}, conjugate, (torch.zeros(3, 2),), num_prior_samples=4000)
    loc = torch.as_tensor(array(data, "prior", "loc"))[0]
    y = torch.as_tensor(array(data, "prior_predictive", "y"))[0]
    assert_law(loc, lambda x: dist.Normal(0.0, 1.0).cdf(x), "prior")
    assert_law(y[:, 0], lambda x: dist.Normal(0.0, 2**0.5).cdf(x), "prior predictive")
    assert_mean((y[:, 0] - loc) * (y[:, 1] - loc), 0.0, name="data are independent given the latents")
    assert_mean(y[:, 0] * loc, 1.0, name="and drawn at their own latents")


@pytest.mark.parametrize("law", ["normal", "exponential", "binomial", "student", "categorical"])
def test_predictive_draws_have_their_law(law):
    """At draws that differ: new data follow each draw's own law, whichever road they came."""
    laws = {
        "normal": lambda x: dist.Normal(x, 1.0),
        "exponential": lambda x: dist.Exponential(x.exp()),
        "binomial": lambda x: dist.Binomial(6, logits=x),
        "student": lambda x: dist.StudentT(5.0, x, 1.0),
        "categorical": lambda x: dist.Categorical(logits=torch.stack([x, 0 * x, -x], -1)),
    }

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", laws[law](x).expand([3]), obs=torch.ones(3))

    x = torch.randn(1, 1200)
    found = to_inference_data({"x": x}, model, num_prior_samples=0, log_likelihood=False)
    y = torch.as_tensor(array(found, "posterior_predictive", "y")).float()
    truth = torch.stack([laws[law](x[0]).sample() for _ in range(3)], -1).float()
    order = x[0].argsort()
    for part in order.chunk(3):  # joint with the draw: compare within slices of it
        assert_same_law(y[0][part], truth[part], name=law)
    assert len({tuple(row) for row in y[0].tolist()}) > 10


def test_a_sampler_that_functorch_would_get_wrong():
    """It fills a tensor and reads it afterwards, so that a copy for each row is lost on it: the loop draws."""

    class Careless(dist.Normal):
        def sample(self, sample_shape=()):
            noise = torch.empty(self._extended_shape(sample_shape))
            noise.normal_()
            return self.loc + self.scale * noise

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", Careless(x[..., 0] + x[0], 1.0), obs=torch.tensor(0.0))

    x = torch.randn(1, 2000, 2)
    data = to_inference_data({"x": x}, model, num_prior_samples=0)
    noise = torch.as_tensor(array(data, "posterior_predictive", "y")) - 2 * x[..., 0]
    assert_law(noise[0], lambda z: dist.Normal(0.0, 1.0).cdf(z), "new data")


def test_a_law_that_can_only_be_called():
    class Called(dist.Normal):
        def sample(self, sample_shape=()):
            raise NotImplementedError

    def model():
        x = pyro.sample("x", Called(0.0, 1.0))
        pyro.sample("y", Called(x, 1.0), obs=torch.tensor(0.0))

    data = to_inference_data({"x": torch.randn(2, 6)}, model)
    assert np.isfinite(array(data, "posterior_predictive", "y")).all()
    assert np.isfinite(array(data, "prior", "x")).all()


def test_new_data_flow_into_what_follows():
    """Each datum of ``steps`` is the start of the next, also when it is drawn."""
    data = to_inference_data({"x": torch.full((1, 4000), 0.9)}, steps, (torch.zeros(3),), num_prior_samples=0)
    y = [torch.as_tensor(array(data, "posterior_predictive", f"y_{i}"))[0] for i in range(3)]
    assert_mean(y[0] * y[1], 0.9, name="covariance")
    assert_mean(y[2] ** 2, 1 + 0.81 + 0.81**2, name="variance")


def test_the_seed_decides():
    def run(seed):
        pyro.set_rng_seed(seed)
        data = to_inference_data({"mu": torch.zeros(2, 5), "tau": torch.ones(2, 5), "eta": torch.zeros(2, 5, 8)},
                                 schools, (torch.zeros(8), torch.ones(8)), num_prior_samples=7)  # fmt: skip
        drawn = [("posterior_predictive", "y"), ("prior", "tau"), ("prior_predictive", "y")]
        return [array(data, group, name) for group, name in drawn]

    one, same, other = run(1), run(1), run(2)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# -- names ------------------------------------------------------------------------------------------------------------


def test_plates_name_dimensions():
    y, sigma = torch.randn(8), torch.rand(8)
    draws = {"mu": torch.zeros(2, 5), "tau": torch.ones(2, 5), "eta": torch.randn(2, 5, 8)}
    names = list("ABCDEFGH")
    data = to_inference_data(draws, schools, (y,), {"sigma": sigma}, coords={"schools": names}, num_prior_samples=3)
    for group, name in [("posterior", "eta"), ("posterior", "theta"), ("log_likelihood", "y"), ("log_prior", "eta"),
                        ("posterior_predictive", "y"), ("prior", "theta"), ("prior_predictive", "y")]:  # fmt: skip
        assert data[group][name].dims == ("chain", "draw", "schools"), (group, name)
        assert data[group]["schools"].values.tolist() == names
    assert data["observed_data"]["y"].dims == ("schools",)
    assert data["posterior"]["mu"].dims == ("chain", "draw")
    assert variables(data, "constant_data") == {"sigma"}
    np.testing.assert_array_equal(array(data, "constant_data", "sigma"), sigma)
    chosen = to_inference_data(draws, schools, (y, sigma), dims={"sigma": ["schools"], "theta": ["place"]})
    assert chosen["constant_data"]["sigma"].dims == ("schools",)
    assert chosen["posterior"]["theta"].dims == ("chain", "draw", "place")


def test_nested_plates_name_dimensions_and_events_are_numbered():
    y = torch.randn(4, 3, 2)
    data = to_inference_data(prior_draws(nested, (y,)), nested, (y,), num_prior_samples=0)
    assert data["posterior"]["a"].dims == ("chain", "draw", "columns", "a_dim_1")
    assert data["posterior"]["b"].dims == ("chain", "draw", "rows", "b_dim_1")  # the second has size one
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "rows", "columns")
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "rows", "columns", "y_dim_2")
    assert data["log_prior"]["a"].dims == ("chain", "draw", "columns")
    assert data["observed_data"]["y"].dims == ("rows", "columns", "y_dim_2")
    named = to_inference_data(prior_draws(nested, (y,)), nested, (y,), dims={"y": ["i", "j", "k"]}, num_prior_samples=0)
    assert named["log_likelihood"]["y"].dims == ("chain", "draw", "i", "j")
    assert named["observed_data"]["y"].dims == ("i", "j", "k")


def test_a_plate_called_like_a_site():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("draw", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    data = to_inference_data({"x": torch.randn(1, 5)}, model, (torch.randn(3),), num_prior_samples=0)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "draw_plate")


def test_arguments_become_constant_data():
    def model(y, table, *more, count, options=None, **rest):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, count).expand([len(y)]).to_event(1), obs=y)

    y = torch.randn(4)
    kwargs = {
        "count": 2,
        "sizes": [1, 2, 3],
        "options": {"scale": torch.ones(2), "name": "no number"},
        "extra": np.arange(3),
    }
    data = to_inference_data({"x": torch.randn(1, 5)}, model, (y, torch.eye(2), torch.zeros(3)), kwargs)
    assert variables(data, "constant_data") == {"table", "more_0", "count", "sizes", "options_scale", "extra"}
    assert array(data, "constant_data", "count").item() == 2

    class Module(pyro.nn.PyroModule):
        def forward(self, y, sigma):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)

    data = to_inference_data({"x": torch.randn(1, 5)}, Module(), (y, torch.ones(4)))
    assert variables(data, "constant_data") == {"sigma"}


# -- sources ----------------------------------------------------------------------------------------------------------


def fake_mcmc(chains=4, length=50):
    """What ``pyro_genmods.infer.MCMC`` shows after a run."""
    y = torch.randn(12)
    draws = {"loc": y.mean() / 3 + torch.randn(chains, length, 3)}
    stats = {
        "diverging": torch.zeros(chains, length, dtype=torch.bool),
        "energy": torch.randn(chains, length).cumsum(1),
        "lp": torch.randn(chains, length),
        "acceptance_rate": torch.rand(chains, length),
        "n_steps": torch.full((chains, length), 7),
        "step_size": torch.full((chains, length), 0.1),
    }
    kernel = SimpleNamespace(model=vector)
    mcmc = SimpleNamespace(
        get_samples=lambda group_by_chain: draws if group_by_chain else None,
        kernel=kernel, _args=(y,), _kwargs={}, sample_stats=stats, superchains=2,
    )  # fmt: skip
    return mcmc, draws, stats, y


def test_our_mcmc():
    mcmc, draws, stats, y = fake_mcmc()
    data = to_inference_data(mcmc)
    assert variables(data, "sample_stats") == set(stats)
    for name, x in stats.items():
        np.testing.assert_array_equal(array(data, "sample_stats", name), x)
    assert data["posterior"].attrs["superchains"] == 2
    np.testing.assert_array_equal(array(data, "posterior", "loc"), draws["loc"])
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), loop(vector, (y,), draws, "y"), rtol=1e-5, atol=1e-5)
    elsewhere = torch.randn(5)
    assert array(to_inference_data(mcmc, args=(elsewhere,)), "log_likelihood", "y").shape == (4, 50, 5)


def test_our_mcmc_of_a_bare_density():
    """A kernel that was given a potential has no program: draws and statistics are what there is."""
    mcmc, draws, *_ = fake_mcmc()
    mcmc.kernel = SimpleNamespace(model=None)
    data = to_inference_data(mcmc)
    assert groups(data) == {"posterior", "sample_stats"}
    np.testing.assert_array_equal(array(data, "posterior", "loc"), draws["loc"])


def test_what_arviz_does_with_it():
    mcmc, *_ = fake_mcmc()
    data = to_inference_data(mcmc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(arviz.summary(data)) == 3
        loo = arviz.loo(data, pointwise=True)
        assert loo.n_data_points == 12
        bfmi = arviz.bfmi(data)
        assert np.asarray(bfmi["energy"] if hasattr(bfmi, "data_vars") else bfmi).shape == (4,)
        assert len(arviz.compare({"one": data, "two": data})) == 2
        arviz.plot_trace(data)
    plt.close("all")


def test_masked_data_are_no_data_in_leave_one_out():
    def model(y, seen):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y, seen = torch.randn(2, 3), torch.tensor([[True, True, False], [True, False, True]])
    draws = {"x": y[seen].mean() + torch.randn(4, 200) / 4}
    holes = torch.where(seen, y, math.nan)
    data = to_inference_data(draws, model, (holes, seen), num_prior_samples=0)
    assert data["log_likelihood"]["y_seen"].values.tolist() == [0, 1, 3, 5]
    assert data["observed_data"]["y"].dims == ("rows", "columns")

    def plain(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    found, truth = (arviz.loo(each) for each in (data, to_inference_data(draws, plain, (y[seen],))))
    for name in ("elpd" if NEW_ARVIZ else "elpd_loo", "se", "n_data_points"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), abs=1e-5)
    nothing = to_inference_data(draws, model, (holes, torch.tensor(False)), num_prior_samples=0)
    assert "log_likelihood" not in groups(nothing)


def test_what_is_left_of_masked_data_keeps_its_coordinates():
    args = torch.randn(4), torch.tensor([True, False, True, True])
    draws = prior_draws(masked, args)
    data = to_inference_data(draws, masked, args, coords={"data": list("abcd")}, num_prior_samples=0)
    assert data["log_likelihood"]["y_seen"].values.tolist() == ["a", "c", "d"]


def test_a_mask_that_changes_from_draw_to_draw():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=y > x):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y, x = torch.tensor([-100.0, 0.5, 1.0, 2.0, 3.0]), torch.randn(2, 6)
    x[0, 0], x[0, 1] = 5.0, 0.0
    data = to_inference_data({"x": x}, model, (y,), num_prior_samples=0)
    truth = dist.Normal(x[..., None], 1.0).log_prob(y) * (y > x[..., None])
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), truth[..., 1:], rtol=1e-5, atol=1e-5)


def test_mcmc_of_pyro():
    y, sigma = torch.randn(8), torch.ones(8)
    mcmc = MCMC(NUTS(schools), num_samples=40, warmup_steps=30, num_chains=1, disable_progbar=True)
    mcmc.run(y, sigma=sigma)
    data = to_inference_data(mcmc)
    draws = mcmc.get_samples(group_by_chain=True)
    assert variables(data, "posterior") == {"mu", "tau", "eta", "theta"}
    assert variables(data, "sample_stats") == {"lp", "diverging"}
    theta = draws["mu"][..., None] + draws["tau"][..., None] * draws["eta"]
    np.testing.assert_allclose(array(data, "posterior", "theta"), theta, rtol=1e-5, atol=1e-5)
    where = np.flatnonzero(array(data, "sample_stats", "diverging")[0]).tolist()
    assert where == mcmc.diagnostics()["divergences"]["chain 0"]
    assert data["sample_stats"].attrs["acceptance_rate"] == [mcmc.diagnostics()["acceptance rate"]["chain 0"]]


def test_chains_of_pyro_are_counted_not_sorted():
    """``"chain 10"`` comes after ``"chain 9"``."""
    divergences = {f"chain {i}": [i] for i in range(12)}
    mcmc = SimpleNamespace(
        get_samples=lambda group_by_chain: {"loc": torch.randn(12, 15, 3)}, kernel=SimpleNamespace(model=vector),
        _args=(torch.randn(4),), _kwargs={}, diagnostics=lambda: {"divergences": divergences},
    )  # fmt: skip
    diverging = array(to_inference_data(mcmc, num_prior_samples=0), "sample_stats", "diverging")
    assert [np.flatnonzero(row).tolist() for row in diverging] == [[i] for i in range(12)]


def gaussian_evidence(y):
    """``log p(y)`` of ``conjugate``: each column is normal with covariance ``I + 1 1'``."""
    n = len(y)
    law = torch.distributions.MultivariateNormal(torch.zeros(n), torch.eye(n) + torch.ones(n, n))
    return float(law.log_prob(y.T).sum())


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_a_guide_by_hand(scale):
    """Where the guide is the posterior all weights are equal; where it is wider, they average to the evidence."""
    y = torch.randn(9, 2, dtype=torch.float64)

    def guide(y):
        law = dist.Normal(y.sum(0) / 10, scale * 10**-0.5)
        pyro.sample("loc", law.to_event(1))

    data = to_inference_data(guide, conjugate, (y,), num_samples=2000)
    lp, log_q = (array(data, "sample_stats", name)[0] for name in ("lp", "log_q"))
    ratios = np.exp(lp - log_q - gaussian_evidence(y))
    assert array(data, "posterior", "loc").shape == (1, 2000, 2)
    assert data["sample_stats"].attrs["elbo"] == pytest.approx((lp - log_q).mean())
    if scale == 1.0:
        np.testing.assert_allclose(ratios, 1.0, atol=1e-5)
    else:
        assert_mean(torch.as_tensor(ratios), 1.0, name="evidence")
        assert data["sample_stats"].attrs["pareto_khat"] < 0.5
        loc = torch.as_tensor(array(data, "posterior", "loc")[0])
        assert_mean(torch.as_tensor(ratios)[:, None] * loc**2, (y.sum(0) / 10) ** 2 + 0.1, name="second moment")
        log_weight = array(data, "sample_stats", "log_weight")[0]
        assert np.exp(log_weight).sum() == pytest.approx(1.0)
        small = ratios < np.median(ratios)  # only the largest are smoothed
        assert np.ptp((log_weight - np.log(ratios))[small]) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz.summary(data)
        arviz.loo(data)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal, gm.infer.AutoFlow])
def test_autoguides(guide_class):
    """Weights average to the evidence, so densities of guide and model have the same units."""
    y = torch.randn(9, 2)
    guide = guide_class(conjugate)
    guide(y)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(8, vectorize_particles=True))
    for _ in range(0 if guide_class is gm.infer.AutoFlow else 60):  # it starts at the exact posterior
        svi.step(y)
    data = to_inference_data(guide, conjugate, (y,), num_samples=1500)
    lp, log_q = (torch.as_tensor(array(data, "sample_stats", name)[0]).double() for name in ("lp", "log_q"))
    assert_mean((lp - log_q - gaussian_evidence(y)).exp(), 1.0, name="evidence")
    assert variables(data, "posterior") == {"loc"}
    weights = np.exp(array(data, "sample_stats", "log_weight")[0])
    assert 1 / (weights**2).sum() > 500
    assert np.isfinite(data["sample_stats"].attrs["pareto_khat"])


def test_an_autoguide_of_constrained_latents():
    """The density of the draws is that of the latents themselves, with the Jacobian of their supports."""

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("y", dist.Poisson(rate).expand([3]).to_event(1), obs=y)

    y = torch.tensor([1.0, 4.0, 2.0])
    guide = gm.infer.AutoFlow(model)
    guide(y)
    data = to_inference_data(guide, model, (y,), num_samples=3000)
    lp, log_q = (torch.as_tensor(array(data, "sample_stats", name)[0]).double() for name in ("lp", "log_q"))
    evidence = (
        3 * math.log(2) - math.lgamma(3) + math.lgamma(10) - 10 * math.log(5) - sum(math.lgamma(v + 1) for v in y)
    )
    assert_mean((lp - log_q - evidence).exp(), 1.0, name="evidence")


def test_a_point_estimate_is_named():
    y = torch.randn(9, 2)
    guide = AutoDelta(conjugate)
    guide(y)
    with pytest.warns(UserWarning, match="point estimate"):
        data = to_inference_data(guide, conjugate, (y,), num_samples=200)
    assert "pareto_khat" not in data["sample_stats"].attrs


def test_draws_of_one_chain_and_draws_without_a_model():
    data = to_inference_data({"x": torch.randn(30, 3)}, group_by_chain=False, dims={"x": ["side"]})
    assert groups(data) == {"posterior"}
    assert data["posterior"]["x"].dims == ("chain", "draw", "side")
    assert array(data, "posterior", "x").shape == (1, 30, 3)
    data = to_inference_data({"x": np.zeros((2, 10)), "derived": torch.zeros(2, 10)}, weighted, (torch.zeros(3),))
    assert variables(data, "posterior") == {"x", "square", "derived"}
    assert variables(data, "log_prior") == {"x"}


# -- programs rewritten by handlers -----------------------------------------------------------------------------------


def test_noise_of_a_pushforward():
    """``PushforwardReparam``: noise has the draws, the site is what it is pushed to, and data are scored as before."""
    prior = gm.Flow(zuko.flows.NICE(2, hidden_features=(8,)))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(0, 0.3)
    prior.freeze()

    def model(y):
        x = pyro.sample("x", prior())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    y = torch.randn(4, 2)
    draws = {"x_base": torch.randn(2, 6, 2)}
    data = to_inference_data(draws, poutine.reparam(model, {"x": gm.infer.PushforwardReparam()}), (y,))
    x = prior().push(draws["x_base"])
    assert variables(data, "posterior") == variables(data, "prior") == {"x_base", "x"}
    assert variables(data, "log_prior") == {"x_base"} and variables(data, "observed_data") == {"y"}
    np.testing.assert_allclose(array(data, "posterior", "x"), x, rtol=1e-4, atol=1e-5)
    truth = dist.Normal(x[..., None, :], 0.5).to_event(1).log_prob(y)
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), truth, rtol=1e-4, atol=1e-4)


def test_an_observed_pushforward():
    prior = gm.Flow(zuko.flows.NICE(2, hidden_features=(8,))).freeze()

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", prior(), obs=y - loc)

    y = torch.randn(4, 2)
    draws = {"loc": torch.randn(2, 6)}
    rewritten = poutine.reparam(model, {"y": gm.infer.PushforwardReparam()})
    data = to_inference_data(draws, rewritten, (y,), num_prior_samples=0)
    truth = prior().log_prob(y - draws["loc"][..., None, None])
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), truth, rtol=1e-4, atol=1e-4)
    assert variables(data, "observed_data") == {"y"} and "posterior_predictive" not in groups(data)


def test_a_reparameterised_latent():
    def model(y):
        x = pyro.sample("x", dist.LogNormal(1.0, 0.5))
        pyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)

    draws = {"x_base": torch.randn(2, 6)}
    data = to_inference_data(draws, poutine.reparam(model, {"x": TransformReparam()}), (torch.zeros(3),))
    np.testing.assert_allclose(array(data, "posterior", "x"), draws["x_base"].exp(), rtol=1e-5)
    assert variables(data, "log_prior") == {"x_base"}
    assert data["log_likelihood"]["y"].dims == ("chain", "draw")


def test_partly_observed_data():
    """``obs_mask``: what was seen is data, what was not is latent, and both together are deterministic."""

    def model(y, seen):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y, obs_mask=seen)

    y, seen = torch.randn(4), torch.tensor([True, False, True, True])
    draws = {"x": torch.randn(2, 6), "y_unobserved": torch.randn(2, 6, 4)}
    data = to_inference_data(draws, model, (y, seen), num_prior_samples=0)
    assert variables(data, "log_likelihood") == {"y_observed"}
    truth = dist.Normal(draws["x"][..., None], 1.0).log_prob(y)
    np.testing.assert_allclose(array(data, "log_likelihood", "y_observed"), truth[..., seen], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(array(data, "posterior", "y"), torch.where(seen, y, draws["y_unobserved"]))


def test_a_minibatch_is_held():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    y, draws = torch.randn(20), {"x": torch.randn(2, 6)}
    with pytest.warns(UserWarning, match=r"\['data'\] are subsampled"):
        data = to_inference_data(draws, model, (y,))
    index = data["log_likelihood"]["data"].values.copy()
    truth = dist.Normal(draws["x"][..., None], 1.0).log_prob(y[index])
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), truth, rtol=1e-5, atol=1e-5)
    joint = dist.Normal(0.0, 1.0).log_prob(draws["x"]) + 4 * truth.sum(-1)
    np.testing.assert_allclose(array(data, "sample_stats", "lp"), joint, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(array(data, "observed_data", "y"), y[index])
    assert array(data, "posterior_predictive", "y").shape == (2, 6, 5)


def test_a_minibatch_of_a_guide_is_that_of_its_model():
    def model(y):
        with pyro.plate("data", len(y), subsample_size=5) as index:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    def guide(y):
        with pyro.plate("data", len(y), subsample_size=5) as index:
            pyro.sample("x", dist.Normal(y[index] / 2, 0.5**0.5))

    with pytest.warns(UserWarning, match="subsampled"):
        data = to_inference_data(guide, model, (torch.linspace(-50, 50, 20),), num_samples=300)
    ratios = array(data, "sample_stats", "lp") - array(data, "sample_stats", "log_q")
    assert ratios.std() < 1e-2 * abs(ratios.mean())
    assert data["posterior"]["x"].dims == ("chain", "draw", "data")
    np.testing.assert_allclose(
        array(data, "posterior", "x").mean((0, 1)), array(data, "observed_data", "y") / 2, atol=1
    )


# -- what cannot be known ---------------------------------------------------------------------------------------------


def mixture(y, scale=0.5):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("data", len(y)), poutine.scale(scale=scale):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.deterministic("mean", loc[..., 0] + z)
        pyro.sample("y", dist.Normal(torch.where(z == 1, loc[..., 1:], loc[..., :1]), 1.0), obs=y)


def test_a_sum_over_discrete_latents_of_each_datum():
    y, loc = torch.randn(4), torch.randn(2, 6, 2)
    with pytest.warns(UserWarning, match=r"\['mean'\] are left out: they depend on \['z'\]"):
        data = to_inference_data({"loc": loc}, mixture, (y,))
    parts = dist.Normal(loc[..., None, :], 1.0).log_prob(y[:, None]) + torch.tensor([0.7, 0.3]).log()
    truth = parts.logsumexp(-1)
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), truth, rtol=1e-5, atol=1e-5)
    joint = dist.Normal(0.0, 5.0).log_prob(loc).sum(-1) + 0.5 * truth.sum(-1)
    np.testing.assert_allclose(array(data, "sample_stats", "lp"), joint, rtol=1e-5, atol=1e-4)
    assert variables(data, "posterior") == variables(data, "log_prior") == {"loc"}
    assert variables(data, "prior") == {"loc", "z", "mean"}


def test_new_data_of_a_mixture():
    loc = torch.tensor([-4.0, 4.0]).expand(1, 2000, 2)
    with pytest.warns(UserWarning, match="are left out"):
        data = to_inference_data({"loc": loc}, mixture, (torch.zeros(3),), num_prior_samples=0)
    y = torch.as_tensor(array(data, "posterior_predictive", "y"))[0]
    normal = dist.Normal(torch.zeros(()), 1.0)
    assert_law(y, lambda x: 0.7 * normal.cdf(x + 4) + 0.3 * normal.cdf(x - 4), "a mixture")


def test_several_discrete_latents_of_each_datum():
    def model(y):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 4, dim=-1):
            a = pyro.sample("a", dist.Categorical(p))
            b = pyro.sample("b", dist.Bernoulli((1.0 + a) / 4))
            pyro.sample("y", dist.Normal(a + 10 * b, 1.0), obs=y)

    y, draws = 3 * torch.randn(2, 4), {"p": dist.Dirichlet(torch.ones(3)).sample((2, 6))}
    data = to_inference_data(draws, model, (y,), num_prior_samples=0)
    a, b = torch.arange(3.0)[:, None], torch.arange(2.0)
    weight = draws["p"][..., None].log() + dist.Bernoulli((1 + a) / 4).log_prob(b)
    parts = weight[:, :, None, None] + dist.Normal(a + 10 * b, 1.0).log_prob(y[..., None, None])
    np.testing.assert_allclose(
        array(data, "log_likelihood", "y"), parts.flatten(-2).logsumexp(-1), rtol=1e-5, atol=1e-5
    )


def shared(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(0.3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)


def two_data_sites(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)
        pyro.sample("w", dist.Normal(x - z, 1.0), obs=y)


def groups_of_data(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("repeats", 3, dim=-2):
            pyro.sample("y", dist.Normal(x + z, 1.0), obs=y.expand(3, -1))


def a_hidden_continuous_latent(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)


def masked_together(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=y > 0):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)


@pytest.mark.parametrize("model", [shared, two_data_sites, groups_of_data, a_hidden_continuous_latent, masked_together])
def test_what_couples_the_data_is_named(model):
    with pytest.warns(UserWarning, match=r"no draws of the latent sites \['z'\]"):
        data = to_inference_data({"x": torch.randn(2, 6)}, model, (torch.randn(4),))
    assert groups(data) - {"constant_data"} == {"posterior", "prior", "prior_predictive", "observed_data"}
    assert variables(data, "prior") == {"x", "z"}


def test_mcmc_of_pyro_with_a_sum():
    """The sum that NUTS moved on, and the one that ArviZ is given, are one."""
    y = torch.cat([torch.randn(5) - 3, torch.randn(5) + 3])
    mcmc = MCMC(NUTS(mixture), num_samples=10, warmup_steps=5, disable_progbar=True)
    mcmc.run(y, scale=1.0)
    with pytest.warns(UserWarning, match="are left out"):
        data = to_inference_data(mcmc, num_prior_samples=0)
    loc = mcmc.get_samples(group_by_chain=True)["loc"]
    potential = torch.stack([mcmc.kernel.potential_fn({"loc": row}) for row in loc[0]])
    np.testing.assert_allclose(array(data, "sample_stats", "lp")[0], -potential.detach(), rtol=1e-4, atol=1e-3)


def test_a_prior_that_cannot_be_drawn_from_is_left_out():
    def model(y):
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y, draws = torch.randn(4), {"x": torch.randn(2, 6)}
    with pytest.warns(UserWarning, match="prior is left out.*NotImplementedError"):
        data = to_inference_data(draws, model, (y,))
    assert groups(data).isdisjoint({"prior", "prior_predictive"})
    truth = dist.Normal(draws["x"][..., None], 1.0).log_prob(y)
    np.testing.assert_allclose(array(data, "log_likelihood", "y"), truth, rtol=1e-5, atol=1e-5)


def test_noise_outside_the_sites_is_named():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + torch.randn(()), 1.0).expand([3]).to_event(1), obs=y)

    with pytest.warns(UserWarning, match="draws random numbers outside its sites"):
        to_inference_data({"x": torch.randn(2, 6)}, model, (torch.zeros(3),), num_prior_samples=0)


def test_results_are_on_the_cpu(device):
    y, draws = torch.randn(5, device=device), {"x": torch.randn(2, 6, device=device)}

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros((), device=device), 1.0))
        pyro.deterministic("square", x**2)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.StudentT(5.0, x, 1.0), obs=y)

    def guide(y):
        pyro.sample("x", dist.Normal(y.mean(), 1.0))

    for source in (draws, guide):
        data = to_inference_data(source, model, (y,), num_prior_samples=20)
        assert {"posterior_predictive", "prior", "log_likelihood"} <= groups(data)
        assert np.isfinite(array(data, "log_likelihood", "y")).all()


def test_nothing_is_left_behind():
    """No parameter, no handler, no gradient, no validation switched off; handlers around the call see nothing."""
    y, draws = torch.randn(5), {"loc": torch.randn(2, 6, 3).requires_grad_()}
    with poutine.trace() as trace, pyro.validation_enabled(True):
        to_inference_data(draws, vector, (y,))
        assert torch.distributions.Distribution._validate_args
    assert not trace.trace.nodes
    assert not pyro.get_param_store()
    assert draws["loc"].grad is None


# -- bad input --------------------------------------------------------------------------------------------------------


Y = torch.zeros(4)
X = {"loc": torch.zeros(2, 5, 3)}
BAD = [
    (lambda: to_inference_data(3), TypeError, "source: got int, needs an MCMC"),
    (lambda: to_inference_data({}), ValueError, "source: it has no draws"),
    (lambda: to_inference_data({"x": "draws"}), TypeError, "source: got str at 'x'"),
    (lambda: to_inference_data({"x": torch.zeros(5)}), ShapeError, "group_by_chain=False"),
    (lambda: to_inference_data({"x": torch.zeros(2, 0)}), ShapeError, "source: got draws of shapes"),
    (lambda: to_inference_data(X | {"b": torch.zeros(2, 4)}), ShapeError, "same chains and draws"),
    (lambda: inspect.unwrap(read_source)(X, vector, Y, None, 9, True), TypeError, "args: got Tensor, needs a tuple"),
    (
        lambda: to_inference_data({"a": torch.zeros(2, 5)}, vector, (Y,)),
        ValueError,
        "latents of the model: \\['loc'\\]",
    ),
    (lambda: to_inference_data(X | {"y": torch.zeros(2, 5, 4)}, vector, (Y,)), ValueError, "which the model observes"),
    (lambda: to_inference_data(lambda y: None, None, (Y,)), ValueError, "model: got None with a guide"),
    (lambda: to_inference_data(AutoNormal(vector), vector, (Y,), num_samples=0), ValueError, "num_samples: got 0"),
    (lambda: to_inference_data(MCMC(NUTS(vector), num_samples=5)), ValueError, "no draws; call its run"),
    (
        lambda: to_inference_data(X, vector, (Y,), dims={"y": ["a", "b"]}),
        ShapeError,
        "dims: got \\['a', 'b'\\] for 'y'",
    ),
    (lambda: to_inference_data(X, vector, (Y,), dims={"y": ["loc"]}), ValueError, "dims, coords: got 'loc'"),
    (
        lambda: to_inference_data(X, vector, (Y,), coords={"data": [1, 2]}),
        ShapeError,
        "coords: got 2 values for 'data'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
