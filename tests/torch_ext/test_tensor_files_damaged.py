"""Files damaged at random: what is left of them is read as tensors or refused."""

import json
import os
import random

import pytest
import torch

from forked import run_forked
from mmbal.checkpoints.tensor_files import open_tensors
from mmbal.checkpoints.tensor_writing import Entry, write_safetensors, write_torch


def seeds(folder) -> dict[str, bytes]:
    """A small file of each kind."""
    tensors = {
        "a.weight": torch.randn(3, 4),
        "b": torch.ones(5, dtype=torch.bool),
        "c": torch.tensor(2, dtype=torch.int64),
        "d": torch.randn(0, 2).half(),
        "e": torch.randn(2, 2).bfloat16(),
    }
    entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: [t]) for n, t in tensors.items()]
    write_safetensors(folder / "safetensors", entries, {"format": "pt"})
    write_torch(folder / "written", entries)
    checkpoint = {"state_dict": tensors, "epoch": 3, "extra": [1.5, {"set"}, torch.eye(2).to_sparse()]}
    torch.save(checkpoint, folder / "zip")
    torch.save(checkpoint, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "script"))
    (folder / "index").write_text(json.dumps({"weight_map": {name: "safetensors" for name in tensors}}))
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(result) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 30))
        kind = chance.randrange(6)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            result[at : at + size] = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
        elif kind == 2:
            del result[at : at + size]
        elif kind == 3:
            del result[at:]
        elif kind == 4:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            result[at:at] = other[start : start + chance.choice((size, 300))]
        else:
            start = chance.randrange(len(result) + 1)
            result[at : at + size] = result[start : start + size]
    return bytes(result)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("kind", ["safetensors", "written", "zip", "legacy", "script", "index"])
def test_damaged_files_are_read_as_tensors_or_refused(tmp_path, kind):
    (tmp_path / "seeds").mkdir()
    files = seeds(tmp_path / "seeds")
    path = tmp_path / "seeds" / "damaged"

    def attempt():
        chance = random.Random(kind)
        counts = {"read": 0, "refused": 0}
        for _ in range(400):
            path.write_bytes(mutated(files[kind], list(files.values()), chance))
            try:
                with open_tensors(path) as opened:
                    for name, tensor in opened.items():
                        assert tensor.shape == opened.shape(name) and tensor.dtype == opened.dtype(name)
                        assert tensor.device.type == "cpu" and tensor.layout == torch.strided
                        tensor.clone()
                counts["read"] += 1
            except ValueError as error:
                assert str(error).startswith(str(path)) and len(str(error)) < len(str(path)) + 600
                counts["refused"] += 1
        assert counts["refused"] > 30
        assert counts["read"] > {"script": -1, "index": 0}.get(kind, 10)  # otherwise the mutations reach nothing
        return "done"

    status, text = run_forked(attempt, limit_mib=600, seconds=100)
    assert (status, text) == (0, "done"), (path, text)
