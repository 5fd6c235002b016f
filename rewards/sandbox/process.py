"""A program in a box while it runs: its limits, its output, and how it ends."""

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
from typing import IO, Any

from rewards.sandbox.cgroup import Cgroup, exceeds

MIB = 2**20
END_SECONDS = 20.0
"""Longest the kernel may take to end a killed process."""

_POLL_SECONDS = 0.02
"""Longest time between two checks of a box's time and memory."""
_OUT_OF_MEMORY = (
    b"what():  std::bad_alloc",
    b"\nMemoryError",
    b"java.lang.OutOfMemoryError",
    b"heap out of memory",  # node
    b"memory allocation of",  # rust
    b"runtime: out of memory",  # go
    b"out of memory allocating",  # gcc
    b"annot allocate ",  # bash, and strerror(ENOMEM)
)
"""Messages on stderr by which runtimes report a refused allocation."""
_MEMORY_SHARE = 0.9
"""A crash above this share of the memory limit counts as running out of memory."""
_CPU_SHARE = 0.5
"""A SIGKILL after this share of the CPU limit counts as a time-out. The kernel counts the limit in ticks, so on a busy
machine it kills long before that many seconds were spent."""
_SIGNALLED = 128
_CHUNK = 1 << 16


class ExitReason(StrEnum):
    """Reason of a program's end; `STOPPED`: it was killed because its result was no longer needed."""

    EXITED = "exited"
    CRASH = "crash"
    TIME = "time limit"
    MEMORY = "memory limit"
    OUTPUT = "output limit"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Limits:
    """Resources a program may use.

    seconds: CPU time of each of its processes, rounded up to whole seconds; all of them end after `wall_seconds`.
    memory_mb: MiB in all its processes together, beside the runtime's own `extra_mb`. output_kb: KiB on stdout and
    stderr together. disk_mb: MiB in /tmp, and in any one file. processes: threads count; before Linux 5.14 other
    programs' may count too (see `rewards.sandbox.box`).
    """

    seconds: float = 10.0
    memory_mb: int = 256
    output_kb: int = 1024
    disk_mb: int = 64
    processes: int = 64

    @property
    def wall_seconds(self) -> float:
        """Wall-clock limit. Far above `seconds`, since a program on a busy machine also waits for a processor."""
        return 3 * self.seconds + 1


