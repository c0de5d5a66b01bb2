"""Files: what is saved comes back bit for bit, what is not ours or not whole is refused, and nothing in a file runs."""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import json
import math
import os
import pickle
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import pyro
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.nn.utils import parametrizations

import pyro_genmods as gm
from pyro_genmods import io
from pyro_genmods.foundation.errors import FileFormatError
from pyro_genmods.io.allowlist import AllowList

import zuko  # isort: skip

F, T = zuko.flows, zuko.transforms
FLOWS = {
    "NSF": functools.partial(F.NSF, hidden_features=(8,), bins=4),
    "MAF": functools.partial(F.MAF, hidden_features=(8, 8), randperm=True, activation=nn.ELU),
    "NICE": functools.partial(F.NICE, hidden_features=(8,), activation=nn.SiLU),
    "NAF": functools.partial(F.NAF, hidden_features=(8,), signal=4, network={"hidden_features": (8,)}),
    "UNAF": functools.partial(F.UNAF, hidden_features=(8,), signal=4, network={"hidden_features": (8,)}),
    "SOSPF": functools.partial(F.SOSPF, hidden_features=(8,), degree=2),
    "BPF": functools.partial(F.BPF, hidden_features=(8,), degree=6),
    "GF": functools.partial(F.GF, components=4),
    "NCSF": functools.partial(F.NCSF, hidden_features=(8,), bins=4),
    "CNF": functools.partial(F.CNF, hidden_features=(8,), freqs=2),
    "GMM": functools.partial(zuko.mixtures.GMM, components=3),
}


def assert_same_law(model, other, rows=4):
    """Equal log densities, bit for bit, of points of the support; equal pushes where scoring solves for roots."""
    dtype = model.place[0]
    c = torch.randn(rows, *model.context_shape, dtype=dtype) if model.context_shape else None
    z = 0.8 * torch.randn(rows, model.features, dtype=dtype)
    if getattr(model, "root_finding", False) and model.direction == "sampling":
        assert torch.equal(model(c).push(z), other(c).push(z))
        return
    x, _ = model.coordinates.push(z)
    log_prob = model(c).log_prob(x)
    assert not log_prob.isnan().any()
    assert torch.equal(log_prob, other(c).log_prob(x))


def round_trip(model, path, **kwargs):
    io.save(model, path)
    loaded = io.load(path, **kwargs)
    again = path.with_suffix(".again")
    io.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    return loaded


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "prior.safetensors"


