"""What the documents show is run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

import mmbal

ROOT = Path(__file__).parents[2]


def small_clip(seed):
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0},
            vision_config={**tower, "image_size": 24, "patch_size": 8},
            projection_dim=16,
        )
    )


def test_the_recipe_of_the_readme_trains_routers_and_saves_a_model_that_loads(monkeypatch, tmp_path):
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda name: small_clip(0))
    batch = {"input_ids": torch.randint(4, 50, (6, 5)), "pixel_values": torch.randn(6, 3, 24, 24)}
    names = {"experts": [small_clip(seed) for seed in (1, 2, 3)], "loader": [batch, batch]}
    exec(compile(recipe, "README.md", "exec"), names)
    clip, loaded = names["clip"], mmbal.load_clip_moe("clip-moe")
    assert all(name.split(".")[-2] == "router" for name, p in clip.named_parameters() if p.requires_grad)
    untrained = mmbal.upcycle(small_clip(0), experts=names["experts"], top_k=2)
    moved = {n for (n, a), b in zip(clip.named_parameters(), untrained.parameters(), strict=True) if not a.equal(b)}
    assert moved and all(".router." in name for name in moved)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in clip.state_dict().items())


def test_the_example_script_trains_and_leaves_a_model_that_loads(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "clip_moe.py"), "--steps", "2", "--batch", "16"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "after training: mean recall" in result.stdout
    clip = mmbal.load_clip_moe(tmp_path / "clip-moe")
    assert sum(isinstance(module, mmbal.MoEMLP) for module in clip.modules()) == 4
