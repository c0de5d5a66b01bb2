"""What is asked of an energy: one number for each row, by itself, the same every time, with a gradient, and walls."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..contract import GenerativeModel
from ..foundation.errors import DensityError, ShapeError
from ..foundation.networks import place_of

__all__ = ["Function", "check_confining", "check_curvature", "check_network"]

RADII = (10.0, 100.0, 1e3, 1e4)  # standard deviations from the centre at which an energy is looked at
FLIPS = "It tells chains which flips pay; write the energy with sums and products of the bits in place of comparisons."


class Function(nn.Module):
    """A plain function as a network without parameters.

    Arguments:
        function: rows, and rows of context if there are any, to one number for each.

    Example:
        >>> Function(lambda y: y.square().sum(-1))(torch.ones(2, 3))
        tensor([3., 3.])
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def check_network(network: nn.Module, features: int, told: int, binary: bool = False) -> None:
    """Refuse an energy of another shape, without gradient, that is random, or that mixes the rows of a batch.

    Arguments:
        network: called as ``network(y)`` or ``network(y, c)``.
        features, told: widths of the two.
        binary: whether rows are zeros and ones.

    Raises:
        ShapeError: it fails, or gives other than one number for each row.
        DensityError: it has no gradient.
        ValueError: two calls differ, or a row depends on its neighbours.

    Example:
        >>> check_network(nn.Linear(2, 1), 2, 0)
    """
    name = type(getattr(network, "function", network)).__name__
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        inputs = _trial(network, features, told, binary)
        with torch.enable_grad():
            value = _called(network, name, inputs)
            _check_gradient(name, inputs[0], value, binary)
        with torch.no_grad():
            again = network(*inputs).reshape(3)
            alone = torch.cat([network(*[x[i : i + 1] for x in inputs]).reshape(1) for i in (0, 1)])
    finally:
        for module, mode in modes.items():
            module.training = mode
    value = value.detach()
    if not torch.allclose(value, again, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"network: {name} gives {value.tolist()} and then {again.tolist()} for the same rows. A density must be a "
            "fixed function: take randomness out of it (dropout acts in training mode alone)."
        )
    if not torch.allclose(value[:2], alone, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"network: {name} gives a row another value in company than alone: it mixes the rows of a batch, and a row "
            "would have no density of its own. Normalise each row by itself (LayerNorm)."
        )


def _trial(network: nn.Module, features: int, told: int, binary: bool) -> tuple[Tensor, ...]:
    dtype, device = place_of(network)
    generator = torch.Generator().manual_seed(0)
    widths = (features, told) if told else (features,)
    y, *c = (torch.randn(3, width, generator=generator).to(device, dtype) for width in widths)
    return ((y > 0).to(dtype) if binary else y, *c)


def _called(network: nn.Module, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    inputs[0].requires_grad_()
    shapes = " and ".join(str(tuple(x.shape)) for x in inputs)
    try:
        value = network(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ShapeError(f"network: {name} fails on rows of {shapes}: {str(error).splitlines()[0]}") from error
    if not isinstance(value, Tensor) or tuple(value.shape) not in ((3,), (3, 1)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"network: {name} returned {got} for rows of {shapes}, needs one number each, (3,) or (3, 1).")
    return value.reshape(3)


def _check_gradient(name: str, y: Tensor, value: Tensor, binary: bool) -> None:
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), y, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise DensityError(
            f"network: {name} has no gradient with respect to its rows: it rounds, detaches or compares them. "
            + (FLIPS if binary else "Chains and scores need one; for discrete events take shape.DiscreteEnergy.")
        )


def check_curvature(energy: Callable[[Tensor], Tensor], y: Tensor, objective: str) -> None:
    """Refuse an energy that has no second derivative where score matching needs it.

    Arguments:
        energy: rows to ``(rows,)``.
        y: some rows.
        objective: for the message.

    Raises:
        DensityError: its second derivatives are zero, as those of rectifiers are.

    Example:
        >>> check_curvature(lambda y: y.pow(4).sum(-1), torch.ones(2, 1), "sliced")
    """
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(leaf).sum(), leaf, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), leaf, allow_unused=True) if slope.requires_grad else (None,)
    if bend is None or not bool(bend.any()):
        raise DensityError(
            f"network: its second derivatives are zero, and objective={objective!r} teaches through them; take smooth "
            "activations (SiLU, Softplus, Tanh), or objective='denoising', 'contrastive' or 'nce'."
        )


@torch.no_grad()
def check_confining(model: GenerativeModel, context: Tensor | None = None, directions: int = 64) -> None:
    """Refuse an energy that falls without end along some ray: it has no normaliser.

    Arguments:
        model: without a base.
        context: ``(rows, *context_shape)`` of which the first is tried; zero by default.
        directions: of rays from the centre of the data.

    Raises:
        DensityError: from ten standard deviations to a hundred the energy does not rise by as much as the logarithm of
            the volume.

    Example:
        >>> import pyro_genmods as gm
        >>> check_confining(gm.Energy(2, network=lambda y: y.square().sum(-1), base=None))
    """
    z = torch.randn(directions, model.features, generator=torch.Generator().manual_seed(0)).to(*reversed(model.place))
    z = z / z.norm(dim=-1, keepdim=True)
    c = None
    if model.context_shape:
        shape = (directions, model.context_shape.numel())
        c = z.new_zeros(shape)
        if context is not None:
            c = model.context_standardization(context[:1].reshape(1, -1).to(z)).expand(shape)
    values = [model.energy_rows(model.reference.push_rows(radius * z, None), c) for radius in RADII]
    rises = torch.stack([far - near for near, far in pairwise(values)])
    needed = model.features * torch.log(torch.tensor(10.0))
    walled = (rises > needed).any(0) | ~values[0].isfinite()  # a valley that bends may cross a ray, once
    rise = rises[0][~walled]
    if len(rise):
        raise DensityError(
            f"network: from 10 to 100 standard deviations its energy rises by {float(rise.min()):.3g} nats in some "
            f"direction, and a law in {model.features} dimension(s) needs more than {float(needed):.3g}: it has no "
            "normaliser. Give it a base (base='gaussian'), or an energy that grows."
        )
