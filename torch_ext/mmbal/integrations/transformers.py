"""AMSS in the loop of transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmbal.methods.amss import AMSS

STATE = "amss.pt"


class AMSSCallback(TrainerCallback):
    """Calls ``amss.step()`` before every step of the optimizer; ``observe`` goes where the loss is made:

        class AudioVideoTrainer(Trainer):
            def compute_loss(self, model, inputs, **kwargs):
                ...
                if model.training:
                    self.amss.observe({"audio": (logits_a, features_a), "video": (logits_v, features_v)}, labels)
                return loss

        AudioVideoTrainer(model, args, train_dataset=data, callbacks=[AMSSCallback(amss)])

    What happens at a step of the optimizer, in order: backward of the last of ``gradient_accumulation_steps`` batches;
    unscaling, with fp16; clipping, where ``max_grad_norm`` is above 0 (its default is 1): of the gradients as they are
    before the mask, so that AMSS+ is unbiased for the clipped gradient; ``amss.step()``; the optimizer's step. Where a
    gradient is not finite nothing is masked, ``amss.skipped`` counts and the scaler skips.

    where="update" is attached to the optimizer by itself. Do not ``amss.attach`` besides. The state of AMSS is saved as
    amss.pt in the folder of each checkpoint. ``state.log_history`` has the ratios as "amss/NAME".

    resume : where to find the state when the Trainer resumes. True: in the checkpoint of that step in ``output_dir``
        (callbacks are not told from which folder the Trainer resumes); a folder: there; False: nowhere, AMSS goes on as
        it is.
    """

    def __init__(self, amss: AMSS, resume: bool | str | os.PathLike = True):
        self.amss, self.resume = amss, resume
        self._attached = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        if state.global_step > 0 and self.resume is not False:
            self._load(_checkpoint(args, state) if self.resume is True else Path(self.resume))
        self._detach()
        if self.amss.where == "update":
            self._attached = self.amss.attach(_unwrapped(optimizer), step=False)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.amss.step()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs is not None and "loss" in logs and self.amss.rho is not None:
            state.log_history[-1].update({f"amss/{name}": rho for name, rho in self.amss.rho.items()})

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():  # those of a hyperparameter search are elsewhere
            torch.save(self.amss.state_dict(), folder / (STATE + ".part"))
            os.replace(folder / (STATE + ".part"), folder / STATE)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._detach()

    def _load(self, folder: Path) -> None:
        if not (folder / STATE).is_file():
            raise FileNotFoundError(
                f"AMSSCallback: the Trainer resumes, but there is no {folder / STATE}: give AMSSCallback(amss, "
                "resume=folder of the checkpoint), or resume=False to go on without"
            )
        self.amss.load_state_dict(torch.load(folder / STATE, map_location="cpu", weights_only=True))

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


def _checkpoint(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _unwrapped(optimizer):
    """The optimizer whose step is taken: accelerate's wrapper has no hooks."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
