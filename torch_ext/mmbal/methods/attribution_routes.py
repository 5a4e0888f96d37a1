"""What AttributionRegularizer is made of: the score of a decision, a head that runs by itself, and the routes from the
gradients for embeddings to those for the head's parameters.

Letters: B samples, M modalities, C classes. s_b is the score of sample b, e_i the embeddings of modality i, g_i the
gradient of s_b for them, v_i that of the regulariser for g_i. Every route gives the gradient of
h = sum_b sum_i <v_i, g_i> for the parameters, v kept fixed (arXiv 2404.02359 for the regulariser).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from mmbal.methods import rows

Run = Callable[[Sequence[Tensor]], Tensor]
Gradients = list[Tensor | None]

# Beginnings of the names of nodes whose function has a kink: a difference across it sees what autograd takes for zero.
KINKS = ("Relu", "LeakyRelu", "Prelu", "Rrelu", "Hard", "Softshrink", "Threshold", "Abs", "Clamp", "Max", "Min", "Amax")
KINKS += ("Amin", "AdaptiveMax", "FractionalMax", "Sort", "Topk")
KINK_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)
KINK_MODULES += (nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
FUSED_ATTENTION = tuple(f"ScaledDotProduct{kind}" for kind in ("Flash", "Efficient", "Cudnn", "Fused"))
NO_SECOND = (
    "the head has no second derivative: take mode='difference' if it is smooth, or 'forward' if it has forward AD"
)


def decided(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """[B] or [B, T] classes that scores are of: the largest logit's (the first of equal ones), or the labels where they
    are not negative. logits [B], [B, C] or [B, T, C]; labels [B] or [B, T]."""
    logits = logits.detach()
    if logits.dim() == 1:
        logits = logits.unsqueeze(1)
    predicted = logits.argmax(-1)
    if target is None or logits.shape[-1] == 1:  # a single output has one attribution, whatever the label is
        return predicted
    if target.dtype != torch.int64 or target.shape not in (predicted.shape, predicted.shape[:1]):
        raise ValueError(
            f"AttributionRegularizer: target must be int64 {list(predicted.shape)}, "
            f"got {target.dtype} {list(target.shape)}"
        )
    # On a GPU a wrong label ends the launch that it is an index of.
    if target.numel() and rows.at_hand(target) and int(target.max()) >= logits.shape[-1]:
        raise ValueError(
            f"AttributionRegularizer: target must be below C = {logits.shape[-1]}, got {int(target.max())}"
        )
    target = target.view(*target.shape, *[1] * (predicted.dim() - target.dim()))
    return torch.where(target < 0, predicted, target)


def score_of(logits: Tensor, classes: Tensor, score: str) -> Tensor:
    """[B] scores in float32 (float64 stays), outside autocast; several positions [B, T, C] are averaged.

    odds : z[c] - log sum over the other classes of exp z, the log-odds of the class, whose attributions are the
        probability's and which never saturates. logit : z[c]. One output: |z|.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    if z.dim() == 1:
        z = z.unsqueeze(1)
    if z.shape[-1] == 1:
        s = z.squeeze(-1).abs()
    else:
        chosen = classes.unsqueeze(-1)
        s = z.gather(-1, chosen).squeeze(-1)
        if score == "odds":
            itself = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, chosen, True)
            others = z.masked_fill(itself, -torch.inf)
            largest = others.detach().amax(-1, keepdim=True)
            alone = largest == -torch.inf  # no other class is left: the odds are the logit, but for a constant
            largest = largest.masked_fill(alone, 0.0)
            # torch.logsumexp has no second derivative by forward AD.
            total = (others - largest).exp().sum(-1, keepdim=True).masked_fill(alone, 1.0)
            s = s - (total.log() + largest).squeeze(-1)
    return s if s.dim() == 1 else s.flatten(1).mean(1)


def unwrapped(head: Callable) -> Callable:
    """Without torch.compile and DistributedDataParallel around it."""
    while True:
        inner = getattr(head, "_orig_mod", None) or getattr(head, "_torchdynamo_orig_callable", None)
        if inner is None and isinstance(head, nn.parallel.DistributedDataParallel):
            inner = head.module
        if inner is None:
            return head
        head = inner


def as_usual(device: str) -> ExitStack:
    """A context in which gradients are recorded and nothing is cast; it costs nothing where that is so already."""
    stack = ExitStack()
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
    if not torch.is_grad_enabled():
        stack.enter_context(torch.enable_grad())
    if torch.is_autocast_enabled(device):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


