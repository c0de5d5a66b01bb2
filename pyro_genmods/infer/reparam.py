r"""Inference in noise space: any pushforward site is replaced by its base noise.

If :math:`x = \mathrm{push}(z)` with :math:`z \sim p_Z`, the posterior of :math:`z` under a likelihood :math:`L` is

.. math:: p(z \mid \mathrm{data}) \propto p_Z(z) \, L(\mathrm{push}(z)) ,

in which neither the density of :math:`x` nor a Jacobian appears. A learned prior of awkward geometry becomes a standard
normal, and a generator without a density (adversarial, distilled) is as good a prior as a flow. What it costs is one
push per evaluation; what it needs is a push that is fast, see :class:`pyro_genmods.Flow`.

References:
    M. D. Parno, Y. M. Marzouk, Transport map accelerated Markov chain Monte Carlo, 2018, arXiv:1412.5492.
    M. Hoffman et al., NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport, 2019,
    arXiv:1903.03704.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistributionMixin
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor
from torch.distributions import Independent

from ..foundation.errors import DensityError, ModelError, SlowDirectionWarning

__all__ = ["PushforwardReparam", "unwrap"]


class PushforwardReparam(Reparam):
    """Sample a site in the noise space of its pushforward.

    A latent site ``name`` becomes a latent site ``{name}_base`` with the base law, and a deterministic site ``name``.
    An observed site is pulled back, and contributes exactly its log density. Works for every distribution with ``base``
    and ``push`` (``pull`` is used where it exists), wrapped or not in ``to_event``, ``mask``, ``expand`` and plates.

    Values that an initialisation strategy proposes for ``name`` are pulled back where that is possible, else the
    strategy initialises the noise.

    Arguments:
        discrete: allow sites with discrete values. Their noise has a posterior but its density is a staircase, without
            a gradient: samplers that follow gradients crawl, ``infer.SMC`` with elliptical slice moves does not.

    Raises:
        TypeError: the site's distribution is not a pushforward.
        ModelError: the site has discrete values, and ``discrete`` was not said.
        DensityError: the site is observed and the pushforward has no density or no inverse.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, zuko, pyro_genmods as gm
        >>> from pyro import poutine
        >>> prior = gm.Flow(zuko.flows.NICE(2))
        >>> def model(y):
        ...     x = pyro.sample("x", prior())
        ...     pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)
        >>> noisy = poutine.reparam(model, {"x": gm.infer.PushforwardReparam()})
        >>> trace = poutine.trace(noisy).get_trace(torch.zeros(2))
        >>> [name for name in trace.stochastic_nodes]
        ['x_base']
    """

    def __init__(self, discrete: bool = False) -> None:
        self.discrete = discrete

    def apply(self, msg: dict[str, Any]) -> dict[str, Any]:
        """Replace the site; called by ``pyro.poutine.reparam``."""
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        law, wrap = unwrap(fn)
        if not (hasattr(law, "base") and hasattr(law, "push")):
            raise TypeError(_not_a_pushforward(name, law))
        base = wrap(law.base)
        if msg["is_observed"]:
            return self._observe(name, fn, law, base, value)
        if fn.support.is_discrete and not self.discrete:
            raise ModelError(
                f"site {name!r}: has discrete values, so that the density of its noise has no gradient; sum it out by "
                "enumeration if it is small, use SVI with score-function gradients, or infer.SMC(..., "
                "moves='elliptical') with PushforwardReparam(discrete=True), which needs none."
            )
        _warn_if_slow(name, law)
        noise = _noise_of(law, value)
        z = pyro.sample(f"{name}_base", base, obs=noise, infer={"is_observed": False})
        try:
            x = law.push(z) if noise is None else value
        except DensityError as error:
            raise TypeError(_not_a_pushforward(name, law)) from error
        return {"fn": Delta(x, event_dim=fn.event_dim).mask(False), "value": x, "is_observed": True}

    def _observe(
        self, name: str, fn: TorchDistributionMixin, law: Any, base: TorchDistributionMixin, value: Tensor
    ) -> dict[str, Any]:
        try:
            z, log_prob = law.pull(value), fn.log_prob(value)
        except (AttributeError, DensityError) as error:
            raise DensityError(
                f"site {name!r} is observed and its distribution {law} has no inverse or no density; "
                "observe it through a likelihood (x = pyro.sample(...); pyro.sample('y', Normal(x, s), obs=y))."
            ) from error
        # A value outside the support has no noise, and that its density is zero is for log_prob to say.
        z = torch.where(z.isnan(), 0, z)
        pyro.sample(f"{name}_base", base, obs=z)
        log_density = log_prob - base.log_prob(z)
        return {"fn": Delta(value, log_density, event_dim=fn.event_dim), "value": value, "is_observed": True}


def unwrap(fn: TorchDistributionMixin) -> tuple[Any, Callable[[TorchDistributionMixin], TorchDistributionMixin]]:
    """The pushforward inside ``to_event``, ``mask`` and ``expand``, and how to wrap its base the same way."""
    if isinstance(fn, Independent):
        law, wrap = unwrap(fn.base_dist)
        return law, lambda base: wrap(base).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        law, wrap = unwrap(fn.base_dist)
        return law, lambda base: wrap(base).mask(fn._mask)
    if isinstance(fn, ExpandedDistribution):
        law, wrap = unwrap(fn.base_dist)
        return law, lambda base: wrap(base).expand(fn.batch_shape)
    return fn, lambda base: base


def _noise_of(law: Any, value: Tensor | None) -> Tensor | None:
    """Noise of a value that an initialisation strategy chose on purpose; ``None`` lets it initialise the noise."""
    if value is None or not getattr(value, "_pyro_custom_init", True):
        return None
    try:
        noise = law.pull(value)
    except (AttributeError, DensityError):
        return None
    return noise if bool(noise.isfinite().all()) else None


def _not_a_pushforward(name: str, law: Any) -> str:
    return (
        f"site {name!r}: PushforwardReparam needs a distribution with base and push, got {law}; remove the site from "
        f"the reparam config (under obs_mask, name the sites '{name}_observed' and '{name}_unobserved' instead)."
    )


def _warn_if_slow(name: str, law: Any) -> None:
    if getattr(getattr(law, "model", None), "slow_direction", None) == "sample":
        warnings.warn(
            f"site {name!r}: {type(law.model).__name__} pushes noise to data in its slow direction "
            f"({law.model.cost.sample} sequential network calls against {law.model.cost.score}), and inference in "
            "noise space runs it at every gradient; use a coupling flow, or a flow with direction='sampling'.",
            SlowDirectionWarning,
            stacklevel=2,
        )
