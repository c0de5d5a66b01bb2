r"""Pieces of a transport that variational guides are assembled from.

A guide's law is that of :math:`y = m + L\,\mathrm{push}_\phi(z)` for the push of a generative model.

* :class:`GuideTransform` is the map :math:`z \mapsto y` as a ``torch`` transform, as NeuTra wants it.
* :class:`GuideLaw` is the law of :math:`y` as a guide's site wants it. A draw brings its density along, computed once.
  For path-wise gradients the entropy term of the ELBO is scored by :math:`q_{\bar\phi}`, the same law with its
  parameters held constant:

  .. math:: \nabla_\phi \, \mathrm{ELBO} = \mathbb E_z\!\left[ \nabla_y \bigl(\log p(y) - \log q_{\bar\phi}(y)\bigr)
            \frac{\partial y_\phi(z)}{\partial \phi} \right] .

  This is unbiased like the ordinary gradient and lacks its score term, so that its variance vanishes at :math:`q = p`.
  Pyro's ELBOs read the entropy term from ``score_parts``; what reads ``log_prob`` (importance weights, Rényi bounds,
  wake-sleep) sees the full density with all its gradients.

Reference:
    G. Roeder, Y. Wu, D. Duvenaud, Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
    Inference, 2017, arXiv:1703.09194.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, constraints

from ..contract import GenerativeDistribution

__all__ = ["GuideLaw", "GuideTransform", "TriangularTransform", "transported"]


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

    def detach(self) -> TriangularTransform:
        """The same map as a constant."""
        return TriangularTransform(self.loc.detach(), self.tril.detach())

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + x @ self.tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        shape = y.shape
        rows = (y - self.loc).reshape(-1, shape[-1])
        return torch.linalg.solve_triangular(self.tril, rows.mT, upper=False).mT.reshape(shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log diagonal, expanded to the leading dimensions."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


class GuideTransform(Transform):
    """Noise to latents: the push of a law over real vectors, then an affine map.

    The log-determinant of the last value carried over is computed with it and kept by this object, so that
    ``log_abs_det_jacobian(z, transform(z))`` costs nothing more.

    Arguments:
        law: an unconditional law over ``(features,)`` with ``push`` and ``pull``.
        affine: the map that follows.

    Example:
        >>> import pyro_genmods as gm
        >>> affine = TriangularTransform(torch.ones(2), 2 * torch.eye(2))
        >>> transform = GuideTransform(gm.transform.guide_flow(2)(), affine)
        >>> z = torch.randn(5, 2)
        >>> torch.allclose(transform.inv(transform(z)), z, atol=1e-4)
        True
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, law: GenerativeDistribution, affine: TriangularTransform) -> None:
        super().__init__()
        self.law, self.affine = law, affine
        self._last: tuple[Tensor, Tensor, Tensor, bool] | None = None

    def _call(self, z: Tensor) -> Tensor:
        x, log_prob = self.law.push_and_log_prob(z)
        y = self.affine(x)
        volume = self.law.base.log_prob(z) - log_prob + self.affine.log_abs_det_jacobian(x, y)
        self._last = (z, y, volume, torch.is_grad_enabled())
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        return self.law.pull(self.affine.inv(y))

    def log_abs_det_jacobian(self, z: Tensor, y: Tensor) -> Tensor:
        """Log of the absolute determinant of the Jacobian, shape of the leading dimensions."""
        if self._last is not None:
            last_z, last_y, volume, with_graph = self._last
            if last_z is z and last_y is y and (with_graph or not torch.is_grad_enabled()):
                return volume
        x, log_prob = self.law.push_and_log_prob(z)
        return self.law.base.log_prob(z) - log_prob + self.affine.log_abs_det_jacobian(x, y)


def transported(law: GenerativeDistribution, affine: TriangularTransform) -> TransformedDistribution:
    """The law of ``affine(x)`` for ``x`` of a law over real vectors.

    Example:
        >>> import pyro_genmods as gm
        >>> affine = TriangularTransform(torch.ones(2), 2 * torch.eye(2))
        >>> transported(gm.transform.guide_flow(2)(), affine).log_prob(torch.zeros(2)).shape
        torch.Size([])
    """
    return TransformedDistribution(law, [affine], validate_args=False)


class GuideLaw(TorchDistribution):
    """The law of a guide's site: a draw and its density come together, path-wise gradients optionally.

    Arguments:
        law: a law over real vectors.
        affine: the map that follows.
        scorer: the same law with constant parameters, for path-wise gradients; ``None`` for ordinary ones.

    Example:
        >>> import pyro_genmods as gm
        >>> affine = TriangularTransform(torch.ones(2), 2 * torch.eye(2))
        >>> site = GuideLaw(gm.transform.guide_flow(2)(), affine)
        >>> x = site.rsample()
        >>> bool(site.log_prob(x) == site.score_parts(x).entropy_term)
        True
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, law: GenerativeDistribution, affine: TriangularTransform, scorer: TransformedDistribution | None = None
    ) -> None:
        self.law, self.affine, self.scorer = law, affine, scorer
        self._draw: tuple[Tensor, Tensor] | None = None
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> GuideLaw:
        """A new law over ``batch_shape`` copies."""
        scorer = None if self.scorer is None else self.scorer.expand(Size(batch_shape))
        return GuideLaw(self.law.expand(batch_shape), self.affine, scorer)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        """Draw with path-wise gradients; the density of the draw comes along if gradients are on."""
        x, log_prob = self.law.rsample_and_log_prob(sample_shape)
        y = self.affine(x)
        known = torch.is_grad_enabled()  # a density without graph would later pass for one with zero gradient
        self._draw = (y, log_prob - self.affine.log_abs_det_jacobian(x, y)) if known else None
        return y

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the last draw of this object, or of any other value."""
        if self._draw is not None and self._draw[0] is value:
            return self._draw[1]
        return transported(self.law, self.affine).log_prob(value)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """What Pyro's ELBOs differentiate; the entropy term is scored by the constant law if there is one."""
        if not self.has_rsample:
            return super().score_parts(x)
        log_prob = self.log_prob(x)
        return ScoreParts(log_prob, 0, log_prob if self.scorer is None else self.scorer.log_prob(x))
