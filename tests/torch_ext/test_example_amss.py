"""The example script of AMSS runs as it stands, from any folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "amss.py"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(SCRIPT), "--epochs", "4", "--seed", "1"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert not list(folder.iterdir())
    return result.stdout


def accuracies(printed):
    """{title: (fused, clean alone, noisy alone)}"""
    pattern = r"^(.*?) +test accuracy ([\d.]+) % \(clean alone ([\d.]+) %, noisy alone ([\d.]+) %\)$"
    return {name: tuple(map(float, values)) for name, *values in re.findall(pattern, printed, re.M)}


def test_it_reports_joint_training_amss_and_amss_plus(printed):
    assert list(accuracies(printed)) == ["joint training", "AMSS", "AMSS+"]


def test_every_model_learns_and_the_noisy_modality_is_the_weaker_one(printed):
    for fused, clean, noisy in accuracies(printed).values():
        assert fused > 80 and clean > noisy > 15  # a guess is right in 10 % of the rows


def test_the_weaker_modality_is_updated_more(printed):
    rows = re.findall(r"updated part: clean ([\d.]+), noisy ([\d.]+)$", printed, re.M)
    assert len(rows) == 2
    for clean, noisy in rows:
        assert float(clean) < 0.5 < float(noisy)
