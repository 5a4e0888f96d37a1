"""The script that trains in several processes: through torchrun as it stands, and in forked processes, which are
cheaper to start, in the other kinds of parallelism."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from typer.testing import CliRunner

import mmbal
from mmbal.cli import app

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_clip_moe.py"


def load_script():
    spec = importlib.util.spec_from_file_location("train_clip_moe", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def options(out, kind, steps):
    return ["--out", out, "--parallel", kind, "--steps", str(steps), "--batch", "12", "--save-every", "1"]


def losses(printed):
    """{step: loss}"""
    assert "mmbal.load_clip_moe reads it" in printed
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss ([\d.]+)$", printed, re.M)}


def through_torchrun(folder, processes, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, str(SCRIPT), *options], cwd=folder, capture_output=True, text=True, timeout=600, env=one_thread
    )
    assert result.returncode == 0, result.stderr
    return losses(result.stdout)


RUNS = {"alone": (1, "ddp", 3), "split": (4, "expert", 2), "replicas": (2, "ddp", 3)}
OUT = {"alone": "alone", "split": "parts", "replicas": "parts"}


def process(rank, folder):
    """What the first of each run's processes prints."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    script, init, printed = load_script(), dist.init_process_group, {}
    for name, (processes, kind, steps) in RUNS.items():
        if rank >= processes:
            continue

        def init_here(backend, name=name, processes=processes):
            store = dist.FileStore(os.path.join(folder, f"store-{name}"), processes)
            init(backend, store=store, rank=rank, world_size=processes)

        arguments = ["train_clip_moe.py", *options(os.path.join(folder, OUT[name]), kind, steps)]
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(dist, "init_process_group", init_here),
            mock.patch.object(torch.cuda, "is_available", lambda: False),
            redirect_stdout(io.StringIO()) as out,
        ):
            script.main()
        printed[name] = out.getvalue()
    if rank == 0:
        Path(folder, "printed.json").write_text(json.dumps(printed))


def test_a_run_goes_on_in_other_kinds_and_numbers_of_processes_as_one_process_would(tmp_path):
    import ranks

    found = through_torchrun(tmp_path, 2, *options("parts", "fsdp", 1))
    assert list(found) == [1]
    ranks.fork(process, (str(tmp_path),), 4)
    runs = {name: losses(text) for name, text in json.loads((tmp_path / "printed.json").read_text()).items()}
    assert [list(runs[name]) for name in RUNS] == [[1, 2, 3], [2], [3]]
    assert found | runs["split"] | runs["replicas"] == pytest.approx(runs["alone"], rel=2e-5)
    expected, trained = (mmbal.load_clip_moe(tmp_path / run).state_dict() for run in ("alone", "parts"))
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)
    moved = [
        name
        for name, start in load_script().load_clip(PARENT)[0].state_dict().items()
        if not torch.equal(trained[name], start)
    ]
    assert len(moved) == 4 and all(name.endswith(".mlp.router.weight") for name in moved)
    said = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["inspect", str(tmp_path / "parts")])
    assert said.exit_code == 0 and re.search(r"^all .* 2,048 ", said.output, re.M)  # 4 routers [4, 128]


PARENT = Namespace(clip=None, pairs=None, seed=0)


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
    clip, batch, count = load_script().load_clip(Namespace(clip=tmp_path / "clip", pairs=tmp_path / "pairs", seed=0))
    assert count == 3
    inputs = batch([2, 0])
    assert inputs["input_ids"].shape == (2, 9) and inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    assert clip(**inputs).image_embeds.shape == (2, 16)
    trained = [name for name, p in clip.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(".mlp.router." in name for name in trained)
