"""The example script of BTW runs as it stands, from any folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "btw.py"
MODALITIES = ["left", "right", "noisy"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(SCRIPT), "--epochs", "2", "--seed", "1"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert not list(folder.iterdir())
    return result.stdout


def accuracies(printed):
    return {
        name.strip(): float(value) for name, value in re.findall(r"^(.*?) test accuracy ([\d.]+) %$", printed, re.M)
    }


def test_it_reports_each_modality_the_plain_model_and_both_modes_of_btw(printed):
    alone = [f"{name} alone" for name in MODALITIES]
    assert list(accuracies(printed)) == [*alone, "plain fusion", "BTW, mode diverge", "BTW, mode agree"]


def test_every_model_learns_and_the_noisy_modality_is_the_weakest(printed):
    found = accuracies(printed)
    assert min(found.values()) > 15  # a guess is right in 10 % of the rows
    assert min(found, key=found.get) == "noisy alone"
    assert found["plain fusion"] > max(found[f"{name} alone"] for name in MODALITIES)


def test_mean_weights_sum_to_the_number_of_modalities_and_are_not_the_ones_they_began_with(printed):
    rows = re.findall(r"mean weights: left ([\d.]+), right ([\d.]+), noisy ([\d.]+)$", printed, re.M)
    assert len(rows) == 2
    for row in rows:
        weights = [float(value) for value in row]
        assert abs(sum(weights) - 3) <= 0.016  # three roundings to two digits
        assert max(abs(w - 1) for w in weights) > 0.05


def test_the_lines_to_add_are_few_and_marked():
    lines = SCRIPT.read_text().splitlines()
    marked = [line for line in lines if "# BTW:" in line]
    assert 5 <= len(marked) <= 12
    for call in ("mmbal.BTW(", "btw.apply(", "btw.update(", "btw.step(", "btw.weights("):
        assert any(call in line for line in marked), call
