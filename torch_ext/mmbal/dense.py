"""Ordinary two-layer MLPs: what a mixture is made from, and what one of its experts becomes again."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def _relu2(u):
    return F.relu(u).square()


ACTIVATIONS = {
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
    "identity": lambda u: u,
}


class DenseMLP(nn.Module):
    """``fc2(activation(fc1(x)))``, with the names of transformers' CLIPMLP."""

    def __init__(self, dim, hidden_dim, activation="quick_gelu", bias=True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = activation

    def forward(self, x):
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


@dataclass
class MLPParts:
    """The pieces of an MLP. ``sizes`` is (D, F, whether the Linears have biases)."""

    fc1: nn.Linear
    fc2: nn.Linear
    names: tuple[str, str]  # of the two Linears inside the MLP
    activation: str
    dropout: float
    output_dropout: float

    @property
    def sizes(self):
        return self.fc1.in_features, self.fc1.out_features, self.fc1.bias is not None


def find_linears(mlp: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in mlp.named_modules() if isinstance(m, nn.Linear)]


def describe_mlp(mlp: nn.Module, name: str, activation: str = "auto") -> MLPParts:
    """Takes an MLP of two Linears apart; raises a ValueError that says why it cannot be an expert."""
    linears = find_linears(mlp)
    if len(linears) != 2:
        raise ValueError(f"{name} must be an MLP of two nn.Linear, {type(mlp).__name__} has {len(linears)}")
    (name1, fc1), (name2, fc2) = linears
    if (fc1.in_features, fc1.out_features) != (fc2.out_features, fc2.in_features):
        raise ValueError(
            f"{name} must map D -> F -> D, got {fc1.in_features} -> {fc1.out_features} and "
            f"{fc2.in_features} -> {fc2.out_features}"
        )
    if (fc1.bias is None) != (fc2.bias is None):
        raise ValueError(f"{name} must have a bias in both Linears or in neither")
    own = {id(p) for fc in (fc1, fc2) for p in fc.parameters()}
    others = [p for p, value in mlp.named_parameters() if id(value) not in own]
    if others:
        raise ValueError(f"{name} must have no parameters but its two Linears, got {', '.join(others)}")
    dropouts = _find_dropouts(mlp, fc2)
    if isinstance(mlp, DenseMLP) and activation == "auto":
        activation = mlp.activation
    if activation == "auto":
        activation = _recognise_activation(mlp, name)
    elif activation not in ACTIVATIONS:
        raise ValueError(f"activation must be auto or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return MLPParts(fc1, fc2, (name1, name2), activation, *dropouts)


def _find_dropouts(mlp, fc2):
    """(probability before the second Linear, probability after it), by the order in which modules are registered."""
    before, after, seen_fc2 = 0.0, 0.0, False
    for module in mlp.modules():
        if module is fc2:
            seen_fc2 = True
        elif isinstance(module, nn.Dropout):
            if seen_fc2:
                after = module.p
            else:
                before = module.p
    return before, after


@torch.no_grad()
def _recognise_activation(mlp, name):
    """The activation by what it computes, whatever its class is called."""
    plain = (nn.Linear, nn.Dropout, nn.Identity)
    candidates = [m for m in mlp.modules() if not list(m.children()) and not isinstance(m, plain)]
    probe = torch.linspace(-6, 6, 257, dtype=torch.float64)
    if len(candidates) == 1:
        values = candidates[0](probe)
        for activation, function in ACTIVATIONS.items():
            if values.shape == probe.shape and torch.allclose(values, function(probe), rtol=0, atol=1e-6):
                return activation
    raise ValueError(f"{name}: its activation was not recognised; say activation= one of {', '.join(ACTIVATIONS)}")
