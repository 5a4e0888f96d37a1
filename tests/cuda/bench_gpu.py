"""Times on a GPU: mmbal against torch: its grouped product, a loop over experts, torch.compile. Prints Markdown tables.

A turn is one call of each contender, timed by the device's events; the median of the turns is given. The contenders of
a mixture share inputs, weights and routing; all give the same result, which is checked first.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "torch_ext"))

import mmbal  # noqa: F401

ops = torch.ops.mmbal
TURNS = 15
START = time.monotonic()
LIMIT = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0


def time_left():
    return LIMIT - (time.monotonic() - START)


def milliseconds(contenders, turns=TURNS):
    """name -> median of the device's time; turns interleaved, after two that are not counted."""
    times = {name: [] for name in contenders}
    for turn in range(turns + 2):
        for name, call in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(5_000_000)  # the queue is full when the first kernel starts: host time stays out
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def quick_gelu(u):
    return u * torch.sigmoid(1.702 * u)


def with_grouped_mm(x, w1, b1, w2, b2, weights, indices):
    """How a mixture is written in plain torch without waiting for the device."""
    E, K = w1.shape[0], indices.shape[1]
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=E).cumsum(0).int()
    expert, token = flat[order], order // K
    h = torch._grouped_mm(x[token], w1.transpose(1, 2), offs=ends) + b1[expert]
    o = torch._grouped_mm(quick_gelu(h), w2.transpose(1, 2), offs=ends) + b2[expert]
    o = o * weights.flatten()[order, None].to(o.dtype)
    return torch.zeros_like(x).index_add(0, token, o)


def with_loop(x, w1, b1, w2, b2, weights, indices):
    y = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, k = torch.where(indices == e)
        a = quick_gelu(F.linear(x[token], w1[e], b1[e]))
        y = y.index_add(0, token, F.linear(a, w2[e], b2[e]) * weights[token, k, None].to(x.dtype))
    return y


def with_mmbal(x, w1, b1, w2, b2, weights, indices):
    return ops.expert_mlp(x, w1, b1, w2, b2, weights, *ops.moe_dispatch(indices, w1.shape[0]))


def dense(x, w1, b1, w2, b2, weights, indices):
    """The yardstick: one expert on as many rows."""
    rows = x.repeat(indices.shape[1], 1)
    return F.linear(quick_gelu(F.linear(rows, w1[0], b1[0])), w2[0], b2[0])


def mixture(D, Fh, N, E, K, dtype, contenders):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape, scale=1.0):
        t = torch.randn(*shape, generator=generator, device="cuda") * scale
        return t.to(dtype).requires_grad_()

    x, w1, b1 = random(N, D), random(E, Fh, D, scale=D**-0.5), random(E, Fh, scale=0.1)
    w2, b2 = random(E, D, Fh, scale=Fh**-0.5), random(E, D, scale=0.1)
    weights, indices = ops.moe_topk(torch.randn(N, E, generator=generator, device="cuda"), K)
    weights = weights.detach().requires_grad_()
    inputs = (x, w1, b1, w2, b2, weights)
    dy = torch.randn(N, D, generator=generator, device="cuda").to(dtype)
    forward, both, failed = {}, {}, {}
    expected = None
    for name, function in contenders.items():
        try:
            y = function(*inputs, indices)
            torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)
        except Exception as error:  # a contender that cannot run is said, not hidden
            failed[name] = str(error).splitlines()[0][:90]
            continue
        if name != "dense":
            expected = y if expected is None else expected
            off = ((y - expected).float().norm() / expected.float().norm()).item()
            if off > 2e-2:
                failed[name] = f"gives another result: {off:.1e} off"
        up = dy if y.shape == dy.shape else dy.repeat(K, 1)

        def run_forward(function=function):
            with torch.no_grad():
                function(*inputs, indices)

        def run_both(function=function, up=up):
            torch.autograd.grad(function(*inputs, indices), inputs, up, allow_unused=True)

        forward[name], both[name] = run_forward, run_both
    flop = 2 * 2 * N * K * D * Fh
    for what, calls, factor in (("forward", forward, 1), ("forward + backward", both, 3)):
        times = milliseconds(calls)
        if what == "forward":
            print(f"Mixture {D} x {Fh}, N = {N}, E = {E}, K = {K}, {str(dtype).removeprefix('torch.')}:\n")
            print(f"| | {' | '.join(times)} | mmbal's TFLOP/s |\n|---|{'---|' * len(times)}---|")
        table = [
            f"{t:.3f} ms, {t / times['mmbal']:.2f}" if name != "mmbal" else f"{t:.3f} ms" for name, t in times.items()
        ]
        print(f"| {what} | {' | '.join(table)} | {factor * flop / times['mmbal'] / 1e9:.0f} |")
    for name, why in failed.items():
        print(f"\n{name}: {why}")
    print(flush=True)


