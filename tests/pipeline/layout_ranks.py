"""One rank of a test of layouts: five updates on a fixed batch, and the last two again from saved states.

test_expert_parallel.py calls main, the process group in the environment. Rank 0 writes losses, gradient norms and all
weights after the fifth update, as trained and as resumed from what another layout saved after its third, and the summed
log-probabilities after the third, with the gates' own experts and with others in their place.
"""

import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.grpo import ObjectiveConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from rollout.weights import as_bytes, bytes_checksum
from tests.pipeline.sharding import save_state, shard
from tests.pipeline.train_ranks import groups


def _engine(model: Path, world: int, zero: Any, experts: int, dtype: Any) -> TrainEngine:
    trainer = TrainerConfig(
        num_ranks=world,
        zero_stage=zero,
        expert_parallel_size=experts,
        gradient_checkpointing=world > 1,
    )
    optimizer = OptimizerConfig(learning_rate=3e-4, max_grad_norm=0.5, weight_decay=0.01)
    spec = TrainSpec(
        model,
        dtype,
        trainer,
        optimizer,
        5,
        objective=ObjectiveConfig(),
        with_reference=True,
    )
    return TrainEngine(spec)


def assert_sent_once(engine: TrainEngine) -> None:
    """The ranks' shares of a sync are all weights, each from one rank; in shared memory each rank has all of them."""
    expected = sorted(
        (name, bytes_checksum(as_bytes(tensor))) for layer in engine.layer_weights() for name, tensor in layer.items()
    )
    for transport in ("store", "broadcast", "shared"):
        engine.begin_sync(0.1, ["cpu"], transport)
        own: list[tuple[str, int]] = []
        while (bucket := engine.sender.next()[1]) is not None:
            own += [(record.name, record.checksum) for record in bucket.records]
        engine.sender.end()
        if transport == "shared":
            assert sorted(own) == expected
            continue
        shares: list[list[tuple[str, int]]] = [[] for _ in range(engine.world_size)]
        torch.distributed.all_gather_object(shares, own)
        assert all(shares), "every rank sends"
        assert sorted(chain.from_iterable(shares)) == expected


def main(model: str, out: str, zero: str, experts: str, dtype: str, *others: str) -> None:
    """`others` are folders that other layouts saved their state to; this one saves into `out` with suffix `.state`."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    engine = _engine(Path(model), world, int(zero), int(experts), dtype)
    trees = groups()
    rows = shard(trees, num_ranks=world, micro_batch_tokens=90)[rank]
    reference = engine.reference_logprobs(rows)
    rows = [row.with_column("ref_logprobs", values_N) for row, values_N in zip(rows, reference, strict=True)]

    def update() -> tuple[float, float]:
        sums = engine.forward_backward(rows, float(3 * len(trees)))
        total = torch.tensor(sum(sums.sums.values()), dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.item(), engine.optim_step()["train/grad_norm"]

    def weights() -> dict[str, np.ndarray]:
        return {
            name: tensor.float().numpy().copy() for layer in engine.layer_weights() for name, tensor in layer.items()
        }

    steps = [update() for _ in range(3)]
    chosen = [experts_TLK for _, experts_TLK in engine.logprobs_and_experts(rows)]
    others_TLK = [(experts_TLK + 3) % 8 for experts_TLK in chosen]
    replayed = [replace(row, experts_TLK=experts_TLK) for row, experts_TLK in zip(rows, others_TLK, strict=True)]
    sums = torch.tensor(
        [sum(float(values_N.sum()) for values_N in engine.logprobs(given)) for given in (rows, replayed)]
    )
    torch.distributed.all_reduce(sums)
    state = Path(out).with_suffix(".state")
    save_state(engine, state)
    steps += [update(), update()]
    traces = {"trained": weights()}
    for folder in (str(state), *others):
        engine.load(Path(folder))
        again = [update(), update()]
        traces[Path(folder).stem] = weights()
        if folder == str(state):
            assert again == steps[3:], "a state read back did not repeat the updates to the bit"
    assert_sent_once(engine)
    engine.save_hf(Path(out).with_suffix(".hf"))
    if rank == 0:
        losses, norms = zip(*steps, strict=True)
        flat = {f"{trace}/{name}": values for trace, named in traces.items() for name, values in named.items()}
        np.savez(out, losses=losses, norms=norms, logprobs=sums.numpy(), **flat)
