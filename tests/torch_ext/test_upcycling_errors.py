"""What upcycle refuses; in each case the model is left as it was."""

import copy

import pytest
import torch
from torch import nn

from mmbal import upcycle

COPY = {"num_experts": 4, "expert_init": "copy"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({**COPY, "top_k": 5}, "top_k"),
        ({**COPY, "top_k": 0}, "top_k"),
        ({**COPY, "num_experts": 0}, "num_experts"),
        ({"expert_init": "sources"}, "experts"),
        ({**COPY, "expert_init": "clone"}, "expert_init"),
        ({**COPY, "router_init": "gaussian"}, "router_init"),
        ({**COPY, "router_init": "normal:x"}, "router_init"),
        ({**COPY, "router_init": torch.zeros(3, 32)}, "router_init"),
        ({**COPY, "router_init": [torch.zeros(4, 32)]}, "router_init"),
        ({**COPY, "shared": "median"}, "shared"),
        ({**COPY, "activation": "mish"}, "activation"),
        ({**COPY, "layers": "first:2"}, "layers"),
        ({**COPY, "layers": "last:x"}, "layers"),
        ({**COPY, "layers": "last:0"}, "layers"),
        ({**COPY, "layers": [99]}, "layers"),
        ({**COPY, "layers": {"audio": "all"}}, "layers"),
        ({**COPY, "dropout": 1.0}, "dropout"),
        ({**COPY, "shared_expert": True, "shared_weight": 1.0}, "shared_weight"),
        ({**COPY, "layers": "vision=all,audio=all"}, "layers"),
        ({**COPY, "expert_init": "drop", "drop_ratio": 1.5}, "drop_ratio"),
        ({**COPY, "expert_init": "noise", "noise_std": -1.0}, "noise_std"),
    ],
)
def test_a_wrong_option_is_named_and_the_model_stays_dense(make_clip, options, named):
    model = make_clip(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=named):
        upcycle(model, **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_number_of_experts_that_contradicts_the_sources_is_refused(make_clip, siblings):
    base = make_clip(0)
    with pytest.raises(ValueError, match="num_experts"):
        upcycle(copy.deepcopy(base), siblings(base, 2), num_experts=4)
    assert upcycle(copy.deepcopy(base), siblings(base, 2), num_experts=3) is not None


def test_more_choices_than_sources_are_refused(make_clip, siblings):
    base = make_clip(0)
    with pytest.raises(ValueError, match="top_k"):
        upcycle(copy.deepcopy(base), siblings(base, 1), include_base=False, top_k=2)


def test_an_empty_list_of_sources_is_refused(make_clip):
    with pytest.raises(ValueError, match="experts"):
        upcycle(make_clip(0), [])


def test_a_model_without_mlp_blocks_is_refused():
    with pytest.raises(ValueError, match="(?i)mlp"):
        upcycle(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), **COPY)


def test_a_mixture_is_not_upcycled_again(make_clip):
    moe = upcycle(make_clip(0), **COPY)
    with pytest.raises(ValueError, match="(?i)mlp"):
        upcycle(moe, **COPY)


KEY = "vision_model.encoder.layers.1.mlp.fc1.weight"


def test_a_source_of_another_shape_is_refused_by_key(make_clip, siblings):
    base = make_clip(0)
    state = siblings(base, 1)[0].state_dict()
    state[KEY] = torch.zeros(7, 32)
    with pytest.raises(ValueError, match=KEY.replace(".", r"\.")):
        upcycle(copy.deepcopy(base), [state])


def test_a_source_with_a_missing_key_is_refused_by_key(make_clip, siblings):
    base = make_clip(0)
    state = siblings(base, 1)[0].state_dict()
    del state[KEY]
    with pytest.raises((ValueError, KeyError), match=KEY.replace(".", r"\.")):
        upcycle(copy.deepcopy(base), [state])


def test_a_source_that_is_neither_model_nor_state_dict_is_refused(make_clip):
    with pytest.raises((TypeError, ValueError), match="experts"):
        upcycle(make_clip(0), ["checkpoint.pt"])


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("experts", {"experts": torch.nn.Linear(2, 2)}),
        ("layers", {"layers": 3}),
        ("layers", {"layers": {"vision": None}}),
        ("router_init", {"router_init": None}),
    ],
)
def test_an_argument_of_another_kind_is_named(make_clip, argument, options):
    with pytest.raises(ValueError, match=f"upcycle: {argument}"):
        upcycle(make_clip(0), **options)


def test_a_source_with_another_activation_is_refused(make_clip):
    with pytest.raises(ValueError, match=r"experts\[0\].*activation"):
        upcycle(make_clip(0), experts=[make_clip(1, hidden_act="gelu")])
