"""The mean-field bound that scores only what it must: equal to Pyro's, and one call of a diffusion's network a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

import pyro_genmods as gm
from pyro_genmods import evolve
from pyro_genmods.foundation.errors import ShapeError

from .mixtures import correlated_gaussian
from .statistics import assert_mean

DOUBLE = torch.float64
Program = Callable[..., Any]
DATA = torch.tensor([0.3, -1.2, 0.8, 2.0])


class Unread(dist.Normal):
    """A normal law that refuses to be scored."""

    def log_prob(self, value: Tensor) -> Tensor:
        raise AssertionError("scored, though its divergence is known")

    def expand(self, batch_shape: Any, _instance: Any = None) -> Unread:
        return super().expand(batch_shape, _instance or self.__new__(Unread))


# -- programs: pairs of a model and a mean-field guide -----------------------------------------------------------------


def parameter(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    loc = pyro.param(f"{name}_loc", torch.linspace(-0.5, 0.7, math.prod(shape)).reshape(shape))
    return loc, pyro.param(f"{name}_scale", torch.full(shape, 0.6), constraint=dist.constraints.positive)


def plain() -> tuple[Program, Program]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=DATA[0])

    return model, lambda: pyro.sample("z", dist.Normal(*parameter("z")))


def events() -> tuple[Program, Program]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        w = pyro.sample("w", dist.MultivariateNormal(z.sum(-2), torch.eye(2)))
        pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=DATA[:2])

    def guide() -> None:
        pyro.sample("z", dist.Normal(*parameter("z", 3, 2)).to_event(2))
        loc, scale = parameter("w", 2)
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=torch.diag(scale)))

    return model, guide


def plates() -> tuple[Program, Program]:
    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            with pyro.plate("columns", 3):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("y", dist.Normal(w, 0.5), obs=DATA.expand(3, 4))

    def guide() -> None:
        pyro.sample("m", dist.Normal(*parameter("m")))
        with pyro.plate("rows", 4):
            pyro.sample("z", dist.Normal(*parameter("z", 4)))
            with pyro.plate("columns", 3):
                pyro.sample("w", dist.Normal(*parameter("w", 3, 4)))

    return model, guide


def minibatch() -> tuple[Program, Program]:
    def model() -> None:
        with pyro.plate("rows", 4, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=DATA[index])

    def guide() -> None:
        loc, scale = parameter("z", 4)
        with pyro.plate("rows", 4, subsample_size=2) as index:
            pyro.sample("z", dist.Normal(loc[index], scale[index]))

    return model, guide


def masked() -> tuple[Program, Program]:
    keep = torch.tensor([True, False, True, True])

    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 4), poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=DATA)

    def guide() -> None:
        pyro.sample("m", dist.Normal(*parameter("m")))
        with pyro.plate("rows", 4), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(*parameter("z", 4)))

    return model, guide


def scaled() -> tuple[Program, Program]:
    model, guide = plates()
    return poutine.scale(model, 3.0), poutine.scale(guide, 3.0)


def wrapped() -> tuple[Program, Program]:
    """Laws with masks of their own, and one that is masked away."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).mask(DATA > 0).to_event(1))
        pyro.sample("gone", dist.Normal(5.0, 1.0).mask(False))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=DATA)

    def guide() -> None:
        pyro.sample("z", dist.Normal(*parameter("z", 4)).mask(DATA > 0).to_event(1))
        pyro.sample("gone", dist.Normal(*parameter("gone")).mask(False))

    return model, guide


def unknown() -> tuple[Program, Program]:
    """A divergence that nobody has registered, beside one that is, and an auxiliary site."""

    def model() -> None:
        with pyro.plate("rows", 4):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1 / rate), obs=DATA)

    def guide() -> None:
        u = pyro.sample("u", dist.Normal(*parameter("u")), infer={"is_auxiliary": True})
        with pyro.plate("rows", 4):
            loc, scale = parameter("rate", 4)
            pyro.sample("rate", dist.LogNormal(loc + u, scale))
            pyro.sample("z", dist.Normal(*parameter("z", 4)))

    return model, guide


def point() -> tuple[Program, Program]:
    """Point masses, whose divergence is the density itself."""
    model, _ = plates()
    return model, AutoDelta(model, init_loc_fn=pyro.infer.autoguide.init_to_median)


PROGRAMS = [plain, events, plates, minibatch, masked, scaled, wrapped, unknown, point]


