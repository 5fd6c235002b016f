"""Judging in a process that can be killed.

A checker is third-party code fed with whatever a policy under training writes: it may hang in C, eat all memory, exit
or crash. So it runs in a process of its own (`rewards.serve`), which is killed at the limit and replaced. Whatever goes
wrong becomes a verdict that says so, and never a score.

The process is started plainly, not through `multiprocessing`, which would import the parent's main module (in a Ray
actor: Ray). It speaks over a socket of its own, so a checker may print.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any, Self

from configs.rewards import RewardPoolConfig, RewardSpec
from rewards import registry
from rewards.serve import END, OUT_OF_MEMORY, Build, Form, Request, Terms
from rewards.types import CONTRACT_ERROR, Post, Status, Task, Verdict

START_SECONDS = 60.0
"""Longest a judging process may take to make its rewards, and then to set up one that says no other time. Making takes
0.6 s for math and 2 s for reasoning_gym where idle."""

RULE_MEMORY_GIB = 2.0
"""Address space of a process that judges by rules. Others start programs, which have limits of their own."""

_EXIT_SECONDS = 5.0
_STALL_SECONDS = 5
"""Longest the process may leave a message half read or half written."""
_GRACE_SECONDS = 1.0
"""How long after their limit completions that are awaited together may still say that they reached it."""
_ANSWER_BYTES = 1 << 20
_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; from rewards.serve import serve; serve({fd})"


class _Process:
    """One judging process, from its start to its end. Raises what `Guard.start` says."""

    def __init__(self, terms: Terms) -> None:
        self._memory_gib = terms.memory_gib
        self._number = 0
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STALL_SECONDS, 0))
        self._channel = Connection(ours.detach())
        self._folder = TemporaryDirectory(prefix="alignyard-judge-", ignore_cleanup_errors=True)
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOTSTRAP.format(path=sys.path, fd=theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a checker's prints: for people, and out of the way of what this program writes
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": self._folder.name},  # what a kill leaves goes too
                start_new_session=True,  # whatever a checker starts dies with it
            )
        self._channel.send(terms)
        made = self._told(START_SECONDS)
        posts = [Post(*post) for post in made["posts"]]
        self.posts = {post.label: post for post in posts}
        self.forms: dict[str, Form] = made["forms"]
        self._told(start_limit(posts))

    def ask(self, label: str, tasks: list[Task], completions: list[str] | None = None) -> None:
        """Send a request; its answers are heard one by one. Raises OSError where the process is gone or stopped."""
        self._number += 1
        self._channel.send(Request(self._number, label, tasks, completions))

    def hear(self, patience: float) -> list[Any]:
        """The next answer's index and content.

        Raises TimeoutError where there is none in `patience` seconds, EOFError or OSError where the process is gone,
        ValueError or TypeError where the answer is none.
        """
        if not self._channel.poll(patience):
            raise TimeoutError
        number, index, what = json.loads(self._channel.recv_bytes(_ANSWER_BYTES))
        if number != self._number:
            raise ValueError(f"an answer to question {number!r} where {self._number} was asked")
        return [index, what]

    def loss(self, error: Exception, patience: float) -> Verdict:
        """What to say after an error of `ask` or `hear`; ends the process."""
        if isinstance(error, TimeoutError):
            self.close()
            return Verdict(None, Status.TIMEOUT, f"no verdict within {patience:g} s")
        if isinstance(error, EOFError | OSError):
            return Verdict(None, Status.INFRA_ERROR, f"the judging process died: {self._post_mortem()}")
        self.close()
        return Verdict(None, Status.INFRA_ERROR, f"the judging process makes no sense: {error}")

    def close(self) -> None:
        """Kill the process and what it started."""
        with suppress(ProcessLookupError):  # already gone and reaped
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(_EXIT_SECONDS)
        self._channel.close()
        self._folder.cleanup()

    def _told(self, patience: float) -> dict[str, Any]:
        """The process's next word on its start. Raises what `Guard.start` says."""
        try:
            [_, word] = self.hear(patience)
        except TimeoutError:
            self.close()
            raise RuntimeError(f"no judging process within {patience:g} s") from None
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the judging process did not start: {self._post_mortem()}; see its stderr") from error
        if "problem" in word:
            self.close()
            raise ValueError(word["problem"])
        return word

    def _post_mortem(self) -> str:
        """How the process ended, in words; clears it away."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_EXIT_SECONDS)
        code = self._popen.poll()
        self.close()
        if code == OUT_OF_MEMORY and self._memory_gib is not None:
            return f"out of its {self._memory_gib:g} GiB of memory"
        if code is None:
            return "it neither answered nor ended"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Guard:
    """One judging process, and what replaces it.

    specs: the rewards it judges with, by label. build: a function of a module, which makes them inside the process; it
    crosses by name. timeout_seconds: wall-clock limit of one verdict, where the reward sets none for the task.
    memory_gib: address space the process may take, None for any. judges: False where it only checks tasks, for which a
    `model` reward isn't set up.

    One question at a time: a guard belongs to one thread, which need not be the main one, but must live as long as the
    process is to (Linux ends it with the thread that started it).

    `posts` says where each reward judges, once the process was started.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        timeout_seconds: float,
        memory_gib: float | None = RULE_MEMORY_GIB,
        build: Build = registry.build,
        judges: bool = True,
    ) -> None:
        self._terms = Terms(list(specs), build, timeout_seconds, memory_gib, judges)
        self._process: _Process | None = None
        self.posts: dict[str, Post] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now instead of with the first question.

        Raises ValueError where a spec is wrong or a reward can't be made, with what it said, and RuntimeError where the
        process dies or takes longer than START_SECONDS, or than a reward says to be set up.
        """
        self._process = _Process(self._terms)
        self.posts = self._process.posts

    def judge(self, label: str, task: Task, completions: Sequence[str]) -> list[Verdict]:
        """What the reward `label` says of each of the completions of `task`.

        Equal completions are judged once. A completion whose checker failed is judged once more, alone or, where the
        reward is awaited, with the others that failed; except where a rule ran out of time on it: it computes, and
        would do so again. A contract error isn't judged again either: the one result for one completion would keep the
        contract. When a process is lost, the verdicts that it gave before are kept. Takes per completion at most two
        limits and two starts. Raises what `start` raises.
        """
        verdicts: dict[str, Verdict] = {}
        again: list[list[str]] = []
        waiting = list(dict.fromkeys(completions))
        while waiting:
            form = self._started().forms[label]
            given, lost = self._attempt(label, task, waiting)
            failed = [text for text, verdict in given.items() if self._may_differ(label, verdict)]
            # Awaited together, each to a limit of its own, they don't stand in each other's way.
            again += [failed] if failed and form == "together" else [[text] for text in failed]
            # Of several that were lost together, the others may be innocent.
            again += [[text] for text, verdict in lost.items() if len(lost) > 1 or self._may_differ(label, verdict)]
            verdicts |= given | lost
            waiting = [text for text in waiting if text not in verdicts]
        for texts in again:
            given, lost = self._attempt(label, task, texts)
            verdicts |= given | lost
        return [verdicts[text] for text in completions]

    def check(self, label: str, tasks: Sequence[Task]) -> list[str | None]:
        """Per task why the reward `label` could never judge it, or None.

        Raises ValueError where the reward fails to say, and what `start` raises.
        """
        # The first answer has the time of a start: what a reward needs to check, it may load with the first task.
        process, patience = self._started(), START_SECONDS
        problems: list[str | None] = []
        fault = None
        try:
            process.ask(label, list(tasks))
            while len(problems) < len(tasks) and fault is None:
                [_, (problem, fault)] = process.hear(patience)
                problems.append(problem)
                patience = self._terms.timeout_seconds
        except (EOFError, OSError, TypeError, ValueError) as error:
            fault = process.loss(error, patience).detail
            problems.append(None)
        if fault is not None:
            self.close()  # with the answers that are still to come
            raise ValueError(f"reward '{label}' cannot check task {tasks[len(problems) - 1].row!r}: {fault}")
        return problems

    def close(self) -> None:
        """Kill the process and what it started. The next question starts another."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _started(self) -> _Process:
        if self._process is None:
            self.start()
        assert self._process is not None
        return self._process

    def _may_differ(self, label: str, verdict: Verdict) -> bool:
        """Whether judging once more may give more than this."""
        return (verdict.status is Status.INFRA_ERROR and verdict.outcome != CONTRACT_ERROR) or (
            verdict.status is Status.TIMEOUT and self.posts[label].pool != "rule"
        )

    def _attempt(self, label: str, task: Task, texts: list[str]) -> tuple[dict[str, Verdict], dict[str, Verdict]]:
        """Verdicts by text: those that were given, and those of the texts with which the process was lost."""
        process, patience = self._started(), self._terms.timeout_seconds
        form = process.forms[label]
        given: dict[str, Verdict] = {}
        heard = time.perf_counter()
        try:
            process.ask(label, [task], texts)
            while (answer := process.hear(patience)) != END:
                index, what = answer
                heard = time.perf_counter()
                if index is None:
                    patience = _patience(form, float(what), len(texts))
                    continue
                expected = range(len(texts)) if form == "together" else [len(given)]
                if index not in expected or texts[index] in given:
                    raise ValueError(f"it judged completion {index!r} out of turn")
                score, status, detail, seconds, outcome = what
                given[texts[index]] = Verdict(score, Status(status), detail, seconds, outcome)
            if len(given) < len(texts):
                raise ValueError(f"it judged {len(given)} of {len(texts)} completions")
        except (EOFError, OSError, TypeError, ValueError) as error:
            loss = replace(process.loss(error, patience), seconds=time.perf_counter() - heard)
            self._process = None
            if isinstance(error, TypeError | ValueError):
                given.clear()  # what makes no sense may have been about the wrong completions all along
            left = [text for text in texts if text not in given]
            # Asked one after the other, only the first of those left had its turn.
            return given, dict.fromkeys(left[:1] if form == "single" else left, loss)
        return given, {}


