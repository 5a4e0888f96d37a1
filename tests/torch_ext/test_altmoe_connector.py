"""MoEConnector: the equations of arXiv 2409.05929 (its code and its text), their identities, masks and gradients."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import mmbal
from mmbal import MoEConnector
from mmbal.altmoe.parts import masked_mean
from oracles import assert_near

DIMS = {"image": 5, "text": 7, "audio": 3}


def make(dims=None, dtype=torch.float64, train=False, **options):
    options = {"hidden": 8, "ffn": 6, "num_experts": 5, "top_k": 2, "dropout": 0.0} | options
    connector = MoEConnector(dims or DIMS, dtype=dtype, **options)
    with torch.no_grad():
        for p in connector.parameters():  # norms and biases too: a forgotten one must show
            p += 0.3 * torch.randn_like(p)
    return connector.train(train)


def exact_gelu(u):
    return 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))


def oracle(c, x, src, tgt, mask=None):
    """Every item, token, branch and expert in loops, in float64, from section 1.3 of the paper's description."""
    sources = (src,) if isinstance(src, str) else src
    x = x if isinstance(x, dict) else {src: x}
    mask = mask if isinstance(mask, dict) else {sources[0]: mask}
    head = c.heads[f"{'+'.join(sources)}->{tgt}"]
    e, code = c.experts, c.preset == "code"
    order = list(c.modalities)
    regs, cls = [], []
    for b in range(len(next(iter(x.values())))):
        outs = {"reg": [], "cl": []}
        for name in sources:
            port, tokens = c.modalities[name], x[name][b].double()
            kept = [t for t in range(len(tokens)) if mask.get(name) is None or mask[name][b, t]]
            if c.pool == "before" and kept:
                tokens, kept = tokens[kept].mean(0, keepdim=True), [0]
            for t in kept:
                shifted = tokens[t] + (head.embedding[name] if code else 0)
                h0 = exact_gelu(port.source.weight @ shifted + port.source.bias)
                for i, branch in enumerate(("reg", "cl")):
                    h = h0 if c.branch_embedding is None else h0 + c.branch_embedding[i]
                    shared = c.gates == "shared"
                    w = c.gate["weight"] if shared else c.gate["weight"][i]
                    own = c.gate["bias"] if code else port.gate_bias
                    bias = own if code and shared else own[i]
                    pi = torch.softmax(w @ h + bias, 0)
                    best = sorted(range(len(pi)), key=lambda n: (-pi[n].item(), n))[: c.top_k]
                    first = order.index(name) * c.num_experts if c.expert_scope == "per_modality" else 0
                    scale = sum(pi[n] for n in best) if c.renorm else 1
                    y = sum(
                        pi[n]
                        / scale
                        * (e.w2[first + n] @ exact_gelu(e.w1[first + n] @ h + e.b1[first + n]) + e.b2[first + n])
                        for n in best
                    )
                    norm = c.norms[branch]
                    standard = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 1e-5)
                    outs[branch].append(exact_gelu(standard * norm.weight + norm.bias) + h)
        if outs["reg"]:
            regs.append(torch.stack([head.reg.weight @ o + head.reg.bias for o in outs["reg"]]).mean(0))
            cls.append(torch.stack([head.cl.weight @ o + head.cl.bias for o in outs["cl"]]).mean(0))
        else:
            regs.append(torch.zeros_like(head.reg.bias))
            cls.append(torch.zeros_like(head.cl.bias))
    return torch.stack(regs), torch.stack(cls)


