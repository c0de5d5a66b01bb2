"""Truth of the room of flows: closed forms, zuko's own densities, inverses that invert, and gradients of inverses."""

from __future__ import annotations

import copy
import math
import signal
from contextlib import contextmanager

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import LogisticNormal, TransformedDistribution, biject_to, constraints

import pyro_genmods as gm
from pyro_genmods.coordinates import circular
from pyro_genmods.foundation.errors import DensityError, InverseError
from pyro_genmods.transform.inverse import invert, invert_with_volume
from pyro_genmods.transform.quadrature import with_ordinary_gradients
from pyro_genmods.transform.structure import context_features_of, features_of

from .laws import zuko
from .statistics import assert_counts, assert_law, assert_mean, assert_same_law

DOUBLE = torch.float64
F = zuko.flows
SMALL = {"transforms": 2, "hidden_features": (8,)}
NEURAL = {**SMALL, "signal": 4, "network": {"hidden_features": (8,)}}
FAMILIES = {
    "NSF": (F.NSF, SMALL),
    "MAF": (F.MAF, SMALL),
    "NICE": (F.NICE, SMALL),
    "RealNVP": (F.RealNVP, SMALL),
    "NAF": (F.NAF, {**SMALL, "signal": 4}),
    "UNAF": (F.UNAF, NEURAL),
    "SOSPF": (F.SOSPF, SMALL),
    "BPF": (F.BPF, {**SMALL, "degree": 8}),
    "GF": (F.GF, {"transforms": 2, "components": 4}),
    "NCSF": (F.NCSF, SMALL),
    "CNF": (F.CNF, {"hidden_features": (8,), "atol": 1e-9, "rtol": 1e-9}),
    "GMM": (zuko.mixtures.GMM, {"components": 3}),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
SOLVED = ("NAF", "UNAF", "SOSPF", "BPF", "GF")


def build(name: str, features: int = 2, context: int = 0, roughness: float = 0.2, seed: int = 0) -> nn.Module:
    """A zuko flow in float64, a little away from its initialisation; GF near the identity, where it is a law."""
    kind, options = FAMILIES[name]
    torch.manual_seed(seed)
    extra = {"hidden_features": (8,)} if context and name in ("GF", "GMM") else {}
    flow = kind(features, context=context, **options, **extra).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            if name == "GF":
                parameter.mul_(0.1)
            elif name not in ("NAF", "UNAF"):  # these are far from linear as they are, and saturate between layers
                parameter.add_(roughness * torch.randn_like(parameter))
    return flow


@contextmanager
def deadline(seconds: int):
    """Fail instead of hanging."""

    def late(*_):
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- closed forms -----------------------------------------------------------------------------------------------------


def linear_flow() -> tuple[nn.Module, Tensor, Tensor]:
    """``z = A x + b`` by an LU layer and a shift."""
    matrix = torch.tensor([[1.5, 0.3, -0.2], [0.4, 0.8, 0.1], [-0.6, 0.2, 1.2]], dtype=DOUBLE)
    shift = torch.tensor([0.5, -1.0, 2.0], dtype=DOUBLE)
    layers = [
        zuko.lazy.UnconditionalTransform(zuko.transforms.LULinearTransform, matrix),
        zuko.lazy.UnconditionalTransform(zuko.transforms.AdditiveTransform, shift),
    ]
    lower, upper = matrix.tril(), matrix.triu(1) + torch.eye(3, dtype=DOUBLE)
    return zuko.lazy.Flow(layers, F.MAF(3).base).double(), lower @ upper, shift


def masked_linear_flow() -> tuple[nn.Module, Tensor, Tensor]:
    """``z = A x + b`` by a masked autoregressive layer whose network is linear."""
    flow = F.MAF(3, transforms=1, hidden_features=(6,), activation=nn.Identity).double()
    first, _, last = flow.transform.transforms[0].hyper
    log_scale = torch.tensor([0.3, -0.4, 0.1], dtype=DOUBLE)
    with torch.no_grad():
        last.weight[1::2] = 0  # the scales do not depend on x
        last.bias[1::2] = log_scale
        weight = (last.mask * last.weight)[0::2]
        shift = weight @ first.bias + last.bias[0::2]
        clipped = log_scale / (1 + (log_scale / math.log(1e-3)).abs())
        matrix = weight @ (first.mask * first.weight) + clipped.exp().diag()
    return flow, matrix, shift


@pytest.mark.parametrize("make", [linear_flow, masked_linear_flow])
@pytest.mark.parametrize("direction", ["density", "sampling"])
def test_an_affine_flow_is_a_multivariate_normal(make, direction):
    flow, matrix, shift = make()
    if direction == "density":
        loc, factor = -torch.linalg.solve(matrix, shift), torch.linalg.inv(matrix)
    else:
        loc, factor = shift, matrix
    model = gm.Flow(flow, direction=direction)
    mean, scale = torch.tensor([3.0, -1.0, 0.0], dtype=DOUBLE), torch.tensor([2.0, 0.1, 5.0], dtype=DOUBLE)
    for standardized in (False, True):
        if standardized:  # x = mean + scale * y
            model.standardize(torch.stack([mean + scale, mean - scale]))
            loc, factor = mean + scale * loc, scale[:, None] * factor
        truth = dist.MultivariateNormal(loc, factor @ factor.T)
        law = model()
        x = truth.sample((100,)) * 1.5
        assert torch.allclose(law.log_prob(x), truth.log_prob(x), rtol=0, atol=1e-9)
        z = torch.randn(100, 3, dtype=DOUBLE)
        assert torch.allclose(law.push(z), loc + z @ factor.T, rtol=0, atol=1e-9)
        score = -torch.linalg.solve(factor @ factor.T, (x - loc).T).T
        assert torch.allclose(law.score(x), score, rtol=1e-8, atol=1e-8)
        draws = law.sample((4000,))
        assert_mean(draws, loc)
        assert_mean((draws - loc)[:, :, None] * (draws - loc)[:, None], factor @ factor.T)
        assert_law(torch.linalg.solve(factor, (draws - loc).T).T, dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0).cdf)


