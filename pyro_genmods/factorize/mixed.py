r"""Columns of different kinds: a head for each column of a table.

A row of a survey has ages, answers and incomes, and its autoregressive density has a law for each,

.. math:: p(x_t \mid x_{<t}) = p^{(t)}_{\theta_t}(x_t), \qquad t = 1, \dots, T.

:class:`Mixed` is one head for the whole row: its methods take the columns as the last dimension of the values, before
that of the parameters. Columns with equal heads are computed together, as one batch, however many they are; parameters
and embeddings have the size of the largest head, of which a smaller one uses the first part.

Reference:
    B. Uria, I. Murray, H. Larochelle, RNADE: The real-valued neural autoregressive density-estimator, 2013,
    arXiv:1306.0186.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

from ..foundation.errors import DensityError, ShapeError
from .conditionals import Conditional
from .sequences import Columns

__all__ = ["Mixed"]

Run = tuple[int, int]


@dataclass(frozen=True)
class Mixed(Conditional):
    """One head for each column.

    Arguments:
        conditionals: the heads, one for each column, none of them ``Mixed``.

    Shape:
        values ``(..., T)`` as floating point numbers, discrete columns included; parameters ``(..., T, size)``;
        embeddings ``(..., T, inputs)``, with zeros where a head needs less.

    Raises:
        ValueError: no heads.
        TypeError: an entry is not a head for one column.
        ShapeError: values or parameters have another number of columns.
        DensityError: ``log_probs`` with a continuous column, ``normal_score`` with a discrete one.

    Example:
        >>> from pyro_genmods.factorize.conditionals import Bernoulli
        >>> from pyro_genmods.factorize.mixtures import GaussianMixture
        >>> head = Mixed((GaussianMixture(2), Bernoulli(), GaussianMixture(2)))
        >>> head.size, head.inputs, head.discrete_columns
        (6, 1, (1,))
        >>> x = head.sample(torch.zeros(5, 3, 6))
        >>> head.log_prob(torch.zeros(5, 3, 6), x).shape, bool(head.support.check(x).all())
        (torch.Size([5, 3]), True)
    """

    conditionals: Sequence[Conditional]

    def __post_init__(self) -> None:
        if not self.conditionals:
            raise ValueError("conditionals: got none, needs one head for each column.")
        for t, head in enumerate(self.conditionals):
            if not isinstance(head, Conditional) or isinstance(head, Mixed):
                raise TypeError(f"conditionals[{t}]: got {head!r}, needs a head of one column, e.g. Bernoulli().")
        object.__setattr__(self, "conditionals", tuple(self.conditionals))

    def head_of(self, column: int) -> Conditional:
        return self.conditionals[column]

    @property
    def discrete(self) -> bool:
        """Whether any column is discrete."""
        return bool(self.discrete_columns)

    @property
    def discrete_columns(self) -> tuple[int, ...]:
        """Numbers of the columns that are discrete."""
        return tuple(t for t, head in enumerate(self.conditionals) if head.discrete)

    @property
    def size(self) -> int:
        return max(head.size for head in self.conditionals)

    @property
    def inputs(self) -> int:
        return max(head.inputs for head in self.conditionals)

    @property
    def levels(self) -> int | None:
        """Largest number of values of a column, if all are discrete."""
        levels = [head.levels for head in self.conditionals]
        return None if None in levels else max(levels)

    @property
    def support(self) -> constraints.Constraint:
        """Joint support of a row, the last dimension of the values."""
        return Columns(tuple(head.support for head in self.conditionals))

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        return self._gather(lambda head, p, x: head.log_prob(p, x), parameters, x)[0]

    def log_cdf(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._gather(lambda head, p, x: head.log_cdf(p, x), parameters, x)
        return lower, upper

    def cdf(self, parameters: Tensor, x: Tensor) -> Tensor:
        return self._gather(lambda head, p, x: head.cdf(p, x), parameters, x)[0]

    def quantile(self, parameters: Tensor, z: Tensor) -> Tensor:
        return self._gather(lambda head, p, z: head.quantile(p, z).to(z.dtype), parameters, z)[0]

    def normal_score(self, parameters: Tensor, x: Tensor) -> Tensor:
        if self.discrete:
            raise DensityError(
                f"normal_score: columns {self.discrete_columns} are discrete, their distribution functions are "
                "staircases; use pit with uniform noise, or head_of(t) of the other columns."
            )
        return self._gather(lambda head, p, x: head.normal_score(p, x), parameters, x)[0]

    def pit(self, parameters: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return self._gather(lambda head, p, x, v: head.pit(p, x, v), parameters, x, v)[0]

    def log_probs(self, parameters: Tensor) -> Tensor:
        """Log probabilities ``(..., T, levels)``, minus infinity beyond the levels of a column."""
        levels = self.levels
        if levels is None:
            raise DensityError("log_probs: some columns are continuous, their values cannot be listed; use log_prob.")

        def listed(head: Conditional, p: Tensor) -> Tensor:
            return pad(head.log_probs(p), (0, levels - head.levels), value=-torch.inf)

        return self._gather(listed, parameters, trailing=1)[0]

    def embed(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        def embedded(head: Conditional, _: None, x: Tensor) -> Tensor:
            return pad(head.embed(x, dtype), (0, self.inputs - head.inputs))

        return self._gather(embedded, None, x, trailing=1)[0]

    def tempered(self, parameters: Tensor, temperature: float) -> Tensor:
        def cooled(head: Conditional, p: Tensor) -> Tensor:
            return pad(head.tempered(p, temperature), (0, self.size - head.size))

        return self._gather(cooled, parameters, trailing=1)[0]

    def start(self) -> tuple[tuple[float, ...], ...]:
        """A row of ``size`` numbers for each column."""
        return tuple((*head.start(), *[0.0] * (self.size - head.size)) for head in self.conditionals)

    def _groups(self) -> Iterator[tuple[Conditional, list[Run]]]:
        """Every different head with the runs of neighbouring columns, from where to where, that have it."""
        runs: dict[Conditional, list[Run]] = {}
        for t, head in enumerate(self.conditionals):
            mine = runs.setdefault(head, [])
            if mine and mine[-1][1] == t:
                mine[-1] = (mine[-1][0], t + 1)
            else:
                mine.append((t, t + 1))
        yield from runs.items()

    def _gather(
        self, method: Callable[..., Any], parameters: Tensor | None, *values: Tensor, trailing: int = 0
    ) -> list[Tensor]:
        """Apply a method to the columns of every group together, and put its results back in their order.

        Columns are cut out as runs of neighbours, which needs no index tensor on any device.
        """
        self._check(parameters, values)
        pieces: dict[int, list[Tensor]] = {}
        for head, runs in self._groups():
            p = None if parameters is None else _cut(parameters, runs, -2)[..., : head.size]
            result = method(head, p, *[_cut(x, runs, -1) for x in values])
            results = result if isinstance(result, tuple) else (result,)
            parts = [r.split([b - a for a, b in runs], -1 - trailing) for r in results]
            for i, (a, _) in enumerate(runs):
                pieces[a] = [part[i] for part in parts]
        return [_join(list(part), -1 - trailing) for part in zip(*(pieces[a] for a in sorted(pieces)), strict=True)]

    def _check(self, parameters: Tensor | None, values: tuple[Tensor, ...]) -> None:
        """Refuse tensors with another number of columns."""
        columns = len(self.conditionals)
        if parameters is not None and (parameters.dim() < 2 or parameters.shape[-2:] != (columns, self.size)):
            raise ShapeError(f"parameters: got {tuple(parameters.shape)}, needs (..., {columns}, {self.size}).")
        for value in values:
            if value.dim() < 1 or value.shape[-1] != columns:
                raise ShapeError(f"x: got {tuple(value.shape)}, needs (..., {columns}), one value for each column.")


def _cut(x: Tensor, runs: list[Run], dim: int) -> Tensor:
    """The columns of some runs."""
    return _join([x.narrow(dim, a, b - a) for a, b in runs], dim)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenation, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
