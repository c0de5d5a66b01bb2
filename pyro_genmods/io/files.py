r"""Files that can be mailed: safetensors with versioned JSON in the header, never a pickle.

One file holds everything. Its layout is that of safetensors,

.. math:: \text{length of the header (8 bytes)} \;\|\; \text{header (JSON)} \;\|\; \text{tensors},

and the header's ``__metadata__`` has one entry ``pyro_genmods``, itself JSON: ``schema`` (the version of this format),
``sha256`` (digest of the whole file with these 64 digits set to zero) and ``metadata``. Any
safetensors reader opens it.

The digest finds accidents: a file cut short in transit, a flipped bit. It does not say who wrote the file; that loading
can run no code whoever wrote it is the business of :mod:`pyro_genmods.io.allowlist`.

References:
    Hugging Face, safetensors, https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from ..contract import GenerativeModel
from ..foundation.errors import FileFormatError
from .allowlist import AllowList
from .reader import Reader
from .state import changed_attributes
from .writer import Writer

__all__ = ["describe", "load", "read_tensors", "save", "write_tensors"]

SCHEMA = 1
ENTRY = "pyro_genmods"
_SLOT = rb"\"sha256\":\""
_DIGITS = 64
_MAX_HEADER = 100_000_000  # safetensors' own limit


def save(model: GenerativeModel, path: str | os.PathLike[str]) -> None:
    """Save a model to one file: what it was built from, its state, its flags, and the versions it was made with.

    Frozen parameters, training mode, dtypes and attributes changed after construction are kept; devices are not. The
    description is read back before it is written, so that a file that cannot be loaded is never left behind.

    Arguments:
        model: a model on any device, registered with ``pyro.module`` or not.
        path: the file, usually ``*.safetensors``; replaced atomically if it exists.

    Raises:
        TypeError: not a generative model, or one that holds something that is not data or had a submodule replaced
            after construction; the message names it and the remedy.

    Example:
        >>> import tempfile, zuko
        >>> import pyro_genmods as gm
        >>> path = Path(tempfile.mkdtemp()) / "prior.safetensors"
        >>> model = gm.Flow(zuko.flows.NSF(2)).freeze()
        >>> save(model, path)
        >>> x = torch.zeros(1, 2)
        >>> torch.equal(load(path)().log_prob(x), model().log_prob(x))
        True
    """
    if not isinstance(model, GenerativeModel):
        raise TypeError(
            f"model: got a {type(model).__name__}, needs a generative model; of a module that holds one, save that "
            "attribute, e.g. save(module.prior, path)."
        )
    writer = Writer(model)
    tensors = {key: _dense_copy(key, tensor) for key, tensor in writer.tensors.items()}
    try:
        rebuilt = Reader(tensors, AllowList(list(writer.names.values()))).model(writer.node, {})
    except FileFormatError as error:
        raise TypeError(f"{type(model).__name__} cannot be rebuilt from its description: {error}") from error
    changes = changed_attributes(model, rebuilt)
    metadata = {
        "kind": "model",
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "versions": _versions(),
        "event_shape": list(model.event_shape),
        "context_shape": list(model.context_shape),
        "support": str(model.support),
        "density": model.density.name,
        "dtype": str(model.place[0]).removeprefix("torch."),
        "standardization": _readable(model.coordinates.standardization),
        "context_standardization": _readable(model.context_standardization),
        **_flags(model),
        "changes": {name: {k: writer.value(k, v) for k, v in change.items()} for name, change in changes.items()},
        "model": writer.node,
    }
    write_tensors(path, tensors, metadata)


def load(
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = None,
    allow: Sequence[Callable[..., Any]] = (),
) -> GenerativeModel:
    """Load a model saved by :func:`save`, without running anything that the file brings along.

    A file can name classes of torch's networks, distributions, transforms and constraints, of zuko and of this package;
    of these only the model's own constructor is called. Any other class must be imported by the caller and passed in
    ``allow``. A hostile file can still be wrong, slow or large.

    Arguments:
        path: the file.
        map_location: device of the model; default the CPU, wherever it lived when it was saved.
        allow: classes and functions outside this package, torch and zuko that the file may use.

    Returns:
        The model, in the mode it was saved in; its log densities are the same, bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is not ours, not a model, truncated, altered or newer, or uses a name outside the
            allow-list.

    Example:
        >>> import tempfile, zuko
        >>> import pyro_genmods as gm
        >>> path = Path(tempfile.mkdtemp()) / "prior.safetensors"
        >>> save(gm.Flow(zuko.flows.MAF(3, context=1)).double(), path)
        >>> model = load(path, map_location="cpu")
        >>> model.place, model.context_shape
        ((torch.float64, device(type='cpu')), torch.Size([1]))
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("kind") != "model":
        raise FileFormatError(f"{path}: holds no model but {str(metadata.get('kind'))[:80]!r}; load a file of gm.save.")
    try:
        model = Reader(tensors, AllowList(allow)).model(metadata.get("model"), metadata.get("changes"))
        if not isinstance(model, GenerativeModel):
            raise FileFormatError(f"a {type(model).__name__} is not a generative model.")
        _set_flags(model, metadata)
    except FileFormatError as error:
        raise FileFormatError(
            f"{path}: {error} (The file was saved with {str(metadata.get('versions'))[:200]}.)"
        ) from error
    return model.to(torch.device("cpu" if map_location is None else map_location))


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says about itself, without building anything: class, versions, shapes, support, units, description.

    ``python -c "import pyro_genmods.io as io; print(io.describe('prior.safetensors'))"`` prints it.

    Arguments:
        path: a file of :func:`save` or :func:`write_tensors`.

    Returns:
        The metadata of the file, and its ``schema``.

    Raises:
        FileNotFoundError, FileFormatError: as :func:`read_tensors`.

    Example:
        >>> import tempfile, zuko
        >>> import pyro_genmods as gm
        >>> path = Path(tempfile.mkdtemp()) / "prior.safetensors"
        >>> save(gm.Flow(zuko.flows.MAF(3)), path)
        >>> found = describe(path)
        >>> found["class"], found["event_shape"], found["density"], found["dtype"]
        ('pyro_genmods.transform.flow.Flow', [3], 'EXACT', 'float32')
    """
    _, envelope = _read_envelope(Path(path))
    return {"schema": envelope["schema"], **envelope["metadata"]}


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON to one file, atomically: a reader sees the old file or the new one, never half of one.

    The bytes depend on the arguments alone. Tensors are written as contiguous copies, so shared and expanded ones are
    welcome; device and ``requires_grad`` are not kept.

    Arguments:
        path: the file; missing folders are made, an existing file is replaced.
        tensors: dense tensors by name.
        metadata: anything that ``json.dumps`` takes.

    Raises:
        TypeError: the metadata is not JSON, or a tensor has a layout or dtype that safetensors does not know.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "state.safetensors"
        >>> write_tensors(path, {"x": torch.arange(3.0)}, {"epoch": 4})
        >>> tensors, metadata = read_tensors(path)
        >>> tensors["x"], metadata["epoch"]
        (tensor([0., 1., 2.]), 4)
    """
    envelope = {"schema": SCHEMA, "sha256": "0" * _DIGITS, "metadata": metadata}
    entry = json.dumps(envelope, separators=(",", ":"))
    if "__metadata__" in tensors:
        raise TypeError("tensors: '__metadata__' is a name that safetensors keeps for itself; take another.")
    copies = {name: _dense_copy(name, tensor) for name, tensor in tensors.items()}
    try:
        data = bytearray(safetensors.save(copies, metadata={ENTRY: entry}))
    except (SafetensorError, KeyError, ValueError) as error:
        raise TypeError(
            f"tensors: safetensors cannot hold them ({error}); convert them to a dtype it knows."
        ) from error
    slot = _digest_slot(data)
    data[slot] = hashlib.sha256(data).hexdigest().encode()
    _replace_file(Path(os.path.realpath(path)), data)


