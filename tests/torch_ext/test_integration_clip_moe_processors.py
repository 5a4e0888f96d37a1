"""CLIP-MoE folders that have CLIP's tokenizer and preprocessor files, as a folder of OpenAI's on the hub has them."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPProcessor, pipeline

from clip_moe_models import build
from mmbal.integrations.clip_moe import CLIPMoEModel

WORDS = ["a</w>", "r", "e", "d", "b", "l", "u", "e</w>", "d</w>", "re", "bl", "ue</w>"]


@pytest.fixture
def folder(make_clip, tmp_path):
    model = build(make_clip(0))
    model.save_pretrained(tmp_path)
    text, side = model.config.text_config, model.config.vision_config.image_size
    vocabulary = dict(zip(WORDS, range(len(WORDS)), strict=True))
    vocabulary |= {"<|startoftext|>": text.vocab_size - 2, "<|endoftext|>": text.vocab_size - 1}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nb l\nu e</w>\n")
    options = {"model_max_length": text.max_position_embeddings, "name_or_path": "./clip_ViT_B_32/"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))  # names no class
    crop = {"size": side, "crop_size": side, "feature_extractor_type": "CLIPFeatureExtractor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(crop))
    return tmp_path


def test_autoprocessor_gives_clips_processor_and_its_inputs_run(folder):
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is CLIPProcessor
    assert type(AutoTokenizer.from_pretrained(folder)) is type(processor.tokenizer)
    inputs = processor(text=["a red", "a blue"], images=[Image.new("RGB", (50, 40))], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert CLIPMoEModel.from_pretrained(folder)(**inputs).logits_per_image.shape == (1, 2)


def test_the_pipeline_of_zero_shot_classification_runs(folder):
    pipe = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    assert type(pipe.model) is CLIPMoEModel
    found = pipe(Image.new("RGB", (50, 40), "red"), candidate_labels=["red", "blue"], hypothesis_template="a {}")
    assert {answer["label"] for answer in found} == {"red", "blue"}
    assert sum(answer["score"] for answer in found) == pytest.approx(1, abs=1e-5)
