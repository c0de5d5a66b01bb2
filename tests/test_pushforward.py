"""Generators as priors: closed forms of linear ones, densities on curves, preimages, refusals."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods.foundation.errors import DensityError, InverseError, ShapeError
from pyro_genmods.foundation.networks import MLP
from pyro_genmods.transform import Pushforward
from pyro_genmods.transform.preimage import log_gram, value_and_jacobian

from .laws import Residual
from .linear_gaussian import DOUBLE, assert_chain, chain, measured, noisy, plated
from .statistics import assert_mean


def linear(latent: int, features: int, sd: float | None = None, dtype: torch.dtype = DOUBLE, **options) -> Pushforward:
    """``x = W z + b`` with fixed random weights, or ``x = sd z``."""
    generator, drawn = nn.Linear(latent, features), torch.Generator().manual_seed(latent + 10 * features)
    with torch.no_grad():
        generator.weight.copy_(torch.randn(features, latent, generator=drawn))
        generator.bias.copy_(torch.randn(features, generator=drawn))
        if sd is not None:
            generator.weight.copy_(sd * torch.eye(features, latent))
            generator.bias.zero_()
    return Pushforward(generator, latent, **options).to(dtype)


def noise_posterior(weight: Tensor, bias: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Means ``(*, k)`` and covariance of ``z ~ N(0, I)`` given ``y = W z + b + noise``."""
    precision = torch.eye(weight.shape[1], dtype=DOUBLE) + weight.mT @ weight / noise**2
    return (y - bias) @ weight / noise**2 @ precision.inverse(), precision.inverse()


class Curve(nn.Module):
    """An injective curve in three dimensions, ``(z, z^2, sin z)``, stretched by the context."""

    def __init__(self) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(1.0))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        curve = torch.cat([z, self.bend * z.square(), z.sin()], -1)
        return curve if c is None else curve * c.exp()


