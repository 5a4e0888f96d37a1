import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import mmbal
import oracles
from conftest import CLIP_LAYERS
from mmbal import MoEMLP, upcycle


def mixtures(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEMLP)}


def mlp_name(tower, layer):
    return f"{tower}_model.encoder.layers.{layer}.mlp"


def assert_same_outputs(model, expected, batch, tolerance=1e-5):
    with torch.no_grad():
        ours, other = model(**batch), expected(**batch)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        oracles.assert_near(ours[name], other[name], tolerance, name)


def test_copies_with_normalized_weights_equal_the_dense_clip(make_clip, clip_batch):
    dense = make_clip(0)
    moe = upcycle(copy.deepcopy(dense), num_experts=4, expert_init="copy")
    assert sorted(mixtures(moe)) == sorted(mlp_name(t, i) for t, n in CLIP_LAYERS.items() for i in range(n))
    assert all(m.experts.w1.shape[0] == 4 for m in mixtures(moe).values())
    assert_same_outputs(moe, dense, clip_batch)


def test_four_copies_are_made_where_nothing_is_said(make_clip, clip_batch):
    dense = make_clip(0)
    moe = upcycle(copy.deepcopy(dense))
    assert {m.experts.w1.shape[0] for m in mixtures(moe).values()} == {4}
    assert_same_outputs(moe, dense, clip_batch)


def test_upcycling_changes_the_model_in_place_and_returns_it(make_clip):
    model = make_clip(0)
    others = {n: p for n, p in model.named_parameters() if ".mlp." not in n}
    assert upcycle(model, num_experts=2, expert_init="copy") is model
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in others.items())


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_the_activation_is_carried_over(make_clip, clip_batch, hidden_act):
    dense = make_clip(0, hidden_act)
    assert_same_outputs(upcycle(copy.deepcopy(dense), num_experts=3, expert_init="copy"), dense, clip_batch)


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_sources_become_the_experts_after_the_base(make_clip, siblings, as_state_dict):
    base = make_clip(0)
    sources = siblings(base, 3)
    given = [s.state_dict() for s in sources] if as_state_dict else sources
    moe = upcycle(copy.deepcopy(base), given)
    for name, mixture in mixtures(moe).items():
        for expert, source in enumerate([base, *sources]):
            mlp, experts = source.get_submodule(name), mixture.experts
            assert torch.equal(experts.w1[expert], mlp.fc1.weight) and torch.equal(experts.b1[expert], mlp.fc1.bias)
            assert torch.equal(experts.w2[expert], mlp.fc2.weight) and torch.equal(experts.b2[expert], mlp.fc2.bias)


def test_the_model_of_sources_equals_blocks_mixed_by_hand(make_clip, siblings, clip_batch):
    base = make_clip(0)
    sources = siblings(base, 2)
    moe = upcycle(copy.deepcopy(base), sources, router_init="normal:1.0")

    class ByHand(nn.Module):
        def __init__(self, mlps, router):
            super().__init__()
            self.mlps, self.router = nn.ModuleList(mlps), router

        def forward(self, x):
            weights, indices = oracles.topk(self.router(x).reshape(-1, 3), 2)
            dense = torch.zeros(len(weights), 3).scatter(1, indices, weights).reshape(*x.shape[:-1], 3)
            return sum(dense[..., e, None] * mlp(x) for e, mlp in enumerate(self.mlps))

    by_hand = copy.deepcopy(base)
    for name, mixture in mixtures(moe).items():
        mlps = [copy.deepcopy(m.get_submodule(name)) for m in (base, *sources)]
        by_hand.set_submodule(name, ByHand(mlps, mixture.router))
    assert_same_outputs(moe, by_hand, clip_batch)


def test_without_the_base_the_sources_are_all_experts(make_clip, siblings):
    base = make_clip(0)
    sources = siblings(base, 2)
    moe = upcycle(copy.deepcopy(base), sources, include_base=False)
    for name, mixture in mixtures(moe).items():
        for expert, source in enumerate(sources):
            assert torch.equal(mixture.experts.w1[expert], source.get_submodule(name).fc1.weight)
        assert mixture.experts.w1.shape[0] == 2


