"""What a stage of MCL trains."""

from torch import nn

from mmbal.dense import find_linears
from mmbal.moe import MoEMLP


def ffn_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that MCL trains: the two Linears of every sub-module called ``mlp``."""
    names = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "mlp" and not isinstance(module, MoEMLP):
            names += [f"{name}.{linear}.{p}" for linear, m in find_linears(module) for p, _ in m.named_parameters()]
    if not names:
        raise ValueError(f"ffn_parameters: model must have mlp blocks, {type(model).__name__} has none")
    return names
