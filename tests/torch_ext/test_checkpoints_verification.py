"""What mmbal upcycle says it has verified is true, and what is wrong is found."""

import json
import math
from dataclasses import replace

import pytest
import torch

from checkpoint_helpers import SMALL, random_checkpoint, with_mixtures
from mmbal.checkpoints import LazyTensor, open_checkpoint, write_checkpoint
from mmbal.checkpoints.verification import differing_sizes, differing_tensors, verify_layers

EXPERT = "transformer.resblocks.1.experts.2.c_fc.weight"


def changed(checkpoint, name, change):
    tensor = checkpoint[name].clone()
    change(tensor)
    lazy = LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
    return replace(checkpoint, tensors=checkpoint.tensors | {name: lazy})


def test_experts_that_equal_their_ffns_are_found_to():
    reports = verify_layers(random_checkpoint(with_mixtures(SMALL)), rows=8)
    assert len(reports) == 5
    assert all(report.error < 1e-5 and report.spread > 0.1 for report in reports)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_experts_that_put_out_no_numbers_are_not_found_equal(value):
    broken = changed(random_checkpoint(with_mixtures(SMALL)), EXPERT, lambda t: t[3].fill_(value))
    errors = {report.block: report.error for report in verify_layers(broken, rows=8)}
    assert [block for block in errors if math.isnan(errors[block])] == ["transformer.resblocks.1"]


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [(0.0, -0.0, True), (math.inf, torch.finfo(torch.float32).max, True), (math.nan, math.nan, False), (1, 1, False)],
)
def test_tensors_are_compared_bit_for_bit(before, after, differs):
    base = random_checkpoint(with_mixtures(SMALL))
    first, second = (changed(base, EXPERT, lambda t, v=v: t[0].fill_(v)) for v in (before, after))
    assert differing_tensors(first, second) == ([EXPERT] if differs else [])


def test_a_description_that_says_something_else_is_found(tmp_path):
    long = replace(SMALL, text=replace(SMALL.text, context_length=248))
    checkpoint = random_checkpoint(with_mixtures(long))
    write_checkpoint(checkpoint, tmp_path / "x.pt", "clipmoe")
    assert differing_sizes(open_checkpoint(tmp_path / "x.pt"), checkpoint) == []  # though it has two tables
    side = tmp_path / "x.pt.json"
    config = json.loads(side.read_text())
    config["mixtures"]["text"]["top_k"] = 3
    config["vision"]["heads"] = 2
    side.write_text(json.dumps(config))
    found = differing_sizes(open_checkpoint(tmp_path / "x.pt"), checkpoint)
    assert sorted(found) == ["mixture of text: top_k", "vision: heads"]
