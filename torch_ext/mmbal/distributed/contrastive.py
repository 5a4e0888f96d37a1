"""CLIP's contrastive loss with the negatives of all processes (arXiv 2103.00020, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbal.methods.rows import every, gather_with_gradient, rank_of, ranks
from mmbal.routing import real_dtype


def clip_loss(
    images: Tensor, texts: Tensor, scale: Tensor | float, label_smoothing: float = 0.0, gather: bool = True, group=None
) -> Tensor:
    """Symmetric cross-entropy of ``scale images texts^T``, in which pair i is row i of both; a scalar.

    images, texts : [B, P] of unit length. scale : ``model.logit_scale.exp()``.
    gather : the negatives are those of every process of ``group`` (None: all processes); each classifies its own rows.
        The mean of the processes' losses is then the loss of the joined batch, and so are gradients that are averaged
        over the processes, as DistributedDataParallel and ``fully_shard`` do. Processes may have different numbers of
        pairs, also none. Every process must call it, and its backward, as often as the others.
        False: the negatives of this process alone.
    label_smoothing : share of each target that is spread over all pairs.

    The products are taken in the dtype of the rows (under autocast in its dtype), the cross-entropy in float32, or in
    float64 for float64 rows. Without any pair the loss is 0.
    """
    if images.dim() != 2 or images.shape != texts.shape:
        raise ValueError(
            f"clip_loss: images and texts must be [B, P] alike, got {list(images.shape)} and {list(texts.shape)}"
        )
    B, P = images.shape
    dtype = torch.promote_types(images.dtype, texts.dtype)
    images, texts = images.to(dtype), texts.to(dtype)
    if not gather or ranks(group) == 1:
        logits = (scale * images).to(dtype) @ texts.T
        return _mean_of_sides(logits, logits.T, 0, label_smoothing)
    found = every(group, [B, P])
    if (found[:, 1] != P).any():
        raise ValueError(f"clip_loss: images must be as wide in every process, got {found[:, 1].tolist()}")
    counts, rank = found[:, 0].tolist(), rank_of(group)
    joined = gather_with_gradient(torch.cat([images, texts], 1), counts, group)  # both travel at once
    all_images, all_texts = joined[:, :P], joined[:, P:]
    of_images, of_texts = (scale * images).to(dtype) @ all_texts.T, (scale * texts).to(dtype) @ all_images.T
    loss = _mean_of_sides(of_images, of_texts, sum(counts[:rank]), label_smoothing)
    share = len(counts) * B / max(sum(counts), 1)  # 1 where all have as many pairs
    return loss if share == 1 else loss * share


def _mean_of_sides(of_images: Tensor, of_texts: Tensor, first: int, label_smoothing: float) -> Tensor:
    B = of_images.shape[0]
    sides = [logits.to(real_dtype(logits.dtype)) for logits in (of_images, of_texts)]
    if B == 0:
        return sides[0].sum() + sides[1].sum()  # 0, and a backward that the other processes can meet
    target = torch.arange(first, first + B, device=of_images.device)
    return 0.5 * sum(F.cross_entropy(logits, target, label_smoothing=label_smoothing) for logits in sides)
