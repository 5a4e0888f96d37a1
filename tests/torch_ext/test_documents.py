"""What the documents show is run as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel, CLIPConfig, CLIPModel
from typer.testing import CliRunner

import mmbal
from mmbal.checkpoints import write_checkpoint
from mmbal.cli import app
from test_checkpoints_upcycling import clip_of_77, siblings_of

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


def recipe_of(heading):
    """The code of one section of the README."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", (ROOT / "README.md").read_text(), flags=re.S | re.M).group(1)
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    return compile(code, "README.md", "exec")


def test_the_recipe_of_the_readme_trains_routers_and_saves_a_model_that_loads(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda name: small_clip(0))
    batch = {"input_ids": torch.randint(4, 50, (6, 5)), "pixel_values": torch.randn(6, 3, 24, 24)}
    names = {"experts": [small_clip(seed) for seed in (1, 2, 3)], "loader": [batch, batch]}
    exec(recipe_of("A mixture of experts in your training script"), names)
    clip, loaded = names["clip"], mmbal.load_clip_moe("clip-moe")
    assert all(name.split(".")[-2] == "router" for name, p in clip.named_parameters() if p.requires_grad)
    untrained = mmbal.upcycle(small_clip(0), experts=names["experts"], top_k=2)
    moved = {n for (n, a), b in zip(clip.named_parameters(), untrained.parameters(), strict=True) if not a.equal(b)}
    assert moved and all(".router." in name for name in moved)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in clip.state_dict().items())


def test_the_commands_of_the_readme_make_a_clip_moe_that_transformers_loads(monkeypatch, tmp_path):
    section = re.search(r"^## From checkpoints to a CLIP-MoE.*?^## ", (ROOT / "README.md").read_text(), re.S | re.M)[0]
    commands = re.findall(r"^    mmbal (.*)$", section, flags=re.M)
    assert [command.split()[0] for command in commands] == ["upcycle", "inspect", "convert", "diff"]
    monkeypatch.chdir(tmp_path)
    base = clip_of_77()
    write_checkpoint(base, "base.pt", "openai")
    for j, stage in enumerate(siblings_of(base, 3), start=1):
        write_checkpoint(stage, f"stage{j}.pt", "openai")
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == (1 if command.startswith("diff") else 0), result.output  # they differ
    assert "They differ in their FFNs only" in result.output
    clip = AutoModel.from_pretrained("clip-moe")
    assert isinstance(clip, mmbal.integrations.clip_moe.CLIPMoEModel)
    assert clip.config.text_config.max_position_embeddings == 248
    assert clip.text_model.encoder.layers[1].mlp.experts.w1.shape == (4, 160, 128)


class ThreeModalities(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoders = torch.nn.ModuleDict({name: torch.nn.Linear(3, 4) for name in ("text", "audio", "video")})
        self.head = torch.nn.Linear(12, 1)

    def encode(self, inputs):
        return {name: encoder(inputs[name]) for name, encoder in self.encoders.items()}

    def fuse(self, embeddings):
        return self.head(torch.cat(list(embeddings.values()), 1)).squeeze(1)


def test_the_recipe_of_the_readme_weighs_modalities():
    model = ThreeModalities()
    inputs = {name: torch.randn(20, 3) for name in model.encoders}
    target = inputs["text"].sum(1)
    names = {"model": model, "epochs": 2, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    names |= {"train_inputs": inputs, "train_target": target, "validation_inputs": inputs, "validation_target": target}
    names["unimodal"] = {name: 0.9 * target + 0.1 * torch.randn(20) for name in model.encoders}
    names["loader"] = [
        {"inputs": {name: x[index] for name, x in inputs.items()}, "index": index, "target": target[index]}
        for index in torch.randperm(20).split(8)
    ]
    before = [p.clone() for p in model.parameters()]
    exec(recipe_of("Weights for modalities in your training script"), names)
    btw = names["btw"]
    assert int(btw.updates) == 2 and (btw.table != 1).all()
    assert (btw.table.sum(1) - 3).abs().max() < 1e-5
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class TwoModalities(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.audio, self.video, self.head = torch.nn.Linear(5, 8), torch.nn.Linear(3, 8), torch.nn.Linear(16, 3)

    def forward(self, batch):
        return self.head(torch.cat([self.audio(batch["audio"]), self.video(batch["video"])], 1))


def test_the_recipe_of_the_readme_masks_subnetworks():
    model = TwoModalities()
    before = [p.clone() for p in (model.audio.weight, model.video.weight)]
    inputs = {"audio": torch.randn(12, 5), "video": torch.randn(12, 3)}
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    names["loader"] = [(inputs, inputs["audio"][:, :3].argmax(1))]
    exec(recipe_of("Masked subnetworks in your training script"), names)
    amss = names["amss"]
    assert amss.steps == 1 and amss.plus
    for p, old, name in zip((model.audio.weight, model.video.weight), before, amss.rho, strict=True):
        moved = (p != old).any(1).sum().item()
        assert abs(moved - 8 * amss.rho[name]) < 1  # rounded down or up


def test_the_recipe_of_the_readme_asks_for_shares(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = TwoModalities()
    model.audio_net, model.video_net = model.audio, model.video
    inputs = {"audio": torch.randn(12, 5), "video": torch.randn(12, 3)}
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "epochs": 3}
    names["loader"] = [(inputs, inputs["audio"][:, :3].argmax(1))]
    exec(recipe_of("Attribution regularisation in your training script"), names)
    assert names["value"].item() > 0 and names["regularizer"].steps == 3
    assert names["monitor"].steps == [0, 1, 2] and (tmp_path / "shares.png").exists()
    assert [id(p) for p in names["tap"].head_parameters()] == [id(p) for p in model.head.parameters()]


def test_the_recipe_of_the_readme_aligns_modalities(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def small(dims, **options):
        return make(dims, hidden=16, **options)

    make = mmbal.MoEConnector
    monkeypatch.setattr(mmbal, "MoEConnector", small)
    image, text = torch.randn(256, 4, 1024), torch.randn(256, 4096)
    names = {"dataset": torch.utils.data.TensorDataset(image, text), "epochs": 2}
    names |= {"validation": {"image": image[:40], "text": text[:40]}, "pictures": image[:7], "captions": text[:30]}
    exec(recipe_of("Alignment of any modalities in your training script"), names)
    trainer, connector = names["trainer"], names["connector"]
    assert trainer.steps == 4 and (tmp_path / "checkpoint.pt").exists()
    assert all(connector.usage(direction).any() for direction in [("image", "text"), ("text", "image")])
    assert names["ids"].shape == (7, 5) and len(names["store"]) == 30


def test_the_example_script_trains_and_leaves_a_model_that_loads(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "clip_moe.py"), "--steps", "2", "--batch", "16"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "after training: mean recall" in result.stdout
    clip = mmbal.load_clip_moe(tmp_path / "clip-moe")
    assert sum(isinstance(module, mmbal.MoEMLP) for module in clip.modules()) == 4
