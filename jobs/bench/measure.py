"""Shared by the benchmarks: a temporary folder, fixed prompts, and times of alternatives measured in turns."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

PROMPT_LENGTHS = (32, 36, 40, 44, 52, 56, 60, 64)
"""Tokens of each prompt of a step, chat template included."""


def bench_folder() -> TemporaryDirectory[str]:
    """A temporary folder, for a `with` statement."""
    return TemporaryDirectory(prefix="alignyard-bench-")


def byte_prompts() -> list[list[int]]:
    """A prompt of each of PROMPT_LENGTHS, as ids of the byte tokenizer."""
    return [[3 + (7 * i + j) % 256 for j in range(length)] for i, length in enumerate(PROMPT_LENGTHS)]


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `work` takes."""
    start = clock()
    work()
    return clock() - start


def seconds_in_turns(
    repeats: int, *alternatives: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each alternative in each of `repeats` turns, after one that warms up.

    In a turn every alternative runs once, so that all of them see the same load of the machine.
    """
    turns = [[seconds(work, clock) for work in alternatives] for _ in range(repeats + 1)]
    return [list(column) for column in zip(*turns[1:], strict=True)]


def medians(series: Sequence[Sequence[float]]) -> list[float]:
    """The median of each series."""
    return [median(values) for values in series]
