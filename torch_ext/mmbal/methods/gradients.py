"""The parameters that AMSS masks, and their gradients as the operators take them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmbal.methods.sharding import Shard, local_part
from mmbal.methods.unit_spec import UnitSpec

SLICES = UnitSpec.slices()
Predicate = Callable[[nn.Parameter], bool]


@dataclass
class Managed:
    """A parameter, or a part of one, and how it is drawn from."""

    parameter: nn.Parameter
    modality: int
    spec: UnitSpec
    id: int


@dataclass
class Batch:
    """Tensors as the operators take them, in the order of their ids."""

    managed: list[Managed]
    tensors: list[Tensor]
    specs: list[int]  # empty: slices of dimension 0 of contiguous tensors
    segments: list[int]  # groups and units of the whole parameter (tensors may be shards), modality, id
    parts: list[tuple[int, Shard | None]]  # units here, and which shard they are
    copies: list[tuple[Tensor, Tensor]]  # gradients that four axes cannot describe, and what is masked for them

    @property
    def sharded(self) -> bool:
        return any(shard is not None for _, shard in self.parts)

    @property
    def weights(self) -> list[Tensor]:
        """The parameters, in memory as the tensors."""
        return [like(t, local_part(m.parameter)[0]) for m, t in zip(self.managed, self.tensors, strict=True)]

    def release(self) -> None:
        """Holds no gradient until the next step: they are as large as the model."""
        self.tensors, self.copies = [], []

    def write_back(self) -> None:
        for gradient, copy in self.copies:
            gradient.copy_(copy)


def collect(
    encoders: Mapping[str, nn.Module | Iterable[nn.Parameter]],
    unit: str | Mapping[nn.Parameter, UnitSpec],
    include: Predicate | None,
    exclude: Predicate | None,
) -> list[Managed]:
    """What AMSS manages of the encoders; see there."""
    if isinstance(unit, str) and unit not in ("auto", "element"):
        raise ValueError(f"AMSS: unit must be auto, element or a mapping of parameters, got {unit!r}")
    own = {} if isinstance(unit, str) else dict(unit)
    default = UnitSpec.elements() if unit == "element" else SLICES
    names, owner, managed = list(encoders), {}, []
    for parameter, spec in own.items():
        if not isinstance(spec, UnitSpec):
            raise ValueError(f"AMSS: unit of a parameter {list(parameter.shape)} must be a UnitSpec, got {spec!r}")
    for modality, (name, given) in enumerate(encoders.items()):
        if isinstance(given, Tensor):  # iterating over it would give its rows
            raise ValueError(f"AMSS: encoders[{name!r}] must be a module or parameters in a list, got one tensor")
        for parameter in given.parameters() if isinstance(given, nn.Module) else given:
            if not isinstance(parameter, Tensor):
                raise ValueError(f"AMSS: encoders[{name!r}] must have parameters, got {type(parameter).__name__}")
            if not parameter.requires_grad or not (parameter.dim() >= 2 or parameter in own):
                continue
            if (include is not None and not include(parameter)) or (exclude is not None and exclude(parameter)):
                continue
            if id(parameter) in owner:
                if owner[id(parameter)] == modality:
                    continue
                raise ValueError(
                    f"AMSS: a parameter {list(parameter.shape)} belongs to {names[owner[id(parameter)]]!r} and "
                    f"{name!r}: exclude it, it cannot be updated at two ratios"
                )
            owner[id(parameter)] = modality
            spec = own.pop(parameter, default)
            spec.check(parameter.shape)
            managed.append(Managed(parameter, modality, spec, len(managed)))
    if own:
        raise ValueError(f"AMSS: unit has {len(own)} parameters that no encoder has, or that need no gradient")
    return managed


def like(layout: Tensor, tensor: Tensor) -> Tensor:
    """The values of tensor in dtype and memory layout of another."""
    tensor = tensor.detach()
    if tensor.stride() == layout.stride() and tensor.dtype == layout.dtype:
        return tensor
    return layout.new_empty_strided(layout.shape, layout.stride()).copy_(tensor)


class Gradients:
    """The gradients of managed parameters, step by step. Where they lie in memory as they did the last time, nothing is
    worked out anew: that is what every tensor costs in every step."""

    def __init__(self, managed: list[Managed]):
        self.managed = list(managed)
        self._parameters = [m.parameter for m in managed]
        self._last: Batch | None = None
        self._layout: list | None = None  # for which the last batch serves again
        self._warned = False

    def add(self, managed: Managed) -> None:
        self.managed.append(managed)
        self._parameters.append(managed.parameter)

    def __call__(self) -> Batch:
        gradients = [parameter.grad for parameter in self._parameters]
        layout = self._layout_of(gradients)
        if layout is not None and layout == self._layout:
            self._last.tensors = gradients
            return self._last
        batch = self.batch(self.managed, gradients)
        self._last, self._layout = batch, None if batch.copies else layout
        return batch

    @staticmethod
    def _layout_of(gradients: list[Tensor | None]) -> list | None:
        """What says how all of them lie in memory: that they are contiguous, or their strides. None where one is
        missing, sparse or sharded."""
        try:
            contiguous = [g.is_contiguous() for g in gradients if type(g) is Tensor]
            if len(contiguous) < len(gradients):
                return None
            return contiguous if all(contiguous) else [g.stride() for g in gradients]
        except RuntimeError:  # a sparse one has no strides
            return None

    def batch(self, managed: list[Managed], tensors: list[Tensor | None]) -> Batch:
        """These tensors as the operators take them, without those that are None or sparse."""
        batch, plain = Batch([], [], [], [], [], []), True
        for m, tensor in zip(managed, tensors, strict=True):
            if tensor is None or self._is_sparse(tensor):
                continue
            local, shard = local_part(tensor)
            if shard is not None and (m.spec.kind, m.spec.dim) != ("slices", 0):
                raise NotImplementedError(f"AMSS: {m.spec} is not served for a gradient whose dimension 0 is sharded")
            if any(stride == 0 and size > 1 for size, stride in zip(local.shape, local.stride(), strict=True)):
                raise ValueError(f"AMSS: a gradient {list(local.shape)} must not be expanded, got {local.stride()}")
            numbers = m.spec.numbers(local.shape, local.stride())
            if numbers is None:
                copy = local.contiguous()
                batch.copies.append((local, copy))
                local, numbers = copy, m.spec.numbers(copy.shape, copy.stride())
            batch.managed.append(m)
            batch.tensors.append(local)
            batch.specs += numbers
            batch.parts.append((numbers[0] * numbers[1], shard))
            plain = plain and m.spec == SLICES and local.is_contiguous()
            batch.segments += (numbers[0], numbers[1] if shard is None else shard.total, m.modality, m.id)
        if plain:
            batch.specs = []
        return batch

    def _is_sparse(self, tensor: Tensor) -> bool:
        if tensor.layout == torch.strided:
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(f"AMSS leaves {tensor.layout} gradients as they are", stacklevel=5)
        return True
