"""Facts about and operations on networks that more than one room needs."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["detached_copy", "place_of", "zero_output_layer"]


def zero_output_layer(network: nn.Module) -> bool:
    """Set the last layer of a network to zero, so that the network starts as the constant zero function.

    A hyper-network that starts at zero makes affine and spline transforms start at the identity, from where a fit can
    only improve.

    Arguments:
        network: any module; its last submodule that owns a weight matrix is changed in place.

    Returns:
        Whether such a layer was found.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> zero_output_layer(net)
        True
        >>> net(torch.randn(1, 2)).tolist()
        [[0.0, 0.0, 0.0]]
    """
    layers = [m for m in network.modules() if getattr(m, "weight", None) is not None and m.weight.dim() >= 2]
    if not layers:
        return False
    with torch.no_grad():
        for parameter in layers[-1].parameters(recurse=False):
            parameter.zero_()
    return True


def detached_copy(module: nn.Module) -> nn.Module:
    """A second view of a module whose parameters share memory with the first but carry no gradient.

    Optimisers update parameters in place, so the copy is always at the current values. Evaluating a density through it
    gives the derivative with respect to its inputs alone, which is what path-wise ("stick the landing") gradients need.

    Arguments:
        module: any module.

    Returns:
        A module of the same class; buffers and parameters share storage with the original.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> view = detached_copy(net)
        >>> view.weight.data_ptr() == net.weight.data_ptr(), view.weight.requires_grad
        (True, False)
    """
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


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
