"""A sync that went wrong stops the run: one stale expert in one layer is enough."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import ray
import torch

from configs.sampling import RolloutConfig, SyncConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.batch import Tree
from pipeline.errors import RunStopped
from pipeline.fleet import cluster, start_all, start_policy, start_rollout
from pipeline.models.fresh import create_model
from pipeline.sync import check_spoken, probe_gap, probe_sequences, prove, sync_weights
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import Policy
from rollout.pool import RolloutPool
from rollout.weights import open_buckets, to_buckets

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

BOUNDS = SyncConfig()
PROBE = probe_sequences(264, max_model_len=64)


@pytest.fixture(
    scope="module",
    params=[
        TrainerConfig(threads=1),
        TrainerConfig(num_ranks=2, zero_stage=3, expert_parallel_size=2, threads=1),
    ],
    ids=["one rank", "two ranks, sharded weights and experts"],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Policy, RolloutPool]]:
    model = create_model("tiny", 0, tmp_path_factory.mktemp("model") / "tiny")
    spec = TrainSpec(model, "float32", request.param, OptimizerConfig(learning_rate=1e-3), 100)
    config = RolloutConfig(max_model_len=64, kv_cache_gib=0.2, threads=1)
    with (
        cluster(),
        start_all(lambda: start_policy(spec), lambda: start_rollout(model, config, dtype="float32", seed=0)) as (
            policy,
            rollout,
        ),
    ):
        yield policy, rollout


def train(policy: Policy, seed: int) -> None:
    """One large step on random tokens, so that every expert of every layer changes."""
    ids = np.random.default_rng(seed).integers(0, 264, (8, 64)).tolist()
    policy.update(policy.shard([Tree(row, root_mask=[0] + [1] * 63) for row in ids]), 504.0)


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
    assert probe_gap(*pair, PROBE)[0] > 1e-3
    with pytest.raises(RunStopped, match="not proven"):
        prove(*pair, BOUNDS, probe=PROBE, version=3)


def test_an_expert_that_is_another_speaks_differently(pair: tuple[Policy, RolloutPool]) -> None:
    """The probe alone: weights that are there and finite, but not the trainer's."""
    sync(pair, 1)
    on_engine(pair[1], partial(negate_expert, layer=2))
    with pytest.raises(RunStopped, match=r"version 1 .*max_mean_gap"):
        prove(*pair, BOUNDS, probe=PROBE, version=1)
    assert sync(pair, 2)["sync/gap_mean"] <= 1e-5  # a whole sync mends it


def negate_expert(model: Any, *, layer: int) -> None:
    """Flip the sign of the first expert's down projection, inside the engine."""
    experts = model.model.layers[layer].mlp.experts
    next(p for name, p in experts.named_parameters() if name.endswith("w2_weight")).data[0].neg_()


def test_a_tensor_damaged_on_the_way_stops_the_run(pair: tuple[Policy, RolloutPool]) -> None:
    policy, rollout = pair
    refs = policy.put_weights(1)
    bucket: Any = ray.get(refs[1])
    damaged = [payload.copy() for payload in bucket.payloads]
    damaged[0][0] ^= 1
    refs[1] = ray.put(type(bucket)(bucket.records, damaged))

    class Damaging:
        def put_weights(self, _: int) -> list[Any]:
            return refs

    with pytest.raises(RunStopped, match=bucket.records[0].name.replace(".", r"\.")):
        sync_weights(Damaging(), rollout, BOUNDS, probe=PROBE, version=4)  # type: ignore[arg-type]
    sync(pair, 5)


