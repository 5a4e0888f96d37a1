"""The pickles inside torch's files, read as descriptions: nothing is imported, called or allocated as they ask.

torch.load(weights_only=True) imports nothing foreign either, but it calls the constructors it allows with whatever
arguments the file gives (a bytearray or a tensor of any size), hashes nested keys recursively, and builds every tensor
at once. Here a tensor is a :class:`Dense`, which its reader checks against the bytes that are there.
"""

from __future__ import annotations

import pickle
import struct
from typing import NamedTuple

import torch

from mmbal.checkpoints.tensor_types import STORAGE_NAMES, SUPPORTED, check_shape
from mmbal.checkpoints.untrusted import MEBIBYTE, RefusedError, shown

PICKLE_LIMIT = 64 * MEBIBYTE
# A tensor takes about 30 operations; each holds at most some 130 bytes (an empty dict with its memo entry).
OPERATION_LIMIT = 1 << 21

_STORAGES = {f"torch.{name}": dtype for dtype, name in STORAGE_NAMES.items()}
_STORAGES |= {f"torch.cuda.{name}": dtype for dtype, name in STORAGE_NAMES.items()}
_STORAGES |= {
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.QInt8Storage": torch.qint8,
    "torch.QUInt8Storage": torch.quint8,
    "torch.QInt32Storage": torch.qint32,
    "torch.QUInt4x2Storage": torch.quint4x2,
    "torch.QUInt2x4Storage": torch.quint2x4,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_REBUILD = "torch._utils._rebuild_"
_PARAMETERS = {_REBUILD + "parameter", _REBUILD + "parameter_with_state"}
_ORDERED_DICT = "collections.OrderedDict"
# What training checkpoints hold beside weights, and tensors that are not dense: read as Foreign, refused as weights.
_INERT = {
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "_codecs.encode",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.per_channel_affine",
    "torch.per_channel_affine_float_qparams",
    "torch.per_channel_symmetric",
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2",
    *(
        _REBUILD + name
        for name in (
            "device_tensor_from_cpu_tensor",
            "device_tensor_from_numpy",
            "meta_tensor_no_storage",
            "nested_tensor",
            "qtensor",
            "sparse_tensor",
            "wrapper_subclass",
        )
    ),
}
_KNOWN = {_ORDERED_DICT, _REBUILD + "tensor", _REBUILD + "tensor_v2", _REBUILD + "tensor_v3"}
_KNOWN |= _PARAMETERS | _INERT | _STORAGES.keys() | _DTYPES.keys()


class Global(NamedTuple):
    """A name that the pickle imports; it stays a name."""

    name: str


class Foreign(NamedTuple):
    """What calling ``name`` would have given, had it been called."""

    name: str


class Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    nbytes: int  # as the pickle claims


class Dense(NamedTuple):
    """A strided tensor; offset and stride count elements. Types are checked, sizes against the storage are not."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Pickle:
    """Runs one pickle that starts at ``position`` of ``buffer`` (bytes or a map); afterwards it stands at its end."""

    def __init__(self, buffer, position: int, end: int):
        self.buffer = buffer
        self.position = position
        self.end = min(end, position + PICKLE_LIMIT)
        self.storages: dict[str, Storage] = {}  # the first of each key, as torch takes it
        self._stack: list = []
        self._marks: list[list] = []
        self._memo: dict[int, object] = {}
        self._budget = OPERATION_LIMIT

    def load(self):
        """The value of the pickle: str, int, float, bool, None, list, tuple, dict and the classes above.

        Keys of dicts that are no strings are replaced by objects, one for each item. Raises RefusedError.
        """
        try:
            while self._budget > 0:
                self._budget -= 1
                if self.position >= self.end:
                    raise RefusedError("has a pickle that ends too early or is too long")
                code = self.buffer[self.position]
                self.position += 1
                if code == pickle.STOP[0]:
                    return self._stack.pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise RefusedError(f"has a pickle with opcode 0x{code:02x}, which no file of weights needs")
                operation(self)
        except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error):
            raise RefusedError("has a damaged pickle") from None
        raise RefusedError(f"has a pickle of more than {OPERATION_LIMIT} operations")

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > self.end:
            raise RefusedError("has a pickle that ends too early or is too long")
        return self.buffer[start : self.position]

    def _number(self, code: str) -> int:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _line(self) -> str:
        stop = self.buffer.find(b"\n", self.position, min(self.end, self.position + 512))
        if stop < 0:
            raise RefusedError("has a pickle with a name that does not end")
        text = self._take(stop - self.position).decode("utf-8")
        self.position += 1
        return text

    def _push(self, value) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _global(self) -> None:
        module, name = self._line(), self._line()
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in _KNOWN:
            raise RefusedError(
                f"has a pickle that asks for {shown(full)}, which no file of weights needs; it is not read"
            )
        self._push(Global(full))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedError("has a damaged pickle: a call of what is no function")
        self._push(self._called(function.name, arguments))

    def _called(self, name: str, arguments: tuple):
        if name == _ORDERED_DICT:
            result: dict = {}
            pairs = arguments[0] if arguments else []
            if (
                not isinstance(pairs, (list, tuple))
                or len(pairs) > self._budget
                or any(type(p) not in (list, tuple) or len(p) != 2 for p in pairs)
            ):
                raise RefusedError("has a damaged pickle: an OrderedDict of no pairs")
            self._budget -= len(pairs)  # they may be the same list at every call
            _set_items(result, [item for pair in pairs for item in pair])
            return result
        if name in _PARAMETERS:
            return arguments[0]
        if name in (_REBUILD + "tensor", _REBUILD + "tensor_v2"):
            flags = arguments[6] if len(arguments) > 6 else None
            return _dense(*arguments[:4], None, flags)
        if name == _REBUILD + "tensor_v3":
            return _dense(*arguments[:4], arguments[6], arguments[7] if len(arguments) > 7 else None)
        return Foreign(name)

    def _new(self) -> None:
        arguments, cls = self._stack.pop(), self._stack.pop()
        if not isinstance(cls, Global):
            raise RefusedError("has a damaged pickle: an object of what is no class")
        self._push({} if cls.name == _ORDERED_DICT and not arguments else Foreign(cls.name))

    def _build(self) -> None:
        self._stack.pop()  # attributes, such as the _metadata of a state dict
        if not isinstance(self._stack[-1], (dict, Foreign)):
            raise RefusedError("has a damaged pickle: attributes of what has none")

    def _persistent(self) -> None:
        identity = self._stack.pop()
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise RefusedError("has a pickle that refers to something other than storages of tensors")
        _, kind, key, _, count, *view = identity
        if not isinstance(kind, Global) or kind.name not in _STORAGES or not isinstance(key, str):
            raise RefusedError("has a pickle with a storage of an unknown type")
        if type(count) is not int or not 0 <= count < 1 << 60:
            raise RefusedError("has a pickle with a storage of an impossible size")
        if any(v is not None for v in view):
            raise RefusedError(
                "has a pickle with a storage that is part of another one; save it again with a newer torch"
            )
        dtype = _STORAGES[kind.name]
        storage = Storage(dtype, key, count * dtype.itemsize)
        self.storages.setdefault(key, storage)
        self._push(storage)

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _append(self, items: list) -> None:
        if type(self._stack[-1]) is not list:
            raise RefusedError("has a damaged pickle: items for what is no list")
        self._stack[-1].extend(items)

    def _set(self, items: list) -> None:
        if type(self._stack[-1]) is dict:
            _set_items(self._stack[-1], items)
        elif not isinstance(self._stack[-1], Foreign):
            raise RefusedError("has a damaged pickle: items for what is no dict")

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise RefusedError("has a damaged pickle")
        self._stack[-count:] = [tuple(self._stack[-count:])]


def _set_items(target: dict, items: list) -> None:
    """Keys that are no strings become objects: nothing needs them, and hashing a nested tuple can take for ever."""
    if len(items) % 2:
        raise RefusedError("has a damaged pickle: a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key if type(key) is str else object()] = value


def _dense(storage, offset, shape, stride, dtype, flags):
    if not isinstance(storage, Storage):
        raise RefusedError("has a pickle with a tensor without a storage")
    if dtype is not None:
        if not isinstance(dtype, Global) or dtype.name not in _DTYPES:
            raise RefusedError("has a pickle with a tensor of no dtype")
        dtype = _DTYPES[dtype.name]
    else:
        dtype = storage.dtype
    if dtype not in SUPPORTED:
        return Foreign(str(dtype))
    if flags:  # torch's lazy conjugate or negative
        return Foreign("torch.conj or torch.neg")
    check_shape(shape, dtype)
    if not isinstance(stride, (tuple, list)):
        raise RefusedError("has a pickle with a tensor without strides")
    if len(stride) != len(shape):
        raise RefusedError(f"has a pickle with a tensor of {len(shape)} dimensions and {len(stride)} strides")
    if any(type(n) is not int or not 0 <= n < 1 << 60 for n in (offset, *stride)):
        raise RefusedError("has a pickle with a tensor of impossible strides")
    return Dense(storage, offset, tuple(shape), tuple(stride), dtype)


# The operations that torch.save's protocol 2 uses, and byte strings as Python 2 wrote them.
_OPERATIONS = {
    pickle.PROTO[0]: lambda p: p._take(1),
    pickle.GLOBAL[0]: Pickle._global,
    pickle.REDUCE[0]: Pickle._reduce,
    pickle.NEWOBJ[0]: Pickle._new,
    pickle.BUILD[0]: Pickle._build,
    pickle.BINPERSID[0]: Pickle._persistent,
    pickle.MARK[0]: Pickle._mark,
    pickle.NONE[0]: lambda p: p._push(None),
    pickle.NEWFALSE[0]: lambda p: p._push(False),
    pickle.NEWTRUE[0]: lambda p: p._push(True),
    pickle.BININT[0]: lambda p: p._push(p._number("i")),
    pickle.BININT1[0]: lambda p: p._push(p._number("B")),
    pickle.BININT2[0]: lambda p: p._push(p._number("H")),
    pickle.LONG1[0]: lambda p: p._push(pickle.decode_long(p._take(p._number("B")))),
    pickle.BINFLOAT[0]: lambda p: p._push(struct.unpack(">d", p._take(8))[0]),
    pickle.BINUNICODE[0]: lambda p: p._push(p._take(p._number("I")).decode("utf-8", "surrogatepass")),
    pickle.BINSTRING[0]: lambda p: p._push(p._take(p._number("I")).decode("utf-8")),
    pickle.SHORT_BINSTRING[0]: lambda p: p._push(p._take(p._number("B")).decode("utf-8")),
    pickle.EMPTY_TUPLE[0]: lambda p: p._push(()),
    pickle.EMPTY_LIST[0]: lambda p: p._push([]),
    pickle.EMPTY_DICT[0]: lambda p: p._push({}),
    pickle.EMPTY_SET[0]: lambda p: p._push(Foreign("builtins.set")),
    pickle.TUPLE[0]: lambda p: p._push(tuple(p._since_mark())),
    pickle.TUPLE1[0]: lambda p: p._tuple(1),
    pickle.TUPLE2[0]: lambda p: p._tuple(2),
    pickle.TUPLE3[0]: lambda p: p._tuple(3),
    pickle.APPEND[0]: lambda p: p._append([p._stack.pop()]),
    pickle.APPENDS[0]: lambda p: p._append(p._since_mark()),
    pickle.SETITEM[0]: lambda p: p._set([p._stack.pop(), p._stack.pop()][::-1]),
    pickle.SETITEMS[0]: lambda p: p._set(p._since_mark()),
    pickle.BINGET[0]: lambda p: p._push(p._memo[p._number("B")]),
    pickle.LONG_BINGET[0]: lambda p: p._push(p._memo[p._number("I")]),
    pickle.BINPUT[0]: lambda p: p._put(p._number("B")),
    pickle.LONG_BINPUT[0]: lambda p: p._put(p._number("I")),
}
