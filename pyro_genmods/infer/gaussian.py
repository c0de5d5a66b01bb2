r"""A Gaussian fit to an unnormalised log density over :math:`\mathbb R^D`: where a flow guide starts.

The evidence lower bound of :math:`q = \mathcal N(m, L L^\top)`, with :math:`x = m + L z`, is
:math:`\mathrm{ELBO}(q) = \mathbb E_z[\log p(x) - \log q(x)]`. In the coordinates :math:`z` its path-wise gradients are
averages of one vector per draw,

.. math:: v = L^\top \nabla \log p(x) + z, \qquad
          a = \mathbb E[v], \qquad B = \mathrm{tril}_{1/2}\, \mathbb E[v z^\top],

where :math:`\mathrm{tril}_{1/2}` keeps the lower triangle and halves the diagonal. Since the coordinates are those in
which :math:`q` is white, they are natural gradients, and the steps

.. math:: m \leftarrow m + \rho\, L a, \qquad
          L \leftarrow L \left(\rho\, \mathrm{strict}(B) + \exp(\rho\, \mathrm{diag}(B))\right)

do not depend on the units of :math:`x`: a posterior with scales from :math:`10^{-4}` to :math:`10^4` takes as many
steps as a round one. For a Gaussian target :math:`v = 0` at the optimum for every draw, so the fit becomes exact. No
mode is sought and no Hessian formed, so that a mode at infinity (hierarchical scales) does no harm.

References:
    T. Salimbeni, S. Eleftheriadis, J. Hensman, Natural Gradients in Practice, 2018, arXiv:1803.09151.
    G. Roeder, Y. Wu, D. Duvenaud, Sticking the Landing, 2017, arXiv:1703.09194.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gaussian", "fit_gaussian"]

LogDensity = Callable[[Tensor], Tensor]

START_SCALE = 0.1  # standard deviation of Pyro's own normal guides at their start
RATE = 0.5
OUTLIER = 1e3  # a draw pulls at most so many times as hard as the median draw
LONGEST = 0.4  # of a step, in standard deviations and per root of the dimension; one where that is more
SCALES = (1e-15, 1e15)  # an improper density has no best scale; stop long before overflow


@dataclass(frozen=True)
class Gaussian:
    """Mean ``(D,)``, lower Cholesky factor ``(D, D)`` and evidence lower bound of a fit, in nats.

    Example:
        >>> import torch
        >>> Gaussian(torch.zeros(1), torch.eye(1), elbo=-0.5).elbo
        -0.5
    """

    loc: Tensor
    tril: Tensor
    elbo: float


def fit_gaussian(log_density: LogDensity, start: Tensor, steps: int = 500, draws: int | None = None) -> Gaussian:
    """Fit a Gaussian to an unnormalised log density by natural gradient ascent of the evidence lower bound.

    Where the density, its gradient or the program behind it fails (infinite, NaN, an exception), the fit goes back to
    where it did not and takes smaller steps; it raises nothing and always returns finite numbers.

    Arguments:
        log_density: maps ``(draws, D)`` to ``(draws,)``, differentiable; in nats. May be random, if unbiased.
        start: where to begin, ``(D,)``, with standard deviation 0.1.
        steps: gradient steps, of linearly falling size; the last quarter is averaged.
        draws: draws of each step; default the larger of 64 and ``2 D``. With fewer the steps are smaller.

    Returns:
        The fit, or the start if the fit has no higher lower bound.

    Example:
        >>> covariance = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
        >>> target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0]), covariance)
        >>> fit = fit_gaussian(target.log_prob, torch.zeros(2), steps=100)
        >>> torch.allclose(fit.tril @ fit.tril.mT, covariance, atol=1e-3)
        True
    """
    loc = start.detach()
    tril = START_SCALE * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    draws = max(64, 2 * len(loc)) if draws is None else draws
    fitted = _ascend(log_density, loc, tril, steps, draws + draws % 2)
    before, after = _elbo(log_density, loc, tril, draws), _elbo(log_density, *fitted, draws)
    return Gaussian(*fitted, after) if after > before else Gaussian(loc, tril, before)


def _ascend(log_density: LogDensity, loc: Tensor, tril: Tensor, steps: int, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and factor after the natural gradient steps, averaged over their last quarter."""
    enough = min(1.0, draws / (2 * len(loc)))  # with few draws B has low rank and much noise
    rate, longest = RATE * enough, max(1.0, LONGEST * enough * math.sqrt(len(loc)))
    exact = torch.finfo(loc.dtype).eps ** 0.5
    safe, damping, averaged = None, 1.0, 0
    mean_loc, mean_tril = torch.zeros_like(loc), torch.zeros_like(tril)
    for step in range(steps):
        moved = _step(log_density, loc, tril, draws, damping * rate * (1 - step / steps), longest)
        if moved is None:
            damping /= 2
            if damping < 1e-3:
                break
            loc, tril = (loc, tril / 2) if safe is None else safe
            safe = (loc, 0.9 * tril) if safe is not None else None
            continue
        safe, damping = (loc, tril), min(1.0, 1.1 * damping)
        loc, tril, size = moved
        if step >= 0.75 * steps:
            mean_loc, mean_tril, averaged = mean_loc + loc, mean_tril + tril, averaged + 1
        if size < exact:
            return loc, tril
    return (mean_loc / averaged, mean_tril / averaged) if averaged else (safe or (loc, tril))


