"""An ordinary multimodal training script that asks for shares of its modalities: the lines marked "attribution" are the
change.

    python examples/attribution.py --epochs 20 --seed 0 --plot shares.png

Handwritten digits in two modalities: the whole picture, which is easy, and the same digit written by another hand under
noise, which is not. The same model is trained without the regulariser and with it. What is printed are the shares of
the modalities in the decisions on test data, and the accuracy, also with the dominant modality made useless.
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
    """An encoder for each modality, and a head of two layers on their features side by side."""

    def __init__(self):
        super().__init__()
        self.clean_net, self.noisy_net = (
            nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in MODALITIES
        )
        self.head = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, inputs):
        return self.head(torch.cat([self.clean_net(inputs["clean"]), self.noisy_net(inputs["noisy"])], 1))


def train(model, inputs, labels, epochs, weight, shares, monitor):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    with mmbal.EmbeddingTap(model, {"clean": "clean_net", "noisy": "noisy_net"}) as tap:  # attribution: embeddings
        regularizer = mmbal.AttributionRegularizer(tap, shares=shares, warmup_steps=len(labels) // 64)  # attribution
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(64):
                logits = model({name: x[batch] for name, x in inputs.items()})
                loss = F.cross_entropy(logits, labels[batch])
                value, info = regularizer(logits=logits)  # attribution: how far the shares are from those asked for
                monitor(info)
                optimizer.zero_grad()
                (loss + weight * value).backward()  # attribution: the value has gradients for the head alone
                optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weight", type=float, default=0.1)
    parser.add_argument("--share", type=float, default=0.5, help="asked of the clean modality")
    parser.add_argument("--plot", help="a PNG of the shares over the training with the regulariser")
    options = parser.parse_args()
    torch.set_num_threads(1)  # fastest for matrices as small as these
    splits = load_splits(options.seed)
    (inputs, labels), (test, test_labels) = splits["train"], splits["test"]
    shares = {"clean": options.share, "noisy": 1 - options.share}
    generator = torch.Generator().manual_seed(options.seed)
    shuffled = {**test, "clean": test["clean"][torch.randperm(len(test_labels), generator=generator)]}

    for title, weight in (("without", 0.0), ("regularised", options.weight)):
        torch.manual_seed(options.seed)
        model, monitor = Fusion(), mmbal.AttributionMonitor()
        train(model, inputs, labels, options.epochs, weight, shares, monitor)
        model.eval()
        with torch.no_grad():
            embeddings = {"clean": model.clean_net(test["clean"]), "noisy": model.noisy_net(test["noisy"])}
            found = mmbal.attribution_shares(embeddings, head=model.head).mean()
            accuracy, without = (
                f"{100 * (model(x).argmax(1) == test_labels).double().mean():.1f} %" for x in (test, shuffled)
            )
        print(f"{title:<12} shares", ", ".join(f"{name} {share:.2f}" for name, share in found.items()))
        print(f"    test accuracy {accuracy}, with pictures of other digits as clean ones {without}")
    if options.plot:
        monitor.plot(options.plot, asked=shares)


if __name__ == "__main__":
    main()
