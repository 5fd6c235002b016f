"""Measures the cost of the sandbox: the same commands with and without it, in turns."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.bench.measure import bench_folder, medians, seconds, seconds_in_turns
from rewards.code.reward import CodeReward
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import ExitReason, Limits
from rewards.sandbox.toolchains import find_toolchain, plan_program
from rewards.types import Task

RUNS = 50
SAMPLES, CASES, NUM_THREADS = 64, 10, 2
LANGUAGE = "cpp"
TIME_LIMIT, MEMORY_MB = 5.0, 256
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


def sandbox_cost(repeats: int) -> dict[str, float]:
    """Compares one small program, and the code reward, with their commands outside the sandbox.

    The program's figures are medians of RUNS x `repeats` runs, in ms. The reward judges 64 samples in C++ with ten
    cases each, on two threads, as the bare commands do.
    """
    bare_seconds, judged_seconds = _samples()
    return _one_run(RUNS * repeats) | {
        "bare_samples_seconds": bare_seconds,
        "judged_samples_seconds": judged_seconds,
        "judged_over_bare": judged_seconds / bare_seconds,
    }


def _one_run(runs: int) -> dict[str, float]:
    box = Sandbox()
    stdin = _case(factor=1, number=0)["stdin"].encode()
    with bench_folder() as name:
        folder = Path(name)
        command = _compile(folder, factor=1)
        bare, boxed = seconds_in_turns(
            runs, lambda: _run_bare(command, folder, stdin), lambda: _run_boxed(box, command, folder, stdin)
        )
    added = [with_box - without for with_box, without in zip(boxed, bare, strict=True)]
    values = medians([bare, boxed, added])
    return {name: 1000 * value for name, value in zip(("bare_ms", "boxed_ms", "added_ms"), values, strict=True)}


def _samples() -> tuple[float, float]:
    """Seconds for all samples, bare and judged, a few samples of each in turns."""
    reward = CodeReward()
    reward.setup()
    bare_seconds = judged_seconds = 0.0
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for first in range(1, SAMPLES + 1, 4 * NUM_THREADS):
            factors = range(first, first + 4 * NUM_THREADS)
            bare_seconds += seconds(lambda factors=factors: list(threads.map(_run_bare_sample, factors)))
            judged_seconds += seconds(
                lambda factors=factors: list(threads.map(lambda f: _judge_sample(reward, f), factors))
            )
    return bare_seconds, judged_seconds


def _run_bare_sample(factor: int) -> None:
    with bench_folder() as name:
        folder = Path(name)
        command = _compile(folder, factor)
        for number in range(CASES):
            case = _case(factor, number)
            if _run_bare(command, folder, case["stdin"].encode()).decode() != case["stdout"]:
                raise RuntimeError(f"the bare program of sample {factor} is wrong in case {number}")


def _judge_sample(reward: CodeReward, factor: int) -> None:
    truth = {"language": LANGUAGE, "cases": [_case(factor, number) for number in range(CASES)]}
    truth |= {"time_limit": TIME_LIMIT, "memory_mb": MEMORY_MB}
    verdict = reward.score(Task("", truth), SOURCE.format(factor=factor))
    if verdict.score != 1:
        raise RuntimeError(f"sample {factor} was judged {verdict.outcome}: {verdict.detail}")


def _case(factor: int, number: int) -> dict[str, str]:
    values = [(7919 * i + number) % 1000 for i in range(100)]
    output = "".join(f"{factor * value}\n" for value in sorted(values))
    return {"stdin": " ".join(map(str, values)), "stdout": output}


def _compile(folder: Path, factor: int) -> list[str]:
    """Compiles the sample's program outside the sandbox; returns the command that runs it."""
    program = plan_program(LANGUAGE, SOURCE.format(factor=factor), MEMORY_MB)
    (folder / program.file).write_text(SOURCE.format(factor=factor))
    subprocess.run(program.compile, cwd=folder, check=True, capture_output=True, timeout=60)
    return program.run


def _run_bare(command: list[str], folder: Path, stdin: bytes) -> bytes:
    return subprocess.run(command, cwd=folder, input=stdin, check=True, capture_output=True, timeout=60).stdout


def _run_boxed(box: Sandbox, command: list[str], folder: Path, stdin: bytes) -> bytes:
    limits = Limits(seconds=TIME_LIMIT, memory_mb=MEMORY_MB)
    result = box.run(command, folder=folder, limits=limits, runtime=find_toolchain(LANGUAGE).running, stdin=stdin)
    if result.reason is not ExitReason.EXITED:
        raise RuntimeError(f"the boxed program ended by {result.reason}: {result.stderr.decode(errors='replace')}")
    return result.stdout
