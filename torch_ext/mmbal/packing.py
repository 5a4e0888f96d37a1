"""Expert weights kept once more in the layout that the kernels read, for inference."""

import functools
import warnings

import torch
from torch import Tensor, nn

from mmbal._library import ops


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=4)


def _version(weight):
    """Counts changes in place; tensors made in inference mode have none."""
    return None if weight.is_inference() else weight._version


class PackedWeights:
    """The panels of one layer's w1 and w2, and which weights they were made of."""

    def __init__(self, experts):
        self.weights = (experts.w1, experts.w2)
        self.versions = tuple(map(_version, self.weights))
        self.panels = ops.expert_mlp_pack(experts.w1.detach(), experts.w2.detach())

    def panels_for(self, layer, x: Tensor) -> Tensor | None:
        """The panels where they stand for the layer's weights as they are now and nothing may be trained, else None."""
        if torch.compiler.is_compiling():
            return None
        experts = layer.experts
        if torch.is_grad_enabled() or layer.training:
            layer._packed = None
            _warn_once("mmbal.pack: a forward with gradients enabled dropped the packed weights; use torch.no_grad()")
            return None
        if experts.w1 is not self.weights[0] or experts.w2 is not self.weights[1]:
            _warn_once("mmbal.pack: packed weights are not used for other weights than they were made of")
            return None
        if self.versions != tuple(map(_version, self.weights)):
            layer._packed = None
            _warn_once(
                "mmbal.pack: weights were changed in place, which dropped the packed ones; call mmbal.pack again"
            )
            return None
        if x.dtype != experts.w1.dtype or torch.is_autocast_enabled(x.device.type):
            _warn_once("mmbal.pack: packed weights are not used under autocast or for another dtype than theirs")
            return None
        return self.panels


def _lie_right(experts) -> bool:
    """Whether the kernels read the weights as fast as a copy of them."""
    rows = (w.shape[-1] * w.element_size() for w in (experts.w1, experts.w2))
    return experts.w1.is_cuda and all(row % 16 == 0 for row in rows)


def pack(model: nn.Module) -> int:
    """Keep the weights of every mixture in ``model`` once more, laid out as the kernels read them: faster inference.

    For a model in evaluation mode, run under ``torch.no_grad()`` or ``torch.inference_mode()``. On a CPU an
    expert with up to 128 tokens mostly reads its weights themselves, which is faster still; with more, packing is saved
    in every call. A GPU reads rows 16 bytes at a time, and weights whose rows are whole 16 bytes lie right already: no
    copy of them is made there.

    The copies are dropped by ``train()``, by ``load_state_dict``, by moving or casting the model, by changing the
    weights in place and by any forward with gradients enabled; they are not saved. Call ``pack`` again after changes
    that torch does not count: writing through ``.data``, and fused optimizers. A model compiled with ``torch.compile``
    does not use them.

    Returns the bytes that the copies take. On a CPU they are those of the expert weights, rounded up to whole tiles, in
    float32, float64 and, on processors that multiply bfloat16, bfloat16; twice them for half types that are multiplied
    as float32.
    """
    from mmbal.moe import MoEMLP, _is_split

    layers = [module for module in model.modules() if isinstance(module, MoEMLP)]
    if not layers:
        raise ValueError("pack: model has no MoEMLP; call mmbal.upcycle first")
    for layer in layers:
        if layer.training:
            raise ValueError("pack: model must be in evaluation mode, call model.eval() first")
        if _is_split(layer.experts.w1):
            raise NotImplementedError(
                "pack: experts are split over processes; load the full state dict into a whole model first"
            )
        if layer.experts.w1.device.type not in ("cpu", "cuda"):
            raise ValueError(f"pack: the weights must be on a CPU or a GPU, got {layer.experts.w1.device}")
    layers = [layer for layer in layers if not _lie_right(layer.experts)]
    for layer in layers:
        layer._packed = PackedWeights(layer.experts)
    return sum(layer._packed.panels.nbytes for layer in layers)
