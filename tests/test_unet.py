r"""A U-Net for velocities: shapes of all sizes, rows that do not see each other, functorch, and learning.

What it can learn is measured on Gaussian images, whose best velocity has a closed form: for an eigenvalue
:math:`\lambda` of the covariance and the angle :math:`t`, the variance of :math:`v` that no function of :math:`u` can
explain is :math:`\lambda / (\lambda \cos^2 t + \sin^2 t)`.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_genmods.foundation.errors import ShapeError
from pyro_genmods.foundation.unet import UNet, _Attention, _enlarge, _norm

SHAPES = [(1, 28, 28), (3, 8, 8), (1, 7, 5), (2, 17, 19), (1, 1, 1), (3, 2, 33)]


def awake(network: UNet) -> UNet:
    """With random numbers in the layers that start at zero."""
    with torch.no_grad():
        for p in network.parameters():
            if not bool(p.any()):
                p.normal_(0, 0.1)
    return network


def made(shape: tuple[int, int, int] = (1, 9, 10), **options: object) -> tuple[UNet, Tensor, Tensor]:
    network = awake(UNet(shape, channels=(8, 12), **options)).double()
    size = math.prod(shape)
    return network, torch.rand(4, 1, dtype=torch.float64) * math.pi / 2, torch.randn(4, size, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("patch", [None, 1, 2, 3])
def test_every_size_comes_back_and_starts_at_zero(shape, patch):
    network = UNet(shape, context_features=2, channels=(4, 6, 6), patch=patch, attention=True)
    t, y, c = torch.rand(3, 1), torch.randn(3, math.prod(shape)), torch.randn(3, 2)
    assert torch.equal(network(t, y, c), torch.zeros_like(y))
    assert torch.equal(network._to_rows(network._to_image(y)), y), "patches lose pixels"
    assert awake(network)(t, y, c).abs().amin(1).gt(0).all()


def test_patches_by_default_from_sixteen_pixels_on():
    assert [UNet((1, n, 28), channels=(4,)).patch for n in (15, 16, 28)] == [1, 2, 2]


@pytest.mark.parametrize("attention", [False, True])
def test_rows_do_not_see_each_other(attention):
    network, t, y = made(attention=attention)
    together = network(t, y)
    alone = torch.cat([network(t[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert together.abs().mean() > 0.01 and torch.allclose(together, alone, atol=1e-13)
    other = y.clone()
    other[1:] += 5
    assert torch.allclose(network(t, other)[0], together[0], atol=1e-13)


def test_one_angle_for_all_rows():
    network, _, y = made()
    t = torch.tensor(0.4, dtype=torch.float64)
    assert torch.allclose(network(t, y), network(t.expand(4, 1), y), atol=1e-14)


def test_angle_and_context_are_heard():
    network, t, y = made(context_features=2)
    c = torch.randn(4, 2, dtype=torch.float64).requires_grad_()
    t.requires_grad_()
    slopes = torch.autograd.grad(network(t, y, c).square().sum(), (t, c))
    assert all(bool((slope.abs() > 1e-8).all()) for slope in slopes)


def test_features_of_the_angle_change_slowly_where_all_is_noise():
    network, _, y = made()
    t = torch.tensor([[0.0], [math.pi / 2]], dtype=torch.float64)
    told, slope = torch.func.jvp(lambda t: network._features(t, y[:2], None), (t,), (torch.ones_like(t),))
    assert torch.allclose(told[:, 0], torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-15)
    assert bool(told.abs().max() < 10) and bool(slope.isfinite().all())
    assert bool(slope[1].abs().max() < 10), "a velocity that changes fast at a right angle has no solver"


def test_every_parameter_learns():
    network, t, y = made(context_features=1, attention=True, blocks=2)
    network(t, y, y[:, :1]).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not still


def test_enlarging_repeats_pixels():
    h = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(_enlarge(h, (4, 6))[0, 0], h[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(_enlarge(h, (3, 5)), _enlarge(h, (4, 6))[..., :3, :5])


def test_attention_is_the_formula_on_both_paths():
    attend = _Attention(6).double()
    torch.nn.init.normal_(attend.answer.weight)
    h = torch.randn(3, 6, 2, 5, dtype=torch.float64)
    query, key, value = attend.ask(attend.norm(h)).flatten(2).chunk(3, 1)
    weights = torch.einsum("rci,rcj->rij", query, key).div(6**0.5).softmax(-1)
    found = torch.einsum("rij,rcj->rci", weights, value).reshape(h.shape)
    expected = h + attend.answer(found)
    assert torch.allclose(attend(h), expected, atol=1e-12)
    assert torch.allclose(torch.vmap(attend)(h[None])[0], expected, atol=1e-12)


@pytest.mark.parametrize("attention", [False, True])
def test_vmap_gives_the_rows(attention):
    network, t, y = made(context_features=1, attention=attention)
    c = y[:, :1].clone()
    expected = network(t, y, c)
    by_row = torch.vmap(lambda t, y, c: network(t[None], y[None], c[None])[0])(t, y, c)
    by_batch = torch.vmap(network)(*(x.reshape(2, 2, -1) for x in (t, y, c))).flatten(0, 1)
    assert torch.allclose(by_row, expected, atol=1e-12) and torch.allclose(by_batch, expected, atol=1e-12)


@pytest.mark.parametrize("attention", [False, True])
def test_tangents_cotangents_and_differences_agree(attention):
    network, t, y = made(attention=attention)
    tangent, cotangent = torch.randn_like(y), torch.randn_like(y)
    _, along = torch.func.jvp(lambda y: network(t, y), (y,), (tangent,))
    step = 1e-6
    differences = (network(t, y + step * tangent) - network(t, y - step * tangent)) / (2 * step)
    assert torch.allclose(along, differences, atol=1e-7 * float(1 + along.abs().max()))
    _, pullback = torch.func.vjp(lambda y: network(t, y), y)
    assert torch.allclose((pullback(cotangent)[0] * tangent).sum(), (along * cotangent).sum(), rtol=1e-9)


def test_second_derivative_by_reverse_and_forward():
    network, t, y = made((1, 3, 3))

    def total(y: Tensor) -> Tensor:
        return network(t[:1], y[None]).square().sum()

    hessian = torch.func.hessian(total)(y[0])
    assert torch.allclose(hessian, hessian.mT, atol=1e-10) and hessian.abs().max() > 1e-6
    assert torch.allclose(torch.func.jacrev(torch.func.grad(total))(y[0]), hessian, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_it_is_the_same(dtype):
    network, t, y = made(attention=True)
    network, t, y = network.to(dtype), t.to(dtype), y.to(dtype)
    graph = make_fx(lambda t, y: network(t, y))(t, y)
    assert graph(t, y + 1).dtype == dtype
    assert torch.allclose(graph(t, y + 1), network(t, y + 1), atol=1e-5 if dtype == torch.float32 else 1e-13)
    pulled = make_fx(torch.func.grad(lambda y: network(t, y).square().sum()))(y)
    assert torch.allclose(
        pulled(y + 1), torch.func.grad(lambda y: network(t, y).square().sum())(y + 1), rtol=1e-4, atol=1e-4
    )


def test_copies_and_states_give_the_same_numbers():
    network, t, y = made()
    fresh = UNet((1, 9, 10), channels=(8, 12)).double()
    fresh.load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), fresh):
        assert torch.equal(other(t, y), network(t, y))


def test_single_precision_is_close_to_double():
    network, t, y = made(attention=True)
    expected = network(t, y)
    assert torch.allclose(network.float()(t.float(), y.float()).double(), expected, atol=1e-4)


@pytest.mark.slow
def test_learns_the_velocity_of_gaussian_images():
    """At least nine tenths of what is to be explained are, on noise that training has not seen."""
    torch.manual_seed(0)
    place = torch.arange(8.0)
    line = (-0.5 * (place[:, None] - place) ** 2 / 4).exp() + 0.01 * torch.eye(8)
    values, vectors = torch.linalg.eigh(torch.kron(line, line))
    factor = vectors * values.clamp_min(0).sqrt()

    def draw(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        t = (torch.randn(rows, 1) * 1.4 - 1).exp().atan()
        x, e = torch.randn(rows, 64) @ factor.mT, torch.randn(rows, 64)
        return t, t.cos() * x + t.sin() * e, t.cos() * e - t.sin() * x

    network = UNet((1, 8, 8), channels=(16, 24))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    steps = 250
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        t, u, v = draw(128)
        optimizer.zero_grad()
        (network(t, u) - v).square().mean().backward()
        optimizer.step()
    t, u, v = draw(4000)
    with torch.no_grad():
        loss = float((network(t, u) - v).square().mean())
    least = float((values / (values * t.cos() ** 2 + t.sin() ** 2)).mean())
    start = float((t.cos() ** 2 + values.mean() * t.sin() ** 2).mean())
    assert (loss - least) / (start - least) < 0.1, (loss, least, start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (28, 28)}, r"image_shape: got \(28, 28\), needs \(channels, height, width\)"),
        ({"image_shape": (1, 0, 28)}, "image_shape"),
        ({"channels": ()}, "channels: got"),
        ({"channels": (8, 0)}, "channels: got"),
        ({"context_features": -1}, "context_features: got -1"),
        ({"patch": 0}, "patch: got 0"),
        ({"blocks": 0}, "blocks: got 0"),
        ({"frequencies": 0}, "frequencies: got 0"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"image_shape": (1, 8, 8), **options})


def test_wrong_rows_and_contexts_are_named():
    network, context = UNet((1, 4, 4), channels=(4,)), UNet((1, 4, 4), 2, channels=(4,))
    t = torch.zeros(3, 1)
    with pytest.raises(ShapeError, match=r"y: got shape \(3, 15\), needs \(rows, 16\)"):
        network(t, torch.zeros(3, 15))
    with pytest.raises(ShapeError, match=r"c: got \(3, 2\), needs none"):
        network(t, torch.zeros(3, 16), torch.zeros(3, 2))
    for wrong in (None, torch.zeros(3, 1), torch.zeros(2, 2)):
        with pytest.raises(ShapeError, match=r"c: got .* needs \(3, 2\)"):
            context(t, torch.zeros(3, 16), wrong)
    with pytest.raises(ShapeError, match=r"t: got shape \(2, 1\), needs"):
        network(t[:2], torch.zeros(3, 16))


def test_norm_is_the_kernel_on_both_paths():
    norm, h = _norm(12).double(), torch.randn(3, 12, 4, 5, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    assert torch.allclose(torch.vmap(norm)(h[None])[0], norm(h), atol=1e-12)
    plain = torch.nn.functional.group_norm(h, 4)
    assert torch.allclose(norm(h), plain * norm.weight[:, None, None] + norm.bias[:, None, None], atol=1e-12)
