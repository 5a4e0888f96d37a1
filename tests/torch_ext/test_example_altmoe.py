"""The example script of Alt-MoE runs as it stands, from any folder, and goes on where it was stopped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "altmoe.py"
DIRECTIONS = {f"{a}->{b}" for a in ("top", "bottom", "spectrum") for b in ("top", "bottom", "spectrum") if a != b}


def run_in(folder, epochs):
    command = [sys.executable, str(SCRIPT), "--epochs", str(epochs), "--seed", "1", "--folder", "run"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What two runs print, one of which was made in two parts; and the folder of the other."""
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    run_in(parts, 6)
    return run_in(whole, 14), run_in(parts, 14), whole / "run"


def recalls(text, when):
    (line,) = re.findall(rf"^{when} +(.*)$", text, re.M)
    found = re.findall(r"([\w>-]+) ([\d.]+) / ([\d.]+)", line)
    assert {name for name, _, _ in found} == DIRECTIONS
    return [float(ten) for _, _, ten in found]


def test_recalls_grow_in_every_direction(printed):
    assert max(recalls(printed[0], "before")) < 10
    assert min(recalls(printed[0], "after")) > 15


def test_it_shows_which_experts_each_direction_uses_and_finds_stored_vectors(printed):
    shares = re.findall(r"^([\w>-]+) experts ([\d. ]+)$", printed[0], re.M)
    assert {name for name, _ in shares} == DIRECTIONS
    for _, row in shares:
        values = [float(value) for value in row.split()]
        assert len(values) == 8 and sum(values) == pytest.approx(1, abs=0.05)
    assert (
        len(
            re.findall(
                r"^spectra for the upper half of picture \d: picture \d+, picture \d+, picture \d+$", printed[0], re.M
            )
        )
        == 3
    )
    assert {f.name for f in printed[2].iterdir()} == {"checkpoint.pt", "spectra"}


def test_a_run_in_two_parts_is_the_run_in_one(printed):
    whole, parts = (re.sub(r"^(goes on|before|now).*\n", "", text, flags=re.M) for text in printed[:2])
    assert "goes on from step 90" in printed[1] and "before" not in printed[1]
    assert min(recalls(printed[1], "now")) > max(recalls(printed[0], "before")) / 2
    assert whole == parts
