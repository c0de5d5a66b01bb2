"""Adversarial models and corrected priors: the game, what it reaches, and what the critic is good for."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pyro_genmods as gm
from benchmarks import adversarial as benchmark
from pyro_genmods.foundation.errors import DensityError, ShapeError
from pyro_genmods.foundation.networks import MLP, spectral_bound
from pyro_genmods.foundation.objectives import energy_score, gradient_penalty, logistic_contrast
from pyro_genmods.transform import Adversarial, Corrected, Pushforward

from .linear_gaussian import DOUBLE, assert_chain, chain, measured, noisy, plated
from .statistics import assert_law, assert_mean
from .test_pushforward import linear, noise_posterior

QUICK = {"batch_size": 256, "progress_bar": False, "patience": None, "validation": 0.2, "seed": 0}


def small(context: int = 0, **options) -> Adversarial:
    """A model of two features whose players have eight hidden units."""
    return Adversarial(2, 2, context, hidden_features=(8,), critic_features=(8,), **options)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def wasserstein(x: Tensor, mean: float, sd: float) -> float:
    """W1 of a sample ``(n,)`` to a normal law: the mean distance of sorted draws to its quantiles."""
    n = len(x)
    quantiles = stats.norm.ppf((torch.arange(n, dtype=DOUBLE) + 0.5) / n, mean, sd)
    return float((x.detach().double().sort().values - torch.as_tensor(quantiles)).abs().mean())


# -- objectives -------------------------------------------------------------------------------------------------------


def test_the_energy_score_of_a_normal_law_is_the_closed_form():
    r"""``s (w (2 Phi(w) - 1) + 2 phi(w) - 1 / sqrt(pi))`` with ``w = (x - m) / s``."""
    model, x, (m, s) = linear(1, 1, sd=0.7), 1.3, (0.4, 0.7)
    model.generator.bias.data.fill_(m)
    w = (x - m) / s
    truth = s * (w * (2 * stats.norm.cdf(w) - 1) + 2 * stats.norm.pdf(w) - 1 / math.sqrt(math.pi))
    for training in (True, False):
        scores = model.train(training).loss(torch.full((40000, 1), x, dtype=DOUBLE))
        assert_mean(scores, truth, name=f"energy score, training {training}")


def test_the_energy_score_is_strictly_proper():
    """Its mean over data is least at the law of the data; the gradient of the mean and the spread vanishes there."""
    x = torch.randn(200_000, 1, dtype=DOUBLE)
    shift = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    scale = torch.ones((), dtype=DOUBLE, requires_grad=True)
    scores = energy_score(x, shift + scale * torch.randn(2, len(x), 1, dtype=DOUBLE))
    here = torch.autograd.grad(scores.mean(), (shift, scale))
    assert max(abs(float(g)) for g in here) < 0.01
    for other in ((0.3, 1.0), (0.0, 0.7), (0.0, 1.4)):
        apart = energy_score(x, other[0] + other[1] * torch.randn(2, len(x), 1, dtype=DOUBLE)).mean()
        assert apart > scores.mean() + 0.005


def test_the_gradient_penalty_is_that_of_a_known_slope():
    real, fake, mix = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 1)
    between = mix * real + (1 - mix) * fake
    penalty = gradient_penalty(lambda y: 0.5 * y.square().sum(-1), real, fake, mix)
    assert torch.allclose(penalty, (between.norm(dim=-1) - 1).square(), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(gradient_penalty(lambda y: 2 * y[:, 0], real, fake, mix), torch.ones(5))


def test_the_logistic_contrast_is_least_at_the_log_ratio():
    """For two laws on two points the minimiser is the logarithm of the ratio of their weights."""
    p, q = torch.tensor([0.2, 0.8], dtype=DOUBLE), torch.tensor([0.5, 0.5], dtype=DOUBLE)
    r = (p / q).log().requires_grad_()
    nothing = torch.full_like(r, -math.inf)
    expected = (p * logistic_contrast(r, nothing) + q * logistic_contrast(-nothing, r)).sum()
    assert torch.autograd.grad(expected, r)[0].abs().max() < 1e-12
    draws = torch.randint(2, (2, 5))  # of the second law, five for each datum
    odds = torch.sigmoid(r - math.log(5)).detach()
    loss = logistic_contrast(r.detach(), r.detach()[draws])
    assert torch.allclose(loss, -odds.log() - (1 - odds[draws]).log().sum(1))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 128), (128, 128)])
def test_the_spectral_bound_bounds_and_is_tight(shape):
    for scale in (1e-3, 1.0, 1e4):
        matrix = scale * torch.randn(shape)
        norm = torch.linalg.matrix_norm(matrix, 2)
        assert norm * (1 - 1e-5) <= spectral_bound(matrix) <= 1.02 * norm
    assert spectral_bound(torch.zeros(shape)).isfinite()


def test_the_spectral_critic_has_a_slope_of_at_most_one():
    model = small(1, lipschitz="spectral")
    with torch.no_grad():
        for parameter in model.critic.parameters():
            parameter.mul_(50)
    x, c = (torch.randn(500, 2) * 3).requires_grad_(), torch.randn(500, 1)
    for training in (True, False):
        (slope,) = torch.autograd.grad(model.train(training).critic(x, c).sum(), x)
        assert slope.norm(dim=-1).max() <= 1 + 1e-5
    for network in (model.generator, small(1).critic):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(50)
    (slope,) = torch.autograd.grad(network(x, c).sum(), x)
    assert slope.norm(dim=-1).max() > 10, "the test could not fail"


# -- the game ---------------------------------------------------------------------------------------------------------


def test_the_generator_moves_at_every_third_call_and_the_critic_at_every_one():
    model, x = small(critic_steps=3), torch.randn(16, 2)
    for call in range(1, 8):
        model.zero_grad(set_to_none=True)
        model.loss(x).mean().backward()
        assert all(g is not None for g in gradients(model.critic))
        assert all((g is not None) == (call % 3 == 0) for g in gradients(model.generator)), call
    assert int(model.turn) == 7


def test_each_player_learns_from_its_own_term_alone():
    x = torch.randn(64, 2)
    taken = {}
    for steps in (1, 2):  # with and without the generator's move, from the same noise
        torch.manual_seed(3)
        model = small(critic_steps=steps)
        torch.manual_seed(4)
        model.loss(x).mean().backward()
        taken[steps] = gradients(model.critic)
        taken[-steps] = gradients(model.generator)
    alone = taken[-1]
    assert all(torch.equal(a, b) for a, b in zip(taken[1], taken[2], strict=True))
    torch.manual_seed(3)
    model = small()
    torch.manual_seed(4)
    expected = torch.autograd.grad(-model.critic(model().rsample((64,))).mean(), list(model.generator.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, expected, strict=True))


def test_the_value_of_the_loss_is_the_energy_score_in_both_modes():
    model, x = small(1), torch.randn(20000, 2)
    c = torch.randn(20000, 1)
    with torch.no_grad():
        before = model.train().loss(x, c), model.eval().loss(x, c)
    assert before[0].mean() == pytest.approx(float(before[1].mean()), abs=0.02)
    assert not before[0].requires_grad
    model.train().loss(x[:8], c[:8]).mean().backward()  # one turn without a move, as counted
    assert int(model.turn) == 2


def test_adam_takes_the_decays_of_the_model(monkeypatch):
    seen, adam = [], torch.optim.AdamW

    def spy(*args, **kwargs):
        seen.append(kwargs["betas"])
        return adam(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    for model in (small(), linear(2, 2, dtype=torch.float32)):
        gm.fit(model, torch.randn(50, 2), max_epochs=1, **QUICK)
    assert seen == [(0.0, 0.9), (0.9, 0.999)]


def test_the_unit_is_on_the_bar_and_in_the_history(capsys):
    history = gm.fit(small(), torch.randn(50, 2), max_epochs=2, **{**QUICK, "progress_bar": True})
    assert "sd/dim lr " in capsys.readouterr().err
    assert "sd/dim at epoch" in repr(history) and history.plot().get_ylabel() == "loss (sd per dimension)"
    old = {name: value for name, value in history.to_dict().items() if name != "unit"}
    assert gm.TrainingHistory(**old).unit == "nats"


def interrupted(model: nn.Module, at: int) -> nn.Module:
    """The model, whose loss interrupts the run at a call."""
    loss, calls = model.loss, []

    def count(*args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return loss(*args)

    object.__setattr__(model, "loss", count)
    return model


def test_an_interrupted_game_goes_on_bit_for_bit(tmp_path):
    x = torch.randn(300, 2)
    run = {**QUICK, "batch_size": 32, "max_epochs": 5, "ema": 0.9}
    torch.manual_seed(0)
    model = small(critic_steps=3)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = gm.fit(model, x, **run)
    for at in (20, 14, None):  # in the second epoch, and later, at calls that are no multiple of three
        again = small(critic_steps=3)
        again.load_state_dict(start)
        if at:
            interrupted(again, at)
        parts = gm.fit(again, x, checkpoint=tmp_path / "run", **run)
        start = {name: torch.zeros_like(value) for name, value in start.items()}
    assert parts.resumed and parts.validation_loss == whole.validation_loss and parts.unit == "sd"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_validation_needs_no_critic_and_the_last_epoch_is_kept():
    """The energy score of a generator that is right; it cannot choose among late epochs, so that the last is kept."""
    model = Adversarial(1, 1, generator=nn.Linear(1, 1), critic_features=(8,))
    history = gm.fit(model, torch.randn(400, 1), max_epochs=4, **QUICK)
    assert len(history.validation_loss) == 4 and history.validation_loss[-1] == history.best_loss
    assert history.last and history.best_epoch == 4 and "last" in repr(history)
    assert 0.1 < history.best_loss < 1.0  # of a law on itself: 1 / sqrt(pi)


# -- what the game reaches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "lipschitz"), [(1.5, "penalty"), (-1.0, "spectral")])
def test_the_critic_finds_the_distance_of_two_normal_laws(m, lipschitz):
    """W1(N(0, 1), N(m, 1)) = |m|, with the generator held and a loop of one's own."""
    model = Adversarial(1, 1, generator=nn.Linear(1, 1), critic_features=(32, 32), lipschitz=lipschitz, penalty=10.0)
    with torch.no_grad():
        model.generator.weight.fill_(1.0)
        model.generator.bias.fill_(0.0)
    model.generator.requires_grad_(False)
    optimizer = torch.optim.Adam(model.critic.parameters(), 5e-3, betas=model.betas)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        optimizer.zero_grad()
        model.loss(m + torch.randn(256, 1)).mean().backward()
        optimizer.step()
    found = model.critic_distance(m + torch.randn(50_000, 1)).mean().item()
    assert found == pytest.approx(abs(m), rel=0.1)