def _patience(form: Form, seconds: float, count: int) -> float:
    """How long the next answer on `count` completions may take where a verdict may take `seconds`."""
    match form:
        case "single":
            return seconds
        case "together":
            return seconds + _GRACE_SECONDS
        case "batch":
            return seconds * count


def applicable(task: Task, labels: Sequence[str]) -> list[str]:
    """The rewards that judge `task`: those it names, or all. Raises ValueError where it names one that isn't there."""
    named = task.kind.split()
    for label in named:
        if label not in labels:
            raise ValueError(f"task {task.row!r} is for reward '{label}'; configured: {', '.join(labels)}")
    return [label for label in labels if not named or label in named]


def start_limit(posts: Iterable[Post]) -> float:
    """Seconds the rewards of `posts` may take to be set up in one process."""
    return max((post.start_seconds or START_SECONDS for post in posts), default=START_SECONDS)


def inspect(specs: Sequence[RewardSpec], config: RewardPoolConfig, build: Build = registry.build) -> dict[str, Post]:
    """Make the rewards once, before anything is launched; where each will judge. No model is loaded for it.

    Raises ValueError for a wrong spec, a label that appears twice, and a reward that can't be made.
    """
    labels = [spec.label for spec in specs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"rewards: every name may appear once, got {', '.join(labels)}")
    with Guard(specs, timeout_seconds=config.timeout_seconds, memory_gib=None, build=build, judges=False) as guard:
        guard.start()
        return guard.posts


