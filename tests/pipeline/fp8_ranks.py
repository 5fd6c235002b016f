"""One rank of a test: two supervised updates in FP8 under ZeRO-1 and ZeRO-3, and without FP8."""

from pathlib import Path

import numpy as np

from configs.train import OptimizerConfig, TrainerConfig
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from tests.pipeline.sharding import shard
from tests.pipeline.train_ranks import conversations


def losses(model: str, trainer: TrainerConfig) -> list[float]:
    """Before each of two updates and after them."""
    engine = TrainEngine(TrainSpec(Path(model), "float32", trainer, OptimizerConfig(learning_rate=1e-3), 3))
    trees = conversations()
    (rows,) = shard(trees, num_ranks=1, micro_batch_tokens=60)
    seen = []
    for _ in range(2):
        seen.append(engine.forward_backward(rows, float(len(trees))).loss)
        engine.optim_step()
    return [*seen, engine.evaluate(rows).sums["eval/nll_mean"] / len(trees)]


def main(model: str) -> None:
    """What is left of FP8 in the losses is less than a hundredth, and the same in both layouts."""
    plain = losses(model, TrainerConfig())
    under_1 = losses(model, TrainerConfig(fp8=True))
    under_3 = losses(model, TrainerConfig(fp8=True, zero_stage=3))
    assert plain[0] > plain[1] > plain[2]
    np.testing.assert_allclose(under_1, plain, rtol=1e-2)
    assert (np.abs(np.array(under_1) / plain - 1) > 1e-5).all(), "nothing was quantised"
    np.testing.assert_allclose(under_3, under_1, rtol=1e-3)
