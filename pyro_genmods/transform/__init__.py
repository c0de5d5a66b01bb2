"""The room of transforms: noise carried to data, by diffeomorphisms with a density and by generators without one."""

from ..foundation.ode import RK4, DormandPrince, Euler, Heun
from .adversarial import Adversarial
from .continuous import ContinuousFlow
from .corrected import Corrected
from .defaults import coupling_flow, guide_flow
from .flow import Flow
from .pushforward import Pushforward

__all__ = [
    "RK4",
    "Adversarial",
    "ContinuousFlow",
    "Corrected",
    "DormandPrince",
    "Euler",
    "Flow",
    "Heun",
    "Pushforward",
    "coupling_flow",
    "guide_flow",
]