def test_noise_makes_copies_that_differ_by_the_asked_deviation(make_clip):
    base = make_clip(0)
    moe = upcycle(copy.deepcopy(base), num_experts=4, expert_init="noise", noise_std=0.05)
    for name, mixture in mixtures(moe).items():
        difference = mixture.experts.w1 - base.get_submodule(name).fc1.weight
        assert difference[1:].std().item() == pytest.approx(0.05, rel=0.1)
        for a in range(4):
            for b in range(a):
                assert not torch.equal(mixture.experts.w1[a], mixture.experts.w1[b])
                assert not torch.equal(mixture.experts.w2[a], mixture.experts.w2[b])


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_drop_redraws_that_share_of_hidden_units_in_all_matrices_of_an_expert(make_clip, ratio):
    base = make_clip(0)
    moe = upcycle(copy.deepcopy(base), num_experts=4, expert_init="drop", drop_ratio=ratio)
    for name, mixture in mixtures(moe).items():
        mlp, experts = base.get_submodule(name), mixture.experts
        F, kept_sets = mlp.fc1.out_features, []
        for e in range(1, 4):
            matches = (experts.w1[e][:, None] == mlp.fc1.weight[None]).all(2)  # units may be permuted
            ours, theirs = matches.nonzero(as_tuple=True)
            assert len(ours) == pytest.approx(F * (1 - ratio), abs=1)
            assert torch.equal(experts.b1[e][ours], mlp.fc1.bias[theirs])
            assert torch.equal(experts.w2[e][:, ours], mlp.fc2.weight[:, theirs])
            redrawn = torch.ones(F, dtype=torch.bool).index_fill(0, ours, False)
            same = (experts.w2[e].T[redrawn][:, None] == mlp.fc2.weight.T[None]).all(2)
            assert not same.any()
            assert experts.w1[e][redrawn].std().item() == pytest.approx(mlp.fc1.weight.std().item(), rel=0.25)
            assert torch.equal(experts.b2[e], mlp.fc2.bias)
            kept_sets.append(frozenset(theirs.tolist()))
        assert len(set(kept_sets)) == 3


@pytest.mark.parametrize("options", [{"expert_init": "noise"}, {"expert_init": "drop"}, {"expert_init": "copy"}])
def test_the_seed_alone_decides_the_random_parts(make_clip, options):
    base = make_clip(0)

    def run(seed, global_seed):
        torch.manual_seed(global_seed)
        return upcycle(copy.deepcopy(base), num_experts=3, seed=seed, **options).state_dict()

    first, again, other = run(1, 10), run(1, 11), run(2, 10)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("layers", "vision", "text"),
    [
        ("all", [0, 1, 2], [0, 1, 2, 3]),
        ("last:1", [2], [3]),
        ("last:2", [1, 2], [2, 3]),
        ([0, 2], [0, 2], [0, 2]),
        ({"vision": "last:1", "text": [1, 3]}, [2], [1, 3]),
        ({"vision": "all"}, [0, 1, 2], []),
        ({"text": "last:3"}, [], [1, 2, 3]),
    ],
)
def test_layers_are_chosen_tower_by_tower(make_clip, clip_batch, layers, vision, text):
    dense = make_clip(0)
    moe = upcycle(copy.deepcopy(dense), num_experts=2, expert_init="copy", layers=layers)
    expected = [mlp_name("vision", i) for i in vision] + [mlp_name("text", i) for i in text]
    assert sorted(mixtures(moe)) == sorted(expected)
    assert_same_outputs(moe, dense, clip_batch)


def test_every_second_layer_counts_from_the_second(make_clip):
    moe = upcycle(make_clip(0), num_experts=2, expert_init="copy", layers={"text": "every:2"})
    chosen = [i for i in range(4) if mlp_name("text", i) in mixtures(moe)]
    assert chosen == [1, 3]


