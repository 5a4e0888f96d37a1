"""`mmbal study amss`: data and splits, arms that start alike, OGM-GE against its formulas, files and resuming."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from mmbal.cli import app
from mmbal.demo.data import load_pairs, title_key
from mmbal.study import amss, amss_arms, amss_data
from mmbal.study.amss_arms import FUSED, METHODS, OPTIMIZERS, TITLES, Recipe, Training
from mmbal.study.amss_models import Fusion
from mmbal.study.amss_report import COMPARED, MASKED, RIVALS, gap_of, summarise, verdicts
from mmbal.study.comparing import comparison
from mmbal.study.data import SETTINGS as TABLE_SETTINGS
from mmbal.study.data import Data, Split, load_setting
from mmbal.study.ogm import OGM

DATA_SETS = {data_set.name: data_set for data_set in amss_data.DATA_SETS}
CELLS = DATA_SETS["cells"]
RECIPE = Recipe(epochs=1)


def thinned(data, step=4):
    """Every fourth row of each split."""

    def thin(split):
        return Split(
            {name: values[::step] for name, values in split.inputs.items()}, split.present[::step], split.target[::step]
        )

    return Data(data.task, thin(data.train), thin(data.validation), thin(data.test))


@pytest.fixture(scope="module")
def clipart():
    return thinned(amss_data.load(DATA_SETS["clipart"], 0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a quick run by the command, on every fourth row."""
    out = tmp_path_factory.mktemp("study") / "amss"
    with pytest.MonkeyPatch.context() as patch:
        load = amss.load
        patch.setattr(amss, "load", lambda *arguments: thinned(load(*arguments)))
        result = CliRunner().invoke(app, ["study", "amss", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json")}


# The data


def test_no_title_of_the_clip_art_is_in_two_splits_and_every_picture_is_in_one():
    rows, _, _ = amss_data.clipart_rows()
    for seed in (0, 1):
        splits = amss_data.split_clipart(seed)
        assert sorted(number for part in splits.values() for number in part) == list(range(len(rows)))
        titles = [{title_key(rows[number]["title"]) for number in part} for part in splits.values()]
        assert not (titles[0] & titles[1] or titles[0] & titles[2] or titles[1] & titles[2])


def test_seeds_change_the_validation_pictures_and_never_those_that_are_tested():
    first, second = (amss_data.split_clipart(seed) for seed in (0, 1))
    assert first["test"] == second["test"] and first["validation"] != second["validation"]
    assert first == amss_data.split_clipart(0)


def test_classes_are_the_large_folders_and_each_gives_its_share_to_every_split():
    rows, _, folders = amss_data.clipart_rows()
    splits = amss_data.split_clipart(0)
    assert "unsorted" not in folders and len(folders) == amss_data.clipart_facts()["classes"] == 14
    for folder in folders:
        count = {part: sum(rows[number]["folder"] == folder for number in numbers) for part, numbers in splits.items()}
        total = sum(count.values())
        assert total >= 60
        assert 0.2 < count["test"] / total < 0.3 and 0.1 < count["validation"] / total < 0.2


def test_a_row_of_the_clip_art_has_the_picture_of_its_title():
    rows, _, _ = amss_data.clipart_rows()
    pairs = load_pairs()
    titles = [caption.title for caption in pairs.captions]
    data = amss_data.load(DATA_SETS["clipart"], 0)
    pixels = ((data.test.inputs["picture"] + 1) * 127.5).round().to(torch.uint8)
    tested = [rows[number]["title"] for number in amss_data.split_clipart(0)["test"]]
    unique = [place for place, title in enumerate(tested) if titles.count(title) == 1]
    assert len(unique) > 100
    for place in unique:
        assert torch.equal(pixels[place], pairs.images[titles.index(tested[place])])


def test_the_words_known_are_those_of_the_training_titles():
    rows, _, _ = amss_data.clipart_rows()
    splits = amss_data.split_clipart(0)
    data = amss_data.load(DATA_SETS["clipart"], 0)
    words = set().union(*(amss_data.words_of(rows[number]["title"]) for number in splits["train"]))
    columns = data.train.inputs["title"]
    assert columns.shape[1] == len(words) and (columns > 0).any(0).all()
    for place, number in enumerate(splits["test"]):
        known = amss_data.words_of(rows[number]["title"]) & words
        assert int((data.test.inputs["title"][place] > 0).sum()) == len(known)


def test_titles_become_bags_of_known_words():
    columns = amss_data.title_columns(["Dead frog 2", "frog, FROG", "toad"], {"dead": 0, "frog": 1})
    assert torch.equal(columns > 0, torch.tensor([[True, True], [False, True], [False, False]]))


@pytest.mark.parametrize(
    ("title", "folder", "expected"),
    [
        ("Road sign", "signs_and_symbols", True),
        ("salt and pepper", "signs_and_symbols", False),
        ("Computers", "computer", True),
        ("foodie", "food", False),
    ],
)
def test_a_title_that_holds_a_word_of_its_folder_is_counted(title, folder, expected):
    assert amss_data.names_its_folder({"title": title, "folder": folder}) is expected


def test_terciles_are_those_of_the_training_rows():
    loaded = load_setting(next(setting for setting in TABLE_SETTINGS if setting.name == "chicago"), 0)
    data = amss_data.load(DATA_SETS["chicago"], 0)
    ordered = loaded.train.target.sort().values
    third = len(ordered) // 3
    assert torch.bincount(data.train.target).tolist() == [third, third, len(ordered) - 2 * third]
    below, above = ordered[third - 1], ordered[2 * third]
    for part in ("validation", "test"):
        values, classes = getattr(loaded, part).target, getattr(data, part).target
        assert (classes[values <= below] == 0).all() and (classes[values >= above] == 2).all()
    moved = replace(loaded, test=replace(loaded.test, target=loaded.test.target + 100))
    assert torch.equal(amss_data.in_terciles(moved).train.target, data.train.target)
    assert (amss_data.in_terciles(moved).test.target == 2).all()


# The models and arms


def test_own_logits_are_parts_of_the_fused_ones_that_add_up_to_them(clipart):
    torch.manual_seed(0)
    model = Fusion(clipart.train.inputs, clipart.outputs).eval()
    inputs = {name: values[:5] for name, values in clipart.train.inputs.items()}
    with torch.no_grad():
        logits, features = model(inputs)
    own = model.own_logits(features)
    assert list(own) == ["picture", "title"]
    torch.testing.assert_close(sum(own.values()), logits)
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    torch.testing.assert_close(own["title"], features["title"] @ weight[:, 64:].T + bias / 2)


def test_arms_start_from_the_same_weights_and_see_the_same_batches(clipart):
    """With a step size of zero batch norm still keeps what the batches were, in their order."""
    training = replace(Training.of(RECIPE, DATA_SETS["clipart"], "sgd"), learning_rate=0.0, epochs=2)
    outcomes = {arm: amss_arms.train(arm, clipart, training, 0) for arm in FUSED}
    other = amss_arms.train("joint", clipart, training, 1)
    for arm in FUSED:
        assert torch.equal(outcomes[arm].prediction, outcomes["joint"].prediction), arm
    assert not torch.equal(other.prediction, outcomes["joint"].prediction)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_arm_trains_otherwise_and_a_seed_repeats_itself(optimizer):
    data = amss_data.load(CELLS, 0)
    training = replace(Training.of(RECIPE, CELLS, optimizer), epochs=2)
    predictions = [amss_arms.train(arm, data, training, 0).prediction for arm in FUSED]
    for place, prediction in enumerate(predictions):
        assert not any(torch.equal(prediction, other) for other in predictions[:place])
    for arm, prediction in zip(FUSED, predictions, strict=True):
        assert torch.equal(amss_arms.train(arm, data, training, 0).prediction, prediction), arm


def test_labels_of_held_out_rows_change_no_prediction():
    data = amss_data.load(CELLS, 0)
    training = Training.of(RECIPE, CELLS, "sgd")  # one epoch: nothing to choose
    turned = Data(
        data.task,
        data.train,
        replace(data.validation, target=1 - data.validation.target),
        replace(data.test, target=1 - data.test.target),
    )
    for arm in FUSED:
        before, after = (amss_arms.train(arm, version, training, 0) for version in (data, turned))
        assert torch.equal(before.prediction, after.prediction), arm
        assert before.validation_accuracy == pytest.approx(1 - after.validation_accuracy)


def test_the_epoch_with_the_best_validation_accuracy_counts():
    data = amss_data.load(CELLS, 0)
    training = replace(Training.of(RECIPE, CELLS, "sgd"), epochs=6)
    outcome = amss_arms.train("joint", data, training, 0, "ch_1")  # alone, its own accuracy is the model's
    assert outcome.validation_accuracy == max(outcome.own_accuracy["ch_1"])
    assert outcome.own_accuracy["ch_1"][outcome.best_epoch - 1] == outcome.validation_accuracy


def test_the_best_single_modality_is_the_best_one_on_validation_rows():
    outcomes, alone = amss_arms.run_arms(amss_data.load(CELLS, 0), Training.of(RECIPE, CELLS, "adam"), 0)
    assert set(outcomes) == set(TITLES) and list(alone) == list(CELLS.modalities)
    best = max(outcome.validation_accuracy for outcome in alone.values())
    assert outcomes["single"].validation_accuracy == best
    assert any(outcomes["single"] is outcome for outcome in alone.values())


# OGM-GE


def log_odds(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_the_modality_ahead_gets_the_papers_coefficient_and_the_other_one():
    ogm = OGM({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, alpha=0.3)
    logits = {"a": log_odds([0.8, 0.2], [0.4, 0.6]), "b": log_odds([0.5, 0.5], [0.8, 0.2])}
    found = ogm.coefficients(logits, torch.tensor([0, 1]))  # scores 0.8 + 0.6 and 0.5 + 0.2: ratios 2 and 1/2
    assert found == {"a": pytest.approx(1 - math.tanh(0.3 * 2)), "b": 1.0}


def test_with_equal_scores_nothing_is_slowed_down():
    ogm = OGM({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, alpha=0.8)
    same = log_odds([0.7, 0.3])
    assert ogm.coefficients({"a": same, "b": same.clone()}, torch.tensor([1])) == {"a": 1.0, "b": 1.0}


def test_with_three_modalities_the_ratio_is_to_the_mean_score_of_the_others():
    ogm = OGM({name: nn.Linear(1, 1) for name in "abc"}, alpha=0.5)
    logits = {"a": log_odds([0.9, 0.1]), "b": log_odds([0.5, 0.5]), "c": log_odds([0.1, 0.9])}
    found = ogm.coefficients(logits, torch.tensor([0]))  # ratios 0.9 / 0.3, 0.5 / 0.5, 0.1 / 0.7
    assert found["a"] == pytest.approx(1 - math.tanh(0.5 * 3)) and found["c"] == 1.0
    assert found["b"] in (1.0, pytest.approx(1 - math.tanh(0.5)))  # exactly at the threshold, but for rounding


def test_a_step_scales_every_gradient_of_an_encoder_and_adds_noise_as_wide_as_it():
    encoders = {"a": nn.Linear(300, 300), "b": nn.Linear(300, 300)}
    generator = torch.Generator().manual_seed(1)
    before = {}
    for name, encoder in encoders.items():
        encoder.weight.grad = torch.randn(300, 300, generator=generator) * 3 + 1
        encoder.bias.grad = torch.full((300,), 2.0)  # no spread: no noise
        before[name] = encoder.weight.grad.clone()
    encoders["b"].bias.grad = None
    ogm = OGM(encoders, alpha=0.3, seed=5)
    logits = {"a": log_odds([0.8, 0.2]), "b": log_odds([0.4, 0.6])}
    found = ogm.step(logits, torch.tensor([0]))
    assert found == {"a": pytest.approx(1 - math.tanh(0.6)), "b": 1.0}
    for name, encoder in encoders.items():
        noise = encoder.weight.grad - found[name] * before[name]
        assert float(noise.std()) == pytest.approx(3, rel=0.02) and abs(float(noise.mean())) < 0.05
    torch.testing.assert_close(encoders["a"].bias.grad, torch.full((300,), 2 * found["a"]))
    assert encoders["b"].bias.grad is None


# The report


def test_the_gap_is_the_strong_modality_minus_the_mean_of_the_others():
    accuracy = {"a": [0.5, 0.6], "b": [0.9, 0.8], "c": [0.3, 0.6]}
    assert gap_of(accuracy, "b") == pytest.approx([50.0, 20.0])


def test_verdicts_follow_the_numbers():
    def results(**gains):
        unclear, worse = comparison([0.0, 1.0, -1.0]), comparison([-1.0, -1.1])
        arms = {arm: {"over_joint": unclear} for arm in COMPARED}
        for arm in MASKED:
            arms[arm]["over"] = dict.fromkeys(RIVALS, unclear) | {"ogm": worse}
        for arm, gain in gains.items():
            arms[arm]["over_joint"] = comparison([gain, gain * 1.1, gain * 0.9])
        return {"seeds": 3, "settings": {"cells-sgd": {"arms": arms}}}

    nothing = "\n".join(verdicts(results()))
    assert "somewhere and clearly worse nowhere:** no arm." in nothing
    assert "clearly beats joint training in:** cells-sgd." in nothing
    assert "OGM-GE: better in no setting, worse in cells-sgd" in nothing
    something = "\n".join(verdicts(results(amss=2.0, ogm=-3.0)))
    assert "worse nowhere:** AMSS." in something and "joint training in:** no setting." in something
    assert "OGM-GE: clearly better than joint training in no setting; worse in cells-sgd." in something
    assert verdicts({"seeds": 1}) == ["One seed: no verdict."]


def test_gains_are_paired_by_seed(finished):
    runs = json.loads((finished / "results.json").read_text())["runs"]
    second = json.loads(json.dumps(runs))
    for run in second:
        for arm in run["arms"].values():
            arm["metrics"]["accuracy"] -= 0.25  # a harder seed for all arms alike
    before, after = summarise(runs), summarise(runs + second)
    for name, setting in after.items():
        for arm in COMPARED:
            gain = setting["arms"][arm]["over_joint"]
            assert gain["mean"] == pytest.approx(before[name]["arms"][arm]["over_joint"]["mean"])
            assert gain["standard_error"] == pytest.approx(0, abs=1e-9) and gain["seeds"] == 2


def test_the_quick_command_leaves_numbers_tables_and_pictures(finished):
    results = json.loads((finished / "results.json").read_text())
    settings = {f"{name}-{optimizer}" for name in DATA_SETS for optimizer in OPTIMIZERS}
    assert set(results["settings"]) == settings
    assert {(run["data_set"], run["optimizer"], run["seed"]) for run in results["runs"]} == {
        (*name.split("-"), 0) for name in settings
    }
    text = (finished / "report.md").read_text()
    for name in settings:
        setting = results["settings"][name]
        assert set(setting["arms"]) == set(TITLES) and f"## {name}" in text
        mean, _ = setting["arms"]["joint"]["metrics"]["accuracy"]
        assert f"| joint training | {mean:.1f}" in text
        for arm in METHODS:
            ratio = setting["arms"][arm]["ratio"]
            assert all(len(values) == 2 and min(values) >= 0.1 and max(values) <= 0.9 for values in ratio.values())
        assert len(setting["arms"]["joint"]["gap"]) == 2 and not setting["arms"]["joint"]["ratio"]
    for picture in ("amss.png", "amss-rho.png"):
        assert f"({picture})" in text
        Image.open(finished / picture).verify()


def test_a_finished_study_is_not_trained_again(finished, monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    kept, report = files_of(finished), (finished / "report.md").read_text()
    monkeypatch.setattr(amss, "run_arms", fail)
    amss.run_study(finished, quick=True)
    assert len(kept) == 6 and files_of(finished) == kept and (finished / "report.md").read_text() == report


def test_a_changed_recipe_reuses_nothing(finished, monkeypatch):
    def stop(*_):
        raise RuntimeError("training")

    monkeypatch.setattr(amss, "run_arms", stop)
    choices = amss_arms.CHOICES | {"cells-sgd": replace(amss_arms.CHOICES["cells-sgd"], alpha=0.5)}
    with pytest.raises(RuntimeError, match="training"):
        amss.run_study(finished, quick=True, recipe=replace(Recipe.quick(), choices=choices))


def test_an_interrupted_study_keeps_what_is_finished_and_exits_with_130(tmp_path, monkeypatch):
    def run_setting(data_set, optimizer, *_):
        if (data_set.name, optimizer) == ("cells", "sgd"):
            return {"data_set": "cells", "optimizer": "sgd"}
        raise KeyboardInterrupt

    monkeypatch.setattr(amss, "run_setting", run_setting)
    result = CliRunner().invoke(app, ["study", "amss", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 130 and "kept in" in result.output
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["cells-sgd-0.json"]
    assert not (tmp_path / "results.json").exists()


def test_a_study_needs_a_seed(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        amss.run_study(tmp_path, seeds=0)
