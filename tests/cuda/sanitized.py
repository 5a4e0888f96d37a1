"""What compute-sanitizer watches: every operator forward and backward on small inputs. No test: results are ignored."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "torch_ext"))

from cases import dispatch, experts, small_cases

import mmbal  # noqa: F401

for case in [*small_cases(), dispatch(700, E=7), experts(40, torch.float32, D=17, F=33), experts(40, torch.bfloat16)]:
    case.results("cuda")
torch.cuda.synchronize()
print("all operators ran")
