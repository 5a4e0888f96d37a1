"""mmbal's kernels as an experts implementation of transformers, under the name "mmbal":

>>> model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="mmbal")

For models whose experts are two plain matrices with an activation between them (``has_gate=False``) that is among
``mmbal.dense.ACTIVATIONS``. In transformers 5.24 that is one architecture, NemotronH (relu2), with or without its
latent projection; the experts of every other model in its registry are gated, which is refused at the first forward.
Models that do not use the registry keep their own experts: transformers does not look at the argument there.
Transformers before 5 has no registry.

Both passes run in mmbal's kernels, sums over K in float32, the routing weights in float32. Experts on several devices
(expert parallelism of transformers) are served; pairs of a token and an expert that lives elsewhere cost as much as
those that live here.
"""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from mmbal._library import ops
from mmbal.dense import ACTIVATIONS
from mmbal.routing import real_dtype

NAME = "mmbal"

# Classes of ACT2FN's activations -> ours, by name: nothing is imported, and torch.compile can look one up. What they
# compute is compared in the tests.
_ACTIVATIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.LinearActivation": "identity",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.ReLUSquaredActivation": "relu2",
    "transformers.activations.SiLUActivation": "silu",
}


def mmbal_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [N, D], top_k_index [N, K], top_k_weights [N, K] -> [N, D], as transformers calls it.

    ``self`` has up_proj [E, F, D] and down_proj [E, D, F] (the other way round with ``is_transposed``: then they are
    copied in each call), with ``has_bias`` up_proj_bias [E, F] and down_proj_bias [E, D], and ``act_fn``.

    Raises
    ------
    ValueError
        For gated experts, experts with a norm after them, and an activation that mmbal does not have.
    """
    activation = _served_activation(self)
    w1_EFD, w2_EDF = self.up_proj, self.down_proj
    if self.is_transposed:
        w1_EFD, w2_EDF = w1_EFD.transpose(1, 2), w2_EDF.transpose(1, 2)
    b1_EF, b2_ED = (self.up_proj_bias, self.down_proj_bias) if self.has_bias else (None, None)
    x_ND = hidden_states.to(w1_EFD.dtype)  # norms give float32 under autocast
    weights_NK, indices_NK = top_k_weights.to(real_dtype(x_ND.dtype)), top_k_index.long()
    if self._is_expert_parallel:  # num_experts stands for an expert on another device
        elsewhere_NK = indices_NK >= self.num_experts
        weights_NK = weights_NK.masked_fill(elsewhere_NK, 0)
        indices_NK = indices_NK.masked_fill(elsewhere_NK, 0)
    routing = ops.moe_dispatch(indices_NK, self.num_experts)
    y_ND = ops.expert_mlp(x_ND, w1_EFD, b1_EF, w2_EDF, b2_ED, weights_NK, *routing, activation=activation)
    return y_ND.to(hidden_states.dtype)


def _served_activation(experts: nn.Module) -> str:
    name = type(experts).__name__
    if experts.has_gate:
        raise ValueError(
            f'experts_implementation="{NAME}": experts must be two plain matrices, those of {name} are gated; use '
            '"grouped_mm" or "eager"'
        )
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f'experts_implementation="{NAME}": experts must have no norm after them, those of {name} have')
    activation = _ACTIVATIONS.get(f"{type(experts.act_fn).__module__}.{type(experts.act_fn).__qualname__}")
    if activation is None:
        raise ValueError(
            f'experts_implementation="{NAME}": the activation must be one of {", ".join(sorted(ACTIVATIONS))}, '
            f"{name} has {type(experts.act_fn).__name__}"
        )
    return activation


def _registry():
    """transformers' registry of experts implementations, None where it has none."""
    try:
        return importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    except (ImportError, AttributeError):
        return None


def register() -> None:
    registry = _registry()
    if registry is not None:
        registry.register(NAME, mmbal_experts_forward)


def experts_registry_status() -> str:
    """One line that says whether ``experts_implementation="mmbal"`` works here. Imports transformers."""
    try:
        import transformers
    except ImportError as error:
        return f"not available: transformers cannot be imported: {error}"
    registry = _registry()
    if registry is None:
        return f"not available: transformers {transformers.__version__} has no registry of experts (5.0 and later have)"
    if NAME not in registry:
        return f"not registered with transformers {transformers.__version__}"
    return f'experts_implementation="{NAME}" is registered with transformers {transformers.__version__}'
