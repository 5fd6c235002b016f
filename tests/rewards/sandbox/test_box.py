"""Limits of a box: any program ends, for a known reason, and leaves nothing behind."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewards.sandbox import box
from rewards.sandbox.box import Sandbox
from rewards.sandbox.bubblewrap import SETPRIV, Runtime
from rewards.sandbox.process import ExitReason, finish
from rewards.sandbox.toolchains import find_toolchain, plan_program
from tests.rewards.sandbox.programs import LIMITS, SHORT, bash, python

PROMPT_SECONDS = 300
"""What is not ended goes on for 600 seconds; a busy machine ends it late, but not as late as this."""


@pytest.fixture(scope="module", params=["group", "polling"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """A sandbox whose memory is limited by a control group, and one where polling limits it."""
    sandbox = Sandbox()
    if request.param == "polling":
        sandbox._cgroups = None
    elif sandbox._cgroups is None:
        pytest.skip("no control group can be made here")
    return sandbox


@pytest.fixture(scope="module")
def unsafe() -> Sandbox:
    return Sandbox("unsafe")


def commands() -> list[str]:
    """Return the command line of every process on this machine."""
    lines: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return lines


EARLIER: set[str] = set()
"""Children that this process had before the test: other tests' clusters."""


@pytest.fixture(autouse=True)
def _earlier() -> None:
    EARLIER.clear()
    EARLIER.update(children())


def children() -> list[str]:
    pids = list[str]()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may end while the list is read
            pids += (task / "children").read_text().split()
    return [child for child in pids if child not in EARLIER]


def as_nobody(work: Callable[[Path], Any]) -> Any:
    """Call `work` as an unprivileged user, in a folder of theirs."""
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory() as folder:
            return work(Path(folder))
    source = Path(box.__file__)
    if not (source.stat().st_mode & 0o004 and all(parent.stat().st_mode & 0o001 for parent in source.parents)):
        pytest.skip("other users may not read this checkout")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer: Any = None
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with tempfile.TemporaryDirectory() as folder:
                answer = work(Path(folder))
        except Exception as error:  # noqa: BLE001  whatever it is, the parent says it
            answer = repr(error)
        finally:
            os.write(writing, pickle.dumps(answer))
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as answers:
        return pickle.loads(answers.read())


def test_a_program_reads_writes_and_exits(sandbox: Sandbox, tmp_path: Path) -> None:
    result = bash(sandbox, tmp_path, "pwd; cat; echo oops >&2; exit 3", stdin=b"hello\n")
    assert (result.reason, result.exit_code, result.signal) == (ExitReason.EXITED, 3, None)
    assert (result.stdout, result.stderr) == (b"/box\nhello\n", b"oops\n")


def test_its_streams_can_be_opened_by_name(sandbox: Sandbox, tmp_path: Path) -> None:
    result = bash(sandbox, tmp_path, "cat /dev/stdin > /dev/stdout; echo oops > /dev/stderr", stdin=b"hello")
    assert (result.stdout, result.stderr) == (b"hello", b"oops\n")


def test_a_large_input_and_output_pass(sandbox: Sandbox, tmp_path: Path) -> None:
    sent = os.urandom(3_000_000)
    assert bash(sandbox, tmp_path, "cat", replace(LIMITS, output_kb=4096), sent).stdout == sent


def test_a_crash(sandbox: Sandbox, tmp_path: Path) -> None:
    result = bash(sandbox, tmp_path, "kill -SEGV $$")
    assert (result.reason, result.exit_code, result.signal) == (ExitReason.CRASH, None, signal.SIGSEGV)


@pytest.mark.parametrize("source", ["while :; do :; done", "sleep 600", "trap '' TERM INT XCPU; sleep 600"])
def test_time_runs_out(sandbox: Sandbox, tmp_path: Path, source: str) -> None:
    result = bash(sandbox, tmp_path, source, SHORT)
    assert result.reason is ExitReason.TIME and result.seconds < PROMPT_SECONDS


@pytest.mark.parametrize("source", ["yes", "yes >&2", "yes & yes >&2"])
def test_output_is_cut_and_ends_the_program(sandbox: Sandbox, tmp_path: Path, source: str) -> None:
    result = bash(sandbox, tmp_path, source)
    assert result.reason is ExitReason.OUTPUT and result.seconds < PROMPT_SECONDS
    assert len(result.stdout) + len(result.stderr) == 1024 * LIMITS.output_kb


