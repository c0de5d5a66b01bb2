"""The numbers of convergence against ArviZ, against closed forms, and on chains that agree or do not."""

from __future__ import annotations

import math

import arviz
import numpy as np
import pytest
import torch

from pyro_genmods import diagnostics
from pyro_genmods.foundation.convergence import effective_sample_size, nested_r_hat, split_r_hat
from pyro_genmods.foundation.errors import ShapeError


def column_by_column(statistic, draws: torch.Tensor) -> np.ndarray:
    columns = draws.double().reshape(*draws.shape[:2], -1).numpy()
    values = [float(statistic(np.ascontiguousarray(columns[:, :, i]))) for i in range(columns.shape[-1])]
    return np.array(values).reshape(draws.shape[2:])


def autoregressive(chains: int, draws: int, rho: float, columns: int = 3) -> torch.Tensor:
    x = torch.randn(chains, draws, columns, dtype=torch.float64)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * x[:, t]
    return x


def apart(chains: int, draws: int) -> torch.Tensor:
    return torch.randn(chains, draws, 3, dtype=torch.float64) + torch.arange(chains)[:, None, None]


def one_wider(chains: int, draws: int) -> torch.Tensor:
    x = torch.randn(chains, draws, 3, dtype=torch.float64)
    x[0] *= 4
    return x


