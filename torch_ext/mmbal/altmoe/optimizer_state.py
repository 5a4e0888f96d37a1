"""What an optimizer must not mix or move: moments of different tasks, experts that had no rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmbal.altmoe.state import require
from mmbal.moe import Experts

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # those of a parameter's shape


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def experts_of(models: Iterable[nn.Module]) -> list[Experts]:
    return [module for model in models for module in model.modules() if isinstance(module, Experts)]


class MomentsByTask:
    """The optimizer's state of each task apart: momentum and second moments of one task never see another's gradients.
    As many copies of the state as there are tasks that use a parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._kept: dict[Any, dict[nn.Parameter, dict]] = {}

    @contextmanager
    def of(self, task: Any):
        """Within the block the optimizer has the task's state."""
        state, kept = self.optimizer.state, self._kept.setdefault(task, {})
        for p, own in kept.items():
            if any(isinstance(v, Tensor) and v.dim() and v.shape != p.shape for v in own.values()):
                raise RuntimeError(
                    "MomentsByTask: a parameter has grown since its moments were kept: make a new trainer, which "
                    "begins without moments"
                )
        state.clear()
        state.update(kept)
        try:
            yield
        finally:
            self._kept[task] = dict(state)
            state.clear()

    def state_dict(self, tasks: list) -> list[dict]:
        """For each task {number of the parameter: its state}."""
        numbers = {p: i for i, p in enumerate(parameters_of(self.optimizer))}
        return [{numbers[p]: dict(own) for p, own in self._kept.get(task, {}).items()} for task in tasks]

    def check_state(self, tasks: list, states: list[dict]) -> None:
        if not isinstance(states, list) or len(states) != len(tasks):
            raise ValueError(f"load_state_dict: moments must be a list of those of {len(tasks)} tasks")
        groups = self.optimizer.state_dict()["param_groups"]
        for state in states:
            check_optimizer_state("moments", self.optimizer, {"state": state, "param_groups": groups})

    def load_state_dict(self, tasks: list, states: list[dict]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        self._kept = {}
        for task, state in zip(tasks, states, strict=True):  # the optimizer knows what goes to which device and dtype
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self._kept[task] = dict(self.optimizer.state)
        self.optimizer.state.clear()


def check_optimizer_state(what: str, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Whether the optimizer can load it: groups, and moments of the shapes of its parameters."""
    require(f"load_state_dict: {what}", state, ("state", "param_groups"))
    sizes, own = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if sizes != own:
        raise ValueError(f"load_state_dict: {what} must have groups of {own} parameters, got {sizes}")
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, parameters_of(optimizer), strict=True))
    if not isinstance(state["state"], Mapping) or set(state["state"]) - set(parameters):
        raise ValueError(f"load_state_dict: {what} must have a state of these {len(parameters)} parameters alone")
    for number, moments in state["state"].items():
        shape = parameters[number].shape
        for name, value in moments.items():
            if name in MOMENTS and isinstance(value, Tensor) and value.shape != shape:
                got = list(value.shape)
                raise ValueError(
                    f"load_state_dict: {what} must have {name} {list(shape)} of parameter {number}, got {got}"
                )


@contextmanager
def idle_experts_untouched(every: Iterable[Experts], optimizer: torch.optim.Optimizer):
    """Around ``optimizer.step()``: experts without a row in this step keep weights and moments bit for bit. Their
    gradient is zero, not None, as they share tensors with the others; stale momentum and decay would move them.

    An expert is idle if the gradients of its biases (of its weights, where biases have none) are all zero. Counts of
    steps go on for all. Optimizers must have moments of the shape of a parameter.
    """
    trained = set(parameters_of(optimizer))
    saved = []
    for experts in every:
        idle = _idle(experts)
        if idle is None or not idle.any():
            continue
        rows = idle.nonzero().flatten()
        for p in experts.parameters():
            if p in trained and p.grad is not None:
                saved.append((p, rows, _rows(p, optimizer.state.get(p, {}), rows)))
    yield
    with torch.no_grad():
        for p, rows, before in saved:
            for name, tensor in _of_shape(p, optimizer.state.get(p, {})).items():
                tensor[rows] = before.get(name, 0)  # a moment that is new begins at zero


def _idle(experts: Experts) -> Tensor | None:
    gradients = [p.grad for p in (experts.b1, experts.b2) if p is not None and p.grad is not None]
    gradients = gradients or [p.grad for p in (experts.w1, experts.w2) if p.grad is not None]
    if not gradients:
        return None
    return torch.stack([(g == 0).flatten(1).all(1) for g in gradients]).all(0)


def _of_shape(p: nn.Parameter, state: dict) -> dict[str, Tensor]:
    moments = {name: v for name, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}
    return {"": p.data} | moments


def _rows(p: nn.Parameter, state: dict, rows: Tensor) -> dict[str, Tensor]:
    return {name: tensor[rows].clone() for name, tensor in _of_shape(p, state).items()}
