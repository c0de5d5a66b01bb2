r"""The Knothe-Rosenblatt map from noise to data, place by place or all places at once.

With :math:`F_t` the distribution functions of the conditionals and :math:`z` standard normal noise,

.. math:: x_t = F_t^{-1}\big(\Phi(z_t) \mid x_{<t}\big), \qquad t = 1, \dots, T .

===============  =========================================  =================================================
method           network work                               for
===============  =========================================  =================================================
``"cached"``     ``T`` steps that reuse what is known       networks with ``begin`` and ``step``
``"jacobi"``     full passes over all places until nothing  networks without; discrete entries on accelerators
                 changes, at most ``T``
``"sequential"`` ``T`` full passes, one place of each       comparison
===============  =========================================  =================================================

All three find the same fixed point. Jacobi and sequential runs make the same passes, and agree bit for bit; cached
runs sum in another order, so that continuous entries agree to rounding and discrete ones unless the noise lies within
rounding of a step.

Reference:
    Y. Song, C. Meng, R. Liao, S. Ermon, Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving,
    2021, arXiv:2002.03629.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..foundation.causal import CausalNetwork, transformed
from .conditionals import Conditional
from .factorization import Factorization
from .sequences import finish

__all__ = ["Walk", "draw", "solve"]


def solve(model: Factorization, z: Tensor, c: Tensor | None, method: str = "auto") -> Tensor:
    """Rows of noise to rows of entries, without gradient.

    Arguments:
        model: has one order.
        z: ``(rows, T)``.
        c: rows of context or ``None``.
        method: one of :data:`METHODS`.
    """
    z = z.detach()
    if method == "auto":
        method = "cached" if has_cache(model) else "jacobi"
    with torch.no_grad():
        if method == "cached":
            return _walk(model, z, c)
        return _passes(model, z, c, one_by_one=method == "sequential")


def draw(model: Factorization, like: Tensor, c: Tensor | None) -> Tensor:
    """Rows of entries, without gradient; cheaper than :func:`solve`, for a mixture draws a component and has no root.

    Arguments:
        model: has one order.
        like: ``(rows, T)``, tells number, dtype and device of the rows.
        c: rows of context or ``None``.
    """
    with torch.no_grad():
        walk = Walk(model, like, c)
        for _ in walk.places:
            walk.put(walk.head.sample(walk.parameters()))
            if walk.all_ended():
                break
        return walk.values()


def _walk(model: Factorization, z: Tensor, c: Tensor | None) -> Tensor:
    walk = Walk(model, z, c)
    for v in walk.places:
        walk.put(walk.head.quantile(walk.parameters(), z[:, v]))
        if walk.all_ended():
            break
    return walk.values()


def _passes(model: Factorization, z: Tensor, c: Tensor | None, one_by_one: bool) -> Tensor:
    """Full passes; after ``n`` of them the first ``n`` places are right, with luck many more."""
    x = torch.zeros_like(z, dtype=_dtype(model, z))
    for v in model.order.tolist():
        new = model.conditional.quantile(model.parameters_of(x, c), z).to(x.dtype)
        if model.eos is not None:
            new = finish(new, model.eos, model.pad)
        if one_by_one:
            new = torch.where(torch.arange(z.shape[1], device=z.device) == v, new, x)
        elif not transformed() and torch.equal(new, x):
            break
        x = new
    return x


def _dtype(model: Factorization, z: Tensor) -> torch.dtype:
    """Of entries: half precision has no room for the numbers of many tokens."""
    return torch.promote_types(z.dtype, torch.float32) if model.conditional.discrete else z.dtype


def has_cache(model: Factorization) -> bool:
    """Whether the network has steps of its own, and does not repeat itself at each of them."""
    return type(model.network).step is not CausalNetwork.step


class Walk:
    """A batch of rows on its way through the places of one order.

    Arguments:
        model: has one order.
        like: ``(rows, T)``, tells number, dtype and device of the rows.
        c: rows of context or ``None``.

    Attributes:
        places: the variables in their order.
        position: number of entries put so far.
    """

    def __init__(self, model: Factorization, like: Tensor, c: Tensor | None) -> None:
        self.model, self.position, self.places = model, 0, model.order.tolist()
        self._network, self._temperature, self._eos, self._c = model.network, model.temperature, model.eos, c
        self._heads = [model.conditional.head_of(v) for v in self.places]
        if c is not None:  # buffers are batched under vmap if either is
            like = torch.zeros_like(like) + torch.zeros_like(c[:, :1])
        self._x = like.new_zeros(like.shape, dtype=_dtype(model, like))
        self._entry: Tensor | None = None
        self._cache = model.network.begin(len(like), c, like, model.network_order)

    @property
    def head(self) -> Conditional:
        """The conditional of the next entry."""
        return self._heads[self.position]

    def parameters(self) -> Tensor:
        """Parameters of the next entry, ``(rows, size)``."""
        head = self.head
        theta = self._network.step(self._cache, self._entry)[..., : head.size]
        return theta if self._temperature == 1 else head.tempered(theta, self._temperature)

    def put(self, x: Tensor) -> None:
        """Set the next entry, ``(rows,)``."""
        v = self.places[self.position]
        if self._eos is not None:
            x = torch.where(self.has_ended(), self.model.pad, x)
        x = x.to(self._x.dtype)
        self._x[:, v] = x
        self._entry = self.model.entry_of(x, v)
        self.position += 1

    def has_ended(self) -> Tensor:
        """Which rows are sequences that have ended, ``(rows,)``."""
        if self._eos is None:
            return torch.zeros(len(self._x), dtype=torch.bool, device=self._x.device)
        return (self._x[:, : self.position] == self._eos).any(-1)

    def all_ended(self) -> bool:
        """Whether all rows are sequences that have ended; the rest of them is then padded."""
        if self._eos is None or transformed() or not bool(self.has_ended().all()):
            return False
        self._x[:, self.position :] = self.model.pad
        return True

    def values(self) -> Tensor:
        """Entries put so far, ``(rows, T)``, zeros elsewhere."""
        return self._x

    def fork(self, index: Tensor) -> Walk:
        """Rows by number, with repetition: a walk of its own that stands where this one stands."""
        new = object.__new__(Walk)
        new.__dict__.update(self.__dict__)
        new._x = self._x[index]
        new._c = None if self._c is None else self._c[index]
        new._entry = None if self._entry is None else self._entry[index]
        new._cache = self._cache.select(index)
        return new
