r"""Markov transitions of many chains at once.

A transition is a pure function of tensors: ``(state, potential, step)`` to ``(state, info)``. Chains are rows. All
randomness comes in with the step, so that a transition can be recorded, compiled and repeated bit for bit.

Positions :math:`q` have an energy :math:`U(q) = -\log p(q)`, and a scale :math:`S` that makes the target round: a
vector of standard deviations, or the lower triangle of a covariance. Momenta are kept in round coordinates,
:math:`n \sim \mathcal N(0, I)`, and with :math:`M^{-1} = S S^\top` one leapfrog of size :math:`\epsilon` is

.. math::
    n \leftarrow n - \tfrac\epsilon2 S^\top \nabla U(q), \qquad
    q \leftarrow q + \epsilon S n, \qquad
    n \leftarrow n - \tfrac\epsilon2 S^\top \nabla U(q) .

* **HMC** takes :math:`L` leapfrogs from fresh momenta and accepts with probability :math:`\min(1, e^{-\Delta H})`,
  :math:`H = U(q) + |n|^2 / 2`.
* **MALA** is HMC with one leapfrog: a step of size :math:`\eta = \epsilon^2 / 2` of the preconditioned Langevin
  diffusion, corrected.
* **Unadjusted Langevin** leaves the correction away. On a Gaussian of standard deviation :math:`s` its variance is
  :math:`s^2 / (1 - \epsilon^2 / (4 s^2))`, not :math:`s^2`: it is biased, by an amount that shrinks with the step.

There is one accept test for all. A proposal whose energy or gradient is not finite is rejected, never propagated, and
counted as a divergence, as is one whose energy error exceeds a thousand.

References:
    R. M. Neal, MCMC Using Hamiltonian Dynamics, 2011, arXiv:1206.1901.
    G. O. Roberts, R. L. Tweedie, Exponential Convergence of Langevin Distributions and Their Discrete Approximations,
    Bernoulli 2(4), 1996.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Info",
    "Plain",
    "PotentialLike",
    "State",
    "Step",
    "hamiltonian",
    "langevin",
    "leapfrog",
    "mala",
    "metropolis",
    "scaled",
    "start",
    "whitened",
]

DIVERGENCE = 1000.0


@runtime_checkable
class PotentialLike(Protocol):
    """What a transition asks of a target: energies and gradients of rows, and functions fused with them.

    Attributes:
        num_gradients: evaluated so far, counted chain by chain.

    Example:
        >>> isinstance(Plain(lambda q: 0.5 * q.square().sum(-1)), PotentialLike)
        True
    """

    num_gradients: int

    def value(self, q: Tensor) -> Tensor: ...

    def grad(self, q: Tensor) -> Tensor: ...

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]: ...

    def fuse(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]: ...


class State(NamedTuple):
    """Where the chains are.

    Attributes:
        position: ``(chains, dim)``.
        energy: ``(chains,)``, in nats.
        gradient: of the energy, ``(chains, dim)``.

    Example:
        >>> State(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 2)).position.shape
        torch.Size([4, 2])
    """

    position: Tensor
    energy: Tensor
    gradient: Tensor


class Step(NamedTuple):
    """One step of all chains: sizes and random numbers.

    Attributes:
        size: of a leapfrog, one number or a column ``(chains, 1)``.
        scale: standard deviations ``(dim,)``, those of each chain ``(chains, 1, dim)``, or a triangle ``(dim, dim)``.
        noise: standard normal, ``(chains, dim)``.
        log_uniform: logarithms of uniform numbers, ``(chains,)``.
        leapfrogs: how many.

    Example:
        >>> Step(torch.tensor(0.5), torch.ones(2), torch.randn(4, 2), torch.rand(4).log(), leapfrogs=3).leapfrogs
        3
    """

    size: Tensor
    scale: Tensor
    noise: Tensor
    log_uniform: Tensor
    leapfrogs: int = 1


class Info(NamedTuple):
    """What happened in a transition, chain by chain.

    Attributes:
        acceptance: probability of acceptance; 0 for proposals that are not finite.
        accepted, diverging: whether.
        energy: :math:`H` at the start, whose differences the energy diagnostics of HMC read.
        proposal: the proposed positions, ``(chains, dim)``.
        momentum: the round momenta of the proposals, ``(chains, dim)``.

    Example:
        >>> gaussian = Plain(lambda q: 0.5 * q.square().sum(-1))
        >>> step = Step(torch.tensor(0.1), torch.ones(2), torch.randn(4, 2), torch.rand(4).log())
        >>> mala(start(torch.zeros(4, 2), gaussian), gaussian, step)[1].diverging.any()
        tensor(False)
    """

    acceptance: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    proposal: Tensor
    momentum: Tensor


class Plain:
    """A target given by its energy alone, evaluated as it is written.

    Arguments:
        energy: maps positions ``(chains, dim)`` to energies ``(chains,)``, differentiable.

    Example:
        >>> Plain(lambda q: 0.5 * q.square().sum(-1)).grad(torch.tensor([[1.0, -2.0]]))
        tensor([[ 1., -2.]])
    """

    def __init__(self, energy: Callable[[Tensor], Tensor]) -> None:
        self.energy, self.num_gradients = energy, 0

    def value(self, q: Tensor) -> Tensor:
        """Energies, ``(chains,)``."""
        return self.energy(q).detach()

    def grad(self, q: Tensor) -> Tensor:
        """Gradients, ``(chains, dim)``."""
        return self.value_and_grad(q)[1]

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        leaf = q.detach().requires_grad_()
        with torch.enable_grad():
            values = self.energy(leaf)
            (gradients,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradients

    def fuse(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """The function with this target as its first argument."""
        return lambda *tensors: function(self, *tensors)


def start(position: Tensor, potential: PotentialLike) -> State:
    """The state at positions ``(chains, dim)``.

    Example:
        >>> gaussian = Plain(lambda q: 0.5 * q.square().sum(-1))
        >>> start(torch.zeros(2, 3), gaussian).energy
        tensor([0., 0.])
    """
    return State(position, *potential.value_and_grad(position))


def scaled(scale: Tensor, x: Tensor) -> Tensor:
    """From round coordinates to those of positions, :math:`S x`.

    Example:
        >>> scaled(torch.tensor([1.0, 2.0]), torch.ones(1, 2))
        tensor([[1., 2.]])
    """
    return x @ scale.mT if scale.dim() == 2 else x * _rows(scale)


def whitened(scale: Tensor, x: Tensor) -> Tensor:
    """From coordinates of positions to round ones, :math:`S^{-1} x`.

    Example:
        >>> whitened(torch.tensor([1.0, 2.0]), torch.ones(1, 2))
        tensor([[1.0000, 0.5000]])
    """
    return torch.linalg.solve_triangular(scale, x.mT, upper=False).mT if scale.dim() == 2 else x / _rows(scale)


def leapfrog(
    potential: PotentialLike, position: Tensor, momentum: Tensor, gradient: Tensor, size: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One leapfrog: position, round momentum and gradient after it.

    Example:
        >>> gaussian = Plain(lambda q: 0.5 * q.square().sum(-1))
        >>> one = torch.ones(1, 1)
        >>> q, n, g = leapfrog(gaussian, one, 0 * one, one, torch.tensor(0.1), torch.ones(1))
        >>> float(q), float(n)
        (0.9950000047683716, -0.09974999725818634)
    """
    momentum = momentum - 0.5 * size * _pulled(scale, gradient)
    position = position + size * scaled(scale, momentum)
    gradient = potential.grad(position)
    momentum = momentum - 0.5 * size * _pulled(scale, gradient)
    return position, momentum, gradient


