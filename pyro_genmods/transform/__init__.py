"""Room 1 of the mechanisms that transform noise into data: diffeomorphisms with an exact density."""

from .flow import Flow

__all__ = ["Flow"]
