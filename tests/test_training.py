"""`fit` against truth: known entropies, hand-computed averages, and the run that nothing disturbed."""

import copy
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import matplotlib as mpl
import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import MultivariateNormal, constraints
from zuko import flows

import pyro_genmods as gm
from pyro_genmods.contract import Cost, Density, GenerativeModel
from pyro_genmods.foundation.errors import (
    DataError,
    FileFormatError,
    ShapeError,
    SlowDirectionWarning,
    SupportError,
)
from pyro_genmods.training import TrainingHistory, fit
from pyro_genmods.training.data import Examples, epoch_batches, split

from .statistics import FALSE_ALARM

SCALE_TRIL = torch.tensor([[1.0, 0.0], [80.0, 60.0]])
LAW = MultivariateNormal(torch.tensor([5.0, -3.0]), scale_tril=SCALE_TRIL)


class Gaussian(GenerativeModel):
    """Independent normals, whose best weights are known; ``spoil`` changes the loss of one call."""

    density = Density.EXACT

    def __init__(self, features=2, support=constraints.real, start=1.0):
        super().__init__((features,), (), support)
        self.location = nn.Parameter(torch.full((features,), start))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.calls, self.spoil = 0, None

    @property
    def cost(self):
        return Cost(sample=0, score=0)

    def log_prob_rows(self, y, c):
        return torch.distributions.Normal(self.location, self.log_scale.exp()).log_prob(y).sum(-1)

    def push_rows(self, z, c):
        return self.location + self.log_scale.exp() * z

    def loss(self, x, context=None):
        assert all(parameter.isfinite().all() for parameter in self.parameters())
        self.calls += 1
        loss = super().loss(x, context)
        return loss if self.spoil is None else self.spoil(self, loss)


