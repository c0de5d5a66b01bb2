r"""Coordinates: the user's units on one side, the network's on the other.

A network learns best on centred, unit-scale, unbounded numbers; a scientist thinks in millivolts, fractions and angles.
:class:`Coordinates` is the bijection between the two, and it is the only place where units are known:

.. math:: x \;\overset{b^{-1}}{\longmapsto}\; u \;\longmapsto\; y = (u - \mu) / \sigma,
          \qquad \log p_X(x) = \log p_Y(y) + \log\left|\frac{\mathrm dy}{\mathrm dx}\right| ,

with :math:`b` = ``biject_to(support)`` from unconstrained to constrained space and :math:`(\mu, \sigma)` learned from
data by :meth:`Coordinates.standardize`. ``push`` goes towards the user, ``pull`` towards the network.
"""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, biject_to, constraints, transform_to

from .foundation.errors import DataError, DensityError, ShapeError, SupportError
from .foundation.shapes import Rows

__all__ = ["Circular", "Coordinates", "Standardization", "circular", "event_shape_on", "event_support"]


class Circular(constraints.interval):
    r"""The circle as the interval :math:`[-\pi, \pi]` whose ends are one point; densities on it are periodic."""

    def __init__(self) -> None:
        super().__init__(-math.pi, math.pi)

    def __repr__(self) -> str:
        return "Circular()"


circular = Circular()


@biject_to.register(Circular)
@transform_to.register(Circular)
def _circular_to_interval(constraint: Circular) -> Transform:
    return biject_to(constraints.interval(constraint.lower_bound, constraint.upper_bound))


def event_support(support: constraints.Constraint, event_shape: Size) -> constraints.Constraint:
    """The support with ``event_dim`` equal to that of the event, wrapping elementwise constraints as needed.

    Arguments:
        support: any constraint, elementwise (``constraints.positive``) or joint (``constraints.simplex``).
        event_shape: shape of one event.

    Raises:
        ShapeError: the support has more event dimensions than the event.

    Example:
        >>> event_support(constraints.positive, Size([3])).event_dim
        1
    """
    missing = len(event_shape) - support.event_dim
    if missing < 0:
        raise ShapeError(
            f"support {support} has {support.event_dim} event dimensions, event_shape {tuple(event_shape)} has "
            f"{len(event_shape)}; give an event_shape with at least as many."
        )
    return constraints.independent(support, missing) if missing else support


def event_shape_on(support: constraints.Constraint, unconstrained: Size) -> Size:
    """Shape of an event with so many unconstrained coordinates, where none is given.

    Arguments:
        support: any constraint.
        unconstrained: shape of the unconstrained coordinates.

    Example:
        >>> event_shape_on(constraints.positive, Size([3])), event_shape_on(constraints.simplex, Size([3]))
        (torch.Size([3]), torch.Size([4]))
    """
    return unconstrained if support.event_dim == 0 else Size(biject_to(support).forward_shape(unconstrained))


def _innermost(support: constraints.Constraint) -> constraints.Constraint:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


