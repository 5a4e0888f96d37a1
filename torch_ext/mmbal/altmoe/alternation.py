"""Alternating gradient descent over tasks: each optimizer step is of one task (AGD, arXiv 2409.05929v6, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal.altmoe.optimizer_state import (
    MomentsByTask,
    check_optimizer_state,
    experts_of,
    idle_experts_untouched,
    parameters_of,
)
from mmbal.altmoe.schedule import DirectionSchedule
from mmbal.altmoe.state import require
from mmbal.methods.rows import choose, every, ranks

HALF = (torch.bfloat16, torch.float16)


class StepInfo(NamedTuple):
    """What one step did; tensors are on the device, without a gradient."""

    direction: Any  # or task
    loss: Tensor | None  # None where the batch had no rows
    reg: Tensor | None
    cl: Tensor | None
    grad_norm: Tensor | None  # before clipping; None inside a window, and where no batch of it had rows
    stepped: bool  # whether the optimizer stepped: not where a gradient was not finite and the step was skipped


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
        skip_nonfinite: bool = False,
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
        if isinstance(lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "alternate: lr_scheduler must step without a metric, got ReduceLROnPlateau: step it yourself after an "
                "evaluation"
            )
        self.optimizer, self.accumulate, self.clip, self.amp = optimizer, accumulate, clip, amp
        self.lr_scheduler, self.group, self.experts = lr_scheduler, group, experts_of(models)
        if idle_experts == "keep" and self.experts and isinstance(optimizer, torch.optim.Adafactor):
            raise ValueError(
                "alternate: idle_experts='keep' needs moments for each weight, Adafactor has them for rows and columns"
                ": use idle_experts='move'"
            )
        self.skip_nonfinite = skip_nonfinite
        self.moments = MomentsByTask(optimizer) if state == "per_direction" else None
        self.idle_experts = idle_experts
        device = parameters_of(optimizer)[0].device.type
        self.scaler = torch.amp.GradScaler(device) if amp == torch.float16 else None
        self._device_type = device
        self._rows_of = rows_of or (lambda task, batch: (1, batch))
        self.batches = 0  # batches that were taken
        self._micro, self._counted, self._task = 0, 0, None  # batches of the open window, those with rows, its task

    @property
    def window_open(self) -> bool:
        """Whether batches have been taken that the optimizer has not stepped with yet (``accumulate``)."""
        return self._micro > 0

    def autocast(self):
        return torch.autocast(self._device_type, self.amp) if self.amp else nullcontext()

    def __call__(self, batch) -> StepInfo:
        """Takes one batch: backward of the scheduled task's loss, and at the end of a window the optimizer's step. A
        batch that raises an error counts for nothing: the next one is of the same task."""
        before = self.schedule.position
        task = self._task if self.window_open else self.schedule.next(self.group)
        try:
            if not self.window_open:
                self.optimizer.zero_grad(set_to_none=True)
            loss, reg, cl = self._backward(task, batch)
        except BaseException:
            self.schedule.position = before
            raise
        self.batches += 1
        self._micro, self._task = self._micro + 1, task
        self._counted += loss is not None
        if self._micro < self.accumulate:
            return StepInfo(task, loss, reg, cl, None, False)
        return StepInfo(task, loss, reg, cl, *self._step())

    def flush(self) -> StepInfo | None:
        """Ends an open window: the optimizer steps with the mean over the batches that it has. None if none is open.
        With several processes all must call it."""
        return StepInfo(self._task, None, None, None, *self._step()) if self.window_open else None

    def _backward(self, task, batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, batch = self._rows_of(task, batch)
        if int(every(self.group, [rows]).min()) == 0:  # one without rows would leave the others waiting
            return None, None, None
        with self.autocast():
            given = self.tasks[task](batch)
        loss, reg, cl = _loss_and_log(task, given)
        share = loss / self.accumulate if self.accumulate > 1 else loss
        (share if self.scaler is None else self.scaler.scale(share)).backward()
        return loss.detach(), reg, cl

    def _step(self) -> tuple[Tensor | None, bool]:
        """Ends the window: (norm of the gradient, whether the optimizer stepped)."""
        task, counted = self._task, self._counted
        self._micro, self._counted, self._task = 0, 0, None
        trained = [p for p in parameters_of(self.optimizer) if p.grad is not None]
        if not trained:
            return None, False
        if 0 < counted < self.accumulate:  # shares were 1 / accumulate
            torch._foreach_mul_([p.grad for p in trained], self.accumulate / counted)
        average_gradients(trained, self.group)
        stepped = True
        with self.moments.of(task) if self.moments else nullcontext():
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            if self.clip is None:
                norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            else:
                norm = torch.nn.utils.clip_grad_norm_(trained, self.clip)
            keep = self.idle_experts == "keep"
            with idle_experts_untouched(self.experts, self.optimizer) if keep else nullcontext():
                if self.scaler is not None:
                    scale = self.scaler.get_scale()
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    stepped = self.scaler.get_scale() >= scale  # it falls where the step was skipped
                elif self.skip_nonfinite and not norm.isfinite():
                    stepped = False
                else:
                    self.optimizer.step()
        if stepped and self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return norm.detach(), stepped

    def state_dict(self) -> dict:
        """Of optimizer, schedule and counters; gradients of an open window are not in it."""
        if self.window_open:
            raise RuntimeError(
                f"state_dict: a window of {self.accumulate} batches is open: save after its last one, or call flush() "
                "before"
            )
        tasks = self.schedule.directions
        return {
            "optimizer": self.optimizer.state_dict(),
            "moments": None if self.moments is None else self.moments.state_dict(tasks),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "batches": self.batches,
        }

    def check_state(self, state: Mapping) -> None:
        """What :meth:`load_state_dict` refuses; changes nothing."""
        require("load_state_dict", state, ("optimizer", "moments", "schedule", "scaler", "lr_scheduler", "batches"))
        for name, own in (("moments", self.moments), ("scaler", self.scaler), ("lr_scheduler", self.lr_scheduler)):
            if (state[name] is None) != (own is None):
                has = "has none" if state[name] is None else "has one"
                raise ValueError(f"load_state_dict: the state {has} of {name}, other than this object")
        for name, own in (("scaler", self.scaler), ("lr_scheduler", self.lr_scheduler)):
            if own is not None:
                require(f"load_state_dict: {name}", state[name], own.state_dict())
        if not isinstance(state["batches"], int) or state["batches"] < 0:
            raise ValueError(f"load_state_dict: batches must be a number of batches, got {state['batches']!r}")
        self.schedule.check_state(state["schedule"])
        check_optimizer_state("optimizer", self.optimizer, state["optimizer"])
        if self.moments is not None:
            self.moments.check_state(self.schedule.directions, state["moments"])

    def load_state_dict(self, state: Mapping) -> None:
        """A state that does not fit is refused before anything has changed. An open window is dropped."""
        self.check_state(state)
        self.schedule.load_state_dict(state["schedule"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.moments is not None:
            self.moments.load_state_dict(self.schedule.directions, state["moments"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.batches = state["batches"]
        self._micro, self._counted, self._task = 0, 0, None


def _loss_and_log(task, given) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a task gave, as tensors: its loss, and two numbers for the log without a gradient."""
    parts = given if isinstance(given, tuple) else (given, None, None)
    if len(parts) != 3 or not isinstance(parts[0], Tensor) or parts[0].dim():
        shown = [list(p.shape) if isinstance(p, Tensor) else p for p in parts]
        raise ValueError(
            f"alternate: task {task!r} must give a scalar loss, or a tuple of it and two numbers for the log, "
            f"got {shown}"
        )
    loss, *log = parts
    return loss, *(v if v is None else v.detach() if isinstance(v, Tensor) else loss.new_tensor(v) for v in log)


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
    accumulate : batches of one task for each step; the losses of those that had rows are averaged. A window never mixes
        tasks; ``step.flush()`` ends one early (at the end of an epoch, before a checkpoint), ``step.window_open`` says
        whether one is open.
    clip : largest norm of the gradient. amp : dtype of autocast; float16 with a GradScaler.
    state : "shared", one set of moments, or "per_direction", one for each task: moments then know nothing of the
        gradients of other tasks. A model whose parameters grow (``add_experts``) needs a new object then, and the
        moments of all tasks are lost.
    idle_experts : "keep": experts of ``models`` (:class:`mmbal.MoEMLP`, :class:`mmbal.MoEConnector`) that no token
        chose in a step stay as they are, with their moments; "move": the optimizer does with them what it does at a
        gradient of zero. The count of steps by which Adam corrects its moments is one for a whole tensor: after a long
        run, the first step of an expert that had never been chosen, or was added, is larger than that of a fresh Adam,
        by up to 1 / sqrt(1 - beta2) (32 at 0.999). Adafactor, which has no moments for single weights, is refused.
    lr_scheduler : stepped with the optimizer, where that steps.
    skip_nonfinite : leaves out a step whose gradient is not finite (as float16 does anyway); it waits for the norm.
        Without, one bad batch makes all that it touches NaN.
    group : of ranks that train one model; None: all, where torch.distributed is initialised. Gradients are averaged
        over them here: the model needs no DistributedDataParallel. It may have it, with find_unused_parameters=True:
        other tasks' parameters have no gradient.
    """
    return Alternation(tasks, optimizer, schedule, **options)