def identity(features: int, support: constraints.Constraint | None, event_shape: tuple[int, ...]) -> gm.Flow:
    model = gm.Flow(F.NSF(features, **SMALL).double(), support=support, event_shape=event_shape)
    assert model.start_at_identity() is True
    return model


NORMAL2 = dist.Normal(torch.zeros(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE))
NORMAL3 = dist.Normal(torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)).to_event(1)


@pytest.mark.parametrize(
    ("support", "event_shape", "truth"),
    [
        (None, (2,), NORMAL2.to_event(1)),
        (constraints.positive, (2,), dist.LogNormal(NORMAL2.loc, NORMAL2.scale).to_event(1)),
        (
            constraints.unit_interval,
            (2,),
            TransformedDistribution(NORMAL2.to_event(1), [dist.transforms.SigmoidTransform()]),
        ),
        (constraints.simplex, (3,), LogisticNormal(NORMAL2.loc, NORMAL2.scale)),
        (constraints.corr_cholesky, (3, 3), TransformedDistribution(NORMAL3, biject_to(constraints.corr_cholesky))),
        (constraints.positive, (1, 2), dist.LogNormal(NORMAL2.loc, NORMAL2.scale).expand([1, 2]).to_event(2)),
        (
            constraints.cat([constraints.real, constraints.positive], dim=-1, lengths=[1, 1]),
            (2,),
            None,
        ),
    ],
    ids=["real", "positive", "interval", "simplex", "corr_cholesky", "matrix", "mixed"],
)
def test_support_is_a_change_of_variables(support, event_shape, truth):
    features = 3 if event_shape == (3, 3) else 2
    law = identity(features, support, event_shape)()
    x = law.sample((3000,))
    if truth is None:  # one column real, one column positive
        lognormal = dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0)
        expected = NORMAL2.log_prob(x)[:, 0] + lognormal.log_prob(x[:, 1])
        assert_law(x[:, 1], lognormal.cdf)
    else:
        expected = truth.log_prob(x)
        assert_same_law(x, truth.sample((3000,)))
    assert torch.allclose(law.log_prob(x), expected, rtol=1e-9, atol=1e-6)
    assert law.support.event_dim == len(event_shape)


