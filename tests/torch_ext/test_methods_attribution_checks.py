"""What AttributionRegularizer finds out about a model, a head and a call: mistakes that would be silent, whenever they
are made; heads and taps as scripts have them."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from mmbal import AttributionRegularizer, EmbeddingTap
from test_methods_attribution_models import NAMES, TAPPED, Model, batch, encoders, equal, gradients

F64 = {"dtype": torch.float64}


class Once(torch.autograd.Function):
    """A square whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return 2 * ctx.saved_tensors[0] * upstream


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(Once.apply(self.a(x)))


# --- Checks that nothing switches off ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 5])
def test_parameters_before_the_embeddings_are_refused_in_the_warm_up_too(warmup):
    model, (x, _) = Model(), batch()
    tap = EmbeddingTap(model, {"audio": "audio_net.2", "video": "video_net"})
    regularizer = AttributionRegularizer(tap, warmup_steps=warmup)
    with pytest.raises(ValueError, match="the embeddings of 'audio' depend on"):
        regularizer(logits=model(x))


def test_parameters_that_are_unfrozen_later_are_looked_at_again():
    model, (x, _) = Model(), batch()
    model.audio_net[0].requires_grad_(False)
    tap = EmbeddingTap(model, {"audio": "audio_net.2", "video": "video_net"})
    regularizer = AttributionRegularizer(tap)
    regularizer(logits=model(x))
    model.audio_net[0].requires_grad_(True)
    with pytest.raises(ValueError, match="the embeddings of 'audio' depend on"):
        regularizer(logits=model(x))


@pytest.mark.parametrize("own_graph", [True, False])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_missing_second_derivative_is_told_in_the_first_call_with_gradients(own_graph, warmup):
    model, (x, _) = Model(nn.Sequential(Squares())), batch()
    tap = EmbeddingTap(model, TAPPED)
    regularizer = AttributionRegularizer(tap, None if own_graph else model.head, warmup_steps=warmup)
    with torch.no_grad():
        if not own_graph:
            model(x)
            regularizer()
    with pytest.raises(RuntimeError, match="no second derivative"):
        regularizer(logits=model(x))


def test_a_call_that_fails_uses_up_no_step_of_the_warm_up():
    model, (x, _) = Model(), batch()
    tap = EmbeddingTap(model, TAPPED)
    regularizer = AttributionRegularizer(tap, warmup_steps=1)
    z = model(x)
    with pytest.raises(ValueError, match="present must be bool"):
        regularizer(logits=z, present=torch.ones(8, 2))
    assert regularizer.steps == 0 and not regularizer(logits=z)[0].requires_grad and regularizer.steps == 1


def test_a_parameter_that_encoder_and_head_share_is_refused():
    model, (x, _) = Model(nn.Linear(12, 6)), batch()
    model.video_net[1].weight = model.head.weight
    tap = EmbeddingTap(model, {"audio": "audio_net", "video": "video_net"})
    for regularizer in (
        AttributionRegularizer(tap, model.head),
        AttributionRegularizer(tap, model.head, mode="double"),
    ):
        model(x)
        with pytest.raises(ValueError, match="that encoder 'video' has too"):
            regularizer()


# --- Logits and embeddings of one step --------------------------------------------------------------------------------


