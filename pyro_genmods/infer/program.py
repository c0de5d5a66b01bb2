r"""A Pyro program as a function of rows: the energy of many chains at once.

With :math:`x = b(q)` the constrained values of all continuous latents, sampling needs

.. math:: U(q) = -\log p(x, \mathrm{data}) - \log\left|\det \frac{\partial x}{\partial q}\right|

for every row of a batch ``(chains, dim)``. A program is written for one. Two roads lead from one to many:

* **vmap**: ``torch.vmap`` runs the unmodified program once, on all rows together. It needs operations that functorch
  can transform, and no branch on a latent.
* **plate**: the program runs once inside a plate of chains, to the left of all its own plates, with ordinary autograd.
  It needs a program that is right for any leading dimension, and helps where a network's own gradient tricks are in
  the way of functorch.

The road is found by trying, and what it gives is compared with Pyro's own potential at random points; a road that
answers differently is an error. A third, ``loop``, runs the program row by row: right for every program, and slow.

Data are arguments of the function, so that what was recorded for one data set serves the next one of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, TransformedDistribution
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Transform
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..foundation.errors import ModelError
from .initialization import anywhere, continuous, init_to_prior
from .layout import Layout
from .quiet import Reached, quiet, value_and_grad
from .sites import check_sites, estimated_sites
from .starts import together
from .supports import check_supports, moved_support

__all__ = ["Program"]

ROADS = ("vmap", "plate", "loop")
FUNCTORCH_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    NotImplementedError,
    IndexError,
    AttributeError,
    AssertionError,
)
CHECKED = 3  # points at which a road is compared with Pyro's own potential


class Program:
    """Energies of a Pyro program at rows of its unconstrained latents.

    Arguments:
        model: a Pyro program; discrete latents are summed out by enumeration.
        args, kwargs: its arguments. The tensors among them are arguments of :meth:`energies`.
        transforms: maps of sites to unconstrained space; default those of the supports.
        max_plate_nesting: number of nested plates; needed only where it cannot be guessed.
        road: ``"vmap"``, ``"plate"``, ``"loop"`` or ``None`` to find one of the first two.

    Attributes:
        layout: how latents lie in a row.
        data: the tensors among the arguments.
        place: dtype and device of a row.
        estimates: sites whose densities are estimates that nobody has accepted, see :mod:`pyro_genmods.infer.sites`.
        road: the road taken. ``why``: why the earlier ones were not.

    Raises:
        ModelError: the program cannot be sampled with gradients; the message names the site and the way out.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        transforms: Mapping[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        road: str | None = None,
    ) -> None:
        if road is not None and road not in ROADS:
            raise ValueError(f"road: got {road!r}, needs one of {ROADS}.")
        self.model = model
        leaves, self._tree = tree_flatten((tuple(args), dict(kwargs or {})))
        self.data = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_data = [isinstance(leaf, Tensor) for leaf in leaves]
        args, kwargs = self.arguments(self.data)
        self._check_sites(args, kwargs)
        self._automatic = transforms is None
        self._potential = self._pyro_potential(args, kwargs, transforms, max_plate_nesting)
        if self._automatic:
            check_supports(model, args, kwargs, self.layout)
        self.why: list[str] = []
        self._reached = Reached()
        self.road = self._find_road(road)

    # -- arguments of the model -----------------------------------------------------------------------------------

    def arguments(self, data: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model with these tensors in their places."""
        tensors = iter(data)
        pairs = zip(self._is_data, self._constants, strict=True)
        leaves = [next(tensors) if is_data else constant for is_data, constant in pairs]
        return tree_unflatten(leaves, self._tree)

    def data_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
        """Tensors of new arguments if they differ from the old in nothing but numbers, else ``None``."""
        leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
        is_data = [isinstance(leaf, Tensor) for leaf in leaves]
        if tree != self._tree or is_data != self._is_data:
            return None
        data = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        same = all(_place(new) == _place(old) for new, old in zip(data, self.data, strict=True))
        rest = zip(leaves, self._constants, is_data, strict=True)
        if not same or not all(tensor or _equal(new, old) for new, old, tensor in rest):
            return None
        return None if self._automatic and moved_support(self.model, args, kwargs, self.layout) else data

    # -- what Pyro makes of the program ---------------------------------------------------------------------------

    def _check_sites(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad(), quiet():
            trace = poutine.trace(InitMessenger(anywhere)(self.model)).get_trace(*args, **kwargs)
        check_sites(trace)
        self.estimates = estimated_sites(trace)
        self.plates = {
            frame.name: frame.dim
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        }

    def _pyro_potential(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        transforms: Mapping[str, Transform] | None,
        max_plate_nesting: int | None,
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """Pyro's own potential of one chain: the reference, and the source of transforms and shapes."""
        given = None if transforms is None else dict(transforms)
        if max_plate_nesting is None:
            max_plate_nesting = -min(self.plates.values(), default=0)
        with quiet():
            _, potential, transforms, trace = initialize_model(
                self.model,
                args,
                kwargs,
                transforms=given,
                max_plate_nesting=max_plate_nesting,
                init_strategy=anywhere,
                initial_params={},
            )
        maker = potential.__self__
        self._evaluator = maker.trace_prob_evaluator
        self.enumerated = bool(self._evaluator.has_enumerable_sites)
        self._program = maker.model if self.enumerated else self.model
        self._nesting = self._evaluator.max_plate_nesting
        names = [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and not (site["is_observed"] or site_is_subsample(site) or site["fn"].has_enumerate_support)
        ]
        if not names:
            raise ModelError("model: has no continuous latent site, so there is nothing to sample.")
        values = {name: trace.nodes[name]["value"].detach() for name in names}
        self._check_places(values)
        self._priors = {name: _innermost(trace.nodes[name]["fn"]) for name in names}
        self._event_dims = {name: trace.nodes[name]["fn"].event_dim for name in names}
        start = {name: transforms[name](x) if name in transforms else x for name, x in values.items()}
        self._batch_dims = {name: values[name].dim() - self._event_dims[name] for name in names}
        self.layout = Layout({name: value.shape for name, value in start.items()}, transforms)
        first = start[names[0]]
        self.place = (first.dtype, first.device)
        return potential

    @staticmethod
    def _check_places(values: Mapping[str, Tensor]) -> None:
        places = {name: (value.dtype, value.device) for name, value in values.items()}
        if len(set(places.values())) > 1:
            raise ModelError(
                f"model: its latents differ in dtype or device, {places}; one row holds them all, so give the "
                "parameters of their distributions one dtype and device."
            )

    # -- energies -------------------------------------------------------------------------------------------------

    def energies(self, q: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Energies of the prior and of the posterior at rows, two of ``(rows,)``, in nats; differentiable."""
        if self.road == "vmap":
            one = self._lifted if self._lifts else self._one
            return torch.vmap(lambda row: one(row, data), randomness="same")(q)
        if self.road == "plate":
            return self._plated(q, data)
        pairs = [self._one(row, data) for row in q]
        return torch.stack([prior for prior, _ in pairs]), torch.stack([joint for _, joint in pairs])

    def reference(self, q: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Pyro's own potential and its gradient at one row."""
        self._potential.__self__.model_args, self._potential.__self__.model_kwargs = self.arguments(data)
        row = q.detach().requires_grad_()
        with torch.enable_grad(), quiet(self.enumerated) as licence:
            value = self._potential(self.layout.unflatten(row))
            (gradient,) = torch.autograd.grad(value, row)
        self.surrogate = licence.used
        return value.detach(), gradient

    def _one(self, q: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Energies of one row, as Pyro computes them."""
        params, values = self._values(q)
        args, kwargs = self.arguments(data)
        with self._reached:
            trace = poutine.trace(poutine.condition(self._program, values)).get_trace(*args, **kwargs)
        joint = self._evaluator.log_prob(trace)
        terms = ((trace.nodes[name]["fn"], x) for name, x in values.items())
        prior = (
            sum(fn.log_prob(x).sum() for fn, x in terms)
            if self.enumerated
            else sum(trace.nodes[name]["log_prob_sum"] for name in values)
        )
        volume = sum(
            -t.log_abs_det_jacobian(values[name], params[name]).sum() for name, t in self.layout.transforms.items()
        )
        return -(prior + volume), -(joint + volume)

    def _lifted(self, q: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The same inside a gradient that is not used: Pyro's enumeration reads ``.data``, which vmap alone forbids."""
        return torch.func.grad(lambda row: (row.sum(), self._one(row, data)), has_aux=True)(q)[1]

    def _plated(self, q: Tensor, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Energies of all rows by one run in a plate of chains."""
        params, values = self._values(q)
        padded = {name: self._pad(name, value) for name, value in values.items()}
        args, kwargs = self.arguments(data)
        with self._reached, pyro.plate("_chains", len(q), dim=-1 - self._nesting):
            trace = poutine.trace(poutine.condition(self._program, padded)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
        prior = joint = q.new_zeros(len(q))
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                log_prob = self._by_chain(name, site["log_prob"], len(q))
                joint = joint + log_prob
                prior = prior + log_prob if name in values else prior
        volume = sum(
            -t.log_abs_det_jacobian(values[name], params[name]).reshape(len(q), -1).sum(-1)
            for name, t in self.layout.transforms.items()
        )
        return -(prior + volume), -(joint + volume)

    def _values(self, q: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        params = self.layout.unflatten(q)
        return params, {name: self.layout._inverse(name)(value) for name, value in params.items()}

    def _pad(self, name: str, value: Tensor) -> Tensor:
        """Put the dimension of chains to the left of all plates."""
        ones = (1,) * (self._nesting - self._batch_dims[name])
        return value.reshape(value.shape[:1] + ones + value.shape[1:])

    def _by_chain(self, name: str, log_prob: Tensor, chains: int) -> Tensor:
        if log_prob.dim() < 1 + self._nesting or log_prob.shape[-1 - self._nesting] != chains:
            raise RuntimeError(f"the log density of site {name!r} has no dimension of chains: {tuple(log_prob.shape)}")
        return log_prob.reshape(chains, -1).sum(-1)

    # -- which road -----------------------------------------------------------------------------------------------

    def _find_road(self, wanted: str | None) -> str:
        dtype, device = self.place
        q = torch.rand(CHECKED, self.layout.dim, dtype=dtype, device=device) * 2 - 1
        self._check_deterministic(q[0])
        self._lifts = self.enumerated
        for road in (wanted,) if wanted else ("vmap", "vmap", "plate"):
            if self.why and road == "vmap":
                self._lifts = True
            self.road = road
            try:
                self.check(q, self.data)
            except FUNCTORCH_ERRORS as error:
                if isinstance(error, ModelError):
                    raise
                last = self._reached.names[-1:]
                self.why.append(f"{road}: {f'after site {last[0]!r}, ' if last else ''}{_first_line(error)}")
                continue
            return road
        raise ModelError(
            "model: cannot be run for many chains at once. A branch or loop on a latent is the usual cause: write "
            "torch.where for it, or pass road='loop' to run chain by chain, slowly. "
            f"What was tried: {'; '.join(self.why)}."
        )

    def check(self, q: Tensor, data: tuple[Tensor, ...], tolerance: float | None = None) -> None:
        """Compare this road with Pyro's own potential at rows.

        Raises:
            ModelError: they differ.
        """
        values, gradients = value_and_grad(lambda rows: self.energies(rows, data)[1], q, self.enumerated)
        self.compare(q, data, values, gradients, tolerance)

    def compare(
        self,
        q: Tensor,
        data: tuple[Tensor, ...],
        values: Tensor,
        gradients: Tensor,
        tolerance: float | None = None,
    ) -> None:
        """Compare energies and gradients at rows with those of Pyro's own potential."""
        single = self.place[0] in (torch.float32, torch.float16, torch.bfloat16)
        tolerance = tolerance or (1e-3 if single else 1e-6)
        for row, value, gradient in zip(q, values, gradients, strict=True):
            expected, slope = self.reference(row, data)
            scale = max(1.0, float(slope.abs().nan_to_num(0, 0, 0).max()))
            fine = torch.allclose(value, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
            if not (fine and torch.allclose(gradient, slope, rtol=tolerance, atol=tolerance * scale, equal_nan=True)):
                raise ModelError(
                    f"model: run for many chains by {self.road!r} it has the energy {float(value):.6g}, run once "
                    f"{float(expected):.6g} (gradients differ by {float((gradient - slope).abs().max()):.3g}). It "
                    "depends on something that is no latent and no argument, or its shapes mix chains; pass "
                    "road='loop' to run chain by chain, slowly."
                )

    def improper(self) -> list[str]:
        """Latents whose prior is improper."""
        return [name for name, fn in self._priors.items() if isinstance(fn, ImproperUniform)]

    def _check_deterministic(self, q: Tensor) -> None:
        first, again = self.reference(q, self.data)[0], self.reference(q, self.data)[0]
        if not torch.equal(first, again) and not bool(first.isnan() & again.isnan()):
            raise ModelError(
                f"model: its energy at one point is {float(first):.6g} and then {float(again):.6g}. It draws something "
                "at random that is no latent site (dropout, a site hidden by poutine.block); call eval() on networks, "
                "and sample every random quantity as a site."
            )

    def start(self, strategy: Callable[..., Any], chains: int) -> Tensor:
        """Rows that an initialisation strategy of Pyro proposes, ``(chains, dim)``."""
        args, kwargs = self.arguments(self.data)
        model = InitMessenger(continuous(strategy))(self.model)

        def one(_: Tensor) -> Tensor:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            return self.layout.unconstrain({name: trace.nodes[name]["value"].detach() for name in self.layout.shapes})

        with torch.no_grad(), quiet(self.enumerated):
            index = torch.arange(chains, device=self.place[1])
            try:
                if getattr(strategy, "func", strategy) is init_to_prior:  # others catch errors, functorch's among them
                    return torch.vmap(one, randomness="different")(index)
            except FUNCTORCH_ERRORS:
                rows = together(self, strategy, chains)
                if rows is not None:
                    return rows
            return torch.stack([one(i) for i in index])


def _innermost(fn: Any) -> Any:
    """The distribution inside ``to_event``, ``mask`` and ``expand``."""
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return fn


def _place(x: Tensor) -> tuple[Size, torch.dtype, torch.device]:
    return x.shape, x.dtype, x.device


def _equal(new: Any, old: Any) -> bool:
    try:
        return new is old or bool(new == old)
    except (ValueError, TypeError, RuntimeError):  # arrays: equal in parts
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
