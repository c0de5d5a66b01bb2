"""Posterior samplers where the answer is known: twenty-five modes under linear measurements, and a Gaussian.

The prior is the benchmark of MCGDiff: modes of unit covariance at (8 i, 8 j), tiled to so many dimensions, of random
weights; the diffusion has the exact denoiser for a network, so that nothing but the sampler is judged. Distances are
sliced Wasserstein distances of 1000 projections to draws of the exact posterior; the floor is that between two samples
of the exact posterior of the same size. Errors of the log evidence are in nats.

    python -m benchmarks.posterior_samplers                       # from the root; half an hour on one core
    python -m benchmarks.posterior_samplers --measurements 1 --methods floor twisted
    python -m benchmarks.posterior_samplers --features 80 --particles 400 --problems 1
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods.evolve.gibbs import SplitGibbs
from pyro_genmods.evolve.guidance import DPS, Guidance, MomentMatching, PiGDM, guided
from pyro_genmods.evolve.twisted import TwistedSMC
from tests.mixtures import Measurement, grid_problem, sampling_floor, sliced_distance

STEPS = 200


class Found(NamedTuple):
    """Draws, log evidence, and network calls for each of them."""

    draws: Tensor
    log_evidence: float = math.nan
    calls: float = STEPS


def noise_space(prior: gm.Diffusion, measurement: Measurement, n: int, steps: int = 16, runs: int = 1) -> Found:
    """Tempered sequential Monte Carlo with elliptical slice moves in the noise of a few steps of the flow."""
    law = prior.sampled_by(gm.evolve.AdamsBashforth(steps))

    def model() -> None:
        pyro.factor("y", measurement.log_likelihood(pyro.sample("x", law())))

    noisy = pyro.poutine.reparam(model, {"x": gm.infer.PushforwardReparam()})
    smc = gm.infer.SMC(noisy, n, num_runs=runs, moves="elliptical", seed=0, progress_bar=False)
    smc.run()
    evaluations = sum(stage.moves / stage.acceptance for stages in smc.stages for stage in stages) / runs
    return Found(law().push(smc.get_samples()["x_base"]), smc.log_evidence, evaluations * steps)


def unguided(prior: gm.Diffusion, _measurement: Measurement, n: int) -> Found:
    return Found(prior.sampled_by(gm.evolve.AdamsBashforth(32))().sample((n,)), calls=32)


def by_guidance(guidance: Guidance) -> Callable[[gm.Diffusion, Measurement, int], Found]:
    def run(prior: gm.Diffusion, measurement: Measurement, n: int) -> Found:
        sampler = gm.evolve.Ancestral(STEPS)
        law = guided(prior, measurement.log_likelihood, guidance, sampler=sampler)
        return Found(law().sample((n,)))

    return run


def twisted(prior: gm.Diffusion, measurement: Measurement, n: int) -> Found:
    found = TwistedSMC(prior, measurement.log_likelihood, n, steps=STEPS).run()
    return Found(found.resample(), found.log_evidence)


def split_gibbs(prior: gm.Diffusion, measurement: Measurement, n: int) -> Found:
    found = SplitGibbs(prior, measurement.log_likelihood, n).run()
    return Found(found.draws, calls=found.evaluations)


METHODS: dict[str, Callable[[gm.Diffusion, Measurement, int], Found]] = {
    "prior": unguided,
    "dps": by_guidance(DPS()),
    "pigdm": by_guidance(PiGDM()),
    "moment-matching": by_guidance(MomentMatching()),
    "split-gibbs": split_gibbs,
    "twisted": twisted,
    "noise-space": noise_space,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--measurements", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=["floor", *METHODS], choices=["floor", *METHODS])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("d_y  method            distance   times floor   log evidence off   calls   seconds")
    for d_y in args.measurements:
        distances: dict[str, list[float]] = {name: [] for name in args.methods}
        for problem in range(args.problems):
            law, measurement = grid_problem(args.features, d_y, problem)
            exact, log_evidence = law.posterior(measurement.a, measurement.r, measurement.y)
            prior = law.diffusion(torch.float32)
            pyro.set_rng_seed(problem)
            floor, truth = sampling_floor(exact, args.particles), exact.sample(args.particles)
            print(f"{d_y:3}  problem {problem}: floor {floor:.3f}, log evidence {log_evidence:.3f}")
            for name in args.methods:
                if name == "floor":
                    distances[name].append(floor)
                    continue
                pyro.set_rng_seed(problem)
                start = time.perf_counter()
                found = METHODS[name](prior, measurement, args.particles)
                seconds = time.perf_counter() - start
                distances[name].append(sliced_distance(found.draws, truth))
                print(
                    f"{d_y:3}  {name:16} {distances[name][-1]:9.3f} {distances[name][-1] / floor:13.2f} "
                    f"{found.log_evidence - log_evidence:18.3f} {found.calls:7.0f} {seconds:9.1f}",
                    flush=True,
                )
        for name, values in distances.items():
            mean, median = sum(values) / len(values), sorted(values)[len(values) // 2]
            print(f"{d_y:3}  {name:16} mean {mean:.3f}, median {median:.3f}, over {len(values)} problems", flush=True)


if __name__ == "__main__":
    main()
