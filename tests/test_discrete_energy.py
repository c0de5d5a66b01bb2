"""Discrete energies: moves against enumeration, constants against closed forms, learning against the likelihood."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import nn

import pyro_genmods as gm
from pyro_genmods.foundation.annealing import Path, anneal
from pyro_genmods.foundation.bits import all_bits, log_sum_over_bits
from pyro_genmods.foundation.chains import Plain, start
from pyro_genmods.foundation.errors import (
    DensityError,
    DoublyIntractableError,
    ModelError,
    ShapeError,
    SupportError,
)
from pyro_genmods.foundation.gibbs import GibbsMoves, flip_log_probs, gibbs_with_gradients
from pyro_genmods.shape import (
    RBM,
    AnnealedGibbs,
    DiscreteEnergy,
    Enumerated,
    GibbsChains,
    GibbsContrastive,
    Ising,
)
from pyro_genmods.shape.lattice import coloring
from pyro_genmods.shape.onsager import kaufman, spin_sums, transfer

from .statistics import assert_counts, assert_mean

DOUBLE = torch.float64
BETAS = (0.2, 0.4406867935, 0.6)
LOG_Z = {
    3: (6.66974460, 9.02021340, 11.58769501),
    4: (11.77147036, 15.52191546, 20.05653288),
    8: (47.01014742, 60.14178079, 78.14164886),
    10: (73.45309780, 93.61030051, 121.70638997),
    16: (188.03988796, 238.64225663, 310.48703859),
    32: (752.15955177, 952.64807953, 1239.86871279),
}
MAGNETIZATION, BONDS = (0.34276563, 0.84386044, 0.97286745), (0.45613537, 1.56562379, 1.90806953)
QUIET = {"progress_bar": False, "seed": 0}


class Quartic(nn.Module):
    """Interactions of every order, rough enough that gradients mislead."""

    def __init__(self, bits: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(bits)
        self.register_buffer("pairs", scale * torch.randn(bits, bits, generator=generator))
        self.register_buffer("whole", scale * torch.randn(bits, generator=generator))

    def forward(self, y):
        return ((y @ self.pairs) * y).sum(-1) + (y @ self.whole).square() - (2 * y @ self.whole).sin()


def test_machine() -> RBM:
    """The machine of 20 and 10 units whose constant is known."""
    numbers = np.random.RandomState(0)
    weights = numbers.randn(20, 10) * 0.5, numbers.randn(20) * 0.2, numbers.randn(10) * 0.2
    machine = RBM(20, 10)
    with torch.no_grad():
        for parameter, value in zip(machine.network.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(value))
    return machine


test_machine.__test__ = False


def small_machine(visible: int = 6, hidden: int = 4) -> RBM:
    """Units that are tied together, and by themselves as often one as zero."""
    machine = RBM(visible, hidden)
    weight = 1.5 * torch.randn(visible, hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter, value in zip(
            machine.parameters(), (weight, -weight.sum(1) / 2, -weight.sum(0) / 2), strict=True
        ):
            parameter.copy_(value)
    return machine


def masses(model) -> torch.Tensor:
    """Masses of all events, listed like ``all_bits``."""
    y = all_bits(model.features, torch.zeros((), dtype=DOUBLE))
    return (-model.double().energy_rows(y, None)).softmax(0).detach()


def run(model, sweeps: int, chains: int) -> torch.Tensor:
    """Where independent chains from fair bits arrive, as rows."""
    fair = torch.randint(2, (chains, model.features)).to(model.place[0])
    return model.chain_rows(fair, None, sweeps)


# -- moves ------------------------------------------------------------------------------------------------------------


def test_gibbs_with_gradients_is_in_detailed_balance():
    """Mass times probability of a flip and of its acceptance, both ways, for every event and every bit."""
    energy = Quartic(4).double()
    y = all_bits(4, torch.zeros((), dtype=DOUBLE))
    flow = torch.zeros(16, 16, dtype=DOUBLE)
    state = start(y, Plain(energy))
    for bit in range(4):
        wanted = torch.full_like(y, -torch.inf)
        wanted[:, bit] = 0
        new, rate = gibbs_with_gradients(state, Plain(energy), wanted, torch.full((16,), -torch.inf, dtype=DOUBLE))
        there = (new.position @ y.new_tensor([8.0, 4.0, 2.0, 1.0])).long()
        assert ((new.position != y).sum(-1) == 1).all()
        assert torch.allclose(new.energy, energy(new.position))
        flow[torch.arange(16), there] += (-energy(y)).softmax(0) * flip_log_probs(state)[:, bit].exp() * rate
    assert torch.allclose(flow, flow.mT, atol=1e-12)
    assert (flow > 0).sum() == 64


def test_a_flip_that_is_not_a_number_is_refused():
    def energy(y):
        return torch.where(y[:, 0] > 0.5, y.sum(-1) * torch.nan, y.sum(-1))

    state = start(torch.zeros(3, 2), Plain(energy))
    gumbel = torch.tensor([[9.0, 0.0]]).expand(3, 2)
    new, rate = gibbs_with_gradients(state, Plain(energy), gumbel, torch.full((3,), -torch.inf))
    assert torch.equal(new.position, state.position) and not rate.any()


@pytest.mark.parametrize("chains", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model", "sweeps"),
    [
        (lambda: DiscreteEnergy(6, network=Quartic(6, 0.5)), 20),
        (lambda: small_machine(), 30),
        (lambda: Ising(3, 0.3), 30),
        (lambda: Ising(3, 0.3, 0.2), 30),
        (lambda: Ising(2, 0.2, -0.3), 30),
    ],
    ids=["gradients", "block", "odd-lattice", "field", "two-rows"],
)
def test_moves_lead_to_the_law(model, sweeps, chains):
    """Means, and means of products, of the ends of independent chains, within what chance allows."""
    model = model()
    probabilities, events = masses(model), all_bits(model.features, torch.zeros((), dtype=DOUBLE))
    y = run(model, sweeps, chains)
    i, j = torch.triu_indices(model.features, model.features)
    truth = probabilities @ (events[:, i] * events[:, j])
    assert_mean(y[:, i] * y[:, j], truth, (truth * (1 - truth) / chains).sqrt())
    if model.features == 6:
        code = (y @ y.new_tensor([32.0, 16.0, 8.0, 4.0, 2.0, 1.0])).long()
        assert_counts(torch.bincount(code, minlength=64), probabilities)


@pytest.mark.parametrize("length", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_the_heat_bath_leaves_a_lattice_as_it_is(length):
    y = run(Ising(length, 0.3), 60, 20_000).unflatten(1, (length, length))
    moments = Ising(length, 0.3).exact_moments()
    bonds, spins = (x / length**2 for x in spin_sums(y))
    assert_mean(bonds, moments.bonds)
    assert_mean(spins, 0.0)
    if length == 4:
        assert_mean(spins.abs(), moments.absolute_magnetization)


@pytest.mark.parametrize(
    "model",
    [lambda: DiscreteEnergy(4, network=Quartic(4)), lambda: small_machine(4, 3), lambda: Ising(2, 0.4, 0.2)],
    ids=["gradients", "block", "heat-bath"],
)
def test_every_row_has_a_temperature_of_its_own(model):
    model = model().double()
    model.reference.logits += 0.0 if isinstance(model, Ising) else 0.7
    generator = torch.Generator().manual_seed(3)
    path, q, moves = model.annealing(None, 1, 9000, generator)
    beta = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
    path.inverse_temperature = beta.repeat(3000)
    y = moves.run(q, 20)[:, : model.features].unflatten(0, (3000, 3))
    every = all_bits(4, torch.zeros((), dtype=DOUBLE))
    hidden = all_bits(3, every) if isinstance(model, RBM) else None
    for k in range(3):
        if hidden is None:
            reference, tilt = path.parts(every)
            weight = -(reference + beta[k] * tilt)
        else:  # both layers, with the hidden one summed out
            both = torch.cat([every.repeat_interleave(8, 0), hidden.repeat(16, 1)], -1)
            reference, tilt = path.parts(both)
            weight = -(reference + beta[k] * tilt).unflatten(0, (16, 8))
            weight = weight.logsumexp(1)
        assert_mean(y[:, k], weight.softmax(0) @ every)


def test_colors_are_never_neighbours():
    for length in range(2, 9):
        colors = coloring(length)
        assert all((colors != colors.roll(1, dim)).all() for dim in (0, 1))
        assert int(colors.max()) == (2 if length % 2 else 1)


# -- constants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LOG_Z)
def test_the_lattice_has_its_known_constant(length):
    for beta, truth in zip(BETAS, LOG_Z[length], strict=True):
        value = kaufman(length, torch.tensor(beta, dtype=DOUBLE))
        assert float(value) == pytest.approx(truth, abs=1e-8)
        assert Ising(length, beta).exact_log_normalizer().item() == pytest.approx(truth, rel=1e-6)
        if length <= 8:
            assert float(transfer(length, torch.tensor(beta, dtype=DOUBLE), value * 0)) == pytest.approx(
                truth, abs=1e-8
            )


def test_the_lattice_has_its_known_moments():
    for beta, magnetization, bonds in zip(BETAS, MAGNETIZATION, BONDS, strict=True):
        moments = Ising(4, beta).double().exact_moments()
        assert moments.absolute_magnetization == pytest.approx(magnetization, abs=1e-6)
        assert moments.bonds == pytest.approx(bonds, abs=1e-6) and moments.magnetization == 0
    field = Ising(3, 0.3, 0.2).double()
    y = all_bits(9, torch.zeros((), dtype=DOUBLE)).unflatten(1, (3, 3))
    bonds, spins = spin_sums(y)
    weight = field().log_prob(y).exp()
    assert float(weight.sum()) == pytest.approx(1, abs=1e-12)
    assert field.exact_moments()[:2] == pytest.approx([float(weight @ x) / 9 for x in (bonds, spins)], abs=1e-9)
    assert math.isnan(Ising(6, 0.3).exact_moments().absolute_magnetization)


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("field", [0.0, 0.4])
def test_every_small_lattice_sums_to_one(length, field):
    law = Ising(length, 0.35, field).double()()
    assert float(law.log_prob(law.enumerate_support()).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_machine_has_its_known_constant_by_either_layer():
    machine = test_machine().double()
    assert machine.exact_log_normalizer().item() == pytest.approx(27.8531102893, abs=1e-6)
    for visible, hidden in ((5, 3), (3, 5)):
        machine = small_machine(visible, hidden).double()
        law = machine.normalize_()()
        assert law.density is gm.Density.EXACT and machine.log_normalizer_error == 0
        assert float(law.log_prob(law.enumerate_support()).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_sums_in_parts_are_sums():
    def weights(y):
        return torch.stack([y.sum(-1), -2 * y[:, 0]])

    truth = torch.tensor([10 * math.log(1 + math.e), 9 * math.log(2) + math.log(1 + math.exp(-2))])
    for part in (1024, 100, 7):
        assert torch.allclose(log_sum_over_bits(weights, 10, torch.zeros(()), part), truth)


def annealed(model, particles: int, groups: int = 8):
    path, q, moves = model.annealing(None, groups, particles, torch.Generator().manual_seed(5))
    return model.log_base_normalizer + anneal(path, q, moves, max_moves=10).log_ratio


@pytest.mark.parametrize(
    ("model", "truth"),
    [*((lambda b=b: Ising(4, b), z) for b, z in zip(BETAS, LOG_Z[4], strict=True)), (test_machine, 27.8531102893)],
    ids=["hot", "critical", "cold", "machine"],
)
def test_annealing_finds_the_constant(model, truth):
    found = annealed(model(), 2000)
    assert float(found.mean()) == pytest.approx(truth, abs=0.05)
    assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(8) + 0.01
    assert float(found.std()) < 0.1


@pytest.mark.parametrize(
    ("model", "truth"),
    [
        *((lambda b=b: Ising(4, b, normalized=False), z) for b, z in zip(BETAS, LOG_Z[4], strict=True)),
        (test_machine, 27.8531102893),
    ],
    ids=["hot", "critical", "cold", "machine"],
)
def test_the_estimated_constant_has_its_error(model, truth):
    partition = pytest.importorskip("pyro_genmods.shape.partition")
    found = partition.log_normalizer(model(), seed=0)
    assert found.ok and found.value == pytest.approx(truth, abs=0.05)
    assert abs(found.value - truth) < 4 * found.standard_error and found.lower < truth < found.upper


def test_annealing_by_gradients_finds_the_constant():
    network = Quartic(10, 0.5)
    model = DiscreteEnergy(10, network=network)
    assert float(annealed(model, 1000).mean()) == pytest.approx(model.exact_log_normalizer().item(), abs=0.05)
    assert model.normalize_()().density is gm.Density.EXACT


# -- draws ------------------------------------------------------------------------------------------------------------


def two_modes(y):
    """Sixteen bits that are nearly all zero, or nearly all one: seven times in ten."""
    up = (math.log(0.7), 4.0)
    down = (math.log(0.3), -4.0)
    norm = 16 * math.log(1 + math.exp(4.0))
    terms = [w + (a * y).sum(-1) - (norm if a > 0 else norm - 64.0) for w, a in (up, down)]
    return -torch.stack(terms).logsumexp(0)


def test_modes_get_their_weights_by_annealing_and_not_by_chains():
    model = DiscreteEnergy(16, network=two_modes)
    assert model.exact_log_normalizer().item() == pytest.approx(0, abs=1e-5)
    y = AnnealedGibbs(max_moves=4).draw(model, 4000, None)
    assert float((y.mean(-1) > 0.5).float().mean()) == pytest.approx(0.7, abs=0.05)
    stuck = GibbsChains(10).draw(model, 2000, None)
    assert float((stuck.mean(-1) > 0.5).float().mean()) == pytest.approx(0.5, abs=0.06)


def test_samplers_agree_at_contexts():
    def energy(y, c):
        return -(y * c[:, :1]).sum(-1) - c[:, 1] * y[:, 0] * y[:, 1]

    c = torch.tensor([[0.5, 1.0], [-1.0, 2.0], [0.0, -2.0]])
    for sampler in (Enumerated(), AnnealedGibbs(particles_per_context=2000), GibbsChains(20)):
        law = DiscreteEnergy(3, 2, network=energy, sampler=sampler)(c)
        x = law.sample((4000,))
        if isinstance(sampler, AnnealedGibbs):  # its members have ancestors in common
            assert (x.mean(0) - law.mean).abs().max() < 0.06
        else:
            assert_mean(x, law.mean)


def test_small_laws_are_drawn_exactly_and_large_ones_are_annealed():
    assert isinstance(DiscreteEnergy(12, hidden_features=(4,)).sampler, Enumerated)
    model = DiscreteEnergy(13, hidden_features=(4,))
    assert isinstance(model.sampler, AnnealedGibbs) and model.cost == gm.Cost(sample=None, score=1)
    assert DiscreteEnergy(3, normalized=True, hidden_features=(4,)).cost == gm.Cost(sample=1, score=2)
    assert model().sample((2, 3)).shape == (2, 3, 13)
    with torch.no_grad():
        assert pyro.sample("x", model().expand([4])).shape == (4, 13)
    with pytest.raises(DensityError, match="sampler: 20 bits"):
        DiscreteEnergy(20, hidden_features=(4,), sampler="exact")().sample()


def test_entropy_and_mean_are_sums_over_events():
    law = DiscreteEnergy(4, network=Quartic(4))()
    probabilities = masses(DiscreteEnergy(4, network=Quartic(4))).float()
    assert torch.allclose(law.mean, probabilities @ all_bits(4, probabilities))
    assert torch.allclose(law.entropy(), torch.special.entr(probabilities).sum())
    assert law.expand([3]).mean.shape == (3, 4) and law.expand([3, 2]).entropy().shape == (3, 2)
    large = DiscreteEnergy(13, hidden_features=(4,))()
    with pytest.raises(DensityError, match="no normaliser"):
        large.entropy()
    with pytest.raises(DensityError, match=r"2\^13 events"):
        _ = large.mean
    fair = Ising(4, 1e-6)()
    assert float(fair.entropy(50)) == pytest.approx(16 * math.log(2), abs=1e-3)


# -- learning ---------------------------------------------------------------------------------------------------------


def machine_data(rows: int) -> torch.Tensor:
    return small_machine()().sample((rows,))


def learned(objective, x, epochs: int, **options) -> tuple[float, gm.TrainingHistory]:
    torch.manual_seed(0)
    machine = RBM(6, 4, normalized=objective == "likelihood", objective=objective)
    history = gm.fit(
        machine, x, max_epochs=epochs, learning_rate=0.03, validation=0, patience=None, batch_size=200, **QUIET
    )
    law = machine.freeze().normalize_()()
    return float(law.log_prob(x).mean()), history


def test_a_machine_learns_by_persistent_chains_what_the_likelihood_teaches():
    x = machine_data(1000)
    exact, history = learned("likelihood", x, 60)
    contrast, other = learned(GibbsContrastive(sweeps=3), x, 60)
    independent = x.mean(0).clamp(0.01, 0.99)
    baseline = float(dist.Bernoulli(independent).log_prob(x).sum(-1).mean())
    assert exact > baseline + 0.2, "there was nothing to learn"
    assert contrast > exact - 0.05
    assert RBM(6, 4).comparable is False and history.stopped and other.stopped


@pytest.mark.slow
def test_a_discrete_energy_learns_by_persistent_chains_what_the_likelihood_teaches():
    truth = DiscreteEnergy(8, network=Quartic(8, 0.7))
    x = truth().sample((2000,))
    found = {}
    for name, objective in {
        "likelihood": "likelihood",
        "contrastive": GibbsContrastive(),
        "short": GibbsContrastive(persistent=False),
    }.items():
        torch.manual_seed(0)
        model = DiscreteEnergy(8, normalized=name == "likelihood", objective=objective, hidden_features=(64, 64))
        gm.fit(model, x, max_epochs=40, learning_rate=3e-3, validation=0, patience=None, batch_size=200, **QUIET)
        target, fitted = masses(truth), masses(model)
        found[name] = float((target * (target / fitted).log()).sum())
    assert found["likelihood"] < 0.1  # 255 / (2 * 2000) is what so few rows cost a table
    assert found["contrastive"] < found["likelihood"] + 0.05
    assert found["short"] < found["likelihood"] + 0.1


@pytest.mark.slow
def test_a_conditional_energy_learns():
    """Two bits that agree where the context is positive, and differ where it is negative."""
    c = torch.randn(2000, 1)
    first = (torch.rand(2000) < 0.5).float()
    x = torch.stack([first, torch.where(c[:, 0] > 0, first, 1 - first)], -1)
    for objective in ("likelihood", GibbsContrastive(sweeps=4, restart=0.1)):
        torch.manual_seed(0)
        model = DiscreteEnergy(2, 1, normalized=objective == "likelihood", objective=objective, hidden_features=(32,))
        gm.fit(model, x, c, max_epochs=40, learning_rate=1e-2, validation=0, patience=None, **QUIET)
        far = torch.tensor([[1.0], [-1.0]])
        draws = model.freeze()(far).sample((500,))
        agree = (draws[..., 0] == draws[..., 1]).float().mean(0)
        assert agree[0] > 0.85 and agree[1] < 0.15


def test_the_lattice_learns_its_temperature_and_field():
    torch.manual_seed(0)
    x = Ising(3, 0.3, 0.2)().sample((4000,))
    for length, data in ((3, x), (12, AnnealedGibbs().draw(Ising(12, 0.3), 500, None).reshape(-1, 12, 12))):
        model = Ising(length, 0.1, 0.1 if length == 3 else 0.0, learnable=True)
        assert len(list(model.parameters())) == (2 if length == 3 else 1)
        gm.fit(model, data, max_epochs=40, learning_rate=0.05, validation=0, patience=None, batch_size=500, **QUIET)
        assert model.network.inverse_temperature.item() == pytest.approx(0.3, abs=0.03)
        if length == 3:
            assert model.network.field.item() == pytest.approx(0.2, abs=0.05)
    large = Ising(9, 0.1, 0.1, learnable=True)
    assert large.density is gm.Density.UNNORMALIZED and not large.comparable
    assert Ising(9, 0.1).density is gm.Density.EXACT


@pytest.mark.slow
def test_a_large_lattice_in_a_field_learns_by_chains():
    torch.manual_seed(0)
    x = AnnealedGibbs().draw(Ising(10, 0.25, 0.1), 1000, None).reshape(-1, 10, 10)
    model = Ising(10, 0.1, 0.3, learnable=True)
    gm.fit(model, x, max_epochs=60, learning_rate=0.03, validation=0, patience=None, batch_size=250, **QUIET)
    assert model.network.inverse_temperature.item() == pytest.approx(0.25, abs=0.03)
    assert model.network.field.item() == pytest.approx(0.1, abs=0.03)


def test_chains_are_written_back_to_where_they_were_taken_from():
    model = DiscreteEnergy(5, network=Quartic(5), objective=GibbsContrastive(buffer_size=64, restart=0.0))
    x = torch.randint(2, (16, 5)).float()
    model.loss(x)
    before = model.negatives.positions.clone()
    model.loss(x)
    changed = (model.negatives.positions != before).any(-1)
    assert 0 < int(changed.sum()) <= 16
    model.eval().loss(x)
    assert (model.negatives.positions[~changed] == before[~changed]).all()
    assert ((model.negatives.positions == 0) | (model.negatives.positions == 1)).all()
    with pytest.raises(ValueError, match="buffer_size: 64 chains are kept, and a batch needs 65"):
        model.loss(torch.zeros(65, 5))


def test_the_reference_has_the_frequencies_of_the_data_and_stays_where_it_is_told():
    x = (torch.rand(5000, 3) < torch.tensor([0.9, 0.5, 0.1])).float()
    model = RBM(3, 2)
    model.standardize(x)
    assert torch.allclose(model.reference.logits.sigmoid(), x.mean(0), atol=1e-3)
    assert_mean(model.reference_rows(5000), (x.sum(0) + 1) / 5002)
    for fair in (RBM(3, 2, reference="uniform"), Ising(2, 0.3)):
        fair.standardize(torch.ones(9, *fair.event_shape))
        assert not fair.reference.logits.any()


def test_fit_drops_a_constant_of_old_weights():
    machine = RBM(3, 2).normalize_()
    assert machine().density is gm.Density.EXACT
    gm.fit(machine, torch.randint(2, (64, 3)).float(), max_epochs=1, **QUIET)
    assert machine().density is gm.Density.UNNORMALIZED and math.isnan(machine.log_normalizer_error)


# -- in Pyro programs -------------------------------------------------------------------------------------------------


def site(prior, bits: int):
    """A latent number that shifts what is measured of hidden bits."""
    y = torch.full((bits,), 0.8)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", prior(), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x + m.reshape(*m.shape, 1), 0.5).to_event(1), obs=y)

    return model


def test_a_constant_cancels_where_a_site_is_summed_out():
    """Energies of the enumerated program differ by the constant alone, and their gradients not at all."""
    values = {}
    for normalized in (False, True):
        prior = DiscreteEnergy(4, network=Quartic(4), normalized=normalized)
        potential = gm.infer.potential(site(prior, 4), level="eager")
        values[normalized] = potential.value_and_grad(torch.tensor([[-1.0], [0.3], [2.0]]))
    gap = values[True][0] - values[False][0]
    constant = DiscreteEnergy(4, network=Quartic(4)).exact_log_normalizer()
    assert torch.allclose(gap, constant.expand(3), atol=1e-4)
    assert torch.allclose(values[True][1], values[False][1], atol=1e-4)


def test_many_bits_are_refused_as_a_latent_site_of_chains():
    program = site(RBM(13, 2), 13)
    for refused in (
        lambda: gm.infer.potential(program),
        lambda: gm.infer.MCMC(gm.infer.HMC(program), num_samples=2).run(),
    ):
        with pytest.raises(ModelError, match=r"site 'x': .* is discrete and cannot be summed out"):
            refused()
    with pytest.raises((NotImplementedError, ValueError)):
        pyro.infer.NUTS(program).setup(1)


def test_predictive_draws_large_laws():
    draws = pyro.infer.Predictive(lambda: pyro.sample("x", Ising(5, 0.4)()), num_samples=3)()
    assert draws["x"].shape == (3, 5, 5)
    with pyro.plate("plate", 4):
        assert pyro.sample("x", RBM(13, 2)()).shape == (4, 13)


def test_score_function_gradients_fit_a_guide():
    """A normalised energy as a guide of three bits that a sum was seen of: the posterior by enumeration."""
    torch.manual_seed(0)
    guide_law = DiscreteEnergy(3, normalized=True, hidden_features=(16,))

    def model():
        x = pyro.sample("x", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.4), obs=torch.tensor(1.2))

    def guide():
        pyro.module("guide", guide_law)
        pyro.sample("x", guide_law())

    elbo = pyro.infer.Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    for _ in range(150):
        svi.step()
    events = all_bits(3, torch.zeros(()))
    joint = dist.Bernoulli(torch.full((3,), 0.4)).to_event(1).log_prob(events)
    posterior = (joint + dist.Normal(events.sum(-1), 0.4).log_prob(torch.tensor(1.2))).softmax(0)
    assert (guide_law().log_prob(events).exp() - posterior).abs().max() < 0.06


def test_an_unknown_constant_is_refused_where_it_does_not_cancel():
    energy = DiscreteEnergy(3, 1, hidden_features=(8,))
    c = torch.zeros(1, requires_grad=True)
    with pytest.raises(DoublyIntractableError, match=r"context: it is being inferred.*normalized=True"):
        energy(c).log_prob(torch.zeros(3))
    known = DiscreteEnergy(3, 1, hidden_features=(8,), normalized=True)
    (slope,) = torch.autograd.grad(known(c).log_prob(torch.zeros(3)), c)
    assert slope.isfinite().all()
    machine = RBM(3, 2)
    pyro.module("machine", machine)
    with pytest.raises(DoublyIntractableError, match="being learned"):
        machine().log_prob(torch.zeros(3))
    licensed = DiscreteEnergy(3, 1, hidden_features=(8,), allow_unnormalized=True)
    assert licensed(c).log_prob(torch.zeros(3)).isfinite()


def test_inside_svi_a_contrast_has_the_gradient_of_the_likelihood():
    machine = RBM(5, 3, learn="contrastive", objective=GibbsContrastive(sweeps=20, buffer_size=8192, restart=0.0))
    machine.network.load_state_dict(small_machine(5, 3).network.state_dict())
    twin = RBM(5, 3, normalized=True)
    twin.network.load_state_dict(machine.network.state_dict())
    x = torch.ones(8192, 5)
    machine.negatives.positions.copy_(twin().sample((8192,)))
    machine.negatives.filled.fill_(1)
    slopes = [
        torch.autograd.grad(law().log_prob(x).mean(), law.network.weight, retain_graph=True)[0]
        for law in (machine, twin)
    ]
    assert (slopes[0] - slopes[1]).abs().max() < 5 * 0.5 / math.sqrt(8192)
    assert slopes[1].abs().max() > 0.1


@pytest.mark.slow
def test_chains_of_a_program_integrate_an_energy_prior_out():
    """The posterior of a shift under hidden bits, by quadrature."""
    prior = DiscreteEnergy(4, network=Quartic(4)).freeze()
    program = site(prior, 4)
    mcmc = gm.infer.MCMC(gm.infer.HMC(program), num_samples=50, seed=0, progress_bar=False)
    mcmc.run()
    draws = mcmc.get_samples()["m"].flatten()
    grid = torch.linspace(-4, 4, 2001)
    events, weight = prior().enumerate_support(), prior().log_prob(prior().enumerate_support())
    likelihood = dist.Normal(events + grid[:, None, None], 0.5).log_prob(torch.tensor(0.8)).sum(-1)
    density = (dist.Normal(0.0, 1.0).log_prob(grid) + (weight + likelihood).logsumexp(-1)).softmax(0)
    mean = float(density @ grid)
    sd = math.sqrt(float(density @ (grid - mean).square()))
    assert float(draws.mean()) == pytest.approx(mean, abs=0.1 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.1)


# -- files, and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lambda: DiscreteEnergy(4, 1, hidden_features=(8,), normalized=True),
        lambda: Ising(3, 0.3, 0.1, learnable=True),
        lambda: RBM((2, 3), 2, objective=GibbsContrastive(buffer_size=32)),
        lambda: RBM(3, 2).normalize_(),
    ],
    ids=["energy", "lattice", "machine", "normalized"],
)
def test_saved_and_loaded(model, tmp_path):
    model = model()
    if hasattr(model, "negatives"):
        model.loss(torch.ones(4, *model.event_shape))
    gm.save(model, tmp_path / "model.safetensors")
    twin = gm.load(tmp_path / "model.safetensors")
    context = torch.ones(1) if model.context_shape else None
    x = model(context).sample((5,))
    assert torch.equal(twin(context).log_prob(x), model(context).log_prob(x))
    assert twin.density is model.density and torch.equal(twin.reference.logits, model.reference.logits)


def test_bad_networks_are_refused():
    bad = {
        "returned": (lambda y: y, ShapeError),
        "fails on rows": (lambda y: y @ torch.ones(3), ShapeError),
        "no gradient": (lambda y: (y > 0.5).float().sum(-1), DensityError),
        "for the same rows": (lambda y: y.sum(-1) + torch.rand(len(y)), ValueError),
        "mixes the rows": (lambda y: (y - y.mean(0)).square().sum(-1) + y.sum(), ValueError),
    }
    for message, (network, error) in bad.items():
        with pytest.raises(error, match=message):
            DiscreteEnergy(2, network=network)
    with pytest.raises(DensityError, match="which flips pay"):
        DiscreteEnergy(2, network=lambda y: y.round().detach().sum(-1))


def test_bad_arguments_are_refused():
    small = {"hidden_features": (4,)}
    refused = [
        (lambda: DiscreteEnergy(), ShapeError, "features: got None"),
        (lambda: DiscreteEnergy(2, event_shape=(2,)), ShapeError, "give one of them"),
        (lambda: DiscreteEnergy(0), ShapeError, "positive number of bits"),
        (lambda: DiscreteEnergy(2, -1), ShapeError, "context_features: got -1"),
        (lambda: DiscreteEnergy(17, normalized=True, **small), DensityError, r"sum 2\^17 events"),
        (lambda: DiscreteEnergy(2, objective="sliced", **small), ValueError, "objective: got 'sliced'"),
        (lambda: DiscreteEnergy(2, objective="likelihood", **small), ValueError, "normalized=True"),
        (lambda: DiscreteEnergy(2, sampler="hmc", **small), ValueError, "sampler: got 'hmc'"),
        (lambda: DiscreteEnergy(2, reference="data", **small), ValueError, "reference: got 'data'"),
        (lambda: DiscreteEnergy(2, learn="exact", **small), ValueError, "learn: got 'exact'"),
        (lambda: DiscreteEnergy(2, learn="contrastive", normalized=True, **small), ValueError, "learn: got"),
        (lambda: GibbsContrastive(sweeps=0), ValueError, "sweeps, buffer_size: got 0"),
        (lambda: GibbsContrastive(restart=2.0), ValueError, "restart: got 2.0"),
        (lambda: GibbsChains(0), ValueError, "sweeps, start: got 0"),
        (lambda: AnnealedGibbs(4), ValueError, "particles: got 4"),
        (lambda: Ising(1, 0.3), ShapeError, "length: got 1"),
        (lambda: Ising(4, 0.0), ValueError, "inverse_temperature, field: got 0.0"),
        (lambda: Ising(4, -0.3), ValueError, "repel each other"),
        (lambda: Ising(4, 0.3, math.inf), ValueError, "finite"),
        (lambda: Ising(11, 0.3, 0.1, normalized=True), DensityError, "normalized: in a field"),
        (lambda: RBM(3, 0), ShapeError, "visible, hidden: got 3, 0"),
        (lambda: RBM(0, 3), ShapeError, "visible, hidden: got 0, 3"),
        (lambda: RBM(30, 17, normalized=True), DensityError, r"sum 2\^17 events"),
    ]
    for action, error, message in refused:
        with pytest.raises(error, match=message):
            action()


def test_too_long_sums_and_wrong_events_are_refused():
    with pytest.raises(DensityError, match="25 bits have"):
        RBM(30, 25).exact_log_normalizer()
    with pytest.raises(DensityError, match="25 bits have"):
        DiscreteEnergy(25, hidden_features=(4,)).normalize_()
    with pytest.raises(DensityError, match="length: got 11"):
        Ising(11, 0.3, 0.1).exact_log_normalizer()
    with pytest.raises(DensityError, match="depends on the context"):
        DiscreteEnergy(2, 1, hidden_features=(4,)).normalize_()
    law = Ising(3, 0.3)()
    with pytest.raises(SupportError, match="outside the support"):
        law.log_prob(torch.full((3, 3), -1.0))
    with pytest.raises(ShapeError, match="value: got shape"):
        law.log_prob(torch.zeros(9))
    with pytest.raises(DensityError, match="sequential"):
        law.steps(3)
    assert math.isnan(RBM(3, 2).log_normalizer_error)


def test_a_path_counts_what_it_evaluates():
    path = Path(lambda y: 0.0 * y.sum(-1), lambda y: -y.sum(-1))
    path.inverse_temperature = torch.ones(5)
    moves = GibbsMoves(path, torch.zeros(5, 3), torch.Generator())
    moves.run(torch.zeros(5, 3), 2)
    assert moves.gradients == path.num_gradients == 5 * (1 + 2 * 3)
