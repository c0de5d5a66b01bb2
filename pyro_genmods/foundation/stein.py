r"""Stein's identities: what draws and a score owe each other, whatever the constant.

If :math:`x \sim p` and :math:`s = \nabla \log p`, then for every smooth field :math:`f` that does not grow too fast

.. math:: \mathbb E\bigl[ s(x) \cdot f(x) + \nabla \cdot f(x) \bigr] = 0 .

Neither the normaliser of :math:`p` nor a draw that is known to be right is needed. Three fields have names:

====================== ========================================== =====================================================
field                  identity                                   what its failure says
====================== ========================================== =====================================================
:math:`e_i`            :math:`\mathbb E\, s_i = 0`                draws are pushed to one side
:math:`(x_i - m) e_i`  :math:`\mathbb E[-(x_i - m)\, s_i] = 1`    draws are too narrow (below 1) or too wide (above)
:math:`s`              :math:`\mathbb E |s|^2 =                   the score is wrong, or draws miss its curvature
                       -\mathbb E\, \nabla \cdot s`
====================== ========================================== =====================================================

The second is the virial theorem of mechanics, coordinate by coordinate; summed, it counts the dimensions. The third
needs a score without jumps: of a network of rectifiers it is false.

**All fields of a ball at once**: the largest violation over fields of norm one in the Hilbert space of a kernel
:math:`k`, the *kernel Stein discrepancy*, is

.. math::
    S^2 = \mathbb E_{x, y}\, u(x, y), \qquad
    u = s \cdot s' k + s \cdot \nabla_y k + s' \cdot \nabla_x k + \nabla_x \cdot \nabla_y k ,

with :math:`s = s(x)`, :math:`s' = s(y)`, and with the inverse multiquadric kernel
:math:`k = q^{-1/2}`, :math:`q = c^2 + |x - y|^2`, whose tails see mass that escapes,

.. math:: u = s \cdot s'\, q^{-1/2} + (s - s') \cdot (x - y)\, q^{-3/2} + d\, q^{-3/2} - 3 |x - y|^2 q^{-5/2} .

Its V-statistic, the mean over all pairs, is a squared norm; its U-statistic, over pairs of independent draws, has no
bias and may be negative. Under :math:`p` itself both are degenerate, and signs drawn for each chain give their law.

**What they do not see**: where modes lie far apart the score between them is all but zero, so that *the weights of the
modes* hardly enter. Draws of one mode alone pass. Compare chains with each other for that
(:func:`~pyro_genmods.foundation.convergence.nested_r_hat`).

References:
    J. Gorham, L. Mackey, Measuring Sample Quality with Kernels, 2017, arXiv:1703.01717.
    Q. Liu, J. D. Lee, M. Jordan, A Kernelized Stein Discrepancy for Goodness-of-fit Tests, 2016, arXiv:1602.03253.
    K. Chwialkowski, H. Strathmann, A. Gretton, A Kernel Test of Goodness of Fit, 2016, arXiv:1602.02964.
    L. K. Wenliang, H. Kanagawa, Blindness of score-based methods to isolated components and mixing proportions, 2020,
    arXiv:2008.10087.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ShapeError
from .numerics import log_ndtr

__all__ = [
    "Identity",
    "SteinDiscrepancy",
    "kernel_stein_discrepancy",
    "normal_equivalent",
    "stein_identities",
    "stein_kernel",
]

LEAST_CHAINS = 4  # from whose scatter an error can be told
MEDIAN_ROWS = 500  # of which the median distance is taken


class Identity(NamedTuple):
    """A mean that should be zero, at each of its entries.

    Attributes:
        value: mean over all draws.
        standard_error: of the value, from the scatter of chains.
        chains: how many they are.

    Example:
        >>> identity = Identity(torch.tensor([0.1, 1.0]), torch.tensor([0.1, 0.2]), chains=64)
        >>> identity.z, round(identity.p_value, 7)                                  # of two entries
        (tensor([1., 5.]), 9.7e-06)
    """

    value: Tensor
    standard_error: Tensor
    chains: int

    @property
    def z(self) -> Tensor:
        """Values in standard errors."""
        return self.value / self.standard_error.clamp_min(torch.finfo(self.value.dtype).tiny)

    @property
    def p_value(self) -> float:
        """Probability that some ``|z|`` is as large as the largest by chance, Bonferroni's bound over entries."""
        worst = normal_equivalent(self.z.abs().max().double(), self.chains - 1)
        return min(1.0, 2 * self.z.numel() * float(log_ndtr(-worst).exp()))


