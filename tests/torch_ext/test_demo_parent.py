"""Training of the demo's parent: an interrupted run ends like an uninterrupted one."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from mmbal.demo import parent
from mmbal.demo.data import load_splits

RECIPE = replace(parent.ParentRecipe(), steps=6, batch=16, warmup=2, evaluate_every=3, save_every=2)


def test_a_parent_that_was_stopped_and_resumed_is_the_same_bit_for_bit(monkeypatch, tmp_path):
    whole = parent.train_parent(tmp_path / "whole", RECIPE, progress=False)
    optimise = parent.optimise

    def stop_after_five_steps(*arguments, **options):
        yield from islice(optimise(*arguments, **options), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(parent, "optimise", stop_after_five_steps)
    with pytest.raises(KeyboardInterrupt):
        parent.train_parent(tmp_path / "stopped", RECIPE, progress=False)
    assert (tmp_path / "stopped" / "checkpoint.pt").exists()
    monkeypatch.setattr(parent, "optimise", optimise)
    resumed = parent.train_parent(tmp_path / "stopped", RECIPE, progress=False)

    expected, got = (load_file(folder / "parent.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert (whole / "parent_log.csv").read_text() == (resumed / "parent_log.csv").read_text()


def test_the_splits_share_no_pair_and_hold_out_six_hundred():
    splits = load_splits()
    titles = [{caption.title.lower() for caption in part.captions} for part in vars(splits).values()]
    assert len(splits.test) == 600 and len(splits.validation) == 300 and len(splits.train) == 4807 - 900
    assert not titles[0] & titles[1] and not titles[0] & titles[2] and not titles[1] & titles[2]
