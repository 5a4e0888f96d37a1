"""`mmbal study altmoe`: views, arms that start alike, growth without forgetting, files and resuming."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmbal.cli import app
from mmbal.study import altmoe, altmoe_arms
from mmbal.study.altmoe_arms import GROWTH, KS, TITLES, Recipe, fit, grow, make_connector, mean_recall, train
from mmbal.study.altmoe_data import SEVENTH, VIEWS, Views, load_views
from mmbal.study.altmoe_report import summarise, verdicts

QUICK = Recipe(epochs=1, batch=50, hidden=16, experts=4, evaluations=2)


def thinned(views, step=6):
    return Views(*({n: x[::step] for n, x in split.items()} for split in (views.train, views.validation, views.test)))


@pytest.fixture(scope="module")
def views():
    return thinned(load_views(0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a quick run by the command, on every sixth digit."""
    out = tmp_path_factory.mktemp("study") / "altmoe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(altmoe, "load_views", lambda seed: thinned(load_views(seed)))
        result = CliRunner().invoke(app, ["study", "altmoe", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


def test_views_are_of_the_same_digits_and_standardised_by_the_training_ones():
    views, other = load_views(0), load_views(1)
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
    (run,) = results["runs"]
    for arm in TITLES:
        recalls = run["arms"][arm]["recalls"]
        assert len(recalls) == 30
        assert all(0 <= of["1"] <= of["5"] <= of["10"] <= 1 for of in recalls.values())
    for way in GROWTH:
        assert len(run["growth"][way]["recalls"]) == 42


def test_a_frozen_connector_forgets_nothing_of_the_old_directions(finished):
    (run,) = json.loads((finished / "results.json").read_text())["runs"]
    old = run["arms"]["alternating"]["recalls"]
    assert {name: of for name, of in run["growth"]["frozen"]["recalls"].items() if SEVENTH not in name} == old
    assert {name: of for name, of in run["growth"]["new"]["recalls"].items() if SEVENTH not in name} != old


def test_usage_of_every_direction_and_branch_sums_to_one(finished):
    (run,) = json.loads((finished / "results.json").read_text())["runs"]
    usage = torch.tensor(list(run["arms"]["alternating"]["usage"].values()))
    assert usage.shape == (30, 2, Recipe.quick().experts)
    torch.testing.assert_close(usage.sum(2), torch.ones(30, 2))


def test_finished_runs_are_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(altmoe, "run_seed", lambda *_: pytest.fail("was done again"))
    altmoe.run_study(finished, quick=True)


def test_active_parameters_of_the_mlp_are_those_of_the_mixture(views):
    six = views.of(VIEWS)
    mixture = make_connector(six.dims, QUICK, 0)
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


def test_a_seventh_view_from_the_start_has_all_directions(views):
    six = fit(make_connector(views.of(VIEWS).dims, QUICK, 0), views.of(VIEWS), QUICK, 0)
    outcome = grow("scratch", six, views, QUICK, 0)
    assert len(outcome.recalls) == 42 and outcome.parameters > six.parameters


def test_verdicts_name_what_is_clear(finished):
    (run,) = json.loads((finished / "results.json").read_text())["runs"]
    runs = []
    for seed in range(3):
        copy = json.loads(json.dumps(run)) | {"seed": seed}
        for arm in TITLES:
            value = {"mlp": 0.4 + 0.001 * seed, "joint": 0.6 + 0.001 * seed}.get(arm, 0.5)
            copy["arms"][arm]["recalls"] = {n: {str(k): value for k in KS} for n in run["arms"][arm]["recalls"]}
        runs.append(copy)
    text = "\n".join(verdicts(summarise(runs)))
    assert f"{TITLES['mlp']}: clearly worse than" in text and f"{TITLES['joint']}: clearly better than" in text
    assert f"{TITLES['v6']}: not clearly different" in text
