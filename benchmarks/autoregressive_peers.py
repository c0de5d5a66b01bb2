"""Sampling from the transformer of GPT-2, ours against Hugging Face's, with the same weights.

    pip install transformers
    python benchmarks/autoregressive_peers.py [--rows 16] [--tokens 128] [--threads 1] [--repeats 3] [--parts]

The shape is that of GPT-2 small (124 million parameters) with random weights: nothing is downloaded, and the time does
not depend on them. First the logits of both must agree at every place, in one pass and by steps from the cache. Then
both draw `tokens` new tokens for `rows` sequences that begin with token 50256, from the whole vocabulary, in turns in
one process. Hugging Face's is `generate(do_sample=True, use_cache=True, top_k=0)` without an end token, so that neither
stops early; ours is a loop of `step` and an inverse distribution function. `--parts` times what one of our steps is
made of.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_genmods.foundation.transformer import Transformer

BEGIN = 50256


def peer() -> nn.Module | None:
    """Hugging Face's model, or nothing where it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    return GPT2LMHeadModel(GPT2Config()).eval()


@torch.no_grad()
def copied(theirs: nn.Module, tokens: int) -> Transformer:
    """Our transformer with their weights, for sequences of ``tokens`` after the begin token."""
    c = theirs.config
    ours = Transformer(
        tokens,
        c.vocab_size,
        vocabulary=c.vocab_size,
        width=c.n_embd,
        layers=c.n_layer,
        heads=c.n_head,
        tied=True,
        bias=False,
    ).eval()
    body = theirs.transformer
    ours.entrance.tokens.weight.copy_(body.wte.weight)
    ours.entrance.first.copy_(body.wte.weight[BEGIN])
    ours.entrance.place.copy_(body.wpe.weight[:tokens])
    ours.norm.load_state_dict(body.ln_f.state_dict())
    for block, h in zip(ours.blocks, body.h, strict=True):
        block.norm_attention.load_state_dict(h.ln_1.state_dict())
        block.norm_network.load_state_dict(h.ln_2.state_dict())
        pairs = [(block.collect, h.attn.c_attn), (block.mix, h.attn.c_proj)]
        for linear, conv in [*pairs, (block.up, h.mlp.c_fc), (block.down, h.mlp.c_proj)]:
            linear.weight.copy_(conv.weight.T)
            linear.bias.copy_(conv.bias)
    return ours


@torch.inference_mode()
def drawn(network: Transformer, rows: int) -> Tensor:
    """Tokens ``(rows, T)``: at each place the first whose distribution function exceeds a uniform number."""
    like = network.entrance.place
    tokens = torch.empty(rows, network.length, dtype=torch.int64, device=like.device)
    uniform = torch.rand(network.length, rows, 1, dtype=like.dtype, device=like.device)
    cache, entry = network.begin(rows, None, like), None
    for t in range(network.length):
        entry = token(network.step(cache, entry), uniform[t])
        tokens[:, t] = entry
    return tokens


def token(logits: Tensor, uniform: Tensor) -> Tensor:
    """The categorical law's inverse distribution function at ``uniform``, by row."""
    total = logits.softmax(-1).cumsum(-1)
    found = torch.searchsorted(total, uniform * total[:, -1:], right=True).squeeze(-1)
    return found.clamp_(max=logits.shape[-1] - 1)


def generated(theirs: nn.Module, rows: int, tokens: int) -> Tensor:
    begin = torch.full((rows, 1), BEGIN)
    options = {"do_sample": True, "use_cache": True, "top_k": 0, "eos_token_id": None, "pad_token_id": BEGIN}
    out = theirs.generate(begin, attention_mask=torch.ones_like(begin), max_new_tokens=tokens, **options)
    return out[:, 1:]


@torch.inference_mode()
def check(theirs: nn.Module, ours: Transformer) -> tuple[float, float]:
    """Largest difference of the logits: of a pass, and of steps from the cache."""
    x = torch.randint(ours.vocabulary, (2, ours.length))
    truth = theirs(functional.pad(x[:, :-1], (1, 0), value=BEGIN)).logits
    cache = ours.begin(2, None, ours.entrance.place)
    stepped = torch.stack([ours.step(cache, entry) for entry in (None, *x[:, :-1].unbind(1))], 1)
    differences = [float((logits - truth).abs().max()) for logits in (ours(x), stepped)]
    assert max(differences) < 1e-3, differences
    return differences[0], differences[1]


def taken(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor, which count less of what else the machine does."""
    start, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - used


def report(times: dict[str, list[tuple[float, float]]], what: str) -> None:
    for i, clock in enumerate(("clock", "processor")):
        medians = {name: statistics.median(pair[i] for pair in pairs) for name, pairs in times.items()}
        for name, pairs in times.items():
            print(f"{clock:>10} {name:>7}: median {medians[name]:.2f} s of {[round(pair[i], 2) for pair in pairs]}")
        print(f"{what}, {clock}: theirs / ours = {medians['theirs'] / medians['ours']:.2f}")


@torch.inference_mode()
def parts(network: Transformer, rows: int) -> dict[str, float]:
    """Milliseconds of what a step half way is made of."""
    block, width, half = network.blocks[0], network.norm.normalized_shape[0], network.length // 2
    cache = network.begin(rows, None, network.entrance.place)
    h, hidden = torch.randn(rows, width), torch.randn(rows, block.up.out_features)
    q = torch.randn(rows, network.heads, 1, width // network.heads)
    logits, uniform = network.head(h), torch.rand(rows, 1)

    keys, values = cache.rows[0][:, :, :half], cache.rows[1][:, :, :half]
    runs = {
        "weights of the blocks": lambda: [(b.collect(h), b.mix(h), b.up(h), b.down(hidden)) for b in network.blocks],
        "attention": lambda: [functional.scaled_dot_product_attention(q, keys, values) for _ in network.blocks],
        "norms": lambda: [(b.norm_attention(h), b.norm_network(h)) for b in network.blocks],
        "gelu": lambda: [functional.gelu(hidden, approximate="tanh") for _ in network.blocks],
        "logits": lambda: network.head(h),
        "draw": lambda: token(logits, uniform),
    }
    return {name: 1e3 * statistics.median(taken(run)[0] for _ in range(9)) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    theirs = peer()
    if theirs is None:
        print("transformers is not installed: pip install transformers")
        return
    ours, rows, tokens = copied(theirs, arguments.tokens), arguments.rows, arguments.tokens
    print("largest difference of logits: pass {:.1e}, steps {:.1e}".format(*check(theirs, ours)))
    drawn(ours, rows), generated(theirs, rows, min(tokens, 4))
    runs = {"theirs": lambda: generated(theirs, rows, tokens), "ours": lambda: drawn(ours, rows)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            times[name].append(taken(run))
    report(times, f"{rows} rows, {tokens} tokens, {torch.get_num_threads()} threads")
    if arguments.parts:
        for name, value in parts(ours, rows).items():
            print(f"{name:>24}: {value:.1f} ms")


if __name__ == "__main__":
    main()