class Elementwise(nn.Module):
    """A function of every column of noise, found by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, z: Tensor) -> Tensor:
        return {"square": z.square(), "zero": 0 * z, "first": z[:, :1].expand_as(z), "nan": z / 0 + z / 0}[self.name]


# -- densities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent", "features"), [(1, 3), (2, 3), (2, 5), (3, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_linear_generator_has_the_closed_form(latent, features, dtype):
    """``log N(z; 0, I) - logdet(W^T W) / 2`` at ``z = pinv(W) (x - b)``; units stretch the surface."""
    model = linear(latent, features, density="manifold", dtype=dtype)
    tolerance = 1e-6 if dtype is DOUBLE else 2e-3
    for standardized in (False, True):
        if standardized:
            model.standardize(torch.randn(200, features, dtype=dtype) * torch.arange(1, features + 1) + 3)
        scale = model.coordinates.standardization.scale
        weight = scale[:, None] * model.generator.weight
        bias = model.coordinates.standardization.shift + scale * model.generator.bias
        d = model()
        x, joint = d.rsample_and_log_prob((50,))
        z = (x - bias) @ torch.linalg.pinv(weight).mT
        truth = dist.Normal(torch.zeros((), dtype=dtype), 1.0).log_prob(z).sum(-1)
        truth = truth - 0.5 * torch.logdet(weight.mT @ weight)
        assert torch.allclose(d.pull(x), z, atol=tolerance)
        assert torch.allclose(d.log_prob(x), truth, atol=tolerance) and torch.allclose(joint, truth, atol=tolerance)


def test_a_support_bends_the_surface():
    """``x = exp(W z + b)``: the Jacobian of the whole map counts, not that of the coordinates."""
    model = linear(2, 3, density="manifold", support=constraints.positive)
    d, (weight, bias) = model(), (model.generator.weight, model.generator.bias)
    x = d.sample((20,))
    z = (x.log() - bias) @ torch.linalg.pinv(weight).mT
    jacobian = x[..., None] * weight
    truth = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - 0.5 * torch.logdet(jacobian.mT @ jacobian)
    assert torch.allclose(d.log_prob(x), truth, atol=1e-8)
    assert torch.allclose(d.push_and_log_prob(z)[1], truth, atol=1e-8)


def test_the_density_on_a_curve_integrates_to_one_over_its_length():
    model = Pushforward(Curve(), 1, density="manifold").double()
    with torch.no_grad():
        x = model().push(torch.linspace(-6, 6, 4001, dtype=DOUBLE)[:, None])
        middle = model().push(torch.linspace(-6, 6, 4001, dtype=DOUBLE).unfold(0, 2, 1).mean(1)[:, None])
        lengths = x.diff(dim=0).norm(dim=-1)
        assert float((model().log_prob(middle).exp() * lengths).sum()) == pytest.approx(1, abs=1e-5)


def test_values_off_the_manifold_have_density_zero_and_no_noise():
    for dtype in (torch.float32, DOUBLE):
        d = Pushforward(Curve(), 1, density="manifold").to(dtype)()
        x = d.sample((40,))
        off = x + torch.tensor([0.0, 0.0, 0.05], dtype=dtype)
        assert d.log_prob(x).isfinite().all() and d.pull(x).isfinite().all()
        assert (d.log_prob(off) == -math.inf).all() and d.pull(off).isnan().all()
        mixed = torch.stack([x[0], off[0]])
        assert torch.equal(d.log_prob(mixed).isfinite(), torch.tensor([True, False]))


@pytest.mark.parametrize("shape", ["curve", "square"])
def test_gradients_of_densities_equal_finite_differences(shape):
    """With respect to value, context and parameters; on a curve, along it."""
    generator, k, context = (Curve(), 1, 3) if shape == "curve" else (Residual(2, 2), 2, 2)
    model = Pushforward(generator, k, context, density="manifold").double()
    z = torch.randn(5, k, dtype=DOUBLE)
    c = torch.randn(5, context, dtype=DOUBLE)
    inputs = [z, c, *model.parameters()]
    fixed = model(c).push(z).detach()

    def outcome() -> Tensor:
        d = model(c)
        value = d.push(z)
        if shape == "square":  # where a value stays in the image whatever the generator does
            return d.log_prob(value).sum() + d.log_prob(fixed).sin().sum() + d.pull(fixed).cos().sum()
        return d.log_prob(value).sum() + d.pull(value).cos().sum()

    for tensor in inputs:
        tensor.requires_grad_()
    gradients = torch.autograd.grad(outcome(), inputs)
    directions = [torch.randn_like(tensor) for tensor in inputs]
    ends, h = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for tensor, direction in zip(inputs, directions, strict=True):
                tensor.add_(sign * h * direction)
            ends.append(float(outcome()))
    slope = (ends[0] - ends[1]) / (2 * h)
    predicted = sum(float((g * v).sum()) for g, v in zip(gradients, directions, strict=True))
    assert predicted == pytest.approx(slope, rel=1e-6, abs=1e-6)
    assert all(g.abs().sum() > 0 for g in gradients)


def test_the_jacobian_is_autograd_s():
    network, z = MLP(3, 5, (8,)).double(), torch.randn(4, 3, dtype=DOUBLE)
    y, jacobian = value_and_jacobian(network, z)
    truth = torch.stack([torch.autograd.functional.jacobian(network, row[None])[0, :, 0] for row in z])
    assert torch.allclose(y, network(z)) and torch.allclose(jacobian, truth)
    assert torch.allclose(log_gram(truth), 0.5 * torch.logdet(truth.mT @ truth))
    square = truth[:, :3]
    assert torch.allclose(log_gram(square), torch.linalg.slogdet(square).logabsdet)


def test_preimages_are_found_far_out_and_under_vmap():
    model = Pushforward(Residual(4), 4, density="manifold").double()
    z = 8 * torch.randn(200, 4, dtype=DOUBLE)
    d = model()
    x = d.push(z).detach()
    assert torch.allclose(d.pull(x), z, atol=1e-9)
    assert torch.allclose(torch.vmap(d.log_prob)(x), d.log_prob(x), atol=1e-9)
    per_row = torch.vmap(torch.func.grad(d.log_prob))(x)
    assert torch.allclose(per_row, d.score(x), atol=1e-9)


# -- as a prior -------------------------------------------------------------------------------------------------------


def test_any_module_is_a_prior_with_nothing_else():
    """Images from a network of transposed convolutions, in eval mode, with the statistics that it has."""
    generator = nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 6, 4), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 1, 1)
    )
    generator(torch.randn(64, 4))
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    model = Pushforward(generator, 4)
    assert generator.training and generator[2].training
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    model.freeze()
    d = model()
    assert d.event_shape == (1, 4, 4) and d.sample((3, 2)).shape == (3, 2, 1, 4, 4)
    z = torch.randn(5, 4)
    assert torch.equal(d.push(z), generator(z))


@pytest.mark.parametrize("shape", [(2, 4), (3, 2)], ids=["injective", "more noise than data"])
@pytest.mark.parametrize("engine", [pytest.param("pyro", marks=pytest.mark.slow), "ours", "smc"])
def test_the_posterior_of_a_linear_generator(shape, engine):
    model, noise = linear(*shape, dtype=torch.float32).freeze(), 0.9
    weight, bias = model.generator.weight.double(), model.generator.bias.double()
    copies = 100
    y = model().sample((copies,)) + noise * torch.randn(copies, shape[1])
    mean, covariance = noise_posterior(weight, bias, y.double(), noise)
    if engine == "pyro":
        draws = chain(noisy(plated(measured(model, noise))), y, draws=150, warmup=60)["x_base"]
        assert_chain(draws, mean, covariance)
    elif engine == "ours":
        mcmc = gm.infer.MCMC(
            gm.infer.HMC(noisy(plated(measured(model, noise)))), num_samples=40, num_chains=8, progress_bar=False
        )
        mcmc.run(y)
        draws = mcmc.get_samples(group_by_chain=True)["x_base"].transpose(0, 1).flatten(1, 2)
        assert_chain(draws, mean.repeat(8, 1), covariance)
    else:
        smc = gm.infer.SMC(
            noisy(measured(model, noise)), num_particles=1000, moves="elliptical", progress_bar=False, seed=0
        )
        smc.run(y[0])
        draws = smc.get_samples()["x_base"]
        assert_mean(draws, mean[0], standard_error=3 * (covariance.diagonal() / len(draws)).sqrt())
        evidence = dist.MultivariateNormal(bias, weight @ weight.mT + noise**2 * torch.eye(shape[1], dtype=DOUBLE))
        assert smc.log_evidence == pytest.approx(float(evidence.log_prob(y[0].double())), abs=0.15)


def test_the_traced_potential_is_the_formula():
    """The vmap road and the flat graph, for noise space and for the density of an invertible generator."""
    model = linear(2, 3, dtype=torch.float32).freeze()
    y = torch.tensor([0.3, -0.4, 1.0])
    energy = gm.infer.potential(noisy(measured(model, 0.5)), (y,))
    z = torch.randn(6, 2)
    truth = 0.5 * z.square().sum(-1) + math.log(2 * math.pi)
    truth = truth - dist.Normal(model().push(z), 0.5).log_prob(y).sum(-1)
    assert torch.allclose(energy.value(z), truth, atol=1e-4) and energy.report["road"] == "vmap"
    square = Pushforward(Residual(2), 2, density="manifold").freeze()
    energy = gm.infer.potential(measured(square, 0.5), (y[:2],), level="eager")
    x = torch.randn(6, 2)
    truth = -square().log_prob(x) - dist.Normal(x, 0.5).log_prob(y[:2]).sum(-1)
    value, gradient = energy.value_and_grad(x)
    x.requires_grad_()
    slope = torch.autograd.grad(-square().log_prob(x).sum() - dist.Normal(x, 0.5).log_prob(y[:2]).sum(), x)[0]
    assert torch.allclose(value, truth, atol=1e-3) and torch.allclose(gradient, slope, atol=1e-3)
    assert energy.report["road"] == "vmap"


class OfUsers(nn.Module):
    """A generator that only its user knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.inner, self.outer = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return self.outer(self.inner(torch.cat([z, c], -1)).tanh())


