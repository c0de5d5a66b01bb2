"""An energy as the prior of handwritten digits: do its chains stay digits, and what do they say of halves unseen?

    python tutorials/energy.py [--out outputs] [--epochs 200] [--steps 10000]

8 x 8 digits are described by 20 numbers, their principal components. An energy learns these by persistent contrastive
divergence: a perceptron tilts the Gaussian with the moments of the data, and chains that go on from step to step are
what it is taught to hold for no better than digits. Chains that are short teach a sampler and not a density, so:

* new chains go from the Gaussian for 10, 100 and 10,000 Langevin steps: do they arrive at digits, and do they stay?
  (`energy_chains.png`);
* energies of digits that were never seen must look like those of digits that were, and like those of long chains
  (`energy_histograms.png`), and `shape.mixing_report` says what it thinks of them;
* `shape.normalize` measures the constant, and with it what an unseen digit's density is worth beside the Gaussian's;
* six digits lose their lower half, noise of scale 0.1 covers the rest, and the energy is the prior of a Pyro program.
  Particles start as draws of the Gaussian and take in energy and data together (`infer.SMC`). Do the intervals hold
  what was hidden? (`energy_restored.png`)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods import diagnostics, shape
from pyro_genmods.shape.sampling import path_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # isort: skip

COMPONENTS, NOISE = 20, 0.1
SEEN = slice(0, 32)  # the pixels of the upper half


class Components:
    """Principal components of images, in units of their standard deviations."""

    def __init__(self, images: Tensor) -> None:
        self.mean = images.mean(0)
        _, size, directions = torch.linalg.svd(images - self.mean, full_matrices=False)
        sd = size[:COMPONENTS] / len(images) ** 0.5
        self.directions = directions[:COMPONENTS] * sd[:, None]
        self.inverse = directions[:COMPONENTS].mT / sd
        self.residual = (images - self.images(self.of(images))).std(0)  # what the components leave out

    def of(self, images: Tensor) -> Tensor:
        return (images - self.mean) @ self.inverse

    def images(self, z: Tensor) -> Tensor:
        return self.mean + z @ self.directions


def learn(training: Tensor, validation: Tensor, epochs: int) -> gm.Energy:
    objective = shape.Contrastive(transitions=20, step_size=0.5, buffer_size=2000, restart=0.02)
    energy = gm.Energy(COMPONENTS, objective=objective, hidden_features=(256, 256))
    start = time.perf_counter()
    settings = {"batch_size": 200, "learning_rate": 3e-3, "ema": 0.99, "weight_decay": 1.0, "gradient_clip": 1.0}
    gm.fit(energy, training, validation=validation, max_epochs=epochs, seed=0, progress_bar=False, **settings)
    print(f"learned in {time.perf_counter() - start:.0f} s", flush=True)
    return energy.freeze()


def chains(energy: gm.Energy, steps: int, number: int = 10) -> dict[int, Tensor]:
    """Where Langevin chains from the base are after 10, 100 and so many steps."""
    path = path_of(energy, None)
    path.inverse_temperature = torch.ones(64)
    sampler = shape.Chains("mala", warmup=0, step_size=0.3)
    state, tuned = sampler.warm_up(path, energy.reference_rows(64, None))
    found, done = {}, 0
    for wanted in (10, 100, steps):
        state, done = sampler.go_on(path, state, tuned, wanted - done), wanted
        found[wanted] = energy.coordinates.push(state.position)[0][:number]
    return found


def program(energy: gm.Energy, components: Components, seen: Tensor) -> None:
    """A digit from the prior; its upper half is seen under noise, and what the components leave out is noise too."""
    with pyro.plate("digits", len(seen)):
        z = pyro.sample("z", energy())
        pixels = components.images(z)
        scale = (NOISE**2 + components.residual[SEEN] ** 2).sqrt()
        pyro.sample("seen", dist.Normal(pixels[..., SEEN], scale).to_event(1), obs=seen)


def restored(energy: gm.Energy, components: Components, truth: Tensor) -> Tensor:
    """Draws ``(draws, digits, 64)`` of whole digits given noisy upper halves."""
    seen = truth[:, SEEN] + NOISE * torch.randn(len(truth), 32)
    draws = []
    for one in seen:  # digits are independent, and particles of one do not pay for the others
        smc = gm.infer.SMC(program, num_particles=400, num_runs=2, seed=0, progress_bar=False)
        smc.run(energy, components, one[None])
        draws.append(components.images(smc.get_samples()["z"][:, 0]))
    return torch.stack(draws, 1)


def rows_of_digits(path: Path, rows: dict[str, Tensor]) -> None:
    number = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), number, figsize=(number, 1.05 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.reshape(8, 8), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def histograms(path: Path, energies: dict[str, Tensor]) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    bins = torch.linspace(*(torch.cat(list(energies.values())).quantile(torch.tensor([0.001, 0.999])).tolist()), 50)
    for name, values in energies.items():
        axis.hist(values, bins.tolist(), density=True, histtype="step", label=name)
    axis.set(xlabel="energy of 20 components, in nats", yticks=[])
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)[torch.randperm(1797)] / 16
    training, validation, unseen = images[:1400], images[1400:1500], images[1500:]
    components = Components(training)
    energy = learn(components.of(training), components.of(validation), arguments.epochs)
    law = energy()

    found = chains(energy, arguments.steps)
    rows_of_digits(
        arguments.out / "energy_chains.png",
        {f"{steps} steps": components.images(z) for steps, z in found.items()}
        | {"digits": components.images(components.of(unseen[:10]))},
    )
    report = shape.mixing_report(law, components.of(training), num_chains=64, short=100, long=400, seed=0)
    print(report)
    with torch.no_grad():
        known = {"digits seen": training, "digits unseen": unseen}
        energies = {name: -law.log_prob(components.of(x)) for name, x in known.items()}
    histograms(arguments.out / "energy_histograms.png", energies | {"long chains": report.energies["long"][:5000]})
    diagnostics.plot_energy_gap(report).figure.savefig(arguments.out / "energy_gap.png", dpi=120)

    found = shape.normalize(energy, force=True, seed=0)
    z = components.of(unseen)
    gaussian = law.untilted.log_prob(z).mean()
    print(f"log Z {found.value:.2f} +- {found.standard_error:.2f} ({found.reason})")
    print(f"unseen digits: {law.log_prob(z).mean():.2f} nats, {gaussian:.2f} under the Gaussian", flush=True)

    truth = unseen[:6]
    start = time.perf_counter()
    draws = restored(energy, components, truth)
    low, high = draws.quantile(torch.tensor([0.05, 0.95]), 0)
    hidden = components.images(components.of(truth))[:, 32:]  # what the components can say of them
    inside = ((hidden >= low[:, 32:]) & (hidden <= high[:, 32:])).float().mean()
    error = (draws.mean(0) - truth)[:, 32:].square().mean().sqrt()
    print(f"restored in {time.perf_counter() - start:.0f} s: 90 % intervals hold {inside:.1%}, RMSE {error:.3f}")
    shown = torch.cat([truth[:, SEEN], torch.full((6, 32), 0.5)], 1)
    rows = {"truth": truth, "seen": shown, "mean": draws.mean(0)} | {f"draw {k + 1}": draws[100 * k] for k in range(3)}
    rows_of_digits(arguments.out / "energy_restored.png", rows)


if __name__ == "__main__":
    main()
