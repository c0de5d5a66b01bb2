r"""The gradient of an integral whose integrand depends on its own parameters twice.

``UNAF`` integrates a positive network, :math:`f(x) = \int_0^x g_\phi(u, s)\,\mathrm du`. zuko's backward pass takes the
gradient of the integral with respect to :math:`(s, \phi)` as if the signal :math:`s` were free. Where :math:`s` has
itself been computed from :math:`\phi` (the signal of a later column of an inverse, or of any point drawn from the same
flow) the path through :math:`s` is then counted twice. Ordinary automatic differentiation of the quadrature counts it
once, and its derivative in :math:`x` is that of the sum that is evaluated.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Transform

from ._zuko import zuko

__all__ = ["with_ordinary_gradients"]

T = zuko.transforms


class OrdinaryIntegralTransform(T.UnconstrainedMonotonicTransform):
    """zuko's transform with the same values and a quadrature that is differentiated as it stands."""

    def f(self, x: Tensor) -> Tensor:
        return zuko.utils.GaussLegendre.quadrature(self.g, x.new_zeros(x.shape), x, self.n)


def with_ordinary_gradients(transform: Transform) -> Transform:
    """The same transformation with the integrals of its networks replaced by :class:`OrdinaryIntegralTransform`.

    Arguments:
        transform: a zuko transformation.

    Example:
        >>> import torch
        >>> t = zuko.flows.UNAF(2)().transform
        >>> x = torch.randn(3, 2)
        >>> torch.equal(with_ordinary_gradients(t)(x), t(x))
        True
    """
    match transform:
        case T.ComposedTransform():
            return T.ComposedTransform(*map(with_ordinary_gradients, transform.transforms))
        case T.AutoregressiveTransform():
            return T.AutoregressiveTransform(lambda x: with_ordinary_gradients(transform.meta(x)), transform.passes)
        case T.DependentTransform():
            return T.DependentTransform(with_ordinary_gradients(transform.base), transform.reinterpreted)
        case T.SOSPolynomialTransform():  # has its coefficients for only parameters
            return transform
        case T.UnconstrainedMonotonicTransform():
            return OrdinaryIntegralTransform(transform.g, transform.n, phi=transform.phi, bound=transform.bound)
        case _:
            return transform
