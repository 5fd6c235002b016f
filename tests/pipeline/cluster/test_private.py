"""A cluster of one machine is reached by its user alone, and leaves nothing behind."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from pipeline.cluster.room import (
    _private_folder,  # pyright: ignore[reportPrivateUsage]
    local_cluster,
    quoted_interpreter,
)
from pipeline.disk.home import restrict_token, write_token
from rewards.sandbox.cgroup import family
from tests.sockets import exposed
from tests.waiting import wait_until

START_AND_WAIT = """
import time
from pipeline.cluster.room import local_cluster
with local_cluster(log_to_driver=False, include_dashboard=False):
    print("started", flush=True)
    time.sleep(600)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.ranks
def test_its_user_alone_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: the sessions of Ray itself are open to all, and so are its ports."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    parent = Path(os.environ["RAY_TMPDIR"])
    with local_cluster(include_dashboard=True, log_to_driver=False, runtime_env=quoted_interpreter()) as context:
        [folder] = parent.glob("ay-ray-*")
        assert mode(folder) == 0o700 and (folder / "r" / "session_latest").is_dir()
        assert os.environ["TMPDIR"] == str(folder / "tmp")
        assert exposed(family(os.getpid())) == []
        with pytest.raises(HTTPError) as refusal:
            urlopen(f"http://{context.dashboard_url}/api/jobs/", timeout=60)
        assert refusal.value.code == 401
    assert not folder.exists() and os.environ["RAY_AUTH_MODE"] == "disabled"
    assert Path(os.environ.get("TMPDIR", "/")).is_dir()


def test_a_socket_that_others_reach_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0)) as public:
        [line] = [line for line in exposed([os.getpid()]) if "0.0.0.0" in line]
        assert line.endswith(f" 0.0.0.0 {public.getsockname()[1]}")


def test_a_long_path_for_sessions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 40)))
    with pytest.raises(ValueError, match=r"RAY_TMPDIR=.* shorter path"), local_cluster():
        pass


def test_a_folder_that_a_late_process_makes_anew_is_removed_too() -> None:
    """As those of Ray do that had only begun to start when their cluster ended."""
    with _private_folder() as folder:
        assert mode(folder) == 0o700
        (folder / "r").mkdir()
    assert not folder.exists()
    (folder / "r").mkdir(parents=True)
    wait_until(lambda: not folder.exists())


@pytest.mark.ranks
def test_a_killed_process_leaves_no_folder() -> None:
    parent = Path(os.environ["RAY_TMPDIR"])
    command = [sys.executable, "-c", START_AND_WAIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "started\n" in process.stdout  # reads up to that line
        assert list(parent.glob("ay-ray-*"))
        process.kill()
    wait_until(lambda: not list(parent.glob("ay-ray-*")))


def test_the_token_is_read_by_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_token()
    file = tmp_path / ".ray" / "auth_token"
    token = file.read_text()
    assert len(token) == 64 and mode(file) == 0o600 and list(file.parent.iterdir()) == [file]
    write_token()
    assert file.read_text() == token
    file.chmod(0o644)  # as Ray writes it
    restrict_token()
    assert mode(file) == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    write_token()
    assert mode(tmp_path / "elsewhere") == 0o600
