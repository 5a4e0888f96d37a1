"""Files that are wrong or made to do harm: refused with a short message, without running or allocating."""

import io
import json
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections import OrderedDict

import pytest
import torch

from forked import run_forked
from mmbal.checkpoints.tensor_files import open_tensors, read_json
from mmbal.checkpoints.tensor_writing import Entry, write_sharded_safetensors
from mmbal.checkpoints.torch_archives import zip_records

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"ctorch\nFloatStorage\n"
LEGACY = tuple(
    pickle.dumps(value, protocol=2)
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
)


def dumped(value) -> bytes:
    """The operations that push a value, without a frame."""
    return pickle.dumps(value, protocol=2)[2:-1]


def storage(count=4, key="0", kind=FLOATS) -> bytes:
    return b"(" + dumped("storage") + kind + dumped(key) + dumped("cpu") + dumped(count) + b"tQ"


def dense(shape=(4,), stride=(1,), offset=0, held=None, flags=None) -> bytes:
    tail = [dumped(offset), dumped(shape), dumped(stride), dumped(False), dumped(None)]
    tail += [] if flags is None else [dumped(flags)]
    return REBUILD + b"(" + (held or storage()) + b"".join(tail) + b"tR"


def named(*pairs) -> bytes:
    """A dict from names, or operations that push a key, to values."""
    return b"}(" + b"".join((dumped(k) if isinstance(k, str) else k) + v for k, v in pairs) + b"u"


def archive(path, operations, entries=(("data/0", bytes(16)),), method=zipfile.ZIP_STORED, order=b"little"):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + operations + b".")
        file.writestr("archive/byteorder", order)
        for name, data in entries:
            file.writestr(f"archive/{name}", data)
    return path


ZEROS = struct.pack("<q", 4) + bytes(16)


def legacy(path, operations, keys=("0",), storages=(ZEROS,)):
    path.write_bytes(b"".join([*LEGACY, b"\x80\x02" + operations + b".", pickle.dumps([*keys], protocol=2), *storages]))
    return path


