"""The judging process: makes the rewards, asks them, and says each verdict as soon as it has it.

`rewards.guard` starts it and is the only one it speaks to. Requests arrive pickled. Answers go back as JSON, rebuilt
from plain numbers and text, so the guard never unpickles anything that a reward has made.
"""

import asyncio
import ctypes
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from configs.rewards import PoolName, RewardSpec
from rewards.types import CONTRACT_ERROR, ContractError, Post, Reward, Status, Task, Verdict

OUT_OF_MEMORY = 77
"""Exit code of a process that reached its limit of memory."""

DETAIL_CHARS, OUTCOME_CHARS = 2000, 60
"""What is kept of `Verdict.detail` and `Verdict.outcome`; each outcome is the name of a metric."""

END = [None, None]
"""Index and content of the answer that says that all verdicts were given."""

_PR_SET_PDEATHSIG = 1
# All control characters but tab and newline, marks that reverse the direction of text, and lone surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OWN_FILES = (__file__, inspect.getfile(Verdict))

Build = Callable[[RewardSpec], Reward]
Form = Literal["single", "together", "batch"]
"""How a reward is asked: one completion after the other, all awaited at once, or all in one call."""


@dataclass(frozen=True)
class Terms:
    """What the process starts from; see `rewards.guard.Guard`."""

    specs: list[RewardSpec]
    build: Build
    timeout_seconds: float
    memory_gib: float | None
    judges: bool


@dataclass(frozen=True)
class Request:
    """Judge `completions` of the only task, or, where there are none (None), check the tasks.

    Answers are `[number, index, what]`: per completion a verdict's fields, per task `[problem, fault]`. Verdicts come
    between two answers with index None: the seconds that each may take, and END.
    """

    number: int
    label: str
    tasks: list[Task]
    completions: list[str] | None = None


Say = Callable[[int | None, Any], None]
T = TypeVar("T")


def serve(fd: int) -> None:
    """Make the rewards, say what they are or what is wrong, set them up, say so, answer until the guard hangs up."""
    if sys.platform == "linux":  # should the guard die while a reward hangs inside C code
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = Connection(fd)
    terms: Terms = channel.recv()
    if terms.memory_gib is not None:
        limit = int(terms.memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        _serve(channel, terms)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _serve(channel: Connection, terms: Terms) -> None:
    number = 0

    def say(index: int | None, what: Any) -> None:
        channel.send_bytes(json.dumps([number, index, what]).encode())

    try:
        rewards = {spec.label: _made(spec.label, lambda spec=spec: terms.build(spec)) for spec in terms.specs}
        posts = {label: _post(label, reward) for label, reward in rewards.items()}
        say(None, {"posts": [astuple(post) for post in posts.values()], "forms": _forms(rewards)})
        for label, reward in rewards.items():
            if hasattr(reward, "setup") and (terms.judges or posts[label].pool != "model"):
                _made(label, reward.setup)  # pyright: ignore[reportAttributeAccessIssue]
        say(None, {})
    except ValueError as error:
        say(None, {"problem": str(error) or repr(error)})
        return
    with asyncio.Runner() as runner:  # one loop for the life of the process: clients of services are bound to theirs
        while True:
            try:
                request: Request = channel.recv()
            except EOFError:
                return
            number, reward = request.number, rewards[request.label]
            if request.completions is None:
                for index, task in enumerate(request.tasks):
                    say(index, _check(reward, task))
            else:
                _judge(reward, request, terms.timeout_seconds, runner, say)
                say(*END)


def _made(label: str, make: Callable[[], T]) -> T:
    """What `make` gives. Raises ValueError with the reward's label where it fails otherwise."""
    try:
        return make()
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"reward '{label}' cannot be set up: {_words(error)}") from error


def _post(label: str, reward: Reward) -> Post:
    pool = getattr(reward, "pool", "rule")
    if pool not in get_args(PoolName):
        raise ValueError(f"reward '{label}': pool is {pool!r}; it can be {', '.join(get_args(PoolName))}")
    if pool == "model" and label in get_args(PoolName):
        raise ValueError(f"reward '{label}' asks a model and has workers of its own: give it a label that is no pool's")
    return Post(label, cast(PoolName, pool), getattr(reward, "gpus", 0.0), getattr(reward, "start_seconds", None))


def _forms(rewards: dict[str, Reward]) -> dict[str, Form]:
    return {label: _form(label, reward) for label, reward in rewards.items()}


def _form(label: str, reward: Reward) -> Form:
    if hasattr(reward, "score_batch"):
        return "batch"
    if not hasattr(reward, "score"):
        raise ValueError(f"reward '{label}' has neither score(task, completion) nor score_batch(tasks, completions)")
    return "together" if inspect.iscoroutinefunction(reward.score) else "single"


