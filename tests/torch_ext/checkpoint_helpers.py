"""CLIPs without models: architectures, and random weights for them, as the tests of checkpoints need."""

from dataclasses import replace

import torch

from mmbal.checkpoints import Checkpoint, CLIPArchitecture, LazyTensor, Mixture, TextTower, VisionTower
from mmbal.checkpoints.layouts import canonical_shapes

SMALL = CLIPArchitecture(
    48,
    VisionTower(64, 2, 1, 96, 4, 8, "quick_gelu"),
    TextTower(128, 3, 2, 160, 30, 70, "quick_gelu", bos_token_id=68, eos_token_id=69),
)
L14 = CLIPArchitecture(
    768,
    VisionTower(1024, 24, 16, 4096, 14, 224, "quick_gelu"),
    TextTower(768, 12, 12, 3072, 77, 49408, "quick_gelu"),
)


def with_mixtures(architecture, vision=None, text=None, **options):
    """``vision``, ``text``: layers that are mixtures; None is all, () none."""
    mixtures = {}
    for tower, layers in (("vision", vision), ("text", text)):
        layers = tuple(range(architecture.tower(tower).layers)) if layers is None else layers
        if layers:
            mixtures[tower] = Mixture(layers, **{"num_experts": 4} | options)
    return replace(architecture, mixtures=mixtures)


def random_checkpoint(architecture, seed=0, dtype=torch.float32) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in canonical_shapes(architecture).items():
        tensor = (0.2 * torch.randn(shape, generator=generator)).to(dtype)
        tensors[name] = LazyTensor(shape, dtype, lambda tensor=tensor: tensor)
    return Checkpoint(tensors, architecture, "model")


def state_dict(checkpoint) -> dict:
    """Under canonical names."""
    return {name: checkpoint[name].clone() for name in checkpoint.tensors}


def assert_same(found, expected):
    """Two checkpoints, bit for bit."""
    assert list(found.tensors) == list(expected.tensors)
    assert found.architecture == expected.architecture
    for name in expected.tensors:
        a, b = found[name], expected[name]
        assert a.dtype == b.dtype == found.tensors[name].dtype, name
        assert tuple(a.shape) == found.tensors[name].shape and torch.equal(a, b), name
