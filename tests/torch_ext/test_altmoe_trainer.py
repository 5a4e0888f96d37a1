"""AlternatingTrainer: against a loop written by hand, what it leaves out, recalls, two views of a latent end to end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmbal
from mmbal import AlignLoss, AlternatingTrainer, ConnectorOut, DirectionSchedule, MoEConnector, TargetOut
from mmbal.altmoe.retrieval import positives_of, recalls
from oracles import assert_near

AB, BA = ("a", "b"), ("b", "a")
DIMS = {"a": 5, "b": 7}


class LinearConnector(nn.Module):
    """The least that can be trained: two matrices a direction, one shared in between."""

    directions = (AB, BA)

    def __init__(self):
        super().__init__()
        self.source = nn.ModuleDict({name: nn.Linear(dim, 6) for name, dim in DIMS.items()})
        self.shared = nn.Linear(6, 6)
        self.reg = nn.ModuleDict({name: nn.Linear(6, dim) for name, dim in DIMS.items()})
        self.aim = nn.ModuleDict({name: nn.Linear(dim, 6) for name, dim in DIMS.items()})

    def forward(self, x, src, tgt, mask=None):
        h = self.shared(self.source[src](x))
        return ConnectorOut(self.reg[tgt](h), h, ())

    def target(self, y, tgt, mask=None, detach=True):
        return TargetOut(y, self.aim[tgt](y))


def data(rows=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 4, generator=generator)
    return {name: z @ torch.randn(4, dim, generator=generator) for name, dim in DIMS.items()}


def small(**options):
    return MoEConnector(DIMS, **{"hidden": 8, "num_experts": 4, "top_k": 2, "dropout": 0.0} | options)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_linear_connector_trains_as_in_a_loop_written_by_hand_bit_for_bit(steps, clip):
    ours = LinearConnector()
    theirs = copy.deepcopy(ours)
    trainer = AlternatingTrainer(ours, sgd(ours), DirectionSchedule.cycle([AB, BA], steps), clip=clip)
    optimizer = sgd(theirs)
    for i in range(8):
        batch = data(seed=i)
        info = trainer.step(batch)
        src, tgt = (AB, BA)[i // steps % 2]
        h = theirs.shared(theirs.source[src](batch[src]))
        loss, _, _ = mmbal.alignment.align_loss(theirs.reg[tgt](h), batch[tgt], h, theirs.aim[tgt](batch[tgt]))
        idle = copy.deepcopy([theirs.source[tgt], theirs.reg[src], theirs.aim[src]])
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
        assert info.direction == (src, tgt) and torch.equal(info.loss, loss.detach())
        assert_same(ours, theirs)
        for before, after in zip(idle, (ours.source[tgt], ours.reg[src], ours.aim[src]), strict=True):
            assert_same(before, after)


@pytest.mark.parametrize("preset", ["code", "v6"])
def test_a_connector_trains_as_in_a_loop_written_by_hand_bit_for_bit(preset):
    ours = small(preset=preset, dropout=0.2)
    theirs = copy.deepcopy(ours)
    weights = {AB: 1.0, BA: 0.5}
    trainer = AlternatingTrainer(ours, sgd(ours), weights=weights, loss=AlignLoss(tau=0.1), idle_experts="move")
    optimizer, loss = sgd(theirs), AlignLoss(tau=0.1)
    for i in range(6):
        batch, (src, tgt) = data(seed=i), (AB, BA)[i % 2]
        torch.manual_seed(i)
        trainer.step(batch)
        torch.manual_seed(i)
        optimizer.zero_grad()
        found = loss(theirs(batch[src], src, tgt), theirs.target(batch[tgt], tgt))
        (weights[src, tgt] * found.loss).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        assert_same(ours, theirs)


def test_heads_of_other_directions_stay_bit_for_bit_with_momentum_and_decay():
    connector = MoEConnector({**DIMS, "c": 3}, hidden=8, num_experts=4, top_k=2)
    trainer = AlternatingTrainer(connector, torch.optim.AdamW(connector.parameters(), lr=0.1, weight_decay=0.5))
    batch = data() | {"c": torch.randn(12, 3)}
    for _ in range(8):
        before = copy.deepcopy(connector)
        src, tgt = trainer.step(batch).direction
        for (name, p), old in zip(connector.named_parameters(), before.parameters(), strict=True):
            used = name.startswith(
                (
                    f"heads.{src}->{tgt}.",
                    f"modalities.{src}.source",
                    f"modalities.{tgt}.target",
                    "gate",
                    "norms",
                    "branch",
                )
            )
            if not name.startswith("experts"):
                assert torch.equal(p, old) != used, name


def test_the_load_balance_loss_is_added():
    connector = small()
    other = copy.deepcopy(connector)
    plain, balanced = (
        AlternatingTrainer(c, sgd(c, lr=0.0), load_balance=weight).step(data()).loss
        for c, weight in ((connector, 0.0), (other, 0.7))
    )
    stats = connector(data()["a"], "a", "b").stats
    expected = mmbal.router_losses(stats, load_balance=0.7).total
    assert_near((balanced - plain).double(), expected.double(), 1e-5)


# --- What a batch has -------------------------------------------------------------------------------------------------


def test_items_that_lack_a_modality_are_left_out_and_a_batch_of_none_skips():
    connector = small()
    other = copy.deepcopy(connector)
    batch, there = data(), torch.rand(12) > 0.4
    ids = torch.arange(12) // 2
    infos = [
        AlternatingTrainer(c, sgd(c)).step(given, group_ids)
        for c, given, group_ids in (
            (connector, batch | {"b": (batch["b"], there)}, ids),
            (other, {name: x[there] for name, x in batch.items()}, ids[there]),
        )
    ]
    assert torch.equal(infos[0].loss, infos[1].loss)
    assert_same(connector, other)
    before = copy.deepcopy(connector)
    trainer = AlternatingTrainer(connector, sgd(connector))
    for given in ({"a": batch["a"]}, batch | {"a": (batch["a"], torch.zeros(12, dtype=torch.bool))}):
        info = trainer.step(given)
        assert info.loss is None and not info.stepped
    assert_same(connector, before)
    assert trainer.steps == 2 and trainer.schedule.count == 2


def test_tokens_with_masks_train():
    connector = small()
    tokens, mask = torch.randn(12, 3, 5), torch.rand(12, 3) > 0.3
    mask[4] = False
    trainer = AlternatingTrainer(connector, sgd(connector))
    expected = AlignLoss()(
        connector(tokens, "a", "b", mask), connector.target(data()["b"], "b", mask.any(1))
    ).loss.detach()
    assert_near(trainer.step({"a": (tokens, mask), "b": data()["b"]}).loss, expected, 1e-5)


def test_several_sources_train():
    connector = MoEConnector(
        {**DIMS, "c": 3}, hidden=8, num_experts=4, top_k=2, dropout=0.0, directions=[(("a", "b"), "c")]
    )
    trainer = AlternatingTrainer(connector, sgd(connector))
    batch = data() | {"c": (torch.randn(12, 3), torch.arange(12) > 3)}
    info = trainer.step(batch)
    assert info.direction == (("a", "b"), "c") and info.stepped
    assert trainer.evaluate(batch)[("a", "b"), "c"].keys() == {1, 5, 10}


def test_encoders_train_as_sources_and_not_as_targets_unless_asked():
    for detach in (True, False):
        connector, encoders = small(), nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(3, 7)})
        both = nn.ModuleList([connector, encoders])
        trainer = AlternatingTrainer(connector, sgd(both), encoders=encoders, detach_target=detach)
        before = copy.deepcopy(encoders)
        trainer.step({"a": torch.randn(6, 4), "b": torch.randn(6, 3)})
        assert not torch.equal(encoders["a"].weight, before["a"].weight)
        assert torch.equal(encoders["b"].weight, before["b"].weight) == detach


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_recalls_are_those_of_sorted_cosines():
    generator = torch.Generator().manual_seed(1)
    query, bank = (torch.randn(30, 6, generator=generator) for _ in range(2))
    bank[:20] += 1.2 * query[:20]
    scores = F.normalize(query, dim=1) @ F.normalize(bank, dim=1).T
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    found = recalls(query, bank, (1, 3, 10))
    assert found == {k: pytest.approx((rank < k).double().mean().item()) for k in (1, 3, 10)}
    assert recalls(query, bank, (1, 100))[100] == 1
    ids = torch.arange(30) // 5  # five captions of a picture
    best = scores.argmax(1)
    assert recalls(query, bank, (1,), ids)[1] == pytest.approx((ids[best] == ids).double().mean().item())


def test_positives_are_the_rows_of_ones_group():
    positives, offsets = positives_of(torch.tensor([7, 2, 7, 5, 2]))
    rows = [positives[offsets[i] : offsets[i + 1]].tolist() for i in range(5)]
    assert rows == [[0, 2], [1, 4], [0, 2], [3], [1, 4]]


def test_evaluation_in_batches_is_that_of_all_rows_and_leaves_the_mode():
    connector = small(dropout=0.3).train()
    connector.norms.eval()
    trainer, batch = AlternatingTrainer(connector, sgd(connector)), data(40)
    batch["b"] = (batch["b"], torch.rand(40) > 0.2)
    parts = [{"a": batch["a"][i : i + 9], "b": tuple(t[i : i + 9] for t in batch["b"])} for i in range(0, 40, 9)]
    whole = trainer.evaluate(batch, ks=(1, 3))
    assert trainer.evaluate(parts, ks=(1, 3)) == whole
    assert list(whole) == [AB, BA]
    assert connector.training and connector.experts.training and not connector.norms.training
    there = batch["b"][1]
    query = connector.eval()(batch["a"][there], "a", "b").cl
    assert whole[AB] == recalls(query, connector.target(batch["b"][0][there], "b").cl, (1, 3))


def test_the_score_may_mix_in_predicted_features():
    connector = small().eval()
    trainer, batch = AlternatingTrainer(connector, sgd(connector)), data(40)
    out, target = connector(batch["a"], "a", "b"), connector.target(batch["b"], "b")
    score = 0.7 * F.cosine_similarity(out.cl[:, None], target.cl[None], 2) + 0.3 * F.cosine_similarity(
        out.reg[:, None], target.reg[None], 2
    )
    expected = (score.argmax(1) == torch.arange(40)).double().mean().item()
    assert trainer.evaluate(batch, ks=(1,), directions=[AB], mix=0.3) == {AB: {1: pytest.approx(expected)}}


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_an_evaluation_takes_the_features_that_training_does(amp):
    connector, batch = small(), {name: x.to(amp) for name, x in data(40).items()}
    trainer = AlternatingTrainer(connector, sgd(connector), amp=amp)
    trainer.step(batch)
    found = trainer.evaluate(batch, ks=(1, 40), mix=0.5)
    assert all(r[40] == 1 and 0 <= r[1] < 1 for r in found.values())


def test_usage_does_not_count_what_is_evaluated_while_training():
    connector, batch = small(), data()
    trainer = AlternatingTrainer(connector, sgd(connector))
    trainer.step(batch)
    counted = connector.usage(AB)
    trainer.evaluate(batch)
    assert torch.equal(connector.usage(AB), counted) and connector.usage(BA).sum() == 0
    connector.eval()
    trainer.evaluate(batch)
    assert torch.equal(connector.usage(BA).sum(1), torch.tensor([24, 24]))


def test_recalls_of_vectors_that_are_not_finite_are_nan():
    x = torch.randn(5, 3)
    bad = torch.where(torch.arange(5)[:, None] == 2, torch.nan, x)
    for query, bank in ((x, bad), (bad, x), (x / 0, x)):
        found = recalls(query, bank, (1, 3))
        assert list(found) == [1, 3] and all(value != value for value in found.values())


def test_a_modality_that_is_added_is_trained_once_the_schedule_has_its_directions():
    connector = small()
    optimizer = torch.optim.AdamW(connector.parameters(), lr=0.01)
    trainer = AlternatingTrainer(connector, optimizer, state="per_direction")
    batch = data() | {"c": torch.randn(12, 3)}
    assert {trainer.step(batch).direction for _ in range(4)} == {AB, BA}
    optimizer.add_param_group({"params": connector.add_modality("c", 3, [("c", "a"), ("b", "c")])})
    assert {trainer.step(batch).direction for _ in range(4)} == {AB, BA}
    trainer.set_schedule()
    assert [trainer.step(batch).direction for _ in range(4)] == [AB, BA, ("c", "a"), ("b", "c")]
    states = trainer.state_dict()["alternation"]["moments"]
    steps = [max(int(own["step"]) for own in state.values()) for state in states]
    assert steps == [5, 5, 1, 1] and set(trainer.evaluate(batch)) == set(connector.directions)


def test_the_loop_of_epochs_goes_on_where_windows_do_not_fill_them(tmp_path):
    connector, z = small(), torch.randn(30, 5)
    sampler = mmbal.ResumableBatchSampler(30, 10)
    trainer = AlternatingTrainer(connector, sgd(connector), sampler=sampler, accumulate=2)
    for epoch in range(2):
        for rows in sampler:
            info = trainer.step({"a": z[rows], "b": torch.cat([z, z[:, :2]], 1)[rows]})
        assert trainer.window_open and not info.stepped
        with pytest.raises(RuntimeError, match="call flush"):
            trainer.save(tmp_path / "checkpoint.pt")
        assert trainer.flush().stepped and not trainer.window_open and trainer.flush() is None
        trainer.save(tmp_path / "checkpoint.pt")
        assert sampler.epoch == epoch + 1


def test_two_linear_views_of_a_latent_find_each_other():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(700, 12, generator=generator)
    views = {name: z @ torch.randn(12, dim, generator=generator) for name, dim in (("a", 20), ("b", 24))}
    train, test = ({name: x[rows] for name, x in views.items()} for rows in (slice(600), slice(600, 700)))
    connector = MoEConnector({"a": 20, "b": 24}, hidden=64, num_experts=4, top_k=2, dropout=0.0)
    optimizer = torch.optim.AdamW(connector.parameters(), lr=3e-3)
    sampler = mmbal.ResumableBatchSampler(600, 100)
    trainer = AlternatingTrainer(connector, optimizer, sampler=sampler)
    before = trainer.evaluate(test)
    for _ in range(60):
        for rows in sampler:
            trainer.step({name: x[rows] for name, x in train.items()})
    after = trainer.evaluate(test)
    assert all(found[1] < 0.1 for found in before.values())
    assert all(found[1] >= 0.99 for found in after.values()), after


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_half_precision_trains_near_float32(amp):
    torch.manual_seed(1)
    connector = small(hidden=32)
    other = copy.deepcopy(connector)
    full, half = (AlternatingTrainer(c, sgd(c), amp=dtype) for c, dtype in ((connector, None), (other, amp)))
    for i in range(10):
        assert_near(half.step(data(seed=i)).loss.double(), full.step(data(seed=i)).loss.double(), 0.1)
    assert not torch.equal(other.experts.w1, connector.experts.w1)
    for p, q in zip(other.parameters(), connector.parameters(), strict=True):
        assert p.dtype == torch.float32 and (p - q).abs().max() < 0.1


def test_a_compiled_connector_trains_as_the_eager_one():
    connector = small()
    other = copy.deepcopy(connector)
    compiled = torch.compile(other, backend="aot_eager")
    for trainer in (AlternatingTrainer(connector, sgd(connector)), AlternatingTrainer(compiled, sgd(other))):
        for i in range(4):
            trainer.step(data(seed=i))
    for p, q in zip(connector.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert torch.equal(connector.usage(AB), other.usage(AB))


def test_wrong_arguments_are_named():
    connector = small()
    with pytest.raises(ValueError, match=r"schedule must have directions of the connector, got \[\('a', 'c'\)\]"):
        AlternatingTrainer(connector, sgd(connector), DirectionSchedule.cycle([("a", "c")]))
    with pytest.raises(ValueError, match=r"weights must have every direction, got none of \[\('b', 'a'\)\]"):
        AlternatingTrainer(connector, sgd(connector), weights={AB: 1.0})
    trainer = AlternatingTrainer(connector, sgd(connector))
    with pytest.raises(ValueError, match="b must have 12 rows as a has, got 11"):
        trainer.step({"a": data()["a"], "b": data()["b"][:11]})
    with pytest.raises(ValueError, match=r"group_ids must be \[12\], got \[3\]"):
        trainer.step(data(), torch.arange(3))
    with pytest.raises(ValueError, match="mix must be from 0 to 1, got 2"):
        trainer.evaluate(data(), mix=2)
    with pytest.raises(ValueError, match=r"directions must be of the connector, got \[\('a', 'z'\)\]"):
        trainer.evaluate(data(), directions=[AB, ("a", "z")])
    for ks in ((0,), (), (1.5,)):
        with pytest.raises(ValueError, match="ks must be integers of at least 1"):
            trainer.evaluate(data(), ks)
    with pytest.warns(UserWarning, match="optimizer lacks trainable parameters of encoder 'a'"):
        AlternatingTrainer(connector, sgd(connector), encoders={"a": nn.Linear(5, 5)})
    with pytest.raises(ValueError, match=r"schedule must have directions of the connector, got \[\('a', 'c'\)\]"):
        trainer.set_schedule(DirectionSchedule.cycle([("a", "c")]))
    assert trainer.steps == trainer.schedule.count == 0
