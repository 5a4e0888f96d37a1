"""An ordinary CLIP fine-tuning script that trains a mixture of experts: the lines marked "mmbal" are the change.

    python examples/clip_moe.py --steps 100 --out clip-moe

It starts from the small CLIP that the package ships and trains on real pictures and captions.
"""

import argparse
import random

import torch
from tqdm import trange

import mmbal  # mmbal
from mmbal.demo.data import batch, load_splits  # the pairs; in your script, your own data
from mmbal.demo.evaluate import mean_recall, retrieval
from mmbal.demo.model import load_parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="clip-moe")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    pairs = load_splits()
    clip, tokenizer = load_parent()
    print(f"dense parent:  mean recall {mean_recall(retrieval(clip, tokenizer, pairs.validation)):.1f} %")

    mmbal.upcycle(clip, num_experts=4, top_k=2, layers="last:2", seed=options.seed)  # mmbal
    optimizer = torch.optim.AdamW(clip.parameters(), lr=options.learning_rate)

    clip.train()
    for _ in trange(options.steps, desc="training"):
        chosen = rng.sample(range(len(pairs.train)), options.batch)
        pixels, ids = batch(pairs.train, chosen, tokenizer, rng, generator)
        with mmbal.collect_router(clip) as routers:  # mmbal
            loss = clip(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        loss = loss + mmbal.router_losses(routers, load_balance=0.01).total  # mmbal
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip.eval()

    print(f"after training: mean recall {mean_recall(retrieval(clip, tokenizer, pairs.validation)):.1f} %")
    mmbal.save_clip_moe(clip, options.out)  # mmbal
    print(f"Written to {options.out}; mmbal.load_clip_moe reads it.")


if __name__ == "__main__":
    main()