def test_standardisation_after_a_support_is_a_lognormal():
    model = identity(2, constraints.positive, (2,))
    data = dist.LogNormal(torch.tensor([1.0, -2.0], dtype=DOUBLE), torch.tensor([0.5, 2.0], dtype=DOUBLE)).sample(
        (500,)
    )
    model.standardize(data)
    logs = data.log()
    truth = dist.LogNormal(logs.mean(0), logs.std(0, correction=0)).to_event(1)
    assert torch.allclose(model().log_prob(data), truth.log_prob(data), rtol=1e-9, atol=1e-6)


# -- zuko's densities -------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("context", [0, 3])
def test_log_prob_is_that_of_the_raw_flow(name, context):
    flow = build(name, 2, context)
    c = torch.randn(50, 3, dtype=DOUBLE) if context else None
    x = 2 * torch.randn(50, 2, dtype=DOUBLE)
    widened = 0.0
    if name == "NCSF":  # zuko's uniform base is wider than the circle by 1e-5 at each end
        x, widened = x.remainder(2 * math.pi) - math.pi, 2 * math.log1p(1e-5 / math.pi)
    law, raw = gm.Flow(flow)(c), flow(c)
    if name == "CNF":  # the network has kinks, at which zuko's solver errs by more than its tolerance
        raw.transform.atol = raw.transform.rtol = 1e-11
    assert torch.allclose(law.log_prob(x), raw.log_prob(x) + widened, rtol=1e-6, atol=1e-6)
    if context == 0 and name != "GMM":
        # two solvers of one equation, whose network has kinks
        assert torch.allclose(law.pull(x), raw.transform(x), rtol=0, atol=1e-6 if name == "CNF" else 1e-9)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "GMM"])
@pytest.mark.parametrize("context", [0, 3])
def test_the_sampling_direction_is_the_law_of_the_inverse_flow(name, context):
    flow = build(name, 2, context)
    c = torch.randn(50, 3, dtype=DOUBLE) if context else None
    law = gm.Flow(flow, direction="sampling")(c)
    x, log_prob = law.rsample_and_log_prob(() if context else (50,))
    if name in SOLVED:  # zuko's inverse is not to be trusted, its forward map is
        z = law.pull(x)
        again, volume = flow.transform(c).call_and_ladj(z)
        truth = flow.base().log_prob(z) - volume
        assert torch.allclose(again, x, rtol=0, atol=1e-8)
    else:
        truth = zuko.lazy.Flow(flow.transform.inv, flow.base)(c).log_prob(x)
        truth = truth + (2 * math.log1p(1e-5 / math.pi) if name == "NCSF" else 0.0)
    tolerance = 1e-5 if name == "CNF" else 1e-7
    assert torch.allclose(log_prob, truth, rtol=tolerance, atol=tolerance)
    assert torch.allclose(law.log_prob(x), truth, rtol=tolerance, atol=tolerance)


def test_the_directions_of_one_flow_are_different_laws():
    flow = build("MAF", roughness=0.5)
    x = torch.randn(20, 2, dtype=DOUBLE)
    assert not torch.allclose(gm.Flow(flow)().log_prob(x), gm.Flow(flow, "sampling")().log_prob(x), atol=0.1)


def test_gmm_is_the_mixture_of_its_parameters():
    flow = build("GMM")
    logits, loc, log_diagonal, lower = flow.phi
    factor = torch.diag_embed(log_diagonal.exp() + flow.epsilon)
    factor[:, 1, 0] = lower[:, 0]
    components = dist.MultivariateNormal(loc, scale_tril=factor)
    truth = dist.MixtureSameFamily(dist.Categorical(logits=logits), components)
    law = gm.Flow(flow)()
    x = law.sample((3000,))
    assert torch.allclose(law.log_prob(x), truth.log_prob(x), rtol=1e-9, atol=1e-9)
    assert_same_law(x, truth.sample((3000,)))
    assert law.has_rsample is False


# -- inverses that invert ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["density", "sampling"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == "UNAF" else []) for n in FAMILIES if n != "GMM"]
)
def test_round_trip_of_ten_thousand_draws(name, direction):
    law = gm.Flow(build(name), direction=direction)()
    with torch.no_grad():
        z = law.base.sample((10_000,))
        x = law.push(z)
        found = x.isfinite().all(-1)
        back = law.pull(x[found])
    assert float((~found).double().mean()) <= (1e-3 if name in ("NAF", "UNAF") else 0), "saturating between layers"
    assert float((back - z[found]).abs().max()) <= 1e-6


