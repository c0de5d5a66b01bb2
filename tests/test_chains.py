r"""Transitions leave their targets as they are, and what they learn from is what it is said to be.

A transition that starts from exact draws of its target must end in exact draws: thousands of chains take a few steps,
and their law is held against the distribution function. The integrator is held against its own theory: it is its own
inverse, it keeps volume, its error falls with the square of the step. The unadjusted sampler has a closed form for its
bias, and is held against that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_genmods.foundation.adaptation import (
    DualAveraging,
    Moments,
    TrajectoryLength,
    halton,
    harmonic_mean,
    settled,
    state_of,
)
from pyro_genmods.foundation.chains import (
    Info,
    Plain,
    State,
    Step,
    hamiltonian,
    langevin,
    leapfrog,
    mala,
    metropolis,
    scaled,
    start,
    whitened,
)

from .statistics import assert_law, assert_mean

CHAINS = 20000
DOUBLE = torch.float64


# -- targets with exact draws ------------------------------------------------------------------------------------------

TRIANGLE = torch.tensor([[1.5, 0.0, 0.0], [0.9, 0.4, 0.0], [-0.3, 0.2, 0.7]], dtype=DOUBLE)
FREEDOM = 5.0


@dataclass(frozen=True)
class Target:
    """A law with exact draws.

    Attributes:
        energy: of rows.
        draw: exact draws, ``(n, dim)``.
        flat: draws to columns that are uniform if the law is right.
        size: a step with a middling acceptance.
    """

    energy: Callable[[Tensor], Tensor]
    draw: Callable[[int], Tensor]
    flat: Callable[[Tensor], Tensor]
    size: float
    dim: int = 2


def white(q: Tensor) -> Tensor:
    return whitened(TRIANGLE, q)


def unbent(q: Tensor) -> Tensor:
    """The banana, straightened: independent standard normal columns."""
    return torch.stack([q[:, 0], q[:, 1] - q[:, 0] ** 2], -1)


def bent(z: Tensor) -> Tensor:
    return torch.stack([z[:, 0], z[:, 1] + z[:, 0] ** 2], -1)


def student(q: Tensor) -> Tensor:
    return torch.as_tensor(stats.t(FREEDOM).cdf(q.numpy()))


TARGETS = {
    "Gaussian": Target(
        lambda q: 0.5 * white(q).square().sum(-1),
        lambda n: torch.randn(n, 3, dtype=DOUBLE) @ TRIANGLE.mT,
        lambda q: torch.special.ndtr(white(q)),
        0.6,
        3,
    ),
    "banana": Target(
        lambda q: 0.5 * unbent(q).square().sum(-1),
        lambda n: bent(torch.randn(n, 2, dtype=DOUBLE)),
        lambda q: torch.special.ndtr(unbent(q)),
        0.7,
    ),
    "Student": Target(
        lambda q: 0.5 * (FREEDOM + 1) * (q.square() / FREEDOM).log1p().sum(-1),
        lambda n: torch.distributions.StudentT(torch.tensor(FREEDOM, dtype=DOUBLE)).sample((n, 2)),
        student,
        1.7,
    ),
}


def randoms(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn_like(q), torch.rand_like(q[:, 0]).log()


def scale_of(kind: str, dim: int) -> Tensor:
    vector = 0.7 + 0.3 * torch.arange(dim, dtype=DOUBLE)
    matrix = vector.diag() + 0.4 * torch.ones(dim, dim, dtype=DOUBLE).tril(-1)
    return vector if kind == "vector" else matrix


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=DOUBLE)


# -- the stationary law ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["vector", "matrix"])
@pytest.mark.parametrize("kind", ["one leapfrog", "four leapfrogs", "MALA", "own sizes"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_target_is_left_as_it_is(name, kind, scale):
    target = TARGETS[name]
    potential = Plain(target.energy)
    first = state = start(target.draw(CHAINS), potential)
    acceptance = []
    for _ in range(4):
        noise, log_uniform = randoms(state.position)
        size = number(target.size)
        if kind == "own sizes":  # any size that does not depend on where a chain is
            size = target.size * (0.5 + torch.rand(CHAINS, 1, dtype=DOUBLE))
        step = Step(size, scale_of(scale, target.dim), noise, log_uniform, 4 if kind == "four leapfrogs" else 1)
        state, info = (mala if kind == "MALA" else hamiltonian)(state, potential, step)
        acceptance.append(float(info.acceptance.mean()))
    assert min(acceptance) > 0.3 and max(acceptance) < 0.99, f"acceptance {acceptance} tests nothing"
    assert (state.position - first.position).abs().mean() > 0.3
    u = target.flat(state.position)
    assert_law(u, lambda x: x, name)
    assert_mean((u - 0.5).square(), 1 / 12, name=f"{name}, spread")
    again = start(state.position, potential)
    assert torch.allclose(again.energy, state.energy) and torch.allclose(again.gradient, state.gradient)


def test_this_would_be_noticed_without_the_accept_test():
    target = TARGETS["Gaussian"]
    potential = Plain(target.energy)
    state = start(target.draw(CHAINS), potential)
    for _ in range(4):
        noise, _ = randoms(state.position)
        step = Step(number(1.0), scale_of("vector", 3), noise, torch.full((CHAINS,), -math.inf, dtype=DOUBLE))
        state, _ = hamiltonian(state, potential, step)
    with pytest.raises(AssertionError, match="p-value"):
        assert_law(target.flat(state.position), lambda x: x)


@pytest.mark.parametrize("kind", ["HMC", "MALA"])
def test_detailed_balance(kind):
    """In equilibrium a pair of neighbours has the same law in either order: antisymmetric functions have mean zero."""
    target = TARGETS["banana"]
    potential = Plain(target.energy)
    old = start(target.draw(5 * CHAINS), potential)
    noise, log_uniform = randoms(old.position)
    step = Step(number(0.7), scale_of("vector", 2), noise, log_uniform, 3)
    new, _ = (hamiltonian if kind == "HMC" else mala)(old, potential, step)
    x, y = torch.special.ndtr(unbent(old.position)), torch.special.ndtr(unbent(new.position))
    pairs = [x[:, i] ** 2 * y[:, j] - y[:, i] ** 2 * x[:, j] for i in range(2) for j in range(2)]
    assert_mean(torch.stack(pairs, -1), 0.0)


@pytest.mark.parametrize("scale", ["vector", "matrix"])
def test_the_acceptance_of_mala_is_that_of_its_proposal(scale):
    """By the two densities of the Langevin proposal, written out."""
    target = TARGETS["banana"]
    potential = Plain(target.energy)
    old = start(target.draw(200), potential)
    noise, log_uniform = randoms(old.position)
    size, factor = 0.6, scale_of(scale, 2)
    _, info = mala(old, potential, Step(number(size), factor, noise, log_uniform))
    root = factor.diag() if scale == "vector" else factor
    inverse_mass = root @ root.mT

    def forward(a: Tensor, b: Tensor) -> Tensor:
        mean = a - 0.5 * size**2 * potential.grad(a) @ inverse_mass
        return torch.distributions.MultivariateNormal(mean, scale_tril=size * root).log_prob(b)

    x, y = old.position, info.proposal
    assert torch.allclose(y, x - 0.5 * size**2 * old.gradient @ inverse_mass + size * noise @ root.mT)
    log_ratio = target.energy(x) - target.energy(y) + forward(y, x) - forward(x, y)
    assert torch.allclose(info.acceptance, log_ratio.clamp(max=0).exp(), atol=1e-10)
    assert torch.equal(info.accepted, log_uniform < log_ratio)


@pytest.mark.parametrize("name", TARGETS)
def test_mala_is_hamiltonian_with_one_leapfrog(name):
    target = TARGETS[name]
    potential = Plain(target.energy)
    state = start(target.draw(50), potential)
    step = Step(number(0.5), scale_of("matrix", target.dim), *randoms(state.position))
    (one, info_one), (other, info_other) = mala(state, potential, step), hamiltonian(state, potential, step)
    assert all(torch.equal(a, b) for a, b in zip((*one, *info_one), (*other, *info_other), strict=True))


# -- the integrator ----------------------------------------------------------------------------------------------------


class Differentiable(Plain):
    """A target whose gradient can itself be differentiated."""

    def grad(self, q: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: self.energy(row[None])[0]))(q)


def trajectory(
    potential: Plain, q: Tensor, n: Tensor, size: float, scale: Tensor, leapfrogs: int
) -> tuple[Tensor, Tensor]:
    gradient = potential.grad(q)
    for _ in range(leapfrogs):
        q, n, gradient = leapfrog(potential, q, n, gradient, number(size), scale)
    return q, n


def total(target: Target, q: Tensor, n: Tensor) -> Tensor:
    return target.energy(q) + 0.5 * n.square().sum(-1)


@pytest.mark.parametrize("scale", ["vector", "matrix"])
@pytest.mark.parametrize("name", TARGETS)
def test_forward_flip_forward_is_where_it_began(name, scale):
    target = TARGETS[name]
    q, n = target.draw(100), torch.randn(100, target.dim, dtype=DOUBLE)
    factor, potential = scale_of(scale, target.dim), Plain(target.energy)
    far = trajectory(potential, q, n, 0.2, factor, 12)
    assert (far[0] - q).abs().mean() > 0.5
    back = trajectory(potential, far[0], -far[1], 0.2, factor, 12)
    assert torch.allclose(back[0], q, atol=1e-10, rtol=0) and torch.allclose(-back[1], n, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", ["vector", "matrix"])
@pytest.mark.parametrize("name", TARGETS)
def test_volume_is_kept(name, scale):
    target = TARGETS[name]
    potential, factor = Differentiable(target.energy), scale_of(scale, target.dim)

    def move(both: Tensor) -> Tensor:
        q, n = both.split(target.dim)
        return torch.cat(trajectory(potential, q[None], n[None], 0.3, factor, 3), -1)[0]

    for _ in range(3):
        here = torch.cat([target.draw(1)[0], torch.randn(target.dim, dtype=DOUBLE)])
        jacobian = torch.func.jacrev(move)(here)
        assert (jacobian - torch.eye(2 * target.dim, dtype=DOUBLE)).abs().max() > 0.1
        assert abs(float(torch.linalg.det(jacobian)) - 1) < 1e-9


@pytest.mark.parametrize(("time", "order"), [(None, 3), (0.8, 2)])
@pytest.mark.parametrize("name", TARGETS)
def test_the_energy_error_falls_with_the_step(name, time, order):
    """By the third power over one step, by the second over a fixed time."""
    target = TARGETS[name]
    q, n = target.draw(200), torch.randn(200, target.dim, dtype=DOUBLE)
    potential, factor, errors = Plain(target.energy), scale_of("vector", target.dim), []
    for size in (0.02, 0.01):
        end = trajectory(potential, q, n, size, factor, 1 if time is None else round(time / size))
        errors.append(float((total(target, *end) - total(target, q, n)).square().mean().sqrt()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("transition", [hamiltonian, mala, langevin])
@pytest.mark.parametrize("name", TARGETS)
def test_a_dense_scale_is_a_change_of_coordinates(name, transition):
    """A chain with scale ``S`` on ``U(q)`` is a chain with scale one on ``U(S y)``."""
    target, factor = TARGETS[name], scale_of("matrix", TARGETS[name].dim)
    q = target.draw(300)
    round_one = Plain(lambda y: target.energy(scaled(factor, y)))
    direct, other = start(q, Plain(target.energy)), start(whitened(factor, q), round_one)
    noise, log_uniform = randoms(q)
    for _ in range(3):
        direct, info = transition(
            direct, Plain(target.energy), Step(number(0.4), factor, noise, log_uniform, leapfrogs=3)
        )
        other, info_other = transition(
            other, round_one, Step(number(0.4), torch.ones(target.dim, dtype=DOUBLE), noise, log_uniform, leapfrogs=3)
        )
        assert torch.equal(info.accepted, info_other.accepted)
        assert torch.allclose(direct.position, scaled(factor, other.position), atol=1e-10)
        assert torch.allclose(info.acceptance, info_other.acceptance, atol=1e-9)


@pytest.mark.parametrize("transition", [hamiltonian, mala, langevin])
def test_a_diagonal_matrix_is_a_vector(transition):
    target, vector = TARGETS["Gaussian"], scale_of("vector", 3)
    state, potential = start(target.draw(50), Plain(target.energy)), Plain(target.energy)
    noise, log_uniform = randoms(state.position)
    found = [transition(state, potential, Step(number(0.5), s, noise, log_uniform, 2)) for s in (vector, vector.diag())]
    assert torch.allclose(found[0][0].position, found[1][0].position, atol=1e-12)


def test_scales_and_their_inverses():
    x = torch.randn(5, 3, dtype=DOUBLE)
    for kind in ("vector", "matrix"):
        factor = scale_of(kind, 3)
        matrix = factor.diag() if kind == "vector" else factor
        assert torch.allclose(scaled(factor, x), (matrix @ x.mT).mT)
        assert torch.allclose(whitened(factor, scaled(factor, x)), x)


# -- the unadjusted sampler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.5, 1.0, 1.5])
def test_unadjusted_langevin_has_the_variance_of_its_closed_form(size):
    deviation = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    potential = Plain(lambda q: 0.5 * (q / deviation).square().sum(-1))
    biased = deviation / (1 - size**2 / (4 * deviation**2)).sqrt()
    state = start(biased * torch.randn(CHAINS, 2, dtype=DOUBLE), potential)
    for _ in range(10):
        noise, log_uniform = randoms(state.position)
        step = Step(number(size), torch.ones(2, dtype=DOUBLE), noise, log_uniform)
        state, info = langevin(state, potential, step)
        assert info.accepted.all() and not info.diverging.any()
    for i in range(2):
        assert_law(state.position[:, i], lambda x, i=i: torch.special.ndtr(x / biased[i]))
        assert_mean(state.position[:, i].square(), float(biased[i] ** 2))


# -- failures ----------------------------------------------------------------------------------------------------------


BEYOND = {"infinite": math.inf, "no number": math.nan, "minus infinite": -math.inf}


def wall(kind: str) -> Plain:
    """A standard normal on the positive half line; what is left of it fails in one of several ways."""

    def energy(q: Tensor) -> Tensor:
        inside, value = (q > 0).all(-1), 0.5 * q.square().sum(-1)
        return torch.where(
            inside, value, {"infinite": math.inf, "no number": math.nan, "minus infinite": -math.inf}[kind]
        )

    return Plain(energy)


@pytest.mark.parametrize("transition", [hamiltonian, mala, langevin])
@pytest.mark.parametrize("kind", BEYOND)
def test_what_is_not_finite_is_rejected_and_counted(kind, transition):
    potential = wall(kind)
    state = start(torch.randn(CHAINS, 1, dtype=DOUBLE).abs(), potential)
    rejected = 0
    for _ in range(6):
        before = state
        step = Step(number(0.8), torch.ones(1, dtype=DOUBLE), *randoms(state.position), 2)
        state, info = transition(state, potential, step)
        beyond = info.proposal[:, 0] <= 0
        rejected += int(beyond.sum())
        assert not info.accepted[beyond].any() and info.diverging[beyond].all()
        assert (info.acceptance[beyond] == 0).all() and info.acceptance.isfinite().all()
        assert torch.equal(state.position[beyond], before.position[beyond])
        assert torch.equal(info.diverging, beyond)
        assert all(part.isfinite().all() for part in state)
    assert rejected > 100
    if transition is not langevin:
        assert_law(state.position, lambda x: 2 * torch.special.ndtr(x) - 1)


def test_a_gradient_that_is_no_number_is_rejected():
    class Broken(Plain):
        def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = super().value_and_grad(q)
            return value, torch.where(q > 1, math.nan, gradient)

    potential = Broken(lambda q: 0.5 * q.square().sum(-1))
    state = start(torch.zeros(1000, 2, dtype=DOUBLE), potential)
    for transition in (hamiltonian, mala, langevin):
        for _ in range(5):
            state, info = transition(
                state, potential, Step(number(1.0), torch.ones(2, dtype=DOUBLE), *randoms(state.position))
            )
            assert info.diverging.any()
            assert (state.position <= 1).all() and all(part.isfinite().all() for part in state)


def test_a_large_energy_error_is_a_divergence_though_it_is_finite():
    potential = Plain(lambda q: 1e4 * q.square().sum(-1))
    state = start(torch.zeros(3, 1, dtype=DOUBLE), potential)
    noise = torch.tensor([[0.0], [0.1], [1.0]], dtype=DOUBLE)
    step = Step(number(0.1), torch.ones(1, dtype=DOUBLE), noise, torch.zeros(3, dtype=DOUBLE))
    _, info = hamiltonian(state, potential, step)
    error = (potential.value(info.proposal) + 0.5 * info.momentum.square().sum(-1)) - info.energy
    assert torch.equal(info.diverging, error >= 1000) and info.diverging.tolist() == [False, False, True]


def test_the_accept_test_by_hand():
    infinite = math.inf
    old = State(torch.zeros(6, 1), torch.zeros(6), torch.zeros(6, 1))
    energy = torch.tensor([1.0, 1.0, infinite, math.nan, -infinite, 0.0])
    new = State(torch.ones(6, 1), energy, torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0], [math.nan]]))
    log_uniform = torch.tensor([-2.0, -0.5, -9.0, -9.0, -9.0, -9.0])
    state, acceptance, accepted, diverging = metropolis(old, new, old.energy - energy, log_uniform)
    assert accepted.tolist() == [True, False, False, False, False, False]
    assert torch.allclose(acceptance, torch.tensor([math.exp(-1), math.exp(-1), 0, 0, 0, 0]))
    assert diverging.tolist() == [False, False, True, True, True, True]
    assert state.position.flatten().tolist() == [1, 0, 0, 0, 0, 0]
    assert state.energy.tolist() == [1, 0, 0, 0, 0, 0] and state.gradient.flatten().tolist() == [1, 0, 0, 0, 0, 0]


def test_gradients_are_counted_chain_by_chain():
    potential = Plain(TARGETS["banana"].energy)
    state = start(torch.zeros(10, 2, dtype=DOUBLE), potential)
    step = Step(number(0.1), torch.ones(2, dtype=DOUBLE), *randoms(state.position), 7)
    for transition, expected in ((hamiltonian, 70), (mala, 10), (langevin, 10)):
        before = potential.num_gradients
        transition(state, potential, step)
        assert potential.num_gradients - before == expected


# -- adaptation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "chains"), [(0.3, 1), (0.651, 64), (0.9, 8)])
def test_dual_averaging_reaches_its_target(target, chains):
    """Acceptance ``exp(-size)`` with the noise of so many chains."""
    step = DualAveraging.around(0.01, target, chains)
    for _ in range(1500):
        truth = math.exp(-step.size)
        step.update(min(1.0, max(0.0, truth + 0.2 * float(torch.randn(())) / math.sqrt(chains))))
    assert math.exp(-step.final) == pytest.approx(target, abs=0.03)


def test_dual_averaging_forgets_and_survives():
    step = DualAveraging.around(1.0, 0.8)
    assert step.size == step.final == 1.0
    for _ in range(200):
        step.update(math.exp(-step.size))
    kept = step.final
    step.restart()
    assert step.size == pytest.approx(kept) and step.final == pytest.approx(kept)
    for value in (math.nan, math.inf, -math.inf):
        step.update(value)
    assert step.size < kept and math.isfinite(step.final)
    assert DualAveraging(**state_of(step)) == step


@pytest.mark.parametrize("sizes", [[7, 1, 30], [1, 1, 1], [64] * 5, [0, 12]])
@pytest.mark.parametrize("dense", [False, True])
def test_moments_are_those_of_everything_together(sizes, dense):
    pieces = [torch.randn(n, 3, dtype=DOUBLE) @ TRIANGLE + 100.0 * i for i, n in enumerate(sizes)]
    moments = Moments(torch.zeros(3, dtype=DOUBLE), dense)
    moments.update(torch.randn(9, 3, dtype=DOUBLE) + 1e6)
    moments.restart()
    for piece in pieces:
        moments.update(piece)
    rows = torch.cat(pieces)
    covariance = torch.cov(rows.mT, correction=0)
    assert moments.count == len(rows)
    assert torch.allclose(moments.mean, rows.mean(0))
    assert torch.allclose(moments.covariance, covariance if dense else covariance.diagonal())
    assert torch.allclose(moments.scale(), covariance.diagonal().sqrt())
    if dense and len(rows) > 3:
        assert torch.allclose(moments.correlation(), torch.corrcoef(rows.mT))
        root = moments.scale(dense=True)
        assert torch.equal(root, root.tril())
        assert torch.allclose(root @ root.mT, covariance, rtol=0.01, atol=float(covariance.diagonal().max()) * 1e-3)


def test_a_scale_is_never_zero():
    for rows in (torch.zeros(10, 2), torch.tensor([[0.0, 1.0], [0.0, 2.0]])):
        moments = Moments(torch.zeros(2), dense=True)
        moments.update(rows)
        assert (moments.scale() > 0).all() and moments.scale().isfinite().all()


def test_the_sequence_fills_every_stretch():
    assert [halton(i) for i in range(1, 8)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    for first in (1, 100, 12345):
        window = torch.tensor([halton(i) for i in range(first, first + 64)]).sort().values
        assert (window - (torch.arange(64) + 0.5) / 64).abs().max() < 0.06


@pytest.mark.parametrize("dim", [1, 10, 1000])
def test_chains_in_equilibrium_are_settled(dim):
    energy = 0.5 * torch.randn(4096, dim).square().sum(-1)
    assert settled(energy, dim).all()
    assert settled(energy + 1e5, dim).all()
    energy[:3] = torch.tensor([math.nan, math.inf, energy.median() + 100 + 20 * math.sqrt(dim)])
    assert not settled(energy, dim)[:3].any() and settled(energy, dim)[3:].all()


def test_few_and_hopeless_chains():
    assert settled(torch.tensor([1.0, 1e9, math.nan]), 2).tolist() == [True, True, False]
    assert not settled(torch.full((8,), math.nan), 2).any()
    assert (
        settled(torch.tensor([1.0, 2.0, 3.0, 4.0, math.inf, math.nan, math.inf]), 2).tolist()
        == [True] * 4 + [False] * 3
    )


def test_the_harmonic_mean():
    acceptance = torch.rand(50).clamp_min(0.02)
    usable = torch.rand(50) > 0.3
    assert harmonic_mean(acceptance, usable) == pytest.approx(float(stats.hmean(acceptance[usable].numpy())), rel=1e-5)
    assert harmonic_mean(torch.zeros(4), torch.ones(4, dtype=torch.bool)) == pytest.approx(0.01)
    assert harmonic_mean(torch.zeros(4), torch.ones(4, dtype=torch.bool), 0.05) == pytest.approx(0.05)
    assert harmonic_mean(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 0


def turned(q: Tensor, n: Tensor, time: float) -> Info:
    """The exact flow of a standard normal, a rotation."""
    end, momentum = q * math.cos(time) + n * math.sin(time), n * math.cos(time) - q * math.sin(time)
    one = torch.ones(len(q))
    return Info(one, one.bool(), ~one.bool(), 0.5 * (q.square() + n.square()).sum(-1), end, momentum)


@pytest.mark.parametrize("first", [0.2, 3.0])
def test_the_criterion_finds_a_quarter_turn(first):
    """On a round Gaussian the distance from the centre changes most after a quarter of a turn."""
    length = TrajectoryLength(math.log(first))
    usable, moments = torch.ones(512, dtype=torch.bool), (torch.zeros(3), torch.ones(3))
    for i in range(300):
        if i == 150:
            length.restart()
        q, n = torch.randn(512, 3), torch.randn(512, 3)
        length.update(q, turned(q, n, length.length), moments, 1.0, usable)
    assert length.final == pytest.approx(math.pi / 2, rel=0.05)


def test_the_criterion_does_not_look_at_lost_chains():
    q, n = torch.randn(64, 2), torch.randn(64, 2)
    info = turned(q, n, 1.0)
    usable = torch.arange(64) > 5
    lengths = [TrajectoryLength(0.0), TrajectoryLength(0.0)]
    lengths[0].update(q, info, (torch.zeros(2), torch.ones(2)), 0.9, usable)
    spoiled = info._replace(proposal=torch.where(usable[:, None], info.proposal, 1e30))
    lengths[1].update(q, spoiled, (torch.zeros(2), torch.ones(2)), 0.9, usable)
    assert lengths[0] == lengths[1]
    lengths[1].update(q, info._replace(proposal=info.proposal * math.nan), (q[0], q[0].abs()), 0.9, usable)
    assert math.isfinite(lengths[1].length)
    assert TrajectoryLength(**state_of(lengths[0])) == lengths[0]
