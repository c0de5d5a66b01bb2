r"""Energies of binary events: what all of them share.

.. math:: p_\phi(x \mid c) = \frac{1}{Z_\phi(c)}\, e^{-E_\phi(x, c)}, \qquad x \in \{0, 1\}^n, \qquad
          Z_\phi(c) = \sum_{x \in \{0, 1\}^n} e^{-E_\phi(x, c)}

There is no base to be tilted, as the space is bounded and every energy proper. A *reference*, independent bits with the
frequencies of the data or fair ones, is where annealing starts,

.. math:: U_\beta(x) = -(1 - \beta) \log b(x) + \beta\, E(x) ,

and as it is normalised, :math:`\log Z` is the logarithm of the ratio that annealing estimates.

The constant is known exactly where it is a short sum, or a closed form. Then ``log_prob`` contains it, it follows the
parameters and the context, and the law may learn and be inferred like any other; without it the rules of
:mod:`pyro_genmods.shape.energy` hold. A law of at most twelve bits is drawn exactly, and lists its events, so that Pyro
can sum it out as a latent site: without a constant too, as it cancels where parameters and context are fixed, and where
they are not ``log_prob`` refuses.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call

from ..contract import Cost
from ..foundation.annealing import Path
from ..foundation.bits import MOST_BITS, log_sum_over_bits
from ..foundation.errors import DensityError
from ..foundation.gibbs import Sweeps, bernoulli
from ..foundation.shapes import Context, Noise, Rows, Values
from .binary_law import BinaryDistribution
from .binary_objectives import BINARY_OBJECTIVES
from .binary_sampling import BINARY_SAMPLERS, Enumerated
from .normalizer import Normalizer
from .sampling import new_generator
from .unnormalized import UnnormalizedModel, named

__all__ = ["BinaryEnergy", "IndependentBits"]

MOST_SUMMED = 16  # bits of which every density sums all events
PART = 2**16  # events of one call, of all contexts


class IndependentBits(nn.Module):
    """Bits that know nothing of each other: fair ones, until there are data.

    Arguments:
        features: number of bits.

    Example:
        >>> bits = IndependentBits(2)
        >>> bits(torch.zeros(1, 2)).exp()
        tensor([0.2500])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("logits", torch.zeros(features))

    def fit_(self, y: Rows) -> None:
        """Take the frequencies of rows, with one success and one failure more, so that nothing is impossible."""
        self.logits.copy_(((y.sum(0) + 1) / (len(y) + 2)).logit())

    def forward(self, y: Rows) -> Values:
        """Log probabilities of rows."""
        return (y * self.logits - nn.functional.softplus(self.logits)).sum(-1)

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draws ``(rows, features)``."""
        return bernoulli(self.logits.expand(rows, -1), generator)


class BinaryEnergy(UnnormalizedModel):
    r"""A law of binary events by its energy; the discrete energies of this room derive from it.

    Subclasses say how bits are moved (:meth:`moves`), and how the constant is summed (:meth:`log_normalizer_rows`)
    where there is a shorter way than over all events.

    Arguments:
        event_shape: shape of an event.
        context_features: number of context features.
        network: :math:`E`, rows of zeros and ones, and of context if there is any, to one number each.
        options: ``objective``, ``sampler``, ``reference``, ``normalized``, ``learn``, ``allow_unnormalized``; see
            :class:`~pyro_genmods.shape.DiscreteEnergy`.

    Attributes:
        continuous: whether gradients move an event; they do not.
        log_base_normalizer: of the law from which annealing starts; zero, as it is normalised.
    """

    has_rsample = False
    continuous: ClassVar[bool] = False
    base: ClassVar[None] = None
    log_base_normalizer: ClassVar[float] = 0.0
    summing_calls: ClassVar[int] = 0  # of the network, for the constant

    def __init__(self, event_shape: tuple[int, ...], context_features: int, network: nn.Module, **options: Any) -> None:
        context_shape = (context_features,) if context_features else ()
        super().__init__(event_shape, context_shape, constraints.boolean, native=True)
        self.network = network
        self.allow_unnormalized = options.get("allow_unnormalized", False)
        self.fitted = _reference(options.get("reference", "fitted"))
        self.reference = IndependentBits(self.features)
        self.normalized: bool = options.get("normalized", False)
        self.normalizer = Normalizer(self.log_normalizer_rows if self.normalized else None)
        objective = options.get("objective") or ("likelihood" if self.normalized else "contrastive")
        sampler = options.get("sampler") or ("exact" if self.enumerable else "annealed")
        self.take_records(
            named("objective", objective, BINARY_OBJECTIVES),
            named("sampler", sampler, BINARY_SAMPLERS),
            options.get("learn"),
        )

    def forward(self, context: Tensor | None = None) -> BinaryDistribution:
        """The law at a context, see :meth:`pyro_genmods.GenerativeModel.forward`."""
        return BinaryDistribution(self, context)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def takes_any_dtype(self) -> bool:
        return True

    @property
    def enumerable(self) -> bool:
        """Whether events are listed."""
        return self.features <= BinaryDistribution.ENUMERABLE

    @property
    def cost(self) -> Cost:
        """One call to draw from the list of all events, else chains; one to score, and one for a sum over events."""
        summed = self.summing_calls if self.normalized else 0
        return Cost(sample=1 if isinstance(self.sampler, Enumerated) else None, score=1 + summed)

    # -- learning ------------------------------------------------------------------------------------------------

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Learn the units of the context, and the frequencies of the reference; bits have no units."""
        if self.context_standardization is not None and context is not None:
            self.context_standardization.fit_(context.reshape(len(context), -1))
        if self.fitted:
            self.reference.fit_(self.rows(x, context)[0])

    def after_fit(self, x: Tensor, context: Tensor | None = None) -> None:
        """Drop a constant that belongs to weights of the past."""
        self.normalizer.forget()

    # -- the constant --------------------------------------------------------------------------------------------

    def log_normalizer_rows(self, c: Context | None = None) -> Values:
        r"""Exact :math:`\log Z` at rows of standardised context, ``(rows,)``, or ``(1,)`` without context.

        Raises:
            DensityError: it is too long a sum.
        """
        part = max(1, PART // (1 if c is None else len(c)))
        return log_sum_over_bits(lambda y: self.log_masses_rows(y, c), self.features, self.reference.logits, part)

    def exact_log_normalizer(self, context: Tensor | None = None) -> Tensor:
        r"""Exact :math:`\log Z` in nats, ``batch_shape`` of the context, differentiable in parameters and context.

        Arguments:
            context: ``(*batch, *context_shape)`` for a conditional model.

        Raises:
            DensityError: it is too long a sum.
        """
        shape, c = self(context)._draw_shape(())
        return self.log_normalizer_rows(c).reshape(shape)

    def normalize_(self) -> BinaryEnergy:
        """Attach the exact constant of the parameters as they are; ``fit`` drops it again.

        Raises:
            DensityError: it is too long a sum, or depends on a context.
        """
        if self.context_shape:
            raise DensityError(
                f"{type(self).__name__}: its constant depends on the context and is no number. Build it with "
                "normalized=True, or estimate it for contexts (shape.normalize)."
            )
        if not self.normalizer.given:
            with torch.no_grad():
                self.normalizer.attach(float(self.exact_log_normalizer()), 0.0)
        return self

    # -- row functions -------------------------------------------------------------------------------------------

    def energy_rows(self, y: Rows, c: Context | None, fixed: bool = False) -> Values:
        """The network's energy of rows, :math:`E`.

        Arguments:
            y, c: rows of zeros and ones, and of context.
            fixed: take the parameters as constants.
        """
        inputs = (y,) if c is None else (y, c)
        if fixed:
            parameters = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
            return functional_call(self.network, parameters, inputs).reshape(y.shape[:1])
        return self.network(*inputs).reshape(y.shape[:1])

    def unnormalized_rows(self, y: Rows, c: Context | None, fixed: bool = False) -> Values:
        """Minus the energy; arguments as for :meth:`energy_rows`."""
        return -self.energy_rows(y, c, fixed)

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        learned = self.learn == "contrastive" and torch.is_grad_enabled()
        value = self.unnormalized_rows(y, c, fixed=not (learned or self.normalized))
        value = value - self.normalizer(c, len(y)) if self.normalizer.attached else value
        return value + self.objective.surrogate(self, y, c) if learned else value

    def log_masses_rows(self, y: Tensor, c: Tensor | None) -> Tensor:
        """Minus the energies of events at every context, ``(contexts, rows)``; ``(1, rows)`` without context."""
        if c is None:
            return -self.energy_rows(y, None)[None]
        return -self.energy_rows(y.repeat(len(c), 1), c.repeat_interleave(len(y), 0)).reshape(len(c), -1)

    def reference_rows(self, rows: int, c: Context | None = None) -> Rows:
        """Draws of the reference."""
        return self.reference.draw(rows, new_generator(self.place[1]))

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        return self.sampler.draw(self, rows, c) if rows else self.reference_rows(0)

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        raise DensityError(f"{type(self).__name__} is not a pushforward of noise; it has sample() and log_prob().")

    # -- chains --------------------------------------------------------------------------------------------------

    @abstractmethod
    def moves(self, path: Path, q: Tensor, generator: torch.Generator, groups: int = 1) -> Sweeps:
        """Sweeps that leave every law of a path invariant."""

    def path(self, c: Tensor | None) -> Path:
        """From the reference to the law, at contexts of rows."""

        def reference(q: Tensor) -> Tensor:
            return -self.reference(q)

        return Path(reference, lambda q: self.energy_rows(q, c, fixed=True) - reference(q))

    def lift(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Particles from events: events themselves, or with hidden units after them."""
        return y

    def annealing(
        self, c: Tensor | None, groups: int, particles: int, generator: torch.Generator
    ) -> tuple[Path, Tensor, Sweeps]:
        """What annealing needs: the path, draws of its beginning, and moves along it.

        Arguments:
            c: rows of standardised context, one for each group, or for each particle.
            groups, particles: populations, and particles of each.
            generator: of random numbers.

        Returns:
            The path from the reference, whose log normaliser is :attr:`log_base_normalizer`; draws of the reference,
            ``(groups * particles, dim)``, of which the first columns are events; and moves.
        """
        if c is not None and len(c) != groups * particles:
            c = c.expand(groups, -1).repeat_interleave(particles, 0)
        q = self.lift(self.reference.draw(groups * particles, generator), generator)
        path = self.path(c)
        return path, q, self.moves(path, q, generator, groups)

    def chain_rows(self, y: Rows, c: Context | None, sweeps: int) -> Rows:
        """Where chains of the law from rows arrive after so many sweeps."""
        with torch.no_grad():
            generator = new_generator(y.device)
            path, q = self.path(c), self.lift(y.detach(), generator)
            path.inverse_temperature = torch.ones_like(q[:, 0])
            return self.moves(path, q, generator).run(q, sweeps)[:, : self.features]


def _reference(reference: str) -> bool:
    if reference not in ("fitted", "uniform"):
        raise ValueError(f"reference: got {reference!r}, needs 'fitted' (to the data), or 'uniform'.")
    return reference == "fitted"


def check_summed(bits: int, what: str) -> None:
    """Refuse a constant that every density would sum over too many events.

    Example:
        >>> check_summed(4, "features")
    """
    if bits > MOST_SUMMED:
        raise DensityError(
            f"normalized: every density would sum 2^{bits} events ({what}={bits}), and at most 2^{MOST_SUMMED} are. "
            f"Leave it out; attach the exact constant of fixed parameters by normalize_() (up to 2^{MOST_BITS} "
            "events), or an estimate (shape.normalize)."
        )
