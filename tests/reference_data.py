"""Real data with reference answers, which lie beside the project or not at all; tests skip where they do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
POSTERIORS = [
    "eight_schools-eight_schools_noncentered",
    "arK-arK",
    "kidiq-kidscore_momhsiq",
    "sblri-blr",
    "earnings-logearn_height",
    "gp_pois_regr-gp_regr",
]
with_data = pytest.mark.skipif(not (DATA / "posteriordb_models.py").exists(), reason=f"no data in {DATA.name}")


def loaded(path: Path) -> ModuleType:
    """A module by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
