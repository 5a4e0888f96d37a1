"""OGM-GE, the best-known rival: it slows down the encoder of the modality that is ahead.

X. Peng, Y. Wei, A. Deng, D. Wang, D. Hu: "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022,
arXiv 2203.15332. Written from the paper:

    s^u = sum_i softmax(o^u_i)[y_i]                          o^u the logits of modality u on its own
    rho^u = s^u / s^v                                        v the other modality
    k^u = 1 - tanh(alpha rho^u) if rho^u > 1, else 1
    gradient of encoder u <- k^u gradient + noise            noise ~ N(0, variance of the gradient's elements)

The paper has two modalities. With more, s^v is here the mean score of the others.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class OGM:
    """Changes the gradients of the encoders between backward and the optimizer's step.

    All parameters of an encoder are modulated, as in the paper. The noise (GE) has for each tensor the standard
    deviation that its gradient has before it is modulated.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], alpha: float, seed: int = 0):
        self.parameters = {name: [p for p in module.parameters()] for name, module in encoders.items()}
        self.alpha = alpha
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def coefficients(self, logits: Mapping[str, Tensor], target: Tensor) -> dict[str, float]:
        """k of each modality from its own logits [B, C] and the classes [B]."""
        scores = {
            name: float(own.softmax(1).gather(1, target[:, None]).sum(dtype=torch.float64))
            for name, own in logits.items()
        }
        total, others = sum(scores.values()), len(scores) - 1
        tiny = torch.finfo(torch.float64).tiny
        result = {}
        for name, score in scores.items():
            ratio = score * others / max(total - score, tiny)
            result[name] = 1 - math.tanh(self.alpha * ratio) if ratio > 1 else 1.0
        return result

    @torch.no_grad()
    def step(self, logits: Mapping[str, Tensor], target: Tensor) -> dict[str, float]:
        """Modulate the gradients in place and return the coefficients."""
        coefficients = self.coefficients(logits, target)
        for name, parameters in self.parameters.items():
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                deviation = parameter.grad.std(correction=0)
                noise = torch.empty_like(parameter.grad).normal_(generator=self.generator)
                parameter.grad.mul_(coefficients[name]).addcmul_(noise, deviation)
        return coefficients
