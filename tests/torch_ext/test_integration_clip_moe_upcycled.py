import copy

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

import mmbal
from clip_moe_models import assert_identical, build, layers_of
from mmbal.integrations.clip_moe import (
    CLIPMoEModel,
    CLIPMoETextConfig,
    CLIPMoETextModelWithProjection,
    CLIPMoEVisionConfig,
    CLIPMoEVisionModel,
    CLIPMoEVisionModelWithProjection,
    as_clip_moe,
)


@pytest.fixture
def moe(make_clip):
    return build(make_clip(0))


@pytest.fixture
def upcycled(make_clip, siblings):
    base = make_clip(0)
    return mmbal.upcycle(copy.deepcopy(base), siblings(base, 2), layers={"vision": "last:2", "text": [0, 3]})


def test_an_upcycled_model_keeps_its_weights_and_becomes_one_that_can_be_loaded(upcycled, clip_batch, tmp_path):
    before = dict(upcycled.named_parameters())
    with torch.no_grad():
        expected = upcycled(**clip_batch).logits_per_image
    assert as_clip_moe(upcycled) is upcycled and type(upcycled) is CLIPMoEModel
    after = dict(upcycled.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert upcycled.config.mixtures["vision"]["layers"] == [1, 2]
    assert upcycled.config.mixtures["text"]["layers"] == [0, 3]
    upcycled.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_identical(loaded, upcycled)
    with torch.no_grad():
        assert torch.equal(upcycled(**clip_batch).logits_per_image, expected)
        assert torch.equal(loaded(**clip_batch).logits_per_image, expected)


def test_an_upcycled_model_still_gives_hidden_states_attentions_and_changes_its_attention(upcycled, clip_batch):
    as_clip_moe(upcycled)
    upcycled.set_attn_implementation("eager")
    with torch.no_grad():
        output = upcycled(**clip_batch, output_hidden_states=True, output_attentions=True)
    assert len(output.vision_model_output.hidden_states) == 4 and len(output.text_model_output.hidden_states) == 5
    assert len(output.vision_model_output.attentions) == 3
    for module in upcycled.modules():
        known = getattr(module, "config", None)
        assert known is None or known in (upcycled.config, upcycled.config.vision_config, upcycled.config.text_config)


def test_transformers_does_not_draw_the_weights_of_an_upcycled_model_again(upcycled):
    before = copy.deepcopy(as_clip_moe(upcycled))
    upcycled.init_weights()
    for name, layer in layers_of(upcycled).items():
        assert_identical(layer, before.get_submodule(name))


def test_a_dense_model_that_shares_the_configuration_stays_dense(make_clip, tmp_path):
    dense = make_clip(0)
    other = CLIPModel(dense.config)
    as_clip_moe(mmbal.upcycle(dense))
    assert type(other.config) is CLIPConfig and type(other.config.vision_config) is CLIPVisionConfig
    other.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is CLIPModel


def test_becoming_a_clip_moe_twice_changes_nothing(upcycled):
    once = as_clip_moe(upcycled).config.to_dict()
    assert as_clip_moe(upcycled).config.to_dict() == once and type(upcycled) is CLIPMoEModel


class Wrapped(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


def break_top_k(model):
    model.vision_model.encoder.layers[2].mlp.top_k = 1


def break_sizes(model):
    model.vision_model.encoder.layers[2].mlp = mmbal.MoEMLP(32, 28, 3)


def break_bias(model):
    model.vision_model.encoder.layers[2].mlp = mmbal.MoEMLP(32, 56, 3, bias=False)


def break_class(model):
    layer = model.text_model.encoder.layers[1]
    layer.mlp = Wrapped(layer.mlp)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(break_top_k, "top_k=1"), (break_sizes, "hidden_dim"), (break_bias, "biases"), (break_class, "layer 1 of text")],
)
def test_what_a_configuration_cannot_say_is_refused_and_nothing_is_changed(make_clip, upcycled, damage, message):
    plain = make_clip(0)
    for name, layer in layers_of(upcycled).items():  # as by hand: mmbal.upcycle has changed the class already
        plain.get_submodule(name.rpartition(".")[0]).mlp = layer
    damage(plain)
    with pytest.raises(ValueError, match=message):
        as_clip_moe(plain)
    assert type(plain) is CLIPModel and type(plain.config) is CLIPConfig
    assert type(plain.vision_model) is not CLIPMoEVisionModel


