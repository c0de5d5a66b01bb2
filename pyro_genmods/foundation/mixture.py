r"""Mixtures of Gaussians, fitted to rows: a density and a sampler for whatever a population of particles looks like.

.. math:: b(x) = \sum_k w_k\, \mathcal N(x; m_k, C_k)

The parameters are those of maximum likelihood, by expectation and maximisation from centres far from each other, and
from wide and narrow halves of fewer components. The correlations of a component to which :math:`n_k` rows belong are
shrunk by :math:`n_k / (n_k + d)`, and a component that rests on hardly more rows than columns is dropped. How many
there are is decided by rows that were held out.

A density from which one anneals, or draws proposals, must be *wider* than what it was fitted to:
:meth:`Mixture.widened` lets each component grow, and adds a few that lie over all of it.

Mixtures come in batches, one for each of several sets of rows.

Reference:
    A. P. Dempster, N. M. Laird, D. B. Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977, JRSS B
    39(1). D. Arthur, S. Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, SODA.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mixture", "fit_mixture"]

ITERATIONS, TOLERANCE = 40, 2e-3  # of expectation and maximisation, nats
ROWS_PER_COLUMN = 10  # that a component needs
GAIN = 0.01  # nats on rows held out for which more components are taken
PATIENCE = 2  # doublings without gain
RIDGE = 1e-4  # added to variances of a component, relative to themselves
LEAST_VARIANCE = 1e-8  # relative to that of all rows
SPLIT = 1.5  # ratio of widths when a component is split
COVER = 0.1  # share of a component that lies over all rows, when a mixture is widened
WIDTHS = ((0.85, 1.05), (0.15, 3.0))  # shares and scales of each component then


class Mixture(NamedTuple):
    """Mixtures of Gaussians, a batch of them.

    Attributes:
        log_weights: ``(batch, components)``.
        means: ``(batch, components, dim)``.
        factors: lower triangles of covariances, ``(batch, components, dim, dim)``.
        inverses: of the factors.
        widths: shares and scales of the Gaussians of which each component is made: one, or several around one point.

    Example:
        >>> mixture = Mixture.of(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.eye(2)[None, None])
        >>> mixture.log_prob(torch.zeros(1, 3, 2)), mixture.sample(4).shape
        (tensor([[-1.8379, -1.8379, -1.8379]]), torch.Size([1, 4, 2]))
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor
    inverses: Tensor
    widths: tuple[tuple[float, float], ...] = ((1.0, 1.0),)

    @classmethod
    def of(cls, log_weights: Tensor, means: Tensor, covariances: Tensor) -> Mixture:
        """From covariances ``(batch, components, dim, dim)``."""
        factors = torch.linalg.cholesky(covariances)
        eye = torch.eye(means.shape[-1], dtype=means.dtype, device=means.device).expand_as(factors)
        return cls(log_weights, means, factors, torch.linalg.solve_triangular(factors, eye, upper=False))

    @property
    def components(self) -> int:
        """How many each mixture has."""
        return self.means.shape[1]

    def to(self, like: Tensor) -> Mixture:
        """With dtype and device of a tensor."""
        return Mixture(*(tensor.to(like) for tensor in self[:4]), self.widths)

    def log_parts(self, x: Tensor) -> Tensor:
        """Log densities of components, weighted, of rows ``(batch, n, dim)``: ``(batch, n, components)``."""
        batch, components, dim = self.means.shape
        matrix = self.inverses.permute(0, 3, 1, 2).reshape(batch, dim, components * dim)
        shift = (self.inverses @ self.means[..., None])[..., 0]
        square = ((x @ matrix).reshape(batch, -1, components, dim) - shift[:, None]).square().sum(-1)
        radial = [math.log(share / width**dim) - square / (2 * width**2) for share, width in self.widths]
        volume = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * dim * math.log(2 * math.pi)
        return (self.log_weights - volume)[:, None] + functools.reduce(torch.logaddexp, radial)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of rows ``(batch, n, dim)``, ``(batch, n)``."""
        return self.log_parts(x).logsumexp(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws ``(batch, n, dim)``."""
        batch, components, dim = self.means.shape
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        z = torch.empty(batch, n, dim, dtype=self.means.dtype, device=self.means.device).normal_(generator=generator)
        shares, widths = torch.tensor(self.widths, dtype=z.dtype, device=z.device).T
        z = z * widths[torch.multinomial(shares.expand(batch, -1), n, True, generator=generator)][..., None]
        x = z
        for k in range(components):
            x = torch.where((which == k)[..., None], self.means[:, k, None] + z @ self.factors[:, k].mT, x)
        return x

    def split(self) -> Mixture:
        """A wide and a narrow component for each: where a law is of many widths these part, and centres do not."""
        log_weights = self.log_weights.repeat(1, 2) - math.log(2)
        means = self.means.repeat(1, 2, 1)
        factors = torch.cat([self.factors / SPLIT, self.factors * SPLIT], 1)
        inverses = torch.cat([self.inverses * SPLIT, self.inverses / SPLIT], 1)
        return Mixture(log_weights, means, factors, inverses, self.widths)

    def widened(self, rows: Tensor) -> Mixture:
        """Wider than the rows ``(batch, n, dim)`` of which it was made, so that what they miss is not lost for good."""
        rows = rows.to(self.means)
        _, mean, pooled = _moments(rows, rows.new_ones(*rows.shape[:2], 1))
        log_weights = torch.cat([self.log_weights, torch.zeros_like(self.log_weights[:, :1])], 1)
        log_weights[:, :-1] += math.log(1 - COVER)
        log_weights[:, -1] = math.log(COVER)
        factors = torch.cat([self.factors, torch.linalg.cholesky(pooled)], 1)
        means = torch.cat([self.means, mean], 1)
        inverses = torch.linalg.solve_triangular(factors, torch.eye(rows.shape[-1]).to(factors), upper=False)
        return Mixture(log_weights, means, factors, inverses, WIDTHS)


