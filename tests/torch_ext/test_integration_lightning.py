"""AMSS in Lightning's Trainer against loops written by hand: the same parameters, bit for bit."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mmbal
from mmbal import AMSS

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from mmbal.integrations.lightning import AMSSCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 6


class Model(pl.LightningModule):
    """Two encoders and a sum of heads."""

    def __init__(self, optimizer="sgd", poison=None, manual=False, **options):
        super().__init__()
        torch.manual_seed(3)
        self.encoders = nn.ModuleDict({name: nn.Linear(5, 8) for name in ("audio", "video")})
        self.heads = nn.ModuleDict({name: nn.Linear(8, 3) for name in ("audio", "video")})
        self.amss = AMSS(dict(self.encoders), seed=7, **options)
        self.optimizer, self.poison = optimizer, poison
        self.automatic_optimization = not manual

    def loss(self, batch, number):
        audio, video, y = batch
        z = {name: self.encoders[name](x).tanh() for name, x in {"audio": audio, "video": video}.items()}
        logits = {name: self.heads[name](z[name]) for name in z}
        self.amss.observe({name: (logits[name], z[name]) for name in z}, y)
        loss = F.cross_entropy(logits["audio"] + logits["video"], y)
        return loss * (float("inf") if number == self.poison else 1.0)

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=0.05)
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def data():
    generator = torch.Generator().manual_seed(1)
    audio, video = (torch.randn(BATCHES * 4, 5, generator=generator) for _ in range(2))
    return TensorDataset(audio, video, audio.argmax(1) % 3)


def loader():
    return DataLoader(data(), batch_size=4)


def trainer(callbacks, folder, epochs=2, library=pl, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": folder}
    return library.Trainer(max_epochs=epochs, callbacks=callbacks, **(quiet | options))


def fitted(model, folder, **options):
    run = trainer([AMSSCallback(model.amss)], folder, **options)
    run.fit(model, loader())
    return model


def by_hand(model, epochs=2, accumulate=1, clip=None, autocast=None, scaler=None, mask=True):
    optimizer = model.configure_optimizers()
    if model.amss.where == "update":
        model.amss.attach(optimizer, step=False)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(epochs):
        for number, batch in enumerate(loader()):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model.loss(batch, number) / accumulate
            scaler.scale(loss).backward()
            if (number + 1) % accumulate:
                continue
            scaler.unscale_(optimizer)
            if mask:
                model.amss.step()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return model


def assert_same(a, b):
    a, b = (dict(model.state_dict()) for model in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def differ(a, b):
    return any(not torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "options",
    [{}, {"plus": True}, {"unit": "element", "plus": True}, {"ema": 0.5}],
    ids=["amss", "plus", "element", "ema"],
)
def test_automatic_optimisation_masks_as_a_loop_by_hand(tmp_path, options, optimizer):
    model = fitted(Model(optimizer, **options), tmp_path)
    assert_same(model, by_hand(Model(optimizer, **options)))
    assert model.amss.steps == 2 * BATCHES and model.amss.skipped == 0
    assert differ(model, by_hand(Model(optimizer, **options), mask=False))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_where_update_is_attached_by_the_callback(tmp_path, optimizer):
    options = {"where": "update", "plus": True}
    model = fitted(Model(optimizer, **options), tmp_path)
    assert_same(model, by_hand(Model(optimizer, **options)))
    if optimizer == "adam":
        assert differ(model, by_hand(Model(optimizer, plus=True)))
    with pytest.raises(RuntimeError, match="needs attach"):  # and is no longer, after the training
        model.amss.step()


def test_where_update_is_attached_once_when_fit_is_called_again(tmp_path):
    model = Model(where="update", plus=True)
    for _ in range(2):
        fitted(model, tmp_path, epochs=1)
    expected = Model(where="update", plus=True)
    for _ in range(2):
        by_hand(expected, epochs=1)
        expected.amss._attached = 0
    assert_same(model, expected)


def test_accumulated_batches_are_masked_once_with_the_statistics_of_all(tmp_path):
    model = fitted(Model(), tmp_path, accumulate_grad_batches=3)
    assert_same(model, by_hand(Model(), accumulate=3))
    assert model.amss.steps == 2 * BATCHES // 3 and model.amss.last_stats["rows"] == 12


def test_clipping_comes_after_the_mask(tmp_path):
    model = fitted(Model(), tmp_path, gradient_clip_val=0.05)
    assert_same(model, by_hand(Model(), clip=0.05))
    assert differ(model, by_hand(Model()))


def test_bf16_mixed_masks_as_autocast_by_hand(tmp_path):
    model = fitted(Model(), tmp_path, precision="bf16-mixed")
    assert_same(model, by_hand(Model(), autocast=torch.bfloat16))
    assert differ(model, by_hand(Model()))


def test_with_a_scaler_the_mask_comes_after_unscaling_and_an_overflow_is_skipped(tmp_path):
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    model = fitted(
        Model(poison=2), tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scalers[0])], gradient_clip_val=1
    )
    assert_same(model, by_hand(Model(poison=2), autocast=torch.float16, scaler=scalers[1], clip=1))
    assert model.amss.skipped == 2 and scalers[0].get_scale() == 64.0
    assert all(p.isfinite().all() for p in model.parameters())


def test_manual_optimisation_masks_as_a_loop_by_hand(tmp_path):
    model = fitted(Model(manual=True), tmp_path)
    assert_same(model, by_hand(Model()))
    assert model.amss.steps == 2 * BATCHES


@pytest.mark.parametrize(
    "options", [{}, {"plus": True, "where": "update"}, {"ema": 0.5}], ids=["amss", "update", "ema"]
)
def test_a_run_that_resumes_from_a_checkpoint_equals_one_that_never_stopped(tmp_path, options):
    whole = fitted(Model("adam", **options), tmp_path, epochs=3)
    first = Model("adam", **options)
    run = trainer([AMSSCallback(first.amss)], tmp_path, epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    resumed = Model("adam", **options)
    trainer([AMSSCallback(resumed.amss)], tmp_path, epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert_same(resumed, whole)
    assert resumed.amss.steps == whole.amss.steps == 3 * BATCHES
    torch.testing.assert_close(resumed.amss.state_dict(), whole.amss.state_dict(), rtol=0, atol=0)


def test_resuming_without_the_state_of_amss_gives_something_else(tmp_path):
    """So that the test above can fail."""
    whole = fitted(Model(), tmp_path, epochs=2)
    first = Model()
    run = trainer([AMSSCallback(first.amss)], tmp_path, epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert set(checkpoint["callbacks"].pop("AMSSCallback")) == set(first.amss.state_dict())
    torch.save(checkpoint, tmp_path / "first.ckpt")
    resumed = Model()
    trainer([AMSSCallback(resumed.amss)], tmp_path, epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert differ(resumed, whole)


def test_the_ratios_are_logged(tmp_path):
    model = Model()
    logger = pl.loggers.CSVLogger(tmp_path)
    fitted(model, tmp_path, logger=logger, log_every_n_steps=1)
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().split()
    assert len(rows) == 2 * BATCHES
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    for name, rho in model.amss.rho.items():
        assert float(last[f"amss/{name}"]) == pytest.approx(rho, abs=1e-6)


def test_attach_with_step_is_refused_with_what_to_do_instead(tmp_path):
    model = Model()
    optimizer = model.configure_optimizers()
    model.configure_optimizers = lambda: optimizer
    model.amss.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"call step in the closure, and attach\(step=False\)"):
        trainer([], tmp_path).fit(model, loader())


def test_several_optimizers_are_refused(tmp_path):
    model = Model(manual=True)
    model.configure_optimizers = lambda: [torch.optim.SGD(m.parameters(), 0.1) for m in (model.encoders, model.heads)]
    with pytest.raises(ValueError, match="one optimizer is served, got 2"):
        fitted(model, tmp_path)


def test_an_error_in_training_detaches(tmp_path):
    model = Model(where="update")
    model.training_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fitted(model, tmp_path)
    with pytest.raises(RuntimeError, match="needs attach"):
        model.amss.step(rho={"audio": 0.5, "video": 0.5})


# --- What is imported -------------------------------------------------------------------------------------------------


def python(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_mmbal_imports_neither_lightning_nor_a_trainer():
    code = """
