"""mmbal upcycle, inspect, diff, convert and extract-expert, as a user types them."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mmbal
from checkpoint_helpers import SMALL, assert_same, random_checkpoint, state_dict, with_mixtures
from mmbal.checkpoints import (
    LazyTensor,
    configuration,
    extract_expert,
    open_checkpoint,
    upcycle_checkpoint,
    verification,
    write_checkpoint,
    writing,
)
from mmbal.cli import app
from test_checkpoints_upcycling import clip_of_77, siblings_of


def run(*arguments, code=0):
    """Output and errors of a command that must end with ``code``."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return re.sub(r" +", " ", result.output)


@pytest.fixture
def files(tmp_path):
    """A base and two experts as transformers folders."""
    base = random_checkpoint(SMALL)
    sources = siblings_of(base, 2)
    for name, checkpoint in zip(("base", "one", "two"), (base, *sources), strict=True):
        write_checkpoint(checkpoint, tmp_path / name, "transformers")
    return tmp_path, base, sources


UPCYCLE = ("upcycle", "--base", "{0}/base", "--experts", "{0}/one", "{0}/two", "--top-k", "2", "--out")


def upcycle_command(folder, out, *more, code=0):
    return run(*(word.format(folder) for word in UPCYCLE), folder / out, *more, code=code)


@pytest.mark.parametrize(("format", "out"), [("clipmoe", "x.pt"), ("transformers", "x"), ("open_clip", "x")])
def test_upcycle_writes_what_the_function_gives_and_verifies_it(files, format, out):
    folder, base, sources = files
    said = upcycle_command(folder, out, "--format", format, "--layers", "vision=all,text=last:2", "--verify", "8")
    assert_same(open_checkpoint(folder / out), upcycle_checkpoint(base, sources, layers="vision=all,text=last:2"))
    assert "tensors read back bit for bit" in said and "each expert of 4 layers on 8 random rows equals its FFN" in said
    assert "apart in what they put out" in said and "routers" in said


def test_experts_may_be_said_one_by_one_too(files):
    folder, base, sources = files
    two = ("--experts", folder / "one", "--experts", folder / "two")
    run("upcycle", "--base", folder / "base", *two, "--out", folder / "x", "--format", "transformers")
    assert_same(open_checkpoint(folder / "x"), upcycle_checkpoint(base, sources))


def test_weights_that_are_no_numbers_are_not_verified(files):
    folder, base, _ = files
    name = "transformer.resblocks.1.mlp.c_fc.bias"
    broken = LazyTensor((160,), torch.float32, lambda: torch.full((160,), torch.nan))
    write_checkpoint(replace(base, tensors=base.tensors | {name: broken}), folder / "nan", "transformers")
    said = run("upcycle", "--base", folder / "nan", "--out", folder / "x.pt", code=1)
    assert "x.pt is written, but experts put out NaN or infinity in 1 layers" in said and "Verified" not in said


def test_a_description_that_is_not_what_was_written_is_not_verified(files, monkeypatch):
    folder, *_ = files
    describe = configuration.to_side_file
    top_1 = lambda a: replace(a, mixtures={t: replace(m, top_k=1) for t, m in a.mixtures.items()})  # noqa: E731
    monkeypatch.setattr(configuration, "to_side_file", lambda architecture: describe(top_1(architecture)))
    said = upcycle_command(folder, "x.pt", code=1)
    assert "says something else of" in said and "mixture of vision: top_k" in said and "Verified" not in said


def test_experts_given_twice_are_named(files):
    folder, *_ = files
    words = ("upcycle", "--base", folder / "base", "--experts", folder / "one", folder / "one")
    said = run(*words, "--out", folder / "x.pt", "--verify", 0)
    assert re.search(r"warning: upcycle: experts\[0\] \(.*one\) and experts\[1\] \(.*one\) have the same MLPs", said)


