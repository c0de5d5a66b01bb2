"""Energies: learning the ring of eight modes, and the speed of chains and of training beside torchebm.

    python -m benchmarks.energy --ring      # divergence by a grid, each objective with the same network and steps
    python -m benchmarks.energy --speed     # chain steps and effective draws a second, training steps a second

The ring has radius 3 and modes of standard deviation 0.3. Every objective takes 1500 steps of 256 examples, Adam with
a cosine from a rate of 1e-2 (5e-3 for score matching), and a perceptron of two layers of 128 over a Gaussian base;
"exact" is the likelihood with its normaliser by a grid of 120 x 120 points. Divergences are of the data's law from
the learned one, in nats.

The speed is that of one and the same network energy (two layers of 128 over a wide Gaussian, two dimensions) under both
libraries, which take turns; a chain step is one transition of one chain. The accuracy is that of the mean square of the
coordinates against a grid; effective draws are those of the slowest coordinate or its square.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyro_genmods as gm
from pyro_genmods import shape
from pyro_genmods.foundation.convergence import effective_sample_size
from pyro_genmods.foundation.networks import MLP
from pyro_genmods.shape.sampling import target_of

RADIUS, SD, STEPS, BATCH = 3.0, 0.3, 1500, 256
SIDE, POINTS = 6.0, 120

# -- the ring ---------------------------------------------------------------------------------------------------------


def centres() -> Tensor:
    angle = torch.arange(8) * (math.pi / 4)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def ring(n: int) -> Tensor:
    return centres()[torch.randint(8, (n,))] + SD * torch.randn(n, 2)


def ring_log_prob(x: Tensor) -> Tensor:
    square = (x[:, None] - centres()).square().sum(-1) / SD**2
    return (-0.5 * square).logsumexp(1) - math.log(8 * 2 * math.pi * SD**2)


def grid() -> tuple[Tensor, float]:
    axis = (torch.arange(POINTS) + 0.5) / POINTS * 2 * SIDE - SIDE
    return torch.cartesian_prod(axis, axis), 2 * math.log(2 * SIDE / POINTS)


def grid_log_normalizer(model: gm.Energy) -> Tensor:
    """Logarithm of the integral of the unnormalised density in the user's units."""
    x, log_cell = grid()
    y, _ = model.coordinates.pull(x)
    return (model.unnormalized_rows(y, None) - model.coordinates.standardization.log_scale()).logsumexp(0) + log_cell


def divergence(model: gm.Energy) -> float:
    x, log_cell = grid()
    with torch.no_grad():
        log_p = ring_log_prob(x)
        y, _ = model.coordinates.pull(x)
        log_q = model.unnormalized_rows(y, None) - model.coordinates.standardization.log_scale()
        log_q = log_q - grid_log_normalizer(model)
        return float(((log_p + log_cell).exp() * (log_p - log_q)).sum())


class Exact(shape.Objective):
    """The negative log-likelihood with its normaliser by a grid."""

    def loss(self, model: gm.Energy, y: Tensor, c: Tensor | None) -> Tensor:
        value = model.unnormalized_rows(y, c) - model.coordinates.standardization.log_scale()
        return grid_log_normalizer(model) - value


OBJECTIVES: dict[str, Callable[[], shape.Objective]] = {
    "exact": Exact,
    "PCD, 20 MALA": lambda: shape.Contrastive(transitions=20, step_size=0.3, buffer_size=2048),
    "CD, 20 MALA": lambda: shape.Contrastive(transitions=20, persistent=False, step_size=0.3),
    "recovery": lambda: shape.Recovery(noise=0.5, transitions=20),
    "NCE": shape.NCE,
    "NCE, 8 draws": lambda: shape.NCE(8),
    "denoising": lambda: shape.Denoising(0.05),
    "sliced": shape.Sliced,
}


RATES = {"denoising": 5e-3, "sliced": 5e-3}  # the better of 1e-2 and 5e-3, which for all others is the first


