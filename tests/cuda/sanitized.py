"""What compute-sanitizer watches: every operator forward and backward on small inputs. No test: results are ignored.

sanitized.py [all]   all: with products that torch makes. Only memcheck can watch those calls: its kernels are not
instrumented (and die of racecheck), so that initcheck takes what they wrote for memory that nobody wrote.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "torch_ext"))

from cases import dispatch, experts, family_of, small_cases

import mmbal  # noqa: F401

found = [*small_cases(), dispatch(700, E=7), experts(40, torch.float32, D=17, F=33)]
found += [experts(40, torch.float32, D=132, F=200), experts(40, torch.bfloat16, D=17, F=33, dropout=0.2)]
for width in (16, 136):  # tensor cores: one tile and several; rows of 16 bytes
    found.append(experts(70, torch.float16, D=width, F=width + 24, only=None if width == 16 else 1))
if "all" in sys.argv[1:]:
    found += [experts(40, torch.bfloat16), experts(40, torch.bfloat16, dropout=0.2, output_dropout=0.1)]
families = {}
for case in found:
    families.setdefault(family_of(case), []).append(case)
for family, members in families.items():
    for case in members:
        case.results("cuda")
    torch.cuda.synchronize()
    print("ran", family, flush=True)
