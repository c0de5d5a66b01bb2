"""Density estimation on binary data: mean test log-likelihood in nats, one recipe for all data sets.

    python benchmarks/debd.py --data DIR --datasets nltcs plants ... [--minutes 13] [--json FILE]

`DIR/<name>.npz` holds the arrays train, valid and test of zeros and ones. One line a set: name, mean test
log-likelihood, seconds of processor time (one thread). Members learn from the training split alone; all choices are
made on the validation split. The result is one distribution, an ensemble of three ensembles whose weights are those
that make the validation split likeliest:

* linear: logistic autoregression (MADE without hidden layer) under random orders, with an L1 penalty, fitted by
  accelerated proximal gradients along a path of penalties from which the validation split chooses;
* mixtures: continuous mixtures of independent entries, two seeds;
* deep: residual MADEs of one random order each, AdamW, averaged weights, stopped by the validation split. The first
  three try three sizes; further ones take the best until the time is used.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softshrink

import pyro_genmods as gm
from pyro_genmods import factorize

PENALTIES = [0.1 * 0.7**k for k in range(20)]
SIZES = [
    {"width": 400, "layers": 2, "dropout": 0.2},
    {"width": 800, "layers": 2, "dropout": 0.25},
    {"width": 400, "layers": 2, "dropout": 0.1},
]


class Clock:
    """Processor time against a budget."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.process_time(), seconds

    @property
    def spent(self) -> float:
        return time.process_time() - self.start

    @property
    def fraction(self) -> float:
        return self.spent / self.seconds


class Deadline(lightning.Callback):
    """End training when its share of processor time is used."""

    def __init__(self, seconds: float) -> None:
        self.clock = Clock(seconds)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if self.clock.fraction > 1:
            trainer.should_stop = True


# -- linear members ----------------------------------------------------------------------------------------------------


def proximal(x: Tensor, weight: Tensor, bias: Tensor, penalty: float, step: float) -> tuple[Tensor, Tensor]:
    """L1-penalised logistic regression of each column of `x` on those before it; FISTA with restarts, warm-started."""
    centred, mask = 2 * (x - x.mean(0)), torch.ones_like(weight).tril(-1)
    z, zb, momentum = weight, bias, 1.0
    for _ in range(150):
        residual = torch.sigmoid(torch.addmm(zb, centred, z.T)) - x
        new = softshrink(z - step * (residual.T @ centred) / len(x), step * penalty) * mask
        new_bias = zb - step * residual.mean(0)
        if float(((z - new) * (new - weight)).sum()) > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        speed = (momentum - 1) / following
        z, zb = new + speed * (new - weight), new_bias + speed * (new_bias - bias)
        change = float((new - weight).abs().max())
        weight, bias, momentum = new, new_bias, following
        if change < 1e-3 * math.sqrt(step):
            break
    return weight, bias


def linear_member(data: dict[str, Tensor], start: int, clock: Clock) -> tuple[gm.Autoregressive, int]:
    """A sparse logistic autoregression under a random order, and the number of the penalty that validation chose."""
    features = data["train"].shape[1]
    model = gm.Autoregressive(features, factorize.Bernoulli(), layers=0, order="random").eval()
    x, valid = data["train"][:, model.order], data["valid"]
    centred = 2 * (x - x.mean(0))
    step = float(1 / (0.25 * torch.linalg.eigvalsh(centred.T @ centred / len(x))[-1] + 0.25))
    mean = ((x.sum(0) + 0.5) / (len(x) + 1)).clamp(1e-5, 1 - 1e-5)
    weight, bias = torch.zeros(features, features), mean.logit()
    best, worse, kept, chosen = -math.inf, 0, model.state_dict(), start
    for k in range(start, len(PENALTIES)):
        weight, bias = proximal(x, weight, bias, PENALTIES[k], step)
        with torch.no_grad():  # the network sees 2 x - 1
            model.network.skip.copy_(weight[:, None, :, None])
            model.network.bias.copy_((bias + weight @ (1 - 2 * x.mean(0)))[:, None])
            value = float(model().log_prob(valid).mean())
        if value > best:
            best, worse, chosen = value, 0, k
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        else:
            worse += 1
        if worse == 2 or clock.fraction > 0.25:
            break
    model.load_state_dict(kept)
    return model, chosen


