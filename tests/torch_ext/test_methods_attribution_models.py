"""The regulariser of attributions in models and training scripts: what it must not touch, precision, and what has no
second derivative.

Letters: B samples, M modalities, C classes.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import mmbal
from mmbal import AttributionRegularizer, EmbeddingTap

F64 = {"dtype": torch.float64}
NAMES = ["audio", "video"]
TAPPED = {"audio": "audio_net", "video": "video_net.1"}


class Model(nn.Module):
    """Two encoders, dropout or not, and a head of two layers."""

    def __init__(self, head=None, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.audio_net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
        self.video_net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
        hidden = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Dropout(dropout), nn.Linear(10, 3))
        self.head = hidden if head is None else head

    def encode(self, x):
        return self.audio_net(x["audio"]), self.video_net(x["video"])

    def forward(self, x):
        return self.head(torch.cat(self.encode(x), -1))


def batch(B=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = {"audio": torch.randn(B, 5, generator=generator), "video": torch.randn(B, 3, 4, generator=generator)}
    return {n: t.to(dtype) for n, t in x.items()}, x["audio"][:, :3].argmax(1)


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def encoders(model):
    return [*model.audio_net.parameters(), *model.video_net.parameters()]


def variants(model):
    """Every way to get at the gradient of one and the same regulariser: {name: regularizer}."""
    tap = EmbeddingTap(model, TAPPED)
    made = {"own graph": AttributionRegularizer(tap)}
    for mode in ("double", "forward", "difference"):
        made[mode] = AttributionRegularizer(tap, model.head, mode=mode)
    return made


# --- Only the head is trained -----------------------------------------------------------------------------------------


def test_the_own_graph_and_a_second_pass_of_the_head_have_the_same_gradients():
    model = Model().double()
    x, _ = batch(**F64)
    found = {}
    for name, regularizer in variants(model).items():
        model.zero_grad()
        logits = model(x)
        value, _ = regularizer(logits=logits)
        regularizer.backward(value, 0.5)
        found[name] = gradients(model.head)
        assert all(p.grad is None for p in encoders(model)), name
        model.zero_grad()
        logits.sum().backward()  # the model's graph is still there
    assert equal(found["own graph"], found["double"])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found["double"], found["forward"], strict=True))


@pytest.mark.parametrize("name", ["own graph", "double", "forward", "difference", "closed"])
def test_adding_the_value_to_the_loss_leaves_the_gradients_of_encoders_bit_for_bit(name):
    model = Model(nn.Linear(12, 3) if name == "closed" else None)
    regularizer = AttributionRegularizer(EmbeddingTap(model, TAPPED), model.head) if name == "closed" else None
    regularizer = regularizer or variants(model)[name]
    x, y = batch()
    logits = model(x)
    F.cross_entropy(logits, y).backward(retain_graph=True)
    plain, alone = [p.grad.clone() for p in encoders(model)], gradients(model.head)
    model.zero_grad()
    logits = model(x)
    value, _ = regularizer(logits=logits)
    (F.cross_entropy(logits, y) + 3 * value).backward()
    assert equal(plain, [p.grad for p in encoders(model)])
    together = gradients(model.head)
    model.zero_grad()
    regularizer.backward(regularizer(logits=model(x))[0], torch.tensor(3.0))
    assert all(p.grad is None for p in encoders(model))
    for a, b, both in zip(alone, gradients(model.head), together, strict=True):
        assert torch.allclose(a + b, both, atol=1e-7)


def test_parameters_before_the_embeddings_are_refused():
    model = Model()
    tap = EmbeddingTap(model, {"audio": "audio_net.2", "video": "video_net"})  # audio_net.0 looks like head
    message = r"parameters must be the head's alone, got one \[\d+.*\] that the embeddings of 'audio' depend on"
    with pytest.raises(ValueError, match=message):
        AttributionRegularizer(tap)(logits=model(batch()[0]))
    with EmbeddingTap(model, {"audio": "audio_net.2", "video": "video_net"}, parameters=model.head.parameters()) as tap:
        regularizer = AttributionRegularizer(tap)
        regularizer.backward(regularizer(logits=model(batch()[0]))[0])
    assert all(p.grad is None for p in encoders(model)) and model.head[0].weight.grad.any()


def test_frozen_parameters_get_none_and_the_others_theirs():
    model = Model()
    model.head[0].requires_grad_(False)
    for regularizer in variants(model).values():
        model.zero_grad()
        regularizer.backward(regularizer(logits=model(batch()[0]))[0])
        assert [p.grad is None for p in model.head.parameters()] == [True, True, False, False]
    model.requires_grad_(False)
    value, info = AttributionRegularizer(NAMES, model.head)(model.encode(batch()[0]))
    assert not value.requires_grad and value > 0 and info.shares.shape == (8, 2)


def test_a_value_cannot_be_differentiated_twice():
    model = Model()
    value, _ = AttributionRegularizer(EmbeddingTap(model, TAPPED))(logits=model(batch()[0]))
    weight = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(weight * value, model.head[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("own_graph", [False, True])
def test_training_moves_the_shares_and_leaves_frozen_encoders_bit_for_bit(frozen, own_graph):
    """Two Gaussian modalities, one with 5 times the signal."""
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(3, (256,), generator=generator)
    hot = F.one_hot(y, 3).float()
    x = {"audio": torch.randn(256, 5, generator=generator), "video": torch.randn(256, 12, generator=generator)}
    x["audio"][:, :3] += 5 * hot
    x["video"][:, :3] += hot
    shares = {}
    for weight in (0.0, 1.0):
        model = Model()
        for p in encoders(model):
            p.requires_grad_(not frozen)
        before = [p.detach().clone() for p in encoders(model)]
        tap = EmbeddingTap(model, TAPPED)
        regularizer = AttributionRegularizer(tap, None if own_graph else model.head)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(100):
            rows = torch.arange(64) + 64 * (step % 4)
            logits = model({n: t[rows] for n, t in x.items()})
            value, _ = regularizer(logits=logits)
            optimizer.zero_grad()
            (F.cross_entropy(logits, y[rows]) + weight * value).backward()
            optimizer.step()
        assert equal(before, encoders(model)) == frozen
        with torch.no_grad():
            shares[weight] = mmbal.attribution_shares(dict(zip(NAMES, model.encode(x), strict=True)), head=model.head)
    plain, regularised = (shares[w].mean()["audio"] for w in (0.0, 1.0))
    assert abs(regularised - 0.5) < abs(plain - 0.5) - 0.02


# --- In a training script ---------------------------------------------------------------------------------------------


def test_warm_up_and_its_state():
    model = Model()
    regularizer = AttributionRegularizer(NAMES, model.head, warmup_steps=2)
    e = model.encode(batch()[0])
    for _ in range(2):
        with torch.no_grad():
            assert regularizer(e)[0] > 0  # evaluation does not count
        value, info = regularizer(e)
        assert value.item() == 0 and not value.requires_grad and info.shares.shape == (8, 2)
        regularizer.backward(value)  # nothing to do, no error
    later = AttributionRegularizer(NAMES, model.head, warmup_steps=2)
    later.load_state_dict(regularizer.state_dict())
    for each in (regularizer, later):
        value, _ = each(e)
        assert value.item() > 0 and value.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("head", [nn.Linear(12, 3), None])
def test_evaluation_without_gradients(mode, head):
    model = Model(head)
    x, _ = batch()
    expected = mmbal.attribution_shares(dict(zip(NAMES, model.encode(x), strict=True)), head=model.head)
    tap = EmbeddingTap(model, TAPPED)
    regularizer = AttributionRegularizer(tap, model.head)
    with mode():
        logits = model(x)
        value, info = regularizer(logits=logits)
        assert torch.allclose(mmbal.attribution_shares(tap, head=model.head).shares, expected.shares)
    assert not value.requires_grad and torch.allclose(info.shares, expected.shares) and info.modalities == NAMES
    with mode(), pytest.raises(RuntimeError, match="without head it needs the graph"):
        AttributionRegularizer(tap)(logits=model(x))


def test_the_random_numbers_and_the_batch_norms_of_the_model_are_left_alone():
    hidden = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 3))
    model = Model(hidden)
    e = [t.detach() for t in model.encode(batch()[0])]
    state, kept = torch.get_rng_state(), copy.deepcopy(hidden.state_dict())
    found = []
    for mode in ("double", "forward"):
        hidden.zero_grad()
        regularizer = AttributionRegularizer(NAMES, hidden, mode=mode)
        regularizer.backward(regularizer(e)[0])
        found.append(gradients(hidden))
    assert torch.equal(state, torch.get_rng_state()) and hidden[1].training
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), hidden.state_dict().values(), strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))  # the same mask in every pass


@pytest.mark.parametrize("head", [nn.Linear(12, 3), None])
def test_autocast_changes_neither_shares_nor_gradients_of_a_head(head):
    model = Model(head)
    e = [t.detach() for t in model.encode(batch()[0])]
    regularizer = AttributionRegularizer(NAMES, model.head)
    value, info = regularizer(e)
    regularizer.backward(value)
    expected = gradients(model.head)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        value, inside = regularizer(e)
        regularizer.backward(value)
    assert torch.equal(info.shares, inside.shares) and equal(expected, gradients(model.head))


@pytest.mark.parametrize(("own_graph", "head"), [(False, None), (True, None), (False, nn.Linear(12, 3))])
def test_a_training_step_under_autocast_with_a_scaler(own_graph, head):
    model = Model(head)
    tap = EmbeddingTap(model, TAPPED)
    regularizer = AttributionRegularizer(tap, None if own_graph else model.head)
    x, y = batch()
    exact, _ = regularizer(logits=model(x))
    regularizer.backward(exact)
    expected = gradients(model.head)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        value, _ = regularizer(logits=logits)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), abs=0.02)
    scaler.scale(0 * loss + value).backward()
    scaler.unscale_(optimizer)
    a, b = (torch.cat([g.flatten() for g in of]) for of in (gradients(model.head), expected))
    assert F.cosine_similarity(a, b, 0) > 0.98
    scaler.step(optimizer)


def replica_gradients(rank):
    """Of a replica that trains on its half of the rows."""
    model = Model()
    regularizer = AttributionRegularizer(EmbeddingTap(model, TAPPED))
    parallel = nn.parallel.DistributedDataParallel(model)
    x, y = batch()
    rows = slice(4 * rank, 4 * rank + 4)
    logits = parallel({n: t[rows] for n, t in x.items()})
    (F.cross_entropy(logits, y[rows]) + regularizer(logits=logits)[0]).backward()
    return gradients(model)


def ddp_gradients(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(replica_gradients(rank), f"{store}.{rank}")
    dist.barrier()  # neither leaves while the other still talks to it, nor a replica lives on without its group
    dist.destroy_process_group()


def test_two_replicas_have_the_gradient_of_the_whole_batch(tmp_path):
    store = tmp_path / "store"
    torch.multiprocessing.spawn(ddp_gradients, (store,), nprocs=2)
    model = Model()
    regularizer = AttributionRegularizer(EmbeddingTap(model, TAPPED), model.head)
    x, y = batch()
    logits = model(x)
    (F.cross_entropy(logits, y) + regularizer(logits=logits)[0]).backward()
    for rank in (0, 1):
        for a, b in zip(torch.load(f"{store}.{rank}"), gradients(model), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_ddp_takes_step_after_step_and_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        x, y = batch()
        regularizer = AttributionRegularizer(EmbeddingTap(model, TAPPED))
        value, _ = regularizer(logits=model(x))
        (F.cross_entropy(model(x), y) + value).backward()
        expected = gradients(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        assert AttributionRegularizer(NAMES, nn.parallel.DistributedDataParallel(model.head))._alone.head is model.head
        for _ in range(2):
            model.zero_grad()
            logits = parallel(x)
            value, _ = regularizer(logits=logits)
            (F.cross_entropy(logits, y) + value).backward()
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, gradients(model), strict=True))
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Linear(12, 3)
        sharded.weight = nn.Parameter(distribute_tensor(sharded.weight.detach(), mesh))
        with pytest.raises(NotImplementedError, match="must not be sharded"):
            AttributionRegularizer(NAMES, sharded)(model.encode(x))
    finally:
        dist.destroy_process_group()


# --- Heads without a second derivative --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Tokens [B, T, D] of both modalities attend to each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, audio, video):
        q, k, v = self.qkv(torch.cat([audio, video], 1)).chunk(3, -1)
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).mean(1))


def test_fused_attention():
    head = Attention().double()
    e = [torch.randn(4, 3, 8, requires_grad=True, **F64), torch.randn(4, 5, 8, requires_grad=True, **F64)]
    own = AttributionRegularizer(NAMES, parameters=head.parameters())
    with pytest.raises(RuntimeError, match=r"ScaledDotProductFlash\w* has no second derivative: call the model under"):
        own(e, head(*e))
    with sdpa_kernel(SDPBackend.MATH):
        own.backward(own(e, head(*e))[0])
    expected = gradients(head)
    with pytest.raises(RuntimeError, match="needs forward AD of every operator"):  # softmax is one that has none
        AttributionRegularizer(NAMES, head, mode="forward")(e)
    for mode, tolerance in (("auto", 1e-12), ("difference", 1e-3)):
        head.zero_grad()
        regularizer = AttributionRegularizer(NAMES, head, mode=mode)
        regularizer.backward(regularizer(e)[0])
        for a, b in zip(gradients(head), expected, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)


def test_fused_attention_of_encoders_does_not_matter():
    encoder = nn.MultiheadAttention(6, 2, batch_first=True)
    head = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(4, 5, 6)
    audio, video, beside = (encoder(x + i, x + i, x + i, need_weights=False)[0].mean(1) for i in range(3))
    logits = head(torch.cat([audio, video], 1) + torch.cat([beside, beside], 1))
    regularizer = AttributionRegularizer(NAMES, parameters=head.parameters())
    value, _ = regularizer([audio, video], logits)
    regularizer.backward(value)
    assert encoder.in_proj_weight.grad is None and head[0].weight.grad.any()


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_layer_as_head(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=norm_first, **F64)
    out = nn.Linear(8, 3, **F64)

    def head(audio, video):
        return out(layer(torch.cat([audio, video], 1)).mean(1))

    parameters = [*layer.parameters(), *out.parameters()]
    e, found = [torch.randn(4, 3, 8, **F64), torch.randn(4, 5, 8, **F64)], []
    for mode in ("double", "difference"):
        for p in parameters:
            p.grad = None
        regularizer = AttributionRegularizer(NAMES, head, parameters=parameters, mode=mode)
        regularizer.backward(regularizer(e)[0])
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert (found[0] - found[1]).abs().max() < 1e-3 * found[0].abs().max()


def test_compiled_heads():
    model = Model()
    e = model.encode(batch()[0])
    expected = AttributionRegularizer(NAMES, model.head)
    expected.backward(expected(e)[0])
    found = gradients(model.head)
    compiled = torch.compile(model.head, backend="aot_eager")
    model.zero_grad()
    regularizer = AttributionRegularizer(NAMES, compiled)
    regularizer.backward(regularizer(e)[0])
    assert equal(found, gradients(model.head))
    own = AttributionRegularizer(NAMES, parameters=model.head.parameters())
    with pytest.raises(RuntimeError, match="compiled graph, which has no second derivative"):
        own(e, compiled(torch.cat(e, 1)))
    whole = torch.compile(model, backend="aot_eager")
    tap = EmbeddingTap(model, TAPPED)
    with pytest.raises(RuntimeError, match="compiled graph, which has no second derivative"):
        AttributionRegularizer(tap)(logits=whole(batch()[0]))


def test_it_is_not_called_inside_a_compiled_function():
    model = Model()
    regularizer = AttributionRegularizer(NAMES, model.head)

    @torch.compile(backend="eager", fullgraph=True)
    def step(x):
        return regularizer(model.encode(x))[0]

    with pytest.raises(Exception, match="call it outside of torch.compile"):
        step(batch()[0])


@pytest.mark.parametrize("own_graph", [False, True])
def test_checkpointing(own_graph):
    class Checkpointed(nn.Module):
        def __init__(self, part, reentrant):
            super().__init__()
            self.part, self.reentrant = part, reentrant

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=self.reentrant)

    model = Model()
    e = model.encode(batch()[0])

    def run(reentrant):
        head = Checkpointed(model.head, reentrant)
        given = {"parameters": model.head.parameters()}
        if own_graph:
            return AttributionRegularizer(NAMES, **given)(e, head(torch.cat(e, 1)))
        return AttributionRegularizer(NAMES, lambda *x: head(torch.cat(x, 1)), **given)(e)

    plain = AttributionRegularizer(NAMES, model.head)
    plain.backward(plain(e)[0])
    expected = gradients(model.head)
    model.zero_grad()
    plain.backward(run(False)[0])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(expected, gradients(model.head), strict=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False does"):
        run(True)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0] * dy


def test_operators_without_the_derivative_that_a_route_needs():
    layer, e = nn.Linear(12, 3, **F64), [torch.randn(4, 6, **F64), torch.randn(4, 6, **F64)]
    found = []
    for function in (Once.apply, torch.square):
        regularizer = AttributionRegularizer(
            NAMES, lambda *x, f=function: f(layer(torch.cat(x, 1))), parameters=layer.parameters(), mode="difference"
        )
        layer.zero_grad()
        regularizer.backward(regularizer(e)[0])
        found.append(gradients(layer))
    assert equal(*found)
    for mode, score, message in (
        ("double", "odds", "has no second derivative"),
        ("double", "logit", "has no second derivative"),
        ("forward", "odds", "needs forward AD of every operator"),
    ):
        regularizer = AttributionRegularizer(
            NAMES,
            lambda *x: Once.apply(layer(torch.cat(x, 1))),
            parameters=layer.parameters(),
            mode=mode,
            score=score,
        )
        with pytest.raises(RuntimeError, match=message):
            regularizer(e)
    silu = nn.Sequential(nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 3)).double()
    with pytest.raises(RuntimeError, match=r"needs forward AD .*silu_backward.*: take mode='double'"):
        AttributionRegularizer(NAMES, silu, mode="forward")(e)
    assert AttributionRegularizer(NAMES, silu)(e)[0].requires_grad
