"""The memory of a box: kept within bounds by a control group where this process may make one, else by looking.

Version 2 needs a parent that hands both controllers on, as systemd's services and sessions have; version 1 needs root.
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
"""More than any single request whose refusal makes the kernel kill."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Cgroup:
    """A control group for one box.

    parents: the folder of each controller to make it in (see `parents`). Raises OSError where the kernel refuses.
    """

    def __init__(self, parents: dict[str, Path], *, memory_bytes: int, processes: int) -> None:
        name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"  # whoever had this pid may have left groups behind
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
        """Moves a process, and what it will start, into the group."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(pid))

    @property
    def ran_out(self) -> bool:
        """Whether the kernel killed in here because the group was at its limit.

        Raises RuntimeError where it killed for another's want of memory: a group's above, or the whole machine's.
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
        """Removes the group, in which nothing runs any more."""
        for folder in self._folders:
            folder.rmdir()


def parents() -> dict[str, Path] | None:
    """Where this process may make groups that limit memory and processes, by controller; None where it may not.

    Clears away groups that processes left behind which were killed.
    """
    found = _parents(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
    if {*found} != {*_CONTROLLERS} or not all(os.access(folder, os.W_OK) for folder in found.values()):
        return None
    for folder in {*found.values()}:
        for group in folder.glob(f"{_PREFIX}*"):
            if not Path("/proc", group.name.split("-")[1]).exists():
                with suppress(OSError):  # a neighbour was quicker
                    group.rmdir()
    return found


def _parents(memberships: str, mounts: str) -> dict[str, Path]:
    """What /proc/self/cgroup and /proc/self/mounts say: per controller the folder in which to make a group.

    In version 2 a group that holds processes can't hand controllers on, so ours become siblings of our process's.
    """
    found: dict[str, Path] = {}
    hierarchies = [line.split(":", 2)[1:] for line in memberships.splitlines()]
    for _, point, kind, options, *_ in (line.split() for line in mounts.splitlines()):
        for controllers, place in hierarchies:
            here = Path(point, place.lstrip("/"))
            if kind == "cgroup2" and not controllers and place != "/":
                handed_on = here.parent / "cgroup.subtree_control"
                if handed_on.exists() and {*_CONTROLLERS} <= {*handed_on.read_text().split()}:
                    found = dict.fromkeys(_CONTROLLERS, here.parent)
            elif kind == "cgroup" and controllers in _CONTROLLERS and controllers in options.split(","):
                found[controllers] = here
    return found


def exceeds(pid: int, memory_bytes: int) -> bool:
    """Whether a process and all below it hold more than `memory_bytes`, shared memory counted once.

    The quick sum counts shared pages in every process that has them; the exact one is taken only where that may matter.
    """
    pids = list(family(pid))
    return _total(pids, _resident) > memory_bytes and _total(pids, _proportional) > memory_bytes


def family(pid: int) -> Iterator[int]:
    """A process and all below it, nothing where it has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return
    yield pid
    for child in chain.from_iterable(map(_children, tasks)):
        yield from family(child)


def _children(task: Path) -> list[int]:
    try:
        return [int(child) for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # this thread ended meanwhile; its process need not have
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
    """Resident memory, each page divided by the number of processes that have it."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
