r"""A network for velocities :math:`v(t, y, c)` that knows its own divergence.

Hidden layers are modulated by time (and context),

.. math:: h_l = \phi\big((W_l h_{l-1} + b_l)(1 + s_l(t, c)) + u_l(t, c) \big), \qquad v = V h_L + b .

With the diagonal matrices :math:`D_l` of slopes :math:`d_l = \partial h_l / \partial (W_l h_{l-1})` the Jacobian is
:math:`V D_L W_L \cdots D_1 W_1`, and with two hidden layers its trace is a bilinear form,

.. math:: \nabla \cdot v = \operatorname{tr}(V D_2 W_2 D_1 W_1)
          = d_2^\top \big( W_2 \circ (W_1 V)^\top \big)\, d_1 ,

so that the exact divergence costs as much as one more layer, whatever the number of features. With more layers it
takes one tangent for each feature through the layers between.

Reference:
    E. Perez et al., FiLM: Visual Reasoning with a General Conditioning Layer, 2017, arXiv:1709.07871 (the modulation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .networks import zero_output_layer

__all__ = ["VectorField"]

FEW = 8


class VectorField(nn.Module):
    r"""A multilayer perceptron for a velocity, modulated by time and context; zero before training.

    Arguments:
        features: number of columns of rows and velocities.
        context_features: number of columns of contexts.
        hidden_features: widths of the hidden layers; three of 128 for up to eight features, for which a third layer's
            divergence is cheap, and two of 256 beyond.
        frequencies: number of frequencies :math:`\cos(k \pi t), \sin(k \pi t)` by which time is told.

    Shape:
        ``t`` ``()`` or ``(rows, 1)``, ``y`` ``(rows, features)``, ``c`` ``(rows, context_features)`` or ``None``; the
        velocity ``(rows, features)``.

    Example:
        >>> field = VectorField(2, context_features=1, hidden_features=(16, 16))
        >>> field(torch.tensor(0.5), torch.randn(5, 2), torch.randn(5, 1)).abs().sum()
        tensor(0., grad_fn=<SumBackward0>)
        >>> v, divergence = field.with_divergence(torch.tensor(0.5), torch.randn(5, 2), torch.randn(5, 1))
        >>> divergence.shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        hidden_features: Sequence[int] | None = None,
        frequencies: int = 8,
    ) -> None:
        super().__init__()
        if hidden_features is None:
            hidden_features = (128,) * 3 if features <= FEW else (256, 256)
        if not hidden_features or min(hidden_features) < 1:
            raise ValueError(
                f"hidden_features: got {tuple(hidden_features)}, needs at least one layer, of positive width."
            )
        sizes = [features, *hidden_features]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.output = nn.Linear(sizes[-1], features)
        self.told = nn.Linear(context_features, sizes[1], bias=False) if context_features else None
        width = 2 * frequencies + 1 + context_features
        self.modulation = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 2 * sum(hidden_features)))
        self.register_buffer("frequencies", math.pi * torch.arange(1.0, frequencies + 1), persistent=False)
        self.widths = [width for size in hidden_features for width in (size, size)]
        zero_output_layer(self.output)

    def forward(self, t: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
        h = y
        for layer in self._layers(t, c):
            h = nn.functional.silu(layer(h))
        return self.output(h)

    def with_divergence(self, t: Tensor, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Velocity and its exact divergence ``(rows,)``."""
        layers = self._layers(t, c)
        if len(layers) > 2:
            basis = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
            v, along = self.with_tangents(t, y, c, basis)
            return v, along.diagonal(dim1=-2, dim2=-1).sum(-1)
        h, slopes = y, []
        for layer in layers:
            h, slope = _silu(layer(h))
            slopes.append(slope if layer.scale is None else slope * layer.scale)
        first, out = layers[0].weight, self.output.weight
        if len(layers) == 1:
            return self.output(h), slopes[0] @ (first.mT * out).sum(0)
        form = layers[1].weight * (first @ out).mT
        return self.output(h), (linear(slopes[0], form) * slopes[1]).sum(-1)

    def with_tangents(self, t: Tensor, y: Tensor, c: Tensor | None, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and the Jacobian's products with tangents.

        Arguments:
            t, y, c: as for the velocity.
            tangents: ``(k, features)``, the same for all rows, or ``(rows, k, features)``.

        Returns:
            Velocity ``(rows, features)`` and products ``(rows, k, features)``.
        """
        h, j = y, tangents
        for layer in self._layers(t, c):
            h, slope = _silu(layer(h))
            slope = slope if layer.scale is None else slope * layer.scale
            j = linear(j, layer.weight) * slope.unsqueeze(-2)
        return self.output(h), linear(j, self.output.weight)

    def _layers(self, t: Tensor, c: Tensor | None) -> list[_Layer]:
        """The hidden layers at a time; one time for all rows, and no context, is taken into the weights."""
        t = t.reshape(-1, 1)
        angles = t * self.frequencies
        told = torch.cat([t, angles.cos(), angles.sin()], -1)
        if c is not None:
            told = torch.cat([told.expand(len(c), -1), c], -1)
        parts = self.modulation(told).split(self.widths, -1)
        layers = []
        for number, (module, scale, shift) in enumerate(zip(self.hidden, parts[::2], parts[1::2], strict=True)):
            scale = 1 + scale
            if len(told) == 1 and c is None:
                bias = torch.addcmul(shift[0], module.bias, scale[0])
                layers.append(_Layer(module.weight * scale.mT, bias, None, None))
                continue
            if number == 0 and c is not None:
                shift = torch.addcmul(shift, self.told(c), scale)
            layers.append(_Layer(module.weight, module.bias, scale, shift))
        return layers


class _Layer(NamedTuple):
    """An affine map of rows, and what scales and shifts it row by row."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, h: Tensor) -> Tensor:
        a = linear(h, self.weight, self.bias)
        return a if self.scale is None else torch.addcmul(self.shift, a, self.scale)


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    r"""The activation :math:`a \sigma(a)` and its slope :math:`\sigma + h - h \sigma`."""
    s = a.sigmoid()
    h = a * s
    return h, torch.addcmul(s + h, h, s, value=-1)
