"""The diagnostics against closed forms: tail indices, coverage of calibrated and of wrong posteriors, pictures."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import zuko
from scipy import stats

import pyro_genmods as gm
from pyro_genmods.diagnostics import (
    Coverage,
    interval_coverage,
    plot_calibration,
    plot_generator_mesh,
    plot_image_posterior,
    plot_trajectories,
    plot_vector_field,
    psis_khat,
)
from pyro_genmods.foundation.errors import ShapeError

from .statistics import assert_mean, judge

# -- Pareto k-hat -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.2])
def test_khat_of_pareto_weights(k):
    """``w = u ** -k`` of uniform ``u`` has tail index ``k``; the estimate spreads by about 0.06 at this many draws."""
    estimates = [psis_khat(-k * torch.rand(10_000, dtype=torch.float64).log()) for _ in range(8)]
    assert_mean(torch.tensor(estimates), k, torch.tensor(0.02), f"k-hat of {k}")


@pytest.mark.parametrize(("sd", "usable"), [(0.5, False), (0.95, True), (2.0, True)])
def test_khat_of_a_normal_proposal(sd, usable):
    """Target N(0, 1), proposal N(0, sd): the index is ``1 - sd^2``, and negative for a wider proposal."""
    x = sd * torch.randn(20_000, dtype=torch.float64)
    khat = psis_khat(-0.5 * x**2 + 0.5 * (x / sd) ** 2 + math.log(sd))
    assert (khat < 0.5) == usable
    assert khat < max(0.3, 1 - sd**2 + 0.2)
    assert khat > 1 - sd**2 - 0.3 or usable


def test_khat_does_not_depend_on_a_constant():
    weights = torch.randn(500, dtype=torch.float64)
    assert psis_khat(weights) == pytest.approx(psis_khat(weights + 1e3), abs=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_khat_of_weights_that_are_no_numbers(bad):
    assert psis_khat(torch.cat([torch.randn(500), torch.tensor([bad])])) == math.inf


def test_khat_with_draws_outside_the_support():
    weights = torch.cat([torch.full((500,), -math.inf), 0.3 * torch.randn(1500)])
    assert psis_khat(weights) < 0.7


@pytest.mark.parametrize("shape", [(99,), (200, 2), ()])
def test_khat_needs_a_vector_of_draws(shape):
    with pytest.raises(ShapeError, match="log_weights"):
        psis_khat(torch.zeros(shape))


# -- coverage ---------------------------------------------------------------------------------------------------------


def posterior(events: int, draws: int, entries: int = 1, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of a posterior, too narrow by ``spread``, and the truth, exchangeable with them if it is one."""
    loc = 3 * torch.randn(events, entries, dtype=torch.float64)
    truth = loc + torch.randn(events, entries, dtype=torch.float64)
    return loc + spread * torch.randn(draws, events, entries, dtype=torch.float64), truth


def test_coverage_of_a_calibrated_posterior():
    """Exactly: the truth is one more draw, and falls between two order statistics with a known probability."""
    events, draws = 4000, 199
    found = interval_coverage(*posterior(events, draws))
    assert found.levels.shape == found.coverage.shape == found.standard_error.shape == (10,)
    for level, coverage in zip(found.levels, found.coverage, strict=True):
        exact = level * (draws - 1) / (draws + 1)
        inside = round(float(coverage) * events)
        judge(f"level {level}", coverage, float(stats.binomtest(inside, events, exact).pvalue), len(found.levels))


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_coverage_of_a_wrong_posterior(spread):
    events, draws, levels = 4000, 999, (0.5, 0.9)
    found = interval_coverage(*posterior(events, draws, spread=spread), levels=levels)
    for level in levels:
        truth = 1 - 2 * stats.norm.sf(spread * stats.norm.isf((1 - level) / 2))
        value, error = found.at(level)
        assert abs(value - truth) < 5 * error + 2 / draws
        assert abs(value - level) > 10 * error


