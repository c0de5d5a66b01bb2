"""`AutoFlow` against `AutoMultivariateNormal` on real posteriors with reference draws; skipped where there are no data.

The comparison itself is `benchmarks/guides_posteriordb.py`, imported by path: what is tested is what is published.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest

from .reference_data import DATA, POSTERIORS, ROOT, loaded, with_data

SHORT = "gp_pois_regr-gp_regr"

pytestmark = with_data


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return loaded(ROOT / "benchmarks" / "guides_posteriordb.py")


def measured(benchmark: ModuleType, capsys: pytest.CaptureFixture, name: str, steps: int) -> dict[str, Any]:
    row = benchmark.compare(benchmark.load(DATA), name, steps=steps, particles=1, draws=4000)
    row["log evidence"] = benchmark.log_evidence(DATA, name)
    with capsys.disabled():
        print(f"\n{name}: normal {row['normal elbo']:.3f} (k-hat {row['normal khat']:.2f}), ", end="")
        print(f"flow {row['flow start']:.3f} -> {row['flow elbo']:.3f} (k-hat {row['flow khat']:.2f})")
    return row


def check(benchmark: ModuleType, row: dict[str, Any]) -> None:
    """Not behind the normal guide, at the start or at the end; below the log evidence; close to the reference draws."""
    assert not benchmark.behind(row)
    assert not benchmark.behind({**row, "flow elbo": row["flow start"], "flow error": row["flow start error"]})
    assert row["flow elbo"] > row["flow start"] - 3 * math.hypot(row["flow error"], row["flow start error"]) - 0.01
    assert row["log evidence"] - 0.3 < row["flow elbo"] < row["log evidence"] + 5 * row["flow error"] + 0.01
    assert row["flow mean error"] < 0.2
    assert 0.85 < row["flow sd ratio"] < 1.15


def test_one_posterior(benchmark, capsys):
    check(benchmark, measured(benchmark, capsys, SHORT, steps=250))


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTERIORS)
def test_every_posterior(benchmark, capsys, name):
    check(benchmark, measured(benchmark, capsys, name, steps=2000))


def test_every_posterior_is_in_the_list(benchmark):
    assert set(POSTERIORS) == set(benchmark.load(DATA).POSTERIORS)
    assert all(benchmark.log_evidence(DATA, name) is not None for name in POSTERIORS)


def test_without_data_the_benchmark_says_so(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["guides_posteriordb.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data"):
        benchmark.main()
