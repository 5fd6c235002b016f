"""Judging a file of completions without Ray: rows in, the same rows with their verdicts out, in order.

A row is a line of JSON: `{"prompt": text or messages, "completion": text, "truth": anything}`. The truth may lie in
another column, and the reward finds all columns in `task.metadata`.
"""

import json
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from configs.rewards import RewardPoolConfig, RewardSpec
from rewards.pool.guard import Guard, inspect
from rewards.pool.limits import memory_limits
from rewards.types import Status, Task, Verdict

BAD_ROW = "bad_row"
"""The status of a row that could not be judged."""
_MAX_ROWS_AHEAD = 8
"""Rows that a worker may be ahead of the oldest row without a verdict."""


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A line of a file: its place, its columns, and its problem, "" for a good row.

    A line that is no JSON object has its text in the column `line`.
    """

    where: str
    values: dict[str, Any]
    problem: str = ""
    truth_column: str = "truth"

    @property
    def task(self) -> Task:
        """The task that the completion answers."""
        prompt = self.values["prompt"]
        text, messages = (prompt, []) if isinstance(prompt, str) else (prompt[-1]["content"], prompt)
        return Task(text, self.values.get(self.truth_column), row=self.where, metadata=self.values, messages=messages)


def read_completions(path: Path, truth: str | None = None) -> Iterator[CompletionRow]:
    """The rows of a JSONL file without its empty lines. Raises ValueError where the file does not exist.

    truth: the column of the gold answers, which every row must have. None takes the column `truth` where there is one.
    """
    for number, line in _lines(path):
        yield _row(f"{path.name}:{number}", line, truth)


def completion_rows(rows: Iterable[Mapping[str, Any]], truth: str | None = None) -> Iterator[CompletionRow]:
    """Rows in memory as those of a file: each is written as a line of JSON and read again. Raises TypeError for a value
    that JSON has not."""
    for number, row in enumerate(rows, start=1):
        yield _row(f"row {number}", json.dumps(dict(row)).encode(), truth)


def count_completions(path: Path) -> int:
    """The number of rows that `read_completions` yields. Raises ValueError where the file does not exist."""
    return sum(1 for _ in _lines(path))


def guard_factory(spec: RewardSpec, timeout_seconds: float) -> Callable[[], Guard]:
    """A function that makes guards with the limits of the reward's pool. Raises ValueError for a wrong spec."""
    config = RewardPoolConfig(timeout_seconds=timeout_seconds)
    [placement] = inspect([spec], config).values()
    machine_gib = psutil.virtual_memory().total / 2**30
    memory_gib, resident_gib = memory_limits(placement.pool, spec.label, config, machine_gib=machine_gib)
    return partial(Guard, [spec], timeout_seconds=timeout_seconds, memory_gib=memory_gib, resident_gib=resident_gib)


def judge_rows(
    rows: Iterable[CompletionRow], spec: RewardSpec, *, workers: int, timeout_seconds: float
) -> Iterator[tuple[CompletionRow, Verdict | None]]:
    """Each row with its verdict, in order; a row that can't be judged has None, and its problem in the row.

    workers: judging processes. Rows are read only as far ahead as these need. Raises ValueError for a wrong spec
    before the first row is read.

    Example:
        for row, verdict in judge_rows(read_completions(path), RewardSpec(name="math"), workers=2, timeout_seconds=5):
            print(row.where, verdict and verdict.score)
    """
    new_guard = guard_factory(spec, timeout_seconds)
    guards: list[Guard] = []
    local = threading.local()  # a guard belongs to one thread

    def start() -> None:
        local.guard = new_guard()
        guards.append(local.guard)

    pending: deque[Future[tuple[CompletionRow, Verdict | None]]] = deque()
    threads = ThreadPoolExecutor(workers, initializer=start)
    try:
        for row in rows:
            pending.append(threads.submit(lambda row=row: judge_row(local.guard, spec.label, row)))
            if len(pending) > _MAX_ROWS_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
        for guard in guards:
            guard.close()


def judge_row(guard: Guard, label: str, row: CompletionRow) -> tuple[CompletionRow, Verdict | None]:
    """The row with its verdict, or with its problem and None."""
    if not row.problem:
        try:
            [problem] = guard.check(label, [row.task])
        except ValueError as error:  # the fault lies with the checker, not with the row
            return row, Verdict(None, Status.INFRA_ERROR, str(error))
        if problem is None:
            return row, guard.judge(label, row.task, [row.values["completion"]])[0]
        row = replace(row, problem=problem)
    return row, None


def verdict_columns(row: CompletionRow, verdict: Verdict | None) -> dict[str, Any]:
    """The columns that are written beside the row's own."""
    if verdict is None:
        return {"score": None, "status": BAD_ROW, "outcome": "", "detail": row.problem, "seconds": 0.0}
    return {name: getattr(verdict, name) for name in ("score", "status", "outcome", "detail", "seconds")}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise ValueError(f"no file '{path}' (looked from {Path.cwd()})")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _row(where: str, line: bytes, truth: str | None) -> CompletionRow:
    text = {"line": line.decode(errors="replace").strip()}
    try:
        values = json.loads(line)
        pickle.dumps(values)  # to reach a judging process; fails at a smaller depth than json
    except (ValueError, RecursionError) as error:
        return CompletionRow(where, text, f"not JSON: {error}")
    if not isinstance(values, dict):
        return CompletionRow(where, text, f"not an object: {type(values).__name__}")
    return CompletionRow(where, values, _problem(values, truth), truth or "truth")


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