def _check(reward: Reward, task: Task) -> tuple[str | None, str | None]:
    """What is wrong with the task, and what is wrong with the reward."""
    try:
        if hasattr(reward, "check"):
            reward.check(task)  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        return _harmless(str(error) or repr(error)), None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a plug-in's code
        return None, _words(error)
    return None, None


def _judge(reward: Any, request: Request, timeout_seconds: float, runner: asyncio.Runner, say: Say) -> None:
    """Say the verdict of every completion. Lets only MemoryError through, and what is no `Exception`."""
    [task], completions = request.tasks, request.completions or []
    seconds = timeout_seconds

    def said(index: int, verdict: Verdict, took: float) -> None:
        say(index, (verdict.score, verdict.status, verdict.detail, took, verdict.outcome))

    try:
        if hasattr(reward, "time_limit"):
            seconds = _number(reward.time_limit(task), "time_limit()")
            if not 0 < seconds < math.inf:
                raise ValueError(f"time_limit() returned {seconds:g}")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a plug-in's code
        for index in range(len(completions)):
            said(index, _failure(error), 0.0)
        return
    say(None, seconds)
    form, began = _form(request.label, reward), time.perf_counter()
    if form == "batch":
        verdicts = _batch(reward, task, completions, runner)
        for index, verdict in enumerate(verdicts):
            said(index, verdict, (time.perf_counter() - began) / len(verdicts))
    elif form == "together":
        runner.run(_together(reward, task, completions, seconds, said))
    else:
        for index, completion in enumerate(completions):
            began = time.perf_counter()
            verdict = _asked(lambda completion=completion: reward.score(task, completion))
            said(index, verdict, time.perf_counter() - began)


def _asked(ask: Callable[[], object]) -> Verdict:
    try:
        return _verdict(ask())
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a reward raises is its failure, and is said in the verdict
        return _failure(error)


def _batch(reward: Any, task: Task, completions: list[str], runner: asyncio.Runner) -> list[Verdict]:
    try:
        results = reward.score_batch([task] * len(completions), completions)
        if inspect.iscoroutine(results):
            results = runner.run(results)
        if not isinstance(results, list | tuple):
            raise ContractError(f"a {type(results).__name__} came back, not a list with a result for each completion")
        if len(results) != len(completions):
            raise ContractError(f"{len(results)} results came back for {len(completions)} completions")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        return [_failure(error)] * len(completions)
    return [_asked(lambda result=result: result) for result in results]


async def _together(
    reward: Any, task: Task, completions: list[str], seconds: float, said: Callable[[int, Verdict, float], None]
) -> None:
    async def one(index: int, completion: str) -> None:
        began = time.perf_counter()
        verdict = await _awaited(reward, task, completion, seconds)
        said(index, verdict, time.perf_counter() - began)

    await asyncio.gather(*(one(index, completion) for index, completion in enumerate(completions)))


async def _awaited(reward: Any, task: Task, completion: str, seconds: float) -> Verdict:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return _verdict(await reward.score(task, completion))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        if limit.expired():
            return Verdict(None, Status.TIMEOUT, f"no verdict within {seconds:g} s")
        return _failure(error)


def _verdict(result: object) -> Verdict:
    """What a reward returned, rebuilt from plain parts: a reward's own class of text would not cross."""
    if not isinstance(result, Verdict):
        return Verdict(_number(result, "the reward"))
    score = None if result.score is None else _number(result.score, "the reward")
    return Verdict(
        score,
        Status(result.status),
        _harmless(str(result.detail))[:DETAIL_CHARS],
        outcome=_harmless(str(result.outcome))[:OUTCOME_CHARS],
    )


def _number(value: object, source: str) -> float:
    """A number of any make, an array's single element too; True and False are 1 and 0."""
    if hasattr(value, "item"):
        value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(value, Real):
        raise TypeError(f"{source} returned {type(value).__name__}, not a number")
    return float(value)


def _failure(error: Exception) -> Verdict:
    outcome = CONTRACT_ERROR if isinstance(error, ContractError) else ""
    return Verdict(None, Status.INFRA_ERROR, _words(error), outcome=outcome)


def _words(error: Exception) -> str:
    """The error and the line it comes from, unless it is ours."""
    *_, last = traceback.extract_tb(error.__traceback__)
    where = "" if last.filename in _OWN_FILES else f" ({Path(last.filename).name}, line {last.lineno})"
    return _harmless(f"{type(error).__name__}: {error}")[:DETAIL_CHARS] + where


def _harmless(text: str) -> str:
    """`text` with its control characters escaped: it may quote what a policy wrote, and reaches terminals and logs."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
