"""``mmbal upcycle``, ``inspect``, ``diff``, ``convert`` and ``extract-expert``: CLIP checkpoints from file to file."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmbal.commands.refusals import refusals
from mmbal.commands.several_values import SeveralValues

app = typer.Typer()


Format = Annotated[str, typer.Option("--format", help="clipmoe, transformers, open_clip or openai (dense only).")]
Out = Annotated[Path, typer.Option(help="File (clipmoe, openai) or folder (transformers, open_clip) to write.")]
Activation = Annotated[str, typer.Option(help="auto, or quick_gelu, gelu, ... where a file does not tell it.")]
AllowJit = Annotated[
    bool, typer.Option("--allow-jit", help="Run TorchScript archives, which are programs, to read them.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16: of all weights. Each keeps its own unless said.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
From = Annotated[str, typer.Option("--from", help="Format of what is read, where its names do not tell it.")]


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False, markup=False)  # a path may have brackets


def _dtype(name):
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, None: None}
    if name not in known:
        raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {name!r}")
    return known[name]


def _open(path, **options):
    from mmbal.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(path, **options)
    for note in checkpoint.notes:
        print(f"note: {path}: {note}", file=sys.stderr)
    return checkpoint


def _write(checkpoint, out, format, dtype, overwrite, max_shard_bytes=None):
    from mmbal.checkpoints import write_checkpoint
    from mmbal.checkpoints.writing import entries

    total = sum(entry.dtype.itemsize * math.prod(entry.shape) for entry in entries(checkpoint, format, _dtype(dtype)))
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"writing {out.name}", total=total)
        try:
            notes = write_checkpoint(
                checkpoint, out, format, _dtype(dtype), max_shard_bytes, overwrite, lambda done: bar.advance(task, done)
            )
        except KeyboardInterrupt:
            print(f"{out} was not written", file=sys.stderr)
            raise
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _check_out(out, format, overwrite, dtype=None):
    """Refuses before any weight is read."""
    from mmbal.checkpoints.writing import check_target

    _dtype(dtype)
    if out.exists() and not overwrite:
        raise ValueError(f"--out {out} exists already; --overwrite replaces it")
    if format in ("transformers", "open_clip") and out.suffix in (".pt", ".safetensors", ".bin"):
        raise ValueError(f"--out must be a folder for --format {format}, got {out}")
    check_target(out, format, overwrite)


@app.command(cls=SeveralValues)
def upcycle(
    base: Annotated[
        Path, typer.Option(help="A dense CLIP: file or folder. Expert 0 and all other weights come from it.")
    ],
    out: Out,
    experts: Annotated[
        list[Path] | None, typer.Option(help="Fine-tuned copies of the base, or their FFNs alone; several may follow.")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="Experts a layer, where no --experts are given (4).")] = None,
    top_k: Annotated[int, typer.Option(help="Experts for each token.")] = 2,
    layers: Annotated[str, typer.Option(help="all, last:M, every:M, alternate, 1+3+5, or vision=...,text=...")] = "all",
    expert_init: Annotated[str | None, typer.Option(help="sources, copy, noise or drop (Drop-Upcycling).")] = None,
    router_init: Annotated[str, typer.Option(help="uniform (+-1/sqrt(D)), normal:STD or zeros.")] = "uniform",
    shared: Annotated[
        str, typer.Option(help="Weights outside the FFNs: strict (must agree), base or mean.")
    ] = "strict",
    include_base: Annotated[
        bool, typer.Option("--base-expert/--no-base-expert", help="Whether the base is expert 0.")
    ] = True,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Weights of the K experts add up to 1.")
    ] = True,
    shared_expert: Annotated[
        bool, typer.Option("--shared-expert", help="The base's FFN once more, for every token.")
    ] = False,
    shared_weight: Annotated[float, typer.Option(help="Weight of the shared expert.")] = 0.5,
    noise_std: Annotated[float, typer.Option(help="Of --expert-init noise.")] = 0.02,
    drop_ratio: Annotated[float, typer.Option(help="Share of hidden units that --expert-init drop draws again.")] = 0.5,
    dropout: Annotated[
        float, typer.Option(help="Of hidden units of experts while training (0.1 in the published code).")
    ] = 0.0,
    text_positions: Annotated[
        int | None, typer.Option(help="Stretch the text's positions, 77 to 248, as Long-CLIP.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of routers, noise and drop.")] = 0,
    format: Format = "clipmoe",
    from_format: From = "auto",
    activation: Activation = "auto",
    dtype: Dtype = None,
    max_shard: Annotated[float | None, typer.Option(help="GB a file, for --format transformers.")] = None,
    verify: Annotated[
        int, typer.Option(min=0, help="Random rows that each expert is run on after writing; 0: no check.")
    ] = 64,
    allow_jit: AllowJit = False,
    overwrite: Overwrite = False,
):
    """Makes a CLIP-MoE of dense CLIPs (DMU, arXiv 2409.19291): FFNs become mixtures of those of base and experts."""
    from mmbal.checkpoints import stretch_positions, upcycle_checkpoint

    with refusals():
        _check_out(out, format, overwrite, dtype)
        reading = {"format": from_format, "activation": activation, "allow_jit": allow_jit}
        dense = _open(base, **reading)
        like = dense.architecture
        sources = [_open(path, **(reading | {"format": "auto"}), like=like) for path in experts or []]
        mixture = upcycle_checkpoint(
            dense,
            sources,
            num_experts=num_experts,
            top_k=top_k,
            layers=layers,
            expert_init=expert_init,
            router_init=router_init,
            shared=shared,
            include_base=include_base,
            normalize=normalize,
            noise_std=noise_std,
            drop_ratio=drop_ratio,
            dropout=dropout,
            shared_expert=shared_expert,
            shared_weight=shared_weight,
            seed=seed,
            progress=lambda name: print(f"comparing {name} with the base", file=sys.stderr),
        )
        if text_positions is not None:
            mixture = stretch_positions(mixture, text_positions)
        _write(mixture, out, format, dtype, overwrite, None if max_shard is None else int(max_shard * 1e9))
        console = _console()
        console.print(_counts_table(mixture.architecture))
        if verify:
            _verify(out, mixture, verify, console)
        console.print(f"Written: {out}")


def _verify(out, expected, rows, console):
    from mmbal.checkpoints import open_checkpoint
    from mmbal.checkpoints.verification import differing_sizes, differing_tensors, verify_layers

    written = open_checkpoint(out)
    if different := differing_sizes(written, expected):
        raise ValueError(f"{out}: read again, it says something else of {', '.join(different)}")
    if different := differing_tensors(written, expected):
        raise ValueError(f"{out}: read again, {len(different)} tensors are not what was written, {different[0]} first")
    reports = verify_layers(written, rows)
    if bad := [report.block for report in reports if report.error != report.error]:
        raise ValueError(f"{out} is written, but experts put out NaN or infinity in {len(bad)} layers, {bad[0]} first")
    worst = max(reports, key=lambda report: report.error)
    dtype = {lazy.dtype for name, lazy in written.tensors.items() if ".experts." in name}
    console.print(
        f"Verified: {len(written.tensors)} tensors read back bit for bit; each expert of {len(reports)} layers on "
        f"{rows} random rows equals its FFN to {worst.error:.1e} of the largest output ({worst.block}), weights in "
        f"{', '.join(sorted(str(d).removeprefix('torch.') for d in dtype))}."
    )
    if worst.error > 1e-5:  # float32 products of up to a few thousand terms stay below 2e-6
        raise ValueError(f"{out}: {worst.block} computes something else than its FFNs, by {worst.error:.1e}")
    closest = min(reports, key=lambda report: report.spread)
    if closest.spread == 0:
        console.print(
            "Two experts of a layer are the same: until they differ, the task gives its router no reason to choose "
            f"between them ({closest.block})."
        )
    elif closest.spread == closest.spread:
        console.print(
            f"Experts differ: the closest two are {closest.spread:.1%} apart in what they put out ({closest.block})."
        )


def _counts_table(architecture):
    from mmbal.checkpoints import count_parameters

    table = Table("", "total", "active", "routers", "FFNs and experts", box=None, pad_edge=False, header_style="bold")
    for tower in ("vision", "text", None):
        if tower is None or architecture.tower(tower):
            counts = count_parameters(architecture, tower)
            table.add_row(tower or "all", *(f"{n:,}" for n in (counts.total, counts.active, counts.router, counts.ffn)))
    return table


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="File or folder of a CLIP or CLIP-MoE.")],
    from_format: From = "auto",
    activation: Activation = "auto",
    top_k: Annotated[int | None, typer.Option(help="Of a CLIP-MoE file without its JSON file.")] = None,
    allow_jit: AllowJit = False,
):
    """Says what a checkpoint is: format, sizes, experts, layers, numbers of parameters, dtypes. Reads no weights."""
    with refusals():
        checkpoint = _open(path, format=from_format, activation=activation, top_k=top_k, allow_jit=allow_jit)
        architecture, console = checkpoint.architecture, _console()
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row("format", checkpoint.format)
        sizes = {}
        for lazy in checkpoint.tensors.values():
            name = str(lazy.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + math.prod(lazy.shape)
        total = sum(sizes.values())
        table.add_row("tensors", f"{len(checkpoint.tensors)}")
        table.add_row("dtypes", ", ".join(f"{name} {count / total:.1%}" for name, count in sorted(sizes.items())))
        for tower in ("vision", "text"):
            if (t := architecture.tower(tower)) is None:
                continue
            where = (
                f"{t.image_size} pixels in patches of {t.patch_size}"
                if tower == "vision"
                else f"{t.context_length} positions, {t.vocab_size:,} tokens"
            )
            table.add_row(
                tower,
                f"{t.layers} layers of {t.width}, {t.heads} heads, FFNs of {t.mlp_width} with {t.activation}; {where}",
            )
            if mixture := architecture.mixtures.get(tower):
                extra = (
                    f", one more for every token with weight {mixture.shared_weight}" if mixture.shared_expert else ""
                )
                plain = "" if mixture.normalize else ", weights not normalised"
                table.add_row(
                    f"{tower} mixture",
                    f"E = {mixture.num_experts} experts, K = {mixture.top_k} a token{extra}{plain}; "
                    f"layers {_ranges(mixture.layers)}",
                )
        console.print(table)
        console.print(_counts_table(architecture))


def _ranges(numbers):
    """0 to 3, 5: runs of consecutive numbers."""
    runs = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in runs)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(help="Another of the same architecture, in any format.")],
    from_format: From = "auto",
    activation: Activation = "auto",
    allow_jit: AllowJit = False,
):
    """Which tensors of two checkpoints differ, and by how much. Ends with 0 where none does, with 1 where some do, and
    with 2 where they cannot be compared.

    Experts of one base may differ in their FFNs alone (MCL): the last line says whether that holds.
    """
    from mmbal.checkpoints.comparison import compare

    with refusals(code=2):
        reading = {"activation": activation, "allow_jit": allow_jit}
        formats = ["auto" if path.is_dir() else from_format for path in (a, b)]  # a folder always tells its own
        first, second = (_open(path, format=f, **reading) for path, f in zip((a, b), formats, strict=True))
        groups = compare(first, second)
        console = _console()
        table = Table("", "tensors", "differ", "largest difference", "relative distance", box=None, pad_edge=False)
        for group in groups:
            shown = [f"{group.largest:.3g} ({group.where})", f"{group.distance:.3%}"] if group.differing else ["0", "0"]
            table.add_row(group.name, str(group.tensors), str(group.differing), *shown)
        console.print(table)
        ffn = sum(group.differing for group in groups if group.is_ffn)
        other = sum(group.differing for group in groups if not group.is_ffn)
        if other:
            console.print(f"They differ outside their FFNs, in {other} tensors.")
        elif ffn:
            console.print(f"They differ in their FFNs only ({ffn} tensors).")
        else:
            console.print("They are the same.")
    if ffn or other:
        raise typer.Exit(1)


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="File or folder of a CLIP or CLIP-MoE.")],
    out: Out,
    format: Format,
    from_format: From = "auto",
    activation: Activation = "auto",
    top_k: Annotated[int | None, typer.Option(help="Of a CLIP-MoE file without its JSON file.")] = None,
    text_positions: Annotated[
        int | None, typer.Option(help="Stretch the text's positions, 77 to 248, as Long-CLIP.")
    ] = None,
    dtype: Dtype = None,
    allow_jit: AllowJit = False,
    overwrite: Overwrite = False,
):
    """Writes a checkpoint in another format; weights stay bit for bit unless --dtype changes them."""
    from mmbal.checkpoints import stretch_positions

    with refusals():
        _check_out(out, format, overwrite, dtype)
        checkpoint = _open(path, format=from_format, activation=activation, top_k=top_k, allow_jit=allow_jit)
        if text_positions is not None:
            checkpoint = stretch_positions(checkpoint, text_positions)
        _write(checkpoint, out, format, dtype, overwrite)
        _console().print(f"Written: {out}")


@app.command("extract-expert")
def extract_expert(
    path: Annotated[Path, typer.Argument(help="File or folder of a CLIP-MoE.")],
    expert: Annotated[int, typer.Option(help="Its number, from 0.")],
    out: Out,
    format: Format = "openai",
    ffn_only: Annotated[
        bool, typer.Option("--ffn-only", help="The FFNs of the mixture layers and nothing else.")
    ] = False,
    top_k: Annotated[int | None, typer.Option(help="Of a CLIP-MoE file without its JSON file.")] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
):
    """Takes one expert out of a CLIP-MoE, as a dense CLIP or as its FFNs alone."""
    from mmbal.checkpoints import extract_expert as extract
    from mmbal.checkpoints.writing import write_ffns

    with refusals():
        if ffn_only and format != "openai":
            raise ValueError(f"--ffn-only writes FFNs under OpenAI's names, not in --format {format}")
        _check_out(out, format, overwrite, dtype)
        dense = extract(_open(path, top_k=top_k), expert, ffn_only)
        if ffn_only:
            write_ffns(dense, out, _dtype(dtype))
        else:
            _write(dense, out, format, dtype, overwrite)
        _console().print(f"Written: {out}")
