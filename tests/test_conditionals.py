"""Truth of the conditional heads: integrals, sums, scipy's functions, torch's laws, samples against densities.

One table of heads; every law is asked of every head that has it. Mixtures draw their parameters at random, wide enough
that components overlap in some rows and are far apart in others.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import special, stats
from torch import Tensor
from torch import distributions as td
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_genmods.factorize.conditionals import Bernoulli, Categorical, Conditional, soft_floor, undo_soft_floor
from pyro_genmods.factorize.discretized import DiscretizedLogisticMixture
from pyro_genmods.factorize.mixed import Mixed
from pyro_genmods.factorize.mixtures import GaussianMixture, LogisticMixture, Mixture
from pyro_genmods.factorize.spline import Spline
from pyro_genmods.factorize.student import StudentMixture
from pyro_genmods.foundation.errors import DensityError, ShapeError
from pyro_genmods.foundation.numerics import chandrupatla, log_ndtr, normal_quantile

from .statistics import assert_counts, assert_law

DOUBLE = torch.float64
CONTINUOUS = [
    GaussianMixture(1),
    GaussianMixture(5),
    LogisticMixture(1),
    LogisticMixture(4),
    *(StudentMixture(k, nu) for nu in (1, 2, 3, 4) for k in (1, 3)),
    Spline(8),
    Spline(1, bound=2.0),
]
DISCRETE = [
    Bernoulli(),
    Categorical(1),
    Categorical(7),
    DiscretizedLogisticMixture(2, 1),
    DiscretizedLogisticMixture(11, 3),
    DiscretizedLogisticMixture(256, 5),
]
MIXED = Mixed((GaussianMixture(2), Bernoulli(), GaussianMixture(2), StudentMixture(1, 2), Categorical(4), Bernoulli()))
ALL = [*CONTINUOUS, *DISCRETE]


def each(heads):
    """Parametrise a test with heads."""
    return pytest.mark.parametrize("head", heads, ids=str)


def draw(head: Conditional, *shape: int, scale: float = 1.0, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    """Random parameters around a start that depends on the head."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, head.size, generator=generator, dtype=DOUBLE).to(dtype)


def values(head: Conditional, *shape: int, dtype: torch.dtype = DOUBLE, seed: int = 1) -> Tensor:
    """Values over the bulk and the tails of a head."""
    generator = torch.Generator().manual_seed(seed)
    if head.discrete:
        return torch.randint(0, head.levels, shape, generator=generator).to(dtype)
    return 3 * torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)


def derivative(f, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# -- normal tails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_log_ndtr_is_scipys(dtype):
    """To rounding of the argument, which the tails amplify by ``x**2``."""
    x = torch.cat([torch.linspace(-150, 8, 4001), torch.linspace(-1, 1, 1001)]).to(dtype)
    truth = torch.from_numpy(special.log_ndtr(x.double().numpy()))
    error = (log_ndtr(x).double() / truth - 1).abs()
    assert (error <= torch.finfo(dtype).eps * (8 + x.clamp_min(0) ** 2)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 2e-14), (torch.float32, 1e-6)])
def test_normal_quantile_is_scipys_in_both_tails(dtype, tolerance):
    """Down to log-probabilities of -10 000, and against scipy's inverse of what the dtype can say."""
    z = torch.cat([torch.linspace(-141, 141, 2001), torch.linspace(-6, 6, 2001)]).double()
    lower = torch.from_numpy(special.log_ndtr(z.numpy())).to(dtype)
    upper = torch.from_numpy(special.log_ndtr(-z.numpy())).to(dtype)
    truth = special.ndtri_exp(torch.minimum(lower, upper).double().numpy())
    truth = torch.where(lower <= upper, 1, -1) * torch.from_numpy(truth)
    result = normal_quantile(lower, upper)
    assert result.dtype is dtype
    assert torch.allclose(result.double(), truth, rtol=tolerance, atol=tolerance)
    ends = torch.tensor([0.0, -torch.inf], dtype=dtype)
    assert normal_quantile(ends, ends.flip(0)).tolist() == [math.inf, -math.inf]


