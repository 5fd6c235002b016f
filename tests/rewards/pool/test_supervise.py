"""Whatever a reward started ends with its judging process, and with the guard that started it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.rewards import RewardSpec
from rewards.pool.guard import Guard
from tests.rewards.pool.test_guard import LIMIT, TASK, alive, scores
from tests.waiting import wait_until

DAEMON = """
import os, subprocess, sys
# The middle process ends at once, so the daemon has no parent; it is in a session of its own, and knows no variable.
START = (
    "import subprocess; null = subprocess.DEVNULL; "
    "print(subprocess.Popen(['/bin/sleep', '600'], start_new_session=True, stdout=null, env={}).pid)"
)
def daemon(task, completion):
    pid = float(subprocess.check_output([sys.executable, "-c", START]))
    if completion == "dies":
        os.write(2, b"daemon %d\\n" % pid)
        os._exit(3)
    return pid
"""


def test_a_daemon_ends_with_its_judge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The guard ends the judge, or that one dies by itself; a program that the judge did not start lives on."""
    (tmp_path / "daemon.py").write_text(DAEMON)
    own = subprocess.Popen(["/bin/sleep", "600"])
    with Guard([RewardSpec(name=f"{tmp_path}/daemon.py:daemon")], timeout_seconds=LIMIT) as guard:
        [pid] = scores(guard.judge("daemon", TASK, ["x"]))
        assert pid is not None and alive(int(pid))
        [verdict] = guard.judge("daemon", TASK, ["dies"])
        assert "exit code 3" in verdict.detail and not alive(int(pid))
        found = [int(number) for number in re.findall(r"daemon (\d+)", capfd.readouterr().err)]
        assert found and not any(map(alive, found))
        [pid] = scores(guard.judge("daemon", TASK, ["x"]))
        assert pid is not None and alive(int(pid))
    assert not alive(int(pid)) and alive(own.pid)
    own.kill()
    own.wait()


def test_a_killed_guard_leaves_neither_daemon_nor_files(tmp_path: Path) -> None:
    (tmp_path / "daemon.py").write_text(DAEMON)
    program = (
        "import os, sys\n"
        "from configs.rewards import RewardSpec\n"
        "from rewards.pool.guard import Guard\n"
        "from rewards.types import Task\n"
        "guard = Guard([RewardSpec(name=sys.argv[1])], timeout_seconds=60)\n"
        "print(int(guard.judge('daemon', Task('', ''), ['x'])[0].score), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-c", program, f"{tmp_path}/daemon.py:daemon"]
    killed = subprocess.run(command, stdout=subprocess.PIPE, env=environment)
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: not alive(int(killed.stdout)) and not any((tmp_path / "temporary").iterdir()))
