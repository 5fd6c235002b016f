"""A faulty weight sync stops the run: one stale expert in one layer is enough."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import ray
import torch

from configs.sampling import RolloutConfig, SyncConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.cluster.room import cluster
from pipeline.cluster.start import start_all, start_ranks, start_rollout
from pipeline.data.trees import Tree
from pipeline.errors import RunStopped
from pipeline.grpo.sync import (
    MARGINS,
    Gap,
    expect,
    probe_sequences,
    prove,
    refuse_mismatch,
    scaled_margins,
    sync_weights,
)
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from pipeline.weights.fresh import create_model
from rollout.device import DeviceState
from rollout.pool import RolloutPool
from rollout.weights import open_buckets, to_buckets

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

MEASURED = SyncConfig()
GIVEN = SyncConfig(max_mean_gap=1e-5, max_gap=1e-4)
PROBE = probe_sequences(264, max_model_len=64)


@pytest.fixture(
    scope="module",
    params=[
        (TrainerConfig(threads=1), {}),
        (TrainerConfig(threads=1), {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
        (TrainerConfig(num_ranks=2, zero_stage=3, expert_parallel_size=2, threads=1), {}),
    ],
    ids=["one rank", "one rank, AVX2 at most", "two ranks, sharded weights and experts"],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TrainingRanks, RolloutPool]]:
    trainer, instructions = request.param
    model = create_model("tiny", 0, tmp_path_factory.mktemp("model") / "tiny")
    spec = TrainSpec(model, "float32", trainer, OptimizerConfig(learning_rate=1e-3), 100)
    config = RolloutConfig(max_model_len=64, kv_cache_gib=0.2, threads=1)
    with (
        instruction_set(instructions),
        cluster(),
        start_all(lambda: start_ranks(spec), lambda: start_rollout(model, config, dtype="float32", seed=0)) as (
            policy,
            rollout,
        ),
    ):
        yield policy, rollout


@contextmanager
def instruction_set(variables: dict[str, str]) -> Iterator[None]:
    """Processes that start in the block compute with the instructions that these environment variables leave."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def train(policy: TrainingRanks, seed: int) -> None:
    """One large step on random tokens, so that every expert of every layer changes."""
    policy.to(DeviceState.AWAKE)
    ids = np.random.default_rng(seed).integers(0, 264, (8, 64)).tolist()
    policy.update(policy.shard([Tree(row, root_mask=[0] + [1] * 63) for row in ids]), 504.0)


def on_engine(rollout: RolloutPool, change: Any) -> None:
    """Run `change(vllm's model)` inside the engine's process."""
    ray.get(
        [engine.__ray_call__.remote(lambda self: self._engine._llm.apply_model(change)) for engine in rollout._engines],
        timeout=60,
    )


def sync(pair: tuple[TrainingRanks, RolloutPool], version: int) -> dict[str, float]:
    return send(*pair, version)


def send(policy: TrainingRanks, rollout: RolloutPool, version: int) -> dict[str, float]:
    """Do a sync as between two steps. Afterwards the ranks hold their weights again, to be compared."""
    rollout.to(DeviceState.ASLEEP)
    metrics = sync_weights(policy, rollout, MEASURED, probe=PROBE, version=version)
    policy.to(DeviceState.WEIGHTS)
    return metrics


def test_fresh_and_after_updates_trainer_and_engine_agree(pair: tuple[TrainingRanks, RolloutPool]) -> None:
    for version in range(3):
        metrics = sync(pair, version)
        assert 0 < metrics["sync/gap_mean"] <= metrics["sync/bound_mean"] / 2
        assert metrics["sync/gap_max"] <= metrics["sync/bound_max"] / 2
        train(pair[0], version)
    # without the sync they no longer do, so the agreement above was not for want of change
    with pytest.raises(RunStopped, match="not proven"):
        prove(expect(pair[0], MEASURED, PROBE), pair[1], MEASURED, version=3)


