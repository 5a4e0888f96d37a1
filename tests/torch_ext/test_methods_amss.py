"""AMSS and AMSS+ as a user trains with them: which gradients are masked, at what ratio, and what may go wrong.

Processes and mixed precision have files of their own (test_amss_distributed.py, test_amss_amp.py).
Letters: M modalities, B samples, C classes, U units.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbal import AMSS, UnitSpec
from test_sampling import smallest, words
from test_significance import plain_ratio, plain_stats

F64 = {"dtype": torch.float64}
NAMES = ["audio", "video"]
RHO = {"audio": 0.3, "video": 0.7}


class Model(nn.Module):
    """Two encoders of another kind and a linear head on both."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.audio = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 8))
        self.video = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4, 6))
        self.head = nn.Linear(14, 3)
        self.to(dtype)

    @property
    def encoders(self):
        return {"audio": self.audio, "video": self.video}

    def features(self, x):
        return {name: encoder(x[name]) for name, encoder in self.encoders.items()}

    def outputs(self, z):
        """Logits of each modality alone, and its features."""
        first, second = self.head.weight.split([8, 6], 1)
        half = self.head.bias / 2
        return {
            "audio": (F.linear(z["audio"], first, half), z["audio"]),
            "video": (F.linear(z["video"], second, half), z["video"]),
        }


def batch(step=0, B=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    audio = torch.randn(B, 10, generator=generator)
    video = torch.randn(B, 2, 4, 4, generator=generator)
    return {"audio": audio.to(dtype), "video": video.to(dtype)}, audio[:, :3].argmax(1)


def backward(model, step=0, dtype=torch.float32):
    x, y = batch(step, dtype=dtype)
    z = model.features(x)
    model.zero_grad()
    F.cross_entropy(model.head(torch.cat(list(z.values()), 1)), y).backward()
    return model.outputs(z), y


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


MASKED = ["audio.0.weight", "audio.2.weight", "video.0.weight", "video.3.weight"]  # in the order of their ids


# --- The whole of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_masks_what_a_slow_reading_of_the_method_masks(dtype):
    model = Model(dtype)
    amss = AMSS(model.encoders, seed=11)
    for step in range(3):
        outputs, y = backward(model, step, dtype)
        full = gradients(model)
        amss.step(outputs, y)
        logits, features = ([outputs[name][i].detach() for name in NAMES] for i in (0, 1))
        _, rho = plain_ratio(*plain_stats(logits, features, y), [8, 6], 1.25)
        assert list(amss.rho.values()) == pytest.approx(list(rho), rel=1e-5)
        for id, name in enumerate(MASKED):
            g = full[name].double().flatten(1)
            energy = g.square().sum(1).numpy()
            n, ratio = len(energy), amss.rho[name.split(".")[0]]
            e = -np.log1p(-(words(11, step, range(n), id=id) + 0.5) * 2.0**-32)
            kept = smallest(e / energy, math.ceil(ratio * n - 1e-7 * n))
            mask = torch.from_numpy(kept).view(-1, *[1] * (full[name].dim() - 1))
            assert torch.equal(dict(model.named_parameters())[name].grad, full[name] * mask)


def test_biases_and_the_head_are_never_masked():
    model = Model()
    outputs, y = backward(model)
    full = gradients(model)
    AMSS(model.encoders).step(outputs, y)
    after = gradients(model)
    for name in full:
        assert torch.equal(after[name], full[name]) == (name not in MASKED)


def test_amss_plus_is_unbiased_whatever_is_a_unit():
    model = Model(torch.float64)
    heads = {model.audio[0].weight: UnitSpec.heads(4), model.audio[2].weight: UnitSpec.elements()}
    backward(model, dtype=torch.float64)
    full = gradients(model)
    amss = AMSS(model.encoders, plus=True, unit=heads, rho=RHO)
    draws = 3000
    total, squares = ({name: torch.zeros_like(full[name]) for name in MASKED} for _ in range(2))
    parameters = dict(model.named_parameters())
    for _ in range(draws):
        for name in MASKED:
            parameters[name].grad.copy_(full[name])
        amss.step()
        for name in MASKED:
            total[name] += parameters[name].grad
            squares[name] += parameters[name].grad.square()
    for name in MASKED:
        mean = total[name] / draws
        error = ((squares[name] / draws - mean.square()).clamp_min(0) / draws).sqrt()
        # 5 standard errors: a chance of 5e-4 that one of about 900 lies outside
        assert ((mean - full[name]).abs() <= 5 * error + 1e-12 * full[name].abs()).all()


def test_sgd_moves_by_the_masked_gradient_alone():
    model = Model(torch.float64)
    backward(model, dtype=torch.float64)
    full, before = gradients(model), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    amss = AMSS(model.encoders, plus=True, rho=RHO)
    amss.attach(optimizer)
    optimizer.step()
    scale = {}
    for name in MASKED:
        s = (gradients(model)[name] / full[name]).flatten(1).nan_to_num(0).max(1).values
        scale[name] = s.view(-1, *[1] * (full[name].dim() - 1))
        assert (s == 0).any() and (s > 1).any()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] - 0.1 * full[name] * scale.get(name, 1), rtol=1e-14, atol=1e-16)


