r"""Energies as tilts of their bases, for samplers that go from what is known to what is asked for.

A law :math:`p(x) \propto b(x)\, e^{-E(x)}` with a normalised base :math:`b` is the prior :math:`b` with a likelihood
:math:`e^{-E}`, and everything that leads from a prior to a posterior leads from the base to the law: tempering bridges
the modes of the *energy* together with those of the posterior, particles start as draws of the base, and the evidence
of a program that is one energy alone is its constant,

.. math:: x \sim b, \qquad \log Z = \log \mathbb E_b\, e^{-E(x)} .

Tempered potentials do this by themselves (:func:`untilted`), and call the site what it was called;
:class:`TiltReparam` does it by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, TorchDistribution, Unit
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import Distribution

from ..foundation.errors import DensityError
from .reparam import unwrap

__all__ = ["TILTED", "TiltReparam", "base_of", "untilted"]

TILTED = "_tilted"  # under which a factor says of which site and law it is the tilt


def base_of(law: Any) -> TorchDistributionMixin | None:
    """The normalised law that a law tilts; ``None`` where there is none.

    Arguments:
        law: inside ``to_event``, ``mask`` and ``expand``.

    Example:
        >>> import pyro.distributions as dist, pyro_genmods as gm
        >>> base_of(gm.Energy(1)()), base_of(gm.Energy(1, network=lambda y: y[:, 0] ** 2, base=None)())
        (GaussianBaseDistribution(...), None)
    """
    if not hasattr(law, "tilt"):
        return None
    try:
        return law.untilted
    except DensityError:
        return None


class TiltReparam(Reparam):
    """Sample a site from the base of its law, with the tilt as a factor.

    A latent site ``name`` becomes a latent site ``{name}_base`` with the law of the base, a factor ``{name}_tilt``, and
    a deterministic site ``name`` of the same value. The joint density is the same. ``infer.SMC`` and
    ``infer.ParallelTempering`` do it by themselves; under ``infer.SMC(moves="elliptical")`` a Gaussian base is sampled
    by slices, which need no gradient of the energy. Observed sites stay as they are.

    Raises:
        TypeError: the law of the site tilts nothing.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_genmods as gm
        >>> from pyro import poutine
        >>> energy = gm.Energy(2, network=lambda y: y.pow(4).sum(-1))
        >>> def model(y):
        ...     x = pyro.sample("x", energy())
        ...     pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)
        >>> tilted = poutine.reparam(model, {"x": gm.infer.TiltReparam()})
        >>> trace = poutine.trace(tilted).get_trace(torch.zeros(2))
        >>> trace.stochastic_nodes, trace.observation_nodes
        (['x_base'], ['x_tilt', 'x', 'y'])
    """

    def apply(self, msg: dict[str, Any]) -> dict[str, Any]:
        """Replace the site; called by ``pyro.poutine.reparam``."""
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        if msg["is_observed"]:
            return {"fn": fn, "value": value, "is_observed": True}
        law, wrap = unwrap(fn)
        base = base_of(law)
        if base is None:
            raise TypeError(
                f"site {name!r}: TiltReparam needs a law with untilted and tilt, and a base (Energy(base='gaussian'), "
                f"or a fitted flow), got {law}; remove the site from the reparam config."
            )
        x = pyro.sample(f"{name}_base", wrap(base), obs=value, infer={"is_observed": False})
        _tilt(name, law, wrap, x)
        return {"fn": Delta(x, event_dim=fn.event_dim).mask(False), "value": x, "is_observed": True}


def untilted(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same program with the bases of its latent energies for their laws, and their tilts as factors.

    Names and values of sites stay. A law without a base stays too.

    Arguments:
        model: a Pyro program.

    Example:
        >>> import pyro, pyro_genmods as gm
        >>> energy = gm.Energy(2, network=lambda y: y.pow(4).sum(-1))
        >>> trace = pyro.poutine.trace(untilted(lambda: pyro.sample("x", energy()))).get_trace()
        >>> trace.nodes["x"]["fn"], trace.observation_nodes
        (GaussianBaseDistribution(...), ['x_tilt'])
    """
    return _Untilted()(model)


class _Untilted(Messenger):
    """Puts bases in the place of laws, and adds their tilts once there are values."""

    def __enter__(self) -> _Untilted:
        self._waiting: dict[str, tuple[Any, Callable[..., Any]]] = {}
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or not isinstance(msg["fn"], Distribution):
            return
        law, wrap = unwrap(msg["fn"])
        base = base_of(law)
        if base is not None and not law.support.is_discrete:
            msg["fn"] = wrap(base)
            self._waiting[msg["name"]] = law, wrap

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._waiting:
            _tilt(msg["name"], *self._waiting.pop(msg["name"]), msg["value"])


def _tilt(name: str, law: Any, wrap: Callable[..., Any], x: Tensor) -> None:
    factor = Unit(wrap(_Tilt(law)).log_prob(x))
    told = {"is_auxiliary": True, TILTED: (name, law)}
    pyro.sample(f"{name}_tilt", factor, obs=factor.sample(), infer=told)


class _Tilt(TorchDistribution):
    """A tilt in the form of a law, so that it can be masked, expanded and summed over events like one."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, law: Any) -> None:
        self._law = law
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self._law.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Tilt:
        return _Tilt(self._law.expand(Size(batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._law.tilt(value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        raise DensityError("a tilt is no law of its own, and has no draws.")
