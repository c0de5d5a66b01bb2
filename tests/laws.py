"""The table of laws: one row for every way in which a generative model can be built.

``test_contract.py`` puts every row through every law of the battery, so a new mechanism is tested by adding rows here.
A row is a constructor and the facts that the constructor promises; the battery checks the promises. Rows are small
(two features, one hidden layer) and away from their initialisation, so that no law of the battery holds by accident.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

import pyro_genmods as gm
from pyro_genmods.coordinates import circular

import zuko  # isort: skip  (the package puts right what importing zuko changes)

REAL = constraints.real


@dataclass(frozen=True)
class Law:
    """One row of the table.

    Attributes:
        id: name of the row.
        build: constructs the model.
        context: number of context features, 0 for an unconditional model.
        direction: of the transport, where the mechanism has a choice.
        support: elementwise or joint constraint of an event.
        event_shape: shape of an event.
        density: promised honesty of ``log_prob``.
        transport: whether there are ``base``, ``push`` and ``pull``.
        networks: name of the submodules whose calls are the declared cost.
        adaptive: whether a solver decides the cost, and the rows of a batch share its steps.
        tolerance: of a log density in float32, in nats.
        exactness: of a log density in float64: rounding, or the tolerance of a quadrature or solver.
        standardized: whether shift and scale are those of made-up data.
        costly: whether thousands of draws take seconds.
    """

    id: str
    build: Callable[[], gm.GenerativeModel]
    context: int = 0
    direction: str = "density"
    support: constraints.Constraint = REAL
    event_shape: tuple[int, ...] = (2,)
    density: gm.Density = gm.Density.EXACT
    transport: bool = True
    networks: str = "hyper"
    adaptive: bool = False
    tolerance: float = 2e-4
    exactness: float = 1e-6
    standardized: bool = False
    costly: bool = False

    def make(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> gm.GenerativeModel:
        """A model of its own, the same every time; ODEs are solved more tightly in double precision."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.id.encode()))
            model = self.build()
            if self.standardized:
                context = 3 + 2 * torch.randn(256, self.context) if self.context else None
                model.standardize(self.data(256), context)
        for module in model.modules():
            if hasattr(module, "atol") and dtype is torch.float64:
                module.atol, module.rtol = 1e-9, 1e-8
        return model.to(device, dtype)

    def data(self, n: int) -> Tensor:
        """Made-up events inside the support, off centre and not of unit scale."""
        unconstrained = biject_to(self.support).inverse_shape(torch.Size((n, *self.event_shape)))
        return biject_to(self.support)(1.0 + 0.5 * torch.randn(unconstrained))

    def contexts(self, *batch: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Contexts ``(*batch, context)``, all different, or ``None`` for an unconditional model."""
        if not self.context:
            return None
        generator = torch.Generator().manual_seed(sum(batch) + 7)
        return 1.5 * torch.randn(*batch, self.context, generator=generator).to(dtype)

    def distribution(self, *batch: int, dtype: torch.dtype = torch.float32) -> gm.GenerativeDistribution:
        """The law of the shared model with this batch shape; tests must leave the model as it is."""
        model = shared(self, dtype=dtype)
        return model(self.contexts(*batch, dtype=dtype)) if self.context else model().expand(batch)


def shared(law: Law, dtype: torch.dtype = torch.float32) -> gm.GenerativeModel:
    """The row's model, built once, for tests that only read it."""
    return _shared(law, dtype)


@functools.cache
def _shared(law: Law, dtype: torch.dtype) -> gm.GenerativeModel:
    return law.make(dtype)


def flow(
    name: str,
    kind: Callable[..., torch.nn.Module],
    *,
    features: int = 2,
    context: int = 0,
    direction: str = "density",
    support: constraints.Constraint | None = None,
    event_shape: tuple[int, ...] | None = None,
    roughness: float = 0.3,
    facts: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Law:
    """A row of ``gm.Flow`` around a zuko flow whose parameters are moved by ``roughness`` standard normal draws."""

    def build() -> gm.Flow:
        network = kind(features, context=context, **kwargs)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(roughness * torch.randn_like(parameter))
        return gm.Flow(network, direction=direction, support=support, event_shape=event_shape)

    facts = {"support": support or REAL, "event_shape": event_shape or (features,), **(facts or {})}
    return Law(name, build, context=context, direction=direction, **facts)


def _small_gf(features: int, context: int = 0) -> torch.nn.Module:
    """A Gaussianization flow near the identity; a fresh one saturates, and is refused (see test_flow.py)."""
    network = zuko.flows.GF(features, context=context, transforms=2, components=4, **(HIDDEN if context else {}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.1)
    return network


def _cnf(features: int, context: int = 0) -> torch.nn.Module:
    return zuko.flows.CNF(features, context=context, freqs=2, atol=1e-7, rtol=1e-6, **HIDDEN)


F = zuko.flows
HIDDEN: dict[str, Any] = {"hidden_features": (8,)}
LAYERS: dict[str, Any] = {"transforms": 2, **HIDDEN}
SPLINE: dict[str, Any] = {"bins": 4, **LAYERS}
NEURAL: dict[str, Any] = {"signal": 4, "network": HIDDEN, "transforms": 1, **HIDDEN}
BERNSTEIN: dict[str, Any] = {"degree": 8, "transforms": 1, **HIDDEN}
SQUARES: dict[str, Any] = {"degree": 3, "polynomials": 2, "transforms": 1, **HIDDEN}
SOLVED: dict[str, Any] = {"tolerance": 1e-3}
ODE: dict[str, Any] = {"tolerance": 5e-3, "exactness": 1e-4, "adaptive": True, "costly": True}
COSTLY: dict[str, Any] = {"costly": True, **SOLVED}
INTEGRAL: dict[str, Any] = {"exactness": 1e-4, **COSTLY}
ON_CIRCLE: dict[str, Any] = {"support": circular}
MIXTURE: dict[str, Any] = {"transport": False}

LAWS: tuple[Law, ...] = (
    flow("nsf", F.NSF, **SPLINE),
    flow("nsf-context", F.NSF, context=3, **SPLINE),
    flow("nsf-sampling", F.NSF, direction="sampling", **SPLINE),
    flow("nsf-context-sampling", F.NSF, context=3, direction="sampling", **SPLINE),
    flow("nsf-one-feature", F.NSF, features=1, **SPLINE),
    flow("nsf-coupling", F.NSF, features=4, passes=2, roughness=0.1, **SPLINE),
    flow("nsf-positive", F.NSF, support=constraints.positive, **SPLINE),
    flow("nsf-interval", F.NSF, support=constraints.interval(0.0, 1.0), **SPLINE),
    flow("nsf-simplex", F.NSF, support=constraints.simplex, event_shape=(3,), **SPLINE),
    flow("nsf-matrix", F.NSF, features=4, event_shape=(2, 2), roughness=0.1, **SPLINE),
    flow(
        "nsf-matrix-positive-context",
        F.NSF,
        features=4,
        context=1,
        support=constraints.positive,
        event_shape=(2, 2),
        roughness=0.1,
        facts={"standardized": True},
        **SPLINE,
    ),
    flow("nsf-standardized", F.NSF, facts={"standardized": True}, **SPLINE),
    flow("maf", F.MAF, features=3, roughness=0.1, **LAYERS),
    flow("maf-context", F.MAF, context=2, facts={"standardized": True}, **LAYERS),
    flow("maf-sampling", F.MAF, direction="sampling", **LAYERS),
    flow(
        "maf-context-sampling-positive", F.MAF, context=2, direction="sampling", support=constraints.positive, **LAYERS
    ),
    flow("nice", F.NICE, **LAYERS),
    flow("nice-context-simplex", F.NICE, context=2, support=constraints.simplex, event_shape=(3,), **LAYERS),
    flow("realnvp", F.RealNVP, features=5, roughness=0.1, **LAYERS),
    flow("realnvp-context-sampling", F.RealNVP, context=2, direction="sampling", **LAYERS),
    flow("naf", F.NAF, facts=SOLVED, **NEURAL),
    flow("naf-context", F.NAF, context=2, facts=SOLVED, **NEURAL),
    flow("naf-sampling", F.NAF, direction="sampling", facts=COSTLY, **NEURAL),
    flow("unaf", F.UNAF, facts=INTEGRAL, **NEURAL),
    flow("unaf-context", F.UNAF, context=2, facts=INTEGRAL, **NEURAL),
    flow("unaf-sampling", F.UNAF, direction="sampling", facts=INTEGRAL, **NEURAL),
    flow("sospf", F.SOSPF, facts=SOLVED, **SQUARES),
    flow("sospf-context", F.SOSPF, context=2, facts=SOLVED, **SQUARES),
    flow("sospf-sampling", F.SOSPF, direction="sampling", facts=COSTLY, **SQUARES),
    flow("bpf", F.BPF, facts=SOLVED, **BERNSTEIN),
    flow("bpf-context-interval", F.BPF, context=2, support=constraints.interval(-2.0, 3.0), facts=SOLVED, **BERNSTEIN),
    flow("bpf-sampling", F.BPF, direction="sampling", facts=COSTLY, **BERNSTEIN),
    flow("gf", _small_gf, roughness=0.0, facts=SOLVED),
    flow("gf-context", _small_gf, context=2, roughness=0.0, facts=SOLVED),
    flow("gf-sampling", _small_gf, direction="sampling", roughness=0.0, facts=COSTLY),
    flow("ncsf", F.NCSF, facts=ON_CIRCLE, **SPLINE),
    flow("ncsf-context", F.NCSF, context=2, facts=ON_CIRCLE, **SPLINE),
    flow("ncsf-sampling", F.NCSF, direction="sampling", roughness=0.15, facts=ON_CIRCLE, **SPLINE),
    flow("cnf", _cnf, roughness=0.0, facts=ODE),
    flow("cnf-context-positive", _cnf, context=2, support=constraints.positive, roughness=0.0, facts=ODE),
    flow("cnf-sampling", _cnf, direction="sampling", roughness=0.0, facts=ODE),
    flow("gmm", zuko.mixtures.GMM, components=3, roughness=0.0, facts=MIXTURE),
    flow("gmm-context", zuko.mixtures.GMM, context=2, components=3, facts=MIXTURE, **HIDDEN),
    flow("gmm-positive", zuko.mixtures.GMM, support=constraints.positive, roughness=0.0, facts=MIXTURE),
)


def rows(keep: Callable[[Law], bool] = lambda law: True, slow: Callable[[Law], bool] = lambda law: False) -> Any:
    """Parametrise a test with the rows that it is about, the ``slow`` ones among them marked."""
    kept = [law for law in LAWS if keep(law)]
    assert kept, "no row of the table is left"
    marks = {law.id: [pytest.mark.slow] if slow(law) else [] for law in kept}
    return pytest.mark.parametrize("law", [pytest.param(law, id=law.id, marks=marks[law.id]) for law in kept])