def linear_family(data: dict[str, Tensor], clock: Clock) -> list[gm.Autoregressive]:
    members, chosen = [], []
    while len(members) < 32 and (not members or clock.fraction * (len(members) + 1) / len(members) < 0.15):
        model, k = linear_member(data, max(0, min(chosen, default=2) - 2), clock)
        members.append(model)
        chosen.append(k)
    return members


# -- mixtures ---------------------------------------------------------------------------------------------------------


def mixture_member(data: dict[str, Tensor], seconds: float, seed: int) -> factorize.ContinuousMixture:
    """Learned with few points, used with many."""
    torch.manual_seed(seed)
    features = data["train"].shape[1]
    learner = factorize.ContinuousMixture(features, training_points=4096)
    train(learner, data, seconds, seed, batch_size=300, learning_rate=3e-3, patience=10)
    return factorize.ContinuousMixture(features, points=16384, network=learner.network).eval()


# -- deep members ------------------------------------------------------------------------------------------------------


def deep_member(data: dict[str, Tensor], size: dict[str, Any], seconds: float, seed: int) -> gm.Autoregressive:
    torch.manual_seed(seed)
    model = gm.Autoregressive(data["train"].shape[1], factorize.Bernoulli(), order="random", **size)
    train(model, data, seconds, seed, batch_size=100, learning_rate=1e-3, patience=15)
    return model


def train(model: gm.GenerativeModel, data: dict[str, Tensor], seconds: float, seed: int, **settings: Any) -> None:
    """Learn by likelihood; keep the averaged weights that the validation split likes best."""
    gm.fit(
        model,
        data["train"],
        validation=data["valid"],
        max_epochs=1000,
        weight_decay=0.01,
        ema=0.998,
        schedule="constant",
        gradient_clip=None,
        seed=seed,
        progress_bar=False,
        callbacks=[Deadline(seconds)],
        **settings,
    )


def deep_family(data: dict[str, Tensor], clock: Clock) -> list[gm.Autoregressive]:
    share = 0.1 * clock.seconds
    first = [deep_member(data, size, share, seed) for seed, size in enumerate(SIZES)]
    values = [mean_log_prob(model, data["valid"]) for model in first]
    best = int(np.argmax(values))
    members = [
        model for model, value in zip(first, values, strict=True) if value > values[best] - 0.01 * abs(values[best])
    ]
    longest = 0.0
    while clock.spent + max(longest, 0.02 * clock.seconds) < 0.92 * clock.seconds and len(members) < 32:
        before = clock.spent
        members.append(deep_member(data, SIZES[best], min(share, 0.92 * clock.seconds - before), 100 + len(members)))
        longest = max(longest, clock.spent - before)
    return members


def mean_log_prob(model: gm.GenerativeModel, x: Tensor) -> float:
    with torch.no_grad():
        return float(torch.cat([model().log_prob(part) for part in x.split(1000)]).mean())


def fitted(data: dict[str, Tensor], seconds: float, seed: int = 0) -> tuple[factorize.Ensemble, dict[str, Any]]:
    """The recipe: a distribution, and what there is to know about it."""
    torch.manual_seed(seed)
    clock = Clock(seconds)
    members = {
        "linear": linear_family(data, clock),
        "mixture": [mixture_member(data, 0.1 * seconds, seed) for seed in range(2)],
        "deep": deep_family(data, clock),
    }
    families = {name: factorize.Ensemble(models) for name, models in members.items()}
    model = factorize.Ensemble(list(families.values()))
    weights = model.fit_weights(data["valid"]).tolist()
    facts: dict[str, Any] = {"valid": round(mean_log_prob(model, data["valid"]), 3)}
    for (name, family), weight in zip(families.items(), weights, strict=True):
        value = round(mean_log_prob(family, data["valid"]), 3)
        facts[name] = {"members": len(family.models), "weight": round(weight, 3), "valid": value}
    return model.eval(), facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=13.0, help="processor time a set")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in arguments.datasets:
        arrays = np.load(arguments.data / f"{name}.npz", allow_pickle=False)
        data = {split: torch.from_numpy(arrays[split].astype(np.float32)) for split in ("train", "valid", "test")}
        start = time.process_time()
        model, facts = fitted(data, 60 * arguments.minutes)
        test = mean_log_prob(model, data["test"])
        results[name] = {"test": test, "seconds": time.process_time() - start, **facts}
        print(f"{name:<14} {test:>9.3f} {results[name]['seconds']:>7.0f} s   {json.dumps(facts)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
