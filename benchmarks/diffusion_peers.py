"""Diffusion priors beside azula, sbi and torchcfm, with the same networks: ratios of one run, ours and theirs in turn.

Runs from the root, in an environment that has the peers too; one that is missing is said so and left out.

    python -m benchmarks.diffusion_peers --sampling --guided       # four minutes on one core; azula
    python -m benchmarks.diffusion_peers --likelihood              # three minutes; sbi
    python -m benchmarks.diffusion_peers --learning                # a quarter of an hour; azula, torchcfm

The laws are a ring of eight modes in two dimensions and a lattice of twenty-five in eight, in white units. The default
network is a velocity, to which azula's preconditioning (`KarrasDenoiser`) is the same up to a sign, and sbi's
(`VPScoreEstimator`) the same; so each library is given the very module. "ratio" is above one where ours is faster.

* `--sampling`: draws a second by samplers of one kind, equal steps and calls. Ours are drawn through the distribution
  and come in the user's units; those of azula start with `init` and stay white.
* `--guided`: the same given a linear measurement with Gaussian noise; azula's `MMPSDenoiser` with one iteration (its
  default), and with as many as there are measurements, which is what ours amounts to.
* `--likelihood`: the probability flow of sbi's estimator as its posteriors run it (`VectorFieldBasedPotential`), and
  ours, each by the cheapest setting of a grid whose largest error is below a level. With the exact denoiser, in double
  precision, the error is to the closed form of each one's law: at sbi's first time, with our smallest noise, or with
  the same as sbi's. With a learned network it is to a fine solution of each one's own equation, which forgives sbi its
  base. The network is told one time for all rows, which sbi repeats for every row; that would be a fifth slower.
* `--learning`: the default network after Adam on fresh white draws, by the loss of each library; KL from exact draws to
  the law of the probability flow, by one integrator with exact divergence and calibrated steps, for all in the angle,
  to which the velocity of each is carried over exactly; to a hundredth of a nat, if it can.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyro_genmods as gm
from pyro_genmods import evolve
from pyro_genmods.evolve.guidance import DPS, MomentMatching, PiGDM, guided
from tests.mixtures import Mixture

Run = Callable[[], object]
LEVELS = (1e-1, 1e-2, 1e-3)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # sbi's default is 1e-5
SBI_NOISE = 0.0039  # in proportion to the data, at the first time of its VPScoreEstimator
LOSSES = ("ours", "azula VPSchedule", "azula RectifiedSchedule", "torchcfm")
STEPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def there(name: str) -> bool:
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"not installed, left out: {name}")
    return found


def clock(run: Run) -> float:
    start, _ = time.perf_counter(), run()
    return time.perf_counter() - start


def medians(*runs: Run, repeats: int) -> list[float]:
    """Median seconds of each, measured in turn after a warm-up of each."""
    table = [[clock(run) for run in runs] for _ in range(1 + repeats)]
    return [statistics.median(column) for column in zip(*table[1:], strict=True)]


def white(means: Tensor, variance: float) -> Mixture:
    """Equal round modes at these places, in white units."""
    covariances = variance * torch.eye(means.shape[1]).to(means).expand(len(means), -1, -1)
    law = Mixture(torch.full(means.shape[:1], 1 / len(means)).to(means), means, covariances)
    mean, covariance = law.moments()
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
    return Mixture(law.weights, (means - mean) @ inverse.mT, inverse @ law.covariances @ inverse.mT)


def ring() -> Mixture:
    turn = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return white(2 * torch.stack([turn.cos(), turn.sin()], -1), 0.04)


def lattice() -> Mixture:
    return white(8 * torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=torch.float64)] * 2).repeat(1, 4), 1.0)


TARGETS = {"ring d=2": ring, "lattice d=8": lattice}


def log_density(law: Mixture, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
    """Of the law, shrunk and with noise."""
    covariances = alpha**2 * law.covariances + sigma**2 * torch.eye(x.shape[1]).double()
    parts = torch.distributions.MultivariateNormal(alpha * law.means, covariances)
    return (parts.log_prob(x.double()[:, None]) + law.weights.log()).logsumexp(-1)


class Around(nn.Module):
    """A network in another form."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Backbone(Around):
    """Our velocity as the backbone of azula's preconditioning, told the logarithm of the angle's tangent."""

    def forward(self, u: Tensor, level: Tensor) -> Tensor:
        angle = level.exp().atan()
        return -self.network(angle if angle.dim() == 0 else angle.reshape(-1, 1), u)


