"""One cell of `benchmarks/mcmc.py`, in a process of its own: one sampler on one target with one seed.

    python benchmarks/mcmc_peers.py sample eight --sampler chees --out /tmp/cell [--seed 0] [--chains 64] ...
    python benchmarks/mcmc_peers.py gradient eight --sampler ours --level compiled --chains 64 --out /tmp/cell
    python benchmarks/mcmc_peers.py density eight --sampler numpyro --out /tmp/cell

`sample` writes `cell.json` and the draws of the last run in unconstrained coordinates, `cell.npz`; `gradient` times one
gradient of all chains; `density` evaluates the log density at fixed points. A missing package is written down as such.

The first run is timed with everything it causes: the model built, traced, compiled, run. Later runs reuse what was
compiled, and start at the same points with the same seed; each sampler's warm-up is inside every time. Seconds of
processor time are those of this process and of the compilers it started. Imports are timed apart.

NumPyro's `MCMC.run` traces again at every call; its functional core `numpyro.infer.hmc.hmc` is used inside one `jit`
with the defaults of `numpyro.infer.NUTS`, vectorised over chains with `vmap` (as `chain_method="vectorized"` does), so
that its warm time is that of the sampling alone. BlackJAX's sampler is `chees_adaptation` with the pooled diagonal
metric, then `dynamic_hmc`, inside one `jit`. Both work on one flat vector per chain, which suits them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mcmc_models import DATA, PROBLEMS, Problem

MOST_SECONDS = 1.0


class Plan(NamedTuple):
    """What a sampler is asked to do; ``rate`` is the learning rate of BlackJAX's trajectory length."""

    seed: int
    chains: int
    warmup: int
    draws: int
    device: str
    level: str
    rate: float
    start: np.ndarray


class Run(NamedTuple):
    """Draws ``(chains, draws, dim)`` in unconstrained coordinates, and what they took."""

    draws: np.ndarray
    gradients: int
    sampling_gradients: int
    divergences: int
    report: dict[str, Any] | None = None


def cpu() -> float:
    """Seconds of processor time of this process and of the children it waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


# --------------------------------------------------------------------------------------------------- torch: ours, Pyro


def torch_starts(problem: Problem, plan: Plan) -> dict[str, Any]:
    import torch

    dtype = torch.float64 if problem.double else torch.float32
    rows = torch.as_tensor(plan.start, dtype=dtype, device=plan.device)
    return {name: value.contiguous() for name, value in problem.split(rows).items()}


def ours(problem: Problem, plan: Plan) -> Callable[[], Callable[[], Run]]:
    import torch

    import pyro_genmods as gm

    torch.set_num_threads(1)
    kernel = gm.infer.HMC(problem.pyro(plan.device), level=plan.level)
    starts = torch_starts(problem, plan)

    def run() -> Callable[[], Run]:
        mcmc = gm.infer.MCMC(kernel, num_samples=plan.draws, warmup_steps=plan.warmup, num_chains=plan.chains,
                             progress_bar=False, seed=plan.seed, initial_params=starts)  # fmt: skip
        mcmc.run()
        if plan.device != "cpu":
            torch.cuda.synchronize()

        def finish() -> Run:
            samples = mcmc.get_samples(group_by_chain=True)
            draws = problem.join({name: samples[name].detach().cpu().numpy() for name in problem.sites})
            stats = mcmc.sample_stats
            sampling = plan.chains * int(stats["n_steps"][0].sum())
            return Run(draws, mcmc.num_gradients, sampling, int(stats["diverging"].sum()), kernel.potential.report)

        return finish

    return run


def pyro_nuts(problem: Problem, plan: Plan) -> Callable[[], Callable[[], Run]]:
    """Pyro's NUTS as a user runs it, one chain after another; gradients are counted at the integrator."""
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS
    from pyro.ops import integrator

    torch.set_num_threads(1)
    model = problem.pyro(plan.device)
    starts = torch_starts(problem, plan)
    starts = starts if plan.chains > 1 else {name: value[0] for name, value in starts.items()}
    counts = {"all": 0, "warm-up": 0}
    gradient = integrator.potential_grad

    def counted(*args: Any) -> Any:
        counts["all"] += 1
        return gradient(*args)

    def hook(_kernel: Any, _params: Any, stage: str, _index: int) -> None:
        if stage.startswith("Warmup"):
            counts["warm-up"] = counts["all"]

    integrator.potential_grad = counted

    def run() -> Callable[[], Run]:
        pyro.set_rng_seed(plan.seed)
        counts.update({"all": 0, "warm-up": 0})
        mcmc = MCMC(NUTS(model), num_samples=plan.draws, warmup_steps=plan.warmup, num_chains=plan.chains,
                    initial_params=starts, disable_progbar=True, hook_fn=hook)  # fmt: skip
        mcmc.run()

        def finish() -> Run:
            samples = mcmc.get_samples(group_by_chain=True)
            draws = problem.join({name: samples[name].numpy() for name in problem.sites})
            divergences = sum(len(found) for found in mcmc.diagnostics()["divergences"].values())
            return Run(draws, counts["all"], counts["all"] - counts["warm-up"], divergences)

        return finish

    return run


