r"""What an autoregressive model is made of: a causal network, a conditional, an order, and the entries between them.

The pieces of this room (the walk through the places, implicit gradients, completion, steps) know a model as a
:class:`Factorization`. It turns entries into parameters of their conditionals, in one pass; the rest of a generative
model, its constructor, objective and row functions, is :class:`pyro_genmods.Autoregressive`.

Two orders meet here. *Variables* are numbered as they lie in an event. *Places* are numbered as the chain
rule takes them; ``order`` says which variable stands at each place. Entries, parameters and noise are kept by variable,
only the network sees places.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..contract import GenerativeModel
from ..coordinates import Standardization
from ..foundation.causal import CausalNetwork
from ..foundation.errors import DensityError, ShapeError
from .conditionals import Conditional
from .mixed import Mixed
from .sequences import Sequences, alive

__all__ = ["METHODS", "Factorization"]

METHODS = ("auto", "cached", "jacobi", "sequential")


class Factorization(GenerativeModel):
    """A model whose density is a product of conditionals; constructors of subclasses set the attributes.

    Attributes:
        network: parameters of each place from the entries before it.
        conditional: what they are parameters of.
        orders: ``(S, T)``, the orders that the law averages over.
        takes_order: the network is told the order, and serves several.
        raster: places are variables.
        orderless: any order may be asked for.
        eos, pad: of sequences of variable length, else ``None``.
        temperature: of the conditionals.
        sampling: method of sampling, see :mod:`pyro_genmods.factorize.walk`.
        units: of the continuous ones among columns of different kinds, else ``None``.
    """

    network: CausalNetwork
    conditional: Conditional
    orders: Tensor
    takes_order: bool
    raster: bool
    orderless: bool
    eos: int | None
    pad: int | None
    temperature: float
    sampling: str
    units: Standardization | None

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def takes_any_dtype(self) -> bool:
        return self.conditional.levels is not None

    @property
    def order(self) -> Tensor:
        """The variable that stands at each place.

        Raises:
            DensityError: the law averages over several orders.
        """
        if len(self.orders) > 1:
            raise DensityError(
                f"{type(self).__name__} averages over {len(self.orders)} orders and is no pushforward; it has sample() "
                "and log_prob(). Take one order, model.under(model.orders[0])."
            )
        return self.orders[0]

    @property
    def network_order(self) -> Tensor | None:
        """The order as the network wants it: ``None`` where it only ever sees one."""
        return self.order if self.takes_order else None

    def under(self, order: Tensor) -> Factorization:
        """The same parameters under one other order: a view that shares everything.

        Arguments:
            order: permutation ``(T,)``; one of ``orders``, or any if the model is orderless.

        Raises:
            ShapeError: ``order`` is no permutation.
            DensityError: the model was never trained under it.
        """
        if order.shape != self.orders.shape[1:] or not torch.equal(order.sort().values, self.orders[0].sort().values):
            raise ShapeError(f"order: got {order.tolist()[:16]}, needs a permutation of 0, ..., {self.features - 1}.")
        if not self.orderless and not bool((order == self.orders).all(-1).any()):
            raise DensityError(
                f"order: got {order.tolist()[:16]}, which is none of the model's own; train one with orderless=True."
            )
        return self._under(order)

    def _under(self, order: Tensor) -> Factorization:
        view = self._view()
        view._buffers["orders"] = order[None]
        view.has_rsample = not self.conditional.discrete
        return view

    def tempered(self, temperature: float) -> Factorization:
        """The same parameters at another temperature, a view; see :meth:`AutoregressiveDistribution.tempered`."""
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: got {temperature}, needs a positive number.")
        view = self._view()
        view.temperature = self.temperature * float(temperature)
        return view

    def sampled_by(self, method: str) -> Factorization:
        """The same parameters with another method of sampling, a view; see :mod:`pyro_genmods.factorize.walk`."""
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, needs one of {METHODS}.")
        view = self._view()
        view.sampling = method
        return view

    def _view(self) -> Factorization:
        view = copy.copy(self)
        view.__dict__ = dict(self.__dict__)
        view._buffers = dict(self._buffers)
        view.__dict__.pop("slow_direction", None)  # cached, and another order may be another cost
        return view

    # -- entries -------------------------------------------------------------------------------------------------

    def inside(self, y: Tensor) -> Tensor:
        """Rows as the network sees them: columns of different kinds have units of their own."""
        return y if self.units is None else self.units(y)

    def outside(self, y: Tensor) -> Tensor:
        """The way back from :meth:`inside`."""
        return y if self.units is None else self.units.inverse(y)

    def entries_of(self, x: Tensor) -> Tensor:
        """What the network is told of all entries ``(rows, T)``: embeddings, or tokens."""
        if self.conditional.vocabulary:
            x = x.clamp(0, self.conditional.vocabulary - 1)
        return x.to(torch.int64) if self.network.vocabulary else self.conditional.embed(x, self.place[0])

    def entry_of(self, x: Tensor, variable: int) -> Tensor:
        """What the network is told of one entry ``(rows,)``."""
        if self.conditional.vocabulary:
            x = x.clamp(0, self.conditional.vocabulary - 1)
        if self.network.vocabulary:
            return x.to(torch.int64)
        entry = self.conditional.head_of(variable).embed(x, self.place[0])
        missing = self.conditional.inputs - entry.shape[-1]
        return nn.functional.pad(entry, (0, missing)) if missing else entry

    def parameters_of(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Parameters of all conditionals from all entries, ``(rows, T, size)``, in the order of the variables."""
        entries = self.entries_of(x)
        if self.raster:
            theta = self.network(entries, c)
        else:
            theta = self.network(entries[:, self.order], c, self.network_order)[:, self.order.argsort()]
        return theta if self.temperature == 1 else self.conditional.tempered(theta, self.temperature)

    def entry_log_probs(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Log conditional of every entry, ``(rows, T)``, in the order of the variables; 0 after the end."""
        log_prob = self.conditional.log_prob(self.parameters_of(x, c), x)
        return log_prob if self.eos is None else torch.where(alive(x, self.eos), log_prob, 0)

    def entry_volumes(self, x: Tensor) -> Tensor:
        """Log-volume of the map from each entry of events in the user's units to the network's, ``(rows, T)``."""
        volumes = self.coordinates.entry_volumes(x)
        return volumes if self.units is None else volumes - self.units.scale.log()

    def _volume(self) -> Tensor | float:
        return 0.0 if self.units is None else self.units.log_scale()

    def support_of_columns(self, variables: list[int]) -> constraints.Constraint | None:
        """Where some of the entries live, as a vector, where that is not for their coordinates to say."""
        if self.eos is not None:
            return Sequences(self.support.tokens, self.eos, self.pad, ended=True)
        if isinstance(self.conditional, Mixed):
            return Mixed([self.conditional.head_of(v) for v in variables]).support
        return None

    @property
    def levels(self) -> list[int] | None:
        """Number of values of each entry; ``None`` if some are continuous."""
        if self.conditional.levels is None:
            return None
        return [self.conditional.head_of(v).levels for v in range(self.features)]
