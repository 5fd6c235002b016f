"""Buckets in memory that another process on the same device can map, so that no byte goes through a message.

On a GPU the memory is exported by CUDA IPC, on the host it is a memfd. Either lives as long as one process maps it: a
sender drops its own reference when the receivers have mapped a bucket, and they drop theirs when it is loaded.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rollout.types import SyncError, TensorRecord

_ALIGNMENT = 64
"""Bytes to which tensors are aligned; no dtype needs more."""
_DEVICE_INDEX = 6
"""Place of the device's number among the arguments of rebuild_cuda_tensor (torch 2.13). Processes count visible devices
from 0, so the receiver puts its own there, as vLLM 0.32.0 does (vllm/distributed/weight_transfer/ipc_engine.py)."""


@dataclass(frozen=True, slots=True)
class SharedBucket:
    """Part of the tensors of a sync in shared memory.

    starts: byte at which each record's tensor begins.
    sizes: bytes of each tensor.
    handles: how to map the memory, by the name of the device that it lies on (`device_name`). Each rank has the same
        tensors on its own device.
    """

    records: list[TensorRecord]
    starts: list[int]
    sizes: list[int]
    handles: dict[str, Any]

    def map(self, device: torch.device) -> list[Tensor]:
        """Map the memory on `device` and return each tensor's bytes, [num_bytes] uint8.

        Raises SyncError if no rank has shared memory on this device.
        """
        name = device_name(device)
        if name not in self.handles:
            raise SyncError(
                f"tensor '{self.records[0].name}' is on no rank that shares device {name} with an engine, only on "
                f"{', '.join(self.handles)}: give each of the engines' devices a rank, or set placement: separate"
            )
        return views(_map(self.handles[name], device), self.starts, self.sizes)

    def merged(self, others: "Sequence[SharedBucket]") -> "SharedBucket":
        """Return the bucket with the handles of `others`, the same bucket on other ranks' devices.

        Raises SyncError naming a tensor that differs between ranks.
        """
        for other in others:
            for record, its_record in zip(self.records, other.records, strict=True):
                if record != its_record:
                    raise SyncError(f"tensor '{record.name}' is not the same on all ranks: {record} and {its_record}")
        handles = {name: handle for bucket in (self, *others) for name, handle in bucket.handles.items()}
        return SharedBucket(self.records, self.starts, self.sizes, handles)


class SharedMemory:
    """Copies of tensors in one piece of memory of a device, which other processes can map while this object lives.

    starts, sizes: as in SharedBucket.
    """

    def __init__(self, payloads: Sequence[Tensor], device: torch.device) -> None:
        """Copy `payloads`, bytes of one tensor each, at least one, to `device`."""
        self.sizes = [payload.nbytes for payload in payloads]
        *self.starts, num_bytes = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in self.sizes), initial=0)
        if device.type == "cpu":
            self._file = os.fdopen(os.memfd_create("alignyard-bucket"), "r+b")  # closed with this object
            self._file.truncate(num_bytes)
            self.memory = _from_buffer(mmap.mmap(self._file.fileno(), 0))
        else:
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        for place, payload in zip(self.payloads, payloads, strict=True):
            place.copy_(payload)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # another process reads without this stream's order

    @property
    def payloads(self) -> list[Tensor]:
        """Each tensor's bytes, [num_bytes] uint8."""
        return views(self.memory, self.starts, self.sizes)

    @cached_property
    def handle(self) -> Any:
        """Value for SharedBucket.handles. On a GPU the memory is freed only after one process has mapped it."""
        if self.memory.is_cuda:
            return reduce_tensor(self.memory)[1]
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"


def views(memory: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """View parts of `memory`, [num_bytes] uint8 each."""
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def device_name(device: torch.device) -> str:
    """Return a name of the device that is the same in every process: a GPU's UUID, or "cpu"."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def _map(handle: Any, device: torch.device) -> Tensor:
    if device.type == "cpu":
        with Path(handle).open("rb") as file:
            return _from_buffer(
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
            )
    arguments = list(handle)
    arguments[_DEVICE_INDEX] = device.index
    return rebuild_cuda_tensor(*arguments)


def _from_buffer(memory: mmap.mmap) -> Tensor:
    """View a mapping as a tensor, [num_bytes] uint8; the mapping lives as long as the tensor's storage."""
    return torch.from_numpy(np.frombuffer(memory, np.uint8))  # pyright: ignore[reportUnknownMemberType]
