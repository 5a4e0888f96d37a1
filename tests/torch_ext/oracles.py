"""Independent references in plain torch and numpy: written from the formulas, sharing no code with mmbal.

Shape letters: N tokens, D width, F hidden width, E experts, K experts a token, R = N*K routed rows.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

FORWARD_TOLERANCE = {  # of the largest |value|
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}

ACTIVATIONS = {
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "gelu": lambda u: 0.5 * u * (1 + torch.erf(u / 2**0.5)),
    "gelu_tanh": lambda u: 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
    "relu": lambda u: u.clamp_min(0),
    "relu2": lambda u: u.clamp_min(0) ** 2,
    "silu": lambda u: u * torch.sigmoid(u),
    "identity": lambda u: u,
}


def assert_near(actual, expected, tolerance, what="", least_scale=0.0):
    """max |actual - expected| <= tolerance * max |expected|, or of least_scale, and nothing is NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    assert not actual.isnan().any(), f"{what}: NaN"
    error, scale = (actual - expected).abs().max().item(), max(expected.abs().max().item(), least_scale)
    assert error <= tolerance * scale, f"{what}: largest error {error:.3e} at scale {scale:.3e}, allowed {tolerance}"


def assert_compiles_in_one_graph(module, x, backend):
    """The compiled module has the gradients of the eager one, of ``x`` and of all parameters."""
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    eager = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    ours = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
    for a, b in zip(ours, eager, strict=True):
        assert_near(a, b, 6e-6)


def separated_logits(N, E, dtype=torch.float64, seed=0):
    """Logits in random order whose gaps within a row are at least 0.3, so that finite differences flip no choice."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(N, E, generator=generator).argsort(1)
    noise = torch.rand(N, E, generator=generator, dtype=torch.float64)
    return ((ranks - E / 2) * 0.4 + 0.1 * noise).to(dtype)


def topk(logits, k, normalize=True, selection_bias=None):
    """Choices in descending order of the biased logit, ties to the lower index; weights from the unbiased logits."""
    biased = logits if selection_bias is None else logits + selection_bias
    indices = torch.sort(biased, dim=1, descending=True, stable=True).indices[:, :k]
    if normalize:
        return torch.softmax(logits.gather(1, indices), 1), indices
    return torch.softmax(logits, 1).gather(1, indices), indices


def dispatch(indices, num_experts):
    """permutation [R], offsets [E+1], inverse [N, K] of a stable sort of the pairs n*K+k by expert."""
    flat = indices.numpy().ravel()
    permutation = np.argsort(flat, kind="stable")
    counts = np.array([np.sum(flat == e) for e in range(num_experts)])
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(flat.size)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return tuple(torch.from_numpy(a.astype(np.int64)) for a in (permutation, offsets, inverse.reshape(indices.shape)))


def expert_mlp(x, w1, b1, w2, b2, weights, indices, activation="quick_gelu", hidden_scale=None, output_scale=None):
    """y[n] = sum_k weights[n,k] * expert_{indices[n,k]}(x[n]), every expert run on every token.

    hidden_scale [N, K, F] and output_scale [N, K, D] hold mask / (1 - p) of the two dropouts.
    """
    y = torch.zeros_like(x)
    for k in range(indices.shape[1]):
        for e in range(w1.shape[0]):
            a = ACTIVATIONS[activation](x @ w1[e].T + (0 if b1 is None else b1[e]))
            if hidden_scale is not None:
                a = a * hidden_scale[:, k]
            o = a @ w2[e].T + (0 if b2 is None else b2[e])
            if output_scale is not None:
                o = o * output_scale[:, k]
            y = y + torch.where((indices[:, k] == e)[:, None], weights[:, k, None] * o, 0)
    return y


@dataclass
class Case:
    """The inputs of one expert_mlp call; `indices` is what the permutation came from."""

    x: torch.Tensor
    w1: torch.Tensor
    b1: torch.Tensor | None
    w2: torch.Tensor
    b2: torch.Tensor | None
    weights: torch.Tensor
    indices: torch.Tensor

    def arguments(self):
        return self.x, self.w1, self.b1, self.w2, self.b2, self.weights, *dispatch(self.indices, self.w1.shape[0])

    def differentiable(self):
        named = {name: getattr(self, name) for name in ("x", "w1", "b1", "w2", "b2", "weights")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def requiring_grad(self, *frozen):
        leaves = {k: v.detach().clone().requires_grad_(k not in frozen) for k, v in self.differentiable().items()}
        return replace(self, **leaves)

    def reference(self, **options):
        return expert_mlp(self.x, self.w1, self.b1, self.w2, self.b2, self.weights, self.indices, **options)

    def in_double(self):
        return replace(self, **{name: tensor.detach().double() for name, tensor in self.differentiable().items()})


def mlp_case(N=9, D=5, F=7, E=4, K=2, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    weights = torch.rand(N, K, generator=generator, dtype=torch.float64) + 0.1
    return Case(
        x=normal(N, D),
        w1=normal(E, F, D, scale=D**-0.5),
        b1=normal(E, F, scale=0.5) if bias else None,
        w2=normal(E, D, F, scale=F**-0.5),
        b2=normal(E, D, scale=0.5) if bias else None,
        weights=(weights / weights.sum(1, keepdim=True)).to(torch.float64 if dtype == torch.float64 else torch.float32),
        indices=torch.rand(N, E, generator=generator).argsort(1)[:, :K],
    )


def load_balance(logits, indices, token_mask=None, normalize="mixtral"):
    """c * E * sum_e F_e P_e over the counted tokens."""
    N, E = logits.shape
    mask = torch.ones(N, dtype=logits.dtype) if token_mask is None else token_mask.to(logits.dtype)
    counted = indices[:, :1] if normalize == "switch" else indices
    M = mask.sum().clamp_min(1)
    fractions = torch.stack([((counted == e).to(logits.dtype) * mask[:, None]).sum() for e in range(E)]) / M
    probabilities = (torch.softmax(logits, 1) * mask[:, None]).sum(0) / M
    scale = 1 / indices.shape[1] if normalize == "megatron" else 1
    return scale * E * (fractions * probabilities).sum()


def z_loss(logits, token_mask=None):
    mask = torch.ones(len(logits), dtype=logits.dtype) if token_mask is None else token_mask.to(logits.dtype)
    return (torch.logsumexp(logits, 1) ** 2 * mask).sum() / mask.sum().clamp_min(1)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011): counter [..., 4], key [2] of 32-bit words -> [..., 4]."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(counter, dtype=np.uint64)[..., i] for i in range(4))
    k0, k1 = (np.uint64(k) for k in key)
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ k0,
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ k1,
            product0 & low,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], -1)


HIDDEN, OUTPUT = 1, 2


def dropout_mask(shape, p, seed, offset, tensor):
    """Boolean mask over `shape` (row-major elements): kept where the uniform number of the element is >= p."""
    count = int(np.prod(shape))
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    last = ((offset >> 32) & 0xFFFFFF) << 8 | tensor
    fixed = [np.full_like(blocks, offset & 0xFFFFFFFF), np.full_like(blocks, last)]
    counter = np.stack([blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32), *fixed], -1)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).reshape(-1)[:count]
    return torch.from_numpy(((words >> np.uint64(8)).astype(np.float64) * 2.0**-24 >= p).reshape(shape))
