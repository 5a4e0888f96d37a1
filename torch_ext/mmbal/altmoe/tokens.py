"""What a connector is given of a modality, checked and in one form: features or classes, with a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_tokens(
    name: str, modality: str, x: Tensor, mask: Tensor | None, dim: int, dtype: torch.dtype, pooling: bool
) -> tuple[Tensor, Tensor | None]:
    """x as [B, T, dim] of this dtype and mask as [B, T]; zero where the mask leaves out. Classes as int64 [B, T], or
    where they will be ``pooling`` as [B, 1] or one-hot [B, T, dim]. No tokens: a mask that counts none."""
    wide = x.is_floating_point()
    if x.is_complex():
        raise ValueError(f"MoEConnector: {name} of {modality} must be real numbers or classes, got {x.dtype}")
    if x.dim() not in ((2, 3) if wide else (1, 2)) or (wide and x.shape[-1] != dim):
        shapes = f"[B, T, {dim}] or [B, {dim}]" if wide else "classes [B, T] or [B]"
        raise ValueError(f"MoEConnector: {name} of {modality} must be {shapes}, got {list(x.shape)}")
    x = x.unsqueeze(1) if x.dim() == (2 if wide else 1) else x
    x = x.to(dtype if wide else torch.int64)
    B, T = x.shape[:2]
    if mask is None and T == 0:
        mask = torch.ones(B, T, dtype=torch.bool, device=x.device)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in (x.shape[:2], x.shape[:1]):
            found = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"MoEConnector: mask of {modality} must be bool [{B}, {T}] or [{B}], got {found}")
        mask = (mask if mask.dim() == 2 else mask.unsqueeze(1)).expand(x.shape[:2])
        x = x.where(mask.unsqueeze(2) if wide else mask, 0)
    if wide:
        return x, mask
    _check_classes(name, modality, x, dim)
    return (F.one_hot(x, dim).to(dtype) if pooling and T != 1 else x), mask


def _check_classes(name: str, modality: str, classes: Tensor, dim: int) -> None:
    """On the CPU: elsewhere the host would have to wait for the numbers."""
    if torch.compiler.is_compiling() or classes.device.type != "cpu" or classes.numel() == 0:
        return
    lowest, highest = (int(value) for value in classes.aminmax())
    if lowest < 0 or highest >= dim:
        found = lowest if lowest < 0 else highest
        raise ValueError(f"MoEConnector: classes in {name} of {modality} must be from 0 to {dim - 1}, got {found}")
