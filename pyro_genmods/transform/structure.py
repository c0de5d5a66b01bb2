"""What a zuko flow is made of: number of features and of context features, and its sequential network calls."""

from __future__ import annotations

from torch import nn

from ._zuko import zuko

__all__ = ["context_features_of", "features_of", "passes"]

_AUTOREGRESSIVE = zuko.flows.autoregressive.MaskedAutoregressiveTransform
_COUPLING = zuko.flows.coupling.GeneralCouplingTransform
_ELEMENTWISE = zuko.flows.gaussianization.ElementWiseTransform
_ODE = zuko.flows.continuous.FFJTransform


def features_of(flow: nn.Module) -> int:
    """Number of features of a zuko flow or mixture.

    Example:
        >>> features_of(zuko.flows.NSF(5, context=2)), features_of(zuko.mixtures.GMM(3))
        (5, 3)
    """
    if isinstance(flow, zuko.lazy.Flow):
        return int(flow.base().event_shape[-1])
    if isinstance(flow, zuko.mixtures.GMM):
        return int(flow.shapes[1][-1])
    raise TypeError(f"flow: {type(flow).__name__} is neither a zuko.lazy.Flow nor a zuko.mixtures.GMM.")


def context_features_of(flow: nn.Module, features: int) -> int:
    """Number of context features, read off the input widths of the conditioner networks.

    Example:
        >>> context_features_of(zuko.flows.NICE(5, context=2), 5), context_features_of(zuko.flows.GF(4), 4)
        (2, 0)
    """
    return max((_context_width(module, features) for module in flow.modules()), default=0)


def _context_width(module: nn.Module, features: int) -> int:
    if isinstance(module, _AUTOREGRESSIVE):
        return module.hyper[0].in_features - features
    if isinstance(module, _COUPLING):
        return module.hyper[0].in_features - int(module.mask.sum())
    if isinstance(module, _ELEMENTWISE | zuko.mixtures.GMM):
        return module.hyper[0].in_features if hasattr(module, "hyper") else 0
    if isinstance(module, _ODE):
        return module.ode[0].in_features - features - 2 * len(module.freqs)
    return 0


def passes(transform: nn.Module, with_volume: bool = False) -> tuple[int | None, int | None]:
    """Sequential conditioner calls of a lazy transform and of its inverse; ``None`` where an ODE solver decides.

    Arguments:
        transform: a zuko lazy transform.
        with_volume: count value and log-volume together; lazy inverses of zuko's take one more call a layer for it.

    Example:
        >>> passes(zuko.flows.MAF(6, transforms=2).transform), passes(zuko.flows.NICE(6, transforms=2).transform)
        ((2, 12), (2, 2))
    """
    if isinstance(transform, zuko.lazy.LazyComposedTransform):
        parts = [passes(part, with_volume) for part in transform.transforms]
        return _total([there for there, _ in parts]), _total([back for _, back in parts])
    if isinstance(transform, zuko.lazy.LazyInverse):
        there, back = passes(transform.transform)
        extra = _layers(transform.transform) if with_volume else 0
        return None if back is None else back + extra, there
    if isinstance(transform, _AUTOREGRESSIVE):
        return 1, transform.passes
    if isinstance(transform, _COUPLING):
        return 1, 1
    if isinstance(transform, _ELEMENTWISE):
        calls = 1 if hasattr(transform, "hyper") else 0
        return calls, calls
    if isinstance(transform, zuko.lazy.UnconditionalTransform):
        return 0, 0
    return None, None


def _layers(transform: nn.Module) -> int:
    return sum(isinstance(module, _AUTOREGRESSIVE | _COUPLING) for module in transform.modules())


def _total(calls: list[int | None]) -> int | None:
    return None if None in calls else sum(calls)