# -------------------------------------------------------------------------------------------- JAX: NumPyro, BlackJAX


def jax_potential(problem: Problem) -> Callable:
    """Potential energy of the twin on one flat row."""
    import jax
    from numpyro.infer.util import initialize_model

    jax.config.update("jax_enable_x64", problem.double)
    potential = initialize_model(jax.random.PRNGKey(0), problem.numpyro()).potential_fn
    return lambda row: potential(problem.split(row))


def finish_jax(arrays: tuple[Any, ...]) -> Run:
    draws, warm, steps, divergent = (np.asarray(array) for array in arrays)
    sampling = int(steps.sum())
    return Run(draws.astype(np.float64), int(warm.sum()) + sampling, sampling, int(divergent.sum()))


def jax_runner(job: Callable, problem: Problem, plan: Plan) -> Callable[[], Callable[[], Run]]:
    import jax
    import jax.numpy as jnp

    compiled = jax.jit(job)
    starts = jnp.asarray(plan.start, dtype=jnp.float64 if problem.double else jnp.float32)

    def run() -> Callable[[], Run]:
        arrays = jax.block_until_ready(compiled(jax.random.PRNGKey(plan.seed), starts))
        return lambda: finish_jax(arrays)

    return run


def numpyro_nuts(problem: Problem, plan: Plan) -> Callable[[], Callable[[], Run]]:
    import jax
    from numpyro.infer.hmc import hmc

    init, step = hmc(jax_potential(problem), algo="NUTS")

    def chain(key: Any, start: Any) -> tuple[Any, ...]:
        def advance(state: Any, _: Any) -> tuple[Any, Any]:
            state = step(state)
            return state, (state.z, state.num_steps, state.diverging)

        state = init(start, num_warmup=plan.warmup, rng_key=key)
        state, (_, warm, _) = jax.lax.scan(advance, state, length=plan.warmup)
        _, (draws, steps, divergent) = jax.lax.scan(advance, state, length=plan.draws)
        return draws, warm, steps, divergent

    def job(key: Any, starts: Any) -> tuple[Any, ...]:
        if plan.chains == 1:
            return tuple(array[None] for array in chain(key, starts[0]))
        return jax.vmap(chain)(jax.random.split(key, plan.chains), starts)

    return jax_runner(job, problem, plan)


class Steps(NamedTuple):
    """Leapfrog steps of a transition, for BlackJAX's record of its warm-up."""

    steps: Any


def chees(problem: Problem, plan: Plan) -> Callable[[], Callable[[], Run]]:
    import blackjax
    import jax
    import optax

    potential = jax_potential(problem)

    def log_density(row: Any) -> Any:
        return -potential(row)

    warmup = blackjax.chees_adaptation(
        log_density,
        plan.chains,
        mass_matrix_estimation="diagonal",
        adaptation_info_fn=lambda _state, info, _adaptation: Steps(info.num_integration_steps),
    )

    def job(key: Any, starts: Any) -> tuple[Any, ...]:
        warm_key, key = jax.random.split(key)
        adam = optax.adam(plan.rate, b1=0.0, b2=0.95)
        (states, parameters), info = warmup.run(warm_key, starts, 0.1, adam, plan.warmup, max_sampling_steps=plan.draws)
        step = blackjax.dynamic_hmc(log_density, **parameters).step

        def advance(states: Any, key: Any) -> tuple[Any, Any]:
            states, info = jax.vmap(step)(jax.random.split(key, plan.chains), states)
            return states, (states.position, info.num_integration_steps, info.is_divergent)

        _, (draws, steps, divergent) = jax.lax.scan(advance, states, jax.random.split(key, plan.draws))
        return draws.swapaxes(0, 1), info.steps, steps, divergent

    return jax_runner(job, problem, plan)


