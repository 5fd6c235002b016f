"""Receive weights inside vLLM's workers, through vLLM's weight-transfer API.

A worker opens an update, gets one bucket after the other, and closes the update (`start_weight_update`,
`update_weights` and `finish_weight_update` in vllm/v1/worker/gpu_worker.py, vLLM 0.32.0). In between vLLM's layerwise
reload loads each module once its last tensor has arrived: it quantises FP8 weights, packs experts, and copies the
result into the memory that the module had before. Matrices that attention absorbs are redone at the end.

vLLM imports this file in every worker process (`worker_extension_cls`).
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from rollout.broadcast import AnyBucket, BroadcastBucket, broadcast, open_group
from rollout.device import DeviceError, Ledger
from rollout.device_memory import SharedBucket, SharedMemory, device_name, views
from rollout.types import GroupAddress, ReceivedWeights, SyncError
from rollout.weights import Bucket, HeldBytes, Manifest, as_tensor, open_tensor

BACKEND = "alignyard"
"""Name under which vLLM knows the transfer engine of this file."""


@dataclass
class StreamInit(WeightTransferInitInfo):
    """Groups of the ranks that broadcast, none for other transports, and this engine's first number in them."""

    groups: list[GroupAddress] = field(default_factory=list)
    first_number: int = 1


@dataclass
class StreamUpdate(WeightTransferUpdateInfo):
    """A bucket in this process's memory, in memory that it can map, or about to be broadcast."""

    bucket: AnyBucket


class StreamTransferEngine(WeightTransferEngine[StreamInit, StreamUpdate]):
    """Loads buckets without a copy before the layer's own."""

    init_info_cls = StreamInit
    update_info_cls = StreamUpdate

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.held = HeldBytes()
        self.rounding: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor
        self._groups: list[Any] = []

    def init_transfer_engine(self, init_info: StreamInit) -> None:
        """Join the ranks' groups, in the order of ranks."""
        number = init_info.first_number + self.parallel_config.rank
        self._groups = [open_group(address, number, self.device) for address in init_info.groups]

    def start_weight_update(self) -> None:
        """Prepare every module for the tensors of a checkpoint.

        An embedding whose rows vLLM pads would never count as loaded, and keep its bucket to the end of the sync: tell
        vLLM the size without the padding.
        """
        initialize_layerwise_reload(self.model)
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding):
                weight: Any = module.weight
                weight.weight_loader_numel = module.shard_indices.num_org_elements * weight.shape[1]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a bucket, and wait until a device has: its sender may then free it."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: StreamUpdate) -> None:
        """Check a bucket and load it. Raises SyncError for damage, before any of its tensors is loaded."""
        bucket = update_info.bucket
        if isinstance(bucket, SharedBucket):
            payloads = bucket.map(self.device)
        elif isinstance(bucket, BroadcastBucket):
            memory = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self.device)
            broadcast(self._groups[bucket.rank], memory)
            payloads = views(memory, bucket.starts, bucket.sizes)
        else:
            payloads = [as_tensor(payload) for payload in bucket.payloads]
        self.held.hold(payloads)
        pairs = zip(bucket.records, payloads, strict=True)
        opened = [(record.name, open_tensor(record, payload)) for record, payload in pairs]
        tensors = [(name, self.rounding(name, tensor)) for name, tensor in opened]
        with disable_mtp_completeness_check():
            cast(Any, self.model).load_weights(tensors)

    def finish_weight_update(self) -> None:
        """Process what no tensor completes: attention's matrices, padded parameters."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the ranks' groups."""
        for group in self._groups:
            group.destroy()
        self._groups = []


class SyncWorker:
    """Methods that vLLM adds to its worker (`worker_extension_cls`): an update that an error can interrupt."""

    _sync_is_open = False

    def device_name(self: Any) -> str:
        """Return the name of this worker's device."""
        return device_name(self.device)

    def pack_head(self: Any) -> None:
        """Pack the output head on a CPU, where vLLM leaves it."""
        if current_platform.is_cpu():
            from rollout.cpu import pack_output_head  # names modules of one release of vLLM

            pack_output_head(self)

    def round_to_fp8(self: Any) -> None:
        """Round weights to FP8 as they arrive, on a CPU that can't multiply in FP8."""
        from rollout.cpu import rounded_to_fp8  # names modules of one release of vLLM

        self.weight_transfer_engine.rounding = rounded_to_fp8

    def begin_sync(self: Any) -> None:
        """Open an update. One that an error interrupted is closed first; the weights it left are overwritten."""
        if self._sync_is_open:
            self._weight_update_active = False
            self.weight_transfer_engine.finish_weight_update()
        self._sync_is_open = True
        self.start_weight_update()

    def receive_bucket(self: Any, update_info: dict[str, Any]) -> str:
        """Load a bucket and return an empty text, or the damage.

        It is returned, not raised: vLLM's executor of several processes makes a RuntimeError of every error, and leaves
        the other workers' answers to the next call.
        """
        try:
            self.update_weights(update_info)
        except SyncError as error:
            return str(error)
        return ""

    def end_sync(self: Any) -> int:
        """Close the update and return the most bytes that buckets held in this process at a time."""
        self.finish_weight_update()
        self.pack_head()
        self._sync_is_open = False
        held, self.weight_transfer_engine.held = self.weight_transfer_engine.held, HeldBytes()
        return held.peak


