"""Facts about and operations on networks that more than one room needs."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["place_of", "zero_output_layer"]


def zero_output_layer(network: nn.Module) -> bool:
    """Set the last linear layer of a network to zero, so that the network starts as the constant zero function.

    A hyper-network that starts at zero makes affine and spline transforms start at the identity, from where a fit can
    only improve.

    Arguments:
        network: any module; its last submodule that is an ``nn.Linear`` is changed in place.

    Returns:
        Whether a linear layer was found.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> zero_output_layer(net)
        True
        >>> float(net(torch.randn(5, 2)).abs().max())
        0.0
    """
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not linear:
        return False
    with torch.no_grad():
        linear[-1].weight.zero_()
        if linear[-1].bias is not None:
            linear[-1].bias.zero_()
    return True


def place_of(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Floating dtype and device of a module: those of its first floating parameter, else buffer, else the defaults.

    Example:
        >>> place_of(nn.Linear(2, 2).double())
        (torch.float64, device(type='cpu'))
    """
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.get_default_device()
