"""Continuous flows: speed beside zuko's, matching beside torchcfm's, and what they learn beside a spline flow.

    python benchmarks/continuous.py --speed                      # five minutes on one core
    python benchmarks/continuous.py --matching                   # six minutes; needs torchcfm
    python benchmarks/continuous.py --targets --seconds 60       # a quarter of an hour
    python benchmarks/continuous.py --targets --seconds 60 --only moons --pictures FOLDER

`--speed`: a network of two hidden layers of 64 learns a mixture of eight normal laws in 2, 8 and 32 dimensions, and the
equation of this one field is solved by zuko's CNF and by ours, for 512 rows; besides, our own network of the same
widths, trained alike. Every solver has the cheapest setting of a grid whose log densities are within 1e-3 nats of a
solution in double precision at a tolerance of 1e-7. Time of one log density, and of one step of maximum likelihood with
the exact trace (zero the gradients, loss, backward).

`--matching`: the same network, optimiser, learning rate, batch size and number of steps, with the loss of
`ContinuousFlow` and with those of torchcfm, for independent pairs and for optimal transport within the batch. Steps per
second; mean log density of unseen data under the field that was learned, solved by our solver; sliced Wasserstein
distance of as many draws to unseen data.

`--targets`: a `ContinuousFlow` and a neural spline flow, each trained for the same time by `fit`; then the continuous
flow rectified and trained for that time again. "calls" are the evaluations of the network for a log density within 1e-3
nats. The floor of the sliced distance is that of training data to unseen data; the best log density is that of the true
law.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import zuko
from continuous_data import PLANE, mixture, sliced_wasserstein, target
from torch import Tensor, nn

import pyro_genmods as gm
from pyro_genmods.foundation.ode import RK4, DormandPrince, Solver
from pyro_genmods.foundation.vector_field import VectorField

NATS = 1e-3
ROWS = 512
TOLERANCES = (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 5e-6, 2e-6, 1e-6, 3e-7, 1e-7)
STEPS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def medians(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each, measured in turn after a warm-up of each."""
    for run in runs:
        run()
    times = []
    for _ in range(repeats):
        row = []
        for run in runs:
            start = time.perf_counter()
            run()
            row.append(time.perf_counter() - start)
        times.append(row)
    return [statistics.median(column) for column in zip(*times, strict=True)]


# -- speed ------------------------------------------------------------------------------------------------------------


class Reversed(nn.Module):
    """The field of zuko's flow, which runs from data to noise, in our time."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, t: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
        return -self.transform.f(1 - t.squeeze(-1), y)


class Way(NamedTuple):
    """One way to a log density: its name, its setting, and how to count its evaluations."""

    name: str
    setting: str
    log_prob: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], Tensor]
    network: nn.Module


def learn(loss: Callable[[Tensor], Tensor], model: nn.Module, draw: Callable[[], Tensor], steps: int) -> float:
    """Adam with a learning rate that falls to zero; steps per second."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(draw()).backward()
        optimizer.step()
        schedule.step()
    return steps / (time.perf_counter() - start)


