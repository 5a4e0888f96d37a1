"""What a unit of a parameter is: the part of its gradient that a mask keeps or drops as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Axis = tuple[int, int]  # size, stride


@dataclass(frozen=True)
class UnitSpec:
    """How a parameter is cut into units. Made by one of the functions below.

    ``slices(dim)``: every index of a dimension: filters of a convolution, rows of a linear layer (dim 0).
    ``heads(count, dim)``: ``count`` equal blocks of a dimension: attention heads, as rows of the query, key and value
    projections (dim 0) or columns of the output projection (dim 1).
    ``columns(first, count)``: of a matrix [C, W], such as a fusion head, columns first .. first + count; every row is
    drawn from by itself, and a unit is one element.
    ``elements()``: every element by itself, all of the parameter drawn from together.
    """

    kind: str
    dim: int = 0
    first: int = 0
    count: int = 0

    @classmethod
    def slices(cls, dim: int = 0) -> UnitSpec:
        return cls("slices", dim)

    @classmethod
    def heads(cls, count: int, dim: int = 0) -> UnitSpec:
        return cls("heads", dim, count=count)

    @classmethod
    def columns(cls, first: int, count: int) -> UnitSpec:
        return cls("columns", first=first, count=count)

    @classmethod
    def elements(cls) -> UnitSpec:
        return cls("elements")

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError where a parameter of this shape cannot be cut so."""
        shape = tuple(shape)
        if self.kind == "columns":
            if len(shape) != 2 or not (self.first >= 0 and self.count >= 1 and self.first + self.count <= shape[1]):
                raise ValueError(
                    f"UnitSpec: columns {self.first} to {self.first + self.count} need a matrix with as many, "
                    f"got {list(shape)}"
                )
        elif self.kind != "elements":
            if not 0 <= self.dim < len(shape):
                raise ValueError(f"UnitSpec: dim must be one of the {len(shape)} of {list(shape)}, got {self.dim}")
            if self.kind == "heads" and (self.count < 1 or shape[self.dim] % self.count):
                raise ValueError(
                    f"UnitSpec: dimension {self.dim} of {list(shape)} must be a multiple of {self.count} heads"
                )

    def units(self, shape: Sequence[int]) -> tuple[int, int]:
        """Groups and units of a parameter of this shape."""
        if self.kind == "columns":
            return shape[0], self.count
        if self.kind == "elements":
            return 1, _product(shape)
        return 1, shape[self.dim] if self.kind == "slices" else self.count

    def numbers(self, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
        """The nine numbers of ``specs`` for a tensor that lies in memory so; None where four axes cannot say it. Of
        elements those of the whole tensor as one unit; None where it has gaps."""
        if self.kind == "columns":
            axes = [(shape[0], strides[0]), (self.count, strides[1]), (1, 1), (1, 1)]
            return _flat(axes, self.first * strides[1])
        if self.kind == "elements":
            merged = _merge(list(zip(shape, strides, strict=True))) or [(1, 1)]
            return _flat([(1, 0), (1, 0), (1, 1), merged[0]], 0) if len(merged) == 1 and merged[0][1] == 1 else None
        count = self.units(shape)[1]
        size, stride = shape[self.dim], strides[self.dim]
        block = size // count if count else 0
        inside = [(n, s) for dim, (n, s) in enumerate(zip(shape, strides, strict=True)) if dim != self.dim]
        merged = _merge([*inside, (block, stride)])
        if len(merged) > 2:
            return None
        outer, inner = ([(1, 1)] * 2 + merged)[-2:]
        return _flat([(1, 0), (count, block * stride), outer, inner], 0)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _flat(axes: list[Axis], offset: int) -> tuple[int, ...]:
    return (*(size for size, _ in axes), *(stride for _, stride in axes), offset)


def _merge(axes: list[Axis]) -> list[Axis]:
    """As few axes as name the same elements, the smallest stride last."""
    if any(size == 0 for size, _ in axes):
        return [(0, 1)]
    merged: list[Axis] = []
    for size, stride in sorted((axis for axis in axes if axis[0] > 1), key=lambda axis: axis[1]):
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return merged[::-1]
