"""What inference left behind: draws, statistics of the sampler, and the program that they belong to.

There are five kinds: chains of ``pyro_genmods.infer.MCMC`` and of ``pyro.infer.MCMC``, a variational guide, the mixing
report of an energy, and plain draws. They are told apart by what they can do, not by their class, so that other
people's samplers are welcome: chains have ``get_samples`` and a ``kernel``, a guide can be called, a report has
``draws`` with ``sample_stats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..foundation.errors import ShapeError
from .program import Program

__all__ = ["Inference", "read_source"]

Model = Callable[..., Any]


@dataclass(frozen=True)
class Inference:
    """Draws and what is known of them.

    Attributes:
        draws: by site, ``(chains, draws, *shape)``.
        model: the program, or ``None``.
        args, kwargs: its arguments.
        stats: statistics of every draw by their ArviZ names, ``(chains, draws)``.
        attrs: what is known of the run as a whole.
        minibatches: indices of the subsampling plates at which the draws were made.
        constants: what has no chains and draws, by group and name.
        weighted: the draws are of a proposal, whose log density is ``stats["log_q"]``.
    """

    draws: dict[str, Tensor]
    model: Model | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stats: dict[str, Tensor] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    minibatches: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weighted: bool = False


def read_source(
    source: Any, model: Model | None, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, num_samples: int,
    group_by_chain: bool,
) -> Inference:  # fmt: skip
    """Draws of a source; see :func:`to_inference_data` for the arguments and errors."""
    if not isinstance(args, tuple):
        raise TypeError(f"args: got {type(args).__name__}, needs a tuple of the model's arguments, such as (data,).")
    if isinstance(source, Mapping):
        return Inference(_tensors(source, group_by_chain), model, args, dict(kwargs or {}))
    if hasattr(source, "get_samples") and hasattr(source, "kernel"):
        return _from_chains(source, model, args, kwargs)
    if hasattr(source, "draws") and hasattr(source, "sample_stats"):
        return _from_report(source, model)
    if callable(source):
        return _from_guide(source, model, args, dict(kwargs or {}), num_samples)
    raise TypeError(
        f"source: got {type(source).__name__}, needs an MCMC that has run, a guide, a mixing report of an energy, or a "
        "dict of draws by site."
    )


def _from_chains(
    source: Any, model: Model | None, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Inference:
    try:
        draws = dict(source.get_samples(group_by_chain=True))
    except (AttributeError, TypeError) as error:
        raise ValueError("source: this MCMC has no draws; call its run(*args) first.") from error
    if not args and kwargs is None:
        args, kwargs = tuple(getattr(source, "_args", None) or ()), getattr(source, "_kwargs", None)
    draws = _tensors(draws)
    superchains = getattr(source, "superchains", None)
    attrs = {} if superchains is None else {"superchains": int(superchains)}
    stats = getattr(source, "sample_stats", None)
    if stats is None:
        stats, attrs = _stats_of_pyro(source, *next(iter(draws.values())).shape[:2])
    stats = {name: torch.as_tensor(x) for name, x in stats.items()}
    return Inference(draws, model or getattr(source.kernel, "model", None), args, dict(kwargs or {}), stats, attrs)


def _stats_of_pyro(source: Any, chains: int, draws: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Divergences, the one statistic of single draws that Pyro keeps, and the acceptance rate of each chain."""
    found = source.diagnostics()
    names = [f"chain {chain}" for chain in range(chains)]
    stats, attrs = {}, {}
    if "divergences" in found:
        stats["diverging"] = torch.zeros(chains, draws, dtype=torch.bool)
        for chain, name in enumerate(names):
            stats["diverging"][chain, list(found["divergences"][name])] = True
    if "acceptance rate" in found:
        attrs["acceptance_rate"] = [float(found["acceptance rate"][name]) for name in names]
    return stats, attrs


def _from_report(report: Any, model: Model | None) -> Inference:
    if model is not None:
        raise ValueError(
            "model: got one with a mixing report, whose draws are of a law and of no program; leave it out."
        )
    energies = dict(report.energies)
    constants = {"constant_data": {"short_energy": energies["short"]}}
    if report.occupancy is not None:
        constants["constant_data"] |= {"modes": report.modes, "occupancy": report.occupancy}
    if "data" in energies:
        constants["observed_data"] = {"energy": energies["data"]}
    draws, stats = _tensors({"x": report.draws}), dict(report.sample_stats)
    return Inference(draws, None, (), {}, stats, dict(report.attrs), constants=constants)


def _from_guide(
    guide: Model, model: Model | None, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int
) -> Inference:
    if model is None:
        raise ValueError("model: got None with a guide as the source, needs the model that the guide belongs to.")
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}, needs at least one draw.")
    program = Program(guide, args, kwargs)
    outcome = program.draw(num_samples)
    sites = [program.sites[name] for name in program.names("latent", "deterministic")]
    draws = _tensors({site.name: outcome.values[site.name].to(site.value.device)[None] for site in sites})
    stats = {"log_q": outcome.total[None]}
    return Inference(draws, model, args, kwargs, stats, {}, program.minibatches, weighted=True)


def _tensors(draws: Mapping[str, Any], group_by_chain: bool = True) -> dict[str, Tensor]:
    """Draws as tensors ``(chains, draws, *shape)``."""
    if not draws:
        raise ValueError("source: it has no draws of any site.")
    tensors = {}
    for name, x in draws.items():
        if not isinstance(x, Tensor | np.ndarray):
            raise TypeError(f"source: got {type(x).__name__} at {name!r}, needs a tensor of draws.")
        tensors[name] = torch.as_tensor(x).detach() if group_by_chain else torch.as_tensor(x).detach()[None]
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    first = next(iter(shapes.values()))[:2]
    if len(first) < 2 or 0 in first or any(shape[:2] != first for shape in shapes.values()):
        raise ShapeError(
            f"source: got draws of shapes {shapes}, needs (chains, draws, *shape) with the same chains and draws at "
            "all sites; draws of one chain, (draws, *shape), are read with group_by_chain=False."
        )
    return tensors
