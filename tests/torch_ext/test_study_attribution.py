"""`mmbal study attribution`: arms that start alike, what is asked for, files and resuming."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmbal.cli import app
from mmbal.study import attribution
from mmbal.study.amss_data import DATA_SETS, load
from mmbal.study.amss_models import Fusion
from mmbal.study.attribution_arms import (
    CONDITIONS,
    TITLES,
    Recipe,
    Training,
    drop,
    entropy_of_shares,
    penalty_of,
    strengths,
    train,
)
from mmbal.study.attribution_report import COMPARED, summarise, verdicts
from mmbal.study.data import Data, Split

CELLS = DATA_SETS[0]
QUICK = Recipe.quick()


def thinned(data, step=4):
    """Every fourth row of each split."""

    def thin(split):
        inputs = {name: values[::step] for name, values in split.inputs.items()}
        return Split(inputs, split.present[::step], split.target[::step])

    return Data(data.task, thin(data.train), thin(data.validation), thin(data.test))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a quick run by the command, on every fourth row."""
    out = tmp_path_factory.mktemp("study") / "attribution"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribution, "load", lambda *arguments: thinned(load(*arguments)))
        result = CliRunner().invoke(app, ["study", "attribution", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def cells():
    return thinned(load(CELLS, 0))


def test_the_command_writes_a_report_numbers_and_two_pictures(finished):
    report = (finished / "report.md").read_text()
    for title in (*TITLES.values(), *CONDITIONS.values()):
        assert title in report
    for picture in ("attribution.png", "attribution-shares.png"):
        assert f"]({picture})" in report
        assert min(Image.open(finished / picture).size) > 300
    results = json.loads((finished / "results.json").read_text())
    assert set(results["settings"]) == {data_set.name for data_set in DATA_SETS}
    assert len(results["runs"]) == len(DATA_SETS)


def test_shares_of_every_arm_sum_to_one_and_every_condition_has_its_accuracy(finished):
    for run in json.loads((finished / "results.json").read_text())["runs"]:
        assert set(run["arms"]) == set(TITLES)
        for arm in run["arms"].values():
            assert sum(arm["shares"].values()) == pytest.approx(1, abs=1e-6)
            assert set(arm["metrics"]) == set(CONDITIONS)
            assert all(0 <= metrics["accuracy"] <= 1 for metrics in arm["metrics"].values())
        assert run["strong"] == max(run["alone"], key=run["alone"].__getitem__)
        assert sum(run["asked"].values()) == pytest.approx(1)


def test_finished_runs_are_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(attribution, "run_setting", lambda *_: pytest.fail("was done again"))
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*.json")}
    assert len(before) == len(DATA_SETS)
    attribution.run_study(finished, quick=True)
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*.json")}


def test_another_recipe_starts_anew(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(attribution, "conduct", lambda study, out, seeds, jobs: runs.append((study, seeds, len(jobs))))
    attribution.run_study(tmp_path, quick=True)
    attribution.run_study(tmp_path, seeds=2)
    (quick, one, few), (full, two, many) = runs
    assert quick.recipe != full.recipe and (one, two) == (1, 2) and many == 2 * few
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        attribution.run_study(tmp_path, seeds=0)


def test_strengths_are_gains_over_the_most_frequent_class_and_none_is_nothing():
    found = strengths({"a": 0.9, "b": 0.6, "c": 0.4}, 0.5)
    assert found == pytest.approx({"a": 0.8 / 1.05, "b": 0.2 / 1.05, "c": 0.05 / 1.05})
    assert strengths({"a": 0.3, "b": 0.2}, 0.5) == {"a": 0.5, "b": 0.5}


def test_dropout_leaves_one_modality_of_every_row():
    features = {name: torch.ones(2000, 3) for name in "abc"}
    kept = torch.stack([z[:, 0] for z in drop(features, 0.3, torch.Generator().manual_seed(0)).values()], 1)
    assert kept.sum(1).min() >= 1
    assert kept.mean().item() == pytest.approx(0.7 + 0.3**3 / 3, abs=0.03)


@pytest.mark.parametrize("arm", ["uniform", "uniform_strong", "strength", "entropy"])
def test_penalties_have_gradients_for_the_head_alone(arm, cells):
    model = Fusion(cells.train.inputs, cells.outputs)
    asked = {name: 1 / len(cells.modalities) for name in cells.modalities}
    logits, features = model({name: x[:32] for name, x in cells.train.inputs.items()})
    penalty_of(arm, model, QUICK, asked)(features, logits).backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.encoders.parameters())


def test_encoders_that_are_frozen_stay_bit_for_bit_while_the_head_moves_towards_equal_shares(cells):
    torch.manual_seed(0)
    model = Fusion(cells.train.inputs, cells.outputs)
    for p in model.encoders.parameters():
        p.requires_grad_(False)
    before = {name: p.clone() for name, p in model.encoders.named_parameters()}
    penalty = penalty_of("uniform_strong", model, QUICK, {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        logits, features = model(cells.train.inputs)
        optimizer.zero_grad()
        value = penalty(features, logits)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]
    assert all(torch.equal(p, before[name]) for name, p in model.encoders.named_parameters())


def test_entropy_of_shares_is_largest_where_they_are_equal():
    head = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
    equal = entropy_of_shares(head, {"a": torch.ones(3, 2), "b": torch.ones(3, 2)})
    assert equal.item() == pytest.approx(math.log(2), rel=1e-5)
    assert entropy_of_shares(head, {"a": torch.ones(3, 2), "b": 0.1 * torch.ones(3, 2)}).item() < 0.6


def test_arms_share_initial_weights_and_batches(cells, monkeypatch):
    from mmbal.study import attribution_arms

    seen = {}
    forward = Fusion.forward

    def spy(model, inputs):
        if model.training:
            seen.setdefault(arm, []).append((model.head.weight.detach().clone(), inputs["ch_1"].clone()))
        return forward(model, inputs)

    monkeypatch.setattr(attribution_arms.Fusion, "forward", spy)
    training = Training.of(Recipe(epochs=1), CELLS)
    asked = {name: 0.25 for name in cells.modalities}
    for arm in TITLES:
        train(arm, cells, training, QUICK, 3, "ch_1", asked)
    first = seen["plain"]
    for arm in TITLES:
        assert torch.equal(seen[arm][0][0], first[0][0])
        assert all(torch.equal(a[1], b[1]) for a, b in zip(seen[arm], first, strict=True))


def test_a_run_is_the_same_again(cells):
    training = Training.of(QUICK, CELLS)
    asked = {name: 0.25 for name in cells.modalities}
    one, two = (train("uniform", cells, training, QUICK, 1, "ch_2", asked) for _ in range(2))
    assert all(torch.equal(one.predictions[c], two.predictions[c]) for c in CONDITIONS)
    assert one.shares == two.shares


def test_verdicts_name_what_is_clear(finished):
    runs = json.loads((finished / "results.json").read_text())["runs"]
    seeds = []
    for seed in range(3):
        for run in json.loads(json.dumps(runs)):
            run["seed"] = seed
            for condition in CONDITIONS:
                run["arms"]["plain"]["metrics"][condition]["accuracy"] = 0.5
                for arm in COMPARED:
                    run["arms"][arm]["metrics"][condition]["accuracy"] = 0.5
                run["arms"]["dropout"]["metrics"][condition]["accuracy"] = 0.6 + 0.001 * seed
            seeds.append(run)
    lines = verdicts({"settings": summarise(seeds)})
    assert len(lines) == len(COMPARED) * len(CONDITIONS)
    for line in lines:
        better = "clearly better than plain in cells, chicago, clipart" in line
        assert better == ("modality dropout" in line)
