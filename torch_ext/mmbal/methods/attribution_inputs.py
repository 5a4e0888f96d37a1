"""What a call of AttributionRegularizer is given, checked.

Letters: B samples, M modalities, D features, T tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmbal.methods import rows
from mmbal.methods.rows import in_order

WHAT = "AttributionRegularizer"
Embeddings = Mapping[str, Tensor] | Sequence[Tensor]
Shares = Mapping[str, float] | Sequence[float] | Tensor


def names(given) -> list[str]:
    found = list(given)
    if isinstance(given, str) or len(found) < 2 or len(set(found)) < len(found):
        raise ValueError(f"{WHAT}: modalities must be different names, at least two, got {given!r}")
    return found


def embeddings(given: Embeddings, modalities: list[str]) -> list[Tensor]:
    each = in_order(WHAT, "embeddings", given, modalities)
    for name, e in zip(modalities, each, strict=True):
        fits = e.is_floating_point() and e.dim() >= 2 and e.shape[0] == each[0].shape[0] and 0 not in e.shape[1:]
        if not fits:
            B = each[0].shape[0] if each[0].dim() else ""
            raise ValueError(
                f"{WHAT}: embeddings[{name!r}] must be floating point [B, ...] = [{B}, ...], "
                f"got {e.dtype} {list(e.shape)}"
            )
    return each


def sizes_differ(each: list[Tensor]) -> bool:
    """Tells where the l2 pool compares what is of different size."""
    sizes = [math.prod(e.shape[1:]) for e in each]
    if max(sizes) <= 4 * min(sizes):
        return False
    warnings.warn(
        f"{WHAT}: embeddings of {sizes} elements a sample: the l2 pool grows with them; pool='rms' does not",
        stacklevel=4,
    )
    return True


def shares(given: Shares, modalities: list[str]) -> Tensor:
    """[M] or [B, M] in float64. Those on a GPU are not looked at: wrong ones end a launch."""
    if isinstance(given, Mapping):
        given = in_order(WHAT, "shares", given, modalities)
    q, M = torch.as_tensor(given, dtype=torch.float64).detach(), len(modalities)
    if q.dim() not in (1, 2) or q.shape[-1] != M:
        raise ValueError(f"{WHAT}: shares must be [M] or [B, M], M = {M}, got {list(q.shape)}")
    if not rows.at_hand(q):
        return q
    if not bool(((q >= 0) & (q < math.inf)).all()) or not bool((q.sum(-1) > 0).all()):
        raise ValueError(f"{WHAT}: shares must be finite, not negative, with a sum above 0, got {given}")
    return q


def on_device(q: Tensor, device: torch.device) -> Tensor:
    """Shares [M] as arguments of kernels: a copy from the host would be waited for."""
    if device.type == "cpu" or not rows.at_hand(q) or q.dim() != 1:
        return q.to(device)
    return torch.stack([torch.full((), share, dtype=q.dtype, device=device) for share in q.tolist()])


def shares_of_call(q: Tensor, B: int, level: str) -> Tensor:
    if q.dim() == 2 and (len(q) != B or level == "batch"):
        what = "[M] with level 'batch'" if level == "batch" else f"[M] or [B, M] with B = {B}"
        raise ValueError(f"{WHAT}: shares must be {what}, got {list(q.shape)}")
    return q


def present(given: Tensor | None, each: list[Tensor]) -> Tensor | None:
    if given is not None and (given.dtype != torch.bool or given.shape != (len(each[0]), len(each))):
        raise ValueError(
            f"{WHAT}: present must be bool [B, M] = {[len(each[0]), len(each)]}, got {given.dtype} {list(given.shape)}"
        )
    return given


def masks(given: Mapping[str, Tensor] | None, modalities: list[str], each: list[Tensor]) -> list[Tensor | None]:
    given = dict(given or {})
    if unknown := set(given) - set(modalities):
        raise ValueError(f"{WHAT}: masks must have keys among {modalities}, got {sorted(unknown)}")
    for name, e in zip(modalities, each, strict=True):
        mask = given.get(name)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != e.shape[:2]):
            raise ValueError(
                f"{WHAT}: masks[{name!r}] must be bool [B, T] = {list(e.shape[:2])}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
    return [given.get(name) for name in modalities]


def baselines(given: Embeddings | None, modalities: list[str], each: list[Tensor]) -> list[Tensor] | None:
    if given is None:
        return None
    found = []
    for name, b, e in zip(modalities, in_order(WHAT, "baseline", given, modalities), each, strict=True):
        b = torch.as_tensor(b).detach().to(e)
        try:
            fits = torch.broadcast_shapes(b.shape, e.shape) == e.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{WHAT}: baseline[{name!r}] must broadcast with its embeddings {list(e.shape)}, got {list(b.shape)}"
            )
        found.append(b)
    return found
