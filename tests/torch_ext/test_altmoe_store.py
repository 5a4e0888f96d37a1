"""VectorStore: search against sorting, files, and vectors of other weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mmbal import MoEConnector, VectorStore
from mmbal.altmoe.store import fingerprint_of


def vectors(n=40, dim=6, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def filled(dtype=torch.float32, ids=None, **options):
    store = VectorStore(6, dtype, **options)
    ids = list(range(100, 140)) if ids is None else ids
    store.add(ids[:25], vectors()[:25])
    store.add(ids[25:], vectors()[25:])
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_search_gives_the_largest_cosines_of_what_is_kept(dtype):
    store, query = filled(dtype), vectors(5, seed=1)
    assert store.vectors.dtype == dtype
    scores, ids = store.search(query, 4)
    kept = F.normalize(vectors(), dim=1).to(dtype).double()
    expected = (F.normalize(query, dim=1).double() @ kept.T).sort(1, descending=True)
    assert torch.equal(ids, expected.indices[:, :4] + 100)
    torch.testing.assert_close(scores.double(), expected.values[:, :4], rtol=0, atol=1e-6)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_ids_may_be_strings():
    store = filled(ids=[f"picture {i}" for i in range(40)])
    assert store.search(vectors()[:2], 1).ids == [["picture 0"], ["picture 1"]]


def test_vectors_move_and_those_added_later_follow():
    store = filled()
    query, before = vectors()[:3], store.search(vectors()[:3], 4)
    assert store.to("cpu") is store and torch.equal(store.search(query, 4).ids, before.ids)
    store.to("meta").add([7], vectors(1))
    assert store.vectors.is_meta and store.vectors.shape == (41, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", [False, True])
def test_a_saved_store_loads_bit_for_bit_and_replaces_an_older_one(tmp_path, dtype, named):
    store = filled(dtype, [f"é{i}" for i in range(40)] if named else None, fingerprint="abc")
    VectorStore(6).save(tmp_path / "store")
    store.save(tmp_path / "store")
    loaded = VectorStore.load(tmp_path / "store", "abc")
    assert torch.equal(loaded.vectors, store.vectors) and loaded.ids == store.ids and len(loaded) == 40
    assert {f.name for f in (tmp_path / "store").iterdir()} == {"vectors.safetensors", "mmbal.json"}
    loaded.add(["new"] if named else [7], vectors(1, seed=3))
    assert len(loaded.search(vectors(2), 41).ids) == 2


def test_vectors_of_other_weights_are_refused_or_warned_of(tmp_path):
    connector, encoder = MoEConnector({"a": 5, "b": 4}, hidden=6, num_experts=2, top_k=1), torch.nn.Linear(3, 4)
    mark = connector.fingerprint("b", encoder)
    assert len({mark, connector.fingerprint("b"), connector.fingerprint("a")}) == 3
    store = VectorStore(6, fingerprint=mark)
    store.add(range(40), vectors(), mark)
    store.save(tmp_path / "store")
    with torch.no_grad():
        connector.heads["a->b"].cl.weight += 1  # targets do not depend on it
    assert len(VectorStore.load(tmp_path / "store", connector.fingerprint("b", encoder))) == 40
    for part in (encoder.bias, connector.modalities["b"].target.weight):
        with torch.no_grad():
            part[0] += 1e-6
        now = connector.fingerprint("b", encoder)
        with pytest.raises(ValueError, match=f"fingerprint must be {now}, got '{mark}'"):
            VectorStore.load(tmp_path / "store", now)
        with pytest.warns(UserWarning, match="come from other weights"):
            VectorStore.load(tmp_path / "store", now, mismatch="warn")
        for call in (
            lambda now=now: store.search(vectors(1), 1, now),
            lambda now=now: store.add([99], vectors(1), now),
        ):
            with pytest.raises(ValueError, match="come from other weights"):
                call()


def test_wrong_arguments_are_named():
    store = filled()
    for call, message in {
        lambda: VectorStore(0): "dim must be an integer of at least 1, got 0",
        lambda: VectorStore(3, torch.int64): "dtype must be one of .*, got torch.int64",
        lambda: store.add([1], vectors(2)): r"vectors must be \[1, 6\], got \[2, 6\]",
        lambda: store.add([1, 1], vectors(2)): "ids must be different, got some twice",
        lambda: store.add([100], vectors(1)): r"ids must be new, got \[100\]",
        lambda: store.add(["a"], vectors(1)): "ids must be all integers or all strings",
        lambda: store.add([1, "a"], vectors(2)): "ids must be all integers or all strings",
        lambda: store.add([1.5], vectors(1)): "ids must be int64 numbers or strings, got 1.5",
        lambda: store.add(torch.tensor([1.0]), vectors(1)): "ids must be int64 numbers or strings, got 1.0",
        lambda: store.add([True], vectors(1)): "ids must be int64 numbers or strings, got True",
        lambda: store.add([2**70], vectors(1)): f"ids must be int64 numbers or strings, got {2**70}",
        lambda: store.add([1], vectors(1) * torch.nan): "vectors must be finite",
        lambda: store.search(vectors(1, 5), 1): r"query must be \[Q, 6\], got \[1, 5\]",
        lambda: store.search(vectors(1), 41): "k must be from 1 to the number of entries 40, got 41",
        lambda: VectorStore(3).search(vectors(1, 3), 1): "k must be from 1 to the number of entries 0, got 1",
        lambda: store.check("x", "ignore"): "mismatch must be one of refuse, warn, got 'ignore'",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert len(store) == 40


def test_a_folder_that_holds_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere cannot be read"):
        VectorStore.load(tmp_path / "nowhere")
    filled().save(tmp_path / "store")
    note = tmp_path / "store" / "mmbal.json"
    whole = json.loads(note.read_text())
    for change in ({"count": 3}, {"kind": "other"}, {"dtype": "float16"}, {"format_version": 9}):
        note.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match="store cannot be read"):
            VectorStore.load(tmp_path / "store")


def test_ids_of_numpy_are_taken():
    store, given = VectorStore(6), vectors()[:3]
    store.add(np.array([3, -(2**63)]), given[:2])
    assert store.ids == [3, -(2**63)] and store.search(given[:2], 1).ids.tolist() == [[3], [-(2**63)]]
    store.add(torch.tensor([5], dtype=torch.int32), given[2:])
    assert store.search(given, 1).ids.flatten().tolist() == [3, -(2**63), 5]


@pytest.mark.parametrize("dtype, scales", [(torch.float32, (1e30, 1e-30, 1e-40)), (torch.float64, (1e300, 1e-300))])
def test_vectors_and_queries_of_any_length_keep_their_direction(dtype, scales):
    whole = vectors().to(dtype)
    plain = VectorStore(6, dtype)
    plain.add(range(40), whole)
    for scale in scales:
        store, tolerance = VectorStore(6, dtype), 1e-4 if scale == 1e-40 else 1e-6
        store.add(range(40), whole * scale)
        torch.testing.assert_close(store.vectors, plain.vectors, rtol=0, atol=tolerance)
        found = plain.search(whole[:5] * scale, 1)
        assert found.ids.flatten().tolist() == list(range(5))
        torch.testing.assert_close(found.scores, torch.ones(5, 1, dtype=dtype), rtol=0, atol=tolerance)
    plain.add([99], torch.zeros(1, 6, dtype=dtype))
    assert (plain.vectors[-1] == 0).all()


@pytest.mark.parametrize("named", [False, True])
def test_a_store_whose_content_is_not_one_is_refused(tmp_path, named):
    folder, ids = tmp_path / "store", [f"é{i}" for i in range(40)] if named else list(range(40))
    filled(ids=ids).save(folder)
    note, tensors = (folder / "mmbal.json"), {"vectors": filled().vectors}
    tensors |= {} if named else {"ids": torch.arange(40)}
    whole = note.read_text("utf-8")
    assert len(VectorStore.load(folder)) == 40
    bad = [tensors | {"vectors": tensors["vectors"] * f} for f in (torch.nan, 2.0)]
    if not named:
        bad += [tensors | {"ids": i} for i in (torch.arange(40) // 2, torch.rand(40), torch.zeros(40, 1))]
    for change in bad:
        save_file(change, folder / "vectors.safetensors")
        with pytest.raises(ValueError, match="store cannot be read"):
            VectorStore.load(folder)
    save_file(tensors, folder / "vectors.safetensors")
    changes = [{"fingerprint": 3}, {"dtype": [1]}, {"dim": None}]
    changes += [{"ids": i} for i in (ids[:1] * 40, "x" * 40, [[]] * 40, list(range(40)), 7)]
    for text in [json.dumps(json.loads(whole) | change) for change in changes] + ["[" * 100000, "[1]", "3"]:
        note.write_text(text)
        with pytest.raises(ValueError, match="store cannot be read"):
            VectorStore.load(folder)


def test_a_store_that_is_never_compared_with_weights_warns_once(tmp_path, recwarn):
    filled(fingerprint="abc").save(tmp_path / "store")
    VectorStore.load(tmp_path / "store", "abc").search(vectors(1), 1)
    filled().search(vectors(1), 1)
    assert not recwarn
    with pytest.warns(UserWarning, match="pass the fingerprint of the weights in use"):
        store = VectorStore.load(tmp_path / "store")
    with pytest.warns(UserWarning, match="pass the fingerprint of the weights in use"):
        (fresh := filled(fingerprint="abc")).search(vectors(1), 1)
    recwarn.clear()
    store.search(vectors(1), 1)
    fresh.search(vectors(1), 1)
    assert not recwarn


def test_a_fingerprint_is_that_of_the_bare_module():
    class Counted(torch.nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    module = torch.nn.Sequential(Counted(3, 4), torch.nn.Linear(4, 4))
    mark = fingerprint_of(module)
    assert fingerprint_of(torch.compile(module)) == mark
    assert fingerprint_of(torch.nn.DataParallel(module)) == mark
    module[1] = torch.compile(module[1])
    assert fingerprint_of(module) == mark
    with torch.no_grad():
        module[0].bias[0] += 1
    assert fingerprint_of(module) != mark