def test_standard_error_of_coverage():
    """Over events, whose entries may depend on each other: here all entries of an event are one."""
    levels = (0.5, 0.8)
    runs = []
    for _ in range(60):
        draws, truth = posterior(100, 99)
        runs.append(interval_coverage(draws.expand(-1, -1, 6), truth.expand(-1, 6), levels))
    spread = np.std([run.coverage for run in runs], 0, ddof=1)
    claimed = np.mean([run.standard_error for run in runs], 0)
    assert (np.abs(np.log(spread / claimed)) < 0.35).all(), (spread, claimed)


def test_shapes_of_coverage():
    draws, truth = posterior(7, 50, entries=6)
    nested = interval_coverage(draws.reshape(50, 7, 2, 3), truth.reshape(7, 2, 3))
    assert np.array_equal(nested.coverage, interval_coverage(draws, truth).coverage)
    alone = interval_coverage(draws[:, :1], truth[:1])
    assert np.isnan(alone.standard_error).all() and np.isfinite(alone.coverage).all()
    with pytest.raises(ShapeError, match="draws"):
        interval_coverage(draws, truth[:3])


def test_coverage_at_a_level():
    result = Coverage(np.array([0.5, 0.9]), np.array([0.4, 0.8]), np.array([0.01, 0.02]))
    assert result.at(0.9) == (0.8, 0.02) and result.at(0.5) == (0.4, 0.01)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_calibration_plot_shows_the_numbers():
    found = interval_coverage(*posterior(50, 99))
    figure = plot_calibration({"one": found, "two": found})
    (axes,) = figure.axes
    diagonal, *lines = axes.get_lines()
    assert np.array_equal(diagonal.get_xdata(), [0, 1]) and [line.get_label() for line in lines] == ["one", "two"]
    assert all(np.array_equal(line.get_xydata(), np.stack([found.levels, found.coverage], -1)) for line in lines)
    plt.close(figure)


def test_image_plot_shows_what_it_says():
    truth, draws = torch.rand(2, 4, 4), torch.rand(20, 2, 4, 4)
    observed = truth.clone()
    observed[:, 2:] = math.nan
    figure = plot_image_posterior(truth, observed, draws, shown=3)
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images][:7]
    expected = [truth[0], observed[0], draws[:, 0].mean(0), draws[:, 0].std(0), draws[0, 0]]
    for picture, values in zip(pictures, expected, strict=False):
        assert np.allclose(np.ma.filled(picture, np.nan), values.numpy(), equal_nan=True)
    assert [axes.get_title() for axes in figure.axes[:4]] == ["truth", "observed", "posterior mean", "posterior sd"]
    plt.close(figure)


def test_vector_field_plot_shows_direction_and_speed():
    asked = []

    def turning(t, y):
        asked.append((t, y))
        return t * y.flip(-1) * torch.tensor([-1.0, 1.0])

    points = torch.randn(3, 7, 2)
    figure = plot_vector_field(turning, times=(0.0, 0.5, 1.0), limits=(-2.0, 2.0), resolution=5, points=points)
    assert [t.shape for t, _ in asked] == [()] * 3 and [float(t) for t, _ in asked] == [0.0, 0.5, 1.0]
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["t = 0", "t = 0.5", "t = 1"] and bar.get_ylabel() == "speed"
    places = torch.cartesian_prod(*[torch.linspace(-2, 2, 5)] * 2)
    for axes, (t, _), cloud in zip(panels, asked, points, strict=True):
        dots, arrows = axes.collections
        assert np.array_equal(dots.get_offsets(), cloud.numpy())
        assert np.array_equal(arrows.get_offsets(), places.numpy())
        assert np.allclose(arrows.get_array(), float(t) * places.norm(dim=1)), "the colour is the speed"
        directions = np.stack([arrows.U, arrows.V], -1)
        assert np.allclose(
            directions * arrows.get_array()[:, None],
            (t * places.flip(-1) * torch.tensor([-1.0, 1.0])).numpy(),
            atol=1e-6,
        )
        assert axes.get_aspect() == 1 and axes.get_xlim()[0] < -2 and axes.get_ylim()[1] > 2
    assert len({axes.collections[1].get_clim() for axes in panels}) == 1, "one scale for all times"
    plt.close(figure)


