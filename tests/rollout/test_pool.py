"""The pool on a real Ray, with real engines: the same answers as an engine here, and failures that name the engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from configs.sampling import SamplingConfig
from pipeline.cluster.room import quoted_interpreter
from rollout.device import DeviceError, DeviceState
from rollout.pool import RolloutError, RolloutPool
from rollout.types import SyncError
from tests.rollout import tiny
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


def test_two_engines_speak_as_one(pool: RolloutPool) -> None:
    """Each answers half of the prompts, with the same ids and log-probabilities as one that answers them all."""
    groups = {group.index: group for group in pool.generate(PROMPTS, SAMPLING, 4, seed=7)}
    alone = pool._engines[1].generate.options(num_returns="streaming").remote(PROMPTS, SAMPLING, 4, 7)
    assert {group.index: group for group in map(ray.get, alone)} == groups
    assert {group.index: group for group in pool.generate(PROMPTS, SAMPLING, 4, seed=8)} != groups
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


def test_a_lost_engine_is_named(pool: RolloutPool, folder: Path) -> None:
    """No call follows the error, so that the cause itself is raised."""
    sampling = SamplingConfig(max_tokens=100, ignore_eos=True)
    pool.to(DeviceState.WEIGHTS)
    pool.load_weights([[ray.put(bucket)] for bucket in tiny.buckets(tiny.weights(folder))], version=7)
    pool.to(DeviceState.AWAKE)
    with pytest.raises(RolloutError, match="engine 1 was lost"):
        stream = pool.generate(PROMPTS, sampling, 8, seed=0)
        ray.kill(pool._engines[1])
        list(stream)


def test_a_late_engine_is_named(pool: RolloutPool, folder: Path) -> None:
    with pytest.raises(RolloutError, match=r"engine 0: .*raise rollout\.timeout_seconds"):
        RolloutPool(folder, CONFIG.model_copy(update={"timeout_seconds": 0.5}), "float32", seed=0)
