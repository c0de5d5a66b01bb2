"""Causal networks: a pass and steps from a cache agree, under every transform, and the check sees what is not causal.

Nothing here is random but the seeded weights and entries; no test has a false-alarm rate.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pyro_genmods.foundation.causal import CausalNetwork, check_causal, transformed
from pyro_genmods.foundation.errors import ShapeError
from pyro_genmods.foundation.recurrent import GRU
from pyro_genmods.foundation.transformer import Transformer

T, OUTPUTS, VOCABULARY, INPUTS, CONTEXT, ROWS = 6, 3, 7, 2, 4, 5
ORDER = torch.tensor([4, 0, 2, 5, 1, 3])
CLASSES = {
    "transformer": lambda **k: Transformer(T, OUTPUTS, width=16, layers=2, heads=2, **k),
    "gru": lambda **k: GRU(T, OUTPUTS, width=16, layers=2, **k),
}
KINDS = {"numbers": {"inputs": INPUTS}, "tokens": {"vocabulary": VOCABULARY}}
every_class = pytest.mark.parametrize("name", CLASSES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(name, kind="numbers", dtype=torch.float64, **arguments):
    """A network with weights of order one everywhere, so that nothing is hidden behind a zero."""
    network = CLASSES[name](**KINDS[kind], **arguments).to(dtype)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "norm" not in key:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) / 2)
    return network


def some_entries(kind, dtype=torch.float64, rows=ROWS):
    return torch.randint(VOCABULARY, (rows, T)) if kind == "tokens" else torch.randn(rows, T, INPUTS, dtype=dtype)


def steps(network, entries, context, order=None, like=None):
    """All parameters by steps."""
    like = like if like is not None else torch.zeros((), dtype=next(network.parameters()).dtype)
    with torch.no_grad():
        cache = network.begin(entries.shape[0], context, like, order)
        before = [None, *entries[:, :-1].unbind(1)]
        return torch.stack([network.step(cache, entry) for entry in before], 1)


# -- one truth in two forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("order", [None, ORDER], ids=["ordered", "permuted"])
@pytest.mark.parametrize("orders", [False, True], ids=["one", "any"])
@pytest.mark.parametrize("context_features", [0, CONTEXT])
@every_kind
@every_class
def test_steps_give_what_a_pass_gives(name, kind, context_features, orders, order, dtype, tolerance):
    network = build(name, kind, dtype, context_features=context_features, orders=orders)
    x = some_entries(kind, dtype)
    c = torch.randn(ROWS, context_features, dtype=dtype) if context_features else None
    whole = network(x, c, order)
    assert whole.shape == (ROWS, T, OUTPUTS) and whole.dtype == dtype
    scale = float(whole.detach().abs().max())
    torch.testing.assert_close(steps(network, x, c, order), whole, rtol=0, atol=tolerance * max(scale, 1))


@pytest.mark.parametrize("orders", [False, True])
@every_kind
@every_class
def test_our_networks_are_causal(name, kind, orders):
    network = build(name, kind, context_features=CONTEXT, orders=orders)
    for order in (None, ORDER):
        check_causal(network, some_entries(kind), torch.randn(ROWS, CONTEXT, dtype=torch.float64), order)
    untouched = CLASSES[name](**KINDS[kind], orders=orders)  # its zero output layer must not hide a fault
    check_causal(untouched, some_entries(kind, torch.float32))


@every_class
def test_each_place_depends_on_all_before_the_context_and_the_order(name):
    network, x = build(name, context_features=CONTEXT, orders=True), some_entries("numbers")
    c = torch.randn(ROWS, CONTEXT, dtype=torch.float64)
    slopes = torch.func.jacrev(lambda x, c: network(x, c), argnums=(0, 1))(x[:1], c[:1])
    seen = slopes[0][0, :, :, 0].abs().sum((1, 3))
    assert torch.equal(seen > 0, torch.ones(T, T).tril(-1).bool())
    assert bool((slopes[1][0].abs().sum((1, 2, 3)) > 0).all())
    assert not torch.allclose(network(x, c), network(x, c, ORDER))


@every_class
def test_a_variable_keeps_its_position_in_every_order(name):
    """Without ``orders`` the first place of an order is the first place of another that starts alike."""
    network, x = build(name), some_entries("numbers")
    other = torch.tensor([4, 0, 3, 1, 5, 2])
    a, b = network(x, None, ORDER), network(x, None, other)
    torch.testing.assert_close(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2], b[:, 2])


@every_kind
@every_class
def test_a_network_of_one_entry_reads_the_context_alone(name, kind):
    classes = {"transformer": Transformer, "gru": GRU}
    network = classes[name](1, 2, **KINDS[kind], context_features=1, width=8)
    x = some_entries(kind, torch.float32)[:, :1]
    torch.testing.assert_close(steps(network, x, torch.ones(ROWS, 1)), network(x, torch.ones(ROWS, 1)))


def test_a_network_without_a_cache_steps_by_passes():
    class Plain(CausalNetwork):
        def forward(self, entries, context=None, order=None):
            past = functional.pad(entries[:, :-1].cumsum(1), (0, 0, 1, 0))
            return past if context is None else past + context.unsqueeze(1)

    x, c = torch.randn(ROWS, T, 2), torch.randn(ROWS, 2)
    network = Plain(T, 2, inputs=2, context_features=2)
    torch.testing.assert_close(steps(network, x, c, like=x), network(x, c))
    check_causal(network, x, c)


# -- caches -----------------------------------------------------------------------------------------------------------


@every_kind
@every_class
def test_a_fork_goes_on_from_its_rows_and_leaves_the_original(name, kind):
    network = build(name, kind, context_features=CONTEXT, orders=True)
    x, c, index = some_entries(kind), torch.randn(ROWS, CONTEXT, dtype=torch.float64), torch.tensor([3, 3, 0])
    with torch.no_grad():
        cache = network.begin(ROWS, c, c, ORDER)
        for entry in (None, x[:, 0], x[:, 1]):
            network.step(cache, entry)
        fork = cache.select(index)
        other = some_entries(kind, rows=3)
        path = torch.cat([x[index, :2], other[:, 2:]], 1)
        ahead = torch.stack([network.step(fork, path[:, t]) for t in range(2, T - 1)], 1)
        torch.testing.assert_close(ahead, network(path, c[index], ORDER)[:, 3:], rtol=0, atol=1e-11)
        rest = torch.stack([network.step(cache, x[:, t]) for t in range(2, T - 1)], 1)
        torch.testing.assert_close(rest, network(x, c, ORDER)[:, 3:], rtol=0, atol=1e-11)
        assert (cache.position, fork.position) == (T, T)


@every_class
def test_steps_write_into_the_buffers_they_were_given(name):
    network, x = build(name), some_entries("numbers")
    with torch.no_grad():
        cache = network.begin(ROWS, None, x)
        before = [tensor.data_ptr() for tensor in cache.rows]
        network.step(cache, None)
        network.step(cache, x[:, 0])
    assert [tensor.data_ptr() for tensor in cache.rows] == before
    assert all(tensor.shape[0] == ROWS for tensor in cache.rows)


@every_class
def test_buffers_are_floating_also_where_entries_are_tokens(name):
    network, x = build(name, "tokens", torch.float32), some_entries("tokens")
    assert {tensor.dtype for tensor in network.begin(ROWS, None, x).rows} == {torch.float32}


@every_class
def test_a_step_out_of_turn_is_refused(name):
    network, x = build(name), some_entries("numbers")
    with torch.no_grad():
        cache = network.begin(ROWS, None, x)
        with pytest.raises(ValueError, match="got one at position 0; give None at the first"):
            network.step(cache, x[:, 0])
        network.step(cache, None)
        with pytest.raises(ValueError, match="got none at position 1"):
            network.step(cache, None)
        for t in range(T - 1):
            network.step(cache, x[:, t])
        with pytest.raises(ValueError, match="all 6 entries are drawn"):
            network.step(cache, x[:, -1])


# -- transforms -------------------------------------------------------------------------------------------------------


@every_kind
@every_class
def test_a_pass_runs_under_vmap(name, kind):
    network = build(name, kind, context_features=CONTEXT, orders=True)
    x = torch.stack([some_entries(kind) for _ in range(3)])
    c = torch.randn(3, ROWS, CONTEXT, dtype=torch.float64)
    with torch.no_grad():
        loop = torch.stack([network(a, b, ORDER) for a, b in zip(x, c, strict=True)])
        torch.testing.assert_close(torch.vmap(lambda a, b: network(a, b, ORDER))(x, c), loop)


@every_kind
@every_class
def test_steps_run_under_vmap(name, kind):
    network = build(name, kind, context_features=CONTEXT)
    x = torch.stack([some_entries(kind) for _ in range(3)])
    c = torch.randn(3, ROWS, CONTEXT, dtype=torch.float64)
    many = torch.vmap(lambda a, b: steps(network, a, b, like=b))(x, c)
    torch.testing.assert_close(many, torch.stack([network(a, b) for a, b in zip(x, c, strict=True)]))


@every_class
def test_gradients_of_values_and_contexts_under_vmap_and_when_traced(name):
    network = build(name, context_features=CONTEXT)

    def potential(x, c):
        return network(x, c).square().sum()

    x, c = torch.randn(3, 1, T, INPUTS).double(), torch.randn(3, 1, CONTEXT).double()
    slopes = torch.vmap(grad(potential, argnums=(0, 1)))
    u, v = x.clone().requires_grad_(), c.clone().requires_grad_()
    truth = torch.autograd.grad(sum(potential(a, b) for a, b in zip(u, v, strict=True)), (u, v))
    for got in (slopes(x, c), make_fx(slopes)(x, c)(x, c)):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("training", [False, True])
@every_class
def test_the_plain_road_is_the_fused_one(name, training):
    network, x = build(name).train(training), some_entries("numbers")
    with torch.no_grad():
        torch.testing.assert_close(make_fx(network)(x)(x), network(x))
    parameters = dict(network.named_parameters())
    plain = grad(lambda p: functional_call(network, p, (x,)).square().sum())(parameters)
    fused = torch.autograd.grad(network(x).square().sum(), list(parameters.values()))
    for got, truth in zip(plain.values(), fused, strict=True):
        torch.testing.assert_close(got, truth)


@every_class
def test_second_derivatives_with_respect_to_values(name):
    network, x = build(name), some_entries("numbers", rows=1)
    hessian = torch.autograd.functional.hessian(lambda x: network(x).square().sum(), x)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda x: network(x).square().sum())(x))


@every_class
def test_swapped_parameters_are_the_ones_used(name):
    network, other, x = build(name), build(name), some_entries("numbers")
    swapped = functional_call(network, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(swapped, other(x), rtol=0, atol=0)


def test_transformed_knows_where_it_is():
    seen = []
    make_fx(lambda x: seen.append(transformed()) or x + 1)(torch.zeros(2))
    grad(lambda x: seen.append(transformed()) or x.sum())(torch.zeros(2))
    assert seen == [True, True] and not transformed()


# -- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [False, True])
@every_kind
@every_class
def test_the_gradient_reaches_every_parameter(name, kind, orders):
    network = build(name, kind, context_features=CONTEXT, orders=orders)
    x, c = some_entries(kind), torch.randn(ROWS, CONTEXT, dtype=torch.float64)
    (network(x, c) * torch.randn(OUTPUTS, dtype=torch.float64)).square().sum().backward()
    missed = [key for key, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert missed == []


@every_kind
@every_class
def test_copies_and_states_are_the_same_function(name, kind):
    network, x = build(name, kind), some_entries(kind)
    other = CLASSES[name](**KINDS[kind]).double()
    other.load_state_dict(network.state_dict())
    for twin in (other, copy.deepcopy(network)):
        torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in network.parameters()}


@every_class
def test_a_network_starts_where_it_is_told(name):
    network, x = build(name), some_entries("numbers")
    assert network.start_at([1.0, -2.0, 0.5])
    assert network(x).flatten(0, 1).unique(dim=0).tolist() == [[1.0, -2.0, 0.5]]
    fresh = CLASSES[name](inputs=INPUTS)
    assert not bool(fresh(x.float()).any())


def test_a_tied_layer_is_the_embedding_and_stays_so():
    network = Transformer(T, VOCABULARY, vocabulary=VOCABULARY, width=8, layers=1, heads=2, tied=True, bias=False)
    twin = copy.deepcopy(network)
    for tied in (network, twin):
        assert tied.head.weight is tied.entrance.tokens.weight
    assert not network.start_at([0.0] * VOCABULARY)
    check_causal(network, torch.randint(VOCABULARY, (2, T)))


@every_class
def test_dropout_acts_in_training_alone(name):
    network, x = build(name, dropout=0.5), some_entries("numbers")
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    torch.testing.assert_close(steps(network, x, None), network(x))


@every_class
def test_it_learns_a_copying_law(name):
    """Tokens whose law is the entry before: cross entropy falls from log 7 far below what the margins allow."""
    network = (Transformer if name == "transformer" else GRU)(4, 7, vocabulary=7, width=16)
    x = torch.randint(7, (256, 1)).expand(-1, 4)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        loss = functional.cross_entropy(network(x)[:, 1:].flatten(0, 1), x[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give `inputs` for entries that are numbers"),
        ({"inputs": 1, "vocabulary": 2}, "not both"),
        ({"inputs": 0}, "inputs=0: give at least 1"),
        ({"inputs": 1, "context_features": -1}, "context_features=-1"),
    ],
)
@every_class
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CLASSES[name](**arguments)


def test_bad_arguments_of_the_transformer():
    with pytest.raises(ValueError, match="width=10: give a multiple of heads=4"):
        Transformer(T, 2, inputs=1, width=10, heads=4)
    with pytest.raises(ValueError, match="vocabulary == outputs, got 3 and 2"):
        Transformer(T, 2, vocabulary=3, tied=True)


@every_class
def test_bad_shapes(name):
    network, x, c = build(name, context_features=CONTEXT), some_entries("numbers"), torch.zeros(ROWS, CONTEXT).double()
    for arguments, message in [
        ((x[:, 1:], c), "entries: expected (rows, 6, 2), got (5, 5, 2)"),
        ((x, None), "context: got none, but the network has context_features=4"),
        ((x, c[:2]), "context: expected (5, 4), got (2, 4)"),
        ((x, c, ORDER[1:]), "order: expected (6,), got (5,)"),
    ]:
        with pytest.raises(ShapeError, match=re.escape(message)):
            network(*arguments)
    with pytest.raises(ShapeError, match="context: got none"):
        network.begin(ROWS, None, x)


# -- the check --------------------------------------------------------------------------------------------------------


class Broken(CausalNetwork):
    """A fault by name; ``fault="none"`` has none."""

    def __init__(self, fault, kind="numbers", length=T):
        super().__init__(length, 2, **({"inputs": 2} if kind == "numbers" else {"vocabulary": VOCABULARY}))
        self.fault, self.tokens, self.zero = fault, nn.Embedding(VOCABULARY, 2), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2, track_running_stats=False)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, entries, context=None, order=None):
        x = self.tokens(entries) if self.vocabulary else entries
        past = functional.pad(x[:, :-1].cumsum(1), (0, 0, 1, 0))
        return getattr(self, self.fault)(x, past)

    def none(self, x, past):
        return past.tanh()

    def own(self, x, past):
        return past + 1e-3 * x

    def next(self, x, past):
        return past + functional.pad(x[:, 1:], (0, 0, 0, 1))

    def faint(self, x, past):
        return past + 1e-12 * x.mean(1, keepdim=True)

    def last_sees_itself(self, x, past):
        return past + functional.pad(x[:, -1:], (0, 0, past.shape[1] - 1, 0))

    def rounded(self, x, past):
        return past + x.detach().round()

    def hidden(self, x, past):
        return self.zero(x)

    def statistics(self, x, past):
        return self.norm(past.mT).mT

    def other_rows(self, x, past):
        return past - past.mean(0)

    def infinite(self, x, past):
        return past / 0

    def one_output(self, x, past):
        return past[..., :1]

    def shorter(self, x, past):
        return past[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("own", "its output for entry 0 depends on entry 0 >= 0"),
        ("next", "its output for entry 0 depends on entry 1 >= 0"),
        ("last_sees_itself", f"its output for entry {T - 1} depends on entry {T - 1} >= {T - 1}"),
        ("hidden", "its output for entry 0 depends on entry 0 >= 0"),
        ("rounded", "its output for entry 0 depends on entry 0 >= 0"),
        ("statistics", "its output for "),
        ("other_rows", "its output for one row depends on another row"),
        ("infinite", "its output is not finite"),
        ("one_output", "expected (rows, length, outputs) = (5, 6, 2)"),
        ("shorter", "its output has shape (5, 5, 2)"),
    ],
)
def test_the_check_sees_a_fault(fault, message, kind):
    x = 3 * some_entries(kind, torch.float32) if kind == "numbers" else some_entries(kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_causal(Broken(fault, kind), x)


@every_kind
def test_the_check_passes_what_is_right(kind):
    for rows in (1, 2, ROWS):
        check_causal(Broken("none", kind), some_entries(kind, torch.float32, rows))


def test_the_check_sees_by_gradients_what_no_perturbation_shows():
    with pytest.raises(ValueError, match="its output for entry 0 depends on entry 0"):
        check_causal(Broken("faint"), some_entries("numbers"))


@pytest.mark.parametrize("fault", ["own", "last_sees_itself"])
def test_the_check_of_a_long_network_tries_some_places_and_both_ends(fault):
    x = torch.randn(2, 200, 2)
    check_causal(Broken("none", length=200), x)
    with pytest.raises(ValueError, match="depends on entry"):
        check_causal(Broken(fault, length=200), x)


def test_the_check_sees_shared_statistics_of_a_batch_in_training_only_where_they_are_used():
    """Batch normalisation with running statistics is harmless in evaluation mode, which is what is checked."""

    class Normalised(CausalNetwork):
        def __init__(self):
            super().__init__(T, 2, inputs=2)
            self.norm = nn.BatchNorm1d(2)

        def forward(self, entries, context=None, order=None):
            return self.norm(functional.pad(entries[:, :-1], (0, 0, 1, 0)).mT).mT

    check_causal(Normalised(), torch.randn(3, T, 2))


def test_the_check_leaves_no_trace():
    network = build("transformer", dropout=0.5).train()
    network.blocks[0].eval()
    x, before = some_entries("numbers").requires_grad_(), copy.deepcopy(network.state_dict())
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    check_causal(network, x)
    assert torch.equal(state, torch.get_rng_state()) and x.grad is None
    assert modes == [m.training for m in network.modules()]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    with pytest.raises(ValueError):
        check_causal(fault := Broken("own"), some_entries("numbers", torch.float32))
    assert fault.training
