"""Learning a model from data: one loop for all mechanisms, on Lightning.

:func:`fit` checks the data (:mod:`~pyro_genmods.training.data`), runs the loop (:mod:`~pyro_genmods.training.loop`) and
keeps its state (:mod:`~pyro_genmods.training.state`), so that a run that was killed goes on where it was.
"""

from .fitting import fit
from .history import TrainingHistory

__all__ = ["TrainingHistory", "fit"]
