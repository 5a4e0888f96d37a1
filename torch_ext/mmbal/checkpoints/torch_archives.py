"""torch.save's two layouts, zip archives and the older run of pickles, as tensors that lie in a map of the file."""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmbal.checkpoints.tensor_types import check_shape
from mmbal.checkpoints.torch_pickles import PICKLE_LIMIT, Dense, Foreign, Pickle, Storage
from mmbal.checkpoints.untrusted import MEBIBYTE, RefusedError, shown

DIRECTORY_LIMIT = 64 * MEBIBYTE
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older layout
_LEGACY_PROTOCOL = 1001
_HUGE = 0xFFFFFFFF  # of a 32-bit field of a zip whose value is in the 64-bit record


class Record(NamedTuple):
    """An entry of a zip; ``start`` is where its data begin in the file."""

    start: int
    packed: int  # bytes in the file
    size: int  # bytes when unpacked, as the directory claims
    is_stored: bool  # not compressed: packed is size


class Stored(NamedTuple):
    """A tensor in a file: ``read`` makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def zip_records(buffer) -> dict[str, Record]:
    """The directory of the zip in ``buffer``; every entry is checked to lie inside."""
    try:
        return _zip_records(buffer)
    except (struct.error, UnicodeDecodeError):
        raise RefusedError("has a damaged zip directory") from None


def _zip_records(buffer) -> dict[str, Record]:
    at = buffer.rfind(b"PK\5\6", max(0, len(buffer) - 22 - 0xFFFF))
    if at < 0:
        raise RefusedError("is a zip archive without its directory at the end: it is truncated or damaged")
    count, length, offset = struct.unpack_from("<HII", buffer, at + 10)
    if _HUGE in (length, offset) or count == 0xFFFF:
        signature, _, far, _ = struct.unpack_from("<4sIQI", buffer, at - 20)
        if at < 20 or signature != b"PK\6\7" or far > at - 56 or buffer[far : far + 4] != b"PK\6\6":
            raise RefusedError("has a damaged zip directory")
        count, length, offset = struct.unpack_from("<QQQ", buffer, far + 32)
    if offset + length > at or length > DIRECTORY_LIMIT or count * 46 > length:
        raise RefusedError("has a damaged or too long zip directory")
    directory = buffer[offset : offset + length]
    records: dict[str, Record] = {}
    here = 0
    for _ in range(count):
        fields = struct.unpack_from("<4sHHHHHHIIIHHHHHII", directory, here)
        signature, _, _, flags, method, _, _, _, packed, size, name_length, extra_length, comment_length = fields[:13]
        header = fields[16]
        name_end = here + 46 + name_length
        extra = directory[name_end : name_end + extra_length]
        name = directory[here + 46 : name_end].decode("utf-8")
        here = name_end + extra_length + comment_length
        if signature != b"PK\1\2" or here > length or name in records or flags & 1:
            raise RefusedError("has a damaged zip directory, or encrypted or repeated entries")
        size, packed, header = _wide(extra, size, packed, header)
        if header + 30 > offset or buffer[header : header + 4] != b"PK\3\4":
            raise RefusedError("has a zip directory that points to no entry")
        start = header + 30 + sum(struct.unpack_from("<HH", buffer, header + 26))
        if start + packed > offset or (method == 0 and size != packed):
            raise RefusedError(f"has a zip entry {shown(name)} that does not lie within the file")
        records[name] = Record(start, packed, size, method == 0)
    return records


def _wide(extra: bytes, *values: int) -> list[int]:
    """Size, packed size and position of an entry, those of 64 bits from its extra field 1."""
    here, field = 0, b""
    while here + 4 <= len(extra):
        number, length = struct.unpack_from("<HH", extra, here)
        if number == 1:
            field = extra[here + 4 : here + 4 + length]
        here += 4 + length
    wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
    result = [next(wide, None) if value == _HUGE else value for value in values]
    if None in result:
        raise RefusedError("has a damaged zip directory")
    return result


def archive_records(buffer) -> dict[str, Record]:
    """The entries of torch's zip, named without the folder that is before all of them."""
    records = zip_records(buffer)
    folders = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(folders) != 1:
        raise RefusedError("is a zip archive without data.pkl, thus none of torch's")
    return {name.removeprefix(folders[0]): r for name, r in records.items() if name.startswith(folders[0])}


def is_torchscript(records: dict[str, Record]) -> bool:
    return "constants.pkl" in records