def metropolis(old: State, new: State, log_ratio: Tensor, log_uniform: Tensor) -> tuple[State, Tensor, Tensor, Tensor]:
    """The one accept test: the next state, acceptance probabilities, who accepted, who diverged.

    Arguments:
        old, new: states before and proposed.
        log_ratio: logarithm of the acceptance ratio, ``(chains,)``.
        log_uniform: logarithms of uniform numbers, ``(chains,)``.

    Example:
        >>> gaussian = Plain(lambda q: 0.5 * q.square().sum(-1))
        >>> old, new = start(torch.zeros(2, 1), gaussian), start(torch.tensor([[1.0], [torch.nan]]), gaussian)
        >>> state, probability, accepted, diverging = metropolis(old, new, old.energy - new.energy, torch.zeros(2) - 1)
        >>> state.position.flatten(), probability, diverging
        (tensor([1., 0.]), tensor([0.6065, 0.0000]), tensor([False,  True]))
    """
    usable = new.energy.isfinite() & new.gradient.isfinite().all(-1) & ~log_ratio.isnan()
    log_ratio = torch.where(usable, log_ratio, -torch.inf)
    accepted = log_uniform < log_ratio
    row = accepted[:, None]
    state = State(
        torch.where(row, new.position, old.position),
        torch.where(accepted, new.energy, old.energy),
        torch.where(row, new.gradient, old.gradient),
    )
    return state, log_ratio.clamp(max=0).exp(), accepted, ~(log_ratio > -DIVERGENCE)


