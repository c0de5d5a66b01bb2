r"""A Pyro program at many draws of its latents: values, log densities, new data.

A program says :math:`p(x, y)` for one set of latents :math:`x` and data :math:`y`. Here it is run at thousands. Three
roads lead there:

* ``torch.vmap`` runs the program on all draws at once, and what it sees has the shapes of one draw;
* a plate to the left of all its plates does the same where the program broadcasts, and draws from laws that functorch
  cannot draw from;
* a loop runs it draw by draw, always right and slow.

Whether a road is right is not guessed from shapes. It is taken, and its outcome at a few draws is compared with that of
the loop; where the two differ, or where it fails, the next road is tried. A program that branches on values is left to
the loop. This is what makes log densities of vector latents exact, also when there are as many draws as data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Independent

from .given import Given

__all__ = ["Outcome", "Program", "Site"]

Values = dict[str, Tensor]
BUDGET = 2**22  # numbers that a chunk of draws may hold
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)  # what a wrong road may end in
OUTER = "_draws"


@dataclass(frozen=True, eq=False)
class Site:
    """What a program does at one of its sites.

    Attributes:
        name: of the site.
        kind: ``"latent"``, ``"data"`` (observed), ``"deterministic"``, ``"factor"``, ``"auxiliary"`` (of a guide), or
            ``"noise"`` (observed noise, into which an observed site was transformed).
        value: at the point where the program was looked at.
        event_dim: number of dimensions of the value that are one event.
        batch_shape: shape of its log density, the independent events.
        plates: dimension, counted from the right of ``batch_shape``, and size of each plate around it.
        noise: name of the site of kind ``"noise"`` that carries the rest of its log density.
        mask: which independent events count, ``batch_shape``; ``None`` where all do.
        scale: weight of its log density in that of the program; NaN where it differs from event to event.
        law: its distribution at that point.
    """

    name: str
    kind: str
    value: Tensor
    event_dim: int
    batch_shape: Size
    plates: dict[str, tuple[int, int]]
    noise: str | None = None
    mask: Tensor | None = None
    scale: float = 1.0
    law: Any = None


@dataclass(frozen=True)
class Outcome:
    """What came out at ``n`` draws: values and pointwise log densities by site, and the log joint density ``(n,)``."""

    values: Values
    log_prob: Values
    total: Tensor

    def row(self, i: int) -> Outcome:
        values, log_prob = ({name: x[i] for name, x in part.items()} for part in (self.values, self.log_prob))
        return Outcome(values, log_prob, self.total[i])

    def agrees(self, other: Outcome) -> bool:
        """Whether two outcomes are one, up to rounding."""
        a, b = self._tensors(), other._tensors()
        return (
            a.keys() == b.keys() and all(_close(a[k], b[k], 1e-5) for k in a) and _close(self.total, other.total, 1e-3)
        )

    def cpu(self) -> Outcome:
        values, log_prob = ({name: x.cpu() for name, x in part.items()} for part in (self.values, self.log_prob))
        return Outcome(values, log_prob, self.total.cpu())

    def _tensors(self) -> dict[tuple[str, str], Tensor]:
        parts = {"value": self.values, "log_prob": self.log_prob}
        return {(part, name): x for part, tensors in parts.items() for name, x in tensors.items()}


class Program:
    """A program and its arguments, to be run at many draws.

    Arguments:
        model: a Pyro model or guide.
        args, kwargs: its arguments.
        point: values of latents at which it is looked at, by name; what is missing is drawn.
        minibatches: indices of subsampling plates; those that are missing are drawn once, and kept.

    Attributes:
        sites: everything at which the program is random, observed, weighted or deterministic, by name.
        minibatches: indices of the plates that hold fewer events than their size.
        hidden: latents that are not in ``point``.
        noisy: the program draws something that is no site, so that its densities change from run to run.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        point: Mapping[str, Tensor] | None = None,
        minibatches: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._args, self._kwargs = model, args, dict(kwargs or {})
        self.minibatches, self.sites = dict(minibatches or {}), {}
        with torch.no_grad():
            trace = self._trace(dict(point or {}))
        samples = [node for node in trace.nodes.values() if node["type"] == "sample"]
        subsamples = {node["name"]: node["value"] for node in samples if _is_minibatch(node)}
        self.minibatches = subsamples | self.minibatches
        self.sites = _sites([node for node in samples if not site_is_subsample(node)])
        self.hidden = [name for name in self.names("latent") if name not in (point or {})]
        depths = [-dim for site in self.sites.values() for dim, _ in site.plates.values()]
        self._nesting = max(depths + [len(site.batch_shape) for site in self.sites.values()], default=0)
        numbers = sum(site.value.numel() + site.batch_shape.numel() for site in self.sites.values())
        self._chunk = max(8, min(4096, BUDGET // max(numbers, 1)))
        self.noisy = self._draws_out_of_sight()

    def names(self, *kinds: str) -> list[str]:
        """Sites of these kinds, in the order of the program."""
        return [site.name for site in self.sites.values() if site.kind in kinds]

    @torch.no_grad()
    def score(self, draws: Mapping[str, Tensor]) -> Outcome:
        """Deterministic values, log densities of latents and data, log joint density at draws ``(n, *shape)``.

        Log densities are pointwise: summed over an event, one entry for each independent event, without the weights of
        ``poutine.scale`` and of subsampling plates, and zero where a site is masked. The log joint density has these
        weights, and all factors.
        """
        given = self._latents_of(draws)
        n = len(next(iter(given.values())))
        outcome = self._all(n, given, _Wish(self.names("deterministic"), self.names("latent", "data", "noise")))
        for site in self.sites.values():
            if site.noise:
                outcome.log_prob[site.name] = outcome.log_prob[site.name] + outcome.log_prob.pop(site.noise)
        return outcome

    @torch.no_grad()
    def draw(self, n: int, draws: Mapping[str, Tensor] | None = None, new: Iterable[str] = ()) -> Outcome:
        """Values of what is drawn: data sites named ``new`` and, without ``draws``, everything else but data.

        Arguments:
            n: number of draws.
            draws: latents that are given, ``(n, *shape)``.
            new: names of data sites that are drawn instead of observed.
        """
        given, new = self._latents_of(draws or {}), tuple(new)
        drawn = self.hidden if given else self.names("latent", "deterministic", "auxiliary")
        return self._all(n, given, _Wish([*drawn, *new], [], new))

    # -- one run -------------------------------------------------------------------------------------------------

    def _latents_of(self, draws: Mapping[str, Tensor]) -> Values:
        return {name: draws[name] for name in self.names("latent") if name in draws}

    def _trace(
        self, given: Values, new: tuple[str, ...] = (), outer: int | None = None, row: Tensor | None = None
    ) -> poutine.Trace:
        """One run, unseen by the handlers around us; without validation, as far out a density is zero and no error."""
        computed = {site.name for site in self.sites.values() if site.kind == "deterministic" or site.noise}
        values = {name: value for name, value in given.items() if name not in computed}

        def model(*args: Any, **kwargs: Any) -> Any:
            if outer is None:
                return self._model(*args, **kwargs)
            with pyro.plate(OUTER, outer, dim=-self._nesting - 1):
                return self._model(*args, **kwargs)

        with poutine.block(), pyro.validation_enabled(False):
            run = Given(values | self.minibatches, new, row)(model)
            trace = poutine.trace(run).get_trace(*self._args, **self._kwargs)
            trace.compute_log_prob()
        return trace

    @torch.no_grad()
    def _draws_out_of_sight(self) -> bool:
        given = {site.name: site.value for site in self.sites.values() if site.kind in ("latent", "auxiliary")}
        before = _noise_states(given)
        self._trace(given)
        return any(not torch.equal(a, b) for a, b in zip(before, _noise_states(given), strict=True))

    # -- many runs -----------------------------------------------------------------------------------------------

    def _all(self, n: int, given: Values, wish: _Wish) -> Outcome:
        """All draws in chunks, by the first road that is right at the first chunk; results on the CPU."""
        parts, road = [], None
        for start in range(0, n, self._chunk):
            rows = {name: value[start : start + self._chunk] for name, value in given.items()}
            size = min(self._chunk, n - start)
            if road is None:
                road, outcome = self._first_right(size, rows, wish)
            else:
                outcome = road(size, rows, wish)
            parts.append(outcome.cpu())
        return _collected(parts, torch.cat)

    def _first_right(self, n: int, given: Values, wish: _Wish) -> tuple[Callable[..., Outcome], Outcome]:
        for road, checked in ((self._by_vmap, 3), (self._by_plate, 16)):
            try:
                outcome = road(n, given, wish)
                if self._is_right(given, wish, outcome, {i * (n - 1) // (checked - 1) for i in range(checked)}):
                    return road, outcome
            except FAILURES as error:
                if _is_of_branching(error):  # a plate would take one branch for all draws, and be right at some
                    break
        return self._by_loop, self._by_loop(n, given, wish)

    def _is_right(self, given: Values, wish: _Wish, outcome: Outcome, checked: Iterable[int]) -> bool:
        """Whether one run at a time, at what was given and drawn, says the same of the draws that are checked."""
        rows = {i: outcome.row(i) for i in checked}
        drawn = [name for name in wish.values if self.sites[name].kind != "deterministic"]
        if any(bool(row.values[name].isnan().any()) for row in rows.values() for name in drawn):
            return False
        return all(row.agrees(self._one(_row(given, i) | row.values, wish.seen())) for i, row in rows.items())

    def _one(self, given: Values, wish: _Wish) -> Outcome:
        return wish.read(self._trace(given, wish.new))

    def _by_loop(self, n: int, given: Values, wish: _Wish) -> Outcome:
        return _collected([self._one(_row(given, i), wish) for i in range(n)], torch.stack)

    def _by_vmap(self, n: int, given: Values, wish: _Wish) -> Outcome:
        def one(row: Tensor, values: Values) -> tuple[Values, Values, Tensor]:
            outcome = wish.read(self._trace(values, wish.new, row=row))
            return outcome.values, outcome.log_prob, outcome.total

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(performance drop|was resized)")
            return Outcome(*torch.vmap(one, randomness="different")(torch.zeros(n), given))

    def _by_plate(self, n: int, given: Values, wish: _Wish) -> Outcome:
        """All draws in a plate to the left of all others; the outcome is brought to the shapes of one draw."""
        given = {name: self._spread(self.sites[name], value) for name, value in given.items()}
        outcome = wish.read(self._trace(given, wish.new, outer=n), n)
        return Outcome(
            {name: _rows(x, n, self.sites[name].value.shape) for name, x in outcome.values.items()},
            {name: _rows(x, n, self.sites[name].batch_shape) for name, x in outcome.log_prob.items()},
            outcome.total,
        )

    def _spread(self, site: Site, value: Tensor) -> Tensor:
        batch_dim = value.dim() - 1 - site.event_dim
        return value.reshape(len(value), *(1,) * (self._nesting - batch_dim), *value.shape[1:])


@dataclass(frozen=True)
class _Wish:
    """Names of the sites whose values and whose log densities are read off a run, and of those that it draws anew."""

    values: list[str]
    log_prob: list[str]
    new: tuple[str, ...] = ()

    def seen(self) -> _Wish:
        return _Wish(self.values, self.log_prob)

    def read(self, trace: poutine.Trace, rows: int | None = None) -> Outcome:
        values = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in self.values}
        log_prob = {name: _pointwise(trace.nodes[name]) for name in self.log_prob}
        nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and not site_is_subsample(node)]
        terms = [node["log_prob"].reshape(rows or 1, -1).sum(-1) for node in nodes]
        return Outcome(values, log_prob, sum(terms) if rows else sum(terms)[0])


# -- reading a trace --------------------------------------------------------------------------------------------------


def _sites(nodes: list[Mapping[str, Any]]) -> dict[str, Site]:
    kinds = {node["name"]: _kind(node) for node in nodes}
    carried = {
        node["name"]: f"{node['name']}_base"
        for node in nodes
        if kinds[node["name"]] == "deterministic"
        and node["is_observed"]
        and not node["infer"].get("_deterministic")
        and kinds.get(f"{node['name']}_base") == "data"
    }
    kinds |= dict.fromkeys(carried, "data") | dict.fromkeys(carried.values(), "noise")
    return {node["name"]: _site(node, kinds[node["name"]], carried.get(node["name"])) for node in nodes}


def _site(node: Mapping[str, Any], kind: str, noise: str | None) -> Site:
    value = torch.as_tensor(node["value"]).detach()
    plates = {frame.name: (frame.dim, frame.size) for frame in node["cond_indep_stack"] if frame.vectorized}
    law, shape, scale = node["fn"], node["log_prob"].shape, torch.as_tensor(node["scale"])
    weight = float(scale) if scale.numel() == 1 else torch.nan
    return Site(node["name"], kind, value, law.event_dim, shape, plates, noise, _mask(node, shape), weight, law)


def _mask(node: Mapping[str, Any], shape: Size) -> Tensor | None:
    """The mask around a site and that of its law, together."""
    masks = [node["mask"], node["fn"]._mask if isinstance(node["fn"], MaskedDistribution) else None]
    tensors = [torch.as_tensor(mask, dtype=torch.bool).expand(shape) for mask in masks if mask is not None]
    return torch.stack(tensors).all(0) if tensors else None


def _kind(node: Mapping[str, Any]) -> str:
    law = node["fn"]
    while isinstance(law, Independent | MaskedDistribution | ExpandedDistribution):
        law = law.base_dist
    if isinstance(law, Unit):
        return "factor"
    if isinstance(law, Delta):
        return "deterministic"
    if node["infer"].get("is_auxiliary"):
        return "auxiliary"
    return "data" if node["is_observed"] else "latent"


def _is_minibatch(node: Mapping[str, Any]) -> bool:
    return site_is_subsample(node) and node["value"] is not None and len(node["value"]) < node["fn"].size


def _pointwise(node: Mapping[str, Any]) -> Tensor:
    return scale_and_mask(node["unscaled_log_prob"], mask=node["mask"])


def _noise_states(values: Values) -> list[Tensor]:
    """States of the generators that a program with these values draws from."""
    devices = {value.device for value in values.values() if value.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _close(a: Tensor, b: Tensor, atol: float) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=atol, equal_nan=True)


def _is_of_branching(error: Exception) -> bool:
    """Whether functorch met a branch or a loop of Python that depends on values."""
    return any(words in str(error) for words in ("data-dependent control flow", "calling .item()"))


# -- rows -------------------------------------------------------------------------------------------------------------


def _row(values: Values, i: int) -> Values:
    return {name: value[i] for name, value in values.items()}


def _rows(x: Tensor, n: int, shape: Size) -> Tensor:
    """A tensor of a run in the outer plate as ``(n, *shape)``; one that does not depend on the draws is repeated."""
    if x.numel() == shape.numel():
        return x.reshape(shape).expand(n, *shape)
    if x.shape[:1] != (n,):
        raise ValueError("a value does not have the draws in its first dimension")
    return x.reshape(n, *shape)


def _collected(parts: list[Outcome], join: Callable[[list[Tensor]], Tensor]) -> Outcome:
    values, log_prob = (
        {name: join([getattr(part, field)[name] for part in parts]) for name in getattr(parts[0], field)}
        for field in ("values", "log_prob")
    )
    return Outcome(values, log_prob, join([part.total for part in parts]))
