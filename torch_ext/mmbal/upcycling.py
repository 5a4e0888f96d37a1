"""A dense model becomes a mixture of experts, in place (DMU, arXiv 2409.19291; Sparse Upcycling, arXiv 2212.05055;
Drop-Upcycling, arXiv 2502.19261)."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmbal.dense import MLPParts, describe_mlp
from mmbal.moe import MoEMLP


class _Block:
    """One ``mlp`` of the model: where it is and what it consists of."""

    def __init__(self, model, name, activation):
        self.name = name
        self.parent = model.get_submodule(name.rpartition(".")[0])
        self.attribute = name.rpartition(".")[2]
        self.mlp = model.get_submodule(name)
        self.parts: MLPParts = describe_mlp(self.mlp, name, activation)
        self.tower = _tower_of(name)

    def tensor_keys(self):
        """State-dict keys of w1, b1, w2, b2; None for a bias that is not there."""
        fc1, fc2 = (f"{self.name}.{linear}" for linear in self.parts.names)
        biased = self.parts.fc1.bias is not None
        return f"{fc1}.weight", f"{fc1}.bias" if biased else None, f"{fc2}.weight", f"{fc2}.bias" if biased else None


def _tower_of(name):
    """vision or text for the towers of transformers' and open_clip's CLIP, else what precedes the layer number."""
    prefix = re.split(r"\.\d+\.|^\d+\.", name)[0]
    if re.match(r"(vision|visual)", prefix):
        return "vision"
    if re.match(r"(text|transformer\b)", prefix):
        return "text"
    return prefix if prefix != name else "model"


def upcycle(
    model: nn.Module,
    experts=None,
    num_experts=None,
    top_k=2,
    layers="all",
    expert_init=None,
    router_init="uniform",
    shared="base",
    include_base=True,
    activation="auto",
    normalize=True,
    noise_std=0.02,
    drop_ratio=0.5,
    dropout=None,
    seed=0,
):
    """Replaces the ``mlp`` blocks of ``model`` by :class:`MoEMLP` layers, in place, and returns ``model``.

    Every sub-module called ``mlp`` that consists of two ``nn.Linear`` and an activation is a block: transformers'
    ``CLIPModel``, open_clip's towers, or any module of that form. Nothing is changed when an argument is refused.

    Parameters
    ----------
    experts : models, or state dicts, of the same architecture. Their MLPs become experts 1, 2, ...; expert 0 is the
        model's own unless ``include_base`` is False.
    num_experts : E. Follows from ``experts`` if they are given; otherwise 4 unless said.
    top_k : K, experts for each token.
    layers : "all", "last:M", "every:M" (the M-th, 2M-th, ...), a list of indices, or a dict that says one of these for
        each tower ("vision", "text" for CLIP); a tower that the dict does not name stays dense.
    expert_init : "sources" (``experts``; the default where they are given), "copy" (the default otherwise), "noise"
        (copies plus N(0, noise_std)), "drop" (Drop-Upcycling: a share ``drop_ratio`` of the hidden units is drawn
        again from the mean and deviation of what it replaces). Expert 0 stays an exact copy.
    router_init : "uniform" (+-1/sqrt(D), as ``nn.Linear`` and DMU), "normal:STD", "zeros", a tensor [E, D], or a list
        of such tensors, one for each layer.
    shared : where all other weights come from when there are sources: "base", "mean" (of base and sources), or
        "strict" (they must be equal).
    activation : "auto" recognises it from the block.
    normalize, dropout : see :class:`MoEMLP`; dropout None keeps the block's.
    seed : of the router and of noise and drop.

    Raises
    ------
    ValueError
        Names the argument, or the block or key of a source, and says what was expected.
    """
    blocks = _find_blocks(model, activation)
    chosen = _choose_layers(blocks, layers)
    if experts is not None and not isinstance(experts, Sequence):
        raise ValueError(f"upcycle: experts must be a list of models or state dicts, got {type(experts).__name__}")
    if experts is not None and len(experts) == 0:
        raise ValueError("upcycle: experts must have at least one model or state dict, got none")
    sources = [_state_dict_of(source, j) for j, source in enumerate(experts or [])]
    expert_init = expert_init or ("sources" if sources else "copy")
    E = _check_options(expert_init, sources, num_experts, include_base, top_k, shared, noise_std, drop_ratio)
    for j, source in enumerate(sources):
        _check_source(model, source, chosen, blocks, j, shared)
        if isinstance(experts[j], nn.Module):
            _check_activations(experts[j], chosen, j, activation)
    generator = torch.Generator().manual_seed(seed)
    routers = _draw_routers(chosen, E, router_init, generator)

    mixtures = []
    for block, router_ED in zip(chosen, routers, strict=True):
        base = _base_tensors(block)
        if expert_init == "sources":
            tensors = [base] if include_base else []
            tensors += [[None if key is None else source[key] for key in block.tensor_keys()] for source in sources]
        else:
            change = {"copy": _copy, "noise": _add_noise, "drop": _drop_units}[expert_init]
            amount = {"copy": None, "noise": noise_std, "drop": drop_ratio}[expert_init]
            tensors = [base] + [change(base, amount, generator) for _ in range(E - 1)]
        mixtures.append(_make_mixture(block, tensors, router_ED, top_k, normalize, dropout))
    if shared == "mean" and sources:
        _average_shared(model, sources, {key for block in chosen for key in block.tensor_keys()})
    for block, mixture in zip(chosen, mixtures, strict=True):
        setattr(block.parent, block.attribute, mixture)
    return model


def _find_blocks(model, activation):
    if not isinstance(model, nn.Module):
        raise ValueError(f"upcycle: model must be a torch.nn.Module, got {type(model).__name__}")
    names = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    if any(isinstance(model.get_submodule(name), MoEMLP) for name in names):
        raise ValueError("upcycle: model already has MoEMLP layers")
    if not names:
        raise ValueError(f"upcycle: model must have mlp blocks, {type(model).__name__} has no sub-module called mlp")
    try:
        return [_Block(model, name, activation) for name in names]
    except ValueError as error:
        raise ValueError(f"upcycle: {error}") from None


def _choose_layers(blocks, layers):
    towers = {}
    for block in blocks:
        towers.setdefault(block.tower, []).append(block)
    if not isinstance(layers, Mapping):
        layers = dict.fromkeys(towers, layers)
    if unknown := set(layers) - set(towers):
        raise ValueError(f"upcycle: layers must name towers among {sorted(towers)}, got {sorted(unknown)}")
    chosen = [block for tower, choice in layers.items() for block in _choose_in_tower(towers[tower], tower, choice)]
    if not chosen:
        raise ValueError(f"upcycle: layers must choose at least one layer, got {layers!r}")
    return chosen


def _choose_in_tower(blocks, tower, choice):
    count = len(blocks)
    if choice == "all":
        return blocks
    if isinstance(choice, str):
        kind, _, number = choice.partition(":")
        if kind in ("last", "every") and number.isdigit() and 1 <= int(number) <= count:
            return blocks[-int(number) :] if kind == "last" else blocks[int(number) - 1 :: int(number)]
    elif isinstance(choice, Sequence) and all(isinstance(i, int) and -count <= i < count for i in choice):
        return [blocks[i] for i in sorted({i % count for i in choice})]
    raise ValueError(
        f"upcycle: layers of {tower} must be all, last:M, every:M or indices, for {count} layers, got {choice!r}"
    )


def _state_dict_of(source, j):
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    raise ValueError(f"upcycle: experts[{j}] must be a model or a state dict, got {type(source).__name__}")


def _check_options(expert_init, sources, num_experts, include_base, top_k, shared, noise_std, drop_ratio):
    """Returns the number of experts."""
    if expert_init not in ("sources", "copy", "noise", "drop"):
        raise ValueError(f"upcycle: expert_init must be sources, copy, noise or drop, got {expert_init!r}")
    if (expert_init == "sources") != bool(sources):
        raise ValueError(f"upcycle: expert_init={expert_init!r} does not go with {len(sources)} experts given")
    if not include_base and not sources:
        raise ValueError("upcycle: include_base=False needs experts")
    E = len(sources) + include_base if sources else 4 if num_experts is None else num_experts
    if num_experts is not None and num_experts != E:
        raise ValueError(f"upcycle: num_experts must be {E} for {len(sources)} experts given, got {num_experts}")
    if E < 1:
        raise ValueError(f"upcycle: num_experts must be at least 1, got {E}")
    if not 1 <= top_k <= E:
        raise ValueError(f"upcycle: top_k must be from 1 to num_experts = {E}, got {top_k}")
    if shared not in ("base", "mean", "strict"):
        raise ValueError(f"upcycle: shared must be base, mean or strict, got {shared!r}")
    if noise_std < 0:
        raise ValueError(f"upcycle: noise_std must not be negative, got {noise_std}")
    if not 0 <= drop_ratio <= 1:
        raise ValueError(f"upcycle: drop_ratio must be in [0, 1], got {drop_ratio}")
    return E


def _check_source(model, source, chosen, blocks, j, shared):
    """The chosen MLPs must be there in the right shape; the other weights too where they are asked for."""
    own = model.state_dict()
    of_chosen = {key for block in chosen for key in block.tensor_keys() if key is not None}
    of_mlps = {key for block in blocks for key in block.tensor_keys() if key is not None}
    for key in own if shared != "base" else sorted(of_chosen):
        if key not in source:
            raise ValueError(f"upcycle: experts[{j}] must have {key}")
        if source[key].shape != own[key].shape:
            raise ValueError(
                f"upcycle: experts[{j}]: {key} must be {list(own[key].shape)}, got {list(source[key].shape)}"
            )
        if shared == "strict" and key not in of_mlps and not torch.equal(own[key], source[key]):
            raise ValueError(f"upcycle: shared='strict', but experts[{j}] differs from the model in {key}")


def _check_activations(source, chosen, j, activation):
    """A state dict does not tell its activation; a model does."""
    for block in chosen:
        try:
            found = describe_mlp(source.get_submodule(block.name), block.name, activation).activation
        except (AttributeError, ValueError) as error:
            raise ValueError(f"upcycle: experts[{j}]: {error}") from None
        if found != block.parts.activation:
            raise ValueError(
                f"upcycle: experts[{j}]: {block.name} must have activation {block.parts.activation}, got {found}"
            )


def _draw_routers(chosen, E, router_init, generator):
    """Router weights [E, D] for every chosen block."""
    dims = [block.parts.fc1.in_features for block in chosen]
    if isinstance(router_init, Tensor):
        router_init = [router_init] * len(chosen)
    if isinstance(router_init, str):
        kind, _, std = router_init.partition(":")
        if router_init == "uniform":
            return [(torch.rand(E, D, generator=generator) * 2 - 1) / D**0.5 for D in dims]
        if router_init == "zeros":
            return [torch.zeros(E, D) for D in dims]
        if kind == "normal" and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", std):
            return [torch.randn(E, D, generator=generator) * float(std) for D in dims]
    elif (
        isinstance(router_init, Sequence)
        and len(router_init) == len(chosen)
        and all(isinstance(t, Tensor) for t in router_init)
    ):
        for block, D, router in zip(chosen, dims, router_init, strict=True):
            if router.shape != (E, D):
                raise ValueError(f"upcycle: router_init for {block.name} must be [{E}, {D}], got {list(router.shape)}")
        return router_init
    raise ValueError(
        "upcycle: router_init must be uniform, zeros, normal:STD, a tensor [E, D] or one such tensor for each of the "
        f"{len(chosen)} layers, got {router_init if isinstance(router_init, str) else type(router_init).__name__!r}"
    )


def _base_tensors(block):
    fc1, fc2 = block.parts.fc1, block.parts.fc2
    return [fc1.weight, fc1.bias, fc2.weight, fc2.bias]


def _copy(tensors, amount, generator):
    return tensors


@torch.no_grad()
def _add_noise(tensors, std, generator):
    return [None if t is None else t + std * torch.randn(t.shape, generator=generator).to(t) for t in tensors]


@torch.no_grad()
def _drop_units(tensors, ratio, generator):
    """One set of hidden units for the whole expert: rows of w1 and b1, columns of w2. b2 belongs to no unit."""
    w1_FD, b1_F, w2_DF, b2_D = tensors
    F = w1_FD.shape[0]
    units = torch.randperm(F, generator=generator)[: round(ratio * F)].to(w1_FD.device)

    def redrawn(tensor, dim):
        if tensor is None or len(units) == 0:
            return tensor
        dropped = tensor.index_select(dim, units)
        noise = torch.randn(dropped.shape, generator=generator).to(tensor)
        return tensor.index_copy(dim, units, dropped.mean() + dropped.std(unbiased=False) * noise)

    return [redrawn(w1_FD, 0), redrawn(b1_F, 0), redrawn(w2_DF, 1), b2_D]


def _make_mixture(block, tensors, router_ED, top_k, normalize, dropout):
    parts, like = block.parts, block.parts.fc1.weight
    dim, hidden_dim, bias = parts.sizes
    mixture = MoEMLP(
        dim,
        hidden_dim,
        len(tensors),
        top_k,
        parts.activation,
        bias,
        normalize,
        parts.dropout if dropout is None else dropout,
        parts.output_dropout,
        device=like.device,
        dtype=like.dtype,
    )
    for j, expert in enumerate(tensors):
        mixture._set_expert(j, *expert)
    with torch.no_grad():
        mixture.router.weight.copy_(router_ED)
    return mixture.train(block.mlp.training)


@torch.no_grad()
def _average_shared(model, sources, expert_keys):
    for key, tensor in model.state_dict().items():
        if key not in expert_keys and tensor.is_floating_point():
            total = tensor.double() + sum(source[key].to(tensor.device).double() for source in sources)
            tensor.copy_(total / (1 + len(sources)))
