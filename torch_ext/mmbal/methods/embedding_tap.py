"""The embeddings of any model, taken where its encoders give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

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
    model : the module whose ``forward`` is called in training. Under DDP tap the model inside; under torch.compile too,
        before its first call and without fullgraph. Encoders that are called by themselves are tapped too, in their
        last run.
    encoders : {modality: name of a submodule, as in ``model.named_modules()``, or the submodule}. Each must run once in
        a forward pass.
    select : {modality: function of the submodule's output that gives the tensor}, where the output is no tensor. It
        must give the very tensor that the model goes on with, nothing computed from it.
    parameters : what ``head_parameters()`` gives instead. All that is not tapped counts as head: give it where anything
        before a tapped module, or an encoder beside them, has parameters too.

    A tapped output that needs no gradient (a frozen encoder, also one under torch.no_grad) is replaced by an equal one
    that does, for attributions are gradients for it; what is frozen gets none. With ``select`` it is made to need one
    itself, so the model must not change it in place. A copy of the model (copy.deepcopy) has a tap of its own.
    ``remove()``, or the end of a ``with`` block, takes the hooks off.
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
        self._running = self._recorded = False
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for name, module in self.encoders.items():
            self._handles.append(module.register_forward_hook(partial(self._keep, name)))

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
            self._found, self._running, self._recorded = {}, True, torch.is_grad_enabled()

    def _end(self, module, inputs, output) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._running = False

    def _keep(self, name: str, module, inputs, output):
        again = torch._C._current_graph_task_id() != -1  # checkpointing needs the same graph as in the first run
        if self._running and not again and name in self._found:
            raise RuntimeError(f"EmbeddingTap: encoder {name!r} ran twice in one forward pass: tap one around it")
        chosen = self._select[name](output) if name in self._select else output
        if not isinstance(chosen, Tensor):
            raise TypeError(
                f"EmbeddingTap: encoder {name!r} must give a tensor, got {type(chosen).__name__}: "
                f"give select={{{name!r}: function of it}}"
            )
        if not chosen.is_floating_point():
            raise TypeError(f"EmbeddingTap: encoder {name!r} must give floating point, got {chosen.dtype}")
        recorded = self._recorded if self._running else torch.is_grad_enabled()
        replaced = None
        if recorded and not chosen.requires_grad:
            with torch.enable_grad():
                if chosen is output:  # a copy that is no leaf, for the model may go on in place
                    chosen = replaced = chosen.detach().requires_grad_().clone()
                else:
                    chosen = chosen.requires_grad_()
        if not again:
            self._found[name] = chosen
        return replaced

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """{modality: tensor} of the last forward pass."""
        missing = [name for name in self.modalities if name not in self._found]
        if missing:
            raise RuntimeError(f"EmbeddingTap: encoder {missing[0]!r} has not run since it was tapped: call the model")
        return {name: self._found[name] for name in self.modalities}

    def head_parameters(self) -> list[nn.Parameter]:
        """The model's trainable parameters that no tapped module has."""
        if self._parameters is not None:
            return self._parameters
        tapped = {id(p) for module in self.encoders.values() for p in module.parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in tapped]

    def __getstate__(self) -> dict:
        """For copies and files: without the embeddings of a step, which belong to its graph."""
        return self.__dict__ | {"_found": {}, "_running": False}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], {}

    def __enter__(self) -> EmbeddingTap:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()
