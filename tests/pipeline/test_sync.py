"""A sync that went wrong stops the run: one stale expert in one layer is enough."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from configs.sampling import RolloutConfig, SyncConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.batch import Tree
from pipeline.errors import RunStopped
from pipeline.fleet import cluster, start_all, start_policy, start_rollout
from pipeline.models.fresh import create_model
from pipeline.sync import check_spoken, probe_gap, probe_sequences, prove, sync_weights
from pipeline.train.engine import TrainSpec
from pipeline.train.worker import Policy
from rollout.pool import RolloutPool

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

BOUNDS = SyncConfig()
PROBE = probe_sequences(264, BOUNDS.probe_prompts, 63)


@pytest.fixture(
    scope="module",
    params=[TrainerConfig(), TrainerConfig(num_ranks=2, zero_stage=3)],
    ids=["one rank", "two ranks, sharded weights"],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Policy, RolloutPool]]:
    model = create_model("tiny", 0, tmp_path_factory.mktemp("model") / "tiny")
    spec = TrainSpec(model, "float32", request.param, OptimizerConfig(learning_rate=1e-2), 100)
    config = RolloutConfig(max_model_len=64, kv_cache_gib=0.2)
    with (
        cluster(),
        start_all(lambda: start_policy(spec), lambda: start_rollout(model, config, dtype="float32", seed=0)) as (
            policy,
            rollout,
        ),
    ):
        yield policy, rollout


def train(policy: Policy, seed: int) -> None:
    trees = [Tree([1 + (seed + step * t) % 263 for t in range(40)], root_mask=[0] + [1] * 39) for step in (7, 11)]
    policy.update(policy.shard(trees), 78.0)


def on_engine(rollout: RolloutPool, change: Any) -> None:
    """Run `change(vllm's model)` inside the engine's process."""
    ray.get(
        [engine.__ray_call__.remote(lambda self: self._engine._llm.apply_model(change)) for engine in rollout._engines],
        timeout=60,
    )


def sync(pair: tuple[Policy, RolloutPool], version: int) -> dict[str, float]:
    return sync_weights(*pair, BOUNDS, probe=PROBE, version=version)


def test_fresh_and_after_updates_trainer_and_engine_agree(pair: tuple[Policy, RolloutPool]) -> None:
    for version in range(3):
        metrics = sync(pair, version)
        assert 0 < metrics["sync/gap_mean"] <= 1e-5 and metrics["sync/gap_max"] <= 1e-4
        train(pair[0], version)
    # without the sync they no longer do, so the agreement above was not for want of change
    assert probe_gap(*pair, PROBE)[0] > 1e-2
    with pytest.raises(RunStopped, match="not proven"):
        prove(*pair, BOUNDS, probe=PROBE, version=3)


@pytest.mark.parametrize(("layer", "expert"), [(1, 0), (2, 5), (3, 7)])
def test_one_stale_expert_of_one_layer_stops_the_run(pair: tuple[Policy, RolloutPool], layer: int, expert: int) -> None:
    """What a loader that skips one expert leaves behind: the rest is new, this one is from before the update."""
    sync(pair, 1)

    def keep(model: Any) -> None:
        experts = model.model.layers[layer].mlp.experts
        weight = next(p for name, p in experts.named_parameters() if name.endswith("w2_weight"))
        model.stale = weight[expert].clone()

    def put_back(model: Any) -> None:
        experts = model.model.layers[layer].mlp.experts
        weight = next(p for name, p in experts.named_parameters() if name.endswith("w2_weight"))
        weight.data[expert] = model.stale

    on_engine(pair[1], keep)
    train(pair[0], 11 * layer)
    sync(pair, 2)
    on_engine(pair[1], put_back)
    with pytest.raises(RunStopped, match=r"version 2 is not proven.*max_mean_gap"):
        prove(*pair, BOUNDS, probe=PROBE, version=2)
    assert sync(pair, 3)["sync/gap_mean"] <= 1e-5  # and a whole sync mends it


def test_a_tensor_damaged_on_the_way_stops_the_run(pair: tuple[Policy, RolloutPool]) -> None:
    policy, rollout = pair
    refs = policy.put_weights(1)
    bucket = ray.get(refs[1])
    damaged = [payload.copy() for payload in bucket.payloads]
    damaged[0][0] ^= 1
    refs[1] = ray.put(type(bucket)(bucket.records, damaged))

    class Damaging:
        def put_weights(self, _: int) -> list[Any]:
            return refs

    with pytest.raises(RunStopped, match=bucket.records[0].name.replace(".", r"\.")):
        sync_weights(Damaging(), rollout, BOUNDS, probe=PROBE, version=4)  # type: ignore[arg-type]
    sync(pair, 5)


def test_a_gap_on_sampled_tokens_stops_the_run() -> None:
    check_spoken({"mismatch/abs_mean": 9e-6}, BOUNDS, step=3)
    for gap in (2e-5, float("nan")):
        with pytest.raises(RunStopped, match=r"step 3.*sampled tokens"):
            check_spoken({"mismatch/abs_mean": gap}, BOUNDS, step=3)
