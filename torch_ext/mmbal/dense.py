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
    dropouts = _find_dropouts(mlp, name)
    if isinstance(mlp, DenseMLP) and activation == "auto":
        activation = mlp.activation
    if activation == "auto":
        activation = _recognise_activation(mlp, name)
    elif activation not in ACTIVATIONS:
        raise ValueError(f"activation must be auto or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    parts = MLPParts(fc1, fc2, (name1, name2), activation, *dropouts)
    _verify(mlp, parts, name)
    return parts


@torch.no_grad()
def _verify(mlp, parts, name):
    """Whether the MLP computes fc2(activation(fc1(x))), on a few rows: modules do not tell what forward does."""
    weight = parts.fc1.weight
    if weight.is_meta:
        return
    x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    training = mlp.training
    mlp.eval()
    try:
        got = mlp(x.clone())
    except Exception as error:
        raise ValueError(f"{name} must map [N, D] to [N, D], calling it failed: {error}") from error
    finally:
        mlp.train(training)
    expected = parts.fc2(ACTIVATIONS[parts.activation](parts.fc1(x)))
    tolerance = 0.05 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"{name} must compute fc2({parts.activation}(fc1(x))), {type(mlp).__name__} computes something else"
        )


def _find_dropouts(mlp, name):
    """(probability on the hidden units, probability on the output) of an MLP whose modules are registered in the order
    of use, as in a Sequential; one that may be used elsewhere is refused."""
    found, position = {}, 0  # position: how many of the two Linears were passed
    for module in mlp.modules():
        if isinstance(module, nn.Linear):
            position += 1
        elif isinstance(module, nn.Dropout) and module.p > 0:
            if position == 0 or position in found:
                raise ValueError(f"{name} must have at most one nn.Dropout after each Linear")
            found[position] = module.p
    return found.get(1, 0.0), found.get(2, 0.0)


@torch.no_grad()
def _recognise_activation(mlp, name):
    """The activation by what it computes, whatever its class is called."""
    plain = (nn.Linear, nn.Dropout, nn.Identity)
    candidates = [m for m in mlp.modules() if not list(m.children()) and not isinstance(m, plain)]
    probe = torch.linspace(-50, 50, 2001, dtype=torch.float64)
    if len(candidates) == 1:
        values = candidates[0](probe.clone())
        for activation, function in ACTIVATIONS.items():
            if values.shape == probe.shape and torch.allclose(values, function(probe), rtol=0, atol=1e-6):
                return activation
    raise ValueError(f"{name}: its activation was not recognised; say activation= one of {', '.join(ACTIVATIONS)}")
