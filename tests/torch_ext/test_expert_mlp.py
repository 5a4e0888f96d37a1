"""Values, layouts and errors of expert_mlp (gradients and dropout have files of their own)."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmbal  # noqa: F401  (loads the operators)
import oracles

expert_mlp = torch.ops.mmbal.expert_mlp
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def check(case, activation="quick_gelu", scale=1.0):
    y = expert_mlp(*case.arguments(), activation=activation)
    assert y.dtype == case.x.dtype
    expected = case.in_double().reference(activation=activation)
    oracles.assert_near(y, expected, scale * oracles.FORWARD_TOLERANCE[case.x.dtype], activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", oracles.ACTIVATIONS)
def test_equals_a_loop_over_experts(activation, dtype):
    check(oracles.mlp_case(N=40, D=12, F=30, dtype=dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "D", "F", "E", "K"),
    [
        (1, 1, 1, 1, 1),
        (3, 5, 7, 4, 4),
        (130, 17, 65, 3, 1),
        (97, 64, 256, 4, 2),
        (33, 200, 19, 8, 3),
        (20, 8, 9, 300, 2),
    ],
)
def test_sizes_with_tails_and_many_or_few_experts(N, D, F, E, K, dtype):
    check(oracles.mlp_case(N, D, F, E, K, dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(0, 70), st.integers(1, 40), st.integers(1, 70), st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from(DTYPES[:2]),
    st.booleans(),
)
def test_any_size_equals_the_loop_over_experts(size, dtype, bias):
    N, D, F, E, K = size
    check(oracles.mlp_case(N, D, F, E, min(K, E), dtype, bias, seed=sum(size)), scale=2)


@pytest.mark.parametrize("missing", [("b1",), ("b2",), ("b1", "b2")])
def test_either_bias_may_be_missing(missing):
    check(replace(oracles.mlp_case(), **dict.fromkeys(missing)))


def test_quick_gelu_has_its_minimum_where_the_spec_says():
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)[:, None]
    one, pair = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(len(grid), 1, dtype=torch.int64)
    case = oracles.Case(grid, one, None, one, None, torch.ones_like(grid), pair)
    y = expert_mlp(*case.arguments())
    assert y.min().item() == pytest.approx(-0.16361, abs=5e-6)
    assert grid[y.argmin()].item() == pytest.approx(-0.7512, abs=5e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", oracles.ACTIVATIONS)
def test_activations_saturate_without_nan(activation, dtype):
    x = torch.tensor([[-3e4], [-200.0], [-20.0], [0.0], [20.0], [200.0], [3e4]]).to(dtype)
    one, weight = torch.ones(1, 1, 1, dtype=dtype), torch.ones(7, 1, dtype=torch.promote_types(dtype, torch.float32))
    case = oracles.Case(x, one, None, one, None, weight, torch.zeros(7, 1, dtype=torch.int64))
    y = expert_mlp(*case.arguments(), activation=activation).double()
    expected = case.in_double().reference(activation=activation).to(dtype).double()  # float16 ends at 65504
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-5)


def test_identical_experts_with_weights_that_sum_to_one_are_the_dense_mlp():
    case = oracles.mlp_case(N=50, dtype=torch.float32)
    same = {name: getattr(case, name)[:1].expand_as(getattr(case, name)) for name in ("w1", "b1", "w2", "b2")}
    y = expert_mlp(*replace(case, **same).arguments())
    a = oracles.ACTIVATIONS["quick_gelu"](case.x @ case.w1[0].T + case.b1[0])
    oracles.assert_near(y, a @ case.w2[0].T + case.b2[0], 2e-6)


def test_all_experts_chosen_are_a_soft_mixture():
    case = oracles.mlp_case(N=20, E=4, K=4)
    logits = oracles.separated_logits(20, 4)
    weights, indices = torch.ops.mmbal.moe_topk(logits, 4)
    y = expert_mlp(*replace(case, weights=weights, indices=indices).arguments())
    u = torch.einsum("nd,efd->nef", case.x, case.w1) + case.b1
    o = torch.einsum("nef,edf->ned", u * torch.sigmoid(1.702 * u), case.w2) + case.b2
    oracles.assert_near(y, torch.einsum("ne,ned->nd", torch.softmax(logits, 1), o), 1e-12)


def test_renaming_the_experts_changes_nothing():
    case = oracles.mlp_case(N=30)
    order = torch.tensor([2, 0, 3, 1])
    moved = {name: getattr(case, name)[order] for name in ("w1", "b1", "w2", "b2")}
    renamed = replace(case, **moved, indices=order.argsort()[case.indices])
    oracles.assert_near(expert_mlp(*renamed.arguments()), expert_mlp(*case.arguments()), 1e-14)


def test_moving_the_tokens_moves_the_rows_of_the_result():
    case = oracles.mlp_case(N=30)
    order = torch.randperm(30)
    moved = replace(case, x=case.x[order], weights=case.weights[order], indices=case.indices[order])
    oracles.assert_near(expert_mlp(*moved.arguments()), expert_mlp(*case.arguments())[order], 1e-14)


def test_linear_in_the_routing_weights_and_in_the_second_layer():
    case = oracles.mlp_case(N=30)
    y = expert_mlp(*case.arguments())
    others = torch.randn_like(case.weights)
    mixed = expert_mlp(*replace(case, weights=2 * case.weights - 3 * others).arguments())
    oracles.assert_near(mixed, 2 * y - 3 * expert_mlp(*replace(case, weights=others).arguments()), 1e-12)
    doubled = replace(case, w2=2 * case.w2, b2=2 * case.b2)
    assert torch.equal(expert_mlp(*doubled.arguments()), 2 * y)


def test_a_nan_token_or_weight_stays_in_its_row():
    case = oracles.mlp_case(N=40, dtype=torch.float32)
    clean = expert_mlp(*case.arguments())
    case.x[7, 2], case.weights[21] = NAN, NAN
    y = expert_mlp(*case.arguments())
    others = [n for n in range(40) if n not in (7, 21)]
    assert y[[7, 21]].isnan().all()
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_give_an_empty_result(dtype):
    y = expert_mlp(*oracles.mlp_case(N=0, dtype=dtype).arguments())
    assert (y.shape, y.dtype) == ((0, 5), dtype)


def test_reads_any_layout():
    case = oracles.mlp_case(N=12)
    expected = expert_mlp(*case.arguments())

    def strided(t):
        wide = torch.full([2 * s for s in t.shape], NAN if t.is_floating_point() else -1, dtype=t.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)

    def reversed_memory(t):
        return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))

    for layout in (strided, reversed_memory):
        assert torch.equal(expert_mlp(*(layout(t) for t in case.arguments())), expected)


def test_reads_expanded_inputs():
    case = oracles.mlp_case(N=12)
    expanded = replace(
        case,
        x=case.x[:1].expand(12, 5),
        b1=case.b1[:1].expand(4, 7),
        w2=case.w2[:1].expand(4, 5, 7),
        weights=torch.tensor(0.5, dtype=torch.float64).expand(12, 2),
    )
    oracles.assert_near(expert_mlp(*expanded.arguments()), expanded.reference(), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_every_element_of_the_result(poisoned_memory, dtype):
    check(oracles.mlp_case(N=61, D=9, F=21, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(700, 48, 96, 4, 2), (61, 17, 65, 3, 1), (1, 130, 40, 2, 2), (50, 8, 300, 9, 4)])
def test_threads_do_not_change_a_bit(at_each_thread_count, size, dtype):
    case = oracles.mlp_case(*size, dtype=dtype)
    at_each_thread_count(lambda: [expert_mlp(*case.arguments())])


def test_autocast_runs_the_experts_in_low_precision_and_keeps_the_weights_in_float32():
    case = oracles.mlp_case(N=40, D=12, F=30, dtype=torch.float32)
    case.weights[:, 0] = 1 + 2**-12  # bfloat16 cannot hold this
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_mlp(*case.arguments())
    low = {name: tensor.bfloat16() for name, tensor in case.differentiable().items() if name != "weights"}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expert_mlp(*replace(case, **low).arguments()))


def test_autocast_gives_float32_gradients_to_float32_parameters():
    case = oracles.mlp_case(N=40, D=12, F=30, dtype=torch.float32).requiring_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_mlp(*case.arguments())
    y.float().square().sum().backward()
    exact = case.in_double().requiring_grad()
    exact.reference().square().sum().backward()
    for name, leaf in case.differentiable().items():
        assert leaf.grad.dtype == torch.float32
        oracles.assert_near(leaf.grad, getattr(exact, name).grad, 4.5e-2, name)


@pytest.mark.parametrize("cap", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_values(cap, tmp_path):
    script = f"""
