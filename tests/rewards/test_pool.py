"""The pool on a real Ray: results, failures, lost and stopped workers."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray

import rewards.pool
from configs.rewards import RewardPoolConfig
from rewards.pool import RewardPool, RewardWorker
from rewards.types import RewardsUnavailable, Status, Task
from tests.rewards import hostile


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def hostile_pool(*names: str, **config: float) -> RewardPool:
    settings = RewardPoolConfig(**{"timeout_seconds": 1.0, "max_failure_rate": 1.0, **config})
    return RewardPool(hostile.specs(*names), settings, build=hostile.build)


def scores(judged: list[dict[str, rewards.pool.Verdict]], name: str) -> list[float | None]:
    return [verdicts[name].score for verdicts in judged]


def test_worker_without_ray() -> None:
    worker = RewardWorker(hostile.specs("length", "raise"), 1.0, hostile.build)
    worker.start()
    [first, second] = worker.judge(Task("", ""), ["a", "bb"], ["length", "raise"])
    assert (first["length"].score, second["length"].score) == (1.0, 2.0)
    assert first["raise"].status is Status.INFRA_ERROR


def test_groups_come_back_by_index_with_the_rewards_that_apply() -> None:
    pool = hostile_pool("length", "abstain", num_workers=2)
    pool.submit(7, Task("p", "", kind="length"), ["a", "bb", "ccc"])
    pool.submit(3, Task("p", ""), ["dddd"])
    pool.submit(5, Task("p", "", kind="abstain"), [])
    judged = pool.gather()
    assert sorted(judged) == [3, 5, 7]
    assert scores(judged[7], "length") == [1.0, 2.0, 3.0]
    assert all(set(verdicts) == {"length"} for verdicts in judged[7])
    assert set(judged[3][0]) == {"length", "abstain"}
    assert judged[5] == []
    metrics = pool.metrics()
    assert metrics["reward/length/mean"] == pytest.approx(2.5)
    assert metrics["reward/length/pass_rate"] == 1.0
    assert metrics["reward/abstain/abstain_rate"] == 1.0
    assert metrics["reward/length/failure_rate"] == 0.0
    assert pool.metrics() == {}
    assert pool.gather() == {}
    pool.close()


def test_math_by_its_own_name() -> None:
    pool = RewardPool(hostile.specs("math"), RewardPoolConfig())
    pool.submit(0, Task("What is 6 * 7?", "42"), [r"\boxed{42}", r"\boxed{6 \cdot 7}", "43"])
    assert scores(pool.gather()[0], "math") == [1.0, 0.0, 0.0]
    pool.close()


def test_submit_does_not_wait() -> None:
    pool = hostile_pool("hang", timeout_seconds=0.5)
    began = time.monotonic()
    pool.submit(0, Task("", ""), ["a"])
    assert time.monotonic() - began < 0.5
    [verdicts] = pool.gather()[0]
    assert verdicts["hang"].status is Status.TIMEOUT
    pool.close()


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown behaviour 'politeness'"):
        hostile_pool("politeness")
    with pytest.raises(ValueError, match="once"):
        hostile_pool("length", "length")
    pool = hostile_pool("length")
    with pytest.raises(ValueError, match=r"'lenght'.*configured: length"):
        pool.submit(0, Task("", "", kind="lenght", row="row-1"), ["a"])
    pool.submit(0, Task("", ""), ["a"])
    with pytest.raises(ValueError, match="twice"):
        pool.submit(0, Task("", ""), ["a"])
    pool.close()


def test_the_breaker_stops_the_run() -> None:
    pool = hostile_pool("raise", "length", max_failure_rate=0.2, breaker_window=10)
    pool.submit(0, Task("", "", row="gsm8k:17"), ["a"] * 6)
    with pytest.raises(RewardsUnavailable, match=r"(?s)'raise'.*gsm8k:17.*ZeroDivisionError"):
        pool.gather()
    pool.close()


def test_groups_of_a_killed_actor_are_judged_again() -> None:
    pool = hostile_pool("length", "once", num_workers=2)
    for index in range(4):
        pool.submit(index, Task("", "", kind="length"), ["a", "bb"])
    ray.kill(pool._lanes[0].worker)
    for index in range(4, 8):
        pool.submit(index, Task("", "", kind="length"), ["a", "bb"])
    judged = pool.gather()
    assert sorted(judged) == list(range(8))
    assert all(scores(group, "length") == [1.0, 2.0] for group in judged.values())
    ray.kill(pool._lanes[1].worker)  # idle this time
    pool.submit(0, Task("", "", kind="length"), ["a"])
    pool.submit(1, Task("", "", kind="length"), ["a"])
    assert scores(pool.gather()[1], "length") == [1.0]
    pool.close()


def test_a_stopped_actor_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.pool, "START_SECONDS", 0.5)
    monkeypatch.setattr(rewards.pool, "_MARGIN_SECONDS", 1.0)
    pool = hostile_pool("length", timeout_seconds=0.5)
    pid = ray.get(pool._lanes[0].worker.__ray_call__.remote(lambda _: os.getpid()), timeout=30)
    os.kill(pid, signal.SIGSTOP)
    pool.submit(0, Task("", ""), ["abc"])
    assert scores(pool.gather()[0], "length") == [3.0]
    pool.close()


def test_losing_two_actors_is_an_infra_error_and_never_a_score() -> None:
    pool = hostile_pool("hang", "length", timeout_seconds=60)
    pool.submit(0, Task("", "", kind="hang"), ["a", "b"])
    pool.submit(1, Task("", "", kind="length"), ["a"])
    replace = pool._replace

    def replace_and_kill_again(lane: rewards.pool._Lane, reason: str) -> None:
        replace(lane, reason)
        if lane.jobs and lane.jobs[0].index == 0:
            ray.kill(lane.worker)

    pool._replace = replace_and_kill_again
    ray.kill(pool._lanes[0].worker)
    judged = pool.gather()
    assert [verdicts["hang"].status for verdicts in judged[0]] == [Status.INFRA_ERROR] * 2
    assert "lost 2 reward workers" in judged[0][0]["hang"].detail
    assert scores(judged[1], "length") == [1.0]
    pool.close()
