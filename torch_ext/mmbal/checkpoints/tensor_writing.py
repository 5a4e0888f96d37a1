"""Writing files of tensors from pieces, so that a file larger than memory can be made, and never half a file.

The libraries' own functions take all tensors at once (safetensors.torch.save_file, torch.save); here one piece is in
memory at a time. A file gets its name only when it is complete and has reached the disk (:mod:`mmbal.files`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from mmbal.checkpoints.tensor_types import SAFETENSORS_NAMES, check_shape
from mmbal.checkpoints.torch_writing import TorchZip
from mmbal.checkpoints.untrusted import TEXT_LIMIT, RefusedError, shown
from mmbal.files import replacing

Progress = Callable[[int], object]


class Entry(NamedTuple):
    """A tensor to write. ``make()`` gives pieces of its dtype whose flattened elements follow each other.

    It is called once, when the tensor's turn comes: entries are made in the order given, whatever their order in the
    file. Pieces may be on any device and need not be contiguous.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Iterable[Tensor]]


def write_safetensors(
    path, entries: Iterable[Entry], metadata: dict[str, str] | None = None, progress=None, create=None
) -> None:
    """Writes the bytes that safetensors.torch.save_file writes for the same tensors and ``metadata``.

    (Its order of several metadata is random; here they are sorted.) ``progress`` is called with the number of bytes
    of each piece written, as tqdm's update is. ``create`` : of :func:`mmbal.files.replacing`, where other files get
    their names together with this one.
    """
    path = Path(path)
    entries = _checked(entries, "write_safetensors")
    header = _header(entries, metadata, "write_safetensors")
    with nullcontext(create) if create else replacing() as create, create(path) as file:
        _write_safetensors(file, entries, *header, progress)


def write_torch(path, entries: Iterable[Entry], progress=None, create=None) -> None:
    """Writes what torch.save writes for an OrderedDict of the tensors, each with a storage of its own.

    torch.load reads it, with weights_only and mmap too. The archive is put together by hand: torch.save needs whole
    tensors. ``progress`` and ``create`` are as in :func:`write_safetensors`.
    """
    path = Path(path)
    entries = _checked(entries, "write_torch")
    tensors = [(entry.name, entry.shape, entry.dtype) for entry in entries]
    with (
        nullcontext(create) if create else replacing() as create,
        create(path) as file,
        TorchZip(file, tensors) as archive,
    ):
        for index, entry in enumerate(entries):
            with archive.storage(index) as storage:
                _write_pieces(storage, entry, progress)


def write_sharded_safetensors(
    folder, entries: Iterable[Entry], max_shard_bytes: int, metadata: dict[str, str] | None = None, progress=None
) -> Path:
    """Writes model-00001-of-0000N.safetensors and model.safetensors.index.json as transformers names them.

    Shards are filled in the order of ``entries`` and have at most ``max_shard_bytes`` bytes of tensors, except for
    single tensors that are larger. What fits into one shard becomes model.safetensors, without an index. Returns the
    index or that file. The files get their names at the end, the index last; other weights in the folder are refused,
    as they would be taken for part of these.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError(f"write_sharded_safetensors: max_shard_bytes must be positive, got {shown(max_shard_bytes)}")
    folder = Path(folder)
    entries = _checked(entries, "write_sharded_safetensors")
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        nbytes = check_shape(entry.shape, entry.dtype)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index_name = "model.safetensors.index.json"
    if len(shards) == 1:
        names = ["model.safetensors"]
    ours = {*names, index_name} if len(shards) > 1 else set(names)
    others = sorted({f.name for f in folder.glob("model*.safetensors*")} - ours)
    if others:
        raise ValueError(f"{folder} must not hold other weights, got {shown(others[0])}")
    headers = [_header(shard, metadata, "write_sharded_safetensors") for shard in shards]
    with replacing() as create:
        for name, shard, header in zip(names, shards, headers, strict=True):
            with create(folder / name) as file:
                _write_safetensors(file, shard, *header, progress)
        if len(shards) == 1:
            return folder / names[0]
        size = sum(check_shape(entry.shape, entry.dtype) for entry in entries)
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        with create(folder / index_name) as file:
            file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return folder / index_name


def _checked(entries: Iterable[Entry], operation: str) -> list[Entry]:
    result, names = [], set()
    for name, shape, dtype, make in entries:
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise ValueError(f"{operation}: a tensor's name must be a string and not __metadata__, got {shown(name)}")
        if name in names:
            raise ValueError(f"{operation}: names must differ, got {shown(name)} twice")
        if dtype not in SAFETENSORS_NAMES:
            raise ValueError(f"{operation}: {shown(name)} must have a dtype that the format has, got {dtype}")
        shape = tuple(shape)
        try:
            check_shape(shape, dtype)
        except RefusedError as error:
            raise ValueError(f"{operation}: {shown(name)} {error}") from None
        names.add(name)
        result.append(Entry(str(name), shape, dtype, make))
    return result


def _header(entries: Sequence[Entry], metadata, operation: str) -> tuple[bytes, dict[str, int]]:
    """The header and the position in the file of each tensor: larger elements first, so that all are aligned."""
    header: dict = {}
    if metadata:
        if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
            raise ValueError(f"{operation}: metadata must be of strings")
        header["__metadata__"] = dict(sorted(metadata.items()))
    positions, end = {}, 0
    for entry in sorted(entries, key=lambda entry: (-_rank(entry.dtype), entry.name)):
        start, end = end, end + check_shape(entry.shape, entry.dtype)
        positions[entry.name] = start
        about = {"dtype": SAFETENSORS_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        header[entry.name] = about
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{operation}: names and metadata must be valid Unicode") from None
    text += b" " * (-len(text) % 8)
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"{operation}: names and metadata must take at most {TEXT_LIMIT} bytes, got {len(text)}")
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + position for name, position in positions.items()}


# The library's order of types in a file, from the last to the first.
_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"),
    *("I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32"),
    *("C64", "F64", "I64", "U64"),
)


def _rank(dtype: torch.dtype) -> int:
    return _ORDER.index(SAFETENSORS_NAMES[dtype])


def _write_safetensors(file: BinaryIO, entries, header: bytes, positions: dict[str, int], progress) -> None:
    file.write(header)
    for entry in entries:
        file.seek(positions[entry.name])
        _write_pieces(file, entry, progress)


def _write_pieces(file, entry: Entry, progress: Progress | None) -> None:
    left = check_shape(entry.shape, entry.dtype)
    for piece in entry.make():
        if not isinstance(piece, Tensor) or piece.dtype != entry.dtype or piece.layout != torch.strided:
            got = piece.dtype if isinstance(piece, Tensor) else type(piece).__name__
            raise ValueError(f"{shown(entry.name)}: a piece must be a dense tensor of {entry.dtype}, got {got}")
        nbytes = piece.numel() * piece.element_size()
        left -= nbytes
        if left < 0:
            break
        if nbytes:
            file.write(_bytes(piece))
        del piece  # or two would be in memory while the next one is made
        if progress is not None:
            progress(nbytes)
    if left:
        word = "more" if left < 0 else f"{left} bytes less"
        raise ValueError(f"{shown(entry.name)}: the pieces must fill {list(entry.shape)}, got {word}")


def _bytes(piece: Tensor) -> memoryview:
    flat = piece.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())
