"""One rank of a test: three updates of a reward model, a save and a load between the second and the third.

test_reward_engine.py calls main, the process group in the environment. For each model and ZeRO stage (`0,3` are two),
experts spread over `experts` ranks, rank 0 writes NAME-STAGE.npz (losses, margins and gradient norms, some weights,
every answer's score) into the folder `out`, and the ranks together the checkpoint `out`/NAME-STAGE.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.lora import LoraConfig
from configs.reward_model import PairwiseLoss
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import Tree, scored_tree
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from tests.pipeline.sharding import save_state, shard


def comparisons() -> list[Tree]:
    """Eight prompts with two to four ranked answers, half of them with scores."""
    rng = np.random.default_rng(0)
    trees = []
    for number in range(8):
        answers = [[*rng.integers(8, 200, int(rng.integers(1, 12))).tolist(), 2] for _ in range(2 + number % 3)]
        targets = np.arange(len(answers), 0, -1.0) if number % 2 else np.full(len(answers), np.nan)
        trees.append(scored_tree(rng.integers(8, 200, int(rng.integers(2, 9))).tolist(), answers, targets.tolist()))
    return trees


def train(model: Path, out: Path, zero: Any, tokens: int, experts: int, lora: LoraConfig | None = None) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    spec = TrainSpec(
        model,
        "float32",
        TrainerConfig(num_ranks=world, zero_stage=zero, expert_parallel_size=experts),
        OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.01),
        total_steps=3,
        objective=PairwiseLoss(type="pairwise", margin=0.5, center=0.01),
        head_seed=1,
        lora=lora,
    )
    engine = TrainEngine(spec)
    trees = comparisons()
    rows = shard(trees, num_ranks=world, micro_batch_tokens=tokens)[rank]

    def update() -> tuple[float, float, float]:
        sums = engine.forward_backward(rows, float(len(trees)))
        mine = [sums.loss, sums.sums["reward_model/margin_mean"], float(sums.count)]
        totals = torch.tensor(mine, dtype=torch.float64)
        torch.distributed.all_reduce(totals)
        assert totals[2] == len(trees)
        return totals[0].item(), totals[1].item(), engine.optim_step()["train/grad_norm"]

    steps = [update(), update()]
    name = f"{model.name}-{zero}"
    checkpoint = out / f"state-{name}"
    save_state(engine, checkpoint)
    steps.append(update())
    engine.load(checkpoint)
    assert update() == steps[-1], "a reloaded state did not repeat the update to the bit"
    weights = {name: tensor.clone() for layer in engine.layer_weights() for name, tensor in layer.items()}
    scores = np.concatenate(engine.scores(shard(trees, num_ranks=1, micro_batch_tokens=4096)[0]))
    engine.save_hf(out / name)
    if rank == 0:
        flat = np.concatenate([weights[each].flatten().numpy()[:50] for each in sorted(weights)])
        np.savez(out / f"{name}.npz", steps=steps, weights=flat, scores=scores, rows=len(rows))


def main(out: str, zero_stages: str, tokens: str, experts: str, *models: str) -> None:
    for model in models:
        for zero in zero_stages.split(","):
            train(Path(model), Path(out), int(zero), int(tokens), int(experts))


def train_adapters(model: str, out: str) -> None:
    """Train adapters and the head under ZeRO-2."""
    train(Path(model), Path(out), 2, 4096, 1, LoraConfig(rank=4))
