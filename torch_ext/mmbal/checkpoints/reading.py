"""CLIP checkpoints of any of the known layouts, opened without reading their weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from mmbal.dense import ACTIVATIONS

from . import configuration
from .architecture import CLIPArchitecture
from .checkpoint import Checkpoint, from_file_tensors
from .layouts import LAYOUTS
from .recognition import HEAD_WIDTH, as_part_of_clip, infer_architecture, recognise
from .tensor_files import find_weights, open_tensors
from .untrusted import read_json

# What belongs to a folder besides weights and config; it goes along when another folder is written.
COMPANIONS = re.compile(
    r"tokenizer.*\.json|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json|(pre)?processor_config\.json"
)

_HEADS = f"and heads to have {HEAD_WIDTH} channels"


def open_checkpoint(
    path,
    format: str = "auto",
    activation: str = "auto",
    top_k: int | None = None,
    allow_jit: bool = False,
    like: CLIPArchitecture | None = None,
) -> Checkpoint:
    """Opens a CLIP, dense or with mixtures; weights are read when they are asked for, memory-mapped where possible.

    Parameters
    ----------
    path : a file (OpenAI's state dict or TorchScript archive, open_clip's state dict or training checkpoint,
        safetensors, .bin, the published CLIP-MoE), or a folder of transformers or of open_clip.
    format : "auto", or one of openai, open_clip, clipmoe, transformers.
    activation : of the FFNs; "auto" takes it from the configuration, or from what the format implies (quick_gelu for
        OpenAI's and CLIP-MoE's). A bare state dict with OpenAI's names may be OpenAI's or open_clip's: then it, or the
        format, must be given, for weights do not tell their activation.
    top_k : of a CLIP-MoE file without its JSON file; the published layout does not store it, and 2 is DMU's.
    allow_jit : OpenAI's TorchScript archive is a program; it is run only if this is True.
    like : an architecture that the file has tensors of, without its mixtures: it may hold FFNs alone.

    Raises
    ------
    ValueError
        For a file that is none of these, is damaged, or does not fit its configuration; names the tensor.
    """
    path = Path(path)
    if format not in ("auto", *LAYOUTS):
        raise ValueError(f"format must be auto or one of {', '.join(LAYOUTS)}, got {format!r}")
    if activation != "auto" and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be auto or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    weights, config_file, files = path, path.with_name(path.name + ".json"), {}
    if path.is_dir():
        weights = find_weights(path)
        files = {f.name: f for f in sorted(path.iterdir()) if COMPANIONS.fullmatch(f.name) and f.is_file()}
        config_file = path / ("open_clip_config.json" if weights.name.startswith("open_clip") else "config.json")
    config = read_json(config_file) if config_file.is_file() else None
    archive = open_tensors(weights, allow_jit=allow_jit)
    source, layout = recognise(archive, str(path))
    layout = _layout(layout, format, archive, config, path, "any" if like else activation)
    preprocess = (config or {}).get("preprocess_cfg")
    preprocess = preprocess if isinstance(preprocess, dict) else None
    settings = config if layout == "transformers" else None
    checkpoint = Checkpoint({}, CLIPArchitecture(None, None, None), layout, path, [], files, preprocess, settings)
    if like is not None:
        if layout == "transformers" and (like.embed_dim or None not in (like.vision, like.text)):
            source = as_part_of_clip(source)
        checkpoint.architecture = _like(like, source, layout, config, str(path))
    else:
        said = _said(layout, config, str(config_file), checkpoint.notes)
        checkpoint.architecture = _architecture(source, layout, said, str(path), activation, top_k, checkpoint.notes)
    checkpoint.tensors = from_file_tensors(source, checkpoint.architecture, layout, str(path), like is not None)
    return checkpoint


def _like(like, source, layout, config, where):
    """The given architecture, with the activations that a configuration says."""
    if any(".experts." in name for name in source):
        raise ValueError(f"{where}: must be dense, it has mixtures; see mmbal extract-expert")
    said = _said(layout, config, where, []) if config is not None else {}
    towers = {
        tower: replace(like.tower(tower), activation=said[tower]["activation"])
        for tower in ("vision", "text")
        if like.tower(tower) and "activation" in said.get(tower, {})
    }
    return replace(like, mixtures={}, **towers)


def _layout(found, asked, archive, config, path, activation):
    """Which of the layouts that share OpenAI's names it is."""
    if asked != "auto":
        if asked not in {"openai": ("openai", "open_clip", "clipmoe")}.get(found, (found,)):
            raise ValueError(f"{path}: must be in the layout {asked}, its names are those of {found}")
        return asked
    if found != "openai":
        return found
    if archive.wrapped or (config is not None and "model_cfg" in config):
        return "open_clip"
    if archive.kind == "torchscript" or "input_resolution" in archive or activation != "auto":
        return "openai"
    if config is not None and "format_version" in config:
        return "clipmoe"
    raise ValueError(
        f"{path}: OpenAI and open_clip give their tensors the same names, and these do not tell whether the activation "
        "is quick_gelu or gelu: say format=openai, or activation=gelu"
    )