def read_zip(buffer, records: dict[str, Record]) -> tuple[object, dict[str, tuple[int, int]]]:
    """What data.pkl describes, and where in ``buffer`` each storage lies: (start, number of bytes)."""
    pickled = records["data.pkl"]
    if not pickled.is_stored or pickled.size > PICKLE_LIMIT:
        raise RefusedError(f"must have a data.pkl that is stored uncompressed and has at most {PICKLE_LIMIT} bytes")
    order = records.get("byteorder")
    if order is not None and buffer[order.start : order.start + min(order.packed, 16)] != sys.byteorder.encode():
        raise RefusedError(f"must hold {sys.byteorder}-endian numbers, got others")
    machine = Pickle(buffer, pickled.start, pickled.start + pickled.size)
    top = machine.load()
    regions = {}
    for key in machine.storages:
        record = records.get(f"data/{key}")
        if record is None or not record.is_stored:
            raise RefusedError(f"must have an uncompressed entry for the storage {shown(key)} of its tensors")
        regions[key] = (record.start, record.size)
    return top, regions


def read_legacy(buffer) -> tuple[object, dict[str, tuple[int, int]]]:
    """As :func:`read_zip`, of the layout before torch 1.6: pickles, then each storage after its number of elements."""
    end = len(buffer)
    position = 0
    values = []
    for _ in range(5):  # the magic number, the version, sizes of C types, the object, the keys of the storages
        machine = Pickle(buffer, position, end)
        values.append(machine.load())
        position = machine.position
        if len(values) == 1 and values[0] != LEGACY_MAGIC:
            raise RefusedError("is a pickle, but none that torch.save wrote")
        if len(values) == 4:
            storages = machine.storages
    if values[1] != _LEGACY_PROTOCOL or not isinstance(values[2], dict) or values[2].get("little_endian") is not True:
        raise RefusedError("must be a little-endian file of torch's protocol 1001")
    keys = values[4]
    if type(keys) is not list or any(type(k) is not str for k in keys) or sorted(keys) != sorted(storages):
        raise RefusedError("must list the storages that its tensors use, got another list")
    regions = {}
    for key in keys:
        if position + 8 > end:
            raise RefusedError("ends before its last storage: it is truncated or damaged")
        nbytes = struct.unpack_from("<q", buffer, position)[0] * storages[key].dtype.itemsize
        regions[key] = (position + 8, nbytes)
        if not 0 <= nbytes <= end - position - 8:
            raise RefusedError("ends before its last storage: it is truncated or damaged")
        position += 8 + nbytes
    return values[3], regions


def state_dict(top) -> tuple[dict[str, Dense], bool]:
    """The tensors by name in a file's value, and whether they were found in a training checkpoint."""
    if not isinstance(top, dict):
        raise RefusedError(f"must hold a dict of tensors by name, got {_kind(top)}")
    wrapped = False
    if isinstance(top.get("state_dict"), dict):
        top, wrapped = top["state_dict"], True
    elif isinstance(top.get("model"), dict) and any(isinstance(v, Dense) for v in top["model"].values()):
        top, wrapped = top["model"], True
    for key, value in top.items():
        if type(key) is not str:
            raise RefusedError("must hold tensors by name, got a key that is not a string")
        if not isinstance(value, Dense):
            raise RefusedError(f"must hold dense tensors only, got {_kind(value)} for {shown(key)}")
    return top, wrapped


def _kind(value) -> str:
    if isinstance(value, Foreign):
        return f"an object of {value.name}"
    return "a bare tensor" if isinstance(value, Dense) else f"a {type(value).__name__.lower()}"


def place(dense: Dense, regions: dict[str, tuple[int, int]], whole: Tensor) -> Stored:
    """Checks a tensor against the bytes of its storage; ``whole`` is the file as uint8."""
    storage: Storage = dense.storage
    start, available = regions[storage.key]
    itemsize = dense.dtype.itemsize
    nbytes = check_shape(dense.shape, dense.dtype)
    if storage.nbytes > available:
        raise RefusedError(f"claims {storage.nbytes} bytes for a storage of {available}")
    held = storage.nbytes // itemsize
    last = dense.offset + sum((n - 1) * step for n, step in zip(dense.shape, dense.stride, strict=True))
    if nbytes and (last >= held or nbytes > storage.nbytes):
        raise RefusedError(f"has a tensor of {nbytes} bytes or beyond the end of its storage of {storage.nbytes} bytes")

    def read() -> Tensor:
        if not nbytes:
            return torch.empty(dense.shape, dtype=dense.dtype)
        first = start + dense.offset * itemsize
        data = whole[first : start + (last + 1) * itemsize]
        if first % itemsize:  # no torch of today writes such files; the tensor is a copy
            data = data.clone()
        elements = data.view(dense.dtype)
        return elements.as_strided(dense.shape, dense.stride, elements.storage_offset())

    return Stored(dense.shape, dense.dtype, read)


def map_file(file) -> tuple[mmap.mmap, Tensor]:
    """A private map of an open file (writing to it would never change the file), and the same as a tensor."""
    buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return buffer, torch.frombuffer(buffer, dtype=torch.uint8)
