"""The room of evolution: probability mass moved along time, by diffusions and stochastic differential equations."""

from ..foundation.ode import RK4, Euler, Heun
from .diffusion import Diffusion
from .energy import EnergyLaw
from .forced import ForcedLaw
from .path import NeuralSDE
from .path_law import PathDistribution, refine_times
from .path_posterior import SDEPosterior, path_kl
from .reverse_sde import ReverseSDE
from .sampled import SampledLaw
from .samplers import AdamsBashforth, Ancestral, DPMSolver, PredictorCorrector
from .schedule import EDM, VE, VP, Angle, Cosine, Rectified, Schedule, SubVP
from .score_divergence import score_divergence

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
    "ForcedLaw",
    "Heun",
    "NeuralSDE",
    "PathDistribution",
    "PredictorCorrector",
    "Rectified",
    "ReverseSDE",
    "SDEPosterior",
    "SampledLaw",
    "Schedule",
    "SubVP",
    "path_kl",
    "refine_times",
    "score_divergence",
]
