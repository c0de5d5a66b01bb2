r"""Training objectives: one formula, one home.

Every objective maps model quantities of a batch to one loss per example, shape ``(rows,)``; the reduction over the
batch belongs to the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .shapes import Rows, Values

__all__ = [
    "contrastive_divergence",
    "denoising_score_matching",
    "energy_score",
    "gradient_penalty",
    "hyvarinen_score",
    "logistic_contrast",
    "negative_log_likelihood",
    "sliced_score_matching",
    "wasserstein_critic",
]


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


def logistic_contrast(real: Values, fake: Tensor) -> Values:
    r"""Logistic loss of telling data from draws.

    .. math:: \operatorname{softplus}(\log k - r(x)) + \sum_{i=1}^k \operatorname{softplus}(r(\tilde x_i) - \log k)

    Its minimiser over all functions is the log density ratio, :math:`r = \log p_{\text{data}} / p_{\text{draws}}`; with
    more draws for each datum, :math:`k`, its error comes near to that of maximum likelihood.

    Arguments:
        real, fake: the log ratio :math:`r` at data, ``(rows,)``, and at draws, ``(rows,)`` or ``(rows, k)``, in nats.

    Returns:
        The loss per row, ``(rows,)``, in nats; with one draw each :math:`2 \log 2` if the two cannot be told apart.

    References:
        M. U. Gutmann, A. Hyvarinen, Noise-Contrastive Estimation of Unnormalized Statistical Models, Journal of Machine
        Learning Research 13 (2012) 307-361.

    Example:
        >>> logistic_contrast(torch.zeros(1), torch.zeros(1))
        tensor([1.3863])
    """
    fake = fake.reshape(len(real), -1)
    log_draws = math.log(fake.shape[1])
    return softplus(log_draws - real) + softplus(fake - log_draws).sum(1)


def hyvarinen_score(score: Callable[[Tensor], Tensor], x: Rows) -> Values:
    r"""Hyvarinen's score, which a law without a normaliser has too.

    .. math:: S(x) = \tfrac12\, |s(x)|^2 + \nabla \cdot s(x), \qquad s = \nabla \log p

    Its expectation over data of law :math:`q` is half the mean of :math:`|s - \nabla \log q|^2`, up to a constant of
    :math:`q` alone. The divergence takes as many reverse passes, in one batch, as there are features. It is blind to
    the weights of modes that lie far apart.

    Arguments:
        score: :math:`s`, rows to rows, each row for itself; differentiable.
        x: data, ``(rows, features)``.

    Returns:
        The score per row, ``(rows,)``, also where gradients are off.

    References:
        A. Hyvarinen, Estimation of Non-Normalized Statistical Models by Score Matching, Journal of Machine Learning
        Research 6 (2005) 695-709.

    Example:
        >>> hyvarinen_score(lambda x: -x / 4, torch.zeros(1, 3)).detach()       # N(0, 4 I): divergence -3/4
        tensor([-0.7500])
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        s = score(leaf)
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None].expand(-1, *x.shape)
        (rows,) = torch.autograd.grad(s, leaf, eye, create_graph=True, is_grads_batched=True)
        return 0.5 * s.square().sum(-1) + rows.diagonal(dim1=0, dim2=2).sum(-1)


def sliced_score_matching(score: Callable[[Tensor], Tensor], x: Rows, directions: Tensor) -> Values:
    r"""Hyvarinen's score with its divergence estimated along random directions.

    .. math:: \tfrac12\, |s(x)|^2 + \tfrac1M \sum_m v_m^\top \frac{\partial s}{\partial x}\, v_m ,
              \qquad \mathbb E\, v v^\top = I

    Arguments:
        score: :math:`s`, rows to rows; differentiable.
        x: data, ``(rows, features)``.
        directions: :math:`v`, ``(M, rows, features)``; signs have less variance than normal numbers.

    Returns:
        The estimate per row, ``(rows,)``; one reverse pass for each direction, in one batch.

    References:
        Y. Song, S. Garg, J. Shi, S. Ermon, Sliced Score Matching: A Scalable Approach to Density and Score Estimation,
        2019, arXiv:1905.07088.

    Example:
        >>> sliced_score_matching(lambda x: -x / 4, torch.zeros(1, 3), torch.ones(2, 1, 3)).detach()
        tensor([-0.7500])
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        s = score(leaf)
        (pulled,) = torch.autograd.grad(s, leaf, directions, create_graph=True, is_grads_batched=True)
        return 0.5 * s.square().sum(-1) + (pulled * directions).sum(-1).mean(0)


def denoising_score_matching(score: Rows, noise: Rows, sigma: Tensor | float) -> Values:
    r"""Squared error of a score at noisy data, in units of the noise.

    .. math:: \tfrac12 \bigl|\sigma\, s(x + \sigma \epsilon) + \epsilon\bigr|^2

    Its minimiser is the score of the data's law blurred by :math:`\mathcal N(0, \sigma^2 I)`.

    Arguments:
        score: :math:`s` at the noisy data, ``(rows, features)``.
        noise: :math:`\epsilon`, standard normal, ``(rows, features)``.
        sigma: one level, or a column ``(rows, 1)``.

    Returns:
        The loss per row, ``(rows,)``.

    References:
        P. Vincent, A Connection Between Score Matching and Denoising Autoencoders, Neural Computation 23 (2011)
        1661-1674.

    Example:
        >>> denoising_score_matching(torch.tensor([[-2.0]]), torch.tensor([[1.0]]), 0.5)
        tensor([0.])
    """
    return 0.5 * (sigma * score + noise).square().sum(-1)


def contrastive_divergence(real: Values, fake: Values) -> Values:
    r"""Energy of data less that of draws of the model.

    .. math:: E_\phi(x) - E_\phi(\tilde x), \qquad \tilde x \sim p_\phi

    Its *gradient*, with the draws held, is that of the negative log-likelihood, whose normaliser is unknown:
    :math:`\nabla \log Z = -\mathbb E_{p_\phi} \nabla E_\phi`. Its value says nothing.

    Arguments:
        real, fake: energies of data and draws, ``(rows,)``, in nats.

    Returns:
        The loss per row, ``(rows,)``.

    References:
        G. E. Hinton, Training Products of Experts by Minimizing Contrastive Divergence, Neural Computation 14 (2002)
        1771-1800. T. Tieleman, Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient,
        2008, ICML.

    Example:
        >>> contrastive_divergence(torch.tensor([1.0]), torch.tensor([3.0]))
        tensor([-2.])
    """
    return real - fake
