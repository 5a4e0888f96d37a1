"""Taps of embeddings, the monitor of shares, and the errors of the regulariser of attributions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmbal
from mmbal import AttributionRegularizer, EmbeddingTap
from test_methods_attribution_models import NAMES, TAPPED, Model, batch, equal

# --- EmbeddingTap -----------------------------------------------------------------------------------------------------


def test_a_tap_gives_embeddings_and_head_parameters_until_it_is_removed():
    model = Model()
    with EmbeddingTap(model, {"audio": model.audio_net, "video": "video_net"}) as tap:
        with pytest.raises(RuntimeError, match="encoder 'audio' has not run"):
            _ = tap.embeddings
        x, _ = batch()
        model(x)
        assert list(tap.embeddings) == NAMES and equal(list(tap.embeddings.values()), list(model.encode(x)))
        model.head[0].bias.requires_grad_(False)
        head = model.head
        assert [id(p) for p in tap.head_parameters()] == [id(p) for p in (head[0].weight, *head[3].parameters())]
    model(x)
    assert not model._forward_pre_hooks and not model.audio_net._forward_hooks
    with pytest.raises(RuntimeError, match="has not run"):
        _ = tap.embeddings


def test_a_tap_of_outputs_that_are_no_tensors_and_of_frozen_encoders():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 6)

        def forward(self, x):
            return self.layer(x), "more"

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.plain, self.head = Pair(), nn.Linear(5, 6), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(torch.cat([self.pair(x)[0], self.plain(x).relu_()], 1))

    model, x = Whole(), torch.randn(4, 5)
    with (
        EmbeddingTap(model, {"a": "pair", "b": "plain"}),
        pytest.raises(TypeError, match="'a' must give a tensor, got tuple"),
    ):
        model(x)
    tap = EmbeddingTap(model, {"a": "pair", "b": "plain"}, select={"a": lambda output: output[0]})
    for frozen in (False, True):
        model.pair.requires_grad_(not frozen)
        model.plain.requires_grad_(not frozen)
        regularizer = AttributionRegularizer(tap)
        logits = model(x)
        value, info = regularizer(logits=logits)
        assert (info.magnitudes > 0).all()
        (logits.sum() + value).backward()
        assert torch.equal(logits, model(x))


def test_an_encoder_that_runs_twice_is_refused_but_not_one_that_checkpointing_runs_again():
    model = Model()
    tap = EmbeddingTap(model, TAPPED)
    x, y = batch()
    for _ in range(2):
        last = model.encode(x)  # by itself it may run as often as it likes
    assert tap.embeddings["audio"] is last[0]
    model.encode = lambda x: (model.audio_net(x["audio"]), model.audio_net(x["audio"]))
    with pytest.raises(RuntimeError, match="'audio' ran twice in one forward pass"):
        model(x)
    del model.encode
    model(x)

    class Again(Model):
        def encode(self, x):
            return checkpoint(self.audio_net, x["audio"], use_reentrant=False), self.video_net(x["video"])

    again = Again()
    tap = EmbeddingTap(again, TAPPED)
    logits = again(x)
    value, _ = AttributionRegularizer(tap)(logits=logits)
    (F.cross_entropy(logits, y) + value).backward()
    assert again.audio_net[0].weight.grad.any()


# --- Monitor ----------------------------------------------------------------------------------------------------------


def test_a_monitor_logs_each_modality_and_draws_the_shares(tmp_path):
    model, logged = Model(), []
    monitor = mmbal.AttributionMonitor(lambda name, value, step: logged.append((name, value, step)))
    with pytest.raises(RuntimeError, match="nothing to plot yet"):
        monitor.plot(tmp_path / "shares.png")
    tap = EmbeddingTap(model, TAPPED)
    for step in range(3):
        logits = model(batch(seed=step)[0])
        info = mmbal.attribution_shares(tap, logits)
        assert not info.shares.requires_grad
        means = monitor(info, 10 * step)
        assert means == info.mean() and sum(means.values()) == pytest.approx(1)
        logits.sum().backward()  # the graph stays
    assert [(name, step) for name, _, step in logged] == [
        (f"attribution/{name}", step) for step in (0, 10, 20) for name in NAMES
    ]
    monitor(mmbal.attribution_shares({n: torch.zeros(2, 6) for n in NAMES}, head=model.head))
    assert monitor.steps == [0, 10, 20, 21] and math.isnan(monitor.history["audio"][-1])
    monitor.plot(tmp_path / "plots" / "shares.png", asked={"audio": 1, "video": 1})
    assert [f.name for f in (tmp_path / "plots").iterdir()] == ["shares.png"]
    assert (tmp_path / "plots" / "shares.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="info must be of"):
        monitor(mmbal.attribution_shares([torch.randn(2, 6)] * 2, head=model.head))


# --- Errors -----------------------------------------------------------------------------------------------------------

LINEAR = nn.Linear(12, 3)
EMBEDDINGS = {"audio": torch.randn(4, 6), "video": torch.randn(4, 6)}
MADE = [
    ({"modalities": "audio"}, r"modalities must be different names, at least two, got 'audio'"),
    ({"modalities": ["audio"]}, r"modalities must be different names, at least two, got \['audio'\]"),
    ({"mode": "triple"}, r"mode must be one of auto, double, forward, difference, closed, got 'triple'"),
    ({"score": "prob"}, r"score must be one of odds, logit, got 'prob'"),
    ({"level": "epoch"}, r"level must be one of sample, batch, got 'epoch'"),
    ({"pool": "l1"}, r"pool must be one of l2, rms, got 'l1'"),
    ({"penalty": "l3"}, r"penalty must be one of l1, squared, huber, got 'l3'"),
    ({"attribution": "lime"}, r"attribution must be one of gradxinput, ig, got 'lime'"),
    ({"ig_steps": 0}, r"ig_steps must be an integer of at least 1, got 0"),
    ({"warmup_steps": 0.5}, r"warmup_steps must be an integer of at least 0, got 0.5"),
    ({"difference_step": 0}, r"difference_step must be from 0 to 1, got 0"),
    ({"eps": 1.0}, r"eps must be from 0 to below 1, got 1.0"),
    ({"head": None, "mode": "forward"}, r"mode 'forward' needs head, .* got None"),
    ({"head": None, "attribution": "ig"}, r"attribution 'ig' needs head, .* got None"),
    ({"head": None}, r"parameters must be the head's, for head is no module, got None"),
    ({"head": lambda a, v: a}, r"parameters must be the head's, for head is no module, got None"),
    ({"head": nn.Tanh(), "mode": "closed"}, r"mode 'closed' needs a torch.nn.Linear as head"),
    ({"level": "batch", "mode": "closed"}, r"mode 'closed' needs level 'sample'"),
    (
        {"head": nn.ModuleDict({"video": LINEAR, "audio": LINEAR})},
        r"head must have the keys .* got \['video', 'audio'\]",
    ),
    ({"shares": [1, 2, 3]}, r"shares must be \[M\] or \[B, M\], M = 2, got \[3\]"),
    ({"shares": [1, -1]}, r"shares must be finite, not negative, with a sum above 0, got \[1, -1\]"),
    ({"shares": {"audio": 1}}, r"shares must have the keys \['audio', 'video'\], got \['audio'\]"),
]


@pytest.mark.parametrize(("options", "message"), MADE)
def test_errors_when_made(options, message):
    with pytest.raises(ValueError, match=f"^AttributionRegularizer: {message}"):
        AttributionRegularizer(**{"modalities": NAMES, "head": LINEAR, **options})


CALLED = [
    ({}, {"embeddings": None}, r"embeddings must be given where there is no tap, got None"),
    ({}, {"embeddings": {"audio": torch.ones(4, 6)}}, r"embeddings must have the keys \['audio', 'video'\]"),
    (
        {},
        {"embeddings": [torch.ones(4, 6), torch.ones(3, 6)]},
        r"embeddings\['video'\] must be .*= \[4, ...\], got .*\[3, 6\]",
    ),
    ({}, {"embeddings": [torch.ones(4, 6), torch.ones(4)]}, r"embeddings\['video'\] must be floating point \[B, ...\]"),
    ({}, {"embeddings": [torch.ones(4, 6), torch.ones(4, 6).long()]}, r"embeddings\['video'\] .* got torch.int64"),
    (
        {},
        {"embeddings": [torch.ones(4, 6), torch.ones(4, 5)]},
        r"head takes \[12\] features, got embeddings of \[6, 5\]",
    ),
    ({}, {"target": torch.zeros(4)}, r"target must be int64 \[4\], got torch.float32 \[4\]"),
    ({}, {"target": torch.tensor([0, 1, 2, 3])}, r"target must be below C = 3, got 3"),
    ({}, {"present": torch.ones(4, 2)}, r"present must be bool \[B, M\] = \[4, 2\], got torch.float32"),
    ({}, {"shares": torch.ones(3, 2)}, r"shares must be \[M\] or \[B, M\] with B = 4, got \[3, 2\]"),
    ({"level": "batch"}, {"shares": torch.ones(4, 2)}, r"shares must be \[M\] with level 'batch', got \[4, 2\]"),
    ({}, {"masks": {"text": None}}, r"masks must have keys among \['audio', 'video'\], got \['text'\]"),
    ({}, {"masks": {"audio": torch.ones(4, 5).bool()}}, r"masks\['audio'\] must be bool \[B, T\] = \[4, 6\]"),
    ({}, {"logits": torch.zeros(4, 2)}, r"logits must be \[4, 3\], got \[4, 2\]"),
    ({}, {"logits": torch.ones(4, 3)}, r"logits must be what head makes of these embeddings side by side"),
    (
        {"mode": "closed"},
        {"embeddings": [torch.ones(4, 2, 6), torch.ones(4, 2, 6)]},
        r"mode 'closed' needs embeddings \[B, D\]",
    ),
    ({"head": None, "parameters": []}, {}, r"logits must be given where head is None, got None"),
    ({"head": lambda a, v: a[:3], "parameters": []}, {}, r"logits must be \[B, C\] with B = 4, got \[3, 6\]"),
    ({"head": lambda a, v: "a", "parameters": []}, {}, r"head must give logits \[B, C\], got str"),
]


@pytest.mark.parametrize(("options", "given", "message"), CALLED)
def test_errors_when_called(options, given, message):
    regularizer = AttributionRegularizer(**{"modalities": NAMES, "head": LINEAR, **options})
    with pytest.raises(ValueError, match=f"^AttributionRegularizer: {message}"):
        regularizer(**{"embeddings": EMBEDDINGS, **given})


def test_errors_of_taps_shares_and_monitors():
    model = Model()
    for encoders_, message in (
        ({}, "encoders must be a mapping of at least one modality"),
        (
            {"audio": "sound"},
            r"encoders\['audio'\] must name a submodule such as audio_net, video_net, head, got 'sound'",
        ),
        ({"audio": nn.Linear(2, 2)}, r"encoders\['audio'\] must be a submodule of model"),
        ({"audio": "audio_net", "video": "audio_net"}, "encoders must be different modules"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingTap(model, encoders_)
    with pytest.raises(ValueError, match=r"select must have keys among \['audio', 'video'\], got \['text'\]"):
        EmbeddingTap(model, TAPPED, select={"text": len})
    tap = EmbeddingTap(nn.ModuleDict({"a": nn.Embedding(3, 2)}), {"a": "a"}, select={"a": lambda e: e.long()})
    with pytest.raises(TypeError, match=r"'a' must give floating point, got torch.int64"):
        tap.model["a"](torch.tensor([1]))
    with pytest.raises(TypeError, match=r"unknown options \['penalty'\]"):
        mmbal.attribution_shares(EMBEDDINGS, head=LINEAR, penalty="l1")
    with pytest.raises(ValueError, match="logger must be a function of name, value and step, got str"):
        mmbal.AttributionMonitor("runs")
