"""An ordinary script that trains a connector between frozen encoders and searches across modalities with it: the lines
marked "alt-moe" are the method.

    python examples/altmoe.py --epochs 60 --seed 0 --folder run

Handwritten digits in three modalities, as three sensors might see one picture: its upper half, its lower half, and its
spectrum. The encoders are fixed random features. The connector learns to find the same picture by any of the others;
what is printed are the recalls before and after, which experts each direction uses, and a search in stored vectors.
Started again with the same folder, a run that was stopped goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import mmbal

WIDTH = 96  # of the features of each encoder


def load_pictures(seed):
    """{"train", "test": {modality: [N, pixels]}}"""
    pixels = torch.from_numpy(load_digits().images).float() / 16
    spectrum = torch.fft.rfft2(pixels).abs().flatten(1) / 8
    views = {"top": pixels[:, :4].flatten(1), "bottom": pixels[:, 4:].flatten(1), "spectrum": spectrum}
    rows = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    parts = {"train": rows[:1500], "test": rows[1500:]}
    return {split: {name: x[own] for name, x in views.items()} for split, own in parts.items()}


def make_encoder(inputs, seed):
    """Frozen: in your script a pretrained model, such as the one whose vectors you have stored."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(inputs, WIDTH), torch.nn.GELU()).requires_grad_(False)


def show(title, found):
    print(title, ", ".join(f"{src}->{tgt} {100 * r[1]:.1f} / {100 * r[10]:.1f}" for (src, tgt), r in found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("altmoe-run"), help="of the checkpoint and the vectors")
    options = parser.parse_args()
    torch.set_num_threads(1)  # fastest for matrices as small as these
    splits = load_pictures(options.seed)
    encoders = {name: make_encoder(x.shape[1], i) for i, (name, x) in enumerate(splits["train"].items())}
    train, test = ({name: encoders[name](x) for name, x in splits[split].items()} for split in ("train", "test"))

    torch.manual_seed(options.seed)
    connector = mmbal.MoEConnector(dict.fromkeys(train, WIDTH), hidden=128, num_experts=8, top_k=2)  # alt-moe
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-3, weight_decay=0.005)
    sampler = mmbal.ResumableBatchSampler(len(train["top"]), 100, seed=options.seed)
    trainer = mmbal.AlternatingTrainer(connector, optimizer, sampler=sampler)  # alt-moe: a direction a step, in turn
    checkpoint = options.folder / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)  # same batches, directions and random numbers as if it had not been stopped
        print(f"goes on from step {trainer.steps}")
    show("now   " if trainer.steps else "before", trainer.evaluate(test))
    while sampler.epoch < options.epochs:
        for rows in sampler:
            trainer.step({name: x[rows] for name, x in train.items()})  # alt-moe
        if sampler.epoch % 10 == 0:
            trainer.save(checkpoint)
    trainer.save(checkpoint)
    connector.eval().reset_usage()  # while training, evaluations are not counted
    show("after ", trainer.evaluate(test))
    for direction in connector.directions:
        shares = connector.usage(direction).double().sum(0)
        print(f"{direction[0]}->{direction[1]} experts", " ".join(f"{s:.2f}" for s in shares / shares.sum()))

    connector.eval()
    mark = connector.fingerprint("spectrum", encoders["spectrum"])
    store = mmbal.VectorStore(connector.cl_dim, torch.float16, mark)
    with torch.no_grad():
        store.add([f"picture {i}" for i in range(len(test["top"]))], connector.target(test["spectrum"], "spectrum").cl)
        store.save(options.folder / "spectra")
        store = mmbal.VectorStore.load(options.folder / "spectra", mark)  # vectors of other weights are refused
        found = store.search(connector(test["top"][:3], "top", "spectrum").cl, k=3)
    for i, ids in enumerate(found.ids):
        print(f"spectra for the upper half of picture {i}:", ", ".join(ids))


if __name__ == "__main__":
    main()
