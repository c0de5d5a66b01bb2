r"""What a network of noisy data says: velocity, denoised datum, noise and score are one function in four forms.

At angle :math:`\theta` a white datum :math:`x_0` is seen as :math:`u = \cos\theta \, x_0 + \sin\theta \, \varepsilon`.
With :math:`D = \mathbb E[x_0 \mid u]`,

.. math::
    v = \mathbb E[\cos\theta\, \varepsilon - \sin\theta\, x_0 \mid u] = \frac{\cos\theta \, u - D}{\sin\theta}, \qquad
    D = \cos\theta\, u - \sin\theta\, v, \qquad
    \hat\varepsilon = \sin\theta\, u + \cos\theta\, v, \qquad
    \nabla \log p_\theta(u) = -\frac{\hat\varepsilon}{\sin\theta} = -(u + \cot\theta\, v) .

The velocity is that of the probability flow, :math:`\mathrm du / \mathrm d\theta = v`; it is zero where the data are
standard normal, and finite at both ends of time. Tweedie's formula gives the covariance of the denoised datum,

.. math:: \operatorname{Cov}[x_0 \mid u] = \frac{\sin^2\theta}{\cos\theta} \frac{\partial D}{\partial u}
          = \sin^2\theta\, I - \frac{\sin^3\theta}{\cos\theta} \frac{\partial v}{\partial u} .

References:
    B. Efron, Tweedie's Formula and Selection Bias, Journal of the American Statistical Association 106 (2011). T.
    Salimans, J. Ho, Progressive Distillation for Fast Sampling of Diffusion Models, 2022, arXiv:2202.00512 (velocity).
    Y. Du et al., Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC, 2023,
    arXiv:2302.11552 (energy).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from ..foundation.divergence import estimated_divergence, exact_divergence

__all__ = ["PARAMETERIZATIONS", "SINGULAR", "Denoiser", "NetworkDenoiser"]

PARAMETERIZATIONS = ("velocity", "noise", "denoised", "score", "energy")
SINGULAR = ("noise", "score")  # determine the velocity nowhere at a right angle
NOISE_ONLY = math.atan(100.0)  # beyond this angle the covariance of white data given u is taken for the identity


class Denoiser:
    """The four forms, each from the velocity; what guides a sampler is another of these.

    Rows are white, ``(rows, features)``; ``t`` is an angle, ``()`` or ``(rows, 1)``; ``c`` are rows of context.
    """

    def velocity(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        r"""Of the probability flow, :math:`\mathrm du / \mathrm d\theta`."""
        raise NotImplementedError

    def denoised(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        """Mean of the datum."""
        return t.cos() * u - t.sin() * self.velocity(t, u, c)

    def noise(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        """Mean of the noise."""
        return t.sin() * u + t.cos() * self.velocity(t, u, c)

    def score(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        r"""Gradient :math:`\nabla_u \log p_\theta(u)`."""
        return -(u + self.velocity(t, u, c) / t.tan())

    def covariance(self, t: Tensor, u: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean ``(rows, n)`` and covariance ``(rows, n, n)`` of the datum, by as many reverse passes as columns.

        The covariance of a learned velocity is made symmetric; where all is noise it is the identity, that of white
        data.
        """
        t = t.expand(len(u), 1)

        def one(t: Tensor, u: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
            v = self.velocity(t[None], u[None], None if c is None else c[None])[0]
            return v, v

        jacobian, v = vmap(jacrev(one, argnums=1, has_aux=True), in_dims=(0, 0, None if c is None else 0))(t, u, c)
        mean = t.cos() * u - t.sin() * v
        jacobian = (jacobian + jacobian.mT) / 2
        t, eye = t[..., None], torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        late = t > NOISE_ONLY
        known = t.sin().square() * eye - t.sin() ** 3 / torch.where(late, 1.0, t.cos()) * jacobian
        return mean, torch.where(late, eye, known)


@dataclass(frozen=True)
class NetworkDenoiser(Denoiser):
    r"""A network as a denoiser.

    Arguments:
        network: called as ``network(t, u, c)`` with ``t`` ``(rows, 1)``.
        parameterization: what it returns: one of the four forms, or (``"energy"``) a potential :math:`\Phi`, one number
            a row, of which the velocity is the gradient; then
            :math:`\log p_\theta(u) = -\tfrac12 \|u\|^2 - \cot\theta\, \Phi_\theta(u)` up to a constant.
        probes: of an estimated divergence, ``(probes, features)``; ``None`` for the exact one.
    """

    network: nn.Module
    parameterization: str = "velocity"
    probes: Tensor | None = None

    def velocity(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        if self.parameterization == "energy":
            return grad(lambda u: self.potential(t, u, c).sum())(u)
        out = self._network(t, u, c)
        if self.parameterization == "noise":
            return (out - t.sin() * u) / t.cos()
        if self.parameterization == "denoised":
            return (t.cos() * u - out) / t.sin()
        return -t.tan() * (u + out) if self.parameterization == "score" else out

    def potential(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        r""":math:`\Phi_\theta(u)`, ``(rows,)``."""
        return self._network(t, u, c).reshape(len(u))

    def augmented(self, t: Tensor, state: Tensor, c: Tensor | None) -> Tensor:
        """Velocity and, as a last column, its divergence; ``state`` has a last column for the volume."""
        u = state[:, :-1]
        if self.parameterization == "velocity" and self.probes is None and hasattr(self.network, "with_divergence"):
            v, divergence = self.network.with_divergence(self._time(t, u), u, c)
        elif self.probes is None:
            v, divergence = exact_divergence(lambda u: self.velocity(t, u, c), u)
        else:
            v, divergence = estimated_divergence(lambda u: self.velocity(t, u, c), u, self.probes)
        return torch.cat([v, divergence[:, None]], 1)

    def _network(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        return self.network(self._time(t, u), u, c)

    def _time(self, t: Tensor, u: Tensor) -> Tensor:
        """Time as the network wants it; some work less if it is one for all rows."""
        return t if getattr(self.network, "one_time", False) else t.expand(len(u), 1)
