"""Handwritten digits with a U-Net diffusion: the loss on held-out digits, and samples.

    python benchmarks/mnist_diffusion.py --data mnist.npz [--minutes 28] [--out outputs]

`mnist.npz` holds train_images and test_images, (n, 28, 28) from 0 to 255. Trains for so many minutes of processor time,
or takes up `mnist_diffusion.safetensors` where it is there. Writes `mnist_diffusion_samples.png`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from mnist_autoregressive import grid
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods import evolve
from pyro_genmods.foundation.unet import UNet

BATCH, RATE = 128, 2e-3


def grey(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32))[:, None] / 255


def new_model() -> gm.Diffusion:
    torch.manual_seed(0)
    network = UNet((1, 28, 28), channels=(16, 32, 64), patch=1)
    return gm.Diffusion(event_shape=(1, 28, 28), network=network, solver=evolve.RK4(8))


def seconds_a_step(x: Tensor, steps: int = 12) -> float:
    """Of a copy that is thrown away, the first two steps left out."""
    model, start = new_model(), 0.0
    model.standardize(x[:1000])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for step in range(steps):
        if step == 2:
            start = time.process_time()
        optimizer.zero_grad()
        model.loss(x[:BATCH]).mean().backward()
        optimizer.step()
    return (time.process_time() - start) / (steps - 2)


def trained(x: Tensor, minutes: float) -> gm.Diffusion:
    model = new_model()
    epochs = int(60 * minutes / (1.03 * seconds_a_step(x) * (len(x) - 1000) / BATCH))
    start = time.process_time()
    history = gm.fit(
        model,
        x[:-1000],
        validation=x[-1000:],
        batch_size=BATCH,
        learning_rate=RATE,
        max_epochs=max(1, epochs),
        patience=None,
        ema=0.999,
        seed=0,
        progress_bar=False,
    )
    used = (time.process_time() - start) / 60
    losses = ", ".join(f"{loss:.4f}" for loss in history.validation_loss)
    print(f"{history.epochs} epochs in {used:.1f} minutes of processor time, losses {losses}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=28.0, help="of processor time for training")
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arrays = np.load(arguments.data, allow_pickle=False)
    train, test = grey(arrays["train_images"]), grey(arrays["test_images"])
    arguments.out.mkdir(exist_ok=True)
    kept = arguments.out / "mnist_diffusion.safetensors"
    if not kept.exists():
        gm.save(trained(train, arguments.minutes), kept)
    model = gm.load(kept)
    torch.manual_seed(1)
    with torch.no_grad():
        print(f"loss of a pixel on held-out digits {float(model.loss(test[:2000]).mean()) / 784:.4f}")
    start = time.perf_counter()
    samples = model.sampled_by(evolve.AdamsBashforth(24))().sample((48,))
    print(f"48 samples in {time.perf_counter() - start:.1f} s")
    grid(samples[:, 0], 12, arguments.out / "mnist_diffusion_samples.png")


if __name__ == "__main__":
    main()
