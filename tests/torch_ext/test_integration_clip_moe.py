import copy
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, CLIPConfig, CLIPModel

import mmbal
import oracles
from clip_moe_models import MIXTURES, assert_identical, build, layers_of
from mmbal.integrations.clip_moe import CLIPMoEConfig, CLIPMoEModel, as_clip_moe
from mmbal.moe import Experts


@pytest.fixture
def moe(make_clip):
    return build(make_clip(0))


def test_the_layers_that_the_configuration_names_are_mixtures_with_its_options(moe):
    found = layers_of(moe)
    assert list(found) == [
        "text_model.encoder.layers.0.mlp",
        "vision_model.encoder.layers.1.mlp",
        "vision_model.encoder.layers.2.mlp",
    ]
    text, vision = found["text_model.encoder.layers.0.mlp"], found["vision_model.encoder.layers.1.mlp"]
    assert (text.dim, text.hidden_dim, text.num_experts, text.top_k, text.normalize) == (24, 40, 5, 1, False)
    assert (text.activation, text.router.bias is None) == ("quick_gelu", False)
    assert (vision.dim, vision.hidden_dim, vision.num_experts, vision.top_k, vision.dropout) == (32, 56, 3, 2, 0.125)
    assert (vision.activation, vision.normalize, vision.router.bias) == ("gelu", True, None)


def test_a_saved_model_loads_bit_for_bit_through_automodel(moe, clip_batch, tmp_path):
    moe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_moe"
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CLIPMoEModel and not loaded.training
    assert not any(info.values())
    assert_identical(loaded, moe)
    assert {name: repr(m) for name, m in layers_of(loaded).items()} == {n: repr(m) for n, m in layers_of(moe).items()}
    with torch.no_grad():
        expected, ours = moe(**clip_batch), loaded(**clip_batch)
    assert torch.equal(ours.logits_per_image, expected.logits_per_image)
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)) is CLIPMoEModel


