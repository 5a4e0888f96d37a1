"""Attribution regularisation: says how much each modality should matter to a decision (Yerramilli et al., "Attribution
Regularization for Multimodal Paradigms", arXiv 2404.02359)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmbal.methods import attribution_closed as closed
from mmbal.methods import attribution_inputs as inputs
from mmbal.methods import attribution_routes as routes
from mmbal.methods import attribution_values as values
from mmbal.methods.attribution_inputs import Embeddings, Shares
from mmbal.methods.embedding_tap import EmbeddingTap
from mmbal.methods.rows import choose

MODES = ("auto", "double", "forward", "difference", "closed")


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
    Letters: B samples, M modalities, C classes, D features, T tokens. Tensors on the CPU or on a CUDA device.

    Parameters
    ----------
    modalities : names, in the order of every [B, M] tensor; or an ``EmbeddingTap``, which gives the embeddings of each
        step and the head's parameters. Embeddings are taken where encoders end and fusion begins (as in the paper),
        [B, D] or [B, T, D].
    head : what makes logits [B, C] of the embeddings, called as head(first, second, ...). nn.Linear and nn.Sequential
        get them side by side, concatenated along the last dimension in the order of modalities; an nn.ModuleDict has
        one part for each, and the logits are their sum. It runs a second time, on copies of the embeddings (dropout
        draws a mask of its own, norms use their running statistics, and none of the head's state changes), in its
        parameters' dtype. None: the graph of the model's own forward pass serves, ``logits`` must be given, and dropout
        and batch norm are as they were there (batch statistics mix samples: then a gradient is not of one sample
        alone).
    parameters : the head's. None: those of ``head`` where it is a module, or the tap's ``head_parameters()``.
    mode : how the gradient gets to the head. "double": backward of the backward; any head of operators that have one.
        "forward": reverse over forward; needs ``head``, and forward AD of all its operators that can be derived
        (softmax and SiLU have none in torch 2.13, so attention neither). "difference": a central difference and no
        second derivatives; needs ``head``, in float32 or float64, smooth (GELU, tanh; one with ReLU or max pooling is
        refused, as far as that can be found out: in a function of your own it cannot), and is right to about 1e-4,
        1e-3 for sure decisions in float32. "closed": exact in one operator, for [B, D] embeddings and an nn.Linear as
        ``head`` or an nn.ModuleDict of them. "auto": "closed" where possible, else "double".
    score : "odds" (ours), z_c - log sum of the other classes' exp z: same shares and gradients as the probability's, as
        in the paper, but never saturated. "logit", z_c: another regulariser; for several labels at once (the top label)
        and regression on several outputs (the largest). With one output both are |z|. Token-level logits [B, T, C]: the
        mean over positions.
    level : "sample": shares of each sample, then the mean (ours). "batch": shares of the mean magnitudes, less noisy.
    pool : "l2", the norm (ours: the paper says "L2 pooling" alone), which grows with the number of elements; "rms", the
        root of the mean of squares. A warning tells where sizes differ by more than 4 times.
    penalty : "l1" as in the paper, "squared" or "huber" (|x| - 0.05 beyond 0.1, 5 x^2 below), smooth at p = q (ours).
    shares : q, asked for: {name: share}, [M] or [B, M], not negative; their sum is taken to 1. None: equal (ours: the
        paper presets them). Another one can be given with every call.
    attribution : "gradxinput", as above; "ig" (ours), integrated gradients: g is the mean of the gradients at
        ``ig_steps`` midpoints from ``baseline`` to e, the class kept. Costs as many passes; needs ``head``.
    baseline : {name: tensor}, or tensors in order, that broadcast with the embeddings, subtracted in alpha. None: 0.
        Attributions depend on the origin: an encoder with a large common offset looks dominant, which its mean
        embedding as baseline takes out. While encoders train that mean moves: set ``regularizer.baseline`` anew, after
        each epoch say.
    warmup_steps : calls, where gradients are recorded, whose value is 0 and has no gradient: early decisions are
        random. An epoch is a good start (ours).
    difference_step : of mode "difference", in lengths of a sample's embeddings.
    eps : a modality with a share up to this has no gradient.

    What a training script should know
    ----------------------------------
    - The weight is not known from the paper. Ours: 0.1 added to the task loss; 1 with a separate optimiser for the
      head, of the same class and learning rate as the task's (ours), whose step comes after the task's, which goes on
      training the head as well. Worth trying: 0.01, 0.1, 1. With the separate one (give ``head``, and no logits, for
      those are of the head before its step):

        optimizer.zero_grad(), loss.backward(), optimizer.step()
        head_optimizer.zero_grad()
        regularizer.backward(regularizer()[0])
        head_optimizer.step()

    - The class is the predicted one, the first of equal ones, as in the paper; with ``target`` the labels (where they
      are not negative).
    - ``present`` [B, M]: shares and q are over what is there; with fewer than two, or no q above 0 among these, a
      sample is skipped, R = 0. An embedding of zeros counts as missing (ours), for no gradient can revive it.
    - ``masks`` {name: bool [B, T]}: where tokens are real; others do not count.
    - AMP: inside or outside autocast; the head runs in its parameters' dtype and the score in float32. GradScaler
      scales ``loss + weight * value`` as always. A model's own graph (head=None) in float16 can underflow: give
      ``head``.
    - Clip the task's gradients before ``backward(value, weight)`` where the penalty shall not count to the norm. The
      gradient grows as the head's weights shrink, for shares do not depend on their scale.
    - DDP: each rank's value is of its own batch, as its loss; add it to the loss and call backward once. Sharded
      parameters (FSDP) are refused.
    - On a CUDA device a call waits for the device where it compares logits with the head's (the mistakes below) and
      where it copies ``shares`` [B, M] or a ``baseline`` that lie on the host, nowhere else; so it does in
      ``info.skipped`` and ``info.mean()``. Labels and shares that lie on the device are not looked at beforehand:
      wrong ones end a kernel, and with it the process' work on that device.
    - Not inside torch.compile; a compiled ``head`` runs uncompiled. Checkpointing with use_reentrant=False only. Fused
      attention has no second derivative: with ``head`` it is replaced by torch's plain formula.
    - Mistakes are looked for: parameters that the embeddings depend on, and derivatives that are missing, in the first
      call with gradients and whenever the head's trainable parameters change; logits that are not the head's in the
      first call with logits, the second, the fourth, the eighth and so on, where it has no dropout and no batch
      statistics.
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
        self.modalities = inputs.names(modalities if self.tap is None else self.tap.modalities)
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
        if parameters is None and not isinstance(head, nn.Module) and self.tap is None:
            raise ValueError("AttributionRegularizer: parameters must be the head's, for head is no module, got None")
        self._parameters = None if parameters is None else list(parameters)
        self._alone = None if head is None else routes.HeadAlone(head, self.head_parameters)
        if isinstance(head, nn.ModuleDict) and list(head) != self.modalities:
            raise ValueError(
                f"AttributionRegularizer: head must have the keys {self.modalities} in this order, got {list(head)}"
            )
        if mode == "closed" and (reasons := self._why_not_closed(closed.linear_parts(head))):
            raise ValueError(f"AttributionRegularizer: mode 'closed' needs {reasons}")
        M = len(self.modalities)
        self._shares = torch.ones(M, dtype=torch.float64) if shares is None else inputs.shares(shares, self.modalities)
        self._examined: tuple | None = None  # the trainable parameters that the head was last examined with
        self._given = 0  # calls with logits
        self._warned: set[str] = set()

    def _why_not_closed(self, parts: list[nn.Linear]) -> str:
        needs = [
            (not parts, "a torch.nn.Linear as head or an nn.ModuleDict of them, no parameter of which is tied"),
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
        if any(hasattr(p, "device_mesh") or type(p).__name__ == "FlatParameter" for p in found):
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
        logits : [B, C] of the model's forward pass with the head as it is now. Needed without ``head``; with it they
            spare a linear head a pass, and the predicted class is theirs.
        target : [B] int64 labels, instead of the predicted classes.
        present : [B, M] bool.
        shares : see the class; of this call alone.
        masks : {name: [B, T] bool}, of the modalities that have padding.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("AttributionRegularizer: call it outside of torch.compile: it needs second derivatives")
        each = self._embeddings(embeddings)
        recorded = torch.is_grad_enabled()
        parameters = self.head_parameters() if recorded and each[0].shape[0] > 0 else []
        differentiate = recorded and self.steps >= self.warmup_steps and each[0].shape[0] > 0
        if logits is not None and logits.dim() == 1:
            logits = logits.unsqueeze(1)
        with routes.as_usual(each[0].device.type):
            device = each[0].device
            if shares is None:
                q = self._shares = inputs.on_device(self._shares, device)
            else:
                q = inputs.on_device(inputs.shares(shares, self.modalities), device)
            q = inputs.shares_of_call(q, len(each[0]), self.level)
            present = inputs.present(present, each)
            new = bool(parameters) and tuple(map(id, parameters)) != self._examined
            if new:
                self._check_not_tied(parameters)
            parts = self._closed_parts(each, masks)
            if parts:
                value, info, gradients = self._linear(parts, each, logits, target, q, present, parameters)
            else:
                padding = inputs.masks(masks, self.modalities, each)
                asked = values.ask(q, present, each, padding)
                value, info, gradients = self._general(
                    each, logits, target, asked, padding, parameters, recorded, differentiate, new
                )
            if differentiate and any(g is not None for g in gradients):
                value = routes.WithGradients.apply(value, gradients, *parameters)
            elif recorded and not differentiate:
                value = torch.zeros_like(value)
        self._examined = tuple(map(id, parameters)) if parameters else self._examined
        self.steps += recorded
        return value, AttributionInfo(list(self.modalities), *info)

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
        each = inputs.embeddings(given, self.modalities)
        if self.pool == "l2" and "sizes" not in self._warned and len(each[0]) and inputs.sizes_differ(each):
            self._warned.add("sizes")
        return each

    def _check_not_tied(self, parameters: Sequence[Tensor]) -> None:
        encoders = {} if self.tap is None else self.tap.encoders
        owner = {id(p): name for name, module in encoders.items() for p in module.parameters()}
        for p in parameters:
            if id(p) in owner:
                raise ValueError(
                    f"AttributionRegularizer: parameters must be the head's alone, got one {list(p.shape)} that "
                    f"encoder {owner[id(p)]!r} has too"
                )

    def _comparison_is_due(self, logits: Tensor | None, B: int) -> bool:
        """Given logits are compared with the head's in the first, second, fourth, eighth, ... call that has some."""
        given = logits is not None and B > 0
        self._given += given
        return given and self._given & (self._given - 1) == 0

    # --- The two ways ----------------------------------------------------------------------------------------------

    def _closed_parts(self, each: list[Tensor], masks) -> list[nn.Linear]:
        """The layers of a linear head where the closed form serves, else none."""
        if self.mode not in ("auto", "closed"):
            return []
        parts = [] if self._alone is None else closed.linear_parts(self._alone.head)
        reasons = self._why_not_closed(parts)
        if not reasons and not masks and all(e.dim() == 2 for e in each):
            return parts
        if self.mode == "closed":
            got = f"{[list(e.shape) for e in each]}" + (" with masks" if masks else "")
            needs = reasons or "embeddings [B, D] without masks"
            raise ValueError(f"AttributionRegularizer: mode 'closed' needs {needs}, got {got}")
        return []

    def _linear(self, parts, each, logits, target, q, present, parameters):
        alone, dtype = self._alone, parts[0].weight.dtype
        closed.check_widths(parts, each)
        e = [x.detach() if x.dtype == dtype else x.detach().to(dtype) for x in each]
        due, usable = self._comparison_is_due(logits, len(e[0])), logits is not None and logits.dtype == dtype
        own = None
        if due or not usable:
            with torch.no_grad():
                own = alone(e)
            if due and closed.apart(own, logits) > 1:
                raise ValueError(
                    "AttributionRegularizer: logits must be what head makes of these embeddings side by side, in the "
                    "order of modalities, got others: leave logits out if there is dropout between them or the head "
                    "has changed since"
                )
        decision, logits = own if logits is None else logits, logits.detach() if usable else own
        classes = None if target is None and (usable or decision is own) else routes.decided(decision, target)
        options = (self.score, self.pool, self.penalty, self.eps)
        value, info, found = closed.regularizer(parts, e, logits, classes, q, present, options)
        return value, info, [found.get(id(p)) for p in parameters]

    def _general(self, each, logits, target, asked: values.Asked, masks, parameters, recorded, second, new):
        """second: gradients for the parameters are asked for; new: the head has to be examined."""
        alone, own_graph = self._alone, self._alone is None
        second = second and bool(parameters)
        if own_graph:
            self._check_own_graph(each, logits, parameters if new else [], recorded)
            e, score_logits = each, logits
        else:
            e = alone.leaves(each)
            if self.mode == "difference" and (second or new) and e[0].element_size() < 4:
                raise ValueError(f"AttributionRegularizer: mode 'difference' needs a head in float32, got {e[0].dtype}")
        due = not own_graph and self._comparison_is_due(logits, len(e[0])) and alone.repeats
        baselines = inputs.baselines(self.baseline, self.modalities, e)
        points = [e] if self.attribution == "gradxinput" else values.midpoints(e, baselines, self.ig_steps)
        classes = None if logits is None else routes.decided(logits, target)
        double = (second or new) and self.mode in ("auto", "double")
        g, first, size = [], None, None
        for point in points:
            if not own_graph:
                if classes is None and point is not e:
                    with torch.no_grad():
                        classes = routes.decided(alone(e), target)
                score_logits = alone(point)
            first = score_logits if first is None else first
            classes = routes.decided(score_logits, target) if classes is None else classes
            if double and not own_graph and new:
                routes.check_second_order(score_logits, point)
            if (second or new) and self.mode == "difference":
                routes.check_smooth(score_logits, point, alone.modules)
            s = routes.score_of(score_logits, classes, self.score)
            if s.shape[0] != e[0].shape[0]:
                raise ValueError(
                    f"AttributionRegularizer: logits must be [B, C] with B = {e[0].shape[0]}, got {list(first.shape)}"
                )
            size = s.detach().abs() if size is None else torch.maximum(size, s.detach().abs())
            g.append(routes.gradients_for(s, point, double, keep=own_graph))
            if double and new:
                routes.check_differentiable([one for one in g[-1] if one is not None], point)
        if due and self.attribution == "gradxinput":
            self._warn_of_other_logits(closed.apart(first, logits))
        if own_graph:
            self._check_reached(g[0])
        g = [[torch.zeros_like(x) if one is None else one for one, x in zip(of, e, strict=True)] for of in g]
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
            gradients = routes.difference(alone, points, v, classes, self.score, parameters, step, size)
        return value, info, gradients

    def _check_own_graph(self, each, logits, parameters, recorded: bool) -> None:
        if logits is None:
            raise ValueError("AttributionRegularizer: logits must be given where head is None, got None")
        if not recorded or not logits.requires_grad or not all(e.requires_grad for e in each):
            raise RuntimeError(
                "AttributionRegularizer: without head it needs the graph from every embedding to the logits: call the "
                "model and this where gradients are recorded, not under torch.no_grad, or give head"
            )
        if parameters:
            routes.check_second_order(logits, each)
            routes.check_not_upstream(dict(zip(self.modalities, each, strict=True)), parameters)

    def _check_reached(self, gradients: Sequence[Tensor | None]) -> None:
        missing = [name for name, g in zip(self.modalities, gradients, strict=True) if g is None]
        why = "did the model run again since, or does a tap's select give a tensor that the model does not go on with?"
        if missing and len(missing) == len(self.modalities):
            raise RuntimeError(f"AttributionRegularizer: logits must depend on the embeddings, and do not: {why}")
        if missing and missing[0] not in self._warned:
            self._warned.update(missing)
            warnings.warn(
                f"AttributionRegularizer: logits do not depend on the embeddings of {missing}, whose share is 0: {why}",
                stacklevel=4,
            )

    def _warn_of_other_logits(self, apart: float) -> None:
        if apart > 1 and "logits" not in self._warned:
            self._warned.add("logits")
            warnings.warn(
                "AttributionRegularizer: logits are not what head makes of the embeddings: are they of this step, and "
                "does head take them in the order of modalities, with nothing between?",
                stacklevel=4,
            )
