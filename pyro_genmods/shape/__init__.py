"""The room of shape: laws known by their energy, up to a constant that is measured and not hidden."""

from .binary_law import BinaryDistribution
from .binary_objectives import GibbsContrastive, Likelihood
from .binary_sampling import AnnealedGibbs, Enumerated, GibbsChains
from .boltzmann import RBM
from .discrete import DiscreteEnergy
from .energy import Energy
from .lattice import Ising
from .law import EnergyDistribution
from .objectives import NCE, Contrastive, Denoising, Hyvarinen, Objective, Recovery, Sliced
from .report import MixingReport, mixing_report
from .sampling import Annealed, Chains, EnergySampler

__all__ = [
    "NCE",
    "RBM",
    "Annealed",
    "AnnealedGibbs",
    "BinaryDistribution",
    "Chains",
    "Contrastive",
    "Denoising",
    "DiscreteEnergy",
    "Energy",
    "EnergyDistribution",
    "EnergySampler",
    "Enumerated",
    "GibbsChains",
    "GibbsContrastive",
    "Hyvarinen",
    "Ising",
    "Likelihood",
    "MixingReport",
    "Objective",
    "Recovery",
    "Sliced",
    "mixing_report",
]
