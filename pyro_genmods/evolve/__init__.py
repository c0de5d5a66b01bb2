"""The room of evolution: probability mass moved along time, by diffusions and stochastic differential equations."""

from ..foundation.ode import RK4, Euler, Heun
from .diffusion import Diffusion
from .energy import EnergyLaw
from .sampled import SampledLaw
from .samplers import AdamsBashforth, Ancestral, DPMSolver, PredictorCorrector
from .schedule import EDM, VE, VP, Angle, Cosine, Rectified, Schedule, SubVP

__all__ = [
    "EDM",
    "RK4",
    "VE",
    "VP",
    "AdamsBashforth",
    "Ancestral",
    "Angle",
    "Cosine",
    "DPMSolver",
    "Diffusion",
    "EnergyLaw",
    "Euler",
    "Heun",
    "PredictorCorrector",
    "Rectified",
    "SampledLaw",
    "Schedule",
    "SubVP",
]
