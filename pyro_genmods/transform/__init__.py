"""The room of transforms: diffeomorphisms of noise with an exact density."""

from .defaults import guide_flow
from .flow import Flow

__all__ = ["Flow", "guide_flow"]
