r"""What follows a prefix, and what fills gaps.

Under one order, :math:`p(x_{>k} \mid x_{\le k})` is a product of conditionals that the model has anyway: exact. Entries
missing elsewhere are a posterior,

.. math:: p(x_M \mid x_O) \propto \prod_{t} p(x_t \mid x_{<t}) ,

from which particles are drawn place by place: a missing entry is proposed from its conditional, an observed one
multiplies the weight by its conditional, and particles are resampled when their effective number falls below half. The
product of mean weights is an unbiased estimate of the evidence :math:`p(x_O)`.

Reference:
    A. Doucet, N. de Freitas, N. Gordon (eds), Sequential Monte Carlo Methods in Practice, Springer 2001.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..distribution import GenerativeDistribution, check_place
from ..foundation.causal import transformed
from ..foundation.errors import DensityError, ShapeError, SupportError
from ..foundation.shapes import Context, Noise, Rows, Values
from ..mechanism import Cost, Density, Mechanism
from .factorization import Factorization
from .walk import Walk

__all__ = ["Continuation", "Imputation", "impute"]


class Continuation(Mechanism):
    """The entries after a prefix; the prefix, followed by the model's own context, is its context.

    Arguments:
        model: has one order.
        k: number of entries of the prefix.

    Raises:
        DensityError: the model averages over orders, or its support does not fall into entries.
    """

    density: ClassVar[Density] = Density.EXACT

    def __init__(self, model: Factorization, k: int) -> None:
        order = model.order
        rest = order[k:]
        super().__init__(rest.shape, (k + sum(model.context_shape),))
        self.k, self.model = k, model
        self.coordinates = model.coordinates.columns(rest)
        self.prefix_coordinates = model.coordinates.columns(order[:k])
        for part, columns in ((self.coordinates, rest), (self.prefix_coordinates, order[:k])):
            part.support = model.support_of_columns(columns.tolist()) or part.support
        self.has_rsample, self.value_dtype = model.has_rsample, model.value_dtype

    @classmethod
    def of(cls, law: GenerativeDistribution, prefix: Tensor) -> GenerativeDistribution:
        """The distribution that follows ``prefix`` ``(*batch, k)`` under a law."""
        model = law.model
        k = prefix.shape[-1] if prefix.dim() else 0
        if not 0 < k < model.features:
            raise ShapeError(
                f"prefix: got shape {tuple(prefix.shape)}, needs (*batch, k) with 0 < k < {model.features} entries."
            )
        check_place("prefix", prefix, model, model.takes_any_dtype)
        context = prefix.to(model.place[0])
        if not bool(context.isfinite().all()):
            raise ShapeError("prefix: has entries that are not finite; impute them with impute(x, observed).")
        if law.context is not None:
            batch = torch.broadcast_shapes(context.shape[:-1], law.batch_shape)
            context = torch.cat([context.expand((*batch, k)), law.context.expand(batch + model.context_shape)], -1)
        elif law.batch_shape:
            context = context.expand((*torch.broadcast_shapes(context.shape[:-1], law.batch_shape), k))
        rest = cls(model, k)
        if law._validate_args:
            where = model.support if model.eos is not None else rest.prefix_coordinates.support
            inside = where.check(context[..., :k])
            if not bool(inside.all()):
                raise SupportError(
                    f"prefix: {context[..., :k][~inside][:4].tolist()} lies outside the support {where}."
                )
        return GenerativeDistribution(rest, context, validate_args=law._validate_args)

    @property
    def cost(self) -> Cost:
        """One pass to score, one step for every entry, those of the prefix included, to sample."""
        return Cost(sample=self.model.features, score=1)

    @property
    def takes_any_dtype(self) -> bool:
        return self.model.takes_any_dtype

    def _split(self, context: Tensor) -> tuple[Tensor, Tensor | None]:
        prefix, _ = self.prefix_coordinates.pull(context[:, : self.k])
        if not self.model.context_shape:
            return prefix, None
        return prefix, self.model.context_standardization(context[:, self.k :])

    def _whole(self, prefix: Tensor, y: Tensor) -> Tensor:
        return torch.cat([prefix, y], 1)[:, self.model.order.argsort()]

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        prefix, c = self._split(c)
        whole = self._whole(prefix, y)
        rest = self.model.order[self.k :]
        log_prob = self.model.entry_log_probs(self.model.inside(whole), c)[:, rest].sum(-1)
        if self.model.units is not None:
            log_prob = log_prob - self.model.units.scale.log()[rest].sum()
        if self.model.eos is not None:
            log_prob = torch.where(self.model.support.check(whole), log_prob, -math.inf)
        return log_prob

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        prefix, own = self._split(c)
        if self.model.conditional.discrete or not (torch.is_grad_enabled() or transformed()):
            return self._walk(prefix, own, z)
        known = self.model.pull_rows(self._whole(prefix, torch.zeros_like(z)), own)[:, self.model.order[: self.k]]
        return self.model.push_rows(self._whole(known, z), own)[:, self.model.order[self.k :]]

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        prefix, c = self._split(c)
        return self.model.pull_rows(self._whole(prefix, y), c)[:, self.model.order[self.k :]]

    def _walk(self, prefix: Tensor, c: Tensor | None, z: Tensor) -> Tensor:
        inside = self.model.inside(self._whole(prefix, z))
        with torch.no_grad():
            walk = Walk(self.model, inside, c)
            for i, v in enumerate(walk.places):
                theta = walk.parameters()
                known = i < self.k
                walk.put(inside[:, v] if known else walk.head.quantile(theta, z[:, i - self.k]))
        return self.model.outside(walk.values())[:, self.model.order[self.k :]]


@dataclass(frozen=True)
class Imputation:
    """Draws of missing entries.

    Attributes:
        values: ``(num_samples, *lead, *event_shape)``, observed entries as they were.
        log_evidence: ``lead``, log density of the observed entries in nats; an estimate if there were particles.
    ess: ``lead``, effective number of particles at the end; ``inf`` where the answer is exact, 0 where no particle
            can have made what was observed.
    """

    values: Tensor
    log_evidence: Tensor
    ess: Tensor


def impute(
    law: GenerativeDistribution, x: Tensor, observed: Tensor, num_samples: int, num_particles: int | None
) -> Imputation:
    """See :meth:`pyro_genmods.factorize.AutoregressiveDistribution.impute`."""
    model = law.model
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}, needs at least 1.")
    if model.eos is not None:
        raise DensityError("impute: the length of a sequence may hang on what is missing; condition(prefix) instead.")
    if num_particles is not None and num_particles < 1:
        raise ValueError(f"num_particles: got {num_particles}, needs at least 1.")
    split = x.dim() - len(law.event_shape)
    fits = observed.dim() <= x.dim() and all(
        a in (1, b) for a, b in zip(observed.shape[::-1], x.shape[::-1], strict=False)
    )
    if split < 0 or x.shape[split:] != law.event_shape or not fits:
        raise ShapeError(
            f"observed: got x {tuple(x.shape)} and observed {tuple(observed.shape)}, needs (*lead, "
            f"{', '.join(map(str, law.event_shape))}) and a shape that expands to it."
        )
    check_place("x", x, model, model.takes_any_dtype)
    lead = torch.broadcast_shapes(x.shape[:split], law.batch_shape)
    x, observed = x.expand(lead + law.event_shape), observed.to(torch.bool).expand(lead + law.event_shape)
    filled = torch.where(observed, x, _inner_point(model).to(x))
    lead, rows, c = law._rows(filled, law.event_shape)
    known = observed.reshape(len(rows), -1)
    y, inside = model.coordinates.pull(rows)
    if isinstance(inside, Tensor) and not bool(inside.isfinite().all()):
        bad = torch.where(known, rows.flatten(1), torch.nan)[~inside.isfinite()]
        raise SupportError(
            f"x: observed entries of {len(bad)} event(s) are NaN or outside the support {model.support}, the first "
            f"{bad[0, :8].tolist()} (missing ones as nan); mark them as missing, or correct them."
        )
    y = model.inside(y)
    with torch.no_grad():
        volume = torch.where(known, model.entry_volumes(rows), 0).sum(-1)
        if model.orderless:
            drawn, evidence, ess = _exactly(model, y, known, c, num_samples)
        else:
            later = known[:, model.order]
            surprises = bool((later[:, 1:] & ~later[:, :-1]).any())  # something is observed after a gap
            number = max(256 if num_particles is None else num_particles, num_samples) if surprises else num_samples
            drawn, evidence, ess = _by_particles(model, y, known, c, num_samples, number)
        values, _ = model.coordinates.push(model.outside(drawn.flatten(0, 1)))
    values = law._as_values(values).reshape(num_samples, *lead, *law.event_shape)
    values = torch.where(known.reshape(lead + law.event_shape), rows.reshape(lead + law.event_shape).to(values), values)
    return Imputation(values, (evidence + volume).reshape(lead), ess.reshape(lead))


def _inner_point(model: Factorization) -> Tensor:
    """An event inside the support, for entries that nobody reads."""
    dtype, device = model.place
    zero = torch.zeros(1, model.features, dtype=dtype, device=device)
    return model.coordinates.push(zero)[0][0]


def _exactly(
    model: Factorization, y: Tensor, known: Tensor, c: Tensor | None, num_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern by pattern, under an order that has the observed entries first."""
    drawn, evidence = y.new_empty(num_samples, *y.shape), y.new_empty(len(y))
    patterns, which = known.unique(dim=0, return_inverse=True)
    for p, pattern in enumerate(patterns):
        index = (which == p).nonzero().flatten()
        view = model._under(torch.cat([pattern.nonzero().flatten(), (~pattern).nonzero().flatten()]))
        some, context = y[index], None if c is None else c[index]
        evidence[index] = torch.where(pattern, view.entry_log_probs(some, context), 0).sum(-1)
        walk = Walk(view, some.repeat(num_samples, 1), None if context is None else context.repeat(num_samples, 1))
        for v in walk.places:
            theta = walk.parameters()
            walk.put(some[:, v].repeat(num_samples) if pattern[v] else walk.head.sample(theta))
        drawn[:, index] = walk.values().reshape(num_samples, len(index), -1)
    return drawn, evidence, torch.full_like(evidence, math.inf)


