"""Clusters of features, accumulated over stages, as functions and as `mmbal mcl cluster`."""

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_info, threadpool_limits
from typer.testing import CliRunner

from mmbal import mcl
from mmbal.cli import app
from mmbal.mcl import ClusterLabels, Features, accumulate_labels, cluster_features, cluster_stages, load_labels
from mmbal.mcl.features import Source

N, P = 60, 6


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def blobs(seed, n=N, clusters=3, dtype=np.float32):
    """Unit vectors around orthogonal centres, and which centre each belongs to."""
    generator = np.random.default_rng(seed)
    own = np.concatenate([np.arange(clusters), generator.integers(0, clusters, n - clusters)])
    return unit(np.eye(P)[own] + 0.05 * generator.standard_normal((n, P))).astype(dtype), own


def partition(ids):
    ids = np.asarray(ids)
    return {frozenset(np.flatnonzero(ids == i).tolist()) for i in np.unique(ids)}


def features(model, seed=0, n=N, skipped=(), shard=(0, 1), pairs="pairs", dtype="float16"):
    kept = np.setdiff1d(np.arange(n), skipped)
    images, texts = (torch.from_numpy(blobs(2 * seed + side, n)[0][kept]) for side in (0, 1))
    wanted = getattr(torch, dtype)
    source = Source(model, pairs, "processing", dtype, "none", n)
    index, left_out = (torch.tensor(np.asarray(rows), dtype=torch.int64) for rows in (kept, skipped))
    return Features(images.to(wanted), texts.to(wanted), index, left_out, source, shard)


# --- k-means of a stage


def test_joint_labels_tell_image_and_text_blobs_apart():
    (images, of_image), (texts, of_text) = blobs(0), blobs(1)
    found = mcl.cluster_stage(images, texts, 3, seed=5)
    assert partition(found.images) == partition(of_image)
    assert partition(found.texts) == partition(of_text)
    assert np.array_equal(found.labels, 3 * found.texts + found.images)
    assert np.array_equal(cluster_features(images, texts, 3, seed=5), found.labels)
    assert found.labels.dtype == np.int64


def test_few_rows_are_clustered_by_the_k_means_of_the_demo():
    generator = np.random.default_rng(2)
    images, texts = (unit(generator.standard_normal((200, P))).astype(np.float32) for _ in range(2))
    by_hand = np.zeros(200, dtype=np.int64)
    for side in (texts, images):
        by_hand = by_hand * 4 + KMeans(4, n_init=3, random_state=7).fit_predict(side)
    assert np.array_equal(cluster_features(torch.from_numpy(images), torch.from_numpy(texts), 4, seed=7), by_hand)


def test_many_rows_are_clustered_with_the_published_settings(monkeypatch):
    monkeypatch.setattr("mmbal.mcl.clustering.FEW_ROWS", 100)
    generator = np.random.default_rng(3)
    images, texts = (unit(generator.standard_normal((200, P))).astype(np.float32) for _ in range(2))
    published = {"batch_size": 1_000_000, "max_iter": 500, "tol": 1e-5, "n_init": "auto"}
    found = mcl.cluster_stage(images, texts, 3, seed=7)
    assert found.algorithm == "minibatch"
    for side, labels, inertia in (
        (images, found.images, found.image_inertia),
        (texts, found.texts, found.text_inertia),
    ):
        by_hand = MiniBatchKMeans(3, random_state=7, **published).fit(side)
        assert np.array_equal(labels, by_hand.labels_)
        assert inertia == pytest.approx(by_hand.inertia_, rel=1e-5)
    assert mcl.cluster_stage(images[:100], texts[:100], 3).algorithm == "kmeans"


