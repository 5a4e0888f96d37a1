"""Tiny CLIP-MoE models of transformers for the tests."""

import torch

import mmbal
from mmbal.integrations.clip_moe import CLIPMoEConfig, CLIPMoEModel

MIXTURES = {
    "vision": {"layers": [1, 2], "num_experts": 3, "top_k": 2, "activation": "gelu", "dropout": 0.125},
    "text": {"layers": [0], "num_experts": 5, "top_k": 1, "normalize": False, "router_bias": True},
}


def build(clip):
    """A CLIPMoEModel of the sizes of ``clip``, with weights that can be seen in the outputs."""
    model = CLIPMoEModel(CLIPMoEConfig(**clip.config.to_dict(), mixtures=MIXTURES)).eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, mmbal.MoEMLP)}


def assert_identical(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
