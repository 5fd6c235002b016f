"""Judging in a process that can be killed.

A checker is third-party code fed with whatever a policy under training writes: it may hang in C, eat all memory, exit
or crash. So it runs in a process of its own, which is killed at the limit and replaced. Whatever goes wrong becomes a
verdict that says so, and never a score.

The process is started plainly, not through `multiprocessing`, which would import the parent's main module (in a Ray
actor: Ray). It speaks over a socket of its own, so a checker may print.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Self

from configs.rewards import RewardSpec
from rewards import registry
from rewards.types import Reward, Status, Task, Verdict

START_SECONDS = 30.0
"""Longest a judging process may take to import its checkers. 0.6 s for math and 2 s for reasoning_gym where idle."""

_EXIT_SECONDS = 5.0
_OUT_OF_MEMORY = 77  # exit code
_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; from rewards.guard import serve; serve({fd})"

Build = Callable[[RewardSpec], Reward]


class Guard:
    """One judging process, and what replaces it.

    specs: the rewards it judges with, by name. build: a function of a module, which makes them inside the process; it
    crosses by name. timeout_seconds: wall-clock limit of one verdict. memory_gib: address space the process may take.
    One verdict at a time: a guard belongs to one thread, which need not be the main one.
    """

    def __init__(
        self, specs: list[RewardSpec], *, timeout_seconds: float, memory_gib: float = 2.0, build: Build = registry.build
    ) -> None:
        self._specs = specs
        self._timeout_seconds = timeout_seconds
        self._memory_gib = memory_gib
        self._build = build
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now instead of with the first verdict.

        Raises ValueError where a spec is wrong, with what `build` said, and RuntimeError where the process dies or
        takes longer than START_SECONDS.
        """
        self._channel, theirs = Pipe()
        command = [sys.executable, "-c", _BOOTSTRAP.format(path=sys.path, fd=theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a checker's prints: for people, and out of the way of what this program writes
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # whatever a checker starts dies with it
            )
        try:
            self._channel.send((self._specs, self._build, self._timeout_seconds, self._memory_gib))
            problem = self._channel.recv() if self._channel.poll(START_SECONDS) else None
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the judging process did not start: {self._post_mortem()}; see its stderr") from error
        if problem is None or problem:
            self.close()
            raise ValueError(problem) if problem else RuntimeError(f"no judging process within {START_SECONDS:g} s")

    def judge(self, name: str, task: Task, completion: str) -> Verdict:
        """What the reward `name` says of `completion`; a checker that failed is asked once more.

        Takes at most twice the limit and two starts. Raises what `start` raises.
        """
        verdict = self._attempt(name, task, completion)
        return self._attempt(name, task, completion) if verdict.failed else verdict

    def close(self) -> None:
        """Kill the process and what it started. The next verdict starts another."""
        if self._process is not None and self._channel is not None:
            with suppress(ProcessLookupError):  # already gone and reaped
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_EXIT_SECONDS)
            self._channel.close()
        self._process = self._channel = None

    def _attempt(self, name: str, task: Task, completion: str) -> Verdict:
        if self._channel is None:
            self.start()
        assert self._channel is not None
        began = time.perf_counter()
        try:
            self._channel.send((name, task, completion))
            if self._channel.poll(self._timeout_seconds):
                verdict = self._channel.recv()
            else:
                self.close()
                verdict = Verdict(None, Status.TIMEOUT, f"no verdict within {self._timeout_seconds:g} s")
        except (EOFError, OSError):
            verdict = Verdict(None, Status.INFRA_ERROR, f"the judging process died: {self._post_mortem()}")
        return replace(verdict, seconds=time.perf_counter() - began)

    def _post_mortem(self) -> str:
        """How the process ended, in words; clears it away."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        code = self._process.poll()
        self.close()
        if code == _OUT_OF_MEMORY:
            return f"out of its {self._memory_gib:g} GiB of memory"
        if code is None:
            return "it closed its channel"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve(fd: int) -> None:
    """The judging process: make the rewards, say "" or what is wrong with a spec, judge until the guard hangs up."""
    channel = Connection(fd)
    specs, build, timeout_seconds, memory_gib = channel.recv()
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        rewards = {spec.name: build(spec) for spec in specs}
    except ValueError as error:
        channel.send(str(error) or repr(error))
        return
    channel.send("")
    while True:
        try:
            name, task, completion = channel.recv()
        except EOFError:
            return
        # Should the guard be gone by then, the kernel ends a checker that hangs, even inside C code.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + 1)
        try:
            verdict = _judge(rewards[name], task, completion)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send(verdict)


def _judge(reward: Reward, task: Task, completion: str) -> Verdict:
    """The reward's verdict, or `infra_error` with what is wrong with it. Lets only MemoryError through."""
    try:
        result = reward.score(task, completion)
        return result if isinstance(result, Verdict) else Verdict(float(_number(result)))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a checker raises is its failure, and is said in the verdict
        return Verdict(None, Status.INFRA_ERROR, f"{type(error).__name__}: {error}"[:500])


def _number(result: object) -> float:
    if not isinstance(result, int | float):
        raise TypeError(f"score() returned {type(result).__name__}, not a number or a Verdict")
    return result
