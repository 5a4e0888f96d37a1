"""AMSS in Lightning's loop, automatic or manual. ``lightning`` or ``pytorch_lightning``, whichever there is."""

from __future__ import annotations

import importlib
import sys

from mmbal.methods.amss import AMSS


def _base() -> type:
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):  # that in use first
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", name):
                raise
    raise ModuleNotFoundError("mmbal.integrations.lightning needs Lightning: pip install lightning", name="lightning")


class AMSSCallback(_base()):
    """Calls ``amss.step()`` before every step of the optimizer; ``observe`` stays in ``training_step``:

        class Model(LightningModule):
            def training_step(self, batch, batch_idx):
                ...
                self.amss.observe({"audio": (logits_a, features_a), "video": (logits_v, features_v)}, y)
                return loss

        model.amss = mmbal.AMSS({"audio": model.audio, "video": model.video})
        Trainer(callbacks=[AMSSCallback(model.amss)]).fit(model)

    What happens at a step of the optimizer, in order: backward of the last of ``accumulate_grad_batches`` batches;
    unscaling, where the precision plugin has a scaler (not for fused optimizers, which unscale by themselves);
    ``amss.step()``; the module's ``on_before_optimizer_step``; ``gradient_clip_val``, so that the norm is that of the
    masked gradients; the optimizer's step. Where a gradient is not finite nothing is masked, ``amss.skipped`` counts
    and the scaler skips.

    where="update" is attached to the optimizer by itself. Do not ``amss.attach`` besides. The state of AMSS is in
    Lightning's checkpoints. The ratios are logged as "amss/NAME". One optimizer is served.
    """

    def __init__(self, amss: AMSS):
        self.amss = amss
        self._attached = None

    def on_train_start(self, trainer, pl_module) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"AMSSCallback: one optimizer is served, got {len(trainer.optimizers)}: call step yourself"
            )
        self._detach()
        if self.amss.where == "update":
            self._attached = self.amss.attach(trainer.optimizers[0], step=False)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.amss.step()
        if trainer.loggers:
            rho = zip(self.amss.modalities, self.amss._ratios.rho, strict=True)  # tensors: nothing waits for a GPU
            self.log_dict({f"amss/{name}": value for name, value in rho})

    def teardown(self, trainer, pl_module, stage) -> None:
        self._detach()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    def state_dict(self) -> dict:
        return self.amss.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.amss.load_state_dict(state_dict)
