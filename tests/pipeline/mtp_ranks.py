"""One rank of a test: supervised training with modules for multi-token prediction that the checkpoint does not have.

test_mtp_engine.py calls main with MODEL OUT ZERO_STAGE MICRO_BATCH_TOKENS UPDATES EXPERTS, the process group in the
environment; EXPERTS ranks share those of a layer. Rank 0 writes loss, modules' loss, acceptance and gradient norm of
each update, and the names that a sync sends, to OUT.npz; the ranks together the checkpoint OUT. After the first update
the state is saved, after the second loaded, to repeat it.
"""

import os
from pathlib import Path

import numpy as np
import torch

from configs.sft import MtpConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import Tree
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from tests.pipeline.sharding import save_state, shard


def counting(step: int) -> list[Tree]:
    """Eight sequences of tokens that go up by one or two each, from anywhere on a circle of 30."""
    rng = np.random.default_rng(step)
    trees = []
    for _ in range(8):
        length, first, by = int(rng.integers(6, 16)), int(rng.integers(30)), int(rng.integers(1, 3))
        token_ids = [8 + (first + by * i) % 30 for i in range(length)]
        trees.append(Tree(token_ids, root_mask=[0, 0] + [1] * (length - 2)))
    return trees


def main(model: str, out: str, zero: str, tokens: str, updates: str, experts: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trainer = TrainerConfig(
        num_ranks=world,
        zero_stage=int(zero),  # type: ignore[arg-type]
        gradient_checkpointing=world > 1,
        expert_parallel_size=int(experts),
    )
    optimizer = OptimizerConfig(learning_rate=3e-3)
    engine = TrainEngine(TrainSpec(Path(model), "float32", trainer, optimizer, int(updates), mtp=MtpConfig()))

    def update(step: int) -> tuple[float, ...]:
        trees = counting(step)
        rows = shard(trees, num_ranks=world, micro_batch_tokens=int(tokens))[rank]
        sums = engine.forward_backward(rows, float(sum(sum(tree.root_mask or []) for tree in trees)))
        mine = [sums.loss, sums.sums["loss/mtp_mean"], sums.sums["mtp/acceptance_1"], float(sums.count)]
        totals = torch.tensor(mine, dtype=torch.float64)
        torch.distributed.all_reduce(totals)
        loss, ahead, accepted, count = totals.tolist()
        return loss, ahead / count, accepted / count, engine.optim_step()["train/grad_norm"]

    steps = [update(0)]
    state = Path(out).with_suffix(".state")
    state.mkdir(exist_ok=True)
    save_state(engine, state)
    steps.append(update(1))
    engine.load(state)
    assert update(1) == steps[-1], "a reloaded state did not repeat the update to the bit"
    steps += [update(step) for step in range(2, int(updates))]
    sent = {name for layer in engine.layer_weights() for name in layer}
    engine.save_hf(Path(out))
    if rank == 0:
        np.savez(Path(out).with_suffix(".npz"), steps=steps, sent=sorted(sent))
