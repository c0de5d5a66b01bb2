r"""Hamiltonian moves whose metric depends on where a particle is.

A law that is wide here and narrow there (a funnel) has no metric that serves it. Given a mixture of Gaussians with the
law's shape (:mod:`~pyro_genmods.foundation.mixture`) a particle at :math:`x` first draws the component it is in,

.. math:: k \sim r_k(x) = w_k\, \mathcal N(x; m_k, C_k) / b(x) ,

then moves by Hamiltonian dynamics under :math:`U` with the metric :math:`C_k`, and accepts with probability

.. math:: \min\Bigl(1, e^{H(x, p) - H(x', p')}\, \frac{r_k(x')}{r_k(x)}\Bigr) .

Both steps leave :math:`e^{-U(x)}\, r_k(x)` on pairs :math:`(x, k)` as it is, and with it the law of :math:`x`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adaptation import harmonic_mean
from .chains import State, metropolis
from .mixture import Mixture
from .moves import LEAST, SPREAD, TARGET, HamiltonianMoves, Tempered

__all__ = ["LocalMoves"]


class LocalMoves(HamiltonianMoves):
    """Moves with the metric of the component of a mixture in which a particle is.

    Arguments:
        energy, q, generator, groups: see :class:`~pyro_genmods.foundation.moves.Moves`.
        mixture: one for every so many groups, in float of the particles.

    Attributes:
        size: of a leapfrog, before it is spread over particles.
        gradients: evaluated so far, particle by particle.

    Example:
        >>> from pyro_genmods.foundation.annealing import Path
        >>> g = torch.Generator().manual_seed(0)
        >>> widths = torch.tensor([0.1, 10.0])
        >>> mixture = Mixture.of(torch.zeros(1, 2) - 0.69, torch.zeros(1, 2, 1), widths[None, :, None, None] ** 2)
        >>> path = Path(lambda q: -mixture.log_prob(q[None])[0], lambda q: 0 * q[:, 0])
        >>> path.inverse_temperature = torch.ones(1000)
        >>> q = widths.repeat(500)[:, None] * torch.randn(1000, 1, generator=g)            # draws of the law
        >>> moves = LocalMoves(path, q, g, 1, mixture)
        >>> q, _, rate, _ = moves.move(q, 20, 20)
        >>> bool(rate > 0.5), abs(float((q.abs() < 0.5).float().mean()) - 0.52) < 0.06     # which they leave as it is
        (True, True)
    """

    def __init__(self, energy: Tempered, q: Tensor, generator: torch.Generator, groups: int, mixture: Mixture) -> None:
        super().__init__(energy, q, generator, groups)
        self.mixture = mixture

    def settings(self) -> float:
        return self.size

    def use(self, settings: float) -> None:
        self.size, self.learning = settings, False

    def learn(self, q: Tensor, weight: Tensor) -> None:
        """The metrics are those of the mixture."""

    def begin(self, q: Tensor) -> Tensor:
        self._shares = self._log_shares(q)
        return super().begin(q)

    def once(self) -> tuple[Tensor, Tensor, float]:
        self._count += 1
        before, generator = self._state, self.generator
        k = torch.multinomial(self._shares.exp(), 1, generator=generator)
        noise = torch.empty_like(before.position).normal_(generator=generator)
        log_uniform = torch.empty_like(noise[:, 0]).uniform_(generator=generator).log_()
        size = self.size * torch.empty_like(noise[:, :1]).uniform_(*SPREAD, generator=generator)
        leapfrogs = self.leapfrogs(self._count)
        after, momentum = self._dynamics(noise, self._factors(k[:, 0]), size, leapfrogs)
        shares = self._log_shares(after.position.nan_to_num(0, 0, 0))
        gained = before.energy - after.energy + 0.5 * (noise.square() - momentum.square()).sum(-1)
        ratio = gained + (shares - self._shares).gather(1, k)[:, 0]
        self._state, acceptance, accepted, _ = metropolis(before, after, ratio, log_uniform)
        self._shares = torch.where(accepted[:, None], shares, self._shares)
        self.gradients += leapfrogs * len(noise)
        if self.learning:  # from the dynamics alone: to leave a component is no fault of the step size
            fine = torch.where(acceptance > 0, gained.clamp(max=0).exp(), 0.0).nan_to_num(0.0)
            self.size *= math.exp(harmonic_mean(fine, torch.ones_like(accepted), LEAST) - TARGET)
        return self._state.position, -self.energy.parts(self._state.position)[1], float(acceptance.mean())

    def _dynamics(self, momentum: Tensor, factor: Tensor, size: Tensor, leapfrogs: int) -> tuple[State, Tensor]:
        """Leapfrogs, each particle with a triangle of its own, ``(particles, dim, dim)``."""
        position, gradient = self._state.position, self._state.gradient
        for _ in range(leapfrogs):
            momentum = momentum - 0.5 * size * _product(factor.mT, gradient)
            position = position + size * _product(factor, momentum)
            value, gradient = self.energy.value_and_grad(position)
            momentum = momentum - 0.5 * size * _product(factor.mT, gradient)
        return State(position, value, gradient), momentum

    def _log_shares(self, q: Tensor) -> Tensor:
        """To which components particles belong, ``(particles, components)``."""
        parts = self.mixture.log_parts(q.unflatten(0, (len(self.mixture.means), -1))).flatten(0, 1)
        return parts.log_softmax(-1)

    def _factors(self, k: Tensor) -> Tensor:
        """Triangles of the components of particles."""
        factors = self.mixture.factors
        batch = torch.arange(len(factors), device=k.device).repeat_interleave(len(k) // len(factors))
        return factors[batch, k]


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x[..., None])[..., 0]
