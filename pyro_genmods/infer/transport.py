r"""Pieces of a transport that variational guides are assembled from.

* :class:`PushTransform` shows the push of a generative model to whoever wants a torch transform, as NeuTra does.
* :class:`GuideLaw` is a law as a guide's site wants it: drawn from :math:`q_\phi` and scored either by the same
  :math:`q_\phi`, with value and density computed together, or by :math:`q_{\bar\phi}` with :math:`\bar\phi` held
  constant. The second gives the path-wise gradient of the ELBO,

  .. math:: \nabla_\phi \, \mathrm{ELBO} = \mathbb E_z\!\left[ \nabla_x \bigl(\log p(x) - \log q_{\bar\phi}(x)\bigr)
            \frac{\partial x_\phi(z)}{\partial \phi} \right] ,

  unbiased like the ordinary one and without its score term, so that its variance vanishes at :math:`q = p`.

Reference:
    G. Roeder, Y. Wu, D. Duvenaud, Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
    Inference, 2017, arXiv:1703.09194.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, constraints

from ..contract import GenerativeDistribution

__all__ = ["GuideLaw", "PushTransform", "TriangularTransform", "transported"]


class PushTransform(Transform):
    """The push of a law over real vectors, with its inverse and log-determinant, as a ``torch`` transform.

    The log-determinant of the last value pushed is computed with it and kept by this object, so that
    ``log_abs_det_jacobian(z, transform(z))`` costs nothing more.

    Arguments:
        law: an unconditional law over ``(features,)`` with ``push`` and ``pull``.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, law: GenerativeDistribution) -> None:
        super().__init__()
        self.law = law
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def _call(self, z: Tensor) -> Tensor:
        x, log_prob = self.law.push_and_log_prob(z)
        self._last = (z, x, self.law.base.log_prob(z) - log_prob)
        return x

    def _inverse(self, x: Tensor) -> Tensor:
        return self.law.pull(x)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """Log of the absolute determinant of the Jacobian of the push, shape of the leading dimensions."""
        if self._last is None or self._last[0] is not z or self._last[1] is not x:
            return self.law.base.log_prob(z) - self.law.log_prob(x)
        return self._last[2]


class TriangularTransform(Transform):
    r"""The affine map :math:`y = m + L x` with a lower triangular :math:`L` of positive diagonal.

    Arguments:
        loc: :math:`m`, ``(features,)``.
        tril: :math:`L`, ``(features, features)``.

    Example:
        >>> t = TriangularTransform(torch.zeros(2), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
        >>> t(torch.ones(2)), t.inv(torch.tensor([2.0, 4.0]))
        (tensor([2., 4.]), tensor([1., 1.]))
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, tril: Tensor) -> None:
        super().__init__()
        self.loc, self.tril = loc, tril

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + x @ self.tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        shape = y.shape
        rows = (y - self.loc).reshape(-1, shape[-1])
        return torch.linalg.solve_triangular(self.tril, rows.mT, upper=False).mT.reshape(shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log diagonal, expanded to the leading dimensions."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


def transported(law: GenerativeDistribution, affine: TriangularTransform) -> TransformedDistribution:
    """The law of ``affine(x)`` for ``x`` of a law over real vectors."""
    return TransformedDistribution(law, [affine], validate_args=False)


class GuideLaw(TorchDistribution):
    """A law drawn from ``law`` and scored either together with its draw or by a constant copy of itself.

    Arguments:
        law: a law over real vectors, of the form :func:`transported` builds.
        scorer: the same law with constant parameters, for path-wise gradients; ``None`` scores each draw by ``law``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, law: TransformedDistribution, scorer: TransformedDistribution | None) -> None:
        self.law, self.scorer = law, scorer
        self._draw: tuple[Tensor, Tensor] | None = None
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> GuideLaw:
        """A new law over ``batch_shape`` copies."""
        scorer = None if self.scorer is None else self.scorer.expand(Size(batch_shape))
        return GuideLaw(self.law.expand(Size(batch_shape)), scorer)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        """Draw with pathwise gradients; without a scorer the density of the draw comes along."""
        if self.scorer is not None:
            return self.law.rsample(Size(sample_shape))
        x, log_prob = self.law.base_dist.rsample_and_log_prob(sample_shape)
        (affine,) = self.law.transforms
        y = affine(x)
        self._draw = (y, log_prob - affine.log_abs_det_jacobian(x, y))
        return y

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a draw of this object, or of any other value."""
        if self._draw is not None and self._draw[0] is value:
            return self._draw[1]
        return (self.scorer or self.law).log_prob(value)
