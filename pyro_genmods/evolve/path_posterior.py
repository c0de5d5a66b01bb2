r"""Laws of paths that are learned to be posteriors: a prior's equation, steered.

Given data, a path with the prior law :math:`p` has again the law of a diffusion with the *same* diffusion coefficient
and another drift. So the variational family is the prior with a control :math:`u`,

.. math:: \mathrm dx = \big(f + g\, u(x, t, c)\big)\, \mathrm dt + g\, \mathrm dW, \qquad
          \mathrm{KL}(q \,\|\, p) = \mathrm{KL}(q_0 \,\|\, p_0) + \mathbb E_q \int \tfrac12 |u|^2\, \mathrm dt

(Girsanov). On the grid the control shifts the noise, :math:`x_{k+1} = m_k + L_k(\sqrt{\Delta_k}\, u_k +
\varepsilon_k)`, whatever the prior's method, and the divergence of the two chains is the sum of
:math:`\tfrac12 |u_k|^2 \Delta_k` exactly. On a coarse grid the posterior of the chain has also narrower steps than the
prior, of order :math:`\Delta`; ``noise="learned"`` gives every step a scale of its own, and with one feature, a linear
drift and Gaussian observations the family then contains the posterior.

References:
    X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, Scalable Gradients for Stochastic Differential Equations, 2020,
    arXiv:2001.01328. C. Archambeau, M. Opper, Y. Shen, D. Cornford, J. Shawe-Taylor, Variational Inference for
    Diffusion Processes, Advances in Neural Information Processing Systems 20 (2007).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Size, Tensor, nn
from torch.distributions.kl import register_kl

from ..foundation.errors import DensityError, ShapeError
from ..foundation.networks import MLP, zero_output_layer
from .brownian import solve
from .path import NeuralSDE, check_field, each_row
from .path_law import PathDistribution, PathLaw
from .transition import apply_factor, gaussian_kl

__all__ = ["SDEPosterior", "path_kl"]


class SDEPosterior(PathLaw):
    r"""A guide on the paths of a :class:`NeuralSDE`: its equation with a learned control and a learned initial law.

    The control is linear in the value, with parameters of its own in every interval, plus a network,
    :math:`u = B_k y + b_k + n(t, x, c)`; all start at zero, so that the guide starts at the prior. In a guide::

        pyro.module("posterior", posterior)
        pyro.sample("path", posterior())

    Both ``Trace_ELBO`` (through ``log_prob``) and ``TraceMeanField_ELBO`` (through :func:`path_kl`) work. The prior is
    a part of its posterior: where it is learned too, register the posterior alone.

    Arguments:
        prior: whose grid, diffusion, method and context are taken over.
        context_features: columns of context beyond the prior's, for amortised inference: an encoding of the data.
            The context of the posterior is the prior's, followed by this.
        network: called ``network(t, x, c)`` as a drift is, with the whole context, in the user's units; default an
            MLP where there is ``context_features``, else none.
        noise: ``"prior"``, or ``"learned"`` for scales of the steps, see the module.

    Raises:
        TypeError: the prior is not a ``NeuralSDE``.
        ShapeError, ValueError: the network has another shape, or mixes rows; another ``noise``.

    Example:
        >>> from pyro_genmods.evolve.path import NeuralSDE
        >>> prior = NeuralSDE(1, [0.0, 1.0, 3.0], lambda t, x, c: -x, 0.5)
        >>> posterior = SDEPosterior(prior)
        >>> path = posterior().sample()
        >>> torch.allclose(posterior().log_prob(path), prior().log_prob(path))
        True
    """

    def __init__(
        self,
        prior: nn.Module,
        context_features: int = 0,
        network: nn.Module | None = None,
        noise: Literal["prior", "learned"] = "prior",
    ) -> None:
        if not isinstance(prior, NeuralSDE):
            raise TypeError(f"prior: got {type(prior).__name__}, needs a NeuralSDE.")
        if noise not in ("prior", "learned"):
            raise ValueError(f"noise: got {noise!r}, needs 'prior' or 'learned'.")
        self.told = prior.context_shape.numel() if prior.context_shape else 0
        width, total, steps = prior.width, self.told + context_features, len(prior.grid) - 1
        super().__init__(width, prior.grid, total)
        self.prior, self.noise, self.given_network = prior, noise, network
        self.gain = nn.Parameter(torch.zeros(steps, width, width))
        self.offset = nn.Parameter(torch.zeros(steps, width))
        self.initial_shift = nn.Parameter(torch.zeros(2, width))
        self.log_scale = nn.Parameter(torch.zeros(steps, width)) if noise == "learned" else None
        self.control = self.initial = None
        if context_features:
            self.initial = MLP(total, 2 * width, (64,))
            zero_output_layer(self.initial)
            if network is None:
                self.control = MLP(1 + width + total, width, (64, 64))
                zero_output_layer(self.control)
        self.to(*reversed(prior.place))
        if network is not None:
            self._check_network(network, total)

    def _check_network(self, network: nn.Module, total: int) -> None:
        like = {"dtype": self.place[0], "device": self.place[1]}
        c = torch.linspace(0.5, 1.5, 3 * total, **like).reshape(3, total) if total else None
        t = torch.linspace(self.grid[0], self.grid[-1], 3, **like)[:, None]
        x = torch.linspace(-1.0, 1.0, 3 * self.width, **like).reshape(3, -1)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            check_field("network", network, (t, x, c), self.width)

    def _prior_context(self, c: Tensor | None) -> Tensor | None:
        return c[:, : self.told] if self.told else None

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Nothing: the units are those of the prior."""

    def steer(self, k: slice, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        """The control in intervals ``k``, shape of ``x``, per square root of time."""
        y = self.prior.units(x)
        u = (self.gain[k] @ y[..., None])[..., 0] + self.offset[k]
        if self.control is not None:
            u = u + each_row(self._default_control, t, x, c)
        u = u / math.sqrt(self.prior.time_unit)
        return u if self.given_network is None else u + each_row(self.given_network, t, x, c)

    def _default_control(self, t: Tensor, x: Tensor, c: Tensor) -> Tensor:
        return self.control(*self.prior.standard(t, x, None), c)

    def drift(self, k: slice, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        return self.prior.drift(k, t, x, self._prior_context(c)) + self.diffusion(k, t, x, c) * self.steer(k, t, x, c)

    def diffusion(self, k: slice, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        return self.prior.diffusion(k, t, x, self._prior_context(c))

    def moments(self, k: slice, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, factor = self.prior.moments(k, x, self._prior_context(c))
        shift = self.steer(k, self.times[:-1][k], x, c) * self.lengths[k, None].sqrt()
        mean = mean + apply_factor(factor, shift)
        if self.log_scale is None:
            return mean, factor
        scale = self.log_scale[k].exp()
        return mean, factor * (scale if factor.dim() == 3 else scale[:, None])

    def initial_moments(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        loc, scale = self.prior.initial_moments(self._prior_context(c))
        shift, log_scale = self.initial_shift
        if self.initial is not None:
            extra = self.initial(c).unflatten(-1, (2, self.width))
            shift, log_scale = shift + extra[:, 0], log_scale + extra[:, 1]
        return loc + scale * shift, scale * log_scale.exp()


def path_kl(
    q: PathDistribution,
    p: PathDistribution,
    *,
    method: Literal["discrete", "logqp"] = "discrete",
    draws: int = 1,
    steps: int = 1,
) -> Tensor:
    r"""Kullback-Leibler divergence :math:`\mathrm{KL}(q \,\|\, p)` of two laws of paths on the same grid, in nats.

    An average over paths drawn from ``q``, unbiased and differentiable: the divergence of the first value in closed
    form, plus along each path

    * ``"discrete"``: the divergences of the transitions, in closed form; that of the two chains, whose diffusions may
      differ. It is what ``torch.distributions.kl_divergence`` gives, from one path.
    * ``"logqp"``: :math:`\tfrac12 \int |g^{-1} (f_q - f_p)|^2 \mathrm dt` by torchsde's Euler steps; that of the two
      equations, finite only if their diffusions are the same.

    Arguments:
        q, p: batch shapes that broadcast.
        method: see above.
        draws: number of paths.
        steps: Euler steps in an interval, for ``"logqp"``.

    Returns:
        The broadcast batch shape.

    Raises:
        ShapeError: other features or times.
        DensityError: ``"logqp"`` with different diffusions, or with steps of learned scale.
        ValueError: another method, or fewer than one draw.

    Example:
        >>> from pyro_genmods.evolve.path import NeuralSDE
        >>> p, q = (NeuralSDE(1, [0.0, 1.0, 3.0], lambda t, x, c, b=b: b - x, 0.5, (0.0, 1.0))() for b in (0.0, 1.0))
        >>> path_kl(q, p), path_kl(q, p, method="logqp")      # T b^2 / (2 g^2) = 3 / 0.5
        (tensor(6.), tensor(6.))
    """
    if method not in ("discrete", "logqp") or draws < 1:
        raise ValueError(f"method, draws: got {method!r} and {draws}, needs 'discrete' or 'logqp', and a draw.")
    if q.model.grid != p.model.grid or q.event_shape != p.event_shape:
        raise ShapeError(
            f"q, p: events {tuple(q.event_shape)} and {tuple(p.event_shape)}; build both laws with the same times and "
            "features."
        )
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    (shape, c), (_, prior_c) = (law.expand(batch)._draw_shape(Size([draws])) for law in (q, p))
    first = [model.initial_moments(told) for model, told in ((q.model, c), (p.model, prior_c))]
    start = gaussian_kl(*[tuple(m.expand(shape.numel(), -1)[:, None] for m in pair) for pair in first])[:, 0]
    if method == "discrete":
        along = _along_chain(q.model, p.model, (c, prior_c), shape.numel())
    else:
        along = _along_equation(q.model, p.model, (c, prior_c), shape.numel(), steps)
    return (start + along).reshape(shape).mean(0)


register_kl(PathDistribution, PathDistribution)(path_kl)

Contexts = tuple[Tensor | None, Tensor | None]


def _along_chain(q: PathLaw, p: PathLaw, contexts: Contexts, rows: int) -> Tensor:
    x = q.sample_rows(rows, contexts[0]).unflatten(1, q.event_shape)[:, :-1]
    every = slice(0, x.shape[1])
    return gaussian_kl(q.moments(every, x, contexts[0]), p.moments(every, x, contexts[1])).sum(-1)


def _along_equation(q: PathLaw, p: PathLaw, contexts: Contexts, rows: int, steps: int) -> Tensor:
    x = q.begin(rows, contexts[0])
    every, points = slice(0, len(q.lengths)), x[:, None].expand(rows, len(q.lengths), q.width)
    g, prior_g = (m.diffusion(every, q.times[:-1], points, c) for m, c in zip((q, p), contexts, strict=True))
    same = torch.allclose(g, prior_g, rtol=1e-5, atol=0.0)
    if not same or any(getattr(model, "log_scale", None) is not None for model in (q, p)):
        raise DensityError(
            "q, p: their diffusions differ, so that no path of one is a path of the other and the divergence of the "
            "equations is infinite; share the diffusion (SDEPosterior with noise='prior'), or compare the chains, "
            "method='discrete'."
        )
    ours = q.coefficients(contexts[0])._replace(prior_drift=p.coefficients(contexts[1]).drift)
    path, ratio = solve(ours, q.times, x, steps=steps)
    q.checked(path)
    return ratio