@pytest.fixture(autouse=True)
def hasty_disk(monkeypatch):
    """Nobody pulls the plug during the tests."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def gmm() -> gm.Flow:
    return gm.Flow(zuko.mixtures.GMM(2, components=2))


# -- round trips ------------------------------------------------------------------------------------------------------


def test_every_flow_of_zuko_is_tried():
    named = {n for n, v in vars(F).items() if isinstance(v, type) and issubclass(v, zuko.lazy.LazyDistribution)}
    abstract = {"Flow", "LazyDistribution", "UnconditionalDistribution"}
    assert named - abstract == {*FLOWS, "RealNVP"}
    assert issubclass(F.RealNVP, F.NICE)


@pytest.mark.parametrize("direction", ["density", "sampling"])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_comes_back_bit_for_bit(name, context, direction, path):
    model = gm.Flow(FLOWS[name](3, context=context), direction=direction)
    assert_same_law(model, round_trip(model, path))
    if name != "NCSF":
        model.standardize(3 * torch.randn(40, 3) + 1, 5 * torch.randn(40, 2) if context else None)
    loaded = round_trip(model.eval(), path)
    assert_same_law(model, loaded)
    assert (loaded.direction, loaded.cost, loaded.root_finding) == (model.direction, model.cost, model.root_finding)
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]


SUPPORTS = {
    "positive": constraints.positive,
    "simplex": constraints.simplex,
    "interval": constraints.interval(-1.0, 2.5),
    "tensor interval": constraints.interval(torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([0.0, 4.0, 0.75])),
    "independent": constraints.independent(constraints.greater_than(0.1), 1),
    "corr_cholesky": constraints.corr_cholesky,
    "pyro's own": pyro.distributions.constraints.softplus_positive,
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports_come_back(name, path):
    model = gm.Flow(FLOWS["MAF"](3), support=SUPPORTS[name])
    model.standardize(model().sample((50,)))
    loaded = round_trip(model, path)
    assert_same_law(model, loaded)
    assert str(loaded.support) == str(model.support)
    assert type(loaded.support) is type(model.support)
    assert loaded.event_shape == model.event_shape


def test_event_shape_and_integer_support_bounds(path):
    model = gm.Flow(FLOWS["NICE"](6), event_shape=(2, 3), support=constraints.interval(0, 1))
    loaded = round_trip(model, path)
    assert_same_law(model, loaded)
    assert loaded().event_shape == Size([2, 3])


def softclipped():
    flow = FLOWS["NSF"](3)
    flow.transform.transforms.insert(1, zuko.lazy.UnconditionalTransform(T.SoftclipTransform, bound=11.0))
    return flow


def customised():
    inner = F.MaskedAutoregressiveTransform(3, hidden_features=(8,), residual=True)
    rotation = zuko.lazy.UnconditionalTransform(T.RotationTransform, torch.randn(3, 3))
    permutation = zuko.lazy.UnconditionalTransform(T.PermutationTransform, torch.tensor([2, 0, 1]), buffer=True)
    spline = F.GeneralCouplingTransform(
        3,
        mask=[True, False, True],
        univariate=functools.partial(T.MonotonicRQSTransform, slope=1e-2),
        shapes=[(4,), (4,), (3,)],
    )
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, loc=torch.zeros(3), scale=torch.ones(3), buffer=True
    )
    return zuko.lazy.Flow([inner, rotation, inner.inv, permutation, spline], base)


VARIANTS = {
    "one feature": lambda: FLOWS["NSF"](1),
    "coupling by passes": lambda: FLOWS["NSF"](4, passes=2),
    "adjacency": lambda: FLOWS["MAF"](2, adjacency=torch.tensor([[1, 0], [1, 1]], dtype=torch.bool), randperm=False),
    "normalised": lambda: FLOWS["NICE"](3, normalize=True),
    "diagonal mixture": lambda: zuko.mixtures.GMM(3, covariance_type="diagonal", tied=True),
    "user's transform inserted": softclipped,
    "user's composition": customised,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_come_back(name, path):
    model = gm.Flow(VARIANTS[name]())
    assert_same_law(model, round_trip(model, path))


def test_what_was_shared_stays_shared(path):
    loaded = round_trip(gm.Flow(customised()), path)
    first, _, inverse, *_ = loaded.flow.transform.transforms
    assert inverse.transform is first
    tied = FLOWS["NICE"](2, transforms=2)
    one, two = (t.hyper[0] for t in tied.transform.transforms)
    two.weight = one.weight
    loaded = round_trip(gm.Flow(tied), path)
    one, two = (t.hyper[0] for t in loaded.flow.transform.transforms)
    assert one.weight is two.weight


def test_trained_values_come_back_after_an_optimiser(path):
    model = gm.Flow(FLOWS["MAF"](2))
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model.loss(torch.randn(20, 2)).mean().backward()
        optimiser.step()
    assert_same_law(model, round_trip(model, path))


# -- dtypes, devices, flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NSF", "NAF", "GMM"])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_dtype_is_the_models_not_the_process(name, default, path):
    models = [gm.Flow(FLOWS[name](2, context=1)), gm.Flow(FLOWS[name](2, context=1)).double()]
    for model in models:
        io.save(model, path)
        torch.set_default_dtype(default)
        try:
            loaded = io.load(path)
        finally:
            torch.set_default_dtype(torch.float32)
        assert loaded.place == model.place
        assert_same_law(model, loaded)


def test_mixed_dtypes_are_kept(path):
    model = gm.Flow(FLOWS["NICE"](3))
    model.flow.transform.transforms[1].double()
    model.flow.base.half()
    loaded = round_trip(model, path)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_file_has_no_device(path, device):
    model = gm.Flow(FLOWS["NSF"](2)).to(device)
    io.save(model, path)
    with torch.device("meta"):
        loaded = io.load(path)
    assert loaded.place[1] == torch.device("cpu")
    assert_same_law(copy.deepcopy(model).cpu(), loaded)
    assert io.load(path, map_location=device).place[1] == model.place[1]
    for where in ("meta", torch.device("meta")):
        moved = io.load(path, map_location=where)
        assert {t.device.type for t in moved.state_dict().values()} == {"meta"}


def test_flags_come_back(path):
    model = gm.Flow(FLOWS["NAF"](2))
    model.flow.transform.transforms[0].requires_grad_(False)
    model.flow.transform.transforms[2].eval()
    loaded = round_trip(model, path)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]
    frozen = round_trip(model.freeze(), path)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training


def test_attributes_changed_after_construction_come_back(path):
    model = gm.Flow(FLOWS["NICE"](2))
    model.direction = "sampling"
    model.note = "trained in May"
    loaded = round_trip(model, path)
    assert (loaded.direction, loaded.note) == ("sampling", "trained in May")
    assert_same_law(model, loaded)
    assert io.describe(path)["changes"] == {"": {"direction": "sampling", "note": "trained in May"}}


def test_saving_and_loading_take_no_random_numbers_and_change_nothing(path):
    model = shifted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    io.save(model, path)
    io.load(path, allow=ALLOW)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_describe_reads_without_building(path, monkeypatch):
    model = gm.Flow(FLOWS["NSF"](2, context=1), support=constraints.positive).double()
    model.standardize(torch.rand(30, 2, dtype=torch.float64) + 1, torch.rand(30, 1, dtype=torch.float64))
    io.save(model, path)
    monkeypatch.setattr("pyro_genmods.io.files.Reader", None)
    found = io.describe(path)
    assert found["schema"] == 1
    assert found["class"] == "pyro_genmods.transform.flow.Flow"
    assert (found["event_shape"], found["context_shape"]) == ([2], [1])
    assert (found["density"], found["dtype"]) == ("EXACT", "float64")
    assert found["support"] == str(model.support)
    assert found["standardization"]["mean"] == model.coordinates.standardization.shift.tolist()
    assert found["context_standardization"]["scale"] == model.context_standardization.scale.tolist()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["versions"]) == {"python", "pyro-genmods", "torch", "pyro-ppl", "zuko", "safetensors"}


def test_any_safetensors_reader_opens_it(path, gmm):
    io.save(gmm, path)
    tensors = safetensors.torch.load_file(path)
    assert {f"model.{k}" for k in gmm.state_dict()} == set(tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["pyro_genmods"])["metadata"]["kind"] == "model"


# -- models of the user's own -----------------------------------------------------------------------------------------


class Mood(enum.Enum):
    CALM = "calm"


@dataclass(frozen=True)
class Schedule:
    """A record, as a user's mechanism may take one."""

    times: tuple[float, ...]
    shift: Tensor


