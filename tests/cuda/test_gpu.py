"""Every operator on the GPU against itself on the CPU, whose tests hold it to independent oracles."""

import families
import pytest
import torch
from families.expert_mlp import experts

import mmbal
import oracles
from mmbal._library import without_derivative

ops = torch.ops.mmbal
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of the largest |value|: sums in another order; what is stored on the way is rounded.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


of_each_family = pytest.mark.parametrize("family", families.FAMILIES)


@pytest.fixture
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@of_each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_are_those_of_the_cpu(dtype, family, poisoned_memory):
    for case in families.of(family, "cases", dtype):
        on_cpu, on_gpu = case.results("cpu"), case.results("cuda")
        tolerance = TOLERANCE[dtype] if case.tolerance is None else case.tolerance
        for what, expected, actual in zip(("output", "gradient"), on_cpu, on_gpu, strict=True):
            assert len(expected) == len(actual), case.name
            for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
                assert a.is_cuda and a.dtype == e.dtype, case.name
                if e.is_floating_point():
                    oracles.assert_near(a.cpu(), e, tolerance, f"{case.name}: {what} {i}", case.scale)
                else:
                    assert torch.equal(a.cpu(), e), f"{case.name}: {what} {i}"


@of_each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(dtype, family):
    for case in families.of(family, "cases", dtype):
        first = case.results("cuda")
        for _ in range(3):
            again = case.results("cuda")
            assert same(first[0], again[0]) and same(first[1], again[1]), case.name


@of_each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_is_read(dtype, family):
    for case in families.of(family, "plain", 37, dtype):
        if not case.any_layout:
            continue
        tensors, others = case.arguments("cuda", requires_grad=False)
        expected = case.outputs(tensors, others)
        strided = []
        for t in tensors:
            wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
            wide[..., 1::2] = float("nan") if t.is_floating_point() else -1
            wide[..., ::2] = t
            strided.append(wide[..., ::2])
        assert not any(t.is_contiguous() for t in strided if t.numel() > 1)
        assert same(case.outputs(strided, others), expected), case.name


@pytest.mark.parametrize("case", families.of_all("small"), ids=lambda case: f"{case.family}: {case.name}")
def test_gradients_are_right(case):
    tensors, others = case.arguments("cuda")

    def floats(*given):
        return tuple(o for o in case.outputs(given, others) if o.is_floating_point())

    assert torch.autograd.gradcheck(floats, tensors)
    if case.twice:
        assert torch.autograd.gradgradcheck(floats, tensors)


@of_each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [0, 9])
def test_operators_are_well_behaved(N, dtype, family):
    for case in families.of(family, "plain", N, dtype):
        for operator, (args, options) in case.calls("cuda").items():
            if operator._opname not in without_derivative and not case.inference:
                for t in args:
                    if isinstance(t, torch.Tensor) and t.is_floating_point():
                        t.requires_grad_()
            torch.library.opcheck(operator, args, options)


@of_each_family
def test_nothing_waits_for_the_device(family):
    """A wait is an error while a graph is captured; the replay must give what the call gave."""
    for dtype in DTYPES:
        for case in families.of(family, "plain", 100, dtype):
            tensors, others = case.arguments("cuda")

            def call(case=case, tensors=tensors, others=others):
                outputs = case.outputs(tensors, others)
                differentiable = [o for o in outputs if o.requires_grad]
                if not differentiable:
                    return outputs
                upstream = [torch.ones_like(o) for o in differentiable]
                inputs = [t for t in tensors if t.requires_grad]
                gradients = torch.autograd.grad(differentiable, inputs, upstream, allow_unused=True)
                return [*outputs, *(g for g in gradients if g is not None)]

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                expected = [t.detach().clone() for t in call()]
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call()
            for t in captured:
                t.detach().zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert same(captured, expected), case.name


def test_routing_captures_its_dispatch_too():
    logits = torch.randn(300, 8, device="cuda")
    expected = ops.moe_dispatch(ops.moe_topk(logits, 2)[1], 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.moe_dispatch(ops.moe_topk(logits, 2)[1], 8)
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)