import sys, torch, mmbal, test_expert_mlp
assert mmbal._core.isa_in_use() in ("portable", "avx2", "avx512")[: 1 + ("portable", "avx2", "avx512").index("{cap}")]
torch.save(test_expert_mlp.results_of_this_machine(), sys.argv[1])
"""
    file, here = tmp_path / "results.pt", os.path.dirname(__file__)
    environment = os.environ | {"MMBAL_ISA": cap, "PYTHONPATH": here}
    subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=True, cwd=tmp_path)
    for a, b in zip(torch.load(file), results_of_this_machine(), strict=True):
        oracles.assert_near(a, b, 6e-6)


def results_of_this_machine():
    case = oracles.mlp_case(N=130, D=37, F=75, dtype=torch.float32).requiring_grad()
    y = expert_mlp(*case.arguments())
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in case.differentiable().values())]


ARGUMENTS = ("x", "w1", "b1", "w2", "b2", "weights", "permutation", "offsets", "inverse")


def with_argument(name, tensor):
    arguments = dict(zip(ARGUMENTS, oracles.mlp_case(dtype=torch.float32).arguments(), strict=True))
    return arguments | {name: tensor(arguments[name]) if callable(tensor) else tensor}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_rank_names_the_argument(name):
    with pytest.raises(RuntimeError, match=rf"expert_mlp: .*\b{name}\b"):
        expert_mlp(**with_argument(name, lambda t: t[None]))


@pytest.mark.parametrize("name", ["b1", "w2", "b2", "weights", "permutation", "offsets", "inverse"])
def test_a_wrong_first_size_names_the_argument(name):
    with pytest.raises(RuntimeError, match=rf"expert_mlp: .*\b{name}\b"):
        expert_mlp(**with_argument(name, lambda t: t[:-1]))


@pytest.mark.parametrize("name", ["b1", "w2", "b2", "inverse"])
def test_a_wrong_last_size_names_the_argument(name):
    with pytest.raises(RuntimeError, match=rf"expert_mlp: .*\b{name}\b"):
        expert_mlp(**with_argument(name, lambda t: t[..., :-1]))


def test_weights_for_another_number_of_choices_than_the_routing_are_refused():
    with pytest.raises(RuntimeError, match="expert_mlp: .*(weights|permutation|inverse)"):
        expert_mlp(**with_argument("weights", lambda t: t[:, :1]))


def test_a_wrong_width_says_what_was_expected_and_what_came():
    with pytest.raises(RuntimeError, match=r"expert_mlp: w1 must be \[E, F, D\] = \[.*5\], got \[4, 7, 6\]"):
        expert_mlp(**with_argument("w1", torch.zeros(4, 7, 6)))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_dtype_names_the_argument(name):
    with pytest.raises(RuntimeError, match=rf"expert_mlp: .*\b{name}\b"):
        expert_mlp(**with_argument(name, lambda t: t.int()))


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_two_dtypes_at_once_name_the_argument(name):
    with pytest.raises(RuntimeError, match=rf"expert_mlp: .*\b{name}\b"):
        expert_mlp(**with_argument(name, lambda t: t.bfloat16()))


@pytest.mark.parametrize(("dtype", "weights"), [(torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_routing_weights_of_the_wrong_precision_are_refused(dtype, weights):
    arguments = dict(zip(ARGUMENTS, oracles.mlp_case(dtype=dtype).arguments(), strict=True))
    with pytest.raises(RuntimeError, match="expert_mlp: .*weights"):
        expert_mlp(**arguments | {"weights": arguments["weights"].to(weights)})


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("permutation", lambda t: t + 1),
        ("permutation", lambda t: t - 1),
        ("permutation", lambda t: t + 2**40),
        ("offsets", lambda t: t + 1),
        ("offsets", lambda t: t.flip(0)),
        ("offsets", lambda t: torch.tensor([0, -5, 3, 4, 18])),
        ("offsets", lambda t: torch.tensor([0, 2, 4, 6, 17])),
        ("inverse", lambda t: t + 1),
        ("inverse", lambda t: t - 1),
        ("inverse", lambda t: t - 2**40),
        ("permutation", lambda t: torch.zeros_like(t)),
        ("inverse", lambda t: torch.zeros_like(t)),
        ("inverse", lambda t: t.flip(1)),
    ],
)
def test_a_routing_that_points_outside_is_refused(name, edit):
    with pytest.raises(RuntimeError, match=rf"expert_mlp: .*\b{name}\b"):
        expert_mlp(**with_argument(name, edit))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"activation": "quickgelu"}, "activation"),
        ({"activation": ""}, "activation"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": NAN}, "dropout"),
        ({"output_dropout": 1.5}, "output_dropout"),
        ({"output_dropout": -1e-9}, "output_dropout"),
    ],
)
def test_a_wrong_option_is_named(options, name):
    with pytest.raises(RuntimeError, match=rf"expert_mlp: .*\b{name}\b"):
        expert_mlp(*oracles.mlp_case(dtype=torch.float32).arguments(), **options)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_one_tensor_left_on_the_meta_device_is_refused(name):
    with pytest.raises(RuntimeError, match=rf"(expert_mlp: .*\b{name}\b|device)"):
        expert_mlp(**with_argument(name, lambda t: t.to("meta")))


def test_the_seed_may_be_any_64_bit_number_and_the_offset_has_56_bits():
    arguments = oracles.mlp_case().arguments()
    assert expert_mlp(*arguments, dropout=0.5, seed=-1).isfinite().all()
    for offset in (-1, 2**56):
        with pytest.raises(RuntimeError, match="expert_mlp: .*offset"):
            expert_mlp(*arguments, dropout=0.5, offset=offset)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_workspace_that_cannot_be_had_is_an_error_and_the_next_call_works(tmp_path):
    script = """
import resource, torch, mmbal
E, D, F, N = 2, 64, 4096, 40000
torch.manual_seed(0)
x, weights = torch.randn(N, D), torch.ones(N, 1)
w1, w2 = torch.randn(E, F, D), torch.randn(E, D, F)
routing = torch.ops.mmbal.moe_dispatch(torch.zeros(N, 1, dtype=torch.int64), E)
few = torch.ops.mmbal.moe_dispatch(torch.zeros(3, 1, dtype=torch.int64), E)
run = lambda n, routing: torch.ops.mmbal.expert_mlp(x[:n], w1, None, w2, None, weights[:n], *routing)
before = run(3, few)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)  # the call needs 700 MiB
try:
    run(N, routing)
except RuntimeError as error:
    assert "mmbal: cannot allocate a workspace of" in str(error), error
else:
    raise AssertionError("no error")
assert torch.equal(run(3, few), before)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