def hamiltonian(state: State, potential: PotentialLike, step: Step) -> tuple[State, Info]:
    """A transition of Hamiltonian Monte Carlo with so many leapfrogs; costs as many gradients, and one value.

    Example:
        >>> gaussian = Plain(lambda q: 0.5 * q.square().sum(-1))
        >>> noise, log_uniform = torch.randn(4, 2), torch.rand(4).log()
        >>> step = Step(torch.tensor(0.5), torch.ones(2), noise, log_uniform, leapfrogs=3)
        >>> state, info = hamiltonian(start(torch.zeros(4, 2), gaussian), gaussian, step)
        >>> state.position.shape, info.acceptance.shape
        (torch.Size([4, 2]), torch.Size([4]))
    """
    position, momentum, gradient = state.position, step.noise, state.gradient
    if step.leapfrogs > 1:
        run = potential.fuse(leapfrog, (position, momentum, gradient, step.size, step.scale))
        for _ in range(step.leapfrogs - 1):
            position, momentum, gradient = run(position, momentum, gradient, step.size, step.scale)
    potential.num_gradients += step.leapfrogs * len(position)
    rest = (position, momentum, gradient, step.size, step.scale, *state, step.noise, step.log_uniform)
    outcome = potential.fuse(_finish, rest)(*rest)
    return State(*outcome[:3]), Info(*outcome[3:])


def mala(state: State, potential: PotentialLike, step: Step) -> tuple[State, Info]:
    """A transition of the Metropolis-adjusted Langevin algorithm: one gradient, one value.

    Example:
        >>> gaussian = Plain(lambda q: 0.5 * q.square().sum(-1))
        >>> step = Step(torch.tensor(1.0), torch.ones(2), torch.randn(4, 2), torch.rand(4).log())
        >>> state, info = mala(start(torch.zeros(4, 2), gaussian), gaussian, step)
        >>> bool((info.acceptance <= 1).all())
        True
    """
    tensors = (*state, step.size, step.scale, step.noise, step.log_uniform)
    potential.num_gradients += len(step.noise)
    outcome = potential.fuse(_mala, tensors)(*tensors)
    return State(*outcome[:3]), Info(*outcome[3:])


def langevin(state: State, potential: PotentialLike, step: Step) -> tuple[State, Info]:
    """A step of the unadjusted Langevin algorithm: biased; one gradient and one value.

    A chain whose step leads to where the energy is not finite stays, and counts as diverging.

    Example:
        >>> gaussian = Plain(lambda q: 0.5 * q.square().sum(-1))
        >>> step = Step(torch.tensor(0.1), torch.ones(2), torch.zeros(4, 2), torch.zeros(4))
        >>> state, info = langevin(start(torch.ones(4, 2), gaussian), gaussian, step)
        >>> state.position[0]       # 1 - 0.1^2 / 2
        tensor([0.9950, 0.9950])
    """
    tensors = (*state, step.size, step.scale, step.noise)
    potential.num_gradients += len(step.noise)
    outcome = potential.fuse(_langevin, tensors)(*tensors)
    return State(*outcome[:3]), Info(*outcome[3:])


# -- what is fused with a potential -----------------------------------------------------------------------------------


def _pulled(scale: Tensor, gradient: Tensor) -> Tensor:
    r"""The gradient in round coordinates, :math:`S^\top g`."""
    return gradient @ scale if scale.dim() == 2 else gradient * _rows(scale)


def _rows(scale: Tensor) -> Tensor:
    """Standard deviations for all chains, or for each."""
    return scale.reshape(-1, scale.shape[-1])


def _finish(potential: PotentialLike, *tensors: Tensor) -> Any:
    """The last leapfrog, which evaluates the energy along with its gradient, and the accept test."""
    position, momentum, gradient, size, scale = tensors[:5]
    old, noise, log_uniform = State(*tensors[5:8]), *tensors[8:]
    momentum = momentum - 0.5 * size * _pulled(scale, gradient)
    position = position + size * scaled(scale, momentum)
    new = State(position, *potential.value_and_grad(position))
    momentum = momentum - 0.5 * size * _pulled(scale, new.gradient)
    before = old.energy + 0.5 * noise.square().sum(-1)
    after = new.energy + 0.5 * momentum.square().sum(-1)
    state, *judged = metropolis(old, new, before - after, log_uniform)
    return (*state, *judged, before, position, momentum)


def _mala(potential: PotentialLike, *tensors: Tensor) -> Any:
    old, (size, scale, noise, log_uniform) = State(*tensors[:3]), tensors[3:]
    return _finish(potential, old.position, noise, old.gradient, size, scale, *old, noise, log_uniform)


def _langevin(potential: PotentialLike, *tensors: Tensor) -> Any:
    old, (size, scale, noise) = State(*tensors[:3]), tensors[3:]
    drift = scaled(scale, _pulled(scale, old.gradient))
    position = old.position - 0.5 * size**2 * drift + size * scaled(scale, noise)
    new = State(position, *potential.value_and_grad(position))
    sure = torch.zeros_like(new.energy)
    state, acceptance, accepted, diverging = metropolis(old, new, sure, sure - 1)
    return (*state, acceptance, accepted, diverging, old.energy, position, noise)