class Noisy(Gaussian):
    """An objective with random numbers of its own."""

    def loss(self, x, context=None):
        return super().loss(x + 0.1 * torch.randn_like(x))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def draws(n=200, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LAW.sample((n,))


def network(seed=0, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return gm.Flow(flows.MAF(2, transforms=2, hidden_features=(16,), **kwargs))


def quick(model, x, context=None, **kwargs):
    return fit(model, x, context, **{"seed": 1, "progress_bar": False, "max_epochs": 4, "batch_size": 64, **kwargs})


# -- what is learned --------------------------------------------------------------------------------------------------


def assert_relative_entropy(log_p, log_q, parameters, n):
    """KL to the best fit of n rows is chi-square / 2n; the mean of the paired differences estimates it."""
    gap = log_p - log_q
    bound = stats.chi2.isf(FALSE_ALARM, parameters) / (2 * n)
    margin = 5 * float(gap.std()) / math.sqrt(len(gap))
    assert -margin < float(gap.mean()) < bound + margin


def test_gaussian_data_are_learned_up_to_their_entropy():
    n, x, held_out = 2000, draws(2000), draws(20_000, seed=1)
    model = gm.Flow(flows.MAF(2, transforms=1, hidden_features=()))
    history = quick(model, x, max_epochs=35, batch_size=250, learning_rate=4e-2, validation=held_out)
    with torch.no_grad():
        log_q = model().log_prob(held_out)
    assert_relative_entropy(LAW.log_prob(held_out), log_q, 6, n)
    assert history.best_loss == pytest.approx(-float(log_q.mean()) / 2, abs=1e-5)
    entropy = float(LAW.entropy()) / 2
    assert history.best_loss == pytest.approx(entropy, abs=5 / math.sqrt(2 * 2 * 20_000) + 36 / (2 * 2 * n))


def test_conditional_data():
    n = 3000
    context = torch.rand(n + 10_000, 1) * 10
    x = torch.distributions.Normal(3 * context - 1, 3.0).sample()
    model = gm.Flow(flows.MAF(1, context=1, transforms=1, hidden_features=()))
    data, held_out = (x[:n], context[:n]), (x[n:], context[n:])
    quick(model, *data, max_epochs=60, batch_size=200, learning_rate=3e-2, validation=held_out)
    with torch.no_grad():
        log_q = model(held_out[1]).log_prob(held_out[0])
    log_p = torch.distributions.Normal(3 * held_out[1] - 1, 3.0).log_prob(held_out[0])[:, 0]
    assert_relative_entropy(log_p, log_q, 4, n)


def test_data_on_a_support():
    x = torch.randn(3000, 2).mul(0.5).add(1).exp()
    model = Gaussian(support=constraints.positive)
    quick(model, x, max_epochs=40, batch_size=500, learning_rate=3e-2, validation=0)
    standardization = model.coordinates.standardization
    assert torch.allclose(standardization.inverse(model.location), x.log().mean(0), atol=2e-3)
    assert torch.allclose(standardization.scale * model.log_scale.exp(), x.log().std(0), atol=2e-3)


def test_float64():
    model = Gaussian().double()
    history = quick(model, draws(300).numpy())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    with torch.no_grad():
        assert history.best_loss < -float(Gaussian().double()().log_prob(draws(300).double()).mean()) / 2


@pytest.mark.parametrize(
    "data",
    [
        draws(50).numpy(),
        draws(50).numpy().astype(">f8"),
        draws(50).double(),
        draws(50).numpy()[::-1],
        draws(50).tolist(),
        np.arange(100).reshape(50, 2),
    ],
    ids=["array", "big endian", "float64", "reversed", "list", "integers"],
)
def test_whatever_numpy_makes_an_array_of(data):
    if isinstance(data, np.ndarray):
        data.flags.writeable = False
    x = torch.as_tensor(np.asarray(data).astype(np.float32).copy())
    a, b = Gaussian(), Gaussian()
    quick(a, data)
    quick(b, x)
    assert same_weights(weights(a), weights(b))


# -- how it is learned ------------------------------------------------------------------------------------------------


def reference_loop(model, x, epochs, batch_size, rate, seed, decay=None):
    """A plain torch loop over the same batches, with the running average computed as the formula says."""
    model.standardize(x)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0, fused=True)
    average, steps = [p.detach().clone().double() for p in model.parameters()], 0
    for epoch in range(1, epochs + 1):
        for batch in epoch_batches(len(x), batch_size, seed, epoch):
            optimizer.zero_grad()
            model.loss(x[batch]).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            steps += 1
            beta = 0.0 if decay is None else min(decay, (1 + steps) / (10 + steps))
            average = [
                beta * a + (1 - beta) * p.detach().double() for a, p in zip(average, model.parameters(), strict=True)
            ]
    return average


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_steps_are_those_of_a_plain_loop(decay):
    x = draws(200)
    ours, plain = network(), network()
    quick(ours, x, ema=decay, schedule="constant", validation=x[:1], max_epochs=3, patience=None)
    average = reference_loop(plain, x, 3, 64, 1e-3, seed=1, decay=decay)
    history = quick(network(), x, ema=decay, schedule="constant", validation=x, max_epochs=3)
    assert history.best_epoch == 3, "else the last weights are not the best, and the comparison is void"
    ours = network()
    quick(ours, x, ema=decay, schedule="constant", validation=x, max_epochs=3)
    for a, p in zip(average, ours.parameters(), strict=True):
        assert torch.allclose(a, p.double(), rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_validated():
    x, held_out = draws(200), draws(100, seed=1)
    model = network()
    history = quick(model, x, ema=0.99, validation=held_out, max_epochs=6)
    with torch.no_grad():
        loss = float(model.loss(held_out).mean()) / 2
    assert loss == pytest.approx(history.best_loss, abs=1e-6)
    assert history.best_loss == history.validation_loss[history.best_epoch - 1]


def test_early_stopping_gives_the_best_weights_back():
    x, held_out = draws(30), draws(200, seed=1)
    model = gm.Flow(flows.MAF(2, transforms=3, hidden_features=(64, 64)))
    history = quick(model, x, validation=held_out, learning_rate=1e-2, max_epochs=200, patience=7, schedule="constant")
    assert history.stopped == "no improvement in 7 epochs"
    assert history.epochs == history.best_epoch + 7 < 200
    assert history.best_loss == min(history.validation_loss) < history.validation_loss[-1]
    with torch.no_grad():
        assert float(model.loss(held_out).mean()) / 2 == pytest.approx(history.best_loss, abs=1e-6)


def test_without_validation_the_training_loss_decides():
    model = network()
    history = quick(model, draws(100), validation=0, max_epochs=5)
    assert history.validation_loss == [] and history.best_loss == min(history.train_loss)


def test_split_and_batches():
    seen = []

    def record(model, loss):
        assert model.training == torch.is_grad_enabled(), "dropout belongs to training, not to validation"
        seen.append((model.training, len(loss)))
        return loss

    model = Gaussian()
    model.spoil = record
    quick(model, draws(101), validation=0.25, batch_size=20, max_epochs=1)
    assert [n for training, n in seen if training] == [19, 19, 19, 19] and [
        n for training, n in seen if not training
    ] == [25]
    batches = epoch_batches(10, 4, 0, 1)
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(10))
    assert not torch.equal(torch.cat(batches), torch.cat(epoch_batches(10, 4, 0, 2)))


def test_units_come_from_the_training_rows_alone():
    x, held_out = draws(100), 1e3 + draws(100)
    model = Gaussian()
    quick(model, x, validation=held_out, max_epochs=1)
    assert torch.allclose(model.coordinates.standardization.shift, x.mean(0))
    quick(model, x, validation=0.5, max_epochs=1)
    train, _ = split(Examples(x), 0.5, seed=1)
    assert torch.allclose(model.coordinates.standardization.shift, train.x.mean(0))
    quick(model, x, validation=held_out, max_epochs=1)
    quick(model, held_out, standardize=False, max_epochs=1)
    assert torch.allclose(model.coordinates.standardization.shift, x.mean(0))


def test_schedules():
    steps = [(e - 1 + 1 / 2) / 4 for e in range(1, 5)]  # two steps an epoch, the second is recorded
    expected = {
        "cosine": [0.5 * (1 + math.cos(math.pi * t)) for t in steps],
        "constant": [1.0] * 4,
        lambda progress: 1 - progress: [1 - t for t in steps],
    }
    for schedule, factors in expected.items():
        history = quick(Gaussian(), draws(128), validation=0, schedule=schedule)
        assert history.learning_rate == pytest.approx([1e-3 * factor for factor in factors])


def callback(**hooks):
    """A Lightning callback with the given hooks."""
    from lightning.pytorch.callbacks import Callback

    return type("Recorder", (Callback,), hooks)()


def gradient_norms(norms):
    """Note the norms of the gradients as the optimizer saw them."""

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.model.parameters() if p.grad is not None]
        if gradients:
            norms.append(float(nn.utils.get_total_norm(gradients)))

    return callback(on_before_zero_grad=on_before_zero_grad)


