r"""Corrected priors: a generator whose noise is tilted towards what its critic holds for data.

If :math:`r(x) = \log p(x) / p_G(x)` is the log density ratio of data to a generator :math:`G` of noise, the law of
:math:`x = G(z)` with the noise

.. math:: z \sim p(z) \propto \mathcal N(z; 0, I)\, e^{r(G(z))}

has the density :math:`p_G(x)\, e^{r(x)} = p(x)`: wherever the generator puts mass, the weights come right, and a
generator of wrong proportions becomes an exact sampler. Here :math:`r = s f + b` with a critic :math:`f`, a scale
:math:`s`, and a constant :math:`b` that cancels. The critic of an adversarial training is a start and no log density
ratio; ``gm.fit(corrected, x)`` trains it to be one, by the logistic loss of telling data from draws, whose minimiser it
is. The generator stays as it is.

The tilted noise is drawn by a Markov chain for each draw, from the untilted noise on. A transition is a choice among
the present point and fresh noise, with probabilities proportional to :math:`e^{r(G(z))}` (sampling, importance,
resampling, which jumps between modes), and then a trajectory of Hamiltonian Monte Carlo with a random step size (which
moves within one). Both leave :math:`p(z)` as it is; how near the last point comes to it is a matter of ``transitions``.

References:
    T. Che, R. Zhang, J. Sohl-Dickstein, H. Larochelle, L. Paull, Y. Cao, Y. Bengio, Your GAN is Secretly an
    Energy-based Model and You Should use Discriminator Driven Latent Sampling, 2020, arXiv:2003.06060.
    S. Azadi, C. Olsson, T. Darrell, I. Goodfellow, A. Odena, Discriminator Rejection Sampling, 2018, arXiv:1810.06758.
    S. Samsonov, E. Lagutin, M. Gabrie, A. Durmus, A. Naumov, E. Moulines, Local-Global MCMC kernels: the best of both
    worlds, 2022, arXiv:2111.02702.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from ..contract import Cost, Density, GenerativeDistribution, GenerativeModel
from ..foundation.chains import Plain, Step, hamiltonian, start
from ..foundation.errors import DensityError
from ..foundation.networks import zero_output_layer
from ..foundation.objectives import logistic_contrast
from ..foundation.shapes import Context, Noise, Rows, Values
from .critic import check_critic, judge, make_critic
from .pushforward import Pushforward

__all__ = ["Corrected", "CorrectedDistribution", "TiltedNoise"]


class Corrected(GenerativeModel):
    r"""A pushforward of tilted noise, :math:`p(z) \propto \mathcal N(z; 0, I)\, e^{s f(G(z))}`.

    Its law has no density and no pathwise gradient, but a differentiable ``push``, and a ``base`` whose ``log_prob`` is
    known up to a constant: with :class:`pyro_genmods.infer.PushforwardReparam` it is a prior for HMC and NUTS. That
    constant depends on the context, so a context that is itself inferred, by gradients, is refused.

    Arguments:
        model: the generator; a copy of it is kept, frozen.
        critic: :math:`f`, called as ``critic(y)`` or ``critic(y, c)``; default a copy of the model's own, or else a
            network that starts as no correction.
        scale: :math:`s`; 0 is no correction.
        transitions: of the Markov chain of a draw.
        candidates: points of fresh noise that compete with the present one.
        leapfrogs: of a trajectory.

    Shape:
        that of ``model``.

    Raises:
        TypeError: not a pushforward.
        ShapeError: the critic does not fit.
        ValueError: fewer than no transitions, candidates or leapfrogs.
        DensityError: at ``log_prob`` and ``rsample``, with the remedy; at ``base.log_prob``, a context with a gradient.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.transform.Pushforward(torch.nn.Linear(1, 1), latent_features=1)
        >>> law = gm.transform.Corrected(model)()                      # its critic has learned nothing yet
        >>> z = torch.randn(4, 1)
        >>> (law.base.log_prob(z) - model().base.log_prob(z)).abs().max().item()
        0.0
        >>> law.sample((3,)).shape
        torch.Size([3, 1])
    """

    density: ClassVar[Density] = Density.IMPLICIT
    has_rsample = False
    HIDDEN: ClassVar[tuple[int, ...]] = (128, 128)
    STEP_SIZES: ClassVar[tuple[float, float]] = (0.02, 1.0)

    def __init__(
        self,
        model: Pushforward,
        critic: nn.Module | None = None,
        *,
        scale: float = 1.0,
        transitions: int = 30,
        candidates: int = 16,
        leapfrogs: int = 4,
    ) -> None:
        if not isinstance(model, Pushforward):
            raise TypeError(f"model: got {type(model).__name__}, needs a transform.Pushforward or gm.Adversarial.")
        if min(transitions, candidates, leapfrogs) < 0:
            raise ValueError("transitions, candidates, leapfrogs: none may be negative.")
        super().__init__(model.event_shape, model.context_shape, model.support)
        self.pushforward = copy.deepcopy(model).freeze()
        self.coordinates = self.pushforward.coordinates
        self.context_standardization = self.pushforward.context_standardization
        context_features = self.context_shape.numel() if self.context_shape else 0
        if critic is None:
            critic = _critic_of(self.pushforward, context_features)
        check_critic(critic, self.features, context_features)
        self.critic = critic.to(*reversed(self.place))
        dtype, device = self.place
        self.offset = nn.Parameter(torch.zeros((), dtype=dtype, device=device))
        self.scale, self.transitions, self.candidates, self.leapfrogs = scale, transitions, candidates, leapfrogs
        # What this was built from is the copy: the original may have gone on learning by the time this is saved.
        self.constructor_arguments = {**self.constructor_arguments, "model": self.pushforward}

    def forward(self, context: Tensor | None = None) -> CorrectedDistribution:
        """The law at a context, see :meth:`pyro_genmods.GenerativeModel.forward`."""
        return CorrectedDistribution(self, context)

    @property
    def cost(self) -> Cost:
        return Cost(sample=None, score=None)

    @property
    def noise_shape(self) -> Size:
        return self.pushforward.noise_shape

    def train(self, mode: bool = True) -> Corrected:
        """Set the mode of the critic; the generator does not learn."""
        super().train(mode)
        self.pushforward.eval()
        return self

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Nothing: the units are the generator's."""

    # -- row functions -------------------------------------------------------------------------------------------

    def base_distribution(self) -> TorchDistributionMixin:
        """The tilted noise of an unconditional law; that of a conditional one is ``model(context).base``."""
        if self.context_shape:
            raise DensityError("the tilted noise depends on the context; take model(context).base.")
        return self().base

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        return self.pushforward.push_rows(z, c)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        return self.push_rows(self.noise_rows(rows, c), c)

    def tilt_rows(self, z: Noise, c: Context | None) -> Values:
        r"""The tilt of noise, :math:`s f(G(z))`, in nats."""
        return self.scale * judge(self.critic, self.push_rows(z, c), c)

    def noise_log_prob_rows(self, z: Noise, c: Context | None) -> Values:
        r"""Log density of tilted noise, up to the logarithm of :math:`\mathbb E\, e^{s f(G(z))}`."""
        return self.pushforward.base_distribution().log_prob(z) + self.tilt_rows(z, c)

    def noise_rows(self, rows: int, c: Context | None) -> Noise:
        """Draws of the tilted noise, each the end of a chain of its own."""
        potential = _Energy(lambda z: -self.noise_log_prob_rows(z, c))
        z = self.pushforward._noise(rows)
        for _ in range(self.transitions if rows else 0):
            z = self._choose(z, c)
            if self.leapfrogs:
                z = hamiltonian(start(z, potential), potential, self._step(z))[0].position
        return z

    def _choose(self, z: Tensor, c: Tensor | None) -> Tensor:
        """One of the present point and the candidates, by their tilts."""
        fresh = self.pushforward._noise(self.candidates * len(z)).unflatten(0, (self.candidates, len(z)))
        points = torch.cat([z[None], fresh])
        with torch.no_grad():
            contexts = None if c is None else c.repeat(len(points), 1)
            tilts = self.tilt_rows(points.flatten(0, 1), contexts).reshape(len(points), len(z))
        gumbel = -(-torch.rand_like(tilts).log()).log()
        chosen = (tilts + gumbel).nan_to_num(-torch.inf).argmax(0)
        return points[chosen, torch.arange(len(z), device=z.device)]

    def _step(self, z: Tensor) -> Step:
        low, high = self.STEP_SIZES
        size = low * (high / low) ** torch.rand(len(z), 1, dtype=z.dtype, device=z.device)
        log_uniform = torch.rand(len(z), dtype=z.dtype, device=z.device).log()
        return Step(size, torch.ones_like(z[0]), torch.randn_like(z), log_uniform, self.leapfrogs)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The logistic loss of telling each example from a draw of the generator, from which the critic learns.

        Arguments:
            x: ``(batch, *event_shape)``, in the user's units.
            context: ``(batch, *context_shape)`` or ``None``.

        Returns:
            ``(batch,)``, in nats.
        """
        y, c = self.rows(x, context)
        with torch.no_grad():
            fake = self.pushforward.sample_rows(len(y), c)
        both = judge(self.critic, torch.cat([y, fake]), None if c is None else torch.cat([c, c]))
        odds = self.scale * both + self.offset
        return logistic_contrast(odds[: len(y)], odds[len(y) :])


class CorrectedDistribution(GenerativeDistribution):
    """The law of a :class:`Corrected` model at a context; ``base`` is its tilted noise.

    Arguments, shapes, errors: those of :class:`~pyro_genmods.contract.GenerativeDistribution`.

    Example:
        >>> model = Pushforward(nn.Linear(2, 3), latent_features=2)
        >>> Corrected(model)().expand([4]).base
        TiltedNoise(batch_shape=(4,), event_shape=(2,))
    """

    @property
    def base(self) -> TorchDistributionMixin:
        return TiltedNoise(self)


class TiltedNoise(TorchDistribution):
    r"""The noise of a corrected law, :math:`p(z) \propto \mathcal N(z; 0, I)\, e^{s f(G(z))}`.

    ``log_prob`` lacks the logarithm of the normalising constant, in nats; ``sample`` runs a Markov chain for each draw.

    Arguments:
        law: whose noise it is.

    Shape:
        ``(*sample_shape, *batch_shape, latent_features)``.

    Example:
        >>> noise = TiltedNoise(Corrected(Pushforward(nn.Linear(2, 3), latent_features=2))())
        >>> noise.sample((5,)).shape, noise.log_prob(torch.zeros(5, 2)).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, law: CorrectedDistribution) -> None:
        self.law = law
        super().__init__(law.batch_shape, law.model.noise_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> TiltedNoise:
        """The noise of the expanded law."""
        return TiltedNoise(self.law.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density up to a constant that depends on the context alone; NaN for noise that is not finite.

        Raises:
            DensityError: the context has a gradient, of which the constant's part would be missing.
        """
        if self.law.context is not None and self.law.context.requires_grad:
            raise DensityError(
                "context: it is being inferred, and the tilted noise is normalised by a constant that depends on it "
                "and is unknown; condition on the context, or use the model without correction."
            )
        lead, z, c, lost = self.law._noise_rows(value)
        log_prob = self.law.model.noise_log_prob_rows(z, c)
        return self.law._values(log_prob.masked_fill(lost, torch.nan), lead)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        """Draws without gradient, each the end of a chain of its own."""
        with torch.no_grad():
            shape, c = self.law._draw_shape(sample_shape)
            return self.law.model.noise_rows(shape.numel(), c).reshape(shape + self.event_shape)

    def __repr__(self) -> str:
        return f"TiltedNoise(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"


class _Energy(Plain):
    """A target whose gradients are taken by ``torch.func``, so that draws can be made under ``torch.vmap``."""

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        def total(q: Tensor) -> tuple[Tensor, Tensor]:
            energies = self.energy(q)
            return energies.sum(), energies

        gradients, energies = torch.func.grad(total, has_aux=True)(q)
        return energies.detach(), gradients


def _critic_of(model: Pushforward, context_features: int) -> nn.Module:
    """A trainable copy of the model's critic, or a new one that is zero."""
    own = getattr(model, "critic", None)
    if own is not None:
        return copy.deepcopy(own).requires_grad_(True)
    critic = make_critic(model.features, context_features, Corrected.HIDDEN)
    zero_output_layer(critic)
    return critic
