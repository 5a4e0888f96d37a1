"""What holds for every operator of the library."""

import sys
from pathlib import Path

import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
from mmbal._library import without_derivative

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))  # the calls that are compared with a GPU
import families

ops = torch.ops.mmbal
NAMES = sorted(n.removeprefix("mmbal::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("mmbal::"))


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mmbal::{name}", key)


SIMPLE = [name for name in NAMES if not has_kernel(name, "CompositeImplicitAutograd")]


@pytest.mark.parametrize("name", SIMPLE)
def test_an_operator_has_a_fake_kernel_and_a_rule_for_autograd(name):
    assert torch._library.simple_registry.singleton.find(f"mmbal::{name}").fake_impl.kernel is not None
    assert has_kernel(name, "Autograd")


def test_what_has_no_derivative_is_an_operator():
    assert set(without_derivative) <= set(SIMPLE)
    assert set(without_derivative.values()) == {"constant", "in place", "raises", "once"}


def test_statistics_and_choices_are_constants():
    energy = torch.rand(6, dtype=torch.float64, requires_grad=True)
    results = [*ops.waterfill(energy[None], torch.tensor([2.0], dtype=torch.float64), 0.5)]
    results += ops.unit_energy_foreach([torch.rand(3, 4, requires_grad=True)], [])
    results.append(ops.weighted_sample(energy[None], torch.tensor([2]), 1, 2))
    results.append(ops.ksg_mutual_info(torch.rand(9, 2, requires_grad=True), torch.rand(9)))
    assert not any(r.requires_grad for r in results)


def test_what_is_changed_in_place_must_not_be_part_of_a_graph():
    leaf = torch.rand(3, 4, requires_grad=True)
    scale = torch.zeros(3, dtype=torch.float64)
    for tensor in (leaf, leaf * 1):
        before = tensor.detach().clone()
        with pytest.raises(RuntimeError, match="scale_units_foreach_: grads must not require grad"):
            ops.scale_units_foreach_([tensor], [], scale)
        with pytest.raises(RuntimeError, match="ema_rows_: table must not require grad"):
            ops.ema_rows_(tensor, torch.arange(2), torch.rand(2, 4), 0.1)
        assert torch.equal(tensor, before)
    with torch.no_grad():
        ops.scale_units_foreach_([leaf], [], scale)
    assert torch.equal(leaf, torch.zeros(3, 4)) and leaf._version == 1


def test_parameters_beside_gradients_may_require_grad():
    grad, parameter = torch.rand(8), torch.rand(8, requires_grad=True)
    rho = torch.tensor([0.5], dtype=torch.float64)
    ops.mask_elements_foreach_([grad], [0], [0], rho, 1, 2, importance="gn_wn", weights=[parameter])
    assert (grad == 0).sum() == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_any_number_of_threads_gives_the_same_bits(family, dtype):
    threads = torch.get_num_threads()
    for case in families.of(family, "cases", dtype):
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([t for group in case.results("cpu") for t in group])
        torch.set_num_threads(threads)
        for others in results[1:]:
            for one, other in zip(results[0], others, strict=True):
                assert torch.equal(one, other), case.name
