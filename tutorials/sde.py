"""Carbon dioxide over Mauna Loa with missing weeks: what was the air like when nobody measured it, and next year?

    python tutorials/sde.py [--out outputs] [--draws 1000] [--steps 250]

Weekly means from 1958 to 1965, in ppm. 47 of the 405 weeks have no value; we hide 26 more in 1961 and all of 1965, so
that there is something to be checked against. One Pyro program describes the series,

    y(t) = trend + seasonal cycle + x(t) + noise,      dx = f(x, t) dt + g dW,

in which the residual x, the weather of the curve, is a stochastic differential equation. Three questions are asked:

1. with the linear drift f = -rate x, what do the data say of all unknowns? Chains on the path and all parameters;
2. a guide that is itself an equation, the prior's with a learned drift on top (``SDEPosterior``): is it right? For a
   linear drift a Kalman filter knows the log-likelihood exactly;
3. do the data want more than a linear drift? A network of the value and the season is learned along with the guide.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.dates import ConciseDateFormatter
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from statsmodels.datasets import co2
from torch import Tensor, nn

import pyro_genmods as gm
from pyro_genmods.evolve import SDEPosterior

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # isort: skip

WEEK = 7 / 365.25  # in years, the unit of time; the Euler chain of the equation takes a step a week
GUIDE_RATE = 0.5  # of Adam, at the start: controls are of order one, and of order ten where a year turns
PARAMETERS = ("curve", "rate", "sd", "noise")


# -- the data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Weekly values ``y`` (ppm), NaN where nothing was measured, and which weeks are told, hidden and to come."""

    dates: np.ndarray
    y: Tensor
    told: Tensor
    hidden: Tensor
    ahead: Tensor

    @property
    def years(self) -> Tensor:
        return torch.arange(len(self.y)) * WEEK

    @property
    def centre(self) -> Tensor:
        return self.y[self.told].mean()

    def design(self) -> Tensor:
        """Columns of a smooth curve: a constant, a line, a parabola and three harmonics of the year."""
        t = self.years - self.years[self.told].mean()
        waves = [wave(2 * math.pi * k * self.years) for k in (1, 2, 3) for wave in (torch.cos, torch.sin)]
        return torch.stack([torch.ones_like(t), t, t.square() / 10, *waves], -1)


def mauna_loa() -> Series:
    series = co2.load_pandas().data["co2"]["1958-03-29":"1965-12-31"]
    y, dates = torch.tensor(series.to_numpy(copy=True), dtype=torch.float32), series.index.to_numpy()
    hidden = torch.tensor((dates >= np.datetime64("1961-04-01")) & (dates < np.datetime64("1961-09-30")))
    ahead = torch.tensor(dates >= np.datetime64("1965-01-01"))
    measured = ~y.isnan()
    told = measured & ~hidden & ~ahead
    print(
        f"{len(y)} weeks from {dates[0]:.10} to {dates[-1]:.10}, {int((~measured).sum())} without a value; hidden: "
        f"{int(hidden.sum())} weeks of 1961 and {int(ahead.sum())} of 1965; told: {int(told.sum())}"
    )
    return Series(dates, y, told, measured & hidden, measured & ahead)


# -- the program ------------------------------------------------------------------------------------------------------


class Stationary(nn.Module):
    """Mean and log scale of the first value: in balance, for a context of the rate and the stationary deviation."""

    def forward(self, c: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(c[:, 1]), c[:, 1].log()], -1)


