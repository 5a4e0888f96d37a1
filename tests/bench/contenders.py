"""What is compared: one mixture of experts, the same weights, four ways to run it; and the dense FFN as the yardstick.

Shape letters: N tokens, D width, F hidden width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import mmbal  # noqa: F401  (loads the operators)

ACTIVATION = "quick_gelu"


@dataclass(frozen=True)
class Shape:
    """One point of the comparison. routing: balanced, zipf (expert e has weight 1 / (e + 1)), one (all to expert 0)."""

    D: int
    F: int
    N: int
    E: int = 4
    K: int = 2
    routing: str = "balanced"
    dtype: str = "float32"
    threads: int = 2

    @property
    def rows(self) -> int:
        return self.N * self.K

    def gflop(self) -> float:
        """Two products forward, four backward."""
        return 6 * 2 * self.rows * self.D * self.F / 1e9

    def __str__(self) -> str:
        return (
            f"{self.D}x{self.F} N={self.N} E={self.E} K={self.K} {self.routing} {self.dtype} "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        )


def choose(shape: Shape, generator: torch.Generator) -> Tensor:
    """Which experts each token goes to, int64 [N, K]; "one" sends all first choices to expert 0."""
    N, E, K = shape.N, shape.E, shape.K
    if shape.routing == "balanced":
        shift = torch.arange(K)
        return (torch.randperm(N, generator=generator)[:, None] + shift) % E
    if shape.routing == "zipf":
        return torch.multinomial((1 / (1 + torch.arange(E))).expand(N, E), K, generator=generator)
    return torch.arange(K).expand(N, K).contiguous()


class Experts(nn.Module):
    """Stacked weights, in transformers' names."""

    def __init__(self, shape: Shape, generator: torch.Generator):
        super().__init__()
        dtype = getattr(torch, shape.dtype)

        def weight(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(*size, generator=generator) * scale).to(dtype))

        self.num_experts = shape.E
        self.up_proj = weight(shape.E, shape.F, shape.D, scale=shape.D**-0.5)
        self.up_proj_bias = weight(shape.E, shape.F, scale=0.1)
        self.down_proj = weight(shape.E, shape.D, shape.F, scale=shape.F**-0.5)
        self.down_proj_bias = weight(shape.E, shape.D, scale=0.1)
        self.act_fn = ACT2FN[ACTIVATION]


class Config:
    _experts_implementation = "eager"


@use_experts_implementation(has_gate=False, has_bias=True)
class TransformersExperts(nn.Module):
    """What transformers runs for non-gated experts with biases; the eager form is that of its Mixtral."""

    def __init__(self, config, experts: Experts):
        super().__init__()
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        for name, parameter in experts.named_parameters():
            setattr(self, name, parameter)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        final = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            expert_hit = expert_mask.sum(dim=(-1, -2)).greater(0).nonzero()
        for expert in expert_hit[:, 0]:
            position, token = torch.where(expert_mask[expert])
            hidden = F.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            hidden = F.linear(self.act_fn(hidden), self.down_proj[expert], self.down_proj_bias[expert])
            final.index_add_(0, token, (hidden * top_k_weights[token, position, None]).to(final.dtype))
        return final


def transformers_experts(implementation: str, experts: Experts) -> Callable:
    config = Config()
    config._experts_implementation = implementation
    module = TransformersExperts(config, experts)
    return lambda x, indices, weights: module(x, indices, weights.to(x.dtype))


def expert_loop(experts: Experts) -> Callable:
    """The fastest loop over torch's own products that we know: weights taken apart once, so that gradients are put
    together once."""

    def run(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        parts = (
            p.unbind(0) for p in (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
        )
        for expert, (w1, b1, w2, b2) in enumerate(zip(*parts, strict=True)):
            token, position = torch.where(indices == expert)
            hidden = F.linear(experts.act_fn(F.linear(x[token], w1, b1)), w2, b2)
            y = y.index_add(0, token, (hidden * weights[token, position, None]).to(x.dtype))
        return y

    return run


def ours(experts: Experts) -> Callable:
    def run(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        routing = torch.ops.mmbal.moe_dispatch(indices, experts.num_experts)
        return torch.ops.mmbal.expert_mlp(
            x,
            experts.up_proj,
            experts.up_proj_bias,
            experts.down_proj,
            experts.down_proj_bias,
            weights,
            *routing,
            ACTIVATION,
        )

    return run


class Problem:
    """Inputs and weights that every contender shares."""

    def __init__(self, shape: Shape, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.shape, dtype = shape, getattr(torch, shape.dtype)
        self.experts = Experts(shape, generator)
        self.x = torch.randn(shape.N, shape.D, generator=generator).to(dtype).requires_grad_()
        self.indices = choose(shape, generator)
        logits = torch.randn(shape.N, shape.K, generator=generator)
        self.weights = logits.softmax(1).requires_grad_()
        self.dy = torch.randn(shape.N, shape.D, generator=generator).to(dtype)
        self.dense_x = torch.randn(shape.rows, shape.D, generator=generator).to(dtype).requires_grad_()
        self.dense_dy = torch.randn(shape.rows, shape.D, generator=generator).to(dtype)
        self.dense_ffn = nn.Sequential(
            nn.Linear(shape.D, shape.F, dtype=dtype), ACT2FN[ACTIVATION], nn.Linear(shape.F, shape.D, dtype=dtype)
        )

    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, *self.experts.parameters(), self.dense_x, *self.dense_ffn.parameters()]

    def mixtures(self) -> dict[str, Callable]:
        """name -> a function of x, indices and weights."""
        return {
            "mmbal": ours(self.experts),
            "grouped_mm": transformers_experts("grouped_mm", self.experts),
            "eager": transformers_experts("eager", self.experts),
            "loop": expert_loop(self.experts),
        }

    def contenders(self, names: list[str] | None = None) -> dict[str, Callable[[], None]]:
        """name -> one forward and backward, with fresh gradients."""

        def step(run: Callable) -> Callable[[], None]:
            def once() -> None:
                for leaf in self.leaves():
                    leaf.grad = None
                run(self.x, self.indices, self.weights).backward(self.dy)

            return once

        def dense() -> None:
            for leaf in self.leaves():
                leaf.grad = None
            self.dense_ffn(self.dense_x).backward(self.dense_dy)

        steps = {name: step(run) for name, run in self.mixtures().items()} | {"dense": dense}
        return {name: steps[name] for name in names or steps}

    def check(self) -> None:
        """All contenders give the same outputs and gradients, or there is nothing to compare."""
        tolerance = 2e-4 if self.shape.dtype == "float32" else 0.2  # transformers adds up bias gradients in bfloat16
        reference = None
        for name, run in self.mixtures().items():
            leaves = [self.x, self.weights, *self.experts.parameters()]
            y = run(self.x, self.indices, self.weights)
            found = [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]
            reference = reference or found
            for a, b in zip(found, reference, strict=True):
                error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
                if error > tolerance:
                    raise AssertionError(f"{self.shape}: {name} differs from mmbal by {error:.1e} of the largest value")