class HeadAlone:
    """Runs a head on embeddings by itself, as often as a route needs, and leaves no trace: outside autocast, attention
    by torch's plain formula (the fused kernels have no second derivative), norms by their running statistics and
    without updating them, spectral norms without another iteration, dropout with the same numbers in every run and
    torch's generators as they were. A compiled head runs uncompiled: compiled graphs have no second derivative."""

    def __init__(self, head: Callable, parameters: Callable[[], list]):
        self.head, self._parameters = unwrapped(head), parameters
        self.concatenates = isinstance(self.head, (nn.Linear, nn.Sequential)) and type(self.head).forward in (
            nn.Linear.forward,
            nn.Sequential.forward,
        )
        owner = self.head if isinstance(self.head, nn.Module) else getattr(self.head, "__self__", None)
        self.owner = owner if isinstance(owner, nn.Module) else None

    @property
    def modules(self) -> list[nn.Module]:
        """What is known of them: of a function none."""
        return [] if self.owner is None else list(self.owner.modules())

    @property
    def dtype(self) -> torch.dtype | None:
        own = self.head.parameters() if isinstance(self.head, nn.Module) else self._parameters()
        return next((p.dtype for p in own if p.is_floating_point()), None)

    @property
    def repeats(self) -> bool:
        """Whether another run gives what the model's own run gave: no dropout, no statistics of the batch."""
        if not isinstance(self.head, nn.Module):
            return False
        for m in self.modules:
            drops = m.p if isinstance(m, _DropoutNd) else getattr(m, "dropout", 0)
            if m.training and (isinstance(m, _NormBase) or (isinstance(drops, float) and drops > 0)):
                return False
        return True

    def leaves(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """Leaf copies in the head's dtype; they share memory where nothing changes."""
        dtype = self.dtype
        cast = [e.detach() if dtype is None else e.detach().to(dtype) for e in embeddings]
        return [(e.clone() if e.is_inference() else e).requires_grad_() for e in cast]

    def __call__(self, embeddings: Sequence[Tensor]) -> Tensor:
        with self._alone(embeddings[0].device):
            if self.concatenates:
                logits = self.head(torch.cat(list(embeddings), -1))
            elif isinstance(self.head, nn.ModuleDict):
                logits = sum(part(e) for part, e in zip(self.head.values(), embeddings, strict=True))
            else:
                logits = self.head(*embeddings)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"AttributionRegularizer: head must give logits [B, C], got {got}")
        return logits

    @contextmanager
    def _alone(self, device: torch.device):
        with ExitStack() as stack:

            def keep_state(module: nn.Module, inputs) -> None:
                norm = isinstance(module, _NormBase) and module.running_mean is not None
                spectral = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
                if module.training and (norm or spectral or isinstance(module, _SpectralNorm)):
                    module.training = False
                    stack.callback(setattr, module, "training", True)

            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(register_module_forward_pre_hook(keep_state).remove)
            yield


# --- What a graph is made of ------------------------------------------------------------------------------------------


def nodes(tensor: Tensor, ends: Sequence = ()) -> Iterator:
    """The nodes of the graph behind a tensor; those behind the nodes ``ends`` are not followed."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in ends:
            waiting += [following for following, _ in node.next_functions]


def between(logits: Tensor, embeddings: Sequence[Tensor]) -> set:
    """The nodes that lie between: what is beside them is derived once only."""
    ends = {get_gradient_edge(e).node for e in embeddings}
    above: dict = {}
    for node in nodes(logits, ends):
        if node not in ends or node is logits.grad_fn:
            for following, _ in node.next_functions:
                above.setdefault(following, []).append(node)
    found, waiting = {logits.grad_fn} & ends, [node for end in ends for node in above.get(end, [])]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += above.get(node, [])
    return found


def check_second_order(logits: Tensor, embeddings: Sequence[Tensor]) -> None:
    for name in (type(node).__name__ for node in between(logits, embeddings)):
        if name.startswith("CompiledFunction"):
            raise RuntimeError(
                "AttributionRegularizer: the logits come from a compiled graph, which has no second derivative: "
                "leave the head uncompiled, or give head=, which runs uncompiled"
            )
        if name.startswith("CheckpointFunction"):
            raise RuntimeError(
                "AttributionRegularizer: checkpoint(use_reentrant=True) does not work with torch.autograd.grad: "
                "use_reentrant=False does"
            )
        if name.startswith(FUSED_ATTENTION):
            raise RuntimeError(
                f"AttributionRegularizer: {name} has no second derivative: call the model under "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or give head=, or outside of it mode='difference'"
            )


def check_differentiable(gradients: Sequence[Tensor], embeddings: Sequence[Tensor]) -> None:
    """torch.autograd.grad would pass by the nodes that stand for a missing derivative, and be wrong."""
    ends = {get_gradient_edge(e).node for e in embeddings}
    for g in gradients:
        for node in nodes(g, ends):
            if type(node).__name__ == "Error" or "NotImplemented" in type(node).__name__:
                raise RuntimeError(f"AttributionRegularizer: {NO_SECOND}")


def check_smooth(logits: Tensor, embeddings: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
    """As far as it can be found out: a function written by hand may hide a kink."""
    found = [type(m).__name__ for m in modules if isinstance(m, KINK_MODULES)]
    for node in between(logits, embeddings):
        name = type(node).__name__
        # x below 0 has the slope alpha input_scale there: CELU is smooth, ELU with alpha 1 too, SELU is not.
        bent = name.startswith("Elu") and abs(node._saved_alpha * node._saved_input_scale - 1) > 1e-6
        if bent or name.startswith(KINKS):
            found.append(name.split("Backward")[0])
    if found:
        raise ValueError(
            f"AttributionRegularizer: mode must not be 'difference' where the head has kinks, got {found[0]}: "
            "differences across a kink are wrong by any amount; take 'double'"
        )


def check_not_upstream(embeddings: dict[str, Tensor], parameters: Sequence[Tensor]) -> None:
    """A parameter that feeds the embeddings would get the regulariser's gradient through them."""
    ids = {id(p) for p in parameters}
    for name, embedding in embeddings.items():
        for node in nodes(embedding):
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in ids:
                raise ValueError(
                    f"AttributionRegularizer: parameters must be the head's alone, got one {list(variable.shape)} that "
                    f"the embeddings of {name!r} depend on: name the head's parameters"
                )


