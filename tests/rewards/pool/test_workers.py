"""The pool on a real Ray: results, failures, lost and stopped workers."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

import rewards.pool.workers
from configs.rewards import RewardPoolConfig, RewardSpec
from pipeline.cluster.room import quoted_interpreter
from rewards.plugins.build import build_reward
from rewards.pool.workers import GroupVerdicts, RewardPool, RewardWorker
from rewards.types import Placement, RewardsUnavailable, Status, Task
from tests.rewards import hostile
from tests.rewards.judging.server import RUBRIC, judge_server


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
    yield
    ray.shutdown()


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts pools of hostile rewards, which end with the test."""
    pools: list[RewardPool] = []

    def start(specs: list[RewardSpec], **config: Any) -> RewardPool:
        settings = RewardPoolConfig(**{"timeout_seconds": 1.0, "max_failure_rate": 1.0, **config})
        pools.append(RewardPool(specs, settings, build=hostile.build))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def scores(judged: GroupVerdicts, label: str) -> list[float | None]:
    return [verdicts[label].score for verdicts in judged]


def test_worker_without_ray() -> None:
    worker = RewardWorker(hostile.specs("length", "raise"), "rule", RewardPoolConfig(), hostile.build)
    worker.start()
    first, second = worker.judge(Task("", ""), ["a", "bad"], ["length", "raise"])
    assert (first["length"].score, second["length"].score) == (1.0, 3.0)
    assert first["raise"].score == 1.0 and second["raise"].status is Status.INFRA_ERROR
    assert worker.judge(Task("", ""), [], ["length"]) == []


def test_failures_name_the_node_on_a_cluster_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.pool.workers._node_in_words", lambda: " (on node beta)")
    worker = RewardWorker(hostile.specs("length", "raise"), "rule", RewardPoolConfig(), hostile.build)
    worker.start()
    [verdicts] = worker.judge(Task("", ""), ["bad"], ["length", "raise"])
    assert verdicts["raise"].detail.endswith(" (on node beta)") and verdicts["length"].detail == ""
    worker.close()
    unknown = RewardWorker([RewardSpec(name="rules/none.py:none")], "rule", RewardPoolConfig(), build_reward)
    with pytest.raises(ValueError, match=r"no file 'rules/none.py'.* \(on node beta\)$"):
        unknown.start()


def test_groups_come_back_by_index_with_the_rewards_that_apply(start: Any) -> None:
    pool = start(hostile.specs("length", "abstain"), workers={"rule": 2})
    pool.submit(7, Task("p", "", kind="length"), ["a", "bb", "ccc"])
    pool.submit(3, Task("p", ""), ["bad!"])
    pool.submit(5, Task("p", "", kind="abstain"), [])
    judged = pool.gather()
    assert sorted(judged) == [3, 5, 7]
    assert scores(judged[7], "length") == [1.0, 2.0, 3.0]
    assert all(set(verdicts) == {"length"} for verdicts in judged[7])
    assert list(judged[3][0]) == ["length", "abstain"]
    assert judged[5] == []
    metrics = pool.metrics()
    assert metrics["reward/length/mean"] == pytest.approx(2.5)
    assert metrics["reward/abstain/abstain_rate"] == 1.0
    assert metrics["reward_pool/rule/replaced"] == 0.0
    assert 0 < metrics["reward_pool/rule/latency_p50"] <= metrics["reward_pool/rule/latency_p99"]
    assert 0 < metrics["reward_pool/rule/utilisation"] <= 1
    assert pool.metrics() == {}
    assert pool.gather() == {}


def test_groups_are_gathered_in_parts_while_the_caller_works(start: Any) -> None:
    pool, turns = start(hostile.specs("length"), workers={"rule": 1}), [0]

    def work() -> None:
        turns[0] += 1
        time.sleep(0.01)

    for index in range(4):
        pool.submit(index, Task("p", ""), ["a" * (index + 1)])
    with pytest.raises(ValueError, match="group 3 was submitted twice"):
        pool.submit(3, Task("p", ""), ["a"])
    assert scores(pool.gather([2, 3], meanwhile=work)[3], "length") == [4.0] and turns[0] > 0
    assert pool.metrics()["reward/length/mean"] == pytest.approx(3.5)
    assert sorted(pool.gather()) == [0, 1]
    assert pool.metrics()["reward/length/mean"] == pytest.approx(1.5)


def test_each_kind_of_reward_has_workers_of_its_own(start: Any) -> None:
    specs = [
        *hostile.specs("memory_limit"),
        *hostile.specs("parent", pool="sandbox", form="batch"),
        *hostile.specs("slow", pool="model", form="together", task_limit=30.0),
    ]
    pool = start(specs, workers={"rule": 2, "slow": 1})
    for index in range(2):
        pool.submit(index, Task("p", ""), ["bad", "a"])
    judged = pool.gather()
    for part in judged.values():
        assert [list(verdicts) for verdicts in part] == [["memory_limit", "parent", "slow"]] * 2
        assert scores(part, "memory_limit") == [2.0**31, 1.0]
        assert scores(part, "parent") == scores(judged[0], "parent")
        assert scores(part, "slow") == [0.75, 1.0]  # by its task's limit, not by the pool's
    metrics = pool.metrics()
    assert metrics["reward_pool/wait_seconds"] > 0
    pools = {key.split("/")[1] for key in metrics if key.startswith("reward_pool/") and key.count("/") == 2}
    assert pools == {"rule", "sandbox", "slow"}


