"""torch.save's archive of a state dict, written storage by storage.

A zip with nothing compressed: data.pkl, which builds the tensors, and an entry for each storage, aligned for mapping.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from math import prod
from typing import BinaryIO

import torch

from mmbal.checkpoints.tensor_types import STORAGE_NAMES

_ALIGNMENT = 64  # torch's own
_PADDING = b"FB"  # the number of the zip's extra field that torch pads with
_ZIP64_FROM = 1 << 30  # bytes of an entry; from 2 GiB on it is needed
_VERSION = b"3\n"  # of torch's archives with tensors only


class _Storage:
    def __init__(self, index: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.key = sys.intern(str(index))
        self.kind = getattr(torch, STORAGE_NAMES[dtype]) if dtype in STORAGE_NAMES else torch.UntypedStorage
        self.count = prod(shape) * (1 if dtype in STORAGE_NAMES else dtype.itemsize)


class _Described:
    """Pickled as the contiguous tensor on a storage that it describes."""

    def __init__(self, index: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.storage, self.shape, self.dtype = _Storage(index, shape, dtype), shape, dtype

    def __reduce__(self):
        stride, step = [], 1
        for n in reversed(self.shape):
            stride.append(step)
            step *= max(n, 1)
        # New tuples each: the pickler refers back to what it has seen, and the bytes must not depend on the caller.
        common = (self.storage, 0, tuple(list(self.shape)), tuple(stride[::-1]), False, OrderedDict())
        if self.dtype in STORAGE_NAMES:
            return torch._utils._rebuild_tensor_v2, common
        return torch._utils._rebuild_tensor_v3, (*common, self.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, _Storage) else None


class TorchZip:
    """Writes to ``file``: tensors (name, shape, dtype) are described at once, storages follow in their order."""

    def __init__(self, file: BinaryIO, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]):
        self._tensors = tensors
        self._file = file
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        described = OrderedDict()
        for index, (name, shape, dtype) in enumerate(tensors):
            described[sys.intern(name)] = _Described(index, shape, dtype)
        pickled = BytesIO()
        _Pickler(pickled, protocol=2).dump(described)
        self._write("data.pkl", pickled.getvalue())
        self._write("byteorder", sys.byteorder.encode())

    def _write(self, name: str, data: bytes) -> None:
        with self._entry(name, len(data)) as entry:
            entry.write(data)

    @contextmanager
    def _entry(self, name: str, nbytes: int) -> Iterator[BinaryIO]:
        about = zipfile.ZipInfo(f"archive/{name}")  # dated 1980
        wide = nbytes >= _ZIP64_FROM
        start = self._file.tell() + 30 + len(about.filename) + 4 + (20 if wide else 0)
        padding = -start % _ALIGNMENT
        about.extra = _PADDING + padding.to_bytes(2, "little") + b"Z" * padding
        with self._zip.open(about, "w", force_zip64=wide) as entry:
            yield entry

    @contextmanager
    def storage(self, index: int) -> Iterator[BinaryIO]:
        _, shape, dtype = self._tensors[index]
        with self._entry(f"data/{index}", prod(shape) * dtype.itemsize) as entry:
            yield entry

    def __enter__(self) -> TorchZip:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._write("version", _VERSION)
            self._zip.close()
        else:  # the file is given up, but ZipFile would write to it again when it is collected
            with suppress(OSError, ValueError):
                self._zip.close()
