"""Trains a connector direction by direction, evaluates it in all of them, and goes on where it was stopped."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmbal.altmoe.alternation import Alternation, StepInfo
from mmbal.altmoe.loss import AlignLoss
from mmbal.altmoe.optimizer_state import parameters_of
from mmbal.altmoe.parts import Direction, Head, as_sources
from mmbal.altmoe.random_state import check_random_state, random_state, set_random_state
from mmbal.altmoe.retrieval import check_ks, recalls
from mmbal.altmoe.sampler import ResumableBatchSampler
from mmbal.altmoe.schedule import DirectionSchedule
from mmbal.altmoe.state import bare, fitted, plain_names, require
from mmbal.files import replace_file
from mmbal.methods.rows import rank_of, ranks
from mmbal.moe import router_losses

FORMAT_VERSION = 1
Entry = Tensor | tuple[Tensor, Tensor | None]
Batch = Mapping[str, Entry]


class AlternatingTrainer:
    """Each step trains one direction of a connector on a batch of paired items.

        trainer = mmbal.AlternatingTrainer(connector, optimizer, schedule, sampler=sampler)
        for batch in loader:  # {"image": [B, T, 1024], "text": (tokens [B, T, 4096], mask [B, T])}
            info = trainer.step(batch)
        trainer.flush()  # where accumulate > 1 may leave batches over
        print(trainer.evaluate(validation))
        trainer.save("checkpoint.pt")

    After ``connector.add_modality`` call :meth:`set_schedule`: until then the directions are the old ones.

    Parameters
    ----------
    connector : a :class:`mmbal.MoEConnector`, or a module with ``directions``, ``forward(x, src, tgt, mask)`` and
        ``target(y, tgt, mask, detach)`` like it.
    optimizer : of all that is to be trained. schedule : a :class:`mmbal.DirectionSchedule`; each in turn unless given.
    loss : called with the two outputs and ``group_ids``; a :class:`mmbal.AlignLoss` unless given.
    weights : factor of the loss, a number or a dict by direction.
    encoders : for some modalities a module that turns what a batch has of it into features [B, T, d] or [B, d].
    clip : largest norm of the gradient, None: no limit.
    state : "shared" or "per_direction" moments of the optimizer. The latter do not survive ``connector.add_experts``: a
        new trainer is needed then, and begins without.
    amp : torch.bfloat16 or torch.float16 (with a GradScaler) for autocast, in evaluations too.
    group : of ranks that train one connector; gradients are averaged over them here.
    accumulate : batches of one direction for each step of the optimizer, see :meth:`flush`.
    detach_target : no gradient flows into target features, and target encoders run without one. False is published.
    load_balance : coefficient of the gate's load-balance loss, averaged over the branches (0 is published);
        of each process by itself, not of the joined batch.
    idle_experts : "keep" or "move" experts without a row in a step, see :func:`mmbal.alternate`.
    lr_scheduler : stepped with the optimizer, where that steps.
    skip_nonfinite : leaves out a step whose gradient is not finite; without, NaN goes into all weights it touches.
    sampler : a :class:`mmbal.ResumableBatchSampler` whose position moves with each step and is saved.
    """

    def __init__(
        self,
        connector: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: DirectionSchedule | None = None,
        loss: Callable | None = None,
        weights: float | Mapping[Direction, float] = 1.0,
        encoders: Mapping[str, nn.Module] | None = None,
        clip: float | None = 1.0,
        state: str = "shared",
        amp: torch.dtype | None = None,
        group=None,
        *,
        accumulate: int = 1,
        detach_target: bool = True,
        load_balance: float = 0.0,
        idle_experts: str = "keep",
        lr_scheduler=None,
        sampler: ResumableBatchSampler | None = None,
        skip_nonfinite: bool = False,
    ):
        self.connector, self.loss = connector, loss if loss is not None else AlignLoss()
        self.encoders = dict(encoders or {})
        self.detach_target, self.load_balance, self.group, self.sampler = detach_target, load_balance, group, sampler
        schedule = schedule or DirectionSchedule.cycle(connector.directions)
        self.weights = weights
        trained = {id(p) for p in parameters_of(optimizer)}
        for name, encoder in self.encoders.items():
            if any(p.requires_grad and id(p) not in trained for p in encoder.parameters()):
                warnings.warn(
                    f"AlternatingTrainer: optimizer lacks trainable parameters of encoder {name!r}: they get gradients "
                    "and stay as they are; give them to it, or encoder.requires_grad_(False)",
                    stacklevel=2,
                )
        self._alternation = Alternation(
            self._tasks(schedule),
            optimizer,
            schedule,
            accumulate=accumulate,
            clip=clip,
            amp=amp,
            state=state,
            idle_experts=idle_experts,
            models=[connector, *self.encoders.values()],
            lr_scheduler=lr_scheduler,
            group=group,
            skip_nonfinite=skip_nonfinite,
            rows_of=self._rows_of,
        )

    def _tasks(self, schedule: DirectionSchedule) -> dict[Direction, Callable]:
        if unknown := [d for d in schedule.directions if d not in self.connector.directions]:
            raise ValueError(f"AlternatingTrainer: schedule must have directions of the connector, got {unknown}")
        if isinstance(self.weights, Mapping) and (lacking := [d for d in schedule.directions if d not in self.weights]):
            raise ValueError(f"AlternatingTrainer: weights must have every direction, got none of {lacking}")
        return {direction: partial(self._loss, direction) for direction in schedule.directions}

    def set_schedule(self, schedule: DirectionSchedule | None = None) -> None:
        """Goes on with another schedule, or each direction of the connector in turn: after ``add_modality``, whose
        parameters the optimizer must be given too. Moments and counts of steps stay."""
        if self.window_open:
            raise RuntimeError("set_schedule: a window of batches is open: call flush() before")
        schedule = schedule or DirectionSchedule.cycle(self.connector.directions)
        self._alternation.tasks = self._tasks(schedule)
        self._alternation.schedule = schedule

    @property
    def schedule(self) -> DirectionSchedule:
        return self._alternation.schedule

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._alternation.optimizer

    @property
    def steps(self) -> int:
        """Batches that were taken."""
        return self._alternation.batches

    @property
    def window_open(self) -> bool:
        """Whether batches have been taken that the optimizer has not stepped with yet (``accumulate``)."""
        return self._alternation.window_open

    def flush(self) -> StepInfo | None:
        """Ends an open window early, with the mean over the batches that it has; None if none is open. Needed before
        :meth:`save` where batches are accumulated and may be left over, as at the end of an epoch."""
        return self._alternation.flush()

    # --- A step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, group_ids: Tensor | None = None) -> StepInfo:
        """One batch in the scheduled direction.

        batch : for each modality a tensor with B rows, or (tensor, mask), mask bool [B, T], or [B] for items that lack
            the modality. Items that lack a source or the target of the direction are left out; if nothing is left on
            some rank, no rank trains (``info.loss`` is None).
        group_ids : int64 [B], items that are no negatives of each other.

        A batch that raises an error counts for nothing: the next one has the same direction.
        """
        info = self._alternation((batch, group_ids))
        if self.sampler is not None:
            self.sampler.advance()
        return info

    def _rows_of(self, direction: Direction, given) -> tuple[int, tuple[dict, Tensor | None]]:
        batch, group_ids = given
        entries = select(batch, (*as_sources(direction[0]), direction[1]), group_ids)
        return (0, (None, None)) if entries is None else entries

    def _encode(self, name: str, x: Tensor) -> Tensor:
        return self.encoders[name](x) if name in self.encoders else x

    def _loss(self, direction: Direction, given):
        (entries, group_ids), (src, tgt) = given, direction
        inputs = {name: (self._encode(name, entries[name][0]), entries[name][1]) for name in as_sources(src)}
        y, mask = entries[tgt]
        with torch.set_grad_enabled(not self.detach_target):
            y = self._encode(tgt, y)
        out = self._predict(inputs, direction)
        found = self.loss(out, self.connector.target(y, tgt, mask=mask, detach=self.detach_target), group_ids)
        weight = self.weights[direction] if isinstance(self.weights, Mapping) else self.weights
        loss = found.loss if weight == 1 else weight * found.loss
        if self.load_balance:
            loss = loss + router_losses(out.stats, load_balance=self.load_balance).total
        return loss, found.reg, found.cl

    def _predict(self, inputs: Mapping[str, tuple[Tensor, Tensor | None]], direction: Direction):
        src, tgt = direction
        if isinstance(src, str):
            x, mask = inputs[src]
        else:
            x, mask = ({name: inputs[name][part] for name in src} for part in (0, 1))
        return self.connector(x, src, tgt, mask=mask)

    # --- Evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        pairs: Batch | Iterable[Batch],
        ks: Sequence[int] = (1, 5, 10),
        group_ids: Tensor | None = None,
        directions: Sequence[Direction] | None = None,
        mix: float = 0.0,
    ) -> dict[Direction, dict[int, float]]:
        """For each direction {k: recall}: the share of items whose own target is among the k with the largest score.

        pairs : one batch or several, of paired items; all of them are the candidates. group_ids int64 [all]: items of
        one id are right for each other. score: the cosine of contrastive vectors; ``mix`` is the share of the cosine of
        predicted and true features in it. NaN where no item has both, or a vector is not finite.

        The connector is put into evaluation mode meanwhile. Random numbers of this process are afterwards those from
        before, and what a connector in training mode counts as usage too.
        """
        directions = list(self.schedule.directions if directions is None else directions)
        if unknown := [d for d in directions if d not in self.connector.directions]:
            raise ValueError(f"evaluate: directions must be of the connector, got {unknown}")
        check_ks(ks)
        if not 0 <= mix <= 1:
            raise ValueError(f"evaluate: mix must be from 0 to 1, got {mix}")
        found = {direction: ([], [], []) for direction in directions}
        first = 0
        with _evaluating(self.connector, *self.encoders.values()), self._alternation.autocast():
            for batch in [pairs] if isinstance(pairs, Mapping) else pairs:
                B = len(_parts(next(iter(batch.values())))[0])
                ids = torch.arange(first, first + B) if group_ids is None else group_ids[first : first + B]
                first += B
                encoded = {name: (self._encode(name, _parts(e)[0]), _parts(e)[1]) for name, e in batch.items()}
                for direction, (queries, banks, owners) in found.items():
                    rows = select(encoded, (*as_sources(direction[0]), direction[1]), ids)
                    if rows is None:
                        continue
                    _, (entries, own) = rows
                    out = self._predict(entries, direction)
                    y, mask = entries[direction[1]]
                    target = self.connector.target(y, direction[1], mask=mask)
                    queries.append(_scored(out, mix))
                    banks.append(_scored(target, mix))
                    owners.append(own.to(out.cl.device))
        return {
            direction: recalls(torch.cat(q), torch.cat(b), ks, torch.cat(o)) if q else dict.fromkeys(ks, float("nan"))
            for direction, (q, b, o) in found.items()
        }

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that the next step depends on but the data: connector and its form, what is trained of encoders,
        optimizer, schedule, random numbers of this process, position of the sampler."""
        connector = bare(self.connector)
        return {
            "format_version": FORMAT_VERSION,
            "config": connector.config() if hasattr(connector, "config") else None,
            "connector": plain_names(connector.state_dict()),
            "encoders": {name: plain_names(_trained(bare(encoder))) for name, encoder in self.encoders.items()},
            "alternation": self._alternation.state_dict(),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
            "random": [random_state()],
        }

    def load_state_dict(self, state: Mapping) -> None:
        """A state that does not fit is refused before anything has changed."""
        connector, encoders = self._fitted(state)
        bare(self.connector).load_state_dict(connector)
        for name, tensors in encoders.items():
            bare(self.encoders[name]).load_state_dict(tensors, strict=False)
        self._alternation.load_state_dict(state["alternation"])
        random = state["random"]
        again = partial(set_random_state, random[rank_of(self.group) if len(random) > 1 else 0])
        again()
        if self.sampler is not None:
            self.sampler.load_state_dict(state["sampler"])
            if self.sampler.batches % len(self.sampler):  # in an epoch, whose loader had begun before the state was
                self.sampler.at_next_batch(again)

    def _fitted(self, state: Mapping) -> tuple[dict, dict[str, dict]]:
        """Tensors of connector and encoders, once all of the state has been checked."""
        require("load_state_dict", state, ())
        if state.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"load_state_dict: format_version must be {FORMAT_VERSION}, got {state.get('format_version')}"
            )
        require("load_state_dict", state, ("config", "connector", "encoders", "alternation", "sampler", "random"))
        if (state["sampler"] is None) != (self.sampler is None):
            raise ValueError("load_state_dict: the state must have a sampler if, and only if, this trainer has one")
        if set(state["encoders"]) != set(self.encoders):
            raise ValueError(f"load_state_dict: encoders must be {list(self.encoders)}, got {list(state['encoders'])}")
        if len(state["random"]) not in (1, ranks(self.group)):
            raise ValueError(
                f"load_state_dict: the state is of {len(state['random'])} processes, these are {ranks(self.group)}"
            )
        for random in state["random"]:
            check_random_state(random)
        connector = bare(self.connector)
        mine, given = connector.config() if hasattr(connector, "config") else {}, state["config"] or {}
        if differ := [name for name in {**mine, **given} if mine.get(name) != given.get(name)]:
            pairs = ", ".join(f"{name} {mine.get(name)}, got {given.get(name)}" for name in differ)
            raise ValueError(f"load_state_dict: the connector must be as here: {pairs}")
        tensors = fitted("load_state_dict: connector", connector, state["connector"])
        encoders = {}
        for name, encoder in self.encoders.items():
            encoder, what = bare(encoder), f"load_state_dict: encoder {name}"
            encoders[name] = fitted(what, encoder, state["encoders"][name], _trained(encoder))
        self._alternation.check_state(state["alternation"])
        if self.sampler is not None:
            self.sampler.check_state(state["sampler"])
        return tensors, encoders

    def save(self, path: str | os.PathLike) -> None:
        """Writes one file that takes its name when it is complete: whenever a run is killed, the last checkpoint is
        whole. With several processes a collective call; the first writes."""
        state = self.state_dict()
        if ranks(self.group) > 1:
            random: list = [None] * ranks(self.group)
            dist.all_gather_object(random, state["random"][0], group=self.group)
            state["random"] = random
        if rank_of(self.group) == 0:
            replace_file(Path(path), lambda file: torch.save(state, file))

    def load(self, path: str | os.PathLike) -> None:
        """Goes on from what :meth:`save` wrote, bit for bit, also from the middle of an epoch. Iterate over the loader
        anew afterwards: the sampler has moved. Random numbers that a loader's workers draw (a transform of pictures,
        say) begin anew with each iteration, and differ where that began in the middle of an epoch."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:  # what torch.load raises at a broken file is of many kinds
            raise ValueError(f"AlternatingTrainer.load: {path} cannot be read: {error!r}") from error
        try:
            self.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"AlternatingTrainer.load: {path} is of another run, or none: {error}") from error


def _parts(entry: Entry) -> tuple[Tensor, Tensor | None]:
    return (entry[0], entry[1]) if isinstance(entry, (tuple, list)) else (entry, None)


def select(batch: Batch, names: Sequence[str], group_ids: Tensor | None):
    """(rows, ({modality: (tensor, mask)}, group_ids)) of the items that have all of these modalities; None if no item
    has."""
    if any(name not in batch for name in names):
        return None
    entries = {name: _parts(batch[name]) for name in names}
    B = len(entries[names[0]][0])
    for name, (x, mask) in entries.items():
        if len(x) != B or (mask is not None and len(mask) != B):
            raise ValueError(f"batch: {name} must have {B} rows as {names[0]} has, got {len(x)}")
    if group_ids is not None and len(group_ids) != B:
        raise ValueError(f"batch: group_ids must be [{B}], got {list(group_ids.shape)}")
    there = [mask if mask.dim() == 1 else mask.any(1) for _, mask in entries.values() if mask is not None]
    entries = {name: (x, mask if mask is not None and mask.dim() > 1 else None) for name, (x, mask) in entries.items()}
    if there and not (present := torch.stack(there).all(0)).all():
        rows = present.nonzero().flatten()
        entries = {n: (x[rows], None if mask is None else mask[rows]) for n, (x, mask) in entries.items()}
        group_ids = None if group_ids is None else group_ids[rows.to(group_ids.device)]
        B = len(rows)
    return (B, (entries, group_ids)) if B else None


def _scored(out, mix: float) -> Tensor:
    """Vectors whose inner product is the score."""
    reg, cl = (t.detach() if t.dtype == torch.float64 else t.detach().float() for t in (out.reg, out.cl))
    if mix == 0:
        return cl
    return torch.cat([(1 - mix) ** 0.5 * F.normalize(cl, dim=1), mix**0.5 * F.normalize(reg, dim=1)], 1)


@contextmanager
def _evaluating(*models: nn.Module):
    training = {module: module.training for model in models for module in model.modules()}
    counts = [(head.usage, head.usage.clone()) for head in training if isinstance(head, Head) and head.training]
    random = random_state()
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for usage, before in counts:
            usage.copy_(before)
        set_random_state(random)


def _trained(encoder: nn.Module) -> dict[str, Tensor]:
    """Frozen weights are not a run's business."""
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    return {name: value for name, value in encoder.state_dict().items() if name not in frozen}
