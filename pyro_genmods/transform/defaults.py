"""Flows with good defaults, for callers who have no opinion. All are fast both ways and start at the identity."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributions import constraints

from ._zuko import zuko
from .flow import Flow

__all__ = ["coupling_flow", "guide_flow"]


def coupling_flow(
    features: int,
    context_features: int = 0,
    *,
    layers: int = 6,
    hidden_features: tuple[int, ...] = (128, 128),
    bins: int = 8,
    support: constraints.Constraint | None = None,
    event_shape: tuple[int, ...] | None = None,
) -> Flow:
    """A coupling flow of rational-quadratic splines or of affine maps: the default learned prior.

    Fast in both directions (``layers`` network calls each way), so that it can be fitted by likelihood and then used
    by NUTS in data space or in noise space alike. Pairs of layers share a random split of the features and transform
    its two halves in turn; the splits come from torch's global random state.

    Arguments:
        features: number of features, at least 2.
        context_features: number of context features.
        layers: number of coupling layers.
        hidden_features: widths of the hidden layers of the conditioner networks.
        bins: number of spline bins in the interval [-5, 5] of standardised data; 0 for affine layers, which describe
            the data less well and cost inference half as much.
        support, event_shape: as for :class:`Flow`.

    Reference:
        C. Durkan, A. Bekasov, I. Murray, G. Papamakarios, Neural Spline Flows, 2019, arXiv:1906.04032.

    Example:
        >>> prior = coupling_flow(10, context_features=2)
        >>> prior.cost, prior.slow_direction
        (Cost(sample=6, score=6), None)
    """
    if features < 2:
        raise ValueError(
            f"features: got {features}, a coupling flow splits at least 2; use gm.Flow(zuko.flows.NSF(1))."
        )
    splines = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(bins,), (bins,), (bins - 1,)]}
    transforms = []
    for layer in range(layers):
        if layer % 2 == 0:
            half = torch.randperm(features) < features // 2
        transforms.append(
            zuko.flows.coupling.GeneralCouplingTransform(
                features,
                context_features,
                mask=half if layer % 2 == 0 else ~half,
                hidden_features=hidden_features,
                activation=nn.SiLU,
                **(splines if bins else {}),
            )
        )
    flow = Flow(zuko.lazy.Flow(transforms, zuko.flows.MAF(features).base), support=support, event_shape=event_shape)
    flow.start_at_identity()
    return flow


def guide_flow(features: int) -> Flow:
    """The default flow of a variational guide: smooth, parametrised from noise to latents.

    Eight affine coupling layers with two hidden layers of ``4 * features`` units, between 32 and 256, and smooth
    activations (HMC differentiates a guide's transport); for one feature four monotone splines.

    Arguments:
        features: number of unconstrained latents.

    Reference:
        L. Dinh, J. Sohl-Dickstein, S. Bengio, Density estimation using Real NVP, 2016, arXiv:1605.08803.

    Example:
        >>> guide_flow(10).cost
        Cost(sample=8, score=8)
    """
    if features == 1:
        return Flow(zuko.flows.NSF(1, transforms=4), direction="sampling")
    hidden = min(max(32, 4 * features), 256)
    flow = zuko.flows.NICE(features, transforms=8, hidden_features=(hidden, hidden), activation=nn.SiLU)
    return Flow(flow, direction="sampling")
