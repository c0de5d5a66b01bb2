r"""What Pyro sees: a generative model at a context, with every habit of a ``TorchDistribution``.

Any number of leading dimensions (plates, vectorised particles, enumeration, chains) is flattened to rows once, and
unflattened once, here. A conditional law expands its context, never the output of its network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from .foundation.errors import DensityError, PlacementError, ShapeError, SupportError
from .mechanism import Density, Mechanism

__all__ = ["GenerativeDistribution", "check_place"]


class GenerativeDistribution(TorchDistribution):
    r"""A generative model at a context: a Pyro distribution.

    Arguments:
        model: the model that owns the parameters.
        context: ``(*batch_shape, *context_shape)`` or ``None``.
        batch_shape: for an unconditional model, the shape of independent copies.
        validate_args: check values against shape, dtype, device and support; default as for all distributions.

    Shape:
        values ``(*sample_shape, *batch_shape, *event_shape)``; any further leading dimensions are accepted everywhere.

    Raises:
        ShapeError, PlacementError: see :meth:`pyro_genmods.contract.GenerativeModel.forward`.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        model: Mechanism,
        context: Tensor | None = None,
        batch_shape: Size | tuple[int, ...] = (),
        validate_args: bool | None = None,
    ) -> None:
        self.model = model
        self.context = context
        self.has_rsample = model.has_rsample
        if model.context_shape or context is not None:
            batch_shape = self._check_context(context)
        super().__init__(Size(batch_shape), model.event_shape, validate_args=validate_args)

    def _check_context(self, context: Tensor | None) -> Size:
        model, shape = self.model, self.model.context_shape
        name = type(model).__name__
        if context is None:
            raise ShapeError(f"context: {name} is conditional; call it with one of shape (*batch, {_dims(shape)}).")
        if not shape:
            raise ShapeError(
                f"context: {name} is unconditional, got one of shape {tuple(context.shape)}; leave it out."
            )
        split = context.dim() - len(shape)
        if split < 0 or context.shape[split:] != shape:
            raise ShapeError(f"context: got shape {tuple(context.shape)}, {name} needs (*batch, {_dims(shape)}).")
        check_place("context", context, model)
        return Size(context.shape[:split])  # a tuple where Pyro tracks provenance

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def density(self) -> Density:
        """How honest :meth:`log_prob` is."""
        return self.model.density

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Where values live, with ``event_dim`` set, known to ``biject_to`` if the law is continuous."""
        return self.model.support

    @property
    def base(self) -> TorchDistributionMixin:
        """Law of the noise that :meth:`push` carries to this law, with this batch shape."""
        return self.model.base_distribution().expand(self.batch_shape)

    def __repr__(self) -> str:
        return (
            f"{type(self.model).__name__}Distribution(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, support={self.support}, density={self.density.name})"
        )

    # -- the Pyro contract ---------------------------------------------------------------------------------------

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> GenerativeDistribution:
        """A new distribution over ``batch_shape`` copies; the context is expanded, the model is shared."""
        batch_shape = Size(batch_shape)
        if _broadcast("batch_shape", self.batch_shape, batch_shape) != batch_shape:
            raise ShapeError(f"batch_shape: {self} cannot be expanded to {tuple(batch_shape)}.")
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.__dict__.update(self.__dict__)
        if self.context is not None:
            new.context = self.context.expand(batch_shape + self.model.context_shape)
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats with respect to the user's units, bitwise repeatable.

        Arguments:
            value: ``(*lead, *event_shape)``, ``lead`` broadcastable with ``batch_shape``.

        Returns:
            ``broadcast(lead, batch_shape)``; ``-inf`` outside the support when validation is off.

        Raises:
            SupportError: with validation on, NaN or a value outside the support.
            ShapeError, PlacementError: the value does not fit the model.
            DensityError: the mechanism has no density.
        """
        inside = self._validate_args and self._check_value(value)
        lead, x, c = self._rows(value, self.event_shape)
        y, volume = self.model.coordinates.pull(x, inside)
        log_prob = self.model.log_prob_rows(y, c)
        return self._values(log_prob + volume if isinstance(volume, Tensor) else log_prob, lead)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        """Draw without gradient, ``(*sample_shape, *batch_shape, *event_shape)``."""
        with torch.no_grad():
            shape, c = self._draw_shape(sample_shape)
            x, _ = self.model.coordinates.push(self.model.sample_rows(shape.numel(), c))
            return self._as_values(x).reshape(shape + self.event_shape)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        """Draw with pathwise gradients, ``(*sample_shape, *batch_shape, *event_shape)``."""
        self._check_rsample()
        shape, c = self._draw_shape(sample_shape)
        x, _ = self.model.coordinates.push(self.model.sample_rows(shape.numel(), c))
        return x.reshape(shape + self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Any = Size()) -> tuple[Tensor, Tensor]:
        """A draw and its log density, computed together, once."""
        self._check_rsample()
        shape, c = self._draw_shape(sample_shape)
        y, log_prob = self.model.sample_and_log_prob_rows(shape.numel(), c)
        x, volume = self.model.coordinates.push(y)
        return x.reshape(shape + self.event_shape), (log_prob - volume).reshape(shape)

    # -- the transport -------------------------------------------------------------------------------------------

    def push(self, z: Tensor) -> Tensor:
        """Carry noise ``(*lead, *noise_shape)`` to values ``(*lead, *event_shape)``, differentiably.

        Where there is no value to go to (NaN or infinite noise, or no preimage under a saturating flow) it is NaN.
        """
        lead, rows, c, lost = self._noise_rows(z)
        x, _ = self.model.coordinates.push(self.model.push_rows(rows, c))
        x = x.flatten(1).masked_fill(lost[:, None], torch.nan)
        return self._as_values(x).reshape(lead + self.event_shape)

    def push_and_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Carry noise to values and give their log density, computed together where that is cheaper."""
        lead, rows, c, lost = self._noise_rows(z)
        y, log_prob = self.model.push_and_log_prob_rows(rows, c)
        x, volume = self.model.coordinates.push(y)
        x = x.flatten(1).masked_fill(lost[:, None], torch.nan).reshape(lead + self.event_shape)
        return x, self._values((log_prob - volume).masked_fill(lost, torch.nan), lead)

    def pull(self, x: Tensor) -> Tensor:
        """Carry values back to the noise they came from, NaN outside the support; the inverse of :meth:`push`."""
        if self._validate_args:
            self._validate_sample(x)
        lead, rows, c = self._rows(x, self.event_shape)
        y, volume = self.model.coordinates.pull(rows)
        z = self.model.pull_rows(y, c).flatten(1)
        return torch.where(volume.isfinite()[:, None], z, torch.nan).reshape(lead + self.model.noise_shape)

    def score(self, x: Tensor) -> Tensor:
        r"""Gradient :math:`\nabla_x \log p(x)`, shape ``(*broadcast(lead, batch_shape), *event_shape)``."""
        if self.support.is_discrete:
            raise DensityError(f"{self} has discrete values, and no gradient with respect to them; take differences.")
        create_graph = torch.is_grad_enabled()
        lead, _, _ = self._rows(x, self.event_shape)
        x = x.expand(_broadcast("value", lead, self.batch_shape) + self.event_shape)
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(leaf).sum(), leaf, create_graph=create_graph)
        return gradient

    def steps(self, n: int) -> Iterator[Any]:
        """The sampler opened up step by step, where sampling is sequential."""
        raise DensityError(f"{type(self.model).__name__} samples in one go; only sequential samplers have steps().")

    # -- flatten once, unflatten once ----------------------------------------------------------------------------

    def _rows(self, value: Tensor, event_shape: Size) -> tuple[Size, Tensor, Tensor | None]:
        split = value.dim() - len(event_shape)
        if split < 0 or value.shape[split:] != event_shape:
            raise ShapeError(f"value: got shape {tuple(value.shape)}, {self} needs (*lead, {_dims(event_shape)}).")
        if self.model.takes_any_dtype:
            value = value.to(torch.promote_types(self.model.place[0], torch.float32))  # bfloat16 has no 257
        lead = Size(value.shape[:split])  # a tuple where Pyro tracks provenance
        if self.context is None:
            return lead, value.reshape((lead.numel(), *event_shape)), None
        lead = _broadcast("value", lead, self.batch_shape)
        return lead, value.expand(lead + event_shape).reshape((lead.numel(), *event_shape)), self._context_rows(lead)

    def _noise_rows(self, z: Tensor) -> tuple[Size, Tensor, Tensor | None, Tensor]:
        """Rows of noise with zeros in place of rows that are not finite, which a network may never return from."""
        lead, rows, c = self._rows(z, self.model.noise_shape)
        lost = ~rows.detach().flatten(1).isfinite().all(-1)
        return lead, rows.masked_fill(lost.reshape(lost.shape + (1,) * len(self.model.noise_shape)), 0), c, lost

    def _context_rows(self, lead: Size) -> Tensor:
        c = self.context.expand(lead + self.model.context_shape).reshape(lead.numel(), -1)
        return self.model.context_standardization(c)

    def _as_values(self, x: Tensor) -> Tensor:
        return x if self.model.value_dtype is None else x.to(self.model.value_dtype)

    def _values(self, rows: Tensor, lead: Size) -> Tensor:
        values = rows.reshape(lead)
        full = lead if not self._batch_shape else _broadcast("value", lead, self._batch_shape)
        return values if full == lead else values.expand(full)

    def _draw_shape(self, sample_shape: Any) -> tuple[Size, Tensor | None]:
        shape = Size(sample_shape) + self.batch_shape
        return shape, None if self.context is None else self._context_rows(shape)

    # -- errors that name the remedy -----------------------------------------------------------------------------

    def _check_rsample(self) -> None:
        if not self.model.has_rsample:
            raise DensityError(f"{self} has no pathwise gradient; use sample(), or score-function gradients in SVI.")

    def _validate_sample(self, value: Tensor) -> None:
        self._check_value(value)

    def _check_value(self, value: Tensor) -> bool:
        """Refuse what is not in the support; say whether every entry is finite."""
        split = value.dim() - len(self.event_shape)
        if split < 0 or value.shape[split:] != self.event_shape:
            raise ShapeError(f"value: got shape {tuple(value.shape)}, {self} needs (*lead, {_dims(self.event_shape)}).")
        check_place("value", value, self.model, self.model.takes_any_dtype)
        finite = torch._is_all_true(value.isfinite())
        if finite and self.model.coordinates.identity and not self.model.coordinates.native:
            return True
        inside = self.support.check(value)
        if not torch._is_all_true(inside):
            bad = value[~inside].reshape(-1)[:8].tolist()
            raise SupportError(
                f"value: {int((~inside).sum())} event(s) are NaN or outside the support {self.support} of {self}, "
                f"the first of them {bad}; correct the data, or give the model the support that they have."
            )
        return bool(finite)


def check_place(name: str, value: Tensor, model: Mechanism, any_dtype: bool = False) -> None:
    """Refuse a tensor of another dtype or device than the model's.

    Arguments:
        name: of the argument, for the message.
        value: the tensor.
        model: tells the place.
        any_dtype: every real dtype will do.

    Raises:
        PlacementError: it differs.

    Example:
        >>> import zuko, pyro_genmods as gm
        >>> check_place("value", torch.zeros(2), gm.Flow(zuko.flows.NICE(2)))
    """
    dtype, device = model.place
    if (value.dtype == dtype or (any_dtype and not value.is_complex())) and value.device == device:
        return
    raise PlacementError(
        f"{name}: got {value.dtype} on {value.device}, the model has {dtype} on {device}; cast it with "
        f".to({str(device)!r}, {dtype}), or move the model with .to({str(value.device)!r}, {value.dtype})."
    )


def _broadcast(name: str, shape: Size, batch_shape: Size) -> Size:
    try:
        return torch.broadcast_shapes(shape, batch_shape)
    except RuntimeError as error:
        raise ShapeError(
            f"{name}: leading shape {tuple(shape)} does not broadcast with {tuple(batch_shape)}; move batch dimensions "
            "to the right, just before the event, or insert dimensions of size 1."
        ) from error


def _dims(shape: Size) -> str:
    return ", ".join(map(str, shape))
