"""What a box costs: the same commands in the sandbox and bare, in turns, so that both see the same machine."""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards.code.reward import CodeReward
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import ExitReason, Limits
from rewards.sandbox.toolchains import find_toolchain, plan_program
from rewards.types import Task

RUNS = 50
SAMPLES, CASES, THREADS = 64, 10, 2
LANGUAGE = "cpp"
SECONDS, MEMORY_MB = 5.0, 256
SOURCE = """
#include <algorithm>
#include <iostream>
#include <vector>

int main() {{
    std::vector<long> values;
    for (long value; std::cin >> value;) values.push_back(value * {factor});
    std::sort(values.begin(), values.end());
    for (long value : values) std::cout << value << '\\n';
}}
"""


def sandbox(repeats: int) -> dict[str, float]:
    """Milliseconds that a box adds to one run of a small program, the median of RUNS x `repeats`; and how much longer
    the code reward takes for 64 samples in C++ with ten cases each than their bare commands do, on two threads either
    way."""
    figures = _one_run(RUNS * repeats)
    bare, judged = _samples()
    figures |= {"bare_samples_seconds": bare, "judged_samples_seconds": judged, "judged_over_bare": judged / bare}
    return figures


def _one_run(runs: int) -> dict[str, float]:
    box = Sandbox()
    stdin = _case(factor=1, number=0)["stdin"].encode()
    with tempfile.TemporaryDirectory(prefix="alignyard-bench-") as made:
        folder = Path(made)
        command = _compile(folder, factor=1)
        bare, boxed = [], []
        for _ in range(runs):
            bare.append(_seconds(lambda: _bare(command, folder, stdin)))
            boxed.append(_seconds(lambda: _boxed(box, command, folder, stdin)))
    added = [one - other for one, other in zip(boxed, bare, strict=True)]
    figures = {"bare_ms": bare, "boxed_ms": boxed, "added_ms": added}
    return {name: 1000 * statistics.median(seconds) for name, seconds in figures.items()}


def _samples() -> tuple[float, float]:
    """Seconds for all samples, bare and judged; in turns, a few samples at a time."""
    reward = CodeReward()
    reward.setup()
    bare = judged = 0.0
    with ThreadPoolExecutor(THREADS) as threads:
        for first in range(1, SAMPLES + 1, 4 * THREADS):
            factors = range(first, first + 4 * THREADS)
            bare += _seconds(lambda factors=factors: list(threads.map(_bare_sample, factors)))
            judged += _seconds(lambda factors=factors: list(threads.map(lambda f: _judge(reward, f), factors)))
    return bare, judged


def _bare_sample(factor: int) -> None:
    with tempfile.TemporaryDirectory(prefix="alignyard-bench-") as made:
        folder = Path(made)
        command = _compile(folder, factor)
        for number in range(CASES):
            case = _case(factor, number)
            if _bare(command, folder, case["stdin"].encode()).decode() != case["stdout"]:
                raise RuntimeError(f"the bare program of sample {factor} is wrong in case {number}")


def _judge(reward: CodeReward, factor: int) -> None:
    truth = {"language": LANGUAGE, "cases": [_case(factor, number) for number in range(CASES)]}
    truth |= {"time_limit": SECONDS, "memory_mb": MEMORY_MB}
    verdict = reward.score(Task("", truth), SOURCE.format(factor=factor))
    if verdict.score != 1:
        raise RuntimeError(f"sample {factor} was judged {verdict.outcome}: {verdict.detail}")


def _case(factor: int, number: int) -> dict[str, str]:
    values = [(7919 * i + number) % 1000 for i in range(100)]
    return {
        "stdin": " ".join(map(str, values)),
        "stdout": "".join(f"{factor * value}\n" for value in sorted(values)),
    }


def _compile(folder: Path, factor: int) -> list[str]:
    """The command of the sample's program, compiled bare."""
    program = plan_program(LANGUAGE, SOURCE.format(factor=factor), MEMORY_MB)
    (folder / program.file).write_text(SOURCE.format(factor=factor))
    subprocess.run(program.compile, cwd=folder, check=True, capture_output=True, timeout=60)
    return program.run


def _bare(command: list[str], folder: Path, stdin: bytes) -> bytes:
    return subprocess.run(command, cwd=folder, input=stdin, check=True, capture_output=True, timeout=60).stdout


def _boxed(box: Sandbox, command: list[str], folder: Path, stdin: bytes) -> bytes:
    limits = Limits(seconds=SECONDS, memory_mb=MEMORY_MB)
    result = box.run(command, folder=folder, limits=limits, runtime=find_toolchain(LANGUAGE).running, stdin=stdin)
    if result.reason is not ExitReason.EXITED:
        raise RuntimeError(f"the boxed program ended by {result.reason}: {result.stderr.decode(errors='replace')}")
    return result.stdout


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