def test_the_files_have_the_agreed_names(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert set(shapes) == set(moe.state_dict())
    vision, text = "vision_model.encoder.layers.2.mlp", "text_model.encoder.layers.0.mlp"
    assert {name: shape for name, shape in shapes.items() if name.startswith(vision)} == {
        f"{vision}.router.weight": [3, 32],
        f"{vision}.experts.w1": [3, 56, 32],
        f"{vision}.experts.b1": [3, 56],
        f"{vision}.experts.w2": [3, 32, 56],
        f"{vision}.experts.b2": [3, 32],
    }
    assert shapes[f"{text}.router.bias"] == [5]
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in shapes
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["CLIPMoEModel"]
    defaults = {"activation": "quick_gelu", "normalize": True, "dropout": 0.0, "output_dropout": 0.0}
    defaults |= {"router_bias": False, "shared_expert": False, "shared_weight": 0.5}
    assert saved["mixtures"] == {tower: defaults | options for tower, options in MIXTURES.items()}
    assert (saved["vision_config"]["model_type"], saved["text_config"]["model_type"]) == (
        "clip_vision_model",
        "clip_text_model",
    )
    assert "mixture" not in saved["vision_config"]


def test_shards_and_another_dtype_load(moe, tmp_path):
    moe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_identical(CLIPMoEModel.from_pretrained(tmp_path), moe)
    low = CLIPMoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_identical(low, copy.deepcopy(moe).bfloat16())
    low.save_pretrained(tmp_path / "low")
    assert_identical(AutoModel.from_pretrained(tmp_path / "low", dtype="auto"), low)


def test_loading_builds_on_meta_and_draws_nothing(moe, tmp_path, monkeypatch):
    moe.save_pretrained(tmp_path)
    devices, reset = [], Experts.reset_parameters

    def watched(self):
        devices.append(self.w1.device.type)
        reset(self)

    monkeypatch.setattr(Experts, "reset_parameters", watched)
    state = torch.get_rng_state()
    loaded = CLIPMoEModel.from_pretrained(tmp_path)
    assert devices == ["meta"] * 3
    if int(transformers.__version__.partition(".")[0]) >= 5:  # before, CLIP itself draws numbers
        assert torch.equal(torch.get_rng_state(), state)
    assert_identical(loaded, moe)


def test_missing_weights_are_reported_and_start_as_in_a_new_model_and_the_others_are_kept(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    prefix = "vision_model.encoder.layers.2.mlp"
    missing = {f"{prefix}.experts.w1", f"{prefix}.experts.b2", "text_model.encoder.layers.0.mlp.router.weight"}
    kept = {name: tensor for name, tensor in tensors.items() if name not in missing}
    safetensors.torch.save_file(kept | {"odd.w1": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = CLIPMoEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing and set(info["unexpected_keys"]) == {"odd.w1"}
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    w1 = state[f"{prefix}.experts.w1"]
    assert w1.std().item() == pytest.approx((2 * 32) ** -0.5, rel=0.1)
    assert not state[f"{prefix}.experts.b2"].any()
    router = state["text_model.encoder.layers.0.mlp.router.weight"]
    assert 0.8 * 24**-0.5 < router.abs().max() <= 24**-0.5


def test_a_weight_of_another_shape_is_refused_by_name(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "vision_model.encoder.layers.2.mlp.experts.w1"
    tensors[name] = torch.zeros(4, 56, 32)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="(?s)mismatch|size"):
        CLIPMoEModel.from_pretrained(tmp_path)


def test_new_experts_are_spread_like_the_mlps_of_clip_and_routers_like_a_linear_layer(make_clip):
    values = make_clip(0).config.to_dict()
    values["vision_config"] |= {"hidden_size": 64, "intermediate_size": 256}
    values["text_config"] |= {"hidden_size": 64, "intermediate_size": 256}
    mixtures = {tower: {"layers": [0], "num_experts": 4, "router_bias": True} for tower in ("vision", "text")}
    model, dense = CLIPMoEModel(CLIPMoEConfig(**values, mixtures=mixtures)), CLIPModel(CLIPConfig(**values))
    for tower in ("vision_model", "text_model"):
        mixture = getattr(model, tower).encoder.layers[0].mlp
        mlp = getattr(dense, tower).encoder.layers[0].mlp
        for w, like in ((mixture.experts.w1, mlp.fc1.weight), (mixture.experts.w2, mlp.fc2.weight)):
            assert w.std().item() == pytest.approx(like.std().item(), rel=0.05)
        assert not any(b.any() for b in (mixture.experts.b1, mixture.experts.b2, mixture.router.bias))
        assert mixture.router.weight.abs().max() <= 1 / 8
        assert mixture.router.weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.15)
        for part in ("fc1", "fc2"):  # a layer that stays dense
            ours, theirs = getattr(model, tower).encoder.layers[1].mlp, getattr(dense, tower).encoder.layers[1].mlp
            std = getattr(theirs, part).weight.std().item()
            assert getattr(ours, part).weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("mixtures", "message"),
    [
        ({"audio": {"layers": [0], "num_experts": 4}}, "towers"),
        ([0, 1], "towers"),
        ({"vision": {"layers": [0, 3], "num_experts": 4}}, "num_hidden_layers = 3"),
        ({"vision": {"layers": [], "num_experts": 4}}, "layers"),
        ({"vision": {"layers": [-1], "num_experts": 4}}, "layers"),
        ({"text": {"layers": [0], "num_experts": 4, "top_k": 5}}, "top_k"),
        ({"text": {"layers": [0], "num_experts": 4, "activation": "mish"}}, "activation"),
        ({"text": {"layers": [0], "num_experts": 4, "capacity": 2}}, "options"),
        ({"text": {"layers": [0], "num_experts": "4"}}, "num_experts"),
        ({"text": {"layers": [0], "num_experts": 4, "dropout": 1.0}}, "dropout"),
    ],
)
def test_a_wrong_mixture_is_refused_by_the_configuration(make_clip, mixtures, message):
    with pytest.raises(ValueError, match=message):
        CLIPMoEConfig(**make_clip(0).config.to_dict(), mixtures=mixtures)


def test_a_wrong_config_file_is_refused_before_weights_are_read(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    values = json.loads((tmp_path / "config.json").read_text())
    values["mixtures"]["vision"]["layers"] = [7]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="num_hidden_layers = 3"):
        AutoModel.from_pretrained(tmp_path)
    del values["mixtures"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="must have a mixture"):
        AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))


def test_copies_of_the_mlps_give_the_dense_model(make_clip, clip_batch, tmp_path):
    dense = make_clip(0)
    as_clip_moe(mmbal.upcycle(copy.deepcopy(dense), num_experts=4, expert_init="copy")).save_pretrained(tmp_path)
    copies = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, ours = dense(**clip_batch), copies(**clip_batch)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        oracles.assert_near(ours[name], expected[name], 5e-6, name)


