"""Dropout of expert_mlp: its random bits, its statistics, its gradients."""

import math

import pytest
import torch

import mmbal
import oracles

expert_mlp = torch.ops.mmbal.expert_mlp


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, words):
    assert oracles.philox(counter, key).tolist() == words
    assert list(mmbal._core.philox4x32(counter, key)) == words


def revealed_masks(N, K, width, tensor, seed, offset=0, p=0.5):
    """Builds experts whose output is the mask itself: the k-th choice weighs 2**k, so the bits of y are the masks."""
    E = K
    hidden = torch.ones(E, width, dtype=torch.float64)
    identity = torch.eye(width, dtype=torch.float64).expand(E, width, width)
    case = oracles.Case(
        x=torch.zeros(N, width, dtype=torch.float64),
        w1=torch.zeros(E, width, width, dtype=torch.float64),
        b1=hidden if tensor == oracles.HIDDEN else None,
        w2=identity if tensor == oracles.HIDDEN else torch.zeros_like(identity),
        b2=hidden if tensor == oracles.OUTPUT else None,
        weights=(2.0 ** torch.arange(K, dtype=torch.float64)).expand(N, K),
        indices=torch.rand(N, E).argsort(1),
    )
    option = {"dropout": p} if tensor == oracles.HIDDEN else {"output_dropout": p}
    y = expert_mlp(*case.arguments(), activation="identity", seed=seed, offset=offset, **option) * (1 - p)
    bits = y.round().long()
    torch.testing.assert_close(y, bits.double(), rtol=1e-12, atol=1e-12)
    return torch.stack([(bits >> k) & 1 for k in range(K)], 1).bool()  # [N, K, width]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("tensor", [oracles.HIDDEN, oracles.OUTPUT])
@pytest.mark.parametrize(
    ("seed", "offset"),
    [(0, 0), (12345, 7), (5 + (3 << 32), 1), (5, 9 + (0xABCDEF << 32)), (2**63 - 1, 2**56 - 1)],
)
@pytest.mark.parametrize(("N", "K", "width"), [(40, 2, 12), (13, 3, 7)])
def test_the_mask_is_the_one_that_philox_gives_each_element(N, K, width, seed, offset, tensor, p):
    expected = oracles.dropout_mask((N, K, width), p, seed, offset, tensor)
    assert torch.equal(revealed_masks(N, K, width, tensor, seed, offset, p), expected)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_tanh"])
@pytest.mark.parametrize(("p", "q"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_equal_a_loop_with_the_same_masks(dtype, p, q, activation):
    case = oracles.mlp_case(N=31, D=9, F=22, dtype=dtype).requiring_grad()
    exact = case.in_double().requiring_grad()
    hidden = oracles.dropout_mask((31, 2, 22), p, 11, 4, oracles.HIDDEN).double() / (1 - p)
    output = oracles.dropout_mask((31, 2, 9), q, 11, 4, oracles.OUTPUT).double() / (1 - q)
    y = expert_mlp(*case.arguments(), activation=activation, dropout=p, output_dropout=q, seed=11, offset=4)
    expected = exact.reference(activation=activation, hidden_scale=hidden, output_scale=output)
    oracles.assert_near(y, expected, oracles.FORWARD_TOLERANCE[dtype])
    grad_y = torch.randn(31, 9).to(dtype)
    y.backward(grad_y)
    expected.backward(grad_y.double())
    for name, leaf in case.differentiable().items():
        oracles.assert_near(leaf.grad, getattr(exact, name).grad, 3 * oracles.FORWARD_TOLERANCE[dtype], name)


def test_gradient_through_dropout_equals_finite_differences():
    case = oracles.mlp_case(N=5, D=3, F=4).requiring_grad()

    def run(x, w1, b1, w2, b2, weights):
        routing = case.arguments()[6:]
        return expert_mlp(x, w1, b1, w2, b2, weights, *routing, dropout=0.3, output_dropout=0.2, seed=7, offset=1)

    assert torch.autograd.gradcheck(run, list(case.differentiable().values()))


@pytest.mark.parametrize("tensor", [oracles.HIDDEN, oracles.OUTPUT])
def test_the_share_kept_is_one_minus_p_in_every_lane_and_choice(tensor):
    p, kept = 0.3, revealed_masks(2000, 2, 20, tensor, seed=1, p=0.3).double()
    for share in (kept.mean((0, 2)), kept.mean((0, 1)), kept.reshape(-1, 4).mean(0)):
        samples = kept.numel() / share.numel()
        assert ((share - (1 - p)).abs() < 4.5 * math.sqrt(p * (1 - p) / samples)).all()


def test_neighbours_tokens_and_choices_have_independent_masks():
    kept = revealed_masks(4000, 2, 16, oracles.HIDDEN, seed=2).double() - 0.5
    pairs = {
        "lanes": (kept[..., :-1], kept[..., 1:]),
        "tokens": (kept[:-1], kept[1:]),
        "choices": (kept[:, 0], kept[:, 1]),
        "tensors": (kept, revealed_masks(4000, 2, 16, oracles.OUTPUT, seed=2).double() - 0.5),
        "offsets": (kept, revealed_masks(4000, 2, 16, oracles.HIDDEN, seed=2, offset=1).double() - 0.5),
        "seeds": (kept, revealed_masks(4000, 2, 16, oracles.HIDDEN, seed=3).double() - 0.5),
    }
    for name, (a, b) in pairs.items():
        assert abs(4 * (a * b).mean().item()) < 5 / math.sqrt(a.numel()), name


def test_the_same_seed_gives_the_same_result_and_another_seed_or_offset_another():
    case = oracles.mlp_case(N=40)

    def run(seed, offset):
        return expert_mlp(*case.arguments(), dropout=0.5, seed=seed, offset=offset)

    assert torch.equal(run(1, 0), run(1, 0))
    for other in ((2, 0), (1, 1), (1 + 2**32, 0), (1, 2**32)):
        assert not torch.equal(run(1, 0), run(*other)), other


def test_a_token_keeps_its_mask_whatever_the_others_choose():
    case = oracles.mlp_case(N=40)
    before = expert_mlp(*case.arguments(), dropout=0.4, seed=5)
    case.indices[1:] = case.indices[1:].flip(1)
    case.x[1:] += 1
    after = expert_mlp(*case.arguments(), dropout=0.4, seed=5)
    oracles.assert_near(after[:1], before[:1], 1e-14)


def test_dropout_zero_ignores_the_seed():
    case = oracles.mlp_case()
    assert torch.equal(expert_mlp(*case.arguments(), seed=1, offset=2), expert_mlp(*case.arguments()))


def test_the_mean_over_seeds_is_the_result_without_dropout_for_a_linear_expert():
    case = oracles.mlp_case(N=3, D=4, F=6)
    plain = expert_mlp(*case.arguments(), activation="identity")
    options = {"activation": "identity", "dropout": 0.2, "output_dropout": 0.1}
    runs = torch.stack([expert_mlp(*case.arguments(), **options, seed=s) for s in range(500)])
    standard_error = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - plain).abs() < 5 * standard_error + 1e-12).all()


@pytest.mark.parametrize("threads", [1, 5])
def test_masks_do_not_depend_on_the_number_of_threads(threads):
    torch.set_num_threads(threads)
    expected = oracles.dropout_mask((600, 2, 48), 0.5, 9, 0, oracles.HIDDEN)
    assert torch.equal(revealed_masks(600, 2, 48, oracles.HIDDEN, seed=9), expected)
