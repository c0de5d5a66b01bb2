"""Numbers that compare draws of an energy with each other, with data, and with the score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..foundation.convergence import nested_r_hat
from ..foundation.divergence import estimated_divergence, exact_divergence, rademacher
from ..foundation.errors import DensityError
from ..foundation.stein import Identity, SteinDiscrepancy, kernel_stein_discrepancy, stein_identities
from .checks import Distance, Shift
from .long_run import Target
from .modes import find_modes, nearest
from .network import check_curvature

__all__ = ["energy_distance", "histogram_overlap", "mode_weights", "moved", "score_measures", "thinned"]

IDENTITY_ROWS, STEIN_ROWS, ROWS = 2**13, 2**11, 2**10  # for identities, for pairs, and in one batch
EXACT_FEATURES = 8  # up to which the divergence is exact
BOOTSTRAPS, PERMUTATIONS = 2000, 200
DISTANCE_ROWS = 2**10  # of either sample
BINS = (5, 30)


def thinned(draws: Tensor, most: int) -> Tensor:
    """Every so many draws ``(chains, draws, dim)``, so that there are at most so many numbers, and four draws.

    Example:
        >>> thinned(torch.zeros(2, 100, 1), 40).shape
        torch.Size([2, 20, 1])
    """
    stride = min(math.ceil(draws.numel() / most), max(1, draws.shape[1] // 4))
    return draws[:, stride - 1 :: stride]


def histogram_overlap(a: Tensor, b: Tensor) -> float:
    r"""Common mass of two samples, :math:`\sum_i \min(p_i, q_i)` over bins that hold equally much of both together.

    Arguments:
        a, b: numbers ``(n,)`` and ``(m,)``.

    Example:
        >>> x = torch.arange(1000.0)
        >>> histogram_overlap(x, x), histogram_overlap(x, x + 1000)
        (1.0, 0.0)
    """
    bins = max(BINS[0], min(BINS[1], math.isqrt(min(len(a), len(b)))))
    grid = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    both = torch.cat([x.double()[torch.linspace(0, len(x) - 1, 2**12).long()] for x in (a.sort()[0], b.sort()[0])])
    edges = both.quantile(grid)
    shares = [torch.bincount(torch.bucketize(x.double(), edges), minlength=bins) / len(x) for x in (a, b)]
    return float(torch.minimum(*shares).sum())


def energy_distance(x: Tensor, y: Tensor) -> Distance:
    """Energy distance of two samples of independent rows, compared with that of random halves of both.

    Arguments:
        x, y: ``(rows, features)``; the first tells the units of columns.

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> near, far = energy_distance(x[:200], x[200:]), energy_distance(x[:200], x[200:] + 1)
        >>> near.z < 4, far.z > 10, round(far.share, 1)
        (True, True, 0.2)
    """
    x, y = (z[torch.linspace(0, len(z) - 1, min(len(z), DISTANCE_ROWS)).long()].double() for z in (x, y))
    both = torch.cat([x, y]) / x.std(0).clamp_min(torch.finfo(x.dtype).tiny)
    distances = torch.cdist(both, both)
    sign = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(y),), -1 / len(y))]).double()
    signs = torch.stack([sign, *(sign[torch.randperm(len(sign))] for _ in range(PERMUTATIONS))])
    found, *chance = -((signs @ distances) * signs).sum(1)
    chance = torch.stack(chance)
    largest = 2 * distances[: len(x), len(x) :].mean()
    return Distance(float((found - chance.mean()) / largest), float((found - chance.mean()) / chance.std()))


def moved(first: Tensor, second: Tensor, paired: bool = False) -> Shift:
    """How far means move from some draws to others.

    Arguments:
        first, second: ``(chains, draws, entries)``.
        paired: whether they are of the same chains, in the same order.

    Example:
        >>> x = torch.randn(64, 50, 1)
        >>> moved(x[:, :25], 1 + x[:, 25:], paired=True).sd.round()
        tensor([1.], dtype=torch.float64)
    """
    a, b = first.double().mean(1), second.double().mean(1)
    shift = b.mean(0) - a.mean(0)
    variance = (b - a).var(0) / len(a) if paired else a.var(0) / len(a) + b.var(0) / len(b)
    tiny = torch.finfo(shift.dtype).tiny
    sd = second.double().flatten(0, 1).std(0).clamp_min(tiny)
    return Shift(shift / sd, shift / variance.sqrt().clamp_min(tiny), len(a) - 1)


def mode_weights(
    rows: Tensor, superchains: int, data: Tensor | None, centres: Tensor | None
) -> tuple[Tensor | None, Tensor | None, float, Shift | None]:
    """Modes, their shares of each superchain, nested R-hat of these, and how far they are from those of the data.

    Arguments:
        rows: draws ``(chains, draws, features)``.
        superchains: how many.
        data: rows, or ``None``.
        centres: of modes, looked for in the data if not given.
    """
    if centres is None and data is not None:
        centres = find_modes(data)
    if centres is None:
        return None, None, math.nan, None
    centres = centres.to("cpu", rows.dtype)

    def members(y: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(nearest(y, centres), len(centres)).double()

    inside = members(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    occupancy = inside.mean(1).unflatten(0, (superchains, -1)).mean(1)
    never = inside.flatten(0, 1).std(0) == 0  # or always: the same in all superchains
    r_hat = float(nested_r_hat(inside, superchains).masked_fill(never, 1.0).max())
    if data is None:
        return centres, occupancy, r_hat, None
    of_data = members(data.cpu())
    by_chain = inside.mean(1)
    gap = by_chain.mean(0) - of_data.mean(0)
    # a share that no chain has, or all have, is known no better than one draw of each would tell
    error = by_chain.var(0) / len(rows) + of_data.var(0) / len(of_data)
    return centres, occupancy, r_hat, Shift(gap, gap / error.clamp_min(0.25 / len(rows) ** 2).sqrt(), len(rows) - 1)


def score_measures(target: Target, rows: Tensor) -> tuple[dict[str, Identity], SteinDiscrepancy]:
    """Stein's identities and the kernel discrepancy of draws ``(chains, draws, features)``, in standard deviations."""
    dtype, device = target.model.place
    some = thinned(rows, IDENTITY_ROWS * rows.shape[2]).to(device, dtype)
    scale = some.flatten(0, 1).std(0).clamp_min(torch.finfo(dtype).tiny)
    smooth = _smooth(target, some.flatten(0, 1)[:64])
    parts = [_scored(target, part, scale, smooth) for part in (some.flatten(0, 1) / scale).split(ROWS)]
    score = torch.cat([s for s, _ in parts]).unflatten(0, some.shape[:2])
    divergence = torch.cat([v for _, v in parts]).unflatten(0, some.shape[:2])
    known = smooth and bool(divergence.isfinite().all())  # second derivatives overflow where first ones do not
    identities = stein_identities(some / scale, score, divergence if known else None)
    few = (thinned(x, STEIN_ROWS * rows.shape[2]) for x in (some / scale, score))
    return identities, kernel_stein_discrepancy(*few, bootstraps=BOOTSTRAPS)


def _scored(target: Target, w: Tensor, scale: Tensor, smooth: bool) -> tuple[Tensor, Tensor]:
    """Score and its divergence at rows in units of the scale."""

    def score(w: Tensor) -> Tensor:
        return scale * target.score(scale * w)

    if not smooth:
        return score(w).detach(), w[:, 0]
    if w.shape[1] <= EXACT_FEATURES:
        return exact_divergence(score, w)
    return estimated_divergence(score, w, rademacher(1, *w.shape, dtype=w.dtype, device=w.device))


def _smooth(target: Target, y: Tensor) -> bool:
    """Whether the network has a second derivative, without which an identity is false."""
    c = target.context(len(y))
    try:
        check_curvature(lambda rows: target.model.energy_rows(rows, c), y, "")
    except (DensityError, RuntimeError):  # zero, or not implemented
        return False
    return True
