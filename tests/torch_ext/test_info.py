"""The `mmbal info` command, and what the installed libraries depend on."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mmbal
from mmbal._library import CUDA_LIBRARY, refused_on_cuda
from mmbal.cli import app
from mmbal.integrations.experts import experts_registry_status

THREADS = torch.get_num_threads()
OPERATORS = ("moe_topk", "moe_dispatch", "expert_mlp", "load_balance_loss", "router_z_loss")


def command(*arguments, **environment):
    program = Path(sys.executable).with_name("mmbal")
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"} | environment,
        cwd="/",
    )


@pytest.fixture(scope="module")
def info():
    result = command("info")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def info_of_less():
    return command("info", MMBAL_ISA="portable", OMP_NUM_THREADS="1").stdout


@pytest.mark.parametrize("package", ["mmbal", "torch"])
def test_info_prints_the_versions(info, package):
    assert importlib.metadata.version(package) in info or getattr(sys.modules[package], "__version__", "?") in info


@pytest.mark.parametrize("operator", OPERATORS)
def test_info_lists_the_operators(info, operator):
    assert operator in info


def test_info_says_which_instruction_set_is_in_use_and_that_it_can_be_capped(info, info_of_less):
    assert re.search(rf"(?i)\b{mmbal._core.isa_in_use()}\b", info)
    assert re.search(r"(?i)\bportable\b", info_of_less)


def test_info_says_whether_bfloat16_is_multiplied_or_converted(info, info_of_less):
    (mine,), (less,) = (
        [line for line in text.splitlines() if line.startswith("bfloat16")] for text in (info, info_of_less)
    )
    assert ("in pairs" in mine) == (mmbal._core.isa_in_use() in ("avx512_bf16", "amx"))
    assert "converted to float32" in less


def test_info_prints_the_cpu_features_of_this_machine(info):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs /proc/cpuinfo")
    flags = cpuinfo.read_text().split()
    for flag, name in (("avx2", "avx2"), ("avx512f", "avx512")):
        if flag in flags:
            assert re.search(f"(?i){name}", info)


def test_info_prints_the_number_of_threads(info, info_of_less):
    for output, threads in ((info, THREADS), (info_of_less, 1)):
        assert re.search(rf"(?i)threads?\W+(?:\w+\W+)?{threads}\b", output), output


def test_info_says_whether_the_cuda_library_is_there(info):
    (line,) = [line for line in info.splitlines() if re.search("(?i)cuda.*lib|lib.*cuda|^.?.?cuda", line)][:1]
    assert re.search("(?i)not|no|absent|missing|yes|present|found|loaded|available|/", line)


def test_info_says_whether_transformers_knows_our_experts(info):
    (line,) = [line for line in info.splitlines() if line.startswith("in transformers")]
    assert experts_registry_status() in line


def on_cuda(operator, *arguments):
    """What a call with CUDA tensors runs into, without such a tensor."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.mmbal, operator).default.redispatch(key, *arguments)


def test_cuda_kernels_are_loaded_exactly_where_torch_has_cuda_and_the_library_is_there():
    loadable = torch.version.cuda is not None and CUDA_LIBRARY.exists()  # that takes no GPU
    assert bool(refused_on_cuda) == (not loadable)
    for operator in OPERATORS[:2]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mmbal::{operator}", "CUDA")
        assert (f"mmbal::{operator}" in refused_on_cuda) == (not loadable)


@pytest.mark.skipif(not refused_on_cuda, reason="the CUDA kernels are loaded")
def test_a_cuda_tensor_where_there_is_no_kernel_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match="expert_mlp_pack: got a CUDA tensor, but .*(install|move its tensors)"):
        on_cuda("expert_mlp_pack", torch.zeros(1, 2, 3), torch.zeros(1, 3, 2))


def test_an_unknown_command_fails_and_help_names_the_commands():
    runner = CliRunner()
    assert runner.invoke(app, ["frobnicate"]).exit_code != 0
    text = runner.invoke(app, ["--help"]).output
    assert "info" in text and "demo" in text


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_registered_and_documents_its_arguments(operator):
    names = [a.name for a in getattr(torch.ops.mmbal, operator).default._schema.arguments]
    expected = {
        "moe_topk": ["logits", "k", "normalize", "selection_bias"],
        "moe_dispatch": ["indices", "num_experts"],
        "expert_mlp": [
            *("x", "w1", "b1", "w2", "b2", "weights", "permutation", "offsets", "inverse"),
            *("activation", "dropout", "output_dropout", "seed", "offset"),
        ],
        "load_balance_loss": ["logits", "indices", "token_mask", "normalize"],
        "router_z_loss": ["logits", "token_mask"],
    }[operator]
    assert names == expected


def shared_libraries():
    loaded = {Path(p) for p in torch.ops.loaded_libraries if "mmbal" in str(p)}
    return sorted(loaded | {Path(mmbal._core.__file__)})


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_no_library_of_ours_needs_an_openmp_runtime():
    libraries = shared_libraries()
    assert len(libraries) >= 2, libraries
    for library in libraries:
        output = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output)
        assert needed, library
        assert not [name for name in needed if re.search("gomp|iomp|libomp", name)], (library, needed)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_importing_adds_no_openmp_runtime_to_the_one_of_torch():
    script = """
import re, torch
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if re.search("gomp|iomp|libomp", line)}
before = runtimes()
from typer.testing import CliRunner

import mmbal
from mmbal._library import CUDA_LIBRARY, refused_on_cuda
from mmbal.cli import app
torch.ops.mmbal.moe_topk(torch.randn(5000, 4), 2)
print(sorted(runtimes() - before))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"