def test_gradients_are_clipped():
    free, bound = [], []
    quick(Gaussian(start=3.0), draws(), gradient_clip=None, callbacks=[gradient_norms(free)])
    quick(Gaussian(start=3.0), draws(), gradient_clip=0.5, callbacks=[gradient_norms(bound)])
    assert len(free) == len(bound) > 5 and min(free) > 1
    assert bound == pytest.approx([0.5] * len(bound), rel=1e-3)


def test_weight_decay():
    plain, decayed = Gaussian(start=3.0), Gaussian(start=3.0)
    for model, decay in ((plain, 0.0), (decayed, 1.0)):
        quick(model, draws(64), weight_decay=decay, learning_rate=1e-2, schedule="constant", validation=0, max_epochs=1)
    assert torch.allclose(plain.location - decayed.location, torch.tensor(3.0 * 1e-2), atol=1e-5)


def test_frozen_parameters_stay():
    model = Gaussian()
    model.log_scale.requires_grad_(False)
    quick(model, draws(), ema=0.9)
    assert torch.equal(model.log_scale, torch.zeros(2)) and not torch.equal(model.location, torch.ones(2))


# -- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Noisy, network])
def test_one_seed_one_result(kind):
    def run(seed):
        model = kind()
        history = quick(model, draws(), seed=seed)
        return weights(model), history.train_loss + history.validation_loss

    (a, losses_a), (b, losses_b), (c, _) = run(3), run(3), run(4)
    assert same_weights(a, b) and losses_a == losses_b
    assert not same_weights(a, c)


