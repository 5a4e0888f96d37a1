import copy
import json

import pytest
import safetensors.torch
import torch

import mmbal
from mmbal import load_clip_moe, save_clip_moe, upcycle


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


def test_a_saved_model_loads_bit_for_bit(moe, clip_batch, tmp_path):
    save_clip_moe(moe, tmp_path / "clip_moe")
    loaded = load_clip_moe(tmp_path / "clip_moe")
    assert_identical(loaded, moe)
    with torch.no_grad():
        expected, ours = moe(**clip_batch), loaded.eval()(**clip_batch)
    assert torch.equal(ours.logits_per_image, expected.logits_per_image)


def test_the_options_of_the_mixtures_survive(make_clip, tmp_path):
    options = {"top_k": 1, "normalize": False, "dropout": 0.125}
    moe = upcycle(make_clip(0, "gelu"), num_experts=3, expert_init="copy", **options)
    save_clip_moe(moe, str(tmp_path / "x"))
    loaded = load_clip_moe(str(tmp_path / "x"))
    found = [m for m in loaded.modules() if isinstance(m, mmbal.MoEMLP)]
    assert len(found) == 7
    for mixture in found:
        assert (mixture.top_k, mixture.normalize, mixture.dropout, mixture.activation) == (1, False, 0.125, "gelu")


def test_a_bfloat16_model_stays_bfloat16(moe, tmp_path):
    moe.bfloat16()
    save_clip_moe(moe, tmp_path / "x")
    assert_identical(load_clip_moe(tmp_path / "x"), moe)


def test_a_loaded_model_trains_and_saves_again(moe, clip_batch, tmp_path):
    save_clip_moe(moe, tmp_path / "a")
    loaded = load_clip_moe(tmp_path / "a")
    names = mmbal.freeze_except_router(loaded)
    loaded(**clip_batch, return_loss=True).loss.backward()
    assert all(dict(loaded.named_parameters())[name].grad is not None for name in names)
    save_clip_moe(loaded, tmp_path / "b")
    assert_identical(load_clip_moe(tmp_path / "b"), moe)


def test_the_folder_holds_safetensors_and_two_readable_json_files(moe, tmp_path):
    save_clip_moe(moe, tmp_path / "x")
    files = {p.name for p in (tmp_path / "x").iterdir()}
    assert {"config.json", "mmbal.json"} < files
    assert [name for name in files if name.endswith(".safetensors")]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    for name in ("config.json", "mmbal.json"):
        assert isinstance(json.loads((tmp_path / "x" / name).read_text()), dict)


def test_saving_makes_the_folders_above(moe, tmp_path):
    save_clip_moe(moe, tmp_path / "a" / "b" / "c")
    assert_identical(load_clip_moe(tmp_path / "a" / "b" / "c"), moe)


def break_writing(monkeypatch, where):
    def fail(*_, **__):
        raise OSError("no space left on device")

    if where == "weights":
        for name in ("save_file", "save_model", "save"):
            monkeypatch.setattr(safetensors.torch, name, fail)
            if hasattr(mmbal.checkpoint, name):
                monkeypatch.setattr(mmbal.checkpoint, name, fail)
    else:
        for name in ("dump", "dumps"):
            monkeypatch.setattr(json, name, fail)


@pytest.mark.parametrize("where", ["weights", "json"])
def test_a_failure_in_the_middle_leaves_nothing_behind(moe, tmp_path, monkeypatch, where):
    break_writing(monkeypatch, where)
    with pytest.raises(OSError, match="no space"):
        save_clip_moe(moe, tmp_path / "clip_moe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["weights", "json"])
def test_a_failure_while_saving_again_keeps_what_was_there(moe, tmp_path, monkeypatch, where):
    save_clip_moe(moe, tmp_path / "clip_moe")
    other = copy.deepcopy(moe)
    with torch.no_grad():
        other.logit_scale += 1
    with monkeypatch.context() as patch:
        break_writing(patch, where)
        with pytest.raises(OSError, match="no space"):
            save_clip_moe(other, tmp_path / "clip_moe")
    assert_identical(load_clip_moe(tmp_path / "clip_moe"), moe)
    save_clip_moe(other, tmp_path / "clip_moe")
    assert_identical(load_clip_moe(tmp_path / "clip_moe"), other)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        load_clip_moe(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["config.json", "mmbal.json", ".safetensors"])
def test_a_missing_file_is_named(moe, tmp_path, kind):
    save_clip_moe(moe, tmp_path / "x")
    (missing,) = [p for p in (tmp_path / "x").iterdir() if p.name.endswith(kind)]
    missing.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=missing.name):
        load_clip_moe(tmp_path / "x")


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_wrong_tensor_is_named(moe, tmp_path, damage):
    save_clip_moe(moe, tmp_path / "x")
    (file,) = (tmp_path / "x").glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith("router.weight"))
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "odd.router.weight"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(9, 9)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError, KeyError), match=name.replace(".", r"\.")):
        load_clip_moe(tmp_path / "x")


@pytest.mark.parametrize("name", ["config.json", "mmbal.json"])
def test_a_truncated_json_file_is_named(moe, tmp_path, name):
    save_clip_moe(moe, tmp_path / "x")
    file = tmp_path / "x" / name
    file.write_text(file.read_text()[:10])
    with pytest.raises((ValueError, OSError), match=name):
        load_clip_moe(tmp_path / "x")


def test_only_a_clip_with_mixtures_is_saved(make_clip, tmp_path):
    with pytest.raises((ValueError, TypeError), match="MoEMLP"):
        save_clip_moe(make_clip(0), tmp_path / "dense")
    with pytest.raises((ValueError, TypeError), match="CLIPModel"):
        save_clip_moe(torch.nn.Linear(2, 2), tmp_path / "linear")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_replaced(make_clip, tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"mmbal\.json"):
        mmbal.save_clip_moe(mmbal.upcycle(make_clip(0)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_each_weight_keeps_its_dtype_also_float64_and_mixed(make_clip, tmp_path):
    model = mmbal.upcycle(make_clip(0)).double()
    model.visual_projection.to(torch.bfloat16)
    mmbal.save_clip_moe(model, tmp_path / "clip")
    loaded = mmbal.load_clip_moe(tmp_path / "clip").state_dict()
    for name, value in model.state_dict().items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
