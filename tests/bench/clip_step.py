"""A step of the router stage of a CLIP-MoE, end to end: mmbal's experts against transformers' in the same model.

ViT-B/16 and its text tower with random weights, every FFN a mixture of four experts of which two are used, routers
trained by AdamW on the contrastive loss and the balance loss, everything else frozen (arXiv 2409.19291, section 4).
Float32, two threads. Only what runs the experts is exchanged; routers and attention are the same code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
from contenders import TransformersExperts
from measure import interleaved, machine, titled_table
from rich.console import Console
from torch import nn
from transformers import CLIPConfig, CLIPModel

import mmbal

BAR = 1.4


def clip_moe(quick: bool) -> CLIPModel:
    """ViT-B/16; quick: its first two layers."""
    layers = 2 if quick else 12
    config = CLIPConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "patch_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 12,
        },
        text_config={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
        },
        projection_dim=512,
    )
    torch.manual_seed(0)
    model = mmbal.upcycle(CLIPModel(config), num_experts=4, expert_init="noise", noise_std=0.02)
    mmbal.freeze_except_router(model)
    return model.train()


class _Weights(nn.Module):
    """Stacked weights under transformers' names."""

    def __init__(self, experts: mmbal.Experts, activation: Callable):
        super().__init__()
        self.num_experts, self.act_fn = experts.w1.shape[0], activation
        self.up_proj, self.up_proj_bias = experts.w1, experts.b1
        self.down_proj, self.down_proj_bias = experts.w2, experts.b2


def grouped_mm(experts, x_ND, weights_NK, indices_NK, activation, *dropouts, packed=None):
    """What mmbal.moe calls for its experts, by transformers' grouped_mm."""
    config = mock.Mock(_experts_implementation="grouped_mm")
    module = TransformersExperts(config, _Weights(experts, mmbal.dense.ACTIVATIONS[activation]))
    return module(x_ND, indices_NK, weights_NK.to(x_ND.dtype))


def stepper(model: CLIPModel, batch: dict, rival: bool) -> Callable[[], float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # every step finds the same weights

    def step() -> float:
        with mock.patch("mmbal.moe.mix_experts", grouped_mm) if rival else nullcontext():
            with mmbal.collect_router(model) as routers:
                loss = model(**batch, return_loss=True).loss
            loss = loss + mmbal.router_losses(routers, load_balance=0.01).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two layers, batch 4: shows that it runs")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for a spread, not {arguments.rounds}")
    torch.set_num_threads(2)
    B = 4 if arguments.quick else arguments.batch
    model = clip_moe(arguments.quick)
    ids = torch.randint(1, 49000, (B, 77))
    ids[:, -1] = 49407
    batch = {"pixel_values": torch.randn(B, 3, 224, 224), "input_ids": ids}
    steps = {"mmbal": stepper(model, batch, False), "grouped_mm": stepper(model, batch, True)}
    losses, gradients = {}, {}
    for name, step in steps.items():
        losses[name] = step()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    difference = (gradients["mmbal"] - gradients["grouped_mm"]).norm() / gradients["grouped_mm"].norm()
    if abs(losses["mmbal"] - losses["grouped_mm"]) > 1e-4 or not difference < 1e-2:
        sys.exit(f"the two differ: losses {losses}, gradients by {difference:.1e}")
    times = interleaved(steps, seconds=0.0, least=arguments.rounds)
    ratio, error = times["grouped_mm"].over(times["mmbal"])
    table = titled_table(
        f"A step of the router stage, ViT-B/16 CLIP-MoE, batch {B} (at least {BAR} times as fast)",
        *("experts by", "seconds", "spread", "images a second", "times faster"),
    )
    for name, found in times.items():
        faster = f"{ratio:.2f} +- {error:.2f}" if name == "mmbal" else ""
        table.add_row(name, f"{found.median:.2f}", f"{found.spread:.1%}", f"{B / found.median:.2f}", faster)
    console = Console(width=120)
    console.print(f"{machine()}; losses agree to {abs(losses['mmbal'] - losses['grouped_mm']):.0e}", highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
