"""Attacks from inside a box. Each prints "held" if it fails, else its loot."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import ExitReason
from tests.rewards.sandbox.programs import SHORT, bash, python

SECRET = "the-judge-s-secret"
FAILS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def fails(what, *errors):
    '''Says which of the calls, which return -1 where they fail, came through or failed for another reason.'''
    ctypes.set_errno(0)
    if what() != -1: print("it worked")
    elif ctypes.get_errno() not in errors: print(os.strerror(ctypes.get_errno()))
    else: print("held")
"""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox()


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lies readable beside the program's folder, in the environment, in memory and in an open file of the judge."""
    path = tmp_path / "secret"
    path.write_text(SECRET)
    monkeypatch.setenv("SECRET", SECRET)
    with path.open() as file:
        os.set_inheritable(file.fileno(), True)
        yield path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def test_no_network(sandbox: Sandbox, folder: Path) -> None:
    source = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK, socket.AF_ALG):
    try:
        socket.socket(family, socket.SOCK_RAW if family == socket.AF_PACKET else socket.SOCK_STREAM)
        print("a socket of", family)
    except OSError:
        print("held")
"""
    assert set(python(sandbox, folder, source).stdout.split()) == {b"held"}


def test_no_network_where_there_is_no_filter(sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.sandbox.seccomp.bpf_filter", lambda: b"")
    source = """
import socket
for address in (("1.1.1.1", 53), ("127.0.0.1", PORT)):
    try:
        socket.create_connection(address, 5)
        print("connected to", address)
    except OSError:
        print("held")
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = python(sandbox, folder, source.replace("PORT", str(server.getsockname()[1])))
    assert result.stdout.split() == [b"held", b"held"]


def test_no_socket_of_the_host(sandbox: Sandbox, folder: Path) -> None:
    name = f"\0alignyard-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        source = f"import socket\ntry: socket.socket(socket.AF_UNIX).connect({name!r}); print('connected')\n"
        result = python(sandbox, folder, source + "except ConnectionRefusedError: print('held')")
    assert result.stdout == b"held\n"


def test_no_file_of_the_host(sandbox: Sandbox, folder: Path, secret: Path) -> None:
    paths = [secret, Path("/etc/shadow"), Path("/etc/passwd"), Path(__file__), Path.home(), Path("/var"), Path("/sys")]
    source = f"""
import os
for path in {[str(path) for path in paths]}:
    try:
        found = os.listdir(path) if os.path.isdir(path) else open(path).read()
    except OSError:
        found = []
    # of a home, the way to a toolchain may be there, and nothing else
    print("held" if not found or set(found) < {{".rustup", ".pyenv", ".local"}} else (path, found))
"""
    assert set(python(sandbox, folder, source).stdout.split()) == {b"held"}


def test_links_and_proc_lead_nowhere(sandbox: Sandbox, folder: Path, secret: Path) -> None:
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to("..")
    (folder / "root").symlink_to("/proc/1/root")
    source = f"""
import os
ways = ["link", "up/secret", "root/{secret}", "../secret", "/proc/1/cwd/secret", "/proc/self/root/{secret}"]
ways += [f"/proc/{{pid}}/root/{secret}" for pid in os.listdir("/proc") if pid.isdigit()]
ways += [f"/proc/{{pid}}/fd/{{fd}}" for pid in os.listdir("/proc") if pid.isdigit() for fd in range(3, 20)]
for way in ways:
    try: print(way if {SECRET!r} in open(way).read() else "held")
    except OSError: print("held")
"""
    assert set(python(sandbox, folder, source).stdout.splitlines()) == {b"held"}


def test_no_environment_memory_or_descriptor_of_the_judge(sandbox: Sandbox, folder: Path) -> None:
    source = f"""
import os
seen = ["{SECRET[:9]}" + "{SECRET[9:]}" in str(os.environ)]
for pid in filter(str.isdigit, os.listdir("/proc")):
    try: seen.append(b"SECRET" in open(f"/proc/{{pid}}/environ", "rb").read())
    except OSError: pass
print("held" if not any(seen) else seen)
print(sorted(os.environ), sorted(os.listdir("/proc/self/fd"))[:-1])
"""
    variables = ["HOME", "LANG", "PATH", "PWD", "TMPDIR"]
    result = python(sandbox, folder, source)
    assert result.stdout.decode().splitlines() == ["held", f"{variables} {['0', '1', '2']}"]


def test_nothing_outside_can_be_written(sandbox: Sandbox, folder: Path) -> None:
    source = """
import os, sys
places = ["/", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/proc/sys/kernel", "/box", os.path.dirname(sys.executable)]
files = ["/proc/sys/kernel/core_pattern", "/proc/self/exe", "/proc/sysrq-trigger", sys.executable, "main.py", "/bin/sh"]
for path in [f"{place}/new" for place in places] + files:
    try:
        open(path, "ab").write(b"x")
        print(path)
    except OSError:
        print("held")
"""
    assert set(python(sandbox, folder, source).stdout.split()) == {b"held"}
    assert [file.name for file in folder.iterdir()] == ["main.py"]


