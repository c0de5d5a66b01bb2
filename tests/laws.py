"""The table of laws: one row for every way in which a generative model can be built.

``test_contract.py`` puts every row through every law of the battery, so a new mechanism is tested by adding rows here.
A row is a constructor and the facts that the constructor promises; the battery checks the promises. Rows are small
(two features, one hidden layer) and away from their initialisation, so that no law of the battery holds by accident.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import identity_transform

import pyro_genmods as gm
from pyro_genmods.coordinates import circular
from pyro_genmods.evolve.energy import ScalarNetwork
from pyro_genmods.evolve.guidance import GuidedLaw
from pyro_genmods.factorize import (
    Bernoulli,
    Categorical,
    Conditional,
    ContinuousMixture,
    DiscretizedLogisticMixture,
    Ensemble,
    GaussianMixture,
    LogisticMixture,
    Mixed,
    Spline,
    StudentMixture,
)
from pyro_genmods.factorize.sequences import Columns, Sequences
from pyro_genmods.foundation.networks import MLP, SpectralLinear
from pyro_genmods.foundation.residual import ResidualMLP
from pyro_genmods.shape.base import GaussianBase

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
        networks: names of the submodules whose calls are the declared cost; those of their ``step`` count too.
        adaptive: whether a solver decides the cost, and the rows of a batch share its steps.
        tolerance: of a log density in float32, in nats.
        exactness: of a log density in float64: rounding, or the tolerance of a quadrature or solver.
        standardized: whether shift and scale are those of made-up data.
        costly: whether thousands of draws take seconds.
        levels: number of values of each entry, 0 for a continuous one; empty where all are continuous.
        eos: token that ends a sequence, where events have variable length.
        integer: whether values are ``int64``.
        enumerable: whether events are listed by ``enumerate_support``, if they are finitely many.
        sequential: whether there are ``steps()``, and uniform residuals.
        chart: bijection onto the support from where quadrature and differentiation are done; default torch's own.
        chain: whether a draw is the end of a Markov chain, which has no pathwise gradient.
        critic: whether there is a second player, of whom only the loss in training mode asks anything.
        opened: whether there are ``steps()`` of a sampler.
        slope: whether ``score`` is the gradient of ``log_prob``, and not a network's own estimate of it.
        core: whether the expensive laws of the battery are asked of it in the fast half, or in the slow half alone.
    """

    id: str
    build: Callable[[], gm.GenerativeModel]
    context: int = 0
    direction: str = "density"
    support: constraints.Constraint = REAL
    event_shape: tuple[int, ...] = (2,)
    density: gm.Density = gm.Density.EXACT
    transport: bool = True
    networks: tuple[str, ...] = ("hyper",)
    adaptive: bool = False
    tolerance: float = 2e-4
    exactness: float = 1e-6
    standardized: bool = False
    costly: bool = False
    levels: tuple[int, ...] = ()
    eos: int | None = None
    integer: bool = False
    enumerable: bool = True
    sequential: bool = False
    chart: Transform | None = None
    core: bool = True
    chain: bool = False
    critic: bool = False
    opened: bool = False
    slope: bool = True

    @property
    def discrete(self) -> bool:
        """Whether any entry is: then there is no ``rsample``, no ``pull``, no ``score`` and no bijection."""
        return any(self.levels)

    @property
    def invertible(self) -> bool:
        """Whether values can be pulled back to the noise they came from."""
        return self.transport and not self.discrete and self.scored

    @property
    def scored(self) -> bool:
        """Whether there is a ``log_prob``."""
        return self.density is not gm.Density.IMPLICIT

    @property
    def reparameterized(self) -> bool:
        """Whether draws carry pathwise gradients."""
        return self.transport and not self.discrete and not self.chain

    @property
    def features(self) -> int:
        """Number of columns of a row: of entries, or of unconstrained coordinates."""
        shape = torch.Size(self.event_shape)
        return (shape if self.discrete else torch.Size(biject_to(self.support).inverse_shape(shape))).numel()

    @property
    def finite(self) -> bool:
        """Whether all entries are discrete."""
        return self.discrete and all(self.levels)

    def events(self) -> Tensor:
        """All different events ``(number, *event_shape)`` of a finite law."""
        rows = itertools.product(*map(range, self.levels))
        if self.eos is not None:  # what is beyond the first end may be anything, and is cut off
            rows = {row[: (*row, self.eos).index(self.eos) + 1] for row in rows}
            pad = self.support.pad
            rows = sorted((*row, *[pad] * (len(self.levels) - len(row))) for row in rows)
        return torch.tensor(list(rows)).reshape(-1, *self.event_shape)

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
        if self.levels:
            columns = [torch.randint(k, (n,)).float() if k else 1.0 + 0.5 * torch.randn(n) for k in self.levels]
            return torch.stack(columns, -1)
        unconstrained = biject_to(self.support).inverse_shape(torch.Size((n, *self.event_shape)))
        return biject_to(self.support)(1.0 + 0.5 * torch.randn(unconstrained))

    def bijection(self, d: gm.GenerativeDistribution) -> Transform:
        """From where quadrature and differentiation are done, onto the support; circles are flat already."""
        if self.support is circular:
            return identity_transform
        return biject_to(d.support) if self.chart is None else self.chart

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


