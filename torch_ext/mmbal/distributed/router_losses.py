"""Losses of routers whose tokens are spread over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmbal.methods.rows import ranks
from mmbal.moe import RouterLosses, RouterRecord
from mmbal.moe import router_losses as local_losses


def router_losses(
    routers, load_balance: float = 0.01, z: float = 0.0, normalize: str = "mixtral", group=None
) -> RouterLosses:
    """:func:`mmbal.router_losses`, a mean over layers, of the tokens of all processes of ``group`` (None: all).

    A router is in balance when each expert gets as many tokens of all processes together; the plain function asks for
    it in each process. The share of tokens of an expert is counted over all of them, the probabilities are those of
    this process, as Megatron-LM does it: the mean of the processes' losses is the loss of all tokens in one process,
    and so are averaged gradients. One exchange for all layers; every process must call it for the same layers.
    """
    records = list(routers)
    if not records or ranks(group) == 1:
        return local_losses(records, load_balance, z, normalize=normalize)
    if normalize not in ("mixtral", "megatron", "switch"):
        raise ValueError(f"router_losses: normalize must be mixtral, megatron or switch, got {normalize!r}")
    counts = [_counts(record, normalize) for record in records]
    joined = torch.cat(counts).double()
    dist.all_reduce(joined, group=group)
    totals = joined.split([len(c) for c in counts])
    pairs = [_of_layer(record, total, normalize, ranks(group)) for record, total in zip(records, totals, strict=True)]
    balance, z_loss = (torch.stack(losses).mean() for losses in zip(*pairs, strict=True))
    return RouterLosses(load_balance * balance + z * z_loss, balance, z_loss)


def _counts(record: RouterRecord, normalize: str) -> Tensor:
    """Choices of each expert that count, and the number of tokens that do: [E + 1] int64."""
    indices = record.indices if record.token_mask is None else record.indices[record.token_mask]
    chosen = indices[:, :1] if normalize == "switch" else indices
    total = indices.new_full((1,), indices.shape[0])
    return torch.cat([torch.bincount(chosen.flatten(), minlength=record.num_experts), total])


def _of_layer(record: RouterRecord, total_E1: Tensor, normalize: str, processes: int) -> tuple[Tensor, Tensor]:
    """Load-balance and z-loss; the formulas are in include/mmbal/router_loss.h."""
    logits = record.logits if record.token_mask is None else record.logits[record.token_mask]
    with torch.autocast(logits.device.type, enabled=False):
        M = total_E1[-1].clamp(min=1).to(logits.dtype)
        mean_E = logits.softmax(1).sum(0) * processes / M  # its mean over the processes is P
        shares_E = total_E1[:-1].to(logits.dtype) / M
        c = 1 / record.indices.shape[1] if normalize == "megatron" else 1
        balance = c * record.num_experts * (shares_E * mean_E).sum()
        return balance, logits.logsumexp(1).square().sum() * processes / M
