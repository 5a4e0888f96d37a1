"""An ordinary multimodal training script that weighs modalities with BTW: the lines marked "BTW" are the change.

    python examples/btw.py --epochs 20 --seed 0

Handwritten digits in three modalities: the left half of the picture, the right half, and the whole picture under so
much noise that little is left of it. The same model is trained without BTW and with each of its two modes.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mmbal

MODALITIES = ["left", "right", "noisy"]


def load_splits():
    """{"train", "validation", "test": ({modality: [N, pixels]}, labels [N])}"""
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    pictures, generator = pixels.float().reshape(-1, 8, 8) / 16, torch.Generator().manual_seed(0)
    inputs = {
        "left": pictures[:, :, :4].flatten(1),
        "right": pictures[:, :, 4:].flatten(1),
        "noisy": (pictures + torch.randn(pictures.shape, generator=generator)).flatten(1),
    }
    parts = torch.randperm(len(labels), generator=generator).split([900, 297, 600])
    names = ("train", "validation", "test")
    return {split: ({k: v[i] for k, v in inputs.items()}, labels[i]) for split, i in zip(names, parts, strict=True)}


class Fusion(nn.Module):
    """An encoder for each modality, one head for their embeddings side by side."""

    def __init__(self, inputs, btw=None):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {k: nn.Sequential(nn.Linear(v.shape[1], 64), nn.ReLU(), nn.Linear(64, 32)) for k, v in inputs.items()}
        )
        self.head = nn.Linear(32 * len(inputs), 10)
        self.btw = btw  # BTW: its table is saved and loaded with the model

    def forward(self, inputs, **rows):
        embeddings = {name: self.encoders[name](values) for name, values in inputs.items()}
        if self.btw is not None:
            embeddings = self.btw.apply(embeddings, **rows)  # BTW: weights, before fusion
        return self.head(torch.cat(list(embeddings.values()), 1).relu())


def train(model, splits, epochs, unimodal=None):
    """The model of the epoch with the best validation loss. unimodal: {split: {modality: logits}}, for BTW."""
    (inputs, labels), (held_out, held_out_labels) = splits["train"], splits["validation"]
    optimizer, best = torch.optim.Adam(model.parameters(), lr=2e-3), None
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            rows = {} if unimodal is None else {"index": batch}  # BTW: which rows of the table these are
            loss = F.cross_entropy(model({k: v[batch] for k, v in inputs.items()}, **rows), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if unimodal is not None:
            every = torch.arange(len(labels))
            with torch.no_grad():
                model.btw.update(every, unimodal["train"], model(inputs, index=every))  # BTW: weights of next epoch
        loss = F.cross_entropy(predict(model, held_out, unimodal and unimodal["validation"]), held_out_labels).item()
        if unimodal is not None:
            model.btw.step(loss)  # BTW: how fast the table moves
        if best is None or loss < best[0]:
            best = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[1])
    return model


@torch.no_grad()
def predict(model, inputs, unimodal=None):
    logits = model(inputs)
    if unimodal is not None:
        weights = model.btw.weights(unimodal=unimodal, fused=logits)  # BTW: of new rows, from predictions alone
        logits = model(inputs, weights=weights)
    return logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # fastest for matrices as small as these
    splits = load_splits()
    (inputs, labels), (test, test_labels) = splits["train"], splits["test"]

    def report(name, logits):
        print(f"{name:<19} test accuracy {100 * (logits.argmax(1) == test_labels).double().mean():.1f} %")

    unimodal = {split: {} for split in splits}  # BTW: logits of a model of each modality alone, made once
    for name in MODALITIES:
        torch.manual_seed(options.seed)
        alone = {split: ({name: values[name]}, y) for split, (values, y) in splits.items()}
        model = train(Fusion(alone["train"][0]), alone, options.epochs)
        for split, (values, _) in alone.items():
            unimodal[split][name] = predict(model, values)
        report(f"{name} alone", unimodal["test"][name])

    torch.manual_seed(options.seed)
    model = train(Fusion(inputs), splits, options.epochs)
    report("plain fusion", predict(model, test))

    for mode in ("diverge", "agree"):
        torch.manual_seed(options.seed)
        btw = mmbal.BTW(MODALITIES, task="classification", num_samples=len(labels), mode=mode)  # BTW: the table
        model = train(Fusion(inputs, btw), splits, options.epochs, unimodal)
        report(f"BTW, mode {mode}", predict(model, test, unimodal["test"]))
        print("    mean weights:", ", ".join(f"{k} {w:.2f}" for k, w in zip(MODALITIES, btw.weights(), strict=True)))


if __name__ == "__main__":
    main()