def pull(_t: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """Ornstein and Uhlenbeck's drift, per year."""
    return -c[:, :1] * x


class Seasonal(nn.Module):
    """The same, plus a network of the value (ppm) and the season, which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, t: Tensor, x: Tensor, c: Tensor) -> Tensor:
        season = 2 * math.pi * t
        return c[:, :1] * (self.network(torch.cat([x, season.cos(), season.sin()], -1)) - x)


def spread(_t: Tensor, _x: Tensor, c: Tensor) -> Tensor:
    """The diffusion, in ppm per root of a year, with which the linear equation has the deviation ``c[:, 1]``."""
    return c[:, 1:] * (2 * c[:, :1]).sqrt()


def equation(years: Tensor, drift=pull) -> gm.NeuralSDE:
    return gm.NeuralSDE(1, years, drift, spread, Stationary(), context_features=2)


def program(prior: gm.NeuralSDE, series: Series) -> None:
    """The series in ppm, less its mean; weeks that are not told are masked."""
    curve = pyro.sample("curve", dist.Normal(0.0, torch.tensor([5.0] + 8 * [3.0])).to_event(1))
    rate = pyro.sample("rate", dist.LogNormal(math.log(12.0), 0.7))  # per year: x forgets in a month or so
    sd = pyro.sample("sd", dist.HalfNormal(1.0))  # ppm
    noise = pyro.sample("noise", dist.LogNormal(math.log(0.2), 0.3))  # ppm: scatter of a weekly mean
    residual = pyro.sample("residual", prior(torch.stack([rate, sd], -1)))
    level = (series.design() * curve[..., None, :]).sum(-1) + residual[..., 0]
    y = torch.where(series.told, series.y - series.centre, 0.0)
    pyro.sample("co2", dist.Normal(level, noise[..., None]).mask(series.told).to_event(1), obs=y)


# -- 1. all unknowns --------------------------------------------------------------------------------------------------


def sample(prior: gm.NeuralSDE, series: Series, draws: int) -> dict[str, Tensor]:
    mcmc = gm.infer.MCMC(gm.infer.HMC(program, target_accept_prob=0.8), draws, 200, num_chains=16, progress_bar=False)
    mcmc.run(prior, series)
    chains = mcmc.get_samples(group_by_chain=True)
    print(
        f"\n1. {mcmc.num_chains} chains of {draws} draws in {mcmc.seconds['total']:.0f} s, path and parameters at once"
    )
    numbers = {name: chains[name].numpy() for name in ("rate", "sd", "noise")}
    summary = az.summary(az.from_dict(posterior=numbers), round_to=3)
    print(summary[["mean", "sd", "hdi_3%", "hdi_97%", "ess_bulk", "r_hat"]])
    worst = float(mcmc.diagnostics()["residual"]["r_hat"].max())
    print(f"largest R-hat of the {len(series.y)} values of the path: {worst:.3f}")
    return mcmc.get_samples()


def predictions(values: dict[str, Tensor], series: Series) -> Tensor:
    """Draws of what would be measured, ``(draws, weeks)`` in ppm."""
    curve, residual = values["curve"] @ series.design().T, values["residual"][..., 0]
    return series.centre + curve + residual + values["noise"][..., None] * torch.randn_like(residual)


def report(name: str, draws: Tensor, series: Series) -> None:
    """Were the hidden weeks, and the year ahead, where they were said to be?"""
    print(f"{name}:")
    for what, weeks in (("hidden weeks of 1961", series.hidden), ("forecast of 1965", series.ahead)):
        truth, low, high = series.y[weeks], *draws[:, weeks].quantile(torch.tensor([0.05, 0.95]), 0)
        inside = ((low <= truth) & (truth <= high)).float().mean()
        error = (draws[:, weeks].mean(0) - truth).square().mean().sqrt()
        print(
            f"  {what}: 90 % intervals, {(high - low).mean():.2f} ppm wide, hold {inside:.0%} of {len(truth)} values; "
            f"error of the mean {error:.2f} ppm"
        )


# -- 2. and 3. a guide that is an equation ----------------------------------------------------------------------------


def kalman(parameters: dict[str, Tensor], series: Series) -> tuple[float, Tensor, Tensor]:
    """Log-likelihood of the told weeks for the linear chain, and mean and deviation of the path given all of them."""
    rate, sd, noise = (float(parameters[name]) for name in ("rate", "sd", "noise"))
    slope, innovation = 1 - rate * WEEK, 2 * rate * WEEK * sd**2
    gap = (series.y - series.centre - series.design() @ parameters["curve"]).double()
    mean, variance, total, steps = 0.0, sd**2, 0.0, []
    for k, told in enumerate(series.told):
        if k:
            mean, variance = slope * mean, slope**2 * variance + innovation
        predicted = (mean, variance)
        if told:
            total += float(dist.Normal(mean, math.sqrt(variance + noise**2)).log_prob(gap[k]))
            gain = variance / (variance + noise**2)
            mean, variance = mean + gain * (float(gap[k]) - mean), (1 - gain) * variance
        steps.append((mean, variance, *predicted))
    smoothed = [(mean, variance)]
    for (m, v, _, _), (_, _, ahead, spread) in zip(steps[-2::-1], steps[:0:-1], strict=True):
        gain = v * slope / spread
        mean, variance = m + gain * (mean - ahead), v + gain**2 * (variance - spread)
        smoothed.append((mean, variance))
    means, variances = torch.tensor(smoothed[::-1]).unbind(-1)
    return total, means, variances.sqrt()


class Smoother:
    """The law of the path given the told weeks, for given parameters, learned by variational inference."""

    def __init__(self, prior: gm.NeuralSDE, series: Series, parameters: dict[str, Tensor]) -> None:
        self.series, self.parameters = series, parameters
        self.context = torch.stack([parameters["rate"], parameters["sd"]])
        self.prior = prior
        self.posterior = SDEPosterior(prior, noise="learned").eval()
        self.program = partial(poutine.condition(program, parameters), prior, series)

    def guide(self) -> None:
        pyro.module("posterior", self.posterior)
        pyro.sample("residual", self.posterior(self.context))

    def learn(self, steps: int, rates: tuple[float, float]) -> None:
        """Adam with a learning rate for the guide and one for networks, that fall to a twentieth."""

        def options(name: str) -> dict[str, float]:
            return {"lr": rates["prior." in name], "betas": (0.9, 0.99)}

        optimizer = {"optimizer": torch.optim.Adam, "optim_args": options, "gamma": 0.05 ** (1 / steps)}
        schedule = pyro.optim.ExponentialLR(optimizer)
        svi = SVI(self.program, self.guide, schedule, Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=0))
        for _ in range(steps):
            svi.step()
            schedule.step()

    @torch.no_grad()
    def log_weights(self, draws: int) -> tuple[Tensor, Tensor]:
        """Paths of the guide ``(draws, weeks, 1)``, and log p(y, path) - log q(path) of each."""
        law = self.posterior(self.context)
        paths = law.sample((draws,))
        trace = poutine.trace(poutine.condition(self.program, {"residual": paths})).get_trace()
        trace.compute_log_prob()
        joint = trace.nodes["residual"]["log_prob"] + trace.nodes["co2"]["log_prob"]
        return paths, joint - law.log_prob(paths)


def evidence(smoother: Smoother, draws: int = 2000) -> tuple[float, float, float]:
    """Evidence lower bound and importance-weighted log-likelihood, in nats per told week, and k-hat of the weights."""
    weights = smoother.log_weights(draws)[1]
    weeks = int(smoother.series.told.sum())
    better = float(weights.logsumexp(0)) - math.log(draws)
    return float(weights.mean()) / weeks, better / weeks, gm.diagnostics.psis_khat(weights)


def guided(smoother: Smoother, draws: int = 2000) -> Tensor:
    """What the guide predicts, with the parameters as they are."""
    paths = smoother.log_weights(draws)[0]
    repeated = {name: value.expand(draws, *value.shape) for name, value in smoother.parameters.items()}
    return predictions({**repeated, "residual": paths}, smoother.series)


def linear(smoother: Smoother, steps: int) -> None:
    """Learn the guide of the linear equation, beside the filter that knows the answer."""
    start = time.perf_counter()
    smoother.learn(steps, (GUIDE_RATE, 0.0))
    weeks = int(smoother.series.told.sum())
    exact, means, deviations = kalman(smoother.parameters, smoother.series)
    bound, weighted, khat = evidence(smoother)
    print(f"\n2. {steps} steps of SVI in {time.perf_counter() - start:.0f} s, parameters at their means")
    print(f"log-likelihood per told week: Kalman filter {exact / weeks:.4f}, guide's bound {bound:.4f}, with 2000")
    print(f"importance-weighted paths {weighted:.4f} nats (k-hat {khat:.2f})")
    paths = smoother.log_weights(2000)[0][..., 0]
    far = ((paths.mean(0) - means) / deviations).abs().max(), (paths.std(0) / deviations - 1).abs().mean()
    print(f"guide against the Kalman smoother: means at most {far[0]:.2f} sd apart, sd {far[1]:.0%} off on average")


def learned(smoother: Smoother, steps: int, series: Series) -> Tensor:
    """Let the drift learn too, and tell what that was worth."""
    start, weeks = time.perf_counter(), int(series.told.sum())
    before = kalman(smoother.parameters, series)[0] / weeks
    smoother.prior.requires_grad_(True)
    smoother.learn(steps, (GUIDE_RATE / 10, 5e-3))
    bound, weighted, khat = evidence(smoother)
    print(
        f"\n3. a learned drift, {time.perf_counter() - start:.0f} s: log-likelihood {weighted:.4f} nats per told week"
    )
    print(
        f"(bound {bound:.4f}, k-hat {khat:.2f}), linear {before:.4f}: the network, fitted to these {weeks} values, is"
    )
    print(
        f"worth {weeks * (weighted - before):.1f} nats in all, for {count(smoother.prior)} weights. The hidden values:"
    )
    return guided(smoother)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -- pictures ---------------------------------------------------------------------------------------------------------


def band(axis, series: Series, draws: Tensor, color: str, label: str, filled: bool = True) -> None:
    low, middle, high = draws.quantile(torch.tensor([0.05, 0.5, 0.95]), 0)
    axis.plot(series.dates, middle, color=color, linewidth=1)
    if filled:
        axis.fill_between(series.dates, low, high, color=color, alpha=0.3, linewidth=0, label=f"{label}, 90 %")
    else:
        axis.plot(series.dates, low, color=color, linewidth=1, linestyle="--", label=f"{label}, 90 %")
        axis.plot(series.dates, high, color=color, linewidth=1, linestyle="--")


def points(axis, series: Series) -> None:
    unseen = series.hidden | series.ahead
    axis.plot(series.dates[series.told], series.y[series.told], "k.", markersize=3, label="told")
    axis.plot(series.dates[unseen], series.y[unseen], ".", color="tab:red", markersize=4, label="hidden truth")


def shade(axis, series: Series) -> None:
    """Grey where nothing was told."""
    edges = np.flatnonzero(np.diff(np.r_[0, (~series.told).numpy().astype(int), 0]))
    half = np.timedelta64(84, "h")
    for i, (first, last) in enumerate(edges.reshape(-1, 2)):
        label = "not told" if i == 0 else None
        span = series.dates[first] - half, series.dates[last - 1] + half
        axis.axvspan(*span, color="0.9", linewidth=0, zorder=0, label=label)


def draw(path: Path, series: Series, posterior: dict[str, Tensor], draws: dict[str, Tensor]) -> None:
    figure, axes = plt.subplot_mosaic(
        [["all", "all"], ["x", "x"], ["gap", "next"]], figsize=(11, 9), layout="constrained"
    )
    (name, chains), (other, network) = draws.items()
    for axis in axes.values():
        shade(axis, series)
        axis.set_ylabel("ppm")
    band(axes["all"], series, chains, "tab:blue", name)
    points(axes["all"], series)
    axes["all"].set_title("Carbon dioxide over Mauna Loa")
    curve = series.centre + posterior["curve"].mean(0) @ series.design().T
    band(axes["x"], series, posterior["residual"][..., 0], "tab:blue", "x by chains")
    axes["x"].plot(series.dates[series.told], (series.y - curve)[series.told], "k.", markersize=2, label="told - curve")
    axes["x"].set(title="The residual: told values less the mean curve, and the process x", ylim=(-1.3, 1.5))
    windows = {"gap": ("1961-02-01", "1961-12-01"), "next": ("1964-07-01", "1966-01-01")}
    for key, (first, last) in windows.items():
        axis, window = axes[key], np.array([first, last], dtype="datetime64[D]")
        inside = torch.tensor((series.dates >= window[0]) & (series.dates < window[1]))
        band(axis, series, chains, "tab:blue", name)
        band(axis, series, network, "tab:green", other, filled=False)
        points(axis, series)
        low, high = chains[:, inside].quantile(torch.tensor([0.05, 0.95]), 0)
        axis.set(xlim=tuple(window), ylim=(float(low.min()) - 0.7, float(high.max()) + 0.7))
        axis.xaxis.set_major_formatter(ConciseDateFormatter(axis.xaxis.get_major_locator()))
    axes["gap"].set_title("Half a year that was hidden")
    axes["next"].set_title("A year ahead")
    for key, place in (("all", "upper left"), ("x", "upper left"), ("gap", "upper right")):
        axes[key].legend(fontsize=8, loc=place, ncols=1 if key == "gap" else 4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--draws", type=int, default=1000, help="of each of 16 chains")
    parser.add_argument(
        "--steps", type=int, default=250, help="of variational inference, and half as many for the drift"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    series = mauna_loa()
    posterior = sample(equation(series.years), series, arguments.draws)
    draws = {"chains, linear drift": predictions(posterior, series)}
    report("with all that is uncertain", draws["chains, linear drift"], series)
    parameters = {name: posterior[name].mean(0) for name in PARAMETERS}
    smoother = Smoother(equation(series.years, Seasonal()).requires_grad_(False), series, parameters)
    linear(smoother, arguments.steps)
    report("guide, linear drift", guided(smoother), series)
    draws["guide, learned drift"] = learned(smoother, arguments.steps // 2, series)
    report("guide, learned drift", draws["guide, learned drift"], series)
    draw(arguments.out / "mauna_loa.png", series, posterior, draws)
    print(f"\nwrote {arguments.out / 'mauna_loa.png'}")


if __name__ == "__main__":
    main()
