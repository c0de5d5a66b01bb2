"""`infer.MCMC(HMC)` with many chains against Pyro's NUTS, NumPyro's NUTS and BlackJAX's ChEES.

    python benchmarks/mcmc.py [--problems eight ...] [--samplers ours ...] [--seeds 4] [--peer-python PYTHON]
                              [--json out.json] [--beside earlier.json] [--show out.json] [--device cpu] [--chains 64]
                              [--primed]

Targets are in `mcmc_models.py`, samplers in `mcmc_peers.py`; each cell (sampler, target, seed) runs in a fresh process
with one thread, and one that fails or lacks a package becomes a row that says so. `--peer-python` is an interpreter
with NumPyro and BlackJAX. Starts are uniform on (-spread, spread) in unconstrained space, the same for all samplers of
a seed; samplers of one chain take the first. Everything is in single precision but `gp`.

Columns, medians over seeds:

    warm cpu, wall  seconds of processor time and of the clock of a run, its warm-up included, everything compiled
                    before (Pyro compiles nothing: its only run)
    ess, rhat       least bulk effective sample size over unconstrained coordinates of x and of (x - mean)^2, all chains
                    together; largest rank R-hat (one chain is split in two)
    gradients       of all chains, warm-up included; under `vmap` those a NumPyro chain needed, not all it ran
    cold            the first run in a fresh process, from the model to the draws: tracing, compiling and sampling, with
                    empty disk caches, or with `--primed` what torch's compiler does once on a machine done before
    import cpu      seconds of the imports before that
    mean, sd err    worst error of a mean and of a standard deviation, in standard deviations, against closed forms or
                    reference draws, else against the median of the cells with many chains

Ours runs at the level it chooses by itself, and compiled. BlackJAX runs with a long and a short warm-up; the comparison
takes the one with the most ESS per second among those with R-hat below 1.01, else the one with the lowest R-hat. Adam
adapts its trajectory at a rate of .1: with the short warm-up, of .02, .05, .1 and .5, the best or within a seventh of
the best on eight schools, the regression, the Gaussian and the banana.

Gradient cells time one gradient of all chains. `--json` keeps every cell as it ends; `--show` prints such a file and
runs nothing; `--beside` adds the cells of an earlier file that this run does not have, marked with a star.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mcmc_models import DATA, PROBLEMS, Problem

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
GOOD_RHAT = 1.01
Row = dict[str, Any]


class Sampler(NamedTuple):
    """A row of the table; ``None`` chains are those of ``--chains``."""

    tool: str
    chains: int | None
    warmup: int
    draws: int
    rate: float = 0.0
    level: str = "auto"


SAMPLERS = {
    "ours": Sampler("ours", None, 100, 200),
    "ours-compiled": Sampler("ours", None, 100, 200, level="compiled"),
    "pyro": Sampler("pyro", 1, 300, 300),
    "numpyro": Sampler("numpyro", 1, 1000, 1000),
    "numpyro-64": Sampler("numpyro", 64, 500, 200),
    "blackjax-500": Sampler("chees", 64, 500, 200, 0.1),
    "blackjax-100": Sampler("chees", 64, 100, 200, 0.1),
}
OURS = ("ours", "ours-compiled")
JAX = ("numpyro", "chees")


class Target(NamedTuple):
    """What is asked: ours over a peer's, by a column, on some problems."""

    peer: str
    column: str
    factor: float
    problems: tuple[str, ...]


FIRST = ("eight", "logistic", "gaussian")
TARGETS = (
    Target("pyro", "ess/s", 1000, FIRST),
    Target("numpyro", "ess/s", 3, FIRST),
    Target("numpyro-64", "ess/s", 3, FIRST),
    Target("blackjax", "ess/s", 1, ("logistic", "gaussian", "banana")),
    Target("blackjax", "ess/s", 0.5, ("eight",)),
    Target("numpyro", "cold ess/s", 10, FIRST),
    Target("numpyro-64", "cold ess/s", 10, FIRST),
)
# Gradient cells: problem, sampler, level, chains.
GRADIENTS = (
    ("eight", "pyro", "", 1),
    ("eight", "ours", "graph", 64),
    ("eight", "ours", "compiled", 64),
    ("flow", "pyro", "", 1),
    ("flow", "ours", "compiled", 256),
    ("flow", "ours", "compiled", 1024),
)
# What is asked of them: microseconds, or how many times Pyro's throughput per chain.
MICROSECONDS = {("eight", "graph", 64): 500.0, ("eight", "compiled", 64): 70.0}
THROUGHPUT = {("flow", "compiled", 256): 800.0, ("flow", "compiled", 1024): 1000.0}


