"""AMSS and BTW with models on the GPU: as on the CPU, and without a wait in a training step."""

from contextlib import contextmanager

import pytest
import torch
from case import Random
from torch import nn

import mmbal

NAMES = ("audio", "video")


@contextmanager
def no_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def encoders(device):
    torch.manual_seed(3)
    made = {name: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 8)) for name in NAMES}
    return {name: encoder.to(device) for name, encoder in made.items()}


def batch(step, device):
    """Gradients, outputs and labels of a step: the same numbers on either device."""
    random = Random(step)
    gradients = [random.normal(*p.shape, dtype=torch.float32) for e in encoders("cpu").values() for p in e.parameters()]
    outputs = {n: (random.normal(30, 4, dtype=torch.float32), random.normal(30, 8, dtype=torch.float32)) for n in NAMES}
    y = (random.uniform(30) * 4).long()
    outputs = {name: tuple(t.to(device) for t in pair) for name, pair in outputs.items()}
    return [g.to(device) for g in gradients], outputs, y.to(device)


OPTIONS = {
    "AMSS": {},
    "AMSS+": {"plus": True, "ema": 0.5},
    "elements": {"unit": "element", "plus": True},
    "a prior": {"prior": torch.full((4,), 0.25), "importance": "gn_wn"},
    "fixed": {"rho": {"audio": 0.3, "video": 0.8}},
    "after the step": {"where": "update", "plus": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_amss_masks_what_it_masks_on_the_cpu_and_waits_for_nothing(options):
    found = []
    for device in ("cpu", "cuda"):
        parts = encoders(device)
        parameters = [p for encoder in parts.values() for p in encoder.parameters()]
        amss = mmbal.AMSS(parts, **options)
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        if amss.where == "update":
            amss.attach(optimizer, step=False)
        for step in range(3):
            gradients, outputs, y = batch(step, device)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            if step == 0 or device == "cpu":  # the first moves what was made on the CPU
                amss.step(outputs, y)
                optimizer.step()
            else:
                with no_wait():
                    amss.step(outputs, y)
                    optimizer.step()
        assert amss.skipped == 0
        found.append(([p.detach().cpu() for p in parameters], amss.rho, amss.state_dict()))
    (on_cpu, rho, _), (on_gpu, rho_there, state) = found
    assert rho_there == pytest.approx(rho, abs=1e-6)
    for expected, actual in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert state["rho"].is_cuda and all(energy.is_cuda for energy in state["energy"].values())


def test_amss_goes_on_from_a_state_that_was_loaded_on_the_cpu():
    parts = encoders("cuda")
    amss, again = mmbal.AMSS(parts, plus=True, ema=0.5), mmbal.AMSS(parts, plus=True, ema=0.5)
    parameters = [p for encoder in parts.values() for p in encoder.parameters()]
    masked = []
    for step in range(2):
        gradients, outputs, y = batch(step, "cuda")
        for one in (amss, again)[: 1 + step]:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            one.step(outputs, y)
            masked.append([p.grad.clone() for p in parameters])
        if step == 0:
            state = amss.state_dict()
            energy = {id: values.cpu() for id, values in state["energy"].items()}
            again.load_state_dict({**state, "energy": energy, "rho": state["rho"].cpu()})
    assert all(torch.equal(a, b) for a, b in zip(masked[1], masked[2], strict=True))


def test_a_gradient_that_is_not_finite_leaves_all_as_they_are():
    parts = encoders("cuda")
    amss = mmbal.AMSS(parts)
    parameters = [p for encoder in parts.values() for p in encoder.parameters()]
    gradients, outputs, y = batch(0, "cuda")
    gradients[2][1, 3] = float("inf")
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    amss.step(outputs, y)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, gradients, strict=True))
    assert amss.skipped == 1


@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_btw_learns_the_table_that_it_learns_on_the_cpu(task):
    random = Random(9)
    N, shape = 200, (200,) if task == "regression" else (200, 3)
    fused = random.normal(*shape, dtype=torch.float32)
    unimodal = {name: fused + random.normal(*shape, dtype=torch.float32) for name in NAMES}
    target = fused + 0.3 * random.normal(*shape, dtype=torch.float32) if task == "regression" else None
    present = random.uniform(N, 2) < 0.8
    tables = []
    for device in ("cpu", "cuda"):
        btw = mmbal.BTW(NAMES, task, num_samples=N).to(device)
        for _ in range(2):  # from wherever the predictions were collected
            btw.update(torch.arange(N), unimodal, fused, target, present=present)
        assert btw.table.device.type == device and btw.mutual_info.device.type == device
        tables.append((btw.table.cpu(), btw.mean.cpu(), btw.mutual_info.cpu()))
    for expected, actual in zip(*tables, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_btw_weighs_embeddings_without_a_wait():
    random = Random(10)
    btw = mmbal.BTW(NAMES, num_samples=50).cuda()
    values = [random.normal(50, dtype=torch.float32).cuda() for _ in range(4)]
    unimodal = dict(zip(NAMES, values, strict=False))
    index = torch.arange(50, device="cuda")
    btw.update(index, unimodal, values[2], values[3])
    btw.fit_sigma(index, unimodal, values[2], values[3])
    btw.weights(unimodal=unimodal, fused=values[2])  # looks at sigma once
    embeddings = {name: random.normal(8, 5, dtype=torch.float32).cuda() for name in NAMES}
    with no_wait():
        weighed = btw.apply(embeddings, index[:8])
        btw.apply(embeddings)
        fresh = btw.weights(unimodal=unimodal, fused=values[2])
    assert fresh.shape == (50, 2)
    for m, name in enumerate(NAMES):
        torch.testing.assert_close(weighed[name], embeddings[name] * btw.table[:8, m : m + 1])
