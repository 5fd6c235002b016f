"""The guard: whatever a reward does, a verdict comes back in time, and a failure is never a score."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import rewards.pool.limits
from configs.rewards import RewardPoolConfig, RewardSpec
from rewards.pool.guard import Guard, Judges, inspect, refuse_idle_workers, unjudgeable
from rewards.pool.limits import memory_limits
from rewards.types import CONTRACT_ERROR, Placement, Status, Task, Verdict
from tests.rewards import hostile
from tests.waiting import wait_until

LIMIT = 20.0
"""Seconds that no verdict of a test needs, even where other programs use the processor."""
SHORT = 1.0
"""The limit where something hangs."""
TASK = Task("", "63")
INFRA = Status.INFRA_ERROR


def judge(
    behaviour: str, completions: list[str], task: Task = TASK, limit: float = LIMIT, **args: Any
) -> list[Verdict]:
    with Guard(hostile.specs(behaviour, **args), timeout_seconds=limit, build=hostile.build) as guard:
        return guard.judge(behaviour, task, completions)


def scores(verdicts: list[Verdict]) -> list[float | None]:
    return [verdict.score for verdict in verdicts]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("form", hostile.FORMS)
def test_whatever_one_judgement_does_is_no_score_and_costs_nobody_else(form: str) -> None:
    hangs = ["hang", "hang_in_c"]
    others = [behaviour for behaviour in hostile.BEHAVIOURS if behaviour not in hangs]
    for behaviours, limit, status in ((hangs, SHORT, Status.TIMEOUT), (others, LIMIT, INFRA)):
        with Guard(hostile.specs(*behaviours, form=form), timeout_seconds=limit, build=hostile.build) as guard:
            for behaviour in behaviours:
                verdicts = guard.judge(behaviour, TASK, ["a", "bad", "ccc"])
                assert scores(verdicts) == [1.0, None, 3.0], behaviour
                assert verdicts[1].status is status and verdicts[1].detail, behaviour
                assert behaviour not in hangs or verdicts[1].seconds >= SHORT


@pytest.mark.parametrize("form", ["batch", "awaited_batch"])
@pytest.mark.parametrize("behaviour", hostile.BATCHES)
def test_a_batch_of_the_wrong_shape_breaks_the_contract(behaviour: str, form: str) -> None:
    verdicts = judge(behaviour, ["a", "bad", "ccc"], form=form)
    assert scores(verdicts) == [None, None, None]  # one by one, a function that returns one result would fit
    assert {(verdict.status, verdict.outcome) for verdict in verdicts} == {(INFRA, CONTRACT_ERROR)}
    if behaviour in ("too_few", "too_many"):
        assert f"{2 if behaviour == 'too_few' else 4} results came back for 3 completions" in verdicts[1].detail


@pytest.mark.parametrize(("score", "accepted"), [(1e39, 1e39), (-1e100, -1e100), (1.01e100, None), (-1e308, None)])
def test_a_score_too_large_to_be_averaged_is_the_fault_of_the_reward(
    tmp_path: Path, score: float, accepted: float | None
) -> None:
    (tmp_path / "large.py").write_text(f"def large(task, completion):\n    return {score!r}\n")
    with Guard([RewardSpec(name=f"{tmp_path}/large.py:large")], timeout_seconds=10) as guard:
        [verdict] = guard.judge("large", TASK, ["a"])
    assert (verdict.score, verdict.status) == (accepted, Status.OK if accepted is not None else INFRA)
    assert accepted is not None or "between -1e+100 and 1e+100" in verdict.detail


def test_what_a_policy_wrote_reaches_no_terminal(tmp_path: Path) -> None:
    text = "\x1b]0;owned\x07 \x9b2J \u202eabc\ttab\nline \ud800 \u00e9 \u4e2d"
    (tmp_path / "quotes.py").write_text(
        "from rewards.types import Verdict\n"
        "def fails(task, completion):\n    raise ValueError(completion)\n"
        "def says(task, completion):\n    return Verdict(0.0, outcome=completion[:12], detail=completion)\n"
        "class Refuses:\n    def check(self, task):\n        raise ValueError(task.truth)\n"
        "    def score(self, task, completion):\n        return 0.0\n"
    )
    specs = [RewardSpec(name=f"{tmp_path}/quotes.py:{name}") for name in ("fails", "says", "Refuses")]
    with Guard(specs, timeout_seconds=10) as guard:
        failed, verdict = guard.judge("fails", TASK, [text])[0], guard.judge("says", TASK, [text])[0]
        [problem] = guard.check("Refuses", [Task("", text)])
    escaped = r"\x1b]0;owned\x07 \x9b2J \u202eabc" + "\ttab\nline " + r"\ud800 " + "\u00e9 \u4e2d"
    assert failed.detail.startswith(f"ValueError: {escaped}")
    assert (verdict.detail, problem) == (escaped, escaped) and "\x1b" not in verdict.outcome


@pytest.mark.parametrize("form", hostile.FORMS)
def test_a_fork_that_goes_on_is_never_taken_for_another_completion(form: str) -> None:
    with Guard(hostile.specs("fork", form=form), timeout_seconds=LIMIT, build=hostile.build) as guard:
        for _ in range(2):
            verdicts = guard.judge("fork", TASK, ["a", "bad", "ccc", "dddd"])
            for verdict, expected in zip(verdicts, (1.0, 1.0, 3.0, 4.0), strict=True):
                assert verdict.score == expected or verdict.status is INFRA


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("raise", "ZeroDivisionError: integer division or modulo by zero (hostile.py, line "),
        ("raise_base", "SIGINT"),
        ("exit", "exit code 3"),
        ("kill_itself", "SIGKILL"),
        ("eat_memory", "out of its 2 GiB"),
        ("nan", "finite"),
        ("too_large", "OverflowError"),
        ("none", "NoneType"),
        ("garbage", "makes no sense"),
    ],
)
def test_the_detail_says_what_happened(behaviour: str, message: str) -> None:
    [verdict] = judge(behaviour, ["bad"])
    assert message in verdict.detail


def test_a_process_that_maps_files_and_models_is_limited_by_its_resident_memory(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    (tmp_path / "leak.py").write_text(
        "import mmap, time\nkept = []\n"
        "def leak(task, completion):\n"
        "    reserved = mmap.mmap(-1, 2**33)\n"  # address space alone
        f"    open({str(file)!r}, 'a').write(completion + ' ')\n"
        "    kept.append(bytearray(int(completion) * 2**20))\n"
        "    time.sleep(1.0 * (sum(map(len, kept)) > 2**29))\n    return 1.0\n"
    )
    spec = RewardSpec(name=f"{tmp_path}/leak.py:leak")
    with Guard([spec], timeout_seconds=60.0, memory_gib=None, resident_gib=0.5) as guard:
        assert scores(guard.judge("leak", TASK, ["201", "202"])) == [1.0, 1.0]
        assert scores(guard.judge("leak", TASK, ["203"])) == [1.0]  # by the next process
        assert file.read_text() == "201 202 203 203 "
        [verdict] = guard.judge("leak", TASK, ["900"])
        assert verdict.score is None and "out of its 0.5 GiB of memory (reward_pool.memory_gib)" in verdict.detail
        assert scores(guard.judge("leak", TASK, ["1"])) == [1.0]


def test_limits_of_memory_by_pool() -> None:
    config = RewardPoolConfig(workers={"fair": 4}, memory_gib={"sandbox": 6})
    assert memory_limits("rule", "math", config, machine_gib=64) == (2.0, None)
    assert memory_limits("sandbox", "code", config, machine_gib=64) == (None, 6.0)
    assert memory_limits("model", "fair", config, machine_gib=64) == (None, 8.0)
    with pytest.raises(ValueError, match=r"reward_pool\.memory_gib\.sandbox has no effect"):
        refuse_idle_workers(config, [Placement("fair", "model", 0, None)])


def test_a_new_process_that_runs_out_of_memory_is_not_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    (tmp_path / "eats.py").write_text(
        "def eats(task, completion):\n"
        f"    open({str(file)!r}, 'a').write(completion)\n"
        "    return float(len(bytearray(2**33)) if completion == 'x' else 1)\n"
    )
    with Guard([RewardSpec(name=f"{tmp_path}/eats.py:eats")], timeout_seconds=LIMIT) as guard:
        assert scores(guard.judge("eats", TASK, ["x"])) == [None]
        assert file.read_text() == "x"  # it would again
        assert scores(guard.judge("eats", TASK, ["a", "x"])) == [1.0, None]
    assert file.read_text() == "xaxx"  # the first may have taken the memory


def test_a_rule_that_got_no_processor_is_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "calls"  # of a rule that a signal stops; one that sleeps is not asked again
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "def slow(task, completion):\n"
        f"    tried = open({str(file)!r}, 'a+').seek(0) or open({str(file)!r}).read().count(completion)\n"
        f"    open({str(file)!r}, 'a').write(completion)\n"
        "    if completion == 's':\n        time.sleep(600)\n"
        "    if not tried:\n        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return 1.0\n"
    )
    with Guard([RewardSpec(name=f"{tmp_path}/slow.py:slow")], timeout_seconds=SHORT) as guard:
        assert scores(guard.judge("slow", TASK, ["h", "s"])) == [1.0, None]
    assert file.read_text().count("h") == 2 and file.read_text().count("s") == 1


def test_verdicts_and_numbers_pass_through() -> None:
    assert judge("abstain", ["bad"])[0].status is Status.ABSTAIN
    assert scores(judge("true", ["bad"])) == [1.0]
    [verdict] = judge("outcome", ["bad"])
    assert (verdict.score, verdict.outcome, verdict.detail) == (0.5, "compile error", "line 3")
    assert scores(judge("length", ["x" * n for n in (0, 3, 10**6)])) == [0.0, 3.0, 1e6]
    assert judge("length", []) == []


def test_prints_reach_standard_error_at_once_and_not_the_channel(capfd: pytest.CaptureFixture[str]) -> None:
    with Guard(hostile.specs("print"), timeout_seconds=LIMIT, build=hostile.build) as guard:
        assert scores(guard.judge("print", TASK, ["bad"])) == [0.5]
    out, err = capfd.readouterr()  # killed by now, with whatever it still held back
    assert out == "" and "a reward prints" in err
    assert "\\x00\\x01 raw bytes too" in err and not set(err) & set("\x00\x01"), "nothing controls the terminal"


@pytest.mark.parametrize("form", hostile.FORMS)
def test_equal_completions_are_judged_once(form: str, tmp_path: Path) -> None:
    task = Task("", str(tmp_path / "count"))
    assert scores(judge("count", ["bad 1", "bad 2", "bad 1", "bad 1"], task, form=form)) == [1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("form", hostile.FORMS)
@pytest.mark.parametrize("behaviour", ["die_once", "raise_once"])
def test_a_failure_is_tried_once_more(behaviour: str, form: str, tmp_path: Path) -> None:
    assert scores(judge(behaviour, ["bad", "x"], Task("", str(tmp_path / "tried")), form=form)) == [0.25, 1.0]


def test_a_timeout_is_tried_once_more_unless_a_rule_ran_out_of_time(tmp_path: Path) -> None:
    for pool, expected in (("sandbox", 0.25), ("model", 0.25), ("rule", None)):
        assert scores(judge("hang_once", ["bad"], Task("", str(tmp_path / pool)), SHORT, pool=pool)) == [expected]


def test_completions_awaited_together_share_their_time_but_not_their_limit() -> None:
    waiting = [f"bad {n}" for n in range(8)]
    verdicts = judge("await_eight", [*waiting, "bad for ever"], limit=3.0, form="together")
    assert scores(verdicts) == [8.0] * 8 + [None]  # each ends when all eight have begun
    assert verdicts[-1].status is Status.TIMEOUT


@pytest.mark.parametrize("form", hostile.FORMS)
def test_a_task_may_have_a_limit_of_its_own(form: str) -> None:
    assert scores(judge("slow", ["bad", "a"], limit=SHORT, form=form)) == [None, 1.0]
    assert scores(judge("slow", ["bad", "a"], form=form, task_limit=30.0)) == [0.75, 1.0]


@pytest.mark.parametrize("limit", [-1, float("nan"), "soon"])
def test_a_limit_that_is_none_is_an_infra_error(limit: Any) -> None:
    verdicts = judge("slow", ["bad", "a"], task_limit=limit)
    assert {(verdict.score, verdict.status) for verdict in verdicts} == {(None, INFRA)}


def test_a_killed_process_is_replaced() -> None:
    with Guard(hostile.specs("pid", "hang"), timeout_seconds=SHORT, build=hostile.build) as guard:
        [first] = scores(guard.judge("pid", TASK, ["bad"]))
        assert scores(guard.judge("pid", TASK, ["bad"])) == [first]
        assert first is not None
        os.kill(int(first), signal.SIGKILL)
        [second] = scores(guard.judge("pid", TASK, ["bad"]))
        assert second is not None and second != first
        assert guard.judge("hang", TASK, ["bad"])[0].status is Status.TIMEOUT
        assert not alive(int(second))
        assert guard.judge("pid", TASK, ["bad"])[0].status is Status.OK


def test_a_stopped_process_is_replaced_however_much_it_was_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.pool.guard, "_STALL_SECONDS", 1)
    monkeypatch.setattr(rewards.pool.guard, "_EXIT_SECONDS", 0.5)
    for completion in ("bad", "bad" * 10**6):
        with Guard(hostile.specs("pid"), timeout_seconds=SHORT, build=hostile.build) as guard:
            [first] = scores(guard.judge("pid", TASK, ["bad"]))
            assert first is not None
            os.kill(int(first), signal.SIGSTOP)
            assert guard.judge("pid", TASK, [completion])[0].status is Status.OK  # by another process
            [second] = scores(guard.judge("pid", TASK, ["bad"]))
            assert second not in (None, first)


def test_a_wrong_spec_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="'politeness'"):
        Guard(hostile.specs("politeness"), timeout_seconds=LIMIT, build=hostile.build).start()
    with pytest.raises(ValueError, match="did you mean 'math'"):
        Guard(hostile.specs("maths"), timeout_seconds=LIMIT).start()
    with pytest.raises(ValueError, match=r"'length': .*'gpu'.*rule, sandbox, model"):
        Guard(hostile.specs("length", pool="gpu"), timeout_seconds=LIMIT, build=hostile.build).start()
    with pytest.raises(ValueError, match=r"'pid' .*KeyError: 'a key' .*hostile\.py"):
        Guard(hostile.specs("pid", setup="raise"), timeout_seconds=LIMIT, build=hostile.build).start()


def test_a_process_that_cannot_start_is_told_from_a_wrong_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="exit code 5"):
        Guard(hostile.specs("pid", setup="exit"), timeout_seconds=LIMIT, build=hostile.build).start()
    monkeypatch.setattr(rewards.pool.limits, "DEFAULT_START_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match="within 1 s"):
        Guard(hostile.specs("pid", setup="hang"), timeout_seconds=LIMIT, build=hostile.build).start()


def test_a_reward_is_set_up_before_it_judges_and_again_in_the_next_process(tmp_path: Path) -> None:
    setups = tmp_path / "set_up"
    specs = hostile.specs("kill_itself", setup=str(setups))
    with Guard(specs, timeout_seconds=LIMIT, build=hostile.build) as guard:
        guard.start()
        assert setups.read_text() == "x"
        guard.judge("kill_itself", TASK, ["bad"])
        assert setups.read_text() == "xx"  # the second attempt


def test_a_model_is_loaded_only_where_it_judges(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    specs, config = hostile.specs("pid", pool="model", setup=str(loaded), start_seconds=50.0), RewardPoolConfig()
    [post] = inspect(specs, config, hostile.build).values()
    assert post == Placement("pid", "model", 0.0, 50.0) and post.worker_group == "pid"
    assert unjudgeable(specs, config, [TASK], hostile.build) == [None]
    assert not loaded.exists()
    with Guard(specs, timeout_seconds=LIMIT, build=hostile.build) as guard:
        assert guard.judge("pid", TASK, ["a"])[0].score == 1.0
    assert loaded.read_text() == "x"


def test_a_reward_says_how_long_it_may_take_to_be_set_up() -> None:
    specs = hostile.specs("pid", pool="model", setup="hang", start_seconds=1.0)
    with pytest.raises(RuntimeError, match="within 1 s"):
        Guard(specs, timeout_seconds=LIMIT, build=hostile.build).start()


TASKS = [Task("", "1"), Task("", "what?", row="rows:2"), Task("", "3", kind="pid")]


def test_tasks_are_checked_where_they_apply() -> None:
    with Guard(hostile.specs("length", "pid"), timeout_seconds=LIMIT, build=hostile.build) as guard:
        problems = guard.check("length", TASKS)
    assert problems[0] is None and problems[2] is None and problems[1] and "'what?'" in problems[1]
    specs, config = hostile.specs("length", pool="sandbox") + hostile.specs("pid"), RewardPoolConfig()
    tasks = [*TASKS, Task("", "1", kind="lenght"), Task("", "1", kind="pid length")]
    assert unjudgeable(specs, config, tasks, hostile.build) == [
        None,
        f"reward 'length': {problems[1]}",
        None,
        "task '' is for reward 'lenght'; configured: length, pid",
        None,
    ]


def test_rewards_are_inspected_before_anything_is_launched() -> None:
    specs, config = hostile.specs("length", pool="sandbox") + hostile.specs("pid"), RewardPoolConfig()
    posts = inspect(specs, config, hostile.build)
    assert {label: post.worker_group for label, post in posts.items()} == {"length": "sandbox", "pid": "rule"}
    with pytest.raises(ValueError, match="once"):
        inspect(hostile.specs("length", "length"), config, build=hostile.build)


def test_one_process_places_the_rewards_and_checks_the_tasks(tmp_path: Path) -> None:
    setups = tmp_path / "set_up"
    with Judges(hostile.specs("length", setup=str(setups)), RewardPoolConfig(), hostile.build) as judges:
        problems = judges.problems(TASKS[:2])
    assert judges.placements == {"length": Placement("length", "rule", 0.0, None)}
    assert problems[0] is None and problems[1] is not None
    assert setups.read_text() == "x"


@pytest.mark.parametrize(("truth", "message"), [("raise", "KeyError"), ("hang", "1 s"), ("exit", "exit code 5")])
def test_a_check_that_fails_is_the_fault_of_the_reward(truth: str, message: str) -> None:
    with Guard(hostile.specs("pid"), timeout_seconds=SHORT, build=hostile.build) as guard:
        with pytest.raises(ValueError, match=f"'pid' .*'rows:1': .*{message}"):
            guard.check("pid", [TASK, Task("", truth, row="rows:1")])
        assert guard.check("pid", [TASK]) == [None]


def test_workers_of_a_pool_without_rewards_are_refused() -> None:
    config = RewardPoolConfig(workers={"rule": 2, "helpful": 1})
    refuse_idle_workers(config, [Placement("length", "rule", 0.0, None), Placement("helpful", "model", 0.0, None)])
    with pytest.raises(ValueError, match=r"reward_pool\.workers\.helpful .*rule, safety.*remove"):
        refuse_idle_workers(config, [Placement("length", "rule", 0.0, None), Placement("safety", "model", 0.0, None)])


def test_off_the_main_thread() -> None:
    verdicts: list[Verdict] = []

    def work() -> None:
        with Guard([RewardSpec(name="math")], timeout_seconds=10) as guard:
            verdicts.extend(guard.judge("math", TASK, [r"\boxed{\frac{126}{2}}"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert scores(verdicts) == [1.0]


def test_the_process_outlives_neither_its_guard_nor_a_hang_after_the_guard_is_gone() -> None:
    program = (
        "import os, sys, threading, time\n"
        "from rewards.pool.guard import Guard\n"
        "from rewards.types import Task\n"
        "from tests.rewards import hostile\n"
        "guard = Guard(hostile.specs('pid', 'hang_in_c'), timeout_seconds=600, build=hostile.build)\n"
        "print(int(guard.judge('pid', Task('', ''), ['bad'])[0].score), flush=True)\n"
        "threading.Timer(0.5, lambda: os._exit(0)).start()\n"
        "guard.judge(sys.argv[1], Task('', ''), ['bad']) if len(sys.argv) > 1 else time.sleep(60)\n"
    )
    for arguments in ([], ["hang_in_c"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, timeout=120, check=True)
        pid = int(done.stdout)
        wait_until(lambda pid=pid: not alive(pid))


def test_hostile_latex_is_answered_in_time() -> None:
    nested = r"\frac{1}{" * 100 + "2" + "}" * 100
    answers = ["9^{9^{9^9}}", nested, "(" * 400 + "1" + ")" * 400, r"\left(" * 120]
    completions = ["\\boxed{" * 15_000, "{" * 100_000, *(f"\\boxed{{{answer}}}" for answer in answers)]
    with Guard([RewardSpec(name="math")], timeout_seconds=5) as guard:
        for verdict, completion in zip(guard.judge("math", TASK, completions), completions, strict=True):
            assert verdict.status is Status.TIMEOUT or verdict.score == 0.0, completion[:60]
        assert scores(guard.judge("math", TASK, ["63"])) == [1.0]
