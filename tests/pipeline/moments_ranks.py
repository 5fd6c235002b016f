"""One rank of a test: three updates with moments in bfloat16 at every ZeRO stage, all offloaded, and with moments in
float32; without ZeRO also those of a model in bfloat16.

test_moments.py calls main, the process group in the environment. Rank 0 writes some weights: before the updates, after
them by ZeRO stage, offloaded, and with float32 moments.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.model import Dtype
from configs.train import OffloadConfig, OptimizerConfig, TrainerConfig
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from rollout.device import SIMULATED, DeviceState
from tests.pipeline.sharding import save_state, shard
from tests.pipeline.train_ranks import conversations


def main(model: str, out: str) -> None:
    os.environ[SIMULATED] = f"{Path(out).parent / 'ledger'}:{2**40}"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = shard(conversations(), num_ranks=world, micro_batch_tokens=4096)[rank]

    def engine_of(
        zero: Any, kept: Dtype, dtype: Dtype = "float32", offload: OffloadConfig | None = None
    ) -> TrainEngine:
        optimizer = OptimizerConfig(learning_rate=1e-3, moments=kept)
        trainer = TrainerConfig(num_ranks=world, zero_stage=zero, offload=offload)
        return TrainEngine(TrainSpec(Path(model), dtype, trainer, optimizer, 3))

    def update(engine: TrainEngine) -> float:
        engine.forward_backward(rows, 100.0)
        return engine.optim_step()["train/grad_norm"]

    def weights(engine: TrainEngine) -> np.ndarray:
        layers = {name: tensor.clone() for layer in engine.layer_weights() for name, tensor in layer.items()}
        return np.concatenate([layers[name].flatten().float().numpy()[:50] for name in sorted(layers)])

    traces: dict[str, np.ndarray] = {}
    cases: list[tuple[int, Dtype]] = [(0, "bfloat16"), (0, "float32"), (1, "float32"), (2, "float32"), (3, "float32")]
    for zero, dtype in cases:
        engine = engine_of(zero, "bfloat16", dtype)
        traces["start"] = weights(engine)
        update(engine)
        folder = Path(out).with_suffix(f".{zero}-{dtype}")
        save_state(engine, folder)
        engine.to(DeviceState.ASLEEP)
        engine.to(DeviceState.AWAKE)
        last = [update(engine), update(engine)]
        engine.load(folder)
        assert [update(engine), update(engine)] == last, "a state read back did not repeat the updates to the bit"
        fresh = engine_of(zero, "bfloat16", dtype)
        fresh.load(folder)
        assert [update(fresh), update(fresh)] == last, "a new engine did not go on where the first one stopped"
        for state in engine.engine.basic_optimizer.state.values():
            assert {state[moment].dtype for moment in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
        traces[str(zero)] = weights(engine)  # of stage 0 those of the later case
    for name, engine in (
        ("offloaded", engine_of(3, "bfloat16", offload=OffloadConfig(parameters=True))),
        ("float32", engine_of(1, "float32")),
    ):
        for _ in range(3):
            update(engine)
        traces[name] = weights(engine)
    if rank == 0:
        np.savez(out, **traces)  # type: ignore[arg-type]