def test_autocast_runs_experts_in_low_precision_and_the_router_in_float32():
    x = torch.randn(20, 16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        weights, indices = ops.moe_topk(x @ torch.randn(16, 4, device="cuda"), 2)
        tensors, _ = experts(20, torch.float32).arguments("cuda")
        y = ops.expert_mlp(*tensors[:5], weights, *ops.moe_dispatch(indices, 4))
    assert weights.dtype == torch.float32 and y.dtype == torch.bfloat16


def test_a_tensor_left_on_the_cpu_is_named():
    tensors, others = experts(5, torch.float32).arguments("cuda", requires_grad=False)
    for i, name in enumerate(("x", "w1", "b1", "w2", "b2", "weights")):
        mixed = [t.cpu() if i == j else t for j, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match=f"expert_mlp: {name} must be on CUDA device"):
            ops.expert_mlp(*mixed, *others.values())
    with pytest.raises(RuntimeError, match="router_z_loss: token_mask must be on CUDA device"):
        ops.router_z_loss(torch.zeros(3, 4, device="cuda"), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(("dim", "copies"), [(33, True), (32, False)])
def test_packed_weights_give_the_same_bits_and_are_kept_where_rows_are_not_whole(dim, copies):
    layer = mmbal.MoEMLP(dim, 2 * dim, 4, device="cuda").eval()
    x = torch.randn(50, dim, device="cuda")
    with torch.no_grad():
        plain = layer(x)
        assert (mmbal.pack(layer) > 0) == copies
        assert torch.equal(layer(x), plain)


def test_more_than_2_to_the_31_elements():
    N, E = 2**29 + 5, 4
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    logits = torch.empty(N, E, dtype=torch.bfloat16, device="cuda")
    for piece in logits.split(2**26):
        piece.normal_()
    weights, indices = ops.moe_topk(logits, 1, False)
    for rows in (slice(0, 1000), slice(2**28 - 500, 2**28 + 500), slice(N - 1000, N)):
        expected, chosen = ops.moe_topk(logits[rows].cpu(), 1, False)
        assert torch.equal(indices[rows].cpu(), chosen)
        torch.testing.assert_close(weights[rows].cpu(), expected, rtol=1e-5, atol=0)


def test_gradients_of_more_than_2_to_the_31_elements():
    rows, columns = 2**16 + 1, 2**15
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    grad = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    energy, nonfinite = ops.unit_energy_foreach([grad], [])
    assert not nonfinite and bool((energy == columns).all())
    rho = torch.tensor([0.5], dtype=torch.float64, device="cuda")
    ops.mask_elements_foreach_([grad.view(-1)], [0], [0], rho, 1, 2, "independent")
    kept = (grad != 0).double().mean(1)
    assert bool((kept[[0, 1, rows // 2, -2, -1]] - 0.5).abs().max() < 0.03)
    scale = torch.zeros(rows, dtype=torch.float64, device="cuda")
    scale[-1] = 1
    ops.scale_units_foreach_([grad], [], scale)
    assert not bool(grad[:-1].any()) and bool(grad[-1].any())


def test_a_layer_compiles_in_one_graph():
    def layer(x, router, w1, b1, w2, b2):
        weights, indices = ops.moe_topk(x @ router, 2)
        return ops.expert_mlp(x, w1, b1, w2, b2, weights, *ops.moe_dispatch(indices, 4))

    tensors, _ = experts(20, torch.float32).arguments("cuda")
    arguments = (tensors[0], torch.randn(16, 4, device="cuda"), *tensors[1:5])
    expected = layer(*arguments)
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert all(t.grad is not None for t in tensors[:5])


def test_a_mixture_trains_on_the_gpu():
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(64, 16, generator=generator).cuda() for _ in range(2))
    router = torch.zeros(16, 4, device="cuda", requires_grad=True)
    tensors, _ = experts(64, torch.float32).arguments("cuda")
    parameters = [router, *tensors[1:5]]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    history = []
    for _ in range(30):
        logits = x @ router
        weights, indices = ops.moe_topk(logits, 2)
        y = ops.expert_mlp(x, *tensors[1:5], weights, *ops.moe_dispatch(indices, 4))
        loss = (y - target).square().mean() + 0.01 * ops.load_balance_loss(logits, indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]
