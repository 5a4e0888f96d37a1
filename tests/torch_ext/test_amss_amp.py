"""AMSS between the steps of a torch.amp.GradScaler, and before and after clipping."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbal import AMSS

NAMES, SCALE = ("audio", "video"), 1024.0
RHO = {"audio": 0.3, "video": 0.6}
LAYOUTS = pytest.mark.parametrize("options", [{}, {"plus": True}, {"unit": "element"}], ids=["amss", "plus", "element"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoders = nn.ModuleDict({name: nn.Linear(5, 16) for name in NAMES})
        self.heads = nn.ModuleDict({name: nn.Linear(16, 3) for name in NAMES})

    def forward(self, x):
        z = {name: self.encoders[name](x[name]).tanh() for name in NAMES}
        logits = {name: self.heads[name](z[name]) for name in NAMES}
        return logits["audio"] + logits["video"], {name: (logits[name], z[name]) for name in NAMES}


class Run:
    """A model, its optimizer and a scaler, batch by batch."""

    def __init__(self, dtype=torch.float16, optimizer=torch.optim.SGD, **options):
        self.model, self.dtype, self.batches = Model(), dtype, 0
        self.amss = AMSS(dict(self.model.encoders), seed=5, **options)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def backward(self, overflow=False):
        generator = torch.Generator().manual_seed(self.batches)
        self.batches += 1
        x = {name: torch.randn(8, 5, generator=generator) for name in NAMES}
        y = x["audio"].argmax(1) % 3
        with torch.autocast("cpu", self.dtype):
            out, outputs = self.model(x)
            assert out.dtype == self.dtype
        self.amss.observe(outputs, y)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(out.float(), y)
        self.scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()

    def update(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}

    @property
    def parameters(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def weights(self):
        """Gradients that AMSS manages."""
        return [self.model.encoders[name].weight.grad for name in NAMES]


def assert_same(a, b):
    """Bit for bit, NaN too."""
    for name in a:
        assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), name


@LAYOUTS
@DTYPES
def test_after_unscaling_the_gradients_of_the_loss_are_masked(dtype, options):
    run = Run(dtype, **options)
    run.backward()
    scaled = run.gradients
    run.scaler.unscale_(run.optimizer)
    whole, parameters = run.gradients, run.parameters
    assert_same({name: g * SCALE for name, g in whole.items()}, scaled)
    run.amss.step()
    for name in NAMES:
        masked, before = run.gradients[f"encoders.{name}.weight"], whole[f"encoders.{name}.weight"]
        kept = masked != 0
        share = kept.float().mean() if options.get("unit") == "element" else kept.any(1).float().mean()
        assert share == pytest.approx(run.amss.rho[name], abs=1 / 16)
        assert torch.equal(masked[kept] / before[kept] >= 1, torch.ones(int(kept.sum()), dtype=torch.bool))
        assert options.get("plus") or torch.equal(masked[kept], before[kept])
    others = {name: g for name, g in whole.items() if name not in [f"encoders.{name}.weight" for name in NAMES]}
    assert_same(others, run.gradients)
    applied = run.gradients
    run.update()
    for name, p in run.parameters.items():
        torch.testing.assert_close(p, parameters[name] - 0.1 * applied[name])
    assert run.amss.skipped == 0


@LAYOUTS
@DTYPES
def test_an_overflow_leaves_every_gradient_bit_for_bit_and_the_scaler_skips_and_goes_on(dtype, options):
    run = Run(dtype, **options)
    run.backward(overflow=True)
    run.scaler.unscale_(run.optimizer)
    gradients, parameters = run.gradients, run.parameters
    assert not all(g.isfinite().all() for g in run.weights)
    run.amss.step()
    assert_same(run.gradients, gradients)
    assert run.amss.skipped == 1 and run.amss.steps == 1
    run.update()
    assert_same(run.parameters, parameters)
    assert run.scaler.get_scale() == SCALE / 2
    run.backward()
    run.scaler.unscale_(run.optimizer)
    run.amss.step()
    run.update()
    assert run.amss.skipped == 1 and run.amss.steps == 2
    assert any((g == 0).any() for g in run.weights)
    moved = run.parameters
    assert all(p.isfinite().all() for p in moved.values()) and not torch.equal(
        moved["encoders.audio.weight"], parameters["encoders.audio.weight"]
    )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@LAYOUTS
def test_one_value_in_one_modality_that_is_not_finite_is_enough(value, options):
    run = Run(**options)
    run.backward()
    run.scaler.unscale_(run.optimizer)
    run.model.encoders["video"].weight.grad[-1, -1] = value
    gradients = run.gradients
    run.amss.step()
    assert_same(run.gradients, gradients)
    assert run.amss.skipped == 1


@LAYOUTS
def test_masks_before_unscaling_are_those_after_it(options):
    """The scale is a power of two, so that unscaling rounds nothing."""
    before, after = Run(**options), Run(**options)
    for run in (before, after):
        run.backward()
    before.amss.step()
    before.scaler.unscale_(before.optimizer)
    after.scaler.unscale_(after.optimizer)
    after.amss.step()
    assert_same(before.gradients, after.gradients)
    assert any((g == 0).any() for g in before.weights)


@pytest.mark.parametrize("where", ["grad", "update"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_attached_to_the_optimizer_it_does_what_step_does(optimizer, where):
    attached, called = (Run(optimizer=optimizer, plus=True, where=where) for _ in range(2))
    attached.amss.attach(attached.optimizer)
    if where == "update":
        called.amss.attach(called.optimizer, step=False)
    for _ in range(3):
        attached.backward()
        attached.update()
        called.backward()
        called.scaler.unscale_(called.optimizer)
        called.amss.step()
        called.update()
    assert_same(attached.parameters, called.parameters)
    assert attached.amss.steps == 3


@pytest.mark.parametrize("where", ["grad", "update"])
def test_attached_an_overflow_never_reaches_it_and_the_next_step_is_masked(where):
    run = Run(where=where)
    run.amss.attach(run.optimizer)
    parameters = run.parameters
    run.backward(overflow=True)
    run.update()
    assert_same(run.parameters, parameters)
    assert run.amss.steps == 0 and run.amss.skipped == 0
    run.backward()
    run.update()
    assert run.amss.steps == 1 and run.amss.last_stats["rows"] == 16
    kept = (run.parameters["encoders.audio.weight"] != parameters["encoders.audio.weight"]).any(1)
    assert 0 < kept.sum() < len(kept) and run.scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_where_update_an_overflow_leaves_the_parameters_and_the_next_step_is_masked(optimizer):
    """The scaler skips the optimizer's step, so that the copies of that step are never used."""
    run = Run(optimizer=optimizer, where="update")
    run.amss.attach(run.optimizer, step=False)
    run.backward()
    run.scaler.unscale_(run.optimizer)
    run.amss.step()
    run.update()
    parameters = run.parameters
    run.backward(overflow=True)
    run.scaler.unscale_(run.optimizer)
    run.amss.step()
    run.update()
    assert_same(run.parameters, parameters)
    run.backward()
    run.scaler.unscale_(run.optimizer)
    run.amss.step()
    run.update()
    kept = (run.parameters["encoders.audio.weight"] != parameters["encoders.audio.weight"]).any(1)
    assert 0 < kept.sum() < len(kept) and run.amss.skipped == 1


