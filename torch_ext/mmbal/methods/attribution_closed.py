"""The closed form of AttributionRegularizer, for heads of linear layers: mmbal::attribution_linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.methods import attribution_values as values
from mmbal.methods import rows


def linear_parts(head) -> list[nn.Linear]:
    """Of a linear head: itself, or one for each modality. Empty where it is no such head: hooks and parametrizations
    may do anything, and a tied parameter has the sum of its gradients."""
    parts = list(head.values()) if isinstance(head, nn.ModuleDict) else [head]
    plain = all(type(p) is nn.Linear and not p._forward_pre_hooks and not p._forward_hooks for p in parts)
    if not plain or (isinstance(head, nn.ModuleDict) and (head._forward_hooks or head._forward_pre_hooks)):
        return []
    own = [p for part in parts for p in (part.weight, part.bias) if p is not None]
    same = len({(p.out_features, p.weight.dtype) for p in parts}) == 1
    return parts if same and len({id(p) for p in own}) == len(own) else []


def check_widths(parts: list[nn.Linear], e: list[Tensor]) -> None:
    expected, widths = [p.in_features for p in parts], [x.shape[1] for x in e]
    if expected != (widths if len(parts) > 1 else [sum(widths)]):
        raise ValueError(f"AttributionRegularizer: head takes {expected} features, got embeddings of {widths}")


def regularizer(
    parts: list[nn.Linear],
    e: list[Tensor],
    logits: Tensor,
    classes: Tensor | None,
    q: Tensor,
    present: Tensor | None,
    options: tuple,
) -> tuple[Tensor, values.Info, dict[int, Tensor]]:
    """Value, info, and the gradients of the head's parameters by their id. options: score, pool, penalty, eps."""
    weights = [p.weight.detach() for p in parts]  # one [C, D] a modality, or all side by side
    B, real = len(e[0]), torch.promote_types(e[0].dtype, torch.float32)

    def call(counted: Tensor | None, there: Tensor | None):
        dreg_B = q.new_full((B,), 1 / max(B, 1), dtype=real) if counted is None else counted.to(real) / max(B, 1)
        return (dreg_B, *ops.attribution_linear(e, weights, logits, q, dreg_B, there, classes, *options))

    looks = present is None and rows.at_hand(e[0])
    with torch.no_grad():
        if looks:
            dreg_B, reg_B, shares, magnitudes, dweights, dbias = call(None, None)
            info = shares, magnitudes, torch.ones(B, dtype=torch.bool, device=shares.device)
        # Where every attribution is above 0 nothing is missing, which need not be looked for then.
        if not looks or not bool((magnitudes > 0).all()):
            asked = values.ask(q, present, e, [None] * len(e))
            dreg_B, reg_B, shares, magnitudes, dweights, dbias = call(asked.counted, asked.present)
            info = asked.info(shares, magnitudes)
        found = {id(p.weight): dweight for p, dweight in zip(parts, dweights, strict=True)}
        if options[0] != "logit":
            found |= {id(p.bias): dbias for p in parts if p.bias is not None}
        return torch.dot(reg_B, dreg_B), info, found


def apart(own: Tensor, logits: Tensor) -> float:
    """How far the given logits are from the head's, in what rounding may make of them: that of 16 bits, for a model may
    have run under autocast and widened its logits. Mistakes (an order, dropout, another head) are far larger."""
    if own.shape != logits.shape:
        raise ValueError(f"AttributionRegularizer: logits must be {list(own.shape)}, got {list(logits.shape)}")
    own, logits = own.detach().double(), logits.detach().double()
    return float((own - logits).abs().max() / (5e-2 * (1e-3 + own.abs().max())))
