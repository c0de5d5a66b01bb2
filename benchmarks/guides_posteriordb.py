"""`AutoFlow` against `AutoMultivariateNormal` on posteriors with reference draws (posteriordb).

Both guides get the same number of steps and particles and a decaying learning rate of their own; both lower bounds are
then estimated from the same number of fresh draws. Printed are the bounds with their standard errors, the Pareto
k-hat, and the worst error of mean (in reference standard deviations) and of standard deviation (ratio).

    python benchmarks/guides_posteriordb.py [--data ../shared/data] [--steps 2000] [--json out.json]

`--data` holds `posteriordb_models.py` (Pyro models, `load_data`, `load_draws`, `to_reference`) and the data beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods.infer.joint import LogJoint


def load(folder: Path) -> ModuleType | None:
    path = folder / "posteriordb_models.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("posteriordb_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(model: Any, guide: Any, steps: int, rate: float, particles: int) -> float:
    start = time.perf_counter()
    optimizer = pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=particles))
    for _ in range(steps):
        svi.step()
    return time.perf_counter() - start


@torch.no_grad()
def log_weights(model: Any, guide: Any, draws: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log importance weights and draws of either guide, by the same log joint density."""
    posterior = guide.get_posterior()
    latent = posterior.sample((draws,))
    sites = {name: (site["fn"].support, guide._unconstrained_shapes[name])
             for name, site in guide.prototype_trace.iter_stochastic_nodes()}  # fmt: skip
    joint = LogJoint(model, sites, latent[0])
    values = [joint.constrain(row)[0] for row in latent]
    return joint(latent) - posterior.log_prob(latent), {k: torch.stack([v[k] for v in values]) for k in values[0]}


def compare(module: ModuleType, name: str, steps: int, particles: int, draws: int, seed: int = 0) -> dict[str, Any]:
    data = module.load_data(name)
    model = module.POSTERIORS[name]["model"](data)
    reference = torch.as_tensor(module.load_draws(name)[0])
    row: dict[str, Any] = {"posterior": name, "draws": draws}
    for key, build, rate in (("normal", AutoMultivariateNormal, 1e-2), ("flow", gm.infer.AutoFlow, 3e-3)):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = build(model)
        start = time.perf_counter()
        guide()
        row[f"{key} setup seconds"] = time.perf_counter() - start
        if key == "flow":
            row["flow start"] = float(log_weights(model, guide, draws)[0].mean())
        row[f"{key} seconds"] = train(model, guide, steps, rate, particles)
        weights, values = log_weights(model, guide, draws)
        row[f"{key} elbo"], row[f"{key} error"] = float(weights.mean()), float(weights.std()) / draws**0.5
        row[f"{key} khat"] = gm.diagnostics.psis_khat(weights)
        found = torch.as_tensor(module.to_reference(name, data, values))
        row[f"{key} mean error"] = float(((found.mean(0) - reference.mean(0)) / reference.std(0)).abs().max())
        ratios = found.std(0) / reference.std(0)
        row[f"{key} sd ratio"] = float(ratios[(ratios.log().abs()).argmax()])
    row["dimension"] = guide.latent_dim
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    module = load(options.data)
    if module is None:
        sys.exit(f"no posteriordb_models.py in {options.data}; name the folder that holds it with --data")
    heads = ["normal", "flow start", "flow", "+-", "k normal", "k flow", "mean err", "sd ratio", "s normal", "s flow"]
    print(f"{'posterior':42s} {'D':>3s}" + "".join(f"{head:>11s}" for head in heads))
    rows, behind = [], []
    for name in module.POSTERIORS:
        row = compare(module, name, options.steps, options.particles, options.draws)
        error = (row["flow error"] ** 2 + row["normal error"] ** 2) ** 0.5
        numbers = [row["normal elbo"], row["flow start"], row["flow elbo"], error, row["normal khat"], row["flow khat"],
                   row["flow mean error"], row["flow sd ratio"], row["normal seconds"],
                   row["flow seconds"] + row["flow setup seconds"]]  # fmt: skip
        print(f"{name:42s} {row['dimension']:3d}" + "".join(f"{x:11.3f}" for x in numbers), flush=True)
        rows.append(row)
        if row["flow elbo"] < row["normal elbo"] - 3 * error:
            behind.append(name)
    print(f"the flow's bound is below the normal's by more than three standard errors on: {behind or 'none'}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
