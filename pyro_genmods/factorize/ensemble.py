r"""Ensembles: the weighted average of several models of the same events, as one distribution.

.. math:: p(x \mid c) = \sum_k w_k \, p_k(x \mid c), \qquad w \ge 0, \quad \sum_k w_k = 1 .

The members keep their parameters, units and orders. Members that err in different places gain most; their weights are
those that held-out data make likeliest, found by expectation maximisation, which cannot overfit them much.

Reference:
    P. Smyth, D. Wolpert, Linearly Combining Density Estimators via Stacking, Machine Learning 36 (1999) 59-83.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..contract import Cost, Density, GenerativeModel
from ..foundation.errors import DensityError, ShapeError
from ..foundation.shapes import Context, Rows, Values

__all__ = ["Ensemble"]


class Ensemble(GenerativeModel):
    """A mixture of generative models, each with an exact density.

    Arguments:
        models: events, contexts and supports must agree.
        weights: of the models; default equal ones.

    Raises:
        ShapeError: no models, or models of different events.
        DensityError: a model without an exact density.
        ValueError: weights that are negative, or too many or few.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> models = [gm.Autoregressive(3, gm.factorize.Bernoulli(), order="random") for _ in range(2)]
        >>> law = gm.factorize.Ensemble(models, weights=[0.7, 0.3])()
        >>> x = torch.tensor([1.0, 0.0, 1.0])
        >>> by_hand = 0.7 * models[0]().log_prob(x).exp() + 0.3 * models[1]().log_prob(x).exp()
        >>> torch.allclose(law.log_prob(x).exp(), by_hand)
        True
    """

    density: ClassVar[Density] = Density.EXACT
    has_rsample = False

    def __init__(self, models: Sequence[GenerativeModel], weights: Sequence[float] | None = None) -> None:
        if not models:
            raise ShapeError("models: got none, needs at least one.")
        first = models[0]
        for model in models:
            if model.event_shape != first.event_shape or model.context_shape != first.context_shape:
                raise ShapeError(
                    f"models: one has events {tuple(model.event_shape)} and contexts {tuple(model.context_shape)}, "
                    f"another {tuple(first.event_shape)} and {tuple(first.context_shape)}; they must agree."
                )
            if model.density is not Density.EXACT:
                raise DensityError(f"models: {type(model).__name__} has no exact density to average.")
        super().__init__(first.event_shape, first.context_shape, first.support, native=True)
        self.value_dtype = first.value_dtype
        self.models = nn.ModuleList(models)
        dtype, device = first.place
        w = torch.ones(len(models)) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if len(w) != len(models) or bool((w < 0).any()) or not bool(w.sum() > 0):
            raise ValueError(f"weights: got {w.tolist()}, needs {len(models)} numbers that are not negative.")
        self.register_buffer("weights", (w / w.sum()).to(torch.float32))
        self.to(device, dtype)

    @property
    def cost(self) -> Cost:
        """Costs add up."""
        costs = [model.cost for model in self.models]
        both = [[getattr(cost, what) for cost in costs] for what in ("sample", "score")]
        return Cost(*(None if None in column else sum(column) for column in both))

    @property
    def takes_any_dtype(self) -> bool:
        return all(model.takes_any_dtype for model in self.models)

    def fit_weights(self, x: Tensor, context: Tensor | None = None, steps: int = 200, batch_size: int = 1000) -> Tensor:
        """Set the weights to those that make data likeliest, in place; use data that the members were not fitted to.

        Arguments:
            x: ``(n, *event_shape)``.
            context: ``(n, *context_shape)`` or ``None``.
            steps: of expectation maximisation.
            batch_size: rows that a member scores at once.

        Returns:
            The weights.
        """
        with torch.no_grad():
            contexts = [None] * -(-len(x) // batch_size) if context is None else context.split(batch_size)
            batches = list(zip(x.split(batch_size), contexts, strict=True))
            each = [torch.cat([model(c).log_prob(part) for part, c in batches]) for model in self.models]
            each = torch.stack(each, -1).double()
            w = torch.full((len(self.models),), 1 / len(self.models), dtype=torch.float64, device=each.device)
            for _ in range(steps):
                w = (each + w.log()).softmax(-1).mean(0)
            self.weights.copy_(w)
        return self.weights

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        for model in self.models:
            model.standardize(x, context)

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        x = y.reshape((-1, *self.event_shape))
        each = torch.stack([self._law(model, c).log_prob(x) for model in self.models], -1)
        return (each + self.weights.log()).logsumexp(-1)

    def sample_rows(self, rows: int, c: Context | None) -> Rows:
        dtype, device = self.place
        which = torch.multinomial(self.weights, rows, replacement=True)
        x = torch.empty(rows, self.features, dtype=dtype, device=device)
        for k, model in enumerate(self.models):
            index = (which == k).nonzero().flatten()
            if len(index):
                shape = [] if c is not None else [len(index)]
                x[index] = self._law(model, None if c is None else c[index]).sample(shape).flatten(1).to(dtype)
        return x

    @staticmethod
    def _law(model: GenerativeModel, c: Tensor | None) -> object:
        law = model(c)
        law._validate_args = False
        return law