def step(elbo: Any, model: Program, guide: Program) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients with one seed."""
    pyro.set_rng_seed(3)
    with poutine.trace(param_only=True) as trace:
        loss = elbo.loss_and_grads(model, guide)
    gradients = {name: site["value"].unconstrained().grad for name, site in trace.trace.nodes.items()}
    found = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    for site in trace.trace.nodes.values():
        site["value"].unconstrained().grad = None
    return loss, found


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
def test_loss_and_gradients_are_those_of_pyro(program, options):
    model, guide = program()
    if options.get("vectorize_particles"):
        options = {**options, "max_plate_nesting": 2}
    pyro.set_rng_seed(0)
    guide()
    expected, slopes = step(TraceMeanField_ELBO(**options), model, guide)
    found, gradients = step(gm.infer.TraceMeanField_ELBO(**options), model, guide)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert gradients.keys() == slopes.keys() and slopes
    assert all(torch.allclose(gradients[name], slopes[name], rtol=1e-4, atol=1e-5) for name in slopes)


def test_the_evaluated_loss_is_that_of_pyro():
    model, guide = plates()
    losses = []
    for elbo in (TraceMeanField_ELBO(num_particles=5), gm.infer.TraceMeanField_ELBO(num_particles=5)):
        pyro.set_rng_seed(0)
        losses.append(SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo).evaluate_loss())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_handler_around_the_step_is_obeyed():
    model, guide = plates()
    for handler in (poutine.scale(scale=2.0), poutine.mask(mask=False)):
        losses = []
        for elbo in (TraceMeanField_ELBO(), gm.infer.TraceMeanField_ELBO()):
            pyro.set_rng_seed(0)
            with handler:
                losses.append(elbo.loss(model, guide))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_model_is_left_as_it_was():
    """Masks are for the time of a step: the law in a later trace is the user's."""
    model, guide = plain()
    gm.infer.TraceMeanField_ELBO().loss(model, guide)
    site = poutine.trace(model).get_trace().nodes["z"]
    assert isinstance(site["fn"], dist.Normal) and not site["is_observed"]


def test_what_is_not_read_is_not_scored():
    def model() -> None:
        with pyro.plate("rows", 4):
            z = pyro.sample("z", Unread(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=DATA)

    def guide() -> None:
        with pyro.plate("rows", 4):
            pyro.sample("z", dist.Normal(*parameter("z", 4)))

    loss = gm.infer.TraceMeanField_ELBO().loss(model, guide)
    assert math.isfinite(loss)
    with pytest.raises(AssertionError, match="scored"):
        TraceMeanField_ELBO().loss(model, guide)


def test_a_guide_that_is_not_reparameterised_is_refused():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=DATA[0])

    def guide() -> None:
        pyro.sample("z", dist.testing.fakes.NonreparameterizedNormal(*parameter("z")))

    with pytest.raises(NotImplementedError, match="reparameterized"):
        gm.infer.TraceMeanField_ELBO().loss(model, guide)


def test_a_divergence_of_another_shape_is_an_error():
    class Odd(dist.Normal):
        pass

    @torch.distributions.kl.register_kl(dist.Normal, Odd)
    def _(q: dist.Normal, p: Odd) -> Tensor:
        return torch.zeros(2)

    def model() -> None:
        pyro.sample("z", Odd(0.0, 1.0))

    with pytest.raises(ShapeError, match=r"'z'.*register_kl"):
        gm.infer.TraceMeanField_ELBO().loss(model, lambda: pyro.sample("z", dist.Normal(*parameter("z"))))


def test_a_normal_autoguide_has_its_divergence_in_closed_form():
    """For a model of one normal site the loss is the divergence, without noise, and Pyro's is that on average."""

    def model() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3, 2), 2.0).to_event(1))

    guide = AutoNormal(model, init_scale=0.5)
    guide()
    q, p = dist.Normal(guide.median()["z"], 0.5), dist.Normal(0.0, 2.0)
    exact = float(torch.distributions.kl_divergence(q, p).sum())
    elbo = gm.infer.TraceMeanField_ELBO(num_particles=2)
    assert elbo.loss(model, guide) == pytest.approx(exact, rel=1e-5)
    pyro.set_rng_seed(0)
    assert_mean(torch.tensor([TraceMeanField_ELBO().loss(model, guide) for _ in range(400)]), exact)


# -- a diffusion prior -------------------------------------------------------------------------------------------------


