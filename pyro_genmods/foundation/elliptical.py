r"""Elliptical slice sampling: moves under a Gaussian prior that need nothing but the likelihood.

With :math:`x \sim \mathcal N(m, \Sigma)` a priori and a second draw :math:`\nu \sim \mathcal N(0, \Sigma)`, every
point of

.. math:: x'(\theta) = m + (x - m) \cos\theta + \nu \sin\theta

is as likely a priori as the others. An angle is drawn, and the bracket of angles shrinks towards the present point
until the likelihood there is above a random level. No gradient, no step size, nothing is ever rejected.

Reference:
    I. Murray, R. P. Adams, D. J. C. MacKay, Elliptical slice sampling, 2010, arXiv:1001.0175.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["elliptical_slice"]

SHRINKAGES = 100  # an angle is then within rounding of the present point


def elliptical_slice(
    centred: Tensor,
    likelihood: Tensor,
    evaluate: Callable[[Tensor], Tensor],
    noise: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, int]:
    """One slice move of many chains.

    Arguments:
        centred: positions minus the mean of the prior, ``(chains, dim)``.
        likelihood: log likelihood there, ``(chains,)``, in nats.
        evaluate: log likelihood of centred positions; not finite means impossible.
        noise: draws of the centred prior, ``(chains, dim)``.
        generator: of angles and levels.

    Returns:
        Positions, log likelihoods, and the number of evaluations.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, level = torch.zeros(1000, 1), torch.zeros(1000)
        >>> for _ in range(10):
        ...     noise = torch.randn(1000, 1, generator=g)
        ...     x, level, _ = elliptical_slice(x, level, lambda x: -0.5 * x[:, 0] ** 2, noise, g)
        >>> round(float(x.var()), 1)        # two unit Gaussians multiplied: variance 1/2
        0.5
    """
    uniform = torch.empty(3, len(centred), dtype=centred.dtype, device=centred.device).uniform_(generator=generator)
    level = likelihood + uniform[0].log()
    angle = 2 * math.pi * uniform[1]
    low, high = angle - 2 * math.pi, angle
    done = torch.zeros_like(level, dtype=torch.bool)
    position, reached = centred, likelihood
    evaluations = 0
    while evaluations < SHRINKAGES and not bool(done.all()):
        evaluations += 1
        proposal = centred * angle.cos()[:, None] + noise * angle.sin()[:, None]
        found = evaluate(proposal)
        fine = (found > level) & ~done
        position = torch.where(fine[:, None], proposal, position)
        reached = torch.where(fine, found, reached)
        done = done | fine
        low, high = torch.where(angle < 0, angle, low), torch.where(angle >= 0, angle, high)
        again = torch.empty_like(angle).uniform_(generator=generator)
        angle = torch.where(done, angle, low + (high - low) * again)
    return position, reached, evaluations
