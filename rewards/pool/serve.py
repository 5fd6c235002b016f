"""Main program of the judging process: builds the rewards, judges completions, and sends each verdict at once.

`rewards.pool.guard` starts it and is its only client. Requests arrive pickled. Replies go back as JSON, rebuilt from
plain numbers and text, so that the guard unpickles nothing that comes from a reward.
"""

import asyncio
import inspect
import json
import math
import os
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from configs.rewards import PoolName, RewardSpec
from configs.visible import visible
from rewards.types import CONTRACT_ERROR, ContractError, Placement, Reward, Status, Task, Verdict

OUT_OF_MEMORY = 77
"""Exit code of a process that reached its memory limit."""

END = [None, None]
"""Index and content of the last reply to a request."""

_MAX_DETAIL_CHARS, _MAX_OUTCOME_CHARS = 2000, 60
_GRACE_SECONDS = 1.0
"""Time after their limit in which completions that are awaited together report their timeouts."""

_OWN_FILES = (__file__, inspect.getfile(Verdict))

Build = Callable[[RewardSpec], Reward]
Form = Literal["one by one", "concurrent", "batch", "list"]
"""The calls of a reward for a group: `score` for one completion after the other, an async `score` for all side by side
in one event loop, `score_batch` for all in one call, or `score_list` for all, which it compares with each other."""

_Send = Callable[[int | None, object], None]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ProcessConfig:
    """Settings of the process; see `rewards.pool.guard.Guard`."""

    specs: list[RewardSpec]
    build: Build
    timeout_seconds: float
    memory_gib: float | None
    judges: bool


@dataclass(frozen=True)
class Request:
    """Judge the completions of one task, or check several tasks (`completions` is None).

    Replies are `[number, index, content]`, with the fields of a completion's verdict or a task's `[problem, fault]`. A
    reply with index None is END, or sets the time limit of the replies after it.
    """

    number: int
    label: str
    tasks: list[Task]
    completions: list[str] | None = None


def serve(fd: int) -> None:
    """Send this process's id, build the rewards, send their placements and forms, set them up, then answer requests.

    The process ends when the guard hangs up. Where a reward can't be built or set up, the reply is `{"problem":
    message}`, and the process ends too.
    """
    channel = Connection(fd)
    config: ProcessConfig = channel.recv()
    if config.memory_gib is not None:
        limit = int(config.memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        _serve(channel, config)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _serve(channel: Connection, config: ProcessConfig) -> None:
    def send(index: int | None, content: object) -> None:
        channel.send_bytes(json.dumps([number, index, content]).encode())

    number = 0
    send(None, {"pid": os.getpid()})
    try:
        rewards = {spec.label: _start(spec.label, lambda spec=spec: config.build(spec)) for spec in config.specs}
        placements = {label: _placement(label, reward) for label, reward in rewards.items()}
        forms = {label: _form(label, reward) for label, reward in rewards.items()}
        send(None, {"placements": [astuple(placement) for placement in placements.values()], "forms": forms})
        for label, reward in rewards.items():
            if hasattr(reward, "setup") and (config.judges or placements[label].pool != "model"):
                _start(label, reward.setup)  # pyright: ignore[reportAttributeAccessIssue]
        send(None, {})
    except ValueError as error:
        send(None, {"problem": str(error) or repr(error)})
        return
    with asyncio.Runner() as runner:  # one event loop for all requests: HTTP clients are bound to theirs
        while True:
            try:
                request: Request = channel.recv()
            except EOFError:
                return
            number, reward = request.number, rewards[request.label]
            if request.completions is None:
                _check(reward, request.tasks, config.timeout_seconds, send)
            else:
                _judge(reward, request, config.timeout_seconds, runner, send)
            send(*END)


def _start(label: str, step: Callable[[], _Result]) -> _Result:
    """Build or set up the reward `label`. Raises ValueError or MemoryError."""
    try:
        return step()
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"reward '{label}' cannot be set up: {_describe(error)}") from error


def _placement(label: str, reward: Reward) -> Placement:
    pool = getattr(reward, "pool", "rule")
    if pool not in get_args(PoolName):
        raise ValueError(f"reward '{label}': pool is {pool!r}; it can be {', '.join(get_args(PoolName))}")
    if pool == "model" and label in get_args(PoolName):
        raise ValueError(f"reward '{label}' has workers of its own: give it a label that is no pool's")
    return Placement(label, cast(PoolName, pool), getattr(reward, "gpus", 0.0), getattr(reward, "start_seconds", None))


def _form(label: str, reward: Reward) -> Form:
    if getattr(reward, "listwise", False):
        return "list"
    if hasattr(reward, "score_batch"):
        return "batch"
    if not hasattr(reward, "score"):
        raise ValueError(f"reward '{label}' has neither score(task, completion) nor score_batch(tasks, completions)")
    return "concurrent" if inspect.iscoroutinefunction(reward.score) else "one by one"


