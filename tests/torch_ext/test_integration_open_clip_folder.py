"""Folders of a CLIP-MoE in open_clip's layout."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmbal
import oracles
from mmbal import MoEMLP
from mmbal.checkpoints.architecture import Mixture
from open_clips import batch, config, make, make_moe, open_clip

oc = mmbal.integrations.open_clip
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def outputs(model, dtype=torch.float32):
    images, texts = batch()
    with torch.no_grad():
        return [t.float() for t in model(images.to(dtype), texts)]


def assert_the_same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


MODELS = {
    "all layers": {},
    "some layers": {"layers": {"vision": "last:1", "text": [0, 2]}, "top_k": 1, "normalize": False, "dropout": 0.25},
    "text alone": {"layers": {"text": "all"}},
}


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("options", MODELS)
def test_a_saved_model_comes_back(tmp_path, kind, options):
    moe = make_moe(kind, **MODELS[options])
    oc.save_open_clip_moe(moe, tmp_path / "moe")
    back = oc.load_open_clip_moe(tmp_path / "moe")
    assert type(back) is type(moe) and not back.training
    assert oc.architecture_of(back) == oc.architecture_of(moe)
    assert_the_same(back, moe)
    assert all(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize(
    "change",
    [{"quick_gelu": True}, {"vision": {"mlp_ratio": 1.7}}, {"text": {"context_length": 24}}],
)
def test_the_sizes_of_the_model_come_back(tmp_path, change):
    moe = make_moe(model=make(**change))
    if "text" in change:
        moe.positional_embedding.data.mul_(50)
    oc.save_open_clip_moe(moe, tmp_path / "moe")
    back = oc.load_open_clip_moe(tmp_path / "moe")
    assert oc.architecture_of(back) == oc.architecture_of(moe)
    texts = torch.randint(1, 49, (3, back.context_length))
    assert torch.equal(back.encode_text(texts), moe.encode_text(texts))
    assert torch.equal(back.attn_mask, moe.attn_mask)


@pytest.mark.parametrize(
    "options",
    [{"router_bias": True}, {"shared_expert": True, "shared_weight": 0.25}, {"dropout": 0.1, "output_dropout": 0.2}],
)
def test_the_options_of_a_mixture_come_back(tmp_path, options):
    dense = oc.architecture_of(make())
    mixtures = {"vision": Mixture((1,), 3, activation="gelu", **options)}
    moe = oc.build_model(replace(dense, mixtures=mixtures)).eval()
    oc.save_open_clip_moe(moe, tmp_path / "moe")
    back = oc.load_open_clip_moe(tmp_path / "moe")
    assert oc.architecture_of(back).mixtures == mixtures
    assert_the_same(back, moe)


def test_the_files_are_open_clips_with_the_mixtures_added(tmp_path):
    moe = make_moe(layers={"vision": "last:1"})
    oc.save_open_clip_moe(moe, tmp_path / "moe")
    assert sorted(p.name for p in (tmp_path / "moe").iterdir()) == [CONFIG, WEIGHTS]
    saved = json.loads((tmp_path / "moe" / CONFIG).read_text())
    assert saved["model_cfg"] == config()
    assert saved["mmbal"]["format_version"] == 1
    assert list(saved["mmbal"]["mixtures"]) == ["vision"]
    mixture = saved["mmbal"]["mixtures"]["vision"]
    assert (mixture["layers"], mixture["num_experts"], mixture["top_k"]) == ([2], 3, 2)
    tensors = load_file(tmp_path / "moe" / WEIGHTS)
    mlp = "visual.transformer.resblocks.2.mlp"
    of_mixture = {name.removeprefix(f"{mlp}."): list(t.shape) for name, t in tensors.items() if name.startswith(mlp)}
    expected = {"w1": [3, 128, 32], "b1": [3, 128], "w2": [3, 32, 128], "b2": [3, 32]}
    assert of_mixture == {"router.weight": [3, 32]} | {f"experts.{name}": shape for name, shape in expected.items()}


def test_open_clip_reads_the_tokenizer_and_refuses_the_weights(tmp_path):
    oc.save_open_clip_moe(make_moe(), tmp_path / "moe")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'moe'}")
    assert tokenizer(["a cat"]).shape == (1, 9)
    with pytest.raises(RuntimeError, match="Missing key"):
        open_clip.create_model(f"local-dir:{tmp_path / 'moe'}")


def test_preprocessing_and_patch_dropout_are_kept(tmp_path):
    (tmp_path / "small-for-folder.json").write_text(json.dumps(config()))
    open_clip.add_model_config(tmp_path)
    mean = (0.1, 0.2, 0.3)
    dense = open_clip.create_model(
        "small-for-folder", force_preprocess_cfg={"mean": mean, "interpolation": "bilinear"}, force_patch_dropout=0.5
    )
    oc.save_open_clip_moe(make_moe(model=dense), tmp_path / "moe")
    back = oc.load_open_clip_moe(tmp_path / "moe")
    kept = back.visual.preprocess_cfg
    assert (tuple(kept["mean"]), kept["interpolation"], tuple(kept["size"])) == (mean, "bilinear", (16, 16))
    assert back.visual.patch_dropout.prob == 0.5
    open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**kept), is_train=False)


def test_without_preprocessing_that_of_openai_is_written(tmp_path):
    oc.save_open_clip_moe(make_moe(), tmp_path / "moe")
    saved = json.loads((tmp_path / "moe" / CONFIG).read_text())["preprocess_cfg"]
    assert tuple(saved["mean"]) == open_clip.OPENAI_DATASET_MEAN and tuple(saved["std"]) == open_clip.OPENAI_DATASET_STD
    assert oc.load_open_clip_moe(tmp_path / "moe").visual.image_mean == saved["mean"]


@pytest.mark.parametrize(
    ("precision", "dtype", "others"),
    [
        ("fp32", torch.float32, torch.float32),
        ("amp", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
        ("pure_fp16", torch.float16, torch.float16),
    ],
)
def test_precisions(tmp_path, precision, dtype, others):
    moe = make_moe()
    oc.save_open_clip_moe(moe, tmp_path / "moe")
    back = oc.load_open_clip_moe(tmp_path / "moe", precision=precision)
    block = back.transformer.resblocks[0]
    assert {p.dtype for p in (*block.mlp.experts.parameters(), *block.attn.parameters())} == {dtype}
    assert {block.ln_1.weight.dtype, block.mlp.router.weight.dtype, back.token_embedding.weight.dtype} == {others}
    for ours, theirs in zip(outputs(back, dtype), outputs(moe), strict=True):
        oracles.assert_near(ours, theirs, {torch.float32: 0, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype])
    oc.save_open_clip_moe(back, tmp_path / "again")
    again = oc.load_open_clip_moe(tmp_path / "again", precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), back.state_dict().values(), strict=True))


def test_a_loaded_model_trains(tmp_path):
    oc.save_open_clip_moe(make_moe(), tmp_path / "moe")
    back = oc.load_open_clip_moe(tmp_path / "moe").train()
    mmbal.freeze_except_router(back)
    open_clip.ClipLoss()(*back(*batch())).backward()
    assert all(layer.router.weight.grad.any() for layer in back.modules() if isinstance(layer, MoEMLP))


def test_saving_replaces_what_it_wrote_and_nothing_else(tmp_path):
    first, second = make_moe(), make_moe(seed=1)
    oc.save_open_clip_moe(first, tmp_path / "moe")
    oc.save_open_clip_moe(second, tmp_path / "moe")
    assert_the_same(oc.load_open_clip_moe(tmp_path / "moe"), second)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / CONFIG).write_text(json.dumps({"model_cfg": config()}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name, what in (("dense", "mmbal"), ("other", "not replaced")):
        with pytest.raises(ValueError, match=what):
            oc.save_open_clip_moe(first, tmp_path / name)
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "dense" / CONFIG).read_text()) == {"model_cfg": config()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "moe", "other"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(oc, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        oc.save_open_clip_moe(make_moe(), tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have MoEMLP layers"):
        oc.save_open_clip_moe(make(), tmp_path / "moe")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("open_clip") / "moe"
    oc.save_open_clip_moe(make_moe(), folder)
    return folder


def edit(*path, value=None):
    """A change of the configuration at the path; without a value what is there is removed."""

    def apply(cfg):
        *parents, last = path
        for key in parents:
            cfg = cfg[key]
        if value is None:
            del cfg[last]
        else:
            cfg[last] = value

    return apply


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (edit("model_cfg"), "must have model_cfg"),
        (edit("mmbal"), "must have model_cfg, and mmbal"),
        (edit("mmbal", "mixtures"), "mmbal with mixtures"),
        (edit("mmbal", "format_version", value=2), "format_version must be 1, got 2"),
        (edit("model_cfg", "text_cfg"), "vision_cfg and text_cfg"),
        (edit("model_cfg", "embed_dim"), "describes no CLIP"),
        (edit("model_cfg", "unknown", value=1), "describes no CLIP"),
        (edit("model_cfg", "vision_cfg", "unknown", value=1), "describes no CLIP"),
        (edit("model_cfg", "vision_cfg", "width", value="32"), "describes no CLIP"),
        (edit("model_cfg", "vision_cfg", "width", value=0), "describes no CLIP"),
        (edit("model_cfg", "vision_cfg", "patch_size", value=0), "describes no CLIP"),
        (edit("model_cfg", "vision_cfg", "layers", value=10**12), "layers must be"),
        (edit("model_cfg", "text_cfg", "layers", value=[1, 1]), "layers must be"),
        (edit("model_cfg", "text_cfg", "layers", value=5), "resblocks.4"),
        (edit("model_cfg", "text_cfg", "context_length", value=10**6), "positional_embedding"),
        (edit("model_cfg", "text_cfg", "hf_model_name", value="bert"), "hf_model_name"),
        (edit("model_cfg", "vision_cfg", "timm_model_name", value="vit"), "timm_model_name"),
        (edit("mmbal", "mixtures", "audio", value={"layers": [0], "num_experts": 2}), "audio"),
        (edit("mmbal", "mixtures", "text", "layers", value=[4]), "text has 4 layers"),
        (edit("mmbal", "mixtures", "text", "layers", value=[0]), "resblocks"),
        (edit("mmbal", "mixtures", "text", "num_experts", value=2), r"must be \[2, "),
        (edit("mmbal", "mixtures", "text", "num_experts", value=10**12), r"must be \[1000000000000, "),
        (edit("mmbal", "mixtures", "text", "top_k", value=9), "top_k"),
        (edit("mmbal", "mixtures", "text", "activation", value="sine"), "activation"),
    ],
)
def test_a_wrong_configuration_is_refused(saved, tmp_path, change, what):
    folder = tmp_path / "moe"
    shutil.copytree(saved, folder)
    cfg = json.loads((folder / CONFIG).read_text())
    change(cfg)
    (folder / CONFIG).write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=f"load_open_clip_moe: .*{what}"):
        oc.load_open_clip_moe(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe\x00" * 40])
def test_a_missing_or_broken_file_is_refused(saved, tmp_path, name, content):
    folder = tmp_path / "moe"
    shutil.copytree(saved, folder)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"load_open_clip_moe: .*{name}"):
        oc.load_open_clip_moe(folder)


def test_a_truncated_file_of_weights_is_refused(saved, tmp_path):
    folder = tmp_path / "moe"
    shutil.copytree(saved, folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-4])
    with pytest.raises(ValueError, match=f"load_open_clip_moe: .*{WEIGHTS} cannot be read"):
        oc.load_open_clip_moe(folder)


@pytest.mark.parametrize("change", ["missing", "added", "shape"])
def test_tensors_that_do_not_fit_are_refused(saved, tmp_path, change):
    folder = tmp_path / "moe"
    shutil.copytree(saved, folder)
    tensors, name = load_file(folder / WEIGHTS), "visual.transformer.resblocks.1.mlp.experts.w1"
    if change == "missing":
        del tensors[name]
    elif change == "added":
        name = "visual.transformer.resblocks.1.mlp.experts.w3"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"load_open_clip_moe: {name} must be"):
        oc.load_open_clip_moe(folder)


def test_an_unknown_precision_is_refused(saved):
    with pytest.raises(ValueError, match="precision must be one of fp32, .*, got 'int8'"):
        oc.load_open_clip_moe(saved, precision="int8")


def test_a_model_that_was_read_does_not_follow_the_file(saved, tmp_path):
    folder = tmp_path / "moe"
    shutil.copytree(saved, folder)
    back = oc.load_open_clip_moe(folder)
    before = copy.deepcopy(back.state_dict())
    with open(folder / WEIGHTS, "r+b") as file:
        file.write(bytes((folder / WEIGHTS).stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in back.state_dict().items())
