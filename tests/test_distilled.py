"""Students of diffusions: closed forms of Gaussian teachers, certificates against theory, inference, refusals."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genmods as gm
from pyro_genmods.evolve import RK4, distillation
from pyro_genmods.evolve.certificate import Certificate, Measured, certify, sliced_distance
from pyro_genmods.evolve.distillation import METHODS, distill
from pyro_genmods.evolve.distilled import Distilled
from pyro_genmods.foundation.errors import DensityError, IntegrationError, ShapeError
from pyro_genmods.foundation.residual import ResidualMLP

from .linear_gaussian import DOUBLE, chain, chain_mean, noisy
from .statistics import assert_mean

QUIET = {"progress_bar": False, "seed": 0}
MEAN, COVARIANCE = torch.tensor([1.0, -0.5]), torch.tensor([[1.5, 0.6], [0.6, 0.5]])


class Mixture(nn.Module):
    """The exact mean of the datum for a mixture of Gaussians with one covariance; contexts move all means."""

    def __init__(self, means: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        values, vectors = torch.linalg.eigh(covariance)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        means = self.means if c is None else self.means + c[:, None]
        t = t[:, None]
        variances = t.cos().square() * self.values + t.sin().square()
        gap = (u[:, None] - t.cos() * means) @ self.vectors
        weights = (-0.5 * (gap.square() / variances).sum(-1)).softmax(-1)
        datum = means + (t.cos() * self.values / variances * gap) @ self.vectors.mT
        return (weights[..., None] * datum).sum(1)


def gaussian_teacher(dtype: torch.dtype = torch.float32, context: int = 0) -> gm.Diffusion:
    """Exact, in units that are not white, so that the velocity is not zero."""
    network = Mixture(MEAN[None], COVARIANCE).to(dtype)
    return gm.Diffusion(2, context, network=network, parameterization="denoised").to(dtype)


def gaussian_flow(z: Tensor, c: Tensor | float = 0.0) -> Tensor:
    """The closed form of its probability flow from a right angle to the smallest one, in the user's units."""
    bottom = math.atan(1e-3)
    values, vectors = torch.linalg.eigh(COVARIANCE.to(z))
    scale = (math.cos(bottom) ** 2 * values + math.sin(bottom) ** 2).sqrt()
    return MEAN.to(z) + c + z @ (vectors * scale) @ vectors.mT / math.cos(bottom)


def white_teacher(dtype: torch.dtype = torch.float32, **options) -> gm.Diffusion:
    """A default network, zero before training, in white units: exact for the Gaussian, in one step."""
    teacher = gm.Diffusion(2, solver=RK4(1), **options).to(dtype)
    teacher.set_moments(MEAN.to(dtype), COVARIANCE.to(dtype))
    return teacher


def ring_teacher() -> gm.Diffusion:
    """Eight modes on a circle of radius 2, standard deviation .2, exact."""
    scale = math.sqrt(2.04)
    teacher = gm.Diffusion(
        2, network=Mixture(ring_modes() / scale, 0.04 / 2.04 * torch.eye(2)), parameterization="denoised"
    )
    teacher.set_moments(torch.zeros(2), 2.04 * torch.eye(2))
    return teacher


def ring_modes() -> Tensor:
    angle = torch.arange(8) * math.pi / 4
    return 2 * torch.stack([angle.cos(), angle.sin()], -1)


def ring_draws(n: int) -> Tensor:
    return ring_modes()[torch.randint(8, (n,))] + 0.2 * torch.randn(n, 2)


def off_mode(x: Tensor) -> float:
    """Share of draws more than four standard deviations from every mode."""
    return float((torch.cdist(x, ring_modes()).min(1)[0] > 0.8).double().mean())


class Shift(nn.Module):
    """A student's network that moves all rows by the same vector, in one call from a right angle to the smallest."""

    def __init__(self, shift: list[float]) -> None:
        super().__init__()
        self.velocity = nn.Parameter(torch.tensor(shift) / (math.atan(1e-3) - math.pi / 2))

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        return self.velocity.expand_as(u)


def student_of(teacher: gm.Diffusion, network: nn.Module) -> Distilled:
    """Made by hand, in the teacher's units."""
    student = Distilled(network, (2,), (math.pi / 2, teacher.bottom)).to(teacher.place[0])
    student.whitening.load_state_dict(teacher.whitening.state_dict())
    return student.eval()


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().sum(-1).mean().sqrt())