class Scaler(nn.Module):
    """A network of the user's: parameter, transient buffer, function attribute, a private list of modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.register_buffer("origin", torch.randn(width), persistent=False)
        self.activation = torch.tanh
        self.stages = [nn.Linear(width, width)]
        self.limits = {"low": -math.inf, 3: [True, None]}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.origin) + self.stages[0](self.scale)


class Shifted(gm.GenerativeModel):
    """A normal law shifted by what its arguments say; takes arguments of every form."""

    density = gm.Density.EXACT

    def __init__(self, network, *shifts, schedule, inner=None, dtype=torch.float32, mood=Mood.CALM, **options) -> None:
        super().__init__((2,), support=constraints.real)
        self.network, self.schedule, self.inner, self.options = network, schedule, inner, options
        self.total = sum(shifts) + len(options)
        self.dtype, self.mood = dtype, mood
        self.bias = nn.Parameter(torch.randn(2))

    @property
    def cost(self) -> gm.Cost:
        return gm.Cost(1, 1)

    def log_prob_rows(self, y, c):
        z = self.network(y) + self.bias + self.total + self.schedule.shift + sum(self.schedule.times)
        return self.base_distribution().log_prob(z)

    def push_rows(self, z, c):
        return z


def shifted():
    return Shifted(
        Scaler(2),
        1.5,
        torch.tensor([1.0, 2.0]),
        schedule=Schedule((0.1, 0.2), torch.randn(2)),
        inner=gm.Flow(FLOWS["GMM"](2)),
        mood=Mood.CALM,
        power=3,
    )


ALLOW = (Shifted, Scaler, Schedule, Mood)


def test_a_users_own_mechanism_comes_back(path):
    model = shifted()
    loaded = round_trip(model, path, allow=ALLOW)
    x = torch.randn(5, 2)
    assert torch.equal(model().log_prob(x), loaded().log_prob(x))
    assert (loaded.mood, loaded.dtype, loaded.options) == (Mood.CALM, torch.float32, {"power": 3})
    assert loaded.network.limits == model.network.limits
    assert_same_law(model.inner, loaded.inner)
    assert "origin" not in loaded.state_dict()


def test_defaults_are_those_of_the_day_it_was_saved(path, monkeypatch):
    io.save(shifted(), path)
    monkeypatch.setitem(Shifted.__init__.__kwdefaults__, "dtype", torch.float64)
    assert io.load(path, allow=ALLOW).dtype == torch.float32


def test_tensors_outside_the_state_come_back_in_full_precision(path):
    """Transient buffers and hidden modules are no part of the ``state_dict``."""
    model = shifted().double()
    model.network.origin.normal_()
    model.network.stages[0].double()
    torch.nn.init.normal_(model.network.stages[0].weight)
    loaded = round_trip(model, path, allow=ALLOW)
    x = torch.randn(5, 2, dtype=torch.float64)
    assert torch.equal(model().log_prob(x), loaded().log_prob(x))


@pytest.mark.parametrize("missing", ALLOW, ids=lambda c: c.__name__)
def test_a_users_own_class_must_be_allowed(missing, path):
    io.save(shifted(), path)
    with pytest.raises(
        FileFormatError, match=rf"{missing.__name__}' *, which is outside.*allow=\[{missing.__name__}\]"
    ):
        io.load(path, allow=[item for item in ALLOW if item is not missing])


def test_a_class_from_a_script_is_found_by_its_own_name(path, monkeypatch):
    monkeypatch.setattr(Scaler, "__module__", "__main__")
    io.save(shifted(), path)
    monkeypatch.undo()
    assert isinstance(io.load(path, allow=ALLOW).network, Scaler)


def test_a_renamed_class_and_a_lost_argument_are_named(path):
    io.save(gm.Flow(FLOWS["NSF"](2)), path)
    forge(path, lambda m: m["model"]["model"].update({"class": "pyro_genmods.transform.flow:Stream"}))
    with pytest.raises(FileFormatError, match=r"flow:Stream'.*lacks.*saved with.*zuko"):
        io.load(path)
    io.save(gm.Flow(FLOWS["NSF"](2)), path)
    forge(path, lambda m: m["model"]["model"]["arguments"].update({"viscosity": 1.0}))
    with pytest.raises(FileFormatError, match="Flow of this version takes no argument viscosity"):
        io.load(path)
    io.save(gm.Flow(FLOWS["NSF"](2)), path)
    forge(path, lambda m: m["model"]["model"]["arguments"].update({"event_shape": {"tuple": [9]}}))
    with pytest.raises(FileFormatError, match=r"Flow refuses the arguments.*has 9 coordinates"):
        io.load(path)


# -- what cannot be written -------------------------------------------------------------------------------------------


def lambda_flow():
    flow = FLOWS["NICE"](2)
    flow.transform.transforms[0].univariate = lambda shift, scale: T.MonotonicAffineTransform(shift, scale)
    return gm.Flow(flow)


def locked():
    flow = FLOWS["NICE"](2)
    flow.transform.transforms[0].guard = threading.Lock()
    return gm.Flow(flow)


def overridden():
    model = gm.Flow(FLOWS["NICE"](2))
    model.flow.transform.transforms[0].hyper.forward = torch.tanh
    return model


def hooked():
    model = gm.Flow(FLOWS["NICE"](2))
    model.flow.transform.transforms[0].register_forward_hook(lambda *_: None)
    return model


def replaced():
    model = gm.Flow(FLOWS["NICE"](2))
    model.flow = F.MAF(2)
    return model


def parametrized():
    flow = FLOWS["NICE"](2)
    parametrizations.weight_norm(flow.transform.transforms[0].hyper[0])
    return gm.Flow(flow)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda_flow, r"<lambda> was made on the fly"),
        (locked, r"Flow\.flow\.transform\.transforms\.0\.guard: got a _thread\.lock.*plain data"),
        (overridden, r"transforms\.0\.hyper\.forward: the instance overrides.*subclass"),
        (hooked, r"transforms\.0: has forward hooks.*remove"),
        (replaced, r"replaced after construction|cannot be rebuilt"),
        (parametrized, r"made on the fly.*parametrizations"),
    ],
)
def test_what_is_not_data_is_refused_and_named(build, message, path):
    with pytest.raises(TypeError, match=message):
        io.save(build(), path)
    assert not path.exists()


def test_only_a_model_is_saved_as_a_model(path, gmm):
    for other in (gmm.flow, nn.Sequential(gmm), gmm()):
        with pytest.raises(TypeError, match=r"model: got a \w+, needs a generative model.*module\.prior"):
            inspect.unwrap(io.save)(other, path)


def test_metadata_and_tensors_that_no_file_can_hold(path):
    io.write_tensors(path, {"x": torch.ones(1)}, {})
    before = path.read_bytes()
    for tensors, metadata in (
        ({"x": torch.ones(2)}, {"f": open}),
        ({"x": torch.ones(2, dtype=torch.complex128)}, {}),
        ({"x": torch.ones(2).to_sparse()}, {}),
        ({"x": torch.ones(2, device="meta")}, {}),
        ({"__metadata__": torch.ones(2)}, {}),
    ):
        with pytest.raises(TypeError):
            io.write_tensors(path, tensors, metadata)
    assert path.read_bytes() == before


# -- tensors and metadata ---------------------------------------------------------------------------------------------


def test_tensors_of_every_form_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "state.safetensors"
    x = torch.randn(3, 4)
    tensors = {
        "whole": x,
        "row": x[1],
        "transposed": x.T,
        "expanded": x[:1].expand(5, 4),
        "scalar": torch.tensor(2**53, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "bool": x > 0,
        "half": x.half(),
        "brain": x.bfloat16(),
        "graph": nn.Parameter(x) * 2,
        "odd": torch.tensor([math.nan, math.inf, -0.0, 5e-324], dtype=torch.float64),
    }
    metadata = {"epoch": 3, "loss": math.inf, "sha256": "0" * 64, 'quo"te\\': ["ü", None, {"sha256": "1" * 64}]}
    io.write_tensors(path, tensors, metadata)
    first = path.read_bytes()
    found, described = io.read_tensors(path)
    assert described == metadata
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    found["whole"].zero_()
    io.write_tensors(path, tensors, metadata)
    assert path.read_bytes() == first


def test_writing_is_all_or_nothing(path, monkeypatch):
    io.write_tensors(path, {"x": torch.ones(3)}, {"epoch": 1})

    def fail(*args):
        raise OSError("the disk is full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="the disk is full"):
                io.write_tensors(path, {"x": torch.zeros(3)}, {"epoch": 2})
        assert io.read_tensors(path)[1] == {"epoch": 1}
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_link_is_followed_and_rights_are_those_of_a_new_file(tmp_path):
    (tmp_path / "store").mkdir()
    link, plain = tmp_path / "latest", tmp_path / "plain"
    link.symlink_to(tmp_path / "store" / "v1")
    io.write_tensors(link, {}, {"version": 1})
    plain.write_bytes(b"")
    assert link.is_symlink()
    assert io.read_tensors(tmp_path / "store" / "v1") == ({}, {"version": 1})
    assert (tmp_path / "store" / "v1").stat().st_mode == plain.stat().st_mode


# -- files that are not ours, or not whole ----------------------------------------------------------------------------


def test_truncated_anywhere(path, gmm):
    io.save(gmm, path)
    whole = path.read_bytes()
    for length in [*range(80), *range(80, len(whole) - 1, 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        for read in (io.load, io.read_tensors, io.describe):
            with pytest.raises(FileFormatError, match=str(path)):
                read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError, match="truncated or altered"):
        io.load(path)


def test_one_flipped_byte_anywhere(path, gmm):
    def complaints(places, read):
        whole = path.read_bytes()
        for place in places(whole):
            for flip in (0x01, 0x29, 0x80):  # 0x29 turns the padding of the header into tabs, which JSON does not mind
                path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
                with pytest.raises(FileFormatError):
                    read(path)

    io.write_tensors(path, {"x": torch.ones(2)}, {"epoch": 1})
    complaints(lambda whole: range(len(whole)), io.read_tensors)
    io.save(gmm, path)
    complaints(lambda whole: range(8, len(whole), 11), io.load)


def test_a_newer_schema_is_refused_before_anything_else(path, gmm, monkeypatch):
    monkeypatch.setattr(io.files, "SCHEMA", 2)
    io.save(gmm, path)
    monkeypatch.undo()
    for read in (io.load, io.read_tensors, io.describe):
        with pytest.raises(FileFormatError, match=r"schema 2 is newer.*reads up to 1.*upgrade"):
            read(path)


def test_files_of_others_are_refused(path):
    path.write_bytes(safetensors.torch.save({"x": torch.ones(3)}, metadata={"format": "pt"}))
    with pytest.raises(FileFormatError, match="not written by pyro_genmods"):
        io.load(path)
    path.write_bytes(safetensors.torch.save({"x": torch.ones(3)}))
    with pytest.raises(FileFormatError, match="not written by pyro_genmods"):
        io.load(path)
    for content in (
        pickle.dumps({"x": 1}),
        b"a text file\nof two lines\n",
        b"{}",
        b"PK\x03\x04" + bytes(60),
        bytes(99),
    ):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="not a safetensors file"):
            io.load(path)
    with pytest.raises(FileNotFoundError):
        io.load(path.with_name("nowhere"))


def test_a_checkpoint_is_not_a_model(path):
    io.write_tensors(path, {"x": torch.ones(3)}, {"kind": "checkpoint"})
    with pytest.raises(FileFormatError, match="holds no model but 'checkpoint'"):
        io.load(path)


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_refused(path, content, framed):
    header = len(content).to_bytes(8, "little") + content
    path.write_bytes(header if framed else content)
    with pytest.raises(FileFormatError):
        io.load(path)


def test_a_bottomless_header_is_refused(path):
    for deep in ("[" * 100_000, '{"a":' * 100_000):
        content = json.dumps({"__metadata__": {"pyro_genmods": deep}}).encode()
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        with pytest.raises(FileFormatError):
            io.load(path)
    io.write_tensors(path, {}, {"kind": "model", "model": functools.reduce(lambda a, _: [a], range(600), 0)})
    with pytest.raises(FileFormatError):
        io.load(path)


# -- hostile files ----------------------------------------------------------------------------------------------------

WATCHED = {"os.system", "os.remove", "os.rename", "os.exec", "os.posix_spawn", "os.putenv", "subprocess.Popen"}
WATCHED |= {"exec", "compile", "import", "pickle.find_class", "socket.connect", "shutil.rmtree", "ctypes.dlopen"}
_seen: list[tuple] = []
_watching = threading.Event()


def _of_the_type_checker() -> bool:
    """The instrumented package compiles its complaints about wrong types; that is the tests' own doing."""
    frame = sys._getframe(2)
    while frame and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and any(name in frame.f_code.co_filename for name in ("jaxtyping", "beartype"))