def small(title, contenders):
    times = milliseconds(contenders)
    mine, theirs = times["mmbal"], times["torch"]
    print(f"| {title} | {1000 * mine:.0f} us | {1000 * theirs:.0f} us | {theirs / mine:.1f} |", flush=True)


def torch_routing(logits, K):
    values, indices = logits.topk(K)
    return torch.softmax(values, 1), indices


def torch_dispatch(indices, E):
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return order, torch.bincount(flat, minlength=E).cumsum(0), inverse


def torch_balance(logits, indices):
    E = logits.shape[1]
    share = F.one_hot(indices, E).sum((0, 1)) / logits.shape[0]
    return E * (share * torch.softmax(logits, 1).mean(0)).sum()


def gradient(function, logits):
    return lambda: torch.autograd.grad(function(), logits)


def routers(N, E):
    logits = torch.randn(N, E, device="cuda", requires_grad=True)
    indices = ops.moe_topk(logits, 2)[1]
    with torch.no_grad():
        small(
            f"moe_topk {N} x {E}", {"mmbal": lambda: ops.moe_topk(logits, 2), "torch": lambda: torch_routing(logits, 2)}
        )
        small(
            f"moe_dispatch {N} x 2 of {E}",
            {"mmbal": lambda: ops.moe_dispatch(indices, E), "torch": lambda: torch_dispatch(indices, E)},
        )
    small(
        f"load_balance_loss and gradient {N} x {E}",
        {
            "mmbal": gradient(lambda: ops.load_balance_loss(logits, indices), logits),
            "torch": gradient(lambda: torch_balance(logits, indices), logits),
        },
    )
    small(
        f"router_z_loss and gradient {N} x {E}",
        {
            "mmbal": gradient(lambda: ops.router_z_loss(logits), logits),
            "torch": gradient(lambda: torch.logsumexp(logits, 1).square().mean(), logits),
        },
    )


def divergences_and_weights(N, M, C):
    logits = torch.randn(M, N, C, device="cuda", requires_grad=True)
    fused = torch.randn(N, C, device="cuda")

    def torch_categorical():
        p = torch.log_softmax(logits, -1)
        return (p.exp() * (p - torch.log_softmax(fused, -1))).sum(-1).T

    def total(function):
        return lambda: torch.autograd.grad(function().sum(), logits)

    small(
        f"categorical_kl and gradient {M} x {N} x {C}",
        {"mmbal": total(lambda: ops.categorical_kl(logits, fused)), "torch": total(torch_categorical)},
    )
    weights = torch.rand(N, M, device="cuda")
    embeddings = [torch.randn(N, 512, device="cuda") for _ in range(M)]
    with torch.no_grad():
        small(
            f"scale_modalities {M} of {N} x 512",
            {
                "mmbal": lambda: ops.scale_modalities(embeddings, weights),
                "torch": lambda: [e * weights[:, m, None] for m, e in enumerate(embeddings)],
            },
        )