def test_a_folder_may_be_replaced_by_what_is_made_of_it(files):
    folder, base, sources = files
    for name in ("base", "one"):  # as base and as expert
        words = ("upcycle", "--base", folder / "base", "--experts", folder / "one", folder / "two")
        run(*words, "--format", "transformers", "--out", folder / name, "--overwrite")
        assert_same(open_checkpoint(folder / name), upcycle_checkpoint(base, sources))
        write_checkpoint(base if name == "base" else sources[0], folder / name, "transformers", overwrite=True)


def test_paths_are_printed_as_they_are(files):
    folder, *_ = files
    assert "Written: " + str(folder / "x[b].pt") in upcycle_command(folder, "x[b].pt")


def test_copies_are_said_to_be_the_same(files):
    folder, base, _ = files
    said = run("upcycle", "--base", folder / "base", "--out", folder / "x.pt", "--num-experts", 3)
    assert "Two experts of a layer are the same" in said
    assert_same(open_checkpoint(folder / "x.pt"), upcycle_checkpoint(base, num_experts=3))


def test_text_positions_are_stretched(tmp_path):
    write_checkpoint(clip_of_77(), tmp_path / "base", "transformers")
    said = run("upcycle", "--base", tmp_path / "base", "--text-positions", 248, "--out", tmp_path / "x.pt")
    found = open_checkpoint(tmp_path / "x.pt")
    assert found.architecture.text.context_length == 248 and found["positional_embedding_res"].shape == (248, 128)
    assert "248 positions" not in said  # nothing to note: the published code has as many
    assert "248 positions" in run("upcycle", "--base", tmp_path / "base", "--out", tmp_path / "short.pt")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--top-k", 5), "top_k must be from 1 to num_experts = 3, got 5"),
        (("--layers", "vision=first"), "layers of vision must be all, last:M"),
        (("--router-init", "magic"), "router_init must be uniform"),
        (("--format", "onnx"), "format must be one of"),
        (("--dtype", "int8"), "--dtype must be float32, float16 or bfloat16, got 'int8'"),
        (("--shared-expert",), "clipmoe cannot hold a shared expert"),
        (("--experts", "nowhere"), "nowhere"),
        (("--text-positions", 300), "30 positions become 60, got 300"),
    ],
)
def test_a_wrong_option_ends_with_a_message_and_writes_nothing(files, more, message):
    folder, *_ = files
    before = sorted(file.name for file in folder.iterdir())
    said = upcycle_command(folder, "x.pt", *more, code=1)
    assert message in said and "Traceback" not in said
    assert sorted(file.name for file in folder.iterdir()) == before


def test_nothing_is_overwritten_unless_it_is_said(files):
    folder, *_ = files
    upcycle_command(folder, "x.pt")
    before = (folder / "x.pt").read_bytes()
    assert "exists already; --overwrite replaces it" in upcycle_command(folder, "x.pt", "--seed", 1, code=1)
    assert (folder / "x.pt").read_bytes() == before
    upcycle_command(folder, "x.pt", "--seed", 1, "--overwrite")
    assert (folder / "x.pt").read_bytes() != before


def test_sources_that_differ_outside_their_ffns_are_refused_unless_it_is_said(files):
    folder, base, _ = files
    write_checkpoint(random_checkpoint(SMALL, 9), folder / "stranger", "transformers")
    words = ("upcycle", "--base", folder / "base", "--experts", folder / "stranger", "--out", folder / "x.pt")
    assert "sources differ from the base outside their MLPs" in run(*words, code=1)
    assert not (folder / "x.pt").exists()
    run(*words, "--shared", "mean")
    name = "ln_final.weight"
    mean = (base[name].double() + random_checkpoint(SMALL, 9)[name].double()) / 2
    assert torch.equal(open_checkpoint(folder / "x.pt")[name], mean.float())


