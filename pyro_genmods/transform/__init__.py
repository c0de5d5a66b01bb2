"""The room of transforms: diffeomorphisms of noise with an exact density."""

from .defaults import coupling_flow, guide_flow
from .flow import Flow

__all__ = ["Flow", "coupling_flow", "guide_flow"]