def test_router_inits(make_clip):
    def weights(**options):
        model = upcycle(make_clip(0), num_experts=4, expert_init="copy", layers={"vision": "all"}, **options)
        return [m.router.weight.detach() for m in mixtures(model).values()]

    for weight in weights(router_init="uniform"):
        assert weight.abs().max() <= 32**-0.5
        assert weight.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.25)
    assert all((weight == 0).all() for weight in weights(router_init="zeros"))
    for weight in weights(router_init="normal:0.5"):
        assert weight.std().item() == pytest.approx(0.5, rel=0.3)
    rows = torch.randn(4, 32)
    assert all(torch.equal(weight, rows) for weight in weights(router_init=rows))
    several = [torch.randn(4, 32) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(weights(router_init=several), several, strict=True))


def test_routers_of_different_layers_are_drawn_independently(make_clip):
    vision = [m.router.weight for n, m in mixtures(upcycle(make_clip(0), num_experts=4, expert_init="copy")).items()]
    assert len({tuple(w.flatten().tolist()) for w in vision}) == len(vision)


def test_shared_weights_come_from_the_base_or_the_mean_of_all(make_clip, siblings):
    base = make_clip(0)
    sources = siblings(base, 2)
    with torch.no_grad():
        for i, source in enumerate(sources):
            source.visual_projection.weight += i + 1.0
    name, original = "visual_projection.weight", base.visual_projection.weight
    with pytest.warns(UserWarning, match="differ from the base outside their MLPs"):
        kept = upcycle(copy.deepcopy(base), sources, shared="base").state_dict()
    mean = upcycle(copy.deepcopy(base), sources, shared="mean").state_dict()
    assert torch.equal(kept[name], original)
    oracles.assert_near(mean[name], original + 1.0, 1e-6)
    with pytest.raises(ValueError, match="visual_projection"):
        upcycle(copy.deepcopy(base), sources, shared="strict")
    upcycle(copy.deepcopy(base), siblings(base, 2), shared="strict")


def test_sources_that_changed_outside_their_mlps_are_warned_of_once_and_refused_on_demand(make_clip, siblings):
    base = make_clip(0)
    sources = siblings(base, 3)
    with torch.no_grad():
        sources[1].visual_projection.weight[0, 0] += 2
        sources[1].text_model.final_layer_norm.bias -= 0.5
    found = r"experts\[1\] in text_model.final_layer_norm.bias and 1 more \(by up to 2, visual_projection.weight"
    with pytest.warns(UserWarning, match=found) as caught:
        upcycle(copy.deepcopy(base), sources)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.raises(ValueError, match=f"shared='strict'.*{found}"):
        upcycle(copy.deepcopy(base), sources, shared="strict")


