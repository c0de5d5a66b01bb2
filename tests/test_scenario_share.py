"""Scenario: a prior is learned, saved, mailed, loaded elsewhere, frozen or trained on; nothing else is disturbed."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from safetensors.torch import save_file
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods import io

import zuko  # isort: skip


def run(script: str, *arguments: object) -> str:
    """Run a script in a fresh process; what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def learned(flow=zuko.flows.MAF, **kwargs) -> gm.Flow:
    """A few steps of training, so that every tensor has left its starting value; permutations are random."""
    model = gm.Flow(flow(2, transforms=2, hidden_features=(8,), randperm=True), **kwargs)
    data = torch.stack([torch.randn(200) * 0.5 + 1, torch.rand(200)], 1).exp()
    model.standardize(data)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        model.loss(data).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def copy_of(model: torch.nn.Module) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# -- save and move ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_process_computes_the_same_numbers(tmp_path):
    """Learned permutations and standardisation are buffers; they travel too. No pickle is opened on the way."""
    x = torch.rand(50, 2) + 0.5
    for name, model in {
        "real": learned(),
        "positive": learned(zuko.flows.NSF, support=constraints.positive),
        "naf": gm.Flow(zuko.flows.NAF(2, hidden_features=(8,), randperm=True)).freeze(),
    }.items():
        io.save(model, tmp_path / f"{name}.safetensors")
        save_file({"x": x, "log_prob": model().log_prob(x).detach()}, tmp_path / f"{name}.answer")
    answers = run(
        """
        import json, pickle, sys
        from pathlib import Path
        import pyro_genmods as gm
        import torch
        from pyro_genmods import io
        from safetensors.torch import load_file

        def refuse(*args, **kwargs):
            raise AssertionError("something was unpickled")

        pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
        found = {}
        for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
            answer = load_file(path.with_suffix(".answer"))
            model = io.load(path, map_location="cpu")
            difference = model().log_prob(answer["x"]) - answer["log_prob"]
            found[path.stem] = [float(difference.abs().max()), [p.requires_grad for p in model.parameters()]]
        print(json.dumps(found))
        """,
        tmp_path,
    )
    found = json.loads(answers)
    assert {name: difference for name, (difference, _) in found.items()} == {"real": 0, "positive": 0, "naf": 0}
    assert all(found["real"][1])
    assert not any(found["naf"][1])


def test_saving_works_after_pyro_has_hung_weak_references_on_the_parameters(tmp_path):
    model = learned()
    pyro.module("prior", model)
    with pytest.raises(TypeError, match="weakref"):
        pickle.dumps(model)
    io.save(model, tmp_path / "prior.safetensors")
    loaded = io.load(tmp_path / "prior.safetensors")
    assert same_tensors(loaded.state_dict(), model.state_dict())
    pickle.dumps(loaded)
    pyro.clear_param_store()
    pyro.module("prior", loaded)
    assert set(pyro.get_param_store().keys()) == {f"prior$$${name}" for name, _ in loaded.named_parameters()}


def test_deepcopy_and_pickle_after_use(tmp_path):
    model = learned()
    law = model()
    law.log_prob(law.rsample((3,))).sum().backward()
    x = torch.randn(5, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other().log_prob(x), model().log_prob(x))
        io.save(other, tmp_path / "copy.safetensors")
        io.save(model, tmp_path / "prior.safetensors")
        loaded = io.load(tmp_path / "copy.safetensors")
        assert torch.equal(loaded().log_prob(x), model().log_prob(x))
        with torch.no_grad():
            other.flow.transform.transforms[0].hyper[0].weight.zero_()
        io.save(other, tmp_path / "copy.safetensors")
        assert not torch.equal(io.load(tmp_path / "copy.safetensors")().log_prob(x), model().log_prob(x))


# -- freeze -----------------------------------------------------------------------------------------------------------


class Measurement(PyroModule):
    """Two noisy readings of a draw of the prior."""

    def __init__(self, prior: gm.GenerativeModel) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, readings: torch.Tensor) -> torch.Tensor:
        z = pyro.sample("z", self.prior())
        return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=readings)


def closure(prior: gm.GenerativeModel):
    def model(readings):
        z = pyro.sample("z", prior())
        return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=readings)

    return model


def registered(prior: gm.GenerativeModel):
    def model(readings):
        z = pyro.sample("z", pyro.module("prior", prior)())
        return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=readings)

    return model


def fit_guide(model, steps: int = 100) -> list[float]:
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    return [svi.step(torch.tensor([0.3, 0.4])) for _ in range(steps)]


@pytest.mark.parametrize("place", [closure, registered, Measurement], ids=["closure", "pyro.module", "attribute"])
@pytest.mark.parametrize("route", ["freeze", "file"])
def test_a_frozen_prior_is_bit_for_bit_the_same_after_100_steps(place, route, tmp_path, recwarn):
    prior = learned().freeze()
    if route == "file":
        io.save(prior, tmp_path / "prior.safetensors")
        prior = io.load(tmp_path / "prior.safetensors")
    before = copy_of(prior)
    losses = fit_guide(place(prior))
    assert sum(losses[-20:]) < sum(losses[:20]), "the guide learns"
    assert same_tensors(before, copy_of(prior))
    assert all(p.grad is None for p in prior.parameters())
    assert not any("prior" in name for name in pyro.get_param_store())
    assert not [w for w in recwarn if "prior" in str(w.message)]


