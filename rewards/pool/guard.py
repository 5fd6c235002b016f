"""Judging in a process that can be killed.

A checker is third-party code that reads whatever a policy under training writes: it may hang in C, eat all memory, exit
or crash. So it runs in a process of its own (`rewards.pool.serve`), which is killed at the time limit and replaced.
Every fault becomes a verdict that names it, and never a score.

The process is started by `subprocess`: `multiprocessing` would import the parent's main module, in a Ray actor Ray
itself. They talk over a socket, so that a checker may print.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any, Self

from configs.rewards import RewardPoolConfig, RewardSpec
from configs.visible import copy_output
from rewards.plugins.build import build_reward
from rewards.pool import limits
from rewards.pool.serve import END, OUT_OF_MEMORY, Build, Form, ProcessConfig, Request
from rewards.types import CONTRACT_ERROR, MEMORY_ERROR, STALLED, Placement, Status, Task, Verdict

_MEMORY_CAUSE = "out of its"
_EXIT_SECONDS = 5.0
_WATCH_SECONDS = 0.2
"""Seconds between two looks at a process's resident memory."""
_STALL_SECONDS = 5
"""Longest the process may leave a message half read or half written."""
_MAX_REPLY_BYTES = 1 << 20
_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; import rewards.pool.supervise as s; s.supervise({fd}, {folder!r})"