def flat_flow(name: str) -> nn.Module:
    """One layer with a slope so small that many roots lie beyond ten."""
    if name == "GF":
        flow = F.GF(2, transforms=1, components=4).double()
        shift, scale = flow.transform.transforms[0].phi
    elif name == "SOSPF":  # slope (1 + a_0)^2 + 1e-3
        flow = F.SOSPF(2, transforms=1, hidden_features=(8,)).double()
        shift, scale = flow.transform.transforms[0].hyper[-1].weight, flow.transform.transforms[0].hyper[-1].bias
    else:  # slope exp(b / (1 + |b| / 7))
        flow = F.UNAF(2, **{**NEURAL, "transforms": 1}).double()
        shift, scale = (p for p in list(flow.transform.transforms[0].univariate.parameters())[-2:])
    with torch.no_grad():
        shift.mul_(0.1)
        scale.zero_()
        match name:
            case "GF":
                scale.fill_(-1.5)
            case "SOSPF":
                scale.view(2, -1)[:, 0:15:5] = -0.75
            case "UNAF":
                scale.fill_(-2.5)
    return flow


@pytest.mark.parametrize("name", ["SOSPF", "GF", "UNAF"])
def test_zuko_disagrees_with_its_own_density_where_we_do_not(name):
    """zuko clamps roots at +-10; the draw it returns then has another density than the one it returns with it."""
    flow = flat_flow(name)
    with torch.no_grad():
        x, log_prob = flow().rsample_and_log_prob((2000,))
        theirs = (log_prob - flow().log_prob(x)).abs()
        law = gm.Flow(flow)()
        x, log_prob = law.rsample_and_log_prob((2000,))
        ours = (log_prob - law.log_prob(x)).abs()
    assert float((theirs > 0.01).double().mean()) > 0.01, "zuko has been mended; our own inverse may be superfluous"
    assert float(x.abs().max()) > 10
    assert float(ours.max()) <= 1e-6


def test_a_fresh_gaussianization_flow_is_refused_with_the_reason():
    torch.manual_seed(0)
    law = gm.Flow(F.GF(3))()
    for shape in ((4000,), (1,), ()):
        with pytest.raises(InverseError, match=r"no preimage.*does not integrate to one.*with a closed-form inverse"):
            [law.sample(shape) for _ in range(20)]
    x = gm.Flow(F.GF(3), direction="sampling")().sample((1000,))
    assert x.isfinite().all() and x.abs().max() < 5, "the other direction is a law"


def test_a_value_without_preimage_is_nan_or_of_density_zero():
    flow = build("GF")
    far = torch.tensor([[6.0, 0.0], [0.0, 0.0], [0.5, -7.0]], dtype=DOUBLE)
    pushed = gm.Flow(flow)().push(far)
    assert pushed.isnan().any(-1).tolist() == [True, False, True]
    law = gm.Flow(flow, direction="sampling")()
    assert law.log_prob(far).isinf().tolist() == [True, False, True] and (law.log_prob(far)[::2] < 0).all()
    joint = gm.Flow(flow)().push_and_log_prob(far)[1]
    assert joint.isnan().tolist() == [True, False, True]


def test_the_inverse_of_a_solved_transform_is_refused_and_the_other_direction_named():
    flow = build("NAF")
    with pytest.raises(InverseError, match="direction='sampling'"):
        gm.Flow(zuko.lazy.Flow(flow.transform.inv, flow.base))
    closed = build("MAF", features=3)
    turned = gm.Flow(zuko.lazy.Flow(closed.transform.inv, closed.base))
    x = turned().sample((20,))
    assert torch.allclose(turned().log_prob(x), gm.Flow(closed, "sampling")().log_prob(x), atol=1e-9)
    assert turned.cost == gm.Cost(sample=2, score=8)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in (*SOLVED, "GMM")])
def test_value_and_volume_of_a_closed_inverse(name):
    flow = build(name, features=3)
    transform = flow.transform()
    y = flow.base().sample((40,))
    x, volume = invert_with_volume(transform, y)
    assert torch.allclose(x, transform.inv(y), atol=1e-7 if name == "CNF" else 1e-9)
    assert torch.allclose(volume, -transform.log_abs_det_jacobian(x, y), atol=1e-5)


