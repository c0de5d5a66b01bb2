r"""Exposure bias: how far a model that feeds on its own output drifts.

A model is trained on prefixes of the data and samples from prefixes of its own. With an oracle :math:`p^*`, the error
at place :math:`t` after a prefix of either kind is

.. math:: \epsilon_t = \mathbb E_{x_{<t} \sim p^*} \mathrm{KL}\big(p^*_t \,\|\, p_t\big), \qquad
          r_t = \mathbb E_{x_{<t} \sim p} \mathrm{KL}\big(p^*_t \,\|\, p_t\big),

and errors accumulate by the factor :math:`\sum_t r_t / \bar\epsilon`, which is ``T`` without exposure bias. Without an
oracle there is the entropy drift,

.. math:: \text{drift}_t = H\big(p_t \mid x_{<t} \sim p\big) - \mathrm{CE}\big(\text{data}_t, p_t\big),

what the model is unsure of while it runs freely minus its loss on data: zero for a calibrated model, positive where
its text dissolves, negative where it repeats itself.

References:
    K. Arora, L. El Asri, H. Bahuleyan, J. Cheung, Why Exposure Bias Matters, 2022, arXiv:2204.01171. M. Braverman et
    al., Calibration, Entropy Rates, and Memory in Language Models, 2019, arXiv:1906.05664.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..foundation.errors import DensityError, ShapeError
from .factorization import Factorization
from .law import AutoregressiveDistribution
from .sequences import alive

__all__ = ["EntropyDrift", "ExposureBias", "entropy_drift", "exposure_bias"]


@dataclass(frozen=True)
class ExposureBias:
    """Errors against an oracle, in nats, place by place ``(T,)``.

    Attributes:
        teacher_forced: after prefixes of the oracle.
        free_running: after prefixes of the model.
    """

    teacher_forced: Tensor
    free_running: Tensor

    @property
    def accumulation(self) -> float:
        """Accumulated error in units of the mean teacher-forced error; ``T`` without exposure bias."""
        return float(self.free_running.sum() / self.teacher_forced.mean())

    @property
    def ratio(self) -> float:
        """Free-running error over teacher-forced error; 1 without exposure bias."""
        return float(self.free_running.sum() / self.teacher_forced.sum())

    @property
    def excess_percent(self) -> float:
        """Percentage by which errors accumulate faster than without exposure bias."""
        return 100 * (self.ratio - 1)


@dataclass(frozen=True)
class EntropyDrift:
    """Uncertainty in free running minus loss on data, in nats, place by place ``(T,)``.

    Attributes:
        entropy: of the conditionals after prefixes of the model.
        cross_entropy: of the data after its own prefixes.
        standard_error: of the total drift.
    """

    entropy: Tensor
    cross_entropy: Tensor
    standard_error: float

    @property
    def total(self) -> float:
        """Sum over places."""
        return float((self.entropy - self.cross_entropy).sum())


@torch.no_grad()
def exposure_bias(
    law: AutoregressiveDistribution, oracle: AutoregressiveDistribution, num_samples: int = 1000
) -> ExposureBias:
    """Compare a law with the one that made the data, conditional by conditional.

    Prefixes are drawn; after each, divergences of discrete conditionals are exact sums, of continuous ones they are
    taken at one draw of the oracle's conditional.

    Arguments:
        law: without batch dimensions and with one order.
        oracle: an autoregressive distribution with the same order, kinds of entries and units.
        num_samples: prefixes of each kind.

    Raises:
        ShapeError: the two laws differ in shape or order, or have batch dimensions.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Autoregressive(4, gm.factorize.Categorical(3))
        >>> bias = gm.factorize.exposure_bias(model(), model())
        >>> bias.teacher_forced
        tensor([0., 0., 0., 0.])
    """
    model, truth = law.model, oracle.model
    if law.batch_shape or oracle.batch_shape or law.event_shape != oracle.event_shape:
        raise ShapeError(f"oracle: got {oracle} for {law}; needs the same event_shape, and no batch dimensions.")
    if not torch.equal(model.order, truth.order):
        raise ShapeError("oracle: its order differs from the model's, so that their conditionals do not compare.")
    return ExposureBias(
        _divergences(truth, model, oracle, oracle.sample((num_samples,))),
        _divergences(truth, model, oracle, law.sample((num_samples,))),
    )


def _divergences(truth: Factorization, model: Factorization, law: AutoregressiveDistribution, x: Tensor) -> Tensor:
    """Mean divergence of the model's from the true conditionals after prefixes of ``x``, in the order of places."""
    _, rows, _ = law._rows(x, law.event_shape)
    here, there = (m.inside(m.coordinates.pull(rows)[0]) for m in (truth, model))
    theta, other = truth.parameters_of(here, None), model.parameters_of(there, None)
    if truth.levels is not None:
        log_p, log_q = truth.conditional.log_probs(theta), model.conditional.log_probs(other)
        gap = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(-1)
    else:
        y = truth.conditional.quantile(theta, torch.randn_like(here)).to(here.dtype)
        event, _ = truth.coordinates.push(truth.outside(y))
        there = model.inside(model.coordinates.pull(event)[0])
        gap = truth.conditional.log_prob(theta, y) + truth.entry_volumes(event)
        gap = gap - model.conditional.log_prob(other, there) - model.entry_volumes(event)
    if truth.eos is not None:
        gap = torch.where(alive(here, truth.eos), gap, 0)
    return gap.mean(0)[truth.order]


@torch.no_grad()
def entropy_drift(law: AutoregressiveDistribution, data: Tensor, num_samples: int | None = None) -> EntropyDrift:
    """Measure exposure bias without an oracle.

    Entropies of discrete conditionals are exact sums; those of continuous ones are taken at the law's own draws.

    Arguments:
        law: without batch dimensions and with one order.
        data: ``(n, *event_shape)``, not used in training.
        num_samples: free-running draws; default as many as there are data.

    Raises:
        ShapeError: the law has batch dimensions.
        DensityError: the law averages over orders.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> law = gm.Autoregressive(4, gm.factorize.Categorical(3))()
        >>> drift = gm.factorize.entropy_drift(law, law.sample((2000,)))
        >>> abs(drift.total) < 5 * drift.standard_error + 1e-4
        True
    """
    if law.batch_shape:
        raise ShapeError(f"law: got batch_shape {tuple(law.batch_shape)}; measure one law at a time.")
    model = law.model
    if len(model.orders) > 1:
        raise DensityError("law: averages over orders and has no conditionals; take model.under(order).")
    entropy = _losses(law, law.sample((num_samples or len(data),)), own=True)
    loss = _losses(law, data, own=False)
    error = (entropy.sum(-1).var() / len(entropy) + loss.sum(-1).var() / len(loss)).sqrt()
    return EntropyDrift(entropy.mean(0)[model.order], loss.mean(0)[model.order], float(error))


def _losses(law: AutoregressiveDistribution, x: Tensor, own: bool) -> Tensor:
    """Surprise at every entry, ``(rows, T)``; at the law's own draws averaged over the entry where it is discrete."""
    model = law.model
    _, rows, _ = law._rows(x, law.event_shape)
    y = model.inside(model.coordinates.pull(rows)[0])
    theta = model.parameters_of(y, None)
    if own and model.levels is not None:
        losses = torch.special.entr(model.conditional.log_probs(theta).exp()).sum(-1)
    else:
        losses = -model.conditional.log_prob(theta, y)
    losses = losses - model.entry_volumes(rows)
    return losses if model.eos is None else torch.where(alive(y, model.eos), losses, 0)
