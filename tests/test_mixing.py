r"""Do chains mix, and to what: Stein's identities against closed forms, and reports of laws known to be good or bad.

Population values of the kernel Stein discrepancy follow from :math:`S^2 = E\, (s_p - s_q)(x) \cdot (s_p - s_q)(y)\,
k(x, y)` over independent draws of :math:`q`: of Gaussians they are one-dimensional integrals of the kernel.
"""

from __future__ import annotations

import copy
import math
import pickle

import arviz as az
import matplotlib.pyplot as plt
import pytest
import torch
from scipy import integrate, stats

import pyro_genmods as gm
from pyro_genmods.diagnostics import plot_energy_gap, to_inference_data
from pyro_genmods.foundation.errors import SamplingError, ShapeError, SupportError
from pyro_genmods.foundation.stein import (
    Identity,
    kernel_stein_discrepancy,
    normal_equivalent,
    stein_identities,
    stein_kernel,
)
from pyro_genmods.shape import Chains, Contrastive, MixingReport, mixing_report
from pyro_genmods.shape.checks import Shift
from pyro_genmods.shape.measures import energy_distance, histogram_overlap, moved
from pyro_genmods.shape.modes import find_modes, nearest

from .statistics import judge

QUICK = {"num_chains": 32, "superchains": 4, "short": 20, "long": 100, "seed": 0}
BRIEF = QUICK | {"num_chains": 16, "short": 5, "long": 20}  # where nothing is judged


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# -- identities -------------------------------------------------------------------------------------------------------


def test_identities_hold_for_draws_of_the_law():
    x = normal(4000, 3) * torch.tensor([0.5, 1.0, 2.0]) + 1
    precision = torch.tensor([4.0, 1.0, 0.25])
    found = stein_identities(x, -(x - 1) * precision, torch.full((4000,), -5.25))
    assert [identity.value.shape for identity in found.values()] == [(3,), (3,), (1,), (1,)]
    for name, identity in found.items():
        judge(name, float(identity.z.abs().max()), identity.p_value, len(found))


@pytest.mark.parametrize(
    ("score", "name", "value"),
    [
        (lambda x: -(x - 0.2), "force", 0.2),  # shifted
        (lambda x: -x / 4, "virial", -0.75),  # draws too narrow
        (lambda x: -4 * x, "virial", 3.0),  # too wide
        (lambda x: -x - x**3 / 10, "curvature", 1 + 2 * 3 / 10 + 15 / 100 - 1 - 3 / 10),  # E (x + x^3/10)^2 - ...
    ],
)
def test_identities_of_a_wrong_score_have_their_closed_form(score, name, value):
    x = normal(20000, 1).requires_grad_()
    s = score(x)
    divergence = torch.autograd.grad(s.sum(), x)[0].sum(-1)
    found = stein_identities(x.detach(), s.detach(), divergence)[name]
    judge(name, *_against(found, value))
    assert found.p_value < 1e-6


def _against(found: Identity, value: float) -> tuple[float, float]:
    z = float((found.value - value) / found.standard_error)
    return z, 2 * stats.norm.sf(abs(z))


def test_errors_of_identities_know_of_dependent_draws():
    """Autoregressive chains with correlation .95: z-scores have unit variance all the same."""
    zs = []
    for seed in range(40):
        g = generator(seed)
        x = [torch.randn(32, 1, generator=g)]
        for _ in range(99):
            x.append(0.95 * x[-1] + math.sqrt(1 - 0.95**2) * torch.randn(32, 1, generator=g))
        draws = torch.stack(x, 1)
        zs.append(stein_identities(draws, -draws)["virial"].z)
    spread = float(torch.cat(zs).square().mean())
    judge("z-scores", spread, 2 * min(stats.chi2.sf(40 * spread, 40), stats.chi2.cdf(40 * spread, 40)))


@pytest.mark.parametrize(("t", "degrees"), [(2.0, 7), (5.0, 7), (4.0, 63), (8.0, 63)])
def test_students_law_as_a_normal_score(t, degrees):
    exact = -stats.norm.ppf(stats.t.sf(t, degrees))
    assert float(normal_equivalent(torch.tensor(t), degrees)) == pytest.approx(exact, rel=0.01)


# -- kernel Stein discrepancy -----------------------------------------------------------------------------------------


