r"""Continuous mixtures: entries that are independent given a latent vector, summed over many latents, exactly.

.. math:: p(x) = \frac 1K \sum_{k=1}^K \prod_{t=1}^T p\big(x_t \mid \theta_t(z_k)\big), \qquad
          \theta(z) \text{ a network}, \quad z_1, \dots, z_K \text{ points of a quasi-random normal net}.

The law *is* the finite mixture over its ``K`` points: density and sampler are exact. While it learns, the points are
fewer and shifted at random at every step, so that the network learns the integral over :math:`z \sim \mathcal N(0, I)`
and not the points. All components see all entries at once: for discrete entries a density is one matrix product. Where
an autoregressive model reads the entries one after the other, this one explains them by a common cause; averaged in an
:class:`~pyro_genmods.factorize.Ensemble`, the two beat either.

Reference:
    A. H. C. Correia, G. Gala, E. Quaeghebeur, C. de Campos, R. Peharz, Continuous Mixtures of Tractable Probabilistic
    Models, 2022, arXiv:2209.10584.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..contract import Cost, Density, GenerativeModel
from ..foundation.errors import ShapeError
from ..foundation.networks import place_of
from ..foundation.shapes import Context, Rows, Values
from .arguments import event_shape_of, support_of
from .conditionals import Bernoulli, Conditional
from .mixed import Mixed

__all__ = ["ContinuousMixture"]


class ContinuousMixture(GenerativeModel):
    """A mixture over a continuous latent vector with independent entries.

    Arguments:
        features: number of entries, or the shape of an event.
        conditional: law of an entry given the latent; default ``Bernoulli()``.
        latent_features: size of the latent vector.
        points: number of components of the law.
        training_points: number of components in a training step.
        width: of the network's two hidden layers.
        network: in place of the default one, latents ``(K, latent_features)`` to ``(K, T * conditional.size)``.
        support: where continuous events live.

    Shape:
        events ``(features,)`` or ``features``.

    Raises:
        TypeError: ``conditional`` is something else, or of columns of different kinds.
        ShapeError: the network puts out another size.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> law = gm.factorize.ContinuousMixture(3, latent_features=2, points=64)()
        >>> everything = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
        >>> torch.allclose(law.log_prob(everything).exp().sum(), torch.tensor(1.0))
        True
    """

    density: ClassVar[Density] = Density.EXACT
    has_rsample = False

    def __init__(
        self,
        features: int | tuple[int, ...],
        conditional: Conditional | None = None,
        *,
        latent_features: int = 16,
        points: int = 4096,
        training_points: int = 1024,
        width: int = 128,
        network: nn.Module | None = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        conditional = Bernoulli() if conditional is None else conditional
        shape = event_shape_of(features, None)
        where, native = support_of(conditional, shape, support, None, None)
        if isinstance(conditional, Mixed):
            raise TypeError("conditional: columns of different kinds need an Autoregressive model.")
        if min(latent_features, points, training_points, width) < 1:
            raise ValueError("latent_features, points, training_points, width: need at least 1 each.")
        super().__init__(shape, (), where, native)
        self.conditional, self.value_dtype = conditional, torch.int64 if conditional.integer else None
        self.network = _decoder(latent_features, width, self.features, conditional) if network is None else network
        for name, number in (("points", points), ("training_points", training_points)):
            self.register_buffer(name, torch.quasirandom.SobolEngine(latent_features, True, seed=0).draw(number))
        self.to(*reversed(place_of(self.network)))
        with torch.no_grad():
            size = self.network(self._latents(self.points[:1])).shape[-1]
        if size != self.features * conditional.size:
            raise ShapeError(f"network: puts out {size} numbers, needs {self.features} x {conditional.size}.")

    @property
    def cost(self) -> Cost:
        """One pass of the network over the points, whatever the number of rows."""
        return Cost(sample=1, score=1)

    @property
    def takes_any_dtype(self) -> bool:
        return self.conditional.discrete

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Negative log-likelihood in nats; while training, under fewer points, shifted at random."""
        if not self.training:
            return super().loss(x, context)
        law = self(context)
        _, rows, _ = law._rows(x, law.event_shape)
        y, volume = self.coordinates.pull(rows)
        points = (self.training_points + torch.rand_like(self.training_points[:1])) % 1
        return -(self._log_prob(y, points) + volume)

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        return self._log_prob(y, self.points)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        dtype, device = self.place
        which = torch.randint(len(self.points), (rows,), device=device)
        return self.conditional.sample(self.parameters_at(self.points[which])).to(dtype)

    def _latents(self, u: Tensor) -> Tensor:
        eps = torch.finfo(u.dtype).eps
        return torch.special.ndtri(u.clamp(eps, 1 - eps))

    def parameters_at(self, points: Tensor) -> Tensor:
        """Parameters of all conditionals at points of the unit cube, ``(K, T, size)``."""
        return self.network(self._latents(points)).unflatten(-1, (self.features, self.conditional.size))

    def _log_prob(self, y: Tensor, points: Tensor) -> Tensor:
        theta = self.parameters_at(points)
        if self.conditional.discrete:
            log_p = self.conditional.log_probs(theta)
            gain = (log_p[..., 1:] - log_p[..., :1]).flatten(1)
            others = torch.arange(1, log_p.shape[-1], device=y.device)
            seen = (y[..., None] == others).to(gain.dtype).flatten(1)
            each = torch.addmm(log_p[..., 0].sum(-1), seen, gain.mT)
        else:
            each = self.conditional.log_prob(theta, y[:, None]).sum(-1)
        return each.logsumexp(-1) - math.log(len(points))


class _Skip(nn.Module):
    """A linear map and a network with two hidden layers, added up."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.output, self.skip = nn.Linear(width, outputs, bias=False), nn.Linear(inputs, outputs)

    def forward(self, z: Tensor) -> Tensor:
        h = nn.functional.silu(self.first(z))
        h = h + nn.functional.silu(self.second(h))
        return self.output(h) + self.skip(z)


def _decoder(latent_features: int, width: int, features: int, conditional: Conditional) -> nn.Module:
    network = _Skip(latent_features, width, features * conditional.size)
    with torch.no_grad():
        network.skip.bias.copy_(torch.tensor(conditional.start()).repeat(features))
    return network