@pytest.mark.parametrize("kind", [pytest.param("game", marks=pytest.mark.slow), "energy score"])
def test_a_linear_generator_reaches_a_normal_law(kind):
    """W1 of the marginals, and of two oblique projections, below 0.05 standard deviations."""
    torch.manual_seed(1)
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    x = torch.tensor([3.0, -2.0]) + torch.randn(20000, 2) @ factor.mT
    generator = nn.Linear(2, 2)
    if kind == "game":
        model = Adversarial(2, 2, generator=generator, critic_features=(64, 64), penalty=1.0)
        rate, epochs = 2e-3, 20
    else:
        model, rate, epochs = Pushforward(generator, 2), 1e-2, 8
    gm.fit(model, x, max_epochs=epochs, learning_rate=rate, ema=0.99, **{**QUICK, "batch_size": 128})
    draws = model().sample((40000,))
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.6, -0.8]]):
        mean = float(torch.tensor([3.0, -2.0]) @ direction)
        sd = float((factor.mT @ direction).norm())
        assert wasserstein(draws @ direction, mean, sd) < 0.05, f"{kind}, {direction.tolist()}"


@pytest.fixture(scope="module")
def twenty_five() -> Adversarial:
    """Defaults of the class and the recipe of the benchmark: five minutes."""
    return benchmark.train()


