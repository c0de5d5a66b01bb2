r"""An estimate of :math:`\log Z`, attached to the energy whose it is.

With a context the constant is a function, :math:`\log Z(c)`. It is estimated at contexts that were given, all in one
batch, and interpolated smoothly between them (:mod:`~pyro_genmods.foundation.kriging`), so that it can be
differentiated by whoever infers the context. Its error is that of leaving one context out. Beyond the contexts only a
linear trend is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distribution import GenerativeDistribution
from ..foundation.errors import DensityError, ShapeError
from ..foundation.kriging import Interpolation
from .partition import LARGEST_ERROR, LogNormalizer, log_normalizer

if TYPE_CHECKING:
    from .energy import Energy

__all__ = ["normalize"]


def normalize(
    law: Energy | GenerativeDistribution, contexts: Tensor | None = None, *, force: bool = False, **options: Any
) -> LogNormalizer:
    r"""Estimate :math:`\log Z` and attach it: ``log_prob`` is normalised from then on, and says ``ESTIMATE``.

    The estimate belongs to the present weights; ``fit`` drops it.

    Arguments:
        law: an energy, or its law; a conditional law brings its contexts along.
        contexts: ``(n, *context_shape)``, where a conditional energy is to be normalised: spread over all contexts that
            will be asked for, at least three more than they have features.
        force: attach also what cannot be believed.
        options: of :func:`pyro_genmods.shape.log_normalizer`.

    Returns:
        What was found.

    Raises:
        DensityError: the estimate is not ``ok``, or contexts are too far apart, and ``force`` does not say otherwise.
        ShapeError: contexts are missing or superfluous, or too few.

    Example:
        >>> import pyro_genmods as gm
        >>> energy = gm.Energy(1, network=lambda y: 4 * y[:, 0] ** 2)                 # N(0, 1) tilted to precision 9
        >>> found = gm.shape.normalize(energy, particles=256, runs=4, seed=0)
        >>> energy().density.name, energy().log_prob(torch.zeros(1)).exp()            # 3 / sqrt(2 pi) = 1.197
        ('ESTIMATE', tensor(1.1...))
    """
    if isinstance(law, GenerativeDistribution):
        model, contexts = law.model, law.context if contexts is None else contexts
    else:
        model = law
    if contexts is None and model.context_shape:
        raise ShapeError(
            f"contexts: {type(model).__name__} is conditional; give some, (n, *{tuple(model.context_shape)}), spread "
            "over all that will be asked for."
        )
    if contexts is not None:
        Interpolation.columns_of(_rows(model, contexts))
    found = log_normalizer(model, context=contexts, **options)
    if not found.ok and not force:
        raise DensityError(
            f"law: the estimate {_shown(found)} cannot be believed: {found.reason}. Take more particles, runs or "
            "temperatures, or a base= that is fitted to the law; force=True attaches it all the same."
        )
    if contexts is None:
        model.normalizer.attach(found.value, found.standard_error)
    else:
        _attach_function(model, contexts, found, force)
    return found


def _attach_function(model: Energy, contexts: Tensor, found: LogNormalizer, force: bool) -> None:
    rows = _rows(model, contexts)
    values, errors = (torch.as_tensor(x).reshape(-1) for x in (found.value, found.standard_error))
    function = Interpolation(*rows.shape).to(*reversed(model.place)).fit_(rows, values.to(rows.device), errors.square())
    if function.error > LARGEST_ERROR and not force:
        raise DensityError(
            f"contexts: between the {len(rows)} given the constant is known to {function.error:.2g} nats alone; give "
            "more of them, nearer to each other, or say force=True."
        )
    model.normalizer.attach(float(values.mean()), function.error, function)


def _rows(model: Energy, contexts: Tensor) -> Tensor:
    """Contexts as rows, standardised."""
    model(contexts)  # whether they fit
    return model.context_standardization(contexts.reshape(-1, model.context_shape.numel()))


def _shown(found: LogNormalizer) -> str:
    if isinstance(found.value, Tensor):
        return f"at {found.value.numel()} contexts"
    return f"{found.value:.4g} +- {found.standard_error:.2g}"