def counted(prior: gm.Diffusion) -> list[int]:
    """A list that gets the number of rows of every call of the network."""
    calls: list[int] = []
    prior.network.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[1])))
    return calls


def measured(prior: gm.GenerativeModel, y: Tensor, noise: float) -> Program:
    def model() -> None:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    return model


def gaussian_guide() -> None:
    loc = pyro.param("loc", torch.zeros(2, dtype=DOUBLE))
    scale = pyro.param("scale", torch.ones(2, dtype=DOUBLE), constraint=dist.constraints.positive)
    pyro.sample("x", dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("automatic", [False, True], ids=["hand-written", "AutoNormal"])
def test_a_step_under_a_diffusion_is_one_call_of_its_network(vectorized, automatic):
    prior = correlated_gaussian()[0].diffusion(solver=evolve.RK4(16))
    calls, y = counted(prior), torch.ones(5, 2, dtype=DOUBLE)

    def model() -> None:
        with pyro.plate("rows", 5):
            x = pyro.sample("x", prior())
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    def guide() -> None:
        with pyro.plate("rows", 5):
            gaussian_guide()

    guide = AutoNormal(model) if automatic else guide
    particles = 4 if vectorized else 1
    elbo = gm.infer.TraceMeanField_ELBO(particles, max_plate_nesting=1, vectorize_particles=vectorized)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    svi.step()
    calls.clear()
    assert math.isfinite(svi.step())
    assert calls == [5 * particles]
    calls.clear()
    theirs = TraceMeanField_ELBO(particles, max_plate_nesting=1, vectorize_particles=vectorized)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), theirs).step()
    assert len(calls) >= 64


def test_variational_inference_finds_the_posterior_in_closed_form():
    """Its optimum has the posterior's mean and the inverse diagonal of its precision, and a bound in closed form."""
    law, _ = correlated_gaussian()
    prior, noise = law.diffusion().freeze(), 0.5
    y = torch.tensor([1.5, -0.4], dtype=DOUBLE)
    precision = torch.linalg.inv(law.covariances[0]) + torch.eye(2, dtype=DOUBLE) / noise**2
    mean = torch.linalg.solve(precision, y / noise**2)
    model = measured(prior, y, noise)
    pyro.set_rng_seed(0)
    steps = 1500
    optimizer = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 1e-2 ** (1 / steps)})
    elbo = gm.infer.TraceMeanField_ELBO(32, max_plate_nesting=0, vectorize_particles=True)
    svi = SVI(model, gaussian_guide, optimizer, elbo)
    for _ in range(steps):
        svi.step()
    loc, scale = pyro.param("loc").detach(), pyro.param("scale").detach()
    assert torch.allclose(loc, mean, atol=0.02)
    assert torch.allclose(scale, precision.diagonal().rsqrt(), rtol=0.04)
    evidence = dist.MultivariateNormal(
        torch.zeros(2, dtype=DOUBLE), law.covariances[0] + noise**2 * torch.eye(2, dtype=DOUBLE)
    ).log_prob(y)
    gap = torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean, torch.diag(1 / precision.diagonal())),
        dist.MultivariateNormal(mean, precision_matrix=precision),
    )
    many = gm.infer.TraceMeanField_ELBO(20000, max_plate_nesting=0, vectorize_particles=True)
    bounds = torch.tensor([-many.loss(model, gaussian_guide) for _ in range(20)], dtype=DOUBLE)
    assert_mean(bounds, evidence - gap)
    assert bounds.mean() == pytest.approx(float(evidence - gap), abs=0.02)


def test_a_diffusion_on_another_support_is_scored_as_ever():
    """There the divergence is not known, and the loss is Pyro's."""
    prior = gm.Diffusion(2, support=dist.constraints.positive, solver=evolve.RK4(4)).freeze()
    model = measured(prior, torch.ones(2), 0.5)

    def guide() -> None:
        pyro.sample("x", dist.LogNormal(*parameter("x", 2)).to_event(1))

    losses = []
    for elbo in (TraceMeanField_ELBO(), gm.infer.TraceMeanField_ELBO()):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_guide_that_runs_the_model_itself_is_taken_as_ever():
    model, _ = plates()
    guide = pyro.infer.autoguide.AutoNormalMessenger(model)
    guide()
    losses = []
    for elbo in (TraceMeanField_ELBO(), gm.infer.TraceMeanField_ELBO()):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
