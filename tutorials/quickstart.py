"""Real handwritten digits, a learned prior, and what it says of digits that are half lost and half noisy.

A flow is fitted to 8x8 digits. Then eight digits that it has never seen lose their lower half, and noise of an unknown
scale covers their upper half. A Pyro model with the learned prior as a latent site infers the noise scale and the
digits, by many chains of HMC in noise space and, for one of them, by a flow guide. Summary on the screen, pictures in
``outputs/``.
"""

from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from tqdm import trange

import pyro_genmods as gm

out = Path("outputs")
out.mkdir(exist_ok=True)
pyro.set_rng_seed(0)

# 1. Learn the prior. Grey levels become continuous by noise of a twentieth of their range, fresh for every copy.
levels = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)[torch.randperm(1797)] / 16
images = (levels[:1400].repeat(10, 1), levels[1400:1600], levels[1600:])
training, validation, unseen = (dist.Normal(x, 0.05).sample() for x in images)
prior = gm.transform.coupling_flow(64, hidden_features=(64, 64))
history = gm.fit(prior, training, validation=validation, max_epochs=4, learning_rate=4e-3, weight_decay=1, ema=0.99)
history.plot().figure.savefig(out / "training.png", dpi=150)
prior.freeze()

# 2. What is observed: the upper half, under noise of scale 0.2.
truth = unseen[:8]
observed = dist.Normal(truth[:, :32], 0.2).sample()


def model(observed):
    noise = pyro.sample("noise", dist.HalfNormal(0.5))
    with pyro.plate("digits", len(observed)):
        digit = pyro.sample("digit", prior())
        pyro.sample("upper_half", dist.Normal(digit[..., :32], noise[..., None]).to_event(1), obs=observed)


noise_space = poutine.reparam(model, {"digit": gm.infer.PushforwardReparam()})

# 3. The posterior of all digits by HMC, in the noise space of the prior; sixteen chains at once.
kernel = gm.infer.HMC(noise_space, init_strategy=gm.infer.init_to_prior, max_leapfrogs=32)
mcmc = gm.infer.MCMC(kernel, num_samples=60, warmup_steps=60, num_chains=16)
mcmc.run(observed)
posterior = gm.diagnostics.to_inference_data(mcmc, num_prior_samples=0)
digits = torch.tensor(posterior.posterior["digit"].values).flatten(0, 1)

# 4. The posterior of one digit by a flow guide, and whether it can be trusted.
guide = gm.infer.AutoFlow(noise_space, gaussian_steps=150)
svi = SVI(noise_space, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), Trace_ELBO(8, vectorize_particles=True))
for _ in (bar := trange(300, desc="guide")):
    bar.set_postfix(elbo=f"{-svi.step(observed[:1]):.1f}")
guided = guide.sample_posterior(500)
khat = gm.diagnostics.psis_khat(guide.log_weights(2000, observed[:1]))

# 5. Look at it: summary, pixels that nobody saw, pictures.
guide_draws = gm.diagnostics.to_inference_data({"noise": guided["noise"][None]})
for name, draws in {"HMC, 8 digits": posterior, "guide, 1 digit": guide_draws}.items():
    print(f"\nnoise scale by {name} (truth 0.2)", az.summary(draws, var_names=["noise"]), sep="\n")
print(f"\nk-hat of the guide {khat:.2f}: {'good' if khat < 0.7 else 'read it as a rough fit'}")
coverage = gm.diagnostics.interval_coverage(digits[..., 32:], truth[:, 32:])
print("90 % intervals hold the missing pixel in {:.1%} of cases, +- {:.1%}".format(*coverage.at(0.9)))
gm.diagnostics.plot_calibration(coverage).savefig(out / "calibration.png", dpi=150)
seen = torch.cat([observed, torch.full_like(observed, torch.nan)], 1)
pictures = (x.unflatten(-1, (8, 8)) for x in (truth[:6], seen[:6], digits[:, :6]))
gm.diagnostics.plot_image_posterior(*pictures).savefig(out / "digits.png", dpi=150)
print(f"pictures: {', '.join(sorted(path.name for path in out.glob('*.png')))} in {out}/")
