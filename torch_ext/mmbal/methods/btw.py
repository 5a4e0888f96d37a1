"""BTW: a weight for every modality of every sample (Hou et al., Findings of EMNLP 2025, arXiv 2508.18551)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.methods.rows import choose, gather_rows, in_order, mean_over_ranks, moved, ranks, same_container

TASKS = ("regression", "classification", "multilabel")
FACTORS = ("kl+mi", "kl", "mi")
JITTER = 1e-10  # of predictions that tie: what scikit-learn, and so the authors' code, adds; from a fixed seed
MOST_NEIGHBORS = 64  # MMBAL_MAX_NEIGHBORS of include/mmbal/mutual_info.h
Predictions = Mapping[str, Tensor] | Sequence[Tensor]


def _at_least_one(name: str, value) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"BTW: {name} must be an integer of at least 1, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"BTW: {name} must be finite and greater than 0, got {value}")


def _all_finite(values: Tensor) -> bool:
    """In one sweep: a finite sum has finite terms. False may be a sum too large."""
    return math.isfinite(values.sum())


class BTW(nn.Module):
    """Weights for the embeddings of each sample's modalities, from how far each modality's own prediction is from the
    fused one (KL, for every sample) and how much it says about it (mutual information, for every modality).

    A table holds the weights of the training rows, all 1 at first. ``update``, between epochs, moves the rows towards
    fresh weights: W = alpha w + (1 - alpha) W. ``apply`` multiplies embeddings by their weights, before they are fused.
    The predictions of each modality alone come from M models that were trained apart and are kept fixed: that is what
    BTW costs. No gradient flows into the weights; torch.ops.mmbal.btw_weights has one for who wants it.

    Letters: N samples, M modalities, S rows of the table, C classes or labels, K targets.

    Parameters
    ----------
    modalities : names, in the order of every [N, M] tensor.
    task : "regression" (predictions [N], or [N, K]: the KL is summed over K, the mutual information is its mean),
        "classification" (logits [N, C]) or "multilabel" (logits [N, C]: Bernoulli KLs summed over the labels, the
        mutual information their mean).
    num_samples : S, the number of training rows; None keeps no table, for weights from each batch's own predictions.
    sigma : regression only, the standard deviations of the Gaussians whose KL is taken. "residual": |target -
        prediction| of training rows, at least ``sigma_min`` (in units of the target), and fit_sigma's for other rows.
        "fitted": fit_sigma's everywhere. "head": given as log_sigma and fused_log_sigma. A number: that, everywhere.
    alpha, alpha_step : the share of fresh weights, and by how much ``step`` moves it within [0, 1]. It falls to 0, and
        the table stands still, some epochs after the metric has stopped improving (the authors' schedule); a step of 0
        keeps it.
    every : ``update`` works at its first call and then at each every-th.
    mode : "diverge", weight grows with divergence as in the authors' code: w ~ max(KL, floor) v; or "agree",
        w ~ v exp(-KL / temperature).
    mean_one : a fresh row sums to its number of present modalities, so that equal weights are 1; False: to 1, as
        published.
    factors : "kl+mi" (BTW), "kl" or "mi" alone.
    neighbors : of the estimator of mutual information (regression).
    floor, ceiling : bounds of the KL; ``floor`` of the mutual information too.
    metric_mode : "min" or "max", what is better in ``step``.
    process_group : of ranks that share one table; None: all, where torch.distributed is initialised.

    Several processes (DDP): ``update``, ``fit_sigma`` and ``step`` are collective calls. Every rank passes its own rows
    and gets those of all (a row that several ranks pass, as DistributedSampler does to pad, counts once), so all ranks
    compute the same table, bit for bit. DistributedDataParallel would send it with every forward pass too, to no use:
    ``broadcast_buffers=False`` spares that. Rows are exchanged where the table is: the group's backend must serve that
    device (gloo the CPU, NCCL a GPU). As in any collective call, an error on one rank leaves the others waiting.

    On a GPU: ``btw.to(device)`` as for any module, since ``apply`` multiplies embeddings where they are. Predictions,
    targets, masks and indices from elsewhere are moved there. ``weights`` and ``apply`` do not wait for the GPU,
    ``update``, ``fit_sigma`` and ``step`` do.
    """

    table: Tensor | None
    mean: Tensor
    mutual_info: Tensor
    sigma: Tensor
    alpha: Tensor
    best: Tensor
    updates: Tensor
    _known_sigma: tuple[Tensor | None, int] = (None, 0)  # with the version of it

    def __init__(
        self,
        modalities: Sequence[str],
        task: str = "regression",
        num_samples: int | None = None,
        *,
        sigma: str | float = "residual",
        sigma_min: float = 1e-3,
        alpha: float = 0.5,
        alpha_step: float = 0.05,
        every: int = 1,
        mode: str = "diverge",
        temperature: float = 1.0,
        mean_one: bool = True,
        factors: str = "kl+mi",
        neighbors: int = 3,
        floor: float = 1e-5,
        ceiling: float = 1e6,
        metric_mode: str = "min",
        process_group=None,
    ):
        super().__init__()
        self.modalities = list(modalities)
        if isinstance(modalities, str) or not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"BTW: modalities must be different names, at least one, got {modalities!r}")
        choose("BTW", "task", task, TASKS)
        choose("BTW", "mode", mode, ("diverge", "agree"))
        choose("BTW", "factors", factors, FACTORS)
        choose("BTW", "metric_mode", metric_mode, ("min", "max"))
        if num_samples is not None:
            _at_least_one("num_samples", num_samples)
        _at_least_one("every", every)
        _at_least_one("neighbors", neighbors)
        if neighbors > MOST_NEIGHBORS:
            raise ValueError(f"BTW: neighbors must be at most {MOST_NEIGHBORS}, got {neighbors}")
        if isinstance(sigma, str):
            choose("BTW", "sigma", sigma, ("residual", "fitted", "head"))
        else:
            _positive("sigma", sigma)
        if task == "regression" and sigma == "residual" and num_samples is None:
            raise ValueError("BTW: sigma='residual' needs num_samples: targets are taken for training rows only")
        for name, value in {"alpha": alpha, "alpha_step": alpha_step}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"BTW: {name} must be from 0 to 1, got {value}")
        for name, value in {"sigma_min": sigma_min, "temperature": temperature, "floor": floor}.items():
            _positive(name, value)
        if not floor <= ceiling < math.inf:
            raise ValueError(f"BTW: ceiling must be finite and at least floor = {floor}, got {ceiling}")
        self.task, self.num_samples, self.sigma_source, self.sigma_min = task, num_samples, sigma, sigma_min
        self.alpha_step, self.every, self.mode, self.temperature = alpha_step, every, mode, temperature
        self.mean_one, self.factors, self.neighbors = mean_one, factors, neighbors
        self.floor, self.ceiling, self.metric_mode, self.process_group = floor, ceiling, metric_mode, process_group
        M = len(self.modalities)
        self.register_buffer("table", None if num_samples is None else torch.ones(num_samples, M))
        self.register_buffer("mean", torch.ones(M))
        self.register_buffer("mutual_info", torch.full((M,), 1 / M, dtype=torch.float64))
        constant = math.nan if isinstance(sigma, str) else float(sigma)
        self.register_buffer("sigma", torch.full((M + 1,), constant, dtype=torch.float64))  # the last: fused
        self.register_buffer("alpha", torch.tensor(float(alpha), dtype=torch.float64))
        self.register_buffer("best", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("updates", torch.tensor(0))

    def _apply(self, fn, recurse=True):
        """Moves to a device, never to another dtype: ``model.bfloat16()`` would leave 8 bits of the averages."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.modalities}, task={self.task!r}, num_samples={self.num_samples}, mode={self.mode!r}"

    @property
    def due(self) -> bool:
        """Whether the next ``update`` works; if not, its predictions need not be made."""
        return int(self.updates) % self.every == 0

    def _here(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else moved(t, self.mean.device)

    # --- What is given ---------------------------------------------------------------------------------------------

    def _predictions(
        self, unimodal: Predictions, fused: Tensor, names: tuple[str, str] = ("unimodal", "fused")
    ) -> tuple[Tensor, Tensor]:
        """[N, M, K] and [N, K]: K targets or C classes, 1 for predictions without a last dimension."""
        each = in_order("BTW", names[0], unimodal, self.modalities)
        dims = (1, 2) if self.task == "regression" else (2,)
        letters = "[N] or [N, K]" if self.task == "regression" else "[N, C]"
        if fused.dim() not in dims or fused.shape[1:].numel() < 1:
            raise ValueError(f"BTW: {names[1]} must be {letters}, got {list(fused.shape)}")
        for name, t in zip(self.modalities, each, strict=True):
            if t.shape != fused.shape:
                raise ValueError(
                    f"BTW: {names[0]}[{name!r}] must be {letters} = {list(fused.shape)} as {names[1]}, "
                    f"got {list(t.shape)}"
                )
        real = torch.float64 if fused.dtype == torch.float64 else torch.float32
        N, K = fused.shape[0], fused.shape[1:].numel()
        *each, fused = (self._here(t.detach()).to(real).reshape(N, K) for t in (*each, fused))
        return torch.stack(each, 1), fused

    def _present(self, present: Tensor | None, N: int) -> Tensor | None:
        M = len(self.modalities)
        if present is not None and (present.shape != (N, M) or present.dtype != torch.bool):
            raise ValueError(
                f"BTW: present must be bool [N, M] = [{N}, {M}], got {present.dtype} {list(present.shape)}"
            )
        return self._here(present)

    def _target(self, target: Tensor | None, fused_NK: Tensor) -> Tensor:
        if target is None:
            raise ValueError("BTW: target must be given: the residuals of the training rows are the sigmas")
        if target.dim() < 1 or target.numel() != fused_NK.numel() or target.shape[0] != fused_NK.shape[0]:
            raise ValueError(f"BTW: target must be like fused {list(fused_NK.shape)}, got {list(target.shape)}")
        return self._here(target.detach()).to(fused_NK.dtype).reshape(fused_NK.shape)

    def _index(self, index: Tensor | None, N: int) -> Tensor | None:
        if (index is None) != (self.table is None):
            raise ValueError("BTW: index must be given if, and only if, num_samples was")
        if index is not None and not isinstance(index, Tensor):
            raise ValueError(f"BTW: index must be an int64 tensor [N] = [{N}], got {type(index).__name__}")
        if index is not None and (index.shape != (N,) or index.dtype != torch.int64):
            raise ValueError(f"BTW: index must be int64 [N] = [{N}], got {index.dtype} {list(index.shape)}")
        if index is not None and N and not (int(index.min()) >= 0 and int(index.max()) < self.num_samples):
            raise ValueError(f"BTW: index must be from 0 to num_samples - 1 = {self.num_samples - 1}")
        return self._here(index)

    def _of_all_ranks(self, index, each_NMK, fused_NK, target_NK, present_NM, *heads) -> list[Tensor | None]:
        if present_NM is None and ranks(self.process_group) > 1:  # another rank may have a mask
            present_NM = torch.ones(each_NMK.shape[:2], dtype=torch.bool, device=each_NMK.device)
        return gather_rows(self.process_group, index, each_NMK, fused_NK, target_NK, present_NM, *heads)

    def _is_known(self, predictions: Tensor) -> Tensor:
        """Of predictions [..., K] whether they are numbers. A logit of -inf is one, of a probability of 0; not of every
        class."""
        if self.task == "regression":
            return predictions.isfinite().all(-1)
        known = (predictions < math.inf).all(-1)
        return known & (predictions > -math.inf).any(-1) if self.task == "classification" else known

    def _known(self, rows: list[Tensor | None]) -> list[Tensor | None]:
        """index, each, fused, target and more without the rows whose fused prediction or target is not a number."""
        _, _, fused_NK, target_NK, *_ = rows
        more = [t for t in (target_NK, rows[-1] if self.sigma_source == "head" else None) if t is not None]
        if self.task == "regression" and all(map(_all_finite, (fused_NK, *more))):
            return rows
        known = self._is_known(fused_NK)
        for more_NK in more:
            known &= more_NK.isfinite().all(1)
        return rows if known.all() else [None if t is None else t[known] for t in rows]

    def _sigma_is_known(self) -> bool:
        """Looks once at what sigma holds: on a GPU a look waits."""
        if self.sigma.is_inference():  # which counts no versions
            return not self.sigma.isnan().any()
        looked_at, version = self._known_sigma
        if looked_at is not self.sigma or version != self.sigma._version:
            if self.sigma.isnan().any():
                return False
            self._known_sigma = self.sigma, self.sigma._version
        return True

    # --- The two factors -------------------------------------------------------------------------------------------

    def _divergence(self, each_NMK, fused_NK, target_NK=None, log_sigma_NMK=None, fused_log_sigma_NK=None) -> Tensor:
        N, M, K = each_NMK.shape
        if self.task == "classification":
            return ops.categorical_kl(each_NMK.transpose(0, 1), fused_NK)
        if self.task == "multilabel":  # a Bernoulli is a softmax over its logit and 0
            pairs = torch.stack([each_NMK, torch.zeros_like(each_NMK)], -1).transpose(0, 1).reshape(M, N * K, 2)
            fused = torch.stack([fused_NK, torch.zeros_like(fused_NK)], -1).reshape(N * K, 2)
            return ops.categorical_kl(pairs, fused).reshape(N, K, M).sum(1)
        if each_NMK.is_cuda or not _all_finite(each_NMK):  # to look would be to wait
            each_NMK = torch.where(each_NMK.isfinite(), each_NMK, math.nan)
        mu, fused_mu = each_NMK.transpose(1, 2).reshape(N * K, M), fused_NK.reshape(N * K)
        if target_NK is not None:
            kl = ops.residual_kl(mu, fused_mu, target_NK.reshape(N * K), self.sigma_min)
        else:
            if log_sigma_NMK is None:
                if not self._sigma_is_known():
                    raise RuntimeError("BTW: call fit_sigma first: it gives the sigmas of rows without a target")
                log_sigma = self.sigma.log().to(mu.dtype)
                log_sigma, fused_log_sigma = log_sigma[:M].expand(N * K, M), log_sigma[M].expand(N * K)
            else:
                log_sigma_NMK = torch.where(log_sigma_NMK.isfinite(), log_sigma_NMK, math.nan)
                log_sigma = log_sigma_NMK.transpose(1, 2).reshape(N * K, M)
                fused_log_sigma = fused_log_sigma_NK.reshape(N * K)
            kl = ops.gaussian_kl(mu, log_sigma, fused_mu, fused_log_sigma)
        return kl if K == 1 else kl.reshape(N, K, M).sum(1)

    def _mutual_info(self, each_NMK, fused_NK, present_NM) -> Tensor:
        """[M] float64; what too few samples say nothing about stays as it was."""
        N, _, K = each_NMK.shape
        if self.task == "regression":
            if self.neighbors >= N:
                return self.mutual_info.clone()
            of_targets = [
                ops.ksg_mutual_info(each_NMK[:, :, k], fused_NK[:, k], present_NM, self.neighbors, jitter=JITTER)
                for k in range(K)
            ]
        else:
            known = self._is_known(each_NMK) & self._is_known(fused_NK)[:, None]
            present = known if present_NM is None else known & present_NM
            if self.task == "classification":
                labels = [(each_NMK.argmax(2), fused_NK.argmax(1), K)]
            else:
                labels = [((each_NMK[:, :, k] > 0).long(), (fused_NK[:, k] > 0).long(), 2) for k in range(K)]
            of_targets = [ops.discrete_mutual_info(a.T, b, present, C) for a, b, C in labels]
        found = torch.stack(of_targets).mean(0)
        return torch.where(found.isnan(), self.mutual_info, found)

    def _fresh(self, kl_NM, mutual_info_M, present_NM) -> Tensor:
        if self.factors == "kl":
            mutual_info_M = torch.ones_like(mutual_info_M)
        if self.factors == "mi":
            kl_NM = torch.where(kl_NM.isnan(), kl_NM, torch.ones_like(kl_NM))
        options = (self.floor, self.ceiling, self.mode, self.temperature, self.mean_one)
        return ops.btw_weights(kl_NM, mutual_info_M, present_NM, *options).float()

    def _sigma_heads(self, log_sigma, fused_log_sigma, fused: Tensor):
        wanted = self.task == "regression" and self.sigma_source == "head"
        if not (wanted == (log_sigma is not None) == (fused_log_sigma is not None)):
            raise ValueError("BTW: log_sigma and fused_log_sigma must be given if, and only if, sigma='head'")
        if not wanted:
            return None, None
        if fused_log_sigma.shape != fused.shape:
            shapes = f"{list(fused.shape)}, got {list(fused_log_sigma.shape)}"
            raise ValueError(f"BTW: fused_log_sigma must be like fused {shapes}")
        return self._predictions(log_sigma, fused_log_sigma.to(fused.dtype), ("log_sigma", "fused_log_sigma"))

    # --- Between epochs --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(
        self,
        index: Tensor | None,
        unimodal: Predictions,
        fused: Tensor,
        target: Tensor | None = None,
        *,
        present: Tensor | None = None,
        log_sigma: Predictions | None = None,
        fused_log_sigma: Tensor | None = None,
    ) -> bool:
        """Refreshes the mutual information and moves the table's rows ``index`` towards their fresh weights.

        Parameters
        ----------
        index : [N] int64, different rows of the table; None without a table.
        unimodal : what each modality predicts by itself, a mapping from its name or a sequence in order: [N], [N, K] or
            [N, C] (see ``task``), in units of the target or as logits. Choose the epoch of these models by validation:
            one that knows its training rows by heart says little of what it does elsewhere.
        fused : what the model predicts, the same shape, from the same rows in eval mode.
        target : [N] or [N, K], of these training rows; for sigma="residual" alone.
        present : [N, M] bool; absent modalities get weight 0 (their rows of the table move towards it from 1: pass
            ``present`` to ``weights`` and ``apply`` too) and are left out of the mutual information. So is a
            modality whose prediction is NaN or infinite (of logits: +inf; -inf is a class of probability 0). A row
            whose fused prediction or target is, stays as it was.
        log_sigma, fused_log_sigma : as unimodal and fused, natural logarithms of standard deviations; for sigma="head"
            alone.

        Returns whether it did so: see ``every``.
        """
        each, whole = self._predictions(unimodal, fused)
        N = whole.shape[0]
        index, present = self._index(index, N), self._present(present, N)
        residual = self.task == "regression" and self.sigma_source == "residual"
        if not residual and target is not None:
            raise ValueError("BTW: target is for task='regression' with sigma='residual' alone")
        target = self._target(target, whole) if residual else None
        heads = self._sigma_heads(log_sigma, fused_log_sigma, fused)
        if not self.due:
            self.updates += 1
            return False
        rows = self._of_all_ranks(index, each, whole, target, present, *heads)
        index, each, whole, target, present, *heads = self._known(rows)
        kl = self._divergence(each, whole, target, *heads)
        mutual_info = self._mutual_info(each, whole, present)
        fresh = self._fresh(kl, mutual_info, present)
        alpha = float(self.alpha)
        if self.table is not None:
            ops.ema_rows_(self.table, index, fresh, alpha)
        if present is None and _all_finite(kl):
            counts = kl.shape[0]
        else:
            counts = (~kl.isnan() if present is None else present & ~kl.isnan()).sum(0)
        mean = fresh.sum(0, dtype=torch.float64) / counts  # what does not count weighs 0
        self.mean.copy_(torch.where(mean.isnan(), self.mean, alpha * mean + (1 - alpha) * self.mean))
        self.mutual_info.copy_(mutual_info)
        self.updates += 1
        return True

    @torch.no_grad()
    def fit_sigma(
        self,
        index: Tensor | None,
        unimodal: Predictions,
        fused: Tensor,
        target: Tensor,
        *,
        present: Tensor | None = None,
    ) -> Tensor:
        """Sets the standard deviations of rows without a target, one for each modality and one for the fused
        prediction: the root mean square of the residuals of these training rows. Arguments as for ``update``. Returns
        [M + 1], the fused one last."""
        if self.task != "regression" or self.sigma_source not in ("residual", "fitted"):
            raise ValueError(
                "BTW: fit_sigma is for task='regression' with sigma='residual' or 'fitted', this is "
                f"{self.task!r} with {self.sigma_source!r}"
            )
        each, whole = self._predictions(unimodal, fused)
        index, present = self._index(index, whole.shape[0]), self._present(present, whole.shape[0])
        target = self._target(target, whole)
        index, each, whole, target, present = self._of_all_ranks(index, each, whole, target, present)
        squares = torch.cat([each, whole.unsqueeze(1)], 1).double().sub(target.unsqueeze(1)).square().mean(2)
        counted = squares.isfinite()
        if present is not None:
            counted[:, :-1] &= present
        sigma = (squares.where(counted, 0).sum(0) / counted.sum(0)).sqrt().clamp_min(self.sigma_min)
        if sigma.isnan().any():
            names = [*self.modalities, "fused"]
            lacking = [name for name, value in zip(names, sigma.tolist(), strict=True) if math.isnan(value)]
            raise ValueError(f"BTW: fit_sigma needs a finite prediction of every modality, got none of {lacking}")
        self.sigma.copy_(sigma)
        return self.sigma.clone()

    def step(self, metric: float | Tensor) -> float:
        """After validation: a new best metric raises alpha by ``alpha_step``, any other lowers it, within [0, 1].
        Returns alpha. The metric is averaged over the ranks."""
        value = mean_over_ranks(self.process_group, float(metric))
        if math.isnan(value):
            raise ValueError("BTW: metric must be a number, got NaN")
        best = float(self.best)
        better = math.isnan(best) or (value < best if self.metric_mode == "min" else value > best)
        if better:
            self.best.fill_(value)
        moved = float(self.alpha) + (self.alpha_step if better else -self.alpha_step)
        self.alpha.fill_(min(max(moved, 0.0), 1.0))
        return float(self.alpha)

    # --- In the loop -----------------------------------------------------------------------------------------------

    def weights(
        self,
        index: Tensor | None = None,
        *,
        unimodal: Predictions | None = None,
        fused: Tensor | None = None,
        present: Tensor | None = None,
        log_sigma: Predictions | None = None,
        fused_log_sigma: Tensor | None = None,
    ) -> Tensor:
        """float32 weights, without a gradient.

        ``weights(index)``: [N, M], the table's rows.
        ``weights(unimodal=..., fused=...)``: [N, M], fresh ones for rows outside the table, from their predictions and
        what ``update`` last knew of the mutual information; there is no argument for a target.
        ``weights()``: [M], the mean weights of present modalities, for rows of which nothing is known; with ``present``
        [N, M], a row's sum shared by what it has.
        """
        if (unimodal is None) != (fused is None):
            raise ValueError("BTW: unimodal and fused must be given together")
        if index is not None:
            if unimodal is not None:
                raise ValueError("BTW: index is for rows of the table, unimodal and fused are for rows outside it")
            if self.table is None:
                raise ValueError("BTW: index needs a table: give num_samples")
            w = self.table.index_select(0, self._here(index))
            return w if present is None else w * self._present(present, w.shape[0])
        if unimodal is None:
            return self.mean.clone() if present is None else self._shared_mean(present)
        with torch.no_grad():
            each, whole = self._predictions(unimodal, fused)
            present = self._present(present, whole.shape[0])
            heads = self._sigma_heads(log_sigma, fused_log_sigma, fused)
            return self._fresh(self._divergence(each, whole, None, *heads), self.mutual_info, present)

    def _shared_mean(self, present: Tensor) -> Tensor:
        present = self._present(present, present.shape[0])
        shares = self.mean * present
        total = present.sum(1, keepdim=True) if self.mean_one else 1.0
        return shares * (total / shares.sum(1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny))

    def apply(
        self,
        embeddings: Mapping[str, Tensor] | Sequence[Tensor] | Callable[[nn.Module], None],
        index: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        present: Tensor | None = None,
    ) -> dict[str, Tensor] | list[Tensor]:
        """Each modality's embeddings [N, ...] times its weights: those of the table's rows ``index``, or the given
        ``weights`` [N, M], or without either the means of ``weights()``. Returns what came, a dict by name or a list in
        order; dtypes stay. Call it before fusion, in training and evaluation.

        With a function alone it is ``torch.nn.Module.apply``, as ``model.apply(initialise)`` calls it on every part."""
        if not isinstance(embeddings, (Mapping, Sequence, Tensor)):
            return super().apply(embeddings)
        each = in_order("BTW", "embeddings", embeddings, self.modalities)
        N, M = each[0].shape[0], len(self.modalities)
        if index is not None and weights is not None:
            raise ValueError("BTW: index and weights exclude each other")
        present = self._present(present, N)
        if index is not None:
            weights = self.weights(index)
        elif weights is None:
            weights = self.mean.clone().expand(N, M) if present is None else self._shared_mean(present)
        if weights.shape != (N, M):
            raise ValueError(f"BTW: weights must be [N, M] = [{N}, {M}], got {list(weights.shape)}")
        if present is not None:
            weights = weights * moved(present, weights.device)
        return same_container(embeddings, self.modalities, ops.scale_modalities(each, weights))
