r"""Replicas on a ladder of temperatures: who changes places, and where the rungs should be.

Replicas :math:`k = 1 \dots K` have the laws :math:`\pi_k \propto e^{-U_0 - \beta_k V}`, and neighbours exchange their
positions with probability

.. math:: \min\bigl(1, e^{(\beta_{k+1} - \beta_k)(V_{k+1} - V_k)}\bigr) .

Even and odd pairs take turns, which makes a replica walk on in one direction instead of to and fro. Round trips are
fastest where all pairs reject equally often: the ladder is spaced along the sum of the rejection rates.

Reference:
    S. Syed, A. Bouchard-Cote, G. Deligiannidis, A. Doucet, Non-Reversible Parallel Tempering: a Scalable Highly
    Parallel MCMC Scheme, 2022, arXiv:1905.02939.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exchange", "respaced"]


def exchange(
    tilt: Tensor, ladder: Tensor, turn: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Which replica goes where, and how probable each exchange was.

    Arguments:
        tilt: :math:`V` of every replica, ``(temperatures, chains)``; what is no number counts as infinite.
        ladder: inverse temperatures, ``(temperatures,)``, rising.
        turn: even pairs exchange in even turns, odd pairs in odd ones.
        generator: of the uniform numbers.

    Returns:
        For every place the row, in ``temperatures * chains``, of the replica that takes it, ``(temperatures *
        chains,)``; and the mean acceptance probability of every pair, ``(temperatures - 1,)``.

    Example:
        >>> rows, rate = exchange(torch.tensor([[0.0], [9.0]]), torch.tensor([0.0, 1.0]), turn=0)
        >>> rows, rate                                # the cold replica is where it is hot: it goes
        (tensor([1, 0]), tensor([1.]))
    """
    k, chains = tilt.shape
    tilt = torch.where(tilt.isnan(), torch.inf, tilt)
    gap = (ladder[1:] - ladder[:-1])[:, None]
    log_ratio = (gap * (tilt[1:] - tilt[:-1])).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    uniform = torch.empty_like(log_ratio).uniform_(generator=generator)
    active = (torch.arange(k - 1, device=tilt.device) % 2 == turn % 2)[:, None]
    swap = active & (uniform.log() < log_ratio)
    index = torch.arange(k, device=tilt.device)[:, None].expand(k, chains).clone()
    index[:-1] += swap.long()
    index[1:] -= swap.long()
    rows = index * chains + torch.arange(chains, device=tilt.device)
    return rows.reshape(-1), log_ratio.clamp(max=0).exp().mean(1)


def respaced(ladder: Tensor, rejection: Tensor) -> Tensor:
    """The ladder whose pairs would all reject equally often.

    Arguments:
        ladder: inverse temperatures, ``(temperatures,)``, rising from 0 to 1.
        rejection: mean rejection of every pair, ``(temperatures - 1,)``.

    Example:
        >>> respaced(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.9, 0.1])).tolist()[1] < 0.3
        True
    """
    barrier = torch.cat([rejection.new_zeros(1), (rejection + 1e-3).cumsum(0)])
    wanted = torch.linspace(0, 1, len(barrier)).to(barrier) * barrier[-1]
    right = torch.searchsorted(barrier, wanted[1:-1]).clamp(1, len(barrier) - 1)
    share = (wanted[1:-1] - barrier[right - 1]) / (barrier[right] - barrier[right - 1])
    inner = ladder[right - 1] + share * (ladder[right] - ladder[right - 1])
    return torch.cat([ladder[:1], inner, ladder[-1:]])