class Straight(Around):
    """The velocity that torchcfm teaches, of places ``r u`` with ``r = 1 / (cos + sin)``, as a denoised datum."""

    def forward(self, t: Tensor, u: Tensor, c: Tensor | None = None) -> Tensor:
        r = 1 / (t.cos() + t.sin())
        return r * u + r * t.sin() * self.network(t, r * u)


class Told(Around):
    """Our velocity as the network of sbi's variance-preserving score, told the sine of the angle, and counted."""

    def __init__(self, model: gm.Diffusion) -> None:
        super().__init__(model.network)
        self.velocity, self.calls = model.denoiser.velocity, 0

    def forward(self, u: Tensor, condition: Tensor, sine: Tensor) -> Tensor:
        self.calls += 1
        return self.velocity(sine[0].clamp(0, 1).asin(), u, None)


def azula_denoiser(model: gm.Diffusion, schedule: str = "VPSchedule") -> Any:
    from azula import denoise, noise

    return denoise.KarrasDenoiser(Backbone(model.network), getattr(noise, schedule)()).eval()


SAMPLERS = (
    ("DDPMSampler", evolve.Ancestral),
    ("DDIMSampler", partial(evolve.Ancestral, eta=0.0)),
    ("HeunSampler", evolve.Heun),
    ("vABSampler", evolve.AdamsBashforth),
    ("xEABSampler", evolve.DPMSolver),
    ("ItoSampler", evolve.ReverseSDE),
    ("PCSampler", evolve.PredictorCorrector),
)


def from_noise(sampler: Any, shape: tuple[int, int]) -> Run:
    return lambda: sampler(sampler.init(shape))


def sampling(batches: list[int], steps: int, repeats: int) -> None:
    if not there("azula"):
        return
    import azula.sample

    print(f"\nUnguided, {steps} steps: draws a second")
    print("law           rows azula         ours                     azula      ours  ratio")
    for target, make in TARGETS.items():
        model = learned(make(), "ours", 0, 300, 512)
        denoiser, features = azula_denoiser(model), model.features
        for rows in batches:
            for name, kind in SAMPLERS:
                theirs = getattr(azula.sample, name)(denoiser, steps=steps, silent=True)
                law = model.sampled_by(kind(steps))()
                runs = from_noise(theirs, (rows, features)), partial(law.sample, (rows,))
                seconds = medians(*runs, repeats=repeats)
                line = f"{target:<12} {rows:>5} {name:<13} {type(law.model.sampler).__name__:<20}"
                print(f"{line} {rates(rows, seconds)}", flush=True)


def rates(rows: int, seconds: list[float]) -> str:
    return f"{rows / seconds[0]:>9.0f} {rows / seconds[1]:>9.0f} {seconds[0] / seconds[1]:>6.2f}"


def guided_pairs(model: gm.Diffusion, a: Tensor, y: Tensor, sd: float, steps: int) -> Iterator[tuple[str, Any, Any]]:
    """A name, azula's guided sampler, and our guided law, of the same measurement ``y = a x + noise``."""
    from azula.guidance import dps, mmps, pgdm
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    denoiser, inverse, normal = azula_denoiser(model), torch.linalg.pinv(a), torch.distributions.Normal(0.0, sd)
    options = {"steps": steps, "silent": True}

    def measure(x: Tensor) -> Tensor:
        return x @ a.mT

    def likelihood(x: Tensor) -> Tensor:
        return normal.log_prob(y - measure(x)).sum(-1)

    def ours(guidance: Any) -> Any:
        return guided(model, likelihood, guidance, sampler=evolve.Ancestral(steps))()

    yield "DPS", dps.DPSSampler(denoiser, y, measure, **options), ours(DPS())
    pseudo = pgdm.PGDMSampler(denoiser, y, measure, lambda y: y @ inverse.mT, eta=1.0, **options)
    yield "PiGDM", pseudo, ours(PiGDM())
    for iterations in sorted({1, len(y)}):
        bent = mmps.MMPSDenoiser(denoiser, y, measure, IsotropicCovariance(sd**2), iterations=iterations)
        yield f"MMPS, {iterations} it.", DDPMSampler(bent, **options), ours(MomentMatching())