def _by_particles(
    model: Factorization, y: Tensor, known: Tensor, c: Tensor | None, num_samples: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequential Monte Carlo along the order, all rows and particles together; rows are the slow dimension."""
    rows = len(y)
    many, seen = y.repeat_interleave(number, 0), known.repeat_interleave(number, 0)
    walk = Walk(model, many, None if c is None else c.repeat_interleave(number, 0))
    weights, evidence = y.new_zeros(rows, number), y.new_zeros(rows)
    for v in walk.places:
        if bool((_ess(weights) < number / 2).any()):
            evidence, weights, ancestors = _resample(evidence, weights)
            walk = walk.fork(ancestors)
        theta, head = walk.parameters(), walk.head
        entry = torch.where(seen[:, v], many[:, v], head.sample(theta).to(many.dtype))
        gain = torch.where(seen[:, v], head.log_prob(theta, entry), 0)
        weights = weights + gain.reshape(rows, number)
        walk.put(entry)
    even = (weights.amax(-1) == weights.amin(-1)) & weights.isfinite().all(-1)
    ess = torch.where(even, math.inf, _ess(weights)).masked_fill(weights.amax(-1) == -math.inf, 0)
    evidence = evidence + weights.logsumexp(-1) - math.log(number)
    chosen = torch.multinomial(_shares(weights), num_samples, replacement=bool(ess.isfinite().any()))
    drawn = walk.values().reshape(rows, number, -1).take_along_dim(chosen[..., None], 1)
    return drawn.transpose(0, 1), evidence, ess


def _shares(weights: Tensor) -> Tensor:
    """Normalised weights; even ones where all are zero, whose evidence says so."""
    return torch.where(weights.amax(-1, keepdim=True) == -math.inf, 0, weights).softmax(-1)


def _ess(weights: Tensor) -> Tensor:
    return 1 / _shares(weights).square().sum(-1)


def _resample(evidence: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Systematic resampling of the rows whose effective number is low; the others stay as they are."""
    rows, number = weights.shape
    low = _ess(weights) < number / 2
    points = (torch.rand_like(evidence)[:, None] + torch.arange(number, device=weights.device)) / number
    cumulative = _shares(weights).cumsum(-1)
    index = torch.searchsorted(cumulative, points * cumulative[:, -1:]).clamp(max=number - 1)
    index = torch.where(low[:, None], index, torch.arange(number, device=weights.device))
    mean = weights.logsumexp(-1) - math.log(number)
    evidence, weights = torch.where(low, evidence + mean, evidence), torch.where(low[:, None], 0, weights)
    start = torch.arange(rows, device=weights.device)[:, None] * number
    return evidence, weights, (start + index).flatten()
