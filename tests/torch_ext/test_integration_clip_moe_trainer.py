"""transformers' Trainer with a CLIP-MoE: the router stage of DMU, its checkpoints, and going on from one."""

import copy

import pytest
import torch
from transformers import AutoModel, Trainer, TrainingArguments

import mmbal
from clip_moe_models import assert_identical
from mmbal.integrations.clip_moe import CLIPMoEModel, as_clip_moe


class Pairs(torch.utils.data.Dataset):
    """Images whose brightness pattern is named by their words."""

    def __init__(self, count=32):
        generator = torch.Generator().manual_seed(7)
        self.kinds = torch.randint(0, 4, (count,), generator=generator)
        self.noise = torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.kinds)

    def __getitem__(self, i):
        kind = int(self.kinds[i])
        pixels = 0.3 * self.noise[i]
        pixels[:, kind * 4 : kind * 4 + 4] += 2
        words = torch.tensor([48, 5 + kind, 9, 9 + kind, 49, 49, 49, 49, 49])
        return {"input_ids": words, "pixel_values": pixels, "attention_mask": (torch.arange(9) < 5).long(), "note": i}


def loss_of(model):
    items = [{name: value for name, value in item.items() if name != "note"} for item in Pairs()]
    with torch.no_grad():
        return model.eval()(**collate(items), output_router_logits=False).loss.item()


def collate(items):
    batch = {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "pixel_values")}
    assert "note" not in items[0]  # columns that forward does not take are removed by the Trainer
    batch["attention_mask"] = torch.stack([item["attention_mask"] for item in items])
    return batch | {"return_loss": True}


@pytest.fixture
def moe(make_clip, siblings):
    base = make_clip(0)
    return as_clip_moe(mmbal.upcycle(copy.deepcopy(base), siblings(base, 3)))


def arguments(folder, steps, **options):
    options = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "save_steps": 6, "logging_steps": 1} | options
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **options,
    )


def train(model, folder, steps, resume=None, **options):
    trainer = Trainer(model, arguments(folder, steps, **options), train_dataset=Pairs(), data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_router_stage_trains_the_routers_alone_and_its_checkpoints_load_and_go_on(moe, tmp_path):
    frozen = mmbal.freeze_except_router(moe)
    moe.config.output_router_logits = True
    start = copy.deepcopy(moe)
    losses = train(moe, tmp_path / "a", 12)
    assert loss_of(moe) < 0.98 * loss_of(start)
    for (name, now), before in zip(moe.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(now, before) != (name in frozen), name

    last = AutoModel.from_pretrained(tmp_path / "a" / "checkpoint-12")
    assert type(last) is CLIPMoEModel and last.config.output_router_logits
    assert_identical(last, moe)

    resumed = copy.deepcopy(start)
    again = train(resumed, tmp_path / "a", 12, resume=str(tmp_path / "a" / "checkpoint-6"))
    assert again[6:] == losses[6:]
    assert_identical(resumed, moe)


def test_gradient_checkpointing_trains_the_same_routers(moe, tmp_path):
    mmbal.freeze_except_router(moe)
    other = copy.deepcopy(moe)
    train(moe, tmp_path / "a", 3)
    options = {"use_reentrant": False}
    train(other, tmp_path / "b", 3, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)
    assert_identical(other, moe)


def test_the_trainer_evaluates_without_the_balance_loss(moe, tmp_path):
    moe.config.output_router_logits, moe.config.router_aux_loss_coef = True, 100.0
    trainer = Trainer(moe, arguments(tmp_path, 1), eval_dataset=Pairs(), data_collator=collate)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(moe), rel=1e-5)
