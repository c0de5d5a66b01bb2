r"""Adversarial training: a generator learns from a critic who learns to tell its draws from data.

The Wasserstein distance of the data's law and the generator's is, by the duality of Kantorovich and Rubinstein,

.. math:: W_1(p, G_\# \mathcal N) = \sup_{|\nabla f| \le 1} \;
          \mathbb E_{x \sim p} f(x) - \mathbb E_{z \sim \mathcal N(0, I)} f(G(z)) .

A critic :math:`f` climbs to the supremum, the generator :math:`G` descends. What keeps the critic's slope at one is a
penalty :math:`\lambda (|\nabla f(\hat x)| - 1)^2` on points between data and draws, or a bound on the spectral norm
of each of its layers.

**One loop trains both.** In ``train()`` mode every call of ``loss`` has the critic's term, in which the generator
takes no part, and every ``critic_steps``-th call the generator's term too, in which the critic takes no part; on the
other calls the generator has no gradient and an optimizer leaves it alone. The calls are counted in a buffer, so that
a run that is taken up again goes on in step.

**The number is a proper score.** A critic's own estimate of the distance is least when the critic is worst, so it can
neither choose the best epoch nor be compared between two. The value of ``loss`` is therefore the energy score of
:class:`~pyro_genmods.transform.Pushforward`: in ``train()`` mode without a part in the gradient, in ``eval()`` mode
with it. ``critic_distance`` is the critic's estimate. The score sees gross faults and not fine ones: late epochs, whose
draws differ in how sharp their modes are, are all alike to it within its noise, and ``fit`` keeps the last weights.

References:
    I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville, Improved Training of Wasserstein GANs, 2017,
    arXiv:1704.00028.
    T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, Spectral Normalization for Generative Adversarial Networks, 2018,
    arXiv:1802.05957.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call

from ..foundation.errors import ShapeError
from ..foundation.networks import MLP, place_of
from ..foundation.objectives import energy_score, gradient_penalty, wasserstein_critic
from ..foundation.shapes import Context, Rows, Values
from .corrected import Corrected
from .critic import check_critic, judge, make_critic
from .pushforward import Pushforward

__all__ = ["Adversarial"]


class Adversarial(Pushforward):
    r"""A Wasserstein generator with its critic: a prior that is sampled in one call, and has no density.

    ``gm.fit`` trains both players, with Adam's decays :attr:`betas`. Training is a game and takes more steps than a
    likelihood does. What worked in ``benchmarks/adversarial.py``: tens of thousands of steps, ``batch_size=256``,
    ``ema=0.999``, ``patience=None`` and ``gradient_clip=None``.

    Arguments:
        features: number of unconstrained coordinates of an event.
        latent_features: columns of noise.
        context_features: number of context features.
        hidden_features: widths of the generator's hidden layers.
        critic_features: widths of the critic's.
        generator: your own, see :class:`~pyro_genmods.transform.Pushforward`.
        critic: your own, called as ``critic(y)`` or ``critic(y, c)`` with rows of standardised coordinates; with
            ``lipschitz="spectral"`` it must have a slope of at most one by itself.
        lipschitz: ``"penalty"`` on the critic's slope, or ``"spectral"`` bounds on the norms of its layers.
        penalty: :math:`\lambda`. Ten in the reference; where data lie in separate clumps far less, since the slope of
            the best critic is then not one everywhere.
        critic_steps: calls of ``loss`` for one move of the generator.
        support, event_shape, density: as for :class:`~pyro_genmods.transform.Pushforward`.

    Shape:
        noise ``(latent_features,)``, events ``event_shape``, contexts ``(context_features,)``.

    Raises:
        ShapeError: networks and sizes do not fit.
        TypeError: a network is not an ``nn.Module``.
        ValueError: another ``lipschitz``, a negative penalty, or ``critic_steps`` below 1.
        DensityError: see :class:`~pyro_genmods.transform.Pushforward`; ``log_prob`` names the remedy.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> x = 3 + torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
        >>> model = gm.Adversarial(1, latent_features=1, hidden_features=(8,), critic_features=(8,))
        >>> history = gm.fit(model, x, max_epochs=5, seed=0, progress_bar=False)
        >>> model().sample((1000,)).shape, history.unit
        (torch.Size([1000, 1]), 'sd')
        >>> model().log_prob(x)
        Traceback (most recent call last):
        ...
        pyro_genmods.foundation.errors.DensityError: Adversarial has no density ...PushforwardReparam().
    """

    betas: ClassVar[tuple[float, float]] = (0.0, 0.9)
    comparable: ClassVar[bool] = False

    def __init__(
        self,
        features: int,
        latent_features: int,
        context_features: int = 0,
        *,
        hidden_features: Sequence[int] = (128, 128, 128),
        critic_features: Sequence[int] = (128, 128, 128),
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        lipschitz: Literal["penalty", "spectral"] = "penalty",
        penalty: float = 0.1,
        critic_steps: int = 2,
        support: constraints.Constraint | None = None,
        event_shape: tuple[int, ...] | None = None,
        density: Literal["manifold"] | None = None,
    ) -> None:
        if lipschitz not in ("penalty", "spectral"):
            raise ValueError(f"lipschitz: got {lipschitz!r}, needs 'penalty' or 'spectral'.")
        if penalty < 0 or critic_steps < 1:
            raise ValueError(f"penalty, critic_steps: got {penalty}, {critic_steps}; need at least 0 and 1.")
        if features < 1 or latent_features < 1:
            raise ShapeError(f"features, latent_features: got {features}, {latent_features}; need at least 1 each.")
        if generator is None:
            generator = MLP(latent_features + context_features, features, hidden_features, activation=nn.ReLU)
        super().__init__(generator, latent_features, context_features, support, event_shape, density)
        if self.features != features:
            raise ShapeError(f"features: got {features}, the generator makes {self.features} coordinates.")
        if critic is None:
            critic = make_critic(features, context_features, critic_features, lipschitz == "spectral")
        check_critic(critic, features, context_features)
        self.critic = critic.to(*reversed(place_of(generator)))
        self.penalty = float(penalty) if lipschitz == "penalty" else 0.0
        self.critic_steps = critic_steps
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64, device=self.place[1]))

    def corrected(self, scale: float = 1.0) -> Corrected:
        r"""The prior whose noise is tilted by the critic, :math:`p(z) \propto \mathcal N(z; 0, I)\, e^{s f(G(z))}`.

        Arguments:
            scale: :math:`s`.

        Returns:
            A model of its own, with copies of generator and critic; see :class:`~pyro_genmods.transform.Corrected`.
        """
        return Corrected(self, scale=scale)

    def critic_distance(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""The critic's difference between each example and a draw, :math:`f(x) - f(G(z))`.

        Its mean estimates the Wasserstein distance of data and generator, from below if the critic's slope is at most
        one.

        Arguments:
            x: ``(batch, *event_shape)``, in the user's units.
            context: ``(batch, *context_shape)`` or ``None``.

        Returns:
            ``(batch,)``, in standard deviations of the coordinates.
        """
        y, c = self.rows(x, context)
        return judge(self.critic, y, c) - judge(self.critic, self.sample_rows(len(y), c), c)

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The game of both players in ``train()`` mode, and the energy score in ``eval()`` mode, per example.

        Arguments:
            x: ``(batch, *event_shape)``, in the user's units.
            context: ``(batch, *context_shape)`` or ``None``.

        Returns:
            ``(batch,)``: by its value the energy score, in standard deviations of the coordinates; by its gradient, in
            ``train()`` mode, that of the critic's loss, and in every ``critic_steps``-th call the generator's too.
        """
        if not self.training:
            return super().loss(x, context)
        y, c = self.rows(x, context)
        self.turn += 1
        moves = int(self.turn) % self.critic_steps == 0 and torch.is_grad_enabled()
        with torch.set_grad_enabled(moves):
            fake = self.sample_rows(len(y), c)
        with torch.no_grad():
            score = energy_score(y, torch.stack([fake.detach(), self.sample_rows(len(y), c)]))
        game = self._critic_loss(y, fake.detach(), c)
        if moves:
            game = game - self._blind_critic(fake, c)
        return score + (game - game.detach())

    def _critic_loss(self, y: Tensor, fake: Tensor, c: Tensor | None) -> Tensor:
        both = judge(self.critic, torch.cat([y, fake]), None if c is None else torch.cat([c, c]))
        penalty: Tensor | float = 0.0
        if self.penalty:
            mix = torch.rand(len(y), 1, dtype=y.dtype, device=y.device)
            penalty = self.penalty * gradient_penalty(lambda rows: judge(self.critic, rows, c), y, fake, mix)
        return wasserstein_critic(both[: len(y)], both[len(y) :], penalty)

    def _blind_critic(self, y: Rows, c: Context | None) -> Values:
        """The critic at its present parameters, which learn nothing from it."""
        parameters = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        return judge(lambda *rows: functional_call(self.critic, parameters, rows), y, c)