def read_tensors(
    path: str | os.PathLike[str], map_location: str | torch.device | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by :func:`write_tensors`.

    Arguments:
        path: the file.
        map_location: device of the tensors; default the CPU, wherever they lived when they were saved.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is not ours, is truncated or altered, or is of a newer schema.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "text.safetensors"
        >>> _ = path.write_text("a text file")
        >>> read_tensors(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pyro_genmods.foundation.errors.FileFormatError: ...: not a safetensors file, or cut off at its start; ...
    """
    data, envelope = _read_envelope(Path(path))
    try:
        tensors = safetensors.load(data)
    except (SafetensorError, KeyError, ValueError, AssertionError) as error:
        raise FileFormatError(f"{path}: its tensors cannot be read ({error}); get the file again.") from error
    device = torch.device("cpu" if map_location is None else map_location)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, envelope["metadata"]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("pyro-genmods", "torch", "pyro-ppl", "zuko", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            versions[package] = "unknown"
    return versions


def _readable(standardization: nn.Module | None) -> dict[str, list[float]] | None:
    if standardization is None:
        return None
    return {"mean": standardization.shift.tolist(), "scale": standardization.scale.tolist()}


def _flags(model: nn.Module) -> dict[str, Any]:
    """Training mode and frozen parameters; modules in another mode than the model are listed."""
    return {
        "training": model.training,
        "other_mode": [name for name, module in model.named_modules() if module.training != model.training],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }


def _set_flags(model: nn.Module, metadata: dict[str, Any]) -> None:
    training, other, frozen = (metadata.get(key) for key in ("training", "other_mode", "frozen"))
    if not (isinstance(training, bool) and isinstance(other, list) and isinstance(frozen, list)):
        raise FileFormatError("the flags of the model are missing.")
    for name, module in model.named_modules():
        module.training = training != (name in other)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and (parameter.is_floating_point() or parameter.is_complex()))


def _dense_copy(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"tensors[{name!r}]: got a {tensor.layout} tensor on {tensor.device}; make it dense first.")
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _digest_slot(data: bytes | bytearray) -> slice:
    start = data.index(_SLOT) + len(_SLOT)
    return slice(start, start + _DIGITS)


def _replace_file(path: Path, data: bytes | bytearray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every platform can open a folder; the file itself is on disk by now
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_envelope(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file and its checked ``pyro_genmods`` entry."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or length > _MAX_HEADER or data[8:9] != b"{":
        raise FileFormatError(f"{path}: not a safetensors file, or cut off at its start; save models with gm.save.")
    if len(data) < 8 + length:
        raise FileFormatError(f"{path}: truncated, {len(data)} bytes of a header of {length}; get the file again.")
    envelope = _parse(path, data[8 : 8 + length])
    schema = envelope.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise FileFormatError(
            f"{path}: schema {schema} is newer than this version of pyro_genmods, which reads up to {SCHEMA}; "
            "upgrade pyro_genmods."
        )
    slot = _digest_slot(data)
    blank = bytearray(data)
    blank[slot] = b"0" * _DIGITS
    if schema != SCHEMA or hashlib.sha256(blank).hexdigest().encode() != data[slot]:
        raise FileFormatError(f"{path}: its digest does not match, it was truncated or altered; get the file again.")
    if not isinstance(envelope.get("metadata"), dict):
        raise FileFormatError(f"{path}: its metadata is not a JSON object; save it with this package.")
    return data, envelope


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    try:
        envelope = json.loads(json.loads(header)["__metadata__"][ENTRY])
        if not isinstance(envelope, dict) or _SLOT not in header:
            raise TypeError("no envelope")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: a safetensors header without a readable {ENTRY!r} entry; the file was not written by "
            "pyro_genmods, or it is damaged."
        ) from error
    return envelope
