"""The law of a binary energy as Pyro sees it: an energy's law, whose events can be listed where they are few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..contract import Density, GenerativeDistribution
from ..foundation.bits import all_bits
from ..foundation.errors import DensityError, DoublyIntractableError
from .law import EnergyDistribution

__all__ = ["BinaryDistribution"]


class BinaryDistribution(EnergyDistribution):
    """A binary energy's law at a context.

    Arguments are those of :class:`~pyro_genmods.contract.GenerativeDistribution`.

    Raises:
        DoublyIntractableError: at ``log_prob``, where its constant depends on what is being inferred or learned, and
            none is attached.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> law = gm.shape.DiscreteEnergy(2, network=lambda y: -y.prod(-1))()       # both ones: e times likelier
        >>> law.enumerate_support().tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
        >>> law.mean
        tensor([0.6502, 0.6502])
    """

    ENUMERABLE = 12  # bits
    model: Any

    def _check_constant(self) -> None:
        try:
            super()._check_constant()
        except DoublyIntractableError as error:
            raise DoublyIntractableError(
                f"{error} Where the constant is a short sum, normalized=True makes it part of the density."
            ) from None

    def steps(self, n: int) -> Iterator[Any]:
        """Refused: bits have no steps that could be steered."""
        return GenerativeDistribution.steps(self, n)

    # -- few bits ------------------------------------------------------------------------------------------------

    @property
    def has_enumerate_support(self) -> bool:
        """Whether all events can be listed, at most 4096; Pyro can then sum the site out.

        It can do so without a constant, which cancels; the value of an ELBO then lacks it.
        """
        return self.model.enumerable

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All events, ``(number, *batch_shape, *event_shape)``, or with batch dimensions of size 1.

        Raises:
            DensityError: there are more than 4096 events.
        """
        model = self.model
        self._check_enumerable("use sample(), or marginalise by hand.")
        rows = all_bits(model.features, model.reference.logits)
        rows = rows.reshape((len(rows),) + (1,) * len(self.batch_shape) + self.event_shape)
        return rows.expand((len(rows), *self.batch_shape, *self.event_shape)) if expand else rows

    @property
    def mean(self) -> Tensor:
        """Probabilities of ones, ``(*batch_shape, *event_shape)``, summed over all events.

        Raises:
            DensityError: there are more than 4096 events.
        """
        self._check_enumerable("average draws instead.")
        mean = self._masses().exp() @ all_bits(self.model.features, self.model.reference.logits)
        return mean.expand(self.batch_shape.numel(), -1).reshape(self.batch_shape + self.event_shape)

    def entropy(self, num_samples: int = 1000) -> Tensor:
        """Entropy in nats, ``batch_shape``: the exact sum where events are listed, else an average over draws.

        Arguments:
            num_samples: draws to average over.

        Raises:
            DensityError: there are many events, and no normaliser.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, needs at least 1.")
        with torch.no_grad():
            if self.has_enumerate_support:
                masses = self._masses()
                return -(masses.exp() * masses).sum(-1).expand(self.batch_shape.numel()).reshape(self.batch_shape)
            if self.density is Density.UNNORMALIZED:
                raise DensityError(f"{self} has no normaliser, and an entropy needs one; shape.normalize attaches one.")
            return -self.log_prob(self.sample((num_samples,))).mean(0)

    def _masses(self) -> Tensor:
        """Log masses of all events at each context, ``(contexts, events)``; one row of them without context."""
        events = all_bits(self.model.features, self.model.reference.logits)
        return self.model.log_masses_rows(events, self._draw_shape(())[1]).log_softmax(-1)

    def _check_enumerable(self, remedy: str) -> None:
        if not self.has_enumerate_support:
            raise DensityError(
                f"{self}: has 2^{self.model.features} events, at most 2^{self.ENUMERABLE} are listed; {remedy}"
            )
