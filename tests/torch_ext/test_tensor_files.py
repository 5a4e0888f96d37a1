"""Files of tensors: what is written is read, by us and by the libraries; lazily, in little memory, never half."""

import json
import os
import signal
from collections import OrderedDict

import pytest
import safetensors.torch
import torch

from forked import resident_anonymous, run_forked
from mmbal.checkpoints.tensor_files import find_weights, open_tensors, read_json
from mmbal.checkpoints.tensor_types import SUPPORTED
from mmbal.checkpoints.tensor_writing import (
    Entry,
    replacing,
    write_safetensors,
    write_sharded_safetensors,
    write_torch,
)


def of_dtype(dtype, shape):
    count = torch.Size(shape).numel()
    data = torch.randint(0, 2 if dtype is torch.bool else 100, (count * dtype.itemsize,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@pytest.fixture
def tensors():
    """Every dtype with every kind of shape, odd sizes included."""
    shapes = [(), (3, 5), (0, 4), (7,)]
    return {
        f"{dtype}.{'x'.join(map(str, shape))}": of_dtype(dtype, shape)
        for dtype in sorted(SUPPORTED, key=str)
        for shape in shapes
    }


def entry(name, tensor, pieces=1):
    split = [tensor] if not tensor.ndim else list(tensor.tensor_split(pieces))
    return Entry(name, tuple(tensor.shape), tensor.dtype, lambda: split)


def entries_of(tensors):
    return [entry(name, tensor, pieces=2) for name, tensor in tensors.items()]


def assert_same(files, tensors):
    assert sorted(files) == sorted(tensors)
    for name, tensor in tensors.items():
        read = files[name]
        assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (read, tensor)]
        assert torch.equal(*bits), name


def assert_read(where, tensors, kind, **about):
    with open_tensors(where) as files:
        assert_same(files, tensors)
        assert {name: files.shape(name) for name in files} == {n: tuple(t.shape) for n, t in tensors.items()}
        assert {name: files.dtype(name) for name in files} == {n: t.dtype for n, t in tensors.items()}
        assert files.kind == kind and len(files) == len(tensors)
        assert {name: getattr(files, name) for name in about} == about


def test_safetensors_are_written_as_the_library_writes_them(tensors, tmp_path):
    write_safetensors(tmp_path / "ours", entries_of(tensors), {"format": "pt"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_safetensors_are_read_whatever_the_file_is_called(tensors, tmp_path):
    write_safetensors(tmp_path / "weights.pt", entries_of(tensors), {"b": "2", "a": "1"})
    assert_read(tmp_path / "weights.pt", tensors, "safetensors", metadata={"a": "1", "b": "2"}, wrapped=False)


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_what_is_written_for_it(tensors, tmp_path, mapped):
    write_torch(tmp_path / "weights.pt", entries_of(tensors))
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True, mmap=mapped)
    assert type(loaded) is OrderedDict and list(loaded) == list(tensors)
    assert_same(loaded, tensors)


def test_torch_files_are_read_whatever_the_file_is_called(tensors, tmp_path):
    write_torch(tmp_path / "weights.safetensors", entries_of(tensors))
    assert_read(tmp_path / "weights.safetensors", tensors, "torch", metadata={}, wrapped=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read(tensors, tmp_path, zipped):
    torch.save(tensors, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "weights.pt", tensors, "torch", wrapped=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_views_and_shared_storages_of_torch_save_are_read(tmp_path, zipped):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"base": base, "transposed": base.T, "part": base[1:3, ::2], "parameter": torch.nn.Parameter(base[0])}
    torch.save(tensors, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "weights.pt", {k: t.detach() for k, t in tensors.items()}, "torch")


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_written_bytes_depend_on_the_tensors_only(tensors, tmp_path, write):
    write(tmp_path / "a", entries_of(tensors))
    again = [entry("".join(list(name)), tensor.clone(), pieces=3) for name, tensor in tensors.items()]
    shape = (3, 5)
    again = [e._replace(shape=shape) if e.shape == shape else e for e in again]
    write(tmp_path / "b", again)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_pieces_may_be_views_with_gradients_and_are_made_once_in_the_given_order(tmp_path, write):
    calls, sizes = [], []
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))

    def make(name, pieces):
        calls.append(name)
        yield from pieces

    write(
        tmp_path / "w",
        [
            Entry("z", (4, 3), torch.float32, lambda: make("z", [weight.T[:1], weight.T[1:1], weight.T[1:]])),
            Entry(
                "a",
                (2,),
                torch.complex64,
                lambda: make("a", [torch.tensor([1 + 2j, 3j], dtype=torch.complex64).conj()]),
            ),
        ],
        progress=sizes.append,
    )
    assert calls == ["z", "a"] and sizes == [12, 0, 36, 16]
    read = open_tensors(tmp_path / "w")
    assert torch.equal(read["z"], weight.T) and read["a"].tolist() == [1 - 2j, -3j]


def test_shards_are_filled_in_order_and_read_by_transformers_rules(tensors, tmp_path):
    index = write_sharded_safetensors(tmp_path / "m", entries_of(tensors), 300, {"format": "pt"})
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    assert index.name == "model.safetensors.index.json"
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3 and sorted(os.listdir(index.parent)) == sorted([*files, index.name])
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    together = {}
    for name in files:
        shard = safetensors.torch.load_file(index.with_name(name))
        assert sum(t.nbytes for t in shard.values()) <= 300
        assert all(content["weight_map"][key] == name for key in shard)
        together |= shard
    assert_same(together, tensors)
    for path in (index, index.parent):
        assert_read(path, tensors, "safetensors", metadata={"format": "pt"}, path=index)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}
    index = write_sharded_safetensors(tmp_path, entries_of(tensors), 50)
    assert len(set(json.loads(index.read_text())["weight_map"].values())) == 3
    assert_read(index, tensors, "safetensors")