# --- Adam, and where="update" -----------------------------------------------------------------------------------------


def displacement(plus, where="grad", sampler="uniform", steps=300, rows=400, **options):
    """Of rows whose gradient is always 1, under Adam."""
    p = nn.Parameter(torch.zeros(rows, 2, **F64))
    other = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.Adam([p, other], lr=1e-3, betas=(0.9, 0.99), eps=1e-30)
    amss = AMSS(
        {"a": [p], "b": [other]},
        plus,
        rho={"a": 0.3, "b": 0.3},
        where=where,
        sampler=sampler,
        **options,
    )
    amss.attach(optimizer)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.detach()


def test_under_adam_amss_plus_is_amss_and_takes_about_the_root_of_the_ratio_of_the_full_step():
    plain, plus = displacement(False), displacement(True)
    assert torch.allclose(plain, plus, rtol=1e-12)
    assert plain.mean().item() == pytest.approx(-0.162, abs=0.004)  # -0.3 unmasked


@pytest.mark.parametrize("unit", ["auto", "element"])
def test_where_update_makes_amss_plus_take_the_full_step_of_adam_on_average(unit):
    sampler = "uniform" if unit == "auto" else None
    moved = displacement(True, "update", sampler, unit=unit)
    assert moved.mean().item() == pytest.approx(-0.3, rel=0.01)
    assert displacement(False, "update", sampler, unit=unit).mean().item() == pytest.approx(-0.09, rel=0.02)


@pytest.mark.parametrize("unit", ["auto", "element"])
def test_where_update_leaves_what_is_not_kept_bit_for_bit_and_moves_the_rest_as_the_optimizer_does(unit):
    model, twin = Model(), Model()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in (model, twin)]
    AMSS(model.encoders, rho=RHO, where="update", unit=unit, seed=4).attach(optimizers[0])
    before = weights(model)
    for m in (model, twin):
        backward(m)
    full = gradients(model)
    for optimizer in optimizers:
        optimizer.step()
    assert same(gradients(model), full)
    for name, p in model.named_parameters():
        moved = (p != before[name]) if unit == "element" else (p != before[name]).flatten(1 if p.dim() > 1 else 0)
        q = dict(twin.named_parameters())[name]
        if name not in MASKED:
            assert torch.equal(p, q)
            continue
        if unit == "auto":
            moved = moved.any(1)
            ratio = RHO[name.split(".")[0]]
            assert moved.sum() == math.ceil(ratio * len(moved) - 1e-7 * len(moved))
        assert torch.equal(p[moved], q[moved]) and torch.equal(p[~moved], before[name][~moved])


def test_where_update_without_an_attached_optimizer_is_an_error():
    model = Model()
    outputs, y = backward(model)
    amss = AMSS(model.encoders, where="update")
    with pytest.raises(RuntimeError, match=r"needs attach\(optimizer\)"):
        amss.step(outputs, y)


