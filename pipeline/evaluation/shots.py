"""Worked examples before a question, as earlier turns of its conversation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from configs.suites import ShotSuite
from pipeline.data.rows import BadRowError, BadRows, Row, read_rows
from rewards.types import Task

_T = TypeVar("_T")


def read_shots(suite: ShotSuite, read: Callable[[Row], _T]) -> list[_T]:
    """Convert the first `suite.shots` rows of its `shots_source` by `read`. Raises ValueError for a bad or missing
    row."""
    if suite.shots_source is None:
        return []
    bad_rows, examples = BadRows(), list[_T]()
    for row in islice(read_rows(suite.shots_source, bad_rows), suite.shots):
        try:
            examples.append(read(row))
        except BadRowError as error:
            bad_rows.add(row.where, error)
    bad_rows.check(0)
    if len(examples) < suite.shots:
        raise ValueError(f"shots={suite.shots}: shots_source has only {len(examples)} rows")
    return examples


def with_shots(task: Task, shots: Sequence[tuple[str, str]]) -> Task:
    """Put question and answer of each example before the task's prompt, as turns of user and assistant."""
    turns = [
        message
        for question, answer in shots
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    return replace(task, messages=[*turns, {"role": "user", "content": task.prompt}])
