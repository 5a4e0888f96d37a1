"""Checkpoints of each format are recognised, described and read exactly; wrong ones are refused by name."""

import json
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_helpers import SMALL, assert_same, random_checkpoint, state_dict, with_mixtures
from mmbal.checkpoints import open_checkpoint, write_checkpoint
from mmbal.checkpoints.recognition import infer_architecture


def written(tmp_path, checkpoint, format, name=None):
    path = tmp_path / (name or {"openai": "clip.pt", "clipmoe": "clip.pt"}.get(format, "clip"))
    write_checkpoint(checkpoint, path, format, overwrite=True)
    return path


UNUSUAL = replace(  # what open_clip's configuration says besides sizes
    SMALL,
    vision=replace(SMALL.vision, activation="gelu_tanh", layer_norm_eps=1e-6),
    text=replace(SMALL.text, activation="gelu", eos_token_id=7, bos_token_id=6, heads=4),
)
CASES = [
    ("open_clip", UNUSUAL, None),
    ("openai", SMALL, "clip.pt"),
    ("openai", SMALL, "clip.safetensors"),
    ("open_clip", SMALL, None),
    ("open_clip", with_mixtures(SMALL, vision=(1,), router_bias=True), None),
    ("clipmoe", SMALL, "clip.pt"),
    ("clipmoe", with_mixtures(SMALL, top_k=3, normalize=False), "clip.pt"),
    ("clipmoe", with_mixtures(SMALL, vision=(1,), text=(1, 2)), "clip.safetensors"),
    ("transformers", SMALL, None),
    ("transformers", with_mixtures(SMALL, text=(), shared_expert=True, dropout=0.1), None),
    ("transformers", replace(SMALL, text=None), None),
    ("transformers", replace(SMALL, vision=None, embed_dim=None), None),
]


