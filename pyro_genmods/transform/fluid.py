r"""The velocity of a continuous flow and its divergence, from a network.

The network may know the *baseline* :math:`\beta(t)\, y`, the velocity of standard normal data
(:func:`~pyro_genmods.foundation.flow_matching.gaussian_velocity`), and give what is to be added to it; the baseline's
divergence is :math:`D \beta(t)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..foundation.divergence import estimated_divergence, exact_divergence
from ..foundation.errors import ShapeError
from ..foundation.flow_matching import gaussian_velocity
from ..foundation.networks import place_of
from ..foundation.vector_field import VectorField

__all__ = ["Fluid", "check_velocity"]


@dataclass(frozen=True)
class Fluid:
    """A field for the solver.

    Arguments:
        network: ``network(t, y, c)``; one with a method ``with_divergence(t, y, c)`` gives its exact divergence by it.
        baseline: add the velocity of standard normal data.
        probes: of an estimated divergence, ``(probes, features)`` or ``(probes, rows, features)``; ``None`` for the
            exact one.

    Example:
        >>> fluid = Fluid(VectorField(2), baseline=True, probes=None)
        >>> fluid.velocity(torch.tensor(1.0), torch.tensor([[3.0, 4.0]]), None).tolist()
        [[3.0, 4.0]]
        >>> fluid.augmented(torch.tensor(1.0), torch.tensor([[3.0, 4.0, 0.0]]), None).tolist()
        [[3.0, 4.0, 2.0]]
    """

    network: nn.Module
    baseline: bool
    probes: Tensor | None

    def velocity(self, t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
        """Of rows ``(rows, features)``."""
        v = self.network(self._time(t, y), y, c)
        return torch.addcmul(v, y, gaussian_velocity(t)) if self.baseline else v

    def augmented(self, t: Tensor, state: Tensor, c: Tensor | None) -> Tensor:
        """Of rows with a last column for the logarithm of the volume around them, ``(rows, features + 1)``."""
        y = state[:, :-1]
        v, divergence = self._with_divergence(self._time(t, y), y, c)
        if self.baseline:
            slope = gaussian_velocity(t)
            v, divergence = torch.addcmul(v, y, slope), divergence + y.shape[1] * slope.reshape(-1)
        return torch.cat([v, divergence[:, None]], 1)

    def _with_divergence(self, t: Tensor, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        network, probes = self.network, self.probes
        if probes is None:
            if hasattr(network, "with_divergence"):
                return network.with_divergence(t, y, c)
            return exact_divergence(lambda y: network(t, y, c), y)
        if isinstance(network, VectorField):
            tangents = probes.movedim(0, -2)
            v, along = network.with_tangents(t, y, c, tangents)
            return v, (along * tangents).sum(-1).mean(-1)
        return estimated_divergence(lambda y: network(t, y, c), y, probes)

    def _time(self, t: Tensor, y: Tensor) -> Tensor:
        """Time as the network wants it; ours works less if it is one for all rows."""
        return t if isinstance(self.network, VectorField) else t.expand(len(y), 1)


def check_velocity(network: nn.Module, features: int, context_features: int) -> None:
    """Refuse a network that makes no velocity of rows of these widths.

    Arguments:
        network: called as ``network(t, y, c)``.
        features, context_features: numbers of columns.

    Raises:
        ShapeError: it fails, or returns another shape.

    Example:
        >>> check_velocity(VectorField(3, 2), 3, 2)
    """
    dtype, device = place_of(network)
    t, y, c = (torch.zeros(2, width, dtype=dtype, device=device) for width in (1, features, context_features))
    name = type(network).__name__
    try:
        with torch.no_grad():
            shape = tuple(network(t, y, c if context_features else None).shape)
    except (RuntimeError, TypeError) as error:
        raise ShapeError(
            f"network: {name} fails on network(t, y, c) with t of (2, 1), y of (2, {features}) and c of "
            f"{(2, context_features) if context_features else None}: {error}"
        ) from error
    if shape != (2, features):
        raise ShapeError(f"network: {name} returned shape {shape} for 2 rows, needs (2, {features}).")
