r"""Continuous flows: noise carried to data by an ordinary differential equation.

A network :math:`v(t, y, c)` is the velocity at time :math:`t` of a fluid that starts as standard normal noise and ends
as the data. A point moves, and its density changes, by

.. math:: \dot y = v(t, y, c), \qquad \frac{\mathrm d}{\mathrm dt} \log p_t(y) = -\nabla \cdot v(t, y, c),
          \qquad y(0) = z \sim \mathcal N(0, I), \quad y(1) = x ,

the *instantaneous change of variables*, so that along the path that ends in :math:`x`

.. math:: \log p(x) = \log \mathcal N(z; 0, I) - \int_0^1 \nabla \cdot v(t, y(t), c) \,\mathrm dt .

Both directions take the same number of network calls, and the density is exact up to the tolerance of the solver, which
the distribution states, if the divergence is; with probes instead (see :mod:`pyro_genmods.foundation.divergence`) it is
an estimate that stays the same as long as the probes do.

The velocity is learned by regression on straight lines (``"flow_matching"``, which solves no equation) or by maximum
likelihood (``"likelihood"``, which solves one at every step).

References:
    R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud, Neural Ordinary Differential Equations, 2018,
    arXiv:1806.07366. W. Grathwohl et al., FFJORD, 2018, arXiv:1810.01367. Y. Lipman et al., Flow Matching for
    Generative Modeling, 2022, arXiv:2210.02747. X. Liu, C. Gong, Q. Liu, Flow Straight and Fast: Learning to Generate
    and Transfer Data with Rectified Flow, 2022, arXiv:2209.03003.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from ..contract import Cost, Density, GenerativeModel
from ..coordinates import event_shape_on
from ..distribution import GenerativeDistribution
from ..foundation.divergence import rademacher
from ..foundation.errors import DensityError, ShapeError
from ..foundation.flow_matching import late_times, straight_line
from ..foundation.networks import place_of, zero_output_layer
from ..foundation.numerics import normal_log_prob
from ..foundation.ode import RK4, Solver, odeint
from ..foundation.runge_kutta import Field
from ..foundation.shapes import Context, Noise, Rows, Values
from ..foundation.vector_field import VectorField
from .accuracy import error_of, steps_needed, straightness_of
from .fluid import Fluid, check_velocity
from .pairing import optimal_pairing
from .pairs import Pairs

__all__ = ["ContinuousDistribution", "ContinuousFlow"]

COUPLINGS = ("independent", "optimal_transport", "rectified")


class ContinuousDistribution(GenerativeDistribution):
    """A continuous flow at a context: a Pyro distribution that says how well its equation is solved."""

    model: ContinuousFlow

    @property
    def evaluations(self) -> int | None:
        """Sequential network calls of a draw or a density; of the last one, where the solver decides."""
        return self.model.evaluations

    @property
    def tolerance(self) -> float:
        """Largest error of a log density by the solver, in nats, over 256 draws (see :meth:`ContinuousFlow.error`)."""
        return self.model.error(self.context)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, solver={self.model.solver})"


class ContinuousFlow(GenerativeModel):
    r"""A learnable flow in continuous time.

    Arguments:
        features: number of unconstrained coordinates.
        context_features: number of context features.
        objective: what is minimised: ``"flow_matching"`` or the negative ``"likelihood"`` in nats.
        trace: ``"exact"``, or ``"hutchinson"`` for an estimate of the divergence. The default network has its exact
            divergence for the price of one more layer; the estimate is for large networks of your own.
        coupling: of flow matching: ``"independent"`` pairs of noise and data, or ``"optimal_transport"`` within a
            batch, which makes paths straighter and takes :math:`O(\mathrm{batch}^3)`; without context only.
            ``"rectified"`` pairs are what :meth:`rectify` learns from.
        solver: ``RK4(steps)``, ``Heun``, ``Euler`` or ``DormandPrince(rtol, atol)``. By default ``RK4``, with as many
            steps as :meth:`calibrate` finds necessary, which ``fit`` runs at its end (16, before).
        hidden_features: widths of the default network; three layers of 128 for up to eight features, and two of 256
            beyond, whose exact divergence costs the same for any number of features.
        network: a velocity of your own, called as ``network(t, y, c)`` with ``t`` ``(rows, 1)``, ``y`` ``(rows,
            features)``, and ``c`` ``(rows, context_features)`` or ``None``; each row must depend on its own row alone.
        probes: number of probes of the estimate.
        estimated: let chains accept and reject by an estimate. They then sample the law of its frozen probes, not that
            of the flow; without it they refuse.
        baseline: add the velocity of standard normal data to the network's, which then learns the rest; by default with
            flow matching of independent pairs.
        support, event_shape: where events live, and the shape of one; default ``(features,)``, or what the support
            makes of it.

    Shape:
        events ``event_shape``, contexts ``(context_features,)``; log densities in nats per event.

    Raises:
        ShapeError: event shape and features disagree, or the network returns another shape.
        ValueError: an unknown objective, trace or coupling, or optimal transport with a context, of which the noise
            would no longer be independent.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> flow = gm.ContinuousFlow(2, hidden_features=(32, 32))
        >>> history = gm.fit(flow, torch.randn(500, 2).exp(), max_epochs=2, seed=0, progress_bar=False)
        >>> law = flow()
        >>> x, log_prob = law.rsample_and_log_prob((5,))
        >>> torch.allclose(log_prob, law.log_prob(x), atol=1e-2), law.density.name, law.tolerance < 1e-2
        (True, 'EXACT', True)
    """

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        objective: Literal["flow_matching", "likelihood"] = "flow_matching",
        *,
        trace: Literal["exact", "hutchinson"] = "exact",
        coupling: Literal["independent", "optimal_transport", "rectified"] = "independent",
        solver: Solver | None = None,
        hidden_features: Sequence[int] | None = None,
        network: nn.Module | None = None,
        probes: int = 1,
        estimated: bool = False,
        baseline: bool | None = None,
        support: constraints.Constraint | None = None,
        event_shape: tuple[int, ...] | None = None,
    ) -> None:
        _check("objective", objective, ("flow_matching", "likelihood"))
        _check("trace", trace, ("exact", "hutchinson"))
        _check("coupling", coupling, COUPLINGS)
        if probes < 1:
            raise ValueError(f"probes: got {probes}, needs at least 1.")
        if coupling == "optimal_transport" and context_features:
            raise ValueError(
                "coupling: pairs at the least distance make the noise depend on the context, and the model learns "
                "another conditional law; use coupling='independent' with a context."
            )
        support = support or constraints.real
        shape = Size(event_shape) if event_shape is not None else event_shape_on(support, Size([features]))
        super().__init__(shape, (context_features,) if context_features else (), support)
        if self.features != features:
            raise ShapeError(
                f"event_shape {tuple(shape)} on {support} has {self.features} coordinates, features is {features}."
            )
        self.objective, self.trace, self.coupling = objective, trace, coupling
        self.baseline = objective == "flow_matching" and coupling == "independent" if baseline is None else baseline
        self.density = Density.EXACT if trace == "exact" else Density.ESTIMATE
        self.acceptable = trace == "exact" or estimated
        if network is None:
            network = VectorField(features, context_features, hidden_features)
        check_velocity(network, features, context_features)
        self.network = network
        self.register_buffer("probes", rademacher(probes, features))
        self.register_buffer("steps", torch.tensor(16))
        self.register_buffer("times", torch.tensor([0.0, 1.0]), persistent=False)
        self._given, self._steps, self._last = solver, 16, None
        self._teacher: tuple[ContinuousFlow, ...] = ()
        self._pairs: Pairs | None = None
        self.to(*reversed(place_of(self.network)))

    def forward(self, context: Tensor | None = None) -> ContinuousDistribution:
        """The distribution at a context, see :meth:`pyro_genmods.GenerativeModel.forward`."""
        return ContinuousDistribution(self, context)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        """Nats, or the square of standard deviations a unit of time."""
        return "nats" if self.objective == "likelihood" else "sd^2"

    @property
    def solver(self) -> Solver:
        """How the equation is solved; assign another at any time, or ``None`` for the default."""
        return RK4(self._steps) if self._given is None else self._given

    @solver.setter
    def solver(self, solver: Solver | None) -> None:
        self._given = solver
        self.constructor_arguments = {**self.constructor_arguments, "solver": solver}  # to be saved

    @property
    def cost(self) -> Cost:
        """Evaluations of the network, the same both ways; ``None`` where the solver decides."""
        return Cost(sample=self.solver.evaluations, score=self.solver.evaluations)

    @property
    def evaluations(self) -> int | None:
        """Sequential network calls of a draw or a density; of the last one, where the solver decides."""
        return self.solver.evaluations or self._last

    def start_at_identity(self) -> bool:
        """Zero what the default network puts out; noise is then carried to itself."""
        return isinstance(self.network, VectorField) and zero_output_layer(self.network.output)

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Squared error of the velocity summed over features, or the negative log-likelihood in nats, per example."""
        law = self(context)
        _, rows, c = law._rows(x, self.event_shape)
        y, volume = self.coordinates.pull(rows, known_inside=self.coordinates.identity)
        if self.objective == "likelihood":
            fresh = self.trace == "hutchinson" and self.training
            probes = rademacher(1, *y.shape, dtype=y.dtype, device=y.device) if fresh else None
            return -(self.log_prob_by(None, y, c, probes) + volume)
        t = late_times(len(y), y)
        line, velocity = straight_line(self._partners(y, c), y, t)
        return (self._fluid().velocity(t, line, c) - velocity).square().sum(-1)

    def _partners(self, y: Tensor, c: Tensor | None) -> Tensor:
        """The noise that each row is joined with."""
        if self.coupling == "rectified":
            rows = y if c is None else torch.cat([y, c], 1)
            return self._by_teacher(rows) if self._pairs is None else self._pairs(rows)
        z = self._noise(len(y))
        return z[optimal_pairing(z, y)] if self.coupling == "optimal_transport" else z

    def _by_teacher(self, rows: Tensor) -> Tensor:
        """The noise that the teacher makes of rows of data and contexts."""
        if not self._teacher:
            raise DensityError("coupling: the flow that this one was rectified from is gone; call its rectify().")
        y, c = rows.split([self.features, rows.shape[1] - self.features], 1)
        with torch.no_grad():
            return self._teacher[0].to(y.device).pull_rows(y, c if self.context_shape else None)

    def rectify(self) -> ContinuousFlow:
        """A flow that starts as a copy of this one and, when fitted to the same data, learns to be straight.

        Each example is joined with the noise that *this* flow carries to it. Such lines do not cross, so that the new
        flow needs few steps: fit it, and it finds out how few. It keeps a frozen copy of this one, which is not saved.

        Reference:
            X. Liu, C. Gong, Q. Liu, Flow Straight and Fast, 2022, arXiv:2209.03003.

        Example:
            >>> flow = ContinuousFlow(2, hidden_features=(16, 16))
            >>> flow.rectify().coupling
            'rectified'
        """
        arguments = {**self.constructor_arguments, "objective": "flow_matching", "coupling": "rectified"}
        if "network" in arguments:
            arguments["network"] = copy.deepcopy(self.network)
        student = type(self)(**{**arguments, "baseline": self.baseline})
        student.to(*reversed(self.place)).load_state_dict(self.state_dict())
        student._teacher = (copy.deepcopy(self).freeze(),)
        return student

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Learn the units of data and context; a rectified flow has those of its teacher, and asks it for the noise."""
        if self.coupling == "rectified":
            y, c = self.rows(x, context)
            self._pairs = Pairs(y if c is None else torch.cat([y, c], 1), self._by_teacher)
        else:
            super().standardize(x, context)

    # -- looking inside ------------------------------------------------------------------------------------------

    def velocity(self, t: Tensor, y: Rows, context: Tensor | None = None) -> Rows:
        """Velocity of rows of standardised coordinates ``(rows, features)`` at time ``t``, ``()`` or ``(rows, 1)``."""
        c = None if context is None else self(context)._context_rows(Size([len(y)]))
        return self._fluid().velocity(t, y, c)

    def path(self, z: Tensor, times: Tensor, context: Tensor | None = None) -> Tensor:
        """Where noise has come to at increasing times, in the user's units.

        Arguments:
            z: ``(*lead, features)``.
            times: ``(points,)`` within ``[0, 1]``.
            context: ``(*lead, *context_shape)`` for a conditional model.

        Returns:
            ``(points, *lead, *event_shape)``.

        Example:
            >>> ContinuousFlow(2).path(torch.randn(5, 2), torch.linspace(0, 1, 9)).shape
            torch.Size([9, 5, 2])
        """
        lead, rows, c, _ = self(context)._noise_rows(z)
        places = []
        for ends in torch.cat([self.times[:1], times.to(rows)]).unfold(0, 2, 1):
            rows = rows if ends[0] == ends[1] else self._solve(self._fluid().velocity, rows, c, ends)
            places.append(self.coordinates.push(rows)[0].reshape(lead + self.event_shape))
        return torch.stack(places)

    def straightness(self, context: Tensor | None = None) -> float:
        r"""How much paths bend, 0 for straight ones at constant speed:
        :math:`\int_0^1 \mathbb E \|v(t, y_t) - (y_1 - y_0)\|^2 \,\mathrm dt \,/\, \mathbb E \|y_1 - y_0\|^2`.
        """
        return straightness_of(self, context)

    # -- accuracy ------------------------------------------------------------------------------------------------

    def after_fit(self, x: Tensor, context: Tensor | None = None) -> None:
        """Find the number of steps that the learned field needs, where no solver was chosen; let go of pairs."""
        self._pairs = None
        if self._given is None:
            self.calibrate(x=x, context=context)

    def calibrate(self, tolerance: float = 1e-3, x: Tensor | None = None, context: Tensor | None = None) -> int:
        """Set the number of steps of the default solver to the smallest that meets a tolerance.

        Arguments:
            tolerance: largest error allowed, see :meth:`error`.
            x: data ``(rows, *event_shape)``, of which some rows are looked at besides draws.
            context: contexts ``(rows, *context_shape)``; standard normal ones, by default.

        Returns:
            The number of steps; the evaluations of the network are four times as many.

        Warns:
            RuntimeWarning: 256 steps do not meet the tolerance; they are kept.
        """
        self._steps, found = steps_needed(self, tolerance, x, context)
        self.steps.fill_(self._steps)
        if found > tolerance:
            warnings.warn(
                f"calibrate: {self._steps} steps leave an error of {found:.2g}, more than the tolerance "
                f"{tolerance:.2g}; train longer or with a smaller learning rate, rectify() the flow, or set "
                "solver=DormandPrince().",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._steps

    def error(self, context: Tensor | None = None) -> float:
        """Largest error of the solver over 256 draws: of a log density in nats, or of a draw in standard deviations."""
        return error_of(self, self.solver, context)

    # -- row functions -------------------------------------------------------------------------------------------

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        return self.log_prob_by(None, y, c)

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        return self._solve(self._fluid().velocity, z, c, self.times)

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        return self._solve(self._fluid().velocity, y, c, self.times.flip(0))

    def push_and_log_prob_rows(self, z: Noise, c: Context | None) -> tuple[Rows, Values]:
        return self.push_and_log_prob_by(None, z, c)

    def log_prob_by(self, solver: Solver | None, y: Rows, c: Context | None, probes: Tensor | None = None) -> Values:
        """Log density of rows by a solver of the caller's choice, which is NaN where it fails."""
        end = self._solve(self._fluid(probes).augmented, nn.functional.pad(y, (0, 1)), c, self.times.flip(0), solver)
        return normal_log_prob(end[:, :-1]) + end[:, -1]

    def push_and_log_prob_by(self, solver: Solver | None, z: Noise, c: Context | None) -> tuple[Rows, Values]:
        """Noise to rows and their log density by such a solver."""
        end = self._solve(self._fluid().augmented, nn.functional.pad(z, (0, 1)), c, self.times, solver)
        return end[:, :-1], normal_log_prob(z) - end[:, -1]

    # -- pieces --------------------------------------------------------------------------------------------------

    def _solve(self, field: Field, y: Tensor, c: Tensor | None, times: Tensor, solver: Solver | None = None) -> Tensor:
        report: list[int] = []
        end = odeint(
            field,
            y,
            times,
            solver or self.solver,
            context=c,
            parameters=tuple(self.network.parameters()),
            # a chain that is lost somewhere must not end the others, nor a solver that is only tried
            strict=solver is None and bool(Distribution._validate_args),
            report=report,
        )
        self._last = report[0] if solver is None else self._last
        return end

    def _fluid(self, probes: Tensor | None = None) -> Fluid:
        exact = self.trace == "exact"
        return Fluid(self.network, self.baseline, None if exact else self.probes if probes is None else probes)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = int(self.steps)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, needs {' or '.join(map(repr, known))}.")
