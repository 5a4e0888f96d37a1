"""What configuration files say of a CLIP: transformers' config.json, open_clip's, and the file beside a CLIP-MoE."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace

from mmbal.dense import ACTIVATIONS

from .architecture import TOWERS, CLIPArchitecture, Mixture, TextTower, VisionTower
from .untrusted import shown as quoted

FORMAT_VERSION = 1
# Of the pixels that OpenAI's models were trained on, by channel: `_transform` in clip/clip.py of openai/CLIP.
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# transformers' names of activations that have another one here
FROM_TRANSFORMERS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu", "linear": "identity"}
TO_TRANSFORMERS = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}
# What CLIPVisionConfig and CLIPTextConfig have where config.json says nothing: transformers 4 leaves out what is equal.
_DEFAULTS = {
    "vision": {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "text": {"num_attention_heads": 8, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
    | {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1},
}
_NOT_IN_SHAPES = {"heads", "activation", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"}
# open_clip's fields that are only sizes, or that change nothing for a tower of its own transformer class
_OPEN_CLIP = {
    "vision": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout"},
    "text": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "eos_id"},
}
for _names in _OPEN_CLIP.values():
    _names |= {"act_kwargs", "norm_kwargs", "pool_type"}
HEAD_WIDTH, MLP_RATIO, LAYER_NORM_EPS = 64, 4.0, 1e-5  # what open_clip takes where model_cfg says nothing
LARGEST = 2  # as eos_token_id: old files of transformers mean the largest token by it
# QuickGELU is one switch for both towers; the others are nn.GELU with these arguments.
GELUS = {"gelu": {}, "gelu_tanh": {"approximate": "tanh"}}


def complete(found: CLIPArchitecture, said: dict, where: str) -> CLIPArchitecture:
    """The architecture that shapes show, with what a configuration says besides.

    said : {"embed_dim": int, "vision": {field: value}, "text": {...}, "mixtures": {tower: Mixture}}.
    Raises a ValueError where the two disagree.
    """
    towers = {}
    for tower, cls in (("vision", VisionTower), ("text", TextTower)):
        shown, values = found.tower(tower), said.get(tower) or {}
        towers[tower] = None if shown is None else _complete_tower(shown, values, cls, f"{where}: {tower}")
    if unknown := set(said.get("mixtures", {})) - set(found.mixtures):
        raise ValueError(f"{where}: has a mixture in {', '.join(sorted(unknown))}, but the weights have none there")
    width = said.get("embed_dim")
    if None not in (found.embed_dim, width) and found.embed_dim != width:
        raise ValueError(f"{where}: embed_dim must be {found.embed_dim} by the weights, got {quoted(width)}")
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
            raise ValueError(f"{where} must not have {quoted(name)}")
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
        said["vision"] = _of_transformers("vision", section, {name: name for name in ("patch_size", "image_size")})
    if tower != "vision":
        section = config if tower else _section(config, "text_config", where)
        names = {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
        names |= {name: name for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        said["text"] = _of_transformers("text", section, names)
    if not tower and "projection_dim" in config:
        said["embed_dim"] = config["projection_dim"]
    if kind == "clip_moe":
        said["mixtures"] = _mixtures(config.get("mixtures"), where)
    elif tower and config.get("mixture") is not None:
        said["mixtures"] = _mixtures({tower: config["mixture"]}, where)
    return said


def _of_transformers(tower, section, names):
    section = _DEFAULTS[tower] | section
    names = names | {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "layer_norm_eps": "layer_norm_eps",
    }
    values = {ours: section[theirs] for ours, theirs in names.items() if section.get(theirs) is not None}
    act = section["hidden_act"]
    return values | {"activation": FROM_TRANSFORMERS.get(act, act) if isinstance(act, str) else act}


def to_transformers(architecture: CLIPArchitecture, settings: dict | None = None) -> dict:
    """config.json as ``CLIPConfig`` or ``CLIPMoEConfig`` writes it, or one tower's configuration.

    settings : the configuration that the model had in transformers; what it says of training (attention_dropout, ...)
        stays.
    """
    config, settings = _to_transformers(architecture), settings or {}
    for part in (config, *(config[name] for name in ("text_config", "vision_config") if name in config)):
        name = next((name for name in ("text_config", "vision_config") if config.get(name) is part), None)
        said = settings if name is None else settings.get(name)
        said = said if isinstance(said, dict) else {}
        part |= {
            key: said[key] for key in OF_TRAINING if key in said and (architecture.mixtures or "router" not in key)
        }
    return config


# What transformers' configurations of a CLIP say besides sizes.
OF_TRAINING = (
    "attention_dropout",
    "initializer_factor",
    "initializer_range",
    "logit_scale_init_value",
    "output_router_logits",
    "router_aux_loss_coef",
)


def _to_transformers(architecture):
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
        config["mixtures"] = architecture.mixtures_to_json()
    return config


def said_by_open_clip(config: dict, where: str) -> dict:
    """Of open_clip_config.json; towers that are not open_clip's own transformer are refused."""
    model = _section(config, "model_cfg", where)
    known = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"}
    _refuse_others(model, known, f"{where}: model_cfg")
    said = {"embed_dim": model["embed_dim"]} if "embed_dim" in model else {}
    for tower in ("vision", "text"):
        section = _section(model, f"{tower}_cfg", where)
        _refuse_others(section, _OPEN_CLIP[tower], f"{where}: {tower}_cfg")
        names = ("layers", "width", "patch_size", "image_size", "context_length", "vocab_size", "heads")
        values = {name: section[name] for name in names if name in section}
        if tower == "vision" and isinstance(values.get("width"), int):
            values["heads"] = values["width"] // (section.get("head_width") or HEAD_WIDTH)
        if section.get("pool_type") not in (None, "tok" if tower == "vision" else "argmax"):
            if (tower, section["pool_type"]) != ("text", "eos"):
                raise ValueError(f"{where}: pool_type {str(section['pool_type'])[:40]} of {tower} is not served")
            if not isinstance(section.get("eos_id"), int) or section["eos_id"] == LARGEST:
                raise ValueError(f"{where}: eos_id of text must be said, and not {LARGEST}")
            values |= {"eos_token_id": section["eos_id"], "bos_token_id": max(section["eos_id"] - 1, 0)}
        gelu = "gelu_tanh" if section.get("act_kwargs") == GELUS["gelu_tanh"] else "gelu"
        if section.get("act_kwargs") not in (None, {}, GELUS["gelu_tanh"]):
            raise ValueError(f"{where}: act_kwargs of {tower} must be {GELUS['gelu_tanh']} or none")
        values["activation"] = "quick_gelu" if model.get("quick_gelu", False) else gelu
        if section.get("norm_kwargs"):
            _refuse_others(section["norm_kwargs"], {"eps"}, f"{where}: norm_kwargs")
            values["layer_norm_eps"] = section["norm_kwargs"]["eps"]
        said[tower] = values
    if "mmbal" in config:
        ours = config["mmbal"]
        _check_version(ours, where)
        said["mixtures"] = _mixtures(ours.get("mixtures"), where)
    return said


