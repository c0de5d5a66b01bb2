"""What the kernels share: a potential, the chains on it, their warm-up, and Pyro's protocol for one chain."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions import Transform

from ..foundation.chains import Info, State, Step, start
from ..foundation.errors import DensityError, SamplingError, ShapeError
from .functions import FunctionProgram
from .potential import Potential, potential
from .randoms import Stream
from .sites import refuse_estimates
from .warmup import WarmUp, descend, find_step_size

__all__ = ["ChainKernel"]

DEFAULT_STEP = 0.5  # of a kernel that neither looks for a step size nor is given one
TYPICAL_LEAPFROGS = 8.0  # of a trajectory, before anything is known


class ChainKernel(MCMCKernel):
    """What all kernels share: a potential, chains on it, and their warm-up.

    Attributes:
        exact: whether the stationary law is the posterior. ``tempered``: whether chains have temperatures.
        state: of all chains.
        warmup: what has been learned so far.
        potential: the traced potential; kept between runs where the data have the same shapes.
        last: step size and leapfrogs of the last iteration.
    """

    exact: ClassVar[bool] = True
    tempered: ClassVar[bool] = False
    target: ClassVar[float]
    length: ClassVar[float | None] = None

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: bool | None = None,
        transforms: Mapping[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: Any = init_to_uniform,
        target_accept_prob: float | None = None,
        level: str = "auto",
        road: str | None = None,
        max_batch: int | None = None,
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError(
                "kernel: needs either model or potential_fn, got " + ("none." if model is None else "both.")
            )
        if step_size is not None and not step_size > 0:
            raise ValueError(f"step_size: got {step_size}, needs a positive number, or None to look for one.")
        if target_accept_prob is not None and not 0 < target_accept_prob < 1:
            raise ValueError(f"target_accept_prob: got {target_accept_prob}, needs a number between 0 and 1.")
        self.model, self.potential_fn = model, potential_fn
        self.step_size, self.full_mass, self.init_strategy = step_size, full_mass, init_strategy
        self.target_accept_prob = target_accept_prob or self.target
        self._adapt = {"step_size": adapt_step_size, "scale": adapt_mass_matrix, "length": True}
        self._transforms, self._max_plate_nesting = transforms, max_plate_nesting
        self._options = {"level": level, "max_batch": max_batch}
        self._road = road
        self.potential: Potential | None = None
        self._clear()

    def _clear(self) -> None:
        self.state: State | None = None
        self.warmup: WarmUp | None = None
        self.stream: Stream | None = None
        self.iteration = 0
        self._given: dict[str, Tensor] | None = None
        self._returned: dict[str, Tensor] | None = None
        self._acceptance, self._divergences = 0.0, []
        self.last: tuple[float, int] = (math.nan, 0)

    # -- many chains --------------------------------------------------------------------------------------------------

    def begin(
        self,
        num_chains: int,
        warmup_steps: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        initial_params: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
        groups: int | None = None,
        num_samples: int = 0,
    ) -> None:
        """Place the chains and get ready to warm up.

        Arguments:
            num_chains, warmup_steps: how many.
            args, kwargs: of the model.
            initial_params: unconstrained values ``(chains, *shape)`` of every site, as in Pyro.
            seed: of all random numbers, the starting points among them; default one drawn by torch's generator.
            num_samples: iterations after the warm-up, as far as known; decides whether compiling pays.
            groups: number of different starting points; chains of a group are neighbours and start at one point.

        Raises:
            SamplingError: no start with finite energy and gradient was found.
            DensityError: the density of a site is estimated with frozen probes, and its user has not accepted that.
        """
        self._clear()
        found = self._find_potential(args, kwargs or {}, initial_params)
        refuse_estimates(found.program, f"infer.{type(self).__name__}")
        self.potential = found
        self._samples = num_samples
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._launch(self._place(num_chains, initial_params, groups, seed), seed, warmup_steps)

    def _launch(self, position: Tensor, seed: int, warmup_steps: int) -> None:
        """Everything that a run needs besides its potential, from where the chains start."""
        energy, self.stream = self.potential, Stream(seed, position)
        if not self.exact and getattr(energy.program, "surrogate", False):
            raise DensityError(
                f"model: has a force that stands in for a gradient, which only an accept test makes right, and "
                f"{type(self).__name__} has none; use infer.HMC or infer.MALA."
            )
        self.state, found = start(position, energy), self.step_size
        self._plan(warmup_steps + self._samples, TYPICAL_LEAPFROGS if self.length else 1.0)
        if warmup_steps and self._adapt["step_size"]:
            self.state, sizes = descend(self.state, energy, self.stream.next)
            found = found or float(sizes.median())
        adapt = frozenset(name for name, wanted in self._adapt.items() if wanted)
        self.warmup = WarmUp(
            warmup_steps,
            self.state.position,
            target=self.target_accept_prob,
            step_size=found or DEFAULT_STEP * energy.dim**-0.25,
            dense=self.full_mass,
            length=self.length,
            adapt=adapt,
        )

    def advance(self) -> Info:
        """One iteration of all chains; learns from it during warm-up."""
        before, warmup = self.state, self.warmup
        time, leapfrogs = self._duration()
        noise, log_uniform = self.stream.next()
        step = Step(warmup.size(), warmup.scale, noise, log_uniform, leapfrogs)
        self.state, info = self._transition(before, step)
        self.last = (warmup.step_size, leapfrogs)
        if warmup.update(before, self.state, info, time):
            warmup.around(find_step_size(self.state, self.potential, self.stream.next, warmup.scale, 1.0))
        if warmup.finished and self.iteration + 1 == warmup.iterations:
            self._plan(self._samples, self._expected_leapfrogs())
        self.iteration += 1
        return info

    def _plan(self, iterations: int, leapfrogs: float) -> None:
        """Decide by counting, not by the clock, so that a run can be repeated bit for bit."""
        self.potential.plan(iterations * leapfrogs)

    def _expected_leapfrogs(self) -> float:
        return 1.0

    def _transition(self, state: State, step: Step) -> tuple[State, Info]:
        raise NotImplementedError

    def _duration(self) -> tuple[float, int]:
        """Duration of the next trajectory relative to the mean, and its leapfrogs."""
        return 1.0, 1

    def _find_potential(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        initial_params: Mapping[str, Tensor] | None,
    ) -> Potential:
        if self.model is not None:
            if self.potential is not None and self.potential.update(args, kwargs):
                return self.potential
            options = {"transforms": self._transforms, "max_plate_nesting": self._max_plate_nesting}
            options["tempered"] = self.tempered
            return potential(self.model, args, kwargs, road=self._road, **options, **self._options)
        if isinstance(self.potential_fn, Potential):
            return self.potential_fn
        if initial_params is None:
            raise ValueError("initial_params: needed with potential_fn, which does not say what it is a function of.")
        one = {name: value[0] for name, value in initial_params.items()}
        first = next(iter(one.values()))
        shapes = {name: value.shape for name, value in one.items()}
        program = FunctionProgram(self.potential_fn, shapes, self._transforms, (first.dtype, first.device))
        return Potential(program, **self._options)

    def _place(
        self, num_chains: int, initial_params: Mapping[str, Tensor] | None, groups: int | None, seed: int
    ) -> Tensor:
        if initial_params is not None:
            q = self.potential.layout.flatten(initial_params, 1).to(self.potential.dtype)
            if len(q) != num_chains:
                raise ShapeError(f"initial_params: has values for {len(q)} chains, needs {num_chains}.")
            self.potential.inverse_temperature = torch.ones_like(q[:, 0])
            value, gradient = self.potential.value_and_grad(q)
            bad = ~(value.isfinite() & gradient.isfinite().all(-1))
            if bool(bad.any()):
                raise SamplingError(
                    f"initial_params: the energy or its gradient is not finite for {int(bad.sum())} of {num_chains} "
                    f"chains, the first of them chain {int(bad.nonzero()[0])}; move them, or leave them out."
                )
            return q
        devices = [self.potential.device] if self.potential.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # strategies draw from the global generator
            torch.manual_seed(seed)
            points = self.potential.initial(groups or num_chains, self.init_strategy)
        return points.repeat_interleave(num_chains // len(points), 0).contiguous()

    # -- to and from disk ---------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which :meth:`advance` goes on as if nothing had happened."""
        tensors, numbers = self.warmup.state_dict()
        before, used = self.stream.state()
        tensors = {**tensors, **self.state._asdict(), "generator": before}
        return tensors, {**numbers, "kernel_iteration": self.iteration, "used": used}

    def load_state_dict(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; after :meth:`begin`."""
        self.warmup.load_state_dict(tensors, numbers)
        self.state = State(tensors["position"], tensors["energy"], tensors["gradient"])
        self.stream.set_state(tensors["generator"], numbers["used"])
        self.iteration = numbers["kernel_iteration"]

    # -- one chain, by Pyro's protocol --------------------------------------------------------------------------------

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Called by ``pyro.infer.MCMC`` before a chain."""
        given = self._given
        self._clear()
        self._given, self._setup = given, (warmup_steps, args, kwargs)
        if given is not None or self.model is not None or isinstance(self.potential_fn, Potential):
            self._begin_one()

    def _begin_one(self) -> None:
        given, (warmup_steps, args, kwargs) = self._given, self._setup
        one = None if given is None else {name: value.detach()[None] for name, value in given.items()}
        self.begin(1, warmup_steps, args, kwargs, initial_params=one)
        self._given = given

    def cleanup(self) -> None:
        """Called by ``pyro.infer.MCMC`` after a chain, sometimes twice."""
        self._clear()

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """Unconstrained values at which a chain starts."""
        return self._given if self.state is None else self._params()

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._given = params
        if getattr(self, "_setup", None) is not None:
            self._begin_one()

    @property
    def transforms(self) -> dict[str, Transform]:
        """Maps of sites to unconstrained space."""
        return dict(self._transforms or {}) if self.potential is None else self.potential.transforms

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One iteration of one chain from unconstrained values."""
        if params is not self._returned:
            row = self.potential.layout.flatten(params)[None].to(self.potential.dtype)
            if not torch.equal(row, self.state.position):
                self.state = start(row, self.potential)
        info = self.advance()
        drawn = self.iteration - self.warmup.iterations
        if drawn > 0:
            self._acceptance += (float(info.acceptance) - self._acceptance) / drawn
            if bool(info.diverging):
                self._divergences.append(drawn - 1)
        self._returned = self._params()
        return self._returned

    def _params(self) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.potential.layout.unflatten(self.state.position).items()}

    def logging(self) -> OrderedDict[str, str]:
        """What Pyro's progress bar shows."""
        size, leapfrogs = self.last
        return OrderedDict(
            [
                ("step size", f"{size:.2e}"),
                ("leapfrogs", str(leapfrogs)),
                ("acc. prob", f"{self._acceptance:.3f}"),
            ]
        )

    def diagnostics(self) -> dict[str, Any]:
        """What Pyro keeps of a chain."""
        return {"divergences": list(self._divergences), "acceptance rate": self._acceptance}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": None, "potential": None, "state": None, "warmup": None}
