"""The pool on a real Ray, with real engines: the same answers as an engine here, and failures that name the engine."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from configs.sampling import SamplingConfig
from pipeline.cluster.room import quoted_interpreter
from rollout.actors import RolloutError
from rollout.device import DeviceError, DeviceState
from rollout.pool import RolloutPool
from rollout.queue import GenerationQueue
from rollout.types import Completion, Group, SyncError
from tests.rollout import tiny
from tests.rollout.pools import whole
from tests.rollout.tiny import CONFIG, PROMPTS

pytestmark = pytest.mark.engine

SAMPLING = SamplingConfig(max_tokens=24)
FIRST, SECOND = tiny.moe(0), tiny.moe(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(FIRST, tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RolloutPool]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
    pool = RolloutPool(folder, CONFIG.model_copy(update={"num_engines": 2}), "float32", seed=0)
    yield pool
    pool.close()
    ray.shutdown()


def sync(pool: RolloutPool, folder: Path, version: int) -> None:
    """Send the checkpoint's weights, as a stage does where ranks and engines share devices."""
    pool.to(DeviceState.ASLEEP)
    pool.to(DeviceState.WEIGHTS)
    pool.load_weights([[ray.put(bucket)] for bucket in tiny.buckets(tiny.weights(folder))], version=version)
    pool.to(DeviceState.AWAKE)


def sampled(pool: RolloutPool, seed: int, sampling: SamplingConfig = SAMPLING, count: int = 4) -> dict[int, Group]:
    """The groups of PROMPTS, by their index."""
    return {group.index: whole(group) for group in pool.generate(PROMPTS, sampling, count, seed)}


def sampled_by_one(pool: RolloutPool, seed: int, sampling: SamplingConfig = SAMPLING) -> dict[int, Group]:
    """The groups of PROMPTS as engine 1 samples them alone."""
    queue = GenerationQueue[Completion](num_engines=1)
    ticket = queue.add(PROMPTS, sampling, 4, seed)
    queue.receive(0, ray.get(pool._engines[1].call.remote("advance", queue.take(0, 16), 600.0)))
    groups, is_last = queue.pop(ticket)
    assert is_last
    return {group.index: group for group in groups}


def test_two_engines_speak_as_one(pool: RolloutPool) -> None:
    """Each answers a part of the prompts, with the same ids and log-probabilities as one that answers them all."""
    groups = sampled(pool, 7)
    assert sampled_by_one(pool, 7) == groups
    assert sampled(pool, 8) != groups
    assert sorted(groups) == [0, 1, 2, 3]
    assert [groups[index].prompt_ids for index in range(4)] == PROMPTS
    assert tiny.within_bounds(tiny.rollout_gap(FIRST, list(groups.values())))
    assert pool.metrics()["rollout/tokens_per_second"] > 0


def test_a_sync_reaches_every_engine(pool: RolloutPool, tmp_path: Path) -> None:
    buckets = tiny.buckets(tiny.weights(tiny.save(SECOND, tmp_path / "second")))
    refs = [[ray.put(bucket)] for bucket in buckets]
    pool.to(DeviceState.ASLEEP)
    pool.to(DeviceState.WEIGHTS)
    with pytest.raises(DeviceError, match=r"rollout engine 0 .* call `load_weights`"):
        pool.to(DeviceState.AWAKE)
    manifest = pool.load_weights(refs, version=5).records
    pool.to(DeviceState.AWAKE)
    per_engine = pool.prompt_logprobs(PROMPTS)
    [group] = pool.generate(PROMPTS[:1], SAMPLING, 2, seed=0)
    assert manifest == [record for bucket in buckets for record in bucket.records]
    assert len(per_engine) == 2
    assert all(tiny.within_bounds(tiny.prompt_gap(SECOND, answers)) for answers in per_engine)
    assert {completion.policy_version for completion in group.completions} == {5}


def test_what_an_engine_raises_comes_through(pool: RolloutPool, folder: Path) -> None:
    with pytest.raises(ValueError, match="prompt 0 has 137 tokens"):
        list(pool.generate([[1] * 137], SAMPLING, 1, seed=0))
    with pytest.raises(SyncError, match="did not arrive"):
        pool.load_weights([], version=6)
    with pytest.raises(DeviceError, match="partly old"):
        list(pool.generate(PROMPTS[:1], SAMPLING, 1, seed=0))
    pool.load_weights([[ray.put(bucket)] for bucket in tiny.buckets(tiny.weights(folder))], version=7)
    pool.to(DeviceState.ASLEEP)
    with pytest.raises(DeviceError, match="rollout engine 0 is in state 'asleep'"):
        pool.prompt_logprobs(PROMPTS)


def test_a_stopped_engine_is_called_so(pool: RolloutPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = ray.get(pool._engines[1].__ray_call__.remote(lambda _: os.getpid()))
    monkeypatch.setattr(pool, "_config", CONFIG.model_copy(update={"timeout_seconds": 2}))
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RolloutError, match=rf"engine 1 \(process {pid} on \S+, stopped\): .* for 2 s; raise"):
            pool.to(DeviceState.ASLEEP)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_lost_engine_is_replaced_and_its_work_continued(
    pool: RolloutPool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as the kernel does it. The completions are those of an engine that lives, long ones too: what was begun is
    continued where its tokens are known, and else begun anew with the same seeds."""
    sampling = SamplingConfig(max_tokens=100)
    sync(pool, folder, version=7)
    unharmed = sampled(pool, 3, sampling, 16)
    pid = ray.get(pool._engines[0].__ray_call__.remote(lambda _: os.getpid()))
    monkeypatch.setattr("rollout.pull.SLICE_SECONDS", 0.0)
    monkeypatch.setattr("rollout.pull.REPORT_SECONDS", 0.0)
    pool.restore = lambda: sync(pool, folder, version=7)
    stream = pool.generate(PROMPTS, sampling, 16, seed=3)
    groups = [whole(next(stream))]
    assert pool._queue.is_busy(0)
    os.kill(pid, signal.SIGKILL)
    groups += map(whole, stream)
    assert {group.index: group.prompt_ids for group in groups} == {i: PROMPTS[i] for i in range(4)}
    for group in groups:
        for completion, other in zip(group.completions, unharmed[group.index].completions, strict=True):
            assert completion.token_ids == other.token_ids
            assert completion.policy_version == 7 and not completion.updates
            assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert tiny.within_bounds(tiny.rollout_gap(FIRST, groups))
    metrics = pool.metrics()
    assert metrics["rollout/replaced_engines"] == 1 and metrics["rollout/continued_tokens"] > 0


def test_more_lost_engines_than_are_replaced_are_named(pool: RolloutPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_config", CONFIG.model_copy(update={"max_replacements": pool.num_replaced}))
    with pytest.raises(RolloutError, match=r"engine 1 was lost(.|\n)*rollout\.max_replacements="):
        stream = pool.generate(PROMPTS, SamplingConfig(max_tokens=100, ignore_eos=True), 8, seed=0)
        ray.kill(pool._engines[1])
        list(stream)


def test_a_late_engine_is_named(pool: RolloutPool, folder: Path) -> None:
    with pytest.raises(RolloutError, match=r"engine 0 \(.*\): .* start .*raise rollout\.start_timeout_seconds"):
        RolloutPool(folder, CONFIG.model_copy(update={"start_timeout_seconds": 0.5}), "float32", seed=0)