FORMS = {
    "code": {},
    "v6": {"preset": "v6"},
    "code, gate per branch": {"gates": "per_branch"},
    "v6, shared gate": {"preset": "v6", "gates": "shared"},
    "renormalised": {"renorm": True},
    "experts per modality": {"expert_scope": "per_modality"},
    "pooled first": {"pool": "before"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "all experts": {"top_k": 5},
    "other widths": {"cl_dim": 4, "ffn": 11},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_it_computes_the_equations(form, masked):
    c, x = make(**FORMS[form]), torch.randn(6, 4, 7, dtype=torch.float64)
    mask = (torch.rand(6, 4) > 0.4) if masked else None
    if masked:
        mask[2] = False
    out = c(x, "text", "image", mask)
    for found, expected in zip(out[:2], oracle(c, x, "text", "image", mask), strict=True):
        assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("form", ["code", "v6", "experts per modality", "pooled first"])
def test_several_sources_are_projected_each_by_its_own_and_put_side_by_side(form):
    c = make(**FORMS[form], directions=[(("image", "audio"), "text"), ("text", "image")])
    x = {"image": torch.randn(4, 3, 5, dtype=torch.float64), "audio": torch.randn(4, 2, 3, dtype=torch.float64)}
    mask = {"audio": torch.tensor([[True, True], [True, False], [False, False], [True, True]])}
    for given in (None, mask):
        out = c(x, ("image", "audio"), "text", given)
        for found, expected in zip(out[:2], oracle(c, x, ("image", "audio"), "text", given or {}), strict=True):
            assert_near(found, expected, 1e-12)


def test_targets_are_means_and_projections_of_them():
    c, y = make(), torch.randn(6, 4, 7, dtype=torch.float64)
    mask = torch.rand(6, 4) > 0.5
    mask[1], mask[2] = False, True
    projection = c.modalities["text"].target
    assert_near(c.target(y, "text").reg, y.mean(1), 1e-14)
    assert_near(c.target(y, "text").cl, torch.stack([projection(tokens) for tokens in y.unbind(1)]).mean(0), 1e-12)
    masked = c.target(y, "text", mask)
    for b in range(6):
        tokens = y[b][mask[b]]
        expected = tokens.mean(0) if len(tokens) else torch.zeros(7, dtype=torch.float64)
        torch.testing.assert_close(masked.reg[b], expected, rtol=1e-12, atol=1e-14)
        assert masked.valid[b] == (len(tokens) > 0)
    assert (masked.cl[1] == 0).all()
    pooled = c.target(y.mean(1), "text")  # identity: one pooled vector an item is all that a target needs
    assert_near(pooled.cl, c.target(y, "text").cl, 1e-12)


# --- The published configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 140_617_740),
        ({"num_experts": 24}, 241_354_776),
        ({"expert_scope": "per_modality"}, 241_330_188),  # 24 experts, a gate of 12 rows
        # the text: two gates, a bias for each modality and branch, no embeddings
        ({"preset": "v6"}, 140_617_740 - 9_216 - 12 + 2048 * 12 + 2 * 2 * 12),
    ],
)
def test_parameters_of_the_published_configuration(options, count):
    connector = MoEConnector.published(device="meta", **options)
    assert sum(p.numel() for p in connector.parameters()) == count
    out = connector(torch.empty(3, 9, 1024, device="meta"), "image", "text")
    assert out.reg.shape == (3, 4096) and out.cl.shape == (3, 2048) and out.cl.device.type == "meta"


def test_weights_start_as_published_ones():
    c = MoEConnector({"image": 50, "text": 40}, hidden=60, ffn=30)
    for name, p in c.named_parameters():
        if "norms" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight"))))
        elif name.endswith(("bias", "b1", "b2")):
            assert not p.any()
        else:
            bound = math.sqrt(6 / p.shape[-1])
            assert 0.9 * bound < p.abs().max() <= bound, name


# --- Identities (section 1.4 of the description) ----------------------------------------------------------------------


def test_renormalised_weights_change_almost_nothing():
    """The LayerNorm takes a factor of a token out."""
    c = MoEConnector(DIMS, hidden=64, num_experts=8, top_k=3, dropout=0.0, dtype=torch.float64)
    x = torch.randn(20, 5, dtype=torch.float64)
    plain = c(x, "image", "text")
    c.renorm = True
    for a, b in zip(plain[:2], c(x, "image", "text")[:2], strict=True):
        assert 0 < (a - b).abs().max() < 1e-3 * b.abs().max()


