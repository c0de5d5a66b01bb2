r"""Variational guides made of generative models.

:class:`AutoFlow` puts a flow over all unconstrained latents of a Pyro model,

.. math:: z \sim p_Z, \qquad y = T_\phi(z), \qquad x = m + L\,(s + B\,y),

where :math:`(m, L)` is a Gaussian fit made at the first call, :math:`T_\phi` starts at the identity, and :math:`s`,
:math:`B` (a lower triangle with log-diagonal), :math:`\phi` are learned. The first ELBO is therefore that of the best
Gaussian, and learning starts in coordinates in which the posterior is centred and round.

References:
    D. J. Rezende, S. Mohamed, Variational Inference with Normalizing Flows, 2015, arXiv:1505.05770.
    A. Agrawal, D. Sheldon, J. Domke, Advances in Black-Box VI: Normalizing Flows, Importance Weighting, and
    Optimization, 2020, arXiv:2006.10343.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import Normal, TransformedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Size, Tensor, nn
from torch.distributions import Transform, biject_to

from ..contract import Density, GenerativeModel
from ..foundation.errors import DensityError, ShapeError, SlowDirectionError, SupportError
from ..foundation.networks import detached_copy
from .gaussian import START_SCALE, Gaussian, fit_gaussian
from .intractable import refuse_doubly_intractable
from .joint import LogJoint
from .transport import GuideLaw, GuideTransform, TriangularTransform, transported

__all__ = ["AutoFlow"]

TERMS = 2**17  # log densities that one step of the Gaussian fit may add up


class AutoFlow(AutoContinuous):
    """A flow over the unconstrained latents of a model, as an autoguide.

    Use it as any ``AutoContinuous``: its parameters are registered with Pyro, ``NeuTraReparam(guide)`` works, and
    ``median``, ``quantiles``, ``get_posterior``, ``get_transform`` are there. Discrete latents are hidden from it as
    from Pyro's own guides, ``AutoFlow(poutine.block(model, hide=[...]))`` with ``TraceEnum_ELBO``.

    A recipe: ``ClippedAdam({"lr": 5e-3, "lrd": 0.01 ** (1 / steps)})``, a step that decays a hundredfold, for 1,000 to
    2,000 steps, and ``Trace_ELBO(16, vectorize_particles=True)`` where the model can be vectorised (16 particles cost a
    tenth more than one); else one particle and a rate of 3e-3. Bounds so reached, for a log evidence of zero: Neal's
    funnel in ten dimensions -1.86 (the best Gaussian) at the start, -0.2 after 1,000 steps; a banana with a bend of
    nine standard deviations -1.23, and -0.08. Then ask ``diagnostics.psis_khat(guide.log_weights(4000, *args))``.

    The Gaussian fit does not touch parameters of the model, their gradients, or the caller's random numbers. It is left
    out (the guide then starts where Pyro's do) where the model has randomness of its own besides minibatches, such as a
    discrete site hidden from the guide. A model that ``torch.vmap`` cannot run makes it slow; see ``gaussian_steps``.

    Arguments:
        model: a Pyro model with continuous latents.
        flow: a generative model over ``(latent_dim,)`` with an exact density and a fast push, taken over, moved and
            reset by the guide; or a function ``latent_dim -> model``. Default: affine coupling layers (for one latent,
            splines).
        init_loc_fn: Pyro's initialisation strategy, from which the Gaussian fit starts.
        init: ``"gaussian"`` starts at a Gaussian fit with the flow reset to the identity; ``"given"`` leaves the flow
            as it is and starts at ``init_loc_fn`` with scale 0.1.
        gaussian_steps: gradient steps of the Gaussian fit, each of the cost of an SVI step with 64 vectorised
            particles (fewer for large data, or where ``torch.vmap`` fails).
        stl: path-wise gradients ("sticking the landing"), whose variance vanishes as the guide becomes exact, in
            ``Trace_ELBO``, ``TraceGraph_ELBO`` and ``TraceMeanField_ELBO``; other objectives keep their ordinary
            gradient. Costs one pull a step. Default: on, unless the flow's pull is slow.

    Raises:
        SlowDirectionError: the flow is slow from noise to data, the direction that a guide runs at every step.
        DensityError: the flow has no exact density.
        ShapeError: the flow has another number of features than the model has unconstrained latents, or a context.
        SupportError: the flow does not live on all real vectors.
        ValueError: the flow cannot start at the identity, or is frozen.
        DoublyIntractableError: at the first call, the unknown constant of an energy depends on a latent.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_genmods as gm
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, scale), obs=y)
        >>> guide = gm.infer.AutoFlow(model)
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
        if isinstance(flow, nn.Module):
            _check_flow(flow)
        super().__init__(model, init_loc_fn)
        self._model = (self.model, model)  # Pyro's slot for what is no submodule; the second runs without initialising
        self._flow_choice = (flow,)  # a tuple, so that the module is not registered before its time
        self._init = init
        self.gaussian_steps = gaussian_steps
        self.stl = stl

    # -- building ------------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        refuse_doubly_intractable(self._model[1], args, kwargs, "infer.AutoFlow")
        super()._setup_prototype(*args, **kwargs)
        start = self._init_loc()
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                self._build(start, args, kwargs)
        except BaseException:
            self.prototype_trace = None  # a guide that is half built would fail in stranger ways at the next call
            raise

    def _build(self, start: Tensor, args: tuple, kwargs: dict) -> None:
        flow = self._chosen_flow(start)
        identity = torch.eye(self.latent_dim, dtype=start.dtype, device=start.device)
        loc, tril, log_scale = start, identity, math.log(START_SCALE)
        if self._init == "gaussian":
            _reset(flow)
            fit = self._fit_gaussian(start, args, kwargs)
            if fit is not None:
                loc, tril, log_scale = fit.loc, fit.tril, 0.0
        self._take_free_name()
        self.flow = flow
        self.register_buffer("centre", loc)
        self.register_buffer("whitener", tril)
        self.shift = nn.Parameter(torch.zeros_like(loc))
        self.raw_factor = nn.Parameter(log_scale * identity)
        if self.stl is None:
            self.stl = flow.slow_direction != "score"

    def _chosen_flow(self, start: Tensor) -> GenerativeModel:
        choice = type(self).default_flow if self._flow_choice[0] is None else self._flow_choice[0]
        flow = choice if isinstance(choice, nn.Module) else choice(self.latent_dim)
        _check_flow(flow)
        if flow.event_shape != (self.latent_dim,):
            raise ShapeError(
                f"flow: it has event_shape {tuple(flow.event_shape)}, the model has {self.latent_dim} unconstrained "
                "latents; pass a function features -> flow to have it built to measure."
            )
        return flow.to(start.device, start.dtype)

    def _fit_gaussian(self, start: Tensor, args: tuple, kwargs: dict) -> Gaussian | None:
        joint = self._log_joint(start, args, kwargs)
        if joint.hidden_noise:
            return None
        most = max(64, 2 * len(start)) if joint.vectorised else 8
        draws = min(most, max(8, TERMS // max(joint.terms, 1)))
        return fit_gaussian(joint, start, self.gaussian_steps, draws)

    def _log_joint(self, probe: Tensor, args: tuple, kwargs: dict) -> LogJoint:
        sites = {
            name: (site["fn"].support, self._unconstrained_shapes[name])
            for name, site in self.prototype_trace.iter_stochastic_nodes()
        }
        return LogJoint(self._model[1], sites, probe, args, kwargs)

    def _take_free_name(self) -> None:
        """Parameters of another guide under the same name in Pyro's store would shadow ours, which would not learn."""
        name, number, store = self._pyro_name, 1, pyro.get_param_store()
        while any(key.startswith(f"{self._pyro_name}.") for key in store):
            self._pyro_set_supermodule(f"{name}_{number}", self._pyro_context)
            number += 1

    def _keep_own_name(self) -> None:
        name, store = f"{self._pyro_name}.shift", pyro.get_param_store()
        if name in store and store[name].unconstrained() is not self._parameters["shift"]:
            warnings.warn(
                f"Pyro's param store holds other values under {name!r} (of another copy of this guide, or loaded); "
                "this one goes on with its own, under a new name. To restore a guide, use its load_state_dict.",
                stacklevel=2,
            )
            self._take_free_name()

    # -- the AutoContinuous contract -----------------------------------------------------------------------------

    def _affine(self) -> TriangularTransform:
        raw, whitener = self.raw_factor, self.whitener
        factor = raw.tril(-1) + raw.diagonal().exp().diag()
        return TriangularTransform(self.centre + whitener @ self.shift, whitener @ factor)

    def get_base_dist(self) -> TorchDistributionMixin:
        """Law of the flow's noise over ``(latent_dim,)``, standard normal."""
        self._check_ready()
        return self.flow().base

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The transport from noise to unconstrained latents; independent of the model's arguments."""
        self._check_ready()
        return GuideTransform(self.flow(), self._affine())

    def get_posterior(self, *args: Any, **kwargs: Any) -> TransformedDistribution:
        """The guide's law over unconstrained latents; scores any point."""
        self._check_ready()
        return transported(self.flow(), self._affine())

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the latent vector at the guide's auxiliary site."""
        self._keep_own_name()
        flow, affine = self.flow, self._affine()
        scorer = transported(self._constant(flow)(), affine.detach()) if self.stl else None
        law = GuideLaw(flow(), affine, scorer)
        return pyro.sample(f"_{self._pyro_name}_latent", law, infer={"is_auxiliary": True})

    def _constant(self, flow: GenerativeModel) -> GenerativeModel:
        """A view of the flow without gradient; made anew when the flow's tensors were replaced, as ``.to`` does."""
        tensors = [t.data_ptr() for t in (*flow.parameters(), *flow.buffers())]
        view, seen = self.__dict__.get("_view", (None, None))
        if seen != tensors:
            view = detached_copy(flow)
            self.__dict__["_view"] = view, tensors
        return view

    # -- reading the posterior -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, num_samples: int) -> dict[str, Tensor]:
        """Independent draws of every latent, ``(num_samples, *site_shape)``, in the model's units."""
        return self._constrain(self.get_posterior().sample(Size([num_samples])))

    def _constrain(self, latent: Tensor) -> dict[str, Tensor]:
        """Values of the sites of rows of latents, ``(rows, *site_shape)``."""
        values, position = {}, 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            part = latent[:, position : position + shape.numel()].reshape((len(latent), *shape))
            values[name] = biject_to(site["fn"].support)(part)
            position += shape.numel()
        return values

    @torch.no_grad()
    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of every latent, from draws.

        Taken for each unconstrained coordinate, so that it lies in the support, also of simplices and matrices; for
        scalars and elementwise supports it is the marginal median of every entry.
        """
        latent = self.get_posterior().sample(Size([num_samples]))
        return {name: value[0] for name, value in self._constrain(_quantile(latent, latent.new_tensor([0.5]))).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float] | Tensor, *args: Any, num_samples: int = 10_000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal posterior quantiles of every entry of every latent, from draws.

        Arguments:
            quantiles: probabilities between 0 and 1.
            num_samples: number of draws.

        Returns:
            ``(len(quantiles), *site_shape)`` for each site.
        """
        draws = self.sample_posterior(num_samples)
        q = torch.as_tensor(quantiles)
        return {name: _quantile(x, q.to(x)) for name, x in draws.items()}

    @torch.no_grad()
    def log_weights(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Log importance weights ``log p(x, data) - log q(x)`` of draws of the guide, ``(num_samples,)``, in nats.

        Their mean is the ELBO, their log-mean-exp estimates the log evidence, and their Pareto tail index
        (``diagnostics.psis_khat``) says whether the guide can be trusted. Where the model has energies without a
        normaliser, ELBO and evidence lack their constants. ``args`` and ``kwargs`` are the model's.
        """
        posterior = self.get_posterior()
        latent = posterior.sample(Size([num_samples]))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            joint = self._log_joint(latent[0], args, kwargs)
        return joint(latent) - posterior.log_prob(latent)

    def _check_ready(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError("the guide has not met its model yet; run an SVI step, or call guide(*args), first.")

    # -- copies --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        model, master = self._model, self.master
        state = dict(super().__getstate__())  # drops the model, from this object too
        self._model, self.master = model, master
        state.pop("_view", None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model = self._model  # a program is not copied
        return new


def _check_flow(flow: nn.Module) -> None:
    name = type(flow).__name__
    if not isinstance(flow, GenerativeModel):
        raise TypeError(
            f"flow: got {name}, needs a generative model such as gm.Flow(zuko_flow, direction='sampling'), or a "
            "function features -> model."
        )
    if flow.density is not Density.EXACT or not flow.has_rsample:
        raise DensityError(f"flow: {name} has no exact density with pathwise draws; a guide needs both (gm.Flow has).")
    if flow.context_shape:
        raise ShapeError(
            f"flow: {name} needs a context of shape {tuple(flow.context_shape)}; give an unconditional one."
        )
    if flow.coordinates.native or not flow.coordinates.identity:
        raise SupportError(f"flow: {name} lives on {flow.support}; a guide needs one over all real vectors.")
    if flow.slow_direction == "sample":
        raise SlowDirectionError(
            f"flow: {name} takes {flow.cost.sample} sequential calls from noise to data, {flow.cost.score} back, and a "
            "guide runs the slow one at every step; build it with direction='sampling', or use a coupling flow."
        )


@torch.no_grad()
def _reset(flow: GenerativeModel) -> None:
    """Make the flow the identity on standard normal noise, from which the Gaussian start continues, or refuse."""
    name, parameters = type(flow).__name__, list(flow.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"flow: {name} is frozen, and would be reset; give a fresh one, a function features -> flow, or "
            "init='given'."
        )
    done = flow.start_at_identity()
    law = flow()
    z = law.base.sample(Size([16]))
    white = Normal(torch.zeros_like(z), torch.ones_like(z)).log_prob(z).sum(-1)
    if not (done and torch.allclose(law.push(z), z, atol=1e-3) and torch.allclose(law.base.log_prob(z), white)):
        raise ValueError(
            f"flow: {name} cannot be reset to the identity on standard normal noise, from which the Gaussian start "
            "continues; use a fresh coupling, affine or spline flow, or init='given'."
        )


def _quantile(draws: Tensor, probabilities: Tensor) -> Tensor:
    """Quantiles over the first dimension, linear between order statistics; ``torch.quantile`` has a limit of size."""
    ordered = draws.sort(0).values
    position = probabilities.flatten() * (len(draws) - 1)
    below = position.floor().long().clamp(0, len(draws) - 1)
    weight = (position - below).reshape(-1, *(1 for _ in draws.shape[1:]))
    result = torch.lerp(ordered[below], ordered[(below + 1).clamp(max=len(draws) - 1)], weight)
    return result.reshape(probabilities.shape + draws.shape[1:])
