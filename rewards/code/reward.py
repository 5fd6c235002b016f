"""The code reward: a program compiles, prints the expected output, or passes unit tests."""

from dataclasses import replace
from functools import cache
from typing import ClassVar, Literal

from pydantic import Field

from configs.base import Settings
from configs.rewards import PoolName
from rewards.code.cases import CHECKING, judge_cases
from rewards.code.extract import extract_program
from rewards.code.outcome import CodeOutcome
from rewards.code.truth import Truth, read_truth
from rewards.code.unit_tests import judge_tests, limits_of_tests, untransferable
from rewards.sandbox.box import Isolation, Sandbox
from rewards.sandbox.process import Limits
from rewards.sandbox.toolchains import COMPILE, find_toolchain
from rewards.types import Task, Verdict

_BOX_SECONDS = 2.0
"""Time to make and remove a box on a busy machine; an idle one takes 10 ms."""


class CodeReward(Settings):
    """Score 1.0 for a program that passes, else 0.0 or the fraction that passed; `outcome` is a `CodeOutcome`.

    `task.truth` is a `rewards.code.truth.Truth` as a dict or JSON: input and output, unit tests, or compiling alone.
    The completion is prose with a fenced block, or bare source. Programs run in a sandbox, and the expected output
    stays outside. If judging itself fails (no box, a crashing checker, broken tests) `score` raises RuntimeError.

    Example:
        truth = {"language": "python", "cases": [{"stdin": "2", "stdout": "4"}]}
        CodeReward().score(Task("Double it.", truth), "print(2 * int(input()))").score  # 1.0
    """

    pool: ClassVar[PoolName] = "sandbox"

    sandbox: Isolation = "bubblewrap"
    """`unsafe` runs the policy's programs with the rights of this user, limited in time and memory only."""
    credit: Literal["all", "fraction"] = "all"
    """`all`: 1.0 if every case passes; the first failure ends judging. `fraction`: the share of the cases, or of the
    tests in a list, that pass."""
    seconds: float = Field(default=5.0, gt=0)
    """CPU seconds, rounded up, for each case or for all tests together, unless the task sets its own limit. The
    wall-clock limit is three times that and a second."""
    memory_mb: int = Field(default=512, ge=16)
    """Memory of a program in MiB, beside its runtime's, unless the task sets its own limit."""
    compile_seconds: float | None = Field(default=None, gt=0)
    """CPU seconds, rounded up, of each process of a compiler; by default twice those of the program and 5. A program
    that takes longer does not compile."""
    output_kb: int = Field(default=1024, ge=1)
    """Output of a program in KiB, beyond twice the expected output."""

    def setup(self) -> None:
        """Prove that the sandbox works. Raises ValueError with the remedies if it does not."""
        _sandbox(self.sandbox)

    def check(self, task: Task) -> None:
        """Raises ValueError if `task.truth` is wrong, its toolchain is not installed, or its tests pass or expect
        values that cannot cross between two processes."""
        truth = read_truth(task.truth)
        find_toolchain(truth.language)
        if truth.checker:
            find_toolchain(truth.checker.language)
        if truth.may_pass_objects:
            problem = untransferable(_sandbox(self.sandbox), truth, self._limits(truth))
            if problem:
                raise ValueError(f"truth.tests: {problem}; define its class in setup, or compare plain values")

    def time_limit(self, task: Task) -> float:
        """Return the longest wall-clock time of one verdict: compiling, and every run to its limit."""
        truth = read_truth(task.truth)
        limits = limits_of_tests(self._limits(truth)) if truth.tests else self._limits(truth)
        runs = [limits] * max(len(truth.cases), 1)
        compilations = [] if truth.tests else [self._compiler_limits(limits)]
        if truth.checker:
            runs += [CHECKING] * len(truth.cases) * 2  # a checker that fails on an output is tried on the answer
            compilations.append(COMPILE)
        return sum(limits.wall_seconds + _BOX_SECONDS for limits in [*runs, *compilations])

    def score(self, task: Task, completion: str) -> Verdict:
        """Judge the program in `completion`; see the class. Raises ValueError for a wrong `task.truth`."""
        truth = read_truth(task.truth)
        source = extract_program(completion, truth.language, names=truth.solution_names, runs=bool(truth.cases))
        if source is None:
            return Verdict(0.0, outcome=CodeOutcome.NO_CODE)
        return self.judge_source(task, source)

    def judge_source(self, task: Task, source: str) -> Verdict:
        """Judge a program by `task.truth`; see the class."""
        truth = read_truth(task.truth)
        sandbox, limits, stop = _sandbox(self.sandbox), self._limits(truth), self.credit == "all"
        if truth.tests:
            result = judge_tests(sandbox, truth, source, limits, stop=stop)
        else:
            result = judge_cases(sandbox, truth, source, limits, self._compiler_limits(limits), stop=stop)
        share = result.passed / result.total
        score = share if self.credit == "fraction" else float(result.outcome is CodeOutcome.PASSED)
        return Verdict(score, detail=result.detail, outcome=result.outcome)

    def _limits(self, truth: Truth) -> Limits:
        return Limits(
            seconds=truth.time_limit or self.seconds,
            memory_mb=truth.memory_mb or self.memory_mb,
            output_kb=self.output_kb,
        )

    def _compiler_limits(self, limits: Limits) -> Limits:
        return replace(COMPILE, seconds=self.compile_seconds or 2 * limits.seconds + 5)


@cache
def _sandbox(mode: Isolation) -> Sandbox:
    return Sandbox(mode)
