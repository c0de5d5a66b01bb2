"""The room of shape: laws known by their energy, up to a constant that is measured and not hidden."""

from .energy import Energy
from .law import EnergyDistribution
from .objectives import NCE, Contrastive, Denoising, Hyvarinen, Objective, Recovery, Sliced
from .report import MixingReport, mixing_report
from .sampling import Annealed, Chains, EnergySampler

__all__ = [
    "NCE",
    "Annealed",
    "Chains",
    "Contrastive",
    "Denoising",
    "Energy",
    "EnergyDistribution",
    "EnergySampler",
    "Hyvarinen",
    "MixingReport",
    "Objective",
    "Recovery",
    "Sliced",
    "mixing_report",
]