class SteinDiscrepancy(NamedTuple):
    """A kernel Stein discrepancy, squared.

    Attributes:
        u_statistic: mean over pairs of draws of different chains: without bias, and negative at times.
        v_statistic: mean over all pairs.
        p_value: of the law of the score, by the wild bootstrap.
        length: :math:`c` of the kernel.

    Example:
        >>> SteinDiscrepancy(-1e-4, 1e-3, 0.6, 1.0).p_value
        0.6
    """

    u_statistic: float
    v_statistic: float
    p_value: float
    length: float


def stein_identities(
    x: Tensor, score: Tensor, divergence: Tensor | None = None, centre: Tensor | None = None
) -> dict[str, Identity]:
    r"""How far draws are from the identities of a score, with errors that know of dependent draws.

    Arguments:
        x: draws ``(chains, draws, dim)``, or independent ones ``(draws, dim)``. Errors come from the scatter of the
            means of chains, so that there must be at least four.
        score: :math:`\nabla \log p` at the draws, of their shape.
        divergence: :math:`\nabla \cdot s` at the draws, of their shape without the last dimension, or an unbiased
            estimate.
        centre: :math:`m` of the virial, ``(dim,)``, any constant; the mean of the draws by default.

    Returns:
        ``"force"``, :math:`\mathbb E s_i`, and ``"virial"``, :math:`\mathbb E[-(x_i - m_i) s_i] - 1`, with ``(dim,)``
        entries; ``"virial_sum"``, the sum of the latter, with one; and, given a divergence, ``"curvature"``,
        :math:`\mathbb E |s|^2 + \mathbb E\, \nabla \cdot s`. In float64. All are zero for draws of the law.

    Raises:
        ShapeError: tensors that do not fit, or fewer than four chains.

    Example:
        >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> found = stein_identities(x, -x / 4, torch.full((2000,), -0.5))        # for N(0, 4) they are too narrow
        >>> found["virial"].value.round(decimals=2), bool(found["virial"].z.max() < -50), found["force"].p_value > 0.1
        (tensor([-0.7600, -0.7400], dtype=torch.float64), True, True)
    """
    x, score = _chains("score", x, score)
    if len(x) < LEAST_CHAINS:
        raise ShapeError(
            f"x: got {len(x)} chain(s), needs at least {LEAST_CHAINS} to tell an error from their scatter; split long "
            "chains with .unflatten(1, (parts, -1)).flatten(0, 1)."
        )
    centre = x.mean((0, 1)) if centre is None else centre.double()
    virial = -(x - centre) * score - 1
    entries = {"force": score, "virial": virial, "virial_sum": virial.sum(-1, keepdim=True)}
    if divergence is not None:
        if divergence.numel() != x.shape[:2].numel():
            raise ShapeError(f"divergence: got shape {tuple(divergence.shape)}, needs one number for each draw.")
        curvature = score.square().sum(-1) + divergence.double().reshape(x.shape[:2])
        entries["curvature"] = curvature[..., None]
    return {name: _judged(values) for name, values in entries.items()}


