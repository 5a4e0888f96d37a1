"""Writing keeps what was there until it is done, says what other readers get wrong, and refuses what cannot be held."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_helpers import L14, SMALL, assert_same, random_checkpoint, with_mixtures
from mmbal.checkpoints import LazyTensor, open_checkpoint, write_checkpoint
from mmbal.checkpoints.writing import check_format

FORMATS = {"openai": "clip.pt", "clipmoe": "clip.pt", "transformers": "clip", "open_clip": "clip"}


def failing(checkpoint, name="ln_final.bias"):
    """One tensor of it cannot be read."""

    def fail():
        raise OSError("the disk is gone")

    lazy = checkpoint.tensors[name]
    return replace(checkpoint, tensors=checkpoint.tensors | {name: LazyTensor(lazy.shape, lazy.dtype, fail)})


@pytest.mark.parametrize("format", FORMATS)
def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path, format):
    with pytest.raises(OSError, match="the disk is gone"):
        write_checkpoint(failing(random_checkpoint(SMALL)), tmp_path / FORMATS[format], format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["openai", "transformers", "open_clip"])
def test_a_failure_while_writing_again_keeps_what_was_there(tmp_path, format):
    first, path = random_checkpoint(SMALL), tmp_path / FORMATS[format]
    write_checkpoint(first, path, format)
    with pytest.raises(OSError, match="the disk is gone"):
        write_checkpoint(failing(random_checkpoint(SMALL, 1)), path, format, overwrite=True)
    assert_same(open_checkpoint(path, format=format), first)
    second = random_checkpoint(SMALL, 1)
    write_checkpoint(second, path, format, overwrite=True)
    assert_same(open_checkpoint(path, format=format), second)


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_replaced_unless_it_is_said(tmp_path, format):
    path = tmp_path / FORMATS[format]
    write_checkpoint(random_checkpoint(SMALL), path, format)
    with pytest.raises(ValueError, match="exists already"):
        write_checkpoint(random_checkpoint(SMALL, 1), path, format)


@pytest.mark.parametrize("format", ["transformers", "open_clip"])
def test_a_folder_with_other_files_is_never_replaced(tmp_path, format):
    write_checkpoint(random_checkpoint(SMALL), tmp_path / "clip", format)
    (tmp_path / "clip" / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match="holds other files"):
        write_checkpoint(random_checkpoint(SMALL), tmp_path / "clip", format, overwrite=True)
    assert (tmp_path / "clip" / "notes.txt").read_text() == "kept"


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from checkpoint_helpers import SMALL, random_checkpoint
from mmbal.checkpoints import write_checkpoint
def slowly(size):
    print("writing", flush=True)
    time.sleep(0.2)
write_checkpoint(random_checkpoint(SMALL, 1), sys.argv[2], sys.argv[3], overwrite=True, progress=slowly)
"""


@pytest.mark.parametrize("format", ["openai", "transformers"])
def test_a_killed_writer_leaves_what_was_there_under_its_name(tmp_path, format):
    first, path = random_checkpoint(SMALL), tmp_path / FORMATS[format]
    write_checkpoint(first, path, format)
    command = [sys.executable, "-c", SLOW, os.path.dirname(__file__), str(path), format]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert_same(open_checkpoint(path, format=format), first)


