"""One rank of a test: three updates on a fixed batch, a save and a load between the second and the third.

test_train_engine.py calls main with MODEL OUT ZERO_STAGE MICRO_BATCH_TOKENS LOSS 0|1 (gradient checkpointing), the
process group in the environment; LOSS is grpo, lora (grpo of adapters), sft, or balanced: sft with V3's balance of
experts. Rank 0 writes losses, gradient norms, some weights, and whether a reload repeats the third update.
"""

import os
from pathlib import Path

import numpy as np
import torch

from configs.balance import V3Balance
from configs.grpo import ObjectiveConfig
from configs.lora import LoraConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import Branch, Tree
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from pipeline.weights.pieces import PieceReader
from tests.pipeline.sharding import shard


def groups() -> list[Tree]:
    """Six groups of three completions of different lengths, with columns that depend on the token alone."""
    rng = np.random.default_rng(0)
    trees = []
    for _ in range(6):
        branches = []
        for _ in range(3):
            length = int(rng.integers(1, 12))
            columns = {
                "advantages": [float(rng.normal())] * length,
                "weights": [1 / length] * length,
                "rollout_logprobs": (-rng.random(length)).tolist(),
            }
            branches.append(Branch(rng.integers(3, 200, length).tolist(), columns))
        trees.append(Tree(rng.integers(3, 200, int(rng.integers(2, 9))).tolist(), branches))
    return trees


def conversations() -> list[Tree]:
    return [Tree(tree.root_ids, root_mask=[0] + [1] * (len(tree.root_ids) - 1)) for tree in groups()]


def main(model: str, out: str, zero: str, tokens: str, loss: str, checkpointing: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    objective = ObjectiveConfig() if loss in ("grpo", "lora") else None
    trainer = TrainerConfig(num_ranks=world, zero_stage=int(zero), gradient_checkpointing=checkpointing == "1")  # type: ignore[arg-type]
    optimizer = OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.01)
    spec = TrainSpec(
        Path(model),
        "float32",
        trainer,
        optimizer,
        3,
        objective=objective,
        with_reference=objective is not None,
        balance=V3Balance(type="v3", bias_rate=0.05, sequence=0.1) if loss == "balanced" else None,
        lora=LoraConfig(rank=4) if loss == "lora" else None,
    )
    engine = TrainEngine(spec)
    trees = groups() if objective else conversations()
    rows = shard(trees, num_ranks=world, micro_batch_tokens=int(tokens))[rank]
    if objective is not None:
        reference = engine.reference_logprobs(rows)
        for values_N, own_N in zip(reference, engine.logprobs(rows), strict=True):
            np.testing.assert_allclose(values_N, own_N, atol=1e-5)  # before the first update they are one model
        rows = [row.with_column("ref_logprobs", values_N) for row, values_N in zip(rows, reference, strict=True)]

    def update() -> tuple[float, float]:
        sums = engine.forward_backward(rows, float(3 * len(trees)))
        totals = torch.tensor(sum(sums.sums.values()), dtype=torch.float64)
        torch.distributed.all_reduce(totals)
        total = totals.item()
        return total, engine.optim_step()["train/grad_norm"]

    steps = [update(), update()]
    checkpoint = Path(out).parent / f"state-{world}-{zero}"
    checkpoint.mkdir(exist_ok=True)
    engine.begin_save(checkpoint)
    steps.append(update())  # while the state before it is written
    assert engine.end_save(None)
    torch.distributed.barrier()
    engine.load(checkpoint)
    assert update() == steps[-1], "a reloaded state did not repeat the update to the bit"
    if spec.lora is not None:
        for values_N, own_N in zip(engine.reference_logprobs(rows), reference, strict=True):
            np.testing.assert_array_equal(values_N, own_N)  # the model without adapters, after three updates of them
        stored = PieceReader(checkpoint).shapes.keys() - dict(engine.engine.module.named_buffers()).keys()
        assert stored and all("lora_" in name for name in stored), stored
    elif objective is not None:
        engine.refresh_reference()
        for values_N, own_N in zip(engine.reference_logprobs(rows), engine.logprobs(rows), strict=True):
            np.testing.assert_allclose(values_N, own_N, atol=1e-5)  # three updates changed them by more
    weights = {name: tensor.clone() for layer in engine.layer_weights() for name, tensor in layer.items()}
    if rank == 0:
        losses, grad_norms = zip(*steps, strict=True)
        flat = np.concatenate([weights[name].flatten().numpy()[:50] for name in sorted(weights)])
        biases = np.stack(
            [weights[name].numpy() for name in sorted(weights) if name.endswith("e_score_correction_bias")]
        )
        np.savez(out, losses=losses, grad_norms=grad_norms, weights=flat, biases=biases, rows=len(rows))
