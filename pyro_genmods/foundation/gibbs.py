r"""Moves of binary events: one bit at a time, the one that a gradient points to.

A differentiable energy :math:`U` of rows :math:`x \in \{0, 1\}^n` knows, to first order, what every flip would gain,

.. math:: d_i(x) = (2 x_i - 1)\, \partial_i U(x) \;\approx\; U(x) - U(x^{\neg i}) ,

from one evaluation of its gradient. *Gibbs with gradients* proposes the bit
:math:`i \sim \operatorname{softmax}(d(x) / 2)` and accepts its flip with probability

.. math:: \min\Bigl(1,\; e^{U(x) - U(x')}\, \frac{q(i \mid x')}{q(i \mid x)}\Bigr),
          \qquad q(i \mid x) = \operatorname{softmax}(d(x) / 2)_i ,

which leaves :math:`e^{-U}` invariant whatever the quality of the approximation: a poor gradient costs acceptance, never
truth. Chains are rows; a target with an inverse temperature for each row
(:class:`~pyro_genmods.foundation.annealing.Path`) moves each at its own.

Reference:
    W. Grathwohl, K. Swersky, M. Hashemi, D. Duvenaud, C. J. Maddison, Oops I Took A Gradient: Scalable Sampling for
    Discrete Distributions, 2021, arXiv:2102.04509.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .chains import PotentialLike, State, start
from .moves import Moves, Tempered

__all__ = ["GibbsMoves", "Sweeps", "bernoulli", "flip_log_probs", "gibbs_with_gradients"]

MOST_FLIPS = 32  # proposals of one sweep, at most


def flip_log_probs(state: State) -> Tensor:
    """Log probability with which each bit is proposed, ``(chains, bits)``.

    Example:
        >>> flip_log_probs(State(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2))).exp()
        tensor([[0.5000, 0.5000]])
    """
    return (0.5 * (2 * state.position - 1) * state.gradient).log_softmax(-1)


def gibbs_with_gradients(
    state: State, target: PotentialLike, gumbel: Tensor, log_uniform: Tensor
) -> tuple[State, Tensor]:
    """One proposal for every chain, accepted or not.

    Arguments:
        state: of :func:`~pyro_genmods.foundation.chains.start`; positions are zeros and ones.
        target: energies and gradients of rows.
        gumbel: standard Gumbel numbers, ``(chains, bits)``.
        log_uniform: logarithms of uniform numbers, ``(chains,)``.

    Returns:
        The state, and the probabilities of acceptance, 0 where an energy or gradient is not a number.

    Example:
        >>> from pyro_genmods.foundation.chains import Plain
        >>> target = Plain(lambda x: -2.0 * x[:, 0])                       # one bit: a flip is proposed for certain
        >>> state = start(torch.tensor([[0.0], [1.0]]), target)
        >>> state, rate = gibbs_with_gradients(state, target, torch.zeros(2, 1), torch.rand(2).log())
        >>> [round(float(p), 3) for p in rate]                             # up for certain, down with e^-2
        [1.0, 0.135]
    """
    ahead = flip_log_probs(state)
    bit = (ahead + gumbel).argmax(-1, keepdim=True)
    position = state.position.scatter(-1, bit, 1 - state.position.gather(-1, bit))
    proposal = State(position, *target.value_and_grad(position))
    gain = (flip_log_probs(proposal) - ahead).gather(-1, bit)[:, 0]
    log_ratio = state.energy - proposal.energy + gain
    accepted = log_uniform < log_ratio
    new = [torch.where(accepted.reshape(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(proposal, state, strict=True)]
    return State(*new), log_ratio.clamp_max(0).exp().nan_to_num(0.0)


def bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Independent bits with these log odds.

    Example:
        >>> bernoulli(torch.tensor([-50.0, 50.0]), torch.Generator())
        tensor([0., 1.])
    """
    return (torch.empty_like(logits).uniform_(generator=generator) < logits.sigmoid()).to(logits.dtype)


class Sweeps(Moves):
    """Moves that need no scale: a sweep over the bits of all particles.

    Arguments are those of :class:`~pyro_genmods.foundation.moves.Moves`.

    Attributes:
        gradients: evaluations of the energy so far, particle by particle; a sweep that needs no gradient counts as one.

    Example:
        >>> issubclass(GibbsMoves, Sweeps)
        True
    """

    def __init__(self, energy: Tempered, q: Tensor, generator: torch.Generator, groups: int = 1) -> None:
        super().__init__(energy, q, generator, groups)
        self.gradients = 0

    @abstractmethod
    def take(self, q: Tensor) -> None:
        """Take particles ``(particles, dim)`` at the energy's present temperature."""

    @abstractmethod
    def sweep(self) -> tuple[Tensor, float]:
        """Move all particles once: where they are, and the mean acceptance."""

    def learn(self, q: Tensor, weight: Tensor) -> None:
        """There is nothing to learn."""

    def begin(self, q: Tensor) -> Tensor:
        self.take(q)
        return -self.energy.parts(q)[1]

    def once(self) -> tuple[Tensor, Tensor, float]:
        q, rate = self.sweep()
        return q, -self.energy.parts(q)[1], rate

    def run(self, q: Tensor, sweeps: int) -> Tensor:
        """Where chains from rows arrive after so many sweeps."""
        self.take(q)
        for _ in range(sweeps):
            q, _ = self.sweep()
        return q

    def count(self, evaluations: int) -> None:
        """Remember what was evaluated."""
        self.gradients += evaluations
        self.energy.num_gradients += evaluations


class GibbsMoves(Sweeps):
    """Sweeps of Gibbs with gradients: as many proposals as there are bits, and no more than 32.

    Half of the rows leave the last proposal of a sweep out: an energy that is flat accepts every flip, and would tie
    the number of ones to the parity of the start.

    Arguments are those of :class:`~pyro_genmods.foundation.moves.Moves`.

    Example:
        >>> from pyro_genmods.foundation.annealing import Path, anneal
        >>> path = Path(lambda x: 0.0 * x.sum(-1), lambda x: -x.sum(-1))   # from four fair bits to four with odds e
        >>> g = torch.Generator().manual_seed(0)
        >>> found = anneal(path, torch.rand(2000, 4, generator=g).round(), GibbsMoves(path, torch.zeros(1, 4), g))
        >>> round(float(found.position.mean()), 1), round(float(found.log_ratio[0]), 1)    # 4 log((1 + e) / 2)
        (0.7, 2.5)
    """

    def __init__(self, energy: Tempered, q: Tensor, generator: torch.Generator, groups: int = 1) -> None:
        super().__init__(energy, q, generator, groups)
        self.flips = min(q.shape[1], MOST_FLIPS)

    def take(self, q: Tensor) -> None:
        self._state = start(q, self.energy)
        self.count(len(q))

    def sweep(self) -> tuple[Tensor, float]:
        q, rates = self._state.position, []
        lazy = torch.empty_like(q[:, 0]).uniform_(generator=self.generator) < 0.5
        for k in range(self.flips):
            exponential = torch.empty_like(q).exponential_(generator=self.generator)
            log_uniform = torch.empty_like(q[:, 0]).uniform_(generator=self.generator).log_()
            if k == self.flips - 1:
                log_uniform = log_uniform.masked_fill(lazy, torch.inf)
            self._state, rate = gibbs_with_gradients(self._state, self.energy, -exponential.log(), log_uniform)
            rates.append(rate.mean())
        self.count(self.flips * len(q))
        return self._state.position, float(torch.stack(rates).mean())