def population_discrepancy(shift: float, sd: float, length: float) -> float:
    """Squared discrepancy of N(shift, sd^2) from N(0, 1): the score differs by -shift - (1 - 1/sd^2)(x - shift)."""
    law = stats.norm(0, sd * math.sqrt(2))  # of x - y
    kernel = lambda r: (length**2 + r * r) ** -0.5  # noqa: E731
    mean = integrate.quad(lambda r: law.pdf(r) * kernel(r), -30, 30)[0]
    square = integrate.quad(lambda r: law.pdf(r) * r * r * kernel(r), -30, 30)[0]
    return shift**2 * mean + (1 - sd**-2) ** 2 * (2 * sd**2 * mean - square) / 4


@pytest.mark.parametrize(
    ("shift", "sd", "length"), [(0.5, 1.0, 1.0), (0.0, 1.5, 1.0), (0.0, 0.6, 2.0), (0.3, 0.8, 0.5)]
)
def test_the_discrepancy_of_gaussians_has_its_closed_form(shift, sd, length):
    exact = population_discrepancy(shift, sd, length)
    estimates = []
    for seed in range(20):
        x = shift + sd * normal(250, 1, seed=seed)
        found = kernel_stein_discrepancy(x, -x, length=length, bootstraps=50, generator=generator(seed))
        estimates.append(found.u_statistic)
        assert found.p_value < 0.05
    u = torch.tensor(estimates, dtype=torch.float64)
    z = float((u.mean() - exact) / (u.std() / math.sqrt(len(u))))
    judge("U-statistic", z, 2 * stats.t.sf(abs(z), len(u) - 1))


def test_the_kernel_is_that_of_its_definition():
    """By automatic differentiation of k, entry by entry."""
    x, y = normal(2, 3), normal(3, 3, seed=1)
    length, found = 0.7, stein_kernel(x, -x, y, -y / 2, 0.7)

    def k(a, b):
        return (length**2 + (a - b).square().sum()).rsqrt()

    for i, a in enumerate(x):
        for j, b in enumerate(y):
            ab = torch.cat([a, b]).requires_grad_()
            (grad,) = torch.autograd.grad(k(ab[:3], ab[3:]), ab)
            hessian = torch.autograd.functional.hessian(lambda ab: k(ab[:3], ab[3:]), ab.detach())
            expected = (-a @ (-b / 2)) * k(a, b) - a @ grad[3:] - b / 2 @ grad[:3] + hessian[:3, 3:].trace()
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-10)


def test_the_discrepancy_does_not_depend_on_the_block():
    x = normal(8, 30, 2)
    one, other = (kernel_stein_discrepancy(x, -x, block=b, generator=generator()) for b in (7, 1000))
    assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_bootstrap_has_its_level(correlation):
    """Of draws of the law, p-values below .1 are at most a tenth, in chains as well."""
    low, runs = 0, 100
    for seed in range(runs):
        g = generator(seed)
        x = [torch.randn(40, 2, generator=g)]
        for _ in range(4):
            x.append(correlation * x[-1] + math.sqrt(1 - correlation**2) * torch.randn(40, 2, generator=g))
        draws = torch.stack(x, 1)
        low += kernel_stein_discrepancy(draws, -draws, bootstraps=99, generator=g).p_value <= 0.1
    judge("level", low, float(stats.binom.sf(low - 1, runs, 0.1)))


def test_the_score_is_blind_to_weights_of_far_modes():
    """Draws of 90 and 10 percent of modes with weights one half pass; where modes touch they do not."""
    g = generator()
    for distance, seen in ((8.0, False), (1.5, True)):
        side = 2.0 * (torch.rand(600, 1, generator=g) < 0.9) - 1
        x = (distance * side + torch.randn(600, 1, generator=g)).double().requires_grad_()
        log_density = torch.logsumexp(torch.stack([-0.5 * (x - distance) ** 2, -0.5 * (x + distance) ** 2]), 0).sum()
        (score,) = torch.autograd.grad(log_density, x)
        found = kernel_stein_discrepancy(x.detach(), score, generator=g)
        assert (found.p_value < 0.01) == seen
        assert (stein_identities(x.detach(), score)["force"].p_value < 1e-4) == seen


def test_bad_input_of_the_identities():
    x = torch.zeros(10, 2)
    for function in (stein_identities, kernel_stein_discrepancy):
        with pytest.raises(ShapeError, match=r"x, score: got shapes \(10, 2\) and \(10, 1\)"):
            function(x, x[:, :1])
        with pytest.raises(ShapeError, match="at least 4"):
            function(x[:3], x[:3])
    with pytest.raises(ShapeError, match="divergence"):
        stein_identities(x, x, torch.zeros(9))
    with pytest.raises(ValueError, match="length"):
        kernel_stein_discrepancy(x, x, length=0.0)