def _said(layout, config, where, notes):
    """What the configuration says, with the activation that the format implies where it says none."""
    if layout == "transformers" and config is not None:
        return configuration.said_by_transformers(config, where)
    if config is not None and "model_cfg" in config:
        return configuration.said_by_open_clip(config, where)
    if config is not None and "format_version" in config:
        return configuration.said_beside(config, where)
    if layout == "open_clip":
        notes.append(f"no open_clip_config.json: the activation is taken to be gelu, open_clip's default, {_HEADS}")
    elif layout == "transformers":
        notes.append(f"no config.json: the activation is taken to be quick_gelu, transformers' default, {_HEADS}")
    return {tower: {"activation": "gelu" if layout == "open_clip" else "quick_gelu"} for tower in ("vision", "text")}


def _architecture(source, layout, said, where, activation, top_k, notes):
    found = infer_architecture(source, layout, where)
    if activation != "auto":
        said = said | {tower: said.get(tower, {}) | {"activation": activation} for tower in ("vision", "text")}
    for tower in ("vision", "text"):
        sizes = found.tower(tower)
        if sizes and "heads" not in said.get(tower, {}) and sizes.width % HEAD_WIDTH:
            raise ValueError(
                f"{where}: heads of {tower} are not stored, and its width {sizes.width} is no multiple of {HEAD_WIDTH}:"
                " its configuration must be beside it"
            )
    if found.mixtures and "mixtures" not in said:
        if layout != "clipmoe":
            raise ValueError(f"{where}: has mixtures, but no configuration that describes them")
        if top_k is None:
            notes.append(f"no JSON file beside it: top_k is taken to be 2, DMU's, {_HEADS}; say top_k otherwise")
        said = said | {
            "mixtures": {
                tower: replace(mixture, top_k=top_k or mixture.top_k, activation=said[tower]["activation"])
                for tower, mixture in found.mixtures.items()
            }
        }
    elif top_k is not None and not found.mixtures:
        raise ValueError(f"{where}: top_k is of mixtures, but this is a dense CLIP")
    elif top_k is not None and any(mixture.top_k != top_k for mixture in said.get("mixtures", {}).values()):
        raise ValueError(f"{where}: top_k is said by its configuration, got another one, {top_k}")
    if layout == "clipmoe" and found.text and found.text.kept_positions is None and found.text.context_length > 77:
        notes.append("no positional_embedding_res: positional_embedding is used for all positions")
    architecture = configuration.complete(found, said, where)
    for tower, mixture in architecture.mixtures.items():
        if not 1 <= mixture.top_k <= mixture.num_experts:
            raise ValueError(f"{where}: top_k must be from 1 to {mixture.num_experts}, got {mixture.top_k}")
        if mixture.activation != architecture.tower(tower).activation:
            other = architecture.tower(tower).activation
            raise ValueError(f"{where}: the mixture of {tower} must have activation {other}, got {mixture.activation}")
    return architecture
