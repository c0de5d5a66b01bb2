r"""Kernels: Hamiltonian Monte Carlo, the Metropolis-adjusted Langevin algorithm, and the unadjusted one.

A kernel is a transition of ``foundation.chains`` with what it learns in warm-up. Each works in two places:

* in :class:`pyro_genmods.infer.MCMC`, where it moves all chains at once (:meth:`ChainKernel.begin`,
  :meth:`ChainKernel.advance`);
* in ``pyro.infer.MCMC``, through Pyro's own protocol, one chain at a time.

``model``, ``potential_fn``, ``transforms`` and ``init_strategy`` mean what they mean in Pyro.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..foundation.adaptation import halton
from ..foundation.chains import Info, State, Step, hamiltonian, langevin, mala
from .chain_kernel import ChainKernel

__all__ = ["HMC", "MALA", "ULA"]

JITTER = 0.5  # trajectories last between (1 - JITTER) and (1 + JITTER) times their mean


class HMC(ChainKernel):
    r"""Hamiltonian Monte Carlo over many chains that adapt together.

    Step size by dual averaging of the harmonic mean acceptance over chains, scale from moments pooled over chains,
    trajectory length by the ChEES criterion per unit of length; all in warm-up, all fixed afterwards. Lengths are
    jittered by a low-discrepancy sequence, the same for all chains.

    Arguments:
        model: a Pyro program, or
        potential_fn: an energy as a function of a dict of unconstrained values of one chain, or a
            :class:`pyro_genmods.infer.Potential`.
        step_size: first step size; ``None`` looks for one.
        trajectory_length: mean duration of a trajectory in units in which the target is round; ``None`` learns it.
        num_steps: a fixed number of leapfrogs instead.
        adapt_step_size, adapt_mass_matrix: whether these are learned.
        full_mass: learn a whole covariance instead of standard deviations; ``None`` does so where coordinates turn out
            to be strongly correlated.
        transforms, max_plate_nesting, init_strategy: as in Pyro. ``init_strategy`` may also be something with
            ``sample_posterior(n)``: a guide, or an :class:`pyro_genmods.infer.SMC`.
        target_accept_prob: of the harmonic mean over chains.
        max_leapfrogs: longest trajectory.
        level, road, max_batch: of :func:`pyro_genmods.infer.potential`.

    References:
        M. D. Hoffman, A. Radul, P. Sountsov, An Adaptive MCMC Scheme for Setting Trajectory Lengths in Hamiltonian
        Monte Carlo, 2021, AISTATS.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> mcmc = gm.infer.MCMC(gm.infer.HMC(model), num_samples=200, num_chains=16, progress_bar=False, seed=0)
        >>> mcmc.run(torch.tensor(2.0))
        >>> draws = mcmc.get_samples()["loc"]
        >>> round(float(draws.mean()), 1), round(float(draws.std()), 1)        # posterior: mean 1, variance 1/2
        (1.0, 0.7)
    """

    target = 0.651
    length = 1.3

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        trajectory_length: float | None = None,
        num_steps: int | None = None,
        max_leapfrogs: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(model, potential_fn, **options)
        for name, number in (("trajectory_length", trajectory_length), ("num_steps", num_steps)):
            if number is not None and not number > 0:
                raise ValueError(f"{name}: got {number}, needs a positive number, or None to learn it.")
        if max_leapfrogs < 1:
            raise ValueError(f"max_leapfrogs: got {max_leapfrogs}, needs at least 1.")
        self.num_steps, self.max_leapfrogs = num_steps, max_leapfrogs
        self.length = trajectory_length or HMC.length
        self._adapt["length"] = trajectory_length is None and num_steps is None

    def _duration(self) -> tuple[float, int]:
        if self.num_steps is not None:
            return 1.0, self.num_steps
        time = 1 - JITTER + 2 * JITTER * halton(self.iteration + 1)
        leapfrogs = math.ceil(time * self.warmup.length / self.warmup.step_size)
        return time, max(1, min(self.max_leapfrogs, leapfrogs))

    def _expected_leapfrogs(self) -> float:
        if self.num_steps is not None:
            return float(self.num_steps)
        return min(float(self.max_leapfrogs), 0.5 + self.warmup.length / self.warmup.step_size)

    def _transition(self, state: State, step: Step) -> tuple[State, Info]:
        return hamiltonian(state, self.potential, step)


class MALA(ChainKernel):
    """The Metropolis-adjusted Langevin algorithm: one gradient for each draw.

    Cheap and robust; it explores as a random walk, so draws of neighbours are much alike. Arguments as in :class:`HMC`.

    References:
        G. O. Roberts, J. S. Rosenthal, Optimal Scaling of Discrete Approximations to Langevin Diffusions, 1998, JRSS B.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> kernel = gm.infer.MALA(lambda: pyro.sample("x", dist.Normal(3.0, 1.0)))
        >>> mcmc = gm.infer.MCMC(kernel, num_samples=200, num_chains=32, progress_bar=False, seed=0)
        >>> mcmc.run()
        >>> round(float(mcmc.get_samples()["x"].mean()), 1)
        3.0
    """

    target = 0.574

    def _transition(self, state: State, step: Step) -> tuple[State, Info]:
        return mala(state, self.potential, step)


class ULA(ChainKernel):
    r"""The unadjusted Langevin algorithm: biased, by an amount that its step size decides.

    In warm-up the steps are corrected, and the step size is brought to a high acceptance; afterwards the correction is
    left away. On a Gaussian the variance is then too large by a factor of :math:`1 / (1 - \epsilon^2 / 4)` with
    :math:`\epsilon` in standard deviations. The bias is declared in the result. Arguments as in :class:`HMC`; with
    ``adapt_step_size=False`` and a ``step_size`` the bias is one's own choice.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> kernel = gm.infer.ULA(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> kernel.exact
        False
    """

    exact = False
    target = 0.95

    def _transition(self, state: State, step: Step) -> tuple[State, Info]:
        return (langevin if self.warmup.finished else mala)(state, self.potential, step)