class WeightReceiver:
    """An engine's end of a sync: checks which tensors arrive, and hands their buckets to vLLM's workers.

    Between `begin` and `end` the workers' weights are partly new, and their modules partly without memory.
    """

    def __init__(self, llm: LLM, expected: Mapping[str, tuple[int, ...]], ledger: Ledger | None) -> None:
        """ledger: of a simulated device, into which the buckets of a sync are entered."""
        self._llm, self._expected, self._ledger = llm, expected, ledger
        self._in_process = llm.llm_engine.vllm_config.parallel_config.world_size == 1
        self._manifest: Manifest | None = None
        self._bucket_bytes = 0
        self._seconds = 0.0
        llm.collective_rpc("init_weight_transfer_engine", args=({},))

    def devices(self) -> list[str]:
        """Names of the workers' devices (rollout.device_memory.device_name)."""
        return self._llm.collective_rpc("device_name")

    def refuse_partial(self, name: str) -> None:
        """Raise DeviceError, naming the engine, while a sync is under way or after an error interrupted one."""
        if self._manifest is not None:
            raise DeviceError(f"{name}: its last sync did not end, so its weights are partly old; sync them again")

    def connect(self, groups: list[GroupAddress], first_number: int) -> None:
        """Join the ranks' groups; the engine's workers are `first_number` and those that follow."""
        init_info = {"groups": groups, "first_number": first_number}
        self._llm.collective_rpc("init_weight_transfer_engine", args=(init_info,))

    def begin(self) -> None:
        """Open an update in every worker."""
        self._seconds = 0.0
        with self._timer():
            self._manifest = Manifest(self._expected)
            self._llm.collective_rpc("begin_sync")

    def receive(self, buckets: Sequence[AnyBucket]) -> None:
        """Check a bucket of each rank, load them in every worker. Raises SyncError naming the tensor that is damaged,
        unknown, sent twice, of another shape than in the engine's checkpoint, or not the same on all ranks."""
        assert self._manifest is not None, "begin first"
        same = [bucket for bucket in buckets if isinstance(bucket, SharedBucket)]
        if same:  # the same tensors on each rank's device
            buckets = [same[0].merged(same[1:])]
        with self._timer():
            for bucket in buckets:
                if bucket.records:  # a rank with nothing to send sends an empty bucket
                    self._manifest.add(bucket.records)
                    self._enter(_num_bytes(bucket))
                    self._load(bucket)

    def end(self) -> ReceivedWeights:
        """Close the update. Raises SyncError naming a tensor that did not arrive."""
        assert self._manifest is not None, "begin first"
        records = self._manifest.complete()
        with self._timer():
            held: list[int] = self._llm.collective_rpc("end_sync")
        self._enter(0)
        self._manifest = None
        return ReceivedWeights(records, max(held), self._seconds)

    @contextmanager
    def _timer(self) -> Generator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def _enter(self, num_bytes: int) -> None:
        """Enter a bucket into the ledger; the one before it may still be in use, unless this is the end."""
        if self._ledger is not None:
            self._ledger.hold({"sync": num_bytes and num_bytes + self._bucket_bytes})
        self._bucket_bytes = num_bytes

    def _load(self, bucket: AnyBucket) -> None:
        """Load one bucket, without its bytes in a message to another process."""
        memory = None
        if isinstance(bucket, Bucket) and not self._in_process:
            memory = SharedMemory([as_tensor(payload) for payload in bucket.payloads], torch.device("cpu"))
            bucket = SharedBucket(bucket.records, memory.starts, memory.sizes, {"cpu": memory.handle})
        faults = self._llm.collective_rpc("receive_bucket", args=({"bucket": bucket},))
        del memory  # the workers have mapped it
        if fault := next(filter(None, faults), ""):
            raise SyncError(fault)


def _num_bytes(bucket: AnyBucket) -> int:
    return sum(as_tensor(each).nbytes for each in bucket.payloads) if isinstance(bucket, Bucket) else sum(bucket.sizes)


WeightTransferEngineFactory.register_engine(BACKEND, StreamTransferEngine)
