"""One rank of a test: gradients of one batch, split over rows, ranks and ZeRO stages in every way.

test_train_engine.py calls main with MODEL OUT, the process group in the environment. The weights of MODEL are numbers
of bfloat16, so that float32 computes with the same ones. Rank 0 writes a gradient a case, flat: AdamW's first moment
without decay.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.model import Dtype
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import MicroBatch, Tree, micro_batch
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from pipeline.weights.pieces import PieceReader
from rollout.device import SIMULATED, DeviceState
from tests.pipeline.sharding import save_state, shard
from tests.pipeline.train_ranks import groups

REPEATS = 16


def texts() -> list[Tree]:
    rng = np.random.default_rng(0)
    return [Tree(rng.integers(3, 200, n).tolist(), root_mask=[0] + [1] * (n - 1)) for n in rng.integers(12, 24, 48)]


def trees_of_groups() -> list[Tree]:
    """Groups as supervised training sees them: their branches are trained."""
    return [Tree(tree.root_ids, tree.branches) for tree in groups()]


def main(model: str, out: str) -> None:
    os.environ[SIMULATED] = f"{Path(out).parent / 'ledger'}:{2**40}"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gradients: dict[str, np.ndarray] = {}

    def engine_of(zero: Any, dtype: Dtype) -> TrainEngine:
        optimizer = OptimizerConfig(learning_rate=1e-12, betas=[0.0, 0.95], max_grad_norm=1e9, weight_decay=0.0)
        trainer = TrainerConfig(num_ranks=world, zero_stage=zero)
        return TrainEngine(TrainSpec(Path(model), dtype, trainer, optimizer, 9))

    def gradient(engine: TrainEngine, case: str, rows: list[MicroBatch], denominator: float) -> None:
        engine.forward_backward(rows, denominator)
        engine.optim_step()
        folder = Path(out).with_suffix(f".{case.replace('/', '-')}")
        save_state(engine, folder)
        state = PieceReader(folder)
        trained = sorted(state.shapes.keys() - dict(engine.engine.module.named_buffers()).keys())
        gradients[case] = torch.cat([state.whole("exp_avg", name).flatten() for name in trained]).numpy()

    def split(trees: list[Tree], tokens: int) -> list[MicroBatch]:
        return shard(trees, num_ranks=world, micro_batch_tokens=tokens)[rank]

    for zero in range(4):
        engine = engine_of(zero, "bfloat16")
        rows = [micro_batch(texts())]
        gradient(engine, f"{zero}/same", rows * REPEATS, 512.0 * REPEATS * world)
        engine.to(DeviceState.ASLEEP)
        engine.to(DeviceState.AWAKE)
        engine.engine.module.chunk_tokens = 8  # ranks have unequal numbers of chunks
        gradient(engine, f"{zero}/rows", split(texts(), 16), 512.0)
    engine = engine_of(1, "float32")
    gradient(engine, "float32", split(texts(), 4096), 512.0)
    gradient(engine, "groups", split(trees_of_groups(), 4096), 64.0)
    cut = split(trees_of_groups(), 24)
    assert any(row.repeated for row in cut)
    gradient(engine, "cut groups", cut, 64.0)
    if world == 1:
        gradient(engine_of(1, "bfloat16"), "one row", [micro_batch(texts())], 512.0)
    if rank == 0:
        np.savez(out, **gradients)  # type: ignore[arg-type]
