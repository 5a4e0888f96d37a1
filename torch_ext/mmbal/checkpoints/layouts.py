"""Names of the tensors of a CLIP in the files of OpenAI, transformers, open_clip and CLIP-MoE.

The published CLIP-MoE names are the canonical ones: OpenAI's, and for a mixture layer ``gate.weight`` and
``experts.J.c_fc.weight``. A layout is a list of :class:`Binding`, each of which says how one tensor of a file is made
of canonical tensors; reading goes one way through it and writing the other, so what is written can be read back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import CLIPArchitecture

LAYOUTS = ("openai", "open_clip", "clipmoe", "transformers")
ATTENTION = ("q", "k", "v")  # the order of the thirds of in_proj


class Binding(NamedTuple):
    """A tensor of a file. kind: "same", "transposed", "stacked" (of the parts), "third" (number ``index`` of the rows
    of the part), "positions" (the first ``index`` rows of the first part, the others of the second)."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    kind: str = "same"
    index: int = 0

    def pieces(self, get: Callable[[str], Tensor]) -> list[Tensor]:
        """The file's tensor from canonical ones: tensors whose elements follow each other."""
        if self.kind == "transposed":
            return [get(self.parts[0]).T]
        if self.kind == "third":
            return [get(self.parts[0]).chunk(3)[self.index]]
        if self.kind == "positions":
            kept, stretched = (get(part) for part in self.parts)
            return [kept[: self.index], stretched[self.index :]]
        return _Made(get, self.parts)


class _Made:
    """A sequence of tensors that are made one at a time, each time anew."""

    def __init__(self, get, parts):
        self.get, self.parts = get, parts

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        return (self.get(part) for part in self.parts)


def canonical_shapes(architecture: CLIPArchitecture) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name, in the order of OpenAI's state dict."""
    vision, text, P = architecture.vision, architecture.text, architecture.embed_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if text:
        shapes["positional_embedding"] = (text.context_length, text.width)
        if text.kept_positions is not None:
            shapes["positional_embedding_res"] = (text.context_length, text.width)
        if P:
            shapes["text_projection"] = (text.width, P)
    if text and vision:
        shapes["logit_scale"] = ()
    if vision:
        D = vision.width
        tokens = 1 + (vision.image_size // vision.patch_size) ** 2
        shapes |= {"visual.class_embedding": (D,), "visual.positional_embedding": (tokens, D)}
        if P:
            shapes["visual.proj"] = (D, P)
        shapes["visual.conv1.weight"] = (D, 3, vision.patch_size, vision.patch_size)
        shapes |= _norm("visual.ln_pre", D) | _blocks(architecture, "vision") | _norm("visual.ln_post", D)
    if text:
        shapes |= _blocks(architecture, "text")
        shapes["token_embedding.weight"] = (text.vocab_size, text.width)
        shapes |= _norm("ln_final", text.width)
    return shapes


def block_name(tower: str, layer: int) -> str:
    return f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{layer}"


def ffn_names(block: str, expert: int | None = None) -> list[str]:
    """Canonical names of w1, b1, w2, b2 of a dense block, or of one expert of a mixture."""
    mlp = f"{block}.mlp" if expert is None else f"{block}.experts.{expert}"
    return [f"{mlp}.{linear}.{kind}" for linear in ("c_fc", "c_proj") for kind in ("weight", "bias")]


def ffn_shapes(width: int, mlp_width: int) -> list[tuple[int, ...]]:
    """Of w1, b1, w2, b2."""
    return [(mlp_width, width), (mlp_width,), (width, mlp_width), (width,)]


def is_ffn(name: str) -> bool:
    """Whether a canonical name is of an FFN or of one expert."""
    return ".mlp.c_" in name or ".experts." in name


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(architecture, tower):
    sizes, shapes = architecture.tower(tower), {}
    D, F = sizes.width, sizes.mlp_width
    for layer in range(sizes.layers):
        block = block_name(tower, layer)
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * D, D),
            f"{block}.attn.in_proj_bias": (3 * D,),
            f"{block}.attn.out_proj.weight": (D, D),
            f"{block}.attn.out_proj.bias": (D,),
        }
        shapes |= _norm(f"{block}.ln_1", D)
        if architecture.is_mixture(tower, layer):
            mixture = architecture.mixtures[tower]
            shapes[f"{block}.gate.weight"] = (mixture.num_experts, D)
            if mixture.router_bias:
                shapes[f"{block}.gate.bias"] = (mixture.num_experts,)
            for expert in range(mixture.stacked_experts):
                shapes |= zip(ffn_names(block, expert), ffn_shapes(D, F), strict=True)
        else:
            shapes |= zip(ffn_names(block), ffn_shapes(D, F), strict=True)
        shapes |= _norm(f"{block}.ln_2", D)
    return shapes


