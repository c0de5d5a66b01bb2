"""Handwritten digits with a U-Net diffusion: the loss on held-out digits, samples, and restored digits.

    python benchmarks/mnist_diffusion.py --data mnist.npz [--minutes 28] [--digits 24] [--out outputs]

`mnist.npz` holds train_images and test_images, (n, 28, 28) from 0 to 255. Trains for so many minutes of processor time,
or takes up `mnist_diffusion.safetensors` where it is there. Writes `mnist_diffusion_samples.png`.

Held-out digits are then restored from what is left of them, with noise: the upper half, and the whole blurred. Each has
19 draws of its posterior, by guidance (moment matching) and by split Gibbs; all are rows of one batch. A pixel is
uncertain where the draws have a standard deviation above a twentieth of the grey scale. If the posterior is right, the
rank of the true pixel among its draws is uniform from 0 to 19, so that the interval between two order statistics has a
known coverage; grey values are first rounded to a twentieth, and ties broken at random, as many pixels are just black.
The error of a coverage is that of a mean of digits, as pixels of one digit err together. Writes
`mnist_restored_half.png` and `mnist_restored_blur.png` (truth, data, mean, standard deviation, three draws) and
`mnist_intervals.png`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from mnist_autoregressive import grid
from torch import Tensor
from torch.nn.functional import conv2d, pad

import pyro_genmods as gm
from pyro_genmods import evolve
from pyro_genmods.foundation.unet import UNet

BATCH, RATE = 128, 2e-3
DRAWS, NOISE, BLUR = 19, 0.1, 1.5  # of each posterior; in the data, on the grey scale; width in pixels
UNCERTAIN = 0.05


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


def upper_half(x: Tensor) -> Tensor:
    return x[..., :14, :]


def blurred(x: Tensor) -> Tensor:
    kernel = torch.exp(-0.5 * (torch.arange(-6.0, 7.0) / BLUR).square()).to(x)
    kernel = kernel / kernel.sum()
    return conv2d(conv2d(pad(x, (6, 6, 6, 6)), kernel[None, None, None]), kernel[None, None, :, None])


TASKS: dict[str, Callable[[Tensor], Tensor]] = {"half": upper_half, "blur": blurred}


def restored(model: gm.Diffusion, method: str, data: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Draws of the digits' posteriors, ``(digits, DRAWS, 28, 28)``: every digit is DRAWS rows of one batch."""
    told = data.repeat_interleave(DRAWS, 0)

    def log_likelihood(x: Tensor) -> Tensor:
        return -0.5 * ((told - measure(x)) / NOISE).square().flatten(1).sum(1)

    torch.manual_seed(4)
    if method == "guidance":
        law = evolve.guided(model, log_likelihood, evolve.MomentMatching(), sampler=evolve.Ancestral(64))
        draws = law().sample((len(told),))
    else:
        chains = {"num_chains": len(told), "sweeps": 60, "reverse_steps": 8, "spring": (10.0, 0.05)}
        draws = evolve.SplitGibbs(model, log_likelihood, **chains).run().draws
    return draws.reshape(len(data), DRAWS, 28, 28)


def ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Of true pixels among their draws, ties broken at random, ``(digits, 28, 28)``."""
    truth, draws = (20 * truth).round(), (20 * draws).round()
    below, ties = (draws < truth[:, None]).sum(1), (draws == truth[:, None]).sum(1)
    return below + (torch.rand(ties.shape) * (ties + 1)).floor()


def coverage(rank: Tensor, wanted: Tensor, outside: int) -> tuple[float, float]:
    """Of the interval that leaves so many order statistics out on either side, and its standard error."""
    inside = (rank >= outside) & (rank <= DRAWS - outside)
    count = wanted.flatten(1).sum(1)
    share = (inside & wanted).flatten(1).sum(1) / count.clamp_min(1)
    mean = (share * count).sum() / count.sum()
    return float(mean), float((count * (share - mean)).square().sum().sqrt() / count.sum())


def restoration(model: gm.Diffusion, test: Tensor, out: Path) -> None:
    levels = list(range(1, 10))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharey=True)
    print("task  method       s/digit  uncertain  coverage of 50 %    of 90 %          error of the mean   data misfit")
    for axis, (task, measure) in zip(axes, TASKS.items(), strict=True):
        torch.manual_seed(3)
        data = measure(test)
        data = data + NOISE * torch.randn_like(data)
        for method in ("guidance", "split Gibbs"):
            start = time.perf_counter()
            draws = restored(model, method, data, measure)
            seconds = (time.perf_counter() - start) / len(test)
            truth, wanted = test[:, 0], draws.std(1) > UNCERTAIN
            if task == "half":
                wanted[:, :14] = False
            rank = ranks(truth, draws)
            curve = [coverage(rank, wanted, k) for k in levels]
            (half, half_error), (most, most_error) = curve[4], curve[0]
            error = (draws.mean(1) - truth).square().mean().sqrt()
            misfit = ((measure(draws.flatten(0, 1)[:, None]) - data.repeat_interleave(DRAWS, 0)) / NOISE).square()
            print(
                f"{task}  {method:<12} {seconds:7.1f}  {int(wanted.sum()):9d}  {half:.3f} +- {half_error:.3f}  "
                f"   {most:.3f} +- {most_error:.3f}  {float(error):.3f}               {float(misfit.mean()):.2f}",
                flush=True,
            )
            nominal = [1 - 2 * k / (DRAWS + 1) for k in levels]
            axis.errorbar(nominal, [c for c, _ in curve], [2 * e for _, e in curve], capsize=2, label=method)
            if method == "guidance":
                picture(truth, data[:, 0], draws, out / f"mnist_restored_{task}.png")
        axis.plot([0, 1], [0, 1], "k:")
        axis.set(title={"half": "lower half hidden", "blur": "blurred"}[task], xlabel="probability of the interval")
    axes[0].set_ylabel("share of uncertain pixels inside")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out / "mnist_intervals.png", dpi=120)
    plt.close(figure)


def picture(truth: Tensor, data: Tensor, draws: Tensor, path: Path, digits: int = 12) -> None:
    digits = min(digits, len(truth))
    data = pad(data, (0, 0, 0, 28 - data.shape[1]))
    rows = [truth, data, draws.mean(1), draws.std(1), *draws[:, :3].unbind(1)]
    names = ["truth", "data", "mean", "st. dev.", "draw", "draw", "draw"]
    figure, axes = plt.subplots(len(rows), digits, figsize=(digits, len(rows)), squeeze=False)
    for line, name, images in zip(axes, names, rows, strict=True):
        line[0].set_ylabel(name)
        for axis, image in zip(line, images[:digits], strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=0.5 if name == "st. dev." else 1)
            axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=28.0, help="of processor time for training")
    parser.add_argument("--digits", type=int, default=24, help="restored, of those held out")
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
    restoration(model, test[: arguments.digits], arguments.out)


if __name__ == "__main__":
    main()