@pytest.mark.parametrize(
    "source",
    [
        "held = []\nwhile True: held.append(bytearray(1 << 20))",
        "bytearray(1 << 40)",
        # shared memory counts in no process's private memory
        "import mmap\nheld = mmap.mmap(-1, 1 << 30)\nfor at in range(0, 1 << 30, 4096): held[at] = 1",
        # each process stays far below the limit
        "import os, time\nfor _ in range(12): os.fork() or (bytearray(os.urandom(24 << 20)), time.sleep(600))\n"
        "time.sleep(600)",
    ],
    ids=["bit by bit", "at once", "shared", "many processes"],
)
def test_memory_runs_out(sandbox: Sandbox, tmp_path: Path, source: str) -> None:
    result = python(sandbox, tmp_path, source)
    assert result.reason is ExitReason.MEMORY


def test_another_s_want_of_memory_is_no_way_for_a_program_to_end(tmp_path: Path) -> None:
    """A group above the box's that is full kills as a full machine does."""
    sandbox = Sandbox()
    if not sandbox._cgroups or not (sandbox._cgroups["memory"] / "memory.limit_in_bytes").exists():
        pytest.skip("needs control groups of version 1, where any group may have others below")
    full = sandbox._cgroups["memory"] / f"alignyard-{os.getpid()}-full"
    full.mkdir()
    try:
        (full / "memory.limit_in_bytes").write_text(str(64 << 20))
        sandbox._cgroups = sandbox._cgroups | {"memory": full}
        with pytest.raises(RuntimeError, match="out of memory"):
            python(sandbox, tmp_path, "held = []\nwhile True: held.append(bytearray(1 << 20))")
        assert not children()
    finally:
        full.rmdir()


def test_what_processes_share_counts_once(sandbox: Sandbox, tmp_path: Path) -> None:
    source = """
import os, time
held = bytearray(os.urandom(50 << 20))
children = [os.fork() or (time.sleep(0.5), os._exit(0)) for _ in range(8)]
for child in children: os.waitpid(child, 0)
print("done")
"""
    assert python(sandbox, tmp_path, source).stdout == b"done\n"


def test_a_disk_fills(sandbox: Sandbox, tmp_path: Path) -> None:
    source = """
import errno, os
def fill(name):
    with open(name, "wb", 0) as file:
        try:
            while True: file.write(bytes(1 << 16))
        except OSError as error:
            return error.errno
print(fill("/tmp/0") == errno.EFBIG, [fill(f"/tmp/{n}") == errno.ENOSPC for n in (1, 2)])
print(sum(os.path.getsize(f"/tmp/{n}") for n in range(3)) >> 20)
"""
    half = replace(LIMITS, disk_mb=8)
    result = python(sandbox, tmp_path, source, half)
    assert result.stdout in (b"True [True, True]\n8\n", b"False [True, True]\n8\n"), result.stderr


def test_a_fork_bomb_fizzles(sandbox: Sandbox, tmp_path: Path) -> None:
    result = bash(sandbox, tmp_path, "bomb() { bomb | bomb & }; bomb; sleep 600", SHORT)
    assert result.reason in (ExitReason.TIME, ExitReason.OUTPUT) and result.seconds < PROMPT_SECONDS
    assert not children()


def test_processes_and_threads_are_counted(sandbox: Sandbox, tmp_path: Path) -> None:
    source = """
import os, threading, time
started = 0
try:
    while started < 1000:
        if started % 2: threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        elif os.fork() == 0: time.sleep(600)
        started += 1
except (OSError, RuntimeError): pass
print(started, flush=True)
os._exit(0)
"""
    started = int(python(sandbox, tmp_path, source, replace(LIMITS, memory_mb=1024)).stdout)
    assert LIMITS.processes // 2 < started < LIMITS.processes


