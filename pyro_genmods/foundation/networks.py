"""Networks that more than one room needs, facts about networks, and operations on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "SpectralLinear", "detached_copy", "place_of", "spectral_bound", "zero_output_layer"]


class MLP(nn.Sequential):
    r"""Layers of affine maps and one nonlinearity, :math:`A_L \circ \sigma \circ A_{L-1} \circ \dots \circ A_1`.

    Arguments:
        inputs: width of the input; several inputs are put side by side.
        outputs: width of the output.
        hidden_features: widths of the hidden layers; none for an affine map.
        activation: makes :math:`\sigma`.
        linear: makes an affine layer from its two widths and ``bias``.
        output_bias: whether the last layer has one.

    Shape:
        ``(rows, ...)`` in, as many as wanted, and ``(rows, outputs)`` out.

    Example:
        >>> MLP(3, 1, (8, 8))(torch.zeros(5, 2), torch.zeros(5, 1)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden_features: Sequence[int] = (128, 128),
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        linear: Callable[..., nn.Module] = nn.Linear,
        output_bias: bool = True,
    ) -> None:
        widths = [inputs, *hidden_features]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [linear(before, after), activation()]
        super().__init__(*layers, linear(widths[-1], outputs, bias=output_bias))

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))


class SpectralLinear(nn.Linear):
    r"""An affine map that stretches no vector: :math:`y = W x / \bar\sigma(W) + b`, :math:`\bar\sigma \ge |W|_2`.

    The bound is :func:`spectral_bound`, which has no state and holds at every step, in place of one step of power
    iteration, which approaches the norm from below. A network of such layers and of activations with slopes in
    [-1, 1] has a Lipschitz constant of at most one.

    Arguments, shapes: those of ``nn.Linear``.

    References:
        T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, Spectral Normalization for Generative Adversarial Networks, 2018,
        arXiv:1802.05957.

    Example:
        >>> layer = SpectralLinear(4, 3)
        >>> round(torch.linalg.matrix_norm(layer(torch.eye(4)) - layer.bias, 2).item(), 2)
        1.0
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / spectral_bound(self.weight), self.bias)


def spectral_bound(matrix: Tensor, iterations: int = 7) -> Tensor:
    r"""An upper bound on the largest singular value of a matrix, differentiable and tight to two per cent.

    .. math:: \bar\sigma_t = \bigl|(W^\top W)^{2^t}\bigr|_F^{1 / 2^{t+1}} \;\ge\; |W|_2,
              \qquad \bar\sigma_t \le r^{1 / 2^{t + 2}} |W|_2

    with :math:`r` the rank, by :math:`t` squarings whose scale is kept in logarithms.

    Arguments:
        matrix: ``(outputs, inputs)``.
        iterations: :math:`t`; the default bounds the norm of a matrix of rank 128 to one per cent.

    Returns:
        A scalar.

    References:
        B. Delattre, Q. Barthelemy, A. Araujo, A. Allauzen, Efficient Bound of Lipschitz Constant for Convolutional
        Layers by Gram Iteration, 2023, arXiv:2305.16173.

    Example:
        >>> round(float(spectral_bound(torch.diag(torch.tensor([3.0, 2.0, 1.0])))), 4)
        3.0
    """
    power = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    log_scale = torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        norm = torch.linalg.matrix_norm(power).clamp_min(tiny)
        power = power / norm
        log_scale = 2 * (log_scale + norm.log())
        power = power @ power
    norm = torch.linalg.matrix_norm(power).clamp_min(tiny)
    return ((log_scale + norm.log()) / 2 ** (iterations + 1)).exp()


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