@dataclass(frozen=True, slots=True)
class RunResult:
    """Result of a run.

    exit_code: None after a kill or a death by `signal`. An exit code of 128 + n counts as death by signal n, as in
    every shell. seconds: wall clock, from when the box was complete.
    """

    reason: ExitReason
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process just started, with pipes for stdout and stderr.

    process: bubblewrap, or without a box the program itself. init: first process of the box; all others end with it.
    status: descriptor of bubblewrap's JSON report. gate: descriptor that lets the box continue. Both are None without a
    box.
    """

    process: "subprocess.Popen[bytes]"
    init: int
    status: int | None = None
    gate: int | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """End of a process.

    code: exit code as a shell gives it, None if bubblewrap reported none. usage: resources of the whole box, if known.
    """

    code: int | None
    usage: resource.struct_rusage | None


def file(lifetime: ExitStack, content: bytes) -> int:
    """Return a descriptor that reads as `content`; `lifetime` closes it."""
    with os.fdopen(os.memfd_create("alignyard"), "wb") as memory:
        memory.write(content)
        memory.flush()
        fd = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY)
    lifetime.callback(os.close, fd)
    return fd


def spawn(lifetime: ExitStack, command: Sequence[str], **popen: Any) -> "subprocess.Popen[bytes]":
    """Start a process with pipes for its output; `lifetime` kills it if it still runs, and closes the pipes."""
    process = subprocess.Popen[bytes](command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, **popen)
    lifetime.callback(_abandon, process)
    for stream in _streams(process):
        os.fchmod(stream.fileno(), 0o666)  # another user opens it by name, as /dev/stdout
    return process


def _streams(process: "subprocess.Popen[bytes]") -> "tuple[IO[bytes], IO[bytes]]":
    assert process.stdout and process.stderr
    return process.stdout, process.stderr


def _abandon(process: "subprocess.Popen[bytes]") -> None:
    for stream in _streams(process):
        stream.close()
    process.kill()
    process.wait(END_SECONDS)


class Box:
    """A running program. `Sandbox.start` makes it, and ends and closes it with its `with` block.

    `lifetime` closes its descriptors, after everything in the box has ended.
    """

    def __init__(
        self, spawned: Spawned, limits: Limits, *, memory_bytes: int, cgroup: Cgroup | None, lifetime: ExitStack
    ) -> None:
        self.has_ended = False
        self._spawned, self._limits, self._memory_bytes, self._cgroup = spawned, limits, memory_bytes, cgroup
        self._process_end, self._init_end = (os.pidfd_open(pid) for pid in (spawned.process.pid, spawned.init))
        for fd in (self._process_end, self._init_end):
            lifetime.callback(os.close, fd)
        self._output = {stream.fileno(): bytearray() for stream in _streams(spawned.process)}
        for fd in self._output:
            os.set_blocking(fd, False)
        self._killed_for: ExitReason | None = None
        self._exit: Exit | None = None
        self._start = time.perf_counter()
        self._deadline = self._start + limits.wall_seconds

    @property
    def descriptors(self) -> list[int]:
        """Descriptors to wait on: its output and its end."""
        return [*self._output, self._process_end]

    def read(self, fd: int) -> bool:
        """Read once from a ready descriptor; False once it has no more to give."""
        if fd == self._process_end:
            self.has_ended = True
            return False
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        self._output[fd] += chunk
        excess = sum(map(len, self._output.values())) - 1024 * self._limits.output_kb
        if excess > 0:
            del self._output[fd][-excess:]
            self.kill(ExitReason.OUTPUT)
        return bool(chunk) and excess <= 0

    def enforce_limits(self) -> None:
        """Kill the program if it is past its time or its memory.

        Raises RuntimeError if it outlives its kill by END_SECONDS, or if the whole machine ran out of memory.
        """
        late = time.perf_counter() > self._deadline
        if self._killed_for and late:
            raise RuntimeError(f"process {self._spawned.process.pid} still runs {END_SECONDS:g} s after being killed")
        if late:
            self.kill(ExitReason.TIME)
        elif not self._killed_for and self._is_out_of_memory():
            self.kill(ExitReason.MEMORY)

    def kill(self, reason: ExitReason) -> None:
        """Kill everything in the box; the first reason counts."""
        if not self._killed_for:
            self._killed_for = reason
            self._deadline = time.perf_counter() + END_SECONDS
        self._send_kill()

    def result(self) -> RunResult:
        """Kill everything that still runs and return the result.

        Raises RuntimeError if there is none: the box broke, the machine ran out of memory, or the kernel cannot end the
        program.
        """
        seconds = time.perf_counter() - self._start
        for fd in self._output:
            while self.read(fd):
                pass
        if not self.has_ended:
            self.kill(ExitReason.STOPPED)
        exit = self.close()
        stdout, stderr = map(bytes, self._output.values())
        reason = self._killed_for or self._reason(exit, stderr)
        if exit.code is None or self._killed_for:
            return RunResult(reason, None, signal.SIGKILL, stdout, stderr, seconds)
        died_of = exit.code - _SIGNALLED if _SIGNALLED < exit.code < _SIGNALLED + signal.NSIG else None
        return RunResult(reason, None if died_of else exit.code, died_of, stdout, stderr, seconds)

    def close(self) -> Exit:
        """Kill everything in the box and wait for its end; may be called again."""
        if self._exit is None:
            self._send_kill()
            self._exit = self._reap()
        return self._exit

    def _is_out_of_memory(self) -> bool:
        if self._cgroup:  # it kills single processes, and the others may go on
            return self._cgroup.ran_out
        return exceeds(self._spawned.process.pid, self._memory_bytes)

    def _send_kill(self) -> None:
        with suppress(ProcessLookupError):
            if self._spawned.status is None:
                os.killpg(self._spawned.process.pid, signal.SIGKILL)
            else:  # bubblewrap's death kills the first process of the box, and that one all others
                signal.pidfd_send_signal(self._process_end, signal.SIGKILL)

    def _reap(self) -> Exit:
        process, init, status = self._spawned.process, self._spawned.init, self._spawned.status
        if not wait([self._init_end], END_SECONDS):
            raise RuntimeError(f"process {init} still runs {END_SECONDS:g} s after being killed")
        if status is None:
            _, wait_status, usage = os.wait4(init, 0)
            process.returncode = os.waitstatus_to_exitcode(wait_status)
            return Exit(process.returncode if process.returncode >= 0 else _SIGNALLED - process.returncode, usage)
        process.wait(END_SECONDS)
        usage = None
        with suppress(ChildProcessError):  # bubblewrap reaped it first
            usage = os.wait4(init, 0)[2]
        report = b"".join(iter(functools.partial(os.read, status, _CHUNK), b""))
        code = re.search(rb'"exit-code": (\d+)', report)
        return Exit(int(code[1]) if code else None, usage)

    def _reason(self, exit: Exit, stderr: bytes) -> ExitReason:
        """Return the reason of an end that no kill from here caused."""
        if self._cgroup and self._cgroup.ran_out:
            return ExitReason.MEMORY
        if exit.code is None:
            raise RuntimeError(f"the box broke: {stderr.decode(errors='replace')[-500:].strip() or 'no reason given'}")
        if exit.code == 0:
            return ExitReason.EXITED
        cpu_seconds = exit.usage.ru_utime + exit.usage.ru_stime if exit.usage else 0.0
        if exit.code == _SIGNALLED + signal.SIGKILL and cpu_seconds > _CPU_SHARE * self._limits.seconds:
            return ExitReason.TIME
        peak_bytes = 1024 * exit.usage.ru_maxrss if exit.usage else 0
        if peak_bytes > _MEMORY_SHARE * self._memory_bytes or any(message in stderr for message in _OUT_OF_MEMORY):
            return ExitReason.MEMORY
        return ExitReason.CRASH if exit.code > _SIGNALLED else ExitReason.EXITED


def finish(main: Box, *helpers: Box) -> list[RunResult]:
    """Wait until `main` ends, stop the `helpers`, and return the results in order.

    Nothing runs in the boxes any more when it returns. Raises RuntimeError if a box broke or the machine ran out of
    memory.

    Example:
        with sandbox.start(["/bin/cat"], folder=folder, limits=Limits(), stdin=b"hi") as box:
            [result] = finish(box)  # result.stdout == b"hi"
    """
    boxes = (main, *helpers)
    with selectors.DefaultSelector() as selector:
        for box in boxes:
            for fd in box.descriptors:
                selector.register(fd, selectors.EVENT_READ, box)
        while not main.has_ended:
            for key, _ in selector.select(_POLL_SECONDS):
                if not key.data.read(key.fd):
                    selector.unregister(key.fd)
            for box in boxes:
                if not box.has_ended:
                    box.enforce_limits()
        return [box.result() for box in boxes]
