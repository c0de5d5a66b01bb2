"""The room of shape: laws known by their energy, up to a constant that is measured and not hidden."""

from .binary_law import BinaryDistribution
from .binary_objectives import GibbsContrastive, Likelihood
from .binary_sampling import AnnealedGibbs, Enumerated, GibbsChains
from .boltzmann import RBM
from .curved import Banana, Funnel, Rosenbrock
from .discrete import DiscreteEnergy
from .energy import Energy
from .lattice import Ising
from .law import EnergyDistribution
from .normalize import normalize
from .objectives import NCE, Contrastive, Denoising, Hyvarinen, Objective, Recovery, Sliced
from .partition import LogNormalizer, log_normalizer
from .references import DoubleWell, Gaussian, GaussianMixture, Reference
from .report import MixingReport, mixing_report
from .sampling import Annealed, Chains, EnergySampler
from .tempering import Tempering

__all__ = [
    "NCE",
    "RBM",
    "Annealed",
    "AnnealedGibbs",
    "Banana",
    "BinaryDistribution",
    "Chains",
    "Contrastive",
    "Denoising",
    "DiscreteEnergy",
    "DoubleWell",
    "Energy",
    "EnergyDistribution",
    "EnergySampler",
    "Enumerated",
    "Funnel",
    "Gaussian",
    "GaussianMixture",
    "GibbsChains",
    "GibbsContrastive",
    "Hyvarinen",
    "Ising",
    "Likelihood",
    "LogNormalizer",
    "MixingReport",
    "Objective",
    "Recovery",
    "Reference",
    "Rosenbrock",
    "Sliced",
    "Tempering",
    "log_normalizer",
    "mixing_report",
    "normalize",
]
