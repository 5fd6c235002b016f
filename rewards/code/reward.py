"""Code: does the program compile, print what it should, pass its tests?"""

from functools import cache
from typing import ClassVar, Literal

from pydantic import Field

from configs.base import Settings
from configs.rewards import PoolName
from rewards.code import cases, unit_tests
from rewards.code.extract import program
from rewards.code.outcome import Outcome
from rewards.code.truth import Truth, read
from rewards.sandbox.box import Mode, Sandbox
from rewards.sandbox.process import Limits
from rewards.sandbox.toolchains import COMPILE, find
from rewards.types import Task, Verdict

_BOX_SECONDS = 2.0
"""For a box to be made and removed, on a machine that is busy; 10 ms on one that is not."""


class CodeReward(Settings):
    """1.0 for a program that passes, else 0.0 or the fraction it passed; the verdict's `outcome` is an `Outcome`.

    `task.truth` is described by `rewards.code.truth.Truth`: input and output, unit tests, or just compiling; a dict or
    the same as JSON. The completion is prose with a fenced block, or bare source. Programs run in a sandbox of their
    own, and what they are compared with stays outside. Where that fails (no box, a checker that crashes, tests that
    break without the program's doing) `score` raises RuntimeError, which is no score.
    """

    pool: ClassVar[PoolName] = "sandbox"

    sandbox: Mode = "bubblewrap"
    """`unsafe` runs what the policy writes with the rights of this user, limited in time and memory only."""
    credit: Literal["all", "fraction"] = "all"
    """`all`: 1.0 if every case passes, and the first that fails ends it. `fraction`: the share of cases, or of the
    tests in a list, that pass."""
    seconds: float = Field(default=5.0, gt=0)
    """Seconds of processor time, rounded up, for each case, or for all tests together, where the task has no limit of
    its own. By the clock it may be three times as long and a second."""
    memory_mb: int = Field(default=512, ge=16)
    """MiB a program may take, beside its runtime, where the task has no limit of its own."""
    output_kb: int = Field(default=1024, ge=1)
    """KiB a program may print beyond twice what is expected."""

    def setup(self) -> None:
        """Prove that the sandbox works. Raises ValueError with the remedies where it does not."""
        _sandbox(self.sandbox)

    def check(self, task: Task) -> None:
        """Raises ValueError where `task.truth` is wrong, where its toolchain is not installed, and where its tests pass
        or expect values that can't cross between two processes."""
        truth = read(task.truth)
        find(truth.language)
        if truth.checker:
            find(truth.checker.language)
        if truth.may_pass_objects:
            problem = unit_tests.uncarried(_sandbox(self.sandbox), truth, self._limits(truth))
            if problem:
                raise ValueError(f"truth.tests: {problem}; define its class in setup, or compare plain values")

    def time_limit(self, task: Task) -> float:
        """Seconds by the clock that one verdict takes at most: to compile, and every run to its limit."""
        truth = read(task.truth)
        limits = unit_tests.limits_of_tests(self._limits(truth)) if truth.tests else self._limits(truth)
        runs = [limits] * max(len(truth.cases), 1)
        compilations = [] if truth.tests else [COMPILE]
        if truth.checker:
            runs += [cases.CHECKING] * len(truth.cases)
            compilations.append(COMPILE)
        return sum(limits.wall_seconds + _BOX_SECONDS for limits in [*runs, *compilations])

    def score(self, task: Task, completion: str) -> Verdict:
        """The verdict; see the class. Raises ValueError as `check` does, and RuntimeError where the judging fails."""
        truth = read(task.truth)
        source = program(completion, truth.language, names=truth.solution_names, runs=bool(truth.cases))
        if source is None:
            return Verdict(0.0, outcome=Outcome.NO_CODE)
        judge = unit_tests.judge if truth.tests else cases.judge
        judged = judge(_sandbox(self.sandbox), truth, source, self._limits(truth), stop=self.credit == "all")
        share = judged.passed / judged.total
        score = share if self.credit == "fraction" else float(judged.outcome is Outcome.PASSED)
        return Verdict(score, detail=judged.detail, outcome=judged.outcome)

    def _limits(self, truth: Truth) -> Limits:
        return Limits(
            seconds=truth.time_limit or self.seconds,
            memory_mb=truth.memory_mb or self.memory_mb,
            output_kb=self.output_kb,
        )


@cache
def _sandbox(mode: Mode) -> Sandbox:
    return Sandbox(mode)