def masked_units(S, N):
    """Segments as those of a layer's filters or heads."""
    energy, rho = torch.rand(S * N, device="cuda", dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64).cuda()
    segments, k = [S, N, 0, 1], -(-3 * N // 10)

    def torch_draw():
        drawn = torch.multinomial(energy.view(S, N), k)
        return torch.zeros(S, N, device="cuda", dtype=torch.float64).scatter_(1, drawn, 1.0)

    for sampler, unbiased in (("bottomk", False), ("systematic", True)):
        small(
            f"mask_units {S} x {N}, {sampler} (torch: multinomial)",
            {
                "mmbal": lambda s=sampler, u=unbiased: ops.mask_units(energy, segments, rho, 1, 2, s, 0.5, u),
                "torch": torch_draw,
            },
        )


def masked_elements(T, N, dtype):
    """Of every tensor the part rho. torch: the smallest keys by kthvalue; one round where a level takes several."""
    grads = [torch.randn(N, device="cuda").to(dtype) for _ in range(T)]
    out, rho = [g.clone() for g in grads], torch.tensor([0.3], dtype=torch.float64).cuda()
    zeros, ids, k = [0] * T, list(range(T)), -(-3 * N // 10)

    def torch_smallest():
        for g, to in zip(grads, out, strict=True):
            keys = torch.empty_like(g, dtype=torch.float32).exponential_().div_(g.float().square())
            to.mul_(keys <= keys.kthvalue(k).values)

    def torch_independent():
        for g, to in zip(grads, out, strict=True):
            share = g.float().square()
            p = (0.3 * (0.5 + 0.5 * N * share / share.sum())).clamp(max=1)
            to.mul_((torch.rand_like(p) < p) / p)

    for sampler, unbiased, theirs in (("bottomk", False, torch_smallest), ("independent", True, torch_independent)):
        small(
            f"mask_elements_foreach_ {T} x {N}, {sampler}, {str(dtype).removeprefix('torch.')}",
            {
                "mmbal": lambda s=sampler, u=unbiased: ops.mask_elements_foreach_(
                    out, zeros, ids, rho, 1, 2, s, 0.5, u, gradients=grads
                ),
                "torch": theirs,
            },
        )


def masks_of_units(layers, width):
    """What AMSS does to the gradients of as many layers."""
    grads = [torch.randn(width, width, device="cuda") for _ in range(layers)]
    scale = torch.rand(layers * width, device="cuda", dtype=torch.float64).round()
    pieces = [s[:, None].float() for s in scale.split(width)]
    shape = f"{layers} of {width} x {width}"
    small(
        f"unit_energy_foreach {shape}",
        {
            "mmbal": lambda: ops.unit_energy_foreach(grads, []),
            "torch": lambda: [g.square().sum(1) for g in grads],
        },
    )
    small(
        f"scale_units_foreach_ {shape}",
        {
            "mmbal": lambda: ops.scale_units_foreach_(grads, [], scale),
            "torch": lambda: torch._foreach_mul_(grads, pieces),
        },
    )


def torch_statistics(logits, features, targets):
    ce = [F.cross_entropy(o, targets, reduction="sum") for o in logits]
    entropy = [torch.special.entr(torch.softmax(z, 1)).sum() for z in features]
    return *ce, *entropy, torch.bincount(targets, minlength=logits[0].shape[1])


def statistics_of_modalities(N, M, C, D):
    logits = [torch.randn(N, C, device="cuda") for _ in range(M)]
    features = [torch.randn(N, D, device="cuda") for _ in range(M)]
    targets = torch.randint(C, (N,), device="cuda")
    small(
        f"modal_stats {M} of {N} x {C}, {D}",
        {
            "mmbal": lambda: ops.modal_stats(logits, features, targets),
            "torch": lambda: torch_statistics(logits, features, targets),
        },
    )


def torch_ksg(x, y, k=3):
    """All distances: no memory for many samples."""
    found, constant = [], float(torch.digamma(torch.tensor([len(y), k], dtype=torch.float64)).sum())
    dy = (y[:, None] - y).abs()
    for column in x.T:
        dx = (column[:, None] - column).abs()
        eps = torch.maximum(dx, dy).topk(k + 1, largest=False).values[:, -1:]
        inside = torch.digamma((dx < eps).sum(1).double()) + torch.digamma((dy < eps).sum(1).double())
        found.append(constant - inside.mean())
    return torch.stack(found)


def torch_discrete(a, b, C):
    found = []
    for of_m in a:
        p = torch.bincount(of_m * C + b, minlength=C * C).view(C, C).double() / b.numel()
        found.append(
            torch.special.entr(p.sum(0)).sum() + torch.special.entr(p.sum(1)).sum() - torch.special.entr(p).sum()
        )
    return torch.stack(found)


def mutual_information(N, M, C, few=8192):
    x = torch.randn(N, M, device="cuda", dtype=torch.float64)
    y = x[:, 0] + torch.randn(N, device="cuda", dtype=torch.float64)
    small(
        f"ksg_mutual_info {few} x {M}",
        {
            "mmbal": lambda: ops.ksg_mutual_info(x[:few], y[:few], None, 3, False),
            "torch": lambda: torch_ksg(x[:few], y[:few]),
        },
    )
    alone = milliseconds({"mmbal": lambda: ops.ksg_mutual_info(x, y)})["mmbal"]
    print(f"| ksg_mutual_info {N} x {M} | {1000 * alone:.0f} us | no memory for all distances | |", flush=True)
    a, b = torch.randint(C, (M, N), device="cuda"), torch.randint(C, (N,), device="cuda")
    small(
        f"discrete_mutual_info {M} x {N} of {C}",
        {"mmbal": lambda: ops.discrete_mutual_info(a, b, None, C), "torch": lambda: torch_discrete(a, b, C)},
    )


def torch_attributions(grads, embeddings, asked):
    a = torch.stack([(g * e).norm(dim=1) for g, e in zip(grads, embeddings, strict=True)], 1)
    return (a / a.sum(1, keepdim=True) - asked).abs().sum(1)


def torch_log_odds(head, embeddings):
    z = head(torch.cat(embeddings, 1))
    top = z.argmax(1, keepdim=True)
    return z.gather(1, top).sum() - z.scatter(1, top, float("-inf")).logsumexp(1).sum()


def attributions(B, D, C):
    embeddings = [torch.randn(B, D, device="cuda", requires_grad=True) for _ in range(2)]
    grads = [torch.randn(B, D, device="cuda", requires_grad=True) for _ in range(2)]
    asked = torch.full((2,), 0.5, device="cuda", dtype=torch.float64)

    def of_gradients(function):
        return lambda: torch.autograd.grad(function().sum(), grads)

    plain = torch_attributions
    small(
        f"attribution_reg and gradient 2 of {B} x {D}",
        {
            "mmbal": of_gradients(lambda: ops.attribution_reg(grads, embeddings, asked)[0]),
            "torch": of_gradients(lambda: plain(grads, embeddings, asked.float())),
        },
    )
    head = torch.nn.Linear(2 * D, C, device="cuda")
    with torch.no_grad():
        logits, weight = head(torch.cat(embeddings, 1)), head.weight.detach()
        fixed, dreg = [e.detach() for e in embeddings], torch.full((B,), 1 / B, device="cuda")

    def twice():
        g = torch.autograd.grad(torch_log_odds(head, embeddings), embeddings, create_graph=True)
        return torch.autograd.grad(plain(g, embeddings, asked.float()).mean(), list(head.parameters()))

    small(
        f"attribution_linear 2 of {B} x {D}, {C} classes",
        {"mmbal": lambda: ops.attribution_linear(fixed, [weight], logits, asked, dreg), "torch": twice},
    )


def torch_align(pred, target, source, candidates):
    logits = F.normalize(source, dim=1) @ F.normalize(candidates, dim=1).T / 0.03
    labels = torch.arange(len(source), device="cuda")
    contrastive = (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2
    return 0.5 * F.smooth_l1_loss(pred, target) + 0.5 * contrastive


def alignments(B, C, dtype):
    tensors = [torch.randn(B, C, device="cuda", dtype=dtype, requires_grad=True) for _ in range(4)]
    compiled = torch.compile(torch_align) if time_left() > 40 else torch_align

    def both(function):
        return lambda: torch.autograd.grad(function(*tensors), tensors)

    name = f"{B} x {C}, {str(dtype).removeprefix('torch.')}"
    ours = {"mmbal": both(lambda *t: ops.align_loss(*t)[0])}
    small(f"align_loss and gradient {name}", {**ours, "torch": both(torch_align)})
    if compiled is not torch_align:
        small(f"the same, torch.compile {name}", {**ours, "torch": both(compiled)})


def searches(Q, n, D, k, dtype):
    query, bank = (torch.randn(rows, D, device="cuda", dtype=dtype) for rows in (Q, n))
    with torch.no_grad():
        small(
            f"topk_search {Q} in {n} x {D}, k = {k}, {str(dtype).removeprefix('torch.')}",
            {"mmbal": lambda: ops.topk_search(query, bank, k), "torch": lambda: (query @ bank.T).topk(k)},
        )


FAILED = []


def run(measure, *arguments):
    """What fails is said in its place, and at the end by the exit status; the rest is measured."""
    try:
        measure(*arguments)
    except Exception as error:
        FAILED.append(measure.__name__)
        print(f"| {measure.__name__}{arguments} failed: {str(error).splitlines()[0][:200]} | | | |", flush=True)


print(torch.cuda.get_device_name(), "torch", torch.__version__, "- TF32 off for float32")
print("In a mixture's columns: milliseconds, and how many times mmbal's time that is.\n")
print("| operator | mmbal | torch | torch / mmbal |\n|---|---|---|---|")
for N in (8192, 131072):
    run(routers, N, 8)
run(divergences_and_weights, 8192, 3, 100)
for S, N in ((100, 768), (1000, 64)):
    run(masked_units, S, N)
run(masked_elements, 24, 2**20, torch.float32)
run(masked_elements, 1, 2**25, torch.bfloat16)
run(masks_of_units, 60, 1024)
run(statistics_of_modalities, 4096, 3, 1000, 512)
run(mutual_information, 256_000, 3, 100)
for B, D, C in ((64, 512, 6), (1024, 768, 309), (4096, 2048, 1000)):
    run(attributions, B, D, C)
for B, dtype in ((256, torch.float32), (4096, torch.float32), (8192, torch.bfloat16)):
    run(alignments, B, 512, dtype)
for Q, n in ((1, 1_000_000), (16, 1_000_000), (1000, 5000), (1000, 100_000)):
    run(searches, Q, n, 512, 10, torch.float32)
run(searches, 1, 1_000_000, 512, 10, torch.bfloat16)
print(flush=True)
plain = {"mmbal": with_mmbal, "torch grouped_mm": with_grouped_mm, "torch loop over experts": with_loop, "dense": dense}
run(mixture, 768, 3072, 8192, 4, 2, torch.bfloat16, plain)
run(mixture, 768, 3072, 8192, 4, 2, torch.float32, plain)
run(mixture, 1024, 4096, 16384, 8, 2, torch.bfloat16, plain)
run(mixture, 768, 3072, 8192, 4, 2, torch.float16, plain)
if time_left() > 25:
    compiled = {**plain, "torch.compile of grouped_mm": torch.compile(with_grouped_mm)}
    run(mixture, 768, 3072, 8192, 4, 2, torch.bfloat16, compiled)
else:
    print("torch.compile: not run, no time left")
sys.exit(bool(FAILED))