def _watch(event, args):
    suspect = event in WATCHED or (event == "open" and args[1] not in ("r", "rb", None))
    if _watching.is_set() and suspect and not _of_the_type_checker():
        _seen.append((event, args))


@pytest.fixture(scope="module")
def watchman():
    sys.addaudithook(_watch)
    return _seen


class watched:
    """What runs inside must neither import, compile, execute, spawn, delete nor write."""

    def __enter__(self):
        _seen.clear()
        _watching.set()

    def __exit__(self, *error):
        _watching.clear()
        assert _seen == []


def forge(path, change):
    """Change the metadata of a file, with a valid digest."""
    tensors, metadata = io.read_tensors(path)
    change(metadata)
    io.write_tensors(path, tensors, metadata)


HOSTILE = [
    "os:system",
    "posix:system",
    "builtins:eval",
    "builtins:exec",
    "builtins:open",
    "subprocess:Popen",
    "pickle:loads",
    "shutil:rmtree",
    "torch.serialization:load",
    "torch.hub:load",
    "torch.nn.modules.module:torch",
    "torch.nn.modules:os",
    "torch.nn.modules.linear:math",
    "zuko.utils:np",
    "zuko.utils:np.load",
    "zuko.utils:bisection",
    "zuko.utils:math",
    "zuko.flows.spline:partial",
    "zuko.flows.spline:NSF.__init__.__globals__",
    "zuko.flows.spline:NSF.forward",
    "zuko.flows:NSF",
    "pyro_genmods:__builtins__",
    "pyro_genmods.io:save",
    "pyro_genmods.io.files:write_tensors",
    "pyro_genmods.io.files:os",
    "pyro_genmods.io.files:os.remove",
    "pyro_genmods.io.reader:Reader",
    "pyro_genmods.transform.flow:nn",
    "pyro_genmods.foundation.networks:detached_copy",
    "pyro_genmods.distribution:_check_place",
    "antigravity:fly",
    "torch:load",
    "torch.nn.functional:torch",
    "__main__:anything",
    "",
    ":",
    "zuko",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_everywhere(name, path, gmm, watchman, monkeypatch):
    canary = []
    for module, function in ((os, "system"), (os, "remove")):
        monkeypatch.setattr(module, function, lambda *a: canary.append(a))
    io.save(gmm, path)
    whole = path.read_bytes()
    io.load(path)  # whatever is imported lazily is imported now
    module = {"class": name, "attributes": {"x": "touch /tmp/pwned"}}
    call = {"partial": [{"callable": name}, ["touch /tmp/pwned"], {"dict": []}]}
    nodes = [{"callable": name}, call, {"constraint": name}, {"object": module}, {"module": module}]
    nodes += [{"enum": [name, "x"]}, {"model": {"class": name, "arguments": {"command": "id"}, "state": {}}}]
    for node in nodes:
        for change in (
            lambda m, node=node: m["model"]["model"]["arguments"].update(flow=node),
            lambda m, node=node: m["model"]["model"]["arguments"]["flow"]["module"]["attributes"].update(f=node),
            lambda m, node=node: m.update(model=node),
            lambda m, node=node: m["changes"].update({"": {"f": node}}),
        ):
            path.write_bytes(whole)
            forge(path, change)
            with watched(), pytest.raises(FileFormatError):
                io.load(path)
    assert canary == []


def test_names_resolve_to_what_computes_on_tensors_and_to_nothing_else():
    """Try every name of every imported module: what resolves is a class of the listed kinds, or a listed function."""
    kinds = (nn.Module, Transform, Distribution, constraints.Constraint, enum.Enum)
    allowed, found = AllowList(), {}
    roots = (
        "pyro",
        "zuko",
        "pyro_genmods",
        "torch.nn",
        "torch.distributions",
        "torch.serialization",
        "torch.hub",
        "os",
    )
    for module_name, module in list(sys.modules.items()):
        if module_name != "torch" and not f"{module_name}.".startswith(tuple(f"{root}." for root in roots)):
            continue
        for attribute in list(vars(module)) if isinstance(module, types.ModuleType) else ():
            try:
                found[f"{module_name}:{attribute}"] = allowed.callable(f"{module_name}:{attribute}")
            except FileFormatError:
                continue
    functions = {name for name, item in found.items() if not isinstance(item, type)}
    named = {name for name in functions if name.startswith(("torch:", "torch.nn.functional:"))}
    assert functions - named == {"zuko.flows.spline:CircularRQSTransform", "zuko.flows.polynomial:ShiftedSOSPTransform"}
    assert len(named) == 20
    for name, item in found.items():
        if isinstance(item, type):
            package = item.__module__.partition(".")[0]
            assert package in {"torch", "pyro", "zuko", "pyro_genmods"}, name
            assert issubclass(item, kinds) or package == "pyro_genmods", name
            assert not item.__module__.startswith(("pyro_genmods.io", "pyro_genmods.training", "pyro_genmods.infer")), (
                name
            )
    for cls in (F.NSF, zuko.lazy.UnconditionalTransform, nn.Linear, gm.Flow, T.SoftclipTransform):
        assert found[f"{cls.__module__}:{cls.__qualname__}"] is cls


METHODS = ["forward", "__class__", "__call__", "__dict__", "_call_impl", "_compiled_call_impl", "training", "to"]
METHODS += ["_parameters", "_modules", "_load_from_state_dict", "state_dict", "_forward_hooks", "call_super_init", ""]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("slot", ["attributes", "parameters", "buffers", "children", "changes"])
def test_a_file_cannot_replace_what_a_class_does(name, slot, path, gmm):
    io.save(gmm, path)
    values = {"attributes": {"callable": "torch:tanh"}, "children": None, "changes": {"callable": "torch:tanh"}}
    value = values.get(slot, "model.flow.phi.0")

    def change(metadata):
        flow = metadata["model"]["model"]["arguments"]["flow"]["module"]
        target = metadata["changes"].setdefault("flow", {}) if slot == "changes" else flow.setdefault(slot, {})
        target[name] = value

    forge(path, change)
    with pytest.raises(FileFormatError, match=r"may not set it|for a name"):
        io.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["model"]["model"]["state"].popitem(),
        lambda m: m["model"]["model"]["state"].update({"more": "model.flow.phi.0"}),
        lambda m: m["model"]["model"]["state"].update({"flow.phi.0": "model.flow.phi.1"}),
        lambda m: m["model"]["model"]["state"].update({"flow.phi.0": "nowhere"}),
        lambda m: m["model"]["model"]["arguments"].clear(),
        lambda m: m["model"]["model"]["arguments"].update(flow={"same": 0}),
        lambda m: m["model"]["model"]["arguments"].update(flow={"same": True}),
        lambda m: m["model"]["model"]["arguments"].update(flow={"same": -1}),
        lambda m: m["model"]["model"]["arguments"].update(flow={"tensor": "model.flow.phi.0"}),
        lambda m: m["model"]["model"]["arguments"].update(
            support={"object": {"class": "torch.nn.modules.linear:Linear"}}
        ),
        lambda m: m["model"]["model"].update({"class": "pyro_genmods.contract:GenerativeModel"}),
        lambda m: m["model"]["model"].update({"class": "torch.nn.modules.linear:Linear"}),
        lambda m: m["model"]["model"]["arguments"]["flow"]["module"].update(
            {"class": "pyro_genmods.transform.flow:Flow"}
        ),
        lambda m: m["model"]["model"]["arguments"]["flow"]["module"]["children"].update(phi={"same": 1}),
        lambda m: m.update(model=m["model"]["model"]["arguments"]["flow"]),
        lambda m: m.update(model=None),
        lambda m: m.pop("model"),
        lambda m: m.pop("changes"),
        lambda m: m.pop("frozen"),
        lambda m: m.update(training="yes"),
        lambda m: m.update(changes={"nowhere": {"x": 1}}),
    ],
)
def test_a_wrong_description_is_refused(change, path, gmm):
    io.save(gmm, path)
    forge(path, change)
    with pytest.raises(FileFormatError, match=str(path)):
        io.load(path)


