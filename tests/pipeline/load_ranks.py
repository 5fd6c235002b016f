"""One rank of a test: the memory that it takes to build a frozen model.

test_sharded_load.py calls main with MODEL SMALL OUT DTYPE ZERO_STAGE EXPERTS, the process group in the environment.
Each rank writes its figures to OUT-RANK.json: bytes of its memory before and at its highest, of the weights it keeps,
and of the checkpoint that it read.
"""

import ctypes
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from configs.train import OptimizerConfig, TrainerConfig
from pipeline.train.build import build_frozen, join_ranks, prepare_torch
from pipeline.train.spec import FrozenModel, TrainSpec
from pipeline.weights.reader import CheckpointReader

M_MMAP_THRESHOLD = -3
"""Setting of malloc's: what is larger goes back to the kernel when it is freed. By default, only above 32 MiB."""


def memory(key: str) -> int:
    """VmRSS, or VmHWM, the highest so far, of this process in bytes."""
    return int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def kept(model: torch.nn.Module) -> int:
    """Bytes of the weights that this rank keeps."""
    parts = [getattr(x, "ds_tensor", x) for x in (*model.parameters(), *model.buffers())]
    return sum(part.numel() * part.element_size() for part in parts)


def main(model: str, small: str, out: str, dtype: Any, zero: str, experts: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**17)
    read: list[int] = []
    own_read = CheckpointReader.read

    def counted(reader: CheckpointReader, name: str) -> torch.Tensor:
        read.append(reader.num_bytes(name))
        return own_read(reader, name)

    CheckpointReader.read = counted
    trainer = TrainerConfig(num_ranks=world, zero_stage=int(zero), expert_parallel_size=int(experts), threads=1)  # type: ignore[arg-type]
    spec = TrainSpec(Path(model), dtype, trainer, OptimizerConfig(learning_rate=1e-3), 1)
    device = prepare_torch(deterministic=True)
    join_ranks(device)
    build_frozen(FrozenModel(Path(small), dtype), spec, device, checks=True)  # maps the code of what is computed
    read.clear()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    frozen = build_frozen(FrozenModel(Path(model), dtype), spec, device, checks=True)
    figures = {"before": before, "peak": memory("VmHWM"), "kept": kept(frozen), "read": sum(read)}
    Path(f"{out}-{rank}.json").write_text(json.dumps(figures))
    torch.distributed.barrier()
