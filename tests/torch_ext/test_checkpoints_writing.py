"""Writing keeps what was there until it is done, says what other readers get wrong, and refuses what cannot be held."""

import json
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_helpers import L14, SMALL, assert_same, random_checkpoint, with_mixtures
from forked import run_forked
from mmbal.checkpoints import LazyTensor, open_checkpoint, upcycle_checkpoint, write_checkpoint
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


@pytest.mark.parametrize("format", FORMATS)
def test_a_failure_while_writing_again_keeps_what_was_there(tmp_path, format):
    architecture = SMALL if format == "openai" else with_mixtures(SMALL, num_experts=3, top_k=3)
    first, path = random_checkpoint(architecture), tmp_path / FORMATS[format]
    write_checkpoint(first, path, format)
    with pytest.raises(OSError, match="the disk is gone"):
        write_checkpoint(failing(random_checkpoint(architecture, 1)), path, format, overwrite=True)
    assert_same(open_checkpoint(path, format=format), first)  # with top_k, which is in the JSON file beside it
    second = random_checkpoint(architecture, 1)
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


@pytest.mark.parametrize("format", ["clipmoe", "transformers"])
def test_a_killed_writer_leaves_what_was_there_under_its_name(tmp_path, format):
    first, path = random_checkpoint(with_mixtures(SMALL, top_k=3)), tmp_path / FORMATS[format]
    second = random_checkpoint(with_mixtures(SMALL), 1)
    write_checkpoint(first, path, format)
    kill = lambda size: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    status, _ = run_forked(lambda: write_checkpoint(second, path, format, overwrite=True, progress=kill))
    assert status == -signal.SIGKILL
    assert_same(open_checkpoint(path), first)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path, format):
    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(OSError) as caught:
            write_checkpoint(random_checkpoint(SMALL), tmp_path / "folder" / FORMATS[format], format)
        return caught.value

    status, text = run_forked(write)
    assert status == 0 and "File too large" in text and FORMATS[format] in text, text
    assert list(tmp_path.iterdir()) == []


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


def test_a_json_file_of_somebody_else_is_neither_replaced_nor_removed(tmp_path):
    side = tmp_path / "clip.pt.json"
    side.write_text('{"notes": "kept"}')
    with pytest.raises(ValueError, match=r"clip\.pt\.json must be the JSON file of a CLIP-MoE or not exist"):
        write_checkpoint(random_checkpoint(with_mixtures(SMALL)), tmp_path / "clip.pt", "clipmoe", overwrite=True)
    assert not (tmp_path / "clip.pt").exists()
    write_checkpoint(random_checkpoint(SMALL), tmp_path / "clip.pt", "openai")
    assert side.read_text() == '{"notes": "kept"}'


@pytest.mark.parametrize("format", ["openai", "clipmoe"])
def test_a_json_file_that_lost_its_weights_is_not_replaced_unless_it_is_said(tmp_path, format):
    write_checkpoint(random_checkpoint(with_mixtures(SMALL)), tmp_path / "clip.pt", "clipmoe")
    (tmp_path / "clip.pt").unlink()
    with pytest.raises(ValueError, match=r"clip\.pt\.json exists already"):
        write_checkpoint(random_checkpoint(SMALL), tmp_path / "clip.pt", format)
    assert (tmp_path / "clip.pt.json").exists()
    write_checkpoint(random_checkpoint(SMALL), tmp_path / "clip.pt", format, overwrite=True)
    assert_same(open_checkpoint(tmp_path / "clip.pt", format=format), random_checkpoint(SMALL))


def test_values_that_a_smaller_dtype_cannot_hold_are_refused(tmp_path):
    checkpoint = random_checkpoint(SMALL)
    name = "transformer.resblocks.1.mlp.c_fc.bias"
    tensor = checkpoint[name].clone()
    tensor[5] = -7e4
    large = replace(checkpoint, tensors=checkpoint.tensors | {name: LazyTensor((160,), torch.float32, lambda: tensor)})
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.fc1\.bias has values up to 7e\+04, but torch\.float16 holds"
    ):
        write_checkpoint(large, tmp_path / "clip", "transformers", dtype=torch.float16)
    write_checkpoint(large, tmp_path / "clip", "transformers", dtype=torch.bfloat16)
    tensor[5] = torch.inf  # it is no less infinite there
    write_checkpoint(large, tmp_path / "half", "transformers", dtype=torch.float16)


def test_a_checkpoint_may_be_written_over_the_file_that_it_is_read_from(tmp_path):
    for format, name in FORMATS.items():
        path = tmp_path / f"{format}.pt" if name.endswith(".pt") else tmp_path / format
        base = random_checkpoint(SMALL)
        write_checkpoint(base, path, format)
        opened = open_checkpoint(path, format=format)
        target = "transformers" if path.is_dir() else "clipmoe"
        mixed = upcycle_checkpoint(opened, num_experts=2, expert_init="noise")
        write_checkpoint(mixed, path, target, overwrite=True)
        found = open_checkpoint(path)
        assert_same(found, upcycle_checkpoint(base, num_experts=2, expert_init="noise"))
        assert all(torch.equal(opened[name], base[name]) for name in base.tensors)  # the old file is still mapped


def test_transformers_folders_are_plain_safetensors(tmp_path):
    checkpoint = random_checkpoint(with_mixtures(SMALL))
    write_checkpoint(checkpoint, tmp_path / "clip", "transformers")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    stacked = tensors["text_model.encoder.layers.1.mlp.experts.w1"]
    assert stacked.shape == (4, 160, 128)
    assert torch.equal(stacked[2], checkpoint["transformer.resblocks.1.experts.2.c_fc.weight"])
