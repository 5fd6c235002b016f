"""A program in a box from its start to its end: its limits, its output, its death."""

import functools
import os
import re
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import wait

from rewards.sandbox.cgroup import Cgroup, exceeds

MIB = 2**20
END_SECONDS = 20.0
"""Longest the kernel may take to end what was killed."""

_LOOK_SECONDS = 0.02
"""Between two looks at the time and the memory of a box, at most."""
_REFUSED = (
    b"what():  std::bad_alloc",
    b"\nMemoryError",
    b"java.lang.OutOfMemoryError",
    b"heap out of memory",  # node
    b"memory allocation of",  # rust
    b"runtime: out of memory",  # go
    b"out of memory allocating",  # gcc
    b"annot allocate ",  # bash, and strerror(ENOMEM)
)
_NEARLY = 0.9
"""Share of the memory limit above which a crash counts as running out of memory."""
_HALF = 0.5
"""Share of the limit on processor time above which a SIGKILL counts as a time-out. The kernel counts that
limit in ticks, and on a busy machine far fewer seconds than were allowed have been spent by then."""
_SIGNALLED = 128
_CHUNK = 1 << 16


class Ended(StrEnum):
    """How a program ended; `STOPPED`: it still ran when it was no longer needed."""

    EXITED = "exited"
    CRASH = "crash"
    TIME = "time limit"
    MEMORY = "memory limit"
    OUTPUT = "output limit"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take.

    seconds: processor time of each of its processes, rounded up to whole seconds; all together end after
    `wall_seconds`. memory_mb: MiB in all its processes together, beside its runtime's own `extra_mb`. output_kb: KiB on
    stdout and stderr together. disk_mb: MiB in /tmp, and in any one file. processes: threads count; before Linux 5.14
    so may those of others (see `rewards.sandbox.box`).
    """

    seconds: float = 10.0
    memory_mb: int = 256
    output_kb: int = 1024
    disk_mb: int = 64
    processes: int = 64

    @property
    def wall_seconds(self) -> float:
        """Seconds after which it is ended whatever it does: far more than `seconds`, since to wait for a processor on a
        busy machine is not the program's doing."""
        return 3 * self.seconds + 1


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ran.

    exit_code: None if it was killed or died of a `signal`. An exit code of 128 + n counts as death by signal n, as in
    every shell. seconds: wall clock, from when the box stood.
    """

    ended: Ended
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    seconds: float


class Boxed:
    """A program that runs, made by `Sandbox.start` and ended by `finish`.

    process: what was started. status: bubblewrap's report, None without one. init: the first process of the box, with
    which everything in it ends; `process` itself without a box. output: our ends of its stdout and stderr. held: what
    to let go at the end, which it takes over.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        init: int,
        status: int | None,
        output: Sequence[int],
        limits: Limits,
        *,
        memory_bytes: int,
        cgroup: Cgroup | None,
        held: ExitStack,
    ) -> None:
        self.over = False
        self._process, self._init, self._status, self._limits = process, init, status, limits
        self._memory_bytes, self._cgroup = memory_bytes, cgroup
        self._exit, self._init_exit = os.pidfd_open(process.pid), os.pidfd_open(init)
        held.callback(os.close, self._exit)
        held.callback(os.close, self._init_exit)
        self._written = {fd: bytearray() for fd in output}
        for fd in output:
            os.set_blocking(fd, False)
        self._ended: Ended | None = None
        self._reaped = False
        self._began = time.perf_counter()
        self._deadline = self._began + limits.wall_seconds
        self._held = held.pop_all()

    @property
    def descriptors(self) -> list[int]:
        """What to wait on: its output and its end."""
        return [*self._written, self._exit]

    def take(self, fd: int) -> bool:
        """Takes what a ready descriptor has to say; False when that was all."""
        if fd == self._exit:
            self.over = True
            return False
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        self._written[fd] += chunk
        excess = sum(map(len, self._written.values())) - 1024 * self._limits.output_kb
        if excess > 0:
            del self._written[fd][-excess:]
            self.kill(Ended.OUTPUT)
        return bool(chunk) and excess <= 0

    def look(self) -> None:
        """Ends it when it is past its time or its memory.

        Raises RuntimeError where it was ended and is still there, and where the machine ran out of memory.
        """
        late = time.perf_counter() > self._deadline
        if self._ended and late:
            raise RuntimeError(f"process {self._process.pid} doesn't end within {END_SECONDS:g} s of being killed")
        if late:
            self.kill(Ended.TIME)
        elif not self._ended and self._out_of_memory():
            self.kill(Ended.MEMORY)

    def kill(self, ended: Ended) -> None:
        """Ends everything in the box; the first reason given counts."""
        if not self._ended:
            self._ended = ended
            self._deadline = time.perf_counter() + END_SECONDS
        self._end()

    def result(self) -> Ran:
        """How it ran, after ending what is left of it. To be called once.

        Raises RuntimeError where that says nothing of the program: the box broke, the machine ran out of memory, or the
        kernel cannot end it.
        """
        seconds = time.perf_counter() - self._began
        with self._held:
            for fd in self._written:
                while self.take(fd):
                    pass
            if not self.over:
                self.kill(Ended.STOPPED)
            self._end()
            code, usage = self._reap()
            stdout, stderr = map(bytes, self._written.values())
            ended = self._ended or self._reason(code, usage, stderr)
        if code is None or self._ended:
            return Ran(ended, None, signal.SIGKILL, stdout, stderr, seconds)
        died = code - _SIGNALLED if _SIGNALLED < code < _SIGNALLED + signal.NSIG else None
        return Ran(ended, None if died else code, died, stdout, stderr, seconds)

    def close(self) -> None:
        """Ends it and lets go of what it held. Harmless after `result`, and twice."""
        with self._held:
            if not self._reaped:
                self._end()
                self._reap()

    def _out_of_memory(self) -> bool:
        """A group kills single processes, of which the others need not take notice."""
        if self._cgroup:
            return self._cgroup.ran_out
        return exceeds(self._process.pid, self._memory_bytes)

    def _end(self) -> None:
        with suppress(ProcessLookupError):
            if self._status is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:  # the kernel tells the first process in the box of bubblewrap's death
                signal.pidfd_send_signal(self._exit, signal.SIGKILL)

    def _reap(self) -> tuple[int | None, resource.struct_rusage | None]:
        """The program's exit code as a shell's and what the whole box used; None for what nobody knows."""
        self._reaped = True
        if not wait([self._init_exit], END_SECONDS):
            raise RuntimeError(f"process {self._init} doesn't end within {END_SECONDS:g} s of being killed")
        if self._status is None:
            _, status, usage = os.wait4(self._init, 0)
            self._process.returncode = os.waitstatus_to_exitcode(status)
            code = self._process.returncode
            return (code if code >= 0 else _SIGNALLED - code), usage
        self._process.wait(END_SECONDS)
        usage = None
        with suppress(ChildProcessError):  # bubblewrap was quicker
            usage = os.wait4(self._init, 0)[2]
        report = b"".join(iter(functools.partial(os.read, self._status, _CHUNK), b""))
        code = re.search(rb'"exit-code": (\d+)', report)
        return (int(code[1]) if code else None), usage

    def _reason(self, code: int | None, usage: resource.struct_rusage | None, stderr: bytes) -> Ended:
        """How it ended of itself."""
        if self._cgroup and self._cgroup.ran_out:
            return Ended.MEMORY
        if code is None:
            raise RuntimeError(f"the box broke: {stderr.decode(errors='replace')[-500:].strip() or 'no reason given'}")
        if code == 0:
            return Ended.EXITED
        spent = usage.ru_utime + usage.ru_stime if usage else 0.0
        if code == _SIGNALLED + signal.SIGKILL and spent > _HALF * self._limits.seconds:
            return Ended.TIME
        held_bytes = 1024 * usage.ru_maxrss if usage else 0
        if held_bytes > _NEARLY * self._memory_bytes or any(word in stderr for word in _REFUSED):
            return Ended.MEMORY
        return Ended.CRASH if code > _SIGNALLED else Ended.EXITED


def finish(first: Boxed, *others: Boxed) -> list[Ran]:
    """Waits until `first` ends, of itself or by its limits, and ends the others; how each of them ran, in order.

    Everything in the boxes is gone when this returns. Raises RuntimeError where a box broke or the machine ran out of
    memory.
    """
    boxes = (first, *others)
    with ExitStack() as ends, selectors.DefaultSelector() as selector:
        for box in boxes:
            ends.callback(box.close)
            for fd in box.descriptors:
                selector.register(fd, selectors.EVENT_READ, box)
        while not first.over:
            for key, _ in selector.select(_LOOK_SECONDS):
                if not key.data.take(key.fd):
                    selector.unregister(key.fd)
            for box in boxes:
                if not box.over:
                    box.look()
        return [box.result() for box in boxes]
