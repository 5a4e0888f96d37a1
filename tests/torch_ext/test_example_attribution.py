"""The example script of attribution regularisation runs as it stands, from any folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "attribution.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(SCRIPT), "--epochs", "8", "--seed", "1", "--weight", "1", "--plot", "shares.png"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_it_reports_both_trainings_and_draws_the_shares(run):
    folder, printed = run
    assert re.findall(r"^(\w+) +shares", printed, re.M) == ["without", "regularised"]
    assert [f.name for f in folder.iterdir()] == ["shares.png"]


def test_both_models_learn(run):
    rows = re.findall(
        r"test accuracy ([\d.]+) %, with pictures of other digits as clean ones ([\d.]+) %$", run[1], re.M
    )
    assert len(rows) == 2
    for whole, misled in rows:
        assert float(whole) > 80 > float(misled)


def test_the_shares_move_to_those_asked_for(run):
    rows = re.findall(r"shares clean ([\d.]+), noisy ([\d.]+)$", run[1], re.M)
    (without, _), (regularised, other) = (tuple(map(float, row)) for row in rows)
    assert abs(regularised - 0.5) < abs(without - 0.5) and regularised + other == pytest.approx(1, abs=0.02)