class Changing:
    """A policy that sends one tensor other than it is, with a checksum that fits: only what it means can tell."""

    def __init__(self, policy: Policy, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._policy, self._name, self._change = policy, name, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def put_weights(self, bucket_mib: int) -> list[Any]:
        buckets: Any = ray.get(self._policy.put_weights(bucket_mib))
        shapes = {record.name: record.shape for bucket in buckets for record in bucket.records}
        tensors = dict(open_buckets(buckets, shapes)[1])
        tensors[self._name] = self._change(tensors[self._name])
        return [ray.put(bucket) for bucket in to_buckets(tensors.items(), bucket_mib)]


ON_THE_WAY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mlp.gate.weight": lambda weight_ED: weight_ED.roll(1, 0),
    "mlp.gate.e_score_correction_bias": lambda bias_E: bias_E + torch.arange(len(bias_E)),
    "self_attn.q_a_proj.weight": torch.neg,
    "self_attn.kv_a_proj_with_mqa.weight": torch.neg,
    "self_attn.kv_b_proj.weight": torch.neg,
}
"""What DeepSeek's models have that others don't, each made wrong in one layer."""


def test_a_wrong_router_bias_or_latent_projection_stops_the_run(pair: tuple[Policy, RolloutPool]) -> None:
    policy, rollout = pair
    for name, change in ON_THE_WAY.items():
        changing: Any = Changing(policy, f"model.layers.1.{name}", change)
        with pytest.raises(RunStopped, match=r"not proven.*max_mean_gap"):
            sync_weights(changing, rollout, BOUNDS, probe=PROBE, version=6)
    sync(pair, 7)


class Off:
    """An engine that says of the first `sequences` of the whole probe one token by 0.4 nats less."""

    def __init__(self, sequences: int) -> None:
        self._off = PROBE[:sequences]

    def prompt_logprobs(self, sequences: list[list[int]]) -> list[list[np.ndarray]]:
        return [[np.array([-1.0, -1.4 if ids in self._off else -1.0]) for ids in sequences]]


class Sure:
    """A policy that gives every token e^-1."""

    def sequence_logprobs(self, trees: list[Tree]) -> list[np.ndarray]:
        return [np.array([-1.0, -1.0]) for _ in trees]


def test_a_tie_on_one_half_of_the_probe_proves_nothing_against_an_engine() -> None:
    policy: Any = Sure()
    tied, wrong = Off(1), Off(len(PROBE))
    assert prove(policy, tied, BOUNDS, probe=PROBE, version=1) == {"sync/gap_mean": 0, "sync/gap_max": 0}  # type: ignore[arg-type]
    with pytest.raises(RunStopped, match=r"both halves.*4\.00e-01 at most"):
        prove(policy, wrong, BOUNDS, probe=PROBE, version=1)  # type: ignore[arg-type]


def test_a_gap_on_sampled_tokens_stops_the_run() -> None:
    """But not one of a single sequence, as a router's tie makes."""

    def check(mean: float, of_one_sequence: float) -> None:
        metrics = {"mismatch/abs_mean": mean, "mismatch/sequence_max": of_one_sequence}
        check_spoken(metrics, 1000, BOUNDS, step=3)

    check(9e-6, 0.0)
    check(0.46 / 1000 + 9e-6, 0.46)
    for mean, of_one_sequence in ((2e-5, 0.0), (0.46 / 1000 + 2e-5, 0.46), (float("nan"), 0.0)):
        with pytest.raises(RunStopped, match=r"step 3.*sampled tokens"):
            check(mean, of_one_sequence)


def test_one_stale_expert_of_one_layer_stops_the_run(pair: tuple[Policy, RolloutPool]) -> None:
    """A loader that skips one expert of one layer, as vendors' loaders have done. Last: vLLM is broken after it."""
    sync(pair, 8)
    on_engine(pair[1], partial(skip_in_loading, name="model.layers.2.mlp.experts.5.down_proj.weight"))
    train(pair[0], 2)
    with pytest.raises(RunStopped, match=r"version 9 .*max_mean_gap"):
        sync(pair, 9)


def skip_in_loading(model: Any, *, name: str) -> None:
    """Break the model's loader, inside the engine."""
    whole = type(model).load_weights
    model.load_weights = lambda weights: whole(model, ((n, weight) for n, weight in weights if n != name))