def test_an_overflow_does_not_enter_the_moving_averages():
    run = Run(ema=0.9)
    run.backward()
    run.scaler.unscale_(run.optimizer)
    run.amss.step()
    run.update()
    averages = {id: energy.clone() for id, energy in run.amss.state_dict()["energy"].items()}
    run.backward(overflow=True)
    run.scaler.unscale_(run.optimizer)
    run.amss.step()
    assert len(averages) == 2
    for id, energy in run.amss.state_dict()["energy"].items():
        assert torch.equal(energy, averages[id])


@pytest.mark.parametrize("fused", [torch.optim.SGD, torch.optim.Adam])
def test_a_fused_optimizer_that_unscales_by_itself_is_masked_too_and_skips(fused):
    run = Run(optimizer=lambda parameters, lr: fused(parameters, lr=lr, fused=True))
    run.amss.attach(run.optimizer)
    parameters = run.parameters
    run.backward(overflow=True)
    run.update()
    assert_same(run.parameters, parameters)
    run.backward()
    run.update()
    kept = (run.parameters["encoders.audio.weight"] != parameters["encoders.audio.weight"]).any(1)
    assert 0 < kept.sum() < len(kept)
    assert run.amss.steps == 2 and run.amss.skipped == 1  # such a step is taken, and does nothing


# --- Clipping ---------------------------------------------------------------------------------------------------------


def norm(gradients):
    return torch.stack([g.norm() for g in gradients.values()]).norm()


def unscaled(**options):
    run = Run(**options)
    run.backward()
    run.scaler.unscale_(run.optimizer)
    return run


@pytest.mark.parametrize("plus", [False, True])
def test_clipping_after_the_mask_bounds_the_norm_of_what_is_applied(plus):
    run, masked = unscaled(plus=plus), unscaled(plus=plus)
    masked.amss.step()
    run.amss.step()
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
    assert norm(run.gradients) == pytest.approx(0.1, rel=1e-4)
    for name, g in run.gradients.items():
        torch.testing.assert_close(g, masked.gradients[name] * (0.1 / norm(masked.gradients)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("plus", [False, True])
def test_clipping_before_the_mask_draws_the_same_mask_of_smaller_gradients(plus):
    run, masked = unscaled(plus=plus), unscaled(plus=plus)
    factor = 0.1 / norm(masked.gradients)
    masked.amss.step()
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
    run.amss.step()
    for name, g in run.gradients.items():
        torch.testing.assert_close(g, masked.gradients[name] * factor, rtol=1e-4, atol=0)
    assert abs(norm(run.gradients) - 0.1) > 1e-3


def test_clipping_first_keeps_amss_plus_unbiased_and_clipping_last_does_not():
    """Of the clipped gradient, on average over seeds."""
    run = unscaled(plus=True)
    gradients = run.gradients
    clipped = {name: g * (0.1 / norm(gradients)) for name, g in gradients.items()}
    name = "encoders.audio.weight"

    def mean(first, draws=400):
        total = torch.zeros_like(clipped[name])
        for seed in range(draws):
            for key, p in run.model.named_parameters():
                p.grad = gradients[key].clone()
            if first:
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            AMSS(dict(run.model.encoders), plus=True, seed=seed, rho=RHO).step()
            if not first:
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            total += run.gradients[name] / draws
        return (total * clipped[name]).sum() / clipped[name].square().sum()

    first, last = mean(True), mean(False)
    assert abs(first - 1) < 0.03 and abs(last - 1) > 0.08