@pytest.mark.parametrize("place", [registered, Measurement], ids=["pyro.module", "attribute"])
def test_a_trainable_prior_learns(place, tmp_path):
    """With one reading, the evidence grows as the prior moves to it; starting values come from a file."""
    io.save(learned(), tmp_path / "prior.safetensors")
    prior = io.load(tmp_path / "prior.safetensors")
    before, reading = copy_of(prior), torch.tensor([0.3, 0.4])
    density = prior().log_prob(reading).item()
    fit_guide(place(prior))
    names = set(pyro.get_param_store().keys())
    assert sum("prior" in name for name in names) == len(list(prior.parameters()))
    after = copy_of(prior)
    assert all(not torch.equal(before[name], after[name]) for name, _ in prior.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name, _ in prior.named_buffers())
    assert prior().log_prob(reading).item() > density + 0.5
    io.save(prior, tmp_path / "trained.safetensors")
    assert same_tensors(io.load(tmp_path / "trained.safetensors").state_dict(), prior.state_dict())


def test_a_prior_inside_a_pyro_module_is_saved_from_there(tmp_path):
    whole = Measurement(learned())
    fit_guide(whole, steps=2)
    io.save(whole.prior, tmp_path / "prior.safetensors")
    other = Measurement(io.load(tmp_path / "prior.safetensors"))
    assert same_tensors(other.state_dict(), whole.state_dict())


# -- share: importing us disturbs nobody ------------------------------------------------------------------------------

WORLD = """
    import gc, json, locale, logging, os, random, signal, sys, warnings
    import arviz, lightning, matplotlib, numpy, pyro, torch, torchsde  # those we stand on; not zuko
    from torch.distributions import Distribution
    from torch.distributions.transforms import _InverseTransform

    {before}

    def world():
        level = [logging.root.level, logging.root.manager.disable, [repr(h) for h in logging.root.handlers]]
        return dict(
            validation=Distribution._validate_args,
            arg_constraints=repr(Distribution.__dict__["arg_constraints"]),
            inverse_name=_InverseTransform.__name__,
            pyro={{name: repr(value) for name, value in pyro.settings.get().items()}},
            pyro_store=list(pyro.get_param_store().keys()),
            pyro_stack=len(pyro.poutine.runtime._PYRO_STACK),
            dtype=str(torch.get_default_dtype()),
            device=str(torch.get_default_device()),
            threads=[torch.get_num_threads(), torch.get_num_interop_threads()],
            torch_rng=torch.get_rng_state().tolist(),
            numpy_rng=repr(numpy.random.get_state()),
            python_rng=repr(random.getstate()),
            grad=[torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
            deterministic=torch.are_deterministic_algorithms_enabled(),
            matmul=torch.get_float32_matmul_precision(),
            cudnn=[torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
            sharing=torch.multiprocessing.get_sharing_strategy(),
            start=torch.multiprocessing.get_start_method(allow_none=True),
            warnings=[repr(f) for f in warnings.filters],
            backend=str(dict.get(matplotlib.rcParams, "backend")),
            rc={{k: str(v) for k, v in dict.items(matplotlib.rcParams) if k != "backend"}},
            arviz=str(dict(arviz.rcParams)),
            logging=level,
            environment=dict(os.environ),
            path=list(sys.path),
            finders=[repr(f) for f in sys.meta_path],
            hooks=[repr(sys.excepthook), repr(sys.displayhook), sys.getrecursionlimit()],
            signals=[repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)],
            locale=locale.setlocale(locale.LC_ALL),
            collector=[gc.isenabled(), gc.get_threshold()],
            numpy_errors=numpy.geterr(),
            numpy_print=repr(numpy.get_printoptions()),
        )

    before = world()
    import pyro_genmods
    after = world()
    print(json.dumps({{key: [repr(before[key]), repr(after[key])] for key in before if before[key] != after[key]}}))
    print(json.dumps([Distribution._validate_args, repr(Distribution.__dict__["arg_constraints"])]))
    {behind}
"""


@pytest.mark.slow
def test_importing_us_changes_nothing():
    behind = """
    with __import__("contextlib").suppress(ValueError):
        torch.distributions.Normal(0.0, -1.0)
        raise SystemExit("torch no longer validates")
    """
    changes, (validation, _) = map(json.loads, run(WORLD.format(before="", behind=behind.strip())).splitlines())
    assert changes == {}
    assert validation is True


@pytest.mark.slow
@pytest.mark.parametrize("before", ["import zuko", "torch.distributions.Distribution.set_default_validate_args(False)"])
def test_who_switched_validation_off_before_us_is_left_alone(before):
    changes, (validation, _) = map(json.loads, run(WORLD.format(before=before, behind="")).splitlines())
    assert changes == {}
    assert validation is False