# -- maps against closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_what_is_exact_stays_exact(method, steps):
    teacher = white_teacher(DOUBLE)
    student = distill(teacher, steps, method, iterations=20, batch_size=32, certificate=False, **QUIET)
    z = torch.randn(500, 2, dtype=DOUBLE)
    truth = MEAN.double() + z @ torch.linalg.cholesky(COVARIANCE.double()).mT / math.cos(teacher.bottom)
    assert student.cost == gm.Cost(sample=steps, score=None)
    assert torch.allclose(student().push(z), truth, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "steps", "tolerance"),
    [
        ("regression", 1, 1e-2),
        pytest.param("regression", 2, 1e-2, marks=pytest.mark.slow),
        pytest.param("regression", 4, 2e-2, marks=pytest.mark.slow),
        pytest.param("rectified", 1, 2e-2, marks=pytest.mark.slow),
        pytest.param("rectified", 3, 2e-2, marks=pytest.mark.slow),
        pytest.param("consistency", 1, 1e-1, marks=pytest.mark.slow),
        pytest.param("consistency", 2, 1e-1, marks=pytest.mark.slow),
    ],
)
def test_a_student_learns_the_closed_form_of_a_gaussian_flow(method, steps, tolerance):
    student = distill(gaussian_teacher(), steps, method, iterations=800, certificate=False, **QUIET)
    untaught = distill(gaussian_teacher(), steps, method, iterations=1, certificate=False, **QUIET)
    z = torch.randn(4000, 2)
    with torch.no_grad():
        assert rms(student().push(z), gaussian_flow(z)) <= tolerance
        assert rms(untaught().push(z), gaussian_flow(z)) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(DOUBLE, marks=pytest.mark.slow)])
def test_context(dtype):
    teacher = gaussian_teacher(dtype, context=2)
    contexts = 0.5 * torch.randn(200, 2, dtype=dtype)
    student = distill(
        teacher, context=contexts, iterations=400, batch_size=128, learning_rate=3e-3, certificate=False, **QUIET
    )
    z, c = torch.randn(4000, 2, dtype=dtype), contexts[torch.randint(200, (4000,))]
    with torch.no_grad():
        made = student(c).push(z)
    assert made.dtype == dtype
    assert rms(made, gaussian_flow(z, c)) <= 4e-2
    certificate = certify(student, teacher, contexts, draws=400, batches=2, seed=0)
    assert certificate.criterion == "density"
    assert certificate.student.distance <= 1.3 * certificate.floor


def test_units_of_context_and_data_are_the_teachers():
    teacher = gm.Diffusion(2, 1, context_dropout=0.2, support=constraints.positive)
    c = 5 + 3 * torch.randn(300, 1)
    teacher.standardize((torch.randn(300, 2) + c).exp(), c)
    student = distill(teacher, 2, context=c, iterations=4, certificate=False, **QUIET)
    with torch.no_grad():
        x = student(c[:5]).sample((3,))
        truth = teacher(c[:5]).push(torch.zeros(5, 2))
        assert torch.allclose(student(c[:5]).push(torch.zeros(5, 2)), truth, rtol=0.2)  # zero velocities, four steps on
    assert x.shape == (3, 5, 2)
    assert (x > 0).all()


def test_an_image_teacher_has_an_image_student():
    teacher = gm.Diffusion(event_shape=(1, 8, 8))
    teacher.standardize(3 + torch.randn(64, 1, 8, 8))
    student = distill(teacher, iterations=1, batch_size=4, teacher_steps=2, certificate=False, **QUIET)
    assert type(student.network) is type(teacher.network)
    assert student().sample((2,)).shape == (2, 1, 8, 8)
    with torch.no_grad():
        assert abs(float(student().push(torch.zeros(64)).mean()) - 3) < 0.5


