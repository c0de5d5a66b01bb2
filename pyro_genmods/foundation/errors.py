"""Errors that name the argument, what was got, and the remedy.

Every class derives from the built-in exception that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class ShapeError(ValueError):
    """A tensor has the wrong shape, a context is missing or superfluous, or its size is not the model's."""


class PlacementError(TypeError, ValueError):
    """A tensor has another dtype or lives on another device than the model it was given to."""


class SupportError(ValueError):
    """A value lies outside the support of the distribution, or is NaN."""


class DataError(ValueError):
    """Training data that no density can be learned from: NaN, infinite or constant."""


class DensityError(NotImplementedError):
    """A density, transport or sampler was asked of a mechanism that does not have it."""


class DoublyIntractableError(DensityError):
    """A density is asked for whose unknown constant depends on what is being inferred or learned."""


class InverseError(RuntimeError):
    """An inverse disagrees with its own forward map on too many points to be trusted."""


class IntegrationError(RuntimeError):
    """A differential equation cannot be solved: its field is not finite, or it is too stiff for the steps allowed."""


class SlowDirectionError(ValueError):
    """The slow direction of a transport is about to be run inside a loop."""


class SlowDirectionWarning(UserWarning):
    """The slow direction of a transport is about to be run; the answer is right, the wait is long."""


class FileFormatError(ValueError):
    """A file is not ours, is damaged, is newer than this version, or names a class outside the allow-list."""


class ModelError(ValueError):
    """A Pyro program that cannot be sampled as it stands; the message names the site and the way out."""


class SamplingError(RuntimeError):
    """A sampler that has nowhere to start, or that does not move."""
