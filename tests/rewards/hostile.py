"""Rewards that fail in every way and every form, for the tests of what guards against them.

A reward of a behaviour shows it on completions that begin with BAD, and judges any other by its length.
"""

import asyncio
import inspect
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from configs.rewards import RewardSpec
from rewards.types import Reward, Status, Task, Verdict

BAD = "bad"
FORMS = ("single", "together", "batch", "awaited_batch")


def _hang(*_: object) -> None:
    time.sleep(3600)


def _hang_in_c(*_: object) -> None:
    sum(iter(int, 1))  # never ends and never returns to the interpreter's signal checks


def _eat_memory(*_: object) -> None:
    bytearray(64 << 30)


def _kill_the_worker(*_: object) -> None:
    supervisor = Path(f"/proc/{os.getppid()}/status").read_text()
    os.kill(int(supervisor.partition("PPid:")[2].split()[0]), signal.SIGKILL)
    _hang()


def _print(*_: object) -> float:
    print("a reward prints")
    os.write(1, b"\x00\x01 raw bytes too\n")
    sys.stderr.write("and complains\n")
    return 0.5


def _once(how: Callable[..., Any]) -> Callable[[Task, str], Any]:
    """Fails for the first process that tries; the next finds the mark."""

    def behave(task: Task, completion: str) -> Any:
        try:
            os.close(os.open(task.truth, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return 0.25
        return how(task, completion)

    return behave


def _count(task: Task, _: str) -> float:
    """How often this task was judged."""
    with Path(task.truth).open("ab+") as file:
        file.write(b"x")
        return float(file.tell())


def _hold(task: Task, _: str) -> float:
    """Ends when `count` was asked six times of the same task."""
    while not (Path(task.truth).exists() and Path(task.truth).stat().st_size >= 6):
        time.sleep(0.01)
    return 1.0


def _fill(verdict: Verdict, **fields: Any) -> Verdict:
    for name, value in fields.items():
        object.__setattr__(verdict, name, value)
    return verdict


def _say(*what: Callable[[int], bytes]) -> Callable[[Task, str], float]:
    """Says on the channel of the judging process what was never its to say."""

    def behave(*_: object) -> float:
        frame: FrameType | None = sys._getframe()
        seen: dict[str, Any] = {}
        while frame is not None:
            seen |= frame.f_locals
            frame = frame.f_back
        channel, number = seen["channel"], seen["request"].number
        assert isinstance(channel, Connection)
        for message in what:
            channel.send_bytes(message(number))
        return 1.0

    return behave


def _verdict(index: int, *fields: Any) -> Callable[[int], bytes]:
    return lambda number: json.dumps([number, index, fields or (1.0, "ok", "", 0.0, "")]).encode()


def _slow(*_: object) -> float:
    time.sleep(4)  # twice the limit of two completions judged together
    return 0.75


_BEGUN: set[str] = set()


async def _await_eight(_: Task, completion: str) -> float:
    """Ends when eight completions have begun, unless it is to wait for ever."""
    _BEGUN.add(completion)
    while len(_BEGUN) < 8 or "for ever" in completion:
        await asyncio.sleep(0.01)
    return 8.0


def _fail(how: str) -> None:
    match how:
        case "raise":
            raise KeyError("a key")
        case "hang":
            _hang()
        case "exit":
            os._exit(5)
        case _:
            raise ValueError(f"cannot read {how!r}")


def _fork(*_: object) -> float:
    os.fork()  # and both go on
    return 1.0


BEHAVIOURS: dict[str, Callable[[Task, str], Any]] = {
    "hang": _hang,
    "hang_in_c": _hang_in_c,
    "eat_memory": _eat_memory,
    "raise": lambda *_: 1 // 0,
    "raise_base": lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()),
    "exit": lambda *_: sys.exit(3),
    "kill_itself": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "nan": lambda *_: float("nan"),
    "inf": lambda *_: float("inf"),
    "nan_verdict": lambda *_: Verdict(float("nan")),
    "nan_put_in": lambda *_: _fill(Verdict(1.0), score=float("nan")),
    "text_put_in": lambda *_: _fill(Verdict(1.0), score="1.0"),
    "status_put_in": lambda *_: _fill(Verdict(1.0), status="fine"),
    "too_large": lambda *_: 10**400,
    "none": lambda *_: None,
    "string": lambda *_: "1.0",
    "two_scores": lambda *_: [1.0, 0.0],
    "another_index": _say(_verdict(1)),
    "index_past_the_end": _say(_verdict(99)),
    "index_below": _say(_verdict(-1)),
    "one_verdict_too_many": _say(_verdict(0), _verdict(1)),
    "another_question": _say(lambda number: json.dumps([number - 1, 0, [1.0, "ok", "", 0.0, ""]]).encode()),
    "garbage": _say(lambda _: b"\xff\x00garbage"),
    "half_a_verdict": _say(_verdict(0, 1.0, "ok")),
    "nan_on_the_wire": _say(_verdict(0, float("nan"), "ok", "", 0.0, "")),
}
"""Failures, each on its own."""

HARMLESS: dict[str, Callable[[Task, str], Any]] = {
    "print": _print,
    "fork": _fork,
    "hang_once": _once(_hang),
    "die_once": _once(lambda *_: os._exit(9)),
    "raise_once": _once(lambda *_: 1 // 0),
    "count": _count,
    "hold": _hold,
    "kill_the_worker": _kill_the_worker,
    "kill_the_worker_once": _once(_kill_the_worker),
    "slow": _slow,
    "await_eight": _await_eight,
    "abstain": lambda *_: Verdict(None, Status.ABSTAIN, "no opinion"),
    "true": lambda *_: True,
    "outcome": lambda *_: Verdict(0.5, outcome="compile error", detail="line 3"),
    "length": lambda _, completion: len(completion),
    "pid": lambda *_: os.getpid(),
    "parent": lambda *_: os.getppid(),
    "memory_limit": lambda *_: resource.getrlimit(resource.RLIMIT_AS)[0],
}

BATCHES: dict[str, Callable[[list[float]], Any]] = {
    "too_few": lambda scores: scores[1:],
    "too_many": lambda scores: [*scores, 1.0],
    "generator": lambda scores: (score for score in scores),
    "by_number": lambda scores: dict(enumerate(scores)),
    "nothing": lambda _: None,
}
"""What a batch may return instead of the scores, when one of its completions is bad."""


class Hostile:
    def __init__(
        self,
        behaviour: str,
        *,
        pool: str = "rule",
        task_limit: Any = None,
        setup: str | None = None,
        start_seconds: float | None = None,
        gpus: float | None = 0.0,
    ) -> None:
        self.pool, self._setup, self.start_seconds, self.gpus = pool, setup, start_seconds, gpus
        self._behaviour = (BEHAVIOURS | HARMLESS).get(behaviour)
        self._garble = BATCHES.get(behaviour)
        if task_limit is not None:
            self.time_limit = lambda _: task_limit

    def setup(self) -> None:
        """Leave a mark in the file of this name, or fail as it says."""
        if self._setup is None:
            return
        if "/" not in self._setup:
            _fail(self._setup)
        with Path(self._setup).open("a") as file:
            file.write("x")

    def check(self, task: Task) -> None:
        """Fail as the truth says, unless it is a number."""
        if not task.truth.isdecimal():
            _fail(task.truth)

    def judge(self, task: Task, completion: str) -> Any:
        if self._behaviour is not None and completion.startswith(BAD):
            return self._behaviour(task, completion)
        return len(completion)

    def judge_all(self, tasks: list[Task], completions: list[str]) -> Any:
        scores = [self.judge(task, completion) for task, completion in zip(tasks, completions, strict=True)]
        is_bad = any(completion.startswith(BAD) for completion in completions)
        return self._garble(scores) if self._garble is not None and is_bad else scores


class Single(Hostile):
    def score(self, task: Task, completion: str) -> Any:
        return self.judge(task, completion)


class Together(Hostile):
    async def score(self, task: Task, completion: str) -> Any:
        judged = self.judge(task, completion)
        return await judged if inspect.isawaitable(judged) else judged


class Batch(Hostile):
    def score_batch(self, tasks: list[Task], completions: list[str]) -> Any:
        return self.judge_all(tasks, completions)


class AwaitedBatch(Hostile):
    async def score_batch(self, tasks: list[Task], completions: list[str]) -> Any:
        await asyncio.sleep(0.01)
        return self.judge_all(tasks, completions)


def build(spec: RewardSpec) -> Reward:
    if spec.name not in BEHAVIOURS | HARMLESS | BATCHES:
        raise ValueError(f"unknown behaviour '{spec.name}'")
    args = dict(spec.args)
    form = args.pop("form", "single")
    return {"single": Single, "together": Together, "batch": Batch, "awaited_batch": AwaitedBatch}[form](
        spec.name, **args
    )


def specs(*names: str, **args: Any) -> list[RewardSpec]:
    return [RewardSpec(name=name, args=args) for name in names]
