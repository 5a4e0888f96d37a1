"""`mmbal study btw`: data and splits, no label of a test row in any arm but the marked one, files and resuming."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmbal.cli import app
from mmbal.study import btw, btw_arms, data
from mmbal.study.btw_arms import LEAKING, METHODS, TITLES, Recipe
from mmbal.study.btw_report import verdicts
from mmbal.study.comparing import comparison

SETTINGS = {setting.name: setting for setting in data.SETTINGS}
RECIPE = Recipe(epochs=2, batch=512)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a quick run by the command."""
    out = tmp_path_factory.mktemp("study") / "btw"
    result = CliRunner().invoke(app, ["study", "btw", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.json")}


def test_chicago_is_split_by_date_and_every_day_is_in_one_split():
    _, rows = data.read_table("chicago")
    _, _, splits = data.load_chicago()
    years = {part: {rows[i][-1][:4] for i in index} for part, index in splits.items()}
    assert max(years["train"]) == "2011" and years["validation"] == {"2012"} and min(years["test"]) == "2013"
    assert sorted(i for index in splits.values() for i in index) == list(range(len(rows)))


def test_cells_keep_their_test_rows_and_validation_is_a_fifth_of_each_training_class():
    _, rows = data.read_table("cells")
    validations = []
    for seed in (0, 1):
        _, classes, splits = data.load_cells(seed)
        assert sorted(i for index in splits.values() for i in index) == list(range(len(rows)))
        assert {rows[i][0] for i in splits["test"]} == {"Test"}
        assert {rows[i][0] for part in ("train", "validation") for i in splits[part]} == {"Train"}
        for label in (0, 1):
            held_out, kept = ((classes[splits[part]] == label).sum() for part in ("validation", "train"))
            assert held_out == (held_out + kept) // 5
        validations.append(set(splits["validation"]))
    assert validations[0] != validations[1]


@pytest.mark.parametrize(
    ("column", "modality"),
    [
        ("Clark_Lake", "stations"),
        ("Harlem", "stations"),
        ("temp_min", "weather"),
        ("weather_storm", "weather"),
        ("percip_max", "weather"),
        ("WhiteSox_Home", "sport"),
        ("Cubs_Away", "sport"),
    ],
)
def test_a_chicago_column_goes_to_the_modality_that_its_name_says(column, modality):
    assert data.chicago_modality(column) == modality


def test_columns_of_both_tables_add_up_and_channels_follow_the_suffix():
    chicago, _, _ = data.load_chicago()
    counts = {name: values.shape[1] for name, values in chicago.items()}
    assert counts == {"stations": 20, "weather": 18, "sport": 10, "calendar": 19}
    cells, _, _ = data.load_cells(0)
    assert {name: values.shape[1] for name, values in cells.items()} == {"ch_1": 28, "ch_2": 2, "ch_3": 13, "ch_4": 13}
    assert data.cells_modality("skew_inten_ch_3") == "ch_3"
    with pytest.raises(ValueError, match=r"column must end in one of ch_1, ch_2, ch_3, ch_4, got 'area'"):
        data.cells_modality("area")


def test_the_calendar_is_the_weekday_and_month_of_the_date():
    _, rows = data.read_table("chicago")
    calendar = data.load_chicago()[0]["calendar"]
    assert rows[0][-1] == "2001-01-22"  # a Monday
    assert calendar[0].nonzero()[0].tolist() == [0, 7]
    assert rows[-1][-1] == "2016-08-28"  # a Sunday
    assert calendar[-1].nonzero()[0].tolist() == [6, 7 + 7]


def test_every_row_keeps_a_modality_and_absent_ones_are_zero():
    loaded = data.load_setting(SETTINGS["cells-missing"], 3)
    for split in (loaded.train, loaded.validation, loaded.test):
        assert split.present.any(1).all() and not split.present.all()
        for position, values in enumerate(split.inputs.values()):
            assert not values[~split.present[:, position]].any()
    absent = 1 - loaded.train.present.double().mean()
    assert 0.2 < absent < 0.35
    assert torch.equal(loaded.train.present, data.load_setting(SETTINGS["cells-missing"], 3).train.present)


def test_training_rows_that_have_a_modality_have_mean_zero_and_deviation_one():
    train = data.load_setting(SETTINGS["chicago-missing"], 0).train
    values = train.inputs["stations"][train.present[:, 0]]
    assert values.mean(0).abs().max() < 1e-4 and (values.std(0) - 1).abs().max() < 1e-3
    assert abs(train.target.mean()) < 1e-4 and abs(train.target.std() - 1) < 1e-3


@pytest.mark.parametrize("name", ["chicago-missing", "cells-missing"])
def test_test_labels_change_no_prediction_but_those_of_the_arm_marked_as_leaking(name):
    loaded = data.load_setting(SETTINGS[name], 0)
    turned = replace(loaded, test=replace(loaded.test, target=loaded.test.target.flip(0)))
    assert not torch.equal(loaded.test.target, turned.test.target)
    before, after = (btw_arms.run_arms(version, RECIPE, 0)[0] for version in (loaded, turned))
    for arm in TITLES:
        same = torch.equal(before[arm].prediction, after[arm].prediction)
        assert same == (arm != LEAKING or name.startswith("cells")), arm


def test_validation_labels_do_nothing_but_choose_the_epoch():
    loaded = data.load_setting(SETTINGS["chicago"], 0)
    turned = replace(loaded, validation=replace(loaded.validation, target=loaded.validation.target.flip(0)))
    recipe = replace(RECIPE, epochs=1)  # nothing to choose
    before, after = (btw_arms.run_arms(version, recipe, 0)[0] for version in (loaded, turned))
    for arm in ("plain", "uniform", "average", *METHODS):
        assert torch.equal(before[arm].prediction, after[arm].prediction), arm


def test_the_best_single_modality_falls_back_to_the_next_one_that_a_row_has():
    loaded = data.load_setting(SETTINGS["chicago-missing"], 0)
    predictions = {name: torch.full((len(loaded.test),), float(i)) for i, name in enumerate(loaded.modalities)}
    losses = dict(zip(loaded.modalities, (0.4, 0.1, 0.3, 0.2), strict=True))
    chosen = btw_arms.single(loaded, predictions, losses).prediction
    for row, value in enumerate(chosen.tolist()):
        present = [name for name, there in zip(loaded.modalities, loaded.test.present[row], strict=True) if there]
        assert loaded.modalities[int(value)] == min(present, key=losses.get)


def test_a_comparison_is_clear_when_its_interval_leaves_out_zero():
    assert comparison([1.0, 1.1, 0.9])["verdict"] == "better"
    assert comparison([-1.0, -1.1, -0.9])["verdict"] == "worse"
    assert comparison([1.0, -1.1, 0.9])["verdict"] == "unclear"
    assert comparison([1.0]) == {
        "mean": 1.0,
        "standard_error": None,
        "half_interval": None,
        "seeds_better": 1,
        "seeds": 1,
        "verdict": "unclear",
    }


def test_verdicts_follow_the_numbers():
    def results(**gains):
        per_arm = {
            arm: {"over_plain": comparison([0.0, 1.0, -1.0]), "over_average": comparison([-1.0, -1.1])}
            for arm in TITLES
        }
        for arm, gain in gains.items():
            per_arm[arm]["over_plain"] = comparison([gain, gain * 1.1, gain * 0.9])
        return {"seeds": 3, "settings": {"cells": {"arms": per_arm}}}

    nothing = "\n".join(verdicts(results()))
    assert "somewhere and clearly worse nowhere:** no arm." in nothing and "weights:** none." in nothing
    something = "\n".join(verdicts(results(mi=2.0, uniform=3.0, kl=-1.0)))
    assert "worse nowhere:** MI only, uniform weights, sum 1." in something
    assert "weights:** MI only." in something
    assert "KL only, diverge: clearly better than plain fusion in no setting; worse in cells." in something


def test_the_quick_command_leaves_numbers_tables_and_a_picture(finished):
    results = json.loads((finished / "results.json").read_text())
    assert {(run["setting"], run["seed"]) for run in results["runs"]} == {(name, 0) for name in SETTINGS}
    assert all(set(setting["arms"]) == set(TITLES) for setting in results["settings"].values())
    text = (finished / "report.md").read_text()
    for setting in SETTINGS.values():
        assert f"## {setting.name}" in text
        mean, _ = next(iter(results["settings"][setting.name]["arms"]["plain"]["metrics"].values()))
        assert f"| plain fusion | {mean:.3f}" in text or f"| plain fusion | {mean:.1f}" in text
    assert text.count("USES TEST LABELS") >= 2
    Image.open(finished / "btw.png").verify()


def test_a_finished_study_is_not_trained_again(finished, monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    kept, report = files_of(finished), (finished / "report.md").read_text()
    monkeypatch.setattr(btw, "run_arms", fail)
    btw.run_study(finished, quick=True)
    assert files_of(finished) == kept and (finished / "report.md").read_text() == report


def test_a_changed_recipe_reuses_nothing(finished, monkeypatch):
    def stop(*_):
        raise RuntimeError("training")

    monkeypatch.setattr(btw, "run_arms", stop)
    with pytest.raises(RuntimeError, match="training"):
        btw.run_study(finished, quick=True, recipe=replace(Recipe.quick(), learning_rate=1e-3))


def test_an_interrupted_study_keeps_what_is_finished_and_exits_with_130(tmp_path, monkeypatch):
    first = btw.run_setting(SETTINGS["cells"], 0, RECIPE)

    def run_setting(setting, *_):
        if setting.name == "chicago":
            return first | {"setting": "chicago"}
        raise KeyboardInterrupt

    monkeypatch.setattr(btw, "run_setting", run_setting)
    result = CliRunner().invoke(app, ["study", "btw", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 130 and "kept in" in result.output
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["chicago-0.json"]
    assert not (tmp_path / "results.json").exists()


def test_a_study_needs_a_seed(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        btw.run_study(tmp_path, seeds=0)