def test_larger_images_and_a_larger_vocabulary_are_served_as_in_clip(moe, clip_batch, tmp_path):
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = moe.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert features.shape == (2, 17, 32) and features.isfinite().all()
    if not hasattr(moe.text_model, "resize_token_embeddings"):
        pytest.skip("transformers before 5 does not resize a CLIP")
    moe.text_model.resize_token_embeddings(60)
    moe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.text_config.vocab_size == 60
    assert_identical(loaded, moe)


def clip_parameters(width, mlp, layers, mixture=None, experts_counted=1):
    """One tower's blocks: attention, two norms, and a dense MLP or experts with a router."""
    attention, norms = 4 * (width * width + width), 2 * 2 * width
    expert = 2 * width * mlp + mlp + width
    router = 0 if mixture is None else mixture["num_experts"] * width
    return layers * (attention + norms + experts_counted * expert + router)


def whole_clip(vision, text, patch, tokens, context, embed, **counted):
    (vision_width, vision_mlp, vision_layers), (text_width, text_mlp, text_layers) = vision, text
    stem = 3 * patch * patch * vision_width + vision_width + tokens * vision_width + 4 * vision_width
    words = 49408 * text_width + context * text_width + 2 * text_width
    blocks = clip_parameters(vision_width, vision_mlp, vision_layers, **counted)
    blocks += clip_parameters(text_width, text_mlp, text_layers, **counted)
    return stem + words + blocks + vision_width * embed + text_width * embed + 1


def on_meta(vision, text, patch, context, embed, mixture):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = CLIPMoEConfig(
        vision_config=dict(zip(names, vision, strict=True)) | {"patch_size": patch, "image_size": 224},
        text_config=dict(zip(names, text, strict=True)) | {"max_position_embeddings": context},
        projection_dim=embed,
        mixtures={
            "vision": mixture | {"layers": list(range(vision[2]))},
            "text": mixture | {"layers": list(range(text[2]))},
        },
    )
    with torch.device("meta"):
        return CLIPMoEModel(config)


def test_the_counts_of_a_real_l14_are_those_of_the_published_file():
    mixture = {"num_experts": 4, "top_k": 2}
    model = on_meta((1024, 4096, 24, 16), (768, 3072, 12, 12), 14, 248, 768, mixture)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    residual_positions = 248 * 768  # positional_embedding_res, which only the published layout has
    shape = ((1024, 4096, 24), (768, 3072, 12), 14, 257, 248, 768)
    assert sum(sizes.values()) == 1_202_429_441 - residual_positions
    assert sum(sizes.values()) == whole_clip(*shape, mixture=mixture, experts_counted=4)
    assert sum(size for name, size in sizes.items() if ".router." in name) == 135_168 == 4 * (24 * 1024 + 12 * 768)
    inactive = sum(size // 4 * 2 for name, size in sizes.items() if ".experts." in name)
    assert sum(sizes.values()) - inactive == 686_192_129 - residual_positions
    assert sum(sizes.values()) - inactive == whole_clip(*shape, mixture=mixture, experts_counted=2)
    assert whole_clip(*shape[:4], 77, 768) == 427_616_513


def test_the_counts_of_a_real_b16():
    mixture = {"num_experts": 4, "top_k": 2}
    model = on_meta((768, 3072, 12, 12), (512, 2048, 12, 8), 16, 77, 512, mixture)
    expected = whole_clip((768, 3072, 12), (512, 2048, 12), 16, 197, 77, 512, mixture=mixture, experts_counted=4)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert all(p.is_meta for p in model.parameters())


def test_importing_mmbal_leaves_transformers_alone_and_it_knows_clip_moe_afterwards(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    script = f"""
import sys
import mmbal
assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
from transformers import CLIPModel  # half of transformers is being imported when AutoConfig is
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "clip_moe" in CONFIG_MAPPING and "mmbal.integrations.clip_moe" not in sys.modules
model = AutoModel.from_pretrained({str(tmp_path)!r})
print(type(model).__name__, sum(p.double().sum().item() for p in model.parameters()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "additions" not in result.stderr, result.stderr
    name, total = result.stdout.split()[-2:]
    assert name == "CLIPMoEModel"
    assert float(total) == sum(p.double().sum().item() for p in moe.parameters())