def test_where_update_is_refused_for_an_optimizer_that_it_cannot_serve():
    model = Model()
    amss = AMSS(model.encoders, where="update")
    with pytest.raises(ValueError, match="needs all managed parameters in it, 2 are not"):
        amss.attach(torch.optim.SGD(model.audio.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="needs one move of parameters in a step, got LBFGS"):
        amss.attach(torch.optim.LBFGS(model.parameters()))


# --- The loop ---------------------------------------------------------------------------------------------------------


def test_attached_to_the_optimizer_observing_is_the_one_line():
    by_hand, attached = Model(), Model()
    results = []
    for model, hooked in ((by_hand, False), (attached, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        amss = AMSS(model.encoders, seed=2)
        handle = amss.attach(optimizer) if hooked else None
        for step in range(4):
            outputs, y = backward(model, step)
            amss.observe(outputs, y) if hooked else amss.step(outputs, y)
            optimizer.step()
        if hooked:
            handle.remove()
            handle.remove()
            backward(model)
            full = gradients(model)
            optimizer.step()
            assert same(gradients(model), full)  # no more masks
        results.append(amss)
    assert results[0].rho == results[1].rho
    assert results[0].steps == results[1].steps == 4


@pytest.mark.parametrize("where", ["grad", "update"])
def test_attaching_twice_is_refused_until_the_first_is_removed(where):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    amss = AMSS(model.encoders, where=where)
    handle = amss.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already, and would mask twice"):
        amss.attach(optimizer)
    handle.remove()
    amss.attach(optimizer).remove()
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got Model"):
        amss.attach(model)


def test_an_attached_optimizer_with_a_closure_is_refused_and_step_in_the_closure_works():
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    amss = AMSS(model.encoders)
    handle = amss.attach(optimizer)

    def closure():
        x, y = batch()
        z = model.features(x)
        optimizer.zero_grad()
        loss = F.cross_entropy(model.head(torch.cat(list(z.values()), 1)), y)
        loss.backward()
        amss.step(model.outputs(z), y)
        return loss

    with pytest.raises(RuntimeError, match="call step in the closure"):
        optimizer.step(closure)
    handle.remove()
    optimizer.step(closure)
    assert amss.steps >= 1


def test_micro_batches_that_are_observed_make_the_ratios_of_the_whole_batch():
    model = Model()
    outputs, y = backward(model)
    whole, parts = AMSS(model.encoders), AMSS(model.encoders)
    whole.step(outputs, y)
    for part in (slice(0, 5), slice(5, 16)):
        parts.observe({k: (o[part], z[part]) for k, (o, z) in outputs.items()}, y[part])
    parts.step()
    assert list(parts.rho.values()) == pytest.approx(list(whole.rho.values()), rel=1e-9)
    assert parts.last_stats["rows"] == 16


def test_without_new_statistics_the_last_ratios_stay():
    model = Model()
    amss = AMSS(model.encoders)
    amss.step(*backward(model))
    first = amss.rho
    backward(model, 1)
    amss.step()
    assert amss.rho == first
    amss.step(rho=RHO)
    assert amss.rho == RHO


def test_a_value_that_is_not_finite_leaves_every_gradient_and_is_counted():
    model = Model()
    amss = AMSS(model.encoders, rho=RHO, unit={model.audio[0].weight: UnitSpec.elements()})
    for name, value in (("video.0.weight", math.inf), ("audio.0.weight", math.nan)):
        backward(model)
        dict(model.named_parameters())[name].grad.view(-1)[5] = value
        before = {k: g.view(torch.int32) for k, g in gradients(model).items()}
        amss.step()
        assert same({k: g.view(torch.int32) for k, g in gradients(model).items()}, before)
    assert amss.skipped == 2 and amss.steps == 2


def test_a_run_that_loads_its_state_goes_on_as_if_never_stopped():
    def train(model, amss, optimizer, steps):
        for step in steps:
            outputs, y = backward(model, step)
            amss.observe(outputs, y)
            amss.step()
            optimizer.step()

    options = {"plus": True, "seed": 8, "ema": 0.7}
    model = Model()
    amss, optimizer = AMSS(model.encoders, **options), torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, amss, optimizer, range(3))
    outputs, y = backward(model, 3)
    amss.observe(outputs, y)  # stopped in the middle of an accumulation
    saved = pickle.loads(pickle.dumps((model.state_dict(), amss.state_dict())))
    amss.step()
    train(model, amss, optimizer, range(4, 7))
    other = Model()
    other.load_state_dict(saved[0])
    again, optimizer = AMSS(other.encoders, **(options | {"seed": 0})), torch.optim.SGD(other.parameters(), lr=0.1)
    again.load_state_dict(saved[1])
    backward(other, 3)
    again.step()
    train(other, again, optimizer, range(4, 7))
    assert same(weights(model), weights(other))
    assert again.rho == amss.rho


def test_a_state_of_something_else_is_refused():
    model = Model()
    state = AMSS(model.encoders, rho=RHO).state_dict()
    with pytest.raises(ValueError, match="state must have"):
        AMSS(model.encoders).load_state_dict({k: v for k, v in state.items() if k != "step"})
    three = AMSS({**model.encoders, "head": model.head}, rho={**RHO, "head": 0.5})
    backward(model)
    three.step()
    averaged = AMSS(model.encoders, rho=RHO, ema=0.5)
    averaged.step()
    wrong = averaged.state_dict() | {"energy": {1: torch.ones(1, **F64)}}
    with pytest.raises(ValueError, match=r"energy of parameter 1 must be \[U\] = \[8\], got \[1\]"):
        averaged.load_state_dict(wrong)
    with pytest.raises(ValueError, match="state is of 3 modalities, this has 2"):
        AMSS(model.encoders).load_state_dict(three.state_dict())


def test_masks_are_the_same_at_any_number_of_threads_and_leave_the_generator_of_torch(at_each_thread_count):
    model = Model()
    outputs, y = backward(model)
    full = gradients(model)
    state = torch.get_rng_state()

    def run():
        for name, p in model.named_parameters():
            p.grad.copy_(full[name])
        AMSS(model.encoders, plus=True).step(outputs, y)
        return list(gradients(model).values())

    at_each_thread_count(run)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_is_kept_alive_between_steps():
    import weakref

    model = Model()
    amss = AMSS(model.encoders, rho=RHO)
    backward(model)
    amss.step()
    amss.step()
    alive = weakref.ref(model.audio[0].weight.grad)
    model.zero_grad(set_to_none=True)
    assert alive() is None


# --- Ratios -----------------------------------------------------------------------------------------------------------


def test_last_stats_say_where_the_ratios_come_from():
    model = Model()
    amss = AMSS(model.encoders)
    assert amss.rho is None and amss.last_stats == {}
    outputs, y = backward(model)
    amss.step(outputs, y)
    stats = amss.last_stats
    ce = {name: F.cross_entropy(o, y).item() for name, (o, _) in outputs.items()}
    assert stats["cross_entropy"] == pytest.approx(ce, rel=1e-6)
    q = {name: z.softmax(1) for name, (_, z) in outputs.items()}
    entropy = {k: (torch.special.entr(p).sum(1).mean() / math.log(p.shape[1])).item() for k, p in q.items()}
    assert stats["feature_entropy"] == pytest.approx(entropy, rel=1e-6)
    labels = torch.special.entr(torch.bincount(y) / 16.0).sum().item()
    assert stats["label_entropy"] == pytest.approx(labels, rel=1e-6)
    assert stats["rows"] == 16 and stats["rho"] == amss.rho
    for name in NAMES:
        assert stats["rate"][name] == pytest.approx(max(labels - ce[name] + 0.5, 0) / entropy[name], rel=1e-5)


def test_a_prior_takes_the_place_of_the_labels_of_the_batch():
    model = Model()
    outputs, y = backward(model)
    amss = AMSS(model.encoders, prior=torch.tensor([0.5, 0.25, 0.25]))
    amss.step(outputs, y)
    assert amss.last_stats["label_entropy"] == pytest.approx(1.5 * math.log(2))


def test_a_significance_of_ones_own_is_averaged_over_micro_batches_and_serves_other_tasks():
    model = Model()
    backward(model)
    amss = AMSS(model.encoders, significance=lambda outputs, y: torch.tensor(outputs), tau=0.5)
    amss.observe([1.0, 0.0])
    amss.observe([0.0, 0.5])
    amss.step()
    r = np.array([0.5, 0.25]) / 0.5
    assert list(amss.rho.values()) == pytest.approx(list(1 - np.exp(r) / np.exp(r).sum()))
    assert amss.last_stats["rate"] == {"audio": 0.5, "video": 0.25}


@pytest.mark.parametrize("significance", ["rate", "rate_unnormalised", "mi"])
def test_the_weaker_modality_is_updated_more(significance):
    y = torch.arange(30) % 3
    strong, weak = 3.0 * F.one_hot(y, 3), 0.5 * F.one_hot(y, 3)
    z = torch.randn(30, 8)
    model = Model()
    backward(model)
    amss = AMSS(model.encoders, significance=significance)
    amss.step({"audio": (strong, z), "video": (weak, z)}, y)
    assert amss.rho["audio"] < 0.5 < amss.rho["video"]


# --- What is managed --------------------------------------------------------------------------------------------------


def fraction_kept(p):
    return (p.grad.flatten(1) != 0).any(1).double().mean().item()


def test_frozen_parameters_are_left_out_and_missing_gradients_left_alone():
    model = Model()
    model.audio[0].weight.requires_grad_(False)
    amss = AMSS(model.encoders, rho=RHO)
    backward(model)
    model.video[0].weight.grad = None
    amss.step()
    assert model.video[0].weight.grad is None
    assert fraction_kept(model.video[3].weight) < 1


def test_include_and_exclude_choose_parameters():
    model = Model()
    for options in (
        {"include": lambda p: p is model.audio[0].weight},
        {"exclude": lambda p: p is not model.audio[0].weight},
    ):
        backward(model)
        full = gradients(model)
        AMSS(model.encoders, rho=RHO, **options).step()
        after = gradients(model)
        assert [name for name in full if not torch.equal(full[name], after[name])] == ["audio.0.weight"]


def test_lists_of_parameters_serve_as_encoders_and_a_parameter_that_comes_twice_counts_once():
    model = Model()
    backward(model)
    weight = model.audio[0].weight
    amss = AMSS({"a": [weight, weight], "b": model.video.parameters()}, rho={"a": 0.5, "b": 0.5})
    amss.step()
    assert (weight.grad.abs().sum(1) > 0).sum() == 12
    assert repr(amss) == "AMSS(a: 1 tensors, b: 2 tensors; plus=False, sampler='bottomk', where='grad')"


def test_a_parameter_of_two_modalities_is_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"\[4, 4\] belongs to 'a' and 'b'"):
        AMSS({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 2))})


