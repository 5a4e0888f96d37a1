"""Loads the operators. Everything that touches ``torch.ops.mmbal`` imports this module first."""

import os
from pathlib import Path

import torch

from mmbal import _core

_LIBRARY = Path(_core.__file__).with_name("libmmbal_torch.so")
CUDA_LIBRARY = Path(_core.__file__).with_name("libmmbal_cuda.so")

if (_isa := os.environ.get("MMBAL_ISA")) is not None and not _core.is_isa_name(_isa):
    raise ValueError(f"MMBAL_ISA must be portable, avx2, avx512, avx512_bf16 or amx, got {_isa!r}")

torch.ops.load_library(str(_LIBRARY))
if torch.version.cuda is not None and CUDA_LIBRARY.exists():
    torch.ops.load_library(str(CUDA_LIBRARY))

ops = torch.ops.mmbal


def check_devices(op: str, **tensors) -> None:
    """For fake kernels: torch sends a call there when any one argument is a meta tensor, whatever the others are."""
    first, *rest = ((name, t.device) for name, t in tensors.items() if t is not None)
    for name, device in rest:
        if device != first[1]:
            raise RuntimeError(f"{op}: {name} must be on {first[1]} as {first[0]} is, got {device}")


def check(op: str, holds: bool, *message) -> None:
    if not holds:
        raise RuntimeError(f"{op}: {''.join(map(str, message))}")


def check_shape(op: str, name: str, t: torch.Tensor, letters: str, sizes: tuple) -> None:
    """For fake kernels, in the words of the others; a size is None where any will do."""
    same = t.dim() == len(sizes) and all(n is None or n == m for n, m in zip(sizes, t.shape, strict=True))
    expected = ", ".join("*" if n is None else str(n) for n in sizes)
    check(op, same, name, " must be ", letters, " = [", expected, "], got ", list(t.shape))


def check_dtype(op: str, name: str, t: torch.Tensor, dtype: torch.dtype) -> None:
    check(op, t.dtype == dtype, name, " must be ", dtype_text(dtype), ", got ", dtype_text(t.dtype))


def check_storage_dtype(op: str, name: str, t: torch.Tensor) -> None:
    stored = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check(op, t.dtype in stored, name, " must be float32, bfloat16, float16 or float64, got ", dtype_text(t.dtype))


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


implementations = torch.library.Library("mmbal", "IMPL")


def _has_kernel(operator: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, device)


def refuse_cuda() -> list[str]:
    """Operators with a kernel for the CPU and none for CUDA; there they raise an error that says what to do."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmbal::")]
    lacking = [name for name in names if _has_kernel(name, "CPU") and not _has_kernel(name, "CUDA")]
    if CUDA_LIBRARY.exists():
        why = "it has no CUDA kernel; move its tensors to the CPU"
    else:
        why = (
            "this mmbal was installed without CUDA. Put the CUDA toolkit's nvcc on PATH and install mmbal again "
            "(with pip install --no-build-isolation)"
        )

    def refusal(operator):
        def refuse(*args, **options):
            raise RuntimeError(f"{operator.removeprefix('mmbal::')}: got a CUDA tensor, but {why}")

        return refuse

    for name in lacking:
        implementations.impl(name.removeprefix("mmbal::"), refusal(name), "CUDA")
    return lacking


refused_on_cuda = refuse_cuda()

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocast_to_real(op: str) -> None:
    """Autocast rule of an operator on logits: they are taken in float32 (float64 stays)."""
    call = getattr(ops, op)

    def rule_on(device_type):
        def rule(logits_NE, *rest, **options):
            with torch.autocast(device_type, enabled=False):
                return call(logits_NE if logits_NE.dtype == torch.float64 else logits_NE.float(), *rest, **options)

        return rule

    for device_type, key in AUTOCAST_KEYS.items():
        implementations.impl(op, rule_on(device_type), key)


def autocast_to_float32(op: str) -> None:
    """Autocast rule of an operator whose tensors are all taken in float32."""
    for device_type in AUTOCAST_KEYS:
        torch.library.register_autocast(f"mmbal::{op}", device_type, torch.float32)


def register_gradient(op: str, backward, setup_context) -> None:
    """``torch.library.register_autograd`` for an operator on tensors (no lists of them), without the 3 us that it costs
    a call without a gradient: that is as long as a small operator takes."""
    overload, below = getattr(ops, op).default, torch._C._AutoDispatchBelowAutograd
    defaults = [argument.default_value for argument in overload._schema.arguments]

    def forward(ctx, *args):
        with below():
            result = overload(*args)
        setup_context(ctx, (*args, *defaults[len(args) :]), result)  # the dispatcher leaves out trailing defaults
        return result

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    differentiated = type(op, (torch.autograd.Function,), members)

    def rule(*args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiated.apply(*args)
        with below():
            return overload(*args)

    implementations.impl(op, rule, "Autograd")


# Operators whose rule for autograd has no derivative, and what a caller meets: see the functions below.
without_derivative: dict[str, str] = {}


def refuse_gradient(op: str, why: str = "") -> None:
    """Registers an autograd for ``mmbal::op`` that raises: an unregistered one would warn and give wrong numbers."""

    def backward(ctx, *gradients):
        raise RuntimeError(f"mmbal::{op} has no derivative{why}")

    def setup_context(ctx, inputs, output):
        tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        ctx.mark_non_differentiable(*(t for t in tensors if not t.is_floating_point()))

    torch.library.register_autograd(f"mmbal::{op}", backward, setup_context=setup_context)
    without_derivative[op] = "raises"


def refuse_double_backward(op: str) -> None:
    """``refuse_gradient`` for an operator that is itself the gradient of another."""
    refuse_gradient(op, ": double backward is not supported")
    without_derivative[op] = "once"


def give_constants(op: str) -> None:
    """Autograd rule of an operator that chooses, counts or estimates: its results require no gradient, as those of
    argmax do not."""
    implementations.impl(op, torch.library.fallthrough_kernel, "Autograd")
    without_derivative[op] = "constant"


def refuse_differentiated(op: str) -> None:
    """Autograd rule of an operator that changes its first argument in place: that must not be part of a graph."""
    overload = getattr(ops, op).default
    name = overload._schema.arguments[0].name

    def rule(keys, changed, *rest):
        tensors = [changed] if isinstance(changed, torch.Tensor) else changed
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(f"{op}: {name} must not require grad, for it is changed in place; detach it first")
        overload.redispatch(keys & torch._C._after_autograd_keyset, changed, *rest)

    implementations.impl(op, rule, "Autograd", with_keyset=True)
    without_derivative[op] = "in place"
