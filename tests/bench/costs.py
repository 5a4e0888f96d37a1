"""What else is promised: memory kept for the backward, the router stage, and what the routing costs."""

from __future__ import annotations

from functools import partial

import torch
from contenders import ACTIVATION, Problem, Shape, expert_loop, ours, transformers_experts
from measure import interleaved, titled_table
from rich.table import Table
from torch import Tensor

import mmbal
from mmbal.moe import MoEMLP


def _saved_bytes(run, problem: Problem) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, without the inputs and the weights."""
    given = [problem.x, problem.weights, problem.indices, *problem.experts.parameters()]
    own = {t.untyped_storage().data_ptr() for t in given}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(problem.x, problem.indices, problem.weights)  # noqa: F841 the graph must live while it is counted
    return sum(found.values())


def kept_bytes() -> Table:
    table = titled_table(
        "Memory kept for the backward, MiB (at least 45 % less)", "shape", "mmbal", "grouped_mm", "less"
    )
    for dtype in ("float32", "bfloat16"):
        shape = Shape(768, 3072, 1024, dtype=dtype)
        problem = Problem(shape)
        mine = _saved_bytes(ours(problem.experts), problem)
        theirs = _saved_bytes(transformers_experts("grouped_mm", problem.experts), problem)
        less = f"{100 * (1 - mine / theirs):.0f} %"
        table.add_row(str(shape), f"{mine / 2**20:.1f}", f"{theirs / 2**20:.1f}", less)
    return table


def router_stage(seconds: float) -> Table:
    """Backward with frozen experts over the full backward."""
    table = titled_table("Backward of the router stage over the full backward (at most 0.6)", "shape", "ratio")
    for shape in (Shape(768, 3072, 256), Shape(768, 3072, 1024), Shape(768, 3072, 1024, dtype="bfloat16")):
        torch.set_num_threads(shape.threads)
        backwards = {}
        for name in ("full", "router"):
            problem = Problem(shape)
            problem.experts.requires_grad_(name == "full")
            leaves = [problem.x, problem.weights, *(p for p in problem.experts.parameters() if p.requires_grad)]
            y = ours(problem.experts)(problem.x, problem.indices, problem.weights)
            backwards[name] = partial(torch.autograd.grad, y, leaves, problem.dy, retain_graph=True)
        times = interleaved(backwards, seconds)
        table.add_row(str(shape), f"{times['router'].median / times['full'].median:.2f}")
    return table


def routing_cost(seconds: float) -> Table:
    """Top-k, dispatch and balance loss, forward and backward, over the step of a whole layer. What gathering and
    combining cost is in the table of `make bench-phases`."""
    table = titled_table("Routing over the step of a layer (with gather and combine under 2 %)", "part", "ms", "share")
    shape = Shape(768, 3072, 4096)
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    N, K, D = shape.N, shape.K, shape.D
    layer = MoEMLP(D, shape.F, shape.E, top_k=K, activation=ACTIVATION)
    x, dy = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
    logits = torch.randn(N, shape.E, requires_grad=True)
    indices = torch.ops.mmbal.moe_topk(logits.detach(), K)[1]
    dweights = torch.randn(N, K)

    def step() -> None:
        with mmbal.collect_router(layer) as routers:
            y = layer(x)
        balance = mmbal.router_losses(routers, load_balance=0.01).total
        torch.autograd.backward([y, balance], [dy, None])

    parts = {
        "top-k": lambda: torch.ops.mmbal.moe_topk(logits, K)[0].backward(dweights),
        "dispatch": lambda: torch.ops.mmbal.moe_dispatch(indices, shape.E) and None,
        "balance loss": lambda: torch.ops.mmbal.load_balance_loss(logits, indices).backward(),
    }
    times = interleaved(parts | {"step": step}, seconds)
    whole = times["step"].median
    for name in parts:
        table.add_row(name, f"{1e3 * times[name].median:.2f}", f"{100 * times[name].median / whole:.2f} %")
    total = sum(times[name].median for name in parts)
    table.add_row("together", f"{1e3 * total:.2f}", f"{100 * total / whole:.2f} %")
    table.add_row("step", f"{1e3 * whole:.1f}", "")
    return table


def inference(seconds: float) -> Table:
    """A forward without gradients: packed weights against the same layer without them, and the fastest peer."""
    table = titled_table("Inference, times faster than", "shape", "without mmbal.pack", "grouped_mm", "loop")
    for shape in (Shape(768, 3072, 16), Shape(768, 3072, 64), Shape(768, 3072, 1024)):
        torch.set_num_threads(shape.threads)
        problem = Problem(shape)
        experts, x, indices, weights = problem.experts, problem.x, problem.indices, problem.weights
        packed = torch.ops.mmbal.expert_mlp_pack(experts.up_proj.detach(), experts.down_proj.detach())

        def run_packed(experts=experts, x=x, indices=indices, weights=weights, packed=packed) -> None:
            routing = torch.ops.mmbal.moe_dispatch(indices, experts.num_experts)
            biased = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
            plain = (ACTIVATION, 0.0, 0.0, 0, 0, False)
            torch.ops.mmbal.expert_mlp_forward(x, *biased, weights, *routing, *plain, packed=packed)

        rivals = {"plain": ours, "grouped_mm": partial(transformers_experts, "grouped_mm"), "loop": expert_loop}
        runs = {name: partial(make(experts), x, indices, weights) for name, make in rivals.items()}
        with torch.no_grad():
            times = interleaved(runs | {"packed": run_packed}, seconds)
        mine = times["packed"].median
        table.add_row(str(shape), *(f"{times[name].median / mine:.2f}" for name in rivals))
    return table
