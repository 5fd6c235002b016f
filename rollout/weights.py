"""The format in which weights travel from trainer to engines: buckets of raw bytes, with a record for each tensor.

Tensors travel as bytes with the name of their dtype, since numpy has no bfloat16. `to_buckets` packs them on the
trainer's side. On the engine's side a `Manifest` checks which tensors arrive, and `open_bucket` their bytes, before any
of a bucket's weights is loaded.
"""

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from rollout.types import SyncError, TensorRecord

Payload = npt.NDArray[np.uint8]
"""Bytes of a tensor, [num_bytes]."""
_BLOCK_WORDS = 2**22
"""Words of a tensor that a checksum on a device takes at a time, which bounds its memory."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Part of the tensors of a sync; `records[i]` describes `payloads[i]`."""

    records: list[TensorRecord]
    payloads: list[Payload]


def divide(tensors: Iterable[tuple[str, torch.Tensor]], bucket_mib: float) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Divide named tensors, in their order, into parts of about `bucket_mib` MiB, at least one tensor each."""
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > bucket_mib * 2**20:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += tensor.nbytes
    if part:
        yield part


def to_buckets(tensors: Iterable[tuple[str, torch.Tensor]], bucket_mib: float) -> Iterator[Bucket]:
    """Pack named CPU tensors, in their order, into buckets of about `bucket_mib` MiB, at least one tensor each."""
    return map(to_bucket, divide(tensors, bucket_mib))


def to_bucket(tensors: Sequence[tuple[str, torch.Tensor]]) -> Bucket:
    """Pack named CPU tensors. The payload of a contiguous tensor is a view of its memory: send the bucket before the
    tensor changes."""
    payloads = [as_bytes(tensor) for _, tensor in tensors]
    records = [make_record(name, tensor, data) for (name, tensor), data in zip(tensors, payloads, strict=True)]
    return Bucket(records, [payload.numpy() for payload in payloads])


class Manifest:
    """Records of the tensors that have arrived in a sync, each checked against the engine's checkpoint."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._expected = expected
        self._records: dict[str, TensorRecord] = {}

    def add(self, records: Iterable[TensorRecord]) -> None:
        """Add a bucket's records. Raises SyncError for a tensor that is unknown, sent twice or of another shape."""
        for record in records:
            if record.name in self._records:
                raise SyncError(f"tensor '{record.name}' was sent twice in one sync")
            if record.name not in self._expected:
                raise SyncError(f"tensor '{record.name}' is not one of the engine's checkpoint")
            if record.shape != self._expected[record.name]:
                raise SyncError(
                    f"tensor '{record.name}' has shape {record.shape}, the engine's has {self._expected[record.name]}"
                )
            self._records[record.name] = record

    def complete(self) -> list[TensorRecord]:
        """Return all records in their order of arrival. Raises SyncError if a tensor has not arrived."""
        missing = [name for name in self._expected if name not in self._records]
        if missing:
            raise SyncError(
                f"{len(missing)} of {len(self._expected)} tensors did not arrive, the first is '{missing[0]}'"
            )
        return list(self._records.values())


def open_bucket(bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
    """Check a bucket and return its tensors by name, as views of its payloads. Raises SyncError as `open_tensor`."""
    pairs = zip(bucket.records, bucket.payloads, strict=True)
    return [(record.name, open_tensor(record, as_tensor(payload))) for record, payload in pairs]


def open_tensor(record: TensorRecord, payload: torch.Tensor) -> torch.Tensor:
    """View bytes, [num_bytes] uint8, as their tensor, without a copy.

    Raises SyncError, naming the tensor, for bytes that do not match its record (checksum, size).
    """
    arrived = bytes_checksum(payload)
    if arrived != record.checksum:
        raise SyncError(f"tensor '{record.name}': checksum {arrived:#018x} arrived, {record.checksum:#018x} was sent")
    dtype: object = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"tensor '{record.name}': torch has no dtype '{record.dtype}'")
    if payload.nbytes != math.prod(record.shape) * dtype.itemsize:
        raise SyncError(f"tensor '{record.name}': {payload.nbytes} bytes are no {record.dtype} of {record.shape}")
    return payload.view(dtype).view(record.shape)


def make_record(name: str, tensor: torch.Tensor, payload: torch.Tensor) -> TensorRecord:
    """Describe a tensor whose bytes are `payload`."""
    return TensorRecord(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), bytes_checksum(payload))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor's bytes, [num_bytes] uint8; a copy if it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def as_tensor(payload: Payload) -> torch.Tensor:
    """View a payload as a tensor, [num_bytes] uint8."""
    with warnings.catch_warnings():
        # torch warns of the object store's read-only memory; the engine only reads it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(payload)  # pyright: ignore[reportUnknownMemberType]


def bytes_checksum(payload: torch.Tensor) -> int:
    """Compute a checksum of bytes, [num_bytes] uint8, where they are: XXH3 on the host, `weighted_sum` on a device."""
    if payload.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(payload.numpy().data)
    return weighted_sum(payload)


def weighted_sum(payload: torch.Tensor) -> int:
    """Sum the 32-bit words of `payload`, the i-th times 2i + 1, modulo 2**64.

    Odd factors are invertible, so damage within one word always shows; so does an exchange of two words.
    """
    padded = torch.nn.functional.pad(payload, (0, -len(payload) % 4))
    words = padded.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=payload.device)
    for first in range(0, len(words), _BLOCK_WORDS):
        block = words[first : first + _BLOCK_WORDS].long() & 0xFFFFFFFF
        total += (block * torch.arange(2 * first + 1, 2 * (first + len(block)) + 1, 2, device=block.device)).sum()
    return int(total) % 2**64


class HeldBytes:
    """Counts the bytes of buckets that something in this process still references, and their peak.

    A bucket's memory is freed as a whole, so it counts until the last of its payloads is gone.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._buckets: list[tuple[int, int]] = []  # number of memories that still live, and bytes of all

    def hold(self, payloads: Iterable[torch.Tensor]) -> None:
        """Count a bucket from now on."""
        storages = [payload.untyped_storage() for payload in payloads]
        memories = {storage.data_ptr(): storage for storage in storages}
        self._buckets.append((len(memories), sum(storage.nbytes() for storage in memories.values())))
        for storage in memories.values():
            weakref.finalize(storage, self._drop, len(self._buckets) - 1).atexit = False
        self.peak = max(self.peak, sum(num_bytes for count, num_bytes in self._buckets if count))

    def _drop(self, index: int) -> None:
        count, num_bytes = self._buckets[index]
        self._buckets[index] = (count - 1, num_bytes)
