"""mmbal.pack: the same outputs from weights laid out once, and no stale copy after anything that may change them."""

import copy
import io
import warnings

import pytest
import torch

import mmbal
from mmbal import packing

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def each_warning_again():
    packing._warn_once.cache_clear()


def mixture(dtype=torch.float32, dim=33, hidden=65, bias=True):
    torch.manual_seed(0)
    return mmbal.MoEMLP(dim, hidden, 4, bias=bias, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "hidden"), [(1, 1), (33, 65), (300, 700)])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_packed_weights_give_the_same_bits(dtype, dim, hidden, tokens):
    layer = mixture(dtype, dim, hidden)
    x = torch.randn(tokens, dim).to(dtype)
    with torch.no_grad():
        plain = layer(x)
        assert mmbal.pack(layer) > 0
        assert torch.equal(layer(x), plain)
        assert layer._packed is not None


def test_packed_weights_are_those_of_every_layer_and_without_bias():
    model = torch.nn.Sequential(mixture(), mixture(bias=False)).eval()
    x = torch.randn(9, 33)
    with torch.inference_mode():
        plain = model(x)
        held = mmbal.pack(model)
        assert torch.equal(model(x), plain)
    assert held == sum(layer._packed.panels.nbytes for layer in model)


def test_pack_states_the_memory():
    layer = mixture(dim=128, hidden=512)
    assert mmbal.pack(layer) == 4 * (layer.experts.w1.numel() + layer.experts.w2.numel())
    padded = mixture(dim=33, hidden=65)
    held = mmbal.pack(padded)
    assert held == padded._packed.panels.nbytes > 4 * (padded.experts.w1.numel() + padded.experts.w2.numel())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train(),
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.half(),
    ],
)
def test_what_may_change_the_weights_drops_the_packed_ones(change):
    layer = mixture()
    mmbal.pack(layer)
    change(layer)
    assert layer._packed is None


def test_a_forward_with_gradients_drops_the_packed_weights_and_says_so_once():
    layer = mixture()
    mmbal.pack(layer)
    with pytest.warns(UserWarning, match="dropped the packed weights"):
        layer(torch.randn(3, 33)).sum().backward()
    assert layer._packed is None and layer.experts.w1.grad is not None
    mmbal.pack(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(3, 33))


def test_autocast_takes_the_plain_path_and_says_so():
    layer = mixture()
    x = torch.randn(5, 33)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
        mmbal.pack(layer)
        with pytest.warns(UserWarning, match="not used under autocast"):
            assert torch.equal(layer(x), plain)


def double_in_place(layer, x):
    layer.experts.w1.mul_(2)
    return layer(x)


def load_the_experts_alone(layer, x):
    layer.experts.load_state_dict({name: 2 * value for name, value in layer.experts.state_dict().items()})
    return layer(x)


def put_another_parameter(layer, x):
    layer.experts.w2 = torch.nn.Parameter(2 * layer.experts.w2)
    return layer(x)


def call_with_other_parameters(layer, x):
    other = {f"experts.{name}": 3 * value for name, value in layer.experts.named_parameters()}
    return torch.func.functional_call(layer, other, (x,))


@pytest.mark.parametrize(
    "change", [double_in_place, load_the_experts_alone, put_another_parameter, call_with_other_parameters]
)
def test_weights_that_changed_are_seen_and_that_is_said(change):
    layer = mixture()
    same = copy.deepcopy(layer)
    x = torch.randn(5, 33)
    with torch.no_grad():
        mmbal.pack(layer)
        before = layer(x)
        with pytest.warns(UserWarning, match="mmbal.pack"):
            after = change(layer, x)
        assert torch.equal(after, change(same, x)) and not torch.equal(after, before)


def test_a_mode_set_by_hand_counts_as_training():
    layer = mixture()
    layer.dropout = 0.5
    mmbal.pack(layer)
    layer.training = True
    x = torch.randn(50, 33)
    with torch.no_grad(), pytest.warns(UserWarning, match="dropped the packed weights"):
        dropped = layer(x)
    assert not torch.equal(dropped, layer.eval()(x).detach())


def test_a_compiled_packed_layer_gives_the_same_values():
    layer = mixture()
    x = torch.randn(7, 33)
    with torch.no_grad():
        plain = layer(x)
        mmbal.pack(layer)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), plain)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x).detach(), plain)


def test_copies_on_disk_hold_no_packed_weights_and_deep_copies_work():
    layer = mixture()
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(layer, plain)
    mmbal.pack(layer)
    torch.save(layer, packed)
    assert packed.getbuffer().nbytes == plain.getbuffer().nbytes
    assert "_packed" not in layer.state_dict()
    with torch.no_grad():
        x = torch.randn(4, 33)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_pack_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="pack: model has no MoEMLP"):
        mmbal.pack(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pack: model must be in evaluation mode"):
        mmbal.pack(mixture().train())
    with pytest.raises(ValueError, match="pack: the weights must be on a CPU or a GPU, got meta"):
        mmbal.pack(mixture().to("meta"))


def test_packed_weights_of_another_size_are_refused():
    layer = mixture()
    x = torch.randn(3, 33)
    weights, indices = torch.ops.mmbal.moe_topk(torch.randn(3, 4), 2)
    experts, routing = layer.experts, torch.ops.mmbal.moe_dispatch(indices, 4)
    arguments = (x, experts.w1, experts.b1, experts.w2, experts.b2, weights, *routing, "relu", 0.0, 0.0, 0, 0, False)
    packed = torch.ops.mmbal.expert_mlp_pack(experts.w1, experts.w2)
    with torch.no_grad():
        for wrong in (packed[:-1], packed.float(), torch.zeros(0, dtype=torch.uint8)):
            with pytest.raises(RuntimeError, match="expert_mlp: packed must be"):
                torch.ops.mmbal.expert_mlp_forward(*arguments, packed=wrong)


@pytest.mark.parametrize(
    ("w1", "w2", "name"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 3), "w1"),
        (torch.zeros(2, 3, 4, dtype=torch.int32), torch.zeros(2, 4, 3), "w1"),
        (torch.zeros(0, 3, 4), torch.zeros(0, 4, 3), "w1"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), "w2"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 3, dtype=torch.float64), "w2"),
    ],
)
def test_packing_names_the_wrong_argument(w1, w2, name):
    with pytest.raises(RuntimeError, match=rf"expert_mlp_pack: {name}\b"):
        torch.ops.mmbal.expert_mlp_pack(w1, w2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_packing(dtype):
    w1, w2 = torch.randn(2, 5, 3).to(dtype), torch.randn(2, 3, 5).to(dtype)
    torch.library.opcheck(torch.ops.mmbal.expert_mlp_pack.default, (w1, w2))
