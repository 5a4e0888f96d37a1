"""Upcycling of checkpoints, without a model: what :func:`mmbal.upcycle` does, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmbal.expert_init import (
    ExpertPlan,
    SharedDifferences,
    check_shared,
    choose_layers,
    draw_routers,
    make_experts,
    plan_experts,
    warn_of_same_experts,
)
from mmbal.moe import warn_of_constant_weights

from .architecture import TOWERS, Mixture
from .checkpoint import Checkpoint, LazyTensor
from .layouts import block_name, ffn_names, is_ffn
from .recognition import KEPT_POSITIONS as KEPT

STRETCH = 4  # rows for each position after those kept: Long-CLIP (arXiv 2403.15378)


def upcycle_checkpoint(
    base: Checkpoint,
    experts: Sequence[Checkpoint] = (),
    num_experts: int | None = None,
    top_k: int = 2,
    layers="all",
    expert_init: str | None = None,
    router_init="uniform",
    shared: str = "strict",
    include_base: bool = True,
    normalize: bool = True,
    noise_std: float = 0.02,
    drop_ratio: float = 0.5,
    dropout: float = 0.0,
    shared_expert: bool = False,
    shared_weight: float = 0.5,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """A checkpoint whose chosen FFNs are mixtures. Its tensors are read and made when they are written.

    The arguments are those of :func:`mmbal.upcycle`, and the same seed gives the same weights. ``experts`` may hold
    FFNs alone (opened with ``like=base.architecture``). shared : where all other weights come from: "strict" (base and
    experts must be equal in them: what DMU's stages give), "base", or "mean"; weights that an expert's file does not
    hold are the base's. ``progress`` is told the name of each file that is compared.
    """
    if base.architecture.mixtures:
        raise ValueError("upcycle: base must be dense, this one has mixtures already")
    plan = plan_experts(
        len(experts),
        num_experts,
        top_k,
        expert_init,
        shared,
        include_base,
        noise_std,
        drop_ratio,
        dropout,
        shared_expert,
        shared_weight,
    )
    warn_of_constant_weights("upcycle", top_k, normalize)
    counts = {tower: base.architecture.tower(tower).layers for tower in TOWERS if base.architecture.tower(tower)}
    chosen = choose_layers(layers, counts)
    for j, source in enumerate(experts):
        _check_source(base, source, chosen, f"experts[{j}]")
    generator = torch.Generator().manual_seed(seed)
    widths = [(block_name(*layer), base.architecture.tower(layer[0]).width) for layer in chosen]
    routers = draw_routers(widths, plan.num_experts, router_init, generator)
    if experts and shared != "mean":
        check_shared([_compare(base, source, f"experts[{j}]", progress) for j, source in enumerate(experts)], shared)
    if experts:
        origins = [base, *experts] if include_base else experts
        names = ["the base"] * include_base + [_named(source, f"experts[{j}]") for j, source in enumerate(experts)]
        blocks = (ffn_names(block_name(*layer)) for layer in chosen)
        warn_of_same_experts(([[source[name] for name in names] for source in origins] for names in blocks), names)

    architecture = replace(
        base.architecture,
        mixtures={
            tower: Mixture(
                tuple(layer for name, layer in chosen if name == tower),
                plan.num_experts,
                top_k,
                base.architecture.tower(tower).activation,
                normalize,
                dropout,
                shared_expert=plan.shared_expert,
                shared_weight=shared_weight,
            )
            for tower in dict(chosen)
        },
    )
    tensors = dict(base.tensors)
    if experts and shared == "mean":
        tensors = {name: lazy if is_ffn(name) else _mean(name, base, experts) for name, lazy in tensors.items()}
    made = _MadeExperts(plan, base, experts, [block_name(*layer) for layer in chosen], generator)
    for layer, router in zip(chosen, routers, strict=True):
        block = block_name(*layer)
        names = ffn_names(block)
        dtype = base.tensors[names[0]].dtype
        tensors[f"{block}.gate.weight"] = _fixed(router.to(dtype))
        for j in range(plan.num_experts + plan.shared_expert):
            for i, name in enumerate(ffn_names(block, j)):
                tensors[name] = made.lazy(block, j, i, base.tensors[names[i]].shape)
    return base.changed(tensors, architecture)


def _check_source(base, source, chosen, where):
    """An expert must have the FFNs of all chosen layers."""
    if source.architecture.mixtures:
        raise ValueError(f"upcycle: {where} must be dense, it has mixtures; see mmbal extract-expert")
    for layer in chosen:
        for name in ffn_names(block_name(*layer)):
            if name not in source.tensors:
                raise ValueError(f"upcycle: {_named(source, where)} must have {name}")
            if source.tensors[name].shape != base.tensors[name].shape:
                expected, got = list(base.tensors[name].shape), list(source.tensors[name].shape)
                raise ValueError(f"upcycle: {_named(source, where)}: {name} must be {expected}, got {got}")
    for tower in dict(chosen):
        ours, theirs = base.architecture.tower(tower).activation, source.architecture.tower(tower).activation
        if ours != theirs:
            raise ValueError(f"upcycle: {_named(source, where)} must have activation {ours} in {tower}, got {theirs}")


def _named(source, where):
    return f"{where} ({source.path})" if source.path else where


def _compare(base, source, where, progress):
    differences = SharedDifferences(_named(source, where))
    if progress:
        progress(differences.name)
    for name in base.tensors:
        if not is_ffn(name) and name in source.tensors:
            differences.compare(name, base[name], source[name])
    return differences


def _mean(name, base, experts):
    lazy = base.tensors[name]

    def make():
        having = [source for source in experts if name in source.tensors]
        total = base[name].double() + sum(source[name].double() for source in having)
        return (total / (1 + len(having))).to(lazy.dtype)

    return LazyTensor(lazy.shape, lazy.dtype, make)


def _fixed(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class _MadeExperts:
    """Experts by layer and number. Copies and sources come as they are read; noise and drop are drawn in the order of
    the layers, whatever order they are asked for in, and one layer of them is held."""

    def __init__(self, plan: ExpertPlan, base, experts, blocks, generator):
        self.plan, self.base, self.experts, self.blocks = plan, base, experts, blocks
        self.states = [generator.get_state()]  # before each layer, as far as known
        self.held: tuple[int, list] | None = None

    def lazy(self, block: str, j: int, i: int, shape) -> LazyTensor:
        """Tensor i (of w1, b1, w2, b2) of expert j."""
        plan, name = self.plan, ffn_names(block)[i]
        if plan.shared_expert and j == plan.num_experts:
            return self.base.tensors[name]
        if plan.expert_init == "sources":
            sources = [self.base, *self.experts] if plan.include_base else self.experts
            return sources[j].tensors[name]
        if plan.expert_init == "copy" or j == 0:
            return self.base.tensors[name]
        dtype = self.base.tensors[name].dtype
        return LazyTensor(shape, dtype, lambda: self._layer(self.blocks.index(block))[j][i])

    def _layer(self, index: int) -> list:
        if self.held and self.held[0] == index:
            return self.held[1]
        for layer in range(min(len(self.states) - 1, index), index + 1):
            self.held = None
            generator = torch.Generator()
            generator.set_state(self.states[layer])
            base = [self.base[name] for name in ffn_names(self.blocks[layer])]
            made = list(make_experts(self.plan, base, [], generator))
            if layer + 1 == len(self.states):
                self.states.append(generator.get_state())
        self.held = index, made
        return made


def extract_expert(checkpoint: Checkpoint, expert: int, ffn_only: bool = False) -> Checkpoint:
    """The dense checkpoint whose FFNs are expert number ``expert`` of every mixture layer.

    ffn_only : nothing but the FFNs of the mixture layers, for ``upcycle``'s experts.
    """
    architecture = checkpoint.architecture
    if not architecture.mixtures:
        raise ValueError("extract_expert: the checkpoint must have mixtures, this one is dense")
    for tower, mixture in architecture.mixtures.items():
        if not 0 <= expert < mixture.stacked_experts:
            last = mixture.stacked_experts - 1
            raise ValueError(f"extract_expert: expert must be from 0 to {last} in {tower}, got {expert}")
    tensors = {}
    for name, lazy in checkpoint.tensors.items():
        match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(c_.*)", name)
        if match and int(match[2]) == expert:
            tensors[f"{match[1]}.mlp.{match[3]}"] = lazy
        elif not match and ".gate." not in name and not ffn_only:
            tensors[name] = lazy
    dense = replace(architecture, mixtures={})
    if ffn_only:
        return replace(checkpoint, tensors=tensors, architecture=dense)
    return checkpoint.changed(tensors, dense)


def stretch_positions(checkpoint: Checkpoint, positions: int) -> Checkpoint:
    """The text tower with 248 instead of 77 positions, or in general ``4 * n - 60`` instead of n (Long-CLIP's scheme).

    The first 20 rows stay; from there on three rows are put between two neighbours, and the last ones go on in the
    direction of the last two (spec: CLIP-MoE's published code). Worked out in float16 operation by operation, as that
    code does, so that files agree bit for bit; then in the table's own dtype again.
    """
    text = checkpoint.architecture.text
    if text is None:
        raise ValueError("stretch_positions: the checkpoint must have a text tower")
    expected = STRETCH * text.context_length - (STRETCH - 1) * KEPT
    if text.kept_positions is not None or text.context_length <= KEPT + 1:
        raise ValueError(f"stretch_positions: needs one table of more than {KEPT + 1} positions, as CLIP's of 77")
    if positions != expected:
        raise ValueError(f"stretch_positions: {text.context_length} positions become {expected}, got {positions}")
    lazy = checkpoint.tensors["positional_embedding"]

    def make():
        return stretched_table(checkpoint["positional_embedding"]).to(lazy.dtype)

    table = LazyTensor((positions, text.width), lazy.dtype, make)
    tensors = checkpoint.tensors | {"positional_embedding": table, "positional_embedding_res": table}
    text = replace(text, context_length=positions, kept_positions=KEPT)
    return checkpoint.changed(tensors, replace(checkpoint.architecture, text=text))


def stretched_table(table_TD: Tensor) -> Tensor:
    """[T, D] -> [4 T - 60, D] in float16: row 20 + 4 i + r is (4 - r)/4 of row 20 + i and r/4 of the next one."""
    p = table_TD.to(torch.float16)
    rows = [p[:KEPT]]
    body, following = p[KEPT:-1], p[KEPT + 1 :]
    r = torch.arange(STRETCH, dtype=torch.float16).view(1, STRETCH, 1)
    between = (STRETCH - r) * body[:, None] / STRETCH + r * following[:, None] / STRETCH
    between[:, 0] = body  # exact in any case; -0.0 stays -0.0
    rows.append(between.flatten(0, 1))
    rows.append(torch.stack([p[-1] + k * (p[-1] - p[-2]) / STRETCH for k in range(STRETCH)]))
    return torch.cat(rows)
