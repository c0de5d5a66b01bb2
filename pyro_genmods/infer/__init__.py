"""Upstairs: inference that knows only the contract, so that it works for every mechanism."""

from .guides import AutoFlow
from .kernels import HMC, MALA, ULA
from .mcmc import MCMC
from .potential import Potential, potential
from .reparam import PushforwardReparam

__all__ = ["HMC", "MALA", "MCMC", "ULA", "AutoFlow", "Potential", "PushforwardReparam", "potential"]