def test_what_fits_into_one_shard_has_no_index(tmp_path):
    path = write_sharded_safetensors(tmp_path, [entry("a", torch.ones(3))], 1000)
    assert os.listdir(tmp_path) == ["model.safetensors"] and path == tmp_path / "model.safetensors"


def test_shards_are_not_written_beside_other_weights(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", [entry("a", torch.ones(3))])
    with pytest.raises(ValueError, match="must not hold other weights, got 'model.safetensors'"):
        write_sharded_safetensors(tmp_path, entries_of({"a": torch.ones(9), "b": torch.ones(9)}), 10)


def test_an_index_of_bin_files_is_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "two.bin", "a": "one.bin"}}))
    assert_read(tmp_path, {"b": torch.zeros(3), "a": torch.ones(2)}, "torch", path=index)
    assert list(open_tensors(index)) == ["b", "a"]


def test_weights_of_a_folder_are_found_in_a_fixed_order(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder with one of model\.safetensors, .*open_clip_pytorch_model"):
        find_weights(tmp_path)
    names = ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "pytorch_model.bin.index.json"]
    for name in [*names, "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"]:
        (tmp_path / name).touch()
        assert find_weights(tmp_path) == tmp_path / name


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_gives_its_state_dict(tmp_path, key, zipped):
    layer = torch.nn.Linear(3, 2)
    state = {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)} for i in range(2)}
    checkpoint = {
        "epoch": 3,
        "name": "run",
        key: {f"module._orig_mod.{name}": t for name, t in layer.state_dict().items()},
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.98), "params": [0, 1]}]},
        "extra": [(1, 2.5, None, True), {4: "x"}, {"set"}, torch.float16, torch.device("cpu"), b"bytes"],
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pt", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "epoch_3.pt", layer.state_dict(), "torch", wrapped=True)


def test_prefixes_are_removed_only_where_all_names_have_them(tmp_path):
    for names, wanted in [
        (["module.a", "module.b.c"], ["a", "b.c"]),
        (["_orig_mod.module.a"], ["a"]),
        (["module.a", "b"], ["b", "module.a"]),
        (["module."], ["module."]),
    ]:
        write_safetensors(tmp_path / "w", [entry(name, torch.ones(1)) for name in names])
        files = open_tensors(tmp_path / "w")
        assert sorted(files) == wanted and not files.wrapped
        assert all(files[name].item() == 1 for name in files)


class Scripted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2).half()
        self.register_buffer("context_length", torch.tensor(77))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_read_only_where_it_is_allowed(tmp_path):
    model = Scripted()
    torch.jit.script(model).save(str(tmp_path / "ViT.pt"))
    with pytest.raises(ValueError, match=r"ViT.pt is a TorchScript archive.*allow_jit=True \(--allow-jit\)"):
        open_tensors(tmp_path / "ViT.pt")
    with open_tensors(tmp_path / "ViT.pt", allow_jit=True) as files:
        assert files.kind == "torchscript"
        assert_same(files, model.state_dict())


def test_a_closed_file_is_not_read_but_its_tensors_stay(tmp_path):
    for write in (write_safetensors, write_torch):
        write(tmp_path / "w", [entry("a", torch.arange(5.0))])
        with open_tensors(tmp_path / "w") as files:
            tensor = files["a"]
            with pytest.raises(KeyError):
                files["b"]
        with pytest.raises(ValueError, match="w was closed"):
            files["a"]
        (tmp_path / "w").unlink()
        assert tensor.tolist() == [0, 1, 2, 3, 4]


def test_read_tensors_do_not_reach_the_file(tmp_path):
    for write in (write_safetensors, write_torch):
        write(tmp_path / "w", [entry("a", torch.arange(5.0))])
        before = (tmp_path / "w").read_bytes()
        open_tensors(tmp_path / "w")["a"].zero_()
        assert (tmp_path / "w").read_bytes() == before