class _Process:
    """One judging process, from its start to its end. Raises what `Guard.start` raises."""

    def __init__(self, config: ProcessConfig, resident_gib: float | None) -> None:
        self._memory_gib, self._resident_gib = config.memory_gib, resident_gib
        self._watched, self._is_too_large = 0.0, False
        self._is_fresh, self._number = True, 0  # fresh until it has judged something
        local, remote = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            local.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STALL_SECONDS, 0))
        self._channel = Connection(local.detach())
        self._folder = TemporaryDirectory(prefix="alignyard-judge-", ignore_cleanup_errors=True)
        program = _BOOTSTRAP.format(path=sys.path, fd=remote.fileno(), folder=self._folder.name)
        with remote:
            self._popen = subprocess.Popen(
                [sys.executable, "-u", "-c", program],
                pass_fds=[remote.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # a checker's prints must not mix with this program's output
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": self._folder.name},  # removed after a kill too
                start_new_session=True,  # Ctrl-C in the terminal is the guard's to handle
            )
        self._output = copy_output(self._popen.stdout)
        self._channel.send(config)
        self._pid = 0  # of the judging process, whose first message has it
        self._pid = self._receive_start(limits.DEFAULT_START_SECONDS)["pid"]
        built = self._receive_start(limits.DEFAULT_START_SECONDS)
        self.forms: dict[str, Form] = built["forms"]
        self.placements = {label: Placement(label, *rest) for label, *rest in built["placements"]}
        self._receive_start(limits.start_limit(self.placements.values()))

    def replies(
        self, label: str, tasks: list[Task], completions: list[str] | None, patience: float
    ) -> Iterator[tuple[int, Any]]:
        """Send a request and yield index and content of each reply, as `rewards.pool.serve.Request` describes them.

        patience: seconds to wait for the first reply; the process may set another time for those after it.

        Raises TimeoutError for a late reply, EOFError or OSError where the process is gone or stopped, and ValueError
        or TypeError for a reply that is no answer to this request.
        """
        self._number += 1
        self._channel.send(Request(self._number, label, tasks, completions))
        while (reply := self._receive(patience)) != END:
            index, content = reply
            if index is None:
                patience = float(content)
            else:
                self._is_fresh = False
                yield index, content

    def fail(self, error: Exception) -> Verdict:
        """End the process after an error of `replies`. The verdict on what it had not judged yet."""
        if isinstance(error, TimeoutError):
            self.close()
            return Verdict(None, Status.TIMEOUT, error.args[0], outcome=error.args[1])
        if isinstance(error, EOFError | OSError):
            cause = self._post_mortem()
            outcome = MEMORY_ERROR if self._is_fresh and cause.startswith(_MEMORY_CAUSE) else ""
            return Verdict(None, Status.INFRA_ERROR, f"the judging process died: {cause}", outcome=outcome)
        self.close()
        return Verdict(None, Status.INFRA_ERROR, f"the judging process makes no sense: {error}")

    def close(self) -> None:
        """Kill the process and what it started."""
        self._popen.terminate()
        try:
            self._popen.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()  # the kernel then kills the judging process too
            self._popen.wait(_EXIT_SECONDS)
        self._output.join(_EXIT_SECONDS)
        self._channel.close()
        self._folder.cleanup()

    def _receive(self, patience: float) -> list[Any]:
        deadline, computed = time.monotonic() + patience, limits.cpu_seconds(self._pid)
        self._watch_memory()
        while not self._channel.poll(min(_WATCH_SECONDS, max(deadline - time.monotonic(), 0.0))):
            if time.monotonic() >= deadline:
                stalled = limits.is_stalled(self._pid, patience, limits.cpu_seconds(self._pid) - computed)
                raise TimeoutError(f"no verdict within {patience:g} s", STALLED if stalled else "")
            self._watch_memory()
        number, index, content = json.loads(self._channel.recv_bytes(_MAX_REPLY_BYTES))
        if number != self._number:
            raise ValueError(f"a reply to request {number!r} instead of {self._number}")
        return [index, content]

    def _watch_memory(self) -> None:
        """Kill the process where its resident memory is beyond the limit. Raises EOFError then."""
        if self._resident_gib is None or time.monotonic() - self._watched < _WATCH_SECONDS:
            return
        self._watched = time.monotonic()
        if limits.resident_bytes(self._pid) > self._resident_gib * 2**30:
            self._is_too_large = True
            self._popen.terminate()
            raise EOFError

    def _receive_start(self, patience: float) -> dict[str, Any]:
        """The next reply about the start. Raises what `Guard.start` raises."""
        try:
            [_, content] = self._receive(patience)
        except TimeoutError:
            self.close()
            raise RuntimeError(f"no judging process within {patience:g} s") from None
        except (EOFError, OSError) as error:
            cause = self._post_mortem()
            if cause.startswith(_MEMORY_CAUSE):
                raise ValueError(f"the rewards can't be set up: the judging process is {cause}") from error
            raise RuntimeError(f"the judging process did not start: {cause}; see its stderr") from error
        if "problem" in content:
            self.close()
            raise ValueError(content["problem"])
        return content

    def _post_mortem(self) -> str:
        """Clear the dead process away. The cause of its death in words."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_EXIT_SECONDS)
        code = self._popen.poll()
        self.close()
        if self._is_too_large or code == OUT_OF_MEMORY:
            limit = self._resident_gib if self._is_too_large else self._memory_gib
            return f"{_MEMORY_CAUSE} {limit or 0:g} GiB of memory (reward_pool.memory_gib)"
        if code is None:
            return "it neither answered nor ended"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Guard:
    """One judging process, replaced whenever it is lost.

    specs: the rewards it judges with. build: a module's function that makes a reward from its spec, inside the process.
    timeout_seconds: wall-clock limit of one verdict, where the reward sets none for the task. memory_gib: address space
    of the process, None for no limit. resident_gib: the same of its resident memory, which this process looks at while
    it waits. judges: False where it only checks tasks, so that no `model` reward is set up.

    A guard belongs to one thread and serves one request at a time. Its thread need not be the main one, but must live
    as long as the guard: Linux ends the process with the thread that started it. `placements` is filled by the start.

    Example:
        with Guard([RewardSpec(name="math")], timeout_seconds=5) as guard:
            [verdict] = guard.judge("math", Task("7 * 9?", "63"), ["The answer is 63."])
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        timeout_seconds: float,
        memory_gib: float | None = limits.RULE_MEMORY_GIB,
        resident_gib: float | None = None,
        build: Build = build_reward,
        judges: bool = True,
    ) -> None:
        self._config = ProcessConfig(list(specs), build, timeout_seconds, memory_gib, judges)
        self._resident_gib = resident_gib
        self._process: _Process | None = None
        self.placements: dict[str, Placement] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now instead of with the first request.

        Raises ValueError for a wrong spec or a reward that can't be built, and RuntimeError where the process dies or
        takes longer than DEFAULT_START_SECONDS, or than a reward's own `start_seconds`.
        """
        self._process = _Process(self._config, self._resident_gib)
        self.placements = self._process.placements

    def judge(self, label: str, task: Task, completions: Sequence[str]) -> list[Verdict]:
        """The verdicts of the reward `label` on completions of `task`.

        Equal completions are judged once. A failed one is judged a second time, alone or, by an async `score`, beside
        the other failed ones; of a group that is compared all are. Three kinds of failure are not retried: a rule that
        ran out of time though it had a processor, and a new process that ran out of memory, would do so again, and a
        batch with a wrong number of results would pass unnoticed if its completions came one by one. When the process
        is lost, the verdicts that came before are kept. A completion takes at most two time limits and two starts.
        Raises what `start` raises.
        """
        verdicts: dict[str, Verdict] = {}
        retries: list[list[str]] = []
        waiting = list(dict.fromkeys(completions))
        while waiting:
            form = self._running().forms[label]
            replies, losses = self._request(label, task, waiting)
            failed = [text for text, verdict in replies.items() if self._may_change(label, verdict)]
            retries += [failed] if failed and form == "concurrent" else [[text] for text in failed]
            # One completion lost the process for all that ran with it, so each of several gets a second try, alone.
            retries += [
                [text] for text, verdict in losses.items() if len(losses) > 1 or self._may_change(label, verdict)
            ]
            verdicts |= replies | losses
            waiting = [text for text in waiting if text not in verdicts]
        if retries and self._running().forms[label] == "list":  # scores of different calls do not compare
            retries = [list(verdicts)]
        for texts in retries:
            replies, losses = self._request(label, task, texts)
            verdicts |= replies | losses
        return [verdicts[text] for text in completions]

    def check(self, label: str, tasks: Sequence[Task]) -> list[str | None]:
        """The reason why the reward `label` can never judge a task, or None, for each task.

        Raises ValueError where the reward's check fails, and what `start` raises.
        """
        process = self._running()
        problems: list[str | None] = []
        faults: list[str] = []
        try:
            for _, (problem, fault) in process.replies(label, list(tasks), None, limits.DEFAULT_START_SECONDS):
                if fault is None:
                    problems.append(problem)
                else:
                    faults.append(fault)
        except (EOFError, OSError, TypeError, ValueError) as error:
            faults.append(process.fail(error).detail)
            self._process = None
        if faults:
            raise ValueError(f"reward '{label}' cannot check task {tasks[len(problems)].row!r}: {faults[0]}")
        return problems

    def close(self) -> None:
        """Kill the process and what it started. The next request starts another."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _running(self) -> _Process:
        if self._process is None:
            self.start()
        assert self._process is not None
        return self._process

    def _may_change(self, label: str, verdict: Verdict) -> bool:
        """Tell whether a second try may give another verdict."""
        if verdict.status is Status.TIMEOUT:
            return self.placements[label].pool != "rule" or verdict.outcome == STALLED
        return verdict.status is Status.INFRA_ERROR and verdict.outcome not in (CONTRACT_ERROR, MEMORY_ERROR)

    def _request(self, label: str, task: Task, texts: list[str]) -> tuple[dict[str, Verdict], dict[str, Verdict]]:
        """Send one request. The verdicts that came back, and a failed one for each text whose call lost the process.

        Where a reward judges one by one, a call has one text; those after it get no verdict from this request.
        """
        process = self._running()
        form = process.forms[label]
        verdicts: dict[str, Verdict] = {}
        last_reply = time.perf_counter()
        try:
            for index, content in process.replies(label, [task], texts, self._config.timeout_seconds):
                in_turn = range(len(texts)) if form == "concurrent" else range(len(verdicts), len(texts))[:1]
                if index not in in_turn or texts[index] in verdicts:
                    raise ValueError(f"it judged completion {index!r} out of turn")
                score, status, detail, seconds, outcome = content
                verdicts[texts[index]] = Verdict(score, Status(status), detail, seconds, outcome)
                last_reply = time.perf_counter()
            if len(verdicts) < len(texts):
                raise ValueError(f"it judged {len(verdicts)} of {len(texts)} completions")
        except (EOFError, OSError, TypeError, ValueError) as error:
            loss = replace(process.fail(error), seconds=time.perf_counter() - last_reply)
            self._process = None
            if isinstance(error, TypeError | ValueError):
                verdicts.clear()  # a process that makes no sense may have mixed the completions up before
            unjudged = [text for text in texts if text not in verdicts]
            return verdicts, dict.fromkeys(unjudged[:1] if form == "one by one" else unjudged, loss)
        return verdicts, {}


