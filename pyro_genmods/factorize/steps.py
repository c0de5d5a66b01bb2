r"""The sampler of an autoregressive law, one place at a time, for those who steer it.

Between places particles may be weighted by anything that depends on the event, and resampled: :meth:`Steps.fork` copies
caches along with entries. :meth:`Steps.look_ahead` finishes every particle by the law itself, on a copy of its cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distribution import GenerativeDistribution
from ..foundation.resampling import ancestor_rows
from .walk import Walk

__all__ = ["Step", "Steps"]


@dataclass(frozen=True)
class Step:
    """One place of all particles.

    Attributes:
        place: number of entries drawn so far.
        variable: the entry just drawn, in the flattened event.
        log_prob: ``(n, *batch_shape)``, log conditional of it, in the network's units.
    """

    place: int
    variable: int
    log_prob: Tensor


class Steps:
    """An iterator over the places of the order; ``n`` particles for each member of the batch.

    Arguments:
        law: has one order.
        n: number of particles.

    Attributes:
        log_prob: ``(n, *batch_shape)``, sum of the log conditionals so far.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> steps = gm.Autoregressive(3, gm.factorize.Bernoulli())().steps(100)
        >>> for step in steps:
        ...     value = steps.look_ahead()                     # finished events (100, 3)
        ...     weights = torch.softmax(3.0 * value.sum(-1), 0)    # of ones we want many
        ...     steps.fork(torch.multinomial(weights, 100, replacement=True))
        >>> steps.value.shape, bool(steps.value.mean() > 0.6)
        (torch.Size([100, 3]), True)
    """

    def __init__(self, law: GenerativeDistribution, n: int) -> None:
        self._law, self._shape = law, torch.Size([n]) + law.batch_shape
        _, c = law._draw_shape([n])
        like = law.model.orders.new_zeros(self._shape.numel(), law.model.features, dtype=law.model.place[0])
        self._walk = Walk(law.model, like, c)
        self.log_prob = like.new_zeros(self._shape)

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> Step:
        walk = self._walk
        if walk.position == len(walk.places):
            raise StopIteration
        variable = walk.places[walk.position]
        log_prob = self._draw(walk)
        self.log_prob = self.log_prob + log_prob
        return Step(walk.position, variable, log_prob)

    @torch.no_grad()
    def _draw(self, walk: Walk) -> Tensor:
        alive = ~walk.has_ended()
        theta, head = walk.parameters(), walk.head
        x = head.sample(theta)
        log_prob = head.log_prob(theta, x)
        walk.put(x)
        return torch.where(alive, log_prob, 0).reshape(self._shape)

    def fork(self, ancestors: Tensor) -> None:
        """Replace particles by copies of others.

        Arguments:
            ancestors: ``(n,)``, or ``(n, *batch_shape)`` where members of the batch differ.
        """
        index = ancestor_rows(ancestors, self._shape)
        self._walk = self._walk.fork(index)
        self.log_prob = self.log_prob.flatten()[index].reshape(self._shape)

    def look_ahead(self) -> Tensor:
        """Finished events ``(n, *batch_shape, *event_shape)``: what is missing is drawn, on copies of the caches."""
        walk = self._walk.fork(torch.arange(self._shape.numel(), device=self.log_prob.device))
        while walk.position < len(walk.places):
            self._draw(walk)
        return self._events(walk)

    @property
    def value(self) -> Tensor:
        """Events as far as they are drawn; the rest stands at zero of the network's units."""
        return self._events(self._walk)

    def _events(self, walk: Walk) -> Tensor:
        model = self._law.model
        with torch.no_grad():
            x, _ = model.coordinates.push(model.outside(walk.values()))
        return self._law._as_values(x).reshape(self._shape + self._law.event_shape)