def test_inspect_says_what_is_in_a_file(tmp_path):
    mixture = with_mixtures(SMALL, vision=(1,), num_experts=6, top_k=3)
    write_checkpoint(random_checkpoint(mixture), tmp_path / "x.pt", "clipmoe", dtype=torch.bfloat16)
    said = run("inspect", tmp_path / "x.pt")
    for line in (
        "format clipmoe",
        "dtypes bfloat16 100.0%",
        "vision mixture E = 6 experts, K = 3 a token; layers 1",
        "text mixture E = 6 experts, K = 3 a token; layers 0 to 2",
        "vision 2 layers of 64, 1 heads, FFNs of 96 with quick_gelu; 8 pixels in patches of 4",
    ):
        assert line in said
    router = 6 * 64 + 3 * 6 * 128
    ffn = lambda width, hidden: 2 * width * hidden + width + hidden  # noqa: E731
    total = sum(tensor.numel() for tensor in torch.load(tmp_path / "x.pt", weights_only=True).values())
    active = total - 3 * ffn(64, 96) - 3 * 3 * ffn(128, 160)
    experts = 7 * ffn(64, 96) + 18 * ffn(128, 160)
    assert f"all {total:,} {active:,} {router:,} {experts:,}" in said


def test_inspect_refuses_what_is_no_clip(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    assert "x.pt" in run("inspect", tmp_path / "x.pt", code=1)
    assert "nowhere" in run("inspect", tmp_path / "nowhere", code=1)


def test_diff_proves_that_experts_differ_in_their_ffns_only(files):
    folder, *_ = files
    said = run("diff", folder / "base", folder / "one", code=1)
    assert "They differ in their FFNs only (20 tensors)." in said
    write_checkpoint(random_checkpoint(SMALL, 9), folder / "stranger", "transformers")
    said = run("diff", folder / "base", folder / "stranger", code=1)
    assert re.search(r"They differ outside their FFNs, in \d+ tensors", said)


def test_diff_compares_values_across_formats(files):
    folder, *_ = files
    run("convert", folder / "base", "--format", "open_clip", "--out", folder / "other")
    assert "They are the same." in run("diff", folder / "base", folder / "other")
    run("convert", folder / "base", "--format", "transformers", "--dtype", "bfloat16", "--out", folder / "rounded")
    assert "They differ outside their FFNs" in run("diff", folder / "base", folder / "rounded", code=1)


def test_diff_refuses_two_architectures(files, tmp_path):
    folder, *_ = files
    write_checkpoint(random_checkpoint(with_mixtures(SMALL)), tmp_path / "moe", "transformers")
    assert "must have one architecture" in run("diff", folder / "base", tmp_path / "moe", code=2)
    assert "nowhere" in run("diff", folder / "base", tmp_path / "nowhere", code=2)


def test_diff_takes_the_format_of_bare_state_dicts_for_both(files):
    folder, base, sources = files
    for name, checkpoint in (("a.pt", base), ("b.pt", sources[0])):
        torch.save(state_dict(checkpoint), folder / name)
    words = ("diff", folder / "a.pt", folder / "b.pt")
    assert "say format=openai" in run(*words, code=2)
    assert "They differ in their FFNs only" in run(*words, "--from", "openai", code=1)
    assert "They are the same." in run("diff", folder / "a.pt", folder / "base", "--from", "openai")


@pytest.mark.parametrize("ffn_only", [False, True])
def test_an_expert_taken_out_upcycles_again_to_the_same_mixture(files, ffn_only):
    folder, _, sources = files
    upcycle_command(folder, "x.pt")
    for j in (1, 2):
        more = ("--ffn-only",) if ffn_only else ("--format", "transformers")
        run("extract-expert", folder / "x.pt", "--expert", j, "--out", folder / f"expert{j}", *more)
    again = ("--experts", folder / "expert1", folder / "expert2", "--out", folder / "y.pt")
    run("upcycle", "--base", folder / "base", *again)
    assert_same(open_checkpoint(folder / "y.pt"), open_checkpoint(folder / "x.pt"))
    assert_same(extract_expert(open_checkpoint(folder / "x.pt"), 1), sources[0])


def test_ffns_alone_have_one_format(files):
    folder, *_ = files
    upcycle_command(folder, "x.pt")
    words = ("extract-expert", folder / "x.pt", "--expert", 1, "--ffn-only", "--out", folder / "y")
    assert "--ffn-only writes FFNs under OpenAI's names" in run(*words, "--format", "transformers", code=1)
    assert not (folder / "y").exists()


def test_experts_that_are_mixtures_or_have_another_activation_are_refused(files):
    folder, base, _ = files
    upcycle_command(folder, "x", "--format", "transformers")
    words = ("upcycle", "--base", folder / "base", "--out", folder / "y.pt", "--experts")
    assert "must be dense, it has mixtures; see mmbal extract-expert" in run(*words, folder / "x", code=1)
    towers = {tower: replace(base.architecture.tower(tower), activation="gelu") for tower in ("vision", "text")}
    base.architecture = replace(base.architecture, **towers)
    write_checkpoint(base, folder / "gelu", "open_clip")
    assert "must have activation quick_gelu in text, got gelu" in run(*words, folder / "gelu", code=1)


def interrupt(*_):
    """What Ctrl-C becomes; a job in the background may ignore the signal itself."""
    raise KeyboardInterrupt


def test_an_interrupted_upcycle_leaves_nothing(files, monkeypatch):
    folder, *_ = files
    write = writing.write_checkpoint

    def interrupted(*arguments):
        *most, _ = arguments
        write(*most, interrupt)

    monkeypatch.setattr(mmbal.checkpoints, "write_checkpoint", interrupted)
    before = sorted(file.name for file in folder.iterdir())
    said = upcycle_command(folder, "x.pt", code=130)
    assert "x.pt was not written" in said and "Traceback" not in said
    assert sorted(file.name for file in folder.iterdir()) == before


def test_an_interrupted_check_does_not_say_that_nothing_was_written(files, monkeypatch):
    folder, *_ = files
    monkeypatch.setattr(verification, "verify_layers", interrupt)
    assert "not written" not in upcycle_command(folder, "x.pt", code=130)
    assert (folder / "x.pt").exists()


MEMORY = """
import shlex, shutil, sys, threading, time
from pathlib import Path
def rss():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, rss())
        time.sleep(0.002)
import torch, mmbal, mmbal.commands.checkpoints, mmbal.checkpoints.verification, rich.progress
from mmbal.cli import app
torch.ones(512, 512) @ torch.ones(512, 512)
before = rss()
threading.Thread(target=watch, daemon=True).start()
for line in sys.argv[2:]:
    peak = 0
    app(shlex.split(line), standalone_mode=False)
    out = Path(sys.argv[1])
    files = [out] if out.is_file() else list(out.iterdir())
    print("ANON", peak - before, "SIZE", sum(f.stat().st_size for f in files))
    out.unlink() if out.is_file() else shutil.rmtree(out)
    Path(str(out) + ".json").unlink(missing_ok=True)
"""

MEMORY_CASES = (
    "--experts one one one --format clipmoe",
    "--experts one one one --format transformers",
    "--experts one one one --format open_clip --shared mean",
    "--num-experts 4 --expert-init noise --format transformers --dtype bfloat16",
    "--num-experts 4 --expert-init drop --format clipmoe",
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_upcycling_takes_less_memory_than_the_file_it_writes(tmp_path):
    wide = replace(
        SMALL,
        vision=replace(SMALL.vision, width=512, heads=8, mlp_width=2048, layers=4),
        text=replace(SMALL.text, width=512, heads=8, mlp_width=2048, layers=4),
    )
    base = random_checkpoint(wide)
    write_checkpoint(base, tmp_path / "base", "transformers")
    write_checkpoint(siblings_of(base, 1)[0], tmp_path / "one", "transformers")
    lines = [f"upcycle --base base --out x --verify 8 {case}" for case in MEMORY_CASES]
    command = [sys.executable, "-c", MEMORY, "x", *lines]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"ANON (\d+) SIZE (\d+)", done.stdout)
    assert len(found) == len(MEMORY_CASES)
    for case, (anonymous, size) in zip(MEMORY_CASES, found, strict=True):
        assert int(size) > 100e6
        assert int(anonymous) < int(size), f"{case}: {int(anonymous) / int(size):.2f} of {size} bytes"
