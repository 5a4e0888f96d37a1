"""What configuration files say of a CLIP: transformers' config.json, open_clip's, and the file beside a CLIP-MoE."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

from mmbal.dense import ACTIVATIONS

from .architecture import CLIPArchitecture, Mixture, TextTower, VisionTower

FORMAT_VERSION = 1
# Of the pixels that OpenAI's models were trained on (openai/CLIP, clip.py), by channel.
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# transformers' names of activations that have another one here
FROM_TRANSFORMERS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu", "linear": "identity"}
TO_TRANSFORMERS = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}
_NOT_IN_SHAPES = {"heads", "activation", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"}
# open_clip's fields that are only sizes, or that change nothing for a tower of its own transformer class
_OPEN_CLIP = {
    "vision": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"},
    "text": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


def complete(found: CLIPArchitecture, said: dict, where: str) -> CLIPArchitecture:
    """The architecture that shapes show, with what a configuration says besides.

    said : {"vision": {field: value}, "text": {...}, "mixtures": {tower: Mixture}}. Raises a ValueError where the two
    disagree.
    """
    towers = {}
    for tower, cls in (("vision", VisionTower), ("text", TextTower)):
        shown, values = found.tower(tower), said.get(tower) or {}
        towers[tower] = None if shown is None else _complete_tower(shown, values, cls, f"{where}: {tower}")
    if unknown := set(said.get("mixtures", {})) - set(found.mixtures):
        raise ValueError(
            f"{where}: has a mixture in {', '.join(sorted(unknown))[:80]}, but the weights have none there"
        )
    mixtures = {}
    for tower, shown in found.mixtures.items():
        if tower not in said.get("mixtures", {}):
            raise ValueError(f"{where}: must describe the mixture of {tower} that the weights have")
        mixtures[tower] = said["mixtures"][tower]
        for name in ("layers", "num_experts", "router_bias", "shared_expert"):
            if (got := getattr(mixtures[tower], name)) != (expected := getattr(shown, name)):
                raise ValueError(
                    f"{where}: {name} of the mixture of {tower} must be {expected} by the weights, got {got}"
                )
    return replace(found, **towers, mixtures=mixtures)


def _complete_tower(shown, values, cls, where):
    changes = {}
    for name, value in values.items():
        kind = {"activation": str, "layer_norm_eps": float}.get(name, int)
        if name == "kept_positions" and value is None:
            continue
        if name not in {f.name for f in fields(cls)}:
            raise ValueError(f"{where} must not have {name[:80]}")
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be {kind.__name__}, got {type(value).__name__}")
        if name in _NOT_IN_SHAPES:
            changes[name] = value
        elif name == "image_size":  # pixels that do not fill a patch are not seen
            if value // shown.patch_size != shown.image_size // shown.patch_size:
                raise ValueError(f"{where}: image_size must be {shown.image_size} by the weights, got {value}")
            changes[name] = value
        elif value != getattr(shown, name):
            raise ValueError(f"{where}: {name} must be {getattr(shown, name)} by the weights, got {value}")
    tower = replace(shown, **changes)
    if tower.activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be one of {', '.join(ACTIVATIONS)}, got {tower.activation[:40]!r}")
    if tower.heads < 1 or tower.width % tower.heads:
        raise ValueError(f"{where}: heads must divide the width {tower.width}, got {tower.heads}")
    if not 0 < tower.layer_norm_eps < 1:
        raise ValueError(f"{where}: layer_norm_eps must be in (0, 1), got {tower.layer_norm_eps}")
    return tower


def _mixtures(value, where):
    if not isinstance(value, dict) or set(value) - {"vision", "text"}:
        raise ValueError(f"{where}: mixtures must have vision or text or both, and nothing else")
    return {tower: Mixture.from_json(mixture, f"{where}: mixtures.{tower}") for tower, mixture in value.items()}


def _section(config, name, where):
    section = config.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{where}: must have {name}")
    return section


def said_by_transformers(config: dict, where: str) -> dict:
    """Of a ``CLIPConfig``, a ``CLIPMoEConfig``, or the configuration of one tower, as JSON."""
    kind = config.get("model_type")
    lone = {f"{model}_{tower}_model": tower for model in ("clip", "clip_moe") for tower in ("vision", "text")}
    if kind not in ("clip", "clip_moe", *lone):
        raise ValueError(f"{where}: model_type must be clip or clip_moe, got {str(kind)[:40]!r}")
    said, tower = {}, lone.get(kind)
    if tower != "text":
        section = config if tower else _section(config, "vision_config", where)
        said["vision"] = _of_transformers(section, {"patch_size": "patch_size", "image_size": "image_size"})
    if tower != "vision":
        section = config if tower else _section(config, "text_config", where)
        names = {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
        names |= {name: name for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        said["text"] = _of_transformers(section, names)
    if kind == "clip_moe":
        said["mixtures"] = _mixtures(config.get("mixtures"), where)
    elif tower and config.get("mixture") is not None:
        said["mixtures"] = _mixtures({tower: config["mixture"]}, where)
    return said


def _of_transformers(section, names):
    names = names | {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "layer_norm_eps": "layer_norm_eps",
    }
    values = {ours: section[theirs] for ours, theirs in names.items() if section.get(theirs) is not None}
    act = section.get("hidden_act", "quick_gelu")  # transformers' default
    return values | {"activation": FROM_TRANSFORMERS.get(act, act) if isinstance(act, str) else act}


def to_transformers(architecture: CLIPArchitecture) -> dict:
    """config.json as ``CLIPConfig`` or ``CLIPMoEConfig`` writes it, or one tower's configuration."""
    sections = {}
    for tower in ("vision", "text"):
        if (sizes := architecture.tower(tower)) is None:
            continue
        sections[tower] = {
            "hidden_size": sizes.width,
            "intermediate_size": sizes.mlp_width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "hidden_act": TO_TRANSFORMERS.get(sizes.activation, sizes.activation),
            "layer_norm_eps": sizes.layer_norm_eps,
        }
        if architecture.embed_dim:
            sections[tower]["projection_dim"] = architecture.embed_dim
    if vision := architecture.vision:
        sections["vision"] |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    if text := architecture.text:
        sections["text"] |= {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length}
        sections["text"] |= {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if len(sections) == 1:
        tower, section = sections.popitem()
        mixture = architecture.mixtures.get(tower)
        model = (
            f"CLIP{'MoE' if mixture else ''}{tower.title()}Model{'WithProjection' if architecture.embed_dim else ''}"
        )
        section |= {"mixture": mixture.to_json()} if mixture else {}
        return {"model_type": f"clip_{'moe_' if mixture else ''}{tower}_model", "architectures": [model]} | section
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": architecture.embed_dim}
    config |= {f"{tower}_config": section for tower, section in sections.items()}
    if architecture.mixtures:
        config |= {"model_type": "clip_moe", "architectures": ["CLIPMoEModel"]}
        config["mixtures"] = {tower: mixture.to_json() for tower, mixture in architecture.mixtures.items()}
    return config


def said_by_open_clip(config: dict, where: str) -> dict:
    """Of open_clip_config.json; towers that are not open_clip's own transformer are refused."""
    model = _section(config, "model_cfg", where)
    quick = model.get("quick_gelu", False)
    if set(model) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"}:
        other = sorted(set(model) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"})
        raise ValueError(f"{where}: model_cfg has {str(other)[:80]}, which is not served")
    said = {}
    for tower in ("vision", "text"):
        section = _section(model, f"{tower}_cfg", where)
        if other := sorted(name for name in set(section) - _OPEN_CLIP[tower] if section[name] not in (None, False)):
            raise ValueError(f"{where}: {tower}_cfg has {str(other)[:80]}, which is not served")
        values = {name: section[name] for name in ("layers", "width", "patch_size", "image_size") if name in section}
        values |= {name: section[name] for name in ("context_length", "vocab_size", "heads") if name in section}
        if tower == "vision" and "width" in values:
            values["heads"] = values["width"] // section.get("head_width", 64)  # open_clip's default
        values["activation"] = "quick_gelu" if quick else "gelu"
        said[tower] = values
    if "mmbal" in config:
        ours = config["mmbal"]
        _check_version(ours, where)
        said["mixtures"] = _mixtures(ours.get("mixtures"), where)
    return said


def to_open_clip(architecture: CLIPArchitecture) -> dict:
    """open_clip_config.json: what open_clip's factory needs, and the mixtures under "mmbal"."""
    vision, text = architecture.vision, architecture.text
    model = {
        "embed_dim": architecture.embed_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": _ratio(vision),
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": _ratio(text),
        },
    }
    config = {"model_cfg": model, "preprocess_cfg": {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)}}
    if architecture.mixtures:
        mixtures = {tower: mixture.to_json() for tower, mixture in architecture.mixtures.items()}
        config["mmbal"] = {"format_version": FORMAT_VERSION, "mixtures": mixtures}
    return config