def test_a_resumed_run_has_the_same_bound(
    pair: tuple[TrainingRanks, RolloutPool],
) -> None:
    first, again = sync(pair, 3), sync(pair, 4)
    assert [first[name] for name in BOUND] == [again[name] for name in BOUND]
    train(pair[0], 3)
    assert [sync(pair, 5)[name] for name in BOUND] != [first[name] for name in BOUND]


BOUND = ("sync/bound_mean", "sync/bound_max")


def test_an_expert_that_is_another_speaks_differently(pair: tuple[TrainingRanks, RolloutPool]) -> None:
    """The probe alone: weights that are there and finite, but not the trainer's."""
    sync(pair, 1)
    on_engine(pair[1], partial(negate_expert, layer=2))
    with pytest.raises(RunStopped, match=r"version 1 is not proven.*max_mean_gap"):
        prove(expect(pair[0], MEASURED, PROBE), pair[1], MEASURED, version=1)
    sync(pair, 2)  # a whole sync mends it


def negate_expert(model: Any, *, layer: int) -> None:
    """Flip the sign of the first expert's down projection, inside the engine."""
    experts = model.model.layers[layer].mlp.experts
    next(p for name, p in experts.named_parameters() if name.endswith("w2_weight")).data[0].neg_()


def test_a_tensor_damaged_on_the_way_stops_the_run(pair: tuple[TrainingRanks, RolloutPool]) -> None:
    policy, rollout = pair
    refs = policy.put_weights(1)
    bucket: Any = ray.get(refs[1])
    damaged = [payload.copy() for payload in bucket.payloads]
    damaged[0][0] ^= 1
    refs[1] = ray.put(type(bucket)(bucket.records, damaged))

    class Damaging:
        to = policy.to

        def put_weights(self, _: int) -> list[Any]:
            return refs

    with pytest.raises(RunStopped, match=bucket.records[0].name.replace(".", r"\.")):
        send(Damaging(), rollout, 4)  # type: ignore[arg-type]
    sync(pair, 5)


