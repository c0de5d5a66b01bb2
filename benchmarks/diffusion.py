"""What a diffusion prior costs: samplers, densities, and gradients of a Pyro program, as ratios on this machine.

Each number is the median of a few repetitions in one run, one thread.

    python benchmarks/diffusion.py

* ``leapfrog``: one of 64 chains under a diffusion prior, by the score as a force, in noise space (16 calls), and
  by the exact gradient of the density (64 calls), two features and the default network.
* ``density``: seconds for 512 log densities at an error of a thousandth of a nat, and the network calls they take.
* ``posterior``: effective draws a second of the 2-d Gaussian posterior by the same three ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import arviz
import pyro
import pyro.distributions as dist
import torch

import pyro_genmods as gm
from pyro_genmods import evolve

torch.set_num_threads(1)
CHAINS = 64


def median(function: Callable[[], object], repetitions: int = 5) -> float:
    """Seconds of a call, after one that warms up."""
    function()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repetitions // 2]


def learned() -> gm.Diffusion:
    """The default network after a short training on correlated data."""
    torch.manual_seed(0)
    x = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]])).sample((20000,))
    model = gm.Diffusion(2)
    gm.fit(model, x, max_epochs=20, batch_size=512, learning_rate=2e-3, seed=0, progress_bar=False)
    return model.freeze()


def programs(prior: gm.Diffusion) -> dict[str, Callable[[], None]]:
    """The same posterior in three ways."""

    def model(law: gm.GenerativeModel) -> None:
        x = pyro.sample("x", law())
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=torch.tensor(1.5))

    noise = prior.sampled_by(evolve.AdamsBashforth(16))
    reparam = pyro.poutine.reparam(lambda: model(noise), {"x": gm.infer.PushforwardReparam()})
    return {
        "score as a force": lambda: model(prior.with_score_force()),
        "noise space": reparam,
        "exact gradient": lambda: model(prior),
    }


def leapfrogs(prior: gm.Diffusion) -> None:
    """Gradients of 64 chains."""
    q = torch.randn(CHAINS, 2)
    for name, program in programs(prior).items():
        energy = gm.infer.potential(program, level="eager" if name == "exact gradient" else "graph")
        print(f"leapfrog, {name}: {1e3 * median(lambda energy=energy: energy.grad(q)):.2f} ms")


def densities(prior: gm.Diffusion) -> None:
    """Calibrated densities."""
    x = prior().sample((512,))
    with torch.no_grad():
        seconds = median(lambda: prior().log_prob(x))
    print(f"density: {seconds:.3f} s for 512, {prior.cost.score} calls, error {prior.log_prob_error:.1e}")


def posteriors(prior: gm.Diffusion) -> None:
    """Effective draws a second, warm-up included."""
    for name, program in programs(prior).items():
        level = "eager" if name == "exact gradient" else "graph"
        draws = 25 if name == "exact gradient" else 200
        mcmc = gm.infer.MCMC(
            gm.infer.HMC(program, level=level), draws, warmup_steps=100, num_chains=CHAINS, seed=0, progress_bar=False
        )
        start = time.perf_counter()
        mcmc.run()
        seconds = time.perf_counter() - start
        (site,) = [x for name, x in mcmc.get_samples(group_by_chain=True).items() if name in ("x", "x_base")]
        ess = min(float(arviz.ess(site[..., k].numpy())) for k in range(2))
        print(f"posterior, {name}: {ess / seconds:.0f} effective draws a second")


if __name__ == "__main__":
    pyro.set_rng_seed(0)
    diffusion = learned()
    leapfrogs(diffusion)
    densities(diffusion)
    posteriors(diffusion)
