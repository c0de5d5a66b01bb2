"""Pictures of what chains of an energy do."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["plot_energy_gap"]

STYLES = {  # in the order in which they are drawn
    "data": {"color": "0.72", "histtype": "stepfilled"},
    "short": {"color": "#e07b39", "histtype": "step", "linewidth": 1.6},
    "long": {"color": "#2c6fb5", "histtype": "step", "linewidth": 1.6},
}
SHOWN = (0.002, 0.998)  # quantiles of each sample that the axis holds


def plot_energy_gap(report: Any) -> Any:
    """Energies of data, short and long chains, and what the superchains of the long run are like.

    Where the three histograms are not one, the energy is not the density of the data, or chains do not reach its law.
    On the right the weights of modes in every superchain; if there are no modes, means and standard deviations of the
    energy. Bars that differ are chains that know where they started.

    Arguments:
        report: of ``pyro_genmods.shape.mixing_report``.

    Returns:
        The ``matplotlib.figure.Figure``.

    Example:
        >>> import pyro_genmods as gm
        >>> model = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)
        >>> report = gm.shape.mixing_report(model, num_chains=16, superchains=4, short=10, long=50, seed=0)
        >>> figure = plot_energy_gap(report)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['energy in nats', 'superchain']
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.2, 3.6), layout="constrained", gridspec_kw={"width_ratios": [3, 2]}
    )
    _draw_energies(left, report)
    if report.occupancy is None:
        _draw_spread(right, report)
    else:
        _draw_occupancy(right, report)
    right.set(xlabel="superchain", xticks=np.arange(report.superchains))
    figure.suptitle("ok" if report.ok else f"not ok: {report.worst.name}", fontsize=10)
    return figure


def _draw_energies(axes: Any, report: Any) -> None:
    energies = {name: report.energies[name].double().numpy() for name in STYLES if name in report.energies}
    ends = np.array([np.quantile(values, SHOWN) for values in energies.values()])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    short, long = report.lengths
    labels = {"data": "data", "short": f"{short} transitions", "long": f"{long} transitions"}
    for name, values in energies.items():
        bins = np.linspace(low, high, int(np.clip(np.sqrt(len(values)), 10, 60)) + 1)
        axes.hist(values.clip(low, high), bins=bins, density=True, label=labels[name], **STYLES[name])
    axes.set(xlabel="energy in nats", ylabel="density", xlim=(low, high))
    axes.legend(frameon=False)


def _draw_occupancy(axes: Any, report: Any) -> None:
    import matplotlib.pyplot as plt

    shares = report.occupancy.numpy()
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, shares.shape[1]))
    floor = np.zeros(len(shares))
    for mode, share in enumerate(shares.T):
        axes.bar(np.arange(len(shares)), share, bottom=floor, color=shades[mode], width=0.85)
        floor += share
    if report.weight_gap is not None:
        borders = (shares.mean(0) - report.weight_gap.sd.numpy()).cumsum()[:-1]
        for i, border in enumerate(borders):
            axes.axhline(border, color="black", linewidth=0.9, linestyle="--", label=None if i else "data")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set(ylabel="weights of modes", ylim=(0, 1))


def _draw_spread(axes: Any, report: Any) -> None:
    lp = report.sample_stats["lp"].double()
    energy = -lp.unflatten(0, (report.superchains, -1)).flatten(1)
    axes.errorbar(np.arange(len(energy)), energy.mean(1), energy.std(1), fmt="o", color=STYLES["long"]["color"])
    axes.set(ylabel="energy: mean and sd")
