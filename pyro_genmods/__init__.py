"""Learned generative models as first-class distributions of Pyro programs.

Learn a distribution from data with any of four mechanisms (factorize, transform, evolve, shape), then use it in a Pyro
program exactly as you would use ``Normal``: as a latent site, a likelihood or a guide, under SVI, HMC, NUTS and
``Predictive``. See the README for a tour and ``docs/design.md`` for the ideas.
"""

from . import transform
from .contract import Cost, Density, GenerativeDistribution, GenerativeModel
from .transform import Flow

__all__ = ["Cost", "Density", "Flow", "GenerativeDistribution", "GenerativeModel", "transform"]
__version__ = "0.1.0"
