"""Fake kernels of AMSS's significance and update ratios; the formulas are in include/mmbal/significance.h."""

import torch
from torch.library import register_fake

from mmbal._library import check_devices, give_constants


@register_fake("mmbal::modal_stats")
def _(logits, features, targets_B, ignore_index=-100):
    for m, (of_logits, of_features) in enumerate(zip(logits, features, strict=True)):
        named = {f"logits[{m}]": of_logits, f"features[{m}]": of_features}
        check_devices("modal_stats", targets=targets_B, **named)
    M, C = len(logits), logits[0].shape[1]
    return tuple(targets_B.new_empty(size, dtype=torch.float64) for size in (M, M, C, 1))


@register_fake("mmbal::update_ratio")
def _(
    ce_sum_M,
    entropy_sum_M,
    histogram_C,
    rows_1,
    dims,
    tau,
    offset=0.5,
    lo=0.1,
    hi=0.9,
    mode="rate",
    bias=0.0,
    least_entropy=0.05,
    guard="clamp",
):
    check_devices("update_ratio", ce_sum=ce_sum_M, entropy_sum=entropy_sum_M, histogram=histogram_C, rows=rows_1)
    return ce_sum_M.new_empty(ce_sum_M.shape), ce_sum_M.new_empty(ce_sum_M.shape)


@register_fake("mmbal::ratio_of_rates")
def _(rate_M, tau, lo=0.1, hi=0.9, bias=0.0):
    return rate_M.new_empty(rate_M.shape)


for _name in ("modal_stats", "update_ratio", "ratio_of_rates"):
    give_constants(_name)