def test_a_generator_of_the_users_is_saved_and_loaded(tmp_path):
    c, z = torch.randn(5, 1), torch.randn(5, 2)
    for density in (None, "manifold"):
        model = Pushforward(OfUsers(6), 2, 1, density=density)
        gm.fit(model, torch.randn(100, 2), torch.randn(100, 1), max_epochs=1, seed=0, progress_bar=False)
        path = Path(tmp_path) / "model"
        gm.save(model, path)
        loaded = gm.load(path, allow=[OfUsers])
        assert torch.equal(loaded(c).push(z), model(c).push(z)) and loaded.density is model.density
        assert loaded.generator.width == 6


# -- refusals ---------------------------------------------------------------------------------------------------------


def manifold(generator: nn.Module, latent: int) -> gm.GenerativeDistribution:
    return Pushforward(generator, latent, density="manifold")()


def flat() -> nn.Module:
    """Rectifiers that are all off at the origin."""
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].bias.fill_(-100.0)
    return network


def latent_site_without_reparam() -> None:
    model = measured(linear(2, 3, dtype=torch.float32), 0.5)
    guide = pyro.infer.autoguide.AutoNormal(model)
    pyro.infer.SVI(model, guide, pyro.optim.Adam({}), pyro.infer.Trace_ELBO()).step(torch.zeros(3))