# --- First order ------------------------------------------------------------------------------------------------------


def gradients_for(score: Tensor, embeddings: Sequence[Tensor], graph: bool, keep: bool = False) -> Gradients:
    """g of each modality, None where the score does not depend on one. keep: the graph behind is needed again."""
    if not score.requires_grad:
        return [None] * len(embeddings)
    # A once_differentiable function says so only where what is upstream needs a gradient, and is wrong otherwise.
    ones = torch.ones_like(score, requires_grad=graph)
    return list(
        torch.autograd.grad(score, embeddings, ones, create_graph=graph, retain_graph=graph or keep, allow_unused=True)
    )


# --- From v to the head's parameters ----------------------------------------------------------------------------------


def _for_parameters(outputs: Sequence[Tensor], parameters, upstream=None, keep: bool = False) -> Gradients:
    pairs = [(t, None if upstream is None else upstream[i]) for i, t in enumerate(outputs) if t.requires_grad]
    if not pairs or not parameters:
        return [None] * len(parameters)
    outputs, upstream = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, parameters, upstream, retain_graph=keep, allow_unused=True))


def double(g: Sequence[Tensor], v: Sequence[Tensor], parameters, keep: bool) -> Gradients:
    """Backward through the graph of g. Its numbers may be 16-bit ones, so v goes through it at a scale of 1."""
    scale = None
    if any(y.element_size() < 4 for y in g):
        largest = torch.stack([x.abs().max() for x in v]).max()
        scale = torch.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    try:
        upstream = [(x if scale is None else x / scale).to(y.dtype) for x, y in zip(v, g, strict=True)]
        found = _for_parameters(g, parameters, upstream, keep)
        if scale is None:
            return found
        # In the scale's own dtype: as an operand of a 16-bit product it would be rounded.
        return [None if x is None else (x.to(scale.dtype) * scale).to(x.dtype) for x in found]
    except RuntimeError as error:
        raise RuntimeError(f"AttributionRegularizer: {NO_SECOND} ({error})") from error


def forward(run: Run, points, v: Sequence[Tensor], classes: Tensor, score: str, parameters) -> Gradients:
    """Backward of the score's derivative along v, which forward AD gives: mean over the points."""
    try:
        with forward_ad.dual_level():
            slopes = []
            for point in points:
                duals = [forward_ad.make_dual(e.detach(), x.to(e.dtype)) for e, x in zip(point, v, strict=True)]
                slope = forward_ad.unpack_dual(score_of(run(duals), classes, score)).tangent
                slopes += [] if slope is None else [slope.sum() / len(points)]
            return _for_parameters(slopes, parameters)
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(
            f"AttributionRegularizer: mode 'forward' needs forward AD of every operator of the head ({error}): take "
            "mode='double'"
        ) from error


def difference(run: Run, points, v, classes: Tensor, score: str, parameters, step: float, size: Tensor) -> Gradients:
    """Backward of the score's central difference along v: no second derivative of the head is needed. Each sample's
    step is ``step`` times the length of its embeddings, shorter by the score's size [B] where that is above 1: the
    change of the score, not of the embeddings, is what has to stay small. In float32 by its power of 2 / 3, for below
    that the difference has no digits."""

    def length(tensors):
        return sum(t.flatten(1).double().square().sum(1) for t in tensors).sqrt()

    n = length(v)
    least = 1.0 if points[-1][0].dtype == torch.float64 else 2 / 3
    far = step * length(points[-1]) / size.double().clamp_min(1) ** least
    h, slopes = torch.where(n > 0, far / torch.where(n > 0, n, 1.0), 0.0), []
    for point in points:
        ends = []
        for sign in (1, -1):
            moved = []
            for e, x in zip(point, v, strict=True):
                far = (sign * h).view(-1, *[1] * (e.dim() - 1))
                moved.append((e.detach() + far * x).to(e.dtype))
            ends.append(score_of(run(moved), classes, score).double())
        slopes.append(torch.where(h > 0, (ends[0] - ends[1]) / torch.where(h > 0, 2 * h, 1.0), 0.0).sum())
    return _for_parameters([sum(slopes) / len(points)], parameters)


class WithGradients(torch.autograd.Function):
    """A value whose gradients for parameters are known: nothing else can get any, whatever it is added to."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return None, None, *(None if g is None else g * upstream for g in ctx.gradients)
