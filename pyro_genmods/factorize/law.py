r"""What an autoregressive distribution can do beyond every generative distribution.

The conditionals give more than a density: uniform residuals (Rosenblatt), marginals and conditionals of prefixes,
imputation, exact enumeration of small discrete spaces, entropy, and the sampler opened up place by place.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor

from ..distribution import GenerativeDistribution
from ..foundation.errors import DensityError, ShapeError, SupportError
from .completion import Continuation, Imputation, impute
from .factorization import Factorization
from .sequences import alive, all_sequences
from .steps import Steps

__all__ = ["AutoregressiveDistribution"]


class AutoregressiveDistribution(GenerativeDistribution):
    r"""An :class:`~pyro_genmods.Autoregressive` model at a context.

    Arguments, shapes and errors are those of :class:`~pyro_genmods.GenerativeDistribution`. Where a method speaks of
    *the first k entries* it means those in the first ``k`` places of the model's order.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> law = gm.Autoregressive(4, gm.factorize.Bernoulli())()
        >>> x = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> law.enumerate_support().shape, bool(law.perplexity(x) > 1)
        (torch.Size([16, 4]), True)
        >>> rest = law.condition(x[:2])
        >>> chain_rule = law.log_prob_prefix(x, 2) + rest.log_prob(x[2:])
        >>> torch.allclose(chain_rule, law.log_prob(x))
        True
    """

    ENUMERABLE = 2**12
    model: Factorization

    @property
    def base(self) -> TorchDistributionMixin:
        """Law of the noise, standard normal; refused where the law averages over orders and is no pushforward."""
        _ = self.model.order
        return super().base

    # -- the Rosenblatt transform --------------------------------------------------------------------------------

    def rosenblatt(self, x: Tensor, v: Tensor | None = None) -> Tensor:
        r"""Probability integral transforms :math:`u_t = F_t(x_t \mid x_{<t})`, uniform and independent under this law.

        A discrete entry has a jump, from which it draws, :math:`u = F(x^-) + v\, p(x)` with :math:`v \sim U(0, 1)`.

        Arguments:
            x: ``(*lead, *event_shape)``.
            v: ``(*lead, T)`` in ``(0, 1)``, for discrete entries; default random, from torch's global state.

        Returns:
            ``(*lead, T)``; after the end of a sequence, ``v`` itself.

        Reference:
            M. Rosenblatt 1952; for discrete entries L. Rüschendorf, Stochastically ordered distributions and
            monotonicity of the OC of an SPRT, 1981.
        """
        if self._validate_args:
            self._validate_sample(x)
        model = self.model
        lead, rows, c = self._rows(x, self.event_shape)
        y, _ = model.coordinates.pull(rows)
        y = model.inside(y)
        v = torch.rand_like(y) if v is None else _unit_noise(v, lead + y.shape[1:]).reshape(y.shape).to(y)
        u = model.conditional.pit(model.parameters_of(y, c), y, v)
        if model.eos is not None:
            u = torch.where(alive(y, model.eos), u, v)
        return u.reshape(lead + self.model.noise_shape)

    def inverse_rosenblatt(self, u: Tensor, method: str | None = None) -> Tensor:
        r"""Draws from uniforms, :math:`x_t = F_t^{-1}(u_t \mid x_{<t})`: quasi-random or common random numbers.

        Arguments:
            u: ``(*lead, T)`` in ``(0, 1)``.
            method: of :mod:`pyro_genmods.factorize.walk`; default the model's.

        Raises:
            SupportError: an entry outside ``(0, 1)``.
        """
        _check_unit("u", u)
        law = self if method is None else self._with(self.model.sampled_by(method))
        return law.push(torch.special.ndtri(u))

    # -- prefixes and gaps ---------------------------------------------------------------------------------------

    def log_prob_prefix(self, x: Tensor, k: int) -> Tensor:
        r"""Exact marginal log density :math:`\log p(x_{\sigma_1}, \dots, x_{\sigma_k})`, in the user's units.

        Arguments:
            x: ``(*lead, *event_shape)``; entries after the first ``k`` are not read, but must lie in the support.
            k: from 0 to ``T``.
        """
        model = self.model
        if not 0 <= k <= model.features:
            raise ShapeError(f"k: got {k}, needs a number of entries from 0 to {model.features}.")
        if self._validate_args:
            self._validate_sample(x)
        lead, rows, c = self._rows(x, self.event_shape)
        first = model.order[:k]
        y, volume = model.coordinates.pull(rows)
        log_probs = model.entry_log_probs(model.inside(y), c) + model.entry_volumes(rows)
        return self._values(torch.where(volume > -math.inf, log_probs[:, first].sum(-1), volume), lead)

    def condition(self, prefix: Tensor) -> GenerativeDistribution:
        r"""The law of what follows a prefix, :math:`p(x_{\sigma_{k+1}}, \dots \mid x_{\sigma_1}, \dots, x_{\sigma_k})`.

        Arguments:
            prefix: ``(*batch, k)``, the first ``k`` entries, in the user's units; ``batch`` broadcasts with this law's.

        Returns:
            A distribution of the ``T - k`` entries that follow, in their order: exact ``log_prob``, ``sample``, and for
            continuous entries ``rsample``, ``push`` and ``pull``.
        """
        return Continuation.of(self, prefix)

    def impute(self, x: Tensor, observed: Tensor, num_samples: int = 1, num_particles: int | None = None) -> Imputation:
        """Draw missing entries given the observed ones, wherever they are.

        An orderless model puts the observed entries first and answers exactly. Under a fixed order missing entries are
        proposed place by place, and weighted and resampled by the observed ones that follow (sequential Monte Carlo):
        the evidence is unbiased, draws become exact as particles grow. Gaps at the end of the order cost no particles.

        Arguments:
            x: ``(*lead, *event_shape)``; missing entries are not read.
            observed: boolean, broadcastable to ``x``.
            num_samples: draws of each event.
            num_particles: of each event, where particles are needed; default 256, at least ``num_samples``.
        """
        return impute(self, x, observed, num_samples, num_particles)

    # -- numbers people report -----------------------------------------------------------------------------------

    def perplexity(self, x: Tensor) -> Tensor:
        r"""Perplexity of an entry, :math:`\exp(-\log p(x) / T)`, with the length of the sequence, its end included."""
        return (-self.log_prob(x) / self._lengths(x)).exp()

    def bits_per_dim(self, x: Tensor) -> Tensor:
        r"""Bits per entry, :math:`-\log_2 p(x) / T`, with the length of the sequence, its end included."""
        return -self.log_prob(x) / (self._lengths(x) * math.log(2))

    def _lengths(self, x: Tensor) -> Tensor | int:
        return self.model.features if self.model.eos is None else alive(x, self.model.eos).sum(-1)

    def entropy(self, num_samples: int = 1000) -> Tensor:
        """Entropy in nats, ``batch_shape``: the exact sum where the support can be enumerated, else an average.

        Arguments:
            num_samples: draws to average over.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, needs at least 1.")
        with torch.no_grad():
            if self.has_enumerate_support:
                log_prob = self.log_prob(self.enumerate_support())
                return torch.special.entr(log_prob.exp()).sum(0)
            x = self.sample((num_samples,))
            return -self.log_prob(x).mean(0)

    # -- small discrete spaces -----------------------------------------------------------------------------------

    @property
    def has_enumerate_support(self) -> bool:
        """Whether all events can be listed, at most 4096; Pyro can then sum the site out."""
        return 0 < self._size_of_support() <= self.ENUMERABLE

    def _size_of_support(self) -> int:
        levels = self.model.levels
        return 0 if levels is None else math.prod(levels)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All events, ``(number, *batch_shape, *event_shape)``, or with batch dimensions of size 1.

        Raises:
            DensityError: entries are continuous, or there are more than 4096 events.
        """
        if not self.has_enumerate_support:
            size = self._size_of_support()
            many = f"{size:.3g}" if size < 10**300 else f"1e+{int(math.log10(size))}"
            raise DensityError(
                f"{self}: has {f'about {many} events' if size else 'continuous entries'}, at most {self.ENUMERABLE} "
                "events can be enumerated; use sample(), or marginalise by hand."
            )
        model = self.model
        rows = all_sequences(model.levels, self.support, model.orders.new_zeros((), dtype=model.place[0]))
        rows = rows.to(model.value_dtype or model.place[0])
        rows = rows.reshape((len(rows),) + (1,) * len(self.batch_shape) + self.event_shape)
        return rows.expand((len(rows), *self.batch_shape, *self.event_shape)) if expand else rows

    # -- other laws ----------------------------------------------------------------------------------------------

    def tempered(self, temperature: float) -> AutoregressiveDistribution:
        r"""The law with every conditional raised to the power :math:`1 / T` and normalised, density and sampler alike.

        Categories and Bernoullis exactly; mixtures raise their weights and each component to the power.

        Arguments:
            temperature: below 1 for likelier draws, above 1 for more diverse ones.
        """
        return self._with(self.model.tempered(temperature))

    def _with(self, model: Factorization) -> AutoregressiveDistribution:
        new = self.expand(self.batch_shape)
        new.model = model
        return new

    def steps(self, n: int) -> Steps:
        """The sampler of ``n`` particles, one entry after the other; see :class:`pyro_genmods.factorize.Steps`."""
        if n < 1:
            raise ValueError(f"n: got {n}, needs at least one particle.")
        return Steps(self, n)


def _check_unit(name: str, u: Tensor) -> None:
    outside = ~((u > 0) & (u < 1))
    if bool(outside.any()):
        raise SupportError(
            f"{name}: {int(outside.sum())} entries are NaN or outside (0, 1), e.g. {u[outside].flatten()[:4].tolist()};"
            " clamp them to the open interval."
        )


def _unit_noise(v: Tensor, shape: Size) -> Tensor:
    _check_unit("v", v)
    try:
        return v.expand(shape)
    except RuntimeError as error:
        raise ShapeError(f"v: got shape {tuple(v.shape)}, needs {tuple(shape)}, a number for each entry.") from error