@pytest.mark.slow
def test_twenty_five_modes(twenty_five):
    """At least 24 modes, at least 95 % of the draws within four standard deviations of one."""
    quality = benchmark.Quality.of(twenty_five().sample((20000,)))
    assert quality.covered >= 24 and quality.good >= 0.95, quality


@pytest.mark.slow
def test_the_correction_improves_the_weights_of_the_modes(twenty_five):
    """A generator of twenty-five equal modes, data in which they are not: the weights follow the data."""
    wanted = torch.linspace(1.0, 4.0, 25)
    corrected = Corrected(twenty_five)
    gm.fit(corrected, benchmark.modes(20000, wanted), max_epochs=20, **{**benchmark.QUIET, "seed": 0})
    before, after = (benchmark.Quality.of(law().sample((4000,)), wanted) for law in (twenty_five, corrected))
    assert after.distance < 0.5 * before.distance and after.good > before.good - 0.02, f"{before}; {after}"


# -- corrected priors -------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """The critic ``a . y``, or ``a . y + b c``."""

    def __init__(self, slope: list[float]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=DOUBLE))

    def forward(self, *rows: Tensor) -> Tensor:
        return torch.cat(rows, -1) @ self.slope


def tilted(scale: float = 0.8, latent: int = 2, **options) -> tuple[Corrected, Tensor]:
    """A linear generator tilted by a linear critic, whose noise is ``N(s W^T a, I)``; and that mean."""
    model, slope = linear(latent, 3), [0.9, -0.5, 0.7]
    corrected = Corrected(model, Linear(slope), scale=scale, **options)
    return corrected, scale * model.generator.weight.detach().mT @ torch.tensor(slope, dtype=DOUBLE)