import sys, mmbal, mmbal.integrations
others = ("lightning", "pytorch_lightning", "transformers.trainer", "accelerate", "open_clip")
print([m for m in others if m in sys.modules])
"""
    assert python(code) == "[]"


def test_the_modules_are_attributes_of_integrations():
    assert mmbal.integrations.lightning.AMSSCallback is AMSSCallback
    with pytest.raises(AttributeError, match="no attribute 'keras'"):
        mmbal.integrations.keras  # noqa: B018


def test_the_trainer_of_pytorch_lightning_takes_the_callback_of_lightning(tmp_path):
    library = pytest.importorskip("pytorch_lightning")
    model = Model()
    other = type("Other", (library.LightningModule,), {k: v for k, v in vars(Model).items() if k != "__init__"})()
    for name in ("encoders", "heads", "amss", "optimizer", "poison"):
        setattr(other, name, getattr(model, name))
    trainer([AMSSCallback(other.amss)], tmp_path, library=library).fit(other, loader())
    assert_same(model, by_hand(Model()))


def test_the_callback_is_one_of_pytorch_lightning_where_that_is_in_use():
    pytest.importorskip("pytorch_lightning")
    code = """
import pytorch_lightning
from mmbal.integrations.lightning import AMSSCallback
print(issubclass(AMSSCallback, pytorch_lightning.Callback))
"""
    assert python(code) == "True"


def test_without_lightning_the_error_says_what_to_install():
    code = """
import sys, mmbal
sys.modules["lightning"] = sys.modules["lightning.pytorch"] = sys.modules["pytorch_lightning"] = None
try:
    mmbal.integrations.lightning
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code) == "mmbal.integrations.lightning needs Lightning: pip install lightning"