# ------------------------------------------------------------------------------------------------------------ running


def caches(out: Path, options: argparse.Namespace) -> dict[str, str]:
    """Environment of a cell: one thread, and disk caches of torch's compiler that are empty or primed."""
    temporary, kernels = out.parent / "tmp", out.parent / f"{out.name}-inductor"
    if options.primed is not None:
        temporary = options.primed / "tmp"
        shutil.copytree(options.primed / "kernels", kernels, dirs_exist_ok=True)
    temporary.mkdir(exist_ok=True)
    return os.environ | ENVIRONMENT | {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(kernels)}


def prime(folder: Path) -> Path:
    """Compile something small, so that what torch's compiler does once on a machine is done: headers, processor."""
    (folder / "tmp").mkdir()
    changes = {"TMPDIR": str(folder / "tmp"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
    code = "import torch; torch.compile(lambda x: x.sin().sum(-1) + 1)(torch.ones(64, 10))"
    subprocess.run([sys.executable, "-c", code], env=os.environ | ENVIRONMENT | changes, check=True)
    return folder


def cell(job: str, problem: str, tool: str, options: argparse.Namespace, out: Path, **plan: Any) -> Row:
    """Run one cell in a process of its own; what it reports, or why it does not."""
    python = options.peer_python if tool in JAX else sys.executable
    command = [python, str(HERE / "mcmc_peers.py"), job, problem, "--sampler", tool, "--out", str(out)]
    plan |= {"data": options.data, "spread": options.spread, "device": options.device if tool == "ours" else "cpu"}
    for key, value in plan.items():
        command += [f"--{key}", str(value)]
    try:
        done = subprocess.run(
            command, env=caches(out, options), capture_output=True, text=True, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {options.timeout} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    row = json.loads(Path(f"{out}.json").read_text())
    return {"error": f"not installed: {row['missing']}"} if "missing" in row else row


def measure(draws: np.ndarray) -> Row:
    """ESS, R-hat and moments of draws ``(chains, draws, dim)``."""
    import arviz

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        squares = (draws - draws.mean((0, 1))) ** 2
        ess = min(float(arviz.ess({"x": x}, method="bulk")["x"].min()) for x in (draws, squares))
        halves = draws if len(draws) > 1 else draws[:, : draws.shape[1] // 2 * 2].reshape(2, -1, draws.shape[-1])
        rhat = float(arviz.rhat({"x": halves})["x"].max())
    return {"ess": ess, "rhat": rhat, "mean": draws.mean((0, 1)).tolist(), "sd": draws.std((0, 1)).tolist()}


def sample_cell(problem: str, name: str, seed: int, options: argparse.Namespace) -> Row:
    sampler = SAMPLERS[name]
    row: Row = {"kind": "sample", "problem": problem, "sampler": name, "seed": seed, "date": time.strftime("%F %T")}
    chains = sampler.chains or options.chains
    row |= {"chains": chains, "warmup": sampler.warmup, "draws": sampler.draws}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell"
        row |= cell("sample", problem, sampler.tool, options, out, seed=seed, chains=chains, warmup=sampler.warmup,
                    draws=sampler.draws, rate=sampler.rate, level=sampler.level)  # fmt: skip
        if "error" in row:
            return row
        row |= measure(np.load(f"{out}.npz")["draws"])
    row["ess/s"] = row["ess"] / row["warm cpu"]
    row["ess/gradient"] = row["ess"] / max(row["gradients"], 1)
    row["cold ess/s"] = row["ess"] / row["cold cpu"]
    return row


def gradient_cell(spec: tuple[str, str, str, int], options: argparse.Namespace) -> Row:
    problem, tool, level, chains = spec
    row: Row = {"kind": "gradient", "problem": problem, "sampler": tool, "level": level, "chains": chains}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell"
        return row | cell("gradient", problem, tool, options, out, level=level or "auto", chains=chains)


def agreement(problem: str, options: argparse.Namespace) -> Row:
    """Spread of the difference of the twins' log densities at ten points, beside the largest log density."""
    row: Row = {"kind": "twins", "problem": problem}
    with tempfile.TemporaryDirectory() as folder:
        pair = [cell("density", problem, tool, options, Path(folder) / tool, chains=10) for tool in ("pyro", "numpyro")]
    errors = [side["error"] for side in pair if "error" in side]
    if errors:
        return row | {"error": errors[0]}
    first, second = (np.array(side["values"]) for side in pair)
    row |= {"spread": float(np.ptp(first - second)), "size": float(np.abs(first).max())}
    return row | ({} if row["spread"] < 1e-6 * row["size"] + 1e-4 else {"error": f"the twins differ: {row}"})


def jobs(problems: dict[str, Problem], options: argparse.Namespace) -> Iterable[Callable[[], Row]]:
    """All cells, seeds outermost, so that a run that is cut short has something of every cell."""
    tools = {SAMPLERS[name].tool for name in options.samplers}
    for problem in problems:
        if problems[problem].numpyro is not None and tools & set(JAX):
            yield lambda problem=problem: agreement(problem, options)
    for spec in GRADIENTS:
        if spec[0] in problems and spec[1] in tools:
            yield lambda spec=spec: gradient_cell(spec, options)
    for seed in range(options.seeds):
        for problem in problems:
            for name in options.samplers:
                if SAMPLERS[name].tool not in JAX or problems[problem].numpyro is not None:
                    yield lambda args=(problem, name, seed): sample_cell(*args, options)


# ----------------------------------------------------------------------------------------------------------- printing


def identity(row: Row) -> tuple[Any, ...]:
    return row["kind"], row["problem"], row.get("sampler"), row.get("level"), row.get("chains")


def median(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def reference(rows: list[Row], problem: Problem | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Closed form or reference draws; else the median of the cells with many chains."""
    if problem is not None and problem.moments is not None:
        return problem.moments
    many = [row for row in rows if "mean" in row and row["chains"] > 1]
    return tuple(np.median([row[key] for row in many], 0) for key in ("mean", "sd")) if many else None


HEADS = (("warm cpu", 9, ".3f"), ("warm wall", 10, ".3f"), ("ess", 7, ".0f"), ("rhat", 7, ".3f"),
         ("gradients", 10, ".0f"), ("divergences", 12, ".0f"), ("ess/s", 9, ".1f"), ("ess/gradient", 13, ".4f"),
         ("cold cpu", 9, ".2f"), ("cold ess/s", 11, ".1f"), ("import cpu", 11, ".2f"), ("mean err", 9, ".3f"),
         ("sd err", 7, ".3f"))  # fmt: skip


def line(name: str, rows: list[Row], moments: tuple[np.ndarray, np.ndarray] | None) -> str:
    good = [row for row in rows if "error" not in row]
    star = "*" if any(row.get("earlier") for row in rows) else ""
    head = f"{name + star:20s}{f'{len(good)}/{len(rows)}':>5s}"
    if not good:
        return f"{head}  {rows[0]['error'][:160]}"
    for row in good if moments is not None else ():
        row["mean err"] = float(np.abs((np.array(row["mean"]) - moments[0]) / moments[1]).max())
        row["sd err"] = float(np.abs(np.array(row["sd"]) / moments[1] - 1).max())
    values = [median(good, key) for key, _, _ in HEADS]
    cells = ["-" if value is None else format(value, form) for value, (_, _, form) in zip(values, HEADS, strict=True)]
    return head + "".join(f"{text:>{width}s}" for text, (_, width, _) in zip(cells, HEADS, strict=True))


def best_blackjax(cells: dict[str, list[Row]]) -> str | None:
    """The setting of BlackJAX to compare with."""
    found = {name: rows for name, rows in cells.items() if name.startswith("blackjax") and median(rows, "ess/s")}
    good = [name for name, rows in found.items() if median(rows, "rhat") < GOOD_RHAT]
    if good:
        return max(good, key=lambda name: median(found[name], "ess/s"))
    return min(found, key=lambda name: median(found[name], "rhat")) if found else None


def verdict(value: float, goal: float, least: bool = True) -> str:
    return f"target {'>=' if least else '<='} {goal:g}: {'met' if (value >= goal) == least else 'MISSED'}"


def ratios(problem: str, cells: dict[str, list[Row]]) -> list[str]:
    """Ours over every peer, warm and cold, with the targets."""
    lines, best = [], best_blackjax(cells)
    for us, peer, column in product(OURS, ("pyro", "numpyro", "numpyro-64", "blackjax"), ("ess/s", "cold ess/s")):
        name = best if peer == "blackjax" else peer
        mine, theirs = median(cells.get(us, []), column), median(cells.get(name, []), column)
        if mine is None or theirs is None:
            continue
        asked = [t for t in TARGETS if t.peer == peer and t.column == column and problem in t.problems]
        said = verdict(mine / theirs, asked[0].factor) if asked else ""
        lines.append(f"    {us:14s}/ {name:15s}{column:12s}{mine / theirs:10.2f}   {said}".rstrip())
    return lines


def show_gradients(rows: list[Row]) -> None:
    pyro = {row["problem"]: row["cpu"] for row in rows if row["sampler"] == "pyro" and "cpu" in row}
    print(f"\n{'one gradient':10s}{'level':>10s}{'chains':>8s}{'cpu us':>12s}{'wall us':>12s}{'Pyro per chain':>16s}")
    for row in rows:
        head = f"{row['problem']:12s}{row['level'] or row['sampler']:>10s}{row['chains']:8d}"
        if "error" in row:
            print(f"{head}  {row['error'][:160]}")
            continue
        key = (row["problem"], row["level"], row["chains"])
        micro, base = 1e6 * row["cpu"], pyro.get(row["problem"])
        ratio = row["chains"] * base / row["cpu"] if base else None
        said = verdict(micro, MICROSECONDS[key], least=False) if key in MICROSECONDS else ""
        if key in THROUGHPUT and ratio is not None:
            said = verdict(ratio, THROUGHPUT[key])
        times = "-" if ratio is None else f"{ratio:.1f}x"
        print(f"{head}{micro:12.1f}{1e6 * row['wall']:12.1f}{times:>16s}   {said}")


def show(rows: list[Row], problems: dict[str, Problem]) -> None:
    for row in rows:
        if row["kind"] == "twins":
            said = row.get("error") or f"agree up to a constant within {row['spread']:.1e} of {row['size']:.0f}"
            print(f"{row['problem']:10s} log densities of Pyro and NumPyro: {said}")
    for problem in PROBLEMS:
        mine = [row for row in rows if row["kind"] == "sample" and row["problem"] == problem]
        if not mine:
            continue
        cells = {name: [row for row in mine if row["sampler"] == name] for name in SAMPLERS}
        moments = reference(mine, problems.get(problem))
        print(f"\n{problem:20s}{'runs':>5s}" + "".join(f"{head:>{width}s}" for head, width, _ in HEADS))
        for name, found in cells.items():
            if found:
                print(line(name, found, moments))
        for said in ratios(problem, cells):
            print(said)
    gradients = [row for row in rows if row["kind"] == "gradient"]
    if gradients:
        show_gradients(gradients)


def load_problems(folder: Path) -> dict[str, Problem]:
    """All targets whose data are there."""
    problems = {}
    for name, build in PROBLEMS.items():
        try:
            problems[name] = build(folder)
        except FileNotFoundError as error:
            print(f"{name} is left out: {error}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--chains", type=int, default=64, help="chains of ours")
    parser.add_argument("--spread", type=float, default=2.0, help="half width of the starts")
    parser.add_argument("--device", default="cpu", help="device of ours")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with NumPyro and BlackJAX")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one cell")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--show", type=Path, default=None)
    parser.add_argument("--primed", action="store_true", help="keep what torch's compiler does once on a machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.primed = prime(Path(folder)) if options.primed and not options.show else None
        work(options)


def work(options: argparse.Namespace) -> None:
    problems = load_problems(options.data)
    chosen = {name: problem for name, problem in problems.items() if name in options.problems}
    rows: list[Row] = json.loads(options.show.read_text()) if options.show else []
    for job in () if options.show else jobs(chosen, options):
        rows.append(job())
        row = rows[-1]
        state = row.get("error") or f"{row.get('ess/s', row.get('cpu', row.get('spread'))):.3g}"
        print(
            "done:", *(part for part in identity(row) if part), row.get("seed", ""), state, file=sys.stderr, flush=True
        )
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    present = {identity(row) for row in rows}
    for path in options.beside:
        earlier = json.loads(path.read_text())
        rows += [row | {"earlier": True} for row in earlier if identity(row) not in present]
    show(rows, problems)


if __name__ == "__main__":
    main()
