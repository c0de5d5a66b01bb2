r"""Training objectives: one formula, one home.

Every objective maps model quantities of a batch to one loss per example, shape ``(rows,)``; the reduction over the
batch belongs to the training loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .shapes import Rows, Values

__all__ = ["energy_score", "gradient_penalty", "logistic_contrast", "negative_log_likelihood", "wasserstein_critic"]


def negative_log_likelihood(log_prob: Values) -> Values:
    r"""Negative log-likelihood in nats, :math:`\ell(x) = -\log p_\phi(x)`.

    Its expectation under the data law :math:`p` is the cross entropy
    :math:`H(p) + \mathrm{KL}(p \,\|\, p_\phi)`, so its minimiser is the model closest to the data in relative entropy.

    Arguments:
        log_prob: log densities of the examples, shape ``(rows,)``, in nats.

    Returns:
        The loss per example, shape ``(rows,)``, in nats.

    Example:
        >>> import torch
        >>> negative_log_likelihood(torch.tensor([-1.5, -2.0]))
        tensor([1.5000, 2.0000])
    """
    return -log_prob


def energy_score(x: Rows, draws: Tensor) -> Values:
    r"""Energy score of a sampler at an observation, an unbiased estimate from a few draws.

    .. math:: S(P, x) = \mathbb E\,|X - x| - \tfrac12\, \mathbb E\,|X - X'|, \qquad X, X' \sim P \text{ independent}

    It is strictly proper: its expectation over :math:`x \sim Q` is least for :math:`P = Q` and for no other law, by
    half the energy distance of the two. So it teaches and compares samplers that have no density.

    Arguments:
        x: observations, ``(rows, features)``.
        draws: at least two independent draws for each row, ``(draws, rows, features)``, differentiable.

    Returns:
        The score per row, ``(rows,)``, in the units of ``x``.

    References:
        T. Gneiting, A. E. Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, Journal of the American
        Statistical Association 102 (2007) 359-378.

    Example:
        >>> energy_score(torch.zeros(1, 1), torch.tensor([[[1.0]], [[-2.0]]]))       # (1 + 2) / 2 - 3 / 2
        tensor([0.])
    """
    m = len(draws)
    distance = torch.linalg.vector_norm(draws - x, dim=-1).mean(0)
    first, second = torch.triu_indices(m, m, 1, device=x.device)
    return distance - 0.5 * torch.linalg.vector_norm(draws[first] - draws[second], dim=-1).mean(0)


def wasserstein_critic(real: Values, fake: Values, penalty: Values | float) -> Values:
    r"""What a critic minimises: :math:`f(\tilde x) - f(x) + \text{penalty}`.

    Over functions :math:`f` whose slope is at most one, :math:`\sup_f \mathbb E f(x) - \mathbb E f(\tilde x)` is the
    Wasserstein distance :math:`W_1` of the two laws (Kantorovich and Rubinstein).

    Arguments:
        real, fake: the critic at data and at draws, ``(rows,)``, in the units of the coordinates.
        penalty: what keeps the slope at one, see :func:`gradient_penalty`.

    Returns:
        The loss per row, ``(rows,)``.

    References:
        M. Arjovsky, S. Chintala, L. Bottou, Wasserstein GAN, 2017, arXiv:1701.07875.

    Example:
        >>> wasserstein_critic(torch.tensor([2.0]), torch.tensor([-1.0]), 0.5)
        tensor([-2.5000])
    """
    return fake - real + penalty


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Rows, fake: Rows, mix: Tensor) -> Values:
    r"""How far the critic's slope is from one between data and draws.

    .. math:: \bigl(|\nabla f(\hat x)| - 1\bigr)^2, \qquad \hat x = t\,x + (1 - t)\,\tilde x

    Arguments:
        critic: :math:`f`, rows ``(rows, features)`` to values ``(rows,)``.
        real, fake: data and draws, ``(rows, features)``.
        mix: :math:`t`, uniform on [0, 1], ``(rows, 1)``.

    Returns:
        The penalty per row, ``(rows,)``, differentiable in the critic's parameters; also where gradients are off.

    References:
        I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville, Improved Training of Wasserstein GANs, 2017,
        arXiv:1704.00028.

    Example:
        >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)
        >>> gradient_penalty(lambda x: 3 * x[:, 0], one, zero, torch.full((1, 1), 0.5))       # (3 - 1)^2
        tensor([4.])
    """
    with torch.enable_grad():
        between = torch.lerp(fake.detach(), real.detach(), mix).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return (torch.linalg.vector_norm(slope, dim=-1) - 1).square()


def logistic_contrast(real: Values, fake: Values) -> Values:
    r"""Logistic loss of telling data from draws.

    .. math:: \operatorname{softplus}(-r(x)) + \operatorname{softplus}(r(\tilde x))

    Its minimiser over all functions is the log density ratio, :math:`r = \log p_{\text{data}} / p_{\text{draws}}`.

    Arguments:
        real, fake: the log odds :math:`r` at data and at draws, ``(rows,)``, in nats.

    Returns:
        The loss per row, ``(rows,)``, in nats; :math:`2 \log 2` if the two cannot be told apart.

    References:
        M. U. Gutmann, A. Hyvarinen, Noise-Contrastive Estimation of Unnormalized Statistical Models, Journal of Machine
        Learning Research 13 (2012) 307-361.

    Example:
        >>> logistic_contrast(torch.zeros(1), torch.zeros(1))
        tensor([1.3863])
    """
    return softplus(-real) + softplus(fake)
