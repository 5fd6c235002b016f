"""One rank's end of a weight sync: its share of the policy's weights, layer by layer, in buckets.

Through the object store or by a broadcast every rank sends: the tensors of a layer are dealt to the ranks in turn, and
a rank's own experts are sent by itself, so that no rank gathers those of others. Where several ranks hold the same
experts, they take turns by layers. Through shared memory every rank sends all tensors, to the worker on its own device.
"""

import pipeline.weights.load  # noqa: F401  # isort: skip  sets DS_ACCELERATOR before deepspeed reads it
from collections.abc import Collection, Generator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.train import TrainerConfig
from pipeline.models.lora import merge_adapters
from pipeline.train.expert_parallel import as_fused, pop_own_experts
from pipeline.train.state import gathered
from pipeline.weights.fill import layers
from pipeline.weights.fused import checkpoint_tensors
from rollout.broadcast import AnyBucket, BroadcastBucket, broadcast, open_group
from rollout.device import Ledger
from rollout.device_memory import SharedBucket, SharedMemory, device_name
from rollout.types import GroupAddress, Transport
from rollout.weights import as_bytes, divide, make_record, to_bucket


class WeightSender:
    """Sends this rank's buckets, in one sync after the other.

    held_bytes: the most bytes that a sync took beside the rank's own weights, at any time so far: a gathered layer,
        weights merged with adapters, the bucket that is sent, and the one before it, which engines may still be
        loading.
    """

    def __init__(
        self, model: PreTrainedModel, trainer: TrainerConfig, device: torch.device, ledger: Ledger | None
    ) -> None:
        """ledger: of a simulated device, into which the memory of a sync is entered."""
        self.held_bytes = 0
        self._ledger = ledger
        self._model, self._trainer, self._device = model, trainer, device
        self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._tied = set(model.all_tied_weights_keys)
        self._group: Any = None  # with the engines' workers, where they are on other devices
        self._buckets: Generator[AnyBucket] | None = None  # of the sync that is under way
        self._memories: list[SharedMemory | None] = []  # of the buckets so far; all but the last two are freed

    def open_group(self, address: GroupAddress) -> None:
        """Open this rank's group with the engines' workers, for the transport "broadcast"."""
        self._group = open_group(address, 0, self._device)

    def begin(self, bucket_mib: float, engine_devices: Collection[str], transport: Transport | None) -> None:
        """Prepare to send buckets of about `bucket_mib` MiB.

        engine_devices: names of the engines' devices (see device_name). A rank on another shares no memory.
        transport: None takes the one that placement allows.
        """
        self.end()
        own: Transport = "broadcast" if self._group else "store" if self._device.type == "cpu" else "shared"
        self.held_bytes, self._engine_devices, self._transport = 0, engine_devices, transport or own
        self._buckets = self._generate(bucket_mib)

    def next(self) -> tuple[int | None, AnyBucket | None]:
        """Return the next bucket, after the bytes held so far; None and None after the last. The engines must have
        loaded a bucket when the second after it is asked for.

        Every rank must take part. All have equally many, so that they can be asked in step; where a rank has nothing to
        send, its bucket is empty.
        """
        assert self._buckets, "begin first"
        bucket = next(self._buckets, None)
        return (None if bucket is None else self.held_bytes), bucket

    def broadcast(self, number: int) -> None:
        """Send the bytes of bucket `number`, counted from 0, if there are any."""
        if (memory := self._memories[number]) is not None:
            broadcast(self._group, memory.memory)

    def end(self) -> None:
        """Free what a sync holds, also one that an error interrupted."""
        if self._buckets:
            self._buckets.close()
            self._enter(0)
        self._buckets, self._memories = None, []
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()

    def _generate(self, bucket_mib: float) -> Generator[AnyBucket]:
        before = 0
        for index, layer in enumerate(layers(self._model)):
            with gathered(layer, zero_stage=self._trainer.zero_stage):
                copied = sum(tensor.nbytes for tensor in layer.values()) if self._trainer.zero_stage == 3 else 0
                own = {name: tensor.detach() for name, tensor in layer.items() if name not in self._tied}
                tensors = merge_adapters(self._model, own)
                copied += sum(tensor.nbytes for name, tensor in tensors.items() if tensor is not own[name])
                parts = list(divide(self._share(index, tensors).items(), bucket_mib))
                for part in [*parts, *[[]] * (_largest(len(parts), self._device) - len(parts))]:
                    size = sum(tensor.nbytes for _, tensor in part)
                    self._enter(copied + before + size)
                    before = size
                    yield self._pack(part)

    def _enter(self, num_bytes: int) -> None:
        """Count the bytes that the sync takes from now on."""
        self.held_bytes = max(self.held_bytes, num_bytes)
        if self._ledger is not None:
            self._ledger.hold({"sync": num_bytes})

    def _share(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what this rank sends of a gathered layer."""
        if self._transport == "shared":
            return checkpoint_tensors(self._model, as_fused(self._model, tensors))
        experts = pop_own_experts(self._model, tensors)
        whole = checkpoint_tensors(self._model, tensors)
        share = {name: whole[name] for name in list(whole)[self._rank :: self._world_size]}
        size = self._trainer.expert_parallel_size
        takes_turn = index % (self._world_size // size) == self._rank // size
        return share | experts if takes_turn else share

    def _pack(self, part: list[tuple[str, Tensor]]) -> AnyBucket:
        if not part or self._transport == "store":
            self._memories.append(None)
            return to_bucket([(name, tensor.cpu()) for name, tensor in part])
        memory = SharedMemory([as_bytes(tensor) for _, tensor in part], self._device)
        self._memories[:-1] = [None] * len(self._memories[:-1])
        self._memories.append(memory)
        pairs = zip(part, memory.payloads, strict=True)
        records = [make_record(name, tensor, payload) for (name, tensor), payload in pairs]
        if self._transport == "broadcast":
            return BroadcastBucket(records, memory.starts, memory.sizes, memory.memory.nbytes, self._rank)
        own = device_name(self._device)
        handles = {own: memory.handle} if own in self._engine_devices else {}
        return SharedBucket(records, memory.starts, memory.sizes, handles)


def _largest(count: int, device: torch.device) -> int:
    """Return the largest `count` of all ranks."""
    if torch.distributed.get_world_size() == 1:
        return count
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)
