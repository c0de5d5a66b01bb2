"""Statistical tests with one declared rate of false alarms.

Every test of the suite that compares random draws with a truth is judged here. A check computes a statistic and the
probability ``p`` of one at least as extreme if the program is right; it fails if ``p < FALSE_ALARM``. Checks of several
columns share the rate (Bonferroni). Seeds are fixed, so a run is repeatable; the rate bounds the probability that a
change of seed, or of the order of draws, makes a right program fail. With about two thousand checks that is below
0.2 % for the whole suite.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import arviz
import numpy as np
import torch
from scipy import stats
from torch import Tensor

FALSE_ALARM = 1e-6
LEAST_EXPECTED = 8.0  # draws in a cell below which its count is no longer close to Gaussian


def judge(name: str, statistic: float, p_value: float, checks: int = 1) -> None:
    """Fail if a result this extreme is rarer than the declared rate, shared among ``checks``."""
    threshold = FALSE_ALARM / checks
    assert p_value >= threshold, (
        f"{name}: statistic {statistic:.6g} has p-value {p_value:.3g}, below the threshold {threshold:.3g}"
    )


def assert_mean(draws: Tensor, truth: Tensor | float, standard_error: Tensor | None = None, name: str = "mean") -> None:
    """The mean of draws ``(n, ...)`` is the truth: a z-test per column, with the Monte Carlo standard error.

    Arguments:
        draws: independent draws; for a chain pass its ``standard_error``.
        truth: shape of one draw, or a number.
        standard_error: of the mean; default that of independent draws.
    """
    draws = draws.detach().double().flatten(1) if draws.dim() > 1 else draws.detach().double()[:, None]
    truth = torch.as_tensor(truth, dtype=torch.float64).flatten()
    if standard_error is None:
        standard_error = draws.std(0) / math.sqrt(len(draws))
    gap = (draws.mean(0) - truth) / standard_error.double().flatten().clamp_min(1e-300)
    worst = float(gap.abs().max())
    judge(name, worst, float(2 * stats.norm.sf(worst)), gap.numel())


def chain_standard_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean of dependent draws ``(chains, n, ...)``, one per column."""
    array = draws.detach().double().numpy().reshape(*draws.shape[:2], -1)
    errors = [float(arviz.mcse(np.ascontiguousarray(array[:, :, i]))) for i in range(array.shape[-1])]
    return torch.tensor(errors, dtype=torch.float64).reshape(draws.shape[2:])


def assert_law(draws: Tensor, cdf: Callable[[Tensor], Tensor], name: str = "law") -> None:
    """Each column of draws ``(n,)`` or ``(n, columns)`` has the distribution function: Kolmogorov and Smirnov."""
    columns = draws.detach().double().reshape(len(draws), -1)
    for i, column in enumerate(columns.T):
        result = stats.kstest(cdf(column).numpy(), "uniform")
        judge(f"{name}, column {i}, Kolmogorov-Smirnov", float(result.statistic), result.pvalue, columns.shape[1])


def assert_uniform(u: Tensor, name: str = "uniform") -> None:
    """Rows ``(n, columns)`` are uniform on the unit cube: every column, and every pair of columns jointly."""
    u = u.detach().double()
    n, columns = u.shape
    assert_law(u, lambda x: x, name)
    cells = max(2, min(10, int(math.sqrt(n / LEAST_EXPECTED))))
    index = (u * cells).long().clamp(0, cells - 1)
    pairs = [(i, j) for i in range(columns) for j in range(i)]
    for i, j in pairs:
        counts = torch.bincount(index[:, i] * cells + index[:, j], minlength=cells**2)
        assert_counts(counts, torch.full((cells**2,), cells**-2.0), f"{name}, columns {j} and {i}", len(pairs))


def assert_counts(counts: Tensor, probabilities: Tensor, name: str = "counts", checks: int = 1) -> None:
    """Counts of cells have the probabilities; what the probabilities lack of one is the cell of everything else.

    Arguments:
        counts: draws in each cell, and optionally one more entry for draws in none.
        probabilities: of the cells; cells with few expected draws are pooled.
    """
    counts, probabilities = counts.double().flatten(), probabilities.detach().double().flatten()
    if len(counts) == len(probabilities) + 1:
        probabilities = torch.cat([probabilities, (1 - probabilities.sum()).clamp_min(0)[None]])
    n = float(counts.sum())
    rare = n * probabilities < LEAST_EXPECTED
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = n * torch.cat([probabilities[~rare], probabilities[rare].sum()[None]])
    if expected[-1] < LEAST_EXPECTED:  # the pooled cell itself is rare: an exact test of its own
        tail = float(stats.binom.sf(int(observed[-1]) - 1, int(n), min(float(expected[-1]) / n, 1.0)))
        judge(f"{name}, rare cells", float(observed[-1]), tail, 2 * checks)
        observed, expected = observed[:-1], expected[:-1]
    assert len(observed) > 1, f"{name}: all cells are rare, the test could not fail"
    expected = expected * observed.sum() / expected.sum()
    statistic = float(((observed - expected) ** 2 / expected).sum())
    judge(f"{name}, chi-square", statistic, float(stats.chi2.sf(statistic, len(observed) - 1)), 2 * checks)


def assert_same_law(x: Tensor, y: Tensor, projections: int = 8, name: str = "two samples") -> None:
    """Two samples ``(n, ...)`` and ``(m, ...)`` have one law: two-sample tests of columns and of random projections."""
    x, y = x.detach().double().flatten(1), y.detach().double().flatten(1)
    generator = torch.Generator().manual_seed(20261123)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = torch.cat([torch.eye(x.shape[1], dtype=torch.float64), directions], -1)
    scale = torch.cat([x, y]).std(0).clamp_min(1e-300)
    for i, direction in enumerate((directions / scale[:, None]).T):
        result = stats.ks_2samp((x @ direction).numpy(), (y @ direction).numpy())
        judge(f"{name}, projection {i}", float(result.statistic), result.pvalue, directions.shape[1])