KINDS = {
    "independent": lambda c, n: torch.randn(c, n, 2, 3, dtype=torch.float64),
    "slow": lambda c, n: autoregressive(c, n, 0.95),
    "swinging": lambda c, n: autoregressive(c, n, -0.9),
    "heavy tails": lambda c, n: (torch.randn(c, n, 3) / torch.randn(c, n, 3)).double(),
    "ties": lambda c, n: (2 * torch.randn(c, n, 3, dtype=torch.float64)).round(),
    "apart": apart,
    "one wider": one_wider,
    "a random walk": lambda c, n: torch.randn(c, n, 3, dtype=torch.float64).cumsum(1),
}
SIZES = [(2, 4), (2, 5), (2, 9), (3, 12), (3, 13), (4, 250), (4, 251), (64, 30)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_arviz(kind, size):
    draws = KINDS[kind](*size)
    r_hat, ess = split_r_hat(draws), effective_sample_size(draws)
    assert r_hat.shape == ess.shape == draws.shape[2:]
    np.testing.assert_allclose(r_hat, column_by_column(arviz.rhat, draws), rtol=1e-9)
    np.testing.assert_allclose(ess, column_by_column(lambda x: arviz.ess(x, method="bulk"), draws), rtol=1e-6)


def test_effective_sample_size_of_an_autoregression():
    """``N (1 - rho) / (1 + rho)``; normal scores of a Gaussian chain are the chain, up to scale."""
    for rho in (0.0, 0.5, 0.9, -0.4):
        draws = autoregressive(8, 4000, rho, columns=8)
        truth = draws[:, :, 0].numel() * (1 - rho) / (1 + rho)
        assert float(effective_sample_size(draws).mean()) == pytest.approx(truth, rel=0.1)


def test_bad_mixing_is_seen():
    assert (split_r_hat(apart(4, 200)) > 1.3).all()
    assert (split_r_hat(one_wider(4, 400)) > 1.1).all()
    assert (split_r_hat(torch.randn(4, 1000, 3)) < 1.01).all()
    trend = torch.randn(4, 400, 3) + torch.linspace(0, 3, 400)[:, None]
    assert (split_r_hat(trend) > 1.1).all()


def test_one_chain_is_split():
    draws = torch.randn(1, 400)
    assert split_r_hat(draws).shape == ()
    assert float(split_r_hat(draws)) < 1.05
    assert float(split_r_hat(draws + torch.linspace(0, 5, 400))) > 1.3


def test_invariance():
    """Ranks do not change under a monotone map, and nothing depends on units or on the order of chains."""
    draws = autoregressive(4, 100, 0.7)
    assert torch.allclose(effective_sample_size(draws), effective_sample_size(draws.exp()))
    assert torch.allclose(split_r_hat(draws), split_r_hat(5 - 1e3 * draws))
    assert torch.allclose(nested_r_hat(draws, 2), nested_r_hat(5 - 1e3 * draws, 2))
    assert torch.allclose(nested_r_hat(draws, 2), nested_r_hat(draws[[2, 3, 1, 0]], 2))


def test_what_is_not_a_number_or_does_not_move():
    draws = torch.randn(4, 50, 3)
    draws[1, 7, 0] = math.nan
    draws[:, :, 1] = 2.0
    assert split_r_hat(draws).isnan().tolist() == [True, True, False]
    assert effective_sample_size(draws)[:2].isnan().tolist() == [True, False]
    assert float(effective_sample_size(draws)[1]) == 200
    assert nested_r_hat(draws, 2).isnan().tolist() == [True, True, False]


# -- nested R-hat -----------------------------------------------------------------------------------------------------


def nested_r_hat_in_words(draws: np.ndarray, superchains: int) -> float:
    groups = draws.reshape(superchains, -1, draws.shape[1])
    chains, length = groups.shape[1:]
    between = np.var([group.mean() for group in groups], ddof=1)
    within = []
    for group in groups:
        of_means = np.var([chain.mean() for chain in group], ddof=1) if chains > 1 else 0.0
        of_draws = np.mean([np.var(chain, ddof=1) if length > 1 else 0.0 for chain in group])
        within.append(of_means + of_draws)
    return math.sqrt(1 + between / np.mean(within))


@pytest.mark.parametrize(("chains", "draws", "superchains"), [(8, 10, 4), (6, 1, 2), (4, 20, 4), (12, 3, 2)])
def test_nested_r_hat_is_its_formula(chains, draws, superchains):
    x = torch.randn(chains, draws, 2, 2, dtype=torch.float64)
    found = nested_r_hat(x, superchains)
    truth = column_by_column(lambda column: nested_r_hat_in_words(column, superchains), x)
    np.testing.assert_allclose(found, truth, rtol=1e-12)


def test_nested_r_hat_of_one_chain_each_is_that_of_gelman_and_rubin():
    """With one chain a superchain, ``nR^2 - 1`` is ``B / W`` of the classic statistic, without its ``1 / N``."""
    x = torch.randn(5, 40, dtype=torch.float64)
    between, within = x.mean(1).var(), x.var(1).mean()
    assert float(nested_r_hat(x, 5)) == pytest.approx(float((1 + between / within).sqrt()))


def test_nested_r_hat_of_superchains_that_agree_and_that_do_not():
    """Many chains of one draw: no chain can be judged by itself, superchains can."""
    draws = torch.randn(512, 1, 4)
    starts = torch.randn(16, 4).repeat_interleave(32, 0)[:, None]
    assert (nested_r_hat(draws, 16) < 1.03).all()
    assert (nested_r_hat(draws + starts, 16) > 1.2).all()
    one_mode_each = draws + 8 * (torch.arange(512) < 256)[:, None, None]
    assert (nested_r_hat(one_mode_each, 16) > 2).all()


def test_nested_r_hat_in_equilibrium():
    """``E[B/W]`` is the variance of the mean of a superchain over the variance of a draw: here ``1 / (M N)``.

    Over 2000 entries the mean has a relative standard error of 1 %, a fifth of what is allowed.
    """
    draws = torch.randn(160, 5, 2000, dtype=torch.float64)
    excess = nested_r_hat(draws, 10).square() - 1
    within = 1 + 1 / 5  # of a draw within its chain, and of the mean of five
    assert float(excess.mean()) == pytest.approx(1 / (16 * 5) / within, rel=0.05)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 0), (0, 10)])
def test_shapes_that_are_no_chains(shape):
    for statistic in (split_r_hat, effective_sample_size):
        with pytest.raises(ShapeError, match=r"draws: .* needs \(chains, draws"):
            statistic(torch.zeros(shape))


@pytest.mark.parametrize("superchains", [0, 1, 3, 8])
def test_superchains_that_do_not_divide(superchains):
    with pytest.raises(ValueError, match=f"superchains: got {superchains} for 4 chains"):
        nested_r_hat(torch.zeros(4, 10), superchains)


def test_superchains_without_variance():
    with pytest.raises(ValueError, match="draws: got one draw in each superchain"):
        nested_r_hat(torch.zeros(4, 1), 4)


def test_it_is_a_diagnostic():
    assert diagnostics.nested_r_hat is nested_r_hat
