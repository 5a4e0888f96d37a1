"""Whether a state fits before anything is loaded from it, and modules without what wraps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

COMPILED = "_orig_mod."  # what torch.compile puts into the names of a module's tensors


def require(what: str, state, names: Iterable[str]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"{what}: the state must be a dict, got {type(state).__name__}")
    if lacking := [name for name in names if name not in state]:
        raise ValueError(f"{what}: the state must have {', '.join(map(repr, lacking))}")


def bare(module: nn.Module) -> nn.Module:
    """The module itself, where torch.compile or data parallelism wraps it."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        else:
            return module


def plain_names(tensors: Mapping) -> dict:
    """A state dict as if no part of its module were compiled."""
    return {name.replace(COMPILED, ""): value for name, value in tensors.items()}


def fitted(what: str, module: nn.Module, tensors, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors by the names of ``module.state_dict()``; an error unless they are those (or ``names``) and have the
    shapes of them. The module and the state may be compiled or not."""
    require(what, tensors, ())
    own = module.state_dict()
    wanted = {name.replace(COMPILED, ""): name for name in (own if names is None else names)}
    given = plain_names(tensors)
    if set(given) != set(wanted):
        lacking, strange = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
        raise ValueError(f"{what}: the state lacks {lacking} and has {strange}, other than this module")
    for name, value in given.items():
        mine = own[wanted[name]]
        if isinstance(mine, Tensor) != isinstance(value, Tensor) or (
            isinstance(mine, Tensor) and mine.shape != value.shape
        ):
            shapes = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (mine, value)]
            raise ValueError(f"{what}: {name} must be {shapes[0]}, got {shapes[1]}")
    return {wanted[name]: value for name, value in given.items()}
