"""Upstairs: inference that knows only the contract, so that it works for every mechanism."""

from .exchange import Exchange
from .guides import AutoFlow
from .initialization import init_to_prior
from .kernels import HMC, MALA, ULA
from .mcmc import MCMC
from .mean_field import TraceMeanField_ELBO
from .potential import Potential, potential
from .reparam import PushforwardReparam
from .smc import SMC
from .tempering import ParallelTempering
from .tilt import TiltReparam

__all__ = [
    "HMC",
    "MALA",
    "MCMC",
    "SMC",
    "ULA",
    "AutoFlow",
    "Exchange",
    "ParallelTempering",
    "Potential",
    "PushforwardReparam",
    "TiltReparam",
    "TraceMeanField_ELBO",
    "init_to_prior",
    "potential",
]