KINDS = ["float", "size", "dtype", "device", "enum", "parameter", "tensor", "tuple", "dict", "partial", "callable"]
KINDS += ["constraint", "object", "module", "model", "same", "what"]
WORDS = ["", "x", "flow", "forward", "__class__", "inf", "float32", "cpu", "model.flow.phi.0", "class", "attributes"]
WORDS += ["os:system", "builtins:eval", "zuko.utils:Partial", "zuko.lazy:UnconditionalTransform", "zuko.mixtures:GMM"]
WORDS += ["zuko.utils:np", "torch.nn.modules.container:Sequential", "pyro_genmods.transform.flow:Flow", "torch:tanh"]
SLOTS = ["class", "attributes", "parameters", "buffers", "children", "transient", "arguments", "state"]
scalars = st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from(WORDS) | st.floats(-2, 2)


def containers(inner):
    parts = st.dictionaries(st.sampled_from(SLOTS + WORDS), inner, max_size=4)
    return st.lists(inner, max_size=3) | parts | st.dictionaries(st.sampled_from(KINDS), inner, min_size=1, max_size=1)


def places(node, trail=()):
    """Every place in a JSON value."""
    yield trail
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*trail, key))


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Tensors and metadata of two honest files."""
    path = tmp_path_factory.mktemp("honest") / "prior.safetensors"
    files = []
    for flow in (F.NICE(2, transforms=2, hidden_features=(4,)), zuko.mixtures.GMM(2)):
        io.save(gm.Flow(flow), path)
        io.load(path)
        files.append(io.read_tensors(path))
    return files


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_descriptions_load_or_are_refused_and_never_run(path, watchman, honest, data):
    tensors, metadata = copy.deepcopy(data.draw(st.sampled_from(honest)))
    for _ in range(data.draw(st.integers(1, 2))):
        *trail, last = data.draw(st.sampled_from([place for place in places(metadata) if place]))
        node = functools.reduce(lambda value, key: value[key], trail, metadata)
        node[last] = data.draw(st.recursive(scalars, containers, max_leaves=8))
    io.write_tensors(path, tensors, metadata)
    with watched():
        try:
            loaded = io.load(path)
        except FileFormatError:
            return
    assert isinstance(loaded, gm.GenerativeModel)