def test_heads_and_columns_are_masked_as_a_whole():
    p, head = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.randn(5, 10))
    p.grad, head.grad = torch.randn(12, 12), torch.randn(5, 10)
    full = head.grad.clone()
    units = {p: UnitSpec.heads(4, dim=1), head: UnitSpec.columns(2, 6)}
    AMSS({"a": [p], "b": [head]}, unit=units, rho={"a": 0.5, "b": 0.5}).step()
    kept = (p.grad != 0).view(12, 4, 3)
    assert all(kept[:, h].all() or not kept[:, h].any() for h in range(4))
    assert kept.any(2).any(0).sum() == 2
    assert torch.equal(head.grad[:, :2], full[:, :2]) and torch.equal(head.grad[:, 8:], full[:, 8:])
    assert ((head.grad[:, 2:8] != 0).sum(1) == 3).all()  # every row by itself


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "with gaps"])
@pytest.mark.parametrize("unit", ["auto", "element"])
def test_gradients_in_any_layout_are_masked_in_place(layout, unit):
    p = nn.Parameter(torch.randn(8, 6, 4, 4))
    g = torch.randn(8, 6, 4, 4)
    p.grad = {
        "channels_last": g.contiguous(memory_format=torch.channels_last),
        "transposed": g.transpose(0, 2).contiguous().transpose(0, 2),
        "with gaps": torch.empty(8, 12, 4, 8)[:, ::2, :, ::2].copy_(g),
    }[layout]
    grad = p.grad
    AMSS({"a": [p], "b": []}, unit=unit, rho={"a": 0.5, "b": 0.5}).step()
    assert p.grad is grad
    kept = (grad != 0) if unit == "element" else (grad != 0).flatten(1).all(1).view(8, 1, 1, 1)
    assert kept.sum() == grad.shape.numel() / 2 if unit == "element" else kept.sum() == 4
    assert torch.equal(grad, g * kept)