def guided_sampling(batches: list[int], steps: int, repeats: int) -> None:
    if not there("azula"):
        return
    print(f"\nGuided, {steps} steps, Gaussian measurement of standard deviation .3: draws a second")
    print("law          d_y  rows guidance         azula      ours  ratio   first measured number of both: mean (sd)")
    for target, make in TARGETS.items():
        model = learned(make(), "ours", 0, 300, 512)
        for d_y in [1] if model.features == 2 else [1, 4]:
            torch.manual_seed(0)
            a = torch.linalg.qr(torch.randn(model.features, d_y))[0].mT
            y = torch.full((d_y,), 0.5)
            for rows in batches:
                for name, theirs, law in guided_pairs(model, a, y, 0.3, steps):
                    runs = from_noise(theirs, (rows, model.features)), partial(law.sample, (rows,))
                    seconds = medians(*runs, repeats=repeats)
                    line = f"{target:<12} {d_y:>3} {rows:>5} {name:<12} {rates(rows, seconds)}  "
                    for run in runs:
                        first = (run() @ a.mT)[:, 0]
                        line += f" {float(first.mean()):.2f} ({float(first.std()):.2f})"
                    print(line, flush=True)


class Solved(NamedTuple):
    """Log densities by a solver: a function of setting and rows, its settings from the cheapest, and the truth."""

    name: str
    log_prob: Callable[[Any, Tensor], Tensor]
    settings: tuple[Any, ...]
    calls: Callable[[Any, Tensor], int]
    truth: Tensor

    def cheapest(self, x: Tensor, level: float) -> tuple[Any, Tensor]:
        """The first setting whose largest error is below a level, or none; and the errors of the last one tried."""
        for setting in self.settings:
            error = (self.log_prob(setting, x) - self.truth).abs().nan_to_num(math.inf)
            if float(error.max()) <= level:
                return setting, error
        return None, error


def sbi_solved(model: gm.Diffusion, law: Mixture | None, x: Tensor) -> Solved:
    """As sbi's posteriors do; the truth is the closed form of a law, or by the last setting in double precision."""
    from sbi.inference.potentials.vector_field_potential import VectorFieldBasedPotential
    from sbi.neural_nets.estimators.score_estimator import VPScoreEstimator

    told, shape, dtype = Told(model), torch.Size([model.features]), model.place[0]
    estimator = VPScoreEstimator(told, shape, torch.Size([1])).to(dtype)
    wide = torch.distributions.Normal(torch.zeros(shape, dtype=dtype), 100.0)
    potential = VectorFieldBasedPotential(estimator, torch.distributions.Independent(wide, 1))

    def log_prob(tolerance: float, x: Tensor) -> Tensor:
        potential.set_x(torch.zeros(1, 1, dtype=dtype), rtol=tolerance, atol=tolerance / 10)
        return potential(x)

    def calls(tolerance: float, x: Tensor) -> int:
        told.calls = 0
        log_prob(tolerance, x)
        return told.calls

    t = torch.tensor([estimator.t_min], dtype=dtype)
    if law is not None:
        truth = log_density(law, x, float(estimator.mean_t_fn(t)), float(estimator.std_fn(t)))
    elif dtype == torch.float32:
        truth = sbi_solved(copy.deepcopy(model).double(), None, x).truth
    else:
        truth = log_prob(TOLERANCES[-1], x.double())
    return Solved("sbi", log_prob, TOLERANCES, calls, truth)


def our_solved(model: gm.Diffusion, law: Mixture, exact: bool, x: Tensor, noise: float | None = None) -> Solved:
    """By the classical Runge-Kutta method on the calibrated grid."""
    if noise is not None:
        options = {"parameterization": model.parameterization, "sigma_min": noise}
        model = gm.Diffusion(model.features, network=model.network, **options).to(x.dtype).freeze()
    model.calibrate(1.0, x=law.sample(256).to(x))

    @torch.no_grad()
    def log_prob(steps: int, x: Tensor, model: gm.Diffusion = model) -> Tensor:
        model.solver = evolve.RK4(steps)
        return model().log_prob(x)

    if exact:
        truth = log_density(law, x, 1.0, math.tan(model.bottom))
    else:
        truth = log_prob(2 * STEPS[-1], x.double(), copy.deepcopy(model).double())
    return Solved("ours, sbi's noise" if noise else "ours", log_prob, STEPS, lambda steps, _: 4 * steps, truth)


