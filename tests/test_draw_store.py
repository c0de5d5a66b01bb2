"""Runs that go to disk while they are made: what is there is what was drawn, and nothing that is finished is ever lost.

The truth is the run that was not interrupted, in memory, with the same seed: everything must equal it bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from functools import cache

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
import zarr

import pyro_genmods as gm
from pyro_genmods.foundation.errors import FileFormatError
from pyro_genmods.infer import draws as draws_module
from pyro_genmods.infer import recording
from pyro_genmods.io import DrawStore, read_tensors, write_tensors

KERNELS = {"HMC": gm.infer.HMC, "MALA": gm.infer.MALA, "ULA": gm.infer.ULA}
DATA = torch.tensor([28.0, 8.0, -3.0, 7.0])
pytestmark = pytest.mark.filterwarnings("ignore:.*transitions diverged")


def model(y, spread=5.0):
    loc = pyro.sample("group/loc", dist.Normal(0.0, spread))
    scale = pyro.sample("scale", dist.HalfCauchy(5.0))
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc + scale * theta, 10.0), obs=y)


@cache
def traced():
    """Tracing takes seconds; a potential serves any number of runs."""
    return gm.infer.potential(model, (DATA,), level="graph")


def chains(store=None, kernel="HMC", num_samples=24, program=None, told=None, **options):
    given = {"potential_fn": traced()} if program is None else {"model": program}
    kernel = KERNELS[kernel](**given, level="graph", **(told or {}))
    options = {"warmup_steps": 20, "num_chains": 8, "seed": 3, "progress_bar": False, **options}
    return gm.infer.MCMC(kernel, num_samples, store=store, **options)


def ran(*args, data=(DATA,), **options):
    mcmc = chains(*args, **options)
    mcmc.run(*data)
    return mcmc


def assert_same(mcmc, other):
    assert torch.equal(mcmc.unconstrained, other.unconstrained)
    assert mcmc.unconstrained.stride() == other.unconstrained.stride(), "transforms round by strides"
    for mine, theirs in (
        (mcmc.sample_stats, other.sample_stats),
        (mcmc.get_samples(group_by_chain=True), other.get_samples(group_by_chain=True)),
    ):
        assert list(mine) == list(theirs)
        for name, x in mine.items():
            assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name
    assert mcmc.num_gradients == other.num_gradients


def finished(path):
    """Finished draws, by the state alone."""
    return read_tensors(path / "state.safetensors")[1]["draws"]


def contents(path):
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def eager(monkeypatch):
    """Write after every iteration."""
    monkeypatch.setattr(recording, "SECONDS", 0.0)
    monkeypatch.setattr(recording, "SHARE", 0.0)


@pytest.fixture(scope="module")
def whole():
    return {name: ran(kernel=name) for name in KERNELS}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A finished run on disk; nobody changes it."""
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    ran(path)
    return path


# -- what is on disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_store_changes_nothing(tmp_path, whole, kernel):
    path = tmp_path / "runs" / "run.zarr"
    mcmc = ran(path, kernel=kernel)
    assert_same(mcmc, whole[kernel])
    assert os.listdir(tmp_path / "runs") == ["run.zarr"], "nothing is left beside it"
    store = DrawStore.open(path)
    assert store.draws == 24 == finished(path)
    found = store.read("sample_stats")
    assert found.keys() == mcmc.sample_stats.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in mcmc.sample_stats.items())
    found, samples = store.read("posterior"), mcmc.get_samples(group_by_chain=True)
    assert found.keys() == samples.keys()
    for name, x in samples.items():
        torch.testing.assert_close(found[name], x, rtol=1e-6, atol=1e-7)  # vector units round by the place in a batch


def assert_same_on_disk(path, other):
    one, two = DrawStore.open(path), DrawStore.open(other)
    for group in ("posterior", "sample_stats", "unconstrained_posterior"):
        mine, theirs = one.read(group), two.read(group)
        assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())


