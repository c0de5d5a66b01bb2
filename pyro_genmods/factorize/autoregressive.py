r"""Autoregressive models: the chain rule of probability with a learned conditional at every place.

.. math:: \log p(x \mid c) = \sum_{t=1}^T \log p\big(x_{\sigma_t} \mid x_{\sigma_1}, \dots, x_{\sigma_{t-1}}, c\big)

for an order :math:`\sigma` of the entries. A causal network gives the parameters of all conditionals in one pass, a
*conditional* (:mod:`pyro_genmods.factorize.conditionals`) says what they are parameters of. The likelihood is exact.
Sampling is the Knothe-Rosenblatt map, see :mod:`pyro_genmods.factorize.walk`; its gradients are implicit, see
:mod:`pyro_genmods.factorize.implicit`.

With several orders the law is their mixture, :math:`p(x) = \frac1S \sum_s p_{\sigma^s}(x)`, one distribution: weights
are shared, each training step takes one order. An *orderless* model is trained under fresh random orders, after which
any order may be asked for, and any entries be conditioned on.

References:
    H. Larochelle, I. Murray, The Neural Autoregressive Distribution Estimator, AISTATS 2011.
    B. Uria, I. Murray, H. Larochelle, A Deep and Tractable Density Estimator, 2014, arXiv:1310.1757 (orders).
    M. Rosenblatt, Remarks on a Multivariate Transformation, Ann. Math. Statist. 23 (1952) 470-472.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..contract import Cost, Density
from ..coordinates import Standardization
from ..foundation.causal import CausalNetwork, check_causal, transformed
from ..foundation.errors import DensityError, ShapeError
from ..foundation.masked import MADE
from ..foundation.networks import place_of
from ..foundation.recurrent import GRU
from ..foundation.shapes import Context, Noise, Rows, Values
from ..foundation.transformer import Transformer
from .arguments import GivenNetwork, Offset, event_shape_of, orders_of, support_of
from .conditionals import Conditional
from .factorization import METHODS, Factorization
from .implicit import attach, push
from .law import AutoregressiveDistribution
from .mixed import Mixed
from .mixtures import LogisticMixture
from .walk import draw, has_cache, solve

__all__ = ["Autoregressive"]


class Autoregressive(Factorization):
    r"""An autoregressive density with exact likelihood.

    Arguments:
        features: number of entries, or the shape of an event (an image is read row by row).
        conditional: law of an entry given those before it; :class:`~pyro_genmods.factorize.Mixed` for columns of
            different kinds. Default ``LogisticMixture(8)``.
        network: ``"made"`` (masked perceptron: tables, images), ``"transformer"`` (causal attention: sequences),
            ``"gru"``, or a module of your own: called as ``network(entries, context)`` with entries
            ``(rows, T, conditional.inputs)``, or tokens ``(rows, T)`` for ``Categorical``, in the order of the places,
            it returns parameters ``(rows, T, conditional.size)``, those of place ``t`` from entries before ``t``.
        context_features: width of the context, 0 for an unconditional model.
        support: where continuous events live, e.g. ``constraints.positive``.
        order: permutation of the (flattened) entries, ``"random"``, or ``None`` for the order in which they lie.
        orders: number of random orders to average over; the first is ``order`` if that is given.
        orderless: train under fresh random orders, so that any order serves afterwards.
        eos: token that ends a sequence; events then have variable length up to ``features``.
        pad: what follows ``eos``; default ``eos`` itself, else a number outside the vocabulary.
        max_length: another name of ``features`` for sequences of variable length.
        width, layers, heads, dropout: of the network; ``None`` for its own default. ``layers=0`` makes ``"made"`` a
            generalised linear model of each entry.
        sampling: ``"cached"``, ``"jacobi"``, ``"sequential"``, or ``"auto"``, see :mod:`pyro_genmods.factorize.walk`.

    Shape:
        events ``(features,)`` or ``features``; contexts ``(context_features,)``. Values of ``Categorical`` are
        ``int64``, of all others floating; every real dtype is accepted for discrete values.

    Raises:
        TypeError: ``conditional`` or ``network`` is something else.
        ShapeError: sizes disagree, or an order is no permutation.
        ValueError: options that contradict each other; a network that is not causal.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> model = gm.Autoregressive(3, gm.factorize.GaussianMixture(2), context_features=1)
        >>> law = model(torch.zeros(5, 1))
        >>> law.batch_shape, law.event_shape, law.density.name
        (torch.Size([5]), torch.Size([3]), 'EXACT')
        >>> x = law.rsample()
        >>> torch.allclose(law.inverse_rosenblatt(law.rosenblatt(x)), x, atol=1e-3)
        True
    """

    density: ClassVar[Density] = Density.EXACT
    NETWORKS: ClassVar[dict[str, type[CausalNetwork]]] = {"made": MADE, "transformer": Transformer, "gru": GRU}

    def __init__(
        self,
        features: int | tuple[int, ...] | None = None,
        conditional: Conditional | None = None,
        network: Literal["made", "transformer", "gru"] | nn.Module = "made",
        *,
        context_features: int = 0,
        support: constraints.Constraint | None = None,
        order: Sequence[int] | Tensor | Literal["random"] | None = None,
        orders: int = 1,
        orderless: bool = False,
        eos: int | None = None,
        pad: int | None = None,
        max_length: int | None = None,
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        dropout: float = 0.0,
        sampling: Literal["auto", "cached", "jacobi", "sequential"] = "auto",
    ) -> None:
        conditional = LogisticMixture(8) if conditional is None else conditional
        shape = event_shape_of(features, max_length, context_features)
        where, native = support_of(conditional, shape, support, eos, pad)
        super().__init__(shape, (context_features,) if context_features else (), where, native)
        self.conditional, self.temperature = conditional, 1.0
        self.eos, self.pad = eos, eos if pad is None else pad
        self.value_dtype = torch.int64 if conditional.integer else None
        if sampling not in METHODS:
            raise ValueError(f"sampling: got {sampling!r}, needs one of {METHODS}.")
        self.sampling = sampling
        if eos is not None and (orders != 1 or orderless or order is not None):
            raise ValueError("eos: sequences of variable length are read from the left; leave the orders out.")
        self.register_buffer("orders", orders_of(order, orders, self.features))
        self.orderless = orderless
        self.takes_order = orders > 1 or orderless
        self.raster = order is None and not self.takes_order
        self.has_rsample = not conditional.discrete and orders == 1
        options = {"width": width, "layers": layers, "heads": heads, "dropout": dropout or None}
        options = {name: value for name, value in options.items() if value is not None}
        self.network = (
            self._given(network, options) if isinstance(network, nn.Module) else self._built(network, options)
        )
        self.units = Standardization(self.features) if native and self.levels is None else None
        self.to(*reversed(place_of(self.network)))
        if isinstance(network, nn.Module):
            self._check_network()
        self.train()

    def _sizes(self) -> dict[str, int]:
        conditional = self.conditional
        sizes = {"length": self.features, "outputs": conditional.size, "context_features": sum(self.context_shape)}
        entries = {"vocabulary": conditional.vocabulary} if conditional.vocabulary else {"inputs": conditional.inputs}
        return sizes | entries

    def _built(self, network: str, options: dict[str, Any]) -> CausalNetwork:
        if network not in self.NETWORKS:
            raise TypeError(f"network: got {network!r}, needs one of {list(self.NETWORKS)}, or a module.")
        sizes = self._sizes()
        if network == "made":
            sizes.pop("vocabulary", None)
            sizes["inputs"] = self.conditional.inputs
        else:
            options["orders"] = self.takes_order
        try:
            built = self.NETWORKS[network](**sizes, **options)
        except TypeError as error:
            raise TypeError(f"network: {network!r} takes no such option ({error}).") from error
        start = self.conditional.start()
        if isinstance(self.conditional, Mixed):
            if not self.takes_order:  # the network knows places only
                start = tuple(start[v] for v in self.order.tolist())
            if network != "made":
                return Offset(built, start)
        built.start_at(start)
        return built

    def _given(self, network: nn.Module, options: dict[str, Any]) -> CausalNetwork:
        if options:
            raise TypeError(f"{', '.join(options)}: your own network has its own sizes; leave the options out.")
        if isinstance(network, CausalNetwork):
            wanted, got = self._sizes(), vars(network)
            wrong = {name: size for name, size in wanted.items() if got.get(name) != size}
            if wrong:
                raise ShapeError(f"network: needs {wrong}, has { ({name: got.get(name) for name in wrong}) }.")
            return network
        if self.takes_order:
            raise ValueError(
                "orders: a module of your own is called as network(entries, context) and sees one order; make a model "
                "for each order, or derive the module from foundation.causal.CausalNetwork."
            )
        return GivenNetwork(network, **self._sizes())

    def _check_network(self) -> None:
        dtype, device = self.place
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            noise = torch.randn(3, self.features, dtype=dtype, device=device)
            context = torch.randn(3, *self.context_shape, dtype=dtype, device=device) if self.context_shape else None
            parameters = noise.new_zeros(3, self.features, self.conditional.size)
            entries = self.entries_of(self.conditional.quantile(parameters, noise).to(dtype))
        check_causal(self.network, entries, context, self.orders[0] if self.takes_order else None)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def cost(self) -> Cost:
        """One pass to score, one step per entry to sample; each order has its own."""
        return Cost(sample=self.features * len(self.orders), score=len(self.orders))

    def forward(self, context: Tensor | None = None) -> AutoregressiveDistribution:
        """The distribution at a context; see :meth:`pyro_genmods.GenerativeModel.forward`."""
        return AutoregressiveDistribution(self, context)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Negative log-likelihood in nats; while training with several orders, that of one of them at random.

        Its mean is an upper bound of the negative log-likelihood of the average over orders (Jensen).
        """
        if not self.training:
            return super().loss(x, context)
        model = self
        if self.orderless:
            model = self._under(torch.randperm(self.features, device=self.orders.device))
        elif self.takes_order:
            model = self._under(self.orders[int(torch.randint(len(self.orders), ()))])
        self.network.train()
        try:
            return super(Autoregressive, model).loss(x, context)
        finally:
            self.network.eval()

    def train(self, mode: bool = True) -> Autoregressive:
        """Set the mode; the network drops units in :meth:`loss` alone, so that densities are the same at every call."""
        super().train(mode)
        self.network.eval()
        return self

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        super().standardize(x, context)
        if self.units is not None:
            self.units.fit_(x.to(self.units.shift.dtype))
            discrete = [v for v in range(self.features) if self.conditional.head_of(v).discrete]
            self.units.shift[discrete], self.units.scale[discrete] = 0.0, 1.0

    # -- row functions -------------------------------------------------------------------------------------------

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        if len(self.orders) == 1:
            return self.entry_log_probs(self.inside(y), c).sum(-1) - self._volume()
        y = self.inside(y)
        each = [self._under(order).entry_log_probs(y, c).sum(-1) for order in self.orders]
        return torch.stack(each).logsumexp(0) - math.log(len(each)) - self._volume()

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        if self.conditional.discrete:
            return self.outside(solve(self, z, c, self.sampling))
        return self.outside(push(self, z, c, self.sampling))

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        if self.conditional.discrete:
            raise DensityError(
                f"{type(self).__name__} has discrete entries, each of which comes from an interval of noise; "
                "rosenblatt(x) draws from that interval."
            )
        y = self.inside(y)
        return self.conditional.normal_score(self.parameters_of(y, c), y)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        if len(self.orders) == 1:
            return self._drawn(rows, c)
        dtype, device = self.place
        which = torch.randint(len(self.orders), (rows,), device=device)
        x = torch.empty(rows, self.features, dtype=dtype, device=device)
        for s, order in enumerate(self.orders):
            index = (which == s).nonzero().flatten()
            if len(index):
                x[index] = self._under(order)._drawn(len(index), None if c is None else c[index])
        return x

    def sample_and_log_prob_rows(self, rows: int, c: Context | None) -> tuple[Rows, Values]:
        y = self.sample_rows(rows, c)
        return y, self.log_prob_rows(y, c)

    def _drawn(self, rows: int, c: Tensor | None) -> Tensor:
        """Draws under the one order, by components of mixtures where the walk has a cache, else by quantiles."""
        if self.sampling not in ("auto", "cached") or not has_cache(self) or transformed():
            return self.push_rows(self._noise(rows), c)
        dtype, device = self.place
        x = draw(self, torch.empty(rows, self.features, dtype=dtype, device=device), c)
        return self.outside(x if self.conditional.discrete else attach(self, x, c))
