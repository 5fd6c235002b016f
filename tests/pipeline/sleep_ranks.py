"""One rank of a test on simulated devices: two updates at every ZeRO stage in float32 and bfloat16, with a reference
and a sleep after each.

test_sleep.py calls main, the process group in the environment. The ranks assert what they hold in each state; rank 0
writes the weights as `hf/`, as the trainer holds them, and the gradient norms of a run with sleep and of one without.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.model import Dtype
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import MicroBatch
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from rollout.device import SIMULATED, DeviceError, DeviceState
from tests.pipeline.sharding import shard
from tests.pipeline.train_ranks import conversations

CASES: dict[int, list[tuple[int, Dtype]]] = {
    1: [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")],
    2: [(1, "bfloat16"), (3, "bfloat16")],
}
"""ZeRO stages and dtypes by the number of ranks that share the experts."""


def main(model: str, folder: str, expert_parallel: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ[SIMULATED] = f"{Path(folder) / 'ledger'}:{2**40}"
    rows = shard(conversations(), num_ranks=world, micro_batch_tokens=4096)[rank]
    size = int(expert_parallel)
    for stage, dtype in CASES[size]:
        trainer = TrainerConfig(num_ranks=world, zero_stage=stage, expert_parallel_size=size)  # type: ignore[arg-type]
        optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
        spec = TrainSpec(Path(model), dtype, trainer, optimizer, 2, with_reference=True)
        out = Path(folder) / f"{stage}-{dtype}"
        out.mkdir(exist_ok=True)
        norms = {name: trained(TrainEngine(spec), rows, sleep, out) for name, sleep in SLEEPS.items()}
        if rank == 0:
            (out / "norms.json").write_text(json.dumps(norms))


def trained(engine: TrainEngine, rows: list[MicroBatch], sleep: Callable[..., None], out: Path) -> list[float]:
    norms: list[float] = []
    for _ in range(2):
        engine.forward_backward(rows, 100.0)
        norms.append(engine.optim_step()["train/grad_norm"])
        sleep(engine, rows, out)
    return norms


def stay(engine: TrainEngine, rows: list[MicroBatch], out: Path) -> None:
    """Stay awake."""


def go_round(engine: TrainEngine, rows: list[MicroBatch], out: Path) -> None:
    """Go from awake to weights, asleep and awake again."""
    before, reference = weights(engine), engine.reference_logprobs(rows)
    assert_held(out, engine, "weights", "optimizer", "reference")
    assert engine.to(DeviceState.WEIGHTS).num_bytes > 0
    assert_held(out, engine, "weights")
    assert all(map(torch.equal, weights(engine).values(), before.values()))
    assert [x.tolist() for x in engine.logprobs(rows)]  # every rank takes part in it
    engine.save_hf(out / "hf")
    if engine.name == "rank 0":
        save_file(before, out / "awake.safetensors")
    for call in (lambda: engine.begin_save(out / "state"), lambda: engine.forward_backward(rows, 1.0)):
        with pytest.raises(DeviceError, match=f"{engine.name} is in state 'weights'.* needs 'awake'"):
            call()
    engine.to(DeviceState.ASLEEP)
    assert_held(out, engine)
    for call in (engine.layer_weights, lambda: engine.save_hf(out / "none"), lambda: engine.evaluate(rows)):
        with pytest.raises(DeviceError, match=f"{engine.name} is in state 'asleep'"):
            call()
    assert first_weight(engine).isnan().all()  # what reads around the check gets nothing of use
    engine.to(DeviceState.AWAKE)
    assert all(map(torch.equal, weights(engine).values(), before.values()))
    after = engine.reference_logprobs(rows)
    assert [x.tolist() for x in after] == [x.tolist() for x in reference]


SLEEPS: dict[str, Callable[..., None]] = {"awake": stay, "asleep": go_round}


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for layer in engine.layer_weights() for name, tensor in layer.items()}


def first_weight(engine: TrainEngine) -> Tensor:
    parameter: Any = max(engine.engine.module.parameters(), key=lambda p: p.numel())
    return getattr(parameter, "ds_tensor", parameter.data)


def assert_held(out: Path, engine: TrainEngine, *kinds: str) -> None:
    """The newest entry of this rank in the ledger has these kinds of memory and no others but gradients' buffers."""
    folder = out.parent / "ledger" / f"device-{engine.name.split()[-1]}"
    entry = json.loads((folder / f"{os.getpid()}.json").read_text())
    held = {kind for kind, num_bytes in entry["held"].items() if num_bytes}
    assert held - ({"gradients", "buckets"} if kinds[1:] else set()) == set(kinds), (kinds, entry)


def saved(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[float]]]:
    """Files that rank 0 wrote: the weights of `hf/`, the trainer's, and the gradient norms."""
    exported = {name: x for file in (folder / "hf").glob("*.safetensors") for name, x in load_file(file).items()}
    return exported, load_file(folder / "awake.safetensors"), json.loads((folder / "norms.json").read_text())