REFUSED = {
    "no module": (lambda: Pushforward(torch.exp, 2), TypeError, "generator"),
    "no noise": (lambda: Pushforward(nn.Linear(2, 2), 0), ShapeError, "latent_features: got 0"),
    "wrong noise": (
        lambda: Pushforward(nn.Linear(2, 2), 3),
        ShapeError,
        r"latent_features=3.*Linear\(\(2, 3\)\) fails",
    ),
    "no context": (lambda: Pushforward(nn.Linear(2, 2), 2, 1), ShapeError, "context_features=1"),
    "context": (lambda: Pushforward(OfUsers(2), 2), ShapeError, "context_features=0"),
    "rows": (lambda: Pushforward(nn.Flatten(0), 2), ShapeError, "one row of coordinates"),
    "nan": (lambda: Pushforward(Elementwise("nan"), 2), ShapeError, "NaN or infinite"),
    "event": (lambda: Pushforward(nn.Linear(2, 4), 2, event_shape=(2, 3)), ShapeError, "the generator makes 4"),
    "density": (lambda: Pushforward(nn.Linear(2, 4), 2, density="ais"), (ValueError, TypeError), "density"),
    "wide": (lambda: manifold(nn.Linear(3, 2), 3), ShapeError, "more noise than coordinates"),
    "constant": (lambda: manifold(Elementwise("zero"), 2).push_and_log_prob(torch.ones(2)), DensityError, "singular"),
    "rank": (lambda: manifold(Elementwise("first"), 2).log_prob(torch.ones(2)), DensityError, "singular"),
    "flat": (lambda: manifold(flat(), 2).push_and_log_prob(torch.zeros(2)), DensityError, "singular"),
    "folded": (lambda: manifold(Elementwise("square"), 1).log_prob(torch.ones(1)), InverseError, "not injective"),
    "folded pull": (lambda: manifold(Elementwise("square"), 2).pull(torch.ones(2)), InverseError, "not injective"),
    "log_prob": (lambda: linear(2, 3)().log_prob(torch.zeros(3, dtype=DOUBLE)), DensityError, "PushforwardReparam"),
    "svi": (latent_site_without_reparam, DensityError, "PushforwardReparam"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_within_a_second(name):
    action, error, message = REFUSED[name]
    start = time.perf_counter()
    with pytest.raises(error, match=message):
        action()
    assert time.perf_counter() - start < 1
