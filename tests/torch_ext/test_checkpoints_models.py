"""CLIP-MoE models to disk and back, in every format, and what a fresh process makes of them."""

import copy
import json

import pytest
import torch

import mmbal
from mmbal import load_clip_moe, save_clip_moe, upcycle
from mmbal.checkpoints import (
    extract_expert,
    from_model,
    load_clip,
    open_checkpoint,
    to_model,
    upcycle_checkpoint,
    write_checkpoint,
)


@pytest.fixture
def moe(make_clip, siblings):
    base = make_clip(0)
    layers = {"vision": "last:2", "text": [0, 3]}
    return upcycle(copy.deepcopy(base), siblings(base, 2), layers=layers, top_k=2, dropout=0.125)


def assert_identical(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("format", ["transformers", "clipmoe"])
def test_a_saved_model_loads_bit_for_bit_and_computes_the_same(moe, clip_batch, tmp_path, format):
    save_clip_moe(moe, tmp_path / "x", format)
    loaded = load_clip_moe(tmp_path / "x")
    assert_identical(loaded, moe)
    with torch.no_grad():
        expected, ours = moe(**clip_batch), loaded(**clip_batch)
    assert torch.equal(ours.logits_per_image, expected.logits_per_image)
    assert torch.equal(ours.logits_per_text, expected.logits_per_text)


def test_transformers_own_loader_reads_it_too(moe, clip_batch, tmp_path):
    from transformers import AutoModel

    save_clip_moe(moe, tmp_path / "x")
    loaded = AutoModel.from_pretrained(tmp_path / "x")
    assert type(loaded).__name__ == "CLIPMoEModel"
    assert_identical(loaded, moe)


def test_our_loader_reads_what_save_pretrained_writes(moe, tmp_path):
    moe.save_pretrained(tmp_path / "x")
    assert_identical(load_clip_moe(tmp_path / "x"), moe)


def test_the_options_of_the_mixtures_survive(make_clip, tmp_path):
    options = {"top_k": 1, "normalize": False, "dropout": 0.125, "shared_expert": True, "shared_weight": 0.25}
    moe = upcycle(make_clip(0, "gelu"), num_experts=3, expert_init="copy", **options)
    save_clip_moe(moe, str(tmp_path / "x"))
    loaded = load_clip_moe(str(tmp_path / "x"))
    found = [m for m in loaded.modules() if isinstance(m, mmbal.MoEMLP)]
    assert len(found) == 7
    for mixture in found:
        assert {name: getattr(mixture, name) for name in options} == options
        assert mixture.activation == "gelu"


def test_a_dense_checkpoint_loads_as_transformers_model(make_clip, clip_batch, tmp_path):
    base = make_clip(0)
    write_checkpoint(from_model(base), tmp_path / "clip.pt", "openai")
    with pytest.raises(ValueError, match="no multiple of 64: its configuration must be beside it"):
        load_clip(tmp_path / "clip.pt", format="openai")
    write_checkpoint(from_model(base), tmp_path / "clip", "open_clip")
    loaded = load_clip(tmp_path / "clip")
    assert type(loaded).__name__ == "CLIPModel"
    with torch.no_grad():
        expected, ours = base(**clip_batch), loaded(**clip_batch)
    assert torch.equal(ours.logits_per_image, expected.logits_per_image)
    with pytest.raises(ValueError, match="must have mixtures, it is a dense CLIP"):
        load_clip_moe(tmp_path / "clip")


def test_a_bfloat16_model_stays_bfloat16_and_may_be_widened(moe, tmp_path):
    moe.bfloat16()
    save_clip_moe(moe, tmp_path / "x")
    assert_identical(load_clip_moe(tmp_path / "x"), moe)
    assert {p.dtype for p in load_clip(tmp_path / "x", dtype=torch.float32).parameters()} == {torch.float32}


def test_each_weight_keeps_its_dtype_also_float64_and_mixed(make_clip, tmp_path):
    model = upcycle(make_clip(0)).double()
    model.visual_projection.to(torch.bfloat16)
    save_clip_moe(model, tmp_path / "clip")
    assert_identical(load_clip_moe(tmp_path / "clip"), model)


def test_a_loaded_model_trains_and_saves_again(moe, clip_batch, tmp_path):
    save_clip_moe(moe, tmp_path / "a")
    loaded = load_clip_moe(tmp_path / "a")
    names = mmbal.freeze_except_router(loaded)
    loaded(**clip_batch, return_loss=True).loss.backward()
    assert all(dict(loaded.named_parameters())[name].grad is not None for name in names)
    save_clip_moe(loaded, tmp_path / "b")
    assert_identical(load_clip_moe(tmp_path / "b"), moe)


def test_a_loaded_model_is_its_own_whatever_happens_to_the_file(moe, tmp_path):
    save_clip_moe(moe, tmp_path / "x")
    loaded = load_clip_moe(tmp_path / "x")
    before = copy.deepcopy(loaded)
    file = tmp_path / "x" / "model.safetensors"
    with open(file, "r+b") as raw:
        raw.write(b"\0" * 100)
        raw.truncate(1000)
    assert_identical(loaded, before)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter += 1


def test_saving_makes_the_folders_above_and_replaces_a_model(moe, tmp_path):
    save_clip_moe(moe, tmp_path / "a" / "b" / "c")
    with torch.no_grad():
        moe.logit_scale += 1
    save_clip_moe(moe, tmp_path / "a" / "b" / "c")
    assert_identical(load_clip_moe(tmp_path / "a" / "b" / "c"), moe)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        load_clip_moe(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(moe, tmp_path, missing):
    save_clip_moe(moe, tmp_path / "x")
    (tmp_path / "x" / missing).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors|no configuration|heads of"):
        load_clip_moe(tmp_path / "x")


def test_a_truncated_json_file_is_named(moe, tmp_path):
    save_clip_moe(moe, tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    file.write_text(file.read_text()[:10])
    with pytest.raises(ValueError, match=r"config\.json"):
        load_clip_moe(tmp_path / "x")


def test_only_a_clip_with_mixtures_is_saved(make_clip, tmp_path):
    with pytest.raises(ValueError, match="MoEMLP"):
        save_clip_moe(make_clip(0), tmp_path / "dense")
    with pytest.raises(ValueError, match="must hold a CLIP"):
        save_clip_moe(torch.nn.Linear(2, 2), tmp_path / "linear")
    assert list(tmp_path.iterdir()) == []


def test_what_a_configuration_says_of_training_goes_along(make_clip, tmp_path):
    base = make_clip(0)
    for tower in (base.config.text_config, base.config.vision_config):
        tower.attention_dropout, tower.initializer_range = 0.125, 0.03
    base.config.logit_scale_init_value = 3.0
    base.save_pretrained(tmp_path / "base")
    mixture = upcycle_checkpoint(open_checkpoint(tmp_path / "base"), num_experts=2)
    write_checkpoint(mixture, tmp_path / "moe", "transformers")
    for clip in (load_clip(tmp_path / "moe"), load_clip_moe(tmp_path / "moe"), to_model(from_model(base))):
        for tower in ("text", "vision"):
            config = getattr(clip.config, f"{tower}_config")
            assert (config.attention_dropout, config.initializer_range) == (0.125, 0.03)
            assert getattr(clip, f"{tower}_model").encoder.layers[0].self_attn.dropout == 0.125
        assert clip.config.logit_scale_init_value == 3.0
    moe = load_clip(tmp_path / "moe")
    moe.config.output_router_logits = True
    save_clip_moe(moe, tmp_path / "again")
    assert load_clip(tmp_path / "again").config.output_router_logits is True
    dense = extract_expert(open_checkpoint(tmp_path / "again"), 1)
    write_checkpoint(dense, tmp_path / "dense", "transformers")
    assert "output_router_logits" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_models_that_are_wrapped_or_split_are_refused_with_what_to_do(moe, tmp_path):
    with pytest.raises(ValueError, match=r"DataParallel wraps a model: its \.module must be given"):
        save_clip_moe(torch.nn.DataParallel(moe), tmp_path / "wrapped")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(moe.vision_model.encoder.layers[2], mesh=mesh)
        with pytest.raises(ValueError, match="weights are split over processes, vision_model.*get_model_state_dict"):
            save_clip_moe(moe, tmp_path / "split")
    finally:
        torch.distributed.destroy_process_group()
    assert list(tmp_path.iterdir()) == []


def test_config_json_says_what_the_mixtures_are(moe, tmp_path):
    save_clip_moe(moe, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["model_type"] == "clip_moe"
    assert config["mixtures"]["text"]["layers"] == [0, 3]
    assert config["mixtures"]["vision"] == {
        "layers": [1, 2],
        "num_experts": 3,
        "top_k": 2,
        "activation": "quick_gelu",
        "normalize": True,
        "dropout": 0.125,
        "output_dropout": 0.0,
        "router_bias": False,
        "shared_expert": False,
        "shared_weight": 0.5,
    }
