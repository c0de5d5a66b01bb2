"""On posteriors with reference draws, where these are at hand: the flow guide is never behind the normal guide."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.guides_posteriordb import compare, load

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = (
    "earnings-logearn_height",
    "eight_schools-eight_schools_noncentered",
    "arK-arK",
    "kidiq-kidscore_momhsiq",
    "sblri-blr",
    "gp_pois_regr-gp_regr",
)
EVIDENCE = {  # by quadrature and bridge sampling, in nats; of the improper models, of their density as written
    "eight_schools-eight_schools_noncentered": -31.311,
    "arK-arK": 58.588,
    "kidiq-kidscore_momhsiq": -1876.346,
    "sblri-blr": -184.773,
    "earnings-logearn_height": -1565.486,
    "gp_pois_regr-gp_regr": -27.552,
}


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_the_bound_is_at_least_that_of_a_normal_guide(name, capsys):
    module = load(DATA)
    if module is None:
        pytest.skip("posteriordb is not at hand")
    row = compare(module, name, steps=1000, particles=1, draws=4000)
    with capsys.disabled():
        print(f"\n{name}: normal {row['normal elbo']:.3f} (k-hat {row['normal khat']:.2f}), "
              f"flow {row['flow elbo']:.3f} (k-hat {row['flow khat']:.2f})")  # fmt: skip
    error = (row["flow error"] ** 2 + row["normal error"] ** 2) ** 0.5
    assert row["flow elbo"] >= row["normal elbo"] - 4 * error
    assert row["flow elbo"] <= EVIDENCE[name] + 5 * row["flow error"] + 0.01
    assert row["flow elbo"] >= EVIDENCE[name] - 0.5
    assert row["flow mean error"] < 0.25
    assert 0.75 < row["flow sd ratio"] < 1.25
