"""alternate: steps of one task at a time, moments, idle experts, windows; against loops written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmbal
from mmbal import DirectionSchedule, alternate
from mmbal.altmoe.optimizer_state import idle_experts_untouched


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({"depth": nn.Linear(6, 1), "class": nn.Linear(6, 3)})

    def forward(self, x, task):
        return self.heads[task](self.trunk(x).tanh())


def tasks_of(model):
    return {
        "depth": lambda batch: F.mse_loss(model(batch["x"], "depth")[:, 0], batch["depth"]),
        "class": lambda batch: F.cross_entropy(model(batch["x"], "class"), batch["class"]),
    }


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(8, 4, generator=generator)
        yield {"x": x, "depth": x.sum(1), "class": x[:, :3].argmax(1)}


def assert_same(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("steps", [1, 2])
def test_it_is_the_loop_that_one_writes_by_hand_bit_for_bit(kind, clip, steps):
    ours, theirs = TwoTasks(), None
    theirs = copy.deepcopy(ours)
    step = alternate(
        tasks_of(ours), MAKE[kind](ours.parameters()), DirectionSchedule.cycle(["class", "depth"], steps), clip=clip
    )
    optimizer, tasks = MAKE[kind](theirs.parameters()), tasks_of(theirs)
    for i, batch in enumerate(batches(9)):
        info, task = step(batch), ["class", "depth"][i // steps % 2]
        loss = tasks[task](batch)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
        assert info.direction == task and torch.equal(info.loss, loss.detach()) and info.stepped
        assert_same(ours, theirs)


def test_what_the_task_does_not_use_stays_bit_for_bit_even_with_momentum_and_decay():
    model = TwoTasks()
    step = alternate(tasks_of(model), MAKE["momentum"](model.parameters()))
    before = None
    for batch in batches(6):
        heads = copy.deepcopy(model.heads)
        info = step(batch)
        idle = "class" if info.direction == "depth" else "depth"
        assert_same(model.heads[idle], heads[idle])
        assert not torch.equal(model.heads[info.direction].weight, heads[info.direction].weight)
        before = info
    assert before.grad_norm > 0


@pytest.mark.parametrize("kind", ["momentum", "adamw", "fused adamw"])
def test_moments_by_direction_are_those_of_an_optimizer_for_each_direction(kind):
    ours, theirs = TwoTasks(), None
    theirs = copy.deepcopy(ours)
    step = alternate(tasks_of(ours), MAKE[kind](ours.parameters()), state="per_direction")
    optimizers = {task: MAKE[kind](theirs.parameters()) for task in tasks_of(theirs)}
    shared = copy.deepcopy(ours)
    mixed = alternate(tasks_of(shared), MAKE[kind](shared.parameters()))
    for batch in batches(8):
        task = step(batch).direction
        mixed(batch)
        theirs.zero_grad()
        tasks_of(theirs)[task](batch).backward()
        optimizers[task].step()
        assert_same(ours, theirs)
    assert not torch.equal(ours.trunk.weight, shared.trunk.weight)


def test_a_window_is_of_one_task_and_its_gradient_that_of_the_mean_loss():
    ours, theirs = TwoTasks(), None
    theirs = copy.deepcopy(ours)
    step = alternate(tasks_of(ours), MAKE["sgd"](ours.parameters()), accumulate=3)
    optimizer, given = MAKE["sgd"](theirs.parameters()), list(batches(12))
    infos = [step(batch) for batch in given]
    assert [info.direction for info in infos] == (["depth"] * 3 + ["class"] * 3) * 2
    assert [info.stepped for info in infos] == [False, False, True] * 4
    for window in range(4):
        whole = {key: torch.cat([batch[key] for batch in given[3 * window : 3 * window + 3]]) for key in given[0]}
        optimizer.zero_grad()
        tasks_of(theirs)[["depth", "class"][window % 2]](whole).backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_state_goes_on_bit_for_bit_and_not_from_inside_a_window(tmp_path):
    def make(model):
        optimizer = MAKE["adamw"](model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        schedule = DirectionSchedule.weighted(["depth", "class"], [1, 2])
        return alternate(
            tasks_of(model), optimizer, schedule, state="per_direction", accumulate=2, lr_scheduler=scheduler
        )

    ours, other = TwoTasks(), TwoTasks()
    step, given = make(ours), list(batches(20))
    for batch in given[:10]:
        step(batch)
    torch.save({"model": ours.state_dict(), "step": step.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(loaded["model"])
    again = make(other)
    again.load_state_dict(loaded["step"])
    for batch in given[10:]:
        assert step(batch).direction == again(batch).direction
    assert_same(ours, other)
    assert step.optimizer.param_groups[0]["lr"] == again.optimizer.param_groups[0]["lr"] < 0.01
    step(given[0])
    assert step.window_open
    with pytest.raises(RuntimeError, match=r"a window of 2 batches is open: .*flush\(\)"):
        step.state_dict()
    assert step.flush().stepped and not step.window_open and step.flush() is None
    step.state_dict()


def test_bfloat16_and_float16_train_with_autocast():
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model, seen = TwoTasks(), []
        model.trunk.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.dtype))
        step = alternate(tasks_of(model), MAKE["sgd"](model.parameters()), amp=dtype, clip=1.0)
        losses = [step(batch).loss.item() for batch in batches(300)]
        assert set(seen) == {dtype}
        assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
        assert ("scale" in (step.state_dict()["scaler"] or {})) == (dtype == torch.float16)


@pytest.mark.parametrize("given", ["flushed", "two without rows"])
def test_a_window_is_the_mean_over_its_batches_that_had_rows(given):
    ours = TwoTasks()
    theirs = copy.deepcopy(ours)
    first, second = batches(2)
    step = alternate(
        tasks_of(ours),
        MAKE["sgd"](ours.parameters()),
        accumulate=4,
        rows_of=lambda task, batch: (0 if batch is None else 8, batch),
    )
    for batch in (first, second) if given == "flushed" else (None, first, None):
        assert not step(batch).stepped
    info = step.flush() if given == "flushed" else step(second)
    assert info.direction == "depth" and info.stepped and info.grad_norm > 0
    tasks_of(theirs)["depth"]({key: torch.cat([first[key], second[key]]) for key in first}).backward()
    MAKE["sgd"](theirs.parameters()).step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert step(first).direction == "class"


def test_a_batch_that_raises_counts_for_nothing():
    ours, smooth = TwoTasks(), TwoTasks()
    smooth.load_state_dict(ours.state_dict())
    make = lambda model: alternate(  # noqa: E731
        tasks_of(model), MAKE["adamw"](model.parameters()), DirectionSchedule.weighted(["depth", "class"], [1, 1], 2)
    )
    step, undisturbed = make(ours), make(smooth)
    for batch in batches(7):
        with pytest.raises(RuntimeError):
            step({**batch, "x": batch["x"][:, :3]})
        assert step(batch).direction == undisturbed(batch).direction
    assert step.batches == step.schedule.count == 7
    assert_same(ours, smooth)


def test_tasks_may_give_numbers_for_the_log():
    model = TwoTasks()
    loss = tasks_of(model)["depth"]
    give = lambda *log: alternate({"depth": lambda b: (loss(b), *log)}, MAKE["sgd"](model.parameters()))  # noqa: E731
    (batch,) = batches(1)
    info = give(1.5, torch.tensor(2.0, requires_grad=True))(batch)
    assert info.reg == 1.5 and info.cl == 2 and not info.cl.requires_grad
    assert give(None, None)(batch).reg is None
    with pytest.raises(ValueError, match="task 'depth' must give a scalar loss, or a tuple of it and two numbers"):
        give(1.5)(batch)
    with pytest.raises(ValueError, match="task 'depth' must give a scalar loss"):
        alternate({"depth": lambda b: model(b["x"], "depth")}, MAKE["sgd"](model.parameters()))(batch)


@pytest.mark.parametrize("kind", ["float16", "skip_nonfinite"])
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_says_so(kind):
    model = TwoTasks()
    optimizer = MAKE["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    options = {"amp": torch.float16} if kind == "float16" else {"skip_nonfinite": True}
    step = alternate(tasks_of(model), optimizer, lr_scheduler=scheduler, clip=1.0, **options)
    bad, good = batches(2)
    before = copy.deepcopy(model)
    info = step({**bad, "depth": bad["depth"] * torch.inf})
    assert not info.stepped and not info.grad_norm.isfinite() and optimizer.param_groups[0]["lr"] == 0.1
    assert_same(model, before)
    assert step(good).stepped and optimizer.param_groups[0]["lr"] == 0.05


# --- Experts without rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
def test_experts_without_rows_keep_weights_and_moments(kind):
    moe = mmbal.MoEMLP(4, 6, 5, top_k=2, activation="gelu")
    with torch.no_grad():  # experts 3 and 4 lose on positive inputs, 0 and 1 on negative ones
        moe.router.weight.copy_(torch.tensor([[1.0], [1.0], [0.0], [-1.0], [-1.0]]).expand(5, 4))
        moe.experts.b1.add_(torch.rand(5, 6))
    moe.router.requires_grad_(False)
    step = alternate(
        {"up": lambda x: moe(x.abs() + 0.1).square().sum(), "down": lambda x: moe(-x.abs() - 0.1).square().sum()},
        optimizer := MAKE[kind](moe.experts.parameters()),
        models=[moe],
    )
    for turn in range(6):
        before = copy.deepcopy(moe.experts)
        moments = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in moe.experts.parameters()])
        task = step(torch.randn(7, 4)).direction
        idle, busy = ([3, 4], [0, 1]) if task == "up" else ([0, 1], [3, 4])
        for p, old, state in zip(moe.experts.parameters(), before.parameters(), moments, strict=True):
            assert torch.equal(p[idle], old[idle]) and not torch.equal(p[busy], old[busy])
            for name, value in optimizer.state[p].items():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    kept = state[name][idle] if state.get(name) is not None else torch.zeros_like(value[idle])
                    assert torch.equal(value[idle], kept), (turn, name)


def test_experts_without_rows_move_where_that_is_asked_for():
    moe = mmbal.MoEMLP(4, 6, 3, top_k=1, activation="gelu", normalize=False)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[5.0], [0.0], [-5.0]]).expand(3, 4))
    step = alternate(
        {"up": lambda x: moe(x.abs()).square().sum()},
        MAKE["adamw"](moe.parameters()),
        models=[moe],
        idle_experts="move",
    )
    before = moe.experts.w1.detach().clone()
    step(torch.randn(7, 4))
    assert not torch.equal(moe.experts.w1[2], before[2])


def test_idle_experts_without_trained_biases_are_found_by_their_weights():
    moe = mmbal.MoEMLP(4, 6, 3, top_k=1, bias=False, normalize=False)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[5.0], [0.0], [-5.0]]).expand(3, 4))
    optimizer = MAKE["adamw"](moe.parameters())
    before = copy.deepcopy(moe.experts)
    moe(torch.rand(7, 4)).sum().backward()
    with idle_experts_untouched([moe.experts], optimizer):
        optimizer.step()
    assert torch.equal(moe.experts.w1[1:], before.w1[1:]) and not torch.equal(moe.experts.w1[0], before.w1[0])


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    model = TwoTasks()
    used = MAKE["adamw"](model.parameters())
    tasks_of(model)["depth"](next(batches(1))).backward()
    used.step()
    for message, options in {
        "accumulate must be an integer of at least 1, got 0": {"accumulate": 0},
        "clip must be greater than 0 or None, got 0": {"clip": 0},
        "amp must be torch.bfloat16, torch.float16 or None, got torch.float32": {"amp": torch.float32},
        "state must be one of shared, per_direction, got 'own'": {"state": "own"},
        "idle_experts must be one of keep, move, got 'drop'": {"idle_experts": "drop"},
        r"schedule must have tasks among \['depth', 'class'\], got \['colour'\]": {
            "schedule": DirectionSchedule.cycle(["colour"])
        },
        "state='per_direction' needs an optimizer that has not stepped yet": {"state": "per_direction"},
        "lr_scheduler must step without a metric, got ReduceLROnPlateau": {
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(used)
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            alternate(tasks_of(model), used, **options)
    shared, apart = (
        alternate(tasks_of(model), MAKE["sgd"](model.parameters()), state=state)
        for state in ("shared", "per_direction")
    )
    with pytest.raises(ValueError, match="the state has none of moments, other than this object"):
        apart.load_state_dict(shared.state_dict())
    moe = mmbal.MoEMLP(4, 6, 3, top_k=2)
    factored = torch.optim.Adafactor(moe.parameters())
    with pytest.raises(ValueError, match="idle_experts='keep' needs moments for each weight"):
        alternate({"up": moe}, factored, models=[moe])
    alternate({"up": moe}, factored, models=[moe], idle_experts="move")