class Pooling(nn.Module):
    """Encoders of tokens that the model pools itself."""

    def __init__(self):
        super().__init__()
        self.a, self.v, self.head = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, a, v):
        return self.head(torch.cat([self.a(a).mean(1), self.v(v)], 1))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_selected_tensor_that_the_model_does_not_go_on_with_is_told_once(frozen):
    model, a, v = Pooling(), torch.randn(8, 3, 5), torch.randn(8, 4)
    model.a.requires_grad_(not frozen)
    tap = EmbeddingTap(model, {"a": "a", "v": "v"}, select={"a": lambda tokens: tokens.mean(1)})
    regularizer = AttributionRegularizer(tap)
    with pytest.warns(UserWarning, match=r"do not depend on the embeddings of \['a'\]"):
        info = regularizer(logits=model(a, v))[1]
    assert info.mean() == {"a": 0.0, "v": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer(logits=model(a, v))


def test_logits_of_an_earlier_run_are_refused():
    model, (x, _), (other, _) = Model(), batch(), batch(seed=1)
    tap = EmbeddingTap(model, TAPPED)
    regularizer = AttributionRegularizer(tap)
    z = model(x)
    model(other)
    with pytest.raises(RuntimeError, match="logits must depend on the embeddings"):
        regularizer(logits=z)


def test_a_linear_head_refuses_other_logits_also_after_a_first_call_without_any():
    model, (x, _), (other, _) = Model(nn.Linear(12, 3)), batch(), batch(seed=1)
    tap = EmbeddingTap(model, TAPPED)
    regularizer = AttributionRegularizer(tap, model.head)
    z = model(x)
    regularizer(), regularizer(logits=z)
    model(other)
    with pytest.raises(ValueError, match="logits must be what head makes"):
        regularizer(logits=z)


def test_a_head_of_layers_warns_of_logits_that_are_not_its_own():
    class Exchanged(Model):
        def forward(self, x):
            audio, video = self.encode(x)
            return self.head(torch.cat([video, audio], -1))

    model, (x, _) = Exchanged(), batch()
    tap = EmbeddingTap(model, TAPPED)
    z = model(x)
    with pytest.warns(UserWarning, match="logits are not what head makes of the embeddings"):
        AttributionRegularizer(tap, model.head)(logits=z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AttributionRegularizer(tap, lambda a, v: model.head(torch.cat([v, a], -1)))(logits=z)
        right = Model(dropout=0.5)
        tap = EmbeddingTap(right, TAPPED)
        AttributionRegularizer(tap, right.head)(logits=right(x))  # dropout draws another mask: nothing can be compared


# --- Heads ------------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(12), spectral_norm(nn.Linear(12, 3))
        self.follow = nn.InstanceNorm1d(1, track_running_stats=True)

    def fuse(self, audio, video):
        h = self.norm(torch.cat([audio, video], 1))
        return self.out(self.follow(h.unsqueeze(1)).squeeze(1))

    forward = fuse


@pytest.mark.parametrize("kind", ["module", "method", "function"])
def test_statistics_of_a_head_are_left_alone_however_it_is_given(kind):
    head, (x, _) = Normed(), batch()
    e = dict(zip(NAMES, (t.detach() for t in Model().encode(x)), strict=True))
    with torch.no_grad():
        head(*e.values())
    before = copy.deepcopy(head.state_dict())
    given = {"module": head, "method": head.fuse, "function": lambda *e: head(*e)}[kind]
    value, _ = AttributionRegularizer(NAMES, given, parameters=head.parameters())(e)
    value.backward()
    after = head.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and head.training and head.norm.training
    assert value.item() == AttributionRegularizer(NAMES, head)(e)[0].item()


def test_a_function_runs_in_the_dtype_of_its_parameters():
    model, (x, _) = Model(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        e = dict(zip(NAMES, model.encode(x), strict=True))
    assert e["audio"].dtype == torch.bfloat16
    function = AttributionRegularizer(
        NAMES, lambda *e: model.head(torch.cat(e, 1)), parameters=model.head.parameters()
    )(e)
    assert torch.equal(function[1].shares, AttributionRegularizer(NAMES, model.head)(e)[1].shares)


@pytest.mark.parametrize("seed", range(5))
def test_logits_of_autocast_that_were_widened_are_the_heads(seed):
    torch.manual_seed(seed)
    head, e = nn.Linear(512, 10), {name: torch.randn(256, 256) for name in NAMES}
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.cat(list(e.values()), 1)).float()
    regularizer = AttributionRegularizer(NAMES, head)
    assert regularizer(e, logits)[0].item() == pytest.approx(regularizer(e)[0].item(), rel=2e-2)
    with pytest.raises(ValueError, match="logits must be what head makes of these embeddings"):
        AttributionRegularizer(NAMES, head)(e, nn.functional.dropout(logits, 0.1))


def test_a_head_may_change_its_dtype_after_the_regulariser_was_made():
    for head in (nn.Linear(12, 3), Model().head):
        regularizer = AttributionRegularizer(NAMES, head)
        e = dict(zip(NAMES, Model().encode(batch()[0]), strict=True))
        single = regularizer(e)[0]
        head.double()
        assert regularizer(e)[0].dtype == torch.float64
        assert regularizer(e)[0].item() == pytest.approx(single.item(), rel=1e-5)


def test_a_sequential_with_a_forward_of_its_own_gets_the_embeddings():
    class Pair(nn.Sequential):
        def forward(self, audio, video):
            return super().forward(audio * video)

    e = dict(zip(NAMES, Model().encode(batch()[0]), strict=True))
    assert AttributionRegularizer(NAMES, Pair(nn.Linear(6, 3)))(e)[0].item() >= 0


@pytest.mark.parametrize("tied", ["weight", "bias"])
def test_linear_heads_that_share_a_parameter_have_the_sum_of_its_gradients(tied):
    torch.manual_seed(0)
    head = nn.ModuleDict({name: nn.Linear(6, 3) for name in NAMES}).double()
    setattr(head["video"], tied, getattr(head["audio"], tied))
    e = {name: torch.randn(9, 6, **F64) for name in NAMES}
    found = []
    for mode in ("auto", "double"):
        head.zero_grad()
        AttributionRegularizer(NAMES, head, mode=mode)(e)[0].backward()
        found.append(gradients(head))
    assert equal(*found)
    with pytest.raises(ValueError, match="no parameter of which is tied"):
        AttributionRegularizer(NAMES, head, mode="closed")


def test_one_output_takes_labels_of_two_classes():
    e = {name: torch.randn(6, 4) for name in NAMES}
    regularizer, y = AttributionRegularizer(NAMES, nn.Linear(8, 1)), torch.tensor([0, 1, 1, 0, 1, 0])
    assert torch.equal(regularizer(e, target=y)[0], regularizer(e)[0])
    double = AttributionRegularizer(NAMES, nn.Sequential(nn.Linear(8, 1)))
    assert torch.equal(double(e, target=y)[0], double(e)[0])


@pytest.mark.parametrize("mode", ["closed", "double"])
def test_a_single_class_that_masking_leaves_has_the_attribution_of_its_logit(mode):
    torch.manual_seed(0)
    head, e = nn.Linear(8, 3, **F64), {name: torch.randn(5, 4, **F64) for name in NAMES}
    with torch.no_grad():
        head.bias[1:] = -torch.inf
    value, info = AttributionRegularizer(NAMES, head, mode=mode)(e)
    logit = AttributionRegularizer(NAMES, head, mode=mode, score="logit")(e)
    assert torch.allclose(info.shares, logit[1].shares) and value.item() == pytest.approx(logit[0].item())
    value.backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad[0].any()


@pytest.mark.parametrize("act", [nn.SELU(), nn.ELU(0.5)])
def test_difference_refuses_units_whose_slope_jumps(act):
    e = {name: torch.randn(5, 4) for name in NAMES}
    with pytest.raises(ValueError, match="mode must not be 'difference' where the head has kinks, got Elu"):
        AttributionRegularizer(NAMES, nn.Sequential(nn.Linear(8, 6), act, nn.Linear(6, 3)), mode="difference")(e)


@pytest.mark.parametrize("act", [nn.ELU(), nn.CELU(0.5)])
def test_difference_takes_units_that_are_smooth_once(act):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 6), act, nn.Linear(6, 3)).double()
    e, found = {name: torch.randn(5, 4, **F64) for name in NAMES}, []
    for mode in ("double", "difference"):
        head.zero_grad()
        AttributionRegularizer(NAMES, head, mode=mode)(e)[0].backward()
        found.append(torch.cat([g.flatten() for g in gradients(head) if g is not None]))
    assert (found[0] - found[1]).abs().max() < 2e-3 * found[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [2, 20, 120])
