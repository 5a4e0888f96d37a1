"""Names of element types in files of tensors, and what is asked of a shape before a tensor is made of it."""

from __future__ import annotations

import torch

from mmbal.checkpoints.untrusted import RefusedError

# dtype: (its name in a safetensors header, the storage class that torch.save names; None: torch.UntypedStorage)
_NAMES = {
    torch.float64: ("F64", "DoubleStorage"),
    torch.float32: ("F32", "FloatStorage"),
    torch.float16: ("F16", "HalfStorage"),
    torch.bfloat16: ("BF16", "BFloat16Storage"),
    torch.complex64: ("C64", "ComplexFloatStorage"),
    torch.int64: ("I64", "LongStorage"),
    torch.int32: ("I32", "IntStorage"),
    torch.int16: ("I16", "ShortStorage"),
    torch.int8: ("I8", "CharStorage"),
    torch.uint8: ("U8", "ByteStorage"),
    torch.bool: ("BOOL", "BoolStorage"),
    torch.uint64: ("U64", None),
    torch.uint32: ("U32", None),
    torch.uint16: ("U16", None),
    torch.float8_e4m3fn: ("F8_E4M3", None),
    torch.float8_e5m2: ("F8_E5M2", None),
}
SAFETENSORS_NAMES = {dtype: name for dtype, (name, _) in _NAMES.items()}
STORAGE_NAMES = {dtype: storage for dtype, (_, storage) in _NAMES.items() if storage}
SUPPORTED = frozenset(_NAMES)

MAX_DIMENSIONS = 64  # torch's own limit for most operations


def check_shape(shape, dtype: torch.dtype) -> int:
    """The number of bytes of a tensor; raises RefusedError where sizes are no sizes or multiply beyond an int64."""
    if not isinstance(shape, (tuple, list)):
        raise RefusedError("has a tensor without a shape")
    if len(shape) > MAX_DIMENSIONS:
        raise RefusedError(f"has a tensor of {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if any(type(n) is not int or n < 0 for n in shape):
        raise RefusedError("has a tensor whose shape is not of non-negative integers")
    extent = dtype.itemsize
    for n in shape:  # zeros count as ones: strides of an empty tensor must not overflow either
        extent *= max(n, 1)
        if extent >= 1 << 63:
            raise RefusedError("has a tensor of more elements than memory can hold")
    return 0 if 0 in shape else extent