def test_a_constant_beside_the_gates_input_is_a_bias():
    """The paper concatenates a vector e_m of the modality to the gate's input: W [h, e_m] = W_1 h + (W_2 e_m)."""
    c, x = make(preset="v6", num_experts=4, top_k=2), torch.randn(6, 3, 5, dtype=torch.float64)
    beside, embedding = torch.randn(2, 4, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    with torch.no_grad():
        c.modalities["image"].gate_bias.copy_(beside @ embedding)
    h0 = F.gelu(c.modalities["image"].source(x)).reshape(-1, 8)
    for i, record in enumerate(c(x, "image", "text").stats):
        whole = torch.cat([h0, embedding.expand(len(h0), 9)], 1)
        assert_near(record.logits, whole @ torch.cat([c.gate["weight"][i], beside[i]], 1).T, 1e-12)


def test_the_embedding_of_the_direction_folds_into_the_bias():
    c, x = make(), torch.randn(6, 3, 5, dtype=torch.float64)
    expected = c(x, "image", "text")
    folded = copy.deepcopy(c)
    source, embedding = folded.modalities["image"].source, folded.heads["image->text"].embedding["image"]
    with torch.no_grad():
        source.bias += source.weight @ embedding
        embedding.zero_()
    assert_near(folded(x, "image", "text").reg, expected.reg, 1e-12)


def test_the_gates_gradient_is_that_of_a_softmax_over_all_cut_to_the_top():
    """dlogit_m = pi_m (1[m in S] a_m - sum over S of pi_n a_n), a_n = <dy, E_n(h)>; experts outside S get one too."""
    c, x = make(), torch.randn(5, 2, 5, dtype=torch.float64)
    seen = {}
    handle = c.norms["reg"].register_forward_hook(lambda _, given, __: seen.update(y=given[0]))
    out = c(x, "image", "text")
    handle.remove()
    record = out.stats[0]
    dweight, dy = torch.autograd.grad(out.reg.square().sum(), [c.gate["weight"], seen["y"]])
    shifted = x + c.heads["image->text"].embedding["image"]
    h = (F.gelu(c.modalities["image"].source(shifted)) + c.branch_embedding[0]).reshape(10, 8)
    e, pi = c.experts, record.logits.softmax(1)
    dlogits = []
    for r in range(10):
        chosen = record.indices[r].tolist()
        a = {n: dy[r] @ (e.w2[n] @ F.gelu(e.w1[n] @ h[r] + e.b1[n]) + e.b2[n]) for n in chosen}
        mean = sum(pi[r, n] * a[n] for n in chosen)
        dlogits.append(torch.stack([pi[r, m] * (a.get(m, 0) - mean) for m in range(5)]))
    assert_near(dweight, torch.stack(dlogits).T @ h, 1e-10)


def test_experts_in_another_order_with_their_gate_rows_give_the_same():
    c, x = make(), torch.randn(6, 3, 5, dtype=torch.float64)
    other, order = copy.deepcopy(c), torch.randperm(5)
    with torch.no_grad():
        for p in (*other.experts.parameters(), other.gate["weight"], other.gate["bias"]):
            p.copy_(p[order])
    for a, b in zip(c(x, "image", "text")[:2], other(x, "image", "text")[:2], strict=True):
        assert_near(b, a, 1e-12)


def test_all_experts_are_a_dense_softmax_mixture():
    c, x = make(top_k=5), torch.randn(6, 7, dtype=torch.float64)
    e, head = c.experts, c.heads["text->audio"]
    h = F.gelu(c.modalities["text"].source(x + head.embedding["text"])) + c.branch_embedding[1]
    each = torch.stack([F.gelu(h @ e.w1[n].T + e.b1[n]) @ e.w2[n].T + e.b2[n] for n in range(5)], 1)
    pi = torch.softmax(h @ c.gate["weight"].T + c.gate["bias"], 1)
    y = (pi.unsqueeze(2) * each).sum(1)
    assert_near(c(x, "text", "audio").cl, head.cl(F.gelu(c.norms["cl"](y)) + h), 1e-12)


# --- Masks, vectors, classes ------------------------------------------------------------------------------------------


def test_vectors_are_items_of_one_token():
    c, x = make(), torch.randn(6, 5, dtype=torch.float64)
    assert torch.equal(c(x, "image", "text").reg, c(x.unsqueeze(1), "image", "text").reg)


def test_a_mask_that_keeps_all_is_no_mask_and_what_it_leaves_out_may_be_nan():
    c, x = make(), torch.randn(6, 4, 5, dtype=torch.float64)
    assert_near(c(x, "image", "text", torch.ones(6, 4, dtype=torch.bool)).cl, c(x, "image", "text").cl, 1e-12)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 2:] = False
    short = c(x[:, :2], "image", "text")
    x[:, 2:] = torch.nan
    out = c(x, "image", "text", mask)
    assert_near(out.cl, short.cl, 1e-12)
    (out.cl.sum() + out.reg.sum() + c.target(x, "image", mask).cl.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in c.parameters())


