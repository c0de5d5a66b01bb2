r"""The Ising model on a torus: the energy on which every sampler of discrete laws is tried.

.. math:: E(s) = -\beta \sum_{\langle i j \rangle} s_i s_j - h \sum_i s_i, \qquad s = 2 x - 1 \in \{-1, 1\}^{L \times L}

Events are bits, :math:`x \in \{0, 1\}^{L \times L}`. Its constant is known (:mod:`pyro_genmods.shape.onsager`), and it
has a moment where everything is hard: at :math:`\beta_c = \tfrac12 \log(1 + \sqrt 2) = 0.4407` clusters of all sizes
appear, and below that temperature, without a field, there are two modes that no local move joins.

*Heat bath.* Given its four neighbours a spin is independent of all others, up with probability
:math:`\sigma(2 \beta \sum_{j \sim i} s_j + 2 h)`. So all sites of one colour are drawn at once, where no two of a
colour are neighbours: a checkerboard of two colours where :math:`L` is even, of three where it is odd. Without a field
the energy does not tell a lattice from its mirror image, and half of the lattices are turned over at every sweep, which
is a move between the two modes.

References:
    R. J. Glauber, Time-Dependent Statistics of the Ising Model, Journal of Mathematical Physics 4 (1963) 294-307.
    L. Onsager, Crystal Statistics. I, Physical Review 65 (1944) 117-149.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..foundation.annealing import Path
from ..foundation.bits import all_bits
from ..foundation.errors import DensityError, ShapeError
from ..foundation.gibbs import Sweeps, bernoulli
from ..foundation.moves import Tempered
from ..foundation.shapes import Context, Values
from .binary import BinaryEnergy
from .objectives import Objective
from .onsager import MOST_ROWS, kaufman, spin_sums, transfer
from .sampling import EnergySampler

__all__ = ["HeatBath", "Ising", "IsingMoments", "LatticeEnergy", "coloring"]

MOST_SUMMED = 8  # length up to which every density in a field sums its constant
MOST_LISTED = 4  # length up to which all lattices are listed


class IsingMoments(NamedTuple):
    """Exact averages for each site.

    Attributes:
        bonds: of the products of neighbours, of which each site has two: between -2 and 2.
        magnetization: of the spins.
        absolute_magnetization: of the absolute value of the mean spin; NaN for lattices that are not listed.
    """

    bonds: float
    magnetization: float
    absolute_magnetization: float


class LatticeEnergy(nn.Module):
    """Energies of lattices, rows ``(rows, L * L)`` of zeros and ones to ``(rows,)``.

    Arguments:
        length: :math:`L`.
        inverse_temperature, field: the two numbers.
        learnable: whether they are parameters: the logarithm of the first, and the second if it is not zero.

    Example:
        >>> LatticeEnergy(3, 0.5, 0.0, False)(torch.ones(1, 9))
        tensor([-9.])
    """

    def __init__(self, length: int, inverse_temperature: float, field: float, learnable: bool) -> None:
        super().__init__()
        self.length = length
        log, h = torch.tensor(math.log(inverse_temperature)), torch.tensor(float(field))
        self.log_inverse_temperature: Tensor
        self.field: Tensor
        for name, value, learned in (("log_inverse_temperature", log, learnable), ("field", h, learnable and field)):
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def inverse_temperature(self) -> Tensor:
        r""":math:`\beta`."""
        return self.log_inverse_temperature.exp()

    def forward(self, y: Tensor) -> Tensor:
        bonds, spins = spin_sums(y.reshape(-1, self.length, self.length))
        return -self.inverse_temperature * bonds - self.field * spins


class Ising(BinaryEnergy):
    r"""Spins on a periodic square lattice, as bits.

    Arguments:
        length: :math:`L`, of a side; at least 2. A lattice of two rows has each of its bonds twice.
        inverse_temperature: :math:`\beta`, positive.
        field: :math:`h`.
        learnable: whether the inverse temperature is a parameter, and the field where it is not zero: a field of zero
            is the symmetry of the model, and stays.
        objective: what ``loss`` is, see :class:`~pyro_genmods.shape.DiscreteEnergy`.
        sampler: likewise.
        normalized: whether the constant is part of the density; by default where it is known in closed form (without a
            field), or for a length of at most 8.

    Attributes:
        density: ``EXACT`` where it is normalised, else ``UNNORMALIZED``.
        network: the energy, with ``inverse_temperature`` and ``field``.

    Shape:
        events ``(length, length)``, zeros and ones.

    Raises:
        ShapeError: a length below 2.
        ValueError: an inverse temperature that is not positive, or a field that is not finite.
        DensityError: ``normalized`` is asked for where it is too long a sum.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> ising = gm.shape.Ising(3, 0.2)
        >>> ising().log_prob(torch.ones(3, 3)), ising.exact_log_normalizer()
        (tensor(-3.0697), tensor(6.6697))
        >>> round(ising.exact_moments().bonds, 4), ising().sample((2,)).shape
        (0.5381, torch.Size([2, 3, 3]))
    """

    def __init__(
        self,
        length: int,
        inverse_temperature: float,
        field: float = 0.0,
        learnable: bool = False,
        *,
        objective: str | Objective | None = None,
        sampler: str | EnergySampler | None = None,
        normalized: bool | None = None,
    ) -> None:
        if length < 2:
            raise ShapeError(f"length: got {length}, needs at least 2: a lattice of one site is its own neighbour.")
        if not 0 < inverse_temperature < math.inf or not math.isfinite(field):
            raise ValueError(
                f"inverse_temperature, field: got {inverse_temperature}, {field}; need a positive number, and a finite "
                "one. Neighbours that repel each other are an energy of their own: shape.DiscreteEnergy."
            )
        network = LatticeEnergy(length, inverse_temperature, field, learnable)
        summed = (field == 0 or length <= MOST_SUMMED) if normalized is None else normalized
        if summed and field and length > MOST_ROWS:
            raise DensityError(
                f"normalized: in a field the constant is summed up to length {MOST_ROWS}, got {length}; leave it out."
            )
        options = {"objective": objective, "sampler": sampler, "reference": "uniform", "normalized": summed}
        super().__init__((length, length), 0, network, **options)
        self.length, self.symmetric = length, field == 0
        self.register_buffer("colors", coloring(length), persistent=False)

    def log_normalizer_rows(self, c: Context | None = None) -> Values:
        beta, field = self.network.inverse_temperature, self.network.field
        return (kaufman(self.length, beta) if self.symmetric else transfer(self.length, beta, field))[None]

    def exact_moments(self) -> IsingMoments:
        """Averages for each site, from derivatives of the constant; absolute values where all lattices are listed.

        Raises:
            DensityError: there is a field, and the lattice is larger than 10.
        """
        sites, numbers = self.length**2, (self.network.inverse_temperature, self.network.field)
        beta, field = (number.detach().double().requires_grad_() for number in numbers)
        with torch.enable_grad():
            log_z = kaufman(self.length, beta) + 0 * field if self.symmetric else transfer(self.length, beta, field)
            bond, spin = torch.autograd.grad(log_z, (beta, field))
        absolute = math.nan
        if self.length <= MOST_LISTED:
            bonds, spins = spin_sums(all_bits(sites, beta.detach()).unflatten(1, (self.length, self.length)))
            masses = (beta.detach() * bonds + field.detach() * spins).softmax(0)
            absolute = float((masses * spins.abs()).sum()) / sites
        return IsingMoments(float(bond) / sites, float(spin) / sites, absolute)

    def moves(self, path: Path, q: Tensor, generator: torch.Generator, groups: int = 1) -> HeatBath:
        """Sweeps of the heat bath."""
        return HeatBath(self, path, q, generator, groups)


class HeatBath(Sweeps):
    r"""Sweeps in which every spin is drawn given its neighbours, colour by colour.

    Arguments:
        model: whose lattices they are.
        energy: the path from independent fair spins to it, on which :math:`\beta` and :math:`h` are multiplied by the
            inverse temperature.
        q: lattices ``(particles, L * L)``.
        generator, groups: see :class:`~pyro_genmods.foundation.moves.Moves`.

    Example:
        >>> ising = Ising(4, 0.3)
        >>> path, q, moves = ising.annealing(None, 1, 8, torch.Generator())
        >>> path.inverse_temperature = torch.ones(8)
        >>> moves.run(q, 5).shape
        torch.Size([8, 16])
    """

    def __init__(self, model: Ising, energy: Tempered, q: Tensor, generator: torch.Generator, groups: int = 1) -> None:
        super().__init__(energy, q, generator, groups)
        self.length, self.colors = model.length, model.colors
        self.beta, self.field = model.network.inverse_temperature.detach(), model.network.field.detach()
        self.symmetric = model.symmetric

    def take(self, q: Tensor) -> None:
        self._x = q.unflatten(1, (self.length, self.length))

    def sweep(self) -> tuple[Tensor, float]:
        x, tempered = self._x, self.energy.inverse_temperature[:, None, None]
        for color in range(int(self.colors.max()) + 1):
            s = 2 * x - 1
            neighbours = sum(s.roll(shift, dim) for shift in (1, -1) for dim in (-1, -2))
            logits = 2 * tempered * (self.beta * neighbours + self.field)
            x = torch.where(self.colors == color, bernoulli(logits, self.generator), x)
        if self.symmetric:
            turned = torch.empty_like(x[:, :1, :1]).uniform_(generator=self.generator) < 0.5
            x = torch.where(turned, 1 - x, x)
        self._x = x
        self.count(len(x))
        return x.flatten(1), 1.0


def coloring(length: int) -> Tensor:
    """Colours of the sites of a torus, ``(L, L)``, no two of which are neighbours: two, or three where ``L`` is odd.

    Example:
        >>> coloring(3)
        tensor([[0, 1, 2],
                [1, 2, 0],
                [2, 0, 1]])
    """
    around = torch.arange(length) % 2
    if length % 2:
        around[-1] = 2
    return (around[:, None] + around) % (3 if length % 2 else 2)