# -- the eight modes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_call_makes_the_eight_modes(steps):
    """The gate: one call within .10 of the law and at most 3 % off the modes; more calls at most 1 %."""
    teacher = ring_teacher()
    student = distill(teacher, steps, **QUIET)
    with torch.no_grad():
        x, y = student().sample((8000,)), ring_draws(8000)
    directions = nn.functional.normalize(torch.randn(2, 200), dim=0)
    assert sliced_distance(x, y, directions) <= 0.10
    assert off_mode(x) <= (0.03 if steps == 1 else 0.01)
    certificate = student.certificate
    assert certificate.excess <= 0.06
    assert abs(certificate.student.off_support - off_mode(x)) <= 0.006  # a nat below the rarest is four deviations here
    solvers = {solver.name: solver for solver in certificate.solvers}
    assert certificate.student.off_support < solvers["AdamsBashforth(4)"].off_support
    assert certificate.student.off_support < solvers["Heun(2)"].off_support
    assert certificate.rival is None or certificate.rival.calls >= 8


# -- certificates ------------------------------------------------------------------------------------------------------


def test_a_sliced_distance_is_that_of_sorted_projections():
    x, y = torch.randn(50, 3, dtype=DOUBLE), 2 * torch.randn(50, 3, dtype=DOUBLE) + 1
    directions = nn.functional.normalize(torch.randn(3, 20, dtype=DOUBLE), dim=0)
    squares = [
        sum((a - b) ** 2 for a, b in zip(sorted((x @ w).tolist()), sorted((y @ w).tolist()), strict=True)) / 50
        for w in directions.T
    ]
    assert math.isclose(sliced_distance(x, y, directions), math.sqrt(sum(squares) / 20), rel_tol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [[0.0, 0.0], [1.2, -1.6]])
def test_a_certificate_measures_a_shift(shift):
    r"""Of a standard normal by :math:`\delta`: excess :math:`|\delta| / \sqrt 2`, share off by a non-central law."""
    teacher, length = white_teacher(), math.hypot(*shift)
    certificate = certify(student_of(teacher, Shift(shift)), teacher, draws=4000, batches=4, seed=1)
    assert abs(certificate.excess - length / math.sqrt(2)) <= 0.04
    # the limit is that of the teacher's draws: its error is that of a rare quantile
    limit = -certificate.limit - math.log(2 * math.pi) - 0.5 * math.log(1 + 1e-6)
    wanted = -math.log(1e-3) + 1
    assert abs(limit - wanted) <= 4 / math.sqrt(16000 * 1e-3)
    share = stats.ncx2.sf(2 * limit, 2, length**2) if length else stats.chi2.sf(2 * limit, 2)
    assert abs(certificate.student.off_support - share) <= 5 * certificate.student.off_support_error
    assert abs(certificate.teacher.off_support - stats.chi2.sf(2 * limit, 2)) <= 5 * math.sqrt(1e-3 / 16000)
    assert certificate.faithful == (not length)


def test_neighbours_tell_what_is_far():
    teacher = white_teacher()
    near, far = (
        certify(student_of(teacher, Shift([s, 0.0])), teacher, criterion="neighbours", seed=0) for s in (0.0, 20.0)
    )
    assert near.criterion == "neighbours"
    assert near.student.off_support <= 0.005
    assert abs(near.teacher.off_support - 1e-3) <= 1e-3
    assert far.student.off_support == 1.0


def test_a_bad_student_gets_a_bad_certificate():
    teacher = gaussian_teacher()
    certificate = certify(student_of(teacher, Shift([0.7, 0.7])), teacher, draws=500, batches=2, seed=0)
    assert not certificate.faithful
    assert certificate.rival is not None
    assert "is not its teacher" in certificate.verdict
    assert "take diffusion.sampled_by(" in certificate.verdict
    assert certificate.verdict in str(certificate)


def row(name: str, calls: int, distance: float, off: float) -> Measured:
    return Measured(name, calls, distance, 0.01, off, 0.002, calls * 1e-3)


