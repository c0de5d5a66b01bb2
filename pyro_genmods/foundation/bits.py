r"""All events of a few bits, and sums over them.

A law on :math:`\{0, 1\}^n` that is known up to its constant is known exactly where :math:`2^n` is a number of rows that
one can evaluate,

.. math:: \log Z = \log \sum_{x \in \{0, 1\}^n} e^{f(x)} ,

summed in parts, so that memory does not grow with the number of events.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import DensityError

__all__ = ["MOST_BITS", "all_bits", "log_sum_over_bits"]

MOST_BITS = 24  # sixteen million rows
PART = 2**16


def all_bits(n: int, like: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """The events of ``n`` bits with the numbers ``first`` to ``last``, ``(number, n)``, the last bit changing fastest.

    Arguments:
        n: number of bits.
        like: tells dtype and device.
        first, last: the range of numbers; by default all ``2 ** n``.

    Example:
        >>> all_bits(2, torch.zeros(()))
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.],
                [1., 1.]])
    """
    number = torch.arange(first, 2**n if last is None else last, device=like.device)
    return (number[:, None] >> torch.arange(n - 1, -1, -1, device=like.device) & 1).to(like.dtype)


def log_sum_over_bits(function: Callable[[Tensor], Tensor], n: int, like: Tensor, part: int = PART) -> Tensor:
    r""":math:`\log \sum_x e^{f(x)}` over all events of ``n`` bits, differentiable in what the function depends on.

    Arguments:
        function: :math:`f`, events ``(rows, n)`` to ``(*lead, rows)``.
        n: number of bits.
        like: tells dtype and device.
        part: events of one call.

    Returns:
        ``lead``.

    Raises:
        DensityError: there are too many events.

    Example:
        >>> log_sum_over_bits(lambda x: x.sum(-1), 3, torch.zeros(()))                   # 3 log(1 + e)
        tensor(3.9398)
    """
    if n > MOST_BITS:
        raise DensityError(
            f"{n} bits have {2.0**n:.3g} events, and at most 2^{MOST_BITS} are summed. Estimate the constant "
            "(shape.log_normalizer), or take fewer bits."
        )
    ends = range(0, 2**n, part)
    sums = [function(all_bits(n, like, first, min(first + part, 2**n))).logsumexp(-1) for first in ends]
    return torch.stack(sums).logsumexp(0)
