"""Distillation: students of one to four calls beside their teacher and its few-step solvers.

    python benchmarks/distillation.py --ring                     # ten minutes on one core
    python benchmarks/distillation.py --ring --methods regression --steps 1
    python benchmarks/distillation.py --digits                   # half an hour

`--ring`: the teacher is the exact denoiser of eight Gaussians, standard deviation .2, on a circle of radius 2.
Distances are those of 8000 draws to draws of the law itself, in the user's units, with that of two samples of the law
as the floor; "off mode" is the share of draws more than four standard deviations from all modes.

`--digits`: the 8x8 digits of scikit-learn with uniform noise of one grey level, as 64 coordinates; the teacher is the
default `Diffusion`, trained by `fit`. What is shown is the certificate.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_genmods as gm
from pyro_genmods.evolve.certificate import certify, sliced_distance
from pyro_genmods.evolve.distillation import METHODS, distill

SD = 0.2
ANGLES = torch.arange(8) * math.pi / 4
MODES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1)
WHITE = math.sqrt(2 + SD**2)  # the ring's standard deviation in each direction


class Ring(nn.Module):
    """The mean of the datum given noisy white data of the ring."""

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        modes, variance = MODES / WHITE, (SD / WHITE) ** 2
        total = t.cos().square() * variance + t.sin().square()
        gap = u[:, None] - t.cos()[:, None] * modes
        weights = (-0.5 * gap.square().sum(-1) / total).softmax(-1)
        datum = modes + (t.cos() * variance / total)[:, None] * gap
        return (weights[..., None] * datum).sum(1)


def ring_draws(n: int) -> Tensor:
    return MODES[torch.randint(8, (n,))] + SD * torch.randn(n, 2)


def ring(methods: list[str], steps: list[int], iterations: int) -> None:
    teacher = gm.Diffusion(2, network=Ring(), parameterization="denoised")
    teacher.set_moments(torch.zeros(2), WHITE**2 * torch.eye(2))
    torch.manual_seed(0)
    teacher.calibrate(1e-2)
    print(f"{'method':14}{'calls':>6}{'seconds':>9}{'SW2':>8}{'floor':>8}{'off mode':>10}")
    for method in methods:
        for calls in steps:
            start = time.perf_counter()
            student = distill(
                teacher, calls, method, iterations=iterations, certificate=False, seed=1, progress_bar=False
            )
            seconds = time.perf_counter() - start
            print(f"{method:14}{calls:6d}{seconds:9.1f}" + ring_row(student), flush=True)
            if method == "regression" and calls == steps[0]:
                first = student
    if "regression" in methods:
        print(certify(first, teacher, seed=0))


def ring_row(student: gm.GenerativeModel, batches: int = 4, draws: int = 8000) -> str:
    far, floor, off = [], [], []
    for _ in range(batches):
        with torch.no_grad():
            x = student().sample((draws,))
        y, other = ring_draws(draws), ring_draws(draws)
        directions = nn.functional.normalize(torch.randn(2, 200), dim=0)
        far.append(sliced_distance(x, y, directions))
        floor.append(sliced_distance(other, y, directions))
        off.append(float((torch.cdist(x, MODES).min(1)[0] > 4 * SD).double().mean()))
    return f"{sum(far) / batches:8.3f}{sum(floor) / batches:8.3f}{sum(off) / batches:10.2%}"


def digits(methods: list[str], steps: list[int], iterations: int, epochs: int) -> None:
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    torch.manual_seed(0)
    x = x + torch.rand_like(x)
    teacher = gm.Diffusion(64)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm.fit(teacher, x, max_epochs=epochs, learning_rate=2e-3, ema=0.999, patience=None, seed=0, progress_bar=False)
    print(f"teacher: {time.perf_counter() - start:.0f} s, {teacher.cost.sample} calls")
    for method in methods:
        for calls in steps:
            start = time.perf_counter()
            student = distill(teacher, calls, method, iterations=iterations, seed=1, progress_bar=False)
            print(
                f"\n{method}, {calls} call(s), {time.perf_counter() - start:.0f} s\n{student.certificate}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring", action="store_true")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=150)
    options = parser.parse_args()
    if not (options.ring or options.digits):
        parser.error("give --ring or --digits")
    if options.ring:
        ring(options.methods, options.steps, options.iterations)
    if options.digits:
        digits(options.methods, options.steps, options.iterations, options.epochs)


if __name__ == "__main__":
    main()