@pytest.mark.parametrize("shared", ["base", "strict", "mean"])
def test_sources_that_differ_in_mlps_alone_are_taken_without_a_warning(make_clip, siblings, shared):
    base = make_clip(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upcycle(copy.deepcopy(base), siblings(base, 2), shared=shared, layers="last:1")


def test_sources_may_be_state_dicts_of_the_mlps_alone(make_clip, siblings):
    base = make_clip(0)
    whole = siblings(base, 2)
    alone = [{key: t for key, t in source.state_dict().items() if ".mlp." in key} for source in whole]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe = upcycle(copy.deepcopy(base), alone).state_dict()
    assert all(torch.equal(t, moe[key]) for key, t in upcycle(copy.deepcopy(base), whole).state_dict().items())


def test_a_checkpoint_given_twice_and_the_base_given_as_a_source_are_warned_of(make_clip, siblings):
    base = make_clip(0)
    source = siblings(base, 1)[0]
    with pytest.warns(UserWarning, match=r"experts\[0\] and experts\[1\] have the same MLPs") as caught:
        upcycle(copy.deepcopy(base), [source, source])
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"the base and experts\[1\] have the same MLPs"):
        upcycle(copy.deepcopy(base), [source, copy.deepcopy(base)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upcycle(copy.deepcopy(base), [source, copy.deepcopy(base)], include_base=False)


def test_one_choice_with_normalized_weights_is_warned_of(make_clip):
    with pytest.warns(UserWarning, match="top_k=1 and normalize=True"):
        upcycle(make_clip(0), top_k=1)


def test_copies_with_a_shared_expert_equal_the_dense_clip(make_clip, clip_batch):
    dense = make_clip(0)
    moe = upcycle(copy.deepcopy(dense), num_experts=3, shared_expert=True, shared_weight=0.3)
    for mixture in mixtures(moe).values():
        assert mixture.router.weight.shape[0] == mixture.num_experts == 3 and mixture.experts.w1.shape[0] == 4
        assert mixture.shared_expert and mixture.shared_weight == 0.3
    assert_same_outputs(moe, dense, clip_batch)


@pytest.mark.parametrize("include_base", [True, False])
def test_the_shared_expert_is_the_base_and_the_rest_is_as_without_it(make_clip, siblings, include_base):
    base = make_clip(0)
    sources = siblings(base, 2)
    plain = mixtures(upcycle(copy.deepcopy(base), sources, include_base=include_base))
    shared = mixtures(upcycle(copy.deepcopy(base), sources, include_base=include_base, shared_expert=True))
    for name, mixture in shared.items():
        assert torch.equal(mixture.router.weight, plain[name].router.weight)
        for parameter, stacked in mixture.experts.named_parameters():
            assert torch.equal(stacked[:-1], plain[name].experts.get_parameter(parameter))
        assert torch.equal(mixture.experts.w2[-1], base.get_submodule(name).fc2.weight)
        assert torch.equal(mixture.experts.b1[-1], base.get_submodule(name).fc1.bias)


def test_mode_dtype_and_options_are_carried_over(make_clip):
    base = make_clip(0).double()
    moe = upcycle(base, num_experts=3, expert_init="copy", top_k=1, normalize=False, dropout=0.25)
    for mixture in mixtures(moe).values():
        assert not mixture.training
        assert {p.dtype for p in mixture.parameters()} == {torch.float64}
        assert (mixture.top_k, mixture.normalize, mixture.dropout) == (1, False, 0.25)


def test_a_clip_upcycled_trains_its_routers_alone(make_clip, siblings, clip_batch):
    base = make_clip(0)
    moe = upcycle(copy.deepcopy(base), siblings(base, 3))
    names = mmbal.freeze_except_router(moe)
    with mmbal.collect_router(moe) as routers:
        loss = moe(**clip_batch, return_loss=True).loss
    (loss + mmbal.router_losses(routers, load_balance=0.01).total).backward()
    assert len(routers) == len(names) == sum(CLIP_LAYERS.values())
    for name, parameter in moe.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in names), name


class PlainBlock(nn.Module):
    def __init__(self, act):
        super().__init__()
        layers = [("c_fc", nn.Linear(6, 12)), ("gelu", act), ("c_proj", nn.Linear(12, 6))]
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def plain_model(act=None, depth=4):
    return nn.Sequential(*(PlainBlock(act or nn.GELU()) for _ in range(depth)))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU()])
def test_any_module_with_mlp_blocks_of_two_linears_is_served(act):
    dense, x = plain_model(act), torch.randn(3, 5, 6)
    moe = upcycle(copy.deepcopy(dense), num_experts=4, expert_init="copy")
    assert sorted(mixtures(moe)) == [f"{i}.mlp" for i in range(4)]
    oracles.assert_near(moe(x), dense(x), 1e-5)
    some = upcycle(copy.deepcopy(dense), num_experts=4, expert_init="copy", layers="last:2")
    assert sorted(mixtures(some)) == ["2.mlp", "3.mlp"]


def test_an_unknown_activation_asks_for_a_name_and_takes_it():
    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class Odd(nn.Module):
        def forward(self, x):
            return x.sin()

    dense, x = plain_model(QuickGELU()), torch.randn(5, 6)
    named = upcycle(copy.deepcopy(dense), num_experts=2, expert_init="copy", activation="quick_gelu")
    oracles.assert_near(named(x), dense(x), 1e-5)
    with pytest.raises(ValueError, match="activation"):
        upcycle(plain_model(Odd()), num_experts=2, expert_init="copy")
