"""`mmbal demo`: upcycle a small pretrained CLIP into a mixture of experts and compare it with its baselines."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import CLIPModel

from mmbal.checkpoints import save_clip_moe
from mmbal.moe import collect_router

from . import stages
from .data import ASSETS, PAD, Pairs, encode, load_splits, normalize
from .evaluate import mean_recall, retrieval
from .model import embed_images, embed_texts, load_parent
from .parent import ParentRecipe
from .parent import train_parent as make_parent
from .report import machine, markdown, versions, write_report
from .store import Store, fingerprint


def run_demo(
    out: str | os.PathLike = "mmbal-demo",
    seed: int = 0,
    quick: bool = False,
    train_parent: bool = False,
    recipe: stages.Recipe | None = None,
) -> dict:
    """Run every stage that `out` does not hold yet, write the report there and return it.

    train_parent trains a new parent into `out`/parent first (unless an earlier run has finished it); otherwise the
    parent of the package is used.
    """
    out, started = Path(out), time.perf_counter()
    recipe = recipe or (stages.Recipe.quick() if quick else stages.Recipe())
    try:
        report = _run(out, seed, recipe, _parent_folder(out, quick, train_parent))
    except KeyboardInterrupt:
        print(f"\nInterrupted. What is finished is kept in {out}; the same command goes on from there.")
        raise
    print(markdown(report))
    print(f"{time.perf_counter() - started:.0f} s. Written to {out}: clip_moe/, report.md, report.json, two pictures.")
    return report


def _parent_folder(out: Path, quick: bool, train_parent: bool) -> Path:
    if not train_parent:
        return ASSETS
    recipe = ParentRecipe(steps=20, warmup=5, evaluate_every=10) if quick else ParentRecipe()
    folder = out / "parent" / fingerprint(asdict(recipe))
    if not (folder / "parent.safetensors").exists():
        make_parent(folder, recipe)
    return folder


def _run(out: Path, seed: int, recipe: stages.Recipe, parent_folder: Path) -> dict:
    splits = load_splits()
    parent, tokenizer = load_parent(parent_folder)
    trainer = stages.Trainer(recipe, splits.train, tokenizer, seed)
    inputs = [parent_folder / name for name in ("parent.safetensors", "parent_config.json", "tokenizer.json")]
    inputs += [path for path in sorted(ASSETS.iterdir()) if path.suffix in (".png", ".tsv")]
    mark = fingerprint({"recipe": asdict(recipe), "seed": seed, "versions": versions()}, *inputs)
    store, costs = Store(out / "stages" / mark), {}

    def trained(name: str, steps: int, build: Callable[[], CLIPModel], train: Callable[[], stages.Outcome]):
        """The model of a stage: from disk into build(), or from train()."""
        made: list[CLIPModel] = []

        def compute():
            outcome = train()
            made.append(outcome.model)
            cost = {
                "steps": steps,
                "seconds": outcome.seconds,
                "tokens_per_second": outcome.tokens / max(outcome.seconds, 1e-9),
            }
            return outcome.model.state_dict(), cost

        tensors, costs[name] = store.stage(name, compute)
        if made:
            return made[0].eval()
        model = build()
        model.load_state_dict(tensors)
        return model.eval()

    def dense() -> CLIPModel:
        return copy.deepcopy(parent)

    experts: list[CLIPModel] = []
    labels: list[torch.Tensor] = []
    for stage in range(1, recipe.mcl_stages + 1):
        before = experts[-1] if experts else parent

        def clusters(before=before, stage=stage):
            began = time.perf_counter()
            found = torch.from_numpy(stages.cluster(trainer, before, stage))
            return {"labels": found}, {"steps": 0, "seconds": time.perf_counter() - began}

        tensors, costs[f"clusters_{stage}"] = store.stage(f"clusters_{stage}", clusters)
        labels.append(tensors["labels"])
        arrays = [part.numpy() for part in labels]
        experts.append(
            trained(
                f"mcl_{stage}",
                recipe.mcl_steps,
                dense,
                lambda arrays=arrays, stage=stage: stages.mcl_stage(trainer, parent, arrays, stage),
            )
        )

    def assembled() -> CLIPModel:
        return stages.assemble(trainer, parent, experts)

    routed = trained("router", recipe.router_steps, assembled, lambda: stages.train_router(trainer, assembled()))
    clip_moe = routed
    if recipe.final_steps:
        clip_moe = trained(
            "everything",
            recipe.final_steps,
            assembled,
            lambda: stages.train_everything(trainer, copy.deepcopy(routed)),
        )
    total = recipe.total_steps
    variants = {
        "dense": parent,
        "dense_continued": trained("dense_continued", total, dense, lambda: stages.continue_dense(trainer, parent)),
        "sparse_upcycling": trained(
            "sparse_upcycling", total, assembled, lambda: stages.sparse_upcycling(trainer, parent)
        ),
        "clip_moe": clip_moe,
    }
    save_clip_moe(clip_moe, out / "clip_moe")
    tokenizer.save(str(out / "clip_moe" / "tokenizer.json"))
    began = time.perf_counter()
    also = {f"mcl_{stage}": expert for stage, expert in enumerate(experts, start=1)}
    also["clip_moe_untrained_router"] = assembled()
    on_test, on_validation = {}, {}
    for name, model in tqdm({**variants, **also}.items(), desc=f"{'evaluation':24s}"):
        on_validation[name] = mean_recall(retrieval(model, tokenizer, splits.validation))
        if name in variants:
            on_test[name] = retrieval(model, tokenizer, splits.test)
    usage = expert_usage(clip_moe, tokenizer, splits.test)
    costs["evaluation"] = {"steps": 0, "seconds": time.perf_counter() - began}
    seconds = {name: cost["seconds"] for name, cost in costs.items()}
    report = {
        "variants": on_test,
        "validation_mean_of_six": on_validation,
        "expert_usage": usage,
        "seconds": seconds | {"total": sum(seconds.values())},
        "stages": costs,
        "test_pairs": len(splits.test),
        "seed": seed,
        "recipe": asdict(recipe),
        "recipe_total_steps": total,
        "machine": machine(),
        "versions": versions(),
    }
    write_report(out, report)
    return report


@torch.no_grad()
def expert_usage(model: CLIPModel, tokenizer: Tokenizer, pairs: Pairs) -> dict[str, list[float]]:
    """Share of the routed tokens that each expert takes, by layer; padding of captions is not counted."""
    ids = encode(tokenizer, [caption.fixed() for caption in pairs.captions])
    counts: dict[str, torch.Tensor] = {}
    for embed, batches in ((embed_images, normalize(pairs.images).split(300)), (embed_texts, ids.split(300))):
        for part in batches:
            with collect_router(model) as routers:
                embed(model, part)
            for record in routers:
                if embed is embed_texts:
                    record = record._replace(token_mask=(part != PAD).flatten())
                counts[record.name] = counts.get(record.name, 0) + record.counts
    return {name: (count / count.sum()).tolist() for name, count in counts.items()}
