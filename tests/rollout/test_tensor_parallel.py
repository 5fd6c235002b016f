"""An engine of two processes, each with half of every matrix: it samples as transformers computes, as the seed says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from configs.sampling import SamplingConfig
from pipeline.cluster.room import quoted_interpreter
from pipeline.cluster.start import start_rollout
from rollout.device import DeviceError
from rollout.pool import RolloutPool
from rollout.types import Group, SyncError
from rollout.weights import Bucket
from tests.rollout import tiny
from tests.rollout.pools import whole
from tests.rollout.tiny import CONFIG, PROMPTS

pytestmark = pytest.mark.engine

FIRST, SECOND = tiny.moe(0), tiny.moe(1)
HALVES = CONFIG.model_copy(update={"tensor_parallel_size": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(FIRST, tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RolloutPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MLA_DISABLE", "0")  # over the latent cache, whose absorbed matrices are redone after a sync
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
        pool = RolloutPool(folder, HALVES, "float32", seed=0)
        yield pool
        pool.close()
        ray.shutdown()


def generate(pool: RolloutPool, seed: int) -> list[Group]:
    groups = pool.generate(PROMPTS[:2], SamplingConfig(max_tokens=8), 2, seed)
    return sorted(map(whole, groups), key=lambda group: group.index)


def send(buckets: list[Bucket]) -> Iterator[list["ray.ObjectRef[Bucket]"]]:
    return ([ray.put(bucket)] for bucket in buckets)


def test_it_agrees_with_transformers_and_repeats_its_seed(pool: RolloutPool) -> None:
    first = generate(pool, 1)
    assert tiny.within_bounds(tiny.rollout_gap(FIRST, first))
    assert generate(pool, 2) != first
    assert generate(pool, 1) == first


def test_a_sync_reaches_both_processes(pool: RolloutPool, tmp_path: Path) -> None:
    buckets = tiny.buckets(tiny.weights(tiny.save(SECOND, tmp_path / "second")))
    received = pool.load_weights(send(buckets), version=1)
    assert received.records == [record for bucket in buckets for record in bucket.records]
    assert tiny.within_bounds(tiny.prompt_gap(SECOND, pool.prompt_logprobs(PROMPTS)[0]))


def test_damage_that_a_worker_finds_is_named_and_nothing_is_generated(pool: RolloutPool, folder: Path) -> None:
    weights = tiny.weights(folder)
    damaged = tiny.buckets({name: tensor.clone() for name, tensor in weights.items()})
    damaged[-1].payloads[0][0] ^= 1
    with pytest.raises(SyncError, match=f"'{damaged[-1].records[0].name}': checksum"):
        pool.load_weights(send(damaged), version=2)
    with pytest.raises(DeviceError, match="partly old"):
        generate(pool, 1)
    pool.load_weights(send(tiny.buckets(weights)), version=3)
    assert tiny.within_bounds(tiny.prompt_gap(FIRST, pool.prompt_logprobs(PROMPTS)[0]))


def test_routes_of_several_processes_are_refused(pool: RolloutPool, folder: Path) -> None:
    """Each has its own router, and none of them a way to the driver."""
    with pytest.raises(ValueError, match=r"rollout\.tensor_parallel_size=2: .*set it to 1"):
        start_rollout(folder, HALVES, dtype="float32", seed=0, with_routes=True)
