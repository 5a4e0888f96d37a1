"""Shares of modalities in a model's decisions, to look at: no second derivatives, nothing is trained by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mmbal.methods.attribution import AttributionInfo, AttributionRegularizer, Embeddings
from mmbal.methods.embedding_tap import EmbeddingTap

Logger = Callable[[str, float, int], object]


def attribution_shares(
    embeddings: Embeddings | EmbeddingTap,
    logits: Tensor | None = None,
    *,
    head: Callable | None = None,
    target: Tensor | None = None,
    present: Tensor | None = None,
    masks: Mapping[str, Tensor] | None = None,
    **options,
) -> AttributionInfo:
    """Shares [B, M] of the modalities in each of B decisions, for the price of one backward through the head.

    embeddings : {name: [B, D] or [B, T, D]}, tensors in order (named "0", "1", ...), or an ``EmbeddingTap``.
    logits, head : one of them as for ``AttributionRegularizer``: logits with the graph of the model's forward pass,
        which stays; or the head, which works under ``torch.no_grad`` too.
    options : score, pool, baseline, attribution and ig_steps of ``AttributionRegularizer``.
    """
    if isinstance(embeddings, EmbeddingTap):
        embeddings = embeddings.embeddings
    names = list(embeddings) if isinstance(embeddings, Mapping) else [str(i) for i in range(len(embeddings))]
    if unknown := set(options) - {"score", "pool", "baseline", "attribution", "ig_steps"}:
        raise TypeError(f"attribution_shares: unknown options {sorted(unknown)}")
    measure = AttributionRegularizer(names, head, parameters=(), **options)
    return measure(embeddings, logits, target=target, present=present, masks=masks)[1]


class AttributionMonitor:
    """Mean shares over a training, for a log and a plot.

        monitor = mmbal.AttributionMonitor(logger=writer.add_scalar)  # TensorBoard: a scalar for each modality
        monitor(info)  # of AttributionRegularizer or attribution_shares, in every step or every so often
        monitor.plot("shares.png")

    logger : called as logger(name, value, step), name "attribution/<modality>".
    prefix : of the names.
    """

    def __init__(self, logger: Logger | None = None, prefix: str = "attribution/"):
        if logger is not None and not callable(logger):
            raise ValueError(
                f"AttributionMonitor: logger must be a function of name, value and step, got {type(logger).__name__}"
            )
        self.logger, self.prefix = logger, prefix
        self.steps: list[int] = []
        self.history: dict[str, list[float]] = {}

    def __call__(self, info: AttributionInfo, step: int | None = None) -> dict[str, float]:
        """{modality: mean share}, NaN where no sample of the batch counts. step: None is one more than the last."""
        if not self.history:
            self.history = {name: [] for name in info.modalities}
        if list(self.history) != info.modalities:
            raise ValueError(
                f"AttributionMonitor: info must be of {list(self.history)} as before, got {info.modalities}"
            )
        step = (self.steps[-1] + 1 if self.steps else 0) if step is None else int(step)
        means = info.mean()
        self.steps.append(step)
        for name, value in means.items():
            self.history[name].append(value)
            if self.logger is not None:
                self.logger(self.prefix + name, value, step)
        return means

    def plot(self, path: str | Path, asked: Mapping[str, float] | Sequence[float] | None = None) -> None:
        """Writes a PNG of the shares over the steps, as a whole or not at all. asked: drawn dashed."""
        from matplotlib.figure import Figure

        from mmbal.files import replace_file

        if not self.steps:
            raise RuntimeError("AttributionMonitor: there is nothing to plot yet: call it with an info first")
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        if asked is not None and not isinstance(asked, Mapping):
            asked = dict(zip(self.history, [float(share) for share in asked], strict=True))
        asked = dict(asked or {})
        for i, (name, values) in enumerate(self.history.items()):
            axis.plot(self.steps, values, color=f"C{i}", marker="o" if len(values) == 1 else None, label=name)
            if name in asked:
                axis.axhline(asked[name] / sum(asked.values()), color=f"C{i}", linestyle="--", linewidth=1)
        axis.set(xlabel="step", ylabel="mean share of the attribution", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        replace_file(Path(path), lambda file: figure.savefig(file, dpi=140, format="png"))