def test_an_expanded_gradient_is_refused_and_a_sparse_one_left_with_a_warning():
    p = nn.Parameter(torch.randn(4, 3))
    amss = AMSS({"a": [p], "b": []}, rho={"a": 0.5, "b": 0.5})
    p.grad = torch.randn(1, 3).expand(4, 3)
    with pytest.raises(ValueError, match=r"must not be expanded, got \(0, 1\)"):
        amss.step()
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    p.grad = torch.randn(4, 3)
    amss = AMSS({"a": embedding, "b": [p]}, rho={"a": 0.5, "b": 0.5})
    with pytest.warns(UserWarning, match="AMSS leaves torch.sparse_coo gradients as they are"):
        amss.step()
    assert embedding.weight.grad.is_sparse


def test_half_precision_gradients_are_masked():
    for dtype in (torch.float16, torch.bfloat16):
        model = Model(dtype)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        AMSS(model.encoders, plus=True, rho=RHO).step()
        assert fraction_kept(model.audio[0].weight) == pytest.approx(0.3, abs=1 / 24)


def test_moving_averages_of_energies_change_what_is_drawn_and_not_what_is_left():
    p = nn.Parameter(torch.zeros(100, 2))
    amss = AMSS({"a": [p], "b": []}, rho={"a": 0.2, "b": 0.5}, ema=0.9, sampler="topk")
    first = torch.arange(100.0).flip(0)[:, None].expand(100, 2).clone() + 1
    p.grad = first.clone()
    amss.step()
    p.grad = first.flip(0).clone()
    amss.step()  # the past weighs nine times the present
    assert (p.grad[:20] != 0).all() and (p.grad[20:] == 0).all()
    assert torch.equal(p.grad[:20], first.flip(0)[:20])


