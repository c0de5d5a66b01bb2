r"""Pushforwards: any generator network as a distribution, with a density only where there is one.

A generator :math:`G: \mathbb R^k \to \mathbb R^D` carries noise to data,

.. math:: z \sim \mathcal N(0, I_k), \qquad x = G(z, c) .

What it makes has a density

* with respect to volume, if :math:`k = D` and :math:`G` is invertible;
* with respect to surface on the :math:`k`-dimensional manifold :math:`G(\mathbb R^k)`, if :math:`k < D` and :math:`G`
  is injective, by the area formula

  .. math:: \log p(x) = \log \mathcal N(z; 0, I) - \tfrac12 \log \det J^\top J, \qquad
            G(z) = x, \quad J = \frac{\partial G}{\partial z};

* not at all, if :math:`k > D`, or if several :math:`z` make one :math:`x`: then its law has a density that is a sum or
  an integral over preimages, and nobody can evaluate it.

Inference needs none of this: :class:`pyro_genmods.infer.PushforwardReparam` runs in noise space. So a pushforward is
implicit unless its user says that it is injective (``density="manifold"``), which is then checked value by value.

References:
    A. L. Caterini, G. Loaiza-Ganem, G. Pleiss, J. P. Cunningham, Rectangular Flows for Manifold Learning, 2021,
    arXiv:2106.01413. T. Gneiting, A. E. Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, Journal of
    the American Statistical Association 102 (2007) 359-378.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..contract import Cost, Density, GenerativeModel
from ..coordinates import event_shape_on
from ..foundation.errors import ShapeError
from ..foundation.networks import place_of
from ..foundation.numerics import normal_log_prob
from ..foundation.objectives import energy_score
from ..foundation.shapes import Context, Noise, Rows, Values
from .preimage import log_gram, preimage, value_and_jacobian

__all__ = ["Pushforward"]


class Pushforward(GenerativeModel):
    r"""The law of a generator's output: a sampler that works as a prior with nothing else.

    ``gm.fit`` trains any generator by the energy score, a strictly proper scoring rule that needs draws alone; a
    generator that was trained elsewhere is used as it is. With ``density="manifold"`` the law has ``log_prob`` and
    ``pull``, each by a least squares solution per value; a value that is not in the image of the generator has
    ``log_prob`` :math:`-\infty` and a ``pull`` of NaN, and so have almost all measured values if :math:`k < D`.

    Arguments:
        generator: called as ``generator(z)``, or ``generator(z, c)`` with a context; rows in, rows out. A row must not
            depend on the other rows of a batch (batch normalisation in training mode).
        latent_features: :math:`k`, columns of noise that the generator takes.
        context_features: number of context features.
        support: where events live; the generator then makes the unconstrained coordinates.
        event_shape: shape of one event; default that of the generator's output, or what the support makes of it.
        density: ``"manifold"`` if the generator is injective, with :math:`k \le D`; ``None`` for an implicit law.

    Shape:
        noise ``(latent_features,)``, events ``event_shape``, contexts ``(context_features,)``; log densities in nats
        per event, with respect to volume where :math:`k = D` and to surface in the user's units where :math:`k < D`.

    Raises:
        ShapeError: the generator does not take that noise or context, returns other than one finite row for each, or
            does not fit the event shape; or a density was asked for with more noise than coordinates.
        TypeError: the generator is not an ``nn.Module``.
        ValueError: another ``density``.
        DensityError: at ``log_prob`` or ``push_and_log_prob``, a singular generator; without ``density``, always.
        InverseError: at ``log_prob`` or ``pull``, a value with several preimages.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> generator = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.SiLU(), torch.nn.Linear(16, 5))
        >>> law = gm.transform.Pushforward(generator, latent_features=2)()
        >>> law.event_shape, law.base.event_shape, law.density.name
        (torch.Size([5]), torch.Size([2]), 'IMPLICIT')
        >>> line = gm.transform.Pushforward(torch.nn.Linear(1, 2), latent_features=1, density="manifold")()
        >>> x, log_prob = line.rsample_and_log_prob((3,))
        >>> torch.allclose(line.log_prob(x), log_prob, atol=1e-4), line.log_prob(x + torch.tensor([1.0, 0.0])).exp()
        (True, tensor([0., 0., 0.], grad_fn=<ExpBackward0>))
    """

    density: Density = Density.IMPLICIT
    loss_unit: ClassVar[str] = "sd"
    DRAWS: ClassVar[dict[bool, int]] = {True: 2, False: 8}
    STARTS: ClassVar[int] = 3

    def __init__(
        self,
        generator: nn.Module,
        latent_features: int,
        context_features: int = 0,
        support: constraints.Constraint | None = None,
        event_shape: tuple[int, ...] | None = None,
        density: Literal["manifold"] | None = None,
    ) -> None:
        if not isinstance(generator, nn.Module):
            raise TypeError(f"generator: got {type(generator).__name__}, needs an nn.Module that maps noise to rows.")
        if density not in (None, "manifold"):
            raise ValueError(f"density: got {density!r}, needs 'manifold', or None for a law without a density.")
        if latent_features < 1:
            raise ShapeError(f"latent_features: got {latent_features}, needs at least 1 column of noise.")
        made = _probe(generator, latent_features, context_features)
        support = support or constraints.real
        shape = Size(event_shape) if event_shape is not None else event_shape_on(support, made)
        super().__init__(shape, (context_features,) if context_features else (), support)
        if self.features != made.numel():
            raise ShapeError(
                f"event_shape {tuple(shape)} on {support} has {self.features} coordinates, the generator makes "
                f"{made.numel()}."
            )
        if density is not None and latent_features > self.features:
            raise ShapeError(
                f"latent_features: got {latent_features} for {self.features} coordinates; with more noise than "
                "coordinates many z make one x, and there is no density. Use density=None and "
                "infer.PushforwardReparam()."
            )
        self.to(*reversed(place_of(generator)))
        self.generator = generator
        self.latent_features = latent_features
        self.density = Density.IMPLICIT if density is None else Density.EXACT
        self.register_buffer("starts", _starts(self.STARTS, latent_features).to(*reversed(self.place)), False)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def cost(self) -> Cost:
        return Cost(sample=1, score=None)

    @property
    def noise_shape(self) -> Size:
        return Size([self.latent_features])

    # -- row functions -------------------------------------------------------------------------------------------

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        return (self.generator(z) if c is None else self.generator(z, c)).flatten(1)

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        if self.density is Density.IMPLICIT:
            return super().pull_rows(y, c)
        return preimage(lambda z, copies: self.push_rows(z, None if c is None else c.repeat(copies, 1)), y, self.starts)

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        if self.density is Density.IMPLICIT:
            return super().log_prob_rows(y, c)
        z = self.pull_rows(y, c)
        missing = z.isnan().any(-1)
        _, log_prob = self.push_and_log_prob_rows(torch.where(missing[:, None], 0.0, z), c)
        return log_prob.masked_fill(missing, -math.inf)

    def push_and_log_prob_rows(self, z: Noise, c: Context | None) -> tuple[Rows, Values]:
        if self.density is Density.IMPLICIT:
            return super().push_and_log_prob_rows(z, c)
        base = normal_log_prob(z)
        if self.latent_features == self.features:
            y, jacobian = value_and_jacobian(lambda z: self.push_rows(z, c), z)
            return y, base - log_gram(jacobian)
        # The surface is measured in the user's units, where the law's caller takes off the volume of all coordinates.
        y = self.push_rows(z, c)
        _, jacobian = value_and_jacobian(lambda z: self.coordinates.push(self.push_rows(z, c))[0].flatten(1), z)
        return y, base - log_gram(jacobian) + self.coordinates.push(y)[1]

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""The energy score of each example in standardised coordinates, from two draws in training and eight else.

        .. math:: \ell(x) = \mathbb E\,|X - x| - \tfrac12\, \mathbb E\,|X - X'|

        Arguments:
            x: ``(batch, *event_shape)``, in the user's units.
            context: ``(batch, *context_shape)`` or ``None``.

        Returns:
            ``(batch,)``, in standard deviations of the coordinates.
        """
        y, c = self.rows(x, context)
        return energy_score(y, self._draws(len(y), c))

    def _draws(self, rows: int, c: Tensor | None) -> Tensor:
        """Independent draws for each row, ``(draws, rows, features)``."""
        draws = self.DRAWS[self.training]
        y = self.push_rows(self._noise(draws * rows), None if c is None else c.repeat(draws, 1))
        return y.unflatten(0, (draws, rows))