def test_a_dense_model_and_other_classes_are_refused(make_clip):
    class Own(CLIPModel):
        pass

    with pytest.raises(ValueError, match="MoEMLP"):
        as_clip_moe(make_clip(0))
    for other in (Own(make_clip(0).config), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=type(other).__name__):
            as_clip_moe(other)


@pytest.mark.parametrize(
    ("plain", "mixed", "inputs"),
    [
        (CLIPVisionModel, CLIPMoEVisionModel, "pixel_values"),
        (CLIPVisionModelWithProjection, CLIPMoEVisionModelWithProjection, "pixel_values"),
        (CLIPTextModelWithProjection, CLIPMoETextModelWithProjection, "input_ids"),
    ],
)
def test_one_tower_is_upcycled_saved_and_loaded_alone(make_clip, clip_batch, tmp_path, plain, mixed, inputs):
    config = make_clip(0).config
    tower = plain(config.text_config if inputs == "input_ids" else config.vision_config).eval()
    as_clip_moe(mmbal.upcycle(tower, num_experts=3, expert_init="drop", layers="last:2"))
    assert type(tower) is mixed
    tower.save_pretrained(tmp_path / "tower")
    loaded, info = mixed.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not any(info.values())
    assert_identical(loaded, tower)
    with torch.no_grad():
        for ours, expected in zip(
            loaded(clip_batch[inputs]).to_tuple(), tower(clip_batch[inputs]).to_tuple(), strict=True
        ):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(("config_class", "tower"), [(CLIPMoEVisionConfig, "vision"), (CLIPMoETextConfig, "text")])
def test_the_mixture_of_one_tower_is_checked_and_may_be_absent(config_class, tower):
    assert config_class().mixture is None
    assert config_class(mixture={"layers": [0], "num_experts": 3}).mixtures[tower]["top_k"] == 2
    with pytest.raises(ValueError, match="layers must be below num_hidden_layers = 2"):
        config_class(mixture={"layers": [2], "num_experts": 3}, num_hidden_layers=2)
    with pytest.raises(ValueError, match="top_k must be"):
        config_class(mixture={"layers": [0], "num_experts": 3, "top_k": 4})


@pytest.mark.parametrize("kind", [CLIPMoEModel, CLIPMoEVisionModel])
def test_a_dense_folder_is_refused_with_what_to_do(make_clip, tmp_path, kind):
    make_clip(0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have a mixture; .*mmbal.upcycle"):
        kind.from_pretrained(tmp_path)


def test_the_vision_tower_of_a_clip_moe_loads_alone_and_as_the_tower_of_another_model(moe, clip_batch, tmp_path):
    moe.save_pretrained(tmp_path / "whole")
    vision, info = CLIPMoEVisionModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and type(vision.config) is CLIPMoEVisionConfig
    with torch.no_grad():
        expected = moe.vision_model(clip_batch["pixel_values"]).pooler_output
        assert torch.equal(vision(clip_batch["pixel_values"]).pooler_output, expected)
    vision.save_pretrained(tmp_path / "part")
    loaded = AutoModel.from_pretrained(tmp_path / "part")
    assert type(loaded) is CLIPMoEVisionModel
    assert_identical(loaded, vision)


@pytest.mark.parametrize("when", ["built", "upcycled"])
def test_llava_keeps_a_vision_tower_with_mixtures(moe, make_clip, tmp_path, when):
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = (moe if when == "built" else make_clip(0)).config.vision_config
    text = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=63, image_seq_length=4)
    )
    if when == "upcycled":
        tower = mmbal.upcycle(llava.model.vision_tower, layers="last:2")
        llava.config.vision_config = as_clip_moe(tower).config
    assert len(layers_of(llava)) == 2
    llava.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert len(layers_of(loaded)) == 2
    assert_identical(loaded, llava)
