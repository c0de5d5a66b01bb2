"""Upstairs: inference that knows only the contract, so that it works for every mechanism."""

from .guides import AutoFlow
from .initialization import init_to_prior
from .kernels import HMC, MALA, ULA
from .mcmc import MCMC
from .potential import Potential, potential
from .reparam import PushforwardReparam
from .smc import SMC
from .tempering import ParallelTempering

__all__ = [
    "HMC",
    "MALA",
    "MCMC",
    "SMC",
    "ULA",
    "AutoFlow",
    "ParallelTempering",
    "Potential",
    "PushforwardReparam",
    "init_to_prior",
    "potential",
]