def bindings(architecture: CLIPArchitecture, layout: str) -> list[Binding]:
    """Every tensor of a file in ``layout``; raises a ValueError where the layout cannot hold the architecture."""
    shapes = canonical_shapes(architecture)
    if layout == "transformers":
        return _transformers(architecture, shapes)
    if layout == "open_clip":
        return _open_clip(architecture, shapes)
    if layout not in LAYOUTS:
        raise ValueError(f"format must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "openai" and architecture.mixtures:
        raise ValueError("format openai holds dense models only, this one has mixtures")
    if layout == "openai" and architecture.text and architecture.text.kept_positions is not None:
        raise ValueError("format openai holds one table of positions, this model has two")
    for tower, mixture in architecture.mixtures.items():
        if mixture.router_bias or mixture.shared_expert:
            what = "a router with a bias" if mixture.router_bias else "a shared expert"
            raise ValueError(f"format clipmoe cannot hold {what}, which the mixture of {tower} has")
    return [Binding(name, shape, (name,)) for name, shape in shapes.items()]


def _mixture_bindings(architecture, tower, layer, prefix):
    """The stacked tensors of :class:`mmbal.MoEMLP` at ``prefix``."""
    block, sizes, mixture = block_name(tower, layer), architecture.tower(tower), architecture.mixtures[tower]
    D, E = sizes.width, mixture.stacked_experts
    found = [Binding(f"{prefix}.router.weight", (mixture.num_experts, D), (f"{block}.gate.weight",))]
    if mixture.router_bias:
        found.append(Binding(f"{prefix}.router.bias", (mixture.num_experts,), (f"{block}.gate.bias",)))
    names = [ffn_names(block, expert) for expert in range(E)]
    for i, (name, shape) in enumerate(zip(("w1", "b1", "w2", "b2"), ffn_shapes(D, sizes.mlp_width), strict=True)):
        parts = tuple(expert[i] for expert in names)
        found.append(Binding(f"{prefix}.experts.{name}", (E, *shape), parts, "stacked"))
    return found


def _positions(architecture, name, shapes):
    text = architecture.text
    if text.kept_positions is None:
        return Binding(name, shapes["positional_embedding"], ("positional_embedding",))
    tables = ("positional_embedding", "positional_embedding_res")
    return Binding(name, shapes["positional_embedding"], tables, "positions", text.kept_positions)


def _open_clip(architecture, shapes):
    found = []
    of_mixtures = {
        f"{block_name(tower, layer)}.{part}"
        for tower, mixture in architecture.mixtures.items()
        for layer in mixture.layers
        for part in ("gate.", "experts.")
    }
    starts = tuple(of_mixtures)
    for name, shape in shapes.items():
        if name == "positional_embedding":
            found.append(_positions(architecture, name, shapes))
        elif name != "positional_embedding_res" and not name.startswith(starts):
            found.append(Binding(name, shape, (name,)))
    for tower, mixture in architecture.mixtures.items():
        for layer in mixture.layers:
            found += _mixture_bindings(architecture, tower, layer, f"{block_name(tower, layer)}.mlp")
    return found


_STEM = {
    "visual.class_embedding": "embeddings.class_embedding",
    "visual.conv1.weight": "embeddings.patch_embedding.weight",
    "visual.positional_embedding": "embeddings.position_embedding.weight",
    "visual.ln_pre": "pre_layrnorm",
    "visual.ln_post": "post_layernorm",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final": "final_layer_norm",
}


def _transformers(architecture, shapes):
    found = []
    towers = [tower for tower in ("text", "vision") if architecture.tower(tower)]
    if len(towers) == 2:
        found.append(Binding("logit_scale", (), ("logit_scale",)))
    for tower in towers:
        projection = "text_projection" if tower == "text" else "visual.proj"
        # A model of one tower without projection is saved without the tower's name in front, since transformers 5.
        prefix = f"{tower}_model." if len(towers) == 2 or projection in shapes else ""
        for name, stem in _STEM.items():
            if name.startswith("visual.") == (tower == "vision"):
                ends = [""] if name in shapes else [".weight", ".bias"]
                found += [Binding(prefix + stem + end, shapes[name + end], (name + end,)) for end in ends]
        if tower == "text":
            found.append(_positions(architecture, prefix + "embeddings.position_embedding.weight", shapes))
        for layer in range(architecture.tower(tower).layers):
            found += _transformers_block(architecture, tower, layer, f"{prefix}encoder.layers.{layer}", shapes)
        if projection in shapes:
            D, P = shapes[projection]
            name = "text_projection.weight" if tower == "text" else "visual_projection.weight"
            found.append(Binding(name, (P, D), (projection,), "transposed"))
    return found


def _transformers_block(architecture, tower, layer, prefix, shapes):
    block, D = block_name(tower, layer), architecture.tower(tower).width
    found = []
    for i, which in enumerate(ATTENTION):
        for kind, shape in (("weight", (D, D)), ("bias", (D,))):
            name = f"{prefix}.self_attn.{which}_proj.{kind}"
            found.append(Binding(name, shape, (f"{block}.attn.in_proj_{kind}",), "third", i))
    renamed = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    if architecture.is_mixture(tower, layer):
        found += _mixture_bindings(architecture, tower, layer, f"{prefix}.mlp")
    else:
        renamed |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for theirs, ours in renamed.items():
        for kind in ("weight", "bias"):
            name = f"{block}.{ours}.{kind}"
            found.append(Binding(f"{prefix}.{theirs}.{kind}", shapes[name], (name,)))
    return found


def readers(found: list[Binding]) -> dict[str, Callable[[Callable[[str], Tensor]], Tensor]]:
    """For each canonical name, a function that makes its tensor from ``get(name in the file)``."""
    made: dict[str, Callable] = {}
    thirds: dict[str, list[str]] = {}
    for binding in found:
        if binding.kind == "third":
            names = thirds.setdefault(binding.parts[0], [])
            names.append(binding.name)
            made[binding.parts[0]] = lambda get, names=names: torch.cat([get(name) for name in names])
        elif binding.kind == "stacked":
            for j, part in enumerate(binding.parts):
                made[part] = lambda get, name=binding.name, j=j: get(name)[j]
        elif binding.kind == "transposed":
            made[binding.parts[0]] = lambda get, name=binding.name: get(name).T
        else:  # "positions" is never read back: a file with one table has no second
            made[binding.parts[0]] = lambda get, name=binding.name: get(name)
    return made
