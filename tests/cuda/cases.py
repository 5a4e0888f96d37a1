"""One small call of every operator that runs on CUDA, as a function of its floating-point tensors on any device."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import oracles

ops = torch.ops.mmbal
REAL = {torch.float64: torch.float64}


def real(dtype):
    return REAL.get(dtype, torch.float32)


@dataclass
class Case:
    """tensors: differentiable inputs on the CPU. others: what else `call` takes by name."""

    name: str
    call: Callable
    tensors: list[Tensor]
    others: dict = field(default_factory=dict)

    def arguments(self, device, requires_grad=True):
        tensors = [t.detach().to(device).requires_grad_(requires_grad) for t in self.tensors]
        others = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.others.items()}
        return tensors, others

    def results(self, device):
        """Outputs, and the gradients of a fixed combination of the floating-point ones."""
        tensors, others = self.arguments(device)
        outputs = self.outputs(tensors, others)
        return outputs, self.gradients(outputs, tensors)

    def outputs(self, tensors, others):
        outputs = self.call(*tensors, **others)
        if isinstance(outputs, Tensor):
            return [outputs]
        return list(outputs)

    def gradients(self, outputs, tensors):
        differentiable = [o for o in outputs if o.requires_grad]
        if not differentiable:
            return []
        upstream = []
        for i, o in enumerate(differentiable):
            generator = torch.Generator().manual_seed(i)
            upstream.append(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype))
        gradients = torch.autograd.grad(differentiable, tensors, upstream, allow_unused=True)
        return [g for g in gradients if g is not None]


FAMILIES = {
    "moe": "routing",
    "router": "router_loss",
    "expert": "expert_mlp",
    "gaussian": "divergence",
    "residual": "divergence",
    "categorical": "divergence",
    "btw": "btw",
    "scale": "btw",
}


def family_of(case: Case) -> str:
    """The file in ops/cuda of the case's operator."""
    return FAMILIES[re.split("[_ ]", case.name)[0]]


def routing(N, dtype, E=5, K=2, normalize=True, bias=False):
    logits = oracles.separated_logits(N, E, dtype)
    selection_bias = torch.linspace(-1, 1, E, dtype=real(dtype)) if bias else None
    return Case(
        f"moe_topk {N} x {E}, {K}, {'normalized, ' if normalize else ''}{dtype}",
        lambda logits, selection_bias: ops.moe_topk(logits, K, normalize, selection_bias),
        [logits],
        {"selection_bias": selection_bias},
    )


def dispatch(N, E=5, K=2):
    indices = torch.rand(N, E, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :K]
    return Case(
        f"moe_dispatch {N} x {K} of {E}",
        lambda indices: ops.moe_dispatch(indices, E),
        [],
        {"indices": indices},
    )


def losses(N, dtype, E=5, K=2, normalize="mixtral", masked=False):
    logits = oracles.separated_logits(N, E, dtype)
    others = {
        "indices": oracles.topk(logits.double(), K)[1],
        "mask": torch.arange(N) % 3 != 1 if masked else None,
    }
    return Case(
        f"router losses {N} x {E}, {normalize}, {dtype}{', masked' if masked else ''}",
        lambda logits, indices, mask: (
            ops.load_balance_loss(logits, indices, mask, normalize),
            ops.router_z_loss(logits, mask),
        ),
        [logits],
        others,
    )


def experts(N, dtype, D=16, F=24, E=4, K=2, activation="quick_gelu", dropout=0.0, output_dropout=0.0, only=None):
    generator = torch.Generator().manual_seed(3)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    indices = torch.rand(N, E, generator=generator).argsort(1)[:, :K]
    if only is not None:
        indices = torch.full((N, K), only)
    permutation, offsets, inverse = ops.moe_dispatch(indices, E)
    tensors = [
        random(N, D),
        random(E, F, D, scale=D**-0.5),
        random(E, F, scale=0.3),
        random(E, D, F, scale=F**-0.5),
        random(E, D, scale=0.3),
        torch.rand(N, K, generator=generator, dtype=torch.float64).to(real(dtype)),
    ]
    return Case(
        f"expert_mlp {N} x {D} x {F}, {E} experts, {activation}, {dtype}, dropout {dropout} {output_dropout}"
        + ("" if only is None else ", one expert"),
        lambda x, w1, b1, w2, b2, weights, permutation, offsets, inverse: ops.expert_mlp(
            x, w1, b1, w2, b2, weights, permutation, offsets, inverse, activation, dropout, output_dropout, 11, 5
        ),
        tensors,
        {"permutation": permutation, "offsets": offsets, "inverse": inverse},
    )


