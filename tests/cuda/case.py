"""A call of an operator, that can be made on the CPU and on a GPU and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def real(dtype):
    """What weights and sums of such tensors are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Random:
    """Values on the CPU, the same for the same seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, dtype=torch.float64):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def uniform(self, *shape, dtype=torch.float64):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def choices(self, N, E, K):
        """K different of E for each row."""
        return torch.rand(N, E, generator=self.generator).argsort(1)[:, :K]


@dataclass
class Case:
    """tensors: inputs on the CPU, of which the floating-point ones are differentiated where the operator is.
    others: what else `call` takes by name."""

    name: str
    call: Callable
    tensors: list[Tensor]
    others: dict = field(default_factory=dict)
    tolerance: float | None = None  # of the largest |value|, where that of the dtype is not right
    scale: float = 0.0  # the least |value| that tolerance is taken of: of sums whose terms cancel, that of the terms
    any_layout: bool = True  # the operator reads tensors that do not lie in one piece
    twice: bool = False  # it has second derivatives
    inference: bool = False  # no gradient is asked for
    family: str = ""

    def arguments(self, device, requires_grad=True):
        tensors = [t.detach().to(device) for t in self.tensors]
        for t in tensors:
            t.requires_grad_(requires_grad and t.is_floating_point())
        others = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.others.items()}
        return tensors, others

    def results(self, device):
        """Outputs, and the gradients of a fixed combination of the differentiable ones; of these, where there are
        second derivatives, the gradients too."""
        tensors, others = self.arguments(device)
        outputs = self.outputs(tensors, others)
        gradients = self.gradients(outputs, tensors, self.twice)
        return outputs, gradients + (self.gradients(gradients, tensors) if self.twice else [])

    def outputs(self, tensors, others):
        outputs = self.call(*tensors, **others)
        if isinstance(outputs, Tensor):
            return [outputs]
        return list(outputs)

    def gradients(self, outputs, tensors, create_graph=False):
        differentiable = [o for o in outputs if o.requires_grad]
        if not differentiable:
            return []
        upstream = [Random(i).normal(*o.shape).to(o.device, o.dtype) for i, o in enumerate(differentiable)]
        inputs = [t for t in tensors if t.requires_grad]
        gradients = torch.autograd.grad(differentiable, inputs, upstream, allow_unused=True, create_graph=create_graph)
        return [g for g in gradients if g is not None]

    def calls(self, device):
        """operator -> arguments, of each that takes part, forward and backward; the first call of several."""
        with RecordedCalls() as recorded:
            self.results(device)
        return recorded.calls


class RecordedCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "mmbal" and operator not in self.calls:
            self.calls[operator] = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
        return operator(*args, **(kwargs or {}))