def _refuse_others(section, known, where):
    if not isinstance(section, dict):
        raise ValueError(f"{where} must be an object")
    if other := sorted(name for name in set(section) - known if section[name] not in (None, False)):
        raise ValueError(f"{where} has {str(other)[:80]}, which is not served")


def to_open_clip(architecture: CLIPArchitecture, preprocess: dict | None = None) -> dict:
    """open_clip_config.json: what open_clip's factory needs, and the mixtures under "mmbal".

    preprocess : open_clip's preprocess_cfg; None for the mean and deviation of OpenAI's training images.
    """
    default = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)}
    config = {"model_cfg": open_clip_model_config(architecture), "preprocess_cfg": preprocess or default}
    if architecture.mixtures:
        config["mmbal"] = open_clip_entry(architecture)
    return config


def open_clip_entry(architecture: CLIPArchitecture) -> dict:
    """What open_clip_config.json has under "mmbal"."""
    return {"format_version": FORMAT_VERSION, "mixtures": architecture.mixtures_to_json()}


def open_clip_model_config(architecture: CLIPArchitecture) -> dict:
    """open_clip's ``model_cfg`` of the dense model with these sizes; mixtures have no place in it.

    Raises a ValueError where open_clip's ``CLIP`` cannot have the architecture: it has both towers, each with the
    activation quick_gelu, gelu or gelu_tanh, and quick_gelu in both or in neither.
    """
    vision, text = architecture.vision, architecture.text
    if vision is None or text is None or not architecture.embed_dim:
        raise ValueError("open_clip: an open_clip CLIP has a vision tower, a text tower and embed_dim")
    activations = {tower: architecture.tower(tower).activation for tower in TOWERS}
    quick = {activation == "quick_gelu" for activation in activations.values()}
    if len(quick) > 1 or not set(activations.values()) <= {"quick_gelu", *GELUS}:
        raise ValueError(
            f"open_clip: activations must be quick_gelu in both towers, or gelu or gelu_tanh, got {activations}"
        )
    vision_cfg = {
        "image_size": vision.image_size,
        "layers": vision.layers,
        "width": vision.width,
        "patch_size": vision.patch_size,
    }
    if vision.width % vision.heads:
        raise ValueError(f"open_clip: vision width {vision.width} must be a multiple of heads = {vision.heads}")
    if vision.width != HEAD_WIDTH * vision.heads:
        vision_cfg["head_width"] = vision.width // vision.heads
    text_cfg = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
    }
    if text.eos_token_id not in (LARGEST, text.vocab_size - 1):  # open_clip pools at the largest token by itself
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    config = {"embed_dim": architecture.embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    for tower, cfg in ((vision, vision_cfg), (text, text_cfg)):
        if tower.mlp_width != int(tower.width * MLP_RATIO):
            cfg["mlp_ratio"] = _mlp_ratio(tower.width, tower.mlp_width)
        if GELUS.get(tower.activation):
            cfg["act_kwargs"] = dict(GELUS[tower.activation])
        if tower.layer_norm_eps != LAYER_NORM_EPS:
            cfg["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return config | ({"quick_gelu": True} if quick == {True} else {})


def _mlp_ratio(width, mlp_width):
    """The ratio from which int(width * ratio) gives mlp_width back."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def said_beside(config: dict, where: str) -> dict:
    """Of the JSON file beside a CLIP-MoE file: :func:`to_side_file`."""
    _check_version(config, where)
    said = {tower: config.get(tower) or {} for tower in ("vision", "text")}
    if not all(isinstance(values, dict) for values in said.values()):
        raise ValueError(f"{where}: vision and text must be objects")
    said["embed_dim"] = config.get("embed_dim")
    return said | {"mixtures": _mixtures(config.get("mixtures", {}), where)}


def to_side_file(architecture: CLIPArchitecture) -> dict:
    """What the published layout does not store, and the sizes with it."""
    towers = {tower: asdict(architecture.tower(tower)) for tower in ("vision", "text") if architecture.tower(tower)}
    mixtures = architecture.mixtures_to_json()
    return {"format_version": FORMAT_VERSION, "embed_dim": architecture.embed_dim} | towers | {"mixtures": mixtures}


def _check_version(value, where):
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{where}: format_version must be {FORMAT_VERSION}")