@pytest.mark.parametrize("name", SOLVED)
def test_gradients_of_the_inverse(name):
    """Implicit gradients with respect to noise, context and parameters equal central differences of our solution."""
    flow = build(name, 2, context=2)
    z = torch.randn(6, 2, dtype=DOUBLE, requires_grad=True)
    c = torch.randn(6, 2, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(6, 2, dtype=DOUBLE)
    inputs = [z, c, *flow.parameters()]

    def outcome() -> Tensor:
        return (weight * invert(with_ordinary_gradients(flow.transform(c)), z)).sum()

    gradients = torch.autograd.grad(outcome(), inputs)
    generator = torch.Generator().manual_seed(3)
    for group in ([0], [1], list(range(2, len(inputs)))):
        steps = [1e-5 * torch.randn(inputs[i].shape, generator=generator, dtype=DOUBLE) for i in group]
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for i, step in zip(group, steps, strict=True):
                    inputs[i].add_(sign * step)
                values.append(float(outcome()))
        predicted = sum(float((gradients[i] * step).sum()) for i, step in zip(group, steps, strict=True))
        assert abs(predicted) > 1e-9, "the derivative is not there to be tested"
        assert (values[0] - values[1]) / 2 == pytest.approx(predicted, rel=1e-4, abs=1e-11)


def test_zuko_counts_the_parameters_of_an_integrand_twice_where_we_do_not():
    """The gradient of a value drawn from the flow and mapped back is zero: it is the noise again."""
    flow = build("UNAF")
    z = torch.randn(50, 2, dtype=DOUBLE)
    sizes = []
    for transform in (flow.transform(), with_ordinary_gradients(flow.transform())):
        back = transform(invert(transform, z))
        gradients = torch.autograd.grad(back.square().sum(), list(flow.parameters()))
        sizes.append(max(float(g.abs().max()) for g in gradients))
    assert sizes[0] > 1e-2, "zuko has been mended"
    assert sizes[1] < 1e-9


@pytest.mark.parametrize("name", ["NAF", "UNAF", "CNF"])
def test_evaluation_mode_keeps_gradients_that_zuko_drops(name):
    def touched(module: nn.Module, flow: nn.Module) -> int:
        module.zero_grad()
        x = module().rsample((4,))
        if x.requires_grad:
            x.sum().backward()
        return sum(p.grad is not None and bool(p.grad.any()) for p in flow.parameters())

    flow = build(name)
    raw = copy.deepcopy(flow).eval()
    assert touched(raw, raw) < len(list(raw.parameters())), "zuko has been mended"
    model = gm.Flow(flow)
    outer = nn.ModuleList([model])
    for switch in (model.eval, outer.eval, outer.train):
        switch()
        assert touched(model, flow) == len(list(flow.parameters()))


# -- circles, differential equations, dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["density", "sampling"])
@pytest.mark.parametrize("features", [1, 2])
def test_circular_density_is_periodic_and_integrates_to_one(features, direction):
    model = gm.Flow(build("NCSF", features), direction=direction)
    law = model()
    assert law.support.base_constraint is circular and model.coordinates.native
    if features == 1:
        end = torch.full((1, 1), math.pi, dtype=DOUBLE)
        assert torch.allclose(law.log_prob(end), law.log_prob(-end), atol=1e-9)
        assert torch.allclose(law.log_prob(end - 1e-7), law.log_prob(-end + 1e-7), atol=1e-4)
    n = 20_000 if features == 1 else 300
    axis = (torch.arange(n, dtype=DOUBLE) + 0.5) / n * 2 * math.pi - math.pi
    grid = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    mass = law.log_prob(grid).exp() * (2 * math.pi / n) ** features
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-3)
    x = law.sample((4000,))
    assert (x.abs() <= math.pi).all()
    if features == 1:
        counts = ((x[:, 0] + math.pi) / (2 * math.pi) * 20).long().clamp(0, 19).bincount(minlength=20)
        assert_counts(counts, mass.reshape(20, -1).sum(-1))


