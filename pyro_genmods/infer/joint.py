r"""The log joint density of a Pyro program as a function of unconstrained latents.

With :math:`x = b(u)` the constrained values of all latent sites, what variational fits and importance weights need is

.. math:: f(u) = \log p(x, \mathrm{data}) + \log\left|\det \frac{\partial x}{\partial u}\right| ,

for many :math:`u` at once. The program is written for one. ``torch.vmap`` runs it on all rows together, at the price of
one run; where a program cannot be run so (data-dependent branches), or where the outcome differs from that of one run a
row, the rows are run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import biject_to, constraints

__all__ = ["LogJoint"]


class LogJoint:
    """Log joint density of a model and its data, at rows of unconstrained latents.

    Arguments:
        model: a Pyro model.
        sites: support and unconstrained shape of each latent site, in the order in which a row holds them.
        probe: a row at which the model can be run, ``(D,)``.
        args, kwargs: the model's arguments.

    Attributes:
        vectorised: rows are evaluated together.
        hidden_noise: the model draws something that is neither a latent of ``sites`` nor a minibatch (a site hidden by
            ``poutine.block``, dropout), so that values at one point differ and are not those of a density.
        terms: number of log densities that one row adds up, a measure of its cost.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Exponential(1.0))
        >>> joint = LogJoint(model, {"x": (constraints.positive, Size([]))}, torch.zeros(1))
        >>> joint(torch.tensor([[0.0], [1.0]]))     # -exp(u) + u
        tensor([-1.0000, -1.7183])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        sites: Mapping[str, tuple[constraints.Constraint, Size]],
        probe: Tensor,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._sites, self._args, self._kwargs = model, sites, args, dict(kwargs or {})
        nodes = [site for site in _quietly(self._run, probe).nodes.values() if site["type"] == "sample"]
        minibatches = {site["name"]: site["value"] for site in nodes if site_is_subsample(site)}
        self.terms = sum(site["fn"].batch_shape.numel() for site in nodes if not site_is_subsample(site))
        before = _noise_states(probe)
        _quietly(lambda latent: self._run(latent, minibatches), probe)
        self.hidden_noise = any(not torch.equal(a, b) for a, b in zip(before, _noise_states(probe), strict=True))
        self._vmapped = torch.vmap(self._one, randomness="same", chunk_size=256)
        self.vectorised = _quietly(self._agrees, probe + 0.01 * torch.arange(2.0).to(probe)[:, None])

    def __call__(self, latents: Tensor) -> Tensor:
        """Values at rows ``(rows, D)``, shape ``(rows,)``, in nats; differentiable."""
        return _quietly(self._vmapped if self.vectorised else self._loop, latents)

    def _loop(self, latents: Tensor) -> Tensor:
        return torch.stack([self._one(latent) for latent in latents])

    def _one(self, latent: Tensor) -> Tensor:
        values, volume = self.constrain(latent)
        return self._trace(values).log_prob_sum() + volume

    def _run(self, latent: Tensor, minibatches: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        return self._trace(self.constrain(latent)[0] | dict(minibatches or {}))

    def _trace(self, values: Mapping[str, Tensor]) -> poutine.Trace:
        return poutine.trace(poutine.condition(self._model, values)).get_trace(*self._args, **self._kwargs)

    def constrain(self, latent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites of one row, and the log-volume of the bijections to their supports."""
        values, position, volume = {}, 0, latent.new_zeros(())
        for name, (support, shape) in self._sites.items():
            unconstrained = latent[position : position + shape.numel()].reshape(shape)
            bijection = biject_to(support)
            values[name] = bijection(unconstrained)
            volume = volume + bijection.log_abs_det_jacobian(unconstrained, values[name]).sum()
            position += shape.numel()
        return values, volume

    def _agrees(self, probes: Tensor) -> bool:
        """Whether the vectorised program gives the values and gradients of one run a row, from the same noise."""
        expected = [_value_and_gradient(self._one, probe) for probe in probes]
        try:
            found = _value_and_gradient(self._vmapped, probes)
        except (RuntimeError, ValueError, TypeError, NotImplementedError):  # what functorch cannot do, the loop can
            return False
        pairs = zip(found, (torch.stack(parts) for parts in zip(*expected, strict=True)), strict=True)
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)


def _quietly(function: Callable[[Tensor], Any], latents: Tensor) -> Any:
    """Call without telling the handlers around us, and without validation: far out a density is ``-inf``, no error."""
    with poutine.block(), pyro.validation_enabled(False):
        return function(latents)


def _noise_states(place: Tensor) -> list[Tensor]:
    """States of the generators that a program at this place draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(place.device)] if place.is_cuda else states


def _value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Both at ``x``, from a noise of its own that is the same at every call."""
    devices = range(torch.cuda.device_count())
    with torch.enable_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        leaf = x.detach().requires_grad_()
        values = function(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient
