"""`AutoFlow` against `AutoMultivariateNormal` on posteriors with reference draws (posteriordb).

Both guides get the same number of steps and particles and a learning rate of their own that decays a hundredfold; both
lower bounds are estimated from the same number of fresh draws, by the same log joint density. Printed are the bounds
and the standard error of the last, the log evidence where the README of the data gives it, the Pareto k-hat, the worst
error of a mean (in reference standard deviations), the worst ratio of a standard deviation to the reference's, and
seconds of processor time, setting up included.

    python benchmarks/guides_posteriordb.py [--data ../shared/data] [--steps 2000] [--only NAME ...] [--json out.json]

`--data` holds `posteriordb_models.py` (Pyro models, `load_data`, `load_draws`, `to_reference`) and the data beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoMultivariateNormal
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods.infer.joint import LogJoint

GUIDES = {"normal": (AutoMultivariateNormal, 1e-2), "flow": (gm.infer.AutoFlow, 3e-3)}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def load(folder: Path) -> ModuleType | None:
    """The Pyro models beside the data, imported by path; ``None`` where there are none."""
    path = folder / "posteriordb_models.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("posteriordb_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_evidence(folder: Path, name: str) -> float | None:
    """Log evidence of a posterior, from the table in the README of the data."""
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else ""
    found = re.search(rf"^\|\s*{re.escape(name)}\s*\|.*\|\s*(-?[\d.]+)\s*±", text, re.MULTILINE)
    return float(found[1]) if found else None


def train(model: Callable, guide: AutoContinuous, steps: int, rate: float, particles: int) -> None:
    optimizer = pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=particles))
    for _ in range(steps):
        svi.step()


@torch.no_grad()
def log_weights(model: Callable, guide: AutoContinuous, draws: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log importance weights and draws of either guide, by the same log joint density."""
    posterior = guide.get_posterior()
    latent = posterior.sample((draws,))
    sites = {
        name: (site["fn"].support, guide._unconstrained_shapes[name])
        for name, site in guide.prototype_trace.iter_stochastic_nodes()
    }
    joint = LogJoint(model, sites, latent[0])
    values = [joint.constrain(row)[0] for row in latent]
    return joint(latent) - posterior.log_prob(latent), {k: torch.stack([v[k] for v in values]) for k in values[0]}


def bound(weights: Tensor) -> tuple[float, float]:
    """Mean of log weights and its standard error."""
    return float(weights.mean()), float(weights.std()) / len(weights) ** 0.5


def compare(module: ModuleType, name: str, steps: int, particles: int, draws: int, seed: int = 0) -> dict[str, Any]:
    """Train both guides on one posterior, and measure them."""
    data = module.load_data(name)
    model = module.POSTERIORS[name]["model"](data)
    reference = torch.as_tensor(module.load_draws(name)[0])
    row: dict[str, Any] = {"posterior": name, "draws": draws, "steps": steps, "particles": particles}
    for key, (build, rate) in GUIDES.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = build(model)
        start = time.process_time()
        guide()
        row[f"{key} setup seconds"] = time.process_time() - start
        row[f"{key} start"], row[f"{key} start error"] = bound(log_weights(model, guide, draws)[0])
        start = time.process_time()
        train(model, guide, steps, rate, particles)
        row[f"{key} seconds"] = time.process_time() - start
        weights, values = log_weights(model, guide, draws)
        row[f"{key} elbo"], row[f"{key} error"] = bound(weights)
        row[f"{key} khat"] = gm.diagnostics.psis_khat(weights)
        found = torch.as_tensor(module.to_reference(name, data, values))
        row[f"{key} mean error"] = float(((found.mean(0) - reference.mean(0)) / reference.std(0)).abs().max())
        ratios = found.std(0) / reference.std(0)
        row[f"{key} sd ratio"] = float(ratios[ratios.log().abs().argmax()])
    row["dimension"] = guide.latent_dim
    return row


def behind(row: dict[str, Any], errors: float = 3.0) -> bool:
    """Whether the flow's bound is below the normal's by more than some standard errors of the difference."""
    return row["flow elbo"] < row["normal elbo"] - errors * (row["flow error"] ** 2 + row["normal error"] ** 2) ** 0.5


HEADS = ("normal", "flow start", "flow", "+-", "evidence", "k normal", "k flow", "err normal", "err flow", "sd normal",
         "sd flow", "s normal", "s flow")  # fmt: skip


def line(row: dict[str, Any]) -> str:
    numbers = [row["normal elbo"], row["flow start"], row["flow elbo"], row["flow error"], row["log evidence"],
               row["normal khat"], row["flow khat"], row["normal mean error"], row["flow mean error"],
               row["normal sd ratio"], row["flow sd ratio"], row["normal setup seconds"] + row["normal seconds"],
               row["flow setup seconds"] + row["flow seconds"]]  # fmt: skip
    cells = ["-" if number is None else f"{number:.3f}" for number in numbers]
    return f"{row['posterior']:40s}{row['dimension']:3d}" + "".join(f"{cell:>11s}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--only", nargs="*", default=None, help="names of posteriors")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    module = load(options.data)
    if module is None:
        sys.exit(f"no posteriordb_models.py in {options.data}; name the folder that holds it with --data")
    print(f"{'posterior':40s}{'D':>3s}" + "".join(f"{head:>11s}" for head in HEADS))
    rows = []
    for name in options.only or module.POSTERIORS:
        row = compare(module, name, options.steps, options.particles, options.draws)
        row["log evidence"] = log_evidence(options.data, name)
        print(line(row), flush=True)
        rows.append(row)
    losers = [row["posterior"] for row in rows if behind(row)]
    print(f"the flow's bound is below the normal's by more than three standard errors on: {losers or 'none'}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