def test_an_angle_that_conditions_no_other_is_periodic():
    """zuko's networks read angles as numbers, so only such an angle has no seam at +-pi."""
    torch.manual_seed(0)
    flow = F.NCSF(3, transforms=1, hidden_features=(8,)).double()
    x = torch.rand(50, 3, dtype=DOUBLE) * 6 - 3
    left, right = x.clone(), x.clone()
    left[:, -1], right[:, -1] = -math.pi, math.pi
    law = gm.Flow(flow)()
    assert torch.allclose(law.log_prob(left), law.log_prob(right), atol=1e-9)
    assert law.log_prob(left).std() > 1e-3


def test_a_random_density_is_refused():
    with pytest.raises(DensityError, match=r"CNF\(exact=False\).*exact=True"):
        gm.Flow(F.CNF(2, exact=False))


@pytest.mark.parametrize("direction", ["density", "sampling"])
def test_ode_with_bad_rows_answers_at_once_and_leaves_good_rows_alone(direction):
    law = gm.Flow(build("CNF"), direction=direction)()
    law._validate_args = False
    rows = torch.tensor([[0.3, math.nan], [0.3, -0.2], [math.inf, 0.0], [-math.inf, math.nan]], dtype=DOUBLE)
    with deadline(20):
        log_prob, pushed, pulled = law.log_prob(rows), law.push(rows), law.pull(rows)
    assert log_prob.isnan().tolist() == [True, False, False, True] and log_prob[2] == -math.inf
    for moved in (pushed, pulled):
        assert moved.isnan().all(-1).tolist() == [True, False, True, True]
    assert torch.allclose(log_prob[1], law.log_prob(rows[1]), atol=1e-7)
    assert torch.allclose(pushed[1], law.push(rows[1]), atol=1e-7)


@every_family
def test_the_wrapper_takes_dtype_and_place_from_the_flow(name):
    model = gm.Flow(build(name, 2), support=None if name == "NCSF" else constraints.positive)
    assert model.place == (DOUBLE, torch.device("cpu"))
    assert model().sample((3,)).dtype is DOUBLE


# -- facts ------------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("context", [0, 3])
def test_features_and_context_are_read_off_the_flow(name, features, context):
    flow = build(name, features, context)
    assert features_of(flow) == features and context_features_of(flow, features) == context
    model = gm.Flow(flow)
    assert model.context_shape == ((context,) if context else ()) and model.event_shape == (features,)


def test_context_width_of_a_flow_that_does_not_tell():
    class Shift(zuko.lazy.LazyTransform):
        def forward(self, c=None):
            return zuko.transforms.DependentTransform(zuko.transforms.AdditiveTransform(c), 1)

    model = gm.Flow(zuko.lazy.Flow(Shift(), F.MAF(2).base), context_features=2)
    c = torch.tensor([[1.0, -1.0]])
    law = model(c)
    assert torch.allclose(law.log_prob(-c), dist.Normal(0.0, 1.0).log_prob(torch.zeros(())) * 2)
    assert model.cost == gm.Cost(sample=None, score=None) and model.slow_direction is None


@pytest.mark.parametrize(
    ("flow", "density", "sampling"),
    [
        (F.MAF(6, transforms=3), (18, 3, "sample"), (3, 18, "score")),
        (F.NSF(6, transforms=3, passes=2), (6, 3, None), (3, 6, None)),
        (F.NICE(6, transforms=4), (4, 4, None), (4, 4, None)),
        (F.NAF(3, transforms=1), (3, 1, "sample"), (1, 4, "score")),
        (F.GF(3, context=2), (3, 3, "sample"), (3, 3, "score")),
        (F.GF(3), (0, 0, "sample"), (0, 0, "score")),
        (F.CNF(3), (None, None, None), (None, None, None)),
    ],
    ids=["MAF", "NSF-coupling", "NICE", "NAF", "GF-context", "GF", "CNF"],
)
def test_cost_and_the_slow_direction(flow, density, sampling):
    for direction, (sample, score, slow) in (("density", density), ("sampling", sampling)):
        model = gm.Flow(flow, direction=direction)
        assert model.cost == gm.Cost(sample=sample, score=score)
        assert model.slow_direction == slow


def test_start_at_identity_says_whether_it_is():
    for name, exact in (("NSF", True), ("MAF", True), ("NICE", True), ("BPF", True), ("SOSPF", False), ("GMM", False)):
        assert gm.Flow(build(name)).start_at_identity() is exact
