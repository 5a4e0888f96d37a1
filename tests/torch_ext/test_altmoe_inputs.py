"""What a connector may be given: names and directions, features of another precision, classes, items without tokens."""

import pytest
import torch
import torch.nn.functional as F

from mmbal import AlignLoss, MoEConnector, TargetOut
from mmbal.altmoe.parts import masked_mean
from oracles import assert_near

HALF = [torch.float16, torch.bfloat16]


def make(dims=None, **options):
    options = {"hidden": 8, "num_experts": 4, "top_k": 2, "dropout": 0.0} | options
    return MoEConnector(dims or {"a": 6, "b": 6}, **options)


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_tokens_are_averaged_in_float32(dtype):
    x = 250 + torch.randn(3, 400, 5).to(dtype)  # whose sum, 100,000, float16 does not have
    kept = torch.rand(3, 400) > 0.3
    expected = torch.stack([tokens[there].double().mean(0) for tokens, there in zip(x, kept, strict=True)])
    assert torch.equal(masked_mean(x, kept), expected.to(dtype))
    everything = masked_mean(x, torch.ones(3, 400, dtype=torch.bool))
    assert torch.equal(everything, masked_mean(x, None)) and torch.equal(everything, x.double().mean(1).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_a_mask_of_all_tokens_is_none_in_half_precision(dtype):
    c, x, mask = make().to(dtype), (250 + torch.randn(3, 400, 6)).to(dtype), torch.ones(3, 400, dtype=torch.bool)
    for a, b in zip(c.target(x, "b", mask)[:2], c.target(x, "b")[:2], strict=True):
        assert torch.equal(a, b) and a.isfinite().all() and a.dtype == dtype
    for a, b in zip(c(x, "a", "b", mask)[:2], c(x, "a", "b")[:2], strict=True):
        assert torch.equal(a, b) and a.isfinite().all() and a.dtype == dtype


@pytest.mark.parametrize("stored", [*HALF, torch.float64])
@pytest.mark.parametrize("pool", ["after", "before"])
def test_stored_features_are_taken_in_the_precision_of_the_weights(stored, pool):
    c, x = make(pool=pool), torch.randn(4, 3, 6).to(stored)
    out, target = c(x, "a", "b"), c.target(x, "b")
    assert {t.dtype for t in (*out[:2], *target[:2])} == {torch.float32}
    assert torch.equal(out.cl, c(x.float(), "a", "b").cl)
    assert torch.equal(target.reg, c.target(x.float(), "b").reg)
    AlignLoss()(out, target).loss.backward()


# --- Items without tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["after", "before"])
@pytest.mark.parametrize("mask", [None, torch.ones(3, 0, dtype=torch.bool)])
def test_no_tokens_are_zero_vectors_that_are_not_valid(pool, mask):
    c = make(pool=pool)
    out, target = c(torch.randn(3, 0, 6), "a", "b", mask), c.target(torch.randn(3, 0, 6), "b", mask)
    for found in (out, target):
        assert found.valid.tolist() == [False] * 3
        assert torch.equal(found.reg, torch.zeros(3, 6)) and torch.equal(found.cl, torch.zeros(3, 8))
    loss = AlignLoss()(out, target)
    loss.loss.backward()
    assert loss.loss == 0 and all(p.grad is None or not p.grad.any() for p in c.parameters())


def test_a_source_without_tokens_leaves_the_other():
    c = make({"a": 6, "b": 5, "c": 4}, directions=[(("a", "b"), "c")], preset="v6", expert_scope="per_modality")
    x, y = torch.randn(3, 2, 6), torch.randn(3, 0, 5)
    out = c({"a": x, "b": y}, ("a", "b"), "c")
    none = torch.zeros(3, 4, dtype=torch.bool)
    padded = c({"a": x, "b": torch.randn(3, 4, 5)}, ("a", "b"), "c", {"b": none})
    assert out.valid.all() and padded.valid.all()
    assert_near(out.cl, padded.cl, 1e-6)
    assert not c({"a": x[:, :0], "b": y}, ("a", "b"), "c").valid.any()


# --- Classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_classes_may_be_of_any_integer_or_bool(dtype):
    c, classes = make({"a": 6, "label": 2}), torch.tensor([1, 0, 1])
    assert torch.equal(c(classes.to(dtype), "label", "a").reg, c(classes, "label", "a").reg)
    for a, b in zip(c.target(classes.to(dtype), "label")[:2], c.target(classes, "label")[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_class_out_of_range_is_named(wrong):
    c = make({"a": 6, "label": 4})
    for classes in (torch.tensor([1, wrong]), torch.tensor([[1, wrong]])):
        with pytest.raises(ValueError, match=f"classes in x of label must be from 0 to 3, got {wrong}"):
            c(classes, "label", "a")
        with pytest.raises(ValueError, match=f"classes in y of label must be from 0 to 3, got {wrong}"):
            c.target(classes, "label")
    with pytest.raises(ValueError, match="x of label must be real numbers or classes, got torch.complex64"):
        c(torch.zeros(2, 4, dtype=torch.complex64), "label", "a")


def test_items_of_one_class_are_no_negatives_unless_group_ids_say_so():
    torch.manual_seed(0)
    c, x, classes = make({"a": 6, "label": 3}), torch.randn(6, 6), torch.tensor([0, 1, 1, 2, 0, 0])
    out, target, loss = c(x, "a", "label"), c.target(classes, "label"), AlignLoss(tau=0.5)
    found = loss(out, target).cl
    similarity = F.normalize(out.cl, dim=1) @ F.normalize(target.cl, dim=1).T / 0.5
    same = (classes[:, None] == classes) & ~torch.eye(6, dtype=torch.bool)
    similarity = similarity.masked_fill(same, -torch.inf)
    own = torch.arange(6)
    assert_near(found, (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2, 1e-5)
    assert torch.equal(loss(out, target, classes).cl, found)
    apart = loss(out, target, torch.arange(6)).cl
    assert apart > found and torch.equal(apart, loss(out, TargetOut(target.reg, target.cl)).cl)
    assert c.target(torch.zeros(2, 3, dtype=torch.int64), "label").classes is None  # no one class an item


def test_a_masked_class_counts_for_nothing():
    c = make({"a": 6, "label": 3})
    there = torch.tensor([True, False, True])
    target = c.target(torch.tensor([2, -7, 0]), "label", there)
    out = c(torch.randn(3, 6), "a", "label")
    both = AlignLoss()(out, target).loss
    alone = out._replace(reg=out.reg[there], cl=out.cl[there])
    assert_near(both, AlignLoss()(alone, c.target(torch.tensor([2, 0]), "label")).loss, 1e-6)


# --- Names and directions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["type", "keys", "values", "items", "float", "half", "cpu", "train", "training", "get", "forward"]
)
def test_a_name_that_torch_has_for_itself_is_refused(name):
    message = f"names of modalities must not be those of torch's modules, got '{name}'"
    with pytest.raises(ValueError, match=message):
        make({name: 3, "b": 2})
    c = make()
    with pytest.raises(ValueError, match=message):
        c.add_modality(name, 3)
    assert list(c.modalities) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {}}, r"dims must have at least two modalities, got \[\]"),
        ({"dims": {"a": 3}}, r"dims must have at least two modalities, got \['a'\]"),
        ({"directions": [("a", "a")]}, "target of a direction must not be a source of it"),
        ({"directions": [(("a", "b"), "a")]}, "target of a direction must not be a source of it"),
        ({"directions": [(("a", "b"), "t"), (("b", "a"), "t")]}, "directions must be different pairs"),
    ],
)
def test_a_direction_that_makes_no_sense_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConnector(**({"dims": {"a": 6, "b": 6, "t": 4}, "hidden": 8} | options))