def unjudgeable(
    specs: Sequence[RewardSpec], config: RewardPoolConfig, tasks: Sequence[Task], build: Build = registry.build
) -> list[str | None]:
    """Per task why it could never be judged, or None: it names a reward that isn't there, or one refuses it.

    Raises ValueError where a reward can't be made, or fails to say.
    """
    labels = [spec.label for spec in specs]
    problems: list[str | None] = [None] * len(tasks)
    rows: dict[str, list[int]] = {label: [] for label in labels}
    for row, task in enumerate(tasks):
        try:
            for label in applicable(task, labels):
                rows[label].append(row)
        except ValueError as error:
            problems[row] = str(error)
    with Guard(specs, timeout_seconds=config.timeout_seconds, memory_gib=None, build=build, judges=False) as guard:
        for label, mine in rows.items():
            for row, problem in zip(mine, guard.check(label, [tasks[row] for row in mine]), strict=True):
                if problem is not None and problems[row] is None:
                    problems[row] = f"reward '{label}': {problem}"
    return problems


def refuse_idle(config: RewardPoolConfig, posts: Iterable[Post]) -> None:
    """Raises ValueError where workers are set for a pool or label at which none of a stage's rewards judges."""
    crews = sorted({post.crew for post in posts})
    idle = sorted(set(config.workers) - set(crews))
    if idle:
        raise ValueError(
            f"reward_pool.workers.{idle[0]} has no effect: the rewards judge at {', '.join(crews)}; remove or rename it"
        )
