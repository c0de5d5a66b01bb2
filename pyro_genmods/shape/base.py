r"""What an energy tilts: a law that is normalised, and can be drawn.

.. math:: p(x) = \frac1Z\, b(x)\, e^{-E(x)}

With a base :math:`b` whose tails outweigh any network's growth the law is proper by construction, its draws have
somewhere to start from, and :math:`\log Z = \log \mathbb E_b\, e^{-E}` is the price of a tilt and not of a whole law.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..contract import Cost, Density, GenerativeModel
from ..coordinates import Coordinates
from ..foundation.numerics import normal_log_prob
from ..foundation.shapes import Context, Noise, Rows, Values
from ..foundation.whitening import Whitening

__all__ = ["GaussianBase"]

MOST_WHITE = 512  # features of which the whole covariance is taken


class GaussianBase(GenerativeModel):
    r"""The Gaussian with the mean and covariance of the data's coordinates, standard normal before there are data.

    Arguments:
        coordinates: of the events; shared with the model that tilts this law.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> base = GaussianBase(Coordinates(torch.Size([2]), constraints.real))
        >>> base().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    density: ClassVar[Density] = Density.EXACT

    def __init__(self, coordinates: Coordinates) -> None:
        super().__init__(coordinates.event_shape, (), coordinates.support)
        self.coordinates = coordinates
        self.whitening = Whitening(self.features)

    @property
    def cost(self) -> Cost:
        """No network is called."""
        return Cost(sample=0, score=0)

    def fit_(self, y: Rows) -> None:
        """Take the moments of rows of coordinates.

        Raises:
            DataError: columns are constant or collinear.
        """
        if self.features <= MOST_WHITE:
            self.whitening.fit_(y)

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        super().standardize(x, context)
        self.fit_(self.coordinates.pull(x)[0])

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        return normal_log_prob(self.whitening(y)) - self.whitening.log_scale()

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        return self.whitening.inverse(z)

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        return self.whitening(y)
