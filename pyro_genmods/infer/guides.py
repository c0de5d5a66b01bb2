r"""Variational guides made of generative models.

:class:`AutoFlow` puts a flow over all unconstrained latents of a Pyro model,

.. math:: z \sim \mathcal N(0, I), \qquad y = T_\phi(z), \qquad x = m + L\,(s + B\,y),

where :math:`(m, L)` is a Gaussian fit made at the first call, :math:`T_\phi` starts at the identity, and :math:`s`,
:math:`B`, :math:`\phi` are learned. The first ELBO is therefore that of the Gaussian fit, and every step can only leave
the Gaussian family for something better.

References:
    D. J. Rezende, S. Mohamed, Variational Inference with Normalizing Flows, 2015, arXiv:1505.05770.
    A. Agrawal, D. Sheldon, J. Domke, Advances in Black-Box VI: Normalizing Flows, Importance Weighting, and
    Optimization, 2020, arXiv:2006.10343.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Normal, TorchDistribution, TransformedDistribution
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Size, Tensor, nn
from torch.distributions import ComposeTransform, Transform, biject_to

from ..contract import Density, GenerativeModel
from ..foundation.errors import DensityError, ShapeError, SlowDirectionError
from ..foundation.networks import detached_copy
from .gaussian import Gaussian, fit_gaussian
from .transport import GuideLaw, PushTransform, TriangularTransform, transported

__all__ = ["AutoFlow"]


class AutoFlow(AutoContinuous):
    """A flow over the unconstrained latents of a model, as an autoguide.

    Use it as any ``AutoContinuous``: its parameters are registered with Pyro, ``NeuTraReparam(guide)`` works, and
    ``median``, ``quantiles``, ``get_posterior``, ``get_transform`` are there.

    Arguments:
        model: a Pyro model whose latents are continuous (or enumerated).
        flow: a generative model with an exact density over ``(latent_dim,)`` and a fast push, or a function
            ``latent_dim -> model``; default: eight affine coupling layers (a spline for one latent).
        init_loc_fn: Pyro's initialisation strategy, from which the Gaussian fit starts.
        init: ``"gaussian"`` starts at a Gaussian fit with the flow reset to the identity; ``"given"`` leaves the flow
            as it is and starts at ``init_loc_fn`` with scale 0.1.
        gaussian_steps: gradient steps of the Gaussian fit, about a millisecond each.
        stl: path-wise gradients ("sticking the landing"), whose variance vanishes as the guide becomes exact; costs
            one pull per step. Default: on, unless the flow's pull is slow.

    Raises:
        SlowDirectionError: the flow is slow from noise to data, the direction that a guide runs at every step.
        DensityError: the flow has no exact density.
        ShapeError: the flow has another number of features than the model has unconstrained latents.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, scale), obs=y)
        >>> guide = gm.infer.AutoFlow(model, gaussian_steps=100)
        >>> svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), Trace_ELBO())
        >>> loss = [svi.step(torch.tensor([0.3, 0.5, -0.2])) for _ in range(3)]
        >>> sorted(guide.median())
        ['loc', 'scale']
    """

    default_flow: ClassVar[Callable[[int], GenerativeModel]]

    def __init__(
        self,
        model: Callable[..., Any],
        flow: GenerativeModel | Callable[[int], GenerativeModel] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        *,
        init: str = "gaussian",
        gaussian_steps: int = 500,
        stl: bool | None = None,
    ) -> None:
        if init not in ("gaussian", "given"):
            raise ValueError(f"init: got {init!r}, needs 'gaussian' or 'given'.")
        if isinstance(flow, GenerativeModel):
            _check_flow(flow)
        super().__init__(model, init_loc_fn)
        self._flow_choice = (flow,)  # a tuple, so that the module is not registered before its time
        self._init = init
        self.gaussian_steps = gaussian_steps
        self.stl = stl

    # -- building ------------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        start = self._init_loc()
        choice = self._flow_choice[0] or type(self).default_flow
        flow = choice if isinstance(choice, GenerativeModel) else choice(self.latent_dim)
        _check_flow(flow)
        if flow.event_shape != (self.latent_dim,):
            raise ShapeError(
                f"flow: it has event_shape {tuple(flow.event_shape)}, the model has {self.latent_dim} unconstrained "
                "latents; pass a function features -> flow to have it built to measure."
            )
        self.flow = flow.to(start.device, start.dtype)
        if self.stl is None:
            self.stl = flow.slow_direction != "score"
        loc, tril = start, 0.1 * torch.eye(self.latent_dim, dtype=start.dtype, device=start.device)
        if self._init == "gaussian":
            if not flow.start_at_identity():
                raise ValueError(
                    f"flow: {type(flow).__name__} cannot be reset to the identity, from which the Gaussian start "
                    "continues; use a coupling, affine or spline flow, or init='given'."
                )
            fit = self._fit_gaussian(start, args, kwargs)
            loc, tril = fit.loc, fit.tril
        self.register_buffer("centre", loc)
        self.register_buffer("whitener", tril)
        self.shift = nn.Parameter(torch.zeros_like(loc))
        self.raw_factor = nn.Parameter(torch.zeros_like(tril))

    def _fit_gaussian(self, start: Tensor, args: tuple, kwargs: dict) -> Gaussian:
        with poutine.block(), pyro.validation_enabled(False), torch.random.fork_rng():
            return fit_gaussian(self._log_density(start, args, kwargs), start, self.gaussian_steps)

    def _log_density(self, probe: Tensor, args: tuple, kwargs: dict) -> Callable[[Tensor], Tensor]:
        """Log joint of rows of latents: vectorised by functorch where that agrees with one call a row, else a loop."""

        def one(latent: Tensor) -> Tensor:
            return self._log_joint(latent, args, kwargs)

        def loop(latents: Tensor) -> Tensor:
            return torch.stack([one(latent) for latent in latents])

        vectorised = torch.vmap(one, randomness="different")
        probes = probe + 0.01 * torch.arange(2.0, device=probe.device, dtype=probe.dtype)[:, None]
        expected = _value_and_gradient(loop, probes)
        try:
            found = _value_and_gradient(vectorised, probes)
        except (RuntimeError, ValueError, NotImplementedError):  # what functorch cannot do, the loop can
            return loop
        same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))
        return vectorised if same else loop

    def _log_joint(self, latent: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Log joint density of model and data at one unconstrained latent vector, Jacobians included."""
        values, volume = {}, torch.zeros((), dtype=latent.dtype, device=latent.device)
        for site, unconstrained in self._unpack_latent(latent):
            bijection = biject_to(site["fn"].support)
            values[site["name"]] = bijection(unconstrained)
            volume = volume + bijection.log_abs_det_jacobian(unconstrained, values[site["name"]]).sum()
        trace = poutine.trace(poutine.condition(self.model, values)).get_trace(*args, **kwargs)
        return trace.log_prob_sum() + volume

    # -- the AutoContinuous contract -----------------------------------------------------------------------------

    def _affine(self) -> TriangularTransform:
        raw = self.raw_factor
        factor = raw.tril(-1) + raw.diagonal().exp().diag()
        return TriangularTransform(self.centre + self.whitener @ self.shift, self.whitener @ factor)

    def get_base_dist(self) -> TorchDistribution:
        """Standard normal noise over ``(latent_dim,)``."""
        zeros = torch.zeros_like(self.centre)
        return Normal(zeros, torch.ones_like(zeros)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The transport from noise to unconstrained latents; independent of the model's arguments."""
        return ComposeTransform([PushTransform(self.flow()), self._affine()])

    def get_posterior(self, *args: Any, **kwargs: Any) -> TransformedDistribution:
        """The guide's law over unconstrained latents; scores any point."""
        return transported(self.flow(), self._affine())

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the latent vector at the guide's auxiliary site."""
        law = GuideLaw(self.get_posterior(), self._constant_posterior() if self.stl else None)
        return pyro.sample(f"_{self._pyro_name}_latent", law, infer={"is_auxiliary": True})

    def _constant_posterior(self) -> TransformedDistribution:
        """The posterior with its parameters held constant; they are shared, not copied."""
        affine = self._affine()
        return transported(self._constant_flow()(), TriangularTransform(affine.loc.detach(), affine.tril.detach()))

    def _constant_flow(self) -> GenerativeModel:
        flow, view = self.flow, self.__dict__.get("_view")
        if view is None or any(
            p.data_ptr() != q.data_ptr() for p, q in zip(flow.parameters(), view.parameters(), strict=True)
        ):
            view = self.__dict__["_view"] = detached_copy(flow)
        return view

    # -- reading the posterior -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, num_samples: int) -> dict[str, Tensor]:
        """Independent draws of every latent, ``(num_samples, *site_shape)``, in the model's units."""
        self._check_ready()
        latent = self.get_posterior().sample(Size([num_samples]))
        draws, position = {}, 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            part = latent[:, position : position + shape.numel()].reshape((num_samples, *shape))
            draws[name] = biject_to(site["fn"].support)(part)
            position += shape.numel()
        return draws

    @torch.no_grad()
    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior median of every entry of every latent, from draws."""
        return {name: draws.quantile(0.5, 0) for name, draws in self.sample_posterior(num_samples).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float] | Tensor, *args: Any, num_samples: int = 10_000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal posterior quantiles, ``(len(quantiles), *site_shape)``, from draws."""
        draws = self.sample_posterior(num_samples)
        return {k: v.quantile(torch.as_tensor(quantiles, dtype=v.dtype, device=v.device), 0) for k, v in draws.items()}

    @torch.no_grad()
    def log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Log importance weights ``log p(x, data) - log q(x)`` of draws of the guide, ``(num_samples,)``, in nats.

        Their log-mean-exp estimates the log evidence, and their Pareto tail index (``diagnostics.psis_khat``) says
        whether the guide can be trusted. ``args`` and ``kwargs`` are the model's.
        """
        self._check_ready()
        posterior = self.get_posterior()
        with poutine.block(), pyro.validation_enabled(False):
            latent = posterior.sample(Size([num_samples]))
            return self._log_density(latent[0], args, kwargs)(latent) - posterior.log_prob(latent)

    def _check_ready(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError("the guide has not met its model yet; run an SVI step, or call guide(*args), first.")


def _check_flow(flow: GenerativeModel) -> None:
    name = type(flow).__name__
    if flow.density is not Density.EXACT or not flow.has_rsample:
        raise DensityError(f"flow: {name} has no exact density with pathwise draws; a guide needs both (gm.Flow has).")
    if flow.context_shape:
        raise ShapeError(
            f"flow: {name} needs a context of shape {tuple(flow.context_shape)}; give an unconditional one."
        )
    if flow.slow_direction == "sample":
        raise SlowDirectionError(
            f"flow: {name} takes {flow.cost.sample} sequential calls from noise to data, {flow.cost.score} back, and a "
            "guide runs the slow one at every step; build it with direction='sampling', or use a coupling flow."
        )


def _value_and_gradient(log_density: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        values = log_density(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient
