"""What a diffusion prior costs: samplers, densities, and gradients of a Pyro program, as ratios on this machine.

Each number is the median of a few repetitions in one run, one thread.

    python benchmarks/diffusion.py [--data gaussian | banana] [--chains 64]

* ``leapfrog``: one of 64 chains under a diffusion prior, by the score as a force, in noise space (16 and 8 calls), and
  by the exact gradient of the calibrated density, two features and the default network.
* ``density``: seconds for 512 log densities at an error of a thousandth of a nat, and the network calls they take.
* ``Pyro's NUTS``: effective draws a second of one chain, warm-up left out, when the first coordinate is observed; in
  noise space, and by the exact gradient.
* ``64 chains``: the same for our driver's HMC, warm-up and recording included, by all four.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import arviz
import pyro
import pyro.distributions as dist
import torch

import pyro_genmods as gm
from pyro_genmods import evolve

torch.set_num_threads(1)


def median(function: Callable[[], object], repetitions: int = 5) -> float:
    """Seconds of a call, after one that warms up."""
    function()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repetitions // 2]


def data(name: str) -> torch.Tensor:
    """Twenty thousand draws, correlated or curved."""
    torch.manual_seed(0)
    if name == "gaussian":
        return dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]])).sample((20000,))
    x = torch.randn(20000)
    return torch.stack([x, x.square() - 1 + 0.5 * torch.randn(20000)], -1)


def learned(x: torch.Tensor) -> gm.Diffusion:
    """The default network after a short training."""
    model = gm.Diffusion(2)
    gm.fit(model, x, max_epochs=20, batch_size=512, learning_rate=2e-3, seed=0, progress_bar=False)
    return model.freeze()


def programs(prior: gm.Diffusion) -> dict[str, Callable[[], None]]:
    """The same posterior in four ways."""

    def model(law: gm.GenerativeModel) -> None:
        x = pyro.sample("x", law())
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=torch.tensor(1.5))

    def in_noise(calls: int) -> Callable[[], None]:
        law = prior.sampled_by(evolve.AdamsBashforth(calls))
        return pyro.poutine.reparam(lambda: model(law), {"x": gm.infer.PushforwardReparam()})

    return {
        "score as a force": lambda: model(prior.with_score_force()),
        "noise space, 8 calls": in_noise(8),
        "noise space, 16 calls": in_noise(16),
        "exact gradient": lambda: model(prior),
    }


def level(name: str) -> str:
    """Recording an unrolled density takes longer than the chains."""
    return "eager" if name == "exact gradient" else "graph"


def leapfrogs(prior: gm.Diffusion, chains: int) -> None:
    """Gradients of many chains."""
    q = torch.randn(chains, 2)
    for name, program in programs(prior).items():
        energy = gm.infer.potential(program, level=level(name))
        seconds = median(lambda energy=energy: energy.grad(q))
        print(f"leapfrog of {chains} chains, {name}: {1e3 * seconds:.2f} ms", flush=True)


def densities(prior: gm.Diffusion) -> None:
    """Calibrated densities."""
    x = prior().sample((512,))
    with torch.no_grad():
        seconds = median(lambda: prior().log_prob(x))
    print(f"density: {seconds:.3f} s for 512, {prior.cost.score} calls, error {prior.log_prob_error:.1e}", flush=True)


def effective(samples: dict[str, torch.Tensor]) -> float:
    """Draws of the worse coordinate, of ``(chains, draws, 2)``."""
    (x,) = [x for name, x in samples.items() if name in ("x", "x_base")]
    return min(float(arviz.ess(x[..., k].numpy())) for k in range(2))


def many_chains(prior: gm.Diffusion, chains: int) -> None:
    """Effective draws a second of our driver, warm-up included."""
    for name, program in programs(prior).items():
        draws = 25 if name == "exact gradient" else 200
        kernel = gm.infer.HMC(program, level=level(name))
        mcmc = gm.infer.MCMC(kernel, draws, warmup_steps=100, num_chains=chains, seed=0, progress_bar=False)
        start = time.perf_counter()
        mcmc.run()
        seconds = time.perf_counter() - start
        ess = effective(mcmc.get_samples(group_by_chain=True))
        print(f"{chains} chains, {name}: {ess / seconds:.1f} effective draws a second", flush=True)


def one_chain(prior: gm.Diffusion) -> None:
    """Effective draws a second of one chain of Pyro's NUTS, warm-up left out."""
    for name, program in programs(prior).items():
        if "force" in name:  # NUTS has no accept test that a force could answer to
            continue
        pyro.set_rng_seed(0)
        draws = 100 if name == "exact gradient" else 500
        energy = gm.infer.potential(program, level=level(name))
        starts: list[float] = []
        mcmc = pyro.infer.MCMC(
            pyro.infer.NUTS(potential_fn=energy),
            draws,
            warmup_steps=100,
            initial_params=energy.initial_params,
            disable_progbar=True,
            hook_fn=lambda *_, starts=starts: starts.append(time.perf_counter()),
        )
        mcmc.run()
        ess = effective(mcmc.get_samples(group_by_chain=True))
        seconds = starts[-1] - starts[99]
        print(f"Pyro's NUTS, {name}: {ess / seconds:.2f} effective draws a second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["gaussian", "banana"], default="gaussian")
    parser.add_argument("--chains", type=int, default=64)
    arguments = parser.parse_args()
    pyro.set_rng_seed(0)
    prior = learned(data(arguments.data))
    leapfrogs(prior, arguments.chains)
    densities(prior)
    one_chain(prior)
    many_chains(prior, arguments.chains)


if __name__ == "__main__":
    main()