def test_usage_takes_a_pair():
    with pytest.raises(ValueError, match=r"usage: direction must be a pair \(source, target\), got 'a->b'"):
        make().usage("a->b")


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled():
    """Neither by tests before nor for tests after: what is compiled counts towards the limit of all."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["fullgraph", "capture_scalar_outputs"])
def test_dropout_is_compiled_without_a_break_as_the_documentation_says(way, nothing_compiled):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    c, x = make(dropout=0.1), torch.randn(4, 6)
    compiled = torch.compile(c, backend=backend, fullgraph=way == "fullgraph")
    results = []
    with torch._dynamo.config.patch(capture_scalar_outputs=way == "capture_scalar_outputs"):
        for run in (c, compiled):
            torch.manual_seed(3)
            results.append((run(x, "a", "b").cl, run(x, "a", "b").cl))
    assert len(graphs) == 1 and not torch.equal(*results[1])
    for a, b in zip(*results, strict=True):
        assert_near(b, a, 1e-6)


def test_more_directions_than_the_limit_compile_once_it_is_raised(nothing_compiled):
    c, x = make({name: 6 for name in "pqrs"}).eval(), torch.randn(4, 6)
    compiled = torch.compile(c, backend="eager", fullgraph=True)  # which raises where it would not compile
    with torch._dynamo.config.patch(recompile_limit=12):
        for direction in c.directions:
            assert_near(compiled(x, *direction).cl, c(x, *direction).cl, 1e-6)
    assert len(c.directions) == 12