def test_items_without_a_token_are_zero_and_not_valid():
    c, x = make(), torch.randn(3, 4, 5, dtype=torch.float64)
    whole = torch.tensor([True, False, True])
    out = c(x, "image", "text", whole)
    assert out.valid.tolist() == [True, False, True]
    assert (out.reg[1] == 0).all() and (out.cl[1] == 0).all()
    assert_near(out.reg[whole], c(x[whole], "image", "text").reg, 1e-12)


def test_no_rows_give_no_rows_and_zero_gradients():
    c = make(train=True)
    out = c(torch.empty(0, 4, 5, dtype=torch.float64), "image", "text")
    assert out.reg.shape == (0, 7) and out.cl.shape == (0, 8)
    out.reg.sum().backward()
    assert not c.experts.w1.grad.any()


@pytest.mark.parametrize("pool", ["after", "before"])
def test_integers_are_one_hot_vectors(pool):
    c = make({"image": 5, "label": 4}, pool=pool)
    for classes in (torch.tensor([3, 0, 1]), torch.tensor([[3, 1], [0, 0], [2, 1]])):
        one_hot = F.one_hot(classes, 4).double()
        assert_near(c(classes, "label", "image").reg, c(one_hot, "label", "image").reg, 1e-12)
        for a, b in zip(c.target(classes, "label")[:2], c.target(one_hot, "label")[:2], strict=True):
            assert_near(a, b, 1e-12)
    masked, there = torch.tensor([[3, -1], [0, 2]]), torch.tensor([[True, False], [True, True]])
    assert_near(c(masked, "label", "image", there).cl[:1], c(masked[:1, :1], "label", "image").cl, 1e-12)


def test_results_are_the_same_at_any_number_of_threads(at_each_thread_count):
    c, x = make(dtype=torch.float32, hidden=64, train=True), torch.randn(40, 6, 5)

    def run():
        out = c(x, "image", "text")
        loss = out.reg.square().sum() + out.cl.square().sum()
        return [out.reg, out.cl, *torch.autograd.grad(loss, c.experts.parameters())]

    at_each_thread_count(run)


def test_bfloat16_weights_and_autocast_stay_near_float32():
    c, x = make(dtype=torch.float32, hidden=32), torch.randn(10, 3, 5)
    expected = c(x, "image", "text")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = c(x, "image", "text")
    assert mixed.stats[0].logits.dtype == torch.float32
    half = copy.deepcopy(c).bfloat16()(x.bfloat16(), "image", "text")
    for out in (mixed, half):
        assert F.cosine_similarity(out.cl.double(), expected.cl.double(), 1).min() > 0.99


# --- Training ---------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences():
    c = make({"image": 3, "text": 2}, hidden=4, ffn=3, num_experts=3, top_k=3, train=True)
    x, y = (torch.randn(3, 2, dim, dtype=torch.float64, requires_grad=True) for dim in (3, 2))
    parameters = dict(c.named_parameters())

    def run(x, y, *values):
        given = dict(zip(parameters, values, strict=True))
        out = torch.func.functional_call(c, given, (x, "image", "text"))
        return out.reg, out.cl

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(run, (x, y, *values))


def test_only_what_the_direction_uses_gets_gradients():
    c = make(train=True)
    out = c(torch.randn(4, 5, dtype=torch.float64), "image", "text")
    target = c.target(torch.randn(4, 7, dtype=torch.float64), "text")
    (out.reg.sum() + out.cl.sum() + target.cl.sum()).backward()
    shared = ("gate", "experts", "norms", "branch_embedding")
    own = ("modalities.image.source", "modalities.text.target", "heads.image->text")
    for name, p in c.named_parameters():
        assert (p.grad is not None) == name.startswith((*shared, *own)), name


def test_a_target_is_detached_unless_asked():
    c, y = make(train=True), torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    target = c.target(y, "text")
    assert not target.reg.requires_grad
    target.cl.sum().backward()
    assert y.grad is None and c.modalities["text"].target.weight.grad is not None
    x = torch.randn(4, 5, dtype=torch.float64)
    out, target = c(x, "image", "text"), c.target(y, "text", detach=False)
    towards, back = torch.autograd.grad(F.smooth_l1_loss(out.reg, target.reg), [out.reg, y])
    assert_near(back, -towards, 1e-12)


