"""AMSS's update ratios: how much each modality says about the labels, and what part of it is updated for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.methods.rows import choose, in_order, moved, sum_over_ranks
from mmbal.methods.sharding import whole

TAU = {"rate": 1.25, "rate_unnormalised": 0.2, "mi": 0.5}  # the authors' 0.2 and 0.5; 0.2 ln 512 normalised
OFFSET = {"rate": 0.5, "rate_unnormalised": 0.5, "mi": 0.0}
Outputs = Mapping[str, tuple[Tensor, Tensor]]
Significance = str | Callable[[Outputs, Tensor], Tensor]


class Ratios:
    """Sums the statistics of batches and makes ratios of them. The arguments are those of AMSS."""

    def __init__(
        self,
        modalities: list[str],
        plus: bool,
        tau: float | None,
        significance: Significance,
        offset: float | None,
        lo: float,
        hi: float,
        bias: float,
        rho: Mapping[str, float] | None,
        ignore_index: int,
        prior: Tensor | None,
        guard: str,
        process_group,
    ):
        if callable(significance):
            if tau is None:
                raise ValueError("AMSS: tau must be given with a significance of your own: its rates have a scale too")
        else:
            choose("AMSS", "significance", significance, TAU)
            tau = TAU[significance] if tau is None else tau
            offset = OFFSET[significance] if offset is None else offset
        choose("AMSS", "guard", guard, ("clamp", "official"))
        if not 0 < tau < math.inf:
            raise ValueError(f"AMSS: tau must be finite and greater than 0, got {tau}")
        if not math.isfinite(bias) or not (offset is None or math.isfinite(offset)):
            raise ValueError(f"AMSS: bias and offset must be finite, got {bias} and {offset}")
        if not 0 <= lo <= hi <= 1 or (plus and lo == 0):
            raise ValueError(f"AMSS: 0 <= lo <= hi <= 1, with AMSS+ 0 < lo, must hold, got {lo} and {hi}")
        self.modalities, self.plus, self.significance, self.tau, self.offset = (
            modalities,
            plus,
            significance,
            tau,
            offset,
        )
        self.lo, self.hi, self.bias, self.guard = lo, hi, bias, guard
        self.ignore_index, self.process_group = ignore_index, process_group
        self.prior = None if prior is None else self._checked_prior(prior)
        self.fixed = None if rho is None else self.given(rho)
        self.rho: Tensor | None = None  # [M], of the last step
        self.rate: Tensor | None = None  # [M]
        self.seen: list[Tensor] | None = None  # sums of modal_stats, or of rates and their number
        self.last: list[Tensor] | None = None  # those that rho comes from
        self.dims: list[int] = []

    def given(self, rho: Mapping[str, float]) -> Tensor:
        """[M] of ratios that the caller gives."""
        values = [float(value) for value in in_order("AMSS", "rho", rho, self.modalities)]
        for name, value in zip(self.modalities, values, strict=True):
            if not (0 < value <= 1 or (value == 0 and not self.plus)):
                raise ValueError(f"AMSS: rho must be from 0 to 1, with AMSS+ above 0, got {value} for {name!r}")
        return torch.tensor(values, dtype=torch.float64)

    @staticmethod
    def _checked_prior(prior: Tensor) -> Tensor:
        prior = torch.as_tensor(prior, dtype=torch.float64)
        if prior.dim() != 1 or not bool((prior >= 0).all()) or not math.isclose(float(prior.sum()), 1, abs_tol=1e-6):
            raise ValueError(f"AMSS: prior must be [C] probabilities that sum to 1, got {prior}")
        return prior

    def observe(self, outputs: Outputs | None, y: Tensor | None) -> None:
        sums = self._rates(outputs, y) if callable(self.significance) else self._sums(outputs, y)
        self.seen = (
            sums if self.seen is None else [moved(a, b.device) + b for a, b in zip(self.seen, sums, strict=True)]
        )

    def _rates(self, outputs, y) -> list[Tensor]:
        rates = torch.as_tensor(self.significance(outputs, y)).detach().to(torch.float64)
        M = len(self.modalities)
        if rates.shape != (M,):
            raise ValueError(f"AMSS: significance must give rates [M] = [{M}], got {list(rates.shape)}")
        return [rates, rates.new_ones(1)]

    def _sums(self, outputs: Outputs | None, y: Tensor | None) -> list[Tensor]:
        if outputs is None or y is None:
            raise ValueError("AMSS: outputs {name: (logits, features)} and y must both be given")
        pairs = in_order("AMSS", "outputs", outputs, self.modalities)
        for name, pair in zip(self.modalities, pairs, strict=True):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"AMSS: outputs[{name!r}] must be a pair of logits [B, C] and features [B, D]")
        logits, features = ([pair[i].detach() for pair in pairs] for i in (0, 1))
        sums = list(ops.modal_stats(logits, features, y, self.ignore_index))
        dims = [z.shape[1] for z in features]
        if self.seen is not None and (dims != self.dims or sums[2].shape != self.seen[2].shape):
            raise ValueError("AMSS: outputs must have as many classes and columns in every batch of a step")
        if self.prior is not None and self.prior.shape != sums[2].shape:
            raise ValueError(f"AMSS: prior must be [C] = [{sums[2].shape[0]}], got {list(self.prior.shape)}")
        self.dims = dims
        return sums

    def next(self, rho: Mapping[str, float] | None) -> Tensor:
        """[M] of this step; also of the steps that follow without statistics."""
        if rho is not None:
            self.rho, self.seen = self.given(rho), None
        elif self.fixed is not None:
            self.rho, self.seen = self.fixed, None
        elif self.seen is not None:
            self.last, self.seen = sum_over_ranks(self.process_group, self.seen), None
            self.rate, self.rho = self._of_sums(self.last)
        if self.rho is None:
            raise RuntimeError("AMSS: there are no ratios yet: give step outputs and y, or rho, or call observe before")
        return self.rho

    def on(self, device: torch.device) -> Tensor:
        """[M] of this step where the gradients are."""
        here = moved(self.rho, device)
        if self.rho is self.fixed:
            self.fixed = here  # goes there once
        self.rho = here
        return here

    def _of_sums(self, sums: list[Tensor]) -> tuple[Tensor, Tensor]:
        if callable(self.significance):
            rate = sums[0] / sums[1]
            return rate, ops.ratio_of_rates(rate, self.tau, self.lo, self.hi, self.bias)
        ce, entropy, histogram, rows = sums
        if self.prior is not None:
            self.prior = moved(self.prior, rows.device)
            histogram = self.prior * rows
        bounds = self.tau, self.offset, self.lo, self.hi
        return ops.update_ratio(
            ce, entropy, histogram, rows, self.dims, *bounds, self.significance, self.bias, guard=self.guard
        )

    def named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.modalities, values.tolist(), strict=True))

    def stats(self) -> dict:
        found: dict = {} if self.rho is None else {"rho": self.named(self.rho)}
        if self.rate is not None:
            found["rate"] = self.named(self.rate)
        if self.last is not None and not callable(self.significance):
            ce, entropy, histogram, rows = self.last
            p = histogram / rows if self.prior is None else self.prior
            largest = torch.tensor([math.log(D) if D > 1 else math.nan for D in self.dims], dtype=torch.float64)
            found["cross_entropy"] = self.named(ce / rows)
            found["feature_entropy"] = self.named((entropy.cpu() / float(rows) / largest).nan_to_num(1.0))
            found["label_entropy"] = float(torch.special.entr(p).sum())
            found["rows"] = int(rows)
        return found

    def state_dict(self) -> dict:
        return {
            "rho": None if self.rho is None else self.rho.clone(),
            "observed": None if self.seen is None else [t.clone() for t in self.seen],
            "dims": list(self.dims),
        }

    def load_state_dict(self, state: Mapping) -> None:
        rho = state["rho"]
        if rho is not None and rho.shape != (len(self.modalities),):
            raise ValueError(f"AMSS: state is of {rho.shape[0]} modalities, this has {len(self.modalities)}")
        self.rho = None if rho is None else rho.clone()
        self.rate = self.last = None
        self.seen = None if state["observed"] is None else [t.clone() for t in state["observed"]]
        self.dims = list(state["dims"])


class ConcatHead:
    """A linear head on the concatenated features of encoders: logits of each modality alone, W_m z_m + b / M."""

    def __init__(self, encoders: Mapping[str, nn.Module], head: nn.Linear, slices: Mapping[str, slice] | None):
        if not isinstance(head, nn.Linear):
            raise ValueError(f"AMSS: head must be a torch.nn.Linear, got {type(head).__name__}")
        for name, encoder in encoders.items():
            if not isinstance(encoder, nn.Module):
                raise ValueError(f"AMSS: encoders[{name!r}] must be a module, got {type(encoder).__name__}")
        self.modalities, self.head = list(encoders), head
        self.columns = None if slices is None else self._columns(slices)
        self._features: dict[str, Tensor] = {}
        for name, encoder in encoders.items():
            encoder.register_forward_hook(partial(self._keep, name))  # copied and pickled with the encoder

    def _columns(self, slices: Mapping[str, slice] | Sequence[slice]) -> list[tuple[int, int]]:
        """First column and number of columns of each modality."""
        found = []
        for name, columns in zip(self.modalities, in_order("AMSS", "slices", slices, self.modalities), strict=True):
            first, end, step = columns.indices(self.head.in_features)
            if step != 1 or end <= first:
                raise ValueError(f"AMSS: slices[{name!r}] must be columns side by side, got {columns}")
            found.append((first, end - first))
        ordered = sorted(found)
        if any(a + width > b for (a, width), (b, _) in pairwise(ordered)):
            raise ValueError(f"AMSS: slices must not share columns of the head, got {slices}")
        return found

    def _keep(self, name: str, module, inputs, output) -> None:
        if module.training:
            self._features[name] = output.detach() if isinstance(output, Tensor) else output

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_features": {}}

    def outputs(self) -> Outputs:
        """Of the last forward pass in training mode, once."""
        features = []
        for name in self.modalities:
            if name not in self._features:
                raise RuntimeError(f"AMSS: encoder {name!r} has not run in training mode since the last observe")
            z = self._features[name]
            if not isinstance(z, Tensor) or z.dim() != 2:
                got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"AMSS: encoder {name!r} must give features [B, D], got {got}: give outputs yourself")
            features.append(z)
        self._features = {}
        widths = [z.shape[1] for z in features]
        columns = self.columns or [(sum(widths[:m]), width) for m, width in enumerate(widths)]
        if [width for _, width in columns] != widths or (self.columns is None and sum(widths) != self.head.in_features):
            raise ValueError(
                f"AMSS: head takes {self.head.in_features} features"
                + ("" if self.columns is None else f", of the modalities {[width for _, width in columns]}")
                + f"; the encoders give {widths}"
            )
        M, head = len(features), whole(self.head.weight)
        bias = None if self.head.bias is None else whole(self.head.bias)
        outputs = {}
        for name, z, (first, width) in zip(self.modalities, features, columns, strict=True):
            weight = head[:, first : first + width]
            outputs[name] = F.linear(z, weight.to(z.dtype), None if bias is None else (bias / M).to(z.dtype)), z
        return outputs
