import torch
from case import Case, Random, real

ops = torch.ops.mmbal


def experts(N, dtype, D=16, F=24, E=4, K=2, activation="quick_gelu", dropout=0.0, output_dropout=0.0, only=None):
    random = Random(3)
    indices = random.choices(N, E, K) if only is None else torch.full((N, K), only)
    permutation, offsets, inverse = ops.moe_dispatch(indices, E)
    tensors = [
        random.normal(N, D),
        random.normal(E, F, D) * D**-0.5,
        random.normal(E, F) * 0.3,
        random.normal(E, D, F) * F**-0.5,
        random.normal(E, D) * 0.3,
    ]
    return Case(
        f"expert_mlp {N} x {D} x {F}, {E} experts, {activation}, {dtype}, dropout {dropout} {output_dropout}"
        + ("" if only is None else ", one expert"),
        lambda x, w1, b1, w2, b2, weights, permutation, offsets, inverse: ops.expert_mlp(
            x, w1, b1, w2, b2, weights, permutation, offsets, inverse, activation, dropout, output_dropout, 11, 5
        ),
        [*(t.to(dtype) for t in tensors), random.uniform(N, K, dtype=real(dtype))],
        {"permutation": permutation, "offsets": offsets, "inverse": inverse},
    )


def packed(N, dtype, D=17, F=33, E=3):
    case = experts(N, dtype, D, F, E)

    def call(x, w1, b1, w2, b2, weights, permutation, offsets, inverse):
        routing = (permutation, offsets, inverse)
        panels = ops.expert_mlp_pack(w1, w2)
        with torch.no_grad():
            y, _ = ops.expert_mlp_forward(
                x, w1, b1, w2, b2, weights, *routing, "gelu", 0.0, 0.0, 0, 0, False, packed=panels
            )
        return y

    case.name, case.call, case.inference = f"packed {case.name}", call, True
    return case


def cases(dtype):
    return [
        packed(50, dtype),
        packed(5, dtype, D=16, F=32),
        *(experts(N, dtype) for N in (0, 1, 37, 1000)),
        experts(50, dtype, D=17, F=65, activation="gelu", dropout=0.25, output_dropout=0.1),
        experts(50, dtype, D=16, F=32, activation="silu", dropout=0.25, output_dropout=0.1),
        experts(70, dtype, D=64, F=128, E=6, activation="gelu_tanh"),
        experts(30, dtype, activation="relu"),
        experts(30, dtype, activation="relu2"),
        experts(30, dtype, activation="identity"),
        experts(300, dtype, D=128, F=192, E=8, K=2),
        experts(40, dtype, K=1, only=2),
    ]


def plain(N, dtype):
    return [experts(N, dtype), packed(N, dtype)]


def small():
    return [
        experts(5, torch.float64, D=3, F=4, E=3, activation="gelu"),
        experts(4, torch.float64, D=3, F=6, E=2, dropout=0.3, output_dropout=0.3, activation="silu"),
    ]


def watched(torch_products):
    found = [experts(40, torch.float32, D=17, F=33), experts(40, torch.float32, D=132, F=200)]
    found += [experts(40, torch.bfloat16, D=17, F=33, dropout=0.2), packed(20, torch.bfloat16)]
    for width in (16, 136):  # tensor cores: one tile and several; rows of 16 bytes
        found.append(experts(70, torch.float16, D=width, F=width + 24, only=None if width == 16 else 1))
    if torch_products:
        found += [experts(40, torch.bfloat16), experts(40, torch.bfloat16, dropout=0.2, output_dropout=0.1)]
    return found
