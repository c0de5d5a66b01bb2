r"""A Gaussian fit to an unnormalised log density over :math:`\mathbb R^D`: where a flow guide starts.

Three steps, each kept only if it raises the evidence lower bound
:math:`\mathrm{ELBO}(q) = \mathbb E_q[\log p(x)] + \mathrm H[q]`:

1. the start that was given, with standard deviation 0.1 in every direction (what Pyro's normal guides start from);
2. Laplace: the mode by L-BFGS and the inverse of the negative Hessian there;
3. the variational Gaussian, in the coordinates whitened by the better of the two, by path-wise stochastic gradients.

Whitening first makes the third step independent of the posterior's scales.

Reference:
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


@dataclass(frozen=True)
class Gaussian:
    """Mean ``(D,)``, lower Cholesky factor ``(D, D)`` and evidence lower bound of a fit, in nats."""

    loc: Tensor
    tril: Tensor
    elbo: float


def fit_gaussian(log_density: LogDensity, start: Tensor, steps: int = 500, hessian_limit: int = 300) -> Gaussian:
    """Fit a Gaussian to an unnormalised log density.

    Arguments:
        log_density: maps ``(draws, D)`` to ``(draws,)``, differentiable; in nats.
        start: where to begin, ``(D,)``.
        steps: stochastic gradient steps of the third step; 0 leaves it out.
        hessian_limit: largest ``D`` for which the Hessian of the second step is formed.

    Returns:
        The fit of the highest lower bound.

    Example:
        >>> covariance = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
        >>> target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0]), covariance)
        >>> fit = fit_gaussian(target.log_prob, torch.zeros(2), steps=100)
        >>> torch.allclose(fit.tril @ fit.tril.mT, covariance, atol=0.01)
        True
    """
    with torch.enable_grad():
        best = _scored(log_density, start, 0.1 * torch.eye(len(start), dtype=start.dtype, device=start.device))
        if len(start) <= hessian_limit:
            mode = _find_mode(log_density, start)
            tril = _laplace_factor(log_density, mode)
            if tril is not None:
                best = _better(best, _scored(log_density, mode, tril))
        if steps > 0 and math.isfinite(best.elbo):
            best = _better(best, _variational(log_density, best, steps))
    return best


def _scored(log_density: LogDensity, loc: Tensor, tril: Tensor, draws: int = 256) -> Gaussian:
    with torch.no_grad():
        z = torch.randn(draws, len(loc), dtype=loc.dtype, device=loc.device)
        energy = log_density(loc + z @ tril.mT).mean()
        entropy = tril.diagonal().log().sum() + 0.5 * len(loc) * (1 + math.log(2 * math.pi))
        return Gaussian(loc.detach(), tril.detach(), float(energy + entropy))


def _better(old: Gaussian, new: Gaussian) -> Gaussian:
    return new if math.isfinite(new.elbo) and not new.elbo <= old.elbo else old


def _find_mode(log_density: LogDensity, start: Tensor, iterations: int = 200) -> Tensor:
    """Highest point that L-BFGS reaches; the start where it leaves the finite numbers."""
    x = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_density(x[None])[0]
        (x.grad,) = torch.autograd.grad(loss, x)
        return loss

    optimizer.step(closure)
    mode = x.detach()
    with torch.no_grad():
        improved = log_density(mode[None])[0] >= log_density(start[None])[0]
    return mode if bool(mode.isfinite().all()) and bool(improved) else start.detach()


def _laplace_factor(log_density: LogDensity, mode: Tensor) -> Tensor | None:
    """Cholesky factor of the inverse negative Hessian; directions without curvature get unit scale."""
    try:
        hessian = torch.autograd.functional.hessian(lambda x: log_density(x[None])[0], mode)
    except RuntimeError:  # a density with only one derivative
        return None
    if not bool(hessian.isfinite().all()):
        return None
    precision, basis = torch.linalg.eigh(-(hessian + hessian.mT) / 2)
    floor = 1e-6 * precision.abs().max().clamp_min(1e-6)
    precision = torch.where(precision > floor, precision, torch.ones_like(precision))
    tril, failed = torch.linalg.cholesky_ex((basis / precision) @ basis.mT)
    return None if int(failed) else tril


def _variational(log_density: LogDensity, start: Gaussian, steps: int, draws: int = 16) -> Gaussian:
    """Adam on the ELBO of ``loc + tril (shift + factor z)`` with path-wise gradients and a decaying step."""
    loc, tril = start.loc, start.tril
    shift = torch.zeros_like(loc, requires_grad=True)
    raw = torch.zeros_like(tril, requires_grad=True)
    optimizer = torch.optim.Adam([shift, raw], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 1.5)
    for _ in range(steps):
        factor = raw.tril(-1) + raw.diagonal().exp().diag()
        z = torch.randn(draws, len(loc), dtype=loc.dtype, device=loc.device)
        white = shift + z @ factor.mT
        centred = torch.linalg.solve_triangular(factor.detach(), (white - shift.detach()).mT, upper=False)
        loss = -(log_density(loc + white @ tril.mT) + 0.5 * centred.square().sum(0)).mean()
        gradients = torch.autograd.grad(loss, [shift, raw])
        if not all(bool(g.isfinite().all()) for g in gradients):
            break
        shift.grad, raw.grad = gradients
        torch.nn.utils.clip_grad_norm_([shift, raw], 10.0)
        optimizer.step()
        schedule.step()
    factor = (raw.tril(-1) + raw.diagonal().exp().diag()).detach()
    return _scored(log_density, loc + tril @ shift.detach(), tril @ factor)
