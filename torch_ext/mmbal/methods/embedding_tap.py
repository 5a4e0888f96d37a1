"""The embeddings of any model, taken where its encoders give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


class EmbeddingTap:
    """Forward hooks on a model's encoders that keep the embeddings of this step.

        tap = mmbal.EmbeddingTap(model, {"audio": "audio_net", "video": "video_net"})
        logits = model(batch)
        tap.embeddings  # {"audio": [B, D], "video": [B, D]}, with their graph

    Where to tap is your choice, and shares depend on it: the usual place is the output of each encoder before fusion,
    pooled [B, D] or token grids [B, T, D].

    Parameters
    ----------
    model : the module whose ``forward`` is called in training. Under DDP or torch.compile tap the model inside.
        Encoders that are called by themselves are tapped too, in their last run.
    encoders : {modality: name of a submodule, as in ``model.named_modules()``, or the submodule}. Each must run once in
        a forward pass.
    select : {modality: function of the submodule's output that gives the tensor}, where the output is no tensor.
    parameters : what ``head_parameters()`` gives instead. Give it where anything before a tapped module has parameters
        too: those are encoder, not head.

    A tapped output that needs no gradient (a frozen encoder) is replaced by an equal one that does, for attributions
    are gradients for it; what is frozen gets none. ``remove()``, or the end of a ``with`` block, takes the hooks off.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: Mapping[str, str | nn.Module],
        *,
        select: Mapping[str, Callable] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ):
        if not isinstance(encoders, Mapping) or not encoders:
            raise ValueError(f"EmbeddingTap: encoders must be a mapping of at least one modality, got {encoders!r}")
        self.model, self.modalities, self._select = model, list(encoders), dict(select or {})
        if unknown := set(self._select) - set(self.modalities):
            raise ValueError(f"EmbeddingTap: select must have keys among {self.modalities}, got {sorted(unknown)}")
        parts = dict(model.named_modules(remove_duplicate=False))
        self.encoders = {name: self._part(name, given, parts) for name, given in encoders.items()}
        if len({id(module) for module in self.encoders.values()}) < len(self.encoders):
            raise ValueError("EmbeddingTap: encoders must be different modules, got one for two modalities")
        self._parameters = None if parameters is None else list(parameters)
        self._found: dict[str, Tensor] = {}
        self._running = False
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for name, module in self.encoders.items():
            self._handles.append(module.register_forward_hook(self._keeper(name)))

    @staticmethod
    def _part(name: str, given, parts: dict[str, nn.Module]) -> nn.Module:
        if isinstance(given, nn.Module):
            if any(given is part for part in parts.values()):
                return given
            raise ValueError(f"EmbeddingTap: encoders[{name!r}] must be a submodule of model")
        if given not in parts or given == "":
            known = [part for part in parts if part and "." not in part]
            raise ValueError(
                f"EmbeddingTap: encoders[{name!r}] must name a submodule such as {', '.join(known)}, got {given!r}"
            )
        return parts[given]

    def _begin(self, module, inputs) -> None:
        if torch._C._current_graph_task_id() == -1:  # not when checkpointing runs a part again in the backward
            self._found, self._running = {}, True

    def _end(self, module, inputs, output) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._running = False

    def _keeper(self, name: str):
        def keep(module, inputs, output):
            if torch._C._current_graph_task_id() != -1:
                return None
            if self._running and name in self._found:
                raise RuntimeError(f"EmbeddingTap: encoder {name!r} ran twice in one forward pass: tap one around it")
            chosen = self._select[name](output) if name in self._select else output
            if not isinstance(chosen, Tensor):
                raise TypeError(
                    f"EmbeddingTap: encoder {name!r} must give a tensor, got {type(chosen).__name__}: "
                    f"give select={{{name!r}: function of it}}"
                )
            if not chosen.is_floating_point():
                raise TypeError(f"EmbeddingTap: encoder {name!r} must give floating point, got {chosen.dtype}")
            if chosen.requires_grad or not torch.is_grad_enabled():
                self._found[name] = chosen
                return None
            if chosen is not output:
                self._found[name] = chosen.requires_grad_()
                return None
            # A copy that is no leaf, for the model may go on in place.
            self._found[name] = chosen.detach().requires_grad_().clone()
            return self._found[name]

        return keep

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """{modality: tensor} of the last forward pass."""
        missing = [name for name in self.modalities if name not in self._found]
        if missing:
            raise RuntimeError(f"EmbeddingTap: encoder {missing[0]!r} has not run: call the model first")
        return {name: self._found[name] for name in self.modalities}

    def head_parameters(self) -> list[nn.Parameter]:
        """The model's trainable parameters that no tapped module has."""
        if self._parameters is not None:
            return self._parameters
        tapped = {id(p) for module in self.encoders.values() for p in module.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in tapped]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], {}

    def __enter__(self) -> EmbeddingTap:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()