class Sinh(Transform):
    """A chart of the line in which heavy tails are as short as light ones are without it."""

    domain = codomain = constraints.real
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sinh)

    def __hash__(self) -> int:
        return hash(Sinh)

    def _call(self, x: Tensor) -> Tensor:
        return x.sinh()

    def _inverse(self, y: Tensor) -> Tensor:
        return y.asinh()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.cosh().log()


class Own(nn.Module):
    """A user's causal network: sums of functions of the entries before."""

    def __init__(self, length: int, inputs: int, outputs: int, context: int = 0) -> None:
        super().__init__()
        self.seen, self.told = nn.Linear(inputs, 4), nn.Linear(context, 4) if context else None
        self.out = nn.Parameter(torch.zeros(length, outputs, 4))

    def forward(self, entries: Tensor, context: Tensor | None = None) -> Tensor:
        past = nn.functional.pad(self.seen(entries).tanh()[:, :-1].cumsum(1), (0, 0, 1, 0)) + 1.0
        if self.told is not None:
            past = past + self.told(context).tanh()[:, None]
        return torch.einsum("rth,toh->rto", past, self.out)


def autoregressive(
    name: str,
    conditional: Conditional,
    network: str | Callable[[], nn.Module] = "made",
    *,
    features: int | tuple[int, ...] = 2,
    context: int = 0,
    support: constraints.Constraint | None = None,
    roughness: float = 0.2,
    facts: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Law:
    """A row of ``gm.Autoregressive`` whose network's parameters are moved by ``roughness`` standard normal draws."""

    def build() -> gm.Autoregressive:
        made = network if isinstance(network, str) else network()
        options = {} if isinstance(made, nn.Module) else SIZES[made]
        model = gm.Autoregressive(
            features, conditional, made, context_features=context, support=support, **options, **kwargs
        )
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(roughness * torch.randn_like(parameter))
        return model

    shape = (features,) if isinstance(features, int) else features
    promised = {"support": support or REAL, "event_shape": shape, "networks": ("network",), "sequential": True}
    return Law(name, build, context=context, **{**promised, **(facts or {})})


def ensemble(name: str, *members: Law, facts: dict[str, Any] | None = None) -> Law:
    """A row of ``gm.factorize.Ensemble`` of the models of other rows, of unequal weights."""

    def build() -> Ensemble:
        models = [member.build() for member in members]
        return Ensemble(models, weights=[1.0 + k for k in range(len(models))])

    first = members[0]
    promised = {"support": first.support, "event_shape": first.event_shape, "levels": first.levels}
    promised |= {"transport": False, "integer": first.integer, "enumerable": False, "networks": ("network", "hyper")}
    return Law(name, build, context=first.context, **{**promised, **(facts or {})})


def continuous_mixture(
    name: str, conditional: Conditional, *, support: constraints.Constraint | None = None, **facts: Any
) -> Law:
    """A row of ``gm.factorize.ContinuousMixture`` of few points, its network smooth enough for quadrature."""

    def build() -> ContinuousMixture:
        model = ContinuousMixture(
            2, conditional, latent_features=2, points=64, training_points=64, width=8, support=support
        )
        with torch.no_grad():
            for parameter in model.network.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(0.5)
        return model

    promised = {"support": support or REAL, "transport": False, "enumerable": False, "networks": ("network",)}
    return Law(name, build, **{**promised, **facts})


class Residual(nn.Module):
    """A generator that is invertible by construction: the identity, and a map of slope at most 1/2."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.inner = MLP(features + context, features, (8,), activation=nn.Tanh, linear=SpectralLinear)

    def forward(self, z: Tensor, *c: Tensor) -> Tensor:
        return z + 0.5 * self.inner(z, *c)


def pushforward(
    name: str,
    kind: type[gm.GenerativeModel] = gm.transform.Pushforward,
    *,
    invertible: bool = False,
    context: int = 0,
    support: constraints.Constraint | None = None,
    standardized: bool = False,
    **kwargs: Any,
) -> Law:
    """A row of a generator of two features: from three columns of noise, or from two and invertible."""
    adversarial, corrected = kind is gm.Adversarial, kind is gm.transform.Corrected

    def build() -> gm.GenerativeModel:
        if adversarial or corrected:
            small = {"hidden_features": (8,), "critic_features": (8,), "critic_steps": 1}
            model = gm.Adversarial(2, 3, context, support=support, **small, **({} if corrected else kwargs))
        elif invertible:
            model = kind(Residual(2, context), 2, context, support=support, density="manifold")
        else:
            model = kind(MLP(3 + context, 2, (8,)), 3, context, support=support)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return kind(model, transitions=2, candidates=2, leapfrogs=2, **kwargs) if corrected else model

    density = gm.Density.EXACT if invertible else gm.Density.IMPLICIT
    return Law(
        name,
        build,
        context=context,
        support=support or REAL,
        density=density,
        standardized=standardized,
        networks=("generator",),
        chain=corrected,
        critic=adversarial,
    )


class Velocity(nn.Module):
    """A user's velocity, which does not know its divergence."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(features + context + 1, 8)
        self.outer = nn.Linear(8, features)

    def forward(self, t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
        return self.outer(self.inner(torch.cat([t, y] if c is None else [t, y, c], -1)).tanh())


def continuous(
    name: str,
    *,
    features: int = 2,
    context: int = 0,
    hidden: tuple[int, ...] = (8, 8),
    own: bool = False,
    support: constraints.Constraint | None = None,
    facts: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Law:
    """A row of ``gm.ContinuousFlow`` whose network's parameters are moved by standard normal draws."""

    def build() -> gm.ContinuousFlow:
        network = Velocity(features, context) if own else None
        options = {"solver": gm.transform.RK4(8), **kwargs}
        model = gm.ContinuousFlow(
            features, context, hidden_features=hidden, network=network, support=support, **options
        )
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        return model

    promised = {"support": support or REAL, "event_shape": (features,), "networks": ("network",), "exactness": 3e-4}
    if kwargs.get("trace") == "hutchinson":
        promised["density"] = gm.Density.ESTIMATE
    return Law(name, build, context=context, **{**promised, **(facts or {})})


class Form(nn.Module):
    """A velocity told in another form."""

    def __init__(self, network: nn.Module, form: str) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        v = self.network(t, u, c)
        if self.form == "noise":
            return t.sin() * u + t.cos() * v
        if self.form == "denoised":
            return t.cos() * u - t.sin() * v
        return -(u + v / t.tan()) if self.form == "score" else v


def diffusion(
    name: str,
    *,
    features: int = 2,
    context: int = 0,
    own: bool = False,
    sampler: Any = None,
    support: constraints.Constraint | None = None,
    facts: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Law:
    """A row of ``gm.Diffusion``, or of one of its samplers, whose network is moved by standard normal draws."""
    form = kwargs.get("parameterization", "velocity")

    def build() -> gm.GenerativeModel:
        told = context + bool(kwargs.get("context_dropout"))
        network: nn.Module = Velocity(features, told) if own else ResidualMLP(features, told, width=8)
        network = ScalarNetwork(network) if form == "energy" else Form(network, form)
        model = gm.Diffusion(
            features, context, network=network, support=support, **{"solver": gm.evolve.RK4(8), **kwargs}
        )
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model if sampler is None else model.sampled_by(sampler)

    promised = {"support": support or REAL, "event_shape": (features,), "networks": ("network",), "exactness": 3e-4}
    promised |= {"slope": False, "opened": sampler is None}
    if kwargs.get("trace") == "hutchinson":
        promised["density"] = gm.Density.ESTIMATE
    if sampler is not None:
        promised["density"] = gm.Density.IMPLICIT
    return Law(name, build, context=context, **{**promised, **(facts or {})})


def student(name: str, *, context: int = 0, calls: int = 1, support: constraints.Constraint | None = None) -> Law:
    """A row of ``gm.Distilled`` whose network is moved by standard normal draws."""

    def build() -> gm.Distilled:
        angles = (*[math.pi / 2 * (1 - k / calls) for k in range(calls)], 0.001)
        model = gm.Distilled(ResidualMLP(2, context, width=8), (2,), angles, context, support)
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    facts = {"density": gm.Density.IMPLICIT, "networks": ("network",), "support": support or REAL}
    return Law(name, build, context=context, **facts)


def energy(
    name: str,
    *,
    features: int = 2,
    context: int = 0,
    base: Law | None = None,
    support: constraints.Constraint | None = None,
    facts: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Law:
    """A row of ``gm.Energy`` whose network is moved by standard normal draws, over a base of another row."""

    def build() -> gm.Energy:
        tilted = {} if base is None else {"base": base.build()}
        model = gm.Energy(
            None if tilted else features, context, hidden_features=(8,), support=support, **tilted, **kwargs
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    promised = {"support": support or REAL, "event_shape": (features,), "networks": ("network",), "opened": True}
    promised |= {"density": gm.Density.UNNORMALIZED, "transport": False, "chain": True, "costly": True}
    kwargs.setdefault("sampler", gm.shape.Annealed(16, 8, num_moves=1, max_moves=3))
    return Law(name, build, context=context, **{**promised, **(facts or {})})


def binary(
    name: str, make: Callable[[], gm.GenerativeModel], shape: tuple[int, ...], context: int = 0, **facts: Any
) -> Law:
    """A row of a normalised energy of bits whose parameters are moved by standard normal draws."""

    def build() -> gm.GenerativeModel:
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    promised = {"event_shape": shape, "levels": (2,) * math.prod(shape), "support": constraints.boolean}
    return Law(name, build, context=context, transport=False, networks=("network",), **{**promised, **facts})


def path(
    name: str, *, context: int = 0, posterior: bool = False, facts: dict[str, Any] | None = None, **kwargs: Any
) -> Law:
    """A row of ``gm.NeuralSDE`` at two times, or of a posterior under it."""

    def build() -> gm.GenerativeModel:
        model: gm.GenerativeModel = gm.NeuralSDE(
            1, [0.0, 0.7], context_features=context, hidden_features=(8,), **kwargs
        )
        model = gm.evolve.SDEPosterior(model) if posterior else model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    promised = {"event_shape": (2, 1), "networks": ("network",)}
    return Law(name, build, context=context, **{**promised, **(facts or {})})


def grid() -> Iterator[Law]:
    """Every head with every network, without and with context; every third of them in the core of the battery."""
    number = 0
    for shift, network in enumerate(SIZES):
        for head, (conditional, facts) in HEADS.items():
            for context in (0, 2):
                name = f"{head}-{network}{'-context' if context else ''}"
                own = {"core": (number + shift) % 3 == 0, **facts}
                if isinstance(conditional, Mixed) and context:
                    own["standardized"] = True
                number += 1
                size = len(facts.get("levels", (0, 0)))
                rough = 0.15 if head == "columns" else 0.2
                yield autoregressive(
                    name, conditional, network, features=size, context=context, roughness=rough, facts=own
                )
    for shift, network in enumerate(SIZES):
        for context in (0, 2):
            for pad in (None, 3):
                name = f"sequences-{network}{'-context' if context else ''}{'' if pad is None else '-pad'}"
                facts = {"support": Sequences(3, 0, pad or 0), "levels": (3, 3, 3), "eos": 0, "integer": True}
                facts["core"] = (number + shift) % 3 == 0
                number += 1
                yield autoregressive(
                    name, Categorical(3), network, features=3, context=context, eos=0, pad=pad, facts=facts
                )


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
ODE: dict[str, Any] = {"tolerance": 5e-3, "exactness": 1e-4, "adaptive": True, "costly": True, "core": False}
ADAPTIVE: dict[str, Any] = {"adaptive": True, "costly": True, "core": False}
COSTLY: dict[str, Any] = {"costly": True, **SOLVED}
INTEGRAL: dict[str, Any] = {"exactness": 1e-4, **COSTLY}
ON_CIRCLE: dict[str, Any] = {"support": circular}
MIXTURE: dict[str, Any] = {"transport": False}

ORDERS: dict[str, Any] = {"transport": False, "sequential": False}
SIZES: dict[str, dict[str, Any]] = {
    "made": {"width": 8},
    "transformer": {"width": 8, "heads": 2, "layers": 1},
    "gru": {"width": 8},
}
OF_TOKENS: dict[str, Any] = {"integer": True, "levels": (3, 3), "support": constraints.integer_interval(0, 2)}
OF_COLUMNS: dict[str, Any] = {
    "levels": (0, 3, 0),
    "support": Columns((REAL, constraints.integer_interval(0, 2), REAL)),
}
HEADS: dict[str, tuple[Conditional, dict[str, Any]]] = {
    "bernoulli": (Bernoulli(), {"levels": (2, 2, 2), "support": constraints.boolean}),
    "categorical": (Categorical(3), OF_TOKENS),
    "gaussian": (GaussianMixture(2), {}),
    "logistic": (LogisticMixture(2), {}),
    "student": (StudentMixture(2), {"chart": Sinh()}),
    "discretized": (
        DiscretizedLogisticMixture(4, 2),
        {"levels": (4, 4), "support": constraints.integer_interval(0, 3)},
    ),
    "spline": (Spline(4), {}),
    "columns": (Mixed((GaussianMixture(2), Categorical(3), Spline(4))), OF_COLUMNS),
    "real-columns": (Mixed((LogisticMixture(2), Spline(4))), {}),
}

# Laws that read a diffusion's network in another way, and promise less: an energy has no draws of its own, a force no
# gradient, a guided law no density. They have tests of their own, in test_diffusion.py and test_posterior_samplers.py.
BRIEF = gm.shape.Chains("mala", warmup=4, transitions=4, least=8)
FIXED = (  # laws with nothing to learn; test_references.py holds them against what is known of them
    GaussianBase,
    *(
        getattr(gm.shape, name)
        for name in ("Banana", "DoubleWell", "Funnel", "Gaussian", "GaussianMixture", "Rosenbrock")
    ),
)
READERS = (gm.evolve.EnergyLaw, gm.evolve.ForcedLaw, GuidedLaw, *FIXED)

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
    *grid(),
    autoregressive("ordered", GaussianMixture(2), order=[1, 0]),
    autoregressive(
        "ordered-columns-gru-context",
        *HEADS["columns"][:1],
        "gru",
        features=3,
        context=2,
        order=[2, 0, 1],
        facts=OF_COLUMNS,
    ),
    autoregressive("ordered-tokens-transformer", Categorical(3), "transformer", order=[1, 0], facts=OF_TOKENS),
    autoregressive("orders", LogisticMixture(2), orders=2, facts=ORDERS),
    autoregressive("orders-gru-context", GaussianMixture(2), "gru", context=2, orders=2, facts=ORDERS),
    autoregressive(
        "orders-tokens-transformer-context",
        Categorical(3),
        "transformer",
        context=2,
        orders=2,
        facts={**ORDERS, **OF_TOKENS},
    ),
    autoregressive("orderless", GaussianMixture(2), orderless=True),
    autoregressive(
        "orderless-transformer-context",
        LogisticMixture(2),
        "transformer",
        context=2,
        orderless=True,
        facts={"core": False},
    ),
    autoregressive("orderless-tokens-gru", Categorical(3), "gru", orderless=True, facts={"core": False, **OF_TOKENS}),
    autoregressive(
        "autoregressive-positive", GaussianMixture(2), support=constraints.positive, facts={"standardized": True}
    ),
    autoregressive(
        "autoregressive-matrix-context",
        GaussianMixture(2),
        features=(2, 2),
        context=2,
        roughness=0.15,
        facts={"standardized": True},
    ),
    autoregressive("autoregressive-matrix-gru", Spline(4), "gru", features=(2, 2), facts={"core": False}),
    autoregressive(
        "bits-matrix", Bernoulli(), features=(2, 2), facts={"levels": (2, 2, 2, 2), "support": constraints.boolean}
    ),
    autoregressive("own-network", GaussianMixture(2), lambda: Own(2, 1, 6)),
    autoregressive("own-network-context", LogisticMixture(2), lambda: Own(3, 1, 6, 2), features=3, context=2),
    continuous_mixture("continuous-mixture", Bernoulli(), support=None, levels=(2, 2)),
    continuous_mixture("continuous-mixture-tokens", Categorical(3), levels=(3, 3), integer=True),
    continuous_mixture(
        "continuous-mixture-positive", GaussianMixture(2), support=constraints.positive, standardized=True
    ),
    continuous("continuous"),
    continuous("continuous-context-positive", context=2, support=constraints.positive, facts={"standardized": True}),
    continuous("continuous-likelihood", objective="likelihood", solver=gm.transform.RK4(8, "autograd")),
    continuous("continuous-transport", coupling="optimal_transport", solver=gm.transform.Heun(32)),
    continuous("continuous-deep", features=3, hidden=(8, 8, 8), objective="likelihood", facts={"core": False}),
    continuous("continuous-shallow-context", context=2, hidden=(8,)),
    continuous("continuous-network", own=True, features=3),
    continuous("continuous-network-context", own=True, context=2, facts={"core": False}),
    continuous("continuous-adaptive", solver=gm.transform.DormandPrince(1e-6, 1e-7), facts=ADAPTIVE),
    continuous(
        "continuous-adaptive-context",
        context=2,
        solver=gm.transform.DormandPrince(1e-6, 1e-7, gradient="autograd"),
        facts=ADAPTIVE,
    ),
    continuous("continuous-hutchinson", trace="hutchinson", probes=2),
    continuous("continuous-hutchinson-context", context=2, trace="hutchinson", objective="likelihood"),
    continuous("continuous-hutchinson-network", own=True, trace="hutchinson", facts={"core": False}),
    diffusion("diffusion"),
    diffusion(
        "diffusion-context-positive",
        context=2,
        support=constraints.positive,
        facts={"standardized": True, "core": False},
    ),
    diffusion("diffusion-white", features=3, facts={"standardized": True, "core": False}),
    diffusion("diffusion-network", own=True, features=3),
    diffusion("diffusion-denoised-context", own=True, context=2, parameterization="denoised", facts={"core": False}),
    diffusion("diffusion-noise", own=True, parameterization="noise", solver=gm.evolve.Heun(32), facts={"core": False}),
    diffusion("diffusion-score", own=True, parameterization="score", facts={"core": False}),
    diffusion("diffusion-energy", parameterization="energy", facts={"costly": True, "core": False}),
    diffusion("diffusion-hutchinson", trace="hutchinson"),
    diffusion("diffusion-dropout", context=2, context_dropout=0.5, likelihood_weighting=True, facts={"core": False}),
    diffusion("diffusion-two-steps", sampler=gm.evolve.AdamsBashforth(4)),
    diffusion("diffusion-solver", context=2, sampler=gm.evolve.DPMSolver(4), facts={"core": False}),
    diffusion("diffusion-ancestral", sampler=gm.evolve.Ancestral(3)),
    diffusion("diffusion-corrected", sampler=gm.evolve.PredictorCorrector(2), facts={"core": False}),
    student("student"),
    student("student-context-positive", context=2, calls=2, support=constraints.positive),
    path("path"),
    path("path-linear-context", context=2, method="local_linear"),
    path("path-posterior", posterior=True),
    energy("energy"),
    energy("energy-context-positive", context=2, support=constraints.positive, facts={"standardized": True}),
    energy(
        "energy-of-flow",
        base=flow("", F.NSF, roughness=0.1, **SPLINE),
        objective="nce",
        sampler=BRIEF,
    ),
    energy(
        "energy-contrastive-context",
        context=2,
        objective=gm.shape.Contrastive(transitions=2, buffer_size=64),
        facts={"core": False},
    ),
    energy("energy-levels-context", context=2, objective=gm.shape.Denoising((0.5, 0.1)), facts={"core": False}),
    binary(
        "energy-of-bits", lambda: gm.shape.DiscreteEnergy(3, normalized=True, hidden_features=(8,)), (3,), core=False
    ),
    binary(
        "energy-of-bits-context",
        lambda: gm.shape.DiscreteEnergy(
            event_shape=(2, 2), context_features=2, normalized=True, hidden_features=(8,), objective="contrastive"
        ),
        (2, 2),
        2,
    ),
    binary("ising", lambda: gm.shape.Ising(2, 0.3, field=0.2, learnable=True), (2, 2), core=False),
    binary("rbm", lambda: gm.shape.RBM(3, 2, normalized=True), (3,)),
    pushforward("pushforward"),
    pushforward("pushforward-context-positive", context=2, support=constraints.positive, standardized=True),
    pushforward("pushforward-manifold", invertible=True),
    pushforward(
        "pushforward-manifold-context-positive",
        invertible=True,
        context=2,
        support=constraints.positive,
        standardized=True,
    ),
    pushforward("adversarial", gm.Adversarial),
    pushforward("adversarial-spectral", gm.Adversarial, lipschitz="spectral"),
    pushforward(
        "adversarial-context-interval",
        gm.Adversarial,
        context=2,
        support=constraints.interval(0.0, 1.0),
        standardized=True,
    ),
    pushforward("corrected", gm.transform.Corrected),
    pushforward("corrected-context", gm.transform.Corrected, context=2, scale=0.5),
    ensemble(
        "ensemble",
        autoregressive("", GaussianMixture(2)),
        autoregressive("", Spline(4), "gru", order=[1, 0]),
        flow("", F.NSF, **SPLINE),
    ),
    ensemble(
        "ensemble-positive-context",
        autoregressive("", GaussianMixture(2), context=2, support=constraints.positive),
        autoregressive("", LogisticMixture(2), "transformer", context=2, support=constraints.positive),
        facts={"standardized": True},
    ),
    ensemble(
        "ensemble-tokens-context",
        autoregressive("", Categorical(3), context=2, facts=OF_TOKENS),
        autoregressive("", Categorical(3), "transformer", context=2, order=[1, 0]),
    ),
    ensemble(
        "ensemble-columns",
        autoregressive("", HEADS["columns"][0], features=3, roughness=0.15, facts=OF_COLUMNS),
        autoregressive("", HEADS["columns"][0], "gru", features=3, roughness=0.15, order=[2, 0, 1]),
    ),
)


# Further ways to build what other rows build, each call of which solves an equation: asked in the slow half alone.
DEAR = {
    "cnf-context-positive",
    "cnf-sampling",
    "continuous-adaptive",
    "continuous-hutchinson-network",
    "continuous-network",
    "continuous-network-context",
    "continuous-transport",
    "diffusion-denoised-context",
    "diffusion-dropout",
    "diffusion-hutchinson",
    "diffusion-network",
    "diffusion-noise",
    "diffusion-score",
    "diffusion-white",
    "pushforward-manifold",
}


def rows(keep: Callable[[Law], bool] = lambda law: True, slow: Callable[[Law], bool] = lambda law: False) -> Any:
    """Parametrise a test with the rows that it is about, the ``slow`` and dear ones among them marked."""
    kept = [law for law in LAWS if keep(law)]
    assert kept, "no row of the table is left"
    marks = {law.id: [pytest.mark.slow] if slow(law) or law.id in DEAR else [] for law in kept}
    return pytest.mark.parametrize("law", [pytest.param(law, id=law.id, marks=marks[law.id]) for law in kept])
