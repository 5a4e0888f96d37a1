"""Attribution regularisation: says how much each modality should matter to a decision (Yerramilli et al., "Attribution
Regularization for Multimodal Paradigms", arXiv 2404.02359)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.methods import attribution_routes as routes
from mmbal.methods import attribution_values as values
from mmbal.methods.embedding_tap import EmbeddingTap
from mmbal.methods.rows import choose, in_order

MODES = ("auto", "double", "forward", "difference", "closed")
Embeddings = Mapping[str, Tensor] | Sequence[Tensor]
Shares = Mapping[str, float] | Sequence[float] | Tensor


class AttributionInfo(NamedTuple):
    """What a decision was attributed to, without gradients: B samples, M modalities."""

    modalities: list[str]
    shares: Tensor  # [B, M], p; the asked ones where a sample does not count
    magnitudes: Tensor  # [B, M], a
    counted: Tensor  # [B] bool: two modalities or more are there, and some attribution is not 0

    @property
    def skipped(self) -> int:
        """Samples that do not count."""
        return int((~self.counted).sum())

    def mean(self) -> dict[str, float]:
        """Mean share of each modality over the samples that count, NaN where none does."""
        means = self.shares[self.counted].double().mean(0)
        return dict(zip(self.modalities, means.tolist(), strict=True))


class AttributionRegularizer:
    """A penalty on how far the modalities' shares in each decision are from asked ones. It trains the head (fusion and
    classifier) alone.

        tap = mmbal.EmbeddingTap(model, {"audio": "audio_net", "video": "video_net"})
        regularizer = mmbal.AttributionRegularizer(tap)
        ...
        logits = model(batch)
        value, info = regularizer(logits=logits)
        (loss + 0.1 * value).backward()

    For each sample: s the score of its class, alpha_i = (ds / de_i) e_i of modality i's embedding, a_i the L2 norm of
    alpha_i, shares p_i = a_i / sum_j a_j, R = sum_i |p_i - q_i|; ``value`` is the mean of R over the batch. Its
    gradients for the head's parameters, as these are at the call, are worked out at once, and ``value`` knows nothing
    else: the encoders get none whatever it is added to. Where no gradients are recorded (``torch.no_grad``) value and
    info are all there is.

    The definition is that of the paper's first version (of M modalities, M terms) as a review restates it; the later
    ones may differ. Where it leaves something open the choice is marked (ours).
    Letters: B samples, M modalities, C classes, D features, T tokens.

    Parameters
    ----------
    modalities : names, in the order of every [B, M] tensor; or an ``EmbeddingTap``, which gives the embeddings of each
        step and the head's parameters. Embeddings are taken where encoders end and fusion begins, [B, D] or [B, T, D].
    head : what makes logits [B, C] of the embeddings, called as head(first, second, ...). nn.Linear and nn.Sequential
        get them side by side, concatenated along the last dimension in the order of modalities; an nn.ModuleDict has
        one part for each, and the logits are their sum. It runs a second time, on copies of the embeddings (dropout
        draws a mask of its own, batch norms use their running statistics). None: the graph of the model's own forward
        pass serves, ``logits`` must be given, and dropout and batch norm are as they were there (batch statistics mix
        samples: then a gradient is not of one sample alone).
    parameters : the head's. None: those of ``head`` where it is a module, or the tap's ``head_parameters()``.
    mode : how the gradient gets to the head. "double": backward of the backward; any head of operators that have one.
        "forward": reverse over forward; needs ``head``, and forward AD of all its operators that can be derived
        (softmax and SiLU have none in torch 2.13, so attention neither). "difference": a central difference and no
        second derivatives; needs ``head``, smooth (GELU, tanh; one with ReLU or max pooling is refused, as far as that
        can be found out: in a function of your own it cannot), and is right to about 1e-4. "closed": exact in one
        operator, for [B, D] embeddings and an nn.Linear as ``head`` or an nn.ModuleDict of them. "auto": "closed" where
        possible, else "double".
    score : "odds" (ours), z_c - log sum of the other classes' exp z: same shares and gradients as the probability's, as
        in the paper, but never saturated. "logit", z_c: another regulariser; for several labels at once (the top label)
        and regression on several outputs (the largest). With one output both are |z|. Token-level logits [B, T, C]: the
        mean over positions.
    level : "sample": shares of each sample, then the mean (ours). "batch": shares of the mean magnitudes, less noisy.
    pool : "l2", the norm (ours: the paper says "L2 pooling" alone), which grows with the number of elements; "rms", the
        root of the mean of squares. A warning tells where sizes differ by more than 4 times.
    penalty : "l1" as in the paper, "squared" or "huber", smooth at p = q (ours).
    shares : q, asked for: {name: share}, [M] or [B, M], not negative; their sum is taken to 1. None: equal (ours: the
        paper presets them). Another one can be given with every call.
    attribution : "gradxinput", as above; "ig" (ours), integrated gradients: g is the mean of the gradients at
        ``ig_steps`` midpoints from ``baseline`` to e, the class kept. Costs as many passes; needs ``head``.
    baseline : {name: tensor}, or tensors in order, that broadcast with the embeddings, subtracted in alpha. None: 0.
        Attributions depend on the origin: an encoder with a large common offset looks dominant, which its mean
        embedding as baseline takes out.
    warmup_steps : calls, where gradients are recorded, whose value is 0 and has no gradient: early decisions are
        random. An epoch is a good start (ours).
    difference_step : of mode "difference", in lengths of a sample's embeddings.
    eps : a modality with a share up to this has no gradient.

    What a training script should know
    ----------------------------------
    - The weight is not known from the paper. Ours: 0.1 added to the task loss; with a separate optimiser for the
      head's parameters (``backward(value)`` and its step after the task's, from a call after the task's step with
      ``head``, or the gradient is one of before it) 1 and its learning rate. Worth trying: 0.01, 0.1, 1.
    - The class is the predicted one, the first of equal ones; with ``target`` the labels (where they are not negative).
    - ``present`` [B, M]: shares and q are over what is there; with fewer than two, or no q above 0 among these, a
      sample is skipped, R = 0. An embedding of zeros counts as missing (ours), for no gradient can revive it.
    - ``masks`` {name: bool [B, T]}: where tokens are real; others do not count.
    - AMP: inside or outside autocast; the head runs in its parameters' dtype and the score in float32. GradScaler
      scales ``loss + weight * value`` as always. A model's own graph (head=None) in float16 can underflow: give
      ``head``.
    - Clip the task's gradients before ``backward(value, weight)`` where the penalty shall not count to the norm.
    - DDP: each rank's value is of its own batch, as its loss; add it to the loss and call backward once. Sharded
      parameters (FSDP) are refused.
    - Not inside torch.compile; a compiled ``head`` runs uncompiled. Checkpointing with use_reentrant=False only. Fused
      attention has no second derivative: with ``head`` it is replaced by torch's plain formula.
    - A head can meet q by turning up weights of a modality that says nothing: watch accuracy, and each modality alone.
    """

    def __init__(
        self,
        modalities: Sequence[str] | EmbeddingTap,
        head: Callable | None = None,
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        mode: str = "auto",
        score: str = "odds",
        level: str = "sample",
        pool: str = "l2",
        penalty: str = "l1",
        shares: Shares | None = None,
        attribution: str = "gradxinput",
        ig_steps: int = 8,
        baseline: Embeddings | None = None,
        warmup_steps: int = 0,
        difference_step: float = 1e-2,
        eps: float = 1e-12,
    ):
        self.tap = modalities if isinstance(modalities, EmbeddingTap) else None
        self.modalities = list(modalities if self.tap is None else self.tap.modalities)
        if isinstance(modalities, str) or len(self.modalities) < 2 or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(
                f"AttributionRegularizer: modalities must be different names, at least two, got {modalities!r}"
            )
        choose("AttributionRegularizer", "mode", mode, MODES)
        choose("AttributionRegularizer", "score", score, ("odds", "logit"))
        choose("AttributionRegularizer", "level", level, ("sample", "batch"))
        choose("AttributionRegularizer", "pool", pool, ("l2", "rms"))
        choose("AttributionRegularizer", "penalty", penalty, tuple(values.PENALTIES))
        choose("AttributionRegularizer", "attribution", attribution, ("gradxinput", "ig"))
        for name, value, least in (("ig_steps", ig_steps, 1), ("warmup_steps", warmup_steps, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"AttributionRegularizer: {name} must be an integer of at least {least}, got {value!r}"
                )
        if not 0 < difference_step < 1:
            raise ValueError(f"AttributionRegularizer: difference_step must be from 0 to 1, got {difference_step}")
        if not 0 <= eps < 1:
            raise ValueError(f"AttributionRegularizer: eps must be from 0 to below 1, got {eps}")
        if head is None and (mode not in ("auto", "double") or attribution == "ig"):
            what = "attribution 'ig'" if attribution == "ig" else f"mode {mode!r}"
            raise ValueError(f"AttributionRegularizer: {what} needs head, for it runs the head by itself, got None")
        self.head, self.mode, self.score, self.level = head, mode, score, level
        self.pool, self.penalty, self.attribution, self.ig_steps = pool, penalty, attribution, ig_steps
        self.baseline, self.difference_step, self.eps = baseline, difference_step, eps
        self.warmup_steps, self.steps = warmup_steps, 0
        self._alone = None if head is None else routes.HeadAlone(head)
        if isinstance(head, nn.ModuleDict) and list(head) != self.modalities:
            raise ValueError(
                f"AttributionRegularizer: head must have the keys {self.modalities} in this order, got {list(head)}"
            )
        self._linears = [] if head is None else values.linear_parts(self._alone.head)
        reasons = self._why_not_closed()
        if mode == "closed" and reasons:
            raise ValueError(f"AttributionRegularizer: mode 'closed' needs {reasons}")
        self._always_double = bool(reasons)
        if parameters is None and not isinstance(head, nn.Module) and self.tap is None:
            raise ValueError("AttributionRegularizer: parameters must be the head's, for head is no module, got None")
        self._parameters = None if parameters is None else list(parameters)
        self._shares = torch.ones(len(self.modalities), dtype=torch.float64) if shares is None else self._asked(shares)
        self._checked = self._warned = False

    def _why_not_closed(self) -> str:
        needs = [
            (not self._linears, "a torch.nn.Linear as head or an nn.ModuleDict of them"),
            (self.level != "sample", "level 'sample'"),
            (self.attribution != "gradxinput", "attribution 'gradxinput'"),
            (self.baseline is not None, "no baseline"),
        ]
        return ", ".join(need for missing, need in needs if missing)

    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that the value has gradients for."""
        if self._parameters is not None:
            found = self._parameters
        elif isinstance(self.head, nn.Module):
            found = list(self.head.parameters())
        else:
            found = self.tap.head_parameters()
        if any(hasattr(p, "device_mesh") for p in found):
            raise NotImplementedError("AttributionRegularizer: the head's parameters must not be sharded (FSDP)")
        return [p for p in found if p.requires_grad]

    # --- In the loop -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        embeddings: Embeddings | None = None,
        logits: Tensor | None = None,
        *,
        target: Tensor | None = None,
        present: Tensor | None = None,
        shares: Shares | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, AttributionInfo]:
        """(value, info): the batch's mean penalty, a scalar to add to a loss, and what it is made of.

        embeddings : {name: [B, D] or [B, T, D]} or in order; left out with a tap.
        logits : [B, C] of the model's forward pass. Needed without ``head``; with it they spare a linear head a pass,
            and the predicted class is theirs.
        target : [B] int64 labels, instead of the predicted classes.
        present : [B, M] bool.
        shares : see the class; of this call alone.
        masks : {name: [B, T] bool}, of the modalities that have padding.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("AttributionRegularizer: call it outside of torch.compile: it needs second derivatives")
        each = self._embeddings(embeddings)
        recorded = torch.is_grad_enabled()
        self.steps += recorded
        differentiate = recorded and self.steps > self.warmup_steps and each[0].shape[0] > 0
        parameters = self.head_parameters() if differentiate else []
        if logits is not None and logits.dim() == 1:
            logits = logits.unsqueeze(1)
        device = each[0].device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            q = self._shares if shares is None else self._asked(shares)
            if q.dim() == 2 and (len(q) != len(each[0]) or self.level == "batch"):
                what = "[M] with level 'batch'" if self.level == "batch" else f"[M] or [B, M] with B = {len(each[0])}"
                raise ValueError(f"AttributionRegularizer: shares must be {what}, got {list(q.shape)}")
            padding = self._masks(masks, each)
            asked = values.ask(q, present, each, padding)
            if self._closed(each, masks):
                value, info, gradients = self._linear(each, logits, target, asked, parameters)
            else:
                value, info, gradients = self._general(each, logits, target, asked, padding, parameters, recorded)
            if differentiate and any(g is not None for g in gradients):
                value = routes.WithGradients.apply(value, gradients, *parameters)
            elif recorded and not differentiate:
                value = torch.zeros_like(value)
        return value, AttributionInfo(self.modalities, *info)

    def backward(self, value: Tensor, weight: float | Tensor = 1.0) -> None:
        """Adds weight times the gradient of value to ``.grad`` of the head's parameters, and to nothing else."""
        if value.requires_grad:
            (value * weight).backward()

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping) -> None:
        self.steps = int(state["steps"])

    # --- What comes in ---------------------------------------------------------------------------------------------

    def _embeddings(self, given: Embeddings | None) -> list[Tensor]:
        if given is None:
            if self.tap is None:
                raise ValueError("AttributionRegularizer: embeddings must be given where there is no tap, got None")
            given = self.tap.embeddings
        each = in_order("AttributionRegularizer", "embeddings", given, self.modalities)
        for name, e in zip(self.modalities, each, strict=True):
            if not e.is_floating_point() or e.dim() < 2 or e.shape[0] != each[0].shape[0]:
                raise ValueError(
                    f"AttributionRegularizer: embeddings[{name!r}] must be floating point [B, ...] = "
                    f"[{each[0].shape[0] if each[0].dim() else ''}, ...], got {e.dtype} {list(e.shape)}"
                )
        sizes = [e[:1].numel() for e in each]
        if self.pool == "l2" and not self._warned and each[0].shape[0] and max(sizes) > 4 * min(sizes):
            self._warned = True
            warnings.warn(
                f"AttributionRegularizer: embeddings of {sizes} elements a sample: the l2 pool grows with them; "
                "pool='rms' does not",
                stacklevel=3,
            )
        return each

    def _asked(self, shares: Shares) -> Tensor:
        """[M] or [B, M] in float64."""
        if isinstance(shares, Mapping):
            shares = in_order("AttributionRegularizer", "shares", shares, self.modalities)
        q, M = torch.as_tensor(shares, dtype=torch.float64).detach(), len(self.modalities)
        if q.dim() not in (1, 2) or q.shape[-1] != M:
            raise ValueError(f"AttributionRegularizer: shares must be [M] or [B, M], M = {M}, got {list(q.shape)}")
        if not bool(((q >= 0) & (q < math.inf)).all()) or not bool((q.sum(-1) > 0).all()):
            raise ValueError(
                f"AttributionRegularizer: shares must be finite, not negative, with a sum above 0, got {shares}"
            )
        return q

    def _baselines(self, each: list[Tensor]) -> list[Tensor] | None:
        if self.baseline is None:
            return None
        given = in_order("AttributionRegularizer", "baseline", self.baseline, self.modalities)
        return [torch.as_tensor(b).detach().to(e) for b, e in zip(given, each, strict=True)]

    # --- The two ways ----------------------------------------------------------------------------------------------

    def _closed(self, each: list[Tensor], masks) -> bool:
        possible = not self._always_double and masks is None and all(e.dim() == 2 for e in each)
        if self.mode == "closed" and not possible:
            got = f"{[list(e.shape) for e in each]}" + ("" if masks is None else " with masks")
            raise ValueError(f"AttributionRegularizer: mode 'closed' needs embeddings [B, D] without masks, got {got}")
        return possible and self.mode in ("auto", "closed")

    def _linear(self, each, logits, target, asked: values.Asked, parameters):
        alone, parts = self._alone, self._linears
        e = [x.detach().to(alone.dtype) for x in each]
        weights = [w.detach() for w in values.weights_of(parts, [x.shape[1] for x in e])]
        if logits is None or logits.dtype != alone.dtype or not self._checked:
            with torch.no_grad():
                own = alone(e)
            if not self._checked and logits is not None:
                values.check_same(own, logits)
            self._checked, logits = True, (own if logits is None or logits.dtype != alone.dtype else logits)
        real = torch.promote_types(alone.dtype, torch.float32)
        dreg_B = asked.counted.to(real) / max(len(asked.counted), 1)
        with torch.no_grad():
            reg_B, shares, magnitudes, dweights, dbias = ops.attribution_linear(
                e,
                weights,
                logits.detach(),
                asked.q,
                dreg_B,
                asked.present,
                routes.decided(logits, target),
                self.score,
                self.pool,
                self.penalty,
                self.eps,
            )
        info = asked.info(shares, magnitudes)
        found = values.gradients_of(parts, dweights, None if self.score == "logit" else dbias)
        return (reg_B * dreg_B).sum(), info, [found.get(id(p)) for p in parameters]

    def _general(self, each, logits, target, asked: values.Asked, masks, parameters, recorded: bool):
        alone, own_graph, second = self._alone, self._alone is None, bool(parameters)
        if own_graph:
            self._check_own_graph(each, logits, parameters, recorded)
            e, score_logits = each, logits
        else:
            e = alone.leaves(each)
        baselines = self._baselines(e)
        points = [e] if self.attribution == "gradxinput" else values.midpoints(e, baselines, self.ig_steps)
        classes = None if logits is None else routes.decided(logits, target)
        double = second and self.mode in ("auto", "double")
        g, first = [], None
        for point in points:
            if not own_graph:
                if classes is None and point is not e:
                    with torch.no_grad():
                        classes = routes.decided(alone(e), target)
                score_logits = alone(point)
            first = score_logits if first is None else first
            classes = routes.decided(score_logits, target) if classes is None else classes
            if double and not own_graph and not self._checked:
                routes.check_second_order(score_logits, point)
            if second and self.mode == "difference":
                routes.check_smooth(score_logits, point, alone.modules)
            s = routes.score_of(score_logits, classes, self.score)
            if s.shape[0] != e[0].shape[0]:
                raise ValueError(
                    f"AttributionRegularizer: logits must be [B, C] with B = {e[0].shape[0]}, got {list(first.shape)}"
                )
            g.append(routes.gradients_for(s, point, double, keep=own_graph))
            if double and not self._checked:
                routes.check_differentiable(g[-1], point)
        self._checked = True
        g = [sum(of_points) / len(points) if len(points) > 1 else of_points[0] for of_points in zip(*g, strict=True)]
        delta = values.inputs(e, baselines, masks, self.pool)
        value, info, v = values.regularizer(g, delta, asked, self.level, self.pool, self.penalty, self.eps, second)
        if not second:
            return value, info, []
        if double:
            gradients = routes.double(g, v, parameters, keep=own_graph)
        elif self.mode == "forward":
            gradients = routes.forward(alone, points, v, classes, self.score, parameters)
        else:
            step = self.difference_step
            gradients = routes.difference(alone, points, v, classes, self.score, parameters, step)
        return value, info, gradients

    def _check_own_graph(self, each, logits, parameters, recorded: bool) -> None:
        if logits is None:
            raise ValueError("AttributionRegularizer: logits must be given where head is None, got None")
        if not recorded or not logits.requires_grad or not all(e.requires_grad for e in each):
            raise RuntimeError(
                "AttributionRegularizer: without head it needs the graph from every embedding to the logits: record "
                "gradients (a tap does for frozen encoders), or give head"
            )
        if not self._checked and parameters:
            routes.check_second_order(logits, each)
            routes.check_not_upstream(dict(zip(self.modalities, each, strict=True)), parameters)

    def _masks(self, masks: Mapping[str, Tensor] | None, each: list[Tensor]) -> list[Tensor | None]:
        masks = dict(masks or {})
        if unknown := set(masks) - set(self.modalities):
            raise ValueError(
                f"AttributionRegularizer: masks must have keys among {self.modalities}, got {sorted(unknown)}"
            )
        for name, e in zip(self.modalities, each, strict=True):
            mask = masks.get(name)
            if mask is not None and (mask.dtype != torch.bool or mask.shape != e.shape[:2]):
                raise ValueError(
                    f"AttributionRegularizer: masks[{name!r}] must be bool [B, T] = {list(e.shape[:2])}, "
                    f"got {mask.dtype} {list(mask.shape)}"
                )
        return [masks.get(name) for name in self.modalities]
