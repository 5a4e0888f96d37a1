import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "torch_ext"))  # the oracles

from families import FAMILIES


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_terminal_summary(terminalreporter):
    """Families and tests that name them: how many passed of how many."""
    table, titles = {}, []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if outcome == "passed" and report.when != "call":
                continue
            test, _, parameters = report.nodeid.partition("::")[2].partition("[")
            for family in FAMILIES:
                if re.search(rf"(^|-){family}(\]|:)", parameters):
                    cell = table.setdefault(family, {}).setdefault(test, [0, 0])
                    cell[0] += outcome == "passed"
                    cell[1] += 1
                    titles += [] if test in titles else [test]
    for i, test in enumerate(titles):
        terminalreporter.write_line(f"({i + 1}) {test.removeprefix('test_').replace('_', ' ')}")
    for family, row in table.items():
        cells = ["{}/{}".format(*row[test]) if test in row else "-" for test in titles]
        terminalreporter.write_line(f"family {family:12} " + "  ".join(f"({i + 1}) {c}" for i, c in enumerate(cells)))


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
