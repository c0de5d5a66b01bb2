"""Saving and loading: one file of tensors and plain data, that can run no code.

:mod:`~pyro_genmods.io.files` is the format on disk; :mod:`~pyro_genmods.io.writer` and :mod:`~pyro_genmods.io.reader`
take a model to plain data and back; :mod:`~pyro_genmods.io.allowlist` decides which names a file may utter.
:mod:`~pyro_genmods.io.draw_store` is a folder of draws that grows while a sampler runs.
"""

from .draw_store import DrawStore
from .files import describe, load, read_tensors, save, write_tensors

__all__ = ["DrawStore", "describe", "load", "read_tensors", "save", "write_tensors"]
