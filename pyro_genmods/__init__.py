"""Learned generative models as first-class distributions of Pyro programs.

Learn a distribution from data with any of four mechanisms (factorize, transform, evolve, shape), then use it in a Pyro
program exactly as you would use ``Normal``: as a latent site, a likelihood or a guide, under SVI, HMC, NUTS and
``Predictive``. See the README for a tour and ``docs/design.md`` for the ideas.
"""

from . import diagnostics, evolve, factorize, infer, shape, transform
from .contract import Cost, Density, GenerativeDistribution, GenerativeModel
from .evolve import Diffusion, Distilled, NeuralSDE
from .factorize import Autoregressive
from .io import load, save
from .shape import Energy
from .training import TrainingHistory, fit
from .transform import Adversarial, ContinuousFlow, Flow

# Upstairs knows only the contract; the front door tells it which flow to take where the user has no opinion.
infer.AutoFlow.default_flow = staticmethod(transform.guide_flow)

__all__ = [
    "Adversarial",
    "Autoregressive",
    "ContinuousFlow",
    "Cost",
    "Density",
    "Diffusion",
    "Distilled",
    "Energy",
    "Flow",
    "GenerativeDistribution",
    "GenerativeModel",
    "NeuralSDE",
    "TrainingHistory",
    "diagnostics",
    "evolve",
    "factorize",
    "fit",
    "infer",
    "load",
    "save",
    "shape",
    "transform",
]
__version__ = "0.1.0"