# -- measures ---------------------------------------------------------------------------------------------------------


def test_the_overlap_of_histograms_is_that_of_densities():
    """Two normal laws a distance of two apart have 2 Phi(-1) in common; a finite number of bins sees a little more."""
    a, b = normal(20000), 2 + normal(20000, seed=1)
    assert histogram_overlap(a, b) == pytest.approx(2 * stats.norm.cdf(-1), abs=0.02)
    assert histogram_overlap(a, normal(300, seed=2)) > 0.85


def test_the_energy_distance_of_normal_laws():
    """E|x - y| of normal laws a distance apart is the mean of a folded normal law."""
    x, y = normal(1000, 1), 1 + normal(1000, 1, seed=1)
    between = stats.foldnorm(1 / math.sqrt(2), scale=math.sqrt(2)).mean()
    exact = 1 - 2 * math.sqrt(2) * math.sqrt(2 / math.pi) / (2 * between)
    found = energy_distance(x, y)
    assert found.share == pytest.approx(exact, abs=0.03)
    assert found.z > 20
    assert abs(energy_distance(x, normal(1000, 1, seed=2)).z) < 5


def test_what_moves_is_told_with_its_error():
    x = normal(64, 40, 3)
    x[:, 20:, 1] += 2
    shift = moved(x[:, :20], x[:, 20:], paired=True)
    assert shift.worst == 1
    assert float(shift.sd[1]) == pytest.approx(2, abs=0.15)
    assert shift.severity(0.1) > 3
    assert moved(x[:, :20, [0]], x[:, 20:, [0]]).severity(0.1) < 1


def test_what_is_sure_and_small_is_no_finding():
    assert Shift(torch.tensor([0.01]), torch.tensor([50.0]), 63).severity(0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(("modes", "found"), [(1, None), (2, 2), (5, 5)])
def test_modes_are_found_in_data(modes, found):
    angle = 2 * math.pi * torch.arange(modes) / modes
    centres = 6.0 * torch.stack([angle.cos(), angle.sin()], 1)
    which = torch.randint(modes, (400,), generator=generator())
    y = centres[which] + torch.randn(400, 2, generator=generator(1))
    got = find_modes(y)
    assert (None if got is None else len(got)) == found
    if got is not None:
        assert torch.cdist(centres, got).min(1).values.max() < 0.6
        assert len(torch.unique(torch.stack([which, nearest(y, got)], 1), dim=0)) < 1.5 * modes


# -- reports ----------------------------------------------------------------------------------------------------------


def gaussian(**options) -> gm.Energy:
    """Precisions 2 and 10, base included."""
    return gm.Energy(
        2, network=lambda y: 0.5 * (y * torch.tensor([1.0, 3.0], dtype=y.dtype)).square().sum(-1), **options
    )


def of_gaussian(n: int) -> torch.Tensor:
    return torch.randn(n, 2, generator=generator()) * torch.tensor([2.0, 10.0]) ** -0.5


def two_modes(weight: float = 0.3) -> gm.Energy:
    """Modes at +-4 with standard deviation one half, weights .3 and .7."""

    def energy(y):
        near = [torch.log(torch.tensor(w)) - 2 * (y - side * torch.tensor([4.0, 0.0])).square().sum(-1)
                for w, side in ((weight, -1), (1 - weight, 1))]  # fmt: skip
        return -torch.logsumexp(torch.stack(near), 0)

    return gm.Energy(2, network=energy, base=None)


def of_two_modes(n: int, weight: float = 0.3) -> torch.Tensor:
    side = 1.0 - 2.0 * (torch.rand(n, 1, generator=generator()) < weight)
    return torch.randn(n, 2, generator=generator(1)) / 2 + side * torch.tensor([4.0, 0.0])


def ring(n: int, seed: int = 0) -> torch.Tensor:
    angle = 2 * math.pi * torch.rand(n, generator=generator(seed))
    return 2 * torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(n, 2, generator=generator(seed + 1))


@pytest.fixture(scope="module")
def good() -> MixingReport:
    return mixing_report(gaussian(), of_gaussian(300), **QUICK)


@pytest.fixture(scope="module")
def stuck() -> MixingReport:
    return mixing_report(two_modes(), of_two_modes(300), kernel="mala", **QUICK)


def test_a_gaussian_is_ok(good):
    assert good.ok, str(good)
    assert good.ess > 1000
    assert good.nested_r_hat < 1.005
    assert abs(good.energy_gap) < 0.3
    assert good.energy_overlap > 0.85
    assert good.occupancy is None
    assert set(good.identities) == {"force", "virial", "virial_sum", "curvature"}
    assert "ok: chains forget" in str(good)
    assert good.draws.shape == (32, 100, 2)
    spread = good.draws.flatten(0, 1).var(0)
    assert torch.allclose(spread, torch.tensor([0.5, 0.1]), rtol=0.2)


@pytest.mark.parametrize("kernel", ["mala", Chains("hmc", warmup=100)])
def test_other_kernels_are_ok(kernel):
    report = mixing_report(gaussian().double(), of_gaussian(300).double(), kernel=kernel, **QUICK | {"long": 200})
    assert report.ok, str(report)
    assert report.draws.dtype == torch.float64


def test_unadjusted_chains_are_found_biased_by_their_step():
    """Of the narrow direction, precision 10, a leapfrog of .4 makes the variance 1 / (1 - .4) of what it should be."""
    report = mixing_report(gaussian(), kernel=Chains("ula", step_size=0.4), **QUICK | {"long": 500})
    assert not report.ok
    assert "take kernel='mala'" in report.reason
    virial = report.identities["virial"]
    exact = torch.tensor([1 / (1 - 0.16 / 4 * 2) - 1, 1 / (1 - 0.16 / 4 * 10) - 1], dtype=torch.float64)
    for i in range(2):
        z = float((virial.value[i] - exact[i]) / virial.standard_error[i])
        judge("bias", z, 2 * stats.t.sf(abs(z), virial.chains - 1), 2)


def test_modes_that_chains_do_not_cross_between_are_found(stuck):
    assert not stuck.ok
    assert "superchains disagree on the weights of the modes" in stuck.reason
    assert "annealed" in stuck.reason
    assert stuck.nested_r_hat > 1.5
    assert float(stuck.occupancy.max() - stuck.occupancy.min()) > 0.9
    assert torch.allclose(stuck.modes.abs(), torch.tensor([[4.0, 0.0], [4.0, 0.0]]), atol=0.3)
    assert math.isfinite(stuck.weight_gap.sd.sum())
    assert stuck.stein.p_value > 0.01  # blind
    assert "NOT OK" in str(stuck)


def test_modes_can_be_given():
    report = mixing_report(two_modes(), modes=torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), kernel="mala", **QUICK)
    assert not report.ok
    assert report.weight_gap is None
    assert math.isnan(report.energy_gap)


