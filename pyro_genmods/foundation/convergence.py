r"""Have the chains forgotten where they started? Numbers that compare chains with each other.

Draws are tensors ``(chains, draws, *shape)``. Every entry of ``shape`` is judged by itself, all of them at once.

* **Split** :math:`\hat R` compares the halves of all chains. Ranks over all draws are turned into normal scores first,
  so that heavy tails do no harm, and the same is done with the distance from the median, so that chains which agree in
  place but not in spread are found; the larger of the two counts.
* **Effective sample size**: the number of independent draws with the same error of the mean,

  .. math:: n_\mathrm{eff} = \frac{C N}{\hat\tau}, \qquad \hat\tau = -1 + 2 \sum_t \hat\rho_t ,

  with autocorrelations :math:`\hat\rho_t` of the normal scores, combined over chains and cut off by Geyer's initial
  monotone sequence.
* **Nested** :math:`\hat R` is for many chains that are too short to be judged one by one. Chains that start at one
  point form a *superchain*; its mean over :math:`M` chains has :math:`M` times less noise than that of a chain, and
  what remains between superchains is what they still know of their starting points.

References:
    A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner, Rank-normalization, folding, and localization: An
    improved R-hat for assessing convergence of MCMC, 2021, arXiv:1903.08008.
    C. C. Margossian, M. D. Hoffman, P. Sountsov, L. Riou-Durand, A. Vehtari, A. Gelman, Nested R-hat: Assessing the
    convergence of Markov chain Monte Carlo when running many short chains, 2024, arXiv:2110.13017.
    C. J. Geyer, Practical Markov chain Monte Carlo, Statistical Science 7 (1992) 473-483.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ShapeError

__all__ = ["effective_sample_size", "nested_r_hat", "split_r_hat"]

LEAST_DRAWS = 4


def split_r_hat(draws: Tensor) -> Tensor:
    r"""Rank-normalised split :math:`\hat R`, the larger of bulk and folded.

    Arguments:
        draws: ``(chains, draws, *shape)`` with at least four draws.

    Returns:
        One value for each entry, ``shape``, in float64: near 1 where chains agree, and below 1.01 is what one asks for.
        NaN where a draw is NaN or where all are equal.

    Raises:
        ShapeError: fewer than two dimensions, or fewer than four draws.

    Reference:
        Vehtari et al. 2021, arXiv:1903.08008; the same number as ``arviz.rhat`` where that accepts the draws.

    Example:
        >>> x = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> x[0, :, 1] += 1.0                              # one chain is elsewhere
        >>> x[0, :, 2] *= 3.0                              # and one is wider
        >>> split_r_hat(x) > 1.01
        tensor([False,  True,  True])
    """
    x = _split(_columns(draws))
    folded = (x - _median(x)).abs()
    larger = torch.maximum(_r_hat(_normal_scores(x)), _r_hat(_normal_scores(folded)))
    return _without_nan(larger, x).reshape(draws.shape[2:])


def effective_sample_size(draws: Tensor) -> Tensor:
    r"""Effective sample size of the bulk: of the normal scores of split chains.

    Arguments:
        draws: ``(chains, draws, *shape)`` with at least four draws.

    Returns:
        One number of draws for each entry, ``shape``, in float64. NaN where a draw is NaN; all draws count where they
        are all equal.

    Raises:
        ShapeError: fewer than two dimensions, or fewer than four draws.

    Reference:
        Vehtari et al. 2021, arXiv:1903.08008; the same number as ``arviz.ess(method="bulk")``.

    Example:
        >>> noise = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        >>> walk = noise.clone()
        >>> for t in range(1, 1000):
        ...     walk[:, t] = 0.9 * walk[:, t - 1] + noise[:, t]
        >>> bool(effective_sample_size(noise) > 3000), bool(effective_sample_size(walk) < 500)   # 4000 / 19 of the walk
        (True, True)
    """
    x = _split(_columns(draws))
    return _without_nan(_effective(_normal_scores(x)), x).reshape(draws.shape[2:])


def nested_r_hat(draws: Tensor, superchains: int) -> Tensor:
    r"""Nested :math:`\hat R` of :math:`K` superchains, :math:`\sqrt{1 + B / W}`.

    :math:`B` is the variance of the means of superchains, :math:`W` the mean over superchains of the variance between
    the means of their chains plus the mean variance within these chains. One draw a chain is enough.

    For superchains in equilibrium it is about :math:`\sqrt{1 + 1/n}` with the effective sample size :math:`n` of one
    superchain, so that a threshold of 1.01 asks for about 50 effective draws each.

    Arguments:
        draws: ``(chains, draws, *shape)``, chains of a superchain next to each other.
        superchains: number of groups of chains with a common start, at least two, a divisor of the number of chains.

    Returns:
        One value for each entry, ``shape``, in float64; NaN where a draw is NaN or where all are equal.

    Raises:
        ShapeError: fewer than two dimensions, or no draws.
        ValueError: superchains that do not divide the chains, fewer than two, or each of one draw of one chain.

    Reference:
        Margossian et al. 2024, arXiv:2110.13017.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> chains = torch.randn(64, 10, generator=generator)
        >>> starts = torch.randn(4, 1, 1, generator=generator).expand(4, 16, 1).reshape(64, 1)
        >>> bool(nested_r_hat(chains, 4) < 1.02), bool(nested_r_hat(chains + starts, 4) > 1.2)
        (True, True)
    """
    x = _columns(draws, least=1)
    chains, length = x.shape[:2]
    if superchains < 2 or chains % superchains:
        raise ValueError(
            f"superchains: got {superchains} for {chains} chains, needs a divisor of the number of chains, at least 2; "
            "start several chains from each of several points."
        )
    if chains == superchains and length == 1:
        raise ValueError("draws: got one draw in each superchain, needs more chains or more draws to see a variance.")
    x = x.reshape(superchains, chains // superchains, length, -1)
    means = x.mean(2)
    between = means.mean(1).var(0)
    within = _variance(means, 1).mean(0) + _variance(x, 2).mean((0, 1))
    return (1 + between / within).sqrt().reshape(draws.shape[2:])


# -- parts ------------------------------------------------------------------------------------------------------------


def _columns(draws: Tensor, least: int = LEAST_DRAWS) -> Tensor:
    """Draws as ``(chains, draws, columns)`` in float64."""
    if draws.dim() < 2 or draws.shape[0] < 1 or draws.shape[1] < least:
        raise ShapeError(
            f"draws: got shape {tuple(draws.shape)}, needs (chains, draws, *shape) with at least {least} draws; "
            "one chain is draws[None]."
        )
    return draws.detach().double().reshape(*draws.shape[:2], -1)


def _split(x: Tensor) -> Tensor:
    """Every chain as two, the draw in the middle of an odd number left out."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, -half:]])