def divergences(N, dtype, M=3, C=5):
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mu, log_sigma, fused_mu, fused_log_sigma, target = random(N, M), random(N, M), random(N), random(N), random(N)
    logits, fused_logits = random(M, N, C), random(N, C)
    return [
        Case(f"gaussian_kl {N} x {M}, {dtype}", ops.gaussian_kl, [mu, log_sigma, fused_mu, fused_log_sigma]),
        Case(f"residual_kl {N} x {M}, {dtype}", lambda *t: ops.residual_kl(*t, 0.1), [mu, fused_mu, target]),
        Case(f"categorical_kl {M} x {N} x {C}, {dtype}", ops.categorical_kl, [logits, fused_logits]),
        Case(
            f"categorical_kl {M} x {N} x {C}, reverse, {dtype}",
            lambda *t: ops.categorical_kl(*t, True),
            [logits, fused_logits],
        ),
    ]


def modality_weights(N, dtype, M=3, d=24):
    generator = torch.Generator().manual_seed(6)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    kl, mi, present = (4 * random(N, M)).to(dtype), 0.1 + random(M), random(N, M) < 0.7
    embeddings = [random(N, d + m).to(dtype) for m in range(M)]
    return [
        Case(f"btw_weights {N} x {M}, {dtype}", lambda kl, mi: ops.btw_weights(kl, mi), [kl, mi]),
        Case(
            f"btw_weights {N} x {M}, agree, {dtype}",
            lambda kl, mi, present: ops.btw_weights(kl, mi, present, 1e-5, 3.0, "agree", 2.0, True),
            [kl, mi],
            {"present": present},
        ),
        Case(
            f"scale_modalities {N} x {d}, {dtype}",
            lambda w, *embeddings: ops.scale_modalities(list(embeddings), w),
            [random(N, M).to(real(dtype)), *embeddings],
        ),
    ]


def cases(dtype, family=None) -> list[Case]:
    return [case for case in all_cases(dtype) if family in (None, family_of(case))]


def all_cases(dtype) -> list[Case]:
    found = []
    for N in (0, 1, 37, 1000):
        found += [
            routing(N, dtype),
            routing(N, dtype, normalize=False, bias=True),
            routing(N, dtype, E=70, K=6, normalize=False),
            dispatch(N),
            dispatch(N, E=300, K=3),
            losses(N, dtype, masked=True),
            losses(N, dtype, E=64, K=4, normalize="megatron"),
            experts(N, dtype),
            *divergences(N, dtype),
            *modality_weights(N, dtype),
        ]
    found += [
        *divergences(40, dtype, M=17, C=1000),
        dispatch(200_000, E=8),
        losses(50_000, dtype, E=8, normalize="switch"),
        experts(50, dtype, D=17, F=65, activation="gelu", dropout=0.25, output_dropout=0.1),
        experts(50, dtype, D=16, F=32, activation="silu", dropout=0.25, output_dropout=0.1),
        experts(70, dtype, D=64, F=128, E=6, activation="gelu_tanh"),
        experts(30, dtype, activation="relu"),
        experts(30, dtype, activation="relu2"),
        experts(30, dtype, activation="identity"),
        experts(300, dtype, D=128, F=192, E=8, K=2),
        experts(40, dtype, K=1, only=2),
    ]
    return found


def small_cases() -> list[Case]:
    """Float64, for finite differences and compute-sanitizer."""
    return [
        routing(6, torch.float64),
        routing(6, torch.float64, normalize=False, bias=True),
        routing(3, torch.float64, E=40, K=3, normalize=False),
        losses(7, torch.float64, masked=True),
        losses(5, torch.float64, E=40, K=2, normalize="switch"),
        experts(5, torch.float64, D=3, F=4, E=3, activation="gelu"),
        experts(4, torch.float64, D=3, F=6, E=2, dropout=0.3, output_dropout=0.3, activation="silu"),
        *divergences(4, torch.float64, M=2, C=3),
        *divergences(2, torch.float64, M=2, C=40)[2:],
        *modality_weights(4, torch.float64, M=2, d=3),
    ]
