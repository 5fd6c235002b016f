"""The guard: whatever a checker does, a verdict comes back in time, and a failure is never a score."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.rewards import RewardSpec
from rewards.guard import Guard
from rewards.types import Status, Task, Verdict
from tests.rewards import hostile

LIMIT = 0.5
TASK = Task("", "63")


def judge(behaviour: str, task: Task = TASK) -> Verdict:
    with Guard(hostile.specs(behaviour), timeout_seconds=LIMIT, build=hostile.build) as guard:
        return guard.judge(behaviour, task, "")


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("behaviour", ["hang", "hang_in_c"])
def test_a_hang_is_a_timeout(behaviour: str) -> None:
    verdict = judge(behaviour)
    assert (verdict.score, verdict.status) == (None, Status.TIMEOUT)
    assert LIMIT <= verdict.seconds < LIMIT + 1


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("raise", "ZeroDivisionError"),
        ("raise_base", "SIGINT"),
        ("exit", "exit code 3"),
        ("kill_itself", "SIGKILL"),
        ("eat_memory", "out of its 2 GiB"),
        ("nan", "finite"),
        ("inf", "finite"),
        ("nan_verdict", "finite"),
        ("too_large", "OverflowError"),
        ("none", "NoneType"),
        ("string", "str"),
        ("two_scores", "list"),
    ],
)
def test_a_broken_checker_is_an_infra_error(behaviour: str, said: str) -> None:
    verdict = judge(behaviour)
    assert (verdict.score, verdict.status) == (None, Status.INFRA_ERROR)
    assert said in verdict.detail


def test_prints_do_not_corrupt_the_channel() -> None:
    assert judge("print").score == 0.5


def test_abstention_and_numbers_pass_through() -> None:
    assert judge("abstain").status is Status.ABSTAIN
    with Guard(hostile.specs("length"), timeout_seconds=LIMIT, build=hostile.build) as guard:
        assert [guard.judge("length", TASK, "x" * n).score for n in (0, 3, 10**6)] == [0.0, 3.0, 1e6]


def test_a_failure_is_tried_once_more_in_a_fresh_process(tmp_path: Path) -> None:
    verdict = judge("once", Task("", str(tmp_path / "tried")))
    assert (verdict.score, verdict.status) == (0.25, Status.OK)


def test_a_killed_process_is_replaced() -> None:
    with Guard(hostile.specs("pid", "hang"), timeout_seconds=LIMIT, build=hostile.build) as guard:
        first = guard.judge("pid", TASK, "").score
        assert guard.judge("pid", TASK, "").score == first
        assert first is not None
        os.kill(int(first), signal.SIGKILL)
        second = guard.judge("pid", TASK, "").score
        assert second is not None and second != first
        assert guard.judge("hang", TASK, "").status is Status.TIMEOUT
        assert not alive(int(second))
        assert guard.judge("pid", TASK, "").status is Status.OK


def test_a_stopped_process_is_a_timeout_and_then_replaced() -> None:
    with Guard(hostile.specs("pid"), timeout_seconds=LIMIT, build=hostile.build) as guard:
        first = guard.judge("pid", TASK, "").score
        assert first is not None
        os.kill(int(first), signal.SIGSTOP)
        verdict = guard.judge("pid", TASK, "")
        assert verdict.status is Status.OK and verdict.score != first


def test_a_wrong_spec_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown behaviour 'politeness'"):
        Guard(hostile.specs("politeness"), timeout_seconds=LIMIT, build=hostile.build).start()
    with pytest.raises(ValueError, match="did you mean 'math'"):
        Guard(hostile.specs("maths"), timeout_seconds=LIMIT).start()


def test_off_the_main_thread() -> None:
    verdicts: list[Verdict] = []

    def work() -> None:
        with Guard([RewardSpec(name="math")], timeout_seconds=10) as guard:
            verdicts.append(guard.judge("math", TASK, r"\boxed{\frac{126}{2}}"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert [verdict.score for verdict in verdicts] == [1.0]


def test_the_process_outlives_neither_its_guard_nor_a_hang_after_the_guard_is_gone() -> None:
    program = (
        "import os, sys, threading, time\n"
        "from rewards.guard import Guard\n"
        "from rewards.types import Task\n"
        "from tests.rewards import hostile\n"
        "guard = Guard(hostile.specs('pid', 'hang_in_c'), timeout_seconds=2, build=hostile.build)\n"
        "print(int(guard.judge('pid', Task('', ''), '').score), flush=True)\n"
        "threading.Timer(0.5, lambda: os._exit(0)).start()\n"
        "guard.judge(sys.argv[1], Task('', ''), '') if len(sys.argv) > 1 else time.sleep(60)\n"
    )
    for arguments in ([], ["hang_in_c"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, timeout=60, check=True)
        pid, deadline = int(done.stdout), time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(pid)


def test_hostile_latex_is_answered_in_time() -> None:
    nested = r"\frac{1}{" * 100 + "2" + "}" * 100
    answers = ["9^{9^{9^9}}", nested, "(" * 400 + "1" + ")" * 400, r"\left(" * 120]
    completions = ["\\boxed{" * 15_000, "{" * 100_000, *(f"\\boxed{{{answer}}}" for answer in answers)]
    with Guard([RewardSpec(name="math")], timeout_seconds=0.7) as guard:
        for completion in completions:
            verdict = guard.judge("math", TASK, completion)
            assert verdict.seconds < 1.7
            assert verdict.status is Status.TIMEOUT or verdict.score == 0.0, completion[:60]
        assert guard.judge("math", TASK, completions[2]).status is Status.TIMEOUT
        assert guard.judge("math", TASK, "63").score == 1.0
