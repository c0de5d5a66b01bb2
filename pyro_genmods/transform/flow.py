r"""Normalizing flows: any zuko flow as a Pyro distribution with an exact density.

A flow is a diffeomorphism :math:`T_\phi` between data and noise. zuko's networks parametrise one of its two directions,
and that direction takes one call per layer; the other is solved column by column in an autoregressive flow:

===================  ===============================  =======================================================
``direction``        the networks parametrise         use it for
===================  ===============================  =======================================================
``"density"``        :math:`z = T_\phi(x)`            priors and likelihoods fitted to data; NUTS on :math:`x`
``"sampling"``       :math:`x = T_\phi(z)`            variational guides, noise-space inference (inverse
                                                      autoregressive flows)
===================  ===============================  =======================================================

Coupling flows (``NICE``/``RealNVP``, ``NSF(passes=2)``) are fast both ways. Both directions of one flow have the change
of variables :math:`\log p(x) = \log p_Z(z) + \log|\det \partial z / \partial x|` and are tested against each other.

References:
    G. Papamakarios, E. Nalisnick, D. J. Rezende, S. Mohamed, B. Lakshminarayanan, Normalizing Flows for Probabilistic
    Modeling and Inference, 2021, arXiv:1912.02762. F. Rozet et al., zuko, https://zuko.readthedocs.io.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from pyro.distributions import Normal, Uniform
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from ..contract import Cost, Density, GenerativeModel
from ..coordinates import circular, event_shape_on
from ..foundation.errors import DensityError, InverseError, ShapeError
from ..foundation.networks import place_of, zero_output_layer
from ..foundation.numerics import normal_log_prob
from ..foundation.shapes import Context, Noise, Rows, Values
from ._zuko import zuko
from .free_form import with_own_steps
from .inverse import invert, invert_with_volume, needs_root_finding
from .quadrature import with_ordinary_gradients
from .structure import context_features_of, features_of, passes

__all__ = ["Flow"]

_LAZY = zuko.lazy
_OWN_TRAINING_SWITCH = (zuko.flows.neural.MNN, zuko.flows.neural.UMNN, zuko.flows.continuous.FFJTransform)


class Flow(GenerativeModel):
    r"""A zuko flow, in the user's units, as a generative model with an exact density.

    Arguments:
        flow: any zuko lazy flow (``zuko.flows.NSF(8, context=3)``, ``MAF``, ``NICE``, ``NAF``, ``UNAF``, ``SOSPF``,
            ``BPF``, ``GF``, ``NCSF``, ``CNF``) or ``zuko.mixtures.GMM``, of any size, with or without context.
        direction: which direction the flow's networks parametrise, see the module's table. It changes the law of an
            untrained flow, so choose before training.
        support: where events live; the flow then models the unconstrained coordinates. ``NCSF`` lives on the circle
            by itself and takes none.
        event_shape: shape of one event; default ``(features,)``, or what the support makes of it.
        context_features: number of context features, for flows whose modules do not tell.

    Shape:
        events ``event_shape``, contexts ``(context_features,)``; log densities in nats per event.

    Raises:
        TypeError: ``flow`` is not a zuko lazy distribution.
        ShapeError: event shape and flow disagree.
        DensityError: a flow whose density is random (``CNF(exact=False)``).

    Example:
        >>> import torch, zuko, pyro_genmods as gm
        >>> flow = gm.Flow(zuko.flows.NSF(3, context=2, hidden_features=(16,)))
        >>> law = flow(torch.zeros(5, 2))
        >>> law.batch_shape, law.event_shape, law.density.name
        (torch.Size([5]), torch.Size([3]), 'EXACT')
        >>> x, log_prob = law.rsample_and_log_prob()
        >>> torch.allclose(log_prob, law.log_prob(x), atol=1e-4)
        True
    """

    density: ClassVar[Density] = Density.EXACT
    ROUND_TRIP: ClassVar[float] = 1e-2
    MISSING: ClassVar[float] = 1e-2
    PROBES: ClassVar[int] = 1000

    def __init__(
        self,
        flow: nn.Module,
        direction: Literal["density", "sampling"] = "density",
        support: constraints.Constraint | None = None,
        event_shape: tuple[int, ...] | None = None,
        context_features: int | None = None,
    ) -> None:
        if not isinstance(flow, _LAZY.LazyDistribution):
            raise TypeError(f"flow: got {type(flow).__name__}, needs a zuko lazy flow, e.g. zuko.flows.NSF(features).")
        if direction not in ("density", "sampling"):
            raise ValueError(f"direction: got {direction!r}, needs 'density' or 'sampling'.")
        features = features_of(flow)
        native = isinstance(flow, zuko.flows.NCSF)
        if native and support is not None:
            raise ShapeError("support: an NCSF lives on the circle [-pi, pi]; rescale the data, give no support.")
        support = circular if native else (support or constraints.real)
        if context_features is None:
            context_features = context_features_of(flow, features)
        shape = Size(event_shape) if event_shape is not None else event_shape_on(support, Size([features]))
        super().__init__(shape, (context_features,) if context_features else (), support, native)
        if self.features != features:
            raise ShapeError(
                f"event_shape {tuple(shape)} on {support} has {self.features} coordinates, the flow has {features}."
            )
        self.to(*reversed(place_of(flow)))
        self.flow = flow
        self.direction = direction
        self.is_mixture = not isinstance(flow, _LAZY.Flow)
        self.has_rsample = not self.is_mixture
        self.root_finding = False
        if not self.is_mixture:
            self._inspect_transport()
        self.train(self.training)

    def _inspect_transport(self) -> None:
        """Learn from one row what the transport is made of; refuse what cannot be a deterministic density."""
        base = self.flow.base()
        if not isinstance(base, zuko.distributions.DiagNormal | zuko.distributions.BoxUniform):
            raise TypeError(f"flow: its base is {type(base).__name__}; needs zuko's DiagNormal or BoxUniform.")
        self.uniform_base = isinstance(base, zuko.distributions.BoxUniform)
        self.standard_base = not self.uniform_base and bool((base.mean == 0).all() and (base.stddev == 1).all())
        for module in self.flow.modules():
            if isinstance(module, zuko.flows.continuous.FFJTransform) and not module.exact:
                raise DensityError(
                    "flow: CNF(exact=False) draws fresh noise at every call, so that log_prob of one point changes by "
                    "nats from call to call and no sampler can use it; build it with exact=True."
                )
        self.odes = any(isinstance(m, zuko.flows.continuous.FFJTransform) for m in self.flow.modules())
        self.integrals = any(isinstance(m, zuko.flows.neural.UMNN) for m in self.flow.modules())
        with torch.no_grad():
            dtype, device = self.place
            row = torch.zeros(1, self.features, dtype=dtype, device=device)
            context = torch.zeros(1, *self.context_shape, dtype=dtype, device=device) if self.context_shape else None
            transform = self.flow.transform(context)
            self.root_finding = needs_root_finding(transform, row)
            if needs_root_finding(transform.inv, row):
                raise InverseError(
                    "flow: its transform is the inverse of one that is solved by root finding, which zuko does only "
                    "within [-10, 10]; give the flow itself, and direction='sampling'."
                )

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def cost(self) -> Cost:
        """Sequential calls of the conditioner networks: one a layer one way, ``passes`` a layer the other way."""
        if self.is_mixture:
            calls = 1 if self.context_shape else 0
            return Cost(sample=calls, score=calls)
        there, back = passes(self.flow.transform)
        if self.direction == "density":
            return Cost(sample=back, score=passes(self.flow.transform, with_volume=True)[0])
        if self.root_finding:  # the volume is evaluated at the solution, one more call a layer
            back = passes(self.flow.transform.inv, with_volume=True)[0]
        return Cost(sample=there, score=back)

    @property
    def slow_direction(self) -> str | None:
        """The direction not to be run in a loop; with root finding, always the one that is solved."""
        if self.root_finding:
            return "sample" if self.direction == "density" else "score"
        return self.cost.slow_direction

    def train(self, mode: bool = True) -> Flow:
        """Set the mode; unlike zuko's own ``eval()``, never drop the gradients of NAF, UNAF and CNF parameters."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _OWN_TRAINING_SWITCH):
                module.training = True
        return self

    def start_at_identity(self) -> bool:
        """Zero what the conditioner networks put out; affine, spline and Bernstein layers are then the identity map."""
        for module in self.flow.modules():
            if hasattr(module, "hyper"):
                zero_output_layer(module.hyper)
            elif isinstance(module, zuko.flows.gaussianization.ElementWiseTransform):
                with torch.no_grad():
                    for parameter in module.phi:
                        parameter.zero_()
        if self.is_mixture or self.context_shape:
            return False
        with torch.no_grad():
            z = self._noise(16)
            return bool(torch.allclose(self.push_rows(z, None), z, atol=1e-3))

    # -- row functions -------------------------------------------------------------------------------------------

    def base_distribution(self) -> TorchDistributionMixin:
        """The flow's base: standard normal, or uniform on the circle."""
        if self.is_mixture:
            return super().base_distribution()
        base = self.flow.base
        if self.uniform_base:
            lower, upper = base.lower.clamp(min=-math.pi), base.upper.clamp(max=math.pi)
            return Uniform(lower, upper, validate_args=False).to_event(1)
        return Normal(base.loc, base.scale, validate_args=False).to_event(1)

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        if self.is_mixture:
            return self.flow(c).log_prob(y)
        z, volume = self._pull_with_volume(y, c)
        return self._base_log_prob(z) + volume

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        transform = self._transform(c)
        if self.root_finding and self.direction == "density":
            return invert(transform, z)
        return (transform.inv if self.direction == "density" else transform)(z)

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        transform = self._transform(c)
        if self.root_finding and self.direction == "sampling":
            return invert(transform, y)
        return (transform if self.direction == "density" else transform.inv)(y)

    def push_and_log_prob_rows(self, z: Noise, c: Context | None) -> tuple[Rows, Values]:
        transform = self._transform(c)
        if self.direction == "sampling":
            y, volume = transform.call_and_ladj(z)
        elif self.root_finding:
            y = invert(transform, z)
            return y, self.log_prob_rows(y, c)
        else:
            y, volume = invert_with_volume(transform, z)
        return y, self._base_log_prob(z) - volume

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        if self.is_mixture:
            return self.flow(c).sample((rows,) if c is None else ())
        if self.root_finding and self.direction == "density":
            return self._sample_checked(rows, c)[0]
        return super().sample_rows(rows, c)

    def sample_and_log_prob_rows(self, rows: int, c: Context | None) -> tuple[Rows, Values]:
        if self.root_finding and self.direction == "density":
            return self._sample_checked(rows, c)
        return super().sample_and_log_prob_rows(rows, c)

    # -- pieces --------------------------------------------------------------------------------------------------

    def _transform(self, c: Tensor | None) -> Transform:
        if self.is_mixture:
            raise DensityError("a mixture has no push and no pull; it has sample() and log_prob().")
        transform = self.flow.transform(c)
        if self.odes:
            transform = with_own_steps(transform)
        return with_ordinary_gradients(transform) if self.integrals else transform

    def _pull_with_volume(self, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Noise of rows and ``log |dz/dy|``; rows without a preimage get log-volume ``-inf``."""
        transform = self._transform(c)
        if self.direction == "density" or not self.root_finding:
            solve = transform.call_and_ladj if self.direction == "density" else partial(invert_with_volume, transform)
            return solve(y)
        z = invert(transform, y)
        missing = z.isnan().any(-1) & y.isfinite().all(-1)
        z = torch.where(missing[:, None], 0.0, z)
        _, volume = transform.call_and_ladj(z)
        return z, (-volume).masked_fill(missing, -math.inf)

    def _noise(self, rows: int) -> Tensor:
        if self.is_mixture or not self.standard_base:
            return super()._noise(rows)
        dtype, device = self.place
        return torch.randn(rows, self.features, dtype=dtype, device=device)

    def _base_log_prob(self, z: Tensor) -> Tensor:
        base = self.flow.base
        if self.uniform_base:
            return z.new_full(z.shape[:-1], -z.shape[-1] * math.log(2 * math.pi))
        if self.standard_base:
            return normal_log_prob(z)
        z = (z - base.loc) / base.scale
        return -(0.5 * z.square() + base.scale.log()).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

    def _sample_checked(self, rows: int, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw, map back, and redraw the rows whose round trip fails: draws from the density, or an error."""
        y, log_prob, good = self._push_checked(self._noise(rows), c)
        if not bool(good.all()):
            self._refuse_if_many_missing(~good, c)
        for _ in range(20):
            index = (~good).nonzero().flatten()
            if not len(index):
                return y, log_prob
            again = self._push_checked(self._noise(len(index)), None if c is None else c[index])
            y, log_prob = y.index_copy(0, index, again[0]), log_prob.index_copy(0, index, again[1])
            good = good.index_copy(0, index, again[2])
        missing = int((~good).sum())
        raise InverseError(f"{type(self.flow).__name__}: {missing} of {rows} draws found no preimage in 20 attempts.")

    def _refuse_if_many_missing(self, missing: Tensor, c: Tensor | None) -> None:
        """A law that misses many draws is not a law; with few draws at hand, try further ones before judging."""
        if len(missing) < self.PROBES:
            with torch.no_grad():
                row = torch.arange(self.PROBES, device=missing.device) % len(missing)
                _, _, good = self._push_checked(self._noise(self.PROBES), None if c is None else c[row])
                missing = torch.cat([missing, ~good])
        if int(missing.sum()) > self.MISSING * len(missing):
            raise InverseError(
                f"{type(self.flow).__name__}: {int(missing.sum())} of {len(missing)} draws have no preimage under the "
                "flow's own forward map (a saturating transform); its density does not integrate to one. Standardise "
                "and train it, use float64, or use a flow with a closed-form inverse (NSF, MAF, NICE)."
            )

    def _push_checked(self, z: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y = invert(self._transform(c), z)
        found = y.isfinite().all(-1)
        y = torch.where(found[:, None], y, 0.0)
        back, volume = self._pull_with_volume(y, c)
        close = ((back - z).abs() <= self.ROUND_TRIP * (1 + z.abs())).all(-1)
        return y, self._base_log_prob(back) + volume, (found & close).detach()
