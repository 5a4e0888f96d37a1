"""Every operator x {cpu, cuda, fake, autograd, opcheck, gradcheck}. The first four are read from the dispatcher's
registrations; torch.library.opcheck and gradcheck run here, on calls that the cases of tests/cuda/families make: on the
GPU where there is one, else on the CPU. The exit status is 1 where there is a hole.

registrations.py [--cuda-library FILE] [--stand-in FILE]   where torch has no CUDA: what to load beside it

autograd: "yes", or what a caller meets where nothing is to be derived: "constant" (results require no gradient), "in
place" (what requires grad is refused), "raises" (an error in backward), "once" (a gradient's own operator, which
raises: its finite differences are those of its forward).
"""

import argparse
import ctypes
import sys
from pathlib import Path

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
from mmbal._library import refused_on_cuda, without_derivative  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "torch_ext"))  # the oracles
import families  # noqa: E402

COLUMNS = ("cpu", "cuda", "fake", "autograd", "opcheck", "gradcheck")
device = "cuda" if torch.cuda.is_available() else "cpu"
HOLE = "HOLE"


def kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def composites():
    return {n.removeprefix("mmbal::") for n in operators() if kernel(n, "CompositeImplicitAutograd")}


def operators():
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmbal::"))


def failure(check, *arguments, **options):
    """What a check says, in a line; None where it passes."""
    try:
        check(*arguments, **options)
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return None


def opchecked():
    """operator -> None, or what failed: of the first call that a plain case makes of it."""
    found = {}
    for case in families.of_all("plain", 9, torch.float32):
        for operator, (args, keywords) in case.calls(device).items():
            name = operator._opname
            if name in found:
                continue
            if name not in without_derivative:
                for t in torch.utils._pytree.tree_leaves(args):
                    if isinstance(t, torch.Tensor) and t.is_floating_point():
                        t.requires_grad_()
            found[name] = failure(torch.library.opcheck, operator, args, keywords)
    return found


def gradchecked():
    """operator -> None, or what failed, of those that take part in finite differences of the small cases."""
    found = {}
    for case in families.of_all("small"):
        tensors, others = case.arguments(device)

        def outputs(*given, case=case, others=others):
            return tuple(o for o in case.outputs(given, others) if o.requires_grad)

        problem = failure(torch.autograd.gradcheck, outputs, tensors)
        if case.twice and not problem:
            problem = failure(torch.autograd.gradgradcheck, outputs, tensors)
        for operator in case.calls(device):
            found[operator._opname] = problem or found.get(operator._opname)
    return found


def rows():
    of_opcheck, of_gradcheck, composite_names = opchecked(), gradchecked(), composites()

    def outcome(checks, name):
        return HOLE if name not in checks else "failed" if checks[name] else "yes"

    for full_name in operators():
        name = full_name.removeprefix("mmbal::")
        if name in composite_names:  # made of operators that have rows of their own
            yield {"operator": name, **dict.fromkeys(COLUMNS, "composite")}
            continue
        fake = torch._library.simple_registry.singleton.find(full_name).fake_impl.kernel is not None
        derived = kernel(full_name, "Autograd") or kernel(full_name, "AutogradCPU")
        derivative = without_derivative.get(name, "yes")
        yield {
            "operator": name,
            "cpu": "yes" if kernel(full_name, "CPU") else HOLE,
            "cuda": "yes" if kernel(full_name, "CUDA") and full_name not in refused_on_cuda else HOLE,
            "fake": "yes" if fake else HOLE,
            "autograd": derivative if derived else HOLE,
            "opcheck": outcome(of_opcheck, name),
            "gradcheck": "-" if derivative not in ("yes", "once") else outcome(of_gradcheck, name),
        }
        for problem in (of_opcheck.get(name), of_gradcheck.get(name)):
            if problem:
                print(f"{name}: {problem}")


table = list(rows())
print(f"{'operator':36} " + " ".join(f"{column:>9}" for column in COLUMNS))
for row in table:
    print(f"{row['operator']:36} " + " ".join(f"{row[column]:>9}" for column in COLUMNS))
incomplete = [row["operator"] for row in table if {HOLE, "failed"} & set(row.values())]
print(f"{len(table) - len(incomplete)} of {len(table)} operators without a hole", end="")
print(f"; holes: {', '.join(incomplete)}" if incomplete else "")
sys.exit(bool(incomplete))
