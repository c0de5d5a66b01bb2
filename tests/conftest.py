"""Shape checks on, one seed, and a guard that no test leaves the process changed."""

from jaxtyping import install_import_hook

with install_import_hook("pyro_genmods", "beartype.beartype"):
    import pyro_genmods  # noqa: F401

import signal

import pyro
import pytest
import torch
from torch.distributions import Distribution


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the parametrised tests")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """A shell's background process is started with interrupts ignored; tests that interrupt themselves need them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_world():
    """Seed, clear Pyro's store, and fail a test that leaves global state behind."""
    pyro.clear_param_store()
    pyro.set_rng_seed(20261123)
    before = (Distribution._validate_args, torch.get_default_dtype(), torch.is_grad_enabled())
    yield
    after = (Distribution._validate_args, torch.get_default_dtype(), torch.is_grad_enabled())
    torch.set_default_dtype(before[1])
    assert before == after, "the test changed torch's global state"
    pyro.clear_param_store()
