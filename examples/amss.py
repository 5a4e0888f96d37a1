"""An ordinary multimodal training script that masks gradients with AMSS: the lines marked "AMSS" are the change.

    python examples/amss.py --epochs 20 --seed 0

Handwritten digits in two modalities: the whole picture, which is easy, and the same digit written by another hand under
noise, which is not. The same model is trained without AMSS, with AMSS, and with AMSS+.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mmbal

MODALITIES = ["clean", "noisy"]


def load_splits(seed):
    """{"train", "test": ({modality: [N, 64]}, labels [N])}"""
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    pictures, generator = pixels.float() / 16, torch.Generator().manual_seed(seed)
    parts = torch.randperm(len(labels), generator=generator).split([1200, 597])
    splits = {}
    for split, rows in zip(("train", "test"), parts, strict=True):
        x, y = pictures[rows], labels[rows]
        other = torch.empty(len(y), dtype=torch.int64)
        for digit in range(10):  # another picture of the same digit
            same = (y == digit).nonzero().flatten()
            other[same] = same[torch.randperm(len(same), generator=generator)]
        noisy = x[other] + 0.5 * torch.randn(x.shape, generator=generator)
        splits[split] = ({"clean": x, "noisy": noisy}, y)
    return splits


class Fusion(nn.Module):
    """An encoder for each modality, one linear head for their features side by side."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU()) for name in MODALITIES}
        )
        self.head = nn.Linear(64, 10)

    def forward(self, inputs):
        return self.head(torch.cat([encoder(inputs[name]) for name, encoder in self.encoders.items()], 1))

    def alone(self, inputs):
        """Logits of each modality by itself, from its columns of the head."""
        weights = self.head.weight.split(32, 1)
        return {
            name: F.linear(encoder(inputs[name]), w, self.head.bias / 2)
            for (name, encoder), w in zip(self.encoders.items(), weights, strict=True)
        }


def train(model, inputs, labels, epochs, amss=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    if amss is not None:
        amss.attach(optimizer)  # AMSS: masks the gradients before every step of the optimizer
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            loss = F.cross_entropy(model({name: x[batch] for name, x in inputs.items()}), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if amss is not None:
                amss.observe(y=labels[batch])  # AMSS: how much each modality says about the labels
            optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # fastest for matrices as small as these
    splits = load_splits(options.seed)
    (inputs, labels), (test, test_labels) = splits["train"], splits["test"]

    def accuracy(logits):
        return f"{100 * (logits.argmax(1) == test_labels).double().mean():.1f} %"

    for title, plus in (("joint training", None), ("AMSS", False), ("AMSS+", True)):
        torch.manual_seed(options.seed)
        model, amss = Fusion(), None
        if plus is not None:
            amss = mmbal.AMSS.from_concat_head(dict(model.encoders), model.head, plus=plus)  # AMSS: what it masks
        train(model, inputs, labels, options.epochs, amss)
        model.eval()
        with torch.no_grad():
            alone = ", ".join(f"{name} alone {accuracy(logits)}" for name, logits in model.alone(test).items())
            print(f"{title:<15} test accuracy {accuracy(model(test))} ({alone})")
        if amss is not None:
            print("    updated part:", ", ".join(f"{name} {rho:.2f}" for name, rho in amss.rho.items()))


if __name__ == "__main__":
    main()
