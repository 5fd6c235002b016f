"""In bfloat16 the first sync's gap is the scale, so wrong experts that the default bounds accept stop a run."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.sampling import RolloutConfig, SyncConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.cluster.room import cluster
from pipeline.cluster.start import start_all, start_ranks, start_rollout
from pipeline.data.trees import Tree
from pipeline.errors import RunStopped
from pipeline.grpo.sync import MARGINS, Gap, expect, halves, probe_sequences, prove, scaled_margins, sync_weights
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from pipeline.weights.fresh import create_model
from rollout.device import DeviceState
from rollout.pool import RolloutPool
from tests.pipeline.test_sync import on_engine

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

CONFIG = SyncConfig()


def sums(seed: int) -> list[int]:
    """62 tokens and more of additions with their results."""
    digits = np.random.default_rng(seed).integers(10, 99, (8, 2)).tolist()
    text = " ".join(f"{a}+{b}={a + b}" for a, b in digits)
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


PROBE = probe_sequences(264, max_model_len=64, text=[token for seed in range(12) for token in sums(seed)])
Trained = tuple[TrainingRanks, RolloutPool, Gap]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Ranks and engines in bfloat16 after forty updates on sums, with the margins of their first sync."""
    model: Path = create_model("tiny", 0, tmp_path_factory.mktemp("model") / "tiny")
    spec = TrainSpec(model, "bfloat16", TrainerConfig(threads=1), OptimizerConfig(learning_rate=2e-3), 100)
    config = RolloutConfig(max_model_len=64, kv_cache_gib=0.2, threads=1)
    starts = (lambda: start_ranks(spec), lambda: start_rollout(model, config, dtype="bfloat16", seed=0))
    with cluster(), start_all(*starts) as (policy, rollout):
        margins = scaled_margins(send(policy, rollout, 0, MARGINS))
        train(policy, range(40))
        yield policy, rollout, margins


def train(policy: TrainingRanks, steps: range) -> None:
    policy.to(DeviceState.AWAKE)
    for step in steps:
        rows = [sums(100 + 16 * step + row)[:63] for row in range(16)]
        policy.update(policy.shard([Tree(ids, root_mask=[0] + [1] * (len(ids) - 1)) for ids in rows]), 16 * 62.0)


def send(policy: TrainingRanks, rollout: RolloutPool, version: int, margins: Gap) -> dict[str, float]:
    rollout.to(DeviceState.ASLEEP)
    figures = sync_weights(policy, rollout, CONFIG, probe=PROBE, version=version, margins=margins)
    policy.to(DeviceState.WEIGHTS)
    return figures


def test_syncs_stay_within_the_bounds_that_the_first_sets(trained: Trained) -> None:
    policy, rollout, margins = trained
    assert 0.5 <= margins.mean < 3
    for version in range(1, 4):
        assert send(policy, rollout, version, margins)["sync/gap_mean"] > 1e-4  # bfloat16, not float32
        train(policy, range(40 + version, 41 + version))


def test_more_wrong_experts_stop_the_run_than_by_the_default_bounds(trained: Trained) -> None:
    """Each of 24 experts alone, negated inside the engine: 7 instead of 2 on one CPU."""
    policy, rollout, margins = trained
    send(policy, rollout, 4, margins)
    wide, narrow = ([expect(policy, CONFIG, half, own) for half in halves(PROBE)] for own in (MARGINS, margins))
    stopped: Counter[str] = Counter()
    for layer, expert in product((1, 2, 3), range(8)):
        on_engine(rollout, partial(negate_expert, layer=layer, expert=expert))
        for bounds, expected, own in (("default", wide, MARGINS), ("scaled", narrow, margins)):
            try:
                prove(expected, rollout, CONFIG, version=4, margins=own)
            except RunStopped:
                stopped[bounds] += 1
        on_engine(rollout, partial(negate_expert, layer=layer, expert=expert))
    prove(narrow, rollout, CONFIG, version=4, margins=margins)
    assert stopped["scaled"] > stopped["default"]


def negate_expert(model: Any, *, layer: int, expert: int) -> None:
    """Flip the sign of an expert's down projection, inside the engine; a second time, back."""
    experts = model.model.layers[layer].mlp.experts
    next(p for name, p in experts.named_parameters() if name.endswith("w2_weight")).data[expert].neg_()
