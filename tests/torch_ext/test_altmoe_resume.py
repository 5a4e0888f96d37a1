"""A training process that is killed goes on from its last checkpoint, bit for bit as if it had not been."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import mmbal

SCRIPT = textwrap.dedent(
    """
    import random, sys, time
    import numpy as np, torch, mmbal

    folder, pause = sys.argv[1], float(sys.argv[2])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(120, 6, generator=generator)
    dims = {"a": 5, "b": 7, "c": 4}
    data = {name: z @ torch.randn(6, dim, generator=generator) for name, dim in dims.items()}

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    connector = mmbal.MoEConnector(dims, hidden=12, num_experts=4, top_k=2, dropout=0.2)
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-2, weight_decay=0.1)
    trainer = mmbal.AlternatingTrainer(
        connector,
        optimizer,
        mmbal.DirectionSchedule.adaptive(connector.directions, seed=4),
        state=sys.argv[3],
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90),
        sampler=(sampler := mmbal.ResumableBatchSampler(120, 10, seed=2)),
    )
    try:
        trainer.load(f"{folder}/checkpoint.pt")
    except FileNotFoundError:
        pass
    log = open(f"{folder}/log", "a")
    while trainer.steps < 90:
        for rows in sampler:
            noise = random.random() + np.random.rand()  # of a transform that a user may have
            batch = {name: x[rows] + 0.01 * noise * torch.randn(10, dims[name]) for name, x in data.items()}
            info = trainer.step(batch)
            print(trainer.steps, info.direction, rows, info.loss.item(), file=log, flush=True)
            if trainer.steps % 7 == 0:
                trainer.save(f"{folder}/checkpoint.pt")
            if trainer.steps == 40:
                trainer.schedule.update({d: v[5] for d, v in trainer.evaluate(data).items()})
            time.sleep(pause)
            if trainer.steps == 90:
                break
    torch.save(connector.state_dict(), f"{folder}/final.pt")
    """
)


def start(folder, pause, state):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(pause), state]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def steps_of(folder):
    log = folder / "log"
    return [line for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("state", ["shared", "per_direction"])
def test_a_run_that_is_killed_twice_ends_bit_for_bit_as_one_that_is_not(tmp_path, state):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    undisturbed = start(whole, 0, state)
    for until in (30, 60):
        process = start(killed, 0.02, state)
        deadline = time.monotonic() + 100
        while not any(line.startswith(f"{until} ") for line in steps_of(killed)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "final.pt").exists()
    finish(start(killed, 0, state))
    finish(undisturbed)

    expected = {int(line.split()[0]): line for line in steps_of(whole)}
    found = steps_of(killed)
    assert len(expected) == 90 < len(found)  # some steps were done again
    for line in found:  # same batches, directions and losses, each time
        assert line == expected[int(line.split()[0])]
    a, b = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def small(encoders=None, **options):
    torch.manual_seed(0)
    connector = mmbal.MoEConnector({"a": 5, "b": 7}, hidden=8, num_experts=4, top_k=2, dropout=0.1)
    parameters = [*connector.parameters(), *(p for e in (encoders or {}).values() for p in e.parameters())]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01)
    return mmbal.AlternatingTrainer(connector, optimizer, encoders=encoders, **options)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    trainer, path = small(), tmp_path / "checkpoint.pt"
    trainer.save(path)
    before = path.read_bytes()

    def fail(state, file):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        trainer.save(path)
    assert path.read_bytes() == before


def test_of_encoders_what_is_trained_is_kept_and_frozen_weights_are_not(tmp_path):
    def encoder(seed):
        torch.manual_seed(seed)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 5))
        layers[0].requires_grad_(False)
        return layers

    first, second = encoder(1), encoder(1)
    trainer, other = small({"a": first}), small({"a": second})
    for _ in range(3):
        trainer.step({"a": torch.randn(8, 3), "b": torch.randn(8, 7)})
    trainer.save(tmp_path / "checkpoint.pt")
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["encoders"]["a"]
    assert "0.weight" not in kept and "1.running_mean" in kept and "2.weight" in kept
    other.load(tmp_path / "checkpoint.pt")
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_state_of_another_kind_of_run_is_refused():
    trainer, state = small(), small().state_dict()
    for message, change in {
        "format_version must be 1, got 9": {"format_version": 9},
        "must have a sampler if, and only if, this trainer has one": {"sampler": {}},
        r"encoders must be \[\], got \['a'\]": {"encoders": {"a": {}}},
        "the state is of 3 processes, these are 1": {"random": state["random"] * 3},
    }.items():
        with pytest.raises(ValueError, match=message):
            trainer.load_state_dict({**state, **change})