@pytest.mark.parametrize("algorithm", ["kmeans", "minibatch"])
def test_the_seed_alone_decides_whatever_the_threads(algorithm):
    generator = np.random.default_rng(0)
    images, texts = (unit(generator.standard_normal((3000, P))).astype(np.float32) for _ in range(2))
    found = []
    for threads in (1, 2, 5, 5):
        with threadpool_limits(threads):
            found.append(mcl.cluster_stage(images, texts, 5, seed=3, algorithm=algorithm, n_init=1))
            assert {pool["num_threads"] for pool in threadpool_info() if pool["prefix"] == "libgomp"} == {threads}
    for other in found[1:]:
        assert np.array_equal(other.labels, found[0].labels)
        assert (other.image_inertia, other.text_inertia) == (found[0].image_inertia, found[0].text_inertia)
    assert not np.array_equal(cluster_features(images, texts, 5, 4, algorithm=algorithm), found[0].labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_of_every_dtype_are_taken(dtype):
    (images, of_image), (texts, _) = blobs(0), blobs(1)
    tensors = [torch.from_numpy(side).to(dtype).requires_grad_() for side in (images, texts)]
    assert partition(mcl.cluster_stage(*tensors, 3).images) == partition(of_image)


def broken(change):
    features = blobs(0)[0].copy()
    return change(features)


def at(features, row, value):
    features[row, 0] = value
    return features


@pytest.mark.parametrize(
    ("images", "options", "named"),
    [
        (lambda x: at(x, 17, np.nan), {}, "images must be finite, row 17"),
        (lambda x: at(x, 4, np.inf), {}, "images must be finite, row 4"),
        (lambda x: 2 * x, {}, "images must have rows of length 1, got 2 in row 0"),
        (lambda x: np.vstack([x[:9], 0 * x[9:]]), {}, "length 1, got 0 in row 9"),
        (lambda x: x[:-1], {}, "as many rows, got 59 and 60"),
        (lambda x: x[:, :0], {}, r"\[n, P\]"),
        (lambda x: x.astype(np.int64), {}, "floating-point"),
        (lambda x: x, {"clusters": N + 1}, "clusters must be at most the 60 pairs, got 61"),
        (lambda x: x, {"clusters": 0}, "clusters must be an integer of at least 1"),
        (lambda x: x, {"clusters": 2.5}, "clusters must be an integer"),
        (lambda x: x, {"algorithm": "ward"}, "algorithm must be auto, kmeans or minibatch"),
        (lambda x: x, {"seed": -1}, "seed must be"),
        (lambda x: x, {"n_init": 0}, "n_init must be at least 1"),
        (lambda x: x, {"max_iter": 0}, "max_iter must be at least 1"),
        (lambda x: x, {"tol": float("nan")}, "tol must be at least 0"),
        (lambda x: x, {"batch_size": 10, "algorithm": "kmeans"}, "batch_size is of algorithm minibatch"),
    ],
)
def test_what_cannot_be_clustered_is_named(images, options, named):
    with pytest.raises(ValueError, match=f"cluster_features: .*{named}"):
        cluster_features(broken(images), blobs(1)[0], **({"clusters": 3} | options))


# --- accumulation


stages_of_labels = st.integers(1, 4).flatmap(
    lambda stages: st.tuples(
        st.lists(st.integers(1, 5), min_size=stages, max_size=stages),
        st.integers(0, 25),
        st.randoms(use_true_random=False),
    )
)


@settings(max_examples=60, deadline=None)
@given(stages_of_labels)
def test_accumulated_ids_are_the_numbers_of_all_combinations_in_order(case):
    radices, n, random = case
    labels = [[random.randrange(radix) for _ in range(n)] for radix in radices]
    numbered = {c: i for i, c in enumerate(itertools.product(*(range(radix) for radix in radices)))}
    expected = [numbered[combination] for combination in zip(*labels, strict=True)]
    assert accumulate_labels(labels, radices).tolist() == expected


def merged_by_force(labels, min_size):
    """The rule of merge_small_clusters, one cluster at a time."""
    n, stages = len(labels[0]), len(labels)
    group, waiting = {}, set(range(n))
    for depth in range(stages, -1, -1):
        by_prefix = {}
        for i in sorted(waiting):
            by_prefix.setdefault(tuple(stage[i] for stage in labels[:depth]), []).append(i)
        for prefix, members in by_prefix.items():
            if len(members) >= min_size:
                group |= dict.fromkeys(members, (depth, prefix))
                waiting -= set(members)
    if waiting and group:
        sizes = {g: list(group.values()).count(g) for g in group.values()}
        order = sorted(sizes, key=lambda g: (-g[0], g[1]))  # in which ids are given: deep ones first
        group |= dict.fromkeys(waiting, max(order, key=lambda g: sizes[g]))
    elif waiting:
        group = dict.fromkeys(waiting, "all")
    return {frozenset(i for i in range(n) if group[i] == g) for g in group.values()}


@settings(max_examples=60, deadline=None)
@given(stages_of_labels, st.integers(1, 12))
def test_small_clusters_merge_as_by_the_rule_one_at_a_time(case, min_size):
    radices, n, random = case
    labels = [[random.randrange(radix) for _ in range(n + 1)] for radix in radices]
    assert partition(mcl.merge_small_clusters(labels, radices, min_size)) == merged_by_force(labels, min_size)


def test_more_combinations_than_an_integer_holds_are_refused():
    assert accumulate_labels([[8]] * 19, [9] * 19).tolist() == [9**19 - 1]
    with pytest.raises(ValueError, match="radices must have a product below 2"):
        accumulate_labels([[8]] * 20, [9] * 20)


def test_stages_accumulate_in_order():
    given = [features("base", 0), features("first", 1), features("second", 2)]
    found = cluster_stages(given, 3, seed=4)
    by_stage = [
        cluster_features(f.images, f.texts, 3, mcl.stage_seed(4, stage)) for stage, f in enumerate(given, start=1)
    ]
    assert np.array_equal(found.stage_labels, by_stage)
    expected = (by_stage[0] * 9 + by_stage[1]) * 9 + by_stage[2]
    assert np.array_equal(found.labels, expected)
    assert np.array_equal(found.accumulated(2), by_stage[0] * 9 + by_stage[1])


def test_a_stage_that_is_appended_gives_what_all_at_once_give():
    given = [features("base", 0), features("first", 1), features("second", 2)]
    together = cluster_stages(given, 3, seed=4)
    one_by_one = cluster_stages(given[2:], 3, 4, previous=cluster_stages(given[:2], 3, 4))
    assert np.array_equal(one_by_one.labels, together.labels)
    assert one_by_one.stages == together.stages


def test_stages_may_have_other_numbers_of_clusters():
    found = cluster_stages([features("first", 1)], 2, previous=cluster_stages([features("base")], 3))
    assert np.array_equal(found.labels, found.stage_labels[0] * 4 + found.stage_labels[1])


def test_pairs_without_features_have_no_label_and_are_never_drawn():
    found = cluster_stages([features("base", skipped=[0, 7, 59])], 2)
    assert np.flatnonzero(found.labels < 0).tolist() == [0, 7, 59]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters that fill no batch
        drawn = [i for batch in mcl.ClusterBatchSampler(found.labels, 2) for i in batch]
    assert drawn and not {0, 7, 59} & set(drawn)


@pytest.mark.parametrize(
    ("second", "named"),
    [
        (lambda: features("first", pairs="others"), "features 1 must be of the same pairs"),
        (lambda: features("first", n=N + 1), "features 1 must be of the same pairs"),
        (lambda: features("first", skipped=[3]), "features 1 must leave out the same pairs"),
        (lambda: features("first", shard=(0, 2)), "features 1 must be of all pairs, got shard 0/2"),
    ],
)
def test_features_that_do_not_belong_together_are_refused(second, named):
    with pytest.raises(ValueError, match=named):
        cluster_stages([features("base"), second()], 2)
    if "shard" not in named:
        with pytest.raises(ValueError, match=named.replace("1", "0")):
            cluster_stages([second()], 2, previous=cluster_stages([features("base")], 2))


def test_a_seed_too_large_for_a_stage_is_named_as_it_was_given_before_any_clustering():
    given, most = [features("base"), features("first", 1)], (2**32 - 1 - 2) // 100
    for seed in (-1, most + 1):
        with pytest.raises(ValueError, match=f"cluster_stages: seed must be from 0 to {most}, got {seed}$"):
            cluster_stages(given, 2, seed)
    assert cluster_stages(given, 2, most).stages[1].seed == most


def test_the_same_model_twice_is_announced():
    with pytest.warns(UserWarning, match="stage 2 come from the same weights"):
        cluster_stages([features("base"), features("base")], 2)


# --- files


def test_labels_read_back_are_those_that_were_written(tmp_path):
    found = cluster_stages([features("base", skipped=[5]), features("first", 1, skipped=[5])], 3, seed=2, min_size=9)
    found.save(tmp_path / "labels.safetensors")
    assert np.array_equal(load_labels(tmp_path / "labels.safetensors"), found.labels)
    again = ClusterLabels.load(tmp_path / "labels.safetensors")
    assert again.stages == found.stages and again.min_size == 9 and again.pairs == found.pairs
    tensors = load_file(tmp_path / "labels.safetensors")
    ids, sizes = np.unique(found.final(), return_counts=True)
    assert tensors["cluster_ids"].tolist() == ids.tolist() and tensors["cluster_sizes"].tolist() == sizes.tolist()
    assert sizes.min() >= 9 and sizes.sum() == N - 1
    assert np.array_equal(tensors["accumulated"].numpy(), found.accumulated())


def test_shards_merge_in_any_order(tmp_path):
    whole = features("base", skipped=[3, 40])
    parts = []
    for i in range(3):
        rows = torch.arange(20 * i, 20 * i + 20)
        here, left_out = torch.isin(whole.index, rows), torch.isin(whole.skipped, rows)
        part = Features(
            whole.images[here],
            whole.texts[here],
            whole.index[here],
            whole.skipped[left_out],
            whole.source,
            (i, 3),
        )
        part.save(tmp_path / f"{i}.safetensors")
        parts.append(Features.load(tmp_path / f"{i}.safetensors"))
    merged = mcl.merge_features([parts[2], parts[0], parts[1]])
    for name in ("images", "texts", "index", "skipped"):
        assert torch.equal(getattr(merged, name), getattr(whole, name))
    assert merged.shard == (0, 1)
    with pytest.raises(ValueError, match="all of 0/3 to 2/3, got 0/3, 1/3"):
        mcl.merge_features(parts[:2])
    with pytest.raises(ValueError, match="got 0/3, 0/3, 2/3"):
        mcl.merge_features([parts[0], parts[0], parts[2]])
    with pytest.raises(ValueError, match="differ in model"):
        mcl.merge_features([parts[0], features("other", shard=(1, 3))])


def rewritten(path, change):
    """The file with other tensors or another description in it."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["mmbal"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, description)
    save_file(tensors, path, {"mmbal": json.dumps(description)})


def without(name):
    return lambda tensors, description: (description if name in description else tensors).pop(name)


def changed(**values):
    def change(tensors, description):
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else description)[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("image_features"),
        without("model"),
        without("kind"),
        without("shard"),
        changed(kind="labels"),
        changed(format_version=2),
        changed(rows=61),
        changed(rows=10**15),
        changed(rows="60"),
        changed(dtype="float32"),
        changed(dtype="int8"),
        changed(shard=[1, 1]),
        changed(shard=3),
        changed(index=torch.arange(60).flip(0)),
        changed(index=torch.arange(60).float()),
        changed(skipped=torch.tensor([60])),
        changed(text_features=torch.zeros(59, P, dtype=torch.float16)),
    ],
)
def test_features_that_contradict_themselves_are_refused(tmp_path, change):
    path = tmp_path / "f.safetensors"
    features("base").save(path)
    Features.load(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match="f.safetensors cannot be read"):
        Features.load(path)


@pytest.mark.parametrize(
    "change",
    [
        without("labels"),
        without("stages"),
        changed(stages=[]),
        changed(stages=[{"clusters": 3}]),
        changed(stages=7),
        changed(rows=59),
        changed(rows=10**15),
        changed(min_size=-1),
        changed(min_size=7.5),
        changed(index=torch.arange(60) - 1),
        changed(labels=torch.zeros(60, dtype=torch.int64)),
        changed(stage_labels=torch.full((1, 60), 9)),
        changed(stage_labels=torch.zeros(2, 60, dtype=torch.int64)),
    ],
)
def test_labels_that_contradict_themselves_are_refused(tmp_path, change):
    path = tmp_path / "l.safetensors"
    cluster_stages([features("base")], 3).save(path)
    load_labels(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match="l.safetensors cannot be read"):
        load_labels(path)


# --- the command


def run(*arguments):
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, ["mcl", *map(str, arguments)])


@pytest.fixture
def three_files(tmp_path):
    paths = []
    for seed, model in enumerate(("base", "first", "second")):
        paths.append(tmp_path / f"f{seed}.safetensors")
        features(model, seed).save(paths[-1])
    return paths


def test_the_command_clusters_several_stages_and_shows_their_sizes(tmp_path, three_files):
    out = tmp_path / "labels.safetensors"
    result = run(
        "cluster", "--features", *three_files, "--clusters", 3, "--seed", 4, "--out", out, "--batch", 8, "--min-size", 8
    )
    assert result.exit_code == 0, result.output
    expected = cluster_stages([Features.load(path) for path in three_files], 3, 4, min_size=8)
    assert np.array_equal(load_labels(out), expected.labels)
    assert np.array_equal(ClusterLabels.load(out).stage_labels, expected.stage_labels)
    for labels, possible in [(expected.accumulated(s + 1), 9 ** (s + 1)) for s in range(3)] + [(expected.final(), 729)]:
        sizes = np.unique(labels, return_counts=True)[1]
        row = [len(sizes), possible, sizes.min(), f"{np.median(sizes):.0f}", sizes.max(), sum(s % 8 for s in sizes)]
        assert any([str(cell) for cell in row] == cells for cells in table_cells(result.output)), (row, result.output)


def table_cells(output):
    """The numbers of each line of the table, without the share of what is dropped."""
    lines = [line.split("│")[2:-1] for line in output.splitlines() if line.startswith("│")]
    return [[cell.split("(")[0].strip().replace(",", "") for cell in line] for line in lines]


def test_the_command_appends_a_stage_to_labels(tmp_path, three_files):
    whole, first, both = (tmp_path / f"{name}.safetensors" for name in ("whole", "first", "both"))
    assert run("cluster", "--features", *three_files, "--out", whole).exit_code == 0
    assert run("cluster", "--features", three_files[0], "--out", first).exit_code == 0
    appended = run(
        "cluster", "--features", three_files[1], "--features", three_files[2], "--labels", first, "--out", both
    )
    assert appended.exit_code == 0
    assert np.array_equal(load_labels(both), load_labels(whole))


def test_the_command_merges_shards(tmp_path):
    whole = features("base")
    for i, rows in enumerate((slice(0, 30), slice(30, 60))):
        part = Features(whole.images[rows], whole.texts[rows], whole.index[rows], whole.skipped, whole.source, (i, 2))
        part.save(tmp_path / f"{i}.safetensors")
    out = tmp_path / "f.safetensors"
    result = run("merge", "--features", tmp_path / "1.safetensors", tmp_path / "0.safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    assert torch.equal(Features.load(out).images, whole.images)
    result = run("cluster", "--features", tmp_path / "1.safetensors", "--out", tmp_path / "l.safetensors")
    assert result.exit_code == 1 and "shard 1/2" in result.output


def test_what_the_command_cannot_use_is_said_without_a_traceback(tmp_path, three_files):
    out = tmp_path / "labels.safetensors"
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\xff" * 100)
    (tmp_path / "empty.safetensors").touch()
    bad = features("bad")
    bad.images[11] = float("nan")
    bad.save(tmp_path / "nan.safetensors")
    for arguments, named in [
        (["--features", garbage], "garbage.safetensors cannot be read"),
        (["--features", tmp_path / "empty.safetensors"], "empty.safetensors cannot be read"),
        (["--features", tmp_path / "none.safetensors"], "none.safetensors"),
        (["--features", tmp_path / "nan.safetensors"], "images must be finite, row 11"),
        (["--features", three_files[0], "--clusters", 61], "clusters must be at most the 60 pairs"),
        (["--features", three_files[0], "--labels", three_files[1]], "no file of labels"),
        (["--features", three_files[0], "--algorithm", "kmeans", "--kmeans-batch", 5], "batch_size"),
    ]:
        result = run("cluster", *arguments, "--out", out)
        assert result.exit_code == 1 and named in result.output, result.output
        assert not out.exists()
    assert run("cluster", "--features", three_files[0], "--clusters", 0, "--out", out).exit_code == 2
