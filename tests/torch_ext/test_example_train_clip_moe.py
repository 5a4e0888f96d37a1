"""The script that trains in several processes runs as it stands, through torchrun, in every kind of parallelism."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import mmbal

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_clip_moe.py"


def train_in(folder, processes, kind, steps):
    """{step: loss} that a run prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(SCRIPT), "--parallel", kind, "--steps", str(steps), "--batch", "16", "--save-every", "1"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=one_thread)
    assert result.returncode == 0, result.stderr
    assert "mmbal.load_clip_moe reads it" in result.stdout
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss ([\d.]+)$", result.stdout, re.M)}


def test_a_run_goes_on_in_other_kinds_of_parallelism_as_one_process_would(tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "parts").mkdir()
    alone = train_in(tmp_path / "alone", 1, "ddp", 3)
    found = {}
    for step, kind in enumerate(("fsdp", "expert", "ddp"), 1):
        losses = train_in(tmp_path / "parts", 2, kind, step)
        assert list(losses) == [step]
        found |= losses
    assert found == pytest.approx(alone, rel=2e-5)
    expected, trained = (mmbal.load_clip_moe(tmp_path / run / "clip-moe").state_dict() for run in ("alone", "parts"))
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


def save_clip(folder, clip):
    """A folder as CLIPModel and CLIPProcessor read it; words of single letters."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    letters = [*"abcdefgh", *(f"{c}</w>" for c in "abcdefgh"), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=9)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    clip.save_pretrained(folder)


def test_it_reads_a_clip_and_pairs_of_ones_own(tmp_path, make_clip):
    (tmp_path / "clip").mkdir()
    (tmp_path / "pairs").mkdir()
    save_clip(tmp_path / "clip", make_clip(0))
    for i, caption in enumerate(("a b", "c", "d e f")):
        Image.new("RGB", (20, 30), (i * 90, 0, 0)).save(tmp_path / "pairs" / f"{i}.png")
        (tmp_path / "pairs" / f"{i}.txt").write_text(caption)
    spec = importlib.util.spec_from_file_location("train_clip_moe", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    clip, batch, count = script.load_clip(Namespace(clip=tmp_path / "clip", pairs=tmp_path / "pairs", seed=0))
    assert count == 3
    inputs = batch([2, 0])
    assert inputs["input_ids"].shape == (2, 9) and inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    assert clip(**inputs).image_embeds.shape == (2, 16)
    trained = [name for name, p in clip.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(".mlp.router." in name for name in trained)
