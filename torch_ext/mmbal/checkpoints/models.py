"""Models in memory from checkpoints, and checkpoints from models."""

from __future__ import annotations

import torch
from torch import nn

from . import configuration
from .checkpoint import Checkpoint, ModelTensors, from_file_tensors
from .reading import open_checkpoint
from .recognition import infer_architecture, recognise
from .writing import entries, write_checkpoint


def load_clip(path, dtype: torch.dtype | None = None, **options):
    """A transformers model of any checkpoint that :func:`open_checkpoint` reads, in evaluation mode on the CPU:
    ``CLIPModel``, or :class:`mmbal.CLIPMoEModel` where it has mixtures.

    dtype : of the weights; None keeps theirs. options : those of :func:`open_checkpoint`.
    """
    return to_model(open_checkpoint(path, **options), dtype)


def to_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None):
    """The transformers model of a checkpoint, with weights of its own."""
    from transformers import CLIPConfig, CLIPModel

    from mmbal.integrations.clip_moe import CLIPMoEConfig, CLIPMoEModel

    architecture = checkpoint.architecture
    if architecture.vision is None or architecture.text is None:
        raise ValueError(f"{checkpoint.path}: must have both towers of a CLIP")
    classes = (CLIPMoEConfig, CLIPMoEModel) if architecture.mixtures else (CLIPConfig, CLIPModel)
    config = configuration.to_transformers(architecture, checkpoint.settings)
    with torch.device("meta"):
        model = classes[1](classes[0].from_dict(config))
    tensors = {}
    for entry in entries(checkpoint, "transformers", dtype):
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        torch.cat([piece.reshape(-1) for piece in entry.make()], out=whole.view(-1))
        tensors[entry.name] = whole
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # indices 0, 1, 2, ... which are not saved
                module._buffers[name] = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    return model.eval()


def from_model(model: nn.Module) -> Checkpoint:
    """The checkpoint of a model of transformers (``CLIPModel``, :class:`mmbal.CLIPMoEModel`, or one tower) or of
    open_clip. Its tensors are the model's own, as they are when they are read."""
    tensors = ModelTensors(model)
    if len(tensors) and all(name.startswith("module.") for name in tensors):
        raise ValueError(f"{type(model).__name__} wraps a model: its .module must be given")
    if split := [name for name, tensor in tensors.tensors.items() if hasattr(tensor, "device_mesh")]:
        raise ValueError(
            f"{type(model).__name__}: weights are split over processes, {split[0]} first; a whole model must be given,"
            " as from torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        )
    source, layout = recognise(tensors, type(model).__name__)
    where, preprocess, settings = type(model).__name__, None, None
    if layout == "transformers":
        settings = model.config.to_dict()
        found = infer_architecture(source, "transformers", where)
        architecture = configuration.complete(found, configuration.said_by_transformers(settings, where), where)
    else:
        from mmbal.integrations.open_clip import architecture_of

        layout, architecture = "open_clip", architecture_of(model)
        preprocess = getattr(model.visual, "preprocess_cfg", None)
    tensors = from_file_tensors(source, architecture, layout, where)
    return Checkpoint(tensors, architecture, "model", preprocess=preprocess, settings=settings)


def save_clip_moe(model: nn.Module, path, format: str = "transformers") -> list[str]:
    """Writes an upcycled CLIP of transformers or open_clip to ``path``, atomically; what was there is replaced.

    format : transformers (a folder that ``CLIPMoEModel.from_pretrained`` reads), clipmoe (the published layout, a
        file), or open_clip (a folder). Returns notes on what other readers will make of it.
    """
    checkpoint = from_model(model)
    if not checkpoint.architecture.mixtures:
        raise ValueError("save_clip_moe: model must have MoEMLP layers; use save_pretrained for a dense model")
    return write_checkpoint(checkpoint, path, format, overwrite=True)


def load_clip_moe(path, **options):
    """The :class:`mmbal.CLIPMoEModel` of a CLIP-MoE in any format, in evaluation mode; see :func:`load_clip`."""
    checkpoint = open_checkpoint(path, **options)
    if not checkpoint.architecture.mixtures:
        raise ValueError(f"load_clip_moe: {path} must have mixtures, it is a dense CLIP")
    return to_model(checkpoint)