class Judges:
    """A stage's rewards, built once before anything is launched. No model is loaded for it.

    `placements` tells by label where each reward judges and what its workers need. The process that built the rewards
    lives until the end of the `with` block, to check tasks.

    Raises ValueError for a wrong spec, a label that appears twice, and a reward that can't be built.

    Example:
        with Judges(config.rewards, config.reward_pool) as judges:
            problems = judges.problems(tasks)
    """

    def __init__(self, specs: Sequence[RewardSpec], config: RewardPoolConfig, build: Build = build_reward) -> None:
        labels = [spec.label for spec in specs]
        if len(set(labels)) < len(labels):
            raise ValueError(f"rewards: every name may appear once, got {', '.join(labels)}")
        self._guard = Guard(specs, timeout_seconds=config.timeout_seconds, memory_gib=None, build=build, judges=False)
        self._guard.start()
        self.placements = self._guard.placements

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def problems(self, tasks: Sequence[Task]) -> list[str | None]:
        """The reason why a task can never be judged, or None, for each task: it names an unknown reward, or one of its
        rewards refuses it. Raises ValueError where a reward's check fails."""
        problems: list[str | None] = [None] * len(tasks)
        rows: dict[str, list[int]] = {label: [] for label in self.placements}
        for row, task in enumerate(tasks):
            try:
                for label in applicable(task, list(rows)):
                    rows[label].append(row)
            except ValueError as error:
                problems[row] = str(error)
        for label, rows_of_label in rows.items():
            new_problems = self._guard.check(label, [tasks[row] for row in rows_of_label])
            for row, problem in zip(rows_of_label, new_problems, strict=True):
                if problem is not None and problems[row] is None:
                    problems[row] = f"reward '{label}': {problem}"
        return problems

    def close(self) -> None:
        """End the process. `placements` stay."""
        self._guard.close()


