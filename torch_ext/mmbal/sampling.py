"""Fake kernels of sampling without replacement; the laws are in include/mmbal/sampling.h. On CUDA weights, k,
kappa and rho that the CPU refuses end the launch, as an index out of range does in torch: the process can use the GPU
no more."""

import torch
from torch.library import register_fake

from mmbal._library import check_devices, give_constants


@register_fake("mmbal::weighted_sample")
def _(w_SN, k_S, seed, step):
    check_devices("weighted_sample", w=w_SN, k=k_S)
    return w_SN.new_empty(w_SN.shape, dtype=torch.bool)


@register_fake("mmbal::waterfill")
def _(w_SN, kappa_S, lam):
    check_devices("waterfill", w=w_SN, kappa=kappa_S)
    return w_SN.new_empty(w_SN.shape), w_SN.new_empty(w_SN.shape[0], dtype=torch.float64)


@register_fake("mmbal::mask_units")
def _(energy_U, segments, rho_M, seed, step, sampler="bottomk", lam=0.5, unbiased=False):
    check_devices("mask_units", energy=energy_U, rho=rho_M)
    return energy_U.new_empty(energy_U.shape), energy_U.new_empty(energy_U.shape)


for _name in ("weighted_sample", "waterfill", "mask_units"):
    give_constants(_name)