def _probe(generator: nn.Module, latent_features: int, context_features: int) -> Size:
    """Shape of one output of the generator, learned from two rows of zeros; its buffers stay as they are."""
    dtype, device = place_of(generator)
    widths = [latent_features, *([context_features] if context_features else [])]
    inputs = [torch.zeros(2, width, dtype=dtype, device=device) for width in widths]
    call = f"{type(generator).__name__}({', '.join(str(tuple(x.shape)) for x in inputs)})"
    modes = {module: module.training for module in generator.modules()}
    try:
        with torch.no_grad():
            made = generator.eval()(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ShapeError(
            f"latent_features={latent_features}, context_features={context_features}: the call {call} fails "
            f"({str(error).splitlines()[0]}); give the numbers of columns that the generator takes, as generator(z) or "
            "generator(z, c)."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(made, Tensor) or made.dim() < 2 or len(made) != 2 or made.shape[1:].numel() == 0:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ShapeError(f"generator: {call} returned {got}, needs one row of coordinates for each row of noise.")
    if not bool(made.isfinite().all()):
        raise ShapeError(f"generator: {call} returned NaN or infinite values; initialise or load its weights first.")
    return made.shape[1:]


def _starts(count: int, features: int) -> Tensor:
    """Where to look for preimages: the centre, and fixed draws of the noise."""
    draws = torch.randn(count - 1, features, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.zeros(1, features), draws])
