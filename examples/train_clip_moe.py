"""Trains the routers of a CLIP-MoE in several processes, on CPUs (gloo) or GPUs (nccl).

    torchrun --nproc-per-node 2 examples/train_clip_moe.py --parallel ddp --steps 100 --out clip-moe

--parallel ddp: each process has the whole model (DistributedDataParallel).
--parallel fsdp: each has a part of every weight, and the whole of one block at a time (fully_shard).
--parallel expert: each has some of the experts and all other weights; rows travel to their experts.

All three take the steps that one process with the whole batch takes. Started again with the same --out, a run goes on
from its last checkpoint, also in another number of processes or another kind of parallelism.

It starts from the small CLIP that the package ships and its pictures, or from --clip, a folder that transformers reads,
and --pairs, a folder with NAME.png or .jpg and NAME.txt.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel, CLIPProcessor

import mmbal
from mmbal.demo.data import MAX_TOKENS, PAD, encode, load_splits, normalize
from mmbal.demo.model import load_parent
from mmbal.distributed import clip_grad_norm_, clip_loss, fully_shard_routers, router_losses, shard_experts


def load_clip(options):
    """The mixture, the same in every process, and a function that gives a batch of pairs by their numbers."""
    if options.clip:
        clip = CLIPModel.from_pretrained(options.clip)
        processor = CLIPProcessor.from_pretrained(options.clip)
        files = sorted(f for f in Path(options.pairs).iterdir() if f.suffix in (".png", ".jpg"))

        def batch(rows):
            images = [Image.open(files[i]).convert("RGB") for i in rows]
            texts = [files[i].with_suffix(".txt").read_text(encoding="utf-8") for i in rows]
            return processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")

        count = len(files)
    else:
        clip, tokenizer = load_parent()
        pairs = load_splits().train
        count = len(pairs)

        def batch(rows):
            ids = encode(tokenizer, [pairs.captions[i].fixed() for i in rows])
            ids = F.pad(ids, (0, MAX_TOKENS - ids.shape[1]), value=PAD)
            return {"input_ids": ids, "pixel_values": normalize(pairs.images[rows])}

    mmbal.upcycle(clip, num_experts=4, top_k=2, layers="last:2", expert_init="drop", seed=options.seed)
    mmbal.freeze_except_router(clip)
    return clip.eval(), batch, count  # without dropout, whose masks depend on the number of processes


def parallel(clip, kind):
    """What is called in place of the model. The split itself happens in place."""
    if kind == "ddp":
        return DistributedDataParallel(clip)
    if kind == "expert":
        return DistributedDataParallel(shard_experts(clip))
    fully_shard_routers(clip)  # in float32 whatever a policy says of the rest
    for tower in (clip.vision_model, clip.text_model):
        for block in tower.encoder.layers:
            fully_shard(block)
    return fully_shard(clip, ignored_params={clip.logit_scale})  # a scalar, and frozen


def save_checkpoint(folder, clip, optimizer, step):
    """``latest`` names a checkpoint that is complete."""
    model, moments = states.get_state_dict(clip, optimizer)
    dcp.save({"model": model, "optimizer": moments, "step": step}, checkpoint_id=folder / f"step-{step}")
    if dist.get_rank() == 0:
        (folder / "latest.partial").write_text(f"step-{step}")
        os.replace(folder / "latest.partial", folder / "latest")
        for old in folder.glob("step-*"):
            if old.name != f"step-{step}":
                shutil.rmtree(old)


def load_checkpoint(folder, clip, optimizer):
    """The step it goes on from."""
    if not (folder / "latest").exists():
        return 0
    model, moments = states.get_state_dict(clip, optimizer)
    state = {"model": model, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=folder / (folder / "latest").read_text())
    states.set_state_dict(clip, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "expert"), default="ddp")
    parser.add_argument("--clip", help="folder of a transformers CLIPModel; needs --pairs")
    parser.add_argument("--pairs", help="folder of pictures and captions")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128, help="pairs of all processes together")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("clip-moe"))
    options = parser.parse_args()
    if bool(options.clip) != bool(options.pairs):
        parser.error("--clip and --pairs go together")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    clip, batch, count = load_clip(options)
    if min(options.batch, count) < processes:
        parser.error(f"--batch and the pairs must be at least {processes}, one for each process")
    run = parallel(clip.to(device), options.parallel)
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=options.learning_rate)
    checkpoints = options.out.with_name(options.out.name + ".checkpoints")
    first = load_checkpoint(checkpoints, clip, optimizer)

    for step in range(first, options.steps):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)  # a step's batch, wherever it is run
        rows = torch.randperm(count, generator=generator)[: options.batch][rank::processes].tolist()
        with mmbal.collect_router(clip) as routers:
            out = run(**{name: tensor.to(device) for name, tensor in batch(rows).items()})
        loss = clip_loss(out.image_embeds, out.text_embeds, clip.logit_scale.exp())
        total = loss + router_losses(routers, load_balance=0.01).total
        optimizer.zero_grad()
        total.backward()
        clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach() / processes
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1} loss {mean.item():.6f}", flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_checkpoint(checkpoints, clip, optimizer, step + 1)

    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process
    weights = states.get_model_state_dict(clip, options=whole)
    if rank == 0:
        clip, _, _ = load_clip(options)
        clip.load_state_dict(weights)
        mmbal.save_clip_moe(clip.eval(), options.out)
        print(f"Written to {options.out}; mmbal.load_clip_moe reads it.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