@pytest.mark.parametrize(("format", "architecture", "name"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_in_a_format_is_read_from_it_bit_for_bit(tmp_path, format, architecture, name, dtype):
    checkpoint = random_checkpoint(architecture, dtype=dtype)
    path = written(tmp_path, checkpoint, format, name)
    found = open_checkpoint(path, format="openai" if format == "openai" else "auto")
    assert found.format == format and not found.notes
    assert_same(found, checkpoint)


@pytest.mark.parametrize(
    ("through", "mixed"),
    [("openai", False)] + [(f, mixed) for f in ("open_clip", "transformers", "clipmoe") for mixed in (False, True)],
)
def test_going_through_another_format_and_back_changes_no_bit(tmp_path, through, mixed):
    checkpoint = random_checkpoint(with_mixtures(SMALL) if mixed else SMALL)
    first = written(tmp_path, checkpoint, "transformers", "first")
    there = written(tmp_path, open_checkpoint(first), through, "there")
    back = open_checkpoint(there, format=through)
    if through == "openai":  # heads and ids are taken to be OpenAI's there
        back.architecture = checkpoint.architecture
    second = written(tmp_path, back, "transformers", "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


def test_an_open_clip_training_checkpoint_is_read_under_its_prefix(tmp_path):
    checkpoint = random_checkpoint(SMALL)
    tensors = {f"module.{name}": tensor for name, tensor in state_dict(checkpoint).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": tensors, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    found = open_checkpoint(tmp_path / "epoch_3.pt")
    assert found.format == "open_clip" and found.architecture.text.activation == "gelu"
    assert any("gelu" in note for note in found.notes)
    for name in checkpoint.tensors:
        assert torch.equal(found[name], checkpoint[name])


def test_the_text_tower_of_custom_text_clip_is_found_under_text(tmp_path):
    checkpoint = random_checkpoint(SMALL)
    vision = ("visual.", "logit_scale")
    names = {name: name if name.startswith(vision) else f"text.{name}" for name in checkpoint.tensors}
    save_file({names[name]: checkpoint[name] for name in names}, tmp_path / "clip.safetensors")
    found = open_checkpoint(tmp_path / "clip.safetensors", activation="gelu")
    assert all(torch.equal(found[name], checkpoint[name]) for name in checkpoint.tensors)


def test_openai_files_are_known_by_their_three_numbers_and_half_weights_stay_half(tmp_path):
    tensors = {
        name: tensor.half() if "ln_" not in name and tensor.ndim > 1 else tensor
        for name, tensor in state_dict(random_checkpoint(SMALL)).items()
    }
    for name, value in (("input_resolution", 8), ("context_length", 30), ("vocab_size", 70)):
        tensors[name] = torch.tensor(value)
    torch.save(tensors, tmp_path / "clip.pt")
    found = open_checkpoint(tmp_path / "clip.pt")
    assert found.format == "openai"
    assert found.architecture == replace(SMALL, text=replace(SMALL.text, bos_token_id=68, eos_token_id=69))
    assert found["visual.proj"].dtype == torch.float16 and found["ln_final.weight"].dtype == torch.float32


def test_a_bare_state_dict_that_does_not_tell_its_activation_asks_for_it(tmp_path):
    torch.save(state_dict(random_checkpoint(SMALL)), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"say format=openai, or activation=gelu"):
        open_checkpoint(tmp_path / "clip.pt")
    assert open_checkpoint(tmp_path / "clip.pt", format="openai").architecture.vision.activation == "quick_gelu"
    assert open_checkpoint(tmp_path / "clip.pt", activation="gelu").architecture.vision.activation == "gelu"


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_old_files_of_one_tower_have_its_name_in_front(tmp_path, tower):
    architecture = replace(SMALL, embed_dim=None, **{"text" if tower == "vision" else "vision": None})
    checkpoint = random_checkpoint(architecture)
    folder = written(tmp_path, checkpoint, "transformers")
    tensors = load_file(folder / "model.safetensors")
    old = {f"{tower}_model.{name}": tensor for name, tensor in tensors.items()}
    old[f"{tower}_model.embeddings.position_ids"] = torch.arange(30)[None]
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    assert_same(open_checkpoint(folder), checkpoint)


def test_a_published_file_without_its_json_is_taken_to_have_top_2_and_says_so(tmp_path):
    path = written(tmp_path, random_checkpoint(with_mixtures(SMALL, top_k=3)), "clipmoe")
    assert open_checkpoint(path).architecture.mixtures["vision"].top_k == 3
    path.with_name("clip.pt.json").unlink()
    found = open_checkpoint(path)
    assert found.architecture.mixtures["text"].top_k == 2 and any("top_k" in note for note in found.notes)
    found = open_checkpoint(path, top_k=3)
    assert found.architecture.mixtures["text"].top_k == 3 and "top_k" not in str(found.notes)


def test_heads_that_no_file_tells_are_said_to_be_guessed(tmp_path):
    path = written(tmp_path, random_checkpoint(with_mixtures(SMALL)), "clipmoe")
    path.with_name("clip.pt.json").unlink()
    folder = written(tmp_path, random_checkpoint(SMALL), "transformers")
    (folder / "config.json").unlink()
    tensors = {f"module.{name}": tensor for name, tensor in state_dict(random_checkpoint(SMALL)).items()}
    torch.save({"state_dict": tensors}, tmp_path / "epoch_3.pt")
    for name in (path, folder, tmp_path / "epoch_3.pt"):
        assert any("heads to have 64 channels" in note for note in open_checkpoint(name).notes), name


def test_what_transformers_leaves_out_of_a_configuration_has_its_defaults(tmp_path):
    """Version 4 writes of a tower what differs from the default, so that 8 heads of text are not in the file."""
    eight = replace(SMALL, text=replace(SMALL.text, heads=8, eos_token_id=49407, bos_token_id=49406))
    folder = written(tmp_path, random_checkpoint(eight), "transformers")
    config = json.loads((folder / "config.json").read_text())
    for name in ("num_attention_heads", "layer_norm_eps", "hidden_act", "eos_token_id", "bos_token_id", "pad_token_id"):
        del config["text_config"][name]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).architecture == eight
    del config["vision_config"]["num_attention_heads"]  # then it is 12, which cannot be here
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision: heads must divide the width 64, got 12"):
        open_checkpoint(folder)


def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path):
    path = written(tmp_path, random_checkpoint(SMALL), "clipmoe")
    for change in (
        lambda t: t.update({"\x1b[2Jx": torch.ones(2)}),
        lambda t: (t.clear(), t.update({"\x1b[2Jx": torch.ones(2)})),
    ):
        edited(path, change)
        with pytest.raises(ValueError, match=r"\\x1b\[2Jx") as caught:
            open_checkpoint(path)
        assert str(caught.value).isprintable()


class Shapes(dict):
    """A source that has shapes only."""

    shape = dict.__getitem__


def test_a_file_of_very_many_layers_or_experts_is_described_or_refused_soon():
    stem = {"token_embedding.weight": (2, 1), "positional_embedding": (2, 1)}
    blocks = [f"transformer.resblocks.{n}" for n in range(20_000)]
    layers = Shapes(stem | {f"{b}.gate.weight": (1, 1) for b in blocks})
    layers |= {f"{b}.experts.0.c_fc.weight": (1, 1) for b in blocks}
    start = time.process_time()
    assert infer_architecture(layers, "clipmoe", "x").text.layers == 20_000
    assert time.process_time() - start < 20  # a pass over all names for each layer would take many minutes
    mlp = "transformer.resblocks.0.mlp"
    stacked = Shapes(stem | {f"{mlp}.experts.w1": (70_000, 1, 1), f"{mlp}.router.weight": (70_000, 1)})
    with pytest.raises(ValueError, match="must have at most 65536 experts, got 70000"):
        infer_architecture(stacked, "open_clip", "x")


def test_a_long_published_file_with_one_table_of_positions_says_so(tmp_path):
    long = replace(SMALL, text=replace(SMALL.text, context_length=248, kept_positions=20))
    path = written(tmp_path, random_checkpoint(with_mixtures(long)), "clipmoe")
    assert open_checkpoint(path).architecture.text.kept_positions == 20
    tensors = torch.load(path, weights_only=True)
    del tensors["positional_embedding_res"]
    torch.save(tensors, path)
    path.with_name("clip.pt.json").unlink()
    assert any("positional_embedding_res" in note for note in open_checkpoint(path).notes)


def test_companions_of_a_folder_go_along(tmp_path):
    folder = written(tmp_path, random_checkpoint(SMALL), "transformers")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "notes.md").write_text("")
    other = written(tmp_path, open_checkpoint(folder), "open_clip", "other")
    assert {"tokenizer.json", "preprocessor_config.json"} < {file.name for file in other.iterdir()}
    assert not (other / "notes.md").exists()


def edited(path, change):
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ln_final.weight"), "lacks 'ln_final.weight'"),
        (lambda t: t.update({"ln_final.gamma": torch.ones(2)}), "'ln_final.gamma' is not of a CLIP"),
        (lambda t: t.update({"ln_final.weight": torch.ones(3)}), r"ln_final.weight must be \[128\], got \[3\]"),
        (lambda t: t.update({"ln_final.weight": torch.ones(128).long()}), "ln_final.weight must be floating point"),
        (
            lambda t: t.update({"visual.positional_embedding": torch.ones(7, 64)}),
            "a square and one more, got 7",
        ),
        (lambda t: t.pop("visual.transformer.resblocks.0.gate.weight"), "resblocks.0 must have both a router and exp"),
        (lambda t: t.pop("visual.transformer.resblocks.1.experts.3.c_fc.bias"), "lacks .*experts.3.c_fc.bias"),
        (
            lambda t: t.update({"visual.transformer.resblocks.0.gate.weight": torch.ones(9, 64)}),
            "must agree in their numbers of experts",
        ),
        (
            lambda t: t.update({"transformer.resblocks.700000.ln_1.weight": torch.ones(128)}),
            r"layers transformer.resblocks.N must be numbered 0, 1, 2",
        ),
        (lambda t: t.update({"token_embedding.weight": torch.ones(0, 128)}), "none of them 0"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    path = written(tmp_path, random_checkpoint(with_mixtures(SMALL)), "clipmoe")
    edited(path, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def set_in(config, keys, value):
    for key in keys[:-1]:
        config = config[key]
    config[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("vision_config", "num_hidden_layers"), 10**9, "vision: layers must be 2 by the weights, got 1000000000"),
        (("text_config", "hidden_size"), 64, "text: width must be 128 by the weights, got 64"),
        (("vision_config", "num_attention_heads"), 7, "vision: heads must divide the width 64, got 7"),
        (("vision_config", "num_attention_heads"), True, "heads must be int, got bool"),
        (("vision_config", "layer_norm_eps"), "small", "layer_norm_eps must be float, got str"),
        (("text_config", "hidden_act"), "tanh" * 100, "text: activation must be one of"),
        (("text_config",), [1], "must have text_config"),
        (("model_type",), "siglip", "model_type must be clip or clip_moe, got 'siglip'"),
        (("mixtures", "text", "num_experts"), 10**12, "num_experts of the mixture of text must be 4"),
        (("mixtures", "text", "top_k"), 9, "top_k must be from 1 to num_experts = 4, got 9"),
        (("mixtures", "text", "layers"), [0, 10**12], r"layers of the mixture of text must be \(0, 1, 2\)"),
        (("mixtures", "text", "layers"), "all", "layers must be list, got str"),
        (("mixtures", "text", "odd"), 1, "mixtures.text must have layers, num_experts and other options"),
        (("mixtures", "audio"), {}, "mixtures must have vision or text"),
        (("mixtures",), {}, "must describe the mixture of"),
        (("projection_dim",), 512, "embed_dim must be 48 by the weights, got 512"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(tmp_path, keys, value, message):
    folder = written(tmp_path, random_checkpoint(with_mixtures(SMALL)), "transformers")
    config = json.loads((folder / "config.json").read_text())
    set_in(config, keys, value)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            ("model_cfg", "vision_cfg", "timm_model_name"),
            "vit",
            r"vision_cfg has \['timm_model_name'\], which is n",
        ),
        (("model_cfg", "text_cfg", "hf_model_name"), "bert", r"text_cfg has \['hf_model_name'\], which is not served"),
        (("model_cfg", "multimodal_cfg"), {}, "multimodal_cfg"),
        (("mmbal", "format_version"), 99, "format_version must be 1"),
        (("model_cfg",), None, "must have model_cfg"),
    ],
)
def test_open_clip_models_of_another_kind_are_refused(tmp_path, keys, value, message):
    folder = written(tmp_path, random_checkpoint(with_mixtures(SMALL)), "open_clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    set_in(config, keys, value)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_another_model_than_clip_is_refused_with_the_names_it_has(tmp_path):
    save_file({"bert.weight": torch.ones(2)}, tmp_path / "bert.safetensors")
    with pytest.raises(ValueError, match=r"must hold a CLIP .*, got 'bert\.weight'"):
        open_checkpoint(tmp_path / "bert.safetensors")


def test_a_format_that_the_names_contradict_is_refused(tmp_path):
    folder = written(tmp_path, random_checkpoint(SMALL), "transformers")
    with pytest.raises(ValueError, match="must be in the layout openai, its names are those of transformers"):
        open_checkpoint(folder, format="openai")
    with pytest.raises(ValueError, match="format must be auto or one of openai"):
        open_checkpoint(folder, format="keras")
    with pytest.raises(ValueError, match="activation must be auto or one of"):
        open_checkpoint(folder, activation="tanh")
