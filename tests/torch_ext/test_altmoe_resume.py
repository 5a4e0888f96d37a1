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

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 120

        def __getitem__(self, row):
            item = {name: x[row] for name, x in data.items()}
            if workers == 0:  # a transform that a user may have
                noise = random.random() + np.random.rand()
                item = {name: x + 0.01 * noise * torch.randn(len(x)) for name, x in item.items()}
            return item | {"rows": row}

    workers = int(sys.argv[4])
    loader = torch.utils.data.DataLoader(Rows(), batch_sampler=sampler, num_workers=workers)
    while trainer.steps < 90:
        for batch in loader:
            rows = batch.pop("rows").tolist()
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


def start(folder, pause, state, workers):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(pause), state, str(workers)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def steps_of(folder):
    log = folder / "log"
    return [line for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("state, workers", [("shared", 0), ("per_direction", 0), ("shared", 1)])
def test_a_run_that_is_killed_twice_in_an_epoch_ends_bit_for_bit_as_one_that_is_not(tmp_path, state, workers):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    undisturbed = start(whole, 0, state, workers)
    for until in (30, 60):
        process = start(killed, 0.02, state, workers)
        deadline = time.monotonic() + 100
        while not any(line.startswith(f"{until} ") for line in steps_of(killed)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "final.pt").exists()
    finish(start(killed, 0, state, workers))
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


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.connector.state_dict().items()}


@pytest.mark.parametrize("at", [2, 3, 4, 6])
def test_a_loader_of_torch_goes_on_bit_for_bit_in_an_epoch_and_between(tmp_path, at):
    z = torch.randn(40, 5)
    pairs = [(row, torch.cat([row, row[:2]])) for row in z]

    def run(upto, save=None, load=None):
        sampler = mmbal.ResumableBatchSampler(40, 10)
        trainer = small(sampler=sampler)
        loader = torch.utils.data.DataLoader(pairs, batch_sampler=sampler)
        if load is not None:
            trainer.load(load)
        if trainer.steps == at:
            trainer.evaluate({"a": z, "b": torch.cat([z, z[:, :2]], 1)})  # draws nothing
        while trainer.steps < upto:
            for a, b in loader:
                trainer.step({"a": a, "b": b})
                if trainer.steps == save:
                    trainer.save(tmp_path / "checkpoint.pt")
                if trainer.steps == upto:
                    break
        return weights_of(trainer)

    whole = run(10, save=at)
    torch.manual_seed(99)
    again = run(10, load=tmp_path / "checkpoint.pt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_an_evaluation_leaves_the_random_numbers():
    trainer, before = small(), torch.get_rng_state()
    trainer.evaluate({"a": torch.randn(4, 5), "b": torch.randn(4, 7)} for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)


def batch_of(rows=6):
    return {"a": torch.randn(rows, 5), "b": torch.randn(rows, 7)}


def broken(state, *path, value):
    """The state with another value at the path; ``KeyError``: without it."""
    first, *rest = path
    changed = dict(state) if isinstance(state, dict) else list(state)
    if rest:
        changed[first] = broken(state[first], *rest, value=value)
    elif value is KeyError:
        del changed[first]
    else:
        changed[first] = value
    return changed


REFUSED = {
    "steps must be 1 as in this schedule, got 2": (("alternation", "schedule", "steps"), 2),
    "the state must have 'count'": (("alternation", "schedule", "count"), KeyError),
    "the state must have 'optimizer'": (("alternation", "optimizer"), KeyError),
    "batches must be a number of batches, got 'x'": (("alternation", "batches"), "x"),
    "optimizer must have groups of": (("alternation", "optimizer", "param_groups"), []),
    "moments must be a list of those of 2 tasks": (("alternation", "moments"), [{}]),
    "scaler: the state must have 'scale'": (("alternation", "scaler"), {}),
    "lr_scheduler: the state must have": (("alternation", "lr_scheduler"), {}),
    "batch_size must be 6 as here, got 5": (("sampler", "batch_size"), 5),
    "batches must be an integer of at least 0, got -1": (("sampler", "batches"), -1),
    "the connector must be as here: top_k 2, got 1": (("config", "top_k"), 1),
    "the connector must be as here: dropout 0.1, got 0.5": (("config", "dropout"), 0.5),
    r"connector: the state lacks \['gate.weight'\]": (("connector", "gate.weight"), KeyError),
    "connector: gate.weight must be": (("connector", "gate.weight"), torch.zeros(3)),
    "encoder a: the state lacks": (("encoders", "a"), {}),
    "random state: not one of torch": (("random", 0, "torch"), torch.zeros(3, dtype=torch.uint8)),
    "the state must have 'sampler'": (("sampler",), KeyError),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_state_has_changed_nothing(message):
    def make():
        torch.manual_seed(0)
        connector, encoder = (
            mmbal.MoEConnector({"a": 5, "b": 7}, hidden=8, num_experts=4, top_k=2),
            torch.nn.Linear(5, 5),
        )
        optimizer = torch.optim.AdamW([*connector.parameters(), *encoder.parameters()], lr=0.01)
        return mmbal.AlternatingTrainer(
            connector,
            optimizer,
            encoders={"a": encoder},
            state="per_direction",
            amp=torch.float16,
            lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
            sampler=mmbal.ResumableBatchSampler(60, 6),
        )

    trained, fresh = make(), make()
    for _ in range(4):
        trained.step(batch_of())
    path, value = REFUSED[message]
    weights, random = weights_of(fresh), torch.get_rng_state()
    encoder = fresh.encoders["a"].weight.clone()
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(broken(trained.state_dict(), *path, value=value))
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(fresh).items())
    assert torch.equal(fresh.encoders["a"].weight, encoder) and torch.equal(torch.get_rng_state(), random)
    assert (fresh.steps, fresh.schedule.count, fresh.sampler.batches, len(fresh.optimizer.state)) == (0, 0, 0, 0)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.steps == 4


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    trainer, path = small(), tmp_path / "checkpoint.pt"
    trainer.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read"):
        trainer.load(path)
    for content in ([1], {"a": 1}, broken(trainer.state_dict(), "sampler", value=KeyError)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="checkpoint.pt is of another run, or none: load_state_dict"):
            trainer.load(path)
    with pytest.raises(FileNotFoundError):
        trainer.load(tmp_path / "nothing")


@pytest.mark.parametrize("compiled", ["saved", "loaded"])
def test_checkpoints_go_between_compiled_and_eager_connectors(tmp_path, compiled):
    trainers = []
    for which in ("saved", "loaded"):
        connector = mmbal.MoEConnector({"a": 5, "b": 7}, hidden=8, num_experts=4, top_k=2)
        model = torch.compile(connector, backend="eager") if which == compiled else connector
        trainers.append(mmbal.AlternatingTrainer(model, torch.optim.AdamW(connector.parameters())))
    trainers[0].save(tmp_path / "checkpoint.pt")
    trainers[1].load(tmp_path / "checkpoint.pt")
    old = trainers[0].state_dict()
    assert "gate.weight" in old["connector"]
    old["connector"] = {f"_orig_mod.{name}": torch.zeros_like(value) for name, value in old["connector"].items()}
    trainers[1].load_state_dict(old)
    assert all((p == 0).all() for p in trainers[1].connector.parameters())
