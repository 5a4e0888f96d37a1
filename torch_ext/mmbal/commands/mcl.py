"""``mmbal mcl``: features and clusters for multistage contrastive learning."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmbal.commands.refusals import refusals
from mmbal.commands.several_values import SeveralValues

app = typer.Typer(
    help="Clusters of image-caption pairs for multistage contrastive learning (MCL, arXiv 2402.11816), which CLIP-MoE"
    " (arXiv 2409.19291) fine-tunes its experts on: extract features of each earlier model, then cluster them.",
    no_args_is_help=True,
)


class Kept(str, Enum):
    float16 = "float16"
    float32 = "float32"


class Autocast(str, Enum):
    none = "none"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Algorithm(str, Enum):
    auto = "auto"
    kmeans = "kmeans"
    minibatch = "minibatch"


def _shard(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not slash or not i.isdecimal() or not n.isdecimal() or int(i) >= int(n):
        raise typer.BadParameter(f"--shard must be i/n with i from 0 to n - 1, got {text!r}")
    return int(i), int(n)


@app.command()
def extract(
    model: Annotated[Path, typer.Option(help="CLIP checkpoint, dense or a mixture.")],
    pairs: Annotated[
        Path,
        typer.Option(
            help="Table (.tsv, .csv) with a header and a column of image files, relative to its folder, and one of"
            " captions; or tensors (.npz, .safetensors): input_ids, and pixel_values or uint8 images."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Features, .safetensors; complete as soon as it is there.")],
    batch: Annotated[int, typer.Option(min=1, help="Pairs at once.")] = 64,
    dtype: Annotated[Kept, typer.Option(help="In which features are kept; published: float16.")] = Kept.float16,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Part I of N of the pairs, from 0: for N processes; then `merge`.")
    ] = "0/1",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out pairs whose image cannot be read, and list them.")
    ] = False,
    image_column: Annotated[str | None, typer.Option(help="Of the table; otherwise image or filepath.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of the table; otherwise caption or title.")] = None,
    no_quotes: Annotated[
        bool, typer.Option("--no-quotes", help="Quotation marks in the table are part of the text.")
    ] = False,
    image_processor: Annotated[
        Path | None,
        typer.Option(help="Folder with preprocessor_config.json; otherwise the model's, otherwise CLIP's usual."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with a tokenizer of transformers; otherwise the model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = "cpu",
    autocast: Annotated[
        Autocast, typer.Option(help="In which dtype to compute; published: float16, on a GPU.")
    ] = Autocast.none,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images.")] = 4,
):
    """Features of all pairs under one model, L2-normalised. Started again after it was stopped, it goes on."""
    from mmbal.mcl import extract_features

    part = _shard(shard)
    kept = "Interrupted. Finished parts are kept; the same command goes on from there."
    with refusals(interrupted=kept):
        features = extract_features(
            model,
            pairs,
            out,
            batch=batch,
            dtype=dtype.value,
            shard=part,
            skip_broken=skip_broken,
            image_column=image_column,
            caption_column=caption_column,
            quotes=not no_quotes,
            image_processor=image_processor,
            tokenizer=tokenizer,
            device=device,
            autocast=autocast.value,
            workers=workers,
            say=typer.echo,
        )
        typer.echo(f"{out}: {len(features)} pairs, {features.images.shape[1]} features of images and of texts each")


Files = Annotated[list[Path], typer.Option(help="One file, or several: --features A B C.")]


@app.command(cls=SeveralValues)
def merge(
    features: Files,
    out: Annotated[Path, typer.Option(help="Features of all pairs.")],
):
    """Joins the shards of one extraction."""
    from mmbal.mcl import Features, merge_features

    with refusals():
        merged = merge_features([Features.load(path) for path in features])
        merged.save(out)
        typer.echo(f"{out}: {len(merged)} pairs")


def _sizes_table(found, batch: int) -> Table:
    import numpy as np

    table = Table("labels", "clusters", "possible", "smallest", "median", "largest", f"dropped at batch {batch}")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [(f"{s + 1} stage{'s' * (s > 0)}", found.accumulated(s + 1), s + 1) for s in range(len(found.stages))]
    if found.min_size:
        rows.append((f"merged below {found.min_size}", found.final(), len(found.stages)))
    for name, labels, stages in rows:
        sizes = np.unique(labels, return_counts=True)[1]
        possible = 1
        for radix in found.radices[:stages]:
            possible *= radix
        dropped = int((sizes % batch).sum())
        table.add_row(
            name,
            f"{len(sizes):,}",
            f"{possible:,}",
            f"{sizes.min():,}",
            f"{np.median(sizes):,.0f}",
            f"{sizes.max():,}",
            f"{dropped:,} ({dropped / len(labels):.1%})",
        )
    return table


@app.command(cls=SeveralValues)
def cluster(
    features: Annotated[
        list[Path],
        typer.Option(help="Features of each earlier model, the base first, in order: --features F0 F1 F2."),
    ],
    out: Annotated[Path, typer.Option(help="Labels, .safetensors.")],
    clusters: Annotated[
        int, typer.Option(min=1, help="Of images and of texts, so their square for pairs; published: 3.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and features give the same labels.")] = 0,
    labels: Annotated[
        Path | None, typer.Option(help="Labels of the stages before; those of the features are appended to them.")
    ] = None,
    min_size: Annotated[
        int,
        typer.Option(
            min=0, help="Clusters below it join their siblings under one parent; the global batch is a good value."
        ),
    ] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Global batch to count dropped samples of an epoch for; published: 800.")
    ] = 800,
    algorithm: Annotated[
        Algorithm,
        typer.Option(help="auto: kmeans up to 100,000 pairs, else minibatch with the published settings."),
    ] = Algorithm.auto,
    n_init: Annotated[int | None, typer.Option(min=1, help="Starts; kmeans 3, minibatch 1 (published).")] = None,
    max_iter: Annotated[int | None, typer.Option(min=1, help="kmeans 300, minibatch 500 (published).")] = None,
    tol: Annotated[float | None, typer.Option(min=0, help="kmeans 1e-4, minibatch 1e-5 (published).")] = None,
    kmeans_batch: Annotated[int | None, typer.Option(min=1, help="Of minibatch; published: 1,000,000.")] = None,
):
    """k-means of images and of texts for each model, joint labels, accumulated over the models."""
    from mmbal.mcl import ClusterLabels, Features, cluster_stages

    with refusals():
        previous = ClusterLabels.load(labels) if labels else None
        loaded = [Features.load(path) for path in features]
        found = cluster_stages(
            loaded,
            clusters,
            seed,
            previous,
            min_size,
            algorithm=algorithm.value,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            batch_size=kmeans_batch,
        )
        found.save(out)
    console = Console(soft_wrap=True)
    console.print(_sizes_table(found, batch))
    count = len(found.index)
    for number, stage in enumerate(found.stages, start=1):
        console.print(
            f"stage {number}: {stage.algorithm}, mean squared distance to the centre "
            f"{stage.image_inertia / count:.4f} of images, {stage.text_inertia / count:.4f} of texts",
            highlight=False,
        )
    left_out = found.rows - count
    if left_out:
        console.print(f"{left_out} pairs have no features and are in no cluster", highlight=False)
    console.print(f"{out}: labels of {count:,} pairs", highlight=False)