@pytest.mark.parametrize(
    ("student", "solvers", "words"),
    [
        (row("student", 1, 0.10, 0.001), [], "do not tell the student from its teacher"),
        (row("student", 1, 0.30, 0.02), [row("S(2)", 2, 0.9, 0.4)], "No solver of up to 2 calls is as good"),
        (row("student", 2, 0.30, 0.02), [row("S(2)", 2, 0.2, 0.01)], "Do not use it: S(2) is as good"),
        (row("student", 1, 0.30, 0.02), [row("S(4)", 4, 0.1, 0.0)], "take diffusion.sampled_by(S(4)), unless"),
        (row("student", 1, 0.30, 0.02), [row("S(4)", 4, 0.3, 0.02)], "It does in 1 call(s) what takes S(4) 4."),
        (
            row("student", 1, 0.30, 0.02),
            [row("S(4)", 4, 0.3, 0.02), row("S(8)", 8, 0.1, 0.0)],
            "In 8 calls S(8) is better",
        ),
    ],
)
def test_the_verdict(student, solvers, words):
    certificate = Certificate(student, row("teacher", 64, 0.1, 0.001), tuple(solvers), 1000, 4, 2, "density", -9.0)
    assert words in certificate.verdict
    assert certificate.speed_up == pytest.approx(64 / student.calls)
    assert Certificate.from_tuple(certificate.to_tuple()) == certificate
    table = str(certificate).splitlines()
    assert [line.split()[0] for line in table[1 : 3 + len(solvers)]] == [
        "student",
        "teacher",
        *(s.name for s in solvers),
    ]


# -- as a prior --------------------------------------------------------------------------------------------------------


def crooked_student() -> Distilled:
    """A student with random weights: a smooth, nonlinear map that nobody knows in closed form."""
    network = ResidualMLP(2, width=16)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return student_of(white_teacher(DOUBLE), network.double())


@pytest.mark.slow
def test_inference_in_noise_space_agrees_with_importance_sampling():
    student, y = crooked_student().freeze(), torch.tensor([1.8, -0.4], dtype=DOUBLE)

    def model() -> None:
        x = pyro.sample("x", student())
        pyro.sample("y", dist.Normal(x, 0.8).to_event(1), obs=y)

    z = torch.randn(100_000, 2, dtype=DOUBLE)
    x = student().push(z)
    assert rms(x, white_teacher(DOUBLE)().push(z)) > 0.1  # crooked indeed
    weights = dist.Normal(x, 0.8).to_event(1).log_prob(y).softmax(0)
    mean = (weights[:, None] * x).sum(0)
    second = (weights[:, None] * x.square()).sum(0)
    draws = chain(noisy(model), draws=400, warmup=100)
    found = student().push(draws["x_base"])
    for values, truth in ((found, mean), (found.square(), second)):
        assert_mean(values, truth, chain_mean(values)[1], "posterior in noise space")


def test_what_a_student_is_and_is_not():
    law = crooked_student()()
    assert law.density is gm.Density.IMPLICIT
    z = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(law.push(z).sum(), z)
    assert slope.abs().min() > 0
    with pytest.raises(DensityError, match="PushforwardReparam"):
        law.log_prob(torch.zeros(2, dtype=DOUBLE))


# -- files, streams, interrupts ----------------------------------------------------------------------------------------


def test_a_student_is_saved_with_its_certificate(tmp_path):
    student = distill(white_teacher(DOUBLE), 2, iterations=3, certificate=False, **QUIET)
    student.certificate = certify(student, white_teacher(DOUBLE), draws=100, batches=2, seed=0)
    with torch.no_grad():
        student.network.output.weight.normal_()
    gm.save(student, tmp_path / "student")
    again = gm.load(tmp_path / "student")
    z = torch.randn(7, 2, dtype=DOUBLE)
    assert torch.equal(again().push(z), student().push(z))
    assert again.certificate == student.certificate
    assert again.certificate is not None


def test_distillation_leaves_teacher_and_stream_alone_and_repeats_itself():
    teacher = gaussian_teacher()
    teacher.train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    stream = torch.get_rng_state()
    first, second = (distill(teacher, iterations=5, certificate=False, **QUIET) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), stream)
    assert teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = distill(teacher, iterations=5, certificate=False, seed=1, progress_bar=False)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_student_of_a_default_network_starts_with_its_weights():
    teacher = white_teacher()
    with torch.no_grad():
        for parameter in teacher.network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    teacher.freeze()
    student = distill(teacher, iterations=1, learning_rate=1e-12, certificate=False, **QUIET)
    assert all(p.requires_grad for p in student.parameters())
    for a, b in zip(student.network.parameters(), teacher.network.parameters(), strict=True):
        assert a is not b
        assert torch.allclose(a, b, atol=1e-10)


