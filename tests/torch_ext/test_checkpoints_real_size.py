"""A ViT-B/16 with random weights, made by transformers and by open_clip, through every format: the logits stay."""

import copy
import shutil

import pytest
import torch

import mmbal
import mmbal.files
from mmbal.checkpoints import from_model, load_clip, open_checkpoint, upcycle_checkpoint, write_checkpoint
from peers import import_open_clip

TOLERANCE = 1e-5  # of the largest logit


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 49000, (3, 77), generator=generator)
    for row, end in enumerate((76, 9, 30)):
        tokens[row, end:] = 0
        tokens[row, end] = 49407
    return torch.randn(2, 3, 224, 224, generator=generator), tokens


@pytest.fixture(scope="module")
def dense():
    """A ViT-B/16 of transformers, which no test changes."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config={"hidden_size": 768, "intermediate_size": 3072, "patch_size": 16},
        text_config={"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        projection_dim=512,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    spread(model)
    return model


@pytest.fixture(scope="module")
def dense_outputs(dense, batch):
    pixels, tokens = batch
    with torch.no_grad():
        return dense(pixel_values=pixels, input_ids=tokens, output_hidden_states=True)


def spread(model):
    """Fresh weights of FFNs are so small that a mistake in them would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and parameter.ndim == 2:
                parameter.mul_(3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)


def transformers_logits(model, batch):
    pixels, tokens = batch
    with torch.no_grad():
        return model(pixel_values=pixels, input_ids=tokens).logits_per_image


def open_clip_logits(model, batch):
    pixels, tokens = batch
    with torch.no_grad():
        return model.get_logits(pixels, tokens)[0]


def assert_close(found, expected):
    assert expected.isfinite().all() and expected.abs().max() > 1e-2
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_model_of_transformers_keeps_its_logits_in_every_format(tmp_path, batch, dense, dense_outputs, mixed):
    model = dense
    formats = {"transformers": "hf", "open_clip": "oc"} | ({"clipmoe": "x.pt"} if mixed else {"openai": "x.pt"})
    expected = dense_outputs.logits_per_image
    if mixed:
        model = mmbal.upcycle(
            copy.deepcopy(dense), num_experts=2, expert_init="noise", noise_std=0.05, layers="every:3"
        )
        expected = transformers_logits(model, batch)
    last = from_model(model)
    for format, name in formats.items():  # each is written from the one before
        path = tmp_path / name
        write_checkpoint(last, path, format)
        last = open_checkpoint(path, format=format)
        assert_close(transformers_logits(load_clip(path, format=format), batch), expected)
    if mixed:  # the mixtures are no copies
        assert (dense_outputs.logits_per_image - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_model_of_open_clip_keeps_its_logits_in_every_format(tmp_path, batch, mixed):
    open_clip = import_open_clip()
    from mmbal.integrations.open_clip import load_open_clip_moe

    model = open_clip.create_model("ViT-B-16-quickgelu").eval()
    spread(model)
    if mixed:
        mmbal.upcycle(model, num_experts=2, expert_init="noise", noise_std=0.05, layers="every:3")
    expected = open_clip_logits(model, batch)
    write_checkpoint(from_model(model), tmp_path / "hf", "transformers")
    del model
    assert_close(transformers_logits(load_clip(tmp_path / "hf"), batch), expected)
    write_checkpoint(open_checkpoint(tmp_path / "hf"), tmp_path / "oc", "open_clip")
    if mixed:
        back = load_open_clip_moe(tmp_path / "oc")
    else:
        back, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'oc'}")
    assert_close(open_clip_logits(back.eval(), batch), expected)


def test_copies_of_a_dense_model_compute_what_it_does(tmp_path, batch, dense, dense_outputs):
    """Dense equivalence, to 5e-6 of the largest value, of embeddings and of every hidden state."""
    pixels, tokens = batch
    expected = dense_outputs
    write_checkpoint(upcycle_checkpoint(from_model(dense), num_experts=2), tmp_path / "x.pt", "clipmoe")
    copies = load_clip(tmp_path / "x.pt")
    with torch.no_grad():
        found = copies(pixel_values=pixels, input_ids=tokens, output_hidden_states=True)
    pairs = [(found.image_embeds, expected.image_embeds), (found.text_embeds, expected.text_embeds)]
    for tower in ("vision_model_output", "text_model_output"):
        pairs += zip(found[tower].hidden_states, expected[tower].hidden_states, strict=True)
    assert len(pairs) == 2 + 13 + 13
    for a, b in pairs:
        assert (a - b).abs().max() <= 5e-6 * b.abs().max()


@pytest.fixture(autouse=True)
def leave_no_gigabytes(tmp_path, monkeypatch):
    """Nor wait for the disk: that files have reached it when they get their names is not what is shown here."""
    monkeypatch.setattr(mmbal.files.os, "fsync", lambda descriptor: None)
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