def test_a_free_worker_takes_what_waits(start: Any, tmp_path: Path) -> None:
    pool = start(hostile.specs("hold", "count"), workers={"rule": 2}, timeout_seconds=60)
    truth = str(tmp_path / "count")
    pool.submit(0, Task("", truth, kind="hold"), ["bad"])  # until the other worker has judged all of these
    for index in range(1, 7):
        pool.submit(index, Task("", truth, kind="count"), ["bad"])
    judged = pool.gather()
    assert scores(judged[0], "hold") == [1.0]
    assert [scores(judged[index], "count") for index in range(1, 7)] == [[float(n)] for n in range(1, 7)]
    assert 1 <= pool.metrics()["reward_pool/rule/queue_depth_max"] <= 6


def test_math_by_its_own_name() -> None:
    pool = RewardPool(hostile.specs("math"), RewardPoolConfig())
    pool.submit(0, Task("What is 6 * 7?", "42"), [r"\boxed{42}", r"\boxed{6 \cdot 7}", "43"])
    assert scores(pool.gather()[0], "math") == [1.0, 0.0, 0.0]
    pool.close()


def test_known_placements_spare_a_process(tmp_path: Path) -> None:
    specs, setups = hostile.specs("length", setup=str(tmp_path / "set_up")), tmp_path / "set_up"
    placements = {"length": Placement("length", "rule", 0.0, None)}
    pool = RewardPool(specs, RewardPoolConfig(), hostile.build, placements)
    pool.submit(0, Task("", ""), ["abc"])
    assert scores(pool.gather()[0], "length") == [3.0]
    assert setups.read_text() == "x"  # the worker's own process
    pool.close()


def test_submit_does_not_wait(start: Any) -> None:
    pool = start(hostile.specs("hang"), timeout_seconds=3600)
    pool.submit(0, Task("", ""), ["bad"])  # the verdict would take an hour, longer than a test may


def test_wrong_input_is_refused(start: Any) -> None:
    with pytest.raises(ValueError, match="'politeness'"):
        start(hostile.specs("politeness"))
    with pytest.raises(ValueError, match="once"):
        start(hostile.specs("length", "length"))
    pool = start(hostile.specs("length"))
    with pytest.raises(ValueError, match=r"'lenght'.*configured: length"):
        pool.submit(0, Task("", "", kind="lenght", row="row-1"), ["a"])
    pool.submit(0, Task("", ""), ["a"])
    with pytest.raises(ValueError, match="twice"):
        pool.submit(0, Task("", ""), ["a"])


def test_the_breaker_stops_the_run(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.pool.workers, "BREAKER_WINDOW", 10)
    pool = start(hostile.specs("raise", "length"), max_failure_rate=0.2)
    pool.submit(0, Task("", "", row="gsm8k:17"), ["bad"] * 6)
    with pytest.raises(RewardsUnavailable, match=r"(?s)'raise'.*gsm8k:17.*ZeroDivisionError"):
        pool.gather()