class Standardization(nn.Module):
    r"""The affine map :math:`y = (u - \mu) / \sigma` with buffers that travel with the model.

    Until :meth:`fit_` is called it is the identity and costs nothing.

    Arguments:
        features: number of columns.

    Shape:
        ``(rows, features)`` in and out.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.active = False

    def fit_(self, u: Tensor, common: bool = False) -> None:
        """Set shift and scale to the column means and standard deviations of ``u``; constant columns keep scale 1.

        Arguments:
            u: ``(n, features)``.
            common: take the root mean square of all columns' standard deviations for each.
        """
        scale = u.std(0, correction=0)
        scale = scale.square().mean().sqrt().expand_as(scale) if common else scale
        self.shift.copy_(u.mean(0))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))
        self.active = True

    def forward(self, u: Tensor) -> Tensor:
        return (u - self.shift) / self.scale if self.active else u

    def inverse(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.shift, y, self.scale) if self.active else y

    def log_scale(self) -> Tensor | float:
        """Sum of the log scales, the log-volume of the inverse map."""
        return self.scale.log().sum() if self.active else 0.0

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.active = bool((self.shift != 0).any() or (self.scale != 1).any())

    def extra_repr(self) -> str:
        return f"features={self.shift.numel()}, active={self.active}"


class Coordinates(nn.Module):
    r"""The bijection between events in the user's units and rows of standardised, unconstrained numbers.

    Arguments:
        event_shape: shape of one event in the user's units.
        support: where events live, a constraint known to ``biject_to``; ignored as a map when ``native``.
        native: the network works on the support itself (circles, categories): no bijection and no standardisation.

    Attributes:
        features: number of columns of a row; ``numel(event_shape)`` except for supports of lower dimension (a simplex
            of ``k`` entries has ``k - 1``).
        common: whether :meth:`standardize` takes one scale for all columns, as suits the pixels of images, of which
            some may then be constant.

    Raises:
        SupportError: ``biject_to`` has no bijection for the support.

    Example:
        >>> coordinates = Coordinates(Size([3]), constraints.simplex)
        >>> coordinates.features
        2
        >>> y, volume = coordinates.pull(torch.tensor([[0.2, 0.3, 0.5]]))
        >>> x, _ = coordinates.push(y)
        >>> x
        tensor([[0.2000, 0.3000, 0.5000]])
    """

    def __init__(self, event_shape: Size, support: constraints.Constraint, native: bool = False) -> None:
        super().__init__()
        self.event_shape = Size(event_shape)
        self.support = event_support(support, self.event_shape)
        self.native = native
        self.identity = native or isinstance(_innermost(self.support), type(constraints.real))
        self.unconstrained_shape = self.event_shape if self.identity else self._unconstrained_shape()
        self.features = self.unconstrained_shape.numel()
        self.standardization = Standardization(self.features)
        self.common = False

    def _bijection(self) -> Transform:
        return biject_to(self.support)

    def _unconstrained_shape(self) -> Size:
        try:
            shape = Size(self._bijection().inverse_shape(self.event_shape))
            u = torch.zeros((2, *shape))
            x = self._bijection()(u)
            volume = self._bijection().log_abs_det_jacobian(u, x)
            fits = x.shape == (2, *self.event_shape) and volume.shape[:1] == (2,)
        except NotImplementedError as error:
            raise SupportError(
                f"support {self.support} has no bijection to the reals; use a constraint that "
                "torch.distributions.biject_to knows, or transform the data to one first."
            ) from error
        except (ValueError, RuntimeError):  # a bijection that reads its dimensions otherwise than its constraint
            fits = False
        if not fits:
            raise SupportError(
                f"support {self.support} does not map to event_shape {tuple(self.event_shape)}; check its event_dim."
            )
        return shape

    def pull(self, x: Tensor, known_inside: bool = False) -> tuple[Rows, Tensor | float]:
        """Events ``(rows, *event_shape)`` to rows ``(rows, features)``, and ``log |dy/dx|``.

        An event outside the support, infinity included, gets the row of an arbitrary inner point and log-volume
        ``-inf``; an event with NaN gets log-volume NaN. No network ever sees either.

        Arguments:
            x: events.
            known_inside: the caller has checked that all are finite and in the support.
        """
        if known_inside and self.identity:
            u = x.reshape(x.shape[0], self.features)
            return self.standardization(u), -self.standardization.log_scale()
        size = x.detach().reshape(x.shape[0], -1).abs().sum(-1)
        inside = size < math.inf  # False for NaN
        if self.native or not self.identity:
            inside = inside & self.support.check(x)
        shaped = inside.reshape(inside.shape + (1,) * len(self.event_shape))
        if self.identity:
            u, volume = torch.where(shaped, x, 0), self.standardization.log_scale()
        else:
            bijection = self._bijection()
            x = torch.where(shaped, x, bijection(x.new_zeros(self.unconstrained_shape)))
            u = bijection.inv(x)
            volume = bijection.log_abs_det_jacobian(u, x).reshape(x.shape[0], -1).sum(-1)
            volume = volume + self.standardization.log_scale()
        y = self.standardization(u.reshape(x.shape[0], self.features))
        return y, torch.where(inside, -volume, -size - math.inf)

    def entry_volumes(self, x: Tensor) -> Tensor:
        """``log |dy/dx|`` of each entry of events ``(rows, *event_shape)``, ``(rows, features)``.

        Raises:
            DensityError: entries of a joint support, such as a simplex, have no volumes of their own.
        """
        entry = _innermost(self.support)
        x = x.reshape(x.shape[0], -1)
        if self.identity:
            volumes = torch.zeros_like(x)
        elif entry.event_dim:
            raise DensityError(f"entries of events on {self.support} cannot be taken one by one; take whole events.")
        else:
            bijection = biject_to(entry)
            volumes = -bijection.log_abs_det_jacobian(bijection.inv(x), x)
        return volumes - self.standardization.scale.log()

    def columns(self, index: Tensor) -> Coordinates:
        """Coordinates of some entries, as a vector.

        Raises:
            DensityError: the support is a joint one.
        """
        entry = _innermost(self.support)
        if entry.event_dim and not self.identity:
            raise DensityError(f"entries of events on {self.support} cannot be taken one by one; take whole events.")
        part = Coordinates(Size([len(index)]), entry, self.native).to(self.standardization.shift)
        part.standardization.shift.copy_(self.standardization.shift[index])
        part.standardization.scale.copy_(self.standardization.scale[index])
        part.standardization.active = self.standardization.active
        return part

    def push(self, y: Rows) -> tuple[Tensor, Tensor | float]:
        """Rows ``(rows, features)`` to events ``(rows, *event_shape)``, and ``log |dx/dy|``."""
        u = self.standardization.inverse(y).reshape(y.shape[:1] + self.unconstrained_shape)
        volume = self.standardization.log_scale()
        if self.identity:
            return u, volume
        bijection = self._bijection()
        x = bijection(u)
        return x, bijection.log_abs_det_jacobian(u, x).reshape(x.shape[0], -1).sum(-1) + volume

    def standardize(self, x: Tensor) -> None:
        """Learn shift and scale from events ``(rows, *event_shape)``.

        Raises:
            DataError: a column is constant, so that its density is degenerate.
        """
        if self.native:
            return
        with torch.no_grad():
            u = x.reshape(x.shape[0], self.features) if self.identity else self._bijection().inv(x)
            u = u.reshape(x.shape[0], self.features)
            constant = (u == u[:1]).all(0).nonzero().flatten().tolist()
            if len(constant) > (self.features - 1) * self.common:
                raise DataError(
                    f"column(s) {constant[:8]} of the data are constant: their density is a point mass. "
                    "Drop them, or add noise of the size of the measurement error (dequantisation)."
                )
            self.standardization.fit_(u, self.common)

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}, support={self.support}, native={self.native}"