def likelihood(rows: int, repeats: int) -> None:
    if not there("sbi"):
        return
    print(f"\nLog density of {rows} rows at equal largest error (nats); setting: tolerance, or steps of RK4")
    print("law          network   level whose             setting mean err  max err  calls       ms  ratio")
    for target, make in TARGETS.items():
        law = make()
        for exact in (True, False):
            model = law.diffusion(torch.float64) if exact else learned(law, "ours", 0, 1000, 512)
            torch.manual_seed(1)
            x = law.sample(rows).to(model.place[0])
            ours = [our_solved(model, law, exact, x, noise) for noise in (SBI_NOISE, None)]
            everyone = [sbi_solved(model, law if exact else None, x), *ours]
            for level in LEVELS:
                compare(f"{target:<12} {'exact' if exact else 'learned':<8} {level:>6g}", everyone, x, level, repeats)


def compare(label: str, everyone: list[Solved], x: Tensor, level: float, repeats: int) -> None:
    """Lines of a table for one level of accuracy."""
    found = [one.cheapest(x, level) for one in everyone]
    runs = [partial(one.log_prob, setting, x) for one, (setting, _) in zip(everyone, found, strict=True) if setting]
    seconds = iter(medians(*runs, repeats=repeats))
    times = [next(seconds) if setting else math.nan for setting, _ in found]
    for one, (setting, error), taken in zip(everyone, found, times, strict=True):
        line = f"{label} {one.name:<17} {setting or 'none':<7} {float(error.mean()):>8.1e} {float(error.max()):>8.1e}"
        print(f"{line} {one.calls(setting, x) if setting else 0:>6} {1e3 * taken:>8.1f} {taken / times[-1]:>6.2f}")


def loss_of(name: str, model: gm.Diffusion) -> Callable[[Tensor], Tensor]:
    """The loss of a library for the network of a diffusion."""
    if name.startswith("azula"):
        denoiser = azula_denoiser(model, name.split()[1])
        return lambda x: denoiser.loss(x, torch.rand(len(x)))
    if name == "ours":
        return lambda x: model.loss(x).mean()
    from torchcfm import ConditionalFlowMatcher

    def loss(x: Tensor) -> Tensor:
        t, place, velocity = ConditionalFlowMatcher(0.0).sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (model.network(torch.atan2(1 - t, t)[:, None], place) - velocity).square().mean()

    return loss


def learned(law: Mixture, name: str, seed: int, steps: int, batch: int) -> gm.Diffusion:
    """The default network after Adam on fresh white draws, with a rate that rises for a fifth of the way, and falls."""
    torch.manual_seed(seed)
    model = gm.Diffusion(law.means.shape[1])
    loss = loss_of(name, model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, 5 * (k + 1) / steps) * 0.5 * (1 + math.cos(math.pi * k / steps))
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss(law.sample(batch).float()).backward()
        optimizer.step()
        rates.step()
    if name == "torchcfm":
        model = gm.Diffusion(model.features, network=Straight(model.network), parameterization="denoised")
    return model.freeze()


def learning(seeds: int, steps: int, batch: int, rows: int) -> None:
    names = [name for name in LOSSES if name == "ours" or there(name.split()[0])]
    print(f"\nKL after {steps} Adam steps of {batch}, from {rows} draws, and error of the solution: nats")
    for target, make in TARGETS.items():
        law = make()
        torch.manual_seed(1000)
        x = law.sample(rows)
        for name in names:
            gaps, errors = [], []
            for seed in range(seeds):
                model = learned(law, name, seed, steps, batch)
                model.calibrate(1e-2, x=x[:256].float())
                with torch.no_grad():
                    gaps.append(float((log_density(law, x) - model().log_prob(x.float())).mean()))
                errors.append(model.log_prob_error)
            line = f"{target:<12} {name:<24} mean {statistics.mean(gaps):.3f}   seeds"
            print(f"{line} {' '.join(f'{gap:.3f}' for gap in gaps)}   error {max(errors):.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("sampling", "guided", "likelihood", "learning"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512], help="rows of --sampling and --guided")
    parser.add_argument("--steps", type=int, default=64, help="of samplers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256, help="of --likelihood")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.sampling:
        sampling(options.batches, options.steps, options.repeats)
    if options.guided:
        guided_sampling(options.batches, options.steps, options.repeats)
    if options.likelihood:
        likelihood(options.rows, options.repeats)
    if options.learning:
        learning(seeds=3, steps=2500, batch=512, rows=800)


if __name__ == "__main__":
    main()
