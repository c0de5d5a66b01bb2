"""Speed of autoregressive sampling: caches against re-running the network, implicit gradients, Hugging Face's generate.

    python benchmarks/autoregressive.py [--quick] [--threads 1] [--peer-python PYTHON]

Prints ratios of times taken in one run, medians of repetitions that alternate. "Naive" runs the whole network for every
entry and keeps one column. `--peer-python` names an interpreter with `transformers` installed, for the last table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods import factorize


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each, measured in turn after a warm-up of each."""
    for run in runs:
        run()
    times = [[timed(run) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


@torch.no_grad()
def naive(model: gm.Autoregressive, z: Tensor) -> Tensor:
    """Draws by one full pass of the network for every entry."""
    x = torch.zeros_like(z)
    for t in range(z.shape[1]):
        theta = model.network(model.entries_of(x))[:, t]
        x[:, t] = model.conditional.head_of(t).sample(theta)
    return x


def rough(model: gm.Autoregressive) -> gm.Autoregressive:
    """Away from initialisation, where every entry would be independent of the others; numbers must not run away."""
    scale = 0.05 if model.conditional.discrete else 0.01
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def caches(lengths: list[int], most_rows: int, repeats: int) -> None:
    print(
        f"\nSampling {most_rows} rows (transformer, GRU: {most_rows // 8}): milliseconds, microseconds per cached entry"
    )
    print(
        f"{'network':<34} {'T':>4} {'naive':>9} {'cached':>9} {'ratio':>6} {'jacobi':>9} {'sweeps':>6} {'us/entry':>9}"
    )
    settings = [
        ("MADE 2x512, Bernoulli", "made", factorize.Bernoulli(), {"width": 512}, 784, most_rows),
        ("MADE 2x512, LogisticMixture(4)", "made", factorize.LogisticMixture(4), {"width": 512}, 784, most_rows),
        ("transformer 4x128, Categorical(32)", "transformer", factorize.Categorical(32), {}, 256, most_rows // 8),
        ("GRU 256, Categorical(32)", "gru", factorize.Categorical(32), {"width": 256}, 256, most_rows // 8),
    ]
    for name, network, head, options, longest, rows in settings:
        for length in lengths:
            if length > longest:
                continue
            torch.manual_seed(0)
            model = rough(gm.Autoregressive(length, head, network, **options))
            z = torch.randn(rows, length)
            sweeps = passes_of_jacobi(model, z)
            runs = [lambda m=model, z=z: naive(m, z), lambda m=model, n=rows: m().sample([n])]
            slow, fast, parallel = medians(*runs, lambda m=model, z=z: draw(m, z, "jacobi"), repeats=repeats)
            if head.discrete:
                assert torch.equal(draw(model, z, "jacobi"), draw(model, z, "cached"))
            times = f"{1e3 * slow:>9.1f} {1e3 * fast:>9.1f} {slow / fast:>6.1f} {1e3 * parallel:>9.1f}"
            print(f"{name:<34} {length:>4} {times} {sweeps:>6} {1e6 * fast / length:>9.1f}", flush=True)


def draw(model: gm.Autoregressive, z: Tensor, method: str) -> Tensor:
    with torch.no_grad():
        return model.sampled_by(method)().push(z)


def passes_of_jacobi(model: gm.Autoregressive, z: Tensor) -> int:
    count = [0]
    hook = model.network.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    draw(model, z, "jacobi")
    hook.remove()
    return count[0]


def peak(run: Callable[[], object]) -> int:
    """Most bytes that torch held at once beyond what it held before, from the profiler's record of allocations."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def gradients(lengths: list[int], rows: int, repeats: int) -> None:
    print(f"\nPathwise gradients of {rows} rows, MADE 2x512, LogisticMixture(4); milliseconds, and ratios to sample")
    print("with g: gradients of noise and all parameters too; push solves for quantiles, sample draws components")
    header = f"{'T':>4} {'sample':>7} {'rsample':>8} {'ratio':>6} {'with g':>7} {'ratio':>6}"
    print(f"{header} {'push':>7} {'with g':>7} {'ratio':>6} {'MiB':>7} {'one pass':>8} {'ratio':>6}")
    for length in lengths:
        torch.manual_seed(0)
        model = rough(gm.Autoregressive(length, factorize.LogisticMixture(4), width=512))
        law, z = model(), torch.randn(rows, length)
        x = law.sample([rows])

        def backward(value: Tensor, model: gm.Autoregressive = model) -> None:
            value.cos().sum().backward()
            model.zero_grad()

        runs = [
            lambda law=law: law.sample([rows]),
            lambda law=law: law.rsample([rows]),
            lambda law=law, back=backward: back(law.rsample([rows])),
            lambda model=model, z=z: draw(model, z, "cached"),
            lambda law=law, z=z, back=backward: back(law.push(z)),
        ]
        sample, rsample, both, push, push_both = (1e3 * t for t in medians(*runs, repeats=repeats))
        here = peak(runs[2]) / 2**20
        there = peak(lambda law=law, x=x, back=backward: back(law.log_prob(x))) / 2**20
        times = f"{sample:>7.1f} {rsample:>8.1f} {rsample / sample:>6.2f} {both:>7.1f} {both / sample:>6.2f}"
        times += f" {push:>7.1f} {push_both:>7.1f} {push_both / push:>6.2f}"
        print(f"{length:>4} {times} {here:>7.1f} {there:>8.1f} {here / there:>6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter rows and fewer repetitions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--peer-python", help="interpreter with transformers, for the comparison with generate()")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths, repeats = ([64, 100], 3) if arguments.quick else ([64, 100, 256, 784], 3)
    caches(lengths, arguments.rows, repeats)
    gradients([8, 64] if arguments.quick else [8, 64, 256], arguments.rows, repeats)
    gradients([64], 16 * arguments.rows, repeats)
    if arguments.peer_python:
        script = Path(__file__).with_name("autoregressive_peers.py")
        sys.stdout.flush()
        subprocess.run([arguments.peer_python, str(script)], check=True)


if __name__ == "__main__":
    main()