def test_neither_the_judge_nor_the_box_is_killed(sandbox: Sandbox, folder: Path) -> None:
    source = f"""
import os, signal
for pid in (1, os.getppid(), {os.getpid()}, {os.getppid()}, -1):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
print("held")
"""
    result = python(sandbox, folder, source)
    assert (result.reason, result.stdout) == (ExitReason.EXITED, b"held\n")


def test_the_only_processes_are_its_own(sandbox: Sandbox, folder: Path) -> None:
    result = bash(sandbox, folder, "for process in /proc/[0-9]*; do read -r name < $process/comm; echo $name; done")
    assert set(result.stdout.split()) <= {b"bwrap", b"bash"}


def test_no_privileges(sandbox: Sandbox, folder: Path) -> None:
    result = bash(sandbox, folder, "id -u; id -G; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")
    user, groups, *status = result.stdout.decode().splitlines()
    held = dict(line.split(":\t") for line in status)
    assert (user, groups.split()[0]) == ("1000", "1000")
    assert {held.pop("NoNewPrivs"), held.pop("Seccomp")} == {"1", "2"}
    del held["CapBnd"]  # what a privileged program could gain by starting another, without NoNewPrivs
    assert set(held.values()) == {"0" * 16}


@pytest.mark.parametrize(
    "call",
    [
        "libc.ptrace(0, 0, 0, 0)",  # PTRACE_TRACEME
        "libc.ptrace(16, 1, 0, 0)",  # PTRACE_ATTACH
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.umount2(b'/box', 2)",
        "libc.chroot(b'/tmp')",
        "libc.unshare(0x10000000)",  # CLONE_NEWUSER
        "libc.unshare(0x00020000)",  # CLONE_NEWNS
        "libc.setns(os.open('/proc/1/ns/uts', 0), 0) if os.access('/proc/1/ns/uts', 4) else libc.setns(0, 0)",
        "libc.syscall(NR['clone'], 0x10000000 | 17, 0, 0, 0, 0)",
        "libc.syscall(NR['keyctl'], 0, -3, 0)",
        "libc.syscall(NR['bpf'], 0, 0, 0)",
        "libc.syscall(NR['perf_event_open'], 0, 0, -1, -1, 0)",
        "libc.syscall(NR['userfaultfd'], 0)",
        "libc.syscall(NR['kexec_load'], 0, 0, 0, 0)",
        "libc.syscall(NR['init_module'], 0, 0, b'')",
        "libc.syscall(NR['open_by_handle_at'], -1, 0, 0)",
        "libc.shmget(0, 1 << 20, 0o1600)",
        "libc.sethostname(b'x', 1)",
        "libc.setuid(0)",
    ],
)
def test_a_call_is_forbidden(sandbox: Sandbox, folder: Path, call: str) -> None:
    if "NR[" in call and os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    numbers = {"clone": 56, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "kexec_load": 246}
    numbers |= {"init_module": 175, "open_by_handle_at": 304}
    source = f"{FAILS}NR = {numbers}\nfails(lambda: {call}, 1, 22 if 'setuid' in {call!r} else 1)"
    result = python(sandbox, folder, source)
    assert result.stdout.split() == [b"held"], result


@pytest.mark.parametrize(
    "number", [425, 319, 447, 435], ids=["io_uring_setup", "memfd_create", "memfd_secret", "clone3"]
)
def test_a_call_seems_not_to_exist(sandbox: Sandbox, folder: Path, number: int) -> None:
    if number == 319 and os.uname().machine != "x86_64":
        pytest.skip("the number is that of x86_64")
    result = python(sandbox, folder, f"{FAILS}fails(lambda: libc.syscall({number}, 0, 0, 0), 38)")
    assert result.stdout.split() == [b"held"], result


def test_isolation_holds_without_the_filter(sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace made inside gives back capabilities over nothing but itself."""
    monkeypatch.setattr("rewards.sandbox.seccomp.bpf_filter", lambda: b"")
    source = f"""
{FAILS}
libc.unshare(0x10000000 | 0x00020000)
libc.mount(None, b"/", None, (1 << 14) | (1 << 18), None)
libc.mount(None, b"/usr", None, 32, None)  # MS_REMOUNT without MS_RDONLY
try: open("/usr/new", "w"); print("wrote")
except OSError: print("held")
try: print(open("/proc/1/root/etc/shadow").read())
except OSError: print("held")
"""
    assert python(sandbox, folder, source, SHORT).stdout.split() == [b"held", b"held"]
