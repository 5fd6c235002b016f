"""One rank of a test: two updates of a student, each from two teachers in turn.

test_distillation.py calls main with STUDENT TEACHER TEACHER OUT ZERO_STAGE, the process group in the environment.
Rank 0 writes losses, gradient norms and some weights.
"""

import os
from pathlib import Path

import numpy as np
import torch

from configs.distill import DistillObjective
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import Branch, Tree
from pipeline.train.spec import FrozenModel, TrainSpec
from pipeline.train.student import StudentEngine
from rollout.device import DeviceState
from tests.pipeline.sharding import shard


def trees() -> dict[str, list[Tree]]:
    """Texts of each teacher; the second has one."""
    rng = np.random.default_rng(0)
    columns = {"weights": [1.0] * 8, "rollout_logprobs": [-5.0] * 8}

    def text() -> Tree:
        return Tree(rng.integers(3, 200, 4).tolist(), [Branch(rng.integers(3, 200, 8).tolist(), columns)])

    return {"a": [text() for _ in range(5)], "b": [text()]}


def main(student: str, teacher: str, other: str, out: str, zero: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    spec = TrainSpec(
        Path(student),
        "float32",
        TrainerConfig(num_ranks=world, zero_stage=int(zero)),  # type: ignore[arg-type]
        OptimizerConfig(learning_rate=1e-3),
        2,
        objective=DistillObjective(),
        teachers={name: FrozenModel(Path(path), "float32") for name, path in (("a", teacher), ("b", other))},
    )
    engine = StudentEngine(spec)
    losses, norms = [], []
    for names in ("ab", "ba"):
        total = torch.zeros(())
        for name in names:
            rows = shard(trees()[name], num_ranks=world, micro_batch_tokens=40)[rank]
            engine.load_teacher(name)
            engine.teach(rows)
            total += engine.forward_backward(rows, 48.0).loss
        torch.distributed.all_reduce(total)
        losses.append(total.item())
        norms.append(engine.optim_step()["train/grad_norm"])
    engine.to(DeviceState.ASLEEP)
    engine.to(DeviceState.AWAKE)
    weights = {name: tensor.clone() for layer in engine.layer_weights() for name, tensor in layer.items()}
    if rank == 0:
        flat = np.concatenate([weights[name].flatten().numpy()[:50] for name in sorted(weights)])
        np.savez(out, losses=losses, grad_norms=norms, weights=flat)
