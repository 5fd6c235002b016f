"""How weights travel from trainer to engine: buckets of arrays, and a manifest that says what must arrive.

An array crosses as raw bytes with its dtype by name, since numpy has no bfloat16. Both ends of the wire are here:
`to_buckets` packs, `open_buckets` proves that what came is what was sent, before the engine is touched.
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
"""A tensor's bytes, flat."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some tensors on their way: `records[i]` describes `payloads[i]`, a flat uint8 array."""

    records: list[TensorRecord]
    payloads: list[Payload]


def to_buckets(tensors: Iterable[tuple[str, torch.Tensor]], bucket_mib: int) -> Iterator[Bucket]:
    """Packs named CPU tensors, in their order, into buckets of about `bucket_mib` MiB, at least one tensor each.

    The payload of a contiguous tensor is a view of its memory: hand each bucket on before the tensor changes.
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
    """Manifest and tensors of a whole sync, in the order of arrival; the tensors are views of the payloads.

    Raises SyncError, naming the tensor, when a payload is not what its record says (checksum, size), or when the
    names and shapes are not exactly those `expected`: one tensor missing, unknown, twice or of another shape.
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
    """The tensor a payload holds, without a copy."""
    arrived = xxhash.xxh3_64_intdigest(payload.data)
    if arrived != record.checksum:
        raise SyncError(f"tensor '{record.name}': checksum {arrived:#018x} arrived, {record.checksum:#018x} was sent")
    dtype: object = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"tensor '{record.name}': torch has no dtype '{record.dtype}'")
    if payload.nbytes != math.prod(record.shape) * dtype.itemsize:
        raise SyncError(f"tensor '{record.name}': {payload.nbytes} bytes are no {record.dtype} of {record.shape}")
    with warnings.catch_warnings():
        # Ray's object store hands out read-only memory, which torch warns of; the engine only reads it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(payload)  # pyright: ignore[reportUnknownMemberType]
    return flat.view(dtype).view(record.shape)