def test_wrong_weights_of_modes_that_mix_are_found():
    """Modes close enough for chains to cross, where the data have other weights."""
    law = gm.Energy(1, network=lambda y: (y[:, 0] ** 2 - 4) ** 2 / 16, base=None)
    side = 1.0 - 2.0 * (torch.rand(600, 1, generator=generator()) < 0.9)
    data = 2 * side + 0.3 * torch.randn(600, 1, generator=generator(1))
    report = mixing_report(law, data, modes=torch.tensor([[-2.0], [2.0]]), **QUICK | {"long": 300})
    assert report.mode_r_hat < 1.02
    assert float(report.weight_gap.sd[0]) == pytest.approx(-0.4, abs=0.08)
    assert any(check.name == "modes, data" and check.severity > 1 for check in report.checks), str(report)


def test_an_energy_whose_minimum_is_elsewhere_is_found():
    """A basin at (3, 0); two short steps from the data at the origin do not get there."""

    def energy(y):
        return 0.5 * (y - torch.tensor([3.0, 0.0])).square().sum(-1)

    law = gm.Energy(2, network=energy, base=None)
    data = 0.3 * torch.randn(200, 2, generator=generator())
    report = mixing_report(law, data, kernel=Chains("ula", step_size=0.4), **QUICK | {"short": 2, "long": 400})
    assert not report.ok
    assert report.nested_r_hat < 1.03, "the law itself mixes"
    assert report.energy_gap > 2
    assert report.energy_overlap < 0.3
    failed = {check.name: check.reason for check in report.checks if check.severity > 1}
    assert {"short to long", "energy gap", "energy overlap", "distance to data"} <= set(failed)
    assert "makes short chains stay near the data, and is no density of them" in failed["short to long"]
    assert "persistent=True" in failed["energy gap"]


