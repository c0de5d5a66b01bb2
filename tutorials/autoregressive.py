"""An autoregressive model of handwritten digits in a Pyro program: which digit is it, and what is under the blot?

    python tutorials/autoregressive.py [--out outputs] [--epochs 40]

The model reads an 8 x 8 image of 17 grey levels pixel by pixel, given the digit that it shows: p(image | digit),
exact. Pyro turns that round. In the program the digit is a latent category, the image is observed, and summing the
digit out is Bayes' rule: a classifier that was never trained to classify, and that knows when it does not know.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot

import pyro_genmods as gm
from pyro_genmods.factorize import DiscretizedLogisticMixture

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # isort: skip


def code(digit: Tensor) -> Tensor:
    return one_hot(digit.long(), 10).float()


def learn(images: Tensor, digits: Tensor, epochs: int) -> gm.Autoregressive:
    model = gm.Autoregressive((8, 8), DiscretizedLogisticMixture(17, 5), context_features=10, width=384, dropout=0.25)
    history = gm.fit(
        model,
        images,
        code(digits),
        max_epochs=epochs,
        batch_size=64,
        weight_decay=0.05,
        ema=0.995,
        seed=0,
        patience=None,
    )
    print(f"learned in {sum(history.seconds):.0f} s: {history.best_loss:.3f} nats per pixel on validation images")
    return model.freeze()


def program(model: gm.Autoregressive, images: Tensor) -> None:
    """Ten equally likely digits, each with its images."""
    with pyro.plate("images", len(images)):
        digit = pyro.sample("digit", dist.Categorical(logits=torch.zeros(10)))
        pyro.sample("image", model(code(digit)), obs=images)


def posterior(model: gm.Autoregressive, images: Tensor) -> Tensor:
    """p(digit | image), by summing the digit out."""
    marginals = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(
        config_enumerate(program), _no_guide, model, images
    )
    return marginals["digit"].probs


def _no_guide(model: gm.Autoregressive, images: Tensor) -> None:
    """Everything is enumerated, nothing is guessed."""


def show(path: Path, rows: list[Tensor], titles: list[str]) -> None:
    columns = len(rows[0])
    _, axes = plt.subplots(len(rows), columns, figsize=(0.8 * columns, 0.9 * len(rows)))
    for line, row, title in zip(axes, rows, titles, strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.set_facecolor("tab:orange")  # where the image is missing
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=16)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, fontsize=7)
    plt.tight_layout(pad=0.3)
    plt.savefig(path, dpi=120)
    plt.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    pyro.set_rng_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.images))
    images, digits = torch.tensor(data.images)[order].float(), torch.tensor(data.target)[order]
    train, test = slice(0, 1400), slice(1400, None)
    model = learn(images[train], digits[train], arguments.epochs)

    bits = model(code(digits[test])).bits_per_dim(images[test]).mean()
    print(f"test images: {bits:.3f} bits per pixel, given the digit (17 equally likely levels: 4.09)")
    p = posterior(model, images[test])
    right = p.argmax(-1) == digits[test]
    print(f"Bayes' rule names the digit of {100 * right.float().mean():.1f} % of the test images; it is 99 % sure")
    sure = p.amax(-1) > 0.99
    print(
        f"or more of {100 * sure.float().mean():.0f} %, and right in {100 * right[sure].float().mean():.1f} % of these"
    )

    some, labels = images[test][:12], digits[test][:12]
    blot = torch.zeros(8, 8, dtype=torch.bool)
    blot[2:6, 2:6] = True
    filled = model(code(labels)).impute(some, ~blot, num_samples=2, num_particles=256)
    print(f"restored under the blot: effective particles {filled.ess.min():.0f} to {filled.ess.max():.0f} of 256")
    drawn = model(code(torch.arange(12) % 10)).sample()
    rows = [some, some.masked_fill(blot, float("nan")), *filled.values, drawn]
    show(arguments.out / "autoregressive_digits.png", rows, ["truth", "blot", "draw", "draw", "new"])
    print(f"wrote {arguments.out / 'autoregressive_digits.png'}")


if __name__ == "__main__":
    main()