def test_dropout_is_for_training_follows_the_generator_and_is_right_on_average():
    c, x = make(dropout=0.5, train=True), torch.randn(4, 5, dtype=torch.float64)
    torch.manual_seed(3)
    first = c(x, "image", "text").cl
    assert not torch.equal(c(x, "image", "text").cl, first)
    torch.manual_seed(3)
    assert torch.equal(c(x, "image", "text").cl, first)
    assert torch.equal(c.eval()(x, "image", "text").cl, c(x, "image", "text").cl)


@pytest.mark.parametrize(("backend", "dropout"), [("aot_eager", 0.0), ("aot_eager", 0.1), ("inductor", 0.0)])
def test_it_compiles_in_one_graph_with_gradients(backend, dropout):
    c, x = make(dtype=torch.float32, train=True, dropout=dropout), torch.randn(4, 3, 5)
    mask = torch.rand(4, 3) > 0.3
    compiled = torch.compile(c, fullgraph=True, backend=backend)
    results = []
    for run in (c, compiled):
        torch.manual_seed(3)
        out, target = run(x, "image", "text", mask), c.target(torch.ones(4, 7), "text")
        loss = out.reg.square().sum() + (out.cl * target.cl).sum()
        used = [p for name, p in c.named_parameters() if name.startswith(("experts", "gate", "heads.image->text"))]
        results.append([out.reg, out.cl, *torch.autograd.grad(loss, used)])
        assert out.stats[0].name == "image->text/reg"
    for a, b in zip(*results, strict=True):
        assert_near(b, a, 1e-5)


def test_the_records_train_a_balanced_gate():
    c, x = make(dtype=torch.float32, train=True), torch.randn(40, 5)
    out = c(x, "image", "text")
    losses = mmbal.router_losses(out.stats, load_balance=0.5, z=0.1)
    losses.total.backward()
    assert c.gate["weight"].grad.abs().sum() > 0
    assert [record.name for record in out.stats] == ["image->text/reg", "image->text/cl"]
    assert [record.counts.sum().item() for record in out.stats] == [80, 80]


# --- Use and growth ---------------------------------------------------------------------------------------------------


def test_usage_counts_choices_of_each_direction_and_branch():
    c, x = make(), torch.randn(6, 4, 5, dtype=torch.float64)
    mask = torch.rand(6, 4) > 0.5
    out = c(x, "image", "text", mask)
    usage = c.usage(("image", "text"))
    assert torch.equal(usage, torch.stack([record.counts for record in out.stats]))
    assert usage.sum().item() == 2 * 2 * mask.sum().item()
    c(x, "image", "text")
    assert c.usage(("image", "text")).sum() == usage.sum() + 2 * 2 * 24
    assert not c.usage(("text", "image")).any()
    c.reset_usage()
    assert not c.usage(("image", "text")).any()
    assert not [name for name in c.state_dict() if "usage" in name]


def test_usage_of_experts_per_modality_shows_whose_they_are():
    c = make(expert_scope="per_modality")
    c(torch.randn(6, 7, dtype=torch.float64), "text", "image")
    usage = c.usage(("text", "image"))
    assert usage.shape == (2, 15) and usage[:, 5:10].sum() == usage.sum() == 24


@pytest.mark.parametrize("form", ["code", "v6", "experts per modality"])
def test_a_new_modality_leaves_what_was_there_bit_for_bit(form):
    c, x = make(**FORMS[form], dtype=torch.float32, train=True), torch.randn(6, 5)
    before, names = c(x, "image", "text").cl.detach(), set(dict(c.named_parameters()))
    new = c.add_modality("depth", 4)
    assert torch.equal(c(x, "image", "text").cl, before)
    assert {name for name, p in c.named_parameters() if any(p is q for q in new)} == set(
        dict(c.named_parameters())
    ) - names
    pairs = {(a, b) for a in c.modalities for b in c.modalities if a != b}
    assert set(c.directions) == pairs and len(pairs) == 12
    out, target = c(torch.randn(3, 4), "depth", "audio"), c.target(torch.randn(3, 4), "depth")
    assert out.reg.shape == (3, 3) and target.cl.shape == (3, 8)
    (out.reg.sum() + out.cl.sum()).backward()
    assert c.usage(("image", "text")).shape == c.usage(("depth", "text")).shape == (2, c.experts.w1.shape[0])


