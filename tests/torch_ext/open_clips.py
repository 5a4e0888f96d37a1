"""Small models of open_clip for tests."""

import copy

import torch

import mmbal
from peers import import_open_clip

open_clip = import_open_clip()
LAYERS = {"vision": 3, "text": 4}


def config(vision=(), text=(), **options):
    """A model_cfg; the arguments are added to it."""
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8, **dict(vision)},
        "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 24, "heads": 2, "layers": 4, **dict(text)},
        **options,
    }


def make(kind="CLIP", **options):
    """A dense model in evaluation mode whose MLPs are large enough to be seen through it."""
    torch.manual_seed(0)
    model = getattr(open_clip, kind)(**config(**options)).eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_moe(kind="CLIP", model=None, **options):
    """An upcycled model whose experts differ."""
    options = {"num_experts": 3, "expert_init": "noise", "noise_std": 0.2, **options}
    return mmbal.upcycle(copy.deepcopy(model) if model else make(kind), **options)


def batch(seed=5, size=6):
    """Images [size, 3, 16, 16] and texts [size, 9]."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, 48, (size, 9), generator=generator)
    texts[:, -1] = 49
    return torch.randn(size, 3, 16, 16, generator=generator), texts
