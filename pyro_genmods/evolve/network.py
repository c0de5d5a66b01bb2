"""The networks of diffusions: the default ones, and what is asked of those that users bring."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..foundation.errors import ShapeError
from ..foundation.networks import place_of
from ..foundation.residual import ResidualMLP
from ..foundation.unet import UNet
from .denoiser import PARAMETERIZATIONS
from .energy import ScalarNetwork

__all__ = ["check_level", "check_network", "check_options", "check_rows_apart", "default_network", "is_image"]

SMALLEST_IMAGE = 8


def is_image(event_shape: tuple[int, ...]) -> bool:
    """Whether events are ``(channels, height, width)`` with at least eight pixels a side."""
    return len(event_shape) == 3 and min(event_shape[1:]) >= SMALLEST_IMAGE


def default_network(event_shape: tuple[int, ...], features: int, told: int, scalar: bool) -> nn.Module:
    """A U-Net for images, else a residual perceptron; of one number if wanted.

    Arguments:
        event_shape: unconstrained.
        features: number of columns of rows.
        told: number of columns of contexts.
        scalar: whether the network is a potential.
    """
    network = UNet(tuple(event_shape), told) if is_image(event_shape) else ResidualMLP(features, told)
    return ScalarNetwork(network) if scalar else network


def check_network(network: nn.Module, features: int, context_features: int, outputs: int) -> None:
    """Refuse a network that does not make rows of these widths.

    Arguments:
        network: called as ``network(t, u, c)``.
        features, context_features: numbers of columns that it is given.
        outputs: number of columns that it must return; one may also be none.

    Raises:
        ShapeError: it fails, or returns another shape.
    """
    u, c = _trial_rows(network, features, context_features)
    name, wanted = type(network).__name__, [(len(u), outputs)] + ([(len(u),)] if outputs == 1 else [])
    try:
        with torch.no_grad():
            shape = tuple(network(u[:, :1].abs().atan(), u, c).shape)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ShapeError(
            f"network: {name} fails on network(t, u, c) with t of ({len(u)}, 1), u of {tuple(u.shape)} and c of "
            f"{None if c is None else tuple(c.shape)}: {str(error).splitlines()[0]}"
        ) from error
    if shape not in wanted:
        raise ShapeError(f"network: {name} returned shape {shape} for {len(u)} rows, needs {wanted[0]}.")


def check_rows_apart(network: nn.Module, features: int, context_features: int) -> None:
    """Refuse a network that mixes the rows of a batch: then no row has a density of its own.

    Raises:
        ValueError: some row comes out otherwise in company than alone.
    """
    u, c = _trial_rows(network, features, context_features)
    t = u[:, :1].abs().atan()
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            together = network(t, u, c)
            alone = torch.cat(
                [network(t[k : k + 1], u[k : k + 1], None if c is None else c[k : k + 1]) for k in (0, 1)]
            )
    except (RuntimeError, ValueError, IndexError):  # it needs company
        alone = torch.full_like(together, torch.nan)
    finally:
        for module, mode in modes.items():
            module.training = mode
    # where a row's own numbers are not finite, mixing is not the trouble
    if not torch.allclose(together[:2], alone.reshape(together[:2].shape), rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"network: {type(network).__name__} gives a row another value in company than alone: it mixes the rows of "
            "a batch, and a row would have no density of its own. Normalise each row by itself (LayerNorm, GroupNorm)."
        )


def _trial_rows(network: nn.Module, features: int, context_features: int) -> tuple[Tensor, Tensor | None]:
    dtype, device = place_of(network)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(3, features, generator=generator).to(device, dtype)
    return u, torch.randn(3, context_features, generator=generator).to(device, dtype) if context_features else None


def check_options(
    parameterization: str, whiten: str | None, trace: str, sigma_min: float, levels: tuple[float, float]
) -> None:
    """Refuse options of a diffusion that are not known, or out of range.

    Raises:
        ValueError: one of them.
    """
    for name, value, known in (
        ("parameterization", parameterization, PARAMETERIZATIONS),
        ("whiten", whiten, (None, "full", "diagonal", "common")),
        ("trace", trace, ("auto", "exact", "hutchinson")),
    ):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, needs {' or '.join(map(repr, known))}.")
    if not 0 < sigma_min <= 0.1:
        raise ValueError(f"sigma_min: got {sigma_min}, needs a number above 0 and at most 0.1 white deviations.")
    if len(levels) != 2 or not levels[1] > 0:
        raise ValueError(f"noise_levels: got {levels}, needs a mean and a positive standard deviation.")


def check_level(level: float | None, sigma_min: float) -> None:
    """Refuse a level of noise that the network was never asked about; ``None`` is the calibrated one.

    Raises:
        ValueError: it is below the least, infinite or NaN.
    """
    if level is not None and not sigma_min <= level < math.inf:
        raise ValueError(
            f"level: got {level}, needs a finite number of white standard deviations, at least the model's sigma_min, "
            f"{sigma_min}; leave it out for the calibrated one."
        )
