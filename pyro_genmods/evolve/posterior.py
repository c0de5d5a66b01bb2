"""What the samplers of posteriors give back: weighted draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..foundation.resampling import systematic

__all__ = ["Posterior"]


@dataclass(frozen=True)
class Posterior:
    """Weighted draws of a posterior.

    Attributes:
        draws: ``(n, *event_shape)``.
        log_weights: unnormalised, ``(n,)``, in nats; all zero where draws are of equal weight.
        log_evidence: logarithm of the mean of the likelihood under the prior, in nats; ``None`` where the sampler does
            not know it.
        log_evidences: of each independent run.
        ess: what the weights are worth, in draws. Draws that share ancestors are worth less than that.
        evaluations: sequential calls of the network.
        trace: effective number of particles of each run before every step, ``(runs, steps)``.
        agreement: how much the runs disagree, as the largest R-hat between their means; near 1 where they agree, NaN
            for one run.

    Example:
        >>> found = Posterior(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -torch.inf]))
        >>> found.mean, found.resample(3).flatten()
        (tensor([0.]), tensor([0., 0., 0.]))
    """

    draws: Tensor
    log_weights: Tensor
    log_evidence: float | None = None
    log_evidences: Tensor | None = None
    ess: float = math.nan
    evaluations: int = 0
    trace: Tensor | None = None
    agreement: float = math.nan

    @property
    def weights(self) -> Tensor:
        """Normalised, ``(n,)``."""
        return self.log_weights.softmax(0)

    @property
    def log_evidence_error(self) -> float:
        """Standard error of the log evidence, from the scatter of the runs; NaN for one run."""
        if self.log_evidences is None or len(self.log_evidences) < 2:
            return math.nan
        relative = (self.log_evidences - self.log_evidence).exp()
        return float(relative.std() / math.sqrt(len(relative)))

    @property
    def mean(self) -> Tensor:
        """Of the posterior, ``(*event_shape)``."""
        return torch.einsum("n,n...->...", self.weights.to(self.draws), self.draws)

    @property
    def variance(self) -> Tensor:
        """Of each entry under the posterior, ``(*event_shape)``."""
        return torch.einsum("n,n...->...", self.weights.to(self.draws), (self.draws - self.mean).square())

    def resample(self, n: int | None = None) -> Tensor:
        """Draws of equal weight, ``(n, *event_shape)``, in random order.

        Arguments:
            n: how many, by default as many as there are.
        """
        n = len(self.draws) if n is None else n
        if n < 1:
            raise ValueError(f"n: got {n}, needs at least 1 draw.")
        copies = -(-n // len(self.draws))  # systematic resampling, of as many copies of each as are enough
        index = systematic(self.log_weights.repeat_interleave(copies)) // copies
        return self.draws[index[torch.randperm(len(index), device=index.device)[:n]]]
