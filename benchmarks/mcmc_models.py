"""The targets of `benchmarks/mcmc.py`: each a Pyro model and its NumPyro twin, side by side, on the same numbers.

A position is a row of unconstrained coordinates: sites in the order of their names, positive sites by their logarithm
(what Pyro and NumPyro use too). Neither torch nor JAX is imported before a model of its kind is built, so that a cell
with one of them runs where the other is missing.

    eight      eight schools, non-centred: mu ~ N(0, 5), tau ~ HalfCauchy(5), theta_trans ~ N(0, 1)
    logistic   logistic regression, 1000 x 25, centred: tau ~ HalfCauchy(1), beta ~ N(0, tau), intercept ~ N(0, 5)
    gaussian   100 independent coordinates, variances log-spaced from 1e-2 to 1e2
    flow       8-d zuko NSF as prior, frozen, seeded weights; 16 linear measurements with noise .5 (Pyro only)
    gp         Gaussian-process regression `gp_pois_regr-gp_regr` of the data folder, in double precision
    banana     x ~ N(0, 10), y ~ N(.03 x^2 - 3, 1)
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GP = "gp_pois_regr-gp_regr"


@dataclass(frozen=True)
class Problem:
    """One target.

    Attributes:
        sites: shape of every latent site, by name.
        positive: sites on the positive half line.
        pyro: builds the Pyro model on a device.
        numpyro: builds the NumPyro model; ``None`` where there is none.
        double: double precision.
        moments: means and standard deviations of the unconstrained coordinates, where known.
    """

    sites: dict[str, tuple[int, ...]]
    pyro: Callable[[str], Callable]
    numpyro: Callable[[], Callable] | None = None
    positive: frozenset[str] = frozenset()
    double: bool = False
    moments: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def dim(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.sites.values())

    def split(self, position: Any) -> dict[str, Any]:
        """Unconstrained values by site; any array type, any leading dimensions."""
        values, start = {}, 0
        for name in sorted(self.sites):
            shape = self.sites[name]
            size = int(np.prod(shape))
            values[name] = position[..., start : start + size] if shape else position[..., start]
            start += size
        return values

    def join(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of unconstrained coordinates from constrained values with two leading dimensions."""
        rows = []
        for name in sorted(self.sites):
            value = np.asarray(values[name], dtype=np.float64)
            rows.append((np.log(value) if name in self.positive else value).reshape(*value.shape[:2], -1))
        return np.concatenate(rows, -1)

    def starts(self, chains: int, seed: int, spread: float) -> np.ndarray:
        """Dispersed starts: uniform on (-spread, spread) in every unconstrained coordinate."""
        return np.random.default_rng([seed, 1]).uniform(-spread, spread, (chains, self.dim))


def eight(_folder: Path) -> Problem:
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=np.float32)
    error = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=np.float32)

    def torch_model(device: str) -> Callable:
        import pyro
        import pyro.distributions as dist
        import torch

        observed, scale = torch.as_tensor(y, device=device), torch.as_tensor(error, device=device)
        zero, one = torch.zeros((), device=device), torch.ones((), device=device)

        def model() -> None:
            mu = pyro.sample("mu", dist.Normal(zero, 5 * one))
            tau = pyro.sample("tau", dist.HalfCauchy(5 * one))
            theta = pyro.sample("theta_trans", dist.Normal(zero, one).expand([8]).to_event(1))
            pyro.sample("y", dist.Normal(mu + tau * theta, scale).to_event(1), obs=observed)

        return model

    def jax_model() -> Callable:
        import numpyro
        import numpyro.distributions as dist

        def model() -> None:
            mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
            tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
            theta = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
            numpyro.sample("y", dist.Normal(mu + tau * theta, error).to_event(1), obs=y)

        return model

    return Problem({"mu": (), "tau": (), "theta_trans": (8,)}, torch_model, jax_model, frozenset({"tau"}))


def logistic(_folder: Path) -> Problem:
    rng = np.random.default_rng(25)
    x = rng.standard_normal((1000, 25)).astype(np.float32)
    logits = 0.5 + x @ (0.5 * rng.standard_normal(25))
    y = (rng.uniform(size=1000) < 1 / (1 + np.exp(-logits))).astype(np.float32)

    def torch_model(device: str) -> Callable:
        import pyro
        import pyro.distributions as dist
        import torch

        covariates, observed = torch.as_tensor(x, device=device), torch.as_tensor(y, device=device)
        zero, one = torch.zeros((), device=device), torch.ones((), device=device)

        def model() -> None:
            tau = pyro.sample("tau", dist.HalfCauchy(one))
            beta = pyro.sample("beta", dist.Normal(zero, tau).expand([25]).to_event(1))
            intercept = pyro.sample("intercept", dist.Normal(zero, 5 * one))
            law = dist.Bernoulli(logits=covariates @ beta + intercept)
            pyro.sample("y", law.to_event(1), obs=observed)

        return model

    def jax_model() -> Callable:
        import numpyro
        import numpyro.distributions as dist

        def model() -> None:
            tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
            beta = numpyro.sample("beta", dist.Normal(0.0, tau).expand([25]).to_event(1))
            intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta + intercept).to_event(1), obs=y)

        return model

    return Problem({"beta": (25,), "intercept": (), "tau": ()}, torch_model, jax_model, frozenset({"tau"}))