class Changing:
    """A policy that sends one tensor other than it is, with a checksum that fits: only what it means can tell."""

    def __init__(self, policy: TrainingRanks, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
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
"""Parts that only DeepSeek's models have, each made wrong in one layer."""


def test_a_wrong_router_bias_or_latent_projection_stops_the_run(pair: tuple[TrainingRanks, RolloutPool]) -> None:
    policy, rollout = pair
    for name, change in ON_THE_WAY.items():
        changing: Any = Changing(policy, f"model.layers.1.{name}", change)
        with pytest.raises(RunStopped, match=r"not proven.*max_mean_gap"):
            send(changing, rollout, 6)
    sync(pair, 7)


class Off:
    """An engine that says of the first `sequences` of the whole probe one token by 0.4 nats less."""

    def __init__(self, sequences: int) -> None:
        self._off = PROBE[:sequences]

    def prompt_logprobs(self, sequences: list[list[int]]) -> list[list[np.ndarray]]:
        return [[np.array([-1.0, -1.4 if ids in self._off else -1.0]) for ids in sequences]]


class Sure:
    """A policy that gives every token e^-1, give or take `rounding`."""

    def __init__(self, rounding: float) -> None:
        self._rounding = rounding

    def sequence_logprobs(self, trees: list[Tree]) -> list[np.ndarray]:
        return [np.array([-1.0, -1.0]) for _ in trees]

    def perturbed_sequence_logprobs(self, trees: list[Tree]) -> list[np.ndarray]:
        return [np.array([-1.0 - self._rounding, -1.0]) for _ in trees]


def test_a_tie_on_one_half_of_the_probe_proves_nothing_against_an_engine() -> None:
    policy: Any = Sure(1e-7)
    tied, wrong = Off(1), Off(len(PROBE))
    for config in (GIVEN, MEASURED):
        figures = prove(expect(policy, config, PROBE), tied, config, version=1)  # type: ignore[arg-type]
        assert figures["sync/gap_mean"] == figures["sync/gap_max"] == 0
        with pytest.raises(RunStopped, match=r"both halves.*4\.00e-01 at most"):
            prove(expect(policy, config, PROBE), wrong, config, version=1)  # type: ignore[arg-type]


def test_bounds_are_the_given_ones_or_follow_the_policys_own_rounding() -> None:
    coarse: Any = Sure(0.08)  # 16 times its rounding at most, 6 times in the mean
    engine: Any = Off(len(PROBE))
    figures = prove(expect(coarse, MEASURED, PROBE), engine, MEASURED, version=1)
    assert figures["sync/bound_max"] == pytest.approx(1.28) and figures["sync/bound_mean"] == pytest.approx(0.24)
    given = SyncConfig(max_mean_gap=1.0)
    assert prove(expect(coarse, given, PROBE), engine, given, version=1)["sync/bound_mean"] == 1.0
    with pytest.raises(RunStopped, match=r"max_gap=1\.0e-04\)"):
        narrow = SyncConfig(max_gap=1e-4)
        prove(expect(coarse, narrow, PROBE), engine, narrow, version=1)


class Apart:
    """An engine that gives the first token of each sequence `gap` nats less than `Sure`."""

    def __init__(self, gap: float) -> None:
        self._gap = gap

    def prompt_logprobs(self, sequences: list[list[int]]) -> list[list[np.ndarray]]:
        return [[np.array([-1.0 - self._gap, -1.0]) for _ in sequences]]


def test_the_gap_of_the_first_sync_is_the_scale_of_later_ones() -> None:
    policy: Any = Sure(0.1)

    def figures(gap: float, margins: Gap = MARGINS) -> dict[str, float]:
        engine: Any = Apart(gap)
        return prove(expect(policy, MEASURED, PROBE, margins), engine, MEASURED, version=1, margins=margins)

    margins = scaled_margins(figures(0.05))
    assert margins == pytest.approx((1, 16))  # twice half of the rounding
    assert figures(0.09, margins)["sync/bound_mean"] == pytest.approx(0.05)
    assert figures(0.2)["sync/gap_mean"] == pytest.approx(0.1)  # the default margins allow it
    with pytest.raises(RunStopped, match=r"1\.00e-01 nats .*max_mean_gap=5\.0e-02, 1 times"):
        figures(0.2, margins)
    assert scaled_margins(figures(1e-9)) == (0.5, 16)
    assert scaled_margins(figures(0.5)) == (6, 16)


def test_half_of_the_probe_is_the_runs_own_text() -> None:
    text = list(range(7)) * 100
    sequences = probe_sequences(264, max_model_len=64, text=text)
    assert [token for ids in sequences[1::2] for token in ids] == text[: 8 * 63]
    assert sequences[::2] == PROBE[::2]
    few = probe_sequences(264, max_model_len=64, text=text[:100])
    assert [a == b for a, b in zip(few, PROBE, strict=True)] == [True, False] + [True] * 14


def test_a_policy_that_is_no_number_proves_nothing() -> None:
    policy: Any = Sure(float("nan"))
    engine: Any = Off(0)
    with pytest.raises(RunStopped, match="not proven"):
        prove(expect(policy, MEASURED, PROBE), engine, MEASURED, version=1)


def test_a_gap_on_sampled_tokens_stops_the_run() -> None:
    """The difference of a single sequence, as from a router's tie, is allowed."""

    def check(mean: float, of_one_sequence: float) -> None:
        metrics = {"mismatch/abs_mean": mean, "mismatch/sequence_max": of_one_sequence}
        refuse_mismatch(metrics, 1000, 1e-5, step=3)

    check(9e-6, 0.0)
    check(0.46 / 1000 + 9e-6, 0.46)
    for mean, of_one_sequence in ((2e-5, 0.0), (0.46 / 1000 + 2e-5, 0.46), (float("nan"), 0.0)):
        with pytest.raises(RunStopped, match=r"step 3.*sampled tokens"):
            check(mean, of_one_sequence)


def test_one_stale_expert_of_one_layer_stops_the_run(pair: tuple[TrainingRanks, RolloutPool]) -> None:
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
