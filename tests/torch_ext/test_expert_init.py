"""Layers, routers and experts of upcycling without a model: the same for models and for files of any naming."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import mmbal
from mmbal.expert_init import (
    SharedDifferences,
    check_shared,
    choose_layers,
    draw_routers,
    make_experts,
    parse_layers,
    plan_experts,
    warn_of_same_experts,
)

COUNTS = {"vision": 6, "text": 4}
INITS = ["copy", "noise", "drop"]


def expert(seed, F=12, D=6, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(F, D), (F,) if bias else None, (D, F), (D,) if bias else None]
    return [None if s is None else torch.randn(s, generator=generator).to(dtype) for s in shapes]


def made(plan, base, sources=(), seed=0):
    return list(make_experts(plan, base, sources, torch.Generator().manual_seed(seed)))


def same(one, other):
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("layers", "vision", "text"),
    [
        ("all", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
        ("last:2", [4, 5], [2, 3]),
        ("every:3", [2, 5], [2]),
        ("alternate", [1, 3, 5], [1, 3]),
        ("1+3", [1, 3], [1, 3]),
        ([-1, 0, 0], [0, 5], [0, 3]),
        ("vision=all,text=last:1", [0, 1, 2, 3, 4, 5], [3]),
        (" text = 2 , vision = -1+0 ", [0, 5], [2]),
        ("vision=alternate", [1, 3, 5], []),
        ({"text": "1", "vision": "last:1"}, [5], [1]),
    ],
)
def test_layers_are_chosen_text_first_in_ascending_order(layers, vision, text):
    expected = [("text", i) for i in text] + [("vision", i) for i in vision]
    assert choose_layers(layers, COUNTS) == expected
    assert choose_layers(layers, dict(reversed(COUNTS.items()))) == expected


def test_other_towers_keep_the_order_of_the_model():
    counts = {"video": 1, "vision": 1, "audio": 1, "text": 1}
    assert [tower for tower, _ in choose_layers("all", counts)] == ["text", "vision", "video", "audio"]


@pytest.mark.parametrize(
    "layers",
    [
        *("first:1", "last:0", "last:5", "last:-1", "last:1e1", "every:", "every:²", "alternate:2"),
        *("4", "1+", "1,2", ""),
        *("text=", "=all", "text", "text=all,text=all", "text=all,", "audio=all", "text=all,vision"),
        *([], [4], [True], [1.0], None, 2, {}, {"text": []}, {"text": None}, {"audio": "all"}),
    ],
)
def test_a_wrong_choice_of_layers_is_refused(layers):
    with pytest.raises(ValueError, match="upcycle: layers"):
        choose_layers(layers, {"text": 4})


def test_the_text_of_a_command_line_says_one_choice_or_one_for_each_tower():
    assert parse_layers("last:4") == "last:4"
    assert parse_layers("vision=all,text=last:4") == {"vision": "all", "text": "last:4"}


def test_routers_follow_one_generator_through_all_layers():
    sizes = [("a", 6), ("b", 9)]
    generator = torch.Generator().manual_seed(3)
    expected = [(2 * torch.rand(4, D, generator=generator) - 1) / D**0.5 for _, D in sizes]
    ours = draw_routers(sizes, 4, "uniform", torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    generator = torch.Generator().manual_seed(3)
    expected = [0.5 * torch.randn(4, D, generator=generator) for _, D in sizes]
    ours = draw_routers(sizes, 4, "normal:.5", torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("router_init", ["normal", "normal:-1", "normal:nan", "centroids", torch.zeros(4, 5), [], 1])
def test_a_wrong_router_init_is_refused(router_init):
    with pytest.raises(ValueError, match="upcycle: router_init"):
        draw_routers([("a", 6), ("b", 6)], 4, router_init, torch.Generator())


def test_sources_follow_the_base_and_are_read_one_at_a_time():
    base, sources, read = expert(0), [expert(1), expert(2)], []

    def reading():
        for j, source in enumerate(sources):
            read.append(j)
            yield source

    experts = make_experts(plan_experts(2), base, reading(), torch.Generator())
    for j, expected in enumerate([base, *sources]):
        assert same(next(experts), expected) and read == list(range(j))
    assert next(experts, None) is None
    without_base = made(plan_experts(2, include_base=False), base, sources)
    assert all(same(a, b) for a, b in zip(without_base, sources, strict=True))


@pytest.mark.parametrize("expert_init", INITS)
def test_expert_0_is_the_base_and_so_is_the_shared_one_at_the_end(expert_init):
    base = expert(0)
    plan = plan_experts(0, 3, expert_init=expert_init, shared_expert=True)
    experts = made(plan, base)
    assert plan.num_experts == 3 and len(experts) == 4
    assert same(experts[0], base) and same(experts[3], base)
    without = made(plan_experts(0, 3, expert_init=expert_init), base)
    assert all(same(a, b) for a, b in zip(without, experts[:3], strict=True))


@pytest.mark.parametrize("expert_init", ["noise", "drop"])
def test_experts_begun_again_with_the_same_generator_are_the_same(expert_init):
    plan, base = plan_experts(0, 4, expert_init=expert_init), expert(0)
    assert all(same(a, b) for a, b in zip(made(plan, base), made(plan, base), strict=True))
    assert not any(same(a, b) for a, b in zip(made(plan, base)[1:], made(plan, base, seed=1)[1:], strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropped_units_are_the_same_in_all_tensors_and_are_spread_like_what_they_replace(dtype, bias):
    w1, b1, w2, b2 = range(4)
    base = expert(0, F=400, D=30, dtype=dtype, bias=bias)
    base[w1] = base[w1] * 1e-3 + 5e-3  # squares of such numbers vanish in half precision
    plan = plan_experts(0, 3, expert_init="drop", drop_ratio=0.25)
    _, *others = made(plan, base)
    sets = []
    for other in others:
        kept = (other[w1] == base[w1]).all(1)
        assert kept.sum() == 300
        assert torch.equal((other[w2] == base[w2]).all(0), kept)
        drawn, old = other[w1][~kept].double(), base[w1][~kept].double()
        assert drawn.mean().item() == pytest.approx(old.mean().item(), rel=0.02)
        assert drawn.std().item() == pytest.approx(old.std().item(), rel=0.05)
        if bias:
            assert torch.equal(other[b1] == base[b1], kept) and torch.equal(other[b2], base[b2])
        else:
            assert other[b1] is None and other[b2] is None
        assert all(t is None or t.dtype == dtype for t in other)
        sets.append(tuple(kept.tolist()))
    assert len(set(sets)) == 2


def test_dropped_units_are_the_same_at_each_thread_count(at_each_thread_count):
    base, plan = expert(0, F=512, D=256), plan_experts(0, 2, expert_init="drop")
    at_each_thread_count(lambda: made(plan, base)[1])


def test_nothing_is_drawn_again_where_nothing_is_dropped_and_everything_where_all_is():
    base = expert(0)
    assert same(made(plan_experts(0, 2, expert_init="drop", drop_ratio=0.0), base)[1], base)
    whole = made(plan_experts(0, 2, expert_init="drop", drop_ratio=1.0), base)[1]
    assert not any((a == b).any() for a, b in zip(whole[:3], base[:3], strict=True)) and torch.equal(whole[3], base[3])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_sources": 0, "expert_init": "sources"}, "expert_init"),
        ({"num_sources": 2, "expert_init": "copy"}, "expert_init"),
        ({"num_sources": 0, "expert_init": "clone"}, "expert_init"),
        ({"num_sources": 2, "num_experts": 4}, "num_experts"),
        ({"num_sources": 0, "num_experts": 0}, "num_experts"),
        ({"num_sources": 0, "include_base": False}, "include_base"),
        ({"num_sources": 1, "include_base": False}, "top_k"),
        ({"num_sources": 0, "top_k": 0}, "top_k"),
        ({"num_sources": 0, "shared": "median"}, "shared"),
        ({"num_sources": 0, "noise_std": -0.1}, "noise_std"),
        ({"num_sources": 0, "drop_ratio": 1.1}, "drop_ratio"),
        ({"num_sources": 0, "dropout": 1.0}, "dropout"),
        ({"num_sources": 0, "shared_weight": 1.0}, "shared_weight"),
        ({"num_sources": 0, "shared_weight": -0.1}, "shared_weight"),
    ],
)
def test_a_wrong_option_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"upcycle: {name}"):
        plan_experts(**arguments)


@pytest.mark.parametrize("expert_init", [*INITS, "sources"])
@pytest.mark.parametrize("layers", ["all", {"vision": "last:1", "text": "alternate"}])
def test_tensors_handled_one_by_one_give_what_upcycling_the_model_gives(make_clip, siblings, expert_init, layers):
    """As a program does that works on files: keys of the base and of the sources, no model."""
    base = make_clip(0)
    models = siblings(base, 2) if expert_init == "sources" else []
    options = {"expert_init": expert_init, "shared_expert": True}
    expected = mmbal.upcycle(copy.deepcopy(base), models or None, layers=layers, seed=11, **options).state_dict()

    tensors, *others = (model.state_dict() for model in [base, *models])
    plan = plan_experts(len(others), **options)
    chosen = choose_layers(layers, {"vision": 3, "text": 4})
    names = [f"{tower}_model.encoder.layers.{i}.mlp" for tower, i in chosen]
    sizes = [(name, tensors[f"{name}.fc1.weight"].shape[1]) for name in names]
    generator = torch.Generator().manual_seed(11)
    routers = draw_routers(sizes, plan.num_experts, "uniform", generator)

    def read(state, name):
        return [state[f"{name}.{key}"] for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]

    for name, router in zip(names, routers, strict=True):
        sources = (read(other, name) for other in others)
        experts = list(make_experts(plan, read(tensors, name), sources, generator))
        assert torch.equal(expected[f"{name}.router.weight"], router)
        for parameter, stack in zip(("w1", "b1", "w2", "b2"), zip(*experts, strict=True), strict=True):
            assert torch.equal(expected[f"{name}.experts.{parameter}"], torch.stack(stack))
    assert sum(key.endswith("router.weight") for key in expected) == len(names)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        parts = [("c_fc", mlp.fc1), ("gelu", mlp.activation_fn), ("c_proj", mlp.fc2)]
        self.mlp = nn.Sequential(OrderedDict(parts))


def named_as_openai(clip):
    """The MLPs of a transformers model under the names of OpenAI's and open_clip's, the vision tower first."""

    def transformer(tower):
        resblocks = nn.ModuleList(Block(layer.mlp) for layer in tower.encoder.layers)
        return nn.ModuleDict({"resblocks": resblocks})

    vision = nn.ModuleDict({"transformer": transformer(clip.vision_model)})
    return nn.ModuleDict({"visual": vision, "transformer": transformer(clip.text_model)})


@pytest.mark.parametrize("expert_init", INITS)
@pytest.mark.parametrize("layers", ["all", "vision=last:2,text=1+3"])
def test_models_of_other_names_and_order_get_the_same_routers_and_experts(make_clip, expert_init, layers):
    ours = mmbal.upcycle(make_clip(0), layers=layers, expert_init=expert_init, seed=5)
    openai = mmbal.upcycle(named_as_openai(make_clip(0)), layers=layers, expert_init=expert_init, seed=5)
    for theirs, tower in (
        (openai["visual"]["transformer"], ours.vision_model),
        (openai["transformer"], ours.text_model),
    ):
        for block, layer in zip(theirs["resblocks"], tower.encoder.layers, strict=True):
            assert type(block.mlp) is (mmbal.MoEMLP if isinstance(layer.mlp, mmbal.MoEMLP) else nn.Sequential)
            for a, b in zip(block.mlp.parameters(), layer.mlp.parameters(), strict=True):
                assert torch.equal(a, b)


def test_routers_of_a_clip_are_drawn_text_tower_first_and_before_any_expert(make_clip):
    moe = mmbal.upcycle(make_clip(0), expert_init="noise", seed=9)
    generator = torch.Generator().manual_seed(9)
    for tower, D in ((moe.text_model, 24), (moe.vision_model, 32)):
        for layer in tower.encoder.layers:
            expected = (2 * torch.rand(4, D, generator=generator) - 1) / D**0.5
            assert torch.equal(layer.mlp.router.weight, expected)


def test_experts_that_are_the_same_in_all_layers_are_named():
    layers = [[expert(0), expert(1), expert(0)], [expert(2), expert(3), expert(2)]]
    with pytest.warns(UserWarning, match=r"upcycle: the base and C have the same MLPs in all chosen layers") as caught:
        warn_of_same_experts(layers, ["the base", "B", "C"])
    assert len(caught) == 1


@pytest.mark.parametrize("part", range(4))
def test_one_tensor_in_one_layer_makes_experts_differ_and_ends_the_reading(part):
    first, second = expert(0), expert(0)
    second[part] = second[part] + 1

    def layers():
        yield [expert(1), expert(1)]
        yield [first, second]
        raise AssertionError("read too far")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_same_experts(layers(), ["A", "B"])


def differences(name, **pairs):
    found = SharedDifferences(name)
    for key, (own, other) in pairs.items():
        found.compare(key, torch.tensor(own), torch.tensor(other))
    return found


def test_differences_say_the_first_key_how_many_and_how_large():
    found = differences("B", a=([1.0], [1.0]), b=([1.0, 2.0], [1.5, 2.0]), c=([0.0], [-3.0]), d=([1], [2]))
    assert (found.first, found.count, found.largest, found.where) == ("b", 3, 3.0, "c")
    with pytest.raises(ValueError, match=r"shared='strict'.*B in b and 2 more \(by up to 3, c\)"):
        check_shared([found], "strict")
    with pytest.warns(UserWarning, match=r"B in b and 2 more.*C in e \(by up to 0.25\)\.") as caught:
        check_shared([found, differences("A", a=([1.0], [1.0])), differences("C", e=([0.25], [0.5]))], "base")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_shared([found], "mean")
        for shared in ("base", "strict"):
            check_shared([differences("A", a=([1.0], [1.0]))], shared)


def test_differences_of_shape_and_nan_are_not_lost_among_others():
    found = differences("B", a=([1.0], [2.0]), b=([1.0], [float("nan")]), c=([1.0], [5.0]))
    assert found.count == 3 and found.where == "b" and "nan" in str(found)
    found = differences("B", a=([1.0], [2.0]), b=([1.0], [1.0, 2.0]), c=([1.0], [5.0]))
    assert found.count == 3 and str(found) == "B in a and 2 more (in shape, b)"


def test_a_copy_in_half_precision_differs_by_its_rounding():
    found = SharedDifferences("B")
    own = torch.tensor([0.1, 0.5])
    found.compare("a", own, own.half())
    assert found.count == 1 and 0 < found.largest < 1e-4
    exact = SharedDifferences("B")
    exact.compare("a", own.half().float(), own.half())
    assert not exact
