r"""Energy sites of a program as functions of its latents: contexts, densities, and auxiliary draws.

At a row of latents each energy site :math:`x \sim f(x, c) / Z(c)` has a context :math:`c`. Auxiliary events
:math:`w \sim f(\cdot, c) / Z(c)` of the shape of the site come from

* the law itself, where it draws without a chain;
* an inner chain of Hamiltonian transitions that leaves :math:`f(\cdot, c)` invariant, from the value that the site has
  (double Metropolis-Hastings): right up to what the chain has not forgotten;
* the law's own sampler.

References:
    F. Liang, A double Metropolis-Hastings sampler for spatial models with intractable normalizing constants, 2010,
    Journal of Statistical Computation and Simulation 80(9).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, biject_to

from ..contract import Density
from ..foundation.adaptation import DualAveraging, halton
from ..foundation.chains import Step, hamiltonian, start
from ..foundation.errors import ModelError
from ..foundation.graphs import trace_graph
from .quiet import quiet, value_and_grad
from .reparam import unwrap

__all__ = ["EnergySite", "InnerChains", "energy_sites", "licensed"]

LENGTH, TARGET = 1.3, 0.7
SPREAD = 0.1  # least step relative to the largest: contexts make laws of different widths
MOST_LEAPFROGS = 16


def licensed(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same program with the densities of energies as they are, whatever their constants depend on.

    Arguments:
        model: a Pyro program.
    """
    return _Licensed()(model)


