"""One rank of a test: what the engine does with routes that are given, and with those it is to keep (R2)."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.grpo import ObjectiveConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import MicroBatch
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from tests.pipeline.sharding import shard
from tests.pipeline.train_ranks import groups


def main(model: str) -> None:
    engine = TrainEngine(
        TrainSpec(
            Path(model),
            "float32",
            TrainerConfig(gradient_checkpointing=True),
            OptimizerConfig(learning_rate=3e-2),
            4,
            objective=ObjectiveConfig(),
            with_reference=True,
            routing_replay=True,
        )
    )
    (rows,) = shard(groups(), num_ranks=1, micro_batch_tokens=60)
    assert len(rows) > 1
    kept = check_kept(engine, rows)
    check_reference(engine, kept)
    check_after_updates(engine, kept)


def check_kept(engine: TrainEngine, rows: list[MicroBatch]) -> list[MicroBatch]:
    """The rows with the policy's own routes; replaying them says what it said."""
    own = engine.logprobs(rows)
    answers = engine.logprobs_and_experts(rows)
    kept = [replace(row, experts_TLK=experts_TLK) for row, (_, experts_TLK) in zip(rows, answers, strict=True)]
    for row, own_N, (values_N, experts_TLK) in zip(rows, own, answers, strict=True):
        np.testing.assert_array_equal(values_N, own_N)
        assert experts_TLK.dtype == np.int16 and len(experts_TLK) == len(row.token_ids_T) and (experts_TLK >= 0).all()
    for values_N, own_N in zip(engine.logprobs(kept), own, strict=True):
        np.testing.assert_allclose(values_N, own_N, atol=1e-6)
    return kept


def check_reference(engine: TrainEngine, kept: list[MicroBatch]) -> None:
    """Routes that nobody chose change what the policy says, and nothing of what the reference says."""
    moved = [replace(row, experts_TLK=(row.experts_TLK + 3) % 8) for row in kept]  # type: ignore[operator]
    for logprobs, same in ((engine.reference_logprobs, True), (engine.logprobs, False)):
        pairs = zip(logprobs(kept), logprobs(moved), strict=True)
        assert [np.array_equal(*pair) for pair in pairs] == [same] * len(kept)


def check_after_updates(engine: TrainEngine, kept: list[MicroBatch]) -> None:
    """The updated policy would go elsewhere, but goes where the old one went."""
    kept = [
        row.with_column("ref_logprobs", values_N)
        for row, values_N in zip(kept, engine.reference_logprobs(kept), strict=True)
    ]
    for _ in range(3):
        engine.forward_backward(kept, 18.0)
        engine.optim_step()
    replayed = engine.logprobs_and_experts(kept)
    free = engine.logprobs_and_experts([replace(row, experts_TLK=None) for row in kept])
    differ = 0
    for row, (_, replayed_TLK), (_, free_TLK) in zip(kept, replayed, free, strict=True):
        np.testing.assert_array_equal(replayed_TLK, row.experts_TLK)
        differ += int((np.sort(free_TLK) != np.sort(replayed_TLK)).any(axis=-1).sum())
    assert differ > 0, "the updates must move some routes for this to prove anything"