def learned(objective: shape.Objective, rate: float = 1e-2, seed: int = 0, steps: int = STEPS) -> gm.Energy:
    """An energy of the ring after so many steps on fresh data."""
    torch.manual_seed(seed)
    model = gm.Energy(2, objective=objective)
    model.standardize(ring(20000))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(ring(BATCH)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.freeze()


def learn(seeds: int = 3) -> None:
    print("objective       mean    seeds                 seconds of processor time each")
    for name, make in OBJECTIVES.items():
        start, gaps, constants = time.process_time(), [], []
        for seed in range(seeds):
            model = learned(make(), RATES.get(name, 1e-2), seed)
            gaps.append(divergence(model))
            if hasattr(model, "noise_contrast"):  # of the base, which is normalised, in standardised coordinates
                constants.append(f"{float(model.noise_contrast - grid_log_normalizer(model)):+.3f}")
        each = (time.process_time() - start) / seeds
        line = f"{name:<14}  {sum(gaps) / seeds:.3f}   {' '.join(f'{gap:.3f}' for gap in gaps)}   {each:10.0f}"
        print(line + (f"   log Z off by {' '.join(constants)}" if constants else ""), flush=True)


# -- speed ------------------------------------------------------------------------------------------------------------


class Bumpy(nn.Module):
    """A network energy, tilted by a wide Gaussian, as both libraries see it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = MLP(2, 1, (128, 128), output_bias=False)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return 20 * self.network(x)[:, 0] + 0.125 * x.square().sum(-1)


def truth(energy: nn.Module) -> Tensor:
    axis = torch.linspace(-10, 10, 401)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        weight = (-energy(x)).softmax(0)
    return (weight[:, None] * x.square()).sum(0)


def judged(draws: Tensor, seconds: float, exact: Tensor) -> str:
    """Of draws ``(chains, draws, 2)``."""
    error = (draws.square().mean((0, 1)) / exact - 1).abs().max()
    least = min(float(effective_sample_size(part).min()) for part in (draws, draws.square()))
    return f"{100 * float(error):5.1f} %   {least / seconds:10.0f}"


def ours(energy: nn.Module, kernel: str, chains: int, steps: int, size: float) -> tuple[Tensor, float]:
    """Draws, and seconds of processor time without the warm-up."""
    law = gm.Energy(2, network=energy, base=None).freeze()
    target = target_of(law, None)
    sampler = shape.Chains(kernel, warmup=100 if kernel != "ula" else 20, step_size=size)
    with torch.no_grad():
        state, tuned = sampler.warm_up(target, 2 * torch.randn(chains, 2))
        kept: list[Tensor] = []
        start = time.process_time()
        sampler.go_on(target, state, tuned, steps, lambda state, *_: kept.append(state.position))
    return torch.stack(kept, 1), time.process_time() - start


def theirs(energy: nn.Module, kernel: str, chains: int, steps: int, size: float) -> tuple[Tensor, float]:
    from torchebm.core import BaseModel
    from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

    class Theirs(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.inner = energy

        def forward(self, x: Tensor, **_: object) -> Tensor:
            return self.inner(x)

    model = Theirs()
    if kernel == "ula":
        sampler = LangevinDynamics(model, step_size=0.5 * size**2)
    else:
        sampler = HamiltonianMonteCarlo(model, step_size=size, n_leapfrog_steps=10)
    x = sampler.sample(x=2 * torch.randn(chains, 2), n_steps=100)
    start = time.process_time()
    draws = sampler.sample(x=x, n_steps=steps, return_trajectory=True)
    return draws, time.process_time() - start


def speed() -> None:
    energy = Bumpy()
    exact = truth(energy)
    print("chains   sampler                 chain steps/s   error     effective draws/s")
    for chains in (1000, 10_000):
        steps = 200 if chains == 1000 else 60
        for library, run, kernel, size in (
            ("torchebm Langevin", theirs, "ula", 0.1),
            ("ours, ULA", ours, "ula", 0.1),
            ("ours, MALA", ours, "mala", 0.3),
            ("torchebm HMC, 10", theirs, "hmc", 0.2),
            ("ours, HMC", ours, "hmc", 0.3),
        ):
            draws, seconds = run(energy, kernel, chains, steps, size)
            rate = chains * steps / seconds
            print(f"{chains:6d}   {library:<22}  {rate:12.0f}   {judged(draws, seconds, exact)}", flush=True)


def training(steps: int = 100) -> None:
    """Steps a second of persistent contrastive divergence, ten Langevin transitions, batches of 256."""
    from torchebm.core import BaseModel
    from torchebm.losses import ContrastiveDivergence
    from torchebm.samplers import LangevinDynamics

    class Theirs(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP(2, 1, (128, 128), output_bias=False)

        def forward(self, x: Tensor, **_: object) -> Tensor:
            return self.inner(x)[:, 0] + 0.5 * x.square().sum(-1)

    def rate(parameters: list[Tensor], loss: Callable[[], Tensor]) -> float:
        optimizer = torch.optim.Adam(parameters, 1e-3)
        start = 0.0
        for step in range(steps + 5):
            if step == 5:
                start = time.process_time()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return steps / (time.process_time() - start)

    model = Theirs()
    sampler = LangevinDynamics(model, step_size=0.02)
    contrast = ContrastiveDivergence(model, sampler, k_steps=10, persistent=True, buffer_size=4096)
    rates = {"torchebm, Langevin": rate(list(model.parameters()), lambda: contrast(ring(BATCH) / RADIUS)[0])}
    for kernel in ("ula", "mala"):
        own = gm.Energy(2, objective=shape.Contrastive(kernel=kernel, step_size=0.2))
        rates[f"ours, {kernel.upper()}"] = rate(
            list(own.parameters()), lambda own=own: own.loss(ring(BATCH) / RADIUS).mean()
        )
    print("training        steps/s")
    for name, value in rates.items():
        print(f"{name:<20} {value:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring", action="store_true")
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.ring:
        learn()
    if arguments.speed or not arguments.ring:
        speed()
        training()


if __name__ == "__main__":
    main()
