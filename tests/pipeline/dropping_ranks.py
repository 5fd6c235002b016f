"""One rank of a test: an update under token dropping, with the rows that its experts compute in each layer.

test_expert_parallel.py calls main with MODEL OUT, the process group in the environment. As many ranks as there are
share the experts. Rank 0 writes the loss, the gradient's norm, the share of dropped pairs, the load, the weights after
the update, and the rows [rank, layer].
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.balance import V2Balance
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.models import experts
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from tests.pipeline.sharding import shard
from tests.pipeline.train_ranks import conversations

CAPACITY = 0.6


def record_rows(engine: TrainEngine, rows: list[int]) -> None:
    """Append to `rows` the rows of each layer's experts: on several ranks those that arrive, without the padding of
    zeros; on one those that are sorted."""
    if engine.world_size == 1:
        sort = experts.sorted_pairs

        def sorted_pairs(*arguments: Any) -> Any:
            found = sort(*arguments)
            rows.append(len(found[0]))
            return found

        experts.sorted_pairs = sorted_pairs
    for module in engine.engine.module.modules():
        if type(module).__name__ == "GroupedExperts":
            module.register_forward_pre_hook(lambda _, inputs: rows.append(int(inputs[0].any(dim=1).sum())))


def main(model: str, out: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trainer = TrainerConfig(num_ranks=world, expert_parallel_size=world)
    optimizer = OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.5)
    balance = V2Balance(type="v2", expert=0.0, device=0.0, communication=0.0, capacity=CAPACITY, never_dropped=0.0)
    engine = TrainEngine(TrainSpec(Path(model), "float32", trainer, optimizer, 1, balance=balance))
    rows: list[int] = []
    record_rows(engine, rows)
    trees = conversations()
    sums = engine.forward_backward(shard(trees, num_ranks=world, micro_batch_tokens=4096)[rank], float(len(trees)))
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, (sums.loss, rows))
    figures = engine.optim_step()
    weights = {name: value.numpy().copy() for layer in engine.layer_weights() for name, value in layer.items()}
    if rank == 0:
        figures_of_all = {
            "loss": sum(loss for loss, _ in gathered),
            "norm": figures["train/grad_norm"],
            "dropped": figures["experts/dropped_rate"],
            "load": list(engine.balancer.load.values()),
            "rows": [rows for _, rows in gathered],
        }
        np.savez(out, **figures_of_all, **{f"weights/{name}": values for name, values in weights.items()})
