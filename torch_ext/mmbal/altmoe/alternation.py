"""Alternating gradient descent over tasks: each optimizer step is of one task (AGD, arXiv 2409.05929v6, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal.altmoe.gather import every
from mmbal.altmoe.optimizer_state import MomentsByTask, experts_of, idle_experts_untouched, parameters_of
from mmbal.altmoe.schedule import DirectionSchedule
from mmbal.methods.rows import choose, ranks

HALF = (torch.bfloat16, torch.float16)


class StepInfo(NamedTuple):
    """What one step did; tensors are on the device, without a gradient."""

    direction: Any  # or task
    loss: Tensor | None  # None where the batch had no rows
    reg: Tensor | None
    cl: Tensor | None
    grad_norm: Tensor | None  # before clipping; None unless the optimizer stepped
    stepped: bool  # whether the optimizer stepped


class Alternation:
    """One call, one batch, one task; see :func:`alternate`, which makes it."""

    def __init__(
        self,
        tasks: Mapping[Any, Callable[[Any], Any]],
        optimizer: torch.optim.Optimizer,
        schedule: DirectionSchedule | None = None,
        *,
        accumulate: int = 1,
        clip: float | None = None,
        amp: torch.dtype | None = None,
        state: str = "shared",
        idle_experts: str = "keep",
        models: Iterable[nn.Module] = (),
        lr_scheduler=None,
        group=None,
        rows_of: Callable[[Any, Any], tuple[int, Any]] | None = None,
    ):
        self.tasks = dict(tasks)
        self.schedule = schedule or DirectionSchedule.cycle(list(self.tasks))
        if unknown := [task for task in self.schedule.directions if task not in self.tasks]:
            raise ValueError(f"alternate: schedule must have tasks among {list(self.tasks)}, got {unknown}")
        choose("alternate", "state", state, ("shared", "per_direction"))
        choose("alternate", "idle_experts", idle_experts, ("keep", "move"))
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"alternate: accumulate must be an integer of at least 1, got {accumulate!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"alternate: clip must be greater than 0 or None, got {clip}")
        if amp is not None and amp not in HALF:
            raise ValueError(f"alternate: amp must be torch.bfloat16, torch.float16 or None, got {amp}")
        if state == "per_direction" and optimizer.state:
            raise ValueError("alternate: state='per_direction' needs an optimizer that has not stepped yet")
        self.optimizer, self.accumulate, self.clip, self.amp = optimizer, accumulate, clip, amp
        self.lr_scheduler, self.group, self.experts = lr_scheduler, group, experts_of(models)
        self.moments = MomentsByTask(optimizer) if state == "per_direction" else None
        self.idle_experts = idle_experts
        device = parameters_of(optimizer)[0].device.type
        self.scaler = torch.amp.GradScaler(device) if amp == torch.float16 else None
        self._device_type = device
        self._rows_of = rows_of or (lambda task, batch: (1, batch))
        self.batches = 0  # batches that were taken
        self._micro, self._task = 0, None  # of the window that is open

    def __call__(self, batch) -> StepInfo:
        """Takes one batch: backward of the scheduled task's loss, and at the end of a window the optimizer's step."""
        if self._micro == 0:
            self._task = self.schedule.next(self.group)
            self.optimizer.zero_grad(set_to_none=True)
        task, last = self._task, self._micro == self.accumulate - 1
        self.batches += 1
        rows, batch = self._rows_of(task, batch)
        loss = reg = cl = None
        if int(every(self.group, [rows]).min()) > 0:  # one without rows would leave the others waiting
            amp = torch.autocast(self._device_type, self.amp) if self.amp else nullcontext()
            with amp:
                given = self.tasks[task](batch)
            loss, reg, cl = given if isinstance(given, tuple) else (given, None, None)
            share = loss / self.accumulate if self.accumulate > 1 else loss
            (share if self.scaler is None else self.scaler.scale(share)).backward()
            loss, reg, cl = (None if t is None else t.detach() for t in (loss, reg, cl))
        norm = None
        if last:
            norm = self._step(task)
        self._micro = 0 if last else self._micro + 1
        return StepInfo(task, loss, reg, cl, norm, norm is not None)

    def _step(self, task) -> Tensor | None:
        trained = [p for p in parameters_of(self.optimizer) if p.grad is not None]
        if not trained:
            return None
        average_gradients(trained, self.group)
        with self.moments.of(task) if self.moments else nullcontext():
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            if self.clip is None:
                norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            else:
                norm = torch.nn.utils.clip_grad_norm_(trained, self.clip)
            keep = self.idle_experts == "keep"
            with idle_experts_untouched(self.experts, self.optimizer) if keep else nullcontext():
                if self.scaler is None:
                    self.optimizer.step()
                else:
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return norm.detach()

    def state_dict(self) -> dict:
        """Of optimizer, schedule and counters; gradients of an open window are not in it."""
        if self._micro:
            raise RuntimeError(f"state_dict: a window of {self.accumulate} batches is open: save after its last one")
        tasks = self.schedule.directions
        return {
            "optimizer": self.optimizer.state_dict(),
            "moments": None if self.moments is None else self.moments.state_dict(tasks),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "batches": self.batches,
        }

    def load_state_dict(self, state: Mapping) -> None:
        for name, own in (("moments", self.moments), ("scaler", self.scaler), ("lr_scheduler", self.lr_scheduler)):
            if (state[name] is None) != (own is None):
                has = "has none" if state[name] is None else "has one"
                raise ValueError(f"load_state_dict: the state {has} of {name}, other than this object")
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.moments is not None:
            self.moments.load_state_dict(self.schedule.directions, state["moments"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.batches, self._micro = state["batches"], 0


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter], group) -> None:
    """Means over the ranks, one exchange for each dtype. What DistributedDataParallel has averaged stays as it is."""
    count = ranks(group)
    if count == 1:
        return
    for dtype in sorted({p.grad.dtype for p in parameters}, key=str):
        gradients = [p.grad for p in parameters if p.grad.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat, group=group)
        flat /= count
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view_as(g))


def alternate(
    tasks: Mapping[Any, Callable[[Any], Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: DirectionSchedule | None = None,
    **options,
) -> Alternation:
    """Alternating gradient descent for any model of several tasks.

        step = mmbal.alternate({"depth": depth_loss, "normals": normals_loss}, optimizer)
        for batch in loader:
            info = step(batch)

    Each optimizer step is of one task alone. Parameters that it does not use have gradients None, so that no weight
    decay and no momentum moves them.

    Parameters
    ----------
    tasks : for each a function of a batch that gives its loss (or a tuple: loss and two numbers for the log).
    optimizer : of all parameters. schedule : a :class:`DirectionSchedule` of the tasks; without, each in turn.
    accumulate : batches of one task for each step; their losses are averaged. A window never mixes tasks.
    clip : largest norm of the gradient. amp : dtype of autocast; float16 with a GradScaler.
    state : "shared", one set of moments, or "per_direction", one for each task: moments then know nothing of the
        gradients of other tasks.
    idle_experts : "keep": experts of ``models`` (:class:`mmbal.MoEMLP`, :class:`mmbal.MoEConnector`) that no token
        chose in a step stay as they are, with their moments; "move": the optimizer does with them what it does at a
        gradient of zero.
    lr_scheduler : stepped with the optimizer.
    group : of ranks that train one model; None: all, where torch.distributed is initialised. Gradients are averaged
        over them here: the model needs no DistributedDataParallel (and may have it).
    """
    return Alternation(tasks, optimizer, schedule, **options)
