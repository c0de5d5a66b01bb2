"""Whether to trust a result: numbers and pictures, with ArviZ underneath."""

from ..foundation.convergence import nested_r_hat
from .calibration import Coverage, interval_coverage, psis_khat
from .inference_data import to_inference_data
from .mixing_plots import plot_energy_gap
from .plots import (
    plot_calibration,
    plot_generator_mesh,
    plot_image_posterior,
    plot_trajectories,
    plot_vector_field,
)

__all__ = [
    "Coverage",
    "interval_coverage",
    "nested_r_hat",
    "plot_calibration",
    "plot_energy_gap",
    "plot_generator_mesh",
    "plot_image_posterior",
    "plot_trajectories",
    "plot_vector_field",
    "psis_khat",
    "to_inference_data",
]
