"""The command ``mmbal``."""

import ctypes
import dataclasses
import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmbal.commands import checkpoints, mcl

app = typer.Typer(
    help="Operators that turn a dense model into a mixture of experts, train it, and balance modalities.",
    no_args_is_help=True,
)


def _version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _bfloat16() -> str:
    from mmbal import _core

    if _core.multiplies_bfloat16():
        return "multiplied in pairs by the kernels in use"
    if _core.isa_in_use() == "avx512" and "avx512_bf16" in _core.cpu_features() and _core.bfloat16_pairs_are_slow():
        why = "faster here than this processor's products of pairs (MMBAL_ISA=avx512_bf16 takes those)"
    else:
        why = "no bfloat16 instructions in use, so no faster than float32"
    return f"converted to float32 while packing: {why}"


def _experts_registry() -> str:
    """transformers is imported for this in part, which takes a moment; it is installed with mmbal."""
    from mmbal.integrations.experts import experts_registry_status

    return experts_registry_status()


def _cuda_library():
    """What the CUDA library is, and whether this torch can use it."""
    import torch

    from mmbal._library import CUDA_LIBRARY, refused_on_cuda

    if not CUDA_LIBRARY.exists():
        return "not built (needs nvcc at installation, and MMBAL_CUDA not 0)"
    if torch.version.cuda is None:
        return "present, not loaded: this torch has no CUDA"
    build_info = ctypes.CDLL(str(CUDA_LIBRARY)).mmbal_cuda_build_info
    build_info.restype = ctypes.c_char_p
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU found"
    lacking = ", ".join(sorted(name.removeprefix("mmbal::") for name in refused_on_cuda))
    return f"loaded, {build_info().decode()}; {gpu}; CPU alone: {lacking or 'nothing'}"


def _operators():
    import torch

    schemas = torch._C._jit_get_all_schemas()
    return sorted(s.name.removeprefix("mmbal::") for s in schemas if s.name.startswith("mmbal::"))


@app.command()
def info():
    """Versions, CPU features in use, threads, CUDA library and operators."""
    import torch

    from mmbal import _core

    table = Table(show_header=False, box=None, pad_edge=False)
    cap = os.environ.get("MMBAL_ISA")
    rows = {
        "mmbal": f"{_core.version}, built with {_core.compiler} against torch {_core.built_with_torch}",
        "torch": torch.__version__,
        "transformers": _version_of("transformers"),
        "python": platform.python_version(),
        "CPU features": ", ".join(_core.cpu_features()) or "none that matter here",
        "kernels in use": _core.isa_in_use() + (f" (MMBAL_ISA={cap})" if cap else ""),
        "bfloat16": _bfloat16(),
        "float16": "converted to float32 while packing, no faster than float32",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}, torch's own pool",
        "kept memory": "up to 4 GiB of scratch memory"
        + (
            " and freed gradients are kept for the next call"
            if torch.__version__ >= (2, 13)
            else "; gradients take fresh pages in every step, which torch 2.13 or later need not"
        ),
        "CUDA library": _cuda_library(),
        "in transformers": _experts_registry(),
        "operators": "\n".join(_operators()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(soft_wrap=True).print(table, markup=False)


def _recipe(changes: list[str], quick: bool):
    """The demo's recipe with NAME=VALUE changes; the value takes the type that the field has."""
    from mmbal.demo.stages import Recipe

    recipe = Recipe.quick() if quick else Recipe()
    types = {field.name: type(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in types:
            raise typer.BadParameter(f"--set must be NAME=VALUE with NAME among {', '.join(types)}, got {change!r}")
        try:
            values[name] = types[name](text)
        except ValueError:
            raise typer.BadParameter(f"--set {name} must be {types[name].__name__}, got {text!r}") from None
    return dataclasses.replace(recipe, **values)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where results go; stages found there are not done again.")] = Path(
        "mmbal-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of clusters, batches, routers.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of each stage: shows that it runs, not what it gains.")
    ] = False,
    train_parent: Annotated[
        bool, typer.Option("--train-parent", help="Train the parent anew instead of taking the shipped one.")
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another value in the recipe; repeatable.")
    ] = None,
):
    """Upcycles a small CLIP into a mixture of experts on real image-caption pairs and reports what it gained."""
    from mmbal.demo.run import run_demo
    from mmbal.demo.shell import CommandError

    recipe = _recipe(changes or [], quick)
    try:
        run_demo(out, seed=seed, quick=quick, train_parent=train_parent, recipe=recipe)
    except KeyboardInterrupt:  # run_demo has said what is kept
        raise typer.Exit(130) from None
    except CommandError as error:  # the command itself has said why
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


app.registered_commands += checkpoints.app.registered_commands
app.add_typer(mcl.app, name="mcl")

study = typer.Typer(help="What a method gains on real data, against what it has to beat.", no_args_is_help=True)
app.add_typer(study, name="study")


Out = Annotated[Path, typer.Option(help="Where results go; what is finished there is not done again.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many: 0, 1, ...")]
Quick = Annotated[bool, typer.Option("--quick", help="One seed, two epochs: shows that it runs, not what it gains.")]


def _conduct(name: str, out: Path, seeds: int, quick: bool) -> None:
    try:
        import_module(f"mmbal.study.{name}").run_study(out, seeds=seeds, quick=quick)
    except KeyboardInterrupt:  # run_study has said what is kept
        raise typer.Exit(130) from None


@study.command()
def btw(out: Out = Path("mmbal-study/btw"), seeds: Seeds = 5, quick: Quick = False):
    """Weights modalities by divergence and mutual information (BTW) on two tables and compares it with plain fusion."""
    _conduct("btw", out, seeds, quick)


@study.command()
def amss(out: Out = Path("mmbal-study/amss"), seeds: Seeds = 5, quick: Quick = False):
    """Masks subnetworks of the modality that is ahead (AMSS) on three data sets and compares it with joint training."""
    _conduct("amss", out, seeds, quick)


@study.command()
def attribution(out: Out = Path("mmbal-study/attribution"), seeds: Seeds = 5, quick: Quick = False):
    """Asks for shares of the modalities in decisions (attribution regularisation), against plain training."""
    _conduct("attribution", out, seeds, quick)


@study.command()
def altmoe(out: Out = Path("mmbal-study/altmoe"), seeds: Seeds = 3, quick: Quick = False):
    """Aligns views of digits, and emoji with captions, direction by direction through one mixture (Alt-MoE)."""
    try:
        _conduct("altmoe", out, seeds, quick)
    except ImportError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    app()
