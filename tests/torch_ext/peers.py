"""Packages that some tests compare with and that cannot be among the dependencies of all tests."""

import sys
from pathlib import Path

import pytest
import torch

OPEN_CLIP = Path(sys.prefix) / "open_clip"  # where the Makefile puts it
TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_open_clip():
    """open_clip; where it is not installed the test, or the module of tests, is skipped.

    It imports torchvision, whose wheels are for torch with CUDA: beside a torch without, its binary does not load and
    its import fails for want of two operators. They are declared here, which is enough: open_clip calls neither.
    """
    if OPEN_CLIP.is_dir() and str(OPEN_CLIP) not in sys.path:
        sys.path.append(str(OPEN_CLIP))
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in TORCHVISION_OPERATORS:
            library.define(schema)
        import_open_clip.library = library  # what it declares is gone when it is
    return pytest.importorskip("open_clip")
