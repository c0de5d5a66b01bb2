r"""Conditional flow matching: a velocity learned by regression, without solving anything.

Noise :math:`z` and data :math:`x` of a coupling are joined by a straight line :math:`x_t = (1 - t) z + t x`, and

.. math:: \ell(x) = \big\| v(t, x_t) - (x - z) \big\|^2, \qquad 0 < t < 1,

has its minimum at :math:`v(t, y) = \mathbb E[x - z \mid x_t = y]`, whose flow carries the law of :math:`z` to the law
of :math:`x` (for any coupling with these marginals). Pairing noise and data independently makes lines cross and the
flow bend; pairing the examples of a batch at the least total squared distance makes it straighter.

References:
    Y. Lipman, R. T. Q. Chen, H. Ben-Hamu, M. Nickel, M. Le, Flow Matching for Generative Modeling, 2022,
    arXiv:2210.02747. A. Tong et al., Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal
    Transport, 2023, arXiv:2302.00482. X. Liu, C. Gong, Q. Liu, Flow Straight and Fast, 2022, arXiv:2209.03003.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gaussian_velocity", "late_times", "straight_line", "stratified_normal"]


def straight_line(z: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A point of the line from noise to data, and the velocity along it.

    Arguments:
        z, x: ends, ``(rows, n)``.
        t: ``(rows, 1)``.

    Example:
        >>> straight_line(torch.tensor([[0.0]]), torch.tensor([[4.0]]), torch.tensor([[0.25]]))
        (tensor([[1.]]), tensor([[4.]]))
    """
    return torch.lerp(z, x, t), x - z


def gaussian_velocity(t: Tensor) -> Tensor:
    r"""The factor of the velocity :math:`\beta(t)\, y` that flow matching finds for standard normal data,

    .. math:: \beta(t) = \frac{2t - 1}{t^2 + (1 - t)^2} ,

    with independent pairs. A network that learns the rest has nothing to learn of data that are normal already.

    Example:
        >>> gaussian_velocity(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-1.,  0.,  1.])
    """
    return (2 * t - 1) / (t.square() + (1 - t).square())


def late_times(rows: int, like: Tensor, centre: float = 1.0, spread: float = 1.4) -> Tensor:
    r"""Times ``(rows, 1)`` whose logit is normal, more of them near the data than near the noise.

    Where in time the loss looks most does not change its minimum, but what a network of finite size gets right: near
    the data the velocity has its detail. The times are stratified: one in each of ``rows`` equal parts of their law.

    Arguments:
        rows: how many.
        like: a tensor of the wanted dtype and device.
        centre, spread: mean and standard deviation of :math:`\log \frac{t}{1 - t}`.

    Reference:
        P. Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024,
        arXiv:2403.03206 (logit-normal times).

    Example:
        >>> t = late_times(1000, torch.zeros(()))
        >>> round(float(t.logit().mean()), 1), round(float(t.logit().std()), 1)
        (1.0, 1.4)
    """
    return (centre + spread * stratified_normal(rows, like)).sigmoid()


def stratified_normal(rows: int, like: Tensor) -> Tensor:
    """Standard normal numbers ``(rows, 1)`` in random order, one in each of ``rows`` equal parts of their law.

    Arguments:
        rows: how many.
        like: a tensor of the wanted dtype and device.

    Example:
        >>> abs(float(stratified_normal(1000, torch.zeros(())).mean())) < 0.01
        True
    """
    places = torch.randperm(rows, device=like.device)[:, None]
    u = (places + torch.rand(rows, 1, dtype=like.dtype, device=like.device)) / rows
    eps = torch.finfo(like.dtype).eps
    return torch.special.ndtri(u.clamp(eps, 1 - eps))
