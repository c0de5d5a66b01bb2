"""Pictures, where people would rather look than read.

Every function returns a matplotlib figure. Matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distribution import GenerativeDistribution
from ..foundation.errors import ShapeError
from .calibration import Coverage

__all__ = [
    "plot_calibration",
    "plot_generator_mesh",
    "plot_image_posterior",
    "plot_trajectories",
    "plot_vector_field",
]

DOTS = {"s": 5, "color": "0.72", "linewidth": 0, "rasterized": True, "zorder": 0}


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


def plot_vector_field(
    velocity: Callable[[Tensor, Tensor], Tensor],
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    limits: tuple[float, float] = (-3.0, 3.0),
    resolution: int = 20,
    points: Tensor | None = None,
) -> Any:
    """A velocity in the plane at several times, one panel each: an arrow says where to, its colour how fast.

    Arguments:
        velocity: called with a time ``()`` and places ``(rows, 2)``; returns velocities ``(rows, 2)``.
        times: of the panels, on one scale of colours that ends where 99% of the arrows are slower.
        limits: least and largest value of both coordinates.
        resolution: number of arrows in a row and in a column; all are of one length.
        points: what flows, ``(len(times), rows, 2)``, drawn below the arrows of its time.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ShapeError: the velocity or the points are not in the plane.

    Example:
        >>> figure = plot_vector_field(lambda t, y: (t - 1) * y, times=(0.0, 0.5))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['t = 0', 't = 0.5']
    """
    import matplotlib.pyplot as plt

    if points is not None and (points.dim() != 3 or len(points) != len(times) or points.shape[2] != 2):
        raise ShapeError(
            f"points: got shape {tuple(points.shape)}, needs ({len(times)}, rows, 2), places at each time."
        )
    places = torch.cartesian_prod(*[torch.linspace(*limits, resolution)] * 2)
    velocities = [_velocity_at(velocity, time, places) for time in times]
    speeds = [v.norm(dim=1) for v in velocities]
    fastest = float(torch.stack(speeds).quantile(0.99)) or 1.0
    figure, grid = plt.subplots(
        1, len(times), figsize=(3.0 * len(times) + 0.7, 3.5), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    gap = (limits[1] - limits[0]) / (resolution - 1)
    style = {"cmap": "viridis", "clim": (0.0, fastest), "angles": "xy", "scale_units": "xy", "pivot": "mid"}
    ends = (limits[0] - gap, limits[1] + gap)
    for panel, (axes, time, v, speed) in enumerate(zip(grid[0], times, velocities, speeds, strict=True)):
        if points is not None:
            axes.scatter(*points[panel].detach().cpu().numpy().T, **{**DOTS, "color": "#f2a366"})
        arrows = (v / speed.clamp_min(1e-12)[:, None]).numpy()
        shown = axes.quiver(*places.numpy().T, *arrows.T, speed.numpy(), width=0.006, scale=1 / (0.85 * gap), **style)
        axes.set(aspect="equal", title=f"t = {time:g}", xlim=ends, ylim=ends)
    figure.colorbar(shown, ax=grid[0].tolist(), label="speed", extend="max", shrink=0.85, aspect=30, pad=0.01)
    return figure


def _velocity_at(velocity: Callable[[Tensor, Tensor], Tensor], time: float, places: Tensor) -> Tensor:
    with torch.no_grad():
        v = velocity(torch.tensor(float(time)), places)
    if v.shape != places.shape:
        raise ShapeError(
            f"velocity: returned shape {tuple(v.shape)} for {len(places)} places, needs {tuple(places.shape)}; of a "
            "field in more dimensions, draw two coordinates at fixed values of the others."
        )
    return v.detach().cpu()


def plot_trajectories(paths: Tensor, data: Tensor | None = None, *, lines: int = 200) -> Any:
    """Paths in the plane from noise to data, coloured by time.

    Arguments:
        paths: ``(points in time, rows, 2)``, at equally spaced times from 0 to 1.
        data: ``(rows, 2)``, drawn in grey below.
        lines: number of rows whose whole path is drawn; of all others, only the end.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ShapeError: paths or data are not in the plane, or there is one time only.

    Example:
        >>> import torch
        >>> noise, data = torch.randn(50, 2), torch.randn(50, 2) / 5 + 3
        >>> figure = plot_trajectories(torch.stack([torch.lerp(noise, data, t / 10) for t in range(11)]), data)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['data', 'noise, t = 0', 'draws, t = 1']
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap

    if paths.dim() != 3 or paths.shape[2] != 2 or len(paths) < 2:
        raise ShapeError(
            f"paths: got shape {tuple(paths.shape)}, needs (points in time, rows, 2) with 2 or more points; of paths "
            "in more dimensions, choose two coordinates."
        )
    ways = paths.detach().cpu().numpy()
    figure, axes = plt.subplots(figsize=(5.4, 5.0), layout="constrained")
    _scatter_data(axes, data)
    some = ways[:, np.linspace(0, ways.shape[1] - 1, min(lines, ways.shape[1])).round().astype(int)]
    segments = np.stack([some[:-1], some[1:]], 2)
    middles = (np.arange(len(segments)) + 0.5) / len(segments)
    colour = ListedColormap(plt.get_cmap("plasma")(np.linspace(0, 0.78, 256)))
    drawn = LineCollection(segments.reshape(-1, 2, 2), array=np.repeat(middles, segments.shape[1]), cmap=colour)
    drawn.set(clim=(0, 1), linewidth=0.9, alpha=0.7, rasterized=True)
    axes.add_collection(drawn)
    for end, label, value in ((some[0], "noise, t = 0", 0.0), (ways[-1], "draws, t = 1", 1.0)):
        axes.scatter(*end.T, s=10, color=[colour(value)], edgecolor="white", linewidth=0.3, label=label, zorder=3)
    axes.set(aspect="equal")
    axes.autoscale_view()
    figure.colorbar(drawn, ax=axes, label="time", shrink=0.8, aspect=30).solids.set_alpha(1)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, markerscale=2)
    return figure