def test_reading_and_rewriting_a_large_file_takes_little_anonymous_memory(tmp_path):
    """Files of 128 MiB with two tensors, or of one that is both of them stacked."""
    piece = torch.ones(1 << 20)
    shape = (16, 1 << 20)

    def copy(source, target, write, *rest):
        with open_tensors(tmp_path / source) as files:
            assert files["b"].sum() == (1 << 20) * 120
            written = [Entry(name, shape, torch.float32, lambda name=name: iter([files[name]])) for name in "ab"]
            if rest:
                written = [Entry("c", (2, *shape), torch.float32, lambda: (files[name] for name in "ab"))]
            write(tmp_path / target, written, *rest, progress=watch)

    start, most = 0, 0

    def watch(_):
        nonlocal most
        most = max(most, resident_anonymous() - start)

    def work():
        nonlocal start
        start = resident_anonymous()
        make = [Entry(name, shape, torch.float32, lambda: (piece * i for i in range(16))) for name in "ab"]
        write_safetensors(tmp_path / "first", make, progress=watch)
        copy("first", "second", write_torch)
        copy("second", "third", write_sharded_safetensors, 1 << 27)
        assert open_tensors(tmp_path / "third")["c"][1, 15, 5] == 15
        watch(0)
        return most

    status, text = run_forked(work)
    assert status == 0, text
    assert float(text) < 16  # MiB: some pieces of 4, no tensor of 64


def failing(error):
    def make():
        yield torch.ones(2)
        raise error

    return Entry("b", (4,), torch.float32, make)


WRITERS = [
    (write_safetensors, "w", ()),
    (write_torch, "w", ()),
    (lambda path, entries: write_sharded_safetensors(path.parent, entries, 8), "model-00001-of-00002.safetensors", ()),
]


@pytest.mark.parametrize(("write", "name", "rest"), WRITERS)
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_the_old_file_and_no_other(tmp_path, write, name, rest, error):
    (tmp_path / name).write_text("old")
    with pytest.raises(type(error)):
        write(tmp_path / name, [entry("a", torch.ones(3)), failing(error)], *rest)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "old"
    with pytest.raises(type(error)):
        write(tmp_path / "new" / "deep" / name, [failing(error)], *rest)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_sigkill_in_the_middle_leaves_the_old_file_under_its_name(tmp_path, write):
    def make():
        yield torch.ones(1 << 20)
        os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "w").write_text("old")
    status, _ = run_forked(lambda: write(tmp_path / "w", [Entry("a", (1 << 21,), torch.float32, make)]))
    assert status == -signal.SIGKILL
    assert (tmp_path / "w").read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".partial")] == ["w"]


def test_files_of_a_block_get_their_names_together_and_the_usual_mode(tmp_path):
    (tmp_path / "a").write_text("old")
    with replacing() as create:
        for name in "ab":
            with create(tmp_path / name) as file:
                file.write(b"new")
        assert (tmp_path / "a").read_text() == "old" and not (tmp_path / "b").exists()
    assert {(tmp_path / name).read_text() for name in "ab"} == {"new"}
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([torch.ones(5)], r"'b': the pieces must fill \[4\], got more"),
        ([torch.ones(3)], r"'b': the pieces must fill \[4\], got 4 bytes less"),
        ([], r"got 16 bytes less"),
        ([torch.ones(4).double()], r"'b': a piece must be a dense tensor of torch.float32, got torch.float64"),
        ([torch.ones(4).to_sparse()], r"must be a dense tensor"),
        (["text"], r"must be a dense tensor of torch.float32, got str"),
    ],
)
@pytest.mark.parametrize(("write", "name", "rest"), WRITERS)
def test_pieces_that_do_not_fit_are_refused(tmp_path, pieces, message, write, name, rest):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / name, [entry("a", torch.ones(3)), Entry("b", (4,), torch.float32, lambda: pieces)], *rest)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_entries_that_no_file_can_hold_are_refused_before_work(tmp_path, write):
    def make():
        raise AssertionError("made")

    for entries, message in [
        ([("a", (1,), torch.float32, make)] * 2, "names must differ, got 'a' twice"),
        ([("__metadata__", (1,), torch.float32, make)], "must be a string and not __metadata__"),
        ([(3, (1,), torch.float32, make)], "name must be a string"),
        ([("a", (-1,), torch.float32, make)], "non-negative integers"),
        ([("a", (1 << 40, 1 << 40), torch.float32, make)], "more elements than memory can hold"),
        ([("a", (1,), torch.quint8, make)], "must have a dtype that the format has, got torch.quint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "w", [Entry(*e) for e in entries])
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        with pytest.raises(ValueError, match=f"{name} must be a regular file or not exist"):
            write(tmp_path / name, [Entry("a", (1,), torch.float32, make)])
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder"]


def test_arguments_of_writers_are_checked(tmp_path):
    with pytest.raises(ValueError, match="metadata must be of strings"):
        write_safetensors(tmp_path / "w", [], {"epoch": 3})
    for wrong in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="max_shard_bytes must be positive, got"):
            write_sharded_safetensors(tmp_path, [], wrong)


def test_json_objects_are_read(tmp_path):
    (tmp_path / "j").write_text('{"a": [1, {"b": "\\u00e9\u00e9"}]}', encoding="utf-8")
    assert read_json(tmp_path / "j") == {"a": [1, {"b": "éé"}]}