def test_normal_quantile_has_three_derivatives():
    r"""Of :math:`z(t)`, :math:`\log \Phi(z) = t`: :math:`z' = 1/m` with :math:`m = \varphi/\Phi`, and so on."""
    z = torch.tensor([-60.0, -8.0, -3.3, -1.0, -0.1, 0.3], dtype=DOUBLE)
    m = torch.exp(-z.square() / 2 - math.log(2 * math.pi) / 2 - log_ndtr(z))
    second = (z + m) / m**2
    dm = -m * (z + m)
    third = ((1 + dm) / m**2 - 2 * (z + m) * dm / m**3) / m
    t = log_ndtr(z).requires_grad_()
    results, value = [], normal_quantile(t, torch.log(-torch.expm1(t)))
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), t, create_graph=True)
        results.append(value)
    for result, truth in zip(results, (1 / m, second, third), strict=True):
        assert torch.allclose(result, truth, rtol=1e-9)


def test_fixed_number_of_steps_finds_the_same_root():
    y = torch.linspace(-3, 3, 50, dtype=DOUBLE)
    lower, upper = torch.full_like(y, -9.0), torch.full_like(y, 9.0)
    root = chandrupatla(torch.sinh, y, lower, upper, 60, stop=False)
    assert torch.allclose(root, torch.asinh(y), rtol=1e-13, atol=1e-14)
    edge = chandrupatla(lambda x: x, y, y + 1e-16, y - 1e-13, 20)  # an upper end that misses the root by rounding
    assert torch.allclose(edge, y, rtol=0, atol=1e-12)


# -- densities --------------------------------------------------------------------------------------------------------


@each(CONTINUOUS)
def test_density_integrates_to_one(head):
    """Trapezoid in ``s`` with ``x = sinh(s)``, which reaches Cauchy tails of 1e-17."""
    s = torch.linspace(-40, 40, 100_001, dtype=DOUBLE)
    p = draw(head, 3, 1)
    mass = torch.trapezoid(head.log_prob(p, s.sinh()).exp() * s.cosh(), s)
    assert torch.allclose(mass, torch.ones_like(mass), rtol=0, atol=1e-6 if isinstance(head, Spline) else 1e-12)


@each(DISCRETE)
def test_masses_sum_to_one_and_to_the_distribution_function(head):
    p = draw(head, 50, scale=2.0)
    levels = torch.arange(head.levels, dtype=DOUBLE)
    log_probs = head.log_probs(p)
    assert log_probs.shape == (50, head.levels)
    assert torch.allclose(log_probs.logsumexp(-1), torch.zeros(50, dtype=DOUBLE), atol=1e-12)
    assert torch.allclose(head.log_prob(p[:, None], levels), log_probs, rtol=1e-12)
    lower, upper = head.log_cdf(p[:, None], levels)
    assert torch.allclose(lower.exp(), log_probs.exp().cumsum(-1), atol=1e-12)
    assert torch.allclose(lower.exp() + upper.exp(), torch.ones_like(lower), atol=1e-12)
    single = head.log_probs(p.float()).double()
    assert torch.allclose(single, log_probs, rtol=1e-4, atol=1e-4)  # narrow components too: nothing cancels


@each(DISCRETE)
def test_what_is_no_level_has_no_mass(head):
    p = draw(head, 1)
    outside = torch.tensor([-1.0, head.levels, 0.5, -math.inf, math.inf, math.nan], dtype=DOUBLE)
    assert (head.log_prob(p, outside) == -math.inf).all()
    gradient = derivative(lambda p: head.log_prob(p, values(head, 4)) + head.log_prob(p, outside[:4]).exp(), p)
    assert gradient.isfinite().all()
    lower, upper = head.log_cdf(p, torch.tensor([-1.0, head.levels - 1, head.levels + 3], dtype=DOUBLE))
    assert lower.tolist() == [-math.inf, 0, 0] and upper.tolist() == [0, -math.inf, -math.inf]


