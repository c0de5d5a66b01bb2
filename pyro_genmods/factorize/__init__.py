"""The room of factorisations: densities as products of conditionals."""

from .autoregressive import Autoregressive
from .conditionals import Bernoulli, Categorical, Conditional
from .discretized import DiscretizedLogisticMixture
from .mixed import Mixed
from .mixtures import GaussianMixture, LogisticMixture
from .spline import Spline
from .student import StudentMixture

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "Conditional",
    "DiscretizedLogisticMixture",
    "GaussianMixture",
    "LogisticMixture",
    "Mixed",
    "Spline",
    "StudentMixture",
]
