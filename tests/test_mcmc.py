r"""`infer.MCMC` behaves as Pyro's: the same methods and names, many chains, and a word of warning where one is due.

What the draws are worth is the business of `test_kernels.py`; here a run is looked at from outside. Most tests share
one kernel, whose graphs are kept from run to run, or one short run.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods.foundation.errors import ModelError, SamplingError, ShapeError
from pyro_genmods.infer import HMC, MALA, MCMC, ULA

CHAINS, DRAWS = 16, 24
STATS = {"acceptance_rate", "diverging", "energy", "lp", "n_steps", "step_size"}


def model(y: Tensor, scale: float = 0.5) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale).to_event(1).mask(rate > 0), obs=y)


def data(rows: int = 3, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))


@functools.cache
def shared() -> HMC:
    """One kernel for most runs: its graphs are recorded once."""
    return HMC(model, level="graph")


def made(kernel: Any = None, draws: int = DRAWS, chains: int = CHAINS, **settings: Any) -> MCMC:
    kernel = shared() if kernel is None else kernel
    settings = {"warmup_steps": 60, "progress_bar": False, "seed": 1, **settings}
    return MCMC(kernel, draws, num_chains=chains, **settings)


@pytest.fixture(scope="module")
def finished() -> MCMC:
    mcmc = made(HMC(model, level="graph"))
    mcmc.run(data())
    return mcmc


# -- Pyro's methods ----------------------------------------------------------------------------------------------------


def test_names_and_defaults_are_pyros():
    ours, pyros = inspect.signature(MCMC.__init__).parameters, inspect.signature(pyro.infer.MCMC.__init__).parameters
    shared = {"kernel", "num_samples", "warmup_steps", "num_chains", "initial_params", "hook_fn"}
    assert shared <= ours.keys() & pyros.keys()
    for name in ("run", "get_samples", "diagnostics", "summary"):
        theirs = inspect.signature(getattr(pyro.infer.MCMC, name)).parameters
        mine = inspect.signature(getattr(MCMC, name)).parameters
        assert list(mine)[: len(theirs)] == list(theirs), name
        assert all(mine[key].default == p.default for key, p in theirs.items()), name


def test_draws_flat_and_by_chain(finished):
    grouped, flat = finished.get_samples(group_by_chain=True), finished.get_samples()
    assert grouped.keys() == flat.keys() == {"loc", "rate"}
    assert grouped["loc"].shape == (CHAINS, DRAWS, 2) and grouped["rate"].shape == (CHAINS, DRAWS)
    for name, x in grouped.items():
        assert torch.equal(flat[name], x.flatten(0, 1)), name
        assert not x.requires_grad and x.dtype == torch.float32
    assert (flat["rate"] > 0).all()
    rows = finished.unconstrained
    assert rows.shape == (CHAINS, DRAWS, 3)
    assert torch.allclose(rows[..., 2].exp(), grouped["rate"])


def test_resampled_draws(finished):
    every = finished.get_samples()["loc"]
    some = finished.get_samples(num_samples=50)
    assert some["loc"].shape == (50, 2) and some["rate"].shape == (50,)
    assert (some["loc"][:, None] == every).all(-1).any(-1).all(), "a draw that is none"
    pairs = [(every == row).all(-1).nonzero()[0, 0] for row in some["loc"]]
    assert torch.equal(finished.get_samples()["rate"][torch.stack(pairs)], some["rate"]), "sites are torn apart"
    assert finished.get_samples(num_samples=5, group_by_chain=True)["loc"].shape == (CHAINS, 5, 2)
    assert finished.get_samples(num_samples=10 * CHAINS * DRAWS)["rate"].shape == (10 * CHAINS * DRAWS,)


def test_diagnostics(finished):
    found = finished.diagnostics()
    assert found.keys() == {"loc", "rate", "divergences", "acceptance rate", "exact"}
    for name, shape in (("loc", (2,)), ("rate", ())):
        assert {"n_eff", "r_hat", "nested_r_hat"} <= found[name].keys()
        assert all(torch.as_tensor(found[name][key]).shape == shape for key in ("n_eff", "r_hat", "nested_r_hat"))
        assert 0.9 < found[name]["r_hat"].max() < 1.2 and 1 <= found[name]["nested_r_hat"].max() < 1.3
    chains = [f"chain {i}" for i in range(CHAINS)]
    assert list(found["divergences"]) == list(found["acceptance rate"]) == chains
    assert found["divergences"]["chain 0"] == [] and found["exact"] is True
    rate = finished.sample_stats["acceptance_rate"].mean(1)
    assert list(found["acceptance rate"].values()) == pytest.approx(rate.tolist())


@pytest.mark.parametrize("chains", [1, 2, 3])
def test_few_chains_have_diagnostics_too(chains, capsys):
    mcmc = made(chains=chains, progress_bar=True)
    mcmc.run(data())
    found = mcmc.diagnostics()
    assert len(found["acceptance rate"]) == chains and "r_hat" in found["loc"]
    mcmc.summary()
    assert mcmc.get_samples(group_by_chain=True)["loc"].shape == (chains, DRAWS, 2)


def test_summary(finished, capsys):
    finished.summary(prob=0.8)
    table = capsys.readouterr().out
    for word in ("mean", "std", "median", "n_eff", "r_hat", "10.0%", "90.0%", "loc[0]", "loc[1]", "rate"):
        assert word in table, word
    assert "biased" not in table


def test_statistics(finished):
    stats = finished.sample_stats
    assert stats.keys() == STATS
    assert all(x.shape == (CHAINS, DRAWS) for x in stats.values())
    assert stats["diverging"].dtype == torch.bool and not stats["diverging"].any()
    assert ((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1)).all()
    assert (stats["n_steps"] >= 1).all() and not stats["n_steps"].is_floating_point()
    assert torch.allclose(stats["step_size"], stats["step_size"][:1, :1].expand(CHAINS, DRAWS))
    energy = finished.kernel.potential.value(finished.unconstrained.reshape(-1, 3)).reshape(CHAINS, DRAWS)
    assert torch.allclose(stats["lp"], -energy, atol=1e-4), "lp is the log density of the draw"
    kinetic = stats["energy"][:, 1:] - energy[:, :-1]  # of the momentum that was drawn at the draw before
    assert (kinetic > -1e-3).all() and kinetic.mean() == pytest.approx(1.5, abs=0.4)


def test_arviz_reads_them(finished):
    draws = {name: x.numpy() for name, x in finished.get_samples(group_by_chain=True).items()}
    stats = {name: x.numpy() for name, x in finished.sample_stats.items()}
    tree = arviz.from_dict(posterior=draws, sample_stats=stats)
    assert len(arviz.summary(tree)) == 3
    assert arviz.bfmi(tree).shape == (CHAINS,) and (arviz.bfmi(tree) > 0.2).all()


def test_before_a_run():
    mcmc = made(HMC(model))
    for method in (mcmc.get_samples, mcmc.diagnostics, mcmc.summary):
        with pytest.raises(RuntimeError, match="run"):
            method()
    with pytest.raises(RuntimeError, match="run"):
        _ = mcmc.sample_stats


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chains", "expected"), [(1, 1000), (4, 1000), (16, 400), (64, 100), (1000, 100)])
def test_the_default_warm_up_depends_on_the_chains(chains, expected):
    assert MCMC(HMC(model), 10, num_chains=chains).warmup_steps == expected
    assert MCMC(HMC(model), 10).num_chains == 64


@pytest.mark.parametrize("thinning", [2, 5])
def test_thinning_keeps_every_so_manieth_draw(thinning):
    whole = made(draws=20)
    whole.run(data())
    thin = made(draws=20 // thinning, thinning=thinning)
    thin.run(data())
    assert torch.equal(thin.unconstrained, whole.unconstrained[:, thinning - 1 :: thinning])
    assert torch.equal(thin.sample_stats["lp"], whole.sample_stats["lp"][:, thinning - 1 :: thinning])
    assert thin.num_gradients == pytest.approx(whole.num_gradients, rel=0.1)


def test_thinning_hides_no_divergence():
    """A draw that is kept stands for those that are not."""

    def walled() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 0, 0.0, -math.inf))

    flags = []
    kernel = MALA(walled, level="graph")
    for thinning in (1, 4):
        mcmc = made(kernel, draws=40 // thinning, thinning=thinning)
        with pytest.warns(UserWarning, match="diverged"):
            mcmc.run()
        flags.append(mcmc.sample_stats["diverging"])
    assert torch.equal(flags[1], flags[0].unflatten(1, (10, 4)).any(-1)) and flags[0].any()


def test_the_hook_sees_every_iteration():
    seen: list[tuple[str, int]] = []
    values: list[dict[str, Tensor]] = []

    def hook(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        assert isinstance(kernel, HMC)
        seen.append((stage, i))
        values.append(params)

    mcmc = made(hook_fn=hook)
    mcmc.run(data())
    assert [stage for stage, _ in seen] == ["warmup"] * 60 + ["sample"] * DRAWS
    assert [i for _, i in seen] == [*range(60), *range(DRAWS)]
    assert values[-1]["loc"].shape == (CHAINS, 2) and values[-1]["rate"].shape == (CHAINS,)
    rows = torch.stack([torch.cat([v["loc"], v["rate"][:, None]], -1) for v in values[60:]], 1)
    assert torch.equal(rows, mcmc.unconstrained)


@pytest.mark.parametrize(("when", "kept"), [(0, 1), (6, 7)])
def test_an_interruption_keeps_what_is_finished(when, kept):
    def hook(kernel: Any, params: Any, stage: str, i: int) -> None:
        if stage == "sample" and i == when:
            raise KeyboardInterrupt

    mcmc, whole = made(hook_fn=hook), made()
    whole.run(data())
    with pytest.warns(UserWarning, match=f"interrupted: {kept} of {DRAWS}"):
        mcmc.run(data())
    assert mcmc.get_samples(group_by_chain=True)["loc"].shape == (CHAINS, kept, 2)
    assert all(x.shape == (CHAINS, kept) for x in mcmc.sample_stats.values())
    assert torch.equal(mcmc.unconstrained, whole.unconstrained[:, :kept])
    assert mcmc.num_gradients > 0


def test_an_interruption_in_the_warm_up_is_one():
    def hook(kernel: Any, params: Any, stage: str, i: int) -> None:
        if i == 5:
            raise KeyboardInterrupt

    mcmc = made(hook_fn=hook)
    with pytest.raises(KeyboardInterrupt):
        mcmc.run(data())
    mcmc.hook_fn = None
    mcmc.run(data())
    assert mcmc.get_samples()["rate"].shape == (CHAINS * DRAWS,)


@pytest.mark.parametrize(
    ("chains", "wanted", "points"), [(16, None, 4), (16, 2, 2), (16, 16, 16), (6, None, 6), (6, 3, 3)]
)
def test_superchains_share_their_starts(chains, wanted, points):
    kernel = HMC(model, level="graph", step_size=1e-12, adapt_step_size=False, num_steps=1)
    mcmc = made(kernel, draws=1, chains=chains, warmup_steps=0, superchains=wanted)
    mcmc.run(data())
    assert mcmc.superchains == points
    rows = mcmc.unconstrained[:, 0].reshape(points, chains // points, 3)
    assert torch.allclose(rows, rows[:, :1].expand_as(rows), atol=1e-6), "chains of a group are apart"
    assert (rows[1:, 0] - rows[:-1, 0]).abs().min() > 1e-4, "groups are together"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"draws": 0}, ValueError, "num_samples"),
        ({"draws": -3}, ValueError, "num_samples"),
        ({"chains": 0}, ValueError, "num_chains"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"thinning": 0}, ValueError, "thinning"),
        ({"superchains": 5}, ValueError, "superchains.*divisor"),
        ({"superchains": 0}, ValueError, "superchains"),
        ({"kernel": pyro.infer.NUTS(model)}, TypeError, "kernel"),
        ({"kernel": HMC}, TypeError, "kernel"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        made(**arguments)


# -- starts ------------------------------------------------------------------------------------------------------------


def starts(chains: int = CHAINS) -> dict[str, Tensor]:
    return {"loc": torch.randn(chains, 2), "rate": torch.randn(chains)}


def test_given_starts_are_where_the_chains_begin():
    options = {"step_size": 1e-12, "adapt_step_size": False, "num_steps": 1, "level": "graph"}
    given = starts()
    mcmc = made(HMC(model, **options), draws=1, warmup_steps=0, initial_params=given)
    mcmc.run(data())
    rows = mcmc.unconstrained[:, 0]
    assert torch.allclose(rows[:, :2], given["loc"], atol=1e-6) and torch.allclose(rows[:, 2], given["rate"], atol=1e-6)


def test_starts_that_do_not_fit():
    good = starts()
    bad = {
        "needs a value": ({"loc": good["loc"]}, ModelError, "rate"),
        "too few": (starts(3), ShapeError, f"3 chains, needs {CHAINS}"),
        "shape": ({**good, "loc": torch.zeros(CHAINS, 3)}, ModelError, "'loc' has shape"),
        "not finite": (
            {**good, "rate": good["rate"].index_fill(0, torch.tensor([4]), math.nan)},
            SamplingError,
            "chain 4",
        ),
    }
    for name, (params, error, words) in bad.items():
        mcmc = made(initial_params=params)
        with pytest.raises(error) as caught:
            mcmc.run(data())
        assert re.search(words, str(caught.value)), name


# -- runs --------------------------------------------------------------------------------------------------------------


def test_new_data_on_the_same_kernel():
    kernel = HMC(model, level="graph")
    made(kernel).run(data())
    energy = kernel.potential
    again, fresh = made(kernel), made(HMC(model, level="graph"))
    again.run(data(shift=3.0))
    fresh.run(data(shift=3.0))
    assert kernel.potential is energy, "traced again for data of the same shape"
    assert torch.equal(again.unconstrained, fresh.unconstrained)
    assert again.get_samples()["loc"].mean() > 2
    other = made(kernel)
    other.run(data(7))
    assert kernel.potential is not energy
    options = made(kernel)
    options.run(data(7), scale=0.01)
    assert torch.allclose(options.get_samples()["loc"].mean(0), data(7).mean(0), atol=0.02)


def test_a_kernel_is_not_worn_out_by_another_number_of_chains():
    kernel, runs = HMC(model, level="graph"), []
    for chains in (8, 4, 8):
        mcmc = made(kernel, chains=chains)
        mcmc.run(data())
        runs.append(mcmc.unconstrained)
    assert runs[1].shape == (4, DRAWS, 3)
    assert torch.equal(runs[0], runs[2])


def test_earlier_results_stay_when_the_kernel_is_used_again():
    """Also where the second run has more latents than the first."""

    def hierarchy(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    kernel = MALA(hierarchy, level="graph")
    first, second = made(kernel), made(kernel, draws=5)
    first.run(torch.zeros(3))
    before = first.get_samples(group_by_chain=True)
    second.run(torch.zeros(5))
    after = first.get_samples(group_by_chain=True)
    assert torch.equal(after["x"], before["x"])
    assert first.diagnostics()["x"]["r_hat"].shape == (3,)


@pytest.mark.parametrize("kernel", [HMC, MALA, ULA])
def test_gradients_are_counted(kernel):
    options = {"step_size": 0.1, "adapt_step_size": False, "level": "graph"}
    options = {**options, "num_steps": 7} if kernel is HMC else options
    mcmc = made(kernel(model, **options), warmup_steps=10)
    for _ in range(2):
        mcmc.run(data())
        steps = 7 if kernel is HMC else 1
        least = (10 + DRAWS) * steps * CHAINS
        assert least <= mcmc.num_gradients <= least + 20 * CHAINS, "a start costs some, and no more"


def test_seconds_by_phase(finished):
    assert finished.seconds.keys() >= {"start", "warmup", "total"}
    assert finished.seconds["start"] + finished.seconds["warmup"] <= finished.seconds["total"]


def test_without_warm_up():
    mcmc = made(warmup_steps=0)
    mcmc.run(data())
    assert mcmc.get_samples()["loc"].isfinite().all()


def test_draws_are_those_of_their_time():
    """A draw is not changed by the iterations after it: the states are not overwritten in place."""
    copies: list[Tensor] = []
    mcmc = made(hook_fn=lambda kernel, params, stage, i: copies.append(kernel.state.position.clone()))
    mcmc.run(data())
    assert torch.equal(torch.stack(copies[60:], 1), mcmc.unconstrained)


# -- the bar, and warnings ---------------------------------------------------------------------------------------------


def test_the_bar_says_how_it_goes(capsys, monkeypatch):
    monkeypatch.setattr(f"{MCMC.__module__.rsplit('.', 1)[0]}.draws.REFRESH", 0.0)
    mcmc = made(progress_bar=True)
    mcmc.run(data())
    shown = capsys.readouterr().err
    for word in ("warm-up", "sampling", "acc=", "step=", "leapfrogs=", "divergences=0", "R-hat="):
        assert word in shown, word
    assert f"{60 + DRAWS}/{60 + DRAWS}" in shown and re.search(r"\d\d:\d\d<\d\d:\d\d", shown), "no time left"
    silent = made()
    silent.run(data())
    assert capsys.readouterr().err == ""


def test_divergences_are_warned_of():
    def neck() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()[..., None]).to_event(1))

    options = {"step_size": 0.9, "adapt_step_size": False, "adapt_mass_matrix": False, "num_steps": 10}
    mcmc = made(HMC(neck, level="graph", **options), draws=100)
    with pytest.warns(UserWarning, match=r"transitions diverged.*target_accept_prob"):
        mcmc.run()
    assert mcmc.sample_stats["diverging"].any()
    assert sum(map(len, mcmc.diagnostics()["divergences"].values())) == int(mcmc.sample_stats["diverging"].sum())


def test_stuck_chains_are_named():
    """A needle of width 1e-9 in which two chains start and from which no step leads out."""

    def needle() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.factor("needle", torch.where((x - 5).abs() < 1e-9, 1e4, 0.0))

    begin = torch.randn(CHAINS, dtype=torch.float64)
    begin[[2, 5]] = 5.0
    options = {"step_size": 0.5, "adapt_step_size": False, "num_steps": 3, "level": "graph"}
    mcmc = made(HMC(needle, **options), initial_params={"x": begin}, warmup_steps=0)
    with pytest.warns(UserWarning, match=r"chains \[2, 5\] did not move"):
        mcmc.run()


def test_chains_that_all_stand_still_are_an_error():
    kernel = HMC(model, step_size=1e4, adapt_step_size=False, adapt_mass_matrix=False, num_steps=1, level="graph")
    mcmc = made(kernel, warmup_steps=0)
    with pytest.raises(SamplingError, match="do not move"):
        mcmc.run(data())
    assert mcmc.get_samples()["loc"].shape == (CHAINS * DRAWS, 2), "the draws are kept for inspection"


def test_a_good_run_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made().run(data())


@pytest.mark.parametrize("made_by", ["HMC", "MALA", "ParallelTempering", "SMC"])
def test_everything_stays_on_the_device(device, made_by):
    """A program on the device that the suite was asked to use: rows, draws and statistics are there, and right."""
    y = torch.tensor([0.5, 1.5], device=device)

    def program(y: torch.Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros((), device=device), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    if made_by == "SMC":
        run = gm.infer.SMC(program, 500, num_runs=2, progress_bar=False, seed=0)
    else:
        kernel = getattr(gm.infer, made_by)(program)
        run = gm.infer.MCMC(kernel, 100, 100, 32, progress_bar=False, seed=0)
    run.run(y)
    x = run.get_samples()["x"]
    assert x.device.type == run.sample_stats["lp"].device.type == device.type
    assert abs(float(x.mean()) - 2 / 3) < 0.15
    assert abs(float(x.std()) - 3**-0.5) < 0.1
