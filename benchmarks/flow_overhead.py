"""What the wrapper costs: `gm.Flow` against the zuko flow inside it, same parameters, same batch, same run.

Four jobs per flow, forward and backward: `log_prob` of data, and `rsample`. The raw flow runs in zuko's own state
(argument validation off everywhere), ours as a user has it (validation on) and with validation off. The two are timed
in turn, many times; the ratio printed is that of the medians, with the median of the pairwise ratios beside it.

    python benchmarks/flow_overhead.py [--features 8] [--batch 1024] [--repeats 60] [--device cpu] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import zuko
from torch.distributions import Distribution

import pyro_genmods as gm

FLOWS = {
    "MAF": zuko.flows.MAF,
    "NSF": zuko.flows.NSF,
    "NICE": zuko.flows.NICE,
    "NSF(passes=2)": lambda features: zuko.flows.NSF(features, passes=2),
    "NCSF": zuko.flows.NCSF,
    "BPF": zuko.flows.BPF,
}


def jobs(law: Distribution, x: torch.Tensor, flow: torch.nn.Module, sample: bool) -> dict[str, Callable[[], None]]:
    def run(backward: bool) -> None:
        flow.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            value = law.rsample((len(x),)) if sample else law.log_prob(x)
            if backward:
                value.sum().backward()
        if value.is_cuda:
            torch.cuda.synchronize()

    return {"forward": lambda: run(False), "backward": lambda: run(True)}


def seconds(job: Callable[[], None]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def compare(
    raw: Callable[[], None], ours: Callable[[], None], validate: bool, repeats: int
) -> tuple[float, float, float]:
    """Median seconds of the raw job, ratio of medians, median of ratios; the order alternates."""
    times: dict[str, list[float]] = {"raw": [], "ours": []}
    state = Distribution._validate_args
    for i in range(repeats + 3):
        order = ["raw", "ours"] if i % 2 else ["ours", "raw"]
        for name in order:
            Distribution.set_default_validate_args(validate if name == "ours" else False)
            elapsed = seconds(raw if name == "raw" else ours)
            if i >= 3:
                times[name].append(elapsed)
    Distribution.set_default_validate_args(state)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = statistics.median(b / a for a, b in zip(times["raw"], times["ours"], strict=True))
    return medians["raw"], medians["ours"] / medians["raw"], pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    rows = []
    print(f"{'flow':15s} {'job':20s} {'zuko ms':>8s} {'ours/zuko':>10s} {'pairs':>7s} {'no validation':>14s}")
    for name, build in FLOWS.items():
        torch.manual_seed(0)
        raw = build(options.features).to(options.device)
        model = gm.Flow(raw)
        x = model().sample((options.batch,))
        for kind, sample in (("log_prob", False), ("rsample", True)):
            Distribution.set_default_validate_args(False)
            theirs, free = jobs(raw(), x, raw, sample), jobs(model(), x, raw, sample)
            Distribution.set_default_validate_args(True)
            checked = jobs(model(), x, raw, sample)
            for direction in ("forward", "backward"):
                base, ratio, pairs = compare(theirs[direction], checked[direction], True, options.repeats)
                _, bare, _ = compare(theirs[direction], free[direction], False, options.repeats)
                job = f"{kind} {direction}"
                print(f"{name:15s} {job:20s} {1e3 * base:8.2f} {ratio:10.3f} {pairs:7.3f} {bare:14.3f}", flush=True)
                rows.append({"flow": name, "job": job, "zuko_ms": 1e3 * base, "ratio": ratio, "unchecked": bare})
    worst = max(rows, key=lambda row: row["ratio"])
    print(f"worst ratio {worst['ratio']:.3f} ({worst['flow']}, {worst['job']}); target 1.05")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
