r"""Is the posterior to be trusted? Numbers that answer.

* :func:`psis_khat`: the Pareto tail index of importance weights. If :math:`\hat k < 0.7` the weighted guide is a usable
  approximation of the posterior, else it misses mass that no reweighting brings back.
* :func:`interval_coverage`: how often central credible intervals hold the truth. A calibrated posterior holds it in a
  fraction of cases equal to the interval's level, at every level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..foundation.errors import ShapeError

__all__ = ["Coverage", "interval_coverage", "pareto_smoothed", "psis_khat"]


def psis_khat(log_weights: Tensor) -> float:
    r"""Pareto tail index :math:`\hat k` of importance weights.

    Arguments:
        log_weights: :math:`\log p(x_i, \mathrm{data}) - \log q(x_i)` for draws :math:`x_i \sim q`, ``(draws,)``, in
            nats; at least a few hundred.

    Returns:
        :math:`\hat k`; below 0.5 good, below 0.7 usable, above not. ``inf`` where a weight is not a number.

    Raises:
        ShapeError: not a vector of at least 100 draws.

    Reference:
        A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, Pareto Smoothed Importance Sampling, 2024,
        arXiv:1507.02646.

    Example:
        >>> z = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> wide = -0.5 * z**2 - (-0.5 * (z / 2) ** 2)     # a proposal wider than the target: bounded weights
        >>> psis_khat(wide) < 0.5
        True
    """
    if log_weights.dim() != 1 or len(log_weights) < 100:
        raise ShapeError(f"log_weights: got shape {tuple(log_weights.shape)}, needs (draws,) with at least 100 draws.")
    return pareto_smoothed(log_weights)[1]


def pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Importance weights with their largest replaced by expected order statistics of a Pareto tail, and its index.

    Arguments:
        log_weights: as for :func:`psis_khat`.

    Returns:
        Logarithms of weights that sum to one, ``(draws,)``, float64 on the CPU, and :math:`\hat k`. Where a weight is
        not finite, or all are equal, they are returned as they are, with an index of ``inf``.
    """
    import arviz as az  # when asked for: it takes seconds, and sets warning filters

    weights = log_weights.detach().cpu().double()
    if bool(weights.isnan().any() | weights.isposinf().any() | (weights == weights[0]).all()):
        return weights, float("inf")
    if hasattr(az, "convert_to_datatree"):  # ArviZ 1.x, where it takes log likelihoods, of which weights are inverses
        inverse = az.dict_to_dataset({"weights": -weights.numpy()}, sample_dims=["sample"])["weights"]
        smoothed, khat = inverse.azstats.psislw(dim="sample")
    else:
        smoothed, khat = az.psislw(weights.numpy())
    return torch.from_numpy(np.array(smoothed, dtype=float)), float(khat)


@dataclass(frozen=True)
class Coverage:
    """Observed coverage of central credible intervals.

    Attributes:
        levels: nominal levels, ``(levels,)``.
        coverage: fraction of (event, entry) pairs whose truth lies in the interval, ``(levels,)``.
        standard_error: its standard error over events, which need not have independent entries, ``(levels,)``.
    """

    levels: np.ndarray
    coverage: np.ndarray
    standard_error: np.ndarray

    def at(self, level: float) -> tuple[float, float]:
        """Coverage and standard error at a nominal level that was computed."""
        index = int(np.abs(self.levels - level).argmin())
        return float(self.coverage[index]), float(self.standard_error[index])


def interval_coverage(
    draws: Tensor, truth: Tensor, levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
) -> Coverage:
    """Coverage of the central credible intervals of posterior draws over many events with known truth.

    Arguments:
        draws: ``(draws, events, *entries)``, in the units of the truth.
        truth: ``(events, *entries)``.
        levels: nominal levels between 0 and 1.

    Returns:
        Coverage with its standard error over events.

    Raises:
        ShapeError: shapes of draws and truth do not match.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> loc = torch.randn(400, 3, generator=g)
        >>> truth, draws = loc + torch.randn(400, 3, generator=g), loc + torch.randn(500, 400, 3, generator=g)
        >>> round(interval_coverage(draws, truth).at(0.9)[0], 2)
        0.9
    """
    if draws.shape[1:] != truth.shape or truth.dim() < 1:
        raise ShapeError(
            f"draws: got shape {tuple(draws.shape)} for a truth {tuple(truth.shape)}, needs (draws, *truth)."
        )
    nominal = torch.as_tensor(levels, dtype=draws.dtype, device=draws.device)
    lower = torch.quantile(draws.flatten(1), (1 - nominal) / 2, dim=0)
    upper = torch.quantile(draws.flatten(1), (1 + nominal) / 2, dim=0)
    value = truth.reshape(1, -1)
    inside = ((lower <= value) & (value <= upper)).to(draws.dtype).reshape(len(nominal), len(truth), -1).mean(-1)
    error = inside.std(1, correction=1) / len(truth) ** 0.5 if len(truth) > 1 else torch.full_like(nominal, torch.nan)
    return Coverage(nominal.cpu().numpy(), inside.mean(1).cpu().numpy(), error.cpu().numpy())
