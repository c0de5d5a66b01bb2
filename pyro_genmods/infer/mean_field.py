r"""The evidence lower bound of a mean-field guide, without densities that nobody reads.

Where the guide is a product of laws :math:`q_i` and the divergence of each from the model's :math:`p_i` is known,

.. math:: \mathrm{ELBO} = \mathbb E_q \Big[ \log p(\mathrm{data} \mid x)
          - \sum_i \mathrm{KL}\big(q_i \,\|\, p_i(\cdot \mid x_{\mathrm{pa}(i)})\big) \Big] ,

and :math:`\log p_i(x_i)` appears nowhere. Pyro's ``TraceMeanField_ELBO`` computes it all the same, before it looks for
the divergence. Where it is the integral of an equation and the divergence one call of a network
(:mod:`pyro_genmods.evolve.score_divergence`), that is all the time there is. Here latent sites are masked while the
model runs, so that their densities are zero without being evaluated; afterwards they get their laws back, and where no
divergence is known, their densities too.

Reference:
    D. P. Kingma, M. Welling, Auto-Encoding Variational Bayes, 2013, arXiv:1312.6114 (equation 7).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import check_fully_reparametrized, is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import kl_divergence

from ..foundation.errors import ShapeError

__all__ = ["TraceMeanField_ELBO"]

SCORES = ("log_prob", "log_prob_sum", "unscaled_log_prob")


class TraceMeanField_ELBO(pyro.infer.TraceMeanField_ELBO):  # noqa: N801
    """Pyro's estimator of the same name and arguments, with the same gradients, without the densities it does not use.

    A latent site of which the divergence is registered with ``torch.distributions.kl`` is not scored; the others are,
    as in Pyro. ``AutoNormal`` draws a site on the real line beside an auxiliary one of the same value: there the
    divergence of the auxiliary law is taken, where Pyro takes both densities.

    Arguments:
        num_particles, max_plate_nesting, vectorize_particles, retain_graph: of ``pyro.infer.TraceMeanField_ELBO``.

    Raises:
        ShapeError: a divergence of another shape than the batch of its site.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_genmods as gm
        >>> prior = gm.Diffusion(2).freeze()
        >>> def model():
        ...     x = pyro.sample("x", prior())
        ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.ones(2))
        >>> calls = []
        >>> hook = prior.network.register_forward_hook(lambda *_: calls.append(1))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
        >>> _ = svi.step()                                      # the guide sees the model for the first time
        >>> calls.clear()
        >>> _ = svi.step()
        >>> len(calls)
        1
    """

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        masked = _Masked()
        model_trace, guide_trace = super()._get_trace(masked(model), guide, args, kwargs)
        for name in masked.names:
            _settle(name, model_trace, guide_trace)
        model_trace.compute_log_prob()
        return model_trace, guide_trace


class _Masked(Messenger):
    """Latent sites without a density.

    Attributes:
        names: of these sites.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and hasattr(msg["fn"], "mask"):
            self.names.append(msg["name"])
            msg["fn"] = msg["fn"].mask(False)


def _settle(name: str, model_trace: Any, guide_trace: Any) -> None:
    """Give a site its law back, and its divergence for a density, or else the need of one."""
    site = model_trace.nodes.get(name)
    if site is None or not isinstance(site["fn"], MaskedDistribution):  # an outer handler has put in another
        return
    site["fn"] = site["fn"].base_dist
    divergence = None if site["is_observed"] else _divergence(name, site["fn"], guide_trace)
    if divergence is None:
        for key in SCORES:
            site.pop(key, None)
    else:  # an observed site adds its density and asks no more
        site.update(is_observed=True, log_prob_sum=-divergence)


def _divergence(name: str, law: Any, guide_trace: Any) -> Tensor | float | None:
    """Of the guide's site from a law, scaled, masked and summed; ``None`` where it is not known."""
    if name not in guide_trace.nodes:
        return None
    beside = f"{name}_unconstrained"
    site = guide_trace.nodes[beside if _is_copy(guide_trace, name, beside) else name]
    try:
        divergence = kl_divergence(site["fn"], law)
    except NotImplementedError:
        return None
    if is_validation_enabled():
        check_fully_reparametrized(site)
    divergence = scale_and_mask(divergence, scale=site["scale"], mask=site["mask"])
    if site["name"] == beside:
        guide_trace.remove_node(beside)
    if not isinstance(divergence, Tensor):
        return divergence * Size(site["fn"].batch_shape).numel()
    if divergence.shape != site["fn"].batch_shape and not torch.jit.is_tracing():
        raise ShapeError(
            f"site {name!r}: the divergence of {site['fn']} from {law} has shape {tuple(divergence.shape)}, needs that "
            f"of the batch, {tuple(site['fn'].batch_shape)}; correct what is registered with register_kl."
        )
    return divergence.sum()


def _is_copy(guide_trace: Any, name: str, beside: str) -> bool:
    """Whether a site of the guide is a point mass at the value of an auxiliary one, as those of ``AutoNormal`` are."""
    site, other = guide_trace.nodes[name], guide_trace.nodes.get(beside)
    if other is None or not isinstance(site["fn"], Delta):
        return False
    x, u = site["fn"].v, other["value"]  # a plate makes a view of the same numbers
    return x is u or (x.shape == u.shape and x.stride() == u.stride() and x.data_ptr() == u.data_ptr())
