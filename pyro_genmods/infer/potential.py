r"""The potential energy of a Pyro program: traced once, run for many chains at once.

:func:`potential` turns a program and its data into an object that answers, for rows ``q`` of ``(chains, dim)``
unconstrained numbers, what samplers ask: :math:`U(q)`, :math:`\nabla U(q)`, or both. There are three levels:

=========== ==================================================== =====================================
level       what runs                                            when
=========== ==================================================== =====================================
eager       the program itself, on all chains together           where recording fails
graph       a flat graph of tensor operations, no program in it  from the first call
compiled    the graph, fused by torch's compiler                 where it pays for its own compilation
=========== ==================================================== =====================================

Compiling costs seconds. With ``level="auto"`` a function is compiled once its graph has cost about as much time as
compiling is expected to: a short run never waits for the compiler, and a long one loses at most a factor of two on that
wait. A sampler that knows how long it will run says so (:meth:`Potential.plan`). Both decide by counting operations and
calls, not by the clock, because a compiled function rounds differently, and a run with a seed must repeat itself.

Value and gradient are separate graphs. A density that is dear while its gradient is cheap (an integral whose derivative
is one network call) costs only the gradient inside a leapfrog, and its value once in the accept test.

The energy of a *tempered* potential is that of the prior plus :math:`\beta` times that of the likelihood, with an
inverse temperature :math:`\beta` for each chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions import Transform

from ..foundation.errors import ModelError, SamplingError, ShapeError
from .functions import FunctionProgram
from .fusion import Fused
from .intractable import refuse_doubly_intractable
from .layout import Layout
from .program import Program
from .quiet import value_and_grad
from .tilt import untilted

__all__ = ["Potential", "potential"]

LEVELS = ("auto", "eager", "graph", "compiled")
UNIFORM = 2.0  # half width of Pyro's and Stan's start in unconstrained space
TRIES = 100


def potential(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    level: str = "auto",
    road: str | None = None,
    max_batch: int | None = None,
    tempered: bool = False,
    transforms: Mapping[str, Transform] | None = None,
    max_plate_nesting: int | None = None,
) -> Potential:
    r"""Trace a Pyro program into a potential energy for many chains.

    Arguments:
        model: a Pyro program. Discrete latents with a finite support are summed out.
        args, kwargs: its arguments; the tensors among them may later be replaced, see :meth:`Potential.update`.
        level: ``"auto"``, ``"eager"``, ``"graph"`` or ``"compiled"``, see above.
        road: how one chain becomes many: ``"vmap"``, ``"plate"``, ``"loop"``, or ``None`` to find out.
        max_batch: most chains in one evaluation; more are done in turns, with bounded memory.
        tempered: whether the likelihood has an inverse temperature; the tilts of energies are then part of it.
        transforms: maps of sites to unconstrained space, as in Pyro's kernels; default those of the supports.
        max_plate_nesting: number of nested plates, where it cannot be guessed (enumeration).

    Raises:
        ModelError: the program cannot be sampled with gradients (minibatches, discrete sites without enumeration,
            branches on latents, randomness that is no site), or a road disagrees with Pyro's own potential.
        DoublyIntractableError: the unknown constant of an energy depends on a latent.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.Exponential(1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> energy = potential(model, (torch.tensor([1.0, -1.0]),))
        >>> value, gradient = energy.value_and_grad(torch.zeros(4, 1))      # four chains at log scale 0
        >>> value[0], gradient[0]           # 2 log(2 pi) / 2 + 1/2 + 1/2 + exp(0) - 0;  2 - 2 + 1 - 1
        (tensor(3.8379), tensor([0.]))
        >>> energy.constrain(torch.zeros(4, 1))["scale"].shape
        torch.Size([4])
    """
    refuse_doubly_intractable(model, args, kwargs, "the sampler")
    model = untilted(model) if tempered else model
    program = Program(model, args, kwargs, transforms=transforms, max_plate_nesting=max_plate_nesting, road=road)
    return Potential(program, level=level, max_batch=max_batch, tempered=tempered)


class Potential:
    """Potential energy of many chains; made by :func:`potential`.

    Arguments:
        program: what gives energies of rows.
        level, max_batch, tempered: as in :func:`potential`.

    Attributes:
        dim: length of a row. ``layout``: which site lies where in it.
        dtype, device: of rows.
        num_gradients: gradients evaluated so far, counted chain by chain.
        inverse_temperature: of each chain, ``(chains,)``; only where tempered.
        report: what was chosen, and why.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> energy = potential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> energy.grad(torch.tensor([[1.0], [-2.0]])).flatten()
        tensor([ 1., -2.])
        >>> energy.report["road"], energy.report["level"]
        ('vmap', 'graph')
    """

    def __init__(
        self,
        program: Program | FunctionProgram,
        *,
        level: str = "auto",
        max_batch: int | None = None,
        tempered: bool = False,
    ) -> None:
        if level not in LEVELS:
            raise ValueError(f"level: got {level!r}, needs one of {LEVELS}.")
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch: got {max_batch}, needs a number of chains, or None for all at once.")
        self.program, self.level, self.max_batch, self.tempered = program, level, max_batch, tempered
        self.mode: str | None = None
        self.uncompiled = False
        self.layout: Layout = program.layout
        self.dim = self.layout.dim
        self.dtype, self.device = program.place
        self.num_gradients = 0
        self.inverse_temperature: Tensor | None = None
        self._data = tuple(x.detach().contiguous() for x in program.data)
        self._fused: dict[Any, Fused] = {}
        self._notes: list[str] = list(program.why)

    # -- what samplers ask ------------------------------------------------------------------------------------------

    def value(self, q: Tensor) -> Tensor:
        """Energies ``(chains,)``, in nats."""
        return self._call(_value, q)

    def grad(self, q: Tensor) -> Tensor:
        """Gradients of the energy, ``(chains, dim)``."""
        self.num_gradients += len(q)
        return self._call(_grad, q)

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for little more than the price of the gradient."""
        self.num_gradients += len(q)
        return self._call(_value_and_grad, q)

    def parts(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Energies of the prior and of the likelihood, two of ``(chains,)``, at inverse temperature one."""
        return self._call(_parts, q)

    def prior_value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Energies of the prior alone, and their gradients, by running the program."""
        program = self.program
        return value_and_grad(lambda rows: program.energies(rows, self._data)[0], q, program.enumerated)

    def constrain(self, q: Tensor) -> dict[str, Tensor]:
        """Rows ``(..., dim)`` to values of the sites in their supports, ``(..., *shape)``."""
        return self.layout.constrain(q)

    def initial(self, num_chains: int = 1, strategy: Any = init_to_uniform) -> Tensor:
        """Rows to start from, ``(chains, dim)``, with finite energy and gradient.

        Arguments:
            num_chains: how many.
            strategy: an initialisation strategy of Pyro, :func:`pyro_genmods.infer.init_to_prior`, or something with
                ``sample_posterior(n)`` (a guide, an :class:`pyro_genmods.infer.SMC` after its run).

        Raises:
            SamplingError: after many tries some chain still has no finite energy; the sites are named.
        """
        q = self._propose(strategy, num_chains)
        for _ in range(TRIES):
            bad = ~self._usable(q)
            if not bool(bad.any()):
                return q
            q = torch.where(bad[:, None], self._propose(strategy, num_chains), q)
        value, gradient = self.value_and_grad(q)
        columns = (~gradient.isfinite()).any(0).nonzero().flatten().tolist()
        names = [self.layout.coordinates()[i] for i in columns] or list(self.layout.shapes)
        raise SamplingError(
            f"init_strategy: found no start with finite energy and gradient for {int(bad.sum())} of {num_chains} "
            f"chains in {TRIES} tries (energy {float(value[bad][0]):.4g}; look at {', '.join(names[:5])}). Pass "
            "initial_params, or init_strategy=infer.init_to_prior, or a guide."
        )

    def update(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Take new data of the same shapes and keep all graphs; ``False`` if a new potential is needed instead.

        The graphs are compared with Pyro's own potential at the new data, so that what changed behind their back (a
        tensor that the program holds on to, a branch on the data) is noticed.
        """
        data = self.program.data_of(args, kwargs) if isinstance(self.program, Program) else None
        if data is None:
            return False
        before, counted = (self._data, self.inverse_temperature), self.num_gradients
        self._data = tuple(x.detach().contiguous() for x in data)
        q = torch.rand(1, self.dim, dtype=self.dtype, device=self.device) * 2 - 1
        try:
            fits = all(self._agrees(q, size) for size in {n for fused in self._fused.values() for n in fused.sizes})
        except (ModelError, RuntimeError):
            fits = False
        self.inverse_temperature, self.num_gradients = before[1], counted
        if not fits:
            self._data = before[0]
        return fits

    def fuse(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        """A function of tensors that uses this potential, recorded and compiled as one with it.

        Arguments:
            function: ``function(potential, *tensors)`` to tensors; pure, without branches on numbers. As ``potential``
                it is given something with ``value``, ``grad``, ``value_and_grad`` and ``parts``.
            tensors: arguments of the first call, the first of which has a row for each chain.

        Returns:
            A function of tensors of these shapes, for as long as data and temperatures stay.
        """
        if self.max_batch is not None and len(tensors[0]) > self.max_batch:
            return partial(function, _InTurns(self))
        if function not in self._fused:
            self._fused[function] = Fused(self, function)
        return self._fused[function].bind(tensors)

    def plan(self, calls: float) -> None:
        """Decide between graph and compiled for so many gradients to come; only with ``level="auto"``."""
        if self.level == "auto":
            seconds, compile_seconds = max((fused.cost() for fused in self._fused.values()), default=(0.0, math.inf))
            self.mode = "compiled" if calls * seconds > 2 * compile_seconds else "graph"

    # -- Pyro's form --------------------------------------------------------------------------------------------------

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """Energy of one chain at unconstrained values, differentiable: a ``potential_fn`` for Pyro's kernels."""
        return _PyroEnergy.apply(self.layout.flatten(params), self)

    @property
    def transforms(self) -> dict[str, Transform]:
        """Maps of sites to unconstrained space, for Pyro's kernels."""
        return self.layout.transforms

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """A start of one chain, for Pyro's kernels."""
        return {name: value[0] for name, value in self.layout.unflatten(self.initial(1)).items()}

    @property
    def report(self) -> dict[str, Any]:
        """The road and level in use, and what stood in the way of higher ones."""
        levels = [fused.level for fused in self._fused.values() if fused.level]
        level = max(levels, key=LEVELS.index) if levels else "none yet"
        return {"road": self.program.road, "level": level, "dim": self.dim, "why": list(self._notes)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": {}}

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[Tensor, ...]:
        """What graphs need besides the arguments of a function: temperatures and data."""
        if self.tempered and self.inverse_temperature is None:
            raise ValueError("inverse_temperature: is not set; a tempered potential needs one for each chain.")
        return (self.inverse_temperature, *self._data) if self.tempered else self._data

    def energy(self, q: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Energies by running the program."""
        if not self.tempered:
            return self.program.energies(q, inputs)[1]
        (prior, joint), beta = self.program.energies(q, inputs[1:]), inputs[0]
        # At zero even an infinite energy counts nothing.
        return prior + torch.where(beta > 0, beta * (joint - prior), 0.0)

    def _call(self, function: Callable[..., Any], q: Tensor) -> Any:
        if q.dim() != 2 or q.shape[1] != self.dim:
            raise ShapeError(f"q: got shape {tuple(q.shape)}, needs (chains, {self.dim}).")
        most = self.max_batch
        if most is None or len(q) <= most:
            return self.fuse(function, (q,))(q.contiguous())
        temperatures, outcomes = self.inverse_temperature, []
        for start in range(0, len(q), most):
            rows = torch.arange(start, start + most, device=q.device).clamp_max(len(q) - 1)  # the last chunk is padded
            self.inverse_temperature = temperatures[rows] if self.tempered else None
            chunk = q[rows]
            outcomes.append(self.fuse(function, (chunk,))(chunk))
        self.inverse_temperature = temperatures
        if isinstance(outcomes[0], tuple):
            return tuple(torch.cat(parts)[: len(q)] for parts in zip(*outcomes, strict=True))
        return torch.cat(outcomes)[: len(q)]

    def _agrees(self, q: Tensor, chains: int) -> bool:
        """Whether all that was recorded for so many chains still gives what Pyro gives, at one row."""
        rows = q.expand(chains, -1).contiguous()
        self.inverse_temperature = torch.ones_like(rows[:, 0]) if self.tempered else None
        used = {function for function, fused in self._fused.items() if chains in fused.sizes}
        if used - READABLE and _value_and_grad not in used:
            return False  # what is fused with a sampler is checked by the energy that was recorded before it
        value, gradient = self.value_and_grad(rows)
        self.program.compare(q, self._data, value[:1], gradient[:1])
        again = {_value: self.value, _grad: self.grad, _parts: lambda rows: sum(self.parts(rows))}
        expected = {_value: value, _grad: gradient, _parts: value}
        tolerance = 1e-3 if self.dtype == torch.float32 else 1e-6
        pairs = ((again[function](rows), expected[function]) for function in used & again.keys())
        return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True) for x, y in pairs)

    def _propose(self, strategy: Any, chains: int) -> Tensor:
        if hasattr(strategy, "sample_posterior"):
            values = {name: x.detach() for name, x in strategy.sample_posterior(chains).items()}
            return self.layout.unconstrain({name: values[name] for name in self.layout.shapes if name in values}, 1)
        if strategy is init_to_uniform or not isinstance(self.program, Program):
            uniform = torch.rand(chains, self.dim, dtype=self.dtype, device=self.device)
            return UNIFORM * (2 * uniform - 1)
        return self.program.start(strategy, chains)

    def _usable(self, q: Tensor) -> Tensor:
        if self.tempered:
            self.inverse_temperature = torch.ones_like(q[:, 0])
        value, gradient = self.value_and_grad(q)
        return value.isfinite() & gradient.isfinite().all(-1)

    def note(self, text: str) -> None:
        """Add to the report, once."""
        if text not in self._notes:
            self._notes.append(text)


class _InTurns:
    """A potential that takes its rows in turns, as a function that is given too many sees it."""

    def __init__(self, owner: Potential) -> None:
        self.owner, self.num_gradients = owner, 0  # counted outside

    def value(self, q: Tensor) -> Tensor:
        return self.owner._call(_value, q)

    def grad(self, q: Tensor) -> Tensor:
        return self.owner._call(_grad, q)

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self.owner._call(_value_and_grad, q)

    def fuse(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        return partial(function, self)


class _PyroEnergy(torch.autograd.Function):
    """The energy of one chain, with its gradient computed beside it."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, energy: Potential) -> Tensor:
        value, gradient = energy.value_and_grad(row.detach()[None])
        ctx.save_for_backward(gradient[0])
        return value[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return cotangent * gradient, None


def _value(energy: Any, q: Tensor) -> Tensor:
    return energy.value(q)


def _grad(energy: Any, q: Tensor) -> Tensor:
    return energy.grad(q)


def _value_and_grad(energy: Any, q: Tensor) -> tuple[Tensor, Tensor]:
    return energy.value_and_grad(q)


def _parts(energy: Any, q: Tensor) -> tuple[Tensor, Tensor]:
    return energy.parts(q)


READABLE = {_value, _grad, _value_and_grad, _parts}