def test_one_dtype_for_all_rounds_once(tmp_path):
    checkpoint = random_checkpoint(with_mixtures(SMALL))
    write_checkpoint(checkpoint, tmp_path / "clip", "transformers", dtype=torch.bfloat16)
    found = open_checkpoint(tmp_path / "clip")
    assert json.loads((tmp_path / "clip" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in checkpoint.tensors:
        assert torch.equal(found[name], checkpoint[name].bfloat16()), name


def test_experts_of_several_dtypes_are_stacked_in_the_wider_one(tmp_path):
    checkpoint = random_checkpoint(with_mixtures(SMALL, num_experts=2))
    name = "transformer.resblocks.0.experts.1.c_fc.weight"
    half = checkpoint[name].half()
    checkpoint.tensors[name] = LazyTensor(tuple(half.shape), half.dtype, lambda: half)
    write_checkpoint(checkpoint, tmp_path / "clip", "transformers")
    found = open_checkpoint(tmp_path / "clip")
    assert found[name].dtype == torch.float32 and torch.equal(found[name], half.float())


def test_shards_of_transformers_hold_the_same_weights(tmp_path):
    checkpoint = random_checkpoint(with_mixtures(SMALL))
    write_checkpoint(checkpoint, tmp_path / "clip", "transformers", max_shard_bytes=300_000)
    assert len(list((tmp_path / "clip").glob("model-*-of-*.safetensors"))) > 2
    assert_same(open_checkpoint(tmp_path / "clip"), checkpoint)
    with pytest.raises(ValueError, match="max_shard_bytes is served for format transformers only"):
        write_checkpoint(checkpoint, tmp_path / "clip.pt", "clipmoe", max_shard_bytes=300_000)


def test_a_published_file_of_248_positions_has_two_equal_tables(tmp_path):
    long = replace(SMALL, text=replace(SMALL.text, context_length=248))
    checkpoint = random_checkpoint(with_mixtures(long))
    write_checkpoint(checkpoint, tmp_path / "clip.pt", "clipmoe")
    tensors = torch.load(tmp_path / "clip.pt", weights_only=True)
    assert torch.equal(tensors["positional_embedding_res"], tensors["positional_embedding"])
    assert torch.equal(tensors["positional_embedding"], checkpoint["positional_embedding"])


def test_rows_of_positions_that_are_lost_are_noted(tmp_path):
    long = replace(SMALL, text=replace(SMALL.text, context_length=248, kept_positions=20))
    notes = write_checkpoint(random_checkpoint(long), tmp_path / "differ", "transformers")
    assert any("two tables of positions" in note for note in notes)
    checkpoint = random_checkpoint(long)
    checkpoint.tensors["positional_embedding_res"] = checkpoint.tensors["positional_embedding"]
    assert write_checkpoint(checkpoint, tmp_path / "same", "transformers") == []


def test_a_model_that_pools_elsewhere_than_at_the_largest_id_is_refused():
    other = replace(SMALL, text=replace(SMALL.text, eos_token_id=3))
    for format in ("openai", "clipmoe"):
        with pytest.raises(ValueError, match="pools the text at the largest token id, 69; this model pools at 3"):
            check_format(other, format)
    assert check_format(other, "transformers") == []
    assert check_format(replace(SMALL, text=replace(SMALL.text, eos_token_id=2)), "open_clip") == []


@pytest.mark.parametrize(
    ("change", "format", "message"),
    [
        ({"activation": "gelu"}, "openai", "means quick_gelu; the activation of text is gelu"),
        ({"activation": "gelu"}, "open_clip", "activations must be quick_gelu in both towers"),
        ({"layer_norm_eps": 1e-6}, "clipmoe", "layer norms with eps 1e-5"),
    ],
)
def test_what_a_format_computes_otherwise_is_refused(change, format, message):
    with pytest.raises(ValueError, match=message):
        check_format(replace(SMALL, text=replace(SMALL.text, **change)), format)


def test_formats_of_two_towers_refuse_one_and_unknown_formats_are_named():
    with pytest.raises(ValueError, match="must have both towers, this is the vision tower alone"):
        check_format(replace(SMALL, text=None), "open_clip")
    with pytest.raises(ValueError, match="format must be one of openai, open_clip, clipmoe, transformers, got 'onnx'"):
        check_format(SMALL, "onnx")


def test_what_the_published_code_would_read_wrongly_is_noted():
    assert check_format(L14, "openai") == []
    long = replace(L14, text=replace(L14.text, context_length=248))
    assert check_format(with_mixtures(long), "clipmoe") == []
    assert any("248 positions" in note for note in check_format(with_mixtures(L14), "clipmoe"))
    assert any("normalised weights" in note for note in check_format(with_mixtures(long, normalize=False), "clipmoe"))
    notes = check_format(with_mixtures(SMALL), "clipmoe")
    assert any("FFNs of four widths" in note for note in notes)


def test_the_json_file_beside_a_mixture_goes_with_the_file_it_describes(tmp_path):
    path = tmp_path / "clip.pt"
    write_checkpoint(random_checkpoint(with_mixtures(SMALL)), path, "clipmoe")
    assert json.loads((tmp_path / "clip.pt.json").read_text())["mixtures"]["text"]["top_k"] == 2
    write_checkpoint(random_checkpoint(SMALL), path, "openai", overwrite=True)
    assert not (tmp_path / "clip.pt.json").exists()


def test_transformers_folders_are_plain_safetensors(tmp_path):
    checkpoint = random_checkpoint(with_mixtures(SMALL))
    write_checkpoint(checkpoint, tmp_path / "clip", "transformers")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    stacked = tensors["text_model.encoder.layers.1.mlp.experts.w1"]
    assert stacked.shape == (4, 160, 128)
    assert torch.equal(stacked[2], checkpoint["transformer.resblocks.1.experts.2.c_fc.weight"])
