"""AMSS and AMSS+: subnetworks of each modality are updated, the larger the weaker it is (Yang et al., TPAMI 47(6),
2025, arXiv 2404.08347)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.methods.gradients import Batch, Gradients, Managed, Predicate, collect, like
from mmbal.methods.ratios import ConcatHead, Outputs, Ratios, Significance
from mmbal.methods.rows import choose, moved
from mmbal.methods.sharding import gather_energy, local_units
from mmbal.methods.unit_spec import UnitSpec
from mmbal.units import in_place

SAMPLERS = ("bottomk", "systematic", "independent", "topk", "uniform")
IMPORTANCES = ("gn", "sqrt_gn", "gn_wn")


@dataclass
class _Undone:
    """What is left to do after the optimizer's step, for where="update"."""

    units: Batch  # parameters
    elements: Batch
    gradients: list[Tensor]  # of the elements
    unit_bases: list[Tensor]
    element_bases: list[Tensor]
    scale: Tensor | None
    rho: Tensor
    step: int
    skip: Tensor | None


class AMSS:
    """Masks gradients between ``backward`` and the optimizer's step: of every modality's parameters the part rho is
    updated, drawn by gradient energy; the weaker a modality, the larger its rho.

        amss = mmbal.AMSS({"audio": model.audio, "video": model.video})
        ...
        loss.backward()
        amss.step({"audio": (logits_a, features_a), "video": (logits_v, features_v)}, y)
        optimizer.step()

    ``logits`` [B, C] are what the head makes of one modality's features [B, D] alone; ``from_concat_head`` takes both
    by itself. Letters: M modalities, B samples, C classes, U units.

    Parameters
    ----------
    encoders : {name: module or iterable of parameters}. Managed are the parameters with two dimensions or more that
        require a gradient; biases and norms are never masked. A parameter of two modalities is refused.
    plus : False is AMSS, exactly k = ceil(rho N) of the N units of a parameter (no more than have a gradient: of an
        embedding only the rows that came up), which is biased; True is AMSS+, what is
        kept is divided by its probability to be kept, so that the masked gradient is the gradient on average. That
        makes a difference for optimizers that are linear in the gradient (SGD, momentum). **Adam divides it out
        again**: there AMSS+ is AMSS up to the scale of the second moment; see ``where``.
    tau : temperature of the softmax over the modalities; None: 1.25 for significance "rate", 0.2 for
        "rate_unnormalised", 0.5 for "mi".
    seed : of the masks, with the step and the parameter's place; torch's generator is never used. Give two AMSS
        different ones, or they draw alike.
    significance : "rate", information about the labels per normalised entropy of the features; "rate_unnormalised",
        per nat (the authors' audio-video code); "mi", information alone (their image-text code); or a function
        (outputs, y) -> rates [M], for regression, detection and other tasks than classification.
    offset : of the information, in nats; None: 0.5, for "mi" 0.
    lo, hi, bias : bounds of rho, and what is added before it is bounded.
    unit : "auto", the slices of dimension 0 (filters, rows); "element"; or {parameter: UnitSpec}, "auto" for
        the others.
    importance : "gn", a unit's gradient energy; "sqrt_gn", its root (least variance for AMSS+); "gn_wn", energy over
        that of the weights.
    ema : 0 takes the energies of this step; otherwise the share of the past in their moving average.
    lam : share of uniform sampling in AMSS+; what is kept is multiplied by max(1, 1 / (lam rho)) at most ("bottomk" has
        no bound). In float16 that may overflow.
    sampler : None, the method's own: "bottomk" (AMSS; successive sampling), "systematic" (AMSS+ on units, where exactly
        floor or ceil of rho N are kept) or "independent" (AMSS+ on elements). For comparisons "topk" and "uniform".
    where : "grad", or "update": the optimizer's step of what is not kept is undone instead (and of AMSS+ that of what
        is kept stretched), which makes AMSS+ unbiased with any optimizer, Adam too. Needs ``attach``, and a copy of the
        managed parameters in each step.
    rho : fixed ratios {name: rho} instead of statistics.
    include, exclude : functions of a parameter that say whether it is managed.
    ignore_index : label of rows that do not count.
    prior : [C] probabilities of the labels, instead of the batch's.
    guard : "clamp", information below 0 counts as 0; "official", every rho is 0.5 then.
    process_group : of ranks whose statistics are summed; None: all, where torch.distributed is initialised.

    In a training loop
    ------------------
    - Gradient accumulation: ``observe(outputs, y)`` for each micro-batch, ``step()`` once before the optimizer's.
    - AMP: after ``scaler.unscale_(optimizer)``. Before it works too, as masks do not depend on the scale, but not with
      ``ema``, whose average would be of several scales. Where any managed gradient is not finite every gradient stays
      as it is, so that the scaler skips the step; ``skipped`` counts.
    - Clipping: ``step`` before ``clip_grad_norm_`` as a rule: the norm is then that of what is applied, though clipping
      biases AMSS+. Clipping first is unbiased for the clipped gradient.
    - DDP: every rank observes its own batch; the statistics are summed, so that all draw the same masks. FSDP2: units
      that are slices of the sharded dimension 0 are served, others refused; ``step`` is a collective call, and with
      ``from_concat_head`` so is ``observe``.
      Make AMSS after ``fully_shard``, which replaces the parameters.
    - ``optimizer.step(closure)``: call ``step`` in the closure after ``backward``.
    - Gradients that are None are left alone; sparse ones too, with a warning.
    - On a GPU all is done there, in the order of its stream, and ``step`` waits for nothing; ``rho``, ``skipped`` and
      ``last_stats`` wait, as they are numbers. Give ``outputs`` from where the gradients are.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module | Iterable[nn.Parameter]],
        plus: bool = False,
        *,
        tau: float | None = None,
        seed: int = 0,
        significance: Significance = "rate",
        offset: float | None = None,
        lo: float = 0.1,
        hi: float = 0.9,
        bias: float = 0.0,
        unit: str | Mapping[nn.Parameter, UnitSpec] = "auto",
        importance: str = "gn",
        ema: float = 0.0,
        lam: float = 0.5,
        sampler: str | None = None,
        where: str = "grad",
        rho: Mapping[str, float] | None = None,
        include: Predicate | None = None,
        exclude: Predicate | None = None,
        ignore_index: int = -100,
        prior: Tensor | None = None,
        guard: str = "clamp",
        process_group=None,
    ):
        if not isinstance(encoders, Mapping) or not encoders:
            raise ValueError(f"AMSS: encoders must be a mapping of at least one modality, got {encoders!r}")
        if sampler is not None:
            choose("AMSS", "sampler", sampler, SAMPLERS)
        choose("AMSS", "importance", importance, IMPORTANCES)
        choose("AMSS", "where", where, ("grad", "update"))
        if plus and sampler == "topk":
            raise ValueError("AMSS: sampler 'topk' has no unbiased form: give plus=False")
        if not 0 <= lam <= 1 or not 0 <= ema < 1:
            raise ValueError(f"AMSS: lam must be from 0 to 1 and ema from 0 to below 1, got {lam} and {ema}")
        if int(seed) != seed or not -(2**63) <= seed < 2**63:
            raise ValueError(f"AMSS: seed must be a 64-bit integer, got {seed}")
        self.modalities = list(encoders)
        self.plus, self.seed, self.importance, self.ema, self.lam = bool(plus), int(seed), importance, ema, lam
        self.where = where
        bounds = offset, lo, hi, bias
        self._ratios = Ratios(
            self.modalities, plus, tau, significance, *bounds, rho, ignore_index, prior, guard, process_group
        )
        default = ("systematic", "independent") if plus else ("bottomk", "bottomk")
        self._unit_sampler, self._element_sampler = (sampler or default[0]), (sampler or default[1])
        self._managed = collect(encoders, unit, include, exclude)
        elements = [m for m in self._managed if m.spec.kind == "elements"]
        if elements and (sampler == "systematic" or (plus and sampler == "bottomk")):
            raise ValueError(f"AMSS: sampler {sampler!r} is for units, not for single elements")
        if elements and ema:
            raise ValueError("AMSS: ema is for units: it would keep a number for every element")
        self._units = Gradients([m for m in self._managed if m.spec.kind != "elements"])
        self._elements = Gradients(elements)
        self._head: ConcatHead | None = None
        self._steps = 0
        self._skipped = torch.zeros(1, dtype=torch.int64)
        self._energy: dict[int, Tensor] = {}  # moving averages by id
        self._undone: _Undone | None = None
        self._attached = 0
        self._warned = False

    @classmethod
    def from_concat_head(
        cls,
        encoders: Mapping[str, nn.Module],
        head: nn.Linear,
        slices: Mapping[str, slice] | None = None,
        mask_head: bool = False,
        **options,
    ) -> AMSS:
        """AMSS for a linear head on the concatenation of the encoders' features: ``step(y=y)`` and ``observe(y=y)``
        need nothing else.

        Forward hooks take the features [B, D] of each encoder in training mode; the logits of modality m alone are
        W_m z_m + b / M, with W_m its columns of the head's weight.

        slices : {name: columns}; None: one after the other in the order of encoders.
        mask_head : also masks the head's weight: for every class the D columns of each modality, at its ratio. Needs
            slices.
        """
        concat = ConcatHead(encoders, head, slices)
        if mask_head and concat.columns is None:
            raise ValueError("AMSS: mask_head needs slices")
        amss = cls(encoders, **options)
        amss._head = concat
        if mask_head and (not head.weight.requires_grad or any(m.parameter is head.weight for m in amss._managed)):
            raise ValueError("AMSS: mask_head needs a head whose weight requires a gradient and is in no encoder")
        for modality, (first, width) in enumerate(concat.columns if mask_head else []):
            managed = Managed(head.weight, modality, UnitSpec.columns(first, width), len(amss._managed))
            amss._managed.append(managed)
            amss._units.add(managed)
        return amss

    # --- In the loop -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, outputs: Outputs | None = None, y: Tensor | None = None) -> None:
        """Adds the statistics of a (micro-)batch to those that the next ``step`` uses.

        outputs : {name: (logits [B, C], features [B, D])}; left out with ``from_concat_head``.
        y : [B] int64 labels. With a significance of your own both are whatever that takes.
        """
        if outputs is None and self._head is not None:
            outputs = self._head.outputs()
        self._ratios.observe(outputs, y)

    @torch.no_grad()
    def step(
        self, outputs: Outputs | None = None, y: Tensor | None = None, *, rho: Mapping[str, float] | None = None
    ) -> None:
        """Once between ``backward`` and the optimizer's step: ratios from what was observed since the last step (and
        from ``outputs`` and ``y``, see ``observe``), or ``rho`` {name: ratio}; without either the ratios of the last
        step. Then masks the gradients in place."""
        if outputs is not None or y is not None:
            self.observe(outputs, y)
        if self.where == "update" and not self._attached:
            raise RuntimeError("AMSS: where='update' needs attach(optimizer): the step is masked after it is taken")
        rho_M = self._ratios.next(rho)
        units, elements = self._units(), self._elements()
        if not units.managed and not elements.managed and not self._warned:
            self._warned = True
            warnings.warn("AMSS: no managed parameter has a gradient: were they replaced since?", stacklevel=3)
        for tensor in (units.tensors or elements.tensors)[:1]:
            rho_M = self._ratios.on(tensor.device)
        scale, skip = self._draw(units, rho_M)
        if elements.tensors:
            skip = self._any_nonfinite(elements, skip)
        if skip is not None:
            self._skipped = moved(self._skipped, skip.device) + skip
        if self.where == "update":
            self._undone = self._remember(units, elements, scale, rho_M, skip)
        else:
            if units.tensors:
                in_place(ops.scale_units_foreach_, units.tensors, units.specs, scale, skip)
                units.write_back()
            if elements.tensors:
                self._mask_elements(elements, rho_M, self._steps, skip)
                elements.write_back()
        units.release()
        elements.release()
        self._steps += 1

    def _draw(self, units: Batch, rho_M: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the units are multiplied by, and whether a gradient is not finite [1]."""
        if not units.tensors:
            return None, None
        weights = units.weights if self.importance == "gn_wn" else None
        energy, nonfinite = ops.unit_energy_foreach(units.tensors, units.specs, weights, self.importance)
        if units.sharded:
            energy, nonfinite = gather_energy(energy, nonfinite, units.parts)
        if self.ema:
            energy = self._averaged(units, energy, nonfinite)
        scale, _ = ops.mask_units(
            energy, units.segments, rho_M, self.seed, self._steps, self._unit_sampler, self.lam, self.plus
        )
        return (local_units(scale, units.parts) if units.sharded else scale), nonfinite

    def _averaged(self, units: Batch, energy: Tensor, nonfinite: Tensor) -> Tensor:
        averages, first = [], 0
        for m, (count, shard) in zip(units.managed, units.parts, strict=True):
            count = count if shard is None else shard.total
            now = energy[first : first + count]
            before = self._energy.get(m.id, torch.full_like(now, torch.nan))  # NaN: none yet
            before = moved(before, now.device)
            fresh = torch.where(before.isnan(), now, self.ema * before + (1 - self.ema) * now)
            self._energy[m.id] = torch.where(nonfinite, before, fresh)
            averages.append(self._energy[m.id])
            first += count
        return torch.cat(averages)

    def _any_nonfinite(self, elements: Batch, skip: Tensor | None) -> Tensor:
        _, nonfinite = ops.unit_energy_foreach(elements.tensors, elements.specs)
        return nonfinite if skip is None else skip | nonfinite

    def _mask_elements(self, batch: Batch, rho_M, step, skip, gradients=None, bases=None) -> None:
        in_place(
            ops.mask_elements_foreach_,
            batch.tensors,
            batch.segments[2::4],
            batch.segments[3::4],
            rho_M,
            self.seed,
            step,
            self._element_sampler,
            self.lam,
            self.plus,
            self.importance,
            batch.weights if self.importance == "gn_wn" else None,
            skip,
            gradients,
            bases,
        )

    # --- where="update" --------------------------------------------------------------------------------------------

    def _remember(self, units: Batch, elements: Batch, scale, rho_M: Tensor, skip) -> _Undone:
        unit_parameters = self._units.batch(units.managed, [m.parameter.detach() for m in units.managed])
        parameters = self._elements.batch(elements.managed, [m.parameter.detach() for m in elements.managed])
        if unit_parameters.copies or parameters.copies:
            raise NotImplementedError("AMSS: where='update' needs parameters that fill their memory without gaps")
        gradients = [like(p, g) for p, g in zip(parameters.tensors, elements.tensors, strict=True)]
        unit_bases, bases = ([p.clone() for p in batch.tensors] for batch in (unit_parameters, parameters))
        return _Undone(unit_parameters, parameters, gradients, unit_bases, bases, scale, rho_M, self._steps, skip)

    @torch.no_grad()
    def _after_update(self, *_) -> None:
        u, self._undone = self._undone, None
        if u is None:
            return
        if u.units.tensors:
            in_place(ops.scale_units_foreach_, u.units.tensors, u.units.specs, u.scale, u.skip, u.unit_bases)
        if u.elements.tensors:
            self._mask_elements(u.elements, u.rho, u.step, u.skip, u.gradients, u.element_bases)

    def attach(self, optimizer: torch.optim.Optimizer, step: bool = True):
        """Calls ``step()`` before every step of this optimizer, so that ``observe`` is the one line in the loop;
        returns a handle with ``remove()``. step=False: only what where="update" needs, for loops in which a closure or
        a framework calls ``step`` after ``backward``. A step that a GradScaler skips does not come here: what was
        observed for it counts in the next, and ``skipped`` does not.

        To one optimizer at a time, where there are several the one that steps first: ``step`` masks what all of them
        take. where="update" needs all managed parameters in one, which moves them once in a step (not LBFGS)."""
        if self._attached:
            raise RuntimeError("AMSS: it is attached already, and would mask twice: call remove() of that handle first")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"AMSS: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self.where == "update":
            moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
            left = sum(id(m.parameter) not in moved for m in self._managed)
            if left:
                raise ValueError(f"AMSS: where='update' needs all managed parameters in it, {left} are not")
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("AMSS: where='update' needs one move of parameters in a step, got LBFGS")

        def before(_, args, kwargs) -> None:
            if any(given is not None and given is not optimizer for given in (*args, kwargs.get("closure"))):
                raise RuntimeError(
                    "AMSS: with optimizer.step(closure) call step in the closure, and attach(step=False)"
                )
            self.step()

        handles = [optimizer.register_step_pre_hook(before)] if step else []
        if self.where == "update":
            handles.append(optimizer.register_step_post_hook(self._after_update))
        self._attached += 1
        return _Attached(self, handles)

    # --- What it did -----------------------------------------------------------------------------------------------

    @property
    def rho(self) -> dict[str, float] | None:
        """The ratios of the last step; None before the first."""
        return None if self._ratios.rho is None else self._ratios.named(self._ratios.rho)

    @property
    def skipped(self) -> int:
        """Steps that left the gradients as they were, because one was not finite."""
        return int(self._skipped)

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def last_stats(self) -> dict:
        """Of the last step "rho" {name: ratio}; of the last one with statistics "rate" {name: number}, and where they
        come from labels also "cross_entropy" (nats), "feature_entropy" (of its largest value) {name: number},
        "label_entropy" and "rows"."""
        return self._ratios.stats()

    def state_dict(self) -> dict:
        """What masks and ratios depend on besides the gradients: a run that loads it goes on as if never stopped."""
        return {
            "seed": self.seed,
            "step": self._steps,
            "skipped": self._skipped.clone(),
            "energy": {id: energy.clone() for id, energy in self._energy.items()},
            **self._ratios.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"AMSS: state must have {sorted(expected)}, got {sorted(state)}")
        for id, energy in state["energy"].items():
            m = self._managed[int(id)] if int(id) < len(self._managed) else None
            units = None if m is None else math.prod(m.spec.units(m.parameter.shape))
            if energy.shape != (units,):
                raise ValueError(
                    f"AMSS: state's energy of parameter {id} must be [U] = [{units}], got {list(energy.shape)}"
                )
        self._ratios.load_state_dict(state)
        self._undone = None
        self.seed, self._steps = int(state["seed"]), int(state["step"])
        self._skipped = state["skipped"].clone()
        self._energy = {int(id): energy.clone() for id, energy in state["energy"].items()}

    def __repr__(self) -> str:
        counts = [sum(m.modality == i for m in self._managed) for i in range(len(self.modalities))]
        what = ", ".join(f"{name}: {count} tensors" for name, count in zip(self.modalities, counts, strict=True))
        return f"AMSS({what}; plus={self.plus}, sampler={self._unit_sampler!r}, where={self.where!r})"


class _Attached:
    def __init__(self, amss: AMSS, handles: list):
        self._amss, self._handles, self._removed = amss, handles, False

    def remove(self) -> None:
        """Once; again does nothing."""
        if not self._removed:
            self._amss._attached -= 1
            self._removed = True
        for handle in self._handles:
            handle.remove()
