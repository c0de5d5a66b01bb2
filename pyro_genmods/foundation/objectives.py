r"""Training objectives: one formula, one home.

Every objective maps model quantities of a batch to one loss per example, shape ``(rows,)``; the reduction over the
batch belongs to the training loop.
"""

from __future__ import annotations

from .shapes import Values

__all__ = ["negative_log_likelihood"]


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
