"""Limit the memory of a box by a control group where this process may make one, and by polling elsewhere.

Version 2 needs a parent that delegates both controllers, as systemd's services and sessions have; version 1 needs root.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

_PREFIX = "alignyard-"
_CONTROLLERS = ("memory", "pids")
_SLACK_BYTES = 2**20
"""More than any single allocation whose refusal makes the kernel kill."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Cgroup:
    """A control group for one box.

    parents: the parent folder of each controller (see `parents`). Raises OSError if the kernel refuses.
    """

    def __init__(self, parents: dict[str, Path], *, memory_bytes: int, processes: int) -> None:
        name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"  # an earlier process of this pid may have left groups
        memory, pids = (parents[controller] / name for controller in _CONTROLLERS)
        self._memory, self._memory_bytes, self._folders = memory, memory_bytes, {memory, pids}
        with ExitStack() as undo:
            for folder in self._folders:
                folder.mkdir()
                undo.callback(folder.rmdir)
            self._version = 2 if (memory / "memory.max").exists() else 1
            if self._version == 2:
                limit, swap, swap_value = "memory.max", "memory.swap.max", 0
            else:
                limit, swap, swap_value = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", memory_bytes
            (memory / limit).write_text(str(memory_bytes))
            if (memory / swap).exists():
                (memory / swap).write_text(str(swap_value))
            (pids / "pids.max").write_text(str(processes))
            undo.pop_all()

    def add(self, pid: int) -> None:
        """Move a process, and all that it will start, into the group."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(pid))

    @property
    def ran_out(self) -> bool:
        """True if the kernel killed a process because the group was at its limit.

        Raises RuntimeError if it killed because a group above, or the whole machine, ran out of memory.
        """
        events = self._memory / ("memory.events" if self._version == 2 else "memory.oom_control")
        counts = dict(line.split() for line in events.read_text().splitlines())
        if int(counts["oom_kill"]) == 0:
            return False
        if self._version == 2:
            at_limit = int(counts["oom"]) > 0
        else:  # not by failcnt, which Linux 6.18 leaves at 0
            most = max(int(file.read_text()) for file in self._memory.glob("memory.*max_usage_in_bytes"))
            at_limit = most > self._memory_bytes - _SLACK_BYTES
        if not at_limit:
            raise RuntimeError("the machine ran out of memory")
        return True

    def remove(self) -> None:
        """Remove the group after its last process has ended."""
        for folder in self._folders:
            folder.rmdir()


def parents() -> dict[str, Path] | None:
    """Return the folder by controller in which this process may make groups, or None.

    Removes groups that killed processes left behind.
    """
    folders = _parents(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
    if {*folders} != {*_CONTROLLERS} or not all(os.access(folder, os.W_OK) for folder in folders.values()):
        return None
    for folder in {*folders.values()}:
        for group in folder.glob(f"{_PREFIX}*"):
            if not Path("/proc", group.name.split("-")[1]).exists():
                with suppress(OSError):  # another process removed it first
                    group.rmdir()
    return folders


def _parents(memberships: str, mounts: str) -> dict[str, Path]:
    """Parse /proc/self/cgroup and /proc/self/mounts into the parent folder of new groups, by controller.

    In version 2 a group with processes cannot delegate controllers, so new groups become siblings of this process's.
    """
    folders: dict[str, Path] = {}
    hierarchies = [line.split(":", 2)[1:] for line in memberships.splitlines()]
    for _, point, kind, options, *_ in (line.split() for line in mounts.splitlines()):
        for controllers, path in hierarchies:
            own = Path(point, path.lstrip("/"))
            if kind == "cgroup2" and not controllers and path != "/":
                delegated = own.parent / "cgroup.subtree_control"
                if delegated.exists() and {*_CONTROLLERS} <= {*delegated.read_text().split()}:
                    folders = dict.fromkeys(_CONTROLLERS, own.parent)
            elif kind == "cgroup" and controllers in _CONTROLLERS and controllers in options.split(","):
                folders[controllers] = own
    return folders


def exceeds(pid: int, memory_bytes: int) -> bool:
    """Return whether a process and its descendants hold more than `memory_bytes`, shared memory counted once.

    The fast sum counts shared pages in every process, so the exact sum is needed only if the fast one is above.
    """
    pids = list(family(pid))
    return _total(pids, _resident) > memory_bytes and _total(pids, _proportional) > memory_bytes


def family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants; nothing if it has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):  # it ended
        return
    yield pid
    for child in chain.from_iterable(map(_children, tasks)):
        yield from family(child)


def _children(task: Path) -> list[int]:
    try:
        return [int(child) for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # this thread ended; its process may go on
        return []


def _total(pids: list[int], measure: Callable[[Path], int]) -> int:
    total = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            total += measure(Path(f"/proc/{pid}"))
    return total


def _resident(process: Path) -> int:
    return int((process / "statm").read_text().split()[1]) * _PAGE_BYTES


def _proportional(process: Path) -> int:
    """Return resident memory, each page divided by the number of processes that share it."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
