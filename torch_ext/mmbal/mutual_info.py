"""Fake kernels of the estimators of mutual information; the formulas are in include/mmbal/mutual_info.h. They count, so
their gradient is 0 wherever it exists: their results require none, as those of argmax do not. On CUDA a class that the
CPU refuses ends the launch, as an index out of range does in torch (the process can use the GPU no more), and
``num_classes=-1`` means classes below 32768."""

import torch
from torch.library import register_fake

from mmbal._library import check_devices, give_constants


@register_fake("mmbal::ksg_mutual_info")
def _(x_NM, y_N, present_NM=None, neighbors=3, standardize=True, jitter=0.0, seed=0):
    check_devices("ksg_mutual_info", x=x_NM, y=y_N, present=present_NM)
    return x_NM.new_empty(x_NM.shape[1], dtype=torch.float64)


@register_fake("mmbal::discrete_mutual_info")
def _(a_MN, b_N, present_NM=None, num_classes=-1):
    check_devices("discrete_mutual_info", a=a_MN, b=b_N, present=present_NM)
    return a_MN.new_empty(a_MN.shape[0], dtype=torch.float64)


for _name in ("ksg_mutual_info", "discrete_mutual_info"):
    give_constants(_name)
