"""The room of factorisations: densities as products of conditionals."""

from .autoregressive import Autoregressive
from .conditionals import Bernoulli, Categorical, Conditional
from .continuous_mixture import ContinuousMixture
from .discretized import DiscretizedLogisticMixture
from .ensemble import Ensemble
from .exposure import entropy_drift, exposure_bias
from .mixed import Mixed
from .mixtures import GaussianMixture, LogisticMixture
from .spline import Spline
from .student import StudentMixture

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "Conditional",
    "ContinuousMixture",
    "DiscretizedLogisticMixture",
    "Ensemble",
    "GaussianMixture",
    "LogisticMixture",
    "Mixed",
    "Spline",
    "StudentMixture",
    "entropy_drift",
    "exposure_bias",
]
