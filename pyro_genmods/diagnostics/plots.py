"""Pictures, where people would rather look than read.

Every function returns a matplotlib figure. Matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .calibration import Coverage

__all__ = ["plot_calibration", "plot_image_posterior"]


def plot_calibration(coverage: Mapping[str, Coverage] | Coverage) -> Any:
    """Observed against nominal coverage of credible intervals, with two standard errors; the diagonal is the truth.

    Arguments:
        coverage: one result of ``interval_coverage``, or several by name.

    Returns:
        The ``matplotlib.figure.Figure``.

    Example:
        >>> levels = np.linspace(0.1, 0.9, 9)
        >>> figure = plot_calibration(Coverage(levels, levels, 0.02 + 0 * levels))
        >>> figure.axes[0].get_xlabel()
        'nominal level'
    """
    import matplotlib.pyplot as plt

    named = {"": coverage} if isinstance(coverage, Coverage) else dict(coverage)
    figure, axes = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
    for name, result in named.items():
        (line,) = axes.plot(result.levels, result.coverage, marker="o", markersize=4, label=name or "observed")
        low, high = (result.coverage + sign * 2 * result.standard_error for sign in (-1, 1))
        axes.fill_between(result.levels, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal level", ylabel="fraction of truths inside", aspect="equal")
    axes.legend(frameon=False, loc="upper left")
    return figure


def plot_image_posterior(
    truth: Tensor, observed: Tensor, draws: Tensor, shown: int = 3, limits: tuple[float, float] = (0.0, 1.0)
) -> Any:
    """Truth, observation, posterior mean, posterior standard deviation and draws, one row per image.

    Arguments:
        truth: ``(images, height, width)``.
        observed: the same shape, NaN where nothing was observed (drawn hatched grey).
        draws: ``(draws, images, height, width)``.
        shown: number of draws per image.
        limits: grey scale of white and black.

    Returns:
        The ``matplotlib.figure.Figure``.

    Example:
        >>> import torch
        >>> figure = plot_image_posterior(torch.rand(2, 8, 8), torch.rand(2, 8, 8), torch.rand(10, 2, 8, 8))
        >>> len(figure.axes) >= 2 * 7
        True
    """
    import matplotlib.pyplot as plt

    columns = ["truth", "observed", "posterior mean", "posterior sd", *(f"draw {i + 1}" for i in range(shown))]
    figure, grid = plt.subplots(
        len(truth), len(columns), figsize=(1.25 * len(columns) + 0.7, 1.3 * len(truth) + 0.3), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    spread = draws.std(0).cpu()
    grey = {"cmap": "gray_r", "vmin": limits[0], "vmax": limits[1]}
    picks = np.linspace(0, len(draws) - 1, shown).round().astype(int)
    for row, axes in enumerate(grid):
        pictures = [truth[row], observed[row], draws[:, row].mean(0), spread[row], *(draws[i, row] for i in picks)]
        for column, (axis, picture) in enumerate(zip(axes, pictures, strict=True)):
            style = {"cmap": "viridis", "vmin": 0.0, "vmax": float(spread.max())} if column == 3 else grey
            shown_image = axis.imshow(picture.detach().cpu().numpy(), **style)
            axis.set_facecolor("#d8e3ee")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(columns[column], fontsize=9)
            if column == 3:
                last_spread = shown_image
    figure.colorbar(last_spread, ax=grid[:, -1].tolist(), shrink=0.7, label="posterior sd")
    return figure
