"""`mmbal demo`: upcycle a small pretrained CLIP into a mixture of experts and compare it with its baselines.

What concerns checkpoints and clusters is done by commands of mmbal on files; training and evaluation is done here.
"""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import CLIPModel

from mmbal.checkpoints import save_clip_moe

from . import stages
from .data import ASSETS, Splits, load_splits
from .evaluate import expert_usage, mean_recall, retrieval
from .model import load_parent
from .parent import ParentRecipe
from .parent import train_parent as make_parent
from .report import machine, markdown, versions, write_report
from .store import fingerprint
from .workshop import Workshop


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
    made = "clip_moe/, report.md, report.json, commands.sh, two pictures"
    print(f"{time.perf_counter() - started:.0f} s. Written to {out}: {made}.")
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
    inputs = [parent_folder / name for name in ("parent.safetensors", "parent_config.json", "tokenizer.json")]
    inputs += [path for path in sorted(ASSETS.iterdir()) if path.suffix in (".png", ".tsv")]
    mark = fingerprint({"recipe": asdict(recipe), "seed": seed, "versions": versions()}, *inputs)
    work = Workshop(out / "stages" / mark, stages.Trainer(recipe, splits.train, tokenizer, seed), parent)

    experts = _experts(work)
    mixture = _mixture(work, list(experts))
    variants = {
        "dense": parent,
        "dense_continued": work.trained("dense_continued", recipe.total_steps, stages.continue_dense, "parent"),
        "sparse_upcycling": _sparse_upcycling(work),
        "clip_moe": mixture,
    }
    save_clip_moe(mixture, out / "clip_moe")
    tokenizer.save(str(out / "clip_moe" / "tokenizer.json"))
    work.shell.comment("The result")
    work.shell.script += ["cd ../../..", "mmbal inspect clip_moe"]
    work.shell.run("mmbal inspect clip_moe", folder=out)
    work.shell.write(out / "commands.sh", needed=["pairs.safetensors", "parent", *experts])

    also = {**experts, "clip_moe_untrained_router": work.load("assembled")}
    report = _evaluate(work, variants, also, splits, tokenizer)
    write_report(out, report)
    return report


def _experts(work: Workshop) -> dict[str, CLIPModel]:
    """MCL: one expert a stage, trained on clusters of the pairs by features of the models before it."""
    recipe, experts, before, earlier = work.trainer.recipe, {}, "parent", ""
    for stage in range(1, recipe.mcl_stages + 1):
        name, features, labels = f"mcl_{stage}", f"features_{stage}.safetensors", f"labels_{stage}.safetensors"
        work.shell.comment(f"Stage {stage} of MCL: clusters by the features of {before}")
        work.commanded(
            f"clusters_{stage}",
            [features, labels],
            f"mmbal mcl extract --model {before} --pairs pairs.safetensors --batch 300 --dtype float32"
            f" --out {features}",
            f"mmbal mcl cluster --features {features}{earlier} --clusters {recipe.clusters}"
            f" --seed {work.trainer.seed} --min-size {recipe.batch} --batch {recipe.batch} --out {labels}",
        )
        work.shell.comment(f"Python: trains the FFNs of parent on batches drawn by {labels}; this is {name}.")
        labels_file = work.folder / labels
        experts[name] = work.trained(name, recipe.mcl_steps, stages.mcl_stage, "parent", labels_file, stage)
        work.differ_in_ffns("parent", name)
        before, earlier = name, f" --labels {labels}"
    return experts


def _upcycle(work: Workshop, experts: str, out: str) -> None:
    recipe = work.trainer.recipe
    work.commanded(
        out,
        [out],
        f"mmbal upcycle --base parent {experts} --top-k {recipe.top_k} --layers {shlex.quote(recipe.layers)}"
        f" --router-init uniform --seed {work.trainer.seed} --format transformers --verify 64 --out {out}",
    )


def _mixture(work: Workshop, experts: list[str]) -> CLIPModel:
    """DMU: every FFN becomes the parent's and those of all stages behind a random router, which is trained."""
    recipe = work.trainer.recipe
    work.shell.comment("DMU: every FFN becomes E experts (the parent's and one of each stage) behind a random router")
    _upcycle(work, f"--experts {' '.join(experts)}", "assembled")
    work.shell.comment("Python: trains the routers of assembled; this is clip_moe.")
    mixture = work.trained("router", recipe.router_steps, stages.train_router, "assembled")
    if recipe.final_steps:
        mixture = work.trained("everything", recipe.final_steps, stages.train_everything, "router")
    return mixture


def _sparse_upcycling(work: Workshop) -> CLIPModel:
    recipe = work.trainer.recipe
    work.shell.comment("The baseline sparse upcycling: E copies of each FFN, of which Python then trains everything")
    _upcycle(work, f"--num-experts {1 + recipe.mcl_stages}", "copies")
    return work.trained("sparse_upcycling", recipe.total_steps, stages.sparse_upcycling, "copies")


def _evaluate(
    work: Workshop,
    variants: dict[str, CLIPModel],
    also: dict[str, CLIPModel],
    splits: Splits,
    tokenizer: Tokenizer,
) -> dict:
    """The report; models in `also` are evaluated on the validation pairs alone."""
    began = time.perf_counter()
    on_test, on_validation = {}, {}
    for name, model in tqdm({**variants, **also}.items(), desc=f"{'evaluation':24s}"):
        on_validation[name] = mean_recall(retrieval(model, tokenizer, splits.validation))
        if name in variants:
            on_test[name] = retrieval(model, tokenizer, splits.test)
    usage = expert_usage(variants["clip_moe"], tokenizer, splits.test)
    costs = work.costs | {"evaluation": {"steps": 0, "seconds": time.perf_counter() - began}}
    seconds = {name: cost["seconds"] for name, cost in costs.items()}
    recipe = work.trainer.recipe
    return {
        "variants": on_test,
        "validation_mean_of_six": on_validation,
        "expert_usage": usage,
        "seconds": seconds | {"total": sum(seconds.values())},
        "stages": costs,
        "test_pairs": len(splits.test),
        "seed": work.trainer.seed,
        "recipe": asdict(recipe),
        "recipe_total_steps": recipe.total_steps,
        "machine": machine(),
        "versions": versions(),
    }