def test_vector_field_plot_of_rest():
    figure = plot_vector_field(lambda t, y: torch.zeros_like(y), times=(0.0,), resolution=3)
    assert np.isfinite(figure.axes[0].collections[0].get_array()).all()
    plt.close(figure)


def test_trajectory_plot_shows_paths_and_ends():
    paths, data = torch.randn(6, 40, 2), torch.randn(30, 2)
    figure = plot_trajectories(paths, data, lines=40)
    below, lines, starts, ends = figure.axes[0].collections
    assert np.array_equal(below.get_offsets(), data.numpy())
    assert np.array_equal(starts.get_offsets(), paths[0].numpy())
    assert np.array_equal(ends.get_offsets(), paths[-1].numpy())
    segments = np.stack(lines.get_segments()).reshape(5, 40, 2, 2)
    assert np.allclose(segments[:, :, 0], paths[:-1].numpy()) and np.allclose(segments[:, :, 1], paths[1:].numpy())
    times = lines.get_array().reshape(5, 40)
    assert np.allclose(times, (np.arange(5)[:, None] + 0.5) / 5)
    x, y = zip(figure.axes[0].get_xlim(), figure.axes[0].get_ylim(), strict=True)
    everything = torch.cat([paths.flatten(0, 1), data]).numpy()
    assert (everything >= x).all() and (everything <= y).all(), "nothing is cut off"
    plt.close(figure)


def test_trajectory_plot_draws_some_of_many():
    paths = torch.randn(3, 100, 2)
    figure = plot_trajectories(paths, lines=10)
    lines, starts, ends = figure.axes[0].collections
    assert [len(lines.get_segments()), len(starts.get_offsets()), len(ends.get_offsets())] == [20, 10, 100]
    plt.close(figure)


def test_mesh_plot_carries_the_square():
    """By an affine flow of known factor: every line stays what it is, stretched by the quantiles and the map."""
    model = gm.Flow(zuko.flows.NICE(2)).double()
    assert model.start_at_identity()
    model.standardize(torch.tensor([[-2.0, 1.0], [4.0, 7.0], [1.0, 4.0]], dtype=torch.float64))
    figure = plot_generator_mesh(model(), torch.randn(9, 2), cells=8)
    noise, draws = (axes.collections[0].get_segments() for axes in figure.axes)
    assert len(noise) == len(draws) == 2 * 7
    levels = np.arange(1, 8) / 8
    assert np.allclose([line[:, 0] for line in noise[:7]], levels[:, None]), "lines of the first coordinate"
    assert np.allclose([line[:, 1] for line in noise[7:]], levels[:, None]), "lines of the second coordinate"
    for before, after in zip(noise, draws, strict=True):
        expected = model().push(torch.tensor(stats.norm.ppf(before))).detach().numpy()
        assert np.allclose(after, expected, atol=1e-6)
    assert len(figure.axes[1].collections[1].get_offsets()) == 9
    plt.close(figure)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plot_vector_field(lambda t, y: y[:, :1], times=(0.0,)), r"velocity: returned shape \(400, 1\)"),
        (lambda: plot_vector_field(lambda t, y: y, points=torch.zeros(2, 9, 2)), r"points: got .*needs \(5, rows, 2\)"),
        (lambda: plot_trajectories(torch.zeros(9, 4, 3)), r"paths: got shape \(9, 4, 3\).*choose two"),
        (lambda: plot_trajectories(torch.zeros(1, 4, 2)), "2 or more points"),
        (lambda: plot_trajectories(torch.zeros(9, 4, 2), torch.zeros(4, 3)), r"data: got shape \(4, 3\)"),
        (lambda: plot_generator_mesh(gm.Flow(zuko.flows.NICE(3))()), r"law: got noise of shape \(3,\).*2 features"),
        (lambda: plot_generator_mesh(gm.Flow(zuko.flows.NICE(2))().expand([4])), r"batch of shape \(4,\)"),
    ],
)
def test_pictures_of_what_is_not_in_the_plane(draw, words):
    with pytest.raises(ShapeError, match=words):
        draw()
    plt.close("all")
