"""Pairs of rows that belong together, found again by the first of the two.

A rectified flow learns from data and the noise that its teacher makes of them. The noise is dear and always the same,
so it is made once for all rows, and looked up batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Pairs"]


class Pairs:
    """A partner for each row of a table.

    Rows that are not in the table are made, and remembered as long as they are no more than the table has.

    Arguments:
        rows: ``(n, columns)``.
        partner: from rows ``(m, columns)`` to their partners ``(m, k)``.
        chunk: rows whose partners are made at once.

    Example:
        >>> squares = Pairs(torch.arange(5.0)[:, None], lambda rows: rows**2)
        >>> squares(torch.tensor([[3.0], [7.0], [1.0]]))                   # 7 is not in the table, and is made
        tensor([[ 9.],
                [49.],
                [ 1.]])
    """

    def __init__(self, rows: Tensor, partner: Callable[[Tensor], Tensor], chunk: int = 4096) -> None:
        self.partner, self.most = partner, 2 * len(rows)
        self._keep(rows, torch.cat([partner(part) for part in rows.split(chunk)]))

    def __call__(self, rows: Tensor) -> Tensor:
        """Partners of rows ``(m, columns)``, ``(m, k)``."""
        if self.rows.device != rows.device:
            self._keep(self.rows.to(rows.device), self.partners.to(rows.device))
        places = torch.searchsorted(self.keys, _keys(rows)).clamp_max(len(self.keys) - 1)
        found, partners = (self.rows[places] == rows).all(-1), self.partners[places]
        if bool(found.all()):
            return partners
        new = rows[~found]
        partners[~found] = made = self.partner(new)
        if len(self.rows) + len(new) <= self.most:
            self._keep(torch.cat([self.rows, new]), torch.cat([self.partners, made]))
        return partners

    def _keep(self, rows: Tensor, partners: Tensor) -> None:
        self.keys, order = _keys(rows).sort()
        self.rows, self.partners = rows[order], partners[order]


def _keys(rows: Tensor) -> Tensor:
    """A number for each row, in double precision: different rows have different ones but for a freak."""
    weights = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device).sqrt()
    return (rows.double() * weights).sum(-1)
