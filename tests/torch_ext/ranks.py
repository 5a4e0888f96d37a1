"""Runs a function of the rank in several gloo processes, and a small pair of towers with mixtures to train in them."""

import os
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mmbal
from mmbal.distributed import clip_loss, expert_parameters, fully_shard_routers, router_losses, shard_experts

ROWS, TOKENS, STEPS = 12, 3, 3


PRELOADED = (
    "mmbal.distributed",
    "pytest",
    "scipy.special",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "transformers.models.clip.modeling_clip",
)


def fork(function, arguments, count):
    """Runs ``function(rank, *arguments)`` in ``count`` processes.

    A server that has imported everything once, for all modules of tests, forks them: imports are what takes longest.
    """
    get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    start_processes(function, arguments, nprocs=count, start_method="forkserver")


def start(function, count, folder):
    """What ``function(rank, folder)`` returns in each of ``count`` processes of one gloo group."""
    fork(_process, (function, count, str(folder)), count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _process(rank, function, count, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(minutes=5))
    torch.save(function(rank, folder), os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(tensor):
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), mmbal.MoEMLP(8, 12, **{"num_experts": 4, "router_bias": True} | options)
        nn.init.normal_(self.mlp.router.weight)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Tower(nn.Module):
    def __init__(self, inputs, options):
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, 8), nn.Linear(8, 6, bias=False)
        self.blocks = nn.ModuleList(Block(options) for _ in range(2))
        self.checkpointed = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return F.normalize(self.head(x.mean(1)), dim=-1)


class Towers(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.images, self.texts = Tower(5, options), Tower(7, options)
        self.logit_scale = nn.Parameter(torch.tensor([1.5]))  # fully_shard takes no scalars

    def forward(self, images, texts):
        return self.images(images), self.texts(texts), self.logit_scale.exp()

    def all_blocks(self):
        return [*self.images.blocks, *self.texts.blocks]


def make(seed=0, **options):
    torch.manual_seed(seed)
    return Towers(options).double()


def batch(step, rows):
    return drawn(ROWS, TOKENS, 5, seed=2 * step)[rows], drawn(ROWS, TOKENS, 7, seed=2 * step + 1)[rows]


def loss_of(run, model, images, texts, load_balance=0.1, z=0.01):
    with mmbal.collect_router(model) as routers:
        images, texts, scale = run(images, texts)
    return clip_loss(images, texts, scale) + router_losses(routers, load_balance, z).total


# Kinds of parallelism: what is called in place of the model.


def ddp(model):
    return DistributedDataParallel(model)


def shards(model, **options):
    for block in model.all_blocks():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def shards_and_routers(model):
    return shards(fully_shard_routers(model))


def split_experts(model):
    return ddp(shard_experts(model))


def split_experts_and_shards(model, **options):
    ignored = set(expert_parameters(shard_experts(model)).values())
    return shards(model, ignored_params=ignored, **options)


def without_sync(run):
    """While the gradients of a step are summed up; another backward follows."""
    if isinstance(run, DistributedDataParallel):
        return run.no_sync()
    if isinstance(run, FSDPModule):
        run.set_requires_gradient_sync(False)
    return nullcontext()


def train(rows, wrap=None, frozen=False, adam=False, checkpointed=False, batches=1, dtype=torch.float64, **options):
    """Steps of some batches with these rows of each; mean loss of the processes, whole gradients of the first step,
    whole weights after the last."""
    model = make(**options).to(dtype)
    for tower in (model.images, model.texts):
        tower.checkpointed = checkpointed
    if frozen:
        mmbal.freeze_except_router(model)
    run = wrap(model) if wrap else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.02, eps=1e-5) if adam else torch.optim.SGD(trained, 0.2, momentum=0.9)
    losses, gradients = [], None
    for step in range(STEPS):
        for i in range(batches):
            last = i + 1 == batches
            with nullcontext() if last else without_sync(run):
                if last and isinstance(run, FSDPModule):
                    run.set_requires_gradient_sync(True)
                images, texts = (x.to(dtype) for x in batch(step * batches + i, rows))
                loss = loss_of(run, model, images, texts) / batches
                loss.backward()
            losses.append(loss.detach())
        if gradients is None:
            gradients = {name: full(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    losses = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": {name: full(p) for name, p in model.named_parameters()},
    }


def train_part(rank, wrap, cut, alone=None, **options):
    """With this rank's of ``cut`` rows. ``alone`` is said to the one process only."""
    return train(slice(sum(cut[:rank]), sum(cut[: rank + 1])), wrap, **options)


def train_alone(wrap, cut, alone=None, **options):
    return train(slice(None), **options, **(alone or {}))


def assert_same_training(found, alone):
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-12, atol=1e-13)
    for kind in ("gradients", "weights"):
        assert list(found[kind]) == list(alone[kind])
        for name, expected in alone[kind].items():
            if expected is None:
                assert found[kind][name] is None, name
            else:
                torch.testing.assert_close(found[kind][name], expected, rtol=1e-10, atol=1e-12, msg=f"{kind} of {name}")
