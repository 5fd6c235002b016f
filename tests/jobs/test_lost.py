"""A run whose Ray processes or whose conductor were killed is told in a sentence."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from jobs.start import _exit_code
from pipeline.cluster.room import local_cluster, lost_processes
from pipeline.disk.ending import Ending
from pipeline.errors import RunStopped


def test_a_process_of_ray_that_refuses_connections_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        processes = {"head process (gcs_server)": ("127.0.0.1", server.getsockname()[1])}
        assert lost_processes(processes) == ""
    assert "Ray's head process (gcs_server) ended" in lost_processes(processes)
    assert lost_processes({}) == ""


@pytest.mark.parametrize(
    "words",
    ["The current node timed out during startup. This could be.", "\nThe last 20 lines of /t/r/dashboard.log (it"],
)
def test_a_machine_too_busy_to_start_ray_is_told(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def init(**_: Any) -> None:
        raise Exception(words)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RunStopped, match=r"itself \(.*\): this machine may be"), local_cluster(include_dashboard=False):
        pass
    monkeypatch.setattr(ray, "init", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError), local_cluster(include_dashboard=False):
        pass


def test_a_killed_conductor_is_told_and_one_that_ended_by_itself_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: Any = SimpleNamespace(folder=tmp_path)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.kill()
    assert _exit_code(process, order) == Ending.FAULT
    printed = capsys.readouterr().err
    assert "ended by SIGKILL" in printed and "The same command resumes the run" in printed
    assert _exit_code(subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]), order) == Ending.WRONG_INPUT
    assert capsys.readouterr().err == ""