def saved_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def assert_refused(path, message, **options):
    """With a short message that names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        open_tensors(path, **options)
    text = str(caught.value)
    assert text.startswith(str(path)) and len(text) < len(str(path)) + 500 and text.isprintable(), text


def assert_refused_in_little_memory(path, message, **options):
    """And soon; a crash would be seen too."""
    status, text = run_forked(lambda: assert_refused(path, message, **options), limit_mib=600, seconds=30)
    assert (status, text) == (0, "None"), text


@pytest.mark.parametrize("make", [archive, legacy])
def test_the_crafted_files_of_these_tests_are_read_where_nothing_is_wrong(tmp_path, make):
    files = open_tensors(make(tmp_path / "f", named(("a", dense((2, 2), (1, 2), 0)), ("b", dense((), ())))))
    assert files["a"].tolist() == [[0, 0], [0, 0]] and files["b"].item() == 0


class Runs:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["top", "value", "beside"])
def test_pickles_run_nothing(tmp_path, zipped, where):
    runs = Runs(tmp_path / "ran")
    content = {"top": runs, "value": {"a": runs}, "beside": {"state_dict": {"a": torch.ones(1)}, "epoch": runs}}[where]
    torch.save(content, tmp_path / "f", _use_new_zipfile_serialization=zipped)
    assert_refused(tmp_path / "f", r"asks for '(posix|os)\.mkdir', which no file of weights needs; it is not read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\nbytearray\n" + dumped(1 << 40) + b"\x85R",
        b"ctorch\nTensor\n" + dumped(1 << 40) + b"\x85\x81",
        FLOATS + dumped(1 << 40) + b"\x85R",
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(" + b"ctorch\nfloat32\n" + dumped((4,)) * 2 + b"\x89tR",
        b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
        b"ctorch._utils\n_rebuild_qtensor\n)R",
    ],
)
def test_what_torch_allows_is_not_called_either_and_is_no_weight(tmp_path, call):
    assert_refused_in_little_memory(
        archive(tmp_path / "f", named(("a", call))), "must hold dense tensors only, got an object of .* 'a'"
    )
    beside = archive(tmp_path / "g", named(("epoch", call), ("state_dict", named(("a", dense())))))
    assert open_tensors(beside)["a"].tolist() == [0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_are_refused_by_name(tmp_path):
    for value, kind in [
        (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.eye(3).to_sparse_csr(), "_rebuild_sparse_tensor"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (torch.empty(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.ones(2, dtype=torch.complex64).conj(), "torch.conj"),
        (torch.ones(2, dtype=torch.complex128), "torch.complex128"),
        (3, "an? int"),
        ("text", "a str"),
        (None, "a nonetype"),
        ([torch.ones(1)], "a list"),
        ({"b": torch.ones(1)}, "a dict"),
    ]:
        torch.save(OrderedDict(good=torch.ones(2), bad=value), tmp_path / "f")
        assert_refused(tmp_path / "f", f"f must hold dense tensors only, got .*{kind}.* for 'bad'")


def test_files_without_names_of_tensors_are_refused(tmp_path):
    for value, kind in [(torch.ones(2), "a bare tensor"), ([torch.ones(2)], "a list"), (3, "an? int")]:
        torch.save(value, tmp_path / "f")
        assert_refused(tmp_path / "f", f"must hold a dict of tensors by name, got {kind}")
    torch.save({3: torch.ones(2)}, tmp_path / "f")
    assert_refused(tmp_path / "f", "got a key that is not a string")


@pytest.mark.parametrize("make", [archive, legacy])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dense((5,)), "beyond the end of its storage of 16 bytes"),
        (dense((4,), (1,), 1), "beyond the end"),
        (dense((2,), (4,)), "beyond the end"),
        (dense((5,), (0,)), "of 20 bytes or beyond"),
        (dense((1 << 30, 1 << 30), (0, 0)), "beyond the end"),
        (dense((1 << 62, 4), (0, 0)), "more elements than memory can hold"),
        (dense((0, 1 << 62, 1 << 62), (1, 1, 1)), "more elements than memory can hold"),
        (dense((-4,)), "not of non-negative integers"),
        (dense((True,)), "not of non-negative integers"),
        (dense((1.5,)), "not of non-negative integers"),
        (dense(4), "without a shape"),
        (dense((1,) * 65, (1,) * 65), "65 dimensions"),
        (dense((4,), (-1,)), "impossible strides"),
        (dense((4,), (1,), -1), "impossible strides"),
        (dense((4,), (1 << 61,)), "impossible strides"),
        (dense((4,), (1, 1)), "of 1 dimensions and 2 strides"),
        (dense(held=storage(5)), "claims 20 bytes for a storage of 16"),
        (dense(held=storage(1 << 59)), "claims .* bytes for a storage of 16"),
        (dense(held=storage(1 << 70)), "impossible size"),
        (dense(held=storage(-4)), "impossible size"),
        (dense(held=storage("4")), "impossible size"),
        (dense(held=storage(kind=b"ctorch\nTensor\n")), "unknown type"),
        (dense(held=storage(kind=dumped(4))), "unknown type"),
        (dense(held=dumped("storage")), "without a storage"),
        (dense(held=dumped("0") + b"Q"), "other than storages"),
        (dense(held=dumped(("module", 1, 2, 3, 4)) + b"Q"), "other than storages"),
        (REBUILD + b")R", "damaged pickle"),
        (dumped("text") + b")R", "damaged pickle"),
    ],
)
def test_tensors_that_lie_about_their_storage_are_refused(tmp_path, make, value, message):
    assert_refused(make(tmp_path / "f", named(("a", value))), message)


def test_missing_and_compressed_storages_are_refused(tmp_path):
    path = archive(tmp_path / "f", named(("a", dense(held=storage(key="../../etc/passwd")))))
    assert_refused(path, "must have an uncompressed entry for the storage '../../etc/passwd'")
    path = archive(tmp_path / "f", named(("a", dense())), method=zipfile.ZIP_DEFLATED)
    assert_refused(path, "must have a data.pkl that is stored uncompressed")
    assert_refused(archive(tmp_path / "f", named(("a", dense())), order=b"big"), "must hold little-endian numbers")
    for keys, storages in [
        (["1"], [ZEROS]),
        ([["0"]], []),
        ([], []),
        (["0"], []),
        (["0"], [ZEROS[:-1]]),
        (["0"], [struct.pack("<q", -1)]),
        (["0"], [struct.pack("<q", (1 << 62) + 4) + bytes(16)]),
    ]:
        path = legacy(tmp_path / "f", named(("a", dense())), keys, storages)
        assert_refused(path, "must list the storages|ends before its last storage")


def deep(depth, one=b"\x85"):
    return b")" + one * depth


@pytest.mark.parametrize("make", [archive, legacy])
@pytest.mark.parametrize(
    ("operations", "message"),
    [
        pytest.param(named(("a", deep(300_000))), "got a tuple for 'a'|must list the storages", id="deep value"),
        pytest.param(named((deep(300_000), dense())), "a key that is not a string", id="deep key"),
        pytest.param(named((b")" + b"2\x86" * 9, dense())), "opcode 0x32", id="duplicate"),
        pytest.param(
            named((b")q\1" + b"h\1h\1\x86q\1" * 1000, dense())), "a key that is not a string", id="key of 2^1000 tuples"
        ),
        pytest.param(b"]" * 300_000 + b"a" * 100, "must hold a dict|must list the storages", id="lists"),
        pytest.param(b"}" * 3_000_000, "more than 2097152 operations", id="too many dicts"),
        pytest.param(
            b"](" + b"NN\x86" * 300_000 + b"eq\1" + b"ccollections\nOrderedDict\nh\1\x85R" * 9,
            "damaged pickle|operations",
            id="the same pairs again",
        ),
        pytest.param(
            b"(" + b"K\1" * 300_000 + b"tq\1" + named(("a", REBUILD + b"(" + storage() + b"K\0h\1h\1tR")),
            "dimensions",
            id="300000 dimensions",
        ),
        pytest.param(
            b"}(" + b"".join(dumped(i * ((1 << 61) - 1)) + b"N" for i in range(1, 100_000)) + b"u",
            "a key that is not a string|must list the storages",
            id="keys of equal hashes",
        ),
        pytest.param(b"X\xff\xff\xff\xff", "ends too early", id="string of 4 GiB"),
        pytest.param(b"r\xff\xff\xff\xff", "damaged pickle", id="memo of nothing"),
        pytest.param(b"}r\xff\xff\xff\xff" + b"0", "opcode 0x30", id="far memo"),
        pytest.param(b"c" + b"a" * 2000, "a name that does not end", id="long global"),
        pytest.param(b"\x8e" + b"\xff" * 8, "opcode 0x8e", id="bytes of 2^64"),
        pytest.param(b"\x8b\xff\xff\xff\x7f", "opcode 0x8b", id="long of 2 GiB"),
        pytest.param(b"", "damaged pickle", id="nothing"),
        pytest.param(b"u", "damaged pickle", id="no mark"),
        pytest.param(b"}(K\1u", "damaged pickle|without a value", id="no value"),
    ],
)
def test_pickles_that_exhaust_a_reader_are_refused_soon(tmp_path, make, operations, message):
    assert_refused_in_little_memory(make(tmp_path / "f", operations), message)


def test_zip_bombs_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "f", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 25))
    assert_refused_in_little_memory(tmp_path / "f", "must have a data.pkl that is stored uncompressed and has at most")
    with zipfile.ZipFile(tmp_path / "f", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b".")
        file.writestr("archive/constants.pkl", b".")
        file.writestr("archive/code/a.py", bytes((1 << 26) + 1))
    assert_refused_in_little_memory(tmp_path / "f", "at most 67108864 bytes in compressed entries", allow_jit=True)


def test_other_zip_archives_are_refused(tmp_path):
    for names in [["a.txt"], ["a/data.pkl", "b/data.pkl"], ["data.pkl"], ["a/b/data.pkl"], []]:
        with zipfile.ZipFile(tmp_path / "f", "w") as file:
            for name in names:
                file.writestr(name, b"}.")
        assert_refused(tmp_path / "f", "without data.pkl|must be a safetensors file")


def test_a_damaged_torchscript_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "f", "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"archive/{name}", b"}.")
    assert_refused(tmp_path / "f", "cannot be read as TorchScript", allow_jit=True)


@pytest.mark.parametrize("offset", [10, 20, 24, 28, 32, 42])  # method, sizes, lengths, position
@pytest.mark.parametrize("value", [0xFFFFFFFF, 0x7FFFFFFF, 0xFFFF])
def test_zip_directories_that_lie_are_refused(tmp_path, offset, value):
    path = archive(tmp_path / "f", named(("a", dense())))
    data = bytearray(path.read_bytes())
    last = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, last + offset, value)
    path.write_bytes(data)
    assert_refused(path, "zip|must have")


def test_zip_directories_are_read_as_zipfile_reads_them(tmp_path):
    for save in (lambda f: torch.save({"a": torch.ones(3)}, f), lambda f: archive(f, named(("a", dense())))):
        save(tmp_path / "f")
        data = (tmp_path / "f").read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            ours = zip_records(data)
            assert list(ours) == file.namelist()
            for name, record in ours.items():
                content = data[record.start : record.start + record.size]
                assert record.is_stored and content == file.read(name) and zlib.crc32(content) == file.getinfo(name).CRC


ONE = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**ONE, "shape": [3]}},
        {"a": {**ONE, "shape": [-2]}},
        {"a": {**ONE, "shape": [1 << 63, 1 << 63]}},
        {"a": {**ONE, "shape": "2"}},
        {"a": {**ONE, "data_offsets": [0, 3]}},
        {"a": {**ONE, "data_offsets": [1, 3]}},
        {"a": {**ONE, "data_offsets": [2, 0]}},
        {"a": {**ONE, "data_offsets": [0]}},
        {"a": {**ONE, "dtype": "Q8"}},
        {"a": {**ONE, "dtype": "F8_E8M0"}},
        {"a": ONE, "b": ONE},
        {"a": {}},
        {"a": 3},
        {"__metadata__": {"a": 3}},
        {"a": {"dtype": "U8", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}},
        {"a": {"dtype": "U8", "shape": [1] * 65 + [2], "data_offsets": [0, 2]}},
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b'{"a":' * 100_000,
        b"{",
        b'{"\xff": 3}',
    ],
)
def test_safetensors_headers_that_are_wrong_are_refused(tmp_path, header):
    assert_refused(saved_safetensors(tmp_path / "f", header, bytes(2)), "f (cannot be read as safetensors|has )")


def test_safetensors_headers_have_a_limit(tmp_path):
    with open(tmp_path / "f", "wb") as file:
        file.write(struct.pack("<Q", 17 << 20) + b"{")
        file.truncate(20 << 20)
    assert_refused_in_little_memory(
        tmp_path / "f", "must have a safetensors header of at most 16777216 bytes, got 17825792"
    )


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(tmp_path / "socket"))
    for name, message in [
        ("fifo", "must be a regular file"),
        ("socket", "must be a regular file"),
        ("folder", "must be a folder with one of"),
        ("empty", "is empty"),
        ("text", "must be a safetensors file, a file of torch.save or an index of shards"),
        ("loop", "cannot be opened"),
        ("missing", "must be a file, got a path where nothing is"),
    ]:
        assert_refused(tmp_path / name, message)
    assert_refused("/dev/zero", "must be a regular file")
    for path in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(ValueError):
            open_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b" \n", "empty file"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"a": }', "text with an error"),
        (b'{"a": ' + b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 1_000_000, "nested too deeply"),
        (b'{"a": "\xff"}', "must be JSON in UTF-8"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "text with an error"),
        (b" " * 5000 + b"{}", "at most 4000 bytes"),
    ],
)
def test_json_that_is_wrong_is_refused(tmp_path, content, message):
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, limit=4000 if b"     " in content else 16 << 20)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 500


@pytest.fixture
def shards(tmp_path):
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abc")}
    entries = [Entry(name, (4,), torch.float32, lambda t=t: [t]) for name, t in tensors.items()]
    return write_sharded_safetensors(tmp_path / "model", entries, 32)


def test_an_index_names_files_beside_it_that_hold_what_it_says(shards):
    good = json.loads(shards.read_text())["weight_map"]
    first = good["a"]
    torch.save({"d": torch.ones(1)}, shards.with_name("torch"))
    (shards.parent / "folder").mkdir()
    for weight_map, message in [
        ({**good, "d": "../model/" + first}, r"must name shards beside it, got '../model/.*' for 'd'"),
        ({**good, "d": str(shards.with_name(first))}, "must name shards beside it"),
        ({**good, "d": ".."}, "must name shards beside it, got '..'"),
        ({**good, "d": ""}, "must name shards beside it, got ''"),
        ({**good, "d": 3}, "must name shards beside it, got 3"),
        ({**good, "d": ["x"] * 9999}, "must name shards beside it, got a value of type list"),
        ({**good, "d": "a\0b"}, "must name shards beside it"),
        ({**good, "d": "missing"}, "has the shard 'missing', which must be a file"),
        ({**good, "d": "folder"}, "has the shard 'folder', which must be a regular file"),
        ({**good, "d": shards.name}, "has the shard 'model.safetensors.index.json', which must be a safetensors file"),
        ({**good, "d": first}, "which must hold 'd' according to the index"),
        ({**good, "d" * 9999: first}, "which must hold 'd{60}...' according to the index"),
        ({"a": first}, "which must not hold 'b' according to the index"),
        ({**good, "d": "torch"}, "must name shards of one kind"),
        ({}, "with a weight_map"),
        ([first], "with a weight_map"),
    ]:
        shards.write_text(json.dumps({"weight_map": weight_map}))
        assert_refused(shards, message)
    for text in ("{}", '{"weight_map": ', '{"weight_map": ' + "[" * 100_000):
        shards.write_text(text)
        assert_refused(shards, "weight_map|must be JSON")


def test_a_torchscript_shard_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "shard", "w") as file:
        for name in ("data.pkl", "constants.pkl"):
            file.writestr(f"archive/{name}", b"}.")
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": "shard"}}))
    assert_refused(tmp_path / "index.json", "has the shard 'shard', which is a TorchScript archive", allow_jit=True)