@each(DISCRETE)
def test_discrete_values_of_every_dtype(head):
    p, x = draw(head, 20), values(head, 20)
    expected, pit = head.log_prob(p, x), head.pit(p, x, torch.full_like(x, 0.25))
    for dtype in (torch.float32, torch.int64, torch.uint8) + ((torch.bool,) if head.levels == 2 else ()):
        assert torch.equal(head.log_prob(p, x.to(dtype)), expected)
        assert torch.allclose(head.pit(p, x.to(dtype), torch.full_like(x, 0.25)), pit)
        assert torch.equal(head.embed(x.to(dtype), DOUBLE), head.embed(x))


@pytest.mark.parametrize("family", ["gaussian", "logistic", "student"])
def test_mixtures_are_torchs(family):
    head = {"gaussian": GaussianMixture(4), "logistic": LogisticMixture(4), "student": StudentMixture(4, 3)}[family]
    p, x = draw(head, 30), values(head, 30)
    log_w, m, log_s = head.components(p)
    base = {
        "gaussian": lambda: td.Normal(m, log_s.exp()),
        "logistic": lambda: td.TransformedDistribution(
            td.Uniform(torch.zeros_like(m), torch.ones_like(m)),
            [td.SigmoidTransform().inv, td.AffineTransform(m, log_s.exp())],
        ),
        "student": lambda: td.StudentT(3.0, m, log_s.exp()),
    }[family]()
    mixture = td.MixtureSameFamily(td.Categorical(logits=log_w), base, validate_args=False)
    assert torch.allclose(head.log_prob(p, x), mixture.log_prob(x), rtol=1e-10)


def test_bernoulli_and_categorical_are_torchs():
    for head, law in (
        (Bernoulli(), lambda p: td.Bernoulli(logits=p[..., 0])),
        (Categorical(7), lambda p: td.Categorical(logits=p)),
    ):
        p, x = draw(head, 40), values(head, 40)
        assert torch.allclose(head.log_prob(p, x), law(p).log_prob(x), rtol=1e-12)


def test_discretized_logistic_is_a_difference_of_sigmoids():
    head = DiscretizedLogisticMixture(5, 1)
    m, s = 0.3, 0.2
    p = torch.tensor(
        [0.0, m, float(undo_soft_floor(torch.tensor(math.log(s), dtype=DOUBLE), head.FLOOR))], dtype=DOUBLE
    )
    edges = torch.tensor([-math.inf, -0.75, -0.25, 0.25, 0.75, math.inf], dtype=DOUBLE)
    assert torch.allclose(head.log_probs(p).exp(), torch.sigmoid((edges - m) / s).diff(), rtol=1e-12)


@each(CONTINUOUS)
def test_density_is_the_derivative_of_the_distribution_function(head):
    p, x = draw(head, 200), values(head, 200)
    assert torch.allclose(derivative(lambda x: head.cdf(p, x), x), head.log_prob(p, x).exp(), rtol=1e-8, atol=1e-12)
    score = head.normal_score(p, x)
    slope = derivative(lambda x: head.normal_score(p, x), x)
    change = -0.5 * score.square() - 0.5 * math.log(2 * math.pi) + slope.log()
    assert torch.allclose(change, head.log_prob(p, x), rtol=1e-8, atol=1e-9)


# -- Student ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [1, 2, 3, 4])
def test_student_is_scipys(nu):
    head, law = StudentMixture(1, nu), stats.t(nu)
    p = torch.zeros(3, dtype=DOUBLE)
    t = torch.cat([torch.linspace(-30, 30, 601, dtype=DOUBLE), -torch.logspace(0, 8, 65, dtype=DOUBLE)])
    assert torch.allclose(head.cdf(p, t), torch.from_numpy(law.cdf(t.numpy())), rtol=1e-12, atol=0)
    assert torch.allclose(head.log_prob(p, t), torch.from_numpy(law.logpdf(t.numpy())), rtol=1e-12)
    u = torch.cat([torch.logspace(-60, -0.302, 301, dtype=DOUBLE), torch.linspace(0.5, 1 - 1e-12, 101, dtype=DOUBLE)])
    truth = torch.from_numpy(law.ppf(u.numpy()))
    moderate = u > 1e-12  # scipy's own inverse loses digits further out
    assert torch.allclose(head.icdf(p, u)[moderate], truth[moderate], rtol=1e-9, atol=1e-12)
    assert torch.allclose(torch.from_numpy(law.cdf(head.icdf(p, u).numpy())), u, rtol=1e-9)


