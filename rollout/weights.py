"""The format in which weights travel from trainer to engines: buckets of raw bytes, with a record for each tensor.

Tensors travel as bytes with the name of their dtype, since numpy has no bfloat16. `to_buckets` packs them on the
trainer's side; `open_buckets` checks them on the engine's side before any weight is loaded.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from rollout.types import SyncError, TensorRecord

Payload = npt.NDArray[np.uint8]
"""Bytes of a tensor, [num_bytes]."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Part of the tensors of a sync; `records[i]` describes `payloads[i]`."""

    records: list[TensorRecord]
    payloads: list[Payload]


def to_buckets(tensors: Iterable[tuple[str, torch.Tensor]], bucket_mib: int) -> Iterator[Bucket]:
    """Pack named CPU tensors, in their order, into buckets of about `bucket_mib` MiB, at least one tensor each.

    The payload of a contiguous tensor is a view of its memory: send each bucket before the tensor changes.
    """
    bucket, size = Bucket([], []), 0
    for name, tensor in tensors:
        payload = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        if bucket.records and size + payload.nbytes > bucket_mib * 2**20:
            yield bucket
            bucket, size = Bucket([], []), 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        bucket.records.append(TensorRecord(name, tuple(tensor.shape), dtype, xxhash.xxh3_64_intdigest(payload.data)))
        bucket.payloads.append(payload)
        size += payload.nbytes
    if bucket.records:
        yield bucket


def open_buckets(
    buckets: Iterable[Bucket], expected: Mapping[str, tuple[int, ...]]
) -> tuple[list[TensorRecord], list[tuple[str, torch.Tensor]]]:
    """Check a whole sync and return its manifest and its tensors, which are views of the payloads.

    Raises SyncError, naming the tensor, for a payload that does not match its record (checksum, size), and for a tensor
    that is missing, unknown, sent twice or of another shape than in `expected`.
    """
    records: dict[str, TensorRecord] = {}
    tensors: list[tuple[str, torch.Tensor]] = []
    for bucket in buckets:
        for record, payload in zip(bucket.records, bucket.payloads, strict=True):
            if record.name in records:
                raise SyncError(f"tensor '{record.name}' was sent twice in one sync")
            if record.name not in expected:
                raise SyncError(f"tensor '{record.name}' is not one of the engine's checkpoint")
            if record.shape != expected[record.name]:
                raise SyncError(
                    f"tensor '{record.name}' has shape {record.shape}, the engine's has {expected[record.name]}"
                )
            tensors.append((record.name, _open(record, payload)))
            records[record.name] = record
    missing = [name for name in expected if name not in records]
    if missing:
        raise SyncError(f"{len(missing)} of {len(expected)} tensors did not arrive, the first is '{missing[0]}'")
    return list(records.values()), tensors


def _open(record: TensorRecord, payload: Payload) -> torch.Tensor:
    """View a payload as its tensor, without a copy."""
    arrived = xxhash.xxh3_64_intdigest(payload.data)
    if arrived != record.checksum:
        raise SyncError(f"tensor '{record.name}': checksum {arrived:#018x} arrived, {record.checksum:#018x} was sent")
    dtype: object = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"tensor '{record.name}': torch has no dtype '{record.dtype}'")
    if payload.nbytes != math.prod(record.shape) * dtype.itemsize:
        raise SyncError(f"tensor '{record.name}': {payload.nbytes} bytes are no {record.dtype} of {record.shape}")
    with warnings.catch_warnings():
        # torch warns of the object store's read-only memory; the engine only reads it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(payload)  # pyright: ignore[reportUnknownMemberType]
    return flat.view(dtype).view(record.shape)
