"""A dense model becomes a mixture of experts, in place (DMU, arXiv 2409.19291; Sparse Upcycling, arXiv 2212.05055;
Drop-Upcycling, arXiv 2502.19261)."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmbal.dense import MLPParts, describe_mlp
from mmbal.expert_init import (
    SharedDifferences,
    check_shared,
    choose_layers,
    draw_routers,
    make_experts,
    plan_experts,
    warn_of_same_experts,
)
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
    shared_expert=False,
    shared_weight=0.5,
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
    layers : "all", "last:M", "every:M" (the M-th, 2M-th, ...), "alternate" (every:2), a list of indices, or a dict
        that says one of these for each tower ("vision", "text" for CLIP); a tower that the dict does not name stays
        dense. Also as on the command line, "vision=all,text=last:4".
    expert_init : "sources" (``experts``; the default where they are given), "copy" (the default otherwise), "noise"
        (copies plus N(0, noise_std)), "drop" (Drop-Upcycling: a share ``drop_ratio`` of the hidden units is drawn
        again from the mean and deviation of what it replaces). Expert 0 stays an exact copy.
    router_init : "uniform" (+-1/sqrt(D), as ``nn.Linear`` and DMU), "normal:STD", "zeros" (ties go to the first K
        experts), a tensor [E, D], or a list of such tensors, one for each layer, the text tower's before the vision
        tower's.
    shared : where all other weights come from when there are sources: "base" (warns where sources differ from it),
        "mean" (of base and sources), or "strict" (they must be equal).
    activation : "auto" recognises it from the block.
    normalize, dropout : see :class:`MoEMLP`; dropout None keeps the block's.
    seed : of the router and of noise and drop. What is drawn depends on it, the sizes and the options alone: the same
        CLIP as a model of transformers and of open_clip gets the same routers and experts.
    shared_expert, shared_weight : one expert more, the model's own MLP, that every token takes (see :class:`MoEMLP`).
        E counts the routed ones, which are the same as without; ``include_base=False`` leaves those to the sources.

    Raises
    ------
    ValueError
        Names the argument, or the block or key of a source, and says what was expected.
    """
    blocks = _find_blocks(model, activation)
    chosen = _choose_blocks(blocks, layers)
    if experts is not None and not isinstance(experts, Sequence):
        raise ValueError(f"upcycle: experts must be a list of models or state dicts, got {type(experts).__name__}")
    if experts is not None and len(experts) == 0:
        raise ValueError("upcycle: experts must have at least one model or state dict, got none")
    sources = [_state_dict_of(source, j) for j, source in enumerate(experts or [])]
    plan = plan_experts(
        num_sources=len(sources),
        num_experts=num_experts,
        top_k=top_k,
        expert_init=expert_init,
        shared=shared,
        include_base=include_base,
        noise_std=noise_std,
        drop_ratio=drop_ratio,
        dropout=dropout,
        shared_expert=shared_expert,
        shared_weight=shared_weight,
    )
    generator = torch.Generator().manual_seed(seed)
    sizes = [(block.name, block.parts.fc1.in_features) for block in chosen]
    routers = draw_routers(sizes, plan.num_experts, router_init, generator)
    for j, source in enumerate(experts or []):
        if isinstance(source, nn.Module):
            _check_activations(source, chosen, j, activation)
    _check_sources(model, sources, chosen, blocks, shared)
    of_sources = [[_source_tensors(block, source) for source in sources] for block in chosen]
    if sources:
        names = ["the base"] * plan.include_base + [f"experts[{j}]" for j in range(len(sources))]
        bases = [[_base_tensors(block)] * plan.include_base for block in chosen]
        warn_of_same_experts((b + s for b, s in zip(bases, of_sources, strict=True)), names)

    mixtures = []
    for block, given, router_ED in zip(chosen, of_sources, routers, strict=True):
        made = make_experts(plan, _base_tensors(block), given, generator)
        mixtures.append(_make_mixture(block, plan, made, router_ED, top_k, normalize, dropout, shared_weight))
    if shared == "mean" and sources:
        _average_shared(model, sources, {key for block in chosen for key in block.tensor_keys()})
    for block, mixture in zip(chosen, mixtures, strict=True):
        setattr(block.parent, block.attribute, mixture)
    if type(model).__module__.startswith("transformers.models.clip."):
        from mmbal.integrations import clip_moe

        if type(model) in clip_moe.CLASSES:
            clip_moe.as_clip_moe(model)
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


def _choose_blocks(blocks, layers):
    """In the order of :func:`mmbal.expert_init.choose_layers`, which need not be the model's."""
    towers = {}
    for block in blocks:
        towers.setdefault(block.tower, []).append(block)
    counts = {tower: len(of_tower) for tower, of_tower in towers.items()}
    return [towers[tower][i] for tower, i in choose_layers(layers, counts)]


def _state_dict_of(source, j):
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    raise ValueError(f"upcycle: experts[{j}] must be a model or a state dict, got {type(source).__name__}")


def _check_sources(model, sources, chosen, blocks, shared):
    """The chosen MLPs must be there in the right shape; the other weights too where they are asked for."""
    own = model.state_dict()
    of_chosen = {key for block in chosen for key in block.tensor_keys() if key is not None}
    of_mlps = {key for block in blocks for key in block.tensor_keys() if key is not None}
    needed = of_chosen if shared == "base" else own
    compared = []
    for j, source in enumerate(sources):
        differences = SharedDifferences(f"experts[{j}]")
        for key, tensor in own.items():
            if key in needed:
                if key not in source:
                    raise ValueError(f"upcycle: experts[{j}] must have {key}")
                if source[key].shape != tensor.shape:
                    raise ValueError(
                        f"upcycle: experts[{j}]: {key} must be {list(tensor.shape)}, got {list(source[key].shape)}"
                    )
            if shared != "mean" and key not in of_mlps and key in source:
                differences.compare(key, tensor, source[key])
        compared.append(differences)
    check_shared(compared, shared, stacklevel=3)


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


def _base_tensors(block):
    fc1, fc2 = block.parts.fc1, block.parts.fc2
    return [fc1.weight, fc1.bias, fc2.weight, fc2.bias]


def _source_tensors(block, source):
    return [None if key is None else source[key] for key in block.tensor_keys()]


def _make_mixture(block, plan, experts, router_ED, top_k, normalize, dropout, shared_weight):
    parts, like = block.parts, block.parts.fc1.weight
    dim, hidden_dim, bias = parts.sizes
    mixture = MoEMLP(
        dim,
        hidden_dim,
        plan.num_experts,
        top_k,
        parts.activation,
        bias,
        normalize,
        parts.dropout if dropout is None else dropout,
        parts.output_dropout,
        shared_expert=plan.shared_expert,
        shared_weight=shared_weight,
        device=like.device,
        dtype=like.dtype,
    )
    for j, expert in enumerate(experts):
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