def test_an_optimizer_goes_on_with_the_experts_of_a_new_modality():
    c, x = make(expert_scope="per_modality", train=True), torch.randn(6, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(c.parameters(), lr=1e-3)
    c(x, "image", "text").cl.sum().backward()
    optimizer.step()
    moments = optimizer.state[c.experts.w1]["exp_avg"].clone()
    optimizer.add_param_group({"params": c.add_modality("depth", 4, optimizer=optimizer)})
    assert torch.equal(optimizer.state[c.experts.w1]["exp_avg"][:15], moments) and len(c.experts.w1) == 20
    before = c.experts.w1.detach().clone()
    c(x[:, :4], "depth", "text").cl.sum().backward()
    optimizer.step()
    assert not torch.equal(c.experts.w1[15:], before[15:])


def test_a_new_modality_trains_while_frozen_parts_keep_the_old_directions():
    c, x = make(dtype=torch.float32, train=True), torch.randn(6, 5)
    before = c(x, "image", "text").cl
    c.requires_grad_(False)
    optimizer = torch.optim.Adam(c.add_modality("depth", 4, [("depth", "text")]), lr=0.1)
    y = torch.randn(6, 7)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(c(x[:, :4], "depth", "text").reg, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(c(x, "image", "text").cl, before)


@pytest.mark.parametrize("form", ["code", "v6", "code, gate per branch", "experts per modality"])
def test_new_experts_change_almost_nothing_and_learn(form):
    c, x = make(**FORMS[form], train=True), torch.randn(6, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(c.parameters(), lr=1e-3)
    c(x, "image", "text").cl.sum().backward()
    optimizer.step()
    out, kept, old = c(x, "image", "text"), [id(p) for p in c.parameters()], copy.deepcopy(c)
    before, chosen = out.cl.detach(), out.stats[0].indices
    with pytest.raises(RuntimeError, match="drop the outputs of earlier forwards first"):
        c.add_experts(2)
    del out
    c.add_experts(2, margin=12.0, optimizer=optimizer)
    assert [id(p) for p in c.parameters()] == kept and c.num_experts == 7
    after = c(x, "image", "text")
    assert torch.equal(after.stats[0].indices, chosen)
    assert 0 < (after.cl - before).abs().max() < 1e-3
    groups = 3 if form == "experts per modality" else 1
    for name, p in old.experts.named_parameters():
        grown = getattr(c.experts, name)
        assert torch.equal(grown.view(groups, 7, *p.shape[1:])[:, :5], p.view(groups, 5, *p.shape[1:]))
        moments = optimizer.state[grown]["exp_avg"].view(groups, 7, -1)
        assert moments.abs().sum() > 0 and not moments[:, 5:].any()
    after.cl.sum().backward()
    assert c.gate["weight"].grad[..., 5:, :].abs().sum() > 0  # not chosen, and yet a gradient
    optimizer.step()
    assert c.usage(("image", "text")).shape == (2, 7 * groups)


def test_top_k_may_change():
    c, x = make(), torch.randn(6, 5, dtype=torch.float64)
    c.set_top_k(4)
    assert_near(c(x, "image", "text").cl, oracle(c, x.unsqueeze(1), "image", "text")[1], 1e-12)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"top_k must be from 1 to num_experts = 5, got {k}"):
            c.set_top_k(k)


def test_a_mlp_becomes_all_experts():
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 8)).double()
    copies = MoEConnector.from_mlp(mlp, DIMS, num_experts=4, noise=0.0, top_k=2)
    assert (copies.hidden, copies.ffn, copies.experts.w1.dtype) == (8, 6, torch.float64)
    x = torch.randn(5, 5, dtype=torch.float64)
    h = F.gelu(copies.modalities["image"].source(x + copies.heads["image->text"].embedding["image"]))
    h = h + copies.branch_embedding[0]
    copies.renorm = True
    expected = copies.heads["image->text"].reg(F.gelu(copies.norms["reg"](mlp(h))) + h)
    assert_near(copies(x, "image", "text").reg, expected, 1e-12)
    noisy = MoEConnector.from_mlp(mlp, DIMS, num_experts=4, noise=0.1)
    assert torch.equal(noisy.experts.w1[0], mlp[0].weight) and not torch.equal(noisy.experts.w1[1], mlp[0].weight)
    with pytest.raises(ValueError, match="mlp must have an exact GELU and biases, got relu with biases"):
        MoEConnector.from_mlp(torch.nn.Sequential(mlp[0], torch.nn.ReLU(), mlp[2]), DIMS)
    with pytest.raises(ValueError, match=r"mlp says \['hidden'\]: they must not be given"):
        MoEConnector.from_mlp(mlp, DIMS, hidden=3)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_and_a_config_make_the_same_connector(form):
    c = make(**FORMS[form], dtype=torch.float32)
    c.add_modality("depth", 4, [("depth", "text")])
    c.add_experts(1)
    other = MoEConnector(**json.loads(json.dumps(c.config()))).eval()
    other.load_state_dict(c.state_dict())
    x = torch.randn(6, 5)
    assert torch.equal(other(x, "image", "text").cl, c(x, "image", "text").cl)


