"""Buckets that ranks broadcast to the workers of all engines over NCCL, for engines on other devices than ranks.

Each rank has a group of its own with all workers, in which it is number 0, so that it sends its share of the weights
without the other ranks. A group is opened once. vLLM's own NCCL engine has one group, and sends from one rank only.
"""

from dataclasses import dataclass
from typing import Any

import torch

from rollout.device_memory import SharedBucket
from rollout.types import GroupAddress, TensorRecord
from rollout.weights import Bucket


@dataclass(frozen=True, slots=True)
class BroadcastBucket:
    """Part of the tensors of a sync; its bytes follow by `broadcast`.

    starts, sizes: as in SharedBucket. num_bytes: of the whole. rank: sender, and number of its group.
    """

    records: list[TensorRecord]
    starts: list[int]
    sizes: list[int]
    num_bytes: int
    rank: int


AnyBucket = Bucket | SharedBucket | BroadcastBucket
"""A bucket by any transport (rollout.weights.Transport)."""


def open_group(address: GroupAddress, number: int, device: torch.device) -> Any:
    """Join a group as `number` of its processes; returns when all have joined.

    Written against vLLM 0.32.0 (vllm/distributed/weight_transfer/nccl_common.py).
    """
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    return stateless_init_process_group(address.host, address.port, number, address.world_size, device)


def broadcast(group: Any, memory: torch.Tensor) -> None:
    """Send `memory` from process 0 of a group to the others, or receive it; return when it has arrived."""
    group.broadcast(memory, src=0)
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).synchronize()