def kernel_stein_discrepancy(
    x: Tensor,
    score: Tensor,
    *,
    length: float | None = None,
    bootstraps: int = 1000,
    block: int = 512,
    generator: torch.Generator | None = None,
) -> SteinDiscrepancy:
    r"""How far draws are from the law of a score, over all fields of a kernel at once.

    Memory grows with ``block`` times the number of draws, never with its square. Coordinates should be of one size.

    Arguments:
        x: draws ``(chains, draws, dim)``, or independent ones ``(draws, dim)``.
        score: :math:`\nabla \log p` at the draws, of their shape.
        length: :math:`c` of the kernel; the median distance of the draws by default.
        bootstraps: sets of signs, one sign for each chain, from which the p-value comes.
        block: rows of the matrix of pairs that are held at once.
        generator: of signs.

    Raises:
        ShapeError: tensors that do not fit, or fewer than four chains.
        ValueError: a length that is not positive, or fewer than one block or bootstrap.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(400, 2, generator=g)
        >>> right, wrong = (kernel_stein_discrepancy(x, -(x - m), generator=g) for m in (0.0, 0.3))
        >>> right.p_value > 0.05, wrong.p_value < 0.01
        (True, True)
    """
    x, score = _chains("score", x, score)
    chains, draws, dim = x.shape
    if chains < LEAST_CHAINS:
        raise ShapeError(f"x: got {chains} chain(s), needs at least {LEAST_CHAINS} independent ones.")
    if min(block, bootstraps) < 1 or (length is not None and not length > 0):
        raise ValueError(f"length, bootstraps, block: got {length}, {bootstraps}, {block}; need positive numbers.")
    rows, scores = x.reshape(-1, dim), score.reshape(-1, dim)
    length = _median_distance(rows) if length is None else float(length)
    chain = torch.arange(chains, device=x.device).repeat_interleave(draws)
    signs = torch.randint(2, (bootstraps, chains), generator=generator, device=x.device).double() * 2 - 1
    total, within, thrown = x.new_zeros(()), x.new_zeros(()), x.new_zeros(bootstraps)
    for part in torch.arange(len(rows), device=x.device).split(block):
        u = stein_kernel(rows[part], scores[part], rows, scores, length)
        by_chain = u.new_zeros(len(part), chains).index_add_(1, chain, u)
        total += by_chain.sum()
        within += by_chain.gather(1, chain[part, None]).sum()
        thrown += ((signs[:, chain[part]] @ by_chain) * signs).sum(1)
    pairs = len(rows) ** 2 - chains * draws**2
    extreme = int((thrown >= total * (1 - 1e-12)).sum())
    return SteinDiscrepancy(
        float((total - within) / pairs), float(total / len(rows) ** 2), (1 + extreme) / (1 + bootstraps), length
    )


def stein_kernel(x: Tensor, score_x: Tensor, y: Tensor, score_y: Tensor, length: float) -> Tensor:
    r""":math:`u(x, y)` for all pairs of rows, of the inverse multiquadric kernel.

    Arguments:
        x, score_x: rows ``(n, dim)``, and the score at each.
        y, score_y: ``(m, dim)``.
        length: :math:`c`.

    Returns:
        ``(n, m)``.

    Example:
        >>> zero = torch.zeros(1, 3)
        >>> stein_kernel(zero, zero, zero, zero, 2.0)               # d / c^3
        tensor([[0.3750]])
    """
    square = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    q = length**2 + square
    # (s - s') . (x - y), without a tensor of all pairs and columns
    along = (score_x * x).sum(-1)[:, None] + (score_y * y).sum(-1) - score_x @ y.mT - x @ score_y.mT
    return (score_x @ score_y.mT + (along + x.shape[1] - 3 * square / q) / q) * q.rsqrt()


def normal_equivalent(t: Tensor, degrees: int) -> Tensor:
    r"""The normal score that is as rare as a value of Student's law, by Wallace's approximation.

    .. math:: z = \frac{8 \nu + 1}{8 \nu + 3} \sqrt{\nu \log (1 + t^2 / \nu)}

    Arguments:
        t: values, at least zero.
        degrees: of freedom, :math:`\nu`.

    Reference:
        D. L. Wallace, Bounds on Normal Approximations to Student's and the Chi-Square Distributions, Annals of
        Mathematical Statistics 30 (1959) 1121-1130.

    Example:
        >>> normal_equivalent(torch.tensor([2.365, 5.408]), 7)      # where the normal law has 1.960 and 3.291
        tensor([1.9588, 3.2778])
    """
    return (8 * degrees + 1) / (8 * degrees + 3) * (degrees * (t.square() / degrees).log1p()).sqrt()


def _chains(name: str, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``(chains, draws, dim)`` in float64."""
    if x.dim() not in (2, 3) or other.shape != x.shape or not x.numel():
        raise ShapeError(
            f"x, {name}: got shapes {tuple(x.shape)} and {tuple(other.shape)}, need (chains, draws, dim), or (draws, "
            "dim) of independent draws, and the same of both."
        )
    x, other = x.detach().double(), other.detach().double()
    return (x, other) if x.dim() == 3 else (x[:, None], other[:, None])


def _judged(values: Tensor) -> Identity:
    """Means of ``(chains, draws, entries)`` with errors from the scatter of chains."""
    means = values.mean(1)
    return Identity(means.mean(0), means.std(0) / math.sqrt(len(means)), len(means))


def _median_distance(rows: Tensor) -> float:
    """Median distance of some pairs of rows; 1 where all are equal."""
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), MEDIAN_ROWS), device=rows.device).long()]
    return float(torch.pdist(some).median()) or 1.0