@pytest.mark.parametrize("num_chains", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_blocks_on_the_way_change_nothing(tmp_path, monkeypatch, num_chains):
    options = {"num_chains": num_chains, "num_samples": 20, "warmup_steps": 5}
    undisturbed = ran(tmp_path / "whole.zarr", **options)
    monkeypatch.setattr(recording, "SECONDS", 0.0)
    monkeypatch.setattr(recording, "SHARE", 0.0)
    assert_same(ran(tmp_path / "parts.zarr", **options), undisturbed)
    assert_same_on_disk(tmp_path / "parts.zarr", tmp_path / "whole.zarr")


def test_a_finished_run_returns_its_draws(tmp_path, complete, whole, monkeypatch):
    before = contents(complete)

    def fail(*args):
        raise AssertionError("a finished run was sampled again")

    monkeypatch.setattr(gm.infer.HMC, "advance", fail)
    assert_same(ran(complete), whole["HMC"])
    assert_same(ran(complete, seed=None), whole["HMC"])
    assert contents(complete) == before


def test_readers_open_it(complete, whole):
    samples = whole["HMC"].get_samples(group_by_chain=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = xarray.open_zarr(complete, group="posterior")
        tree = xarray.open_datatree(complete, engine="zarr")
        data = arviz.InferenceData.from_datatree(tree)
    assert posterior["theta"].dims == ("chain", "draw", "theta_dim_0")
    assert posterior["p"].dims == ("chain", "draw", "p_dim_0") and posterior["p"].shape == (8, 24, 3)
    assert (posterior["theta"].values == samples["theta"].numpy()).all()
    assert (posterior["group.loc"].values == samples["group/loc"].numpy()).all()
    assert posterior["group.loc"].attrs == {"site": "group/loc"}
    assert tree["sample_stats"]["diverging"].dtype == bool and tree["sample_stats"]["n_steps"].dtype == "int64"
    assert posterior.attrs == {"inference_library": "pyro_genmods", "exact": 1, "superchains": 2}
    expected = samples["scale"].double().mean()
    assert float(arviz.summary(data, round_to="none")["mean"]["scale"]) == pytest.approx(float(expected), rel=1e-5)
    assert arviz.bfmi(data).shape == (8,)


def test_readers_open_an_unfinished_one(tmp_path, whole, eager):
    path, seen = tmp_path / "run.zarr", []

    def look(kernel, params, stage, i):
        if stage == "sample" and i in (0, 5):
            posterior = xarray.open_zarr(path, group="posterior")
            tree = xarray.open_datatree(path, engine="zarr")
            seen.append((posterior.sizes["draw"], tree["sample_stats"].sizes["draw"], posterior["theta"].values))

    ran(path, hook_fn=look)
    assert [found[:2] for found in seen] == [(1, 1), (6, 6)]
    assert (seen[1][2] == whole["HMC"].get_samples(group_by_chain=True)["theta"][:, :6].numpy()).all()


def test_chunks_that_are_full_are_never_touched(tmp_path, eager, monkeypatch):
    monkeypatch.setattr("pyro_genmods.io.draw_store.LONGEST_CHUNK", 4)
    path, stamps = tmp_path / "run.zarr", {}

    def look(kernel, params, stage, i):
        for number in range((i + 1) // 4 if stage == "sample" else 0):
            file = path / "posterior" / "theta" / "c" / "0" / str(number) / "0"
            stamp = (file.stat().st_mtime_ns, file.stat().st_ino)
            assert stamps.setdefault(number, stamp) == stamp

    ran(path, hook_fn=look, num_samples=11)
    assert len(stamps) == 2


def test_memory_lets_go_of_what_is_on_disk(tmp_path, whole, eager, monkeypatch):
    monkeypatch.setattr(draws_module, "MEMORY", 2000)
    mcmc = ran(tmp_path / "run.zarr")
    assert mcmc._draws.recent().nbytes < 2000 + mcmc.kernel.state.position.nbytes
    assert_same(mcmc, whole["HMC"])
    assert mcmc._draws.divergences == int(mcmc.sample_stats["diverging"].sum())


def test_inference_data_of_a_run_that_went_on(complete):
    data = gm.diagnostics.to_inference_data(ran(complete, program=model))
    assert data["posterior"]["theta"].shape == (8, 24, 4) and "log_likelihood" in data.groups()


# -- interrupted ------------------------------------------------------------------------------------------------------


def interrupt_at(stage, index, action):
    def hook(kernel, params, now, i):
        if (now, i) == (stage, index):
            action()

    return hook


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "action", [raise_interrupt, lambda: os.kill(os.getpid(), signal.SIGINT)], ids=["exception", "signal"]
)
@pytest.mark.parametrize("kernel", ["HMC", "MALA"])
def test_ctrl_c_keeps_every_draw(tmp_path, whole, kernel, action):
    path = tmp_path / "run.zarr"
    with pytest.warns(UserWarning, match="interrupted: 7 of 24 draws"):
        mcmc = ran(path, kernel=kernel, hook_fn=interrupt_at("sample", 6, action))
    assert mcmc.get_samples()["scale"].shape == (56,) and finished(path) == 7
    assert_same(ran(path, kernel=kernel), whole[kernel])


def test_ctrl_c_inside_a_transition(tmp_path, whole, monkeypatch):
    """The kernel is then in the middle of something; what is written is the state after the last whole draw."""
    path, transition, calls = tmp_path / "run.zarr", gm.infer.HMC._transition, []

    def spoiled(self, state, step):
        calls.append(transition(self, state, step))
        if len(calls) == 20 + 10:
            raise KeyboardInterrupt
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(gm.infer.HMC, "_transition", spoiled)
        with pytest.warns(UserWarning, match="interrupted: 9 of"):
            ran(path)
    assert finished(path) == 9
    assert_same(ran(path), whole["HMC"])


def test_an_error_keeps_every_draw(tmp_path, whole):
    def fail():
        raise RuntimeError("a hook")

    with pytest.raises(RuntimeError, match="a hook"):
        ran(tmp_path / "run.zarr", hook_fn=interrupt_at("sample", 4, fail))
    assert finished(tmp_path / "run.zarr") == 5
    assert_same(ran(tmp_path / "run.zarr"), whole["HMC"])


@pytest.mark.parametrize("kernel", ["HMC", "MALA"])
def test_warm_up_goes_on_from_any_iteration(tmp_path, whole, eager, kernel):
    path = tmp_path / "run.zarr"
    for index in (0, 4, 9, 16, 19):
        with pytest.raises(KeyboardInterrupt):
            ran(path, kernel=kernel, hook_fn=interrupt_at("warmup", index, raise_interrupt))
        assert read_tensors(path / "state.safetensors")[1]["numbers"]["iteration"] == index + 1
    assert_same(ran(path, kernel=kernel), whole[kernel])


@pytest.mark.slow
def test_warm_up_with_a_chain_far_away_goes_on(tmp_path, eager):
    """Chains that lag have a step size of their own, which is part of the state."""

    def program():
        pyro.sample("x", dist.StudentT(2.0, torch.zeros(3), 1.0).to_event(1))

    start = torch.randn(8, 3)
    start[0] += 1e7
    options = {"program": program, "data": (), "initial_params": {"x": start}, "superchains": 8}
    undisturbed, path, lags = ran(**options), tmp_path / "run.zarr", 0
    for index in (2, 6, 11, 15):
        with pytest.raises(KeyboardInterrupt):
            ran(path, hook_fn=interrupt_at("warmup", index, raise_interrupt), **options)
        lags += "lag" in read_tensors(path / "state.safetensors")[0]
    assert lags, "no chain lagged: the test asks nothing"
    assert_same(ran(path, **options), undisturbed)


def test_thinning_goes_on(tmp_path, eager):
    undisturbed = ran(thinning=3, num_samples=9)
    path = tmp_path / "run.zarr"
    for index in (0, 5):
        with pytest.warns(UserWarning, match="interrupted"):
            ran(path, thinning=3, num_samples=9, hook_fn=interrupt_at("sample", index, raise_interrupt))
    assert_same(ran(path, thinning=3, num_samples=9), undisturbed)


class Killed(BaseException):
    """What no handler of the package expects."""


def test_death_between_any_two_files(tmp_path, monkeypatch, eager):
    """Every write is made the last one, in turn; after each death the run goes on, and is bit for bit what it was."""
    options = {"warmup_steps": 2, "num_samples": 3, "kernel": "MALA"}
    undisturbed, path = ran(**options), tmp_path / "run.zarr"
    put, replace, left = zarr.storage.LocalStore.set, write_tensors, [0]

    def die():
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    async def dying_put(self, key, value):
        die()
        await put(self, key, value)

    def dying_replace(*args):
        die()
        replace(*args)

    monkeypatch.setattr(zarr.storage.LocalStore, "set", dying_put)
    monkeypatch.setattr("pyro_genmods.io.draw_store.write_tensors", dying_replace)
    deaths, most = 0, 0
    for allowed in range(0, 2000, 3):
        left[0] = allowed
        try:
            mcmc = ran(path, **options)
        except Killed:
            deaths += 1
            now = finished(path) if path.exists() else 0
            assert now >= most
            most = now
        else:
            break
    assert deaths > 10 and most >= 1
    assert_same(mcmc, undisturbed)
    left[0] = 10**9
    assert_same(ran(path, **options), undisturbed)


# -- killed -----------------------------------------------------------------------------------------------------------

SCRIPT = """
    import sys, torch, pyro, pyro.distributions as dist
    import pyro_genmods as gm
    from pyro_genmods.infer import recording

    path, kernel, samples, warmup, seconds = sys.argv[1], *sys.argv[2:]
    recording.SECONDS, recording.SHARE = float(seconds), 0.0

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(loc + scale * theta, 10.0), obs=y)

    kernel = getattr(gm.infer, kernel)(model, level="graph")
    store = None if path == "none" else path
    mcmc = gm.infer.MCMC(kernel, int(samples), int(warmup), 16, seed=5, store=store, progress_bar=False)
    print("running", flush=True)
    mcmc.run(torch.tensor([28.0, 8.0, -3.0, 7.0]))
    torch.set_printoptions(profile="full", precision=10)
    for name, x in (mcmc.get_samples() | mcmc.sample_stats).items():
        print(name, x.double().sum().item(), x.double().square().sum().item(), x.flatten()[-500:].tolist())
    print(mcmc.num_gradients)
"""


class Script:
    """A run in a process of its own."""

    def __init__(self, folder, *settings, seconds=0.0):
        self.folder, self.settings, self.seconds = folder, [str(x) for x in settings], seconds
        (folder / "script.py").write_text(textwrap.dedent(SCRIPT))

    def start(self, store, seconds=None):
        seconds = self.seconds if seconds is None else seconds
        command = [sys.executable, "script.py", store, *self.settings, str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=self.folder, env=environment)

    def output(self, store):
        child = self.start(store, 1.0)
        output, _ = child.communicate()
        assert child.returncode == 0
        return output

    def kill_after(self, store, condition, delay):
        """Start, wait for a condition, and some more; kill. Returns whether there was still something to kill."""
        child, deadline = self.start(store), time.monotonic() + 120
        while not condition() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.003)
        time.sleep(delay)
        child.kill()
        child.communicate()
        return child.returncode == -signal.SIGKILL


def progress(path):
    """Finished draws and iterations of warm-up, by the state alone."""
    if not path.exists():
        return (-1, -1)
    metadata = read_tensors(path / "state.safetensors")[1]
    return (metadata["draws"], metadata["numbers"]["iteration"])


def test_kill_9(tmp_path):
    script, path, rng = Script(tmp_path, "HMC", 1500, 100, seconds=0.1), tmp_path / "run.zarr", random.Random(1)
    whole = script.start("none")
    assert script.kill_after("run.zarr", lambda: progress(path) >= (100, 100), rng.random() * 0.3)
    reached = progress(path)
    assert reached >= (100, 100)
    posterior = xarray.open_zarr(path, group="posterior")
    assert reached[0] <= posterior.sizes["draw"] < 1500 and not bool(posterior["theta"].isnull().any())
    assert script.output("run.zarr") == whole.communicate()[0]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["HMC", "MALA"])