def _median(x: Tensor) -> Tensor:
    """Median of all draws of a column; between the two in the middle where their number is even."""
    ordered = x.flatten(0, 1).sort(0).values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _normal_scores(x: Tensor) -> Tensor:
    """Normal quantiles of the ranks over all draws of a column, equal draws sharing their mean rank."""
    flat = x.flatten(0, 1).T.contiguous()
    ordered, order = flat.sort(-1)
    n = flat.shape[-1]
    index = torch.arange(n, device=x.device).expand_as(flat)
    new = torch.ones_like(flat, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    last = torch.ones_like(new)
    last[:, :-1] = new[:, 1:]
    first_equal = index.where(new, 0).cummax(-1).values
    last_equal = index.where(last, n - 1).flip(-1).cummin(-1).values.flip(-1)
    rank = (first_equal + last_equal).double() / 2 + 1
    scores = torch.special.ndtri((rank - 3 / 8) / (n + 1 / 4))
    return torch.empty_like(flat).scatter_(-1, order, scores).T.reshape(x.shape)


def _r_hat(x: Tensor) -> Tensor:
    """Potential scale reduction of chains ``(chains, draws, columns)``."""
    n = x.shape[1]
    between, within = n * _variance(x.mean(1), 0), _variance(x, 1).mean(0)
    return ((between / within + n - 1) / n).sqrt()


def _effective(x: Tensor) -> Tensor:
    """Effective sample size of chains ``(chains, draws, columns)`` by Geyer's initial monotone sequence."""
    chains, n, _ = x.shape
    covariance = _autocovariance(x)
    mean_variance = covariance[0] * n / (n - 1)
    total = covariance[0] + (_variance(x.mean(1), 0) if chains > 1 else 0)
    rho = 1 - (mean_variance - covariance) / total
    rho[0] = 1
    most = max(0, (n - 3) // 2)  # the last pair that is looked at
    even, odd = rho[0 : 2 * most + 1 : 2], rho[1 : 2 * most + 2 : 2]
    pair = even + odd
    positive = (pair > 0).long().cumprod(0)
    count = positive.sum(0).clamp(max=most)  # pairs that count in full; of the next one, its first half
    monotone = (pair.cummin(0).values * (torch.arange(most + 1, device=x.device)[:, None] < count)).sum(0)
    half, whole = even.gather(0, count[None])[0], pair.gather(0, count[None])[0]
    tau = -1 + 2 * monotone + half.where(whole >= 0, half.clamp_min(0))
    size = torch.full_like(tau, chains * n)
    constant = (x == x[:1, :1]).flatten(0, 1).all(0)
    return torch.where(constant, size, size / tau.clamp_min(1 / math.log10(chains * n)))


def _autocovariance(x: Tensor) -> Tensor:
    """Mean over chains of the autocovariances at all lags, ``(draws, columns)``: one transform back serves them all."""
    n = x.shape[1]
    size = 2 ** math.ceil(math.log2(2 * n))
    power = torch.fft.rfft(x - x.mean(1, keepdim=True), n=size, dim=1).abs().square().mean(0)
    return torch.fft.irfft(power, n=size, dim=0)[:n] / n


def _variance(x: Tensor, dim: int) -> Tensor:
    """Unbiased variance; of a single value zero."""
    return x.var(dim) if x.shape[dim] > 1 else torch.zeros_like(x.select(dim, 0))


def _without_nan(result: Tensor, x: Tensor) -> Tensor:
    return result.masked_fill(x.isnan().flatten(0, 1).any(0), torch.nan)