def test_difference_holds_for_sure_decisions(dtype, margin):
    torch.manual_seed(4)
    head, e = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)).double(), torch.randn(9, 8, **F64)
    with torch.no_grad():
        top = head(e).topk(2).values
        head[2].weight *= margin / (top[:, 0] - top[:, 1]).median()
    head, found = head.to(dtype), []
    for mode in ("double", "difference"):
        head.zero_grad()
        AttributionRegularizer(NAMES, head, mode=mode)(list(e.to(dtype).split(4, 1)))[0].backward()
        found.append(torch.cat([g.flatten() for g in gradients(head) if g is not None]))
    assert (found[0] - found[1]).norm() < 1.5e-3 * found[0].norm()


def test_difference_refuses_a_head_of_16_bits():
    e = {name: torch.randn(5, 4) for name in NAMES}
    with pytest.raises(ValueError, match="mode 'difference' needs a head in float32, got torch.bfloat16"):
        AttributionRegularizer(NAMES, nn.Sequential(nn.Linear(8, 3)).bfloat16(), mode="difference")(e)


def test_no_masks_are_no_masks():
    e = {name: torch.randn(5, 4) for name in NAMES}
    assert AttributionRegularizer(NAMES, nn.Linear(8, 3), mode="closed")(e, masks={})[0].requires_grad


# --- A separate optimiser ---------------------------------------------------------------------------------------------