def test_an_interrupt_keeps_what_was_learned(monkeypatch):
    whole, calls = distillation._Lessons.batch, itertools.count()

    def batch(self, iteration):
        if next(calls) == 60:
            raise KeyboardInterrupt
        return whole(self, iteration)

    monkeypatch.setattr(distillation._Lessons, "batch", batch)
    with pytest.warns(RuntimeWarning, match="interrupted at iteration 60 of 100"):
        student = distill(gaussian_teacher(), iterations=100, certificate=False, **QUIET)
    z = torch.randn(1000, 2)
    with torch.no_grad():
        assert rms(student().push(z), gaussian_flow(z)) < 0.6 * rms(z, gaussian_flow(z))


def test_the_bar_shows_the_loss(capsys):
    distill(gaussian_teacher(), iterations=3, certificate=False, seed=0)
    shown = capsys.readouterr().err
    assert "distill" in shown
    assert "loss=" in shown and "sd" in shown


def test_fit_goes_on_by_the_energy_score():
    torch.manual_seed(0)
    teacher = white_teacher()
    student = student_of(teacher, Shift([0.0, 0.0]))
    student.certificate = certify(student, teacher, draws=100, batches=2, seed=0)
    moved = teacher().sample((2000,)) + torch.tensor([0.6, -0.6])
    gm.fit(student, moved, max_epochs=40, learning_rate=2e-2, seed=0, progress_bar=False)
    assert student.certificate is None
    assert torch.equal(student.whitening.mean, teacher.whitening.mean)
    with torch.no_grad():
        assert (student().sample((20000,)).mean(0) - moved.mean(0)).abs().max() < 0.08


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps: got 0, needs 1 to 4"),
        ({"steps": 5}, ValueError, "sampled_by"),
        ({"method": "magic"}, Exception, "magic"),
        ({"iterations": 0}, ValueError, "iterations: got 0"),
        ({"batch_size": 1}, ValueError, "batch_size: got 1"),
        ({"teacher_steps": 1}, ValueError, "teacher_steps: got 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate"),
        ({"network": ResidualMLP(3)}, ShapeError, "network"),
    ],
)
def test_bad_numbers(options, error, words):
    with pytest.raises(error, match=words):
        distill(white_teacher(), **options, certificate=False, **QUIET)


def test_a_teacher_that_has_not_learned():
    with pytest.raises(ValueError, match=r"learned nothing yet.*gm\.fit"):
        distill(gm.Diffusion(2), **QUIET)


def test_a_teacher_that_is_none():
    with pytest.raises(Exception, match=r"Diffusion"):
        distill(crooked_student(), **QUIET)


def test_a_teacher_that_explodes():
    teacher = white_teacher()
    with torch.no_grad():
        teacher.network.output.bias.fill_(math.inf)
    with pytest.raises(IntegrationError, match="NaN or infinity"):
        distill(teacher, certificate=False, **QUIET)


def test_a_loss_that_explodes(monkeypatch):
    whole, calls = distillation._Lessons.residual, itertools.count()

    def residual(self, *args):
        return whole(self, *args) * (math.nan if next(calls) == 3 else 1.0)

    monkeypatch.setattr(distillation._Lessons, "residual", residual)
    with pytest.warns(RuntimeWarning, match="not finite at iteration 3"):
        student = distill(gaussian_teacher(), iterations=10, certificate=False, **QUIET)
    assert all(bool(p.isfinite().all()) for p in student.parameters())


def test_certificates_of_nonsense():
    teacher, student = white_teacher(), student_of(white_teacher(), Shift([0.0, 0.0]))
    with pytest.raises(ShapeError, match="its own teacher"):
        certify(student, gm.Diffusion(3))
    with pytest.raises(ValueError, match="at least 100 and 2"):
        certify(student, teacher, draws=10)
    with pytest.raises(Exception, match="criterion"):
        certify(student, teacher, criterion="taste")
    with pytest.raises(ValueError, match="trace='exact'"):
        certify(student, white_teacher(trace="hutchinson"), criterion="density")


def test_angles_that_rise():
    with pytest.raises(ValueError, match="decreasing"):
        Distilled(ResidualMLP(2), (2,), (0.1, 1.0))
