r"""Programs of every kind that Pyro can write, and posteriors whose moments are known, for the tests of chains.

:data:`PROGRAMS` is the table behind `test_potential.py`: each row builds a model and its arguments in a dtype. They
cover the supports (positive, interval, simplex, ordered, circles, Cholesky factors, covariances), the ways to structure
a program (plates, events, masks, scales, factors, deterministic sites, modules, reparametrisation), enumeration, and
learned priors on both roads.

:data:`CONJUGATE` is the table behind `test_kernels.py`: each row is a program with its data and the exact mean and
standard deviation of every coordinate of its posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import OrderedTransform
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform

import pyro_genmods as gm

import zuko  # isort: skip  (the package puts right what importing zuko changes)

Built = tuple[Callable[..., Any], tuple[Any, ...]]
Number = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Row:
    """A program and what is special about it.

    Attributes:
        build: from a function that makes tensors of a dtype, the model and its arguments.
        road: the road that must be found; ``plate`` where functorch cannot follow a library.
    """

    build: Callable[[Number], Built]
    road: str = "vmap"


def numbers(dtype: torch.dtype) -> Number:
    """Makes tensors of a dtype."""
    return lambda values: torch.as_tensor(values, dtype=dtype)


def drawn(t: Number, *shape: int, seed: int = 3) -> Tensor:
    """Standard normal numbers, the same in every dtype."""
    return t(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


# -- supports ----------------------------------------------------------------------------------------------------------


def positive_sites(t: Number) -> Built:
    def model(y: Tensor) -> None:
        one = t(1.0)
        total = pyro.sample("gamma", dist.Gamma(2 * one, one))
        total = total + pyro.sample("inverse", dist.InverseGamma(3 * one, one))
        total = total + pyro.sample("half_cauchy", dist.HalfCauchy(one))
        total = total + pyro.sample("half_normal", dist.HalfNormal(2 * one))
        total = total + pyro.sample("exponential", dist.Exponential(one))
        total = total + pyro.sample("log_normal", dist.LogNormal(0 * one, one))
        total = total + pyro.sample("weibull", dist.Weibull(one, 2 * one))
        total = total + pyro.sample("chi2", dist.Chi2(3 * one))
        pyro.sample("y", dist.Normal(total, one).expand([3]).to_event(1), obs=y)

    return model, (t([4.0, 5.0, 7.0]),)


def interval_sites(t: Number) -> Built:
    def model(y: Tensor) -> None:
        p = pyro.sample("beta", dist.Beta(t(2.0), t(3.0)))
        u = pyro.sample("uniform", dist.Uniform(t(-1.0), t(3.0)))
        k = pyro.sample("kumaraswamy", dist.Kumaraswamy(t(2.0), t(1.5)))
        pyro.sample("y", dist.Normal(p * u + k, 0.5), obs=y)

    return model, (t(0.3),)


def heavy_tails(t: Number) -> Built:
    def model(y: Tensor) -> None:
        loc = pyro.sample("student", dist.StudentT(t(3.0), t(0.0), t(1.0)))
        loc = loc + pyro.sample("cauchy", dist.Cauchy(t(0.0), t(0.5)))
        loc = loc + pyro.sample("laplace", dist.Laplace(t(0.0), t(1.0)))
        loc = loc + pyro.sample("gumbel", dist.Gumbel(t(0.0), t(1.0)))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.StudentT(4 * torch.ones_like(loc), loc, 1.0), obs=y)

    return model, (drawn(t, 4),)


def circle(t: Number) -> Built:
    def model(y: Tensor) -> None:
        angle = pyro.sample("angle", dist.VonMises(t(0.5), t(2.0)))
        pyro.sample("y", dist.Normal(torch.stack([angle.cos(), angle.sin()], -1), 0.3).to_event(1), obs=y)

    return model, (t([0.7, 0.7]),)


def simplex(t: Number) -> Built:
    def model(counts: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(t([1.0, 2.0, 3.0, 0.5])))
        pyro.sample("counts", dist.Multinomial(total_count=20, probs=p), obs=counts)

    return model, (t([3.0, 9.0, 6.0, 2.0]),)


def ordered(t: Number) -> Built:
    def model(grade: Tensor) -> None:
        base = dist.Normal(t([0.0, 0.0, 0.0]), 1.0).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]))
        skill = pyro.sample("skill", dist.Normal(t(0.0), 1.0))
        with pyro.plate("data", 5):
            pyro.sample("grade", dist.OrderedLogistic(skill, cuts), obs=grade)

    return model, (torch.tensor([0, 1, 3, 2, 2]),)


def correlations(t: Number) -> Built:
    def model(y: Tensor) -> None:
        factor = pyro.sample("factor", dist.LKJCholesky(3, t(1.5)))
        scale = pyro.sample("scale", dist.LogNormal(t([0.0, 0.1, -0.2]), 0.5).to_event(1))
        tril = scale[..., None] * factor
        with pyro.plate("data", 4):
            pyro.sample("y", dist.MultivariateNormal(t([0.0, 0.0, 0.0]), scale_tril=tril), obs=y)

    return model, (drawn(t, 4, 3),)


def covariance(t: Number) -> Built:
    def model(y: Tensor) -> None:
        root = pyro.sample("root", dist.Normal(t(torch.zeros(2, 2)), 1.0).to_event(2))
        matrix = root @ root.mT + t(torch.eye(2))
        x = pyro.sample("x", dist.MultivariateNormal(t([1.0, -1.0]), covariance_matrix=matrix))
        pyro.sample("y", dist.MultivariateNormal(x, precision_matrix=matrix), obs=y)

    return model, (t([0.2, 0.4]),)


def low_rank(t: Number) -> Built:
    factor = drawn(t, 4, 2)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.LowRankMultivariateNormal(t([0.0] * 4), factor, t([0.5] * 4)))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    return model, (drawn(t, 4, seed=4),)


def made_outside(t: Number) -> Built:
    """Distributions that exist before the program runs remember that they validate."""
    prior = dist.Normal(t(0.0), t(1.0)).expand([3]).to_event(1)
    noise = dist.Gamma(t(2.0), t(2.0), validate_args=True)

    def model(y: Tensor) -> None:
        x, scale = pyro.sample("x", prior), pyro.sample("scale", noise)
        pyro.sample("y", dist.Normal(x, scale[..., None]).to_event(1), obs=y)

    return model, (drawn(t, 3),)


def improper(t: Number) -> Built:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", Flat(constraints.real, t))
        scale = pyro.sample("scale", Flat(constraints.positive, t))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    return model, (drawn(t, 5),)


class Flat(dist.ImproperUniform):
    """A flat prior that has a value to begin with."""

    def __init__(self, support: Any, t: Number) -> None:
        super().__init__(support, torch.Size(), torch.Size())
        self.t = t

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.t(torch.ones(sample_shape))


def transformed(t: Number) -> Built:
    def model(y: Tensor) -> None:
        x = pyro.sample(
            "x", dist.TransformedDistribution(dist.Normal(t(0.0), t(1.0)), [AffineTransform(0.5, 2.0), ExpTransform()])
        )
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return model, (t(2.0),)


# -- structure ---------------------------------------------------------------------------------------------------------


def nested_plates(t: Number) -> Built:
    def model(y: Tensor) -> None:
        spread = pyro.sample("spread", dist.HalfNormal(t(1.0)))
        with pyro.plate("groups", 3, dim=-2):
            loc = pyro.sample("loc", dist.Normal(t(0.0), spread))
            with pyro.plate("members", 4, dim=-1):
                scale = pyro.sample("scale", dist.Gamma(t(3.0), t(2.0)))
                pyro.sample("y", dist.Normal(loc, scale), obs=y)

    return model, (drawn(t, 3, 4),)


def side_by_side_plates(t: Number) -> Built:
    def model(y: Tensor) -> None:
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(t(0.0), 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(t(0.0), 1.0).expand([2]))
        with rows, columns:
            pyro.sample("y", dist.Normal(a * b, 1.0), obs=y)

    return model, (drawn(t, 3, 2),)


def loop_of_plates(t: Number) -> Built:
    def model(y: Tensor) -> None:
        for i in pyro.plate("parts", 3):
            x = pyro.sample(f"x_{i}", dist.Normal(t(0.0), 1.0))
            pyro.sample(f"y_{i}", dist.Normal(x, 0.5), obs=y[i])

    return model, (drawn(t, 3),)


def events(t: Number) -> Built:
    def model(y: Tensor) -> None:
        matrix = pyro.sample("matrix", dist.Normal(t(torch.zeros(2, 3)), 1.0).to_event(2))
        with pyro.plate("data", 4):
            x = pyro.sample("x", dist.Normal(t(torch.zeros(3)), 1.0).to_event(1))
            pyro.sample("y", dist.Normal((matrix @ x[..., None])[..., 0], 0.5).to_event(1), obs=y)

    return model, (drawn(t, 4, 2),)


def factors(t: Number) -> Built:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(t([0.0, 0.0]), 1.0).to_event(1))
        pyro.factor("banana", -0.5 * (x[..., 1] - x[..., 0] ** 2 + y) ** 2)

    return model, (t(0.5),)


def masks(t: Number) -> Built:
    def model(y: Tensor, seen: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(t(0.0), 2.0))
        with pyro.plate("data", 4), poutine.mask(mask=seen):
            x = pyro.sample("x", dist.Normal(loc, t(1.0)))
            pyro.sample("y", dist.Normal(x, 1.0).mask(~seen | seen), obs=y)

    return model, (drawn(t, 4), torch.tensor([True, False, True, True]))


def scales(t: Number) -> Built:
    @poutine.scale(scale=0.3)
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(t(0.0), 2.0))
        with pyro.plate("data", 4), poutine.scale(scale=5.0):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    return model, (drawn(t, 4),)


def eight_schools(t: Number) -> Built:
    def model(y: Tensor, error: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(t(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(t(5.0)))
        with pyro.plate("schools", 8):
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            theta = pyro.deterministic("theta", mu + tau * z)
            pyro.sample("y", dist.Normal(theta, error), obs=y)

    return model, (t([28.0, 8, -3, 7, -1, 1, 18, 12]), t([15.0, 10, 16, 11, 9, 11, 10, 18]))


def observed_counts(t: Number) -> Built:
    def model(n: Tensor, k: Tensor, c: Tensor, b: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(t(2.0), t(1.0)))
        p = pyro.sample("p", dist.Beta(t(1.0), t(1.0)))
        q = pyro.sample("q", dist.Dirichlet(t([1.0, 1.0, 1.0])))
        with pyro.plate("data", 4):
            pyro.sample("n", dist.Poisson(rate), obs=n)
            pyro.sample("k", dist.Binomial(10, p), obs=k)
            pyro.sample("c", dist.Categorical(q), obs=c)
            pyro.sample("b", dist.Bernoulli(p), obs=b)
            pyro.sample("nb", dist.NegativeBinomial(t(3.0), p), obs=n)

    return model, (t([0.0, 3, 2, 5]), t([1.0, 9, 4, 10]), torch.tensor([0, 2, 1, 1]), t([0.0, 1, 1, 0]))


def hidden_markov(t: Number) -> Built:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Beta(t(2.0), t(2.0)))
        noise = pyro.sample("noise", dist.LogNormal(t(0.0), t(0.5)))
        eye = t(torch.eye(2))
        one = rate[..., None, None, None] * eye  # between batch and matrix there is time
        step = dist.MultivariateNormal(t([0.0, 0.0]), scale_tril=eye)
        seen = dist.MultivariateNormal(t([0.0]), scale_tril=noise[..., None, None, None] * t([[1.0]]))
        first = dist.MultivariateNormal(t([0.0, 0.0]), scale_tril=2 * eye)
        pyro.sample("y", dist.GaussianHMM(first, one, step, t([[1.0], [0.5]]), seen, duration=6), obs=y)

    return model, (drawn(t, 6, 1),)


def energy_network(t: Number) -> Built:
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(t(0.0).dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(drawn(t, *parameter.shape))

    def model() -> None:
        x = pyro.sample("x", dist.Normal(t([0.0] * 3), 1.0).to_event(1))
        pyro.factor("energy", -network(x)[..., 0])

    return model, ()


class Bayesian(PyroModule):
    """A network with priors on its weights."""

    def __init__(self, t: Number) -> None:
        super().__init__()
        self.t = t
        self.hidden = PyroModule[torch.nn.Linear](2, 3)
        self.hidden.weight = PyroSample(dist.Normal(t(0.0), t(1.0)).expand([3, 2]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(t(0.0), t(1.0)).expand([3]).to_event(1))
        self.out = PyroModule[torch.nn.Linear](3, 1)
        self.out.weight = PyroSample(dist.Normal(t(0.0), t(1.0)).expand([1, 3]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(t(0.0), t(1.0)).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        loc = self.out(self.hidden(x).tanh())[..., 0]
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 0.3), obs=y)


def bayesian_network(t: Number) -> Built:
    return Bayesian(t), (drawn(t, 6, 2), drawn(t, 6, seed=5))


def loc_scale(t: Number) -> Built:
    @poutine.reparam(config={"x": LocScaleReparam(t(0.4))})
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(t(0.0), 1.0))
        scale = pyro.sample("scale", dist.LogNormal(t(0.0), t(1.0)))
        with pyro.plate("data", 4):
            x = pyro.sample("x", dist.Normal(loc, scale))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return model, (drawn(t, 4),)


def gaussian_process(t: Number) -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.InverseGamma(t(5.0), t(5.0)))
        noise = pyro.sample("noise", dist.HalfNormal(t(1.0)))
        kernel = torch.exp(-0.5 * ((x[:, None] - x) / length[..., None, None]) ** 2)
        tril = torch.linalg.cholesky(kernel + (noise**2 + 0.01)[..., None, None] * t(torch.eye(6)))
        pyro.sample("y", dist.MultivariateNormal(t([0.0] * 6), scale_tril=tril), obs=y)

    return model, (t(torch.linspace(-1, 1, 6)), drawn(t, 6))


def mixture_density(t: Number) -> Built:
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(t([2.0, 2.0])))
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), 1.0).to_event(1))
        parts = dist.Normal(loc, t([1.0, 0.5]))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=y)

    return model, (drawn(t, 5),)


def partly_observed(t: Number) -> Built:
    def model(y: Tensor, seen: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(t(0.0), 2.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(loc, t(1.0)), obs=y, obs_mask=seen)

    return model, (drawn(t, 4), torch.tensor([True, False, True, False]))


def conditioned(t: Number) -> Built:
    def model(steps: int, options: dict[str, Any]) -> None:
        x = pyro.sample("start", dist.Normal(t(0.0), 1.0))
        for i in range(steps):
            x = pyro.sample(f"x_{i}", dist.Normal(options["rate"] * x, t(1.0)))

    return poutine.condition(model, {"x_2": t(1.5)}), (3, {"rate": t(0.8), "name": "walk"})


# -- enumeration -------------------------------------------------------------------------------------------------------


def enumerated_coin(t: Number) -> Built:
    @config_enumerate
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(t(2.0), t(2.0)))
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", 5):
            side = pyro.sample("side", dist.Bernoulli(p)).long()
            pyro.sample("y", dist.Normal(loc[..., 0] + side * (loc[..., 1] - loc[..., 0]), 0.7), obs=y)

    return model, (drawn(t, 5),)


def enumerated_mixture(t: Number) -> Built:
    @config_enumerate
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(t([1.0, 2.0, 3.0])))
        with pyro.plate("parts", 3):
            loc = pyro.sample("loc", dist.Normal(t(0.0), 2.0))
        with pyro.plate("data", 6):
            part = pyro.sample("part", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(loc[part], t(1.0)), obs=y)

    return model, (2 * drawn(t, 6),)


def markov_chain(t: Number) -> Built:
    @config_enumerate
    def model(y: Tensor) -> None:
        stay = pyro.sample("stay", dist.Beta(t(5.0), t(2.0)))
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), 0.5).to_event(1))
        state: Any = 0
        for i in pyro.markov(range(len(y))):
            p = torch.where(torch.as_tensor(state) == 1, stay, 1 - stay)
            state = pyro.sample(f"state_{i}", dist.Bernoulli(p)).long()
            pyro.sample(f"y_{i}", dist.Normal(torch.where(state == 1, loc[1], loc[0]), t(0.8)), obs=y[i])

    return model, (drawn(t, 5),)


# -- learned priors ----------------------------------------------------------------------------------------------------


def flow_prior(kind: str, space: str = "data", **settings: Any) -> Callable[[Number], Built]:
    """A program whose prior is a zuko flow with rough, frozen weights."""

    def build(t: Number) -> Built:
        torch.manual_seed(5)
        network = getattr(zuko.flows, kind)(2, **settings)
        flow = gm.Flow(network).to(t(0.0).dtype)
        with torch.no_grad():
            for i, parameter in enumerate(flow.parameters()):
                if kind not in ("NAF", "BPF"):
                    parameter.add_(0.2 * drawn(t, *parameter.shape, seed=i))
        flow.freeze()

        def model(y: Tensor) -> None:
            x = pyro.sample("x", flow())
            with pyro.plate("data", 3):
                pyro.sample("y", dist.Normal(x, 0.8).to_event(1), obs=y)

        if space == "noise":
            return poutine.reparam(model, {"x": gm.infer.PushforwardReparam()}), (drawn(t, 3, 2),)
        return model, (drawn(t, 3, 2),)

    return build


SMALL = {"transforms": 1, "hidden_features": (8,)}

PROGRAMS: dict[str, Row] = {
    "positive sites": Row(positive_sites),
    "interval sites": Row(interval_sites),
    "heavy tails": Row(heavy_tails),
    "circle": Row(circle),
    "simplex": Row(simplex, road="plate"),
    "ordered": Row(ordered, road="plate"),
    "correlations": Row(correlations),
    "covariance": Row(covariance),
    "low rank": Row(low_rank),
    "made outside": Row(made_outside),
    "improper": Row(improper),
    "transformed": Row(transformed),
    "nested plates": Row(nested_plates),
    "side by side plates": Row(side_by_side_plates),
    "loop of plates": Row(loop_of_plates),
    "events": Row(events),
    "factors": Row(factors),
    "masks": Row(masks),
    "scales": Row(scales),
    "eight schools": Row(eight_schools),
    "observed counts": Row(observed_counts),
    "hidden Markov": Row(hidden_markov, road="plate"),
    "energy network": Row(energy_network),
    "Bayesian network": Row(bayesian_network),
    "loc-scale": Row(loc_scale),
    "Gaussian process": Row(gaussian_process),
    "mixture density": Row(mixture_density),
    "partly observed": Row(partly_observed),
    "conditioned": Row(conditioned),
    "enumerated coin": Row(enumerated_coin),
    "enumerated mixture": Row(enumerated_mixture),
    "Markov chain": Row(markov_chain),
    "NSF": Row(flow_prior("NSF", bins=4, **SMALL)),
    "MAF": Row(flow_prior("MAF", **SMALL)),
    "NICE": Row(flow_prior("NICE", **SMALL)),
    "NSF in noise space": Row(flow_prior("NSF", "noise", bins=4, **SMALL)),
    "NAF": Row(flow_prior("NAF", signal=4, network={"hidden_features": (8,)}, **SMALL), road="plate"),
    "BPF": Row(flow_prior("BPF", degree=4, **SMALL), road="plate"),
}


# -- posteriors with known moments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A program with data, and the truth about it.

    Attributes:
        model, args: the program.
        moments: exact mean and standard deviation of every site, in its support.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    moments: dict[str, tuple[Tensor, Tensor]]


def exact(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def normal_normal() -> Known:
    """Location 1 +- 2, four measurements of 0.5."""
    y = exact([2.0, 2.5, 1.5, 3.0])

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(exact(1.0), 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    precision = 1 / 4 + len(y) / 0.25
    return Known(model, (y,), {"x": ((0.25 + y.sum() / 0.25) / precision, exact(precision**-0.5))})


def gamma_exponential() -> Known:
    y = exact([0.5, 1.5, 0.7])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(exact(2.0), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    a, b = 2 + len(y), 1 + y.sum()
    return Known(model, (y,), {"rate": (a / b, a**0.5 / b)})


def of_beta(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a / (a + b), (a * b / (a + b + 1)).sqrt() / (a + b)


def beta_binomial() -> Known:
    def model(k: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(exact(2.0), 3.0))
        pyro.sample("k", dist.Binomial(20, p), obs=k)

    return Known(model, (exact(14.0),), {"p": of_beta(exact(16.0), exact(9.0))})


def dirichlet_multinomial() -> Known:
    prior, counts = exact([1.0, 2.0, 0.5]), exact([4.0, 7.0, 2.0])

    def model(counts: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(prior))
        pyro.sample("counts", dist.Multinomial(13, p), obs=counts)

    total = prior + counts
    return Known(model, (counts,), {"p": of_beta(total, total.sum() - total)})


def linear_regression() -> Known:
    x, y = drawn(exact, 12, 3), drawn(exact, 12, seed=8)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(exact([0.0] * 3), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, 0.7), obs=y)

    covariance = (x.mT @ x / 0.49 + torch.eye(3, dtype=torch.float64) / 4).inverse()
    return Known(model, (x, y), {"beta": (covariance @ x.mT @ y / 0.49, covariance.diagonal().sqrt())})


def ill_conditioned() -> Known:
    """Standard deviations over four decades."""
    deviation = 10 ** torch.linspace(-2, 2, 10, dtype=torch.float64)
    loc = drawn(exact, 10)

    def model() -> None:
        pyro.sample("x", dist.Normal(loc, deviation).to_event(1))

    return Known(model, (), {"x": (loc, deviation)})


def correlated() -> Known:
    """Neighbours with correlation 0.99, whose spectrum spans four decades."""
    index = torch.arange(6, dtype=torch.float64)
    covariance = 0.99 ** (index[:, None] - index).abs()

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(exact([0.0] * 6), covariance))

    return Known(model, (), {"x": (torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))})


def banana() -> Known:
    """``x ~ N(0, 1)``, ``y ~ N(x^2, 1)``: the mean of ``y`` is 1, its variance 1 + 2."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(exact(0.0), 1.0))
        pyro.sample("y", dist.Normal(x**2, 1.0))

    return Known(model, (), {"x": (exact(0.0), exact(1.0)), "y": (exact(1.0), exact(3.0).sqrt())})


def funnel() -> Known:
    """Neal's funnel, non-centred; the moments are those of independent normals."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(exact(0.0), 3.0))
        z = pyro.sample("z", dist.Normal(exact([0.0] * 4), 1.0).to_event(1))
        pyro.deterministic("x", (v / 2).exp()[..., None] * z)

    zero, one = exact([0.0] * 4), exact([1.0] * 4)
    return Known(model, (), {"v": (exact(0.0), exact(3.0)), "z": (zero, one)})


CONJUGATE: dict[str, Callable[[], Known]] = {
    "normal-normal": normal_normal,
    "gamma-exponential": gamma_exponential,
    "beta-binomial": beta_binomial,
    "dirichlet-multinomial": dirichlet_multinomial,
    "linear regression": linear_regression,
}
DIFFICULT: dict[str, Callable[[], Known]] = {
    "ill-conditioned": ill_conditioned,
    "correlated": correlated,
    "banana": banana,
    "funnel": funnel,
}
