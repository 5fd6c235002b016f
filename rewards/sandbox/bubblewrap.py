"""The walls of a box, made by bubblewrap.

The first process of a box waits at a gate before it mounts anything, while its limits, its control group and its user
mapping are set from outside. The mapping too, because bubblewrap maps only the user who starts it: if that is root,
whom the kernel exempts from process limits, the program needs another user.
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
from rewards.sandbox.process import Spawned, file, spawn

FOLDER = "/box"
"""A program's folder as it sees it."""
NAMESPACE_SECONDS = 20.0
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
    """Needs of a program beside the system's own folders.

    paths: readable in the box, each at its own place. hidden: folders that are empty there. environment: variables
    beside PATH, HOME, TMPDIR and LANG. extra_mb: MiB that the runtime itself takes, on top of `Limits.memory_mb`.
    stack_mb: MiB of each thread's stack, unless the thread sets its own.
    """

    paths: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])
    extra_mb: int = 0
    stack_mb: int = 8


SYSTEM = Runtime()


def walls(bwrap: str) -> list[str]:
    """Return the part of bubblewrap's command line that is the same for every box."""
    options = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--hostname", "box"]
    options += ["--cap-drop", "ALL"]
    if _is_root():
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # setpriv gives them up
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
    """Return the part of the command line for one box.

    Where this process is root, it shares `folder` and the files in it with the box's user through their group.
    """
    # /tmp comes first, since a toolchain may lie in it.
    options = ["--perms", "1777", "--size", str(disk_bytes), "--tmpfs", "/tmp"]
    for path in runtime.paths:
        for parent in reversed(path.parents[:-1]):  # made by bubblewrap, they might be closed to the box's user
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


def enclose(
    command: Sequence[str], options: list[str], *, pass_fds: Sequence[int], lifetime: ExitStack, **popen: Any
) -> Spawned:
    """Start bubblewrap, and with it a box for `command` that waits at its gate for `admit`.

    lifetime: closes the descriptors and kills bubblewrap. popen: further arguments of `subprocess.Popen`. Raises
    RuntimeError if bubblewrap gives up or takes longer than NAMESPACE_SECONDS.
    """
    with ExitStack() as inherited:  # bubblewrap's own ends, closed here once it has them
        status, report = _pipe(lifetime, inherited)
        waiting, gate = _pipe(inherited, lifetime)
        info = os.dup(report)
        inherited.callback(os.close, info)
        fds = {"--info-fd": info, "--json-status-fd": report, "--userns-block-fd": waiting, "--block-fd": waiting}
        if rules := seccomp.bpf_filter():
            fds["--seccomp"] = file(inherited, rules)
        options = [*options, *(word for option, fd in fds.items() for word in (option, str(fd)))]
        if _is_root():
            user = [f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", "--inh-caps=-all"]
            command = [SETPRIV, *user, "--", *command]
        process = spawn(lifetime, [*options, "--", *command], pass_fds=[*fds.values(), *pass_fds], **popen)
    return Spawned(process, _first_process(process, status), status, gate)


def admit(spawned: Spawned, group: Cgroup | None, *, processes: int) -> None:
    """Give a box its control group, its number of processes and its user, and open the gate."""
    assert spawned.gate is not None
    if group:
        group.add(spawned.init)
    resource.prlimit(spawned.init, resource.RLIMIT_NPROC, (processes, processes))
    proc = Path(f"/proc/{spawned.init}")
    if _is_root():
        users = groups = f"0 0 1\n{_USER} {_NOBODY} 1\n"  # user 0 mounts, and setpriv leaves it
    else:
        users, groups = (f"{_USER} {outside} 1\n" for outside in (os.getuid(), os.getgid()))
        (proc / "setgroups").write_text("deny")  # the kernel's condition for gid_map
    (proc / "gid_map").write_text(groups)
    (proc / "uid_map").write_text(users)
    os.write(spawned.gate, b"..")  # one byte for bubblewrap, one for the first process


def _pipe(readers: ExitStack, writers: ExitStack) -> tuple[int, int]:
    """Return a pipe's ends, each closed by its stack."""
    reading, writing = os.pipe()
    readers.callback(os.close, reading)
    writers.callback(os.close, writing)
    return reading, writing


def _is_root() -> bool:
    return os.geteuid() == 0


def _first_process(process: "subprocess.Popen[bytes]", status: int) -> int:
    """Return the pid of a box's first process, which bubblewrap reports in JSON as soon as it exists."""
    report = b""
    while b"}" not in report:
        if not wait([status], NAMESPACE_SECONDS):
            raise RuntimeError(f"bubblewrap made no namespaces within {NAMESPACE_SECONDS:g} s")
        chunk = os.read(status, 4096)
        if not chunk:
            assert process.stderr
            reason = (
                process.stderr.read(4096).decode(errors="replace").strip() if wait([process.stderr.fileno()], 0) else ""
            )
            raise RuntimeError(f"bubblewrap made no namespaces: {reason or 'it gave no reason'}")
        report += chunk
    return json.JSONDecoder().raw_decode(report.decode())[0]["child-pid"]
