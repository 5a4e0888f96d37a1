"""The models of the study of AMSS: an encoder a modality, one linear layer over their features.

Shapes: B rows, M modalities, D features of one modality, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WIDTH, FEATURES = 64, 32  # of the encoders of tables and titles
CHANNELS = (16, 32, 64)  # of the picture's encoder, the last its features


def table_encoder(columns: int) -> nn.Sequential:
    """[B, columns] -> [B, 32]."""
    return nn.Sequential(nn.Linear(columns, WIDTH), nn.ReLU(), nn.Linear(WIDTH, FEATURES))


def picture_encoder() -> nn.Sequential:
    """[B, 3, 48, 48] -> [B, 64]."""
    layers, before = [], 3
    for channels in CHANNELS:
        layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def encoder_of(example: Tensor) -> nn.Sequential:
    """The encoder for a modality with rows like these [N, ...]."""
    return picture_encoder() if example.ndim == 4 else table_encoder(example.shape[1])


class Fusion(nn.Module):
    """Late fusion: logits = W [z^1; ...; z^M] + b. With one modality it is that modality's own model."""

    def __init__(self, inputs: dict[str, Tensor], classes: int):
        super().__init__()
        self.encoders = nn.ModuleDict({name: encoder_of(values) for name, values in inputs.items()})
        self.widths = [CHANNELS[-1] if values.ndim == 4 else FEATURES for values in inputs.values()]
        self.head = nn.Linear(sum(self.widths), classes)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, C] and the features [B, D] of each modality."""
        features = {name: encoder(inputs[name]) for name, encoder in self.encoders.items()}
        return self.head(torch.cat(list(features.values()), 1)), features

    @torch.no_grad()
    def own_logits(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each modality adds to the logits, [B, C]: W_m z^m + b / M."""
        blocks: Sequence[Tensor] = self.head.weight.split(self.widths, 1)
        share = self.head.bias / len(self.widths)
        return {name: torch.addmm(share, z, block.T) for (name, z), block in zip(features.items(), blocks, strict=True)}