def test_the_noise_of_a_linear_tilt_is_a_shifted_normal_law():
    corrected, mean = tilted()
    base = corrected().base
    truth = dist.Normal(mean, 1.0).to_event(1)
    z = torch.randn(7, 2, dtype=DOUBLE)
    gap = base.log_prob(z) - truth.log_prob(z)
    assert (gap - gap[0]).abs().max() < 1e-10
    for moves in ({}, {"leapfrogs": 0, "transitions": 60}, {"candidates": 0, "transitions": 60}):  # each alone, too
        draws = tilted(**moves)[0]().base.sample((4000,))
        assert_law(draws - mean, dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0).cdf, f"tilted noise {moves}")
    x = corrected().sample((4000,))
    assert_mean(x, corrected().push(mean), name="values")


def test_draws_are_repeatable_independent_and_conditional():
    corrected, _ = tilted()
    torch.manual_seed(5)
    first = corrected().sample((300,))
    torch.manual_seed(5)
    assert torch.equal(first, corrected().sample((300,))) and len(first.unique(dim=0)) == 300
    generator = MLP(2, 1, (), linear=nn.Linear).double()
    model = Pushforward(generator, 1, 1)
    corrected = Corrected(model, Linear([0.6, 0.3]))
    with torch.no_grad():
        weight = float(generator[0].weight[0, 0])
    contexts = torch.tensor([[-1.0], [2.0]], dtype=DOUBLE)
    draws = corrected(contexts).base.sample((4000,))
    assert draws.shape == (4000, 2, 1)
    assert_law(draws[..., 0] - 0.6 * weight, dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0).cdf, "conditional noise")
    value = corrected(contexts).base.log_prob(torch.zeros(2, 1, dtype=DOUBLE))
    shift = float((value[1] - value[0]).detach())
    bias = float(generator[0].weight.detach()[0, 1])
    assert shift == pytest.approx(0.6 * 3 * bias + 0.3 * 3, rel=1e-9)


