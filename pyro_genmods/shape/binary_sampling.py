r"""Draws of a binary energy's law.

* :class:`Enumerated`: exact and independent, from the list of all events, where it is short.
* :class:`AnnealedGibbs`: members of a population that went from the reference to the law by tempered sequential Monte
  Carlo, so that modes get their weights, which no chain that moves bit by bit would give them.
* :class:`GibbsChains`: a chain for each draw, from the replay buffer or the reference on; cheap where there is one
  mode, or where the buffer is in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..foundation.annealing import anneal
from ..foundation.bits import all_bits
from ..foundation.errors import DensityError
from ..foundation.shapes import Context, Rows
from .sampling import Annealed, EnergySampler, new_generator

__all__ = ["BINARY_SAMPLERS", "AnnealedGibbs", "Enumerated", "GibbsChains"]

MOST_LISTED = 16  # bits
PART = 2**18  # events listed at once, of all contexts


@dataclass(frozen=True)
class Enumerated(EnergySampler):
    """Draws from the list of all events, at most 65536.

    Raises:
        DensityError: at ``draw``, where there are more.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.shape.DiscreteEnergy(2, network=lambda y: -50 * y[:, 0])
        >>> Enumerated().draw(model, 4, None)[:, 0]
        tensor([1., 1., 1., 1.])
    """

    def draw(self, model: Any, rows: int, c: Context | None) -> Rows:
        if model.features > MOST_LISTED:
            raise DensityError(
                f"sampler: {model.features} bits have more than 2^{MOST_LISTED} events, too many to list; take "
                "sampler='annealed' or 'gibbs'."
            )
        with torch.no_grad():
            events = all_bits(model.features, model.reference.logits)
            if c is None:
                return events[_choose(model.log_masses_rows(events, None), rows)[0]]
            contexts, which = torch.unique(c, dim=0, return_inverse=True)
            part = max(1, PART // len(events))
            masses = torch.cat([model.log_masses_rows(events, chunk) for chunk in contexts.split(part)])
            return events[torch.cat([_choose(masses[chunk], 1)[:, 0] for chunk in which.split(part)])]


def _choose(log_masses: Tensor, number: int) -> Tensor:
    """Numbers of events with these masses, ``(contexts, number)``."""
    return torch.multinomial(log_masses.double().softmax(-1), number, replacement=True)


@dataclass(frozen=True)
class AnnealedGibbs(Annealed):
    """Members of a population that went from the reference to the law; arguments are those of :class:`Annealed`.

    Raises:
        ValueError: fewer than 8 particles.
        SamplingError: at ``draw``, where the energy is not finite.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.shape.DiscreteEnergy(20, network=lambda y: -y.sum(-1))
        >>> _ = torch.manual_seed(0)
        >>> round(float(AnnealedGibbs().draw(model, 500, None).mean()), 2)                # e / (1 + e) = 0.73
        0.73
    """

    def _populations(self, model: Any, n: int, contexts: Tensor | None) -> Tensor:
        groups = 1 if contexts is None else len(contexts)
        path, q, moves = model.annealing(contexts, groups, n, new_generator(model.place[1]))
        options = {"target_ess": self.target_ess, "num_moves": self.num_moves, "max_moves": self.max_moves}
        arrived = anneal(path, q, moves, **options).position
        return arrived[:, : model.features].unflatten(0, (groups, n))


@dataclass(frozen=True)
class GibbsChains(EnergySampler):
    """A chain for each draw.

    Arguments:
        sweeps: of each chain.
        start: from the replay buffer, where the model has one that is filled, or from the reference.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.shape.DiscreteEnergy(20, network=lambda y: -y.sum(-1))
        >>> _ = torch.manual_seed(0)
        >>> round(float(GibbsChains(20).draw(model, 500, None).mean()), 1)
        0.7
    """

    sweeps: int = 100
    start: Literal["buffer", "reference"] = "buffer"

    def __post_init__(self) -> None:
        if self.sweeps < 1 or self.start not in ("buffer", "reference"):
            raise ValueError(
                f"sweeps, start: got {self.sweeps}, {self.start!r}; need at least 1, and 'buffer' or 'reference'."
            )

    def draw(self, model: Any, rows: int, c: Context | None) -> Rows:
        buffer = getattr(model, "negatives", None)
        if self.start == "buffer" and c is None and buffer is not None and buffer.size and int(buffer.filled):
            y = buffer.positions[torch.randint(buffer.size, (rows,), device=buffer.positions.device)]
        else:
            y = model.reference_rows(rows)
        return model.chain_rows(y, c, self.sweeps)


BINARY_SAMPLERS: dict[str, type[EnergySampler]] = {
    "exact": Enumerated,
    "annealed": AnnealedGibbs,
    "gibbs": GibbsChains,
}
