r"""Distillation: a student network that does in one to four calls what a diffusion's solver does in many.

The probability flow of a diffusion is a map :math:`\Phi_{t \to s}` from white rows at one angle to rows at another. A
student learns it on few segments :math:`\pi/2 = s_0 > s_1 > \dots > s_K = \theta_0` of the angle,

.. math:: f(u, t) = u + (s - t)\, F_\phi(t, u), \qquad s = \text{the end of the segment of } t,

and is then a map of noise: a pushforward, without a density, for inference in noise space. Whatever the method, it
learns from solutions of the teacher's equation from fresh noise, never from data:

* ``"regression"``: :math:`f(u_t, t) \approx u_s` for the ends of segments of one solution. Noise decides all, so that
  nothing is averaged, and the limit is the teacher's own map;
* ``"consistency"``: :math:`f(u_t, t) \approx f_{\bar\phi}(u_{t'}, t')` for neighbours on one solution, where
  :math:`\bar\phi` are the weights at that moment, without a gradient, and :math:`f(u_s, s) = u_s`;
* ``"rectified"``: the velocity of the straight line from the noise to the end of its solution, at every place on that
  line, solved by as many steps of Euler. Where lines cross, it averages.

All minimise a pseudo-Huber distance, nearly absolute: what lies between two modes is rare, and squares would have it
smeared.

References:
    X. Liu, C. Gong, Q. Liu, Flow Straight and Fast, 2022, arXiv:2209.03003. Y. Song et al., Consistency Models, 2023,
    arXiv:2303.01469. T. Salimans, J. Ho, Progressive Distillation for Fast Sampling of Diffusion Models, 2022,
    arXiv:2202.00512. E. Luhman, T. Luhman, Knowledge Distillation in Iterative Generative Models, 2021,
    arXiv:2101.02388 (regression).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import pad

from ..contract import Cost, Density, GenerativeModel
from ..foundation.objectives import energy_score
from ..foundation.shapes import Context, Noise, Rows
from ..foundation.whitening import Whitening
from .certificate import Certificate
from .network import check_network

__all__ = ["Distilled"]


class Distilled(GenerativeModel):
    r"""A diffusion's student: a deterministic map of noise in one to four calls of a network; made by :func:`distill`.

    It has no density (``Density.IMPLICIT``). As a prior it works in noise space, by
    :class:`~pyro_genmods.infer.PushforwardReparam`, where inference is exact for *its* law; how near that is to the
    teacher's is in :attr:`certificate`. ``gm.fit`` goes on with data by the energy score, in the teacher's units.

    Arguments:
        network: called as ``network(t, u, c)`` with angles ``t``, white rows ``u`` and rows ``c`` of context.
        event_shape: shape of one event.
        angles: decreasing; ends of the segments.
        context_features: number of context features.
        support: where events live.
        told: whether contexts have a column that says that they are there.

    Shape:
        noise ``(features,)``, events ``event_shape``, contexts ``(context_features,)``.

    Example:
        >>> import math, torch, pyro_genmods as gm
        >>> from pyro_genmods.evolve.distilled import Distilled
        >>> student = Distilled(gm.Diffusion(2).network, (2,), (math.pi / 2, 0.001))
        >>> student().density.name, student().push(torch.zeros(5, 2)).shape, student.cost.sample
        ('IMPLICIT', torch.Size([5, 2]), 1)
    """

    density = Density.IMPLICIT
    loss_unit: ClassVar[str] = "sd"
    DRAWS: ClassVar[dict[bool, int]] = {True: 2, False: 8}

    def __init__(
        self,
        network: nn.Module,
        event_shape: tuple[int, ...],
        angles: tuple[float, ...],
        context_features: int = 0,
        support: constraints.Constraint | None = None,
        *,
        told: bool = False,
    ) -> None:
        super().__init__(event_shape, (context_features,) if context_features else (), support or constraints.real)
        if len(angles) < 2 or any(before <= after for before, after in pairwise(angles)):
            raise ValueError(f"angles: got {angles}, needs at least two, decreasing.")
        check_network(network, self.features, context_features + told, self.features)
        self.network, self.told = network, told
        self.whitening = Whitening(self.features)
        self.bottom = angles[-1]
        self.register_buffer("angles", torch.tensor(angles, dtype=torch.float64).to(self.place[0]))
        self._certificate: tuple | None = None

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Calls of the network for a draw."""
        return len(self.angles) - 1

    @property
    def cost(self) -> Cost:
        """Calls of the network for a draw."""
        return Cost(sample=self.steps, score=None)

    @property
    def certificate(self) -> Certificate | None:
        """What was measured after distillation; ``None`` where that was not asked for, or was before a ``fit``."""
        return None if self._certificate is None else Certificate.from_tuple(self._certificate)

    @certificate.setter
    def certificate(self, certificate: Certificate | None) -> None:
        self._certificate = None if certificate is None else certificate.to_tuple()

    # -- row functions -------------------------------------------------------------------------------------------

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        u, c = z, self._told(c)
        for t, s in pairwise(self.angles.unbind()):
            u = self.along(t, s, u, c)
        return self.whitening.inverse(u / math.cos(self.bottom))

    def along(self, t: Tensor, s: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        """White rows at angles ``t``, ``()`` or ``(rows, 1)``, carried to angles ``s`` by one call."""
        return u + (s - t) * self.velocity(t, u, c)

    def velocity(self, t: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
        """What the network says: the mean velocity of the rest of the segment."""
        return self.network(t if getattr(self.network, "one_time", False) else t.expand(len(u), 1), u, c)

    def _told(self, c: Tensor | None) -> Tensor | None:
        return pad(c, (0, 1), value=1.0) if c is not None and self.told else c

    # -- learning from data --------------------------------------------------------------------------------------

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Energy score of examples in white units, which needs draws alone; two of them in training and eight else."""
        y, c = self.rows(x, context)
        draws = self.DRAWS[self.training]
        made = self.push_rows(self._noise(draws * len(y)), None if c is None else c.repeat(draws, 1))
        return energy_score(self.whitening(y), self.whitening(made).unflatten(0, (draws, len(y))))

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Keep the teacher's units, in which the student was taught."""

    def after_fit(self, x: Tensor, context: Tensor | None = None) -> None:
        """Forget the certificate: it was another student's."""
        self.certificate = None
