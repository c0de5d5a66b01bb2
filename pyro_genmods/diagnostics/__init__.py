"""Whether to trust a result: numbers and pictures, with ArviZ underneath."""

from .calibration import Coverage, interval_coverage, psis_khat
from .plots import plot_calibration, plot_image_posterior

__all__ = ["Coverage", "interval_coverage", "plot_calibration", "plot_image_posterior", "psis_khat"]
