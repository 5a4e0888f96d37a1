"""The folder in which the demo's stages are done, by commands or by training, each of them once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from transformers import CLIPModel

from mmbal.checkpoints import from_model, load_clip, write_checkpoint

from .data import prepared
from .model import save_weights
from .shell import CommandError, Shell
from .stages import Outcome, Trainer
from .store import Store


class Workshop:
    """Holds pairs.safetensors, and parent and every trained model as folders of transformers."""

    def __init__(self, folder: Path, trainer: Trainer, parent: CLIPModel):
        self.folder, self.trainer, self.parent = folder, trainer, parent
        self.store, self.shell, self.costs = Store(folder), Shell(folder), {}
        self._timed("pairs", ["pairs.safetensors", "parent"], self._prepare)

    def _prepare(self) -> None:
        save_weights(self.folder / "pairs.safetensors", prepared(self.trainer.pairs, self.trainer.tokenizer))
        self._save(self.parent, "parent")
        self.trainer.tokenizer.save(str(self.folder / "parent" / "tokenizer.json"))

    def _timed(self, name: str, outputs: list[str], make: Callable[[], object]) -> None:
        def make_timed() -> dict:
            began = time.perf_counter()
            make()
            return {"steps": 0, "seconds": time.perf_counter() - began}

        self.costs[name] = self.store.stage(name, outputs, make_timed)

    def commanded(self, name: str, outputs: list[str], *lines: str) -> None:
        """A stage that commands do."""
        self.shell.script += lines
        self._timed(name, outputs, lambda: [self.shell.run(line) for line in lines])

    def trained(self, name: str, steps: int, train: Callable[..., Outcome], start: str, *arguments) -> CLIPModel:
        """The model of a stage of training, train(trainer, model in `start`, *arguments), from its folder `name`."""

        def make() -> dict:
            outcome = train(self.trainer, self.load(start), *arguments)
            self._save(outcome.model, name)
            speed = outcome.tokens / max(outcome.seconds, 1e-9)
            return {"steps": steps, "seconds": outcome.seconds, "tokens_per_second": speed}

        self.costs[name] = self.store.stage(name, [name], make)
        return self.load(name)

    def differ_in_ffns(self, base: str, expert: str) -> None:
        """What DMU's experts must have in common is shown."""
        line = f"mmbal diff {base} {expert}"
        self.shell.script.append(f"{line} || true  # ends with 1, as they differ")
        if "differ in their FFNs only" not in self.shell.run(line, expected=1):
            raise CommandError(f"{line}: they must differ in their FFNs only")

    def load(self, name: str) -> CLIPModel:
        return load_clip(self.folder / name)

    def _save(self, model: CLIPModel, name: str) -> None:
        write_checkpoint(from_model(model), self.folder / name, "transformers", overwrite=True)
