"""Files of tensors of every usual kind, read lazily, tensor by tensor, and without trusting them.

Nothing in a file is executed (TorchScript, which has to be allowed, is compiled). Whatever is wrong with it (another
format, truncated, corrupted, made to do harm) raises ValueError with its path. Opening takes memory for the list of
tensors only, which is bounded (headers and indices of 16 MiB, pickles of 64 MiB and two million operations), and a
tensor lies in a map of the file. A file must not be truncated or written to while it is used; replacing it by another
one is harmless.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmbal.checkpoints.tensor_types import SAFETENSORS_NAMES, SUPPORTED, check_shape
from mmbal.checkpoints.torch_archives import (
    Stored,
    archive_records,
    is_torchscript,
    map_file,
    place,
    read_legacy,
    read_zip,
    state_dict,
)
from mmbal.checkpoints.untrusted import MEBIBYTE, TEXT_LIMIT, RefusedError, open_regular, read_json, shortened, shown

__all__ = ["WEIGHTS_NAMES", "TensorFiles", "find_weights", "open_tensors", "read_json"]

# In the order in which they are looked for: transformers' names, then open_clip's.
WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_HEADER_LIMIT = 100_000_000  # of the safetensors library; ours is TEXT_LIMIT
_COMPRESSED_LIMIT = 64 * MEBIBYTE  # of a TorchScript archive: its code, not its tensors


class TensorFiles(Mapping):
    """Tensors by name in a file or in the shards of an index.

    ``kind`` is "safetensors", "torch" or "torchscript"; ``metadata`` is what a safetensors header holds beside tensors
    (of shards: of all of them, the first one's where they disagree); ``wrapped`` says that the tensors were found
    under "state_dict" or "model" in a training checkpoint. ``files[name]`` must not be written to: it lies in a
    private map of the file (TorchScript: in memory). A tensor stays valid after :meth:`close`.
    """

    def __init__(self, path: Path, kind: str, stored: dict[str, Stored], metadata: dict[str, str], wrapped: bool):
        self.path = path
        self.kind = kind
        self.metadata = metadata
        self.wrapped = wrapped
        self._stored: dict[str, Stored] | None = stored

    def _tensors(self) -> dict[str, Stored]:
        if self._stored is None:
            raise ValueError(f"{self.path} was closed")
        return self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor, as :meth:`dtype`."""
        return self._tensors()[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors()[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors()[name]
        try:
            tensor = stored.read()
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {shown(name)} cannot be read: {shortened(error)}") from None
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise ValueError(f"{self.path}: {shown(name)} is not what the header says; was the file replaced?")
        return tensor

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return name in self._tensors()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())

    def __repr__(self) -> str:
        count = "closed" if self._stored is None else f"{len(self._stored)} tensors"
        return f"TensorFiles({str(self.path)!r}, {self.kind}, {count})"

    def close(self) -> None:
        self._stored = None

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def find_weights(folder) -> Path:
    """The file or index of weights in ``folder``: the first of ``WEIGHTS_NAMES`` that is there."""
    folder = Path(folder)
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} must be a folder with one of {', '.join(WEIGHTS_NAMES)}")


def open_tensors(path, allow_jit: bool = False) -> TensorFiles:
    """Opens a file of tensors, the index of a sharded one, or the weights in a folder (:func:`find_weights`).

    What a file is follows from its content, not from its name:

    - safetensors, or an index of such shards: read by the safetensors library; the header may have 16 MiB;
    - torch.save's file, or an index of such shards: a dict of dense tensors, or a training checkpoint with one under
      "state_dict" or "model", whose other entries are ignored. Its pickle is read as a description: it may name only
      what torch.load(weights_only=True) allows, and nothing that it names is called. Files of torch before 1.6 (no zip
      archives) are mapped too, though a tensor that is not aligned in the file is copied when it is read;
    - a TorchScript archive, such as OpenAI's: only with ``allow_jit``. Its code is compiled, not executed, by
      torch.jit.load, which is not made for hostile files, and all of it is read into memory.

    The prefixes "module." and "_orig_mod." are removed where all names have them.
    """
    path = Path(path)
    try:
        if os.path.isdir(path):  # which is False where Path.is_dir raises
            path = find_weights(path)
        kind, stored, metadata, wrapped = _open(path, allow_jit)
    except RefusedError as error:
        raise ValueError(f"{path} {error}") from None
    return TensorFiles(path, kind, _without_prefixes(stored), metadata, wrapped)


def _open(path: Path, allow_jit: bool, shard: bool = False) -> tuple[str, dict[str, Stored], dict[str, str], bool]:
    with open_regular(path) as file:
        head = file.read(64)
        if not head:
            raise RefusedError("is empty; it must be a file of tensors")
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_LIMIT:
            return "safetensors", *_open_safetensors(path, int.from_bytes(head[:8], "little")), False
        if head.startswith(b"PK\3\4") or head.startswith(b"\x80"):
            return _open_torch(path, file, head.startswith(b"PK"), allow_jit and not shard)
    if head.lstrip().startswith(b"{") and not shard:
        return _open_index(path)
    raise RefusedError("must be a safetensors file, a file of torch.save or an index of shards, got something else")


def _open_safetensors(path: Path, header: int) -> tuple[dict[str, Stored], dict[str, str]]:
    if header > TEXT_LIMIT:
        raise RefusedError(f"must have a safetensors header of at most {TEXT_LIMIT} bytes, got {header}")
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        names, metadata = list(handle.keys()), dict(handle.metadata() or {})
        slices = {name: handle.get_slice(name) for name in names}
        about = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise RefusedError(f"cannot be read as safetensors: {shortened(error)}") from None
    stored = {}
    for name, (shape, dtype) in about.items():
        if dtype not in _DTYPES:
            raise RefusedError(f"has {shown(name)} of type {shown(dtype)}; read are {', '.join(_DTYPES)}")
        check_shape(shape, _DTYPES[dtype])
        stored[name] = Stored(shape, _DTYPES[dtype], lambda name=name: handle.get_tensor(name))
    return stored, metadata


def _open_torch(path: Path, file: io.BufferedReader, zipped: bool, allow_jit: bool):
    try:
        buffer, whole = map_file(file)
    except (OSError, ValueError) as error:
        raise RefusedError(f"cannot be mapped: {shortened(error)}") from None
    if zipped:
        records = archive_records(buffer)
        if is_torchscript(records):
            if not allow_jit:
                raise RefusedError(
                    "is a TorchScript archive, such as OpenAI's: it holds code, which torch.jit.load compiles. "
                    "If you trust where it comes from, allow it with allow_jit=True (--allow-jit)"
                )
            if sum(max(r.size, r.packed) for r in records.values() if not r.is_stored) > _COMPRESSED_LIMIT:
                raise RefusedError(f"must have at most {_COMPRESSED_LIMIT} bytes in compressed entries, got more")
            return "torchscript", _read_torchscript(path), {}, False
        top, regions = read_zip(buffer, records)
    else:
        top, regions = read_legacy(buffer)
    tensors, wrapped = state_dict(top)
    return "torch", {name: place(dense, regions, whole) for name, dense in tensors.items()}, {}, wrapped


def _read_torchscript(path: Path) -> dict[str, Stored]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit as such
            tensors = torch.jit.load(str(path), map_location="cpu").state_dict()
    except Exception as error:  # whatever its compiler raises
        raise RefusedError(f"cannot be read as TorchScript: {shortened(error)}") from None
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in SUPPORTED:
            raise RefusedError(f"must hold dense tensors only, got {tensor.layout} of {tensor.dtype} for {shown(name)}")
        stored[name] = Stored(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
    return stored


def _open_index(path: Path) -> tuple[str, dict[str, Stored], dict[str, str], bool]:
    try:
        shard_of = read_json(path).get("weight_map")
    except ValueError as error:
        raise RefusedError(str(error).removeprefix(f"{path} ")) from None
    if not isinstance(shard_of, dict) or not shard_of:
        raise RefusedError("must be an index of shards with a weight_map from tensors to files, got JSON without one")
    names_in: dict[str, set[str]] = {}
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or not shard.isprintable():
            raise RefusedError(f"must name shards beside it, got {shown(shard)} for {shown(name)}")
        names_in.setdefault(shard, set()).add(name)
    kinds: set[str] = set()
    wrapped = False
    stored: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for shard, names in names_in.items():
        try:
            kind, tensors, about, inside = _open(path.with_name(shard), allow_jit=False, shard=True)
        except RefusedError as error:
            raise RefusedError(f"has the shard {shown(shard)}, which {error}") from None
        for few, text in ((names - tensors.keys(), "must hold"), (tensors.keys() - names, "must not hold")):
            if few:
                raise RefusedError(
                    f"has the shard {shown(shard)}, which {text} {shown(min(few))} according to the index"
                )
        kinds.add(kind)
        if len(kinds) > 1:
            raise RefusedError("must name shards of one kind, got safetensors and torch files")
        wrapped |= inside
        stored |= tensors
        metadata = about | metadata
    return kinds.pop(), {name: stored[name] for name in shard_of}, metadata, wrapped


def _without_prefixes(stored: dict[str, Stored]) -> dict[str, Stored]:
    found = True
    while found and stored:
        found = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) and name != prefix for name in stored):
                stored = {name.removeprefix(prefix): value for name, value in stored.items()}
                found = True
    return stored
