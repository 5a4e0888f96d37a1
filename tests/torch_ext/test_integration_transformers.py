"""AMSS in transformers' Trainer against loops written by hand: the same parameters, bit for bit."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbal import AMSS

pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from mmbal.integrations.transformers import AMSSCallback

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES, LR = 6, 0.3
NAMES = ("audio", "video")


class Model(nn.Module):
    """Two encoders and a sum of heads; observes while it trains."""

    def __init__(self, poison=None, **options):
        super().__init__()
        torch.manual_seed(3)
        self.encoders = nn.ModuleDict({name: nn.Linear(5, 8) for name in NAMES})
        self.heads = nn.ModuleDict({name: nn.Linear(8, 3) for name in NAMES})
        self.amss = AMSS(dict(self.encoders), seed=7, **options)
        self.poison, self.calls = poison, 0

    def forward(self, audio, video, labels):
        z = {name: self.encoders[name](x).tanh() for name, x in {"audio": audio, "video": video}.items()}
        logits = {name: self.heads[name](z[name]) for name in z}
        loss = F.cross_entropy(logits["audio"] + logits["video"], labels)
        if self.training:
            self.amss.observe({name: (logits[name], z[name]) for name in z}, labels)
            loss = loss * (float("inf") if self.calls == self.poison else 1.0)
            self.calls += 1
        return {"loss": loss, "logits": logits["audio"] + logits["video"]}


def data():
    generator = torch.Generator().manual_seed(1)
    audio, video = (torch.randn(BATCHES * 4, 5, generator=generator) for _ in range(2))
    rows = zip(audio, video, audio.argmax(1) % 3, strict=True)
    return [dict(zip(("audio", "video", "labels"), row, strict=True)) for row in rows]


def batches():
    rows = data()
    for first in range(0, len(rows), 4):
        yield {key: torch.stack([row[key] for row in rows[first : first + 4]]) for key in rows[0]}


class InOrder(Trainer):
    """Does not shuffle."""

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_optimizer(model, name):
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.05)
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def trainer(model, folder, optimizer="sgd", callback=None, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    quiet |= {"use_cpu": True, "per_device_train_batch_size": 4, "num_train_epochs": 2, "max_grad_norm": 0.0}
    optimizer = make_optimizer(model, optimizer)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return InOrder(
        model,
        TrainingArguments(output_dir=str(folder), **(quiet | options)),
        train_dataset=data(),
        eval_dataset=data(),
        optimizers=(optimizer, constant),
        callbacks=[callback or AMSSCallback(model.amss)],
    )


def trained(model, folder, *arguments, **options):
    trainer(model, folder, *arguments, **options).train()
    return model


def by_hand(model, optimizer="sgd", epochs=2, accumulate=1, clip=None, autocast=None, scaler=None, mask=True):
    optimizer = make_optimizer(model, optimizer)
    if model.amss.where == "update":
        model.amss.attach(optimizer, step=False)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model.train()
    for _ in range(epochs):
        for number, batch in enumerate(batches()):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(**batch)["loss"]
            scaler.scale(loss / accumulate).backward()
            if (number + 1) % accumulate:
                continue
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if mask:
                model.amss.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return model


def assert_same(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def differ(a, b):
    return any(not torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "options",
    [{}, {"plus": True}, {"unit": "element", "plus": True}, {"ema": 0.5}],
    ids=["amss", "plus", "element", "ema"],
)
def test_the_trainer_masks_as_a_loop_by_hand(tmp_path, options, optimizer):
    model = trained(Model(**options), tmp_path, optimizer)
    assert_same(model, by_hand(Model(**options), optimizer))
    assert model.amss.steps == 2 * BATCHES and model.amss.skipped == 0
    assert differ(model, by_hand(Model(**options), optimizer, mask=False))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_where_update_is_attached_by_the_callback(tmp_path, optimizer):
    options = {"where": "update", "plus": True}
    model = trained(Model(**options), tmp_path, optimizer)
    assert_same(model, by_hand(Model(**options), optimizer))
    if optimizer == "adam":
        assert differ(model, by_hand(Model(plus=True), optimizer))
    with pytest.raises(RuntimeError, match="needs attach"):  # and is no longer, after the training
        model.amss.step()


def test_accumulated_batches_are_masked_once_with_the_statistics_of_all(tmp_path):
    model = trained(Model(), tmp_path, gradient_accumulation_steps=3)
    assert_same(model, by_hand(Model(), accumulate=3))
    assert model.amss.steps == 2 * BATCHES // 3 and model.amss.last_stats["rows"] == 12


def test_clipping_comes_before_the_mask(tmp_path):
    model = trained(Model(plus=True), tmp_path, max_grad_norm=0.05)
    assert_same(model, by_hand(Model(plus=True), clip=0.05))
    assert differ(model, by_hand(Model(plus=True)))


def test_bf16_masks_as_autocast_by_hand(tmp_path):
    model = trained(Model(), tmp_path, bf16=True)
    expected = by_hand(Model(), autocast=torch.bfloat16)
    assert_same(model, expected)
    assert differ(model, by_hand(Model()))


@pytest.mark.parametrize("options", [{}, {"plus": True, "where": "update"}], ids=["grad", "update"])
def test_with_a_scaler_the_mask_comes_after_unscaling_and_an_overflow_is_skipped(tmp_path, monkeypatch, options):
    """fp16 of the Trainer needs a GPU: here its Accelerator is told afterwards."""
    scaler, own = (torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2))
    model = Model(poison=2, **options)
    run = trainer(model, tmp_path, max_grad_norm=1.0)
    run.accelerator.scaler, run.accelerator.native_amp = scaler, True
    monkeypatch.setattr(run.accelerator.state, "_mixed_precision", "fp16")
    run.train()
    assert_same(model, by_hand(Model(poison=2, **options), autocast=torch.float16, scaler=own, clip=1.0))
    assert model.amss.skipped == 1 and model.amss.steps == 2 * BATCHES and scaler.get_scale() == 128.0
    assert all(p.isfinite().all() for p in model.parameters())


# --- Checkpoints ------------------------------------------------------------------------------------------------------

STATES = pytest.mark.parametrize(
    "options", [{}, {"plus": True, "where": "update"}, {"ema": 0.5}], ids=["amss", "update", "ema"]
)
SAVE = {"save_strategy": "steps", "save_steps": 4}


@STATES
def test_a_run_that_resumes_from_a_checkpoint_equals_one_that_never_stopped(tmp_path, options):
    whole = trained(Model(**options), tmp_path, "adam", **SAVE)
    checkpoint = tmp_path / "checkpoint-4"
    assert sorted(f.name for f in checkpoint.iterdir() if "amss" in f.name) == ["amss.pt"]
    resumed = Model(**options)
    run = trainer(resumed, tmp_path, "adam")
    run.train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed, whole)
    assert resumed.amss.steps == whole.amss.steps == 2 * BATCHES
    torch.testing.assert_close(resumed.amss.state_dict(), whole.amss.state_dict(), rtol=0, atol=0)


def test_resuming_without_the_state_of_amss_gives_something_else(tmp_path):
    """So that the test above can fail."""
    whole = trained(Model(), tmp_path, **SAVE)
    resumed = Model()
    run = trainer(resumed, tmp_path, callback=AMSSCallback(resumed.amss, resume=False))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.amss.steps == 2 * BATCHES - 4 and differ(resumed, whole)


def test_a_checkpoint_elsewhere_is_named_and_one_without_the_state_is_refused(tmp_path):
    whole = trained(Model(), tmp_path / "one", **SAVE)
    checkpoint = shutil.move(tmp_path / "one" / "checkpoint-4", tmp_path / "moved")
    resumed = Model()
    run = trainer(resumed, tmp_path / "two")
    with pytest.raises(FileNotFoundError, match=r"there is no .*two/checkpoint-4/amss.pt: give .*resume=folder"):
        run.train(resume_from_checkpoint=str(checkpoint))
    resumed = Model()
    run = trainer(resumed, tmp_path / "two", callback=AMSSCallback(resumed.amss, resume=checkpoint))
    run.train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed, whole)


def test_an_interrupted_write_leaves_the_state_that_was_there(tmp_path, monkeypatch):
    model = trained(Model(), tmp_path, max_steps=4, **SAVE)
    file = tmp_path / "checkpoint-4" / "amss.pt"
    before = file.read_bytes()

    def interrupted(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", interrupted)
    run = trainer(model, tmp_path, max_steps=4)
    run.state.global_step = 4
    with pytest.raises(OSError, match="disk full"):
        run.callback_handler.on_save(run.args, run.state, run.control)
    assert file.read_bytes() == before


def test_training_again_without_a_checkpoint_goes_on_with_the_same_state(tmp_path):
    model = Model()
    run = trainer(model, tmp_path, num_train_epochs=1)
    run.train()
    state = copy.deepcopy(model.amss.state_dict())
    run.train()
    assert state["step"] == BATCHES and model.amss.steps == 2 * BATCHES


def test_the_log_history_has_the_ratios(tmp_path):
    model = Model()
    run = trainer(model, tmp_path, logging_strategy="steps", logging_steps=3, **SAVE)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 4 and len({log["amss/audio"] for log in logs}) > 1
    assert {name: logs[-1][f"amss/{name}"] for name in NAMES} == model.amss.rho
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert saved["log_history"][-1]["amss/video"] == model.amss.rho["video"]


def test_evaluation_between_steps_changes_nothing(tmp_path):
    model = Model()
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2)
    run.train()
    assert_same(model, by_hand(Model()))
