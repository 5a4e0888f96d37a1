"""How a connector is made and grows: experts, modalities, directions; experts from a trained MLP."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmbal.altmoe.parts import (
    BRANCHES,
    Direction,
    Head,
    Modality,
    as_sources,
    check_names,
    kaiming_,
    label,
    list_directions,
)
from mmbal.dense import describe_mlp
from mmbal.moe import Experts


@torch.no_grad()
def reset_experts_(experts: Experts) -> None:
    kaiming_(experts.w1)
    kaiming_(experts.w2)
    experts.b1.zero_()
    experts.b2.zero_()


def append_modality(connector, name: str, dim: int, optimizer=None) -> None:
    """The modality without any role; with experts per modality also its own experts, but for the first."""
    if connector.expert_scope == "per_modality" and connector.modalities:
        growth = Growth(optimizer)
        plan_experts(growth, connector, connector.num_experts, 1)
        growth.commit()
        enlarge_usage(connector, connector.num_experts, 1)
    gate_biases = connector.num_experts if connector.preset == "v6" else 0
    connector.modalities[name] = Modality(dim, connector.hidden, connector.cl_dim, gate_biases)


def append_direction(connector, direction: Direction) -> None:
    (src, tgt), to = direction, like(connector)
    sources = as_sources(src)
    for name in sources:
        connector.modalities[name].serve(source=True, target=False, **to)
    connector.modalities[tgt].serve(source=False, target=True, **to)
    connector.heads[label(direction)] = Head(
        {name: connector.modalities[name].dim for name in sources},
        connector.modalities[tgt].dim,
        connector.hidden,
        connector.cl_dim,
        connector.experts.w1.shape[0],
        connector.preset == "code",
        **to,
    )
    connector.directions.append(direction)


def add_modality(connector, name: str, dim: int, directions, optimizer) -> list[nn.Parameter]:
    check_names([name])
    if name in connector.modalities:
        raise ValueError(f"add_modality: name must be new, got {name!r}")
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"add_modality: dim must be an integer of at least 1, got {dim!r}")
    everyone = [*connector.modalities, name]
    wanted = list_directions(directions, everyone)
    if isinstance(directions, str):
        wanted = [direction for direction in wanted if name in direction]
    for direction in wanted:
        if name not in (*as_sources(direction[0]), direction[1]):
            raise ValueError(f"add_modality: directions must be of the new modality {name!r}, got {label(direction)}")
    before = {id(p) for p in connector.parameters()}
    append_modality(connector, name, dim, optimizer)
    for direction in wanted:
        append_direction(connector, direction)
    connector.train(connector.training)
    return [p for p in connector.parameters() if id(p) not in before]


def add_experts(connector, n: int, margin: float, optimizer, logits) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"add_experts: n must be an integer of at least 1, got {n!r}")
    if not margin >= 0:
        raise ValueError(f"add_experts: margin must not be negative, got {margin}")
    lowest = None if logits is None else _lowest(logits, connector.num_experts)
    groups = len(connector.modalities) if connector.expert_scope == "per_modality" else 1
    growth = Growth(optimizer)
    plan_experts(growth, connector, n * groups, groups)
    weight = connector.gate["weight"]
    growth.plan(weight, weight.new_zeros(*weight.shape[:-2], n, weight.shape[-1]), -2, 1)
    biases = [modality.gate_bias for modality in connector.modalities.values() if modality.gate_bias is not None]
    for bias in [connector.gate["bias"]] if "bias" in connector.gate else biases:
        below = bias.detach().amin(-1, keepdim=True) if lowest is None else bias.new_full((*bias.shape[:-1], 1), lowest)
        growth.plan(bias, (below - margin).expand(*bias.shape[:-1], n), -1, 1)
    growth.commit()
    enlarge_usage(connector, n * groups, groups)
    connector.num_experts += n
    for modality in connector.modalities.values():
        modality._sizes = (*modality._sizes[:2], connector.num_experts if connector.preset == "v6" else 0)


def _lowest(logits: Tensor | Sequence[Tensor], num_experts: int) -> float:
    tensors = [logits] if isinstance(logits, Tensor) else list(logits)
    if not tensors or any(t.dim() < 1 or t.shape[-1] != num_experts or t.numel() == 0 for t in tensors):
        found = [list(t.shape) for t in tensors]
        raise ValueError(f"add_experts: logits must be [..., {num_experts}], at least one row, got {found}")
    lowest = min(float(t.detach().amin()) for t in tensors)
    if not math.isfinite(lowest):
        raise ValueError(f"add_experts: logits must be finite, got {lowest}")
    return lowest


def like(connector) -> dict:
    """Where the connector is now, and its dtype."""
    return {"device": connector.experts.w1.device, "dtype": connector.experts.w1.dtype}


def plan_experts(growth: Growth, connector, n: int, groups: int) -> None:
    """``n`` fresh experts; of ``groups`` equal groups, each gets its share of them at its end."""
    fresh = Experts(n, connector.hidden, connector.ffn, **like(connector))
    reset_experts_(fresh)
    for name, parameter in connector.experts.named_parameters():
        growth.plan(parameter, getattr(fresh, name).detach(), 0, groups)


def enlarge_usage(connector, n: int, groups: int) -> None:
    for head in connector.heads.values():
        head.usage = insert(head.usage, head.usage.new_zeros(len(BRANCHES), n), 1, groups)


def insert(old: Tensor, added: Tensor, dim: int, groups: int) -> Tensor:
    """``added`` along ``dim``, an equal part of it at the end of each of ``groups`` equal parts of ``old``."""
    pairs = zip(old.chunk(groups, dim), added.to(old).chunk(groups, dim), strict=True)
    return torch.cat([part for pair in pairs for part in pair], dim)


class Growth:
    """Parameters that become larger, all of them or none. In place, so that optimizers and names keep them; moments of
    their shape that ``optimizer`` has get zeros."""

    def __init__(self, optimizer: torch.optim.Optimizer | None):
        self._optimizer = optimizer
        self._planned: list[tuple[nn.Parameter, nn.Parameter, dict[str, Tensor]]] = []

    @torch.no_grad()
    def plan(self, parameter: nn.Parameter, added: Tensor, dim: int, groups: int) -> None:
        larger = nn.Parameter(insert(parameter, added, dim, groups), requires_grad=parameter.requires_grad)
        state = self._optimizer.state.get(parameter, {}) if self._optimizer is not None else {}
        moments = {
            name: insert(value, torch.zeros_like(added), dim, groups)
            for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        self._planned.append((parameter, larger, moments))

    def commit(self) -> None:
        """Gradients are dropped: those of the larger tensors are None."""
        done, held = [], any(_is_held(parameter) for parameter, _, _ in self._planned)
        try:
            for parameter, larger, _ in () if held else self._planned:
                torch.utils.swap_tensors(parameter, larger)
                done.append((parameter, larger))
        except RuntimeError:
            held = True
            for parameter, larger in done:
                torch.utils.swap_tensors(parameter, larger)
        if held:
            raise RuntimeError(
                "a connector cannot grow while a graph holds its parameters: drop the outputs of earlier forwards first"
            )
        for parameter, _, moments in self._planned:
            if moments:
                self._optimizer.state[parameter].update(moments)


def _is_held(parameter: nn.Parameter) -> bool:
    """Whether ``swap_tensors`` would refuse it, which it says only after it has spoilt the graphs of those before."""
    count = parameter._use_count()
    if weakref.getweakrefs(parameter) or count > 2:
        return True
    if count < 2:
        return False
    if not parameter.requires_grad:
        return True
    edge = torch.autograd.graph.get_gradient_edge(parameter)  # the node of a graph that is spent may hold it, no more
    held = parameter._use_count() > 2
    del edge
    return held


def from_mlp(cls, mlp: nn.Module, dims: Mapping[str, int], num_experts: int, noise: float, options: dict):
    if not noise >= 0:
        raise ValueError(f"from_mlp: noise must not be negative, got {noise}")
    try:
        parts = describe_mlp(mlp, "mlp")
    except ValueError as error:
        raise ValueError(f"MoEConnector.from_mlp: {error}") from None
    hidden, ffn, bias = parts.sizes
    if parts.activation != "gelu" or not bias:
        found = f"{parts.activation} {'with' if bias else 'without'} biases"
        raise ValueError(f"MoEConnector.from_mlp: mlp must have an exact GELU and biases, got {found}")
    if given := {"hidden", "ffn"} & set(options):
        raise ValueError(f"MoEConnector.from_mlp: mlp says {sorted(given)}: they must not be given")
    weight = parts.fc1.weight
    own = {"dropout": parts.dropout, "device": weight.device, "dtype": weight.dtype, "top_k": min(4, num_experts)}
    options = own | options
    connector = cls(dims, hidden, ffn, num_experts, **options)
    with torch.no_grad():
        for name, value in zip(("w1", "b1", "w2", "b2"), _tensors(parts), strict=True):
            stacked = getattr(connector.experts, name)
            stacked.copy_(value.expand_as(stacked))
            if name.startswith("w"):
                stacked[1:] += noise * torch.randn_like(stacked[1:])
    return connector.train(mlp.training)


def _tensors(parts):
    return parts.fc1.weight, parts.fc1.bias, parts.fc2.weight, parts.fc2.bias
