"""The connector of Alt-MoE / M3-JEPA (Lei et al., "M3-JEPA: Multimodal Alignment via Multi-gate MoE based on the
Joint-Embedding Predictive Architecture", arXiv 2409.05929v6): predicts any modality's vectors from any other's, through
one mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.altmoe import growth
from mmbal.altmoe.parts import (
    BRANCHES,
    ConnectorOut,
    Direction,
    Head,
    Sources,
    TargetOut,
    as_sources,
    check_names,
    kaiming_,
    label,
    list_directions,
    masked_mean,
    project,
)
from mmbal.altmoe.store import fingerprint_of
from mmbal.altmoe.tokens import as_tokens
from mmbal.methods.rows import choose
from mmbal.moe import Experts, RouterRecord, mix_experts, router_logits


class MoEConnector(nn.Module):
    """Predicts the vector of one modality from the tokens of others, in every direction, through shared experts.

        connector = mmbal.MoEConnector({"image": 1024, "text": 4096})
        out = connector(image_tokens, "image", "text")  # out.reg [B, 4096], out.cl [B, 2048]
        target = connector.target(text_tokens, "text")
        loss = mmbal.AlignLoss()(out, target).loss

    For a direction s -> t and tokens x [B, T, d_s], with the branches l = reg and cl (preset "code"):

        h0  = GELU(P_s (x + tau_st) + b_s)         tau: an embedding of the direction
        h_l = h0 + t_l                             t: an embedding of the branch
        y_l = sum over the top K of pi_n E_n(h_l)  pi = softmax(W_g h_l + b_g), not renormalised
        o_l = GELU(LayerNorm_l(y_l)) + h_l
        reg = R_st mean_T(o_reg),  cl = C_st mean_T(o_cl)

    E_n = Linear GELU Dropout Linear Dropout; GELU is the exact one. Both branches of all tokens are one call of the
    experts. A target needs no tokens: ``target`` takes the mean of its features, and Q_t of it for ``cl``. Only the
    parts of the direction in use get gradients; those of the others stay None, so that no optimizer moves them.

    Parameters
    ----------
    dims : width d_m of each modality's features.
    hidden : D, the width of the connector. ffn : hidden width F of an expert; D unless given.
    num_experts, top_k : E experts, K of them for each token and branch. ``num_experts=1, top_k=1`` is a plain MLP.
    directions : "all" ordered pairs of modalities, or pairs (source, target). A source may be a tuple of names: their
        tokens are projected, then concatenated.
    dropout : of hidden units and outputs of experts, while training.
    cl_dim : C, the width of contrastive vectors; D unless given.
    expert_scope : "shared" by all modalities, or "per_modality": E for each, under one gate of E rows.
    gates : "shared" by both branches, or "per_branch": a gate of its own for each, and no embedding of branches. The
        preset says, unless given.
    renorm : divides the K weights by their sum. The LayerNorm takes most of it out again.
    pool : "after" the experts, as published, or "before": the mean of the tokens goes in, 1/T of the work.
    preset : "code", the authors' code as above, or "v6", the paper's text: gates per branch, with a bias for each
        source modality and branch in place of the embeddings of directions and branches and of the gate's own bias.
        Of the rest of the text it changes nothing: experts of each modality are ``expert_scope="per_modality"``, and
        its loss is ``AlignLoss(regression="l2", symmetric=False)``.

    Masked and padded tokens (mask False) are left out of every mean and of ``usage``; an item without a token gets zero
    vectors and ``valid`` False. Features of another precision are taken in that of the weights.

    Inputs of integers or bool are classes: they stand for one-hot vectors of width d_m. Items of one class have the
    same target, so that AlignLoss takes the classes as ``group_ids`` where none are given and a target is one class an
    item; as sources, or with several classes an item, equal ones are negatives of each other unless ``group_ids`` say
    otherwise. A class that is out of range is an error on the CPU; elsewhere and under torch.compile it is not looked
    for.

    ``torch.compile`` compiles each direction anew: with more than ``torch._dynamo.config.recompile_limit`` (8) of them
    raise that limit, or those beyond it are not compiled. Training with dropout is one graph with ``fullgraph=True`` or
    ``torch._dynamo.config.capture_scalar_outputs``; otherwise it breaks where the seed is drawn. The default backend
    draws it by a generator of its own: it follows ``torch.manual_seed``, with other masks than without compiling.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        hidden: int = 2048,
        ffn: int | None = None,
        num_experts: int = 12,
        top_k: int = 4,
        directions: str | Sequence[Direction] = "all",
        dropout: float = 0.1,
        cl_dim: int | None = None,
        expert_scope: str = "shared",
        gates: str | None = None,
        renorm: bool = False,
        pool: str = "after",
        preset: str = "code",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dims = dict(dims)
        check_names(dims)
        choose("MoEConnector", "preset", preset, ("code", "v6"))
        gates = gates or {"code": "shared", "v6": "per_branch"}[preset]
        choose("MoEConnector", "gates", gates, ("shared", "per_branch"))
        choose("MoEConnector", "expert_scope", expert_scope, ("shared", "per_modality"))
        choose("MoEConnector", "pool", pool, ("after", "before"))
        ffn, cl_dim = ffn or hidden, cl_dim or hidden
        sizes = {f"dims[{name!r}]": dim for name, dim in dims.items()}
        sizes |= {"hidden": hidden, "ffn": ffn, "cl_dim": cl_dim, "num_experts": num_experts}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MoEConnector: {name} must be an integer of at least 1, got {value!r}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MoEConnector: top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        if not 0 <= dropout < 1:
            raise ValueError(f"MoEConnector: dropout must be in [0, 1), got {dropout}")
        self.hidden, self.ffn, self.cl_dim = hidden, ffn, cl_dim
        self.num_experts, self.top_k, self.dropout = num_experts, top_k, dropout
        self.expert_scope, self.gates, self.renorm, self.pool, self.preset = expert_scope, gates, renorm, pool, preset
        to = {"device": device, "dtype": dtype}
        self._reset_gate(to)
        self.experts = Experts(num_experts, hidden, ffn, **to)
        growth.reset_experts_(self.experts)
        self.norms = nn.ModuleDict({branch: nn.LayerNorm(hidden, eps=1e-5, **to) for branch in BRANCHES})
        self.modalities = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.directions: list[Direction] = []
        wanted = list_directions(directions, list(dims))
        for name, dim in dims.items():
            growth.append_modality(self, name, dim)
        for direction in wanted:
            growth.append_direction(self, direction)

    def _reset_gate(self, to) -> None:
        per_branch, biased = self.gates == "per_branch", self.preset == "code"
        self.gate = nn.ParameterDict()
        shape = (len(BRANCHES), self.num_experts) if per_branch else (self.num_experts,)
        self.gate["weight"] = nn.Parameter(kaiming_(torch.empty(*shape, self.hidden, **to)))
        if biased:
            self.gate["bias"] = nn.Parameter(torch.zeros(*shape, **to))
        embedded = biased and not per_branch
        embedding = nn.Parameter(kaiming_(torch.empty(len(BRANCHES), self.hidden, **to))) if embedded else None
        self.register_parameter("branch_embedding", embedding)

    @classmethod
    def published(cls, num_experts: int = 12, **options) -> MoEConnector:
        """The configuration of the paper's code, for DINOv2-Large and LLaMA-3-8B: 140,617,740 parameters."""
        return cls({"image": 1024, "text": 4096}, num_experts=num_experts, **options)

    @classmethod
    def from_mlp(cls, mlp: nn.Module, dims: Mapping[str, int], num_experts=12, noise=0.02, **options) -> MoEConnector:
        """A connector whose experts start as copies of an MLP of two Linears and an exact GELU, all but the first with
        N(0, noise) added to their weights."""
        return growth.from_mlp(cls, mlp, dims, num_experts, noise, options)

    def config(self) -> dict:
        """What the constructor takes to make a connector of this form, as it has grown; fit for JSON."""
        names = (
            "hidden",
            "ffn",
            "num_experts",
            "top_k",
            "dropout",
            "cl_dim",
            "expert_scope",
            "gates",
            "renorm",
            "pool",
        )
        dims = {name: modality.dim for name, modality in self.modalities.items()}
        own = {name: getattr(self, name) for name in (*names, "preset")}
        return {"dims": dims, "directions": list(self.directions), **own}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items() if name != "directions")

    # --- Forward -----------------------------------------------------------------------------------------------------

    def _head(self, src: Sources, tgt: str) -> Head:
        sources = as_sources(src)
        key = label((sources, tgt))
        if key not in self.heads:
            raise ValueError(f"MoEConnector: directions must have {key}, got {', '.join(self.heads)}")
        return self.heads[key]

    def _tokens(self, name: str, modality: str, x: Tensor, mask: Tensor | None, pooling: bool):
        return as_tokens(name, modality, x, mask, self.modalities[modality].dim, self.experts.w1.dtype, pooling)

    def _rows_of(self, head: Head, sources: tuple[str, ...], x, mask) -> tuple[Tensor, Tensor | None, list[int]]:
        """h0 [B, T, D] of all sources, the mask [B, T], and how many of the T tokens are of each source."""
        parts, masks = [], []
        for name in sources:
            own = mask.get(name) if isinstance(mask, Mapping) else mask
            given, before = x[name] if isinstance(x, Mapping) else x, self.pool == "before"
            tokens, kept = self._tokens("x", name, given, own, before)
            if before and tokens.is_floating_point():
                tokens, kept = masked_mean(tokens, kept).unsqueeze(1), None if kept is None else kept.any(1, True)
            shift = head.embedding.get(name)
            parts.append(F.gelu(project(self.modalities[name].source, tokens, shift)))
            masks.append(kept)
        if any(kept is not None for kept in masks):
            masks = [
                part.new_ones(part.shape[:2], dtype=torch.bool) if kept is None else kept
                for part, kept in zip(parts, masks, strict=True)
            ]
            return torch.cat(parts, 1), torch.cat(masks, 1), [part.shape[1] for part in parts]
        return torch.cat(parts, 1), None, [part.shape[1] for part in parts]

    def _gate(self, rows_LND: Tensor, sources: tuple[str, ...], B: int, counts: list[int]) -> Tensor:
        """Logits [2 N, E] of both branches' rows."""
        L, N, D = rows_LND.shape
        weight, bias = self.gate["weight"], self.gate.get("bias")
        if self.gates == "shared":
            logits = router_logits(rows_LND.reshape(L * N, D), weight, bias)
        else:
            each = [router_logits(rows_LND[i], weight[i], None if bias is None else bias[i]) for i in range(L)]
            logits = torch.cat(each)
        if self.preset == "v6":
            biases = [
                self.modalities[name].gate_bias.unsqueeze(1).expand(L, count, -1)
                for name, count in zip(sources, counts, strict=True)
            ]
            bias_L1TE = torch.cat(biases, 1).unsqueeze(1).to(logits.dtype)
            logits = (logits.view(L, B, sum(counts), self.num_experts) + bias_L1TE).view(L * N, self.num_experts)
        return logits

    def _first_expert(self, sources: tuple[str, ...], counts: list[int], rows: int, device) -> Tensor | int:
        """Number of the expert that the gate's first row means, for each of the rows [rows, 1]."""
        if self.expert_scope == "shared":
            return 0
        order = list(self.modalities)
        firsts = [order.index(name) * self.num_experts for name in sources]
        if len(firsts) == 1:
            return firsts[0]
        of_tokens = [torch.full((count,), first, device=device) for first, count in zip(firsts, counts, strict=True)]
        return torch.cat(of_tokens).repeat(rows // max(sum(counts), 1)).unsqueeze(1)

    def forward(
        self,
        x: Tensor | Mapping[str, Tensor],
        src: Sources,
        tgt: str,
        mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> ConnectorOut:
        """Predicts modality ``tgt`` from ``src``.

        x : tokens [B, T, d_s], pooled vectors [B, d_s], or a dict of them by source. mask : bool [B, T] (or [B]: whole
        items), or a dict by source; True counts. ``None`` counts every token, as published.
        """
        sources, head = as_sources(src), self._head(src, tgt)
        if len(sources) > 1 and not isinstance(x, Mapping):
            raise ValueError(f"MoEConnector: x must be a dict of {list(sources)}, got {type(x).__name__}")
        if isinstance(x, Mapping) and (missing := [name for name in sources if name not in x]):
            raise ValueError(f"MoEConnector: x must have {missing}, got {list(x)}")
        if len(sources) > 1 and mask is not None and not isinstance(mask, Mapping):
            raise ValueError(f"MoEConnector: mask must be a dict of {list(sources)}, got {type(mask).__name__}")
        h0_BTD, keep_BT, counts = self._rows_of(head, sources, x, mask)
        B, T, D = h0_BTD.shape
        L, N = len(BRANCHES), B * T
        h0_ND = h0_BTD.reshape(N, D)
        if self.branch_embedding is None:
            rows_LND = h0_ND.unsqueeze(0).expand(L, N, D)
        else:
            rows_LND = h0_ND + self.branch_embedding.unsqueeze(1).to(h0_ND.dtype)
        logits = self._gate(rows_LND, sources, B, counts)
        weights, chosen = ops.moe_topk(logits, self.top_k, False)
        if self.renorm:
            weights = weights / weights.sum(1, keepdim=True)
        indices = chosen + self._first_expert(sources, counts, L * N, chosen.device)
        dropout = self.dropout if self.training else 0.0
        y = mix_experts(self.experts, rows_LND.reshape(L * N, D), weights, indices, "gelu", dropout, dropout).view(
            L, N, D
        )
        self._count(head, indices.view(L, N * self.top_k), keep_BT)
        pooled = []
        for i, branch in enumerate(BRANCHES):
            o = F.gelu(self.norms[branch](y[i])) + rows_LND[i]
            pooled.append(masked_mean(o.view(B, T, D), keep_BT))
        reg, cl = head.reg(pooled[0]), head.cl(pooled[1])
        valid = None if keep_BT is None else keep_BT.any(1)
        if valid is not None:
            reg, cl = reg.where(valid.unsqueeze(1), 0), cl.where(valid.unsqueeze(1), 0)
        flat = None if keep_BT is None else keep_BT.reshape(N)
        name, trained = label((sources, tgt)), self.gate["weight"].requires_grad
        logits_LNE, chosen_LNK = logits.view(L, N, self.num_experts), chosen.view(L, N, self.top_k)
        stats = tuple(
            RouterRecord(f"{name}/{branch}", logits_LNE[i], chosen_LNK[i], flat, self.num_experts, trained)
            for i, branch in enumerate(BRANCHES)
        )
        return ConnectorOut(reg, cl, stats, valid)

    @torch.no_grad()
    def _count(self, head: Head, indices_LR: Tensor, keep_BT: Tensor | None) -> None:
        once = torch.ones_like(indices_LR)
        if keep_BT is not None:
            once = keep_BT.reshape(1, -1, 1).expand(len(BRANCHES), -1, self.top_k).reshape(indices_LR.shape).long()
        head.usage.scatter_add_(1, indices_LR, once)

    def target(self, y: Tensor, tgt: str, mask: Tensor | None = None, detach: bool = True) -> TargetOut:
        """What predictions of ``tgt`` are compared with: the mean of its features y [B, T, d_t] or [B, d_t], and its
        contrastive projection.

        detach : no gradient flows into y, so that a trainable target encoder cannot make it easy to predict; the
            projection is trained all the same. False is the published form.
        """
        if tgt not in self.modalities or self.modalities[tgt].target is None:
            targets = [name for name, modality in self.modalities.items() if modality.target is not None]
            raise ValueError(f"MoEConnector: tgt must be one of {', '.join(targets)}, got {tgt!r}")
        tokens, kept = self._tokens("y", tgt, y.detach() if detach else y, mask, pooling=True)
        projection, valid, classes = self.modalities[tgt].target, None if kept is None else kept.any(1), None
        if tokens.is_floating_point():
            reg = masked_mean(tokens, kept)
            cl = projection(reg)
        else:
            classes = tokens.squeeze(1)  # [B]
            reg = F.one_hot(classes, self.modalities[tgt].dim).to(projection.weight.dtype)
            cl = project(projection, classes)  # rows of the weight instead of a product
        if valid is not None:
            reg, cl = reg.where(valid.unsqueeze(1), 0), cl.where(valid.unsqueeze(1), 0)
        return TargetOut(reg, cl, valid, classes)

    # --- Growth and use ----------------------------------------------------------------------------------------------

    def add_modality(
        self,
        name: str,
        dim: int,
        directions: str | Sequence[Direction] = "all",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> list[nn.Parameter]:
        """A new modality and its directions ("all": to and from every other), for a trained connector. Returns the
        new parameters: ``optimizer.add_param_group({"params": connector.add_modality("depth", 256)})``.

        What is there computes what it did. With experts per modality the new one gets its own, in the tensors of the
        others: ``optimizer`` must be given as in :meth:`add_experts`, they are not among the parameters that are
        returned, and where the connector is frozen they are too.
        """
        return growth.add_modality(self, name, dim, directions, optimizer)

    def add_experts(
        self,
        n: int,
        margin: float = 5.0,
        optimizer: torch.optim.Optimizer | None = None,
        logits: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """``n`` more experts (of each modality, with experts per modality). Their gate rows are zero but for the bias,
        which is their logit for every token: ``margin`` below the lowest of ``logits``, logits [..., E] that the gate
        gave for tokens of the user's (``record.logits.detach()`` of ``out.stats``). No such token chooses them then,
        and what is there computes almost what it did.

        Without ``logits`` the margin is below the lowest bias. How far logits are from biases is not known here: where
        they spread further than the margin, new experts are chosen at once.

        Parameters stay the same objects with larger tensors; moments that ``optimizer`` holds for them get zeros beside
        them. It must be given where one such as Adam has stepped, which cannot be seen from here: else its next step
        fails. Gradients are dropped. While a graph holds the parameters, nothing is changed and a RuntimeError raised.
        """
        growth.add_experts(self, n, margin, optimizer, logits)

    def set_top_k(self, k: int) -> None:
        """From now on K experts for each token and branch."""
        if not 1 <= k <= self.num_experts:
            raise ValueError(f"MoEConnector: top_k must be from 1 to num_experts = {self.num_experts}, got {k}")
        self.top_k = k

    def usage(self, direction: Direction) -> Tensor:
        """How often each expert was chosen since the last ``reset_usage``: int64 [2, experts], row 0 for the regression
        branch and 1 for the contrastive one. With experts per modality E columns for each, in their order."""
        if isinstance(direction, str) or len(direction) != 2:
            raise ValueError(f"usage: direction must be a pair (source, target), got {direction!r}")
        return self._head(*direction).usage.clone()

    def fingerprint(self, modality: str, encoder: nn.Module | None = None) -> str:
        """Of the weights that ``target(..., modality).cl`` depends on: the projection and, if given, the encoder. For
        :class:`mmbal.VectorStore`."""
        if modality not in self.modalities or self.modalities[modality].target is None:
            raise ValueError(f"MoEConnector: fingerprint must be of a target modality, got {modality!r}")
        return fingerprint_of(self.modalities[modality].target, encoder)

    def reset_usage(self) -> None:
        for head in self.heads.values():
            head.usage.zero_()
