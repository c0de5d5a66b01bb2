r"""Diffusion: data that are forgotten by adding noise, and remembered by a network that denoises.

White data :math:`x_0` and noise :math:`\varepsilon` are mixed at an angle, :math:`u = \cos\theta\, x_0 + \sin\theta\,
\varepsilon`. A network learns the velocity :math:`v = \mathbb E[\cos\theta\,\varepsilon - \sin\theta\, x_0 \mid u]`
by regression (*denoising score matching*). The probability flow

.. math:: \frac{\mathrm du}{\mathrm d\theta} = v(u, \theta), \qquad
          \log p(x) = \log \mathcal N(u_{\pi/2}; 0, I) + \int_{\theta_0}^{\pi/2} \nabla \cdot v \, \mathrm d\theta
          + D \log\cos\theta_0 - \log |L|

carries noise, at :math:`\pi/2` *exactly* standard normal, to data, at :math:`\theta_0 = \arctan\sigma_{\min}`. Data
are white by their full covariance :math:`L L^\top`, so that the velocity of Gaussian data is zero: they are sampled and
scored exactly in any number of steps. The law is that of the data with noise of :math:`\sigma_{\min}` standard
deviations in white units.

One network defines several laws, which agree only if it is exact: that of the flow (calling the model: a distribution
with a density), that of a chain or of few steps (:meth:`Diffusion.sampled_by`: a pushforward), that of the stochastic
equation, and, of an energy, the density of the network itself (:meth:`Diffusion.energy_law`).

References:
    Y. Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2020, arXiv:2011.13456.
    T. Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364. C. Lu,
    Y. Song, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, 2024, arXiv:2410.11081 (angles).
    Y. Song, C. Durkan, I. Murray, S. Ermon, Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    arXiv:2101.09258 (likelihood weighting). J. Ho, T. Salimans, Classifier-Free Diffusion Guidance, 2022,
    arXiv:2207.12598.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import pad

from ..contract import Cost, Density, GenerativeModel
from ..coordinates import event_shape_on
from ..foundation.divergence import rademacher
from ..foundation.errors import ShapeError
from ..foundation.flow_matching import stratified_normal
from ..foundation.networks import place_of, zero_output_layer
from ..foundation.numerics import normal_log_prob
from ..foundation.ode import RK4, FixedStep, Solver, odeint
from ..foundation.residual import ResidualMLP
from ..foundation.shapes import Context, Noise, Rows, Values
from ..foundation.unet import UNet
from ..foundation.whitening import Whitening
from .calibration import calibrated, score_level
from .denoiser import SINGULAR, NetworkDenoiser
from .energy import EnergyLaw
from .forced import ForcedLaw
from .grid import angles_of, even_knots, scheduled_angles
from .law import DiffusionDistribution
from .network import check_network, check_options, check_rows_apart, default_network, is_image
from .sampled import SampledLaw
from .samplers import AdamsBashforth, Sampler
from .schedule import Angle, Schedule

__all__ = ["Diffusion"]

MOST_EXACT = 64  # features up to which a divergence by as many reverse passes is the default
MOST_WHITE = 512  # features up to which the whole covariance is the default
SINGULAR_TOP = math.atan(1000.0)


class Diffusion(GenerativeModel):
    r"""A learnable diffusion prior: an honest Pyro distribution by its probability flow.

    Arguments:
        features: number of unconstrained coordinates; or None, where ``event_shape`` is given.
        context_features: number of context features.
        schedule: whose angles are the first grid, and whose clock the stochastic equation has; the network itself
            belongs to none, see :mod:`pyro_genmods.evolve.schedule`.
        network: called as ``network(t, u, c)`` with the angle ``t`` ``(rows, 1)``, white noisy rows ``u`` ``(rows,
            features)``, and ``c`` ``(rows, context_features)`` or ``None``; by default a residual perceptron with
            adaptive normalisation, and a U-Net where events are images ``(channels, height, width)``.
        parameterization: what the network returns: ``"velocity"``, ``"noise"``, ``"denoised"``, ``"score"``, or a
            potential (``"energy"``), see :class:`~pyro_genmods.evolve.denoiser.NetworkDenoiser`.
        support, event_shape: where events live, and the shape of one.
        whiten: units of the network: ``"full"`` covariance (default up to 512 features), ``"diagonal"``, or one scale
            ``"common"`` to all features (default for images).
        sigma_min: noise in the law, in white standard deviations.
        noise_levels: mean and standard deviation of :math:`\log \tan \theta` in training.
        likelihood_weighting: weight noise levels so that the loss bounds the negative log-likelihood, in nats up to a
            constant.
        context_dropout: probability with which training leaves a context away, so that the model learns the law
            without it too, for classifier-free guidance.
        trace: of the density: ``"exact"``, ``"hutchinson"`` with frozen probes, or ``"auto"``: exact up to 64 features
            that are no image, and where the network knows its divergence.
        estimated: let chains accept and reject by a density with frozen probes. They then sample the law of these
            probes, not that of the flow; without it they refuse.
        solver: of the probability flow, ``RK4(steps)``, ``Heun`` or ``Euler``; by default ``RK4``, with as many steps
            as :meth:`calibrate` finds necessary, which ``fit`` runs at its end.

    Shape:
        events ``event_shape``, contexts ``(context_features,)``; log densities in nats per event.

    Raises:
        ShapeError: event shape and features disagree, or the network returns another shape.
        ValueError: a network that mixes the rows of a batch, a schedule that does not lead from data to noise, or an
            option that is not known.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> prior = gm.Diffusion(2)
        >>> history = gm.fit(prior, torch.randn(500, 2).exp(), max_epochs=2, seed=0, progress_bar=False)
        >>> law = prior()
        >>> x, log_prob = law.rsample_and_log_prob((5,))
        >>> torch.allclose(log_prob, law.log_prob(x), atol=1e-2), law.density.name, law.score(x).shape
        (True, 'EXACT', torch.Size([5, 2]))
    """

    def __init__(
        self,
        features: int | None = None,
        context_features: int = 0,
        schedule: Schedule | None = None,
        network: nn.Module | None = None,
        *,
        parameterization: Literal["velocity", "noise", "denoised", "score", "energy"] = "velocity",
        support: constraints.Constraint | None = None,
        event_shape: tuple[int, ...] | None = None,
        whiten: Literal["full", "diagonal", "common"] | None = None,
        sigma_min: float = 1e-3,
        noise_levels: tuple[float, float] = (-1.0, 1.4),
        likelihood_weighting: bool = False,
        context_dropout: float = 0.0,
        trace: Literal["auto", "exact", "hutchinson"] = "auto",
        estimated: bool = False,
        solver: FixedStep | None = None,
    ) -> None:
        check_options(parameterization, whiten, trace, sigma_min, noise_levels)
        if features is None and event_shape is None:
            raise ShapeError("features: give the number of features, or an event_shape.")
        if not 0 <= context_dropout < 1 or (context_dropout and not context_features):
            raise ValueError(
                f"context_dropout: got {context_dropout}, needs a probability below 1, and a context to leave away."
            )
        support = support or constraints.real
        shape = Size(event_shape) if event_shape is not None else event_shape_on(support, Size([features]))
        super().__init__(shape, (context_features,) if context_features else (), support)
        if features is not None and self.features != features:
            raise ShapeError(
                f"event_shape {tuple(shape)} on {support} has {self.features} coordinates, features is {features}."
            )
        self.schedule = Angle(math.atan(sigma_min)) if schedule is None else schedule
        self.schedule.check()
        inner = self.coordinates.unconstrained_shape
        usual = "common" if is_image(inner) else "full" if self.features <= MOST_WHITE else "diagonal"
        self.whiten = whiten or usual
        self.parameterization, self.sigma_min, self.noise_levels = parameterization, sigma_min, noise_levels
        self.likelihood_weighting, self.context_dropout = likelihood_weighting, context_dropout
        scalar, told = parameterization == "energy", context_features + bool(context_dropout)
        self.network = default_network(inner, self.features, told, scalar) if network is None else network
        check_network(self.network, self.features, told, 1 if scalar else self.features)
        check_rows_apart(self.network, self.features, told)
        few = self.features <= MOST_EXACT and not is_image(inner)
        exact = trace == "exact" or (trace == "auto" and (few or self._knows_divergence))
        self.density, self.acceptable = Density.EXACT if exact else Density.ESTIMATE, exact or estimated
        self.whitening = Whitening(self.features)
        self.coordinates.common = self.whiten == "common"
        self.bottom = math.atan(sigma_min)
        self.top = SINGULAR_TOP if parameterization in SINGULAR else math.pi / 2
        self.register_buffer("probes", rademacher(1, self.features))
        self.register_buffer("knots", even_knots(self.bottom, self.top))
        self.register_buffer("calibration", torch.tensor([16.0, -1.0, max(0.05, sigma_min), -1.0]))
        self._steps, self._level, self._given = 16, max(0.05, sigma_min), solver
        self.to(*reversed(place_of(self.network)))

    def forward(self, context: Tensor | None = None) -> DiffusionDistribution:
        """The law of the probability flow at a context, see :meth:`pyro_genmods.GenerativeModel.forward`."""
        return DiffusionDistribution(self, context)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        """Squared white standard deviations, or nats up to a constant."""
        return "nats" if self.likelihood_weighting else "sd^2"

    @property
    def _knows_divergence(self) -> bool:
        return self.parameterization == "velocity" and hasattr(self.network, "with_divergence")

    @property
    def solver(self) -> FixedStep:
        """How the probability flow is solved on the grid of angles; assign another, or ``None`` for the calibrated."""
        return RK4(self._steps) if self._given is None else self._given

    @solver.setter
    def solver(self, solver: FixedStep | None) -> None:
        self._given = solver
        self.constructor_arguments = {**self.constructor_arguments, "solver": solver}  # to be saved

    @property
    def cost(self) -> Cost:
        """Evaluations of the network, the same both ways."""
        return Cost(sample=self.solver.evaluations, score=self.solver.evaluations)

    @property
    def log_prob_error(self) -> float:
        """Largest error of a log density by the solver, in nats, found by :meth:`calibrate`; NaN before."""
        return float(self.calibration[1]) if self.calibration[1] >= 0 else math.nan

    @property
    def score_level(self) -> float:
        """Noise, in white standard deviations, at which :meth:`DiffusionDistribution.score` asks the network."""
        return self._level

    def start_at_identity(self) -> bool:
        """Zero what the default network puts out; noise is then carried to itself, up to the noise in the law."""
        network = self.network
        return isinstance(network, ResidualMLP | UNet) and zero_output_layer(network.output)

    # -- laws ----------------------------------------------------------------------------------------------------

    def sampled_by(self, sampler: Sampler | FixedStep | None = None) -> SampledLaw:
        """The law of what a sampler makes of this network: a pushforward, for noise-space inference in few calls.

        Arguments:
            sampler: by default sixteen steps of :class:`~pyro_genmods.evolve.AdamsBashforth`.
        """
        return SampledLaw(self, AdamsBashforth(16) if sampler is None else sampler)

    def energy_law(self, level: float = 0.05) -> EnergyLaw:
        """The law whose log density is the network itself, up to a constant; for ``parameterization="energy"``.

        Arguments:
            level: noise in the law, in white standard deviations.
        """
        return EnergyLaw(self, level)

    def with_score_force(self, level: float | None = None, estimated: bool = False) -> ForcedLaw:
        """The same law for ``infer.HMC``, whose leapfrogs take the network's score in one call; see its arguments."""
        return ForcedLaw(self, level, estimated)

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Squared error of the velocity, summed over features, at one noise level for each example."""
        w, c = self.white_rows(x, context)
        (centre, spread), normal = self.noise_levels, stratified_normal(len(w), w)
        t = (centre + spread * normal).exp().atan().clamp_min(self.bottom)
        noise = torch.randn_like(w)
        u = t.cos() * w + t.sin() * noise
        error = self.denoiser.velocity(t, u, self._drop(c)) - (t.cos() * noise - t.sin() * w)
        loss = error.square().sum(-1)
        if not self.likelihood_weighting:
            return loss
        # the bound on the likelihood weighs angles by cot(theta); the draws have the density below
        density = (-0.5 * normal.square()).exp() / (spread * math.sqrt(2 * math.pi))
        return loss * (t.cos().square() / density.clamp_min(1e-3))[:, 0]

    def white_rows(self, x: Tensor, context: Tensor | None = None) -> tuple[Rows, Context | None]:
        """Events and contexts as the network sees them, ``(rows, features)`` and ``(rows, columns)``."""
        y, c = self.rows(x, context)
        return self.whitening(y), self.told(c)

    def told(self, c: Tensor | None) -> Tensor | None:
        """Contexts with a column that says that they are there."""
        return c if c is None or not self.context_dropout else pad(c, (0, 1), value=1.0)

    def _drop(self, c: Tensor | None) -> Tensor | None:
        if c is None or not self.context_dropout or not self.training:
            return c
        return c * (torch.rand_like(c[:, :1]) >= self.context_dropout)

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Learn the units of data and context, and the covariance that makes data white.

        Raises:
            DataError: columns are constant or collinear.
        """
        super().standardize(x, context)
        if self.whiten == "full":
            self.whitening.fit_(self.coordinates.pull(x)[0])

    def set_moments(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the units from known moments of the unconstrained data, instead of from data.

        Arguments:
            mean: ``(features,)``.
            covariance: ``(features, features)``.
        """
        self.whitening.set_moments(mean, covariance)

    # -- accuracy ------------------------------------------------------------------------------------------------

    def after_fit(self, x: Tensor, context: Tensor | None = None) -> None:
        """Look for rows that are mixed, and calibrate the grid, the number of steps and the level of the score."""
        check_rows_apart(self.network, self.features, self._told_width)
        if self._given is None:
            self.calibrate(x=x, context=context)

    @property
    def _told_width(self) -> int:
        return (self.context_shape.numel() if self.context_shape else 0) + bool(self.context_dropout)

    def calibrate(self, tolerance: float = 1e-3, x: Tensor | None = None, context: Tensor | None = None) -> int:
        """Put the angles of the grid where the velocity needs them, and take as few steps as a tolerance allows.

        Arguments:
            tolerance: largest error of a log density in nats, over some rows.
            x: data ``(rows, *event_shape)`` of which some rows are tried; draws of the model, by default.
            context: contexts ``(rows, *context_shape)``; standard normal ones, by default.

        Returns:
            Steps of the classical Runge-Kutta method; four calls of the network each.

        Warns:
            RuntimeWarning: 128 steps (32, for more than 64 features) do not meet the tolerance; they are kept.
        """
        knots, steps, error = calibrated(self, tolerance, x, context)
        self.knots.copy_(knots)
        self._steps = steps
        self._level, worst = score_level(self, x, context)
        self.calibration.copy_(torch.tensor([float(steps), error, self._level, worst]))
        if not error <= tolerance:
            warnings.warn(
                f"calibrate: {steps} steps leave an error of {error:.2g} nats, more than the tolerance {tolerance:.2g}"
                "; train longer or with a smaller learning rate.",
                RuntimeWarning,
                stacklevel=2,
            )
        return steps

    def angles(self, steps: int, schedule: Schedule | None = None) -> Tensor:
        """A decreasing grid of angles ``(steps + 1,)`` from noise to data, the model's own or a schedule's."""
        if schedule is None:
            return angles_of(self.knots, steps).flip(0)
        return scheduled_angles(schedule, steps, (self.bottom, self.top), self.knots)

    # -- row functions -------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network as velocity, denoised datum, noise and score of white rows."""
        probes = None if self.density is Density.EXACT else self.probes
        return NetworkDenoiser(self.network, self.parameterization, probes)

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        return self.log_prob_by(self.solver, y, c)

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        angles = self.angles(self.solver.steps)
        return self.coloured(self._solve(self.denoiser.velocity, z, self.told(c), angles, self.solver))

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        angles = self.angles(self.solver.steps).flip(0)
        return self._solve(self.denoiser.velocity, self.noisy(y), self.told(c), angles, self.solver)

    def push_and_log_prob_rows(self, z: Noise, c: Context | None) -> tuple[Rows, Values]:
        angles = self.angles(self.solver.steps)
        end = self._solve(self.denoiser.augmented, pad(z, (0, 1)), self.told(c), angles, self.solver)
        return self.coloured(end[:, :-1]), normal_log_prob(z) - end[:, -1] - self._volume()

    def log_prob_by(self, solver: FixedStep, y: Rows, c: Context | None) -> Values:
        """Log density of rows by a solver of the caller's choice, on the model's grid."""
        angles = self.angles(solver.steps).flip(0)
        end = self._solve(self.denoiser.augmented, pad(self.noisy(y), (0, 1)), self.told(c), angles, solver)
        return normal_log_prob(end[:, :-1]) + end[:, -1] - self._volume()

    def score_rows(self, y: Rows, c: Context | None, level: float | None = None) -> Rows:
        """Score of rows by one call of the network, at a level of noise."""
        level = self.score_level if level is None else level
        t = torch.full((), math.atan(level), dtype=y.dtype, device=y.device)
        score = self.denoiser.score(t, self.whitening(y) * t.cos(), self.told(c)) * t.cos()
        return self.whitening.gradient(score)

    # -- pieces --------------------------------------------------------------------------------------------------

    def noisy(self, y: Rows) -> Rows:
        """Rows as noisy white rows at the smallest angle, where the law of the model lives."""
        return self.whitening(y) * math.cos(self.bottom)

    def coloured(self, u: Rows) -> Rows:
        """The inverse of :meth:`noisy`."""
        return self.whitening.inverse(u / math.cos(self.bottom))

    def _volume(self) -> Tensor | float:
        return self.whitening.log_scale() - self.features * math.log(math.cos(self.bottom))

    def _solve(self, field: Any, y: Tensor, c: Tensor | None, angles: Tensor, solver: Solver) -> Tensor:
        return odeint(
            field,
            y,
            angles,
            solver,
            context=c,
            parameters=tuple(self.network.parameters()),
            strict=bool(Distribution._validate_args),  # a lost chain must not end the others
        )

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps, self._level = int(self.calibration[0]), float(self.calibration[2])