# --- A head on concatenated features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [None, {"video": slice(8, None), "audio": slice(0, 8)}])
def test_a_concat_head_needs_labels_alone(slices):
    model = Model()
    by_hand, by_hooks = AMSS(model.encoders), AMSS.from_concat_head(model.encoders, model.head, slices)
    outputs, y = backward(model)
    full = gradients(model)
    by_hand.step(outputs, y)
    expected = gradients(model)
    for name, p in model.named_parameters():
        p.grad.copy_(full[name])
    by_hooks.step(y=y)
    assert by_hooks.rho == pytest.approx(by_hand.rho, rel=1e-6)
    assert same(gradients(model), expected)


def test_a_model_with_a_concat_head_is_copied_and_pickled_and_its_copy_does_not_disturb_it():
    model = Model()
    amss = AMSS.from_concat_head(model.encoders, model.head)
    x, y = batch()
    z = model.features(x)
    copied = copy.deepcopy(model)
    copied.features({name: value + 9 for name, value in x.items()})
    pickle.loads(pickle.dumps(copied))
    amss.observe(y=y)
    expected = AMSS(model.encoders)
    expected.observe(model.outputs(z), y)
    for a in (amss, expected):
        backward(model)
        a.step()
    assert list(amss.rho.values()) == pytest.approx(list(expected.rho.values()), rel=1e-6)


