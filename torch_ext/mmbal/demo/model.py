"""The demo's CLIP: its configuration, its files and its embeddings.

Shapes: B batch, T caption tokens, P projection width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPConfig, CLIPModel

from mmbal.files import replace_file

from .data import ASSETS, BOS, EOS, MAX_TOKENS, PAD, TILE


def build_clip(
    vocabulary: int,
    width: int = 128,
    layers: int = 3,
    patch: int = 12,
    attention_dropout: float = 0.0,
    seed: int = 0,
) -> CLIPModel:
    """A small CLIP with random weights."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "hidden_act": "quick_gelu",
        "attention_dropout": attention_dropout,
        "projection_dim": width,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": vocabulary,
            "max_position_embeddings": MAX_TOKENS,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        vision_config={**tower, "image_size": TILE, "patch_size": patch},
        projection_dim=width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config)


def embed_images(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, 48, 48] -> unit vectors [B, P]."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def embed_texts(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] -> unit vectors [B, P]. Attention is causal, so the padding after <end> changes nothing."""
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)


def save_weights(path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    tensors = {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    replace_file(path, lambda file: save_file(tensors, file))


def save_parent(folder: Path, model: CLIPModel, tokenizer: Tokenizer) -> None:
    """Weights in float16: half the size, and the recalls stay the same."""
    replace_file(folder / "tokenizer.json", lambda file: tokenizer.save(str(file)))
    config = json.dumps(model.config.to_dict(), indent=2, default=str)
    replace_file(folder / "parent_config.json", lambda file: file.write_text(config + "\n", encoding="utf-8"))
    save_weights(folder / "parent.safetensors", model.state_dict(), torch.float16)


def load_parent(folder: Path = ASSETS) -> tuple[CLIPModel, Tokenizer]:
    """The pretrained CLIP that the demo upcycles, float32, in evaluation mode, and its tokenizer."""
    config = json.loads((folder / "parent_config.json").read_text(encoding="utf-8"))
    model = CLIPModel(CLIPConfig.from_dict(config))
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "parent.safetensors").items()}
    model.load_state_dict(state)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