# ------------------------------------------------------------------------------------------------------------- jobs

SAMPLERS = {
    "ours": (ours, ("torch", "pyro", "pyro_genmods")),
    "pyro": (pyro_nuts, ("torch", "pyro")),
    "numpyro": (numpyro_nuts, ("jax", "numpyro")),
    "chees": (chees, ("jax", "numpyro", "optax", "blackjax")),
}


def sample(problem: Problem, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Time the first run, then warm runs until they have taken a second; Pyro, which compiles nothing, only once."""
    build, _ = SAMPLERS[options.sampler]
    begin, wall = cpu(), time.perf_counter()
    run = build(problem, plan)
    finish = run()
    row: dict[str, Any] = {"cold cpu": cpu() - begin, "cold wall": time.perf_counter() - wall}
    spent: list[tuple[float, float]] = []
    while options.sampler != "pyro" and (not spent or (sum(s for s, _ in spent) < MOST_SECONDS and len(spent) < 5)):
        begin, wall = cpu(), time.perf_counter()
        finish = run()
        spent.append((cpu() - begin, time.perf_counter() - wall))
    spent = spent or [(row["cold cpu"], row["cold wall"])]
    result = finish()
    row["warm cpu"] = statistics.median(s for s, _ in spent)
    row["warm wall"] = statistics.median(s for _, s in spent)
    row |= {key.replace("_", " "): value for key, value in result._asdict().items() if key != "draws"}
    row["finite"] = bool(np.isfinite(result.draws).all())
    np.savez(Path(f"{options.out}.npz"), draws=result.draws)
    return row


def gradient(problem: Problem, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Processor time of one gradient of all chains: the median over batches of calls."""
    import torch

    torch.set_num_threads(1)
    model = problem.pyro(plan.device)
    starts = torch_starts(problem, plan)
    begin = cpu()
    if options.sampler == "pyro":
        from pyro.infer.mcmc.util import initialize_model
        from pyro.ops.integrator import potential_grad

        potential_fn = initialize_model(model)[1]
        point = {name: value[0] for name, value in starts.items()}
        call = partial(potential_grad, potential_fn, point)
    else:
        import pyro_genmods as gm

        potential = gm.infer.potential(model, level=plan.level)
        q = potential.initial(plan.chains)
        call = partial(potential.grad, q)
    call()
    row: dict[str, Any] = {"cold cpu": cpu() - begin}
    wait = torch.cuda.synchronize if plan.device != "cpu" else lambda: None
    times, walls, calls = [], [], 1
    while len(times) < 15:
        begin, wall = cpu(), time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        elapsed = time.perf_counter() - wall
        if elapsed < 0.1:
            calls *= 2
            continue
        times.append((cpu() - begin) / calls)
        walls.append(elapsed / calls)
    return row | {"cpu": statistics.median(times), "wall": statistics.median(walls)}


def density(problem: Problem, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Log density, up to a constant, at the starts."""
    if options.sampler == "numpyro":
        import jax

        potential = jax.vmap(jax_potential(problem))
        return {"values": np.asarray(-potential(plan.start), dtype=np.float64).tolist()}
    from pyro.infer.mcmc.util import initialize_model

    potential_fn = initialize_model(problem.pyro("cpu"))[1]
    starts = torch_starts(problem, plan)
    rows = [{name: value[i] for name, value in starts.items()} for i in range(plan.chains)]
    return {"values": [-float(potential_fn(row)) for row in rows]}


JOBS = {"sample": sample, "gradient": gradient, "density": density}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--sampler", choices=SAMPLERS, default="ours")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--spread", type=float, default=2.0)
    parser.add_argument("--level", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    row: dict[str, Any] = {}
    begin = cpu()
    try:
        row["versions"] = {
            name: getattr(importlib.import_module(name), "__version__", "") for name in SAMPLERS[options.sampler][1]
        }
    except ModuleNotFoundError as error:
        Path(f"{options.out}.json").write_text(json.dumps({"missing": error.name}))
        return
    row["import cpu"] = cpu() - begin
    problem = PROBLEMS[options.problem](options.data)
    start = problem.starts(options.chains, options.seed, options.spread)
    plan = Plan(options.seed, options.chains, options.warmup, options.draws, options.device, options.level,
                options.rate, start)  # fmt: skip
    row |= JOBS[options.job](problem, plan, options)
    Path(f"{options.out}.json").write_text(json.dumps(row, default=str))


if __name__ == "__main__":
    main()
