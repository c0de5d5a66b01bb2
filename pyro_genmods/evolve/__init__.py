"""The room of evolution: probability mass moved along time, by diffusions and stochastic differential equations."""

from ..foundation.ode import RK4, Euler, Heun
from .diffusion import Diffusion
from .distillation import distill
from .distilled import Distilled
from .energy import EnergyLaw
from .forced import ForcedLaw
from .gibbs import SplitGibbs
from .guidance import DPS, ClassifierFree, MomentMatching, PiGDM, guided
from .path import NeuralSDE
from .path_law import PathDistribution, refine_times
from .path_posterior import SDEPosterior, path_kl
from .posterior import Posterior
from .reverse_sde import ReverseSDE
from .sampled import SampledLaw
from .samplers import AdamsBashforth, Ancestral, DPMSolver, PredictorCorrector
from .schedule import EDM, VE, VP, Angle, Cosine, Rectified, Schedule, SubVP
from .score_divergence import score_divergence
from .twisted import TwistedSMC

__all__ = [
    "DPS",
    "EDM",
    "RK4",
    "VE",
    "VP",
    "AdamsBashforth",
    "Ancestral",
    "Angle",
    "ClassifierFree",
    "Cosine",
    "DPMSolver",
    "Diffusion",
    "Distilled",
    "EnergyLaw",
    "Euler",
    "ForcedLaw",
    "Heun",
    "MomentMatching",
    "NeuralSDE",
    "PathDistribution",
    "PiGDM",
    "Posterior",
    "PredictorCorrector",
    "Rectified",
    "ReverseSDE",
    "SDEPosterior",
    "SampledLaw",
    "Schedule",
    "SplitGibbs",
    "SubVP",
    "TwistedSMC",
    "distill",
    "guided",
    "path_kl",
    "refine_times",
    "score_divergence",
]
