"""What the continuous flows are asked to learn, and how far draws are from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits, make_moons, make_s_curve
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal


def mixture(features: int) -> MixtureSameFamily:
    """Eight normal laws at random places, of unit variance in every column (about)."""
    centres = torch.randn(8, features, generator=torch.Generator().manual_seed(1))
    parts = Independent(Normal(0.95 * centres, 0.3 * torch.ones(8, features)), 1)
    return MixtureSameFamily(Categorical(torch.ones(8)), parts)


class Target(NamedTuple):
    """Training data, unseen data, and the mean log density of the latter under the truth, if that is known."""

    training: Tensor
    unseen: Tensor
    truth: float | None


def eight_gaussians(rows: int) -> tuple[Tensor, float | None]:
    """Radius 5, variance 0.1."""
    angles = torch.arange(8) * math.pi / 4
    centres = 5 * torch.stack([angles.cos(), angles.sin()], -1)
    parts = Independent(Normal(centres, math.sqrt(0.1) * torch.ones(8, 2)), 1)
    law = MixtureSameFamily(Categorical(torch.ones(8)), parts)
    x = law.sample((rows,))
    return x, float(law.log_prob(x).mean())


def moons(rows: int) -> tuple[Tensor, float | None]:
    return torch.tensor(make_moons(rows, noise=0.05, random_state=rows)[0], dtype=torch.float32), None


def checkerboard(rows: int) -> tuple[Tensor, float | None]:
    """Uniform on half of the 4 x 4 squares of edge 2."""
    row, half = torch.randint(4, (rows,)), torch.randint(2, (rows,))
    corner = torch.stack([2 * half + row % 2, row], -1)
    return 2 * (corner + torch.rand(rows, 2)) - 4, -math.log(32)


def s_curve(rows: int) -> tuple[Tensor, float | None]:
    points = make_s_curve(rows, noise=0.05, random_state=rows)[0]
    return torch.tensor(points[:, [0, 2]], dtype=torch.float32), None


PLANE = {"8 gaussians": eight_gaussians, "moons": moons, "checkerboard": checkerboard, "s-curve": s_curve}


def target(name: str) -> Target:
    torch.manual_seed(0)
    if name == "digits":
        pixels = torch.tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)]
        x = (pixels + torch.rand_like(pixels)) / 17
        return Target(x[:1400], x[1400:], None)
    training, (unseen, truth) = PLANE[name](10000)[0], PLANE[name](4000)
    return Target(training, unseen, truth)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 500) -> float:
    """Root of the mean squared distance of order 2 between projections of as many rows on random lines."""
    rows = min(len(x), len(y))
    lines = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(0))
    lines = lines / lines.norm(dim=0)
    return float(((x[:rows] @ lines).sort(0).values - (y[:rows] @ lines).sort(0).values).square().mean().sqrt())