def matching_loss(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    z, t = torch.randn_like(x), torch.rand(len(x), 1)
    return (velocity(t, torch.lerp(z, x, t)) - (x - z)).square().sum(-1).mean()


def fields(features: int, steps: int) -> tuple[nn.Module, gm.ContinuousFlow, gm.ContinuousFlow]:
    """Zuko's flow, its field as a network of ours, and a flow with our network, trained alike."""
    torch.manual_seed(0)
    law = mixture(features)
    theirs = zuko.flows.CNF(features, hidden_features=(64, 64))
    same = gm.ContinuousFlow(features, objective="likelihood", network=Reversed(theirs.transform))
    learn(lambda x: matching_loss(same.velocity, x), same, lambda: law.sample((ROWS,)), steps)
    ours = gm.ContinuousFlow(features, objective="likelihood", hidden_features=(64, 64))
    learn(lambda x: matching_loss(ours.velocity, x), ours, lambda: law.sample((ROWS,)), steps)
    return theirs, same, ours


def zuko_ways(theirs: nn.Module) -> Iterator[Way]:
    transform = theirs.transform

    def at(tolerance: float, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(x: Tensor) -> Tensor:
            transform.rtol, transform.atol = tolerance, tolerance / 10
            return run(x)

        return timed

    def step(x: Tensor) -> Tensor:
        theirs.zero_grad()
        loss = -theirs().log_prob(x).mean()
        loss.backward()
        return loss

    for tolerance in TOLERANCES:
        run = at(tolerance, lambda x: theirs().log_prob(x))
        yield Way("zuko CNF", f"{tolerance:g}", run, at(tolerance, step), transform.ode)


def our_ways(name: str, model: gm.ContinuousFlow, kind: str, gradient: str) -> Iterator[Way]:
    def at(solver: Solver, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(x: Tensor) -> Tensor:
            model.solver = solver
            return run(x)

        return timed

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        loss = model.loss(x).mean()
        loss.backward()
        return loss

    settings = STEPS if kind == "RK4" else TOLERANCES
    for setting in settings:
        adaptive = kind == "DormandPrince"
        solver = DormandPrince(setting, setting / 10, gradient=gradient) if adaptive else RK4(setting, gradient)
        run = at(solver, lambda x: model().log_prob(x))
        yield Way(name, f"{kind} {setting:g} {gradient}", run, at(solver, step), model.network)


def cheapest(ways: Iterator[Way], x: Tensor, exact: Tensor) -> tuple[Way, float]:
    """The first setting that is accurate enough; the last, where none is."""
    with torch.no_grad():
        for way in ways:
            error = float((way.log_prob(x) - exact).abs().max())
            if error <= NATS:
                break
    return way, error


def reference(model: gm.ContinuousFlow, x: Tensor) -> Tensor:
    fine = copy.deepcopy(model).double()
    fine.solver = DormandPrince(1e-7, 1e-8, max_steps=100_000)
    with torch.no_grad():
        return fine().log_prob(x.double())


def evaluations(way: Way, x: Tensor) -> int:
    """Calls of the network; ours is entered by several doors, all of which ask for its modulation by time."""
    count = [0]
    watched = way.network.modulation if isinstance(way.network, VectorField) else way.network
    hook = watched.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with torch.no_grad():
        way.log_prob(x)
    hook.remove()
    return count[0]


def quietly(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        run(x)


def speed(sizes: list[int], repeats: int, steps: int) -> None:
    print(f"\nLog density of {ROWS} rows within {NATS:g} nats, and a step of maximum likelihood: milliseconds")
    header = f"{'D':>3} {'way':<13} {'setting':<28} {'error':>8} {'calls':>6} {'log_prob':>9} {'zuko/it':>8}"
    print(f"{header} {'step':>8} {'zuko/it':>8}")
    for features in sizes:
        theirs, same, ours = fields(features, steps)
        x = mixture(features).sample((ROWS,))
        exact = {id(same): reference(same, x), id(ours): reference(ours, x)}
        found = [cheapest(zuko_ways(theirs), x, exact[id(same)])]
        for name, model in (("same network", same), ("our network", ours)):
            kinds = (("RK4", "adjoint"), ("RK4", "autograd"), ("DormandPrince", "adjoint"))
            found += [cheapest(our_ways(name, model, *kind), x, exact[id(model)]) for kind in kinds]
        values = medians(*[partial(quietly, way.log_prob, x) for way, _ in found], repeats=repeats)
        trains = medians(*[partial(way.step, x) for way, _ in found], repeats=repeats)
        for (way, error), value, train in zip(found, values, trains, strict=True):
            line = f"{features:>3} {way.name:<13} {way.setting:<28} {error:>8.1e} {evaluations(way, x):>6}"
            line += f" {1e3 * value:>9.1f} {values[0] / value:>8.2f} {1e3 * train:>8.1f} {trains[0] / train:>8.2f}"
            print(line, flush=True)


# -- targets ----------------------------------------------------------------------------------------------------------


def judged(model: gm.GenerativeModel, unseen: Tensor) -> tuple[float, float]:
    """Mean log density of unseen data, and sliced distance of as many draws."""
    torch.manual_seed(1)
    with torch.no_grad():
        law = model()
        return float(law.log_prob(unseen).mean()), sliced_wasserstein(law.sample((len(unseen),)), unseen)


def train(model: gm.GenerativeModel, x: Tensor, seconds: float, batch_size: int) -> tuple[int, float]:
    """Fit for a time, found from a short run on a copy; epochs and seconds."""

    def run(model: gm.GenerativeModel, epochs: int) -> float:
        start = time.perf_counter()
        gm.fit(model, x, max_epochs=epochs, batch_size=batch_size, learning_rate=2e-3, validation=0.1, patience=None,
               ema=0.999, seed=0, device="cpu", progress_bar=False)  # fmt: skip
        return time.perf_counter() - start

    most = max(5, 60000 // len(x))
    trials = [copy.deepcopy(model) for _ in range(3)]
    for trial in trials:
        trial.solver = RK4()  # or `fit` would look for the number of steps at its end
    _, short, long = (run(trial, count) for trial, count in zip(trials, (1, 1, 1 + most), strict=True))
    epochs = 1 + max(0, round((seconds - short) * most / max(long - short, 0.01)))
    return epochs, run(model, epochs)


def spline_flow(features: int) -> gm.Flow:
    return gm.Flow(zuko.flows.NSF(features, transforms=3, hidden_features=(64, 64)))


def targets(names: list[str], seconds: float, folder: Path | None) -> None:
    print(f"\nTrained for {seconds:g} s each; mean log density of unseen data (nats), sliced Wasserstein distance")
    header = f"{'target':<13} {'model':<12} {'epochs':>6} {'seconds':>8} {'log_prob':>9} {'sliced':>8}"
    print(f"{header} {'calls':>6} {'error':>8}")
    for name in names:
        data = target(name)
        floor = sliced_wasserstein(data.training, data.unseen)
        best = f"{data.truth:>9.3f}" if data.truth is not None else f"{'':>9}"
        print(f"{name:<13} {'truth, floor':<12} {'':>6} {'':>8} {best} {floor:>8.4f}")
        features = data.training.shape[1]
        flow = gm.ContinuousFlow(features)
        for kind, build in (("continuous", lambda f=flow: f), ("rectified", flow.rectify), ("splines", None)):
            torch.manual_seed(0)
            model = spline_flow(features) if build is None else build()
            epochs, taken = train(model, data.training, seconds, 128 if name == "digits" else 256)
            log_prob, sliced = judged(model, data.unseen)
            calls = f"{model.solver.evaluations:>6} {model.error():>8.1e}" if build else ""
            print(f"{'':<13} {kind:<12} {epochs:>6} {taken:>8.1f} {log_prob:>9.3f} {sliced:>8.4f} {calls}", flush=True)
            if folder and kind != "rectified":
                picture(folder / f"{name.replace(' ', '_')}_{kind}.png", model, data.unseen)


def picture(path: Path, model: gm.GenerativeModel, unseen: Tensor) -> None:
    """Data, draws and density; of digits, data and draws."""
    import matplotlib.pyplot as plt

    torch.manual_seed(2)
    law, plane = model(), unseen.shape[1] == 2
    with torch.no_grad():
        draws = law.sample((len(unseen),))
    figure, axes = plt.subplots(1, 3 if plane else 2, figsize=(10.5 if plane else 8.2, 4), layout="constrained")
    for axis, x, title in zip(axes, (unseen, draws), ("unseen data", "draws"), strict=False):
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        if plane:
            axis.scatter(*x.T, s=3, linewidth=0, color="C0")
        else:
            tiles = x[:64].reshape(8, 8, 8, 8).transpose(1, 2).reshape(64, 64)
            axis.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
    if plane:
        middle, half = (unseen.amax(0) + unseen.amin(0)) / 2, float((unseen.amax(0) - unseen.amin(0)).max()) * 0.55
        lines = [torch.linspace(float(m) - half, float(m) + half, 150) for m in middle]
        with torch.no_grad():
            density = law.log_prob(torch.cartesian_prod(*lines)).exp().reshape(150, 150)
        for axis in axes:
            axis.set(xlim=tuple(lines[0][[0, -1]].tolist()), ylim=tuple(lines[1][[0, -1]].tolist()))
        top = float(np.quantile(density, 0.995))
        axes[2].pcolormesh(*lines, density.T, cmap="magma", vmin=0, vmax=top, rasterized=True)
        axes[2].set(title="density", aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -- matching ---------------------------------------------------------------------------------------------------------


def matching(steps: int, batch: int) -> None:
    print(f"\nFlow matching, {steps} steps of {batch} rows, network (128, 128), Adam 2e-3 to 0")
    print(f"{'target':<12} {'coupling':<18} {'loss of':<9} {'steps/s':>8} {'log_prob':>9} {'sliced':>8} {'calls':>6}")
    for name in ("8 gaussians", "moons"):
        data = target(name)
        shift, scale = data.training.mean(0), data.training.std(0)
        training, unseen = ((x - shift) / scale for x in (data.training, data.unseen))
        best = "" if data.truth is None else f"{data.truth + float(scale.log().sum()):>9.3f}"
        print(f"{name:<12} {'truth, floor':<18} {'':<9} {'':>8} {best:>9} {sliced_wasserstein(training, unseen):>8.4f}")
        for coupling in ("independent", "optimal_transport"):
            for owner, model, loss in contenders(coupling):
                torch.manual_seed(0)
                rate = learn(loss, model, lambda x=training: x[torch.randint(len(x), (batch,))], steps)
                model.eval().calibrate(x=unseen)
                log_prob, sliced = judged(model, unseen)
                line = f"{'':<12} {coupling:<18} {owner:<9} {rate:>8.0f} {log_prob:>9.3f} {sliced:>8.4f}"
                print(f"{line} {model.evaluations:>6}", flush=True)


def contenders(coupling: str) -> Iterator[tuple[str, gm.ContinuousFlow, Callable[[Tensor], Tensor]]]:
    from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

    torch.manual_seed(0)
    network = VectorField(2, hidden_features=(128, 128))
    ours = gm.ContinuousFlow(2, coupling=coupling, network=copy.deepcopy(network))
    yield "ours", ours, lambda x: ours.loss(x).mean()
    theirs = gm.ContinuousFlow(2, coupling=coupling, network=network, baseline=False)
    kinds = {"independent": ConditionalFlowMatcher, "optimal_transport": ExactOptimalTransportConditionalFlowMatcher}
    matcher = kinds[coupling](sigma=0.0)

    def loss(x: Tensor) -> Tensor:
        t, place, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (network(t[:, None], place) - velocity).square().sum(-1).mean()

    yield "torchcfm", theirs, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--matching", action="store_true")
    parser.add_argument("--targets", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 32], help="dimensions of --speed")
    parser.add_argument("--steps", type=int, default=3000, help="of training in --speed and --matching")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training in --targets")
    parser.add_argument("--only", nargs="+", choices=[*PLANE, "digits"], default=[*PLANE, "digits"])
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of --targets")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*(torch.jit|isinstance.treespec).*")
    if options.speed:
        speed(options.sizes, options.repeats, options.steps)
    if options.matching:
        matching(options.steps, batch=256)
    if options.targets:
        if options.pictures:
            options.pictures.mkdir(parents=True, exist_ok=True)
        targets(options.only, options.seconds, options.pictures)


if __name__ == "__main__":
    main()