def plot_generator_mesh(law: GenerativeDistribution, data: Tensor | None = None, *, cells: int = 24) -> Any:
    r"""How a generator folds the plane: a square of noise, and where it is carried.

    The square is cut into cells of equal probability, :math:`z = \Phi^{-1}(u)` with lines at multiples of :math:`u =
    1 / \text{cells}`, so that the image of each cell, wide or narrow, has the same probability. The outermost cells,
    which have no outer edge, are left out.

    Arguments:
        law: a pushforward of two normal variables to the plane, without batch dimensions.
        data: ``(rows, 2)``, drawn in grey below.
        cells: number of cells on an edge.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ShapeError: noise, events or data are not in the plane, or the law has batch dimensions.

    Example:
        >>> import zuko, pyro_genmods as gm
        >>> figure = plot_generator_mesh(gm.Flow(zuko.flows.NICE(2))(), cells=10)
        >>> [axes.get_title() for axes in figure.axes]
        ['noise', 'draws']
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    if tuple(law.base.event_shape) != (2,) or tuple(law.event_shape) != (2,) or law.batch_shape:
        raise ShapeError(
            f"law: got noise of shape {tuple(law.base.event_shape)}, events of shape {tuple(law.event_shape)} and a "
            f"batch of shape {tuple(law.batch_shape)}, needs (2,), (2,) and (); build the model with 2 features and "
            "2 of noise, and call it at one context."
        )
    dtype, device = law.model.place
    u = torch.arange(1, cells, dtype=dtype, device=device) / cells
    along = torch.linspace(float(u[0]), float(u[-1]), 16 * (cells - 2) + 1, dtype=dtype, device=device)
    vertical = torch.stack(torch.meshgrid(u, along, indexing="ij"), -1)
    mesh = torch.cat([vertical, vertical.flip(-1)])
    with torch.no_grad():
        pushed = law.push(torch.special.ndtri(mesh))
    figure, grid = plt.subplots(1, 2, figsize=(9.2, 4.6), layout="constrained")
    shades = np.concatenate([plt.get_cmap(name)(0.35 + 0.6 * u.cpu().numpy()) for name in ("Blues", "Oranges")])
    for axes, lines, title in zip(grid, (mesh, pushed), ("noise", "draws"), strict=True):
        axes.add_collection(LineCollection(lines.cpu().numpy(), colors=shades, linewidth=0.9))
        axes.set(aspect="equal", title=title)
        axes.autoscale_view()
    grid[0].set(xlabel=r"$\Phi(z_1)$", ylabel=r"$\Phi(z_2)$", xlim=(0, 1), ylim=(0, 1))
    _scatter_data(grid[1], data)
    return figure


def _scatter_data(axes: Any, data: Tensor | None) -> None:
    if data is None:
        return
    if data.dim() != 2 or data.shape[1] != 2:
        raise ShapeError(f"data: got shape {tuple(data.shape)}, needs (rows, 2); choose two coordinates.")
    axes.scatter(*data.detach().cpu().numpy().T, label="data", **DOTS)