def gaussian(_folder: Path) -> Problem:
    scale = np.logspace(-1, 1, 100).astype(np.float32)

    def torch_model(device: str) -> Callable:
        import pyro
        import pyro.distributions as dist
        import torch

        scales = torch.as_tensor(scale, device=device)
        means = torch.zeros(100, device=device)

        def model() -> None:
            pyro.sample("x", dist.Normal(means, scales).to_event(1))

        return model

    def jax_model() -> Callable:
        import numpyro
        import numpyro.distributions as dist

        def model() -> None:
            numpyro.sample("x", dist.Normal(np.zeros(100, dtype=np.float32), scale).to_event(1))

        return model

    return Problem({"x": (100,)}, torch_model, jax_model, moments=(np.zeros(100), scale.astype(np.float64)))


def flow(_folder: Path) -> Problem:
    rng = np.random.default_rng(8)
    design = (rng.standard_normal((16, 8)) / np.sqrt(8)).astype(np.float32)
    y = (design @ rng.standard_normal(8) + 0.5 * rng.standard_normal(16)).astype(np.float32)

    def torch_model(device: str) -> Callable:
        import pyro
        import pyro.distributions as dist
        import torch
        import zuko

        import pyro_genmods as gm

        torch.manual_seed(0)
        prior = gm.Flow(zuko.flows.NSF(8)).requires_grad_(False).to(device)
        linear, observed = torch.as_tensor(design, device=device), torch.as_tensor(y, device=device)
        noise = torch.full((), 0.5, device=device)

        def model() -> None:
            z = pyro.sample("z", prior())
            pyro.sample("y", dist.Normal(linear @ z, noise).to_event(1), obs=observed)

        return model

    return Problem({"z": (8,)}, torch_model)


def banana(_folder: Path) -> Problem:
    def torch_model(device: str) -> Callable:
        import pyro
        import pyro.distributions as dist
        import torch

        zero, one = torch.zeros((), device=device), torch.ones((), device=device)

        def model() -> None:
            x = pyro.sample("x", dist.Normal(zero, 10 * one))
            pyro.sample("y", dist.Normal(0.03 * x**2 - 3, one))

        return model

    def jax_model() -> Callable:
        import numpyro
        import numpyro.distributions as dist

        def model() -> None:
            x = numpyro.sample("x", dist.Normal(0.0, 10.0))
            numpyro.sample("y", dist.Normal(0.03 * x**2 - 3, 1.0))

        return model

    moments = (np.zeros(2), np.sqrt(np.array([100.0, 19.0])))
    return Problem({"x": (), "y": ()}, torch_model, jax_model, moments=moments)


def gp(folder: Path) -> Problem:
    """The Pyro model is the data folder's own; the twin is written here. Moments are those of the reference draws."""
    path = folder / "posteriordb_models.py"
    if not path.exists():
        raise FileNotFoundError(f"no posteriordb_models.py in {folder}; name the folder that holds it with --data")
    data = json.loads((folder / "posteriordb" / "gp_pois_regr.data.json").read_text())
    stored = np.load(folder / "posteriordb" / f"{GP}.draws.npz")
    columns = [list(stored["names"]).index(name) for name in ("alpha", "rho", "sigma")]
    reference = np.log(stored["draws"][:, columns])

    def torch_model(device: str) -> Callable:
        import torch

        spec = importlib.util.spec_from_file_location("posteriordb_models", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with torch.device(device):
            return module.POSTERIORS[GP]["model"](data)

    def jax_model() -> Callable:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        x, y = np.array(data["x"], dtype=np.float64), np.array(data["y"], dtype=np.float64)
        squares, eye = (x[:, None] - x) ** 2, np.eye(len(x))

        def model() -> None:
            rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
            alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
            sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
            covariance = alpha**2 * jnp.exp(-0.5 * squares / rho**2) + sigma * eye
            law = dist.MultivariateNormal(np.zeros(len(x)), scale_tril=jnp.linalg.cholesky(covariance))
            numpyro.sample("y", law, obs=y)

        return model

    sites = {"alpha": (), "rho": (), "sigma": ()}
    return Problem(sites, torch_model, jax_model, frozenset(sites), True, (reference.mean(0), reference.std(0)))


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "eight": eight,
    "logistic": logistic,
    "gaussian": gaussian,
    "flow": flow,
    "gp": gp,
    "banana": banana,
}
