"""What every test process starts with, so that several can run side by side: threads, names and a Ray of its own."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator

import pytest

from pipeline.disk.home import replace_read_only_home

# Before torch is imported. Engines and ranks are given their threads by name.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # what a test starts hashes at random again, as at a user's
    os.environ.pop("PYTHONHASHSEED", None)


def pytest_configure(config: pytest.Config) -> None:
    """Workers must find the same tests under the same names, and a set in a name is written in order of its hashes."""
    replace_read_only_home()
    if config.getoption("numprocesses", None):
        os.environ["PYTHONHASHSEED"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines or ranks need every core, and the others mostly wait: the two kinds are mixed evenly, so
    that at most times one of each kind runs. The others from the last one: rewards' tests wait longest."""
    long = {item.path for item in items if item.get_closest_marker("engine") or item.get_closest_marker("ranks")}
    files = dict.fromkeys(item.path for item in items)
    kinds = ([file for file in files if file in long], [file for file in reversed(files) if file not in long])
    turn = {file: index / len(kind) for kind in kinds for index, file in enumerate(kind)}
    items.sort(key=lambda item: turn[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line with the number of tests that were skipped, and the reasons."""
    reports = terminalreporter.getreports("skipped")
    reasons = Counter(str(report.longrepr[-1]).removeprefix("Skipped: ") for report in reports)
    if reasons:
        said = "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common())
        terminalreporter.write_line(f"skipped {len(reports)} tests ({said})")


@pytest.fixture(scope="session", autouse=True)
def own_ray() -> Iterator[None]:
    """Ray's sessions of this process, and its note of the cluster in use, lie in a folder that nobody else looks into.

    Not pytest's own temporary folder: the paths of Ray's sockets must stay short.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)
