"""`mmbal demo --quick`: what it leaves behind, and that an interrupted run goes on where it stopped."""

import filecmp
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmbal
from mmbal.cli import app
from mmbal.demo.data import load_splits
from mmbal.demo.evaluate import retrieval
from mmbal.demo.model import load_parent
from mmbal.demo.shell import CommandError, Shell

COMMAND = [sys.executable, "-m", "mmbal.cli", "demo", "--quick", "--seed", "3", "--out"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
VARIANTS = {"dense", "dense_continued", "sparse_upcycling", "clip_moe"}
RECALLS = ("R@1", "R@5", "R@10")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted quick run, started in an empty folder."""
    folder = tmp_path_factory.mktemp("demo")
    result = subprocess.run([*COMMAND, "done"], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout)
    return folder / "done"


def report_of(folder: Path):
    return json.loads((folder / "report.json").read_text())


def test_report_json_has_recalls_usage_and_seconds_of_all_variants(finished):
    report = report_of(finished)
    assert set(report["variants"]) == VARIANTS
    for variant in report["variants"].values():
        assert set(variant) == {"image_to_text", "text_to_image"}
        for recalls in variant.values():
            assert 0 <= recalls["R@1"] <= recalls["R@5"] <= recalls["R@10"] <= 100
    assert report["test_pairs"] >= 600
    assert all(sum(shares) == pytest.approx(1) for shares in report["expert_usage"].values())
    assert report["expert_usage"] and all(seconds > 0 for seconds in report["seconds"].values())


def test_the_saved_mixture_loads_with_one_call_and_gives_the_reported_recalls(finished):
    clip = mmbal.load_clip_moe(finished / "clip_moe")
    assert any(isinstance(module, mmbal.MoEMLP) for module in clip.modules())
    _, tokenizer = load_parent()
    recalls = retrieval(clip, tokenizer, load_splits().test)
    assert recalls == report_of(finished)["variants"]["clip_moe"]


def test_the_report_shows_every_recall_and_the_pictures_are_pictures(finished):
    text = (finished / "report.md").read_text()
    for direction in report_of(finished)["variants"]["clip_moe"].values():
        assert all(f"{direction[k]:.1f}" in text for k in RECALLS)
    for picture in finished.glob("*.png"):
        Image.open(picture).verify()
    assert len(list(finished.glob("*.png"))) == 2


def test_experts_differ_and_only_mlps_were_upcycled(finished):
    parent, _ = load_parent()
    clip = mmbal.load_clip_moe(finished / "clip_moe")
    for module in clip.modules():
        if isinstance(module, mmbal.MoEMLP):
            w1 = module.experts.w1
            assert all(not torch.equal(w1[i], w1[j]) for i in range(len(w1)) for j in range(i))
    shared = {name for name, _ in parent.named_parameters() if ".mlp." not in name}
    assert shared <= {name for name, _ in clip.named_parameters()}


def test_each_command_is_shown_before_what_it_says(finished):
    text = (finished.parent / "output.txt").read_text()
    shown = [line.split()[2] for line in text.splitlines() if line.startswith("$ mmbal ")]
    assert shown == 3 * ["mcl", "mcl", "diff"] + ["upcycle", "upcycle", "inspect"]
    for expert in ("mcl_1", "mcl_2", "mcl_3"):
        _, _, after = text.partition(f"$ mmbal diff parent {expert}\n")
        assert "They differ in their FFNs only (24 tensors).\n" in after.partition("\n$ ")[0]
    assert "Verified: " in text.partition("--experts mcl_1 mcl_2 mcl_3 ")[2].partition("\n$ ")[0]
    assert "E = 4 experts, K = 2 a token" in text.partition("$ mmbal inspect clip_moe\n")[2]


def test_commands_sh_makes_the_clusters_and_the_mixture_anew_bit_for_bit(finished, tmp_path, monkeypatch):
    """The shell runs the script with a `mmbal` that only notes where and with what it was called; then one process
    does all that, as to start twelve takes long."""
    stub, calls = tmp_path / "mmbal", tmp_path / "calls.txt"
    stub.write_text(f'#!/bin/sh\nprintf \'%s\\t%s\\n\' "$PWD" "$*" >> {shlex.quote(str(calls))}\n')
    stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", finished / "commands.sh"], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    for call in calls.read_text().splitlines():
        folder, _, words = call.partition("\t")
        monkeypatch.chdir(folder)
        result = CliRunner().invoke(app, words.split())
        assert result.exit_code == (1 if words.startswith("diff") else 0), (words, result.output)

    (made,) = finished.glob("stages/*/again")
    files = ["assembled/model.safetensors", "assembled/config.json", "copies/model.safetensors"]
    files += [f"{kind}_{stage}.safetensors" for kind in ("features", "labels") for stage in (1, 2, 3)]
    assert not (made / files[0]).is_symlink()
    assert filecmp.cmpfiles(made, made.parent, files, shallow=False) == (files, [], [])


def test_a_command_that_fails_stops_with_its_message(tmp_path, capfd):
    (tmp_path / "other").mkdir()
    with pytest.raises(CommandError, match="mmbal inspect other: ended with 1, expected 0"):
        Shell(tmp_path).run("mmbal inspect other")
    output = capfd.readouterr()
    assert "$ mmbal inspect other\n" in output.out
    assert "error: " in output.err and "other" in output.err


def test_an_interrupted_run_keeps_its_stages_and_ends_like_an_uninterrupted_one(finished, tmp_path):
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        [*COMMAND, str(out)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job in the background may ignore it
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("stages/*/mcl_1.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    # A shell says 130 in both cases: the program ends with 130, or Python ends itself with the signal.
    assert process.wait(timeout=60) in (130, -signal.SIGINT), process.stderr.read().decode()
    assert not (out / "report.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("stages/*/*.json")}
    assert "mcl_1.json" in {path.name for path in kept}

    result = subprocess.run([*COMMAND, str(out)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert report_of(out)["variants"] == report_of(finished)["variants"]
    assert report_of(out)["expert_usage"] == report_of(finished)["expert_usage"]
