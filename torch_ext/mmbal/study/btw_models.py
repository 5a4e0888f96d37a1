"""The small models of the study of BTW. Shapes: B rows, M modalities, C classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .data import stack

WIDTH, EMBEDDING = 64, 32

Scale = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]


def multiply(embeddings: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Each of M embeddings [B, d] times its column of weights [B, M]."""
    return [embedding * column for embedding, column in zip(embeddings, weights.T.unsqueeze(2), strict=True)]


def _head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs))


def _shaped(output: Tensor) -> Tensor:
    return output.squeeze(1) if output.shape[1] == 1 else output


class Unimodal(nn.Module):
    """One modality -> [B] of a regression (one output) or logits [B, C]."""

    def __init__(self, columns: int, outputs: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(columns, WIDTH), nn.ReLU(), nn.Linear(WIDTH, EMBEDDING))
        self.head = _head(EMBEDDING, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return _shaped(self.head(self.encoder(inputs)))


class Encoders(nn.Module):
    """The encoder of Unimodal once a modality, all of them computed together: [M, B, widest] -> [M, B, 32]."""

    def __init__(self, columns: Sequence[int]):
        super().__init__()
        first = [nn.Linear(count, WIDTH) for count in columns]
        second = [nn.Linear(WIDTH, EMBEDDING) for _ in columns]
        self.w1 = nn.Parameter(stack([layer.weight.detach() for layer in first]).transpose(1, 2).contiguous())
        self.b1 = nn.Parameter(torch.stack([layer.bias.detach() for layer in first])[:, None])
        self.w2 = nn.Parameter(torch.stack([layer.weight.detach().T for layer in second]))
        self.b2 = nn.Parameter(torch.stack([layer.bias.detach() for layer in second])[:, None])

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.b2, torch.baddbmm(self.b1, inputs, self.w1).relu(), self.w2)


class Fusion(nn.Module):
    """All modalities [M, B, widest] -> [B] or [B, C]; embeddings are scaled by their weights before they meet."""

    def __init__(self, columns: Sequence[int], outputs: int):
        super().__init__()
        self.encoders = Encoders(columns)
        self.head = _head(EMBEDDING * len(columns), outputs)

    def forward(self, inputs: Tensor, weights: Tensor, scale: Scale = multiply) -> Tensor:
        return _shaped(self.head(torch.cat(list(scale(self.encoders(inputs).unbind(0), weights)), 1)))
