"""What ``pyro.contrib.zuko.ZukoToPyro`` cannot do with a flow as a prior, and ``gm.Flow`` can.

Each of eleven ways of using a prior is tried on both wrappers around one and the same zuko flow. The raw wrapper
documents the gap that this package fills: should a release of Pyro close it, the test warns and does not fail. Nobody
is given ``transforms=`` or an initial value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import HMC, MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_genmods as gm

import zuko  # isort: skip  (the package puts right what importing zuko changes)

Law = Callable[[], dist.TorchDistribution]
FEATURES = 3
DATA = torch.tensor([0.5, -0.5, 1.0])


def program(law: Law) -> Callable[..., Tensor]:
    """A flow prior and a Gaussian measurement of each of its features."""

    def model(y: Tensor | None = DATA) -> Tensor:
        x = pyro.sample("x", law())
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        return x

    return model


def by_chain(kernel: type, **settings) -> Callable[[Law], dict[str, Tensor]]:
    def run(law: Law) -> dict[str, Tensor]:
        mcmc = MCMC(kernel(program(law), **settings), num_samples=8, warmup_steps=8, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()

    return run


def by_guide(guide_class: Callable[..., Callable]) -> Callable[[Law], dict[str, Tensor]]:
    def run(law: Law) -> dict[str, Tensor]:
        guide = guide_class(program(law))
        svi = SVI(program(law), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert all(math.isfinite(svi.step()) for _ in range(3))
        return {"x": torch.stack([guide()["x"].detach() for _ in range(8)])}

    return run


def hand_made_guide(y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.zeros(FEATURES))
    pyro.sample("x", dist.Normal(loc, 0.1).to_event(1))


def by_posterior(law: Law) -> dict[str, Tensor]:
    draws = Predictive(program(law), guide=hand_made_guide, num_samples=8)(None)
    return {name: draws[name].reshape(8, FEATURES) for name in ("x", "y")}


def by_prior(parallel: bool) -> Callable[[Law], dict[str, Tensor]]:
    def run(law: Law) -> dict[str, Tensor]:
        draws = Predictive(program(law), num_samples=8, parallel=parallel)(None)
        return {name: draws[name].reshape(8, FEATURES) for name in ("x", "y")}

    return run


def masked(law: Law) -> dict[str, Tensor]:
    d = law().expand([8]).mask(torch.arange(8) % 2 == 0)
    x = d.sample()
    log_prob = d.log_prob(x)
    assert log_prob.shape == (8,) and (log_prob[1::2] == 0).all() and (log_prob[::2] != 0).all()
    return {"x": x}


def joined(law: Law) -> dict[str, Tensor]:
    d = law().expand([8]).to_event(1)
    x = d.sample()
    assert d.event_shape == (8, FEATURES) and d.log_prob(x).shape == ()
    return {"x": x}


WAYS: dict[str, Callable[[Law], dict[str, Tensor]]] = {
    "NUTS": by_chain(NUTS, max_tree_depth=3),
    "HMC": by_chain(HMC, num_steps=3),
    "AutoNormal": by_guide(AutoNormal),
    "AutoMultivariateNormal": by_guide(AutoMultivariateNormal),
    "AutoDelta": by_guide(AutoDelta),
    "AutoIAFNormal": by_guide(lambda model: AutoIAFNormal(model, hidden_dim=[16])),
    "prior Predictive": by_prior(parallel=False),
    "prior Predictive, parallel": by_prior(parallel=True),
    "posterior Predictive": by_posterior,
    "mask": masked,
    "to_event": joined,
}


def raw_flow() -> torch.nn.Module:
    """The zuko flow that both wrappers are put around."""
    torch.manual_seed(1)
    return zuko.flows.NSF(FEATURES, transforms=2, bins=4, hidden_features=(8,))


def test_there_are_eleven():
    assert len(WAYS) == 11


@pytest.mark.parametrize("way", WAYS)
def test_our_flow_can(way):
    prior = gm.Flow(raw_flow())
    draws = WAYS[way](prior)
    for name, values in draws.items():
        assert values.shape == (8, FEATURES), f"{name}: {tuple(values.shape)}"
        assert values.isfinite().all()
    different = len(draws["x"].unique(dim=0))
    if way in ("NUTS", "HMC"):
        assert different > 1, "the chain did not move"
    else:
        assert different == (1 if way == "AutoDelta" else 8), "the draws are copies"


@pytest.mark.parametrize("way", WAYS)
def test_zuko_to_pyro_cannot(way):
    flow = raw_flow()
    try:
        WAYS[way](lambda: ZukoToPyro(flow()))
    except NotImplementedError:  # no support, no sample
        return
    warnings.warn(f"{way}: ZukoToPyro of pyro {pyro.__version__} can do this now; say so in the docs.", stacklevel=1)


def test_the_comparison_is_fair():
    """The raw wrapper has the same density, and works where it is meant to: SVI with a hand-made guide."""
    flow = raw_flow()
    x = torch.randn(5, FEATURES)
    assert torch.allclose(gm.Flow(flow)().log_prob(x), ZukoToPyro(flow()).log_prob(x), atol=1e-5)
    losses = []
    for law in (lambda: ZukoToPyro(flow()), gm.Flow(flow)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        losses.append(SVI(program(law), hand_made_guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(DATA))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
