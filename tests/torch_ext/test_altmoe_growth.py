"""A connector that grows: all of it or nothing, in the precision it has; what a margin keeps; experts from an MLP."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mmbal import MoEConnector


def make(**options):
    return MoEConnector({"a": 6, "b": 6}, **({"hidden": 8, "num_experts": 4, "top_k": 2, "dropout": 0.0} | options))


def grow_experts(connector, **options):
    connector.add_experts(2, **options)


def grow_modality(connector, **options):
    connector.add_modality("c", 3, **options)


def grow_scoped(connector, **options):
    connector.add_experts(1, **options)


CASES = {
    "experts": ({}, grow_experts),
    "experts of the text's form": ({"preset": "v6"}, grow_experts),
    "experts of each modality": ({"expert_scope": "per_modality"}, grow_scoped),
    "a modality with experts": ({"expert_scope": "per_modality"}, grow_modality),
}


@pytest.mark.parametrize(
    ("case", "held"),
    # logits hold the gate and nothing of the experts, which are all that grows with a modality
    [
        (case, held)
        for case in CASES
        for held in ("logits", "cl", "reg")
        if (case, held) != ("a modality with experts", "logits")
    ],
)
def test_a_growth_that_is_refused_changes_nothing_and_spoils_no_graph(case, held):
    options, grow = CASES[case]
    c, x = make(**options), torch.randn(5, 6)
    optimizer = torch.optim.Adam(c.parameters(), lr=1e-3)
    c(x, "a", "b").cl.sum().backward()
    optimizer.step()
    out = c(x, "a", "b")
    graph = {"logits": out.stats[0].logits, "cl": out.cl, "reg": out.reg}[held].square().sum()
    values, config = copy.deepcopy(c.state_dict()), c.config()
    gradients = {name: p.grad for name, p in c.named_parameters()}
    moments = {name: optimizer.state[p].get("exp_avg") for name, p in c.named_parameters()}
    expected = torch.autograd.grad(graph, c.gate["weight"], retain_graph=True)[0]
    del out
    with pytest.raises(RuntimeError, match="drop the outputs of earlier forwards first"):
        grow(c, optimizer=optimizer)
    assert c.config() == config and list(c.state_dict()) == list(values)
    for name, p in c.named_parameters():
        assert torch.equal(p, values[name]) and p.grad is gradients[name]
        assert optimizer.state[p].get("exp_avg") is moments[name]
    assert c.usage(("a", "b")).shape == (2, len(c.experts.w1))
    assert torch.equal(torch.autograd.grad(graph, c.gate["weight"])[0], expected)
    del graph
    grow(c, optimizer=optimizer)  # and now that nothing holds it, it grows
    c(x, "a", "b").cl.sum().backward()
    optimizer.step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in c.parameters())


def test_a_swap_that_fails_on_the_way_is_undone(monkeypatch):
    c, swap, calls = make(), torch.utils.swap_tensors, []

    def failing(a, b):
        calls.append(a)
        if len(calls) == 3:
            raise RuntimeError("no")
        swap(a, b)

    values = copy.deepcopy(c.state_dict())
    monkeypatch.setattr(torch.utils, "swap_tensors", failing)
    with pytest.raises(RuntimeError, match="drop the outputs"):
        c.add_experts(1)
    assert all(torch.equal(value, values[name]) for name, value in c.state_dict().items()) and c.num_experts == 4


def test_a_loss_that_was_differentiated_does_not_hinder_growth():
    c = make()
    loss = c(torch.randn(5, 6), "a", "b").cl.sum()
    loss.backward()
    c.add_experts(1)
    assert c.num_experts == 5 and loss.grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("preset", ["code", "v6"])
def test_a_modality_comes_in_the_precision_the_connector_has_by_now(dtype, preset):
    c = make(directions=[("a", "b")], preset=preset).to(dtype)
    c.add_modality("c", 3)  # gives a the role of a target and b that of a source, too
    assert {p.dtype for p in c.parameters()} == {dtype}
    x = torch.randn(4, 6, dtype=dtype)
    assert c(x, "b", "c").reg.dtype == c.target(x, "a").cl.dtype == dtype


def test_a_modality_comes_where_the_connector_is_by_now():
    c = make(directions=[("a", "b")]).to("meta")
    c.add_modality("c", 3)
    assert {p.device.type for p in c.parameters()} == {"meta"}


@pytest.mark.parametrize("form", [{}, {"preset": "v6"}, {"gates": "per_branch"}, {"expert_scope": "per_modality"}])
def test_the_default_margin_is_below_the_lowest_bias_which_large_logits_pass(form):
    torch.manual_seed(0)
    c, x = make(**form), 10 * torch.randn(200, 6)
    biases = [c.gate["bias"]] if "bias" in c.gate else [c.modalities["a"].gate_bias]
    with torch.no_grad():
        biases[0].uniform_(-1, 1)
    lowest = biases[0].amin(-1, keepdim=True).detach()
    c.add_experts(2)
    out = c(x, "a", "b")
    for branch, record in enumerate(out.stats):
        below = lowest if lowest.dim() == 1 else lowest[branch]
        assert torch.equal(record.logits[:, 4:], (below - 5).expand(200, 2))
        assert (record.indices >= 4).any()  # as the documentation says


@pytest.mark.parametrize("form", [{}, {"preset": "v6"}, {"gates": "per_branch"}, {"expert_scope": "per_modality"}])
def test_a_margin_below_logits_keeps_tokens_with_their_experts(form):
    torch.manual_seed(0)
    c, x = make(**form), 10 * torch.randn(200, 6)
    before = c(x, "a", "b")
    records = [(record.logits.detach(), record.indices) for record in before.stats]
    cl = before.cl.detach()
    del before
    c.add_experts(2, logits=[logits for logits, _ in records])
    after = c(x, "a", "b")
    for record, (logits, indices) in zip(after.stats, records, strict=True):
        assert torch.equal(record.indices, indices) and torch.equal(record.logits[:, :4], logits)
        assert (record.logits[:, 4:] <= min(kept.min() for kept, _ in records) - 4.999).all()
    assert F.cosine_similarity(after.cl, cl).min() > 1 - 1e-4


def test_wrong_logits_are_named():
    c = make()
    for wrong in (torch.zeros(3, 5), [], [torch.zeros(0, 4)]):
        with pytest.raises(ValueError, match=r"add_experts: logits must be \[\.\.\., 4\], at least one row"):
            c.add_experts(1, logits=wrong)
    with pytest.raises(ValueError, match="add_experts: logits must be finite, got nan"):
        c.add_experts(1, logits=torch.full((2, 4), torch.nan))
    assert c.num_experts == 4


def test_experts_of_a_new_modality_are_in_the_tensors_of_the_others_frozen_with_them():
    c = make(expert_scope="per_modality").requires_grad_(False)
    new = c.add_modality("c", 3)
    assert all(p.requires_grad for p in new) and not c.experts.w1.requires_grad and len(c.experts.w1) == 12
    assert not any(p is q for p in new for q in c.experts.parameters())


@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (4, 4), (6, 4)])
def test_few_experts_from_an_mlp_are_all_used(experts, top_k):
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 8))
    assert MoEConnector.from_mlp(mlp, {"a": 3, "b": 2}, experts).top_k == top_k
