"""Upstairs: inference that knows only the contract, so that it works for every mechanism."""

from .guides import AutoFlow
from .reparam import PushforwardReparam

__all__ = ["AutoFlow", "PushforwardReparam"]