def test_the_callers_random_stream_is_left_alone():
    x, model = draws(), Noisy()
    before = torch.get_rng_state()
    quick(model, x, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_seed_the_global_generator_decides():
    results = []
    for _ in range(2):
        pyro.set_rng_seed(7)
        model = Noisy()
        results.append((quick(model, draws(), seed=None).seed, weights(model)))
    assert results[0][0] == results[1][0] and same_weights(results[0][1], results[1][1])
    assert quick(Noisy(), draws(), seed=None).seed != results[0][0]


def test_validation_noise_is_the_same_at_every_epoch():
    model = Noisy()
    history = quick(model, draws(), learning_rate=1e-12, max_epochs=3, patience=None)
    assert len(set(history.train_loss)) == 3
    assert history.validation_loss == pytest.approx([history.validation_loss[0]] * 3, abs=1e-9)


# -- bad input --------------------------------------------------------------------------------------------------------


def holes(n=50, row=17, column=1, value=math.nan):
    x = draws(n)
    x[row, column] = value
    return x


BAD_DATA = {
    "nan": (lambda: (network(), holes()), DataError, r"data: nan at row 17, column 1"),
    "inf": (lambda: (network(), holes(value=-math.inf).numpy()), DataError, r"data: -inf at row 17, column 1"),
    "event shape": (
        lambda: (network(), draws()[:, :1]),
        ShapeError,
        r"data: got shape \(200, 1\), Flow needs \(rows, 2\)",
    ),
    "no event dimension": (lambda: (Gaussian(1), torch.randn(9)), ShapeError, r"add the column with data\[:, None\]"),
    "support": (
        lambda: (
            Gaussian(support=constraints.positive),
            holes(value=-1.0).abs() * holes(value=-1.0).sign().clamp(-1, 1),
        ),
        SupportError,
        r"data: row \d+ lies outside the support",
    ),
    "one row": (lambda: (network(), draws(1)), DataError, r"got 1 row\(s\), needs at least 2"),
    "nothing left": (lambda: (network(), draws(2)), DataError, "too few to put 1 aside"),
    "words": (lambda: (network(), np.array([["a", "b"]] * 9)), DataError, "needs real numbers"),
    "constant column": (lambda: (network(), draws() * torch.tensor([1.0, 0.0])), DataError, r"column\(s\) \[1\]"),
    "context missing": (
        lambda: (network(context=3), draws()),
        ShapeError,
        r"context: Flow needs contexts of shape \(3,\)",
    ),
    "context superfluous": (lambda: (network(), draws(), draws()), ShapeError, r"context: Flow needs no context"),
    "context shape": (lambda: (network(context=3), draws(), draws()), ShapeError, r"context: got shape \(200, 2\)"),
    "context nan": (
        lambda: (network(context=2), draws(50), holes()),
        DataError,
        r"context: nan at row 17, column 1",
    ),
    "lengths": (lambda: (network(context=2), draws(50), draws(49)), ShapeError, "49 rows for the 50 rows of data"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case):
    make, error, message = BAD_DATA[case]
    with pytest.raises(error, match=message):
        quick(*make())


BAD_ARGUMENTS = {
    "max_epochs": ({"max_epochs": 0}, ValueError, "max_epochs: got 0"),
    "batch_size": ({"batch_size": -5}, ValueError, "batch_size: got -5"),
    "learning_rate": ({"learning_rate": -1.0}, ValueError, "learning_rate: got -1.0"),
    "patience": ({"patience": 0}, ValueError, "patience: got 0"),
    "ema": ({"ema": 1.0}, ValueError, "ema: got 1.0"),
    "gradient_clip": ({"gradient_clip": 0.0}, ValueError, "gradient_clip: got 0.0"),
    "weight_decay": ({"weight_decay": -1.0}, ValueError, "weight_decay: got -1.0"),
    "schedule": ({"schedule": "cosin"}, ValueError, "schedule: got 'cosin'"),
    "fraction": ({"validation": 1.0}, ValueError, "validation: got 1.0"),
    "triple": ({"validation": (1, 2, 3)}, ValueError, "validation: got a tuple of 3"),
    "validation nan": ({"validation": holes()}, DataError, "validation: nan at row 17"),
    "validation context": ({"validation": (draws(), draws())}, ShapeError, "the context of validation: Flow needs no"),
    "device": ({"device": "cuda:7"}, ValueError, "device: got 'cuda:7'"),
    "typing error": ({"lr": 1.0}, TypeError, "unexpected argument 'lr'"),
    "ours": ({"gradient_clip_val": 1.0}, TypeError, "takes 'gradient_clip' where lightning.Trainer takes"),
    "precision": ({"precision": "bf16-true"}, ValueError, "precision: got 'bf16-true'"),
    "processes": ({"devices": 2, "seed": None}, ValueError, "seed: several processes"),
    "thin batches": ({"devices": 3, "batch_size": 2}, ValueError, "devices: 3 processes for batches of"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    arguments, error, message = BAD_ARGUMENTS[case]
    if case == "device" and torch.cuda.device_count() > 7:
        pytest.skip("the device is there")
    model = network()
    before = weights(model)
    with pytest.raises(error, match=message):
        quick(model, draws(), **arguments)
    assert same_weights(before, weights(model))


def test_a_model_with_nothing_to_learn():
    with pytest.raises(ValueError, match="all parameters of Flow are frozen"):
        quick(network().freeze(), draws())
    with pytest.raises(TypeError, match=r"\bmodel\b"):
        quick(flows.MAF(2), draws())


def test_a_loss_that_is_no_loss_per_example():
    model = Gaussian()
    model.spoil = lambda model, loss: loss.mean()
    with pytest.raises(ShapeError, match=r"returned shape \(\) for \d+ examples"):
        quick(model, draws())


def test_the_slow_direction_is_warned_of():
    model = gm.Flow(flows.MAF(8, transforms=1), direction="sampling")
    with pytest.warns(SlowDirectionWarning, match='direction="density"'):
        quick(model, torch.randn(20, 8), max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(network(), draws(), max_epochs=1)


# -- accidents --------------------------------------------------------------------------------------------------------


def at_call(number, change):
    """Change the loss of one training call."""

    def spoil(model, loss):
        return change(loss, model) if torch.is_grad_enabled() and model.calls >= number else loss

    return spoil


ACCIDENTS = {
    "nan loss": (lambda loss, model: loss * math.nan, "loss"),
    "infinite loss, finite gradient": (
        lambda loss, model: loss + torch.tensor([math.inf] + [0.0] * (len(loss) - 1)),
        "loss",
    ),
    "nan gradient": (
        lambda loss, model: loss + (model.location - model.location.detach()).sum().abs().sqrt(),
        "gradient",
    ),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_what_is_not_finite_stops_and_restores(accident):
    change, what = ACCIDENTS[accident]
    model, undisturbed = Gaussian(), Gaussian()
    quick(undisturbed, draws(128), validation=0, max_epochs=2, schedule="constant")
    model.spoil = at_call(6, change)  # two steps an epoch: the sixth is the second of epoch 3
    live = []
    look = callback(on_train_batch_end=lambda *args: live.append(weights(model)))
    with pytest.warns(RuntimeWarning, match="the weights of epoch 2; lower learning_rate"):
        history = quick(model, draws(128), validation=0, max_epochs=9, schedule="constant", callbacks=[look])
    assert history.stopped == f"non-finite {what} at epoch 3, step 6"
    assert history.epochs == history.best_epoch == 2 and model.calls == 6
    assert len(live) == 6 and same_weights(live[4], live[5]), "the step was taken"
    assert same_weights(weights(model), weights(undisturbed))


def test_what_is_not_finite_at_once():
    model = Gaussian()
    model.spoil = at_call(1, ACCIDENTS["nan loss"][0])
    with pytest.warns(RuntimeWarning, match="non-finite loss at epoch 1, step 1"):
        history = quick(model, draws(128))
    assert history.epochs == history.best_epoch == 0 and torch.equal(model.location, torch.ones(2))
    assert "no best epoch" in repr(history)


def test_an_infinite_validation_loss_is_no_improvement():
    model = Gaussian()
    model.spoil = lambda model, loss: loss if torch.is_grad_enabled() or model.calls > 6 else loss * math.inf
    history = quick(model, draws(128), max_epochs=4)
    assert history.validation_loss[:2] == [math.inf] * 2 and history.best_epoch > 2 and history.epochs == 4


def interrupt_at(number, action):
    def change(loss, model):
        if model.calls == number:
            action()
        return loss

    return at_call(number, change)


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "action", [raise_interrupt, lambda: os.kill(os.getpid(), signal.SIGINT)], ids=["exception", "signal"]
)
def test_an_interrupt_keeps_the_best_weights(action):
    undisturbed, model, handler = Gaussian(), Gaussian(), signal.getsignal(signal.SIGINT)
    quick(undisturbed, draws(128), validation=0, max_epochs=2, schedule="constant")
    model.spoil = interrupt_at(6, action)
    history = quick(model, draws(128), validation=0, max_epochs=9, schedule="constant")
    assert history.stopped == "interrupted" and history.epochs == 2
    assert same_weights(weights(model), weights(undisturbed)) and not model.training
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_before_the_first_step():
    def setup(self, trainer, module, stage):
        raise KeyboardInterrupt

    model, handler = Gaussian(), signal.getsignal(signal.SIGINT)
    history = quick(model, draws(), callbacks=[callback(setup=setup)])
    assert history.stopped == "interrupted" and history.epochs == model.calls == 0
    assert signal.getsignal(signal.SIGINT) is handler, "further interrupts would be ignored"


def test_an_error_in_the_objective_leaves_the_best_weights():
    undisturbed, model = Gaussian(), Gaussian()
    quick(undisturbed, draws(128), validation=0, max_epochs=2, schedule="constant")

    def explode():
        raise RuntimeError("objective")

    model.spoil = interrupt_at(6, explode)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="objective"):
        quick(model, draws(128), validation=0, max_epochs=9, schedule="constant")
    assert same_weights(weights(model), weights(undisturbed)) and torch.equal(before, torch.get_rng_state())


def test_the_trainers_own_limits_are_told():
    history = quick(network(), draws(), max_steps=5, max_epochs=50)
    assert history.stopped == "stopped by the Trainer" and history.epochs < 50


# -- checkpoints ------------------------------------------------------------------------------------------------------

RUN = {"max_epochs": 12, "batch_size": 32, "ema": 0.95, "learning_rate": 5e-3, "patience": None}


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("validation", [0.2, 0])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, seed, validation):
    run = {**RUN, "validation": validation}
    model = Noisy()
    pyro.set_rng_seed(11)
    whole = quick(model, draws(), seed=seed, **run)
    parts = None
    pyro.set_rng_seed(11)
    for calls in (20, 3, 28, None):
        again = Noisy(start=9.0) if parts else Noisy()
        again.spoil = None if calls is None else interrupt_at(calls, raise_interrupt)
        parts = quick(again, draws(), seed=seed, checkpoint=tmp_path / "state", **run)
        assert parts.stopped == ("interrupted" if calls else "max_epochs=12 reached")
    assert same_weights(weights(model), weights(again))
    assert parts.train_loss == whole.train_loss and parts.validation_loss == whole.validation_loss
    assert (parts.best_epoch, parts.seed) == (whole.best_epoch, whole.seed)
    assert parts.resumed == ([3, 7] if validation else [2, 5]), "a run without a finished epoch leaves no trace"


SCRIPT = """
    import sys, time
    import torch
    import pyro_genmods as gm
    from pyro_genmods.training import fit
    from zuko import flows

    class Slow(gm.Flow):
        def loss(self, x, context=None):
            time.sleep(float(sys.argv[2]))
            return super().loss(x, context)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(300, 2).cumsum(-1)
    model = Slow(flows.NSF(2, transforms=1, hidden_features=(16,)))
    history = fit(model, x, max_epochs=15, batch_size=64, ema=0.9, seed=2, progress_bar=False, checkpoint=sys.argv[1])
    for value in model.state_dict().values():
        print(value.double().flatten().tolist())
    print([loss.hex() for loss in history.validation_loss])
    print("resumed", history.resumed, file=sys.stderr)
"""


@pytest.mark.slow
def test_kill_9(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def command(checkpoint, pause):
        return [sys.executable, str(script), str(tmp_path / checkpoint), str(pause)]

    whole = subprocess.Popen(command("whole", 0), stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    for times in (3, 4):
        child = subprocess.Popen(command("parts", 0.02), cwd=tmp_path)
        stamp, deadline = _stamp(tmp_path / "parts"), time.monotonic() + 120
        for _ in range(times):  # let it write the state some more times, then kill it at any moment
            while _stamp(tmp_path / "parts") == stamp and time.monotonic() < deadline:
                time.sleep(0.003)
            stamp = _stamp(tmp_path / "parts")
        child.kill()
        assert child.wait() == -signal.SIGKILL
    parts = subprocess.run(command("parts", 0), capture_output=True, text=True, check=True, cwd=tmp_path)
    output, _ = whole.communicate()
    assert parts.stdout == output and len(output) > 1000
    assert "resumed [" in parts.stderr and "resumed []" not in parts.stderr


def _stamp(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_a_finished_run_returns_at_once(tmp_path):
    model, again = Gaussian(), Gaussian(start=9.0)
    first = quick(model, draws(), checkpoint=tmp_path / "state")
    second = quick(again, draws(), checkpoint=tmp_path / "state")
    assert again.calls == 0 and same_weights(weights(model), weights(again))
    assert first == second and not again.training
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 32}, "batch_size was 64, is 32"),
        ({"seed": 2}, "seed was 1, is 2"),
        ({"standardize": False}, "standardize was True, is False"),
        ({"validation": draws(9)}, r"validation was 0.1, is '\(9, 2\)"),
        ({"schedule": "constant"}, "schedule was 'cosine', is 'constant'"),
        ({"data": draws(199)}, r"data was '\(200, 2\).*, is '\(199, 2\)"),
        ({"data": draws(200, seed=1)}, r"data was .*digest"),
        ({"model": network()}, "model was 'Gaussian .*, is 'Flow"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_runs_checkpoint_is_refused(tmp_path, change, message):
    quick(Gaussian(), draws(), checkpoint=tmp_path / "state")
    change = dict(change)
    model, data = change.pop("model", Gaussian()), change.pop("data", draws())
    with pytest.raises(FileFormatError, match=f"belongs to another run .*{message}"):
        quick(model, data, checkpoint=tmp_path / "state", **change)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    quick(Gaussian(), draws(), checkpoint=tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("weights")
    from pyro_genmods.io import write_tensors

    write_tensors(tmp_path / "tensors", {"x": torch.zeros(2)}, {"kind": "something else"})
    for name, message in (("short", "short"), ("text", "text"), ("tensors", "not a training checkpoint")):
        with pytest.raises(FileFormatError, match=message):
            quick(Gaussian(), draws(), checkpoint=tmp_path / name)


# -- devices, precision, processes ------------------------------------------------------------------------------------


def test_the_model_comes_back_where_it_was(device):
    model = network().to(device)
    quick(model, draws())
    assert {p.device.type for p in model.parameters()} == {device.type} and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_may_be_off():
    with torch.no_grad():
        history = quick(network(), draws())
        assert not torch.is_grad_enabled()
    assert history.best_epoch > 0


def test_mixed_precision():
    full, mixed = network(), network()
    a, b = quick(full, draws(500)), quick(mixed, draws(500), precision="bf16-mixed")
    assert not same_weights(weights(full), weights(mixed))
    assert b.best_loss == pytest.approx(a.best_loss, abs=0.05)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


class Interrupted(gm.Flow):
    """A flow whose training is interrupted at one call."""

    calls, last = 0, None

    def loss(self, x, context=None):
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return super().loss(x, context)


def half_precision():
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # too large: the first steps overflow and are skipped
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}  # Lightning names it on GPUs alone


def test_the_loss_scaler_finds_its_scale_and_is_resumed(tmp_path):
    def run(last=None, **kwargs):
        model = Interrupted(network().flow)
        model.last = last
        return model, quick(model, draws(), max_epochs=8, **half_precision(), **kwargs)

    options = half_precision()
    history = quick(network(), draws(), max_epochs=8, **options)
    assert history.stopped == "max_epochs=8 reached" and history.best_epoch > 0
    assert options["plugins"][0].scaler.get_scale() < 2.0**30, "no overflow: the test has not seen the scaler at work"
    whole, _ = run()
    _, interrupted = run(18, checkpoint=tmp_path / "state")
    parts, resumed = run(checkpoint=tmp_path / "state")
    assert interrupted.stopped == "interrupted" and resumed.resumed == [4]
    assert same_weights(weights(whole), weights(parts))
    spoilt = Gaussian()
    spoilt.spoil = at_call(3, ACCIDENTS["nan loss"][0])
    with pytest.warns(RuntimeWarning, match="non-finite loss"):
        quick(spoilt, draws(), **half_precision())


DISTRIBUTED = """
    import torch
    import pyro_genmods as gm
    from pyro_genmods.training import fit
    from zuko import flows

    def run(**options):
        torch.manual_seed(0)
        x = torch.randn(320, 2).cumsum(-1)
        model = gm.Flow(flows.MAF(2, transforms=1, hidden_features=(8,)))
        history = fit(model, x, batch_size=32, max_epochs=3, seed=2, validation=0.2, progress_bar=False, **options)
        with torch.no_grad():
            return history.train_loss + history.validation_loss + [float(model.loss(x).mean())]

    if __name__ == "__main__":
        print(run())
        print(run(devices=2, strategy="ddp_spawn"))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=tmp_path)
    one, two = (eval(line) for line in ran.stdout.splitlines() if line.startswith("["))
    assert one == pytest.approx(two, abs=1e-5) and len(one) == 7
    assert os.listdir(tmp_path) == ["script.py"]


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_silence_and_no_litter(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(network(), draws())
    assert os.listdir(tmp_path) == [] and capfd.readouterr() == ("", "")


def test_progress_bar(capfd):
    history = quick(network(), draws(), progress_bar=True)
    bar = capfd.readouterr().err
    assert "epoch 4/4 |████████| " in bar
    for text in (
        f"train {history.train_loss[-1]:.4f}",
        f"validation {history.validation_loss[-1]:.4f}",
        "nats/dim lr ",
    ):
        assert text in bar
    assert f"best {history.best_loss:.4f} ({history.best_epoch})" in bar


def test_history():
    history = quick(network(), draws())
    assert history.epochs == len(history.validation_loss) == len(history.seconds) == len(history.learning_rate) == 4
    assert repr(history).startswith("TrainingHistory(4 epochs in ")
    assert f"best {history.best_loss:.4f} nats/dim at epoch {history.best_epoch}, stopped: max_epochs=4" in repr(
        history
    )
    assert TrainingHistory(**history.to_dict()) == history


def test_history_plot(tmp_path):
    mpl.use("agg")
    import matplotlib.pyplot as plt

    losses = [50.0, *(1 + 0.5**e for e in range(29))]
    history = TrainingHistory(losses, [loss + 0.1 for loss in losses], best_epoch=30, best_loss=1.1, stopped="at last")
    ax = history.plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["training", "validation", "best: 1.1 at epoch 30"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss (nats per dimension)")
    assert ax.get_yscale() == "linear" and ax.get_ylim()[1] < 3, "the plunge must not flatten the rest"
    assert list(ax.lines[1].get_ydata()) == history.validation_loss
    ax.figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 5_000
    _, mine = plt.subplots()
    assert TrainingHistory([1.0], [], [1e-3], [0.1], 1, 1.0).plot(mine) is mine
    plt.close("all")


def test_the_model_can_be_copied_afterwards():
    model = network()
    quick(model, draws())
    twin = copy.deepcopy(model)
    assert torch.equal(twin().log_prob(draws(5)), model().log_prob(draws(5)))