def test_boxes_side_by_side_count_on_their_own(sandbox: Sandbox, tmp_path: Path) -> None:
    source = f"for n in $(seq {LIMITS.processes - 8}); do sleep 1 & done; wait; echo done"
    folders = [tmp_path / str(n) for n in range(4)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(len(folders)) as threads:
        results = list(threads.map(lambda folder: bash(sandbox, folder, source), folders))
    assert [(result.stdout, result.stderr) for result in results] == [(b"done\n", b"")] * len(folders)


def test_a_daemon_does_not_survive(sandbox: Sandbox, tmp_path: Path) -> None:
    mark = f"61{os.getpid()}"
    source = (
        f"(setsid sleep {mark} </dev/null >/dev/null 2>&1 &); until pgrep -f 'sleep {mark}' -c; do :; done; echo on"
    )
    result = bash(sandbox, tmp_path, source)
    assert result.reason is ExitReason.EXITED and result.stdout.endswith(b"on\n")
    assert not any(f"sleep {mark}" in command for command in commands())


def test_nothing_is_left_behind(sandbox: Sandbox, tmp_path: Path) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for source in ("exit 0", "kill -9 $$", "yes", "(sleep 600 &)"):
        bash(sandbox, tmp_path, source, SHORT)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert not children()
    groups = (sandbox._cgroups or {}).values()
    assert not [left for parent in groups for left in parent.glob(f"alignyard-{os.getpid()}-*")]


def test_two_boxes_talk_and_end_together(sandbox: Sandbox, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        echo = "import socket, sys\nwith socket.socket(fileno=int(sys.argv[1])) as line:\n    "
        talk = {"asks": "line.send(b'ping'); print(line.recv(9))", "answers": "line.send(line.recv(9) + b'!')"}
        talk["answers"] += "; import time; time.sleep(600)"
        options = {"folder": tmp_path, "limits": LIMITS, "runtime": find_toolchain("python").running}
        commands = [
            [*plan_program("python", "", 0).run[:-1], "-c", echo + talk[who], str(end.fileno())]
            for who, end in (("asks", ours), ("answers", theirs))
        ]
        with (
            sandbox.start(commands[0], pass_fds=[ours.fileno()], **options) as asking,
            sandbox.start(commands[1], pass_fds=[theirs.fileno()], **options) as answering,
        ):
            client, server = finish(asking, answering)
    assert (client.reason, client.stdout) == (ExitReason.EXITED, b"b'ping!'\n")
    assert server.reason is ExitReason.STOPPED
    assert not children()


def test_an_unprivileged_judge_has_boxes_too(tmp_path: Path) -> None:
    def judge(folder: Path) -> list[Any]:
        sandbox = Sandbox()
        bomb = bash(sandbox, folder, "bomb() { bomb | bomb & }; bomb; sleep 600", SHORT)
        eater = bash(sandbox, folder, "text=x; while :; do text=$text$text; done")
        who = bash(sandbox, folder, "id -u; cat /etc/shadow || echo held; tr '\\0' '\\n' < /proc/1/environ")
        return [
            bomb.reason in (ExitReason.TIME, ExitReason.OUTPUT),
            eater.reason,
            who.stdout.decode().split(),
            children(),
        ]

    fizzled, eater, output, survivors = as_nobody(judge)
    assert (fizzled, eater, survivors) == (True, ExitReason.MEMORY, [])
    assert output[:2] == ["1000", "held"] and {word.split("=")[0] for word in output[2:]} <= {
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
    }


def test_a_box_that_breaks_is_no_way_for_a_program_to_end(sandbox: Sandbox, tmp_path: Path) -> None:
    missing = Runtime(paths=(tmp_path / "missing",))
    with pytest.raises(RuntimeError, match=r"the box broke: bwrap: .*missing"):
        sandbox.run(["/bin/true"], folder=tmp_path, limits=LIMITS, runtime=missing)
    assert not children()
    result = bash(sandbox, tmp_path, "echo 'bwrap: setting up failed' >&2; exit 1")
    assert (result.reason, result.exit_code) == (ExitReason.EXITED, 1)


def test_the_bundled_bubblewrap_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bash(Sandbox(), tmp_path, "exit 5").exit_code == 5


def test_where_no_box_can_be_made_the_remedies_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(box, "bwrap_path", lambda: broken)
    with pytest.raises(ValueError, match=r"No permissions to create a new namespace.*user namespaces.*sandbox: unsafe"):
        Sandbox()


def test_unsafe_limits_without_a_box(unsafe: Sandbox, tmp_path: Path) -> None:
    assert bash(unsafe, tmp_path, "pwd").stdout.decode().strip() == str(tmp_path)
    assert bash(unsafe, tmp_path, "cat; exit 3", stdin=b"x").exit_code == 3
    assert bash(unsafe, tmp_path, "kill -SEGV $$").signal == signal.SIGSEGV
    assert bash(unsafe, tmp_path, "while :; do :; done", SHORT).reason is ExitReason.TIME
    assert bash(unsafe, tmp_path, "sleep 600 & sleep 600", SHORT).reason is ExitReason.TIME
    assert bash(unsafe, tmp_path, "yes").reason is ExitReason.OUTPUT
    assert python(unsafe, tmp_path, "held = bytearray(1 << 30)").reason is ExitReason.MEMORY


@pytest.mark.skipif(not Path(SETPRIV).exists(), reason="needs setpriv")
def test_unsafe_a_program_dies_with_its_judge(tmp_path: Path) -> None:
    mark = f"62{os.getpid()}"
    judge = f"""
import os, signal
from pathlib import Path
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import Limits
command = ["sleep", "{mark}"]
with Sandbox("unsafe").start(command, folder=Path({str(tmp_path)!r}), limits=Limits(seconds=600)) as box:
    command = Path(f"/proc/{{box._spawned.process.pid}}/cmdline")
    while not command.read_bytes().startswith(b"sleep"): pass
    print("on", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", judge], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"on\n"), ended.stderr
    deadline = time.monotonic() + PROMPT_SECONDS
    while any(command.startswith(f"sleep {mark}") for command in commands()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
