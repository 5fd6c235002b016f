"""Tensors as raw bytes in buckets, ready for the object store."""

import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rollout.weights import Bucket, TensorRecord


def layer_buckets(layer: dict[str, Tensor], max_bytes: int) -> Iterator[Bucket]:
    """The tensors of one layer in buckets of at most max_bytes; a larger tensor goes alone.

    On the CPU a payload is a view of the tensor: its bytes are first copied when the bucket enters the object store.
    """
    records: list[TensorRecord] = []
    payloads: list[np.ndarray] = []
    size = 0
    for name, tensor in layer.items():
        payload = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        if payloads and size + payload.nbytes > max_bytes:
            yield Bucket(records, payloads)
            records, payloads, size = [], [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        records.append(TensorRecord(name, tuple(tensor.shape), dtype, zlib.crc32(payload.data)))
        payloads.append(payload)
        size += payload.nbytes
    if payloads:
        yield Bucket(records, payloads)