def test_a_sampler_that_is_no_density_is_found():
    """Two short unadjusted steps from the data hardly leave it, whatever the energy: the long run is elsewhere."""
    objective = Contrastive(kernel="ula", persistent=False, transitions=2, step_size=0.05)
    model = gm.Energy(2, objective=objective, hidden_features=(32,))
    gm.fit(model, ring(512), max_epochs=8, batch_size=128, seed=0, progress_bar=False, learning_rate=1e-2)
    report = mixing_report(model.freeze(), ring(300, seed=5), **QUICK)
    assert not report.ok
    assert {"distance to data"} <= {check.name for check in report.checks if check.severity > 1}, str(report)
    radius = report.draws.norm(dim=-1)
    assert float(((radius - 2).abs() < 0.4).double().mean()) < 0.5


@pytest.mark.slow
def test_a_density_that_was_learned_is_ok():
    model = gm.Energy(2, objective="nce", hidden_features=(64, 64))
    gm.fit(model, ring(4000), max_epochs=60, batch_size=256, seed=0, progress_bar=False, learning_rate=2e-3)
    report = mixing_report(model.freeze(), ring(500, seed=5), seed=0)
    assert report.ok, str(report)
    radius = report.draws.norm(dim=-1)
    assert float(((radius - 2).abs() < 0.4).double().mean()) > 0.95


@pytest.mark.slow
def test_a_law_that_mixes_is_called_ok_whatever_the_seed():
    """Of thirty reports of a good law at most one is in error."""
    model, data = gaussian(), of_gaussian(300)
    reports = [mixing_report(model, data, **QUICK | {"seed": seed}) for seed in range(30)]
    assert sum(not report.ok for report in reports) <= 1, [report.reason for report in reports if not report.ok]


@pytest.mark.slow
def test_the_default_report_of_many_features():
    """In 20 dimensions, where the divergence is estimated, of a law with correlations."""
    factor = torch.eye(20) + 0.3 * torch.randn(20, 20, generator=generator()).tril(-1)
    inverse = torch.linalg.inv(factor)
    law = gm.Energy(20, network=lambda y: 0.5 * (y @ inverse.mT).square().sum(-1), base=None)
    data = torch.randn(500, 20, generator=generator(1)) @ factor.mT
    report = mixing_report(law, data, seed=0)
    assert report.ok, str(report)


# -- what a report is attached to, and what it takes ------------------------------------------------------------------


def test_the_report_stays_with_its_law_until_the_model_is_fitted(tmp_path):
    model = gm.Energy(2, hidden_features=(8,))
    law = model()
    assert law.report is None
    report = mixing_report(law, **BRIEF)
    assert law.report is report
    assert model.report is report
    assert model().report is report
    copied = copy.deepcopy(model)
    assert copied.report is report
    gm.save(model, tmp_path / "energy.safetensors")
    loaded = gm.load(tmp_path / "energy.safetensors")
    x = torch.randn(5, 2)
    assert torch.equal(loaded().log_prob(x), law.log_prob(x))
    assert loaded.report is None
    assert set(model.state_dict()) == set(loaded.state_dict())
    gm.fit(model, torch.randn(64, 2), max_epochs=1, progress_bar=False)
    assert model.report is None
    assert law.report is None
    again = pickle.loads(pickle.dumps(report))
    assert str(again) == str(report)


def test_a_law_at_a_context_has_a_report_of_its_own():
    def energy(y, c):
        return 0.5 * ((y - c) / 0.5).square().sum(-1)

    model = gm.Energy(1, context_features=1, network=energy, base=None)
    law = model(torch.tensor([3.0]))
    report = mixing_report(law, 3 + torch.randn(100, 1, generator=generator()) / 2, **QUICK)
    assert report.ok, str(report)
    assert float(report.draws.mean()) == pytest.approx(3, abs=0.1)
    assert law.report is report
    assert model(torch.zeros(1)).report is None
    with pytest.raises(ShapeError, match="batch shape"):
        mixing_report(model(torch.zeros(4, 1)))
    with pytest.raises(TypeError, match="context"):
        mixing_report(model)


def test_draws_are_in_the_users_units():
    model = gm.Energy(1, network=lambda y: 0.5 * y[:, 0] ** 2, support=torch.distributions.constraints.positive)
    model.standardize(torch.randn(500, 1, generator=generator()).exp() * 100)
    report = mixing_report(model, model().sample((100,)), **BRIEF)
    assert bool((report.draws > 0).all())
    assert 30 < float(report.draws.median()) < 300
    with pytest.raises(SupportError):
        mixing_report(model, -torch.ones(100, 1), **BRIEF)


