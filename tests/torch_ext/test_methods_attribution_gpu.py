"""AttributionRegularizer where numbers lie on a device: it must not look at any, and give what it gives on a CPU. Fake
tensors have no numbers, so that whoever looks at one fails."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import mmbal
from mmbal.methods import rows


class Model(nn.Module):
    def __init__(self, linear, dtype=torch.float32):
        super().__init__()

        def layer(features, out):
            return nn.Linear(features, out, dtype=dtype)

        self.audio, self.video = layer(6, 5), layer(7, 4)
        self.head = layer(9, 3) if linear else nn.Sequential(layer(9, 8), nn.Tanh(), layer(8, 3))

    def forward(self, audio, video):
        return self.head(torch.cat([self.audio(audio), self.video(video)], -1))


WAYS = {
    "double": {},
    "in 16 bits": {"dtype": torch.bfloat16},
    "level batch": {"level": "batch"},
    "closed": {"linear": True},
    "closed, in 16 bits": {"linear": True, "dtype": torch.bfloat16},
    "closed, masked": {"linear": True, "present": True, "zeros": True},
    "masked": {"present": True, "zeros": True},
    "batch without a modality": {"level": "batch", "absent": True},
    "labels": {"target": True},
    "labels, closed": {"target": True, "linear": True},
    "shares of the call": {"shares": {"audio": 1.0, "video": 3.0}},
    "no gradients": {"linear": True, "no_grad": True},
}


def run(
    linear=False,
    dtype=torch.float32,
    level="sample",
    present=False,
    zeros=False,
    absent=False,
    target=False,
    shares=None,
    no_grad=False,
):
    torch.manual_seed(3)
    model = Model(linear, dtype)
    audio, video = torch.randn(10, 6).to(dtype), torch.randn(10, 7).to(dtype)
    tap = mmbal.EmbeddingTap(model, {"audio": "audio", "video": "video"})
    regularizer = mmbal.AttributionRegularizer(tap, model.head if linear else None, level=level)
    regularizer._given = 2  # calls with logits: in the third they are not compared
    there = torch.ones(10, 2, dtype=torch.bool)
    if present:
        there[1, 0] = there[2, 0] = there[2, 1] = False
    if absent:
        there[:, 1] = False
    if zeros:
        model.video.bias.data.zero_()
        video[4] = 0
    with torch.no_grad() if no_grad else contextlib.nullcontext():
        logits = model(audio, video)
        value, info = regularizer(
            logits=logits,
            target=torch.arange(10) % 3 if target else None,
            present=there if present or absent else None,
            shares=shares,
        )
    if value.requires_grad:
        (logits.float().sum() + value).backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [value, info.shares, info.magnitudes, info.counted, *gradients]


@pytest.mark.parametrize("way", WAYS)
def test_without_a_look_at_numbers_the_results_are_the_same(way, monkeypatch):
    expected = run(**WAYS[way])
    monkeypatch.setattr(rows, "at_hand", lambda tensor: False)
    got = run(**WAYS[way])
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_no_number_is_looked_at(way, monkeypatch):
    monkeypatch.setattr(rows, "at_hand", lambda tensor: False)
    with FakeTensorMode():
        assert len(run(**WAYS[way])) > 4


@pytest.mark.parametrize("way", ["double", "closed", "labels"])
def test_on_a_cpu_numbers_are_looked_at(way):
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        run(**WAYS[way])


def test_shares_look_at_no_number_of_the_head(monkeypatch):
    monkeypatch.setattr(rows, "at_hand", lambda tensor: False)
    with FakeTensorMode():
        model = Model(linear=False)
        tap = mmbal.EmbeddingTap(model, {"audio": "audio", "video": "video"})
        logits = model(torch.randn(10, 6), torch.randn(10, 7))
        info = mmbal.attribution_shares(tap, logits)
        assert info.shares.shape == (10, 2)


def test_only_numbers_on_a_cpu_are_at_hand():
    assert rows.at_hand(torch.zeros(1))
    assert not rows.at_hand(torch.zeros(1, device="meta"))
