"""Shared by the benchmarks: a temporary folder, fixed prompts, times of alternatives measured in turns, runs of recipes
at several seeds and tables of their figures."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from jobs.command import OUT
from pipeline.disk.recorded import read_figures

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


def run_at_seed(recipe: str, name: str, seed: int) -> Path:
    """Run a recipe at a seed as `runs/NAME-seed-N`, or continue or read the run that is there; return its folder."""
    folder = Path("runs") / f"{name}-seed-{seed}"
    command = [str(Path(sys.executable).with_name("alignyard")), "run", recipe]
    subprocess.run([*command, f"seed={seed}", f"name={folder.name}"], check=False)
    return folder


def stage_figures(stage: Path) -> dict[str, float]:
    """Return the figures of a stage of a run. Raises ValueError where the run ended before it."""
    figures = read_figures(stage)
    if figures is None:
        raise ValueError(f"'{stage}' was not reached; `alignyard status {stage.parent}` shows where the run ended")
    return figures


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    for line in (header, ["---"] * len(header), *rows):
        OUT.print(f"| {' | '.join(line)} |", markup=False, highlight=False, soft_wrap=True)