def _ratio(tower):
    """open_clip rounds width * ratio down; where that loses a channel, half a channel more does not."""
    ratio = tower.mlp_width / tower.width
    return ratio if int(tower.width * ratio) == tower.mlp_width else (tower.mlp_width + 0.5) / tower.width


def said_beside(config: dict, where: str) -> dict:
    """Of the JSON file beside a CLIP-MoE file: :func:`to_side_file`."""
    _check_version(config, where)
    said = {tower: config.get(tower) or {} for tower in ("vision", "text")}
    if not all(isinstance(values, dict) for values in said.values()):
        raise ValueError(f"{where}: vision and text must be objects")
    return said | {"mixtures": _mixtures(config.get("mixtures", {}), where)}


def to_side_file(architecture: CLIPArchitecture) -> dict:
    """What the published layout does not store, and the sizes with it."""
    towers = {tower: asdict(architecture.tower(tower)) for tower in ("vision", "text") if architecture.tower(tower)}
    mixtures = {tower: mixture.to_json() for tower, mixture in architecture.mixtures.items()}
    return {"format_version": FORMAT_VERSION, "embed_dim": architecture.embed_dim} | towers | {"mixtures": mixtures}


def _check_version(value, where):
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{where}: format_version must be {FORMAT_VERSION}")