def _check(reward: Any, tasks: list[Task], timeout_seconds: float, send: _Send) -> None:
    """Send each task's problem and the reward's own fault, up to the first fault."""
    for index, task in enumerate(tasks):
        problem = fault = None
        try:
            if hasattr(reward, "check"):
                reward.check(task)
        except ValueError as error:
            problem = visible(str(error) or repr(error))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything
            fault = _describe(error)
        send(index, [problem, fault])
        if fault is not None:
            return
        if index == 0:  # which had the time of a start, since a reward may load its data with it
            send(None, timeout_seconds)


def _judge(reward: Any, request: Request, timeout_seconds: float, runner: asyncio.Runner, send: _Send) -> None:
    """Send the time limit of a reply, then the verdict of every completion. Raises MemoryError."""
    [task], completions = request.tasks, request.completions or []

    def report(index: int, verdict: Verdict, seconds: float) -> None:
        send(index, astuple(replace(verdict, seconds=seconds)))

    form, limit = _form(request.label, reward), _attempt(lambda: _time_limit(reward, task, timeout_seconds))
    if isinstance(limit, Verdict):
        for index in range(len(completions)):
            report(index, limit, 0.0)
    elif form == "concurrent":
        send(None, limit + _GRACE_SECONDS)
        runner.run(_judge_concurrently(reward, task, completions, limit, report))
    else:
        size = len(completions) if form in ("batch", "list") else 1
        send(None, limit * size)
        for first in range(0, len(completions), size):
            began = time.perf_counter()
            verdicts = _judge_batch(reward, task, completions[first : first + size], runner)
            seconds = (time.perf_counter() - began) / size
            for index, verdict in enumerate(verdicts, start=first):
                report(index, verdict, seconds)


def _time_limit(reward: Any, task: Task, timeout_seconds: float) -> float:
    """Seconds that one verdict on the task may take."""
    if not hasattr(reward, "time_limit"):
        return timeout_seconds
    seconds = _number(reward.time_limit(task), "time_limit()")
    if not 0 < seconds < math.inf:
        raise ValueError(f"time_limit() returned {seconds:g}")
    return seconds


def _judge_batch(reward: Any, task: Task, completions: list[str], runner: asyncio.Runner) -> list[Verdict]:
    """The verdicts of one call. A sync function is called outside of the event loop, so that it may run one itself."""

    def call() -> list[object]:
        if getattr(reward, "listwise", False):
            results = reward.score_list(task, completions)
        elif hasattr(reward, "score_batch"):
            results = reward.score_batch([task] * len(completions), completions)
        else:
            return [reward.score(task, completion) for completion in completions]
        if inspect.iscoroutine(results):
            results = runner.run(results)
        if not isinstance(results, list | tuple):
            raise ContractError(f"a {type(results).__name__} came back, not a list with a result for each completion")
        if len(results) != len(completions):
            raise ContractError(f"{len(results)} results came back for {len(completions)} completions")
        return list(results)

    results = _attempt(call)
    if isinstance(results, Verdict):
        return [results] * len(completions)
    return [_attempt(lambda result=result: _verdict(result)) for result in results]


async def _judge_concurrently(
    reward: Any, task: Task, completions: list[str], limit: float, report: Callable[[int, Verdict, float], None]
) -> None:
    """Await all completions side by side, each at most `limit` seconds, and report each verdict at once."""

    async def judge(index: int, completion: str) -> None:
        began, timeout = time.perf_counter(), asyncio.timeout(limit)
        try:
            async with timeout:
                verdict = _verdict(await reward.score(task, completion))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything
            verdict = _failure(error)
            if timeout.expired():
                verdict = Verdict(None, Status.TIMEOUT, f"no verdict within {limit:g} s")
        report(index, verdict, time.perf_counter() - began)

    await asyncio.gather(*(judge(index, completion) for index, completion in enumerate(completions)))


def _attempt(call: Callable[[], _Result]) -> _Result | Verdict:
    """The result of `call`, or the verdict on its failure. Raises MemoryError."""
    try:
        return call()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a plug-in may raise anything
        return _failure(error)


def _failure(error: Exception) -> Verdict:
    outcome = CONTRACT_ERROR if isinstance(error, ContractError) else ""
    return Verdict(None, Status.INFRA_ERROR, _describe(error), outcome=outcome)


def _verdict(result: object) -> Verdict:
    """A reward's result, rebuilt from plain parts: a subclass of str or float that it made would not cross."""
    if not isinstance(result, Verdict):
        return Verdict(_number(result, "the reward"))
    score = None if result.score is None else _number(result.score, "the reward")
    detail = visible(str(result.detail))[:_MAX_DETAIL_CHARS]
    outcome = visible(str(result.outcome))[:_MAX_OUTCOME_CHARS]
    return Verdict(score, Status(result.status), detail, outcome=outcome)


def _number(value: object, source: str) -> float:
    """A float from any kind of number, a one-element array included; True and False are 1 and 0."""
    if hasattr(value, "item"):
        value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(value, Real):
        raise TypeError(f"{source} returned {type(value).__name__}, not a number")
    return float(value)


def _describe(error: Exception) -> str:
    """The error with the plug-in's line that raised it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    line = "" if last.filename in _OWN_FILES else f" ({Path(last.filename).name}, line {last.lineno})"
    return visible(f"{type(error).__name__}: {error}")[:_MAX_DETAIL_CHARS] + line
