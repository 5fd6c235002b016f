"""Judging a file of completions, without Ray: rows in, the same rows with their verdicts out, in order.

A row is a line of JSON: `{"prompt": text or messages, "completion": text, "truth": anything}`. The truth may lie in
another column, whose name is then given, and the reward finds all columns in `task.metadata`.
"""

import json
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from configs.rewards import RewardPoolConfig, RewardSpec
from rewards.guard import RULE_MEMORY_GIB, Guard, inspect
from rewards.types import Status, Task, Verdict

_AHEAD = 8
"""Rows a worker may be ahead of the oldest one that isn't judged yet."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a file: its place, its columns, and what is wrong with it ("" where nothing is).

    A line that is no JSON object has its text in the column `line`.
    """

    where: str
    values: dict[str, Any]
    problem: str = ""
    truth_column: str = "truth"

    @property
    def task(self) -> Task:
        """What the completion answers."""
        prompt = self.values["prompt"]
        text, messages = (prompt, []) if isinstance(prompt, str) else (prompt[-1]["content"], prompt)
        return Task(text, self.values.get(self.truth_column), row=self.where, metadata=self.values, messages=messages)


def read_rows(path: Path, truth: str | None = None) -> Iterator[Row]:
    """The rows of a JSONL file, empty lines left out. Raises ValueError where there is no such file.

    truth: the column of the gold answers, which every row must then have; where it is None, `truth` if there is one.
    """
    for number, line in _lines(path):
        yield _row(f"{path.name}:{number}", line, truth)


def count_rows(path: Path) -> int:
    """How many `read_rows` will give. Raises what it raises."""
    return sum(1 for _ in _lines(path))


def guard_factory(spec: RewardSpec, timeout_seconds: float) -> Callable[[], Guard]:
    """What makes guards with the limits of the pool the reward runs in. Raises ValueError for a wrong spec."""
    [placement] = inspect([spec], RewardPoolConfig(timeout_seconds=timeout_seconds)).values()
    memory_gib = RULE_MEMORY_GIB if placement.pool == "rule" else None
    return partial(Guard, [spec], timeout_seconds=timeout_seconds, memory_gib=memory_gib)


def judge_rows(
    rows: Iterable[Row], spec: RewardSpec, *, workers: int, timeout_seconds: float
) -> Iterator[tuple[Row, Verdict | None]]:
    """Each row with its verdict, in order; None for a row with a problem, its own or one that the reward has with it.

    workers: judging processes. Rows are read only so far ahead as these can use. Raises ValueError for a wrong spec,
    before the first row is read.
    """
    new_guard = guard_factory(spec, timeout_seconds)
    guards: list[Guard] = []
    mine = threading.local()  # a guard lives and dies with its thread

    def start() -> None:
        mine.guard = new_guard()
        guards.append(mine.guard)

    def judge(row: Row) -> tuple[Row, Verdict | None]:
        return judge_row(mine.guard, spec.label, row)

    waiting: deque[Future[tuple[Row, Verdict | None]]] = deque()
    threads = ThreadPoolExecutor(workers, initializer=start)
    try:
        for row in rows:
            waiting.append(threads.submit(judge, row))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
        for guard in guards:
            guard.close()


def judge_row(guard: Guard, label: str, row: Row) -> tuple[Row, Verdict | None]:
    """The row and its verdict, or the row with what is wrong with it and None."""
    if not row.problem:
        try:
            [problem] = guard.check(label, [row.task])
        except ValueError as error:  # the checker's fault, not the row's
            return row, Verdict(None, Status.INFRA_ERROR, str(error))
        if problem is None:
            return row, guard.judge(label, row.task, [row.values["completion"]])[0]
        row = replace(row, problem=problem)
    return row, None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise ValueError(f"no file '{path}' (looked from {Path.cwd()})")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _row(where: str, line: bytes, truth: str | None) -> Row:
    try:
        values = json.loads(line)
        pickle.dumps(values)  # which a judging process gets; fails sooner than json at what is nested deep
        problem = _problem(values, truth) if isinstance(values, dict) else f"not an object: {type(values).__name__}"
    except (ValueError, RecursionError) as error:
        values, problem = None, f"not JSON: {error}"
    if isinstance(values, dict):
        return Row(where, values, problem, truth or "truth")
    return Row(where, {"line": line.decode(errors="replace").strip()}, problem)


def _problem(values: dict[str, Any], truth: str | None) -> str:
    for column in ("prompt", "completion", truth):
        if column is not None and values.get(column) is None:
            return f"no column '{column}'; the columns are: {', '.join(sorted(values)) or '(none)'}"
    if not isinstance(values["completion"], str):
        return f"completion is a {type(values['completion']).__name__}, not text"
    prompt = values["prompt"]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_message, prompt))):
        return ""
    return "prompt is neither text nor a list of messages {role, content}"


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