def test_a_separate_optimiser_of_the_head_takes_its_step_after_that_of_the_task():
    """As the class describes it; against both steps by hand."""
    results = []
    for by_hand in (False, True):
        model, (x, y) = Model().double(), batch(dtype=torch.float64)
        tap = EmbeddingTap(model, TAPPED)
        regularizer = AttributionRegularizer(tap, model.head)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        of_shares = torch.optim.SGD(model.head.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if not by_hand:
                of_shares.zero_grad()
                regularizer.backward(regularizer()[0])
                of_shares.step()
                continue
            e = [t.detach().requires_grad_() for t in tap.embeddings.values()]
            z = model.head(torch.cat(e, 1))
            c = z.argmax(1, keepdim=True)
            s = z.gather(1, c)[:, 0] - z.scatter(1, c, -torch.inf).logsumexp(1)
            g = torch.autograd.grad(s.sum(), e, create_graph=True)
            a = torch.stack([(one * other.detach()).norm(dim=1) for one, other in zip(g, e, strict=True)], 1)
            value = (a / a.sum(1, keepdim=True) - 0.5).abs().sum(1).mean()
            found = torch.autograd.grad(value, list(model.head.parameters()), allow_unused=True)
            with torch.no_grad():
                for p, gradient in zip(model.head.parameters(), found, strict=True):
                    p -= 0 if gradient is None else 0.05 * gradient
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_task_can_be_clipped_before_the_value_is_added():
    model, (x, y) = Model(), batch()
    tap = EmbeddingTap(model, TAPPED)
    z = model(x)
    value, _ = AttributionRegularizer(tap, model.head)(logits=z)
    (100 * nn.functional.cross_entropy(z, y)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    clipped = gradients(model.head)
    AttributionRegularizer.backward(AttributionRegularizer(tap, model.head), value, 0.5)
    alone = torch.autograd.grad(
        AttributionRegularizer(tap, model.head)(tap.embeddings)[0], list(model.head.parameters()), allow_unused=True
    )
    assert norm > 1
    for now, task, own in zip(gradients(model.head), clipped, alone, strict=True):
        torch.testing.assert_close(now, task + (0 if own is None else 0.5 * own), rtol=1e-5, atol=1e-7)


# --- Taps -------------------------------------------------------------------------------------------------------------


def test_a_tapped_model_can_be_copied_and_saved_in_the_middle_of_a_step():
    model, (x, _) = Model(), batch()
    tap = EmbeddingTap(model, TAPPED)
    z = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other(x), z)
    copied = copy.deepcopy(AttributionRegularizer(tap))
    assert torch.equal(copied.tap.model(x), z)
    value, _ = copied(logits=copied.tap.model(x))
    value.backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in copied.tap.model.parameters())


def test_a_copy_of_the_model_that_runs_between_does_not_matter():
    model, (x, _), (other, _) = Model(), batch(), batch(seed=1)
    tap = EmbeddingTap(model, TAPPED)
    averaged = AveragedModel(model)
    z = model(x)
    expected = AttributionRegularizer(tap)(logits=z)[1]
    averaged(other)
    with torch.no_grad():
        averaged(other)
    assert torch.equal(AttributionRegularizer(tap)(logits=z)[1].shares, expected.shares)


@pytest.mark.parametrize("own_graph", [True, False])
def test_frozen_encoders_in_a_checkpointed_region(own_graph):
    class Checkpointed(Model):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    found = []
    for kind in (Model, Checkpointed):
        model, (x, y) = kind(), batch()
        model.audio_net.requires_grad_(False), model.video_net.requires_grad_(False)
        tap = EmbeddingTap(model, TAPPED)
        z = model(x)
        value, _ = AttributionRegularizer(tap, None if own_graph else model.head)(logits=z)
        (nn.functional.cross_entropy(z, y) + value).backward()
        found.append(gradients(model.head))
    assert equal(*found)


def test_encoders_under_no_grad_are_tapped_as_frozen_ones():
    class Frozen(Model):
        def forward(self, x):
            with torch.no_grad():
                e = self.encode(x)
            return self.head(torch.cat(e, -1))

    found = []
    for kind in (Model, Frozen):
        model, (x, _) = kind(), batch()
        tap = EmbeddingTap(model, TAPPED)
        value, info = AttributionRegularizer(tap)(logits=model(x))
        value.backward()
        found.append([*gradients(model.head), info.shares])
        assert all(p.grad is None for p in encoders(model))
    assert equal(*found)