# --- Errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    r"names of modalities must be without .*got 'a.b'": {"dims": {"a.b": 2}},
    r"dims\['a'\] must be an integer of at least 1, got 0": {"dims": {"a": 0, "b": 1}},
    "hidden must be an integer of at least 1, got -1": {"hidden": -1},
    "num_experts must be an integer of at least 1, got 0": {"num_experts": 0},
    "top_k must be from 1 to num_experts = 5, got 6": {"top_k": 6},
    r"dropout must be in \[0, 1\), got 1": {"dropout": 1.0},
    "preset must be one of code, v6, got 'v5'": {"preset": "v5"},
    "gates must be one of shared, per_branch, got 'two'": {"gates": "two"},
    "expert_scope must be one of shared, per_modality, got 'all'": {"expert_scope": "all"},
    "pool must be one of after, before, got 'max'": {"pool": "max"},
    r"directions must be 'all' or pairs \(source, target\), got 'some'": {"directions": "some"},
    r"directions must be 'all' or pairs \(source, target\), got \('image',\)": {"directions": [("image",)]},
    r"directions must use .*, got \['smell'\]": {"directions": [("image", "smell")]},
    "directions must be different pairs, at least one": {"directions": []},
    "sources of a direction must be different names": {"directions": [(("image", "image"), "text")]},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_of_the_constructor_is_named(message):
    with pytest.raises(ValueError, match=message):
        make(**WRONG[message])


def test_wrong_arguments_of_calls_are_named():
    c = make(directions=[("image", "text"), (("image", "audio"), "text")], dtype=torch.float32)
    x = torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match=r"directions must have text->image, got image->text, image\+audio->text"):
        c(x, "text", "image")
    with pytest.raises(ValueError, match=r"x of image must be \[B, T, 5\] or \[B, 5\], got \[4, 3, 4\]"):
        c(x[..., :4], "image", "text")
    with pytest.raises(ValueError, match=r"mask of image must be bool \[4, 3\] or \[4\], got torch.bool \[4, 2\]"):
        c(x, "image", "text", torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x must be a dict of \['image', 'audio'\], got Tensor"):
        c(x, ("image", "audio"), "text")
    with pytest.raises(ValueError, match=r"x must have \['audio'\], got \['image'\]"):
        c({"image": x}, ("image", "audio"), "text")
    with pytest.raises(ValueError, match="tgt must be one of text, got 'image'"):
        c.target(x, "image")
    with pytest.raises(ValueError, match="fingerprint must be of a target modality, got 'image'"):
        c.fingerprint("image")
    with pytest.raises(ValueError, match="name must be new, got 'image'"):
        c.add_modality("image", 3)
    with pytest.raises(ValueError, match="directions must be of the new modality 'depth', got image->text"):
        c.add_modality("depth", 3, [("image", "text")])
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        c.add_experts(0)
    with pytest.raises(ValueError, match="margin must not be negative, got -1"):
        c.add_experts(1, margin=-1)


def test_a_mean_over_a_mask_ignores_what_is_left_out():
    x = torch.tensor([[[1.0], [3.0], [torch.nan]], [[torch.nan]] * 3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(x, mask).tolist() == [[2.0], [0.0]]