# -- quantiles --------------------------------------------------------------------------------------------------------


@each(CONTINUOUS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-9), (torch.float32, 1e-4)])
def test_quantile_inverts_the_distribution_function(head, dtype, tolerance):
    u = torch.cat([torch.logspace(-6, -1, 30), torch.linspace(0.1, 0.9, 41), 1 - torch.logspace(-6, -1, 30)])
    u = u.clamp(1e-6, 1 - 1e-6).to(dtype)
    p = draw(head, 40, 1, dtype=dtype)
    x = head.icdf(p, u)
    assert x.dtype is dtype and x.shape == (40, 101)
    assert torch.allclose(head.cdf(p, x), u, rtol=0, atol=tolerance)


@each(CONTINUOUS)
@pytest.mark.parametrize(("dtype", "reach", "tolerance"), [(DOUBLE, 30.0, 1e-11), (torch.float32, 10.0, 1e-3)])
def test_normal_score_inverts_the_quantile_in_the_tails(head, dtype, reach, tolerance):
    z = torch.linspace(-reach, reach, 61, dtype=dtype)
    p = draw(head, 40, 1, dtype=dtype)
    x = head.quantile(p, z)
    assert x.isfinite().all() and (x.diff() > 0).all()
    assert torch.allclose(head.normal_score(p, x), z, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("k", [2, 8])
@each([GaussianMixture, LogisticMixture, StudentMixture])
def test_no_root_is_missed_with_scales_from_1e_4_to_1e9(head, k):
    head = head(k)
    p = draw(head, 2000) * torch.tensor([3.0, 10.0, 3.0], dtype=DOUBLE).repeat_interleave(k)
    z = 3 * torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    assert torch.allclose(head.normal_score(p, head.quantile(p, z)), z, rtol=0, atol=1e-9)


def test_one_gaussian_is_exact():
    head, p = GaussianMixture(1), draw(GaussianMixture(1), 50)
    _, m, log_s = head.components(p)
    x = values(head, 50)
    assert torch.allclose(head.normal_score(p, x), (x - m[:, 0]) / log_s.exp()[:, 0], rtol=1e-14)
    assert torch.allclose(head.quantile(p, x), m[:, 0] + log_s.exp()[:, 0] * x, rtol=1e-14)


@each(DISCRETE)
def test_discrete_quantile_counts_levels_below(head):
    p = draw(head, 40, 1, scale=2.0)
    z = torch.cat([torch.linspace(-12, 12, 121, dtype=DOUBLE), torch.linspace(-2, 2, 81, dtype=DOUBLE)])
    lower, upper = head.log_cdf(p[..., None, :], torch.arange(head.levels, dtype=DOUBLE))
    reached = torch.where(z[:, None] < 0, lower >= log_ndtr(z)[:, None], upper <= log_ndtr(-z)[:, None])
    x = head.quantile(p, z)
    assert x.dtype is (torch.int64 if head.integer else DOUBLE)
    assert torch.equal(x.double(), (~reached).double().sum(-1))


# -- samples ----------------------------------------------------------------------------------------------------------


@each(CONTINUOUS)
def test_samples_follow_the_density(head):
    """Against the quadrature of the density, tempered or not, and through the integral transform."""
    p = draw(head)
    for temperature in (1.0, 0.5):
        q = head.tempered(p, temperature)
        x = head.sample(q.expand(4000, -1))
        s = torch.linspace(-40, 40, 40_001, dtype=DOUBLE)
        density = head.log_prob(q, s.sinh()).exp() * s.cosh()
        cdf = torch.cumulative_trapezoid(density, s)

        def table(x: Tensor, s: Tensor = s, cdf: Tensor = cdf) -> Tensor:
            index = torch.searchsorted(s, x.asinh()).clamp(2, len(s) - 1)
            weight = (x.asinh() - s[index - 1]) / (s[1] - s[0])
            return torch.lerp(cdf[index - 2], cdf[index - 1], weight).clamp(0, 1)

        assert_law(x, table, f"{head} at temperature {temperature}")
    assert_law(head.pit(p, head.sample(p.expand(4000, -1)), torch.rand(4000, dtype=DOUBLE)), lambda u: u, f"{head} pit")


@each(DISCRETE)
def test_samples_follow_the_masses(head):
    p = draw(head)
    for temperature in (1.0, 2.0):
        q = head.tempered(p, temperature)
        x = head.sample(q.expand(6000, -1))
        assert head.support.check(x).all()
        if head.levels > 1:
            counts = torch.bincount(x.long(), minlength=head.levels)
            assert_counts(counts, head.log_probs(q).exp(), f"{head} at temperature {temperature}")
    u = head.pit(q, x, torch.rand(6000, dtype=DOUBLE))
    assert_law(u, lambda u: u, f"{head} pit")


# -- derivatives and transformations ----------------------------------------------------------------------------------


@each(ALL)
def test_first_and_second_derivatives(head):
    p, x = draw(head, 3).requires_grad_(), values(head, 3)
    if head.discrete:
        functions, inputs = [lambda p: head.log_prob(p, x), lambda p: head.log_cdf(p, x)[0].exp()], (p,)
    else:
        functions, inputs = [head.log_prob, head.normal_score, head.log_cdf], (p, x.requires_grad_())
    for f in functions:
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@each([GaussianMixture(3), StudentMixture(2, 3), LogisticMixture(2)])
def test_derivatives_of_the_score_far_out(head):
    p, x = draw(head, 4).requires_grad_(), torch.tensor([-40.0, -15.0, 12.0, 30.0], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(head.normal_score, (p, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(head.normal_score, (p, x), fast_mode=True)


def record(f, *inputs: Tensor):
    return make_fx(lambda *inputs: f(*inputs))(*inputs)


def functions_of(head: Conditional) -> dict:
    """Every method of two arguments, as a function of parameters and a value or a score."""
    methods = {"log_prob": head.log_prob, "log_cdf": head.log_cdf, "cdf": head.cdf, "quantile": head.quantile}
    methods["icdf"] = lambda p, x: head.icdf(p, 0.01 + 0.98 * torch.sigmoid(x))
    methods["pit"] = lambda p, x: head.pit(p, x, torch.sigmoid(x))
    methods["embed"] = lambda p, x: head.embed(x)
    methods["tempered"] = lambda p, x: head.tempered(p, 0.7)
    if head.discrete:
        methods["log_probs"] = lambda p, x: head.log_probs(p)
        methods["gradient"] = lambda p, x: torch.func.grad(lambda p: head.log_prob(p, x).sum())(p)
    else:

        def score(p, x):
            return head.normal_score(p, x).sum()

        methods["normal_score"] = head.normal_score
        methods["gradient"] = torch.func.grad(score, argnums=(0, 1))
        methods["hessian"] = lambda p, x: torch.func.grad(lambda p: torch.func.grad(score, 1)(p, x).sum())(p)
    return methods


@each(ALL)
def test_runs_under_vmap(head):
    p, x = draw(head, 5), values(head, 5)
    for name, f in functions_of(head).items():
        torch.testing.assert_close(
            torch.vmap(f)(p, x), f(p, x), rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.vmap(head.sample, randomness="different")(p).shape == x.shape


@each(
    [
        GaussianMixture(1),
        LogisticMixture(3),
        StudentMixture(2, 3),
        StudentMixture(2, 4),
        Spline(3),
        *DISCRETE[:5],
        MIXED,
    ]
)
def test_runs_under_make_fx(head, monkeypatch):
    """Recordings are made on other numbers than those that they are asked about."""
    monkeypatch.setattr(Mixture, "STEPS", 6)  # recording is slow; two runs of six steps agree, wherever they got
    p, x = mixed_case() if head is MIXED else (draw(head, 5), values(head, 5))
    refused = {"normal_score", "log_probs"} if head is MIXED else set()
    for name, f in functions_of(head).items():
        if name not in {"icdf", "hessian", *refused}:  # icdf is quantile, and a check of its own
            result = record(f, p.flip(0) / 2, x.flip(0))(p, x)
            torch.testing.assert_close(result, f(p, x), rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_make_fx_records_vmap_of_second_derivatives():
    head = LogisticMixture(2)
    p, x, f = draw(head, 5), values(head, 5), torch.vmap(functions_of(LogisticMixture(2))["hessian"])
    torch.testing.assert_close(record(f, p.flip(0) / 2, x.flip(0))(p, x), f(p, x), rtol=1e-9, atol=1e-9)


def test_probabilities_cannot_be_checked_in_a_recording():
    head = LogisticMixture(1)
    p, u = draw(head, 5), torch.linspace(0.1, 0.9, 5, dtype=DOUBLE)
    assert torch.equal(record(head.icdf, p, u.flip(0))(p, u), head.icdf(p, u))
    assert torch.vmap(head.icdf)(p, 2 * u)[-1].isnan()


def test_a_root_does_not_depend_on_the_rest_of_the_batch():
    head = GaussianMixture(4)
    p, z = draw(head, 100, scale=2.0), torch.linspace(-4, 4, 100, dtype=DOUBLE)
    assert torch.equal(head.quantile(p, z)[:7], head.quantile(p[:7], z[:7]))
    assert torch.equal(head.quantile(p, z), torch.vmap(head.quantile)(p, z))


@each(ALL)
def test_shapes_broadcast_and_dtypes_stay(head):
    for dtype in (torch.float32, DOUBLE):
        p, x = draw(head, 4, 1, dtype=dtype), values(head, 3, dtype=dtype)
        results = [head.log_prob(p, x), *head.log_cdf(p, x), head.cdf(p, x), head.pit(p, x, torch.rand_like(x))]
        assert all(r.shape == (4, 3) and r.dtype is dtype for r in results)
        assert head.quantile(p, torch.randn(3, dtype=dtype)).shape == (4, 3)
        assert head.sample(p).shape == (4, 1)
        assert head.embed(x).shape == (3, head.inputs) and head.embed(x).dtype is dtype
        assert head.tempered(p, 2.0).shape == p.shape
        assert head.log_prob(p[:0], x[None, :0]).shape == (0, 0) and head.quantile(p[:0], x[:0]).shape == (0, 0)
        assert not head.quantile(p.requires_grad_(), torch.zeros(3, dtype=dtype)).requires_grad
    assert head.head_of(3) is head and head == head and hash(head) == hash(type(head)(*vars(head).values()))


# -- temperature ------------------------------------------------------------------------------------------------------


@each([*ALL, MIXED])
def test_temperature_one_is_the_identity(head):
    p, x = mixed_case() if head is MIXED else (draw(head, 30), values(head, 30))
    assert torch.allclose(head.log_prob(head.tempered(p, 1.0), x), head.log_prob(p, x), rtol=1e-10)


@each([Bernoulli(), Categorical(7)])
def test_tempered_logits_are_powers(head):
    p = draw(head, 30)
    for temperature in (0.3, 2.0):
        power = (head.log_probs(p) / temperature).log_softmax(-1)
        assert torch.allclose(head.log_probs(head.tempered(p, temperature)), power, rtol=1e-10)


def test_tempered_gaussians_are_powers_and_logistic_tails_too():
    head, x = GaussianMixture(1), torch.linspace(-4, 4, 9, dtype=DOUBLE)
    p = draw(head)
    ratio = head.log_prob(head.tempered(p, 0.4), x) - head.log_prob(p, x) / 0.4
    assert torch.allclose(ratio, ratio[:1], rtol=1e-10)
    head, x = LogisticMixture(1), torch.linspace(200, 300, 5, dtype=DOUBLE)
    ratio = head.log_prob(head.tempered(p, 0.4), x) - head.log_prob(p, x) / 0.4
    assert torch.allclose(ratio, ratio[:1], rtol=1e-10)
    head = Spline(4)
    p, x = draw(head), values(head, 20)
    assert torch.allclose(head.normal_score(head.tempered(p, 0.25), x), 2 * head.normal_score(p, x), rtol=1e-10)


def test_soft_floor_and_its_inverse():
    raw = torch.linspace(-15, 20, 71, dtype=DOUBLE)
    value = soft_floor(raw, -9.0)
    assert (
        (value >= -9).all()
        and (value.diff() > 0).all()
        and float(soft_floor(torch.zeros(1, dtype=DOUBLE), -9.0)) == pytest.approx(0, abs=1e-14)
    )
    assert torch.allclose(undo_soft_floor(value, -9.0)[raw > -14], raw[raw > -14], rtol=1e-9)
    assert undo_soft_floor(torch.tensor([-50.0]), -9.0).isfinite().all()


# -- starts, what networks see ----------------------------------------------------------------------------------------


@each(ALL)
def test_start_is_sensible(head):
    bias = torch.tensor(head.start(), dtype=DOUBLE)
    assert bias.shape == (head.size,)
    if isinstance(head, Bernoulli | Categorical):
        assert torch.allclose(head.log_probs(bias).exp(), torch.full((head.levels,), 1 / head.levels, dtype=DOUBLE))
    elif head.discrete:
        assert (head.log_probs(bias) > math.log(0.2 / head.levels)).all()
    else:
        z = torch.tensor([-1.0, -0.6745, 0.0, 0.6745, 1.0], dtype=DOUBLE)
        assert torch.allclose(head.quantile(bias, z), z, atol=0.35)


def test_spline_of_zeros_is_the_standard_normal():
    head, x = Spline(8), torch.linspace(-9, 9, 91, dtype=DOUBLE)
    p = torch.zeros(head.size, dtype=DOUBLE)
    assert torch.allclose(head.normal_score(p, x), x, atol=1e-13)
    assert torch.allclose(head.log_prob(p, x), td.Normal(0.0, 1.0).log_prob(x), atol=1e-12)


def test_spline_is_once_differentiable_at_its_ends():
    head, p = Spline(6), draw(Spline(6))
    for end in (-5.0, 5.0):
        x = torch.tensor([end - 1e-9, end + 1e-9], dtype=DOUBLE)
        y, slope = head.normal_score(p, x), head.log_prob(p, x)
        assert torch.allclose(y[0], y[1], atol=1e-6) and torch.allclose(slope[0], slope[1], atol=1e-5)


def test_what_networks_see():
    assert Bernoulli().embed(torch.tensor([0, 1])).tolist() == [[-1.0], [1.0]]
    assert Categorical(3).embed(torch.tensor([0, 2]), DOUBLE).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert DiscretizedLogisticMixture(3, 1).embed(torch.tensor([0.0, 1.0, 2.0])).flatten().tolist() == [-1, 0, 1]
    assert GaussianMixture(1).embed(torch.tensor([3.0])).tolist() == [[3.0]]
    assert StudentMixture(1).embed(torch.tensor([1e6])).abs().max() < 20


# -- mixed columns ----------------------------------------------------------------------------------------------------


def mixed_case(rows: int = 7) -> tuple[Tensor, Tensor]:
    columns = range(len(MIXED.conditionals))
    x = torch.stack([values(MIXED.head_of(t), rows, seed=t) for t in columns], -1)
    return draw(MIXED, rows, len(columns)), x


def test_mixed_is_its_columns_one_by_one():
    p, x = mixed_case()
    z, v = torch.randn_like(x), torch.rand_like(x)
    assert (MIXED.size, MIXED.inputs, MIXED.levels, MIXED.discrete) == (6, 4, None, True)
    assert MIXED.discrete_columns == (1, 4, 5)
    results = {
        "log_prob": MIXED.log_prob(p, x),
        "cdf": MIXED.cdf(p, x),
        "quantile": MIXED.quantile(p, z),
        "pit": MIXED.pit(p, x, v),
    }
    lower, upper = MIXED.log_cdf(p, x)
    for t, head in enumerate(MIXED.conditionals):
        q = p[:, t, : head.size]
        arguments = {"log_prob": (x,), "cdf": (x,), "quantile": (z,), "pit": (x, v)}
        for name, result in results.items():
            alone = getattr(head, name)(q, *(a[:, t] for a in arguments[name]))
            torch.testing.assert_close(result[:, t], alone.double(), rtol=1e-13, atol=1e-13, msg=name)
        assert torch.equal(lower[:, t], head.log_cdf(q, x[:, t])[0])
        assert torch.equal(upper[:, t], head.log_cdf(q, x[:, t])[1])
        seen = MIXED.embed(x)[:, t]
        assert torch.equal(seen[:, : head.inputs], head.embed(x[:, t])) and not seen[:, head.inputs :].any()
        assert torch.equal(MIXED.tempered(p, 0.5)[:, t, : head.size], head.tempered(q, 0.5))
        assert MIXED.start()[t][: head.size] == head.start()
    assert MIXED.support.event_dim == 1 and MIXED.support.check(MIXED.sample(p)).all()
    assert not MIXED.support.check(x.index_fill(1, torch.tensor([1]), 2.0)).any()


def test_mixed_of_one_kind():
    table = Mixed([Bernoulli(), Categorical(3)])
    p = draw(table, 4, 2)
    log_probs = table.log_probs(p)
    assert log_probs.shape == (4, 2, 3) and torch.equal(log_probs[:, 1], Categorical(3).log_probs(p[:, 1]))
    assert (
        torch.equal(log_probs[:, 0, :2], Bernoulli().log_probs(p[:, 0, :1])) and (log_probs[:, 0, 2] == -math.inf).all()
    )
    pair = Mixed([GaussianMixture(2)] * 3)
    p, x = draw(pair, 4, 3), values(GaussianMixture(2), 4, 3)
    assert torch.equal(pair.normal_score(p, x), GaussianMixture(2).normal_score(p, x)) and not pair.discrete


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: Categorical(0), "k"),
        (lambda: GaussianMixture(0), "k"),
        (lambda: LogisticMixture(-1), "k"),
        (lambda: StudentMixture(2, 5), "degrees_of_freedom"),
        (lambda: DiscretizedLogisticMixture(1, 2), "levels"),
        (lambda: DiscretizedLogisticMixture(4, 0), "k"),
        (lambda: Spline(0), "bins"),
        (lambda: Spline(4, bound=-1.0), "bound"),
        (lambda: Mixed([]), "conditionals"),
    ],
)
def test_bad_sizes_are_named(build, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got .*needs"):
        build()


@each([*ALL, MIXED])
def test_bad_probabilities_temperatures_and_questions(head):
    p, x = mixed_case() if head is MIXED else (draw(head, 2), values(head, 2))
    for u in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"^u: got .*needs probabilities"):
            head.icdf(p, torch.full_like(x, u))
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^temperature: got"):
            head.tempered(p, temperature)
    if head.discrete:
        with pytest.raises(DensityError, match=r"^normal_score: .*use pit"):
            head.normal_score(p, x)
    if head.levels is None:
        with pytest.raises(DensityError, match=r"^log_probs: .*use log_prob"):
            head.log_probs(p)


def test_mixed_refuses_other_columns():
    p, x = mixed_case()
    with pytest.raises(ShapeError, match=r"^x: got \(7, 5\), needs \(\.\.\., 6\)"):
        MIXED.log_prob(p, x[:, :5])
    with pytest.raises(ShapeError, match=r"^parameters: got"):
        MIXED.log_prob(p[:, :5], x)
    with pytest.raises(TypeError, match=r"^conditionals\[1\]"):
        Mixed([Bernoulli(), MIXED])
