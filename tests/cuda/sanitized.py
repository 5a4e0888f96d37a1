"""What compute-sanitizer watches: every operator forward and backward on small inputs. No test: results are ignored.

sanitized.py [all]   all: with products that torch makes. Only memcheck can watch those calls: its kernels are not
instrumented (and die of racecheck), so that initcheck takes what they wrote for memory that nobody wrote: zeros and
sums in second derivatives, too.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "torch_ext"))

import families

import mmbal  # noqa: F401

torch_products = "all" in sys.argv[1:]
for family in families.FAMILIES:
    for case in [*families.of(family, "small"), *families.of(family, "watched", torch_products)]:
        case.twice &= torch_products
        case.results("cuda")
    torch.cuda.synchronize()
    print("ran", family, flush=True)