def test_a_seed_repeats_a_report_and_leaves_the_stream_alone(good):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = mixing_report(gaussian(), of_gaussian(300), **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.draws, good.draws)
    assert str(again) == str(good)


def test_large_energies_are_warned_of():
    model = gm.Energy(1, network=lambda y: 1e7 + 0.5 * y[:, 0] ** 2, base=None)
    with pytest.warns(UserWarning, match=r"model\.double\(\)"):
        report = mixing_report(model, kernel="mala", **BRIEF)
    assert report.rounding == pytest.approx(0.6, abs=0.01)
    rounded = next(check for check in report.checks if check.name == "rounding")
    assert rounded.severity > 1
    assert "model.double()" in rounded.reason
    assert mixing_report(model.double(), kernel="mala", **BRIEF).rounding < 1e-8


def test_an_energy_with_kinks_has_no_curvature_identity():
    network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    report = mixing_report(gm.Energy(2, network=network), **BRIEF)
    assert "curvature" not in report.identities
    assert all(check.severity <= 1 for check in report.checks if "identity" in check.name), str(report)


def test_bad_input_of_reports():
    model = gaussian()
    with pytest.raises(TypeError, match="law"):
        mixing_report(torch.distributions.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="law: got Ising, needs a continuous energy"):
        mixing_report(gm.shape.Ising(2, 0.3)())
    with pytest.raises(ValueError, match="kernel: got 'nuts'"):
        mixing_report(model, kernel="nuts")
    with pytest.raises(ValueError, match="superchains: got 64 and 5"):
        mixing_report(model, superchains=5)
    with pytest.raises(ValueError, match="short, long"):
        mixing_report(model, short=100, long=50)
    with pytest.raises(ShapeError, match=r"data: got shape \(5, 2\)"):
        mixing_report(model, torch.zeros(5, 2))
    with pytest.raises(ShapeError, match="modes"):
        mixing_report(model, modes=torch.zeros(1, 2))
    with pytest.raises(SupportError, match="NaN"):
        mixing_report(model, torch.full((50, 2), torch.nan))
    nowhere = gm.Energy(1, network=lambda y: y[:, 0] * torch.inf, base=None)
    with pytest.raises(SamplingError, match="found no finite energy"):
        mixing_report(nowhere, kernel="mala", **BRIEF)


# -- ArviZ and the picture --------------------------------------------------------------------------------------------


def test_arviz_reads_a_report(stuck, tmp_path):
    data = to_inference_data(stuck)
    assert set(data.groups()) == {"posterior", "sample_stats", "observed_data", "constant_data"}
    assert data["posterior"]["x"].shape == (32, 100, 2)
    names = {"energy", "lp", "acceptance_rate", "diverging", "n_steps", "step_size"}
    assert set(data["sample_stats"].data_vars) == names
    assert data["observed_data"]["energy"].shape == (300,)
    assert data["constant_data"]["occupancy"].shape == (4, 2)
    assert data["posterior"].attrs["verdict"] == "not ok"
    assert "superchains disagree" in data["sample_stats"].attrs["reason"]
    assert data["posterior"].attrs["superchains"] == 4
    assert az.bfmi(data).shape == (32,)
    assert float(az.rhat(data)["x"][0]) > 1.1
    assert list(az.summary(data).index) == ["x[0]", "x[1]"]
    assert az.plot_energy(data) is not None
    plt.close("all")
    data.to_netcdf(tmp_path / "report.nc")
    assert az.from_netcdf(tmp_path / "report.nc")["posterior"].attrs["reason"] == stuck.reason
    with pytest.raises(ValueError, match="leave it out"):
        to_inference_data(stuck, model=lambda: None)


def test_energies_of_arviz_are_those_of_the_hamiltonian(good):
    """H = U + kinetic energy, with mean U + d/2."""
    kinetic = good.sample_stats["energy"] - good.energies["long"].reshape(32, 100).roll(1, 1)
    assert float(kinetic[:, 1:].mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(-good.sample_stats["lp"].flatten(), good.energies["long"])


@pytest.mark.parametrize("name", ["good", "stuck"])
def test_the_picture(name, request):
    report = request.getfixturevalue(name)
    figure = plot_energy_gap(report)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["data", "20 transitions", "100 transitions"]
    assert right.get_ylabel() == ("weights of modes" if name == "stuck" else "energy: mean and sd")
    assert figure.get_suptitle() == ("ok" if name == "good" else f"not ok: {report.worst.name}")
    plt.close(figure)
