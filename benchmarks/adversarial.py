"""Twenty-five modes in two dimensions, before and after the correction by a critic; digits with ``--digits FILE``.

The modes are normal laws of standard deviation 0.05 on the grid {-4, -2, 0, 2, 4}^2, of equal weights. A draw is good
if it is within four standard deviations of a mode, a mode is covered if at least a quarter of its share of the good
draws falls to it; the distance is that in total variation between the weights of the modes and equal ones.

    python benchmarks/adversarial.py                     # ten minutes on one core
    python benchmarks/adversarial.py --digits digits.png # a generator and a flow fill in halves of handwritten digits
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from sklearn.datasets import load_digits
from torch import Tensor

import pyro_genmods as gm

SD = 0.05
CENTRES = torch.cartesian_prod(*[torch.arange(-4.0, 5.0, 2.0)] * 2)
RECIPE = {"batch_size": 256, "learning_rate": 1e-3, "ema": 0.999, "patience": None, "gradient_clip": None}
QUIET = {**RECIPE, "progress_bar": False}


def modes(n: int, weights: Tensor | None = None) -> Tensor:
    """Draws of the twenty-five modes, ``(n, 2)``."""
    weights = torch.ones(25) if weights is None else weights
    return CENTRES[torch.multinomial(weights, n, replacement=True)] + SD * torch.randn(n, 2)


@dataclass
class Quality:
    """What draws say of a law: modes covered, share of good draws, distance of the modes' weights from the truth."""

    covered: int
    good: float
    distance: float

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None = None) -> Quality:
        weights = torch.ones(25) if weights is None else weights
        truth = weights / weights.sum()
        gap, nearest = torch.cdist(x, CENTRES).min(1)
        good = gap <= 4 * SD
        share = torch.bincount(nearest[good], minlength=25) / max(int(good.sum()), 1)
        covered = int((share >= 0.25 * truth).sum())
        return cls(covered, float(good.float().mean()), float((share - truth).abs().sum() / 2))

    def __str__(self) -> str:
        return f"{self.covered} of 25 modes, {self.good:.1%} good draws, weights off by {self.distance:.3f}"


def train(epochs: int = 560, seed: int = 0) -> gm.Adversarial:
    """A generator of the twenty-five modes."""
    pyro.set_rng_seed(seed)
    x = modes(20000)
    model = gm.Adversarial(2, latent_features=2)
    gm.fit(model, x, max_epochs=epochs, seed=seed, **QUIET)
    return model


def correct(model: gm.Adversarial, epochs: int = 60, seed: int = 0) -> gm.transform.Corrected:
    """The same with its noise tilted by a critic trained to be a log density ratio."""
    pyro.set_rng_seed(seed)
    corrected = gm.transform.Corrected(model)
    gm.fit(corrected, modes(20000), max_epochs=epochs, seed=seed, **QUIET)
    return corrected


def twenty_five() -> None:
    for epochs in (120, 560):
        start = time.perf_counter()
        model = train(epochs)
        middle = time.perf_counter()
        print(f"{epochs} epochs, {middle - start:.0f} s: {Quality.of(model().sample((5000,)))}", flush=True)
        corrected = correct(model)
        print(f"  corrected, {time.perf_counter() - middle:.0f} s: {Quality.of(corrected().sample((5000,)))}")


# -- digits -----------------------------------------------------------------------------------------------------------


def digits(path: str) -> None:
    """A generator and a flow learn 8x8 digits; each fills in the lower halves of digits it has never seen."""
    pyro.set_rng_seed(0)
    levels = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)[torch.randperm(1797)] / 16
    parts = (levels[:1400].repeat(10, 1), levels[1400:1600], levels[1600:])
    training, validation, unseen = (dist.Normal(x, 0.05).sample() for x in parts)
    start = time.perf_counter()
    # A generator need not learn the noise that makes grey levels continuous, nor weigh all pixels the same.
    generator = gm.Adversarial(64, latent_features=16, hidden_features=(256, 256), penalty=1.0, critic_steps=3)
    settings = {**QUIET, "learning_rate": 5e-4, "standardize": False, "validation": levels[1400:1600]}
    gm.fit(generator, levels[:1400].repeat(10, 1), max_epochs=100, seed=0, **settings)
    print(f"generator: {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    flow = gm.transform.coupling_flow(64, hidden_features=(64, 64))
    gm.fit(
        flow,
        training,
        validation=validation,
        max_epochs=4,
        learning_rate=4e-3,
        weight_decay=1,
        ema=0.99,
        seed=0,
        progress_bar=False,
    )
    print(f"flow: {time.perf_counter() - start:.0f} s", flush=True)
    truth, rows = unseen[:6], []
    seen = truth.clone()
    seen[:, 32:] = torch.nan
    for prior in (generator.freeze(), flow.freeze()):
        start = time.perf_counter()
        x = fill_in(prior, truth)
        error = (x.mean(0) - truth)[:, 32:].square().mean().sqrt()
        print(f"{type(prior).__name__}: {time.perf_counter() - start:.0f} s, error of the mean {error:.3f}", flush=True)
        rows += [x.mean(0), *x[:: len(x) // 4][:4]]
    draws = [prior().sample((6,)) for prior in (generator, flow)]
    picture(path, [truth, seen, *rows, *draws])


def fill_in(prior: gm.GenerativeModel, truth: Tensor) -> Tensor:
    """Draws ``(n, digits, 64)`` of whole digits given their upper halves."""

    def model(upper: Tensor) -> None:
        with pyro.plate("digits", len(upper)):
            digit = pyro.sample("digit", prior())
            pyro.sample("upper", dist.Normal(digit[..., :32], 0.1).to_event(1), obs=upper)

    program = poutine.reparam(model, {"digit": gm.infer.PushforwardReparam()})
    kernel = gm.infer.HMC(program, init_strategy=gm.infer.init_to_prior, max_leapfrogs=32)
    mcmc = gm.infer.MCMC(kernel, num_samples=30, warmup_steps=100, num_chains=8, progress_bar=False)
    mcmc.run(truth[:, :32])
    with torch.no_grad():
        return prior().push(mcmc.get_samples()["digit_base"])


def picture(path: str, rows: list[Tensor]) -> None:
    """Rows of digits, one below the other."""
    import matplotlib.pyplot as plt

    names = ["truth", "seen"] + [f"{prior} {what}" for prior in ("GAN", "flow") for what in ("mean", *["draw"] * 4)]
    figure, axes = plt.subplots(len(rows), 6, figsize=(6, len(rows)), layout="constrained")
    for row, name, axis in zip(rows, [*names, "GAN prior", "flow prior"], axes, strict=True):
        for image, ax in zip(row, axis, strict=True):
            ax.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        axis[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="FILE", help="where to put the picture")
    arguments = parser.parse_args()
    digits(arguments.digits) if arguments.digits else twenty_five()
