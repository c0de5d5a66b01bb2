r"""A residual network for functions of rows and an angle, with adaptive normalisation.

.. math:: h \leftarrow h + g_l(e) \, B_l\big( (1 + s_l(e)) \operatorname{LN}(h) + b_l(e) \big), \qquad
          e = e(\theta, c)

where angle and context decide scale, shift and gate of every block. All gates and the output start at zero, so the
network starts as the zero function. Normalised residual blocks matter here: on white data the linear part of what is to
be learned is zero, and a plain perceptron of the usual initialisation stays on that plateau for thousands of steps.

References:
    W. Peebles, S. Xie, Scalable Diffusion Models with Transformers, 2022, arXiv:2212.09748 (the modulation). K. He et
    al., Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from .causal import transformed
from .networks import zero_output_layer

__all__ = ["AngleFeatures", "ResidualMLP"]

EPSILON = 1e-5  # of torch's layer_norm


class AngleFeatures(nn.Module):
    r"""An angle in :math:`[0, \pi/2]` as features: bounded, smooth, and with as much detail at small angles.

    Cosine and sine of the angle, and of multiples of its logarithm :math:`\tau = \log(\tan\tfrac\theta2 + \delta)`,
    which changes slowly at the right angle: a feature that does not, such as :math:`\log\tan\theta`, makes a velocity
    that no solver follows where nothing happens.

    Arguments:
        frequencies: number of multiples.

    Example:
        >>> AngleFeatures(4)(torch.zeros(3, 1)).shape
        torch.Size([3, 11])
    """

    FLOOR = 5e-3

    def __init__(self, frequencies: int = 6) -> None:
        super().__init__()
        self.width = 3 + 2 * frequencies
        self.register_buffer("multiples", 0.25 * 1.5 ** torch.arange(float(frequencies)), persistent=False)

    def forward(self, angle: Tensor) -> Tensor:
        sine, cosine = angle.sin(), angle.cos()
        level = ((angle / 2).tan() + self.FLOOR).log()
        waves = level * self.multiples
        return torch.cat([sine, cosine, level / 4, waves.sin(), waves.cos()], -1)


class ResidualMLP(nn.Module):
    """A residual network of rows, an angle and a context; zero before training.

    Arguments:
        features: number of columns of rows.
        context_features: number of columns of contexts.
        width: of the hidden states.
        blocks: how many.
        outputs: number of columns of the output; default ``features``.

    Shape:
        ``t`` ``()`` or ``(rows, 1)``, an angle; ``y`` ``(rows, features)``; ``c`` ``(rows, context_features)`` or
        ``None``; the output ``(rows, outputs)``.

    Raises:
        ValueError: a width or number of blocks below one.

    Example:
        >>> network = ResidualMLP(2, context_features=1, width=16)
        >>> network(torch.tensor(0.5), torch.randn(5, 2), torch.randn(5, 1)).shape
        torch.Size([5, 2])
    """

    one_time = True  # takes a time that all rows share as ()

    def __init__(
        self, features: int, context_features: int = 0, width: int = 128, blocks: int = 2, outputs: int | None = None
    ) -> None:
        super().__init__()
        for name, number in (("width", width), ("blocks", blocks)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, needs at least 1.")
        self.angle = AngleFeatures()
        self.embedding = nn.Sequential(
            nn.Linear(self.angle.width + context_features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.input = nn.Linear(features + context_features, width)
        self.modulation = nn.Linear(width, (3 * blocks + 2) * width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.output = nn.Linear(width, outputs or features)
        zero_output_layer(self.modulation)
        zero_output_layer(self.output)
        with torch.no_grad():  # gates of one half: a gate of zero would learn nothing before the output does
            self.modulation.bias.view(-1, width)[2 : 3 * blocks : 3] = 0.5

    def forward(self, t: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
        told = self.angle(t.reshape(-1, 1))
        if c is not None:
            told = torch.cat([told.expand(len(c), -1), c], -1)
            y = torch.cat([y, c], -1)
        modulation = self.modulation(self.embedding(told)).unflatten(-1, (-1, self.input.out_features)).unbind(-2)
        h = self.input(y)
        for k, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            scale, shift, gate = modulation[3 * k : 3 * k + 3]
            h = torch.addcmul(h, gate, outer(silu(inner(_modulated(h, scale, shift)))))
        return self.output(silu(_modulated(h, *modulation[-2:])))


def _modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, _normalized(h), 1 + scale)


def _normalized(h: Tensor) -> Tensor:
    """Of mean zero and variance one; written out under transforms, as torch's kernel has a wrong third derivative."""
    if not transformed():
        return layer_norm(h, h.shape[-1:])
    centred = h - h.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
