r"""Estimates of a ratio of normalisers, :math:`r = \log (Z_1 / Z_0)`, from works and from energies.

The works :math:`w` of particles that go up a ladder and of particles that go down it
(:mod:`~pyro_genmods.foundation.ladder`) obey :math:`p_\uparrow(w)\, e^{w} = p_\downarrow(w)\, e^{r}`. Of all
estimates from :math:`n_\uparrow` and :math:`n_\downarrow` of them the one of least variance solves

.. math:: \sum_\uparrow \sigma(w_i - r + m) = \sum_\downarrow \sigma(r - w_j - m), \qquad
          m = \log (n_\uparrow / n_\downarrow) ,

with the logistic function :math:`\sigma`. With one rung this is bridge sampling between two laws.

*Thermodynamic integration* takes :math:`r = \int_0^1 \mathbb E_\beta [-V]\, \mathrm d\beta` by the trapezoidal rule,
corrected by the slopes of the integrand, which are the variances of :math:`V`.

References:
    C. H. Bennett, Efficient Estimation of Free Energy Differences from Monte Carlo Data, 1976, Journal of Computational
    Physics 22. X.-L. Meng, W. H. Wong, Simulating Ratios of Normalizing Constants via a Simple Identity, 1996,
    Statistica Sinica 6. N. Friel, M. Hurn, J. Wyse, Improving power posterior estimation of statistical evidence, 2014,
    arXiv:1209.3198.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["bridge", "mean_exp", "thermodynamic"]

BISECTIONS = 80


def bridge(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate of least variance from works both ways.

    Arguments:
        up: of particles that started from the reference, ``(*groups, n)``; minus infinity where the target is zero.
        down: of particles that started from the target, ``(*groups, m)``.

    Returns:
        It, and its standard error if all particles are independent, two of ``groups``, in float64.

    Example:
        >>> x, y = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> work = lambda x: 0.5 * x**2 - 0.5 * (x - 1) ** 2 + 2                 # from N(0, 1) to N(1, 1), e^2 times
        >>> value, error = bridge(work(x), work(y + 1))
        >>> round(float(value), 1), bool(error < 0.01)
        (2.0, True)
    """
    up, down = up.double(), down.double()
    shift = math.log(up.shape[-1] / down.shape[-1])
    known = torch.cat([torch.where(up.isfinite(), up, torch.nan), torch.where(down.isfinite(), down, torch.nan)], -1)
    low = torch.where(known.isnan(), torch.inf, known).amin(-1) - 50
    high = torch.where(known.isnan(), -torch.inf, known).amax(-1) + 50
    for _ in range(BISECTIONS):
        r = (low + high) / 2
        rising, falling = torch.sigmoid(up - r[..., None] + shift), torch.sigmoid(r[..., None] - down - shift)
        below = rising.sum(-1) > falling.sum(-1)
        low, high = torch.where(below, r, low), torch.where(below, high, r)
    noise = rising.shape[-1] * rising.var(-1) + falling.shape[-1] * falling.var(-1)
    slope = (rising * (1 - rising)).sum(-1) + (falling * (1 - falling)).sum(-1)
    return (low + high) / 2, noise.sqrt() / slope.clamp_min(1e-300)


def mean_exp(log_values: Tensor) -> tuple[Tensor, Tensor]:
    r"""Logarithm of a mean, and its standard error.

    Arguments:
        log_values: logarithms of independent values, ``(*groups, n)``.

    Returns:
        :math:`\log \bar v` and :math:`\mathrm{sd}(v) / (\bar v \sqrt n)`, two of ``groups``.

    Example:
        >>> value, error = mean_exp(torch.tensor([1.0, 3.0]).log())
        >>> round(float(value.exp()), 4), round(float(error), 4)
        (2.0, 0.5)
    """
    n = log_values.shape[-1]
    value = log_values.logsumexp(-1) - math.log(n)
    relative = (log_values - value[..., None]).exp()
    return value, relative.std(-1) / math.sqrt(n) if n > 1 else torch.full_like(value, torch.nan)


def thermodynamic(levels: Tensor, inverse_temperatures: Tensor, weighted: int = 1) -> tuple[Tensor, Tensor]:
    """Thermodynamic integration, and what the rule may be wrong by.

    The first steps are taken by weights: a wide reference has draws at which the target is next to impossible, and no
    mean energy.

    Arguments:
        levels: :math:`-V` of draws at every temperature, ``(rungs + 1, groups, n)``.
        inverse_temperatures: ``(rungs + 1, groups)``.
        weighted: steps that are taken by weights.

    Returns:
        The corrected rule, and how much the correction is, two of ``(groups,)``.

    Example:
        >>> levels = torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]], [[2.0, 4.0]]])        # mean 1, then 3; variance 2
        >>> thermodynamic(levels, torch.tensor([[0.0], [1.0], [2.0]]))
        (tensor([2.]), tensor([0.]))
    """
    step = inverse_temperatures.diff(dim=0)
    gained = torch.where(step[:weighted, :, None] > 0, step[:weighted, :, None] * levels[:weighted], 0.0)
    first = mean_exp(gained)[0].sum(0)
    step, mean, variance = step[weighted:], levels[weighted:].mean(-1), levels[weighted:].var(-1)
    plain = (step * (mean[1:] + mean[:-1]) / 2).sum(0)
    correction = (step.square() * variance.diff(dim=0) / 12).sum(0)
    return first + plain - correction, correction.abs()
