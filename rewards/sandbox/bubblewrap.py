"""The walls of a box, as bubblewrap makes them.

The first process of a box waits at a gate before it mounts anything, so that its limits, its control group and its
users are set from outside. Its users too: bubblewrap itself maps only the user who starts it, and where that is root,
whom the kernel exempts from limits on processes, the program has to be another.
"""

import json
import os
import resource
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rewards.sandbox import seccomp
from rewards.sandbox.cgroup import Cgroup

FOLDER = "/box"
"""Where a program in a box finds its folder."""
START_SECONDS = 20.0
"""Longest bubblewrap may take to make the namespaces."""
SETPRIV = "/usr/bin/setpriv"

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "shm": "/tmp",
}
_USER = 1000  # inside
_NOBODY = 65534  # the same user outside, where root starts the box


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a program needs beside the system's own folders.

    paths: readable in the box, each at its own place. hidden: folders that are empty there. environment: variables
    beside PATH, HOME, TMPDIR and LANG. extra_mb: MiB that the runtime itself takes, on top of `Limits.memory_mb`.
    stack_mb: MiB of the main thread's stack, and of every other's that doesn't say otherwise.
    """

    paths: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])
    extra_mb: int = 0
    stack_mb: int = 8


SYSTEM = Runtime()
"""Needs nothing more."""


def walls(bwrap: str) -> list[str]:
    """Bubblewrap's command line as far as it is the same for every box."""
    options = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--hostname", "box"]
    options += ["--cap-drop", "ALL"]
    if _is_root():
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # which setpriv gives up
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            options += ["--ro-bind", str(path), str(path)]
    options += ["--proc", "/proc", "--dir", "/dev", "--dir", "/etc"]
    for name in _ETC:
        options += ["--ro-bind-try", name, name]
    for name in _DEVICES:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in _LINKS.items():
        options += ["--symlink", target, f"/dev/{name}"]
    return options


def places(folder: Path, runtime: Runtime, *, disk_bytes: int, writable: bool) -> list[str]:
    """What one box's command line has beside that. Where this process is root, `folder` and the files in it are
    shared with the user of the box through their group."""
    options = ["--perms", "1777", "--size", str(disk_bytes), "--tmpfs", "/tmp"]  # first: a toolchain may live there
    for path in runtime.paths:
        for parent in reversed(path.parents[:-1]):  # left to bubblewrap, the box's user might not pass them
            options += ["--dir", str(parent)]
        options += ["--ro-bind", str(path), str(path)]
    for path in runtime.hidden:
        options += ["--tmpfs", str(path), "--remount-ro", str(path)]
    if _is_root():
        for shared in (folder, *folder.iterdir()):
            if not shared.is_symlink():
                mode = shared.stat().st_mode & 0o777
                os.chown(shared, -1, _NOBODY)
                shared.chmod(mode | (mode & 0o700) >> 3)
    bind = "--bind" if writable else "--ro-bind"
    return [*options, bind, str(folder), FOLDER, "--chdir", FOLDER, "--remount-ro", "/"]


@dataclass(frozen=True, slots=True)
class Enclosed:
    """A box that stands as far as the gate.

    process: bubblewrap. init: the first process of the box, which waits at `gate`. status: what bubblewrap reports on.
    """

    process: "subprocess.Popen[bytes]"
    init: int
    status: int
    gate: int


def enclose(
    command: Sequence[str], options: list[str], *, pass_fds: Sequence[int], errors: int, held: ExitStack, **popen: Any
) -> Enclosed:
    """Starts bubblewrap, and with it a box for `command`.

    errors: our end of its stderr. held: gets what has to be closed and killed in the end. popen: further arguments of
    `subprocess.Popen`. Raises RuntimeError where bubblewrap gives up or takes longer than START_SECONDS.
    """
    with ExitStack() as given:
        status, report = pipe(held, given)
        waiting, gate = pipe(given, held)
        info = os.dup(report)
        given.callback(os.close, info)
        fds = {"--info-fd": info, "--json-status-fd": report, "--userns-block-fd": waiting, "--block-fd": waiting}
        if rules := seccomp.program():
            fds["--seccomp"] = file(given, rules)
        options = [*options, *(word for option, fd in fds.items() for word in (option, str(fd)))]
        if _is_root():
            user = [f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", "--inh-caps=-all"]
            command = [SETPRIV, *user, "--", *command]
        process = subprocess.Popen[bytes]([*options, "--", *command], pass_fds=[*fds.values(), *pass_fds], **popen)
        held.callback(_abandon, process)
    return Enclosed(process, _first_process(status, errors), status, gate)


def admit(box: Enclosed, group: Cgroup | None, *, processes: int) -> None:
    """Gives the box its group, its number of processes and its user, and opens the gate."""
    if group:
        group.add(box.init)
    resource.prlimit(box.init, resource.RLIMIT_NPROC, (processes, processes))
    proc = Path(f"/proc/{box.init}")
    if _is_root():
        users = groups = f"0 0 1\n{_USER} {_NOBODY} 1\n"  # 0 mounts, and setpriv leaves it
    else:
        users, groups = (f"{_USER} {outside} 1\n" for outside in (os.getuid(), os.getgid()))
        (proc / "setgroups").write_text("deny")  # the kernel's condition for gid_map
    (proc / "gid_map").write_text(groups)
    (proc / "uid_map").write_text(users)
    os.write(box.gate, b"..")  # a byte for bubblewrap and one for the first process


def pipe(readers: ExitStack, writers: ExitStack) -> tuple[int, int]:
    """A pipe whose ends are closed with the two stacks. In the box it can be opened by name, as /dev/stdout."""
    reading, writing = os.pipe()
    readers.callback(os.close, reading)
    writers.callback(os.close, writing)
    os.fchmod(writing, 0o666)
    return reading, writing


def file(held: ExitStack, content: bytes) -> int:
    """A descriptor that reads as `content`, and is closed with `held`."""
    with os.fdopen(os.memfd_create("alignyard"), "wb") as memory:
        memory.write(content)
        memory.flush()
        fd = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY)
    held.callback(os.close, fd)
    return fd


def _is_root() -> bool:
    return os.geteuid() == 0


def _first_process(status: int, errors: int) -> int:
    """The pid of the first process of a box, which bubblewrap reports in JSON as soon as it exists."""
    said = b""
    while b"}" not in said:
        if not wait([status], START_SECONDS):
            raise RuntimeError(f"bubblewrap made no namespaces within {START_SECONDS:g} s")
        chunk = os.read(status, 4096)
        if not chunk:
            reason = (
                os.read(errors, 4096).decode(errors="replace").strip() if wait([errors], 0) else "it didn't say why"
            )
            raise RuntimeError(f"bubblewrap made no namespaces: {reason}")
        said += chunk
    return json.JSONDecoder().raw_decode(said.decode())[0]["child-pid"]


def _abandon(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait(START_SECONDS)
