"""The random numbers that a run goes on with: torch's (of every device), numpy's and Python's generators."""

from __future__ import annotations

import random

import numpy as np
import torch

from mmbal.altmoe.state import require


def random_state() -> dict:
    """Numbers and tensors alone, so that ``torch.load(weights_only=True)`` takes them."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def check_random_state(state: dict) -> None:
    """An error unless :func:`set_random_state` takes it; changes nothing."""
    require("random state", state, ("torch", "cuda", "numpy", "python"))
    try:
        torch.Generator().set_state(state["torch"])
        name, keys, *rest = state["numpy"]
        np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *rest))
        version, internal, gauss_next = state["python"]
        random.Random().setstate((version, tuple(internal), gauss_next))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"random state: not one of torch, numpy and Python: {error}") from None


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