def _step(
    log_density: LogDensity, loc: Tensor, tril: Tensor, draws: int, rate: float, longest: float
) -> tuple[Tensor, Tensor, float] | None:
    """One natural gradient step of bounded length, and its length per unit of rate; ``None`` where it fails."""
    half = torch.randn(draws // 2, len(loc), dtype=loc.dtype, device=loc.device)
    z = torch.cat([half, -half])
    gradient = _gradient(log_density, loc + z @ tril.mT)
    if gradient is None:
        return None
    v = gradient @ tril + z
    length = v.norm(dim=-1, keepdim=True)
    v = v * (OUTLIER * length.median() / length).clamp(max=1)  # far out a learned law may fall off without measure
    a, b = v.mean(0), (v.mT @ z / draws).tril()
    b.diagonal().mul_(0.5)
    size = float((a.square().sum() + b.square().sum()).sqrt())
    if not math.isfinite(size):
        return None
    rate = min(rate, longest / max(size, 1e-30))
    factor = rate * b.tril(-1) + (rate * b.diagonal()).exp().diag()
    loc, tril = loc + rate * (tril @ a), tril @ factor
    low, high = tril.diagonal().aminmax()
    inside = SCALES[0] < float(low) and float(high) < SCALES[1]
    return (loc, tril, size) if inside else None


def _gradient(log_density: LogDensity, x: Tensor) -> Tensor | None:
    """Gradient of a log density at rows, or ``None`` unless all its values are finite."""
    leaf = x.detach().requires_grad_()
    try:
        with torch.enable_grad():
            values = log_density(leaf)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
    except (RuntimeError, ValueError, ArithmeticError):  # e.g. a covariance that is not positive definite here
        return None
    return gradient if bool(values.isfinite().all()) else None


@torch.no_grad()
def _elbo(log_density: LogDensity, loc: Tensor, tril: Tensor, draws: int, batches: int = 16) -> float:
    """Evidence lower bound from the same draws, and the same minibatches, at every call; ``-inf`` where it fails."""
    dimension, total = len(loc), 0.0
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        for _ in range(batches):
            z = torch.randn(draws, dimension, dtype=loc.dtype, device=loc.device)
            try:
                values = log_density(loc + z @ tril.mT)
            except (RuntimeError, ValueError, ArithmeticError):
                return -math.inf
            total += float((values + 0.5 * z.square().sum(-1)).mean()) / batches
    elbo = total + float(tril.diagonal().log().sum()) + 0.5 * dimension * math.log(2 * math.pi)
    return elbo if math.isfinite(elbo) else -math.inf
