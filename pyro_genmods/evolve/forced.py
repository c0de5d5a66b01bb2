r"""The law of a diffusion's probability flow with the network's score as its force, for Hamiltonian Monte Carlo.

A leapfrog with this law costs one call of the network; only the accept test solves the equation. The chain is exact for
the law of the flow, whatever the score is worth, because a leapfrog with any fixed force keeps volumes and can be
reversed, see :mod:`pyro_genmods.foundation.forces`; the error of the score shows in the acceptance.

Noise space (:meth:`~pyro_genmods.Diffusion.sampled_by` and :class:`~pyro_genmods.infer.PushforwardReparam`) is usually
better still. Variational inference and optimisation, which have no accept test, are refused.
"""

from __future__ import annotations

from typing import Any

from ..contract import Cost, GenerativeModel
from ..foundation.errors import DensityError
from ..foundation.forces import with_force
from ..foundation.shapes import Context, Noise, Rows, Values
from .network import check_level

__all__ = ["ForcedLaw"]


class ForcedLaw(GenerativeModel):
    """A diffusion's law of which the gradient is the network's score; frozen.

    Arguments:
        diffusion: a :class:`~pyro_genmods.Diffusion`; the network is shared.
        level: noise at which the score is asked for, in white standard deviations; default the calibrated one.
        estimated: accept a density with an estimated divergence. The chain then samples the law of these frozen probes,
            not that of the flow.

    Raises:
        TypeError: not a diffusion.
        DensityError: an estimated density, not accepted.
        ValueError: a level below the model's least.

    Example:
        >>> import torch, pyro_genmods as gm
        >>> law = gm.Diffusion(2).with_score_force()()
        >>> law.log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    has_rsample = False

    def __init__(self, diffusion: GenerativeModel, level: float | None = None, estimated: bool = False) -> None:
        if not hasattr(diffusion, "score_rows"):
            raise TypeError(f"diffusion: got {type(diffusion).__name__}, needs a Diffusion.")
        check_level(level, diffusion.sigma_min)
        if not (diffusion.acceptable or estimated):
            raise DensityError(
                "with_score_force: the divergence is estimated, and an accept test with it samples another law than "
                "the flow's. Use noise space (sampled_by), trace='exact', or say estimated=True."
            )
        super().__init__(diffusion.event_shape, diffusion.context_shape, diffusion.coordinates.support)
        self.diffusion, self.level, self.density = diffusion, level, diffusion.density
        self.coordinates = diffusion.coordinates
        self.context_standardization = diffusion.context_standardization

    @property
    def cost(self) -> Cost:
        """That of the flow; its gradient takes one call."""
        return self.diffusion.cost

    def log_prob_rows(self, y: Rows, c: Context | None) -> Values:
        return with_force(self.diffusion.log_prob_rows, self._force, y, c)

    def push_rows(self, z: Noise, c: Context | None) -> Rows:
        return self.diffusion.push_rows(z, c)

    def pull_rows(self, y: Rows, c: Context | None) -> Noise:
        return self.diffusion.pull_rows(y, c)

    def loss(self, x: Any, context: Any = None) -> Values:
        """Refused: the law is frozen."""
        raise DensityError("ForcedLaw: is frozen, its density has no gradient of parameters; fit the diffusion itself.")

    def _force(self, y: Rows, c: Context | None) -> Rows:
        return self.diffusion.score_rows(y, c, self.level)