def test_features_of_evaluation_are_not_taken():
    model = Model()
    amss = AMSS.from_concat_head(model.encoders, model.head)
    _, y = backward(model)
    model.eval()
    model.features(batch(7, B=99)[0])
    amss.observe(y=y)
    model.train()
    assert torch.equal(amss._ratios.seen[3], torch.tensor([16.0], **F64))
    with pytest.raises(RuntimeError, match="encoder 'audio' has not run in training mode since the last observe"):
        amss.observe(y=y)


def test_a_masked_head_gives_each_class_the_columns_of_each_modality_at_its_ratio():
    model = Model()
    slices = {"audio": slice(0, 8), "video": slice(8, 14)}
    amss = AMSS.from_concat_head(model.encoders, model.head, slices, mask_head=True, rho={"audio": 0.25, "video": 0.5})
    backward(model)
    amss.step()
    kept = model.head.weight.grad != 0
    assert (kept[:, :8].sum(1) == 2).all() and (kept[:, 8:].sum(1) == 3).all()


def test_a_head_that_does_not_fit_is_named():
    model = Model()
    with pytest.raises(ValueError, match=r"head must be a torch.nn.Linear, got Sequential"):
        AMSS.from_concat_head(model.encoders, model.audio)
    with pytest.raises(ValueError, match=r"encoders\['a'\] must be a module, got list"):
        AMSS.from_concat_head({"a": [], "b": model.video}, model.head)
    with pytest.raises(ValueError, match="mask_head needs slices"):
        AMSS.from_concat_head(model.encoders, model.head, mask_head=True)
    with pytest.raises(ValueError, match=r"slices\['video'\] must be columns side by side"):
        AMSS.from_concat_head(model.encoders, model.head, {"audio": slice(0, 8), "video": slice(8, 14, 2)})
    amss = AMSS.from_concat_head(model.encoders, nn.Linear(15, 3))
    _, y = backward(model)
    with pytest.raises(ValueError, match=r"head takes 15 features; the encoders give \[8, 6\]"):
        amss.observe(y=y)


# --- What is refused --------------------------------------------------------------------------------------------------

