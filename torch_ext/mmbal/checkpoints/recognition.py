"""Which layout a file of tensors has, and the sizes of the CLIP in it, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from .architecture import CLIPArchitecture, Mixture, TextTower, VisionTower
from .untrusted import shown

# Not weights: masks and indices of old versions, and three numbers that OpenAI's archives store beside them.
BUFFERS = re.compile(r"(^|\.)(attn_mask|position_ids)$|^(input_resolution|context_length|vocab_size)$")
HEAD_WIDTH = 64  # of OpenAI's models, which do not store their numbers of heads
EXPERT_LIMIT = 1 << 16  # of all layers of a tower: a file must not make lists longer than its own
KEPT_POSITIONS = 20  # Long-CLIP's; the published layout has two tables of positions and no place for this number


class Renamed(Mapping):
    """A source of tensors under other names."""

    def __init__(self, source, names: dict[str, str]):
        self.source, self.names = source, names  # new name -> name in the source

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, name) -> Tensor:
        return self.source[self.names[name]]

    def shape(self, name):
        return tuple(self.source.shape(self.names[name]))

    def dtype(self, name):
        return self.source.dtype(self.names[name])


def recognise(source, where: str) -> tuple[Renamed, str]:
    """The source under the names of its layout, without buffers, and the layout: "transformers", "clipmoe" (names that
    only it has), "open_clip" (likewise) or "openai" (names that openai, open_clip and clipmoe share)."""
    names = {name: name for name in source if not BUFFERS.search(name)}
    if any(name.startswith(("vision_model.", "text_model.")) for name in names):
        return Renamed(source, _without_lone_prefix(names)), "transformers"
    if any(name.startswith(("embeddings.", "encoder.layers.")) for name in names):
        return Renamed(source, names), "transformers"
    if any(name.startswith("text.") for name in names):  # open_clip's CustomTextCLIP
        return Renamed(source, {name.removeprefix("text."): old for name, old in names.items()}), "open_clip"
    if any(".resblocks." in name for name in names):
        if any(".mlp.experts.w1" in name for name in names):
            return Renamed(source, names), "open_clip"
        if "positional_embedding_res" in names or any(".experts.0.c_fc." in name for name in names):
            return Renamed(source, names), "clipmoe"
        return Renamed(source, names), "openai"
    first = ", ".join(shown(name) for name in list(names)[:3]) or "no tensor"
    raise ValueError(f"{where}: must hold a CLIP of OpenAI, open_clip, transformers or CLIP-MoE, got {first}")


def _without_lone_prefix(names):
    """transformers 5 saves a model of one tower and no projection without the tower's name; older versions with it."""
    for tower in ("vision_model.", "text_model."):
        if all(name.startswith(tower) for name in names):
            return {name.removeprefix(tower): old for name, old in names.items()}
    return names


def as_part_of_clip(source: Renamed) -> Renamed:
    """A lone tower of transformers under the names that it has in a CLIP of two towers, which begin with its own."""
    for tower in ("vision", "text"):
        if _OF_LAYOUT["transformers", tower][0] in source:
            return Renamed(source.source, {f"{tower}_model.{name}": old for name, old in source.names.items()})
    return source


_OF_LAYOUT = {  # names of a stem, by which a tower is known, of its positions, and of what its layers start with
    ("canonical", "vision"): ("visual.conv1.weight", "visual.positional_embedding", "visual.transformer.resblocks."),
    ("canonical", "text"): ("token_embedding.weight", "positional_embedding", "transformer.resblocks."),
    ("transformers", "vision"): (
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.",
    ),
    ("transformers", "text"): (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.",
    ),
}


def infer_architecture(source, layout: str, where: str) -> CLIPArchitecture:
    """Sizes and mixtures from shapes. What shapes do not tell (activation, heads, eps, top_k, ids of tokens) has the
    value of OpenAI's models, and activation is "" where names do not tell it either."""
    family = "transformers" if layout == "transformers" else "canonical"
    sizes = {}
    mixtures: dict[str, Mixture] = {}
    for tower in ("vision", "text"):
        stem, positions, layers = _OF_LAYOUT[family, tower]
        if family == "transformers" and stem not in source:
            stem, positions, layers = (f"{tower}_model.{name}" for name in (stem, positions, layers))
        if stem not in source:
            sizes[tower] = None
            continue
        count, F, mixture = _layers(source, layers, where)
        if mixture:
            mixtures[tower] = mixture
        if tower == "vision":
            sizes[tower] = _vision(_shape(source, stem, 4, where), _shape(source, positions, 2, where), count, F, where)
        else:
            two = positions + "_res" in source
            sizes[tower] = _text(_shape(source, stem, 2, where), _shape(source, positions, 2, where), count, F, two)
    if sizes["vision"] is None and sizes["text"] is None:
        raise ValueError(f"{where}: must hold a tower of a CLIP, got neither embeddings of patches nor of tokens")
    widths = [
        _shape(source, name, 2, where)[axis]
        for name, axis in (
            ("visual_projection.weight", 0),
            ("text_projection.weight", 0),
            ("visual.proj", 1),
            ("text_projection", 1),
        )
        if name in source
    ]
    return CLIPArchitecture(widths[0] if widths else None, sizes["vision"], sizes["text"], mixtures)


