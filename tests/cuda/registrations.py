"""Every operator x {cpu, cuda, fake, autograd}, read from the dispatcher's registrations.

registrations.py [--cuda-library FILE] [--stand-in FILE]   where torch has no CUDA: what to load beside it
"""

import argparse
import ctypes

parser = argparse.ArgumentParser()
parser.add_argument("--cuda-library")
parser.add_argument("--stand-in")
options = parser.parse_args()

import torch  # noqa: E402

if options.cuda_library and torch.version.cuda is None:
    if options.stand_in:
        ctypes.CDLL(options.stand_in, mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(options.cuda_library)  # before mmbal: it would refuse CUDA tensors where there is no kernel

import mmbal  # noqa: E402, F401
from mmbal._library import refused_on_cuda  # noqa: E402


def kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def rows():
    for name in sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mmbal::")):
        composite = kernel(name, "CompositeImplicitAutograd")
        entry = torch._library.simple_registry.singleton.find(name)
        yield {
            "operator": name.removeprefix("mmbal::"),
            "cpu": composite or kernel(name, "CPU"),
            "cuda": composite or (kernel(name, "CUDA") and name not in refused_on_cuda),
            "fake": composite or entry.fake_impl.kernel is not None,
            "autograd": composite or kernel(name, "Autograd") or kernel(name, "AutogradCPU"),
        }


table = list(rows())
print(f"{'operator':40} " + " ".join(f"{c:>9}" for c in ("cpu", "cuda", "fake", "autograd")))
for row in table:
    print(f"{row['operator']:40} " + " ".join(f"{'yes' if row[c] else '-':>9}" for c in list(row)[1:]))
for column in ("cpu", "cuda", "fake", "autograd"):
    holes = [row["operator"] for row in table if not row[column]]
    print(f"{column}: {len(table) - len(holes)} of {len(table)}" + (f"; holes: {', '.join(holes)}" if holes else ""))