def test_eight_kills(tmp_path, kernel):  # in the warm-up and later
    script, path, rng = Script(tmp_path, kernel, 20000, 400), tmp_path / "run.zarr", random.Random(2)
    whole = script.output("none")
    reached, kills = (-1, -1), 0
    while kills < 8:
        before = reached
        kills += script.kill_after("run.zarr", lambda: progress(path) > before, rng.random() * 1.0)  # noqa: B023
        reached = progress(path)
        assert reached >= before, "finished draws were lost"
        assert reached[0] < 20000, "the run is too short for so many kills"
    assert script.output("run.zarr") == whole


# -- taken up in another way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["HMC", "MALA"])
def test_more_draws_extend_it(tmp_path, whole, kernel):
    path = tmp_path / "run.zarr"
    first = ran(path, kernel=kernel, num_samples=10)
    assert_same(ran(path, kernel=kernel), whole[kernel])
    assert torch.equal(first.unconstrained, whole[kernel].unconstrained[:, :10])
    assert xarray.open_zarr(path, group="posterior").sizes["draw"] == 24


def test_no_seed_is_that_of_the_store(tmp_path):
    path = tmp_path / "run.zarr"
    with pytest.warns(UserWarning, match="interrupted"):
        first = ran(path, seed=None, hook_fn=interrupt_at("sample", 6, raise_interrupt))
    pyro.set_rng_seed(99)
    mcmc = ran(path, seed=None)
    assert torch.equal(mcmc.unconstrained[:, :7], first.unconstrained)
    assert_same(mcmc, ran(seed=DrawStore.open(path).identity["seed"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chains": 16, "superchains": 2}, "num_chains was 8, is 16"),
        ({"warmup_steps": 30}, "warmup_steps was 20, is 30"),
        ({"thinning": 2}, "thinning was 1, is 2"),
        ({"seed": 4}, "seed was 3, is 4"),
        ({"superchains": 8}, "superchains was 2, is 8"),
        ({"num_samples": 20}, "num_samples=24, got 20"),
        ({"kernel": "MALA"}, "kernel was 'HMC', is 'MALA'"),
        ({"told": {"target_accept_prob": 0.9}}, "target_accept_prob was 0.651, is 0.9"),
        ({"told": {"step_size": 0.1}}, "step_size was None, is 0.1"),
        ({"told": {"num_steps": 4}}, "num_steps was None, is 4"),
        ({"told": {"adapt_mass_matrix": False}}, "adapt was .*scale.*, is "),
        ({"program": model, "data": (torch.cat([DATA, DATA]),)}, r"sites was .*'theta': \[4\].*, is .*'theta': \[8\]"),
        ({"program": model, "data": (DATA + 0.1,)}, "the model or data differ .* energy of chain 0"),
        ({"program": model, "data": (DATA, 4.9)}, "the model or data differ"),
        ({"program": lambda y: pyro.sample("x", dist.Normal(y.sum(), 1.0))}, "sites was .*, is {'x': "),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_refused(complete, change, message):
    before = contents(complete)
    with pytest.raises(FileFormatError, match=message) as caught:
        ran(complete, **change)
    assert "another path" in str(caught.value) and str(complete) in str(caught.value)
    assert contents(complete) == before


def test_what_does_not_matter_may_change(complete, whole):
    assert_same(ran(str(complete), progress_bar=True, told={"max_batch": 4}), whole["HMC"])


# -- damaged, or no store ---------------------------------------------------------------------------------------------


def copied(complete, tmp_path):
    subprocess.run(["cp", "-r", complete, tmp_path / "run.zarr"], check=True)
    return tmp_path / "run.zarr"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "state truncated": (lambda p: truncate(p / "state.safetensors"), "damaged .*truncated"),
    "state empty": (lambda p: (p / "state.safetensors").write_bytes(b""), "damaged"),
    "state missing": (lambda p: (p / "state.safetensors").unlink(), "no draw store; give another path"),
    "state of another kind": (lambda p: write_tensors(p / "state.safetensors", {}, {"kind": "model"}), "damaged"),
    "array missing": (lambda p: (p / "posterior" / "zarr.json").unlink(), "damaged"),
    "array damaged": (lambda p: truncate(p / "posterior" / "theta" / "zarr.json"), "damaged"),
    "rows missing": (lambda p: (p / "unconstrained_posterior/theta/c/0/0/0").unlink(), "draws are missing"),
    "rows truncated": (lambda p: truncate(p / "unconstrained_posterior/theta/c/0/0/0"), "damaged"),
    "statistics truncated": (lambda p: truncate(p / "sample_stats/lp/c/0/0"), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_left_alone(complete, tmp_path, name):
    path, (spoil, message) = copied(complete, tmp_path), DAMAGE[name]
    spoil(path)
    before = contents(path)
    with pytest.raises(FileFormatError, match=message) as caught:
        ran(path).get_samples()
    assert str(path) in str(caught.value)
    assert contents(path) == before


def test_other_things_are_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    zarr.open_group(tmp_path / "foreign.zarr", mode="w").create_array("x", shape=(2,), dtype="int8")
    before = contents(tmp_path)
    for name in ("folder", "file", "foreign.zarr"):
        with pytest.raises(FileFormatError, match=f"{name} is there already and is no draw store; give another path"):
            ran(tmp_path / name)
        with pytest.raises(OSError):
            DrawStore.create(tmp_path / name, {"posterior": {"x": torch.zeros(2, 1)}}, {})
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "foreign.zarr"]


def test_an_empty_folder_will_do(tmp_path, whole):
    (tmp_path / "run.zarr").mkdir()
    assert_same(ran(tmp_path / "run.zarr"), whole["HMC"])


def test_a_broken_start_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("pyro_genmods.io.draw_store.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        ran(tmp_path / "run.zarr")
    assert os.listdir(tmp_path) == []


# -- the store by itself ----------------------------------------------------------------------------------------------


def test_all_dtypes_and_shapes(tmp_path):
    def make(n):
        return {
            "posterior": {
                "half": torch.randn(2, n).half(),
                "double": torch.randn(2, n, 3, 1).double(),
                "empty": torch.zeros(2, n, 0),
                "whole": torch.randint(-9, 9, (2, n, 2)),
                "flag": torch.rand(2, n) < 0.5,
                "none": torch.zeros(2, n, dtype=torch.bool),
                "c": torch.randn(2, n),
            }
        }

    parts = [make(n) for n in (5, 1, 7)]
    store = DrawStore.create(tmp_path / "run.zarr", parts[0], {})
    for i, part in enumerate(parts):
        store.append(part, {"i": torch.tensor(i)}, {"inf": float("inf")})
        again = DrawStore.open(tmp_path / "run.zarr")
        assert again.numbers == {"inf": float("inf")} and int(again.tensors["i"]) == i
        for name, x in again.read("posterior").items():
            expected = torch.cat([before["posterior"][name] for before in parts[: i + 1]], 1)
            assert x.dtype == expected.dtype and torch.equal(x, expected)
    assert torch.equal(store.read("posterior", 4, 6)["c"], again.read("posterior")["c"][:, 4:6])


@pytest.mark.parametrize("names", [("chain",), ("draw",), ("a/b", "a.b")])
def test_names_that_a_store_cannot_hold(tmp_path, names):
    example = {"posterior": {name: torch.zeros(2, 1) for name in names}}
    with pytest.raises(ValueError, match="store: cannot hold sites called"):
        DrawStore.create(tmp_path / "run.zarr", example, {})
    assert os.listdir(tmp_path) == []


def test_the_bar_starts_where_the_run_is(tmp_path, monkeypatch):
    path, bars = tmp_path / "run.zarr", []
    with pytest.warns(UserWarning, match="interrupted"):
        ran(path, hook_fn=interrupt_at("sample", 6, raise_interrupt))
    bar = draws_module.tqdm
    monkeypatch.setattr(draws_module, "tqdm", lambda **options: bars.append(options) or bar(**options))
    ran(path, progress_bar=True)
    assert (bars[0]["initial"], bars[0]["total"]) == (27, 44)


@pytest.mark.slow
def test_a_compiled_run_goes_on(tmp_path):
    """What is compiled rounds differently, so that the level is part of the state."""

    def run(store=None, hook_fn=None):
        kernel = gm.infer.HMC(model, level="auto")
        mcmc = gm.infer.MCMC(kernel, 3000, 20, 8, seed=3, store=store, hook_fn=hook_fn, progress_bar=False)
        mcmc.run(DATA)
        return mcmc

    undisturbed = run()
    for index in (1, 20, 1000):
        with pytest.warns(UserWarning, match="interrupted"):
            run(tmp_path / "run.zarr", interrupt_at("sample", index, raise_interrupt))
    assert_same(run(tmp_path / "run.zarr"), undisturbed)
