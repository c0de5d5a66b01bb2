r"""Critics: functions that tell data from draws.

A critic :math:`f(y)`, or :math:`f(y, c)` with a context, is a network from rows of coordinates to one number per row.
An adversarial model plays against one, and a corrected prior is tilted by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..foundation.errors import ShapeError
from ..foundation.networks import MLP, SpectralLinear, place_of
from ..foundation.shapes import Context, Rows, Values

__all__ = ["check_critic", "judge", "make_critic"]


def make_critic(features: int, context_features: int, hidden_features: Sequence[int], spectral: bool = False) -> MLP:
    """A critic of leaky rectifiers whose last layer has no bias: a constant tells nothing.

    Arguments:
        features, context_features: widths of its inputs.
        hidden_features: widths of its hidden layers.
        spectral: whether its slope is at most one by construction.

    Example:
        >>> make_critic(2, 0, (8,))(torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """
    return MLP(
        features + context_features,
        1,
        hidden_features,
        activation=partial(nn.LeakyReLU, 0.2),
        linear=SpectralLinear if spectral else nn.Linear,
        output_bias=False,
    )


def judge(critic: Callable[..., Any], y: Rows, c: Context | None) -> Values:
    """What a critic says of rows, ``(rows,)``.

    Example:
        >>> judge(make_critic(2, 1, (8,)), torch.zeros(5, 2), torch.zeros(5, 1)).shape
        torch.Size([5])
    """
    return (critic(y) if c is None else critic(y, c)).reshape(len(y))


def check_critic(critic: nn.Module, features: int, context_features: int) -> None:
    """Refuse a critic that does not take rows of these widths, or gives other than one number for each.

    Raises:
        TypeError: not an ``nn.Module``.
        ShapeError: it does not fit.

    Example:
        >>> check_critic(nn.Linear(3, 1), 3, 0)
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"critic: got {type(critic).__name__}, needs an nn.Module that maps rows to one number each.")
    dtype, device = place_of(critic)
    widths = [features, *([context_features] if context_features else [])]
    try:
        with torch.no_grad():
            given = critic(*[torch.zeros(2, width, dtype=dtype, device=device) for width in widths])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(
            f"critic: {type(critic).__name__} does not take rows of {' and '.join(map(str, widths))} columns "
            f"({str(error).splitlines()[0]})."
        ) from error
    if given.numel() != 2:
        raise ShapeError(f"critic: {type(critic).__name__} made {tuple(given.shape)} of 2 rows, needs one number each.")