class _Licensed(Messenger):
    """Gives laws with an unknown constant a copy of their model that is allowed to be unnormalised."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not isinstance(msg["fn"], Distribution):
            return
        law, wrap = unwrap(msg["fn"])
        if getattr(law, "density", None) is Density.UNNORMALIZED and hasattr(law, "model"):
            law = copy.copy(law)
            law.model = copy.copy(law.model)
            law.model.allow_unnormalized = True
            msg["fn"] = wrap(law)


@dataclass(frozen=True)
class EnergySite:
    """An energy site, seen at one run of its program.

    Attributes:
        name: of the site.
        law: its law at that run; its model makes those at other contexts.
        value: what was observed, or ``None`` for a latent.
        mask: which of its independent events count, ``batch_shape`` of the law, or ``None`` where all do.
    """

    name: str
    law: Any
    value: Tensor | None
    mask: Tensor | None

    @property
    def exact(self) -> bool:
        """Whether the law needs no chain to draw."""
        return self.law.model.cost.sample is not None

    @property
    def discrete(self) -> bool:
        """Whether its values are, so that no inner chain of ours can follow gradients."""
        return bool(self.law.support.is_discrete)

    def at(self, context: Tensor) -> Any:
        """The law at contexts ``(chains, *batch, *context_shape)``."""
        law = self.law.model(context)
        law._validate_args = False
        return law

    def log_prob(self, context: Tensor, w: Tensor) -> Tensor:
        """Unnormalised log density of events at contexts, summed for each chain, ``(chains,)``."""
        with torch.no_grad():
            values = self.at(context).log_prob(w)
        values = values if self.mask is None else torch.where(self.mask, values, 0.0)
        return values.reshape(len(values), -1).sum(-1)


def energy_sites(
    program: Any, names: list[str], q: Tensor
) -> tuple[list[EnergySite], Callable[[Tensor], list[Tensor]]]:
    """Energy sites of a program, and their contexts at rows.

    Arguments:
        program: a :class:`~pyro_genmods.infer.program.Program`.
        names: of the sites.
        q: a row at which the program is looked at, ``(dim,)``.

    Returns:
        The sites, and a function of rows ``(chains, dim)`` to contexts ``(chains, *batch, *context_shape)`` of each.

    Raises:
        ModelError: a site whose law has no context, is transformed or is scaled.
    """
    trace = _run(program, q)
    sites = [_site(name, trace.nodes[name], name in program.layout.shapes) for name in names]

    def one(row: Tensor) -> list[Tensor]:
        nodes = _run(program, row).nodes
        return [unwrap(nodes[name]["fn"])[0].context for name in names]

    def contexts(rows: Tensor) -> list[Tensor]:
        if program.road == "vmap":
            return torch.vmap(one)(rows)
        return [torch.stack(parts) for parts in zip(*[one(row) for row in rows], strict=True)]

    return sites, contexts


def _run(program: Any, row: Tensor) -> Any:
    args, kwargs = program.arguments(program.data)
    with torch.no_grad(), quiet():
        return poutine.trace(poutine.condition(program.model, program._values(row)[1])).get_trace(*args, **kwargs)


def _site(name: str, node: dict[str, Any], latent: bool) -> EnergySite:
    law, _ = unwrap(node["fn"])
    if getattr(law, "context", None) is None:
        raise ModelError(
            f"site {name!r}: its law depends on latents by something else than a context, and auxiliary draws need it "
            "at theirs; give Energy(context_features=...) what its network takes from the latents."
        )
    if not isinstance(node["scale"], int | float) or node["scale"] != 1:
        raise ModelError(
            f"site {name!r}: its density is scaled by {node['scale']}, and no auxiliary draws belong to the power of a "
            "law; leave poutine.scale away."
        )
    return EnergySite(name, law, None if latent else node["value"], _mask(node, law))


def _mask(node: dict[str, Any], law: Any) -> Tensor | None:
    """The mask around a site and those of its law, together, in the batch of the law."""
    masks, fn = [(node["mask"], node["fn"])], node["fn"]
    while hasattr(fn, "base_dist"):
        masks += [(fn._mask, fn)] if isinstance(fn, MaskedDistribution) else []
        fn = fn.base_dist
    found = None
    for mask, wrapped in masks:
        if mask is not None:
            inner = (1,) * (len(law.batch_shape) - len(wrapped.batch_shape))
            mask = torch.as_tensor(mask, dtype=torch.bool).expand(wrapped.batch_shape)
            mask = mask.reshape(wrapped.batch_shape + inner).expand(law.batch_shape)
            found = mask if found is None else found & mask
    return found


class _Inner:
    """The energy of unconstrained events of a law as a target, recorded as a graph of rows and contexts."""

    def __init__(self, site: EnergySite, context: Tensor, x: Tensor) -> None:
        self._site, self._bijection = site, biject_to(site.law.support)
        u = self._bijection.inv(x)
        self._shape, self._rows = u.shape, site.at(context).batch_shape.numel()
        self.num_gradients, self.context = 0, context
        examples = (self.rows(x), context)
        try:
            self._run: Callable[..., Any] = trace_graph(lambda q, context: self._evaluate(q, context), examples)
        except Exception:  # whatever it is that cannot be recorded, it can be run
            self._run = self._evaluate

    def _evaluate(self, q: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        law, bijection = self._site.at(context), self._bijection

        def energy(q: Tensor) -> Tensor:
            u = q.reshape(self._shape)
            x = bijection(u)
            volume = bijection.log_abs_det_jacobian(u, x).reshape(*law.batch_shape, -1).sum(-1)
            return -(law.log_prob(x) + volume).reshape(len(q))

        return value_and_grad(energy, q)

    def rows(self, x: Tensor) -> Tensor:
        return self._bijection.inv(x).reshape(self._rows, -1).contiguous()

    def events(self, q: Tensor) -> Tensor:
        return self._bijection(q.reshape(self._shape))

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self._run(q, self.context)

    def value(self, q: Tensor) -> Tensor:
        return self.value_and_grad(q)[0]

    def grad(self, q: Tensor) -> Tensor:
        return self.value_and_grad(q)[1]

    def fuse(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        return partial(function, self)


class InnerChains:
    """Hamiltonian chains for auxiliary draws; all learn one step size in warm-up, which is then fixed.

    Arguments:
        site: whose law they draw from.
        transitions: of each chain for each draw.

    Attributes:
        acceptance: mean since the warm-up.
        gradients: evaluated so far, event by event.
    """

    def __init__(self, site: EnergySite, transitions: int) -> None:
        self.site, self.transitions = site, transitions
        self._target: _Inner | None = None
        self._step: DualAveraging | None = None
        self._rates: list[float] = []
        self._count = 0

    @property
    def acceptance(self) -> float:
        return sum(self._rates) / len(self._rates) if self._rates else math.nan

    @property
    def gradients(self) -> int:
        return 0 if self._target is None else self._target.num_gradients

    def draw(self, context: Tensor, x: Tensor, warm: bool) -> Tensor:
        """Where chains from events arrive, each under its law.

        Arguments:
            context: of laws, ``(chains, *batch, *context_shape)``.
            x: where they start, ``(chains, *batch, *event_shape)``.
            warm: whether the step size learns.
        """
        context = context.contiguous()  # a graph counts on the strides it was recorded with
        target = self._target = self._target or _Inner(self.site, context, x)
        target.context = context
        q = target.rows(x)
        state, scale = start(q, target), torch.ones_like(q[0])
        self._step = self._step or DualAveraging.around(0.5 * q.shape[1] ** -0.25, TARGET, len(q))
        for _ in range(self.transitions):
            self._count += 1
            size = self._step.size if warm else self._step.final
            leapfrogs = max(1, min(MOST_LEAPFROGS, math.ceil(LENGTH * (0.5 + halton(self._count)) / size)))
            spread = SPREAD ** torch.rand_like(q[:, :1])
            step = Step(size * spread, scale, torch.randn_like(q), torch.rand_like(q[:, 0]).log(), leapfrogs)
            state, info = hamiltonian(state, target, step)
            rate = float(info.acceptance.mean())
            if warm:
                self._step.update(rate)
            else:
                self._rates.append(rate)
        target.num_gradients += len(q)
        return target.events(state.position)
