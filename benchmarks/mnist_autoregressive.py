"""Binarised MNIST with a masked autoregressive network: bits per dimension, samples, inpainting.

    python benchmarks/mnist_autoregressive.py --data mnist.npz [--minutes 8] [--out outputs]

`mnist.npz` holds train_images and test_images, (n, 28, 28) from 0 to 255. Pixels are ones with the probability of their
grey value, drawn once with a fixed seed. Prints the mean test log-likelihood in nats and bits per dimension, writes
`mnist_samples.png` and `mnist_inpainting.png`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import matplotlib
import numpy as np
import torch
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods import factorize

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # isort: skip


class Deadline(lightning.Callback):
    """End training after some time."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.process_time(), seconds

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if time.process_time() - self.start > self.seconds:
            trainer.should_stop = True


def binarised(images: np.ndarray, seed: int) -> Tensor:
    grey = torch.from_numpy(images.astype(np.float32)) / 255
    return torch.bernoulli(grey, generator=torch.Generator().manual_seed(seed))


def mean_log_prob(model: gm.Autoregressive, x: Tensor) -> float:
    with torch.no_grad():
        return float(torch.cat([model().log_prob(part) for part in x.split(500)]).mean())


def grid(images: Tensor, columns: int, path: Path, titles: list[str] | None = None) -> None:
    rows = -(-len(images) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(columns * 0.8, rows * 0.85), squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i < len(images):
            axis.imshow(images[i].nan_to_num(0.5), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        if titles and i < columns:
            axis.set_title(titles[i], fontsize=7)
    plt.tight_layout(pad=0.2)
    plt.savefig(path, dpi=110)
    plt.close()


def inpainting(law: factorize.AutoregressiveDistribution, images: Tensor, path: Path) -> None:
    """The lower half given the upper, exactly; a square in the middle given the rest, by particles."""
    upper = torch.zeros(28, 28, dtype=torch.bool)
    upper[:14] = True
    square = torch.ones(28, 28, dtype=torch.bool)
    square[9:19, 9:19] = False
    cells = []
    for image in images:
        lower = law.condition(image[:14].flatten()).sample([3])
        halves = [torch.cat([image[:14].flatten(), rest]).reshape(28, 28) for rest in lower]
        filled = law.impute(image, square, num_samples=3, num_particles=512).values
        hidden = [image.masked_fill(~mask, torch.nan) for mask in (upper, square)]
        cells += [image, hidden[0], *halves, hidden[1], *filled]
    titles = ["truth", "upper half", "draw", "draw", "draw", "gap", "draw", "draw", "draw"]
    grid(torch.stack(cells), len(titles), path, titles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="of processor time for training")
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arrays = np.load(arguments.data, allow_pickle=False)
    train, test = binarised(arrays["train_images"], 0), binarised(arrays["test_images"], 1)
    torch.manual_seed(0)
    model = gm.Autoregressive((28, 28), factorize.Bernoulli(), "made", width=1000, layers=2, dropout=0.1)
    history = gm.fit(
        model,
        train[:-2000],
        validation=train[-2000:],
        batch_size=100,
        max_epochs=int(max(2, 1.5 * arguments.minutes)),
        patience=None,
        ema=0.999,
        weight_decay=0.01,
        seed=0,
        progress_bar=False,
        callbacks=[Deadline(60 * arguments.minutes)],
    )
    log_prob = mean_log_prob(model, test)
    print(f"{history.epochs} epochs, {sum(history.seconds):.0f} s; test log-likelihood {log_prob:.2f} nats = ", end="")
    print(f"{-log_prob / (784 * math.log(2)):.4f} bits per dimension, perplexity {math.exp(-log_prob / 784):.4f}")
    arguments.out.mkdir(exist_ok=True)
    torch.manual_seed(1)
    law = model()
    start = time.perf_counter()
    samples = law.sample([60])
    print(f"60 samples in {time.perf_counter() - start:.2f} s")
    grid(samples, 12, arguments.out / "mnist_samples.png")
    inpainting(law, test[:8], arguments.out / "mnist_inpainting.png")
    gm.save(model, arguments.out / "mnist.safetensors")


if __name__ == "__main__":
    main()