def test_a_context_that_is_inferred_is_refused():
    corrected = Corrected(Pushforward(MLP(2, 1, ()), 1, 1))

    def model() -> None:
        c = pyro.sample("c", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", corrected(c))

    with pytest.raises(DensityError, match="context: it is being inferred"):
        gm.infer.potential(noisy(model)).grad(torch.zeros(1, 2))
    with pytest.raises(DensityError, match="depends on the context"):
        corrected.base_distribution()


@pytest.mark.parametrize(
    "engine", [pytest.param("pyro", marks=pytest.mark.slow), "ours", pytest.param("smc", marks=pytest.mark.slow)]
)
def test_the_corrected_posterior_of_a_linear_generator(engine):
    """``z ~ N(m, I)``, ``y = W z + b + noise``: the posterior of the shifted prior."""
    corrected, prior_mean = tilted()
    weight, bias = corrected.pushforward.generator.weight.detach(), corrected.pushforward.generator.bias.detach()
    noise, generator = 0.8, torch.Generator().manual_seed(3)
    y = (prior_mean + torch.randn(12, 2, generator=generator, dtype=DOUBLE)) @ weight.mT + bias
    y = y + noise * torch.randn(12, 3, generator=generator, dtype=DOUBLE)
    gap, covariance = noise_posterior(weight, bias + weight @ prior_mean, y, noise)
    program = noisy(plated(measured(corrected, noise)))
    if engine == "pyro":
        draws = chain(program, y, draws=250)["x_base"]
    elif engine == "ours":
        kernel = gm.infer.HMC(program)
        mcmc = gm.infer.MCMC(kernel, num_samples=60, num_chains=16, progress_bar=False, seed=0)
        mcmc.run(y)
        draws = mcmc.get_samples(group_by_chain=False)["x_base"]
        assert_mean((draws - prior_mean - gap)[::5].mean(1), torch.zeros(2), name="means")
        assert ((draws.std(0) / covariance.diagonal().sqrt() - 1).abs() < 0.2).all()
        return
    else:
        smc = gm.infer.SMC(noisy(measured(corrected, noise)), num_particles=500, progress_bar=False, seed=0)
        smc.run(y[0])
        draws = smc.get_samples()["x_base"]
        assert_mean(draws, prior_mean + gap[0], standard_error=3 * (covariance.diagonal() / len(draws)).sqrt())
        marginal = dist.MultivariateNormal(
            bias + weight @ prior_mean, weight @ weight.mT + noise**2 * torch.eye(3, dtype=DOUBLE)
        )
        assert smc.log_evidence == pytest.approx(float(marginal.log_prob(y[0])), abs=0.2)
        return
    assert_chain(draws, prior_mean + gap, covariance, tolerance=0.08)


@pytest.mark.slow
def test_a_trained_correction_turns_the_generator_into_the_law_of_the_data():
    """Noise N(0, 1), data N(0.7, 0.8^2): the correction reaches them though the generator does not move."""
    torch.manual_seed(0)
    generator = nn.Linear(1, 1)
    with torch.no_grad():
        generator.weight.fill_(1.0)
        generator.bias.fill_(0.0)
    model = Pushforward(generator, 1)
    corrected = Corrected(model)
    before = corrected().sample((3000,))
    x = 0.7 + 0.8 * torch.randn(8000, 1)
    history = gm.fit(corrected, x, max_epochs=15, **QUICK)
    after = corrected().sample((3000,))
    distance = [wasserstein(draws[:, 0], 0.7, 0.8) for draws in (before, after)]
    assert distance[0] > 0.6 and distance[1] < 0.1, distance
    assert history.unit == "nats" and torch.equal(corrected.pushforward.generator.weight, generator.weight)
    # the critic is the log density ratio, constant included
    grid = torch.linspace(-1, 2, 7)[:, None]
    ratio = dist.Normal(0.7, 0.8).log_prob(grid) - dist.Normal(0.0, 1.0).log_prob(grid)
    odds = corrected.tilt_rows(grid, None) + corrected.offset
    assert (odds - ratio[:, 0]).abs().max() < 0.2


def test_the_copy_of_a_corrected_model_is_its_own():
    """The original may go on learning: neither generator nor critic of the correction moves with it."""
    model = small()
    corrected = model.corrected(scale=0.3)
    assert corrected.scale == 0.3 and not any(p.requires_grad for p in corrected.pushforward.parameters())
    assert all(p.requires_grad for p in model.parameters())
    z = torch.randn(4, 2)
    before = corrected().push(z), corrected().base.log_prob(z)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(before[0], corrected().push(z)) and torch.equal(before[1], corrected().base.log_prob(z))
    corrected.train()
    assert corrected.critic.training and not corrected.pushforward.training
    corrected.standardize(torch.randn(50, 2) * 9)
    assert torch.equal(before[0], corrected().push(z)), "the units are the generator's"


# -- files and refusals -----------------------------------------------------------------------------------------------


def test_saved_models_come_back(tmp_path):
    x, c = torch.randn(200, 2), torch.randn(200, 1)
    model = small(1, lipschitz="spectral", critic_steps=2)
    gm.fit(model, x * 4, c, max_epochs=2, **QUICK)
    corrected = model.corrected(0.7)
    gm.fit(corrected, x, c, max_epochs=1, **QUICK)
    for name, original in {"model": model, "corrected": corrected, "double": model.corrected().double()}.items():
        path = Path(tmp_path) / name
        gm.save(original, path)
        loaded = gm.load(path)
        assert type(loaded) is type(original)
        context = c[:5].to(original.place[0])
        z = torch.randn(5, 2, dtype=original.place[0])
        assert torch.equal(loaded(context).push(z), original(context).push(z))
        assert torch.equal(loaded(context).base.log_prob(z), original(context).base.log_prob(z))
        torch.manual_seed(1)
        draws = loaded(context).sample((3,))
        torch.manual_seed(1)
        assert torch.equal(draws, original(context).sample((3,)))
        flags = [p.requires_grad for p in loaded.parameters()]
        assert flags == [p.requires_grad for p in original.parameters()]
    assert int(gm.load(Path(tmp_path) / "model").turn) == int(model.turn) > 0


def test_double_precision():
    x = torch.randn(100, 2, dtype=DOUBLE)
    model = small().double()
    gm.fit(model, x, max_epochs=2, **QUICK)
    corrected = model.corrected()
    gm.fit(corrected, x, max_epochs=1, **QUICK)
    assert model().sample().dtype is corrected().sample().dtype is corrected().base.log_prob(x).dtype is DOUBLE


def test_an_invertible_adversarial_generator_has_its_density():
    model = Adversarial(2, 2, generator=nn.Linear(2, 2), density="manifold")
    x, log_prob = model().rsample_and_log_prob((5,))
    truth = dist.MultivariateNormal(model.generator.bias, model.generator.weight @ model.generator.weight.mT)
    assert model.density is gm.Density.EXACT
    assert torch.allclose(log_prob, truth.log_prob(x), atol=1e-3)
    assert torch.allclose(model().log_prob(x), log_prob, atol=1e-3)


REFUSED = {
    "lipschitz": (lambda: small(lipschitz="clip"), (ValueError, TypeError), "lipschitz"),
    "penalty": (lambda: small(penalty=-1.0), ValueError, "penalty, critic_steps"),
    "critic steps": (lambda: small(critic_steps=0), ValueError, "penalty, critic_steps"),
    "no features": (lambda: Adversarial(0, 2), ShapeError, "features, latent_features: got 0"),
    "no noise": (lambda: Adversarial(2, 0), ShapeError, "features, latent_features"),
    "features": (lambda: Adversarial(3, 2, generator=nn.Linear(2, 2)), ShapeError, "features: got 3"),
    "critic": (lambda: Adversarial(2, 2, critic=nn.Linear(5, 1)), ShapeError, "critic: Linear does not take rows"),
    "outputs": (lambda: Adversarial(2, 2, critic=nn.Linear(2, 2)), ShapeError, "needs one number each"),
    "no module": (lambda: Adversarial(2, 2, critic=lambda y: y.sum(-1)), TypeError, "critic"),
    "density": (lambda: Adversarial(2, 3, density="manifold"), ShapeError, "more noise than coordinates"),
    "event": (lambda: Adversarial(4, 2, event_shape=(3,)), ShapeError, r"event_shape \(3,\)"),
    "corrected": (lambda: Corrected(nn.Linear(2, 2)), TypeError, "model"),
    "transitions": (lambda: Corrected(small(), transitions=-1), ValueError, "transitions, candidates"),
    "another critic": (lambda: Corrected(small(), nn.Linear(7, 1)), ShapeError, "critic"),
    "log_prob": (lambda: small()().log_prob(torch.zeros(2)), DensityError, "PushforwardReparam"),
    "corrected log_prob": (lambda: small().corrected()().log_prob(torch.zeros(2)), DensityError, "PushforwardReparam"),
    "rsample": (lambda: small().corrected()().rsample(), DensityError, "no pathwise gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_within_a_second(name):
    action, error, message = REFUSED[name]
    start = time.perf_counter()
    with pytest.raises(error, match=message):
        action()
    assert time.perf_counter() - start < 1