def _shape(source, name, dims, where):
    if name not in source:
        raise ValueError(f"{where}: lacks {name}")
    shape = source.shape(name)
    if len(shape) != dims or min(shape) < 1:
        raise ValueError(f"{where}: {name} must have {dims} dimensions, none of them 0, got {list(shape)}")
    return shape


def _vision(stem, positions, layers, mlp_width, where):
    width, _, patch, _ = stem
    grid = isqrt(positions[0] - 1)
    if grid < 1 or grid * grid != positions[0] - 1:
        raise ValueError(f"{where}: positions of patches must be a square and one more, got {positions[0]}")
    return VisionTower(width, layers, max(width // HEAD_WIDTH, 1), mlp_width, patch, patch * grid, "")


def _text(stem, positions, layers, mlp_width, two_tables):
    vocabulary, width = stem
    return TextTower(
        width,
        layers,
        max(width // HEAD_WIDTH, 1),
        mlp_width,
        positions[0],
        vocabulary,
        "",
        bos_token_id=max(vocabulary - 2, 0),
        eos_token_id=vocabulary - 1,
        kept_positions=KEPT_POSITIONS if two_tables else None,
    )


def _layers(source, prefix, where):
    """How many layers, the width of their FFNs, and the mixture if some of them are one."""
    layer = re.compile(re.escape(prefix) + r"(\d{1,6})\.(experts\.\d{1,6}\.c_fc\.weight$)?")
    found: dict[int, int] = {}  # how many experts that have tensors of their own
    for name in source:
        if match := layer.match(name):
            found[int(match[1])] = found.get(int(match[1]), 0) + bool(match[2])
    if set(found) != set(range(len(found))) or not found:
        raise ValueError(f"{where}: layers {prefix}N must be numbered 0, 1, 2, ..., got {len(found)} of them")
    widths, experts, routers = set(), {}, {}
    for n in sorted(found):
        block = f"{prefix}{n}"
        for router in (f"{block}.gate", f"{block}.mlp.router"):
            if router + ".weight" in source:
                routers[n] = (*_shape(source, router + ".weight", 2, where), router + ".bias" in source)
        for name in (f"{block}.mlp.c_fc.weight", f"{block}.mlp.fc1.weight", f"{block}.experts.0.c_fc.weight"):
            if name in source:
                widths.add(_shape(source, name, 2, where)[0])
        if f"{block}.mlp.experts.w1" in source:
            experts[n], width, _ = _shape(source, f"{block}.mlp.experts.w1", 3, where)
            widths.add(width)
        elif found[n]:
            experts[n] = found[n]
    if len(widths) != 1:
        raise ValueError(f"{where}: the FFNs of {prefix}N must have one width, got {sorted(widths)[:5]}")
    if set(experts) != set(routers):
        odd = min(set(experts) ^ set(routers))
        raise ValueError(f"{where}: {prefix}{odd} must have both a router and experts, or neither")
    if not experts:
        return len(found), widths.pop(), None
    if sum(experts.values()) > EXPERT_LIMIT:
        raise ValueError(f"{where}: {prefix}N must have at most {EXPERT_LIMIT} experts, got {sum(experts.values())}")
    kinds = {(experts[n], routers[n][0], routers[n][2]) for n in experts}
    if len(kinds) != 1:
        raise ValueError(f"{where}: the mixtures of {prefix}N must agree in their numbers of experts and in bias")
    stacked, E, bias = kinds.pop()
    if stacked - E not in (0, 1):
        raise ValueError(
            f"{where}: {prefix}N must have an expert for each of the {E} rows of the router, got {stacked}"
        )
    mixture = Mixture(tuple(sorted(experts)), E, min(2, E), "", router_bias=bias, shared_expert=stacked > E)
    return len(found), widths.pop(), mixture