MODEL = Model()
E = MODEL.encoders


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AMSS({}), "encoders must be a mapping of at least one modality"),
        (lambda: AMSS([MODEL.audio]), "encoders must be a mapping"),
        (lambda: AMSS({"a": [1.0]}), r"encoders\['a'\] must have parameters, got float"),
        (lambda: AMSS(E, significance="bits"), "significance must be one of rate, rate_unnormalised, mi, got 'bits'"),
        (lambda: AMSS(E, significance=lambda o, y: y), "tau must be given with a significance of your own"),
        (lambda: AMSS(E, tau=0.0), "tau must be finite and greater than 0, got 0.0"),
        (lambda: AMSS(E, sampler="best"), "sampler must be one of bottomk, systematic"),
        (lambda: AMSS(E, importance="fisher"), "importance must be one of gn, sqrt_gn, gn_wn"),
        (lambda: AMSS(E, where="loss"), "where must be one of grad, update"),
        (lambda: AMSS(E, guard="no"), "guard must be one of clamp, official"),
        (lambda: AMSS(E, plus=True, sampler="topk"), "sampler 'topk' has no unbiased form"),
        (lambda: AMSS(E, lam=1.5), "lam must be from 0 to 1"),
        (lambda: AMSS(E, ema=1.0), "ema from 0 to below 1"),
        (lambda: AMSS(E, lo=0.6, hi=0.5), "0 <= lo <= hi <= 1"),
        (lambda: AMSS(E, plus=True, lo=0.0), r"with AMSS\+ 0 < lo"),
        (lambda: AMSS(E, seed=2**63), "seed must be a 64-bit integer"),
        (lambda: AMSS(E, unit="rows"), "unit must be auto, element or a mapping of parameters, got 'rows'"),
        (lambda: AMSS(E, unit={nn.Parameter(torch.zeros(2, 2)): UnitSpec.slices()}), "unit has 1 parameters that no"),
        (lambda: AMSS(E, unit={MODEL.audio[0].weight: UnitSpec.heads(5)}), "must be a multiple of 5 heads"),
        (lambda: AMSS(E, unit="element", sampler="systematic"), "sampler 'systematic' is for units"),
        (lambda: AMSS(E, plus=True, unit="element", sampler="bottomk"), "sampler 'bottomk' is for units"),
        (lambda: AMSS(E, unit="element", ema=0.5), "ema is for units"),
        (lambda: AMSS(E, bias=math.nan), "bias and offset must be finite, got nan and 0.5"),
        (lambda: AMSS(E, seed=0.5), "seed must be a 64-bit integer, got 0.5"),
        (
            lambda: AMSS(E, unit={MODEL.audio[0].weight: "element"}),
            r"parameter \[24, 10\] must be a UnitSpec, got 'element'",
        ),
        (lambda: AMSS({"a": MODEL.audio[0].weight}), "must be a module or parameters in a list, got one tensor"),
        (
            lambda: AMSS.from_concat_head(E, MODEL.head, {"audio": slice(0, 8), "video": slice(7, 13)}),
            "slices must not share columns of the head",
        ),
        (lambda: AMSS(E, rho={"audio": 0.5}), r"rho must have the keys \['audio', 'video'\]"),
        (lambda: AMSS(E, rho={"audio": 0.5, "video": 1.5}), "rho must be from 0 to 1, .* got 1.5 for 'video'"),
        (lambda: AMSS(E, plus=True, rho={"audio": 0.0, "video": 0.5}), r"with AMSS\+ above 0, got 0.0 for 'audio'"),
        (lambda: AMSS(E, prior=torch.tensor([0.5, 0.4])), r"prior must be \[C\] probabilities that sum to 1"),
    ],
)
def test_bad_options_are_named_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_statistics_are_named():
    outputs, y = backward(MODEL)
    amss = AMSS(E)
    with pytest.raises(RuntimeError, match="there are no ratios yet: give step outputs and y, or rho"):
        amss.step()
    with pytest.raises(ValueError, match=r"outputs \{name: \(logits, features\)\} and y must both be given"):
        amss.step(y=y)
    with pytest.raises(ValueError, match="outputs must have the keys"):
        amss.step({"audio": outputs["audio"]}, y)
    with pytest.raises(ValueError, match=r"outputs\['video'\] must be a pair of logits \[B, C\] and features \[B, D\]"):
        amss.step({**outputs, "video": outputs["video"][0]}, y)
    with pytest.raises(RuntimeError, match="targets must be from 0 to C - 1 = 2"):
        amss.step(outputs, y + 5)
    amss.observe(outputs, y)
    wider = {k: (torch.cat([o, o], 1), z) for k, (o, z) in outputs.items()}
    with pytest.raises(ValueError, match="as many classes and columns in every batch of a step"):
        amss.observe(wider, y)
    with pytest.raises(ValueError, match=r"prior must be \[C\] = \[3\], got \[2\]"):
        AMSS(E, prior=torch.tensor([0.5, 0.5])).observe(outputs, y)
    with pytest.raises(ValueError, match=r"significance must give rates \[M\] = \[2\], got \[3\]"):
        AMSS(E, significance=lambda o, t: torch.ones(3), tau=1.0).observe(outputs, y)


def test_every_sampler_and_importance_trains():
    for plus, sampler, importance in (
        (False, None, "gn"),
        (True, None, "sqrt_gn"),
        (False, "topk", "gn_wn"),
        (True, "independent", "gn"),
        (True, "bottomk", "gn"),
        (False, "uniform", "gn"),
    ):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        amss = AMSS(model.encoders, plus, sampler=sampler, importance=importance)
        losses = []
        for step in range(60):
            outputs, y = backward(model, step % 4)
            losses.append(F.cross_entropy(sum(o for o, _ in outputs.values()), y).item())
            amss.step(outputs, y)
            optimizer.step()
        assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