def fit_mixture(
    rows: Tensor, most: int = 16, generator: torch.Generator | None = None, start: Mixture | None = None
) -> Mixture:
    """The mixture of up to so many components that explains held-out rows best, one for each set of rows.

    Arguments:
        rows: ``(batch, n, dim)``, in no order.
        most: components.
        generator: of the choice of centres.
        start: a mixture of rows much like these, from which to go on; only as many components and twice as many are
            tried besides.

    Returns:
        In float64.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(1, 2000, 2, generator=g) + 8 * torch.randint(0, 2, (1, 2000, 1), generator=g)
        >>> fit_mixture(x, generator=g).components
        2
    """
    rows = rows.double()
    n, dim = rows.shape[1:]
    held = n // 4
    order = torch.randperm(n, generator=generator, device=rows.device)
    train, test = rows[:, order[held:]], rows[:, order[:held]]
    best, score, without = None, -math.inf, 0
    components = 1 if start is None else start.components
    last = most if start is None else min(most, 2 * components)
    while components == 1 or (components <= last and n >= components * ROWS_PER_COLUMN * dim):
        begun = [_assigned(train, components, generator)]
        begun += [] if start is None else [start.log_parts(train).softmax(-1)]
        begun += [] if best is None else [best.split().log_parts(train).softmax(-1)]
        start, without = None, without + 1
        for mixture in (_fitted(train, share) for share in begun):
            found = float(mixture.log_prob(test).mean())
            if found > score + GAIN:
                best, score, without = mixture, found, 0
        if without == PATIENCE:
            break
        components *= 2
    return _fitted(rows, best.log_parts(rows).softmax(-1))


def _fitted(rows: Tensor, share: Tensor) -> Mixture:
    """By expectation and maximisation, from what share of each row belongs to which component."""
    dim, components = rows.shape[-1], share.shape[-1]
    variance, last = rows.var(1).clamp_min(1e-30), -math.inf
    for _ in range(ITERATIONS):
        count, means, covariances = _moments(rows, share)
        alive = count > dim + 1
        alive[:, 0] |= ~alive.any(1)
        widths = covariances.diagonal(dim1=-2, dim2=-1)
        extra = RIDGE * widths + LEAST_VARIANCE * variance[:, None]
        covariances = torch.where(
            alive[..., None, None], covariances + torch.diag_embed(extra), torch.diag_embed(variance)[:, None]
        )
        weights = torch.where(alive, count, 0.0)
        mixture = Mixture.of((weights / weights.sum(-1, keepdim=True)).log(), means, covariances)
        parts = mixture.log_parts(rows)
        total = parts.logsumexp(-1)
        if components == 1 or float(total.mean()) - last < TOLERANCE:
            break
        last, share = float(total.mean()), (parts - total[..., None]).exp()
    return mixture


def _assigned(rows: Tensor, components: int, generator: torch.Generator | None) -> Tensor:
    """Rows to the nearest of centres that were drawn far from each other, ``(batch, n, components)``."""
    y = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True).clamp_min(1e-30)
    pick = torch.randint(y.shape[1], (1,), generator=generator, device=y.device)
    centres = y[:, pick]
    for _ in range(components - 1):
        distance = torch.cdist(y, centres).square().amin(-1)
        pick = torch.multinomial(distance + 1e-12, 1, generator=generator)
        centres = torch.cat([centres, y.gather(1, pick[..., None].expand(-1, -1, y.shape[-1]))], 1)
    nearest = torch.cdist(y, centres).argmin(-1)
    return torch.nn.functional.one_hot(nearest, components).to(rows)


def _moments(rows: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and shrunk covariances of components, given what share of each row is theirs."""
    dim = rows.shape[-1]
    count = share.sum(1)
    divisor = count.clamp_min(1e-12)
    means = share.mT @ rows / divisor[..., None]
    products = []
    for k in range(share.shape[-1]):
        centred = rows - means[:, k, None]
        products.append((share[..., k, None] * centred).mT @ centred / divisor[:, k, None, None])
    covariances = torch.stack(products, 1)
    kept = (count / (count + dim))[..., None, None]
    spread = torch.diag_embed(covariances.diagonal(dim1=-2, dim2=-1))
    return count, means, kept * covariances + (1 - kept) * spread
