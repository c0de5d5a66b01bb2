r"""The reverse stochastic differential equation of a diffusion, solved by torchsde.

Backwards in time a diffusion with schedule :math:`(f, g)` is a diffusion again (Anderson),

.. math:: \mathrm dx = \big(f_t x - g_t^2 \nabla \log p_t(x)\big) \mathrm dt + g_t \,\mathrm d\bar W .

torchsde steps forwards, evenly, and interpolates between its steps. Time is therefore counted from noise to data, and
every interval between two times of the schedule is one step of length one on a clock of its own
(:mod:`pyro_genmods.evolve.brownian`): every time is hit exactly, the network is called once a step, and the increments
come from torch's generator, so that ``torch.manual_seed`` and ``pyro.set_rng_seed`` repeat them.

References:
    B. D. O. Anderson, Reverse-time diffusion equation models, Stochastic Processes and their Applications 12 (1982). X.
    Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, Scalable Gradients for Stochastic Differential Equations, 2020,
    arXiv:2001.01328 (torchsde).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .brownian import Coefficients, solve
from .denoiser import Denoiser
from .samplers import Draw, Sampler
from .schedule import VP

__all__ = ["ReverseSDE"]


@dataclass(frozen=True)
class ReverseSDE(Sampler):
    """The reverse equation by Euler and Maruyama's method, on the times of a schedule.

    Arguments:
        steps: how many; one call of the network each.
        schedule: whose equation it is; a variance-preserving one by default. The angle's own clock has an infinite rate
            at its end, and is for the other samplers.

    Attributes:
        differentiable: no; the noise is drawn inside, so that draws have no noise space.

    Raises:
        ValueError: fewer than one step, or a schedule whose rate is infinite.

    Example:
        >>> import pyro_genmods as gm
        >>> law = gm.Diffusion(2).sampled_by(ReverseSDE(32))()
        >>> _ = torch.manual_seed(0)
        >>> law.sample((5,)).shape
        torch.Size([5, 2])
    """

    steps: int = 256
    stochastic: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is None:
            object.__setattr__(self, "schedule", VP())
        last = torch.tensor(self.schedule.ends[1], dtype=torch.float64)
        if not float(self.schedule.diffusion(last)) < 1e3:
            raise ValueError(
                f"schedule: {type(self.schedule).__name__} has an infinite rate at its last time; take VP(), EDM() or "
                "another whose diffusion coefficient is finite."
            )

    def run(self, denoiser: Denoiser, u: Tensor, c: Tensor | None, angles: Tensor, draw: Draw) -> Tensor:
        times = self.schedule.times(self.steps).to(u)
        angles, scales = self.schedule.angle(times), self.schedule.scale(times)
        rates, pulls = (of(times).expand_as(times) for of in (self.schedule.diffusion, self.schedule.drift))

        def drift(k: int, _: Tensor, x: Tensor) -> Tensor:
            score = denoiser.score(angles[k], x / scales[k], c) / scales[k]
            return rates[k].square() * score - pulls[k] * x

        def diffusion(k: int, _: Tensor, x: Tensor) -> Tensor:
            return rates[k].expand_as(x)

        with torch.no_grad():
            path, _ = solve(Coefficients(drift, diffusion), -times, u * scales[0])
        return path[:, -1] / scales[-1]
