"""A mixture of MLP experts that takes the place of an ``mlp`` sub-module, and what trains its router."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.dense import ACTIVATIONS, DenseMLP, describe_mlp
from mmbal.routing import real_dtype


class Experts(nn.Module):
    """The stacked weights of E two-layer MLPs, oriented like ``nn.Linear``: w1 [E, F, D], b1 [E, F], w2 [E, D, F],
    b2 [E, D]. Without bias b1 and b2 are None."""

    def __init__(self, num_experts, dim, hidden_dim, bias=True, device=None, dtype=None):
        super().__init__()
        to = {"device": device, "dtype": dtype}
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, **to))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, **to))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden_dim, **to)) if bias else None
        self.b2 = nn.Parameter(torch.empty(num_experts, dim, **to)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """Uniform in +-1/sqrt(fan in), the initialisation of ``nn.Linear``."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)


class Router(nn.Linear):
    """x [N, D] -> logits [N, E] in float32 (float64 for float64 input), also under autocast."""

    def forward(self, x_ND: Tensor) -> Tensor:
        return router_logits(x_ND, self.weight, self.bias)


class _FirstWeights(NamedTuple):
    weight: Tensor


class MoEMLP(nn.Module):
    """Mixture of two-layer MLPs with a linear top-k router (DMU, arXiv 2409.19291, section 4).

    Takes the place of an ``mlp`` sub-module: input and output are [..., D] in any layout. No capacity, no dropped
    token. The router works in float32 (float64 for float64 input), also under autocast.

    Parameters
    ----------
    dim, hidden_dim : width D and expert hidden width F.
    num_experts, top_k : E, and K <= E experts for each token.
    activation : quick_gelu, gelu, gelu_tanh, relu, relu2, silu or identity.
    bias : whether the experts have biases.
    normalize : weights are the softmax of the K kept logits (True, as in DMU) or the K entries of the softmax over all.
    dropout, output_dropout : probability of dropping a hidden unit, an output of an expert, while training. The masks
        follow torch's default generator: ``torch.manual_seed`` repeats them.
    router_bias : whether the router has a bias.
    shared_expert, shared_weight : one expert more, stored last in ``experts`` ([E + 1, ...]; the router stays [E, D]),
        that every token takes with weight ``shared_weight`` in [0, 1); the weights of the others are multiplied by
        1 - shared_weight. An expert that is always on is that of Nexus (arXiv 2408.15901), which adds its output; that
        the weights sum to one is ours, so that copies of one MLP still compute what it computes.
    """

    def __init__(
        self,
        dim,
        hidden_dim,
        num_experts,
        top_k=2,
        activation="quick_gelu",
        bias=True,
        normalize=True,
        dropout=0.0,
        output_dropout=0.0,
        router_bias=False,
        shared_expert=False,
        shared_weight=0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"MoEMLP: {name} must be at least 1, got {value}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MoEMLP: top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MoEMLP: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        shares = {"dropout": dropout, "output_dropout": output_dropout, "shared_weight": shared_weight}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"MoEMLP: {name} must be in [0, 1), got {value}")
        warn_of_constant_weights("MoEMLP", top_k, normalize)
        self.dim, self.hidden_dim, self.num_experts, self.top_k = dim, hidden_dim, num_experts, top_k
        self.activation, self.normalize = activation, normalize
        self.dropout, self.output_dropout = dropout, output_dropout
        self.shared_expert, self.shared_weight = bool(shared_expert), shared_weight
        self.router = Router(dim, num_experts, bias=router_bias, device=device, dtype=dtype)
        self.experts = Experts(num_experts + self.shared_expert, dim, hidden_dim, bias, device, dtype)
        self._records = None  # a list while collect_router is active
        self._packed = None  # the PackedWeights that mmbal.pack made

    @classmethod
    def from_mlps(
        cls, mlps, top_k=2, activation="auto", dropout=None, output_dropout=None, shared_expert=False, **options
    ):
        """A mixture whose expert j is ``mlps[j]``: modules with two Linears of the same sizes.

        Activation and dropouts are taken from the first of them unless given. The router starts as ``nn.Linear`` does.
        With ``shared_expert`` the last of ``mlps`` is the one that every token takes.
        """
        if len(mlps) <= bool(shared_expert):
            least = "two modules, the last is the shared expert" if shared_expert else "one module"
            raise ValueError(f"MoEMLP.from_mlps: mlps must have at least {least}, got {len(mlps) or 'none'}")
        parts = [describe_mlp(mlp, f"mlps[{j}]", activation) for j, mlp in enumerate(mlps)]
        first = parts[0]
        for j, part in enumerate(parts):
            for what in ("sizes", "activation"):
                if getattr(part, what) != getattr(first, what):
                    raise ValueError(
                        f"MoEMLP.from_mlps: mlps[{j}] must have {what} {getattr(first, what)} as mlps[0] has, "
                        f"got {getattr(part, what)}"
                    )
        dim, hidden_dim, bias = first.sizes
        weight = first.fc1.weight
        moe = cls(
            dim,
            hidden_dim,
            len(mlps) - bool(shared_expert),
            top_k,
            first.activation,
            bias,
            dropout=first.dropout if dropout is None else dropout,
            output_dropout=first.output_dropout if output_dropout is None else output_dropout,
            shared_expert=shared_expert,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        with torch.no_grad():
            for j, part in enumerate(parts):
                moe._set_expert(j, part.fc1.weight, part.fc1.bias, part.fc2.weight, part.fc2.bias)
        return moe.train(mlps[0].training)

    @torch.no_grad()
    def _set_expert(self, j, w1_FD, b1_F, w2_DF, b2_D):
        self.experts.w1[j].copy_(w1_FD)
        self.experts.w2[j].copy_(w2_DF)
        if self.experts.b1 is not None:
            self.experts.b1[j].copy_(b1_F)
            self.experts.b2[j].copy_(b2_D)

    @property
    def c_fc(self) -> _FirstWeights:
        """open_clip's text tower asks ``mlp.c_fc.weight`` of its first block for the dtype that it computes in."""
        return _FirstWeights(self.experts.w1)

    def extra_repr(self):
        return (
            f"dim={self.dim}, hidden_dim={self.hidden_dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"activation={self.activation!r}, normalize={self.normalize}, dropout={self.dropout}, "
            f"output_dropout={self.output_dropout}"
            + (f", shared_expert=True, shared_weight={self.shared_weight}" if self.shared_expert else "")
        )

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """x [..., D] -> y [..., D]. token_mask [...] (bool): tokens that the router losses count; all are routed."""
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"MoEMLP: x must be [..., {self.dim}], got {list(x.shape)}")
        if token_mask is not None and token_mask.dtype != torch.bool:
            raise ValueError(f"MoEMLP: token_mask must be bool, got {token_mask.dtype}")
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ValueError(f"MoEMLP: token_mask must be {list(x.shape[:-1])}, got {list(token_mask.shape)}")
        x_ND = x.reshape(-1, self.dim)
        logits_NE = self.router(x_ND)
        weights_NK, indices_NK = ops.moe_topk(logits_NE, self.top_k, self.normalize)
        if self._records is not None and not _is_recomputing():
            self._records.append((logits_NE, indices_NK, None if token_mask is None else token_mask.reshape(-1)))
        if self.shared_expert:
            weights_NK = F.pad(weights_NK * (1 - self.shared_weight), (0, 1), value=self.shared_weight)
            indices_NK = F.pad(indices_NK, (0, 1), value=self.num_experts)
        dropouts = (self.dropout, self.output_dropout) if self.training else (0.0, 0.0)
        return self._mix(x_ND, weights_NK, indices_NK, *dropouts).reshape(x.shape)

    def _mix(self, x_ND, weights_NK, indices_NK, *dropouts):
        packed = self._packed and self._packed.panels_for(self, x_ND)
        return mix_experts(self.experts, x_ND, weights_NK, indices_NK, self.activation, *dropouts, packed=packed)

    def train(self, mode: bool = True):
        if mode:
            self._packed = None
        return super().train(mode)

    def _load_from_state_dict(self, *arguments, **options):
        self._packed = None
        super()._load_from_state_dict(*arguments, **options)

    def _apply(self, *arguments, **options):
        self._packed = None
        return super()._apply(*arguments, **options)

    def __getstate__(self):
        return super().__getstate__() | {"_packed": None}

    def to_dense(self, expert: int) -> DenseMLP:
        """A copy of one expert as an ordinary MLP with ``fc1`` and ``fc2``; the shared expert is ``num_experts``."""
        last = self.num_experts - 1 + self.shared_expert
        if not 0 <= expert <= last:
            raise ValueError(f"MoEMLP.to_dense: expert must be from 0 to {last}, got {expert}")
        experts = self.experts
        if _is_split(experts.w1):
            raise NotImplementedError(
                "MoEMLP.to_dense: experts are split over processes; load the full state dict into a whole model first"
            )
        dense = DenseMLP(self.dim, self.hidden_dim, self.activation, bias=experts.b1 is not None)
        dense = dense.to(experts.w1.device, experts.w1.dtype).train(self.training)
        with torch.no_grad():
            dense.fc1.weight.copy_(experts.w1[expert])
            dense.fc2.weight.copy_(experts.w2[expert])
            if experts.b1 is not None:
                dense.fc1.bias.copy_(experts.b1[expert])
                dense.fc2.bias.copy_(experts.b2[expert])
        return dense


def warn_of_constant_weights(who: str, top_k: int, normalize: bool, stacklevel: int = 3) -> None:
    """Warns, in the name of ``who``, where a router would get no gradient from the task."""
    if top_k == 1 and normalize:
        warnings.warn(
            f"{who}: with top_k=1 and normalize=True every weight is 1 and the router learns nothing from the task;"
            " use normalize=False",
            stacklevel=stacklevel,
        )


def router_logits(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Logits [N, E] of a linear router, in float32 (float64 for float64 input), also under autocast."""
    dtype = real_dtype(x_ND.dtype)
    with _no_autocast(x_ND.device.type):
        return F.linear(x_ND.to(dtype), weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))


def mix_experts(
    experts: Experts,
    x_ND: Tensor,
    weights_NK: Tensor,
    indices_NK: Tensor,
    activation: str,
    dropout: float = 0.0,
    output_dropout: float = 0.0,
    packed: Tensor | None = None,
) -> Tensor:
    """y [N, D]: for each row the sum of its K experts' outputs times ``weights_NK``.

    Masks of the dropouts follow torch's default generator; ``packed`` are panels of the weights (:mod:`mmbal.packing`),
    for a forward without dropout and gradient.
    """
    routing = ops.moe_dispatch(indices_NK, experts.w1.shape[0])
    arguments = (x_ND, experts.w1, experts.b1, experts.w2, experts.b2, weights_NK, *routing)
    if packed is not None:
        y_ND, _ = ops.expert_mlp_forward(*arguments, activation, 0.0, 0.0, 0, 0, False, packed=packed)
        return y_ND
    options = {"activation": activation}
    if dropout > 0 or output_dropout > 0:
        options |= {"dropout": dropout, "output_dropout": output_dropout, "seed": _draw_seed()}
    return ops.expert_mlp(*arguments, **options)


def _no_autocast(device_type):
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def _draw_seed() -> int:
    """A seed from torch's default generator, which checkpointing restores: a recomputed mask is the same mask."""
    return int(torch.randint(2**62, ()))


def _is_recomputing() -> bool:
    """Whether this forward repeats an earlier one inside a backward, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RouterRecord(NamedTuple):
    """What the router of one mixture layer decided in one forward."""

    name: str  # of the layer in the model
    logits: Tensor  # [N, E]
    indices: Tensor  # [N, K], without the shared expert
    token_mask: Tensor | None  # [N]
    num_experts: int
    trained: bool = False  # whether the router asks for a gradient

    @property
    def counts(self) -> Tensor:
        """How many of the counted tokens chose each expert, [E] int64."""
        chosen = self.indices if self.token_mask is None else self.indices[self.token_mask]
        return torch.bincount(chosen.flatten(), minlength=self.num_experts)


class RouterRecords(Sequence):
    """The records of ``collect_router``, layer by layer; it fills while the model runs."""

    def __init__(self, layers):  # [(name, MoEMLP)]
        # Contexts may be nested: they share a layer's list, and each looks at what came after it began.
        self._parts = [(name, layer, layer._records, len(layer._records)) for name, layer in layers]

    def _flat(self):
        return [
            RouterRecord(name, *entry, layer.num_experts, layer.router.weight.requires_grad)
            for name, layer, entries, start in self._parts
            for entry in entries[start:]
        ]

    def _close(self):
        self._parts = [(name, layer, entries[start:], 0) for name, layer, entries, start in self._parts]

    def __len__(self):
        return sum(len(entries) - start for _, _, entries, start in self._parts)

    def __getitem__(self, index):
        return self._flat()[index]

    def __iter__(self) -> Iterator[RouterRecord]:
        return iter(self._flat())


@contextmanager
def collect_router(model: nn.Module):
    """Records what every :class:`MoEMLP` of ``model`` decides while the block runs.

    >>> with mmbal.collect_router(model) as routers:
    ...     loss = task_loss(model(batch))
    >>> loss = loss + mmbal.router_losses(routers).total

    A forward that activation checkpointing repeats is counted once. Works around and inside ``torch.compile``; where
    blocks are compiled one by one inside a checkpoint, call backward after the ``with`` block. With
    reentrant checkpointing the first forward runs without gradients, so the losses cannot train the router: use
    ``use_reentrant=False``.
    """
    layers = [(name.replace("_orig_mod.", ""), m) for name, m in model.named_modules() if isinstance(m, MoEMLP)]
    if not layers:
        raise ValueError(f"collect_router: model must have MoEMLP layers, {type(model).__name__} has none")
    began = [layer for _, layer in layers if layer._records is None]
    for layer in began:
        layer._records = []
    routers = RouterRecords(layers)
    try:
        yield routers
    finally:
        routers._close()
        for layer in began:
            layer._records = None


class RouterLosses(NamedTuple):
    """``total`` is weighted and ready to be added to a loss; the others are the plain values, for a log."""

    total: Tensor
    load_balance: Tensor
    z: Tensor


def router_losses(routers, load_balance=0.01, z=0.0, pool="per_layer_mean", normalize="mixtral") -> RouterLosses:
    """Load-balance and z-loss of the collected routers.

    Parameters
    ----------
    routers : what ``collect_router`` yields, or a list of :class:`RouterRecord`.
    load_balance, z : coefficients in ``total``. 0.01 is DMU's (arXiv 2409.19291, section 4); ST-MoE uses z = 1e-3.
    pool : "per_layer_mean" (mean of the layers' losses, the paper) or "pooled" (one loss over the tokens of all
        layers, as transformers and CLIP-MoE's code do; it cannot see layers that collapse onto different experts).
    normalize : "mixtral", "megatron" or "switch", see include/mmbal/router_loss.h.
    """
    records = list(routers)
    if not records:
        raise ValueError("router_losses: routers must have at least one record; run the model inside collect_router")
    if pool not in ("per_layer_mean", "pooled"):
        raise ValueError(f"router_losses: pool must be per_layer_mean or pooled, got {pool!r}")
    if torch.is_grad_enabled() and any(r.trained and not r.logits.requires_grad for r in records):
        warnings.warn(
            "router_losses: the logits carry no gradient, so these losses train nothing; was the forward under no_grad"
            " or reentrant checkpointing?",
            stacklevel=2,
        )
    if pool == "pooled":
        records = [_pool(records)]
    balance = torch.stack(
        [ops.load_balance_loss(r.logits, r.indices, r.token_mask, normalize=normalize) for r in records]
    ).mean()
    z_loss = torch.stack([ops.router_z_loss(r.logits, r.token_mask) for r in records]).mean()
    return RouterLosses(load_balance * balance + z * z_loss, balance, z_loss)


def _pool(records):
    sizes = {(r.num_experts, r.indices.shape[1]) for r in records}
    if len(sizes) > 1:
        raise ValueError(f"router_losses: pooled layers must agree in (num_experts, top_k), got {sorted(sizes)}")
    mask = None
    if any(r.token_mask is not None for r in records):
        mask = torch.cat(
            [
                torch.ones_like(r.indices[:, 0], dtype=torch.bool) if r.token_mask is None else r.token_mask
                for r in records
            ]
        )
    logits, indices = torch.cat([r.logits for r in records]), torch.cat([r.indices for r in records])
    return RouterRecord("pooled", logits, indices, mask, records[0].num_experts, records[0].trained)


def freeze_except_router(model: nn.Module) -> list[str]:
    """Leaves only the routers of ``model``'s :class:`MoEMLP` layers trainable; returns the names of their parameters.

    Routers are found by module type, never by name. It warns of a layer whose experts are all the same, unless they are
    split over processes.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MoEMLP)]
    if not layers:
        raise ValueError(f"freeze_except_router: model must have MoEMLP layers, {type(model).__name__} has none")
    if any(_has_copies_alone(layer) for _, layer in layers):
        warnings.warn(
            "freeze_except_router: a layer's experts are all the same, so the task gives its router no gradient",
            stacklevel=2,
        )
    model.requires_grad_(False)
    trained = []
    for name, layer in layers:
        layer.router.requires_grad_(True)
        trained += [f"{name}.router.{p}" if name else f"router.{p}" for p, _ in layer.router.named_parameters()]
    return trained


def _has_copies_alone(layer):
    """Whether all routed experts are the same; the small tensors first, which tell most layers apart. Not where they
    are split over processes: no process has them all, and freezing must not wait for the others."""
    E, experts = layer.num_experts, layer.experts
    tensors = [t for t in (experts.b2, experts.b1, experts.w2, experts.w1) if t is not None]
    if E == 1 or any(t.is_meta or _is_split(t) for t in tensors):
        return False
    return all(bool((t[1:E] == t[:1]).all()) for t in tensors)


def _is_split(tensor):
    """Whether it is a DTensor, whose module is not imported without need."""
    return hasattr(tensor, "to_local")
