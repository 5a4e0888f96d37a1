"""CLIP-MoE on disk: safetensors for the weights, transformers' config.json, and mmbal.json for the mixtures."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmbal.moe import MoEMLP

FORMAT_VERSION = 1
_OPTIONS = (
    "dim",
    "hidden_dim",
    "num_experts",
    "top_k",
    "activation",
    "normalize",
    "dropout",
    "output_dropout",
)


def replace_file(path: Path, write) -> None:
    """Call write(temporary path), then move the file into place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    temporary.chmod(0o644)  # safetensors makes private files
    os.replace(temporary, path)


@contextmanager
def atomic_folder(folder, marker="mmbal.json"):
    """Yields a new folder that takes the name ``folder`` only once the block has succeeded.

    What was there is replaced if it is such a folder too (it has the file ``marker``) or empty; else it is refused.
    """
    target = Path(folder).absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} must be a folder or not exist")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise ValueError(f"{target} holds other files and no {marker}: it is not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp's folders are private
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, retired / target.name)
            try:
                os.replace(partial, target)
            except BaseException:
                os.replace(retired / target.name, target)
                retired.rmdir()
                raise
            shutil.rmtree(retired)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _mixtures(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MoEMLP)}


def save_clip_moe(model: nn.Module, folder) -> None:
    """Writes an upcycled transformers ``CLIPModel`` to ``folder``: model.safetensors, config.json, mmbal.json.

    The folder appears under its name only when it is complete; one that was there is replaced.
    """
    from transformers import CLIPModel

    if not isinstance(model, CLIPModel):
        raise ValueError(f"save_clip_moe: model must be a transformers CLIPModel, got {type(model).__name__}")
    mixtures = _mixtures(model)
    if not mixtures:
        raise ValueError("save_clip_moe: model must have MoEMLP layers; use save_pretrained for a dense model")
    layers = {
        name: {option: getattr(layer, option) for option in _OPTIONS}
        | {"bias": layer.experts.b1 is not None, "router_bias": layer.router.bias is not None}
        for name, layer in mixtures.items()
    }
    with atomic_folder(folder) as partial:
        tensors = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(partial)
        text = json.dumps({"format_version": FORMAT_VERSION, "model": "CLIPModel", "layers": layers}, indent=2)
        (partial / "mmbal.json").write_text(text + "\n")


def load_clip_moe(folder):
    """Reads what :func:`save_clip_moe` wrote; returns the ``CLIPModel`` with its mixtures, in evaluation mode."""
    from transformers import CLIPConfig, CLIPModel

    folder = Path(folder)
    for name in ("mmbal.json", "config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"load_clip_moe: {folder} must have {name}")
    try:
        description = json.loads((folder / "mmbal.json").read_text())
        version, layers = description["format_version"], description["layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load_clip_moe: {folder / 'mmbal.json'} cannot be read: {error!r}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"load_clip_moe: format_version must be {FORMAT_VERSION}, got {version!r}")
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"load_clip_moe: {folder / 'model.safetensors'} cannot be read: {error}") from None
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    for name, options in layers.items():
        parent, _, attribute = name.rpartition(".")
        try:
            setattr(model.get_submodule(parent), attribute, MoEMLP(**options))
        except (AttributeError, TypeError) as error:
            raise ValueError(f"load_clip_moe: mmbal.json describes {name} wrongly: {error}") from None
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"load_clip_moe: the weights do not fit the configuration: {error}") from None
    return model.eval()
