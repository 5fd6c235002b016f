"""Runs on two nodes that one machine imitates, each scenario in name spaces of its own."""

import subprocess
import sys

import pytest

from tests.nodes.machines import HOME, why_forbidden
from tests.nodes.run import SCENARIOS

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.ranks]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_two_nodes(scenario: str) -> None:
    if reason := why_forbidden():
        pytest.skip(reason)
    result = subprocess.run([sys.executable, "-m", "tests.nodes.run", scenario], cwd=HOME, timeout=3500, check=False)
    assert result.returncode == 0, SCENARIOS[scenario].__doc__
