"""Cost of one gradient for one chain, from 1 to 4096 chains: does batching pay, and where does it end?

    python benchmarks/scaling.py [--levels graph compiled] [--picture docs/scaling.png] [--device cpu]

For eight schools (10 latents, dominated by overhead) and a hierarchical logistic regression (27 latents, 1000 data,
dominated by arithmetic), microseconds for each chain and gradient, one thread, the best of several repetitions; beside
it one gradient of Pyro's own potential. With `max_batch` memory is bounded: the last row does 4096 chains in turns.
Then Pyro's own NUTS on its own potential and on ours, milliseconds for each leapfrog, one chain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from mcmc_models import DATA, PROBLEMS
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.ops import integrator

import pyro_genmods as gm

CHAINS = (1, 4, 16, 64, 256, 1024, 4096)
TURNS = 512


def seconds(call: Callable[[], Any], least: float = 0.2, repetitions: int = 3) -> float:
    """Seconds of a call: the best mean of several repetitions of at least so many seconds."""
    call()
    best = float("inf")
    for _ in range(repetitions):
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < least:
            call()
            count += 1
        best = min(best, (time.perf_counter() - began) / count)
    return best


def measure(model: Callable[..., Any], level: str, device: str) -> dict[str, float]:
    """Microseconds for each chain and gradient, by number of chains."""
    found = {}
    for chains in CHAINS:
        energy = gm.infer.potential(model, level=level)
        q = energy.initial(chains).to(device)
        found[str(chains)] = 1e6 * seconds(lambda energy=energy, q=q: energy.grad(q)) / chains
    energy = gm.infer.potential(model, level=level, max_batch=TURNS)
    q = energy.initial(CHAINS[-1]).to(device)
    found[f"{CHAINS[-1]} in turns of {TURNS}"] = 1e6 * seconds(lambda: energy.grad(q)) / CHAINS[-1]
    return found


def pyro_gradient(model: Callable[..., Any]) -> float:
    """Microseconds of one gradient of Pyro's own potential."""
    params, potential, _, _ = initialize_model(model)
    return 1e6 * seconds(lambda: integrator.potential_grad(potential, params))


def nuts(kernel: NUTS, params: dict[str, torch.Tensor]) -> float:
    """Milliseconds of each leapfrog of a run of Pyro's NUTS."""
    calls, gradient = [0], integrator.potential_grad

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return gradient(*arguments)

    integrator.potential_grad = counted
    pyro.set_rng_seed(0)
    began = time.process_time()
    try:
        MCMC(kernel, 150, 150, initial_params=params, disable_progbar=True).run()
    finally:
        integrator.potential_grad = gradient
    return 1e3 * (time.process_time() - began) / calls[0]


def draw(rows: dict[str, dict[str, float]], peers: dict[str, float], path: Path) -> None:
    """The picture of the pages."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, row in rows.items():
        points = [(int(chains), cost) for chains, cost in row.items() if chains.isdigit()]
        axes.loglog(*zip(*points, strict=True), "o-" if "compiled" in name else "o--", label=name)
    for position, (name, cost) in zip((1.1, 200), peers.items(), strict=True):
        axes.axhline(cost, color="grey", linewidth=0.8)
        axes.annotate(f"Pyro, {name}", (position, cost * 1.15), color="grey", fontsize=8)
    axes.set_ylim(top=4e3)
    axes.set(xlabel="chains", ylabel="microseconds for each chain and gradient")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", nargs="+", default=["graph", "compiled"])
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, peers = {}, {}
    for name in ("eight", "logistic"):
        model = PROBLEMS[name](DATA).pyro(options.device)
        peers[name] = pyro_gradient(model)
        print(f"{name}, Pyro: {peers[name]:.0f} us", flush=True)
        energy = gm.infer.potential(model, level="compiled")
        start = energy.initial_params
        energy(start)
        own = nuts(NUTS(model), start)
        ours = nuts(NUTS(potential_fn=energy, transforms=energy.transforms), start)
        print(
            f"{name}, Pyro's NUTS: {own:.3g} ms a leapfrog, on our potential {ours:.3g} ms, {own / ours:.2f}x",
            flush=True,
        )
        for level in options.levels:
            row = rows[f"{name}, {level}"] = measure(model, level, options.device)
            print(f"{name}, {level}: " + ", ".join(f"{c}: {cost:.3g}" for c, cost in row.items()), flush=True)
    if options.picture:
        draw(rows, peers, options.picture)


if __name__ == "__main__":
    main()
