r"""Stochastic differential equations as priors on paths, seen at given times.

A path of :math:`d` features observed at :math:`t_0 < \dots < t_K` is one event of shape ``(K + 1, d)``. Its law is that
of the equation

.. math:: \mathrm dx = f(x, t, c)\, \mathrm dt + g(x, t, c)\, \mathrm dW, \qquad x(t_0) \sim
          \mathcal N(\mu(c), \operatorname{diag} \sigma(c)^2), \qquad g \text{ diagonal,}

carried from one time to the next in one step of length :math:`\Delta_k = t_{k+1} - t_k`,

.. math:: x_{k+1} = m_k(x_k) + L_k(x_k)\, \varepsilon_k, \qquad \varepsilon_k \sim \mathcal N(0, I) .

========================  ============================================================================================
``method="euler"``        Euler-Maruyama: :math:`m = x + f \Delta` and :math:`L = g \sqrt\Delta`
``method="local_linear"`` the exact transition of the equation linearised at :math:`x_k`, with :math:`J = \partial f /
                          \partial x`: :math:`m = x + \int_0^\Delta e^{J s} f\, \mathrm ds` and :math:`L L^\top =
                          \int_0^\Delta e^{J s} g^2 e^{J^\top s}\, \mathrm ds`
========================  ============================================================================================

The density, the draws and the transport of noise are those of this chain, exactly. The chain is the equation itself
where the local linearisation is exact (a linear drift with constant coefficients, such as Ornstein-Uhlenbeck), and
approaches it elsewhere as the grid is refined (:func:`refine_times`). All values are in the user's units: ``x`` in
those of the data, ``t`` in those of ``times``, ``f`` in x per t and ``g`` in x per square root of t.

References:
    G. Maruyama, Continuous Markov processes and stochastic equations, Rendiconti del Circolo Matematico di Palermo 4
    (1955) 48-90. T. Ozaki, A bridge between nonlinear time series models and nonlinear stochastic dynamical systems: a
    local linearization approach, Statistica Sinica 2 (1992) 113-135. J. C. Jimenez, R. Biscay, T. Ozaki, Inference
    methods for discretely observed continuous-time stochastic volatility models, Asia-Pacific Financial Markets 12
    (2006) 109-141. X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, 2020, arXiv:2001.01328.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..coordinates import Standardization
from ..foundation.errors import DataError, ShapeError
from ..foundation.networks import MLP, place_of, zero_output_layer
from .path_law import PathDistribution, PathLaw, refine_times
from .transition import euler, local_linear

__all__ = ["NeuralSDE", "PathDistribution", "each_row", "refine_times"]

Field = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class NeuralSDE(PathLaw):
    r"""A stochastic differential equation as a prior on paths at given times.

    Latent paths are observed through a likelihood, at the times where there are data: ``path[..., index, :]`` with a
    grid from :func:`refine_times`, and entries that are missing masked, as in ``dist.Normal(path[..., index, :],
    s).mask(~y.isnan()).to_event(2)`` with ``obs=y.nan_to_num()``. Several series are a batch of contexts or
    ``.expand([n])`` in a plate. Latent parameters of the equation, such as a rate, are its context.

    For inference in noise space (``infer.PushforwardReparam``) a gradient takes K sequential calls on ``(rows, d)``;
    on the path itself it takes one on ``(rows K, d)``, but neighbouring values of a fine grid are nearly the same, and
    chains crawl. Few or noisy observations: noise space.

    Arguments:
        features: number :math:`d` of features.
        times: at least two, finite, strictly increasing; they need not be regular.
        drift: called ``drift(t, x, c)`` with ``t`` ``(rows, 1)``, ``x`` ``(rows, d)`` and ``c`` ``(rows,
            context_features)`` or ``None``; ``(rows, d)``. Default a learnable linear map, which reverts to the mean
            at first, plus an MLP that starts at zero.
        diffusion: a positive number or ``(d,)``; or called as the drift is; default a learnable constant.
        initial: the pair (mean, scale) of the first value, numbers or ``(d,)``; or a network ``initial(c)`` of the
            context whose ``(rows, 2 d)`` are mean and log scale; default learnable, standard normal at first.
        context_features: number of context features.
        method: ``"euler"`` or ``"local_linear"``, see the module. The drift is differentiated by the latter.
        hidden_features: widths of the default drift's MLP.

    The dtype is that of the first network that was given, else of the first tensor among ``diffusion`` and ``initial``,
    else the default.

    Shape:
        events and noise ``(len(times), d)``, contexts ``(context_features,)``; log densities in nats per path.

    Raises:
        ValueError: times that are fewer than two, not finite, repeated or out of order; a diffusion or scale that is
            not positive; a drift or diffusion that mixes the rows of a batch; another method.
        ShapeError: a drift, diffusion or initial network of another shape, or that does not take the arguments.
        IntegrationError: with validation on, a draw that is NaN or infinite, or a density that is NaN, as where the
            diffusion is not positive.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> from pyro_genmods.evolve.path import NeuralSDE
        >>> decay = NeuralSDE(1, [0.0, 0.5, 2.0], lambda t, x, c: -c * x, 0.3, (1.0, 0.1), context_features=1)
        >>> law = decay(torch.tensor([[0.5], [2.0]]))
        >>> law.batch_shape, law.sample((4,)).shape, law.log_prob(torch.ones(3, 1)).shape
        (torch.Size([2]), torch.Size([4, 2, 3, 1]), torch.Size([2]))
    """

    def __init__(
        self,
        features: int,
        times: Sequence[float] | Tensor,
        drift: Field | None = None,
        diffusion: Field | Tensor | float | None = None,
        initial: nn.Module | tuple[Any, Any] | None = None,
        context_features: int = 0,
        *,
        method: Literal["euler", "local_linear"] = "euler",
        hidden_features: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(features, times, context_features)
        if method not in ("euler", "local_linear"):
            raise ValueError(f"method: got {method!r}, needs 'euler' or 'local_linear'.")
        self.method, steps = method, torch.tensor(self.grid, dtype=torch.float64).diff()
        self.span = self.grid[-1] - self.grid[0]
        self.time_unit = math.sqrt(float(steps.median()) * self.span)
        self.units = Standardization(features)
        self.context_units = Standardization(context_features) if context_features else None
        self._learned_drift = drift is None
        if drift is None:
            self.linear = nn.Linear(features, features)
            self.network = MLP(1 + features + context_features, features, hidden_features, activation=nn.Tanh)
            zero_output_layer(self.network)
            with torch.no_grad():
                self.linear.weight.copy_(-torch.eye(features))
                self.linear.bias.zero_()
        self.given_drift = drift
        self._set_diffusion(diffusion)
        self._set_initial(initial)
        self.to(*reversed(_place(drift, diffusion, initial)))
        _check_fields(self)

    def _set_diffusion(self, diffusion: Field | Tensor | float | None) -> None:
        self.given_diffusion = diffusion if callable(diffusion) else None
        if diffusion is None:  # stationary, with a variance of one, beside the drift's rate of one
            self.raw_diffusion = nn.Parameter(torch.full((self.width,), math.log(math.expm1(math.sqrt(2)))))
        elif self.given_diffusion is None:
            self.keep("constant_diffusion", _vector("diffusion", diffusion, self.width, positive=True))

    def _set_initial(self, initial: nn.Module | tuple[Any, Any] | None) -> None:
        self.given_initial = initial if isinstance(initial, nn.Module) else None
        if self.given_initial is not None and not self.context_shape:
            raise ShapeError("initial: got a network of the context, and there is none; give the pair (mean, scale).")
        if initial is None:
            self.initial_loc = nn.Parameter(torch.zeros(self.width))
            self.initial_log_scale = nn.Parameter(torch.zeros(self.width))
        elif self.given_initial is None:
            loc, scale = initial
            self.keep("given_loc", _vector("initial mean", loc, self.width))
            self.keep("given_scale", _vector("initial scale", scale, self.width, positive=True))

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Learn the units in which default networks work: one shift and scale for each feature, the same at all times.

        A drift, diffusion or initial law that was given stays in the user's units, and so do densities.

        Arguments:
            x: ``(n, times, features)``.
            context: ``(n, context_features)`` or ``None``.

        Raises:
            DataError: a feature is constant.
        """
        values = x.detach().flatten(0, -2)
        constant = (values == values[:1]).all(0).nonzero().flatten().tolist()
        if constant:
            raise DataError(f"x: feature(s) {constant[:8]} are constant at all times; their law is a point. Drop them.")
        self.units.fit_(values)
        if self.context_units is not None and context is not None:
            self.context_units.fit_(context.detach().reshape(len(context), -1))

    # -- the equation --------------------------------------------------------------------------------------------

    def standard(self, t: Tensor, x: Tensor, c: Tensor | None) -> list[Tensor]:
        """Rows of time, value and context in the units of the default networks."""
        told = [(t - self.grid[0]) / self.span * 2 - 1, self.units(x)]
        return told if c is None else [*told, self.context_units(c)]

    def drift(self, k: slice, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        return each_row(self._default_drift if self._learned_drift else self.given_drift, t, x, c)

    def _default_drift(self, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        told = self.standard(t, x, c)
        return (self.linear(told[1]) + self.network(*told)) * self.units.scale / self.time_unit

    def diffusion(self, k: slice, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        if self.given_diffusion is not None:
            return each_row(self.given_diffusion, t, x, c)
        return self._constant().expand_as(x)

    def _constant(self) -> Tensor:
        if hasattr(self, "constant_diffusion"):
            return self.constant_diffusion
        return nn.functional.softplus(self.raw_diffusion) * self.units.scale / math.sqrt(self.time_unit)

    def moments(self, k: slice, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        t, length = self.times[:-1][k], self.lengths[k, None]
        g = self.diffusion(k, t, x, c)
        if self.method == "euler":
            return euler(x, self.drift(k, t, x, c), g, length)
        return local_linear(x, lambda x: self.drift(k, t, x, c), g, length)

    def initial_moments(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.given_initial is not None:
            loc, log_scale = self.given_initial(c).chunk(2, -1)
            return loc, log_scale.exp()
        if hasattr(self, "given_loc"):
            return self.given_loc, self.given_scale
        return self.units.inverse(self.initial_loc), self.initial_log_scale.exp() * self.units.scale


def each_row(function: Field, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
    """Call a function of rows at all times of all rows: ``t`` ``(n,)``, ``x`` ``(rows, n, features)``."""
    rows, n, _ = x.shape
    told = None if c is None else c[:, None].expand(rows, n, c.shape[-1]).flatten(0, 1)
    return function(t.expand(rows, n).reshape(-1, 1), x.flatten(0, 1), told).unflatten(0, (rows, n))


def _check_fields(model: NeuralSDE) -> None:
    """Refuse what was given if it has another shape, mixes rows, or, for a diffusion, is not positive."""
    dtype, device = model.place
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, model.width, generator=generator).to(device, dtype)
    t = torch.linspace(model.grid[0], model.grid[-1], 3).to(device, dtype)[:, None]
    c = None
    if model.context_shape:
        c = (torch.rand(3, *model.context_shape, generator=generator) + 0.5).to(device, dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if model.given_drift is not None:
            check_field("drift", model.given_drift, (t, x, c), model.width)
        if model.given_initial is not None:
            check_field("initial", model.given_initial, (c,), 2 * model.width)
        if model.given_diffusion is not None:
            g = check_field("diffusion", model.given_diffusion, (t, x, c), model.width)
            if bool((g <= 0).any()):
                raise ValueError(
                    f"diffusion: returned {float(g.min()):g} for contexts in [0.5, 1.5], needs positive values; end "
                    "it with softplus or exp."
                )


def check_field(name: str, function: Callable[..., Tensor], rows: tuple[Tensor | None, ...], columns: int) -> Tensor:
    """Call a function with rows together and apart, and refuse it unless it gives ``columns`` for each by itself.

    Raises:
        ShapeError: it does not take these rows, or returns another shape.
        ValueError: what it returns for one row depends on the others.
    """
    function = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    shapes = ", ".join("None" if x is None else str(tuple(x.shape)) for x in rows)
    try:
        together = function(*rows)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ShapeError(
            f"{name}: the call {name}({shapes}) fails ({str(error).splitlines()[0]}); it takes (t, x, c), or (c) if "
            "it is `initial`, as rows; c is None without context_features."
        ) from error
    if not isinstance(together, Tensor) or together.shape != (3, columns):
        got = tuple(together.shape) if isinstance(together, Tensor) else type(together).__name__
        raise ShapeError(f"{name}: {name}({shapes}) returned {got}, needs (rows, {columns}), one row for each row.")
    try:
        apart = torch.cat([function(*(None if x is None else x[i : i + 1] for x in rows)) for i in range(3)])
    except (RuntimeError, ValueError):
        apart = together.new_full(together.shape, -torch.inf)
    if not torch.allclose(apart, together, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{name}: its output for one row depends on the other rows of the batch, or is random; leave out batch "
            "normalisation, dropout, and statistics of the batch."
        )
    return together


def _place(*given: Any) -> tuple[torch.dtype, torch.device]:
    """Where the model is to be: with the first network that was given, else the first tensor, else at the default."""
    flat = [part for item in given for part in (item if isinstance(item, tuple) else [item])]
    for module in flat:
        if isinstance(module, nn.Module):
            return place_of(module)
    tensors = [item for item in flat if isinstance(item, Tensor) and item.is_floating_point()]
    return (tensors[0].dtype, tensors[0].device) if tensors else (torch.get_default_dtype(), torch.get_default_device())


def _vector(name: str, value: Any, features: int, positive: bool = False) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    if vector.dim() > 1 or vector.numel() not in (1, features):
        raise ShapeError(f"{name}: got shape {tuple(vector.shape)}, needs a number or ({features},).")
    if not bool(vector.isfinite().all()) or (positive and not bool((vector > 0).all())):
        raise ValueError(f"{name}: got {vector.tolist()}, needs finite{' and positive' if positive else ''} numbers.")
    return vector.expand(features).clone()