def test_a_fault_of_the_pool_itself_is_raised(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = start(hostile.specs("length"))
    monkeypatch.setattr(rewards.pool.workers, "_judge", lambda *_: 1 // 0)
    pool.submit(0, Task("", ""), ["a"])
    with pytest.raises(ZeroDivisionError):
        pool.gather()


@pytest.mark.parametrize("form", hostile.FORMS)
def test_no_failure_is_a_score(start: Any, form: str) -> None:
    failures = ("raise", "nan", "string", "exit", "index_past_the_end", "hang")
    pool = start(hostile.specs(*failures, form=form), timeout_seconds=0.5)
    for index, behaviour in enumerate(failures):
        pool.submit(index, Task("", "", kind=behaviour), ["a", "bad", "bad", "ccc"])
    judged, metrics = pool.gather(), pool.metrics()
    for index, behaviour in enumerate(failures):
        assert scores(judged[index], behaviour) == [1.0, None, None, 3.0]
        assert metrics[f"reward/{behaviour}/mean"] == 2.0
        assert metrics[f"reward/{behaviour}/failure_rate"] == 0.5


def kill(worker: Any) -> None:
    """End an actor, and wait until it has ended."""
    ray.kill(worker)
    with pytest.raises(RayActorError):
        while True:
            ray.get(worker.alive.remote(), timeout=30)


def test_groups_of_killed_workers_are_judged_again(start: Any) -> None:
    pool = start(hostile.specs("length"), workers={"rule": 2})
    for groups in (1, 4):  # a lone group's second try must not go to the other dead worker
        for worker in list(pool._worker_groups["rule"]._workers):
            kill(worker)
        for index in range(groups):
            pool.submit(index, Task("", ""), ["a", "bb"])
        judged = pool.gather()
        assert [scores(judged[index], "length") for index in range(groups)] == [[1.0, 2.0]] * groups
        assert 1 <= pool.metrics()["reward_pool/rule/replaced"] <= 2


def test_a_reward_that_kills_its_worker_is_judged_again(start: Any, tmp_path: Path) -> None:
    pool = start(hostile.specs("kill_the_worker_once", "length"))
    pool.submit(0, Task("", str(tmp_path / "tried"), kind="kill_the_worker_once"), ["a", "bad"])
    pool.submit(1, Task("", "", kind="length"), ["a"])
    judged = pool.gather()
    assert scores(judged[0], "kill_the_worker_once") == [1.0, 0.25]
    assert scores(judged[1], "length") == [1.0]


def test_losing_two_workers_is_an_infra_error_and_never_a_score(start: Any) -> None:
    pool = start(hostile.specs("kill_the_worker", "length"))
    pool.submit(0, Task("", "", kind="kill_the_worker"), ["a", "bad"])
    pool.submit(1, Task("", "", kind="length"), ["a"])
    judged = pool.gather()
    assert [verdicts["kill_the_worker"].status for verdicts in judged[0]] == [Status.INFRA_ERROR] * 2
    assert "lost 2 reward workers" in judged[0][0]["kill_the_worker"].detail
    assert scores(judged[1], "length") == [1.0]
    assert pool.metrics()["reward_pool/rule/replaced"] == 2.0


def test_a_stopped_worker_is_replaced(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = start(hostile.specs("length"))
    [worker] = pool._worker_groups["rule"]._workers
    pid: Any = ray.get(worker.__ray_call__.remote(lambda _: os.getpid()), timeout=30)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(rewards.pool.workers, "_HEARTBEAT_SECONDS", 1.0)
    monkeypatch.setattr(rewards.pool.workers, "_ALIVE_SECONDS", 3.0)
    pool.submit(0, Task("", ""), ["abc"])
    assert scores(pool.gather()[0], "length") == [3.0]


def test_a_worker_that_judges_for_long_lives(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.pool.workers, "_HEARTBEAT_SECONDS", 0.2)
    pool = start(hostile.specs("slow", "pid"), timeout_seconds=60)
    pool.submit(0, Task("", ""), ["bad"])
    pool.submit(1, Task("", "", kind="pid"), ["bad"])
    judged = pool.gather()
    assert scores(judged[0], "slow") == [0.75]
    assert scores(judged[0], "pid") == scores(judged[1], "pid")  # the process outlives its thread's first task too
    assert pool.metrics()["reward_pool/rule/replaced"] == 0.0


def test_closing_does_not_wait_for_what_is_judged(start: Any, tmp_path: Path) -> None:
    pool = start(hostile.specs("hold"), timeout_seconds=3600)
    for index in range(3):
        pool.submit(index, Task("", str(tmp_path / "never")), ["bad"])
    pool.close()  # the verdicts would take an hour each, longer than a test may


def test_every_judge_that_asks_a_model_has_a_crew_of_its_own(start: Any) -> None:
    specs = [
        RewardSpec(name="pid", label=label, args={"pool": "model", "form": "batch"}) for label in ("helpful", "safety")
    ]
    pool = start(specs, workers={"helpful": 2})
    for index in range(4):
        pool.submit(index, Task("p", ""), ["bad", "abc"])
    judged = pool.gather()
    helpful, safety = ({scores(part, label)[0] for part in judged.values()} for label in ("helpful", "safety"))
    assert 1 <= len(helpful) <= 2 and len(safety) == 1 and not helpful & safety
    assert pool.metrics()["reward_pool/safety/latency_p50"] > 0
    with pytest.raises(ValueError, match=r"'rule' .*workers of its own"):
        start([RewardSpec(name="pid", label="rule", args={"pool": "model"})])


def test_gpus_that_are_not_there_are_refused(start: Any) -> None:
    [spec] = hostile.specs("pid", pool="model", gpus=0.5)
    with pytest.raises(ValueError, match=r"'pid'; .*lower reward_pool\.workers.*args\.gpus"):
        start([spec], workers={"pid": 2})
    start(hostile.specs("pid", pool="model", gpus=None)).close()  # one where there are any


def test_a_judge_that_hangs_ends_by_the_breaker_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(rewards.pool.workers, "BREAKER_WINDOW", 20)
    with judge_server() as server:
        args = {"url": server.url, "model": "m", "rubric": RUBRIC, "seconds": 1.0}
        config = RewardPoolConfig(workers={"judge": 2}, max_failure_rate=0.2)
        pool = RewardPool([RewardSpec(name="judge", args=args)], config)
        for index in range(6):
            pool.submit(index, Task("q", None, row=f"rows:{index}"), [f"hang {n}" for n in range(4)])
        with pytest.raises(RewardsUnavailable, match=r"(?s)'judge' .*timeout \(.* 1 s\)"):
            pool.gather()
        pool.close()