def inspect(specs: Sequence[RewardSpec], config: RewardPoolConfig, build: Build = build_reward) -> dict[str, Placement]:
    """The placements of a stage's rewards. Raises what `Judges` raises."""
    with Judges(specs, config, build) as judges:
        return judges.placements


def unjudgeable(
    specs: Sequence[RewardSpec], config: RewardPoolConfig, tasks: Sequence[Task], build: Build = build_reward
) -> list[str | None]:
    """The problems of a stage's tasks with its rewards, as `Judges.problems` finds them."""
    with Judges(specs, config, build) as judges:
        return judges.problems(tasks)


def applicable(task: Task, labels: Sequence[str]) -> list[str]:
    """The labels of the rewards that judge `task`: those it names, or all. Raises ValueError for an unknown one."""
    task_labels = task.kind.split()
    for label in task_labels:
        if label not in labels:
            raise ValueError(f"task {task.row!r} is for reward '{label}'; configured: {', '.join(labels)}")
    return [label for label in labels if not task_labels or label in task_labels]


def refuse_idle_workers(config: RewardPoolConfig, placements: Iterable[Placement]) -> None:
    """Raises ValueError where `reward_pool.workers` or `memory_gib` names a pool or label that none of the rewards
    uses."""
    used = sorted({placement.worker_group for placement in placements})
    for setting, names in (("workers", config.workers), ("memory_gib", config.memory_gib)):
        if idle := sorted(set(names) - set(used)):
            raise ValueError(
                f"reward_pool.{setting}.{idle[0]} has no effect: the rewards judge at {', '.join(used)}; remove or "
                "rename it"
            )
