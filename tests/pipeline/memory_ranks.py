"""One rank of a test: peak and longest micro-batch of three steps, of a short row, a long one and the short one again.

test_memory.py calls main with MODEL OUT, the process group in the environment. The figures go to OUT as JSON.
"""

import json
from pathlib import Path

import numpy as np

from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import Tree
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from tests.pipeline.sharding import shard


def main(model: str, out: str) -> None:
    trainer, optimizer = TrainerConfig(zero_stage=1), OptimizerConfig(learning_rate=1e-5)
    engine = TrainEngine(TrainSpec(Path(model), "float32", trainer, optimizer, 3))
    token_ids = np.random.default_rng(0).integers(3, 250, (32, 128)).tolist()
    figures: list[dict[str, float]] = []
    for count in (1, 32, 1):
        trees = [Tree(ids, root_mask=[0] + [1] * 127) for ids in token_ids[:count]]
        engine.forward_backward(shard(trees, num_ranks=1, micro_batch_tokens=128 * count)[0], 100.0)
        figures.append({name: x for name, x in engine.optim_step().items() if name.startswith("memory/")})
    Path(out).write_text(json.dumps(figures), encoding="utf-8")
