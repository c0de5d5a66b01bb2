r"""The reverse stochastic differential equation of a diffusion, solved by torchsde.

Backwards in time a diffusion with schedule :math:`(f, g)` is a diffusion again (Anderson),

.. math:: \mathrm dx = \big(f_t x - g_t^2 \nabla \log p_t(x)\big) \mathrm dt + g_t \,\mathrm d\bar W .

torchsde steps forwards, evenly, and interpolates between its steps. The clock is therefore changed to one that counts
steps, :math:`t(k)` linear between the times of the schedule: a step of length one from :math:`k` has the drift and the
noise of the step from :math:`t_k` to :math:`t_{k+1}`, every time is hit exactly, and the network is called once a step.
The Brownian path is drawn with entropy from torch's generator, so that ``torch.manual_seed`` and
``pyro.set_rng_seed`` repeat it.

References:
    B. D. O. Anderson, Reverse-time diffusion equation models, Stochastic Processes and their Applications 12 (1982). X.
    Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, Scalable Gradients for Stochastic Differential Equations, 2020,
    arXiv:2001.01328 (torchsde).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torchsde
from torch import Tensor, nn

from .denoiser import Denoiser
from .samplers import Draw, Sampler
from .schedule import VP, Schedule

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
        clock = _Clock(self.schedule, denoiser, times, c)
        entropy = int(torch.randint(2**31 - 1, ()))
        ends = torch.tensor([0.0, float(self.steps)], dtype=u.dtype, device=u.device)
        path = torchsde.BrownianInterval(
            ends[0], ends[1], size=tuple(u.shape), dtype=u.dtype, device=u.device, entropy=entropy
        )
        with torch.no_grad():
            x = u * self.schedule.scale(times[0])
            x = torchsde.sdeint(clock, x, ends, bm=path, dt=1.0, method="euler")[-1]
        return x / self.schedule.scale(times[-1])


class _Clock(nn.Module):
    """Drift and diffusion per step, in the form that torchsde asks for."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, schedule: Schedule, denoiser: Denoiser, times: Tensor, c: Tensor | None) -> None:
        super().__init__()
        self.schedule, self.denoiser, self.c = schedule, denoiser, c
        self.times, self.lengths = times, times.diff()
        self.angles, self.scales = schedule.angle(times), schedule.scale(times)

    def _place(self, k: Tensor) -> int:
        return min(round(float(k)), len(self.lengths) - 1)

    def f(self, k: Tensor, x: Tensor) -> Tensor:
        place = self._place(k)
        t, r = self.times[place], self.scales[place]
        score = self.denoiser.score(self.angles[place], x / r, self.c) / r
        drift = self.schedule.drift(t) * x - self.schedule.diffusion(t).square() * score
        return drift * self.lengths[place]

    def g(self, k: Tensor, x: Tensor) -> Tensor:
        place = self._place(k)
        size = self.schedule.diffusion(self.times[place]) * self.lengths[place].abs().sqrt()
        return size.expand_as(x)
